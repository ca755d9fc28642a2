"""`python -m components.merge`: base model + adapter → merged model, proven equal to what was trained."""

from __future__ import annotations

import os

# Idle OpenMP threads that spin starve the others of a shared machine; libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from components.common.base_model import resolve_base_model
from components.common.errors import UserError, run_command
from components.common.files import write_atomically, write_json
from components.merge.adapter import base_of, read_adapter
from components.merge.config import MergeSettings


def main(argv: list[str] | None = None) -> int | None:
    """Run the merge step."""
    settings, outputs = MergeSettings.parse("python -m components.merge", argv)
    adapter = read_adapter(settings.adapter)
    base = resolve_base_model(base_of(adapter, settings.base_model))
    import torch  # after all that can be wrong with the inputs: it takes seconds

    from components.merge.record import show
    from components.merge.report import report_page
    from components.merge.run import run

    try:
        record = run(settings, adapter, base)
    except torch.OutOfMemoryError:
        raise UserError("the GPU's memory is full: comparing in fp32 needs 4 bytes a parameter", fix="merge with --device cpu") from None
    write_json(settings.merge_info, record)
    write_atomically(settings.report, report_page(record))
    write_json(settings.metrics, record["metrics"])
    show(record, compare=settings.compare)
    facts = ("base_model", "adapter_digest", "data_digest", "chat_digest", "merge_base", "model_digest", "model_uri")
    outputs.write(
        parameters={"model_uri": record["model_uri"]},
        metadata={"merge_info": {name: record[name] for name in facts}, "metrics": record["metrics"]},
    )
    return None


if __name__ == "__main__":
    run_command(main)
