"""Theorem 1: stored numbers, exact arithmetic, regression, gradients, exact laws, limits, older formulas, errors."""

import decimal
import math
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from oral4.diffusion.maximum_likelihood import (
    bridge,
    estimate_data_var,
    fit_step,
    forward_paths,
    gaussian_data_var,
    gaussian_kl,
    gaussian_propagate,
    ml_coefficients,
    ml_step,
    path_log_likelihood,
)
from oral4.diffusion.sde import VE, VP, DiscreteVP, GaussianMixture, LinearSDE, SubVP, tweedie
from oral4.diffusion.solvers import ONE_STEP, ddim, euler_maruyama, probability_flow, uniform_times

GOLDENS = Path(__file__).parents[1] / "goldens/diffvc"
OFFICIAL = np.load(GOLDENS / "coefficients.npz")
REFERENCE = np.load(GOLDENS / "solver_reference.npz")
FAMILIES = {"vp": VP(), "subvp": SubVP(), "ve": VE()}
CHAIN = DiscreteVP.from_betas(torch.linspace(1e-3, 0.3, 20, dtype=torch.float64))
CENTRES = torch.tensor([[-1.0, 0.5], [1.2, 0.3], [0.0, -1.0]], dtype=torch.float64)
MIXTURE = GaussianMixture(CENTRES, 0.2, torch.tensor([0.5, 0.3, 0.2]))


class Cosine(LinearSDE):
    """A process that the module does not know: a = cos(pi t / 2) and v = sin^2, cut off before it ends."""

    def __repr__(self):
        return "Cosine()"  # names the test; an address in it would differ from worker to worker

    def _a(self, t):
        return torch.cos(1.5 * t)

    def _v(self, t):
        return torch.sin(1.5 * t) ** 2

    def _drift(self, t):
        return -1.5 * torch.tan(1.5 * t)

    def _diffusion2(self, t):
        return 3 * torch.tan(1.5 * t)


class Forgetful(Cosine):
    """Nothing of the data is left after a short while."""

    def _a(self, t):
        return torch.exp(-2000 * t)


@st.composite
def processes(draw):
    """Any schedule of any family."""
    kind = draw(st.sampled_from(["vp", "subvp", "ve", "cosine"]))
    if kind == "cosine":
        return Cosine()
    if kind == "ve":
        smallest = draw(st.floats(1e-3, 1.0))
        return VE(smallest, smallest * draw(st.floats(1.5, 1e4)))
    b0, b1 = draw(st.floats(0.0, 5.0)), draw(st.floats(0.1, 40.0))
    return (VP if kind == "vp" else SubVP)(b0, b1)


@st.composite
def steps(draw):
    """Times 0 <= s < t <= 1, far apart and close."""
    t = draw(st.floats(1e-3, 1.0))
    return t, draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0).map(lambda share: share * t * (1 - 1e-6))))


def full(sde, var):
    """The step with the exact data term of Gaussian data."""
    return partial(ml_step, data_var=lambda t: gaussian_data_var(sde, t, var))


# --- stored numbers -------------------------------------------------------------------------------------------------


def test_official_coefficients():
    for row in OFFICIAL["table"]:
        stored = dict(zip(OFFICIAL["columns"].tolist(), row, strict=True))
        s = stored["t"] - stored["h"]
        mu, nu, sigma = bridge(VP(), stored["t"], s)
        kappa, omega, deviation = ml_coefficients(VP(), stored["t"], s)
        found = [mu, nu, sigma, kappa, omega * stored["beta_t"] * stored["h"]]
        expected = [stored[name] for name in ("mu_st", "nu_st", "sigma_st", "kappa", "omega_times_beta_h")]
        # the official grid ends at t - h = 1e-17 instead of 0, hence the absolute part
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)
        assert deviation == sigma  # no data term


def test_official_omega_loses_digits_where_ours_does_not():
    """The official form differs from exact arithmetic by far more than ours does, and more so at small steps."""
    lost = {}
    for row in OFFICIAL["table"]:
        stored = dict(zip(OFFICIAL["columns"].tolist(), row, strict=True))
        s = max(0.0, stored["t"] - stored["h"])
        exact = float(exact_coefficients(VP(), stored["t"], s)[1])
        official = abs(stored["omega_times_beta_h"] / (stored["beta_t"] * stored["h"]) / exact - 1)
        ours = abs(ml_coefficients(VP(), stored["t"], s)[1] / exact - 1)
        lost.setdefault(int(stored["N"]), []).append((official, ours))
    for num_steps, errors in lost.items():
        official, ours = np.array(errors).max(0)
        assert ours < 2e-12, num_steps  # near a change of sign its own two terms cancel
        if num_steps == 100:
            assert 1e-11 < official < 1e-6


