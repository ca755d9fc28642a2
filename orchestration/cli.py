"""The command line of the pipeline: `python pipeline.py COMMAND`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from components.common.errors import DataError, UserError, run_command
from components.common.files import sha256_file
from orchestration.record import STEPS, RunRecord, all_runs

MARKS = {"succeeded": "✓", "cached": "↺", "failed": "✗", "skipped": "–", "running": "…", "pending": " ", "interrupted": "!"}


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run the command."""
    arguments = _parser().parse_args(argv)
    run_command(lambda: arguments.handler(arguments))


def _parser() -> argparse.ArgumentParser:
    from orchestration.images import add_images_command

    parser = argparse.ArgumentParser(
        prog="pipeline.py", description="Fine-tune a medical question-answering model and put it into service."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, handler: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(handler=handler)
        return sub

    def with_parameters(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="a pipeline parameter; may be given again (see `pipeline.py parameters`)",
        )

    def with_file(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--params", type=Path, metavar="FILE", help="YAML file with pipeline parameters, such as data/demo.yaml; --set wins over it"
        )

    def with_runs(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--runs_dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the local runs (default: runs)")

    sub = command("compile", _compile, "compile the pipeline into a file that every KFP cluster takes")
    sub.add_argument("--output", type=Path, default=Path("pipeline.yaml"), metavar="FILE", help="file to write (default: pipeline.yaml)")
    command("parameters", _parameters, "list the pipeline's parameters with their defaults")

    sub = command("run", _run, "run the pipeline on this machine")
    sub.add_argument(
        "--runner", choices=("process", "docker"), default="process", help="a process or a container for each step (default: process)"
    )
    sub.add_argument("--no_cache", action="store_true", help="run every step, even if an equal one ran before")
    with_parameters(sub)
    with_file(sub)
    with_runs(sub)

    sub = command("rerun", _rerun, "run one step again on the artifacts of a past run")
    sub.add_argument("step", choices=STEPS[:-1], help="the step")
    sub.add_argument("--run", default="latest", metavar="ID", help="the past run (default: latest)")
    with_parameters(sub)
    with_runs(sub)

    with_runs(command("runs", _runs, "list the local runs"))
    sub = command("show", _show, "show one local run")
    sub.add_argument("run", nargs="?", default="latest", metavar="ID", help="the run (default: latest)")
    with_runs(sub)

    for name, handler, text in (("stop", _service, "stop the local service"), ("status", _service, "show what the local service serves")):
        sub = command(name, handler, text)
        sub.set_defaults(action=name)
        with_parameters(sub)
        with_runs(sub)

    sub = command("submit", _submit, "submit the pipeline to a KFP cluster")
    _kfp_options(sub)
    sub.add_argument("--experiment", default="medical-qa", help="KFP experiment (default: medical-qa)")
    sub.add_argument("--run_name", default="", help="name of the run in the UI (default: made by KFP)")
    sub.add_argument("--service_account", default="", help="Kubernetes service account of the run (default: KFP's own)")
    sub.add_argument("--watch", action="store_true", help="stay and watch the run to its end")
    with_parameters(sub)
    with_file(sub)
    sub = command("watch", _watch, "watch a run on a KFP cluster to its end")
    sub.add_argument("run", metavar="ID", help="the KFP run's id")
    _kfp_options(sub)

    add_images_command(commands)
    return parser


def _kfp_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--host",
        default=os.environ.get("KF_PIPELINES_ENDPOINT", "http://localhost:8080"),
        help="address of KFP (default: $KF_PIPELINES_ENDPOINT, else http://localhost:8080)",
    )
    sub.add_argument("--namespace", default="kubeflow", help="Kubernetes namespace (default: kubeflow)")
    sub.add_argument("--token", default=os.environ.get("KFP_TOKEN", ""), help="access token (default: $KFP_TOKEN)")
    sub.add_argument("--timeout_s", type=float, default=0, help="longest time to watch, seconds; 0: no limit (default: 0)")


def _compile(arguments: argparse.Namespace) -> None:
    from orchestration.compiling import compile_pipeline

    print(f"compiled: {compile_pipeline(arguments.output)}")


def _parameters(_: argparse.Namespace) -> None:
    from orchestration.compiling import compiled_spec, parameter_defaults

    for name, value in parameter_defaults(compiled_spec()).items():
        print(f"{name} = {value!r}")


def _run(arguments: argparse.Namespace) -> int:
    from orchestration.compiling import compiled_spec, parameter_defaults
    from orchestration.launch import require_images
    from orchestration.local import LocalRun

    spec = compiled_spec()
    defaults = parameter_defaults(spec)
    runs_dir = arguments.runs_dir.absolute()
    given = _given_parameters(arguments, defaults)
    parameters = defaults | _local_defaults(runs_dir, arguments.runner, defaults) | given
    parameters = _with_local_inputs(parameters, arguments.runner)
    if arguments.runner == "docker":
        require_images([parameters["image"], parameters["light_image"]])
    record = _start_record(runs_dir, arguments.runner, parameters)
    return _finish(record, LocalRun(spec, record, runner=arguments.runner, use_cache=not arguments.no_cache))


def _rerun(arguments: argparse.Namespace) -> int:
    from orchestration.compiling import compiled_spec, parameter_defaults, parse_assignments
    from orchestration.local import LocalRun

    spec = compiled_spec()
    defaults = parameter_defaults(spec)
    runs_dir = arguments.runs_dir.absolute()
    past = RunRecord.load(runs_dir, arguments.run)
    parameters = defaults | past.facts["parameters"] | parse_assignments(arguments.set, defaults)
    parameters = _with_local_inputs(parameters, past.facts["runner"])
    record = _start_record(runs_dir, past.facts["runner"], parameters, parent=past.id)
    run = LocalRun(spec, record, runner=past.facts["runner"], replay=past, only=arguments.step)
    code = _finish(record, run)
    if record.step(arguments.step)["state"] == "skipped":
        before = [name for name in STEPS[: STEPS.index(arguments.step)] if "outputs" not in past.step(name)]
        why = (
            f"the past run has no outputs of {before[0]}"
            if before
            else "the gate held the model of that run, so there is nothing to deploy"
        )
        raise UserError(
            f"{arguments.step} did not run: {why}",
            where=f"run {past.id}",
            fix=f"rerun {before[0]} first" if before else f"see {past.folder / 'index.html'}",
        )
    return code


def _start_record(runs_dir: Path, runner: str, parameters: dict[str, Any], parent: str = "") -> RunRecord:
    record = RunRecord.start(runs_dir, runner=runner, parameters=parameters, parent=parent)
    record.facts["parameters"]["run_record"] = str(record.path)
    record.save()
    print(f"run {record.id} ({runner} mode); its page: {record.folder / 'index.html'}", flush=True)
    return record


def _given_parameters(arguments: argparse.Namespace, defaults: dict[str, Any]) -> dict[str, Any]:
    from orchestration.compiling import check_parameters, parse_assignments

    from_file: dict[str, Any] = {}
    if arguments.params:
        import yaml

        try:
            from_file = yaml.safe_load(arguments.params.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"the parameter file is not YAML: {' '.join(str(error).split())[:200]}", where=str(arguments.params)) from None
        if not isinstance(from_file, dict):
            raise UserError("the parameter file needs one `name: value` a line", where=str(arguments.params))
        from_file = check_parameters(from_file, defaults, where=str(arguments.params))
    return from_file | parse_assignments(arguments.set, defaults)


def _local_defaults(runs_dir: Path, runner: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """What a local run sets by itself: where things are stored, and which kind of service it deploys."""
    values: dict[str, Any] = {"storage_uri": f"file://{runs_dir}/storage", "state_dir": str(runs_dir / "services"), "deploy_target": runner}
    return {name: value for name, value in values.items() if name in defaults}


def _with_local_inputs(parameters: dict[str, Any], runner: str) -> dict[str, Any]:
    """Absolute paths for inputs on this machine, the data's digest, and (for containers) the demo model as a folder."""
    data = Path(str(parameters["data_path"]))
    if "://" not in str(data):
        if not data.is_file():
            raise DataError("the data file is missing", where=str(data), fix="give it with --set data_path=FILE")
        parameters |= {"data_path": str(data.absolute()), "data_digest": sha256_file(data)}
    if Path(parameters["base_model"]).is_dir():
        parameters["base_model"] = str(Path(parameters["base_model"]).absolute())
    elif runner == "docker" and parameters["base_model"].startswith("package:"):
        parameters["base_model"] = _packaged_model(parameters["base_model"])
    return parameters


def _packaged_model(name: str) -> str:
    """The folder of a model that a package ships; the images don't have the package."""
    command = [sys.executable, "-m", "components.common.base_model", name]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise UserError("the demo model can't be made ready", where=name)
    return result.stdout.strip().splitlines()[-1]


def _finish(record: RunRecord, run: Any) -> int:
    started = time.monotonic()
    try:
        outcome = run.execute()
    finally:
        _write_page(record)
    _print_steps(record)
    print(f"\nrun {record.id} {outcome} after {time.monotonic() - started:.0f} s")
    _print_what_next(record)
    return 0 if outcome == "succeeded" else 1


def _print_what_next(record: RunRecord) -> None:
    url = record.step("deploy").get("outputs", {}).get("artifacts", {}).get("rollout", {}).get("metadata", {}).get("url")
    if url:
        print(f"""  ask:  curl -s {url}/ask -H 'Content-Type: application/json' -d '{{"question": "什么是高血压？"}}'""")
    print(f"  page: {record.folder / 'index.html'}")
    if url:
        print("  stop: make stop, or python pipeline.py stop")


def _write_page(record: RunRecord) -> None:
    command = [sys.executable, "-m", "components.report", "--run_record", str(record.path), "--page", str(record.folder / "index.html")]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def _print_steps(record: RunRecord) -> None:
    print()
    for name in STEPS:
        facts = record.step(name)
        seconds = f"{facts['seconds']:.1f} s" if facts.get("seconds") else ""
        note = facts.get("reason") or (f"from run {facts['source_run']}" if facts.get("source_run") else "")
        print(f"  {MARKS[facts['state']]} {name:9} {facts['state']:10} {seconds:>9}  {note}".rstrip())


def _runs(arguments: argparse.Namespace) -> None:
    found = False
    for record in all_runs(arguments.runs_dir):
        found = True
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.facts["started"]))
        steps = " ".join(f"{name}{MARKS[record.step(name)['state']]}" for name in STEPS)
        print(
            f"{record.id}  {started}  {record.facts['state']:11} {steps}{'  rerun of ' + record.facts['parent'] if record.facts['parent'] else ''}"
        )
    if not found:
        print(f"no runs in {arguments.runs_dir}: start one with `make run` or `python pipeline.py run`")


