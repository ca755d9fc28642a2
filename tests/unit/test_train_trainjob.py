"""Several machines: the TrainJob, the Kubernetes API as a small HTTP server speaks it, and what travels to the machines and back."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import yaml

from components.common.errors import ServiceError, UserError
from components.train import trainjob
from components.train.config import TrainSettings
from components.train.nodes import flags_of, train_on_nodes

PROJECT = Path(__file__).resolve().parents[2]
NAMESPACE, POD_NAME = "kubeflow", "medical-qa-train-1"
JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
RESOURCES = {"kind": "APIResourceList", "groupVersion": "trainer.kubeflow.org/v1alpha1", "resources": []}
TRAINJOBS = {"name": "trainjobs", "singularName": "trainjob", "namespaced": True, "kind": "TrainJob", "verbs": ["create", "get", "delete"]}
# As KFP starts a step: the launcher's wait container, and the step's own, called main.
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": POD_NAME, "namespace": NAMESPACE, "uid": "3c5d"},
    "spec": {
        "containers": [
            {"name": "wait", "image": "argoexec"},
            {
                "name": "main",
                "image": "registry.example/medical-qa@sha256:00ff",
                "env": [
                    {"name": "KFP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "ARGO_NODE_ID", "value": "medical-qa-1"},
                    {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "storage", "key": "AWS_ACCESS_KEY_ID"}}},
                    {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"},
                ],
                "resources": {"limits": {"cpu": "16", "memory": "200Gi", "nvidia.com/gpu": "8"}},
            },
        ],
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
            {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
        ],
    },
}


def job_of(name: str = "train-1", **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"runtime": "torch-distributed", "nodes": 2, "command": ["torchrun", "-m", "components.train.nodes"]}
    return trainjob.manifest(POD, name, **values | changes)


def condition(kind: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": "x", "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"}


class FakeKubernetes:
    """The state of the API server.

    Attributes:
        statuses: what a job's status will be, one for each time that it is asked for; the last one stays. A number is an HTTP error.
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.statuses: list[Any] = [{}]
        self.requests: list[str] = []
        self.resources = [TRAINJOBS]
        self.refuse: dict[str, int] = {}
        self.address = ""
        self.on_create: Any = None

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """HTTP status and body."""
        self.requests.append(f"{method} {path}")
        place, _, query = path.partition("?")
        status = next((status for start, status in self.refuse.items() if f"{method} {place}".startswith(start)), 200)
        if status != 200:
            return status, {"kind": "Status", "status": "Failure", "message": "because of the test", "code": status}
        if place == PODS:
            name = query.split("jobset-name%3D")[1].split("&")[0]
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": [{"metadata": {"name": f"{name}-node-0-{at}-x"}} for at in (1, 0)]}
        fixed = {
            "/apis/trainer.kubeflow.org/v1alpha1": RESOURCES | {"resources": self.resources},
            f"{PODS}/{POD_NAME}": POD,
            f"{PODS}/train-1-node-0-0-x/log": "the end of the log\nValueError: broken",
        }
        if place.rstrip("/") in fixed:
            return 200, fixed[place.rstrip("/")]
        if place == JOBS:
            self.jobs[body["metadata"]["name"]] = body
            if self.on_create:
                self.on_create(body)
            return 201, body
        return self._job(method, place.removeprefix(f"{JOBS}/"))

    def _job(self, method: str, name: str) -> tuple[int, Any]:
        if name not in self.jobs:
            return 404, {"kind": "Status", "status": "Failure", "message": f'trainjobs "{name}" not found', "code": 404}
        if method == "DELETE":
            return 200, {"kind": "Status", "status": "Success", "details": self.jobs.pop(name)["metadata"]}
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return (status, {"message": "an accident"}) if isinstance(status, int) else (200, self.jobs[name] | {"status": status})


