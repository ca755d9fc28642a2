"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from components.serve.config import ServeSettings
from components.serve.envelope import Envelope
from components.serve.problems import ProblemBody, on_http_error, on_validation_error
from components.serve.runtime import Runtime
from components.serve.schema import (
    DISCLAIMER,
    AskRequest,
    AskResponse,
    Endpoint,
    Health,
    ModelInfo,
    Overview,
    ReloadRequest,
    ReloadResponse,
)

DESCRIPTION = "Answers medical questions in Chinese and English with a fine-tuned language model."
DESCRIPTION_ZH = "用微调后的语言模型回答中英文医学问题。"
ENDPOINTS = (
    ("GET", "/", "this overview", "本概览"),
    ("GET", "/health", "200 when questions are answered, else 503", "服务就绪返回 200，否则 503"),
    ("POST", "/ask", "ask a question", "提问"),
    ("GET", "/model_info", "which model answers, and its limits", "当前模型及其限制"),
    ("POST", "/reload_model", "load another model without a pause", "不停机更换模型"),
    ("GET", "/docs", "try the API in the browser", "在浏览器中试用接口"),
)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
    return {status: {"model": ProblemBody, "content": content} for status in statuses}


def create_app(settings: ServeSettings) -> FastAPI:
    """The application; it loads its model in the background as soon as it starts. Its `state.runtime` is the service's heart."""
    runtime = Runtime(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(runtime.load())
        yield
        loading.cancel()
        await runtime.close()

    app = FastAPIOffline(
        title="Medical QA",
        description=f"{DESCRIPTION}\n\n{DESCRIPTION_ZH}\n\n{DISCLAIMER['en']}\n\n{DISCLAIMER['zh']}",
        version="1.0.0",
        redoc_url=None,
        lifespan=lifespan,
        responses=_problems(500),
    )
    app.state.runtime = runtime
    app.add_middleware(Envelope, draining=lambda: runtime.draining)
    app.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_validation_error)  # type: ignore[arg-type]

    @app.get("/", summary="What this API is · 接口概览")
    async def overview() -> Overview:
        endpoints = [Endpoint(method=method, path=path, summary=en, summary_zh=zh) for method, path, en, zh in ENDPOINTS]
        return Overview(name=app.title, description=DESCRIPTION, description_zh=DESCRIPTION_ZH, endpoints=endpoints, disclaimer=DISCLAIMER)

    @app.get("/health", summary="Ready to answer? · 是否就绪", responses=_problems(503))
    async def health() -> Health:
        return runtime.health()

    @app.post("/ask", summary="Ask a question · 提问", responses=_problems(400, 408, 413, 422, 503, 504))
    async def ask(question: AskRequest, request: Request) -> AskResponse:
        return await runtime.answer(question, request)

    @app.get("/model_info", summary="Which model answers · 当前模型", responses=_problems(503))
    async def model_info() -> ModelInfo:
        return ModelInfo(**runtime.ready_model().info())

    @app.post(
        "/reload_model",
        summary="Load another model without a pause · 不停机更换模型",
        responses=_problems(400, 403, 408, 409, 413, 422, 503),
    )
    async def reload_model(request: ReloadRequest | None = None) -> ReloadResponse:
        return await runtime.reload(request.model_uri if request else None)

    return app
