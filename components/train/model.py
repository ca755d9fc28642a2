"""The base model with LoRA on all of its linear layers except the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.common.device import Compute
from components.common.errors import ModelError, first_line
from components.common.loading import quiet_libraries
from components.train.config import TrainSettings


def load_tokenizer(base: Path) -> Any:
    """The base model's tokenizer.

    Raises:
        ModelError: missing or broken.
    """
    from transformers import AutoTokenizer

    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        # The library would make an empty tokenizer up.
        raise ModelError("the model folder has no tokenizer", where=str(base), fix="add its tokenizer.json, or fetch the model again")
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer can't be loaded: {first_line(error)}", where=str(base), fix="fetch the model again") from None


def load_base(base: Path, compute: Compute, *, load_in_4bit: bool = False) -> Any:
    """The frozen causal language model, in the compute precision or in 4-bit NF4 with double quantisation.

    Raises:
        ModelError: broken, incomplete, or of a kind that the library does not know.
    """
    quiet_libraries()
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=compute.dtype,
            quantization_config=_nf4(compute) if load_in_4bit else None,
            device_map={"": compute.device},
            use_safetensors=True,  # a pickle could run code
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"the base model can't be loaded: {first_line(error)}", where=str(base), fix="fetch the model again") from None
    model, report = loaded
    if report["missing_keys"]:  # the library would go on with random weights
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(
            f"{len(report['missing_keys'])} weights of the base model are missing: {names}", where=str(base), fix="fetch the model again"
        )
    return model


def add_lora(model: Any, settings: TrainSettings) -> Any:
    """Wrap a model with fp32 LoRA layers on every linear layer except the head; `settings.seed` decides their first weights.

    Method: LoRA (arXiv 2106.09685), y = W x + alpha / r · B A x with B = 0 at the start.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # The frozen embeddings give states without gradient; a checkpoint of such inputs would train nothing (d16).
        model.enable_input_require_grads()
    # Not `prepare_model_for_kbit_training`: it copies embeddings and head to fp32, gigabytes for a large vocabulary.
    return get_peft_model(model, config)


def evaluation_mode(model: Any) -> None:
    """Switch dropout off, but leave 4-bit layers as they train.

    In evaluation mode on a CPU, bitsandbytes 0.50 packs the 4-bit weights anew for inference, for good: other results, and no gradient
    passes such a layer any more.
    """
    from bitsandbytes.nn import Linear4bit

    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True


def _nf4(compute: Compute) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute.dtype
    )
