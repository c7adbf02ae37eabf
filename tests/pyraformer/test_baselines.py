"""The honest floor: each forecast against its definition written out here, the table of errors, errors at the door."""

import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oral4.errors import DataError
from oral4.pyraformer import baselines
from oral4.pyraformer.baselines import (
    ARRidge,
    DLinear,
    RidgeNLinear,
    best_naive,
    daily_profile,
    moving_average,
    repeat_last,
    score_windows,
    seasonal_naive,
    window_gram,
    window_gram_reference,
    window_mean,
)
from oral4.pyraformer.data import StandardScaler, ett_splits, load_ett

MONTH = 30 * 24
NAIVE = {
    "repeat last": repeat_last,
    "seasonal naive 24": lambda x, m: seasonal_naive(x, m, 24),
    "seasonal naive 168": lambda x, m: seasonal_naive(x, m, 168),
    "window mean": window_mean,
    "daily profile": daily_profile,
}
TASKS = [(168, 168), (168, 336), (336, 720)]
# MSE and MAE on every official test window, computed by another program and printed to three decimals.
TABLE = {
    "ETTh1": {
        "repeat last": [(1.325, 0.730), (1.330, 0.746), (1.335, 0.755)],
        "seasonal naive 24": [(0.571, 0.463), (0.650, 0.501), (0.655, 0.514)],
        "seasonal naive 168": [(0.656, 0.509), (0.683, 0.520), (0.658, 0.522)],
        "window mean": [(0.713, 0.569), (0.715, 0.579), (0.701, 0.596)],
        "daily profile": [(0.437, 0.418), (0.469, 0.431), (0.424, 0.437)],
        "ridge": [(0.414, 0.412), (0.454, 0.432), (0.422, 0.443)],
    },
    "ETTh2": {
        "repeat last": [(0.510, 0.461), (0.597, 0.511), (0.595, 0.519)],
        "seasonal naive 24": [(0.461, 0.417), (0.532, 0.466), (0.526, 0.474)],
        "seasonal naive 168": [(0.578, 0.483), (0.567, 0.491), (0.554, 0.491)],
        "window mean": [(0.419, 0.430), (0.434, 0.448), (0.432, 0.455)],
        "daily profile": [(0.394, 0.407), (0.410, 0.428), (0.403, 0.435)],
        "ridge": [(0.345, 0.375), (0.390, 0.412), (0.385, 0.422)],
    },
}


@pytest.fixture(scope="module")
def scaled():
    """Name -> all rows of an ETT table, scaled by its training months."""
    try:
        values = {name: load_ett(name).values for name in TABLE}
    except DataError as error:
        pytest.skip(str(error))
    return {name: StandardScaler().fit(v[: 12 * MONTH]).transform(v) for name, v in values.items()}


def walks(steps=400, channels=3, seed=0, level=0.0):
    return np.random.default_rng(seed).normal(size=(steps, channels)).cumsum(0) + level


def all_windows(series, history, horizon, stride=1):
    """Every complete window of every channel, one after another: (n, L) and (n, M)."""
    rows = []
    for part in series if isinstance(series, list) else [series]:
        for channel in np.atleast_2d(np.asarray(part, dtype=np.float64).T):
            for first in range(0, len(channel) - history - horizon + 1, stride):
                rows.append(channel[first : first + history + horizon])
    rows = np.array([row for row in rows if not np.isnan(row).any()])
    return rows[:, :history], rows[:, history:]


# --------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("cell", range(3), ids=["168-168", "168-336", "336-720"])
@pytest.mark.parametrize("name", TABLE)
def test_table_of_errors(scaled, name, cell):
    history, horizon = TASKS[cell]
    values = scaled[name]
    model = RidgeNLinear(history, horizon, penalty=1e3).fit(values, stop=12 * MONTH)
    assert model.num_windows == 7 * (12 * MONTH - history - horizon + 1)
    forecasts = {k: lambda x, f=f: f(x, horizon) for k, f in NAIVE.items()} | {"ridge": model.predict}
    for kind, forecast in forecasts.items():
        score = score_windows(forecast, values[16 * MONTH - history : 20 * MONTH], history, horizon)
        assert score.num_windows == 7 * (4 * MONTH - horizon + 1)
        # half of the last printed digit, and half of the next for numbers that were rounded twice
        np.testing.assert_allclose(score[:2], TABLE[name][kind][cell], rtol=0, atol=5.5e-4, err_msg=kind)


def test_windows_are_the_official_ones(scaled):
    """Scores over a slice equal scores over the windows that a model is shown."""
    data = ett_splits("ETTh1", 168, 168).test
    x, y, _, _ = data.batch(range(0, len(data), 50), dtype=torch.float64)  # (B, L, c)
    error = seasonal_naive(x.mT, 168, 24) - y.mT
    found = score_windows(lambda h: seasonal_naive(h, 168, 24),
                          scaled["ETTh1"][16 * MONTH - 168 : 20 * MONTH], 168, 168, stride=50)  # fmt: skip
    assert found.num_windows == error[..., 0].numel()
    np.testing.assert_allclose(found[:2], (error.square().mean(), error.abs().mean()), rtol=1e-12)


# --------------------------------------------------------------------------- forecasts without training


def by_definition(history, horizon, period, kind):
    """One history, step by step: the values of the step's phase, newest first."""
    out = []
    for step in range(horizon):
        same = [v for k, v in enumerate(history[::-1]) if (step + k + 1) % period == 0 and not np.isnan(v)]
        out.append(same[0] if kind == "latest" else math.fsum(same) / len(same))
    return np.array(out)


