"""Solvers: steps against an independent reference and their derivation; measured orders; the loop under bad input."""

import itertools
import math
import re
import warnings
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffusion.maximum_likelihood import gaussian_propagate, ml_step
from oral4.diffusion.sde import VE, VP, DiscreteVP, GaussianMixture, LinearSDE, SubVP
from oral4.diffusion.solvers import (
    MULTISTEP,
    ONE_STEP,
    Step,
    ddim,
    euler_maruyama,
    logsnr_times,
    probability_flow,
    reverse_diffusion,
    sample,
    uniform_times,
)

GOLDEN = np.load(Path(__file__).parents[1] / "goldens/diffvc/solver_reference.npz")
SDES = {"vp": VP(), "subvp": SubVP(), "ve": VE(0.01, 50.0)}
CHAIN = DiscreteVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
EVERY = [*ONE_STEP, *MULTISTEP]
MIXTURE = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -1.5]], dtype=torch.float64), 0.4)
AMPLIFIES = pytest.mark.filterwarnings("ignore:the step from")


def mixture_score(sde, **options):
    return lambda x, t: MIXTURE.score(x, t, sde, **options)


def gaussian_score(sde, mean=0.5, variance=0.25):
    def score(x, t):
        a, v = (value.reshape(-1, *[1] * (x.dim() - 1)) for value in (sde.a(t), sde.v(t)))
        return -(x - a * mean) / (a**2 * variance + v)

    return score


