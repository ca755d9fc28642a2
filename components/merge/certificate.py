"""The merge certificate: how far the merged model's answers are from those of the adapter on its base (d06)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div, nll_loss

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.common.progress import progress
from components.merge.rows import Row

# Both are computed in fp32, so only the order of additions differs: 0.0001 where the largest logit is 30. A wrong scale moves logits by
# whole units. The share is for the logits of a model that a bad learning rate broke, which can be huge: it is held by the gate, not here.
MAX_LOGIT_DIFFERENCE = 1e-2
MAX_DIFFERENCE_SHARE = 1e-3  # of the largest logit, where that is more

GREEDY_ROWS = 4
GREEDY_TOKENS = 32
CHUNK_TOKENS = 64  # logits compared at a time: a vocabulary is large


class Agreement(NamedTuple):
    """How well a model agrees with another on the same tokens.

    Attributes:
        max_logit_difference, mean_logit_difference: absolute, over all logits.
        largest_logit: of the other model, absolute: the scale of the differences.
        kl: mean Kullback–Leibler divergence per token, nats.
        top1_agreement: share of tokens whose most likely successor is the same, 0–1.
        nll: negative log-likelihood of the answers, nats per token.
        nll_difference: that, minus the other model's.
        greedy_rows: rows that the other model continued greedily, by at most `GREEDY_TOKENS` tokens.
        greedy_diverged: how many of them this model would have continued otherwise.
        first_greedy_divergence: the first position, from 0, where one of them differs; None where none does.
        row_nll: negative log-likelihood of each row's answer, nats.
    """

    max_logit_difference: float
    mean_logit_difference: float
    largest_logit: float
    kl: float
    top1_agreement: float
    nll: float
    nll_difference: float
    greedy_rows: int
    greedy_diverged: int
    first_greedy_divergence: int | None
    row_nll: tuple[float, ...]


class Expected(NamedTuple):
    """What the adapter on its base says, the logits on the disk: for a large vocabulary they would fill the memory.

    Attributes:
        logits: a file for each row, with fp32 logits (answer tokens, vocab).
        greedy: prompt and greedy continuation of the first rows, and the prompt's length.
    """

    logits: list[Path]
    greedy: list[tuple[list[int], int]]


@torch.inference_mode()
def expect(model: Any, rows: Sequence[Row], chat: ChatFormat, folder: Path, *, greedy: bool = True) -> Expected:
    """Run the model that was trained over the rows.

    Args:
        folder: an existing folder for the logits.
        greedy: also continue the first rows greedily; it takes a forward pass a token.
    """
    from safetensors.torch import save_file

    paths, continued = [], []
    with progress("adapter on its base, rows", len(rows)) as meter:
        for number, row in enumerate(rows):
            paths.append(folder / f"{number:03d}.safetensors")
            save_file({"logits": answer_logits(model, row).cpu().contiguous()}, paths[-1])
            meter.advance()
    for row in rows[:GREEDY_ROWS] if greedy else ():
        prompt = _batch(model, row.prompt_ids)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=GREEDY_TOKENS,
            eos_token_id=list(chat.stop_ids),
            pad_token_id=chat.pad_id,
        )
        continued.append((output[0].tolist(), len(row.prompt_ids)))
    return Expected(paths, continued)


@torch.inference_mode()
def compare(model: Any, rows: Sequence[Row], expected: Expected, label: str) -> Agreement:
    """Run another model over the same rows, and compare it with what is expected."""
    from safetensors.torch import load_file

    parts = []
    with progress(f"{label}, rows", len(rows)) as meter:
        for row, path in zip(rows, expected.logits, strict=True):
            parts.append(_differences(load_file(path)["logits"], answer_logits(model, row), row.answer_ids))
            meter.advance()
    divergences = [_first_divergence(model, ids, start) for ids, start in expected.greedy]
    return summary(torch.stack(parts), sum(len(row.answer_ids) for row in rows), divergences)


@torch.inference_mode()
def answer_logits(model: Any, row: Row) -> torch.Tensor:
    """What a model thinks of a row's answer: fp32 logits (answer tokens, vocab), on the model's device."""
    logits = model(input_ids=_batch(model, row.ids), use_cache=False, logits_to_keep=len(row.answer_ids) + 1).logits[0, :-1]
    return torch.as_tensor(logits).float()


def _batch(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Token ids (1, tokens) where the model wants them; one whose weights are on the disk fetches them itself."""
    return torch.tensor([ids], device="cpu" if model.device.type == "meta" else model.device)


