from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # comes with librosa

from oral4.measure.intervals import (
    bootstrap_interval,
    loglog_slope,
    mean_interval,
    median_interval,
    ratio_interval,
    t_quantile,
)

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    # printed tables of Student's t, 97.5 %, three decimals
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantile_is_the_printed_table(degrees, expected):
    assert t_quantile(0.975, degrees) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("probability", [0.001, 0.2, 0.6, 0.9, 0.975, 0.995, 0.9999])
def test_t_quantile_is_scipys(probability):
    for degrees in [*range(1, 40), 100, 1000, 10_001]:
        # both invert a distribution function that is good to about 1e-15; the tails magnify it
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-10)


def test_t_quantile_centre_and_symmetry():
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)
    assert t_quantile(0.1, 7) == -t_quantile(0.9, 7)


def test_t_quantile_approaches_the_normal():
    assert t_quantile(0.975, 20_000) == pytest.approx(1.959964, abs=2e-4)  # the difference is about 2.4 / degrees


@pytest.mark.parametrize(("probability", "degrees"), [(0, 3), (1, 3), (-0.1, 3), (0.9, 0), (0.9, 2.5)])
def test_t_quantile_refuses(probability, degrees):
    with pytest.raises(ValueError, match=r"probability=|degrees="):
        t_quantile(probability, degrees)


def test_mean_interval_is_scipys():
    sample = [3.1, 2.7, 3.6, 2.9]
    low, high = stats.t.interval(0.9, 3, np.mean(sample), stats.sem(sample))
    assert mean_interval(sample, 0.9) == pytest.approx((np.mean(sample), low, high), rel=1e-12)


def test_mean_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(5.0, 2.0, size=(2000, 3))
    intervals = [mean_interval(row) for row in draws]
    covered = np.mean([low <= 5.0 <= high for _, low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.02)  # four standard errors of a share of 2000


@given(VALUES)
def test_mean_interval_holds_the_mean(values):
    mean, low, high = mean_interval(values)
    assert low <= mean <= high
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)


def test_one_value_has_no_interval():
    assert mean_interval([2.5]) == (2.5, None, None)
    assert bootstrap_interval([2.5]) == (2.5, None, None)


def test_equal_values_have_an_interval_of_width_zero():
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1, 0.1)  # exactly: counts must not grow a last digit


@pytest.mark.parametrize("function", [mean_interval, median_interval, bootstrap_interval])
def test_refuses_what_has_no_answer(function):
    with pytest.raises(ValueError, match="at least one"):
        function([])
    with pytest.raises(ValueError, match="value 1 is nan"):
        function([1.0, math.nan])
    with pytest.raises(ValueError, match="level=95"):
        function([1.0, 2.0], level=95)


@pytest.mark.parametrize(("count", "first"), [(6, 1), (7, 1), (8, 1), (9, 2), (10, 2), (20, 6), (50, 18)])
def test_median_interval_is_the_printed_table(count, first):
    """Ranks of the 95 % sign-test interval as tables of nonparametric statistics give them."""
    assert median_interval(range(1, count + 1))[1:] == (first, count + 1 - first)


def test_median_interval_has_none_below_six():
    assert median_interval([5, 1, 4, 2, 3]) == (3, None, None)


def test_median_interval_of_many_values():
    median, low, high = median_interval(range(5000))  # 2^-5000 is 0 in floating point
    assert median == 2499.5
    assert (low, high) == pytest.approx((2499.5 - 69.3, 2499.5 + 69.3), abs=1.5)  # 1.96 sqrt(5000) / 2 = 69.3


def test_median_interval_covers_at_least_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(2000, 9))
    intervals = [median_interval(row) for row in draws]
    covered = np.mean([low <= math.log(2) <= high for _, low, high in intervals])
    assert covered == pytest.approx(0.961, abs=0.018)  # 1 - 2 (1 + 9) / 512, four standard errors


def test_ratio_interval_cancels_what_slows_both():
    slow = np.array([1, 5, 2, 9, 3, 1, 4])
    assert ratio_interval(6 * slow, 2 * slow) == (3, 3, 3)


def test_ratio_interval_refuses():
    with pytest.raises(ValueError, match="2 and 1 runs"):
        ratio_interval([1, 2], [1])
    with pytest.raises(ValueError, match="0 or less"):
        ratio_interval([1, 2], [1, 0])


def test_bootstrap_is_near_student_for_many_normal_values():
    sample = np.random.default_rng(1).normal(size=400)
    # 2000 resamples place an end to about 2 % of the half width; the two methods differ by less
    assert bootstrap_interval(sample) == pytest.approx(mean_interval(sample), abs=0.01)


def test_bootstrap_repeats_with_its_seed():
    sample = np.random.default_rng(1).normal(size=30)
    assert bootstrap_interval(sample, np.median, seed=3) == bootstrap_interval(sample, np.median, seed=3)
    assert bootstrap_interval(sample, seed=3) != bootstrap_interval(sample, seed=4)


def test_bootstrap_refuses_few_resamples():
    with pytest.raises(ValueError, match="resamples=10 "):
        bootstrap_interval([1, 2, 3], resamples=10)


def test_slope_is_scipys():
    x, y = [96, 192, 384, 768], [1.1, 2.0, 4.6, 8.1]
    fit = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, 2) * fit.stderr
    assert loglog_slope(x, y) == pytest.approx((fit.slope, fit.slope - half, fit.slope + half), rel=1e-10)


@given(st.floats(-3, 3), st.floats(0.01, 100))
def test_slope_of_an_exact_power(exponent, factor):
    x = [1, 2, 4, 8, 16]
    slope, low, high = loglog_slope(x, [factor * value**exponent for value in x])
    assert (slope, low, high) == pytest.approx((exponent,) * 3, abs=1e-9)


def test_slope_of_two_points_has_no_interval():
    assert loglog_slope([1, 10], [1, 100]) == (pytest.approx(2), None, None)


def test_slope_refuses():
    with pytest.raises(ValueError, match="3 values of x and 2 of y"):
        loglog_slope([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="0 or less"):
        loglog_slope([1, 2, 3], [1, 2, 0])
    with pytest.raises(ValueError, match="every x is 4"):
        loglog_slope([4, 4, 4], [1, 2, 3])


def test_reading_intervals_needs_no_numpy():
    code = "import sys; from oral4.measure.intervals import mean_interval as f; f([1, 2]); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'oral4.measure.intervals'" in loaded
    assert "'numpy'" not in loaded and "'torch'" not in loaded
