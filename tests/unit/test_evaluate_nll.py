"""The NLL of reference answers: equal to the model's own loss, whatever the batch, without whole logits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from components.common.chat import ChatFormat
from components.evaluate import nll
from components.evaluate.nll import answer_nll
from tests.conftest import PROJECT

Examples = list[tuple[list[int], list[bool]]]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> Examples:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = ChatFormat.of_tokenizer(tokenizer)
    return [chat.example(tokenizer, row["question"], row["answer"]) for row in tiny_rows[:9]]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(nll, "HEAD_TOKENS", 7)
    yield 7


def own_loss(model: Any, ids: list[int], mask: list[bool]) -> float:
    """The plain twin: the library's own loss, from whole logits."""
    labels = [token if answer else -100 for token, answer in zip(ids, mask, strict=True)]
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.usefixtures("small_chunks")
def test_it_equals_the_models_own_loss_in_every_batch(model: Any, examples: Examples, batch_size: int) -> None:
    expected = [own_loss(model, *example) for example in examples]
    assert answer_nll(model, examples, pad_id=0, batch_size=batch_size) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("small_chunks")
def test_soft_capped_logits_are_capped() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    model.model.embed_tokens.weight.data.mul_(20)
    example = ([5, 6, 7, 8, 9, 10], [False, False, True, True, True, True])
    expected = own_loss(model, *example)
    assert answer_nll(model, [example], pad_id=0, batch_size=1) == pytest.approx([expected], abs=1e-4)
    model.config.final_logit_softcapping = None
    assert own_loss(model, *example) != pytest.approx(expected, abs=0.05)  # so the test can fail


def test_prompt_tokens_do_not_count_and_the_end_of_turn_does(model: Any, examples: Examples) -> None:
    ids, mask = examples[0]
    assert mask[-1] and not mask[0]
    (with_end,) = answer_nll(model, [(ids, mask)], pad_id=0, batch_size=1)
    (without_end,) = answer_nll(model, [(ids[:-1], mask[:-1])], pad_id=0, batch_size=1)
    assert with_end != pytest.approx(without_end, abs=1e-6)


def test_progress_counts_every_row(model: Any, examples: Examples) -> None:
    done: list[int] = []
    answer_nll(model, examples, pad_id=0, batch_size=4, on_done=done.append)
    assert done == [4, 4, 1]


@pytest.mark.usefixtures("small_chunks")
def test_d09_the_head_never_sees_more_than_a_chunk(model: Any, examples: Examples) -> None:
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    try:
        answer_nll(model, examples, pad_id=0, batch_size=8)
    finally:
        hook.remove()
    assert max(seen) == 7
    assert sum(seen) == sum(sum(mask) for _, mask in examples)  # answer positions only


# Whole logits of one batch would be 8 × 400 × 262,144 × 4 bytes = 3.4 GB.
_FLAT = """
import resource, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from components.evaluate.nll import answer_nll
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=262144, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)).eval()
def peak_mb(rows):
    answer_nll(model, [(list(range(400)), [False] * 380 + [True] * 20)] * rows, pad_id=0, batch_size=8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(before, peak_mb(8), peak_mb(32))
"""


def test_d09_memory_is_flat_over_batches() -> None:
    result = subprocess.run([sys.executable, "-c", _FLAT], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=True)
    before, one_batch, four_batches = map(float, result.stdout.split())
    print(f"peak: {before:.0f} MB before, {one_batch:.0f} MB after one batch, {four_batches:.0f} MB after four more")
    assert one_batch - before < 800
    assert four_batches - one_batch < 100
