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
from components.evaluate.exam_sitting import Sitting, prepare_sitting
from components.evaluate.gate import Rules, decide
from components.evaluate.held_out import HeldOut, load_held_out
from components.evaluate.metrics import parse_guarded, parse_minimums
from components.evaluate.overlap import Overlap
from components.evaluate.results import build_results, exam_results
from components.evaluate.rouge import Rouge
from components.evaluate.scores import Scored, add_bertscore, by_stratum, compare, score_answers

NOT_REPORTED = {"model_uri", "base_model", "dataset", "results", "report", "metrics"}  # told by their digests, or only where output goes
SKIP_BERTSCORE = "none"


@dataclass(frozen=True)
class Inputs:
    """Everything an evaluation reads, found and checked before the first model is loaded.

    Attributes:
        encoder: (what it is, folder) of the BERTScore encoder; None to skip.
        sitting: the exam; None without one.
    """

    tuned_folder: Path
    tuned_digest: str
    chat: ChatFormat
    base_folder: Path | None
    encoder: tuple[str, Path] | None
    held_out: HeldOut
    data_digest: str
    sitting: Sitting | None


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
    tokenizer = _tokenizer(folder)
    sitting = prepare_sitting(settings, tokenizer, chat)
    held_out = load_held_out(
        settings.dataset,
        split,
        tokenizer=tokenizer,
        chat=chat,
        sample_size=settings.sample_size,
        seed=settings.seed,
        context_tokens=min(_context_tokens(one) for one in (folder, base_folder) if one),
        max_new_tokens=max(settings.max_new_tokens, sitting.max_new_tokens if sitting else 0),
    )
    sampled = f", a sample by {held_out.stratified_by}" if 0 < settings.sample_size < held_out.available else ""
    print(f"rows: {len(held_out.rows)} of {held_out.available} held-out rows{sampled}", flush=True)
    if held_out.too_long:
        print(f"left out: {len(held_out.too_long)} rows longer than the model's context (lines {held_out.too_long[:10]})", flush=True)
    return Inputs(folder, manifest.digest, chat, base_folder, encoder, held_out, data_digest, sitting)


def evaluate(settings: EvaluateSettings, inputs: Inputs) -> dict[str, Any]:
    """Run both models over the rows and the exam, score, compare, decide; the content of the results file."""
    started = time.monotonic()
    tuned, base = _run_models(settings, inputs)
    timings: dict[str, Any] = {name: one.answers.timings for name, one in (("tuned", tuned), ("base", base)) if one}
    before = time.monotonic()
    bertscore = _bertscore(inputs, {"tuned": tuned} | ({"base": base} if base else {}), settings.batch_size)
    timings["bertscore_s"] = round(time.monotonic() - before, 2)

    how: dict[str, Any] = {"confidence": settings.confidence, "seed": settings.seed}
    rows, base_scores = inputs.held_out.rows, base.scores if base else None
    comparison = compare(tuned.scores, base_scores, **how)
    exam = exam_results(inputs.sitting, settings.exam_path, tuned, base, **how) if inputs.sitting else None
    verdict = decide(comparison, _rules(settings), rows=len(rows), leaked=inputs.held_out.leaked, exam=exam["comparison"] if exam else None)
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
        strata=by_stratum([row.stratum for row in rows], tuned.scores, base_scores, **how),
        tuned_scored=tuned,
        base_scored=base,
        exam=exam,
        bertscore=bertscore,
        timings=timings,
    )


def _run_models(settings: EvaluateSettings, inputs: Inputs) -> tuple[Scored, Scored | None]:
    """Answers and their scores of the tuned model, then of the base, each loaded once."""
    rows, rouge, overlap = inputs.held_out.rows, Rouge(settings.rouge_tokens), Overlap()

    def scored(label: str, folder: Path) -> Scored:
        answers = answer_all(
            folder,
            label,
            rows,
            chat=inputs.chat,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            sitting=inputs.sitting,
        )
        return score_answers(rows, answers, rouge, overlap, label)

    return scored("tuned", inputs.tuned_folder), scored("base", inputs.base_folder) if inputs.base_folder else None


def _rules(settings: EvaluateSettings) -> Rules:
    return Rules(
        tolerance=settings.tolerance,
        confidence=settings.confidence,
        guarded=parse_guarded(settings.guarded),
        minimums=parse_minimums(settings.minimums),
        maximums={"degenerate": settings.max_degenerate, "never_stopped": settings.max_never_stopped},
    )


def _encoder(setting: str, tuned: Path, base: Path | None) -> tuple[str, Path] | None:
    if setting == SKIP_BERTSCORE:
        return None
    if setting:
        check_encoder(Path(setting))
        return setting, Path(setting)
    return ("base model", base) if base else ("tuned model", tuned)


def _bertscore(inputs: Inputs, scored: dict[str, Scored], batch_size: int) -> dict[str, Any] | None:
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
    facts |= {"window_tokens": encoder.window_tokens, "windowed_texts": encoder.windowed_texts}
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
