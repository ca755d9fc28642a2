"""Does a server answer? Real questions in both languages, and what every answer must have."""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

from components.common.errors import ServiceError
from components.deploy.health import POLL_S, check_health

MAX_LENGTH = 32  # tokens: enough to see that it answers
CHINESE = re.compile(r"[\u4e00-\u9fff]")


class Question(NamedTuple):
    """A question and its language, `zh` or `en`."""

    text: str
    language: str


QUESTIONS = (
    Question("感冒了应该怎么办？", "zh"),
    Question("高血压患者平时要注意什么？", "zh"),
    Question("What should I do when I have a mild fever?", "en"),
)


def ask(address: str, question: Question, digest: str, timeout_s: float) -> dict[str, Any]:
    """Ask one question and check the answer.

    Args:
        address: `host:port`.
        digest: of the model that must answer.

    Returns:
        The question, its language, the latency in seconds and the answer's length in characters.

    Raises:
        ServiceError: no answer, an empty one, one of another model, or one without a disclaimer in the question's language.
    """
    import httpx

    started = time.monotonic()
    try:
        response = httpx.post(
            f"http://{address}/ask", json={"question": question.text, "max_length": MAX_LENGTH}, timeout=timeout_s, trust_env=False
        )
    except httpx.HTTPError as error:
        raise _refused(question, address, f"no answer: {type(error).__name__}: {error}") from None
    latency_s = round(time.monotonic() - started, 3)
    if response.status_code != 200:
        raise _refused(question, address, f"status {response.status_code}: {response.text[:300]}")
    try:
        answer = response.json()
        text, disclaimer, answered_by = str(answer["answer"]), str(answer["disclaimer"]), answer["model_digest"]
    except (ValueError, KeyError, TypeError):
        raise _refused(question, address, f"not the JSON of an answer: {response.text[:300]}") from None
    if not text.strip():
        raise _refused(question, address, "the answer is empty")
    if answered_by != digest:
        raise _refused(question, address, f"answered by model {str(answered_by)[:12]} instead of {digest[:12]}")
    if not disclaimer.strip():
        raise _refused(question, address, "the answer has no disclaimer")
    if bool(CHINESE.search(disclaimer)) != (question.language == "zh"):
        raise _refused(question, address, f"the disclaimer is not in the question's language: {disclaimer[:100]}")
    return {"question": question.text, "language": question.language, "latency_s": latency_s, "answer_characters": len(text)}


def ask_all(address: str, digest: str, timeout_s: float) -> list[dict[str, Any]]:
    """Ask every question once; see `ask`."""
    return [ask(address, question, digest, timeout_s) for question in QUESTIONS]


def watch(address: str, digest: str, watch_s: float, timeout_s: float) -> dict[str, Any]:
    """Ask for the health again and again for `watch_s` seconds, and one question.

    Raises:
        ServiceError: at the first failure.
    """
    deadline = time.monotonic() + watch_s
    check_health(address, digest)
    answer = ask(address, QUESTIONS[0], digest, timeout_s)
    checks = 1
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        check_health(address, digest)
        checks += 1
    return {"health_checks": checks, "answer": answer}


def _refused(question: Question, address: str, what: str) -> ServiceError:
    return ServiceError(f"the service fails a test question: {what}", where=f"POST http://{address}/ask, question: {question.text}")
