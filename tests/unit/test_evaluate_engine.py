"""Answers through the engine do not depend on what else is in the batch, or on the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from components.common.chat import ChatFormat
from components.common.engine import Engine, Sampling
from components.common.errors import ModelError
from components.evaluate.answers import answer_all
from components.evaluate.held_out import HeldOutRow

QUESTIONS = (
    "头痛",
    "什么是高血压？",
    "What is asthma?",
    "突然胸口压榨样疼痛、出冷汗，该怎么办？" * 30,
    "失眠",
    "感冒🤧了怎么办",
    "a",
    "糖尿病患者能不能吃水果？" * 3,
)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def prompts(tiny_model: Path, chat: ChatFormat) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [chat.prompt_ids(tokenizer, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def engine(tiny_model: Path, chat: ChatFormat, prompts: list[list[int]]) -> Iterator[Engine]:
    longest = max(map(len, prompts))
    with Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=8, max_prompt_tokens=longest, max_new_tokens=48) as engine:
        yield engine


def test_d15_a_batch_of_8_answers_as_8_batches_of_1(engine: Engine, prompts: list[list[int]]) -> None:
    lengths = {len(prompt) for prompt in prompts}
    assert max(lengths) > 3 * min(lengths)  # mixed, or padding mistakes would not show
    sampling = Sampling(max_new_tokens=48)
    together = engine.generate(prompts, sampling)
    alone = [engine.generate([prompt], sampling)[0] for prompt in prompts]
    assert together == alone
    assert len({tuple(completion.token_ids) for completion in together}) > 4  # so different answers were compared


def test_d20_greedy_is_the_default_and_repeats(engine: Engine, prompts: list[list[int]]) -> None:
    assert Sampling(max_new_tokens=1).temperature == 0
    sampling = Sampling(max_new_tokens=48)
    assert engine.generate(prompts, sampling) == engine.generate(prompts, sampling)


def test_each_row_gets_its_answer_its_end_and_its_nll(tiny_model: Path, chat: ChatFormat, tiny_rows: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    known = [(row["question"], row["answer"]) for row in tiny_rows[::2][:3]]  # the tiny model was trained on these
    pairs = [*known, ("头痛", "wrong language and nonsense")]
    rows = [HeldOutRow(line, *pair, (), *chat.example(tokenizer, *pair)) for line, pair in enumerate(pairs, 1)]
    answers = answer_all(tiny_model, "tiny", rows, chat=chat, batch_size=2, max_new_tokens=300)
    assert max(answers.nll[:3]) < answers.nll[3]
    for completion, text in zip(answers.completions, answers.texts, strict=True):
        assert completion.finish_reason == ("stop" if len(completion.token_ids) < 300 else "length")
        assert text and "<|im_end|>" not in text
    assert "stop" in {completion.finish_reason for completion in answers.completions}

    short = answer_all(tiny_model, "tiny", rows, chat=chat, batch_size=2, max_new_tokens=3)
    assert {(completion.finish_reason, len(completion.token_ids)) for completion in short.completions} == {("length", 3)}


def test_a_base_with_another_vocabulary_is_refused(tiny_model: Path, chat: ChatFormat) -> None:
    row = HeldOutRow(1, "q", "a", (), [1, 2, 10**6, 3], [False, False, False, True])
    with pytest.raises(ModelError, match="vocabulary"):
        answer_all(tiny_model, "base", [row], chat=chat, batch_size=1, max_new_tokens=3)
