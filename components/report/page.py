"""The page of a run, from its record and from what its steps left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from components.common.html import Html, both, card, escape, folded, line_chart, page, table
from components.report.graph import STATE_NAMES, graph_svg

MAX_EXAMPLES = 8
CLASS_OF_STATE = {"succeeded": "good", "failed": "bad", "interrupted": "bad"}


def render_run(record: dict[str, Any], run_dir: Path, page_dir: Path) -> str:
    """The page of a local run.

    Args:
        record: the content of run.json.
        run_dir: the run's folder, to which log paths are relative.
        page_dir: where the page will lie, to which its links are relative.
    """
    steps: dict[str, dict[str, Any]] = record["steps"]
    results = _json_artifact(steps, "evaluate", "results")
    decision = str(steps["evaluate"].get("outputs", {}).get("parameters", {}).get("decision", ""))
    body = [
        _headline(record),
        f'<section class="card">{graph_svg(steps, decision)}</section>',
        _verdict(decision, results),
        _service(steps),
        _steps_table(steps, run_dir, page_dir),
        _examples(results),
        _loss_curve(steps),
        _metrics(steps),
        _parameters(record["parameters"]),
    ]
    return page(f"medical-qa run {record['id']}", body)


def render_status(status: dict[str, Any]) -> str:
    """The page of a run of which only KFP's final status is known."""
    error = status.get("error") or {}
    rows = [
        (both("state", "状态"), status.get("state", "")),
        (both("run", "运行"), status.get("pipelineJobResourceName") or status.get("pipeline_job_resource_name") or ""),
        (both("task", "任务"), status.get("pipelineTaskName") or status.get("pipeline_task_name") or ""),
        (both("error", "错误"), error.get("message", "") if isinstance(error, dict) else error),
    ]
    content = table(["", ""], [(Html(name), value) for name, value in rows if value])
    return page(
        "medical-qa run",
        [f"<h1>{both('Run of the medical QA pipeline', '医疗问答流水线运行')}</h1>", card(both("Final status", "最终状态"), content)],
    )


def _headline(record: dict[str, Any]) -> str:
    state = str(record["state"])
    english, chinese = STATE_NAMES.get(state, (state, state))
    seconds = (record.get("ended") or time.time()) - record["started"]
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["started"]))
    parent = f" · {both('rerun of', '重跑自')} {escape(record['parent'])}" if record.get("parent") else ""
    badge = f'<span class="badge {CLASS_OF_STATE.get(state, "warn")}">{both(english, chinese)}</span>'
    return (
        f"<h1>{both('Run', '运行')} {escape(record['id'])} {badge}</h1>"
        f'<p class="soft">{both("started", "开始于")} {started} · {seconds:.0f} s · {both(record["runner"] + " mode", record["runner"] + " 模式")}{parent}</p>'
    )


def _verdict(decision: str, results: dict[str, Any]) -> str:
    if not decision:
        return ""
    text = (
        both("promoted: the model went on to deploy", "通过：模型进入部署")
        if decision == "promote"
        else both("held: the former service keeps serving", "未通过：原服务继续工作")
    )
    reasons = "".join(
        f'<li class="{"" if reason["passed"] else "bad"}">{both(reason["english"], reason["chinese"])}</li>'
        for reason in results.get("reasons", [])
    )
    return card(both("The gate", "质量门"), f'<p class="{"good" if decision == "promote" else "warn"}"><b>{text}</b></p><ul>{reasons}</ul>')


def _service(steps: dict[str, dict[str, Any]]) -> str:
    facts = steps["deploy"].get("outputs", {}).get("artifacts", {}).get("rollout", {}).get("metadata", {})
    url = facts.get("url")
    if not url:
        return ""
    curl = f"""curl -s {url}/ask -H 'Content-Type: application/json' -d '{{"question": "什么是高血压？"}}'"""
    rows = [
        (Html(both(*names)), facts[key]) for key, names in (("outcome", ("outcome", "结果")), ("digest", ("model", "模型"))) if key in facts
    ]
    return card(both("The service", "服务"), f"{table(['', ''], rows)}<pre>{escape(curl)}</pre>")


