"""The metrics of an evaluation: what each is called, where it ends, and which way is better. Every module of this stage reads this table."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One number per held-out row; its mean over the rows is what a report shows.

    Attributes:
        width: distance between the worst and the best value, the unit of the gate's `tolerance`; None: unbounded.
        binary: each row has 0 or 1, so that the mean is a share of rows.
    """

    better: Literal["lower", "higher"]
    width: float | None
    english: str
    chinese: str
    binary: bool = False


METRICS = {
    "nll": Metric("lower", None, "NLL of the reference answer, nats per token", "参考答案的负对数似然（nat/词元）"),
    "rouge_1": Metric("higher", 100, "ROUGE-1", "ROUGE-1"),
    "rouge_2": Metric("higher", 100, "ROUGE-2", "ROUGE-2"),
    "rouge_l": Metric("higher", 100, "ROUGE-L", "ROUGE-L"),
    "bleu": Metric("higher", 100, "BLEU", "BLEU"),
    "chrf": Metric("higher", 100, "chrF", "chrF"),
    "bertscore": Metric("higher", 1, "BERTScore", "BERTScore"),
    "exact_match": Metric("higher", 1, "Share of answers equal to the reference", "与参考答案完全一致的比例", binary=True),
    "fact_agreement": Metric("higher", 100, "Agreement of medical facts", "医学事实一致度"),
    "fact_contradiction": Metric(
        "lower", 1, "Share of answers that contradict a fact of the reference", "与参考答案的事实相矛盾的答案比例", binary=True
    ),
    "repeated_4grams": Metric("lower", 1, "Share of repeated 4-grams in an answer", "答案中重复的四元组比例"),
    "degenerate": Metric("lower", 1, "Share of answers that loop", "陷入循环的答案比例", binary=True),
    "never_stopped": Metric("lower", 1, "Share of answers that never stop", "不会停止的答案比例", binary=True),
    "copies_question": Metric("lower", 1, "Share of answers that copy the question", "照抄问题的答案比例", binary=True),
    "empty": Metric("lower", 1, "Share of empty answers", "空答案比例", binary=True),
    "wrong_language": Metric("lower", 1, "Share of answers in the wrong language", "语言不符的答案比例", binary=True),
}


def parse_guarded(text: str) -> tuple[str, ...]:
    """The metrics of a comma list such as "rouge_l,degenerate"; "none" is none of them.

    Raises:
        ValueError: an unknown metric.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("none",):
        return ()
    for name in names:
        _known(name)
    return names


def parse_minimums(text: str) -> dict[str, float]:
    """The least mean of each metric in a list such as "rouge_l=20,fact_agreement=60"; "none" or nothing: no bound.

    Raises:
        ValueError: an unknown metric, one where lower is better, no number, or one outside of the metric's range.
    """
    if text.strip() in ("", "none"):
        return {}
    minimums = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        metric = _known(name)
        if metric.better == "lower" or metric.width is None:
            allowed = ", ".join(name for name, one in METRICS.items() if one.better == "higher")
            raise ValueError(f"lower is better for {name}: a minimum fits {allowed}")
        try:
            minimums[name] = float(value)
        except ValueError:
            raise ValueError(f"{part.strip()!r} is not name=number, such as rouge_l=20") from None
        if not 0 <= minimums[name] <= metric.width:
            raise ValueError(f"{name} is between 0 and {metric.width:g}, not {value}")
    return minimums


def _known(name: str) -> Metric:
    if name not in METRICS:
        raise ValueError(f"no metric is called {name!r}; there are {', '.join(METRICS)}")
    return METRICS[name]
