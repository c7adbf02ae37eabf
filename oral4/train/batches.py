"""The order of the data: which process trains on which batch, the same whenever an epoch is gone through again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from oral4.train.config import TrainConfig
from oral4.train.randomness import derive_seed

__all__ = ["epoch_batches", "num_updates"]


def epoch_batches(batches: Any, epoch: int, seed: int, accelerator: Any) -> Iterator[Any]:
    """Yield this process's batches of one epoch; the same ones in the same order whenever it is called."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "data", epoch))
    if isinstance(batches, DataLoader):
        owners: list[Any] = [batches, batches.sampler, batches.batch_sampler]
        owners.append(getattr(batches.batch_sampler, "sampler", None))  # of a batch sampler of the caller's own
        for owner in owners:
            if hasattr(owner, "generator"):
                owner.generator = generator
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
    iterator = iter(batches(epoch, generator) if callable(batches) else batches)
    # An incomplete round is dropped: every process must take part in every update.
    while len(turn := list(islice(iterator, accelerator.num_processes))) == accelerator.num_processes:
        yield turn[accelerator.process_index]


def num_updates(batches: Any, config: TrainConfig, num_processes: int) -> int | None:
    """Return the updates of the whole run, None where the length of an epoch is not known."""
    limits = [] if config.steps is None else [config.steps]
    if config.epochs is not None:
        with contextlib.suppress(TypeError):  # a function, or a loader over a stream, has no length
            limits.append(config.epochs * math.ceil(len(batches) // num_processes / config.accumulate))
    return min(limits, default=None)
