"""Settings of the prepare step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from components.common.settings import StepSettings


class PrepareSettings(StepSettings):
    """Question/answer rows in any usual format → validated train, validation and test splits, and a data report."""

    data_path: str = Field(
        "data/medical_qa_data.jsonl",
        description="rows to use: a .jsonl, .json, .csv, .tsv or .parquet file, as a path, file://… or s3://…",
    )
    data_digest: str = Field(
        "", pattern="^([0-9a-fA-F]{64})?$", description="sha256 that the data file must have, 64 hex digits; empty: not checked"
    )
    question_column: str = Field("", description="column with the question; empty: detected")
    answer_column: str = Field("", description="column with the answer; empty: detected")
    validation_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of question groups in the validation split, 0–0.5")
    test_fraction: float = Field(0.2, gt=0, lt=0.5, description="share of question groups held out for evaluation, 0–0.5")
    split_salt: str = Field(
        "medical-held", description="text that decides the split together with the question; change it for another split"
    )
    min_question_chars: int = Field(2, ge=1, description="shortest question kept, characters")
    max_question_chars: int = Field(8000, ge=1, description="longest question kept, with the turns before it, characters")
    min_answer_chars: int = Field(2, ge=1, description="shortest answer kept, characters")
    max_answer_chars: int = Field(8000, ge=1, description="longest answer kept, characters")
    dataset: Path = Field(Path("dataset"), description="output folder of the data set")
    data_report: Path = Field(Path("data_report.html"), description="output file of the data report")
    metrics: Path = Field(Path("prepare_metrics.json"), description="output file of the counts")
