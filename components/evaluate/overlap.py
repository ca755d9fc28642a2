"""BLEU, chrF and exact match of an answer against its reference, in Chinese and English.

BLEU: range 0–100, higher is better; precision of 1- to 4-grams with a brevity penalty. Of one answer, not of a corpus: orders that the answer
is too short for are left out, and an order without a match counts as if it had half a match, a quarter the next time … (sacrebleu's `exp`
smoothing, that of mteval-v13a). A mean of these is not the corpus BLEU of papers. Tokenizer, by the language of the reference: sacrebleu's
`zh` (single Chinese characters) or `13a`; its default of 13a takes a Chinese sentence for one word, and would score it 0.
Source: Papineni et al., "BLEU", 2002; smoothing as method 3 of Chen & Cherry, 2014; tokenizers and formula of sacrebleu (Post, 2018).

chrF: range 0–100, higher is better; F2 of 1- to 6-grams of characters, blanks left out; no tokenizer. Source: Popović, "chrF", 2015;
equal to sacrebleu's: precision and recall are means over the orders of which both texts have n-grams.

Exact match: 0 or 1, its mean a share of 0–1, higher is better. Tokenizer: that of ROUGE for Chinese in every language, so that case, width,
blanks and punctuation do not count; signs such as < and ≥ do.
"""

from __future__ import annotations

import re

from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from components.evaluate.ngrams import shared_ngrams
from components.evaluate.rouge import characters, is_chinese, nfkc

BLEU_ORDERS = 4
CHRF_ORDERS = 6
CHRF_BETA = 2
# The characters that sacrebleu counts as Chinese; its ranges beyond \uffff are slips, and mean \u2001 to \u2a6d.
CHINESE_RUN = re.compile(
    "[\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef]+"
)
_RUN = "。"
_SIGNS = re.compile(r"[<>≤≥=±+]")


class Overlap:
    """Scores answers."""

    def __init__(self) -> None:
        self._english = Tokenizer13a()
        self._others = TokenizerRegexp()

    def score(self, reference: str, answer: str) -> dict[str, float]:
        """`bleu` and `chrf`, 0–100, and `exact_match`, 0 or 1. The reference decides which tokenizer cuts both texts."""
        tokenize = self._cut_chinese if is_chinese(reference) else self._cut_english
        scores = {
            "bleu": bleu(tokenize(reference), tokenize(answer)),
            "chrf": chrf(reference, answer),
            "exact_match": float(_is_match(reference, answer)),
        }
        for tokenizer in (Tokenizer13a, TokenizerRegexp):  # else each would keep its last 65,536 texts
            tokenizer.__call__.cache_clear()
        return scores

    def _cut_english(self, text: str) -> list[str]:
        tokens: list[str] = self._english(text.rstrip()).split()
        return tokens

    def _cut_chinese(self, text: str) -> list[str]:
        """What sacrebleu's `zh` does, many times as fast: its patterns see one sign for a run of Chinese, not blanks around each character."""
        text = "\n".join(text.split())
        runs = iter(CHINESE_RUN.findall(text))
        tokens: list[str] = []
        for part in self._others(CHINESE_RUN.sub(f"\n{_RUN}\n", text)).split():
            tokens += next(runs) if part == _RUN else (part,)
        return tokens


def bleu(reference: list[str], answer: list[str]) -> float:
    """Sentence BLEU of two lists of tokens, 0–100."""
    correct = shared_ngrams(reference, answer, BLEU_ORDERS)
    total = [max(len(answer) - order, 0) for order in range(BLEU_ORDERS)]
    score = BLEU.compute_bleu(correct, total, len(answer), len(reference), smooth_method="exp", effective_order=True).score
    return min(100.0, score)  # of equal texts it is 100.00000000000004


def chrf(reference: str, answer: str) -> float:
    """chrF2 of two texts, 0–100."""
    reference, answer = "".join(reference.split()), "".join(answer.split())
    orders = min(CHRF_ORDERS, len(reference), len(answer))  # of longer ones one of the texts has none
    shared = shared_ngrams(reference, answer, orders) if orders else [0]
    if not any(shared):
        return 0.0
    precision = sum(count / (len(answer) - order) for order, count in enumerate(shared)) / orders
    recall = sum(count / (len(reference) - order) for order, count in enumerate(shared)) / orders
    return 100 * (1 + CHRF_BETA**2) * precision * recall / (CHRF_BETA**2 * precision + recall)


def _is_match(reference: str, answer: str) -> bool:
    """Whether two texts are equal in all that counts for an exact match; of a text of nothing but punctuation, all of it counts."""
    tokens = characters(reference)
    if tokens != characters(answer):
        return False
    return _signs(reference) == _signs(answer) if tokens else reference.strip() == answer.strip()


def _signs(text: str) -> list[str]:
    return _SIGNS.findall(nfkc(text))
