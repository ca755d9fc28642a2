"""Training on several machines: what travels to them and back.

This step stores the data set beside the checkpoints, starts a TrainJob of the same image and settings, and takes from the storage
what its main process made: from then on everything is as if this process had trained. Every process of the job runs

    torchrun -m components.train.nodes DATA_URI RESULT_URI FLAGS

which fetches the data set, runs the train step with these flags, and stores the result.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from components.common.errors import StorageError, UserError, run_command
from components.common.files import read_json, sha256_text, whole_folder, write_atomically
from components.common.storage import Location, fetch_model, store_model
from components.train import trainjob
from components.train.config import TrainSettings

RESULT = "result.json"  # names the folder that the job stored last
PATHS = {"dataset", "adapter", "curves", "metrics"}
OURS = {"num_nodes", "node_resources", "trainjob_runtime", "show_row"}


def train_on_nodes(settings: TrainSettings) -> dict[str, Any]:
    """Train through a TrainJob, and write adapter, curves and metrics as the settings say; the ledger of the run.

    Raises:
        UserError: something that every machine needs is not reachable from everywhere. ServiceError: the job failed.
    """
    _refuse_what_only_this_machine_has(settings)
    resources = _resources(settings.node_resources)
    cluster = trainjob.connect()
    with tempfile.TemporaryDirectory() as scratch:
        flags = flags_of(settings)
        data_uri = _store_data(settings, Path(scratch))
        name = f"train-{sha256_text(json.dumps([data_uri, flags, settings.num_nodes]))[:16]}"
        place = f"{settings.checkpoint_uri.rstrip('/')}/trainjobs/{name}"
        result = Location.parse(place)
        result.delete([RESULT] if result.exists(RESULT) else [])
        command = ["torchrun", "-m", "components.train.nodes", data_uri, place, *flags]
        job = trainjob.manifest(
            cluster.pod,
            name,
            runtime=settings.trainjob_runtime,
            nodes=settings.num_nodes,
            command=command,
            resources=resources,
        )
        trainjob.run(cluster, job)
        if not result.exists(RESULT):
            raise StorageError("the TrainJob is complete but stored no adapter", where=place, fix="see the log of its first machine")
        folder, _ = fetch_model(json.loads(result.read(RESULT))["uri"], Path(scratch))
        return _take(folder, settings)


def run_node(argv: list[str] | None = None) -> int | None:
    """One process of the job: fetch the data set, train, and store the result if this is the main process."""
    from components.train.__main__ import main
    from components.train.launch import is_main_process

    data_uri, result_uri, *flags = sys.argv[1:] if argv is None else argv
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch_model(data_uri, Path(scratch))[0]
        dataset = folder if (folder / "dataset.json").exists() else next(folder.glob("*.jsonl"))
        out = Path(scratch, "out")
        paths = {"dataset": dataset, "adapter": out / "adapter", "curves": out / "curves.html", "metrics": out / "metrics.json"}
        code = main([*flags, *(text for name, path in paths.items() for text in (f"--{name}", str(path)))])
        if code or not is_main_process():
            return code
        shutil.rmtree(out / "adapter.logs", ignore_errors=True)  # the adapter has a copy
        uri, _ = store_model(out, result_uri)
        Location.parse(result_uri).write(RESULT, json.dumps({"uri": uri}))
    return None


def flags_of(settings: TrainSettings) -> list[str]:
    """The flags that give the same settings to another process; without this machine's paths, and what starts the job."""
    flags = []
    for name, value in settings.model_dump(mode="json", exclude=PATHS | OURS).items():
        if TrainSettings.model_fields[name].annotation is bool:
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return flags


def _refuse_what_only_this_machine_has(settings: TrainSettings) -> None:
    if not settings.checkpoint_uri.startswith("s3://"):
        raise UserError(
            "several machines need a place that all of them reach, for data set, checkpoints and adapter",
            where=f"--checkpoint_uri {settings.checkpoint_uri or '(empty)'}",
            fix="give --checkpoint_uri s3://bucket/prefix, or --num_nodes 1",
        )
    if Path(settings.base_model).exists():
        raise UserError(
            "the base model is a folder of this machine, which the others don't have",
            where=f"--base_model {settings.base_model}",
            fix="give a hub id, an s3:// address, or package:gemma3-270m",
        )


def _resources(text: str) -> dict[str, str] | None:
    """Limits of one machine, from their JSON; None where there is none."""
    if not text:
        return None
    try:
        return {str(name): str(amount) for name, amount in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise UserError(
            "this is no JSON object of limits", where=f"--node_resources {text}", fix='give one such as {"nvidia.com/gpu": "8"}'
        ) from None


def _store_data(settings: TrainSettings, scratch: Path) -> str:
    folder = settings.dataset
    if folder.is_file():
        folder = scratch / "dataset"
        folder.mkdir()
        shutil.copy(settings.dataset, folder / "rows.jsonl")
    return store_model(folder, f"{settings.checkpoint_uri.rstrip('/')}/trainjobs/data")[0]


def _take(folder: Path, settings: TrainSettings) -> dict[str, Any]:
    with whole_folder(settings.adapter) as target:
        shutil.copytree(folder / "adapter", target, dirs_exist_ok=True)
    write_atomically(settings.curves, (folder / "curves.html").read_bytes())
    write_atomically(settings.metrics, (folder / "metrics.json").read_bytes())
    info: dict[str, Any] = read_json(settings.adapter / "train_info.json", kind="run ledger")
    return info


if __name__ == "__main__":
    run_command(run_node)
