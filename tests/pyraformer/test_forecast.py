"""The forecaster: what is fitted on which part, what is promised of intervals, tables in and out, every bad input."""

import dataclasses
import json
import math
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.data.fetch import available
from oral4.errors import CheckpointError, DataError
from oral4.pyraformer import forecast as module
from oral4.pyraformer.data import check_frame, load_pjm
from oral4.pyraformer.forecast import (
    DISTRIBUTIONS,
    Forecaster,
    ForecasterConfig,
    choose,
    fill_from_past,
    find_seasons,
    natural_seasons,
    seasonal_strength,
    typical_length,
)
from oral4.pyraformer.metrics import split_conformal
from oral4.train.storage import read, write

SMALL = {"d_model": 8, "num_layers": 1, "steps": 6, "lr": 4e-3}
FLOOR = {"candidates": ("naive", "ridge")}


def waves(steps=400, count=3, noise=0.3, seed=0, start="2024-01-01", freq="h", season=24):
    """A long table of noisy waves of different size and level."""
    rng = np.random.default_rng(seed)
    stamps = pd.date_range(start, periods=steps, freq=freq)
    parts = []
    for number in range(count):
        y = np.sin(2 * np.pi * (np.arange(steps) + 5 * number) / season) + noise * rng.normal(size=steps)
        parts.append(pd.DataFrame({"unique_id": f"s{number}", "ds": stamps, "y": (number + 1) * y + 10 * number}))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def table():
    return waves()


@pytest.fixture(scope="module")
def fitted(table):
    return Forecaster(horizon=12, **SMALL).fit(table)


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*arguments, **options)


# ------------------------------------------------------------------------------------------------------ seasons


@pytest.mark.parametrize(
    ("freq", "seasons"),
    [
        ("h", (24, 168)), ("2h", (12, 84)), ("5h", ()), ("15min", (96, 672, 4)), ("min", (1440, 60)), ("s", (60,)),
        ("D", (7,)), ("7D", ()), ("B", (5,)), ("W-SUN", (52,)), ("W-MON", (52,)),
        ("MS", (12,)), ("ME", (12,)), ("BME", (12,)),
        ("3MS", (4,)), ("QS-JAN", (4,)), ("QE-DEC", (4,)), ("YS-JAN", ()),
        ("YE-DEC", ()), (1, ()), (24, ()), ("SME-15", (24,)),
    ],
)  # fmt: skip
def test_seasons_of_the_calendar(freq, seasons):
    assert natural_seasons(freq) == seasons


def strength_by_hand(y, period):
    """Classical decomposition with loops; the series has no gaps."""
    half, rest, places = period // 2, [], []
    for t in range(half, len(y) - half):
        window = y[t - half : t + half + 1]
        weight = np.ones(len(window))
        if period % 2 == 0:
            weight[0] = weight[-1] = 0.5
        rest.append(y[t] - np.average(window, weights=weight))
        places.append(t)
    rest, phase = np.array(rest), np.array(places) % period
    fit = np.array([rest[phase == p].mean() for p in phase])
    n = len(rest)
    return 1 - ((rest - fit) ** 2).sum() / (n - period) / (((rest - rest.mean()) ** 2).sum() / (n - 1))


@pytest.mark.parametrize("period", [2, 3, 7, 12])
def test_strength_is_the_classical_decomposition(period):
    y = np.random.default_rng(0).normal(size=90).cumsum() + np.sin(np.arange(90))
    assert math.isclose(seasonal_strength(y, period), strength_by_hand(y, period), rel_tol=1e-9)


def test_strength_with_gaps_and_without_anything():
    wave = np.tile([0.0, 1.0, 5.0, 2.0, 7.0], 20)
    gaps = wave.copy()
    gaps[[3, 4, 50, 77]] = np.nan
    assert seasonal_strength(wave, 5) > 0.999 and seasonal_strength(gaps, 5) > 0.9
    assert seasonal_strength(np.zeros(40), 4) == seasonal_strength(3.0 + np.arange(40.0), 4) == 0.0
    assert seasonal_strength(np.full(40, np.nan), 4) == 0.0


@pytest.mark.parametrize("period", [4, 7, 12, 24, 100])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e9])
def test_a_season_is_found_in_noise_gaps_and_trend(period, size):
    rng = np.random.default_rng(period)
    y = np.sin(2 * np.pi * np.arange(900) / period) + 0.4 * rng.normal(size=900) + 0.01 * np.arange(900)
    y[rng.random(900) < 0.1] = np.nan
    assert find_seasons([size * y]) == (period,)


def test_no_season_is_found_in_noise():
    rng = np.random.default_rng(1)
    assert [find_seasons([rng.normal(size=n)]) for n in (100, 300, 900)] == [()] * 3
    walks = [find_seasons([rng.normal(size=300).cumsum()]) for _ in range(20)]
    assert walks.count(()) >= 15  # a walk may look like a wave; what is found only competes
    assert find_seasons([np.zeros(50)]) == find_seasons([np.arange(5.0)]) == find_seasons([np.ones(1)]) == ()


def test_a_season_of_the_calendar_must_fit_twice():
    assert find_seasons([np.zeros(335)], "h") == (24,) and find_seasons([np.zeros(336)], "h") == (24, 168)
    assert find_seasons([np.zeros(23)], "MS") == ()


def test_stubs_do_not_shorten_the_typical_length():
    assert typical_length(np.array([1000, *[3] * 100])) == 1000
    assert typical_length(np.array([5, 5, 5])) == 5 and typical_length(np.array([1])) == 1


# ------------------------------------------------------------------------------------------------------- pieces


@given(
    st.lists(st.one_of(st.just(math.nan), st.floats(-5, 5)), min_size=1, max_size=30).filter(
        lambda v: not all(map(math.isnan, v))
    ),
    st.integers(1, 8),
)
@settings(max_examples=80, deadline=None)
def test_filling_looks_back_only(values, period):
    y = np.array(values)
    filled = fill_from_past(y, period)
    first = int(np.flatnonzero(~np.isnan(y))[0])
    assert np.array_equal(filled[~np.isnan(y)], y[~np.isnan(y)]) and (filled[:first] == y[first]).all()
    for t in range(first + 1, len(y)):
        if np.isnan(y[t]):
            assert filled[t] == (filled[t - period] if t - period >= first else filled[t - 1])
        assert filled[t] == fill_from_past(y[: t + 1], period)[t]  # what comes later changes nothing


