"""Today's switches: normalisation, the linear start, patches, covariates, gaps, and what may not influence what."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.pyraformer.baselines import RidgeNLinear
from oral4.pyraformer.modern import NORMS, ModernConfig, ModernPyraformer, Outputs, instance_norm

TINY = ModernConfig(
    history=30, horizon=13, patch_len=4, windows=(2, 2), d_model=8, num_heads=2, d_inner=12, num_layers=1, dropout=0.0
)
ANCHORS = {"last": "last", "mean": "mean", "revin": "mean", "none": "none"}


def build(seed=0, *, location=None, shake=True, **changes):
    """Return a tiny model; shaken, no weight is 0, as after training."""
    torch.manual_seed(seed)
    model = ModernPyraformer(replace(TINY, **changes), location=location).eval()
    if shake:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(config, batch=3, seed=1):
    """Return histories and all that the configuration asks for."""
    g = torch.Generator().manual_seed(seed)
    L, M = config.history, config.horizon
    given = {"y": torch.randn(batch, L, generator=g)}
    if config.num_past:
        given["past"] = torch.randn(batch, L, config.num_past, generator=g)
    if config.num_future:
        given["future"] = torch.randn(batch, L + M, config.num_future, generator=g)
    if config.num_static:
        given["static"] = torch.randn(batch, config.num_static, generator=g)
    if config.gaps:
        given["observed"] = torch.rand(batch, L, generator=g) > 0.3
    return given


def forecast(model, y, **given):
    out = model(y, **given)
    return out.restore(out.raw[..., 0]).detach()


EVERYTHING = {"num_outputs": 3, "num_past": 2, "num_future": 3, "num_static": 2, "gaps": True, "shape_only": 6}


# ---- instance normalisation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "level", "spread"),
    [("none", 0.0, 1.0), ("last", 4.0, 1.0), ("mean", 2.0, 1.0), ("revin", 2.0, (10 / 4 + 0.03**2) ** 0.5)],
)
def test_norm_by_hand(kind, level, spread):
    window = torch.tensor([[1.0, 0.0, 3.0, 4.0]], dtype=torch.float64)  # squares: 1 + 4 + 1 + 4 = 10, over 4
    got = [float(part) for part in instance_norm(window, kind)]
    assert got == pytest.approx([level, spread], abs=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_norm_reads_observed_values_alone(kind):
    y = torch.randn(6, 9, dtype=torch.float64)
    observed = torch.rand(6, 9) > 0.4
    observed[0], observed[1], observed[2, -1] = False, True, False
    hidden = y.masked_fill(~observed, float("nan"))
    levels, spreads = instance_norm(hidden, kind, observed)
    assert torch.isfinite(levels).all() and torch.isfinite(spreads).all()
    assert (float(levels[0]), float(spreads[0])) == (0.0, 1.0)  # nothing was observed
    for row in range(1, 6):
        level, spread = instance_norm(y[row, observed[row]][None], kind)
        # the same sums in another order
        torch.testing.assert_close((levels[row], spreads[row]), (level[0], spread[0]), rtol=1e-12, atol=1e-12)


def test_a_constant_window_keeps_a_spread():
    for value in (0.0, 7.0, -1e4):
        level, spread = instance_norm(torch.full((2, 50), value), "revin")
        assert level.flatten().tolist() == [value] * 2
        torch.testing.assert_close(spread, torch.full((2, 1), 0.03), rtol=1e-6, atol=0)
        z = (torch.full((2, 50), value) - level) / spread
        assert bool((z == 0).all())


def test_unknown_norm():
    with pytest.raises(ValueError, match="instance_norm='z' is unknown; choose one of none, last, mean"):
        instance_norm(torch.zeros(1, 3), "z")
    with pytest.raises(ValueError, match="instance_norm='z' is unknown"):
        replace(TINY, instance_norm="z")


@pytest.mark.parametrize("kind", ["last", "mean", "revin"])
@pytest.mark.parametrize("shape_only", [0, 6])
def test_a_shift_of_the_history_shifts_the_forecast(kind, shape_only):
    model = build(instance_norm=kind, shape_only=shape_only).double()
    y = torch.randn(4, TINY.history, dtype=torch.float64)
    shifted = forecast(model, y + 100.0)
    # rounding of numbers near 100, times the weights
    torch.testing.assert_close(shifted, forecast(model, y) + 100.0, rtol=0, atol=1e-9)


def test_without_normalisation_a_shift_is_seen():
    model = build(instance_norm="none").double()
    y = torch.randn(4, TINY.history, dtype=torch.float64)
    assert float((forecast(model, y + 100.0) - forecast(model, y) - 100.0).abs().max()) > 1


@pytest.mark.parametrize("scale", [0.5, 3.0, -2.0])
def test_revin_is_equivariant_to_scale_up_to_its_floor(scale):
    model = build(instance_norm="revin", linear_skip=False).double()
    y = torch.randn(4, TINY.history, dtype=torch.float64)
    if scale < 0:  # only a positive factor drops out of the spread
        assert float((forecast(model, scale * y) - scale * forecast(model, y)).abs().max()) > 1e-2
        return
    difference = float((forecast(model, scale * y + 5) - scale * forecast(model, y) - 5).abs().max())
    # spread^2 = var + floor^2: the floor is 0.03 of the data's unit, so about 0.0005 of var near 1
    assert 0 < difference < 2e-2
    exact = model(y), model(scale * y)
    assert float(exact[1].scale.mean() / exact[0].scale.mean()) == pytest.approx(scale, rel=3e-3)


def test_scale_is_not_taken_off_by_mean():
    model = build(instance_norm="mean").double()
    y = torch.randn(4, TINY.history, dtype=torch.float64)
    assert float((forecast(model, 3 * y) - 3 * forecast(model, y)).abs().max()) > 1e-2


def test_normalise_and_restore_are_inverse():
    out = Outputs(torch.zeros(2, 5, 3), torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [4.0]]))
    y, many = torch.randn(2, 5), torch.randn(2, 5, 3)
    torch.testing.assert_close(out.restore(out.normalise(y)), y)
    assert out.restore(many).shape == (2, 5, 3)
    for k in range(3):
        torch.testing.assert_close(out.restore(many)[..., k], out.restore(many[..., k]))


# ---- the linear start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("period", [None, 6])
def test_starts_as_the_ridge_regression(kind, period):
    series = np.random.default_rng(0).normal(size=(400, 2)) + 3 * np.sin(np.arange(400) / 6 * 2 * np.pi)[:, None]
    ridge = RidgeNLinear(30, 13, 10.0, anchor=ANCHORS[kind], period=period).fit(series)
    model = build(instance_norm=kind, shake=False)
    model.set_skip(ridge)
    y = torch.randn(20, 30, dtype=torch.float64) + 2
    expected = torch.from_numpy(ridge.predict(y.numpy()))
    found = forecast(model, y.float()).double()
    # thirty products of numbers near 1 in float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((expected - y.mean(dim=1, keepdim=True)).abs().max()) > 0.1  # the map is not trivial
    torch.testing.assert_close(forecast(model.double(), y), expected, rtol=0, atol=1e-6)  # weights rounded to float32


@pytest.mark.parametrize("kind", ["none", "mean"])
def test_without_a_map_it_starts_at_the_level(kind):
    y = torch.randn(5, 30)
    level = instance_norm(y, kind)[0]
    for skip in (True, False):
        model = build(instance_norm=kind, linear_skip=skip, shake=False)
        torch.testing.assert_close(forecast(model, y), level.expand(5, 13))


def test_set_skip_can_freeze():
    ridge = RidgeNLinear(30, 13, 1.0, anchor="mean").fit(np.random.default_rng(0).normal(size=300))
    model = build(shake=False)
    model.set_skip(ridge)
    assert not model.skip.weight.requires_grad
    model.set_skip(ridge, train=True)
    assert model.skip.weight.requires_grad
    ridge.weight[:] = 0  # the model has a copy
    assert float(model.skip.weight.detach().abs().max()) > 0


def test_set_skip_refuses_what_does_not_fit():
    data = np.random.default_rng(0).normal(size=300)
    model = build(shake=False)
    before = model.skip.weight.clone()
    for ridge in (
        RidgeNLinear(29, 13, anchor="mean"),
        RidgeNLinear(30, 12, anchor="mean"),
        RidgeNLinear(30, 13, anchor="last"),
        RidgeNLinear(30, 13, anchor="mean", intercept=True),
    ):
        with pytest.raises(ValueError, match="fit one with history=30, horizon=13, anchor='mean', intercept"):
            model.set_skip(ridge.fit(data))
    with pytest.raises(ValueError, match=r"not fitted yet; call its fit\(series\) first"):
        model.set_skip(RidgeNLinear(30, 13, anchor="mean"))
    torch.testing.assert_close(model.skip.weight, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="no linear map; set linear_skip=True"):
        build(linear_skip=False).set_skip(RidgeNLinear(30, 13, anchor="mean").fit(data))


def test_only_locations_get_the_linear_map():
    """A spread is no place on the axis of the data: the map must not move it."""
    model = build(num_outputs=3, location=[True, False, True], shake=False)
    torch.nn.init.normal_(model.skip.weight)
    raw = model(torch.randn(4, 30)).raw.detach()
    assert bool((raw[..., 1] == 0).all()) and float(raw[..., 0].abs().min()) > 0
    torch.testing.assert_close(raw[..., 0], raw[..., 2], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"location has shape \(2,\); give one truth value for each of 3 outputs"):
        build(num_outputs=3, location=[True, False])


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        EVERYTHING,
        {"patch_len": 1, "windows": (4,)},
        {"patch_len": 7},  # 30 is no multiple of 7
        {"patch_len": 16, "horizon": 3, "num_future": 2, "windows": (2,)},  # the horizon is shorter than a patch
        {"history": 5, "patch_len": 24, "windows": ()},  # one patch, most of it before the history
        {"horizon": 1, "shape_only": 24},
        {"coarsen": "average"},
        {"coarsen": "conv"},
        {"num_layers": 2, "neighbours": 5, "dropout": 0.3},
        {"linear_skip": False, "instance_norm": "revin"},
    ],
)
def test_every_option_has_its_shapes(changes):
    model = build(**changes)
    config = model.config
    out = model(**inputs(config))
    assert out.raw.shape == (3, config.horizon, config.num_outputs)
    assert out.level.shape == out.scale.shape == (3, 1)
    assert bool(torch.isfinite(out.raw).all())
    assert config.num_patches == -(-config.history // config.patch_len)
    assert config.backbone().spec.length == config.num_patches + 1  # and the prediction token
    assert model(**{k: v[:1] for k, v in inputs(config).items()}).raw.shape[0] == 1


def test_patches_read_every_step_once():
    """The newest step lies in the last patch before the token, the oldest behind zeros."""
    model = build(history=10, patch_len=4, windows=(), num_layers=1)
    y = torch.arange(1.0, 11.0)[None]
    seen = []
    model.embedding.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model._nodes(y, None, None, None, None)
    expected = [[0, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [0, 0, 0, 0]]
    assert seen[0][0].tolist() == expected


def test_the_token_knows_the_first_patch_ahead_and_no_other():
    model = build(history=8, horizon=6, patch_len=4, windows=(), num_future=1)
    future = torch.arange(1.0, 15.0)[None, :, None]
    seen = []
    model.embedding.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model._nodes(torch.zeros(1, 8), None, future, None, None)
    known = seen[0][0].unflatten(1, (4, 2))[..., 1]
    assert known.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    short = build(history=8, horizon=2, patch_len=4, windows=(), num_future=1)
    short.embedding.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    short._nodes(torch.zeros(1, 8), None, future[:, :10], None, None)
    assert seen[1][0].unflatten(1, (4, 2))[2, :, 1].tolist() == [9, 10, 0, 0]


def test_rows_do_not_mix():
    """One series a row: in evaluation another batch changes nothing."""
    model = build(**EVERYTHING)
    given = inputs(model.config, batch=5)
    raw = model(**given).raw
    order = torch.tensor([3, 0, 4, 2, 1])
    # batched matrix products may round differently
    torch.testing.assert_close(model(**{k: v[order] for k, v in given.items()}).raw, raw[order], rtol=1e-4, atol=1e-5)
    for name, value in given.items():
        changed = value.clone()
        changed[0] = ~value[0] if value.dtype == torch.bool else value[0] + 1
        other = model(**{**given, name: changed}).raw
        torch.testing.assert_close(other[1:], raw[1:], rtol=0, atol=0)
        assert not torch.equal(other[0], raw[0]), name


# ---- shape_only ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(period=st.integers(1, 20), horizon=st.integers(1, 17), seed=st.integers(0, 9))
def test_the_correction_has_no_mean_within_a_period(period, horizon, seed):
    model = build(seed, horizon=horizon, shape_only=period, linear_skip=False).double()
    raw = model(torch.randn(2, 30, dtype=torch.float64)).raw[..., 0]
    for start in range(0, horizon, period):
        mean = raw[:, start : start + period].mean(dim=1)  # the last period may be cut
        assert float(mean.detach().abs().max()) < 1e-12
    if 1 < period and 1 < horizon:
        assert float(raw.detach().abs().max()) > 1e-6  # something is left


def test_shape_only_is_the_free_correction_less_its_means():
    y = torch.randn(3, 30)
    free, bound = (build(num_outputs=2, location=[True, False], shape_only=period) for period in (0, 5))
    with torch.no_grad():
        for model in (free, bound):
            model.skip.weight.zero_()
        a, b = free(y).raw, bound(y).raw
    torch.testing.assert_close(b[..., 1], a[..., 1], rtol=0, atol=0)  # not a location: left alone
    for start, stop in ((0, 5), (5, 10), (10, 13)):
        part = a[:, start:stop, 0]
        torch.testing.assert_close(b[:, start:stop, 0], part - part.mean(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_shape_only_keeps_the_means_of_the_linear_map():
    model = build(shape_only=13)
    y = torch.randn(3, 30)
    z = y - y.mean(dim=1, keepdim=True)
    torch.testing.assert_close(model(y).raw.mean(dim=1)[:, 0], model.skip(z).mean(dim=1), rtol=1e-4, atol=1e-5)


# ---- covariates and gaps ---------------------------------------------------------------------------------------------


def test_a_known_future_moves_its_own_step():
    """Beyond the first patch ahead, a covariate of a step reaches that step alone, through the future head."""
    model = build(num_future=2, patch_len=4)
    given = inputs(model.config)
    before = model(**given).raw.detach()
    given["future"] = given["future"].clone()
    given["future"][:, 30 + 9] += 1
    change = (model(**given).raw.detach() - before).abs().amax(dim=(0, 2))
    assert float(change[9]) > 1e-3
    assert bool((torch.cat([change[:9], change[10:]]) == 0).all())
    given["future"][:, 30 + 1] += 1  # the token sees it: it may move every step
    assert bool(((model(**given).raw.detach() - before).abs().amax(dim=(0, 2)) > 0).all())


def test_covariates_reach_the_output_through_training():
    model = build(shake=False, num_future=1, patch_len=4)
    given = inputs(model.config)
    given["future"].requires_grad_()
    assert torch.autograd.grad(model(**given).raw.sum(), given["future"])[0].abs().sum() == 0  # heads start at zero
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    target = given["future"].detach()[:, 30:, 0]
    for _ in range(2):
        optimizer.zero_grad()
        (model(**given).raw[..., 0] - target).square().mean().backward()
        optimizer.step()
    gradient = torch.autograd.grad(model(**given).raw.sum(), given["future"])[0]
    assert bool((gradient[:, 30:].abs() > 0).all())


@pytest.mark.parametrize("name", ["past", "future", "static"])
def test_covariates_are_asked_for_by_name(name):
    model = build(**EVERYTHING)
    given = inputs(model.config)
    with pytest.raises(ValueError, match=f"built with {given[name].shape[-1]} {name} covariates; give {name} of shape"):
        model(**{k: v for k, v in given.items() if k != name})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        model(**{**given, name: given[name][..., :1]})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        model(**{**given, name: given[name][:1]})  # would be broadcast over all rows
    with pytest.raises(ValueError, match=f"{name} has shape"):
        build()(given["y"], **{name: given[name]})


def test_masked_values_have_no_influence():
    for kind in NORMS:
        model = build(**EVERYTHING, instance_norm=kind)
        given = inputs(model.config)
        out = model(**given)
        for poison in (float("nan"), float("inf"), 1e6):
            other = model(**{**given, "y": given["y"].masked_fill(~given["observed"], poison)})
            for a, b in zip(out, other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_model_sees_where_the_gaps_are():
    """A missing value is not the same as one at the level."""
    model = build(gaps=True)
    y = torch.randn(2, 30)
    observed = torch.ones(2, 30, dtype=torch.bool)
    torch.testing.assert_close(model(y).raw, model(y, observed=observed).raw, rtol=0, atol=0)
    observed[:, 7] = False
    filled = torch.where(observed, y, torch.zeros(()))
    level = instance_norm(filled, "mean", observed)[0]
    filled = torch.where(observed, y, level)  # the same normalised numbers
    assert float((model(filled).raw - model(y, observed=observed).raw).detach().abs().max()) > 1e-4


def test_a_window_without_any_value():
    model = build(**EVERYTHING)
    given = inputs(model.config)
    given["y"][:], given["observed"][:] = float("nan"), False
    assert all(bool(torch.isfinite(part).all()) for part in model(**given))


def test_bad_histories():
    model = build()
    for y in (torch.zeros(3, 29), torch.zeros(30), torch.zeros(3, 30, 1)):
        with pytest.raises(ValueError, match=r"give \(B, 30\), one series a row"):
            model(y)
    y = torch.zeros(3, 30)
    with pytest.raises(ValueError, match="built for series without gaps; set gaps=True"):
        model(y, observed=torch.ones(3, 30, dtype=torch.bool))
    gappy = build(gaps=True)
    for observed in (torch.ones(3, 30), torch.ones(1, 30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"observed is torch\.\w+ .*; give torch.bool \(3, 30\)"):
            gappy(y, observed=observed)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, EVERYTHING, {"linear_skip": False, "instance_norm": "revin"}])
def test_gradient_reaches_every_parameter(changes):
    """At the start only the zero heads have a gradient; after a step all have, but for what a norm cancels."""
    model = build(shake=False, **changes).train()
    given = inputs(model.config, batch=6)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def gradients():
        optimizer.zero_grad()
        raw = model(**given).raw
        (raw - torch.linspace(-1, 1, raw.shape[1])[:, None].cos() - 1).square().mean().backward()
        return {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}

    first = gradients()
    outer = {"head", "future_head", "skip"}
    assert {name.split(".")[0] for name, size in first.items() if size > 0} <= outer
    for _ in range(3):
        optimizer.step()
        last = gradients()
    assert set(last) == {name for name, _ in model.named_parameters()}
    # a bias in front of a batch normalisation is taken off again: its gradient is rounding
    dead = {name for name, size in last.items() if size < 1e-9}
    assert all(name.startswith("encoder.coarsen") and name.endswith("bias") for name in dead), dead


def test_learns_what_the_line_cannot():
    """The product of two signs is no linear map of the history: the pyramid has to learn it."""
    g = torch.Generator().manual_seed(0)
    model = build(shake=False, history=8, horizon=2, windows=(2,), instance_norm="none", d_model=16).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    y = torch.randn(256, 8, generator=g)
    target = (y[:, :1] * y[:, 7:]).sign().expand(-1, 2)
    losses = []
    for _ in range(80):
        loss = (model(y).raw[..., 0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.0, abs=1e-6)
    assert losses[-1] < 0.5


def test_state_dict_round_trip():
    model = build(1, **EVERYTHING, location=[True, False, True])
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    other = build(2, **EVERYTHING, location=[True, False, True])
    given = inputs(model.config)
    assert not torch.equal(model(**given).raw, other(**given).raw)
    other.load_state_dict(torch.load(memory, weights_only=True))
    for a, b in zip(model(**given), other(**given), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": 0}, "history=0: give a whole number from 1 on"),
        ({"horizon": 2.0}, "horizon=2.0: give a whole number from 1 on"),
        ({"num_outputs": True}, "num_outputs=True: give a whole number from 1 on"),
        ({"patch_len": -1}, "patch_len=-1: give a whole number from 1 on"),
        ({"num_past": -1}, "num_past=-1: give a whole number from 0 on"),
        ({"shape_only": 1.5}, "shape_only=1.5: give a whole number from 0 on"),
        ({"d_model": 9}, "d_model=9 is no multiple of num_heads=2"),
        ({"neighbours": 2}, "2"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"windows": (5, 5)}, "5"),
        ({"coarsen": "median"}, "median"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(TINY, **changes)


def test_windows_may_be_a_list():
    assert replace(TINY, windows=[2, 2]) == TINY
    assert hash(replace(TINY, windows=[2, 2])) == hash(TINY)
