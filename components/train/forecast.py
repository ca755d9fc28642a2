"""How much memory a run will need, and which ways to train fit; from config.json and the weight files' headers: no weights are loaded.

The sum of: the frozen weights, LoRA with its optimizer, the activations that the backward pass needs, the head on one chunk of
answers, and what the libraries take. The activations of a layer are counted tensor by tensor, as autograd keeps them for PEFT's LoRA
(transformers 5.23, peft 0.21, seen through `saved_tensors_hooks`). With `c` bytes a value of the compute precision, for each token:

    4 · norms                      each RMSNorm keeps its input in fp32
    c · inputs                     what goes into the LoRA layers; under autocast every layer keeps a copy of its own
    c · 2 · (query + key)          query, key, value and the attention's output
    c · 3 · intermediate           gate, activated gate, up
    c · rank · layers of LoRA      what lies between A and B

Measured on a CPU, as the peak of anonymous memory over two optimizer steps and the mapped weights, on SmolLM2-135M, Gemma 3 270M and a
tiny Qwen2, 512 to 2,048 tokens, bf16 and fp32, with and without checkpointing, NF4, int8, dropout, DoRA: the forecast is off by -8 %
to +25 %; the table is in `tests/unit/test_train_forecast.py`. Nothing was measured on a GPU. For Qwen2.5-7B in NF4 with checkpointing,
rank 32 and 4,096 tokens it says 10.9 GiB, where a sum of the parts that are certain says 8 to 9: that counts neither the layer that is
recomputed nor the copies of the LoRA weights that this program keeps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from components.common.device import Compute
from components.common.errors import ModelError, UserError
from components.common.memory import Memory
from components.train.config import Quantization, TrainSettings
from components.train.loss import CHUNK_TOKENS
from components.train.plan import Plan

GIB = 2**30
NF4_BITS = 4.127  # 4 bits, and the double-quantised scales: 8 bits for 64 weights, 32 for 16,384 (arXiv 2305.14314, section 3)
LORA_BYTES = 4 + 4 + 4 + 4  # for each fp32 weight: itself, its gradient, and the copies of the best and of the last good weights
ADAMW_BYTES = 8  # two fp32 moments
LOGITS_COPIES = 3  # fp32: the logits, their log-softmax, their gradient
WIDE_COPIES = 3  # fp32 tensors of the MLP's width that are alive at once in the backward pass of a layer
# What the allocator holds beyond what is in use. On a CPU glibc's heap is left with holes, as a share of the activations of a whole
# pass: 0.4 (Gemma) to 0.8 (SmolLM2 in fp32) measured. On a GPU the blocks of PyTorch's caching allocator: an estimate.
CPU_HOLES, GPU_HOLES = 0.6, 0.1
# libraries that load after the forecast; on a GPU also the workspaces of cuBLAS
LIBRARIES_BYTES = {"cpu": 180 * 2**20, "cuda": 512 * 2**20}
USABLE_SHARE = 0.9  # of the free memory: a forecast is no measurement
# What is chosen among, the fastest first.
BATCH_SIZES = (8, 4, 2, 1)
ROWS_A_STEP = 16
MIN_STEPS_AN_EPOCH = 8


class Shape(NamedTuple):
    """What the memory of a causal language model depends on; widths in values for each token.

    Attributes:
        layers: decoder layers.
        hidden, intermediate: width of the states and of the MLP.
        query, key: all heads' width of the query, and of the key (and the value).
        vocabulary: rows of the head.
        longest: tokens that the positions reach.
        norms: width of all normalised tensors of one layer together.
        linears: (out, in) of every linear layer of the decoder: those that get LoRA.
        parameters: all weights of the model; with tied embeddings the head is not counted twice.
        outside: weights of the embeddings and the head.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    key: int
    vocabulary: int
    longest: int
    norms: int
    linears: tuple[tuple[int, int], ...]
    parameters: int
    outside: int

    @property
    def distinct_inputs(self) -> int:
        """Width of what goes into the linear layers of one layer, each counted once: q/k/v, o, gate/up, down."""
        return 2 * self.hidden + self.query + self.intermediate

    def lora_parameters(self, rank: int, *, dora: bool = False) -> int:
        """Trainable weights: A (rank, in) and B (out, rank) of every linear layer; DoRA adds a magnitude for each output."""
        return sum(rank * (rows + columns) + dora * rows for rows, columns in self.linears)


