"""What is told about a merge: the facts that travel with the model, and the certificate beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from components.common.storage import Manifest
from components.merge.adapter import Adapter
from components.merge.candidates import Choice, Proven
from components.merge.certificate import MAX_DIFFERENCE_SHARE, MAX_LOGIT_DIFFERENCE, Agreement, allowed_difference
from components.merge.config import MergeSettings
from components.merge.rows import Rows, answer_tokens
from components.merge.running import Place


def facts_of(adapter: Adapter, settings: MergeSettings, *, parameters: int, merge_base: str) -> dict[str, Any]:
    """What was merged: `merge_info.json` inside the model. The same merge gives the same facts, on any day and machine."""
    return {
        "base_model": settings.base_model or adapter.base_model,
        "base_fingerprint": adapter.info.get("base_fingerprint", ""),
        "adapter_digest": adapter.digest,
        "data_digest": adapter.info.get("data_digest", ""),
        "chat_digest": adapter.chat.digest,
        "lora": {
            **{name: adapter.config[name] for name in ("r", "lora_alpha", "target_modules")},
            **{name: bool(adapter.config.get(name)) for name in ("use_rslora", "use_dora")},
        },
        "parameters": parameters,
        "precision": settings.precision,
        "merged_in": "fp32",
        "trained_on": adapter.quantization,
        "merge_base": merge_base,
        "proven": {"max_logit_difference": MAX_LOGIT_DIFFERENCE, "or_share_of_the_largest_logit": MAX_DIFFERENCE_SHARE},
    }


def measured(
    adapter: Adapter, settings: MergeSettings, *, rows: Rows, place: Place, found: dict[str, Proven], choice: Choice, saved: Agreement
) -> dict[str, Any]:
    """The certificate with its measured values, as JSON.

    Args:
        saved: the model as stored, in its precision, against the adapter on the chosen base.
    """
    proof = found[choice.merge_base].proof
    return {
        "certificate": {"merged_fp32": figures(proof), f"saved_{settings.precision}": figures(saved)},
        "allowed_logit_difference": allowed_difference(proof),
        "bases": {
            "chosen": choice.merge_base,
            "reason": choice.reason,
            "reason_zh": choice.reason_zh,
            "nll": {name: proven.proof.nll for name, proven in found.items()},
            "interval": choice.interval,
        },
        "measured_on": {
            "rows": len(rows.rows),
            "source": rows.source,
            "lines": [row.line for row in rows.rows if row.line],
            "answer_tokens": answer_tokens(rows.rows),
            "device": str(place.device),
            "whole_in_memory": place.whole,
            "reason": place.reason,
        },
        "trained_in_4bit": adapter.quantization == "nf4",
    }


def sizes(adapter: Adapter, base: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of the weight files."""
    return {
        "adapter": adapter.size_bytes,
        "base": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "merged": sum(size for name, (size, _) in manifest.files.items() if name.endswith(".safetensors")),
    }


def metrics(proof: Agreement, saved: Agreement, manifest: Manifest, nll: dict[str, float], seconds: float) -> dict[str, float]:
    """The step's flat numbers; NLL in nats per answer token. One that is not finite is left out."""
    values = {
        "max_logit_difference": proof.max_logit_difference,
        "kl": proof.kl,
        "top1_agreement": proof.top1_agreement,
        "nll": saved.nll,
        "saved_kl": saved.kl,
        "saved_top1_agreement": saved.top1_agreement,
        "saved_nll_difference": saved.nll_difference,
        **({f"nll_{name}_base": value for name, value in nll.items()} if len(nll) > 1 else {}),
        "merged_size_bytes": manifest.size_bytes,
        "seconds": round(seconds, 1),
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def figures(found: Agreement) -> dict[str, Any]:
    """The figures of a comparison as JSON; one that is not finite is left out."""
    values = found._asdict()
    del values["row_nll"]
    return {name: value for name, value in values.items() if value is None or math.isfinite(value)}


def show(record: dict[str, Any], *, compare: bool) -> None:
    """Print the certificate, the sizes when asked for, and where the model is."""
    for name, found in record["certificate"].items():
        values = ", ".join(f"{key} {'none' if value is None else format(value, '.3g')}" for key, value in found.items())
        print(f"{name} against the adapter on its base: {values}")
    if compare:
        print(f"{'weights':10}{'MiB':>12}")
        for name, size in record["weights_size_bytes"].items():
            print(f"{name:10}{size / 2**20:12.1f}")
    for export in record["exports"]:
        print(f"{export['scheme']} model_uri: {export['model_uri']}")
    print(f"model_uri: {record['model_uri']}", flush=True)
