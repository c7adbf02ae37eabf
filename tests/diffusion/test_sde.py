"""Linear SDEs: coefficients against 60 digits, kernels against paths, scores against quadrature; bad input."""

import math
import pickle
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from oral4.diffusion.sde import (
    VE,
    VP,
    DiscreteVP,
    GaussianMixture,
    LinearSDE,
    SubVP,
    diffuse,
    score_matching_loss,
    transition_reference,
    tweedie,
)

SOLVERS = np.load(Path(__file__).parents[1] / "goldens/diffvc/solver_reference.npz")
CONTINUOUS = [VP(), SubVP(), VE(), VP(0.1, 20.0), VP(2.0, 0.5), SubVP(0.0, 7.0), VE(0.3, 4.0)]
CHAIN = DiscreteVP.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
ALL = [*CONTINUOUS, CHAIN]

vp = st.builds(VP, st.floats(0, 50), st.floats(0.01, 200))
sub_vp = st.builds(SubVP, st.floats(0, 50), st.floats(0.01, 200))
ve = st.builds(lambda low, ratio: VE(low, low * ratio), st.floats(1e-4, 1), st.floats(1.5, 1e6))
sdes = st.one_of(vp, sub_vp, ve)
grid_times = st.integers(0, 1000).map(lambda k: k / 1000)


@st.composite
def time_pairs(draw):
    """t > s, from far apart to the last digit."""
    t = draw(st.floats(1e-6, 1))
    s = t - t * 10 ** draw(st.floats(-15, 0))
    assume(s < t)
    return t, max(s, 0.0)


def exact(sde, t, s=0.0):
    """(alpha, L, f, g^2) of the transition from s to t in 60 digits, by their definitions; (a, v, f, g^2) for s = 0."""
    with localcontext() as context:
        context.prec = 60
        t, s = Decimal(t), Decimal(s)
        if isinstance(sde, VE):
            low, high = Decimal(sde.sigma_min), Decimal(sde.sigma_max)

            def variance(time):
                return low**2 * ((2 * time * (high / low).ln()).exp() - 1)

            growth = 2 * (high / low).ln() * low**2 * (2 * t * (high / low).ln()).exp()
            return Decimal(1), variance(t) - variance(s), Decimal(0), growth
        b0, b1 = Decimal(sde.b0), Decimal(sde.b1)

        def integral(time):
            return b0 * time + (b1 - b0) * time * time / 2

        def kernel(time):
            left = 1 - (-integral(time)).exp()
            return (-integral(time) / 2).exp(), left if isinstance(sde, VP) else left**2

        beta = b0 + (b1 - b0) * t
        share = Decimal(1) if isinstance(sde, VP) else 1 - (-2 * integral(t)).exp()
        (a_t, v_t), (a_s, v_s) = kernel(t), kernel(s)
        alpha = a_t / a_s
        return alpha, v_t - alpha * alpha * v_s, -beta / 2, beta * share


def off(value, truth):
    """Relative error, also when the truth is 0."""
    return abs(Decimal(value) - truth) / abs(truth) if truth else abs(Decimal(value))


# --- coefficients ---------------------------------------------------------------------------------------------------


@given(sdes, time_pairs())
@settings(max_examples=300, deadline=None)
def test_transitions_keep_their_digits_however_close_the_times(sde, times):
    t, s = times
    alpha, variance, _, _ = exact(sde, t, s)
    found = sde.transition(t, s)
    assert off(found[0], alpha) < 1e-13  # the exponent is up to 100, with an error of a few units in its last place
    assert off(found[1], variance) < 1e-13


@given(sdes, st.floats(1e-9, 1))
@settings(max_examples=200, deadline=None)
def test_kernel_drift_and_diffusion_keep_their_digits(sde, t):
    for found, truth in zip((sde.a(t), sde.v(t), sde.drift(t), sde.diffusion2(t)), exact(sde, t), strict=True):
        assert off(found, truth) < 1e-13


def test_the_definition_loses_the_digits_that_the_closed_forms_keep():
    for sde in (VP(), SubVP(), VE()):
        t, s = 0.5 + 1e-11, 0.5
        truth = exact(sde, t, s)[1]
        assert off(sde.transition(t, s)[1], truth) < 1e-13
        assert off(transition_reference(sde, t, s)[1], truth) > 1e-7


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_transition_is_its_definition_where_that_is_sound(sde):
    for t, s in [(1.0, 0.1), (0.9, 0.5), (0.7, 0.2), (0.3, 0.1)]:
        np.testing.assert_allclose(sde.transition(t, s), transition_reference(sde, t, s), rtol=1e-11, atol=0)


