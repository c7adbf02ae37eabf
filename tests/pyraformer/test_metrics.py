"""Metrics against the official numbers, definitions written out here and scipy; intervals against their theorem."""

import itertools
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, stats

from oral4.pyraformer import metrics as m

LOSSES = np.load(Path(__file__).parents[1] / "goldens/pyraformer/losses.npz")
POINT = [m.mse, m.rmse, m.mae, m.nrmse, m.nd, m.mape, m.mspe, m.smape]
numbers = st.floats(-1e3, 1e3, allow_nan=False).map(lambda x: round(x, 6))
positive = st.floats(0.01, 1e3, allow_nan=False)


def pairs(elements=numbers):
    shape = hnp.array_shapes(max_dims=3, max_side=5)
    return shape.flatmap(
        lambda s: st.tuples(hnp.arrays(float, s, elements=elements), hnp.arrays(float, s, elements=numbers))
    )


# ---- point forecasts ---------------------------------------------------------------------------------------------


def test_official_numbers():
    found = [f(LOSSES["true"], LOSSES["pred"]) for f in (m.mae, m.mse, m.rmse, m.mape, m.mspe)]
    # float64; the official means may add in another order
    np.testing.assert_allclose(found, LOSSES["metric_mae_mse_rmse_mape_mspe"], rtol=1e-12)


@given(pairs(positive))
@settings(deadline=None)
def test_normalised_errors_are_sums_over_everything(pair):
    """single_step_main.py: sqrt(sum e^2 / n) / (sum y / n) and sum |e| / sum y, for positive data."""
    y, forecast = pair
    error, n = forecast - y, y.size
    assert m.nrmse(y, forecast) == pytest.approx(math.sqrt((error**2).sum() / n) / (y.sum() / n), rel=1e-12)
    assert m.nd(y, forecast) == pytest.approx(np.abs(error).sum() / y.sum(), rel=1e-12)


def test_the_whole_set_is_not_the_mean_of_its_parts():
    y, forecast = np.array([[1.0, 1.0], [100.0, 100.0]]), np.array([[2.0, 2.0], [100.0, 100.0]])
    assert m.nd(y, forecast) == pytest.approx(2 / 202)
    assert np.mean([m.nd(*row) for row in zip(y, forecast, strict=True)]) == pytest.approx(0.5)


def test_negative_data_keep_a_positive_measure():
    y = np.array([-2.0, -4.0])
    assert m.nd(y, y + 1) == pytest.approx(2 / 6) and m.nrmse(y, y + 1) == pytest.approx(1 / 3)


