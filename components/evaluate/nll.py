"""How surprised a model is by the reference answer: the mean negative log-likelihood of its tokens.

Range 0 upwards, nats per token, lower is better; exp(NLL) is the perplexity. Tokens: the answer's and the end of its turn, given the
conversation before them, as the chat format makes them with the tuned model's tokenizer; the same ids for both models.
Source: the cross-entropy that training minimises (Bengio et al., "A Neural Probabilistic Language Model", 2003).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

HEAD_TOKENS = 128  # positions whose logits exist at one time: 134 MB in fp32 for a vocabulary of 262,144


def answer_nll(
    model: Any,
    examples: Sequence[tuple[list[int], list[bool]]],
    *,
    pad_id: int,
    batch_size: int,
    on_done: Callable[[int], None] | None = None,
) -> list[float]:
    """The mean NLL of each row's answer tokens.

    Rows of similar length share a batch. The head runs on answer positions only and in chunks: the logits of a whole batch,
    (batch, seq, vocab), never exist, and nothing but one number per row is kept.

    Args:
        model: a Hugging Face causal language model.
        examples: `ChatFormat.example` of each row: token ids, and a mask that is True on the answer.
        on_done: called with the number of rows of each finished batch.

    Returns:
        One value per row, in the order of `examples`.
    """
    import torch

    order = sorted(range(len(examples)), key=lambda row: len(examples[row][0]), reverse=True)
    result = [0.0] * len(examples)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for row, value in zip(batch, _batch_nll(model, [examples[row] for row in batch], pad_id), strict=True):
                result[row] = value
            if on_done:
                on_done(len(batch))
    return result


def _batch_nll(model: Any, examples: Sequence[tuple[list[int], list[bool]]], pad_id: int) -> list[float]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True, padding_value=pad_id).to(model.device)
    present = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids, _ in examples], batch_first=True).to(model.device)
    wanted = pad_sequence([torch.tensor(mask) for _, mask in examples], batch_first=True).to(model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=present, use_cache=False).last_hidden_state  # (batch, seq, hidden)
    before = wanted[:, 1:]  # the state at position t predicts the token at t + 1
    states, targets = hidden[:, :-1][before], ids[:, 1:][before]  # (answer tokens of the batch, hidden), (answer tokens)
    losses = torch.cat([_token_nll(model, *chunk) for chunk in zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)])
    return [float(row.double().mean()) for row in losses.split(before.sum(dim=1).tolist())]


def _token_nll(model: Any, states: Any, targets: Any) -> Any:
    """NLL of each target, in fp32; (tokens, hidden), (tokens) → (tokens)."""
    import torch

    logits = model.get_output_embeddings()(states).float()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 bounds its logits after the head
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