@given(st.integers(1, 30), st.integers(1, 40), st.data())
@settings(max_examples=150, deadline=None)
def test_naive_forecasts_by_definition(length, horizon, data):
    period = data.draw(st.integers(1, length))
    numbers = st.floats(-1e6, 1e6) | st.just(float("nan"))
    history = np.array(data.draw(st.lists(numbers, min_size=length, max_size=length)))
    unseen = any(np.isnan(history[::-1][phase::period]).all() for phase in range(period))
    for forecast, kind in ((seasonal_naive, "latest"), (daily_profile, "mean")):
        if unseen:
            with pytest.raises(ValueError, match="1 of 1 histories have no observed value"):
                forecast(history, horizon, period)
            continue
        expected = by_definition(history, horizon, period, kind)
        for x in (history, torch.from_numpy(history)):
            found = forecast(x, horizon, period)
            assert type(found) is type(x)
            # at most 30 values of a million: the mean may be rounded in another order
            np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-8 if kind == "mean" else 0)


def test_period_one():
    history = walks()[:, 0]
    assert np.array_equal(repeat_last(history, 5), np.full(5, history[-1]))
    np.testing.assert_allclose(window_mean(history, 5), np.full(5, history.mean()), rtol=1e-13)


@pytest.mark.parametrize("forecast", NAIVE.values(), ids=NAIVE)
def test_naive_forecasts_keep_kind_and_axes(forecast):
    x = walks(336, 6).T.reshape(2, 3, 336)
    expected = forecast(x, 50)
    assert expected.shape == (2, 3, 50) and expected.dtype == np.float64
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = forecast(torch.from_numpy(x).to(dtype), 50)
        assert found.dtype == dtype and found.shape == (2, 3, 50)
        # random walks of up to about 40: half a unit in the last place of each type, for means a few
        atol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.5}[dtype]
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=atol)
    assert forecast(x.astype(np.float32), 50).dtype == np.float32
    assert np.array_equal(forecast(np.round(x).astype(int), 50), forecast(np.round(x), 50))
    for row, one in zip(expected.reshape(6, 50), x.reshape(6, 336), strict=True):
        np.testing.assert_allclose(forecast(one, 50), row, rtol=0, atol=1e-12)  # rows do not mix
    before = x.copy()
    forecast(x, 50)[...] = 0
    assert np.array_equal(x, before), "the forecast is a copy"
    x.flags.writeable = False  # as columns of pandas are
    assert np.array_equal(forecast(x, 50), expected)


@pytest.mark.parametrize("forecast", NAIVE.values(), ids=NAIVE)
def test_naive_forecasts_follow_shift_and_scale(forecast):
    x = walks(336).T
    np.testing.assert_allclose(forecast(3 * x - 40, 50), 3 * forecast(x, 50) - 40, rtol=0, atol=1e-11)


def test_an_empty_batch_has_an_empty_forecast():
    for forecast in NAIVE.values():
        assert forecast(np.zeros((0, 168)), 5).shape == (0, 5)
        assert forecast(torch.zeros(2, 0, 168), 5).shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: seasonal_naive(np.zeros(10), 5, 11), ValueError, "period=11 is longer than the history of 10"),
        (lambda: daily_profile(np.zeros(10), 5), ValueError, "period=24 is longer than the history of 10"),
        (lambda: repeat_last(np.zeros(0), 5), ValueError, "period=1 is longer than the history of 0"),
        (lambda: repeat_last(3.0, 5), ValueError, "longer than the history of 0"),
        (lambda: repeat_last(np.zeros(3), 0), ValueError, "horizon=0; give a whole number, 1 or more"),
        (lambda: seasonal_naive(np.zeros(3), 1, 0), ValueError, "period=0; give a whole number"),
        (lambda: repeat_last(np.zeros(3), 1.5), TypeError, "horizon=1.5 is no whole number"),
        (lambda: repeat_last([1.0, math.nan, math.inf], 1), ValueError, r"1 infinite values, the first at \(2,\)"),
        (lambda: repeat_last(torch.tensor([[1.0], [-math.inf]]), 1), ValueError, r"the first at \(1, 0\)"),
        (lambda: repeat_last([math.nan] * 3, 1), ValueError, "1 of 1 histories have no observed value; give a longer"),
        (lambda: window_mean(torch.tensor([[1.0], [math.nan]]), 1), ValueError, "1 of 2 histories have no observed"),
        (lambda: seasonal_naive([1, 2, math.nan], 1, 2), ValueError, None),
        (lambda: seasonal_naive([1, math.nan, 2], 1, 2), ValueError, "some phase of the period 2"),
    ],
)  # fmt: skip
def test_bad_input_of_naive_forecasts(call, error, words):
    if words is None:  # the phase was seen one cycle earlier
        assert call().tolist() == [2.0]
        return
    with pytest.raises(error, match=words):
        call()


# ------------------------------------------------------------------------------------ sums over windows


