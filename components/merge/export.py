"""The merged model with INT8 or INT4 weights, in the folder layout that serving engines read, and what the smaller weights cost.

Format: compressed-tensors' `pack-quantized`, which vLLM and SGLang load without a flag, and transformers with the library installed.
Only the weights of linear layers are quantised (W8A16, W4A16); embeddings, output head, norms and biases stay as they are. W8A8 was
measured too: without calibration data its NLL rises eight times as much as with W8A16, and the file is no smaller.

Method: round to nearest, symmetric, without calibration data. The certificate tells what it costs; small models lose much in 4 bits.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from components.common.chat import ChatFormat
from components.common.device import choose_compute
from components.common.errors import ModelError, StorageError, UserError, first_line
from components.common.files import read_json, whole_folder, write_json
from components.common.loading import load_causal_lm, load_model, return_memory
from components.common.memory import free_bytes
from components.common.progress import progress
from components.common.storage import MANIFEST
from components.merge.model_folder import INFO_FILE
from components.merge.running import SPARE
from components.merge.structure import Structure, read_structure
from components.merge.weight_files import INDEX, SINGLE

Scheme = Literal["int8", "int4"]
Rows = Sequence[tuple[list[int], list[bool]]]  # token ids, and the mask of their answer

FORMAT = "pack-quantized"
BITS: Mapping[Scheme, int] = {"int8": 8, "int4": 4}
GROUP_SIZES = (128, 64, 32)  # weights of a row that share a scale, in 4 bits; those the engines have kernels for
SHARD_BYTES = 10**9  # so much output is in memory at a time
BLOCK_WEIGHTS = 1 << 22  # weights quantised at a time: the packing takes 20 bytes for each

# The most that quantisation may add to the negative log-likelihood of the answers, nats per token. INT8: 2 % of perplexity; rounding costs
# SmolLM2 135M and Gemma 3 270M at most half of it, so more means that something broke. INT4: 10 % of perplexity, our price for a file that is
# four times smaller: small models cost more, and are better served in INT8.
MAX_NLL_DIFFERENCE: Mapping[Scheme, float] = {"int8": 0.02, "int4": 0.1}
GREEDY_TOKENS = 64  # of each answer are compared
GREEDY_BATCH = 8  # rows answered side by side


@dataclass(frozen=True)
class Plan:
    """What is quantised and how.

    Attributes:
        group_size: weights of a row that share a scale; None: all of the row (per output channel).
        layers: names of the linear layers that are quantised.
        kept: names of the linear layers that stay as they are: the output head, and those whose width the format can't hold.
    """

    bits: int
    group_size: int | None
    layers: frozenset[str]
    kept: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """The plan as JSON; the same for the same model, on any day and machine."""
        kept = sorted({".".join("*" if part.isdigit() else part for part in name.split(".")) for name in self.kept})
        return {
            "format": f"compressed-tensors {FORMAT}, W{self.bits}A16",
            "method": "round to nearest, symmetric, without calibration data",
            "group_size": self.group_size or "per output channel",
            "quantised_layers": len(self.layers),
            "not_quantised": ["embeddings", *kept, "norms", "biases"],
        }


def export_quantized(merged: Path, target: Path, scheme: Scheme, chat: ChatFormat, rows: Rows) -> dict[str, Any]:
    """Write the merged model with quantised weights, and measure what that cost it.

    The same model and scheme give the same bytes. Memory: one output file of `SHARD_BYTES`, and for the certificate one whole model.

    Args:
        merged: a model folder in 16 or 32 bits, in one or more safetensors files.
        target: the folder to write, whole or absent; one that is there is replaced.
        chat: the model's chat format; its stop tokens end a greedy answer.
        rows: token ids and the mask of their answer, as `ChatFormat.example` gives them; the certificate is measured on them.

    Returns:
        The record, for JSON: what was done, sizes, and the certificate. A certificate that is not passed raises nothing.

    Raises:
        UserError: the library is not installed, or `target` is `merged`. StorageError: the disk is full.
        ModelError: the merged folder is broken, already quantised, or has no layer that can be quantised.
    """
    started = time.monotonic()
    version = _library_version()
    if target.resolve() == merged.resolve():
        raise UserError("the export would replace the model that it is made from", where=str(target), fix="choose another folder")
    structure = _unquantised(merged)
    plan = plan_layers(structure, scheme)
    facts = {"scheme": scheme, "library": f"compressed-tensors {version}", **plan.facts()}
    kept = ", ".join(facts["not_quantised"])
    print(f"{scheme}: {facts['format']}, group size: {facts['group_size']}, {len(plan.layers)} layers; not quantised: {kept}", flush=True)

    with whole_folder(target) as folder:
        size = _write_weights(structure, plan, folder, scheme)
        _copy_the_rest(merged, folder, chat, facts)
        config = read_json(merged / "config.json", kind="model's config.json")
        write_json(folder / "config.json", config | {"quantization_config": _config(plan).model_dump(mode="json") | {"version": version}})
        written_s = time.monotonic() - started
        found = certificate(merged, folder, scheme, chat, rows, parameters=structure.parameters)

    was = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    print(f"{scheme}: {size / 2**20:.0f} MiB of weights instead of {was / 2**20:.0f} ({size / was:.0%}), written in {written_s:.0f} s")
    return {
        **facts,
        "weights_size_bytes": {"merged": was, "quantised": size},
        "write_seconds": round(written_s, 1),
        "seconds": round(time.monotonic() - started, 1),
        "certificate": found,
        "passed": found["passed"],
    }


def plan_layers(structure: Structure, scheme: Scheme) -> Plan:
    """Which linear layers are quantised: all but the output head, and those whose width the format can't hold.

    In 4 bits the group size is the one that lets most weights be quantised; of equals, the largest, which takes least space.
    The engines fuse layers of equal width (queries, keys and values), so what belongs together is always treated alike.

    Raises:
        ModelError: nothing is left to quantise.
    """
    model = structure.empty_model()
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    widths = {name: module.in_features for name, module in linear.items() if module is not head}
    bits = BITS[scheme]
    sizes = {name: linear[name].weight.numel() for name in widths}
    fitting = {group: sum(size for name, size in sizes.items() if widths[name] % group == 0) for group in GROUP_SIZES}
    group_size = max(GROUP_SIZES, key=lambda group: (fitting[group], group)) if scheme == "int4" else None
    unit = group_size or 32 // bits  # the width is packed in words of 32 bits
    layers = frozenset(name for name, width in widths.items() if width % unit == 0)
    if not layers:
        raise ModelError(
            f"the model has no linear layer that {scheme} can hold: their widths are {sorted(set(widths.values()))}, "
            f"and a multiple of {unit} is needed",
            where=str(structure.files.folder),
            fix="serve the model in 16 bits",
        )
    return Plan(bits, group_size, layers, tuple(name for name in linear if name not in layers))


def _library_version() -> str:
    """The version of compressed-tensors; it is needed to write the folder and to load it."""
    try:
        import compressed_tensors
    except ImportError:
        raise UserError(
            "compressed-tensors is not installed, which writes and reads quantised models", fix="pip install -r requirements.txt"
        ) from None
    return str(compressed_tensors.__version__)


def _unquantised(merged: Path) -> Structure:
    config = read_json(merged / "config.json", kind="model's config.json")
    if not isinstance(config, dict):
        raise ModelError("the model's config.json is not an object", where=str(merged), fix="merge the model again")
    if config.get("quantization_config"):
        raise ModelError(
            f"the model is already quantised ({config['quantization_config'].get('quant_method', 'unknown method')})",
            where=str(merged),
            fix="export from the merged model in 16 bits: quantising twice adds up the errors",
        )
    return read_structure(merged)


def _config(plan: Plan) -> Any:
    """The library's configuration of the folder, as vLLM, SGLang and transformers read it from config.json."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    scheme = QuantizationScheme(targets=["Linear"], weights=_arguments(plan), format=FORMAT)
    return QuantizationConfig(
        config_groups={"group_0": scheme}, format=FORMAT, quantization_status=QuantizationStatus.COMPRESSED, ignore=list(plan.kept)
    )


