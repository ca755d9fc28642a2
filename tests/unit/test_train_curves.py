"""The page of a training."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.train.curves import curves_page, smoothed, thinned
from components.train.run import Check, Run
from tests.unit.test_train_ledger import info_of
from tests.unit.train_runs import make_data, make_run


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(base: Path, run: Run, **changes: Any) -> str:
    return curves_page(run, make_data(dropped=[7]), info_of(base, run, **changes))


def test_the_page_is_whole_and_needs_no_network(tiny_model: Path) -> None:
    page = page_of(tiny_model, make_run())
    assert page.count("<polyline") == 3 + 3
    assert page.count("<svg") == 4
    assert "src=" not in page
    assert "href=" not in page
    assert "http" not in page
    parser = Balance()
    parser.feed(page)
    assert not parser.open


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("Gradient norm", "梯度范数"),
        ("Learning rate", "学习率"),
        ("tokens per second", "每秒千词元"),
        ("Evaluations", "各次评估"),
        ("What it took", "资源消耗"),
        ("Choices", "自动选择"),
        ("Where it comes from", "来源"),
        ("source lines", "源文件行号"),
        ("a CPU has no published 16-bit peak", "CPU 没有公布的 16 位峰值"),
        ("every LoRA layer gets a gradient", "每个 LoRA 层都有梯度"),
        ("Self-test before the first step", "训练前自检"),
        ("below 2000 rows", "少于 2000 条"),
        ("Validation loss 3.0000 → 1.7500.", "验证损失 3.0000 → 1.7500。"),
    ],
)
def test_everything_is_said_in_both_languages(tiny_model: Path, english: str, chinese: str) -> None:
    run = make_run()
    run.self_test = [Check("every LoRA layer gets a gradient", True, "28 of 28 layers")]
    page = page_of(tiny_model, run)
    assert english in page
    assert chinese in page


def test_the_page_tells_what_went_otherwise_than_planned(tiny_model: Path) -> None:
    run = make_run()
    run.resumed_from, run.finished_early = [12, 24], "no lower validation loss in 3 evaluations"
    run.out_of_memory = ["step 5: the memory was full with 4 rows at a time; half as many from here on"]
    page = page_of(tiny_model, run, forecast_bytes=3 << 30)
    for told in (
        "checkpoint of step 12, 24",
        "第 12, 24 步",
        run.finished_early,
        "step 5: the memory was full",
        "3.00 GiB",
        "启动前的内存预测",
    ):
        assert told in page
    calm = page_of(tiny_model, make_run())
    for not_told in ("checkpoint of step", "Finished early", "Out of memory", "expected before the start", "Self-test"):
        assert not_told not in calm


def test_a_run_that_did_harm_is_not_called_good(tiny_model: Path) -> None:
    run = make_run()
    run.best = run.kept._replace(validation_loss=math.inf)
    run.stopped_because = "the loss of step 41 is nan"
    page = page_of(tiny_model, run)
    assert "Worse than the base model: 3.0000 → –" in page
    assert "比基础模型更差" in page
    assert "the loss of step 41 is nan" in page
    assert 'class="good">Validation' not in page


def test_a_run_without_a_step_has_a_page(tiny_model: Path) -> None:
    assert "</html>" in page_of(tiny_model, make_run(steps=0))


def test_what_a_library_or_a_user_says_is_escaped(tiny_model: Path) -> None:
    run = make_run()
    run.stopped_because = "<script>alert(1)</script>"
    assert "<script" not in page_of(tiny_model, run)


def test_smoothing_starts_without_bias() -> None:
    assert smoothed([(1, 5.0), (2, 5.0)]) == [(1, pytest.approx(5.0)), (2, pytest.approx(5.0))]
    assert smoothed([(1, 0.0), (2, 9.0)])[1][1] == pytest.approx(9 * 0.2 / 0.36)


def test_a_long_run_gives_a_small_page_that_keeps_its_spikes(tiny_model: Path) -> None:
    line = [(float(step), 1.0) for step in range(100_000)]
    line[54_321] = (54_321.0, 50.0)
    line[60_000] = (60_000.0, math.nan)
    thin = thinned(line)
    assert len(thin) <= 1001
    assert (54_321.0, 50.0) in thin
    assert thin == sorted(thin)
    assert all(math.isfinite(y) for _, y in thin)
    assert len(page_of(tiny_model, make_run(steps=20_000, evaluate_every=5_000))) < 200_000
