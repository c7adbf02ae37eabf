"""A figure that depends on a few settings, with one slider for each, drawn beforehand.

Every combination of the settings is drawn once and travels in the page, so the sliders work without a
kernel and without a network. Where a kernel is at hand (Colab, or ``ORAL4_LIVE=1``) the figure is drawn on
demand instead, by ipywidgets.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from oral4.errors import require
from oral4.viz import page

__all__ = ["MAX_FRAMES", "explore"]

MAX_FRAMES = 60
"""Most frames that one figure may embed."""

MAX_BYTES = 1_000_000
"""Most bytes of a page that the frames of one figure may take."""

_SCRIPT = (
    '(() => {"use strict";'
    + page.CONTROLS_SCRIPT
    + """
for (const root of document.querySelectorAll(".oral4-explore:not([data-ready])")) {
  root.dataset.ready = "";
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const image = root.querySelector("img"), told = root.querySelector("[role=status]");
  data.frames[data.start] = image.src.slice(data.prefix.length);
  let first = true, later = null;
  wire(root, data, (values, moving) => {
    const frame = values.reduce((sum, value, i) => sum * data.words[i].length + value, 0);
    image.src = data.prefix + data.frames[frame];
    image.alt = data.alts[frame];
    // Screen readers do not announce a new alt text; say it once the slider has come to rest.
    clearTimeout(later);
    if (!first && !moving) later = setTimeout(() => { told.textContent = image.alt; }, 600);
    first = false;
  });
}
})();"""
)


def explore(
    draw: Callable[..., Any],
    *,
    alt: str | Callable[..., str],
    caption: str | None = None,
    start: Mapping[str, Any] | None = None,
    play: bool | str = False,
    interval: int = 200,
    dpi: int = 96,
    live: bool | None = None,
    **grid: Sequence[Any] | Mapping[str, Any],
) -> Any:
    """Show a figure that depends on a few settings, with one slider for each.

    Parameters
    ----------
    draw : callable
        ``draw(**settings)`` returns a matplotlib figure, or the pair ``(figure, axes)``. All frames have to be of
        one size, so leave the size of the figure alone.
    alt : str or callable
        What the figure shows, for readers who cannot see it. A text is followed by the settings in words;
        ``alt(**settings)`` returns the whole text for one frame, which is better: say what changed.
    caption : str, optional
        Plain text below the figure.
    start : mapping, optional
        Where the sliders stand at first, ``{setting: value}`` or ``{setting: label}``: the most telling position.
        Settings left out stand at their first value.
    play : bool or str
        Add a button that runs through the first setting, or through the one named. Nothing moves by itself.
    interval : int
        Milliseconds between two frames while playing, at least 50.
    dpi : int
        Dots per inch of the frames. At 96 one dot is one pixel of the page.
    live : bool, optional
        Draw on demand with ipywidgets, which takes a kernel. By default where ``ORAL4_LIVE=1`` is set or in
        Colab, unless ``ORAL4_LIVE=0``.
    **grid : sequence or mapping
        The values of each setting by its name. In a mapping ``{label: value}`` the label is shown instead of the
        value: ``noise={"none": 0.0, "much": 1.0}``. An underscore in the name is shown as a space.

    Returns
    -------
    oral4.viz.page.Fragment or ipywidgets.Widget

    Raises
    ------
    ValueError
        If there is no setting, a setting has no value, there are more than 60 combinations, the frames take
        more than 1 MB or differ in size, or ``start``, ``play`` or ``interval`` does not fit.
    TypeError
        If ``draw`` does not return a figure or ``alt`` does not return a text.
    MissingExtra
        If matplotlib, or ipywidgets for the live version, is not installed.

    Examples
    --------
    >>> from oral4.viz import style
    >>> def draw(frequency):
    ...     fig, ax = style.figure(width=3)
    ...     ax.plot([math.sin(frequency * t / 10) for t in range(100)])
    ...     return fig
    >>> explore(draw, alt="A sine", frequency=[1, 2, 3]).text
    'explore: 3 frames, A sine. Frequency: 1.'
    """
    labels, values = _settings(grid)
    position = _start(start or {}, labels, values)
    playing = _play(play, list(values))
    if interval < 50:
        raise ValueError(f"explore: interval={interval} ms is too fast to follow; give at least 50")
    pyplot = require("matplotlib.pyplot", "plot")

    def frame(index: Sequence[int]) -> tuple[Any, str]:
        chosen = {name: values[name][i] for name, i in zip(values, index, strict=True)}
        words = {name: labels[name][i] for name, i in zip(labels, index, strict=True)}
        text = _alt(alt, chosen, words)
        try:
            drawn = draw(**chosen)
        except Exception as error:
            error.add_note("explore: this happened while drawing " + _sentence(words))
            raise
        figure = drawn[0] if isinstance(drawn, tuple) and drawn else drawn
        if not hasattr(figure, "savefig"):
            raise TypeError(f"explore: draw returned {type(drawn).__name__} for {_sentence(words)}; return the figure")
        picture = _picture(figure, dpi)
        size = tuple(round(96 * float(inches)) for inches in figure.get_size_inches())
        pyplot.close(figure)
        return (picture, size), text

    named = {name.replace("_", " "): list(words) for name, words in labels.items()}
    if _live(live):
        return _widget(frame, named, position, caption)

    count = math.prod(len(v) for v in values.values())
    if count > MAX_FRAMES:
        sizes = " x ".join(str(len(v)) for v in values.values())
        raise ValueError(
            f"explore: {sizes} = {count} frames; at most {MAX_FRAMES} are drawn beforehand. Give fewer values of a "
            "setting (the eye needs five to ten), or live=True where a kernel is at hand"
        )
    pictures, sizes_seen, alts = [], set(), []
    for index in itertools.product(*(range(len(v)) for v in values.values())):
        (picture, size), text = frame(index)
        pictures.append(picture)
        sizes_seen.add((picture.size, size))
        alts.append(text)
    if len(sizes_seen) > 1:
        listed = ", ".join(sorted(f"{w} x {h}" for (w, h), _ in sizes_seen))
        raise ValueError(f"explore: the frames have different sizes ({listed} dots); give draw one figure size")
    first = int(np.ravel_multi_index(position, [len(v) for v in values.values()]))
    encode = _encoder(pictures[first])
    frames = [base64.b64encode(encode(picture)).decode() for picture in pictures]
    weight = sum(map(len, frames))
    if weight > MAX_BYTES:
        raise ValueError(
            f"explore: {count} frames take {weight / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.1f} MB fits a page. Give "
            f"fewer values, a smaller figure or a lower dpi (now {dpi}); many small points or pixel noise weigh most"
        )
    prefix = "data:image/webp;base64,"
    data = {
        "frames": [None if i == first else frame for i, frame in enumerate(frames)],  # it stands in the image already
        "start": first,
        "prefix": prefix,
        "alts": alts,
        "words": list(named.values()),
        "interval": interval,
    }
    width, height = next(iter(sizes_seen))[1]
    shown = _sentence({name: words[i] for (name, words), i in zip(named.items(), position, strict=True)})
    markup = (
        f'<figure class="oral4 oral4-explore">{page.style()}'
        + _image(prefix + frames[first], alts[first], width, height)
        + page.controls_html(named, position, play=playing)
        + f"<noscript><p>The sliders of this figure need JavaScript. Shown here: {html.escape(shown)}.</p></noscript>"
        + '<span class="oral4-unseen" role="status"></span>'
        + page.data_block(data)
        + page.caption_html(caption)
        + f"</figure><script>{_SCRIPT}</script>"
    )
    return page.Fragment(markup, f"explore: {count} frames, {alts[first]}")


def _settings(grid: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, list[Any]]]:
    """Return the labels and the values of each setting."""
    if not grid:
        raise ValueError("explore: no setting is given; pass at least one, for example steps=[1, 2, 5]")
    labels: dict[str, list[str]] = {}
    values: dict[str, list[Any]] = {}
    for name, given in grid.items():
        if isinstance(given, str) or not hasattr(given, "__iter__"):
            raise TypeError(f"explore: {name}={given!r} is no sequence of values; did you misspell an argument?")
        if isinstance(given, Mapping):
            labels[name], values[name] = [str(label) for label in given], list(given.values())
        else:
            values[name] = list(given)
            labels[name] = [page.in_words(value) for value in values[name]]
        if not values[name]:
            raise ValueError(f"explore: {name} has no value; give at least one")
    return labels, values


def _start(start: Mapping[str, Any], labels: Mapping[str, list[str]], values: Mapping[str, list[Any]]) -> list[int]:
    """Return the position at which each slider stands at first."""
    if unknown := set(start) - set(values):
        raise ValueError(f"explore: start names {sorted(unknown)}, the settings are {list(values)}")
    position = []
    for name, words in labels.items():
        wanted = page.in_words(start[name]) if name in start else words[0]
        in_values = [page.in_words(value) for value in values[name]]
        if wanted not in words and wanted not in in_values:
            raise ValueError(f"explore: start[{name!r}]={start[name]!r} is none of {', '.join(words)}")
        position.append(words.index(wanted) if wanted in words else in_values.index(wanted))
    return position


def _play(play: bool | str, names: list[str]) -> int | None:
    """Return the index of the setting that the button runs through."""
    if isinstance(play, str):
        if play not in names:
            raise ValueError(f"explore: play={play!r} is none of the settings {names}")
        return names.index(play)
    return 0 if play else None


def _live(live: bool | None) -> bool:
    """Whether to draw on demand."""
    if live is not None:
        return live
    wish = os.environ.get("ORAL4_LIVE", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"ORAL4_LIVE={wish!r} is unknown; set it to 1 (draw on demand) or 0 (drawn beforehand)")
    return wish == "1" or (wish == "" and "google.colab" in sys.modules)


def _sentence(words: Mapping[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {word}" for name, word in words.items())


def _alt(alt: str | Callable[..., str], chosen: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return the alternative text of one frame."""
    if callable(alt):
        text = alt(**chosen)
    elif isinstance(alt, str) and alt.strip():
        settings = _sentence(words)
        return f"{alt.strip().rstrip('.')}. {settings[:1].upper()}{settings[1:]}."
    else:
        text = alt
    if not isinstance(text, str):
        raise TypeError(f"explore: alt gave {type(text).__name__}; give a text, or a function that returns one")
    if not text.strip():
        raise ValueError("explore: alt is empty; say what the figure shows to a reader who cannot see it")
    return text


