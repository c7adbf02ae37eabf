"""Every claim of a paper beside what was measured: ``oral4/<chapter>/claims.toml``, verdicts, tables.

The file is a list of ``[[claim]]`` tables. A claim that an experiment answers::

    [[claim]]
    id = "C1"                                   # unique in the chapter; a letter, then letters, digits or "-"
    title = "Cost grows linearly with length"   # one line
    text = "Pyramidal attention needs a number of scores that is proportional to the length."  # our own words
    where = "Section 3.3, Proposition 1"        # the place in the paper
    paper = "O(L)"                              # the paper's figure, as text
    provenance = "abstract of the paper"        # how we know the paper's figure
    page = "pyraformer/03_kernels"              # page of the book, no suffix; "#anchor" allowed: links to the cell
    record = "pyraformer/cost-mini"             # the record that answers, oral4/records/<record>.json
    metric = "slope_pyramid"                    # a metric of that record with one number a seed
    holds = { between = [0.9, 1.1] }            # decided on the whole 95 % interval
    direction = { below = 1.5 }                 # decided on the mean; optional, the same rule as `holds` if absent
    format = ".2f"                              # how our figure is printed; optional, ".3g"
    note = "Two cores; the GPU is not shown."   # optional, printed under the claim

A claim that nothing here answers has a ``reason`` in place of the record, its metric, the rules and the format::

    [[claim]]
    id = "C7"
    title = "..."
    text = "..."
    where = "Table 2"
    paper = "0.808 MSE"
    provenance = "repository of the authors, README"
    page = "pyraformer/06_results"
    reason = "The data set is not public."      # why it is not shown here

A rule is a table with exactly one key: ``below = x`` (value < x), ``above = x`` (value > x) or ``between = [a, b]``
(a <= value <= b). What satisfies ``holds`` must satisfy ``direction`` too. The verdict, in this order:

================== ==================================================================================
holds              every value of the 95 % interval over seeds satisfies ``holds``
holds in direction the mean satisfies ``direction``
contradicted       no value of the 95 % interval satisfies ``direction``
not shown here     all else: no record, or the mean fails and the interval is too wide (or is missing,
                   for one seed has none) to contradict
================== ==================================================================================

So the two strong verdicts need an interval, the two weak ones do not, and none is easier to get for us than against us.
"""

from __future__ import annotations

import dataclasses
import difflib
import html
import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from oral4.errors import DataError
from oral4.measure.record import Quantity, Record, load_record

__all__ = [
    "CHAPTERS",
    "VERDICTS",
    "Claim",
    "ClaimsTable",
    "Rule",
    "Scoreboard",
    "claims_table",
    "load_claims",
    "parse_claims",
    "scoreboard",
]

CHAPTERS = {
    "diffvc": "Voices",
    "geodiff": "Molecules",
    "pyraformer": "Forecasting",
    "flan": "Instructions",
    "dp": "Privacy",
    "milan": "Describing neurons",
}
"""Chapter to title, in the order of the book."""

VERDICTS = {"holds": "●", "holds in direction": "◐", "not shown here": "○", "contradicted": "✕"}
"""Verdict to its shape, from the strongest support to the opposite."""

_ALWAYS = ("id", "title", "text", "where", "paper", "provenance", "page")
_MEASURED = ("record", "metric", "holds")
_OPTIONAL = ("direction", "format", "note", "reason")
_RULES = ("holds", "direction")
_PARSED = ("record", *_RULES)
_ID = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
_PAGE = re.compile(r"[A-Za-z0-9_]+(?:/[A-Za-z0-9_]+)*(?:#[A-Za-z0-9_-]+)?")