@given(st.one_of(sdes, st.just(CHAIN)), st.lists(grid_times, min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_transitions_compose(sde, times):
    u, s, t = sorted(times)
    (late, late_var), (early, early_var), (both, both_var) = (
        sde.transition(*pair) for pair in ((t, s), (s, u), (t, u))
    )
    np.testing.assert_allclose(late * early, both, rtol=1e-12, atol=0)
    np.testing.assert_allclose(late_var + late**2 * early_var, both_var, rtol=1e-12, atol=0)  # a sum of positive terms


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_kernel_is_the_transition_from_the_data(sde):
    assert (sde.a(0.0), sde.v(0.0)) == (1.0, 0.0)
    for t in (0.0, 0.001, 0.5, 1.0):
        np.testing.assert_allclose(sde.transition(t, 0.0), (sde.a(t), sde.v(t)), rtol=1e-14, atol=0)
        assert sde.transition(t, t) == (1.0, 0.0)
    assert sde.prior_std() == math.sqrt(sde.v(1.0))


@given(sdes, st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_kernel_solves_the_equations_of_mean_and_variance(sde, t):
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sde.a(time), time) if not isinstance(sde, VE) else (torch.zeros(()),)
    np.testing.assert_allclose(float(slope), sde.drift(t) * sde.a(t), rtol=1e-10)  # a' = f a
    (slope,) = torch.autograd.grad(sde.v(time), time)
    expected = 2 * sde.drift(t) * sde.v(t) + sde.diffusion2(t)  # v' = 2 f v + g^2, a difference for VP
    np.testing.assert_allclose(float(slope), expected, rtol=1e-10, atol=1e-12 * sde.diffusion2(t))


@pytest.mark.parametrize("sde", CONTINUOUS, ids=repr)
def test_euler_moments_approach_the_kernel_at_first_order(sde):
    def error(num_steps):
        mean, variance, h = 1.0, 0.0, 0.8 / num_steps
        times = h * torch.arange(num_steps, dtype=torch.float64)
        for drift, entering in zip(sde.drift(times).tolist(), sde.diffusion2(times).tolist(), strict=True):
            mean *= 1 + drift * h
            variance = variance * (1 + drift * h) ** 2 + entering * h
        return abs(variance / sde.v(0.8) - 1), abs(mean / sde.a(0.8) - 1)

    for coarse, fine in zip(error(4000), error(8000), strict=True):
        assert fine < 0.02
        assert fine == 0 or 1.8 < coarse / fine < 2.2  # VE: the mean never moves


def test_steps_of_an_independent_implementation():
    families = {"vp": VP(), "subvp": SubVP(), "ve": VE(0.01, 50.0)}
    count = 0
    for name, (t, s, x_factor, score_factor, std) in zip(SOLVERS["step_names"], SOLVERS["steps"], strict=True):
        family, kind, _ = name.split("/")
        if kind == "ml":
            sde, count = families[family], count + 1
            alpha, variance = sde.transition(t, s)
            found = (1 / alpha, variance / alpha, math.sqrt(sde.v(s) * variance / sde.v(t)))
            np.testing.assert_allclose(found, (x_factor, score_factor, std), rtol=1e-9, atol=1e-15)
    assert count >= 30


# --- the discrete chain ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-6, 0.5), min_size=1, max_size=40), st.data())
@settings(max_examples=100, deadline=None)
def test_chain_is_the_product_of_its_steps(betas, data):
    chain = DiscreteVP.from_betas(betas)
    k, j = sorted((data.draw(st.integers(0, len(betas))), data.draw(st.integers(0, len(betas)))), reverse=True)
    with localcontext() as context:
        context.prec = 60
        left = Decimal(1)
        for beta in betas[j:k]:
            left *= 1 - Decimal(beta)
        variance = 1 - left
    alpha, found = chain.transition(k / len(betas), j / len(betas))
    assert off(alpha**2, left) < 1e-12
    # alphas_bar are stored as floats near 1: a variance of beta is known to 1e-16 / beta
    assert abs(Decimal(found) - variance) < Decimal(len(betas) * 1e-15)


def test_chain_sampled_from_a_process_is_that_process_on_the_grid():
    grid = torch.arange(1, 51, dtype=torch.float64) / 50
    chain = DiscreteVP(VP().a(grid) ** 2)
    for k, j in [(50, 49), (50, 0), (7, 3), (1, 0)]:
        np.testing.assert_allclose(chain.transition(k / 50, j / 50), VP().transition(k / 50, j / 50), rtol=1e-11)
    assert chain.num_steps == 50
    assert chain.times == [k / 50 for k in range(51)]


def test_posterior_of_the_chain_is_the_one_of_ddpm():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    for k in (2, 500, 1000):
        _, variance = CHAIN.transition(k / 1000, (k - 1) / 1000)
        v_t, v_s, a_s = CHAIN.v(k / 1000), CHAIN.v((k - 1) / 1000), CHAIN.a((k - 1) / 1000)
        beta, now, before = betas[k - 1], kept[k - 1], kept[k - 2]
        np.testing.assert_allclose(a_s * variance / v_t, before.sqrt() * beta / (1 - now), rtol=1e-9)  # beta to 1e-12
        np.testing.assert_allclose(v_s * variance / v_t, (1 - before) / (1 - now) * beta, rtol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 3, 50, 1000, 4000])
def test_every_time_of_the_grid_is_on_it_in_float32_too(num_steps):
    chain = DiscreteVP.from_betas([1e-3] * num_steps)
    exact_times = torch.tensor(chain.times, dtype=torch.float64)
    expected = torch.tensor([1.0, *chain.alphas_bar], dtype=torch.float64).sqrt()
    torch.testing.assert_close(chain.a(exact_times), expected, rtol=0, atol=0)
    torch.testing.assert_close(chain.a(exact_times.float()).double(), expected, rtol=0, atol=1e-7)  # rounded to float32
    # a float64 tensor or a float between two steps is refused
    with pytest.raises(ValueError, match=f"between two of the K = {num_steps} steps"):
        chain.v(0.5 / num_steps)
    with pytest.raises(ValueError, match=f"between two of the K = {num_steps} steps"):
        chain.transition(1.0, torch.tensor([0.0, 1 - 0.3 / num_steps]))


@pytest.mark.parametrize("method", ["drift", "diffusion2"])
def test_chain_has_no_continuous_coefficients(method):
    with pytest.raises(TypeError, match="DiscreteVP has no"):
        getattr(CHAIN, method)(0.5)


@pytest.mark.parametrize(
    ("alphas_bar", "said"),
    [
        ([0.9, 0.9], r"alphas_bar\[1\] = 0.9 after 0.9"),
        ([0.5, 0.6], r"alphas_bar\[1\] = 0.6 after 0.5"),
        ([1.0, 0.5], r"alphas_bar\[0\] = 1.0 after 1.0"),
        ([0.5, 0.0], r"alphas_bar\[1\] = 0.0 .* leave the last step out"),
        ([0.5, -0.1], r"alphas_bar\[1\] = -0.1"),
        ([0.5, math.nan], r"alphas_bar\[1\] = nan"),
        ([], "K >= 1"),
        ([[0.5]], r"shape \(1, 1\)"),
    ],
)
def test_chain_refuses(alphas_bar, said):
    with pytest.raises(ValueError, match=said):
        DiscreteVP(alphas_bar)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [1.0], [math.nan], [[0.1]], []])
