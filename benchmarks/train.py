"""Training speed and memory of `components.train` against TRL's SFTTrainer: its defaults, and its own packing.

    pip install trl
    python -m benchmarks.train --model package:smollm2-135m --data rows.jsonl --rows 500     (hours on two cores)
    python -m benchmarks.train --quick

Each trainer gets the same token ids of the same rows, the same effective batch, LoRA settings, learning-rate schedule and seed, and runs
in a process of its own. The rounds alternate. Measured are real tokens per second of the optimizer steps (padding is never counted),
the process's peak memory, and the held-out loss, computed for every trainer by the same code. A trainer that packs several rows into
one makes fewer optimizer steps of more tokens out of the same rows; its loss is shown, and compared for the one that doesn't.

The last line is JSON: `ratio` is ours over TRL's defaults, `ratio_packing` ours over TRL with packing, `spread` their ranges over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PROJECT = Path(__file__).resolve().parents[1]
CONTENDERS = ("ours", "trl", "trl_packing")
BOUND, BOUND_PACKING = 1.5, 1.0
LORA_R, LORA_ALPHA, LEARNING_RATE, EFFECTIVE_BATCH, MAX_LENGTH, QUICK_CHARACTERS = 16, 32, 2e-4, 8, 1024, 60


def main() -> None:
    """Run the rounds, print a table and the JSON line."""
    arguments = _arguments()
    if arguments.contender:
        print(json.dumps(run_contender(arguments)))
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_rows(arguments, work)
        found: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
        for number in range(arguments.rounds):
            for contender in CONTENDERS[number % 3 :] + CONTENDERS[: number % 3]:
                result = _in_a_process(contender, arguments, work, seed=arguments.seed + number)
                found[contender].append(result)
                print(f"round {number + 1}, {contender}: {json.dumps(result)}", flush=True)
    print(json.dumps(summary(found, arguments)))


def summary(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios of rounds that ran side by side, with their medians and ranges."""

    def ratios(other: str, value: str) -> list[float]:
        return [ours[value] / theirs[value] for ours, theirs in zip(found["ours"], found[other], strict=True)]

    def mean(contender: str, value: str) -> float:
        return statistics.mean(result[value] for result in found[contender])

    speed, packing = ratios("trl", "tokens_per_second"), ratios("trl_packing", "tokens_per_second")
    memory = {other: statistics.median(ratios(other, "peak_memory_bytes")) for other in CONTENDERS[1:]}
    losses = {contender: [round(result["validation_loss"], 4) for result in results] for contender, results in found.items()}
    difference = mean("ours", "validation_loss") - mean("trl", "validation_loss")
    seed_spread = max(max(values) - min(values) for values in (losses["ours"], losses["trl"])) if arguments.rounds > 1 else None
    ratio, ratio_packing = statistics.median(speed), statistics.median(packing)
    return {
        "name": "train",
        "ratio": round(ratio, 3),
        "spread": [round(min(speed), 3), round(max(speed), 3)],
        "bound": BOUND,
        "ok": ratio >= BOUND and ratio_packing >= BOUND_PACKING and max(memory.values()) <= 1,
        "ratio_packing": round(ratio_packing, 3),
        "spread_packing": [round(min(packing), 3), round(max(packing), 3)],
        "bound_packing": BOUND_PACKING,
        "memory_ratio": {other: round(value, 3) for other, value in memory.items()},
        "validation_loss": losses,
        "validation_loss_difference": round(difference, 4),
        "validation_loss_seed_spread": None if seed_spread is None else round(seed_spread, 4),
        "tokens_per_second": {
            contender: [round(result["tokens_per_second"], 1) for result in results] for contender, results in found.items()
        },
        "start_s": [round(result["start_s"], 1) for result in found["ours"]],
        "model": arguments.model,
        "rows": arguments.rows,
        "rounds": arguments.rounds,
    }


def write_rows(arguments: argparse.Namespace, work: Path) -> None:
    """`rows.jsonl` with training and validation rows: those of a file, or the shipped ones joined to unequal lengths."""
    source = arguments.data or PROJECT / "data" / "medical_qa_data.jsonl"
    known = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = random.Random(arguments.seed)
    wanted = arguments.rows + arguments.validation_rows
    if arguments.quick:
        rows = [row | {"answer": row["answer"][:QUICK_CHARACTERS]} for row in chosen.sample(known, wanted)]
    elif len(known) >= wanted:
        rows = chosen.sample(known, wanted)
    else:
        several = [chosen.sample(known, chosen.choice((1, 1, 1, 2, 3))) for _ in range(wanted)]
        rows = [{key: "\n".join(row[key] for row in part) for key in ("question", "answer")} for part in several]
    for name, part in (("train", rows[: arguments.rows]), ("validation", rows[arguments.rows :])):
        lines = (json.dumps({key: row[key] for key in ("question", "answer")}, ensure_ascii=False) + "\n" for row in part)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run_contender(arguments: argparse.Namespace) -> dict[str, float]:
    """Train in this process, and measure."""
    work = Path(arguments.work)
    adapter, seconds, tokens, start_s = (_ours if arguments.contender == "ours" else _trl)(arguments, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": float(peak),
        "validation_loss": _validation_loss(adapter, arguments, work),
        "start_s": start_s,
        "tokens": float(tokens),
    }


