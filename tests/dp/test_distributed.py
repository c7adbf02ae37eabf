"""Several processes train privately as one does: the same batches, one clipped sum, one noise."""

import json
import math

import pytest
import torch
from torch import nn
from two_processes import launch

from oral4.dp.private import flip_coins
from oral4.train.randomness import derive_seed

COMMON = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from oral4.dp.private import make_private

rank = int(os.environ["RANK"])
dist.init_process_group("gloo")

def seeded(seed):
    return torch.Generator().manual_seed(seed)

DATA = [tuple(torch.randn(size, generator=seeded(i * size)).double() for size in (3, 2)) for i in range(60)]

def build(seed=0):
    generator = seeded(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model

def losses_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean(dim=1)

def settings(**options):
    fixed = {"batch_size": 12, "steps": 5, "noise_multiplier": 1.0, "max_physical": 3, "clip_norm": 0.3, "seed": 0}
    return {**fixed, **options}

def train(private, model):
    pieces = 0
    for batch in private.loader:
        pieces += 1
        private.step(losses_of(model, batch))
    return pieces

def flat(model):
    whole = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return torch.cat([part.flatten() for part in whole]).tolist()

def report(key, value):
    with open(f"{sys.argv[1]}/{key}-{rank}.json", "w") as file:
        json.dump(value, file)
"""

DDP = (
    COMMON
    + """
from torch.nn.parallel import DistributedDataParallel

# weights that differ between processes: those of process 0 count
model = build(seed=rank)
private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **settings())
train(private, model)
report("plain", {"weights": flat(model), "epsilon": private.spent().epsilon, "steps": private.optimizer.steps})

model = build()
private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **settings(record=True))
train(private, model)
report("recorded", {"weights": flat(model), "records": private.optimizer.records()})

model = build(seed=rank)
wrapped = DistributedDataParallel(model)
private = make_private(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.5), DATA, **settings())
train(private, wrapped)
report("wrapped", {"weights": flat(model)})

from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model, inner = build(), None
prepared = accelerator.prepare(model)
private = make_private(prepared, torch.optim.SGD(prepared.parameters(), lr=0.5), DATA, **settings())
optimizer = accelerator.prepare(private.optimizer)
train(private, prepared)
report("accelerate", {"weights": flat(model), "kind": type(prepared).__name__, "optimizer": type(optimizer).__name__,
                      "processes": accelerator.num_processes})

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(500, 400, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)

zeros = [(torch.zeros(500), torch.zeros(400)) for _ in range(60)]
for key, seed in {"seeded": 0, "secret": None}.items():
    model = Wide()
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), zeros,
                           **settings(noise_multiplier=0.8, clip_norm=0.5, batch_size=16, seed=seed, max_physical=None))
    for _ in range(2):
        x, y = next(iter(private.loader))
        private.step((model(x) - y).square().mean(dim=1))
    weights = model.layer.weight.detach().double()
    report(key, {"variance": float(weights.var()), "mean": float(weights.mean()), "sum": float(weights.abs().sum())})

model = build()
adapting = settings(clipping="adaptive", count_noise_multiplier=4.0)
private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **adapting)
train(private, model)
report("adaptive", {"clip_norm": private.engine.clip_norm, "weights": flat(model),
                    "segments": [[s.q, s.sigma, s.steps] for s in private.accountant.segments]})

model = build()
private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **settings(batch_size=0.9, steps=8))
report("empty", {"pieces": train(private, model), "weights": flat(model), "steps": private.optimizer.steps})

sgd = torch.optim.SGD(model.parameters(), lr=0.5)
try:  # a share of the noise that is too small
    make_private(model, sgd, DATA, **settings(noise_multiplier=1.0 - 0.5 * rank))
except ValueError as error:
    report("disagree", str(error))
try:  # a data set that was split already
    make_private(model, sgd, DATA[: 30 + rank], **settings())
except ValueError as error:
    report("apart", str(error))

