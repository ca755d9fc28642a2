"""The docker target: servers and front are containers on the local Docker Engine, found again by their labels.

The front's state lies in the front's container, so what is live is known wherever this step runs, also in a container of its own with
the Engine's socket mounted.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ServiceError
from components.common.files import write_atomically
from components.deploy.engine import connect, engine_errors, get_file, need_image, own_container, put_file
from components.deploy.folder import ServiceFolder
from components.deploy.front import Forward, join_address
from components.deploy.model import Model
from components.deploy.target import LOG_LINES, Server, new_server_name, reachable_host

if TYPE_CHECKING:
    from docker.models.containers import Container

LABEL = "medical-qa"
PORT = 8000  # inside every container
USER = "10001:10001"
STATE_FOLDER, STATE_NAME = "/tmp", "front.json"
NAME_CHARACTERS = 31  # with the server's own name, a container's name stays within the 63 characters of a DNS label
STOP_MARGIN_S = 5.0  # a drained server still closes its engine
FRONT_START_TIMEOUT_S = 30.0
GIB = 1 << 30
RESTART = {"Name": "unless-stopped"}
ENDED = ("created", "exited", "dead", "removing")


class DockerTarget:
    """The containers of one service, on a network of their own."""

    def __init__(self, folder: ServiceFolder, image: str, host: str, port: int, drain_s: float) -> None:
        self.listen = join_address(host, port)
        self.url = f"http://{join_address(reachable_host(host), port)}"
        self._folder, self._service, self._image, self._drain_s = folder.path, folder.service_name, image, drain_s
        self._published = (host, port)
        self._engine = connect()
        self._step = own_container(self._engine)

    @property
    @engine_errors()
    def front_address(self) -> str:
        front = self._front()
        if front is None:
            raise ServiceError("the front's container is gone", where=self._service, fix="run the deploy step again")
        return self._address(front)

    @engine_errors()
    def open_front(self) -> bool:
        fronts = self._containers("front")
        if any(self._listens(front) for front in fronts):
            return False
        former = self._front()
        forward = self._forward(former) if former and self.live() else None
        drain = ["--drain_s", str(self._drain_s)]
        front = self._create(
            "front",
            ["python", "-m", "components.deploy.front", "--listen", f"0.0.0.0:{PORT}", "--state", f"{STATE_FOLDER}/{STATE_NAME}", *drain],
            labels={f"{LABEL}.listen": self.listen},
            ports={f"{PORT}/tcp": self._published},
            mem_limit=GIB // 4,
            pids_limit=64,
            restart_policy=RESTART,
        )
        if forward:
            put_file(front, STATE_FOLDER, STATE_NAME, forward.to_json())
        dead = [front for front in fronts if front.status != "running"]
        for container in dead:
            container.remove(force=True)  # it may hold the port
        self._start_front(front)
        for container in fronts:
            if container not in dead:
                self._end(container)  # it listened at another address
        print(f"front: container {front.name} listens on {self.listen}", flush=True)
        return True

    @engine_errors()
    def servers(self) -> list[Server]:
        return [self._server(container) for container in self._containers("server") if container.status not in ENDED]

    @engine_errors()
    def live(self) -> Server | None:
        front = self._front()
        forward = self._forward(front) if front else None
        return next((server for server in self.servers() if (server.backend, server.digest) == forward), None)

    @engine_errors()
    def start(self, model: Model) -> Server:
        from docker.types import Mount

        flags = {"model_uri": model.uri, "host": "0.0.0.0", "port": PORT, "drain_s": self._drain_s, "log_file": os.devnull}
        folder = str(model.folder)
        for dead in self._containers("server"):
            if dead.status in ENDED:
                self._end(dead)
        container = self._create(
            model.digest,
            ["python", "-m", "components.serve", *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))],
            labels={f"{LABEL}.digest": model.digest, f"{LABEL}.model_uri": model.uri},
            ports={f"{PORT}/tcp": ("127.0.0.1",)},
            mounts=[Mount(folder, folder, type="bind", read_only=True)] if model.folder else [],
            mem_limit=_memory_limit(model),
            pids_limit=4096,
            device_requests=self._accelerators(),
            environment=_environment(model),
        )
        try:
            container.start()
        except BaseException:
            container.remove(force=True)
            raise
        return self._server(container)

    @engine_errors()
    def is_running(self, server: Server) -> bool:
        container = self._container(server)
        return container is not None and container.status == "running" and container.attrs["RestartCount"] == 0

    @engine_errors()
    def last_lines(self, server: Server) -> str:
        container = self._container(server)
        return container.logs(tail=LOG_LINES).decode("utf-8", "replace") if container else ""

    @engine_errors()
    def shift(self, server: Server) -> None:
        front, container = self._front(), self._container(server)
        if front is None or container is None:
            raise ServiceError("the front's or the server's container is gone", where=server.name, fix="run the deploy step again")
        container.update(restart_policy=RESTART)
        # Should the front look in mid-write, it goes on with the last good state.
        put_file(front, STATE_FOLDER, STATE_NAME, Forward(server.backend, server.digest).to_json())

    @engine_errors()
    def stop(self, server: Server) -> None:
        container = self._container(server)
        if container:
            self._end(container)

    @engine_errors()
    def stop_all(self) -> None:
        front = self._front()
        if front and front.status == "running":
            front.update(restart_policy={"Name": "no"})
            front.kill(signal="SIGTERM")  # it closes the port now and ends with its last connection
        for container in self._containers("server"):
            self._end(container)
        if front:
            self._end(front)
        self._remove_network()

    @property
    def _network_name(self) -> str:
        return f"{LABEL}-{self._service}"

    def _containers(self, role: str) -> list[Container]:
        labels = [f"{LABEL}.service={self._service}", f"{LABEL}.role={role}"]
        return list(self._engine.containers.list(all=True, filters={"label": labels}, ignore_removed=True))

    def _front(self) -> Container | None:
        return next(iter(sorted(self._containers("front"), key=lambda front: front.status != "running")), None)

    def _listens(self, front: Container) -> bool:
        return front.status == "running" and front.labels[f"{LABEL}.listen"] == self.listen

    def _container(self, server: Server) -> Container | None:
        from docker.errors import NotFound

        try:
            return self._engine.containers.get(server.name)
        except NotFound:
            return None

    def _server(self, container: Container) -> Server:
        return Server(
            name=container.name,
            model_uri=container.labels[f"{LABEL}.model_uri"],
            digest=container.labels[f"{LABEL}.digest"],
            backend=f"{container.name}:{PORT}",
            address=self._address(container),
            description=f"container {container.name}",
            log=f"docker logs {container.name}; once it has ended: {self._log(container)}",
        )

    def _address(self, container: Container) -> str:
        """`host:port` under which this step reaches a container: by name from inside, else by its published port."""
        if self._step:
            self._step.reload()
            if self._network_name not in self._step.attrs["NetworkSettings"]["Networks"]:
                self._network().connect(self._step)
            return f"{container.name}:{PORT}"
        container.reload()
        published = (container.attrs["NetworkSettings"]["Ports"].get(f"{PORT}/tcp") or [{"HostIp": "", "HostPort": 0}])[0]
        return join_address(reachable_host(published["HostIp"]), int(published["HostPort"]))

    def _network(self) -> Any:
        networks = self._engine.networks
        found = next((network for network in networks.list(names=[self._network_name]) if network.name == self._network_name), None)
        return found or networks.create(self._network_name, driver="bridge", check_duplicate=True)

    def _remove_network(self) -> None:
        """Unless someone else uses it."""
        network = self._network()
        network.reload()
        if self._step and self._step in network.containers:
            network.disconnect(self._step)
            network.reload()
        if not network.containers:
            network.remove()

    def _create(self, kind: str, command: list[str], *, labels: dict[str, str], **options: Any) -> Container:
        from docker.types import LogConfig

        need_image(self._engine, self._image)
        role = "front" if kind == "front" else "server"
        return self._engine.containers.create(
            self._image,
            command,
            name=f"{self._service[:NAME_CHARACTERS]}-{new_server_name(kind)}",
            user=USER,
            network=self._network().name,
            labels={f"{LABEL}.service": self._service, f"{LABEL}.role": role, **labels},
            init=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            log_config=LogConfig(type="json-file", config={"max-size": "10m", "max-file": "3"}),
            **options,
        )

    def _start_front(self, front: Container) -> None:
        from docker.errors import APIError

        try:
            front.start()
            deadline = time.monotonic() + FRONT_START_TIMEOUT_S
            while b"listening on" not in (lines := front.logs(tail=LOG_LINES)):
                front.reload()
                if front.status != "running" or time.monotonic() > deadline:
                    raise ServiceError("the front did not start", where=f"{self._image}: {lines.decode('utf-8', 'replace')}")
                time.sleep(0.1)
        except APIError as error:
            front.remove(force=True)
            raise ServiceError(
                f"the service can't listen on {self.listen}: {error.explanation or error}",
                where="--service_host, --service_port",
                fix="stop the program or container that listens there, or choose another port",
            ) from None
        except BaseException:
            front.remove(force=True)
            raise

    def _forward(self, front: Container) -> Forward | None:
        text = get_file(front, STATE_FOLDER, STATE_NAME)
        try:
            return Forward.from_json(text) if text is not None else None
        except ValueError as error:
            print(f"{STATE_NAME} in {front.name} is broken, so nothing counts as live: {error}", flush=True)
            return None

    def _end(self, container: Container) -> None:
        """Stop a container, keep its log, and remove it."""
        try:
            container.stop(timeout=math.ceil(self._drain_s + STOP_MARGIN_S))
            write_atomically(self._log(container), container.logs().decode("utf-8", "replace"))
        finally:
            container.remove(force=True)

    def _log(self, container: Container) -> Path:
        return self._folder / f"{container.name}.log"

    def _accelerators(self) -> list[Any]:
        from docker.types import DeviceRequest

        if "nvidia" not in self._engine.info().get("Runtimes", {}):
            return []
        print("GPU: all, because the Engine has the nvidia runtime", flush=True)
        return [DeviceRequest(count=-1, capabilities=[["gpu"]])]


def _memory_limit(model: Model) -> int | None:
    """Bytes: weights may double in fp32 and once more while they load, and the libraries and the cache need the rest."""
    if model.size_bytes is None:
        return None
    limit = 4 * model.size_bytes + 8 * GIB
    print(f"memory limit {limit / GIB:.1f} GiB: four times the model's size, and 8 GiB", flush=True)
    return limit


def _environment(model: Model) -> dict[str, str]:
    """The user has no home folder in the image; a model in object storage needs this step's credentials."""
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} if model.folder is None else {}
    return {"HOME": "/tmp", "OMP_WAIT_POLICY": "passive", **credentials}