def start(sde, shape=(32, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return sde.prior_std() * torch.randn(shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(
    "number", range(len(GOLDEN["steps"])), ids=[str(n).replace("/", "-") for n in GOLDEN["step_names"]]
)
def test_steps_equal_the_reference(number):
    family, kind, _ = str(GOLDEN["step_names"][number]).split("/")
    t, s, *expected = GOLDEN["steps"][number]
    # float64 both; the reference's own promise is 1e-9, and its differences lose no more than a few digits
    np.testing.assert_allclose(ONE_STEP[kind](SDES[family], t, s), expected, rtol=1e-9, atol=0)


@AMPLIFIES
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("kind", ["em", "pf", "ddim", "ml"])
def test_trajectories_equal_the_reference(kind, count):
    mixture = GaussianMixture(
        torch.tensor(GOLDEN["gmm_centers"]), float(GOLDEN["gmm_std"]), torch.tensor(GOLDEN["gmm_weights"])
    )
    xbar, noise = torch.tensor(GOLDEN["xbar"]), torch.tensor(GOLDEN["noise"])
    steps = []
    result = sample(
        lambda x, t: mixture.score(x, t, VP(), xbar=xbar),
        xbar + noise[0],
        VP(),
        count,
        solver=kind,
        xbar=xbar,
        noise=noise[1 : count + 1],
        callback=steps.append,
    )
    found = torch.stack([steps[0].x, *(step.x_next for step in steps)])
    expected = torch.tensor(GOLDEN[f"gmm_{kind}_{count}"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # the reference's promise, values up to 40
    assert torch.equal(result, found[-1])


@given(st.floats(1e-3, 1), st.floats(0, 1), st.sampled_from(list(SDES)))
@settings(max_examples=50, deadline=None)
def test_ddim_is_its_derivation_and_with_eta_1_the_best_step_without_data_term(t, share, family):
    sde, s = SDES[family], 0.999 * share * t
    a_t, a_s, v_t, v_s = sde.a(t), sde.a(s), sde.v(t), sde.v(s)
    _alpha, added = sde.transition(t, s)
    for eta in (0.0, 0.4, 1.0):
        fresh = eta**2 * v_s * added / v_t
        scale, pull, spread = ddim(sde, t, s, eta)
        # on x = 1, score = 0.3, by the two guesses, data and noise; the difference of the two cancels, hence 1e-9
        guess, error = (1 + v_t * 0.3) / a_t, -math.sqrt(v_t) * 0.3
        np.testing.assert_allclose(
            scale + pull * 0.3, a_s * guess + math.sqrt(max(0.0, v_s - fresh)) * error, rtol=1e-9, atol=1e-12
        )
        assert spread == pytest.approx(math.sqrt(fresh), rel=1e-12)
    best, ancestral = ml_step(sde, t, s), ddim(sde, t, s, 1.0)
    np.testing.assert_allclose(ancestral, best, rtol=1e-12, atol=0)  # nothing cancels, however long the step


def test_ddim_keeps_its_digits_in_a_short_step():
    with_h = [ddim(VP(), 0.5, 0.5 - h)[1] / h for h in (1e-4, 1e-8, 1e-12)]
    # D / h tends to g^2 / 2; the naive difference of sqrt(v_t) and sqrt(v_s) would be 1e-16 / h = 1e-4 off at the last
    assert with_h[0] == pytest.approx(VP().diffusion2(0.5) / 2, rel=1e-3)
    _alpha, added = VP().transition(0.5, 0.5 - 1e-12)
    assert ddim(VP(), 0.5, 0.5 - 1e-12)[1] == pytest.approx(added / 2, rel=1e-10)
    assert with_h[1] == pytest.approx(VP().diffusion2(0.5) / 2, rel=1e-6)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_all_steps_agree_in_the_limit(sde):
    t, h = 0.6, 1e-7
    drift, squared = sde.drift(t), sde.diffusion2(t)
    for name, step in ONE_STEP.items():
        scale, pull, spread = step(sde, t, t - h)
        noisy = name in ("em", "reverse", "ml")
        # first order in h: what is left is of size h times rates of at most a few hundred
        assert (scale - 1) / h == pytest.approx(-drift, rel=1e-4, abs=1e-4), name
        assert pull / h == pytest.approx(squared if noisy else squared / 2, rel=1e-4), name
        assert spread == pytest.approx(math.sqrt(squared * h) if noisy else 0, rel=1e-4), name


def test_reverse_diffusion_of_each_family():
    assert reverse_diffusion(SubVP(), 0.7, 0.6) == euler_maruyama(SubVP(), 0.7, 0.6)
    ve = SDES["ve"]
    added = ve.v(0.7) - ve.v(0.6)
    np.testing.assert_allclose(reverse_diffusion(ve, 0.7, 0.6), (1, added, math.sqrt(added)), rtol=1e-12)
    beta = 1e-4 + 0.0199 * 499 / 999  # of step 500 of the chain
    expected = 2 - math.sqrt(1 - beta), beta, math.sqrt(beta)
    np.testing.assert_allclose(reverse_diffusion(CHAIN, 0.5, 0.499), expected, rtol=1e-12)
    np.testing.assert_allclose(
        reverse_diffusion(VP(), 0.6, 0.55),
        (2 - math.sqrt(1 - 12.02 * 0.05), 12.02 * 0.05, math.sqrt(12.02 * 0.05)),
        rtol=1e-12,
    )


def test_reverse_diffusion_says_which_grid_works():
    with pytest.raises(ValueError, match=r"beta h = 1.05 is over 1.*take 20 equal steps"):
        reverse_diffusion(VP(), 1.0, 1 - 1 / 19)
    for count in (20, 23):  # beta h is 1 up to rounding at 20
        assert sample(gaussian_score(VP()), start(VP()), VP(), count, solver="reverse").isfinite().all()
    with pytest.raises(ValueError, match="take 31 equal"):
        reverse_diffusion(VP(0.1, 30.5), 1.0, 0.9)


@pytest.mark.parametrize("step", [euler_maruyama, probability_flow, reverse_diffusion, ddim])
def test_steps_check_their_ends(step):
    for t, s in ((0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (math.nan, 0.1), (0.5, math.nan)):
        with pytest.raises(ValueError, match=re.escape(f"t={t} to s={s}; give 0 <= s < t <= 1")):
            step(VP(), t, s)
    assert step(VP(), 0.05, -2.8e-17) == step(VP(), 0.05, 0.0)


def test_ddim_checks_eta():
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"eta=.* in \[0, 1\]"):
            ddim(VP(), 0.5, 0.4, eta)


def test_a_chain_has_no_drift_and_says_what_to_use():
    for name in ("em", "pf"):
        with pytest.raises(TypeError, match=r"has no d.*'ml' and 'ddim'"):
            sample(mixture_score(CHAIN), start(CHAIN), CHAIN, 10, solver=name)


# -------------------------------------------------------------------------------------------- times


def test_uniform_times():
    assert uniform_times(1) == [1.0, 0.0]
    assert uniform_times(np.int64(3)) == [1.0, 2 / 3, 1 / 3, 0.0]
    for bad in (0, -2, 2.0, "6", None, True, math.nan):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            uniform_times(bad)


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_logsnr_times_are_equally_spaced(sde):
    times = logsnr_times(9, sde, end=0.01)
    assert times[0] == 1 and times[-1] == 0 and times[-2] == 0.01 and len(times) == 10
    levels = [math.log(sde.a(t) / math.sqrt(sde.v(t))) for t in times[:-1]]
    gaps = np.diff(levels)
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=1e-9)  # bisection to the last digit of t


def test_logsnr_times_short_and_bad():
    assert logsnr_times(1, VP()) == [1.0, 0.0]
    assert logsnr_times(2, VP(), end=0.1) == [1.0, 0.1, 0.0]
    for end in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"end=.*\(0, 1\)"):
            logsnr_times(4, VP(), end)
    with pytest.raises(ValueError, match="n=0"):
        logsnr_times(0, VP())


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 0.9))
@settings(max_examples=30, deadline=None)
def test_times_of_a_chain_are_on_its_grid_and_differ(size, count, end):
    chain = DiscreteVP(torch.linspace(0.999, 0.01, size, dtype=torch.float64) if size > 1 else torch.tensor([0.5]))
    if count > size:
        for make in (
            partial(logsnr_times, count, chain, end),
            partial(sample, lambda x, t: -x, torch.ones(1), chain, count),
        ):
            with pytest.raises(ValueError, match=f"has {size} steps; give at most {size}"):
                make()
        return
    seen = []
    sample(lambda x, t: -x, torch.zeros(1, 1), chain, count, callback=lambda step: seen.extend((step.t, step.s)))
    for times in (logsnr_times(count, chain, end), [*seen[::2], 0.0]):
        points = [t * size for t in times]
        assert len(times) == count + 1 and points[0] == size and points[-1] == 0
        np.testing.assert_allclose(points, np.round(points), atol=1e-9)
        assert all(late - early >= 1 - 1e-9 for late, early in itertools.pairwise(points))


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, "times=0: give the number of steps"),
        (-3, "times=-3"),
        (6.0, "times=6.0"),
        ("6", "times='6'"),
        (True, "times=True"),
        (torch.tensor(0), "times=tensor"),
        ([1.0], "at least two"),
        ([], "at least two"),
        ([1.0, 0.5, 0.5, 0.0], r"times\[1\]=0.5 is followed by 0.5"),
        ([0.0, 1.0], "needs decreasing times"),
        ([1.0, 0.2, 0.4], r"times\[1\]=0.2 is followed by 0.4"),
        ([1.2, 0.0], r"times holds 1.2; all times lie in \[0, 1\]"),
        ([1.0, -0.1], "times holds -0.1"),
        ([1.0, math.nan, 0.0], "times holds nan"),
    ],
)
def test_bad_times(times, message):
    with pytest.raises(ValueError, match=message):
        sample(mixture_score(VP()), start(VP()), VP(), times)


