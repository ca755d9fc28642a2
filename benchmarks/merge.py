"""Speed of the merge against copying the files, and how its time grows with the number of shards.

    python -m benchmarks.merge
    python -m benchmarks.merge --quick

Models of the Qwen2 family with random bf16 weights and 4, 8 and 16 layers, cut into one shard a layer; an adapter of rank 16 on every
linear layer. Merging and copying alternate; both write through to the disk. The last line is JSON: `ratio` is the speed of the merge
over that of the copy for the largest model, `spread` its range over the rounds; `time_exponent` is the slope of log time over log
shards: 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
BOUND = 0.2
LAYERS = (4, 8, 16)
HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 2048, 5632, 2000, 16


def main() -> None:
    """Time merges and copies, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds: below three minutes")
    arguments = parser.parse_args()
    seconds: dict[int, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for layers in LAYERS:
            folder = Path(name) / str(layers)
            base, adapter = build(folder, layers)
            seconds[layers] = [pair(base, adapter, folder) for _ in range(2 if arguments.quick else arguments.rounds)]
            size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
            merge_s, copy_s = (statistics.median(part) for part in zip(*seconds[layers], strict=True))
            print(f"{layers} shards, {size >> 20} MiB: merge {merge_s:.2f} s, copy {copy_s:.2f} s", flush=True)
            shutil.rmtree(folder)
    ratios = [copy_s / merge_s for merge_s, copy_s in seconds[LAYERS[-1]]]
    fastest = {layers: min(merge_s for merge_s, _ in pairs) for layers, pairs in seconds.items()}
    exponent = math.log(fastest[LAYERS[-1]] / fastest[LAYERS[0]]) / math.log(LAYERS[-1] / LAYERS[0])
    ratio = statistics.median(ratios)
    result = {"name": "merge", "ratio": round(ratio, 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)], "bound": BOUND}
    print(json.dumps(result | {"ok": ratio >= BOUND and exponent < 1.2, "time_exponent": round(exponent, 3)}))


def build(folder: Path, layers: int) -> tuple[Path, Path]:
    """A model folder with one shard a layer, and an adapter folder as train writes it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from components.common.chat import ChatFormat
    from components.common.files import write_json

    torch.manual_seed(layers)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype=torch.bfloat16,
    )
    model = Qwen2ForCausalLM(config).bfloat16()
    layer_bytes = 2 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    model.save_pretrained(folder / "base", max_shard_size=int(layer_bytes * 1.05))
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01)
    lora.save_pretrained(str(folder / "adapter"))
    ChatFormat("", "", 2, (2,), 0).save(folder / "adapter")
    write_json(folder / "adapter" / "train_info.json", {})
    return folder / "base", folder / "adapter"


def pair(base: Path, adapter_folder: Path, folder: Path) -> tuple[float, float]:
    """Seconds of one merge, and of one copy of the weight files."""
    from components.merge.adapter import read_adapter
    from components.merge.streaming import merge_shards

    adapter = read_adapter(adapter_folder)

    def merge(target: Path) -> None:
        with contextlib.redirect_stdout(None):
            merge_shards(base, adapter, target)

    def copy(target: Path) -> None:
        for path in base.glob("*.safetensors"):
            shutil.copyfile(path, target / path.name)

    return _timed(merge, folder / "merged"), _timed(copy, folder / "copied")


def _timed(work: Callable[[Path], None], target: Path) -> float:
    target.mkdir()
    began = time.monotonic()
    work(target)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


if __name__ == "__main__":
    main()
