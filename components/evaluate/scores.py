"""Every metric of every answer, and their means side by side with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.common.progress import progress
from components.evaluate.answers import Answers
from components.evaluate.compare import Interval, mean_interval, paired_interval, wilson_interval
from components.evaluate.degeneration import degeneration
from components.evaluate.facts import Finding, fact_agreement
from components.evaluate.held_out import HeldOutRow
from components.evaluate.metrics import METRICS
from components.evaluate.overlap import Overlap
from components.evaluate.rouge import Rouge

RowScores = dict[str, float | None]  # None: this metric is not defined for the row


@dataclass(frozen=True)
class Scored:
    """One model's answers and what was found about them; one entry per held-out row in each list."""

    answers: Answers
    scores: list[RowScores]
    findings: list[list[Finding]]


@dataclass(frozen=True)
class Comparison:
    """Means of each metric over the rows on which it is defined; a metric that is defined on none of them is absent.

    Attributes:
        base: None without a base model.
        differences: tuned − base of each metric; empty without a base model.
        rows: of each metric, absent ones too, the number of rows on which it is defined for every model.
    """

    tuned: dict[str, Interval]
    base: dict[str, Interval] | None
    differences: dict[str, Interval]
    rows: dict[str, int]


def score_answers(rows: Sequence[HeldOutRow], answers: Answers, rouge: Rouge, overlap: Overlap, label: str) -> Scored:
    """All metrics but BERTScore, by name, for each row."""
    scores: list[RowScores] = []
    findings = []
    with progress(f"{label} model: text metrics", len(rows)) as meter:
        for row, text, completion, nll in zip(rows, answers.texts, answers.completions, answers.nll, strict=True):
            facts = fact_agreement(row.reference, text)
            defined = facts.score is not None
            scores.append(
                {
                    "nll": nll,
                    **rouge.score(row.reference, text),
                    **overlap.score(row.reference, text),
                    "fact_agreement": facts.score,
                    "fact_contradiction": float(facts.contradicted) if defined else None,
                    **degeneration(row.question, text, completion.finish_reason),
                }
            )
            findings.append(facts.findings)
            meter.advance()
    return Scored(answers, scores, findings)


def add_bertscore(encoder: Any, rows: Sequence[HeldOutRow], scored: Mapping[str, Scored], batch_size: int) -> None:
    """Add `bertscore` to the scores of one or two models' answers, which share the references."""
    answers = {name: one.answers.texts for name, one in scored.items()}
    with progress("BERTScore", len(rows) * len(scored)) as meter:
        values = encoder.scores_of_models([row.reference for row in rows], answers, batch_size=batch_size, on_done=meter.advance)
        meter.advance(sum(not text for texts in answers.values() for text in texts))  # empty answers need no work
    for name, one in scored.items():
        for row_scores, value in zip(one.scores, values[name], strict=True):
            row_scores["bertscore"] = value


def compare(
    tuned: Sequence[RowScores],
    base: Sequence[RowScores] | None,
    *,
    confidence: float,
    seed: int,
    names: Sequence[str] = tuple(METRICS),
) -> Comparison:
    """Means of both models, and the differences with their paired intervals.

    Args:
        names: metrics to compare; those that were not measured are left out.
    """
    result = Comparison({}, None if base is None else {}, {}, {})
    for name in (name for name in names if name in tuned[0]):
        own, other = _defined(tuned, base, name)
        result.rows[name] = len(own)
        if own:
            result.tuned[name] = _mean(name, own, confidence, seed)
        if own and result.base is not None:
            result.base[name] = _mean(name, other, confidence, seed)
            result.differences[name] = paired_interval(own, other, confidence=confidence, seed=seed)
    return result


def _defined(tuned: Sequence[RowScores], base: Sequence[RowScores] | None, name: str) -> tuple[list[float], list[float]]:
    """Values of both models on the rows where every model has one; for one model the second list is empty."""
    own, other = [], []
    for at, scores in enumerate(tuned):
        value, twin = scores[name], None if base is None else base[at][name]
        if value is not None and (base is None or twin is not None):
            own.append(value)
            other += [] if twin is None else [twin]
    return own, other


def _mean(name: str, values: Sequence[float], confidence: float, seed: int) -> Interval:
    if METRICS[name].binary:
        return wilson_interval(sum(values), len(values), confidence=confidence)
    return mean_interval(values, confidence=confidence, seed=seed)


def by_stratum(
    strata: Sequence[str], tuned: Sequence[RowScores], base: Sequence[RowScores] | None, *, confidence: float, seed: int
) -> dict[str, Comparison]:
    """The main metrics of the rows of each stratum, in the order of the names."""
    members: dict[str, list[int]] = {}
    for row, name in enumerate(strata):
        members.setdefault(name, []).append(row)
    return {
        name: compare(
            [tuned[row] for row in rows],
            None if base is None else [base[row] for row in rows],
            confidence=confidence,
            seed=seed,
            names=("nll", "rouge_l", "fact_agreement"),
        )
        for name, rows in sorted(members.items())
    }
