"""The engine: what it generates, and how it fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.common.chat import ChatFormat
from components.common.engine import Completion, Engine, Sampling
from components.common.errors import ModelError, ServiceError
from tests.conftest import PROJECT

QUESTIONS = [
    "什么是高血压？",
    "糖尿病患者的饮食要注意什么，水果能不能吃，每天吃多少合适？",
    "What is asthma?",
    "感冒",
    "失眠怎么办？" * 12,
    "🤒 发烧 39 度",
    "Can I take ibuprofen with aspirin if I have a stomach ulcer?",
    "孩子咳嗽",
]
LIMITS = {"max_concurrency": 8, "max_prompt_tokens": 512, "max_new_tokens": 256}


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def engine(tiny_model: Path, chat: ChatFormat) -> Iterator[Engine]:
    with Engine.load(tiny_model, chat=chat, precision="fp32", **LIMITS) as engine:
        yield engine


@pytest.fixture
def own_engine(tiny_model: Path, chat: ChatFormat) -> Iterator[Engine]:
    """An engine that a test may break."""
    with Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=2, max_prompt_tokens=512, max_new_tokens=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(engine: Engine) -> list[list[int]]:
    return [engine.chat.prompt_ids(engine.tokenizer, question) for question in QUESTIONS]


def plain_generate(engine: Engine, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The same answer by the library's plain `generate`, one prompt alone, without the stop token."""
    ids = engine.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(engine.chat.stop_ids),
        pad_token_id=engine.chat.pad_id,
    )[0, len(prompt) :].tolist()
    return [token for token in ids if token not in engine.chat.stop_ids]


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def active(engine: Engine) -> int:
    scheduler = engine._manager.batch_processor.scheduler
    return len(scheduler.active_requests) + len(scheduler.waiting_requests)


def test_d15_batched_equals_single_token_by_token(engine: Engine, prompts: list[list[int]]) -> None:
    together = engine.generate(prompts, Sampling(48))
    alone = [engine.generate([prompt], Sampling(48))[0] for prompt in prompts]
    assert together == alone
    assert [completion.token_ids for completion in together] == [plain_generate(engine, prompt, 48) for prompt in prompts]


def test_d20_greedy_is_the_same_every_time(engine: Engine, prompts: list[list[int]]) -> None:
    assert engine.generate(prompts, Sampling(32)) == engine.generate(prompts, Sampling(32))


def test_a_greedy_answer_is_not_changed_by_sampled_neighbours(engine: Engine, prompts: list[list[int]]) -> None:
    expected = engine.generate([prompts[0]], Sampling(40))[0]
    neighbours = [engine.submit(prompt, Sampling(60, temperature=2.0, top_p=0.9)) for prompt in prompts[1:]]
    assert engine.submit(prompts[0], Sampling(40)).result(60) == expected
    for future in neighbours:
        future.result(60)


def test_each_request_has_its_own_sampling(engine: Engine, prompts: list[list[int]]) -> None:
    greedy = engine.generate([prompts[0]], Sampling(40))[0]
    assert engine.generate([prompts[0]], Sampling(40, temperature=1.5, top_k=1))[0] == greedy
    assert engine.generate([prompts[0]], Sampling(40, temperature=1.5, top_p=1e-9))[0] == greedy
    hot = engine.generate([prompts[0]] * 3, Sampling(40, temperature=1.5, top_k=0))
    assert len({tuple(completion.token_ids) for completion in [greedy, *hot]}) == 4, "top_k=0 must sample from the whole vocabulary"


def test_answers_end_at_the_stop_token_or_the_limit(engine: Engine, tiny_rows: list[dict[str, str]]) -> None:
    prompts = [engine.chat.prompt_ids(engine.tokenizer, row["question"]) for row in tiny_rows]
    completions = engine.generate(prompts, Sampling(128))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert not set(completion.token_ids) & set(engine.chat.stop_ids)
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 128)


def test_more_prompts_than_fit_keep_their_order(own_engine: Engine, tiny_rows: list[dict[str, str]]) -> None:
    prompts = [own_engine.chat.prompt_ids(own_engine.tokenizer, row["question"]) for row in tiny_rows]
    done: list[Completion] = []
    completions = own_engine.generate(prompts, Sampling(16), on_done=done.append)
    assert [completion.token_ids for completion in completions] == [plain_generate(own_engine, prompt, 16) for prompt in prompts]
    assert sorted(map(str, done)) == sorted(map(str, completions))


def test_the_cache_holds_the_largest_requests_again_and_again(own_engine: Engine) -> None:
    """Prompts and answers of the full length, all different, so that cached prefixes fill the cache and must be evicted."""
    prompts = [[5 + (start * 37 + i * 11) % 1500 for i in range(512)] for start in range(8)]
    completions = own_engine.generate(prompts, Sampling(256, temperature=2.0))
    assert len(completions) == 8
    assert own_engine.healthy


def test_tokens_arrive_one_by_one(engine: Engine, prompts: list[list[int]]) -> None:
    seen: list[int] = []
    completion = engine.submit(prompts[0], Sampling(24), on_token=seen.append).result(60)
    assert seen == completion.token_ids


def test_a_failing_callback_fails_its_request_only(engine: Engine, prompts: list[list[int]]) -> None:
    def explode(_: int) -> None:
        raise RuntimeError("callback")

    bad = engine.submit(prompts[0], Sampling(24), on_token=explode)
    good = engine.submit(prompts[1], Sampling(24))
    with pytest.raises(RuntimeError, match="callback"):
        bad.result(60)
    assert good.result(60).token_ids
    wait_until(lambda: active(engine) == 0)