def _differences(expected: torch.Tensor, found: torch.Tensor, answer: Sequence[int]) -> torch.Tensor:
    """For one row, float64 (7,): largest difference and logit, then sums over its tokens; see `summary`."""
    parts = []
    for first in range(0, len(answer), CHUNK_TOKENS):
        rows = slice(first, first + CHUNK_TOKENS)
        wanted, got, label = expected[rows].to(found.device), found[rows], torch.tensor(answer[rows], device=found.device)
        difference, wanted_log, got_log = (wanted - got).abs(), wanted.log_softmax(-1), got.log_softmax(-1)
        numbers = [
            difference.max(),
            wanted.abs().max(),
            difference.mean(dim=-1).sum(),
            kl_div(got_log, wanted_log, reduction="sum", log_target=True),
            (wanted.argmax(-1) == got.argmax(-1)).sum(),
            nll_loss(got_log, label, reduction="sum"),
            nll_loss(wanted_log, label, reduction="sum"),
        ]
        parts.append(torch.stack([number.double().cpu() for number in numbers]))
    table = torch.stack(parts)
    return torch.cat([table[:, :2].amax(dim=0), table[:, 2:].sum(dim=0)])


def _first_divergence(model: Any, ids: list[int], start: int) -> int | None:
    """The first token after `start` that the model would not have chosen, as a position in the continuation.

    One forward pass tells it: up to the first difference, both models have read the same tokens.
    """
    logits = model(input_ids=_batch(model, ids), use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1]
    chosen = logits.argmax(-1).tolist()
    return next((at for at, (mine, other) in enumerate(zip(chosen, ids[start:], strict=True)) if mine != other), None)


def summary(parts: torch.Tensor, tokens: int, divergences: Sequence[int | None]) -> Agreement:
    """The figures of all rows together, from those of each (rows, 7)."""
    # torch's maximum, not Python's: that one would lose a logit that is not a number.
    largest, scale = parts[:, :2].amax(dim=0).tolist()
    mean, kl, same, nll, wanted_nll = (parts[:, 2:].sum(dim=0) / tokens).tolist()
    found = [at for at in divergences if at is not None]
    return Agreement(
        max_logit_difference=largest,
        mean_logit_difference=mean,
        largest_logit=scale,
        kl=abs(kl),
        top1_agreement=same,
        nll=nll,
        nll_difference=nll - wanted_nll,
        greedy_rows=len(divergences),
        greedy_diverged=len(found),
        first_greedy_divergence=min(found, default=None),
        row_nll=tuple(parts[:, 5].tolist()),
    )


def allowed_difference(found: Agreement) -> float:
    """The largest logit difference that is rounding in fp32."""
    return max(MAX_LOGIT_DIFFERENCE, MAX_DIFFERENCE_SHARE * found.largest_logit)


def require(found: Agreement) -> None:
    """Refuse a merge that changed the model.

    Raises:
        ModelError: the merged fp32 model differs from the adapter on its base by more than rounding.
    """
    allowed = allowed_difference(found)
    if not found.max_logit_difference <= allowed:  # also where a logit is not a number
        raise ModelError(
            f"the merged model is not what was trained: its logits differ by up to {found.max_logit_difference:.3g}, "
            f"where {allowed:.3g} is rounding, and {found.top1_agreement:.1%} of the tokens agree",
            fix="use the versions of requirements.txt and merge again; if the adapter's own logits are not finite, train with a lower learning rate",
        )
