"""Caps on what comes from outside: sound, tables, text, molecules, images, archives.

A file of three hours or a table of a billion cells should be refused in a millisecond with a
sentence, not end the session. Each check raises :class:`~oral4.errors.DataError` with the value, the
limit and the setting that raises it, and returns what it has learnt. Nothing is cut or repaired.

The defaults are generous for two cores and a few gigabytes. To raise one, pass your own limits:

>>> check_image_size(8_000, 8_000, limits=Limits(image_pixels=100_000_000))
64000000
>>> check_image_size(8_000, 8_000)
Traceback (most recent call last):
    ...
oral4.errors.DataError: image: 64000000 pixels, the limit is 50000000; raise it with limits=Limits(image_pixels=...)
"""

from __future__ import annotations

import math
import re
import stat
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from oral4.errors import DataError

__all__ = [
    "DEFAULT", "Audio", "Limits", "check_archive", "check_audio", "check_image_size", "check_smiles",
    "check_table_size", "check_text",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The caps; every one is a positive number. ``Limits(audio_seconds=7200)`` keeps all others at their default."""

    audio_seconds: float = 600.0
    """Longest sound, seconds."""
    audio_samples: int = 30_000_000
    """Most samples over all channels."""
    audio_channels: int = 8
    """Most channels."""
    audio_lowest_rate_hz: float = 4_000
    """Lowest sampling rate."""
    audio_highest_rate_hz: float = 192_000
    """Highest sampling rate."""
    audio_silence_peak: float = 1e-4
    """A sound whose largest magnitude is below this share of full scale (-80 dB) is flagged as silent."""
    table_bytes: int = 200_000_000
    """Largest table file."""
    table_rows: int = 5_000_000
    """Most rows."""
    table_columns: int = 10_000
    """Most columns."""
    table_cells: int = 50_000_000
    """Most rows times columns."""
    text_characters: int = 1_000_000
    """Longest text."""
    text_tokens: int = 8_192
    """Longest text in tokens."""
    smiles_characters: int = 1_000
    """Longest SMILES string."""
    smiles_heavy_atoms: int = 128
    """Most atoms other than hydrogen."""
    smiles_fragments: int = 1
    """Most separate fragments, that is parts between dots."""
    image_pixels: int = 50_000_000
    """Most pixels, width times height."""
    archive_members: int = 50_000
    """Most members of an archive."""
    archive_bytes: int = 4_000_000_000
    """Largest total size once unpacked."""
    archive_ratio: float = 200.0
    """Largest ratio of the unpacked size to the size of the archive."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"Limits.{field.name}={value!r}: a positive number is needed")
        if self.audio_lowest_rate_hz > self.audio_highest_rate_hz:
            raise ValueError(
                f"Limits.audio_lowest_rate_hz={self.audio_lowest_rate_hz} is above "
                f"audio_highest_rate_hz={self.audio_highest_rate_hz}"
            )

    def cap(self, what: str, value: float, unit: str, setting: str) -> None:
        """Raise ``DataError`` if ``value`` is above the limit named ``setting``."""
        limit = getattr(self, setting)
        if value > limit:
            message = f"{what}: {value:.15g} {unit}, the limit is {limit:.15g}"
            raise DataError(f"{message}; raise it with limits=Limits({setting}=...)")


DEFAULT = Limits()
"""The limits that hold unless others are passed."""


@dataclass(frozen=True)
class Audio:
    """What :func:`check_audio` has measured."""

    num_channels: int
    num_samples: int
    """Samples of one channel."""
    seconds: float
    peak: float
    """Largest magnitude; 1 is full scale."""
    is_silent: bool


def check_audio(wave: Any, rate: float, *, limits: Limits = DEFAULT) -> Audio:
    """Check a sound before anything is computed from it.

    Parameters
    ----------
    wave : array of float or int, shape (L,) or (C, L)
        Samples. Floats have full scale 1, integers the largest value of their type.
    rate : float
        Sampling rate, Hz.
    limits : Limits
        The caps.

    Returns
    -------
    Audio
        Length, peak and whether the sound is silent. What to do with silence is for the caller to decide.

    Raises
    ------
    DataError
        If the sound is empty, holds NaN or infinity, or is over a limit.
    TypeError
        If ``wave`` is not an array of real numbers or ``rate`` is not a number.

    Examples
    --------
    >>> check_audio(np.zeros(16_000), 16_000).is_silent
    True
    """
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise TypeError(f"rate={rate!r}: a number of samples per second is needed")
    wave = np.asarray(wave)
    if wave.dtype.kind not in "fiu":
        raise TypeError(f"audio of dtype {wave.dtype}: real floats or integers are needed")
    if wave.ndim not in (1, 2) or wave.size == 0:
        raise DataError(f"audio of shape {wave.shape}: (samples,) or (channels, samples), not empty, is needed")
    if not limits.audio_lowest_rate_hz <= rate <= limits.audio_highest_rate_hz:  # NaN ends here too
        raise DataError(
            f"audio: {rate} Hz is outside {limits.audio_lowest_rate_hz} to {limits.audio_highest_rate_hz}; resample, "
            "or pass limits=Limits(audio_lowest_rate_hz=..., audio_highest_rate_hz=...)"
        )
    num_channels, num_samples = (1, *wave.shape)[-2:]
    if num_channels > limits.audio_channels and num_samples <= limits.audio_channels:
        raise DataError(f"audio of shape {wave.shape} looks transposed; pass (channels, samples), that is wave.T")
    seconds = num_samples / float(rate)
    limits.cap("audio", num_channels, "channels", "audio_channels")
    limits.cap("audio", seconds, "seconds", "audio_seconds")
    limits.cap("audio", wave.size, "samples over all channels", "audio_samples")
    # The largest and the smallest sample carry NaN and infinity with them: no array of the input's size is made.
    extremes = np.array([wave.max(), wave.min()], dtype=np.float64)
    if not np.isfinite(extremes).all():
        bad = np.argwhere(~np.isfinite(wave))
        raise DataError(f"audio: {len(bad)} samples are NaN or infinite, the first at index {tuple(bad[0].tolist())}")
    if wave.dtype.kind != "f":
        info = np.iinfo(wave.dtype)
        middle = 0 if wave.dtype.kind == "i" else (info.max + 1) // 2  # unsigned sound rests at mid-scale
        extremes = (extremes - middle) / (info.max - middle)
    peak = float(np.abs(extremes).max())
    return Audio(num_channels, num_samples, seconds, peak, peak < limits.audio_silence_peak)


def check_table_size(table: str | PathLike[str] | Any, *, limits: Limits = DEFAULT) -> tuple[int, int]:
    """Return the rows and columns of anything that has a ``shape``, or upper bounds of them for a CSV file.

    Of a file the size is looked at first. Then line ends are counted, and commas, semicolons or tabs in
    the first line; no value is parsed, so marks inside quotes count too. Compressed files are refused
    because their size says nothing.

    Parameters
    ----------
    table : path, DataFrame or array
        A text file, or an object with a shape of one or two entries.
    limits : Limits
        The caps.

    Raises
    ------
    DataError
        If there is no such plain file, it is empty, compressed or over a limit.

    Examples
    --------
    >>> check_table_size(np.zeros((3, 2)))
    (3, 2)
    """
    if isinstance(table, str | PathLike):
        what = f"table {table}"
        rows, columns = _csv_size(Path(table), what, limits)
    elif len(shape := getattr(table, "shape", ())) in (1, 2):
        what = "table"
        rows, columns = (int(n) for n in (*shape, 1)[:2])
    else:
        raise TypeError(f"table of type {type(table).__name__}: a path, or an array or frame of 1 or 2 axes, is needed")
    limits.cap(what, columns, "columns", "table_columns")
    limits.cap(what, rows, "rows", "table_rows")
    limits.cap(what, rows * columns, "cells", "table_cells")
    return rows, columns


def _csv_size(path: Path, what: str, limits: Limits) -> tuple[int, int]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device or a pipe would never end
            raise DataError(f"{what}: not a plain file")
        limits.cap(what, status.st_size, "bytes", "table_bytes")
        with path.open("rb") as file:
            head = file.readline()
            rows, last = 0, b"\n"
            while block := file.read(1 << 20):
                rows, last = rows + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise DataError(f"{what}: cannot be read: {error.strerror}") from error
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"{what}: it is compressed; unpack it first")
    if not head.strip():
        raise DataError(f"{what}: its first line is empty; the names of the columns are needed there")
    return rows + (last != b"\n"), 1 + max(head.count(mark) for mark in (b",", b";", b"\t"))