def test_times_of_every_kind_give_the_same():
    score, x, expected = mixture_score(VP()), start(VP()), None
    grids = [
        10,
        np.int32(10),
        torch.tensor(10),
        uniform_times(10),
        tuple(uniform_times(10)),
        (t for t in uniform_times(10)),
        np.array(uniform_times(10)),
        torch.tensor(uniform_times(10), dtype=torch.float64),
        [*(1 - 0.1 * i for i in range(10)), 1 - 9 * 0.1 - 0.1],  # ends at -2.8e-17
    ]
    assert grids[-1][-1] < 0
    for grid in grids:
        result = sample(score, x, VP(), grid, solver="pf")
        expected = result if expected is None else expected
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)  # the grids differ in the last digit


# -------------------------------------------------------------------------------------------- order


def slopes(errors):
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


ORDERS = {"pf": 1, "ddim": 1, "heun": 2, "dpmpp_2m": 2, "unipc_2": 3}


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("solver", ORDERS)
def test_order_on_gaussian_data(solver, sde):
    mean, variance, end = 0.5, 2.0, 0.1
    x = start(sde, (16, 1))
    scale = math.sqrt((sde.a(end) ** 2 * variance + sde.v(end)) / (sde.a(1.0) ** 2 * variance + sde.v(1.0)))
    exact = sde.a(end) * mean + scale * (x - sde.a(1.0) * mean)  # the probability flow of a Gaussian
    grids = ([*(1 - (1 - end) * i / n for i in range(n)), end] for n in (32, 64, 128))
    errors = [
        float((sample(gaussian_score(sde, mean, variance), x, sde, grid, solver=solver) - exact).abs().max())
        for grid in grids
    ]
    # at these lengths the next term of the expansion moves the slope by at most 0.3
    assert all(abs(slope - ORDERS[solver]) < 0.3 for slope in slopes(errors)), (errors, slopes(errors))


