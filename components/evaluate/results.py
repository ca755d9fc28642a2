"""`evaluation_results.json`, the record of an evaluation; schema version 1.

    schema_version   1; a later version may add keys, and changes the number when it changes one
    decision         "promote" or "hold"
    reasons          [{rule, passed, english, chinese}], one for each rule of the gate
    model            {uri, digest, chat_digest} of the tuned model
    base             {name, digest}, or null
    data             {path, digest, available, used, too_long: [line], leaked: [line] or null}
    settings         what was asked for
    metrics          {name: {tuned, base, difference: {mean, low, high}, better, width}}; without a base: base and difference are null
    lengths          {reference, base, tuned}: {characters, tokens: {mean, median, p10, p90}, ratio_to_reference}
    bertscore        {encoder, digest, layers, window_tokens, cut_texts}, or null when it was skipped
    rows             [{line, question, history, reference, tuned, base}]; a model's: {answer, finish_reason, tokens, scores: {metric: value}}
    timings          seconds; the only part that differs between two runs on the same machine

A number that is not finite is null; the gate says which it was. `metrics` are means over `rows`; a difference is tuned − base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.evaluate.answers import Answers
from components.evaluate.gate import Decision, Reason
from components.evaluate.held_out import HeldOut
from components.evaluate.lengths import length_statistics
from components.evaluate.metrics import METRICS
from components.evaluate.scores import Comparison, RowScores

SCHEMA_VERSION = 1
DECIMALS = 6

Scored = tuple[Answers, list[RowScores]]


def build_results(
    *,
    verdict: tuple[Decision, list[Reason]],
    model: dict[str, str],
    base: dict[str, str] | None,
    data: dict[str, str],
    settings: dict[str, Any],
    held_out: HeldOut,
    comparison: Comparison,
    tuned_scored: Scored,
    base_scored: Scored | None,
    bertscore: dict[str, Any] | None,
    timings: dict[str, Any],
) -> dict[str, Any]:
    """The content of `evaluation_results.json`, as the head of this module describes it."""
    scored = {"tuned": tuned_scored, "base": base_scored}
    return {
        "schema_version": SCHEMA_VERSION,
        "decision": verdict[0],
        "reasons": [reason._asdict() for reason in verdict[1]],
        "model": model,
        "base": base,
        "data": data
        | {"available": held_out.available, "used": len(held_out.rows), "too_long": held_out.too_long, "leaked": held_out.leaked},
        "settings": settings,
        "metrics": {name: _metric(name, comparison) for name in comparison.tuned},
        "lengths": _lengths(held_out, scored),
        "bertscore": bertscore,
        "rows": [
            {
                "line": row.line,
                "question": row.question,
                "history": [turn._asdict() for turn in row.history],
                "reference": row.reference,
                **{name: None if one is None else _answer(one, index) for name, one in scored.items()},
            }
            for index, row in enumerate(held_out.rows)
        ],
        "timings": timings,
    }


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The headline numbers as one level of finite numbers; a difference always has the ends of its interval beside it."""
    flat: dict[str, float | None] = {"rows": results["data"]["used"], "promoted": float(results["decision"] == "promote")}
    for name, metric in results["metrics"].items():
        flat[f"tuned_{name}"], flat[f"base_{name}"] = metric["tuned"], metric["base"]
        for end, value in (metric["difference"] or {}).items():
            flat[f"difference_{name}_{end}"] = value
    return {name: value for name, value in flat.items() if value is not None}


def _finite(value: float) -> float | None:
    return round(value, DECIMALS) if math.isfinite(value) else None


def _metric(name: str, comparison: Comparison) -> dict[str, Any]:
    difference = comparison.differences.get(name)
    return {
        "tuned": _finite(comparison.tuned[name]),
        "base": None if comparison.base is None else _finite(comparison.base[name]),
        "difference": None if difference is None else {end: _finite(value) for end, value in difference._asdict().items()},
        "better": METRICS[name].better,
        "width": METRICS[name].width,
    }


def _answer(scored: Scored, index: int) -> dict[str, Any]:
    answers, scores = scored
    completion = answers.completions[index]
    return {
        "answer": answers.texts[index],
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "scores": {name: _finite(value) for name, value in scores[index].items()},
    }


def _lengths(held_out: HeldOut, scored: dict[str, Scored | None]) -> dict[str, Any]:
    rows = held_out.rows
    reference = [len(row.reference) for row in rows]
    lengths: dict[str, Any] = {"reference": length_statistics(reference, [sum(row.is_answer) - 1 for row in rows], reference)}
    for name, one in scored.items():
        if one is not None:
            answers: Answers = one[0]
            tokens: Sequence[int] = [len(completion.token_ids) for completion in answers.completions]
            lengths[name] = length_statistics([len(text) for text in answers.texts], tokens, reference)
    return lengths