def test_d41_cancel_stops_within_one_step(engine: Engine, prompts: list[list[int]]) -> None:
    seen: list[int] = []
    future = engine.submit(prompts[0], Sampling(256, temperature=2.0), on_token=seen.append)
    other = engine.submit(prompts[1], Sampling(64))
    wait_until(lambda: len(seen) >= 5)
    engine.cancel(future)
    completion = future.result(0)
    assert completion.finish_reason == "cancelled"
    assert 5 <= len(completion.token_ids) < 256
    assert other.result(60).token_ids == plain_generate(engine, prompts[1], 64)
    wait_until(lambda: active(engine) == 0)
    steps = engine._manager.current_batch
    time.sleep(0.3)
    assert engine._manager.current_batch == steps, "the engine still computes for a request that was cancelled"
    engine.cancel(future)
    assert future.result() == completion, "cancelling again changes nothing"


def test_a_request_can_be_cancelled_before_it_starts(own_engine: Engine, prompts: list[list[int]]) -> None:
    running = [own_engine.submit(prompts[0], Sampling(200, temperature=2.0)) for _ in range(2)]
    waiting = own_engine.submit(prompts[1], Sampling(8))
    own_engine.cancel(waiting)
    assert waiting.result(0) == Completion([], "cancelled")
    for future in running:
        own_engine.cancel(future)
    wait_until(lambda: active(own_engine) == 0)


def test_what_does_not_fit_is_refused_and_harms_nobody(engine: Engine, prompts: list[list[int]]) -> None:
    for prompt, sampling in (
        ([5] * 513, Sampling(8)),
        ([], Sampling(8)),
        (prompts[0], Sampling(257)),
        (prompts[0], Sampling(0)),
        (prompts[0], Sampling(8, temperature=float("nan"))),
        (prompts[0], Sampling(8, temperature=-1)),
        (prompts[0], Sampling(8, temperature=1, top_p=0)),
        (prompts[0], Sampling(8, temperature=1, top_k=-1)),
    ):
        with pytest.raises(ServiceError):
            engine.submit(prompt, sampling)
    assert engine.healthy
    assert engine.generate([prompts[0]], Sampling(8))[0].token_ids


def test_d42_a_dead_engine_is_noticed_and_fails_every_request(own_engine: Engine, prompts: list[list[int]]) -> None:
    futures = [own_engine.submit(prompt, Sampling(256, temperature=2.0)) for prompt in prompts[:4]]

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("device lost")

    own_engine.model.forward = broken
    for future in futures:
        with pytest.raises(ServiceError):
            future.result(10)
    wait_until(lambda: not own_engine.healthy)
    with pytest.raises(ServiceError):
        own_engine.submit(prompts[0], Sampling(8))


def test_d42_a_hung_engine_is_noticed(own_engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.common.engine.STALL_S", 0.5)
    forward = own_engine.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2)
        return forward(*args, **kwargs)

    own_engine.model.forward = slow
    future = own_engine.submit(prompts[0], Sampling(2))
    wait_until(lambda: not own_engine.healthy)
    own_engine.model.forward = forward
    future.result(30)
    assert own_engine.healthy


def test_close_ends_every_request_and_frees_the_model(tiny_model: Path, chat: ChatFormat, prompts: list[list[int]]) -> None:
    engine = Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=2, max_prompt_tokens=512, max_new_tokens=256)
    futures = [engine.submit(prompt, Sampling(256, temperature=2.0)) for prompt in prompts[:4]]
    engine.close()
    for future in futures:
        with pytest.raises(ServiceError):
            future.result(0)
    assert not engine.healthy
    assert engine.model is None
    engine.close()
    with pytest.raises(ServiceError):
        engine.submit(prompts[0], Sampling(8))


def test_choices_are_printed_with_their_reasons(tiny_model: Path, chat: ChatFormat, capsys: pytest.CaptureFixture[str]) -> None:
    with Engine.load(tiny_model, chat=chat, max_concurrency=2, max_prompt_tokens=2048, max_new_tokens=256) as engine:
        assert engine.max_prompt_tokens == 1024 - 256
    printed = capsys.readouterr().out
    assert "precision: " in printed
    assert "natively" in printed or "no native bf16" in printed
    assert "at most 768 tokens (the model's context holds 1024" in printed
    assert "GB for 2 requests of 768 + 256 tokens" in printed


def test_a_cache_larger_than_the_memory_is_refused(tiny_model: Path, chat: ChatFormat) -> None:
    with pytest.raises(ServiceError, match="memory is too small") as caught:
        Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=500_000, max_prompt_tokens=768, max_new_tokens=256)
    assert "max_concurrency" in caught.value.fix


@pytest.mark.parametrize("damage", ["cut", "missing tensor", "no weights", "no tokenizer"])
def test_a_damaged_model_is_refused(damage: str, tiny_model: Path, chat: ChatFormat, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "no weights":
        weights.unlink()
    else:
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError) as caught:
        Engine.load(folder, chat=chat, precision="fp32", **LIMITS)
    assert str(folder) in caught.value.where
    assert caught.value.fix


def test_a_program_that_fails_with_a_running_engine_still_ends(tiny_model: Path) -> None:
    """The library's generation thread is no daemon: without our watch the process would never end."""
    program = f"""
from pathlib import Path
from transformers import AutoTokenizer
from components.common.chat import ChatFormat
from components.common.engine import Engine, Sampling
folder = Path({str(tiny_model)!r})
engine = Engine.load(folder, chat=ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(folder)), precision="fp32",
                     max_concurrency=2, max_prompt_tokens=64, max_new_tokens=64)
engine.submit([5, 6, 7], Sampling(64, temperature=2.0))
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr


def test_a_device_too_small_for_the_model_is_told(tiny_model: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 14 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(ServiceError, match="14 GiB"):
        Engine.load(tiny_model, chat=chat, precision="fp32", **LIMITS)
