"""Data: official loaders (goldens), windows that are copies, splits, synthetic series, and tables of users."""

import datetime
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.data.fetch import available
from oral4.data.limits import Limits
from oral4.errors import DataError, MissingExtra
from oral4.pyraformer import data as module
from oral4.pyraformer.data import (
    MeanScaler,
    OneStepWindows,
    SeriesTable,
    StandardScaler,
    WindowDataset,
    calendar_features,
    check_frame,
    check_future,
    check_ids,
    chronological_splits,
    custom_windows,
    ett_splits,
    future_index,
    load_app_flow,
    load_electricity,
    load_ett,
    load_pjm,
    load_solar,
    make_sines,
    official_one_step,
    official_windows,
    one_step_marks,
    one_step_splits,
    read_table,
    sine_marks,
    sine_mixture,
    time_marks,
)

GOLDENS = Path(__file__).parents[1] / "goldens/pyraformer"
ETT = np.load(GOLDENS / "ett_loader.npz")
OTHER = np.load(GOLDENS / "loaders_other.npz")
PARTS = ("x", "y", "mx", "my")
PJM = ("AEP", "COMED", "PJME")
float64 = torch.float64


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=atol)


def need(*names):
    """Skip where the files are not at hand: a test downloads nothing."""
    for name in names:
        if not available(name):
            pytest.skip(f"{name} is not at hand")


def hours(count, start="2016-07-01"):
    return np.datetime64(start, "s") + 3600 * np.arange(count).astype("timedelta64[s]")


def random_table(rows=400, channels=3, seed=0, start="2016-07-01"):
    values = np.random.default_rng(seed).normal(size=(rows, channels)).cumsum(0)
    return SeriesTable(hours(rows, start), values, tuple(f"c{k}" for k in range(channels)))


# Time marks


def test_marks_are_the_official_ones():
    """Every stored window of both ETT tables: they run by the hour from 2016-07-01 on, so no file is needed."""
    begin = {"train": 0, "val": 8640 - 168, "test": 11520 - 168}
    compared = 0
    for key in ETT.files:
        if key.endswith(("mx", "my")):
            _, _, part, window, field = key.split("/")
            first = begin[part] + int(window) + (168 if field == "my" else 0)
            close(time_marks(hours(len(ETT[key]) + first)[first:]), ETT[key])
            compared += 1
    assert compared == 36  # 2 tables x 3 parts x 3 windows x history and future


FIELDS = {  # an independent oracle: pandas
    "month": lambda i: (i.month - 1) / 11,
    "week": lambda i: (i.isocalendar().week.to_numpy().astype(float) - 1) / 52,
    "year": lambda i: (i.day_of_year - 1) / 365,
    "day": lambda i: (i.day - 1) / 30,
    "weekday": lambda i: i.day_of_week / 6,
    "hour": lambda i: i.hour / 23,
    "minute": lambda i: i.minute / 59,
    "second": lambda i: i.second / 59,
}


@pytest.mark.parametrize(
    ("freq", "names"),
    [
        ("h", ["hour", "weekday", "day", "year"]),
        ("min", ["minute", "hour", "weekday", "day", "year"]),
        ("15min", ["minute", "hour", "weekday", "day", "year"]),
        ("t", ["minute", "hour", "weekday", "day", "year"]),
        ("s", ["second", "minute", "hour", "weekday", "day", "year"]),
        ("D", ["weekday", "day", "year"]),
        ("B", ["weekday", "day", "year"]),
        ("W-SUN", ["day", "week"]),
        ("ME", ["month"]),
        ("QS-JAN", ["month"]),
        ("YE", []),
    ],
)
@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_marks_equal_the_fields_of_pandas(freq, names, unit):
    random = np.random.default_rng(0).integers(-(2**31), 2**32, 2000)  # 1901 to 2106, before 1970 as well
    index = pd.DatetimeIndex(random.astype("datetime64[s]")).as_unit(unit)
    expected = np.stack([FIELDS[name](index) - 0.5 for name in names], axis=1) if names else np.zeros((2000, 0))
    close(time_marks(index, freq), expected)
    close(time_marks(index.to_numpy(), freq), expected)


def test_marks_round_towards_the_past():
    early = pd.DatetimeIndex(["1969-12-31 23:59:59.999"]).as_unit("ns")
    close(time_marks(early, "s"), [[59 / 59 - 0.5, 0.5, 0.5, 2 / 6 - 0.5, 0.5, 364 / 365 - 0.5]])


def test_marks_follow_the_local_clock():
    index = pd.date_range("2024-03-30 12:00", periods=48, freq="h", tz="Europe/Berlin")
    close(time_marks(index), time_marks(index.tz_localize(None)))
    close(time_marks(pd.Series(index)), time_marks(index))
    close(time_marks(index)[:, 0] * 23 + 11.5, index.hour)


@pytest.mark.parametrize(
    ("index", "freq", "kind", "message"),
    [
        ([1.0, 2.0], "h", TypeError, "float64"),
        (np.zeros((2, 2), dtype="datetime64[s]"), "h", TypeError, r"\(2, 2\)"),
        (np.array(["2020", "NaT"], dtype="datetime64[s]"), "h", ValueError, "1 empty dates"),
        (hours(2), "fortnight", ValueError, "fortnight.*choose one of"),
    ],
)
def test_marks_refuse(index, freq, kind, message):
    with pytest.raises(kind, match=message):
        time_marks(index, freq)


# ETT


@pytest.mark.parametrize("name", ["ETTh1", "ETTh2"])
@pytest.mark.parametrize(("history", "horizon"), [(168, 168), (336, 720)])
def test_ett_windows_are_the_official_ones(name, history, horizon):
    need(f"ett/{name}.csv")
    splits = ett_splits(name, history, horizon)
    close(splits.scaler.mean, ETT[f"{name}/mean"])
    close(splits.scaler.std, ETT[f"{name}/std"])
    size = f"{name}/{history}_{horizon}"
    for part in ("train", "val", "test"):
        data = getattr(splits, part)
        assert len(data) == int(ETT[f"{size}/{part}/len"])
        keys = [key.split("/") for key in ETT.files if key.startswith(f"{size}/{part}/")]
        stored = sorted({int(key[3]) for key in keys if len(key) == 5})
        assert stored == ([0, 1, len(data) - 1] if history == 168 else [])
        for window in stored:
            for found, field in zip(data.batch([window], float64), PARTS, strict=True):
                expected = ETT[f"{size}/{part}/{window}/{field}"]
                close(found[0][: len(expected)], expected)


def test_ett_table():
    need("ett/ETTh1.csv")
    table = load_ett("ETTh1")
    assert table.values.shape == (17420, 7) and table.channels[-1] == "OT"
    assert str(table.timestamps[0]) == "2016-07-01T00:00:00" and str(table.timestamps[-1]) == "2018-06-26T19:00:00"
    assert table.channel("OT")[0] == 30.5310001373291
    frame = table.frame()
    assert frame.index[0] == pd.Timestamp("2016-07-01") and frame["HUFL"].iloc[1] == 5.692999839782715
    table.channel("OT")[0] = 0  # a copy
    assert table.values[0, 6] != 0
    with pytest.raises(ValueError, match="no channel 'ot'; choose one of HUFL"):
        table.channel("ot")