@pytest.fixture
def cluster_api() -> Iterator[FakeKubernetes]:
    state = FakeKubernetes()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, value = state.answer(self.command, self.path, body)
            content = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = handle_any  # noqa: N815  as the library calls them

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def in_a_pod(cluster_api: FakeKubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a step's pod, for this process and as variables for another."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": cluster_api.address}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = {"KUBECONFIG": str(tmp_path / "kubeconfig"), "KFP_POD_NAME": POD_NAME, "NAMESPACE": NAMESPACE}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kubernetes.config, "load_config", lambda: kubernetes.config.load_kube_config(variables["KUBECONFIG"]))
    return variables


@pytest.fixture
def cluster(cluster_api: FakeKubernetes, in_a_pod: dict[str, str]) -> trainjob.Cluster:
    return trainjob.connect()


def run(cluster: trainjob.Cluster, job: dict[str, Any]) -> None:
    trainjob.run(cluster, job, poll_every_s=0.01)


def test_the_manifest_is_what_the_api_of_kubeflow_trainer_knows() -> None:
    """The published models of the API drop a field that they don't know, and refuse a value of another type."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api==2.3.0")
    for job in (job_of(), job_of(resources={"nvidia.com/gpu": "4"}), job_of(nodes=16)):
        parsed = models.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job))
        assert parsed.to_dict() == job


def test_the_job_is_given_what_the_steps_pod_was_given() -> None:
    job = job_of()
    trainer = job["spec"]["trainer"]
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert trainer["image"] == "registry.example/medical-qa@sha256:00ff"
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"] == {"limits": {"cpu": "16", "memory": "200Gi", "nvidia.com/gpu": "8"}}
    assert [variable["name"] for variable in trainer["env"]] == ["AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_URI"]
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert replicated["name"] == "node" and pod["nodeSelector"] == {"gpu": "h100"}
    assert [one["key"] for one in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == "3c5d", "deleted with the pod"
    other = job_of(resources={"cpu": "4"})["spec"]["trainer"]
    assert other["resourcesPerNode"]["limits"] == {"cpu": "4"} and other["numProcPerNode"] == 1


def test_the_flags_of_the_job_give_the_same_settings() -> None:
    given = ["--packing", "false", "--use_rslora", "--bf16", "--epochs", "2.5", "--lora_r", "8", "--checkpoint_uri", "s3://bucket/place"]
    settings, _ = TrainSettings.parse("train", [*given, "--num_nodes", "3", "--node_resources", '{"cpu": "1"}', "--system_prompt", ""])
    again, _ = TrainSettings.parse("train", flags_of(settings))
    assert again == settings.model_copy(update={"num_nodes": 1, "node_resources": ""})


def test_a_job_is_submitted_and_watched_to_its_end(
    cluster: trainjob.Cluster, cluster_api: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    active = {"jobsStatus": [{"name": "node", "active": 1, "ready": 1, "succeeded": 0, "failed": 0, "suspended": 0}]}
    waiting = {"conditions": [condition("Suspended", "no room in the queue")]}
    cluster_api.statuses = [waiting, waiting, active, 503, active, {"conditions": [condition("Complete")]}]
    run(cluster, job_of())
    assert cluster_api.jobs["train-1"] == job_of()
    lines = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("TrainJob train-1: ")]
    assert lines == ["Suspended (no room in the queue)", "Running; node: 1 active, 1 ready", "Complete"], "each change once"


def test_a_failed_job_shows_the_end_of_its_log(
    cluster: trainjob.Cluster, cluster_api: FakeKubernetes, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster_api.statuses = [{"conditions": [condition("Failed", "jobset failed due to one or more job failures")]}]
    with pytest.raises(ServiceError, match="one or more job failures") as error:
        run(cluster, job_of())
    assert "kubectl describe trainjob" in error.value.fix
    assert "  | the end of the log\n  | ValueError: broken" in capsys.readouterr().out


def test_a_retried_step_waits_for_the_job_that_still_runs(cluster: trainjob.Cluster, cluster_api: FakeKubernetes) -> None:
    cluster_api.jobs["train-1"] = job_of()
    cluster_api.statuses = [{}, {"conditions": [condition("Complete")]}]
    run(cluster, job_of())
    assert not [line for line in cluster_api.requests if line.startswith(("POST", "DELETE"))]


def test_a_former_job_that_has_ended_makes_room(cluster: trainjob.Cluster, cluster_api: FakeKubernetes) -> None:
    cluster_api.jobs["train-1"] = job_of()
    cluster_api.statuses = [{"conditions": [condition("Failed")]}, {"conditions": [condition("Complete")]}]
    run(cluster, job_of())
    changes = [line.split()[0] for line in cluster_api.requests if line.startswith(("POST", "DELETE"))]
    assert changes == ["DELETE", "POST"]


def test_an_interrupted_step_takes_its_job_with_it(
    cluster: trainjob.Cluster, cluster_api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainjob.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(cluster, job_of())
    assert not cluster_api.jobs and cluster_api.requests[-1].startswith("DELETE")


@pytest.mark.parametrize(
    ("refuse", "words", "fix"),
    [
        ({"GET /apis/trainer": 404}, "no Kubeflow Trainer", "trainer"),
        ({f"GET {PODS}": 403}, "may not do this", "02-trainjob-rights.yaml"),
        ({f"POST {JOBS}": 422}, "422 because of the test", "trainer"),
        ({f"POST {JOBS}": 403}, "may not do this", "02-trainjob-rights.yaml"),
    ],
)
def test_what_the_cluster_refuses_is_said(
    cluster_api: FakeKubernetes, in_a_pod: dict[str, str], refuse: dict[str, int], words: str, fix: str
) -> None:
    cluster_api.refuse = refuse
    with pytest.raises(UserError, match=words) as error:
        run(trainjob.connect(), job_of())
    assert fix in error.value.fix


def test_an_older_kubeflow_trainer_is_refused(cluster_api: FakeKubernetes, in_a_pod: dict[str, str]) -> None:
    cluster_api.resources = []
    with pytest.raises(UserError, match="knows no TrainJob"):
        trainjob.connect()


def test_a_cluster_that_stops_answering_ends_the_wait(
    cluster: trainjob.Cluster, cluster_api: FakeKubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "FAILURES_IN_A_ROW", 3)
    cluster_api.statuses = [{}, 500]
    with pytest.raises(ServiceError, match="stopped answering"):
        run(cluster, job_of())


def test_without_the_client_the_fix_is_a_line_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UserError, match="needs the Kubernetes client") as error:
        trainjob.connect()
    assert error.value.fix.startswith("pip install kubernetes==")


def test_what_only_this_machine_has_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    settings, _ = TrainSettings.parse("train", ["--num_nodes", "2"])
    with pytest.raises(UserError, match="a place that all of them reach") as error:
        train_on_nodes(settings)
    assert "s3://" in error.value.fix
    settings, _ = TrainSettings.parse("train", ["--num_nodes", "2", "--checkpoint_uri", "s3://b/p", "--base_model", str(tiny_model)])
    with pytest.raises(UserError, match="a folder of this machine"):
        train_on_nodes(settings)


@pytest.mark.parametrize("text", ["8", "[1]", "{nvidia.com/gpu: 8}"])
def test_limits_that_are_no_json_object_are_refused(text: str) -> None:
    settings, _ = TrainSettings.parse("train", ["--num_nodes", "2", "--checkpoint_uri", "s3://b/p", "--node_resources", text])
    with pytest.raises(UserError, match="no JSON object of limits") as error:
        train_on_nodes(settings)
    assert "nvidia.com/gpu" in error.value.fix


def test_outside_of_a_cluster_the_command_says_so(tmp_path: Path, tiny_rows: list[dict[str, str]]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows)
    flags = ["--dataset", str(rows), "--adapter", str(tmp_path / "adapter"), "--num_nodes", "2", "--checkpoint_uri", "s3://bucket/place"]
    result = command(flags, {"KUBECONFIG": str(tmp_path / "none")})
    assert result.returncode == 2, result.stderr
    assert "there is no Kubernetes cluster here" in result.stderr and "--num_nodes 1" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "adapter").exists()


def test_data_travels_to_the_machines_and_the_adapter_back(
    cluster_api: FakeKubernetes,
    in_a_pod: dict[str, str],
    s3_server: tuple[Path, dict[str, str]],
    tiny_model: Path,
    tiny_rows: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole command; the job's own command runs here, in two processes where a cluster has two machines."""
    from components.common.storage import store_model

    bucket, keys = s3_server
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    base, _ = store_model(tiny_model, f"s3://bucket/{tmp_path.name}/base")
    outputs: list[subprocess.CompletedProcess[str]] = []

    def machines(job: dict[str, Any]) -> None:
        def work() -> None:
            torchrun, *rest = job["spec"]["trainer"]["command"]
            assert torchrun == "torchrun"
            line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *rest]
            environment = os.environ | keys | {"MEDICAL_QA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
            outputs.append(subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200, check=False))
            cluster_api.statuses = [{"conditions": [condition("Complete" if outputs[0].returncode == 0 else "Failed")]}]

        threading.Thread(target=work, daemon=True).start()

    cluster_api.on_create = machines
    paths = {"--adapter": "adapter", "--curves": "curves.html", "--metrics": "metrics.json"}
    places = [text for flag, name in paths.items() for text in (flag, str(tmp_path / name))]
    rows = write_rows(tmp_path / "rows.jsonl", tiny_rows)
    flags = ["--base_model", base, "--dataset", str(rows), *places, "--num_nodes", "2", "--checkpoint_uri", f"s3://bucket/{tmp_path.name}"]
    result = command([*flags, "--epochs", "1", "--lora_r", "4", "--precision", "fp32"], in_a_pod | keys)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}{[done.stderr for done in outputs]}"
    assert "Complete" in result.stdout
    info = json.loads((tmp_path / "adapter" / "train_info.json").read_text(encoding="utf-8"))
    assert info["plan"]["processes"] == 2 and info["base_model"] == base
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == info["metrics"]
    assert "<svg" in (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert not [path for path in (bucket / tmp_path.name).rglob("step-*") if path.is_file()], "checkpoints of a run that succeeded"


def command(flags: list[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | variables
    line = [sys.executable, "-m", "components.train", *flags]
    return subprocess.run(line, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
