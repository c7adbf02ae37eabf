"""The house style of every figure: colours that are legible on white and on dark, and direct labels.

The ground of a figure is transparent, so that the page shows through in the light and in the dark
theme. Which ink is legible on both? The contrast of a grey with white times its contrast with a dark
ground is fixed, so the best grey for both reaches the square root of their contrast: 4.33 on white and
``#121212``, just short of the 4.5 which small text needs. On white and black it is 4.58. Therefore the
text is ``INK``, which has 4.54 on white and 4.62 on black, and the style sheet of the site puts a black
plate under figures in the dark theme (`nbs/_assets/viz.css`). Without the plate 4.12 remain.

Lines need 3. Four of the eight colours of Okabe and Ito reach it on both grounds; they are the colour
cycle. :func:`stroke` darkens the others as little as needed.

>>> round(contrast(INK, "#ffffff"), 2), round(contrast(INK, "#000000"), 2)
(4.54, 4.62)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from oral4.errors import require

__all__ = ["COLORS", "CYCLE", "GREY", "INK", "accent", "band", "contrast", "figure", "label_lines", "stroke", "use"]

COLORS = {
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}
"""Colours that readers with every kind of colour vision can tell apart (Okabe and Ito, 2008), without the black."""

CYCLE = tuple(COLORS[name] for name in ("blue", "vermillion", "green", "purple"))
"""Colours of the first four series: contrast of 3 or more on white and on ``#121212``."""

INK = "#767676"
"""Text, axes and ticks."""

GREY = "#808080"
"""The reference, the naive version, the baseline."""

WIDTH = 6.5
"""Width of the text column, in inches: 624 pixels of a page."""

_ACCENTS = {
    "diffusion": "blue",
    "diffvc": "blue",
    "geodiff": "green",
    "pyraformer": "vermillion",
    "flan": "purple",
    "dp": "sky",
    "milan": "orange",
}
_MAX_LABELS = 4


def use(output: str = "svg") -> None:
    """Set the house style for all figures that follow; a second call changes nothing.

    In a notebook the figures come out as SVG, whose text stays sharp at every size, with identifiers
    that do not change from run to run. Outside a notebook only the style is set.

    Parameters
    ----------
    output : {"svg", "png"}
        What a notebook writes: ``"svg"`` for lines, ``"png"`` (at twice the resolution) where a figure
        consists of images or of very many points.

    Raises
    ------
    ValueError
        If ``output`` is neither.
    MissingExtra
        If matplotlib is not installed.
    """
    if output not in ("svg", "png"):
        raise ValueError(f"output={output!r} is unknown; choose 'svg' (lines) or 'png' (images)")
    matplotlib = require("matplotlib", "plot")
    cycler = require("cycler", "plot").cycler
    if _in_notebook():
        _set_notebook_format(output)
    # Colab puts figures on a ground of its own in the dark theme, too light for the ink: give it a white one.
    ground = "white" if "google.colab" in sys.modules else "none"
    matplotlib.rcParams.update(
        {
            "figure.facecolor": ground,
            "axes.facecolor": "none",
            "savefig.facecolor": "auto",
            "savefig.edgecolor": "none",
            "figure.figsize": (WIDTH, WIDTH / 2),
            "figure.constrained_layout.use": True,
            "font.size": 10.5,
            "axes.labelsize": 10.5,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.edgecolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.5,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
            "axes.prop_cycle": cycler(color=CYCLE),
            "image.interpolation": "nearest",
            "svg.fonttype": "path",  # looks the same on a machine without the font
            "svg.hashsalt": "oral4",  # the same figure gives the same bytes
        }
    )