def test_origins_are_all_or_a_random_part_of_them():
    low, high = np.array([3, 5, 2]), np.array([7, 5, 4])
    series, origins = module._origins(low, high)
    assert list(zip(series, origins, strict=True)) == [(0, 3), (0, 4), (0, 5), (0, 6), (2, 2), (2, 3)]
    series, origins = module._origins(np.zeros(500, dtype=int), np.full(500, 24), 1000)
    assert len(set(zip(series, origins, strict=True))) == len(series) == 1000
    assert np.bincount(origins % 24, minlength=24).min() > 15  # every hour of the day has its turn
    assert [len(part) for part in module._origins(np.array([4]), np.array([2]))] == [0, 0]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_parts_do_not_overlap_and_leave_something_to_train(lengths, horizon):
    lengths = np.array(lengths)
    a, b, c = module._cuts(lengths, horizon, ForecasterConfig()).T
    assert (c == lengths).all() and (a <= b).all() and (b <= c).all()
    long = lengths >= 8
    assert (a[long] >= lengths[long] // 2).all() and (b[long] > a[long]).all() and (c[long] > b[long]).all()
    assert (a[~long] == lengths[~long]).all()


def windows_of(frame, history=10, horizon=4, season=3, impute=None, **names):
    panel = check_frame(frame, impute=impute, **names)
    cuts = np.array([len(s) for s in panel])
    covariates = module._Covariates.measure(panel, cuts, True)
    scaling = module._Scaling({s.id: module._Scaling.measure(s.y) for s in panel})
    return panel, module._Windows(panel, history, horizon, scaling, covariates, season)


def test_windows_are_slices_of_their_series():
    frame = waves(60, 2)
    frame["x"], frame["k"], frame["g"] = np.arange(120.0) ** 2, np.arange(120.0), np.repeat([1.0, 5.0], 60)
    panel, windows = windows_of(frame, past=["x"], future=["k"], static=["g"])
    series, origins = np.array([0, 1, 1, 0]), np.array([10, 30, 60, 3])
    config = module.ModernConfig(history=10, horizon=4, num_past=2, num_future=3, num_static=1, patch_len=2)
    given = windows.inputs(series, origins, config)
    for row, (number, t) in enumerate(zip(series, origins, strict=True)):
        s = panel.series[number]
        z = (s.y - s.y.mean()) / s.y.std()
        before = np.concatenate([np.full(10, z[0]), z])[t : t + 10]
        np.testing.assert_allclose(windows.history(series, origins)[row], before, rtol=0, atol=1e-12)
        np.testing.assert_allclose(given["y"][row].numpy(), before, rtol=0, atol=1e-6)  # float32
        came = np.concatenate([z, np.full(4, np.nan)])[t : t + 4]
        np.testing.assert_allclose(windows.targets(series, origins)[row], came, rtol=0, atol=1e-12)
        assert given["past"][row, :, 1].tolist() == [
            float(t - 10 + step < 0) for step in range(10)
        ]  # before the series began
        known = (frame["k"] - frame["k"].mean()) / frame["k"].std(ddof=0)
        known = known[frame["unique_id"] == s.id].to_numpy()
        np.testing.assert_allclose(
            given["future"][row, 10:, -1].numpy(), known[np.minimum(np.arange(t, t + 4), 59)], rtol=0, atol=1e-6
        )
    assert given["static"].flatten().tolist() == [-1, 1, 1, -1]
    masked = windows.targets(series, origins, np.array([[12, 13], [0, 31]]))
    assert (~np.isnan(masked)).tolist() == [[False, False, True, False], [True] + [False] * 3, [False] * 4, [False] * 4]


def test_unrest_is_the_change_over_a_season_of_what_was_observed():
    y = np.arange(100.0) % 7 + np.where(np.arange(100) >= 90, 3.0, 0.0)
    y[95] = np.nan
    frame = pd.DataFrame({"ds": np.arange(100), "y": y})
    _, windows = windows_of(frame, history=60, season=7, impute="mask")
    spread = np.nanstd(y)
    late = [abs(y[t] - y[t - 7]) for t in range(100 - 49, 100) if not np.isnan(y[t] - y[t - 7])]
    found = windows.unrest(np.array([0, 0, 0, 0]), np.array([100, 80, 4, 1]), 7)
    # of four values no two are a season apart: steps count; of a single one nothing is known
    np.testing.assert_allclose(found[:3], [np.mean(late) / spread, 0, 1 / spread], rtol=0, atol=1e-12)
    assert np.isnan(found[3])


def test_calendar_only_of_what_was_seen_twice():
    def measure(frame):
        panel = check_frame(frame)
        return module._Covariates.measure(panel, np.array([len(s) for s in panel]), True).calendar

    assert measure(waves(47, 1)) == 0 and measure(waves(49, 1)) == 1 and measure(waves(24 * 15, 1)) == 2
    assert measure(waves(800, 1, freq="D")) == 3 and measure(waves(400, 1, freq="D")) == 2
    assert measure(waves(60, 1, freq="MS")) == 1 and measure(waves(20, 1, freq="MS")) == 0
    assert measure(pd.DataFrame({"ds": np.arange(99), "y": 1.0})) == 0


def test_choice_is_the_simplest_within_one_standard_error():
    base = np.array([1.0, 2.0, 3.0, 4.0])
    better = base - 0.5
    assert choose({"naive": base, "ridge": better}) == "ridge"
    noisy = base + np.array([0.9, -1.0, 0.9, -1.0])  # better by 0.05, give or take 0.55
    assert choose({"naive": base, "ridge": noisy}) == "naive"
    assert choose({"naive": base, "ridge": base.copy(), "model": base - 1e-14}) == "naive"
    assert choose({"naive": np.array([1.0]), "ridge": np.array([0.9])}) == "ridge"  # nothing to measure noise with
    excess = np.array([1.0, 0.0, 0.0, 0.0])  # mean 0.25 = one standard error exactly
    assert choose({"naive": base + excess, "ridge": base}) == "naive"
    assert choose({"naive": base + excess + 0.01, "ridge": base}) == "ridge"


# --------------------------------------------------------------------------------------------- what sees which part


def test_nothing_is_learnt_from_the_part_that_calibrates(table):
    """Other values in the last 15 % change no weight, no choice and no scale."""
    other = table.copy()
    late = other.groupby("unique_id").cumcount() >= 340
    other.loc[late, "y"] = 77.0 + np.random.default_rng(5).normal(size=late.sum())
    one, two = (Forecaster(horizon=12, **SMALL).fit(frame)._fitted for frame in (table, other))
    assert np.array_equal(one.ridge.weight, two.ridge.weight)
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert (one.recommended, one.naive, one.history, one.scaling.known) == (
        two.recommended,
        two.naive,
        two.history,
        two.scaling.known,
    )
    for name in one.table:
        assert one.table[name]["validation"] == two.table[name]["validation"]
        assert one.table[name]["mse"] != two.table[name]["mse"]


def test_no_season_is_found_on_the_part_that_calibrates():
    """A series without dates: its late part screams another period."""
    y = waves(400, 1)["y"].to_numpy(copy=True)
    loud = y.copy()
    loud[300:] += 50 * np.sin(2 * np.pi * np.arange(100) / 5)
    assert find_seasons([y]) == (24,) != find_seasons([loud])
    for calibration in (0.15, 0.25):
        assert Forecaster(horizon=12, calibration=calibration, **FLOOR).fit(loud)._fitted.seasons == (24,)


def test_training_ends_where_validation_begins(table, monkeypatch):
    seen = {}

    def spy(model, head, windows, train, validation, cuts, config):
        seen.update(windows=windows, train=train, validation=validation, cuts=cuts)
        raise InterruptedError

    monkeypatch.setattr(module, "_train_model", spy)
    with pytest.raises(InterruptedError):
        Forecaster(horizon=12, **SMALL).fit(table)
    (series, origins), cuts = seen["train"], seen["cuts"]
    assert (origins + 12 <= cuts[series, 0]).all() and (origins.max() + 12, cuts[0, 0]) == (280, 280)
    held_out = seen["windows"].targets(*seen["validation"], cuts[:, :2])
    places = seen["validation"][1][:, None] + np.arange(12)
    counted = ~np.isnan(held_out)
    assert (places[counted].min(), places[counted].max()) == (280, 339)
    assert len(set(counted.sum(axis=0))) == 1  # every step ahead is judged on the same targets


def test_untrained_model_is_the_ridge_regression():
    """The model starts at the linear map, with gaps, covariates and short series too."""
    frame = waves(300, 2)
    frame = pd.concat([frame, frame.iloc[:15].assign(unique_id="short")], ignore_index=True)
    frame["x"], frame["k"] = np.sin(np.arange(len(frame))), np.cos(np.arange(len(frame)))
    frame.loc[np.random.default_rng(0).random(len(frame)) < 0.1, "y"] = np.nan
    frame.loc[[0, 300, 600], "y"] = 1.0
    forecaster = quietly(
        Forecaster(horizon=12, **{**SMALL, "steps": 0}).fit, frame, past=["x"], future=["k"], impute="mask"
    )
    ahead = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=400, freq="h"), "k": 0.5})
    ridge, model = (
        quietly(forecaster.predict, future=ahead, method=name, quantiles=())["yhat"] for name in ("ridge", "model")
    )
    np.testing.assert_allclose(model, ridge, rtol=0, atol=2e-5)  # float32 of numbers up to 12


