"""Heads against torch.distributions and scipy, losses against the official numbers, training against its recipe."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from oral4.pyraformer import metrics
from oral4.pyraformer import probabilistic as p
from oral4.pyraformer.data import MeanScaler, OneStepWindows
from oral4.pyraformer.model import OneStepPyraformer, PyraformerConfig

GOLDENS = Path(__file__).parents[1] / "goldens/pyraformer"
LOSSES = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "losses.npz").items()}
SS = {name: np.load(GOLDENS / "ss.npz")[name] for name in ("seq", "label", "label0", "mu", "sigma")}
SS = {name: torch.from_numpy(value) for name, value in SS.items()}
OFFICIAL = np.load(GOLDENS / "ss.npz")
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
HEADS = [
    p.GaussianHead(),
    p.StudentTHead(),
    p.QuantileHead(LEVELS),
    p.QuantileHead(LEVELS, ordered=False),
    p.QuantileHead((0.2, 0.9)),
    p.QuantileHead((0.5,)),
]
ALL = [p.PointHead("mse"), p.PointHead("mae"), p.PointHead("huber"), *HEADS]


def name_of(head):
    return repr(head)


# ---- the official losses -----------------------------------------------------------------------------------------


def test_gaussian_nll_is_torchs():
    mu, y = torch.randn(2, 50, dtype=torch.float64)
    sigma = torch.rand(50, dtype=torch.float64) + 0.01
    expected = -torch.distributions.Normal(mu, sigma).log_prob(y)
    torch.testing.assert_close(p.gaussian_nll(mu, sigma, y), expected, rtol=1e-12, atol=1e-12)


def test_official_pretraining_loss():
    target = p.pretraining_targets(SS["seq"], SS["label"])
    assert target.shape == (4, 49) and bool((target[:, -1] == SS["label"]).all())
    nll, se = p.nll_topk(SS["mu"], SS["sigma"], target)
    # float32, written down by the official code
    np.testing.assert_allclose(nll, OFFICIAL["pre_nll"], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(se, OFFICIAL["pre_se"], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("ignore_zero", [True, False])
def test_official_hard_mining(ignore_zero):
    mu, sigma = SS["mu"][:, -1], SS["sigma"][:, -1]
    nll, se = p.nll_topk(mu, sigma, SS["label0"], 2, ignore_zero=ignore_zero)
    np.testing.assert_allclose(nll, OFFICIAL[f"nll_top2_{ignore_zero}"], rtol=2e-6)
    np.testing.assert_allclose(se, OFFICIAL[f"se_top2_{ignore_zero}"], rtol=2e-6)
    kept = SS["label0"] != 0 if ignore_zero else slice(None)
    error = (SS["label0"] - mu).abs()[kept]
    np.testing.assert_allclose(error, OFFICIAL[f"ae_{ignore_zero}"], rtol=2e-6)
    loss = p.one_step_loss(mu, sigma, SS["label0"], k=2, ignore_zero=ignore_zero)
    expected = OFFICIAL[f"nll_top2_{ignore_zero}"].mean() + 100 * OFFICIAL[f"se_top2_{ignore_zero}"].mean()
    assert float(loss) == pytest.approx(float(expected), rel=2e-6)


def test_official_schedule_and_topk_mse():
    single = [p.hard_mining_schedule(epoch, 192) for epoch in range(8)]
    assert single == [int(k) or 192 for k in LOSSES["ss_topk_sched_bs192"]]  # the official 0 stands for all
    assert [p.hard_mining_schedule(epoch, 32) for epoch in range(8)] == LOSSES["lr_topk_sched_bs32"].tolist()
    found = p.mse_topk(LOSSES["pred"], LOSSES["true"], 3)
    torch.testing.assert_close(found, LOSSES["topk3"], rtol=1e-12, atol=1e-12)
    assert [p.hard_mining_schedule(epoch, 1) for epoch in range(6)] == [
        1
    ] * 6  # the official code would keep 0, that is all


def test_one_ranking_keeps_the_same_forecasts():
    """Forecast 0 is a small error with a tiny sigma, forecast 2 a large one with a wide sigma."""
    mu, sigma, y = torch.zeros(3), torch.tensor([0.1, 1.0, 9.0]), torch.tensor([0.4, 0.5, 3.0])
    all_nll, all_se = p.nll_topk(mu, sigma, y)
    assert int(all_nll.argmax()) == 0 and int(all_se.argmax()) == 2
    for ranking, (of_nll, of_se) in {"separate": (0, 2), "nll": (0, 0), "se": (2, 2)}.items():
        nll, se = p.nll_topk(mu, sigma, y, 1, ranking=ranking)
        assert (nll, se) == (all_nll[of_nll], all_se[of_se]), ranking
    ranked, _ = p.nll_topk(mu, sigma, y, 2, ranking="se")
    assert ranked.tolist() == all_nll[[2, 1]].tolist()
    for k in (None, 3, 99):  # nothing to cut: all rankings agree
        assert all(torch.equal(p.nll_topk(mu, sigma, y, k, ranking=r)[1], all_se) for r in p.RANKINGS)


def test_the_factor_and_half_precision():
    mu, sigma, y = torch.randn(9), torch.rand(9) + 0.5, torch.randn(9)
    for factor in (0.0, 1.0, 100.0):
        nll, se = p.nll_topk(mu, sigma, y, 4)
        assert float(p.one_step_loss(mu, sigma, y, k=4, factor=factor)) == pytest.approx(
            float(nll.mean() + factor * se.mean())
        )
    half = p.one_step_loss(mu.bfloat16(), sigma.bfloat16(), y)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, p.one_step_loss(mu.bfloat16().float(), sigma.bfloat16().float(), y), rtol=0, atol=0
    )


def test_negative_targets_count():
    """The official code keeps labels >= 0 where it ignores no zeros."""
    nll, _ = p.nll_topk(torch.zeros(3), torch.ones(3), torch.tensor([-1.0, 0.0, 1.0]))
    assert len(nll) == 3
    nll, _ = p.nll_topk(torch.zeros(3), torch.ones(3), torch.tensor([-1.0, 0.0, 1.0]), ignore_zero=True)
    assert len(nll) == 2


def test_mining_sends_gradients_to_the_kept_forecasts_only():
    mu = torch.zeros(4, requires_grad=True)
    p.one_step_loss(mu, torch.ones(4), torch.tensor([0.1, 2.0, 0.2, 3.0]), k=2, ranking="nll").backward()
    assert (mu.grad != 0).tolist() == [False, True, False, True]


def test_a_batch_of_ignored_targets_is_zero():
    mu, sigma = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = p.one_step_loss(mu, sigma, torch.zeros(2), ignore_zero=True)
    loss.backward()
    assert float(loss.detach()) == 0 and mu.grad.tolist() == sigma.grad.tolist() == [0, 0]


def test_losses_bad_input():
    with pytest.raises(ValueError, match=re.escape("mu (2,), sigma (2,) and y (2, 1) differ in shape")):
        p.nll_topk(torch.zeros(2), torch.ones(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="ranking='both' is unknown; choose one of separate, nll, se"):
        p.nll_topk(torch.zeros(2), torch.ones(2), torch.zeros(2), ranking="both")
    with pytest.raises(ValueError, match="k=0; keep 1 or more"):
        p.nll_topk(torch.zeros(2), torch.ones(2), torch.zeros(2), 0)
    for factor in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="factor="):
            p.one_step_loss(torch.zeros(2), torch.ones(2), torch.zeros(2), factor=factor)
    for epoch, batch in ((-1, 8), (0, 0)):
        with pytest.raises(ValueError, match=f"epoch={epoch}, batch={batch}"):
            p.hard_mining_schedule(epoch, batch)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k}"):
            p.mse_topk(torch.zeros(3, 2), torch.zeros(3, 2), k)


def test_amplitude_sampler():
    v = np.array([0.0, 1.0, -3.0, 0.0, 6.0, 0.0])
    draws = p.amplitude_sampler(v, 100_000, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(draws, minlength=6) / len(draws)
    # four standard errors of 100,000 draws
    np.testing.assert_allclose(shares, [0, 0.1, 0.3, 0, 0.6, 0], atol=4 * math.sqrt(0.25 / 100_000))
    assert shares[[0, 3, 5]].tolist() == [0, 0, 0]
    again = p.amplitude_sampler(torch.tensor(v), 100_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again) and draws.dtype == torch.int64
    assert len(p.amplitude_sampler(v)) == 6 and len(p.amplitude_sampler(v, 0)) == 0
    for wrong in ([], [0.0, 0.0], [1.0, math.nan], [math.inf], [[1.0]]):
        with pytest.raises(ValueError, match="not all 0"):
            p.amplitude_sampler(wrong)


@pytest.mark.parametrize(("draw", "window"), [(0.0, 1), (1 - 2**-53, 4), (1.0, 4)])
def test_the_ends_of_the_draw_meet_no_empty_window(draw, window, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, **kwargs: torch.full((count,), draw, dtype=torch.float64))
    assert p.amplitude_sampler([0.0, 0.1, 0.2, 0.0, 0.3, 0.0], 2).tolist() == [window] * 2


# ---- Student's t -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1.0, 1.3, 2.0, 2.5, 5.0, 30.0, 999.0, 1001.0, 1e6, 1e12])
def test_student_t_icdf_is_scipys(df):
    level = np.concatenate([np.logspace(-12, -2, 80), np.linspace(0.011, 0.49, 60)])
    found = p.student_t_icdf(torch.from_numpy(level), df).numpy()
    np.testing.assert_allclose(found, stats.t.ppf(level, df), rtol=1e-9)  # the promise of the docstring
    upper = np.linspace(0.51, 1 - 1e-4, 60)
    np.testing.assert_allclose(p.student_t_icdf(torch.from_numpy(upper), df), stats.t.ppf(upper, df), rtol=1e-9)


@given(st.floats(1e-9, 1 - 1e-9), st.floats(0.6, 1e7))
@settings(deadline=None)
def test_student_t_icdf_inverts_the_cdf(level, df):
    level = torch.tensor(level, dtype=torch.float64)
    assert float(metrics.student_t_cdf(p.student_t_icdf(level, df), df)) == pytest.approx(float(level), rel=1e-9)


def test_student_t_icdf_far_out():
    tiny = torch.tensor([1e-300, 1e-200, 1e-100], dtype=torch.float64)
    torch.testing.assert_close(p.student_t_icdf(tiny, 1.0), -1 / (math.pi * tiny), rtol=1e-9, atol=0)
    torch.testing.assert_close(p.student_t_icdf(tiny, 2.0), -((2 * tiny) ** -0.5), rtol=1e-9, atol=0)
    normal = torch.from_numpy(stats.norm.ppf(tiny.numpy()))
    torch.testing.assert_close(
        p.student_t_icdf(tiny, 1e9), normal, rtol=1e-5, atol=0
    )  # 1e9 degrees are not infinitely many
    assert p.student_t_icdf(torch.tensor(0.5), 3.0) == 0


def test_student_t_icdf_of_tensors():
    level = torch.tensor([[0.0], [0.1], [0.5], [1.0]])
    found = p.student_t_icdf(level, torch.tensor([2.0, 7.0]))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, stats.t.ppf(level, [2.0, 7.0]), rtol=1e-6)  # rounded to float32
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"levels lie in \[0, 1\]"):
            p.student_t_icdf(torch.tensor([wrong]), 3.0)
    with pytest.raises(ValueError, match="df is -1 at least"):
        p.student_t_icdf(level, -1.0)


# ---- heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_the_shape_of_a_head(head):
    raw, y = torch.randn(2, 5, head.num_outputs), torch.randn(2, 5)
    assert head.location.shape == (head.num_outputs,) and head.location.dtype == torch.bool
    assert head.loss(raw, y).shape == () and head.mean(raw).shape == (2, 5)
    assert head.loss(raw.bfloat16(), y.bfloat16()).dtype == head.mean(raw.half()).dtype == torch.float32
    if not isinstance(head, p.PointHead):
        low, high = (head.levels[0], head.levels[-1]) if isinstance(head, p.QuantileHead) else (0.05, 0.95)
        assert head.quantiles(raw, [low, high]).shape == (2, 5, 2)
        assert head.quantiles(raw, low).shape == (2, 5, 1)
        assert head.sample(raw, 7, torch.Generator().manual_seed(0)).shape == (2, 5, 7)
    with pytest.raises(ValueError, match=f"needs {head.num_outputs} outputs on the last axis"):
        head.mean(torch.randn(2, head.num_outputs + 1))
    with pytest.raises(ValueError, match=re.escape("y has shape (5, 2)")):
        head.loss(raw, torch.randn(5, 2))


@pytest.mark.parametrize("head", HEADS, ids=name_of)
def test_moving_the_locations_moves_the_forecast(head):
    """What `location` promises: a level added to these outputs is added to every quantile, and to nothing else."""
    raw, y = torch.randn(2, 6, head.num_outputs, dtype=torch.float64)[0], torch.randn(6, dtype=torch.float64)
    moved = raw + 2.5 * head.location
    ends = [0.2, 0.5] if isinstance(head, p.QuantileHead) and len(head.levels) == 2 else [0.5]
    torch.testing.assert_close(head.quantiles(moved, ends), head.quantiles(raw, ends) + 2.5, rtol=0, atol=1e-9)
    torch.testing.assert_close(head.mean(moved), head.mean(raw) + 2.5, rtol=0, atol=1e-9)
    torch.testing.assert_close(head.loss(moved, y + 2.5), head.loss(raw, y), rtol=1e-9, atol=1e-9)


def test_raw_zeros_are_about_the_standard_normal():
    normal = stats.norm.ppf(LEVELS)
    for head in (p.QuantileHead(LEVELS), p.QuantileHead(LEVELS, ordered=False)):
        np.testing.assert_allclose(head.quantiles(torch.zeros(len(LEVELS)), LEVELS), normal, atol=1e-6)
    gaussian = p.GaussianHead(min_sigma=1e-9)
    np.testing.assert_allclose(gaussian.quantiles(torch.zeros(2), LEVELS), normal, rtol=1e-5, atol=1e-6)
    df, loc, scale = p.StudentTHead(min_scale=1e-9).parameters(torch.zeros(3))
    assert (float(df), float(loc), float(scale)) == pytest.approx((10, 0, 1), rel=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_likelihoods_are_those_of_torch_distributions(kind):
    y = torch.randn(20, dtype=torch.float64).to(kind)
    raw = (2 * torch.randn(20, 3, dtype=torch.float64)).to(kind)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if kind == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    mean, sigma = p.GaussianHead().parameters(raw[:, :2].double())
    expected = -torch.distributions.Normal(mean, sigma).log_prob(y.double()).mean()
    found = p.GaussianHead().loss(raw[:, :2], y)
    assert found.dtype == (torch.float64 if kind == torch.float64 else torch.float32)  # never in half precision
    torch.testing.assert_close(found.double(), expected, **tolerance)
    df, loc, scale = p.StudentTHead().parameters(raw.double())
    assert bool((df > 2).all())
    expected = -torch.distributions.StudentT(df, loc, scale).log_prob(y.double()).mean()
    torch.testing.assert_close(p.StudentTHead().loss(raw, y).double(), expected, **tolerance)


def test_point_losses():
    y, raw = torch.randn(30), torch.randn(30, 1)
    error = (raw.squeeze(-1) - y).abs()
    torch.testing.assert_close(p.PointHead("mse").loss(raw, y), error.square().mean())
    torch.testing.assert_close(p.PointHead("mae").loss(raw, y), error.mean())
    huber = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(p.PointHead("huber").loss(raw, y), huber)
    for method in (lambda: p.PointHead().quantiles(raw, 0.5), lambda: p.PointHead().sample(raw, 2)):
        with pytest.raises(ValueError, match="a point forecast has no"):
            method()


@pytest.mark.parametrize("ordered", [True, False])
def test_the_quantile_loss_is_twice_the_pinball_loss(ordered):
    head, raw, y = p.QuantileHead(LEVELS, ordered=ordered), torch.randn(9, 7, dtype=torch.float64), torch.randn(9)
    if ordered:
        expected = 2 * metrics.pinball(y, head.quantiles(raw, LEVELS), LEVELS)
    else:  # trained as they come, before sorting
        expected = 2 * metrics.pinball(y, raw + torch.from_numpy(stats.norm.ppf(LEVELS)), LEVELS)
    assert float(head.loss(raw, y)) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(-300, 300), min_size=7, max_size=7), st.booleans())
@settings(deadline=None)
@example([0.0, 0.0, 143.0, 32.644312629542924, -14.0, 0.0, 0.0], True)  # where interpolation by a product rounds past
def test_quantiles_never_cross(raw, ordered):
    values = p.QuantileHead(LEVELS, ordered=ordered).quantiles(torch.tensor(raw), LEVELS)
    assert bool((values.diff() >= 0).all())
    between = p.QuantileHead(LEVELS, ordered=ordered).quantiles(torch.tensor(raw), torch.linspace(0.05, 0.95, 31))
    assert bool((between.diff() >= -1e-4 * values.abs().max()).all())  # interpolation rounds


@given(st.lists(st.floats(-5, 5), min_size=7, max_size=7), st.floats(-8, 8))
@settings(deadline=None)
def test_sorting_never_raises_the_loss(raw, y):
    head, y = p.QuantileHead(LEVELS, ordered=False), torch.tensor([y], dtype=torch.float64)
    raw = torch.tensor([raw], dtype=torch.float64)
    after = 2 * metrics.pinball(y, head.quantiles(raw, LEVELS), LEVELS)
    assert after <= float(head.loss(raw, y)) + 1e-9


def test_quantiles_between_and_beyond():
    head, raw = p.QuantileHead((0.1, 0.5, 0.9)), torch.randn(4, 3)
    levels = [0.1, 0.3, 0.9]
    values = head.quantiles(raw, levels)
    torch.testing.assert_close(values[:, [0, 2]], head.quantiles(raw, [0.1, 0.9]))
    share = (stats.norm.ppf(0.3) - stats.norm.ppf(0.1)) / -stats.norm.ppf(0.1)
    middle = head.quantiles(raw, [0.5])[:, 0]
    torch.testing.assert_close(values[:, 1], values[:, 0] + share * (middle - values[:, 0]))
    for level in (0.05, 0.95):
        with pytest.raises(ValueError, match=r"trained for 0\.1 to 0\.9, and knows nothing outside"):
            head.quantiles(raw, [level])
    for wrong in ((), (0.5, 0.5), (0.9, 0.1), (0.0, 0.5), (math.nan,)):
        with pytest.raises(ValueError, match="levels="):
            p.QuantileHead(wrong)
    for wrong in (0.0, 1.0, [], [[0.5]], math.nan):
        with pytest.raises(ValueError, match="levels="):
            p.GaussianHead().quantiles(torch.zeros(2), wrong)


@pytest.mark.parametrize("head", [p.GaussianHead(), p.StudentTHead()], ids=name_of)
def test_quantiles_and_cdf_are_inverse(head):
    raw = torch.randn(5, head.num_outputs, dtype=torch.float64)
    quantiles = head.quantiles(raw, LEVELS)
    back = torch.stack([head.cdf(raw, quantiles[:, k]) for k in range(len(LEVELS))], dim=-1)
    np.testing.assert_allclose(back, np.tile(LEVELS, (5, 1)), rtol=1e-9)
    with pytest.raises(ValueError, match=r"no distribution function; .*reliability"):
        p.QuantileHead().cdf(torch.zeros(7), torch.tensor(0.0))


@pytest.mark.parametrize(
    "head",
    [p.GaussianHead(), p.StudentTHead(), p.QuantileHead(tuple(np.linspace(0.01, 0.99, 99)))],
    ids=["g", "t", "q"],
)
def test_draws_have_the_distribution(head):
    raw = torch.zeros(head.num_outputs, dtype=torch.float64)
    raw[0] = 0.7
    draws = head.sample(raw, 100_000, torch.Generator().manual_seed(0))
    levels = [0.02, 0.1, 0.5, 0.9, 0.98]
    below = (draws[:, None] <= head.quantiles(raw, levels)).double().mean(0)
    # four standard errors of 100,000 draws
    np.testing.assert_allclose(below, levels, atol=4 * math.sqrt(0.25 / 100_000))
    assert torch.equal(draws, head.sample(raw, 100_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(draws, head.sample(raw, 100_000, torch.Generator().manual_seed(1)))
    assert float(draws.mean()) == pytest.approx(float(head.mean(raw)), abs=0.02)
    assert bool(draws.isfinite().all())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_gradients_stay_finite_at_extremes(head, kind):
    big = 6e4 if kind == torch.float16 else 1e8
    for value in (0.0, big, -big):
        for spread in (0.0, big, -big):
            for target in (0.0, big, -big):
                raw = torch.full((3, head.num_outputs), spread, dtype=kind)
                raw[:, head.location] = value
                raw.requires_grad_()
                loss = head.loss(raw, torch.full((3,), target, dtype=kind))
                (gradient,) = torch.autograd.grad(loss, raw)
                assert bool(loss.isfinite()), (value, spread, target)
                finite = gradient.isfinite()
                if (
                    kind == torch.float16
                ):  # a gradient may exceed the range of float16: inf, which loss scaling sees, never NaN
                    finite = ~gradient.isnan()
                assert bool(finite.all()), (value, spread, target)


@pytest.mark.parametrize("head", ALL, ids=name_of)
def test_weights(head):
    raw, y = torch.randn(6, head.num_outputs, requires_grad=True), torch.randn(6)
    kept = torch.tensor([True, False, True, True, False, True])
    expected = head.loss(raw[kept], y[kept])
    missing = torch.where(kept, y, math.nan)
    torch.testing.assert_close(head.loss(raw, missing, kept), expected)
    (gradient,) = torch.autograd.grad(head.loss(raw, missing, kept), raw)
    assert bool(gradient.isfinite().all()) and not gradient[~kept].any()
    torch.testing.assert_close(
        head.loss(raw, y, torch.tensor(3.0)), head.loss(raw, y)
    )  # a common weight changes nothing
    double = torch.tensor([2.0, 0, 0, 0, 0, 1.0])
    torch.testing.assert_close(
        head.loss(raw, y, double), (2 * head.loss(raw[:1], y[:1]) + head.loss(raw[5:], y[5:])) / 3
    )
    nothing = head.loss(raw, missing, torch.zeros(6))
    (gradient,) = torch.autograd.grad(nothing, raw)
    assert float(nothing.detach()) == 0 and not gradient.any()


def test_floors():
    assert float(p.GaussianHead(0.1).parameters(torch.tensor([0.0, -1e9]))[1]) == pytest.approx(0.1)
    assert float(p.StudentTHead(0.1).parameters(torch.tensor([0.0, -1e9, -1e9]))[2]) == pytest.approx(0.1)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        for make in (p.GaussianHead, p.StudentTHead):
            with pytest.raises(ValueError, match="give a positive number"):
                make(wrong)


def test_make_head():
    assert p.make_head("quantile", levels=[0.1, 0.9]) == p.QuantileHead((0.1, 0.9))
    assert p.make_head("point", kind="mae").kind == "mae"
    with pytest.raises(
        ValueError, match="head='normal' is unknown; choose one of point, gaussian, student_t, quantile"
    ):
        p.make_head("normal")
    with pytest.raises(ValueError, match="kind='l1'"):
        p.PointHead("l1")


def fitted(head, y, steps=300):
    """Raw outputs that minimise the loss of one forecast for all y."""
    raw = torch.zeros(head.num_outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(raw.expand(len(y), -1), y).backward()
        optimizer.step()
    return raw.detach()


def test_fitting_recovers_the_distribution():
    y = torch.from_numpy(stats.t.rvs(4, 1.0, 0.5, size=5_000, random_state=0))
    df, loc, scale = p.StudentTHead().parameters(fitted(p.StudentTHead(), y))
    # standard errors of the maximum-likelihood estimate are about 0.25, 0.008 and 0.008
    assert float(df) == pytest.approx(4, abs=1.0) and float(loc) == pytest.approx(1, abs=0.03)
    assert float(scale) == pytest.approx(0.5, abs=0.03)
    mean, sigma = p.GaussianHead().parameters(fitted(p.GaussianHead(), y))
    assert float(mean) == pytest.approx(float(y.mean()), abs=0.01)
    assert float(sigma) == pytest.approx(float(y.std()), abs=0.01)
    for ordered in (True, False):
        head = p.QuantileHead((0.1, 0.5, 0.9), ordered=ordered)
        found = head.quantiles(fitted(head, y), [0.1, 0.5, 0.9])
        np.testing.assert_allclose(found, np.quantile(y, [0.1, 0.5, 0.9]), atol=0.03)  # Adam's last step is about 0.01


# ---- the one-step model ------------------------------------------------------------------------------------------

CONFIG = PyraformerConfig(
    history=24, windows=(4, 3), d_model=16, d_k=4, num_heads=2, d_inner=16, num_layers=1, d_bottleneck=4, dropout=0.0,
    embedding="one_step", num_marks=2,
)  # fmt: skip
SETTINGS = {"progress": False, "epochs": 2, "windows_per_epoch": 16, "windows_per_batch": 4}


def make_series(days=60, seed=0, level=20.0):
    hours = np.arange(24 * days)
    noise = np.random.default_rng(seed).normal(size=hours.size)
    values = level + 8 * np.sin(2 * np.pi * hours / 24) * (1 + 0.3 * (hours // 24 % 7 > 4)) + noise
    marks = np.stack([hours % 24 / 23 - 0.5, hours // 24 % 7 / 6 - 0.5], axis=1)
    return values, marks


def make_windows(first, last, **options):
    values, marks = make_series(**options)
    return OneStepWindows(
        values[24 * first : 24 * last], marks[24 * first : 24 * last], length=25, horizon=24, stride=24
    )


def make_model(**options):
    torch.manual_seed(0)
    return OneStepPyraformer(CONFIG, **{"floor": 1e-3, **options})


class Oracle(nn.Module):
    """Stands for a model: knows mean and sigma of every target."""

    def __init__(self, mu, sigma):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.answers = iter((mu, sigma) for _ in range(99))

    def forward(self, sequence, *, last_only):
        assert last_only and not self.training and not torch.is_grad_enabled()
        return tuple(part[: len(sequence)].float() for part in next(self.answers))


def test_forecasts_are_in_the_units_of_the_data():
    windows = make_windows(0, 9)
    values, _ = make_series()
    _, target, scale = windows.batch(np.arange(len(windows)), dtype=torch.float64)
    oracle = Oracle(target, torch.full_like(target, 0.5)).train()
    forecast = p.forecast_one_step(oracle, windows, sequences=10_000)
    assert oracle.training  # as it was
    truth = np.concatenate([values[24 * w + 24 : 24 * w + 48] for w in range(len(windows))])
    np.testing.assert_allclose(forecast.y, truth, rtol=1e-12)
    np.testing.assert_allclose(forecast.mu, truth, rtol=1e-6)  # the model speaks float32
    np.testing.assert_allclose(forecast.sigma, 0.5 * scale, rtol=1e-6)
    scores = forecast.scores(0.9)
    assert scores["coverage"] == 1 and scores["nrmse"] < 1e-6 and scores["nd"] < 1e-6
    assert scores["width"] == pytest.approx(2 * 1.6448536 * 0.5 * float(scale.mean()), rel=1e-6)
    np.testing.assert_allclose(forecast.pit(), 0.5, atol=1e-5)


def test_scores_are_the_metrics_of_the_paper():
    generator = np.random.default_rng(0)
    y, mu, sigma = generator.gamma(5, size=500), generator.gamma(5, size=500), generator.uniform(1, 2, 500)
    scores = p.OneStepForecast(mu, sigma, y, np.ones(500)).scores(0.8)
    assert scores["nrmse"] == pytest.approx(math.sqrt(((y - mu) ** 2).mean()) / y.mean(), rel=1e-9)
    assert scores["nd"] == pytest.approx(np.abs(y - mu).sum() / y.sum(), rel=1e-9)
    assert scores["nll"] == pytest.approx(-stats.norm(mu, sigma).logpdf(y).mean(), rel=1e-9)
    inside = np.abs(y - mu) <= stats.norm.ppf(0.9) * sigma
    assert scores["coverage"] == pytest.approx(inside.mean())


def test_the_official_test_units():
    """Mean and sigma times v: test_mu, test_sigma of the official model.test."""
    mu, sigma = SS["mu"][:, -1].double() * 37.5, SS["sigma"][:, -1].double() * 37.5
    np.testing.assert_allclose(mu, OFFICIAL["test_mu"], rtol=1e-6)
    np.testing.assert_allclose(sigma, OFFICIAL["test_sigma"], rtol=1e-6)


def test_training_lowers_the_loss_and_keeps_the_best_epoch():
    train, validation = make_windows(0, 40), make_windows(40, 50)
    model = make_model()
    before = p.forecast_one_step(model, validation).scores()
    config = p.OneStepConfig.mini(**{**SETTINGS, "epochs": 4, "lr": 1e-2, "windows_per_epoch": 60})
    result = p.train_one_step(model, train, config, validation=validation)
    after = p.forecast_one_step(model, validation).scores()
    assert result.weights == "best" and result.step == 4 * 15
    assert after["crps"] == pytest.approx(result.best_value, rel=1e-6)
    assert after["crps"] < 0.5 * before["crps"] and after["nd"] < before["nd"]
    found = [row for row in result.history["val_crps"] if row is not None]
    assert len(found) == 4 and min(found) == pytest.approx(result.best_value)  # one evaluation an epoch


def test_the_same_seed_gives_the_same_weights():
    weights = []
    for seed in (0, 0, 1):
        model = make_model()
        p.train_one_step(model, make_windows(0, 20), p.OneStepConfig.mini(**SETTINGS, seed=seed))
        weights.append(torch.cat([part.flatten() for part in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Spy(nn.Module):
    """Notes what training asks of the model."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked = model, []

    def forward(self, sequence, *, last_only=False):
        self.asked.append((last_only, len(sequence)))
        return self.model(sequence, last_only=last_only)


