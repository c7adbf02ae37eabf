"""The command ``oral4``: look at the installation, run experiments, fetch data, read claims and references.

Each command imports what it needs when it runs, and a chapter's commands are imported when they are called, so
that ``oral4 --help`` is instant.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from oral4 import __version__
from oral4.errors import OralError

__all__ = ["app", "main"]

CHAPTER_COMMANDS = {
    "pyramid": ("oral4.pyraformer.cli", "pyramid", "Plan a pyramid for a series of a given length."),
    "convert": ("oral4.diffvc.cli", "convert", "Say one recording's words in another recording's voice."),
    "forecast": ("oral4.pyraformer.cli", "forecast_app", "Forecast a table, beside a seasonal naive forecast."),
    "privacy": ("oral4.dp.cli", "privacy_app", "Count, choose, audit and time differential privacy."),
    "finetune-private": ("oral4.dp.cli", "finetune_private", "Fine-tune a language model under differential privacy."),
}
"""Name to module, function or Typer app in it, and the line of help that stands for it until it is called."""

SECTIONS = ("experiments", "records", "claims", "data", "commands")


class DeferredCommand(TyperCommand):
    """A command of a chapter: known by its line of help, imported when it is called."""

    def __init__(self, name: str, module: str, attribute: str, summary: str):
        super().__init__(name, help=summary)
        self.module = module
        self.attribute = attribute

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand over to the real command, which reads its own arguments."""
        target = getattr(importlib.import_module(self.module), self.attribute)
        if not isinstance(target, typer.Typer):
            target = _typer_of(target)
        return typer.main.get_command(target).make_context(info_name, args, parent=parent, **extra)


def _typer_of(function: Any) -> typer.Typer:
    chapter = typer.Typer(add_completion=False, rich_markup_mode=None)
    chapter.command()(function)
    return chapter


