"""What surrounds every request: its id, its log line, the limits on its body, and the last resort when our code fails.

A plain ASGI wrapper, so that it costs microseconds and sees also what never reaches a route.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders, State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serve.logs import log
from components.serve.problems import Problem, problem_response

BODY_BYTES = 512 << 10
BODY_TIMEOUT_S = 10.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Envelope:
    """Wraps the whole application; `draining` tells whether connections are to be closed after their answer."""

    def __init__(self, app: ASGIApp, draining: Callable[[], bool]) -> None:
        self.app, self.draining = app, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's start and end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        facts: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, facts=facts)
        started, status = time.monotonic(), 0

        async def send_ours(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = MutableHeaders(scope=message)
                ours["X-Request-ID"] = request_id
                ours["X-Content-Type-Options"] = "nosniff"
                ours.setdefault("Cache-Control", "no-store")
                if self.draining():
                    ours["Connection"] = "close"
            await send(message)

        error: Exception | None = None
        try:
            await self.app(scope, _limited(receive, headers), send_ours)
        except Exception as caught:
            error = caught
            if not status:
                await problem_response("internal", State(state))(scope, receive, send_ours)
        finally:
            _log_request(scope, status, time.monotonic() - started, facts, error)


def _log_request(scope: Scope, status: int, time_s: float, facts: dict[str, Any], error: Exception | None) -> None:
    route = getattr(scope.get("route"), "path", "(none)")  # never the path itself: people type into addresses too
    if route == "/health" and (status == 200 or facts.get("problem") == "loading"):  # asked every second by whoever watches
        return
    log(
        "request",
        error=error,
        request_id=scope["state"]["request_id"],
        method=scope["method"] if scope["method"].isalpha() else "(odd)",
        route=route,
        status=status,
        time_s=round(time_s, 4),
        **facts,
    )


def _limited(receive: Receive, headers: Headers) -> Receive:
    """`receive` that refuses a body that is too large or too slow; counted, because a length may be absent or a lie."""
    size, deadline, complete = 0, time.monotonic() + BODY_TIMEOUT_S, False
    announced = headers.get("content-length", "")

    async def receive_ours() -> Message:
        nonlocal size, complete
        if complete:
            return await receive()
        if announced.isdecimal() and int(announced[:20]) > BODY_BYTES:
            raise Problem("body-too-large", *_too_large())
        try:
            message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Problem("request-timeout") from None
        size += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if size > BODY_BYTES:
            raise Problem("body-too-large", *_too_large())
        return message

    return receive_ours


def _too_large() -> tuple[str, str]:
    return f"at most {BODY_BYTES >> 10} KiB are possible", f"请求体最大 {BODY_BYTES >> 10} KiB"
