"""The experiment on Theorem 1: its questions have the known answers, and its instruments would show a wrong one."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from oral4.diffusion.maximum_likelihood import (
    forward_paths,
    gaussian_data_var,
    gaussian_kl,
    gaussian_propagate,
    ml_coefficients,
    ml_step,
    path_log_likelihood,
)
from oral4.diffusion.sde import VE, VP, GaussianMixture, SubVP
from oral4.diffusion.solvers import uniform_times
from oral4.diffvc import theorem
from oral4.diffvc.theorem import (
    THEOREM_BETTER,
    THEOREM_TOLERANCE,
    THEOREM_UNITS,
    TheoremConfig,
    exactness,
    mixture_data_var,
    optimality,
    run_theorem,
    small_steps,
    unknown_data_term,
)
from oral4.measure.experiment import Experiment

SMALL = TheoremConfig.smoke()


@pytest.fixture(scope="module")
def found():
    return run_theorem(SMALL, 0)


def test_every_value_has_a_unit_and_is_finite(found):
    assert set(found) == set(THEOREM_UNITS)
    assert all(math.isfinite(value) for value in found.values())
    experiment = Experiment(
        name="diffvc/theorem", summary="Theorem 1", config=TheoremConfig, run=run_theorem,
        units=THEOREM_UNITS, better=THEOREM_BETTER, tolerance=THEOREM_TOLERANCE,
    )  # which checks that the parts speak of the same values
    assert experiment.scales() == ("smoke", "mini")


def test_the_seed_decides_alone(found):
    again = optimality(SMALL, 0) | unknown_data_term(SMALL, 0)
    assert {name: found[name] for name in again} == again
    other = optimality(SMALL, 1)
    assert other["coefficient_errors"] != found["coefficient_errors"]


# C1


@pytest.mark.parametrize("seed", [0, 1])
def test_the_closed_form_is_the_optimum(seed):
    values = optimality(SMALL, seed)
    # the largest of 10 and of 15 standard normal values (of 49 degrees of freedom): beyond 4.5 in one seed of thousands
    assert 0.3 < values["coefficient_errors"] < 4.5
    assert 0.3 < values["gradient_errors"] < 5
    assert values["curvature"] < 0
    assert values["worse_share"] == 1


def test_the_likelihood_in_the_papers_letters_is_that_of_the_step():
    data, sde, term = theorem._triangle(), VP(), 0.07
    paths = forward_paths(data.sample(50), sde, theorem.PATH_TIMES)
    score = partial(data.score, sde=sde)
    rows = [ml_coefficients(sde, t, s, term) for t, s in pairwise(theorem.PATH_TIMES)]
    theta = torch.tensor([[kappa, omega, math.log(sigma)] for kappa, omega, sigma in rows], dtype=torch.float64).T
    ours = theorem._likelihood(paths, theorem._path_scores(paths, score), theta)
    expected = path_log_likelihood(paths, score, sde, theorem.PATH_TIMES, partial(ml_step, data_var=term))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def test_a_wrong_coefficient_is_seen():
    generator = torch.Generator().manual_seed(0)
    data, sde = theorem._triangle(), VP()
    t, s = theorem.PATH_TIMES[-2:]
    x_t, x_s = forward_paths(data.sample(20_000, generator), sde, [t, s], generator=generator)
    A, D, _ = ml_step(sde, t, s)
    score = data.score(x_t, t, sde)
    distance, precision = theorem._regression_distance(x_t, score, x_s, (A, D))
    assert distance < 4.5
    assert 0.001 < precision < 0.02
    assert theorem._regression_distance(x_t, score, x_s, (1.05 * A, D))[0] > 10
    assert theorem._regression_distance(x_t, score, x_s, (A, 1.1 * D))[0] > 6


def test_standard_errors_are_right_although_coordinates_depend_on_each_other():
    """With orthogonal columns the mean square of the larger of two normal values is 1 + 2 / pi."""
    generator = torch.Generator().manual_seed(3)
    squares = []
    for _ in range(400):
        x = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        other = torch.randn(500, 2, generator=generator, dtype=torch.float64)
        # a noise that both coordinates share, of a size that depends on x: plain standard errors would be far off
        shared = torch.randn(500, 1, generator=generator, dtype=torch.float64) * x.norm(dim=1, keepdim=True) * x.sign()
        squares.append(theorem._regression_distance(x, other, 2 * x + 3 * other + shared, (2.0, 3.0))[0] ** 2)
    # standard error of the mean about 0.08
    assert sum(squares) / len(squares) == pytest.approx(1 + 2 / math.pi, abs=0.35)


# C2

TABLE = {
    (1, 6): (72.8, 0.160, 1.28, 1.29),
    (1, 10): (20.2, 0.160, 0.80, 0.81),
    (25, 6): (0.226, 0.0016, 0.196, 0.245),
    (25, 30): (9.5e-4, 2.8e-4, 8.8e-3, 0.0284),
    (100, 6): (0.0219, 5.7e-5, 0.0815, 0.149),
}
"""Divergences by an independent program, to two or three digits: Euler-Maruyama, flow, DDIM, ML without data term."""


def test_divergences_are_those_of_an_independent_program():
    values = exactness()
    for (var, steps), row in TABLE.items():
        for name, expected in zip(theorem.GAUSSIAN_SOLVERS, row, strict=True):
            # two digits: half of 1 in 16
            assert values[f"kl_{name}_{var}_{steps}"] == pytest.approx(expected, rel=0.03)


def test_the_full_step_is_exact_and_a_slightly_wrong_one_is_not():
    assert 0 <= exactness()["exact_kl"] < 1e-25  # squares of a few rounding errors of 1e-16
    for sde in (VP(), SubVP(), VE()):

        def wrong(process, t, s, sde=sde):
            return ml_step(process, t, s, 1.001 * gaussian_data_var(sde, t, 0.25))

        assert gaussian_kl(*gaussian_propagate(sde, wrong, uniform_times(6), 0.5, 0.25), 0.5, 0.25) > 1e-9


# C3


def test_corrections_vanish_like_the_step():
    values = small_steps()
    # the next power of h bends the line by about h beta / 24 at the largest h, 0.001
    assert values["slope_kappa"] == pytest.approx(1, abs=0.002)
    assert values["slope_omega"] == pytest.approx(1, abs=0.002)
    assert values["slope_sigma"] == pytest.approx(1, abs=0.002)
    assert 0 < values["slope_gap"] < 0.01
    assert len(theorem._slopes(VE(), 0.5)) == 2  # omega of VE is 0 and has no slope


def test_a_correction_of_second_order_would_show(monkeypatch):
    def squared(sde, t, s):
        kappa, omega, sigma = ml_coefficients(sde, t, s)
        return kappa**2, omega, sigma

    monkeypatch.setattr(theorem, "ml_coefficients", squared)
    assert theorem._slopes(VP(), 0.5)[0] == pytest.approx(2, abs=0.005)


# C4


def peaks() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[-1.0], [0.5]], dtype=torch.float64), 0.15, torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()])
@pytest.mark.parametrize("t", [0.02, 0.4, 1.0])
def test_the_quadrature_agrees_with_the_closed_form_and_with_draws(sde, t):
    one = GaussianMixture(torch.tensor([[0.7]], dtype=torch.float64), 0.5)
    assert mixture_data_var(one, t, sde) == pytest.approx(gaussian_data_var(sde, t, 0.25), rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    x = sde.a(t) * peaks().sample(40_000, generator)
    x = x + math.sqrt(sde.v(t)) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    each = peaks().posterior(x, t, sde)[1]
    # six standard errors, and never less than the last digits
    allowed = 6 * float(each.std()) / 200 + 1e-9
    assert mixture_data_var(peaks(), t, sde) == pytest.approx(float(each.mean()), abs=allowed)


def test_the_quadrature_is_for_a_line():
    with pytest.raises(ValueError, match="2 dimensions; give one on a line"):
        mixture_data_var(theorem._triangle(), 0.5, VP())


def test_what_the_term_is_worth_in_nats(found):
    """The closed form against the likelihoods of drawn paths, with and without the term."""
    sde, data = VP(), peaks()
    times = [1.0, 0.8, 0.6, 0.4, 0.2, 0.02]
    generator = torch.Generator().manual_seed(2)
    paths = forward_paths(data.sample(40_000, generator), sde, times, generator=generator)
    score = partial(data.score, sde=sde)
    known = partial(mixture_data_var, data, sde=sde)
    gain = path_log_likelihood(paths, score, sde, times, partial(ml_step, data_var=known)) - path_log_likelihood(
        paths, score, sde, times, ml_step
    )
    assert found["nats_lost"] == pytest.approx(float(gain.mean()), abs=6 * float(gain.std()) / 200)
    assert found["nats_lost"] > 1


def test_distances_and_estimates_are_sensible(found):
    for steps in theorem.MIXTURE_STEPS:
        for name in ("em", "zero", "estimated", "true"):
            assert 0 < found[f"mixture_{name}_{steps}"] < 2
    assert found["mixture_floor"] < found["mixture_true_20"] < found["mixture_true_6"]
    # the factor v / a^2 before the bracket: the estimate is worth something late in the walk and nothing at its start
    assert found["estimate_error_early"] < found["estimate_error_middle"] < found["estimate_error_start"]