# ------------------------------------------------------------------------------------------------------ predict


def test_forecast_is_a_table(table, fitted):
    found = fitted.predict()
    assert list(found.columns) == ["unique_id", "ds", "yhat", "q0.1", "q0.5", "q0.9"] and len(found) == 36
    assert list(dict.fromkeys(found["unique_id"])) == ["s0", "s1", "s2"]
    ahead = pd.date_range(table["ds"].iloc[-1], periods=13, freq="h")[1:]
    for _, rows in found.groupby("unique_id"):
        assert (rows["ds"].to_numpy() == ahead.to_numpy()).all()
    assert (found["q0.1"] < found["yhat"]).all() and (found["yhat"] < found["q0.9"]).all()
    assert (found["q0.5"] == found["yhat"]).all()
    assert found.attrs == {"method": fitted.recommended, "recommended": fitted.recommended, "notes": []}
    assert repr(fitted).startswith("Forecaster of 3 series, 12 steps ahead from ")
    assert repr(Forecaster()) == "Forecaster, not fitted"


def test_forecasts_are_good(fitted):
    """Close to the wave without its noise; its amplitude is 1, 2, 3."""
    found = fitted.predict()
    t = np.arange(400, 412)
    for number, (_, rows) in enumerate(found.groupby("unique_id")):
        clean = (number + 1) * np.sin(2 * np.pi * (t + 5 * number) / 24) + 10 * number
        assert np.abs(rows["yhat"] - clean).mean() < 0.2 * (number + 1)


def test_methods_by_name(fitted):
    assert {"model", "ridge", "seasonal naive 24", fitted.recommended} <= set(fitted.methods)
    found = fitted.predict(method="seasonal naive 24", quantiles=())
    assert list(found.columns) == ["unique_id", "ds", "yhat"]
    np.testing.assert_allclose(found["yhat"][:12], fitted._panel["s0"].y[-24:-12], rtol=1e-12)  # standardised and back
    assert fitted.predict(method="naive").attrs["method"] == fitted._fitted.naive
    with pytest.raises(ValueError, match=r"method='arima' is not there; choose recommended, naive or one of .*ridge"):
        fitted.predict(method="arima")


def test_the_table_of_fit_and_the_same_table_give_the_same(table, fitted):
    pd.testing.assert_frame_equal(fitted.predict(), fitted.predict(table), check_exact=True)
    shuffled = table.sample(frac=1, random_state=0)
    again = fitted.predict(shuffled).sort_values(["unique_id", "ds"], ignore_index=True)
    pd.testing.assert_frame_equal(fitted.predict(), again, check_exact=False, rtol=1e-6)


def test_same_seed_same_forecast_and_nobody_elses_random_numbers(table):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = Forecaster(horizon=5, **SMALL).fit(table)
    assert torch.equal(torch.rand(2), expected)
    two, other = (Forecaster(horizon=5, **SMALL, seed=seed).fit(table) for seed in (0, 1))
    pd.testing.assert_frame_equal(one.predict(method="model"), two.predict(method="model"), check_exact=True)
    assert not one.predict(method="model")["yhat"].equals(other.predict(method="model")["yhat"])


@pytest.mark.parametrize(("size", "level"), [(1e-9, 0.0), (1e9, 0.0), (1.0, 1e7), (-3.0, 5.0)])
def test_units_do_not_matter(size, level):
    frame = waves(200, 1)
    moved = frame.assign(y=size * frame["y"] + level)
    one, two = (Forecaster(horizon=6, season=24, **SMALL).fit(each) for each in (frame, moved))
    assert one.recommended == two.recommended
    for method in ("model", "ridge", "naive")[size < 0 :]:  # the model need not answer the opposite by the opposite
        here, there = (each.predict(method=method, quantiles=[0.2, 0.5, 0.8]) for each in (one, two))
        for name, mirror in (("yhat", "yhat"), ("q0.2", "q0.8"), ("q0.8", "q0.2")):
            expected = size * here[mirror if size < 0 else name] + level
            np.testing.assert_allclose(there[name], expected, rtol=0, atol=2e-4 * abs(size))  # float32 training


def test_a_shorter_horizon_is_the_beginning(fitted):
    pd.testing.assert_frame_equal(
        fitted.predict(horizon=5), fitted.predict().groupby("unique_id", sort=False).head(5).reset_index(drop=True)
    )


def test_a_longer_horizon_is_rolled_without_intervals(table, fitted):
    with pytest.raises(
        ValueError, match=r"horizon=30, but this forecaster was fitted for 12.*horizon=30, or pass quantiles=\(\)"
    ):
        fitted.predict(horizon=30)
    for method in fitted.methods:
        found = fitted.predict(horizon=30, quantiles=(), method=method)
        grown = table
        for _ in range(3):
            step = fitted.predict(grown, quantiles=(), method=method).rename(columns={"yhat": "y"})
            grown = pd.concat([grown, step], ignore_index=True)
        by_hand = grown[grown["ds"] > table["ds"].max()].sort_values(["unique_id", "ds"]).groupby("unique_id").head(30)
        np.testing.assert_allclose(
            found["yhat"], by_hand["y"], rtol=1e-5, atol=1e-5
        )  # float32; the grown table differs by rounding


@pytest.mark.parametrize("horizon", [0, -1, 1.5, True, "3"])
def test_a_horizon_that_is_none(fitted, horizon):
    with pytest.raises(ValueError, match="give a whole number of steps from 1 on"):
        fitted.predict(horizon=horizon)