@dataclass(frozen=True)
class Rule:
    """The numbers that satisfy a rule: those between two ends, the ends included if ``closed``."""

    low: float
    high: float
    closed: bool

    @classmethod
    def parse(cls, table: Any) -> Rule:
        """Return the rule ``{below = x}``, ``{above = x}`` or ``{between = [a, b]}``; ValueError for anything else."""
        if not isinstance(table, Mapping) or len(table) != 1 or next(iter(table)) not in ("below", "above", "between"):
            raise ValueError(f"{table!r} is no rule; write {{ below = x }}, {{ above = x }} or {{ between = [a, b] }}")
        ((kind, bound),) = table.items()
        ends = bound if kind == "between" else [bound]
        if not isinstance(ends, list) or len(ends) != (2 if kind == "between" else 1):
            raise ValueError(f"between = {bound!r}; two numbers are needed, [a, b]")
        for end in ends:
            if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
                raise ValueError(f"{kind} = {bound!r} holds something that is not a finite number")
        if kind == "between":
            if ends[0] > ends[1]:
                raise ValueError(f"between = {bound!r} is empty; the smaller number comes first")
            return cls(ends[0], ends[1], True)
        return cls(-math.inf, ends[0], False) if kind == "below" else cls(ends[0], math.inf, False)

    def admits(self, value: float) -> bool:
        """Return whether a value satisfies the rule."""
        return self.low <= value <= self.high if self.closed else self.low < value < self.high

    def excludes(self, low: float, high: float) -> bool:
        """Return whether no value from ``low`` to ``high`` satisfies the rule."""
        return high < self.low or self.high < low if self.closed else high <= self.low or self.high <= low

    def implies(self, other: Rule) -> bool:
        """Return whether all that satisfies this rule satisfies the other too."""
        if self.closed:
            return other.admits(self.low) and other.admits(self.high)
        return other.low <= self.low and self.high <= other.high

    def __str__(self) -> str:
        if self.closed:
            return f"between {self.low:g} and {self.high:g}"
        return f"below {self.high:g}" if self.low == -math.inf else f"above {self.low:g}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of a paper, with the record that answers it or the reason why none does."""

    chapter: str
    id: str
    title: str
    text: str
    where: str
    paper: str
    provenance: str
    page: str
    record: Record | None = None
    metric: str = ""
    holds: Rule | None = None
    direction: Rule | None = None
    format: str = ".3g"
    note: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        """Name that is unique in the book, ``<chapter>-<id>``."""
        return f"{self.chapter}-{self.id}"

    def measured(self) -> Quantity | None:
        """Return our measurement, None if there is none."""
        return None if self.record is None else self.record[self.metric]

    def verdict(self) -> str:
        """Return one of :data:`VERDICTS`, decided as the head of this module says."""
        ours: Any = self.measured()  # one number a seed, which parse_claims has checked
        if ours is None or self.holds is None or self.direction is None:
            return "not shown here"
        has_interval = ours.low is not None
        if has_interval and self.holds.admits(ours.low) and self.holds.admits(ours.high):
            return "holds"
        if self.direction.admits(ours.mean):
            return "holds in direction"
        return "contradicted" if has_interval and self.direction.excludes(ours.low, ours.high) else "not shown here"

    def why(self) -> str:
        """Return the rule in words, or the reason why nothing was measured."""
        ours = self.measured()
        if ours is None:
            return self.reason
        words = f"Holds if the whole interval is {self.holds}"
        if self.direction != self.holds:
            words += f", in direction if the mean is {self.direction}"
        if self.verdict() == "not shown here":
            cause = "one seed gives no interval" if ours.low is None else "the interval is too wide"
            words += f"; neither that nor the opposite is shown, for {cause}"
        return f"{words}."

    def ours(self) -> str:
        """Return our figure: mean, 95 % interval, unit; ``"not measured"`` without a record."""
        ours = self.measured()
        return "not measured" if ours is None else ours.text(self.format)

    def cost(self) -> str:
        """Return scale, seeds, time, memory and hardware of our figure; empty without a record."""
        return "" if self.record is None else f"{self.record.scale}: {self.record.cost()}"

    def link(self, root: str = "..") -> str:
        """Return the address of the page, or of the place in it, as seen from a page ``root`` below the book's root."""
        page, mark, anchor = self.page.partition("#")
        return f"{root}/{page}.html{mark}{anchor}"


def load_claims(chapter: str | None = None) -> tuple[Claim, ...]:
    """Return the claims of a chapter, or of all; a chapter without ``claims.toml`` is not written yet and has none.

    Raises
    ------
    DataError
        If the chapter is unknown, or the file is not as the head of this module says; the error names the claim.
    """
    if chapter is None:
        return tuple(claim for name in CHAPTERS for claim in load_claims(name))
    if chapter not in CHAPTERS:
        near = difflib.get_close_matches(chapter, CHAPTERS, n=1) or CHAPTERS
        raise DataError(f"there is no chapter {chapter!r}; there is {', '.join(near)}")
    source = files("oral4") / chapter / "claims.toml"
    return parse_claims(source.read_text(encoding="utf-8"), chapter) if source.is_file() else ()


def parse_claims(text: str, chapter: str) -> tuple[Claim, ...]:
    """Return the claims that a TOML text holds; raises DataError as :func:`load_claims` does."""
    where = f"{chapter}/claims.toml"
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{where} is not TOML: {error}") from error
    tables = content.pop("claim", None)
    if content or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        odd = f"it has {', '.join(content)}" if content else "it has none"
        raise DataError(f"{where} must hold [[claim]] tables and nothing else; {odd}")
    claims = [_parse_claim(table, chapter, f"{where}, claim {i}") for i, table in enumerate(tables, start=1)]
    twice = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise DataError(f"{where}: more than one claim {', '.join(twice)}; an id must be unique in its chapter")
    return tuple(claims)