@given(st.integers(1, 60), st.integers(1, 14), st.integers(1, 20), st.integers(0, 99), st.booleans(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_window_sums_equal_the_sums_over_windows(length, width, stride, seed, gaps, channels):
    draw = np.random.default_rng(seed)
    series = draw.normal(size=(length, channels)).cumsum(0)
    if gaps:
        series[draw.random(series.shape) < 0.05] = np.nan
    found, expected = window_gram(series, width, stride=stride), window_gram_reference(series, width, stride=stride)
    assert found.num_windows == expected.num_windows
    scale = max(np.abs(expected.gram).max(), 1.0)
    # the promise: 1e-12 of the largest entry; here at most 60 additions
    np.testing.assert_allclose(found.gram, expected.gram, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(found.total, expected.total, rtol=0, atol=1e-12 * scale)
    assert np.array_equal(found.gram[: min(stride, width)].T, found.gram[:, : min(stride, width)])


def test_reference_by_hand():
    gram, total, count = window_gram_reference([[1.0, 2.0, 3.0], [5.0, 7.0], [9.0]], 2)
    assert (gram.tolist(), total.tolist(), count) == ([[30.0, 43.0], [43.0, 62.0]], [8.0, 12.0], 3)


def test_a_long_series_keeps_its_digits():
    """100,000 windows with a level a thousand times the steps: rounding does not pile up along the diagonals."""
    series = walks(100_000, 1)[:, 0]
    found, expected = window_gram(series, 200), window_gram_reference(series, 200)
    np.testing.assert_allclose(found.gram, expected.gram, rtol=0, atol=1e-12 * expected.gram.max())


def test_many_series_are_the_sum_of_each():
    parts = [walks(100, 2, seed=1), walks(40, 1, seed=2)[:, 0], walks(5, 1, seed=3)]  # the last has no window
    together = window_gram(parts, 12)
    each = [window_gram(c, 12) for part in parts[:2] for c in np.atleast_2d(part.T)]
    np.testing.assert_allclose(together.gram, sum(g.gram for g in each), rtol=1e-12)
    assert together.num_windows == 89 * 2 + 29 == sum(g.num_windows for g in each)
    assert np.array_equal(window_gram(torch.from_numpy(parts[0]), 12).gram, window_gram(parts[0], 12).gram)


def test_no_window_is_formed():
    series = walks(20_000, 1)[:, 0]  # all windows of 336 values are 53 MB
    window_gram(series[:500], 336)
    tracemalloc.start()
    window_gram(series, 336)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # four arrays of 336 x 336 are 3.6 MB, the series is 0.16 MB; a tenth of the windows would be more than the limit
    assert 336**2 * 8 < peak < 5.3e6


# ----------------------------------------------------------------------------------------------- ridge


def ridge_by_stacking(series, history, horizon, penalty, anchor, intercept, period=None, stride=1):
    """Ridge as least squares on rows added for the penalty: another algorithm (SVD) on explicit windows."""
    x, y = all_windows(series, history, horizon, stride)
    if anchor != "none":
        base = x[:, -1:] if anchor == "last" else x.mean(1, keepdims=True)
        x, y = x - base, y - base
    prior = np.zeros((horizon, history))
    if period:
        for step in range(horizon):
            places = [i for i in range(history) if (history + step - i) % period == 0]
            prior[step, places] = 1 / len(places)
    y = y - x @ prior.T
    mean_x, mean_y = (x.mean(0), y.mean(0)) if intercept else (np.zeros(history), np.zeros(horizon))
    rows = np.concatenate([x - mean_x, math.sqrt(penalty) * np.eye(history)])
    answer = np.linalg.lstsq(rows, np.concatenate([y - mean_y, np.zeros((history, horizon))]), rcond=None)[0].T
    return answer + prior, mean_y - answer @ mean_x


@pytest.mark.parametrize("period", [None, 5])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("anchor", ["last", "mean", "none"])
def test_ridge_equals_least_squares_on_explicit_windows(anchor, intercept, period):
    series = [walks(300, 2), walks(80, 1, seed=5)[:, 0]]
    series[0][120, 0] = np.nan
    for stride in (1, 4):
        model = RidgeNLinear(20, 7, penalty=3.0, anchor=anchor, intercept=intercept, period=period)
        assert model.fit(series, stride=stride) is model
        if stride == 1:
            x, y = all_windows(series, 20, 7)
            assert model.num_windows == len(x)
            error = model.predict(x) - y
            assert model.mse(series) == pytest.approx(np.square(error).mean(), rel=1e-9)
            assert score_windows(model.predict, series, 20, 7).mse == pytest.approx(np.square(error).mean(), rel=1e-12)
        whole = [series[0][:, 1], series[1]]  # behind a gap strides begin anew, which the helper does not know
        model.fit(whole, stride=stride)
        weight, bias = ridge_by_stacking(whole, 20, 7, 3.0, anchor, intercept, period, stride)
        np.testing.assert_allclose(model.weight, weight, rtol=0, atol=1e-8)
        np.testing.assert_allclose(model.bias, bias, rtol=0, atol=1e-8)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("intercept", [False, True])
def test_balanced_ridge_is_least_squares_with_a_weight_for_every_block(intercept, stride):
    calm, wild = walks(150, 1, seed=1)[:, 0], 5 * walks(90, 1, seed=2)[:, 0]
    history, horizon, block = 12, 5, 30
    model = RidgeNLinear(history, horizon, 2.0, balance=0.5, block=block, intercept=intercept)
    model.fit([calm, wild], stride=stride)
    # every window belongs to one block, counted in windows from the start of its series
    plain, _ = ridge_by_stacking([calm, wild], history, horizon, 2.0, "last", False, stride=stride)
    groups = []
    for series in (calm, wild):
        x, y = all_windows(series, history, horizon)
        x, y = (x - x[:, -1:])[::stride], (y - x[:, -1:])[::stride]
        first = np.arange(len(x)) * stride // (block // stride * stride)
        groups += [(x[first == g], y[first == g]) for g in np.unique(first)]
    assert len(groups) > 6 and sum(len(x) for x, _ in groups) == model.num_windows
    errors = np.array([np.square(y - x @ plain.T).mean() for x, y in groups])
    counts = np.array([len(x) for x, _ in groups])
    share = (errors + 0.01 * np.average(errors, weights=counts)) ** -0.5
    share /= np.average(share, weights=counts)
    weight = np.repeat(share, counts)[:, None]
    x, y = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    middle_x = (weight * x).sum(0) / len(x) if intercept else np.zeros(history)
    middle_y = (weight * y).sum(0) / len(x) if intercept else np.zeros(horizon)
    left = (x * weight).T @ x - len(x) * np.outer(middle_x, middle_x) + 2.0 * np.eye(history)
    right = (x * weight).T @ y - len(x) * np.outer(middle_x, middle_y)
    expected = np.linalg.solve(left, right).T
    np.testing.assert_allclose(model.weight, expected, rtol=0, atol=1e-9)  # float64, sums in another order
    np.testing.assert_allclose(model.bias, middle_y - expected @ middle_x, rtol=0, atol=1e-9)


def test_balance_listens_less_to_the_wild_part():
    """Two regimes with opposite rules: plain least squares follows the wild one, the balanced fit the calm one."""
    rng = np.random.default_rng(0)

    def regime(sign, size):
        step = np.zeros(2000)
        for t in range(1, 2000):
            step[t] = sign * 0.8 * step[t - 1] + rng.normal() * size
        return step.cumsum()

    calm, wild = regime(1, 1.0), regime(-1, 6.0)
    scores = [RidgeNLinear(6, 1, 1.0, balance=b, block=200).fit([calm, wild]).mse(calm) for b in (0.0, 0.5, 1.0)]
    assert scores[0] > 1.2 * scores[1] > 1.2 * scores[2]
    assert RidgeNLinear(6, 1, 1.0, balance=0.5).fit(calm).mse(calm) == pytest.approx(
        RidgeNLinear(6, 1, 1.0).fit(calm).mse(calm), rel=0.01
    )  # one even series: nothing to balance


def test_balance_does_not_change_with_the_unit_and_survives_a_stuck_sensor():
    series = walks(300, 2)
    series[:, 1] = 3.0  # never moves
    one = RidgeNLinear(20, 7, 1.0, balance=0.5, block=50).fit(series)
    other = RidgeNLinear(20, 7, 1e6, balance=0.5, block=50).fit(1000 * series + 5)
    np.testing.assert_allclose(one.weight, other.weight, rtol=0, atol=1e-9)
    assert np.isfinite(one.weight).all()


def test_ridge_on_ett_equals_the_normal_equations(scaled):
    """A second, plain program: all windows in memory, solve()."""
    values = scaled["ETTh1"][: 2 * MONTH]
    x, y = all_windows(values, 168, 96)
    x, y = x - x[:, -1:], y - x[:, -1:]
    expected = np.linalg.solve(x.T @ x + 1e3 * np.eye(168), x.T @ y).T
    np.testing.assert_allclose(RidgeNLinear(168, 96).fit(values).weight, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("anchor", ["last", "mean", "none"])
def test_a_high_level_costs_no_digits(anchor):
    series = walks(500)
    options = {"penalty": 3.0, "anchor": anchor, "intercept": anchor == "none"}
    low = RidgeNLinear(20, 7, **options).fit(series)
    # at a level of 1e9 a float64 keeps steps of size 1 to 1e-7; formed from squares of 1e18 nothing would be left
    high = RidgeNLinear(20, 7, **options).fit(series + 1e9)
    assert high.mse(series + 1e9) == pytest.approx(low.mse(series), rel=1e-6)
    np.testing.assert_allclose(high.weight, low.weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(high.predict(series[:20].T + 1e9), low.predict(series[:20].T) + 1e9, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("anchor", "intercept"), [("last", False), ("mean", False), ("none", True)])
def test_ridge_follows_shift_and_scale(anchor, intercept):
    series = walks(500)
    first = RidgeNLinear(20, 7, penalty=3.0, anchor=anchor, intercept=intercept).fit(series)
    # the penalty has squared units of the data
    other = RidgeNLinear(20, 7, penalty=300.0, anchor=anchor, intercept=intercept).fit(10 * series - 7)
    np.testing.assert_allclose(other.weight, first.weight, rtol=0, atol=1e-9)
    history = series[100:120].T
    np.testing.assert_allclose(other.predict(10 * history - 7), 10 * first.predict(history) - 7, rtol=0, atol=1e-8)


def test_extreme_penalties():
    series = walks(500)
    history = series[:48].T
    strong = RidgeNLinear(48, 24, penalty=1e18).fit(series)
    np.testing.assert_allclose(strong.predict(history), repeat_last(history, 24), rtol=0, atol=1e-8)
    assert strong.freedom == pytest.approx(0, abs=1e-8)
    to_mean = RidgeNLinear(48, 24, penalty=1e18, anchor="mean").fit(series)
    np.testing.assert_allclose(to_mean.predict(history), window_mean(history, 24), rtol=0, atol=1e-8)
    for anchor in ("last", "mean", "none"):
        profile = RidgeNLinear(48, 24, penalty=1e18, period=24, anchor=anchor).fit(series)
        np.testing.assert_allclose(profile.predict(history), daily_profile(history, 24), rtol=0, atol=1e-8)
    free = RidgeNLinear(48, 24, penalty=0.0).fit(series)
    assert free.freedom == pytest.approx(47, abs=1e-6)  # the last value less itself is no input
    x, y = all_windows(series, 48, 24)
    x, y = x - x[:, -1:], y - x[:, -1:]
    np.testing.assert_allclose(free.weight, np.linalg.lstsq(x, y, rcond=None)[0].T, rtol=0, atol=1e-8)
    assert free.mse(series) < RidgeNLinear(48, 24, penalty=1e3).fit(series).mse(series) < strong.mse(series)


def test_data_without_rank():
    """One sine spans two directions: least squares of least norm continues it; a constant leaves the prior."""
    wave = 5 + np.sin(2 * np.pi * np.arange(600) / 24)
    model = RidgeNLinear(48, 24, penalty=0.0).fit(wave[:400])
    np.testing.assert_allclose(model.predict(wave[400:448]), wave[448:472], rtol=0, atol=1e-9)
    assert model.freedom == pytest.approx(2, abs=1e-6)
    flat = RidgeNLinear(4, 3, penalty=0.0).fit(np.full(20, 7.0))
    assert flat.predict(np.full(4, 7.0)).tolist() == [7.0] * 3 and flat.mse(np.full(9, 7.0)) == 0.0


def test_penalty_is_chosen_by_validation():
    series, later = walks(300), walks(200, seed=9)
    grid = [0.0, 1.0, 1e2, 1e4, 1e6]
    model = RidgeNLinear(20, 7, penalty=grid, period=5).fit(series, validation=later)
    one_by_one = {p: RidgeNLinear(20, 7, penalty=p, period=5).fit(series) for p in grid}
    x, y = all_windows(later, 20, 7)
    errors = {p: np.square(m.predict(x) - y).mean() for p, m in one_by_one.items()}
    assert list(model.validation_mse) == grid
    assert model.validation_mse == pytest.approx(errors, rel=1e-9)
    assert model.penalty == min(errors, key=errors.get) not in (grid[0], grid[-1])
    np.testing.assert_allclose(model.weight, one_by_one[model.penalty].weight, rtol=0, atol=1e-12)
    assert model.freedom == pytest.approx(one_by_one[model.penalty].freedom)
    assert RidgeNLinear(20, 7).fit(series).validation_mse == {}
    shuffled = RidgeNLinear(20, 7, penalty=grid[::-1], period=5).fit(series, validation=later)
    assert shuffled.penalty == model.penalty and np.array_equal(shuffled.weight, model.weight)


def test_rows_to_use():
    series = walks(500)
    used = RidgeNLinear(20, 7).fit(series, start=100, stop=-50)
    assert np.array_equal(used.weight, RidgeNLinear(20, 7).fit(series[100:450]).weight)
    torch_too = RidgeNLinear(20, 7).fit(torch.from_numpy(series), start=100, stop=-50)
    assert np.array_equal(used.weight, torch_too.weight)


@pytest.mark.parametrize("anchor", ["last", "mean", "none"])
def test_predict_keeps_kind_and_axes(anchor):
    series = walks(500)
    model = RidgeNLinear(20, 7, anchor=anchor, intercept=True).fit(series)
    x = series[:60].T.reshape(3, 3, 20)
    expected = model.predict(x)
    assert expected.shape == (3, 3, 7) and model.predict(x[0, 0]).shape == (7,)
    np.testing.assert_allclose(model.predict(x[1, 2]), expected[1, 2], rtol=0, atol=1e-12)
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):  # float32: 20 terms of size 40
        found = model.predict(torch.from_numpy(x).to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=atol)
    assert model.predict(x.astype(np.float32)).dtype == np.float32
    assert model.predict(np.zeros((0, 20))).shape == (0, 7)


def test_the_layer_is_the_map():
    model = RidgeNLinear(20, 7, intercept=True).fit(walks(500))
    layer = model.linear(torch.float64)
    assert isinstance(layer, nn.Linear) and layer.weight.requires_grad and layer.weight.shape == (7, 20)
    history = torch.from_numpy(walks(20, 5, seed=3).T.copy())
    last = history[:, -1:]
    torch.testing.assert_close(last + layer(history - last), model.predict(history), rtol=0, atol=1e-12)
    assert model.linear().weight.dtype == torch.float32
    with torch.no_grad():
        layer.weight.zero_()
    assert np.abs(model.weight).max() > 0, "the layer is a copy"


@pytest.mark.parametrize("anchor", ["last", "none"])
def test_copies_and_restored_models_forecast_alike(anchor):
    series = walks(500)
    model = RidgeNLinear(20, 7, anchor=anchor, intercept=True).fit(series)
    restored = RidgeNLinear(20, 7, anchor=anchor)
    restored.weight, restored.bias = model.weight, model.bias
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        assert np.array_equal(twin.predict(series[:20].T), model.predict(series[:20].T))
        assert twin.mse(series) == pytest.approx(model.mse(series), rel=1e-9)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: RidgeNLinear(0, 5), ValueError, "history=0; give a whole number"),
        (lambda: RidgeNLinear(5, 0), ValueError, "horizon=0; give a whole number"),
        (lambda: RidgeNLinear(5, 2.0), TypeError, "horizon=2.0 is no whole number"),
        (lambda: RidgeNLinear(5, 5, penalty=-1.0), ValueError, "penalty=-1.0; give a finite number, 0 or more"),
        (lambda: RidgeNLinear(5, 5, penalty=math.nan), ValueError, "penalty=nan"),
        (lambda: RidgeNLinear(5, 5, penalty=[]), ValueError, r"penalty=\[\]"),
        (lambda: RidgeNLinear(5, 5, anchor="median"), ValueError, "anchor='median' is unknown; choose one of"),
        (lambda: RidgeNLinear(5, 5, period=6), ValueError, "period=6 is longer than the history of 5"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(9)), ValueError, r"no window of 5 \+ 5 steps without a missing value"),
        (lambda: RidgeNLinear(5, 5).fit(np.full(99, math.nan)), ValueError, "fill the gaps"),
        (lambda: RidgeNLinear(5, 5).fit([]), ValueError, "the series has no window"),
        (lambda: RidgeNLinear(5, 5, anchor="none").fit([]), ValueError, "the series has no window"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros((2, 3, 40))), ValueError, r"shape \(2, 3, 40\); give \(time,\)"),
        (lambda: RidgeNLinear(5, 5).fit(np.r_[np.zeros(40), np.inf]), ValueError, "series 0 has 1 infinite values"),
        (lambda: RidgeNLinear(5, 5, [1, 2]).fit(np.zeros(40)), ValueError, "2 penalties are given; pass validation"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(40), validation=np.zeros(3)), ValueError, "validation has no window"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(40), stride=0), ValueError, "stride=0"),
        (lambda: RidgeNLinear(5, 5, balance=2), ValueError, r"balance=2; give a number from 0 \(plain least"),
        (lambda: RidgeNLinear(5, 5, balance=math.nan), ValueError, "balance=nan"),
        (lambda: RidgeNLinear(5, 5, balance=0.5, block=0), ValueError, "block=0"),
        (lambda: RidgeNLinear(5, 5).predict(np.zeros(5)), RuntimeError, r"not fitted yet; call fit\(series\) first"),
        (lambda: RidgeNLinear(5, 5).linear(), RuntimeError, "not fitted yet"),
        (lambda: RidgeNLinear(5, 5).mse(np.zeros(40)), RuntimeError, "not fitted yet"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(40)).predict(np.zeros(6)), ValueError, "last axis must hold 5 steps"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(40)).predict([0, math.nan, 0, 0, 0]), ValueError, "lacks 1 values"),
        (lambda: RidgeNLinear(5, 5).fit(np.zeros(40)).predict([0, math.inf, 0, 0, 0]), ValueError, "1 infinite values"),
    ],
)  # fmt: skip
def test_bad_input_of_ridge(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ----------------------------------------------------------------------------------------- one step


def one_step_by_stacking(series, covariates, history, penalty):
    rows, answers = [], []
    for y, known in zip(series, covariates, strict=True):
        for first in range(len(y) - history):
            window = y[first : first + history + 1]
            if not np.isnan(window).any():
                rows.append(np.r_[window[:-1] - window[-2], known[first + history]])
                answers.append(window[-1] - window[-2])
    x, y = np.array(rows), np.array(answers)
    centred, width = x - x.mean(0), x.shape[1]
    rows = np.concatenate([centred, math.sqrt(penalty) * np.eye(width)])
    weight = np.linalg.lstsq(rows, np.r_[y - y.mean(), np.zeros(width)], rcond=None)[0]
    freedom = np.trace(centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(width), centred.T))
    residual = y - y.mean() - centred @ weight
    # the column of the last value less itself is empty, so it adds nothing to the freedom
    return weight, y.mean() - x.mean(0) @ weight, math.sqrt(np.square(residual).sum() / (len(y) - freedom - 1)), len(y)


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_one_step_equals_least_squares_on_explicit_windows(extra):
    draw = np.random.default_rng(1)
    series = [draw.normal(size=300).cumsum(), draw.normal(size=120).cumsum(), np.zeros(6)]
    known = [draw.normal(size=(len(y), extra)) for y in series]
    series[0] += known[0].sum(1)
    series[0][150] = np.nan
    model = ARRidge(10, penalty=2.0).fit(series, known if extra else None)
    weight, bias, sigma, count = one_step_by_stacking(series, known, 10, 2.0)
    np.testing.assert_allclose(np.r_[model.weight, model.covariate_weight], weight, rtol=0, atol=1e-9)
    assert (model.bias, model.sigma) == pytest.approx((bias, sigma), rel=1e-8)
    assert model.num_windows == count
    x, now = np.stack([series[1][:10], series[1][50:60]]), known[1][[10, 60]]
    mean, spread = model.predict(x, now if extra else None)
    expected = x[:, -1] + np.c_[x - x[:, -1:], now] @ weight + bias
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-9)
    assert spread.shape == (2,) and (spread == model.sigma).all()
    as_tensor = model.predict(torch.from_numpy(x), torch.from_numpy(now) if extra else None)
    assert all(isinstance(part, torch.Tensor) for part in as_tensor)
    torch.testing.assert_close(as_tensor[0], torch.from_numpy(mean), rtol=0, atol=1e-12)
    assert np.ndim(model.predict(x[0], now[0] if extra else None)[0]) == 0


