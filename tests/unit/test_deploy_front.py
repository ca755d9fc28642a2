"""The front as a real process: what it forwards, how it switches, and what it says when nothing is behind it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.common.files import write_atomically
from components.deploy.front import Forward, StateFile, join_address, split_address
from tests.conftest import PROJECT
from tests.unit.deploy_support import free_port

Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def backend(talk: Talk) -> Iterator[str]:
    """A TCP server that runs `talk` in a thread for each connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=guarded, args=(connection,), daemon=True).start()

    def guarded(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            talk(connection)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def echo_after_end(connection: socket.socket) -> None:
    """Read until the client has said all, only then answer: needs half-close."""
    connection.sendall(read_all(connection))


def say(text: bytes) -> Talk:
    return lambda connection: connection.sendall(text)


class Front:
    def __init__(self, folder: Path, drain_s: float = 3) -> None:
        self.state, self.port = folder / "front.json", free_port()
        command = [sys.executable, "-m", "components.deploy.front", "--listen", f"127.0.0.1:{self.port}"]
        command += ["--state", str(self.state), "--drain_s", str(drain_s)]
        self.log = folder / "front.log"
        self.process = subprocess.Popen(command, cwd=PROJECT, stdout=self.log.open("wb"), stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 20
        while "listening on" not in self.log.read_text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def point_at(self, address: str, digest: str = "d") -> None:
        write_atomically(self.state, Forward(address, digest).to_json())

    def connect(self, timeout: float = 10) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def hear(self) -> bytes:
        with self.connect() as connection:
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    running = Front(tmp_path)
    yield running
    running.process.kill()
    running.process.wait(10)


def test_addresses_of_both_kinds() -> None:
    assert split_address("127.0.0.1:8000") == ("127.0.0.1", 8000)
    assert split_address("[::1]:8000") == ("::1", 8000)
    assert join_address("::1", 8000) == "[::1]:8000"
    assert join_address(*split_address("some-container:80")) == "some-container:80"
    with pytest.raises(ValueError, match="not host:port"):
        split_address("nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"backend": "127.0.0.1", "digest": "d"}', '{"backend": 5, "digest": "d"}'])
def test_a_broken_state_leaves_the_last_good_one_in_force(tmp_path: Path, text: str) -> None:
    path = tmp_path / "front.json"
    state = StateFile(path)
    assert state.forward() is None
    path.write_text(text)
    assert state.forward() is None
    write_atomically(path, Forward("127.0.0.1:1", "d").to_json())
    assert state.forward() == Forward("127.0.0.1:1", "d")
    write_atomically(path, text)
    assert state.forward() == Forward("127.0.0.1:1", "d")
    path.unlink()
    assert state.forward() == Forward("127.0.0.1:1", "d")
    write_atomically(path, Forward("127.0.0.1:2", "e").to_json())
    assert state.forward() == Forward("127.0.0.1:2", "e")


def test_a_big_body_passes_both_ways_whole(front: Front) -> None:
    body = os.urandom(1 << 20) * 24
    with backend(echo_after_end) as address:
        front.point_at(address)
        with front.connect(60) as connection:

            def send() -> None:
                connection.sendall(body)
                connection.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            assert read_all(connection) == body
            sender.join(30)


def test_half_close_by_the_client_still_gets_its_answer(front: Front) -> None:
    def answer_late(connection: socket.socket) -> None:
        asked = read_all(connection)
        time.sleep(0.5)
        connection.sendall(b"you said " + asked)

    with backend(answer_late) as address:
        front.point_at(address)
        with front.connect() as connection:
            connection.sendall(b"hello")
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == b"you said hello"


def test_a_stream_arrives_piece_by_piece(front: Front) -> None:
    def stream(connection: socket.socket) -> None:
        for number in range(5):
            connection.sendall(b"%d" % number)
            time.sleep(0.2)

    with backend(stream) as address:
        front.point_at(address)
        with front.connect() as connection:
            arrived = [(connection.recv(1), time.monotonic()) for _ in range(5)]
    assert [piece for piece, _ in arrived] == [b"0", b"1", b"2", b"3", b"4"]
    assert arrived[-1][1] - arrived[0][1] > 0.5


def test_a_client_that_does_not_read_does_not_fill_the_memory(front: Front) -> None:
    sent = [0]

    def pour(connection: socket.socket) -> None:
        while True:
            sent[0] += connection.send(b"x" * (1 << 16))

    def memory_bytes() -> int:
        return int(Path(f"/proc/{front.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    with backend(pour) as address:
        front.point_at(address)
        before = memory_bytes()
        with front.connect() as connection:
            connection.sendall(b"go")
            time.sleep(1.5)
            poured = sent[0]
            time.sleep(0.5)
            assert sent[0] == poured, "the back-pressure does not reach the backend"
            assert memory_bytes() - before < 16 << 20


def test_200_connections_at_once(front: Front) -> None:
    everyone_is_here = threading.Barrier(200)

    def greet(connection: socket.socket) -> None:
        everyone_is_here.wait(30)
        connection.sendall(connection.recv(100))

    def client(number: int) -> bool:
        with front.connect(30) as connection:
            connection.sendall(b"%d" % number)
            return read_all(connection) == b"%d" % number

    with backend(greet) as address, ThreadPoolExecutor(200) as pool:
        front.point_at(address)
        assert all(pool.map(client, range(200)))


def test_new_connections_follow_the_state_and_open_ones_stay(front: Front) -> None:
    def letters(name: bytes) -> Talk:
        def talk(connection: socket.socket) -> None:
            while connection.recv(100):
                connection.sendall(name)

        return talk

    with backend(letters(b"old")) as old, backend(letters(b"new")) as new:
        front.point_at(old, "o")
        with front.connect() as kept:
            kept.sendall(b"?")
            assert kept.recv(10) == b"old"
            front.point_at(new, "n")
            with front.connect() as fresh:
                fresh.sendall(b"?")
                assert fresh.recv(10) == b"new"
            kept.sendall(b"?")
            assert kept.recv(10) == b"old"


def test_a_state_broken_on_disk_does_not_stop_the_traffic(front: Front) -> None:
    with backend(say(b"hello")) as address:
        front.point_at(address)
        assert front.hear() == b"hello"
        front.state.write_text("{broken")
        assert front.hear() == b"hello"
    assert "can't be used" in front.log.read_text()


@pytest.mark.parametrize("pointed", [False, True])
def test_without_a_backend_it_answers_a_503_problem(front: Front, pointed: bool) -> None:
    if pointed:
        front.point_at(f"127.0.0.1:{free_port()}")
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=20)
    # Larger than every buffer between us: an early close would reset the connection and lose the answer.
    connection.request("POST", "/ask", os.urandom(8 << 20))
    response = connection.getresponse()
    problem = json.loads(response.read())
    assert response.status == problem["status"] == 503
    assert response.headers["Content-Type"] == "application/problem+json"
    assert int(response.headers["Retry-After"]) > 0
    assert response.will_close
    assert problem["title"] and "服务" in problem["title_zh"]


def test_a_backend_that_breaks_off_breaks_the_clients_connection_too(front: Front) -> None:
    def break_off(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    with backend(break_off) as address:
        front.point_at(address)
        connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=10)
        connection.request("GET", "/")
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse().read()


def test_a_client_that_leaves_is_told_to_the_backend(front: Front) -> None:
    noticed = threading.Event()

    def wait_for_end(connection: socket.socket) -> None:
        connection.settimeout(10)
        while connection.recv(100):
            continue
        noticed.set()

    with backend(wait_for_end) as address:
        front.point_at(address)
        with front.connect() as connection:
            connection.sendall(b"question")
            time.sleep(0.1)
        assert noticed.wait(5)


def test_sigterm_closes_the_port_and_lets_open_connections_end(front: Front) -> None:
    def slow(connection: socket.socket) -> None:
        connection.recv(100)
        time.sleep(1)
        connection.sendall(b"done" * 1000)

    with backend(slow) as address:
        front.point_at(address)
        with front.connect() as connection:
            connection.sendall(b"?")
            time.sleep(0.2)
            front.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            with pytest.raises(ConnectionRefusedError):
                front.connect()
            assert read_all(connection) == b"done" * 1000
    assert front.process.wait(5) == 0


def test_sigterm_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    front = Front(tmp_path, drain_s=0.5)
    with backend(lambda connection: time.sleep(30)) as address:
        front.point_at(address)
        with front.connect():
            time.sleep(0.2)
            front.process.send_signal(signal.SIGTERM)
            assert front.process.wait(10) == 0


def test_a_taken_port_is_a_users_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        command = [sys.executable, "-m", "components.deploy.front", "--listen", listen, "--state", "/nowhere", "--drain_s", "1"]
        result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=30)
    assert result.returncode == 2
    assert "the port is taken" in result.stderr and "Traceback" not in result.stderr
