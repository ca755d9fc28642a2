"""The one place where a prompt is made."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.common.chat import FILE_NAME, ChatFormat, Message, clean
from components.common.errors import DataError, ModelError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of_tokenizer(tokenizer)


def test_d01_the_last_label_is_the_end_of_turn_and_pad_is_not(tokenizer: Any, chat: ChatFormat, tiny_rows: list[dict[str, str]]) -> None:
    assert chat.pad_id not in chat.stop_ids
    for row in tiny_rows:
        ids, mask = chat.example(tokenizer, row["question"], row["answer"])
        assert ids[-1] == chat.end_of_turn_id and mask[-1]
        assert tokenizer.decode([token for token, used in zip(ids, mask, strict=True) if used][:-1]) == row["answer"]


def test_a_training_row_starts_with_the_prompt_that_will_be_served(tokenizer: Any, chat: ChatFormat) -> None:
    history = [Message("user", "你好"), Message("assistant", "您好。")]
    prompt = chat.prompt_ids(tokenizer, "什么是高血压？", history)
    ids, mask = chat.example(tokenizer, "什么是高血压？", "血压偏高。", history)
    assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)]) and all(mask[len(prompt) :])


def test_piecewise_tokens_equal_the_template_in_one_go(tokenizer: Any, chat: ChatFormat, tiny_rows: list[dict[str, str]]) -> None:
    for row in tiny_rows:
        messages = [{"role": "system", "content": chat.system_prompt}, {"role": "user", "content": row["question"]}]
        whole = tokenizer.apply_chat_template(
            messages, chat_template=chat.template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert chat.prompt_ids(tokenizer, row["question"]) == whole


def test_no_special_token_can_be_typed(tokenizer: Any, chat: ChatFormat) -> None:
    plain = chat.prompt_ids(tokenizer, "x")
    for token in tokenizer.get_added_vocab():
        ids = chat.prompt_ids(tokenizer, f"{token}system\n{token}", [Message("user", token), Message("assistant", token)])
        for special in tokenizer.all_special_ids:
            once_per_turn = 2 if special in plain else 0
            assert ids.count(special) <= plain.count(special) + once_per_turn * 2
        assert tokenizer.decode(ids).count(token) >= 4, "the text stays, as plain text"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_makes_a_prompt_with_the_same_frame(tokenizer: Any, chat: ChatFormat, text: str) -> None:
    frame = chat.prompt_ids(tokenizer, "")
    ids = chat.prompt_ids(tokenizer, text)
    specials = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in specials] == [i for i in frame if i in specials]
    assert tokenizer.decode(chat.prompt_ids(tokenizer, text)).count(clean(text)) >= 1


def test_lone_surrogates_and_placeholder_marks_do_no_harm(tokenizer: Any, chat: ChatFormat) -> None:
    assert chat.prompt_ids(tokenizer, "a\ud800b") == chat.prompt_ids(tokenizer, "ab")
    assert chat.prompt_ids(tokenizer, "a\ue0f00\ue0f1b") == chat.prompt_ids(tokenizer, "a0b")


def test_the_digest_travels_and_is_checked(chat: ChatFormat, tmp_path: Path) -> None:
    chat.save(tmp_path)
    assert ChatFormat.load(tmp_path) == chat
    stored = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps(stored | {"system_prompt": "another"}))
    with pytest.raises(ModelError, match="digest differs"):
        ChatFormat.load(tmp_path)
    (tmp_path / FILE_NAME).write_text("{}")
    with pytest.raises(ModelError, match="missing fields"):
        ChatFormat.load(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(DataError, match="missing"):
        ChatFormat.load(tmp_path)


def test_a_template_of_the_model_wins_and_one_without_turns_is_refused(tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = ChatFormat.of_tokenizer(own, "s")
    assert chat.end_of_turn_id == own.convert_tokens_to_ids("<|endoftext|>")
    assert own.decode(chat.prompt_ids(own, "q")) == "[system]s<|endoftext|>[user]q<|endoftext|>[assistant]"
    assert chat.pad_id not in chat.stop_ids


def test_it_is_safe_in_threads(tokenizer: Any, chat: ChatFormat) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = [random.Random(i).choice(["<|im_end|>", "高血压", "x"]) * (i % 5 + 1) for i in range(200)]
    alone = [chat.prompt_ids(tokenizer, text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda text: chat.prompt_ids(tokenizer, text), texts)) == alone
