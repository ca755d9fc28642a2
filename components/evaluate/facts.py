"""How far an answer states the same medical facts as its reference, in Chinese and English.

Range 0–100, higher is better. The score is the F1 of the facts that agree; a contradicted fact halves it, so that it is below 50 whatever
else agrees: 可以服用阿司匹林 and 不可以服用阿司匹林 are 95 % alike by ROUGE-L, and one of them harms.

Tokenizer and method: `facts_read`; by rule, no model, deterministic. Facts are mentions (drug, disease, examination, group of people),
quantities (dose, frequency, duration, age, temperature, pressure, level, percentage …, in comparable units), statements (permission,
requirement, caution, prohibition, denial) and directions (before or after meals, raised or lowered, more or less of a food …). Two facts
of a kind are equal (0.5 g and 500 mg; 不宜 and 不应), opposed (禁用 and 慎用; 5 mg and 50 mg; aspirin and ibuprofen), or neither; and
their contexts are more or less alike (Dice coefficient of the tokens).

- A fact *agrees* if the other text has an equal one: a mention or quantity anywhere, a statement in a context at least 50 % alike.
- Two opposed facts are a *contradiction* if their contexts are as alike as the kind asks (65–80 %), and more alike than the context of
  either and that of any fact equal to it (of statements: of one of the two). A dose or frequency of one and the same drug contradicts in
  any context. A negative statement is contradicted by the same clause without it.
- Every other fact is *missing* (from the answer) or *extra* (in the answer).

Denials, directions, and what is allowed or advised without a drug, disease, examination or group of people (可以多休息) can be worded in
too many ways to miss them: they count only where they contradict, or where the reference has no other fact. Precision is the share of
the answer's facts that agree, recall that of the reference's; swapping the texts changes neither F1 nor contradictions.

Limits. It does not see: names that the word lists lack; contradictions in sentences of different wording; what "it" or "the latter"
refers to; traditional characters; a fact turned over where the text states it twice and the answer once more rightly; which of two
directions or numbers of one kind in one clause belongs to what. It knows no medicine: two safe alternatives in the same words are a
contradiction, and an answer that says more than its reference loses precision. Good answers in free wording score far below 100:
compare means over rows, and the share of contradicted rows, not single scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from components.evaluate.facts_lexicon import FIRST_ENTITY, LAST_ENTITY, character_of
from components.evaluate.facts_quantities import Quantity
from components.evaluate.facts_read import Clause, Context, Fact, Reading, read
from components.evaluate.facts_statements import NEGATIVE, OPPOSED

Verdict = Literal["agree", "missing", "extra", "contradicted"]

STATEMENTS = ("advice", "negation")
MENTIONS = ("drug", "disease", "examination", "population")
QUANTITIES = ("dose", "frequency", "duration", "age", "temperature", "pressure", "level", "percentage", "measure", "number")

STATEMENT_AGREES_FROM = 0.5
STATEMENT_OPPOSED_FROM = 0.65
GOVERNED_ALIKE_FROM = 0.5
QUANTITY_OPPOSED_FROM = 0.75
MENTION_OPPOSED_FROM = 0.8
DIRECTION_OPPOSED_FROM = 0.8
# What the removal of a negation can leave behind: 不能吃 and 能吃, do not and do.
_LEFT_OVER = frozenset("能可会有要需得") | {"can", "may", "will", "would", "could", "do", "doe", "did", "have", "ha", "had"}


class Finding(NamedTuple):
    """One fact of the comparison, in the words of the texts; `reference` is None for an extra fact, `answer` for a missing one."""

    kind: str
    reference: str | None
    answer: str | None
    verdict: Verdict


class FactScore(NamedTuple):
    """The agreement of one answer.

    Attributes:
        score: 0–100; None if and only if the reference states no fact: such a row is left out of the mean, and counted.
        contradicted: whether any fact is contradicted.
        findings: every fact of both texts with its verdict.
    """

    score: float | None
    contradicted: bool
    findings: list[Finding]


def facts_of(text: str) -> list[Fact]:
    """The facts that a text states, clause by clause."""
    return read(text).facts


def fact_agreement(reference: str, answer: str) -> FactScore:
    """How far an answer states the facts of its reference; neither text is taken for the truth."""
    ours, theirs = read(reference), read(answer)
    judged_ours, judged_theirs = _judge(ours, theirs)
    contradicted = any(judged.verdict == "contradicted" for judged in judged_ours + judged_theirs)
    findings = _findings(judged_ours, judged_theirs)
    if not ours.facts:
        return FactScore(None, contradicted, findings)
    all_count = not any(_counts(fact) for fact in ours.facts)
    recall, precision = _share(judged_ours, all_count), _share(judged_theirs, all_count)
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return FactScore(100 * f1 / (2 if contradicted else 1), contradicted, findings)


class _Judged(NamedTuple):
    """One fact of a text with its verdict, and the words of the other text's fact that decided."""

    fact: Fact
    verdict: Verdict
    partner: str | None


