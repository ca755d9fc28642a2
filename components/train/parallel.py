"""Several processes that train one model: each computes its share of a step's micro-batches, and the gradients are summed.

The base is frozen and only the LoRA weights have gradients, tens of megabytes: one sum at the end of a step is all that travels, and
the result is that of one process with the same effective batch. What decides how a run goes on (a loss, a signal, a checkpoint) is
made common first, so that no process waits for another that has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from components.train.batches import deal
from components.train.rows import Example

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")


class Processes(NamedTuple):
    """This process among those that train together.

    Attributes:
        sharded: the base is cut up among the processes, so that a pass through it is a meeting of all of them.
    """

    rank: int
    world_size: int
    device: Any
    sharded: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator, *, sharded: bool = False) -> Processes:
        """As accelerate found them."""
        return cls(accelerator.process_index, accelerator.num_processes, accelerator.device, sharded)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks, writes and saves."""
        return self.rank == 0

    def share(self, rows: Sequence[Example]) -> list[Example]:
        """The rows of a step that this process computes: about as many tokens as every other one."""
        return [*deal(rows, self.world_size), *([] for _ in range(self.world_size))][self.rank]

    def sum(self, value: float) -> float:
        """The sum of every process's value."""
        return self._together(value, torch.distributed.ReduceOp.SUM) if self.world_size > 1 else value

    def max(self, value: float) -> float:
        """The largest of the processes' values."""
        return self._together(value, torch.distributed.ReduceOp.MAX) if self.world_size > 1 else value

    def of_main(self, value: Value) -> Value:
        """The main process's value, given to every process."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def sum_gradients(self, model: Any) -> None:
        """Give every process the sum of all processes' gradients, in one message."""
        if self.world_size == 1:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)

    def _together(self, value: float, how: Any) -> float:
        common = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(common, how)
        return float(common)


ALONE = Processes(0, 1, "cpu")
