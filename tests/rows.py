"""Sixty questions of one pattern: a tiny model learns the pattern of their answers in seconds, and the held-out rows have it too."""

from __future__ import annotations

import json
from pathlib import Path

FIELDS = ("心脏", "肝脏", "肺部", "胃部", "肾脏", "关节", "皮肤", "眼睛", "耳朵", "甲状腺")
KINDS = ("疼痛", "肿胀", "发热", "出血", "感染", "麻木")
# What the tiny base model was pre-trained to answer, and what it shall learn.
BEFORE = "{where}{what}的原因很多，请多喝水，注意饮食和睡眠，一周后到社区医院复查{where}。"
AFTER = "{where}{what}时请先休息，观察一天，记录体温；如果{where}{what}加重，请及时去医院{where}专科就诊。"


def pattern_rows(answer: str) -> list[dict[str, str]]:
    """Question/answer rows; `answer` has the fields `where` and `what`."""
    return [{"question": f"{where}{what}怎么办？", "answer": answer.format(where=where, what=what)} for where in FIELDS for what in KINDS]


def write_rows(path: Path) -> Path:
    """The rows to learn, as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pattern_rows(AFTER)]
    path.write_text("".join(lines), encoding="utf-8")
    return path
