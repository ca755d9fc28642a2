"""The prepare command as a user and as the pipeline run it: its files, its exit codes and its messages."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pyarrow as pa
import pytest
from obstore.store import S3Store
from pyarrow import parquet

from components.common.dataset import SPLITS, load_split, read_info
from components.common.files import sha256_file
from components.prepare.__main__ import main

PROJECT = Path(__file__).resolve().parents[2]
SHIPPED = PROJECT / "data" / "medical_qa_data.jsonl"
GOOD = [{"question": f"问题 {i}？", "answer": f"第 {i} 个回答。"} for i in range(12)]


def flags(folder: Path, data: Path | str, *more: str) -> list[str]:
    outputs = {"dataset": "dataset", "data_report": "report.html", "metrics": "metrics.json"}
    return ["--data_path", str(data), *(part for name, file in outputs.items() for part in (f"--{name}", str(folder / file))), *more]


def command(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "components.prepare", *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def assert_refused(done: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    """Exit code 2, a message with what, where and fix, no traceback, and nothing written."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "\n  where: " in done.stderr and "\n  fix:   " in done.stderr
    for word in words:
        assert word in done.stderr
    leftovers = [path.name for path in folder.iterdir() if path.name.startswith((".", "dataset", "report", "metrics"))]
    assert leftovers == []


def test_the_shipped_rows_become_a_data_set(tmp_path: Path) -> None:
    done = command(flags(tmp_path, SHIPPED, "--data_digest", sha256_file(SHIPPED).upper()))
    assert done.returncode == 0, done.stderr
    assert "30 read, 30 kept" in done.stdout and "train 21, validation 3, test 6 rows" in done.stdout
    info = read_info(tmp_path / "dataset")
    assert info["rows"] == {"train": 21, "validation": 3, "test": 6}
    assert info["source"]["sha256"] == sha256_file(SHIPPED)
    assert info["format"] == 1 and re.fullmatch("[0-9a-f]{64}", info["digest"])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == {"rows_read": 30, "rows_kept": 30, "rows_train": 21, "rows_validation": 3, "rows_test": 6}


def test_the_next_step_reads_what_was_written(tmp_path: Path) -> None:
    """Also texts that a careless writer would change, and a split larger than one row group."""
    odd = '2024-01-01 "quoted" \\ \u2028 𠮷 😀 null'
    rows = [{"question": f"{odd} {i}", "answer": f"{odd}\n\tyes {i}", "history": [["q", "a"]] if i % 2 else []} for i in range(16_000)]
    assert main(flags(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows))) is None
    loaded = [row for name in SPLITS for row in load_split(tmp_path / "dataset", name)]
    assert len(loaded) == len(rows)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in loaded:
        number = row["line"] - 1
        assert (row["question"], row["answer"]) == (rows[number]["question"], rows[number]["answer"])
        assert row["history"] == (turns if number % 2 else [])
    assert len(load_split(tmp_path / "dataset", "train")) == read_info(tmp_path / "dataset")["rows"]["train"] > 10_000


