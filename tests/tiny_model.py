"""A tiny Qwen2 with a tokenizer of its own, fully pre-trained for a few seconds on Chinese medical text:
half of the shipped rows, and the pattern rows with other answers than those that tests teach it."""

from __future__ import annotations

import random
from pathlib import Path

from filelock import FileLock

from components.common.files import sha256_file, whole_folder
from tests.rows import AFTER, BEFORE, pattern_rows

STEPS = 200
VOCABULARY = 2000


def build_tiny_model(rows: list[dict[str, str]], cache: Path) -> Path:
    """A Hugging Face folder with a causal language model of about a million parameters."""
    target = cache / f"tiny-qwen2-{sha256_file(Path(__file__))[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "build.lock"):
        if not (target / "config.json").exists():
            with whole_folder(target) as scratch:
                _pretrain(rows, scratch)
    return target


def _pretrain(rows: list[dict[str, str]], target: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from components.common.chat import ChatFormat

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    known = rows[::2] + pattern_rows(BEFORE) + pattern_rows(AFTER)[::4]  # a base that has seen nothing like it is too easily beaten
    texts = [row["question"] + row["answer"] for row in rows + known + pattern_rows(AFTER)]
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=special
    )

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    chat = ChatFormat.of_tokenizer(tokenizer)
    examples = [
        torch.tensor(chat.example(tokenizer, row["question"], row["answer"])[0]) for row in random.Random(0).sample(known, len(known))
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        batch = [examples[(step * 4 + i) % len(examples)] for i in range(4)]
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=chat.pad_id)
        labels = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