def check_text(text: str, *, num_tokens: int | None = None, limits: Limits = DEFAULT) -> int:
    """Return the number of characters.

    Parameters
    ----------
    text : str
        Any text that can be written as UTF-8; it may be empty.
    num_tokens : int, optional
        Its length in tokens, where the caller has counted them.
    limits : Limits
        The caps.

    Raises
    ------
    DataError
        If the text is over a limit or holds a lone surrogate, which no tokenizer accepts.

    Examples
    --------
    >>> check_text("naïve")
    5
    """
    if not isinstance(text, str):
        raise TypeError(f"text of type {type(text).__name__}: str is needed")
    limits.cap("text", len(text), "characters", "text_characters")
    if num_tokens is not None:
        limits.cap("text", num_tokens, "tokens", "text_tokens")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text: {text[error.start]!r} at position {error.start} is not a character") from error
    return len(text)


# Outside brackets Cl and Br count by their first letter.
_ATOM = re.compile(r"\[\d*(?P<hydrogen>HH?[+-]?\d*(?::\d+)?\])|\[[^\]]*\]|[BCNOPSFIbcnops*]")


def check_smiles(smiles: str, *, limits: Limits = DEFAULT) -> int:
    """Return the number of heavy atoms, counted from the letters alone.

    Whether the string describes a molecule is for the chemistry toolkit to say; this only bounds its work.

    Raises
    ------
    DataError
        If the string holds no atom, is over a limit, or holds blanks or characters outside ASCII.

    Examples
    --------
    >>> check_smiles("CC(=O)Oc1ccccc1C(=O)O")
    13
    """
    if not isinstance(smiles, str):
        raise TypeError(f"SMILES of type {type(smiles).__name__}: str is needed")
    limits.cap("SMILES", len(smiles), "characters", "smiles_characters")
    shown = smiles if len(smiles) <= 60 else smiles[:57] + "..."
    if wrong := re.search(r"[^!-~]", smiles):
        raise DataError(f"SMILES {shown!r}: {wrong.group()!r} at position {wrong.start()} is not allowed; remove it")
    is_heavy = [atom["hydrogen"] is None for atom in _ATOM.finditer(smiles)]
    if not is_heavy:
        raise DataError(f"SMILES {shown!r}: it holds no atom")
    heavy_atoms = sum(is_heavy)
    limits.cap(f"SMILES {shown!r}", smiles.count(".") + 1, "fragments", "smiles_fragments")
    limits.cap(f"SMILES {shown!r}", heavy_atoms, "heavy atoms", "smiles_heavy_atoms")
    return heavy_atoms