def _parse_claim(table: Mapping[str, Any], chapter: str, where: str) -> Claim:
    if isinstance(table.get("id"), str):
        where = f"{chapter}/claims.toml, claim {table['id']}"
    try:
        return _claim(table, chapter)
    except (ValueError, DataError) as error:
        raise DataError(f"{where}: {error}") from error


def _claim(table: Mapping[str, Any], chapter: str) -> Claim:
    unknown = sorted(set(table) - {*_ALWAYS, *_MEASURED, *_OPTIONAL})
    needed = (*_ALWAYS, "reason") if "reason" in table else (*_ALWAYS, *_MEASURED)
    missing = sorted(set(needed) - set(table))
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}")
    if missing and set(missing) >= set(_MEASURED):
        raise ValueError("no record that answers it, and no reason why there is none; give one of the two")
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    if "reason" in table and (odd := sorted({*_MEASURED, "direction", "format"} & set(table))):
        raise ValueError(f"reason says that nothing was measured, yet there is {', '.join(odd)}")
    for key, value in table.items():
        if key not in _RULES and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{key} = {value!r}; a text that is not empty is needed")
    if not _ID.fullmatch(table["id"]):
        raise ValueError(f"id = {table['id']!r}; use a letter, then letters, digits or -")
    if not _PAGE.fullmatch(table["page"]):
        raise ValueError(f"page = {table['page']!r}; write chapter/page or chapter/page#anchor, without suffix")
    claim = Claim(chapter=chapter, **{key: value for key, value in table.items() if key not in _PARSED})
    if "reason" in table:
        return claim
    record = load_record(table["record"])
    if claim.metric not in record:
        raise ValueError(f"record {record.name} has no metric {claim.metric!r}; it has {', '.join(record.metrics)}")
    if record[claim.metric].is_list:
        raise ValueError(f"metric {claim.metric} of {record.name} is a list; a rule needs one number a seed")
    try:
        format(1.0, claim.format)
    except ValueError as error:
        raise ValueError(f"format = {claim.format!r} does not format a number: {error}") from error
    holds = Rule.parse(table["holds"])
    direction = Rule.parse(table.get("direction", table["holds"]))
    if not holds.implies(direction):
        raise ValueError(f"holds ({holds}) must lie within direction ({direction}), which is the weaker of the two")
    return dataclasses.replace(claim, record=record, holds=holds, direction=direction)


