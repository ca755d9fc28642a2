"""`merge_report.html`: whether the merged model is what was trained, and the figures that say so, in English and Chinese."""

from __future__ import annotations

from typing import Any

from components.common.html import Html, both, card, escape, page, table
from components.merge.candidates import NAMES

SOURCES = {
    "validation": ("rows of the validation split, which training did not learn from", "验证集中的行，训练未曾学习"),
    "file": ("rows of the given file, of which training may have learned some", "所给文件中的行，训练可能学过其中一部分"),
    "built-in": ("built-in questions", "内置问题"),
}
FIGURES = {
    "max_logit_difference": ("largest logit difference", "最大 logit 差"),
    "mean_logit_difference": ("mean logit difference", "平均 logit 差"),
    "largest_logit": ("largest logit, for scale", "最大 logit（作为尺度）"),
    "kl": ("KL divergence, nats per token", "KL 散度（nat/词元）"),
    "top1_agreement": ("same most likely token", "最可能词元一致率"),
    "nll": ("NLL of the answers, nats per token", "答案的负对数似然（nat/词元）"),
    "nll_difference": ("NLL, difference", "负对数似然之差"),
}
CHECKS = {
    "token ids": "词元编号",
    "chat format": "对话格式",
    "tokenizer's chat template": "分词器的对话模板",
    "tokenizer's pad id": "分词器的填充编号",
    "stop ids": "停止编号",
    "pad id": "填充编号",
}


def report_page(record: dict[str, Any]) -> str:
    """The report of a merge, from nothing but its record."""
    body = [
        _headline(record),
        card(both("Certificate", "合并证书"), _certificate(record)),
        card(both("Which weights it was merged into", "并入哪种基础权重"), _bases(record)),
        card(both("Sizes", "大小"), _sizes(record)),
        card(both("Read back from the disk", "从磁盘读回后的检查"), _checks(record)),
    ]
    if record["exports"]:
        body.append(card(both("Quantised for serving", "量化导出"), _exports(record)))
    body.append(card(both("What was merged", "合并对象"), _facts(record)))
    return page("Merge 模型合并", body)


def _headline(record: dict[str, Any]) -> str:
    proof = record["certificate"]["merged_fp32"]
    sentence = both(
        f"The merged model is what was trained: computed in fp32, its logits differ by at most {proof['max_logit_difference']:.2g}, where "
        f"{record['allowed_logit_difference']:.2g} is taken for rounding.",
        f"合并后的模型与训练所得一致：以 fp32 计算，logit 最多相差 {proof['max_logit_difference']:.2g}，不超过舍入允许的 {record['allowed_logit_difference']:.2g}。",
    )
    warning = ""
    if record["same_base_as_in_training"] is False:
        text = both(
            "The base model is not as it was in training: the certificate proves the merge, not that this base suits the adapter.",
            "基础模型与训练时不同：证书只证明合并正确，不证明该基础模型适合此适配器。",
        )
        warning = f'<p class="warn">{text}</p>'
    badge = f'<span class="badge good">{both("proven", "已验证")}</span>'
    return f"<h1>{both('Merge', '模型合并')} {badge}</h1><p>{sentence}</p>{warning}"


def _certificate(record: dict[str, Any]) -> str:
    comparisons = record["certificate"]
    header = [
        Html(both("against the adapter on its base", "与基础模型加适配器相比")),
        *(Html(both(*_name(name))) for name in comparisons),
    ]
    rows = [
        [Html(both(*words)), *((_share if key == "top1_agreement" else _number)(found.get(key)) for found in comparisons.values())]
        for key, words in FIGURES.items()
    ]
    rows.append([Html(both("first different token, continued greedily", "贪心续写的首个不同词元")), *map(_greedy, comparisons.values())])
    on = record["measured_on"]
    lines = f", {', '.join(map(str, on['lines']))}" if on["lines"] else ""
    source, source_zh = SOURCES[on["source"]]
    note = both(
        f"Measured on {on['rows']} {source}: {on['answer_tokens']} answer tokens{'; lines' + lines.removeprefix(',') if lines else ''}. "
        f"On the {on['device']}; {on['reason']}.",
        f"测量于 {on['rows']} 个样本（{source_zh}），共 {on['answer_tokens']} 个答案词元。",
    )
    return table(header, rows, numeric=(1, 2)) + f'<p class="soft">{note}</p>'


