"""The page of a run, from records of every kind."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.report.page import render_run, render_status
from orchestration.record import STATES, STEPS, RunRecord

VOID = {"meta", "br", "rect", "circle", "line", "path", "polyline", "polygon"}


class Balance(HTMLParser):
    """Fails on a tag that is closed without being open, or left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def check_html(text: str) -> Balance:
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert not [link for link in parser.links if link.startswith(("http", "//"))], "a page loads nothing from elsewhere"
    return parser


def record_of(tmp_path: Path, **states: str) -> RunRecord:
    record = RunRecord.start(tmp_path / "runs", runner="process", parameters={"base_model": "<b>&"})
    for step, state in states.items():
        record.update(step, state=state)
    return record


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_every_step_has_a_page(tmp_path: Path, state: str) -> None:
    record = record_of(tmp_path, **dict.fromkeys(STEPS, state))
    text = render_run(record.facts, record.folder, record.folder)
    check_html(text)
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text


def test_a_run_with_everything(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    adapter = record.folder / "adapter"
    adapter.mkdir()
    info = {"evaluations": [{"step": 2, "train_loss": 3.0, "validation_loss": 2.5}], "metrics": {"validation_loss_base": 4.0}}
    (adapter / "train_info.json").write_text(json.dumps(info))
    answers = {"tuned": {"answer": "微调回答 <script>"}, "base": {"answer": "基座回答"}}
    results = {
        "reasons": [{"rule": "nll", "passed": True, "english": "Better.", "chinese": "更好。"}],
        "rows": [{"question": "问", "reference": "答", **answers}],
    }
    (record.folder / "results").write_text(json.dumps(results))
    (record.folder / "report").write_text("<html>")
    (record.folder / "report.html").hardlink_to(record.folder / "report")
    artifact = {"type": "system.Artifact", "metadata": {}}
    record.update(
        "train",
        state="succeeded",
        seconds=3.2,
        log="logs/train.log",
        outputs={"parameters": {}, "artifacts": {"adapter": artifact | {"uri": str(adapter)}}},
    )
    evaluated = {"results": artifact | {"uri": str(record.folder / "results")}, "report": artifact | {"uri": str(record.folder / "report")}}
    evaluated["metrics"] = {"type": "system.Metrics", "uri": "/x", "metadata": {"tuned_nll": 1.25}}
    record.update("evaluate", state="cached", source_run="r0", outputs={"parameters": {"decision": "promote"}, "artifacts": evaluated})
    rollout = artifact | {"uri": "/y", "metadata": {"url": "http://127.0.0.1:8000", "digest": "abc", "outcome": "rolled_out"}}
    record.update("deploy", state="succeeded", outputs={"parameters": {}, "artifacts": {"rollout": rollout}})
    text = render_run(record.facts, record.folder, record.folder)
    parser = check_html(text)
    for part in (
        "polyline",
        "更好。",
        "微调回答 &lt;script&gt;",
        "基座回答",
        "1.25",
        "curl -s http://127.0.0.1:8000/ask",
        "run r0",
        "promote",
    ):
        assert part in text, part
    assert {"logs/train.log", "results", "report.html", "adapter"} <= set(parser.links)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", None])
def test_broken_files_of_a_failed_step_do_not_break_the_page(tmp_path: Path, content: bytes | None) -> None:
    record = record_of(tmp_path)
    if content is not None:
        (record.folder / "results").write_bytes(content)
    results = {"results": {"type": "system.Artifact", "uri": str(record.folder / "results"), "metadata": {}}}
    record.update("evaluate", state="failed", reason="it broke", outputs={"parameters": {"decision": "hold"}, "artifacts": results})
    text = render_run(record.facts, record.folder, record.folder)
    check_html(text)
    assert "it broke" in text


def test_on_a_cluster_the_final_status_is_shown() -> None:
    status: dict[str, Any] = {
        "state": "FAILED",
        "pipelineJobResourceName": "medical-qa-x",
        "pipelineTaskName": "pipeline",
        "error": {"message": "task <train> failed"},
    }
    text = render_status(status)
    check_html(text)
    assert "FAILED" in text and "medical-qa-x" in text and "task &lt;train&gt; failed" in text


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "components.report", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_the_command(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    page = tmp_path / "page.html"
    result = command("--run_record", str(record.path), "--page", str(page))
    assert result.returncode == 0 and record.id in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "is not JSON"), ("{}", "is not one of ours")])
def test_bad_records_are_clear_errors(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    result = command("--run_record", str(path), "--page", str(tmp_path / "page.html"))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "page.html").exists()
