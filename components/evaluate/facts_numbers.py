"""Numbers as a medical text writes them: 0.5, 1/2, 十五, 半, 三四 (three or four), twenty."""

from __future__ import annotations

_DIGITS = {"零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
_TENS = {"十": 10, "百": 100, "千": 1000}
_WORDS = {
    "one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0, "six": 6.0, "seven": 7.0, "eight": 8.0, "nine": 9.0, "ten": 10.0,
    "eleven": 11.0, "twelve": 12.0, "fifteen": 15.0, "twenty": 20.0, "thirty": 30.0, "half": 0.5, "half a": 0.5, "half an": 0.5,
    "once": 1.0, "twice": 2.0, "thrice": 3.0,
}  # fmt: skip

_HAN_NUMERALS = "".join([*_DIGITS, *_TENS])

# Group-free patterns of a number, and of what joins the two ends of a range. Possessive: a thousand digits take linear time.
NUMBER = (
    rf"(?:(?<!\d)\d++(?:\.\d++)?(?:[/⁄]\d++)?|[{_HAN_NUMERALS}]++|半"
    r"|(?<![a-z])(?:half an?|half|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty)(?![a-z]))"
)
# The characters with which a number can begin, for a character class.
FIRST_OF_NUMBER = rf"\d{_HAN_NUMERALS}半" + "".join(sorted({word[0] for word in _WORDS}))
TO = r"\s?(?:--?|~|–|—|―|至|到|或|to|or)\s?"


def number(text: str) -> tuple[float, float]:
    """The value of what `NUMBER` found, twice; for 三四 and 两三 the two ends of that range."""
    if text[0].isdecimal():
        numerator, _, denominator = text.replace("⁄", "/").partition("/")
        value = float(numerator) / (float(denominator or 1) or 1)
        return value, value
    if text in _WORDS:
        return _WORDS[text], _WORDS[text]
    if text == "半":
        return 0.5, 0.5
    if len(text) == 2 and text[0] in _DIGITS and text[1] in _DIGITS and _DIGITS[text[1]] - _DIGITS[text[0]] == 1:
        return float(_DIGITS[text[0]]), float(_DIGITS[text[1]])
    value = _chinese(text)
    return value, value


def _chinese(text: str) -> float:
    """三百二十五 → 325; digits in a row are read as digits (二〇 → 20)."""
    if not any(letter in _TENS for letter in text):
        return float("".join(str(_DIGITS[letter]) for letter in text))
    total, digit = 0.0, 0
    for letter in text:
        if letter in _TENS:
            total += (digit or 1) * _TENS[letter]
            digit = 0
        else:
            digit = _DIGITS[letter]
    return total + digit
