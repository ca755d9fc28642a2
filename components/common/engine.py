"""Generate answers to many prompts at once: transformers' continuous batching behind a small interface.

Evaluation and the service use the same engine, so what was measured is what answers. A request joins the running batch at the next
step and leaves it when it ends; nobody waits for the longest answer. The guards around the library are those it lacks in 5.23: a
bounded cache, requests checked before they enter, an end for cancelled requests, and a dead or hung generation thread that is noticed.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from components.common.chat import ChatFormat
from components.common.device import Precision, choose_compute
from components.common.errors import ModelError, ServiceError
from components.common.loading import check_scores, load_causal_lm, return_memory

PAGE_TOKENS = 32
STEP_TOKENS = {"cpu": 256, "cuda": 2048}  # prompt tokens taken in one step: larger is faster, smaller lets others answer meanwhile
CACHE_RESERVE = 0.15  # the library admits no new request while less of the cache is free (FIFOScheduler's safety margin)
POLL_S = 0.2
STALL_S = 120.0  # without a finished step for so long, the generation thread counts as hung
STOP_S = 30.0


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen.

    Attributes:
        temperature: 0 is greedy: always the most likely token.
        top_k: sample among so many of the most likely tokens; 0: the whole vocabulary.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Completion:
    """An answer's tokens, without the stop token, and why it ended."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length", "cancelled"]


@dataclass
class _Request:
    future: Future[Completion]
    on_token: Callable[[int], None] | None
    token_ids: list[int] = field(default_factory=list)