def test_one_step_shares_covariates_among_channels():
    series, known = walks(200), np.random.default_rng(2).normal(size=(200, 2))
    together = ARRidge(10).fit(series, known)
    apart = ARRidge(10).fit(list(series.T), [known] * 3)
    np.testing.assert_allclose(together.weight, apart.weight, rtol=0, atol=1e-12)
    assert together.sigma == pytest.approx(apart.sigma, rel=1e-12)


def test_one_step_finds_the_process():
    """An autoregression with a known calendar effect: weights, level and spread come out, and intervals cover."""
    draw = np.random.default_rng(3)
    day = np.sin(2 * np.pi * np.arange(20_000) / 24)[:, None]
    y = np.zeros(20_000)
    for t in range(2, 20_000):
        y[t] = 0.6 * y[t - 1] + 0.3 * y[t - 2] + 2 * day[t, 0] + 1 + 0.5 * draw.normal()
    model = ARRidge(12, penalty=[1e-3, 1.0, 1e6]).fit(
        y[:15_000], day[:15_000], validation=y[15_000:17_500], validation_covariates=day[15_000:17_500]
    )
    assert model.penalty < 1e6
    # 15,000 windows: standard errors below 0.02 for the weights; 2,500 for sigma: 0.5 / sqrt(5000) = 0.007
    levels = model.weight.copy()
    levels[-1] = 1 - model.weight[:-1].sum()  # in terms of the values themselves
    np.testing.assert_allclose(levels[-2:], [0.3, 0.6], rtol=0, atol=0.05)
    np.testing.assert_allclose(levels[:-2], 0, rtol=0, atol=0.05)
    assert model.sigma == pytest.approx(0.5, abs=0.03)
    assert model.sigma**2 == pytest.approx(min(model.validation_mse.values()))
    x, target = all_windows(y[17_500:], 12, 1)
    mean, sigma = model.predict(x, day[17_512:])
    inside = np.abs(target[:, 0] - mean) < 1.6449 * sigma
    assert 0.9 - 0.03 < inside.mean() < 0.9 + 0.03  # 2,488 steps: standard error 0.006