@given(pairs(), st.floats(0.1, 100))
@settings(deadline=None)
def test_which_metrics_have_a_unit(pair, factor):
    y, forecast = pair
    assert m.mse(y * factor, forecast * factor) == pytest.approx(factor**2 * m.mse(y, forecast), rel=1e-9, abs=1e-12)
    assert m.mae(y * factor, forecast * factor) == pytest.approx(factor * m.mae(y, forecast), rel=1e-9, abs=1e-12)
    assert m.smape(y * factor, forecast * factor) == pytest.approx(m.smape(y, forecast), rel=1e-9, abs=1e-12)
    assert 0 <= m.smape(y, forecast) <= 2 + 1e-12
    assert m.rmse(y, forecast) >= m.mae(y, forecast) * (1 - 1e-12)
    if np.abs(y).min() > 1e-3:
        for metric in (m.nrmse, m.nd, m.mape, m.mspe):
            assert metric(y * factor, forecast * factor) == pytest.approx(metric(y, forecast), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("metric", POINT)
def test_any_kind_of_array(metric):
    y = np.array([[1.0, 2.0, 4.0], [8.0, 1.0, 2.0]])
    forecast = np.array([[2.0, 2.0, 2.0], [4.0, 4.0, 1.0]])
    expected = metric(y, forecast)
    assert isinstance(expected, float) and metric(y, y) == 0
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        made = [torch.tensor(part).to(kind) for part in (y, forecast)]
        assert metric(*made) == expected  # powers of two are exact in every type
    leaf = torch.tensor(forecast, requires_grad=True)
    assert metric(y.tolist(), leaf) == expected
    assert metric(y.astype(int).T, leaf.T) == pytest.approx(expected, rel=1e-12)  # added in another order


@pytest.mark.parametrize("metric", POINT)
def test_where_is_leaving_out(metric):
    y, forecast = np.array([1.0, np.nan, 3.0, 5.0]), np.array([2.0, 1.0, np.inf, 4.0])
    mask = np.array([True, False, False, True])
    expected = metric(y[mask], forecast[mask])
    assert metric(y, forecast, where=mask) == metric(y, forecast, where=torch.tensor(mask)) == expected
    rows = np.stack([y, y + 1])
    assert metric(rows, rows, where=mask) == 0  # broadcast


@pytest.mark.parametrize("metric", POINT)
def test_bad_input(metric):
    with pytest.raises(ValueError, match=re.escape("forecast has shape (2,), y has (2, 1)")):
        metric(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match="forecast holds 2 NaN and 1 infinite of 4 values"):
        metric(np.ones(4), [np.nan, 1.0, np.nan, -np.inf])
    with pytest.raises(ValueError, match=re.escape("y holds 1 NaN and 0 infinite of 2 values") + ".*where=np.isfinite"):
        metric([np.nan, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match=re.escape("no value to compare: y has shape (0, 3)")):
        metric(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(ValueError, match="where is nowhere True"):
        metric(np.ones(2), np.ones(2), where=np.zeros(2, bool))
    with pytest.raises(ValueError, match=re.escape("where has shape (3,), y has (2,)")):
        metric(np.ones(2), np.ones(2), where=np.ones(3, bool))
    with pytest.raises(TypeError, match="where holds float64"):
        metric(np.ones(2), np.ones(2), where=np.ones(2))
    for wrong in (np.ones(2, complex), torch.ones(2, dtype=torch.complex64), np.array(["1", "2"])):
        with pytest.raises(TypeError, match="real numbers"):
            metric(wrong, np.ones(2))


@pytest.mark.parametrize(("metric", "named"), [(m.mape, "mase"), (m.mspe, "smape"), (m.nd, "mae"), (m.nrmse, "rmse")])
def test_zero_denominators_warn(metric, named):
    y = np.array([0.0, 0.0, 1.0]) if metric in (m.mape, m.mspe) else np.zeros(3)
    with pytest.warns(RuntimeWarning, match=named):
        assert math.isnan(metric(y, np.ones(3)))
    with pytest.warns(RuntimeWarning, match="are 0" if metric in (m.mape, m.mspe) else "every y is 0"):
        metric(y, y)  # the official mape is nan here without a word
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert m.smape(y, y) == 0 and m.smape(np.zeros(1), np.ones(1)) == 2


def test_mase_of_the_naive_forecast_on_its_history_is_one():
    x = np.random.default_rng(0).normal(size=(3, 50)).cumsum(axis=1)
    for season in (1, 7):
        assert m.mase(x[:, season:], x[:, :-season], x, season) == pytest.approx(1, rel=1e-12)
        assert m.mase(x[0, season:], x[0, :-season], 2 * x[0], season) == pytest.approx(0.5, rel=1e-12)


def test_mase_scales_each_series_by_itself():
    history = np.array([[1.0, 2.0, 3.0], [10.0, 30.0, 50.0]])
    assert m.mase([[4.0], [70.0]], [[3.0], [50.0]], history) == 1.0
    assert m.mase([[4.0], [70.0]], [[3.0], [30.0]], history) == pytest.approx((1 + 2) / 2)
    assert m.mase([[4.0], [70.0]], [[3.0], [30.0]], history, where=[[False], [True]]) == 2.0


def test_mase_bad_input():
    with pytest.raises(ValueError, match="history of series 1 repeats exactly every 2 steps"):
        m.mase(np.ones((2, 3)), np.ones((2, 3)), [[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 1.0, 2.0]], season=2)
    with pytest.raises(ValueError, match="the history repeats exactly every 1 steps"):
        m.mase(np.ones(3), np.ones(3), np.ones(5))
    with pytest.raises(ValueError, match="insample has 24 steps; season=24 needs at least 25"):
        m.mase(np.ones(3), np.ones(3), np.arange(24), season=24)
    with pytest.raises(ValueError, match=re.escape("insample has shape (3, 9), y has (2, 4)")):
        m.mase(np.ones((2, 4)), np.ones((2, 4)), np.ones((3, 9)))
    with pytest.raises(ValueError, match="insample holds 1 NaN"):
        m.mase(np.ones(2), np.ones(2), [1.0, np.nan, 2.0])
    for season in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"season={season}"):
            m.mase(np.ones(2), np.ones(2), np.arange(9), season=season)


# ---- quantiles ---------------------------------------------------------------------------------------------------


def pinball_by_hand(y, q, tau):
    return tau * (y - q) if y >= q else (1 - tau) * (q - y)


@given(hnp.arrays(float, (4,), elements=numbers), hnp.arrays(float, (4, 3), elements=numbers))
@settings(deadline=None)
def test_pinball_by_hand(y, q):
    levels = [0.1, 0.5, 0.8]
    by_hand = np.array(
        [[pinball_by_hand(a, b, t) for b, t in zip(row, levels, strict=True)] for a, row in zip(y, q, strict=True)]
    )
    assert m.pinball(y, q, levels) == pytest.approx(by_hand.mean(), rel=1e-9, abs=1e-12)
    assert m.pinball(y, q[:, 1], 0.5) == pytest.approx(m.mae(y, q[:, 1]) / 2, rel=1e-12)
    if np.abs(y).sum() > 0:
        expected = np.mean(2 * by_hand.sum(axis=0) / np.abs(y).sum())
        assert m.weighted_quantile_loss(y, q, levels) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.5, 0.9])
