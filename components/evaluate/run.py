"""The evaluation from settings to results, one model in memory at a time: tuned, base, encoder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from components.common.base_model import cache_dir, check_causal_lm, resolve_base_model
from components.common.chat import ChatFormat
from components.common.dataset import load_split, read_info
from components.common.errors import ModelError
from components.common.storage import Manifest, fetch_model
from components.evaluate.answers import answer_all
from components.evaluate.bertscore import Encoder, check_encoder
from components.evaluate.config import EvaluateSettings
from components.evaluate.gate import decide
from components.evaluate.held_out import HeldOut, load_held_out
from components.evaluate.results import Scored, build_results
from components.evaluate.rouge import Rouge
from components.evaluate.scores import add_bertscore, compare, score_answers

NOT_REPORTED = {"model_uri", "base_model", "dataset", "results", "report", "metrics"}  # told by their digests, or only where output goes
SKIP_BERTSCORE = "none"


@dataclass(frozen=True)
class Inputs:
    """Everything an evaluation reads, found and checked before the first model is loaded.

    Attributes:
        encoder: (what it is, folder) of the BERTScore encoder; None to skip.
    """

    tuned_folder: Path
    tuned_digest: str
    chat: ChatFormat
    base_folder: Path | None
    encoder: tuple[str, Path] | None
    held_out: HeldOut
    data_digest: str


def load_inputs(settings: EvaluateSettings) -> Inputs:
    """Find and check the models and the rows.

    Raises:
        ModelError, DataError, StorageError: one of them is not usable.
    """
    data_digest, split = read_info(settings.dataset)["digest"], load_split(settings.dataset, "test")
    folder, manifest = fetch_model(settings.model_uri, cache_dir())
    check_causal_lm(folder)
    chat = ChatFormat.load(folder)
    base_folder = resolve_base_model(settings.base_model) if settings.base_model else None
    encoder = _encoder(settings.bertscore_model, folder, base_folder)
    held_out = load_held_out(
        settings.dataset,
        split,
        tokenizer=_tokenizer(folder),
        chat=chat,
        sample_size=settings.sample_size,
        seed=settings.seed,
        context_tokens=min(_context_tokens(one) for one in (folder, base_folder) if one),
        max_new_tokens=settings.max_new_tokens,
    )
    print(f"rows: {len(held_out.rows)} of {held_out.available} held-out rows", flush=True)
    if held_out.too_long:
        print(f"left out: {len(held_out.too_long)} rows longer than the model's context (lines {held_out.too_long[:10]})", flush=True)
    return Inputs(folder, manifest.digest, chat, base_folder, encoder, held_out, data_digest)


def evaluate(settings: EvaluateSettings, inputs: Inputs) -> dict[str, Any]:
    """Run both models over the rows, score, compare, decide; the content of the results file."""
    started = time.monotonic()
    rows = inputs.held_out.rows
    rouge = Rouge(settings.rouge_tokens)

    def run_model(label: str, folder: Path) -> Scored:
        answers = answer_all(folder, label, rows, chat=inputs.chat, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)
        return answers, score_answers(rows, answers, rouge, label)

    timings: dict[str, Any] = {}
    tuned = run_model("tuned", inputs.tuned_folder)
    timings["tuned"] = tuned[0].timings
    base = run_model("base", inputs.base_folder) if inputs.base_folder else None
    if base:
        timings["base"] = base[0].timings
    before = time.monotonic()
    bertscore = _bertscore(inputs, [one for one in (tuned, base) if one], settings.batch_size)
    timings["bertscore_s"] = round(time.monotonic() - before, 2)

    comparison = compare(tuned[1], base[1] if base else None, confidence=settings.confidence, seed=settings.seed)
    verdict = decide(
        comparison.tuned,
        comparison.base,
        comparison.differences,
        rows=len(rows),
        leaked=inputs.held_out.leaked,
        tolerance=settings.tolerance,
        confidence=settings.confidence,
    )
    base_digest = _digest(inputs.base_folder) if inputs.base_folder else ""
    timings["total_s"] = round(time.monotonic() - started, 2)
    return build_results(
        verdict=verdict,
        model={"uri": settings.model_uri, "digest": inputs.tuned_digest, "chat_digest": inputs.chat.digest},
        base={"name": settings.base_model, "digest": base_digest} if inputs.base_folder else None,
        data={"path": str(settings.dataset), "digest": inputs.data_digest},
        settings=settings.model_dump(exclude=NOT_REPORTED),
        held_out=inputs.held_out,
        comparison=comparison,
        tuned_scored=tuned,
        base_scored=base,
        bertscore=bertscore,
        timings=timings,
    )


def _encoder(setting: str, tuned: Path, base: Path | None) -> tuple[str, Path] | None:
    if setting == SKIP_BERTSCORE:
        return None
    if setting:
        check_encoder(Path(setting))
        return setting, Path(setting)
    return ("base model", base) if base else ("tuned model", tuned)


def _bertscore(inputs: Inputs, scored: list[Scored], batch_size: int) -> dict[str, Any] | None:
    if inputs.encoder is None:
        print("BERTScore: skipped, as asked", flush=True)
        return None
    name, folder = inputs.encoder
    encoder = Encoder.load(folder)
    print(
        f"BERTScore: encoder {name}, the first {encoder.layers} layers (two thirds), texts up to {encoder.window_tokens} tokens", flush=True
    )
    add_bertscore(encoder, inputs.held_out.rows, scored, batch_size)
    facts: dict[str, Any] = {"encoder": name, "digest": _digest(folder), "layers": encoder.layers}
    facts |= {"window_tokens": encoder.window_tokens, "cut_texts": encoder.cut_texts}
    return facts


@lru_cache
def _digest(folder: Path) -> str:
    """The digest of a folder's content; the base model is often the encoder too, and takes a minute to read when it is large."""
    return Manifest.of_folder(folder).digest


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return _from_folder(AutoTokenizer, "tokenizer", folder)


def _context_tokens(folder: Path) -> int:
    from transformers import AutoConfig

    config = _from_folder(AutoConfig, "config", folder).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _from_folder(kind: Any, what: str, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"the model's {what} can't be loaded: {reason}", where=str(folder), fix="fetch or merge the model again") from None
