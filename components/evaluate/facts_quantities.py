"""Doses, frequencies, durations, measured values and other numbers of a medical text, Chinese or English, in comparable units.

A text comes normalised (`facts_read.normalise`) and with its entities marked. Each quantity found is replaced by one mark
(`facts_marks.Marks`), so that what reads on sees the words around it. A range is one quantity. Units of one dimension are brought to
one: doses to mg, ml, IU or pieces; durations to days; temperatures to °C; pressures to mmHg; concentrations to mg/L or mmol/L.
A month is 30 days and a year 365.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from components.evaluate.facts_marks import Marks
from components.evaluate.facts_numbers import FIRST_OF_NUMBER, NUMBER, TO, number

Bound = Literal["", "above", "below"]
Role = Literal["", "dose", "day"]


class Quantity(NamedTuple):
    """One number or range with its unit.

    Attributes:
        kind: dose, frequency, duration, age, temperature, pressure, level, percentage, measure or number.
        dimension: what the values are in: only quantities of one dimension compare.
        low, high: in the unit of the dimension; equal unless the text gives a range.
        written: the first number as written, before any conversion.
        unit: as written.
        bound: "above" for at least, more than, 以上; "below" for at most, less than, 以下.
        role: of a dose: "dose" for 每次, "day" for 每日 or 总量, "" when not said.
        text: the words of the text.
    """

    kind: str
    dimension: str
    low: float
    high: float
    written: float
    unit: str
    bound: Bound
    role: Role
    text: str

    def equals(self, other: Quantity) -> bool:
        """Whether both say the same: exactly in one unit, within the rounding of a conversion in two."""
        return (
            self.dimension == other.dimension
            and _close(self, other, self.low, other.low)
            and _close(self, other, self.high, other.high)
            and not ({self.bound, other.bound} == {"above", "below"} or {self.role, other.role} == {"dose", "day"})
        )

    def opposes(self, other: Quantity) -> bool:
        """Whether both cannot hold of the same thing. One number inside the other's range is no contradiction; 5 mg for 5 ml is one."""
        if self.dimension != other.dimension:
            return self.kind == other.kind and self.written == other.written and self.unit != other.unit
        if self.equals(other):
            return False
        one_inside = (self.low == self.high) != (other.low == other.high) and self.low <= other.high and other.low <= self.high
        return not one_inside


def _close(one: Quantity, other: Quantity, a: float, b: float) -> bool:
    if a == b:
        return True
    if one.unit == other.unit or (one.unit in _UNIT and _UNIT[one.unit] == _UNIT.get(other.unit)):
        return abs(a - b) <= 1e-9 * max(abs(a), abs(b))
    if one.kind == "temperature":
        return abs(a - b) <= 0.06  # °F have one decimal
    # 5.6 mmol/L is 100.9 mg/dL, written 101; 12 months of 30 days are 360 days.
    return abs(a - b) <= (0.02 if one.kind == "duration" else 0.01) * max(abs(a), abs(b))


