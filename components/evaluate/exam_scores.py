"""The figures of an exam: accuracy with its interval, over the orders of the options, by subject and by position; and tuned against base.

Accuracy: range 0–1, higher is better; of each question the share of orders in which it was answered right, averaged over the questions.
Its interval is Wilson's on the number of questions, which is cautious: an average over orders varies less than one right or wrong.
`all_orders` is the share of questions right in every order that was asked, of those asked in more than one (CircularEval).
Two models are compared on the same questions: the paired bootstrap for the difference, exact McNemar for the written order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.evaluate.compare import mcnemar, paired_interval, wilson_interval
from components.evaluate.exams import PROMPT_DIGEST, WAYS, ExamResult, QuestionResult, Way

DECIMALS = 6
UNREAD = ("empty", "none", "ambiguous", "too_long")


def summarise(result: ExamResult, *, confidence: float) -> dict[str, Any]:
    """All figures of one model, ready for JSON.

    `likelihood` leaves out the questions with several right answers, for which it is not defined; `questions` says how many are in.
    """
    questions = result.questions
    several = sum(question.several for question in questions)
    return {
        "layout": result.layout,
        "digest": result.digest,
        "prompt_digest": PROMPT_DIGEST,
        "questions": len(questions),
        "several_answers": several,
        "skipped": result.skipped,
        "prompts": sum(len(question.asked) for question in questions),
        "written_order_only": sum(len(question.asked) == 1 for question in questions),
        "chance": _rounded(_mean([1 / len(question.letters) for question in questions if not question.several])),
        "likelihood": _way(questions, "likelihood", confidence) | {"letter_mass": _letter_mass(questions)},
        "generated": _way(questions, "generated", confidence) | {"unparsed": _unparsed(questions)},
        "subjects": _by_subject(questions, confidence),
    }


def compare_exams(tuned: ExamResult, base: ExamResult, *, confidence: float, seed: int) -> dict[str, Any]:
    """Tuned − base for each way of scoring, ready for JSON; None for a way that is defined for no question.

    Raises:
        ValueError: the two did not answer the same questions in the same orders.
    """
    if [(one.name, [asked.shift for asked in one.asked]) for one in tuned.questions] != [
        (one.name, [asked.shift for asked in one.asked]) for one in base.questions
    ] or tuned.digest != base.digest:
        raise ValueError("the two results are of different exams or orders")
    return {way: _compare(tuned, base, way, confidence, seed) for way in WAYS}


def _compare(tuned: ExamResult, base: ExamResult, way: Way, confidence: float, seed: int) -> dict[str, Any] | None:
    own, other = (_rights(result.questions, way) for result in (tuned, base))
    if not own:
        return None
    shares = [[_mean(rights) for rights in model] for model in (own, other)]
    interval = paired_interval(shares[0], shares[1], confidence=confidence, seed=seed)
    test = mcnemar([rights[0] for rights in own], [rights[0] for rights in other])
    return {
        "questions": len(own),
        "tuned": _accuracy(shares[0], confidence),
        "base": _accuracy(shares[1], confidence),
        "difference": {end: _rounded(value) for end, value in interval._asdict().items()},
        "mcnemar": {"only_tuned": test.only_a, "only_base": test.only_b, "p_value": test.p_value},
    }


def _way(questions: Sequence[QuestionResult], way: Way, confidence: float) -> dict[str, Any]:
    rights = _rights(questions, way)
    rotated = [one for one in rights if len(one) > 1]
    return {
        **_accuracy([_mean(one) for one in rights], confidence),
        "written_order": _accuracy([one[0] for one in rights], confidence),
        "all_orders": _accuracy([all(one) for one in rotated], confidence),
        "positions": _positions(questions, way),
    }


def _rights(questions: Sequence[QuestionResult], way: Way) -> list[list[bool]]:
    return [rights for question in questions if (rights := question.rights(way)) is not None]


def _accuracy(shares: Sequence[float], confidence: float) -> dict[str, Any]:
    if not shares:
        return {"accuracy": None, "low": None, "high": None, "questions": 0}
    interval = wilson_interval(sum(shares), len(shares), confidence=confidence)
    return {name: _rounded(value) for name, value in zip(("accuracy", "low", "high"), interval, strict=True)} | {"questions": len(shares)}


def _positions(questions: Sequence[QuestionResult], way: Way) -> dict[str, dict[str, Any]]:
    """By printed position, over the prompts with one right answer: how often it was right, chosen, and chosen where it was right."""
    counts: dict[str, list[int]] = {}
    for question in questions:
        for one in [] if question.several else question.asked:
            chosen = one.likeliest if way == "likelihood" else one.stated
            for index in range(len(question.letters)):
                letter = question.letters[(index + one.shift) % len(question.letters)]
                count = counts.setdefault("ABCDEFGHIJ"[index], [0, 0, 0])
                count[0] += letter == question.gold
                count[1] += letter == chosen
                count[2] += letter == question.gold == chosen
    return {
        position: {"right_here": right, "chosen": chosen, "accuracy_here": _rounded(both / right) if right else None}
        for position, (right, chosen, both) in counts.items()
    }


def _letter_mass(questions: Sequence[QuestionResult]) -> float | None:
    """Mean probability of all the letters together: near 0, the model was about to write something else and the choice says little."""
    masses = [
        sum(math.exp(value) for value in one.log_likelihoods.values())
        for question in questions
        for one in question.asked
        if one.log_likelihoods
    ]
    return _rounded(_mean(masses))


def _unparsed(questions: Sequence[QuestionResult]) -> dict[str, Any]:
    """Prompts whose answer states nothing, by reason; each is counted as wrong."""
    readings = [one.reading for question in questions for one in question.asked]
    counts = {reason: readings.count(reason) for reason in UNREAD}  # type: ignore[arg-type]
    return {**counts, "share": _rounded(sum(counts.values()) / len(readings))}


def _by_subject(questions: Sequence[QuestionResult], confidence: float) -> dict[str, dict[str, Any]]:
    """Accuracy of each subject; empty where the exam has no subjects."""
    names = sorted({question.subject for question in questions if question.subject})
    groups = {name: [question for question in questions if question.subject == name] for name in names}
    return {
        name: {way: _accuracy([_mean(one) for one in _rights(group, way)], confidence) for way in WAYS} for name, group in groups.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rounded(value: float) -> float | None:
    return round(value, DECIMALS) if math.isfinite(value) else None