@pytest.mark.parametrize("pretrain", [True, False])
def test_the_recipe_of_the_official_script(pretrain, monkeypatch):
    asked = []
    loss = p.one_step_loss

    def noting(mu, sigma, y, **options):
        asked.append({"everywhere": mu.dim() == 2, "k": None, "ranking": "separate", **options})
        return loss(mu, sigma, y, **options)

    monkeypatch.setattr(p, "one_step_loss", noting)
    changes = {"ranking": "se", "ignore_zero": True, "factor": 7.0} if pretrain else {}
    config = p.OneStepConfig(epochs=6, windows_per_epoch=16, pretrain=pretrain, progress=False, **changes)
    spy = Spy(make_model())
    p.train_one_step(spy, make_windows(0, 20), config)
    kept = [192, 192, 144, 128, 96, 96]
    assert len(asked) == 12 and [size for _, size in spy.asked] == [8 * 24] * 12
    for number, options in enumerate(asked):
        epoch, everywhere = number // 2, pretrain and number < 2
        assert spy.asked[number][0] == (not everywhere)
        expected = {
            "everywhere": everywhere, "k": None if everywhere else kept[epoch], "factor": config.factor,
            "ignore_zero": config.ignore_zero, "ranking": "separate" if everywhere else config.ranking,
        }  # fmt: skip
        assert options == expected
    without = p.OneStepConfig.mini(**SETTINGS, hard_mining=False, pretrain=False)
    asked.clear()
    p.train_one_step(make_model(), make_windows(0, 20), without)
    assert [options["k"] for options in asked] == [None] * 8


