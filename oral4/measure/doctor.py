"""Is this installation fit to work with? Versions, device, folders, extras, each with the line that puts it right."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import oral4
from oral4 import settings
from oral4.measure import environment

__all__ = ["Finding", "examine"]

ENOUGH_BYTES = 2 * 10**9
"""Free space below which the cache is called small."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    found: str
    state: str = "ok"
    '``"ok"``, ``"absent"`` (optional, and not there) or ``"wrong"``.'
    remedy: str = ""


def examine() -> list[Finding]:
    """Return everything that was looked at, the core first; imports torch."""
    findings = [Finding("python", f"{sys.version.split()[0]}, {sys.platform}"), Finding("oral4", _oral4())]
    needs = _requirements()
    findings += [_package(name, least, "pip install oral4") for name, least in needs.get("", [])]
    findings += [_guarded("device", _device), _guarded("threads", _threads), _guarded("scale", settings.scale)]
    findings += [_cache(), _data()]
    offline = _guarded("downloads", lambda: "off (ORAL4_OFFLINE)" if settings.offline() else "on")
    return [*findings, offline, *(_extra(name, needs) for name in needs if name not in ("", "all"))]


def _guarded(what: str, look: Callable[[], str]) -> Finding:
    """Return what ``look`` says, or the error of a variable or a package that is not in order."""
    try:
        return Finding(what, look())
    except (ValueError, ImportError, OSError) as error:
        return Finding(what, str(error), "wrong")


def _oral4() -> str:
    commit, dirty = environment.commit()
    return oral4.__version__ + (
        "" if commit == "unknown" else f", commit {commit[:7]}{' with changes' if dirty else ''}"
    )


def _device() -> str:
    import torch

    device = settings.device()
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _threads() -> str:
    import torch

    return f"{environment.device_words()}, torch uses {torch.get_num_threads()} threads"


def _cache() -> Finding:
    """Return whether the cache, which need not exist yet, can be written and how much room it has."""
    try:
        folder = settings.cache_dir()
    except ImportError as error:
        return Finding("cache", str(error), "wrong", "pip install oral4")
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "cache", f"{folder} cannot be written: {error.strerror}", "wrong", "set ORAL4_CACHE to a folder of yours"
        )
    free = shutil.disk_usage(existing).free
    if free < ENOUGH_BYTES:
        return Finding(
            "cache", f"{folder}, {free / 1e9:.1f} GB free", "wrong", "make room, or set ORAL4_CACHE elsewhere"
        )
    return Finding("cache", f"{folder}, writable, {free / 1e9:.0f} GB free")


def _data() -> Finding:
    folder = settings.data_dir()
    if folder is None:
        return Finding("own data", "ORAL4_DATA is not set; files are downloaded to the cache")
    if not folder.is_dir() or not os.access(folder, os.R_OK):
        return Finding(
            "own data", f"ORAL4_DATA={folder} is no folder that can be read", "wrong", "correct or unset ORAL4_DATA"
        )
    return Finding("own data", str(folder))


def _requirements() -> dict[str, list[tuple[str, str]]]:
    """Return extra to its packages and their lowest versions, the core under ``""``, as the installed package says."""
    try:
        lines = requires("oral4") or []
    except PackageNotFoundError:
        return {}
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        least = re.search(r">=\s*([\d.]+)", line.partition(";")[0])
        if name and name[0] != "oral4":
            found.setdefault(extra[1] if extra else "", []).append((name[0], least[1] if least else ""))
    return found


def _package(name: str, least: str, remedy: str) -> Finding:
    found = _version(name)
    if found is None:
        return Finding(name, "missing", "wrong", remedy)
    if _below(found, least):
        return Finding(name, f"{found}; {least} or later is needed", "wrong", f"pip install -U {name}")
    return Finding(name, found)


def _extra(extra: str, needs: dict[str, list[tuple[str, str]]]) -> Finding:
    bad = []
    for name, least in needs[extra]:
        found = _version(name)
        if found is None:
            bad.append(name)
        elif _below(found, least):
            bad.append(f"{name}>={least}")
    if bad:
        return Finding(f"[{extra}]", f"without {', '.join(bad)}", "absent", f'pip install "oral4[{extra}]"')
    return Finding(f"[{extra}]", "complete")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _below(found: str, least: str) -> bool:
    """Return whether a version is lower than another, by their numbers; good enough for lower bounds."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]

    return bool(least) and numbers(found) < numbers(least)
