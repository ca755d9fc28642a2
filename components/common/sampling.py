"""Choose the next token of each request in a batch: greedy and sampled requests side by side.

The engine takes the arg max of the scores. A greedy request's scores stay as they are, so it costs nothing and equals plain greedy
`generate`, ties included. A sampled request's scores get Gumbel noise first: the arg max is then an exact draw from their softmax
(Gumbel 1954; Maddison et al. 2014, "A* sampling"). The library's own per-request warpers sort the whole vocabulary for every request
at every step, greedy ones too: 26 ms each on a CPU for a vocabulary of 262,144.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

NUCLEUS_GUESS = 1024  # tokens looked at first for top_p; the whole vocabulary is sorted only if they hold less than top_p


class Sampler(ContinuousBatchingLogitsProcessor):
    """Applies each request's own temperature, top_k and top_p; a request without `temperature` is greedy."""

    supported_kwargs = {"temperature": float, "top_p": float, "top_k": int}  # noqa: RUF012 - the base class declares it so
    ignored_kwargs = ()

    def __init__(self, device: torch.device) -> None:
        self._random = torch.Generator(device=device)
        self._random.seed()
        self._rows: list[dict[str, Any]] = []

    def as_list(self) -> ContinuousBatchingLogitsProcessorList:
        """This sampler as the one processor of a manager."""
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self]))
        processors.tensors_required = 1  # the list hands arguments only to processors that own a row of its storage
        return processors

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """The storage row stays unused: the settings travel as Python values, see `prepare_tensor_args`."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note the settings of the requests of the step that follows at once in the same thread."""
        self._rows = [request.state.logit_processor_kwargs for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores whose arg max is the next token; (requests, vocabulary) in and out."""
        for row, settings in enumerate(self._rows):
            if settings.get("temperature"):
                scores[row] = self._drawn(scores[row], **settings)
        return scores

    def _drawn(self, scores: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
        scores = keep_top_p(keep_top_k(scores / temperature, top_k), top_p)
        return scores - torch.empty_like(scores).exponential_(generator=self._random).log_()


def keep_top_k(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Only the `top_k` highest scores, the others -inf; 0 keeps the whole vocabulary. Shape (vocabulary,)."""
    if not 0 < top_k < scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < torch.topk(scores, top_k).values[-1], -torch.inf)


def keep_top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Only the smallest set of highest scores whose probability reaches `top_p`, the others -inf. Shape (vocabulary,)."""
    if top_p >= 1.0:
        return scores
    normaliser = scores.logsumexp(-1)
    for count in (min(NUCLEUS_GUESS, scores.shape[-1]), scores.shape[-1]):
        highest = torch.topk(scores, count).values
        probabilities = (highest - normaliser).exp()
        reached = probabilities.cumsum(-1)
        if reached[-1] >= top_p:
            break
    kept = int((reached - probabilities < top_p).sum())
    return scores.masked_fill(scores < highest[max(kept, 1) - 1], -torch.inf)
