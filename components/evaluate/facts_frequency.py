"""How often: 每日三次, 每8小时一次, 隔日, tid, twice a day … as times per day."""

from __future__ import annotations

import re

from components.evaluate.facts_marks import Marks
from components.evaluate.facts_numbers import NUMBER, TO, number
from components.evaluate.facts_quantities import Quantity
from components.evaluate.facts_trie import Words

_PERIODS = {
    "分钟": 1 / 1440, "minute": 1 / 1440, "min": 1 / 1440, "小时": 1 / 24, "hour": 1 / 24, "hr": 1 / 24, "h": 1 / 24,
    "日": 1, "天": 1, "晚": 1, "早": 1, "夜": 1, "day": 1, "daily": 1, "d": 1, "night": 1, "nightly": 1,
    "周": 7, "星期": 7, "礼拜": 7, "week": 7, "weekly": 7, "月": 30, "month": 30, "monthly": 30,
    "季度": 91, "年": 365, "year": 365, "yearly": 365, "annually": 365,
}  # fmt: skip
_LATIN: dict[str, float] = {"qd": 1, "qn": 1, "bid": 2, "tid": 3, "qid": 4, "qod": 1 / 2, "qw": 1 / 7, "biw": 2 / 7, "tiw": 3 / 7}
_LATIN |= {f"q{hours}h": 24 / hours for hours in range(1, 73)}
_LATIN_WORDS = Words(_LATIN)

_TIMES = rf"(?P<times>{NUMBER})(?:{TO}(?P<times_to>{NUMBER}))?"
_EVERY = rf"(?P<every>{NUMBER})(?:{TO}(?P<every_to>{NUMBER}))?"
_ZH_PERIOD = "(?P<period>小时|分钟|日|天|晚|早|夜|周|星期|礼拜|月|季度|年)"
# 每日3次, 一日三次, 日服2次, 每8小时一次, 隔日一次, 每日早晚各1次; the words between period and number stay in the text.
_CHINESE = re.compile(
    rf"(?:每隔?(?:{_EVERY}个?)?|(?P<skip>隔)[一1]?|[一1]个?|(?<![\d零一二两三四五六七八九十月每])(?=日)){_ZH_PERIOD}"
    rf"(?P<fill>[^\d,;。!?\n]{{0,6}}?){_TIMES}[次回遍](?!/分)"
)
_PER = re.compile(rf"{_TIMES}次\s?(?:/|每)\s?(?P<period>日|天|周|星期|月|年|小时|day|d|week|h)(?![a-z])")
_EACH = re.compile(rf"(?P<fill>早、?中?、?晚)(?:饭[前后])?各[服用吃]?{_TIMES}次")
_INTERVAL = re.compile(rf"每隔?{_EVERY}个?(?P<period>小时|分钟|日|天|周|星期|月|年)")
_PARTS = re.compile(rf"分{_TIMES}次")
_ENGLISH = re.compile(
    rf"(?:(?P<once>once|twice|thrice)|{_TIMES} times?),? (?:(?:a|per|each|every|in a) )?"
    r"(?P<period>daily|day|nightly|night|weekly|week|monthly|month|yearly|year|annually|hour)(?![a-z])"
)
_ENGLISH_SIGNS = (" time", "once", "twice", "thrice")
_ENGLISH_GAP = re.compile(
    rf"(?<![a-z])every (?:(?P<skip>other )|{_EVERY}[ -]?)(?P<period>minute|min|hour|hr|h|day|night|week|month|year)s?(?![a-z])"
)


def mark_frequencies(text: str, marks: Marks) -> str:
    """A normalised text with each frequency replaced by its mark."""

    def replace(match: re.Match[str]) -> str:
        return marks.add((_frequency(match), match[0].strip())) + (match.groupdict().get("fill") or "")

    if "次" in text or "回" in text or "遍" in text:
        for pattern in (_CHINESE, _EACH, _PER, _PARTS):
            text = pattern.sub(replace, text)
    if "每" in text:
        text = _INTERVAL.sub(replace, text)
    if any(word in text for word in _ENGLISH_SIGNS):
        text = _ENGLISH.sub(replace, text)
    if "every" in text:
        text = _ENGLISH_GAP.sub(replace, text)
    return _LATIN_WORDS.replace(text, lambda word: marks.add((_per_day(_LATIN[word], _LATIN[word], word), word)))


def _frequency(match: re.Match[str]) -> Quantity:
    """Times per day; a range of times or of intervals is a range."""
    said = match.groupdict()
    times = said.get("once") or said.get("times") or "1"
    low, high = number(times)[0], number(said.get("times_to") or times)[1]
    every = said.get("every") or "1"
    shortest, longest = number(every)[0] or 1, number(said.get("every_to") or every)[1] or 1
    days = _PERIODS[said.get("period") or "日"] * (2 if said.get("skip") else 1)
    each_time = _times_a_day(said.get("fill") or "")
    return _per_day(each_time * low / (days * longest), each_time * high / (days * shortest), match[0].strip())


def _per_day(low: float, high: float, words: str) -> Quantity:
    return Quantity("frequency", "per day", low, high, low, "per day", "", "", words)


def _times_a_day(fill: str) -> int:
    """早晚各 doubles what follows, 早中晚各 and 三餐 treble it."""
    if "三餐" in fill or ("早" in fill and "中" in fill and "晚" in fill):
        return 3
    return 2 if "早" in fill and "晚" in fill else 1