def test_every_file_type_and_layout_gives_the_same_digest(tmp_path: Path) -> None:
    """The digest names the rows, not the file that they came in."""
    write_jsonl(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "b.json").write_text(json.dumps({"data": GOOD}), encoding="utf-8")
    with (tmp_path / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("ask", "answer"), *(row.values() for row in GOOD)])
    (tmp_path / "d.tsv").write_text(
        "".join(f"{q}\t{a}\n" for q, a in [("问题", "回答"), *(row.values() for row in GOOD)]), encoding="utf-8"
    )
    parquet.write_table(pa.Table.from_pylist(GOOD), tmp_path / "e.parquet")
    write_jsonl(tmp_path / "f.jsonl", [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in GOOD])
    talks = [[{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"]}] for row in GOOD]
    write_jsonl(tmp_path / "g.jsonl", [{"conversations": talk} for talk in talks])
    parquet.write_table(pa.Table.from_pylist([{"conversations": talk} for talk in talks]), tmp_path / "h.parquet")
    write_jsonl(tmp_path / "i.jsonl", [{"left": row["question"], "right": row["answer"]} for row in GOOD])
    digests = {}
    for path in sorted(tmp_path.iterdir()):
        folder = tmp_path / f"out-{path.name}"
        named = ["--question_column", "left", "--answer_column", "right"] if path.stem == "i" else []
        main(flags(folder, path, *named))
        digests[path.name] = read_info(folder / "dataset")["digest"]
    assert len(digests) == 9
    assert len(set(digests.values())) == 1, digests


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    digests = []
    for number, answer in enumerate(["第 0 个回答。", "第 0 个回答！"]):
        rows = [GOOD[0] | {"answer": answer}, *GOOD[1:]]
        main(flags(tmp_path / str(number), write_jsonl(tmp_path / f"{number}.jsonl", rows)))
        digests.append(read_info(tmp_path / str(number) / "dataset")["digest"])
    assert digests[0] != digests[1]


def test_rejects_are_counted_said_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [GOOD[0], {"question": "<script>alert(1)</script>", "answer": ""}, *GOOD[1:], GOOD[3], {"question": 3, "answer": "text"}]
    main(flags(tmp_path, write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert "left out: empty_answer 1, duplicate 1, question_not_text 1; each with its line in" in capsys.readouterr().out
    listed = [json.loads(line) for line in (tmp_path / "dataset" / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(item["line"], item["reason"]) for item in listed] == [(2, "empty_answer"), (14, "duplicate"), (15, "question_not_text")]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["rows_read"] == metrics["rows_kept"] + 3 == 15
    assert (metrics["rejected_empty_answer"], metrics["rejected_duplicate"], metrics["rejected_question_not_text"]) == (1, 1, 1)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the answer is empty" in page and "回答为空" in page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_report_needs_no_network_and_speaks_both_languages(tmp_path: Path) -> None:
    main(flags(tmp_path, SHIPPED))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=|https?://|url\(|@import""", page)
    info = read_info(tmp_path / "dataset")
    for expected in (
        info["digest"],
        info["source"]["sha256"],
        "JSON Lines",
        "question_answer",
        "数据报告",
        "Splits",
        "划分",
        "什么是高血压？",
    ):
        assert expected in page
    assert page.count("<svg viewBox") == 2, "a histogram for questions and one for answers"


def test_a_small_set_says_what_it_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(flags(tmp_path, write_jsonl(tmp_path / "rows.jsonl", GOOD[:3])))
    assert "would have been empty" in capsys.readouterr().out
    info = read_info(tmp_path / "dataset")
    assert info["rows"] == {"train": 1, "validation": 1, "test": 1}
    assert info["split"]["moved"]
    assert "原本为空" in (tmp_path / "report.html").read_text(encoding="utf-8")


def executor_input(folder: Path, **parameters: Any) -> dict[str, Any]:
    """What KFP's backend sends, cut to what a container component sees."""

    def artifact(name: str, schema: str, file: str) -> dict[str, Any]:
        described = {"name": name, "type": {"schemaTitle": schema, "schemaVersion": "0.0.1"}, "uri": str(folder / file), "metadata": {}}
        return {"artifacts": [described]}

    artifacts = {
        "dataset": artifact("dataset", "system.Dataset", "prepare/dataset"),
        "data_report": artifact("data_report", "system.HTML", "prepare/data_report"),
        "metrics": artifact("metrics", "system.Metrics", "prepare/metrics"),
    }
    return {
        "inputs": {"parameterValues": parameters},
        "outputs": {"artifacts": artifacts, "outputFile": str(folder / "prepare" / "executor_output.json")},
    }


def test_d36_the_executor_output_holds_the_metrics(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, GOOD[0]])
    message = executor_input(
        tmp_path,
        data_path=str(rows),
        data_digest="",
        question_column="",
        answer_column="",
        validation_fraction=0.1,
        test_fraction=0.25,
        image="not one of our settings",
    )
    done = command(["--executor_input", json.dumps(message)])
    assert done.returncode == 0, done.stderr
    output = json.loads((tmp_path / "prepare" / "executor_output.json").read_text(encoding="utf-8"))
    metadata = {name: entry["artifacts"][0]["metadata"] for name, entry in output["artifacts"].items()}
    info = read_info(tmp_path / "prepare" / "dataset")
    assert metadata["dataset"] == {"digest": info["digest"], "rows": info["rows"]}
    assert metadata["metrics"] == json.loads((tmp_path / "prepare" / "metrics").read_text(encoding="utf-8"))
    assert metadata["metrics"]["rows_kept"] == 12 and metadata["metrics"]["rejected_duplicate"] == 1
    assert info["split"]["test_fraction"] == 0.25
    assert (tmp_path / "prepare" / "data_report").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_failed_step_leaves_no_executor_output(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": ""}])
    done = command(["--executor_input", json.dumps(executor_input(tmp_path, data_path=str(rows)))])
    assert_refused(done, tmp_path, "none of the 1 rows can be used")
    assert list((tmp_path / "prepare").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "more", "words"),
    [
        ("rows.jsonl", None, (), ("the data file is missing", "rows.jsonl")),
        ("rows.jsonl", b"", (), ("the data file has no row",)),
        ("rows.jsonl", b'{"question": "a"}\n{"question"', (), ("not JSON", "rows.jsonl, line 2")),
        ("rows.csv", "question,answer\n高血压,是\n".encode("gb18030"), (), ("not UTF-8", "rows.csv, line 2", "iconv -f GB18030")),
        ("rows.json", "[]".encode("utf-16"), (), ("not UTF-8", "rows.json, line 1", "iconv -f UTF-16")),
        ("rows.xlsx", b"PK", (), (".xlsx is not a file type",)),
        ("rows.csv", b"left,right\n1,2\n", (), ("the columns are: left, right", "--question_column")),
        ("rows.csv", b"question,answer\n1,2\n", ("--answer_column", "text"), ("no column 'text'", "question, answer")),
        ("rows.jsonl", b'{"question": 1, "answer": 2}\n' * 3, (), ("none of the 3 rows", "question_not_text 3", "line 1")),
        ("rows.jsonl", b'{"question": "What?", "answer": "Nothing."}\n', (), ("1 different question",)),
        ("rows.jsonl", b"{}\n", ("--data_digest", "0" * 64), ("the data changed between submit and run", "sha256", "0" * 64)),
        ("rows.jsonl", b"{}\n", ("--data_digest", "abc"), ("--data_digest",)),
        ("rows.jsonl", b"{}\n", ("--test_fraction", "0.9"), ("--test_fraction", "less than 0.5")),
        ("rows.jsonl", b'{"question": "' + b"x" * 20_000_000 + b'", "answer": "long"}\n', (), ("question_too_long 1",)),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, name: str, content: bytes | None, more: tuple[str, ...], words: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_refused(command(flags(tmp_path, tmp_path / name, *more)), tmp_path, *words)


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    assert_refused(command(flags(tmp_path, tmp_path)), tmp_path, "the data path is a folder")


def test_a_folder_that_is_no_data_set_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    done = command(flags(tmp_path, SHIPPED, "--dataset", str(mine)))
    assert_refused(done, tmp_path, "holds something else than a data set")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_an_older_data_set_is_replaced_whole(tmp_path: Path) -> None:
    main(flags(tmp_path, SHIPPED))
    main(flags(tmp_path, write_jsonl(tmp_path / "rows.jsonl", GOOD)))
    assert sum(read_info(tmp_path / "dataset")["rows"].values()) == 12
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == [
        "dataset.json",
        "rejects.jsonl",
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_killed_half_way_it_leaves_no_data_set(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": f"question {i}", "answer": "some answer"} for i in range(150_000)])
    process = subprocess.Popen(
        [sys.executable, "-m", "components.prepare", *flags(tmp_path, rows)], cwd=PROJECT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".dataset.*/rejects.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert list(tmp_path.glob(".dataset.*")), "it was killed while it wrote"
    assert not (tmp_path / "dataset").exists() and not (tmp_path / "report.html").exists()
    main(flags(tmp_path, SHIPPED))
    assert sum(read_info(tmp_path / "dataset")["rows"].values()) == 30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said(small_disk: Path) -> None:
    done = command(flags(small_disk, SHIPPED))
    assert done.returncode == 2, done.stderr
    assert "error: the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], None])
def test_no_heavy_library_is_imported(tmp_path: Path, arguments: list[str] | None) -> None:
    code = (
        "import sys\nfrom components.prepare.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'transformers', 'datasets', 'pandas', 'kfp'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(arguments or flags(tmp_path, SHIPPED))], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_the_data_may_lie_behind_a_file_address(tmp_path: Path) -> None:
    main(flags(tmp_path, f"file://{SHIPPED}"))
    assert read_info(tmp_path / "dataset")["source"]["path"] == f"file://{SHIPPED}"


def test_the_data_may_lie_in_a_bucket(tmp_path: Path, s3_server: tuple[Path, dict[str, str]]) -> None:
    _, environment = s3_server
    keys: Any = {name.removeprefix("AWS_").lower(): value for name, value in environment.items()}
    bucket = S3Store("bucket", endpoint=keys.pop("endpoint_url"), client_options={"allow_http": True}, **keys)
    obstore.put(bucket, "数据 1/rows.jsonl", SHIPPED.read_bytes())
    done = command(flags(tmp_path, "s3://bucket/数据 1/rows.jsonl", "--data_digest", sha256_file(SHIPPED)), **environment)
    assert done.returncode == 0, done.stderr
    assert read_info(tmp_path / "dataset")["source"]["path"] == "s3://bucket/数据 1/rows.jsonl"


@pytest.mark.parametrize("address", ["s3://bucket/none.jsonl", "s3://bucket", "gs://bucket/rows.jsonl"])
def test_data_that_is_not_in_the_bucket_is_refused(tmp_path: Path, s3_server: tuple[Path, dict[str, str]], address: str) -> None:
    assert_refused(command(flags(tmp_path, address), **s3_server[1]), tmp_path, address.rpartition("/")[0])


def test_a_storage_that_is_down_is_said(tmp_path: Path) -> None:
    down = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    assert_refused(command(flags(tmp_path, "s3://bucket/rows.jsonl"), **down), tmp_path, "object storage refused")
