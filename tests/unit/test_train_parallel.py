"""Two processes train as one does, with the base whole in each or spread over both; what happens to one happens to both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.common.errors import UserError
from components.train import launch, stepping
from components.train.launch import processes_to_start, run_processes
from components.train.model import add_lora, load_base
from components.train.parallel import Processes
from components.train.rows import Example
from components.train.run import Run
from components.train.stepping import micro_batches
from tests.unit.train_support import plan_of

PROJECT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ROWS_A_STEP = 4
# Sums in another order round differently in fp32, and AdamW turns even the smallest gradient into a step of full size.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 2e-3  # of the largest weight
STOPPED_AT = 3


class Command:
    """`python -m components.train` in one process or two, with a folder for what it writes."""

    def __init__(self, folder: Path, model: Path, rows: Path, launcher: list[str], *flags: str) -> None:
        self.folder = folder
        paths = {"--adapter": "adapter", "--curves": "curves.html", "--metrics": "metrics.json"}
        places = [part for flag, name in paths.items() for part in (flag, str(folder / name))]
        common = ["--base_model", str(model), "--dataset", str(rows), "--precision", "fp32", "--learning_rate", "5e-3", "--epochs", "2"]
        self.line = [*(launcher or [sys.executable]), "-m", "components.train", *common, "--lora_r", "4", *places, *flags]

    def start(self, *flags: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*self.line, *flags], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *flags: str) -> str:
        """Run to the end; all that was printed."""
        with self.start(*flags) as process:
            output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        return output

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    @property
    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = json.loads((self.folder / "adapter" / "train_info.json").read_text(encoding="utf-8"))
        return info


@pytest.fixture(scope="module")
def rows_file(tiny_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very unequal length."""
    rows = [row | {"answer": row["answer"][: 5 + 97 * at % 200]} for at, row in enumerate(tiny_rows[:14])]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> Command:
    """One process, four rows a step."""
    flags = ("--batch_size", "2", "--gradient_accumulation_steps", "2", "--lora_dropout", "0")
    command = Command(tmp_path_factory.mktemp("alone"), tiny_model, rows_file, [], *flags)
    command.run()
    assert command.info["rows"]["train"]["used"] % ROWS_A_STEP == 1, "in the last step of an epoch a process shall be without a row"
    return command


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--batch_size", "2", "--gradient_accumulation_steps", "1", "--sharding", "none"), id="whole"),
        pytest.param(
            ("--batch_size", "1", "--gradient_accumulation_steps", "2", "--sharding", "full", "--gradient_checkpointing", "true"),
            id="sharded",
        ),
    ],
)
def test_two_processes_train_as_one(alone: Command, flags: tuple[str, ...], tmp_path: Path, tiny_model: Path, rows_file: Path) -> None:
    """The same effective batch, cut up in other ways: the same losses and the same adapter."""
    both = Command(tmp_path, tiny_model, rows_file, TORCHRUN, "--lora_dropout", "0", *flags)
    output = both.run()
    assert output.count("validation loss of the base model") == 1, "two processes speak"
    assert both.info["plan"]["processes"] == 2 and both.info["plan"]["rows_a_step"] == ROWS_A_STEP
    assert both.info["plan"]["sharded"] == ("full" in flags)
    found, wanted = ([point["validation_loss"] for point in command.info["evaluations"]] for command in (both, alone))
    assert found == pytest.approx(wanted, rel=LOSS_TOLERANCE)
    largest = max(float(weight.abs().max()) for weight in alone.weights.values())
    apart = max(float((both.weights[name] - weight).abs().max()) for name, weight in alone.weights.items())
    print(f"losses: {found} and {wanted}; weights: at most {apart:.2g} apart, the largest is {largest:.2g}")
    assert both.weights.keys() == alone.weights.keys() and apart <= WEIGHT_TOLERANCE * largest


def test_d10_sigterm_to_the_launcher_stops_both_and_the_next_run_ends_as_if_unbroken(
    tmp_path: Path, tiny_model: Path, rows_file: Path
) -> None:
    """With dropout, whose random numbers differ between the processes."""
    flags = ("--batch_size", "2", "--gradient_accumulation_steps", "1", "--lora_dropout", "0.1")
    unbroken, broken = (Command(tmp_path / name, tiny_model, rows_file, TORCHRUN, *flags) for name in ("unbroken", "broken"))
    unbroken.run("--checkpoint_uri", "none")
    checkpoints = tmp_path / "broken" / "adapter.checkpoints"
    with broken.start("--checkpoint_every_s", "0.001") as process:
        while newest(checkpoints) < STOPPED_AT and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = newest(checkpoints)
    assert STOPPED_AT <= stopped < unbroken.info["steps"], output
    assert output.count(f"stopped after step {stopped}; run the same command again to go on") == 1, output
    assert not (tmp_path / "broken" / "adapter").exists()
    output = broken.run()
    assert f"resumed after step {stopped}" in output
    assert all(torch.equal(weight, unbroken.weights[name]) for name, weight in broken.weights.items())
    assert broken.info["evaluations"] == unbroken.info["evaluations"]


