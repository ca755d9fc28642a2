"""The run at an MLflow server, where MLFLOW_TRACKING_URI names one. A server that goes down later never stops a training."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components.common.errors import UserError, first_line

CLIENT = "mlflow-skinny==3.17.2"  # the client alone: the server's own package is ten times as large
EXPERIMENT = "medical-qa"
SEND_EVERY_S = 5.0
RETRY_AFTER_S = 60.0
BATCH_METRICS = 1000  # the server's limit
PARAM_CHARACTERS = 6000  # likewise
RUN_TAG = "run_key"
# A server that hangs may hold a step up, but not for the client's own four minutes; its messages would show a password of the address.
# What the user sets counts first.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def check_mlflow() -> None:
    """Refuse a tracking server that can't be used, before anything heavy is loaded.

    Raises:
        UserError: MLFLOW_TRACKING_URI is set, but the client is not installed, or the server does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return
    if importlib.util.find_spec("mlflow") is None:
        raise UserError(
            "MLFLOW_TRACKING_URI is set, but the MLflow client is not installed", fix=f"pip install {CLIENT}, or unset MLFLOW_TRACKING_URI"
        )
    try:
        _experiment_id(_client(uri))
    except _errors() as error:
        raise UserError(
            f"MLflow can't be used: {_message(error, uri)}",
            where=f"MLFLOW_TRACKING_URI={without_password(uri)}",
            fix="check the address and that the server runs, or unset MLFLOW_TRACKING_URI",
        ) from None


class MlflowRun:
    """A run at the server; values wait here while it does not answer.

    Args:
        key: the digest of all that decides the result; a run that is resumed is found by it.
    """

    def __init__(self, uri: str, params: Mapping[str, Any], name: str, key: str) -> None:
        self.uri, self.name, self.key = uri, name, key
        self.params = {param: str(value)[:PARAM_CHARACTERS] for param, value in params.items()}
        self.run_id = self.experiment_id = self.problem = ""
        self._client: Any = None
        self._resumed = False
        self._waiting: list[Any] = []
        self._next_send = 0.0

    def begin(self, *, resumed: bool) -> None:
        """Start a run, or take up the one that an earlier process began."""
        self._resumed = resumed
        self._attempt(self._connect)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note values; they are sent every few seconds."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now_ms, step) for name, value in values.items()]
        if time.monotonic() >= self._next_send:
            self._attempt(self._send)

    def flush(self) -> None:
        """Send what waits."""
        self._attempt(self._send)

    def finish(self, artifacts: Mapping[str, Path]) -> None:
        """Send what waits and the text files `artifacts`, by name, and close the run."""
        self.flush()
        for name, path in artifacts.items():
            self._attempt(lambda name=name, path=path: self._client.log_text(self.run_id, path.read_text(encoding="utf-8"), name))  # type: ignore[misc]
        self.end("FINISHED")

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._attempt(lambda: self._client.set_terminated(self.run_id, status))

    def facts(self) -> dict[str, Any]:
        """For the ledger: where the run is, and what the server did not get."""
        return {
            "uri": without_password(self.uri),
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "values_not_sent": len(self._waiting),
            "problem": self.problem,
        }

    def _attempt(self, work: Callable[[], object]) -> None:
        """Do something at the server; when that fails, say so once, and try again later."""
        try:
            if not self.run_id:
                self._connect()
            work()
            self._next_send = time.monotonic() + SEND_EVERY_S
        except _errors() as error:
            self._next_send = time.monotonic() + RETRY_AFTER_S
            if not self.problem:
                self.problem = _message(error, self.uri)
                print(f"WARNING: MLflow does not answer; training goes on without it: {self.problem}", flush=True)

    def _connect(self) -> None:
        from mlflow.entities import Param

        if self.run_id:
            return
        client = _client(self.uri)
        self.experiment_id = _experiment_id(client)
        earlier = []
        if self._resumed:
            newest = ["attributes.start_time DESC"]
            earlier = client.search_runs([self.experiment_id], f"tags.{RUN_TAG} = '{self.key}'", max_results=1, order_by=newest)
        if earlier:
            run_id = earlier[0].info.run_id
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(self.experiment_id, tags={RUN_TAG: self.key}, run_name=self.name).info.run_id
            client.log_batch(run_id, params=[Param(name, value) for name, value in self.params.items()])
        self._client, self.run_id = client, run_id
        print(f"MLflow: run {run_id} of experiment {self.experiment_id} at {without_password(self.uri)}", flush=True)

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self.run_id, metrics=self._waiting[:BATCH_METRICS])
            del self._waiting[:BATCH_METRICS]


def without_password(uri: str) -> str:
    """An address without the user and password that may be in it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _message(error: Exception, uri: str) -> str:
    """What the client says, on one line, without the password."""
    user = urlsplit(uri).netloc.rpartition("@")[0]
    return first_line(error).replace(f"{user}@", "") if user else first_line(error)


def _client(uri: str) -> Any:
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _experiment_id(client: Any) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


def _errors() -> tuple[type[Exception], ...]:
    """What the client raises when the server, or the storage of its artifacts, can't be used."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError, ImportError)