def test_chain_refuses_betas(betas):
    with pytest.raises(ValueError):
        DiscreteVP.from_betas(betas)


# --- times as numbers and as tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_tensors_and_floats_agree(sde):
    times = torch.tensor([[0.0, 0.25, 0.5], [0.75, 0.875, 1.0]], dtype=torch.float64)
    methods = [sde.a, sde.v] + ([sde.drift, sde.diffusion2] if sde is not CHAIN else [])
    for method in methods:
        found = method(times)
        expected = torch.tensor([[method(t) for t in row] for row in times.tolist()], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)  # a vector's exp may differ in the last digit
        assert method(times.float()).dtype == torch.float32
        torch.testing.assert_close(method(times.float()), expected.float(), rtol=2e-7, atol=0)
        assert method(times.half()).dtype == method(times.bfloat16()).dtype == torch.float32
        assert type(method(0.5)) is float
        assert method(np.float64(0.5)) == method(0.5)
    earlier = torch.tensor([0.0, 0.125], dtype=torch.float64)[:, None, None]
    alpha, variance = sde.transition(torch.tensor([0.25, 0.5, 1.0]), earlier)
    assert alpha.shape == variance.shape == (2, 1, 3)
    assert alpha.dtype == torch.float64
    assert (alpha[1, 0, 2].item(), variance[1, 0, 2].item()) == pytest.approx(sde.transition(1.0, 0.125), rel=1e-15)
    assert sde.transition(1, torch.tensor(0.5))[0].dtype == torch.float32
    assert sde.a(torch.tensor([0, 1])).tolist() == pytest.approx([1.0, sde.a(1.0)], rel=1e-6)


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_times_outside_by_rounding_are_moved_in(sde):
    last = 1 - 9 * 0.1 - 0.1
    assert last < 0
    assert sde.a(last) == 1
    assert sde.v(last) == 0
    assert sde.transition(0.1, last) == sde.transition(0.1, 0.0)
    assert sde.v(1 + 2e-16) == sde.v(1.0)
    assert sde.transition(0.3, 0.1 + 0.2) == (1.0, 0.0)  # s after t by one unit in the last place
    assert sde.v(torch.tensor([1 + 2e-7])).item() == pytest.approx(sde.v(1.0), rel=1e-6)


