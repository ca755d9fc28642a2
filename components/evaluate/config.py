"""Settings of the evaluate step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, field_validator

from components.common.settings import StepSettings
from components.evaluate.metrics import parse_guarded, parse_minimums


class EvaluateSettings(StepSettings):
    """Model + held-out rows → metrics with intervals, a report and the decision to promote or hold."""

    model_uri: str = Field(
        "qwen-medical-qa-merged",
        validation_alias=AliasChoices("model_uri", "model_path"),
        description="merged model: folder, file:// or s3:// address",
    )
    base_model: str = Field("", description="base model to compare with; empty: no comparison, so the decision is hold")
    dataset: Path = Field(
        Path("dataset"),
        validation_alias=AliasChoices("dataset", "data_path"),
        description="data set folder that prepare wrote (its test split is used), or a .jsonl file with question and answer",
    )
    results: Path = Field(
        Path("evaluation_results.json"), validation_alias=AliasChoices("results", "output_path"), description="output file of the results"
    )
    report: Path = Field(Path("evaluation_report.html"), description="output file of the report")
    metrics: Path = Field(Path("evaluation_metrics.json"), description="output file of the headline metrics")
    sample_size: int = Field(
        0, ge=0, description="held-out rows to use; 0: all; a sample has its share of each topic, or of each language and answer length"
    )
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer, tokens")
    batch_size: int = Field(8, ge=1, description="answers generated or scored side by side")
    rouge_tokens: Literal["characters", "jieba"] = Field("characters", description="how Chinese text is cut for ROUGE")
    bertscore_model: str = Field("", description="encoder folder for BERTScore; empty: the base model itself; none: skip BERTScore")
    exam_path: str = Field("", description="multiple-choice exam: a .jsonl, .json or .csv file, or a folder of them; empty: no exam")
    exam_sample_size: int = Field(0, ge=0, description="exam questions to ask; 0: all")
    exam_permutations: int = Field(
        4, ge=1, description="orders of the options in which each question is asked, at most; 1: as written only"
    )
    exam_max_new_tokens: int = Field(32, ge=1, description="longest generated exam answer, tokens")
    tolerance: float = Field(
        0.02, ge=0, description="how much worse than the base a metric may be, as a share of its range, before the gate holds"
    )
    guarded: str = Field(
        "rouge_l,bertscore,fact_agreement,fact_contradiction,degenerate,never_stopped",
        description="metrics that may not be worse than the base's beyond the tolerance, separated by commas; none: no metric",
    )
    minimums: str = Field(
        "", description="least mean of a metric for a promotion, such as rouge_l=20,fact_agreement=60; empty or none: no bound"
    )
    max_degenerate: float = Field(0.9, ge=0, le=1, description="largest share of answers that loop for a promotion; 1: no bound")
    # Off: a model that is cut at a small max_new_tokens (the demo's 128) never stops, and need not be a bad one.
    max_never_stopped: float = Field(1.0, ge=0, le=1, description="largest share of answers that never stop for a promotion; 1: no bound")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence of every interval")
    seed: int = Field(42, description="seed of the sample, of the exam's option orders and of the bootstrap")

    @field_validator("guarded")
    @classmethod
    def _guarded_are_metrics(cls, value: str) -> str:
        parse_guarded(value)
        return value

    @field_validator("minimums")
    @classmethod
    def _minimums_are_bounds(cls, value: str) -> str:
        parse_minimums(value)
        return value
