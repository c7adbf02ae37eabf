"""The command `oral4 forecast`."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import oral4.cli as cli
from oral4.pyraformer.cli import spread
from oral4.pyraformer.forecast import Forecaster, ForecasterConfig

FAST = ("--history", "48", "--model", "ridge")


def table(length=400, count=2):
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(length) * 2 * np.pi / 24)
    parts = [
        pd.DataFrame(
            {
                "unique_id": f"s{number}",
                "ds": pd.date_range("2024-01-01", periods=length, freq="h"),
                "y": (10 * (number + 1) + wave + 0.3 * rng.normal(size=length)).round(4),
            }
        )
        for number in range(count)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("ORAL4_DEVICE", "cpu")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder with data.csv."""
    monkeypatch.chdir(tmp_path)
    table().to_csv("data.csv", index=False)
    return tmp_path


@pytest.fixture
def oral4(capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run(*arguments):
        try:
            cli.main(list(map(str, arguments)))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def read(path, time="ds"):
    """Return a table whose numbers Python's own float has read: the default reader of pandas may lose the last bit."""
    found = pd.read_csv(path, dtype=str)
    numbers = {name: found[name].map(float) for name in found.columns[2:]}
    return found.assign(**{time: pd.to_datetime(found[time])}, **numbers)


def same_numbers(found, expected):
    """A table of text and one of memory: 17 digits are a float64, so not a bit may be lost."""
    assert list(found.columns) == list(expected.columns) and found["ds"].tolist() == expected["ds"].tolist()
    for name in found.columns[2:]:
        assert found[name].tolist() == expected[name].tolist(), name


def test_as_the_page_says(tmp_path):
    """The whole command as it is written, in its own process; then the same in Python."""
    table(300, 1).to_csv(tmp_path / "data.csv", index=False)
    command = "forecast data.csv --horizon 24 --quantiles .1 .5 .9 --out forecast.csv --plot forecast.png"
    code = "import sys; from oral4.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 series of 300 steps of 'h'. 24 steps ahead" in done.stdout
    assert "seasonal naive 24" in done.stdout and "24 rows written to forecast.csv" in done.stdout
    assert "drawn into forecast.png" in done.stdout
    recommended = re.search(r"Recommended: ([^,.]+)[,.]", done.stdout).group(1)
    assert f"* {recommended} " in done.stdout and f"forecast by: {recommended}\n" in done.stdout
    assert (tmp_path / "forecast.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = read(tmp_path / "forecast.csv")
    assert list(found.columns) == ["unique_id", "ds", "yhat", "q0.1", "q0.5", "q0.9"] and len(found) == 24
    assert found["ds"].tolist() == pd.date_range("2024-01-13 12:00", periods=24, freq="h").tolist()
    assert (found["q0.1"] < found["q0.5"]).all() and (found["q0.5"] < found["q0.9"]).all()


def test_the_numbers_are_those_of_python(here, oral4, monkeypatch):
    """With a model, that is with everything that a seed decides."""
    start = ForecasterConfig.quick
    small = classmethod(lambda cls, **changes: start(**{"d_model": 16, "steps": 20, **changes}))
    monkeypatch.setattr(ForecasterConfig, "quick", small)
    code, out, err = oral4(
        *("forecast", "data.csv", "--horizon", 12, "--history", 48, "--quantiles", ".9", ".2", "--seed", 3),
        *("--preset", "quick", "--model", "model", "--out", "forecast.csv"),
    )
    assert code == 0, err
    config = ForecasterConfig.quick(horizon=12, history=48, quantiles=(0.9, 0.2), seed=3)
    forecaster = Forecaster(config).fit(table())
    same_numbers(read("forecast.csv"), forecaster.predict(method="model"))
    assert str(forecaster.report()) in out and "forecast by: model" in out


@pytest.mark.parametrize("model", ["naive", "ridge"])
def test_models(here, oral4, model):
    code, out, _ = oral4("forecast", "data.csv", "--horizon", 12, "--history", 48, "--model", model, "--out", "f.csv")
    candidates = ("naive",) if model == "naive" else ("naive", "ridge")
    forecaster = Forecaster(horizon=12, history=48, candidates=candidates).fit(table())
    same_numbers(read("f.csv"), forecaster.predict(method=model))
    assert code == 0
    by = re.search(r"forecast by: (.*)", out).group(1)
    assert by == ("ridge" if model == "ridge" else forecaster.predict(method="naive").attrs["method"])


def test_without_files_it_prints(here, oral4):
    code, out, err = oral4("forecast", "data.csv", "--horizon", 15, *FAST)
    assert code == 0 and not err
    assert "... and 6 rows more; --out FILE.csv writes all of them" in out
    shown = out.split("forecast by: ridge\n")[1].splitlines()
    assert shown[0].split() == ["unique_id", "ds", "yhat", "q0.1", "q0.5", "q0.9"] and len(shown) == 26
    assert sorted(each.name for each in here.iterdir()) == ["data.csv"]


def test_points_alone(here, oral4):
    assert oral4("forecast", "data.csv", "--horizon", 6, *FAST, "--quantiles", "none", "--out", "f.csv")[0] == 0
    assert list(read("f.csv").columns) == ["unique_id", "ds", "yhat"]


def test_save_and_load(here, oral4):
    arguments = ("--horizon", 12, "--quantiles", ".1", ".9")
    assert oral4("forecast", "data.csv", *arguments, *FAST, "--save", "kept", "--out", "one.csv")[0] == 0
    assert [each.name for each in (here / "kept").iterdir()] == ["forecaster.safetensors"]
    code, out, _ = oral4("forecast", "--load", "kept", "--out", "two.csv")
    assert code == 0 and "24 rows written to two.csv" in out
    assert (here / "one.csv").read_bytes() == (here / "two.csv").read_bytes()
    table(424).to_csv("later.csv", index=False)
    assert oral4("forecast", "later.csv", "--load", "kept", "--horizon", 3, "--out", "three.csv")[0] == 0
    later = Forecaster.load("kept").predict(table(424), 3)
    same_numbers(read("three.csv"), later)
    code, _, err = oral4("forecast", "--load", "kept", "--history", 24, "--season", 12)
    assert code == 2 and "--season, --history cannot be changed after the fit; leave them out" in err
    assert oral4("forecast", "--load", "nowhere")[0] == 2


def test_backtest(here, oral4):
    code, out, _ = oral4("forecast", "data.csv", "--horizon", 6, *FAST, "--backtest", 2)
    forecaster = Forecaster(horizon=6, history=48, candidates=("naive", "ridge")).fit(table())
    forecaster.backtest(windows=2)
    assert code == 0 and str(forecaster.report()) in out and "MASE in backtest" in out


def test_columns_and_marks(here, oral4):
    """German marks, other names, a wide table: the same numbers."""
    plain = table()
    plain.rename(columns={"unique_id": "place", "ds": "when", "y": "load"}).to_csv(
        "other.csv", index=False, sep=";", decimal=","
    )
    plain.pivot(index="ds", columns="unique_id", values="y").to_csv("wide.csv")
    common = ("--horizon", 6, *FAST)
    assert oral4("forecast", "data.csv", *common, "--out", "a.csv")[0] == 0
    names = ("--id", "place", "--time", "when", "--target", "load", "--sep", ";", "--decimal", ",")
    code, _, err = oral4("forecast", "other.csv", *names, *common, "--out", "b.csv")
    assert code == 0, err
    assert oral4("forecast", "wide.csv", *common, "--out", "c.csv")[0] == 0
    expected = read("a.csv")
    found = read("b.csv", "when")
    assert list(found.columns[:2]) == ["place", "when"]
    same_numbers(found.rename(columns={"place": "unique_id", "when": "ds"}), expected)
    same_numbers(read("c.csv"), expected)


def test_covariates_and_gaps(here, oral4):
    full = table(412).assign(holiday=lambda t: (t.ds.dt.day_of_week > 4).astype(int))
    known = full.groupby("unique_id").head(400)
    known.drop(index=[30, 31]).to_csv("known.csv", index=False)
    full.drop(columns="y").to_csv("ahead.csv", index=False)
    common = ("forecast", "known.csv", "--horizon", 12, *FAST, "--future", "holiday")
    code, _, err = oral4(*common, "--future-file", "ahead.csv")
    assert code == 2 and "'s0': 2 of 400 values are missing" in err
    code, _, err = oral4(*common, "--impute", "linear")
    assert code == 2 and "'holiday' are needed for the 12 steps" in err
    code, out, err = oral4(*common, "--impute", "linear", "--future-file", "ahead.csv")
    assert code == 0 and "forecast by: ridge" in out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing.csv",), "nothing.csv"),
        ((), "which table? oral4 forecast data.csv --horizon 24"),
        (("data.csv", "--target", "load"), "'load'"),
        (("data.csv", "--time", "when"), "no column 'when'; the columns are 'unique_id', 'ds', 'y'"),
        (("data.csv", "--past", "wind"), "no column 'wind', named as a covariate"),
        (("data.csv", "--horizon", "0"), "horizon=0; give a whole number from 1 on"),
        (("data.csv", "--quantiles", "2"), "quantiles=(2.0,); give different numbers in (0, 1)"),
        (("data.csv", "--quantiles", ".1", ".1"), "give different numbers in (0, 1)"),
        (("data.csv", "--quantiles", "low"), "--quantiles low: give numbers in (0, 1)"),
        (("data.csv", "--horizon", "4000"), "horizon=4,000, but the longest series has 400 steps"),
        (("data.csv", "--history", "4000", "--horizon", "3"), "history=4,000, but the longest series has 400 steps"),
        (("data.csv", "--season", "day"), "--season day: give a whole number of steps"),
        (("data.csv", "--freq", "D"), "grid of freq='D'"),
        (("data.csv", "--model", "magic"), "--model magic: choose one of auto, model, ridge, naive"),
        (("data.csv", "--preset", "slow"), "--preset slow: choose one of quick, usual, accurate"),
        (("data.csv", "--impute", "zero"), "--impute zero: choose one of ffill, linear, mask"),
        (("data.csv", "--backtest", "-1"), "--backtest -1: give a number of windows"),
        (("data.csv", "--out", "forecast.xlsx"), "--out forecast.xlsx: give the name of a file that ends with .csv"),
        (("data.csv", "--out", "away/forecast.csv"), "there is no folder"),
        (("data.csv", "--plot", "forecast.gif"), "ends with .png or .svg or .pdf"),
        (("picture.png",), "of the kind '.png'"),
        (("prose.csv",), ""),
        (("empty.csv",), ""),
    ],
)
def test_errors_are_one_line(here, oral4, arguments, words):
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (here / "prose.csv").write_text("It was a dark and stormy night.\nThe rain fell, in torrents.\n", encoding="utf8")
    (here / "empty.csv").write_text("", encoding="utf8")
    before = sorted(here.iterdir())
    code, out, err = oral4("forecast", *arguments)
    assert code == 2 and out == ""
    assert words in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(here.iterdir()) == before


