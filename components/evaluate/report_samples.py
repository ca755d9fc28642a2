"""The rows that the report shows: those that contradict a fact, the worst, the best and random ones, with what differs marked."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from components.common.html import Html, both, escape, table
from components.evaluate.report_cells import MODELS, number
from components.evaluate.rouge import is_chinese

EACH = 5
SAMPLES = 4 * EACH
MARKED_TOKENS = 1500  # of a longer text nothing is marked: comparing takes the square of the length
_COMMON_FROM = 2  # tokens in a row: a single shared character says nothing
_MARK = "background:color-mix(in srgb,var(--warn) 28%,transparent)"
_GROUPS = {
    "contradicted": ("contradicts a fact", "与事实矛盾"),
    "worst": ("among the worst", "较差"),
    "best": ("among the best", "较好"),
    "random": ("random", "随机"),
}
_FLAGS = {
    "degenerate": ("loops", "循环"),
    "never_stopped": ("never stopped", "未停止"),
    "copies_question": ("copies the question", "照抄问题"),
    "empty": ("empty", "空"),
    "wrong_language": ("wrong language", "语言不符"),
}


def choose_samples(results: dict[str, Any]) -> list[tuple[str, int]]:
    """(why it is shown, position of the row): up to five of each kind, every row once; best and worst by the tuned model's ROUGE-L."""
    scores = [row["tuned"]["scores"] for row in results["rows"]]
    order = sorted(range(len(scores)), key=lambda row: (scores[row]["rouge_l"] or 0.0, row))
    contradicted = [row for row in order if scores[row]["fact_contradiction"]]
    drawn = random.Random(results["settings"]["seed"]).sample(order, len(order))
    chosen: dict[int, str] = {}
    for group, rows in (("contradicted", contradicted), ("worst", order), ("best", order[::-1]), ("random", drawn)):
        for row in [row for row in rows if row not in chosen][:EACH]:
            chosen[row] = group
    return [(group, row) for row, group in chosen.items()]


def samples_table(results: dict[str, Any], chosen: Sequence[tuple[str, int]]) -> str:
    """Question, reference and answers side by side."""
    names = [name for name in MODELS if results["rows"][0][name]]
    header = [Html(both("question", "问题")), Html(both("reference", "参考答案")), *(Html(both(*MODELS[name])) for name in names)]
    lines = []
    for group, at in chosen:
        row = results["rows"][at]
        reference, _ = marked(row["reference"], row["tuned"]["answer"])
        answers = [Html(_answer(row["reference"], row[name])) for name in names]
        lines.append([Html(_question(row, group)), Html(_scrolled(reference)), *answers])
    note = both(
        "Marked in an answer: what the reference does not have; in the reference: what the tuned model's answer does not have.",
        "答案中标出参考答案没有的部分；参考答案中标出微调模型的答案没有的部分。",
    )
    return f'<p class="soft">{note}</p>' + table(header, lines)


def marked(reference: str, answer: str) -> tuple[str, str]:
    """Both texts as HTML, with the parts that the other does not have marked: by characters for Chinese, by words else."""
    cut = list if is_chinese(reference) else re.compile(r"\s+|\w+|[^\w\s]").findall
    own, other = cut(reference), cut(answer)
    if max(len(own), len(other)) > MARKED_TOKENS:
        return escape(reference), escape(answer)
    blocks = SequenceMatcher(None, own, other, autojunk=False).get_matching_blocks()
    shared = [block for block in blocks if block.size >= min(_COMMON_FROM, len(own), len(other))]
    return (
        _marked(own, [(block.a, block.size) for block in shared]),
        _marked(other, [(block.b, block.size) for block in shared]),
    )


def _marked(tokens: Sequence[str], shared: Sequence[tuple[int, int]]) -> str:
    parts, at = [], 0
    for start, size in [*shared, (len(tokens), 0)]:
        if own := "".join(tokens[at:start]):
            parts.append(f'<span style="{_MARK}">{escape(own)}</span>')
        parts.append(escape("".join(tokens[start : start + size])))
        at = start + size
    return "".join(parts)


def _question(row: dict[str, Any], group: str) -> str:
    history = "".join(f'<pre class="soft">{escape(turn["role"])}: {escape(turn["content"])}</pre>' for turn in row["history"])
    line = both(f"line {row['line']}", f"第 {row['line']} 行")
    return f'{history}<pre>{escape(row["question"])}</pre><span class="soft">{line}</span><br><span class="badge">{both(*_GROUPS[group])}</span>'


def _answer(reference: str, answer: dict[str, Any]) -> str:
    scores = answer["scores"]
    facts = f"NLL {number(scores['nll'])} · ROUGE-L {number(scores['rouge_l'])}"
    if "bertscore" in scores:
        facts += f" · BERTScore {number(scores['bertscore'])}"
    if scores["fact_agreement"] is not None:
        facts += f" · {both('facts', '事实')} {number(scores['fact_agreement'])}"
    badges = "".join(f' <span class="badge warn">{both(*words)}</span>' for name, words in _FLAGS.items() if scores[name])
    return f'{_scrolled(marked(reference, answer["answer"])[1])}<span class="soft">{facts}</span>{badges}{_contradictions(answer)}'


def _contradictions(answer: dict[str, Any]) -> str:
    """The contradicted facts in the words of both texts."""
    pairs = [(fact["reference"] or "–", fact["answer"] or "–") for fact in answer["facts"] if fact["verdict"] == "contradicted"]
    lines = "".join(f"<li>{escape(reference)} ↔ {escape(said)}</li>" for reference, said in dict.fromkeys(pairs))
    return f'<div class="bad">{both("Contradicted (reference ↔ answer)", "矛盾（参考 ↔ 答案）")}<ul>{lines}</ul></div>' if lines else ""


def _scrolled(text: str) -> str:
    """HTML that may be long: an answer that loops gets a scroll bar instead of the page."""
    return f'<div style="min-width:14em;max-height:22em;overflow:auto"><pre>{text}</pre></div>'