class ChapterGroup(TyperGroup):
    """The commands of this module and the deferred ones of the chapters."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        for name, (module, attribute, summary) in CHAPTER_COMMANDS.items():
            self.add_command(DeferredCommand(name, module, attribute, summary))


app = typer.Typer(
    cls=ChapterGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Six papers on sequence modelling, derived, implemented, tested and measured.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"oral4 {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from (also: ORAL4_DEBUG=1).")
    ] = False,
) -> None:
    """Take the options that stand before a command; main() has acted on --debug already."""


@app.command()
def doctor() -> None:
    """Check versions, device, folders and extras.

    The exit code is 1 if something is wrong. An extra that is not installed is not wrong.
    """
    from oral4.measure.doctor import examine

    marks = {"ok": "ok", "absent": "--", "wrong": "!!"}
    findings = examine()
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        remedy = f"   -> {finding.remedy}" if finding.remedy else ""
        print(f"{marks[finding.state]}  {finding.what:{width}}  {finding.found}{remedy}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    print(f"\n{wrong} to put right." if wrong else "\nAll that the core needs is in order.")
    raise typer.Exit(1 if wrong else 0)


@app.command("list")
def list_(
    section: Annotated[str, typer.Argument(help=f"One of {', '.join(SECTIONS)}; all if left out.")] = "",
) -> None:
    """List experiments, records, claims, data and commands."""
    if section and section not in SECTIONS:
        raise ValueError(f"there is nothing to list under {section!r}; choose one of {', '.join(SECTIONS)}")
    for name in [section] if section else SECTIONS:
        rows = {
            "experiments": _experiments,
            "records": _records,
            "claims": _claims,
            "data": _data,
            "commands": _commands,
        }[name]()
        if not section:
            print(name)
        indent = "" if section else "  "
        width = max((len(row[0]) for row in rows), default=0)
        for first, *others in rows:
            print(f"{indent}{first:{width}}  {'  '.join(others)}".rstrip())


def _experiments() -> list[tuple[str, ...]]:
    from oral4.measure.experiment import list_experiments

    return list(list_experiments().items())


def _records() -> list[tuple[str, ...]]:
    from oral4.measure.record import list_records, load_record

    records = [load_record(name) for name in list_records()]
    return [(record.name, record.date[:10], record.cost()) for record in records]


def _claims() -> list[tuple[str, ...]]:
    from oral4.measure.claims import CHAPTERS, claims_table

    rows: list[tuple[str, ...]] = []
    for chapter, title in CHAPTERS.items():
        table = claims_table(chapter)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in table.counts().items() if count)
        rows.append((chapter, f"{title}: {counts or 'not written yet'}"))
    return rows


def _data() -> list[tuple[str, ...]]:
    from oral4.data.fetch import describe, names

    entries = [describe(name) for name in names()]
    return [(entry.name, f"{entry.bytes:>13,} bytes", entry.licence) for entry in entries]


def _commands() -> list[tuple[str, ...]]:
    group: Any = typer.main.get_command(app)
    return [(name, command.get_short_help_str(100)) for name, command in group.commands.items()]


@app.command()
def run(
    experiment: Annotated[str, typer.Argument(help="For example pyraformer/cost; see oral4 list experiments.")] = "",
    scale: Annotated[
        str | None, typer.Option(help="smoke, mini, gpu or paper; by default $ORAL4_SCALE or mini.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
    seed: Annotated[int | None, typer.Option(help="The first seed; with --verify, the one to repeat.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the record in this file.")] = None,
    save_record: Annotated[
        bool, typer.Option("--save-record", help="Keep it as the record that the book shows.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Your own corpus, for experiments with a setting data.", file_okay=False)
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Keep the trained weights in this file.")] = None,
    save_weights: Annotated[
        bool, typer.Option("--save-weights", help="Keep them as the weights that the library ships.")
    ] = False,
    verify: Annotated[
        str | None, typer.Option(metavar="RECORD", help="Repeat one seed of a record, by name or file, and compare.")
    ] = None,
) -> None:
    """Run an experiment, or repeat a record and compare.

    Shows the mean and the 95 % interval of each metric over the seeds. With --verify the exit code is 1 if a
    metric differs by more than its tolerance.
    """
    if verify is not None:
        if experiment or scale or changes or out or save_record or data or weights or save_weights:
            raise ValueError("--verify takes everything from the record; give it alone, or with --seed")
        raise typer.Exit(_verify(verify, seed))
    if not experiment:
        raise ValueError("which experiment? See: oral4 list experiments")
    from oral4.measure.experiment import find_experiment, run_experiment

    overrides = dict(_split(change) for change in changes or [])
    if data is not None:
        overrides["data"] = str(data)
    target = _place(save_record, out, overrides)
    found = find_experiment(experiment)
    if save_weights:
        weights = _shipped_weights(found.weights)
    record = run_experiment(found, scale, seeds, overrides, first_seed=seed or 0, progress=_progress, weights=weights)
    width = max(len(metric) for metric in record.metrics)
    for metric in record.metrics:
        print(f"{metric:{width}}  {record[metric].text('.4g')}")
    print(f"\n{record.name}: {record.cost()}")
    for path in (out, target / f"{record.name}.json" if target else None):
        if path is not None:
            print(f"written to {record.save(path)}")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _split(change: str) -> tuple[str, str]:
    key, equals, value = change.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {change}: write --set KEY=VALUE")
    return key, value


def _place(save_record: bool, out: Path | None, overrides: dict[str, str]) -> Path | None:
    """Return the folder of the book's records if one shall be kept there; refuse before the run, not after it."""
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file")
    if not save_record:
        return None
    from oral4.measure.environment import checkout

    if overrides:
        raise ValueError("--save-record keeps a scale as it is written; with --set use --out FILE")
    root = checkout()
    if root is None:
        raise OralError("--save-record writes into a checkout of the repository, and this is none; use --out FILE")
    return root / "oral4" / "records"


def _shipped_weights(name: str) -> Path:
    """Return where the library keeps weights of this name; they are made in a checkout only."""
    from oral4.measure.environment import checkout

    root = checkout()
    if root is None:
        raise OralError("--save-weights writes into a checkout of the repository, and this is none; use --weights FILE")
    return root / "oral4" / "weights" / f"{name or 'none'}.safetensors"


