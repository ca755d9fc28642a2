"""Load the base in fp32, put the adapter on it, and fold it into the weights: W + alpha / r · B A."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.common.chat import ChatFormat
from components.common.device import Compute, choose_compute
from components.common.errors import ModelError, UserError, first_line
from components.common.loading import load_causal_lm, quiet_libraries
from components.merge.adapter import WEIGHTS, Adapter

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(asked: str) -> Any:
    """The device to merge on, printed with its reason.

    Raises:
        UserError: a GPU was asked for, and there is none.
    """
    compute = choose_compute("fp32")
    if asked == "cuda" and compute.device.type != "cuda":
        raise UserError("there is no GPU", where="--device cuda", fix="use --device cpu, or auto")
    device = compute.device if asked == "auto" else torch.device(asked)
    print(f"merging in fp32; {compute.reason if device == compute.device else f'device: {asked} (as asked)'}", flush=True)
    return device


def load_base(folder: Path, device: Any, chat: ChatFormat) -> tuple[Any, Any]:
    """The base model in fp32, and its tokenizer.

    Raises:
        ModelError: broken, quantised (merging into 4-bit weights destroys a model, d06), or of another chat format than the adapter's.
    """
    model, tokenizer = load_causal_lm(folder, Compute(device, torch.float32, ""))
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError("the base model is quantised", where=str(folder), fix="merge into the base model in its original precision")
    if ChatFormat.of_tokenizer(tokenizer, chat.system_prompt).digest != chat.digest:
        raise ModelError(
            "the base model's tokenizer or chat template is not the one that the adapter was trained with",
            where=str(folder),
            fix="merge the adapter into the base model that it was trained on",
        )
    return model, tokenizer


def put_on(base: Any, adapter: Adapter) -> Any:
    """The base model with the adapter on it.

    Raises:
        ModelError: the adapter is broken, or belongs to a model of other shapes.
    """
    quiet_libraries()
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where, fix = str(adapter.folder), f"merge it into its own base model, {adapter.base_model}"
    try:
        weights = load_file(adapter.folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"the adapter's weights are broken: {first_line(error)}", where=where, fix="run the train step again") from None
    unusable = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if unusable:
        raise ModelError(f"the adapter has weights that are not finite numbers: {unusable[0]}", where=where, fix="train it again")
    try:
        model = PeftModel.from_pretrained(base, str(adapter.folder), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter does not fit this base model: {first_line(error)}", where=where, fix=fix) from None
    # The library only warns about weights that find no place, and leaves those layers as they were.
    strangers = weights.keys() ^ get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if strangers:
        raise ModelError(f"the adapter has other layers than this base model: {sorted(strangers)[0]}", where=where, fix=fix)
    return model.eval()


def merged(model: Any) -> Any:
    """The model with the adapter folded into its weights, in fp32, in place; `safe_merge` refuses weights that are not finite.

    Raises:
        ModelError: the sum is not finite.
    """
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the merged weights are not finite numbers: {first_line(error)}", fix="train with a lower learning rate"
        ) from None


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in the precision that it is stored in.

    Raises:
        ModelError: a weight is too large for it.
    """
    model = model.to(dtype)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(f"a merged weight is too large for {dtype}: {name}", fix="use --precision bf16")
    return model
