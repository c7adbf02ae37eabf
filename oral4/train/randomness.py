"""Random numbers of a training run: separate streams from one seed, and the state to go on from.

>>> derive_seed(0, "data", 1) != derive_seed(0, "data", 2)
True
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["derive_seed", "determinism", "own_randomness", "random_state", "set_random_state"]


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 64-bit seed for one named purpose, independent for all practical ends of those of other names.

    Parameters
    ----------
    seed : int, >= 0
        The seed of the run.
    *names : str or int >= 0
        What the stream is for, such as ``"data", epoch``.
    """
    key = tuple(zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the global generators of Python, numpy and torch (CPU and ``device``)."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002, transforms of a data set may still use it
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [str(kind), torch.tensor(np.asarray(keys).tolist()), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what happened since :func:`random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(state["device"])


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators for a block; afterwards they are as they were before it."""
    before = random_state(device)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)  # on every device
    try:
        yield
    finally:
        set_random_state(before, device)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """For a block, let torch use deterministic algorithms only; an operation that has none raises RuntimeError."""
    if not wanted:
        yield
        return
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.backends.cudnn.benchmark = before[1]