def _verify(name: str, seed: int | None) -> int:
    """Print each metric beside its repetition and return the exit code: 0 if all that is compared agrees."""
    from oral4.measure.experiment import verify
    from oral4.measure.record import load_record, read_record

    record = read_record(name) if name.endswith(".json") else load_record(name)
    print(f"{record.name}, recorded on {record.date[:10]}, {record.device}", flush=True)
    compared = verify(record, seed)
    width = max(len(comparison.metric) for comparison in compared)
    words = {True: "agrees", False: "DIFFERS", None: "not compared"}
    for comparison in compared:
        judged = "" if comparison.tolerance is None else f", tolerance {comparison.tolerance:.3g}"
        print(
            f"{comparison.metric:{width}}  {words[comparison.agrees]}: "
            f"relative difference {comparison.deviation:.3g}{judged}"
        )
    verdicts = [comparison.agrees for comparison in compared if comparison.agrees is not None]
    if not verdicts:
        print("Nothing was compared: the record states no tolerance.")
    return 0 if verdicts and all(verdicts) else 1


@app.command()
def fetch(
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="For example ett/ETTh1.csv, or ett for all below it.")
    ] = None,
    list_names: Annotated[bool, typer.Option("--list", help="List what can be fetched.")] = False,
) -> None:
    """Download and check data, and print where it lies."""
    from oral4.data.fetch import fetch as fetch_file
    from oral4.data.fetch import names

    if list_names:
        list_("data")
        return
    if not wanted:
        raise ValueError("which file? See: oral4 fetch --list")
    for name in wanted:
        below = [known for known in names() if known.startswith(f"{name}/")] if name not in names() else []
        for each in below or [name]:
            print(fetch_file(each))


@app.command()
def cite(
    topic: Annotated[str, typer.Argument(help="A key, a chapter or a topic; everything if left out.")] = "",
) -> None:
    """Print BibTeX of what you used."""
    import difflib

    entries = _bibliography()
    chosen = [text for key, (topics, text) in entries.items() if not topic or topic == key or topic in topics]
    if not chosen:
        known = sorted({topic for topics, _ in entries.values() for topic in topics} | set(entries))
        near = difflib.get_close_matches(topic, known, n=3)
        topics_only = sorted(set(known) - set(entries))
        raise OralError(f"nothing to cite under {topic!r}; there is {', '.join(near or topics_only)}")
    print("\n\n".join(chosen))


def _bibliography() -> dict[str, tuple[set[str], str]]:
    """Return key to topics and BibTeX text of each reference."""
    import re
    from importlib.resources import files

    text = (files("oral4") / "references.bib").read_text(encoding="utf-8")
    found = {}
    for entry in re.findall(r"^@\w+\{.*?^\}$", text, flags=re.MULTILINE | re.DOTALL):
        key = entry.partition("{")[2].partition(",")[0]
        topics = re.search(r"^\s*keywords\s*=\s*\{([^}]*)\}", entry, flags=re.MULTILINE)
        found[key] = ({topic.strip() for topic in topics[1].split(",")} if topics else set(), entry)
    return found


@app.command()
def claims(
    chapter: Annotated[str, typer.Argument(help="For example pyraformer; the scoreboard of all if left out.")] = "",
) -> None:
    """Show what the papers claim and what was measured."""
    from oral4.measure.claims import claims_table, scoreboard

    print(claims_table(chapter) if chapter else scoreboard())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error that you can put right is one message and exit code 2, not a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Wherever it stands: who sees an error appends --debug to the line that failed.
    debug = "--debug" in given or os.environ.get("ORAL4_DEBUG", "0") not in ("", "0")
    given = [argument for argument in given if argument != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ● shows ? and does not stop
    try:
        app(args=given, prog_name="oral4")
    except (OralError, ValueError) as error:
        if debug:
            raise
        print(f"oral4: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
