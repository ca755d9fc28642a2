"""Which weights an adapter is merged into: for one that was trained on a quantised base there are two answers, so both are measured.

Published tools disagree: some merge into the original 16-bit weights, some into those that training computed with, quantised and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from components.common.chat import ChatFormat
from components.common.errors import UserError
from components.common.loading import return_memory
from components.merge.adapter import Adapter
from components.merge.certificate import Agreement, Expected, compare, expect, require
from components.merge.config import MergeSettings
from components.merge.rows import Row
from components.merge.running import Place, adapted_model, plain_model
from components.merge.streaming import Weights

NAMES = {"original": ("the original weights", "原始权重"), "dequantized": ("the de-quantised weights", "反量化权重")}
RESAMPLES = 2000


class Proven(NamedTuple):
    """One way to merge, proven to be what the adapter on this base computes.

    Attributes:
        proof: the merged fp32 model against the adapter on the same fp32 base.
    """

    weights: Weights
    expected: Expected
    proof: Agreement


class Choice(NamedTuple):
    """The base to merge into, and why, in English and Chinese.

    Attributes:
        interval: 95 % interval of how much better it is than the other one, nats per token; None with one candidate.
    """

    merge_base: str
    reason: str
    reason_zh: str
    interval: tuple[float, float] | None


def bases_to_try(settings: MergeSettings, adapter: Adapter) -> tuple[str, ...]:
    """The kinds of base that are to be measured.

    Raises:
        UserError: de-quantised weights are asked for, and training had no quantised base.
    """
    quantised = adapter.quantization != "none"
    if settings.merge_base == "auto":
        return ("original", "dequantized") if quantised else ("original",)
    if settings.merge_base == "dequantized" and not quantised:
        raise UserError(
            "the adapter was trained on the original weights: there are no de-quantised ones to merge into",
            where="--merge_base dequantized",
            fix="use --merge_base auto",
        )
    return (settings.merge_base,)


def prove(merged: Weights, adapter: Adapter, rows: Sequence[Row], chat: ChatFormat, place: Place, folder: Path, *, label: str) -> Proven:
    """Compare the merged fp32 weights with the adapter on its base, one model in memory at a time.

    Args:
        folder: an existing folder for the logits.

    Raises:
        ModelError: they differ by more than rounding.
    """
    base = Weights(merged.structure, quantization=merged.quantization, quantised=merged.quantised)
    model = adapted_model(base, adapter, place)
    # Where every token reads all the weights from the disk again, continuing greedily would take hours.
    expected = expect(model, rows, chat, folder, greedy=place.whole)
    del model
    return_memory(place.device)
    model = plain_model(merged, place)
    proof = compare(model, rows, expected, label)
    del model
    return_memory(place.device)
    require(proof)
    return Proven(merged, expected, proof)


def choose(found: dict[str, Proven], rows: Sequence[Row], adapter: Adapter, asked: str) -> Choice:
    """The base with the lower NLL on the rows, printed with its reason."""
    nll = {name: proven.proof.nll for name, proven in found.items()}
    if len(nll) == 1:
        (name,) = nll
        if asked != "auto":
            return Choice(name, "as asked", "按要求", None)
        return Choice(name, "the adapter was trained on the original weights", "适配器在原始权重上训练", None)
    best, other = sorted(nll, key=lambda name: nll[name])
    gain = nll[other] - nll[best]
    tokens = [len(row.answer_ids) for row in rows]
    low, high = _interval(found[other].proof.row_nll, found[best].proof.row_nll, tokens)
    clear, clear_zh = ("", "") if low > 0 else (", which is within chance", "，仍在随机误差之内")
    choice = Choice(
        best,
        f"trained on a base in {adapter.quantization}; merged into {NAMES[best][0]} the model is better by {gain:.4f} nats per token "
        f"(95% interval {low:.4f} to {high:.4f}, {len(rows)} rows) than merged into {NAMES[other][0]}{clear}",
        f"训练时基础模型为 {adapter.quantization}；并入{NAMES[best][1]}比并入{NAMES[other][1]}每词元低 {gain:.4f} nat"
        f"（95% 区间 {low:.4f} 至 {high:.4f}，{len(rows)} 个样本）{clear_zh}",
        (low, high),
    )
    print(f"merge base: {choice.merge_base}: {choice.reason}", flush=True)
    return choice


def _interval(worse: Sequence[float], better: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of a difference in nats per token: paired bootstrap over the rows (Efron & Tibshirani 1993), seeded."""
    difference = torch.tensor(worse, dtype=torch.float64) - torch.tensor(better, dtype=torch.float64)
    drawn = torch.randint(len(tokens), (RESAMPLES, len(tokens)), generator=torch.Generator().manual_seed(0))
    means = difference[drawn].sum(dim=1) / torch.tensor(tokens, dtype=torch.float64)[drawn].sum(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