def test_arrays_lists_and_tensors():
    y = np.sin(np.arange(200) / 3)
    found = Forecaster(horizon=3, **FLOOR).fit(y).predict()
    assert found["ds"].tolist() == [200, 201, 202] and set(found["unique_id"]) == {"y"}
    for same in (y.tolist(), torch.tensor(y)):
        pd.testing.assert_frame_equal(found, Forecaster(horizon=3, **FLOOR).fit(same).predict())
    two = Forecaster(horizon=3, **FLOOR).fit(np.stack([y, y + 5], axis=1)).predict()
    assert list(two["unique_id"]) == ["0"] * 3 + ["1"] * 3
    np.testing.assert_allclose(two["yhat"][3:], two["yhat"][:3] + 5, atol=1e-9)
    for wrong in (np.zeros((2, 3, 4)), np.array(["a"]), np.zeros((0,)), np.zeros((5, 0))):
        with pytest.raises(ValueError, match=r"frame is an array of shape .* give numbers \(T,\) or \(T, c\)"):
            Forecaster().fit(wrong)


def test_other_names_integer_series_and_time_zones():
    frame = waves(200, 2).rename(columns={"unique_id": "shop", "ds": "when", "y": "sold"})
    frame["shop"] = frame["shop"].map({"s0": 10, "s1": 2})
    frame["when"] = frame["when"].dt.tz_localize("Europe/Berlin", nonexistent="shift_forward")
    found = Forecaster(horizon=4, **FLOOR).fit(frame, id="shop", time="when", target="sold").predict()
    assert list(found.columns[:3]) == ["shop", "when", "yhat"] and found["shop"].tolist() == [10] * 4 + [2] * 4
    assert str(found["when"].dt.tz) == "Europe/Berlin" and found["when"][0] == frame["when"].max() + pd.Timedelta("1h")


def test_wide_tables_and_indices_of_dates():
    wide = waves(200, 2).pivot(index="ds", columns="unique_id", values="y")
    long = Forecaster(horizon=4, **FLOOR).fit(waves(200, 2)).predict()
    pd.testing.assert_frame_equal(long, Forecaster(horizon=4, **FLOOR).fit(wide).predict(), check_column_type=False)
    assert len(Forecaster(horizon=4, **FLOOR).fit(wide["s0"]).predict()) == 4


# ---------------------------------------------------------------------------------------------------- intervals


def test_intervals_are_split_conformal_by_step(fitted):
    f = fitted._fitted
    method, calibration = f.methods["ridge"], f.calibration
    unit = calibration.unrest + 0.1 * method.difficulty[calibration.series]
    score = np.abs(method.point - calibration.target) / unit[:, None]
    found = fitted.predict(method="ridge", quantiles=[0.05, 0.95])
    s = f.panel["s1"]
    spread = f.scaling.known["s1"][1]
    recent = s.y[-168:]  # the history
    now = np.abs(recent[24:] - recent[:-24]).mean() / spread + 0.1 * method.difficulty[1]
    rows = found[found["unique_id"] == "s1"]
    for step in (0, 5, 11):
        column = score[:, step]
        bound = split_conformal(column[~np.isnan(column)], 0.9) * now * spread
        np.testing.assert_allclose(rows["q0.95"].iloc[step] - rows["yhat"].iloc[step], bound, rtol=1e-6)
        np.testing.assert_allclose(rows["yhat"].iloc[step] - rows["q0.05"].iloc[step], bound, rtol=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_quantiles_do_not_cross_and_any_level_can_be_asked(table, distribution, tmp_path):
    forecaster = Forecaster(horizon=6, distribution=distribution, quantiles=(0.1, 0.3, 0.5, 0.9), **SMALL).fit(table)
    levels = [0.1, 0.5, 0.9] if distribution == "quantile" else [0.02, 0.1, 0.37, 0.5, 0.8, 0.98]
    for method in forecaster.methods:
        found = forecaster.predict(method=method, quantiles=levels[::-1])
        assert list(found.columns[3:]) == [f"q{level:g}" for level in levels]
        assert (found.iloc[:, 3:].diff(axis=1).iloc[:, 1:] >= 0).all().all()
    if distribution == "quantile":
        with pytest.raises(ValueError, match=r"trained for 0\.1 to 0\.9"):
            forecaster.predict(method="model", quantiles=[0.01, 0.99])
    forecaster.save(tmp_path)
    loaded = Forecaster.load(tmp_path)
    for method in forecaster.methods:
        pd.testing.assert_frame_equal(
            forecaster.predict(method=method), loaded.predict(method=method), check_exact=True
        )


def test_nine_of_ten_are_covered_where_the_promise_holds():
    """Noise that does not change: 60 series, each step of 12 ahead."""
    table = waves(330, 60, noise=0.5, seed=2)
    early = table[table.groupby("unique_id").cumcount() < 300]
    forecaster = Forecaster(horizon=12, quantiles=(0.05, 0.95), **FLOOR).fit(early)
    errors = forecaster.backtest(table, windows=2)
    for method, found in errors.groupby("method"):
        # 1,440 values, but of 60 independent series with some 12 effective values each: 3 standard errors are 0.034
        assert 0.865 < found["coverage"].mean() < 0.935, method


def test_intervals_widen_when_a_series_turns_restless():
    rng = np.random.default_rng(3)
    noise = np.where(np.arange(1200) < 1000, 0.2, 1.0) * rng.normal(size=1200)
    y = np.sin(2 * np.pi * np.arange(1200) / 24) + noise
    forecaster = Forecaster(horizon=6, season=24, quantiles=(0.05, 0.95), **FLOOR).fit(y[:1000])
    widths = [(lambda p: (p["q0.95"] - p["q0.05"]).mean())(forecaster.predict(y[:end])) for end in (1000, 1200)]
    assert 3 < widths[1] / widths[0] < 7  # the noise is five times as large


def test_pjm_is_covered():
    if not available("pjm/AEP_hourly.csv"):
        pytest.skip("the PJM files are not at hand")
    table = load_pjm(["AEP", "DAYTON"], "2014-01-01", "2016-06-30 23:00").frame()
    fitted_to = 24 * 730
    forecaster = Forecaster(horizon=24, history=168, quantiles=(0.05, 0.5, 0.95), **FLOOR).fit(table.iloc[:fitted_to])
    assert forecaster.recommended == "ridge"
    errors = forecaster.backtest(table, windows=100, step=37)  # every hour of the day begins a forecast
    means = errors.groupby("method")[["coverage", "mase"]].mean()
    assert 0.85 <= means.loc["ridge", "coverage"] <= 0.95
    assert 0.85 <= means.loc["seasonal naive 24", "coverage"] <= 0.95
    assert means.loc["ridge", "mase"] < 0.8 * means.loc["seasonal naive 24", "mase"]


def test_too_few_errors_are_no_interval():
    frame = waves(60, 1, freq="MS", season=12)
    with pytest.warns(UserWarning, match="last 12 steps are too few errors to calibrate an interval of 95%"):
        forecaster = Forecaster(quantiles=(0.025, 0.5, 0.975), **FLOOR).fit(frame)
    with pytest.warns(UserWarning, match="some quantiles are NaN"):
        found = forecaster.predict()
    assert found["q0.025"].isna().all() and found["q0.5"].notna().all()
    assert "some quantiles are NaN" in found.attrs["notes"][-1]
    with pytest.raises(
        ValueError,
        match=r"quantiles 0\.025 and 0\.975 cannot be calibrated at step 1: .*; 19 are needed.*longer series",
    ):
        forecaster.predict(quantiles=[0.025, 0.975])
    assert forecaster.predict(quantiles=[0.1, 0.9]).notna().all().all()


# -------------------------------------------------------------------------------------------- which one is best


def test_a_walk_is_left_to_the_last_value():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat(np.arange(40), 150),
            "ds": np.tile(np.arange(150), 40),
            "y": rng.normal(size=(40, 150)).cumsum(1).ravel(),
        }
    )
    forecaster = Forecaster(horizon=8, **FLOOR).fit(frame)
    assert forecaster.recommended == "repeat last"
    assert "Nothing beats it by more than the noise" in str(forecaster.report())


