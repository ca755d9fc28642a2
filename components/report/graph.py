"""The graph of a run as a picture: each step with its state, time and cache hit."""

from __future__ import annotations

from typing import Any

from components.common.html import escape

STATE_COLOURS = {
    "succeeded": "var(--good)",
    "cached": "var(--accent)",
    "failed": "var(--bad)",
    "interrupted": "var(--bad)",
    "running": "var(--warn)",
}
STATE_NAMES = {
    "pending": ("waiting", "等待"),
    "running": ("running", "运行中"),
    "succeeded": ("done", "完成"),
    "cached": ("from cache", "取自缓存"),
    "skipped": ("skipped", "跳过"),
    "failed": ("failed", "失败"),
    "interrupted": ("interrupted", "中断"),
}
_CHAIN = ("prepare", "train", "merge", "evaluate", "deploy")
_WIDTH, _HEIGHT, _GAP, _GATE = 148, 66, 30, 46


def graph_svg(steps: dict[str, dict[str, Any]], decision: str) -> str:
    """The chain prepare → … → deploy with the gate between evaluate and deploy.

    Args:
        steps: step name → its facts in the run record.
        decision: "promote", "hold" or "" while unknown.
    """
    parts: list[str] = []
    x, right = 6, 0
    for name in (*_CHAIN[:-1], "gate", _CHAIN[-1]):
        if right:
            parts.append(_arrow(right, x))
        parts.append(_gate(x, decision) if name == "gate" else _box(name, steps.get(name, {}), x))
        right = x + (2 * _GATE if name == "gate" else _WIDTH)
        x = right + _GAP
    return f'<svg viewBox="0 0 {right + 6} {_HEIGHT + 16}" role="img" aria-label="pipeline graph">{"".join(parts)}</svg>'


def _box(name: str, facts: dict[str, Any], x: int) -> str:
    state = str(facts.get("state", "pending"))
    colour = STATE_COLOURS.get(state, "var(--line)")
    english, chinese = STATE_NAMES[state]
    seconds = f" · {facts['seconds']:.1f} s" if facts.get("seconds") else ""
    centre = x + _WIDTH / 2
    return (
        f'<a href="#{name}"><rect x="{x}" y="8" width="{_WIDTH}" height="{_HEIGHT}" rx="8" fill="var(--paper)" stroke="{colour}" stroke-width="2"/>'
        f'<text x="{centre}" y="36" text-anchor="middle" style="font-size:16px;font-weight:600;fill:var(--ink)">{escape(name)}</text>'
        f'<text x="{centre}" y="58" text-anchor="middle" style="fill:{colour if state in STATE_COLOURS else "var(--soft)"}">{english} {chinese}{seconds}</text></a>'
    )


def _gate(x: int, decision: str) -> str:
    middle, centre = 8 + _HEIGHT / 2, x + _GATE
    colour = {"promote": "var(--good)", "hold": "var(--warn)"}.get(decision, "var(--line)")
    points = f"{x},{middle} {centre},{middle - 32} {x + 2 * _GATE},{middle} {centre},{middle + 32}"
    return f'<polygon points="{points}" fill="var(--paper)" stroke="{colour}" stroke-width="2"/><text x="{centre}" y="{middle + 4}" text-anchor="middle">{escape(decision or "gate")}</text>'


def _arrow(start: int, end: int) -> str:
    y = 8 + _HEIGHT / 2
    return f'<path d="M{start} {y}H{end - 2}m-6 -4l6 4l-6 4" fill="none" stroke="var(--soft)" stroke-width="1.5"/>'