def write_ett(path, rows=6, minutes=60, header="date,a,b", bad=None):
    stamps = np.datetime64("2016-07-01", "m") + minutes * np.arange(rows)
    lines = [header] + [f"{str(s).replace('T', ' ')}:00,{k}.5,{2 * k}" for k, s in enumerate(stamps)]
    if bad is not None:
        lines[3] = bad
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ett_from_an_own_file(tmp_path):
    table = load_ett("ETTm1", write_ett(tmp_path / "m.csv", minutes=15))
    close(table.values[:, 0], np.arange(6) + 0.5)
    assert table.channels == ("a", "b") and table.timestamps[1] - table.timestamps[0] == np.timedelta64(15, "m")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 15}, "not ETTh1: every row should be 60 minutes after"),
        ({"header": "time,a,b"}, "begins with date"),
        ({"bad": "2016-07-01 02:00:00,x,1"}, "damaged"),
        ({"bad": "2016-07-01 02:00:00,1"}, "damaged"),
        ({"bad": "yesterday,1,2"}, "damaged"),
        ({"bad": "2016-07-01 02:00:00,nan,1"}, "every value a number"),
    ],
)
def test_ett_refuses_other_files(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        load_ett("ETTh1", write_ett(tmp_path / "t.csv", **options))


def test_ett_says_where_to_get_the_quarter_hours():
    with pytest.raises(DataError, match=r"ETTm2 is not registered.*github.com/zhouhaoyi/ETDataset.*path="):
        ett_splits("ETTm2")
    with pytest.raises(ValueError, match="choose one of ETTh1"):
        ett_splits("ETTh9")


def test_quarter_hours_have_four_times_the_rows(tmp_path):
    path = write_ett(tmp_path / "m.csv", rows=20 * 30 * 24 * 4 + 5, minutes=15)
    splits = ett_splits("ETTm1", 96, 24, path=path)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [34560 - 119, 11520 - 23, 11520 - 23]
    assert splits.train.num_marks == 4  # as the official code: no minute
    assert ett_splits("ETTm1", 96, 24, path=path, freq="min").train.num_marks == 5


# Splits and scalers


def test_parts_share_no_target_and_scale_by_training_rows():
    table = random_table(300)
    splits = chronological_splits(table, 20, 5, (200, 250, 300))
    close(splits.scaler.mean, table.values[:200].mean(0))
    close(splits.scaler.std, table.values[:200].std(0))
    targets = {}
    for part, begin in (("train", 0), ("val", 180), ("test", 230)):
        data = getattr(splits, part)
        rows = {begin + start + 20 + k for start in data.start_of for k in range(5)}
        targets[part] = rows
        y = splits.scaler.inverse(data.batch(range(len(data)), float64)[1].numpy())
        close(y, np.stack([table.values[begin + s + 20 : begin + s + 25] for s in data.start_of]))
        assert len(splits.timestamps[part]) == {"train": 200, "val": 70, "test": 70}[part]
    assert (min(targets["train"]), max(targets["train"])) == (20, 199)
    assert (min(targets["val"]), max(targets["val"])) == (200, 249)
    assert (min(targets["test"]), max(targets["test"])) == (250, 299)


@pytest.mark.parametrize(
    ("ends", "history", "horizon", "message"),
    [
        ((200, 250, 252), 20, 5, "the test part has 22 rows, but one window needs history . horizon = 20 . 5 = 25"),
        ((200, 203, 300), 20, 5, "the val part has 23 rows"),
        ((10, 250, 300), 20, 5, "history=20 reaches back further than the 10 training rows"),
        ((22, 250, 300), 20, 5, "the train part has 22 rows"),
        ((200, 200, 300), 20, 5, "must increase"),
        ((200, 250, 301), 20, 5, "at most 300 rows"),
    ],
)
def test_short_parts_are_named(ends, history, horizon, message):
    """The official code returns a negative length here, which Python refuses without saying why."""
    with pytest.raises(ValueError, match=message):
        chronological_splits(random_table(300), history, horizon, ends)


def test_standard_scaler_round_trip_of_arrays_and_tensors():
    values = np.random.default_rng(0).normal(3, 7, size=(50, 4))
    values[:, 2] = 5.0  # never changes
    scaler = StandardScaler().fit(values)
    scaled = scaler.transform(values)
    close(scaled[:, [0, 1, 3]].std(0), 1)
    close(scaled[:, 2], 0)
    close(scaler.inverse(scaled), values, 1e-12)
    tensor = torch.from_numpy(values).float()
    back = scaler.inverse(scaler.transform(tensor))
    assert back.dtype == torch.float32
    close(back, values, 1e-5)  # float32, values of a few dozens
    again = StandardScaler(scaler.mean, scaler.std)
    close(again.transform(values), scaled, 0)


def test_standard_scaler_leaves_nan_out_and_refuses_nonsense():
    values = np.array([[1.0, 2.0], [np.nan, 4.0], [3.0, 6.0]])
    close(StandardScaler().fit(values).mean, [2, 4])
    for bad in (np.zeros(3), np.array([[np.inf]]), np.array([[np.nan], [np.nan]])):
        with pytest.raises(ValueError, match="is needed"):
            StandardScaler().fit(bad)
    with pytest.raises(ValueError, match="call fit"):
        StandardScaler().transform(values)
    with pytest.raises(ValueError, match="both mean and std"):
        StandardScaler(mean=[0.0])


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_mean_scaler(kind):
    history = kind([[0.0, 4.0, 8.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    close(MeanScaler().factor(history), [4, 1, 1])
    close(MeanScaler(1.0).factor(history), [5, 1, 1])
    close(MeanScaler(1.0, ignore_zero=True).factor(history), [7, 1, 1])
    close(MeanScaler().factor(history, axis=0), [1, 2 / 3, 5 / 3], 1e-7)  # kind may be float32
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="offset must be"):
            MeanScaler(bad)


# Windows


@st.composite
def window_cases(draw):
    history, horizon = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(history + horizon, 30), min_size=1, max_size=4))
    channels, marks, stride = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 7))
    return history, horizon, lengths, channels, marks, stride, draw(st.booleans()), draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(window_cases())
def test_windows_are_slices(case):
    history, horizon, lengths, channels, marks, stride, with_ids, seed = case
    random = np.random.default_rng(seed)
    values = [random.normal(size=(n, channels)) for n in lengths]
    calendars = [random.normal(size=(n, marks)) for n in lengths]
    ids = random.integers(0, 99, len(lengths)).tolist() if with_ids else None
    data = WindowDataset(values, calendars, history, horizon, stride, ids)
    expected = []
    for number, (v, m) in enumerate(zip(values, calendars, strict=True)):
        m = np.c_[m, np.full(len(m), ids[number])] if with_ids else m
        for s in range(0, len(v) - history - horizon + 1, stride):
            middle, end = s + history, s + history + horizon
            expected.append((v[s:middle], v[middle:end], m[s:middle], m[middle:end]))
    assert len(data) == len(expected)
    order = random.permutation(len(data))
    for found, part in zip(data.batch(order, float64), range(4), strict=True):
        assert torch.equal(found, torch.from_numpy(np.stack([expected[k][part] for k in order])))
    one = int(order[0])
    for found, part in zip(data[one], data.batch(torch.tensor([one])), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, part[0])


def test_windows_are_copies():
    values, marks = np.arange(20.0)[:, None], np.zeros((20, 2))
    data = WindowDataset(values, marks, 4, 2, ids=[7])
    before = [part.clone() for part in data.batch(range(len(data)))]
    values[:] = marks[:] = -1  # the arrays it was made from
    for part in (*data[0], *data.batch([0, 1]), *data.batch([0], float64), data.scale([0])):
        part.fill_(-9)  # what it gave
    data.start_of[:] = 0  # what it tells about itself
    for found, expected in zip(data.batch(range(len(data))), before, strict=True):
        assert torch.equal(found, expected)


def test_a_batch_of_several_series_keeps_its_ids():
    """Windows of three series over the same hours; the official code gives all of them the id of the last."""
    assert OTHER["custom/bug_batch_ids"].tolist() == [2, 2, 2]
    train, _ = custom_windows(OTHER["custom/data"], OTHER["custom/cov"][:, :3], 240, 48, 24)
    windows = [0, 7, 14]  # the first window of each series
    assert train.start_of[windows].tolist() == [0, 0, 0]
    for mark in train.batch(windows)[2:]:
        assert torch.equal(mark[..., -1], torch.tensor([0.0, 1.0, 2.0])[:, None].expand(mark.shape[:2]))
    loader = torch.utils.data.DataLoader(train, batch_size=len(train))
    _, _, mark_x, mark_y = next(iter(loader))
    for mark in (mark_x, mark_y):
        assert torch.equal(mark[..., -1], torch.arange(3.0).repeat_interleave(7)[:, None].expand(mark.shape[:2]))


def test_windows_give_their_series_back():
    values = [np.random.default_rng(k).normal(size=(n, 2)) for k, n in enumerate((9, 14))]
    data = WindowDataset(values, [np.zeros((n, 1)) for n in (9, 14)], 3, 2, scaler=MeanScaler())
    for found, expected in zip(data.series, values, strict=True):
        close(found, expected, 0)
        found[:] = 0  # copies
    close(data.series[1], values[1], 0)


def test_a_table_fits_together():
    with pytest.raises(ValueError, match=r"values has shape \(3, 1\); 3 stamps and 2 channels need \(3, 2\)"):
        SeriesTable(hours(3), np.zeros((3, 1)), ("a", "b"))


def test_length_is_known_before_the_first_window():
    data = WindowDataset(np.zeros((10, 1)), np.zeros((10, 1)), 3, 2)
    assert len(data) == 6
    assert sum(1 for _ in data) == 6  # ends by IndexError
    assert torch.equal(data[-1][0], data[5][0])


def test_windows_of_starts_and_strides():
    values = np.arange(30.0).reshape(2, 15, 1)
    data = WindowDataset(values, np.zeros((15, 1)), 3, 2, starts=[10, 0, 0])
    assert data.batch(range(6))[0][:, 0, 0].tolist() == [10, 0, 0, 25, 15, 15]
    data = WindowDataset(values, np.zeros((15, 1)), 3, 2, starts=[[1], [2, 3]])
    assert data.series_of.tolist() == [0, 1, 1] and data.start_of.tolist() == [1, 2, 3]
    assert data.batch([0, 1, 2])[0][:, 0, 0].tolist() == [1, 17, 18]
    assert len(WindowDataset(pd.DataFrame(values[0]), np.zeros((15, 0)), 3, 2, 4)) == 3


def test_windows_that_touch_nan_are_skipped_on_request():
    values = np.arange(12.0)[:, None]
    values[6] = np.nan
    build = lambda **options: WindowDataset(values, np.zeros((12, 1)), 2, 2, **options)
    with pytest.raises(ValueError, match=r"1 values are NaN or infinite, the first in row 6.*missing='skip'"):
        build()
    assert build(missing="skip").start_of.tolist() == [0, 1, 2, 7, 8]
    assert torch.isfinite(build(missing="skip").batch(range(5))[0]).all()
    assert len(build(missing="keep")) == 9
    values[0] = np.inf
    for missing in ("skip", "keep"):
        with pytest.raises(ValueError, match="infinite"):
            build(missing=missing)
    values[:] = np.nan
    with pytest.raises(ValueError, match="no window is left"):
        build(missing="skip")