@pytest.mark.parametrize("kind", ["em", "pf", "ddim", "ml"])
def test_steps_of_the_independent_reference(kind):
    rule = {"em": euler_maruyama, "pf": probability_flow, "ddim": ddim, "ml": ml_step}[kind]
    count = 0
    for name, (t, s, *expected) in zip(REFERENCE["step_names"], REFERENCE["steps"], strict=True):
        family, stored_kind, _ = name.split("/")
        if stored_kind == kind:
            np.testing.assert_allclose(rule(FAMILIES[family], t, max(s, 0.0)), expected, rtol=1e-9, atol=1e-12)
            count += 1
    assert count == 48


@pytest.mark.parametrize("kind", ["em", "pf", "ddim", "ml", "ml_full"])
def test_laws_of_the_independent_reference(kind):
    count = 0
    for family, stored_kind, (var, num_steps, *expected) in zip(
        REFERENCE["gauss_family"], REFERENCE["gauss_kind"], REFERENCE["gauss"], strict=True
    ):
        if stored_kind != kind:
            continue
        sde = FAMILIES[family]
        rule = full(sde, var) if kind == "ml_full" else ONE_STEP[kind]
        found = gaussian_propagate(sde, rule, uniform_times(int(num_steps)), 0.5, var)
        # a variance of 4e-9 after one step is the square of a difference of numbers near 1
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-17)
        count += 1
    assert count == 48


# --- the coefficients -----------------------------------------------------------------------------------------------


def exact_coefficients(sde, t, s):
    """kappa and omega by their definition in arithmetic of 80 digits, and the size of the larger of their two terms."""
    with decimal.localcontext() as context:
        context.prec = 80
        t, s = Decimal(t), Decimal(s)
        h = t - s
        if isinstance(sde, VE):
            rate = 2 * (Decimal(sde.sigma_max) / Decimal(sde.sigma_min)).ln()
            size = Decimal(sde.sigma_min) ** 2
            alpha, added = Decimal(1), size * ((rate * t).exp() - (rate * s).exp())
            drift, squared = Decimal(0), size * rate * (rate * t).exp()
        else:
            b0, slope = Decimal(sde.b0), Decimal(sde.b1) - Decimal(sde.b0)
            total = [x * (b0 + slope * x / 2) for x in (t, s)]
            alpha, beta = ((total[1] - total[0]) / 2).exp(), b0 + slope * t
            power = 2 if isinstance(sde, SubVP) else 1
            added = (1 - (-total[0]).exp()) ** power - alpha**2 * (1 - (-total[1]).exp()) ** power
            drift, squared = -beta / 2, beta * (1 - (-2 * total[0]).exp() if power == 2 else 1)
        return added / alpha / (squared * h) - 1, (1 / alpha - 1 + drift * h) / (squared * h)


@settings(max_examples=150, deadline=None)
@given(processes(), st.floats(1e-3, 1.0), st.floats(-6, 0))
def test_coefficients_against_exact_arithmetic(sde, t, exponent):
    assume(not isinstance(sde, Cosine))
    s = t - t * 10**exponent if exponent < 0 else 0.0
    kappa, omega, _ = ml_coefficients(sde, t, s)
    exact_kappa, exact_omega = map(float, exact_coefficients(sde, t, s))
    h = t - s
    if isinstance(sde, VE):
        rate = 2 * h * math.log(sde.sigma_max / sde.sigma_min)
        assert omega == exact_omega == 0
        terms = rate, 0.0
    else:  # the two terms: the bend of the exponential, and the change of beta within the step
        beta, change = sde.b0 + (sde.b1 - sde.b0) * t, abs(sde.b1 - sde.b0) * h**2 / 2
        integral = h * (sde.b0 + (sde.b1 - sde.b0) * (t + s) / 2)
        bend = math.expm1(integral / 2) - integral / 2 if integral > 1e-3 else integral**2 / 8 * 1.001
        kappa_term = change + (
            2 * math.sinh(integral / 2) if integral > 1e-3 else integral**3 / 24 + integral * beta * h
        )
        terms = kappa_term / (beta * h), (bend + change / 2) / (sde.diffusion2(t) * h)
    assert abs(kappa - exact_kappa) <= 1e-12 * max(terms[0], abs(exact_kappa))
    assert abs(omega - exact_omega) <= 1e-12 * max(terms[1], abs(exact_omega))


@settings(max_examples=150, deadline=None)
@given(processes(), steps(), st.floats(0, 3))
def test_both_forms_are_the_same_step(sde, times, data_var):
    t, s = times
    A, D, S = ml_step(sde, t, s, data_var)
    kappa, omega, sigma = ml_coefficients(sde, t, s, data_var)
    h, squared = t - s, sde.diffusion2(t)
    # 1e-9 rather than 1e-15: with the default transition of Cosine, L of a short step is a difference
    assert math.isclose(1 + h * (-sde.drift(t) + squared * omega), A, rel_tol=1e-9)
    assert math.isclose(h * squared * (1 + kappa), D, rel_tol=1e-9, abs_tol=1e-14)
    assert sigma == S