class Forecast(NamedTuple):
    """The peak of one process, bytes by purpose."""

    weights_bytes: int
    lora_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return sum(self)


class Seen(NamedTuple):
    """What the choices depend on, besides the settings.

    Attributes:
        lengths: tokens of every training row, also of those that will be dropped.
        answer_lengths: tokens of each of them that are learned.
    """

    shape: Shape
    compute: Compute
    memory: Memory
    lengths: Sequence[int]
    answer_lengths: Sequence[int]
    processes: int = 1

    @property
    def on_cpu(self) -> bool:
        """Whether there is no GPU."""
        return bool(self.compute.device.type == "cpu")


class Used(NamedTuple):
    """Lengths of the rows that are used and of their answers, tokens, the longest first."""

    lengths: list[int]
    answers: list[int]

    def worst(self, batch_size: int, packing: bool) -> tuple[int, int]:
        """Tokens and answer tokens of the largest micro-batch that these rows can make; padding included."""
        tokens = sum(self.lengths[:batch_size]) if packing else self.lengths[0] * min(batch_size, len(self.lengths))
        return tokens, sum(self.answers[:batch_size])


class Way(NamedTuple):
    """A way to train, and what it needs; steps and warm-up are not planned yet."""

    plan: Plan
    forecast: Forecast
    tokens: int
    memory: Memory

    @property
    def fits(self) -> bool:
        """Whether it leaves a little memory free."""
        return self.forecast.total_bytes <= USABLE_SHARE * self.memory.free_bytes

    @property
    def gib(self) -> str:
        """What it needs, for people."""
        return gib(self.forecast.total_bytes)


def read_shape(base: Path) -> Shape:
    """The shape of the model in a Hugging Face folder; without weight files, by config.json alone.

    Raises:
        ModelError: config.json is missing, broken or of a model that is no such decoder; a weight file is broken.
    """
    path = base / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        intermediate, vocabulary = config["intermediate_size"], config["vocab_size"]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"config.json can't be read: {error}", where=str(path), fix="fetch the model again") from None
    except KeyError as error:
        raise ModelError(
            f"config.json has no {error}: the model is no decoder of the usual form",
            where=str(path),
            fix="choose another base model, such as a Qwen2.5, Llama or Gemma",
        ) from None
    head_dim = config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    query, key = heads * head_dim, key_heads * head_dim
    tensors = _tensors_of_files(base) or _tensors_of_config(config, query, key)
    inside = {name: shape for name, shape in tensors.items() if ".layers." in name}
    repeats = {"q_norm": heads, "k_norm": key_heads}
    norms = sum(shape[0] * repeats.get(name.split(".")[-2], 1) for name, shape in inside.items() if "norm" in name)
    return Shape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        query=query,
        key=key,
        vocabulary=vocabulary,
        longest=config.get("max_position_embeddings") or 2**31,
        norms=norms // layers,
        linears=tuple((shape[0], shape[1]) for name, shape in inside.items() if len(shape) == 2 and name.endswith(".weight")),
        parameters=sum(math.prod(shape) for shape in tensors.values()),
        outside=sum(math.prod(shape) for name, shape in tensors.items() if name not in inside),
    )