def _arguments(plan: Plan) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType

    strategy = QuantizationStrategy.GROUP if plan.group_size else QuantizationStrategy.CHANNEL
    return QuantizationArgs(num_bits=plan.bits, type=QuantizationType.INT, symmetric=True, strategy=strategy, group_size=plan.group_size)


@torch.inference_mode()
def compressed(weight: torch.Tensor, plan: Plan, name: str) -> dict[str, torch.Tensor]:
    """A weight (out, in) as the format stores it: `weight_packed` (out, in · bits / 32) int32, `weight_scale`, `weight_shape`.

    Computed in fp32 with the scale as it is stored: in bf16, a quotient of 100 would already be rounded to halves.

    Raises:
        ModelError: the weight is not finite.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    packer = BaseCompressor.get_value_from_registry(FORMAT)
    arguments = _arguments(plan)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    packed, scales = [], []
    for block in weight.split(max(1, BLOCK_WEIGHTS // weight.shape[1])):
        values = block.float()
        low, high = values.unflatten(1, (-1, plan.group_size or weight.shape[1])).aminmax(dim=-1)  # (rows, groups)
        if not (low.isfinite().all() and high.isfinite().all()):
            raise ModelError(f"a weight is not a finite number: {name}", fix="merge or train the model again")
        scale = calculate_qparams(low, high, arguments)[0].to(weight.dtype).clamp_min(torch.finfo(weight.dtype).tiny)
        packed.append(packer.compress({"weight": values, "weight_scale": scale.float()}, scheme)["weight_packed"])
        scales.append(scale)
    return {"weight_packed": torch.cat(packed), "weight_scale": torch.cat(scales), "weight_shape": torch.tensor(weight.shape)}


def _tensors(structure: Structure, plan: Plan, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of the export, one weight after the other in the order of the merged files."""
    with progress(f"{scheme}, weights", len(structure.names)) as meter:
        for name in structure.names:
            weight, layer = structure.files.tensor(name), name.removesuffix(".weight")
            if layer in plan.layers:
                yield from ((f"{layer}.{part}", tensor) for part, tensor in compressed(weight, plan, name).items())
            else:
                yield name, weight
            meter.advance()