# kind, dimension, and each unit's size in the dimension's own.
_UNITS: list[tuple[str, str, dict[float, str]]] = [
    (
        "dose",
        "mg",
        {1: "mg 毫克 milligram milligrams", 1000: "g 克 gram grams", 1e-3: "μg ug mcg 微克 microgram micrograms", 1e-6: "ng 纳克"},
    ),
    ("dose", "ml", {1: "ml 毫升 cc milliliter milliliters millilitre millilitres", 1000: "l 升 liter liters litre litres"}),
    ("dose", "IU", {1: "iu u 单位 国际单位 units unit"}),
    ("dose", "tablet", {1: "片 tablet tablets tab tabs"}),
    ("dose", "capsule", {1: "粒 颗 胶囊 capsule capsules"}),
    ("dose", "pill", {1: "丸 pill pills"}),
    ("dose", "drop", {1: "滴 drop drops"}),
    ("dose", "ampoule", {1: "支 ampoule ampoules vial vials"}),
    ("dose", "sachet", {1: "袋 包 sachet sachets"}),
    ("dose", "puff", {1: "喷 揿 吸 puff puffs spray sprays"}),
    ("dose", "spoon", {1: "勺 匙 汤匙 spoonful spoonfuls tablespoon tablespoons"}),
    ("dose", "patch", {1: "贴 patch patches"}),
    ("dose", "injection", {1: "针 剂 injection injections dose doses"}),
    ("duration", "day", {1: "天 日 d day days", 7: "周 星期 礼拜 week weeks wk wks", 30: "月 month months", 365: "年 year years yr yrs"}),
    (
        "duration",
        "day",
        {1 / 24: "小时 钟头 h hr hrs hour hours", 1 / 1440: "分钟 min mins minute minutes", 1 / 86400: "秒 秒钟 second seconds"},
    ),
    ("duration", "course", {1: "疗程 course courses"}),
    ("age", "year", {1: "岁 周岁 years-old year-old years·old years·of·age"}),
    ("age", "year", {1 / 12: "月龄 月大 months-old month-old months·old months·of·age", 1 / 52: "周龄"}),
    ("temperature", "°C", {1: "°c 摄氏度 度 degrees·celsius"}),
    ("temperature", "°F", {1: "°f 华氏度 degrees·fahrenheit"}),
    ("pressure", "mmHg", {1: "mmhg 毫米汞柱 mm·hg", 7.5006: "kpa 千帕"}),
    ("level", "mmol/L", {1: "mmol/l 毫摩尔/升", 1e-3: "μmol/l umol/l 微摩尔/升", 1e-6: "nmol/l", 1e-9: "pmol/l", 1000: "mol/l"}),
    (
        "level",
        "mg/L",
        {10: "mg/dl", 1: "mg/l μg/ml ug/ml mcg/ml", 1000: "g/l mg/ml 克/升", 1e4: "g/dl", 1e-3: "μg/l ug/l ng/ml", 1e-6: "pg/ml ng/l"},
    ),
    ("level", "IU/L", {1: "iu/l u/l miu/ml", 1000: "iu/ml u/ml"}),
    ("level", "per minute", {1: "次/分 次/分钟 bpm beats/min beats·per·minute times·per·minute"}),
    ("percentage", "%", {1: "% percent per·cent", 0.1: "‰"}),
    ("measure", "kg", {1: "kg 公斤 千克 kilogram kilograms", 0.5: "斤", 0.4536: "lb lbs pound pounds"}),
    ("measure", "cm", {1: "cm 厘米 公分", 0.1: "mm 毫米", 100: "m 米", 2.54: "inch inches"}),
    ("measure", "kcal", {1: "kcal 千卡 大卡", 0.239: "kj 千焦"}),
    ("measure", "times", {1: "次 回 遍 times"}),
    ("measure", "fold", {1: "倍 fold times·more"}),
]
_UNIT = {
    unit.replace("·", " "): (kind, dimension, factor)
    for kind, dimension, sizes in _UNITS
    for factor, units in sizes.items()
    for unit in units.split()
}
_UNIT_PATTERN = "|".join(sorted((re.escape(unit) for unit in _UNIT), key=len, reverse=True))
_UNIT_PATTERN = rf"(?:{_UNIT_PATTERN})(?:/\(?(?:kg|公斤|千克))?(?![a-z])"
_ABOVE = (
    "不低于|不少于|不小于|至少|达到或超过|达到或高于|等于或高于|达到|超过|大于等于|大于或等于|大于|高于|多于|≥|>=|>|"
    "at least|more than|over|above|greater than|no less than|not less than|exceeds|exceeding|exceed"
)
_BELOW = (
    "不超过|不高于|不多于|不大于|至多|最多|达到或低于|等于或低于|低于|少于|小于等于|小于或等于|小于|不足|不到|≤|<=|<|"
    "up to|at most|less than|under|below|no more than|not more than|not exceeding|not exceed|maximum of"
)
_QUANTITY = re.compile(
    rf"(?<![a-z\d.])(?P<number>{NUMBER})(?P<万>万)?(?:\s?(?:{_UNIT_PATTERN})?{TO}(?P<number_to>{NUMBER})(?P<万_to>万)?)?"
    rf"(?:[\s-]?(?P<个>个半|个)?(?P<unit>{_UNIT_PATTERN})(?P<半>半(?!\w))?)?"
    r"(?P<per>\s?[/·](?:次|日|天|d|day|dose)\)?(?![a-z]))?"
    r"(?:\s?(?:(?P<above>及其?以上|或以上|以上|or more|or older|or over|or higher|or above)"
    r"|(?P<below>及以下|或以下|以下|以内|之内|or less|or younger|or below|or under)))?"
)
_FIRST = re.compile(rf"[{FIRST_OF_NUMBER}]")  # a search for plain letters is several times as fast
_BOUND_BEFORE = re.compile(rf"(?:(?P<above>{_ABOVE})|(?P<below>{_BELOW}))\s?$")
_ROLE_BEFORE = re.compile(
    r".*(?:(?P<dose>每次|一次|单次|每顿|每餐|each time|per dose|single dose)|(?P<day>每日|每天|一日|一天|日剂量|全天|24小时|每晚|per day|daily))"
    r"[^,;。!?\n]{0,8}$",
    re.DOTALL,
)
_ROLE_AFTER = re.compile(r"\s?(?:(?P<dose>per dose|each time|at a time|each(?![a-z]))|(?P<day>daily|per day|a day|every day))")
_PRESSURES = re.compile(
    rf"(?:(?P<above>{_ABOVE})|(?P<below>{_BELOW}))?\s?(?<![\d./])(?P<upper>\d{{1,3}}(?:\.\d+)?)/(?P<lower>\d{{1,3}}(?:\.\d+)?)(?![\d/])"
    r"\s?(?P<unit>mmhg|毫米汞柱|kpa|千帕)?(?P<以下>以下)?"
)
_PERCENT = re.compile(rf"百分之({NUMBER})")
# Neither a year nor a date nor the number of a list's item is a quantity.
_DATE = re.compile(r"(?<!\d)(?:(?:19|20)\d\d年(?:\d++月)?(?:\d++[日号])?|\d++月\d++[日号])")
_ITEM = re.compile(r"\d(?:(?<![^\n。;:!?].)|(?<=[;:!?] .))\d?[.、)](?!\d)")