def test_the_settings_reach_the_loop(monkeypatch):
    seen = {}

    def fake(step, model, optimizer, batches, settings, **options):
        seen.update(optimizer=optimizer, settings=settings, **options)

    monkeypatch.setattr(p, "fit", fake)
    windows = make_windows(0, 20)
    config = p.OneStepConfig(clip_norm=0.5, seed=7, precision="bf16", monitor="nd", progress=False)
    p.train_one_step(make_model(), windows, config, validation=windows, directory="a folder")
    updates = math.ceil(len(windows) / 8)
    settings, factor = seen["settings"], seen["scheduler"].lr_lambdas[0]
    assert (settings.epochs, settings.clip_norm, settings.seed, settings.precision) == (10, 0.5, 7, "bf16")
    assert (settings.monitor, settings.evaluate_every) == ("nd", updates) and seen["directory"] == "a folder"
    assert type(seen["optimizer"]) is torch.optim.Adam and seen["scheduler"].base_lrs == [1e-5]
    assert [factor(update) for update in (0, updates - 1, updates, 2 * updates)] == [1, 1, 0.5, 0.25]
    assert set(seen["evaluate"](make_model())) >= {"nrmse", "nd", "nll", "crps", "coverage"}
    p.train_one_step(make_model(), windows, config)
    assert seen["settings"].monitor is None and seen["evaluate"] is None


