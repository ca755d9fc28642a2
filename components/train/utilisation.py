"""How much of a card's peak a run used, with the formula it was counted by.

LoRA freezes the weights, so a step computes no gradient of the big matrices: 4 floating-point operations for each of their parameters
and token (2 forward, 2 backward to the inputs), not the 6 of full training. Causal attention is added. What only our implementation
or the method adds (recomputed activations, the LoRA matrices themselves) is not counted, so that figures can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORMULA = (
    "flops = 4 · linear_parameters · tokens + 4 · head_parameters · trainable_tokens"
    " + 12 · attention_width · attended_pairs; share = flops / seconds / (cards · peak)"
)
# Dense 16-bit peaks with fp32 accumulation, TFLOP/s, from the makers' data sheets; the first pattern that a card's name matches counts.
PEAK_TFLOPS = (
    (r"GB200|B200", 2250.0),
    (r"H100.*NVL", 835.0),
    (r"(H100|H800).*PCIe", 756.0),
    (r"GH200|H200|H100|H800", 989.0),
    (r"A100|A800", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10G", 70.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"T4", 65.0),
    (r"V100", 125.0),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
)
EMBEDDING = re.compile(r"embed|wte|wpe|lm_head")


class Shape(NamedTuple):
    """What the operations of a model are counted from.

    Attributes:
        linear_parameters: of the matrices that every token passes, without embeddings and head.
        head_parameters: hidden size times vocabulary; the head is computed for trainable tokens only.
        attention_width: heads times their dimension, of one layer.
        windows: for each layer, how many tokens back it sees; 0: all of them.
    """

    linear_parameters: int
    head_parameters: int
    attention_width: int
    windows: tuple[int, ...]


def shape_of(base: Path) -> Shape | None:
    """Read a model folder's shape from config.json and the safetensors' headers; None for a mixture of experts, which uses a part."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    if any("expert" in key for key in config):
        return None
    heads = config["num_attention_heads"]
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * config["num_hidden_layers"]
    windows = tuple((window or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    shapes = [shape for path in base.glob("*.safetensors") for shape in _matrices(path)]
    return Shape(sum(shapes), config["hidden_size"] * config["vocab_size"], width, windows)


def flops(shape: Shape, row_lengths: Sequence[int], tokens: int, trainable_tokens: int) -> float:
    """Floating-point operations of training on so many tokens, drawn from rows of these lengths.

    A position attends to itself and those before it: a query and a key, a probability and a value, 2 operations each for every
    element of `attention_width`, forward once and backward twice: 12 for each pair.
    """
    pairs_a_pass = sum(attended_pairs(length, window) for length in row_lengths for window in shape.windows)
    pairs = pairs_a_pass * tokens / sum(row_lengths)
    return 4.0 * shape.linear_parameters * tokens + 4.0 * shape.head_parameters * trainable_tokens + 12.0 * shape.attention_width * pairs


def attended_pairs(length: int, window: int = 0) -> float:
    """Pairs of positions in one layer's causal attention over a row, half of the square; `window` tokens back at most, 0: all."""
    seen = min(length, window) if window else length
    return seen * length - seen * seen / 2


def peak_flops(card: str) -> float | None:
    """The 16-bit peak of a card by its name, FLOP/s; None for one that is not in the table, or a part of one."""
    if re.search(r"MIG|Laptop|Max-Q|4090 D", card):
        return None
    return next((tflops * 1e12 for pattern, tflops in PEAK_TFLOPS if re.search(rf"\b({pattern})\b", card)), None)


def utilisation(
    shape: Shape | None,
    row_lengths: Sequence[int],
    *,
    tokens: int,
    trainable_tokens: int,
    seconds: float,
    card: str,
    cards: int,
    precision: str,
) -> dict[str, Any]:
    """The ledger's entry: operations per second, the share of the cards' peak or why there is none, and the formula.

    Args:
        row_lengths: tokens of each training row.
        tokens: real tokens of all optimizer steps, in `seconds` of them; padding is never counted.
        card: the card's name; empty on a CPU.
    """
    if shape is None or not tokens or not seconds:
        why = "the base is a mixture of experts" if shape is None else "no step was made"
        return {"flops_per_second": None, "peak_share": None, "why_no_share": why, "formula": FORMULA}
    done = flops(shape, row_lengths, tokens, trainable_tokens)
    peak = peak_flops(card) if precision != "fp32" else None
    if not card:
        why = "a CPU has no published 16-bit peak"
    elif precision == "fp32":
        why = "computed in fp32; the peaks are those of 16 bits"
    else:
        why = "" if peak else f"no published peak of {card} is in the table"
    return {
        "flops_per_second": done / seconds,
        "peak_share": done / seconds / (cards * peak) if peak else None,
        "why_no_share": why,
        "formula": FORMULA,
        "flops_per_token": done / tokens,
        "card": card,
        "cards": cards,
        "peak_flops_per_second": peak,
        "linear_parameters": shape.linear_parameters,
        "head_parameters": shape.head_parameters,
    }


def _matrices(path: Path) -> list[int]:
    """Sizes of a safetensors file's matrices without embeddings and head; its header is JSON after 8 bytes that hold its length."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__" and not EMBEDDING.search(name)]
    return [shape[0] * shape[1] for shape in shapes if len(shape) == 2]
