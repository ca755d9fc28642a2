"""What is told about a merge: the facts that travel with the model, and the certificate beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from components.common.storage import Manifest
from components.merge.adapter import Adapter
from components.merge.certificate import MAX_DIFFERENCE_SHARE, MAX_LOGIT_DIFFERENCE, Agreement
from components.merge.config import MergeSettings


def facts_of(adapter: Adapter, settings: MergeSettings, *, parameters: int) -> dict[str, Any]:
    """What was merged: `merge_info.json` inside the model. The same merge gives the same facts, on any day and machine."""
    return {
        "base_model": settings.base_model or adapter.base_model,
        "base_fingerprint": adapter.info.get("base_fingerprint", ""),
        "adapter_digest": adapter.digest,
        "data_digest": adapter.info.get("data_digest", ""),
        "chat_digest": adapter.chat.digest,
        "lora": {name: adapter.config[name] for name in ("r", "lora_alpha", "target_modules")},
        "parameters": parameters,
        "precision": settings.precision,
        "merged_in": "fp32",
        "proven": {"max_logit_difference": MAX_LOGIT_DIFFERENCE, "or_share_of_the_largest_logit": MAX_DIFFERENCE_SHARE},
    }


def record_of(
    facts: dict[str, Any],
    adapter: Adapter,
    base: Path,
    manifest: Manifest,
    model_uri: str,
    *,
    proof: Agreement,
    saved: Agreement,
    seconds: float,
) -> dict[str, Any]:
    """The facts, the certificate with its measured values, the sizes and the metrics, as JSON.

    Args:
        proof: merged fp32 model against the adapter on the fp32 base.
        saved: model as stored, in its precision, against the same.
    """
    metrics = {
        "max_logit_difference": proof.max_logit_difference,
        "kl": proof.kl,
        "top1_agreement": proof.top1_agreement,
        "saved_kl": saved.kl,
        "saved_top1_agreement": saved.top1_agreement,
        "merged_size_bytes": manifest.size_bytes,
        "seconds": round(seconds, 1),
    }
    return facts | {
        "certificate": {"merged_fp32": _finite(proof._asdict()), f"saved_{facts['precision']}": _finite(saved._asdict())},
        "trained_in_4bit": bool(adapter.info.get("settings", {}).get("load_in_4bit")),
        "weights_size_bytes": {
            "adapter": adapter.size_bytes,
            "base": sum(path.stat().st_size for path in base.glob("*.safetensors")),
            "merged": sum(size for name, (size, _) in manifest.files.items() if name.endswith(".safetensors")),
        },
        "model_digest": manifest.digest,
        "model_uri": model_uri,
        "metrics": _finite(metrics),
    }


def show(record: dict[str, Any], *, compare: bool) -> None:
    """Print the certificate, the sizes when asked for, and where the model is."""
    for name, found in record["certificate"].items():
        values = ", ".join(f"{key} {value:.3g}" for key, value in found.items())
        print(f"{name} against the adapter on its base: {values}")
    if record["trained_in_4bit"]:
        print("note: trained on a 4-bit base and merged into the full one; the evaluation of the merged model is the one that counts")
    if compare:
        print(f"{'weights':10}{'MiB':>12}")
        for name, size in record["weights_size_bytes"].items():
            print(f"{name:10}{size / 2**20:12.1f}")
    print(f"model_uri: {record['model_uri']}", flush=True)


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