def test_help(oral4):
    code, out, _ = oral4("forecast", "--help")
    options = [
        "horizon",
        "quantiles",
        "freq",
        "id",
        "time",
        "target",
        "past",
        "future",
        "static",
        "future-file",
        "season",
    ]
    options += [
        "history",
        "impute",
        "model",
        "preset",
        "seed",
        "backtest",
        "out",
        "plot",
        "save",
        "load",
        "sep",
        "decimal",
    ]
    assert code == 0 and "seasonal naive" in out
    for option in options:
        assert re.search(rf"^ *--{option}\b", out, re.M), option
    code, out, _ = oral4("--help")
    assert code == 0 and re.search(r"^ *forecast +Forecast a table", out, re.M)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a --quantiles .1 .5 .9 --out b", "a --quantiles .1 --quantiles .5 --quantiles .9 --out b"),
        ("--quantiles .1 --quantiles .9 a", "--quantiles .1 --quantiles .9 a"),
        ("--quantiles .1,.9 --seed 3", "--quantiles .1,.9 --seed 3"),
        ("--seed 3 4 --quantiles .5", "--seed 3 4 --quantiles .5"),
        ("--quantiles .1 -- .5", "--quantiles .1 -- .5"),
    ],
)
def test_one_option_with_many_numbers(given, expected):
    assert spread(given.split()) == expected.split()
