"""Every metric of every answer, and their means side by side with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.common.progress import progress
from components.evaluate.answers import Answers
from components.evaluate.compare import Interval, paired_interval
from components.evaluate.degeneration import degeneration
from components.evaluate.held_out import HeldOutRow
from components.evaluate.metrics import METRICS
from components.evaluate.rouge import Rouge

RowScores = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Means of each metric over the rows.

    Attributes:
        base: None without a base model.
        differences: tuned − base of each metric; empty without a base model.
    """

    tuned: dict[str, float]
    base: dict[str, float] | None
    differences: dict[str, Interval]


def score_answers(rows: Sequence[HeldOutRow], answers: Answers, rouge: Rouge, label: str) -> list[RowScores]:
    """All metrics but BERTScore, by name, for each row."""
    scores = []
    with progress(f"{label} model: ROUGE", len(rows)) as meter:
        for row, text, completion, nll in zip(rows, answers.texts, answers.completions, answers.nll, strict=True):
            scores.append({"nll": nll, **rouge.score(row.reference, text), **degeneration(row.question, text, completion.finish_reason)})
            meter.advance()
    return scores


def add_bertscore(encoder: Any, rows: Sequence[HeldOutRow], scored: Sequence[tuple[Answers, list[RowScores]]], batch_size: int) -> None:
    """Add `bertscore` to the scores of one or two models' answers."""
    with progress("BERTScore", len(rows) * len(scored)) as meter:
        for answers, scores in scored:
            values = encoder.scores([row.reference for row in rows], answers.texts, batch_size=batch_size, on_done=meter.advance)
            meter.advance(len(rows) - sum(bool(text) for text in answers.texts))  # empty answers need no work
            for row_scores, value in zip(scores, values, strict=True):
                row_scores["bertscore"] = value


def compare(tuned: Sequence[RowScores], base: Sequence[RowScores] | None, *, confidence: float, seed: int) -> Comparison:
    """Means of both models, and the differences with their paired intervals."""
    names = [name for name in METRICS if name in tuned[0]]
    differences: dict[str, Interval] = {}
    if base is not None:
        for name in names:
            own, other = [scores[name] for scores in tuned], [scores[name] for scores in base]
            differences[name] = paired_interval(own, other, confidence=confidence, seed=seed)
    return Comparison(_means(tuned, names), None if base is None else _means(base, names), differences)


def _means(scores: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {name: sum(row[name] for row in scores) / len(scores) for name in names}