@settings(max_examples=150, deadline=None)
@given(processes(), steps(), st.floats(0, 3))
def test_step_is_the_bridge_with_tweedie_put_in(sde, times, data_var):
    t, s = times
    mu, nu, sigma = bridge(sde, t, s)
    A, D, S = ml_step(sde, t, s, data_var)
    assert math.isclose(mu + nu / sde.a(t), A, rel_tol=1e-9)
    assert math.isclose(nu * sde.v(t) / sde.a(t), D, rel_tol=1e-12)
    assert math.isclose(sigma**2 + nu**2 * data_var, S**2, rel_tol=1e-12, abs_tol=1e-300)
    x, score = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guess = tweedie(x, score, t, sde)
    size = float((abs(mu) * x.abs() + abs(nu) * guess.abs()).max())
    torch.testing.assert_close(A * x + D * score, mu * x + nu * guess, rtol=0, atol=1e-9 * size)


@settings(max_examples=60, deadline=None)
@given(processes(), steps())
def test_bridge_is_the_bridge(sde, times):
    """mean and variance of X_s given X_0 and X_t, from the joint covariance of (X_s, X_t) given X_0."""
    t, s = times
    alpha, _ = sde.transition(t, s)
    mu, nu, sigma = bridge(sde, t, s)
    gain = alpha * sde.v(s) / sde.v(t)
    assert math.isclose(mu, gain, rel_tol=1e-12, abs_tol=1e-300)
    assert math.isclose(nu, sde.a(s) - gain * sde.a(t), rel_tol=1e-6, abs_tol=1e-12)  # a difference on the right
    assert math.isclose(sigma**2, sde.v(s) - gain * alpha * sde.v(s), rel_tol=1e-6, abs_tol=1e-12 * sde.v(t))


def test_edges_of_the_last_step():
    for sde in [*FAMILIES.values(), Cosine(), CHAIN]:
        assert bridge(sde, 1.0, 0.0) == (0.0, pytest.approx(1.0, rel=1e-12), 0.0)
        assert ml_step(sde, 1.0, 0.0)[2] == 0.0
        assert ml_step(sde, 1.0, 0.0, 0.09)[2] == pytest.approx(0.3, rel=1e-12)


def test_rounding_of_a_grid_is_put_right():
    below = 1 - 9 * 0.1 - 0.1
    assert below < 0
    assert ml_step(VP(), 0.1, below) == ml_step(VP(), 0.1, 0.0)
    assert bridge(VE(), 1 + 2e-16, 0.5) == bridge(VE(), 1.0, 0.5)
    assert ml_coefficients(SubVP(), torch.tensor(0.5), 0) == ml_coefficients(SubVP(), 0.5, 0.0)


@pytest.mark.parametrize("sde", [VP(), VP(3.0, 3.0), SubVP(), VE(), Cosine()], ids=str)
def test_small_step_limits(sde):
    """kappa = -(beta'/2 beta) h, omega = (beta/8 - beta'/4 beta) h and sigma^2 = g^2 h, to the next order."""
    t, small = 0.6, 1e-4
    expected_kappa = expected_omega = None
    if isinstance(sde, VP):
        beta, slope = sde.b0 + (sde.b1 - sde.b0) * t, sde.b1 - sde.b0
        expected_kappa, expected_omega = -slope / (2 * beta), beta / 8 - slope / (4 * beta)
    elif isinstance(sde, VE):
        expected_kappa, expected_omega = -math.log(sde.sigma_max / sde.sigma_min), 0.0
    values = {h: ml_coefficients(sde, t, t - h) for h in (small, 2 * small)}
    for index, expected in enumerate((expected_kappa, expected_omega)):
        slopes = [values[h][index] / h for h in (small, 2 * small)]
        limit = 2 * slopes[0] - slopes[1]  # what is left is of second order in h
        assert abs(limit) < 50  # it exists
        assert abs(slopes[0] - slopes[1]) < 0.1 * max(1.0, abs(limit))  # and the slope is 1
        if expected is not None:
            assert limit == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert values[small][2] == pytest.approx(math.sqrt(sde.diffusion2(t) * small), rel=2e-3)


# --- part (i): optimality -------------------------------------------------------------------------------------------


def sampled_step(sde, t, s, n, seed=0):
    x0 = MIXTURE.sample(n, torch.Generator().manual_seed(seed))
    x_t, x_s = forward_paths(x0, sde, [t, s], generator=torch.Generator().manual_seed(seed + 1))
    data_var = float(MIXTURE.posterior(x_t, t, sde)[1].mean())
    return x_t, MIXTURE.score(x_t, t, sde), x_s, data_var


