"""The service's heart: which model answers, who may ask, and how one answer is made.

Everything here runs on the event loop and only waits; models are loaded, texts tokenised and tokens generated in other threads.
Counts need no lock for that reason.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import Request

from components.common.chat import clean
from components.common.engine import Completion, Sampling
from components.common.errors import ServiceError, UserError
from components.serve.admission import Admission
from components.serve.config import ServeSettings
from components.serve.logs import fingerprint, log
from components.serve.model import ServedModel, is_allowed
from components.serve.problems import Problem
from components.serve.schema import (
    CUT,
    DEFAULT_LENGTH,
    DISCLAIMER,
    EMPTY,
    AskRequest,
    AskResponse,
    Health,
    ReloadResponse,
    language_of,
)

T = TypeVar("T")
LOADING_RETRY_S = 5
SLOW_WORK = "slow-work"


class Runtime:
    """Owns the model (and, during a reload, two), and the queue in front of it."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.model: ServedModel | None = None
        self.load_error: Exception | None = None
        self.draining = False
        self._reloading = False
        self.admission = Admission(settings.max_concurrency, settings.max_queue, settings.request_timeout_s)
        self._started = time.monotonic()
        self._stop_answers = asyncio.Event()
        self.on_load_failure: Callable[[], None] = lambda: None

    async def load(self) -> None:
        """Load the first model; a failure is kept in `load_error` and told to `on_load_failure`."""
        try:
            self.model = await in_thread(lambda: ServedModel.load(self.settings.model_uri, self.settings))
        except Exception as error:
            self.load_error = error
            self.on_load_failure()
            return
        log("ready", model_digest=self.model.digest, verified=self.model.verified, load_s=self.model.load_s)

    def health(self) -> Health:
        """Raises a Problem unless questions are answered."""
        model = self.ready_model()
        uptime_s = round(time.monotonic() - self._started, 1)
        return Health(model_digest=model.digest, uptime_s=uptime_s, running=self.admission.running, waiting=self.admission.waiting)

    def ready_model(self) -> ServedModel:
        """The model that answers; a Problem while there is none."""
        if self.model is None:
            raise Problem("loading", retry_after_s=LOADING_RETRY_S)
        if not self.model.engine.healthy:
            raise Problem("engine-dead", retry_after_s=LOADING_RETRY_S)
        return self.model

    async def answer(self, ask: AskRequest, request: Request) -> AskResponse:
        """Answer one question, within its time; a client that leaves stops its generation."""
        started = time.monotonic()
        facts: dict[str, Any] = request.state.facts
        facts |= {"question_chars": len(ask.question), "question_digest": fingerprint(clean(ask.question))}
        model, answered = self.ready_model(), False
        self.admission.enter()
        model.running += 1
        try:
            facts["model_digest"] = model.digest
            sampling = self._sampling(ask, model)
            prompt = await asyncio.to_thread(model.prompt_ids, ask.question, ask.messages())
            facts["prompt_tokens"] = len(prompt)
            if len(prompt) > model.engine.max_prompt_tokens:
                raise Problem("question-too-long", *_too_long(len(prompt), model.engine.max_prompt_tokens))
            completion = await self._generate(model, prompt, sampling, request, started)
            text = await asyncio.to_thread(model.engine.tokenizer.decode, completion.token_ids, skip_special_tokens=True)
            answered = True
        finally:
            self.admission.leave(answered=answered)
            model.running -= 1
        facts |= {"completion_tokens": len(completion.token_ids), "finish_reason": completion.finish_reason}
        language = language_of(ask.question)
        warnings = [CUT[language]] if completion.finish_reason == "length" else []
        return AskResponse(
            id=request.state.request_id,
            answer=text.strip(),
            language=language,
            model_digest=model.digest,
            adapter_digest=model.manifest.facts.get("adapter_digest"),
            data_digest=model.manifest.facts.get("data_digest"),
            finish_reason="length" if completion.finish_reason == "length" else "stop",
            prompt_tokens=len(prompt),
            completion_tokens=len(completion.token_ids),
            time_s=round(time.monotonic() - started, 3),
            disclaimer=DISCLAIMER[language],
            warnings=warnings if text.strip() else [*warnings, EMPTY[language]],
        )

    async def reload(self, model_uri: str | None) -> ReloadResponse:
        """Load a model beside the present one, then let it answer; after any failure the present one goes on."""
        former = self.model
        if former is None:
            raise Problem("loading", retry_after_s=LOADING_RETRY_S)
        if self._reloading:
            raise Problem("reload-running", retry_after_s=LOADING_RETRY_S)
        uri = model_uri or former.model_uri
        if not is_allowed(uri, self.settings):
            raise Problem("model-not-allowed", "the address is not below allowed_model_roots", "该地址不在 allowed_model_roots 之内")
        started = time.monotonic()
        self._reloading = True
        try:
            self.model = new = await self._load_beside(uri)
            await self._retire(former)
        finally:
            self._reloading = False
        time_s = round(time.monotonic() - started, 2)
        log("reloaded", former_digest=former.digest, model_digest=new.digest, time_s=time_s)
        return ReloadResponse(former_digest=former.digest, model_digest=new.digest, changed=former.digest != new.digest, time_s=time_s)

    def stop_answers(self) -> None:
        """End the questions that are still being answered, with a Problem: the time to drain is over."""
        self._stop_answers.set()

    async def close(self) -> None:
        """Stop the engine."""
        if self.model is not None:
            await in_thread(self.model.engine.close)

    def _sampling(self, ask: AskRequest, model: ServedModel) -> Sampling:
        longest = model.engine.max_new_tokens
        if ask.max_length is not None and ask.max_length > longest:
            raise Problem("invalid-request", f"max_length must be at most {longest}", f"max_length 不得大于 {longest}")
        return Sampling(ask.max_length or min(DEFAULT_LENGTH, longest), abs(ask.temperature), ask.top_p)

    async def _generate(self, model: ServedModel, prompt: list[int], sampling: Sampling, request: Request, started: float) -> Completion:
        """Race the answer against the client's patience, the time limit and the end of the service; losers stop the engine."""
        try:
            generating = model.engine.submit(prompt, sampling)
        except ServiceError as error:
            log("engine refused", error=error)
            raise Problem("engine-dead", retry_after_s=LOADING_RETRY_S) from None
        answered = asyncio.wrap_future(generating)
        left = asyncio.create_task(_client_left(request))
        stopped = asyncio.create_task(self._stop_answers.wait())
        try:
            time_left_s = max(0.0, started + self.settings.request_timeout_s - time.monotonic())
            racers: set[asyncio.Future[Any]] = {answered, left, stopped}
            done, _ = await asyncio.wait(racers, timeout=time_left_s, return_when=asyncio.FIRST_COMPLETED)
            if answered in done:
                return answered.result()
        except ServiceError as error:
            log("engine failed", error=error)
            raise Problem("engine-dead", retry_after_s=LOADING_RETRY_S) from None
        finally:
            model.engine.cancel(generating)
            left.cancel()
            stopped.cancel()
        if left in done:
            raise Problem("client-left")
        if stopped in done:
            raise Problem("shutting-down", retry_after_s=1)
        limit_s = self.settings.request_timeout_s
        raise Problem("timeout", f"the answer took longer than {limit_s:g} s, waiting included", f"回答（含排队）超过 {limit_s:g} 秒")

    async def _load_beside(self, uri: str) -> ServedModel:
        try:
            return await in_thread(lambda: ServedModel.load(uri, self.settings))
        except UserError as error:
            log("reload refused", error=error, reason=error.what)
            fix = f" ({error.fix})" if error.fix else ""
            raise Problem("reload-refused", f"{error.what}{fix}", f"新模型未通过检查：{error.what}") from None
        except Exception as error:
            log("reload failed", error=error)
            raise Problem("reload-failed") from None

    async def _retire(self, former: ServedModel) -> None:
        """Let the former model finish its answers, then free it."""
        deadline = time.monotonic() + self.settings.request_timeout_s
        while former.running and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await in_thread(former.engine.close)


async def in_thread(work: Callable[[], T]) -> T:
    """Run slow work in a daemon thread of its own: a process that is told to end does not wait for a model to load."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=SLOW_WORK).start()
    return await asyncio.wrap_future(future)


def slow_work_goes_on() -> bool:
    """Whether a thread of `in_thread` still runs, its caller gone."""
    return any(thread.name == SLOW_WORK for thread in threading.enumerate())


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_long(tokens: int, longest: int) -> tuple[str, str]:
    return (
        f"question and history make a prompt of {tokens} tokens; at most {longest} are possible",
        f"问题与历史对话共 {tokens} 个 token，最多 {longest} 个",
    )