def test_windows_are_drawn_by_amplitude():
    values, marks = make_series(days=30)
    loud = np.stack([values, 9 * values])
    windows = OneStepWindows(loud, marks, length=25, horizon=24, stride=24, ids=[0, 1], scaler=MeanScaler())
    share = {}
    for by_amplitude in (True, False):
        seen = []

        class Noting(Spy):
            def forward(self, sequence, *, last_only=False, seen=seen):
                seen.append(sequence[:, 0, -1])
                return super().forward(sequence, last_only=last_only)

        model = Noting(OneStepPyraformer(CONFIG, floor=1e-3))
        settings = {
            **SETTINGS,
            "epochs": 1,
            "windows_per_epoch": 200,
            "by_amplitude": by_amplitude,
            "windows_per_batch": 50,
        }
        p.train_one_step(model, windows, p.OneStepConfig.mini(**settings))
        share[by_amplitude] = float(torch.cat(seen).mean())
    # four standard errors of 200 draws
    assert share[True] == pytest.approx(0.9, abs=0.085) and share[False] == pytest.approx(0.5, abs=0.14)


def test_negative_data_need_the_identity_mean():
    windows = make_windows(0, 20, level=5.0)
    with pytest.raises(ValueError, match=r"the training set has negative values, the least -.*mean='identity'"):
        p.train_one_step(make_model(), windows, p.OneStepConfig.mini(**SETTINGS))
    with pytest.raises(ValueError, match="the validation set has negative values"):
        p.train_one_step(make_model(), make_windows(0, 20), p.OneStepConfig.mini(**SETTINGS), validation=windows)
    result = p.train_one_step(make_model(mean="identity"), windows, p.OneStepConfig.mini(**SETTINGS))
    assert result.step == 8


