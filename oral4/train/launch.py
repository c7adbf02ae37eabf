"""Where a training run runs: device, precision and processes, through Hugging Face accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oral4 import settings
from oral4.errors import require

__all__ = ["PRECISIONS", "make_accelerator", "prepared", "require_precision"]

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names of the precisions, and accelerate's."""


def require_precision(precision: str, device: torch.device) -> None:
    """Raise a ValueError with the reason if ``device`` cannot compute well in ``precision``."""
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            'precision="fp16" on a CPU: float16 is slow there and accelerate scales no loss, so small gradients '
            'would become zero. Use "bf16" or "fp32"'
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f'precision="bf16": {name} only emulates bfloat16, slowly. Use "fp16" or "fp32"')


def make_accelerator(precision: str, *, tracker: Any = None, directory: Path | None = None) -> Any:
    """Return an ``accelerate.Accelerator`` for ``$ORAL4_DEVICE`` and for what ``accelerate launch`` set up.

    Parameters
    ----------
    precision : str
        A key of :data:`PRECISIONS`.
    tracker : str or accelerate.tracking.GeneralTracker, optional
        For example ``"tensorboard"``.
    directory : Path, optional
        Where trackers write.

    Raises
    ------
    ValueError
        If the device cannot compute in this precision, or the tracker is unknown or not installed.
    MissingExtra
        Without accelerate.
    """
    accelerate = require("accelerate", "train")
    device = settings.device()
    require_precision(precision, device)
    # Accelerate keeps one state per program and refuses another precision or device later. A notebook trains
    # more than once: a state that does not fit is dropped. That of several launched processes has to stay.
    whole, partial = accelerate.state.AcceleratorState, accelerate.state.PartialState
    if partial._shared_state and partial().num_processes == 1:
        other = whole._shared_state and whole().mixed_precision != PRECISIONS[precision]
        if other or partial().device.type != device.type:
            whole._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=PRECISIONS[precision],
        # The loop averages over batches itself; this keeps an environment variable from dividing once more.
        gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
        log_with=tracker,
        project_dir=directory,
    )
    if tracker is not None and not accelerator.log_with:
        raise ValueError(f"tracker={tracker!r}: its package is not installed; install it or leave tracker out")
    if accelerator.num_processes == 1 and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate says only "cuda"; under a launch it gives each process its own
    return accelerator


@contextmanager
def prepared(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, Any]]:
    """Lend model and optimizer to accelerate for a block, in training mode.

    Accelerate writes its autocast into the model's own ``forward`` and marks the model as prepared. Both are taken
    off at the end, so that the model can be used, copied, and trained again with other settings.
    """
    marks = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in marks if name in model.__dict__}
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:  # a model in training mode may hold parts frozen in evaluation mode: leave them
        model.train()
    try:
        yield accelerator.prepare(model, optimizer)
    finally:
        for name in marks:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        for module, training in modes:
            module.training = training