def forecast(shape: Shape, plan: Plan, tokens: int, answer_tokens: int = CHUNK_TOKENS) -> Forecast:
    """The memory that one process needs at its worst micro-batch.

    Args:
        plan: how it will train; its steps and rates don't matter.
        tokens: those of the largest micro-batch, padding included.
        answer_tokens: those of them that are learned.
    """
    value_bytes = _value_bytes(plan)
    lora = shape.lora_parameters(plan.lora_r, dora=plan.use_dora)
    # autocast keeps a copy of the LoRA weights in the compute precision
    lora_bytes = lora * (LORA_BYTES + (value_bytes if value_bytes < 4 else 0))
    return Forecast(
        weights_bytes=_weights_bytes(shape, plan, value_bytes),
        lora_bytes=lora_bytes,
        optimizer_bytes=lora * ADAMW_BYTES,
        activations_bytes=_activations_bytes(shape, plan, tokens),
        logits_bytes=min(answer_tokens, CHUNK_TOKENS) * shape.vocabulary * 4 * LOGITS_COPIES,
        overhead_bytes=LIBRARIES_BYTES[plan.compute.device.type] + _working_bytes(shape, plan, value_bytes),
    )


def forecast_of(base: Path, plan: Plan, lengths: Sequence[int]) -> Forecast:
    """The memory that a plan needs at most, with rows of these lengths in tokens."""
    longest_first = sorted(lengths, reverse=True)
    tokens, _ = Used(longest_first, longest_first).worst(plan.batch_size, plan.packing)
    return forecast(read_shape(base), plan, tokens)


def way_of(plan: Plan, seen: Seen, used: Used) -> Way:
    """What a plan needs with these rows."""
    tokens, answer_tokens = used.worst(plan.batch_size, plan.packing)
    return Way(plan, forecast(seen.shape, plan, tokens, answer_tokens), tokens, seen.memory)


