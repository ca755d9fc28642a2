"""The sampler against the library's own warpers, and against the distribution it must draw from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from components.common.sampling import Sampler, keep_top_k, keep_top_p


def sampler_for(settings: list[dict[str, Any]]) -> Sampler:
    sampler = Sampler(torch.device("cpu"))
    sampler.prepare_tensor_args([SimpleNamespace(state=SimpleNamespace(logit_processor_kwargs=entry)) for entry in settings])
    return sampler


@pytest.mark.parametrize("vocabulary", [10, 3000])
@pytest.mark.parametrize("top_k", [1, 2, 7, 10, 5000])
def test_top_k_equals_the_librarys(vocabulary: int, top_k: int) -> None:
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    expected = TopKLogitsWarper(top_k)(torch.zeros(1, 1, dtype=torch.long), scores[None].clone())[0]
    assert torch.equal(keep_top_k(scores, top_k), expected)


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [10, 3000])
def test_top_p_equals_the_librarys(vocabulary: int, top_p: float, scale: float) -> None:
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)).double() * scale
    expected = TopPLogitsWarper(top_p)(torch.zeros(1, 1, dtype=torch.long), scores[None].clone())[0]
    assert torch.equal(keep_top_p(scores, top_p), expected)


def test_nothing_is_cut_by_default() -> None:
    scores = torch.randn(50)
    assert keep_top_k(scores, 0) is scores
    assert keep_top_p(scores, 1.0) is scores


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    draws = 40_000
    sampler = sampler_for([{"temperature": 2.0, "top_p": 1.0, "top_k": 0}] * draws)
    tokens = sampler(scores.repeat(draws, 1), torch.zeros(draws)).argmax(-1)
    frequencies = torch.bincount(tokens, minlength=5) / draws
    assert torch.allclose(frequencies, (scores / 2.0).softmax(-1), atol=0.01)


def test_greedy_rows_stay_untouched_beside_sampled_ones() -> None:
    scores = torch.randn(3, 100)
    hot = {"temperature": 1.0, "top_p": 0.9, "top_k": 5}
    processed = sampler_for([{}, hot, {}])(scores.clone(), torch.zeros(3))
    assert torch.equal(processed[0], scores[0])
    assert torch.equal(processed[2], scores[2])
    allowed = set(torch.topk(scores[1], 5).indices.tolist())
    assert set((processed[1] > -torch.inf).nonzero().flatten().tolist()) <= allowed


def test_a_tie_is_broken_as_plain_greedy_breaks_it() -> None:
    scores = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert int(sampler_for([{}])(scores.clone(), torch.zeros(1)).argmax()) == int(scores.argmax())