def _picture(figure: Any, dpi: int) -> Any:
    """Return the figure as a PIL image with transparency."""
    buffer = io.BytesIO()
    # The whole canvas: cut to its contents, frames would differ in size and jump.
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches=figure.bbox_inches, pil_kwargs={"compress_level": 1})
    return require("PIL.Image", "plot").open(buffer).convert("RGBA")


def _encoder(sample: Any) -> Callable[[Any], bytes]:
    """Return the smaller of two encodings for pictures like ``sample``.

    Drawings are smallest as lossless WebP once their colours are rounded to 6 bits and their
    transparency to 4, an error of 2 and 8 in 255 that nobody sees; photographs as lossy WebP.
    """
    image = require("PIL.Image", "plot")

    def drawing(picture: Any) -> bytes:
        levels = np.array([63, 63, 63, 15]) / 255
        rounded = np.round(np.round(np.asarray(picture) * levels) / levels).astype(np.uint8)
        buffer = io.BytesIO()
        image.fromarray(rounded).save(buffer, "webp", lossless=True, quality=80, method=4)
        return buffer.getvalue()

    def photograph(picture: Any) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "webp", quality=80, method=4)
        return buffer.getvalue()

    return min(drawing, photograph, key=lambda encode: len(encode(sample)))


def _image(source: str, alt: str, width: int, height: int) -> str:
    # "dark-light" keeps the site's theme from dimming the picture in the dark.
    return (
        f'<img class="oral4-plate dark-light" src="{source}" alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}" decoding="sync">'
    )


