"""`evaluation_report.html`: the decision, the numbers behind it, and the answers themselves, in English and Chinese."""

from __future__ import annotations

from typing import Any

from components.common.html import Html, both, card, escape, line_chart, page, table
from components.evaluate.metrics import METRICS

SAMPLES = 20
MODELS = {"base": ("base", "基础模型"), "tuned": ("tuned", "微调模型")}


def report_page(results: dict[str, Any]) -> str:
    """The report of an evaluation, from nothing but the content of its results file."""
    shown = min(SAMPLES, len(results["rows"]))
    body = [
        _headline(results),
        card(both("Metrics", "指标"), _metrics(results)),
        card(both("NLL of each reference answer", "各参考答案的负对数似然"), _nll_chart(results)),
        card(both("Length of the answers", "答案长度"), _lengths(results)),
        card(
            both(f"Answers: {shown} of {len(results['rows'])} rows", f"答案：{len(results['rows'])} 条中的 {shown} 条"), _samples(results)
        ),
        card(both("What was evaluated", "评估对象与设置"), _facts(results)),
    ]
    return page("Evaluation 模型评估", body)


def _headline(results: dict[str, Any]) -> str:
    promoted = results["decision"] == "promote"
    verdict = both("promote", "发布") if promoted else both("hold", "暂缓发布")
    sentence = both(
        "Every rule passed: the tuned model goes into service." if promoted else "At least one rule failed: the model in service stays.",
        "所有规则均通过：微调后的模型将投入服务。" if promoted else "至少一条规则未通过：保留当前服务的模型。",
    )
    reasons = "".join(
        f'<tr><td class="{"good" if reason["passed"] else "bad"}">{"✓" if reason["passed"] else "✗"}</td>'
        f'<td>{escape(reason["english"])}<br><span class="zh">{escape(reason["chinese"])}</span></td></tr>'
        for reason in results["reasons"]
    )
    return (
        f"<h1>{both('Evaluation', '模型评估')} "
        f'<span class="badge {"good" if promoted else "bad"}">{verdict}</span></h1><p>{sentence}</p>'
        f'<section class="card"><table><tbody>{reasons}</tbody></table></section>'
    )


def _metrics(results: dict[str, Any]) -> str:
    confidence = f"{results['settings']['confidence']:.0%}"
    header = [
        Html(both("metric", "指标")),
        Html(both("better", "更好的方向")),
        *(Html(both(*names)) for names in MODELS.values()),
        Html(both("difference", "差值")),
        Html(both(f"{confidence} interval", f"{confidence} 区间")),
    ]
    rows = []
    for name, metric in results["metrics"].items():
        better = both("lower", "低") if metric["better"] == "lower" else both("higher", "高")
        label = (
            METRICS[name].english if METRICS[name].english == METRICS[name].chinese else both(METRICS[name].english, METRICS[name].chinese)
        )
        rows.append([Html(label), Html(better), _number(metric["base"]), _number(metric["tuned"]), *_difference(metric)])
    note = both(
        "A difference is tuned − base, with a paired bootstrap interval over the rows; coloured where the interval excludes 0.",
        "差值 = 微调 − 基础，区间为按行配对自助法；区间不含 0 时着色。",
    )
    return table(header, rows, numeric=(2, 3, 4, 5)) + f'<p class="soft">{note}</p>'


def _difference(metric: dict[str, Any]) -> list[str]:
    difference = metric["difference"]
    if difference is None or None in difference.values():
        return ["–", "–"]
    sign = 1 if metric["better"] == "higher" else -1
    ends = sorted((sign * difference["low"], sign * difference["high"]))
    tone = "good" if ends[0] > 0 else "bad" if ends[1] < 0 else ""
    interval = f"[{difference['low']:+.4g}, {difference['high']:+.4g}]"
    return [Html(f'<span class="{tone}" style="white-space:nowrap">{text}</span>') for text in (f"{difference['mean']:+.4g}", interval)]


def _nll_chart(results: dict[str, Any]) -> str:
    names = [name for name in MODELS if results["rows"][0][name]]
    values = [[row[name]["scores"]["nll"] for name in names] for row in results["rows"]]
    finite = sorted(value for value in values if None not in value)
    series = {" ".join(MODELS[name]): [(rank, row[at]) for rank, row in enumerate(finite, 1)] for at, name in enumerate(names)}
    note = both("Nats per token; rows in the order of the first line; lower is better.", "单位 nat/词元；按第一条线的数值排序；越低越好。")
    return line_chart(series, x_label="row 行") + f'<p class="soft">{note}</p>'