def test_the_quantile_minimises_pinball(tau):
    y = np.random.default_rng(0).gamma(2.0, size=2001)
    best = np.quantile(y, tau)
    losses = {shift: m.pinball(y, np.full_like(y, best + shift), tau) for shift in (-0.1, -0.01, 0.0, 0.01, 0.1)}
    assert min(losses, key=losses.get) == 0.0


def test_quantiles_bad_input():
    for levels in ([0.5, 0.5], [0.9, 0.1], [0.0, 0.5], [0.5, 1.0], [], [math.nan]):
        with pytest.raises(ValueError, match="levels="):
            m.pinball(np.ones(3), np.ones((3, len(levels))), levels)
    with pytest.raises(ValueError, match=re.escape("quantiles has shape (3, 2) for 3 levels; give (..., 3)")):
        m.pinball(np.ones(3), np.ones((3, 2)), [0.1, 0.5, 0.9])
    with pytest.raises(ValueError, match=re.escape("quantiles has shape (4, 2), y has (3,)")):
        m.pinball(np.ones(3), np.ones((4, 2)), [0.1, 0.9])
    with pytest.raises(ValueError, match="quantiles holds 2 NaN"):
        m.crps_quantiles(np.ones(2), np.full((2, 1), np.nan), [0.5])
    with pytest.warns(RuntimeWarning, match="every y is 0"):
        assert math.isnan(m.weighted_quantile_loss(np.zeros(2), np.ones((2, 1)), [0.5]))


# ---- CRPS --------------------------------------------------------------------------------------------------------


def crps_by_integral(cdf, y):
    """The definition: the integral of (F(x) - 1{x >= y})^2."""
    below = integrate.quad(lambda x: cdf(x) ** 2, -np.inf, y, epsabs=1e-11, limit=400)[0]
    return below + integrate.quad(lambda x: (1 - cdf(x)) ** 2, y, np.inf, epsabs=1e-11, limit=400)[0]


@pytest.mark.parametrize(("y", "mean", "sigma"), [(0.0, 0.0, 1.0), (3.0, 1.0, 0.5), (-2.0, 1.0, 4.0), (40.0, 0.0, 1.0)])
def test_crps_gaussian_is_the_integral(y, mean, sigma):
    expected = crps_by_integral(stats.norm(mean, sigma).cdf, y)
    assert m.crps_gaussian([y], [mean], [sigma]) == pytest.approx(expected, abs=1e-8)  # what quad promises


def test_crps_of_a_point_is_the_absolute_error():
    y, mean = np.array([1.0, 5.0]), np.array([2.0, 5.0])
    assert m.crps_gaussian(y, mean, np.zeros(2)) == m.mae(y, mean) == m.crps_sample(y, mean[:, None], fair=False)
    assert m.crps_gaussian(y, mean, np.full(2, 1e-300)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="sigma is negative at 1 of 2 places, the least -3"):
        m.crps_gaussian(y, mean, [1.0, -3.0])