# one noise stream for both processes would count one noise twice
from oral4.dp.engine import ClipEngine
from oral4.dp.private import DPOptimizer
model = build()
inner = torch.optim.SGD(model.parameters(), lr=1.0)
optimizer = DPOptimizer(inner, ClipEngine(model, 0.3), 1.0, 8.0, generator=seeded(3))
try:
    optimizer.step()
except ValueError as error:
    report("same", str(error))

model = build()
private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **settings())
others = [None, None]
dist.all_gather_object(others, private.optimizer.state_dict())
try:
    private.optimizer.load_state_dict(others[1 - rank])
except Exception as error:
    report("swapped", f"{type(error).__name__}: {error}")

whole = build()
private = make_private(whole, torch.optim.AdamW(whole.parameters(), lr=0.1), DATA, **settings())
for batch in private.loader:
    if private.step(losses_of(whole, batch)) and private.optimizer.steps == 2:
        state = {"private": private.state_dict(), "model": whole.state_dict()}
        torch.save(state, f"{sys.argv[1]}/state-{rank}.pt")
resumed = build(seed=5)
saved = torch.load(f"{sys.argv[1]}/state-{rank}.pt", weights_only=True)
resumed.load_state_dict(saved["model"])
private = make_private(resumed, torch.optim.AdamW(resumed.parameters(), lr=0.1), DATA, **settings())
private.load_state_dict(saved["private"])
train(private, resumed)
report("resumed", flat(resumed) == flat(whole))
dist.destroy_process_group()
"""
)

FSDP = (
    COMMON
    + """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def split(model, mesh):
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model

for key, mesh in {"split": init_device_mesh("cpu", (2,)),
                  "copied": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))}.items():
    for sigma in (0.0, 1.0):
        model = split(build(), mesh)
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA,
                               **settings(noise_multiplier=sigma, i_know_this_is_not_private=sigma == 0, record=True))
        pieces = train(private, model)
        kinds = sorted({type(p.grad if p.grad is not None else p).__name__ for p in model.parameters()})
        report(f"{key}-{sigma}", {"weights": flat(model), "pieces": pieces, "kinds": kinds,
                                  "records": private.optimizer.records()})

    model = split(build(), mesh)
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA,
                           **settings(noise_multiplier=0.0, i_know_this_is_not_private=True, mode="two_pass"))
    train(private, model)
    report(f"{key}-two_pass", {"weights": flat(model)})
    for option in ({"mode": "per_example"}, {"clipping": "adaptive"}):
        model = split(build(), mesh)
        try:
            make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), DATA, **settings(**option))
        except ValueError as error:
            report(f"{key}-{list(option.values())[0]}", str(error))

    model = split(nn.Sequential(nn.Linear(500, 400, bias=False), nn.Tanh(), nn.Linear(400, 1, bias=False)), mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    zeros = [(torch.zeros(500), torch.zeros(1)) for _ in range(60)]
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), zeros,
                           **settings(noise_multiplier=0.8, clip_norm=0.5, batch_size=16))
    for x, y in private.loader:
        if private.step((model(x) - y).square().mean(dim=1)):
            break
    weights = model[0].weight.detach().full_tensor().double()
    halves = [half.flatten() for half in weights.chunk(2)]
    report(f"{key}-noise", {"variance": float(weights.var()), "sum": float(weights.abs().sum()),
                            "correlation": float((halves[0] * halves[1]).mean() / weights.var())})