@pytest.mark.parametrize(
    ("sde", "t", "s"), [(VP(), 0.5, 0.2), (SubVP(), 0.4, 0.1), (VE(0.01, 5.0), 0.9, 0.6), (CHAIN, 0.8, 0.4)]
)
def test_regression_finds_the_theorem(sde, t, s):
    x_t, score, x_s, data_var = sampled_step(sde, t, s, 40_000)
    A, D, S = ml_step(sde, t, s, data_var)
    found = fit_step(x_t, score, x_s)
    design = torch.stack([x_t.flatten(), score.flatten()], 1)
    residual = x_s.flatten() - design @ torch.tensor([A, D], dtype=torch.float64)
    bread = torch.linalg.inv(design.T @ design)
    errors = (bread @ (design.T * residual**2) @ design @ bread).diagonal().sqrt()  # heteroscedastic standard errors
    assert abs(found[0] - A) < 4 * float(errors[0])
    assert abs(found[1] - D) < 4 * float(errors[1])
    assert abs(found[2] ** 2 - S**2) < 4 * float((residual**2).std()) / math.sqrt(len(residual))
    # the bands above are narrow enough to tell the optimum from its neighbours
    assert 4 * float(errors[0]) < 0.1 * A
    assert 4 * float(errors[1]) < 0.1 * D
    assert S**2 > 1.01 * ml_step(sde, t, s)[2] ** 2


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 5.0)], ids=str)
def test_gradient_is_zero_and_curvature_negative_at_the_theorem(sde):
    t, s = 0.5, 0.25
    x_t, score, x_s, data_var = sampled_step(sde, t, s, 20_000, seed=7)
    paths = torch.stack([x_t, x_s])
    kappa, omega, sigma = ml_coefficients(sde, t, s, data_var)
    h, squared = t - s, sde.diffusion2(t)

    def likelihood(coefficients):
        def step(sde, t, s):
            kappa, omega, log_sigma = coefficients
            return 1 + h * (-sde.drift(t) + squared * omega), h * squared * (1 + kappa), log_sigma.exp()

        return path_log_likelihood(paths, lambda x, t: score, sde, [t, s], step)

    star = torch.tensor([kappa, omega, math.log(sigma)], dtype=torch.float64)

    def gradient(coefficients):  # (B, 3): a copy of the coefficients for each path, so that one pass gives all
        copies = coefficients.expand(len(x_t), 3).clone().requires_grad_()
        return torch.autograd.grad(likelihood(copies.T[..., None]).sum(), copies)[0]

    each = gradient(star)
    error = each.std(0) / math.sqrt(len(each))
    assert bool((each.mean(0).abs() < 4 * error).all()), each.mean(0) / error
    hessian = torch.autograd.functional.hessian(lambda c: likelihood(c).mean(), star)
    assert float(torch.linalg.eigvalsh(hessian).max()) < 0
    # and the shipped sigma, without the data term, is told apart: there the gradient is far from zero
    shipped = star.clone()
    shipped[2] = math.log(ml_step(sde, t, s)[2])
    away = gradient(shipped)[:, 2]
    assert float(away.mean()) > 20 * float(away.std()) / math.sqrt(len(away))


def test_whole_paths_are_likeliest_under_the_theorem():
    sde, times = VP(), [1.0, 0.7, 0.4, 0.2, 0.05]
    generator = torch.Generator().manual_seed(3)
    paths = forward_paths(MIXTURE.sample(4000, generator), sde, times, generator=generator)
    data_var = {t: float(MIXTURE.posterior(x, t, sde)[1].mean()) for t, x in zip(times, paths, strict=True)}

    def score(x, t):
        return MIXTURE.score(x, float(t[0]), sde)

    best = path_log_likelihood(paths, score, sde, times, partial(ml_step, data_var=lambda t: data_var[t]))
    for rule in (ml_step, euler_maruyama, partial(ddim, eta=1.0)):
        difference = best - path_log_likelihood(paths, score, sde, times, rule)
        assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(len(difference))


def test_likelihood_is_that_of_torch():
    sde, times = SubVP(), [0.9, 0.5, 0.2]
    paths = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    for i, (t, s) in enumerate([(0.9, 0.5), (0.5, 0.2)]):
        A, D, S = euler_maruyama(sde, t, s)
        expected += Normal(A * paths[i] + D * paths[i].sin() * t, S).log_prob(paths[i + 1]).sum((1, 2))
    found = path_log_likelihood(paths, lambda x, t: x.sin() * t[:, None, None], sde, times, euler_maruyama)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    numbers = path_log_likelihood(paths[:, :, 0, 0], lambda x, t: -x, sde, times, ml_step)
    assert numbers.shape == (4,)  # items may be plain numbers


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 3.0), CHAIN, Cosine()], ids=repr)
def test_forward_paths_have_the_kernel_and_the_transition(sde):
    times = [0.95, 0.7, 0.2]
    x0 = torch.full((40_000, 1), 0.7, dtype=torch.float64)
    paths = forward_paths(x0, sde, times, generator=torch.Generator().manual_seed(5))[..., 0]
    assert paths.dtype == torch.float64
    for t, x in zip(times, paths, strict=True):
        spread = math.sqrt(sde.v(t))
        assert abs(float(x.mean()) - sde.a(t) * 0.7) < 4 * spread / 200
        assert abs(float(x.std()) / spread - 1) < 4 / math.sqrt(2 * 40_000)
    for late, early, t, s in zip(paths, paths[1:], times, times[1:], strict=False):
        covariance = float(torch.cov(torch.stack([late, early]))[0, 1])
        assert abs(covariance - sde.transition(t, s)[0] * sde.v(s)) < 6 * math.sqrt(sde.v(t) * sde.v(s)) / 200


