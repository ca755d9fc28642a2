"""The curves while a run goes on: TensorBoard, MLflow, energy."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from components.common.errors import UserError
from components.train import mlflow_run
from components.train.energy import EnergyMeter
from components.train.mlflow_run import check_mlflow, without_password
from components.train.run import Run
from components.train.stopping import Stopped
from components.train.tracking import Tracker
from tests.unit.mlflow_server import MlflowServer, mlflow_server
from tests.unit.train_runs import make_run

PROJECT = Path(__file__).resolve().parents[2]
PARAMS = {"learning_rate": 2e-4, "base_model": "Qwen/Qwen2.5-7B-Instruct", "system_prompt": "你" * 9000}
KEY = "k" * 64


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    pytest.importorskip("mlflow", reason="the MLflow client is optional")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_run, "SEND_EVERY_S", 0.0)
    monkeypatch.setattr(mlflow_run, "RETRY_AFTER_S", 0.0)
    with mlflow_server() as state:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", state.uri)
        yield state


def first_steps(run: Run, count: int) -> Run:
    """A run as a checkpoint of an earlier step holds it."""
    points = [point for point in run.evaluations if point.step <= count]
    return Run(run.validation_loss_base, points[-1] if points else None, run.steps[:count], points)


def log_steps(tracker: Tracker, run: Run, after: int, until: int) -> None:
    for step in run.steps[after:until]:
        tracker.log(step.number, step.scalars())
    for point in run.evaluations:
        if after < point.step <= until:
            tracker.log(point.step, {"validation/loss": point.validation_loss})


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def whole_curve(run: Run) -> list[Any]:
    return [(step.number, pytest.approx(step.loss)) for step in run.steps]


def test_tensorboard_can_be_watched_while_the_run_goes_on(tmp_path: Path) -> None:
    run = make_run()
    with Tracker(tmp_path / "logs", PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, run, 0, 10)
        tracker._writer.flush()
        assert len(curve(tmp_path / "logs", "train/loss")) == 10
        log_steps(tracker, run, 10, 40)
        tracker.finish({})
    assert curve(tmp_path / "logs", "train/loss") == whole_curve(run)
    validation = curve(tmp_path / "logs", "validation/loss")
    assert validation == [(0, 3.0), *((point.step, pytest.approx(point.validation_loss)) for point in run.evaluations)]


def test_a_resumed_run_draws_one_unbroken_curve(tmp_path: Path) -> None:
    run, logs = make_run(), tmp_path / "logs"
    with Tracker(logs, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, run, 0, 27)  # killed here; the checkpoint was of step 20
    with Tracker(logs, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(first_steps(run, 20))
        log_steps(tracker, run, 20, 40)
    assert curve(logs, "train/loss") == whole_curve(run)
    assert [step for step, _ in curve(logs, "validation/loss")] == [0, 10, 20, 30, 40]


def test_a_run_resumed_on_another_machine_has_its_former_curve_too(tmp_path: Path) -> None:
    run, logs = make_run(), tmp_path / "logs"
    with Tracker(logs, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(first_steps(run, 20))
        log_steps(tracker, run, 20, 40)
    assert curve(logs, "train/loss") == whole_curve(run)
    assert [step for step, _ in curve(logs, "validation/loss")] == [0, 10, 20, 30, 40]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    run = make_run()
    for count in (30, 5):
        with Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
            tracker.begin(Run(validation_loss_base=3.0))
            log_steps(tracker, run, 0, count)
    assert len(curve(tmp_path, "train/loss")) == 5


def test_mlflow_gets_params_metrics_and_the_texts(tmp_path: Path, server: MlflowServer) -> None:
    check_mlflow()
    run = make_run()
    (tmp_path / "curves").write_text("<html>损失</html>", encoding="utf-8")
    with Tracker(tmp_path / "logs", PARAMS, "adapter", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, run, 0, 40)
        facts = tracker.facts()["mlflow"]
        tracker.finish({"train_curves.html": tmp_path / "curves"})
    assert facts == {"uri": server.uri, "experiment_id": "1", "run_id": "run1", "values_not_sent": 0, "problem": ""}
    assert list(server.experiments) == ["medical-qa"]
    assert server.runs["run1"]["info"]["status"] == "FINISHED"
    assert server.runs["run1"]["info"]["run_name"] == "adapter"
    assert server.params["run1"]["learning_rate"] == "0.0002"
    assert len(server.params["run1"]["system_prompt"]) == 6000, "the server refuses longer ones"
    losses = [(int(metric["step"]), metric["value"]) for metric in server.metrics["run1"] if metric["key"] == "train/loss"]
    assert losses == whole_curve(run)
    assert server.artifacts == {"run1/train_curves.html": "<html>损失</html>"}


def test_the_log_never_shows_the_password(tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri.replace("//", "//user:secret@"))
    with Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        server.down = True
        log_steps(tracker, make_run(), 0, 10)
        facts = tracker.facts()["mlflow"]
        server.down = False
        tracker.finish({})
    shown = "".join(capfd.readouterr())
    assert "WARNING" in shown
    assert "secret" not in shown
    assert "secret" not in json.dumps(facts)


def test_values_are_sent_together_not_one_by_one(tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_run, "SEND_EVERY_S", 60.0)
    with Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, make_run(2000, 500), 0, 2000)
        tracker.finish({})
    assert len(server.metrics["run1"]) == 1 + 4 * 2000 + 4
    assert server.calls.count("runs/log-batch") < 15


def test_a_resumed_run_goes_on_as_the_same_mlflow_run(tmp_path: Path, server: MlflowServer) -> None:
    run = make_run()
    other = Tracker(tmp_path / "other", PARAMS, "other", key="o" * 64)
    other.begin(Run(validation_loss_base=3.0))
    with pytest.raises(Stopped), Tracker(tmp_path / "logs", PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, run, 0, 20)
        raise Stopped(20)
    assert server.runs["run2"]["info"]["status"] == "KILLED"
    other.close_logs()
    with Tracker(tmp_path / "logs", PARAMS, "run", key=KEY) as tracker:
        tracker.begin(first_steps(run, 20))
        assert server.runs["run2"]["info"]["status"] == "RUNNING"
        log_steps(tracker, run, 20, 40)
        tracker.finish({})
    assert list(server.runs) == ["run1", "run2"]
    assert server.runs["run2"]["info"]["status"] == "FINISHED"
    assert [int(metric["step"]) for metric in server.metrics["run2"] if metric["key"] == "train/loss"] == list(range(1, 41))


def test_a_bug_marks_the_mlflow_run_as_failed(tmp_path: Path, server: MlflowServer) -> None:
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        raise ZeroDivisionError
    assert server.runs["run1"]["info"]["status"] == "FAILED"


def test_a_server_that_goes_down_is_one_warning_and_loses_nothing(tmp_path: Path, server: MlflowServer, capsys: Any) -> None:
    run = make_run()
    with Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, run, 0, 10)
        server.down = True
        log_steps(tracker, run, 10, 20)
        assert tracker.facts()["mlflow"]["values_not_sent"] == 4 * 10 + 1
        server.down = False
        log_steps(tracker, run, 20, 40)
        facts = tracker.facts()["mlflow"]
        tracker.finish({})
    assert capsys.readouterr().out.count("WARNING") == 1
    assert facts["values_not_sent"] == 0
    assert "503" in facts["problem"], "the ledger says that there was a gap"
    assert [int(metric["step"]) for metric in server.metrics["run1"] if metric["key"] == "train/loss"] == list(range(1, 41))
    assert curve(tmp_path, "train/loss") == whole_curve(run)


def test_a_server_that_stays_down_never_stops_the_training(tmp_path: Path, server: MlflowServer, capsys: Any) -> None:
    check_mlflow()
    server.down = True
    (tmp_path / "curves.html").write_text("x", encoding="utf-8")
    with Tracker(tmp_path / "logs", PARAMS, "run", key=KEY) as tracker:
        tracker.begin(Run(validation_loss_base=3.0))
        log_steps(tracker, make_run(), 0, 40)
        facts = tracker.facts()["mlflow"]
        tracker.finish({"train_curves.html": tmp_path / "curves.html"})
    assert facts["run_id"] == ""
    assert facts["values_not_sent"] == 1 + 4 * 40 + 4
    assert capsys.readouterr().out.count("WARNING") == 1
    assert len(curve(tmp_path / "logs", "train/loss")) == 40


def test_a_hanging_server_is_not_asked_at_every_step(tmp_path: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_run, "RETRY_AFTER_S", 60.0)
    with Tracker(tmp_path, PARAMS, "run", key=KEY) as tracker:
        server.down = True
        tracker.begin(Run(validation_loss_base=3.0))
        started = time.monotonic()
        log_steps(tracker, make_run(400, 100), 0, 400)
        assert time.monotonic() - started < 2
        server.down = False


def test_a_wrong_address_is_refused_at_the_start_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the MLflow client is optional")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in ("http://user:secret@127.0.0.1:9", "gopher://nowhere", "no address at all"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError) as refused:
            check_mlflow()
        assert "secret" not in str(refused.value)
        assert "MLFLOW_TRACKING_URI" in refused.value.where
        assert "unset MLFLOW_TRACKING_URI" in refused.value.fix


def test_a_missing_client_is_refused_with_the_command_that_installs_it() -> None:
    program = (
        "import sys, importlib.util, os\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'mlflow' else find(name, *rest)\n"
        "from components.common.errors import run_command\n"
        "from components.train.mlflow_run import check_mlflow\n"
        "run_command(check_mlflow)\n"
    )
    environment = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PATH": "/usr/bin"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "pip install mlflow-skinny==" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_an_address_mlflow_is_never_imported() -> None:
    program = "import sys; from components.train.mlflow_run import check_mlflow; check_mlflow(); sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, env={"PATH": "/usr/bin"}, check=False).returncode == 0


def test_the_real_file_store_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the MLflow client is optional")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run, ledger = make_run(), tmp_path / "train_info.json"
    ledger.write_text(json.dumps({"steps": 40}), encoding="utf-8")
    check_mlflow()
    for after, until in ((0, 20), (20, 40)):
        with Tracker(tmp_path / "logs", PARAMS, "run", key=KEY) as tracker:
            tracker.begin(first_steps(run, after))
            log_steps(tracker, run, after, until)
            facts = tracker.facts()["mlflow"]
            if until == 40:
                tracker.finish({"train_info.json": ledger})
    client = mlflow.MlflowClient((tmp_path / "store").as_uri())
    stored = client.get_run(facts["run_id"])
    assert [found.info.run_id for found in client.search_runs([facts["experiment_id"]])] == [facts["run_id"]]
    assert stored.info.status == "FINISHED"
    assert stored.data.params["base_model"] == PARAMS["base_model"]
    assert [metric.step for metric in client.get_metric_history(facts["run_id"], "train/loss")] == list(range(1, 41))
    assert [artifact.path for artifact in client.list_artifacts(facts["run_id"])] == ["train_info.json"]


@pytest.mark.parametrize(
    ("uri", "shown"),
    [("https://me:pw@host:5000/x", "https://host:5000/x"), ("http://host", "http://host"), ("file:///a/b", "file:///a/b")],
)
def test_no_password_in_the_ledger(uri: str, shown: str) -> None:
    assert without_password(uri) == shown


def test_energy_is_power_added_over_time() -> None:
    clock, watts = iter([0.0, 1800.0, 3600.0]), iter([100.0, 300.0, 300.0])
    meter = EnergyMeter(lambda: next(watts), clock=lambda: next(clock))
    meter.sample()
    meter.sample()
    assert meter.wh == pytest.approx(0.5 * 200 + 0.5 * 300)


def test_a_sensor_that_fails_ends_the_counting_and_not_the_training() -> None:
    readings = iter([100.0, 100.0])

    def read_power() -> float:
        try:
            return next(readings)
        except StopIteration:
            raise RuntimeError("GPU is lost") from None

    meter = EnergyMeter(read_power)
    meter.sample()
    assert meter.wh is not None
    meter.sample()
    assert meter.wh is None
    assert "GPU is lost" in meter.note


def test_energy_that_no_device_tells_is_unknown_with_its_reason() -> None:
    meter = EnergyMeter.of_devices(1)
    meter.sample()
    if meter.wh is None:
        assert meter.note
