"""Self-contained HTML pages: no network, no cookies, so they also show in KFP's sandboxed frame.

Every sentence that a person reads exists in English and Chinese: pass `both(en, zh)`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

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
