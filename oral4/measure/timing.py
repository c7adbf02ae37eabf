"""One timer for the whole book: warm-up, several runs, the median; candidates interleaved; peak memory.

>>> timing = timeit(lambda: sum(range(1000)), repeats=3)
>>> len(timing.seconds), timing.best <= timing.median
(3, True)

Work on a GPU is waited for before the clock is read, if the program uses one. Torch is never imported here.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from oral4.errors import OralError
from oral4.measure import environment

__all__ = ["PeakMemory", "Timing", "compare", "peak_memory", "peak_rss", "timeit"]

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, once for each repeat."""

    seconds: tuple[float, ...]
    clock: str
    '``"cpu"``: processor time of all threads of the process; ``"wall"``: time that passed.'

    @property
    def median(self) -> float:
        """Middle of the repeats, which one disturbed run does not move."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """Fastest repeat."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.1 says that half of the repeats lie within about 10 %."""
        if len(self.seconds) < 2 or self.median == 0:
            return 0.0
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / self.median

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "seconds": list(self.seconds),
            "clock": self.clock,
            "median": self.median,
            "best": self.best,
            "spread": self.spread,
        }


def timeit(
    fn: Callable[[], Any],
    *,
    repeats: int = 7,
    warmup: int = 1,
    min_seconds: float = 0.0,
    clock: str = "cpu",
    sync: Any = None,
) -> Timing:
    """Return how long a call of ``fn`` takes.

    Parameters
    ----------
    fn : callable without arguments
    repeats : int, at least 1
    warmup : int, at least 0
        Calls before the first that counts: they fill caches and compile what compiles itself.
    min_seconds : float, from 0 on
        Each repeat calls ``fn`` as often as it takes to last this long and divides by the number. Needed where a
        call is shorter than the clock can tell (a microsecond; on Windows the CPU clock ticks every 16 ms).
    clock : {"cpu", "wall"}
        The CPU clock does not count waiting, neither for other programs nor for a GPU.
    sync : device, optional
        Device to wait for before the clock is read, for example ``"cuda:1"``. Without it, whatever accelerator
        this program has used so far is waited for.

    Raises
    ------
    ValueError
        If an argument is out of range, or the CPU clock shall time a GPU.
    """
    return compare({"": fn}, repeats=repeats, warmup=warmup, min_seconds=min_seconds, clock=clock, sync=sync)[""]


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    *,
    warmup: int = 1,
    min_seconds: float = 0.0,
    clock: str = "cpu",
    sync: Any = None,
) -> dict[str, Timing]:
    """Return name to :class:`Timing` of several calls, measured in turns.

    Each round runs every candidate once, and the next round starts with the next one: what slows the machine for a
    while slows all of them, and none always follows the same. Take the ratio round by round with
    :func:`oral4.measure.intervals.ratio_interval`. The parameters are those of :func:`timeit`.

    Examples
    --------
    >>> times = compare({"short": lambda: sum(range(10)), "long": lambda: sum(range(100_000))}, repeats=3)
    >>> times["short"].median < times["long"].median
    True
    """
    if not candidates:
        raise ValueError("no candidates; give a name and a function for each")
    if repeats < 1 or warmup < 0 or not 0 <= min_seconds < math.inf:
        raise ValueError(
            f"{repeats=}, {warmup=}, {min_seconds=}; allowed are repeats >= 1, warmup >= 0, min_seconds >= 0"
        )
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r} is unknown; choose cpu or wall")
    if clock == "cpu" and sync is not None and not str(sync).startswith("cpu"):
        raise ValueError(f"the cpu clock does not see the work of {sync}; use clock='wall'")
    wait = _waiter(sync)
    names = list(candidates)
    with _no_collection():
        for name in names:
            for _ in range(warmup):
                candidates[name]()
        calls = {name: _calls(candidates[name], min_seconds, CLOCKS[clock], wait) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent = _spend(candidates[name], calls[name], CLOCKS[clock], wait)
                seconds[name].append(spent / calls[name])
    return {name: Timing(tuple(seconds[name]), clock) for name in names}


def _spend(fn: Callable[[], Any], calls: int, now: Callable[[], float], wait: Callable[[], None]) -> float:
    wait()
    start = now()
    for _ in range(calls):
        fn()
    wait()
    return now() - start


def _calls(fn: Callable[[], Any], min_seconds: float, now: Callable[[], float], wait: Callable[[], None]) -> int:
    """Return how many calls last ``min_seconds``."""
    calls = 1
    while min_seconds > 0 and (spent := _spend(fn, calls, now, wait)) < min_seconds:
        # A tenth more than it seems to need; at most tenfold, for the first guess rests on very little.
        calls = max(calls + 1, min(10 * calls, math.ceil(1.1 * calls * min_seconds / max(spent, 1e-9))))
    return calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from running in the midst of one candidate."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _waiter(sync: Any) -> Callable[[], None]:
    """Return a function that waits until the accelerator has done its work."""
    torch = sys.modules.get("torch")
    kind = str(sync).partition(":")[0]
    if sync is None:
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.synchronize
        if torch is not None and torch.backends.mps.is_available():
            return torch.mps.synchronize
        return lambda: None
    if kind == "cpu":
        return lambda: None
    if kind not in ("cuda", "mps"):
        raise ValueError(f"sync={sync!r} is unknown; give a cpu, cuda or mps device")
    if torch is None:
        raise ValueError(f"sync={sync!r}, but torch is not imported: nothing can run there")
    return (lambda: torch.cuda.synchronize(sync)) if kind == "cuda" else torch.mps.synchronize


class PeakMemory(NamedTuple):
    """What a function returned in a fresh interpreter, and the memory it took, in bytes."""

    value: Any
    resident: int
    "Largest resident set of the interpreter, everything it imported included."
    before: int
    "The same just before the call, after the import: the difference is what the call added."
    accelerator: int | None
    "Largest memory of tensors on CUDA devices; None if none was used."


def peak_memory(target: str, /, **kwargs: Any) -> PeakMemory:
    """Call ``module:function`` in a fresh interpreter and return its value and its peak memory.

    A fresh interpreter, because the peak of a process never falls: an earlier run would hide a later, smaller one.

    Parameters
    ----------
    target : str
        ``"package.module:function"``, importable with the ``sys.path`` of this program.
    **kwargs
        Passed to the function. They and its value travel as JSON.

    Raises
    ------
    ValueError
        If ``target`` is not of that form, or an argument cannot be written as JSON.
    OralError
        If the call fails, or the system does not tell the peak (Windows).

    Examples
    --------
    >>> found = peak_memory("statistics:fmean", data=[1, 2, 6])
    >>> found.value, found.before <= found.resident
    (3.0, True)
    """
    module, colon, function = target.partition(":")
    if not (colon and all(part.isidentifier() for part in [*module.split("."), function])):
        raise ValueError(f"{target!r} is not of the form package.module:function")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        try:
            order = json.dumps(
                {"path": sys.path, "module": module, "function": function, "kwargs": kwargs, "answer": str(answer)},
                allow_nan=False,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"an argument of {target} cannot be written as JSON: {error}") from error
        done = subprocess.run(
            [sys.executable, "-c", _CHILD], input=order, capture_output=True, text=True, encoding="utf-8", check=False
        )
        if done.returncode or not answer.exists():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise OralError(f"{target} failed: {lines[-1]}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if found["resident"] is None:
        raise OralError("this system does not tell the peak memory of a process")
    return PeakMemory(**found)


def peak_rss(target: str, /, **kwargs: Any) -> tuple[Any, int]:
    """Return the value and the largest resident set in bytes; see :func:`peak_memory`."""
    found = peak_memory(target, **kwargs)
    return found.value, found.resident


_CHILD = """
import json, sys
order = json.load(sys.stdin)
sys.path[:] = order["path"]
from oral4.measure.timing import _answer
_answer(order)
"""


def _answer(order: Mapping[str, Any]) -> None:
    """Carry out the order of :func:`peak_memory` in the fresh interpreter."""
    function = getattr(importlib.import_module(order["module"]), order["function"])
    before = environment.peak_resident_bytes()
    value = function(**order["kwargs"])
    found = {
        "resident": environment.peak_resident_bytes(),
        "before": before,
        "accelerator": environment.peak_accelerator_bytes(),
    }
    text = json.dumps({"value": value, **found}, allow_nan=False)
    Path(order["answer"]).write_text(text, encoding="utf-8")
