"""What a measurement ran on: processor or GPU, cores, versions, commit, peak memory.

Nothing here imports torch; what torch knows is asked only if the program has imported it already.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import oral4

__all__ = ["checkout", "commit", "device_words", "peak_accelerator_bytes", "peak_resident_bytes", "versions"]


def device_words() -> str:
    """Return the hardware in words, for example ``"AMD EPYC, 2 of 2 cores"``.

    A GPU is named only if this process has put something on it: a machine may own one that the
    measurement never touched.
    """
    torch = sys.modules.get("torch")
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    used = min(torch.get_num_threads(), usable) if torch is not None else usable
    words = f"{_processor()}, {used} of {total} core{'s' if total > 1 else ''}"
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.get_device_name()}; {words}"
    if torch is not None and torch.backends.mps.is_available() and torch.mps.driver_allocated_memory() > 0:
        return f"Apple GPU; {words}"
    return words


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown processor"


def versions(packages: Iterable[str] = ("torch", "numpy")) -> dict[str, str]:
    """Return the versions of Python, oral4 and the installed ones of ``packages``, without importing them."""
    found = {"python": platform.python_version(), "oral4": oral4.__version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # absent from the answer, as documented
    return found


def checkout() -> Path | None:
    """Return the root of the repository that this package runs from, or None for an installed copy.

    A copy that lies in some other repository (a virtual environment inside it, say) is not a checkout.
    """
    package = Path(oral4.__file__).resolve().parent
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent:
        return None
    return package.parent if _git("ls-files", "--error-unmatch", "oral4/__init__.py") is not None else None


def commit() -> tuple[str, bool]:
    """Return the commit of the checkout and whether its library differs from it; ``("unknown", False)`` outside one.

    Records and weights do not count as a difference: an experiment that writes several would soil itself.
    """
    if checkout() is None:
        return "unknown", False
    changes = _git("status", "--porcelain", "--", "oral4", ":(exclude)oral4/records", ":(exclude)oral4/weights")
    return _git("rev-parse", "HEAD") or "unknown", bool(changes)


def _git(*arguments: str) -> str | None:
    """Return what git prints, or None where there is no git, no repository or no such thing."""
    package = Path(oral4.__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(package.parent), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def peak_resident_bytes() -> int | None:
    """Return the largest resident set of this process so far in bytes, or None where the system does not say.

    On Linux from ``/proc``: ``getrusage`` there hands a child the peak of the parent that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def peak_accelerator_bytes() -> int | None:
    """Return the largest memory of this process's tensors on CUDA devices in bytes, None if none was used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