@pytest.mark.parametrize("sde", ALL, ids=repr)
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, -1e-9, 1 + 1e-9])
def test_times_outside_are_refused(sde, bad):
    for call in (
        sde.a,
        sde.v,
        lambda t: sde.transition(t, 0.0),
        lambda t: sde.a(torch.tensor([0.5, t], dtype=torch.float64)),
        lambda t: diffuse(torch.zeros(2, 3), torch.tensor([0.5, t], dtype=torch.float64), sde),
    ):
        with pytest.raises(ValueError, match=rf"t = {bad}.*from 0 \(data\) to 1 \(noise\)"):
            call(bad)
    with pytest.raises(ValueError, match=f"s = {bad}"):
        sde.transition(1.0, bad)


def test_wrong_order_and_wrong_types_are_refused():
    with pytest.raises(ValueError, match=r"s = 0.5 is after t = 0.4; .* swap"):
        VP().transition(0.4, 0.5)
    with pytest.raises(ValueError, match=r"s = 0.75 is after t = 0.5"):
        CHAIN.transition(torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.75]))
    for bad in ("0.5", None, [0.5], np.array([0.5]), 1j):
        with pytest.raises(TypeError, match=r"give a number or a torch\.Tensor"):
            VP().a(bad)
    with pytest.raises(TypeError, match="real"):
        VP().a(torch.tensor(0.5 + 0j))


@pytest.mark.parametrize("family", [VP, SubVP])
@pytest.mark.parametrize(
    "values", [(-0.1, 20), (0.05, 0.0), (0.05, -1), (math.nan, 20), (0.05, math.nan), (0.05, math.inf), (0.05, 400)]
)
def test_beta_is_checked(family, values):
    with pytest.raises(ValueError, match=r"b0.*b1"):
        family(*values)


@pytest.mark.parametrize("values", [(0, 1), (-1, 1), (1, 1), (2, 1), (math.nan, 1), (1, math.nan), (1, math.inf)])
def test_sigmas_are_checked(values):
    with pytest.raises(ValueError, match=r"sigma_min.*sigma_max"):
        VE(*values)


def test_processes_are_values():
    for sde in ALL:
        twin = pickle.loads(pickle.dumps(sde))
        assert twin == sde
        assert hash(twin) == hash(sde)
    assert VP() != SubVP()  # same numbers, another process
    assert VP() != VP(0.1, 20.0)
    with pytest.raises(AttributeError):
        VP().b0 = 1.0
    with pytest.raises(TypeError):
        LinearSDE()


def test_a_process_of_your_own_needs_two_functions():
    class Straight(LinearSDE):
        def _a(self, t):
            return 1 - 0.9 * t

        def _v(self, t):
            return t**2

    sde = Straight()
    np.testing.assert_allclose(sde.transition(0.8, 0.4), transition_reference(sde, 0.8, 0.4), rtol=1e-15)
    with pytest.raises(TypeError, match="Straight has no drift"):
        sde.drift(0.5)


