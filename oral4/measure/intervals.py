"""Intervals for means, medians, ratios and slopes of a handful of measurements.

Everything but the bootstrap is plain Python, so that reading a record costs no import of numpy.
An interval that the data cannot give (one seed, too few rounds) has ``low`` and ``high`` None, never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Interval",
    "bootstrap_interval",
    "loglog_slope",
    "mean_interval",
    "median_interval",
    "ratio_interval",
    "t_quantile",
]


class Interval(NamedTuple):
    """An estimate and the ends of its interval, which are None where the data give no interval."""

    estimate: float
    low: float | None
    high: float | None


def mean_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Return the mean and its Student t interval, exact for independent normal values.

    Parameters
    ----------
    values : iterable of float, at least one
        One value has no interval: ``low`` and ``high`` are None. Equal values have an interval of width zero.
    level : float, in (0, 1)
        Probability that such an interval covers the true mean.

    Raises
    ------
    ValueError
        If there is no value, one is not finite, or the level is out of range.

    Examples
    --------
    >>> mean, low, high = mean_interval([1.0, 2.0, 3.0])
    >>> print(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
    2.00 [-0.48, 4.48]
    >>> mean_interval([5.0])
    Interval(estimate=5.0, low=None, high=None)
    """
    _check_level(level)
    sample = _sample(values)
    count = len(sample)
    # Equal values must give exactly that value: sum / n may differ from it in the last digit.
    mean = sample[0] if min(sample) == max(sample) else math.fsum(sample) / count
    if count == 1:
        return Interval(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in sample) / (count - 1)
    half = t_quantile(0.5 + level / 2, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def median_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Return the median and an interval between two of the sorted values, whatever the distribution.

    The number of values below the true median is binomial(n, 1/2), so the k-th smallest and k-th
    largest cover it with a known probability; the narrowest pair that reaches ``level`` is taken.
    For the level 0.95 that needs six values at least; with fewer ``low`` and ``high`` are None.

    Raises
    ------
    ValueError
        If there is no value, one is not finite, or the level is out of range.

    Examples
    --------
    >>> median_interval([3, 1, 2, 5, 4, 7, 6])
    Interval(estimate=4.0, low=1.0, high=7.0)
    >>> median_interval([3, 1, 2])
    Interval(estimate=2.0, low=None, high=None)
    """
    _check_level(level)
    ordered = sorted(_sample(values))
    count = len(ordered)
    middle = count // 2
    median = ordered[middle] if count % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    # The pair (k, n + 1 - k) misses with probability 2 P(binomial < k). Counted in whole numbers out of 2^n: the
    # probability itself is 0 in floating point from n = 1075 on.
    allowed = int(Fraction(1 - level) * 2**count)
    ways, missed, rank = 1, 2, 0
    while rank < middle and missed <= allowed:
        rank += 1
        ways = ways * (count - rank + 1) // rank  # n choose rank
        missed += 2 * ways
    if rank == 0:
        return Interval(median, None, None)
    return Interval(median, ordered[rank - 1], ordered[count - rank])


def ratio_interval(numerators: Iterable[float], denominators: Iterable[float], level: float = 0.95) -> Interval:
    """Return the median of the ratios of paired runs, with the interval of :func:`median_interval`.

    Made for two candidates of :func:`oral4.measure.timing.compare`, whose runs are paired by round:
    what slows the machine down in one round slows both and leaves the ratio alone.

    Raises
    ------
    ValueError
        If the numbers of runs differ, there is none, or one of them is not positive and finite.

    Examples
    --------
    >>> ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).estimate
    2.0
    """
    top, bottom = _sample(numerators), _sample(denominators)
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} and {len(bottom)} runs are not paired; give as many of one as of the other")
    if min(*top, *bottom) <= 0:
        raise ValueError("a run has value 0 or less; a ratio needs positive values")
    return median_interval((a / b for a, b in zip(top, bottom, strict=True)), level)


def bootstrap_interval(
    values: Iterable[float],
    statistic: Callable[[np.ndarray], Any] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return a statistic of the sample and its percentile bootstrap interval.

    Parameters
    ----------
    values : iterable of float, at least one
        One value has no interval. Below about twenty values the interval is too narrow; prefer
        :func:`mean_interval` or :func:`median_interval`.
    statistic : callable, optional
        Maps an array of shape (n,) to a number; the mean if left out.
    level : float, in (0, 1)
        Probability aimed at.
    resamples : int, at least 100
        Number of samples drawn with replacement.
    seed : int
        The same seed gives the same interval.

    Raises
    ------
    ValueError
        If there is no value, one is not finite, or an argument is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> round(bootstrap_interval(range(101), np.median).estimate)
    50
    """
    import numpy as np

    _check_level(level)
    if resamples < 100:
        raise ValueError(f"resamples={resamples} is too few for an interval; use 100 or more")
    sample = np.asarray(_sample(values))
    compute = np.mean if statistic is None else statistic
    estimate = float(compute(sample))
    if len(sample) == 1:
        return Interval(estimate, None, None)
    generator = np.random.default_rng(seed)
    # One resample at a time: memory stays at n values and any statistic of one array will do.
    draws = [float(compute(generator.choice(sample, size=len(sample)))) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(estimate, float(low), float(high))


def loglog_slope(x: Iterable[float], y: Iterable[float], level: float = 0.95) -> Interval:
    """Return the exponent ``b`` of ``y = a x^b``: least squares of log y on log x, with a Student t interval.

    Parameters
    ----------
    x, y : iterable of float, positive, at least two different x
        Two points give a slope without an interval.
    level : float, in (0, 1)
        Probability that such an interval covers the true slope if the logarithms scatter normally.

    Raises
    ------
    ValueError
        If the numbers of points differ, a value is not positive and finite, or all x are equal.

    Examples
    --------
    >>> slope, low, high = loglog_slope([1, 2, 4, 8], [3, 12, 48, 192])
    >>> print(f"{slope:.1f} [{low:.1f}, {high:.1f}]")
    2.0 [2.0, 2.0]
    """
    _check_level(level)
    across, up = _sample(x), _sample(y)
    if len(across) != len(up):
        raise ValueError(f"{len(across)} values of x and {len(up)} of y; give one y for each x")
    if min(*across, *up) <= 0:
        raise ValueError("a value is 0 or less; a slope of logarithms needs positive x and y")
    if min(across) == max(across):
        raise ValueError(f"every x is {across[0]:g}; a slope needs at least two different x")
    log_x, log_y = [math.log(value) for value in across], [math.log(value) for value in up]
    count = len(log_x)
    mean_x, mean_y = math.fsum(log_x) / count, math.fsum(log_y) / count
    spread = math.fsum((a - mean_x) ** 2 for a in log_x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True)) / spread
    if count == 2:
        return Interval(slope, None, None)
    residuals = (b - mean_y - slope * (a - mean_x) for a, b in zip(log_x, log_y, strict=True))
    variance = math.fsum(residual**2 for residual in residuals) / (count - 2)
    half = t_quantile(0.5 + level / 2, count - 2) * math.sqrt(variance / spread)
    return Interval(slope, slope - half, slope + half)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution with a whole number of degrees of freedom.

    With ``t = sqrt(degrees) tan(angle)`` the probability of ``|T| < t`` is a finite sum of powers of
    cos(angle) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4); the angle is found by bisection.

    Parameters
    ----------
    probability : float, in (0, 1)
    degrees : int, at least 1

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> print(f"{t_quantile(0.975, 2):.4f}")
    4.3027
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability={probability} is outside (0, 1)")
    if degrees < 1 or degrees != int(degrees):
        raise ValueError(f"degrees={degrees} of freedom; a whole number from 1 on is needed")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    inside = 2 * probability - 1  # of |T| < t
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        if _t_inside(angle, int(degrees)) < inside:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(angle) if angle > 1e-300 else 0.0


def _t_inside(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for power in range(2 + odd, degrees, 2):  # the next power of the cosine, up to degrees - 2 + odd
        term *= cosine * cosine * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _sample(values: Iterable[float]) -> list[float]:
    sample = [float(value) for value in values]
    if not sample:
        raise ValueError("no values; an interval needs at least one")
    for position, value in enumerate(sample):
        if not math.isfinite(value):
            raise ValueError(f"value {position} is {value}; an interval needs finite values")
    return sample


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} is outside (0, 1); 0.95 is usual")
