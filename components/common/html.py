"""Self-contained HTML pages: no network, no cookies, so they also show in KFP's sandboxed frame.

Every sentence that a person reads exists in English and Chinese: pass `both(en, zh)`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

_STYLE = """
:root{--ink:#1c2733;--soft:#5b6b7b;--line:#dfe5ea;--paper:#fff;--ground:#f5f7f9;--accent:#0b6e6e;--good:#1a7f4b;--bad:#b3261e;--warn:#9a6700}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9badbd;--line:#32404d;--paper:#18212a;--ground:#10171e;--accent:#4cc2bd;--good:#5bd08c;--bad:#ff8a80;--warn:#e5b454}}
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.55 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 60px}h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 10px}
.soft,.zh{color:var(--soft)}.zh{font-size:.92em}section.card{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:16px 18px;margin:12px 0;overflow-x:auto}
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.badge{display:inline-block;border:1px solid currentColor;border-radius:999px;padding:1px 10px;font-size:13px}pre,code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:13px}
pre{white-space:pre-wrap;margin:0}svg{max-width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:var(--soft)}a{color:var(--accent)}
"""


def escape(value: object) -> str:
    """Text that is safe inside HTML."""
    return html.escape(str(value))


def both(english: str, chinese: str) -> str:
    """A sentence in both languages."""
    return f'{escape(english)} <span class="zh">{escape(chinese)}</span>'


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; `body` is HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>"
    )


def card(heading: str, content: str) -> str:
    """A section with a heading (HTML) and its content (HTML)."""
    return f'<h2>{heading}</h2><section class="card">{content}</section>'


def folded(heading: str, content: str) -> str:
    """A section that opens on a click: for what is looked up rather than read."""
    return f'<details><summary><h2 style="display:inline-block">{heading}</h2></summary><section class="card">{content}</section></details>'


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Iterable[int] = ()) -> str:
    """A table of plain values, without a head if `header` is all empty; a cell that already is HTML is passed as `Html`. `numeric` names right-aligned columns."""
    right = set(numeric)

    def cell(tag: str, index: int, value: object) -> str:
        content = value if isinstance(value, Html) else escape(value)
        return f"<{tag}{' class=n' if index in right else ''}>{content}</{tag}>"

    head = "".join(cell("th", index, value) for index, value in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', index, value) for index, value in enumerate(row))}</tr>" for row in rows)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if any(header) else ''}<tbody>{body}</tbody></table>"


class Html(str):
    """A string that is HTML already."""


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str) -> str:
    """A line chart as inline SVG; `series` maps a name to its (x, y) points. At most four series."""
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p>–</p>"
    width, height, left, bottom, top, right = 720, 260, 56, 36, 14, 12
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(p[1] for p in points), max(p[1] for p in points)
    span_x, span_y = (x1 - x0) or 1.0, (y1 - y0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - x0) / span_x * (width - left - right), height - bottom - (y - y0) / span_y * (height - bottom - top)

    colours = ("var(--accent)", "var(--warn)", "var(--bad)", "var(--good)")
    parts = [
        f'<line x1="{left}" x2="{width - right}" y1="{at(0, y)[1]:.1f}" y2="{at(0, y)[1]:.1f}" stroke="var(--line)"/><text x="{left - 6}" y="{at(0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        for y in (y0, (y0 + y1) / 2, y1)
    ]
    parts += [
        f'<text x="{at(x, y0)[0]:.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:.4g}</text>' for x in (x0, (x0 + x1) / 2, x1)
    ]
    for index, (name, line) in enumerate(series.items()):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in line))
        colour = colours[index % len(colours)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(line) == 1:
            px, py = at(*line[0])
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>')
        parts.append(
            f'<rect x="{left + 10 + 150 * index}" y="{top - 8}" width="10" height="10" fill="{colour}"/><text x="{left + 25 + 150 * index}" y="{top + 1}">{escape(name)}</text>'
        )
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def histogram(series: Mapping[str, Sequence[float]], *, x_label: str, bins: int = 24) -> str:
    """How many values lie where, as inline SVG: the bars of each series side by side, a dashed line at its median. At most four series."""
    values = [value for one in series.values() for value in one]
    if not values:
        return "<p>–</p>"
    width, height, left, bottom, top, right = 720, 220, 40, 36, 20, 12
    x0, x1 = min(values), max(values)
    step = ((x1 - x0) or 1.0) / bins
    counts = {name: [0] * bins for name in series}
    for name, one in series.items():
        for value in one:
            counts[name][min(int((value - x0) / step), bins - 1)] += 1
    most = max(max(one) for one in counts.values())
    floor, slot = height - bottom, (width - left - right) / bins
    bar = 0.9 * slot / len(series)
    parts = [f'<line x1="{left}" x2="{width - right}" y1="{floor}" y2="{floor}" stroke="var(--line)"/>']
    parts.append(
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{most}</text><text x="{left - 6}" y="{floor}" text-anchor="end">0</text>'
    )
    for share in (0, 0.5, 1):
        x = left + share * bins * slot
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{x0 + share * bins * step:.4g}</text>')
    colours = ("var(--accent)", "var(--warn)", "var(--bad)", "var(--good)")
    for index, (name, one) in enumerate(series.items()):
        colour = colours[index % len(colours)]
        for at, count in enumerate(counts[name]):
            tall = (floor - top) * count / most
            if count:
                x = left + at * slot + index * bar
                parts.append(
                    f'<rect x="{x:.1f}" y="{floor - tall:.1f}" width="{bar:.1f}" height="{tall:.1f}" fill="{colour}" fill-opacity=".8"/>'
                )
        if one:
            x = left + (median(one) - x0) / step * slot
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}" stroke="{colour}" stroke-dasharray="4 3"/>')
        parts.append(f'<rect x="{left + 10 + 150 * index}" y="2" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 25 + 150 * index}" y="11">{escape(name)}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">{escape(x_label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
