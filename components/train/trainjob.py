"""A Kubeflow TrainJob (trainer.kubeflow.org/v1alpha1): described, submitted, watched to its end, and deleted.

It copies what this step's own pod was given: image, resources, environment, tolerations, node selector. So whatever holds for the
step holds for every machine of the job, and nothing of it is a setting. The runtime's `node` container runs torchrun, which finds the
other machines in the `PET_*` variables that Kubeflow Trainer sets.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from components.common.errors import ServiceError, UserError, first_line

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CLIENT = "kubernetes==30.1.0"
ENDED = ("Complete", "Failed")
JOBSET = "jobset.sigs.k8s.io/jobset-name"  # the label of a job's pods
NODE = "node"  # the replicated job of the torch-distributed runtime, and its container
MANAGER = "medical-qa/train"
NOT_OURS = ("ARGO_", "KFP_", "KUBERNETES_", "PET_")  # set for the step's pod, or by Kubeflow Trainer for the job's
POLL_EVERY_S = 5.0
FAILURES_IN_A_ROW = 24  # two minutes without an answer
LOG_LINES = 20
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster(NamedTuple):
    """The cluster this step runs in.

    Attributes:
        pod: this step's own pod, as the API gives it.
    """

    custom: Any
    core: Any
    namespace: str
    pod: dict[str, Any]


def connect() -> Cluster:
    """Reach the cluster from this step's pod, and make sure that it knows TrainJobs.

    Raises:
        UserError: no client, no pod, no rights, or no Kubeflow Trainer.
    """
    try:
        import kubernetes
    except ImportError:
        raise UserError("--num_nodes above 1 needs the Kubernetes client", fix=f"pip install {CLIENT}") from None
    try:
        kubernetes.config.load_config()
    except kubernetes.config.ConfigException as error:
        where, fix = "--num_nodes", "run the pipeline on a cluster, or use --num_nodes 1"
        raise UserError(f"there is no Kubernetes cluster here: {first_line(error)}", where=where, fix=fix) from None
    custom, core = kubernetes.client.CustomObjectsApi(), kubernetes.client.CoreV1Api()
    name, namespace = _own_pod()
    with _explained(f"GET /apis/{GROUP}/{VERSION}", {404: "this cluster has no Kubeflow Trainer of version 2"}):
        known = custom.get_api_resources(GROUP, VERSION)
    if PLURAL not in {resource.name for resource in known.resources}:
        raise UserError("this cluster's Kubeflow Trainer knows no TrainJob", fix="install Kubeflow Trainer 2.2 or newer")
    with _explained(f"pod {namespace}/{name}", {404: "this step's own pod is not found"}):
        pod = kubernetes.client.ApiClient().sanitize_for_serialization(core.read_namespaced_pod(name, namespace))
    return Cluster(custom, core, namespace, pod)


def manifest(
    pod: dict[str, Any], name: str, *, runtime: str, nodes: int, command: Sequence[str], resources: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The TrainJob as the API takes it.

    Args:
        pod: this step's own pod; when it is deleted, so is the job.
        resources: limits of one machine, such as `{"nvidia.com/gpu": "8"}`; the pod's own when None.
    """
    spec = pod["spec"]
    container = next((one for one in spec["containers"] if one["name"] == "main"), spec["containers"][0])
    per_node = {"limits": resources, "requests": resources} if resources else container.get("resources", {})
    trainer = {
        "image": container["image"],
        "command": list(command),
        "env": [variable for variable in container.get("env", []) if _travels(variable)],
        "numNodes": nodes,
        "numProcPerNode": max(1, _cards(per_node.get("limits", {}))),
        "resourcesPerNode": {name: per_node[name] for name in ("limits", "requests") if name in per_node},
    }
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
    where = {name: spec[name] for name in ("nodeSelector", "imagePullSecrets") if spec.get(name)}
    tolerations = [one for one in spec.get("tolerations", []) if not one.get("key", "").startswith("node.kubernetes.io/")]
    where |= {"tolerations": tolerations} if tolerations else {}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "medical-qa"}, "ownerReferences": [owner]},
        "spec": {"runtimeRef": {"name": runtime}, "trainer": trainer} | ({"runtimePatches": [_patch(where)]} if where else {}),
    }


def run(cluster: Cluster, job: dict[str, Any], *, poll_every_s: float = POLL_EVERY_S) -> None:
    """Submit a TrainJob and wait until it is complete; one of the same name that still runs is waited for instead.

    A former one that has ended is deleted first. When this step is interrupted, so is the job, and its machines save a checkpoint.

    Raises:
        ServiceError: the job failed, or the cluster refuses it or stops answering.
    """
    name = job["metadata"]["name"]
    where = f"TrainJob {cluster.namespace}/{name}"
    selector = f"{JOBSET}={name},batch.kubernetes.io/job-completion-index=0"
    try:
        with _explained(where):
            former = _state(_get(cluster, name))
            if former in ENDED:
                _delete(cluster, name)
                while _get(cluster, name):
                    time.sleep(poll_every_s)
            if former != "Running":
                cluster.custom.create_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL, job)
        print(f"{where}: {'runs already' if former == 'Running' else 'submitted'}", flush=True)
        print(f"  its log: kubectl logs --namespace {cluster.namespace} --follow --selector {selector}", flush=True)
        _watch(cluster, name, poll_every_s)
    except KeyboardInterrupt:
        with _explained(where):
            _delete(cluster, name)
        print(f"{where}: deleted; its machines save a checkpoint before they end", flush=True)
        raise


