"""Reads the facts of a medical text: what it mentions, how much, how often, how long, and what it permits, requires, forbids or denies.

Method, in this order: the text is normalised (NFKC, lower case, blanks beside Chinese removed); names, frequencies, quantities, and words
of permission or direction each become one private-use character; the rest is cut at punctuation into clauses, and a clause into tokens:
Chinese characters, and Latin words without a final s by their first six letters; the commonest of both don't count. A fact's context is the set of the tokens
around it: its clause, or for a permission the part of the clause that it governs. A context of a single plain token or none takes in the clause before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

from components.evaluate.facts_frequency import mark_frequencies
from components.evaluate.facts_lexicon import FIRST_ENTITY, LAST_ENTITY, PRIVATE_USE, Entity, lexicon, mark_entities, mg_per_dl_of
from components.evaluate.facts_marks import FIRST_MARK, MARKS, Marks
from components.evaluate.facts_quantities import Quantity, mark_quantities
from components.evaluate.facts_statements import Direction, Stance, Statement, mark_statements, together
from components.evaluate.rouge import HAN, is_chinese, nfkc

Context = frozenset[str]


_BESIDE = "beside "  # before a token of the context of what stands alone: only another that stands alone is like it


class Fact(NamedTuple):
    """One thing that a text states.

    Attributes:
        kind: drug, disease, examination or population (a mention); dose, frequency, duration, age, temperature, pressure, level,
            percentage, measure or number (a quantity); advice (a word of permission, requirement or prohibition); negation (a plain
            not); meals, time_of_day, change, compared, result, side, course or nature (a direction).
        value: what is compared: the entity's English name, the quantity, the stance, the pole.
        about: of a dose or frequency the drug, of a level the measured value; "" when the text names none.
        text: the words of the text; an entity by its main name; of advice and negation the whole clause.
        context: the tokens around it.
        clause: which clause of the text it is in.
        governs: of advice and negation the part of the context that the word stands before; empty for other kinds.
    """

    kind: str
    value: str | Quantity
    about: str
    text: str
    context: Context
    clause: int
    governs: Context = frozenset()

    @property
    def alone(self) -> bool:
        """Whether a statement is a clause of its own (不能。), so that its context is only what stands beside it."""
        return any(token.startswith(_BESIDE) for token in self.context)


class Clause(NamedTuple):
    """One clause as it was marked, its tokens (with those of the clause before if it has few), and its statements' stances in order."""

    marked: str
    context: Context
    stances: tuple[str, ...]


class Reading(NamedTuple):
    """The facts of a text in their order, its clauses, and what puts the words back into a marked clause."""

    facts: list[Fact]
    clauses: list[Clause]
    shown: Callable[[str], str]


_CLAUSE_END = re.compile(r"[,;!?。\n]|\.(?![a-z\d])|但是?|而是|(?<![a-z])(?:but|however|whereas)(?![a-z])")
_TOKEN = re.compile(rf"[a-z]+|[{HAN}{PRIVATE_USE}{MARKS}、]")
_MARK = re.compile(f"[{PRIVATE_USE}{MARKS}]")
# What says little: "take" is what one does with a drug; 用 and 吃 and 服 alike.
_LIGHT = frozenset("的了是在和与或及者人患等也就都而以其所被把对于为有个们服用使吃食喝饮口时这那该此后再还并且又则将从向由") | {
    "", "a", "an", "the", "of", "to", "in", "for", "with", "and", "or", "be", "i", "are", "wa", "it", "thi", "that", "you", "your", "they",
    "their", "take", "taken", "taking", "use", "used", "using", "by", "on", "at", "if", "when", "who", "which", "these", "those", "we",
    "he", "she", "hi", "her", "patien", "people", "person",
}  # fmt: skip
_STOP = "、"  # takes the place of a statement or quantity, and keeps two statements apart
_FIRST_CHINESE = "\u3001"  # 、 and all that follows it; Latin words come before
_WEIGHTLESS = _LIGHT | {_STOP}
_BLANKS = re.compile(r"[^\S\n]+")
# A pattern that begins with a plain letter is searched several times as fast: the look behind comes second.
_BESIDE_CHINESE = re.compile(r" (?:(?<=[^\x00-\x7f] )|(?=[^\x00-\x7f]))")
_ITEM_NUMBER = re.compile("[①-⑳⑴-⒇⒈-⒛㈠-㈩]")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
_ABBREVIATION = re.compile(r"(?<![a-z])([bqt])\.(?:(i)\.)?d\.")


