"""Is a server ready, and with the right model? Asked over HTTP, as a load balancer asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from components.common.errors import ServiceError

REQUEST_TIMEOUT_S = 5.0
POLL_S = 0.2


class Health(NamedTuple):
    """`digest` of the model when the server is ready, else None; `said` is what it answered, shortened."""

    digest: str | None
    said: str


def read_health(address: str) -> Health:
    """Ask `GET /health` once, on a connection of its own.

    Args:
        address: `host:port`.
    """
    import httpx

    try:
        response = httpx.get(f"http://{address}/health", timeout=REQUEST_TIMEOUT_S, trust_env=False)
        said = f"{response.status_code} {response.text[:200]}"
        value: Any = response.json() if response.status_code == 200 else {}
    except (httpx.HTTPError, ValueError) as error:
        return Health(None, f"{type(error).__name__}: {error}"[:200])
    return Health(value.get("model_digest") if isinstance(value, dict) else None, said)


def check_health(address: str, digest: str) -> None:
    """Raise ServiceError unless the server is ready with this model."""
    health = read_health(address)
    if health.digest is None:
        raise ServiceError("the service is not healthy", where=f"http://{address}/health: {health.said}")
    if health.digest != digest:
        raise ServiceError(
            "the service answers with another model than the one asked for",
            where=f"http://{address}/health: {health.digest[:12]} instead of {digest[:12]}",
            fix="check that the folder at model_uri is the model that its manifest describes",
        )


def wait_until_ready(address: str, digest: str, timeout_s: float, is_running: Callable[[], bool]) -> None:
    """Ask for the server's health until it is ready.

    Raises:
        ServiceError: it ended, has another model, or is not ready after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while (health := read_health(address)).digest is None:
        if not is_running():
            raise ServiceError("the server ended before it was ready", fix="mend what its log says")
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the server is not ready after {timeout_s:g} s",
                where=f"http://{address}/health: {health.said}",
                fix="see its log; a large model needs a larger --ready_timeout_s",
            )
        time.sleep(POLL_S)
    check_health(address, digest)
