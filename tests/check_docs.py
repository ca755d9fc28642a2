"""`python -m tests.check_docs`: the documents agree with each other and with the program."""

from __future__ import annotations

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```.*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)[^)]*\)")


def problems() -> list[str]:
    """What is wrong, one sentence each."""
    english = (PROJECT / "README.md").read_text(encoding="utf-8")
    found = [problem for folder in (PROJECT, PROJECT / "docker") for problem in out_of_step(folder)]
    for path in [*PROJECT.glob("*.md"), *PROJECT.glob("*/README.md")]:
        for target in LINK.findall(path.read_text(encoding="utf-8")):
            if "://" not in target and not (path.parent / target).exists():
                found.append(f"{path.relative_to(PROJECT)} links to {target}, which is not there")
    return found + unknown_flags(english)


def out_of_step(folder: Path) -> list[str]:
    """Commands and sections that a folder's README has in one language only; the first figure of the main one is drawn in each."""
    english, chinese = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    name = folder.relative_to(PROJECT) / "README"
    drawings = int(folder == PROJECT)
    found = []
    commands, translated = (FENCE.findall(text)[drawings:] for text in (english, chinese))
    if commands != translated:
        differing = [a for a, b in zip(commands, translated, strict=False) if a != b]
        found.append(f"{name} has different commands in its two languages: {differing[:1] or 'another number of them'}")
    levels, levels_translated = (re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE) for text in (english, chinese))
    if levels != levels_translated:
        found.append(f"{name} has different sections in its two languages")
    return found


def unknown_flags(text: str) -> list[str]:
    """Flags, commands and parameters in the README that the program does not have."""
    import importlib

    from orchestration.compiling import compiled_spec, parameter_defaults

    parameters = parameter_defaults(compiled_spec())
    found = [f"the pipeline has no parameter {name}" for name in re.findall(r"--set (\w+)=", text) if name not in parameters]
    for stage, flags in re.findall(r"python -m components\.(prepare|train|merge|evaluate|deploy|serve)\b([^\n`]*)", text):
        fields = getattr(importlib.import_module(f"components.{stage}.config"), f"{stage.capitalize()}Settings").model_fields
        known = set(fields) | {"help"}
        for field in fields.values():
            known |= set(getattr(field.validation_alias, "choices", ()))
        found += [f"components.{stage} has no flag --{flag}" for flag in re.findall(r"--(\w+)", flags) if flag not in known]
    return found


if __name__ == "__main__":
    lines = problems()
    print("\n".join(lines) or "documents: in step")
    sys.exit(bool(lines))
