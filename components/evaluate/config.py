"""Settings of the evaluate step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from components.common.settings import StepSettings


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
    sample_size: int = Field(0, ge=0, description="held-out rows to use; 0: all")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer, tokens")
    batch_size: int = Field(8, ge=1, description="answers generated or scored side by side")
    rouge_tokens: Literal["characters", "jieba"] = Field("characters", description="how Chinese text is cut for ROUGE")
    bertscore_model: str = Field("", description="encoder folder for BERTScore; empty: the base model itself; none: skip BERTScore")
    tolerance: float = Field(
        0.02, ge=0, description="how much worse than the base a metric may be, as a share of its range, before the gate holds"
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence of every interval")
    seed: int = Field(42, description="seed of the sample and of the bootstrap")
