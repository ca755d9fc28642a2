"""The endpoints over a real port: answers, refusals, hostile requests."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.engine import Completion
from tests.unit.serve_support import FACTS, LocalService, assert_problem, local_service, store_served_model, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def service(tiny_model: Path, folder: Path) -> Iterator[LocalService]:
    with local_service(store_served_model(tiny_model, folder), folder) as service:
        yield service


def test_overview_names_every_endpoint(service: LocalService) -> None:
    with service.client() as client:
        overview = client.get("/").json()
        documented = client.get("/openapi.json").json()["paths"]
    listed = {(entry["method"], entry["path"]) for entry in overview["endpoints"]}
    assert listed - {("GET", "/docs")} == {(method.upper(), path) for path, methods in documented.items() for method in methods}
    assert all(entry["summary"] and entry["summary_zh"] for entry in overview["endpoints"])
    assert overview["disclaimer"]["en"] and overview["disclaimer"]["zh"]


def test_docs_need_no_other_host(service: LocalService) -> None:
    with service.client() as client:
        page = client.get("/docs").text
        assert "https://" not in page
        for asset in ("/static-offline-docs/swagger-ui-bundle.js", "/static-offline-docs/swagger-ui.css"):
            assert asset in page
            assert client.get(asset).status_code == 200


def test_an_answer_says_where_it_came_from(service: LocalService, tiny_rows: list[dict[str, str]]) -> None:
    response = service.ask(question=tiny_rows[0]["question"], max_length=64)
    assert response.status_code == 200
    answer = response.json()
    assert answer["answer"]
    assert answer["id"] == response.headers["x-request-id"]
    assert answer["model_digest"] == service.runtime.ready_model().digest
    assert (answer["adapter_digest"], answer["data_digest"]) == (FACTS["adapter_digest"], FACTS["data_digest"])
    assert answer["finish_reason"] in ("stop", "length")
    assert 0 < answer["completion_tokens"] <= 64
    assert answer["prompt_tokens"] == len(service.runtime.ready_model().prompt_ids(tiny_rows[0]["question"]))
    assert answer["time_s"] > 0


def test_disclaimer_and_warnings_speak_the_questions_language(service: LocalService) -> None:
    chinese, english = service.ask(question="头疼怎么办", max_length=2).json(), service.ask(question="My head hurts", max_length=2).json()
    assert (chinese["language"], english["language"]) == ("zh", "en")
    assert "医生" in chinese["disclaimer"] and "doctor" in english["disclaimer"]
    assert chinese["finish_reason"] == english["finish_reason"] == "length"
    assert "截断" in chinese["warnings"][0] and "cut" in english["warnings"][0]


def test_greedy_by_default_so_equal_questions_get_equal_answers(service: LocalService) -> None:
    answers = {service.ask(question="糖尿病吃什么", max_length=48).json()["answer"] for _ in range(3)}
    assert len(answers) == 1
    hot = {service.ask(question="糖尿病吃什么", max_length=48, temperature=1.8).json()["answer"] for _ in range(3)}
    assert len(hot | answers) > 1


def test_max_tokens_is_max_length(service: LocalService) -> None:
    assert service.ask(question="感冒", max_tokens=3).json()["completion_tokens"] == 3
    assert_problem(service.ask(question="感冒", max_tokens=3, max_length=3), 422, "invalid-request")


def test_history_belongs_to_the_prompt(service: LocalService) -> None:
    history = [{"role": "user", "content": "我有高血压"}, {"role": "assistant", "content": "请监测血压。"}]
    alone = service.ask(question="能喝酒吗", max_length=4).json()["prompt_tokens"]
    assert service.ask(question="能喝酒吗", max_length=4, history=history).json()["prompt_tokens"] > alone


def test_model_info(service: LocalService) -> None:
    with service.client() as client:
        info = client.get("/model_info").json()
    assert info["model_digest"] == service.runtime.ready_model().digest
    assert info["verified"] is True
    assert info["facts"] == FACTS
    assert len(info["chat_digest"]) == 64
    assert info["parameters"] > 100_000
    assert (info["precision"], info["max_new_tokens"], info["max_concurrency"]) == ("float32", 448, 4)
    assert info["max_prompt_tokens"] == 1024 - 448


def test_a_request_id_is_taken_over_only_if_it_is_harmless(service: LocalService) -> None:
    with service.client() as client:
        assert client.get("/health", headers={"X-Request-ID": "run-7.A_b"}).headers["x-request-id"] == "run-7.A_b"
        for bad in ("a b", "x" * 65, "é", "<script>"):
            assert client.get("/health", headers={b"X-Request-ID": bad.encode()}).headers["x-request-id"] != bad


HOSTILE: list[tuple[str, Any]] = [
    ("NaN temperature", '{"question":"a","temperature":NaN}'),
    ("Infinity", '{"question":"a","temperature":Infinity}'),
    ("-Infinity", '{"question":"a","temperature":-Infinity}'),
    ("1e999", '{"question":"a","temperature":1e999}'),
    ("NaN top_p", '{"question":"a","top_p":NaN}'),
    ("temperature over the bound", '{"question":"a","temperature":2.0000001}'),
    ("temperature almost zero", '{"question":"a","temperature":1e-320}'),
    ("negative temperature", '{"question":"a","temperature":-0.1}'),
    ("temperature as text", '{"question":"a","temperature":"0.7"}'),
    ("temperature as bool", '{"question":"a","temperature":true}'),
    ("temperature null", '{"question":"a","temperature":null}'),
    ("temperature list", '{"question":"a","temperature":[]}'),
    ("max_length zero", '{"question":"a","max_length":0}'),
    ("max_length negative", '{"question":"a","max_length":-1}'),
    ("max_length float", '{"question":"a","max_length":64.0}'),
    ("max_length above the limit", '{"question":"a","max_length":449}'),
    ("max_length huge", '{"question":"a","max_length":1000000000}'),
    ("max_length of 5,000 digits", '{"question":"a","max_length":' + "9" * 5000 + "}"),
    ("top_p zero", '{"question":"a","top_p":0}'),
    ("question missing", "{}"),
    ("question empty", '{"question":""}'),
    ("question blank", '{"question":" \\t\\n\\u3000"}'),
    ("question only private marks", '{"question":"\\ue0f0\\ue0f1"}'),
    ("question null", '{"question":null}'),
    ("question number", '{"question":5}'),
    ("question list", '{"question":["a"]}'),
    ("lone surrogate", '{"question":"\\ud800"}'),
    ("lone surrogate in a text", '{"question":"头疼\\udfff怎么办"}'),
    ("lone surrogate as key", '{"question":"a","\\ud800":1}'),
    ("unknown key", '{"question":"a","n":100000000}'),
    ("body an array", "[]"),
    ("body a number", "5"),
    ("body null", "null"),
    ("body empty", ""),
    ("half a body", '{"question": "a"'),
    ("garbage behind", '{"question":"a"} x'),
    ("deep nesting", "[" * 50_000),
    ("invalid UTF-8", b'{"question":"\xff\xfe"}'),
    ("history not a list", '{"question":"a","history":"b"}'),
    ("history with a system turn", '{"question":"a","history":[{"role":"system","content":"x"},{"role":"assistant","content":"y"}]}'),
    ("history out of turn", '{"question":"a","history":[{"role":"assistant","content":"x"}]}'),
    ("history with an open question", '{"question":"a","history":[{"role":"user","content":"x"}]}'),
    ("history item broken", '{"question":"a","history":[5]}'),
    ("too many turns", json.dumps({"question": "a", "history": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 17})),
    ("too many characters", json.dumps({"question": "a" * 20_001})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "body"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_d43_a_hostile_request_gets_a_problem_and_harms_nobody(service: LocalService, name: str, body: str | bytes) -> None:
    content = body if isinstance(body, bytes) else body.encode()
    with service.client() as client:
        started = time.monotonic()
        response = client.post("/ask", content=content, headers={"content-type": "application/json"})
        assert time.monotonic() - started < 2
        assert response.status_code in (400, 413, 422), f"{name}: {response.status_code} {response.text}"
        problem = assert_problem(response, response.status_code, response.json()["type"].removeprefix("/problems/"))
        assert "pydantic" not in response.text
        for fault in problem["errors"]:
            assert fault["detail"] and fault["detail_zh"] and "{" not in fault["detail"]
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body", [{"temperature": -0.0}, {"temperature": 2}, {"temperature": 0}, {"top_p": 1}, {"question": "\x00\u202e头疼" + "\u0301" * 50}]
)
def test_odd_but_valid_values_are_answered(service: LocalService, body: dict[str, Any]) -> None:
    assert service.ask(**({"question": "头疼", "max_length": 2} | body)).status_code == 200


def test_a_question_longer_than_the_context_names_the_limit(service: LocalService) -> None:
    problem = assert_problem(service.ask(question="Pneumonoultra " * 600), 413, "question-too-long")
    assert "576" in problem["detail"] and "576" in problem["detail_zh"]


def test_the_limit_of_max_length_is_named(service: LocalService) -> None:
    assert "448" in assert_problem(service.ask(question="a", max_length=449), 422, "invalid-request")["detail"]


def test_other_addresses_methods_and_types(service: LocalService) -> None:
    with service.client() as client:
        assert_problem(client.get("/nothing/<script>"), 404, "not-found")
        wrong = client.get("/ask")
        assert_problem(wrong, 405, "method-not-allowed")
        assert wrong.headers["allow"] == "POST"
        assert_problem(client.post("/ask", content=b'{"question":"a"}', headers={"content-type": "text/plain"}), 422, "invalid-request")
        assert_problem(client.post("/ask", data={"question": "a"}), 422, "invalid-request")


def test_nothing_that_was_sent_comes_back_in_a_problem(service: LocalService) -> None:
    secret = "张三的乙肝"
    bodies = [{secret: 1, "question": "a"}, {"question": [secret]}, {"question": "a", "temperature": secret}]
    bodies += [{"question": "a", "history": [{"role": secret, "content": "x"}]}]
    with service.client() as client:
        for body in bodies:
            assert secret not in assert_problem(client.post("/ask", json=body), 422, "invalid-request")["detail"]
            assert secret not in client.post("/ask", json=body).text
        assert secret not in client.get(f"/{secret}").text


def test_a_large_body_is_refused_whether_its_length_is_told_or_not(service: LocalService) -> None:
    large = json.dumps({"question": "a" * 600_000}).encode()
    with service.client() as client:
        headers = {"content-type": "application/json"}
        assert_problem(client.post("/ask", content=large, headers=headers), 413, "body-too-large")
        chunks = (large[i : i + 8192] for i in range(0, len(large), 8192))
        assert_problem(client.post("/ask", content=chunks, headers=headers), 413, "body-too-large")
        assert client.get("/health").status_code == 200


def test_a_body_that_never_ends_is_given_up(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.serve.envelope.BODY_TIMEOUT_S", 0.3)
    with socket.create_connection(service.address) as connection:
        connection.sendall(b'POST /ask HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"question')
        connection.settimeout(10)
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_d43_a_bug_gives_a_problem_without_a_trace(service: LocalService, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RuntimeError("张三的乙肝 at line 7")

    monkeypatch.setattr(service.runtime, "answer", broken)
    response = service.ask(question="头疼")
    assert_problem(response, 500, "internal")
    assert "乙肝" not in response.text and "line 7" not in response.text
    log_file = folder / "service.log"
    wait_until(lambda: response.headers["x-request-id"] in log_file.read_text(encoding="utf-8"))  # written once the response is out
    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    line = next(line for line in lines if line.get("request_id") == response.headers["x-request-id"])
    assert (line["level"], line["error"], line["status"]) == ("ERROR", "RuntimeError", 500)
    assert any("broken" in frame for frame in line["where"])
    assert "乙肝" not in json.dumps(lines, ensure_ascii=False)


def test_an_empty_answer_is_said_to_be_empty(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: Any) -> Completion:
        return Completion([], "stop")

    monkeypatch.setattr(service.runtime, "_generate", nothing)
    answer = service.ask(question="头疼").json()
    assert (answer["answer"], answer["completion_tokens"]) == ("", 0)
    assert answer["warnings"] == ["模型没有给出回答。"]
