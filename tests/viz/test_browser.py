"""Sliders, players and molecules in a browser: from disk, without a network, by keyboard, in both themes."""

import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest

from oral4.exercises import check
from oral4.viz import style
from oral4.viz.audio import player, players
from oral4.viz.explore import explore
from oral4.viz.molecule import molecule

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.site, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

PAGE = """<!doctype html><html lang="en" data-theme="{theme}"><head><meta charset="utf-8"><title>Demo</title>
<meta name="viewport" content="width=device-width"><style>body{{background:{ground};color:{ink};margin:0 16px}}
main{{max-width:624px;margin:auto}}</style></head><body><main><h1>Demo</h1>{body}</main></body></html>"""


def body() -> str:
    """Every component; the figure stands twice, since two copies must not disturb each other."""

    def draw(noise, steps):
        fig, ax = style.figure(height=2)
        ax.plot([0, 1], [noise, steps], label="a line")
        ax.set(ylim=(0, 4))
        style.label_lines(ax)
        return fig

    with plt.rc_context():
        style.use()
        figure = explore(
            draw, alt=lambda noise, steps: f"A line from {noise} to {steps}", caption="A line.",
            play="steps", interval=60, start={"noise": "some"},
            noise={"none": 0, "some": 1, "much": 2}, steps=[1, 2, 3, 4],
        )  # fmt: skip
    tone = 0.1 * np.sin(2 * np.pi * 440 * np.arange(12_000) / 16_000)
    row = players([player(tone, 16_000, label=f"Voice {i}", mel=np.eye(8), transcript="Ah.") for i in range(4)])
    atoms, bonds = ["C", "O", "N"], [(0, 1, 2), (0, 2, 1.5)]
    shape = np.array([[0.0, 0, 0], [1.2, 0, 0], [-0.6, 1.1, 0]])
    path = np.stack([shape * 4, shape * 2, shape])
    views = [molecule(atoms, path, bonds, alt="Three atoms", play=True), molecule(atoms, shape, bonds, alt="At rest")]
    outcomes = [check(1, 1), check(None, 1), check(2, 1)]
    return "".join(part._repr_html_() for part in [figure, figure, row, *views, *outcomes])


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, markup = tmp_path_factory.mktemp("pages"), body()
    for theme, ground, ink in (("light", "#fff", "#222"), ("dark", "#121212", "#ddd")):
        text = PAGE.format(theme=theme, ground=ground, ink=ink, body=markup)
        (folder / f"{theme}.html").write_text(text, encoding="utf8")
    return folder


@pytest.fixture
def visit(browser, files):
    """Open the page; at the end nothing may have gone wrong on it, and nothing been asked from elsewhere."""
    contexts, troubles = [], []

    def opened(theme="light", **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or troubles.append(request.url))
        page.goto((files / f"{theme}.html").as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def state(figure):
    """What a reader sees of a figure with sliders."""
    image, slider = figure.locator("img"), figure.locator("input").nth(1)
    words = figure.locator("output").nth(1).inner_text()
    return image.get_attribute("alt"), image.get_attribute("src"), slider.get_attribute("aria-valuetext"), words


def test_sliders_move_by_keyboard_each_copy_alone(visit):
    page = visit()
    figure, copy = page.locator(".oral4-explore").all()
    start = state(figure)
    assert start[0] == "A line from 1 to 1" and start[2] == start[3] == "1"
    page.keyboard.press("Tab")  # the button
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    seen = [start]
    for key, value in (("ArrowRight", 2), ("End", 4), ("ArrowLeft", 3), ("Home", 1)):
        page.keyboard.press(key)
        seen.append(state(figure))
        assert seen[-1][0] == f"A line from 1 to {value}" and seen[-1][2] == seen[-1][3] == str(value)
    assert len({picture for _, picture, *_ in seen}) == 4 and seen[-1] == start
    assert state(copy) == start
    figure.locator("input").first.focus()
    page.keyboard.press("End")
    assert figure.locator("output").first.inner_text() == "much" and state(figure)[0] == "A line from 2 to 1"
    # A screen reader hears the new description once the slider rests.
    page.wait_for_function("document.querySelector('[role=status]').textContent === 'A line from 2 to 1'")
    assert all(box["height"] >= 44 for box in (s.bounding_box() for s in figure.locator("input, button").all()))


def test_play_runs_once_through_and_can_be_stopped(visit):
    page = visit()
    page.clock.install()
    page.reload()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)
    figure = page.locator(".oral4-explore").first
    button, before = figure.locator("button"), state(figure)
    page.clock.run_for(1000)
    assert state(figure) == before and button.inner_text() == "Play"  # nothing moves by itself
    button.click()
    for value in (2, 3, 4):
        assert button.inner_text() == "Pause"
        page.clock.run_for(60)
        assert state(figure)[2] == str(value)
    page.clock.run_for(60)
    assert button.inner_text() == "Play" and state(figure)[2] == "4"
    button.click()  # starts again from the first frame
    assert state(figure)[2] == "1"
    page.clock.run_for(60)
    button.click()
    assert button.inner_text() == "Play"
    page.clock.run_for(1000)
    assert state(figure)[2] == "2"


