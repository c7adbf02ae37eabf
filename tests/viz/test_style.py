"""Colours reach their contrast, the style is set once for all, labels do not overlap, notebooks write SVG."""

import itertools
import re
import sys
import types
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbclient
import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oral4.viz import style

WHITE, DARK, BLACK = "#ffffff", "#121212", "#000000"
colors = st.integers(0, 0xFFFFFF).map(lambda n: f"#{n:06X}")


def test_contrast_is_that_of_wcag():
    # Published examples: #767676 is the lightest grey that passes 4.5 on white, #777777 fails it.
    assert style.contrast(WHITE, BLACK) == pytest.approx(21, abs=1e-9)
    assert style.contrast("#767676", WHITE) == pytest.approx(4.54, abs=0.005)
    assert style.contrast("#777777", WHITE) == pytest.approx(4.48, abs=0.005)
    assert style.contrast("#CC79A7", DARK) == style.contrast(DARK, "#CC79A7")


@pytest.mark.parametrize("color", ["", "red", "#fff", 3, "#12345", "#1234567"])
def test_contrast_refuses_what_is_no_colour(color):
    with pytest.raises(ValueError, match="#RRGGBB"):
        style.contrast(color, WHITE)


def test_no_grey_is_legible_on_white_and_on_the_dark_page_but_ink_is_on_white_and_black():
    greys = [f"#{v:02x}{v:02x}{v:02x}" for v in range(256)]
    best_on_page = max(min(style.contrast(g, WHITE), style.contrast(g, DARK)) for g in greys)
    assert 4.3 < best_on_page < 4.5  # hence the black plate
    best = max(min(style.contrast(g, WHITE), style.contrast(g, BLACK)) for g in greys)
    ours = min(style.contrast(style.INK, WHITE), style.contrast(style.INK, BLACK))
    assert 4.5 <= ours <= best < 4.6
    assert style.contrast(style.INK, DARK) >= 4.1  # where the plate is missing


def test_lines_are_visible_on_every_ground():
    for color, ground in itertools.product([*style.CYCLE, style.GREY], [WHITE, DARK, BLACK]):
        assert style.contrast(color, ground) >= 3, (color, ground)


@given(colors)
def test_stroke_reaches_three_on_both_grounds_and_keeps_what_already_does(color):
    line = style.stroke(color)
    assert re.fullmatch("#[0-9A-F]{6}", line)
    assert min(style.contrast(line, WHITE), style.contrast(line, DARK)) >= 3
    if 3.05 <= style.contrast(color, WHITE) and 3.05 <= style.contrast(color, DARK):
        assert line == color


def test_accents_are_those_of_the_site():
    wanted = {
        "diffusion": "#0072B2", "diffvc": "#0072B2", "geodiff": "#009E73", "pyraformer": "#D55E00",
        "flan": "#CC79A7", "dp": "#56B4E9", "milan": "#E69F00",
    }  # fmt: skip
    assert {chapter: style.accent(chapter) for chapter in wanted} == wanted
    assert set(wanted.values()) <= set(style.COLORS.values())
    with pytest.raises(ValueError, match=r"'bert'.*pyraformer"):
        style.accent("bert")


def test_the_style_sheet_puts_the_plate_under_figures():
    css = (Path(__file__).parents[2] / "nbs/_assets/viz.css").read_text(encoding="utf8")
    assert re.search(r'data-theme="dark"\] \.bd-content div\.cell_output img[^{]*\{\s*background: #000;', css)


def test_use_is_idempotent_and_transparent():
    style.use()
    once = dict(matplotlib.rcParams)
    style.use()
    assert dict(matplotlib.rcParams) == once
    assert once["figure.facecolor"] == once["axes.facecolor"] == "none"
    assert not once["axes.spines.top"] and not once["axes.spines.right"]
    assert all(10 <= once[key] <= 11 for key in ("font.size", "axes.labelsize", "xtick.labelsize", "axes.titlesize"))
    assert once["text.color"] == once["axes.labelcolor"] == once["xtick.color"] == style.INK
    assert [entry["color"] for entry in once["axes.prop_cycle"]] == list(style.CYCLE)
    with pytest.raises(ValueError, match="pdf"):
        style.use("pdf")