def _share(judged: list[_Judged], all_count: bool) -> float:
    """The share of a text's facts that agree."""
    verdicts = [one.verdict for one in judged if all_count or one.verdict == "contradicted" or _counts(one.fact)]
    return verdicts.count("agree") / len(verdicts) if verdicts else 0.0


def _counts(fact: Fact) -> bool:
    """Whether a fact counts without being contradicted: one that is worded in few ways."""
    if fact.kind == "advice":
        return (fact.value in NEGATIVE and not fact.alone) or any(FIRST_ENTITY <= token <= LAST_ENTITY for token in fact.context)
    return fact.kind in MENTIONS or fact.kind in QUANTITIES


def _findings(ours: list[_Judged], theirs: list[_Judged]) -> list[Finding]:
    """One line for each fact of the reference, then what only the answer says."""
    findings = [Finding(one.fact.kind, one.fact.text, one.partner, one.verdict) for one in ours]
    known = {(finding.answer, finding.verdict) for finding in findings}
    others = [one for one in theirs if one.verdict != "agree" and (one.fact.text, one.verdict) not in known]
    return findings + [Finding(one.fact.kind, one.partner, one.fact.text, one.verdict) for one in others]


def _judge(ours: Reading, theirs: Reading) -> tuple[list[_Judged], list[_Judged]]:
    """The verdict on each fact of both texts."""
    judged_ours: list[_Judged] = []
    judged_theirs: list[_Judged] = []
    groups_ours, groups_theirs = _groups(ours.facts), _groups(theirs.facts)
    dropped = (_dropped_negations(ours, theirs), _dropped_negations(theirs, ours))
    for group in dict.fromkeys([*groups_ours, *groups_theirs]):
        own, other = groups_ours.get(group, []), groups_theirs.get(group, [])
        one, two = _compare(own, other, ours, theirs, dropped)
        judged_ours += one
        judged_theirs += two
    return judged_ours, judged_theirs