@lru_cache
def mixture_walk(count, solver, end=0.05):
    grid = [*(1 - (1 - end) * i / count for i in range(count)), end]
    return sample(mixture_score(VP()), start(VP()), VP(), grid, solver=solver)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_on_a_mixture(solver):
    # the reference is 4 times as fine as the finest walk: its error is 1/64 of that of the best solver here
    errors = [float((mixture_walk(n, solver) - mixture_walk(640, "unipc_2")).square().mean().sqrt()) for n in (80, 160)]
    # walks between the centres of a mixture bend sharply; at these lengths the slopes are within 0.3 of the orders
    assert abs(slopes(errors)[0] - ORDERS[solver]) < 0.3, (errors, slopes(errors))


# in VE the term of first order of Euler-Maruyama nearly vanishes for this law
@pytest.mark.parametrize("sde", [VP(), SubVP()], ids=["vp", "subvp"])
@pytest.mark.parametrize("solver", ["em", "reverse", "ml"])
def test_order_in_law_on_gaussian_data(solver, sde):
    mean, variance, end = 0.5, 2.0, 0.1
    exact = sde.a(end) ** 2 * variance + sde.v(end)
    grids = ([*(1 - (1 - end) * i / n for i in range(n)), end] for n in (64, 128, 256))
    errors = [abs(gaussian_propagate(sde, ONE_STEP[solver], grid, mean, variance)[1] - exact) for grid in grids]
    # the data term that "ml" drops is of first order in its sum; 0.2 for the next term of the expansion
    assert all(abs(slope - 1) < 0.2 for slope in slopes(errors)), (errors, slopes(errors))


def test_multistep_end_at_zero_with_a_first_order_step():
    """The last step, to no noise, is DDIM's: the guess of the data at the last but one time."""
    sde = VP()
    for solver in MULTISTEP:
        steps = []
        x = sample(mixture_score(sde), start(sde), sde, 8, solver=solver, callback=steps.append)
        last = steps[-1]
        guess = (last.x + sde.v(last.t) * last.score) / sde.a(last.t)
        torch.testing.assert_close(x, guess, rtol=0, atol=1e-12)  # float64


def test_multistep_begin_with_ddim():
    sde = VP()
    for solver in ("dpmpp_2m", "unipc_2"):
        steps = []
        sample(mixture_score(sde), start(sde), sde, 8, solver=solver, callback=steps.append)
        scale, pull, _ = ddim(sde, steps[0].t, steps[0].s)
        torch.testing.assert_close(steps[0].x_next, scale * steps[0].x + pull * steps[0].score, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "calls"), [*((name, 10) for name in ONE_STEP), ("heun", 19), ("dpmpp_2m", 10), ("unipc_2", 10)]
)
def test_calls_of_the_network(solver, calls):
    if solver == "reverse":
        with pytest.raises(ValueError):
            sample(mixture_score(VP()), start(VP()), VP(), 10, solver=solver)
        return
    times = []

    def score(x, t):
        times.append(t)
        return MIXTURE.score(x, t, VP())

    sample(score, start(VP()), VP(), 10, solver=solver)
    assert len(times) == calls
    assert all(t.shape == (32,) and t.dtype == torch.float64 and (t > 0).all() for t in times)


@AMPLIFIES
def test_constant_guess_of_the_data_is_exact_in_one_step():
    """Data in one point: x_0 is known, and DDIM and the exponential integrators have no error at any N."""
    point = torch.tensor([[0.7, -1.2]], dtype=torch.float64)
    for sde in (*SDES.values(), CHAIN):
        score = lambda x, t, sde=sde: (sde.a(t)[:, None] * point - x) / sde.v(t)[:, None]
        for solver in ("ddim", *MULTISTEP):
            x = start(sde)
            times = [1.0, 0.4, 0.1]
            result = sample(score, x, sde, times, solver=solver)
            noise = (x - sde.a(1.0) * point) / math.sqrt(sde.v(1.0))
            expected = sde.a(0.1) * point + math.sqrt(sde.v(0.1)) * noise
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)  # 1/a(1) = 150 times rounding