def test_with_less_motion_play_becomes_a_step(visit):
    page = visit(reduced_motion="reduce")
    figure = page.locator(".oral4-explore").first
    button = figure.locator("button")
    assert button.inner_text() == "Next"
    for value in (2, 3, 4, 1):
        button.click()
        assert state(figure)[2] == str(value)
    page.wait_for_timeout(200)
    assert state(figure)[2] == "1"


def test_molecules_turn_and_step(visit):
    page = visit(device_scale_factor=2)
    view = page.locator(".oral4-molecule").first
    canvas = view.locator("canvas")

    def drawn():
        return canvas.evaluate("c => c.toDataURL()")

    size = canvas.evaluate("c => [c.width, c.height, c.clientWidth, c.clientHeight]")
    assert size[:2] == [2 * size[2], 2 * size[3]]
    first = drawn()
    canvas.focus()
    for key, back in (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown")):
        page.keyboard.press(key)
        assert drawn() != first
        page.keyboard.press(back)
        assert drawn() == first
    page.keyboard.press("+")
    assert drawn() != first
    view.get_by_role("button", name="Reset view").click()
    assert drawn() == first
    view.get_by_role("button", name="Larger").click()
    larger = drawn()
    view.get_by_role("button", name="Smaller").click()
    assert larger != first
    page.keyboard.press("Control+ArrowLeft")
    canvas.hover()
    page.mouse.down()
    page.mouse.move(10, 10)
    page.mouse.up()
    dragged = drawn()
    assert dragged != first
    page.mouse.move(200, 200)  # the button is up
    assert drawn() == dragged
    assert canvas.get_attribute("aria-label") == "Three atoms. Step: 3."
    view.locator("input").focus()
    page.keyboard.press("Home")
    assert canvas.get_attribute("aria-label") == "Three atoms. Step: 1." and drawn() != dragged


def test_players_hold_sound_and_take_turns(visit):
    page = visit()
    page.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.duration)")
    lengths = "[...document.querySelectorAll('audio')].map(a => a.duration)"
    assert page.evaluate(lengths) == pytest.approx([0.75] * 4, abs=1e-3)
    playing = "[...document.querySelectorAll('audio')].map(a => !a.paused)"
    assert page.evaluate(playing) == [False] * 4
    page.evaluate("document.querySelectorAll('audio')[0].play()")
    page.evaluate("document.querySelectorAll('audio')[2].play()")
    page.wait_for_function("document.querySelectorAll('audio')[0].paused")
    assert not page.evaluate("document.querySelectorAll('audio')[0].ended")  # stopped, not run out
    assert page.evaluate(playing)[:2] == [False, False]
    heights = page.evaluate("[...document.querySelectorAll('.oral4-player')].map(p => p.offsetHeight)")
    assert len(set(heights)) == 1


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_is_accessible(visit, theme, width):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(theme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plate = page.locator(".oral4-explore img").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert plate == ("rgb(0, 0, 0)" if theme == "dark" else "rgba(0, 0, 0, 0)")
    found = Axe().run(page).response["violations"]
    assert found == [], [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found]


def test_print_and_no_script_show_the_start(visit):
    page = visit()
    page.emulate_media(media="print")
    for hidden in (".oral4-controls", ".oral4-player audio", ".oral4-hint"):
        assert not any(element.is_visible() for element in page.locator(hidden).all()), hidden
    assert page.locator(".oral4-explore img").first.is_visible()
    assert page.get_by_text("to be heard on the page").first.is_visible()
    page = visit(java_script_enabled=False)
    figure = page.locator(".oral4-explore").first
    assert figure.locator("img").get_attribute("alt") == "A line from 1 to 1"
    assert figure.locator("img").is_visible() and not figure.locator("input").first.is_visible()
    assert "need JavaScript" in page.locator("noscript").first.text_content()