def mark_quantities(text: str, marks: Marks) -> str:
    """A text with each quantity but the frequencies (`facts_frequency`, before this) replaced by its mark."""
    text = _ITEM.sub("\n", text)
    if "年" in text or "月" in text:
        text = _DATE.sub("", text)
    if "/" in text:
        text = _PRESSURES.sub(lambda match: _pressures(match, marks), text)
    if "百分之" in text:
        text = _PERCENT.sub(lambda match: f"{number(match[1])[0]:g}%", text)
    pieces, end = [], 0
    for match in _quantities(text):
        start = match.start()
        before = _BOUND_BEFORE.search(text, max(end, start - 14), start)
        quantity = _quantity(match, before)
        if quantity is None:
            continue
        pieces += [text[end : before.start() if before else start], marks.add((quantity, quantity.text))]
        end = match.end()
    return "".join(pieces) + text[end:]


def _quantities(text: str) -> Iterator[re.Match[str]]:
    end = 0
    for first in _FIRST.finditer(text):
        if first.start() >= end and (match := _QUANTITY.match(text, first.start())):
            end = match.end()
            yield match


def _quantity(match: re.Match[str], before: re.Match[str] | None) -> Quantity | None:
    """The quantity of a match, None for a number that is none (一般, H1N1, 3月)."""
    unit, text = match["unit"], match.string
    following = text[match.end() : match.end() + 1]
    if unit is None and (not match["number"][0].isdecimal() or (following.isascii() and following.isalpha())):
        return None
    low, high = number(match["number"])
    written = low
    if match["number_to"]:
        high = number(match["number_to"])[1]
    if match["万"] or match["万_to"]:
        low, high = low * 10_000, high * 10_000
    if match["个"] == "个半" or match["半"]:
        low, high = low + 0.5, high + 0.5
    bound: Bound = (
        "above" if match["above"] or (before and before["above"]) else "below" if match["below"] or (before and before["below"]) else ""
    )
    words = text[before.start() if before else match.start() : match.end()].strip()
    if unit is None:
        return Quantity("number", "", low, high, written, "", bound, "", words)
    if (unit == "月" and not match["个"]) or (unit in "次回遍天日" and match["number"] == "一"):
        return None  # March; 一次 and 一天 say "each time" and "a day" more often than how many
    base, _, per_weight = unit.partition("/(") if "/(" in unit else unit.partition("/") if unit not in _UNIT else (unit, "", "")
    kind, dimension, factor = _UNIT[base]
    if per_weight:
        dimension += "/kg"
    if unit == "度" and not 34 <= low <= 43:
        kind, dimension = "measure", "degree"
    if dimension == "°F":
        dimension, low, high, factor = "°C", (low - 32) / 1.8, (high - 32) / 1.8, 1
    return Quantity(kind, dimension, low * factor, high * factor, written, unit, bound, _role(match) if kind == "dose" else "", words)


def _role(match: re.Match[str]) -> Role:
    if match["per"]:
        return "dose" if match["per"].strip()[1] == "次" or "dose" in match["per"] else "day"
    start = match.start()
    found = _ROLE_AFTER.match(match.string, match.end()) or _ROLE_BEFORE.match(match.string[max(0, start - 12) : start])
    return "" if found is None else "dose" if found["dose"] else "day"


def _pressures(match: re.Match[str], marks: Marks) -> str:
    """140/90 mmHg: two pressures in one quantity, the upper one as `low`."""
    upper, lower, unit = float(match["upper"]), float(match["lower"]), match["unit"]
    if not (unit or (60 <= upper <= 260 and 30 <= lower <= 160 and lower < upper)):
        return match[0]
    factor = 7.5006 if unit in ("kpa", "千帕") else 1
    bound: Bound = "above" if match["above"] else "below" if match["below"] or match["以下"] else ""
    words = match[0].strip()
    return marks.add((Quantity("pressure", "mmHg/mmHg", upper * factor, lower * factor, upper, unit or "mmhg", bound, "", words), words))