@pytest.mark.parametrize(
    ("y", "df", "loc", "scale"), [(0.0, 5, 0.0, 1.0), (2.0, 1.5, 1.0, 3.0), (-4.0, 3, 0.0, 0.5), (1.0, 50, 0.0, 1.0)]
)
def test_crps_student_t_is_the_integral(y, df, loc, scale):
    expected = crps_by_integral(stats.t(df, loc, scale).cdf, y)
    assert m.crps_student_t([y], [df], [loc], [scale]) == pytest.approx(expected, rel=1e-7)


def test_crps_student_t_becomes_the_gaussian():
    y, zero, one = np.linspace(-5, 5, 21), np.zeros(21), np.ones(21)
    for df in (1e6, 1e9, 1e15):
        difference = abs(m.crps_student_t(y, np.full(21, df), zero, one) - m.crps_gaussian(y, zero, one))
        assert difference < 2 / df + 1e-12  # the next term is of order 1 / df
    with pytest.raises(ValueError, match=r"df is 1 and scale 1 at least; give df > 1"):
        m.crps_student_t([0.0], [1.0], [0.0], [1.0])
    with pytest.raises(ValueError, match="scale 0 at least"):
        m.crps_student_t([0.0], [3.0], [0.0], [0.0])


@given(hnp.arrays(float, (3, 6), elements=numbers), hnp.arrays(float, (3,), elements=numbers))
@settings(deadline=None)
def test_crps_sample_by_its_double_sum(draws, y):
    for fair, pairs in ((True, 30), (False, 36)):
        by_hand = [
            np.abs(row - a).mean() - sum(abs(p - q) for p, q in itertools.product(row, row)) / (2 * pairs)
            for row, a in zip(draws, y, strict=True)
        ]
        assert m.crps_sample(y, draws, fair=fair) == pytest.approx(np.mean(by_hand), rel=1e-9, abs=1e-9)


def test_the_fair_score_does_not_depend_on_the_number_of_draws():
    generator = np.random.default_rng(0)
    y = generator.normal(size=40_000)
    truth = 1 / math.sqrt(math.pi)  # of a standard normal forecast of standard normal values
    for count in (2, 5, 20):
        draws = generator.normal(size=(y.size, count))
        # a score scatters by about 1; four standard errors of 40,000 of them
        assert m.crps_sample(y, draws) == pytest.approx(truth, abs=4 / math.sqrt(y.size))
        assert m.crps_sample(y, draws, fair=False) == pytest.approx(truth * (1 + 1 / count), abs=4 / math.sqrt(y.size))
    with pytest.raises(ValueError, match="1 draws a value; the fair score needs 2 or more"):
        m.crps_sample(y, y[:, None])


@given(hnp.arrays(float, (2, 5), elements=numbers), hnp.arrays(float, (2,), elements=numbers))
@settings(deadline=None)
def test_crps_of_midpoint_quantiles_is_that_of_equally_likely_values(values, y):
    values = np.sort(values, axis=1)
    levels = (np.arange(5) + 0.5) / 5
    assert m.crps_quantiles(y, values, levels) == pytest.approx(
        m.crps_sample(y, values, fair=False), rel=1e-9, abs=1e-9
    )


def test_uneven_levels_stand_for_the_levels_nearest_to_them():
    """Levels 0.1, 0.2, 0.9 own [0, 0.15], [0.15, 0.55] and [0.55, 1]."""
    losses = [pinball_by_hand(3.0, q, t) for q, t in zip([1.0, 2.0, 7.0], [0.1, 0.2, 0.9], strict=True)]
    expected = 2 * np.dot(losses, [0.15, 0.4, 0.45])
    assert m.crps_quantiles([3.0], [[1.0, 2.0, 7.0]], [0.1, 0.2, 0.9]) == pytest.approx(expected, rel=1e-12)
    assert m.crps_quantiles([3.0], [1.0], 0.3) == pytest.approx(2 * pinball_by_hand(3.0, 1.0, 0.3), rel=1e-12)


def test_crps_of_many_quantiles_is_the_closed_form():
    y = np.linspace(-3, 3, 13)
    levels = (np.arange(2000) + 0.5) / 2000
    quantiles = np.tile(stats.norm.ppf(levels), (13, 1))
    # the midpoint rule errs by about the square of the step over the density at the ends
    assert m.crps_quantiles(y, quantiles, levels) == pytest.approx(
        m.crps_gaussian(y, np.zeros(13), np.ones(13)), abs=1e-5
    )


