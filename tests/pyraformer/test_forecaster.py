"""`Forecaster`: a table in, forecasts with intervals out, and what stands between them and a wrong answer."""

import json
import random
import re
import struct
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import oral4.pyraformer.forecast as forecast_module
from oral4.data.fetch import available
from oral4.errors import CheckpointError, DataError
from oral4.pyraformer.data import load_pjm
from oral4.pyraformer.forecast import Forecaster, ForecasterConfig

SMALL = {"d_model": 16, "num_layers": 1, "steps": 20, "lr": 1e-2, "device": "cpu"}
TINY = {"history": 24, "horizon": 6, "season": 12, **SMALL}
CHEAP = {**TINY, "candidates": ("naive", "ridge")}
LEVELS = ["q0.1", "q0.5", "q0.9"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def waves(count=3, length=240, *, noise=0.3, period=12, seed=0):
    """Return (T, c): sines of one period with levels 10, 20, ... and Gaussian noise."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, count)
    angle = np.arange(length)[:, None] * 2 * np.pi / period + phase
    return 10.0 * np.arange(1, count + 1) + np.sin(angle) + noise * rng.normal(size=(length, count))


def long_frame(values, *, start="2024-01-01", freq="h", shorter=0):
    """Return a long table; each series ends ``shorter`` steps before the one before it."""
    parts = []
    for number, column in enumerate(values.T):
        stop = len(column) - shorter * number
        stamps = pd.date_range(start, periods=len(column), freq=freq)[:stop] if freq else np.arange(stop)
        parts.append(pd.DataFrame({"unique_id": f"s{number}", "ds": stamps, "y": column[:stop]}))
    return pd.concat(parts, ignore_index=True)


def quiet_fit(frame, settings=None, **columns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Forecaster(**(settings or CHEAP)).fit(frame, **columns)


@pytest.fixture(scope="module")
def table():
    return long_frame(waves(), shorter=17)


@pytest.fixture(scope="module")
def fitted(table):
    """With a model."""
    torch.set_num_threads(1)
    return Forecaster(**TINY).fit(table)


@pytest.fixture(scope="module")
def cheap(table):
    return Forecaster(**CHEAP).fit(table)


def same(one, other):
    pd.testing.assert_frame_equal(one, other, check_exact=True)


# ------------------------------------------------------------------------------------------------ fit and predict


def test_form_of_a_forecast(table, fitted):
    for method in ("recommended", "naive", *fitted.methods):
        found = fitted.predict(method=method)
        assert list(found.columns) == ["unique_id", "ds", "yhat", *LEVELS]
        assert len(found) == 3 * 6 and np.isfinite(found[["yhat", *LEVELS]].to_numpy()).all()
        assert (found["q0.1"] < found["q0.5"]).all() and (found["q0.5"] < found["q0.9"]).all()
        assert (found["q0.5"] == found["yhat"]).all()  # a conformal median is the point
        assert found.attrs["recommended"] == fitted.recommended and found.attrs["method"] in fitted.methods
    for name, rows in found.groupby("unique_id"):  # each goes on where it ended
        last = table.loc[table.unique_id == name, "ds"].max()
        assert rows.ds.tolist() == pd.date_range(last, periods=7, freq="h")[1:].tolist()
    assert len({rows.ds.iloc[0] for _, rows in found.groupby("unique_id")}) == 3
    assert {"seasonal naive 12", "ridge", "model"} <= set(fitted.methods)


@pytest.mark.parametrize("freq", ["h", "15min", "D", "B", "W-SUN", "MS", "ME", "QS"])
def test_stamps_go_on_in_their_step(freq):
    values = waves(2, 96)
    table = long_frame(values, start="1999-01-31", freq=freq)
    found = quiet_fit(table).predict()
    expected = pd.date_range(table.ds.iloc[95], periods=7, freq=freq)[1:]
    assert found.ds.tolist() == [*expected, *expected]


def test_whole_numbers_as_time():
    values = waves(2, 120)
    table = long_frame(values, freq=None)
    found = quiet_fit(table).predict()
    assert found.ds.tolist() == [*range(120, 126)] * 2
    thirds = table.assign(ds=table.ds * 3 + 5)
    assert quiet_fit(thirds).predict().ds.tolist()[:6] == [365, 368, 371, 374, 377, 380]
    array = quiet_fit(values).predict()
    assert array.unique_id.tolist() == ["0"] * 6 + ["1"] * 6
    same(array.drop(columns="unique_id"), found.drop(columns="unique_id"))
    same(quiet_fit(torch.from_numpy(values)).predict(), array)
    one = quiet_fit(values[:, 0]).predict()
    assert len(one) == 6 and one.unique_id.nunique() == 1


def test_every_form_of_a_table_gives_the_same_forecast():
    values = waves(3, 150)
    table = long_frame(values)
    expected = quiet_fit(table).predict()
    wide = table.pivot(index="ds", columns="unique_id", values="y")
    for frame in (
        wide,
        wide.reset_index(),
        table.sample(frac=1, random_state=1).sort_values("unique_id", kind="stable"),
        table.assign(ds=table.ds.astype(str)),
        table.rename(columns={"y": "load", "ds": "when", "unique_id": "place"}),
    ):
        renamed = {"id": "place", "time": "when", "target": "load"} if "load" in frame else {}
        found = quiet_fit(frame, **renamed).predict()
        found.columns = expected.columns
        pd.testing.assert_frame_equal(found, expected, check_exact=True, check_dtype=False)
    moved = wide.copy()
    moved.iloc[-4:, 1] = np.nan  # a wide series ends with its own numbers
    found = quiet_fit(moved).predict()
    assert found.ds[6] == expected.ds[6] - pd.Timedelta(hours=4)


def test_rows_in_any_order():
    table = long_frame(waves(2, 150))
    expected = quiet_fit(table).predict()
    found = quiet_fit(table.sample(frac=1, random_state=0)).predict()
    order = found.sort_values(["unique_id", "ds"], ignore_index=True)
    numbers = ["yhat", *LEVELS]  # sums over series in another order round otherwise
    np.testing.assert_allclose(order[numbers], expected[numbers], rtol=1e-9)
    assert order.ds.tolist() == expected.ds.tolist()


def test_time_zones_stay():
    table = long_frame(waves(1, 200))
    table["ds"] = table.ds.dt.tz_localize("Europe/Madrid", nonexistent="shift_forward")
    table = table.iloc[:150]
    found = quiet_fit(table).predict()
    assert str(found.ds.dt.tz) == "Europe/Madrid"
    assert found.ds.iloc[0] == table.ds.iloc[-1] + pd.Timedelta(hours=1)


def test_a_later_table_goes_on_from_there(table, cheap):
    values = waves(length=260)
    later = long_frame(values, shorter=17)
    found = cheap.predict(later)
    assert found.ds[0] == later.loc[later.unique_id == "s0", "ds"].max() + pd.Timedelta(hours=1)
    same(cheap.predict(table), cheap.predict())


def test_other_quantiles(cheap):
    usual = cheap.predict()
    found = cheap.predict(quantiles=(0.9, 0.25, 0.1))
    assert list(found.columns[3:]) == ["q0.1", "q0.25", "q0.9"]
    assert (found["q0.1"] <= found["q0.25"]).all() and (found["q0.25"] <= found["q0.9"]).all()
    assert (found["q0.1"] == usual["q0.1"]).all()
    assert list(cheap.predict(quantiles=()).columns) == ["unique_id", "ds", "yhat"]
    assert (cheap.predict(quantiles=())["yhat"] == usual["yhat"]).all()


@pytest.mark.parametrize("distribution", ["gaussian", "student_t", "quantile"])
def test_distributions(distribution):
    forecaster = quiet_fit(long_frame(waves(2, 180)), {**TINY, "distribution": distribution})
    found = forecaster.predict(method="model", quantiles=(0.1, 0.25, 0.5, 0.75, 0.9))
    ends = found[["q0.1", "q0.25", "q0.5", "q0.75", "q0.9"]].to_numpy()
    assert np.isfinite(ends).all() and (np.diff(ends, axis=1) >= 0).all() and (ends[:, -1] > ends[:, 0]).all()
    # twice the 80 % range of a wave of noise 0.3 is 4 * 1.28 * 0.3; a spread of another order would be another unit
    assert 0.3 < np.mean(ends[:, -1] - ends[:, 0]) < 3


# ------------------------------------------------------------------------------------------------- reproducibility


def test_a_seed_decides(table, fitted):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    again = Forecaster(**TINY).fit(table)
    forecast = again.predict(method="model")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    same(forecast, fitted.predict(method="model"))
    assert str(again.report()) == str(fitted.report())
    torch.manual_seed(123)
    other = Forecaster(**TINY, seed=1).fit(table)
    assert (other.predict(method="model")["yhat"] != forecast["yhat"]).any()
    same(other.predict(method="ridge"), fitted.predict(method="ridge"))  # the closed form draws nothing


# ------------------------------------------------------------------------------------------------- the honest floor


@pytest.mark.parametrize("kind", ["walk", "noise"])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_to_learn(kind, seed):
    """Whatever is trained, the choice is naive or ridge where there is nothing but noise."""
    steps = np.random.default_rng(seed).normal(size=(300, 2))
    values = steps.cumsum(axis=0) if kind == "walk" else steps
    forecaster = quiet_fit(values, {**TINY, "steps": 40, "season": 1})
    assert "model" in forecaster.methods and forecaster.recommended != "model"
    if kind == "walk":
        assert forecaster.recommended in ("repeat last", "ridge")


def test_a_season_with_noise_beats_repeating_it():
    """Repeating a season doubles the variance of the noise: averaging can save 1 - 1 / sqrt(2) = 29 % of MAE."""
    values = waves(8, 400)
    forecaster = quiet_fit(values[:-6])
    both = [forecaster.predict(method=method)["yhat"] for method in ("recommended", "seasonal naive 12")]
    ours, naive = (each.to_numpy().reshape(8, 6).T for each in both)
    truth = values[-6:]
    assert forecaster.recommended not in ("seasonal naive 12", "repeat last", "window mean")
    assert np.abs(ours - truth).mean() < 0.9 * np.abs(naive - truth).mean()
    text = str(forecaster.report())
    assert f"Recommended: {forecaster.recommended}" in text and "lower than that of seasonal naive 12" in text
    assert f"* {forecaster.recommended}" in text


def test_the_report_is_what_an_own_computation_says():
    """The seasonal naive row, from its definition, over all windows with a target in the last 15 % of the series."""
    y = waves(1, 400)[:, 0]
    forecaster = quiet_fit(y)
    train, horizon, period, begin = y[:280], 6, 12, 340
    errors, sizes = [], []
    for origin in range(begin - horizon + 1, 400):
        for step in range(horizon):
            if begin <= origin + step < 400:
                guess, truth = y[origin + step - period], y[origin + step]
                errors.append(guess - truth)
                sizes.append((abs(guess) + abs(truth)) / 2)
    errors = np.array(errors)
    mase = np.abs(errors).mean() / np.abs(train[period:] - train[:-period]).mean()
    expected = [mase, np.mean(np.abs(errors) / sizes), np.mean(errors**2) / train.var()]
    report = forecaster.report()
    row = next(row for row in report.rows if row[0].strip(" *") == "seasonal naive 12")
    assert report.columns[:4] == ("method", "MASE", "sMAPE", "MSE")
    assert list(row[1:4]) == [f"{value:.3g}" for value in expected]
    best = next(row for row in report.rows if row[0].startswith("*"))
    share = re.search(r"MASE is ([\d.]+), (\d+)% lower", str(report))
    assert best[0][2:] == forecaster.recommended and share
    found, percent = share.groups()
    assert found == best[1] and abs(int(percent) - 100 * (1 - float(found) / mase)) <= 1  # three digits are printed
    page = report._repr_html_()
    assert page.count("<tr>") == len(report.rows) + 1 and forecaster.recommended in page


def test_what_was_filled_is_no_target():
    """The same row for a series with a gap in its last part: nothing is judged by what a rule has put there."""
    y = waves(1, 400)[:, 0]
    table = pd.DataFrame({"ds": np.arange(400), "y": y})
    gap = np.arange(360, 375)
    table.loc[gap, "y"] = np.nan
    filled = table.y.ffill().to_numpy()
    errors = [
        filled[origin + step - 12] - y[origin + step]
        for origin in range(335, 400)
        for step in range(6)
        if 340 <= origin + step < 400 and origin + step not in gap
    ]
    report = quiet_fit(table, impute="ffill").report()
    row = next(row for row in report.rows if row[0].strip(" *") == "seasonal naive 12")
    assert row[3] == f"{np.mean(np.square(errors)) / y[:280].var():.3g}"


# ------------------------------------------------------------------------------------------------------- intervals


def test_intervals_keep_their_promise():
    """40 x 12 values with independent noise that nothing has seen: the standard error of a share is 1.4 % at 90 % and
    1.8 % at 80 %. Four of them, not three, since all share what the calibration part happened to be."""
    values = waves(40, 300, seed=3)
    settings = {**CHEAP, "horizon": 12, "quantiles": (0.05, 0.1, 0.5, 0.9, 0.95)}
    forecaster = quiet_fit(values[:-12], settings)
    truth = values[-12:].T.ravel()
    for method in ("recommended", "seasonal naive 12", "ridge"):
        found = forecaster.predict(method=method)
        for level, low, high, error in ((0.8, "q0.1", "q0.9", 0.018), (0.9, "q0.05", "q0.95", 0.014)):
            covered = np.mean((found[low] <= truth) & (truth <= found[high]))
            assert abs(covered - level) < 4 * error, (method, level)
    width = (forecaster.predict()["q0.9"] - forecaster.predict()["q0.1"]).mean()
    ideal = 2 * 1.2816 * 0.3  # of one who knows the wave and the noise
    assert 0.85 * ideal < width < 1.15 * ideal
    level, share = re.search(r"interval of (\d+)% covers ([\d.]+)%", str(forecaster.report())).groups()
    assert level == "90" and abs(float(share) - 90) < 4


def test_intervals_of_a_model_keep_their_promise():
    """As above for a distribution of the model; 24 x 6 values, standard error 2.5 % at 90 %."""
    values = waves(24, 240, seed=4)
    forecaster = quiet_fit(values[:-6], {**TINY, "distribution": "gaussian", "quantiles": (0.05, 0.5, 0.95)})
    found, truth = forecaster.predict(method="model"), values[-6:].T.ravel()
    assert abs(np.mean((found["q0.05"] <= truth) & (truth <= found["q0.95"])) - 0.9) < 4 * 0.025


def test_pjm_intervals():
    """Load of the east coast: fitted to its five years but four months, then asked every day of these.

    15 % of five years are nine months, so the calibration part has seen summer and winter. On less the interval is too
    narrow in summer: that is no fault, but errors that are not exchangeable. 122 days, if the hours of a day went all
    together, have a standard error of 2.7 %.
    """
    if not available("pjm/PJME_hourly.csv"):  # a test downloads nothing
        pytest.skip("the PJM files are not at hand")
    loaded = load_pjm(["PJME"], end="2018-07-31 23:00", missing="ffill")
    frame = pd.DataFrame(loaded.values, index=pd.DatetimeIndex(loaded.timestamps), columns=list(loaded.channels))
    known, days = frame.loc[:"2018-03-31 23:00"], 122
    settings = {"horizon": 24, "history": 168, "quantiles": (0.05, 0.5, 0.95), "candidates": ("naive", "ridge")}
    forecaster = quiet_fit(known, settings)
    rows = forecaster.backtest(frame, windows=days, step=24, raw=True)
    rows = rows[rows.method == forecaster.recommended]
    covered = np.mean((rows.low <= rows.y) & (rows.y <= rows.high))
    assert len(rows) == days * 24 and rows.ds.min() == pd.Timestamp("2018-04-01")
    assert 0.85 <= covered <= 0.95


# --------------------------------------------------------------------------------------------- units, levels, shapes


def test_powers_of_two_scale_exactly(table, fitted):
    """Doubling is exact in floating point, so nothing may change but the exponent; the model is trained all over."""
    expected = fitted.predict(method="model")
    for factor in (2.0**-30, 2.0**30):
        found = Forecaster(**TINY).fit(table.assign(y=table.y * factor)).predict(method="model")
        for name in ("yhat", *LEVELS):
            assert (found[name] == expected[name] * factor).all()


@pytest.mark.parametrize("factor", [1e-6, 1e6, -1.0, 1e-100, 1e100])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_scale_and_level_go_through(table, cheap, factor, shift):
    """In float64, hence 1e-9 of the spread: 1e-16 times the condition of a ridge regression."""
    expected = cheap.predict()
    found = Forecaster(**CHEAP).fit(table.assign(y=(table.y + shift) * factor)).predict()
    low, high = ("q0.1", "q0.9") if factor > 0 else ("q0.9", "q0.1")
    for mine, theirs in (("yhat", "yhat"), ("q0.1", low), ("q0.9", high)):
        np.testing.assert_allclose(found[mine] / factor - shift, expected[theirs], rtol=0, atol=1e-7)
    assert found.attrs["method"] == expected.attrs["method"]


def test_scale_of_each_series_is_its_own():
    values = waves(3, 200)
    units = np.array([1e-6, 1.0, 1e6])
    one, other = quiet_fit(values).predict(), quiet_fit(values * units).predict()
    for name in ("yhat", *LEVELS):
        np.testing.assert_allclose(other[name] / np.repeat(units, 6), one[name], rtol=1e-6)


@pytest.mark.parametrize("level", [0.0, 5.0, -3e8, 1e-9])
def test_constant(level):
    found = quiet_fit(np.full(120, level)).predict()
    np.testing.assert_allclose(found["yhat"], level, rtol=1e-12)
    ends = found[LEVELS].to_numpy()
    assert np.isfinite(ends).all() and (ends[:, 0] <= ends[:, 1]).all() and (ends[:, 1] <= ends[:, 2]).all()
    np.testing.assert_allclose(ends, level, rtol=0, atol=1e-8 * max(1.0, abs(level)))


def test_constant_beside_others():
    values = np.column_stack([waves(2, 240), np.full(240, 5.0)])
    forecaster = quiet_fit(values)
    for method in forecaster.methods:
        own = forecaster.predict(method=method).iloc[12:]
        np.testing.assert_allclose(own["yhat"], 5.0, rtol=1e-12)
        assert np.isfinite(own[LEVELS].to_numpy()).all() and (own["q0.9"] - own["q0.1"]).max() < 0.05


def test_series_and_small_numbers_types():
    table = long_frame(waves(1, 150)).drop(columns="unique_id")
    one = quiet_fit(table).predict()
    other = quiet_fit(table.set_index("ds")["y"]).predict()
    pd.testing.assert_frame_equal(one, other, check_exact=True)
    rounded = table.assign(y=table.y.astype("float32"))
    np.testing.assert_allclose(quiet_fit(rounded).predict()["yhat"], one["yhat"], rtol=1e-6)  # float32: 6e-8 each
    whole = table.assign(y=(100 * table.y).round())
    same(quiet_fit(whole.astype({"y": int})).predict(), quiet_fit(whole).predict())


# ------------------------------------------------------------------------------------------------------ covariates


def promotions(length=420, seed=5):
    """Return a table whose jumps only a covariate known ahead can foresee."""
    rng = np.random.default_rng(seed)
    promo = (rng.random(length) < 0.3).astype(float)
    y = 20 + 5 * promo + 0.3 * rng.normal(size=length)
    visits = y + rng.normal(size=length)
    return pd.DataFrame({"ds": np.arange(length), "y": y, "promo": promo, "shop": 1.0, "visits": visits})


@pytest.fixture(scope="module")
def informed():
    torch.set_num_threads(1)
    settings = {**TINY, "season": 1, "steps": 150, "lr": 1e-2}
    return quiet_fit(promotions().iloc[:400], settings, future=["promo"], past=["visits"], static=["shop"])


def test_what_is_known_ahead_helps(informed):
    table = promotions()
    ahead, truth = table.iloc[400:], table.y.to_numpy()[400:406]
    blind = quiet_fit(table.iloc[:400], {**TINY, "season": 1, "steps": 60})
    assert informed.recommended == "model"
    forecasts = informed.predict(future=ahead), blind.predict()
    with_promo, without = (np.abs(each["yhat"] - truth).mean() for each in forecasts)
    assert 0 < truth.std() and with_promo < without / 2
    turned = ahead.assign(promo=1 - ahead.promo)
    change = informed.predict(future=turned)["yhat"] - informed.predict(future=ahead)["yhat"]
    assert (np.sign(change) == np.sign(0.5 - ahead.promo.to_numpy()[:6])).all()


def test_covariates_that_are_missing(informed):
    table = promotions()
    ahead = table.iloc[400:]
    with pytest.raises(DataError, match="'promo' are needed for the 6 steps"):
        informed.predict()
    with pytest.raises(DataError, match="'promo' are missing; the columns are"):
        informed.predict(future=ahead.drop(columns="promo"))
    with pytest.raises(DataError, match="'promo' are needed at 2 more stamps, the first is 404"):
        informed.predict(future=ahead.iloc[:4])
    with pytest.raises(DataError, match="needed at 1 more stamps, the first is 402"):
        informed.predict(future=ahead.assign(promo=ahead.promo.where(ahead.ds != 402)))
    same(informed.predict(future=ahead), informed.predict(future=ahead.iloc[:6]))  # more rows do no harm
    with pytest.raises(DataError, match="no column 'visits'"):
        informed.predict(table.drop(columns="visits"), future=ahead)
    with pytest.raises(DataError, match="no column 'wind', named as a covariate"):
        Forecaster(**CHEAP).fit(table, past=["wind"])
    with pytest.raises(ValueError, match="give a list of names"):
        Forecaster(**CHEAP).fit(table, past="visits")


# ------------------------------------------------------------------------------------------------- gaps, short, wrong


@pytest.mark.parametrize("impute", ["mask", "linear", "ffill"])
def test_gaps(impute):
    table = long_frame(waves(2, 240))
    holes = table.copy()
    holes.loc[[50, 51, 52, 150, 236, 300], "y"] = np.nan
    holes = holes.drop(index=[20, 21, 400])
    found = quiet_fit(holes, {**TINY, "steps": 10}, impute=impute).predict(method="model")
    assert np.isfinite(found[["yhat", *LEVELS]].to_numpy()).all() and len(found) == 12
    whole = quiet_fit(table).predict()
    # the wave is 1 high: what was filled are no zeros among tens
    assert np.abs(found["yhat"] - whole["yhat"]).max() < 1.5


def test_gaps_without_leave():
    table = long_frame(waves(2, 240))
    holes = table.copy()
    holes.loc[[50, 51, 300], "y"] = np.nan
    with pytest.raises(DataError, match=r"'s0': 2 of 240 values are missing.*first at 2024-01-03 02.*impute="):
        Forecaster(**CHEAP).fit(holes)
    with pytest.raises(DataError, match="stamps absent: 1, NaN: 0"):
        Forecaster(**CHEAP).fit(table.drop(index=30))
    with pytest.raises(DataError, match="'s1': 1 values are infinite, the first at"):
        Forecaster(**CHEAP).fit(table.assign(y=table.y.where(table.index != 300, np.inf)))
    with pytest.raises(ValueError, match="choose None, 'ffill', 'linear' or 'mask'"):
        Forecaster(**CHEAP).fit(table, impute="zero")


def test_a_short_series_is_said_to_be_short():
    with pytest.warns(UserWarning, match=r"no series is long enough to compare.*there are no intervals"):
        forecaster = Forecaster(horizon=2, season=1).fit(np.array([1.0, 2.0, 4.0, 3.0]))
    assert forecaster.methods[0] == forecaster.recommended == "repeat last"
    assert "Note: " in str(forecaster.report())
    with pytest.warns(UserWarning, match="some quantiles are NaN"):
        found = forecaster.predict()
    assert found["yhat"].tolist() == [3.0, 3.0] and found[["q0.1", "q0.9"]].isna().all().all()
    assert forecaster.predict(quantiles=())["yhat"].tolist() == [3.0, 3.0]
    with pytest.raises(DataError, match="horizon=4, but the longest series has 4 steps"):
        Forecaster(horizon=4).fit(np.arange(4.0))
    with pytest.raises(DataError, match="history=9, but the longest series has 4 steps"):
        Forecaster(history=9, horizon=1).fit(np.arange(4.0))


def test_many_short_series_beside_long_ones():
    values = waves(30, 200)
    table = long_frame(values)
    table = table[(table.unique_id < "s2") | (table.ds < "2024-01-01 09:00")]  # all but 12 end after 9 steps
    with pytest.warns(UserWarning, match="series are shorter than the history of 24"):
        forecaster = Forecaster(**CHEAP).fit(table)
    found = forecaster.predict(quantiles=())
    assert len(found) == 30 * 6 and np.isfinite(found["yhat"]).all()


def test_bad_tables(table):
    for wrong, words in (("data.csv", "str"), (None, "NoneType"), ({"y": [1]}, "dict")):
        with pytest.raises(TypeError, match=f"frame is a {words}; a pandas.DataFrame is needed"):
            Forecaster(**CHEAP).fit(wrong)
    for array in (np.zeros((3, 2, 2)), np.array(["a", "b"]), np.zeros(0)):
        with pytest.raises(ValueError, match="frame is an array of shape"):
            Forecaster(**CHEAP).fit(array)
    with pytest.raises(DataError, match="the table is empty: 0 rows"):
        Forecaster(**CHEAP).fit(table.iloc[:0])
    with pytest.raises(DataError, match="no column 'y'; the columns are 'unique_id', 'ds', 'load'"):
        Forecaster(**CHEAP).fit(table.rename(columns={"y": "load"}))
    wide = pd.DataFrame({"ds": pd.date_range("2024", periods=60, freq="h"), "a": 1.0, "town": "x", "code": "y"})
    with pytest.raises(DataError, match="these hold no numbers: 'town', 'code'"):
        Forecaster(**CHEAP).fit(wide)
    with pytest.raises(DataError, match=r"more than once: 2\. Series 's0' has 2024-01-01 04"):
        Forecaster(**CHEAP).fit(pd.concat([table, table.iloc[[4, 5]]]))
    with pytest.raises(DataError, match="grid of freq='D'"):
        Forecaster(**CHEAP).fit(table, freq="D")


def test_bad_questions(table, cheap):
    for call in (Forecaster().predict, Forecaster().report, Forecaster().backtest, Forecaster().plot):
        with pytest.raises(RuntimeError, match="not fitted yet; call fit"):
            call()
    with pytest.raises(RuntimeError, match="not fitted yet"):
        Forecaster().save("nowhere")
    for levels in ((0.0, 0.5), (1.0,), (0.1, 2.0), (0.1, 0.1), (0.5, np.nan)):
        with pytest.raises(ValueError, match="different numbers in"):
            cheap.predict(quantiles=levels)
        with pytest.raises(ValueError, match="different numbers in"):
            ForecasterConfig(quantiles=levels)
    with pytest.raises(ValueError, match="give numbers in"):
        cheap.predict(quantiles=("low",))
    for horizon in (0, -1, 2.5, True, "6"):
        with pytest.raises(ValueError, match="give a whole number"):
            cheap.predict(horizon=horizon)
    with pytest.raises(ValueError, match="method='magic' is not there; choose recommended, naive or one of seasonal"):
        cheap.predict(method="magic")
    with pytest.raises(ValueError, match="method='model' is not there"):
        cheap.predict(method="model")
    with pytest.raises(DataError, match=r"not on the grid of freq='h'.*look like freq='15min'"):
        cheap.predict(long_frame(waves(1, 100), freq="15min"))
    with pytest.raises(ValueError, match=r"cannot be calibrated at step 1.*levels nearer to 0\.5, give longer series"):
        cheap.predict(quantiles=(0.0001,))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("distribution", "cauchy", "choose one of conformal, gaussian"),
        ("metric", "mape", "choose one of mse, mae"),
        ("horizon", 0, "whole number from 1"),
        ("horizon", 2.0, "whole number from 1"),
        ("season", 0, "whole number of steps from 1"),
        ("candidates", ("oracle",), "choose of naive, ridge, model"),
        ("validation", 0.5, "at most 0.4"),
        ("calibration", 0, "above 0"),
        ("dropout", 1.0, "dropout < 1"),
        ("seconds", -1.0, "positive number"),
        ("steps", -1, "whole number from 0"),
    ],
)
def test_bad_settings(setting, value, words):
    with pytest.raises(ValueError, match=words) as caught:
        Forecaster(**{setting: value})
    assert setting in str(caught.value)


def test_unknown_settings():
    with pytest.raises(TypeError, match="there is no setting widht; the settings are history"):
        Forecaster(widht=3)
    with pytest.raises(TypeError, match="config is a dict; give a ForecasterConfig"):
        Forecaster({"horizon": 3})
    assert Forecaster.quick(horizon=3).config == ForecasterConfig.quick(horizon=3)
    assert Forecaster.accurate(steps=3).config.d_model == 128
    assert repr(Forecaster()) == "Forecaster, not fitted"


def test_unseen_series(cheap):
    table = long_frame(waves(1, 100)).assign(unique_id="new")
    found = cheap.predict(table)
    assert len(found) == 6 and np.isfinite(found[["yhat", *LEVELS]].to_numpy()).all()
    assert any("1 series were not there when it was fitted, such as 'new'" in note for note in found.attrs["notes"])
    assert np.abs(found["yhat"] - 10).max() < 2.5  # its level is its own


def test_further_than_fitted(cheap, table):
    with pytest.raises(ValueError, match=r"fitted for 6 steps.*Fit again with horizon=15, or pass quantiles=\(\)"):
        cheap.predict(horizon=15)
    far, near = cheap.predict(horizon=15, quantiles=()), cheap.predict(quantiles=())
    assert len(far) == 45 and far.groupby("unique_id").ds.nunique().eq(15).all()
    for name, rows in far.groupby("unique_id"):
        assert (rows["yhat"].to_numpy()[:6] == near.loc[near.unique_id == name, "yhat"].to_numpy()).all()
    longer = pd.concat([table, near.rename(columns={"yhat": "y"})])  # the forecast, as if it had come
    next_part = cheap.predict(longer, quantiles=())
    for name, rows in far.groupby("unique_id"):
        expected = next_part.loc[next_part.unique_id == name, "yhat"].to_numpy()
        np.testing.assert_allclose(rows["yhat"].to_numpy()[6:12], expected, rtol=1e-12)
    short = cheap.predict(horizon=2)
    same(short, cheap.predict().groupby("unique_id").head(2).reset_index(drop=True))


# ------------------------------------------------------------------------------------------------------ save and load


def test_saved_and_loaded(tmp_path, table, fitted, informed):
    path = fitted.save(tmp_path / "one")
    assert [each.name for each in (tmp_path / "one").iterdir()] == ["forecaster.safetensors"] == [path.name]
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + size])  # JSON, then plain numbers to the last byte
    ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
    assert max(ends) == len(data) - 8 - size
    loaded = Forecaster.load(tmp_path / "one")
    for method in fitted.methods:
        same(loaded.predict(method=method), fitted.predict(method=method))
    same(loaded.predict(table), fitted.predict(table))
    assert str(loaded.report()) == str(fitted.report()) and loaded.config == fitted.config
    with pytest.raises(ValueError, match="a saved forecaster keeps only the end of its table"):
        loaded.backtest()
    ahead = promotions().iloc[400:]
    informed.save(tmp_path / "one")  # over the other
    same(Forecaster.load(tmp_path / "one").predict(future=ahead), informed.predict(future=ahead))


@pytest.mark.parametrize("distribution", ["student_t", "quantile"])
def test_saved_distributions(tmp_path, distribution):
    table = long_frame(waves(2, 120)).assign(ds=lambda t: t.ds.dt.tz_localize("UTC"))
    forecaster = quiet_fit(table, {**TINY, "steps": 3, "distribution": distribution})
    forecaster.save(tmp_path)
    same(Forecaster.load(tmp_path).predict(method="model"), forecaster.predict(method="model"))


def test_what_cannot_be_loaded(tmp_path, cheap, monkeypatch):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        Forecaster.load(tmp_path)
    path = cheap.save(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"x" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            Forecaster.load(tmp_path)
    with monkeypatch.context() as other:
        other.setattr(forecast_module, "FORMAT", 99)
        cheap.save(tmp_path)
    with pytest.raises(CheckpointError, match="has format 99, this oral4 reads 1; fit again"):
        Forecaster.load(tmp_path)
    changed = Forecaster(**CHEAP)
    changed._fitted = cheap._fitted
    changed.save(tmp_path)
    assert Forecaster.load(tmp_path).recommended == cheap.recommended  # a sound file is read again


# ----------------------------------------------------------------------------------------------------------- backtest


def test_backtest(table):
    forecaster = quiet_fit(table)
    errors = forecaster.backtest(windows=2, step=4)
    assert list(errors.columns) == ["method", "window", "step", "mae", "mse", "mase", "smape", "coverage", "width"]
    assert set(errors.method) == set(forecaster.methods) and len(errors) == len(forecaster.methods) * 2 * 6
    assert sorted(set(errors.window)) == [0, 1] and sorted(set(errors.step)) == [1, 2, 3, 4, 5, 6]
    assert errors.coverage.between(0, 1).all() and (errors.width > 0).all()
    rows = forecaster.backtest(windows=2, step=4, raw=True)
    assert len(rows) == len(forecaster.methods) * 2 * 6 * 3
    for name, own in table.groupby("unique_id"):
        part = rows[(rows.unique_id == name) & (rows.method == "ridge")]
        cutoffs = own.ds.to_numpy()[[len(own) - 11, len(own) - 7]]
        assert sorted(set(part.cutoff)) == [pd.Timestamp(each) for each in cutoffs]
        assert (part.merge(own, on="ds").eval("y_x == y_y")).all() and (part.ds > part.cutoff).all()
    absolute = rows.assign(error=(rows.yhat - rows.y).abs())
    mine = absolute.groupby(["method", "window", "step"], sort=False)["error"].mean()
    np.testing.assert_allclose(mine.to_numpy(), errors["mae"], rtol=1e-12)
    text = str(forecaster.report())
    expected = errors.loc[errors.method == "ridge", "mase"].mean()
    row = next(row for row in forecaster.report().rows if row[0][2:] == "ridge")
    assert "MASE in backtest" in text and row[5] == f"{expected:.3g}"


@pytest.mark.parametrize("refit", [False, True])
def test_backtest_does_not_look_ahead(refit):
    """Windows of 6 steps begin 12 and 6 steps before the end. What lies behind a cutoff must not change its forecasts.

    Without refit one fit serves all windows; it must be of what lies before the first.
    """
    y = waves(1, 200)[:, 0]
    settings = {**TINY, "steps": 5}

    def forecasts(values):
        forecaster = quiet_fit(values, settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            rows = forecaster.backtest(windows=2, refit=refit, raw=True)
        assert "model" in set(rows.method)
        return rows

    plain, last, both = y.copy(), y.copy(), y.copy()
    last[-6:] += 100
    both[-12:] += 100
    one, other, third = forecasts(plain), forecasts(last), forecasts(both)
    names = ["method", "window", "yhat", "low", "high"]
    same(one[names], other[names])
    same(one.loc[one.window == 0, names], third.loc[third.window == 0, names])
    assert (one.loc[one.window == 1, "yhat"] != third.loc[third.window == 1, "yhat"]).any()


def test_backtest_of_a_new_table(cheap):
    later = long_frame(waves(length=300), shorter=17)
    rows = cheap.backtest(later, windows=3, raw=True)
    seen = pd.concat([own.iloc[:-18] for _, own in later.groupby("unique_id")])
    expected = cheap.predict(seen)
    first = rows[(rows.window == 0) & (rows.method == cheap.recommended)]
    np.testing.assert_array_equal(first["yhat"], expected["yhat"])
    np.testing.assert_array_equal(first[["low", "high"]], expected[["q0.1", "q0.9"]])
    with pytest.raises(DataError, match=r"the forecaster was fitted up to .* and knows"):
        cheap.backtest(long_frame(waves(length=250), shorter=17), windows=3)


def test_bad_backtests(cheap):
    for wrong in ({"windows": 0}, {"windows": 1.5}, {"step": 0}, {"windows": True}):
        with pytest.raises(ValueError, match="give a whole number from 1 on"):
            cheap.backtest(**wrong)
    with pytest.raises(DataError, match="Give fewer windows, a smaller step or a shorter horizon"):
        cheap.backtest(windows=60)


# --------------------------------------------------------------------------------------------------------------- plot


def test_plot(cheap):
    plt = pytest.importorskip("matplotlib.pyplot")
    try:
        axes = cheap.plot()
        assert len(axes) == 3 and [ax.get_title(loc="left") for ax in axes] == ["s0", "s1", "s2"]
        found = cheap.predict()
        one = cheap.plot(found, ids=["s1"])
        line = one.lines[-1].get_ydata()
        np.testing.assert_array_equal(line[-6:], found.loc[found.unique_id == "s1", "yhat"])
        own = plt.figure().subplots()
        assert cheap.plot(found, ids=["s2"], ax=own) is own and own.collections
        with pytest.raises(ValueError, match="no forecast of 's9'; there are 's0'"):
            cheap.plot(ids=["s9"])
        with pytest.raises(ValueError, match="3 series for one axes"):
            cheap.plot(ax=own)
    finally:
        plt.close("all")
