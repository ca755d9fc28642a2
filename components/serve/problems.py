"""Every error of the service as `application/problem+json` (RFC 9457), in English and Chinese.

A problem never repeats what the client sent and never shows a trace; its `type` is stable, so programs can rely on it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import State
from starlette.exceptions import HTTPException as StarletteHTTPException


class Kind(NamedTuple):
    """What all problems of one type share."""

    status: int
    title: str
    title_zh: str


KINDS = {
    "malformed-body": Kind(400, "The body is not readable JSON", "请求体不是可读的 JSON"),
    "model-not-allowed": Kind(403, "This model may not be loaded", "不允许加载该模型"),
    "not-found": Kind(404, "There is nothing at this address", "该地址不存在"),
    "method-not-allowed": Kind(405, "The address exists, but not for this method", "该地址不支持此方法"),
    "request-timeout": Kind(408, "The body did not arrive in time", "请求体未及时到达"),
    "reload-running": Kind(409, "A reload is running already", "正在重新加载模型"),
    "body-too-large": Kind(413, "The body is too large", "请求体过大"),
    "question-too-long": Kind(413, "The question is too long", "问题过长"),
    "invalid-request": Kind(422, "The request can't be used", "请求无效"),
    "reload-refused": Kind(422, "The new model was refused; the former one keeps answering", "新模型未被接受，仍由原模型提供服务"),
    "client-left": Kind(499, "The client left before the answer was ready", "客户端已断开"),
    "internal": Kind(500, "The service failed", "服务内部错误"),
    "reload-failed": Kind(500, "The reload failed; the former model keeps answering", "重新加载失败，仍由原模型提供服务"),
    "loading": Kind(503, "The model is being loaded", "模型正在加载"),
    "engine-dead": Kind(503, "The model has stopped answering", "模型已停止工作"),
    "queue-full": Kind(503, "Too many questions are waiting", "等待的问题过多"),
    "shutting-down": Kind(503, "The service is shutting down", "服务正在关闭"),
    "timeout": Kind(504, "The answer took too long", "回答超时"),
}
_OF_STATUS = {400: "malformed-body", 404: "not-found", 405: "method-not-allowed", 413: "body-too-large"}

# What pydantic found wrong with a field; its own messages are English only, and some repeat the value.
_FAULTS = {
    "missing": ("is required", "为必填项"),
    "extra_forbidden": ("is not known to this request", "不属于该请求"),
    "json_invalid": ("is not valid JSON", "不是有效的 JSON"),
    "model_attributes_type": (
        "must be a JSON object sent with content-type application/json",
        "必须是 JSON 对象，且 content-type 为 application/json",
    ),
    "string_type": ("must be a string", "必须是字符串"),
    "string_unicode": ("must be valid Unicode", "必须是有效的 Unicode 文本"),
    "string_too_short": ("must have at least {min_length} character(s)", "至少需要 {min_length} 个字符"),
    "string_too_long": ("must have at most {max_length} characters", "最多 {max_length} 个字符"),
    "int_type": ("must be an integer", "必须是整数"),
    "float_type": ("must be a number", "必须是数字"),
    "finite_number": ("must be a finite number", "必须是有限的数字"),
    "greater_than": ("must be greater than {gt:.12g}", "必须大于 {gt:.12g}"),
    "greater_than_equal": ("must be at least {ge:.12g}", "不得小于 {ge:.12g}"),
    "less_than_equal": ("must be at most {le:.12g}", "不得大于 {le:.12g}"),
    "list_type": ("must be a list", "必须是列表"),
    "too_long": ("must have at most {max_length} items", "最多 {max_length} 项"),
    "literal_error": ("must be {expected}", "必须是 {expected}"),
    "value_error": ("{error}", "{error}"),
}

_CHINESE_NAMES = {"body": "请求体", "unknown field": "未知字段"}


class FieldFault(BaseModel):
    """What is wrong with one field of a request."""

    field: str
    detail: str
    detail_zh: str


class ProblemBody(BaseModel):
    """An error as RFC 9457 has it, in two languages."""

    type: str = Field(examples=["/problems/queue-full"])
    title: str
    title_zh: str
    status: int
    detail: str
    detail_zh: str
    request_id: str
    errors: list[FieldFault] = Field(default_factory=list)


class Problem(HTTPException):
    """Raise it anywhere in a request; the client gets the problem of this kind.

    Args:
        kind: a key of `KINDS`.
        detail: what happened here, in English; `detail_zh` in Chinese. Nothing that the client sent.
        retry_after_s: when asking again makes sense, seconds.
    """

    def __init__(self, kind: str, detail: str = "", detail_zh: str = "", *, retry_after_s: float | None = None) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))} if retry_after_s is not None else None
        super().__init__(KINDS[kind].status, detail or KINDS[kind].title, headers)
        self.kind, self.detail_zh = kind, detail_zh or KINDS[kind].title_zh


def problem_response(
    kind: str,
    state: State,
    *,
    detail: str = "",
    detail_zh: str = "",
    status: int = 0,
    headers: Any = None,
    errors: list[FieldFault] | None = None,
) -> JSONResponse:
    """The response for a problem; its kind goes into the request's log line too."""
    of_kind = KINDS[kind]
    body = ProblemBody(
        type=f"/problems/{kind}",
        title=of_kind.title,
        title_zh=of_kind.title_zh,
        status=status or of_kind.status,
        detail=detail or of_kind.title,
        detail_zh=detail_zh or of_kind.title_zh,
        request_id=state.request_id,
        errors=errors or [],
    )
    state.facts["problem"] = kind
    return JSONResponse(body.model_dump(), body.status, headers, media_type="application/problem+json")


async def on_http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """Our problems, and the framework's own errors (404, 405, an unreadable body) in the same form."""
    if isinstance(error, Problem):
        return problem_response(error.kind, request.state, detail=str(error.detail), detail_zh=error.detail_zh, headers=error.headers)
    kind = _OF_STATUS.get(error.status_code, "invalid-request" if error.status_code < 500 else "internal")
    return problem_response(kind, request.state, status=error.status_code, headers=error.headers)


async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """Which fields are wrong and why, without repeating what was sent."""
    faults = [_fault(fault) for fault in error.errors()[:20]]
    return problem_response(
        "invalid-request",
        request.state,
        detail="; ".join(f"{fault.field} {fault.detail}" for fault in faults),
        detail_zh="；".join(f"{_CHINESE_NAMES.get(fault.field, fault.field)} {fault.detail_zh}" for fault in faults),
        errors=faults,
    )


def _fault(fault: Any) -> FieldFault:
    english, chinese = _FAULTS.get(fault["type"], ("can't be used", "无效"))
    context = fault.get("ctx") or {}
    where = [str(part) for part in fault["loc"][1:]]
    if fault["type"] in ("extra_forbidden", "json_invalid"):  # the last part is the client's own word, or a position
        where = where[:-1]
    parts = context.get("error")
    if fault["type"] == "value_error" and isinstance(parts, ValueError) and len(parts.args) == 2:  # raised by our validators, bilingual
        english, chinese = parts.args
    else:
        english, chinese = english.format(**context), chinese.format(**context)
    name = ".".join(where) or ("unknown field" if fault["type"] == "extra_forbidden" else "body")
    return FieldFault(field=name, detail=english, detail_zh=chinese)
