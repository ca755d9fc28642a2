"""Names of drugs, diseases, examinations and groups of people, in Chinese and English, found in a text.

The names are in `lexicons/*.txt`: one entity a line, its English name, its Chinese name, and its other names. Every name of an entity
becomes one and the same private-use character, so what reads the text after this sees an entity as a single letter, whatever it was
called: 扑热息痛, acetaminophen and paracetamol are equal. The longest name wins (2型糖尿病 before 糖尿病).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from components.evaluate.facts_trie import Words

EntityKind = Literal["drug", "disease", "examination", "population"]

FOLDER = Path(__file__).with_name("lexicons")
FILES: dict[str, EntityKind] = {
    "drugs.txt": "drug",
    "diseases.txt": "disease",
    "examinations.txt": "examination",
    "populations.txt": "population",
}
PRIVATE_USE = "\ue000-\uf8ff"
FIRST_ENTITY, LAST_ENTITY = "\ue000", "\uf8ff"
_CONVERTS = "mg/dL per mmol/L:"


class Entity(NamedTuple):
    """One drug, disease, examination or group of people.

    `mg_per_dl` is, for a measured value that has two usual units, how many mg/dL one mmol/L is.
    """

    kind: EntityKind
    english: str
    chinese: str
    mg_per_dl: float | None


class Lexicon(NamedTuple):
    """`entities` by their private-use character, and `characters` by name."""

    entities: dict[str, Entity]
    characters: dict[str, str]
    names: Words


@cache
def lexicon() -> Lexicon:
    """The entities of all files.

    Raises:
        ValueError: a line has fewer than two names, or a name belongs to two entities.
    """
    entities: dict[str, Entity] = {}
    characters: dict[str, str] = {}
    for file, kind in FILES.items():
        for line in (FOLDER / file).read_text(encoding="utf-8").splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            names = [name.strip() for name in line.split("|")]
            factor = float(names.pop().removeprefix(_CONVERTS)) if names[-1].startswith(_CONVERTS) else None
            if len(names) < 2:
                raise ValueError(f"{file}: an entity needs an English and a Chinese name: {line}")
            character = chr(ord(FIRST_ENTITY) + len(entities))
            entities[character] = Entity(kind, names[0], names[1], factor)
            for name in names:
                if characters.setdefault(name.lower(), character) != character:
                    raise ValueError(f"{file}: {name} is the name of two entities")
    return Lexicon(entities, characters, Words(characters))


def mark_entities(text: str) -> str:
    """A normalised text in which each name of an entity is that entity's private-use character."""
    return lexicon().names.replace(text, lexicon().characters.__getitem__)


def character_of(english: str) -> str:
    """The private-use character of an entity by its English name."""
    return lexicon().characters[english.lower()]


def mg_per_dl_of(english: str) -> float | None:
    """How many mg/dL one mmol/L of a measured value is; None for "", and where the two don't convert."""
    return lexicon().entities[character_of(english)].mg_per_dl if english else None