def _groups(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Facts that may be equal or opposed: those of a kind, advice with negation. A text that says one thing a thousand times says it once."""
    groups: dict[str, list[Fact]] = {}
    once = {
        (fact.kind, fact.value, fact.about, fact.context, fact.clause if fact.kind in STATEMENTS else 0): fact for fact in reversed(facts)
    }
    for fact in reversed(once.values()):
        groups.setdefault("advice" if fact.kind == "negation" else fact.kind, []).append(fact)
    return groups


def _compare(
    own: list[Fact], other: list[Fact], ours: Reading, theirs: Reading, dropped: tuple[dict[int, str], dict[int, str]]
) -> tuple[list[_Judged], list[_Judged]]:
    """Judge the facts of one group of both texts."""
    equal_own: list[tuple[float, int]] = [(-1.0, -1)] * len(own)  # how alike the contexts are, and which fact of the other text
    equal_other = [(-1.0, -1)] * len(other)
    opposed: list[tuple[float, int, int]] = []
    statements = any(fact.kind in STATEMENTS for fact in own)
    for i, fact in enumerate(own):
        for j, twin in enumerate(other):
            alike = _alike(fact.context, twin.context)
            if statements and alike < STATEMENT_AGREES_FROM:
                continue  # most pairs end here
            if fact.about and twin.about and fact.about != twin.about:
                continue
            if _equal(fact, twin, alike):
                equal_own[i] = max(equal_own[i], (alike, j))
                equal_other[j] = max(equal_other[j], (alike, i))
            elif _opposed(fact, twin, alike, ours, theirs):
                opposed.append((alike, i, j))
    against_own = {i: dropped[0][fact.clause] for i, fact in enumerate(own) if fact.value in NEGATIVE and fact.clause in dropped[0]}
    against_other = {j: dropped[1][fact.clause] for j, fact in enumerate(other) if fact.value in NEGATIVE and fact.clause in dropped[1]}
    for alike, i, j in opposed:
        better = (alike > equal_own[i][0], alike > equal_other[j][0])
        if all(better) or (any(better) and own[i].kind in STATEMENTS and alike >= max(equal_own[i][0], equal_other[j][0])):
            against_own.setdefault(i, other[j].text)
            against_other.setdefault(j, own[i].text)
    return (
        _verdicts(own, equal_own, against_own, other, "missing"),
        _verdicts(other, equal_other, against_other, own, "extra"),
    )


def _verdicts(
    facts: list[Fact], equal: list[tuple[float, int]], against: dict[int, str], twins: list[Fact], absent: Verdict
) -> list[_Judged]:
    """One verdict for each different fact; the worst of its repetitions counts."""
    judged: dict[object, _Judged] = {}
    for place, fact in enumerate(facts):
        key = (fact.kind, fact.value, fact.about, fact.context if fact.kind in STATEMENTS else None)
        if place in against:
            judged[key] = _Judged(fact, "contradicted", against[place])
        elif equal[place][1] >= 0:
            judged.setdefault(key, _Judged(fact, "agree", twins[equal[place][1]].text))
        elif key not in judged:
            judged[key] = _Judged(fact, absent, None)
    return list(judged.values())


def _dropped_negations(own: Reading, other: Reading) -> dict[int, str]:
    """Clauses of one text with a negative statement that the other text has without it: by number, with the other's clause.

    不要自行停药 and 自行停药: the second has no statement that could be compared.
    """
    dropped: dict[int, str] = {}
    negative = [(number, clause) for number, clause in enumerate(own.clauses) if not NEGATIVE.isdisjoint(clause.stances)]
    if not negative:
        return dropped
    alike: dict[Context, list[Clause]] = {}  # clauses whose contexts differ in nothing but what is left over
    for twin in other.clauses:
        alike.setdefault(_without_left_over(twin.context), []).append(twin)
    for number, clause in negative:
        twins = alike.get(_without_left_over(clause.context), [])
        if any(twin.stances == clause.stances for twin in twins):
            continue
        for stance in (stance for stance in clause.stances if stance in NEGATIVE):
            rest = list(clause.stances)
            rest.remove(stance)
            plain = [twin for twin in twins if twin.stances == tuple(rest)]
            if plain and not any(one[1:] == plain[0][1:] for one in own.clauses):
                dropped[number] = other.shown(plain[0].marked)
    return dropped


def _without_left_over(context: Context) -> Context:
    return context if context.isdisjoint(_LEFT_OVER) else context - _LEFT_OVER


def _alike(one: Context, other: Context) -> float:
    """Dice coefficient of two sets of tokens, 0–1; nothing and nothing are alike."""
    total = len(one) + len(other)
    return 2 * len(one & other) / total if total else 1.0


def _equal(fact: Fact, twin: Fact, alike: float) -> bool:
    if isinstance(fact.value, Quantity) and isinstance(twin.value, Quantity):
        return fact.value.equals(twin.value)
    if fact.kind in STATEMENTS:
        same = fact.value == twin.value or {fact.value, twin.value} == {"forbidden", "denied"}
        return same and alike >= STATEMENT_AGREES_FROM
    return fact.value == twin.value


def _opposed(fact: Fact, twin: Fact, alike: float, ours: Reading, theirs: Reading) -> bool:
    """Whether two facts of a group contradict each other, given how alike their contexts are."""
    if isinstance(fact.value, Quantity) and isinstance(twin.value, Quantity):
        one, other = fact.value, twin.value
        of_one_drug = (
            fact.kind in ("dose", "frequency")
            and fact.about == twin.about != ""
            and one.dimension == other.dimension
            and one.role == other.role
        )
        return (alike >= QUANTITY_OPPOSED_FROM or of_one_drug) and one.opposes(other)
    if fact.kind in STATEMENTS:
        if alike < STATEMENT_OPPOSED_FROM or frozenset((fact.value, twin.value)) not in OPPOSED:
            return False
        return _alike(fact.governs, twin.governs) >= GOVERNED_ALIKE_FROM
    if fact.kind not in MENTIONS:
        return alike >= DIRECTION_OPPOSED_FROM
    # One token is no sentence that two names could take turns in; a list that has both names is no exchange.
    return (
        alike >= MENTION_OPPOSED_FROM
        and 1 not in (len(fact.context), len(twin.context))
        and ours.clauses[fact.clause].stances == theirs.clauses[twin.clause].stances
        and character_of(str(fact.value)) not in twin.context
        and character_of(str(twin.value)) not in fact.context
    )
