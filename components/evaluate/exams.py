"""One model sits a multiple-choice exam, in two ways that are both reported: the likeliest letter, and the letter that it writes.

Every question is asked in several orders of its options: the written one and others from its cyclic rotations, drawn by a seed, so that a
model that likes a position gains nothing (CircularEval, Liu et al., "MMBench", 2023). Options that speak of other options ("A和B", "all of
the above") would change their meaning: such a question is asked in its written order only, and counted.

Whatever cannot be read, is empty or does not fit the model's context is wrong. Nothing is left out of a denominator.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from components.common.chat import ChatFormat
from components.common.engine import Engine, Sampling
from components.common.files import sha256_text
from components.evaluate.degeneration import chinese_share
from components.evaluate.exam_layouts import Exam, Question
from components.evaluate.exam_letters import Reading, extract_letters
from components.evaluate.exam_likelihood import letter_tokens, next_log_likelihoods

Way = Literal["likelihood", "generated"]
WAYS: tuple[Way, ...] = ("likelihood", "generated")
SLICE = 512  # prompts tokenised at one time: bounds the memory of a long exam
_INSTRUCTIONS = {
    ("chinese", False): "以下是一道单项选择题，只有一个正确答案。请只回答正确选项的字母。",
    ("chinese", True): "以下是一道多项选择题，正确答案可能不止一个。请只回答全部正确选项的字母。",
    ("english", False): "This is a multiple-choice question with one right answer. Reply with the letter of the right option only.",
    (
        "english",
        True,
    ): "This is a multiple-choice question; more than one option may be right. Reply with the letters of all right options only.",
}
PROMPT_DIGEST = sha256_text("".join(_INSTRUCTIONS.values()))
_REFERS = re.compile(
    r"(?:以上|上述)(?:都|均|皆|全|所有|选项|各项|答案|[两三四]项)|(?i:\b(?:all|none|any|both)\s+(?:of\s+)?(?:the\s+)?(?:above|these)\b)"
    r"|选项\s*[A-J]|[A-J]项|(?<![A-Za-z])[A-J]\s*(?:[和与及或、,，+＋&/]|\band\b|\bor\b)\s*[A-J](?![A-Za-z])"
)


@dataclass(frozen=True)
class Asked:
    """One question in one order of its options. All letters are those of the written order, so that the right one never changes.

    Attributes:
        shift: the options were printed from this position of the written order on; 0 is the written order.
        log_likelihoods: of each letter, nats; None where several answers may be right, or the prompt does not fit.
        likeliest: the letter of the highest log-likelihood; empty where there is none.
        answer: what the model wrote.
        stated: the letters that it states; empty when they can't be read.
        reading: how the answer was read.
    """

    shift: int
    log_likelihoods: dict[str, float] | None
    likeliest: str
    answer: str
    stated: str
    reading: Reading | Literal["too_long"]


@dataclass(frozen=True)
class QuestionResult:
    """One question with all that was asked; `letters` are those of its options, `gold` the right ones."""

    name: str
    subject: str
    letters: str
    gold: str
    several: bool
    asked: list[Asked]

    def rights(self, way: Way) -> list[bool] | None:
        """Right or wrong in each order, the written one first; None where this way of scoring is not defined."""
        if way == "generated":
            return [one.stated == self.gold for one in self.asked]
        return None if self.several else [one.likeliest == self.gold for one in self.asked]


@dataclass(frozen=True)
class ExamResult:
    """What one model did with an exam.

    Attributes:
        digest: sha256 of the questions, to tell one exam from another.
        skipped: rows that can't be scored, by reason.
    """

    layout: str
    digest: str
    skipped: dict[str, int]
    questions: list[QuestionResult]

    def as_dict(self) -> dict[str, Any]:
        """The whole record, ready for JSON."""
        rows = [asdict(question) | {f"right_by_{way}": question.rights(way) for way in WAYS} for question in self.questions]
        return {"layout": self.layout, "digest": self.digest, "prompt_digest": PROMPT_DIGEST, "skipped": self.skipped, "questions": rows}


def shifts(question: Question, permutations: int, seed: int) -> list[int]:
    """The rotations in which a question is asked: 0, the written order, then others drawn by the seed; as many as there are, at most."""
    count = len(question.options)
    if any(_REFERS.search(option) for option in question.options.values()):
        return [0]
    others = random.Random(f"{seed} {question.text}").sample(range(1, count), min(permutations, count) - 1)
    return [0, *others]


def printed(question: Question, shift: int) -> dict[str, str]:
    """The written letter of each printed letter: {"A": "C", "B": "D", "C": "A", "D": "B"} for a shift of 2."""
    letters = list(question.options)
    return dict(zip(string.ascii_uppercase, letters[shift:] + letters[:shift], strict=False))


def prompt_text(question: Question, shift: int) -> str:
    """The user's turn that asks a question with its options rotated, in the question's own language."""
    options = "\n".join(f"{letter}. {question.options[written]}" for letter, written in printed(question, shift).items())
    language = "chinese" if (chinese_share(question.text + options) or 0) >= 0.5 else "english"
    return f"{_INSTRUCTIONS[language, question.several]}\n\n{question.text}\n\n{options}"


def prompt_count(exam: Exam, permutations: int, seed: int) -> int:
    """How many prompts an exam has, all orders counted: the total of a progress bar."""
    return sum(len(shifts(question, permutations, seed)) for question in exam.questions)


def longest_prompt_tokens(exam: Exam, tokenizer: Any, chat: ChatFormat, *, permutations: int, seed: int) -> int:
    """Length of the longest prompt, tokens: what an engine must hold to ask every question."""
    prompts = _prompts(exam, permutations, seed)
    return max(len(chat.prompt_ids(tokenizer, prompt_text(question, shift))) for question, shift in prompts)


def run_exam(
    engine: Engine,
    chat: ChatFormat,
    exam: Exam,
    *,
    permutations: int,
    seed: int,
    max_new_tokens: int,
    on_done: Callable[[int], None] | None = None,
) -> ExamResult:
    """Ask every question in every order, by likelihood and by greedy generation.

    Args:
        permutations: orders for each question, at most; 1: the written order only.
        max_new_tokens: longest generated answer, tokens.
        on_done: called with the number of finished prompts, `prompt_count` in all.

    Raises:
        ModelError: the tokenizer has no token for each letter. ServiceError: the engine fails.
    """
    most = max(len(question.options) for question in exam.questions)
    tokens = letter_tokens(chat, engine.tokenizer, string.ascii_uppercase[:most])
    asked: dict[str, list[Asked]] = {question.name: [] for question in exam.questions}
    prompts = _prompts(exam, permutations, seed)
    while block := list(islice(prompts, SLICE)):
        for (question, _), one in zip(block, _ask(engine, chat, block, tokens, max_new_tokens, on_done), strict=True):
            asked[question.name].append(one)
    results = [
        QuestionResult(question.name, question.subject, "".join(question.options), question.answer, question.several, asked[question.name])
        for question in exam.questions
    ]
    digest = sha256_text(repr([(question.text, question.options, question.answer) for question in exam.questions]))
    return ExamResult(exam.layout, digest, {reason: len(names) for reason, names in exam.skipped.items()}, results)


def _prompts(exam: Exam, permutations: int, seed: int) -> Iterator[tuple[Question, int]]:
    for question in exam.questions:
        for shift in shifts(question, permutations, seed):
            yield question, shift


def _ask(
    engine: Engine,
    chat: ChatFormat,
    block: Sequence[tuple[Question, int]],
    tokens: Sequence[int],
    max_new_tokens: int,
    on_done: Callable[[int], None] | None,
) -> list[Asked]:
    """Ask a block of prompts in both ways."""
    report = on_done or (lambda count: None)
    ids = [chat.prompt_ids(engine.tokenizer, prompt_text(question, shift)) for question, shift in block]
    fitting = [index for index, prompt in enumerate(ids) if len(prompt) <= engine.max_prompt_tokens]
    single = [index for index in fitting if not block[index][0].several]
    scores = next_log_likelihoods(
        engine.model, [ids[index] for index in single], tokens, pad_id=chat.pad_id, batch_size=engine.max_concurrency
    )
    likelihoods = dict(zip(single, scores, strict=True))
    report(len(ids) - len(fitting))
    completions = engine.generate([ids[index] for index in fitting], Sampling(max_new_tokens=max_new_tokens), lambda _: report(1))
    answers = {
        index: engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip()
        for index, completion in zip(fitting, completions, strict=True)
    }
    return [_asked(*block[index], likelihoods.get(index), answers.get(index)) for index in range(len(block))]


def _asked(question: Question, shift: int, scores: list[float] | None, answer: str | None) -> Asked:
    """Read one answer, and turn printed letters into written ones."""
    written = printed(question, shift)
    log_likelihoods, likeliest = None, ""
    if scores is not None:
        log_likelihoods = {letter: round(score, 6) for letter, score in zip(written.values(), scores, strict=False)}
        likeliest = max(log_likelihoods, key=log_likelihoods.__getitem__)  # the first printed one of equals
    if answer is None:
        return Asked(shift, None, "", "", "", "too_long")
    options = {letter: question.options[original] for letter, original in written.items()}
    letters, reading = extract_letters(answer, options, several=question.several)
    stated = "".join(sorted(written[letter] for letter in letters))
    return Asked(shift, log_likelihoods, likeliest, answer, stated, reading)