def _steps_table(steps: dict[str, dict[str, Any]], run_dir: Path, page_dir: Path) -> str:
    rows = []
    for name, facts in steps.items():
        links = []
        if facts.get("log"):
            links.append(_link(run_dir / facts["log"], page_dir, "log"))
        for artifact, described in facts.get("outputs", {}).get("artifacts", {}).items():
            shown = Path(described["uri"] + ".html")  # what a browser shows as a page, where there is one
            links.append(_link(shown if shown.exists() else Path(described["uri"]), page_dir, artifact))
        english, chinese = STATE_NAMES[facts["state"]]
        why = facts.get("reason") or (f"run {facts['source_run']}" if facts.get("source_run") else "")
        seconds = f"{facts['seconds']:.1f} s" if facts.get("seconds") else ""
        state = Html(f'<span class="{CLASS_OF_STATE.get(facts["state"], "")}">{both(english, chinese)}</span>')
        rows.append((Html(f'<b id="{name}">{name}</b>'), state, seconds, why, Html(" · ".join(links))))
    header = ["step 步骤", "state 状态", "time 用时", "why 原因", "files 文件"]
    return card(both("Steps", "步骤"), table(header, rows, numeric=[2]))


def _metrics(steps: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, facts in steps.items():
        metadata = facts.get("outputs", {}).get("artifacts", {}).get("metrics", {}).get("metadata", {})
        rows += [(name, key, f"{value:,.4g}" if isinstance(value, float) else value) for key, value in sorted(metadata.items())]
    return folded(both("Metrics", "指标"), table(["step 步骤", "metric 指标", "value 值"], rows, numeric=[2])) if rows else ""


def _loss_curve(steps: dict[str, dict[str, Any]]) -> str:
    uri = steps["train"].get("outputs", {}).get("artifacts", {}).get("adapter", {}).get("uri")
    info = _read(Path(uri) / "train_info.json") if uri else {}
    points, base = info.get("evaluations", []), info.get("metrics", {}).get("validation_loss_base")
    if not points or base is None:
        return ""
    series = {
        "training 训练": [(point["step"], point["train_loss"]) for point in points if point["train_loss"] is not None],
        "validation 验证": [
            (0, base),
            *((point["step"], point["validation_loss"]) for point in points if point["validation_loss"] is not None),
        ],
    }
    return card(both("Loss, nats per token", "损失（nat/词元）"), line_chart(series, x_label="optimizer step 优化步"))


def _examples(results: dict[str, Any]) -> str:
    rows = [
        (row["question"], row["reference"], (row["base"] or {}).get("answer", ""), row["tuned"]["answer"])
        for row in results.get("rows", [])[:MAX_EXAMPLES]
    ]
    if not rows:
        return ""
    header = ["question 问题", "reference 参考答案", "base 基座模型", "tuned 微调后"]
    return card(both("Held-out questions: base against tuned", "留出问题：基座与微调后对照"), table(header, rows))


def _parameters(parameters: dict[str, Any]) -> str:
    rows = [(name, json.dumps(value, ensure_ascii=False)) for name, value in parameters.items()]
    return folded(both("Parameters", "参数"), table(["name 名称", "value 值"], rows))


def _link(target: Path, page_dir: Path, text: str) -> str:
    return f'<a href="{escape(os.path.relpath(target, page_dir))}">{escape(text)}</a>'


def _json_artifact(steps: dict[str, dict[str, Any]], step: str, name: str) -> dict[str, Any]:
    uri = steps[step].get("outputs", {}).get("artifacts", {}).get(name, {}).get("uri")
    return _read(Path(uri)) if uri else {}


def _read(path: Path) -> dict[str, Any]:
    """A file that a step left, or nothing: the page of a failed run shows what there is."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
