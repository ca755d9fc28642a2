"""`python -m components.merge`: base model + adapter → merged model, proven equal to what was trained."""

from __future__ import annotations

import os

# Idle OpenMP threads that spin starve the others of a shared machine; libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.common.base_model import resolve_base_model
from components.common.errors import UserError, run_command
from components.common.files import whole_folder, write_json
from components.common.storage import MANIFEST, Manifest, store_model
from components.merge.adapter import Adapter, base_of, read_adapter
from components.merge.config import MergeSettings


def main(argv: list[str] | None = None) -> int | None:
    """Run the merge step."""
    settings, outputs = MergeSettings.parse("python -m components.merge", argv)
    adapter = read_adapter(settings.adapter)
    base = resolve_base_model(base_of(adapter, settings.base_model))
    import torch  # after all that can be wrong with the inputs: it takes seconds

    try:
        info = _merge(settings, adapter, base)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is full: an fp32 merge needs 4 bytes a parameter", fix="merge with --device cpu") from None
    facts = ("base_model", "adapter_digest", "data_digest", "chat_digest", "model_digest", "model_uri")
    outputs.write(
        parameters={"model_uri": info["model_uri"]},
        metadata={"merge_info": {name: info[name] for name in facts}, "metrics": info["metrics"]},
    )
    return None


def _merge(settings: MergeSettings, adapter: Adapter, base: Path) -> dict[str, Any]:
    """Load, merge, write, report; the record of the merge."""
    from components.common.device import Compute
    from components.common.loading import load_causal_lm
    from components.merge.certificate import agreement, answer_ids, answer_logits, require
    from components.merge.merging import DTYPES, cast, choose_device, load_base, merged, put_on
    from components.merge.model_folder import check_model_folder, require_space, write_model_folder
    from components.merge.record import facts_of, record_of, show

    started = time.monotonic()
    chat, device, dtype = adapter.chat, choose_device(settings.device), DTYPES[settings.precision]
    model, tokenizer = load_base(base, device, chat)
    model = put_on(model, adapter)

    with _target(settings.folder) as folder:
        require_space(folder, model, dtype)
        labels, expected = answer_ids(tokenizer, chat), answer_logits(model, tokenizer, chat)
        model = merged(model)
        proof = agreement(expected, answer_logits(model, tokenizer, chat), labels)
        require(proof)
        facts = facts_of(adapter, settings, parameters=model.num_parameters())
        write_model_folder(folder, cast(model, dtype), tokenizer, chat, facts)
        del model  # the saved one is loaded next: never both in memory
        model, saved_tokenizer = load_causal_lm(folder, Compute(device, dtype, ""))  # as the service will
        check_model_folder(folder, saved_tokenizer, tokenizer, chat)
        saved = agreement(expected, answer_logits(model, saved_tokenizer, chat), labels)
        manifest = Manifest.of_folder(folder, facts)
        write_json(folder / MANIFEST, manifest.to_json())
        model_uri = (
            store_model(folder, settings.storage_uri, facts)[0]
            if settings.storage_uri
            else f"file://{Path(settings.folder or '').absolute()}"
        )

    record = record_of(facts, adapter, base, manifest, model_uri, proof=proof, saved=saved, seconds=time.monotonic() - started)
    write_json(settings.merge_info, record)
    write_json(settings.metrics, record["metrics"])
    show(record, compare=settings.compare)
    return record


@contextmanager
def _target(folder: Path | None) -> Iterator[Path]:
    """Where the model is written: the folder that is kept, whole or absent, or a temporary one when it is only stored."""
    if folder is not None:
        with whole_folder(folder) as scratch:
            yield scratch
    else:
        with TemporaryDirectory(prefix="merged-model-") as name:
            yield Path(name)


if __name__ == "__main__":
    run_command(main)