# --- diffuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ALL, ids=repr)
def test_diffuse_is_the_kernel(sde):
    x0, noise = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    x_t, returned = diffuse(x0, t, sde, xbar=2.0, noise=noise)
    for item, time in enumerate(t.tolist()):
        expected = 2 + sde.a(time) * (x0[item] - 2) + math.sqrt(sde.v(time)) * noise[item]
        torch.testing.assert_close(x_t[item], expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(diffuse(x0[item], time, sde, xbar=2.0, noise=noise[item])[0], expected)
    torch.testing.assert_close(returned, noise, rtol=0, atol=0)
    torch.testing.assert_close(x_t[0], x0[0], rtol=0, atol=1e-15)  # t = 0: nothing happened; 2 + (x - 2) rounds
    # the times may be of a coarser type: the coefficients are still those of exactly these times
    torch.testing.assert_close(diffuse(x0, t.float(), sde, xbar=2.0, noise=noise)[0], x_t, rtol=0, atol=0)


def test_drawn_noise_has_the_kernel_s_moments():
    n = 40_000
    x_t, noise = diffuse(torch.full((n, 2), 3.0), 0.3, VP(), xbar=1.0, generator=torch.Generator().manual_seed(0))
    mean, std = 1 + 2 * VP().a(0.3), math.sqrt(VP().v(0.3))
    assert abs(x_t.mean().item() - mean) < 5 * std / math.sqrt(2 * n)
    assert abs(x_t.std().item() / std - 1) < 5 / math.sqrt(4 * n)
    assert abs(torch.corrcoef(noise.T)[0, 1].item()) < 5 / math.sqrt(n)


def test_one_seed_gives_one_noise_in_every_type():
    draws = [
        diffuse(torch.zeros(3, 4, dtype=dtype), 0.5, VP(), generator=torch.Generator().manual_seed(7))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    ]
    for x_t, noise in draws:
        torch.testing.assert_close(noise.float(), draws[0][1], rtol=0, atol=0)
        assert x_t.dtype == noise.dtype
    assert [x_t.dtype for x_t, _ in draws] == [torch.float32, torch.float64, torch.float32, torch.float32]
    state = torch.get_rng_state()
    diffuse(torch.zeros(3, 4), 0.5, VP(), generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


shifts = st.floats(-100, 100)


@given(sdes, st.floats(0.001, 1), shifts, shifts)
@settings(max_examples=100, deadline=None)
def test_shift_equivariance(sde, t, xbar, shift):
    generator = torch.Generator().manual_seed(1)
    x0, noise, x = torch.randn(3, 5, 2, dtype=torch.float64, generator=generator)
    loose = {"rtol": 1e-9, "atol": 1e-9}  # numbers of 100 beside differences of 1
    plain, _ = diffuse(x0, t, sde, xbar=xbar, noise=noise)
    moved, _ = diffuse(x0 + shift, t, sde, xbar=xbar + shift, noise=noise)
    torch.testing.assert_close(moved, plain + shift, **loose)
    centred, _ = diffuse(x0 - xbar, t, sde, noise=noise)
    torch.testing.assert_close(plain, centred + xbar, **loose)
    mixture, moved_mixture = (GaussianMixture(x0[:3] + by, 0.2) for by in (0.0, shift))
    score = mixture.score(x, t, sde, xbar=xbar)
    # the score divides by the variance, and the mean of the data by a: both enlarge the rounding of the shift
    enlarge = 1e-12 * (1 + abs(shift) + abs(xbar)) ** 2 / min(1.0, 0.04 * sde.a(t) ** 2 + sde.v(t)) ** 2
    torch.testing.assert_close(
        moved_mixture.score(x + shift, t, sde, xbar=xbar + shift), score, rtol=enlarge, atol=enlarge
    )
    data, moved_data = (tweedie(x + by, score, t, sde, xbar=xbar + by) for by in (0.0, shift))
    torch.testing.assert_close(moved_data, data + shift, rtol=1e-9, atol=1e-11 / sde.a(t))


def test_prior_mean_may_have_any_shape_that_broadcasts():
    x0, noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    xbar = torch.randn(3, 1)
    full, _ = diffuse(x0, 0.4, VP(), xbar=xbar.expand(4, 3, 5).clone(), noise=noise)
    torch.testing.assert_close(diffuse(x0, 0.4, VP(), xbar=xbar, noise=noise)[0], full)
    with pytest.raises(ValueError, match=r"xbar has shape \(3,\)"):
        diffuse(x0, 0.4, VP(), xbar=torch.zeros(3))
    with pytest.raises(ValueError, match=r"xbar has shape \(2, 4, 3, 5\)"):
        diffuse(x0, 0.4, VP(), xbar=torch.zeros(2, 4, 3, 5))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"t": torch.full((3,), 0.5)}, r"t has shape \(3,\)"),
        ({"t": torch.full((4, 1), 0.5)}, r"t has shape \(4, 1\)"),
        ({"t": 0.5, "noise": torch.zeros(4)}, r"noise has shape \(4,\)"),
        ({"t": torch.tensor([0.5]), "x0": torch.zeros(())}, r"t has shape \(1,\) for data of \(\)"),
    ],
)
def test_diffuse_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        diffuse(**{"x0": torch.zeros(4, 2), "sde": VP(), **arguments})


# --- mixtures and Tweedie -------------------------------------------------------------------------------------------

