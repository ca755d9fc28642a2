"""The front: a small TCP forwarder on the service's public port, so that the model behind it can change while requests come in.

Each new connection goes to the backend that the state file names at that moment; a connection that is open stays where it is. It
knows nothing of HTTP, except for one answer of its own when no backend can be reached. The state file is replaced, never edited.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from components.common.errors import run_command

CHUNK_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 5.0
LINGER_S = 5.0
BACKLOG = 1024
OPEN_FILES = 8192

# RFC 9457, as the service itself words its problems.
_PROBLEM = json.dumps(
    {
        "type": "/problems/unavailable",
        "title": "The service is not running, or is just starting",
        "title_zh": "服务尚未运行或正在启动",
        "status": 503,
        "detail": "Please try again soon.",
        "detail_zh": "请稍后再试。",
    },
    ensure_ascii=False,
).encode()
UNAVAILABLE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_PROBLEM), _PROBLEM)
)


class Forward(NamedTuple):
    """Where new connections go: `backend` is `host:port`, `digest` that of the model behind it."""

    backend: str
    digest: str

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parse a state file.

        Raises:
            ValueError: it is not one.
        """
        value = json.loads(text)
        try:
            forward = cls(str(value["backend"]), str(value["digest"]))
        except (KeyError, TypeError):
            raise ValueError("it does not name a backend and a digest") from None
        split_address(forward.backend)
        return forward

    def to_json(self) -> str:
        return json.dumps(self._asdict()) + "\n"


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port` → (host, port).

    Raises:
        ValueError: there is no host or no port.
    """
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"not host:port: {address}")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """(host, port) → `host:port`, or `[host]:port` for IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class StateFile:
    """The state file, read again whenever it was replaced; a broken one leaves the last good state in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._forward: Forward | None = None

    def forward(self) -> Forward | None:
        """The state now; None as long as there has been none."""
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_ctime_ns, status.st_size)
            if seen != self._seen:
                self._seen = seen
                self._forward = Forward.from_json(self._path.read_text(encoding="utf-8"))
                print(f"forwarding to {self._forward.backend}, model {self._forward.digest[:12]}", flush=True)
        except FileNotFoundError:
            self._seen = None
        except (OSError, ValueError) as error:
            print(f"{self._path} can't be used, so the last state stays in force: {error}", flush=True)
        return self._forward


class Front:
    """Forwards connections and knows which ones are open."""

    def __init__(self, state_file: StateFile) -> None:
        self._state_file = state_file
        self._open: set[asyncio.Task[None]] = set()

    async def run(self, host: str, port: int, drain_s: float) -> None:
        """Listen until SIGTERM or SIGINT, then let the open connections end, `drain_s` seconds at most."""
        asked_to_stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
        server = await asyncio.start_server(self._serve, host, port, backlog=BACKLOG)
        print(f"listening on {join_address(host, port)}", flush=True)
        await asked_to_stop.wait()
        server.close()
        print(f"stopping; {len(self._open)} connection(s) are open", flush=True)
        if self._open:
            await asyncio.wait(self._open, timeout=drain_s)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            backend = await self._connect()
            if backend is None:
                await _refuse(reader, writer)
            else:
                await _join((reader, writer), backend)
        finally:
            self._open.discard(task)
            await _close(writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the backend; when it left between our look at the state file and now, one to its successor."""
        tried = None
        while (forward := self._state_file.forward()) and forward != tried:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    return await asyncio.open_connection(*split_address(forward.backend))
            tried = forward
        return None


async def _join(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter], backend: tuple[asyncio.StreamReader, asyncio.StreamWriter]
) -> None:
    """Copy both ways until both sides have ended; an error on one side ends the other."""
    up = asyncio.create_task(_copy(client[0], backend[1]))
    down = asyncio.create_task(_copy(backend[0], client[1]))
    try:
        done, _ = await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        if all(task.result() for task in done):
            # A client that has sent all may wait for its answer; one that has its answer has little left to say.
            done, _ = await asyncio.wait({up, down}, timeout=LINGER_S if down.done() else None)
        if not all(task.result() for task in done):
            client[1].transport.abort()
    finally:
        up.cancel()
        down.cancel()
        await _close(backend[1])


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Copy one way at the pace of the slower side, then pass the end on; False when a side broke off."""
    try:
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
    except OSError:
        return False
    return True


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer 503 and read on for a while: closing while the client still sends would reset the connection and lose the answer."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            writer.write(UNAVAILABLE)
            await writer.drain()
            writer.write_eof()
            while await reader.read(CHUNK_BYTES):
                continue


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await writer.wait_closed()


def _allow_open_files() -> None:
    """A connection takes two files, and the soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.deploy.front", description=__doc__)
    parser.add_argument("--listen", required=True, help="public address, host:port")
    parser.add_argument("--state", required=True, type=Path, help='state file: {"backend": "host:port", "digest": "…"}')
    parser.add_argument("--drain_s", required=True, type=float, help="longest wait for open connections after SIGTERM, seconds")
    options = parser.parse_args()
    _allow_open_files()
    host, port = split_address(options.listen)
    asyncio.run(Front(StateFile(options.state)).run(host, port, options.drain_s))


if __name__ == "__main__":
    run_command(main)
