"""Embeddings of all processes, with exact gradients; and what the main process alone finds out."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

Found = TypeVar("Found")


def world() -> tuple[int, int]:
    """(the number of this process, how many there are)."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def said_by_main_process(find: Callable[[], Found]) -> Found:
    """What `find` returns in the main process, in all processes, which must all call this."""
    found: list[Any] = [find() if world()[0] == 0 else None]
    if world()[1] > 1:
        broadcast_object_list(found)
    return found[0]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after another, for every process.

    The gradient of a process's own rows is the sum of what all processes' losses say of them. Processes may have
    different numbers of rows. All must call this, and then all go backward, or none.

    Args:
        rows: (B_w, …) of this process, alike in all but the first dimension and in dtype.

    Returns:
        (Σ B_w, …).
    """
    if world()[1] == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank, processes = world()
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(processes)]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(parts, padded)
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        distributed.all_reduce(total)
        return total[ctx.own]


__all__ = ["gather_rows", "said_by_main_process", "world"]
