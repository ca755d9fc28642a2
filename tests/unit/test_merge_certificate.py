"""The merge certificate: the merged model is the adapter on its base, and a merge that isn't is caught (d06)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.merge.certificate import PROBES, Agreement, agreement, answer_ids, answer_logits, require
from components.merge.merging import merged


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    return ChatFormat.of_tokenizer(tokenizer)


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    """The tiny model in fp32 with an adapter that changes its answers."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config).eval()


def certificate(adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> Agreement:
    expected = answer_logits(adapted, tokenizer, chat)
    return agreement(expected, answer_logits(merged(adapted), tokenizer, chat), answer_ids(tokenizer, chat))


def test_d06_a_merge_agrees_with_the_adapter_on_its_base(adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    found = certificate(adapted, tokenizer, chat)
    require(found)
    assert found.max_logit_difference < 1e-3, f"logits differ by {found.max_logit_difference:.3g}"
    assert found.kl < 1e-6
    assert found.top1_agreement == 1
    assert abs(found.nll_difference) < 1e-4


@pytest.mark.parametrize("wrong", [0.5, 0.99, 1.01, 2.0, -1.0])
def test_d06_a_wrong_scale_is_caught(
    wrong: float, adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * wrong)
    found = certificate(adapted, tokenizer, chat)
    with pytest.raises(ModelError, match="not what was trained"):
        require(found)


def test_d06_a_layer_that_was_not_merged_is_caught(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    right = Linear.get_delta_weight
    last = adapted.get_base_model().model.layers[-1].mlp.down_proj
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * (0.0 if self is last else 1.0))
    with pytest.raises(ModelError, match="not what was trained"):
        require(certificate(adapted, tokenizer, chat))


def test_d06_bf16_weights_agree_less_which_the_figures_show(adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    expected, labels = answer_logits(adapted, tokenizer, chat), answer_ids(tokenizer, chat)
    found = agreement(expected, answer_logits(merged(adapted).to(torch.bfloat16), tokenizer, chat), labels)
    assert found.max_logit_difference > 1e-2
    assert 0 < found.kl < 0.1


def test_the_figures_are_those_computed_by_hand() -> None:
    wanted = [torch.tensor([[0.0, 0.0], [2.0, 0.0]])]
    got = [torch.tensor([[0.0, math.log(3)], [2.0, 0.0]])]
    found = agreement(wanted, got, [torch.tensor([0, 0])])
    assert found.max_logit_difference == pytest.approx(math.log(3))
    assert found.mean_logit_difference == pytest.approx(math.log(3) / 4)
    assert found.largest_logit == 2
    # The first token: p = (1/2, 1/2), q = (1/4, 3/4); the second agrees.
    assert found.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert found.top1_agreement == 0.5
    assert found.nll_difference == pytest.approx((math.log(4) - math.log(2)) / 2)


def test_logits_that_are_not_numbers_are_not_taken_for_agreement() -> None:
    nothing = [torch.full((2, 3), math.nan)]
    with pytest.raises(ModelError, match="not what was trained"):
        require(agreement(nothing, nothing, [torch.tensor([0, 0])]))


def test_rounding_is_seen_on_the_scale_of_the_logits() -> None:
    broken = Agreement(0.5, 0.0, 5000.0, 0.0, 1.0, 0.0)
    require(broken)
    with pytest.raises(ModelError):
        require(broken._replace(largest_logit=20.0))


def test_the_probes_are_compared_where_the_answer_is(adapted: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    labels = answer_ids(tokenizer, chat)
    for (_question, answer), ids, logits in zip(PROBES, labels, answer_logits(adapted, tokenizer, chat), strict=True):
        assert tokenizer.decode(ids[:-1]) == answer
        assert int(ids[-1]) == chat.end_of_turn_id
        assert len(logits) == len(ids)
    question, answer = PROBES[0]
    row, mask = chat.example(tokenizer, question, answer)
    with torch.no_grad():
        whole = adapted(torch.tensor([row])).logits[0]
    found = answer_logits(adapted, tokenizer, chat)[0]
    torch.testing.assert_close(found, whole[[index - 1 for index, wanted in enumerate(mask) if wanted]])
