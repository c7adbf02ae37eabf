"""The gradient of one update: over several batches, several processes, and batches that count differently."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["accumulate_gradient"]

_RESERVED = {"step", "epoch", "lr", "grad_norm", "loss_scale", "seconds", "examples_per_second"}


def _num_examples(batch: Any) -> int:
    """Return the length of the first tensor in a nested batch, 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for part in parts if (size := _num_examples(part))), 0)


def _read_result(result: Any, batch: Any, device: torch.device) -> tuple[Tensor, Tensor, tuple[str, ...], bool]:
    """Split what ``step`` returned.

    Returns the loss; one row [weight, examples, weight * loss, weight * metric, ...]; the metrics' names; and
    whether ``step`` gave a weight.
    """
    values = dict(result) if isinstance(result, Mapping) else {"loss": result}
    loss = values.pop("loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TypeError(f'step must return a scalar tensor, or a dict with one under "loss"; the loss is {found}')
    if not loss.requires_grad:
        raise ValueError("the loss depends on no trainable parameter; look for requires_grad=False, detach, no_grad")
    if taken := sorted(_RESERVED & values.keys()):
        raise ValueError(f"step returned metrics with names of the log's own columns: {', '.join(taken)}; rename them")
    weighted = "weight" in values
    weight, examples = values.pop("weight", 1), values.pop("examples", None)
    numbers = [weight, _num_examples(batch) if examples is None else examples, loss, *values.values()]
    exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    row = torch.stack([torch.as_tensor(number).detach().to(device, exact).reshape(()) for number in numbers])
    row[2:] *= row[0]
    return loss.reshape(()), row, tuple(values), weighted


def accumulate_gradient(
    step: Any, model: Any, optimizer: Any, group: list[Any], accelerator: Any, clip_norm: float | None
) -> dict[str, float]:
    """Leave the clipped gradient of the mean loss over a group of batches in ``.grad``; return the means.

    The mean is over the batches of all processes, by their weights. With the number of target tokens as weight it is
    the mean over tokens, however they are spread over batches; with weights left out every batch counts the same.
    """
    from accelerate.utils import send_to_device

    optimizer.zero_grad()
    rows: list[Tensor] = []
    kinds: set[tuple[tuple[str, ...], bool]] = set()
    for batch in group:
        # Processes exchange gradients once per update, in the last backward pass.
        final = len(rows) + 1 == len(group)
        with contextlib.nullcontext() if final else accelerator.no_sync(model):
            result = step(model, send_to_device(batch, accelerator.device))
            loss, row, names, weighted = _read_result(result, batch, accelerator.device)
            accelerator.backward((loss * row[0].to(loss.dtype) if weighted else loss) / len(group))
        rows.append(row)
        kinds.add((names, weighted))
        if len(kinds) > 1:
            raise ValueError(f"step must return the same names for every batch; it returned {sorted(kinds)}")
    weight, examples, *sums = accelerator.reduce(torch.stack(rows).sum(0), "sum").tolist()
    if not weight > 0:
        raise ValueError(f"the weights of the batches of one update sum to {weight}; the sum must be positive")
    if weighted:  # so far .grad is the mean of weight * gradient over batches and processes
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(accelerator.num_processes * len(group) / weight)
    # An infinite bound clips nothing; the norm is wanted anyway, as the earliest sign of trouble.
    norm = accelerator.clip_grad_norm_(model.parameters(), math.inf if clip_norm is None else clip_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # split weights have a split norm
    means = dict(zip(("loss", *names), (total / weight for total in sums), strict=True))
    return {**means, "grad_norm": float(norm), "examples": examples}