dist.destroy_process_group()
"""
)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp"), FSDP)


def reports(folder, key):
    return [json.loads((folder / f"{key}-{rank}.json").read_text()) for rank in (0, 1)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


DATA = [tuple(torch.randn(size, generator=seeded(i * size)).double() for size in (3, 2)) for i in range(60)]


def by_hand(sigma=1.0, steps=5, batch_size=12, clip_norm=0.3, lr=0.5, processes=2, quantile=None):
    """One process, one record at a time: weights after the run, norms of signal and noise, the last clipping norm."""
    generator = seeded(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    coins = seeded(derive_seed(0, "coins"))
    streams = [seeded(derive_seed(0, "noise", rank, 0)) for rank in range(processes)]
    parameters, norms = list(model.parameters()), []
    for _ in range(steps):
        total, count = [torch.zeros_like(parameter) for parameter in parameters], 0.0
        for index in flip_coins(60, batch_size / 60, coins).tolist():
            x, y = DATA[index]
            gradient = torch.autograd.grad((model(x) - y).square().mean(), parameters)
            norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
            count += (norm <= clip_norm) - 0.5
            for whole, part in zip(total, gradient, strict=True):
                whole += part * min(1.0, clip_norm / (norm + 1e-6))  # as the engine divides
        std = sigma * clip_norm / math.sqrt(processes)
        noise = [sum(torch.empty_like(p).normal_(0, std, generator=stream) for stream in streams) for p in parameters]
        norms.append([math.sqrt(sum(float(p.square().sum()) for p in part)) / batch_size for part in (total, noise)])
        with torch.no_grad():
            for parameter, whole, part in zip(parameters, total, noise, strict=True):
                parameter -= lr * (whole + part) / batch_size
        if quantile is not None:  # Andrew et al. (2021): a noisy count moves the clipping norm
            target, rate, multiplier = quantile
            spread = multiplier * 0.5 / math.sqrt(processes)
            count += sum(float(torch.empty(()).normal_(0, spread, generator=stream)) for stream in streams)
            below = min(1.0, max(0.0, count / batch_size + 0.5))
            clip_norm *= math.exp(-rate * (below - target))
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), norms, clip_norm


def test_two_processes_take_the_steps_of_one(ddp):
    first, second = reports(ddp, "plain")
    assert first["weights"] == second["weights"]  # bit for bit: the copies must not drift apart
    weights, _, _ = by_hand()
    # float64; sums in another order, five steps. The noise is the sum of both processes' shares
    torch.testing.assert_close(torch.tensor(first["weights"], dtype=torch.float64), weights, rtol=0, atol=1e-13)
    assert first["steps"] == second["steps"] == 5
    assert first["epsilon"] == second["epsilon"] > 0  # each of them counts, with the rate of the whole batch


def test_records_are_of_the_whole_batch(ddp):
    first, second = (report["records"] for report in reports(ddp, "recorded"))
    assert first == second
    _, norms, _ = by_hand()
    signal, noise = zip(*norms, strict=True)
    torch.testing.assert_close(first["signal_norm"], list(signal), rtol=1e-6, atol=0)  # kept in float32
    torch.testing.assert_close(first["noise_norm"], list(noise), rtol=1e-6, atol=0)
    coins = seeded(derive_seed(0, "coins"))
    assert first["batch_size"] == [len(flip_coins(60, 0.2, coins)) for _ in range(5)]
    # that they are recorded changes nothing: the same numbers summed in another order
    plain, recorded = (torch.tensor(reports(ddp, key)[0]["weights"]) for key in ("plain", "recorded"))
    torch.testing.assert_close(plain, recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["wrapped", "accelerate"])
def test_wrapped_models_train_the_same(ddp, key):
    assert reports(ddp, key)[0]["weights"] == reports(ddp, key)[1]["weights"] == reports(ddp, "plain")[0]["weights"]


def test_accelerate_saw_two_processes(ddp):
    for report in reports(ddp, "accelerate"):
        assert (report["kind"], report["optimizer"]) == ("DistributedDataParallel", "AcceleratedOptimizer")
        assert report["processes"] == 2


def test_empty_batches_are_steps_with_noise(ddp):
    found = reports(ddp, "empty")
    coins = seeded(derive_seed(0, "coins"))
    sizes = [len(flip_coins(60, 0.9 / 60, coins)) for _ in range(8)]
    assert 0 in sizes and max(sizes) > 0
    weights = by_hand(steps=8, batch_size=0.9)[0]
    for report in found:
        assert report["steps"] == report["pieces"] == 8
        torch.testing.assert_close(torch.tensor(report["weights"], dtype=torch.float64), weights, rtol=0, atol=1e-12)


def test_processes_with_different_numbers_are_refused(ddp):
    """Each adds its share of the noise, and trusts the others to add theirs."""
    for report in reports(ddp, "disagree"):
        assert "the processes differ in noise_multiplier: 1.0, 0.5" in report
    for report in reports(ddp, "apart"):
        assert "the processes differ in N: 30, 31" in report


@pytest.mark.parametrize("key", ["seeded", "secret"])
def test_noise_is_added_once(ddp, key):
    first, second = reports(ddp, key)
    assert first == second
    count, expected = 200_000, 2 * (0.8 * 0.5 / 16) ** 2  # two steps
    # 5 standard errors. Noise of full size from both would be twice the variance, shared streams as well
    assert first["variance"] == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / count))
    assert abs(first["mean"]) < 5 * math.sqrt(expected / count)


def test_processes_do_not_share_a_noise_stream(ddp):
    for report in reports(ddp, "same"):
        assert "two processes have noise generators in the same state" in report
    for rank, report in enumerate(reports(ddp, "swapped")):
        assert report.startswith(f"CheckpointError: this is process {rank}, the state of process {1 - rank}")


def test_adaptive_clipping_is_that_of_one_process(ddp):
    first, second = reports(ddp, "adaptive")
    assert first == second
    weights, _, clip_norm = by_hand(quantile=(0.5, 0.2, 4.0))
    torch.testing.assert_close(torch.tensor(first["weights"], dtype=torch.float64), weights, rtol=0, atol=1e-6)
    assert first["clip_norm"] == pytest.approx(clip_norm, rel=1e-6)  # the count is noised in float32
    assert abs(math.log(clip_norm / 0.3)) > 0.05
    # both noises together: 1 / sqrt(1 + 1 / 16)
    assert first["segments"] == [[0.2, pytest.approx((1 + 1 / 16) ** -0.5, rel=1e-12), 5]]


def test_two_processes_resume_bit_for_bit(ddp):
    assert reports(ddp, "resumed") == [True, True]


@pytest.mark.parametrize("key", ["split", "copied"])
def test_split_weights_take_the_steps_of_whole_ones(fsdp, key):
    first, second = reports(fsdp, f"{key}-0.0")
    assert first["weights"] == second["weights"] and first["pieces"] == second["pieces"]
    weights, norms, _ = by_hand(sigma=0.0)
    torch.testing.assert_close(torch.tensor(first["weights"], dtype=torch.float64), weights, rtol=0, atol=1e-13)
    torch.testing.assert_close(first["records"]["signal_norm"], [signal for signal, _ in norms], rtol=1e-6, atol=0)
    noisy, other = reports(fsdp, f"{key}-1.0")
    assert noisy["weights"] == other["weights"] != first["weights"]


@pytest.mark.parametrize("key", ["split", "copied"])
def test_split_weights_in_two_passes(fsdp, key):
    weights, _, _ = by_hand(sigma=0.0)
    for report in reports(fsdp, f"{key}-two_pass"):
        torch.testing.assert_close(torch.tensor(report["weights"], dtype=torch.float64), weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("option", ["adaptive", "per_example"])
def test_what_split_weights_do_not_know_is_refused(fsdp, option):
    for report in reports(fsdp, f"split-{option}"):
        assert option in report and "with split weights" in report


@pytest.mark.parametrize("key", ["split", "copied"])
def test_split_weights_get_their_noise_once(fsdp, key):
    first, second = reports(fsdp, f"{key}-noise")
    assert first == second
    count, expected = 200_000, (0.8 * 0.5 / 16) ** 2
    assert first["variance"] == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / count))
    assert abs(first["correlation"]) < 5 / math.sqrt(count / 2)  # each process draws its own part
