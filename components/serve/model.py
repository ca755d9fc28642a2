"""A model as the service holds it: found, checked, loaded, and asked a first question."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.base_model import cache_dir, check_causal_lm
from components.common.chat import FILE_NAME, ChatFormat, Message
from components.common.engine import Engine, Sampling
from components.common.errors import ModelError
from components.common.storage import MANIFEST, Manifest, fetch_model
from components.serve.config import ServeSettings
from components.serve.logs import adopt

GOLDEN_QUESTION = "什么是高血压？"
GOLDEN_TOKENS = 16


@dataclass(eq=False)
class ServedModel:
    """A loaded model and where it came from; `running` counts the requests that use it."""

    model_uri: str
    manifest: Manifest
    verified: bool
    chat: ChatFormat
    engine: Engine
    load_s: float
    running: int = 0

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @classmethod
    def load(cls, model_uri: str, settings: ServeSettings) -> ServedModel:
        """Find, check and load a model; takes seconds to minutes, so never call it on the event loop.

        Raises:
            ModelError: not a model of this service, altered, or unable to answer. StorageError: can't be fetched.
        """
        started = time.monotonic()
        folder, manifest, verified = find_model(model_uri)
        chat = _chat_format(folder, manifest)
        check_causal_lm(folder)
        engine = Engine.load(
            folder,
            chat=chat,
            precision=settings.precision,
            max_concurrency=settings.max_concurrency,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_new_tokens=settings.max_new_tokens,
        )
        adopt("transformers", logging.ERROR)  # its warnings may quote a prompt's tokens
        model = cls(model_uri, manifest, verified, chat, engine, 0.0)
        try:
            model._ask_golden_question()
        except BaseException:
            engine.close()
            raise
        model.load_s = round(time.monotonic() - started, 2)
        return model

    def prompt_ids(self, question: str, history: Sequence[Message] = ()) -> list[int]:
        """The prompt of a question, by the same function that made the training rows."""
        return self.chat.prompt_ids(self.engine.tokenizer, question, history)

    def info(self) -> dict[str, Any]:
        """Facts for /model_info."""
        model = self.engine.model
        return {
            "model_uri": self.model_uri,
            "model_digest": self.digest,
            "verified": self.verified,
            "facts": self.manifest.facts,
            "chat_digest": self.chat.digest,
            "device": str(self.engine.device),
            "precision": str(model.dtype).removeprefix("torch."),
            "parameters": sum(tensor.numel() for tensor in model.parameters()),
            "max_prompt_tokens": self.engine.max_prompt_tokens,
            "max_new_tokens": self.engine.max_new_tokens,
            "max_concurrency": self.engine.max_concurrency,
            "load_s": self.load_s,
        }

    def _ask_golden_question(self) -> None:
        """One real answer through the whole path: a model with broken weights loads without a word."""
        prompt = self.prompt_ids(GOLDEN_QUESTION)
        tokens = min(GOLDEN_TOKENS, self.engine.max_new_tokens)
        completion = self.engine.generate([prompt], Sampling(max_new_tokens=tokens))[0]
        if not completion.token_ids:
            raise ModelError(
                f"the model gives no answer to {GOLDEN_QUESTION!r}", where=self.model_uri, fix="look at its evaluation, or merge it again"
            )


def find_model(model_uri: str) -> tuple[Path, Manifest, bool]:
    """The local folder of a model, its manifest, and whether every file was compared with it."""
    local = Path(model_uri.removeprefix("file://"))
    if "://" in model_uri.removeprefix("file://") or (local / MANIFEST).is_file():
        return *fetch_model(model_uri, cache_dir()), True
    if not local.is_dir():
        raise ModelError("there is no model folder here", where=model_uri, fix="merge one with `python -m components.merge`")
    check_causal_lm(local)
    manifest = Manifest.of_folder(local)
    print(f"model {manifest.digest[:12]}: unverified, because the folder has no {MANIFEST} to compare its files with", flush=True)
    return local, manifest, False


def _chat_format(folder: Path, manifest: Manifest) -> ChatFormat:
    if not (folder / FILE_NAME).is_file():
        raise ModelError(
            f"the model has no {FILE_NAME}, so nobody knows which prompts it was trained on",
            where=str(folder),
            fix="merge it with `python -m components.merge`",
        )
    chat = ChatFormat.load(folder)
    trained = manifest.facts.get("chat_digest", chat.digest)
    if trained != chat.digest:
        raise ModelError(
            f"the model was trained on other prompts ({trained[:12]}) than its {FILE_NAME} makes ({chat.digest[:12]})",
            where=str(folder),
            fix="merge it again with `python -m components.merge`",
        )
    return chat


def is_allowed(model_uri: str, settings: ServeSettings) -> bool:
    """Whether /reload_model may load from this address: only below the allowed roots, whatever links and dots it has."""
    roots = [root.strip() for root in settings.allowed_model_roots.split(",") if root.strip()]
    here = _normal(model_uri)
    if not roots:
        home = _normal(settings.model_uri)
        roots = [home.rpartition("/")[0] if home.count("/") > 1 else home]
    return bool(here) and any(here == root or here.startswith(f"{root}/") for root in map(_normal, roots))


def _normal(address: str) -> str:
    """An absolute local path without links and dots, or an s3:// address; empty for anything else."""
    if address.startswith("s3://"):
        plain = re.fullmatch(r"s3://[\w.-]+(/[\w.=@+-]+)*/?", address)
        return address.rstrip("/") if plain and ".." not in address.split("/") else ""
    local = address.removeprefix("file://")
    if "://" in local or "\0" in local:
        return ""
    return str(Path(local).resolve())