def _ours(arguments: argparse.Namespace, work: Path) -> tuple[Path, float, int, float]:
    """`components.train`, with a data set folder whose validation split is the smallest there can be: no time goes into it."""
    from datasets import Dataset

    from components.common import loading
    from components.train.__main__ import main as train

    rows = [json.loads(line) | {"history": [], "line": number} for number, line in enumerate(_lines(work / "train.jsonl"), 1)]
    folder = work / f"dataset-{os.getpid()}"
    folder.mkdir()
    for name, part in (("train", rows), ("validation", rows[:1])):
        Dataset.from_list(part).to_parquet(str(folder / f"{name}.parquet"))
    (folder / "dataset.json").write_text('{"digest": "benchmark"}', encoding="utf-8")
    adapter = work / f"ours-{os.getpid()}"
    flags = {
        "base_model": arguments.model,
        "dataset": folder,
        "adapter": adapter,
        "curves": work / "curves.html",
        "metrics": work / "metrics.json",
        "epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lora_r": LORA_R,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": 0,
        "max_length": MAX_LENGTH,
        "batch_size": arguments.batch_size,
        "gradient_accumulation_steps": EFFECTIVE_BATCH // arguments.batch_size,
        "warmup_steps": 0,
        "checkpoint_uri": "none",
        "seed": arguments.seed,
    }
    load_s = _timed(loading, "load_model")
    began = time.monotonic()
    train([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    info = json.loads((adapter / "train_info.json").read_text(encoding="utf-8"))
    seconds = info["tokens"] / info["speed"]["tokens_per_second"]
    start_s = time.monotonic() - began - info["seconds"]["train"] - sum(load_s)
    return adapter, seconds, info["tokens"], start_s


def _timed(module: Any, name: str) -> list[float]:
    """Note how long each call of a module's function takes."""
    function, taken = getattr(module, name), []

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.monotonic()
        result = function(*arguments, **options)
        taken.append(time.monotonic() - began)
        return result

    setattr(module, name, timed)
    return taken


def _trl(arguments: argparse.Namespace, work: Path) -> tuple[Path, float, int, float]:
    """TRL's SFTTrainer on the same token ids; everything that is not said here is its default."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from components.common.base_model import resolve_base_model
    from components.common.device import choose_compute

    choose_compute()  # the same number of threads
    tokenizer, chat = _tokenizer(arguments)
    pairs = [chat.example(tokenizer, row["question"], row["answer"]) for row in map(json.loads, _lines(work / "train.jsonl"))]
    pairs = [(ids, mask) for ids, mask in pairs if len(ids) <= MAX_LENGTH]

    class Clock(TrainerCallback):
        """Time between the begin and the end of each optimizer step."""

        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.monotonic() - self.began

    clock, target = Clock(), work / f"{arguments.contender}-{os.getpid()}"
    config = SFTConfig(
        output_dir=str(target),
        per_device_train_batch_size=EFFECTIVE_BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        max_length=MAX_LENGTH,
        packing=arguments.contender == "trl_packing",
        completion_only_loss=True,
        seed=arguments.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=LORA_R, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear")
    columns = {"input_ids": [ids for ids, _ in pairs], "completion_mask": [[int(one) for one in mask] for _, mask in pairs]}
    tokenizer.chat_template = chat.template
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    trainer = SFTTrainer(
        str(resolve_base_model(arguments.model)),
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(target))
    return target, clock.seconds, sum(len(ids) for ids, _ in pairs), 0.0


def _validation_loss(adapter: Path, arguments: argparse.Namespace, work: Path) -> float:
    """Nats per answer token of the held-out rows, in fp32, row after row from the library's own logits."""
    import torch
    from peft import PeftModel

    from components.common.base_model import resolve_base_model
    from components.common.device import Compute
    from components.common.loading import load_model

    tokenizer, chat = _tokenizer(arguments)
    base = load_model(resolve_base_model(arguments.model), Compute(torch.device("cpu"), torch.float32, ""))
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    total, tokens = 0.0, 0
    for row in map(json.loads, _lines(work / "validation.jsonl")):
        ids, mask = (torch.tensor(part) for part in chat.example(tokenizer, row["question"], row["answer"]))
        with torch.no_grad():
            logits = model(input_ids=ids[None, :MAX_LENGTH]).logits[0, :-1].float()
        learned = mask[1:MAX_LENGTH]
        total += float(torch.nn.functional.cross_entropy(logits[learned], ids[1:MAX_LENGTH][learned], reduction="sum"))
        tokens += int(learned.sum())
    return total / tokens


def _tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from components.common.base_model import resolve_base_model
    from components.common.chat import ChatFormat
    from components.common.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_base_model(arguments.model))
    return tokenizer, ChatFormat.of_tokenizer(tokenizer)


def _in_a_process(contender: str, arguments: argparse.Namespace, work: Path, *, seed: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train", "--contender", contender, "--work", str(work), "--seed", str(seed)]
    command += ["--model", arguments.model, "--batch_size", str(arguments.batch_size)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:smollm2-135m", help="base model, as components.train takes it")
    parser.add_argument(
        "--data", type=Path, help=".jsonl rows with question and answer; without: the shipped rows, joined to unequal lengths"
    )
    parser.add_argument("--rows", type=int, default=500, help="training rows")
    parser.add_argument("--validation_rows", type=int, default=40, help="held-out rows whose loss is compared")
    parser.add_argument("--rounds", type=int, default=3, help="how often each trainer runs; each round has a seed of its own")
    parser.add_argument("--batch_size", type=int, default=2, help="rows in a micro-batch of ours; the effective batch is 8 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="8 short rows, one round: below three minutes on two quiet cores")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.validation_rows, arguments.rounds = 8, 2, 1
    return arguments


if __name__ == "__main__":
    main()