def fitted(extra=0):
    return ARRidge(5).fit(walks(40), np.ones((40, extra)) if extra else None)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ARRidge(0), ValueError, "history=0"),
        (lambda: ARRidge(5, penalty=-1), ValueError, "penalty=-1"),
        (lambda: ARRidge(5, [1, 2]).fit(np.zeros(40)), ValueError, "2 penalties are given; pass validation"),
        (lambda: ARRidge(5).fit(np.zeros(5)), ValueError, r"no window of 5 \+ 1 steps"),
        (lambda: ARRidge(5).fit([]), ValueError, r"no window of 5 \+ 1 steps"),
        (lambda: ARRidge(5).fit(np.zeros(40), np.zeros((39, 2))), ValueError, r"shape \(39, 2\); give \(40, 2\)"),
        (lambda: ARRidge(5).fit(np.zeros(40), np.zeros(40)), ValueError, r"covariates have shape \(40,\)"),
        (lambda: ARRidge(5).fit(np.zeros(40), np.full((40, 1), np.nan)), ValueError, "all finite"),
        (lambda: ARRidge(5).fit([np.zeros(40)] * 2, [np.zeros((40, 1))]), ValueError, "2 series and 1 arrays"),
        (lambda: ARRidge(5).fit([walks(9)] * 2, [np.ones((9, 1)), np.ones((9, 2))]), ValueError, r"give \(9, 1\)"),
        (lambda: ARRidge(5).fit(walks(40), np.zeros((40, 1)), validation=walks(40)), ValueError, "another number"),
        (lambda: ARRidge(5).predict(np.zeros(5)), RuntimeError, "not fitted yet"),
        (lambda: fitted().predict(np.zeros(4)), ValueError, "last axis must hold 5 steps"),
        (lambda: fitted().predict([0, 0, math.nan, 0, 0]), ValueError, "lacks 1 values"),
        (lambda: fitted(2).predict(np.zeros(5)), ValueError, "fitted with 2 covariates"),
        (lambda: fitted().predict(np.zeros(5), np.zeros(1)), ValueError, r"give \(0,\)"),
        (lambda: fitted(1).predict(np.zeros(5), [math.nan]), ValueError, r"give \(1,\)"),
        (lambda: fitted(1).predict(np.zeros((3, 5)), np.ones((2, 1))), ValueError, r"\(3, 1\)"),
        (lambda: ARRidge(30, 1e-9).fit(walks(40)), ValueError, "30 windows for 29 weights leave nothing"),
    ],
)  # fmt: skip
def test_bad_input_of_one_step(call, error, words):
    with pytest.raises(error, match=words):
        call()


