"""Digits brought back from noise: data, network, classifier, walks, and the pattern that the page reports."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from oral4.diffusion.sde import VE, VP, GaussianMixture, diffuse
from oral4.diffusion.solvers import euler_maruyama, ml_step, sample, uniform_times
from oral4.diffvc.images import (
    ERROR_TIMES,
    IMAGES_BETTER,
    IMAGES_TOLERANCE,
    IMAGES_UNITS,
    SOLVERS,
    STEPS,
    DigitClassifier,
    DigitScore,
    ImagesConfig,
    bring_back,
    digit_images,
    run_images,
    score_errors,
    train_classifier,
    train_score,
)
from oral4.diffvc.metrics import frechet
from oral4.errors import MissingExtra
from oral4.measure.experiment import Experiment

SMALL = ImagesConfig.smoke()


@pytest.fixture(scope="module")
def found():
    return run_images(SMALL, 0)


# data


def test_the_digits_are_those_of_the_package():
    images, labels = digit_images()
    assert images.shape == (1797, 64) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1
    assert torch.equal((images + 1) * 8, ((images + 1) * 8).round())  # 17 shades
    assert sorted(labels.unique().tolist()) == list(range(10))
    # the first image is a zero: ink around a hole
    zero = images[0].reshape(8, 8)
    assert zero[3, 2] > 0 and zero[4, 5] > -0.1 and zero[4, 3] == -1


def test_without_scikit_learn_the_pip_line_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"oral4\[voice\]"):
        digit_images()


# the network


@pytest.mark.parametrize("sde", [VP(), VE()])
def test_a_fresh_network_is_the_exact_score_of_one_gaussian(sde):
    centre = torch.linspace(-1, 0.5, 7)
    network = DigitScore(centre, 0.6, width=16, blocks=1, sde=sde)
    cloud = GaussianMixture(centre[None], 0.6)
    x = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    for t in (0.001, 0.3, 1.0):
        expected = cloud.score(x, t, sde)
        # float32, relative to the largest
        torch.testing.assert_close(
            network(x, torch.full((20,), t)), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_the_network_of_the_experiment_is_small_and_every_part_learns():
    config = ImagesConfig.mini()
    network = DigitScore(torch.zeros(64), 0.5, width=config.width, blocks=config.blocks)
    assert 150_000 < sum(p.numel() for p in network.parameters()) < 220_000
    torch.nn.init.normal_(network.last[1].weight)  # it starts at 0, where nothing before it has a gradient
    network(torch.randn(4, 64), torch.rand(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_an_item_does_not_see_the_others_nor_their_times():
    network = DigitScore(torch.zeros(5), 0.5, width=16, blocks=1)
    torch.nn.init.normal_(network.last[1].weight)
    x, t = torch.randn(6, 5), torch.linspace(0.1, 1, 6)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(network(x, t), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("centre", "spread"), [(torch.zeros(2, 3), 0.5), (torch.zeros(3), 0.0), (torch.zeros(3), math.nan)]
)
def test_a_network_without_a_width_of_the_data_is_refused(centre, spread):
    with pytest.raises(ValueError, match="and a number above 0"):
        DigitScore(centre, spread)


def pair_of_points() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[-1.0, 0.3], [1.0, -0.3]]), 0.1)


def test_training_finds_the_score_that_it_is_never_shown():
    data = pair_of_points()
    spread = math.sqrt(float(data.means.var(0, correction=0).mean()) + 0.01)
    before = score_errors(DigitScore(data.means.mean(0), spread), data)
    after = score_errors(train_score(data, steps=600, batch=128, width=48, blocks=1), data)
    middle = ERROR_TIMES.index(0.2)
    assert before[middle] > 0.05
    assert after[middle] < before[middle] / 15


def test_training_repeats_and_leaves_the_global_generators_alone():
    settings = dict(steps=3, batch=8, width=8, blocks=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = train_score(pair_of_points(), seed=1, **settings)
    assert torch.rand(1) == expected
    same, other = train_score(pair_of_points(), seed=1, **settings), train_score(pair_of_points(), seed=2, **settings)
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(first(x, t), same(x, t))
    assert not torch.equal(first(x, t), other(x, t))
    assert not first.training


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1, "batch": 0}])
def test_no_update_is_refused(wrong):
    with pytest.raises(ValueError, match="give at least 1 of each"):
        train_score(pair_of_points(), **wrong)


def test_the_error_of_a_score_that_is_off_by_a_constant():
    data, sde = pair_of_points(), VP()
    assert score_errors(partial(data.score, sde=sde), data, draws=16) == [0.0] * len(ERROR_TIMES)
    errors = score_errors(lambda x, t: data.score(x, t, sde) + 0.3, data, draws=16)
    np.testing.assert_allclose(errors, [0.09 * sde.v(t) for t in ERROR_TIMES], rtol=1e-4)


# the classifier


def test_the_classifier_tells_digits_apart_only_if_the_labels_are_true():
    images, labels = digit_images()
    classifier, right = train_classifier(images, labels, steps=250)
    assert right > 0.92  # about 0.97
    _, by_chance = train_classifier(images, labels.roll(7), steps=250)
    assert by_chance < 0.3
    with torch.no_grad():
        logits = classifier.head(classifier.features(images[:5]))
        torch.testing.assert_close(classifier(images[:5]), logits)
    assert isinstance(classifier, DigitClassifier) and classifier.features(images[:5]).shape == (5, 32)


# walks


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_the_one_of_the_library(solver):
    data, sde = pair_of_points(), VP()
    score = partial(data.score, sde=sde)
    start = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    ours = bring_back(score, start, 5, solver, seed=3)
    expected = sample(score, start, sde, 5, generator=torch.Generator().manual_seed(3), **SOLVERS[solver])
    assert torch.equal(ours, expected)
    assert not ours.requires_grad


def test_ml_with_tau_walks_like_euler_maruyama_first():
    data, sde = pair_of_points(), VP()
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = bring_back(partial(data.score, sde=sde), x, 5, "ml_tau", seed=3)
    generator = torch.Generator().manual_seed(3)
    for t, s in pairwise(uniform_times(5)):  # noise is drawn in float32
        A, D, S = (euler_maruyama if t > 0.5 else ml_step)(sde, t, s)
        state = A * x + D * data.score(x, t, sde)
        x = state + S * torch.randn(x.shape, generator=generator).double() if S > 0 else state
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-9)


def test_an_unknown_solver_is_named():
    with pytest.raises(ValueError, match="solver='euler' is unknown; choose one of em, pf"):
        bring_back(lambda x, t: -x, torch.zeros(1, 2), 5, "euler")


def test_five_steps_with_the_exact_score():
    """Distances of an independent program for 2000 draws: 93.6, 0.70, 0.90, 1.51, 0.44; the floor here is another."""
    sde, generator = VP(), torch.Generator().manual_seed(0)
    data = GaussianMixture(digit_images()[0], 0.05)
    reference = data.sample(10_000, generator)
    start = diffuse(data.sample(1000, generator), 1.0, sde, generator=generator)[0]
    distance = {
        solver: frechet(bring_back(partial(data.score, sde=sde), start, 5, solver), reference)
        for solver in ("em", "pf", "ddim", "ml", "ml_tau")
    }
    # the spread between seeds is a few hundredths of the larger distances and of a tenth of the smallest
    assert distance["em"] == pytest.approx(93.6, rel=0.1)
    assert distance["ml"] == pytest.approx(1.51, rel=0.2)
    assert distance["ddim"] == pytest.approx(0.90, rel=0.2)
    assert distance["pf"] == pytest.approx(0.70, rel=0.2)
    assert distance["ml_tau"] == pytest.approx(0.44, rel=0.25)
    assert distance["ml_tau"] < distance["pf"]
    assert distance["em"] > 100 * distance["ml_tau"]


# the experiment


def test_every_value_has_a_unit_and_is_finite(found):
    assert set(found) == set(IMAGES_UNITS)
    assert len(found["score_error"]) == len(ERROR_TIMES)
    assert all(math.isfinite(x) for value in found.values() for x in (value if isinstance(value, list) else [value]))
    experiment = Experiment(
        name="diffvc/images", summary="Digits", config=ImagesConfig, run=run_images,
        units=IMAGES_UNITS, better=IMAGES_BETTER, tolerance=IMAGES_TOLERANCE,
    )  # which checks that the parts speak of the same values
    assert experiment.scales() == ("smoke", "mini")


def test_ratios_and_the_floor_of_the_experiment(found):
    for kind in ("exact", "trained"):
        for solver in ("em", "pf"):
            ratio = found[f"{kind}_{solver}_5"] / found[f"{kind}_ml_tau_5"]
            assert found[f"{kind}_{solver}_over_ml_5"] == pytest.approx(ratio, rel=1e-12)
    assert all(found[f"exact_{solver}_{steps}"] > 0 for solver in SOLVERS for steps in STEPS)
    assert found["exact_em_5"] > 10 * found["floor"]
    assert found["exact_ml_estimated_50"] < 2 * found["floor"]


def test_the_seed_decides(found):
    again = run_images(SMALL, 0)
    assert again == found
    assert run_images(SMALL, 1)["exact_em_5"] != found["exact_em_5"]
