"""The run ledger: what made an adapter, and what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.common.chat import ChatFormat
from components.train.config import TrainSettings
from components.train.ledger import git_commit, hours, ledger, plan_facts, speed
from components.train.run import Run
from tests.unit.train_runs import CHOICES, make_data, make_plan, make_run

CHAT = ChatFormat("template", "system", 1, (1,), 0)
UNTRACKED = {"energy_wh": None, "energy_note": "a CPU tells no power here", "mlflow": None}
SECONDS = {"load": 1.0, "train": 20.0, "total": 21.004}


def info_of(base: Path, run: Run | None = None, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "run": run or make_run(),
        "data": make_data(dropped=[7]),
        "choices": CHOICES,
        "chat": CHAT,
        "base": base,
        "seconds": SECONDS,
        "tracking": UNTRACKED,
    }
    return ledger(TrainSettings(), make_plan(), **given | changes)


def test_the_ledger_holds_what_made_the_adapter(tiny_model: Path) -> None:
    info = info_of(tiny_model)
    assert json.loads(json.dumps(info, allow_nan=False)) == info, "plain JSON values"
    assert all(len(info[name]) == 64 for name in ("base_fingerprint", "data_digest", "chat_digest"))
    assert len(info["code"]["version"]) == 64
    assert info["plan"]["compute"] == {"device": "cpu", "dtype": "float32", "reason": "device: cpu"}
    assert info["plan"]["rows_a_step"] == 8
    assert info["settings"]["patience"] == 3
    assert not {"dataset", "adapter", "curves", "metrics", "checkpoint_uri"} & info["settings"].keys(), "paths say nothing of the result"
    assert [choice["reason_zh"] for choice in info["choices"]] == [choice.reason_zh for choice in CHOICES]
    assert info["rows"]["train"] == {"used": 2, "dropped": 1, "dropped_lines": [7]}
    assert info["steps"] == 40
    assert info["best_step"] == 30
    assert info["metrics"]["validation_loss"] == min(point["validation_loss"] for point in info["evaluations"])


def test_tokens_are_the_real_ones_and_speed_is_theirs(tiny_model: Path) -> None:
    info = info_of(tiny_model)
    assert (info["tokens"], info["trainable_tokens"]) == (40_000, 24_000)
    assert info["speed"] == {"tokens_per_second": 2000.0, "trainable_tokens_per_second": 1200.0, "median_step_tokens_per_second": 2000.0}
    used = info["utilisation"]
    assert used["flops_per_second"] == pytest.approx(used["flops_per_token"] * 2000)
    assert used["peak_share"] is None


def test_slow_first_steps_do_not_change_the_typical_speed() -> None:
    steps = make_run().steps
    slow_start = [steps[0]._replace(seconds=60.0), *steps[1:]]
    assert speed(slow_start)["tokens_per_second"] < 1000
    assert speed(slow_start)["median_step_tokens_per_second"] == 2000
    assert speed([]) == {}


def test_a_resumed_run_counts_the_hours_of_the_steps_before() -> None:
    run = make_run()
    run.resumed_from = [8, 20]
    once, resumed = hours(make_plan(), make_run(), 36.0), hours(make_plan(), run, 36.0)
    assert once["accelerator"] == resumed["accelerator"] == 0, "no accelerator on a CPU"
    assert resumed["cpu_core"] / once["cpu_core"] == pytest.approx((36 + 20 * 0.5) / 36, rel=0.02)


def test_hours_on_gpus() -> None:
    import torch

    from components.common.device import Compute

    plan = make_plan(compute=Compute(torch.device("cuda"), torch.bfloat16, ""), processes=4)
    assert hours(plan, make_run(), 1800.0)["accelerator"] == 2.0


def test_a_run_that_stopped_at_once_has_a_ledger_too(tiny_model: Path) -> None:
    run = make_run(steps=0)
    run.stopped_because = "the loss of step 1 is nan"
    run.best = run.kept._replace(train_loss=float("nan"), validation_loss=float("inf"))
    run.evaluations.append(run.best)
    info = info_of(tiny_model, run)
    json.dumps(info, allow_nan=False)
    assert info["utilisation"]["why_no_share"] == "no step was made"
    assert info["evaluations"] == [{"step": 0, "train_loss": None, "validation_loss": None}]
    assert "validation_loss" not in info["metrics"]


def test_the_plan_is_whole() -> None:
    facts = plan_facts(make_plan())
    assert facts.keys() == {*vars(make_plan()), "rows_a_step"}


def test_the_commit_of_a_checkout_is_read_from_its_files(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    git, commit = tmp_path / ".git", "a" * 40
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    (git / "packed-refs").write_text(f"# pack-refs\n{'b' * 40} refs/heads/main\n", encoding="utf-8")
    assert git_commit(tmp_path) == "b" * 40
    (git / "refs" / "heads" / "main").write_text(f"{commit}\n", encoding="utf-8")
    assert git_commit(tmp_path) == commit
    (git / "HEAD").write_text(f"{'c' * 40}\n", encoding="utf-8")
    assert git_commit(tmp_path) == "c" * 40


def test_the_commit_of_a_worktree(tmp_path: Path) -> None:
    main, tree = tmp_path / "main" / ".git", tmp_path / "tree"
    (main / "worktrees" / "tree").mkdir(parents=True)
    (main / "worktrees" / "tree" / "HEAD").write_text("ref: refs/heads/side\n", encoding="utf-8")
    (main / "worktrees" / "tree" / "commondir").write_text("../..\n", encoding="utf-8")
    (main / "refs" / "heads").mkdir(parents=True)
    (main / "refs" / "heads" / "side").write_text(f"{'d' * 40}\n", encoding="utf-8")
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {main / 'worktrees' / 'tree'}\n", encoding="utf-8")
    assert git_commit(tree) == "d" * 40
