"""The exam of an evaluation: which questions, asked how; the same for every model."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.chat import ChatFormat
from components.common.engine import Engine
from components.common.progress import progress
from components.evaluate.config import EvaluateSettings
from components.evaluate.exam_layouts import Exam, load_exam
from components.evaluate.exam_likelihood import letter_tokens
from components.evaluate.exams import ExamResult, longest_prompt_tokens, prompt_count, run_exam


@dataclass(frozen=True)
class Sitting:
    """An exam with the way it is asked.

    Attributes:
        available: questions of the exam before sampling.
        longest_prompt_tokens: what an engine must hold to ask every question.
        max_new_tokens: longest generated answer, tokens.
    """

    exam: Exam
    available: int
    chat: ChatFormat
    permutations: int
    seed: int
    longest_prompt_tokens: int
    max_new_tokens: int

    def sit(self, engine: Engine, label: str) -> ExamResult:
        """Let a model sit the exam; `label` names it in the progress lines."""
        how: dict[str, int] = {"permutations": self.permutations, "seed": self.seed}
        with progress(f"{label} model: exam", prompt_count(self.exam, **how)) as meter:
            return run_exam(engine, self.chat, self.exam, **how, max_new_tokens=self.max_new_tokens, on_done=meter.advance)


def prepare_sitting(settings: EvaluateSettings, tokenizer: Any, chat: ChatFormat) -> Sitting | None:
    """Read and check the exam before the first model is loaded; None without one.

    Raises:
        DataError: the exam is not usable. ModelError: the tokenizer has no token for each letter.
    """
    if not settings.exam_path:
        return None
    whole = load_exam(Path(settings.exam_path))
    exam = whole.sample(settings.exam_sample_size, settings.seed)
    letter_tokens(chat, tokenizer, string.ascii_uppercase[: max(len(question.options) for question in exam.questions)])
    how: dict[str, int] = {"permutations": settings.exam_permutations, "seed": settings.seed}
    longest = longest_prompt_tokens(exam, tokenizer, chat, **how)
    skipped = sum(map(len, whole.skipped.values()))
    print(
        f"exam: {len(exam.questions)} of {len(whole.questions)} questions ({exam.layout} layout), {prompt_count(exam, **how)} prompts; "
        f"{skipped} rows can't be scored",
        flush=True,
    )
    return Sitting(exam, len(whole.questions), chat, **how, longest_prompt_tokens=longest, max_new_tokens=settings.exam_max_new_tokens)
