"""Load a causal language model for inference, refuse a broken one, and give its memory back afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.device import Compute
from components.common.errors import ModelError, ServiceError, first_line


def load_causal_lm(folder: Path, compute: Compute) -> tuple[Any, Any]:
    """The model, ready for inference, and the tokenizer of a Hugging Face folder with safetensors.

    Raises:
        ModelError, ServiceError: see `load_tokenizer` and `load_model`.
    """
    tokenizer = load_tokenizer(folder)
    return load_model(folder, compute).eval(), tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: missing or broken.
    """
    from transformers import AutoTokenizer

    if not [*folder.glob("tokenizer.*"), *folder.glob("vocab.*")]:  # the library would go on with an empty vocabulary
        raise ModelError("the model folder has no tokenizer", where=str(folder), fix="add its tokenizer.json, or fetch the model again")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer can't be loaded: {first_line(error)}", where=str(folder), fix="fetch the model again") from None


def load_model(folder: Path, compute: Compute, quantization_config: Any = None) -> Any:
    """The causal language model of a folder with safetensors.

    Raises:
        ModelError: a file is absent or broken, or weights are missing. ServiceError: the device's memory is too small.
    """
    quiet_libraries()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    on_device = compute.device.type == "cuda" or quantization_config is not None
    if quantization_config is None:
        quantization_config = _unpacked(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=compute.dtype,
            **({} if quantization_config is None else {"quantization_config": quantization_config}),
            device_map={"": compute.device} if on_device else None,
            attn_implementation="sdpa",
            use_safetensors=True,  # a pickle could run code
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise ServiceError(f"the memory is too small for the model: {error}", where=str(folder), fix="free memory on the device") from None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the model can't be loaded: {first_line(error)}", where=str(folder), fix="fetch or merge the model again"
        ) from None
    model, report = loaded
    if report["missing_keys"]:  # the library would go on with random weights
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{len(report['missing_keys'])} weights are missing: {names}", where=str(folder), fix="fetch or merge the model again"
        )
    return model


def _unpacked(folder: Path) -> Any:
    """How to read a folder whose weights are packed for a serving engine: back into plain ones; None for any other folder."""
    try:
        packed = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError):  # the library says it better
        return None
    if not packed or packed.get("quant_method") != "compressed-tensors":
        return None
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


def check_scores(model: Any, token_ids: Sequence[int], folder: Path) -> None:
    """Refuse weights that are NaN or too large: they load without a word, and every answer is the token 0.

    Raises:
        ModelError: one forward pass over `token_ids` gives scores that are not finite.
    """
    import torch

    with torch.inference_mode():
        scores = model(torch.tensor([list(token_ids)], device=model.device)).logits
    if not torch.isfinite(scores).all():
        raise ModelError("the model's weights are broken: its scores are not finite", where=str(folder), fix="merge or train it again")


def return_memory(device: Any) -> None:
    """Give freed memory back to the system: a service that reloads for months must not grow."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def quiet_libraries() -> None:
    """Drop what the libraries say to each other: a hint to a package that downloads code, a renamed attribute."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
