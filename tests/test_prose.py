"""A measured number in the text comes from a cell or a record; and no file names a place of one machine."""

import re
import subprocess
from pathlib import Path

import notebook
import pytest

ROOT = Path(__file__).parents[1]
NUMBER = r"(?<![\w.{:|-])\d[\d,]*(?:\.\d+)?"
UNITS = (
    r"µs|ms|s|sec|seconds?|min|minutes?|[kMG]i?B|megabytes?|gigabytes?|[x×](?=\s)"
    r"|times (?:faster|slower|less|more|smaller)|% (?:faster|slower|less|fewer|more)"
)
METRICS = r"MSE|MAE|NRMSE|accuracy|speed-?up|F1|BLEU|perplexity|RMSD"
MEASURED = re.compile(
    rf"{NUMBER}\s?(?:{UNITS})(?![\w/])|\b(?:{METRICS})\b[^.\n|]{{0,20}}?\s(?:is|was|of|=|:|at)\s+{NUMBER}"
)
GIVEN = re.compile(r"<!--\s*given: \S[^>]*-->")


def suspicious(text: str) -> list[str]:
    """Numbers that look measured and are not said to be given from elsewhere."""
    if GIVEN.search(text):
        return []
    text = notebook.RECORD.sub("", re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.S))
    return [m[0] for m in MEASURED.finditer(text)]


def texts() -> list[tuple[str, str]]:
    out = []
    for path in notebook.notebooks():
        name = path.relative_to(ROOT).as_posix()
        out += [
            (f"{name}#{c['id']}", c["source"]) for c in notebook.load(path)["cells"] if c["cell_type"] == "markdown"
        ]
        for cell in notebook.load(path)["cells"]:
            if cell["cell_type"] == "code":
                out += [
                    (f"{name}#{cell['id']}:{k}", v)
                    for k, v in notebook.directives(cell["source"])[0].items()
                    if k in ("fig-cap", "fig-alt")
                ]
    for path in [*notebook.NBS.rglob("*.md"), ROOT / "README.md"]:
        parts = re.split(r"\n(?=#+ )|\n{2,}", path.read_text(encoding="utf8"))
        out += [(f"{path.relative_to(ROOT)}#{i}", part) for i, part in enumerate(parts)]
    return out


def test_no_measured_number_is_typed_by_hand():
    found = [(where, numbers) for where, text in texts() if (numbers := suspicious(text))]
    assert not found, (
        "compute it in a cell, read it by {record}`...`, or say where it comes from in <!-- given: ... -->"
    )


@pytest.mark.parametrize(
    "text",
    [
        "It takes 12 ms a call.",
        "needs 3.5 GB",
        "is 70 times faster",
        "an MSE of 0.808",
        "about 4.5 s here",
        "runs 49x faster",
        "in 3 minutes",
    ],
)
def test_the_check_sees_measured_numbers(text):
    assert suspicious(text)
    assert not suspicious(text + "\n<!-- given: the paper, Table 3 -->")


@pytest.mark.parametrize(
    "text",
    [
        "$L = 12$ s",
        "24 hours in a day",
        "`timeit(3 s)`",
        "{record}`pyraformer/cost-mini:seconds|.1f` s",
        "scales 1 to 4",
        "Table 3",
        "14,400 rows",
    ],
)
def test_the_check_lets_other_numbers_pass(text):
    assert not suspicious(text)


MACHINE = re.compile(r"(?<![A-Za-z0-9_.:/])/(?:work|root|home|Users|tmp)/[A-Za-z.]|\.\./shared\b(?!/data)")


def test_no_path_of_one_machine():
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        path = ROOT / line
        if (
            path.suffix in (".npz", ".png", ".webp", ".safetensors", ".svg")
            or not path.is_file()
            or path == Path(__file__)
        ):
            continue
        text = path.read_text(encoding="utf8", errors="replace")
        assert not MACHINE.search(text) or line == ".ci/run", (
            f"{line}: a path of one machine: {MACHINE.search(text)[0]}"
        )