def test_forward_paths_repeat_with_the_seed_and_start_from_data_at_zero():
    x0 = torch.randn(3, 2).half()
    runs = [forward_paths(x0, VP(), [1.0, 0.5, 0.0], generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*runs)
    assert runs[0].dtype == torch.float32
    assert torch.equal(runs[0][-1], x0.float())


# --- part (ii): exactness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_steps", [1, 2, 6, 30])
@pytest.mark.parametrize("var", [0.01, 0.25, 1.0, 4.0])
def test_full_step_is_exact_for_gaussian_data(family, num_steps, var):
    sde = FAMILIES[family]
    mean, found = gaussian_propagate(sde, full(sde, var), uniform_times(num_steps), 0.5, var)
    assert gaussian_kl(mean, found, 0.5, var) < 1e-12


@settings(max_examples=80, deadline=None)
@given(
    processes(),
    st.lists(st.floats(0.02, 0.98), max_size=6, unique=True),
    st.floats(0.02, 10.0),
    st.floats(-2, 2),
    st.booleans(),
)
def test_full_step_is_exact_on_any_grid_and_schedule(sde, between, var, mean, to_data):
    times = [1.0, *sorted(between, reverse=True), 0.0 if to_data else 0.01]
    assume(sde.v(0.01) > 1e-9)
    found_mean, found_var = gaussian_propagate(sde, full(sde, var), times, mean, var)
    end = times[-1]
    true_var = sde.a(end) ** 2 * var + sde.v(end)
    # 1 - L / Var(X_t) in the first step is a difference: its digits are those of 1 / alpha^2
    assert gaussian_kl(found_mean, found_var, sde.a(end) * mean, true_var) < 1e-12 / min(1.0, sde.a(1.0))


def test_full_step_is_exact_on_a_chain():
    for times in (CHAIN.times[::-1], [1.0, 0.5, 0.3, 0.0], [1.0, 0.0]):
        found = gaussian_propagate(CHAIN, full(CHAIN, 0.3), times, -0.4, 0.3)
        assert gaussian_kl(*found, -0.4, 0.3) < 1e-24


@settings(max_examples=60, deadline=None)
@given(processes(), steps(), st.floats(0.02, 10.0))
def test_joint_law_is_exact(sde, times, var):
    """Mean, variance and covariance of a pair (X_t, X_s) under the step are those of the forward process."""
    t, s = times
    var_t, var_s = (sde.a(u) ** 2 * var + sde.v(u) for u in (t, s))
    A, D, S = full(sde, var)(sde, t, s)
    covariance = (A - D / var_t) * var_t
    assert math.isclose(covariance, sde.transition(t, s)[0] * var_s, rel_tol=1e-6, abs_tol=1e-9 * var_t)
    assert math.isclose((A - D / var_t) ** 2 * var_t + S**2, var_s, rel_tol=1e-6)


def test_constant_data_need_no_data_term():
    for sde in FAMILIES.values():
        for end in (0.3, 0.0):
            mean, var = gaussian_propagate(sde, ml_step, [1.0, 0.6, end], 0.8, 0.0)
            assert mean == pytest.approx(0.8 * sde.a(end), rel=1e-9)
            assert var == pytest.approx(sde.v(end), rel=1e-9, abs=1e-15)


def test_shipped_form_loses_to_euler_maruyama_when_steps_are_many():
    """Without the data term the output has too little variance, however many steps; Euler-Maruyama gets better."""

    def kl(rule, num_steps, var):
        return gaussian_kl(*gaussian_propagate(VP(), ONE_STEP[rule], uniform_times(num_steps), 0.5, var), 0.5, var)

    assert kl("ml", 30, 0.25) == pytest.approx(0.0284, rel=0.01)
    assert kl("em", 30, 0.25) == pytest.approx(9.5e-4, rel=0.01)
    assert kl("em", 6, 0.01) > 50 > 2 > kl("ml", 6, 0.01)  # with few steps and narrow data it is the other way round


def test_coordinates_of_different_variance_are_not_exact():
    var = torch.tensor([0.05, 1.0], dtype=torch.float64)
    sde, zero = VP(), torch.zeros(2, dtype=torch.float64)
    laws = [gaussian_propagate(sde, full(sde, var), uniform_times(n), zero, var) for n in (2, 6, 30, 100)]
    kl = [gaussian_kl(*law, zero, var) for law in laws]
    assert kl[0] > kl[1] > kl[2] > kl[3] > 1e-6
    rounded = gaussian_propagate(sde, full(sde, 0.5), uniform_times(2), zero, torch.tensor([0.5, 0.5]).double())
    assert gaussian_kl(*rounded, zero, torch.tensor([0.5, 0.5])) < 1e-12


def test_propagation_is_elementwise_and_starts_where_told():
    means, variances = np.array([0.1, -0.3]), np.array([0.2, 1.5])
    together = gaussian_propagate(VE(), ddim, uniform_times(5), means, variances)
    for i in range(2):
        alone = gaussian_propagate(VE(), ddim, uniform_times(5), means[i], variances[i])
        np.testing.assert_allclose([together[0][i], together[1][i]], alone, rtol=1e-13)
    sde = VP()
    true, wrong = (gaussian_propagate(sde, ml_step, [0.5, 0.0], 0.5, 0.2, start=start) for start in (None, (3.0, 2.0)))
    gain = sde.a(0.5) * 0.2 / (sde.a(0.5) ** 2 * 0.2 + sde.v(0.5))  # of the best guess of X_0
    assert true[0] == pytest.approx(0.5, rel=1e-12)
    assert wrong[0] == pytest.approx(0.5 + gain * (3.0 - sde.a(0.5) * 0.5), rel=1e-12)
    assert wrong[1] == pytest.approx(2.0 * gain**2, rel=1e-12)


def test_propagation_agrees_with_simulation():
    sde, mean, var, times = VP(), 0.5, 0.25, uniform_times(4)
    generator = torch.Generator().manual_seed(2)
    n = 100_000
    x = sde.a(1.0) * mean + math.sqrt(sde.a(1.0) ** 2 * var + sde.v(1.0)) * torch.randn(n, generator=generator).double()
    for t, s in pairwise(times):
        A, D, S = euler_maruyama(sde, t, s)
        score = (sde.a(t) * mean - x) / (sde.a(t) ** 2 * var + sde.v(t))
        x = A * x + D * score + S * torch.randn(n, generator=generator).double()
    found = gaussian_propagate(sde, euler_maruyama, times, mean, var)
    assert abs(float(x.mean()) - found[0]) < 4 * math.sqrt(found[1] / n)
    assert abs(float(x.var()) / found[1] - 1) < 4 * math.sqrt(2 / n)


@settings(max_examples=40, deadline=None)
@given(st.floats(-5, 5))
def test_gaussian_data_have_a_line_of_optima(amount):
    sde, t, s, var = VP(), 0.6, 0.3, 0.5

    def shifted(sde, t, s):
        A, D, S = full(sde, var)(sde, t, s)
        return A + amount, D + amount * (sde.a(t) ** 2 * var + sde.v(t)), S

    found = gaussian_propagate(sde, shifted, [t, s], 0.0, var)
    assert gaussian_kl(*found, 0.0, sde.a(s) ** 2 * var + sde.v(s)) < 1e-20 * max(1.0, amount**4)


def test_a_mixture_has_one_optimum():
    sde, t, s = (
        VP(),
        0.2,
        0.1,
    )  # early enough that the three components are apart: near t = 1 any law is nearly Gaussian
    x_t, score, x_s, data_var = sampled_step(sde, t, s, 4000)
    A, D, S = ml_step(sde, t, s, data_var)
    slope = -float((x_t * score).sum() / (score * score).sum())  # along (1, slope) the step changes least

    def likelihood(amount):
        def step(sde, t, s):
            return A + amount, D + amount * slope, S

        return path_log_likelihood(torch.stack([x_t, x_s]), lambda x, t: score, sde, [t, s], step)

    for amount in (-0.5, 0.5):
        difference = likelihood(0.0) - likelihood(amount)
        assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(len(difference))


# --- the data term --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.01, 5.0), CHAIN], ids=repr)
@pytest.mark.parametrize("t", [0.2, 0.45, 0.8])
def test_estimate_agrees_with_the_posterior(sde, t):
    x0 = MIXTURE.sample(50_000, torch.Generator().manual_seed(1))
    (x_t, _) = forward_paths(x0, sde, [t, 0.0], generator=torch.Generator().manual_seed(2))
    score = MIXTURE.score(x_t, t, sde)
    factor = sde.v(t) / sde.a(t) ** 2
    error = factor * sde.v(t) * float(score.square().mean(1).std()) / math.sqrt(len(score))
    truth = MIXTURE.posterior(x_t, t, sde)[1]
    error += float(truth.std()) / math.sqrt(len(truth))
    assert abs(estimate_data_var(score, t, sde) - float(truth.mean())) < 4 * error
    assert estimate_data_var(score, t, sde) <= factor


@settings(max_examples=60, deadline=None)
@given(processes(), st.floats(0.01, 1.0), st.floats(0.05, 5.0))
def test_estimate_is_exact_when_the_mean_square_is(sde, t, var):
    total = sde.a(t) ** 2 * var + sde.v(t)
    score = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / math.sqrt(total)  # the mean square is right: 1 / total
    expected = gaussian_data_var(sde, t, var)
    # 1 - v / total is a difference, multiplied by v / a^2
    assert abs(estimate_data_var(score, t, sde) - expected) < 1e-14 * (1 + sde.v(t) / sde.a(t) ** 2)
    assert estimate_data_var(score, t, sde, at_most=expected / 2) == expected / 2


def test_estimate_counts_what_the_mask_leaves():
    sde, t = VP(), 0.4
    score = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 0.5
    mask = torch.tensor([[[1.0, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]]])
    kept = torch.cat([score[0].flatten(), score[1, :, :3].flatten()])
    score[1, :, 3:] = math.nan  # what does not count may be anything
    assert estimate_data_var(score, t, sde, mask) == pytest.approx(estimate_data_var(kept, t, sde), rel=1e-12)
    assert estimate_data_var(100 * kept, t, sde) == 0.0  # longer than any exact score
    half = estimate_data_var(kept.half(), t, sde)
    assert half == pytest.approx(estimate_data_var(kept, t, sde), rel=1e-2)
    leaf = kept.clone().requires_grad_()
    assert isinstance(estimate_data_var(leaf, t, sde), float)


def test_gaussian_data_variance():
    assert gaussian_data_var(VP(), 0.5, np.array([0.1, 0.7])) == pytest.approx(
        (gaussian_data_var(VP(), 0.5, 0.1) + gaussian_data_var(VP(), 0.5, 0.7)) / 2, rel=1e-14
    )
    assert gaussian_data_var(VE(), 0.0, 0.0) == 0.0
    x = torch.linspace(-2, 2, 5)[:, None].double()
    truth = GaussianMixture(torch.zeros(1, 1).double(), 0.5).posterior(x, 0.3, VP())[1]
    torch.testing.assert_close(truth, torch.full((5,), gaussian_data_var(VP(), 0.3, 0.25)).double(), rtol=1e-6, atol=0)


# --- older formulas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 4, 7])
def test_identity_with_ddpm_and_analytic_dpm(stride):
    """Ancestral sampling, its two variances, and Analytic-DPM's optimum, each written out as its paper has it."""
    grid = sorted({*range(0, CHAIN.num_steps + 1, stride), CHAIN.num_steps})
    bars = [1.0, *CHAIN.alphas_bar]
    for before, after in pairwise(grid):
        bar, bar_before = bars[after], bars[before]
        t, s = after / CHAIN.num_steps, before / CHAIN.num_steps
        step_beta = 1 - bar / bar_before
        A, D, small = ml_step(CHAIN, t, s)
        # mean: (x - beta / sqrt(1 - bar) noise) / sqrt(alpha), and noise = -sqrt(1 - bar) score
        assert pytest.approx(1 / math.sqrt(1 - step_beta), rel=1e-12) == A
        assert pytest.approx(step_beta / math.sqrt(1 - step_beta), rel=1e-12) == D
        assert small**2 == pytest.approx(step_beta * (1 - bar_before) / (1 - bar), rel=1e-12, abs=1e-300)  # fixed_small
        large = ml_step(CHAIN, t, s, gaussian_data_var(CHAIN, t, 1.0))[2]
        assert large**2 == pytest.approx(step_beta, rel=1e-12)  # fixed_large: data of variance 1
        score = torch.randn(50, 3, generator=torch.Generator().manual_seed(after)).double() * 0.6
        mean_square = float(score.square().mean())
        optimum = small**2 + (math.sqrt((1 - bar) * bar_before / bar) - math.sqrt(1 - bar_before - small**2)) ** 2 * (
            1 - (1 - bar) * mean_square
        )
        found = ml_step(CHAIN, t, s, estimate_data_var(score, t, CHAIN))[2]
        assert found**2 == pytest.approx(optimum, rel=1e-10)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_step_of_diffusers(variance_type):
    scheduler = DDPMScheduler(100, beta_schedule="linear", variance_type=variance_type, clip_sample=False)
    chain = DiscreteVP(scheduler.alphas_cumprod)
    x, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for k in (100, 57, 2):
        theirs = scheduler.step(noise, k - 1, x, generator=torch.Generator().manual_seed(k)).prev_sample
        xi = torch.randn(3, 4, generator=torch.Generator().manual_seed(k))
        data_var = gaussian_data_var(chain, k / 100, 1.0) if variance_type == "fixed_large" else 0.0
        A, D, S = ml_step(chain, k / 100, (k - 1) / 100, data_var)
        ours = A * x + D * (-noise / math.sqrt(chain.v(k / 100))) + S * xi
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # theirs is float32 from betas to sample


# --- divergence and regression --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(0.01, 10), st.floats(-3, 3), st.floats(0.01, 10))
def test_divergence_is_that_of_torch(mean, var, mean2, var2):
    first, second = (
        Normal(torch.tensor(m, dtype=torch.float64), torch.tensor(v, dtype=torch.float64).sqrt())
        for m, v in ((mean, var), (mean2, var2))
    )
    expected = float(kl_divergence(first, second))
    assert gaussian_kl(mean, var, mean2, var2) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_divergence_of_close_and_of_degenerate_laws():
    assert gaussian_kl(0.0, 1 + 1e-7, 0.0, 1.0) == pytest.approx(1e-14 / 4, rel=1e-6)  # (excess / 2)^2, no cancellation
    assert gaussian_kl(0.0, 0.0, 0.0, 1.0) == math.inf
    assert gaussian_kl([0.0, 1.0], 1.0, 0.0, [1.0, 1.0]) == 0.5  # sum over coordinates


def test_regression_of_collinear_and_scaled_samples():
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double()
    A, D, S = fit_step(x, -2 * x, 5 * x)
    assert A - 2 * D == pytest.approx(5, rel=1e-10)  # a line of optima; any point of it predicts
    assert S == pytest.approx(0, abs=1e-10)
    other = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1)).double()
    found = fit_step(1e6 * x, 1e-6 * other, 3e6 * x + 2e-6 * other)  # columns of very different size, as at t near 1
    assert found[0] == pytest.approx(3, rel=1e-9)
    assert found[1] == pytest.approx(2, rel=1e-3)


