"""The evaluate step: parse, load, do, write, report."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from components.common.errors import UserError, run_command
from components.common.files import write_atomically, write_json
from components.evaluate.config import EvaluateSettings


def main(argv: list[str] | None = None) -> int | None:
    """Evaluate a model; a model that is held is a result like another, so the exit code is 0."""
    settings, outputs = EvaluateSettings.parse("python -m components.evaluate", argv)
    _check_writable(settings.results, settings.report, settings.metrics)

    from components.evaluate.report import report_page
    from components.evaluate.results import flat_metrics
    from components.evaluate.run import evaluate, load_inputs

    inputs = load_inputs(settings)
    results = evaluate(settings, inputs)

    numbers = flat_metrics(results)
    write_atomically(settings.report, report_page(results))
    write_json(settings.metrics, numbers)
    write_json(settings.results, results)  # last: with it, everything is there
    digests = {"model_digest": results["model"]["digest"], "base_digest": (results["base"] or {}).get("digest", "")}
    digests |= {"chat_digest": results["model"]["chat_digest"], "data_digest": results["data"]["digest"]}
    outputs.write(
        parameters={"decision": results["decision"]},
        metadata={"metrics": numbers, "results": {"decision": results["decision"], **digests}},
    )
    _print_summary(results, settings)
    return None


def _check_writable(*paths: Path) -> None:
    """Find out before the work, not after it, that an output can't be written."""
    for path in paths:
        if path.is_dir():
            raise UserError("an output file is asked for where a folder is", where=str(path), fix="choose another file name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError("an output folder is asked for where a file is", where=str(path.parent), fix="choose another folder") from None
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _print_summary(results: dict[str, Any], settings: EvaluateSettings) -> None:
    interval = f"{settings.confidence:.0%} interval"
    print(f"\n{'metric':<26}{'base':>10}{'tuned':>10}{'difference':>13}  {interval}")
    for name, metric in results["metrics"].items():
        some = f"  ({metric['rows']} rows)" if metric["rows"] < results["data"]["used"] else ""
        _print_line(name, metric["base"], metric["tuned"], metric["difference"], some)
    if exam := results["exam"]:
        for way in ("likelihood", "generated"):
            base, tuned = ((exam[model] or {way: {"accuracy": None}})[way]["accuracy"] for model in ("base", "tuned"))
            compared = (exam["comparison"] or {}).get(way)
            _print_line(f"exam accuracy, {way}", base, tuned, compared["difference"] if compared else None, "")
    print(f"\ndecision: {results['decision']}")
    for reason in results["reasons"]:
        print(f"  {'+' if reason['passed'] else '-'} {reason['english']}")
    print(f"\n{settings.results}, {settings.report} and {settings.metrics} written in {results['timings']['total_s']:.0f} s")


def _print_line(name: str, base: float | None, tuned: float | None, difference: dict[str, float | None] | None, some: str) -> None:
    known = difference or {}
    ends = f"[{_number(known['low'], '+')}, {_number(known['high'], '+')}]" if known else ""
    print(f"{name:<26}{_number(base):>10}{_number(tuned):>10}{_number(known.get('mean'), '+'):>13}  {ends}{some}".rstrip())


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.4g}"


if __name__ == "__main__":
    run_command(main)