def normalise(text: str) -> str:
    """One spelling for full and half width, case, blanks, µ and ℃; private-use characters, which marks need, are dropped."""
    text = _THOUSANDS.sub("", _BLANKS.sub(" ", text)).replace("\n ", "\n")
    if not text.isascii():
        text = nfkc(_ITEM_NUMBER.sub("\n", _MARK.sub("", text))).replace("’", "'")
        text = _BESIDE_CHINESE.sub("", _BLANKS.sub(" ", text))
    text = text.lower()
    return _ABBREVIATION.sub(r"\1\2d", text) if ".d." in text else text


@lru_cache(maxsize=8)  # the answers of several models share a reference
def read(text: str) -> Reading:
    """The facts and clauses of a text; treat them as read-only."""
    marks, chinese = Marks(), is_chinese(text)
    shown = partial(_shown, marks=marks, chinese=chinese)
    text = mark_frequencies(mark_entities(normalise(text)), marks)
    text = mark_statements(mark_quantities(text, marks), marks)
    halves = [_half(clause, tokens, marks) for clause in _CLAUSE_END.split(text) if (tokens := _TOKEN.findall(clause))]
    clauses = [_clause(halves, number) for number in range(len(halves))]
    return Reading(_facts(halves, clauses, shown, chinese), clauses, shown)


def _shown(clause: str, marks: Marks, chinese: bool) -> str:
    """A clause to be read by people: entities by their main name, everything else in the words of the text."""

    def words(match: re.Match[str]) -> str:
        entity = lexicon().entities.get(match[0])
        if entity is None:
            return marks[match[0]][1]
        return entity.chinese if chinese else entity.english

    return _BLANKS.sub(" ", _MARK.sub(words, clause)).strip()


class _Said(NamedTuple):
    """A statement of a clause: the tokens before it since the one before, and those after it until the next."""

    stance: Stance
    before: Context
    after: Context


class _Half(NamedTuple):
    """A clause by itself: its tokens, its statements, and with their place among the tokens its entities, quantities and directions."""

    marked: str
    content: Context
    said: list[_Said]
    entities: list[tuple[int, Entity, str]]
    things: list[tuple[int, Quantity | Direction, str]]


def _half(clause: str, tokens: list[str], marks: Marks) -> _Half:
    known = lexicon().entities
    entities: list[tuple[int, Entity, str]] = []
    things: list[tuple[int, Quantity | Direction, str]] = []
    stances: list[tuple[int, Stance]] = []
    for place, token in enumerate(tokens):
        if _FIRST_CHINESE <= token < FIRST_ENTITY:
            continue
        if token < _FIRST_CHINESE:
            tokens[place] = token.rstrip("s")[:6]  # a stem, good enough to compare
        elif token >= FIRST_MARK:
            thing, words = marks[token]
            tokens[place] = thing.token if isinstance(thing, Direction) else _STOP
            if isinstance(thing, Statement):
                stances.append((place, thing.stance))
            else:
                things.append((place, thing, words))
        elif token in known:
            entities.append((place, known[token], token))
    return _Half(clause, _content(tokens), _said(tokens, stances) if stances else [], entities, things)


def _content(tokens: list[str]) -> Context:
    return frozenset(tokens) - _WEIGHTLESS


def _said(tokens: list[str], stances: list[tuple[int, Stance]]) -> list[_Said]:
    """The statements of a clause; two with nothing between them are one."""
    if len(stances) == 1:
        ((place, stance),) = stances
        return [_Said(stance, _content(tokens[:place]), _content(tokens[place + 1 :]))]
    runs: list[tuple[Stance | None, int, int]] = []  # with the places of the first and the last word
    for place, stance in stances:
        if runs and _LIGHT.issuperset(tokens[runs[-1][2] + 1 : place]):
            before, first, _ = runs[-1]
            runs[-1] = (together(before, stance) if before else stance, first, place)
        else:
            runs.append((stance, place, place))
    runs = [run for run in runs if run[0]]
    ends = [0, *(last + 1 for _, _, last in runs)]
    starts = [*(first for _, first, _ in runs), len(tokens)]
    return [
        _Said(stance, _content(tokens[ends[n] : starts[n]]), _content(tokens[ends[n + 1] : starts[n + 1]]))
        for n, (stance, _, _) in enumerate(runs)
        if stance
    ]