MEANS = torch.tensor([[-2.0, 0.5], [0.3, -1.0], [1.5, 2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@given(
    st.one_of(sdes, st.just(CHAIN)), st.integers(1, 1000).map(lambda k: k / 1000), st.floats(0.05, 2), st.floats(-3, 3)
)
@settings(max_examples=100, deadline=None)
def test_mixture_is_the_mixture_of_torch_and_its_gradient(sde, t, std, xbar):
    mixture = GaussianMixture(MEANS, std, WEIGHTS)
    a, v = sde.a(t), sde.v(t)
    x, _ = diffuse(MEANS[[0, 1, 2, 0, 1]], t, sde, xbar=xbar, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    components = Independent(Normal(xbar + a * (MEANS - xbar), math.sqrt(a**2 * std**2 + v)), 1)
    expected = MixtureSameFamily(Categorical(WEIGHTS), components).log_prob(x)
    found = mixture.log_prob(x, t, sde, xbar=xbar)
    # squared distances are expanded: their rounding, about 1e-15 |x|^2, is divided by the variance
    loose = 1e-10 + 1e-13 / (a**2 * std**2 + v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=loose)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    score = mixture.score(x.detach(), t, sde, xbar=xbar)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=loose / math.sqrt(a**2 * std**2 + v))


@given(
    st.one_of(sdes, st.just(CHAIN)), st.integers(1, 1000).map(lambda k: k / 1000), st.floats(0.0, 2), st.floats(-3, 3)
)
@settings(max_examples=100, deadline=None)
def test_tweedie_is_the_posterior_mean(sde, t, std, xbar):
    assume(sde.a(t) > 1e-3)  # what divides by a enlarges the rounding of x
    mixture = GaussianMixture(MEANS, std, WEIGHTS)
    x, _ = diffuse(MEANS[[0, 1, 2, 0, 1]], t, sde, xbar=xbar, generator=torch.Generator().manual_seed(0))
    mean, _ = mixture.posterior(x, t, sde, xbar=xbar)
    guess = tweedie(x, mixture.score(x, t, sde, xbar=xbar), t, sde, xbar=xbar)
    largest = x.abs().max().item()
    torch.testing.assert_close(guess, mean, rtol=1e-9, atol=1e-14 * (10 + largest) / sde.a(t))


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE(0.1, 10.0)], ids=repr)
@pytest.mark.parametrize("t", [0.02, 0.2, 0.6, 1.0])
def test_posterior_by_quadrature(sde, t):
    """Mean and variance of X_0 given X_t by Bayes' rule on a fine grid of X_0, which knows nothing of mixtures."""
    means, std, xbar = torch.tensor([[-1.0], [0.4], [2.0]], dtype=torch.float64), 0.3, 0.7
    grid = torch.linspace(-4, 5, 20001, dtype=torch.float64)
    prior = (WEIGHTS[:, None] * torch.exp(-((grid - means) ** 2) / (2 * std**2))).sum(0)
    x = torch.tensor([[-2.0], [0.1], [1.3], [4.0]], dtype=torch.float64)
    a, v = sde.a(t), sde.v(t)
    joint = prior * torch.exp(-((x - xbar - a * (grid - xbar)) ** 2) / (2 * v))
    weights = joint / joint.sum(1, keepdim=True)
    mean = weights @ grid
    variance = (weights * (grid - mean[:, None]) ** 2).sum(1)
    found_mean, found_variance = GaussianMixture(means, std, WEIGHTS).posterior(x, t, sde, xbar=xbar)
    # the trapezoid rule is exact to rounding for smooth functions that vanish at the ends
    torch.testing.assert_close(found_mean[:, 0], mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_variance, variance, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("std", [0.0, 0.4])
def test_posterior_variance_is_the_slope_of_the_mean(std):
    """Tr Var(X_0 | x) = (v / a) div E[X_0 | x], in any dimension: the second formula of Tweedie."""
    sde, t = VP(), 0.25
    mixture = GaussianMixture(torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), std)
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, variance = mixture.posterior(x, t, sde)
    for item in range(4):
        slope = torch.autograd.functional.jacobian(lambda y: mixture.posterior(y[None], t, sde)[0][0], x[item])
        expected = sde.v(t) / sde.a(t) * slope.trace() / 3
        torch.testing.assert_close(variance[item], expected, rtol=1e-9, atol=1e-12)


def test_many_points_in_float32_keep_their_digits():
    """Squared distances of 64 coordinates over a variance of 1e-3: computed in float32, they would spoil the shares."""
    points = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    mixture = GaussianMixture(points, 0.05)
    x, _ = diffuse(points[:20], 0.02, VP(), generator=torch.Generator().manual_seed(1))
    logits = -(x[:, None].double() - VP().a(0.02) * points.double()).square().sum(2)
    variance = VP().a(0.02) ** 2 * 0.05**2 + VP().v(0.02)
    shares = (logits / (2 * variance)).softmax(1)
    expected = (VP().a(0.02) * shares @ points.double() - x.double()) / variance
    found = mixture.score(x, 0.02, VP())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)
    assert mixture.score(x.bfloat16(), torch.full((20,), 0.02), VP()).dtype == torch.float32


def test_mixture_samples_have_its_moments():
    n = 50_000
    draws = GaussianMixture(MEANS, 0.2, WEIGHTS).sample(n, torch.Generator().manual_seed(0))
    mean = WEIGHTS @ MEANS
    spread = (WEIGHTS[:, None] * (MEANS - mean) ** 2).sum(0) + 0.2**2
    assert draws.shape == (n, 2)
    assert draws.dtype == torch.float64
    assert ((draws.mean(0) - mean).abs() < 5 * (spread / n).sqrt()).all()
    assert ((draws.var(0) / spread - 1).abs() < 5 * math.sqrt(3 / n)).all()
    one = GaussianMixture(MEANS, 0.0)
    assert {tuple(row) for row in one.sample(200, torch.Generator().manual_seed(0)).tolist()} == {
        tuple(row) for row in MEANS.tolist()
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3), 0.1), r"means \(3,\)"),
        ((torch.zeros(0, 2), 0.1), "K >= 1"),
        ((torch.tensor([[math.nan]]), 0.1), "finite"),
        ((MEANS, -0.1), "std = -0.1"),
        ((MEANS, math.nan), "std = nan"),
        ((MEANS, 0.1, torch.ones(2)), "give 3 positive"),
        ((MEANS, 0.1, torch.tensor([1.0, 0.0, 1.0])), "give 3 positive"),
        ((MEANS, 0.1, torch.tensor([1.0, math.nan, 1.0])), "give 3 positive"),
    ],
)
def test_mixture_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        GaussianMixture(*arguments)


