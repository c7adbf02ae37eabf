"""Players of short waves, labelled and side by side, with the sound inside the page."""

from __future__ import annotations

import base64
import html
import io
import wave as wave_file
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oral4.errors import require
from oral4.viz import page

__all__ = ["MAX_BYTES", "Player", "player", "players"]

MAX_BYTES = 250_000
"""Most bytes of sound that one player embeds: WAV of 5.6 s at 22.05 kHz, 7.8 s at 16 kHz."""

# Comparing two voices is easier when starting one stops the other. The flag keeps one listener for each page.
_SCRIPT = """
if (!document.oral4OnePlayer) {
  document.oral4OnePlayer = true;
  document.addEventListener("play", event => {
    for (const other of document.querySelectorAll(".oral4-player audio")) if (other !== event.target) other.pause();
  }, true);
}"""

_STYLE = """
.oral4-players{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:1em;align-items:end}
.oral4-players+figcaption{margin-top:.6em}
.oral4-player{margin:0;padding:0;min-width:0}
.oral4-player b{display:block;font-weight:600;font-size:.95em;line-height:1.3;margin-bottom:.3em}
.oral4-player img{display:block;width:100%;height:96px;border-radius:6px;margin-bottom:.4em}
.oral4-player audio{display:block;width:100%;height:44px}
:root[data-theme=dark] .oral4-player audio,:root[theme=dark] .oral4-player audio{color-scheme:dark}
.oral4-player details{font-size:.9em;margin-top:.3em}
@media print{.oral4-player audio,.oral4-player details{display:none}}
"""


@dataclass(frozen=True, eq=False)
class Player:
    """One sound with its label; :func:`player` makes it, a notebook shows it."""

    label: str
    """Shown above the player."""
    description: str
    """What is heard, for readers who cannot see the page."""
    sound: bytes
    """The encoded file."""
    kind: str
    """Its media type, ``"audio/wav"`` or ``"audio/flac"``."""
    seconds: float
    """Duration."""
    mel: np.ndarray | None
    """Log-mel spectrogram to draw above the player, shape (bands, frames)."""
    transcript: str | None
    """The words that are spoken."""

    def _repr_html_(self) -> str:
        return players([self])._repr_html_()

    def __repr__(self) -> str:
        return f"<player: {self.label}, {self.seconds:.1f} s, {len(self.sound) / 1000:.0f} kB>"


def player(
    wave: Any,
    rate: int,
    *,
    label: str,
    alt: str | None = None,
    transcript: str | None = None,
    mel: Any = None,
    format: str = "wav",
) -> Player:
    """Return a player of one wave. It never starts by itself.

    Parameters
    ----------
    wave : array or Tensor, shape (T,)
        One channel: floating point in [-1, 1], or 16-bit integers.
    rate : int
        Samples per second, 8000 to 48000.
    label : str
        A few words, for example ``"Average voice"``.
    alt : str, optional
        What is heard, for readers who use a screen reader; the label when not given.
    transcript : str, optional
        The words that are spoken, for readers who cannot hear them.
    mel : array or Tensor, shape (bands, frames), optional
        A log-mel spectrogram, drawn above the player with low frequencies at the bottom.
    format : {"wav", "flac"}
        ``"flac"`` takes about half the bytes, without loss, and needs soundfile.

    Returns
    -------
    Player

    Raises
    ------
    ValueError
        If the wave has more than one channel, is empty, holds NaN or infinity or leaves [-1, 1], if
        the rate is outside its range, the sound too long, or the spectrogram not a finite matrix.
    TypeError
        If the wave is neither floating point nor 16-bit, or the rate no integer.
    MissingExtra
        If soundfile is not installed and ``format="flac"``.

    Examples
    --------
    >>> tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    >>> player(tone, 16000, label="A tuning fork")
    <player: A tuning fork, 0.5 s, 16 kB>
    """
    label = _text(label, "label")
    samples = _samples(wave, label)
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)):
        raise TypeError(f"player {label!r}: rate={rate!r} is {type(rate).__name__}; give samples per second as an int")
    if not 8000 <= rate <= 48000:
        raise ValueError(f"player {label!r}: rate={rate}; resample the wave to 8000 to 48000 samples per second")
    if format not in ("wav", "flac"):
        raise ValueError(f"player {label!r}: format={format!r} is unknown; choose 'wav' or 'flac'")
    sound = _wav(samples, int(rate)) if format == "wav" else _flac(samples, int(rate))
    seconds = len(samples) / rate
    if len(sound) > MAX_BYTES:
        fits = seconds * MAX_BYTES / len(sound)
        smaller = "pass format='flac' (about half the bytes, needs soundfile), " if format == "wav" else ""
        raise ValueError(
            f"player {label!r}: {seconds:.1f} s take {len(sound) / 1000:.0f} kB as {format}, at most "
            f"{MAX_BYTES / 1000:.0f} kB are embedded in a page. Cut it to {fits:.1f} s, {smaller}"
            "or write it to a file and link to that"
        )
    return Player(
        label=label,
        description=_text(alt, "alt") if alt is not None else label,
        sound=sound,
        kind=f"audio/{format}",
        seconds=seconds,
        mel=None if mel is None else _mel(mel, label),
        transcript=None if transcript is None else _text(transcript, "transcript"),
    )


