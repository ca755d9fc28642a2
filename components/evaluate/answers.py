"""What one model does, loaded once: its greedy answers to the held-out rows, the NLL of the reference answers, and the exam."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.common.chat import ChatFormat
from components.common.engine import Completion, Engine, Sampling
from components.common.errors import ModelError
from components.common.progress import progress
from components.evaluate.exam_sitting import Sitting
from components.evaluate.exams import ExamResult
from components.evaluate.held_out import HeldOutRow
from components.evaluate.nll import answer_nll


@dataclass(frozen=True)
class Answers:
    """One value per held-out row in each list, what the model did with the exam, and the seconds that it all took."""

    completions: list[Completion]
    texts: list[str]
    nll: list[float]
    timings: dict[str, float]
    exam: ExamResult | None = None


def answer_all(
    folder: Path,
    label: str,
    rows: Sequence[HeldOutRow],
    *,
    chat: ChatFormat,
    batch_size: int,
    max_new_tokens: int,
    sitting: Sitting | None = None,
) -> Answers:
    """Load a model, let it answer every row, score the references, let it sit the exam, and free its memory.

    Args:
        label: names the model in the progress lines.
        chat: the tuned model's format, for both models.
        sitting: the exam, if there is one.

    Raises:
        ModelError: the folder can't be loaded, or the model does not know the rows' tokens.
    """
    started = time.monotonic()
    longest_prompt, longest_answer = max(len(row.prompt_ids) for row in rows), max_new_tokens
    if sitting:
        longest_prompt = max(longest_prompt, sitting.longest_prompt_tokens)
        longest_answer = max(longest_answer, sitting.max_new_tokens)
    with Engine.load(
        folder, chat=chat, max_concurrency=batch_size, max_prompt_tokens=longest_prompt, max_new_tokens=longest_answer
    ) as engine:
        vocabulary = engine.model.get_input_embeddings().num_embeddings
        if max(max(row.ids) for row in rows) >= vocabulary:
            raise ModelError(
                f"the {label} model has {vocabulary} tokens in its vocabulary, and the tuned model's prompts have more",
                where=str(folder),
                fix="compare with the base model that was fine-tuned",
            )
        loaded = time.monotonic()
        with progress(f"{label} model: NLL of the references", len(rows)) as meter:
            examples = [(row.ids, row.is_answer) for row in rows]
            nll = answer_nll(engine.model, examples, pad_id=chat.pad_id, batch_size=batch_size, on_done=meter.advance)
        scored = time.monotonic()
        with progress(f"{label} model: answers", len(rows)) as meter:
            sampling = Sampling(max_new_tokens=max_new_tokens)
            completions = engine.generate([row.prompt_ids for row in rows], sampling, lambda _: meter.advance())
        answered = time.monotonic()
        texts = [engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True).strip() for completion in completions]
        exam = sitting.sit(engine, label) if sitting else None
        ended = time.monotonic()
    timings = {"load_s": loaded - started, "nll_s": scored - loaded, "answers_s": answered - scored, "exam_s": ended - answered}
    return Answers(completions, texts, nll, {name: round(value, 2) for name, value in timings.items()}, exam)