# --- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [ml_step, ml_coefficients, bridge])
@pytest.mark.parametrize(
    ("t", "s", "message"),
    [
        (0.5, 0.5, "got t = 0.5, s = 0.5; give 0 <= s < t <= 1"),
        (0.2, 0.5, "swapped"),
        (0.0, 0.0, "got t = 0, s = 0"),
        (0.5, -0.1, "s = -0.1"),
        (1.1, 0.5, "t = 1.1"),
        (math.nan, 0.5, "t = nan"),
        (0.5, math.nan, "s = nan"),
        (math.inf, 0.5, "t = inf"),
    ],
)
def test_times_at_the_door(function, t, s, message):
    with pytest.raises(ValueError, match=message):
        function(VP(), t, s)
    with pytest.raises(TypeError, match="a time is a str; give a number"):
        function(VP(), "1.0", s)


@pytest.mark.parametrize("function", [ml_step, ml_coefficients])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf, lambda t: -t, lambda t: math.nan])
def test_data_variance_at_the_door(function, value):
    with pytest.raises(ValueError, match=r"data_var = .* at t = 0.5; a mean variance is finite and >= 0"):
        function(VP(), 0.5, 0.2, value)


def test_coefficients_need_continuous_time():
    with pytest.raises(TypeError, match="use ml_step"):
        ml_coefficients(CHAIN, 1.0, 0.5)
    with pytest.raises(ValueError, match="lies between two of the K = 20 steps"):
        ml_step(CHAIN, 0.51, 0.5)


