"""How likely a model finds each option's letter as the first token of its answer.

The log-likelihood of the letter alone, over the whole vocabulary, in nats; the likeliest letter is the model's choice.
Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding", 2021, and lm-evaluation-harness's `acc` of MMLU. The
letter and not the option's text is scored, because the prompt prints the options; so no normalisation by length is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from components.common.chat import ChatFormat
from components.common.errors import ModelError


def letter_tokens(chat: ChatFormat, tokenizer: Any, letters: Sequence[str]) -> list[int]:
    """The token with which an answer that is this letter begins, for each letter.

    Raises:
        ModelError: a letter is not one token, or two letters share one.
    """
    tokens = []
    for letter in letters:
        ids, is_answer = chat.example(tokenizer, letter, letter)
        tokens.append([token for token, answer in zip(ids, is_answer, strict=True) if answer][:-1])
    if any(len(one) != 1 for one in tokens) or len({one[0] for one in tokens}) < len(tokens):
        raise ModelError(
            f"the tokenizer has no token of its own for each of the letters {', '.join(letters)}",
            fix="leave exam_path empty: this model can't be scored by the likelihood of letters",
        )
    return [one[0] for one in tokens]


def next_log_likelihoods(
    model: Any, prompts: Sequence[list[int]], tokens: Sequence[int], *, pad_id: int, batch_size: int
) -> list[list[float]]:
    """Log-likelihood of each of `tokens` right after each prompt, nats.

    Prompts of similar length share a batch, padded on the left, so that the last position is the one that counts and the head runs on
    it alone: logits are (batch, 1, vocab), never (batch, seq, vocab).

    Args:
        model: a Hugging Face causal language model.

    Returns:
        (prompts, tokens), in the order given.
    """
    import torch

    result: list[list[float]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(prompts[batch[0]])
            missing = [width - len(prompts[index]) for index in batch]
            ids = torch.tensor([[pad_id] * pad + prompts[index] for index, pad in zip(batch, missing, strict=True)], device=model.device)
            present = torch.tensor([[0] * pad + [1] * (width - pad) for pad in missing], device=model.device)
            positions = (present.cumsum(dim=1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=present, position_ids=positions, use_cache=False, logits_to_keep=1).logits
            scores = logits[:, -1].float().log_softmax(dim=-1)[:, list(tokens)]  # (batch, tokens)
            for index, row in zip(batch, scores.tolist(), strict=True):
                result[index] = row
    return result
