"""The report's plots and the tables beside them: NLL, lengths, how the scores are spread, and the scores of each stratum."""

from __future__ import annotations

from typing import Any

from components.common.html import Html, both, escape, histogram, line_chart, table
from components.evaluate.lengths import PERCENTILES
from components.evaluate.metrics import METRICS
from components.evaluate.report_cells import MODELS, difference_cells, number

MOST_STRATA = 30
_STRATA = {
    "chinese": "中文",
    "english": "英文",
    "short": "短",
    "medium": "中",
    "long": "长",
}


def nll_chart(results: dict[str, Any]) -> str:
    """A line for each model: the NLL of every row."""
    names = _models(results)
    values = [[row[name]["scores"]["nll"] for name in names] for row in results["rows"]]
    finite = sorted(value for value in values if None not in value)
    series = {" ".join(MODELS[name]): [(rank, row[at]) for rank, row in enumerate(finite, 1)] for at, name in enumerate(names)}
    note = both("Nats per token; rows in the order of the first line; lower is better.", "单位 nat/词元；按第一条线的数值排序；越低越好。")
    return line_chart(series, x_label="row 行") + f'<p class="soft">{note}</p>'


def distributions(results: dict[str, Any]) -> str:
    """Histograms of the scores that a mean hides most about."""
    parts = []
    for metric in ("rouge_l", "fact_agreement"):
        series = {}
        for name in _models(results):
            values = [row[name]["scores"][metric] for row in results["rows"]]
            series[" ".join(MODELS[name])] = [value for value in values if value is not None]
        english, chinese = METRICS[metric].english, METRICS[metric].chinese
        title = english if english == chinese else f"{english} {chinese}"
        parts.append(histogram(series, x_label=f"{title}, rows 行数"))
    note = both("Rows by their score; dashed: the median.", "按得分统计的行数；虚线为中位数。")
    return "".join(parts) + f'<p class="soft">{note}</p>'


def lengths(results: dict[str, Any]) -> str:
    """A histogram of the lengths in characters, and a table of their statistics."""
    series = {" ".join(MODELS[name]): [float(len(row[name]["answer"])) for row in results["rows"]] for name in _models(results)}
    series["reference 参考答案"] = [float(len(row["reference"])) for row in results["rows"]]  # last: a model has one colour in all plots
    header = [Html(both(*names)) for names in (("answers", "答案"), ("unit", "单位"), ("mean", "均值"), ("median", "中位数"))]
    header += [Html(f"p{rank}") for rank in PERCENTILES] + [Html(both("ratio to reference, median", "与参考答案长度之比（中位数）"))]
    lines = []
    for name, label in {"reference": ("reference", "参考答案"), **MODELS}.items():
        if statistics := results["lengths"].get(name):
            for unit in (("characters", "字符"), ("tokens", "词元")):
                keys = ("mean", "median", *(f"p{rank}" for rank in PERCENTILES))
                ratio = number(statistics["ratio_to_reference"]) if unit[0] == "characters" else ""
                lines.append([Html(both(*label)), Html(both(*unit)), *(number(statistics[unit[0]][key]) for key in keys), ratio])
    note = both("Characters; dashed: the median.", "单位：字符；虚线为中位数。")
    chart = histogram(series, x_label="characters 字符, rows 行数")
    return f'{chart}<p class="soft">{note}</p>' + table(header, lines, numeric=range(2, len(header)))


def strata_table(results: dict[str, Any]) -> str:
    """Each stratum's main metrics as bars, and the differences with their intervals; the largest strata, where there are many."""
    largest = sorted(results["strata"].items(), key=lambda item: (-item[1]["rows"], item[0]))[:MOST_STRATA]
    header = [Html(both("stratum", "分层")), Html(both("rows", "行数")), Html(both("metric", "指标"))]
    header += [Html(both(*MODELS[name])) for name in MODELS]
    header += [Html(both("difference", "差值")), Html(both("interval", "区间"))]
    lines = []
    for name, stratum in largest:
        for at, (metric, values) in enumerate(stratum["metrics"].items()):
            if metric == "nll":
                continue
            label = [Html(_stratum(name, results)), stratum["rows"]] if at == 1 else ["", ""]
            english, chinese = METRICS[metric].english, METRICS[metric].chinese
            bars = [Html(_bar(values[model], METRICS[metric].width or 1)) for model in MODELS]
            few = difference_cells(values["difference"], METRICS[metric].better) if values["rows"] > 2 else ["–", "–"]
            lines.append([*label, Html(english if english == chinese else both(english, chinese)), *bars, *few])
    more = len(results["strata"]) - len(largest)
    note = both(
        "A difference of fewer than 3 rows is not shown." + (f" {more} smaller strata are in the results file." if more else ""),
        "少于 3 条时不显示差值。" + (f"另有 {more} 个较小的分层见结果文件。" if more else ""),
    )
    return table(header, lines, numeric=(1, 5, 6)) + f'<p class="soft">{note}</p>'


def _stratum(name: str, results: dict[str, Any]) -> str:
    if results["data"]["stratified_by"] == "topic":
        return escape(name)
    return both(name, "，".join(_STRATA.get(word, word) for word in name.split(", ")))


def _bar(value: float | None, width: float) -> str:
    if value is None:
        return "–"
    share = min(max(value / width, 0.0), 1.0)
    return (
        f'<span style="white-space:nowrap"><span style="display:inline-block;height:9px;width:{100 * share:.0f}px;background:var(--accent);'
        f'border-radius:2px"></span> {number(value)}</span>'
    )


def _models(results: dict[str, Any]) -> list[str]:
    return [name for name in MODELS if results["rows"][0][name]]
