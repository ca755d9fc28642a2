"""What is read from a text: numbers, units, frequencies, names, permissions; and that the word lists are sound."""

from __future__ import annotations

import pytest

from components.evaluate.facts import QUANTITIES, facts_of
from components.evaluate.facts_lexicon import FILES, FOLDER, lexicon
from components.evaluate.facts_numbers import number
from components.evaluate.facts_quantities import Quantity
from components.evaluate.facts_statements import together


def quantities(text: str) -> list[Quantity]:
    return [fact.value for fact in facts_of(text) if isinstance(fact.value, Quantity)]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("1/2", 0.5), ("半", 0.5), ("两", 2), ("十", 10), ("十五", 15), ("二十", 20), ("一百二十", 120), ("三百零五", 305), ("twelve", 12)],
)  # fmt: skip
def test_numbers(text: str, value: float) -> None:
    assert number(text) == (value, value)


def test_two_digits_in_a_row_are_a_range() -> None:
    assert number("三四") == (3, 4)
    assert number("两三") == (2, 3)


@pytest.mark.parametrize(
    ("text", "kind", "dimension", "low", "high"),
    [
        ("0.25克", "dose", "mg", 250, 250),
        ("250μg", "dose", "mg", 0.25, 0.25),
        ("250 mcg", "dose", "mg", 0.25, 0.25),
        ("１０毫升", "dose", "ml", 10, 10),
        ("80万单位", "dose", "IU", 800_000, 800_000),
        ("1,000 IU", "dose", "IU", 1000, 1000),
        ("半片", "dose", "tablet", 0.5, 0.5),
        ("two tablets", "dose", "tablet", 2, 2),
        ("5 drops", "dose", "drop", 5, 5),
        ("10 mg/kg", "dose", "mg/kg", 10, 10),
        ("15至20 g", "dose", "mg", 15_000, 20_000),
        ("5mg~10mg", "dose", "mg", 5, 10),
        ("两周", "duration", "day", 14, 14),
        ("7至10天", "duration", "day", 7, 10),
        ("3个月", "duration", "day", 90, 90),
        ("一个半小时", "duration", "day", 0.0625, 0.0625),
        ("2 weeks", "duration", "day", 14, 14),
        ("40岁", "age", "year", 40, 40),
        ("6月龄", "age", "year", 0.5, 0.5),
        ("65-year-old", "age", "year", 65, 65),
        ("6.5％", "percentage", "%", 6.5, 6.5),
        ("百分之五", "percentage", "%", 5, 5),
        ("38.5℃", "temperature", "°C", 38.5, 38.5),
        ("101.3 °F", "temperature", "°C", 38.5, 38.5),
        ("140/90 mmHg", "pressure", "mmHg/mmHg", 140, 90),
        ("120毫米汞柱", "pressure", "mmHg", 120, 120),
        ("血糖7.0 mmol/L", "level", "mmol/L", 7.0, 7.0),
        ("血糖126 mg/dL", "level", "mmol/L", 6.994, 6.994),
        ("肌酐1.2 mg/dL", "level", "mmol/L", 0.1061, 0.1061),
        ("血红蛋白12 g/dL", "level", "mg/L", 120_000, 120_000),
        ("90 cm", "measure", "cm", 90, 90),
        ("BMI 24.0", "number", "", 24, 24),
    ],
)
def test_quantities_in_comparable_units(text: str, kind: str, dimension: str, low: float, high: float) -> None:
    (quantity,) = quantities(text)
    assert (quantity.kind, quantity.dimension) == (kind, dimension)
    assert (quantity.low, quantity.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("每日3次", 3, 3),
        ("一天三次", 3, 3),
        ("日服2次", 2, 2),
        ("每日2～3次", 2, 3),
        ("3次/日", 3, 3),
        ("tid", 3, 3),
        ("b.i.d.", 2, 2),
        ("q8h", 3, 3),
        ("每8小时一次", 3, 3),
        ("每隔12小时服1次", 2, 2),
        ("每4至6小时一次", 4, 6),
        ("隔日一次", 0.5, 0.5),
        ("每周两次", 2 / 7, 2 / 7),
        ("每5年做一次", 1 / 1825, 1 / 1825),
        ("早晚各一次", 2, 2),
        ("每日早、中、晚各1次", 3, 3),
        ("分3次服", 3, 3),
        ("twice a day", 2, 2),
        ("once daily", 1, 1),
        ("three times a day", 3, 3),
        ("every 8 hours", 3, 3),
        ("every 4 to 6 hours", 4, 6),
        ("every other day", 0.5, 0.5),
    ],
)
def test_frequencies_in_times_per_day(text: str, low: float, high: float) -> None:
    (quantity,) = quantities(text)
    assert quantity.kind == "frequency"
    assert (quantity.low, quantity.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("text", ["一般", "第一", "H1N1", "COVID-19", "维生素B12", "2型糖尿病", "3月", "2020年", "5月3日", "一次", "万一"])
def test_what_only_looks_like_a_quantity(text: str) -> None:
    assert not quantities(text)


@pytest.mark.parametrize(
    ("text", "bound"),
    [("不低于7天", "above"), ("7天以上", "above"), ("at least 7 days", "above"), ("不超过7天", "below"), ("7天以内", "below"), ("7天", "")],
)
def test_bounds(text: str, bound: str) -> None:
    (quantity,) = quantities(text)
    assert quantity.bound == bound


@pytest.mark.parametrize(
    ("text", "role"), [("每次5 mg", "dose"), ("5 mg/次", "dose"), ("每日总量5 mg", "day"), ("5 mg daily", "day"), ("5 mg", "")]
)
def test_the_role_of_a_dose(text: str, role: str) -> None:
    (quantity,) = quantities(text)
    assert quantity.role == role


def test_a_dose_belongs_to_the_drug_named_before_it() -> None:
    doses = [(fact.about, fact.text) for fact in facts_of("布洛芬口服，每次200 mg；也可用对乙酰氨基酚，500 mg") if fact.kind == "dose"]
    assert doses == [("ibuprofen", "200 mg"), ("paracetamol", "500 mg")]


def test_equal_within_the_rounding_of_a_conversion_only() -> None:
    def equal(one: str, other: str) -> bool:
        return quantities(one)[0].equals(quantities(other)[0])

    assert equal("血糖5.6 mmol/L", "血糖101 mg/dL")
    assert not equal("血糖5.6 mmol/L", "血糖108 mg/dL")
    assert equal("12个月", "1年")
    assert not equal("100 mg", "101毫克")
    assert not equal("38.5℃", "38.4℃")


def stances(text: str) -> list[str]:
    return [str(fact.value) for fact in facts_of(text) if fact.kind in ("advice", "negation")]


@pytest.mark.parametrize(
    ("text", "stance"),
    [
        ("可以运动", "allowed"), ("可服此药", "allowed"), ("无禁忌者", "allowed"), ("不应禁食", "allowed"), ("may be used", "allowed"),
        ("必须复查", "required"), ("应立即就医", "required"), ("不能不治", "required"), ("should see a doctor", "required"),
        ("慎用此药", "caution"), ("应谨慎", "caution"), ("use with caution", "caution"),
        ("不必担心", "unneeded"), ("没有必要担心", "unneeded"), ("no need to worry", "unneeded"),
        ("不可以运动", "forbidden"), ("禁用此药", "forbidden"), ("应避免劳累", "forbidden"), ("忌辛辣", "forbidden"), ("别喝酒", "forbidden"),
        ("must not drive", "forbidden"), ("is contraindicated", "forbidden"), ("should be avoided", "forbidden"),
        ("不会传染", "denied"), ("没有传染性", "denied"), ("is not contagious", "denied"),
    ],
)  # fmt: skip
def test_stances(text: str, stance: str) -> None:
    assert stances(text) == [stance]


@pytest.mark.parametrize(
    "text", ["肾功能", "主要原因", "不良反应", "性别", "可能头晕", "能不能传染", "是否传染", "不但发热", "cancer", "marrow", "note"]
)
def test_words_that_only_look_like_a_stance(text: str) -> None:
    assert not stances(text)


def test_two_stances_in_a_row() -> None:
    assert together("denied", "denied") is None
    assert together("required", "caution") == "caution"
    assert stances("禁用、慎用") == ["forbidden", "caution"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("拜阿司匹灵和扑热息痛", ["aspirin", "paracetamol"]),
        ("2型糖尿病", ["type 2 diabetes"]),  # the longest name
        ("接种HPV疫苗", ["HPV vaccine"]),
        ("ＣＴ检查", ["CT"]),
        ("NSAIDs", ["NSAID"]),
        ("actor", []),  # ct is no word there
        ("心电图、肺功能", ["ECG", "lung function test"]),
    ],
)
def test_names(text: str, names: list[str]) -> None:
    assert [fact.value for fact in facts_of(text) if fact.kind not in (*QUANTITIES, "advice", "negation")] == names


def test_the_word_lists_are_sound() -> None:
    """Every name belongs to one entity (`lexicon` refuses others), is trimmed, and every list is used."""
    known = lexicon()
    assert {entity.kind for entity in known.entities.values()} == set(FILES.values())
    assert {path.name for path in FOLDER.glob("*.txt")} == {*FILES, "statements.txt"}
    assert all(name == name.strip() != "" for name in known.characters)
    assert len(known.entities) > 700


def test_conversions_of_the_word_list() -> None:
    """mg/dL of 1 mmol/L is a tenth of the molar mass."""
    factors = {entity.english: entity.mg_per_dl for entity in lexicon().entities.values() if entity.mg_per_dl}
    molar_masses = {
        "blood glucose": 180.16,
        "cholesterol": 386.7,
        "triglycerides": 885.7,
        "creatinine": 113.12,
        "urea": 60.06,
        "uric acid": 168.11,
    }
    for name, mass in molar_masses.items():
        assert factors[name] == pytest.approx(mass / 10, rel=1e-3)