def _widget(
    frame: Callable[[Sequence[int]], tuple[Any, str]],
    named: Mapping[str, list[str]],
    position: Sequence[int],
    caption: str | None,
) -> Any:
    """Return the version with a kernel. Only what ipywidgets 7.7 and 8 have in common is used."""
    widgets = require("ipywidgets", "plot")
    picture = widgets.HTML()
    sliders = [
        # The value is the position: values of a setting need not be comparable.
        widgets.SelectionSlider(
            options=[(word, i) for i, word in enumerate(words)],
            index=start,
            description=name,
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "100%", "max_width": "624px"},
        )
        for (name, words), start in zip(named.items(), position, strict=True)
    ]

    def show() -> None:
        (drawn, (width, height)), text = frame([slider.index for slider in sliders])
        buffer = io.BytesIO()
        drawn.save(buffer, "png")
        source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        picture.value = page.style() + _image(source, text, width, height)

    def update(change: Any) -> None:
        try:
            show()
        except Exception as error:  # what a callback raises ends in a log that nobody reads
            lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
            picture.value = f"<pre>{html.escape(chr(10).join(lines))}</pre>"

    for slider in sliders:
        slider.observe(update, "index")
    show()
    below = [widgets.HTML(f"<p>{html.escape(caption)}</p>")] if caption else []
    return widgets.VBox([picture, *sliders, *below])
