"""What a clipped gradient costs on a GPU, at the published sizes of the paper's models: time, and how many texts fit.

>>> gpu_case("gpt2", 1024, tokens=8192).batch
8
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from oral4.dp.speed import METHODS, Case, Step, build, draw_ids, times
from oral4.measure.timing import Timing

__all__ = ["GPU_COST_UNITS", "GPU_LENGTHS", "GPU_MODELS", "GpuCostConfig", "gpu_case", "largest_batch", "run_gpu_cost"]

GPU_MODELS = {
    "tiny": Case("tiny", 1, 16, 2, 64, 0, 0, tied=True),
    "gpt2": Case("gpt2", 12, 768, 12, 50257, 0, 0, tied=True),
    "gpt2_medium": Case("gpt2_medium", 24, 1024, 16, 50257, 0, 0, tied=True),
    "gpt2_large": Case("gpt2_large", 36, 1280, 20, 50257, 0, 0, tied=True),
    "roberta_large": Case("roberta_large", 24, 1024, 16, 50265, 0, 0, kind="roberta"),
}
"A tiny model for tests, and published sizes of the paper's models. That RoBERTa ends at 512 positions; here it has as many as are asked for."

GPU_LENGTHS = (100, 256, 1024)
"Tokens of a text."


def gpu_case(model: str, length: int, *, tokens: int, half: bool = True) -> Case:
    """Return a model of `GPU_MODELS` with texts of a length, as many as have so many tokens together.

    Examples
    --------
    >>> gpu_case("roberta_large", 256, tokens=32768).batch
    128
    """
    if model not in GPU_MODELS:
        raise ValueError(f"{model!r} is unknown; give one of {', '.join(GPU_MODELS)}")
    if not 2 <= length <= tokens:
        raise ValueError(f"{length=}: give 2 to {tokens=}")
    return replace(GPU_MODELS[model], batch=tokens // length, length=length, half=half)


def largest_batch(case: Case, method: str, *, limit: int, device: str = "cuda") -> int:
    """Return how many texts at a time fit into the memory of a GPU, by trying; 0 if not even one does.

    Two gradients in a row must fit, so that the second finds those of the first. Found to two parts in a hundred.

    Parameters
    ----------
    case : Case
        Its batch size does not matter.
    method : str
        Of `METHODS`.
    limit : int
        Bytes, as if the GPU had no more; the model's weights and gradients are in them.
    device : str
    """
    gc.collect()  # models of former calls: hooks tie them into rings
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        step = METHODS[method](*build(replace(case, batch=1), device=device))
        return _largest_that_fits(lambda batch: _peak(step, draw_ids(case, batch, device=device)), limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _peak(step: Step, ids: Tensor) -> int | None:
    """Return the most bytes that two gradients in a row took, or None if there was no room for them."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(ids.device)
    try:
        step(ids)
        step(ids)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated(ids.device)


