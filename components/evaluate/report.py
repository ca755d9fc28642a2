"""`evaluation_report.html`: the decision, the numbers behind it, and the answers themselves, in English and Chinese."""

from __future__ import annotations

from typing import Any

from components.common.html import Html, both, card, escape, page, table
from components.evaluate.metrics import METRICS
from components.evaluate.report_cells import MODELS, difference_cells, with_interval
from components.evaluate.report_exam import exam_card
from components.evaluate.report_plots import distributions, lengths, nll_chart, strata_table
from components.evaluate.report_samples import choose_samples, samples_table


def report_page(results: dict[str, Any]) -> str:
    """The report of an evaluation, from nothing but the content of its results file."""
    chosen, rows = choose_samples(results), len(results["rows"])
    by = both("Scores by topic", "按主题的得分")
    if results["data"]["stratified_by"] != "topic":
        by = both("Scores by language and length of the reference", "按语言与参考答案长度的得分")
    body = [
        _headline(results),
        card(both("Metrics", "指标"), _metrics(results)),
        card(both("Exam", "考试"), exam_card(results["exam"], results["settings"])) if results["exam"] else "",
        card(both("How the scores are spread", "得分分布"), distributions(results)),
        card(by, strata_table(results)),
        card(both("NLL of each reference answer", "各参考答案的负对数似然"), nll_chart(results)),
        card(both("Length of the answers", "答案长度"), lengths(results)),
        card(both(f"Answers: {len(chosen)} of {rows} rows", f"答案：{rows} 条中的 {len(chosen)} 条"), samples_table(results, chosen)),
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
        label = escape(METRICS[name].english)
        if METRICS[name].english != METRICS[name].chinese:
            label = both(METRICS[name].english, METRICS[name].chinese)
        if metric["rows"] < results["data"]["used"]:
            some = both(f"on {metric['rows']} of {results['data']['used']} rows", f"{results['data']['used']} 条中的 {metric['rows']} 条")
            label += f'<br><span class="soft">{some}</span>'
        means = [with_interval(metric[model], metric[f"{model}_interval"]) for model in MODELS]
        rows.append([Html(label), Html(better), *means, *difference_cells(metric["difference"], metric["better"])])
    note = both(
        "A difference is tuned − base, with a paired bootstrap interval over the rows; coloured where the interval excludes 0. "
        "Under a mean: its own interval, by bootstrap, or Wilson's for a share.",
        "差值 = 微调 − 基础，区间为按行配对自助法；区间不含 0 时着色。均值下方为其自身区间：自助法，比例用 Wilson 法。",
    )
    return table(header, rows, numeric=(2, 3, 4, 5)) + f'<p class="soft">{note}</p>'


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
        windowed = both(f"{bertscore['windowed_texts']} texts", f"{bertscore['windowed_texts']} 段文本")
        facts += [
            (both(f"BERTScore encoder, {bertscore['layers']} layers", f"BERTScore 编码器，{bertscore['layers']} 层"), encoder),
            (both(f"longer than {bertscore['window_tokens']} tokens", f"超过 {bertscore['window_tokens']} 词元"), Html(windowed)),
        ]
    facts += [(f"<code>{escape(name)}</code>", "–" if value == "" else value) for name, value in sorted(results["settings"].items())]
    seconds = results["timings"]["total_s"]
    facts.append((both("time taken", "用时"), Html(both(f"{seconds:.0f} s", f"{seconds:.0f} 秒"))))
    return table(["", ""], [[Html(name), value] for name, value in facts])