# --------------------------------------------------------------------------------------------- DLinear


@pytest.mark.parametrize("kernel", [1, 3, 25, 51])
def test_moving_average_by_definition(kernel):
    x = torch.from_numpy(walks(40).T.copy())
    half = kernel // 2
    expected = torch.stack(
        [sum(x[:, min(max(t + k, 0), 39)] for k in range(-half, half + 1)) / kernel for t in range(40)], dim=1
    )
    torch.testing.assert_close(moving_average(x, kernel), expected, rtol=0, atol=1e-12)
    assert torch.equal(moving_average(x.reshape(3, 1, 40), kernel)[:, 0], moving_average(x, kernel))


@pytest.mark.parametrize("channels", [None, 3])
def test_dlinear_is_one_linear_map(channels):
    model = DLinear(30, 8, num_channels=channels).double()
    assert sum(p.numel() for p in model.parameters()) == (channels or 1) * 2 * (30 * 8 + 8)
    x = torch.from_numpy(walks(30, 12).T.reshape(4, 3, 30))
    out = model(x)
    average = moving_average(torch.eye(30, dtype=torch.float64), 25)  # row i: the answer to a one at step i
    for channel in range(3):
        pick = () if channels is None else (channel,)
        rest, trend = model.seasonal_weight[pick], model.trend_weight[pick]
        weight = rest + (trend - rest) @ average.T
        bias = model.seasonal_bias[pick] + model.trend_bias[pick]
        torch.testing.assert_close(out[:, channel], x[:, channel] @ weight.T + bias, rtol=0, atol=1e-12)
    if channels is None:
        torch.testing.assert_close(model(x[1, 2]), out[1, 2], rtol=0, atol=1e-12)