def test_missing_values_are_refused():
    values, marks = make_series(20)
    values[100:103] = np.nan
    windows = OneStepWindows(values, marks, length=25, horizon=24, stride=24, missing="keep")
    with pytest.raises(ValueError, match=r"the training set has windows with .* NaN or infinite"):
        p.train_one_step(make_model(), windows, p.OneStepConfig.mini(**SETTINGS))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "epochs=0"), ({"windows_per_batch": 2.5}, r"windows_per_batch=2\.5"), ({"lr": 0.0}, r"lr=0\.0"),
        ({"lr_decay": 1.5}, r"lr_decay=1\.5"), ({"factor": -1.0}, r"factor=-1\.0"), ({"ranking": "x"}, "ranking='x'"),
        ({"monitor": "mse"}, "monitor='mse' is unknown"), ({"windows_per_epoch": -3}, "windows_per_epoch=-3"),
    ],
)  # fmt: skip
def test_bad_settings(change, named):
    with pytest.raises(ValueError, match=named):
        p.OneStepConfig(**change)


# ---- beside the floor --------------------------------------------------------------------------------------------


def test_the_floor():
    train, test = make_windows(0, 40), make_windows(40, 60)
    floor = p.floor_forecasts(train, test)
    assert list(floor) == ["seasonal naive", "AR ridge"]
    values, _ = make_series()
    later = values[24 * 40 :]
    naive = np.concatenate([later[24 * w : 24 * w + 24] for w in range(len(test))])
    np.testing.assert_allclose(floor["seasonal naive"].mu, naive, rtol=1e-9)
    np.testing.assert_allclose(floor["seasonal naive"].y, floor["AR ridge"].y, rtol=1e-12)
    scores = {name: forecast.scores() for name, forecast in floor.items()}
    assert scores["AR ridge"]["crps"] < scores["seasonal naive"]["crps"]
    # yesterday's value has twice the variance of the noise, the regression about once
    assert scores["AR ridge"]["mae"] < 0.85 * scores["seasonal naive"]["mae"]
    for forecast in floor.values():
        assert forecast.scores(0.9)["coverage"] == pytest.approx(0.9, abs=0.06)


