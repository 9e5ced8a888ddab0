"""A batch of any size in the memory of a part of it, with the gradients of the whole (GradCache, Gao et al., 2021).

1. Every mini-batch is encoded without a graph, and its embeddings are kept.
2. The loss of the whole batch gives the gradient of each embedding.
3. Going backward, every mini-batch is encoded again, now with a graph, and its embeddings' gradients go through it.

The third step happens inside `loss.backward()`: whatever scales the loss (a gradient scaler, accumulation, the number
of processes) scales all gradients alike, the temperature's included, and a trainer need not know of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

MiniBatch = TypeVar("MiniBatch")


class EncodedRows(NamedTuple):
    """What a mini-batch is encoded to.

    Attributes:
        rows: (B, E) float, all that the loss reads of its notes.
        logit_scale: scalar, the same for every mini-batch.
    """

    rows: Tensor
    logit_scale: Tensor


def cached_loss(
    encode: Callable[[MiniBatch], EncodedRows],
    mini_batches: Sequence[MiniBatch],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    passes: int | None = None,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """The loss of a batch whose `backward` encodes one mini-batch at a time.

    Dropout is the same both times: the random state of the first encoding is restored for the second.

    Args:
        encode: encodes a mini-batch; called twice for each.
        mini_batches: the parts of the batch.
        loss_of: rows (B, E) of the whole batch in order, logit_scale ─► scalar loss.
        passes: how many mini-batches are encoded, at least those there are; the last is repeated for nothing, where
            processes with fewer must take part in what others do (a forward pass under FSDP is such a thing).
        no_sync: a context in which gradients are not yet shared between processes, for all but the last mini-batch.

    Returns:
        The loss, a scalar.
    """
    turns = [*mini_batches, *[mini_batches[-1]] * ((passes or 0) - len(mini_batches))]
    states: list[_RandomState] = []
    parts: list[Tensor] = []
    scale = torch.ones(())
    with torch.no_grad():
        for mini_batch in turns:
            states.append(_RandomState())
            part, scale = encode(mini_batch)
            parts.append(part)
    sizes = [len(part) for part in parts]
    rows = torch.cat(parts[: len(mini_batches)]).requires_grad_()
    scale = scale.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(rows, scale)
    if not torch.is_grad_enabled():
        return loss.detach()
    rows_grad, scale_grad = torch.autograd.grad(loss, (rows, scale))
    # Repeated mini-batches get no gradient.
    rows_grad = torch.cat([rows_grad, rows_grad.new_zeros(sum(sizes) - len(rows), rows.shape[1])])

    def backward(factor: Tensor) -> None:
        for turn, (mini_batch, grad) in enumerate(zip(turns, rows_grad.split(sizes), strict=True)):
            is_last = turn == len(turns) - 1
            with nullcontext() if is_last else no_sync(), torch.enable_grad():
                with states[turn].restored():
                    again, scale_again = encode(mini_batch)
                objective = (again * (grad * factor)).sum()
                if is_last:
                    objective = objective + scale_again * (scale_grad * factor)
                objective.backward()

    result: Tensor = _LossWithBackward.apply(torch.zeros((), requires_grad=True), loss.detach(), backward)
    return result


class _LossWithBackward(torch.autograd.Function):
    """A number whose backward pass is a function of its gradient; `_leaf` is there to have one at all."""

    @staticmethod
    def forward(ctx: Any, _leaf: Tensor, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.backward_of = backward
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.backward_of(grad)
        return None, None, None


class _RandomState:
    """The random state of the processor and of the accelerator in use."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.get_device_module().get_rng_state() if torch.accelerator.is_available() else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """This state within the context, the present one again after it."""
        device = torch.accelerator.current_accelerator() if self.accelerator is not None else None
        devices = [] if device is None else [torch.accelerator.current_device_index()]
        with torch.random.fork_rng(devices, device_type="cuda" if device is None else device.type):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.get_device_module().set_rng_state(self.accelerator)
            yield


__all__ = ["EncodedRows", "cached_loss"]
