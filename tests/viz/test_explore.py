"""Sliders over pre-drawn frames: order, start, words, limits, escaping, weight; and the version with a kernel."""

import base64
import io
import itertools
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from oral4.viz.explore import MAX_FRAMES, _encoder, explore

NASTY = "</script><script>alert(1)</script>\"><img src=x onerror=alert(1)>&amp;'"


def draw(**settings):
    """A figure whose number of bars says which settings it was drawn with."""
    fig, ax = plt.subplots(figsize=(1.5, 1))
    fig.subplots_adjust(0, 0, 1, 1)
    ax.bar(range(len(settings)), [float(v) if isinstance(v, int | float) else 1 for v in settings.values()], 1)
    ax.set(ylim=(0, 10), xlim=(-0.5, len(settings) - 0.5))
    ax.axis("off")
    return fig


def frames(tree):
    """The pictures as arrays, the one that stands in the image included."""
    data, image = tree.data(), tree.all("img")[0]
    codes = list(data["frames"])
    assert codes[data["start"]] is None
    codes[data["start"]] = image["src"].removeprefix(data["prefix"])
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for code in codes]


def heights(picture, columns):
    """How high each bar stands, from 0 to 10."""
    alpha = picture[..., 3] if picture.shape[-1] == 4 else np.full(picture.shape[:2], 255)
    colored = (alpha > 128) & (picture[..., :3].min(-1) < 200)
    width = picture.shape[1] // columns
    return [round(10 * colored[:, i * width + width // 2].mean()) for i in range(columns)]


def test_frames_are_in_the_order_of_the_sliders(parse):
    tree = parse(explore(draw, alt="Bars", first=[1, 5], second=[2, 4, 8]).html)
    drawn = [heights(picture, 2) for picture in frames(tree)]
    assert drawn == [list(pair) for pair in itertools.product([1, 5], [2, 4, 8])]
    data = tree.data()
    assert data["words"] == [["1", "5"], ["2", "4", "8"]]
    assert data["alts"][4] == "Bars. First: 5, second: 4."
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("start", "frame", "positions"),
    [(None, 0, "00"), ({"b": 8}, 2, "02"), ({"b": "8", "a": "high"}, 5, "12"), ({"a": 5}, 3, "10")],
)
def test_start_by_value_or_label(parse, start, frame, positions):
    tree = parse(explore(draw, alt="Bars", start=start, a={"low": 1, "high": 5}, b=[2, 4, 8]).html)
    data, image, sliders = tree.data(), tree.all("img")[0], tree.all("input")
    assert data["start"] == frame and image["alt"] == data["alts"][frame]
    assert "".join(s["value"] for s in sliders) == positions
    assert [s["aria-valuetext"] for s in sliders] == [w[int(p)] for w, p in zip(data["words"], positions, strict=True)]
    assert heights(frames(tree)[frame], 2) == [[1, 5][int(positions[0])], [2, 4, 8][int(positions[1])]]


def test_the_page_without_scripts_shows_the_start(parse):
    tree = parse(explore(draw, alt="Bars", start={"a": 5}, caption="A caption", a=[1, 5]).html)
    controls = next(a for t, a in tree.elements if a.get("class") == "oral4-controls")
    assert "hidden" in controls  # the script shows them
    assert "A: 5" not in tree.text("p") and "a: 5" in tree.text("p")
    assert [t for t, _ in tree.elements].index("noscript") and tree.text("figcaption") == "A caption"
    image = tree.all("img")[0]
    assert (image["width"], image["height"]) == ("144", "96")  # 1.5 by 1 inches
    assert not [a for _, a in tree.elements if "id" in a or "autoplay" in a]
    places = [a[name] for _, a in tree.elements for name in ("src", "href") if name in a]
    assert places and all(place.startswith("data:image/webp;base64,") for place in places)


def test_alt_can_be_a_function(parse):
    html = explore(draw, alt=lambda a: f"A bar of height {a}", a=[1, 5]).html
    assert parse(html).data()["alts"] == ["A bar of height 1", "A bar of height 5"]


@pytest.mark.parametrize("play", [False, True, "b"])
def test_play(parse, play):
    buttons = parse(explore(draw, alt="Bars", play=play, interval=300, a=[1], b=[2, 3]).html).all("button")
    assert [b["data-play"] for b in buttons] == {False: [], True: ["0"], "b": ["1"]}[play]
    assert all(b["type"] == "button" for b in buttons)


def test_every_text_is_escaped(parse):
    html = explore(draw, alt=NASTY, caption=NASTY, start={"a_b": NASTY}, a_b={NASTY: 1, "x": 2}).html
    tree = parse(html)
    assert tree.text("figcaption") == NASTY
    assert NASTY in tree.all("img")[0]["alt"] and tree.all("input")[0]["aria-valuetext"] == NASTY
    assert len(tree.all("img")) == 1 and len(tree.all("script")) == 2
    assert "alert(1)</script>" not in html
    assert "a b" in tree.text("span")


def test_the_same_call_gives_the_same_bytes():
    assert explore(draw, alt="Bars", a=[1, 2]).html == explore(draw, alt="Bars", a=[1, 2]).html


def test_values_need_not_be_comparable(parse):
    arrays = {"ones": np.ones(3), "zeros": np.zeros(3)}
    tree = parse(explore(lambda which: draw(n=which.sum()), alt="Bars", which=arrays, start={"which": "zeros"}).html)
    assert tree.data()["start"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no setting"),
        ({"a": []}, "a has no value"),
        ({"a": range(MAX_FRAMES + 1)}, r"61 = 61 frames; at most 60.*fewer values.*live=True"),
        ({"a": range(8), "b": range(8)}, r"8 x 8 = 64 frames"),
        ({"a": [1], "start": {"b": 1}}, r"start names \['b'\]"),
        ({"a": [1, 2], "start": {"a": 3}}, r"start\['a'\]=3 is none of 1, 2"),
        ({"a": [1], "play": "c"}, r"play='c' is none of the settings \['a'\]"),
        ({"a": [1], "interval": 10}, "interval=10"),
        ({"a": [1], "alt": "  "}, "alt is empty"),
        ({"a": [1], "alt": lambda a: ""}, "alt is empty"),
    ],
)
def test_wrong_arguments_are_refused_before_drawing(options, message):
    def never(**settings):
        raise AssertionError("drawn")

    with pytest.raises(ValueError, match=message):
        explore(never, **{"alt": "Bars", **options})


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="captoin='x' is no sequence"):
        explore(draw, alt="Bars", captoin="x", a=[1])
    with pytest.raises(TypeError, match=r"a=3 is no sequence"):
        explore(draw, alt="Bars", a=3)
    with pytest.raises(TypeError, match=r"returned NoneType for a: 1; return the figure"):
        explore(lambda a: None, alt="Bars", a=[1])
    with pytest.raises(TypeError, match="alt gave int"):
        explore(draw, alt=lambda a: 3, a=[1])