def test_dlinear_starts_as_linear_layers_do():
    model = DLinear(400, 50)
    for parameter in model.parameters():
        assert parameter.abs().max() <= 1 / 20
    # uniform on +-1/20: standard deviation 1/20/sqrt(3); 20,000 draws leave half a percent
    assert float(model.trend_weight.detach().std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.03)


def test_dlinear_learns():
    wave = torch.sin(2 * torch.pi * torch.arange(600) / 24) + torch.arange(600) / 300
    windows = wave.unfold(0, 72, 1)
    model = DLinear(48, 24)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (model(windows[:, :48]) - windows[:, 48:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert 0 < losses[-1] < losses[0] / 100
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DLinear(48, 24, kernel=4), "kernel=4 is even.*use 5"),
        (lambda: DLinear(48, 0), "horizon=0"),
        (lambda: DLinear(48, 24, num_channels=0), "num_channels=0"),
        (lambda: DLinear(48, 24)(torch.zeros(2, 47)), r"\(2, 47\); its last axis must hold 48 steps"),
        (lambda: DLinear(48, 24, num_channels=3)(torch.zeros(2, 48)), "its last axis but one must hold 3"),
        (lambda: DLinear(48, 24, num_channels=3)(torch.zeros(48)), "its last axis but one must hold 3"),
        (lambda: moving_average(torch.zeros(3), 0), "kernel=0"),
    ],
)
def test_bad_input_of_dlinear(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------ scores


def test_scores_by_definition():
    series = walks(2500, 2)
    series[700, 0] = np.nan
    for stride in (1, 7):
        found = score_windows(lambda x: repeat_last(x, 4), [series[:, 1], series[:30]], 10, 4, stride=stride)
        x, y = all_windows([series[:, 1], series[:30]], 10, 4, stride)
        error = repeat_last(x, 4) - y
        assert found.num_windows == len(x)
        np.testing.assert_allclose(found[:2], (np.square(error).mean(), np.abs(error).mean()), rtol=1e-12)
    gap = score_windows(lambda x: repeat_last(x, 4), series, 10, 4)
    assert gap.num_windows == 2 * (2500 - 13) - 14, "the 14 windows that touch the gap are left out"
    as_tensor = score_windows(lambda x: repeat_last(torch.from_numpy(x), 4), series, 10, 4)
    assert as_tensor == gap


def test_a_forecast_cannot_change_the_target():
    def cheat(x):
        x[...] = 0
        return x[:, :4]

    series = walks(60, 1)
    honest = score_windows(lambda x: np.zeros((len(x), 4)), series, 10, 4)
    assert score_windows(cheat, series, 10, 4) == honest


def test_the_best_floor_is_found():
    daily = np.tile(np.arange(24.0), 20) + 0.1 * np.random.default_rng(0).normal(size=480)
    floor = best_naive(daily, 72, 24, periods=(24, 30))
    assert list(floor.scores)[:2] == ["profile 24", "seasonal naive 24"] and floor.name == "profile 24"
    seasonal = {f"{kind} {period}" for kind in ("profile", "seasonal naive") for period in (24, 30)}
    assert set(floor.scores) == {"repeat last", "window mean"} | seasonal
    assert np.array_equal(floor.forecast(daily[-72:]), daily_profile(daily[-72:], 24))
    assert floor.scores["repeat last"] == score_windows(lambda x: repeat_last(x, 24), daily, 72, 24)
    walk = walks(2000, 1)
    assert best_naive(walk, 72, 24).name == "repeat last"
    assert best_naive(np.random.default_rng(0).normal(size=2000), 72, 24, periods=()).name == "window mean"
    model = RidgeNLinear(72, 24, penalty=1.0).fit(daily)
    assert best_naive(daily, 72, 24, others={"ridge": model.predict}).name == "ridge"


def test_the_metric_decides():
    """Rare large errors cost the mean square more than the mean absolute error."""
    series = np.zeros(400)
    series[::40] = 10.0  # the mean is better in squares, the usual value in absolutes
    squares, absolutes = (best_naive(series, 39, 40, periods=(), metric=m) for m in ("mse", "mae"))
    assert squares.name == "window mean" and absolutes.name == "repeat last"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: score_windows(lambda x: x, np.zeros(40), 5, 3), r"shape \(33, 5\); expected \(33, 3\)"),
        (lambda: score_windows(lambda x: x, np.zeros(7), 5, 3), r"the series has no window of 5 \+ 3 steps"),
        (lambda: score_windows(lambda x: x, np.zeros(40), 5, 0), "horizon=0"),
        (lambda: best_naive(np.zeros(400), 20, 3), "period=24 is longer than the history of 20"),
        (lambda: best_naive(np.zeros(400), 20, 3, metric="mape"), "metric='mape' is unknown; choose mse or mae"),
    ],
)
def test_bad_input_of_scores(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.gpu
def test_on_a_gpu():
    series, x = walks(500), walks(336, 4, seed=4).T.copy()
    on_gpu = torch.from_numpy(x).cuda()
    for forecast in NAIVE.values():
        found = forecast(on_gpu, 50)
        assert found.is_cuda
        np.testing.assert_allclose(found.cpu().numpy(), forecast(x, 50), rtol=0, atol=1e-12)
    model, one_step = RidgeNLinear(336, 50, intercept=True).fit(series), ARRidge(336).fit(series)
    np.testing.assert_allclose(model.predict(on_gpu).cpu().numpy(), model.predict(x), rtol=0, atol=1e-10)
    mean, sigma = one_step.predict(on_gpu)
    assert sigma.is_cuda
    np.testing.assert_allclose(mean.cpu().numpy(), one_step.predict(x)[0], rtol=0, atol=1e-10)
    assert np.array_equal(window_gram(torch.from_numpy(series).cuda(), 9).gram, window_gram(series, 9).gram)


def test_every_public_name_is_tested_here():
    tested = {name for name in globals() if name in baselines.__all__}
    assert set(baselines.__all__) - tested == {"WindowSums", "Score", "Floor"}  # what functions return