# ---- Student's t -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [0.5, 1.0, 2.0, 3.7, 30.0, 999.0, 1001.0, 1e5, 1e12])
def test_student_t_cdf_is_scipys(df):
    t = np.concatenate([-np.logspace(-6, 1, 60), [0.0], np.logspace(-6, 1, 60), [30.0, -30.0]])
    found = m.student_t_cdf(torch.from_numpy(t), df).numpy()
    expected = stats.t.cdf(t, df)
    seen = expected > 1e-30
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-10)  # the promise of the docstring
    assert found[60] == 0.5


def test_student_t_cdf_of_tensors():
    t = torch.tensor([[-1.0], [2.0]], requires_grad=True)
    found = m.student_t_cdf(t, torch.tensor([1.0, 4.0]))
    assert found.dtype == torch.float32 and not found.requires_grad
    np.testing.assert_allclose(found, stats.t.cdf(t.detach(), [1.0, 4.0]), rtol=1e-6)  # rounded to float32
    assert m.student_t_cdf(torch.tensor([-math.inf, math.inf]), 3.0).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="df is 0 at least"):
        m.student_t_cdf(t, 0.0)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_student_t_log_density(kind):
    z, df = torch.meshgrid(torch.linspace(-8, 8, 33), torch.tensor([1.0, 2.5, 10.0, 1e3, 1e6, 1e12]), indexing="ij")
    found = m.student_t_log_density(z.to(kind), df.to(kind))
    # in float32 the last term is a product of df and a small logarithm that was rounded once
    tolerance = 1e-9 if kind == torch.float64 else 1e-5
    np.testing.assert_allclose(found, stats.t.logpdf(z.double(), df.double()), rtol=tolerance, atol=tolerance)
    extreme = torch.tensor([1e30, -1e30, 0.0], dtype=kind, requires_grad=True)
    freedom = torch.tensor([1.0, 50.0, 1e30], dtype=kind, requires_grad=True)
    gradients = torch.autograd.grad(m.student_t_log_density(extreme, freedom).sum(), (extreme, freedom))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


# ---- intervals and calibration -----------------------------------------------------------------------------------


def test_interval_numbers():
    y, low, high = [1.0, 2.0, 3.0], [1.0, 3.0, -np.inf], [1.0, 5.0, np.inf]
    assert m.coverage(y, low, high) == pytest.approx(2 / 3)  # both ends belong to the interval
    assert m.interval_width(low[:2], high[:2]) == 1.0 and m.interval_width(low, high) == math.inf
    assert m.interval_score([4.0, 6.0, 1.0], [2.0] * 3, [5.0] * 3, 0.9) == pytest.approx(3 + (0 + 20 + 20) / 3)
    assert m.coverage([1.0, np.nan], [0.0, 0.0], [2.0, 2.0], where=[True, False]) == 1.0
    for metric in (m.coverage, lambda *a: m.interval_score(*a, 0.9), lambda y, low, high: m.interval_width(low, high)):
        with pytest.raises(ValueError, match="low lies above high at 1 of 2 places"):
            metric([0.0, 0.0], [0.0, 2.0], [1.0, 1.0])
        with pytest.raises(ValueError, match="low holds 1 NaN"):
            metric([0.0, 0.0], [0.0, np.nan], [1.0, 1.0])
        with pytest.raises(ValueError, match=re.escape("high has shape (3,), y has (2,)")):
            metric([0.0, 0.0], [0.0, 0.0], [1.0, 1.0, 1.0])


def test_the_right_quantiles_minimise_the_interval_score():
    y = np.random.default_rng(0).normal(size=20_001)
    ends = np.quantile(y, [0.1, 0.9])

    def score(shift_low, shift_high):
        return m.interval_score(y, np.full_like(y, ends[0] + shift_low), np.full_like(y, ends[1] + shift_high), 0.8)

    others = [score(a, b) for a in (-0.1, 0, 0.1) for b in (-0.1, 0, 0.1) if (a, b) != (0, 0)]
    assert score(0, 0) < min(others)