def test_a_pattern_that_repeats_is_left_to_the_seasonal_naive_one():
    y = np.tile(np.random.default_rng(0).normal(size=12), 30)
    forecaster = Forecaster(horizon=12, **SMALL).fit(y)
    assert forecaster.recommended == "seasonal naive 12"
    np.testing.assert_allclose(forecaster.predict()["yhat"], y[:12], atol=1e-9)
    assert np.ptp(forecaster.predict()[["q0.1", "q0.9"]].to_numpy(), axis=1).max() < 1e-6  # it never erred


def shops(effect=6.0, steps=420):
    rng = np.random.default_rng(0)
    parts = []
    for number in range(2):
        promo = (rng.random(steps) < 0.25).astype(float)
        y = 20 + 3 * np.sin(2 * np.pi * (np.arange(steps) + number) / 7) + effect * promo + 0.3 * rng.normal(size=steps)
        stamps = pd.date_range("2023-01-01", periods=steps)
        parts.append(pd.DataFrame({"unique_id": number, "ds": stamps, "y": y, "promo": promo}))
    return pd.concat(parts, ignore_index=True)


def test_a_covariate_known_ahead_halves_the_error():
    table = shops()
    table = table[table["ds"] < table["ds"].min() + pd.Timedelta(days=406)]
    settings = {"horizon": 7, "history": 14, "d_model": 16, "num_layers": 1, "steps": 150, "lr": 2e-2, "dropout": 0.0}
    without, known = (Forecaster(**settings).fit(table, future=names) for names in ((), ("promo",)))
    assert known.recommended == "model" and without.recommended != "model"
    later = shops()
    errors = {name: each.backtest(later, windows=1) for name, each in {"without": without, "with": known}.items()}
    mae = {name: each.loc[each["method"] == "model", "mae"].mean() for name, each in errors.items()}
    assert mae["with"] < 0.5 * mae["without"]
    ahead = later[later["ds"] > table["ds"].max()][["unique_id", "ds", "promo"]]
    promised, none = (known.predict(future=ahead.assign(promo=value))["yhat"].mean() for value in (1.0, 0.0))
    assert 4 < promised - none < 8  # the effect is 6


def test_covariates_that_are_missing_are_named():
    table = shops(steps=120)
    forecaster = Forecaster(horizon=7, **SMALL).fit(table, future=["promo"])
    with pytest.raises(DataError, match=r"covariates 'promo' are needed for the 7 steps to predict"):
        forecaster.predict()
    ahead = pd.DataFrame({"ds": pd.date_range(table["ds"].max(), periods=8)[1:], "promo": 0.0})
    assert len(forecaster.predict(future=ahead)) == 14
    with pytest.raises(DataError, match=r"needed at 2 more stamps, the first is 2023-05-06"):
        forecaster.predict(future=ahead.iloc[:5])
    assert len(forecaster.predict(horizon=5, future=ahead.iloc[:5])) == 10
    with pytest.raises(DataError, match="covariates 'promo' are missing"):
        forecaster.predict(future=ahead.drop(columns="promo"))
    assert (
        len(
            forecaster.predict(
                horizon=14,
                quantiles=(),
                future=pd.DataFrame({"ds": pd.date_range(table["ds"].max(), periods=15)[1:], "promo": 0.0}),
            )
        )
        == 28
    )


def test_past_covariates_are_used_and_forbid_to_roll():
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    y = np.concatenate([np.zeros(2), 2 * x[:-2]]) + 0.2 * rng.normal(size=500)
    table = pd.DataFrame({"ds": np.arange(500), "y": y, "x": x})
    forecaster = Forecaster(
        horizon=2, history=6, season=1, d_model=16, num_layers=1, steps=120, lr=2e-2, dropout=0.0
    ).fit(table, past=["x"])
    assert forecaster.recommended == "model"
    held_out = forecaster._fitted.table
    assert held_out["model"]["mse"] < 0.3 * held_out["ridge"]["mse"]
    with pytest.raises(ValueError, match=r"needs x of the future, which is known for the past only.*horizon=4"):
        forecaster.predict(horizon=4, quantiles=())
    assert len(forecaster.predict(horizon=4, quantiles=(), method="ridge")) == 4


def test_static_covariates_tell_series_apart():
    """The futures of two groups are opposite, their histories are noise: only the number that describes them tells."""
    rng = np.random.default_rng(0)
    parts = []
    for number in range(12):
        y = 0.3 * rng.normal(size=160) + (1 if number % 2 else -1) * (np.arange(160) % 8 == 0)
        parts.append(
            pd.DataFrame(
                {
                    "unique_id": number,
                    "ds": np.arange(160),
                    "y": y,
                    "kind": float(number % 2),
                    "k": (np.arange(160) % 8 == 0) * 1.0,
                }
            )
        )
    table = pd.concat(parts)
    settings = {
        "horizon": 4,
        "history": 4,
        "season": 1,
        "d_model": 16,
        "num_layers": 1,
        "steps": 100,
        "lr": 2e-2,
        "dropout": 0.0,
    }
    blind, told = (
        Forecaster(**settings).fit(table, future=["k"], static=names)._fitted.table["model"]["mse"]
        for names in ((), ("kind",))
    )
    assert told < 0.8 * blind


# ------------------------------------------------------------------------------------- gaps, short and odd series


def test_gaps_are_refused_filled_or_shown():
    table = waves(300, 2)
    holes = table.drop(index=table.index[[50, 51, 52, 400]])
    with pytest.raises(DataError, match=r"3 of 300 values are missing .*pass impute="):
        Forecaster().fit(holes)
    for impute in ("mask", "ffill", "linear"):
        found = Forecaster(horizon=6, **SMALL).fit(holes, impute=impute)
        assert found.predict(method="model").notna().all().all()
        assert (found._fitted.model.config.num_past == 1) == (impute == "mask")
    masked = Forecaster(horizon=6, **SMALL).fit(holes, impute="mask")
    late = table.drop(index=table.index[[290, 291]])
    note = masked.predict(late, method="model").attrs["notes"]
    assert note == [
        "1 series have gaps in their history, such as 's0': what is missing is filled from what came before, "
        "and the model is shown where"
    ]
    whole = Forecaster(horizon=6, **SMALL).fit(table)
    with pytest.raises(DataError, match="2 of 300 values are missing"):
        whole.predict(late)
    assert "filled from what came before" in whole.predict(late, impute="mask").attrs["notes"][0]


