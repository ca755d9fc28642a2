"""The exam's part of the report: accuracy with intervals for both ways of scoring, by subject, and whether the position decides."""

from __future__ import annotations

from typing import Any

from components.common.html import Html, both, folded, table
from components.evaluate.report_cells import MODELS, difference_cells, number, with_interval

WAYS = {"likelihood": ("likeliest letter", "最可能的字母"), "generated": ("written letter", "写出的字母")}


def exam_card(exam: dict[str, Any], settings: dict[str, Any]) -> str:
    """All figures of an exam."""
    first = exam["tuned"]
    chance = number(first["chance"])
    skipped = sum(first["skipped"].values())
    facts = both(
        f"{first['questions']} of {exam['available']} questions ({first['layout']} layout), {first['prompts']} prompts: each question in up "
        f"to {settings['exam_permutations']} orders of its options, {first['written_order_only']} in the written order only. "
        f"Guessing: {chance}. {skipped} rows could not be scored.",
        f"{exam['available']} 题中的 {first['questions']} 题（{first['layout']} 格式），{first['prompts']} 次提问：每题最多 "
        f"{settings['exam_permutations']} 种选项顺序，{first['written_order_only']} 题只用原顺序。随机猜测：{chance}。{skipped} 行无法评分。",
    )
    parts = [f"<p>{facts}</p>", _accuracies(exam, settings)]
    if first["subjects"]:
        parts.append(folded(both("By subject", "按科目"), _subjects(exam)))
    parts.append(folded(both("By position of the option", "按选项位置"), _positions(exam)))
    return "".join(parts)


def _accuracies(exam: dict[str, Any], settings: dict[str, Any]) -> str:
    confidence = f"{settings['confidence']:.0%}"
    header = [Html(both("scored by", "评分方式")), Html(both("figure", "指标")), *(Html(both(*names)) for names in MODELS.values())]
    header += [Html(both("difference", "差值")), Html(both(f"{confidence} interval", f"{confidence} 区间")), Html("McNemar p")]
    lines: list[list[object]] = []
    for way, names in WAYS.items():
        compared = (exam["comparison"] or {}).get(way)
        p_value = f"{compared['mcnemar']['p_value']:.3g}" if compared else "–"
        difference = difference_cells(compared["difference"] if compared else None, "higher")
        lines.append([Html(both(*names)), Html(both("accuracy", "正确率")), *_each(exam, way, None), *difference, p_value])
        figures = (("written_order", "in the written order", "原顺序"), ("all_orders", "right in every order", "所有顺序均正确"))
        lines += [["", Html(both(english, chinese)), *_each(exam, way, key), "", "", ""] for key, english, chinese in figures]
    unparsed = [_model(exam, name, "generated", "unparsed", "share") for name in MODELS]
    mass = [_model(exam, name, "likelihood", "letter_mass") for name in MODELS]
    lines.append(["", Html(both("no letter could be read (wrong)", "读不出字母（计为错误）")), *map(number, unparsed), "", "", ""])
    lines.append(["", Html(both("probability of all letters together", "全部字母的概率之和")), *map(number, mass), "", "", ""])
    return table(header, lines, numeric=(2, 3, 4, 5, 6))


def _each(exam: dict[str, Any], way: str, key: str | None) -> list[Html]:
    cells = []
    for name in MODELS:
        figures = _model(exam, name, way, key) if key else _model(exam, name, way)
        cells.append(with_interval(figures["accuracy"], figures) if figures else Html("–"))
    return cells


def _subjects(exam: dict[str, Any]) -> str:
    header = [Html(both("subject", "科目")), Html(both("questions", "题数"))]
    header += [Html(both(f"{model[0]}, {way[0]}", f"{model[1]}，{way[1]}")) for way in WAYS.values() for model in MODELS.values()]
    lines = []
    for name, ways in exam["tuned"]["subjects"].items():
        cells = []
        for way in WAYS:
            for model in MODELS:
                figures = _model(exam, model, "subjects", name, way)
                cells.append(with_interval(figures["accuracy"], figures) if figures else Html("–"))
        lines.append([name, ways["generated"]["questions"], *cells])
    return table(header, lines, numeric=range(1, len(header)))


def _positions(exam: dict[str, Any]) -> str:
    header = [Html(both("scored by", "评分方式")), Html(both("model", "模型")), Html(both("position", "位置"))]
    header += [Html(both("right here", "正确答案在此")), Html(both("chosen", "被选")), Html(both("accuracy here", "在此处的正确率"))]
    lines: list[list[object]] = []
    for way, names in WAYS.items():
        for model, model_names in MODELS.items():
            for position, counts in (_model(exam, model, way, "positions") or {}).items():
                figures = [counts["right_here"], counts["chosen"], number(counts["accuracy_here"])]
                lines.append([Html(both(*names)), Html(both(*model_names)), position, *figures])
    note = both(
        "A model that chooses a position far more often than it is right there likes the position.",
        "选择某位置的次数远多于正确答案在该位置的次数，说明模型偏好该位置。",
    )
    return table(header, lines, numeric=(3, 4, 5)) + f'<p class="soft">{note}</p>'


def _model(exam: dict[str, Any], name: str, *path: str) -> Any:
    """A figure of one model; None without that model."""
    value = exam[name]
    for key in path:
        value = value[key] if value is not None else None
    return value