@pytest.mark.parametrize("solver", ["ddim", "ml", *MULTISTEP])
def test_a_chain_that_samples_vp_walks_like_vp(solver):
    size = 40
    chain = DiscreteVP([VP().a(k / size) ** 2 for k in range(1, size + 1)])
    noise = torch.randn(8, 32, 2, dtype=torch.float64)
    options = {"solver": solver, "noise": noise}
    found = sample(mixture_score(chain), start(VP()), chain, 8, **options)
    expected = sample(mixture_score(VP()), start(VP()), VP(), 8, **options)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-9
    )  # float64; 1 - alpha_bar loses a few digits near t = 0


# -------------------------------------------------------------------------------- laws of the results


def test_the_results_have_the_law_of_the_data():
    sde, generator = VP(), torch.Generator().manual_seed(3)
    truth = MIXTURE.means.mean(0), MIXTURE.means.var(0, correction=0) + 0.4**2
    for solver in EVERY:
        x = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
        out = sample(mixture_score(sde), x, sde, 50, solver=solver, generator=generator)
        # 4 standard errors: 4 * 1.3 / sqrt(2000) and 4 sqrt(2 / 2000); 3 % more for the solvers' own error at N = 50
        torch.testing.assert_close(out.mean(0), truth[0], rtol=0, atol=0.12)
        torch.testing.assert_close(out.var(0), truth[1], rtol=0.16, atol=0)


def test_full_ml_is_exact_for_gaussian_data_in_one_step():
    sde, variance = VP(), 0.3
    generator = torch.Generator().manual_seed(1)
    marginal = sde.a(1.0) ** 2 * variance + sde.v(1.0)
    x = sde.a(1.0) * 0.5 + math.sqrt(marginal) * torch.randn(40000, 1, generator=generator, dtype=torch.float64)
    known = lambda t: variance * sde.v(t) / (sde.a(t) ** 2 * variance + sde.v(t))
    with pytest.warns(UserWarning, match="multiplies the state"):
        out = sample(gaussian_score(sde, 0.5, variance), x, sde, 1, data_var=known, generator=generator)
    assert out.var().item() == pytest.approx(variance, rel=0.035)  # 5 sqrt(2 / 40000)
    assert out.mean().item() == pytest.approx(0.5, abs=0.014)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = sample(gaussian_score(sde, 0.5, variance), x, sde, 1, generator=generator)
    assert short.var().item() < 0.01 * variance  # without the data term: one point, the mean


def test_estimated_data_variance_is_used_and_brings_the_width_back():
    sde, variance = VP(), 0.25
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    widths = {
        data_var: sample(
            gaussian_score(sde, 0.0, variance), x, sde, 6, data_var=data_var, generator=torch.Generator().manual_seed(5)
        )
        .var()
        .item()
        for data_var in ("zero", "estimate")
    }
    # exact: 0.25 with the full term; the estimate has the error of a mean over 20000, enlarged by 1/a^2 near t = 1 only
    assert widths["estimate"] == pytest.approx(variance, rel=0.08)
    assert widths["zero"] < 0.7 * variance


def test_temperature_scales_the_noise_alone():
    sde, noise, x = VP(), torch.randn(6, 32, 2, dtype=torch.float64), start(VP())
    score = lambda x, t: -x  # linear, so the result is linear in the noise
    cold, half, full = (
        sample(score, x, sde, 6, solver="em", noise=noise, temperature=temperature) for temperature in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (cold + full) / 2, rtol=0, atol=1e-12)
    scaled = sample(score, x, sde, 6, solver="em", noise=0.5 * noise)
    torch.testing.assert_close(half, scaled, rtol=0, atol=1e-12)
    assert not torch.allclose(cold, full)


