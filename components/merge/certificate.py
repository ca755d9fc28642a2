"""The merge certificate: how far the merged model's answers are from those of the adapter on its base (d06)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import kl_div, nll_loss

from components.common.chat import ChatFormat
from components.common.errors import ModelError

# Both are computed in fp32, so only the order of additions differs: 0.0002 on a 135M model. A wrong scale moves logits by whole units.
MAX_LOGIT_DIFFERENCE = 1e-2
MIN_TOP1_AGREEMENT = 0.99

# Fixed, so that certificates of different runs compare; not from any data set, so that no patient's words are in a report.
PROBES = (
    ("高血压患者平时要注意什么？", "低盐饮食，规律运动，戒烟限酒，按医嘱服药，并定期测量血压。"),
    ("突然胸痛、出冷汗怎么办？", "这可能是心肌梗死，请立即拨打120，停止活动，不要自己开车去医院。"),
    ("糖尿病有哪些常见症状？", "多饮、多尿、多食和体重下降；也有人没有症状，要靠查血糖发现。"),
    ("发烧到39度需要去医院吗？", "先多喝水、休息，可用退烧药；持续三天不退或精神很差时要就医。"),
    ("What are common symptoms of diabetes?", "Thirst, frequent urination, weight loss and tiredness; some people notice nothing at all."),
    ("When should a cough be seen by a doctor?", "See a doctor if it lasts more than three weeks, brings up blood, or comes with fever."),
    ("Can I take ibuprofen with blood thinners?", "Not without asking your doctor: together they raise the risk of serious bleeding."),
    ("What helps against trouble sleeping?", "Keep regular hours, avoid caffeine late in the day, and keep screens out of the bedroom."),
)


class Agreement(NamedTuple):
    """How well a model agrees with another on the same tokens.

    Attributes:
        max_logit_difference, mean_logit_difference: absolute, over all logits.
        kl: mean Kullback–Leibler divergence per token, nats.
        top1_agreement: share of tokens whose most likely successor is the same, 0–1.
        nll_difference: negative log-likelihood of the probes' answers, this model's minus the other's, nats per token.
    """

    max_logit_difference: float
    mean_logit_difference: float
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
    tokens = sum(len(label) for label in labels)
    largest = total = kl = same = nll = 0.0
    for wanted, got, label in zip(expected, found, labels, strict=True):
        difference = (wanted - got).abs()
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(dim=-1).sum())
        wanted_log, got_log = wanted.log_softmax(-1), got.log_softmax(-1)
        kl += float(kl_div(got_log, wanted_log, reduction="sum", log_target=True))
        same += float((wanted.argmax(-1) == got.argmax(-1)).sum())
        nll += float(nll_loss(got_log, label, reduction="sum") - nll_loss(wanted_log, label, reduction="sum"))
    return Agreement(largest, total / tokens, max(0.0, kl / tokens), same / tokens, nll / tokens)


def require(found: Agreement) -> None:
    """Refuse a merge that changed the model.

    Raises:
        ModelError: the merged fp32 model differs from the adapter on its base by more than rounding.
    """
    if not (found.max_logit_difference <= MAX_LOGIT_DIFFERENCE and found.top1_agreement >= MIN_TOP1_AGREEMENT):
        raise ModelError(
            "the merged model is not what was trained: "
            f"its logits differ by up to {found.max_logit_difference:.3g} (at most {MAX_LOGIT_DIFFERENCE} is rounding), "
            f"and {found.top1_agreement:.1%} of the tokens agree (at least {MIN_TOP1_AGREEMENT:.0%} must)",
            fix="check that peft and transformers are the versions of requirements.txt, and merge again",
        )