def test_a_filled_value_is_never_a_target():
    y = waves(300, 1)["y"].to_numpy(copy=True)
    y[[100, 250, 290]] = np.nan
    panel = check_frame(pd.DataFrame({"ds": np.arange(300), "y": y}), impute="linear")
    assert np.isfinite(panel.series[0].y).all()
    found = Forecaster(horizon=6, **FLOOR)._fit(panel, "linear")._fitted
    assert np.isnan(found.calibration.target).any()
    _, windows = windows_of(pd.DataFrame({"ds": np.arange(300), "y": y}), impute="linear")
    assert np.isnan(windows.target).sum() == 10 + 4 + 3 and windows.known.sum() == 300


def test_a_gap_longer_than_the_history_gives_no_interval():
    y = waves(400, 1)["y"].to_numpy(copy=True)
    y[360:] = np.nan
    frame = pd.DataFrame({"ds": np.arange(400), "y": y})
    forecaster = Forecaster(horizon=6, history=24, season=24, **FLOOR).fit(frame, impute="mask")
    with pytest.warns(UserWarning, match="some quantiles are NaN"):
        found = forecaster.predict()
    assert found["yhat"].notna().all() and found["q0.1"].isna().all() and found["ds"][0] == 400


def test_series_of_any_length_beside_each_other(tmp_path):
    table = pd.concat(
        [waves(400, 2), waves(30, 1).assign(unique_id="short"), waves(1, 1).assign(unique_id="single", y=7.0)],
        ignore_index=True,
    )
    with pytest.warns(UserWarning, match="2 of 4 series are shorter than the history of"):
        forecaster = Forecaster(horizon=12, **SMALL).fit(table)
    with pytest.warns(UserWarning, match="some quantiles are NaN"):
        found = forecaster.predict(method="model")
    assert found["yhat"].notna().all() and found.groupby("unique_id").size().eq(12).all()
    alone = found[found["unique_id"] == "single"]
    assert alone["q0.1"].isna().all() and found[found["unique_id"] == "short"]["q0.1"].notna().all()
    quietly(forecaster.save, tmp_path)
    pd.testing.assert_frame_equal(
        quietly(forecaster.predict), quietly(Forecaster.load(tmp_path).predict), check_exact=True
    )


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 12, 20])
def test_very_short_series(length):
    frame = pd.DataFrame({"ds": pd.date_range("2024", periods=length), "y": np.arange(float(length))})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forecaster = Forecaster(**SMALL).fit(frame, freq="D")
        found = forecaster.predict()
    assert found["yhat"].notna().all() and caught
    if length < 8:
        assert forecaster.recommended in ("repeat last", "seasonal naive 7")
        assert "nothing could be compared" in str(forecaster.report()) and "no series is long enough to compare" in str(
            caught[0].message
        )


def test_many_short_series():
    rng = np.random.default_rng(0)
    stamps = pd.date_range("2020-01-31", periods=40, freq="ME")
    y = 50 + 10 * np.sin(2 * np.pi * (np.arange(40) + rng.integers(0, 12, (300, 1))) / 12) + rng.normal(size=(300, 40))
    table = pd.DataFrame({"unique_id": np.repeat(np.arange(300), 40), "ds": np.tile(stamps, 300), "y": y.ravel()})
    forecaster = quietly(Forecaster(**FLOOR).fit, table)  # 28 steps to train on are too few for 12 + 10
    assert forecaster._fitted.horizon == 10 and forecaster._fitted.seasons == (12,)
    found = forecaster.predict()
    assert len(found) == 3000 and found.notna().all().all()
    assert forecaster.report().rows[0][0][2:] in ("profile 12", "seasonal naive 12")


@pytest.mark.parametrize("value", [0.0, 7.5, -1e9])
def test_a_constant_series(value):
    forecaster = Forecaster(horizon=5, **SMALL).fit(np.full(120, value))
    assert forecaster.recommended == "repeat last"
    found = forecaster.predict()
    for name in ("yhat", "q0.1", "q0.9"):
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9)
    assert math.isnan(forecaster._fitted.table["repeat last"]["mase"]) and "-" in forecaster.report().rows[0]


def test_a_series_that_was_not_there(table, fitted):
    new = waves(300, 2, seed=9).assign(unique_id=lambda f: f["unique_id"].map({"s0": "s0", "s1": "new"}))
    found = fitted.predict(new)
    assert found.notna().all().all()
    assert found.attrs["notes"] == [
        "1 series were not there when it was fitted, such as 'new': forecast with the shared weights"
    ]
    far = fitted.predict(waves(300, 1, seed=9).assign(unique_id="far", y=lambda f: 1e6 * f["y"]))
    near = fitted.predict(waves(300, 1, seed=9).assign(unique_id="near"))
    np.testing.assert_allclose(far["yhat"], 1e6 * near["yhat"], rtol=1e-4, atol=1e2)


def test_a_new_table_of_another_form(table, fitted):
    with pytest.raises(DataError, match="no column 'ds'"):
        fitted.predict(table.rename(columns={"ds": "stamp"}))
    with pytest.raises(DataError, match="stamps are not on the grid of freq='h'"):
        fitted.predict(waves(300, 1, freq="90min"))
    with pytest.raises(DataError, match="stamps that come more than once: 1"):
        fitted.predict(pd.concat([table, table.iloc[:1]]))


# ----------------------------------------------------------------------------------------------------- backtest


def test_backtest_is_what_predict_gives_on_what_was_known(table):
    forecaster = Forecaster(horizon=8, **SMALL).fit(table)
    raw = forecaster.backtest(windows=2, step=5, raw=True)
    assert set(raw["window"]) == {0, 1} and set(raw["step"]) == set(range(1, 9))
    early = table[table.groupby("unique_id").cumcount() < 400 - 13]
    by_hand = Forecaster(horizon=8, **SMALL).fit(early)
    assert set(raw["method"]) == set(by_hand.methods)
    for window, known in enumerate((387, 392)):
        seen = table[table.groupby("unique_id").cumcount() < known]
        for method in by_hand.methods:
            rows = raw[(raw["window"] == window) & (raw["method"] == method)].reset_index(drop=True)
            found = by_hand.predict(seen, method=method, quantiles=[0.1, 0.9])
            assert (rows["ds"] == found["ds"]).all() and (rows["cutoff"] == seen["ds"].max()).all()
            np.testing.assert_allclose(
                rows[["yhat", "low", "high"]], found[["yhat", "q0.1", "q0.9"]], rtol=0, atol=1e-9
            )
            truth = table.merge(found, on=["unique_id", "ds"])
            assert sorted(rows["y"]) == sorted(truth["y"])


def test_backtest_numbers_by_hand(table):
    forecaster = Forecaster(horizon=8, **FLOOR).fit(table)
    raw, errors = forecaster.backtest(windows=1, raw=True), forecaster.backtest(windows=1)
    rows = raw[(raw["method"] == "ridge") & (raw["step"] == 3)]
    line = errors[(errors["method"] == "ridge") & (errors["step"] == 3)].iloc[0]
    error = (rows["yhat"] - rows["y"]).abs().to_numpy()
    seen = [s.y[:392] for s in forecaster._panel]
    unit = np.array([np.abs(y[24:] - y[:-24]).mean() for y in seen])
    expected = {
        "mae": error.mean(), "mse": (error**2).mean(), "mase": (error / unit).mean(),
        "smape": (2 * error / (rows["yhat"].abs() + rows["y"].abs())).mean(),
        "width": (rows["high"] - rows["low"]).mean(),
        "coverage": ((rows["low"] <= rows["y"]) & (rows["y"] <= rows["high"])).mean(),
    }  # fmt: skip
    for name, value in expected.items():
        assert math.isclose(line[name], value, rel_tol=1e-9), name
    assert errors.attrs["level"] == pytest.approx(0.8)
    report = forecaster.report()
    assert report.columns[-3:] == ("MASE in backtest", "coverage", "width")


