"""BERTScore F1 of an answer against its reference: tokens matched by meaning instead of spelling.

Range 0–1 in practice (−1 to 1 by its formula), higher is better; not rescaled, so numbers compare within one encoder only. Tokenizer:
the encoder's own. Source: Zhang et al., "BERTScore: Evaluating Text Generation with BERT", 2020; computed by the `bert-score` library.

A text longer than the encoder's window is encoded in windows side by side, so that nothing is cut; at a seam a token does not see its neighbours
in the window before. Such texts are counted.

The encoder is a local folder, never the hub, and may be a causal language model. Two thirds of its layers are used: where the paper
found the best correlation with people for most models (8 of 12 for bert-base-chinese, 17 of 24 for roberta-large).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from components.common.device import choose_compute
from components.common.errors import ModelError

MAX_TOKENS = 2048  # bounds the memory of an encoder with a long window
STEP_TOKENS = {"cpu": 2048, "cuda": 16384}  # tokens, padding included, that go through the model at one time


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

    def scores_of_models(
        self,
        references: Sequence[str],
        answers: Mapping[str, Sequence[str]],
        *,
        batch_size: int,
        on_done: Callable[[int], None] | None = None,
    ) -> dict[str, list[float]]:
        """F1 of each model's answers against the references that they share; an empty answer scores 0.

        A reference is encoded once for all models, and an answer that several rows or models of a batch have once for all of them.

        Args:
            answers: of each model, by its name: one for each reference.
            batch_size: rows whose embeddings are held at one time.
            on_done: called with the number of pairs of each finished batch.

        Returns:
            Of each model one value per row, in the order given.
        """
        result = {name: [0.0] * len(references) for name in answers}
        pairs = {row: [name for name in answers if answers[name][row].strip()] for row in range(len(references))}
        texts = [{references[row], *(answers[name][row] for name in names)} if names else set() for row, names in pairs.items()]
        windows = self._windows(sorted(set().union(*texts)))
        lengths = [max((sum(map(len, windows[text])) for text in own), default=0) for own in texts]
        order = [row for row in sorted(pairs, key=lengths.__getitem__, reverse=True) if pairs[row]]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            states = self._encode({text: windows[text] for row in batch for text in sorted(texts[row])})
            for name in answers:
                rows = [row for row in batch if name in pairs[row]]
                both = [(references[row], answers[name][row]) for row in rows]
                self.windowed_texts += sum(len(windows[text]) > 1 for pair in both for text in pair)
                for row, value in zip(rows, self._f1(both, windows, states), strict=True):
                    result[name][row] = value
            if on_done:
                on_done(sum(len(pairs[row]) for row in batch))
        return result

    def _windows(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The token ids of each text, window by window; a window has the special tokens of a text."""
        windows: dict[str, list[list[int]]] = {text: [] for text in texts}
        if texts:
            limits = {"truncation": True, "max_length": self.window_tokens, "return_overflowing_tokens": True}
            encoded = self.tokenizer([text.strip() for text in texts], **limits)
            for at, ids in zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True):
                windows[texts[at]].append(ids)
        return windows

    def _encode(self, windows: Mapping[str, list[list[int]]]) -> dict[str, Any]:
        """Embeddings (tokens, hidden) of each text, on the CPU. Windows of about one length go through the model together."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        parts: dict[str, list[Any]] = {text: [None] * len(own) for text, own in windows.items()}
        waiting = sorted(
            ((text, place, ids) for text, own in windows.items() for place, ids in enumerate(own)), key=lambda one: len(one[2])
        )
        device = self.model.device
        while waiting:
            size = max(1, STEP_TOKENS.get(device.type, STEP_TOKENS["cpu"]) // len(waiting[-1][2]))
            chunk, waiting = waiting[-size:], waiting[:-size]
            tokens = [torch.tensor(ids) for _, _, ids in chunk]
            padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            present = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
            with torch.inference_mode():
                output = self.model(padded.to(device), attention_mask=present.to(device))[0].cpu()
            for (text, place, ids), hidden in zip(chunk, output, strict=True):
                parts[text][place] = hidden[: len(ids)]
        return {text: torch.cat(own) for text, own in parts.items()}

    def _f1(self, pairs: Sequence[tuple[str, str]], windows: Mapping[str, list[list[int]]], states: Mapping[str, Any]) -> list[float]:
        """F1 of pairs of texts whose embeddings are there; special tokens have no weight."""
        import torch
        from bert_score.utils import greedy_cos_idf
        from torch.nn.utils.rnn import pad_sequence

        if not pairs:
            return []
        ignored = torch.tensor(self.tokenizer.all_special_ids)
        inputs = []
        for texts in zip(*pairs, strict=True):
            tokens = [torch.tensor([token for window in windows[text] for token in window]) for text in texts]
            weights = pad_sequence([(~torch.isin(one, ignored)).float() for one in tokens], batch_first=True)
            mask = pad_sequence([torch.ones_like(one) for one in tokens], batch_first=True)
            inputs += [pad_sequence([states[text] for text in texts], batch_first=True, padding_value=2.0), mask, weights]
        values: list[float] = greedy_cos_idf(*inputs)[2].tolist()
        return values


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