def _lengths(results: dict[str, Any]) -> str:
    rows = sorted(results["rows"], key=lambda row: len(row["reference"]))
    names = [name for name in MODELS if rows[0][name]]
    series = {" ".join(MODELS[name]): [(rank, len(row[name]["answer"])) for rank, row in enumerate(rows, 1)] for name in names}
    series["reference 参考答案"] = [(rank, len(row["reference"])) for rank, row in enumerate(rows, 1)]
    header = [Html(both(*names)) for names in (("answers", "答案"), ("unit", "单位"), ("mean", "均值"), ("median", "中位数"))]
    header += [Html("p10"), Html("p90"), Html(both("ratio to reference, median", "与参考答案长度之比（中位数）"))]
    lines = []
    for name, label in {"reference": ("reference", "参考答案"), **MODELS}.items():
        if statistics := results["lengths"].get(name):
            for unit in (("characters", "字符"), ("tokens", "词元")):
                numbers = [_number(statistics[unit[0]][key]) for key in ("mean", "median", "p10", "p90")]
                ratio = _number(statistics["ratio_to_reference"]) if unit[0] == "characters" else ""
                lines.append([Html(both(*label)), Html(both(*unit)), *numbers, ratio])
    chart = line_chart(series, x_label="row 行")
    note = both("Characters; rows in the order of their reference's length.", "单位：字符；按参考答案长度排序。")
    return f'{chart}<p class="soft">{note}</p>' + table(header, lines, numeric=range(2, 7))


def _samples(results: dict[str, Any]) -> str:
    names = [name for name in MODELS if results["rows"][0][name]]
    header = [Html(both("question", "问题")), Html(both("reference", "参考答案")), *(Html(both(*MODELS[name])) for name in names)]
    rows = [
        [Html(_question(row)), Html(_text(row["reference"])), *(Html(_answer(row[name])) for name in names)]
        for row in results["rows"][:SAMPLES]
    ]
    return table(header, rows)


def _question(row: dict[str, Any]) -> str:
    history = "".join(f'<pre class="soft">{escape(turn["role"])}: {escape(turn["content"])}</pre>' for turn in row["history"])
    line = both(f"line {row['line']}", f"第 {row['line']} 行")
    return f'{history}<pre>{escape(row["question"])}</pre><span class="soft">{line}</span>'


def _answer(answer: dict[str, Any]) -> str:
    scores = answer["scores"]
    facts = f"NLL {_number(scores['nll'])} · ROUGE-L {_number(scores['rouge_l'])}"
    if "bertscore" in scores:
        facts += f" · BERTScore {_number(scores['bertscore'])}"
    flags = [name for name in ("degenerate", "never_stopped", "copies_question", "empty", "wrong_language") if scores[name]]
    badges = "".join(f' <span class="badge warn">{_flag(name)}</span>' for name in flags)
    return f'{_text(answer["answer"])}<span class="soft">{facts}</span>{badges}'


def _text(text: str) -> str:
    """A text that may be long: an answer that loops gets a scroll bar instead of the page."""
    return f'<div style="min-width:14em;max-height:22em;overflow:auto"><pre>{escape(text)}</pre></div>'


def _flag(name: str) -> str:
    words = {
        "degenerate": ("loops", "循环"),
        "never_stopped": ("never stopped", "未停止"),
        "copies_question": ("copies the question", "照抄问题"),
        "empty": ("empty", "空"),
        "wrong_language": ("wrong language", "语言不符"),
    }
    return both(*words[name])


def _facts(results: dict[str, Any]) -> str:
    data, base, bertscore = results["data"], results["base"], results["bertscore"]
    facts: list[tuple[str, object]] = [
        (both("tuned model", "微调模型"), f"{results['model']['uri']} · {results['model']['digest']}"),
        (both("base model", "基础模型"), f"{base['name']} · {base['digest']}" if base else "–"),
        (both("chat format", "对话格式"), results["model"]["chat_digest"]),
        (both("data", "数据"), f"{data['path']} · {data['digest']}"),
        (both("rows used", "使用的行数"), Html(both(f"{data['used']} of {data['available']}", f"{data['available']} 中的 {data['used']}"))),
        (both("rows too long for the model, lines", "超出模型长度的行"), ", ".join(map(str, data["too_long"])) or "–"),
    ]
    if bertscore:
        encoder = f"{bertscore['encoder']} · {bertscore['digest']}"
        cut = both(f"{bertscore['cut_texts']} texts", f"{bertscore['cut_texts']} 段文本")
        facts += [
            (both(f"BERTScore encoder, {bertscore['layers']} layers", f"BERTScore 编码器，{bertscore['layers']} 层"), encoder),
            (both(f"cut at {bertscore['window_tokens']} tokens", f"超过 {bertscore['window_tokens']} 词元被截断"), Html(cut)),
        ]
    facts += [(f"<code>{escape(name)}</code>", "–" if value == "" else value) for name, value in sorted(results["settings"].items())]
    seconds = results["timings"]["total_s"]
    facts.append((both("time taken", "用时"), Html(both(f"{seconds:.0f} s", f"{seconds:.0f} 秒"))))
    return table(["", ""], [[Html(name), value] for name, value in facts])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
