"""What fit computes: solutions, accumulation, clipping, averaging, early stopping, precision, and its refusals."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from oral4.train import FitResult, TrainConfig, fit
from oral4.train.batches import epoch_batches
from oral4.train.launch import make_accelerator, require_precision


def quiet(**settings) -> TrainConfig:
    return TrainConfig(**{"progress": False, "log_every": 1, **settings})


def squares(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def regression(rows=64, columns=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=dtype)
    noise = 0.1 * torch.randn(rows, 1, generator=generator, dtype=dtype)
    return x, x @ torch.arange(1.0, columns + 1, dtype=dtype)[:, None] + 0.5 + noise


def linear(columns=3, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(columns, 1, dtype=dtype)


def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_reaches_the_closed_form_solution():
    x, y = regression(dtype=torch.float64)
    model = linear(dtype=torch.float64)
    result = fit(squares, model, sgd(model, lr=0.3), [(x, y)], quiet(steps=300))
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    expected = torch.linalg.lstsq(design, y).solution.flatten()
    # float64 and a contraction of at least 0.8 per step: 300 steps leave nothing but rounding
    torch.testing.assert_close(weights(model), expected, rtol=0, atol=1e-10)
    assert isinstance(result, FitResult)
    assert (result.step, result.epoch, result.stopped, result.weights) == (300, 299, "steps", "last")
    assert result.history["loss"][-1] == pytest.approx(
        float((x @ expected[:3, None] + expected[3] - y).square().mean())
    )


def test_epochs_see_every_example_once():
    data = TensorDataset(torch.arange(10.0)[:, None])
    loader = DataLoader(data, batch_size=4, shuffle=True)
    seen = []

    def step(model, batch):
        seen.append(batch[0].flatten().tolist())
        return model(batch[0]).square().mean()

    model = linear(1)
    result = fit(step, model, sgd(model, lr=1e-3), loader, quiet(epochs=2))
    first, second = ([value for batch in part for value in batch] for part in (seen[:3], seen[3:]))
    assert (result.step, result.epoch, result.stopped) == (6, 2, "epochs")
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second  # each epoch has its own order


def test_order_depends_on_the_seed_and_not_on_the_callers_random_state():
    def orders(seed, loader):
        seen = []

        def step(model, batch):
            seen.append(batch.flatten().tolist())
            return model(batch).square().mean()

        model = linear(1)
        fit(step, model, sgd(model, lr=1e-3), loader, quiet(epochs=2, seed=seed))
        return seen

    def by_hand(epoch, generator):
        return torch.arange(12.0)[torch.randperm(12, generator=generator)].reshape(3, 4, 1)

    loader = DataLoader(torch.arange(12.0)[:, None], batch_size=4, shuffle=True)
    for batches in (by_hand, loader):
        torch.manual_seed(1)
        first = orders(0, batches)
        torch.manual_seed(2)
        assert orders(0, batches) == first
        assert orders(1, batches) != first


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_accumulation_equals_the_big_batch(optimizer):
    x, y = regression()
    trained = []
    for batches, accumulate in (([(x, y)], 1), (list(zip(x.split(16), y.split(16), strict=True)), 4)):
        model = linear()
        fit(squares, model, optimizer(model.parameters(), lr=0.05), batches, quiet(steps=20, accumulate=accumulate))
        trained.append(weights(model))
    # the same sum of 64 float32 terms in another order, over 20 steps: a few units in the last place of values near 3
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-5)


def test_weights_of_batches_make_the_mean_over_examples():
    x, y = regression()
    sizes = [30, 2, 17, 15]

    def weighted(model, batch):
        return {"loss": squares(model, batch), "weight": len(batch[0])}

    whole, parts, unweighted = linear(), linear(), linear()
    pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
    fit(squares, whole, sgd(whole), [(x, y)], quiet(steps=20))
    result = fit(weighted, parts, sgd(parts), pieces, quiet(steps=20, accumulate=4))
    fit(squares, unweighted, sgd(unweighted), pieces, quiet(steps=20, accumulate=4))
    # as above: rounding of another order of summation
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)
    assert (weights(unweighted) - weights(whole)).abs().max() > 1e-3  # the mean of means is another mean
    with torch.no_grad():
        first = squares(linear(), (x, y))
    assert result.history["loss"][0] == pytest.approx(float(first), rel=1e-5)


def test_last_update_of_an_epoch_averages_what_is_left():
    x, y = regression(rows=48)
    pieces = list(zip(x.split(16), y.split(16), strict=True))
    model, by_hand = linear(), linear()
    result = fit(squares, model, sgd(model), pieces, quiet(epochs=1, accumulate=2))
    optimizer = sgd(by_hand)
    for part in (slice(0, 32), slice(32, 48)):
        optimizer.zero_grad()
        squares(by_hand, (x[part], y[part])).backward()
        optimizer.step()
    assert result.step == 2
    # two updates, float32 rounding
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=0, atol=1e-6)


def test_clipping_bounds_the_step_and_nothing_else():
    x, y = regression()
    x, y = x * 100, y * 100
    free, clipped, loose = linear(), linear(), linear()
    before = weights(free)
    norm = fit(squares, free, sgd(free, lr=1.0), [(x, y)], quiet(steps=1)).history["grad_norm"][0]
    fit(squares, clipped, sgd(clipped, lr=1.0), [(x, y)], quiet(steps=1, clip_norm=0.25))
    fit(squares, loose, sgd(loose, lr=1.0), [(x, y)], quiet(steps=1, clip_norm=2 * norm))
    move, full = weights(clipped) - before, weights(free) - before
    assert norm == pytest.approx(float(full.norm()), rel=1e-5)  # with lr 1 the move is the gradient
    assert float(move.norm()) == pytest.approx(0.25, rel=1e-4)  # torch divides by norm + 1e-6
    assert float(torch.cosine_similarity(move, full, dim=0)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(weights(loose), weights(free), rtol=0, atol=0)  # a bound not reached: the same bits


def test_ema_follows_its_formula():
    x, y = regression()
    model, plain = linear(), linear()
    expected = weights(plain).double()
    optimizer = sgd(plain)
    for _ in range(12):
        optimizer.zero_grad()
        squares(plain, (x, y)).backward()
        optimizer.step()
        expected = 0.8 * expected + 0.2 * weights(plain).double()
    result = fit(squares, model, sgd(model), [(x, y)], quiet(steps=12, ema_decay=0.8))
    assert result.weights == "ema"
    # 12 roundings in float32 of values near 3
    torch.testing.assert_close(weights(model).double(), expected, rtol=0, atol=3e-6)


def test_evaluation_sees_averaged_weights_in_eval_mode_and_puts_everything_back():
    x, y = regression()
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model[2].eval()  # a part frozen by the caller stays frozen
    raw, seen = [], []

    def step(model, batch):
        assert model.training and model[1].training and not model[2].training
        raw.append(weights(model))
        return squares(model, batch)

    def evaluate(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"loss": squares(model, (x, y))}

    fit(step, model, sgd(model, lr=0.01), [(x, y)], quiet(steps=3, ema_decay=0.5, evaluate_every=1), evaluate=evaluate)
    average = raw[0]
    for before, after in zip(seen[:2], raw[1:], strict=True):
        average = 0.5 * average + 0.5 * after
        torch.testing.assert_close(before, average, rtol=0, atol=1e-6)  # float32 rounding
        assert not torch.equal(before, after)
    assert model.training and model[1].training and not model[2].training


def test_evaluating_more_often_does_not_change_the_weights():
    x, y = regression()
    noise = []

    def evaluate(model):
        noise.append(torch.randn(()).item() + np.random.standard_normal() + random.random())  # noqa: NPY002
        return {"loss": 1.0}

    trained = []
    for every in (None, 1, 3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        fit(squares, model, sgd(model), [(x, y)], quiet(steps=7, evaluate_every=every), evaluate=evaluate)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1]) and torch.equal(trained[0], trained[2])
    assert len(set(noise)) == 1  # the same noise each time, so that values can be compared


def test_leaves_the_callers_random_numbers_alone():
    def draw():
        return torch.rand(()).item(), np.random.random(), random.random()  # noqa: NPY002

    def seed():
        torch.manual_seed(7), np.random.seed(7), random.seed(7)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    seed()
    fit(squares, model, sgd(model), [regression()], quiet(steps=3))
    assert draw() == expected


def test_early_stopping_keeps_the_best_step():
    scores = iter([5.0, 3.0, 4.0, 2.0, 2.5, 2.0, 9.0])  # best at the 4th; a tie is no improvement
    snapshots = []

    def evaluate(model):
        snapshots.append(weights(model))
        return {"rmse": next(scores), "other": 1.0}

    model = linear()
    config = quiet(steps=100, evaluate_every=2, monitor="rmse", patience=3)
    result = fit(squares, model, sgd(model), [regression()], config, evaluate=evaluate)
    assert (result.stopped, result.step) == ("patience", 14)
    assert (result.best_step, result.best_value, result.weights) == (8, 2.0, "best")
    assert torch.equal(weights(model), snapshots[3]) and not torch.equal(weights(model), snapshots[-1])
    assert [value for value in result.history["val_rmse"] if value is not None] == [5, 3, 4, 2, 2.5, 2, 9]


def test_best_of_a_metric_to_be_large_with_averaged_weights():
    scores, snapshots = iter([1.0, 3.0, 2.0]), []

    def evaluate(model):
        snapshots.append(weights(model))
        return {"accuracy": next(scores)}

    model = linear()
    config = quiet(steps=6, evaluate_every=2, monitor="accuracy", mode="max", ema_decay=0.9)
    result = fit(squares, model, sgd(model), [regression()], config, evaluate=evaluate)
    assert (result.stopped, result.best_step, result.weights) == ("steps", 4, "best")
    assert torch.equal(weights(model), snapshots[1])


def test_evaluates_at_the_end_in_the_row_of_the_last_step():
    model = linear()
    result = fit(squares, model, sgd(model), [regression()], quiet(steps=5), evaluate=lambda model: {"rmse": 2.0})
    assert result.history["step"] == [1, 2, 3, 4, 5]
    assert result.history["val_rmse"] == [None, None, None, None, 2.0]
    assert None not in result.history["loss"]


def test_scheduler_steps_once_per_update():
    model = linear()
    optimizer = sgd(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    x, y = regression()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    result = fit(squares, model, optimizer, batches, quiet(steps=4, accumulate=2, clip_norm=0.1), scheduler=scheduler)
    assert result.history["lr"] == [1.0, 1.0, 0.5, 0.5]  # the rate of the update itself
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_plateau_scheduler_follows_the_monitored_metric():
    model = linear()
    optimizer = sgd(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    config = quiet(steps=5, evaluate_every=1, monitor="rmse")
    fit(squares, model, optimizer, [regression()], config, scheduler=scheduler, evaluate=lambda model: {"rmse": 1.0})
    # five equal values: the first is the best, the 3rd and the 5th exhaust the patience of one
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_rows_average_over_the_updates_they_stand_for():
    losses = iter(range(1, 9))

    def step(model, batch):
        value = next(losses)
        return {"loss": model(batch).mean() * 0 + value, "double": torch.tensor(2.0 * value), "examples": 5}

    model = linear(1)
    result = fit(step, model, sgd(model), [torch.ones(3, 1)], quiet(steps=8, log_every=3))
    assert result.history["step"] == [3, 6, 8]
    assert result.history["loss"] == [2.0, 5.0, 7.5]
    assert result.history["double"] == [4.0, 10.0, 15.0]
    assert all(rate > 0 for rate in result.history["examples_per_second"])


def test_callbacks_see_each_row_and_may_stop():
    first, second = [], []
    model = linear()
    callbacks = [lambda row: first.append(row) or row["step"] >= 3, lambda row: second.append(row["step"])]
    result = fit(squares, model, sgd(model), [regression()], quiet(steps=100), callbacks=callbacks)
    assert (result.step, result.stopped) == (3, "callback")
    assert second == [1, 2, 3] and {"step", "epoch", "loss", "lr", "grad_norm", "seconds"} <= first[0].keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_stops_at_a_loss_that_is_not_finite_before_it_spoils_the_weights(bad):
    def step(model, batch):
        step.calls += 1
        return squares(model, batch) * (bad if step.calls == 4 else 1)

    step.calls = 0
    model, expected = linear(), linear()
    reached = fit(squares, expected, sgd(expected), [regression()], quiet(steps=3))
    with pytest.raises(FloatingPointError, match=rf"loss is {bad} at step 4; the last finite loss was") as error:
        fit(step, model, sgd(model), [regression()], quiet(steps=9))
    assert f"{reached.history['loss'][-1]:.6g}" in str(error.value)
    assert torch.equal(weights(model), weights(expected))


def test_stops_at_a_gradient_that_is_not_finite():
    def step(model, batch):
        return (model(batch[0]) * 0).abs().sum().sqrt()  # value 0, slope of the root at 0: infinite times 0

    model = linear()
    before = weights(model)
    with pytest.raises(FloatingPointError, match="grad_norm is nan at step 1; there was none before"):
        fit(step, model, sgd(model), [regression()], quiet(steps=2))
    assert torch.equal(weights(model), before)


def test_monitored_nan_is_an_error():
    model = linear()
    config = quiet(steps=2, monitor="rmse")
    with pytest.raises(FloatingPointError, match="monitored metric rmse is nan at step 2"):
        fit(squares, model, sgd(model), [regression()], config, evaluate=lambda model: {"rmse": math.nan})


def test_bf16_autocasts_the_forward_pass_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 1))
    kinds = set()
    model[0].register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    forward = model.forward
    x, y = regression()

    def step(model, batch):
        output = model(batch[0])
        assert output.dtype == torch.float32  # the loss itself is computed in full precision
        return (output - batch[1]).square().mean()

    result = fit(step, model, sgd(model), [(x, y)], quiet(steps=60, precision="bf16"))
    assert kinds == {torch.bfloat16} and model[0].weight.dtype == torch.float32
    assert result.history["loss"][-1] < 0.1 * result.history["loss"][0]
    assert model.forward == forward and not any(name.startswith("_is_acc") for name in vars(model))
    kinds.clear()
    copy.deepcopy(model)(x)
    assert kinds == {torch.float32}


def test_precisions_may_follow_each_other_in_one_program():
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model, kinds = linear(), set()
        inner = nn.Sequential(model)
        model.register_forward_hook(lambda module, args, output, kinds=kinds: kinds.add(output.dtype))
        fit(squares, inner, sgd(inner), [regression()], quiet(steps=1, precision=precision))
        assert kinds == {expected}


def test_skipped_updates_of_a_loss_scaler_move_nothing():
    # float16 needs a GPU; the scaler itself also works on a CPU, and skips an update whose gradient overflows
    def step(model, batch):
        step.calls += 1
        output = model(batch[0])
        if step.calls in (2, 3):
            output.register_hook(lambda gradient: gradient * math.inf)
        return (output - batch[1]).square().mean()

    step.calls = 0
    accelerator = make_accelerator("fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, expected = linear(), linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    result = fit(step, model, optimizer, [regression()], quiet(steps=5, ema_decay=0.5), accelerator=accelerator,
                 scheduler=scheduler)  # fmt: skip
    optimizer = sgd(expected)
    fit(squares, expected, optimizer, [regression()], quiet(steps=3, ema_decay=0.5),
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer))  # fmt: skip
    assert result.history["loss_scale"] == [2.0**10, 2.0**9, 2.0**8, 2.0**8, 2.0**8]
    # powers of two scale exactly; only the clipping factor of 1 and the unscaling may round
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=1e-6)
    assert scheduler.last_epoch == 3


def test_endless_overflow_is_an_error():
    accelerator = make_accelerator("fp32")
    accelerator.scaler = torch.amp.GradScaler("cpu")

    def step(model, batch):
        output = model(batch[0])
        output.register_hook(lambda gradient: gradient * math.inf)
        return output.square().mean()

    model = linear()
    with pytest.raises(FloatingPointError, match="40 fp16 updates up to step 40 overflowed in a row"):
        fit(step, model, sgd(model), [regression()], quiet(steps=100), accelerator=accelerator)


def test_deterministic_holds_during_the_run_only():
    def step(model, batch):
        assert torch.are_deterministic_algorithms_enabled()
        return squares(model, batch)

    model = linear()
    fit(step, model, sgd(model), [regression()], quiet(steps=1, deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_compiled_model_trains_and_keeps_its_names(tmp_path):
    from oral4.train.checkpoint import latest, load

    model = linear()
    compiled = torch.compile(model, backend="eager")
    plain = linear()
    fit(squares, compiled, sgd(compiled), [regression()], quiet(steps=3), directory=tmp_path)
    fit(squares, plain, sgd(plain), [regression()], quiet(steps=3))
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=1e-6)  # float32, other kernels at most
    assert set(load(latest(tmp_path), model=plain)["model"]) == {"weight", "bias"}


def test_tracker_receives_the_rows(tmp_path):
    from accelerate.tracking import GeneralTracker

    class Recorder(GeneralTracker):
        name, requires_logging_directory, tracker = "recorder", False, None

        def __init__(self):
            super().__init__()
            self.rows, self.config, self.closed = [], None, False

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step):
            self.rows.append((step, values["loss"]))

        def finish(self):
            self.closed = True

    recorder = Recorder()
    model = linear()
    result = fit(squares, model, sgd(model), [regression()], quiet(steps=3), tracker=recorder)
    assert recorder.rows == list(zip([1, 2, 3], result.history["loss"], strict=True))
    assert recorder.config["steps"] == 3 and recorder.closed


# ---- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give steps or epochs"),
        *[({"steps": 1, name: value}, f"{name}={value!r}: give a whole number >= 1")
          for name in ("epochs", "accumulate", "evaluate_every", "checkpoint_every", "keep", "log_every")
          for value in (0, 1.5, True, "2")],
        ({"steps": 0}, "steps=0: give a whole number >= 1 or None"),
        ({"steps": 1, "accumulate": None}, "accumulate=None: give a whole number >= 1$"),
        ({"steps": 1, "seed": -1}, "seed=-1: give a whole number >= 0"),
        ({"steps": 1, "clip_norm": 0.0}, "clip_norm=0.0: give a finite number > 0"),
        ({"steps": 1, "clip_norm": math.nan}, "clip_norm=nan"),
        ({"steps": 1, "clip_norm": math.inf}, "clip_norm=inf"),
        ({"steps": 1, "ema_decay": 1.0}, r"ema_decay=1.0: give a number in \[0, 1\)"),
        ({"steps": 1, "ema_decay": -0.1}, "ema_decay=-0.1"),
        ({"steps": 1, "precision": "fp8"}, "precision='fp8': choose one of fp32, bf16, fp16"),
        ({"steps": 1, "mode": "best"}, "mode='best': choose one of min, max"),
        ({"steps": 1, "deterministic": "yes"}, "deterministic='yes'"),
        ({"steps": 1, "progress": None}, "progress=None"),
        ({"steps": 1, "patience": 2}, "patience needs monitor"),
        ({"steps": 1, "patience": 0, "monitor": "a", "evaluate_every": 1}, "patience=0"),
    ],
)  # fmt: skip
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_config_is_frozen_and_by_keyword():
    with pytest.raises(TypeError):
        TrainConfig(10)
    with pytest.raises(AttributeError):
        quiet(steps=1).steps = 2


def refuse(error, message, **changes):
    model = changes.pop("model", None) or linear()
    given = {"step": squares, "model": model, "optimizer": sgd(model) if isinstance(model, nn.Module) else None,
             "batches": [regression()], "config": quiet(steps=2), **changes}  # fmt: skip
    with pytest.raises(error, match=message):
        fit(**given)


def test_fit_refuses_wrong_objects():
    refuse(TypeError, "step must be a function, not int", step=3)
    refuse(TypeError, "model must be a Module, not function", model=squares)
    refuse(TypeError, "optimizer must be a Optimizer, not str", optimizer="adam")
    refuse(TypeError, "config must be a TrainConfig, not dict", config={"steps": 2})
    refuse(TypeError, "evaluate must be a function, not dict", evaluate={"loss": 1.0})
    refuse(TypeError, "callbacks must be functions", callbacks=[print, 3])
    refuse(TypeError, "batches is a int", batches=5)
    refuse(TypeError, "batches is a list_iterator, which cannot be gone through again", batches=iter([regression()]))
    other = linear()
    refuse(ValueError, "scheduler belongs to another optimizer",
           scheduler=torch.optim.lr_scheduler.ConstantLR(sgd(other)))  # fmt: skip


def test_fit_refuses_combinations_that_make_no_sense(tmp_path):
    refuse(ValueError, "need evaluate", config=quiet(steps=2, evaluate_every=1))
    refuse(ValueError, "need evaluate", config=quiet(steps=2, monitor="rmse"))
    refuse(ValueError, "need directory", resume=True)
    refuse(ValueError, "need directory", config=quiet(steps=2, checkpoint_every=1))
    model = linear()
    optimizer = sgd(model)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    refuse(ValueError, "set monitor", model=model, optimizer=optimizer, scheduler=plateau)
    refuse(ValueError, "trackerless|Unsupported|unsupported", tracker="trackerless")
    refuse(TypeError, "plain JSON values", model_config={"act": nn.ReLU()})
    workers = DataLoader(TensorDataset(*regression()), num_workers=1, persistent_workers=True)
    refuse(ValueError, "persistent_workers=False", batches=workers, directory=tmp_path)


def test_fit_refuses_at_once_what_no_checkpoint_could_hold(tmp_path):
    model, outside = linear(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    refuse(ValueError, "not in the model", model=model, optimizer=optimizer, directory=tmp_path)

    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self):
            return super().state_dict() | {"rule": {"shape": print}}

    optimizer = sgd(model)
    refuse(TypeError, "scheduler/rule/shape: a builtin_function_or_method cannot be stored", model=model,
           optimizer=optimizer, scheduler=Odd(optimizer), directory=tmp_path)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_fit_refuses_an_accelerator_with_other_settings():
    refuse(ValueError, "accelerator has mixed_precision='bf16'", accelerator=make_accelerator("bf16"))
    accelerator = make_accelerator("fp32")
    refuse(ValueError, "give the tracker to your accelerator", accelerator=accelerator, tracker="tensorboard")
    accelerator.gradient_accumulation_steps = 2
    try:
        refuse(ValueError, "accumulates gradients itself", accelerator=accelerator)
    finally:
        accelerator.gradient_accumulation_steps = 1


def test_tracker_that_is_not_installed_is_an_error(monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="tracker='wandb': its package is not installed"):
        make_accelerator("fp32", tracker="wandb")


def test_fit_refuses_what_step_and_evaluate_return_wrongly():
    def returning(value):
        return lambda model, batch: value(squares(model, batch)) if callable(value) else value

    for value, message in (
        (None, "the loss is a NoneType"),
        (1.0, "the loss is a float"),
        ({"rmse": 1.0}, "the loss is a NoneType"),
        (lambda loss: loss.expand(2), r"a tensor of shape \(2,\)"),
    ):
        refuse(TypeError, message, step=returning(value))
    refuse(ValueError, "depends on no trainable parameter", step=returning(lambda loss: loss.detach()))
    refuse(ValueError, "names of the log's own columns: lr", step=returning(lambda loss: {"loss": loss, "lr": 1.0}))
    refuse(ValueError, "sum to 0.0", step=returning(lambda loss: {"loss": loss, "weight": 0}))
    names = iter(["a", "b"])
    refuse(ValueError, "same names for every batch", config=quiet(steps=1, accumulate=2), batches=[regression()] * 2,
           step=lambda model, batch: {"loss": squares(model, batch), next(names): 1.0})  # fmt: skip
    refuse(TypeError, "evaluate must return a dict of numbers, not 1.0", evaluate=lambda model: 1.0)
    refuse(TypeError, "evaluate must return a dict of numbers", evaluate=lambda model: {})
    refuse(ValueError, "monitor='mae' is not what evaluate returns: rmse", evaluate=lambda model: {"rmse": 1.0},
           config=quiet(steps=1, monitor="mae"))  # fmt: skip


def test_fit_refuses_data_that_give_nothing():
    refuse(ValueError, "epoch 0 has no batch", batches=[])
    used = iter([regression()])
    refuse(ValueError, "epoch 1 has no batch", batches=lambda epoch, generator: used)


def test_float16_on_a_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("ORAL4_DEVICE", "cpu")
    refuse(ValueError, 'precision="fp16" on a CPU: .* Use "bf16" or "fp32"', config=quiet(steps=1, precision="fp16"))


def test_emulated_bfloat16_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 only emulates bfloat16"):
        require_precision("bf16", torch.device("cuda"))
    require_precision("fp16", torch.device("cuda"))


def test_missing_accelerate_names_the_pip_line(monkeypatch):
    import sys

    from oral4.errors import MissingExtra

    monkeypatch.setitem(sys.modules, "accelerate", None)
    refuse(MissingExtra, r'pip install "oral4\[train\]"')


def test_processes_take_turns_and_leave_out_an_incomplete_round():
    class Two:
        num_processes = 2

        def __init__(self, process_index):
            self.process_index = process_index

    assert [list(epoch_batches([10, 11, 12, 13, 14], 0, 0, Two(index))) for index in (0, 1)] == [[10, 12], [11, 13]]


def test_samplers_are_told_the_epoch():
    class Sampler(list):
        def set_epoch(self, epoch):
            self[:] = [epoch, epoch + 1]

    loader = DataLoader(torch.arange(5.0)[:, None], batch_size=2, sampler=Sampler([0, 0]))
    seen = []
    model = linear(1)
    fit(lambda model, batch: seen.append(batch.flatten().tolist()) or model(batch).square().mean(), model,
        sgd(model, lr=1e-3), loader, quiet(epochs=3))  # fmt: skip
    assert seen == [[0, 1], [1, 2], [2, 3]]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_reaches_the_solution(precision):
    x, y = regression()
    model = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    result = fit(squares, model, optimizer, [(x, y)], quiet(steps=300, precision=precision, clip_norm=1.0))
    assert next(model.parameters()).device.type == "cuda"
    assert result.history["loss"][-1] < 0.05  # noise variance 0.01, and activations carry 3 (bf16: 2) digits
    assert ("loss_scale" in result.history) == (precision == "fp16")


@pytest.mark.gpu
def test_resume_on_a_gpu_continues_the_noise(tmp_path):
    def run(steps, directory, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1))
        config = quiet(steps=steps, deterministic=True, precision="fp16")
        fit(squares, model, sgd(model), [regression()] * 4, config, directory=directory, **options)
        return weights(model)

    run(5, tmp_path / "parts")
    resumed, whole = run(10, tmp_path / "parts", resume=True), run(10, tmp_path / "whole")
    assert torch.equal(resumed, whole)