def test_mixture_refuses_points_without_density_and_wrong_shapes():
    points = GaussianMixture(MEANS, 0.0)
    for t in (0.0, torch.tensor([0.5, 0.0])):
        with pytest.raises(ValueError, match="no density"):
            points.score(torch.zeros(2, 2), t, VP())
    for x in (torch.zeros(2), torch.zeros(4, 3)):
        with pytest.raises(ValueError, match=r"give \(B, 2\)"):
            points.log_prob(x, 0.5, VP())
    with pytest.raises(ValueError, match="n = 0"):
        points.sample(0)
    assert repr(points) == "GaussianMixture(K=3, D=2, std=0.0)"
    with pytest.raises(ValueError, match="score has shape"):
        tweedie(torch.zeros(2, 3), torch.zeros(2, 1), 0.5, VP())


# --- loss -----------------------------------------------------------------------------------------------------------

# Two signs of the data times two signs of the noise: exactly the moments of independent standard normals up to order
# two, which is all that the loss of an affine score depends on.
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


@given(
    st.one_of(sdes, st.just(CHAIN)), st.integers(1, 1000).map(lambda k: k / 1000), st.floats(0.1, 3), st.floats(-2, 2)
)
@settings(max_examples=100, deadline=None)
def test_loss_of_gaussian_data_is_minimal_at_the_score_with_the_value_of_theory(sde, t, std, mean):
    total = sde.a(t) ** 2 * std**2 + sde.v(t)
    slope, offset = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1 / total, sde.a(t) * mean / total)
    )
    x0, noise = mean + std * SIGNS[:, :1], SIGNS[:, 1:]
    loss = score_matching_loss(lambda x, t: slope * x + offset, x0, sde, t=t, noise=noise)
    torch.testing.assert_close(loss.item(), sde.a(t) ** 2 * std**2 / total, rtol=1e-9, atol=1e-12)
    for gradient in torch.autograd.grad(loss, (slope, offset)):
        scale = 10 * math.sqrt(sde.v(t)) * (1 + math.sqrt(total) + abs(mean))
        assert abs(gradient.item()) < 1e-12 * scale


def test_no_other_function_has_a_smaller_loss_on_a_mixture():
    sde, t, n = VP(), 0.2, 100_000
    mixture = GaussianMixture(MEANS, 0.3, WEIGHTS)
    x0 = mixture.sample(n, torch.Generator().manual_seed(0))
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(score):
        return score_matching_loss(score, x0, sde, t=t, noise=noise).item()

    def bump(x, t):
        return torch.stack([torch.sin(2 * x[:, 1]), x[:, 0].tanh()], 1)

    best, size = loss(lambda x, t: mixture.score(x, t, sde)), 0.1
    up, down = (loss(lambda x, t, by=by: mixture.score(x, t, sde) + by * bump(x, t)) for by in (size, -size))
    x_t, _ = diffuse(x0, t, sde, noise=noise)
    # Around the optimum the loss is best + size^2 v E|bump|^2 / n, and its slope is zero within the error of sampling.
    curvature = size**2 * sde.v(t) * bump(x_t, t).square().mean().item()
    assert (up + down) / 2 - best == pytest.approx(curvature, rel=1e-9)
    assert abs(up - down) / 2 < 5 * 2 * size * math.sqrt(sde.v(t) * best / (2 * n))
    # and the value is 1 - v E|score|^2 per coordinate
    score = mixture.score(x_t, t, sde)
    assert best == pytest.approx(1 - sde.v(t) * score.square().mean().item(), abs=5 * 2 / math.sqrt(2 * n))


def test_loss_is_its_formula_with_mask_and_prior_mean():
    generator = torch.Generator().manual_seed(0)
    x0, noise, xbar = torch.randn(3, 2, 4, 6, dtype=torch.float64, generator=generator)
    mask = torch.ones(2, 1, 6, dtype=torch.float64)
    mask[1, :, 4:] = 0
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    seen = {}

    def score(x, times):
        seen.update(x=x, times=times)
        return -0.7 * x

    found = score_matching_loss(score, x0, SubVP(), t=t, xbar=xbar, mask=mask, noise=noise)
    total = 0.0
    for item, time in enumerate(t.tolist()):
        a, v = SubVP().a(time), SubVP().v(time)
        kept = 6 if item == 0 else 4
        x_t = (xbar + a * (x0 - xbar) + math.sqrt(v) * noise)[item, :, :kept]
        total += ((math.sqrt(v) * -0.7 * x_t + noise[item, :, :kept]) ** 2).sum().item()
    assert found.item() == pytest.approx(total / (4 * (6 + 4)), rel=1e-13)
    assert (seen["x"][1, :, 4:] == 0).all()
    assert seen["times"].tolist() == [0.3, 0.8]
    garbage = x0.clone()
    garbage[1, :, 4:] = 1e6
    again = score_matching_loss(score, garbage, SubVP(), t=t, xbar=xbar, mask=mask, noise=noise)
    torch.testing.assert_close(again, found, rtol=0, atol=0)