def newest(place: Path) -> int:
    """The step of the newest checkpoint in a folder, 0 without one."""
    return max((int(path.stem.removeprefix("step-")) for path in place.rglob("step-*.json")), default=0)


def rows_of(*lengths: int) -> list[Example]:
    return [Example(torch.zeros(length, dtype=torch.int32), torch.ones(length, dtype=torch.bool), at) for at, length in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [(9, 2, 2, 2, 2, 1), (5,), (3, 3, 3), tuple(range(1, 18))])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_row_is_computed_by_one_process_and_sharded_ones_keep_step(lengths: tuple[int, ...], count: int) -> None:
    rows = rows_of(*lengths)
    for sharded in (False, True):
        groups = [micro_batches(rows, 2, 1, Processes(rank, count, "cpu", sharded)) for rank in range(count)]
        computed = [row.line for mine in groups for group, weight in mine for row in group if weight]
        assert sorted(computed) == list(range(len(rows)))
        if sharded:
            assert len({len(mine) for mine in groups}) == 1, "a process would wait for another for ever"


def test_processes_have_about_as_many_tokens_each() -> None:
    rows = rows_of(*(7 * at % 40 + 1 for at in range(64)))
    tokens = [sum(len(row.ids) for row in Processes(rank, 4, "cpu").share(rows)) for rank in range(4)]
    assert max(tokens) - min(tokens) <= max(len(row.ids) for row in rows)


def test_full_memory_ends_a_sharded_run_instead_of_leaving_the_others_waiting(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stepping, "answer_nll", full)
    plan = plan_of(sharded=True, batch_size=8)
    model = add_lora(load_base(tiny_model, plan), plan)
    with pytest.raises(UserError, match="processes that share a base") as error:
        stepping.accumulate_gradients(model, rows_of(5, 5, 5), plan, 0, Accelerator(cpu=True), Run())
    assert "--batch_size" in error.value.fix


def test_a_machine_with_several_cards_starts_a_process_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for cards, wanted in ((0, 0), (1, 0), (4, 4)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: cards)
        assert processes_to_start() == wanted
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes_to_start() == 0, "these processes were started together already"


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "GRACE_S", 0.5)
    yield


def test_the_launcher_numbers_its_processes(tmp_path: Path) -> None:
    names = "'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'"
    program = (
        f"import os, pathlib; v = [os.environ[n] for n in {names}.split()]; pathlib.Path({str(tmp_path)!r}, v[0]).write_text(' '.join(v))"
    )
    assert run_processes(2, python(program)) == 0
    first, second = ((tmp_path / rank).read_text().split() for rank in "01")
    assert first[:5] == ["0", "0", "2", "2", "127.0.0.1"] and second[:5] == ["1", "1", "2", "2", "127.0.0.1"]
    assert first[5] == second[5] != "0"


@pytest.mark.usefixtures("short_grace")
def test_when_one_process_fails_the_others_end_and_its_code_is_the_commands() -> None:
    started = time.monotonic()
    assert run_processes(2, python("import os, sys, time; sys.exit(2) if os.environ['RANK'] == '1' else time.sleep(60)")) == 2
    assert time.monotonic() - started < 20
    assert run_processes(2, python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")) == 128 + signal.SIGKILL


def test_the_launcher_passes_sigterm_on_and_waits_for_what_it_takes(tmp_path: Path) -> None:
    child = (
        "import os, pathlib, signal, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "def stop(number, frame):\n    time.sleep(1)\n    (folder / ('saved' + os.environ['RANK'])).touch()\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n(folder / os.environ['RANK']).touch()\ntime.sleep(60)\n"
    )
    parent = f"import sys\nfrom components.train import launch\nlaunch.GRACE_S = 0.1\nsys.exit(launch.run_processes(2, {python(child)!r}))"
    with subprocess.Popen(python(parent), cwd=PROJECT) as process:
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