def ways_to_train(settings: TrainSettings, seen: Seen, draft: Plan, used: Used) -> Iterator[Way]:
    """All that may be chosen, in the order in which things are given up: a large batch, no checkpointing, 16 bits, a whole base.

    What is asked for is never given up.
    """
    rows = max(1, min(ROWS_A_STEP, len(used.lengths) // MIN_STEPS_AN_EPOCH))
    asked = settings.gradient_accumulation_steps
    most = max(1, rows // seen.processes // (1 if asked == "auto" else asked))
    sizes: list[int] = [size for size in BATCH_SIZES if size <= most] if settings.batch_size == "auto" else [settings.batch_size]
    checkpointing = [False, True] if settings.gradient_checkpointing == "auto" else [settings.gradient_checkpointing]
    for quantization, sharded in _bases(settings, seen):
        for checkpoints in checkpointing:
            for size in sizes:
                plan = replace(
                    draft,
                    quantization=quantization,
                    sharded=sharded,
                    gradient_checkpointing=checkpoints,
                    batch_size=size,
                    accumulation=max(1, rows // seen.processes // size) if asked == "auto" else asked,
                )
                yield way_of(plan, seen, used)


def _bases(settings: TrainSettings, seen: Seen) -> list[tuple[Quantization, bool]]:
    """The base's quantisation, and whether it is spread over the processes."""
    asked = settings.asked_quantization
    if settings.sharding == "full" and asked in ("nf4", "int8"):
        raise UserError(f"a base in {asked} can't be spread over processes", where="--sharding full", fix="use --quantization none")
    quantizations: list[Quantization] = [asked] if asked != "auto" else ["none"] if seen.on_cpu else ["none", "nf4"]
    whole: list[tuple[Quantization, bool]] = [(quantization, False) for quantization in quantizations]
    if seen.processes == 1 or settings.sharding == "none" or "none" not in quantizations:
        return whole
    return [("none", True)] if settings.sharding == "full" else [*whole, ("none", True)]


def gib(size_bytes: float) -> str:
    """A size for people."""
    return f"{size_bytes / GIB:.1f} GiB"


def _weights_bytes(shape: Shape, plan: Plan, value_bytes: int) -> int:
    linear = sum(rows * columns for rows, columns in shape.linears)
    if plan.quantization != "none":
        bits = NF4_BITS if plan.quantization == "nf4" else 8
        return int(linear * bits / 8) + (shape.parameters - linear) * value_bytes
    if not plan.sharded:
        return shape.parameters * value_bytes
    decoder = (shape.parameters - shape.outside) * value_bytes
    # a share of the decoder, and the layer in use and the next one whole
    return decoder // plan.processes + 2 * decoder // shape.layers + shape.outside * value_bytes


def layer_bytes(shape: Shape, plan: Plan) -> int:
    """What autograd keeps of one layer for each token, without checkpointing."""
    value_bytes, on_cpu = _value_bytes(plan), plan.compute.device.type == "cpu"
    of_each = sum(columns for _, columns in shape.linears) // shape.layers
    inputs = shape.distinct_inputs if plan.precision == "fp32" else of_each
    widths = inputs + 2 * (shape.query + shape.key) + 3 * shape.intermediate + plan.lora_r * len(shape.linears) // shape.layers
    if plan.use_dora:  # the base's and LoRA's output, for the magnitude's gradient
        widths += 2 * sum(rows for rows, _ in shape.linears) // shape.layers
    masks = of_each * (4 if on_cpu else 1) if plan.lora_dropout else 0
    return 4 * shape.norms + value_bytes * widths + masks


def _activations_bytes(shape: Shape, plan: Plan, tokens: int) -> int:
    layer = layer_bytes(shape, plan)
    whole = kept = layer * shape.layers
    if plan.gradient_checkpointing:
        # the inputs of all layers, and one layer at a time; int8 keeps its inputs outside of what is recomputed
        of_a_layer = shape.hidden + (shape.distinct_inputs if plan.quantization == "int8" else 0)
        kept = _value_bytes(plan) * of_a_layer * shape.layers + layer
    backward = 4 * WIDE_COPIES * shape.intermediate
    holes = CPU_HOLES * whole if plan.compute.device.type == "cpu" else GPU_HOLES * kept
    return int(tokens * (kept + backward + holes))


def _value_bytes(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def _working_bytes(shape: Shape, plan: Plan, value_bytes: int) -> int:
    """What is made of one linear layer's weights for a moment."""
    largest = max(rows * columns for rows, columns in shape.linears)
    working = largest * value_bytes if plan.quantization != "none" else 0  # as plain numbers again
    if plan.use_dora:
        # PEFT makes B·A by sending a unit matrix (in, in) through them, and adds it to a copy of the weights, all in fp32
        working += max((4 + value_bytes) * columns**2 + 16 * rows * columns for rows, columns in shape.linears)
    return working


def _tensors_of_files(base: Path) -> dict[str, list[int]]:
    """Name → shape of every tensor, by the headers of the safetensors files; empty without files.

    Format: 8 bytes of length, little-endian, then a JSON object (https://huggingface.co/docs/safetensors).
    """
    tensors: dict[str, list[int]] = {}
    for path in sorted(base.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size - 8:
                    raise ValueError("the header is longer than the file")
                header = json.loads(file.read(length))
            tensors |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError("a weight file is broken: its header can't be read", where=str(path), fix="fetch the model again") from None
    return tensors


def _tensors_of_config(config: Mapping[str, Any], query: int, key: int) -> dict[str, list[int]]:
    """The tensors of a decoder like Llama or Qwen2."""
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layer = {
        "self_attn.q_proj": [query, hidden],
        "self_attn.k_proj": [key, hidden],
        "self_attn.v_proj": [key, hidden],
        "self_attn.o_proj": [hidden, query],
        "mlp.gate_proj": [intermediate, hidden],
        "mlp.up_proj": [intermediate, hidden],
        "mlp.down_proj": [hidden, intermediate],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    tensors = {f"model.layers.{index}.{name}.weight": size for index in range(config["num_hidden_layers"]) for name, size in layer.items()}
    tensors |= {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    return tensors if config.get("tie_word_embeddings") else tensors | {"lm_head.weight": [vocabulary, hidden]}