def _show(arguments: argparse.Namespace) -> None:
    record = RunRecord.load(arguments.runs_dir.absolute(), arguments.run)
    print(f"run {record.id}: {record.facts['state']} ({record.facts['runner']} mode); page: {record.folder / 'index.html'}")
    _print_steps(record)
    for name in STEPS:
        outputs = record.step(name).get("outputs", {})
        metrics = outputs.get("artifacts", {}).get("metrics", {}).get("metadata", {})
        for key, value in {**outputs.get("parameters", {}), **metrics}.items():
            print(f"  {name}.{key} = {value:.4f}" if isinstance(value, float) else f"  {name}.{key} = {value}")


def _service(arguments: argparse.Namespace) -> int:
    """Pass on to the deploy step's own command, with the newest run's idea of where the service is."""
    from orchestration.compiling import compiled_spec, parameter_defaults, parse_assignments

    defaults = parameter_defaults(compiled_spec())
    runs_dir = arguments.runs_dir.absolute()
    newest = next((record.facts["parameters"] for record in all_runs(runs_dir)), _local_defaults(runs_dir, "process", defaults))
    values = defaults | newest | parse_assignments(arguments.set, defaults)
    names = ("service_name", "service_host", "service_port", "state_dir", "deploy_target")
    flags = [text for name in names for text in (f"--{name}", str(values[name]))]
    return subprocess.run([sys.executable, "-m", "components.deploy", "--action", arguments.action, *flags], check=False).returncode


def _submit(arguments: argparse.Namespace) -> int:
    from orchestration import cluster
    from orchestration.compiling import compile_pipeline, compiled_spec, parameter_defaults

    parameters = _given_parameters(arguments, parameter_defaults(compiled_spec()))
    client = cluster.connect(arguments.host, arguments.namespace, arguments.token)
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_pipeline(Path(folder) / "pipeline.yaml")
        run_id = cluster.submit(
            client,
            compiled,
            parameters,
            run_name=arguments.run_name,
            experiment=arguments.experiment,
            service_account=arguments.service_account,
        )
    print(f"submitted: run {run_id}; {arguments.host}/#/runs/details/{run_id}", flush=True)
    if not arguments.watch:
        print(f"watch it: python pipeline.py watch {run_id} --host {arguments.host}")
        return 0
    return 0 if cluster.watch(client, run_id, timeout_s=arguments.timeout_s) == "SUCCEEDED" else 1


def _watch(arguments: argparse.Namespace) -> int:
    from orchestration import cluster

    client = cluster.connect(arguments.host, arguments.namespace, arguments.token)
    return 0 if cluster.watch(client, arguments.run, timeout_s=arguments.timeout_s) == "SUCCEEDED" else 1