def test_mean_scaled_windows():
    values = np.array([2.0, 4.0, 6.0, 0.0, 0.0, 0.0, 3.0, 3.0])[:, None]
    data = WindowDataset(values, np.zeros((8, 1)), 3, 2, scaler=MeanScaler(1.0))
    x, y, _, _ = data.batch(range(4), float64)
    factor = data.scale(range(4))
    assert factor.flatten().tolist() == [5.0, 10 / 3 + 1, 3.0, 1.0]
    for number in range(4):
        close(x[number] * factor[number], values[number : number + 3])
        close(y[number] * factor[number], values[number + 3 : number + 5])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((np.zeros((5, 1)), np.zeros((5, 1)), 4, 2), {}, "5 rows, but one window needs history . horizon = 4 . 2 = 6"),
        ((np.zeros((5, 1)), np.zeros((5, 1)), 0, 2), {}, "history=0.*at least 1"),
        ((np.zeros((5, 1)), np.zeros((5, 1)), 2, 2, 0), {}, "stride=0"),
        ((np.zeros((5, 1)), np.zeros((4, 1)), 2, 2), {}, r"values have \[5\] rows and marks \[4\]"),
        ((np.zeros(5), np.zeros((5, 1)), 2, 2), {}, "values has the shapes"),
        (([np.zeros((5, 1)), np.zeros((5, 2))], np.zeros((5, 1)), 2, 2), {}, "values has the shapes"),
        ((np.zeros((2, 5, 1)), np.zeros((5, 1)), 2, 2), {"ids": [1]}, "1 ids for 2 series"),
        ((np.zeros((5, 1)), np.zeros((5, 1)), 2, 2), {"starts": [2]}, "start at 0 to 1"),
        ((np.zeros((5, 1)), np.zeros((5, 1)), 2, 2), {"starts": []}, "starts is empty"),
        ((np.zeros((2, 5, 1)), np.zeros((5, 1)), 2, 2), {"starts": [[0]]}, "1 lists for 2 series"),
        ((np.zeros((5, 1)), np.zeros((5, 1)), 2, 2), {"missing": "drop"}, "choose refuse, skip or keep"),
        ((np.zeros((2, 5, 1)), np.zeros((5, 1)), 4, 2), {"name": "wells"}, "wells 0 has 5 rows"),
    ],
)
def test_windows_refuse(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        WindowDataset(*arguments, **options)


@pytest.mark.parametrize(
    ("indices", "kind"), [([9], IndexError), ([-10], IndexError), ([[0]], ValueError), (3, ValueError)]
)
def test_there_is_no_such_window(indices, kind):
    data = WindowDataset(np.zeros((10, 1)), np.zeros((10, 1)), 1, 1)
    assert data.batch([])[0].shape == (0, 1, 1)
    with pytest.raises(kind, match=r"windows are numbered 0 to 8|one axis"):
        data.batch(indices)


# Synthetic series


def test_sines_are_the_official_ones():
    x = OTHER["sin/x"]
    close(sine_mixture(x, OTHER["sin/T"], OTHER["sin/A"]), OTHER["sin/y"])
    close(sine_marks(x, 3), OTHER["sin/cov"])


@pytest.mark.parametrize("length", [3, 4, 8, 17, 300])
def test_noise_has_exactly_the_covariance(length):
    """The map from white to coloured noise is linear: its matrix times its transpose is the covariance, no sampling."""
    matrix = module._color(torch.eye(2 * (length - 1), dtype=float64), length).numpy()
    lag = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    close(matrix.T @ matrix, 1 / (lag + 1))  # sums of a few hundred float64 terms
    if length == 8:
        close(matrix.T @ matrix, OTHER["sin/noise_cov_8"])


@pytest.mark.parametrize("length", [3, 100, 14400])
def test_nothing_is_cut_off_the_spectrum(length):
    """The square root is of numbers above zero, so the clamp only removes rounding."""
    lag = np.minimum(np.arange(2 * length - 2), 2 * length - 2 - np.arange(2 * length - 2))
    assert np.fft.rfft(1 / (lag + 1)).real.min() > 0


def test_sines_as_drawn():
    sines = make_sines(300, 600, (24, 168), noise=2.0, generator=torch.Generator().manual_seed(1))
    noise = sines.values - sines.clean
    for lag in (0, 1, 5, 100):
        per_series = (noise[:, : 600 - lag] * noise[:, lag:]).mean(1)
        error = per_series.std() / np.sqrt(300)
        assert abs(per_series.mean() - 4 / (lag + 1)) < 4.5 * error
    for number in (0, 299):
        time = sines.starts[number] + np.arange(600)
        close(
            sines.clean[number],
            sum(a * np.sin(2 * np.pi * time / p) for a, p in zip(sines.amplitudes[number], (24, 168), strict=True)),
            1e-11,
        )
        close(sines.marks[number], sine_marks(time, number))
    assert sines.amplitudes.min() >= 5 and sines.amplitudes.max() < 10 and np.ptp(sines.amplitudes) > 4.5
    assert sines.starts.min() >= 0 and sines.starts.max() < 168 and np.ptp(sines.starts) > 150
    again = make_sines(300, 600, (24, 168), noise=2.0, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(again.values, sines.values)
    assert not np.array_equal(make_sines(300, 600, (24, 168), noise=2.0).values, sines.values)


@pytest.mark.parametrize(
    "options", [{"num_series": 0}, {"length": 2}, {"noise": -1.0}, {"periods": ()}, {"periods": (0,)}]
)
def test_sines_refuse(options):
    with pytest.raises(ValueError, match="at least 1 series"):
        make_sines(**options)


def sines_of(golden):
    return module.SineSeries(golden[..., 0], golden[..., 1:], np.zeros(0), np.zeros(0), np.zeros(0))


@pytest.mark.parametrize(("part", "side"), [("train", 0), ("test", 1)])
def test_synthetic_windows_are_the_official_ones(part, side):
    data = official_windows("sines", sines_of(OTHER["synth/arr"]), 72, 48)[side]
    assert len(data) == int(OTHER[f"synth/{part}/len"])
    last = len(data) - 1
    for found, field in zip(data.batch([last], float64), PARTS, strict=True):
        close(found[0], OTHER[f"synth/{part}/last/{field}"])
    close(data.scale([last]).squeeze(), OTHER[f"synth/{part}/last/mean"] + 1)


def test_synthetic_windows_of_full_size():
    """The numbers of the paper's setting: 60 series of 14,400 hours, 720 to 720."""
    table = module.SineSeries(np.zeros((60, 14400)), np.zeros((60, 14400, 4)), np.zeros(0), np.zeros(0), np.zeros(0))
    train, test = official_windows("sines", table, 720, 720)
    assert (len(train), len(test)) == (29160, 1380)
    assert set(train.series_of) == set(range(60)) and test.start_of[0] == 12385


# The other official sets


def test_custom_windows_are_the_official_ones():
    train, _ = custom_windows(OTHER["custom/data"], OTHER["custom/cov"][:, :3], 240, 48, 24)
    assert len(train) == int(OTHER["custom/train_len"])
    last = len(train) - 1
    for found, field in zip(train.batch([last]), PARTS, strict=True):
        close(found[0], OTHER[f"custom/last/{field}"], 1e-6)  # float32
    close(train.scale([last]).squeeze(), OTHER["custom/last/mean"] + 1, 1e-6)


def test_custom_windows_without_a_test_part_say_so():
    with pytest.raises(ValueError, match="the test part has no window: 300 rows, 290 of them for training"):
        custom_windows(np.zeros((1, 300)), np.zeros((300, 3)), 290, 48, 24)
    with pytest.raises(ValueError, match="the training part has no window"):
        custom_windows(np.zeros((1, 300)), np.zeros((300, 3)), 60, 48, 24)
    with pytest.raises(ValueError, match="number of series, time"):
        custom_windows(np.zeros(300), np.zeros((300, 3)), 60, 48, 24)


def test_electricity_one_step_is_the_official_one():
    marks = np.nan_to_num(
        OTHER["elect/cov0"][:, 1:]
    )  # the age is dropped by their model; a constant month is NaN there
    train, test = module._electricity_one_step(OTHER["elect/data"], marks, 400, 160)
    assert (len(train), len(test)) == (24, 9)
    close(train.v, OTHER["elect/train/v"][:, 0], 1e-6)  # stored in float32
    close(test.v, OTHER["elect/test/v"][:, 0], 1e-6)
    assert sorted(set(train.start_of[train.series_of == 1] % 24)) == [50 % 24]  # windows begin where the series does
    batch = test.batch([0], float64)
    close(batch.sequence[[0, -1]], np.nan_to_num(OTHER["elect/test0/seq_first_last"]), 1e-6)
    close(batch.target * batch.scale, OTHER["elect/test0/label"], 1e-6)
    for window in (0, -1):  # training labels are divided by v; the last 24 are what the loader asks for
        batch = train.batch([window], float64)
        close(batch.target, OTHER["elect/train/label"][window, -24:], 1e-6)
        close(batch.sequence[0, :-1, 0], OTHER["elect/train/label"][window, :168], 1e-6)
        close(batch.sequence[0, :, 1:], np.nan_to_num(OTHER["elect/train/data"][window, :169, 2:]), 1e-6)


def test_solar_one_step_is_the_official_one():
    train, test = module._solar_one_step(OTHER["wind/seqs"], OTHER["wind/cov"])
    assert (len(train), len(test)) == (len(OTHER["wind/train/v"]), len(OTHER["wind/test/v"])) == (103, 2)
    order = np.lexsort((train.series_of, train.start_of))  # theirs are sorted by time first
    close(train.v[order], OTHER["wind/train/v"], 1e-6)
    close(test.v, OTHER["wind/test/v"], 1e-6)
    batch = train.batch(order[:1], float64)
    close(batch.sequence[0, :-1], OTHER["wind/train/data"][0, :191], 1e-6)
    close(batch.target, OTHER["wind/train/data"][0, -24:, 0], 1e-6)
    batch = test.batch([0], float64)
    close(batch.sequence[[0, -1]], OTHER["wind/test0/seq_first_last"], 1e-6)
    close(batch.target * batch.scale, OTHER["wind/test0/label"], 1e-6)
    close(batch.scale, np.full(24, OTHER["wind/test0/v"]), 1e-6)
    close(one_step_marks(hours(1500, "1986-01-01")), OTHER["wind/cov"])  # wherever this runs


def test_app_flow_one_step_is_the_official_one():
    flows = OTHER["flow/seqs"]
    train, test = module._flow_one_step(list(flows[..., 0]), list(flows[..., 1:]))
    close(train.v, OTHER["flow/train/v"], 1e-6)
    close(test.v, OTHER["flow/test/v"], 1e-6)
    for data, part in ((train, "train"), (test, "test")):
        batch = data.batch([0, -1], float64)
        stored = OTHER[f"flow/{part}/data"]
        close(batch.target.reshape(2, 24), stored[:2, -24:, 0], 1e-6)
        close(batch.sequence.reshape(2, 24, 192, 5)[:, 0, :-1], stored[:2, :191], 1e-6)


def test_solar_scale_looks_at_the_first_target_and_ours_does_not():
    values = np.abs(np.random.default_rng(0).normal(size=(1, 1500))) + 0.1
    other = values.copy()
    other[0, 191] += 5  # what the first sequence of the first window asks for
    marks = np.zeros((1500, 3))
    scales = [module._solar_one_step(v, marks)[0].v[0] for v in (values, other)]
    close(scales[1] - scales[0], 5 / 192)
    ours = [OneStepWindows(v, marks).v[0] for v in (values, other)]
    assert ours[0] == ours[1]


def test_official_sets_from_tables():
    """Selection, split and marks of the tables, by numbers that follow from the official code."""
    axis = hours(32304, "2011-01-01")
    values = np.ones((32304, 3))
    values[:500, 1] = values[:10_000, 2] = 0  # connected later; too late
    train, test = official_windows("electricity", SeriesTable(axis, values, ("a", "b", "c")), 168, 168)
    train_end = int((axis <= np.datetime64("2014-04-01T23")).sum()) - 500
    assert set(train.series_of) == {0, 1}
    assert len(train) == 2 * ((train_end - 336) // 24)
    assert len(test) == 2 * ((31804 - (train_end - 167) - 336) // 24)
    first = train.batch([0], float64)[2][0, 0]
    stamp = pd.Timestamp(axis[500])
    close(first, [stamp.day_of_week / 7, stamp.hour / 24, stamp.month / 12, 0])
    train, test = official_one_step("electricity", SeriesTable(axis, values, ("a", "b", "c")))
    assert test.start_of.max() + 192 == 14 * 24 and set(np.bincount(test.series_of)) == {7}
    assert len(train) == sum((32136 - 168) // 24 - (begin + 23) // 24 for begin in (0, 500, 10_000))

    flow = [SeriesTable(hours(n, "2020-01-01"), np.full((n, 1), 2.0), (str(n),)) for n in (2999, 3500, 4000)]
    flow.append(SeriesTable(hours(4000), np.zeros((4000, 1)), ("dead",)))
    train, test = official_windows("app_flow", flow, 168, 24)
    assert set(train.series_of) == {0, 1} and len(train) == 2 * ((2500 - 192) // 24)
    stamp = pd.Timestamp(flow[2].timestamps[500])
    close(
        train.batch([len(train) // 2], float64)[2][0, 0], [stamp.day_of_week / 7, stamp.hour / 24, stamp.month / 12, 1]
    )
    train, test = official_one_step("app_flow", flow)
    assert len(set(train.series_of)) == 3
    solar = SeriesTable(hours(1500, "1986-01-01"), OTHER["wind/seqs"].T, ("a", "b"))
    close(official_one_step("solar", solar)[1].v, OTHER["wind/test/v"], 1e-6)
    with pytest.raises(ValueError, match="choose electricity, app_flow or sines"):
        official_windows("wind", solar, 1, 1)
    with pytest.raises(ValueError, match="choose electricity, solar or app_flow"):
        official_one_step("wind", solar)
    with pytest.raises(ValueError, match="none of the 1 series has 3,000 hours"):
        official_windows("app_flow", flow[:1], 168, 24)


def test_load_electricity(tmp_path):
    stamps = pd.date_range("2011-01-01 00:15", periods=4 * 50, freq="15min")
    quarters = np.random.default_rng(0).integers(0, 99, (200, 2)) / 4
    lines = ['"";"MT_001";"MT_002"'] + [
        f'"{s}";' + ";".join(str(v).replace(".", ",") for v in row) for s, row in zip(stamps, quarters, strict=True)
    ]
    path = tmp_path / "LD2011_2014.txt"
    path.write_text("\n".join(lines))
    table = load_electricity(path)
    expected = pd.DataFrame(quarters, stamps).resample("h", label="left", closed="right").sum()
    close(table.values, expected.to_numpy())
    assert (table.timestamps == expected.index.to_numpy()).all() and table.channels == ("MT_001", "MT_002")
    path.write_text("\n".join([*lines[:3], lines[2]]))
    with pytest.raises(DataError, match="do not increase"):
        load_electricity(path)
    path.write_text("a;b\nx;1\n")
    with pytest.raises(DataError, match="first column should hold dates"):
        load_electricity(path)
    with pytest.raises(DataError, match=r"not registered.*archive.ics.uci.edu"):
        load_electricity(tmp_path / "absent.txt")


def test_load_solar(tmp_path):
    path = tmp_path / "solar.csv"
    pd.DataFrame({"AT": [0.0, 0.5], "BE": [0.1, 0.2]}).to_csv(path, index=False)
    table = load_solar(path)
    close(table.values, [[0, 0.1], [0.5, 0.2]])
    assert table.channels == ("AT", "BE") and str(table.timestamps[1]) == "1986-01-01T01:00:00"
    path.write_text("when,AT\nnow,1\n")
    with pytest.raises(DataError, match="see when"):
        load_solar(path)
    with pytest.raises(DataError, match="european-solar"):
        load_solar(tmp_path / "absent.csv")


def test_load_app_flow(tmp_path):
    path = tmp_path / "flow.csv"
    rows = [("b", "x", "2020-01-01 01:00", 4), ("b", "x", "2020-01-01 00:00", 3), ("a", "y", "2020-01-01 00:00", 1)]
    pd.DataFrame(rows, columns=["app_name", "zone", "time", "value"]).to_csv(path)
    first, second = load_app_flow(path)
    assert (first.channels, second.channels) == (("a/y",), ("b/x",)) and second.values[:, 0].tolist() == [3, 4]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column app_name, zone, time, value"):
        load_app_flow(path)
    path.write_text("app_name,zone,time,value\na,b,noon,1\n")
    with pytest.raises(DataError, match="noon"):
        load_app_flow(path)


# One step at a time


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_one_step_windows_by_their_definition(length, horizon, stride, series, seed):
    random = np.random.default_rng(seed)
    values, marks = random.normal(3, 1, size=(series, 20)), random.normal(size=(20, 3))
    data = OneStepWindows(values, marks, length, horizon, stride)
    expected = []
    for number, v in enumerate(values):
        for s in range(0, 20 - (length + horizon - 1) + 1, stride):
            known = v[s : s + length - 1]
            scale = known.mean() if known.mean() > 0 else 1.0
            for k in range(s, s + horizon):
                sequence = np.c_[v[k : k + length] / scale, marks[k : k + length], np.full(length, number)]
                target = sequence[-1, 0]
                sequence[-1, 0] = -1
                expected.append((sequence, target, scale))
    found = data.batch(range(len(data)), float64)
    for part, number in zip(found, range(3), strict=True):
        close(part, np.stack([each[number] for each in expected]), 1e-12)
    close(
        found.target * found.scale,
        [
            values[s, k + length - 1]
            for s in range(series)
            for b in range(0, 20 - (length + horizon - 1) + 1, stride)
            for k in range(b, b + horizon)
        ],
        1e-12,
    )
    assert data.num_marks == 4
    single = data[len(data) - 1]
    for part, whole in zip(single, data.batch(range(len(data))), strict=True):
        assert part.dtype == torch.float32 and torch.equal(part, whole[-horizon:])


def test_one_step_windows_are_copies():
    values, marks = np.arange(1.0, 31.0), np.zeros((30, 3))
    data = OneStepWindows(values, marks, 5, 3, 3)
    before = [part.clone() for part in data.batch(range(len(data)))]
    values[:] = marks[:] = 9
    for part in data.batch([0, 1]):
        part.fill_(-7)
    data.v[:] = 0
    for found, expected in zip(data.batch(range(len(data))), before, strict=True):
        assert torch.equal(found, expected)


def test_one_step_windows_of_zeros_and_nan():
    values = np.array([0.0, 0, 0, 0, 0, 0, 2, 4, 0, 6, np.nan, 1, 1, 1, 1, 1])
    build = lambda **options: OneStepWindows(values, np.zeros((16, 3)), 4, 2, 1, missing="skip", **options)
    data = build()
    assert data.start_of.tolist() == [4, 5, 11]  # 0 to 3 see zeros alone; 6 to 10 touch NaN
    assert data.v.tolist() == [2, 3, 1]  # the mean of the values other than 0
    every = build(drop_empty=False)
    assert every.start_of.tolist() == [0, 1, 2, 3, 4, 5, 11] and every.v.tolist() == [1, 1, 1, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="NaN or infinite"):
        OneStepWindows(values, np.zeros((16, 3)), 4, 2)
    with pytest.raises(ValueError, match="begins with zeros alone"):
        OneStepWindows(np.zeros(9), np.zeros((9, 3)), 4, 2)


def test_one_step_scales_are_found_in_pieces():
    values = np.abs(np.random.default_rng(0).normal(size=(2, 6000)))
    data = OneStepWindows(values, np.zeros((6000, 3)), 4, 1, 1)  # more windows than one piece
    windows = np.lib.stride_tricks.sliding_window_view(values, 3, axis=1)[:, : 6000 - 3]
    close(data.v, windows.mean(-1).flatten(), 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length from 2 on"),
        ({"horizon": 0}, "the others from 1 on"),
        ({"scale_steps": 99}, "within the window"),
        ({"length": 190}, "one window needs length . horizon - 1 = 190 . 24 - 1 = 213"),
        ({"ids": [1, 2]}, "2 ids for 1 series"),
    ],
)
def test_one_step_windows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        OneStepWindows(np.ones(200), np.zeros((200, 3)), **{"length": 10, **options})
    with pytest.raises(ValueError, match="one axis of time"):
        OneStepWindows(np.ones((2, 50, 1)), np.zeros((50, 3)), 10)
    with pytest.raises(IndexError, match="numbered 0 to"):
        OneStepWindows(np.ones(50), np.zeros((50, 3)), 10, 2).batch([99])


def test_one_step_parts_predict_their_own_rows():
    table = random_table(900, 2)
    parts = one_step_splits(table, (500, 700, 900), length=50, horizon=24)
    begins, spans = (0, 451, 651), ((49, 500), (500, 700), (700, 900))
    for data, begin, (low, high) in zip(parts, begins, spans, strict=True):
        targets = np.array([begin + s + 49 + k for s in data.start_of for k in range(24)])
        assert targets.min() == low and targets.max() < high
        assert high - targets.max() <= 24  # no more is left over than a window
        batch = data.batch(range(len(data)), float64)
        series = np.repeat(data.series_of, 24)
        close(batch.target * batch.scale, table.values[targets, series], 1e-12)
        close(batch.sequence[:, -1, 1:4], one_step_marks(table.timestamps)[targets])
        close(batch.sequence[:, -1, 4], series)
    with pytest.raises(ValueError, match="validation series 0 has 53 rows"):
        one_step_splits(table, (500, 504, 900), length=50)
    with pytest.raises(ValueError, match="must increase"):
        one_step_splits(table, (500, 400, 900))
    with pytest.raises(ValueError, match="reaches back further"):
        one_step_splits(table, (100, 400, 900))


# PJM


def write_pjm(folder, rows):
    path = folder / "AEP_hourly.csv"
    path.write_text("Datetime,AEP_MW\n" + "\n".join(f"{stamp},{value}" for stamp, value in rows) + "\n")
    return path


def test_pjm_puts_hours_in_order(tmp_path, monkeypatch):
    rows = [
        ("2020-01-01 05:00:00", 50),
        ("2020-01-01 01:00:00", 10),
        ("2020-01-01 02:00:00", 20),
        ("2020-01-01 02:00:00", 30),
        ("2020-01-01 04:00:00", 40),
    ]
    path = write_pjm(tmp_path, rows)
    monkeypatch.setattr(module, "fetch", lambda name: path)
    span = {"start": "2020-01-01 01:00", "end": "2020-01-01 05:00"}
    assert load_pjm(["AEP"], **span).values[:, 0].tolist() == [10, 25, 32.5, 40, 50]
    assert load_pjm(["AEP"], **span, missing="ffill").values[:, 0].tolist() == [10, 25, 25, 40, 50]
    assert np.isnan(load_pjm(["AEP"], **span, missing="nan").values[:, 0]).tolist() == [0, 0, 1, 0, 0]
    with pytest.raises(DataError, match="1 hours come twice, the first is 2020-01-01T02"):
        load_pjm(["AEP"], **span, duplicates="refuse")
    with pytest.raises(ValueError, match="AEP covers 2020-01-01T01 to 2020-01-01T05, not 2020-01-01T00"):
        load_pjm(["AEP"], "2020-01-01", "2020-01-01 05:00")
    with pytest.raises(ValueError, match="is after"):
        load_pjm(["AEP"], "2020-01-02", "2020-01-01")
    with pytest.raises(ValueError, match="choose mean or refuse"):
        load_pjm(["AEP"], duplicates="first")
    with pytest.raises(ValueError, match="no series 'ERCOT'; choose of AEP"):
        load_pjm(["AEP", "ERCOT"])
    with pytest.raises(ValueError, match="give a list of names"):
        load_pjm("AEP")


def test_pjm_is_what_pandas_makes_of_it():
    need(*(f"pjm/{name}_hourly.csv" for name in PJM))
    table = load_pjm(PJM)
    axis = pd.date_range("2013-06-01 01:00", "2018-08-03 00:00", freq="h")
    assert (table.timestamps == axis.to_numpy()).all()
    for number, name in enumerate(PJM):
        frame = pd.read_csv(module.fetch(f"pjm/{name}_hourly.csv"), parse_dates=["Datetime"])
        series = frame.groupby("Datetime")[f"{name}_MW"].mean().reindex(axis)
        assert series.isna().sum() in (6, 7)  # five springs, the autumn of 2013, and one hour of AEP
        close(table.values[:, number], series.interpolate(), 1e-9)  # megawatts
        close(load_pjm([name], missing="ffill").values[:, 0], series.ffill(), 0)
    spring = np.datetime64("2018-03-11T03", "s")  # the hour that ends at 3:00 on the Sunday when clocks go forward
    assert spring in table.timestamps[np.isnan(load_pjm(PJM, missing="nan").values).all(axis=1)]


def test_pjm_has_ten_regions():
    need(*(f"pjm/{name}_hourly.csv" for name in module._PJM))
    table = load_pjm()
    assert table.values.shape == (45336, 10) and np.isfinite(table.values).all()


# Own tables: what is recognised


def long_frame(count=30, freq="h", ids=("a", "b"), start="2024-01-01", seed=0):
    random = np.random.default_rng(seed)
    stamps = pd.date_range(start, periods=count, freq=freq)
    return pd.concat(
        [pd.DataFrame({"unique_id": name, "ds": stamps, "y": random.normal(size=count)}) for name in ids],
        ignore_index=True,
    )


def one(count=30, freq="h", **options):
    return long_frame(count, freq, ("a",), **options).drop(columns="unique_id")


def same(panel, other):
    assert panel.ids == other.ids and panel.freq == other.freq
    for a, b in zip(panel, other, strict=True):
        assert a.index.equals(b.index)
        for name in ("y", "observed", "past", "future", "static"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_every_form_gives_the_same_panel():
    frame = long_frame()
    panel = check_frame(frame)
    assert panel.ids == ["a", "b"] and panel.freq == "h" and len(panel) == 2
    wide = frame.pivot(index="ds", columns="unique_id", values="y")
    wide.columns.name = None
    forms = [
        frame.set_index("unique_id"),
        frame.set_index("ds"),
        frame.set_index(["unique_id", "ds"]),
        frame.assign(ds=frame.ds.astype(str)),
        frame.assign(ds=frame.ds.dt.date.astype(str) + "T" + frame.ds.dt.strftime("%H:%M")),
        frame.assign(ds=[s.to_pydatetime() for s in frame.ds]),
        frame.assign(y=frame.y.astype("Float64")),
        frame.assign(y=frame.y.astype(object)),
        frame.assign(unique_id=frame.unique_id.astype("category")),
        wide,
        wide.rename_axis("date").reset_index(),
        wide.reset_index(),
        wide.to_period("h"),
        wide.astype(object),
    ]
    for form in forms:
        same(check_frame(form), panel)
    same(check_frame(frame.sample(frac=1, random_state=1).sort_values("unique_id", kind="stable")), panel)
    same(check_frame(panel.frame()), panel)
    renamed = frame.rename(columns={"unique_id": "shop", "ds": "day", "y": "sales"})
    same(check_frame(renamed, id="shop", time="day", target="sales"), panel)
    close(check_frame(frame.set_index("ds")["y"][:30])["y"].y, panel["a"].y, 0)
    decimals = frame.assign(y=[Decimal(str(v)) for v in frame.y])
    close(check_frame(decimals)["a"].y, panel["a"].y, 0)


def test_the_order_of_rows_says_nothing():
    frame = long_frame(50)
    for seed in range(3):
        mixed = check_frame(frame.sample(frac=1, random_state=seed))
        for name in ("a", "b"):
            close(mixed[name].y, check_frame(frame)[name].y, 0)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_units_and_zones(unit, zone):
    stamps = pd.date_range("2024-10-26 12:00", periods=48, freq="h", tz=zone).as_unit(unit)
    panel = check_frame(pd.DataFrame({"ds": stamps, "y": np.arange(48.0)}).sample(frac=1, random_state=0))
    series = panel["y"]
    assert panel.freq == "h" and (series.index == stamps).all() and series.index.unit == unit
    close(series.y, np.arange(48))
    assert str(series.index.tz) == str(zone)
    ahead = future_index(panel, 3)["y"]
    assert (ahead == pd.date_range(stamps[-1], periods=4, freq="h")[1:]).all() and ahead.unit == unit
    assert calendar_features(series.index, panel.freq).shape == (48, 8)
    gappy = check_frame(pd.DataFrame({"ds": stamps, "y": np.arange(48.0)}).drop(index=[13, 14, 15]), impute="linear")
    close(gappy["y"].y, np.arange(48), 1e-12)


FREQUENCIES = [
    "s",
    "10s",
    "min",
    "15min",
    "h",
    "2h",
    "6h",
    "D",
    "B",
    "W-SUN",
    "W-WED",
    "MS",
    "ME",
    "2MS",
    "5MS",
    "BMS",
    "BME",
    "QS-JAN",
    "QS-FEB",
    "QE-DEC",
    "QE-NOV",
    "BQE-DEC",
    "YS-JAN",
    "YE-DEC",
    "YE-JUN",
    "2YS-JAN",
]


@pytest.mark.parametrize("freq", FREQUENCIES)
def test_every_frequency(freq):
    """Inferred with and without gaps; the future continues the grid."""
    full = pd.date_range("2020-03-02", periods=48, freq=freq)
    frame = pd.DataFrame({"ds": full[:40], "y": np.arange(40.0)})
    panel = check_frame(frame)
    assert panel.freq == pd.tseries.frequencies.to_offset(freq).freqstr
    assert (panel["y"].index == full[:40]).all()
    assert (future_index(panel, 8)["y"] == full[40:]).all()
    for impute in ("ffill", "linear", "mask"):
        gappy = check_frame(frame.drop(index=[5, 17, 18]), impute=impute)
        assert gappy.freq == panel.freq and (gappy["y"].index == full[:40]).all()
        assert np.flatnonzero(~gappy["y"].observed).tolist() == [5, 17, 18]
    features = calendar_features(full, freq)
    assert features.shape[1] % 2 == 0 and np.abs(features).max(initial=0) <= 0.5


def test_old_names_of_frequencies():
    for old, new in {
        "H": "h",
        "T": "min",
        "M": "ME",
        "Q": "QE-DEC",
        "A-JUN": "YE-JUN",
        "15T": "15min",
        "BM": "BME",
    }.items():
        stamps = pd.date_range("2020-01-01", periods=20, freq=new)
        assert check_frame(pd.DataFrame({"ds": stamps, "y": 1.0}), freq=old).freq == new
    stamps = pd.date_range("2020-01-01", periods=20, freq="90min")
    assert check_frame(pd.DataFrame({"ds": stamps, "y": 1.0}), freq=pd.Timedelta(minutes=90)).freq == "90min"


def test_whole_numbers_count_steps():
    frame = pd.DataFrame({"ds": [30, 10, 40, 20], "y": [3.0, 1.0, 4.0, 2.0]})
    panel = check_frame(frame)
    assert panel.freq == 10 and panel["y"].y.tolist() == [1, 2, 3, 4]
    assert list(panel["y"].index) == [10, 20, 30, 40] and list(future_index(panel, 2)["y"]) == [50, 60]
    assert calendar_features(panel["y"].index, 10).shape == (4, 0)
    same(check_frame(panel.frame()), panel)
    gap = check_frame(frame[frame.ds != 20], freq=10, impute="linear")
    assert gap["y"].y.tolist() == [1, 2, 3, 4]
    years = check_frame(pd.DataFrame({"ds": range(1990, 2020), "y": 1.0}))
    assert years.freq == 1 and len(years["y"]) == 30


def test_series_of_different_starts_and_lengths():
    frame = pd.concat(
        [long_frame(30, ids=("a",)), long_frame(12, ids=("b",), start="2023-05-05 03:00"), long_frame(1, ids=("c",))]
    )
    panel = check_frame(frame)
    assert [len(s) for s in panel] == [30, 12, 1] and panel["b"].index[0] == pd.Timestamp("2023-05-05 03:00")
    assert panel.freq == "h"  # c alone would not tell
    wide = pd.DataFrame(
        {"a": [np.nan, np.nan, 1, 2, 3], "b": [5.0, 6, 7, np.nan, np.nan]}, pd.date_range("2024", periods=5, freq="ME")
    )
    panel = check_frame(wide)
    assert (
        panel["a"].index[0] == wide.index[2]
        and panel["a"].y.tolist() == [1, 2, 3]
        and panel["b"].y.tolist() == [5, 6, 7]
    )


def test_constant_and_single_series():
    assert (
        check_frame(pd.DataFrame({"ds": pd.date_range("2024", periods=9, freq="D"), "y": 0}))["y"].y.tolist() == [0] * 9
    )
    assert len(check_frame(one(2), freq="h")["y"]) == 2 and len(check_frame(one(1), freq="h")["y"]) == 1


def test_imputation_by_its_definition():
    random = np.random.default_rng(0)
    stamps = pd.date_range("2024", periods=200, freq="h")
    values = pd.Series(random.normal(size=200), stamps)
    holes = random.random(200) < 0.3
    holes[:3] = True
    holed = values.where(~holes)
    absent = random.random(200) < 0.2
    frame = holed[~absent].rename_axis("ds").rename("y").reset_index()
    first = holed.where(~absent).first_valid_index()
    expected = holed.where(~absent)[first : frame.ds.max()]
    for impute, filled in {"ffill": expected.ffill(), "linear": expected.interpolate(), "mask": expected}.items():
        series = check_frame(frame, freq="h", impute=impute)["y"]
        assert (series.index == expected.index).all()
        close(series.y, filled)
        assert (series.observed == expected.notna()).all()


def test_covariates():
    frame = long_frame(10).assign(price=np.arange(20.0), rain=np.arange(20) % 3, size=[1.5] * 10 + [2] * 10, note="x")
    panel = check_frame(frame, past=["rain"], future=["price"], static=["size"])
    b = panel["b"]
    assert b.past.shape == b.future.shape == (10, 1) and b.static.tolist() == [2] and b.future[0, 0] == 10
    assert panel.unused == ("note",)
    same(check_frame(panel.frame(), past=["rain"], future=["price"], static=["size"]), panel)
    gap = check_frame(frame.drop(index=[4]), past=["rain"], future=["price"], static=["size"], impute="ffill")["a"]
    assert gap.future[:, 0].tolist() == [0, 1, 2, 3, 3, 5, 6, 7, 8, 9]
    line = check_frame(frame.drop(index=[4]), future=["price"], impute="linear")["a"]
    assert line.future[:, 0].tolist() == list(range(10))
    wide = frame[:10].set_index("ds")[["y", "price"]].rename(columns={"y": "shop"})
    assert check_frame(wide, future=["price"])["shop"].future[:, 0].tolist() == list(range(10))
    masked = check_frame(frame.drop(index=[4]), future=["price"], impute="mask")["a"]
    assert np.isnan(masked.y[4]) and masked.future[4, 0] == 3


# Own tables: what is refused


def local_hours(start):
    stamps = pd.date_range(start, periods=72, freq="h", tz="Europe/Berlin")
    return pd.DataFrame({"ds": stamps.tz_localize(None), "y": np.arange(72.0)})


REFUSED = {
    "no table": (lambda: [1, 2], {}, TypeError, "frame is a list"),
    "empty": (lambda: one()[:0], {}, DataError, "the table is empty: 0 rows"),
    "no dates": (
        lambda: one().rename(columns={"ds": "when"}),
        {},
        DataError,
        r"no column 'ds'; the columns are 'when', 'y'. Recognised are",
    ),
    "no values": (lambda: long_frame().rename(columns={"y": "v"}), {}, DataError, "no column 'y'.*target="),
    "nothing left": (lambda: one().drop(columns="y"), {}, DataError, "no column beside the dates"),
    "twice a column": (lambda: pd.concat([one(), one()["y"]], axis=1), {}, DataError, "columns come twice: 'y'"),
    "text": (lambda: one().astype({"y": str}), {}, DataError, r"column 'y' holds '.*' \(str\) in row 0.*to_numeric"),
    "decimal commas": (lambda: one().assign(y="1,5"), {}, DataError, r"'1,5'.*str.replace"),
    "late text": (lambda: one(4).assign(y=[1, None, "?", 4]), {}, DataError, r"holds '\?' \(str\) in row 2"),
    "truth values": (lambda: one().assign(y=True), {}, DataError, "type bool"),
    "complex": (lambda: one().assign(y=1j), {}, DataError, "complex"),
    "dates as values": (
        lambda: one().assign(y=pd.Timestamp("2024")),
        {},
        DataError,
        "column 'y' has the type datetime",
    ),
    "words among wide columns": (
        lambda: one().rename(columns={"ds": "date"}).assign(y2=1.0, city="x", open=True).rename(columns={"y": "z"}),
        {},
        DataError,
        "these hold no numbers: 'city', 'open'",
    ),
    "empty id": (
        lambda: long_frame().replace({"unique_id": {"b": None}}),
        {},
        DataError,
        "column 'unique_id' is empty in 30 rows, first in row 30",
    ),
    "empty date": (
        lambda: one().assign(ds=one().ds.where(one().index != 3)),
        {},
        DataError,
        r"column 'ds' is empty \(NaT\) in 1 rows, first in row 3",
    ),
    "day first": (
        lambda: one().assign(ds=one().ds.dt.strftime("%d/%m/%Y %H:%M")),
        {},
        DataError,
        "may be January or February",
    ),
    "two zones": (
        lambda: one(2).assign(ds=["2024-01-01 00:00+01:00", "2024-01-01 01:00+02:00"]),
        {},
        DataError,
        "one time zone or none",
    ),
    "dates as floats": (lambda: one(5).assign(ds=np.arange(5.0)), {}, DataError, "column 'ds' has the type float64"),
    "dates as numbers": (
        lambda: one(3).assign(ds=[20240101, 20240102, 20240103]),
        {},
        DataError,
        "20240101, which looks like a date",
    ),
    "missing whole number": (
        lambda: one(3).assign(ds=pd.array([1, None, 3], dtype="Int64")),
        {},
        DataError,
        "column 'ds' is empty in 1 rows",
    ),
    "duplicates": (
        lambda: pd.concat([long_frame(), long_frame()[2:4]]),
        {},
        DataError,
        r"more than once: 2. Series 'a' has 2024-01-01 02:00:00 with.*groupby\(\['unique_id', 'ds'\]",
    ),
    "wide duplicates": (
        lambda: pd.DataFrame({"a": 1.0, "b": 2.0}, pd.DatetimeIndex(["2024-01-01"] * 2)),
        {},
        DataError,
        r"more than once: 1.*groupby\(level=0\)",
    ),
    "autumn": (lambda: local_hours("2024-10-26"), {}, DataError, "more than once: 1.*clocks change.*tz_localize"),
    "spring": (
        lambda: local_hours("2024-03-30"),
        {},
        DataError,
        r"1 of 73 values are missing.*2024-03-31 02:00:00.*clocks change",
    ),
    "absent stamps": (
        lambda: long_frame().drop(index=[33, 34]),
        {},
        DataError,
        r"series 'b': 2 of 30 values are missing \(stamps absent: 2, NaN: 0\), the first at 2024-01-01 03.*impute=",
    ),
    "absent whole numbers": (
        lambda: one(4).assign(ds=[0, 1, 2, 4]),
        {},
        DataError,
        r"1 of 5 values are missing \(stamps absent: 1, NaN: 0\), the first at 3;",
    ),
    "nan": (
        lambda: one().assign(y=one().y.where(one().index != 7)),
        {},
        DataError,
        r"1 of 30 values are missing \(stamps absent: 0, NaN: 1\)",
    ),
    "infinite": (
        lambda: one().assign(y=one().y.where(one().index != 7, -np.inf)),
        {"impute": "mask"},
        DataError,
        "1 values are infinite, the first at 2024-01-01 07:00:00",
    ),
    "nothing but nan": (
        lambda: long_frame().assign(y=lambda f: f.y.where(f.unique_id == "a")),
        {"impute": "ffill"},
        DataError,
        "series 'b' has no value in 30 rows",
    ),
    "off the grid": (
        lambda: one(),
        {"freq": "D"},
        DataError,
        "28 of 30 stamps are not on the grid of freq='D', the first is 2024-01-01 01:00:00; .* like freq='h'",
    ),
    "month ends as starts": (lambda: one(12, "ME"), {"freq": "MS"}, DataError, "look like freq='ME'"),
    "weekend in working days": (lambda: one(12, "D"), {"freq": "B"}, DataError, "2 of 12 stamps are not on the grid"),
    "off the whole numbers": (
        lambda: one(3).assign(ds=[0, 10, 15]),
        {"freq": 10},
        DataError,
        "1 of 3 stamps are not on the grid of freq=10",
    ),
    "too few to tell": (lambda: one(2), {}, DataError, "three stamps that tell a frequency"),
    "no usual step": (
        lambda: one(4).assign(ds=pd.to_datetime(["2024-01-01", "2024-01-03", "2024-01-09", "2024-01-20"])),
        {},
        DataError,
        "no step is the usual one.*2 days",
    ),
    "one working week": (lambda: one(5, "D"), {}, DataError, "fit freq='B' and freq='D' alike"),
    "two steps": (
        lambda: pd.concat([long_frame(ids=("a",)), long_frame(9, "D", ids=("b",))]),
        {},
        DataError,
        r"different steps: 'h' \(series 'a'\), 'D' \(series 'b'\)",
    ),
    "too short": (lambda: one(), {"min_length": 31}, DataError, "series 'y' has 30 steps, but 31 are needed"),
    "a century of seconds": (
        lambda: one(2).assign(ds=pd.to_datetime(["1924-01-01", "2024-01-01"])),
        {"freq": "s", "impute": "mask"},
        DataError,
        "the limit is 5000000; raise it with",
    ),
    "many rows": (lambda: one(), {"limits": Limits(table_rows=20)}, DataError, "30 rows, the limit is 20"),
    "unknown frequency": (lambda: one(), {"freq": "furlong"}, ValueError, "freq='furlong' is not a frequency"),
    "backwards": (lambda: one(), {"freq": "-1h"}, ValueError, "is not a frequency"),
    "number for dates": (lambda: one(), {"freq": 3}, ValueError, "time is in dates"),
    "name for numbers": (lambda: one(3).assign(ds=range(3)), {"freq": "h"}, ValueError, "time is in whole numbers"),
    "imputation": (lambda: one(), {"impute": "zero"}, ValueError, "choose None, 'ffill', 'linear' or 'mask'"),
    "one text": (lambda: one(), {"past": "rain"}, ValueError, "is one text"),
    "twice a covariate": (lambda: one(), {"past": ["y"]}, ValueError, "may be named once"),
    "absent covariate": (
        lambda: one(),
        {"future": ["rain", "sun"]},
        DataError,
        "no column 'rain', 'sun', named as a covariate",
    ),
    "covariate of words": (
        lambda: one().assign(rain="wet"),
        {"future": ["rain"]},
        DataError,
        "column 'rain' holds 'wet'",
    ),
    "covariate with nan": (
        lambda: one().assign(rain=[np.nan] + [1] * 29),
        {"future": ["rain"]},
        DataError,
        "covariate 'rain' is missing or infinite at 1 of 30 stamps.*impute=",
    ),
    "empty covariate": (
        lambda: one().assign(rain=np.nan),
        {"past": ["rain"], "impute": "ffill"},
        DataError,
        "missing or infinite at 30 of 30",
    ),
    "static that moves": (
        lambda: one().assign(size=range(30)),
        {"static": ["size"]},
        DataError,
        "static covariate 'size' must be one number, got 0.0, 1.0, 2.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, options, kind, message = REFUSED[case]
    with pytest.raises(kind, match=re.compile(message, re.S)) as caught:
        check_frame(make(), **options)
    assert len(str(caught.value)) < 600 and "np." not in str(caught.value)


@pytest.mark.parametrize("start", ["2024-10-26", "2024-03-30"])
def test_the_advice_about_clocks_works(start):
    frame = local_hours(start)
    frame["ds"] = frame["ds"].dt.tz_localize("Europe/Berlin", ambiguous="infer")
    panel = check_frame(frame)
    assert len(panel["y"]) == 72 and panel.freq == "h"
    hour = calendar_features(panel["y"].index, "h")[:, :2]  # of the day
    close(np.arctan2(hour[:, 0], hour[:, 1]) % (2 * np.pi), panel["y"].index.hour / 24 * 2 * np.pi, 1e-9)


def test_the_advice_about_duplicates_works():
    frame = pd.concat([long_frame(), long_frame()[2:4].assign(y=0.0)])
    mean = check_frame(frame.groupby(["unique_id", "ds"], as_index=False)["y"].mean())
    close(mean["a"].y[2:4], long_frame().y[2:4] / 2)
    first = check_frame(frame.drop_duplicates(["unique_id", "ds"]))
    close(first["a"].y, long_frame().y[:30], 0)


def test_days_of_a_zone_are_calendar_days():
    stamps = pd.date_range("2024-03-25", periods=14, freq="D", tz="Europe/Berlin")
    panel = check_frame(pd.DataFrame({"ds": stamps, "y": np.arange(14.0)}))
    assert panel.freq == "D" and future_index(panel, 1)["y"][0] == pd.Timestamp("2024-04-08", tz="Europe/Berlin")


def test_panel():
    panel = check_frame(long_frame())
    assert [s.id for s in panel] == ["a", "b"]
    with pytest.raises(KeyError, match="no series 'c'; there are 'a', 'b'"):
        panel["c"]
    cut = panel.drop_last(5)
    assert len(cut["a"]) == 25 and len(panel["a"]) == 30
    cut["a"].y[:] = 0
    assert (panel["a"].y != 0).all()  # a copy
    same(panel.drop_last(0), panel)
    for steps in (-1, 30):
        with pytest.raises(ValueError, match="0 to 29 are allowed"):
            panel.drop_last(steps)
    with pytest.raises(ValueError, match="at least 1 step"):
        future_index(panel, 0)


def test_the_panel_does_not_alias_the_table():
    frame = long_frame()
    panel = check_frame(frame)
    before = panel["a"].y.copy()
    frame["y"] = 0.0
    frame.iloc[:, 2] = 0.0
    close(panel["a"].y, before, 0)
    wide = pd.DataFrame({"z": np.arange(9.0)}, pd.date_range("2024", periods=9, freq="h"))
    panel = check_frame(wide)
    panel["z"].y[:] = -1
    assert wide["z"].tolist() == list(range(9))


def test_future_covariates():
    frame = long_frame(10).assign(price=np.arange(20.0))
    panel = check_frame(frame, future=["price"])
    ahead = pd.concat(
        [
            pd.DataFrame({"unique_id": n, "ds": i, "price": k + np.arange(3.0)})
            for k, (n, i) in enumerate(future_index(panel, 3).items())
        ]
    )
    found = check_future(panel, ahead.sample(frac=1, random_state=0), 3)
    assert found["a"].tolist() == [[0], [1], [2]] and found["b"].tolist() == [[1], [2], [3]]
    shared = check_future(panel, ahead[ahead.unique_id == "a"].drop(columns="unique_id"), 3)
    assert shared["b"].tolist() == [[0], [1], [2]]
    assert check_future(panel, ahead[ahead.unique_id == "a"].set_index("ds")[["price"]], 2)["b"].tolist() == [[0], [1]]
    assert check_future(check_frame(frame), None, 4)["a"].shape == (4, 0)
    for bad, message in [
        (None, "'price' are needed for the 3 steps"),
        (ahead.drop(columns="price"), "covariates 'price' are missing"),
        (ahead[:-1], "series 'b': the covariates 'price' are needed at 1 more stamps, the first is 2024-01-01 12:00"),
        (ahead[ahead.unique_id == "a"], "series 'b': .*at 3 more stamps"),
        (ahead.assign(price=np.nan), "series 'a': .*at 3 more stamps"),
        (pd.concat([ahead, ahead]), "comes twice"),
        (ahead.assign(ds=ahead.ds.dt.tz_localize("UTC")), "make them alike"),
        (ahead.assign(price="x"), "column 'price' holds 'x'"),
    ]:
        with pytest.raises(DataError, match=message):
            check_future(panel, bad, 3)


def test_unseen_series():
    panel = check_frame(long_frame())
    assert check_ids(panel, ["b", "c", "a"]).tolist() == [2, 0]
    with pytest.raises(DataError, match="1 series were not seen in training: 'b'; known are 'a'"):
        check_ids(panel, ["a"])


# Calendar features


@pytest.mark.parametrize(
    ("freq", "pairs"),
    [
        ("10s", 6),
        ("min", 5),
        ("15min", 5),
        ("h", 4),
        ("6h", 4),
        ("D", 3),
        ("B", 3),
        ("W-SUN", 2),
        ("MS", 1),
        ("ME", 1),
        ("QS-JAN", 1),
        ("YS-JAN", 0),
        ("YE-DEC", 0),
    ],
)
def test_calendar_cycles(freq, pairs):
    index = pd.date_range("2020-01-01", periods=200, freq=freq)
    features = calendar_features(index, freq)
    assert features.shape == (200, 2 * pairs)
    close((features.reshape(200, pairs, 2) ** 2).sum(-1), 0.25)  # a point on a circle
    close(features, calendar_features(index.to_numpy(), freq))


def test_calendar_phases():
    index = pd.date_range("2023-12-30", periods=24 * 400, freq="h")
    phase = np.arctan2(*calendar_features(index, "h").reshape(-1, 4, 2).transpose(2, 1, 0)) / (2 * np.pi) % 1
    expected = [
        index.hour / 24,
        (index.day_of_week + index.hour / 24) / 7,
        (index.day - 1 + index.hour / 24) / index.days_in_month,
        (index.day_of_year - 1 + index.hour / 24) / (365 + index.is_leap_year),
    ]
    for found, wanted in zip(phase, expected, strict=True):
        close((found - np.asarray(wanted) + 0.5) % 1, 0.5, 1e-9)
    steps = np.linalg.norm(np.diff(calendar_features(index, "h")[:, :4], axis=0), axis=1)
    close(steps, steps[0], 1e-9)  # of day and week no step is larger than another: midnight is not a cliff
    jumps = np.abs(np.diff(time_marks(index)[:, 0]))
    assert jumps.max() > 20 * jumps.min()  # in the official marks it is one


def test_calendar_refuses():
    with pytest.raises(ValueError, match="not a frequency"):
        calendar_features(hours(3), "furlong")
    with pytest.raises(TypeError, match="float64"):
        calendar_features(np.zeros(3), "h")


# Files


def test_read_table(tmp_path):
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": ["x", "ü"]})
    for suffix, options in ((".csv", {}), (".TXT", {}), (".tsv", {"sep": "\t"}), (".tab", {"sep": "\t"})):
        path = tmp_path / f"t{suffix}"
        frame.to_csv(path, index=False, encoding="utf-8-sig", **options)
        pd.testing.assert_frame_equal(read_table(path), frame)
    path = tmp_path / "german.csv"
    frame.to_csv(path, index=False, sep=";", decimal=",")
    pd.testing.assert_frame_equal(read_table(path, sep=";", decimal=","), frame)
    with pytest.raises(DataError, match=r"only column is 'a;b'.*pass sep=';' and, if its numbers have decimal commas"):
        path.write_text("a;b\n1;2\n")
        read_table(str(path))


@pytest.mark.parametrize(
    ("name", "content", "limits", "message"),
    [
        ("t.xlsx", b"PK", {}, "of the kind '.xlsx'"),
        ("t", b"a,b", {}, "of the kind ''"),
        ("t.csv", b"", {}, "first line is empty"),
        ("t.csv", b"\x1f\x8b00", {}, "compressed"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", {}, "cannot be read"),
        ("t.csv", b"a,b\n\xff\xfe,2\n", {}, "not UTF-8"),
        ("t.csv", b"a,b\n" + b"1,2\n" * 100, {"table_rows": 50}, "100 rows, the limit is 50"),
        ("t.csv", b"a,b\n" + b"1,2\n" * 100, {"table_bytes": 50}, "404 bytes, the limit is 50"),
        ("t.csv", b",".join([b"a"] * 99) + b"\n", {"table_columns": 50}, "99 columns, the limit is 50"),
        ("t.parquet", b"PAR1", {"table_bytes": 2}, "4 bytes, the limit is 2"),
    ],
)
def test_read_table_refuses(tmp_path, name, content, limits, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(path, limits=Limits(**limits))


def test_read_table_of_nothing(tmp_path):
    for name in ("absent.csv", "absent.parquet"):
        with pytest.raises(DataError, match=r"cannot be read|no such plain file"):
            read_table(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_table(path)


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    frame = long_frame(40)
    frame.to_parquet(path)
    same(check_frame(read_table(path)), check_frame(frame))
    with pytest.raises(DataError, match="80 rows, the limit is 50"):
        read_table(path, limits=Limits(table_rows=50))
    with pytest.raises(DataError, match="3 columns, the limit is 2"):
        read_table(path, limits=Limits(table_columns=2))
    pd.DataFrame({"y": ["long" * 1000] * 10_000}).to_parquet(tmp_path / "words.parquet")  # small until written out
    assert (tmp_path / "words.parquet").stat().st_size < 50_000
    with pytest.raises(DataError, match="its text: 40000000 bytes, the limit is 1000000"):
        read_table(tmp_path / "words.parquet", limits=Limits(table_bytes=1_000_000))
    plain = {"compression": "gzip", "use_dictionary": False}
    pd.DataFrame({"y": np.zeros(100_000)}).to_parquet(tmp_path / "packed.parquet", **plain)
    with pytest.raises(DataError, match=r"unpacked: \d+ bytes, the limit is"):
        size = (tmp_path / "packed.parquet").stat().st_size
        read_table(tmp_path / "packed.parquet", limits=Limits(table_bytes=size))
    pd.DataFrame({"y": [[1], [2]]}).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(DataError, match="'y' hold lists"):
        read_table(tmp_path / "lists.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or no parquet"):
        read_table(path)


def test_dates_of_python():
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(k) for k in range(9)]
    assert check_frame(pd.DataFrame({"ds": days, "y": 1.0})).freq == "D"


def test_without_pandas(monkeypatch):
    """Windows, marks, splits and ETT need NumPy and PyTorch alone; the others name the extra."""
    code = """
import sys
sys.modules["pandas"] = None
import numpy as np
from oral4.pyraformer.data import SeriesTable, chronological_splits, check_frame, make_sines
hours = np.arange("2020-01-01", "2020-02-01", dtype="datetime64[h]").astype("datetime64[s]")
table = SeriesTable(hours, np.random.rand(744, 2), ("a", "b"))
print(len(chronological_splits(table, 24, 12, (500, 600, 744)).train), make_sines(2, 50).values.shape)
try:
    check_frame(None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["465 (2, 50)", 'This needs pandas: pip install "oral4[forecast]"']
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="forecast"):
        check_frame(None)


def test_a_large_table_takes_no_time():
    """A million rows in a thousand series, shuffled: sorted once, not series by series."""
    count = 1000
    random = np.random.default_rng(0)
    frame = pd.DataFrame({
        "unique_id": np.repeat(np.arange(count), count),
        "ds": np.tile(pd.date_range("2020", periods=count, freq="h"), count),
        "y": random.normal(size=count**2),
    }).take(random.permutation(count**2))  # fmt: skip
    panel = check_frame(frame)
    assert len(panel) == count
    ordered = frame.sort_values(["unique_id", "ds"])["y"].to_numpy().reshape(count, count)
    close(np.stack([panel[k].y for k in range(count)]), ordered, 0)
