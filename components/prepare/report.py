"""The data report: one HTML page about where the rows came from, what was left out and why, and what the splits hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from components.common.dataset import Row
from components.common.html import Html, both, card, escape, page, table
from components.prepare.clean import REASONS, REJECTS_FILE, Cleaned
from components.prepare.split import Split

SAMPLE_ROWS = 5
SAMPLE_CHARS = 300
BINS = 30
SPLIT_NAMES = {"train": ("training", "训练"), "validation": ("validation", "验证"), "test": ("test, held out", "测试（留出）")}


def report_page(info: dict[str, Any], cleaned: Cleaned, split: Split) -> str:
    """The whole page; `info` is the content of `dataset.json`."""
    kept = len(cleaned.rows)
    title = f"<h1>{both('Data report', '数据报告')}</h1>"
    lead = both(
        f"{info['rows_read']:,} rows read, {kept:,} kept, split by question.",
        f"读取 {info['rows_read']:,} 行，保留 {kept:,} 行，按问题划分。",
    )
    return page(
        "Data report",
        [
            title,
            f'<p class="soft">{lead}</p>',
            card(both("Source", "来源"), _source(info)),
            card(both("From file to data set", "从文件到数据集"), _funnel(info, kept)),
            card(both("Splits", "划分"), _splits(info, split)),
            card(both("Lengths in characters", "长度（字符）"), _lengths(cleaned.rows)),
            card(both("Sample rows", "样例"), _samples(cleaned.rows)),
            *([card(both("Rows left out", "被剔除的行"), _rejects(cleaned))] if cleaned.first_rejects else []),
        ],
    )


def _bi(english: str, chinese: str) -> Html:
    return Html(both(english, chinese))


def _source(info: dict[str, Any]) -> str:
    source = info["source"]
    columns = ", ".join(f"{part} ← {column}" for part, column in info["columns"].items())
    rows = [
        (_bi("file", "文件"), source["path"]),
        (_bi("type and size", "类型与大小"), f"{source['file_type']}, {source['size_bytes']:,} B"),
        (_bi("file's sha256", "文件 sha256"), Html(f"<code>{escape(source['sha256'])}</code>")),
        (_bi("layout", "数据格式"), f"{info['layout']} ({columns})"),
        (_bi("data set's digest", "数据集摘要"), Html(f"<code>{escape(info['digest'])}</code>")),
    ]
    return table(("", ""), rows)


def _funnel(info: dict[str, Any], kept: int) -> str:
    read = info["rows_read"]
    steps = [(_bi("read", "读取"), read, "var(--soft)")]
    steps += [(_bi(*REASONS[reason]), count, "var(--bad)") for reason, count in info["rejected"].items()]
    steps.append((_bi("kept", "保留"), kept, "var(--good)"))
    rows = [
        (
            name,
            f"{count:,}",
            f"{count / read:.1%}",
            Html(f'<svg width="240" height="12"><rect width="{240 * count / read:.1f}" height="12" fill="{colour}"/></svg>'),
        )
        for name, count, colour in steps
    ]
    return table(("", _bi("rows", "行"), _bi("share", "占比"), ""), rows, numeric=(1, 2))


def _splits(info: dict[str, Any], split: Split) -> str:
    kept = sum(info["rows"].values())
    rows = [
        (_bi(*SPLIT_NAMES[name]), f"{count:,}", f"{count / kept:.1%}", f"{info['groups'][name]:,}") for name, count in info["rows"].items()
    ]
    how = both(
        f"The same question, or conversation opening, is never in two splits; the hash of question and salt “{info['split']['salt']}” decides, "
        "so a row keeps its side when data is added.",
        f"同一问题（或同一对话开头）不会出现在两个划分中；由问题与盐“{info['split']['salt']}”的哈希决定，新增数据时原有行不换边。",
    )
    moved = "".join(
        f"<p>{both(f'{new} would have been empty: moved there from {old}:', f'{new} 原本为空，从 {old} 移入：')} {escape(question)}</p>"
        for question, old, new in split.moved
    )
    header = ("", _bi("rows", "行"), _bi("share", "占比"), _bi("different questions", "不同问题数"))
    return f"{table(header, rows, numeric=(1, 2, 3))}<p class=soft>{how}</p>{moved}"


def _lengths(rows: Sequence[Row]) -> str:
    parts = {
        ("question", "问题"): [len(row["question"]) for row in rows],
        ("answer", "回答"): [len(row["answer"]) for row in rows],
    }
    if any(row["history"] for row in rows):
        parts["earlier turns", "此前轮次"] = [sum(len(turn["content"]) for turn in row["history"]) for row in rows]
    header = ("", *(_bi(*name) for name in (("min", "最小"), ("median", "中位"), ("mean", "平均"), ("p95", "95 分位"), ("max", "最大"))))
    figures = [
        (
            _bi(*name),
            f"{min(values):,}",
            f"{median(values):,.1f}",
            f"{fmean(values):,.1f}",
            f"{_percentile(values, 0.95):,}",
            f"{max(values):,}",
        )
        for name, values in parts.items()
    ]
    charts = "".join(f"<h3>{both(*name)}</h3>{histogram(values)}" for name, values in parts.items())
    note = both("The last bar holds the longest hundredth.", "最后一柱包含最长的百分之一。")
    return f"{table(header, figures, numeric=range(1, 6))}{charts}<p class=soft>{note}</p>"


def _percentile(values: Sequence[int], share: float) -> int:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def histogram(values: Sequence[int]) -> str:
    """Counts over equal bins from the least value to the 99th percentile, as inline SVG; longer values are in the last bin."""
    low, high = min(values), max(_percentile(values, 0.99), min(values) + 1)
    step = max(1, math.ceil((high - low + 1) / BINS))
    bins = [0] * math.ceil((high - low + 1) / step)
    for value in values:
        bins[min((value - low) // step, len(bins) - 1)] += 1
    width, height, left, bottom, top = 720, 160, 56, 24, 14
    bar, peak = (width - left) / len(bins), max(bins)
    parts = [
        f'<line x1="{left}" x2="{width}" y1="{height - bottom}" y2="{height - bottom}" stroke="var(--line)"/>',
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{peak:,}</text><text x="{left - 6}" y="{height - bottom + 4}" text-anchor="end">0</text>',
    ]
    for index, count in enumerate(bins):
        first, tall = low + index * step, count / peak * (height - bottom - top)
        last = f"{max(values):,}" if index == len(bins) - 1 else f"{first + step - 1:,}"
        parts.append(
            f'<rect x="{left + index * bar:.1f}" y="{height - bottom - tall:.1f}" width="{bar * 0.9:.1f}" height="{tall:.1f}" fill="var(--accent)">'
            f"<title>{first:,}–{last}: {count:,}</title></rect>"
        )
        if index % max(1, len(bins) // 6) == 0:
            parts.append(f'<text x="{left + index * bar:.1f}" y="{height - 6}">{first:,}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _samples(rows: Sequence[Row]) -> str:
    chosen = rows[:: max(1, len(rows) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    cells = [(row["line"], len(row["history"]), _short(row["question"]), _short(row["answer"])) for row in chosen]
    header = (_bi("line", "行号"), _bi("earlier turns", "此前轮次"), _bi("question", "问题"), _bi("answer", "回答"))
    return table(header, cells, numeric=(0, 1))


def _rejects(cleaned: Cleaned) -> str:
    total = cleaned.rejected.total()
    shown = len(cleaned.first_rejects)
    note = both(
        f"The first {shown:,} of {total:,}; all of them are in {REJECTS_FILE}.",
        f"共 {total:,} 行，此处为前 {shown:,} 行；完整列表见 {REJECTS_FILE}。",
    )
    rows = [(reject.line, _bi(*REASONS[reject.reason]), reject.excerpt) for reject in cleaned.first_rejects]
    return f"<p class=soft>{note}</p>{table((_bi('line', '行号'), _bi('reason', '原因'), _bi('excerpt', '摘录')), rows, numeric=(0,))}"


def _short(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARS else f"{text[:SAMPLE_CHARS]}…"