def test_backtest_does_not_see_its_windows(table):
    other = table.copy()
    other.loc[other.groupby("unique_id").cumcount() >= 392, "y"] += 100
    one, two = (Forecaster(horizon=8, **SMALL).fit(each).backtest(windows=1, raw=True) for each in (table, other))
    pd.testing.assert_frame_equal(one.drop(columns="y"), two.drop(columns="y"), check_exact=True)
    assert not one["y"].equals(two["y"])


def test_backtest_with_refit(table, monkeypatch):
    runs = []
    run = module._Fit.run
    monkeypatch.setattr(module._Fit, "run", lambda self: runs.append(int(self.lengths[0])) or run(self))
    forecaster = Forecaster(horizon=8, **FLOOR).fit(table)
    forecaster.backtest(windows=3)
    forecaster.backtest(windows=3, refit=True)
    assert runs == [400, 376, 376, 384, 392]


def test_backtest_on_later_rows(table):
    early = table[table.groupby("unique_id").cumcount() < 360]
    forecaster = Forecaster(horizon=8, **FLOOR).fit(early)
    assert len(forecaster.backtest(table, windows=5)) == 5 * 8 * len(forecaster.methods)
    with pytest.raises(
        DataError,
        match=r"first window begins at 2024-01-15 16:00:00, but the forecaster was fitted up to 2024-01-15 23:00:00",
    ):
        forecaster.backtest(table, windows=6)
    unseen = waves(300, 1, seed=4).assign(unique_id="new")  # nothing of it was seen, whatever its dates
    assert len(forecaster.backtest(unseen, windows=2)) == 16 * len(forecaster.methods)


def test_backtest_refuses(table, fitted):
    for options in ({"windows": 0}, {"windows": 1.5}, {"step": 0}, {"step": True}):
        with pytest.raises(ValueError, match="give a whole number from 1 on"):
            fitted.backtest(**options)
    with pytest.raises(DataError, match=r"longest series has 400 steps; these windows take 480 .* fewer windows"):
        fitted.backtest(windows=40)
    mixed = pd.concat([table, waves(30, 1).assign(unique_id="short")])
    forecaster = quietly(Forecaster(horizon=12, **FLOOR).fit, mixed)
    with pytest.warns(UserWarning, match="1 of 4 series are too short for this backtest and left out"):
        raw = forecaster.backtest(windows=2, raw=True)
    assert "short" not in set(raw["unique_id"])


# --------------------------------------------------------------------------------------------- report and plot


def test_report_says_what_was_found(fitted):
    report = fitted.report()
    text = str(report)
    assert text.startswith("3 series of 400 steps of 'h'. 12 steps ahead from the last ")
    assert (
        re_line(text, "Recommended: ")
        and "that of seasonal naive 24" in text
        and "Held-out part: the last 60 steps" in text
    )
    assert [row[0] for row in report.rows].count(f"* {fitted.recommended}") == 1
    assert {row[0][2:] for row in report.rows} >= {"model", "ridge", "seasonal naive 24", "repeat last"}
    mse = [float(row[3]) for row in report.rows]
    assert mse == sorted(mse)
    page = report._repr_html_()
    assert page.count("<tr>") == len(report.rows) + 1 and "&#x27;h&#x27;" in page
    level, share = fitted._fitted.facts["coverage"]
    assert level == pytest.approx(0.8) and 0.6 < share <= 1


def re_line(text, start):
    return any(line.startswith(start) for line in text.splitlines())


def test_report_says_when_the_better_one_is_within_the_noise(fitted):
    f = dataclasses.replace(fitted._fitted, recommended="ridge", facts=fitted._fitted.facts | {"best": "model"})
    assert "ridge, since model is better on the validation part by less than the noise" in module._verdict(f)
    worse = {name: dict(row) for name, row in f.table.items()}
    worse["ridge"]["mase"] = 2 * worse["seasonal naive 24"]["mase"]
    assert "100% HIGHER than that of seasonal naive 24" in module._verdict(dataclasses.replace(f, table=worse))


def test_plot_draws_history_forecast_and_band(fitted, tmp_path):
    import matplotlib.pyplot as plt

    axes = fitted.plot()
    assert len(axes) == 3 and [ax.get_title(loc="left") for ax in axes] == ["s0", "s1", "s2"]
    ax = fitted.plot(fitted.predict(quantiles=[0.05, 0.25, 0.5, 0.75, 0.95]), ids=["s1"], history=20)
    history, line = ax.get_lines()
    assert len(history.get_ydata()) == 20 and len(line.get_ydata()) == 13 and len(ax.collections) == 2
    assert history.get_ydata()[-1] == line.get_ydata()[0] == fitted._panel["s1"].y[-1]
    zoned = waves(200, 1)
    zoned["ds"] = zoned["ds"].dt.tz_localize("Asia/Kolkata")
    line = Forecaster(horizon=4, **FLOOR).fit(zoned).plot().get_lines()[1]
    assert line.get_xdata()[0] == zoned["ds"].iloc[-1].tz_localize(None).to_datetime64()  # the clock's own reading
    counted = Forecaster(horizon=4, **FLOOR).fit(np.sin(np.arange(200) / 4)).plot()
    assert counted.get_lines()[1].get_xdata().tolist() == [199, 200, 201, 202, 203]
    own = plt.subplots()[1]
    assert fitted.plot(ax=own, ids=["s0"]) is own
    with pytest.raises(ValueError, match="there is no forecast of 'nobody'; there are 's0'"):
        fitted.plot(ids=["nobody"])
    with pytest.raises(ValueError, match="3 series for one axes; name one in ids="):
        fitted.plot(ax=own)
    plt.close("all")


# ------------------------------------------------------------------------------------------------ save and load


def test_saved_and_loaded_is_the_same_bit_for_bit(table, fitted, tmp_path):
    path = fitted.save(tmp_path / "new" / "folder")
    loaded = Forecaster.load(tmp_path / "new" / "folder")
    assert path.name == "forecaster.safetensors" and [each.name for each in path.parent.iterdir()] == [path.name]
    assert (
        loaded.config == fitted.config and loaded.recommended == fitted.recommended and loaded.methods == fitted.methods
    )
    longer = waves(450)
    for method in fitted.methods:
        for frame in (None, longer):
            pd.testing.assert_frame_equal(
                fitted.predict(frame, method=method), loaded.predict(frame, method=method), check_exact=True
            )
    assert str(loaded.report()).split("\n\n")[0] == str(fitted.report()).split("\n\n")[0]
    assert loaded.plot(ids=["s0"]) is not None
    with pytest.raises(ValueError, match="a saved forecaster keeps only the end of its table"):
        loaded.backtest()
    assert len(loaded.backtest(longer, windows=2)) == 2 * 12 * len(loaded.methods)


