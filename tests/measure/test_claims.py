from __future__ import annotations

import html.parser
from html import unescape
from pathlib import Path

import pytest

import oral4.measure.claims as module
from oral4.errors import DataError
from oral4.measure.claims import (
    CHAPTERS,
    VERDICTS,
    Rule,
    claims_table,
    load_claims,
    parse_claims,
    scoreboard,
)
from oral4.measure.record import Record

CLAIM = """
[[claim]]
id = "C1"
title = "Cost grows <linearly>"
text = "Twice the length, twice the scores."
where = "Section 3.3"
paper = "O(L)"
provenance = "abstract"
page = "pyraformer/03_kernels#cost"
record = "pyraformer/cost-mini"
metric = "slope"
holds = { between = [0.9, 1.1] }
direction = { below = 1.5 }
format = ".2f"
note = "Two cores | no GPU."
"""
SILENT = """
[[claim]]
id = "C2"
title = "Best on electricity"
text = "Lower error than six others."
where = "Table 2"
paper = "0.8 MSE"
provenance = "repository of the authors"
page = "pyraformer/06_results"
reason = "The data are not public."
"""


def record(*values: float) -> Record:
    return Record(
        experiment="pyraformer/cost",
        scale="mini",
        config={},
        seeds=tuple(range(len(values))),
        values={"slope": values, "curve": ((1.0, 2.0),) * len(values)},
        units={"slope": "", "curve": "s"},
        device="AMD EPYC, 2 of 2 cores",
        wall_seconds=90.0,
        peak_memory_bytes=500_000_000,
        date="2026-01-31T12:00:00+00:00",
    )


@pytest.fixture
def answer(monkeypatch):
    """Set what ``load_record`` finds."""

    def set_values(*values: float):
        monkeypatch.setattr(module, "load_record", lambda name: record(*values))

    set_values(1.0, 1.01, 0.99)
    return set_values


def rule(holds: str, direction: str | None = None) -> str:
    text = CLAIM.replace("holds = { between = [0.9, 1.1] }", f"holds = {holds}")
    return text.replace("direction = { below = 1.5 }", f"direction = {direction}" if direction else "")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.0, 1.0), "holds"),  # an interval of width zero
        ((1.1, 1.1, 1.1), "holds"),  # `between` includes its ends
        ((1.0, 1.02, 0.98), "holds"),  # half width 0.05
        ((1.0, 1.1, 0.9), "holds in direction"),  # the mean is right, the interval is wider than the band
        ((1.3, 1.31, 1.29), "holds in direction"),
        ((1.6, 1.7, 1.8), "not shown here"),  # the mean fails, the interval reaches below 1.5
        ((1.6, 1.61, 1.62), "contradicted"),
        ((1.5, 1.5, 1.5), "contradicted"),  # `below` leaves its end out
        ((1.0,), "holds in direction"),  # one seed cannot hold,
        ((9.0,), "not shown here"),  # nor contradict
    ],
)
def test_verdict(answer, values, verdict):
    answer(*values)
    (claim,) = parse_claims(CLAIM, "pyraformer")
    assert claim.verdict() == verdict


@pytest.mark.parametrize(
    ("holds", "direction", "values", "verdict"),
    [
        ("{ above = 2 }", None, (3.0, 3.1, 3.2), "holds"),
        (
            "{ above = 2 }",
            None,
            (2.0, 3.0, 4.0),
            "holds in direction",
        ),  # without `direction` the mean must satisfy `holds`
        ("{ above = 2 }", None, (1.0, 1.1, 1.2), "contradicted"),
        ("{ above = 2 }", "{ above = 1 }", (1.4, 1.5, 1.6), "holds in direction"),
        ("{ below = 2 }", None, (1.0, 1.1, 1.2), "holds"),
        ("{ below = 2 }", None, (3.0, 3.1, 3.2), "contradicted"),
        ("{ between = [1, 2] }", None, (0.5, 0.51, 0.52), "contradicted"),
        ("{ between = [1, 2] }", None, (2.5, 2.51, 2.52), "contradicted"),
        ("{ above = 2 }", None, (2.0, 2.0, 2.0), "contradicted"),  # `above` leaves its end out
    ],
)
def test_verdict_by_each_kind_of_rule(answer, holds, direction, values, verdict):
    answer(*values)
    (claim,) = parse_claims(rule(holds, direction), "pyraformer")
    assert claim.verdict() == verdict


def test_no_record_is_not_shown():
    (claim,) = parse_claims(SILENT, "pyraformer")
    assert claim.verdict() == "not shown here"
    assert claim.why() == "The data are not public."
    assert (claim.ours(), claim.cost()) == ("not measured", "")