def test_a_step_across_which_nothing_is_left():
    with pytest.raises(ValueError, match=r"t = 1 holds nothing of X_s at s = 0 .*take smaller steps"):
        ml_step(Forgetful(), 1.0, 0.0)


@pytest.mark.parametrize("times", [5, [1.0], [], [0.0, 0.5, 1.0], [1.0, 0.5, 0.5], [1.0, math.nan]])
def test_grids_at_the_door(times):
    with pytest.raises(ValueError, match=r"decreasing grid|0 <= s < t <= 1"):
        gaussian_propagate(VP(), ml_step, times, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"decreasing grid|0 <= s < t <= 1"):
        forward_paths(torch.zeros(2, 2), VP(), times)


def test_paths_at_the_door():
    paths = torch.zeros(3, 2, 2)
    with pytest.raises(ValueError, match="3 states for 2 times"):
        path_log_likelihood(paths, lambda x, t: x, VP(), [1.0, 0.5], ml_step)
    with pytest.raises(ValueError, match=r"from t = 0.5 to s = 0 adds no noise \(S = 0\).*data_var > 0"):
        path_log_likelihood(paths, lambda x, t: x, VP(), [1.0, 0.5, 0.0], ml_step)


def test_samples_and_scores_at_the_door():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"\(4, 2\), \(4, 2\), \(3, 2\)"):
        fit_step(x, x, x[:3])
    with pytest.raises(ValueError, match="not finite"):
        fit_step(x, x * math.nan, x)
    for t in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="give 0 < t <= 1"):
            estimate_data_var(x, t, VP())
    with pytest.raises(ValueError, match="no entry of the score counts"):
        estimate_data_var(x, 0.5, VP(), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="no entry of the score counts"):
        estimate_data_var(x[:0], 0.5, VP())
    with pytest.raises(ValueError, match=r"score at t = 0.5 holds NaN or infinity"):
        estimate_data_var(x * math.nan, 0.5, VP())
    with pytest.raises(ValueError, match="at_most = -1"):
        estimate_data_var(x, 0.5, VP(), at_most=-1.0)
    with pytest.raises(ValueError, match="at_most = nan"):
        estimate_data_var(x, 0.5, VP(), at_most=math.nan)


def test_variances_at_the_door():
    for var, var2 in ((-0.1, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="give var >= 0 and var2 > 0"):
            gaussian_kl(0.0, var, 0.0, var2)
    for values in ((math.nan, 1.0, 0.0, 1.0), (0.0, math.inf, 0.0, 1.0)):
        with pytest.raises(ValueError, match="not finite"):
            gaussian_kl(*values)
    with pytest.raises(ValueError, match="finite and at least 0"):
        gaussian_data_var(VP(), 0.5, -1.0)
