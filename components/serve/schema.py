"""What goes in and out of the service's endpoints."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from components.common.chat import Message, clean

MAX_CHARACTERS = 20_000  # question and history together: a bound before the tokenizer has to look at them
MAX_TURNS = 32
DEFAULT_LENGTH = 256
MIN_TEMPERATURE = 0.01  # below it the scores overflow; 0 itself is greedy


class Turn(BaseModel):
    """An earlier turn of the conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant"]
    content: str = Field(min_length=1)


class AskRequest(BaseModel):
    """A question for the model."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"question": "高血压患者平时要注意什么？", "max_length": 128}]}
    )

    question: str = Field(min_length=1, description="the question, Chinese or English · 问题，中文或英文")
    max_length: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        validation_alias=AliasChoices("max_length", "max_tokens"),
        description=f"longest answer, tokens (also `max_tokens`); {DEFAULT_LENGTH} if not given · 回答的最大长度（token）",
    )
    temperature: float = Field(
        0.0,
        ge=0,
        le=2,
        allow_inf_nan=False,
        description=f"0: always the most likely token, the same answer every time; else at least {MIN_TEMPERATURE} · 0 为确定性回答",
    )
    top_p: float = Field(
        1.0, gt=0, le=1, allow_inf_nan=False, description="sample among the most likely tokens that hold this probability · 核采样"
    )
    history: list[Turn] = Field(
        default_factory=list, max_length=MAX_TURNS, description="earlier turns: user, assistant, user, assistant … · 历史对话"
    )

    @field_validator("temperature")
    @classmethod
    def _not_nearly_zero(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"must be 0 or at least {MIN_TEMPERATURE}", f"必须为 0 或不小于 {MIN_TEMPERATURE}")
        return value

    @field_validator("question")
    @classmethod
    def _not_blank(cls, value: str) -> str:
        if not clean(value):
            raise ValueError("must hold more than white space", "不能为空白")
        return value

    @field_validator("history")
    @classmethod
    def _alternating(cls, value: list[Turn]) -> list[Turn]:
        if [turn.role for turn in value] != ["user", "assistant"] * (len(value) // 2):
            raise ValueError("must alternate: user, assistant, user, assistant …", "必须按 user、assistant 交替，并以 assistant 结束")
        return value

    @model_validator(mode="after")
    def _not_too_much(self) -> AskRequest:
        if len(self.question) + sum(len(turn.content) for turn in self.history) > MAX_CHARACTERS:
            raise ValueError(
                f"must have at most {MAX_CHARACTERS} characters in question and history", f"问题与历史对话合计最多 {MAX_CHARACTERS} 个字符"
            )
        return self

    def messages(self) -> list[Message]:
        """The earlier turns as `ChatFormat` takes them."""
        return [Message(turn.role, turn.content) for turn in self.history]


class AskResponse(BaseModel):
    """The answer, and from which model, adapter and data it came."""

    id: str = Field(description="the request's id; the service's log has a line with it")
    answer: str
    language: Literal["zh", "en"] = Field(description="the question's language")
    model_digest: str
    adapter_digest: str | None = None
    data_digest: str | None = None
    finish_reason: Literal["stop", "length"] = Field(description="stop: the model ended its answer; length: it was cut at max_length")
    prompt_tokens: int
    completion_tokens: int
    time_s: float
    disclaimer: str = Field(description="in the question's language")
    warnings: list[str] = Field(description="in the question's language")


class Health(BaseModel):
    """The service is ready."""

    status: Literal["ok"] = "ok"
    model_digest: str
    uptime_s: float
    running: int = Field(description="questions being answered")
    waiting: int = Field(description="questions in the queue")


class ModelInfo(BaseModel):
    """The model that answers, and its limits."""

    model_config = ConfigDict(protected_namespaces=())

    model_uri: str
    model_digest: str
    verified: bool = Field(description="every file matched the model's manifest; false for a plain folder")
    facts: dict[str, Any] = Field(description="what made the model, from its manifest")
    chat_digest: str = Field(description="the digest of prompt template, system prompt and stop tokens")
    device: str
    precision: str
    parameters: int
    max_prompt_tokens: int
    max_new_tokens: int
    max_concurrency: int
    load_s: float


class ReloadRequest(BaseModel):
    """Which model to load instead of the present one."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model_uri: str | None = Field(
        None, min_length=1, max_length=2048, description="folder, file:// or s3:// address; the present one if not given · 模型地址"
    )


class ReloadResponse(BaseModel):
    """The new model answers."""

    model_config = ConfigDict(protected_namespaces=())

    former_digest: str
    model_digest: str
    changed: bool
    time_s: float


class Endpoint(BaseModel):
    """One endpoint in the overview."""

    method: str
    path: str
    summary: str
    summary_zh: str


class Overview(BaseModel):
    """What this API is."""

    name: str
    description: str
    description_zh: str
    endpoints: list[Endpoint]
    disclaimer: dict[Literal["en", "zh"], str]


DISCLAIMER: dict[Literal["en", "zh"], str] = {
    "en": "Generated by a language model for information only; it does not replace a doctor. In an emergency, call your local emergency number at once.",
    "zh": "本回答由语言模型生成，仅供参考，不能替代医生的诊断和治疗。如遇紧急情况，请立即就医或拨打 120。",
}
CUT: dict[Literal["en", "zh"], str] = {
    "en": "The answer was cut at max_length; ask again with a larger one.",
    "zh": "回答因达到 max_length 而被截断，可增大后重试。",
}
EMPTY: dict[Literal["en", "zh"], str] = {"en": "The model gave no answer.", "zh": "模型没有给出回答。"}

_CHINESE = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")
_WORD = re.compile(r"[A-Za-z]+")


def language_of(text: str) -> Literal["zh", "en"]:
    """Chinese when it has at least as many Chinese characters as Latin words: `ACEI 是什么` is Chinese."""
    chinese = len(_CHINESE.findall(text))
    return "zh" if chinese and chinese >= len(_WORD.findall(text)) else "en"
