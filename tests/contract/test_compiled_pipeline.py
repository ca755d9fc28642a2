"""The compiled file against every trap that a KFP 2.17 backend is known to spring."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.compiling import compile_pipeline
from orchestration.record import STEPS
from pipeline import medical_qa

KFP_OWN_INPUTS = ("pipelinechannel--", "base_image")
SETTINGS = {step: f"{step.capitalize()}Settings" for step in STEPS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compile_pipeline(tmp_path_factory.mktemp("compiled") / "pipeline.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture(scope="module")
def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task that runs a container, by component name."""
    dags = [spec["root"]["dag"], *(component["dag"] for component in spec["components"].values() if "dag" in component)]
    found = {task["componentRef"]["name"]: task for dag in dags for task in dag["tasks"].values()}
    return {name.removeprefix("comp-"): task for name, task in found.items() if "executorLabel" in spec["components"][name]}


def containers(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name.removeprefix("exec-"): executor["container"] for name, executor in spec["deploymentSpec"]["executors"].items()}


def settings_of(step: str) -> Any:
    return getattr(importlib.import_module(f"components.{step}.config"), SETTINGS[step])


def test_all_steps_are_container_components(spec: dict[str, Any], tasks: dict[str, Any]) -> None:
    assert set(containers(spec)) == set(tasks) == set(STEPS)
    for step, container in containers(spec).items():
        assert container["command"] == ["python", "-m", f"components.{step}"]
        assert container["args"] == ["--executor_input", "{{$}}"]


def test_no_placeholder_that_the_backend_does_not_resolve(text: str) -> None:
    for trap in ("Concat", "IfPresent", "outputs.output_file", "outputs.parameters"):
        assert trap not in text


def test_no_importer(spec: dict[str, Any]) -> None:
    assert all("importer" not in executor for executor in spec["deploymentSpec"]["executors"].values())


