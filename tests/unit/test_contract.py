"""Executor input in, executor output out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from pydantic import Field

from components.common.contract import ExecutorInput, StepOutputs, local_path
from components.common.errors import UserError
from components.common.settings import StepSettings


class ExampleSettings(StepSettings):
    """A step for tests."""

    count: int = Field(3, description="a count")
    rate: float = Field(0.5, description="a rate")
    name: str = Field("default", description="a name")
    flag: bool = Field(False, description="a flag")
    rows: Path = Field(Path("rows"), description="input")
    metrics: Path = Field(Path("metrics.json"), description="output")


def executor_input(folder: Path, **parameters: object) -> str:
    message = {
        "inputs": {
            "parameterValues": parameters,
            "artifacts": {
                "rows": {"artifacts": [{"name": "rows", "uri": str(folder / "rows"), "type": {"schemaTitle": "system.Dataset"}}]}
            },
        },
        "outputs": {
            "outputFile": str(folder / "out" / "executor_output.json"),
            "artifacts": {
                "metrics": {
                    "artifacts": [{"name": "metrics", "uri": str(folder / "out" / "metrics"), "type": {"schemaTitle": "system.Metrics"}}]
                }
            },
        },
    }
    return json.dumps(message)


def parse(folder: Path, **parameters: object) -> tuple[ExampleSettings, StepOutputs]:
    return ExampleSettings.parse("example", ["--executor_input", executor_input(folder, **parameters)])


def test_numbers_arrive_as_floats_and_texts(tmp_path: Path) -> None:
    settings, _ = parse(tmp_path, count=4.0, rate="0.0002", name="x", flag=True)
    assert (settings.count, settings.rate, settings.name, settings.flag) == (4, 0.0002, "x", True)
    assert settings.rows == tmp_path / "rows"
    assert settings.metrics == tmp_path / "out" / "metrics"


def test_an_empty_text_leaves_the_default_and_kfps_own_inputs_are_ignored(tmp_path: Path) -> None:
    settings, _ = parse(tmp_path, **{"name": "", "pipelinechannel--image": "x", "base_image": "{{$}}", "cpu_limit": "4"})
    assert settings.name == "default"


def test_wrong_values_are_named_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse(tmp_path, count="many", rate="fast")
    assert "--count" in caught.value.where and "--rate" in caught.value.where and "many" in caught.value.where


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"outputs": 3}'])
def test_a_broken_executor_input_is_a_clear_error(text: str) -> None:
    with pytest.raises(UserError, match="executor input"):
        ExecutorInput.take_from(["--executor_input", text])


def test_the_output_is_one_that_kfp_parses(tmp_path: Path) -> None:
    """NaN, infinity and null would fail a finished step."""
    _, outputs = parse(tmp_path)
    outputs.write(
        parameters={"decision": "promote", "n": 3},
        metadata={
            "metrics": {"nan": float("nan"), "inf": float("inf"), "none": None, "list": [1, float("nan")], "ok": 1.5, "path": Path("x")}
        },
    )
    text = (tmp_path / "out" / "executor_output.json").read_text()
    message = pipeline_spec_pb2.ExecutorOutput()
    json_format.Parse(text, message)
    metadata = dict(message.artifacts["metrics"].artifacts[0].metadata)
    assert metadata["ok"] == 1.5 and metadata["nan"] == "nan" and metadata["none"] == ""
    assert message.parameter_values["decision"].string_value == "promote"
    assert (tmp_path / "out" / "metrics").exists(), "the launcher uploads a file for every artifact"


def test_an_artifact_that_the_component_does_not_have_is_our_bug(tmp_path: Path) -> None:
    _, outputs = parse(tmp_path)
    with pytest.raises(ValueError, match="curves"):
        outputs.write(metadata={"curves": {}})
    assert not (tmp_path / "out" / "executor_output.json").exists()


def test_started_by_hand_nothing_is_written(tmp_path: Path) -> None:
    settings, outputs = ExampleSettings.parse("example", ["--count", "7", "--flag"])
    outputs.write(parameters={"x": 1})
    assert settings.count == 7 and settings.flag and not list(tmp_path.iterdir())


def test_environment_variables_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNT", "99")
    assert ExampleSettings.parse("example", [])[0].count == 3


def test_a_bare_flag_of_a_yes_no_or_auto_setting_means_yes() -> None:
    class WithAuto(StepSettings):
        recompute: bool | Literal["auto"] = "auto"
        name: str = ""

    for flags, wanted in (([], "auto"), (["--recompute"], True), (["--recompute", "--name", "n"], True), (["--recompute", "false"], False)):
        assert WithAuto.parse("example", flags)[0].recompute == wanted, flags


def test_a_flag_may_be_typed_with_dashes() -> None:
    class WithTwoWords(StepSettings):
        show_row: int = 0

    assert WithTwoWords.parse("example", ["--show-row", "3"])[0].show_row == 3
    with pytest.raises(SystemExit):
        WithTwoWords.parse("example", ["--show-rows", "3"])


def test_uris_map_to_the_launchers_mounts() -> None:
    assert local_path("s3://bucket/a/b") == Path("/s3/bucket/a/b")
    assert local_path("gs://bucket/a") == Path("/gcs/bucket/a")
    assert local_path("minio://bucket/a") == Path("/minio/bucket/a")
    assert local_path("/plain/a") == Path("/plain/a") == local_path("file:///plain/a")
    with pytest.raises(UserError, match="ftp"):
        local_path("ftp://x/y")
