"""From a base model's name to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.common.base_model import check_causal_lm, resolve_base_model
from components.common.errors import ModelError
from components.common.storage import store_model


def test_a_folder_and_a_stored_model_are_taken(tiny_model: Path, tmp_path: Path) -> None:
    assert resolve_base_model(str(tiny_model)) == tiny_model
    uri, manifest = store_model(tiny_model, str(tmp_path))
    assert resolve_base_model(uri).name == manifest.digest


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MEDICAL_QA_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="folder does not exist"):
        resolve_base_model("./no/such/folder")
    with pytest.raises(ModelError, match="hub"):
        resolve_base_model("nobody/no-such-model")
    with pytest.raises(ModelError, match="no package ships"):
        resolve_base_model("package:none")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "broken"),
        (json.dumps({"architectures": ["BertForMaskedLM"]}), "BertForMaskedLM"),
        ("{}", "no architecture"),
    ],
)
def test_other_kinds_of_models_are_refused_before_they_are_loaded(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        check_causal_lm(tmp_path)
