"""What one model does with the held-out rows: its greedy answers, and the NLL of the reference answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.common.chat import ChatFormat
from components.common.engine import Completion, Engine, Sampling
from components.common.errors import ModelError
from components.common.progress import progress
from components.evaluate.held_out import HeldOutRow
from components.evaluate.nll import answer_nll


@dataclass(frozen=True)
class Answers:
    """One value per held-out row in each list, and the seconds that they took."""

    completions: list[Completion]
    texts: list[str]
    nll: list[float]
    timings: dict[str, float]


def answer_all(folder: Path, label: str, rows: Sequence[HeldOutRow], *, chat: ChatFormat, batch_size: int, max_new_tokens: int) -> Answers:
    """Load a model, let it answer every row, score the references, and free its memory.

    Args:
        label: names the model in the progress lines.
        chat: the tuned model's format, for both models.

    Raises:
        ModelError: the folder can't be loaded, or the model does not know the rows' tokens.
    """
    started = time.monotonic()
    longest_prompt = max(len(row.prompt_ids) for row in rows)
    engine = Engine.load(folder, chat=chat, max_concurrency=batch_size, max_prompt_tokens=longest_prompt, max_new_tokens=max_new_tokens)
    with engine:
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
    timings = {"load_s": loaded - started, "nll_s": scored - loaded, "answers_s": answered - scored}
    return Answers(completions, texts, nll, {name: round(value, 2) for name, value in timings.items()})
