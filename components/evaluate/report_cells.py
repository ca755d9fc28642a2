"""Numbers as cells of the report's tables; no difference without its interval."""

from __future__ import annotations

from typing import Any

from components.common.html import Html

MODELS = {"base": ("base", "基础模型"), "tuned": ("tuned", "微调模型")}


def number(value: float | None) -> str:
    """Four digits; a dash for what is not there."""
    return "–" if value is None else f"{value:.4g}"


def with_interval(value: float | None, interval: dict[str, Any] | None) -> Html:
    """A mean with the ends of its interval under it."""
    if value is None or interval is None or None in (interval["low"], interval["high"]):
        return Html(number(value))
    ends = f"{interval['low']:.4g} – {interval['high']:.4g}"
    return Html(f'{number(value)}<br><span class="soft" style="white-space:nowrap;font-size:.85em">{ends}</span>')


def difference_cells(difference: dict[str, float | None] | None, better: str) -> list[str]:
    """The mean of a difference and its interval, coloured where the interval excludes 0."""
    if difference is None or None in difference.values():
        return ["–", "–"]
    mean, low, high = (float(difference[end] or 0) for end in ("mean", "low", "high"))
    good, bad = (low > 0, high < 0) if better == "higher" else (high < 0, low > 0)
    tone = "good" if good else "bad" if bad else ""
    shown = (f"{mean:+.4g}", f"[{low:+.4g}, {high:+.4g}]")
    return [Html(f'<span class="{tone}" style="white-space:nowrap">{text}</span>') for text in shown]
