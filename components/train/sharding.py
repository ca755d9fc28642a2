"""A base that no single card holds: its layers are cut up among the processes and put together one at a time, as they are needed.

Method: fully sharded data parallel (arXiv 2304.11277), PyTorch's FSDP2. Only the frozen decoder is sharded. The LoRA weights stay
whole in every process, so that training, checkpoints and the adapter are those of unsharded processes; so do the embeddings and
the head, which the chunked loss needs many times in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from components.common.errors import ModelError


def shard_base(model: Any, device: torch.device) -> None:
    """Spread the frozen decoder of a LoRA model over all processes; what stays whole moves to `device`.

    The model may lie in the CPU's memory. Safetensors are mapped there, not copied, so that all processes of a machine share them
    (measured: 511 MiB of weights take 2 MiB of a process's own memory); layer after layer moves, and a share of each stays.

    Raises:
        ModelError: the model has no list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    causal_lm = model.get_base_model()
    decoder = causal_lm.base_model
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ModelError(f"a {type(causal_lm).__name__} has no list of layers that could be spread over cards", fix="use --sharding none")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = set(_whole(model))
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)


def _whole(model: Any) -> Iterator[torch.nn.Parameter]:
    """The parameters that every process keeps whole: LoRA, embeddings and head."""
    causal_lm = model.get_base_model()
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)
    for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        yield from module.parameters()
