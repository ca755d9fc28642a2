"""ROUGE-1, ROUGE-2 and ROUGE-L of an answer against its reference, in Chinese and English.

Range 0–100, higher is better; the F1 of n-gram overlap, and of the longest common subsequence.
Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. Equal to the `rouge-score` library, whose tokenizer and
F-measure are used; its counting and its table of subsequences, in Python, take fifty times as long for a Chinese answer of 200 to 600 characters.

Tokenizer: an English reference is cut by rouge-score's own tokenizer, without stemming, so the numbers equal published ones. That
tokenizer keeps nothing but `[a-z0-9]`: identical Chinese sentences would score 0, and different ones that share "120/80mmHg" 100. So
a Chinese reference is cut by ours: single characters or jieba words; Latin words, and numbers with their decimals and unit, stay whole.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Literal

from rapidfuzz.distance import LCSseq
from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from components.evaluate.ngrams import shared_ngrams

Cut = Literal["characters", "jieba"]

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN = re.compile(f"[{HAN}]")
# Written after a blank too ("140 mmHg"), these still belong to their number.
_UNITS = "mmhg|mmol/l|μmol/l|mg/dl|mg/kg|kcal|kpa|bpm|mcg|min|mg|μg|ug|ng|kg|ml|dl|cm|mm|iu|°c|g|l|h|%"
_TOKEN = re.compile(rf"\d+(?:[./]\d+)*(?:\s?(?:{_UNITS})(?![a-z])|[a-z]+)?|[a-z][a-z0-9]*(?:[-'][a-z0-9]+)*|[{HAN}]+|[^\W\d_]")


def is_chinese(text: str) -> bool:
    """Whether a text has any Chinese character."""
    return _HAN.search(text) is not None


@lru_cache(maxsize=32)
def nfkc(text: str) -> str:
    """A text in one width; kept, because several metrics begin with it."""
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


class ChineseTokenizer(Tokenizer):
    """Cuts Chinese text, and the Latin words and numbers in it, for rouge-score."""

    def __init__(self, cut: Cut = "characters") -> None:
        self._cut = cut

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text; case, width (full or half) and punctuation do not count."""
        tokens: list[str] = []
        for token in _TOKEN.findall(nfkc(text).lower()):
            if _HAN.match(token):
                tokens += self._words(token)
            else:
                tokens.append(re.sub(r"\s", "", token))
        return tokens

    def _words(self, run: str) -> list[str]:
        if self._cut == "characters":
            return list(run)
        import jieba

        jieba.setLogLevel("WARNING")
        words: list[str] = jieba.lcut(run)
        return words


@lru_cache(maxsize=32)  # several metrics cut a text alike, and the answers of several models share a reference
def characters(text: str) -> tuple[str, ...]:
    """Tokens of a text as `ChineseTokenizer` cuts them by default."""
    return tuple(_CHARACTERS.tokenize(text))


_CHARACTERS = ChineseTokenizer()


class Rouge:
    """Scores answers; `cut` says how Chinese text is cut."""

    def __init__(self, cut: Cut = "characters") -> None:
        self._english = DefaultTokenizer(use_stemmer=False).tokenize
        self._chinese = characters if cut == "characters" else ChineseTokenizer(cut).tokenize

    def score(self, reference: str, answer: str) -> dict[str, float]:
        """`rouge_1`, `rouge_2` and `rouge_l` of an answer, 0–100. The reference decides which tokenizer cuts both texts."""
        tokenize = self._chinese if is_chinese(reference) else self._english
        own, other = tokenize(reference), tokenize(answer)
        singles, pairs = shared_ngrams(own, other, 2)
        return {
            "rouge_1": _f1(singles, len(own), len(other)),
            "rouge_2": _f1(pairs, len(own) - 1, len(other) - 1),
            "rouge_l": _f1(LCSseq.similarity(own, other), len(own), len(other)),
        }


def _f1(shared: int, own: int, other: int) -> float:
    """F1, 0–100, of what two texts share and of how much each has."""
    return 100 * fmeasure(shared / max(other, 1), shared / max(own, 1))