def test_every_component_input_is_passed_explicitly(spec: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    for step, task in tasks.items():
        inputs = spec["components"][f"comp-{step}"].get("inputDefinitions", {})
        for kind in ("parameters", "artifacts"):
            passed = {name for name in task["inputs"].get(kind, {}) if not name.startswith(KFP_OWN_INPUTS)}
            missing = set(inputs.get(kind, {})) - passed
            assert not missing, f"{step}: {missing}"


def test_one_name_per_thing(spec: dict[str, Any]) -> None:
    """A component's inputs and outputs are fields of its settings, with the same names."""
    for step in STEPS:
        component = spec["components"][f"comp-{step}"]
        fields = set(settings_of(step).model_fields)
        names = set(component.get("inputDefinitions", {}).get("parameters", {})) | set(
            component.get("inputDefinitions", {}).get("artifacts", {})
        )
        names |= set(component.get("outputDefinitions", {}).get("artifacts", {}))
        assert names <= fields, f"{step}: {names - fields}"


def test_a_default_is_written_once(spec: dict[str, Any]) -> None:
    """A pipeline parameter's default is the one in the config of a step that uses it."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    for step in STEPS:
        inputs = spec["components"][f"comp-{step}"]["inputDefinitions"]["parameters"]
        for name in set(inputs) & set(parameters) - {"base_model", "storage_uri"}:
            default = settings_of(step).default(name)
            value = parameters[name].get("defaultValue")
            assert value == (str(default) if isinstance(default, Path) else default), f"{step}.{name}"


def test_images_and_resources_are_run_time_parameters(spec: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    for container in containers(spec).values():
        assert re.fullmatch(r"\{\{\$\.inputs\.parameters\['pipelinechannel--(light_)?image'\]\}\}", container["image"])
    for step in ("train", "merge", "evaluate"):
        resources = containers(spec)[step]["resources"]
        assert resources["resourceCpuLimit"] == "{{$.inputs.parameters['pipelinechannel--cpu']}}"
        assert resources["resourceMemoryLimit"] == "{{$.inputs.parameters['pipelinechannel--memory']}}"
        assert resources["accelerator"]["resourceCount"] == "{{$.inputs.parameters['pipelinechannel--accelerator_count']}}"
        assert resources["accelerator"]["resourceType"] == "{{$.inputs.parameters['pipelinechannel--accelerator_type']}}"
        kubernetes = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{step}"]
        assert kubernetes["tolerations"][0]["tolerationJson"]["componentInputParameter"].endswith("tolerations")
        assert kubernetes["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith("node_selector")
        assert kubernetes["secretAsEnv"][0]["secretNameParameter"]["componentInputParameter"].endswith("storage_secret")


def test_no_mutable_tag_and_no_behaviour_from_the_environment(text: str, spec: dict[str, Any]) -> None:
    """The cache key holds neither an image's content nor environment variables."""
    assert ":latest" not in text
    assert all("env" not in container for container in containers(spec).values())


def test_weights_travel_as_an_address(spec: dict[str, Any]) -> None:
    """KFP's launcher downloads every input artifact whole; only the adapter (small) and the data set are artifacts."""
    for step in ("evaluate", "deploy"):
        artifacts = spec["components"][f"comp-{step}"]["inputDefinitions"].get("artifacts", {})
        assert all(entry["artifactType"]["schemaTitle"] != "system.Model" for entry in artifacts.values())
        assert "model_uri" in spec["components"][f"comp-{step}"]["inputDefinitions"]["parameters"]


def test_steps_with_side_effects_are_never_cached(tasks: dict[str, dict[str, Any]]) -> None:
    cached = {step for step, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")}
    assert cached == {"prepare", "train", "merge", "evaluate"}


def test_the_gate_and_the_exit_handler(spec: dict[str, Any]) -> None:
    conditions = [
        task["triggerPolicy"]["condition"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert len(conditions) == 1 and conditions[0].endswith("== 'promote'")
    report = spec["root"]["dag"]["tasks"]["report"]
    assert report["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert "taskFinalStatus" in report["inputs"]["parameters"]["status"]


def test_metrics_are_metrics_artifacts(spec: dict[str, Any]) -> None:
    for step in ("prepare", "train", "merge", "evaluate"):
        outputs = spec["components"][f"comp-{step}"]["outputDefinitions"]["artifacts"]
        assert outputs["metrics"]["artifactType"]["schemaTitle"] == "system.Metrics"


def test_every_pipeline_parameter_is_used(spec: dict[str, Any], text: str) -> None:
    body = text[text.index("components:") :]
    for name in spec["root"]["inputDefinitions"]["parameters"]:
        assert body.count(name) > 1, f"{name} is declared and never used"


def test_the_docstring_of_the_pipeline_is_short_enough_to_read() -> None:
    source = Path(medical_qa.pipeline_func.__code__.co_filename).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 220


def test_a_nested_graph_gets_every_channel_its_tasks_read(spec: dict[str, Any]) -> None:
    """KFP 2.17's compiler forgets the channels of resource limits inside an ExitHandler; the run would fail at that task."""
    for name, component in spec["components"].items():
        inputs = component.get("inputDefinitions", {})
        known = set(inputs.get("parameters", {})) | set(inputs.get("artifacts", {}))
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            for source in [*task["inputs"].get("parameters", {}).values(), *task["inputs"].get("artifacts", {}).values()]:
                wanted = source.get("componentInputParameter") or source.get("componentInputArtifact")
                assert wanted is None or wanted in known, f"{task_name} in {name} reads {wanted}"


def test_the_storage_secret_of_the_manifests_has_the_keys_that_the_steps_read(
    documents: list[dict[str, Any]], spec: dict[str, Any]
) -> None:
    manifest = Path(medical_qa.pipeline_func.__code__.co_filename).parent / "manifests" / "01-storage-secret.yaml"
    secret = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    assert secret["metadata"]["name"] == spec["root"]["inputDefinitions"]["parameters"]["storage_secret"]["defaultValue"]
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor in executors.values():
        assert {key["secretKey"] for key in executor["secretAsEnv"][0]["keyToEnv"]} == set(secret["stringData"])