def test_loss_draws_times_and_noise_from_the_generator_alone():
    x0, seen = torch.zeros(2000, 1), []

    def score(x, t):
        seen.append(t)
        return -x

    state = torch.get_rng_state()
    losses = [score_matching_loss(score, x0, VP(), generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1]
    assert seen[0].shape == (2000,)
    assert 1e-5 <= seen[0].min() < 0.01
    assert 0.99 < seen[0].max() <= 1 - 1e-5
    assert abs(seen[0].mean().item() - 0.5) < 5 / math.sqrt(12 * 2000)


def test_times_of_a_chain_are_its_steps_without_the_data():
    chain = DiscreteVP([0.9, 0.6, 0.1])
    drawn = chain.draw_times(3000, generator=torch.Generator().manual_seed(0))
    values, counts = (drawn * 3).unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 3.0]), rtol=1e-6, atol=0)
    assert ((counts - 1000).abs() < 5 * math.sqrt(3000 * 2 / 9)).all()
    assert score_matching_loss(lambda x, t: -x, torch.zeros(8, 2), chain).isfinite()
    assert chain._draw(torch.tensor([0.0, 1 - 2**-24])).tolist() == pytest.approx([1 / 3, 1.0])


def test_loss_is_float32_whatever_the_network_computes_in():
    x0 = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    coarse = score_matching_loss(lambda x, t: -x.bfloat16(), x0, VP(), t=0.5, noise=noise)
    assert coarse.dtype == torch.float32
    fine = score_matching_loss(lambda x, t: -x, x0, VP(), t=0.5, noise=noise)
    torch.testing.assert_close(coarse, fine, rtol=0.02, atol=0)  # bfloat16 keeps 8 bits
    assert score_matching_loss(lambda x, t: -x, x0.bfloat16(), VP(), t=0.5).dtype == torch.float32


def test_loss_trains():
    """Five hundred steps from a wrong slope arrive at the score of Gaussian data."""
    std, sde, t = 0.5, VP(), 0.3
    slope = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.SGD([slope], lr=0.5)
    x0 = std * SIGNS[:, :1].float()
    for _ in range(500):
        optimiser.zero_grad()
        score_matching_loss(lambda x, t: slope * x, x0, sde, t=t, noise=SIGNS[:, 1:].float()).backward()
        optimiser.step()
    assert slope.item() == pytest.approx(-1 / (sde.a(t) ** 2 * std**2 + sde.v(t)), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"score": lambda x, t: x[:, :1]}, r"score has shape \(4, 1\)"),
        ({"mask": torch.ones(3, 2)}, r"mask has shape \(3, 2\)"),
        ({"mask": torch.tensor([[1.0], [0.0], [1.0], [1.0]])}, "mask of item 1 is all zero"),
        ({"noise": torch.zeros(4)}, "noise has shape"),
        ({"t": torch.tensor([0.1, 0.2])}, "t has shape"),
        ({"t": 1.5}, "t = 1.5"),
        ({"xbar": torch.zeros(5)}, "xbar has shape"),
        ({"x0": torch.zeros(0, 2)}, r"x0 has shape \(0, 2\); give a batch"),
        ({"x0": torch.zeros(())}, r"x0 has shape \(\); give a batch"),
    ],
)
def test_loss_refuses(arguments, said):
    with pytest.raises(ValueError, match=said):
        score_matching_loss(**{"score": lambda x, t: -x, "x0": torch.zeros(4, 2), "sde": VP(), **arguments})


@pytest.mark.gpu
def test_on_a_gpu():
    """The same numbers as on the CPU, for one seed, on the device of the data."""
    for sde in ALL:
        here = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
        there = here.cuda()
        for found, expected in zip(sde.transition(there, 0.125), sde.transition(here, 0.125), strict=True):
            assert found.is_cuda
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-14, atol=0)
        x0, xbar = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
        mixture = GaussianMixture(MEANS.cuda(), 0.3, WEIGHTS.cuda())
        states, losses = [], []
        for device in ("cpu", "cuda"):
            x_t, noise = diffuse(
                x0.to(device), here, sde, xbar=xbar, generator=torch.Generator().manual_seed(1)
            )  # times and mean on the CPU
            assert x_t.device.type == noise.device.type == device
            states += [x_t.cpu(), mixture.score(x_t, here, sde).cpu(), mixture.posterior(x_t, 0.5, sde)[1].cpu()]
            losses.append(
                score_matching_loss(
                    lambda x, t: -x, x0.to(device), sde, xbar=xbar, generator=torch.Generator().manual_seed(2)
                ).item()
            )
        for one, other in zip(states[:3], states[3:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # float32
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