def _write_weights(structure: Structure, plan: Plan, folder: Path, scheme: Scheme) -> int:
    """Write the safetensors files, and an index where there is more than one. Returns their size in bytes."""
    names: list[list[str]] = []
    total = 0
    for tensors in _files(_tensors(structure, plan, scheme)):
        _save(tensors, folder / f"{len(names)}.part")  # the names say how many files there are, which is known at the end
        names.append(list(tensors))
        total += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()  # before the next ones are computed
    place: dict[str, str] = {}
    for at, inside in enumerate(names):
        file = SINGLE if len(names) == 1 else f"model-{at + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{at}.part").rename(folder / file)
        place |= dict.fromkeys(inside, file)
    if len(names) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _files(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of one file after the other, of at most `SHARD_BYTES`; a larger tensor gets a file of its own."""
    inside: dict[str, torch.Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if inside and filled + tensor.nbytes > SHARD_BYTES:
            yield inside
            inside, filled = {}, 0
        inside[name] = tensor
        filled += tensor.nbytes
    yield inside


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        what = "the disk is full" if "os error 28" in str(error) else f"the weights can't be written: {first_line(error)}"
        raise StorageError(what, where=str(path.parent), fix="free some space, or choose another --output, then run again") from None


def _copy_the_rest(merged: Path, folder: Path, chat: ChatFormat, facts: dict[str, Any]) -> None:
    """Tokenizer, generation config and chat format as they are; `merge_info.json` also says how the weights were quantised."""
    ours = {"config.json", INDEX, MANIFEST, INFO_FILE}
    for path in sorted(merged.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ours:
            shutil.copyfile(path, folder / path.name)
    chat.save(folder)
    info = read_json(merged / INFO_FILE, kind="record of the merge") if (merged / INFO_FILE).is_file() else {}
    write_json(folder / INFO_FILE, info | {"export": facts})


class _Said(NamedTuple):
    """What a model made of the rows: the NLL of each answer token, its own choice there, and its greedy answers."""

    nll: torch.Tensor
    choices: torch.Tensor
    answers: list[list[int]]


def certificate(merged: Path, quantised: Path, scheme: Scheme, chat: ChatFormat, rows: Rows, *, parameters: int) -> dict[str, Any]:
    """Load both folders with transformers, one after the other, and compare what they make of the rows.

    Returns:
        NLL of the answers (nats per token) before and after, and the share of tokens where both would choose the same (`top1_agreement`);
        the share of rows whose greedy answers are the same to the last token (`exact_answers`, the first `GREEDY_TOKENS`), and the
        earliest position where two answers part (`first_divergence`); `passed`, and where it could not be measured, the `reason`.
    """
    bound = MAX_NLL_DIFFERENCE[scheme]
    found: dict[str, Any] = {"rows": len(rows), "max_nll_difference": bound, "passed": False}
    compute = choose_compute()
    needed, free = parameters * compute.dtype.itemsize * SPARE, free_bytes(compute.device)
    if not rows or needed > free:
        small = f"the memory is too small for the model: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
        found["reason"] = small if rows else "there are no rows to measure it on"
        print(f"warning: {scheme} has no certificate: {found['reason']}", flush=True)
        return found
    print(f"certificate of {scheme}: {compute.reason}", flush=True)
    model, _ = load_causal_lm(merged, compute)
    before = _listen(model, chat, rows, "merged model, rows")
    del model  # never both in memory
    return_memory(compute.device)
    after = _listen(load_model(quantised, compute).eval(), chat, rows, f"{scheme}, rows")
    return_memory(compute.device)
    found |= _compared(before, after)
    difference = found["nll_difference"]
    found["passed"] = difference is not None and difference <= bound
    says = f"NLL {found['nll_merged']} → {found['nll']}, {found['exact_answers']:.0%} of the greedy answers unchanged"
    warning = "" if found["passed"] else f"warning: {scheme} costs more than it may, serve the model in more bits: "
    print(f"{warning}{scheme}: {says}; bound: {bound} nats a token", flush=True)
    return found


def _compared(before: _Said, after: _Said) -> dict[str, Any]:
    parted = [
        next((at for at, (one, other) in enumerate(zip(mine, his, strict=False)) if one != other), min(len(mine), len(his)))
        for mine, his in zip(before.answers, after.answers, strict=True)
        if mine != his
    ]
    nll_merged, nll = before.nll.mean().item(), after.nll.mean().item()
    return {
        "answer_tokens": len(before.nll),
        "nll_merged": _finite(nll_merged),
        "nll": _finite(nll),
        "nll_difference": _finite(nll - nll_merged),
        "top1_agreement": round((before.choices == after.choices).double().mean().item(), 4),
        "exact_answers": round(1 - len(parted) / len(before.answers), 4),
        "greedy_tokens": GREEDY_TOKENS,
        "first_divergence": min(parted, default=None),
    }


def _finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None  # JSON has no NaN


@torch.inference_mode()
def _listen(model: Any, chat: ChatFormat, rows: Rows, label: str) -> _Said:
    from transformers import GenerationConfig

    # In the model's place, because the library would fill gaps from the model's own: its repetition penalty, for one.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id
    )
    losses, choices, answers = [], [], []
    with progress(label, 2 * len(rows)) as meter:
        for ids, mask in rows:
            start = mask.index(True)
            answer = torch.tensor(ids[start:], device=model.device)
            batch = torch.tensor([ids], device=model.device)
            logits = model(input_ids=batch, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none").double().cpu())
            choices.append(logits.argmax(dim=-1).cpu())
            meter.advance()
        for first in range(0, len(rows), GREEDY_BATCH):
            prompts = [ids[: mask.index(True)] for ids, mask in rows[first : first + GREEDY_BATCH]]
            answers += _greedy(model, prompts, chat)
            meter.advance(len(prompts))
    return _Said(torch.cat(losses), torch.cat(choices), answers)


def _greedy(model: Any, prompts: Sequence[Sequence[int]], chat: ChatFormat) -> list[list[int]]:
    """The greedy answers to some prompts, each up to and with its stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    present = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    answers = []
    for answer in model.generate(input_ids=ids, attention_mask=present)[:, width:].tolist():
        end = next((at for at, token in enumerate(answer) if token in chat.stop_ids), len(answer))
        answers.append(answer[: end + 1])
    return answers