@pytest.mark.parametrize("kind", ["zone", "integer", "seconds", "naive only", "covariates"])
def test_saved_with_every_kind_of_axis(kind, tmp_path):
    table, names, settings = waves(260, 2), {}, {"horizon": 6, **SMALL}
    if kind == "zone":
        table["ds"] = table["ds"].dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    elif kind == "integer":
        table["ds"] = np.tile(np.arange(100, 100 + 3 * 260, 3), 2)
        table["unique_id"] = table["unique_id"].map({"s0": 4, "s1": 7})
    elif kind == "seconds":
        table["ds"] = table["ds"].astype("datetime64[s]")
    elif kind == "naive only":
        settings["candidates"] = ("naive",)
    else:
        table["k"] = np.arange(520) % 5.0
        names = {"past": ["k"]}
    forecaster = Forecaster(**settings).fit(table, **names)
    forecaster.save(tmp_path)
    found, again = forecaster.predict(), Forecaster.load(tmp_path).predict()
    pd.testing.assert_frame_equal(found, again, check_exact=True, check_freq=False)
    assert found["ds"].dtype == again["ds"].dtype


def test_what_cannot_be_loaded(fitted, tmp_path):
    with pytest.raises(CheckpointError, match=r"forecaster\.safetensors cannot be read"):
        Forecaster.load(tmp_path / "nowhere")
    path = fitted.save(tmp_path)
    header, tensors = read(path, "forecaster")
    extra = {name: header[name] for name in ("format", "config", "forecaster")}
    write(path, "forecaster", tensors, {**extra, "format": 99})
    with pytest.raises(CheckpointError, match="has format 99, this oral4 reads 1"):
        Forecaster.load(tmp_path)
    write(path, "forecaster", tensors, {**extra, "config": {**header["config"], "depth": 3}})
    with pytest.raises(CheckpointError, match="does not fit this version of oral4: there is no setting depth"):
        Forecaster.load(tmp_path)
    other = json.loads(json.dumps(header["forecaster"]))
    other["model"]["config"]["d_model"] = 16
    write(path, "forecaster", tensors, {**extra, "forecaster": other})
    with pytest.raises(CheckpointError, match="does not fit this version"):
        Forecaster.load(tmp_path)
    write(path, "weights", tensors, extra)
    with pytest.raises(CheckpointError, match="holds 'weights', not 'forecaster'"):
        Forecaster.load(tmp_path)
    content = bytearray(fitted.save(tmp_path).read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        Forecaster.load(tmp_path)


def test_names_that_cannot_be_saved(tmp_path):
    table = waves(200, 1)
    table["unique_id"] = pd.Timestamp("2024-01-01")
    with pytest.raises(TypeError, match="named by a Timestamp; only names that are text or numbers can be saved"):
        Forecaster(horizon=4, **FLOOR).fit(table).save(tmp_path)


# ------------------------------------------------------------------------------------------------------ at the door


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon=0; give a whole number from 1 on"),
        ({"history": 1.5}, "history=1.5"),
        ({"steps": -1}, "steps=-1; give a whole number from 0 on"),
        ({"d_model": True}, "d_model=True"),
        ({"season": 0}, r"season=0; give a whole number of steps from 1 on \(1: no season\)"),
        ({"season": (24, "7")}, "season="),
        ({"quantiles": (0.1, 1.0)}, r"quantiles=\(0\.1, 1\.0\); give different numbers in \(0, 1\)"),
        ({"quantiles": (0.5, 0.5)}, "give different numbers"),
        ({"quantiles": ("a",)}, "give numbers in"),
        ({"distribution": "laplace"}, "'laplace' is unknown; choose one of conformal, gaussian, student_t, quantile"),
        ({"metric": "rmse"}, "metric='rmse' is unknown; choose one of mse, mae"),
        ({"candidates": ("arima",)}, "choose of naive, ridge, model"),
        ({"candidates": ()}, "choose of naive, ridge, model"),
        ({"validation": 0.0}, "validation=0.0; give a share"),
        ({"calibration": 0.5}, "at most 0.4"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"seconds": 0.0}, "seconds=0.0; give a positive number"),
        ({"seed": -1}, "seed=-1"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        ForecasterConfig(**options)


def test_settings_by_name_and_by_config():
    config = ForecasterConfig.quick(horizon=7)
    assert Forecaster(config, seed=3).config == dataclasses.replace(config, seed=3)
    assert Forecaster.accurate(horizon=3).config == ForecasterConfig.accurate(horizon=3)
    assert ForecasterConfig.quick().d_model < ForecasterConfig().d_model < ForecasterConfig.accurate().d_model
    with pytest.raises(TypeError, match="there is no setting horizons; the settings are history, horizon"):
        Forecaster(horizons=3)
    with pytest.raises(TypeError, match="config is a int; give a ForecasterConfig"):
        Forecaster(24)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.horizon = 3


def test_before_the_fit():
    for call in (
        Forecaster().predict,
        Forecaster().report,
        Forecaster().backtest,
        Forecaster().plot,
        lambda: Forecaster().recommended,
        lambda: Forecaster().save("x"),
    ):
        with pytest.raises(RuntimeError, match="not fitted yet; call fit"):
            call()


def test_tables_that_are_wrong(table):
    with pytest.raises(DataError, match="history=900, but the longest series has 400 steps"):
        Forecaster(history=900).fit(table)
    with pytest.raises(DataError, match="horizon=400, but the longest series has 400 steps"):
        Forecaster(horizon=400).fit(table)
    with pytest.raises(TypeError, match=r"a pandas\.DataFrame is needed"):
        Forecaster().fit("data.csv")
    with pytest.raises(DataError, match="no column 'z', named as a covariate"):
        Forecaster().fit(table, past=["z"])
    with pytest.raises(ValueError, match="impute='zero'"):
        Forecaster().fit(table, impute="zero")
    with pytest.raises(DataError, match="infinite"):
        Forecaster().fit(table.assign(y=table["y"].where(table.index != 3, np.inf)))


def test_a_long_horizon_falls_back_to_naive_and_says_so():
    with pytest.warns(
        UserWarning, match="no series has .* steps before its validation part, so neither ridge nor model"
    ):
        forecaster = Forecaster(horizon=150, **SMALL).fit(waves(200, 1))
    assert forecaster.methods and "model" not in forecaster.methods
    with pytest.raises(ValueError, match=r"method='model' is not there; choose .*; no series has"):
        forecaster.predict(method="model")


def test_the_clock_can_stop_the_training(table):
    forecaster = Forecaster(horizon=6, **{**SMALL, "steps": 2000}, seconds=0.2).fit(table)
    assert forecaster._fitted.facts["stopped"] == "callback" and forecaster._fitted.facts["steps"] < 2000


def test_the_environment_is_left_alone(table, monkeypatch):
    monkeypatch.delenv("ORAL4_DEVICE", raising=False)
    Forecaster(horizon=6, device="cpu", **SMALL).fit(table)
    assert "ORAL4_DEVICE" not in os.environ
    monkeypatch.setenv("ORAL4_DEVICE", "cpu")
    Forecaster(horizon=6, **SMALL).fit(table)
    assert os.environ["ORAL4_DEVICE"] == "cpu"
    with pytest.raises(ValueError, match="device='toaster' cannot be used here"):
        Forecaster(device="toaster").fit(table)