def _largest_that_fits(peak: Callable[[int], int | None], limit: int) -> int:
    """Return the largest number whose peak is not None, to two parts in a hundred; peaks grow linearly, about."""
    known: dict[int, int] = {}
    fits, fails = 0, None
    guess = 1
    while fails is None or fails - fits > max(1, fits // 50):
        found = peak(guess)
        if found is None:
            fails = guess
        else:
            fits, known[guess] = guess, found
        if fails == 1:
            return 0
        if len(known) < 2:
            guess = 2 * guess if fails is None else (fits + fails) // 2
            continue
        (first, low), (second, high) = sorted(known.items())[-2:]
        slope = max(1.0, (high - low) / (second - first))
        aim = int(second + (limit - high) / slope)
        ceiling = 8 * fits if fails is None else fails - 1
        guess = min(max(aim, fits + max(1, fits // 50)), ceiling)
        if fails is not None and aim >= fails:  # the line says too much, as where memory is in pieces
            guess = (fits + fails) // 2
    return fits


# ------------------------------------------------------------------------------------------------------ the experiment


@dataclass(frozen=True, kw_only=True)
class GpuCostConfig:
    """Which models, at which lengths, and how often."""

    models: tuple[str, ...] = ("gpt2", "gpt2_medium", "gpt2_large", "roberta_large")
    "Of `GPU_MODELS`."
    lengths: tuple[int, ...] = GPU_LENGTHS
    "Tokens of a text."
    tokens: tuple[int, ...] = (32768, 16384, 8192, 32768)
    """Tokens of a batch, for each model: about as many as 80 GB hold. With fewer, Python takes longer to say what a GPU
    shall do than the GPU takes to do it."""
    repeats: int = 2
    "Rounds of a seed."
    half: bool = True
    "Autocast to bfloat16; otherwise float32 whose products may be rounded to TensorFloat32."
    peer_length: int = 256
    "The two passes of the paper are timed at this length only, on half as many tokens."
    memory: float = 16.0
    "GiB for the largest batch, as if the GPU had no more; 0: it is not looked for."
    device: str = "cuda"

    @classmethod
    def smoke(cls) -> GpuCostConfig:
        """Take a tiny model on the CPU: seconds."""
        return cls(models=("tiny",), lengths=(8,), tokens=(32,), peer_length=8, half=False, memory=0.0, device="cpu")

    @classmethod
    def mini(cls) -> GpuCostConfig:
        """Take the smallest model and a few texts, on the CPU: minutes."""
        return cls(
            models=("gpt2",), lengths=(100,), tokens=(400,), peer_length=100, half=False, memory=0.0, device="cpu"
        )

    @classmethod
    def gpu(cls) -> GpuCostConfig:
        """Take all models at all lengths: about two minutes on an H100."""
        return cls()


GPU_COST_UNITS = {
    "model": "", "length": "", "texts": "", "seconds": "s", "time": "", "worst_time": "", "mean_time": "",
    "peer_time": "", "least_peer_time": "", "texts_that_fit": "", "ordinary_texts_that_fit": "", "room": "", "least_room": "",
}  # fmt: skip
"""Lists have an entry for each model and length, the length running fastest; those of peers one for each model. Where no
memory is measured, its entries are -1."""


def _ratio(own: Timing, plain: Timing) -> float:
    return statistics.median(a / b for a, b in zip(own.seconds, plain.seconds, strict=True))


@lru_cache(maxsize=64)
def _fits(case: Case, method: str, limit: int, device: str) -> int:
    """Return `largest_batch`, looked for once for all seeds: nothing in it is random."""
    return largest_batch(case, method, limit=limit, device=device)


def run_gpu_cost(config: GpuCostConfig, seed: int) -> dict[str, Any]:
    """Time clipped gradients beside ordinary ones, and find the largest batches. A seed is a repetition: nothing is drawn.

    ``time`` is relative to the ordinary gradient of the same round, ``room`` is the share of its largest batch that still
    fits with clipping.

    Raises
    ------
    RuntimeError
        If the GPU that is asked for is not there.
    """
    del seed
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here: scale gpu needs one; mini runs on a CPU")
    if len(config.models) != len(config.tokens):
        raise ValueError(f"models={config.models}, tokens={config.tokens}; give as many tokens of a batch as models")
    found: dict[str, Any] = {name: [] for name in GPU_COST_UNITS}
    before = torch.get_float32_matmul_precision()
    try:
        if config.device == "cuda" and not config.half:
            torch.set_float32_matmul_precision("high")
        for number, (model, tokens) in enumerate(zip(config.models, config.tokens, strict=True)):
            for length in config.lengths:
                case = gpu_case(model, length, tokens=tokens, half=config.half)
                timed = _timed(case, "ours", config)
                found["model"].append(float(number))
                found["length"].append(float(length))
                found["texts"].append(float(case.batch))
                found["seconds"].append(timed["non-private"].median)
                found["time"].append(_ratio(timed["ours"], timed["non-private"]))
                limit = int(config.memory * 2**30)
                fits = [
                    _fits(case, method, limit, config.device) if limit else -1 for method in ("ours", "non-private")
                ]
                found["texts_that_fit"].append(float(fits[0]))
                found["ordinary_texts_that_fit"].append(float(fits[1]))
                found["room"].append(fits[0] / fits[1] if limit else -1.0)
            half = gpu_case(model, config.peer_length, tokens=max(config.peer_length, tokens // 2), half=config.half)
            timed = _timed(half, "official-two-pass", config)
            found["peer_time"].append(_ratio(timed["official-two-pass"], timed["non-private"]))
    finally:
        torch.set_float32_matmul_precision(before)
    found["worst_time"], found["mean_time"] = (
        max(found["time"]),
        math.exp(statistics.fmean(map(math.log, found["time"]))),
    )
    found["least_peer_time"], found["least_room"] = min(found["peer_time"]), min(found["room"])
    return found


def _timed(case: Case, method: str, config: GpuCostConfig) -> dict[str, Timing]:
    if config.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return times(case, ("non-private", method), repeats=config.repeats, device=config.device)