def _watch(cluster: Cluster, name: str, poll_every_s: float) -> None:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    said, failures = "", 0
    while True:
        try:
            job = _get(cluster, name)
            failures = 0
        except (ApiException, HTTPError) as error:
            failures += 1
            if failures >= FAILURES_IN_A_ROW:
                raise ServiceError(
                    f"the cluster stopped answering: {first_line(error)}", where=f"TrainJob {cluster.namespace}/{name}"
                ) from None
            time.sleep(poll_every_s)
            continue
        if job is None:
            raise ServiceError("the TrainJob was deleted", where=f"{cluster.namespace}/{name}", fix="run this step again")
        if (line := _summary(job)) != said:
            print(f"TrainJob {name}: {line}", flush=True)
            said = line
        state = _state(job)
        if state == "Complete":
            return
        if state == "Failed":
            for line in _last_lines(cluster, name):
                print(f"  | {line}", flush=True)
            raise ServiceError(
                f"the TrainJob failed: {_condition(job, 'Failed').get('message', '')}",
                where=f"{cluster.namespace}/{name}",
                fix=f"see its log above, or kubectl describe trainjob --namespace {cluster.namespace} {name}",
            )
        time.sleep(poll_every_s)


def _own_pod() -> tuple[str, str]:
    """This step's pod and its namespace: KFP tells them; elsewhere a pod's host name is its name."""
    name = os.environ.get("KFP_POD_NAME") or os.environ.get("HOSTNAME", "")
    namespace = os.environ.get("NAMESPACE") or (NAMESPACE_FILE.read_text(encoding="utf-8").strip() if NAMESPACE_FILE.exists() else "")
    if not name or not namespace:
        raise UserError("--num_nodes above 1 works inside a pod only", fix="run the pipeline on a cluster, or use --num_nodes 1")
    return name, namespace


def _patch(pod_spec: dict[str, Any]) -> dict[str, Any]:
    """A patch of the runtime's pods; Kubeflow Trainer has it since 2.2."""
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod_spec}}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def _travels(variable: dict[str, Any]) -> bool:
    """Whether an environment variable of this pod is the user's: its secrets and values, but nothing about the pod itself."""
    source = variable.get("valueFrom", {})
    return (
        not variable["name"].startswith(NOT_OURS)
        and variable["name"] != "NAMESPACE"
        and not {"fieldRef", "resourceFieldRef"} & source.keys()
    )


def _cards(limits: dict[str, Any]) -> int:
    return sum(int(count) for name, count in limits.items() if name.endswith("/gpu"))


def _get(cluster: Cluster, name: str) -> dict[str, Any] | None:
    from kubernetes.client import ApiException

    try:
        found: dict[str, Any] = cluster.custom.get_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL, name)
    except ApiException as error:
        if error.status == 404:
            return None
        raise
    return found


def _delete(cluster: Cluster, name: str) -> None:
    from kubernetes.client import ApiException

    try:
        cluster.custom.delete_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL, name)
    except ApiException as error:
        if error.status != 404:  # gone already
            raise


def _condition(job: dict[str, Any], kind: str) -> dict[str, Any]:
    conditions = job.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] == kind and one["status"] == "True"), {})


def _state(job: dict[str, Any] | None) -> str:
    """Complete, Failed or Running; empty where there is no job."""
    if job is None:
        return ""
    return next((kind for kind in ENDED if _condition(job, kind)), "Running")


def _summary(job: dict[str, Any]) -> str:
    counts = [
        f"{one['name']}: " + ", ".join(f"{one[what]} {what}" for what in ("active", "ready", "succeeded", "failed") if one.get(what))
        for one in job.get("status", {}).get("jobsStatus", [])
    ]
    suspended = _condition(job, "Suspended")
    state = f"Suspended ({suspended.get('message', '')})" if suspended else _state(job)
    return "; ".join([state, *(line for line in counts if not line.endswith(": "))])


def _last_lines(cluster: Cluster, name: str) -> Iterator[str]:
    """The end of the first machine's log, where it is still there."""
    from kubernetes.client import ApiException

    try:
        pods = cluster.core.list_namespaced_pod(cluster.namespace, label_selector=f"{JOBSET}={name}").items
        for pod in sorted(pods, key=lambda pod: pod.metadata.name)[:1]:
            text = cluster.core.read_namespaced_pod_log(pod.metadata.name, cluster.namespace, container=NODE, tail_lines=LOG_LINES)
            yield from str(text).splitlines()
    except ApiException as error:
        yield f"(its log can't be read: {error.status} {error.reason})"


@contextmanager
def _explained(where: str, reasons: Mapping[int, str] = MappingProxyType({})) -> Iterator[None]:
    """Turn what the API refuses into the usual error; `reasons` are ours by HTTP status."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except HTTPError as error:
        raise ServiceError(f"the Kubernetes API does not answer: {first_line(error)}", where=where) from None
    except ApiException as error:
        if error.status == 403:
            fix = "apply manifests/02-trainjob-rights.yaml, or ask for these rights"
            raise UserError("this step's service account may not do this", where=where, fix=fix) from None
        what = reasons.get(error.status) or f"the cluster refused: {error.status} {_message(error)}"
        raise ServiceError(what, where=where, fix="see https://www.kubeflow.org/docs/components/trainer/ for its installation") from None


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])[:500]
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
