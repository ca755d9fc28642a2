"""The curves while a run goes on: TensorBoard files beside the adapter, the MLflow run where there is one, and the energy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from components.train.energy import EnergyMeter
from components.train.mlflow_run import MlflowRun
from components.train.stopping import Stopped

if TYPE_CHECKING:
    from components.train.run import Run

FLUSH_EVERY_S = 5


class Tracker:
    """Writes the values of a run where people watch them.

    Args:
        folder: of the TensorBoard files; readable from the first step on.
        params: settings and digests, as MLflow shows them.
        run_name: as MLflow shows it.
        key: the digest of all that decides the result, as the checkpoints have it.
        gpus: how many GPUs train together, where there are any; their energy is measured.
    """

    def __init__(self, folder: Path, params: Mapping[str, Any], run_name: str, *, key: str, gpus: int = 1) -> None:
        self.folder = folder
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self.mlflow = MlflowRun(uri, params, run_name, key) if uri else None
        self.energy = EnergyMeter.of_devices(gpus)
        self._writer: Any = None
        self._finished = False

    def __enter__(self) -> Self:
        print(f"live curves: tensorboard --logdir {self.folder}", flush=True)
        return self

    def begin(self, run: Run) -> None:
        """Start the curves, or go on with those of an earlier process after its last checkpoint.

        What that process logged after the checkpoint is dropped; what it logged elsewhere, on a machine that is gone, is written again.
        """
        from torch.utils.tensorboard import SummaryWriter

        former = [*self.folder.glob("events.out.tfevents.*")]
        if not run.steps:
            for path in former:
                path.unlink()
        self._writer = SummaryWriter(str(self.folder), purge_step=len(run.steps) + 1 if run.steps else None, flush_secs=FLUSH_EVERY_S)
        if self.mlflow:
            self.mlflow.begin(resumed=bool(run.steps))
        if not run.steps:
            self.log(0, {"validation/loss": run.validation_loss_base})
        elif not former:
            for step, values in _history(run):
                self._write(step, values)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of an optimizer step; 0 is the base model."""
        self.energy.sample()
        self._write(step, values)
        if self.mlflow:
            self.mlflow.log(step, values)

    def facts(self) -> dict[str, Any]:
        """For the ledger, at the end of the training: the energy, and the run at MLflow."""
        self.energy.sample()
        if self.mlflow:
            self.mlflow.flush()
        energy = self.energy.wh
        return {
            "energy_wh": None if energy is None else round(energy, 3),
            "energy_note": self.energy.note,
            "mlflow": self.mlflow.facts() if self.mlflow else None,
        }

    def close_logs(self) -> None:
        """Write the TensorBoard files to their end, so that they can be copied."""
        if self._writer:
            self._writer.close()

    def finish(self, artifacts: Mapping[str, Path]) -> None:
        """Close a run that ended well; MLflow gets the text files `artifacts` by name."""
        self.close_logs()
        if self.mlflow:
            self.mlflow.finish(artifacts)
        self._finished = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close_logs()
        if self.mlflow and not self._finished:
            killed = kind is None or issubclass(kind, Stopped) or not issubclass(kind, Exception)
            self.mlflow.end("KILLED" if killed else "FAILED")

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _history(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    yield 0, {"validation/loss": run.validation_loss_base}
    for step in run.steps:
        yield step.number, step.scalars()
    for point in run.evaluations:
        yield point.step, {"validation/loss": point.validation_loss}
