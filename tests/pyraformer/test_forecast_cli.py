"""The command `oral4 forecast`: files in, files out, one message for every error."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import oral4.cli as cli
from oral4.pyraformer.cli import spread
from oral4.pyraformer.forecast import Forecaster


@pytest.fixture
def oral4(capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run(*arguments):
        try:
            cli.main(["forecast", *map(str, arguments)])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tables: long, wide, with covariates, with semicolons, with a gap."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    stamps = pd.date_range("2024-01-01", periods=300, freq="h")
    promo = (rng.random(300) < 0.2) * 1.0
    y = 10 + 3 * np.sin(2 * np.pi * np.arange(300) / 24) + 2 * promo + 0.3 * rng.normal(size=300)
    long = pd.DataFrame({"unique_id": "a", "ds": stamps, "y": y, "promo": promo})
    long.to_csv(folder / "long.csv", index=False)
    pd.DataFrame({"date": stamps, "load": y, "wind": y[::-1]}).to_csv(folder / "wide.csv", index=False)
    long.rename(columns={"unique_id": "shop", "ds": "when", "y": "sold"}).to_csv(folder / "named.csv", index=False)
    long.drop(columns="promo").to_csv(folder / "semicolons.csv", index=False, sep=";", decimal=",")
    long.drop(index=[50, 51]).to_csv(folder / "gap.csv", index=False)
    ahead = pd.DataFrame({"ds": pd.date_range(stamps[-1], periods=25, freq="h")[1:], "promo": 0.0})
    ahead.to_csv(folder / "ahead.csv", index=False)
    return folder


QUICK = ("--preset", "quick", "--horizon", 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.csv --quantiles .1 .5 .9", "a.csv --quantiles .1 --quantiles .5 --quantiles .9"),
        ("--quantiles .1 .9 a.csv", "--quantiles .1 --quantiles .9 a.csv"),
        ("--quantiles .1 .9 --seed 3 7", "--quantiles .1 --quantiles .9 --seed 3 7"),
        ("--quantiles .1 --quantiles .9", "--quantiles .1 --quantiles .9"),
        ("--quantiles .1,.5 .9 --horizon 6", "--quantiles .1,.5 --quantiles .9 --horizon 6"),
        ("--quantiles none --seed 3", "--quantiles none --seed 3"),
        ("--quantiles=.1 .9", "--quantiles=.1 .9"),
        ("--quantiles -0.1 .9", "--quantiles -0.1 --quantiles .9"),
        ("--quantiles", "--quantiles"),
        ("--seed 3 -- --quantiles .1 .9", "--seed 3 -- --quantiles .1 .9"),
        ("", ""),
    ],
)
def test_numbers_that_follow_an_option(given, expected):
    assert spread(given.split()) == expected.split()


def test_the_whole_command(oral4, folder, tmp_path):
    code, out, err = oral4(
        folder / "long.csv", "--horizon", 24, "--quantiles", ".1", ".5", ".9", "--freq", "h", "--id", "unique_id",
        "--time", "ds", "--target", "y", "--season", "24", "--seed", 1, "--model", "auto", "--preset", "quick",
        "--backtest", 2, "--out", tmp_path / "forecast.csv", "--plot", tmp_path / "forecast.png",
        "--save", tmp_path / "kept",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.startswith("1 series of 300 steps of 'h'. 24 steps ahead from the last ") and "Season: 24." in out
    for words in ("Recommended: ", "seasonal naive 24", "ridge", "model", "MASE in backtest", "forecast by: "):
        assert words in out
    assert f"24 rows written to {tmp_path / 'forecast.csv'}" in out and f"drawn into {tmp_path / 'forecast.png'}" in out
    found = pd.read_csv(tmp_path / "forecast.csv", parse_dates=["ds"])
    assert list(found.columns) == ["unique_id", "ds", "yhat", "q0.1", "q0.5", "q0.9"]
    assert found["ds"].tolist() == pd.date_range("2024-01-13 12:00", periods=24, freq="h").tolist()
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(found, Forecaster.load(tmp_path / "kept").predict(), check_dtype=False)

    code, again, _ = oral4("--load", tmp_path / "kept", "--out", tmp_path / "again.csv")
    assert code == 0 and "forecast by: " in again
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "forecast.csv").read_bytes()
    code, out, _ = oral4(folder / "long.csv", "--load", tmp_path / "kept", "--horizon", 3, "--quantiles", "none")
    assert code == 0 and out.rstrip().splitlines()[-4].split() == ["unique_id", "ds", "yhat"]


@pytest.mark.parametrize(("model", "used"), [("model", "model"), ("ridge", "ridge")])
def test_a_model_by_name(oral4, folder, model, used):
    code, out, _ = oral4(folder / "long.csv", *QUICK, "--model", model)
    assert code == 0 and f"forecast by: {used}\n" in out


def test_naive_is_fast_and_fits_nothing(oral4, folder):
    code, out, _ = oral4(folder / "long.csv", *QUICK, "--model", "naive")
    assert code == 0 and any(f"forecast by: {name} 24" in out for name in ("profile", "seasonal naive"))
    assert "* ridge" not in out and "model" not in out.split("\n\n")[1].replace("method", "")


def test_tables_of_other_forms(oral4, folder, tmp_path):
    common = (*QUICK, "--model", "ridge", "--out", tmp_path / "f.csv")
    assert oral4(folder / "wide.csv", *common)[0] == 0
    assert set(pd.read_csv(tmp_path / "f.csv")["unique_id"]) == {"load", "wind"}
    assert oral4(folder / "named.csv", *common, "--id", "shop", "--time", "when", "--target", "sold")[0] == 0
    assert list(pd.read_csv(tmp_path / "f.csv").columns[:2]) == ["shop", "when"]
    code, _, err = oral4(folder / "semicolons.csv", *common)
    assert code == 2 and "pass sep=';'" in err
    assert oral4(folder / "semicolons.csv", *common, "--sep", ";", "--decimal", ",")[0] == 0
    code, _, err = oral4(folder / "gap.csv", *common)
    assert code == 2 and "2 of 300 values are missing" in err
    assert oral4(folder / "gap.csv", *common, "--impute", "linear")[0] == 0


def test_covariates_known_ahead(oral4, folder, tmp_path):
    code, _, err = oral4(folder / "long.csv", *QUICK, "--future", "promo")
    assert code == 2 and "the covariates 'promo' are needed for the 6 steps to predict" in err
    code, _, err = oral4(
        folder / "long.csv",
        *QUICK,
        "--future",
        "promo",
        "--future-file",
        folder / "ahead.csv",
        "--out",
        tmp_path / "f.csv",
    )
    assert (code, err) == (0, "") and len(pd.read_csv(tmp_path / "f.csv")) == 6


def test_what_is_worth_knowing_is_printed(oral4, tmp_path):
    pd.DataFrame({"ds": pd.date_range("2024", periods=30, freq="MS"), "y": np.arange(30.0)}).to_csv(tmp_path / "m.csv")
    code, _, err = oral4(tmp_path / "m.csv", "--quantiles", ".01", ".99", "--horizon", 2, "--model", "naive")
    assert code == 2 and "quantiles 0.01 and 0.99 cannot be calibrated" in err
    pd.DataFrame({"ds": pd.date_range("2024", periods=7, freq="MS"), "y": np.arange(7.0)}).to_csv(tmp_path / "s.csv")
    code, out, err = oral4(tmp_path / "s.csv", "--horizon", 2, "--model", "naive")
    assert (code, err) == (0, "") and "NaN" in out
    for words in ("neither ridge nor model could be fitted", "there are no intervals", "some quantiles are NaN"):
        assert len([line for line in out.splitlines() if line.startswith("Note: ") and words in line]) == 1, words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which table? oral4 forecast data.csv --horizon 24"),
        (("no.csv",), "no.csv: cannot be read: No such file"),
        (("{}/long.csv", "--target", "z"), "no column 'z'"),
        (("{}/long.csv", "--quantiles", "1.5"), "give different numbers in (0, 1)"),
        (("{}/long.csv", "--quantiles", "many"), "--quantiles many: give numbers in (0, 1) such as .1 .5 .9, or none"),
        (("{}/long.csv", "--model", "arima"), "--model arima: choose one of auto, model, ridge, naive"),
        (("{}/long.csv", "--preset", "slow"), "--preset slow: choose one of quick, usual, accurate"),
        (("{}/long.csv", "--impute", "zero"), "--impute zero: choose one of ffill, linear, mask"),
        (("{}/long.csv", "--season", "daily"), "--season daily: give a whole number of steps, or several"),
        (("{}/long.csv", "--season", "0"), "season=(0,); give a whole number"),
        (("{}/long.csv", "--horizon", "0"), "horizon=0; give a whole number from 1 on"),
        (("{}/long.csv", "--horizon", "300"), "horizon=300, but the longest series has 300 steps"),
        (("{}/long.csv", "--freq", "fortnight"), "freq='fortnight' is not a frequency"),
        (("{}/long.csv", "--freq", "2"), "freq=2, but time is in dates"),
        (("{}/long.csv", "--out", "f.xlsx"), "--out f.xlsx: give the name of a file that ends with .csv"),
        (("{}/long.csv", "--out", "{}/nowhere/f.csv"), "there is no folder"),
        (("{}/long.csv", "--plot", "f.gif"), "--plot f.gif: give the name of a file that ends with .png or .svg"),
        (("{}/long.csv", "--backtest", "-1"), "--backtest -1: give a number of windows"),
        (("{}/long.csv", "--past", "temperature"), "no column 'temperature', named as a covariate"),
        (("--load", "{}"), "forecaster.safetensors cannot be read"),
        (("--load", "{}", "--season", "24", "--seed", "3"), "--season, --seed cannot be changed after the fit; leave"),
        (("{}/long.csv", "--horizon", "six"), "valid int"),
    ],
)  # fmt: skip
def test_refused(oral4, folder, monkeypatch, arguments, message):
    def never(self, *_, **__):
        raise AssertionError("it was fitted all the same")

    monkeypatch.setattr("oral4.pyraformer.forecast._Fit.run", never)
    code, out, err = oral4(*(argument.format(folder) for argument in arguments))
    assert code == 2 and out == ""
    assert message in " ".join(err.split()) and "Traceback" not in err
    assert len(err.splitlines()) == 1 or "Usage" in err


def test_refused_before_the_shell_too(folder):
    done = subprocess.run(
        [sys.executable, "-m", "oral4.cli", "forecast", str(folder / "nothing.csv")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("oral4: table ") and len(done.stderr.splitlines()) == 1


def test_help_needs_neither_torch_nor_pandas():
    code = "import sys, oral4.pyraformer.cli; assert not {'torch', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help(oral4):
    code, out, _ = oral4("--help")
    assert code == 0 and out.lower().startswith("usage: oral4 forecast [options] [data]")
    for option in ("--horizon", "--quantiles", "--future-file", "--model", "--save", "--load"):
        assert option in out