def _name(comparison: str) -> tuple[str, str]:
    if comparison == "merged_fp32":
        return "merged, in fp32", "合并后（fp32）"
    precision = comparison.removeprefix("saved_")
    return f"as saved, in {precision}", f"保存后（{precision}）"


def _greedy(found: dict[str, Any]) -> Html:
    if not found["greedy_rows"]:
        return Html(both("not measured", "未测量"))
    if not found["greedy_diverged"]:
        return Html(both(f"none in {found['greedy_rows']} answers", f"{found['greedy_rows']} 个回答中无"))
    at = found["first_greedy_divergence"] + 1
    return Html(
        both(
            f"token {at}; {found['greedy_diverged']} of {found['greedy_rows']} answers",
            f"第 {at} 个词元；{found['greedy_rows']} 个回答中的 {found['greedy_diverged']} 个",
        )
    )


def _bases(record: dict[str, Any]) -> str:
    bases = record["bases"]
    header = [Html(both("merged into", "并入")), Html(both("NLL, nats per token", "负对数似然（nat/词元）")), ""]
    rows = [
        [
            Html(both(*NAMES[name])),
            f"{nll:.4f}",
            Html(f'<span class="good">✓ {both("kept", "采用")}</span>') if name == bases["chosen"] else "",
        ]
        for name, nll in bases["nll"].items()
    ]
    return table(header, rows, numeric=(1,)) + f"<p>{both(bases['reason'], bases['reason_zh'])}</p>"


def _sizes(record: dict[str, Any]) -> str:
    names = {"adapter": ("adapter", "适配器"), "base": ("base", "基础模型"), "merged": ("merged", "合并后模型")}
    sizes = record["weights_size_bytes"]
    header = [Html(both("weights", "权重")), "MiB", Html(both("share of the base", "相对基础模型"))]
    rows = [[Html(both(*names[name])), f"{size / 2**20:.1f}", f"{size / sizes['base']:.1%}"] for name, size in sizes.items()]
    return table(header, rows, numeric=(1, 2))


def _checks(record: dict[str, Any]) -> str:
    rows = [
        [Html(f'<span class="{"good" if passed else "bad"}">{"✓" if passed else "✗"}</span>'), Html(both(name, CHECKS[name]))]
        for name, passed in record["reload_checks"].items()
    ]
    return table(("", ""), rows)


def _exports(record: dict[str, Any]) -> str:
    header = [
        *(Html(both(*names)) for names in (("weights", "权重"), ("verdict", "结论"), ("size, MiB", "大小（MiB）"))),
        *(Html(both(*names)) for names in (("NLL added, nats per token", "负对数似然增量（nat/词元）"), ("at most", "上限"))),
        *(Html(both(*names)) for names in (("same most likely token", "最可能词元一致率"), ("greedy answers unchanged", "贪心回答不变"))),
    ]
    rows = []
    for export in record["exports"]:
        found, passed = export["certificate"], export["passed"]
        verdict = both("passed", "通过") if passed else both(found.get("reason", "not passed"), "未通过")
        size = f"{export['weights_size_bytes']['quantised'] / 2**20:.1f}"
        figures = [_number(found.get(name)) for name in ("nll_difference", "max_nll_difference")]
        shares = [_share(found.get(name)) for name in ("top1_agreement", "exact_answers")]
        badge = Html(f'<span class="badge {"good" if passed else "bad"}">{verdict}</span>')
        rows.append([export["scheme"].upper(), badge, size, *figures, *shares])
    note = both("Against the merged model in its own precision, on the same rows.", "与合并后模型（其自身精度）在相同样本上比较。")
    return table(header, rows, numeric=range(2, 7)) + f'<p class="soft">{note}</p>'


def _facts(record: dict[str, Any]) -> str:
    names = ("base_model", "base_fingerprint", "adapter_digest", "data_digest", "chat_digest", "lora", "parameters", "precision")
    rows = [[name, Html(f"<code>{escape(_number(record[name]))}</code>")] for name in (*names, "trained_on", "model_digest", "model_uri")]
    return table(("", ""), rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_number(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