def test_ridge_skip_starts_as_the_ridge():
    train, test = make_windows(0, 40), make_windows(40, 60)
    ridge = p.fit_ridge(train)
    model = p.RidgeSkip(make_model(mean="identity", floor=0.0), ridge)
    before, floor = p.forecast_one_step(model, test), p.floor_forecasts(train, test, ridge=ridge)["AR ridge"]
    np.testing.assert_allclose(before.mu, floor.mu, rtol=1e-5)  # float32
    np.testing.assert_allclose(before.sigma, floor.sigma, rtol=1e-5)
    again = p.RidgeSkip(make_model(mean="identity", floor=0.0), p.fit_ridge(train))
    again.load_state_dict(model.state_dict())  # the ridge travels with the weights
    config = p.OneStepConfig.mini(**SETTINGS, pretrain=False)
    p.train_one_step(model, train, config)
    after = p.forecast_one_step(model, test)
    assert not np.allclose(after.mu, before.mu, rtol=1e-4) and np.allclose(after.mu, before.mu, rtol=0.2)
    with pytest.raises(ValueError, match="no pretraining; set pretrain=False"):
        p.train_one_step(model, train, p.OneStepConfig.mini(**SETTINGS))
    with pytest.raises(ValueError, match="no pretraining; set pretrain=False"):
        model(torch.zeros(1, 25, 4), last_only=False)
    with pytest.raises(ValueError, match="mean='identity'"):
        p.RidgeSkip(make_model(), ridge)
    longer = OneStepWindows(*make_series(), length=49, horizon=24, stride=24)
    with pytest.raises(ValueError, match="the ridge sees 48 steps and 2 covariates, the model 24 and 2"):
        p.RidgeSkip(make_model(mean="identity"), p.fit_ridge(longer))


