"""`evaluation_results.json`, the record of an evaluation; schema version 2.

    schema_version   2; a later version may add keys, and changes the number when it changes one
    decision         "promote" or "hold"
    reasons          [{rule, passed, english, chinese}], one for each rule of the gate
    model            {uri, digest, chat_digest} of the tuned model
    base             {name, digest}, or null
    data             {path, digest, available, used, stratified_by, too_long: [line], leaked: [line] or null}
    settings         what was asked for
    metrics          {name: {tuned, base, difference: {mean, low, high}, tuned_interval, base_interval: {low, high}, rows, better, width}};
                     without a base: base, base_interval and difference are null. `rows`: on how many rows the metric is defined (a
                     reference without medical facts has no fact_agreement); with none, every number is null
    strata           {name: {rows, metrics: {nll, rouge_l, fact_agreement: as above, without better and width}}}
    lengths          {reference, base, tuned}: {characters, tokens: {mean, median, p5, p10, p25, p75, p90, p95}, ratio_to_reference}
    exam             null without one, else {path, available, tuned, base: figures of each model, comparison: {likelihood, generated} or
                     null, questions: {tuned, base: [what was asked and answered]}}; described in `exam_scores` and `exams`
    bertscore        {encoder, digest, layers, window_tokens, windowed_texts}, or null when it was skipped
    rows             [{line, question, history, reference, stratum, tuned, base}]; a model's: {answer, finish_reason, tokens,
                     scores: {metric: value}, facts: [{kind, reference, answer, verdict}]}; described in `facts`
    timings          seconds; the only part that differs between two runs on the same machine

A number that is not finite is null; the gate says which it was. `metrics` are means over `rows`; a difference is tuned − base. Version 1 had
no strata, exam, facts, intervals of one model and `metrics.rows`, and counted cut_texts for BERTScore.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.evaluate.compare import Interval
from components.evaluate.exam_scores import compare_exams, summarise
from components.evaluate.exam_sitting import Sitting
from components.evaluate.gate import Decision, Reason
from components.evaluate.held_out import HeldOut
from components.evaluate.lengths import length_statistics
from components.evaluate.metrics import METRICS
from components.evaluate.scores import Comparison, Scored

SCHEMA_VERSION = 2
DECIMALS = 6


def build_results(
    *,
    verdict: tuple[Decision, list[Reason]],
    model: dict[str, str],
    base: dict[str, str] | None,
    data: dict[str, str],
    settings: dict[str, Any],
    held_out: HeldOut,
    comparison: Comparison,
    strata: dict[str, Comparison],
    tuned_scored: Scored,
    base_scored: Scored | None,
    exam: dict[str, Any] | None,
    bertscore: dict[str, Any] | None,
    timings: dict[str, Any],
) -> dict[str, Any]:
    """The content of `evaluation_results.json`, as the head of this module describes it."""
    scored = {"tuned": tuned_scored, "base": base_scored}
    counts = {"available": held_out.available, "used": len(held_out.rows), "stratified_by": held_out.stratified_by}
    members = [row.stratum for row in held_out.rows]
    return {
        "schema_version": SCHEMA_VERSION,
        "decision": verdict[0],
        "reasons": [reason._asdict() for reason in verdict[1]],
        "model": model,
        "base": base,
        "data": data | counts | {"too_long": held_out.too_long, "leaked": held_out.leaked},
        "settings": settings,
        "metrics": {
            name: _metric(name, comparison) | {"better": METRICS[name].better, "width": METRICS[name].width} for name in comparison.rows
        },
        "strata": {
            name: {"rows": members.count(name), "metrics": {metric: _metric(metric, one) for metric in one.rows}}
            for name, one in strata.items()
        },
        "lengths": _lengths(held_out, scored),
        "exam": exam,
        "bertscore": bertscore,
        "rows": [
            {
                "line": row.line,
                "question": row.question,
                "history": [turn._asdict() for turn in row.history],
                "reference": row.reference,
                "stratum": row.stratum,
                **{name: None if one is None else _answer(one, index) for name, one in scored.items()},
            }
            for index, row in enumerate(held_out.rows)
        ],
        "timings": timings,
    }


def exam_results(sitting: Sitting, path: str, tuned: Scored, base: Scored | None, *, confidence: float, seed: int) -> dict[str, Any]:
    """The `exam` of the results: both models' figures, their comparison, and every question with what was asked and answered."""
    taken = {"tuned": tuned.answers.exam, "base": base.answers.exam if base else None}
    own, other = taken["tuned"], taken["base"]
    return {
        "path": path,
        "available": sitting.available,
        **{name: summarise(exam, confidence=confidence) if exam else None for name, exam in taken.items()},
        "comparison": compare_exams(own, other, confidence=confidence, seed=seed) if own and other else None,
        "questions": {name: exam.as_dict()["questions"] if exam else None for name, exam in taken.items()},
    }


def flat_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The headline numbers as one level of finite numbers; a difference always has the ends of its interval beside it."""
    flat: dict[str, float | None] = {"rows": results["data"]["used"], "promoted": float(results["decision"] == "promote")}
    for name, metric in results["metrics"].items():
        flat[f"tuned_{name}"], flat[f"base_{name}"] = metric["tuned"], metric["base"]
        if metric["rows"] < results["data"]["used"]:
            flat[f"rows_{name}"] = metric["rows"]
        for end, value in (metric["difference"] or {}).items():
            flat[f"difference_{name}_{end}"] = value
    exam = results["exam"] or {"tuned": None, "base": None, "comparison": None}
    for way in ("likelihood", "generated"):
        for model in ("tuned", "base"):
            for key in ("accuracy", "low", "high"):
                flat[f"{model}_exam_{way}_{key}"] = exam[model][way][key] if exam[model] else None
        compared = (exam["comparison"] or {}).get(way)
        for end, value in (compared["difference"] if compared else {}).items():
            flat[f"difference_exam_{way}_{end}"] = value
    return {name: value for name, value in flat.items() if value is not None}


def _finite(value: float | None) -> float | None:
    return round(value, DECIMALS) if value is not None and math.isfinite(value) else None


def _metric(name: str, comparison: Comparison) -> dict[str, Any]:
    tuned, base, difference = comparison.tuned.get(name), (comparison.base or {}).get(name), comparison.differences.get(name)
    return {
        "tuned": _finite(tuned.mean) if tuned else None,
        "base": _finite(base.mean) if base else None,
        "difference": {end: _finite(value) for end, value in difference._asdict().items()} if difference else None,
        "tuned_interval": _ends(tuned),
        "base_interval": _ends(base),
        "rows": comparison.rows[name],
    }


def _ends(interval: Interval | None) -> dict[str, float | None] | None:
    return {"low": _finite(interval.low), "high": _finite(interval.high)} if interval else None


def _answer(scored: Scored, index: int) -> dict[str, Any]:
    completion = scored.answers.completions[index]
    return {
        "answer": scored.answers.texts[index],
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
        "scores": {name: _finite(value) for name, value in scored.scores[index].items()},
        "facts": [finding._asdict() for finding in scored.findings[index]],
    }


def _lengths(held_out: HeldOut, scored: dict[str, Scored | None]) -> dict[str, Any]:
    rows = held_out.rows
    reference = [len(row.reference) for row in rows]
    lengths: dict[str, Any] = {"reference": length_statistics(reference, [sum(row.is_answer) - 1 for row in rows], reference)}
    for name, one in scored.items():
        if one is not None:
            tokens: Sequence[int] = [len(completion.token_ids) for completion in one.answers.completions]
            lengths[name] = length_statistics([len(text) for text in one.answers.texts], tokens, reference)
    return lengths