def test_colab_gets_a_white_ground(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    style.use()
    assert matplotlib.rcParams["figure.facecolor"] == "white"


def test_figure_has_the_size_of_the_column():
    fig, axes = style.figure(ncols=2, sharey=True)
    assert tuple(fig.get_size_inches()) == (6.5, 3.25) and len(axes) == 2
    fig, _ = style.figure(width=4, height=1)
    assert tuple(fig.get_size_inches()) == (4, 1)
    for sizes in ({"width": 7}, {"width": 0}, {"width": -1}, {"height": 0}, {"width": float("nan")}):
        with pytest.raises(ValueError, match=r"6\.5"):
            style.figure(**sizes)


def test_band_has_the_colour_of_its_line_and_can_be_changed():
    _, ax = style.figure()
    area = style.band(ax, [0, 1], [0, 0], [1, 2], style.CYCLE[1])
    assert area.get_alpha() == 0.2 and matplotlib.colors.to_hex(area.get_facecolor()[0]) == style.CYCLE[1].lower()
    assert style.band(ax, [0, 1], [0, 0], [1, 2], style.CYCLE[1], alpha=0.5).get_alpha() == 0.5


def boxes(fig, texts):
    fig.canvas.draw()
    return [matplotlib.text.Text.get_window_extent(text) for text in texts]  # the words, without the lead


@pytest.mark.parametrize("ends", [[0, 0, 0, 0], [0, 0.01, 5, 5.02], [3, 2, 1, 0], [1, 1]])
def test_labels_stand_right_of_the_lines_without_touching_in_the_order_of_the_ends(ends):
    style.use()
    fig, ax = style.figure()
    for i, end in enumerate(ends):
        ax.plot([0, 1, np.nan], [0, end, 1], label=f"series {i}")
    ax.plot([0, 1], [2, 2])  # without a label: left alone
    texts = style.label_lines(ax)
    assert [t.get_text() for t in texts] == [f"series {i}" for i in range(len(ends))]
    drawn = boxes(fig, texts)
    for first, second in itertools.combinations(drawn, 2):
        assert not first.overlaps(second)
    for i, j in itertools.combinations(range(len(ends)), 2):
        if ends[i] != ends[j]:
            assert (drawn[i].y0 < drawn[j].y0) == (ends[i] < ends[j])
    edge = fig.bbox.x1
    last = ax.transData.transform((1, 0))[0]
    assert all(last < box.x0 and box.x1 <= edge + 1 for box in drawn)
    assert all(
        t.arrow_patch.get_edgecolor()[:3] == matplotlib.colors.to_rgb(line.get_color())
        for t, line in zip(texts, ax.get_lines(), strict=False)
    )


def test_labels_can_be_given_and_too_many_are_refused():
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="no line with a label"):
        style.label_lines(ax)
    ax.plot([0, 1], [0, 1])
    with pytest.raises(ValueError, match="no line with a label"):
        style.label_lines(ax)
    assert style.label_lines(ax, ["up"])[0].get_text() == "up"
    with pytest.raises(ValueError, match="2 labels for 1 lines"):
        style.label_lines(ax, ["a", "b"])
    ax.plot([0, 1], [np.nan, np.nan], label="hole")
    with pytest.raises(ValueError, match="'hole' has no finite point"):
        style.label_lines(ax)
    for i in range(4):
        ax.plot([0, 1], [0, i], label=str(i))
    with pytest.raises(ValueError, match=r"5 lines; beyond 4.*legend"):
        style.label_lines(ax)


@given(st.lists(st.floats(-100, 100), max_size=6), st.floats(0.1, 30))
def test_spread_keeps_apart_keeps_order_and_keeps_the_mean(heights, spacing):
    moved = style._spread(heights, spacing)
    assert len(moved) == len(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for low, high in itertools.pairwise(order):
        assert moved[high] - moved[low] >= spacing - 1e-9  # double precision on values up to 250
    if heights:
        assert np.mean(moved) == pytest.approx(np.mean(heights), abs=1e-9)  # blocks are centred on their members
    if all(b - a >= spacing for a, b in itertools.pairwise(sorted(heights))):
        assert moved == pytest.approx(heights, abs=1e-9)


def run_notebook(source):
    cells = [nbformat.v4.new_code_cell(part) for part in source]
    return nbclient.NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=120).execute().cells


def test_a_notebook_writes_svg_of_the_asked_width_and_png_where_asked(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel sets its own
    plot = "fig, ax = style.figure()\nax.plot([0, 1], [1, 2], label='a')\nstyle.label_lines(ax);"
    cells = run_notebook(
        ["from oral4.viz import style\nstyle.use()\nstyle.use()\n" + plot, plot, "style.use('png')\n" + plot]
    )
    first, second, third = ([o["data"] for o in cell.outputs if o["output_type"] == "display_data"] for cell in cells)
    assert len(first) == len(second) == len(third) == 1
    svg = first[0]["image/svg+xml"]
    assert 'width="468pt"' in svg and "<dc:date>" not in svg and "<text" not in svg
    assert second[0]["image/svg+xml"] == svg  # the same figure, the same bytes
    assert "image/png" not in first[0] and "image/svg+xml" not in third[0] and third[0]["image/png"]
    assert not [o for cell in cells for o in cell.outputs if o["output_type"] == "stream"]
