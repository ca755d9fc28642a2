"""The merge from its inputs to its record: measure, merge, write, read back, store, export."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from components.common.chat import ChatFormat
from components.common.device import Compute
from components.common.errors import ModelError
from components.common.files import whole_folder, write_json
from components.common.loading import load_causal_lm, load_tokenizer, quiet_libraries, return_memory
from components.common.memory import free_bytes
from components.common.storage import MANIFEST, Manifest, store_model
from components.merge import record
from components.merge.adapter import Adapter, is_its_base
from components.merge.candidates import Proven, bases_to_try, choose, prove
from components.merge.certificate import Agreement, compare
from components.merge.config import MergeSettings
from components.merge.model_folder import check_model_folder, require_space, write_model_folder
from components.merge.rows import MAX_ROWS, MAX_ROWS_FROM_DISK, Row, answer_tokens, load_rows
from components.merge.running import FP32_BYTES, SPARE, Place, choose_place, plain_model
from components.merge.streaming import Weights, merged_weights
from components.merge.structure import Structure, read_structure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(settings: MergeSettings, adapter: Adapter, base: Path) -> dict[str, Any]:
    """Merge, prove and store; the record of it.

    Raises:
        UserError: anything that the user can mend; nothing half-written is left.
    """
    started = time.monotonic()
    quiet_libraries()
    bases, dtype = bases_to_try(settings, adapter), DTYPES[settings.precision]
    same_base, structure, tokenizer = is_its_base(adapter, base), read_structure(base), _tokenizer(base, adapter.chat)
    candidates = {name: merged_weights(structure, adapter, name) for name in bases}
    place = _place(settings, structure)
    rows = load_rows(settings.dataset, tokenizer, adapter.chat, MAX_ROWS if place.whole else MAX_ROWS_FROM_DISK)

    with _kept_or_temporary(settings.folder) as target:
        logits = len(bases) * answer_tokens(rows.rows) * structure.config.vocab_size * FP32_BYTES
        require_space(target.parent, structure.parameters * dtype.itemsize + logits)
        with TemporaryDirectory(prefix=".merge-logits-", dir=target.parent) as scratch:
            found = {
                name: prove(weights, adapter, rows.rows, adapter.chat, place, _folder(scratch, name), label=f"merged into {name}, fp32")
                for name, weights in candidates.items()
            }
            choice = choose(found, rows.rows, adapter, settings.merge_base)
            facts = record.facts_of(adapter, settings, parameters=structure.parameters, merge_base=choice.merge_base)
            with whole_folder(target) as folder:
                write_model_folder(folder, found[choice.merge_base].weights, dtype, tokenizer, adapter.chat, facts)
                checks, saved = _read_back(folder, dtype, tokenizer, adapter.chat, rows.rows, found[choice.merge_base], place)
                manifest = Manifest.of_folder(folder, facts)
                write_json(folder / MANIFEST, manifest.to_json())
                model_uri = store_model(folder, settings.storage_uri, facts)[0] if settings.storage_uri else f"file://{target}"
        exports = _exports(settings, target, adapter.chat, rows.rows, facts | {"merged_from": manifest.digest})

    seconds = time.monotonic() - started
    certificate = record.measured(adapter, settings, rows=rows, place=place, found=found, choice=choice, saved=saved)
    return {
        **facts,
        **certificate,
        "same_base_as_in_training": same_base,
        "reload_checks": checks,
        "weights_size_bytes": record.sizes(adapter, base, manifest),
        "exports": exports,
        "model_digest": manifest.digest,
        "model_uri": model_uri,
        "metrics": record.metrics(found[choice.merge_base].proof, saved, manifest, certificate["bases"]["nll"], seconds),
    }


def _tokenizer(base: Path, chat: ChatFormat) -> Any:
    """The base's tokenizer, which must be the one of the training."""
    tokenizer = load_tokenizer(base)
    if ChatFormat.of_tokenizer(tokenizer, chat.system_prompt).digest != chat.digest:
        raise ModelError(
            "the base model's tokenizer or chat template is not the one that the adapter was trained with",
            where=str(base),
            fix="merge the adapter into the base model that it was trained on",
        )
    return tokenizer


def _place(settings: MergeSettings, structure: Structure) -> Place:
    largest = max(torch.Size(structure.files.shape(name)).numel() for name in structure.names)
    return choose_place(settings.device, structure.parameters, largest)


def _read_back(
    folder: Path, dtype: torch.dtype, tokenizer: Any, chat: ChatFormat, rows: Sequence[Row], proven: Proven, place: Place
) -> tuple[dict[str, bool], Agreement]:
    """Load the written folder as the service will, check what is in it, and compare its answers."""
    structure = read_structure(folder)
    saved_tokenizer = load_tokenizer(folder)
    checks = check_model_folder(folder, saved_tokenizer, tokenizer, chat)
    if structure.parameters * dtype.itemsize * SPARE <= free_bytes(place.device):
        model, _ = load_causal_lm(folder, Compute(place.device, dtype, ""))
    else:
        model = plain_model(Weights(structure, dtype=dtype), place._replace(whole=False))
    saved = compare(model, rows, proven.expected, "saved model")
    del model
    return_memory(place.device)
    return checks, saved


def _exports(settings: MergeSettings, merged: Path, chat: ChatFormat, rows: Sequence[Row], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Write and store what `--export` asks for, beside the merged model; a record for each."""
    if not settings.schemes:
        return []
    from components.merge.export import export_quantized

    masked = [(row.ids, [at >= row.answer_start for at in range(len(row.ids))]) for row in rows]
    records = []
    for scheme in settings.schemes:
        target = merged.with_name(f"{merged.name}-{scheme}")
        told = export_quantized(merged, target, scheme, chat, masked)
        manifest = Manifest.of_folder(target, facts | {"precision": scheme})
        write_json(target / MANIFEST, manifest.to_json())
        uri = store_model(target, settings.storage_uri, manifest.facts)[0] if settings.storage_uri else f"file://{target}"
        records.append({"scheme": scheme, "model_uri": uri, **told})
    return records


def _folder(parent: str, name: str) -> Path:
    folder = Path(parent) / name
    folder.mkdir()
    return folder


@contextmanager
def _kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """Where the model is written: the folder that is kept, or one in a temporary folder when it is only stored."""
    if folder is not None:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
        return
    with TemporaryDirectory(prefix="merged-model-") as name:
        yield Path(name) / "model"
