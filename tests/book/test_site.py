"""The built site in a browser: offline, both themes, wide and narrow, accessible, without an error on the console."""

import functools
import http.server
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import check_site
import pytest
from notebook import address

SITE = Path(__file__).parents[2] / "_build/html"
PAGES = sorted(
    p.relative_to(SITE).as_posix()
    for p in SITE.rglob("*.html")
    # the page for a missing address links absolutely; the one at the root leads on at once and is tested by itself
    if not {"_static", "_modules"} & set(p.parts) and p.relative_to(SITE).as_posix() not in ("404.html", "index.html")
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
pytestmark = pytest.mark.site
# Faults of the theme that its templates hold; everything else fails.
THEME_FAULTS = {
    "label-content-name-mismatch",  # the search button's label is longer than its text
    "region",  # the theme puts its skip link and its announcement outside any landmark
}


def test_the_site_is_built():
    assert (SITE / "index.html").exists() and PAGES, "run `make book` first (`make test` does)"


def test_no_broken_link_no_outside_load_no_heavy_page():
    bad, pages, links = check_site.problems(SITE, address()["site_path"])
    assert bad == [] and pages > 10 and links > 500


def test_what_stands_beside_the_pages():
    listing = (SITE / "llms.txt").read_text()
    assert listing.count("\n- [") > 10 and address()["repo_url"] in listing
    assert (SITE / "404.html").exists() and (SITE / "searchindex.js").exists()
    page = (SITE / "nbs/pyraformer/01_graph.html").read_text()
    for name in ("og:title", "og:description", "og:url", "og:image"):
        assert f'property="{name}"' in page
    assert 'rel="icon"' in page and "colab.research.google.com" in page


@pytest.fixture(scope="session")
def server():
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(SITE))
    handler.log_message = lambda *a: None

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page; gather what goes wrong and what it asks of other hosts."""
    opened = []

    def open_page(url, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        page.troubles = []
        page.on("pageerror", lambda error: page.troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: page.troubles.append(f"console: {message.text}") if message.type == "error" else None,
        )
        page.on("requestfailed", lambda request: page.troubles.append(f"failed: {request.url}"))
        page.on(
            "request",
            lambda request: (
                page.troubles.append(f"asks {request.url}")
                if urlsplit(request.url).hostname not in (None, "127.0.0.1")
                else None
            ),
        )
        page.goto(url, wait_until="load")
        return page

    yield open_page
    for context in opened:
        context.close()


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


TOO_WIDE = """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.tagName + '.' + e.className).slice(0, 5)"""


# The colours of code, formulas and entries of the reference come from the theme, the same on every page, and to measure
# each of thousands of coloured words takes a minute a page. So two pages are measured whole, the others without them.
WHOLE = ("nbs/pyraformer/02_attention.html", "nbs/api/measure.html")
ALIKE = [["mjx-container"], [".highlight"], ["dl.py ~ dl.py"]]
NARROW = ["scrollable-region-focusable"]
"""The rule whose outcome depends on the width of the window."""


def violations(page, name: str, rules: list[str] | None = None) -> list[str]:
    """Return what axe finds fault with: by all rules or by those named, and colours of text against their ground."""
    from axe_playwright_python.sync_playwright import Axe

    chosen = {"rules": {"color-contrast": {"enabled": False}}} if rules is None else {"runOnly": rules}
    runs = [(None, chosen), (None if name in WHOLE else {"exclude": ALIKE}, {"runOnly": ["color-contrast"]})]
    found = []
    for context, options in runs:
        response = Axe().run(page, context=context, options=options | {"resultTypes": ["violations"]}).response
        found += response["violations"]
    return [f"{v['id']} ({v['impact']}): {v['nodes'][0]['html'][:200]}" for v in found if v["id"] not in THEME_FAULTS]


@browser_needed
@pytest.mark.parametrize("name", PAGES)
def test_page(name, visit, server):
    wide = visit(f"{server}/{name}")
    wide.wait_for_timeout(300)
    assert wide.troubles == []
    assert overflow(wide) <= 0
    assert violations(wide, name) == []
    dark = visit(f"{server}/{name}", width=375, scheme="dark")
    dark.evaluate("document.documentElement.dataset.mode = 'dark'; document.documentElement.dataset.theme = 'dark'")
    dark.wait_for_timeout(300)
    assert dark.troubles == []
    assert overflow(dark) <= 0, dark.evaluate(TOO_WIDE)
    assert violations(dark, name, NARROW) == []


@browser_needed
def test_axe_finds_a_fault_in_each_of_its_runs(visit, server):
    page = visit(f"{server}/nbs/setup.html")
    page.evaluate("""() => {
        const article = document.querySelector('article');
        article.insertAdjacentHTML('afterbegin', '<p style="color: #777; background: #888">pale</p><img src="">');
    }""")
    found = " ".join(violations(page, "nbs/setup.html"))
    assert "color-contrast" in found and "image-alt" in found


def test_the_root_leads_to_the_first_page():
    assert 'url=nbs/index.html"' in (SITE / "index.html").read_text()


@browser_needed
def test_search_finds_pages_from_disk(visit):
    page = visit((SITE / "search.html").as_uri() + "?q=attention")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert page.locator("#search-results li a").count() > 1
    assert not [t for t in page.troubles if "asks" in t]


@browser_needed
def test_theme_switch_changes_the_ground(visit):
    page = visit((SITE / "nbs/index.html").as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    for _ in range(3):
        page.locator("button.theme-switch-button:visible").first.click()
        if page.evaluate(ground) != before:
            break
    assert page.evaluate(ground) != before
    assert page.troubles == []


@browser_needed
def test_explorables_answer_the_keyboard(visit):
    seen = 0
    for name in PAGES:
        if "oral4-explore" not in (SITE / name).read_text():
            continue
        page = visit((SITE / name).as_uri())
        for figure in page.locator(".oral4-explore").all():
            slider = figure.locator("input[type=range]").first
            slider.scroll_into_view_if_needed()
            state = "e => [e.value, e.getAttribute('aria-valuetext')]"
            before, picture = slider.evaluate(state), figure.locator("img").first.get_attribute("src")
            slider.focus()
            page.keyboard.press("Home")
            page.keyboard.press("End")
            page.wait_for_timeout(50)
            after = slider.evaluate(state)
            page.keyboard.press("Home")
            page.wait_for_timeout(50)
            assert slider.evaluate(state) != after, f"{name}: the slider does not move"
            assert after[1], f"{name}: the value is not said in words"
            assert picture and before
            seen += 1
        assert page.troubles == []
    assert seen >= 2
