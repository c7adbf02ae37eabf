"""A run that is interrupted and resumed ends bit for bit like one that was not, whatever is switched on."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

from oral4.errors import CheckpointError
from oral4.train import TrainConfig, derive_seed, fit, read_log
from oral4.train.checkpoint import describe, latest, load
from oral4.train.launch import make_accelerator

TIMES = {"seconds", "examples_per_second"}


class Interrupted(Exception):
    pass


class Noisy(Dataset):
    """Examples that are augmented with all three global generators."""

    def __init__(self, length=22):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        noise = random.random() + np.random.random() + torch.rand(3)  # noqa: NPY002
        return index + noise, torch.tensor([float(index)])


def by_generator(epoch, generator):
    for index in torch.randperm(22, generator=generator).split(4):
        yield torch.stack([index, index**2, index * 0], dim=1) / 22 + torch.rand(1), index[:, None] / 22


def by_global_random_numbers(epoch, generator):
    for index in torch.randperm(22).split(4):  # shuffles with what it should not: still replayed
        yield torch.stack([index, index**2, index * 0], dim=1) / 22, index[:, None] / 22


def loader(num_workers=0):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=num_workers)


def network(norm=False):
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(16) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(3, 16), middle, nn.Dropout(0.4), nn.ReLU(), nn.Linear(16, 1))


def step(model, batch):
    x, y = batch
    noise = torch.rand(()).item() + np.random.random() + random.random()  # noqa: NPY002
    loss = (model(x) - y - 0.01 * noise).square().mean()
    return {"loss": loss, "noise": noise, "weight": len(x)}


def score(model):
    x = torch.linspace(-1, 1, 30).reshape(10, 3)
    return {"score": (model(x) + torch.randn(10, 1)).square().mean()}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)


def momentum(model):
    head, body = list(model[-1].parameters()), list(model[:-1].parameters())
    return torch.optim.SGD([{"params": body}, {"params": head, "lr": 1e-3}], lr=1e-2, momentum=0.9, nesterov=True)


def chain(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 20)], [3])


RUNS = {
    "plain": dict(batches=by_generator),
    "everything": dict(
        batches=by_generator, optimizer=adamw, scheduler=lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=40),
        norm=True, accumulate=2, ema_decay=0.9, clip_norm=0.5, evaluate_every=2, monitor="score", log_every=3,
    ),
    "loader": dict(batches=loader, optimizer=momentum, scheduler=chain, ema_decay=0.5),
    "accumulating loader": dict(batches=loader, optimizer=adamw, accumulate=4, norm=True),
    "global order": dict(batches=by_global_random_numbers, optimizer=adamw),
    "plateau": dict(
        batches=by_generator, optimizer=momentum, evaluate_every=1, monitor="score",
        scheduler=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    ),
    "milestones": dict(batches=by_generator, scheduler=lambda o: lr_scheduler.MultiStepLR(o, [3, 3, 5]), seed=5),
    "bf16": dict(batches=by_generator, optimizer=adamw, precision="bf16", ema_decay=0.9),
    "patience": dict(batches=by_generator, evaluate_every=1, monitor="score", patience=3, mode="max"),
}  # fmt: skip


def run(directory, *, batches, steps=10, stop_in=None, optimizer=momentum, scheduler=None, norm=False, every=1, **rest):
    """Train from new objects; ``stop_in`` interrupts the n-th call of ``step``."""
    model = network(norm)
    chosen = optimizer(model)
    calls = 0

    def interrupted_step(model, batch):
        nonlocal calls
        calls += 1
        if calls == stop_in:
            raise Interrupted
        return step(model, batch)

    config = TrainConfig(steps=steps, checkpoint_every=every, progress=False, **{"log_every": 1, **rest})
    result = fit(
        interrupted_step, model, chosen, batches() if batches is loader else batches, config,
        scheduler=scheduler and scheduler(chosen), evaluate=score if rest.get("monitor") else None,
        directory=directory, resume=True, model_config={"norm": norm},
    )  # fmt: skip
    return model, result


def traces(directory, model, result):
    """Everything that must be equal: weights, all tensors of the last checkpoint, counters, log without times."""
    header = describe(latest(directory))
    position = {key: value for key, value in header["state"]["position"].items() if key != "seconds"}
    log = {name: column for name, column in read_log(directory / "log.jsonl").items() if name not in TIMES}
    final = {name: value.tolist() for name, value in model.state_dict().items()}
    tensors = {name: value.tolist() for name, value in load_file(latest(directory)).items()}
    return tensors, position, log, final, (result.step, result.stopped, result.best_step, result.best_value)


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    settings = RUNS[name]
    whole = traces(tmp_path / "whole", *run(tmp_path / "whole", **settings))
    per_update = settings.get("accumulate", 1)
    # in the first update, in the middle of an epoch, of an accumulation, and at the border of epochs (6 batches each)
    for cut in {1, 3 * per_update, 6 * per_update - 1 + per_update // 2, 7 * per_update}:
        folder = tmp_path / f"cut-{cut}"
        with pytest.raises(Interrupted):
            run(folder, stop_in=cut, **settings)
        assert traces(folder, *run(folder, **settings)) == whole, cut


def test_interrupted_between_checkpoints_and_twice(tmp_path):
    settings = RUNS["everything"] | {"every": 3}
    whole = traces(tmp_path / "whole", *run(tmp_path / "whole", **settings))
    for stop_in in (9, 5):  # batches since the start, then since the resume: 2 per update
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", stop_in=stop_in, **settings)
    assert latest(tmp_path / "parts").name == "step-0000000003.safetensors"
    # the log had rows up to step 4, which are dropped and made again
    assert traces(tmp_path / "parts", *run(tmp_path / "parts", **settings)) == whole


def test_longer_run_goes_on_where_the_shorter_one_ended(tmp_path):
    for batches in (by_generator, by_global_random_numbers, loader):
        folders = tmp_path / f"{batches.__name__} whole", tmp_path / f"{batches.__name__} parts"
        whole = run(folders[0], batches=batches, steps=14)
        for steps in (5, 6, 12):  # 6 and 12: exactly at the end of an epoch
            run(folders[1], batches=batches, steps=steps)
        assert traces(folders[1], *run(folders[1], batches=batches, steps=14)) == traces(folders[0], *whole)


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    settings = dict(batches=by_global_random_numbers, steps=None, ema_decay=0.9)
    whole = run(tmp_path / "whole", epochs=3, **settings)
    run(tmp_path / "parts", epochs=1, **settings)
    run(tmp_path / "parts", epochs=2, **settings)
    with pytest.raises(Interrupted):  # in the middle of the epoch that the resume began
        run(tmp_path / "parts", epochs=3, stop_in=3, **settings)
    parts = run(tmp_path / "parts", epochs=3, **settings)
    assert traces(tmp_path / "parts", *parts) == traces(tmp_path / "whole", *whole)


def test_workers_replay_their_augmentations(tmp_path):
    def batches(epoch, generator):
        return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=2, generator=generator)

    whole = traces(tmp_path / "whole", *run(tmp_path / "whole", batches=batches))
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", batches=batches, stop_in=9)
    assert traces(tmp_path / "parts", *run(tmp_path / "parts", batches=batches)) == whole


def test_loss_scale_is_resumed(tmp_path):
    def scales(steps, folder, **scaler):
        accelerator = make_accelerator("fp32")  # float16 needs a GPU, its loss scale does not
        accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=4, **scaler)
        model = network()
        config = TrainConfig(steps=steps, log_every=1, progress=False)
        result = fit(step, model, momentum(model), by_generator, config, directory=tmp_path / folder, resume=True,
                     accelerator=accelerator)  # fmt: skip
        return result.history["loss_scale"]

    whole = scales(10, "whole", init_scale=8.0)
    scales(5, "parts", init_scale=8.0)
    assert scales(10, "parts") == whole == [8.0] * 3 + [16.0] * 4 + [32.0] * 3


def test_finished_run_stays_as_it_is(tmp_path):
    settings = RUNS["patience"] | {"steps": 50}
    model, result = run(tmp_path, **settings)
    before = latest(tmp_path).read_bytes()
    again, second = run(tmp_path, stop_in=1, **settings)
    assert (second.step, second.stopped, second.weights) == (result.step, "patience", "best")
    assert second.history == result.history and latest(tmp_path).read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_keeps_the_newest_checkpoints_with_configuration_and_best(tmp_path):
    _, result = run(tmp_path, keep=3, **RUNS["everything"])
    assert [path.name for path in sorted(tmp_path.glob("*.safetensors"))] == [
        f"step-{step:010d}.safetensors" for step in (8, 9, 10)
    ]
    saved = load(latest(tmp_path), model=network(norm=True))
    assert saved["config"]["model"] == {"norm": True} and saved["config"]["train"]["accumulate"] == 2
    assert saved["state"]["position"]["best_step"] == result.best_step
    assert set(saved["best"]) == set(saved["model"])


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, stop_in=4, every=100, batches=by_generator)
    assert latest(tmp_path) is None and read_log(tmp_path / "log.jsonl")["step"] == [1, 2, 3]
    _, result = run(tmp_path, batches=by_generator, steps=2)
    assert result.history["step"] == read_log(tmp_path / "log.jsonl")["step"] == [1, 2]


def test_a_folder_with_checkpoints_is_not_overwritten(tmp_path):
    run(tmp_path, batches=by_generator, steps=2)
    model = network()
    with pytest.raises(ValueError, match=r"step-0000000002\.safetensors exists: pass resume=True"):
        fit(step, model, momentum(model), by_generator, TrainConfig(steps=2), directory=tmp_path)


def test_refuses_to_resume_with_other_settings_model_or_data(tmp_path):
    settings = dict(batches=by_generator, steps=4, ema_decay=0.5)
    run(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=r"train\.ema_decay: 0\.5 in the file, 0\.9 now"):
        run(tmp_path, **settings | {"ema_decay": 0.9})
    with pytest.raises(CheckpointError, match=r"train\.seed: 0 in the file, 1 now"):
        run(tmp_path, **settings | {"seed": 1})
    with pytest.raises(CheckpointError, match=r"model\.norm: False in the file, True now"):
        run(tmp_path, **settings | {"norm": True})
    with pytest.raises(CheckpointError, match="optimizer AdamW cannot take the state of SGD"):
        run(tmp_path, **settings | {"optimizer": adamw})
    with pytest.raises(CheckpointError, match="scheduler SequentialLR cannot take the state of None"):
        run(tmp_path, **settings | {"scheduler": chain})
    with pytest.raises(CheckpointError, match="epoch 0 has fewer than 4 batches now"):
        run(tmp_path, **settings | {"steps": 6, "batches": lambda epoch, generator: []})
    # what does not change any step may change
    run(tmp_path, **settings | {"steps": 6, "keep": 1, "log_every": 2})


def test_damaged_newest_checkpoint_is_an_error_and_not_passed_over(tmp_path):
    run(tmp_path, batches=by_generator, steps=4)
    newest = latest(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=newest.name):
        run(tmp_path, batches=by_generator, steps=4)
    newest.unlink()
    assert run(tmp_path, batches=by_generator, steps=4)[1].step == 4


def test_checkpoint_holds_no_pickle(tmp_path):
    run(tmp_path, **RUNS["everything"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".safetensors", ".safetensors"]
    content = latest(tmp_path).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header["__metadata__"]) == {"oral4"}
    # pickle protocol 2 and later begin with this byte, zip files of torch.save with PK
    assert content[:1] != b"\x80" and content[:2] != b"PK"


def test_derived_seeds_are_fixed_and_different():
    seeds = {derive_seed(seed, name, index) for seed in range(4) for name in ("data", "noise") for index in range(50)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed(0, "data", 1) == derive_seed(0, "data", 1)
    # a change would silently reorder the data of every run that is resumed
    assert derive_seed(0, "data", 0) == int(
        np.random.SeedSequence(0, spawn_key=(0xADF3F363, 0)).generate_state(1, np.uint64)[0]
    )