def test_calibrated_forecasts_look_calibrated():
    generator = np.random.default_rng(0)
    y, levels = generator.normal(size=(50, 200)), np.array([0.1, 0.25, 0.5, 0.9])
    quantiles = np.broadcast_to(stats.norm.ppf(levels), (50, 200, 4))
    # four standard errors of 10,000 coin tosses are 0.02
    np.testing.assert_allclose(m.reliability(y, quantiles, levels), levels, atol=0.02)
    shares = m.pit_histogram(stats.norm.cdf(y), bins=5)
    np.testing.assert_allclose(shares, 0.2, atol=0.02)
    assert shares.sum() == pytest.approx(1)
    narrow = m.pit_histogram(stats.norm.cdf(2 * y), bins=5)
    assert narrow[0] > 0.3 and narrow[-1] > 0.3 and narrow[2] < 0.15  # the U of a forecast that is too sure
    assert m.pit_histogram([0.0, 1.0], bins=1).tolist() == [1.0]
    assert m.pit_histogram([0.6, 0.7, 0.4], bins=2).tolist() == [1 / 3, 2 / 3]  # the halves of [0, 1]
    assert m.reliability([1.0, 2.0], [[1.0], [1.0]], [0.5]).tolist() == [0.5]  # at the quantile counts as below
    with pytest.raises(ValueError, match=r"pit runs from -1 to 0\.5"):
        m.pit_histogram([-1.0, 0.5])
    with pytest.raises(ValueError, match="bins=0"):
        m.pit_histogram([0.5], bins=0)


# ---- conformal ---------------------------------------------------------------------------------------------------

levels = st.sampled_from([0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99]) | st.floats(0.01, 0.99)


@given(st.data(), levels)
@settings(max_examples=150, deadline=None)
def test_the_theorem(data, level):
    """If any of n + 1 scores is equally likely to be the new one, the bound from the others holds with the promise."""
    count = data.draw(st.integers(m._needed(level), max(m._needed(level), 40)))
    scores = np.array(data.draw(st.lists(numbers, min_size=count + 1, max_size=count + 1)))
    kept = np.mean([scores[i] <= m.split_conformal(np.delete(scores, i), level) for i in range(count + 1)])
    assert kept >= level - 1e-8
    if len(set(scores.tolist())) == len(scores):
        assert kept < level + 1 / (count + 1) + 1e-8


