"""What the environment decides: how large, on which device, where files lie, with or without network.

Every function looks the variable up when it is called, so a notebook may set ``os.environ`` in its
first cell. An argument always wins over the variable. A value that is not understood is an error.

==============  =======================================  ==============================
variable        values                                   default
==============  =======================================  ==============================
ORAL4_SCALE     smoke, mini, gpu, paper                  mini
ORAL4_DEVICE    any PyTorch device, e.g. cpu or cuda:1   cuda, else mps, else cpu
ORAL4_CACHE     folder for downloaded files              the platform's cache folder
ORAL4_DATA      folder with files already at hand        none
ORAL4_OFFLINE   1 or 0                                   0
ORAL4_RERUN     1 or 0                                   0
==============  =======================================  ==============================
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["SCALES", "cache_dir", "data_dir", "device", "offline", "rerun", "scale"]

SCALES = ("smoke", "mini", "gpu", "paper")
"""Sizes of an experiment: seconds, minutes on two cores, minutes on one GPU, the paper's own setting."""

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def scale(value: str | None = None) -> str:
    """Return the size of the experiments: ``value``, else ``$ORAL4_SCALE``, else ``"mini"``.

    Raises
    ------
    ValueError
        If it is none of ``"smoke"``, ``"mini"``, ``"gpu"``, ``"paper"``.

    Examples
    --------
    >>> scale("smoke")
    'smoke'
    """
    chosen = value if value is not None else (_variable("ORAL4_SCALE") or "mini")
    if chosen not in SCALES:
        origin = "scale" if value is not None else "ORAL4_SCALE"
        raise ValueError(f"{origin}={chosen!r} is unknown; choose one of {', '.join(SCALES)}")
    return chosen


def device(value: str | torch.device | None = None) -> torch.device:
    """Return the device to compute on: ``value``, else ``$ORAL4_DEVICE``, else the fastest present.

    Without a value the order is cuda, mps, cpu.

    Raises
    ------
    ValueError
        If PyTorch does not know such a device, or this machine has none.

    Examples
    --------
    >>> device("cpu")
    device(type='cpu')
    """
    import torch

    origin = "device" if value is not None else "ORAL4_DEVICE"
    wanted = value if value is not None else _variable("ORAL4_DEVICE")
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(wanted)
        # A device may be known to PyTorch and absent here: the error must come now, not hours later.
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]  # PyTorch appends all its backends
        raise ValueError(f"{origin}={str(wanted)!r} cannot be used here: {reason}") from error
    return chosen


def cache_dir() -> Path:
    """Return the folder for downloaded files: ``$ORAL4_CACHE``, else ``oral4`` in the platform's cache folder.

    The folder need not exist yet.
    """
    chosen = _variable("ORAL4_CACHE")
    if chosen is not None:
        return Path(chosen).expanduser().absolute()
    import pooch  # ~0.1 s, hence only here

    return Path(pooch.os_cache("oral4"))


def data_dir() -> Path | None:
    """Return the folder with files already at hand, ``$ORAL4_DATA``, or None.

    The folder is only read. Whether it exists is for the reader to say.
    """
    chosen = _variable("ORAL4_DATA")
    return None if chosen is None else Path(chosen).expanduser().absolute()


def offline(value: bool | None = None) -> bool:
    """Return whether downloads are forbidden: ``value``, else ``$ORAL4_OFFLINE``, else False.

    Examples
    --------
    >>> offline(True)
    True
    """
    return _switch("ORAL4_OFFLINE") if value is None else bool(value)


def rerun() -> bool:
    """Return whether notebooks train everything live instead of reading records: ``$ORAL4_RERUN``, else False."""
    return _switch("ORAL4_RERUN")


def _variable(name: str) -> str | None:
    """Return the variable without surrounding blanks; one that is set to nothing counts as unset."""
    return os.environ.get(name, "").strip() or None


def _switch(name: str) -> bool:
    text = _variable(name)
    if text is None:
        return False
    if text.lower() not in _SWITCH:
        raise ValueError(f"{name}={text!r} is not understood; choose 1 or 0")
    return _SWITCH[text.lower()]
