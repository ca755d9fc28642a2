"""An adapter folder as the train step writes it, made in a few seconds with the PEFT library alone: merge tests need no training step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from components.common.base_model import base_fingerprint
from components.common.chat import ChatFormat
from components.common.files import write_json
from tests.rows import AFTER, pattern_rows

QUANTIZED = {
    "none": None,
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def make_adapter(folder: Path, base: Path, *, quantization: str = "none", steps: int = 60, rate: float = 5e-3, **lora: Any) -> Path:
    """Train LoRA on the pattern rows for some steps of four rows, and save it with what the train step puts beside it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    chat = ChatFormat.of_tokenizer(tokenizer)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=QUANTIZED[quantization],
        device_map={"": "cpu"} if QUANTIZED[quantization] else None,
    )
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **({"r": 8, "lora_alpha": 16} | lora))
    model = get_peft_model(loaded, config).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=rate)
    rows = [chat.example(tokenizer, row["question"], row["answer"]) for row in pattern_rows(AFTER)]
    for step in range(steps):
        batch = [rows[(step * 4 + at) % len(rows)] for at in range(4)]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True, padding_value=chat.pad_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.tensor(mask) for _, mask in batch], batch_first=True)
        model(input_ids=ids, labels=ids.masked_fill(~mask, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(folder, model, tokenizer, base, quantization)
    return folder


def save_adapter(folder: Path, model: Any, tokenizer: Any, base: Path, quantization: str) -> None:
    """Write an adapter and what the train step puts beside it."""
    config = model.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    ChatFormat.of_tokenizer(tokenizer).save(folder)
    info = {
        "base_fingerprint": base_fingerprint(base),
        "data_digest": "rows",
        "plan": {"quantization": quantization},
        "settings": {"quantization": "auto"},
    }
    write_json(folder / "train_info.json", info)


def flags_for(folder: Path, adapter: Path) -> list[str]:
    """The flags of a merge whose outputs lie in a folder."""
    outputs = {"--merge_info": "merge_info.json", "--report": "report.html", "--metrics": "metrics.json"}
    return ["--adapter", str(adapter), *(part for flag, name in outputs.items() for part in (flag, str(folder / name)))]


def record_of(folder: Path) -> dict[str, Any]:
    """The record of a merge with `flags_for`."""
    record: dict[str, Any] = json.loads((folder / "merge_info.json").read_text(encoding="utf-8"))
    return record
