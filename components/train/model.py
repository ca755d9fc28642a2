"""The base model with LoRA on all of its linear layers except the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from components.common.loading import load_model
from components.train.batches import attend_row_by_row
from components.train.plan import Plan


def load_base(base: Path, plan: Plan) -> Any:
    """The frozen causal language model, in the compute precision or quantised, with its rows kept apart when they are packed.

    Raises:
        ModelError: broken, incomplete, or of a kind that the library does not know.
    """
    compute = plan.compute._replace(device=torch.device("cpu")) if plan.sharded else plan.compute  # no card could hold it
    model = load_model(base, compute, quantization_config(plan))
    if plan.packing:
        attend_row_by_row(model)
    return model


def quantization_config(plan: Plan) -> Any:
    """How bitsandbytes quantises the base: 4-bit NF4 with double quantisation (QLoRA, arXiv 2305.14314), or LLM.int8() (arXiv 2208.07339)."""
    from transformers import BitsAndBytesConfig

    if plan.quantization == "none":
        return None
    if plan.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=plan.compute.dtype
    )


def add_lora(model: Any, plan: Plan) -> Any:
    """Wrap a model with fp32 LoRA layers on every linear layer except the head; `plan.seed` decides their first weights.

    Method: LoRA (arXiv 2106.09685), y = W x + alpha / r · B A x with B = 0 at the start; rsLoRA (arXiv 2312.03732) scales by
    alpha / sqrt(r); DoRA (arXiv 2402.09353) learns the magnitude of each output apart.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(plan.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.lora_r,
        lora_alpha=plan.lora_alpha,
        lora_dropout=plan.lora_dropout,
        use_rslora=plan.use_rslora,
        use_dora=plan.use_dora,
        target_modules="all-linear",
    )
    if plan.gradient_checkpointing:
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
    model.eval()
    if not any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        return  # the library takes a second to load
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
