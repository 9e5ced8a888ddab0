"""NaN and infinity end a run before they reach a weight or a checkpoint.

`transformers.Trainer` leaves a loss that is NaN out of its logs, clips gradients by a norm that is NaN, which makes all
of them NaN, and goes on; half a day later the checkpoints hold nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

from modeling_notellm2 import NonFiniteError
from train.distributed import world

REMEDY = "lower the learning rates, use bf16 in place of fp16, or look at the weights that the run began with"


@contextmanager
def refused_by_all(device: torch.device) -> Iterator[None]:
    """Where one process raises NonFiniteError inside, all do, after it: a process alone would leave the others waiting
    for it. All must come here, equally often; it costs one integer that is summed up.

    Args:
        device: what the processes talk to each other by.
    """
    own: NonFiniteError | None = None
    try:
        yield
    except NonFiniteError as error:
        own = error
    if world()[1] > 1:
        broken = torch.tensor(int(own is not None), device=device)
        distributed.all_reduce(broken)
        if bool(broken) and own is None:
            own = _told_by_another(None)
        elif own is not None:
            _told_by_another(str(own))
    if own is not None:
        raise own


def _told_by_another(message: str | None) -> NonFiniteError:
    """What the first process found that found something. All must call this."""
    found: list[str | None] = [None] * world()[1]
    distributed.all_gather_object(found, message)
    rank, said = next((rank, said) for rank, said in enumerate(found) if said is not None)
    return NonFiniteError(f"{said} (Process {rank} found it.)")


def refuse_non_finite_loss(loss: Tensor, parts: Mapping[str, Tensor], place: str) -> None:
    """Raises NonFiniteError for a loss that is NaN or infinite.

    Args:
        loss: scalar.
        parts: what the message shows beside it.
        place: where in the run, as "step 7".
    """
    if not bool(loss.isfinite()):
        shown = "".join(f", {name} {float(value):.4g}" for name, value in parts.items())
        raise NonFiniteError(
            f"{place}: the loss is {float(loss)}{shown}. No weight has been changed by it: {REMEDY}, and go on from "
            "the last checkpoint."
        )


def refuse_non_finite_gradients(parameters: Iterable[tuple[str, nn.Parameter]], place: str) -> None:
    """Raises NonFiniteError where the norm of all gradients, by which they are clipped, is NaN or infinite.

    Args:
        parameters: names and parameters; those without a gradient are left out.
        place: where in the run, as "step 7".
    """
    gradients = {name: _local(parameter.grad) for name, parameter in parameters if parameter.grad is not None}
    if bool(nn.utils.get_total_norm(gradients.values()).isfinite()):
        return
    broken = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    found = f"{len(broken)} are not finite, that of {broken[0]} first" if broken else "their norm overflows"
    raise NonFiniteError(
        f"{place}: of {len(gradients)} gradients {found}. No weight has been changed by them: {REMEDY}, and go on from "
        "the last checkpoint."
    )


def refuse_non_finite_weights(parameters: Iterable[tuple[str, nn.Parameter]], place: str) -> None:
    """Raises NonFiniteError for a weight that is NaN or infinite.

    Args:
        parameters: names and parameters.
        place: where in the run, as "step 7".
    """
    broken = [name for name, parameter in parameters if not bool(_local(parameter.detach()).isfinite().all())]
    if broken:
        raise NonFiniteError(
            f"{place}: {len(broken)} weights are not finite, {broken[0]} first. They are not saved: {REMEDY}."
        )


def _local(values: Tensor) -> Tensor:
    """Of a tensor that FSDP has sharded, this process's part."""
    part: Tensor = values.to_local() if hasattr(values, "to_local") else values
    return part


__all__ = [
    "refuse_non_finite_gradients",
    "refuse_non_finite_loss",
    "refuse_non_finite_weights",
    "refused_by_all",
]