def check_image_size(width: int, height: int, *, limits: Limits = DEFAULT) -> int:
    """Return the number of pixels; ask before decoding, the header of the file knows both sides.

    Raises
    ------
    DataError
        If a side is below one pixel or the image is over the limit.
    """
    for side in (width, height):
        if isinstance(side, bool) or not isinstance(side, Integral):
            raise TypeError(f"image of {width!r} x {height!r}: whole numbers are needed")
        if side < 1:
            raise DataError(f"image of {width} x {height} pixels: both sides must be at least 1")
    limits.cap("image", int(width) * int(height), "pixels", "image_pixels")
    return int(width) * int(height)


def check_archive(num_members: int, unpacked_bytes: int, packed_bytes: int, *, limits: Limits = DEFAULT) -> None:
    """Check what has been unpacked so far; call it while unpacking, since an archive's own list may lie.

    Raises
    ------
    DataError
        If the archive is over a limit.

    Examples
    --------
    >>> check_archive(num_members=3, unpacked_bytes=10_000, packed_bytes=2_000)
    """
    limits.cap("archive", num_members, "members", "archive_members")
    limits.cap("archive", unpacked_bytes, "bytes unpacked", "archive_bytes")
    if unpacked_bytes > 1_000_000:  # the padding of a tiny tar already shrinks a hundredfold, and harms nobody
        ratio = unpacked_bytes / packed_bytes if packed_bytes else math.inf
        limits.cap("archive", ratio, "times its packed size", "archive_ratio")
