"""Two processes train like one with twice the batch, and resume bit for bit; a model comes back as it went."""

import json

import pytest
import torch
from torch import nn
from two_processes import launch

from oral4.train import TrainConfig, fit
from oral4.train.launch import make_accelerator, prepared

PROGRAM = """
import json, sys
import torch
from torch import nn
from oral4.train import TrainConfig, fit

sizes = [4, 8, 6, 6, 2, 10, 5, 7, 8]  # uneven, and one batch too many for two processes
torch.manual_seed(0)
x = torch.randn(sum(sizes), 3)
pieces = list(zip(x.split(sizes), (x @ torch.tensor([[1.0], [2.0], [3.0]])).split(sizes)))

def weighted(model, batch):
    x, y = batch
    return {"loss": (model(x) - y).square().mean(), "weight": len(x), "largest": float(len(x))}

def train(dropout=0.0, step=weighted, steps=8, seen=None, **options):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    config = TrainConfig(steps=steps, accumulate=2, clip_norm=1.0, ema_decay=0.5, evaluate_every=2, monitor="rmse",
                         log_every=1, progress=False)
    rank = int(__import__("os").environ.get("RANK", 0))
    result = fit(step, model, optimizer, pieces, config, scheduler=scheduler,
                 evaluate=lambda model: {"rmse": (model(x) - 1).square().mean().sqrt() + rank},
                 callbacks=[lambda row: seen is not None and rank == 1 and row["step"] == 3], **options)
    return result, torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

def report(key, value):
    with open(f"{sys.argv[1]}/{key}-{__import__('os').environ['RANK']}.json", "w") as file:
        json.dump(value, file)

result, weights = train()
report("plain", {"weights": weights, "history": result.history, "best": result.best_step})
result, weights = train(seen=[])
report("stopped", {"step": result.step, "stopped": result.stopped})
_, whole = train(dropout=0.3, directory=sys.argv[1] + "/whole")
train(dropout=0.3, directory=sys.argv[1] + "/parts", steps=3)
_, parts = train(dropout=0.3, directory=sys.argv[1] + "/parts", resume=True)
report("resumed", {"equal": whole == parts, "differs": whole != weights})
draws = []
def noisy(model, batch):
    draws.append(torch.rand(()).item())
    return weighted(model, batch)
train(step=noisy, steps=1)
report("noise", draws)
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("launch"), PROGRAM)


def reports(folder, key):
    return [json.loads((folder / f"{key}-{rank}.json").read_text()) for rank in (0, 1)]


def one_process(steps=8):
    """The same data in batches that join those of both processes."""
    sizes = [4, 8, 6, 6, 2, 10, 5, 7, 8]
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 3)
    y = x @ torch.tensor([[1.0], [2.0], [3.0]])
    joined = [4 + 8, 6 + 6, 2 + 10, 5 + 7]
    pieces = list(zip(x[: sum(joined)].split(joined), y[: sum(joined)].split(joined), strict=True))
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.0), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = TrainConfig(steps=steps, accumulate=2, clip_norm=1.0, ema_decay=0.5, evaluate_every=2, monitor="rmse",
                         log_every=1, progress=False)  # fmt: skip
    result = fit(
        lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().mean(), "weight": len(batch[0])},
        model, optimizer, pieces, config, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3),
        evaluate=lambda model: {"rmse": (model(x) - 1).square().mean().sqrt()},
    )  # fmt: skip
    return result, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_two_processes_equal_one_with_twice_the_batch(launched):
    first, second = reports(launched, "plain")
    result, weights = one_process()
    assert first["weights"] == second["weights"]
    # the same 24 examples per update summed in another order, float32, 8 updates
    torch.testing.assert_close(torch.tensor(first["weights"]), weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(first["history"]["loss"], result.history["loss"], rtol=1e-5, atol=0)
    assert first["history"]["lr"] == result.history["lr"]  # one step of the scheduler per update, not per process
    assert first["best"] == second["best"] == result.best_step
    # the second process added 1 to its metric: the mean over both is what counts
    scores = [(a, b) for a, b in zip(first["history"]["val_rmse"], result.history["val_rmse"], strict=True) if b]
    torch.testing.assert_close([a for a, _ in scores], [b + 0.5 for _, b in scores], rtol=1e-5, atol=0)
    # metrics are means over all examples: sum of squares of the batch sizes over their sum
    assert first["history"]["largest"][0] == pytest.approx((16 + 64 + 36 + 36) / 24)


def test_one_process_that_wants_to_stop_stops_both(launched):
    assert reports(launched, "stopped") == [{"step": 3, "stopped": "callback"}] * 2


def test_two_processes_resume_bit_for_bit(launched):
    assert reports(launched, "resumed") == [{"equal": True, "differs": True}] * 2
    assert len(list((launched / "whole").glob("*.safetensors"))) == 1


def test_processes_have_noise_of_their_own(launched):
    first, second = reports(launched, "noise")
    assert len(first) == 2 and not set(first) & set(second)


def test_other_number_of_processes_cannot_resume(launched):
    from oral4.errors import CheckpointError

    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = TrainConfig(steps=9, accumulate=2, clip_norm=1.0, ema_decay=0.5, evaluate_every=2, monitor="rmse",
                         progress=False)  # fmt: skip
    with pytest.raises(CheckpointError, match="num_processes: 2 in the file, 1 now"):
        fit(lambda model, batch: model(batch).mean(), model, optimizer, [torch.ones(1, 3)], config, resume=True,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3), evaluate=lambda model: {"rmse": 1.0},
            directory=launched / "whole")  # fmt: skip


def test_environment_does_not_divide_the_loss_once_more(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator("fp32").gradient_accumulation_steps == 1


def test_splitting_accelerators_train_without_what_needs_whole_weights(tmp_path):
    from accelerate.utils import DistributedType

    class Split:
        """Stands for an accelerator with FSDP, which needs GPUs."""

        mixed_precision, gradient_accumulation_steps = "no", 1
        distributed_type, device = DistributedType.FSDP, torch.device("cpu")

    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="FSDP splits the weights"):
        fit(lambda model, x: model(x).mean(), model, torch.optim.SGD(model.parameters()), [torch.ones(1, 1)],
            TrainConfig(steps=1), directory=tmp_path, accelerator=Split())  # fmt: skip


def test_model_comes_back_as_it_went_also_after_an_error():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Doubled(1, 1)
    model.forward = special = lambda x: 3 * x  # a caller's own patch
    model.eval()
    with pytest.raises(KeyError), prepared(make_accelerator("bf16"), model, torch.optim.SGD(model.parameters())):
        assert model.training and model.forward is not special
        raise KeyError
    assert model.forward is special and not model.training
    del model.forward
    assert model(torch.zeros(1, 1)).item() == 2 * model.bias.item()