def test_words(answer):
    (claim,) = parse_claims(CLAIM, "pyraformer")
    assert claim.ours() == "1.00 [0.98, 1.02]"
    assert claim.cost() == "mini: 3 seeds, 1.5 min, 0.50 GB, AMD EPYC, 2 of 2 cores"
    assert claim.why() == "Holds if the whole interval is between 0.9 and 1.1, in direction if the mean is below 1.5."
    answer(1.6, 1.7, 1.8)
    assert parse_claims(CLAIM, "pyraformer")[0].why().endswith("is shown, for the interval is too wide.")
    answer(9.0)
    assert parse_claims(CLAIM, "pyraformer")[0].why().endswith("is shown, for one seed gives no interval.")


def test_link():
    (claim,) = parse_claims(SILENT, "pyraformer")
    assert claim.link() == "../pyraformer/06_results.html"


def test_link_to_a_place_in_a_page(answer):
    (claim,) = parse_claims(CLAIM, "pyraformer")
    assert claim.link(".") == "./pyraformer/03_kernels.html#cost"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CLAIM.replace("note =", "remark ="), "claim C1: unknown key remark"),
        (CLAIM.replace('title = "Cost grows <linearly>"', ""), "claim C1: no title"),
        (CLAIM.replace('metric = "slope"', ""), "claim C1: no metric"),
        (CLAIM.replace("holds = { between = [0.9, 1.1] }", ""), "claim C1: no holds"),
        (SILENT.replace("reason =", "note ="), "claim C2: no record that answers it, and no reason"),
        (SILENT + 'metric = "slope"\n', "claim C2: reason says that nothing was measured, yet there is metric"),
        (SILENT.replace("The data are not public.", "  "), "claim C2: reason = '  '; a text that is not empty"),
        (SILENT.replace('"Table 2"', "2"), "claim C2: where = 2; a text"),
        (SILENT.replace('id = "C2"', 'id = "2."'), r"claim 2\.: id = '2\.'"),
        (SILENT.replace('id = "C2"', "id = 2"), "claim 1: id = 2; a text"),
        (SILENT.replace("06_results", "06_results.html"), "claim C2: page = 'pyraformer/06_results.html'"),
        (CLAIM + CLAIM, "more than one claim C1"),
        (CLAIM.replace('metric = "slope"', 'metric = "speed"'), "claim C1: .*no metric 'speed'; it has slope, curve"),
        (CLAIM.replace('metric = "slope"', 'metric = "curve"'), "claim C1: metric curve of .* is a list"),
        (CLAIM.replace('".2f"', '".2q"'), "claim C1: format = '.2q' does not format"),
        (rule("{ between = [1.1, 0.9] }"), "claim C1: between = .* is empty"),
        (rule("{ between = [1.1] }"), "claim C1: between = .*two numbers"),
        (rule("{ between = 1.1 }"), "claim C1: between = .*two numbers"),
        (rule("{ below = [1.1] }"), "claim C1: below = .*not a finite number"),
        (rule("{ below = true }"), "claim C1: below = .*not a finite number"),
        (rule("{ below = inf }"), "claim C1: below = .*not a finite number"),
        (rule("{ under = 1 }"), "claim C1: .* is no rule; write"),
        (rule("{ below = 1, above = 0 }"), "claim C1: .* is no rule; write"),
        (rule("1"), "claim C1: 1 is no rule; write"),
        (rule("{ below = 2 }", "{ below = 1.5 }"), r"claim C1: holds \(below 2\) must lie within direction"),
        (rule("{ between = [1, 2] }", "{ below = 2 }"), "must lie within direction"),  # 2 itself is not below 2
        (rule("{ above = 2 }", "{ between = [1, 9] }"), "must lie within direction"),
        ("claim = 1", "must hold .*claim.* tables"),
        ("", "nothing else; it has none"),
        (SILENT + "[other]\nx = 1", "nothing else; it has other"),
        ("[[claim", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_names_the_claim(answer, text, words):
    with pytest.raises(DataError, match=words) as caught:
        parse_claims(text, "pyraformer")
    assert str(caught.value).startswith("pyraformer/claims.toml")


def test_a_missing_record_names_the_claim():
    with pytest.raises(DataError, match=r"claim C1: there is no record 'pyraformer/absent-mini'"):
        parse_claims(CLAIM.replace("cost-mini", "absent-mini"), "pyraformer")


def test_an_unknown_chapter_names_a_close_one():
    with pytest.raises(DataError, match=r"there is no chapter 'pyraformr'; there is pyraformer$"):
        load_claims("pyraformr")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_claims_that_ship_are_valid(chapter):
    claims = load_claims(chapter)
    written = (Path(module.__file__).parents[1] / chapter / "claims.toml").exists()
    assert bool(claims) == written
    assert {claim.verdict() for claim in claims} <= set(VERDICTS)


class Tree(html.parser.HTMLParser):
    """Collects the tags, their attributes and the text; fails on a tag that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def two(answer, monkeypatch):
    """Give the chapter Forecasting two claims, one of them contradicted, and the others none."""
    answer(1.6, 1.61, 1.62)
    claims = parse_claims(CLAIM + SILENT, "pyraformer")

    def load(chapter=None):
        return claims if chapter in (None, "pyraformer") else ()

    monkeypatch.setattr(module, "load_claims", load)
    return claims


def test_html_table_is_accessible_and_filterable(two):
    tree = Tree(claims_table("pyraformer")._repr_html_())
    assert len(tree.all("caption")) == 1
    assert [th["scope"] for th in tree.all("th")] == ["col"] * 5 + ["row"] * 2
    assert tree.all("table")[0]["class"] == "oral4-claims"
    rows = [tr for tr in tree.all("tr") if "id" in tr]
    assert rows == [
        {"id": "claim-pyraformer-C1", "data-chapter": "pyraformer", "data-verdict": "contradicted"},
        {"id": "claim-pyraformer-C2", "data-chapter": "pyraformer", "data-verdict": "not-shown-here"},
    ]
    region = tree.all("div")[0]
    assert region["role"] == "region" and region["aria-label"] and region["tabindex"] == "0"
    assert "✕" in tree.text and " contradicted" in tree.text  # a shape and a word, not colour alone
    assert "Cost grows <linearly>" in tree.text  # escaped, hence text and no tag
    assert [a["href"] for a in tree.all("a")] == [
        "../pyraformer/03_kernels.html#cost",
        "../pyraformer/06_results.html",
    ]


def test_html_table_links_records_where_they_are_served(two):
    tree = Tree(claims_table("pyraformer", root=".", records="./records/")._repr_html_())
    assert "./records/pyraformer/cost-mini.json" in [a["href"] for a in tree.all("a")]


def test_negative_and_missing_outcomes_are_printed_like_the_others(two):
    for text in (str(claims_table("pyraformer")), claims_table("pyraformer")._repr_markdown_()):
        assert "✕ contradicted" in text and "1.61 [1.59, 1.63]" in text
        assert "○ not shown here" in text and "The data are not public." in text


def test_markdown_table_has_five_cells_a_row(two):
    lines = claims_table("pyraformer")._repr_markdown_().splitlines()[2:]
    assert len(lines) == 4
    for line in lines:
        assert line.replace("\\|", "").count("|") == 6  # the bar in the note is escaped


def test_a_chapter_without_claims_says_so(two):
    table = claims_table("flan")
    for text in (str(table), table._repr_markdown_(), Tree(table._repr_html_()).text):
        assert text.startswith("Instructions") and text.rstrip(".").endswith("not written yet")


def test_scoreboard_counts_and_shows_every_chapter(two):
    board = scoreboard()
    assert board.counts() == {"holds": 0, "holds in direction": 0, "not shown here": 1, "contradicted": 1}
    tree = Tree(board._repr_html_())
    for title in CHAPTERS.values():
        assert title in tree.text
    assert tree.text.count("not written yet") == 5
    targets = {a["href"] for a in tree.all("a")}
    assert {"#claim-pyraformer-C1", "#claim-pyraformer-C2", "./pyraformer/06_results.html"} <= targets
    assert (
        unescape(board._repr_html_()).count("Cost grows <linearly>: contradicted") == 2
    )  # title and label of the mark
    assert "Forecasting: ✕ ○" in str(board) and "- Forecasting: ✕ ○" in board._repr_markdown_()


def test_scoreboard_of_nothing(monkeypatch):
    monkeypatch.setattr(module, "load_claims", lambda chapter=None: ())
    assert set(scoreboard().counts().values()) == {0}
    assert Tree(scoreboard()._repr_html_()).text.count("not written yet") == 6


def test_rule_in_words():
    assert [str(Rule.parse(table)) for table in ({"below": 1.5}, {"above": 2}, {"between": [0.9, 1.1]})] == [
        "below 1.5",
        "above 2",
        "between 0.9 and 1.1",
    ]
