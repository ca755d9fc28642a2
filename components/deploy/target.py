"""What a rollout asks of the place where the service runs; `process` and `docker` are such places."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from components.deploy.model import Model

LOG_LINES = 20


@dataclass(frozen=True)
class Server:
    """A running server with one model.

    Attributes:
        name: unique among the servers of a service.
        digest: of the model it was started with.
        backend: `host:port`, as the front reaches it.
        address: `host:port`, as this command reaches it.
        description: for people, such as "process 4711".
        log: where its output can be read: a file, or a command.
    """

    name: str
    model_uri: str
    digest: str
    backend: str
    address: str
    description: str
    log: str


class Target(Protocol):
    """A place where servers run behind one front on the public port; the front's state says which of them is live."""

    url: str
    """Where clients find the service."""

    @property
    def front_address(self) -> str:
        """`host:port` of the front, as this command reaches it."""

    def open_front(self) -> bool:
        """Make sure that the front listens; True when it was started now. ServiceError when the port is taken."""

    def servers(self) -> list[Server]:
        """The servers of this service that are running."""

    def live(self) -> Server | None:
        """The running server to which new connections go."""

    def start(self, model: Model) -> Server:
        """Start a server; it loads its model and is not ready yet."""

    def is_running(self, server: Server) -> bool:
        """Whether it still runs, and never ended since its start."""

    def last_lines(self, server: Server) -> str:
        """The end of its log, `LOG_LINES` at most."""

    def shift(self, server: Server) -> None:
        """Send new connections to this server; open ones stay where they are."""

    def stop(self, server: Server) -> None:
        """Let it finish its answers, `drain_s` at most, and end it."""

    def stop_all(self) -> None:
        """Close the public port, and end the servers and the front."""


def new_server_name(digest: str) -> str:
    """The model's digest, shortened, and the time."""
    return f"{digest[:12]}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}"[:-3]


def reachable_host(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