@pytest.mark.parametrize("solver", ["ml", "ddim", *MULTISTEP])
def test_tau_switches_from_euler_maruyama(solver):
    sde, noise, score = VP(), torch.randn(8, 32, 2, dtype=torch.float64), mixture_score(VP())
    switched = sample(score, start(sde), sde, 8, solver=solver, tau=0.5, noise=noise)
    middle = sample(score, start(sde), sde, [1.0, 0.875, 0.75, 0.625, 0.5], solver="em", noise=noise[:4])
    expected = sample(score, middle, sde, [0.5, 0.375, 0.25, 0.125, 0.0], solver=solver, noise=noise[4:])
    torch.testing.assert_close(switched, expected, rtol=0, atol=1e-12)
    em = sample(score, start(sde), sde, 8, solver="em", noise=noise)
    assert torch.equal(sample(score, start(sde), sde, 8, solver=solver, tau=0.0, noise=noise), em)


# ------------------------------------------------------------------------------------------ the loop


@AMPLIFIES
@pytest.mark.parametrize("solver", [n for n in EVERY if n != "reverse"])
def test_mean_reverting_is_a_shift(solver):
    sde, shift, noise = VP(), torch.tensor([3.0, -2.0], dtype=torch.float64), torch.randn(6, 32, 2, dtype=torch.float64)
    plain = sample(mixture_score(sde), start(sde), sde, 6, solver=solver, noise=noise)
    moved = sample(
        lambda x, t: MIXTURE.score(x - shift, t, sde),
        start(sde) + shift,
        sde,
        6,
        solver=solver,
        noise=noise,
        xbar=shift,
    )
    torch.testing.assert_close(moved, plain + shift, rtol=0, atol=1e-10)  # float64, values up to a few hundred inside


@AMPLIFIES
@pytest.mark.parametrize("solver", [n for n in EVERY if n != "reverse"])
def test_gradients_through_the_walk(solver):
    sde = VP()
    strength = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    x = start(sde, (3, 2)).requires_grad_()
    noise = torch.randn(4, 3, 2, dtype=torch.float64)

    def walk(x, strength):
        return sample(lambda x, t: strength * MIXTURE.score(x, t, sde), x, sde, 4, solver=solver, noise=noise)

    # the mixture's score is differentiable; compared with central differences
    assert torch.autograd.gradcheck(walk, (x, strength), eps=1e-6, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        assert not walk(x, strength).requires_grad


@AMPLIFIES
@pytest.mark.parametrize("solver", [n for n in EVERY if n != "reverse"])
def test_mask_of_start_and_of_every_step(solver):
    sde = VP()
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)[None]
    x, noise = start(sde, (4, 5)), torch.randn(6, 4, 5, dtype=torch.float64)
    seen = []
    score = lambda x, t: (seen.append(x), -x / 2)[1]
    out = sample(
        score,
        x,
        sde,
        6,
        solver=solver,
        mask=mask,
        xbar=1.0,
        noise=noise,
        callback=lambda step: seen.append(step.x_next),
    )
    assert all((state[:, 3:] == 0).all() for state in seen) and (out[:, 3:] == 0).all()
    alone = sample(lambda x, t: -x / 2, x[:, :3], sde, 6, solver=solver, xbar=1.0, noise=noise[..., :3])
    torch.testing.assert_close(out[:, :3], alone, rtol=0, atol=1e-12)


def test_masked_entries_do_not_count_in_the_estimate():
    sde, mask = VP(), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    x, noise = start(sde, (64, 2)), torch.randn(6, 64, 2, dtype=torch.float64)
    options = {"data_var": "estimate"}
    both = sample(gaussian_score(sde, 0.0), x, sde, 6, mask=mask, noise=noise, **options)
    alone = sample(gaussian_score(sde, 0.0), x[:, :1], sde, 6, noise=noise[..., :1], **options)
    torch.testing.assert_close(both[:, :1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["ml", "em", "heun", "unipc_2"])
def test_half_networks_keep_the_state_in_float32(half, solver):
    sde, generator = VP(), torch.Generator()
    network = torch.nn.Linear(2, 2).to(half)
    given, states = [], []

    def score(x, t):
        given.append((x.dtype, t.dtype))
        return network(x) - x

    with torch.no_grad():
        out = sample(
            score,
            start(sde).to(half),
            sde,
            8,
            solver=solver,
            generator=generator.manual_seed(0),
            callback=states.append,
        )
        assert set(given) == {(half, torch.float32)}
        assert out.dtype == torch.float32 and all(
            s.x.dtype == s.x_next.dtype == s.score.dtype == torch.float32 for s in states
        )
        weights = [p.float() for p in network.parameters()]
        wide = sample(
            lambda x, t: torch.nn.functional.linear(x, *weights) - x,
            start(sde).to(half).float(),
            sde,
            8,
            solver=solver,
            generator=generator.manual_seed(0),
        )
    # the network's rounding (2^-8 or 2^-11 of values of size 1) enters through D, up to a few, in eight steps
    torch.testing.assert_close(out, wide, rtol=0.05, atol=0.2 if half is torch.bfloat16 else 0.03)


def test_float32_follows_float64():
    for solver in ("ml", "em", "ddim", *MULTISTEP):
        noise = torch.randn(20, 32, 2, dtype=torch.float64)
        wide, narrow = (
            sample(mixture_score(VP()), start(VP()).to(dtype), VP(), 20, solver=solver, noise=noise)
            for dtype in (torch.float64, torch.float32)
        )
        assert narrow.dtype == torch.float32
        # rounding of 6e-8 at the start, stretched along the walk: between two centres of the mixture by 100 and more
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-4)


