"""The service's log: one JSON object a line, on stdout and in a file. It holds lengths and digests, never a patient's words.

An error is logged by its type and its place in the code. Its message is left out: Python puts values into messages (a ValidationError
quotes its input), and a value may be what the patient typed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import sys
import traceback
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("medical_qa.serve")
FILE_BYTES = 32 << 20
FILES_KEPT = 3

_KEY = secrets.token_bytes(32)


def open_log(path: Path) -> None:
    """Send our lines, and the web server's warnings, to stdout and to `path` (`Path()`: to stdout only); old parts are kept beside it.

    Raises:
        OSError: the file can't be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if path != Path():
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES_KEPT, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_JsonLines())
    LOGGER.handlers = handlers
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    adopt("uvicorn.error", logging.WARNING)
    adopt("asyncio", logging.WARNING)


def adopt(name: str, level: int) -> None:
    """Let a library's lines from `level` on come out as ours do, without the messages of errors."""
    logger = logging.getLogger(name)
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers = LOGGER.handlers


def log(event: str, *, error: BaseException | None = None, **fields: Any) -> None:
    """Write one line; an error makes it a line of level ERROR with the error's place in the code."""
    LOGGER.log(logging.ERROR if error else logging.INFO, event, extra={"fields": fields}, exc_info=error)


def fingerprint(text: str) -> str:
    """A digest of a question, equal for equal questions while the service runs.

    Keyed with a secret that dies with the process: from a plain digest one could find a short question by trying likely ones.
    """
    return hmac.digest(_KEY, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hex()[:16]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": record.getMessage().partition("\n")[0],  # asyncio puts an error's message on the second line
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            frames = traceback.extract_tb(error.__traceback__)
            line |= {"error": type(error).__name__, "where": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]}
        return json.dumps(line, ensure_ascii=False, default=str)