def _clause(clauses: list[_Half], number: int) -> Clause:
    clause = clauses[number]
    context = clause.content | _neighbour(clauses, number) if _thin(clause.content) else clause.content
    return Clause(clause.marked, context, tuple(said.stance for said in clause.said))


def _thin(context: Context) -> bool:
    """Whether a context says too little to compare: nothing, or one plain character or word."""
    return not context or (len(context) == 1 and not any(FIRST_ENTITY <= token <= LAST_ENTITY or " " in token for token in context))


def _neighbour(clauses: list[_Half], number: int) -> Context:
    """The tokens of the clause before; of the one after for the first, of itself for the only one."""
    return clauses[number - 1 if number else min(1, len(clauses) - 1)].content


def _facts(halves: list[_Half], clauses: list[Clause], shown: Callable[[str], str], chinese: bool) -> list[Fact]:
    facts: list[Fact] = []
    drug, measured = "", ""  # the last ones named
    for number, half in enumerate(halves):
        context = clauses[number].context
        for _, entity, token in half.entities:
            around = context - {token}
            if _thin(around):
                around |= _neighbour(halves, number) - {token}
            facts.append(Fact(entity.kind, entity.english, "", entity.chinese if chinese else entity.english, around, number))
        drugs = [(place, entity.english) for place, entity, _ in half.entities if entity.kind == "drug"]
        values = [(place, entity.english) for place, entity, _ in half.entities if entity.kind == "examination"]
        for place, thing, words in half.things:
            if isinstance(thing, Direction):
                facts.append(Fact(thing.axis, thing.pole, "", words, context - {thing.token}, number))
            elif thing.kind == "level":
                facts.append(_level(thing, _nearest(values, place, measured), context, number))
            else:
                about = _nearest(drugs, place, drug) if thing.kind in ("dose", "frequency") else ""
                facts.append(Fact(thing.kind, thing, about, words, context, number))
        drug = drugs[-1][1] if drugs else drug
        measured = values[-1][1] if values else measured
        if half.said:
            text, neighbour = shown(half.marked), _neighbour(halves, number)
            facts += [_statement(half, place, text, neighbour, drug, number) for place in range(len(half.said))]
    return facts


def _nearest(names: list[tuple[int, str]], place: int, last: str) -> str:
    """The last name before a place, else the first after it, else the last one of the clauses before."""
    before = [name for at, name in names if at < place]
    return before[-1] if before else names[0][1] if names else last


def _level(level: Quantity, about: str, context: Context, clause: int) -> Fact:
    """A concentration, in mmol/L where the measured value is one whose mg/dL convert."""
    mg_per_dl = mg_per_dl_of(about)
    value = level
    if mg_per_dl and level.dimension == "mg/L":
        value = level._replace(dimension="mmol/L", low=level.low / 10 / mg_per_dl, high=level.high / 10 / mg_per_dl)
    return Fact("level", value, about, level.text, context, clause)


def _statement(half: _Half, place: int, text: str, neighbour: Context, drug: str, number: int) -> Fact:
    """A permission or denial: about what follows it, for the first of a clause also what precedes it; 禁用 alone: about what precedes."""
    said = half.said[place]
    context = (said.after | said.before if place == 0 or not said.after else said.after) or half.content
    only_entities = all(FIRST_ENTITY <= token <= LAST_ENTITY for token in context)
    return Fact(
        kind="negation" if said.stance == "denied" else "advice",
        value=said.stance,
        about=drug if only_entities else "",  # 孕妇禁用: the drug that was named before
        text=text,
        context=context or frozenset(_BESIDE + token for token in neighbour),
        clause=number,
        governs=said.after or said.before,
    )