def test_conformal_calibration_mends_a_wrong_sigma():
    generator = np.random.default_rng(0)
    sigma = generator.uniform(1, 5, size=4000)
    y = generator.normal(size=4000) * sigma
    for lie in (0.3, 1.0, 3.0):
        made = p.OneStepForecast(np.zeros(4000), lie * sigma, y, np.ones(4000))
        halves = [
            p.OneStepForecast(*(part[rows] for part in (made.mu, made.sigma, made.y, made.v)))
            for rows in (slice(2000), slice(2000, None))
        ]
        low, high = p.conformal_interval(*halves, level=0.9)
        # the coverage of 2,000 intervals that 2,000 scores have calibrated scatters by about 0.01
        assert metrics.coverage(halves[1].y, low, high) == pytest.approx(0.9, abs=0.04)
        np.testing.assert_allclose((high - low) / sigma[2000:], 2 * 1.645, rtol=0.1)  # one factor for all
    assert halves[1].scores(0.9)["coverage"] > 0.99


def test_the_report():
    train, calibration, test = make_windows(0, 30), make_windows(30, 45), make_windows(45, 60)
    model = p.RidgeSkip(make_model(mean="identity"), p.fit_ridge(train))
    report = p.one_step_report(model, train, calibration, test)
    assert list(report) == ["Pyraformer", "seasonal naive", "AR ridge"]
    for row in report.values():
        assert set(row) == {
            "nrmse", "nd", "mae", "nll", "crps", "coverage", "width", "interval_score",
            "calibrated_coverage", "calibrated_width", "calibrated_interval_score",
        }  # fmt: skip
        assert row["calibrated_coverage"] == pytest.approx(0.9, abs=0.06)
    assert report["AR ridge"]["crps"] == p.floor_forecasts(train, test)["AR ridge"].scores()["crps"]
