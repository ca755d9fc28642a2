"""uvicorn, with an end that loses no request.

After SIGTERM the server takes no new connection, but goes on answering on those it has, each answer with `Connection: close`, so that
a client that keeps its connection is sent away politely to the next version. Then it waits for the running answers, `drain_s` at most.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from components.common.errors import ServiceError
from components.serve.config import ServeSettings
from components.serve.logs import log
from components.serve.runtime import Runtime

IDLE_GRACE_S = 1.0  # how long an idle connection may still send its next request
KEEP_ALIVE_S = 65  # above the minute that load balancers keep an idle connection
LAST_ANSWERS_S = 2  # for sending the problem to those whose time to drain is over


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the port; it listens once the server starts.

    Raises:
        ServiceError: the port is taken, or the address is not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServiceError(
            f"can't listen: {error.strerror or error}",
            where=f"{host}:{port}",
            fix="choose another --port (0: any free one) or --host, or stop the program that listens there",
        ) from None
    return listener


class Server(uvicorn.Server):
    """Serves one application until SIGTERM, SIGINT or `stop`."""

    def __init__(self, app: FastAPI, settings: ServeSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_s) + LAST_ANSWERS_S,
            )
        )
        self._runtime: Runtime = app.state.runtime
        self._runtime.on_load_failure = self.stop
        self._drain_s = settings.drain_s

    def stop(self) -> None:
        """End as after SIGTERM."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends the server at once."""
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close what is left."""
        self._runtime.draining = True
        log("draining", connections=len(self.server_state.connections))
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain_s, self._runtime.stop_answers)
        grace_ends = loop.time() + min(IDLE_GRACE_S, self._drain_s)
        while self.server_state.connections and loop.time() < grace_ends and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        log("stopped")


def ignore_sigterm_afterwards() -> None:
    """Exit with 0 after SIGTERM: uvicorn raises the signal again once it has drained, for the handler that was there before."""
    signal.signal(signal.SIGTERM, lambda *_: None)
