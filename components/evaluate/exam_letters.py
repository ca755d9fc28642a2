"""The letter that a generated answer states, by rules that are written down here, or the reason why there is none.

The first clear statement counts; nothing is guessed from the wording of the options, and no second reading replaces a wrong first one.
Full-width forms are folded (NFKC) and Markdown marks removed before. Statements are:

1. the answer opens with a letter: `B`, `B.`, `(B)`, `B、text`, `选项B`, `Option B`, `B: text`; a single small letter alone counts too;
2. a letter is announced: `答案是B`, `【答案】B`, `选B`, `正确选项为B`, `the answer is B`, `Answer: B`, `I choose B`, `\\boxed{B}`;
3. a letter is called the answer: `B是正确答案`, `B is the correct answer`.

A letter is clear only if what follows leaves it a choice: its option's own text, the end, a line break, punctuation or a reason.
So `B超检查`, `A good answer`, `C. difficile`, `D-dimer`, `A：错误` and `A?` state nothing, nor do `不选A`, `首选A药` and `答案不是A`.
An opening that lists the options again, from A on or as they were printed, is an echo, not a statement. Several letters in the first
statement make a single-answer question ambiguous; where several answers are right, they are the answer; letters joined by `或` or `or`
never are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

Reading = Literal["stated", "empty", "none", "ambiguous"]


class Extraction(NamedTuple):
    """The letters that an answer states, sorted; empty unless `reading` is "stated"."""

    letters: str
    reading: Reading


_CLOSERS = ")]】」』〉》\"'”’}>"
_OPENERS = "([【「『〈《\"'“‘{<"
_MARKDOWN = re.compile(r"[*`#$~]+|(?<![^\s])_+|_+(?=\s|$)|\\(?:text|mathrm|mathbf|textbf)(?=\{)")
_ALTERNATIVE = re.compile(r"或|还是|\bor\b", re.IGNORECASE)
_VERDICT = re.compile(r"错|对(?![于应])|不对|不正确|不符|正确|符合|(?:is\s+)?(?:wrong|right|incorrect|correct|true|false)\b", re.IGNORECASE)
_REASON = re.compile(r"\s*(?:是?因为|由于|理由|(?i:because|since|as)\b)")
_ENUMERATION = re.compile(r"\(?A[).、:].*\n\s*\(?B[).、:]")  # the options again, perhaps with other texts
_INSTEAD = re.compile(r"\s*(?:而?不是|而非|不选)")  # 选D不选A
_ITEM = re.compile(r"选?项\s*(?:$|[\n.,;。!、]|是?因为|由于)")  # 选B项。
_SIMPLIFIED = str.maketrans("選為應確項還錯對", "选为应确项还错对")  # of the words below, so that traditional ones are read too
_SEPARATORS = ".:、,;。!-–—)"
_LABEL = r"(?:选项\s*|(?i:option|choice|letter)\s+)?"
_LEAD_ZH = (
    r"答案(?:选项)?(?:应该|应当|应|就)?(?:是|为|选择|选)?"
    r"|正确的?选项(?:的字母)?(?:应该|应)?(?:是|为)?"
    r"|(?<![首优可筛挑当候任多单备精入误错不别勿未莫非没])(?<!不[应能要会可该宜必是])(?<!没有)(?<!不应该|不可以|不建议)选(?:择)?(?:的?是|为)?"
)
_LEAD_EN = (
    r"\b(?:answers?|(?:correct|right|best)\s+(?:option|choice)s?)(?:\s+(?:to|for)\s+(?:the|this)\s+question)?"
    r"\s*(?:(?:is|are|would\s+be|should\s+be|must\s+be)\s*:?|:|=)"
    r"|(?<!not )(?<!n't )(?<!n’t )(?<!never )\b(?:choose|select|pick)\b:?"
)
_ANNOUNCED = re.compile(rf"(?:{_LEAD_ZH})[{re.escape(_CLOSERS)}]?\s*:?\s*|(?i:{_LEAD_EN})\s*|\\boxed\s*")
_BEFORE_CALLED = r"(?:^|[\n.,;:。!?、]\s*|所以|因此|故|选项|(?i:so|thus|therefore|hence|option|choice),?\s+)"
_CALLED = r"(?:\s*[是为](?:本题的?)?(?:最佳|正确|最终|最?合适)*的?(?:答案|选项)|(?i:\s+(?:is|are)\s+the\s+(?:\w+\s+){0,2}(?:answer|option|choice)s?\b))"


@lru_cache(maxsize=32)
def _patterns(letters: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """(a list of letters, such a list called the answer)."""
    wrap, unwrap = f"[{re.escape(_OPENERS)}]*", f"[{re.escape(_CLOSERS)}]*"
    word = r"\s+(?i:and|or)\s+(?i:option\s+)?"
    join = rf"(?:\s*(?:[、,;/&+]|和|与|及|以及|或者?|还是)\s*选?|,?{word}|\s+(?=[{letters}](?![A-Za-z])))?"
    listed = rf"{wrap}{_LABEL}{wrap}(?P<letters>[{letters}](?:{unwrap}{join}{wrap}[{letters}])*)"
    return re.compile(listed), re.compile(_BEFORE_CALLED + listed + unwrap + _CALLED)


def extract_letters(answer: str, options: Mapping[str, str], *, several: bool = False) -> Extraction:
    """Read the letters that a generated answer states.

    Args:
        options: the option texts by letter, as the prompt printed them.
        several: whether more than one option may be right; else two letters are ambiguous.
    """
    text = _normalised(answer)
    if not text:
        return Extraction("", "empty")
    options = {letter: _normalised(option) for letter, option in options.items()}
    if re.fullmatch(rf"\(?[{''.join(options).lower()}][.)]*", text):
        return Extraction(text.strip("(.)").upper(), "stated")
    statements = _statements(text, options, several)
    if not statements:
        return Extraction("", "none")
    first = min(statements)[1]
    letters = "".join(sorted(set(re.findall(f"[{''.join(options)}]", re.sub("(?i:option|and|or)", "", first)))))
    if len(letters) > 1 and (not several or _ALTERNATIVE.search(first)):
        return Extraction("", "ambiguous")
    return Extraction(letters, "stated")


def _statements(text: str, options: Mapping[str, str], several: bool) -> list[tuple[int, str]]:
    """(position, letters as written) of every clear statement."""
    listed, called = _patterns("".join(options))
    found = [(match.start(), match["letters"]) for match in called.finditer(text)]
    for lead in _ANNOUNCED.finditer(text):
        statement = listed.match(text, lead.end())
        if statement is None:
            continue
        if _is_clear(statement["letters"], text[statement.end() :], options, opens=False):
            found.append((lead.start(), statement["letters"]))
        elif "," in statement["letters"]:  # 答案是B，A选项错误
            found.append((lead.start(), statement["letters"].split(",")[0]))
    echoed, whole = _echoed(text, options)
    opening = listed.match(text)
    if len(echoed) > 1:
        if several and whole and len(echoed) < len(options):
            found.append((0, echoed))
    elif opening and not _ENUMERATION.match(text) and _is_clear(opening["letters"], text[opening.end() :], options, opens=True):
        found.append((0, opening["letters"]))
    return found


def _is_clear(letters: str, rest: str, options: Mapping[str, str], *, opens: bool) -> bool:
    """Whether `rest`, which follows the letters, leaves them a choice."""
    if not rest.strip() or _REASON.match(rest) or (not opens and (_ITEM.match(rest) or _INSTEAD.match(rest))):
        return True
    closed = rest[0] in _CLOSERS
    rest = rest.lstrip(_CLOSERS)
    if not rest.strip() or rest[0] == "\n":
        return True
    after = rest.lstrip(_SEPARATORS + " ")
    own = options.get(letters, "")
    if own and after.startswith(own):
        return True
    if _VERDICT.match(after) and (opens or rest[0] not in ",;。!"):  # an analysis, option by option
        return False
    if re.match(r"\.\d", rest) or (re.match(r"\.\s*[a-z]", rest) and not closed):  # E. coli
        return False
    return closed or rest[0] in ".:、,;。!–—" or rest.startswith(" - ")


def _echoed(text: str, options: Mapping[str, str]) -> tuple[str, bool]:
    """Letters of the options that the text lists from its start as they were printed, and whether the last one is whole."""
    printed = "|".join(rf"{letter}[).、:]\s*{re.escape(own)}" for letter, own in options.items() if own)
    item = re.compile(rf"\(?(?:{printed})[.。;]?[ \t]*(?=\n|$|\(?[{''.join(options)}][).、:])\s*")
    letters, position = "", 0
    while match := item.match(text, position):
        letters += match[0].lstrip("(")[0]
        position = match.end()
    cut = re.fullmatch(rf"\(?([{''.join(options)}])[).、:]?\s*(.*)", text[position:].rstrip("\ufffd"))
    if letters and cut and options[cut[1]].startswith(cut[2]):  # the answer ended inside an option: no room was left
        return letters + cut[1], False
    return letters, True


def _normalised(text: str) -> str:
    _, thought, said = text.rpartition("</think>")  # a reasoning model's answer begins behind its reasoning
    return _MARKDOWN.sub("", unicodedata.normalize("NFKC", said if thought else text).translate(_SIMPLIFIED)).strip()
