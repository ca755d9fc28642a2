"""BLEU, chrF and exact match of an answer against its reference, in Chinese and English.

BLEU: range 0–100, higher is better; precision of 1- to 4-grams with a brevity penalty. Of one answer, not of a corpus: orders that the answer
is too short for are left out, and an order without a match counts as if it had half a match, a quarter the next time … (sacrebleu's `exp`
smoothing, that of mteval-v13a). A mean of these is not the corpus BLEU of papers. Tokenizer, by the language of the reference: sacrebleu's
`zh` (single Chinese characters) or `13a`; its default of 13a takes a Chinese sentence for one word, and would score it 0.
Source: Papineni et al., "BLEU", 2002; smoothing as method 3 of Chen & Cherry, 2014; computed by sacrebleu (Post, 2018).

chrF: range 0–100, higher is better; F2 of 1- to 6-grams of characters, blanks left out; no tokenizer. Source: Popović, "chrF", 2015;
computed by sacrebleu.

Exact match: 0 or 1, its mean a share of 0–1, higher is better. Tokenizer: that of ROUGE for Chinese in every language, so that case, width,
blanks and punctuation do not count; signs such as < and ≥ do.
"""

from __future__ import annotations

import re
import unicodedata

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from components.evaluate.rouge import ChineseTokenizer, is_chinese

_SIGNS = re.compile(r"[<>≤≥=±+]")
_CACHES = (Tokenizer13a, TokenizerRegexp, TokenizerZh)
_tokenize = ChineseTokenizer().tokenize


class Overlap:
    """Scores answers."""

    def __init__(self) -> None:
        self._chinese = BLEU(tokenize="zh", effective_order=True)
        self._english = BLEU(tokenize="13a", effective_order=True)
        self._chrf = CHRF()

    def score(self, reference: str, answer: str) -> dict[str, float]:
        """`bleu` and `chrf`, 0–100, and `exact_match`, 0 or 1. The reference decides which tokenizer cuts both texts."""
        bleu = self._chinese if is_chinese(reference) else self._english
        scores = {
            "bleu": min(100.0, bleu.sentence_score(answer, [reference]).score),  # of equal texts it is 100.00000000000004
            "chrf": self._chrf.sentence_score(answer, [reference]).score,
            "exact_match": float(_normalised(answer) == _normalised(reference)),
        }
        for tokenizer in _CACHES:  # else each would keep its last 65,536 texts
            tokenizer.__call__.cache_clear()
        return scores


def _normalised(text: str) -> tuple[list[str], list[str]] | str:
    """What counts for an exact match; of a text of nothing but punctuation, all of it."""
    tokens = _tokenize(text)
    return (tokens, _SIGNS.findall(unicodedata.normalize("NFKC", text))) if tokens else text.strip()