@pytest.mark.parametrize("level", [0.01, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_too_few_scores_say_how_many_are_needed(level):
    needed = math.ceil(round(level / (1 - level), 9))
    assert m._needed(level) == needed
    assert m.split_conformal(np.arange(needed), level) == needed - 1  # the largest one
    if needed > 1:
        with pytest.raises(ValueError, match=rf"{needed - 1} calibration scores .* {needed} are needed"):
            m.split_conformal(np.arange(needed - 1), level)


def test_ranks_do_not_suffer_from_binary_fractions():
    for count, level, rank in [
        (9, 0.7, 7),
        (99, 0.9, 90),
        (19, 0.95, 19),
        (9, 0.1, 1),
        (99, 0.29, 29),
        (999, 0.58, 580),
    ]:
        assert m.split_conformal(np.arange(1, count + 1)[::-1], level) == rank


def test_split_conformal_columns_and_errors():
    assert m.split_conformal([5.0, 4.0, 6.0], 1e-12) == 4.0  # the least there is
    scores = np.random.default_rng(0).normal(size=(30, 4, 2))
    found = m.split_conformal(scores, 0.9)
    assert found.shape == (4, 2)
    np.testing.assert_array_equal(found, np.sort(scores, axis=0)[27])  # ceil(31 * 0.9) = 28, the 28th smallest
    np.testing.assert_array_equal(found, m.split_conformal(torch.from_numpy(scores), 0.9))
    with pytest.raises(ValueError, match=re.escape("scores has shape (0, 3)")):
        m.split_conformal(np.ones((0, 3)), 0.5)
    with pytest.raises(ValueError, match="scores holds 1 NaN"):
        m.split_conformal([1.0, np.nan], 0.5)
    for level in (0, 1, -0.5, 90, math.nan):
        with pytest.raises(ValueError, match="outside"):
            m.split_conformal([1.0, 2.0], level)


@pytest.mark.parametrize("kind", ["point", "too narrow", "too wide", "scaled", "by series"])
def test_intervals_cover_on_simulated_data(kind):
    generator = np.random.default_rng(1)
    count, steps = 2000, 3
    size = np.exp(generator.normal(size=(2 * count, 1))) if kind == "scaled" else np.ones((2 * count, 1))
    names = np.tile(["calm", "wild"], count)
    if kind == "by series":
        size = np.where(names[:, None] == "calm", 1.0, 10.0)
    y = size * generator.standard_t(3, size=(2 * count, steps)) * np.array([1.0, 2.0, 4.0])
    half = {"too narrow": 0.1, "too wide": 50.0}.get(kind, 0.0)
    low, high = np.full_like(y, -half), np.full_like(y, half)
    options = [{}, {}]
    if kind == "scaled":
        options = [{"scale": size[:count]}, {"scale": size[count:]}]
    if kind == "by series":
        options = [{"series": names[:count]}, {"series": names[count:]}]
    intervals = m.ConformalIntervals(0.8).calibrate(y[:count], low[:count], high[:count], **options[0])
    ends = intervals.apply(low[count:], high[count:], **options[1])
    for step in range(steps):
        # the coverage of 2,000 intervals that 2,000 scores have calibrated scatters by about 0.013
        assert m.coverage(y[count:, step], *(end[:, step] for end in ends)) == pytest.approx(0.8, abs=0.05)
    widths = [m.interval_width(*(end[:, step] for end in ends)) for step in range(steps)]
    assert widths[0] < widths[1] < widths[2]  # each step has its own bound
    if kind == "by series":
        for name in ("calm", "wild"):
            rows = names[count:] == name
            assert m.coverage(y[count:][rows], *(end[rows] for end in ends)) == pytest.approx(0.8, abs=0.05)
        assert intervals.bounds["wild"][0] > 5 * intervals.bounds["calm"][0]


def test_a_point_is_an_interval_of_width_zero():
    y, forecast = np.random.default_rng(0).normal(size=(2, 50, 2))
    intervals = m.ConformalIntervals(0.9).calibrate(y, forecast)
    np.testing.assert_array_equal(intervals.bounds, m.split_conformal(np.abs(y - forecast), 0.9))
    assert intervals.counts == 50
    low, high = intervals.apply(torch.from_numpy(forecast))
    np.testing.assert_allclose((low + high) / 2, forecast, atol=1e-12)
    np.testing.assert_allclose(high - low, 2 * np.broadcast_to(intervals.bounds, forecast.shape), atol=1e-12)


def test_an_interval_that_shrinks_to_nothing_becomes_its_middle():
    intervals = m.ConformalIntervals(0.5).calibrate(np.zeros(3), np.full(3, -10.0), np.full(3, 10.0))
    assert intervals.bounds == -10.0
    low, high = intervals.apply([0.0, -20.0], [4.0, 20.0])
    assert low.tolist() == [2.0, -10.0] and high.tolist() == [2.0, 10.0]


def test_intervals_travel_as_json():
    y = np.random.default_rng(0).normal(size=(20, 2))
    for series in (None, ["a", "b"] * 10, [1, 2] * 10, np.array([1, 2] * 10)):
        before = m.ConformalIntervals(0.8).calibrate(y, np.zeros_like(y), series=series)
        after = m.ConformalIntervals.from_dict(json.loads(json.dumps(before.to_dict())))
        rows = None if series is None else series[:4]
        for one, other in zip(before.apply(y[:4], series=rows), after.apply(y[:4], series=rows), strict=True):
            np.testing.assert_array_equal(one, other)
        assert before.counts == after.counts
    assert m.ConformalIntervals.from_dict(m.ConformalIntervals(0.7).to_dict()).bounds is None


def test_conformal_bad_input():
    y = np.random.default_rng(0).normal(size=(20, 2))
    fitted = m.ConformalIntervals(0.8).calibrate(y, y)
    by_name = m.ConformalIntervals(0.8).calibrate(y, y, series=["a", "b"] * 10)
    with pytest.raises(ValueError, match="not calibrated; call calibrate"):
        m.ConformalIntervals().apply(y)
    with pytest.raises(ValueError, match="level=90 is outside"):
        m.ConformalIntervals(90)
    with pytest.raises(ValueError, match=re.escape("the forecast has shape (20, 3), calibrated were (N, 2)")):
        fitted.apply(np.ones((20, 3)))
    with pytest.raises(ValueError, match=re.escape("the forecast has shape (19, 2), y has (20, 2)")):
        m.ConformalIntervals().calibrate(y, y[:19])
    with pytest.raises(ValueError, match="low lies above high at 40 of 40"):
        m.ConformalIntervals().calibrate(y, y + 1, y)
    with pytest.raises(ValueError, match="high holds 1 NaN"):
        m.ConformalIntervals().calibrate(y, y, np.where(np.arange(40).reshape(20, 2) == 7, np.nan, y))
    with pytest.raises(ValueError, match=r"series 'c': 2 calibration scores .* 4 are needed"):
        m.ConformalIntervals(0.8).calibrate(y, y, series=["a"] * 18 + ["c"] * 2)
    with pytest.raises(ValueError, match="3 names of series for 20 examples"):
        m.ConformalIntervals().calibrate(y, y, series=["a"] * 3)
    with pytest.raises(ValueError, match="series 'z' was not calibrated"):
        by_name.apply(y[:2], series=["a", "z"])
    with pytest.raises(ValueError, match="calibrated for 2 series; pass series="):
        by_name.apply(y)
    with pytest.raises(ValueError, match="leave series out"):
        fitted.apply(y, series=["a"] * 20)
    with pytest.raises(ValueError, match="scale is 0 at least"):
        m.ConformalIntervals().calibrate(y, y, scale=np.zeros((20, 1)))
    with pytest.raises(ValueError, match=re.escape("scale has shape (3,), the forecast has (20, 2)")):
        m.ConformalIntervals().calibrate(y, y, scale=np.ones(3))
    with pytest.raises(ValueError, match="single number"):
        m.ConformalIntervals().calibrate(1.0, 1.0)
    with pytest.raises(ValueError, match="4 are needed"):
        m.ConformalIntervals(0.8).calibrate(y[:3], y[:3])


@given(st.lists(numbers, min_size=1, max_size=120), levels, st.floats(0.001, 0.5), st.none() | st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_the_adaptive_guarantee_holds_for_any_scores(scores, level, rate, window):
    bounds, miss_rates = m.adaptive_conformal(scores, level, rate=rate, window=window)
    missed = np.mean(np.array(scores) > bounds)
    limit = (max(level, 1 - level) + rate) / (rate * len(scores))
    assert abs(missed - (1 - level)) <= limit + 1e-12
    assert ((miss_rates >= -rate) & (miss_rates <= 1 + rate)).all()


def test_adaptive_bounds_use_the_past_only():
    scores = np.random.default_rng(0).normal(size=60)
    bounds, _ = m.adaptive_conformal(scores, 0.8, rate=0.05, window=20)
    for cut in (1, 17, 40):
        later = np.concatenate([scores[:cut], 100 + scores[cut:]])
        np.testing.assert_array_equal(
            m.adaptive_conformal(later, 0.8, rate=0.05, window=20)[0][: cut + 1], bounds[: cut + 1]
        )
    bounds, miss_rates = m.adaptive_conformal(scores, 0.8, rate=1e-12)
    for step in (4, 30, 59):  # with hardly any correction it is split conformal on all scores so far
        assert bounds[step] == m.split_conformal(scores[:step], 1 - round(miss_rates[step], 6))
    windowed, miss_rates = m.adaptive_conformal(scores, 0.8, rate=1e-12, window=10)
    for step in range(11, 60):
        assert windowed[step] == m.split_conformal(scores[step - 10 : step], 1 - round(miss_rates[step], 6))


def test_adaptive_bounds_follow_a_drift():
    scores = np.abs(np.random.default_rng(0).normal(size=4000)) * np.repeat([1.0, 3.0], 2000)
    fixed = np.mean(scores[2000:] <= m.split_conformal(scores[:2000], 0.9))
    bounds, _ = m.adaptive_conformal(scores, 0.9, rate=0.05)
    assert fixed < 0.5  # the promise of the past is broken,
    assert np.mean(scores[2000:] <= bounds[2000:]) == pytest.approx(0.9, abs=0.02)  # and here kept


def test_adaptive_bad_input():
    for scores in ([], [[1.0]], 1.0):
        with pytest.raises(ValueError, match="scores has shape"):
            m.adaptive_conformal(scores, 0.9)
    for rate in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate="):
            m.adaptive_conformal([1.0], 0.9, rate=rate)
    for window in (0, 1.5, True):
        with pytest.raises(ValueError, match="window="):
            m.adaptive_conformal([1.0], 0.9, window=window)
    with pytest.raises(ValueError, match="scores holds 1 NaN"):
        m.adaptive_conformal([1.0, np.nan], 0.9)