@dataclass(frozen=True)
class ClaimsTable:
    """Claims for display: HTML in the book, Markdown elsewhere, plain text on a terminal."""

    claims: tuple[Claim, ...]
    caption: str
    root: str = ".."
    "Path from the page to the book's root."
    records: str | None = None
    "Address that the name of a record and ``.json`` are appended to; without it a record is named, not linked."

    def counts(self) -> dict[str, int]:
        """Return verdict to number of claims, all four verdicts."""
        found = Counter(claim.verdict() for claim in self.claims)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def _repr_html_(self) -> str:
        if not self.claims:
            return f'<p class="oral4-claims-none">{html.escape(self.caption)}: not written yet.</p>'
        heads = ("Verdict", "Claim", "Paper", "Ours", "Cost")
        columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
        rows = "\n".join(self._row(claim) for claim in self.claims)
        caption = html.escape(self.caption)
        # The wide table scrolls in its own box, which must take the focus to be scrolled by keys.
        return (
            f'<div class="oral4-claims-scroll" role="region" aria-label="{caption}" tabindex="0">\n'
            f'<table class="oral4-claims">\n<caption>{caption}</caption>\n'
            f"<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
        )

    def _row(self, claim: Claim) -> str:
        e = html.escape
        verdict = claim.verdict()
        note = f'<br><small class="oral4-note">{e(claim.note)}</small>' if claim.note else ""
        cost = f"{e(claim.cost())}<br>{self._record(claim.record)}" if claim.record else ""
        return (
            f'<tr id="claim-{e(claim.key)}" data-chapter="{e(claim.chapter)}" data-verdict="{_slug(verdict)}">'
            f'<td class="oral4-verdict"><span aria-hidden="true">{VERDICTS[verdict]}</span> {verdict}</td>'
            f'<th scope="row"><a href="{e(claim.link(self.root))}">{e(claim.id)}. {e(claim.title)}</a></th>'
            f"<td>{e(claim.paper)}<br><small>{e(claim.text)} ({e(claim.where)}; {e(claim.provenance)})</small></td>"
            f'<td>{e(claim.ours())}<br><small class="oral4-rule">{e(claim.why())}</small>{note}</td>'
            f"<td><small>{cost}</small></td></tr>"
        )

    def _record(self, record: Record) -> str:
        name = f"<code>{html.escape(record.name)}</code>"
        return name if self.records is None else f'<a href="{html.escape(self.records + record.name)}.json">{name}</a>'

    def _repr_markdown_(self) -> str:
        if not self.claims:
            return f"{self.caption}: not written yet."
        lines = ["| Verdict | Claim | Paper | Ours | Cost |", "| --- | --- | --- | --- | --- |"]
        for claim in self.claims:
            verdict = claim.verdict()
            cells = (
                f"{VERDICTS[verdict]} {verdict}",
                f"[{claim.id}. {claim.title}]({claim.link(self.root)})",
                f"{claim.paper}: {claim.text} ({claim.where}; {claim.provenance})",
                f"{claim.ours()}: {claim.why()} {claim.note}".rstrip(),
                claim.cost(),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        return f"{self.caption}\n\n" + "\n".join(lines)

    def __str__(self) -> str:
        if not self.claims:
            return f"{self.caption}: not written yet."
        lines = [self.caption]
        for claim in self.claims:
            verdict = claim.verdict()
            lines += ["", f"{VERDICTS[verdict]} {verdict}: {claim.id}. {claim.title}", f"  {claim.text}"]
            lines += [f"  paper: {claim.paper} ({claim.where}; {claim.provenance})"]
            lines += [f"  ours:  {claim.ours()}", f"  {claim.why()}"]
            lines += [f"  {claim.note}"] if claim.note else []
            lines += [f"  {claim.record.name}, {claim.cost()}"] if claim.record else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Scoreboard:
    """All claims of the book: counts, every claim at a glance, and the table."""

    table: ClaimsTable

    def counts(self) -> dict[str, int]:
        """Return verdict to number of claims, all four verdicts."""
        return self.table.counts()

    def _repr_html_(self) -> str:
        counts = "".join(
            f'<li data-verdict="{_slug(verdict)}">'
            f'<span aria-hidden="true">{VERDICTS[verdict]}</span> {count} {verdict}</li>'
            for verdict, count in self.counts().items()
        )
        glance = "\n".join(self._glance(chapter, title) for chapter, title in CHAPTERS.items())
        return (
            f'<ul class="oral4-counts" aria-label="Number of claims by verdict">{counts}</ul>\n'
            f'<ul class="oral4-glance" aria-label="All claims at a glance">\n{glance}\n</ul>\n'
            + (self.table._repr_html_() if self.table.claims else "")
        )

    def _glance(self, chapter: str, title: str) -> str:
        marks = "".join(
            f'<a href="#claim-{html.escape(claim.key)}" data-verdict="{_slug(claim.verdict())}"'
            f' title="{html.escape(claim.title)}: {claim.verdict()}"'
            f' aria-label="{html.escape(claim.title)}: {claim.verdict()}">{VERDICTS[claim.verdict()]}</a>'
            for claim in _of(self.table.claims, chapter)
        )
        return f'<li data-chapter="{chapter}"><span>{title}</span> {marks or "not written yet"}</li>'

    def _repr_markdown_(self) -> str:
        return "\n".join(f"- {line}" for line in self._lines()) + (
            f"\n\n{self.table._repr_markdown_()}" if self.table.claims else ""
        )

    def __str__(self) -> str:
        return "\n".join(self._lines()) + (f"\n\n{self.table}" if self.table.claims else "")

    def _lines(self) -> list[str]:
        """Return the counts and each chapter's verdicts as text."""
        counts = ", ".join(f"{VERDICTS[verdict]} {count} {verdict}" for verdict, count in self.counts().items())
        chapters = []
        for chapter, title in CHAPTERS.items():
            marks = " ".join(VERDICTS[claim.verdict()] for claim in _of(self.table.claims, chapter))
            chapters.append(f"{title}: {marks or 'not written yet'}")
        return [counts, *chapters]


def claims_table(chapter: str, root: str = "..", records: str | None = None) -> ClaimsTable:
    """Return the claims of a chapter as a table that a notebook displays.

    Parameters
    ----------
    chapter : str
        One of :data:`CHAPTERS`.
    root : str
        Path from the page to the book's root, ``".."`` for a page in a chapter's folder.
    records : str, optional
        Address of the folder with the records, ending in ``/``; records are then linked.
    """
    claims = load_claims(chapter)
    return ClaimsTable(claims, f"{CHAPTERS[chapter]}: the paper's claims and what was measured here", root, records)


def scoreboard(root: str = ".", records: str | None = None) -> Scoreboard:
    """Return the claims of all chapters; the parameters are those of :func:`claims_table`."""
    return Scoreboard(ClaimsTable(load_claims(), "All claims and what was measured here", root, records))


def _of(claims: Sequence[Claim], chapter: str) -> list[Claim]:
    return [claim for claim in claims if claim.chapter == chapter]


def _slug(verdict: str) -> str:
    return verdict.replace(" ", "-")
