"""The loss: negative log-likelihood of the answers' tokens, without ever holding logits of (tokens, vocab).

A vocabulary of 262,144 makes the fp32 logits of one row of 1,024 tokens a gigabyte. So the head is applied to the answers' positions
only, a chunk at a time, and each chunk's gradient is computed at once, before its logits are dropped; the head itself is frozen.
Method: Liger Kernel's fused linear cross entropy (arXiv 2410.10989), in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from components.common.errors import DataError

if TYPE_CHECKING:
    from components.train.batches import Batch

CHUNK_TOKENS = 256


def answer_nll(model: Any, batch: Batch, chunk_tokens: int = CHUNK_TOKENS) -> torch.Tensor:
    """Sum, not mean, of the negative log-likelihood in nats over the batch's trainable tokens: a scalar.

    Divide it by the trainable tokens of the whole optimizer step: a mean of micro-batch means would weigh tokens unequally.

    Raises:
        DataError: the batch has no trainable token.
    """
    causal_lm = model.get_base_model()
    # The state at position t predicts token t + 1.
    trainable = batch.mask[:, 1:]
    if not trainable.any():
        raise DataError("a batch has no trainable token", fix="give every row an answer")
    states = causal_lm.base_model(**batch.model_inputs(), use_cache=False).last_hidden_state
    return _nll(states[:, :-1][trainable], batch.ids[:, 1:][trainable], _head(causal_lm), chunk_tokens)


def plain_answer_nll(model: Any, batch: Batch) -> torch.Tensor:
    """The same sum, row after row, from the model's own logits (1, seq, vocab): the plain twin of `answer_nll`."""
    starts = [sum(batch.row_lengths[:index]) if batch.packed else 0 for index in range(len(batch.row_lengths))]
    lines = [0 if batch.packed else index for index in range(len(batch.row_lengths))]
    total = torch.zeros((), device=batch.ids.device)
    for line, start, length in zip(lines, starts, batch.row_lengths, strict=True):
        ids, mask = (part[line : line + 1, start : start + length] for part in (batch.ids, batch.mask))
        logits = model(input_ids=ids, use_cache=False).logits
        trainable = mask[:, 1:]
        total = total + cross_entropy(logits[:, :-1][trainable].float(), ids[:, 1:][trainable], reduction="sum")
    return total


def _head(causal_lm: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden states (tokens, hidden) → logits (tokens, vocab) in fp32."""
    projection = causal_lm.get_output_embeddings()
    cap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)

    def head(states: torch.Tensor) -> torch.Tensor:
        logits = projection(states)
        return (torch.tanh(logits / cap) * cap if cap else logits).float()

    return head


def _nll(states: torch.Tensor, labels: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], chunk_tokens: int) -> torch.Tensor:
    if torch.is_grad_enabled():
        total: torch.Tensor = _ChunkedNll.apply(states, labels, head, chunk_tokens)
        return total
    pairs = zip(states.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    return torch.stack([cross_entropy(head(part), wanted, reduction="sum") for part, wanted in pairs]).sum()


class _ChunkedNll(torch.autograd.Function):
    """Sum of the cross entropy over (tokens, hidden) states; its gradient is made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, labels: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], chunk_tokens: int
    ) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        gradients = []
        for part, wanted in zip(states.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                nll = cross_entropy(head(leaf), wanted, reduction="sum")
            gradients.append(torch.autograd.grad(nll, leaf)[0])
            total += nll.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None
