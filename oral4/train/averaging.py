"""Averaged weights (an exponential moving average, EMA) and the moment in which a model wears them.

>>> model = nn.Linear(1, 1)
>>> ema = start_ema(model)
>>> with evaluating(model, ema):
...     model.training
False
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ["copy_weights", "evaluating", "start_ema", "update_ema"]


def start_ema(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the trainable parameters, in float32 or better: small changes are lost in half precision."""
    return {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move each average a step of size ``1 - decay`` towards the model's parameter, in place."""
    parameters = dict(model.named_parameters())
    for name, average in ema.items():
        average.lerp_(parameters[name].detach().to(average.dtype), 1 - decay)


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Write values into the model's parameters of these names."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


@contextlib.contextmanager
def evaluating(model: nn.Module, ema: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """For a block: no gradients, evaluation mode, and averaged weights if there are any."""
    ema = ema or {}
    modes = [(module, module.training) for module in model.modules()]
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if name in ema}
    try:
        copy_weights(ema, model)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        copy_weights(kept, model)
        for module, training in modes:
            module.training = training
