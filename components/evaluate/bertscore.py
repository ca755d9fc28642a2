"""BERTScore F1 of an answer against its reference: tokens matched by meaning instead of spelling.

Range 0–1 in practice (−1 to 1 by its formula), higher is better; not rescaled, so numbers compare within one encoder only. Tokenizer:
the encoder's own. Source: Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020; computed by the `bert-score` library.

A text longer than the encoder's window is encoded in windows side by side, so that nothing is cut; at a seam a token does not see its neighbours
in the window before. Such texts are counted.

The encoder is a local folder, never the hub, and may be a causal language model. Two thirds of its layers are used: where the paper
found the best correlation with people for most models (8 of 12 for bert-base-chinese, 17 of 24 for roberta-large).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from components.common.device import choose_compute
from components.common.errors import ModelError

MAX_TOKENS = 2048  # bounds the memory of an encoder with a long window


@dataclass
class Encoder:
    """A model that turns texts into token embeddings.

    Attributes:
        layers: how many of the model's layers are used.
        window_tokens: tokens encoded at one time, with the special ones.
        windowed_texts: how many texts were longer and took several windows; a text counts once for each pair it is in.
    """

    model: Any
    tokenizer: Any
    layers: int
    window_tokens: int
    windowed_texts: int = field(default=0)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load the first two thirds of a model's layers.

        Raises:
            ModelError: no such folder, no model in it, or weights are missing.
        """
        check_encoder(folder)
        compute = choose_compute()
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # else it lists every weight of the layers left out
        local: dict[str, Any] = {"local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            config.num_hidden_layers = layers = round(config.num_hidden_layers * 2 / 3)
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model, loaded = AutoModel.from_pretrained(
                folder, config=config, dtype=compute.dtype, use_safetensors=True, output_loading_info=True, **local
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise _unusable(folder, (str(error).strip().splitlines() or [type(error).__name__])[0][:300]) from None
        missing = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))  # BERT's pooler is not used
        if missing:  # the library would go on with random weights
            raise _unusable(folder, f"weights are missing: {', '.join(missing[:3])}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        window = min(MAX_TOKENS, tokenizer.model_max_length, getattr(config, "max_position_embeddings", MAX_TOKENS))
        tokenizer.model_max_length = window  # unset it is 10**30, which overflows in the library
        model.register_forward_hook(lambda module, inputs, output: (output[0].float(),))  # cosines in bf16 are off by 0.01
        return cls(model.to(compute.device).eval(), tokenizer, layers, window)

    def scores(
        self, references: Sequence[str], answers: Sequence[str], *, batch_size: int, on_done: Callable[[int], None] | None = None
    ) -> list[float]:
        """F1 of each answer against its reference; an empty answer scores 0.

        Args:
            on_done: called with the number of pairs of each finished batch.

        Returns:
            One value per pair, in the order given.
        """
        from bert_score.utils import greedy_cos_idf

        result = [0.0] * len(references)
        lengths = [max(self._count(reference), self._count(answer)) for reference, answer in zip(references, answers, strict=True)]
        order = [pair for pair in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True) if answers[pair].strip()]
        # One call per batch: the library sorts by words between blanks, of which Chinese has none, and keeps every embedding of a call.
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            embedded = [self._embed([texts[pair] for pair in batch]) for texts in (references, answers)]
            for pair, value in zip(batch, greedy_cos_idf(*embedded[0], *embedded[1])[2].tolist(), strict=True):
                result[pair] = value
            if on_done:
                on_done(len(batch))
        return result

    def _embed(self, texts: Sequence[str]) -> tuple[Any, Any, Any]:
        """Embeddings (texts, tokens, hidden), mask and weights (texts, tokens) of texts; special tokens have the weight 0."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        limits = {"truncation": True, "max_length": self.window_tokens, "return_overflowing_tokens": True}
        encoded = self.tokenizer([text.strip() for text in texts], **limits)  # one entry per window
        windows = list(zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True))
        states: list[list[Any]] = [[] for _ in texts]
        for start in range(0, len(windows), len(texts)):
            chunk = windows[start : start + len(texts)]
            padded = pad_sequence([torch.tensor(one) for _, one in chunk], batch_first=True, padding_value=self.tokenizer.pad_token_id)
            present = pad_sequence([torch.ones(len(one), dtype=torch.long) for _, one in chunk], batch_first=True)
            with torch.inference_mode():
                output = self.model(padded.to(self.model.device), attention_mask=present.to(self.model.device))[0]
            for (at, one), hidden in zip(chunk, output, strict=True):
                states[at].append(hidden[: len(one)].cpu())
        tokens = [torch.tensor([token for at, one in windows if at == index for token in one]) for index in range(len(texts))]
        ignored = torch.tensor(self.tokenizer.all_special_ids)
        weights = pad_sequence([(~torch.isin(one, ignored)).float() for one in tokens], batch_first=True)
        mask = pad_sequence([torch.ones(len(one), dtype=torch.long) for one in tokens], batch_first=True)
        return pad_sequence([torch.cat(one) for one in states], batch_first=True, padding_value=2.0), mask, weights

    def _count(self, text: str) -> int:
        tokens = len(self.tokenizer(text, truncation=False, verbose=False).input_ids)
        self.windowed_texts += tokens > self.window_tokens
        return tokens


def check_encoder(folder: Path) -> None:
    """Refuse a folder that is no model, before hours of generation.

    Raises:
        ModelError: the folder or its config.json is absent.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the encoder of BERTScore is not there: no config.json",
            where=str(folder),
            fix="give a local model folder with --bertscore_model, or none to skip BERTScore",
        )


def _unusable(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"the encoder of BERTScore can't be loaded: {reason}", where=str(folder), fix="name another folder with --bertscore_model, or none"
    )
