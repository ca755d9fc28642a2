"""The metrics of an evaluation: what each is called, where it ends, and which way is better. Every module of this stage reads this table."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One number per held-out row; its mean over the rows is what a report shows.

    `width` is the distance between the worst and the best value, the unit of the gate's `tolerance`; None: unbounded.
    """

    better: Literal["lower", "higher"]
    width: float | None
    english: str
    chinese: str


METRICS = {
    "nll": Metric("lower", None, "NLL of the reference answer, nats per token", "参考答案的负对数似然（nat/词元）"),
    "rouge_1": Metric("higher", 100, "ROUGE-1", "ROUGE-1"),
    "rouge_2": Metric("higher", 100, "ROUGE-2", "ROUGE-2"),
    "rouge_l": Metric("higher", 100, "ROUGE-L", "ROUGE-L"),
    "bertscore": Metric("higher", 1, "BERTScore", "BERTScore"),
    "repeated_4grams": Metric("lower", 1, "Share of repeated 4-grams in an answer", "答案中重复的四元组比例"),
    "degenerate": Metric("lower", 1, "Share of answers that loop", "陷入循环的答案比例"),
    "never_stopped": Metric("lower", 1, "Share of answers that never stop", "不会停止的答案比例"),
    "copies_question": Metric("lower", 1, "Share of answers that copy the question", "照抄问题的答案比例"),
    "empty": Metric("lower", 1, "Share of empty answers", "空答案比例"),
    "wrong_language": Metric("lower", 1, "Share of answers in the wrong language", "语言不符的答案比例"),
}
