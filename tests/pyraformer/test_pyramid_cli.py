"""The command `oral4 pyramid`."""

import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from oral4.pyraformer.cli import pyramid

app = typer.Typer()
app.command()(pyramid)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})


def rows(result):
    assert result.exit_code == 0, result.output
    return {line[:22].strip(): line[23:].strip() for line in result.stdout.splitlines() if line[:22].strip()}


def test_chosen_windows():
    found = rows(run(1_000_000))
    assert found["windows"] == "59 59 59   (chosen for 4 layers and 4 scales)"
    assert found["nodes on each scale"] == "1,000,000 16,949 287 4"
    assert found["nodes"] == "1,017,240"
    assert found["pairs, self included"] == "5,086,184   (5.09 a step)"
    assert found["pairs, full attention"] == "1,000,000,000,000   (196,611.1 times as many)"
    assert found["longest path"] == "9 hops"
    assert found["Lemma 1"] == "holds: 3 hops along the top, 4 layers reach 4"


@pytest.mark.parametrize(
    "given",
    [("--windows", "4,4,4"), ("--windows", 4, "--windows", 4, "--windows", 4), ("--windows", "4, 4", "--windows", 4)],
)
def test_given_windows(given):
    found = rows(run(169, *given))
    assert found["windows"] == "4 4 4" and found["pairs, self included"].startswith("1,103 ")
    assert found["longest path"] == "7 hops" and found["neighbours"] == "3"


def test_options_reach_the_graph():
    found = rows(run(2**20, "--layers", 2, "--scales", 5, "--neighbours", 5))
    assert found["windows"].startswith("22 22 22 22 ") and found["neighbours"] == "5"


def test_lemma_that_fails_says_what_helps():
    result = run(1024, "--windows", "4,4,4")
    assert rows(result)["Lemma 1"] == "fails: 15 hops along the top, 4 layers reach 4"
    assert "use 15 layers" in result.stdout
    assert rows(run(1024, "--windows", "4,4,4", "--layers", 15))["Lemma 1"].startswith("holds")
    alone = run(16, "--windows", 4, "--neighbours", 1)
    assert rows(alone)["longest path"] == "inf hops" and "use " not in alone.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((50, "--windows", "4,4,4"), r"windows\[2\] may be at most 3"),
        ((5,), "too short for 4 scales"),
        ((0,), "length must be at least 1"),
        ((100, "--neighbours", 4), "neighbours must be odd"),
        ((100, "--layers", 0), "num_layers must be at least 1"),
        ((100, "--scales", 1), "num_scales must be at least 2"),
        ((100, "--scales", 0), "num_scales must be at least 2"),
        ((100, "--windows", "4;4"), "whole numbers are needed, such as 4,4,4"),
        ((100, "--windows", ""), "whole numbers are needed"),
        ((100, "--windows", "4", "--scales", 2), "leave --scales out"),
        (("many",), "valid int"),
    ],
)
def test_refused(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.search(message, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())), result.stderr


def test_help_needs_no_torch():
    code = "import sys, oral4.pyraformer.cli; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
