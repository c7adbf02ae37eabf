"""Checkpoints and weights: what is saved comes back, what does not fit is named, and nothing changes before."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from oral4.errors import CheckpointError
from oral4.train.checkpoint import describe, latest, load, load_weights, plain, prune, save, save_weights, step_path


class Tied(nn.Module):
    """A language model in miniature: embedding and head are one matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))


def trained(optimizer_class=torch.optim.AdamW, width=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 2)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


def equal_states(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_everything_comes_back(tmp_path):
    model, optimizer, scheduler = trained()
    ema = {name: value.detach() * 2 for name, value in model.named_parameters()}
    state = {"step": 7, "loss": float("inf"), "random": [torch.arange(4), (1, 2)], "none": None}
    config = {"width": 4, "act": "relu", "sizes": (1, 2)}
    path = save(tmp_path / "new" / "a.safetensors", model=model, optimizer=optimizer, scheduler=scheduler, ema=ema,
                best=dict(model.state_dict()), state=state, config=config)  # fmt: skip
    fresh, fresh_optimizer, fresh_scheduler = trained(seed=1)
    saved = load(path, model=fresh, optimizer=fresh_optimizer, scheduler=fresh_scheduler, config=config)
    assert equal_states(fresh.state_dict(), model.state_dict())
    assert equal_states(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert isinstance(fresh_optimizer.param_groups[0]["betas"], tuple)
    assert fresh_scheduler.state_dict() == scheduler.state_dict()
    assert equal_states(saved["ema"], ema) and equal_states(saved["best"], model.state_dict())
    assert saved["state"]["loss"] == float("inf") and saved["state"]["random"][1] == (1, 2)
    assert saved["config"] == {"width": 4, "act": "relu", "sizes": [1, 2]}
    header = describe(path)
    assert header["config"] == saved["config"] and header["kind"] == "checkpoint"
    assert header["owners"]["optimizer"] == "AdamW" and header["owners"]["parameters"][0][0] == "0.weight"


def test_same_content_gives_the_same_bytes(tmp_path):
    model, optimizer, scheduler = trained()
    files = [save(tmp_path / name, model=model, optimizer=optimizer, scheduler=scheduler) for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model = Tied()
    model.head.weight.data += 1
    checkpoint = save(tmp_path / "a.safetensors", model=model)
    weights = save_weights(model, tmp_path / "w.safetensors", {"kind": "tied"})
    for path, restore in (
        (checkpoint, lambda m: load(checkpoint, model=m)),
        (weights, lambda m: load_weights(weights, m)),
    ):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            assert len(list(file.keys())) == 2  # the matrix and the buffer
        fresh = Tied()
        restore(fresh)
        assert torch.equal(fresh.embed.weight, model.embed.weight)
        assert fresh.head.weight is fresh.embed.weight
        untied = Tied()
        untied.head.weight = nn.Parameter(torch.zeros(5, 3))
        restore(untied)
        assert torch.equal(untied.head.weight, model.embed.weight)


def test_misfit_is_reported_by_name_and_changes_nothing(tmp_path):
    model, optimizer, scheduler = trained()
    path = save(tmp_path / "a.safetensors", model=model, optimizer=optimizer, scheduler=scheduler)
    other = nn.Sequential(nn.Linear(2, 4), nn.Identity(), nn.Linear(5, 1), nn.Linear(1, 1))
    other[0].double()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load(path, model=other)
    message = str(error.value)
    assert "missing in the file: 3.weight, 3.bias" in message
    assert "not in the model: 1.weight, 1.bias, 1.running_mean, 1.running_var, 1.num_batches_tracked" in message
    assert "another shape: 2.weight (file (1, 4), model (1, 5))" in message
    assert "another dtype: 0.weight (file torch.float32, model torch.float64), 0.bias" in message
    assert "describe(path)['config']" in message
    assert equal_states(other.state_dict(), before)


def test_long_lists_of_misfits_are_cut(tmp_path):
    path = save(tmp_path / "a.safetensors", model=nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"missing in the file: 0\.weight, .* and 12 more"):
        load(path, model=nn.Sequential(*[nn.Linear(1, 1) for _ in range(10)]))


def test_optimizers_that_do_not_fit_are_named_and_nothing_changes(tmp_path):
    model, optimizer, scheduler = trained()
    path = save(tmp_path / "a.safetensors", model=model, optimizer=optimizer, scheduler=scheduler)
    fresh, sgd, _ = trained(torch.optim.SGD, seed=1)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match="optimizer SGD cannot take the state of AdamW"):
        load(path, model=fresh, optimizer=sgd)
    parameters = list(fresh.parameters())
    for groups in (parameters[1:], parameters[::-1], [{"params": parameters[:2]}, {"params": parameters[2:]}]):
        with pytest.raises(CheckpointError, match=r"other parameters, groups or order: sizes of groups \[6\]"):
            load(path, model=fresh, optimizer=torch.optim.AdamW(groups))
    with pytest.raises(CheckpointError, match="scheduler StepLR cannot take the state of ExponentialLR"):
        load(path, model=fresh, scheduler=torch.optim.lr_scheduler.StepLR(sgd, 1))
    assert equal_states(fresh.state_dict(), before)


def test_parameters_outside_the_model_are_refused(tmp_path):
    model, temperature = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
    with pytest.raises(ValueError, match=r"not in the model; put all of them in one nn\.Module"):
        save(tmp_path / "a.safetensors", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def test_other_configuration_is_named(tmp_path):
    model = nn.Linear(1, 1)
    path = save(tmp_path / "a.safetensors", model=model, config={"model": {"width": 4, "depth": 2}, "note": "x"})
    load(path, model=model, config={"model": {"depth": 2, "width": 4}})  # what is not asked for is not compared
    with pytest.raises(CheckpointError) as error:
        load(path, model=model, config={"model": {"width": 8, "heads": 1}, "note": "x"})
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        "  model.depth: 2 in the file, 'absent' now",
        "  model.heads: 'absent' in the file, 1 now",
        "  model.width: 4 in the file, 8 now",
    ]


@dataclass(frozen=True)
class Config:
    width: int = 4
    windows: tuple = (2, 2)


def test_configurations_are_plain_json():
    assert plain(Config()) == {"width": 4, "windows": [2, 2]} and plain(None) == {}
    for wrong in ({"x": torch.ones(1)}, {"x": float("nan")}, 3, [1, 2], Config):
        with pytest.raises(TypeError, match="mapping or dataclass of plain JSON values"):
            plain(wrong)


def test_newest_and_pruning(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "absent") is None
    for step in (5, 100, 20, 1_000_000):
        save(step_path(tmp_path, step), model=nn.Linear(1, 1))
    (tmp_path / ".step-0000000021.safetensors.partial").write_bytes(b"half")
    (tmp_path / "best.safetensors").write_bytes(b"mine")
    assert latest(tmp_path) == step_path(tmp_path, 1_000_000)
    prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-0000000100.safetensors", "step-0001000000.safetensors", "best.safetensors"
    }  # fmt: skip
    prune(tmp_path, 5)
    assert latest(tmp_path) == step_path(tmp_path, 1_000_000)
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_weights_carry_configuration_and_record(tmp_path):
    model, *_ = trained()
    path = save_weights(model, tmp_path / "w.safetensors", Config(), {"rmse": 0.5})
    fresh, *_ = trained(seed=1)
    header = load_weights(path, fresh)
    assert equal_states(fresh.state_dict(), model.state_dict())
    assert (header["config"], header["record"]) == ({"width": 4, "windows": [2, 2]}, {"rmse": 0.5})
    shown = json.loads((tmp_path / "w.json").read_text())
    assert shown == {key: value for key, value in describe(path).items() if key != "names"}
    with pytest.raises(CheckpointError, match="holds 'weights', not 'checkpoint'"):
        load(path, model=fresh)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_weights_in_half_precision(tmp_path, dtype, digits):
    model, *_ = trained()
    full = save_weights(model, tmp_path / "full.safetensors", {})
    half = save_weights(model, tmp_path / "half.safetensors", {}, dtype=dtype)
    assert half.stat().st_size < full.stat().st_size
    fresh, *_ = trained(seed=1)
    load_weights(half, fresh)
    for name, value in model.state_dict().items():
        stored = fresh.state_dict()[name]
        assert stored.dtype == value.dtype
        # rounding to nearest is off by at most half a unit: a relative 2^-11 in float16, 2^-8 or less in bfloat16
        torch.testing.assert_close(stored, value, rtol=digits, atol=1e-7)  # the atol is for float16's subnormals
    assert fresh[1].num_batches_tracked == model[1].num_batches_tracked  # integers stay exact


def test_weights_beyond_half_precision_are_refused(tmp_path):
    model = nn.Linear(1, 1)
    model.weight.data.fill_(1e5)
    with pytest.raises(ValueError, match=r"weight has values beyond the range of torch\.float16"):
        save_weights(model, tmp_path / "w.safetensors", {}, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    save_weights(model, tmp_path / "w.safetensors", {}, dtype=torch.bfloat16)


def test_weights_that_do_not_fit_change_nothing(tmp_path):
    path = save_weights(nn.Linear(2, 1), tmp_path / "w.safetensors", {})
    model = nn.Linear(3, 1)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight \(file \(1, 2\), model \(1, 3\)\)"):
        load_weights(path, model)
    assert torch.equal(model.weight, before)
