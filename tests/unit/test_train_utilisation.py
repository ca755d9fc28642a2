"""How much of a card's peak a run used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from components.train.utilisation import Shape, attended_pairs, flops, peak_flops, shape_of, utilisation

HIDDEN, LAYERS, INNER, VOCABULARY, KEY_VALUE = 3584, 28, 18944, 152064, 512
QWEN_7B = Shape(LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INNER), HIDDEN * VOCABULARY, HIDDEN, (0,) * LAYERS)


def test_the_published_record_reads_as_its_publisher_says() -> None:
    """NeMo AutoModel: Qwen2.5-7B, LoRA, 4096 tokens, every token learned: 14,110 tokens/s on one H100; 43.9 % under 4N + attention."""
    told = utilisation(
        QWEN_7B, [4096], tokens=14_110, trainable_tokens=14_110, seconds=1, card="NVIDIA H100 80GB HBM3", cards=1, precision="bf16"
    )
    assert told["peak_share"] == pytest.approx(0.439, abs=0.001)
    assert told["flops_per_second"] == pytest.approx(434e12, rel=0.002)
    assert "4 · linear_parameters" in told["formula"]


def test_attention_by_hand() -> None:
    for window in (0, 8):  # a position sees itself and those before it; the formula leaves half of itself out
        by_hand = sum(min(at + 1, window or 100) for at in range(100))
        assert attended_pairs(100, window) == pytest.approx(by_hand, rel=0.011)
    assert attended_pairs(100) == 5000
    assert attended_pairs(5, 8) == attended_pairs(5)
    only_attention = Shape(0, 0, 64, (0, 0))
    assert flops(only_attention, [10], 10, 10) == 12 * 64 * 50 * 2
    assert flops(only_attention, [10], 20, 10) == 2 * flops(only_attention, [10], 10, 10), "two passes over the rows"
    assert flops(only_attention, [20], 20, 20) == 4 * flops(only_attention, [10], 10, 10), "the square of the length"


def test_the_head_counts_for_learned_tokens_only() -> None:
    shape = Shape(1000, 10_000, 0, ())
    assert flops(shape, [100], 100, 20) == 4 * 1000 * 100 + 4 * 10_000 * 20


def test_the_shape_is_that_of_the_loaded_model(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    linear = sum(
        module.weight.numel() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    shape = shape_of(tiny_model)
    assert shape is not None
    assert shape.linear_parameters == linear
    assert shape.head_parameters == model.lm_head.weight.numel()
    assert shape.attention_width == 128
    assert shape.windows == (0, 0, 0, 0)


def test_a_sliding_window_and_experts_are_seen(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100, "sliding_window": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["sliding_attention", "full_attention"]}), encoding="utf-8")
    shape = shape_of(tmp_path)
    assert shape is not None
    assert shape.windows == (16, 0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_sliding_window": False}), encoding="utf-8")
    shape = shape_of(tmp_path)
    assert shape is not None
    assert shape.windows == (0, 0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 8}), encoding="utf-8")
    assert shape_of(tmp_path) is None


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA T400 4GB", None),
        ("Some Card", None),
    ],
)
def test_the_peak_of_a_card(card: str, tflops: float | None) -> None:
    assert peak_flops(card) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(
    ("card", "precision", "shape", "why"),
    [
        ("", "bf16", QWEN_7B, "CPU"),
        ("Some Card", "bf16", QWEN_7B, "Some Card"),
        ("Tesla T4", "fp32", QWEN_7B, "fp32"),
        ("NVIDIA L4", "bf16", None, "experts"),
    ],
)
def test_no_share_without_its_reason(card: str, precision: str, shape: Shape | None, why: str) -> None:
    told = utilisation(shape, [10], tokens=10, trainable_tokens=5, seconds=1, card=card, cards=1, precision=precision)
    assert told["peak_share"] is None
    assert why in told["why_no_share"]
    assert (told["flops_per_second"] is None) == (shape is None)


def test_two_cards_have_twice_the_peak() -> None:
    one, two = (
        utilisation(QWEN_7B, [10], tokens=10, trainable_tokens=5, seconds=1, card="NVIDIA L4", cards=cards, precision="bf16")
        for cards in (1, 2)
    )
    assert one["peak_share"] == 2 * two["peak_share"]
