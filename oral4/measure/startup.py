"""How long the library takes before it does anything: ``import oral4`` and ``oral4 --help``.

A book that is slow to open is not opened. Both are measured in fresh interpreters, interleaved with one that
does nothing, so that what Python itself needs can be taken off.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from oral4.measure.experiment import Experiment

__all__ = ["EXPERIMENTS", "StartupConfig", "run_startup"]

COMMANDS = {
    "bare": ["-c", "pass"],
    "import": ["-c", "import oral4"],
    "help": ["-m", "oral4.cli", "--help"],
}
COUNT = "import sys; before = set(sys.modules); {}; print(len(set(sys.modules) - before))"


@dataclass(frozen=True, kw_only=True)
class StartupConfig:
    """How often each is started."""

    interpreters: int = 25
    "Fresh interpreters of each kind a seed; their median counts."

    def __post_init__(self) -> None:
        if self.interpreters < 1:
            raise ValueError(f"interpreters={self.interpreters}; at least one of each kind must be started")

    @classmethod
    def smoke(cls) -> StartupConfig:
        """Return a few seconds' worth."""
        return cls(interpreters=3)

    @classmethod
    def mini(cls) -> StartupConfig:
        """Return half a minute's worth."""
        return cls()


def run_startup(config: StartupConfig, seed: int) -> dict[str, float]:
    """Return the median times in seconds and the number of modules that each loads.

    The seed shuffles the order in which the interpreters are started.
    """
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for warmup in (True, *[False] * config.interpreters):
        for name in order.sample(list(COMMANDS), len(COMMANDS)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *COMMANDS[name]], check=True, stdout=subprocess.DEVNULL)
            if not warmup:  # the first start of each may compile bytecode and fills the system's file cache
                seconds[name].append(time.perf_counter() - start)
    # By round: what slows the machine for a while slows both and leaves the difference alone.
    added = [ours - bare for ours, bare in zip(seconds["import"], seconds["bare"], strict=True)]
    return {
        "bare_seconds": statistics.median(seconds["bare"]),
        "import_seconds": statistics.median(added),
        "help_seconds": statistics.median(seconds["help"]),
        "import_modules": _modules("import oral4"),
        "help_modules": _modules("import oral4.cli"),
    }


def _modules(statement: str) -> int:
    """Return how many modules a statement loads into a fresh interpreter."""
    command = [sys.executable, "-c", COUNT.format(statement)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


EXPERIMENTS = (
    Experiment(
        name="library/startup",
        summary="Time of `import oral4` and of `oral4 --help` in fresh interpreters",
        config=StartupConfig,
        run=run_startup,
        units={
            "bare_seconds": "s",
            "import_seconds": "s",
            "help_seconds": "s",
            "import_modules": "modules",
            "help_modules": "modules",
        },
        better={"import_seconds": "lower", "help_seconds": "lower", "import_modules": "lower", "help_modules": "lower"},
        # Times belong to the machine; what causes them is the number of modules. An older typer loads rich as well,
        # three times as many; torch would make it ten times as many.
        tolerance={"import_modules": 0.5, "help_modules": 3.0},
        notes="import_seconds is what `import oral4` takes on top of an interpreter that does nothing (bare_seconds).",
    ),
)
