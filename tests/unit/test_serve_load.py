"""Many clients, impatient clients, a dead engine, and a change of model under load."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.serve.admission import Admission
from components.serve.config import ServeSettings
from components.serve.model import is_allowed
from components.serve.problems import Problem
from tests.unit.serve_support import LONG, LocalService, assert_problem, local_service, store_served_model, wait_until


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def model_uri(tiny_model: Path, root: Path) -> str:
    return store_served_model(tiny_model, root)


@pytest.fixture(scope="module")
def other_uri(tiny_model: Path, root: Path, model_uri: str) -> str:
    return store_served_model(tiny_model, root, note="second")


@pytest.fixture(scope="module")
def service(model_uri: str, root: Path) -> Iterator[LocalService]:
    with local_service(model_uri, root, max_concurrency=4) as service:
        yield service


def send_ask(service: LocalService, **question: Any) -> socket.socket:
    """A connection on which a question was sent; nobody has read the answer yet."""
    body = json.dumps(question).encode()
    connection = socket.create_connection(service.address)
    connection.sendall(
        b"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    return connection


@pytest.mark.parametrize("goodbye", ["close", "reset", "half-close"])
def test_d41_a_client_that_leaves_stops_its_generation(service: LocalService, goodbye: str, root: Path) -> None:
    connection = send_ask(service, **LONG)
    wait_until(lambda: service.active() == 1)
    if goodbye == "half-close":
        connection.shutdown(socket.SHUT_WR)
    elif goodbye == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()
    else:
        connection.close()
    left = time.monotonic()
    wait_until(lambda: service.active() == 0)
    assert time.monotonic() - left < 1, "an answer of 400 tokens takes longer than that"
    engine = service.runtime.ready_model().engine
    steps = engine._manager.current_batch
    time.sleep(0.3)
    assert engine._manager.current_batch == steps
    wait_until(lambda: '"client-left"' in (root / "service.log").read_text(encoding="utf-8").splitlines()[-1])
    health = service.runtime.health()
    assert (health.running, health.waiting) == (0, 0)


def test_leaving_neighbours_do_not_disturb_an_answer(service: LocalService) -> None:
    expected = service.ask(question="糖尿病吃什么", max_length=64).json()["answer"]
    leavers = [send_ask(service, **LONG) for _ in range(6)]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(service.ask, question="糖尿病吃什么", max_length=64)
        for connection in leavers:
            time.sleep(0.02)
            connection.close()
        assert answer.result().json()["answer"] == expected
    wait_until(lambda: service.active() == 0)


def test_d46_the_queue_is_bounded_and_says_when_to_come_back(model_uri: str, tmp_path: Path) -> None:
    with local_service(model_uri, tmp_path, max_concurrency=1, max_queue=1) as service, ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            service.ask(question="头疼", max_length=16)
        admitted = [pool.submit(service.ask, **LONG) for _ in range(2)]
        wait_until(lambda: service.runtime.health().waiting == 1)
        assert service.runtime.health().running == 1
        for _ in range(3):
            started = time.monotonic()
            refused = service.ask(question="头疼")
            assert time.monotonic() - started < 0.5
            assert_problem(refused, 503, "queue-full")
            assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert [future.result().status_code for future in admitted] == [200, 200]
        assert service.ask(question="头疼", max_length=4).status_code == 200


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("components.serve.admission.time.monotonic", lambda: now)
    admission = Admission(max_concurrency=2, max_queue=2, longest_wait_s=60)
    for _ in range(4):
        admission.enter()
    assert (admission.running, admission.waiting) == (2, 2)
    with pytest.raises(Problem) as refused:
        admission.enter()
    assert refused.value.headers == {"Retry-After": "20"}, "a guess, before anything was measured"
    for _ in range(3):
        now += 2
        admission.leave(answered=True)
    assert admission.drain_time_s() == pytest.approx(2)
    admission.leave(answered=False)
    now += 3600  # an idle hour
    for _ in range(4):
        admission.enter()
    now += 2
    admission.leave(answered=True)
    admission.enter()
    assert admission.drain_time_s() == pytest.approx(8), "idle time says nothing about the speed"
    now += 1000
    admission.leave(answered=True)
    admission.enter()
    assert admission.drain_time_s() == 60, "nobody waits longer than one request's time limit"


def test_the_time_limit_counts_waiting_and_stops_the_engine(model_uri: str, tmp_path: Path) -> None:
    with local_service(model_uri, tmp_path, max_concurrency=1, request_timeout_s=0.4) as service, ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        responses = list(pool.map(lambda _: service.ask(**LONG), range(3)))
        assert time.monotonic() - started < 3
        for response in responses:
            problem = assert_problem(response, 504, "timeout")
            assert "0.4" in problem["detail"] and "0.4" in problem["detail_zh"]
        wait_until(lambda: service.active() == 0)


def test_d42_a_dead_engine_is_told_by_health_and_by_every_request(model_uri: str, tmp_path: Path) -> None:
    with local_service(model_uri, tmp_path) as service, ThreadPoolExecutor(2) as pool, service.client() as client:
        running = [pool.submit(service.ask, **LONG) for _ in range(2)]
        wait_until(lambda: service.active() == 2)

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("device lost")

        service.runtime.ready_model().engine.model.forward = broken
        for future in running:
            assert_problem(future.result(), 503, "engine-dead")
        wait_until(lambda: client.get("/health").status_code == 503)
        for response in (client.get("/health"), client.get("/model_info"), service.ask(question="头疼")):
            assert_problem(response, 503, "engine-dead")
            assert int(response.headers["retry-after"]) >= 1
        assert client.post("/reload_model").status_code == 200, "a reload mends it"
        assert client.get("/health").status_code == 200
        assert service.ask(question="头疼", max_length=4).status_code == 200


def test_reload_changes_the_model(service: LocalService, model_uri: str, other_uri: str) -> None:
    with service.client() as client:
        first = service.runtime.ready_model()
        changed = client.post("/reload_model", json={"model_uri": other_uri}).json()
        assert (changed["former_digest"], changed["changed"]) == (first.digest, True)
        assert changed["model_digest"] != first.digest
        assert service.ask(question="头疼", max_length=4).json()["model_digest"] == changed["model_digest"]
        assert client.get("/model_info").json()["model_uri"] == other_uri
        assert first.engine.model is None, "the former model's memory is free"
        back = client.post("/reload_model", json={"model_uri": model_uri}).json()
        assert back["model_digest"] == first.digest
        same = client.post("/reload_model").json()
        assert (same["model_digest"], same["changed"]) == (first.digest, False)


@pytest.mark.parametrize("damage", ["cut weights", "no manifest facts", "other prompts", "not there", "weights of NaN", "not a model"])
def test_a_bad_model_is_refused_and_the_former_answers_on(
    service: LocalService, damage: str, tiny_model: Path, root: Path, tmp_path: Path
) -> None:
    former = service.runtime.ready_model().digest
    bad = Path(store_served_model(tiny_model, tmp_path, note=damage).removeprefix("file://"))
    here = root / "store" / "models" / damage.replace(" ", "-")
    shutil.copytree(bad, here)
    if damage == "cut weights":
        weights = here / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
    elif damage == "no manifest facts":
        (here / "manifest.json").write_text("{}", encoding="utf-8")
    elif damage == "other prompts":
        (here / "manifest.json").unlink()
        (here / "chat_format.json").write_text("{}", encoding="utf-8")
    elif damage == "not there":
        shutil.rmtree(here)
    elif damage == "weights of NaN":
        make_every_weight_nan(here)
    else:
        (here / "manifest.json").unlink()
        (here / "config.json").write_text('{"architectures": ["BertModel"]}', encoding="utf-8")
    with service.client() as client:
        response = client.post("/reload_model", json={"model_uri": str(here)})
        problem = assert_problem(response, 422, "reload-refused")
        assert problem["detail"] != problem["title"], "it says why"
        assert client.get("/health").json()["model_digest"] == former
    assert service.ask(question="头疼", max_length=4).json()["model_digest"] == former


def make_every_weight_nan(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    (folder / "manifest.json").unlink()
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_reload_refuses_addresses_outside_the_roots(service: LocalService, root: Path, tmp_path: Path) -> None:
    (root / "store" / "models" / "link").symlink_to(tmp_path)
    inside = str(root / "store" / "models")
    outside = [
        "/etc",
        str(root),
        f"{inside}/../../x",
        f"file://{inside}/../..",
        f"{inside}/link",
        "http://169.254.169.254/x",
        "s3://bucket/x",
    ]
    with service.client() as client:
        for address in (*outside, f"{inside}x", "relative", "~", "\0"):
            assert_problem(client.post("/reload_model", json={"model_uri": address}), 403, "model-not-allowed")
        assert_problem(client.post("/reload_model", json={"model_uri": ""}), 422, "invalid-request")
        assert_problem(client.post("/reload_model", json={"uri": "x"}), 422, "invalid-request")


def test_roots_may_be_named() -> None:
    settings = ServeSettings(model_uri="s3://models/a/b", allowed_model_roots="s3://models/released, /srv/models")
    for address in ("s3://models/released/x", "s3://models/released", "/srv/models/x", "file:///srv/models/x"):
        assert is_allowed(address, settings), address
    for address in (
        "s3://models/a/b",
        "s3://models/released-not/x",
        "s3://models/released/../a",
        "/srv/models/../x",
        "s3://models/released/?x",
    ):
        assert not is_allowed(address, settings), address
    beside = ServeSettings(model_uri="s3://models/a/b")
    assert is_allowed("s3://models/a/c", beside) and not is_allowed("s3://models/other/c", beside)
    assert is_allowed("/model", ServeSettings(model_uri="/model")) and not is_allowed("/etc", ServeSettings(model_uri="/model"))


def test_one_reload_at_a_time(service: LocalService) -> None:
    with ThreadPoolExecutor(3) as pool, service.client() as client:
        responses = list(pool.map(lambda _: client.post("/reload_model"), range(3)))
    assert sorted(response.status_code for response in responses) == [200, 409, 409]
    for response in responses:
        if response.status_code == 409:
            assert_problem(response, 409, "reload-running")


def reload_under_load(service: LocalService, uris: list[str]) -> None:
    """Reload every model in turn while clients ask without a pause; no request may fail."""
    stop = threading.Event()

    def user(number: int) -> list[tuple[int, str]]:
        seen = []
        with service.client() as client:
            while not stop.is_set():
                response = client.post("/ask", json={"question": f"头疼{number}怎么办", "max_length": 24})
                seen.append((response.status_code, response.json().get("model_digest", "")))
        return seen

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(user, number) for number in range(3)]
        digests = {service.runtime.ready_model().digest}
        try:
            with service.client() as client:
                for uri in uris:
                    response = client.post("/reload_model", json={"model_uri": uri})
                    assert response.status_code == 200, response.text
                    digests.add(response.json()["model_digest"])
        finally:
            stop.set()
        answers = [answer for future in users for answer in future.result()]
    assert {status for status, _ in answers} == {200}
    assert {digest for _, digest in answers} == digests


def test_d45_reloads_under_load_lose_no_request(service: LocalService, model_uri: str, other_uri: str) -> None:
    reload_under_load(service, [other_uri, model_uri, other_uri])


def engine_threads() -> int:
    """How many engines deliver outputs in this process, those of other tests included."""
    return sum(thread.name == "engine-outputs" for thread in threading.enumerate())


@pytest.mark.slow
def test_d45_twenty_reloads_keep_the_memory_flat(model_uri: str, other_uri: str, tmp_path: Path) -> None:
    with local_service(model_uri, tmp_path) as service:
        reload_under_load(service, [other_uri, model_uri] * 2)
        before, threads = resident_bytes(), engine_threads()
        reload_under_load(service, [other_uri, model_uri] * 10)
        assert resident_bytes() < before * 1.05
        assert engine_threads() == threads


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_counts_are_zero_after_all_this(service: LocalService) -> None:
    async def storm() -> None:
        async with httpx.AsyncClient(base_url=service.url, timeout=30, trust_env=False) as client:
            asks = [asyncio.create_task(client.post("/ask", json=LONG)) for _ in range(20)]
            await asyncio.sleep(0.5)
            for ask in asks[::2]:
                ask.cancel()
            await asyncio.gather(*asks, return_exceptions=True)

    asyncio.run(storm())
    wait_until(lambda: service.active() == 0)
    wait_until(lambda: service.runtime.health().running == 0)
    assert service.runtime.ready_model().running == 0
    assert not service.runtime.ready_model().engine._requests