class Engine:
    """A model that answers up to `max_concurrency` prompts side by side; more wait inside, in order.

    Use `load`, then `submit` or `generate`, then `close` (or a `with` block).
    """

    def __init__(
        self, model: Any, tokenizer: Any, chat: ChatFormat, *, max_concurrency: int, max_prompt_tokens: int, max_new_tokens: int
    ) -> None:
        """Start generating with a loaded model; `load` is the usual way in."""
        self.model, self.tokenizer, self.chat, self.device = model, tokenizer, chat, model.device
        self.max_concurrency, self.max_prompt_tokens, self.max_new_tokens = max_concurrency, max_prompt_tokens, max_new_tokens
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}
        self._ids: dict[Future[Completion], str] = {}
        self._counter = itertools.count()
        self._closed = False
        self._last_step, self._last_progress = -1, time.monotonic()
        self._manager = self._start_manager()
        self._delivery = threading.Thread(target=self._deliver_outputs, name="engine-outputs", daemon=True)
        self._delivery.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        chat: ChatFormat,
        precision: Precision = "auto",
        max_concurrency: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
    ) -> Self:
        """Load a model folder and start generating.

        Args:
            folder: a Hugging Face folder with safetensors.
            chat: the format that made the model's training rows; its stop tokens end an answer.
            max_prompt_tokens: longest prompt; cut, with a word about it, where the model's context is shorter.
            max_new_tokens: longest answer.

        Raises:
            ModelError: the folder can't be loaded, misses weights, or its weights are broken. ServiceError: the memory is too small for the cache.
        """
        compute = choose_compute(precision)
        print(compute.reason, flush=True)
        model, tokenizer = load_causal_lm(folder, compute)
        check_scores(model, [chat.end_of_turn_id, chat.pad_id], folder)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if max_prompt_tokens + max_new_tokens > context:
            max_prompt_tokens = int(context) - max_new_tokens
            if max_prompt_tokens < 1:
                raise ModelError(
                    f"the model's context of {context} tokens is too short for answers of {max_new_tokens}",
                    where=str(folder),
                    fix="lower max_new_tokens",
                )
            print(f"prompts: at most {max_prompt_tokens} tokens (the model's context holds {context}, the answer included)", flush=True)
        return cls(
            model,
            tokenizer,
            chat,
            max_concurrency=max_concurrency,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
        )

    @property
    def healthy(self) -> bool:
        """False once the generation thread has died, hangs, or was closed."""
        stalled = bool(self._requests) and time.monotonic() - self._last_progress > STALL_S
        return not self._closed and self._manager.is_running() and not stalled

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling, on_token: Callable[[int], None] | None = None) -> Future[Completion]:
        """Queue one prompt.

        Args:
            on_token: called with each token of the answer, from the engine's delivery thread; must not block.

        Returns:
            A future that always ends: with a `Completion`, or with a ServiceError when the engine fails.

        Raises:
            ServiceError: the request does not fit the engine's limits, or the engine is dead.
        """
        self._check(prompt_ids, sampling)
        name = f"r{next(self._counter)}"
        request = _Request(Future(), on_token)
        request.future.set_running_or_notify_cancel()  # so that only `cancel` below ends it early
        with self._lock:
            if not self._requests:
                self._last_progress = time.monotonic()
            self._requests[name] = request
            self._ids[request.future] = name
        chosen = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": int(sampling.top_k)}
        # Streaming, because a cancelled request otherwise loses the tokens it has: the library never reports its end.
        accepted = self._manager.add_request(
            list(prompt_ids),
            request_id=name,
            max_new_tokens=sampling.max_new_tokens,
            streaming=True,
            eos_token_id=list(self.chat.stop_ids),
            **(chosen if sampling.temperature > 0 else {}),
        )
        if accepted is None or not self._manager.is_running():
            self._end(name, ServiceError("the generation engine has stopped", fix="restart the service"))
        return request.future

    def cancel(self, future: Future[Completion]) -> None:
        """Stop a request within one step; its future ends at once with the tokens so far. A finished one stays as it is."""
        with self._lock:
            name = self._ids.get(future)
            request = self._requests.get(name) if name else None
        if name and request:
            self._manager.cancel_request(name)
            self._end(name, Completion(list(request.token_ids), "cancelled"))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, on_done: Callable[[Completion], None] | None = None
    ) -> list[Completion]:
        """Answer all prompts and wait; results are in the order of the prompts.

        Args:
            on_done: called in this thread for each answer as it ends, in any order: for a progress bar.
        """
        for prompt in prompts:
            self._check(prompt, sampling)
        futures = [self.submit(prompt, sampling) for prompt in prompts]
        try:
            for future in as_completed(futures):
                completion = future.result()
                if on_done:
                    on_done(completion)
        except BaseException:
            for future in futures:
                self.cancel(future)
            raise
        return [future.result() for future in futures]

    def close(self) -> None:
        """Stop generating and free model and cache; unfinished requests fail with a ServiceError. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._manager.stop(block=True, timeout=STOP_S, hard_stop=True)
        self._manager.destroy()
        self._delivery.join(STOP_S)
        self._fail_all("the generation engine was closed")
        self.model = self._manager = None  # weights and cache go, even if somebody still holds this engine
        return_memory(self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_manager(self) -> Any:
        import torch
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        from components.common.sampling import Sampler

        pages = math.ceil((self.max_prompt_tokens + self.max_new_tokens) / PAGE_TOKENS) + 1
        blocks = math.ceil(self.max_concurrency * pages / (1 - CACHE_RESERVE)) + 8
        step_tokens = max(STEP_TOKENS.get(self.device.type, STEP_TOKENS["cpu"]), self.max_concurrency)
        manager = self.model.init_continuous_batching(
            # Greedy, so that the arg max of the sampler's scores is the next token; see `sampling`.
            generation_config=GenerationConfig(do_sample=False, eos_token_id=list(self.chat.stop_ids), pad_token_id=self.chat.pad_id),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=blocks,
                max_batch_tokens=step_tokens,
                max_requests_per_batch=self.max_concurrency,
                safety_margin=CACHE_RESERVE,
                # A captured graph would replay one step's sampling settings for all; without graphs, batches can't overlap either.
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        manager.logit_processor = Sampler(self.device).as_list()
        try:
            manager.warmup()  # makes the cache now: in its own thread a failure would only be logged
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ServiceError(
                f"the memory is too small for {self.max_concurrency} answers side by side: {error}",
                fix="lower max_concurrency, max_prompt_tokens or max_new_tokens",
            ) from None
        size_bytes = manager.batch_processor.cache.cache_tensor.nbytes
        print(
            f"cache: {size_bytes / 1e9:.2f} GB for {self.max_concurrency} requests of {self.max_prompt_tokens} + {self.max_new_tokens} "
            f"tokens, {CACHE_RESERVE:.0%} in reserve; {step_tokens} tokens in one step",
            flush=True,
        )
        manager.start()
        return manager

    def _check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Refuse what would kill the generation thread, or every request in the batch."""
        if not self.healthy:
            raise ServiceError("the generation engine has stopped", fix="restart the service")
        if not 1 <= len(prompt_ids) <= self.max_prompt_tokens:
            raise ServiceError(
                f"a prompt of {len(prompt_ids)} tokens, and 1 to {self.max_prompt_tokens} are possible",
                fix="shorten the prompt, or raise max_prompt_tokens",
            )
        if not 1 <= sampling.max_new_tokens <= self.max_new_tokens:
            raise ServiceError(
                f"an answer of {sampling.max_new_tokens} tokens was asked for, and 1 to {self.max_new_tokens} are possible",
                fix="ask for a shorter answer, or raise max_new_tokens",
            )
        if not (0 <= sampling.temperature < math.inf and 0 < sampling.top_p <= 1 and sampling.top_k >= 0):
            raise ServiceError(f"these sampling settings are out of range: {sampling}", fix="temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0")

    def _deliver_outputs(self) -> None:
        """The delivery thread: route every output to its request until the generation thread ends."""
        manager = self._manager
        while True:
            output = manager.get_result(timeout=POLL_S)
            step = getattr(manager, "current_batch", 0)
            if output is not None or step != self._last_step:
                self._last_step, self._last_progress = step, time.monotonic()
            if output is not None:
                self._take(output)
            elif not manager.is_running():
                self._fail_all("the generation engine has stopped")
                return
            elif not threading.main_thread().is_alive():  # the library's thread is no daemon: it would keep the process alive
                manager.stop(block=False, hard_stop=True)

    def _take(self, output: Any) -> None:
        request = self._requests.get(output.request_id)
        if request is None:  # cancelled meanwhile
            return
        if output.error is not None:
            self._end(output.request_id, ServiceError(f"generation failed: {output.error}", fix="see the service's log"))
            return
        stopped = bool(output.generated_tokens) and output.generated_tokens[-1] in self.chat.stop_ids
        token_ids = output.generated_tokens[:-1] if stopped else output.generated_tokens
        fresh = token_ids[len(request.token_ids) :]
        request.token_ids.extend(fresh)
        try:
            for token_id in fresh if request.on_token else ():
                request.on_token(token_id)  # type: ignore[misc]
        except Exception as error:
            self._manager.cancel_request(output.request_id)
            self._end(output.request_id, error)
            return
        if output.is_finished():
            self._end(output.request_id, Completion(list(token_ids), "stop" if stopped else "length"))

    def _end(self, name: str, outcome: Completion | Exception) -> None:
        with self._lock:
            request = self._requests.pop(name, None)
            if request is None:  # ended by somebody else first
                return
            del self._ids[request.future]
        if isinstance(outcome, Completion):
            request.future.set_result(outcome)
        else:
            request.future.set_exception(outcome)

    def _fail_all(self, what: str) -> None:
        for name in list(self._requests):
            self._end(name, ServiceError(what, fix="restart the service"))
