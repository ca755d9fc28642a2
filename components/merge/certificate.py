"""The merge certificate: how far the merged model's answers are from those of the adapter on its base (d06)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div, nll_loss

from components.common.chat import ChatFormat
from components.common.errors import ModelError

# Both are computed in fp32, so only the order of additions differs: 0.0001 where the largest logit is 30. A wrong scale moves logits by
# whole units. The share is for the logits of a model that a bad learning rate broke, which can be huge: it is held by the gate, not here.
MAX_LOGIT_DIFFERENCE = 1e-2
MAX_DIFFERENCE_SHARE = 1e-3  # of the largest logit, where that is more

# Fixed, so that certificates of different runs compare; not from any data set, so that no patient's words are in a report.
PROBES = (
    ("高血压患者平时要注意什么？", "低盐饮食，规律运动，戒烟限酒，按医嘱服药，并定期测量血压。"),
    ("突然胸痛、出冷汗怎么办？", "这可能是心肌梗死，请立即拨打120，停止活动，不要自己开车去医院。"),
    ("What are common symptoms of diabetes?", "Thirst, frequent urination, weight loss and tiredness; some people notice nothing at all."),
    ("Can I take ibuprofen with blood thinners?", "Not without asking your doctor: together they raise the risk of serious bleeding."),
)


class Agreement(NamedTuple):
    """How well a model agrees with another on the same tokens.

    Attributes:
        max_logit_difference, mean_logit_difference: absolute, over all logits.
        largest_logit: of the other model, absolute: the scale of the differences.
        kl: mean Kullback–Leibler divergence per token, nats.
        top1_agreement: share of tokens whose most likely successor is the same, 0–1.
        nll_difference: negative log-likelihood of the probes' answers, this model's minus the other's, nats per token.
    """

    max_logit_difference: float
    mean_logit_difference: float
    largest_logit: float
    kl: float
    top1_agreement: float
    nll_difference: float


@torch.inference_mode()
def answer_logits(model: Any, tokenizer: Any, chat: ChatFormat) -> list[torch.Tensor]:
    """What a model thinks of each probe's answer: fp32 logits (answer tokens, vocab) in memory of the CPU."""
    logits = []
    for question, answer in PROBES:
        ids, mask = chat.example(tokenizer, question, answer)
        batch = torch.tensor([ids], device=model.device)
        logits.append(model(input_ids=batch, use_cache=False, logits_to_keep=sum(mask) + 1).logits[0, :-1].float().cpu())
    return logits


def answer_ids(tokenizer: Any, chat: ChatFormat) -> list[torch.Tensor]:
    """Token ids (answer tokens,) of each probe's answer."""
    examples = (chat.example(tokenizer, question, answer) for question, answer in PROBES)
    return [torch.tensor(ids)[torch.tensor(mask)] for ids, mask in examples]


def agreement(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> Agreement:
    """Compare a model's logits with the expected ones; each list has one (tokens, vocab) tensor a probe."""
    rows = []
    for wanted, got, label in zip(expected, found, labels, strict=True):
        difference, wanted_log, got_log = (wanted - got).abs(), wanted.log_softmax(-1), got.log_softmax(-1)
        rows.append(
            torch.stack(
                [
                    difference.max(),
                    wanted.abs().max(),
                    difference.mean(dim=-1).sum(),
                    kl_div(got_log, wanted_log, reduction="sum", log_target=True),
                    (wanted.argmax(-1) == got.argmax(-1)).sum(),
                    nll_loss(got_log, label, reduction="sum") - nll_loss(wanted_log, label, reduction="sum"),
                ]
            )
        )
    table, tokens = torch.stack(rows), sum(len(label) for label in labels)
    # torch's maximum, not Python's: that one would lose a logit that is not a number.
    largest, scale = table[:, :2].amax(dim=0).tolist()
    mean, kl, same, nll = (table[:, 2:].sum(dim=0) / tokens).tolist()
    return Agreement(largest, mean, scale, abs(kl), same, nll)


def require(found: Agreement) -> None:
    """Refuse a merge that changed the model.

    Raises:
        ModelError: the merged fp32 model differs from the adapter on its base by more than rounding.
    """
    allowed = max(MAX_LOGIT_DIFFERENCE, MAX_DIFFERENCE_SHARE * found.largest_logit)
    if not found.max_logit_difference <= allowed:  # also where a logit is not a number
        raise ModelError(
            f"the merged model is not what was trained: its logits differ by up to {found.max_logit_difference:.3g}, "
            f"where {allowed:.3g} is rounding, and {found.top1_agreement:.1%} of the tokens agree",
            fix="use the versions of requirements.txt and merge again; if the adapter's own logits are not finite, train with a lower learning rate",
        )