def test_a_cpu_generator_draws_the_same_for_every_type_and_counts_noisy_steps_alone():
    generator = torch.Generator()
    results = [
        sample(mixture_score(VP()), start(VP()).to(dtype), VP(), 20, generator=generator.manual_seed(7))
        for dtype in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(results[0].double(), results[1], rtol=0, atol=2e-4)
    drawn = torch.stack([torch.randn(32, 2, generator=generator) for _ in range(1) if generator.manual_seed(7)])
    by_hand = sample(mixture_score(VP()), start(VP()), VP(), [1.0, 0.5], solver="em", noise=drawn)
    again = sample(mixture_score(VP()), start(VP()), VP(), [1.0, 0.5], solver="em", generator=generator.manual_seed(7))
    assert torch.equal(by_hand, again)
    generator.manual_seed(7)
    sample(mixture_score(VP()), start(VP()), VP(), 6, solver="ddim", generator=generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())


@pytest.mark.gpu
def test_on_a_gpu_a_cpu_generator_gives_the_same():
    results = [
        sample(
            mixture_score(VP()),
            start(VP()).to(device),
            VP(),
            20,
            solver=solver,
            generator=torch.Generator().manual_seed(0),
        ).cpu()
        for solver in ("ml", "unipc_2")
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)
    torch.testing.assert_close(results[2], results[3], rtol=0, atol=1e-9)


def test_noise_as_a_function_is_asked_where_a_step_is_noisy():
    asked = []
    noise = torch.randn(6, 32, 2, dtype=torch.float64)
    given = lambda i: (asked.append(i), noise[i])[1]
    a = sample(mixture_score(VP()), start(VP()), VP(), 6, noise=given)
    assert asked == [0, 1, 2, 3, 4]  # the last step of ML, to v = 0, has none
    assert torch.equal(a, sample(mixture_score(VP()), start(VP()), VP(), 6, noise=noise))
    asked.clear()
    sample(mixture_score(VP()), start(VP()), VP(), 6, solver="em", noise=given)
    assert asked == [0, 1, 2, 3, 4, 5]
    sample(mixture_score(VP()), start(VP()), VP(), 6, solver="unipc_2", noise=lambda i: 1 / 0)


def test_callback_sees_every_step():
    steps = []
    x = start(VP())
    out = sample(mixture_score(VP()), x, VP(), 5, callback=steps.append)
    assert all(type(step) is Step for step in steps)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [(step.t, step.s) for step in steps] == list(zip(uniform_times(5), uniform_times(5)[1:], strict=False))
    assert steps[0].x is x or torch.equal(steps[0].x, x)
    assert all(torch.equal(a.x_next, b.x) for a, b in itertools.pairwise(steps)) and torch.equal(steps[-1].x_next, out)
    for step in steps:
        assert torch.equal(step.score, MIXTURE.score(step.x, step.t, VP()))


def test_own_step_and_the_start_is_left_alone():
    x = start(VP())
    kept = x.clone()
    own = sample(mixture_score(VP()), x, VP(), 6, solver=lambda sde, t, s: ddim(sde, t, s, 0.0))
    assert torch.equal(own, sample(mixture_score(VP()), x, VP(), 6, solver="ddim"))
    assert torch.equal(x, kept)


def test_own_process_of_which_only_a_and_v_are_known():
    class Cosine(LinearSDE):
        def _a(self, t):
            return torch.cos(0.49 * math.pi * t)

        def _v(self, t):
            return torch.sin(0.49 * math.pi * t) ** 2

    sde = Cosine()
    x = start(sde, (2000, 2))
    for solver in ("ddim", "ml", *MULTISTEP):
        out = sample(mixture_score(sde), x, sde, 30, solver=solver, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(out.var(0), MIXTURE.means.var(0, correction=0) + 0.16, rtol=0.15, atol=0)


@AMPLIFIES
@pytest.mark.parametrize("solver", [n for n in EVERY if n != "reverse"])
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_a_score_that_is_not_finite_stops_with_step_and_time(solver, bad, word):
    def score(x, t):
        return torch.where(t[:, None] < 0.6, torch.full_like(x, bad), -x)

    index = 3 if solver == "heun" else 4  # Heun asks at the end of its step already
    with pytest.raises(FloatingPointError, match=rf"score is {word} in step {index} of 8, at t=0.5"):
        sample(score, start(VP()), VP(), 8, solver=solver)


def test_an_overflow_in_the_last_step_is_noticed():
    with pytest.raises(FloatingPointError, match="state is not finite after step 1, at t=0"):
        sample(
            lambda x, t: torch.full_like(x, 3e38), torch.zeros(1, 1), VP(), [0.9, 0.89, 0.0], solver="em", temperature=0
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"solver": "euler"},
            "solver='euler' is unknown; choose one of em, pf, reverse, ddim, ml, heun, dpmpp_2m, unipc_2",
        ),
        ({"solver": None}, "solver=None is unknown"),
        ({"data_var": "auto"}, "data_var='auto' is unknown"),
        ({"data_var": 0.1}, "data_var=0.1 is unknown"),
        ({"data_var": "estimate", "solver": "em"}, "goes with solver='ml' alone"),
        ({"data_var": lambda t: 0.1, "solver": ml_step}, "goes with solver='ml' alone"),
        ({"data_var": lambda t: -1.0}, "data_var = -1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"tau": math.nan}, "tau=nan"),
        ({"noise": torch.zeros(5, 32, 2)}, r"noise has shape \(5, 32, 2\); 6 steps take \(6, 32, 2\)"),
        ({"noise": lambda i: torch.zeros(2)}, r"noise\(0\) has shape \(2,\)"),
        ({"noise": torch.zeros(6, 32, 2), "generator": torch.Generator()}, "noise and generator are both given"),
        ({"xbar": torch.zeros(3)}, r"xbar has shape \(3,\); give one that spreads over x, \(32, 2\)"),
        ({"xbar": torch.zeros(4, 32, 2)}, r"xbar has shape \(4, 32, 2\)"),
        ({"mask": torch.ones(31, 1)}, r"mask has shape \(31, 1\)"),
        ({"x": torch.tensor(1.0)}, "x has no axis"),
        ({"x": torch.full((2, 2), math.nan)}, "x holds NaN"),
        ({"score": lambda x, t: x[:, :1]}, r"score returned shape \(32, 1\) for x of shape \(32, 2\)"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"score": mixture_score(VP()), "x": start(VP()), "sde": VP(), "times": 6} | options
    with pytest.raises(ValueError, match=message):
        sample(**arguments)


def test_bad_types():
    for x in (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64), np.zeros((2, 2)), 1.0):
        with pytest.raises(TypeError, match="give a floating tensor"):
            sample(mixture_score(VP()), x, VP(), 6)


@pytest.mark.parametrize("solver", ["ml", "ddim", "heun"])
def test_too_long_a_step_warns_and_six_steps_do_not(solver):
    with pytest.warns(UserWarning, match=r"from t=1 to 0.5 multiplies the state and the errors in it by 43"):
        sample(mixture_score(VP()), start(VP()), VP(), 2, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(mixture_score(VP()), start(VP()), VP(), 6, solver=solver)


def test_an_empty_batch_and_many_axes():
    assert sample(lambda x, t: -x, torch.zeros(0, 3), VP(), 6).shape == (0, 3)
    assert sample(lambda x, t: -x, torch.zeros(2, 3, 4, 5), VP(), 6, solver="unipc_2").shape == (2, 3, 4, 5)