def test_a_failing_drawing_says_for_which_setting():
    with pytest.raises(ZeroDivisionError) as caught:
        explore(lambda step_size: 1 / step_size, alt="x", step_size=[0])
    assert "step size: 0" in caught.value.__notes__[0]


def test_figure_and_axes_may_be_returned_together():
    assert "2 frames" in explore(lambda a: (draw(a=a), None), alt="Bars", a=[1, 2]).text


def test_frames_of_different_size_are_refused():
    def growing(a):
        fig = draw(a=a)
        fig.set_size_inches(1 + a, 1)
        return fig

    with pytest.raises(ValueError, match=r"different sizes \(192 x 96, 288 x 96 dots\)"):
        explore(growing, alt="Bars", a=[1, 2])


def test_frames_that_are_cut_to_their_contents_elsewhere_keep_their_size(parse):
    with plt.rc_context({"savefig.bbox": "tight"}):
        picture = frames(parse(explore(draw, alt="Bars", a=[1]).html))[0]
    assert picture.shape[:2] == (96, 144)


def noise(seed):
    fig = plt.figure(figsize=(6, 6))
    fig.figimage(np.random.default_rng(seed).uniform(size=(576, 576, 3)))
    return fig


def test_too_heavy_frames_are_refused():
    with pytest.raises(ValueError, match=r"6 frames take \d\.\d MB, at most 1\.0 MB.*lower dpi \(now 96\)"):
        explore(noise, alt="Noise", seed=range(6))


def test_rounding_of_colours_is_too_small_to_see():
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4)).astype(np.uint8)
    rgba[..., 3] = 255  # hidden colours may change
    flat = np.repeat(np.repeat(rgba[:4, :4], 16, 0), 16, 1)  # a drawing: large even areas
    back = np.asarray(Image.open(io.BytesIO(_encoder(Image.fromarray(flat))(Image.fromarray(flat)))).convert("RGBA"))
    error = np.abs(back.astype(int) - flat.astype(int)).max()
    assert 0 < error <= 3  # half a step of 63 levels is 2.02, and each rounding adds up to a half


def test_a_frame_of_lines_is_light():
    def lines(phase):
        fig, ax = plt.subplots(figsize=(6.5, 3))
        x = np.linspace(0, 10, 300)
        ax.plot(x, np.sin(x + phase))
        ax.plot(x, np.cos(x + phase))
        return fig

    one, five = (len(explore(lines, alt="x", phase=range(n)).html) for n in (1, 5))
    frame = (five - one) / 4  # in base64
    assert 4_000 < frame < 16_000


class TestLive:
    def test_where_it_is_chosen(self, monkeypatch):
        def kind(**options):
            return type(explore(draw, alt="Bars", a=[1, 2], **options)).__name__

        assert kind() == "Fragment" and kind(live=True) == "VBox"
        monkeypatch.setenv("ORAL4_LIVE", "1")
        assert kind() == "VBox" and kind(live=False) == "Fragment"
        monkeypatch.delenv("ORAL4_LIVE")
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        assert kind() == "VBox"
        monkeypatch.setenv("ORAL4_LIVE", "0")
        assert kind() == "Fragment"
        monkeypatch.setenv("ORAL4_LIVE", "perhaps")
        with pytest.raises(ValueError, match="ORAL4_LIVE='perhaps'"):
            kind()

    def test_it_draws_on_demand_and_says_what_goes_wrong(self, parse):
        drawn = []

        def count(a, b):
            drawn.append((a, b))
            if a == 0:
                raise ValueError("no <zero>")
            return draw(a=a)

        box = explore(
            count, alt="Bars", live=True, caption=NASTY, start={"b": "y"}, a=range(1, -200, -1), b={"x": 7, "y": 8}
        )
        picture, first, second, caption = box.children
        assert drawn == [(1, 8)] and second.index == 1 and first.description == "a"
        assert parse(caption.value).text("p") == NASTY
        assert parse(picture.value).all("img")[0]["alt"] == "Bars. A: 1, b: y."
        first.index = 2
        assert drawn[-1] == (-1, 8) and "A: -1" in picture.value
        first.index = 1
        assert "ValueError: no &lt;zero&gt;" in picture.value and "while drawing a: 0" in picture.value
        first.index = 0
        assert "A: 1" in picture.value and not plt.get_fignums()
