"""One conversation → token ids: the only place where a prompt is made, for training, evaluation and the service alike.

The model's own chat template decides the layout; a base model without one gets ours. The template is rendered once with placeholders,
and each placeholder is replaced by the tokens of its text, tokenised as plain text: what a user types can never become a control
token. The digest of all this travels with the adapter and the model, and the service refuses a model whose digest differs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from components.common.errors import ModelError
from components.common.files import read_json, sha256_text, write_json

FORMAT_VERSION = 1
FILE_NAME = "chat_format.json"
DEFAULT_SYSTEM_PROMPT = "你是一名严谨的医学健康助手。请用提问者的语言，清楚、准确地回答；遇到急症提醒立即就医；不确定时请说明。"

# For base models, which have no chat template of their own: (a token that must be in the vocabulary, template).
_OUR_TEMPLATES = (
    (
        "<|im_start|>",
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    (
        "<start_of_turn>",
        "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
        "{{ message.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
)
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters around a placeholder's number; removed from users' text


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatFormat:
    """Everything that decides how a conversation becomes tokens and when an answer ends.

    Attributes:
        template: the Jinja chat template.
        system_prompt: the system turn that opens every conversation.
        end_of_turn_id: the token that closes an answer; the last label of every training row.
        stop_ids: tokens that end generation; `end_of_turn_id` is the first.
        pad_id: never one of `stop_ids`: a pad that is the end token teaches a model never to stop.
    """

    template: str
    system_prompt: str
    end_of_turn_id: int
    stop_ids: tuple[int, ...]
    pad_id: int

    @property
    def digest(self) -> str:
        """The sha256 of all the fields; equal digests mean equal prompts on the same tokenizer."""
        return sha256_text(json.dumps({"version": FORMAT_VERSION, **asdict(self)}, sort_keys=True))

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, system_prompt: str = DEFAULT_SYSTEM_PROMPT) -> ChatFormat:
        """The format that suits a Hugging Face tokenizer: its own template, else ours for its turn tokens.

        Raises:
            ModelError: no template and no known turn tokens.
        """
        vocabulary = tokenizer.get_vocab()
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
        if template is None:
            template = next((ours for token, ours in _OUR_TEMPLATES if token in vocabulary), None)
        if template is None:
            raise ModelError(
                "the base model has no chat template and no turn tokens that we know",
                fix="set `chat_template` in its tokenizer_config.json",
            )
        tail = _pieces(tokenizer, template, ("user", "assistant"), False)[-1]
        tail_ids = _tokens(tokenizer, tail, plain=False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        end_of_turn = tail_ids[0] if tail_ids and tail_ids[0] in special else tokenizer.eos_token_id
        if end_of_turn is None:
            raise ModelError("the tokenizer has no token that ends a turn", fix="set `eos_token` in its tokenizer_config.json")
        stops = tuple(dict.fromkeys(i for i in (end_of_turn, tokenizer.eos_token_id) if i is not None))
        return cls(template, system_prompt.strip(), end_of_turn, stops, _pad_id(tokenizer, stops))

    @classmethod
    def load(cls, folder: Path) -> ChatFormat:
        """The format stored with an adapter or a model.

        Raises:
            DataError: absent or broken. ModelError: written by another version of this code, or edited.
        """
        path = folder / FILE_NAME
        stored = read_json(path, kind="chat format")
        try:
            fields = {name: stored[name] for name in cls.__dataclass_fields__}
            chat_format = cls(**fields | {"stop_ids": tuple(stored["stop_ids"])})
        except (KeyError, TypeError):
            raise ModelError("the chat format has missing fields", where=str(path), fix="train the model again with this version") from None
        if chat_format.digest != stored.get("digest"):
            raise ModelError(
                "the chat format's digest differs from this program's",
                where=str(path),
                fix="train the model again with this version, or serve it with the version that trained it",
            )
        return chat_format

    def save(self, folder: Path) -> None:
        """Store the format beside a model's weights."""
        write_json(folder / FILE_NAME, {**asdict(self), "stop_ids": list(self.stop_ids), "digest": self.digest})

    def prompt_ids(self, tokenizer: Any, question: str, history: Sequence[Message] = ()) -> list[int]:
        """Token ids of a conversation that ends where the answer begins."""
        turns = (*history, Message("user", question))
        if self.system_prompt:
            turns = (Message("system", self.system_prompt), *turns)
        pieces = _pieces(tokenizer, self.template, tuple(turn.role for turn in turns), True)
        ids = _tokens(tokenizer, pieces[0], plain=False)
        for index, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += _tokens(tokenizer, clean(turns[int(index)].content), plain=True)
            ids += _tokens(tokenizer, piece, plain=False)
        return ids

    def example(self, tokenizer: Any, question: str, answer: str, history: Sequence[Message] = ()) -> tuple[list[int], list[bool]]:
        """Token ids of a training row and its mask: True on the answer and its end-of-turn token, and nowhere else."""
        prompt = self.prompt_ids(tokenizer, question, history)
        answer_ids = [*_tokens(tokenizer, clean(answer), plain=True), self.end_of_turn_id]
        return prompt + answer_ids, [False] * len(prompt) + [True] * len(answer_ids)


def clean(text: str) -> str:
    """A text as the model sees it: outer white space, our placeholder marks and lone surrogates removed."""
    return text.replace(_OPEN, "").replace(_CLOSE, "").encode("utf-8", "ignore").decode("utf-8").strip()


def _pad_id(tokenizer: Any, stops: Sequence[int]) -> int:
    names = ["<|endoftext|>", "<pad>", "<unk>"]
    candidates = [
        tokenizer.pad_token_id,
        *(tokenizer.get_vocab().get(name) for name in names),
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        *tokenizer.all_special_ids,
    ]
    return next((i for i in candidates if i is not None and i not in stops), next(i for i in range(len(tokenizer)) if i not in stops))


@lru_cache(maxsize=256)
def _rendered(template: str, bos: str, eos: str, roles: tuple[str, ...], open_answer: bool) -> tuple[str, ...]:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": f"{_OPEN}{index}{_CLOSE}"} for index, role in enumerate(roles)]
    text = render_jinja_template([messages], chat_template=template, add_generation_prompt=open_answer, bos_token=bos, eos_token=eos)[0][0]
    pieces: list[str] = []
    for part in text.split(_OPEN):
        pieces += part.split(_CLOSE, 1)
    return tuple(pieces)


def _pieces(tokenizer: Any, template: str, roles: tuple[str, ...], open_answer: bool) -> tuple[str, ...]:
    """Template text, placeholder number, template text, …: an odd count that starts and ends with template text."""
    return _rendered(template, tokenizer.bos_token or "", tokenizer.eos_token or "", roles, open_answer)


_tokenizer_lock = threading.Lock()  # `split_special_tokens` is a state of the shared fast tokenizer while a call lasts


def _tokens(tokenizer: Any, text: str, *, plain: bool) -> list[int]:
    if not text:
        return []
    with _tokenizer_lock:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=plain).input_ids
    return ids
