"""Settings of a training run, and what it reports at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from oral4.train.launch import PRECISIONS

__all__ = ["RESUMABLE", "FitResult", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of :func:`oral4.train.fit`. A step is one update of the weights.

    Examples
    --------
    >>> TrainConfig(steps=1000, clip_norm=1.0).accumulate
    1
    """

    steps: int | None = None
    "Updates in all. Give this or ``epochs``; with both, the run ends at whichever comes first."
    epochs: int | None = None
    "Passes over the data."
    accumulate: int = 1
    "Batches per update, >= 1. Their gradients are averaged; the last update of an epoch may have fewer."
    clip_norm: float | None = None
    "Largest Euclidean norm of the whole gradient, > 0; a longer gradient is scaled down to it."
    ema_decay: float | None = None
    "In [0, 1): keep ``ema = decay * ema + (1 - decay) * weights``, for evaluation and as the result."
    precision: str = "fp32"
    'Autocast of the model\'s forward pass: "fp32" (none), "bf16", or "fp16" (GPU only, with loss scaling).'
    seed: int = 0
    "Seed of data order, training noise and evaluation noise, >= 0."
    deterministic: bool = False
    "Let torch use deterministic algorithms only; an operation that has none raises an error."
    evaluate_every: int | None = None
    "Updates between evaluations. The end of the run is always evaluated."
    monitor: str | None = None
    "Metric of ``evaluate`` that decides which step is best; its weights are put back at the end."
    mode: str = "min"
    'Whether the monitored metric is better when smaller ("min") or larger ("max").'
    patience: int | None = None
    "Stop after this many evaluations in a row without a better value, >= 1."
    checkpoint_every: int | None = None
    "Updates between checkpoints. A run with a directory always writes one at its end."
    keep: int = 2
    "How many of the newest checkpoints stay, >= 1. Each also carries the best weights so far."
    log_every: int = 10
    "Updates per row of the log; loss and metrics are averaged over them."
    progress: bool = True
    "Show progress on stdout."

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise ValueError("give steps or epochs: without them the run would not end")
        optional = ("steps", "epochs", "evaluate_every", "patience", "checkpoint_every")
        for name in (*optional, "accumulate", "keep", "log_every", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if (value is None and name in optional) or (type(value) is int and value >= least):
                continue
            raise ValueError(f"{name}={value!r}: give a whole number >= {least}{' or None' * (name in optional)}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm!r}: give a finite number > 0, or None for no clipping")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r}: give a number in [0, 1), or None for no averaging")
        choices: dict[str, tuple[Any, ...]] = {
            "precision": tuple(PRECISIONS),
            "mode": ("min", "max"),
            "deterministic": (False, True),
            "progress": (False, True),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(str, allowed))}")
        if self.patience is not None and (self.monitor is None or self.evaluate_every is None):
            raise ValueError("patience needs monitor (a metric of evaluate) and evaluate_every")


RESUMABLE = ("steps", "epochs", "checkpoint_every", "keep", "log_every", "progress")
"""Settings that may differ when a run is resumed: they do not change the weights at any step."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What :func:`oral4.train.fit` did. The trained model is the one that was passed in."""

    step: int
    "Updates made, those before a resume included."
    epoch: int
    "Complete passes over the data."
    stopped: str
    'Why the run ended: "steps", "epochs", "patience" or "callback".'
    weights: str
    'What the model now holds: "best" (of the monitored metric), "ema" or "last".'
    best_step: int | None
    "Step of the best monitored value, or None."
    best_value: float | None
    "That value."
    history: dict[str, list[Any]]
    "The log as columns of one length; None where a row lacks the name."
    seconds: float
    "Wall time of the run, the parts before a resume included."