def players(items: Sequence[Player], *, caption: str | None = None) -> page.Fragment:
    """Return a row of players of equal height, for example source, average voice, target and converted.

    Starting one stops the others. Their spectrograms share one scale of colours, from the smallest
    to the largest value of the row, so brightness can be compared.

    Parameters
    ----------
    items : sequence of Player
        Either all with a spectrogram or all without.
    caption : str, optional
        Plain text below the row.

    Raises
    ------
    ValueError
        If there is no player, or only some have a spectrogram.
    TypeError
        If an item is not a :class:`Player`.
    MissingExtra
        If there are spectrograms and matplotlib is not installed.
    """
    items = list(items)
    if not items:
        raise ValueError("players: the list is empty; give at least one player(...)")
    for item in items:
        if not isinstance(item, Player):
            raise TypeError(f"players: got {type(item).__name__}; make each item with player(wave, rate, label=...)")
    mels = [item.mel for item in items if item.mel is not None]
    if mels and len(mels) < len(items):
        raise ValueError(f"players: {len(mels)} of {len(items)} have a spectrogram; give mel= to all or to none")
    low = min((float(mel.min()) for mel in mels), default=0.0)
    high = max((float(mel.max()) for mel in mels), default=1.0)
    cells = "".join(_cell(item, low, high) for item in items)
    row = f'<div class="oral4-players">{cells}</div>'
    markup = (
        f'<figure class="oral4">{page.style()}<style>{_STYLE}</style>{row}{page.caption_html(caption)}</figure>'
        f"<script>{_SCRIPT}</script>"
    )
    return page.Fragment(markup, f"players: {', '.join(item.label for item in items)}")


def _cell(item: Player, low: float, high: float) -> str:
    label = html.escape(item.label)
    picture = ""
    if item.mel is not None:
        picture = f'<img class="dark-light" alt="Spectrogram: {label}" src="{_draw(item.mel, low, high)}">'
    source = f"data:{item.kind};base64,{base64.b64encode(item.sound).decode()}"
    spoken = ""
    if item.transcript is not None:
        spoken = f"<details><summary>Words</summary>{html.escape(item.transcript)}</details>"
    return (
        f'<figure class="oral4-player"><b>{label}</b>{picture}'
        f'<audio controls preload="metadata" aria-label="{html.escape(item.description)}" src="{source}"></audio>'
        f'<span class="oral4-print">({item.seconds:.1f} s of sound, to be heard on the page)</span>{spoken}</figure>'
    )


def _array(values: Any) -> np.ndarray:
    """Return an array from an array, a sequence or a PyTorch tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point():
            values = values.float()  # numpy has no bfloat16
    return np.asarray(values)


def _samples(wave: Any, label: str) -> np.ndarray:
    """Return 16-bit samples, shape (T,)."""
    samples = _array(wave)
    if samples.ndim != 1:
        raise ValueError(
            f"player {label!r}: the wave has shape {samples.shape}, expected (T,); take one channel, such as wave[0]"
        )
    if samples.size == 0:
        raise ValueError(f"player {label!r}: the wave is empty; give at least one sample")
    if samples.dtype == np.int16:
        return samples
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(f"player {label!r}: the wave is {samples.dtype}; give floating point in [-1, 1] or int16")
    bad = np.flatnonzero(~np.isfinite(samples))
    if bad.size:
        raise ValueError(f"player {label!r}: {bad.size} samples of the wave are NaN or infinite, first at {bad[0]}")
    peak = float(np.abs(samples).max())
    if peak > 1:
        raise ValueError(f"player {label!r}: the wave reaches {peak:.4g}, outside [-1, 1]; divide it by its peak")
    return np.round(samples * 32767).astype(np.int16)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave_file.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def _flac(samples: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    require("soundfile", "voice").write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _mel(mel: Any, label: str) -> np.ndarray:
    """Return the spectrogram as a finite matrix."""
    matrix = _array(mel)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"player {label!r}: mel has shape {matrix.shape}, expected (bands, frames)")
    matrix = matrix.astype(np.float32)
    if not np.isfinite(matrix).all():
        raise ValueError(f"player {label!r}: mel holds NaN or infinity; give a logarithm with a floor")
    return matrix


def _draw(mel: np.ndarray, low: float, high: float) -> str:
    """Return the picture of a spectrogram as a data URI."""
    matplotlib = require("matplotlib", "plot")
    scaled = (mel[::-1] - low) / (high - low if high > low else 1.0)
    colors = matplotlib.colormaps["magma"](scaled, bytes=True)[..., :3]
    buffer = io.BytesIO()
    require("PIL.Image", "plot").fromarray(np.ascontiguousarray(colors)).save(buffer, "webp", quality=80, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _text(text: Any, name: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"player: {name}={text!r}; give a few words")
    return text.strip()