def _in_notebook() -> bool:
    """Whether the code runs in IPython, without importing it."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _set_notebook_format(output: str) -> None:
    """Make the inline backend write SVG, or PNG at twice the resolution."""
    inline = require("matplotlib_inline.backend_inline", "plot")
    config = require("matplotlib_inline.config", "plot").InlineBackend.instance()
    # The whole canvas instead of what is drawn on it, so that a figure has exactly the width that was asked for.
    # Without the date, since it would make every run write other bytes.
    config.print_figure_kwargs = {"bbox_inches": None, **({"metadata": {"Date": None}} if output == "svg" else {})}
    # The configuration is set as well: the backend reads it again when it starts after this call.
    config.figure_formats = {"svg" if output == "svg" else "retina"}
    inline.set_matplotlib_formats("svg" if output == "svg" else "retina")


def figure(*, width: float = WIDTH, height: float | None = None, **subplots: Any) -> tuple[Any, Any]:
    """Return ``(figure, axes)`` of a size for the text column, so that text keeps its size in print and on screen.

    Parameters
    ----------
    width : float
        In inches, at most 6.5, the width of the text column.
    height : float, optional
        In inches; half the width when not given.
    **subplots
        Passed to ``matplotlib.pyplot.subplots``, for example ``ncols=2, sharey=True``.

    Raises
    ------
    ValueError
        If a size is not positive or the figure is wider than the column.
    """
    height = width / 2 if height is None else height
    if not 0 < width <= WIDTH or not 0 < height:
        raise ValueError(f"width={width}, height={height}: give inches, 0 < width <= {WIDTH:g} and height > 0")
    pyplot = require("matplotlib.pyplot", "plot")
    return pyplot.subplots(figsize=(width, height), **subplots)


def accent(chapter: str) -> str:
    """Return the colour of a chapter, as ``#RRGGBB``.

    ``"dp"`` and ``"milan"`` have light colours: pass them through :func:`stroke` for lines.

    Raises
    ------
    ValueError
        If there is no such chapter.

    Examples
    --------
    >>> accent("pyraformer")
    '#D55E00'
    """
    if chapter not in _ACCENTS:
        raise ValueError(f"chapter={chapter!r} has no colour; choose one of {', '.join(_ACCENTS)}")
    return COLORS[_ACCENTS[chapter]]


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, from 1 (equal) to 21 (black on white), as WCAG 2 defines it.

    Parameters
    ----------
    first, second : str
        Colours as ``#RRGGBB``.

    Examples
    --------
    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    low, high = sorted((_luminance(_linear(first)), _luminance(_linear(second))))
    return (high + 0.05) / (low + 0.05)


def stroke(color: str) -> str:
    """Return the shade nearest to ``color`` that gives a line a contrast of 3 on white and on ``#121212``.

    Parameters
    ----------
    color : str
        As ``#RRGGBB``.

    Examples
    --------
    >>> stroke(COLORS["blue"]) == COLORS["blue"]
    True
    >>> stroke(COLORS["orange"])
    '#C68800'
    """
    linear = _linear(color)
    luminance = _luminance(linear)
    highest = 1.05 / 3 - 0.05
    lowest = 3 * (_luminance(_linear("#121212")) + 0.05) - 0.05
    if luminance > highest:  # scaling linear light keeps the hue
        darker = [value * highest / luminance for value in linear]
        channels = [math.floor(255 * _encode(value)) for value in darker]
    elif luminance < lowest:
        share = (lowest - luminance) / (1 - luminance)
        lighter = [value + share * (1 - value) for value in linear]
        channels = [math.ceil(255 * _encode(value)) for value in lighter]
    else:
        return color
    return "#" + "".join(f"{channel:02X}" for channel in channels)


def _linear(color: str) -> list[float]:
    """Return the three channels of ``#RRGGBB`` in linear light, in [0, 1]."""
    if not (isinstance(color, str) and len(color) == 7 and color[0] == "#"):
        raise ValueError(f"color={color!r}: give it as '#RRGGBB', for example {INK!r}")
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def _encode(value: float) -> float:
    """Inverse of the sRGB curve in :func:`_linear`."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def _luminance(linear: Sequence[float]) -> float:
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def band(ax: Any, x: Any, low: Any, high: Any, color: str, **fill: Any) -> Any:
    """Shade the interval from ``low`` to ``high`` in the colour of its line, and return the artist.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x, low, high : array_like, shape (n,)
    color : str
    **fill
        Passed to ``ax.fill_between``.
    """
    return ax.fill_between(x, low, high, **{"color": color, "alpha": 0.2, "linewidth": 0, **fill})


def label_lines(ax: Any, labels: Sequence[str] | None = None, *, gap: float = 14.0) -> list[Any]:
    """Write the name of each line at its right-hand end, instead of a legend.

    Names that would touch are moved apart. The text has the colour of all text, because the colours of lines
    are too light for words; a short lead in the colour of the line ties the two together. Call it last, when
    the limits of the axes are final.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
        Holds up to four lines.
    labels : sequence of str, optional
        One for each line, in the order of plotting; the ``label=`` of the lines when not given
        (lines without one are left alone).
    gap : float
        Points between the end of a line and its name.

    Returns
    -------
    list of matplotlib.text.Annotation

    Raises
    ------
    ValueError
        If there is no line to label, there are more than four, a line has no finite point, or the number
        of labels differs from the number of lines.
    """
    lines = list(ax.get_lines())
    if labels is None:
        lines = [line for line in lines if not line.get_label().startswith("_")]
        labels = [line.get_label() for line in lines]
    if len(lines) != len(labels):
        raise ValueError(f"label_lines: {len(labels)} labels for {len(lines)} lines; give one for each")
    if not lines:
        raise ValueError("label_lines: there is no line with a label; plot with label=... or pass labels")
    if len(lines) > _MAX_LABELS:
        raise ValueError(f"label_lines: {len(lines)} lines; beyond {_MAX_LABELS} draw several axes or call ax.legend()")
    # The positions of the ends are known only after the layout.
    ax.figure.draw_without_rendering()
    points = 72 / ax.figure.dpi
    ends = [_last_point(line) for line in lines]
    heights = [float(ax.transData.transform(end)[1]) * points for end in ends]
    line_height = 1.25 * require("matplotlib", "plot").rcParams["font.size"]
    moved = _spread(heights, line_height)
    texts = []
    for line, label, end, height, target in zip(lines, labels, ends, heights, moved, strict=True):
        lead = {"arrowstyle": "-", "color": line.get_color(), "linewidth": 1.2, "relpos": (0, 0.5)}
        texts.append(
            ax.annotate(
                label,
                end,
                xytext=(gap, target - height),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
                arrowprops={**lead, "shrinkA": 2, "shrinkB": 1},
            )
        )
    return texts
    return texts


def _last_point(line: Any) -> tuple[float, float]:
    """Return the last point of a line with two finite coordinates, in the data's units."""
    x, y = np.ma.filled(np.ma.asarray(line.get_xydata(), dtype=float), np.nan).T
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if finite.size == 0:
        raise ValueError(f"label_lines: the line {line.get_label()!r} has no finite point")
    return float(x[finite[-1]]), float(y[finite[-1]])


def _spread(heights: Sequence[float], spacing: float) -> list[float]:
    """Return heights at least ``spacing`` apart, in the same order, moved as little as possible in sum of squares.

    Examples
    --------
    >>> _spread([0.0, 1.0, 50.0], 10.0)
    [-4.5, 5.5, 50.0]
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    # Isotonic regression of height - rank * spacing: neighbours that would touch are pooled into one block.
    blocks: list[tuple[float, int]] = []  # (mean, count)
    for rank, i in enumerate(order):
        mean, count = heights[i] - rank * spacing, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean = (mean * count + before * more) / (count + more)
            count += more
        blocks.append((mean, count))
    means = [mean for mean, count in blocks for _ in range(count)]
    spread = [0.0] * len(heights)
    for rank, i in enumerate(order):
        spread[i] = means[rank] + rank * spacing
    return spread
