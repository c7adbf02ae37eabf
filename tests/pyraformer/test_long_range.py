"""Scores over every window, two protocols, and what a run may and may not change."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from oral4.pyraformer import long_range
from oral4.pyraformer.baselines import RidgeNLinear
from oral4.pyraformer.data import SeriesTable, chronological_splits
from oral4.pyraformer.long_range import (
    ChannelIndependent,
    Protocol,
    fit_linear,
    make_faithful,
    make_modern,
    score,
    small_config,
    train_long_range,
)
from oral4.pyraformer.modern import ModernConfig, ModernPyraformer

HISTORY, HORIZON = 16, 6


def make_splits(values):
    stamps = np.datetime64("2020-01-01T00", "s") + np.arange(len(values)) * np.timedelta64(3600, "s")
    table = SeriesTable(stamps, values, tuple(f"c{i}" for i in range(values.shape[1])))
    return chronological_splits(table, HISTORY, HORIZON, (120, 160, 200))


def table_values(seed=0):
    rng = np.random.default_rng(seed)
    hours = np.arange(200)[:, None]
    return 10 + 3 * np.sin(2 * np.pi * hours / 8 + np.arange(2)) + 0.3 * rng.normal(size=(200, 2)).cumsum(axis=0)


SPLITS = make_splits(table_values())  # 99 training windows, 35 each of validation and test
TINY = {"windows": (2, 2), "neighbours": 3, "d_model": 8, "num_heads": 2, "d_k": 4, "d_inner": 8, "d_bottleneck": 4}
MODERN = ModernConfig(
    history=HISTORY, horizon=HORIZON, patch_len=4, windows=(2,), d_model=8, num_heads=2, d_inner=8, num_layers=1
)


def faithful(seed=0, **changes):
    return make_faithful(small_config(HISTORY, HORIZON, 2, num_layers=1, **TINY, **changes), seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


class Line(nn.Module):
    """Repeats a learned number: what an update does can be written down."""

    def __init__(self, start=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(start)))

    def forward(self, x, marks, future_marks):
        return self.value.expand(len(x), future_marks.shape[1], x.shape[2])


# ---- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize("stride", [1, 4])
def test_score_is_the_naive_loop(batch, stride):
    model = faithful().eval()
    square, absolute, count = 0.0, 0.0, 0
    for index in range(0, len(SPLITS.test), stride):
        x, y, marks, future_marks = (part[None] for part in SPLITS.test[index])
        error = (model(x, marks, future_marks) - y).detach().double()
        square, absolute, count = square + float(error.square().mean()), absolute + float(error.abs().mean()), count + 1
    found = score(model, SPLITS.test, stride=stride, batch=batch)
    # forecasts in float32, batched in another way
    assert found.mse == pytest.approx(square / count, rel=1e-5)
    assert found.mae == pytest.approx(absolute / count, rel=1e-5)
    assert found.num_windows == count


def test_score_counts_every_window():
    """35 windows in batches of 8: the last three count like all others."""
    found = score(Line(), SPLITS.test, batch=8)
    assert (found.num_windows, len(SPLITS.test)) == (35, 35)
    ahead = np.stack([SPLITS.test.batch([i])[1][0].double().numpy() for i in range(35)])
    assert found.mse == pytest.approx(float((ahead**2).mean()), rel=1e-6)
    without = float((ahead[:32] ** 2).mean())
    assert abs(without / found.mse - 1) > 1e-3  # a loader that drops them reports another number


@pytest.mark.parametrize("mode", [True, False])
def test_score_judges_in_evaluation_mode_and_puts_the_mode_back(mode):
    model = faithful(dropout=0.5).train(mode)
    assert score(model, SPLITS.val) == score(model, SPLITS.val)  # no dropout
    assert model.training is mode
    assert all(p.grad is None for p in model.parameters())


def test_score_refuses_strange_steps():
    with pytest.raises(ValueError, match="stride=0, batch=8: give whole numbers from 1 on"):
        score(Line(), SPLITS.val, stride=0, batch=8)
    with pytest.raises(ValueError, match="stride=1, batch=-8"):
        score(Line(), SPLITS.val, batch=-8)


# ---- one series a row ------------------------------------------------------------------------------------------------


def test_channels_are_rows():
    torch.manual_seed(0)
    model = ModernPyraformer(MODERN).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(3, HISTORY, 5)
    found = ChannelIndependent(model)(x, torch.zeros(3, HISTORY, 4), torch.zeros(3, HORIZON, 4))
    assert found.shape == (3, HORIZON, 5)
    for channel in range(5):
        out = model(x[:, :, channel])
        # another batch size may round otherwise
        torch.testing.assert_close(found[:, :, channel], out.restore(out.raw[..., 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"num_outputs": 2}, {"num_past": 1}, {"num_future": 1}, {"num_static": 1}])
def test_a_table_gives_no_covariates(changes):
    with pytest.raises(ValueError, match="give one of a single output and no covariates"):
        ChannelIndependent(ModernPyraformer(replace(MODERN, **changes)))


# ---- protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "cosine"}, "schedule='cosine': choose one of one_cycle, steps"),
        ({"loss": "rmse"}, "loss='rmse': choose one of mse, mae, huber"),
        ({"select": "best"}, "select='best': choose one of validation, test, last"),
        ({"updates": 0}, "updates=0: give a whole number from 1 on"),
        ({"epochs": 0}, "epochs=0: give a whole number from 1 on or None"),
        ({"batch": 2.0}, "batch=2.0: give a whole number from 1 on"),
        ({"evaluations": None}, "evaluations=None: give a whole number from 1 on"),
        ({"validation_stride": True}, "validation_stride=True: give"),
        ({"test_stride": -1}, "test_stride=-1: give"),
        ({"lr": -1e-3}, "lr=-0.001: give a finite number from 0 on"),
        ({"decay": math.inf}, "decay=inf: give a finite number"),
        ({"weight_decay": math.nan}, "weight_decay=nan: give a finite number"),
        ({"select": "last", "keep_initial": True}, "keep_initial=True needs a judge"),
    ],
)
def test_bad_protocols(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Protocol(**changes)


def test_the_official_protocol_is_the_official_script():
    official = Protocol.official()
    assert (official.epochs, official.lr, official.schedule, official.decay) == (5, 1e-4, "steps", 0.1)
    assert (official.weight_decay, official.clip_norm, official.ema_decay, official.loss) == (0.0, None, None, "mse")
    assert (official.batch, official.select, official.validation_stride, official.test_stride) == (32, "test", 1, 1)
    assert Protocol.official(batch=16, lr=1e-5) == replace(official, batch=16, lr=1e-5)


def spy(monkeypatch):
    """Record learning rate and loss of every update, and the settings, of the next run."""
    log, fit = {"lr": [], "settings": None}, long_range.fit

    def recording(step, model, optimizer, batches, config, **others):
        log["settings"], log["optimizer"] = config, optimizer
        optimizer.register_step_pre_hook(lambda *_: log["lr"].append(optimizer.param_groups[0]["lr"]))
        return fit(step, model, optimizer, batches, config, **others)

    monkeypatch.setattr(long_range, "fit", recording)
    return log


def test_official_updates_and_rates(monkeypatch):
    """99 windows, batches of 32, the incomplete one dropped: three updates an epoch, a tenth of the rate after each."""
    log = spy(monkeypatch)
    outcome = train_long_range(faithful(), SPLITS, Protocol.official(lr=1e-2))
    expected = [1e-2 * 0.1**epoch for epoch in range(5) for _ in range(3)]
    np.testing.assert_allclose(log["lr"], expected, rtol=1e-9)
    assert outcome.updates == 15 and outcome.step in (3, 6, 9, 12, 15)
    assert log["settings"].clip_norm is None and log["optimizer"].param_groups[0]["weight_decay"] == 0
    judged = [value for value in outcome.history["val_mse"] if value is not None]
    assert len(judged) == 5
    assert min(judged) == pytest.approx(outcome.test.mse, rel=1e-6)  # chosen on the test set itself
    assert sum(expected[6:]) / sum(expected) == pytest.approx(0.01, rel=0.01)  # epochs 3 to 5 hardly move


def test_one_cycle_goes_up_and_down(monkeypatch):
    log = spy(monkeypatch)
    outcome = train_long_range(faithful(), SPLITS, Protocol(updates=20, batch=8, lr=1e-2, evaluations=4))
    rates = np.array(log["lr"])
    assert len(rates) == outcome.updates == 20
    assert rates.argmax() == 3 and rates.max() == pytest.approx(1e-2)  # a fifth of the way
    assert (np.diff(rates[3:]) < 0).all() and rates[-1] < 1e-5
    steps = [s for s, v in zip(outcome.history["step"], outcome.history["val_mse"], strict=True) if v is not None]
    assert steps == [5, 10, 15, 20]


def test_an_epoch_sees_every_window_once(monkeypatch):
    seen, batch = [], SPLITS.train.batch
    monkeypatch.setattr(SPLITS.train, "batch", lambda chosen: (seen.extend(chosen.tolist()), batch(chosen))[1])
    train_long_range(Line(), SPLITS, Protocol(epochs=2, updates=1, batch=33))
    assert sorted(seen[:99]) == sorted(seen[99:]) == list(range(99))
    assert seen[:99] != seen[99:] and seen[:99] != list(range(99))
    seen.clear()
    train_long_range(Line(), SPLITS, Protocol(epochs=1, batch=50))
    assert len(set(seen)) == len(seen) == 50  # one batch; the other 49 windows make none


# ---- which state is kept ---------------------------------------------------------------------------------------------


def overfitting_run(select):
    """The targets of training are near 0, of validation near 1 and of test near 2: each judge wants another state."""
    values = np.zeros((200, 1))
    values[120:160], values[160:] = 1.0, 2.0
    rng = np.random.default_rng(0)
    splits = make_splits(values + 1e-3 * rng.normal(size=values.shape))
    scale = 1 / splits.scaler.std[0]  # the training part is noise: bring it back to the units above
    for part in (splits.train, splits.val, splits.test):
        part._values /= scale
    model = Line(2.0)  # on its way from 2 to 0 it passes 1
    protocol = Protocol(
        updates=30, batch=16, lr=0.2, schedule="steps", decay=1.0, weight_decay=0.0, select=select, clip_norm=None,
        validation_stride=1,
    )  # fmt: skip
    return model, train_long_range(model, splits, protocol)


def test_each_judge_keeps_another_state():
    """`steps` with 6 updates an epoch: states at 6, 12, 18, 24 and 30 on the way from 2 to 0."""
    last, by_validation, by_test = (overfitting_run(select) for select in ("last", "validation", "test"))
    value_l, value_v, value_t = (float(run[0].value.detach()) for run in (last, by_validation, by_test))
    assert value_l < value_v <= value_t and abs(value_l) < 0.5
    assert by_validation[1].validation.mse < last[1].validation.mse
    assert by_test[1].test.mse <= by_validation[1].test.mse < last[1].test.mse
    assert last[1].step == last[1].updates == 30 and last[1].history.get("val_mse") is None
    assert by_test[1].step == 6


def test_the_outcome_is_that_of_the_model_handed_back():
    model = faithful()
    protocol = Protocol(updates=12, batch=16, lr=3e-3, validation_stride=3, test_stride=2)
    outcome = train_long_range(model, SPLITS, protocol)
    assert outcome.test == score(model, SPLITS.test, stride=2)
    assert outcome.validation == score(model, SPLITS.val, stride=3)
    judged = dict(zip(outcome.history["step"], outcome.history["val_mse"], strict=True))
    assert judged[outcome.step] == min(v for v in judged.values() if v is not None)
    assert judged[outcome.step] == pytest.approx(outcome.validation.mse, rel=1e-6)
    assert outcome.seconds > 0


def test_training_helps():
    model = faithful()
    before = score(model, SPLITS.test).mse
    outcome = train_long_range(model, SPLITS, Protocol(updates=60, batch=32, lr=1e-2))
    assert outcome.test.mse < 0.9 * before and outcome.step > 0


def test_keep_initial_returns_the_untrained_state():
    """A rate of zero helps nobody, and a huge one harms: both give back what came in, bit for bit."""
    for lr, kept in ((0.0, 0), (1e2, 0)):
        model = make_modern(MODERN, SPLITS, period=8)
        before, first = {k: v.clone() for k, v in model.state_dict().items()}, score(model, SPLITS.test)
        outcome = train_long_range(model, SPLITS, Protocol(updates=4, batch=32, lr=lr, keep_initial=True))
        assert outcome.step == kept and outcome.updates == 4
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert outcome.test == first
    harmed = make_modern(MODERN, SPLITS, period=8)
    assert train_long_range(harmed, SPLITS, Protocol(updates=4, batch=32, lr=1e2)).step > 0


def test_keep_initial_lets_a_better_state_win():
    model = faithful()
    outcome = train_long_range(model, SPLITS, Protocol(updates=40, batch=32, lr=1e-2, keep_initial=True))
    assert outcome.step > 0


def test_averaged_weights_are_what_is_judged_and_kept():
    def run(ema):
        model = Line(1.0)
        protocol = Protocol(
            updates=6, batch=16, lr=0.1, schedule="steps", decay=1.0, weight_decay=0.0, select="last", ema_decay=ema
        )
        train_long_range(model, SPLITS, protocol)
        return float(model.value.detach())

    assert 0 < run(None) < run(0.9) < 1  # the average lags behind


def test_losses_differ_as_named():
    """At an error of 2 everywhere: 4, 2, and 0.5 (2 - 0.25)."""
    forecast, y = torch.full((3, 2), 2.0), torch.zeros(3, 2)
    assert [float(long_range._loss(kind, forecast, y)) for kind in ("mse", "mae", "huber")] == [4.0, 2.0, 0.875]
    assert float(long_range._loss("huber", 0.1 * forecast, y)) == pytest.approx(0.02)
    found = {}
    for loss in ("mse", "mae", "huber"):
        train_long_range(model := Line(3.0), SPLITS, Protocol(updates=2, batch=8, loss=loss, clip_norm=None))
        found[loss] = train_long_range(model, SPLITS, Protocol(updates=1, batch=8, loss=loss)).history["loss"][0]
    assert found["mse"] > found["mae"] > found["huber"]


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_a_run_is_its_seed():
    protocol = Protocol(updates=6, batch=16, lr=1e-2)
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)  # the state of the global generator does not matter
        model = faithful(dropout=0.2)
        outcome = train_long_range(model, SPLITS, protocol, seed=seed)
        runs.append((weights(model), outcome.test))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_weights_are_their_seed():
    assert torch.equal(weights(faithful(3)), weights(faithful(3)))
    assert not torch.equal(weights(faithful(3)), weights(faithful(4)))
    ridge = fit_linear(MODERN, SPLITS, period=8)
    a, b, c = (weights(make_modern(MODERN, SPLITS, seed=seed, ridge=ridge)) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    faithful(1)
    make_modern(MODERN, SPLITS, seed=1, period=8)
    train_long_range(faithful(dropout=0.2), SPLITS, Protocol(updates=2, batch=8), seed=9)
    assert torch.equal(torch.rand(4), expected)


def test_the_device_is_the_arguments_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("ORAL4_DEVICE", "no such device")
    model = Line()
    train_long_range(model, SPLITS, Protocol(updates=1, batch=8), device="cpu")
    assert model.value.device.type == "cpu"
    assert long_range.os.environ["ORAL4_DEVICE"] == "no such device"
    monkeypatch.delenv("ORAL4_DEVICE")
    train_long_range(model, SPLITS, Protocol(updates=1, batch=8), device="cpu")
    assert "ORAL4_DEVICE" not in long_range.os.environ


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_training_part():
    with pytest.raises(ValueError, match="batch=100 is more than the 99 training windows; make it smaller"):
        train_long_range(faithful(), SPLITS, Protocol(batch=100))


@pytest.mark.parametrize("select", ["validation", "last"])
def test_a_loss_that_is_not_finite(select):
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        train_long_range(Line(math.nan), SPLITS, Protocol(updates=3, batch=8, select=select))


# ---- the two models --------------------------------------------------------------------------------------------------


def test_the_modern_model_starts_as_the_linear_one():
    for kind in ("none", "last", "mean", "revin"):
        config = replace(MODERN, instance_norm=kind)
        ridge = fit_linear(config, SPLITS, period=8)
        model = make_modern(config, SPLITS, period=8)
        x, _, marks, future_marks = SPLITS.test.batch([0, 7, 20])
        with torch.no_grad():
            found = model.eval()(x, marks, future_marks)
        expected = ridge.predict(x.mT.double().numpy())
        # a few products of numbers near 1 in float32
        np.testing.assert_allclose(found.mT.numpy(), expected, rtol=0, atol=2e-5)


def test_validation_chooses_the_penalty():
    ridge = fit_linear(MODERN, SPLITS, period=8)
    assert set(ridge.validation_mse) == set(long_range.PENALTIES)
    assert ridge.penalty == min(ridge.validation_mse, key=ridge.validation_mse.get)
    assert ridge.mse(SPLITS.val.series) == pytest.approx(ridge.validation_mse[ridge.penalty], rel=1e-9)
    assert len(set(ridge.validation_mse.values())) == len(long_range.PENALTIES)  # there was a choice


def test_a_map_of_your_own_is_taken():
    ridge = RidgeNLinear(HISTORY, HORIZON, 7.0, anchor="mean").fit(SPLITS.train.series)
    model = make_modern(MODERN, SPLITS, ridge=ridge)
    np.testing.assert_allclose(model.model.skip.weight.numpy(), ridge.weight, rtol=1e-6, atol=1e-7)
    assert make_modern(replace(MODERN, linear_skip=False), SPLITS).model.skip is None


def test_the_small_model_is_the_papers_layout():
    small = small_config(168, 336)
    assert (small.windows, small.neighbours, small.horizon, small.num_series) == ((4, 4, 4), 3, 336, 7)
    assert small_config(336, 720).neighbours == 5
    assert small_config(168, 168, 3, dropout=0.0).dropout == 0.0
    count = sum(p.numel() for p in make_faithful(small_config(168, 168)).parameters())
    assert 29 < 11_155_712 / count < 31  # the official one of ETTh1-168
