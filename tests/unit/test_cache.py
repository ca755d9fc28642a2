"""Which steps need not run again, and why."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.common.errors import UserError
from components.common.storage import store_model
from orchestration.cache import ExplainedCache, describe_outputs, restore_outputs
from orchestration.local import step_code_digest
from orchestration.record import RunRecord

DECLARED = {"comp-merge": {"adapter", "base_model", "storage_uri"}}
COMMAND = ["python", "-m", "components.merge"]


class Asker:
    """A run that asks the cache about the merge step."""

    def __init__(self, folder: Path, code: str = "c1", replay: RunRecord | None = None, only: str | None = None) -> None:
        self.record = RunRecord.start(folder / "runs", runner="process", parameters={})
        self.lines: list[str] = []
        self.cache = ExplainedCache(
            str(folder / "cache"),
            record=self.record,
            code_of=lambda *_: code,
            replay=replay,
            only=only,
            say=lambda step, line: self.lines.append(f"{step}: {line}"),
            declared=DECLARED,
        )

    def key(self, **changes: Any) -> str:
        arguments = {"base_model": "b", "storage_uri": "s", "adapter": adapter("/run1/adapter"), "pipelinechannel--image": "any"} | changes
        return self.cache.compute_key("comp-merge", "image", COMMAND, arguments)


def adapter(uri: str, digest: str = "d1") -> dsl.Model:
    return dsl.Model(name="adapter", uri=uri, metadata={"digest": digest})


def merged(folder: Path) -> dict[str, Any]:
    """Outputs of a merge step: a stored model and a small artifact."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (folder / "info").write_text("{}")
    uri, _ = store_model(model, str(folder / "storage"))
    return {"model_uri": uri, "merge_info": dsl.Artifact(name="merge_info", uri=str(folder / "info"), metadata={"kl": 0.5})}


def test_an_equal_step_is_taken_and_the_run_it_came_from_is_named(tmp_path: Path) -> None:
    first = Asker(tmp_path)
    assert first.cache.get(first.key()) is None and first.lines == ["merge: runs: it never ran before"]
    first.cache.put(first.key(), merged(tmp_path))
    second = Asker(tmp_path)
    outputs = second.cache.get(second.key())
    assert outputs is not None and outputs["merge_info"].metadata == {"kl": 0.5}
    assert second.lines == [f"merge: taken from the cache: same code, settings and inputs as in run {first.record.id}"]
    assert second.record.step("merge")["state"] == "cached"


def test_content_decides_not_the_place(tmp_path: Path) -> None:
    asker = Asker(tmp_path)
    assert asker.key() == asker.key(adapter=adapter("/run2/elsewhere")) == asker.key(**{"pipelinechannel--image": "other"})
    assert asker.key() != asker.key(adapter=adapter("/run1/adapter", "d2"))
    assert asker.key() != asker.key(base_model="b2")
    assert asker.key() != Asker(tmp_path, code="c2").key()


def test_a_folder_that_changed_is_another_input(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "weights").write_text("1")
    before = Asker(tmp_path).key(base_model=str(base))
    assert Asker(tmp_path).key(base_model=str(base)) == before
    (base / "weights").write_text("12")
    assert Asker(tmp_path).key(base_model=str(base)) != before


def test_a_miss_says_what_changed(tmp_path: Path) -> None:
    first = Asker(tmp_path)
    first.cache.put(first.key(), merged(tmp_path))
    second = Asker(tmp_path, code="c2")
    assert second.cache.get(second.key(base_model="b2")) is None
    assert second.lines == ["merge: runs: changed since the last time: code; base_model b → b2"]


def test_d35_a_deleted_model_is_no_hit(tmp_path: Path) -> None:
    first = Asker(tmp_path)
    first.cache.put(first.key(), merged(tmp_path))
    shutil.rmtree(tmp_path / "storage")
    second = Asker(tmp_path)
    assert second.cache.get(second.key()) is None
    assert "its model was deleted" in second.lines[0]


def test_d35_a_deleted_artifact_is_no_hit(tmp_path: Path) -> None:
    first = Asker(tmp_path)
    first.cache.put(first.key(), merged(tmp_path))
    (tmp_path / "info").unlink()
    second = Asker(tmp_path)
    assert second.cache.get(second.key()) is None
    assert second.lines == ["merge: runs: its earlier outputs are gone"]


def test_a_rerun_takes_the_past_runs_outputs_or_names_what_is_gone(tmp_path: Path) -> None:
    past = Asker(tmp_path)
    past.record.update("merge", state="succeeded", outputs=describe_outputs(merged(tmp_path)))
    rerun = Asker(tmp_path, replay=past.record, only="evaluate")
    outputs = rerun.cache.get(rerun.key(base_model="changed"))
    assert outputs is not None and outputs["model_uri"].startswith("file://")
    alone = Asker(tmp_path, replay=past.record, only="merge")
    assert alone.cache.get(alone.key()) is None, "the one step that was asked for runs"
    shutil.rmtree(tmp_path / "storage")
    with pytest.raises(UserError, match="output of merge in the past run was deleted"):
        restore_outputs(past.record.step("merge")["outputs"], "merge")


def test_each_step_has_its_own_code_digest() -> None:
    assert len({step_code_digest(step) for step in ("prepare", "train", "merge", "evaluate")}) == 4
    assert step_code_digest("train") == step_code_digest("train")
