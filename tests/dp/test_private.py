"""Private training: coins, pieces, noise, budget, checkpoints; every promise of the module against arithmetic."""

import collections
import copy
import io
import itertools
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.data import Dataset

from oral4.dp.accountant import Accountant, calibrate_sigma, joint_sigma
from oral4.dp.accountant import epsilon as epsilon_of
from oral4.dp.engine import ClipEngine
from oral4.dp.private import (
    BudgetExceeded,
    Chunk,
    DPOptimizer,
    PoissonLoader,
    PoissonSampler,
    Private,
    add_noise,
    flip_coins,
    make_private,
    private_gradient_reference,
    secure_generator,
)
from oral4.errors import CheckpointError
from oral4.train.randomness import derive_seed


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sampler_of(num_examples=100, rate=0.1, steps=20, seed=0, **options):
    return PoissonSampler(num_examples, rate, steps, generator=seeded(seed), **options)


def logical(chunks):
    """The records of every logical batch."""
    batches = collections.defaultdict(list)
    for chunk in chunks:
        batches[chunk.step] += list(chunk)
    return dict(batches)


# ---- coins --------------------------------------------------------------------------------------------------------


def test_coins_are_fair_independent_and_their_number_is_binomial():
    size, rate, steps = 40, 0.15, 8000
    generator = seeded()
    taken = torch.zeros(steps, size, dtype=torch.float64)
    for row in taken:
        row[flip_coins(size, rate, generator)] = 1
    spread = math.sqrt(rate * (1 - rate))
    # 5 standard errors: one false alarm in 40,000 runs for each of 40 records, and the seed is fixed
    assert (taken.mean(0) - rate).abs().max() < 5 * spread / math.sqrt(steps)
    centred = (taken - rate) / spread
    between = centred.T @ centred / steps - torch.eye(size)  # records in one step
    off = between[~torch.eye(size, dtype=torch.bool)]
    assert off.abs().max() < 5.5 / math.sqrt(steps)
    after = (centred[1:] * centred[:-1]).mean(0)  # one record in two steps: a shuffled epoch has none in the next
    assert after.abs().max() < 5 / math.sqrt(steps)
    sizes = taken.sum(1)
    assert stats.chisquare(*_binomial_counts(sizes, size, rate)).pvalue > 1e-4


def _binomial_counts(sizes, size, rate, least=2, most=11):
    """Observed and expected numbers of batches by size, the tails together."""
    clipped = sizes.clamp(least, most).long()
    observed = torch.bincount(clipped - least, minlength=most - least + 1).numpy()
    law = stats.binom(size, rate)
    chance = [law.cdf(least), *(law.pmf(k) for k in range(least + 1, most)), law.sf(most - 1)]
    return observed, [len(sizes) * p for p in chance]


def test_coins_have_53_bits():
    """With the 24 bits of float32 a coin of probability 2**-26 would come up four times too often."""
    wide = torch.rand(1000, generator=seeded(), dtype=torch.float64)
    between = float(wide.sort().values[300:302].mean())  # two numbers that float32 might not tell apart
    assert flip_coins(1000, between, seeded()).tolist() == (wide < between).nonzero().flatten().tolist()
    assert len(flip_coins(1000, between, seeded())) == 301


@pytest.mark.parametrize("rate", [1.0, 1e-12])
def test_extreme_rates(rate):
    found = flip_coins(50, rate, seeded())
    assert found.tolist() == (list(range(50)) if rate == 1 else [])


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60), rate=st.floats(0.01, 1), most=st.one_of(st.none(), st.integers(1, 9)),
    processes=st.integers(1, 3), equal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_pieces_make_up_the_logical_batches(size, rate, most, processes, equal, seed):
    reference, generator = [], seeded(seed)
    for _ in range(4):
        reference.append(flip_coins(size, rate, generator).tolist())
    counts = []
    together = collections.defaultdict(list)
    for rank in range(processes):
        sampler = PoissonSampler(size, rate, 4, max_physical=most, generator=seeded(seed), num_processes=processes,
                                 rank=rank, equal_chunks=equal)  # fmt: skip
        chunks = list(sampler)
        assert sorted({chunk.step for chunk in chunks}) == [0, 1, 2, 3]  # an empty logical batch is there
        for before, after in itertools.pairwise(chunks):
            follows = (before.step + 1, 0) if before.last else (before.step, before.piece + 1)
            assert (after.step, after.piece) == follows
        assert chunks[0].piece == 0 and chunks[-1].last
        if most is not None:
            assert all(len(chunk) <= most for chunk in chunks)
            if not equal:  # no more pieces than needed
                sizes = collections.Counter(chunk.step for chunk in chunks)
                own = logical(chunks)
                assert all(sizes[step] == max(1, math.ceil(len(own[step]) / most)) for step in range(4))
        counts.append([sum(chunk.step == step for chunk in chunks) for step in range(4)])
        for step, records in logical(chunks).items():
            assert all(record % processes == rank for record in records)
            together[step] += records
    assert [sorted(together[step]) for step in range(4)] == reference
    if equal:
        assert all(count == counts[0] for count in counts)


def test_similar_lengths_share_a_piece():
    lengths = torch.randperm(200, generator=seeded(3)).tolist()
    plain, sorted_ = (list(sampler_of(200, 0.3, 3, max_physical=8, lengths=given)) for given in (None, lengths))
    assert {k: sorted(v) for k, v in logical(sorted_).items()} == {k: sorted(v) for k, v in logical(plain).items()}

    def padding(chunks):
        return sum(max(lengths[i] for i in chunk) * len(chunk) - sum(lengths[i] for i in chunk) for chunk in chunks)

    for step in range(3):
        order = [lengths[i] for i in logical(sorted_)[step]]
        assert order == sorted(order)
    assert padding(sorted_) < 0.2 * padding(plain)


def test_a_sampler_goes_on_where_it_stood():
    whole = [list(chunk) for chunk in sampler_of()]
    first, second = sampler_of(), sampler_of(seed=7)
    begun = [list(chunk) for _, chunk in zip(range(8), first, strict=False)]
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second.load_state_dict(torch.load(stored, weights_only=True))
    assert begun + [list(chunk) for chunk in second] == whole


def test_secret_coins_are_not_saved():
    one, two = (PoissonSampler(400, 0.2, 6) for _ in range(2))
    assert one.state_dict() == {"step": 0, "generator": None, "cut": None}
    assert [list(c) for c in one] != [list(c) for c in two]
    two.load_state_dict({"step": 4, "generator": None})
    assert [chunk.step for chunk in two] == [4, 5]
    with pytest.raises(CheckpointError, match="fixed seed"):
        two.load_state_dict(sampler_of().state_dict())
    with pytest.raises(CheckpointError, match="fixed seed"):
        sampler_of().load_state_dict(two.state_dict())


def test_a_rate_may_change_where_nothing_is_cut():
    sampler = sampler_of(steps=6)
    pieces = iter(sampler)
    assert [next(pieces).rate for _ in range(2)] == [0.1, 0.1]
    sampler.rate = 0.7
    rest = list(pieces)
    assert [piece.rate for piece in rest] == [0.7] * 4
    # 400 coins of probability 0.7 against 0.1: 280 +- 9 or 40 +- 6
    assert 240 < sum(map(len, rest)) < 320
    with pytest.raises(ValueError, match=r"rate=1.5: a sampling rate lies in \(0, 1\]"):
        sampler.rate = 1.5
    with pytest.raises(ValueError, match="cannot change where batches are cut, max_batch=12"):
        sampler_of(max_batch=12, truncation_accounted=True).rate = 0.2


def test_cut_batches_are_resumed_as_cut():
    """Else the part of delta that the first half used up would be forgotten."""
    cut, plain = sampler_of(max_batch=12, truncation_accounted=True), sampler_of()
    sampler_of(max_batch=12, truncation_accounted=True).load_state_dict(cut.state_dict())
    for one, other in ((cut, plain), (plain, cut)):
        with pytest.raises(CheckpointError, match=r"batches were cut by \(max_batch, rate\)"):
            one.load_state_dict(other.state_dict())
    short = sampler_of(steps=3, max_batch=12, truncation_accounted=True)
    short.load_state_dict({**cut.state_dict(), "step": 9})
    # a run of 9 steps that shall have 3 pays for 9
    assert short.truncation_delta(1.0) == pytest.approx(cut.truncation_delta(1.0) * 9 / 20, rel=1e-12)


def test_cut_batches_need_an_accountant_that_knows():
    with pytest.raises(ValueError, match="no Poisson batches"):
        sampler_of(max_batch=12)
    sampler = sampler_of(100, 0.1, 4000, max_batch=12, truncation_accounted=True)
    sizes = collections.Counter(len(chunk) for chunk in sampler)
    assert max(sizes) == 12
    free = collections.Counter(len(chunk) for chunk in sampler_of(100, 0.1, 4000))
    law = stats.binom(100, 0.1)
    # what lay above the cut now lies on it: a share with standard error sqrt(p (1 - p) / 4000) = .0064
    assert sizes[12] / 4000 == pytest.approx(law.sf(11), abs=5 * 0.0064)
    assert free[12] / 4000 == pytest.approx(law.pmf(12), abs=5 * 0.0047)


def test_what_is_cut_is_random():
    taken = torch.zeros(30)
    for chunk in sampler_of(30, 0.9, 4000, max_batch=10, truncation_accounted=True):
        taken[list(chunk)] += 1
    share = taken / 4000
    assert (share - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 4000)


@pytest.mark.parametrize(("size", "rate", "cut"), [(1000, 0.05, 90), (100_000, 0.01, 1300), (50, 0.5, 49), (9, 1, 5)])
def test_cost_of_cutting(size, rate, cut):
    sampler = sampler_of(size, rate, 100, max_batch=cut, truncation_accounted=True)
    exact = 100 * stats.binom.sf(cut, size + 1, rate) * (1 + math.exp(2.0))
    # an upper bound, and no more than the geometric series makes of it
    assert exact * (1 - 1e-8) <= sampler.truncation_delta(2.0) <= 1.2 * exact
    assert sampler_of(size, rate, 100).truncation_delta(2.0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples=0: give a whole number >= 1"),
        ({"num_examples": 2.5}, "num_examples=2.5"),
        ({"rate": 0.0}, r"rate=0.0: a sampling rate lies in \(0, 1\]"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"rate": math.nan}, "rate=nan"),
        ({"steps": 0}, "steps=0"),
        ({"max_physical": 0}, "max_physical=0"),
        ({"max_physical": True}, "max_physical=True"),
        ({"num_processes": 2, "rank": 2}, "rank=2 of num_processes=2"),
        ({"lengths": [1.0, 2.0]}, "2 lengths for 100 records"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_samplers_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        sampler_of(**options)


# ---- loader -------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["x", "y"])


class Rows(Dataset):
    """A map-style data set that counts what is read of it."""

    def __init__(self, size):
        self.read = collections.Counter()
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read[index] += 1
        return torch.tensor([float(index), 1.0]), index


class Table:
    """Reads rows by lists of indices, as data sets of Hugging Face do."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        if isinstance(key, list):
            return {"ids": [[k, k + 1] for k in key], "label": list(key)}
        return {"ids": [key, key + 1], "label": key}

    def __getitems__(self, keys):
        columns = self[keys]
        return [{name: column[i] for name, column in columns.items()} for i in range(len(keys))]


def test_loader_gives_the_records_of_the_sampler():
    loader = PoissonLoader(Rows(100), sampler_of(max_physical=4))
    found = collections.defaultdict(list)
    for x, index in loader:
        assert index.tolist() == list(loader.place) == x[:, 0].long().tolist()
        found[loader.place.step] += index.tolist()
    assert dict(found) == logical(sampler_of())
    assert list(loader) == []  # all steps are done
    assert loader.steps == 20


def test_tables_and_collators():
    def collate(rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in ("ids", "label")}

    loader = PoissonLoader(Table(30), sampler_of(30, 0.2, 5), collate_fn=collate)
    found = [(loader.place.step, batch["label"].tolist()) for batch in loader]
    assert dict(found) == logical(sampler_of(30, 0.2, 5))


def test_workers_change_nothing():
    def go_through(**options):
        loader = PoissonLoader(Rows(60), sampler_of(60, 0.03, 9), **options)
        return [(index.tolist(), repr(loader.place)) for _, index in loader]

    plain = go_through()
    assert go_through(num_workers=1, prefetch_factor=3) == plain
    assert any(indices == [] for indices, _ in plain) and any(indices for indices, _ in plain)


def test_empty_batches_have_the_form_of_the_others_and_read_no_other_record():
    from transformers import BatchEncoding

    def collate(rows):
        x = torch.stack([row[0] for row in rows])
        return BatchEncoding({"x": x, "more": [Pair(x, ["a"] * len(rows)), 3, None], "scale": torch.tensor(2.0)})

    rows = Rows(10)
    loader = PoissonLoader(rows, sampler_of(10, 1e-9, 3), collate_fn=collate)
    batches = list(loader)
    assert len(batches) == 3 and set(rows.read) == {0}
    for batch in batches:
        assert isinstance(batch, BatchEncoding) and batch["x"].shape == (0, 2) and batch["scale"] == 2
        pair, three, none = batch["more"]
        assert isinstance(pair, Pair) and pair.x.shape == (0, 2) and pair.y == [] and (three, none) == (3, None)


def test_loader_goes_on_after_the_last_complete_batch():
    loader = PoissonLoader(Rows(100), sampler_of(max_physical=4))
    seen = collections.defaultdict(list)
    for _, index in loader:
        seen[loader.place.step] += index.tolist()
        if loader.place.step == 2 and loader.place.piece == 1:
            break
    steps = []
    for _, index in loader:  # the batch that was broken off is drawn again: nobody has used it
        if not steps or steps[-1] != loader.place.step:
            steps.append(loader.place.step)
            seen[loader.place.step] = []
        seen[loader.place.step] += index.tolist()
    assert steps == list(range(2, 20)) and dict(seen) == logical(sampler_of())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_was_broken_off_is_not_drawn_anew(workers):
    """Who could draw again until a batch suits him would not sample. The coins are secret; this process keeps them."""
    loader = PoissonLoader(Rows(100), PoissonSampler(100, 0.3, 3), num_workers=workers)
    first = [index.tolist() for _, index in itertools.islice(loader, 1)]
    again = [index.tolist() for _, index in loader]
    assert again[0] == first[0] and len(again) == 3
    assert loader.state_dict()["generator"] is None


def test_loaders_refuse():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 100

        def __iter__(self):
            return iter(range(100))

    columns = {"x": list(range(100)), "y": list(range(100))}
    for data, message in ((Stream(), "a stream cannot be sampled"), (columns, "number of columns, not of records")):
        with pytest.raises(TypeError, match=message):
            PoissonLoader(data, sampler_of())
    with pytest.raises(TypeError, match="a generator has no length"):
        PoissonLoader((row for row in range(3)), sampler_of())
    with pytest.raises(ValueError, match="the data set has 7 records, the sampler 100"):
        PoissonLoader(Rows(7), sampler_of())
    with pytest.raises(ValueError, match="drop_last, shuffle: coins make the batches"):
        PoissonLoader(Rows(100), sampler_of(), shuffle=True, drop_last=True)


# ---- randomness and noise -----------------------------------------------------------------------------------------


def test_a_seed_of_torch_has_32_bits_and_ours_more():
    assert torch.equal(torch.randn(9, generator=seeded(5)), torch.randn(9, generator=seeded(5 + 2**32)))
    one, two = (secure_generator().get_state() for _ in range(2))
    assert int((one != two).sum()) > 2400  # of the 2,496 bytes of the twister, one in 256 agrees by chance
    drawn = torch.rand(20_000, generator=secure_generator(), dtype=torch.float64)
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-6
    assert stats.kstest(torch.randn(20_000, generator=secure_generator()).numpy(), "norm").pvalue > 1e-6


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_and_of_the_size_that_was_asked_for(draws, dtype):
    total = torch.full((300, 1000), 3.0, dtype=dtype)
    noise = add_noise(total, 2.0, seeded(), scale=0.25, draws=draws)
    assert noise.dtype == dtype
    # exact but for rounding: 0.75 and the noise are of size 1
    torch.testing.assert_close(total, 0.75 + noise, rtol=0, atol=4e-7 if dtype == torch.float32 else 1e-15)
    values = noise.double().flatten() / 0.5
    count = len(values)
    assert abs(values.mean()) < 5 / math.sqrt(count)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-4
    assert abs((values**4).mean() - 3) < 5 * math.sqrt(96 / count)  # the fourth moment, too


def test_four_draws_reach_further_than_one():
    """A normal number of float32 is made of one uniform number of 24 bits, which bounds it."""
    bound = math.sqrt(-2 * math.log(2.0**-24))
    values = torch.empty(2_000_000).normal_(generator=seeded())
    assert values.abs().max() <= bound < 5.78
    assert 4 * bound / 2 > 11


def test_noise_scales_a_gradient_of_any_layout():
    total = torch.arange(12.0).reshape(3, 4).T
    before = total.clone()
    noise = add_noise(total, 1.0, seeded(), scale=0.5)
    torch.testing.assert_close(total, 0.5 * before + noise, rtol=0, atol=1e-6)


# ---- optimizer ----------------------------------------------------------------------------------------------------

DATA = [tuple(torch.randn(size, generator=seeded(i * size)).double() for size in (3, 2)) for i in range(60)]


def linear(seed=0, bias=True):
    model = nn.Linear(3, 2, bias=bias).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64))
    return model


def losses_of(model, batch):
    x, y = batch
    return (model(x) - y).square().mean(dim=1)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def clipped_sum(model, records, clip_norm):
    """The sum of clipped gradients, one record at a time; the engine adds 1e-6 to a norm before it divides."""
    weights, model = model.state_dict(), nn.Linear(3, 2).double()  # without the engine's hooks
    model.load_state_dict(weights)
    total = torch.zeros_like(flat(model))
    for index in records:
        x, y = DATA[index]
        gradient = torch.autograd.grad(losses_of(model, (x[None], y[None])).sum(), list(model.parameters()))
        gradient = torch.cat([part.flatten() for part in gradient])
        total += gradient * min(1.0, clip_norm / (float(gradient.norm()) + 1e-6))
    return total


def batch_of(records):
    return torch.stack([DATA[i][0] for i in records]), torch.stack([DATA[i][1] for i in records])


def optimizer_of(model, sigma=1.5, size=8.0, lr=1.0, clip_norm=0.3, inner=torch.optim.SGD, **options):
    return DPOptimizer(
        inner(model.parameters(), lr=lr), ClipEngine(model, clip_norm), sigma, size,
        generator=options.pop("generator", seeded(5)), **options,
    )  # fmt: skip


def expected_noise(model, sigma=1.5, size=8.0, clip_norm=0.3, generator=None):
    generator = generator or seeded(5)
    drawn = [torch.empty_like(p).normal_(0, sigma * clip_norm / size, generator=generator) for p in model.parameters()]
    return torch.cat([part.flatten() for part in drawn])


@pytest.mark.parametrize("pieces", [[range(5)], [[0, 1], [2, 3], [4]], [[0], [1], [2], [3], [4]]], ids=["1", "3", "5"])
def test_a_step_is_the_noised_clipped_sum_over_the_expected_size(pieces):
    model = linear()
    start = flat(model)
    total = clipped_sum(model, range(5), 0.3)
    optimizer = optimizer_of(model)
    for piece in pieces:
        optimizer.backward(losses_of(model, batch_of(piece)))
    optimizer.step()
    # float64, a handful of terms. 5 records, but 8 were expected; noise is drawn once, however many pieces there are
    torch.testing.assert_close(flat(model), start - total / 8 - expected_noise(model), rtol=0, atol=1e-14)
    assert optimizer.steps == 1


def test_an_empty_batch_is_noise():
    model = linear()
    start = flat(model)
    optimizer_of(model).step()
    torch.testing.assert_close(flat(model), start - expected_noise(model), rtol=0, atol=1e-15)


def test_noise_has_the_promised_size_and_no_two_parameters_share_it():
    model = nn.ModuleDict({"a": nn.Linear(300, 300, bias=False), "b": nn.Linear(300, 300, bias=False)})
    nn.init.zeros_(model["a"].weight), nn.init.zeros_(model["b"].weight)
    optimizer = optimizer_of(model, sigma=0.8, size=16.0, clip_norm=0.5)
    optimizer.step()
    a, b = (model[name].weight.detach().double().flatten() * 16 / (0.8 * 0.5) for name in "ab")
    count = len(a)
    for values in (a, b):
        assert abs(values.var() - 1) < 5 * math.sqrt(2 / count) and abs(values.mean()) < 5 / math.sqrt(count)
    assert abs((a * b).mean()) < 5 / math.sqrt(count)


def test_a_gradient_from_before_is_not_released():
    """It is neither clipped nor noised: of a warm-up without privacy, for example."""
    model = linear()
    start = flat(model)
    losses_of(model, batch_of(range(60))).sum().backward()
    assert model.weight.grad.norm() > 10
    optimizer_of(model).step()
    torch.testing.assert_close(flat(model), start - expected_noise(model), rtol=0, atol=1e-15)


def test_a_clipping_norm_that_falls_within_a_batch_does_not_lower_its_noise():
    model = linear()
    optimizer = optimizer_of(model)
    start, total = flat(model), clipped_sum(model, [0, 1], 0.3)
    optimizer.backward(losses_of(model, batch_of([0, 1])))
    optimizer.engine.clip_norm = 0.03
    optimizer.step()
    torch.testing.assert_close(flat(model), start - total / 8 - expected_noise(model), rtol=0, atol=1e-14)
    optimizer.zero_grad()
    start = flat(model)
    optimizer.step()  # the next batch is noised for its own
    moved = (flat(model) - start).norm()
    assert moved < 0.3 * expected_noise(model).norm()  # ten times less noise, on 8 numbers


def test_statistics_that_a_model_keeps_of_its_records_are_pointed_out():
    class Keeper(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("mean", torch.zeros(3), persistent=persistent)

        def forward(self, x):
            self.mean.lerp_(x.mean(0), 0.1)
            return self.layer(x)

    for persistent in (True, False):
        model = Keeper(persistent).double()
        optimizer = optimizer_of(model)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.backward(losses_of(model, batch_of(range(4))))
                optimizer.step()
                optimizer.zero_grad()
        told = [str(warning.message) for warning in seen]
        assert len(told) == persistent, told
        assert all("the buffer mean changes while the model trains" in text for text in told)


def test_no_two_steps_share_noise():
    model = nn.Linear(400, 400, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = optimizer_of(model)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step()
        seen.append(model.weight.grad.flatten().double())
    seen = [values / values.std() for values in seen]
    assert abs((seen[0] * seen[1]).mean()) < 5 / 400


def test_a_parameter_that_no_record_reaches_gets_noise_and_a_frozen_one_none():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "frozen": nn.Linear(3, 2)}).double()
    model["frozen"].requires_grad_(False)
    model["frozen"].weight.grad = torch.ones_like(model["frozen"].weight)  # left from before
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = optimizer_of(model)
    optimizer.backward(losses_of(model["used"], batch_of([0, 1])))
    optimizer.step()
    moved = {name: bool((parameter != before[name]).all()) for name, parameter in model.named_parameters()}
    assert moved == {name: not name.startswith("frozen") for name in moved}


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "RMSprop"])
def test_any_optimizer_sees_the_private_gradient_alone(name):
    inner = getattr(torch.optim, name)
    model, other = linear(), linear()
    optimizer = optimizer_of(model, lr=0.1, inner=inner)
    plain = inner(other.parameters(), lr=0.1)
    generator = seeded(5)
    for step in range(3):
        total = clipped_sum(model, range(step, step + 6), 0.3)
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch_of(range(step, step + 6))))
        optimizer.step()
        gradient = total / 8 + expected_noise(model, generator=generator)
        sizes = [parameter.numel() for parameter in other.parameters()]
        for parameter, part in zip(other.parameters(), gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        plain.step()
        torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-11)  # float64, Adam divides by small roots


def test_loops_that_always_call_step_can_skip():
    model, other = linear(), linear()
    optimizer = optimizer_of(model)
    for index, piece in enumerate([[0, 1], [2, 3], [4]]):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch_of(piece)))
        if index < 2:
            optimizer.skip_step()
        optimizer.step()
    expected = flat(other) - clipped_sum(other, range(5), 0.3) / 8 - expected_noise(other)
    torch.testing.assert_close(flat(model), expected, rtol=0, atol=1e-14)
    assert optimizer.steps == 1


def test_noise_cannot_be_added_to_what_was_noised_already():
    model = linear()
    optimizer = optimizer_of(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="call this optimizer's zero_grad"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"call zero_grad\(\) before the next batch"):
        optimizer.backward(losses_of(model, batch_of([0])))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.steps == 2


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
], ids=["lambda", "one_cycle", "cosine", "plateau"])  # fmt: skip
def test_schedulers_work(make):
    model, other = linear(), linear()
    optimizer, plain = optimizer_of(model), torch.optim.SGD(other.parameters(), lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = make(optimizer), make(plain)
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.step()
            plain.step()
            metric = (1.0,) if isinstance(ours, torch.optim.lr_scheduler.ReduceLROnPlateau) else ()
            ours.step(*metric), theirs.step(*metric)
            assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] != 1.0
    assert optimizer.steps == 5  # the scheduler's wrapper of step reaches ours


def test_it_is_an_optimizer():
    model = linear()
    optimizer = optimizer_of(model, inner=torch.optim.AdamW)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups and optimizer.state is optimizer.optimizer.state
    assert optimizer.defaults is optimizer.optimizer.defaults
    assert "AdamW" in repr(optimizer) and "noise_multiplier=1.5" in repr(optimizer)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.step()
    assert called == ["before", "after"]


def test_parameters_may_join_before_the_first_step():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model["b"].requires_grad_(False)
    inner = torch.optim.SGD(model["a"].parameters(), lr=1.0)
    optimizer = DPOptimizer(inner, ClipEngine(model, 0.3), 1.0, 8.0)
    model["b"].requires_grad_(True)
    optimizer.add_param_group({"params": list(model["b"].parameters()), "lr": 0.1})
    optimizer.step()
    with pytest.raises(ValueError, match="cannot join after 1 private steps"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_optimizers_refuse_parameters_that_do_not_match():
    model = linear()
    with pytest.raises(ValueError, match=r"a parameter of shape \(4, 5\) that the engine's model does not have"):
        optimizer_of(model, inner=lambda p, lr: torch.optim.SGD([*p, *nn.Linear(5, 4, bias=False).parameters()], lr=lr))
    with pytest.raises(ValueError, match="bias is trainable but not in the optimizer"):
        optimizer_of(model, inner=lambda p, lr: torch.optim.SGD([model.weight], lr=lr))
    with pytest.raises(ValueError, match=r"weight is trained in torch.bfloat16"):
        optimizer_of(nn.Linear(3, 2).bfloat16())
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="private already"):
        DPOptimizer(optimizer, optimizer.engine, 1.0, 8.0)
    with pytest.raises(ValueError, match=r"step\(closure\)"):
        optimizer.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "noise_multiplier=0.0: give a finite number > 0"),
        ({"sigma": -1.0}, "noise_multiplier=-1.0"),
        ({"sigma": math.nan}, "noise_multiplier=nan"),
        ({"size": 0.0}, "expected_batch_size=0.0"),
        ({"size": math.inf}, "expected_batch_size=inf"),
        ({"sampling_rate": 1.5}, "sampling_rate=1.5"),
        ({"accountant": Accountant()}, "an accountant needs sampling_rate"),
        ({"target_epsilon": 1.0}, "target_epsilon needs accountant and delta"),
        ({"draws": 0}, "draws=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_optimizers_refuse_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        optimizer_of(linear(), **options)


def test_no_noise_only_if_it_is_said():
    model = linear()
    start = flat(model)
    total = clipped_sum(model, range(4), 0.3)
    optimizer = optimizer_of(
        model, sigma=0.0, i_know_this_is_not_private=True, accountant=Accountant(), sampling_rate=0.1
    )
    optimizer.backward(losses_of(model, batch_of(range(4))))
    optimizer.step()
    torch.testing.assert_close(flat(model), start - total / 8, rtol=0, atol=1e-15)
    assert optimizer.accountant.epsilon(1e-5) == math.inf


def test_a_generator_has_to_be_where_the_parameters_are():
    optimizer = optimizer_of(linear(), generator={torch.device("meta"): seeded()})
    with pytest.raises(ValueError, match="parameters on cpu, noise generators on meta"):
        optimizer.step()


# ---- records ------------------------------------------------------------------------------------------------------


def test_records_are_what_they_say():
    model = linear()
    clip = float(torch.tensor([float(clipped_sum(model, [i], 1e9).norm()) for i in range(6)]).median()) + 0.1
    optimizer = optimizer_of(model, record=True, clip_norm=clip)
    totals, clipped, noises, generator = [], [], [], seeded(5)
    for step, records in enumerate([range(6), range(6, 9), ()]):
        totals.append(clipped_sum(model, records, clip) / 8)
        clipped.append(sum(float(clipped_sum(model, [i], 1e9).norm()) > clip for i in records))
        noises.append(expected_noise(model, clip_norm=clip, generator=generator))
        before = flat(model)
        for piece in (list(records)[:2], list(records)[2:]) if records else ():
            optimizer.backward(losses_of(model, batch_of(piece)))
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(flat(model), before - totals[step] - noises[step], rtol=0, atol=1e-13)
    assert 0 < clipped[0] < 6  # some records are clipped, some are not
    found = optimizer.records()
    # norms are kept in float32
    torch.testing.assert_close(found["signal_norm"], [float(t.norm()) for t in totals], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found["noise_norm"], [float(n.norm()) for n in noises], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["snr"][0], float(totals[0].norm() / noises[0].norm()), rtol=1e-6, atol=0)
    assert found["batch_size"] == [6, 3, 0]
    torch.testing.assert_close(found["clip_fraction"][:2], [clipped[0] / 6, clipped[1] / 3], rtol=1e-6, atol=0)
    assert math.isnan(found["clip_fraction"][2])
    with pytest.raises(ValueError, match="pass record=True"):
        optimizer_of(model).records()


@pytest.mark.parametrize("record", [False, True])
def test_a_step_never_waits_for_the_device(record, monkeypatch):
    model = linear()
    optimizer = optimizer_of(model, record=record, accountant=Accountant(), sampling_rate=0.1)
    optimizer.backward(losses_of(model, batch_of([0, 1])))

    def refuse(*_):
        raise AssertionError("a number was fetched from the device")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.step()
    monkeypatch.undo()
    assert optimizer.steps == 1


# ---- budget -------------------------------------------------------------------------------------------------------


class Counting(Accountant):
    """Counts how often epsilon is computed, which is what takes time."""

    calls = 0

    def epsilon(self, *args, **options):
        Counting.calls += 1
        return super().epsilon(*args, **options)


def budgeted(model, steps, planned=None, target=3.0, accountant=None, rate=0.1, **options):
    sigma = calibrate_sigma(target, 1e-3, rate, steps, method="rdp")
    accountant = accountant or Accountant()
    return optimizer_of(model, sigma=sigma, accountant=accountant, sampling_rate=rate, target_epsilon=target,
                        delta=1e-3, method="rdp", planned_steps=planned, **options)  # fmt: skip


def test_the_budget_is_kept_to_the_step():
    model = linear()
    optimizer = budgeted(model, 12)
    with pytest.raises(BudgetExceeded) as caught:
        for _ in range(100):
            optimizer.zero_grad()
            before = flat(model)
            optimizer.step()
    error = caught.value
    assert torch.equal(flat(model), before)  # the step that was refused changed nothing
    made = optimizer.steps
    assert made >= 12 and error.steps == made and error.target == 3.0
    sigma = optimizer.noise_multiplier
    assert optimizer.accountant.epsilon(1e-3, method="rdp") <= 3.0 < error.epsilon
    assert error.epsilon == pytest.approx(epsilon_of(0.1, sigma, made + 1, 1e-3, method="rdp"), rel=1e-9)
    assert re.search(rf"step {made + 1} would spend .* target of 3", str(error))
    assert str(copy.copy(error)) == str(error)  # errors of worker processes travel by pickle


def test_what_the_budget_refused_does_not_meet_the_next_batch():
    """Two logical batches in one sum would move it by 2 C where one record is in both."""
    model = linear()
    optimizer = budgeted(model, 1)
    with pytest.raises(BudgetExceeded):
        for _ in range(100):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, batch_of([0])))
            optimizer.step()
    for attempt in (optimizer.step, lambda: optimizer.backward(losses_of(model, batch_of([0])))):
        with pytest.raises(RuntimeError, match=r"call .*zero_grad\(\)"):
            attempt()
    optimizer.zero_grad()
    assert model.weight.grad is None


def test_after_the_budget_is_raised_the_refused_batch_is_used_once():
    model, other = linear(), linear()
    private = private_of(model, epsilon=1.5, delta=1e-3, steps=30, method="rdp", inner=torch.optim.SGD)
    with pytest.raises(BudgetExceeded):
        train(private, model)
    made = private.optimizer.steps
    assert 1 < made < 29 and model.weight.grad is None
    private.optimizer.budget.target = 100.0
    train(private, model)
    assert private.optimizer.steps == 30
    by_hand(other, steps=30)  # as if nothing had happened
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-12)


def test_planned_steps_are_checked_once():
    Counting.calls = 0
    optimizer = budgeted(linear(), 12, planned=12, accountant=Counting())
    for _ in range(12):
        optimizer.step()
        optimizer.zero_grad()
    assert Counting.calls == 1 and optimizer.steps == 12


def test_unplanned_steps_are_checked_a_few_times():
    Counting.calls = 0
    optimizer = budgeted(linear(), 400, accountant=Counting())
    for _ in range(400):
        optimizer.step()
        optimizer.zero_grad()
    assert Counting.calls < 100


def test_a_change_of_noise_or_batch_is_a_new_segment_and_checked_anew():
    optimizer = budgeted(linear(), 12, planned=12)
    for _ in range(4):
        optimizer.step()
        optimizer.zero_grad()
    optimizer.noise_multiplier *= 1.5
    optimizer.step()
    optimizer.zero_grad()
    optimizer.sampling_rate, optimizer.expected_batch_size = 0.05, 4.0
    optimizer.step()
    optimizer.zero_grad()
    reference = Accountant()
    sigma = optimizer.noise_multiplier
    for q, s, n in [(0.1, sigma / 1.5, 4), (0.1, sigma, 1), (0.05, sigma, 1)]:
        reference.step(q, s, n)
    found, expected = (accountant.epsilon(1e-3, method="rdp") for accountant in (optimizer.accountant, reference))
    assert found == pytest.approx(expected, rel=1e-12)
    optimizer.noise_multiplier = 0.3  # far too little: nothing is affordable now
    with pytest.raises(BudgetExceeded):
        optimizer.step()


def test_what_others_spend_counts():
    shared = Accountant()
    optimizer = budgeted(linear(), 12, planned=12, accountant=shared)
    optimizer.step()
    optimizer.zero_grad()
    shared.step(0.1, optimizer.noise_multiplier, 500)
    with pytest.raises(BudgetExceeded):
        optimizer.step()


# ---- checkpoints --------------------------------------------------------------------------------------------------


def through_file(state):
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=True)


def train(private, model, stop=None):
    scheduler = torch.optim.lr_scheduler.LambdaLR(private.optimizer, lambda step: 1.0)
    for batch in private.loader:
        if private.step(losses_of(model, batch)):
            scheduler.step()
            if private.optimizer.steps == stop:
                break


def private_of(model, seed=0, inner=torch.optim.AdamW, **options):
    settings_ = {"batch_size": 6, "steps": 10, "noise_multiplier": 1.0, "max_physical": 4, "clip_norm": 0.3, **options}
    return make_private(model, inner(model.parameters(), lr=0.05), DATA, seed=seed, **settings_)


def test_a_resumed_run_is_the_run():
    whole, parts = linear(), linear()
    uninterrupted = private_of(whole)
    train(uninterrupted, whole)
    first = private_of(parts)
    train(first, parts, stop=4)
    saved = through_file({"private": first.state_dict(), "model": parts.state_dict()})
    resumed_model = linear(seed=9)
    resumed_model.load_state_dict(saved["model"])
    resumed = private_of(resumed_model)
    resumed.load_state_dict(saved["private"])
    assert resumed.optimizer.steps == 4
    train(resumed, resumed_model)
    assert torch.equal(flat(resumed_model), flat(whole))  # bit for bit
    assert resumed.spent().epsilon == uninterrupted.spent().epsilon > first.spent().epsilon > 0


def test_secret_noise_is_not_saved_and_not_used_twice():
    model = linear()
    private = private_of(model, seed=None)
    train(private, model, stop=4)
    saved = through_file({"private": private.state_dict(), "model": model.state_dict()})
    assert saved["private"]["optimizer"]["privacy"]["noise"] is None
    assert saved["private"]["sampler"] == {"step": 4, "generator": None, "cut": None}
    ends = []
    for _ in range(2):
        resumed_model = linear()
        resumed_model.load_state_dict(saved["model"])
        resumed = private_of(resumed_model, seed=None)
        resumed.load_state_dict(saved["private"])
        train(resumed, resumed_model)
        assert resumed.optimizer.steps == 10
        assert resumed.spent().epsilon == pytest.approx(epsilon_of(0.1, 1.0, 10, 1 / 120), rel=1e-9)
        ends.append(flat(resumed_model))
    assert not torch.isclose(ends[0], ends[1]).any()


def test_states_without_privacy_are_refused():
    model = linear()
    private = private_of(model)
    train(private, model, stop=3)
    state = private.state_dict()
    plain = {key: value for key, value in state["optimizer"].items() if key != "privacy"}
    with pytest.raises(CheckpointError, match="says nothing of the privacy that was spent"):
        private.optimizer.load_state_dict(plain)
    forgetful = {**state["optimizer"], "privacy": {**state["optimizer"]["privacy"], "accountant": None}}
    with pytest.raises(CheckpointError, match="says nothing of the privacy that was spent"):
        private_of(linear()).load_state_dict({**state, "optimizer": forgetful})
    for part in ("optimizer", "sampler"):
        with pytest.raises(CheckpointError, match=f"the state lacks {part}"):
            private.load_state_dict({key: value for key, value in state.items() if key != part})
    with pytest.raises(CheckpointError, match="a data set of 61 records, this one has 60"):
        private.load_state_dict({**state, "num_examples": 61})
    with pytest.raises(CheckpointError, match="fixed seed"):
        private_of(linear(), seed=None).load_state_dict(state)
    with pytest.raises(CheckpointError, match="fixed seed"):
        private.load_state_dict(private_of(linear(), seed=None).state_dict())


def test_no_state_in_the_middle_of_a_batch():
    model = linear()
    private = private_of(model, batch_size=30)
    next_batch = iter(private.loader)
    assert not private.step(losses_of(model, next(next_batch)))
    with pytest.raises(RuntimeError, match="the middle of a logical batch"):
        private.state_dict()


# ---- all of it ----------------------------------------------------------------------------------------------------


def by_hand(model, steps=10, batch_size=6, sigma=1.0, clip_norm=0.3, lr=0.05, seed=0):
    """The whole of DP-SGD in a few lines: coins, clipped sum, noise, expected size."""
    coins, noise = seeded(derive_seed(seed, "coins")), seeded(derive_seed(seed, "noise", 0, 0))
    for _ in range(steps):
        total = clipped_sum(model, flip_coins(60, batch_size / 60, coins).tolist(), clip_norm)
        update = total / batch_size + expected_noise(model, sigma, batch_size, clip_norm, noise)
        sizes = [parameter.numel() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter, part in zip(model.parameters(), update.split(sizes), strict=True):
                parameter -= lr * part.view_as(parameter)


@pytest.mark.parametrize("most", [None, 1, 4])
def test_training_is_the_algorithm(most):
    model, other = linear(), linear()
    private = private_of(model, inner=torch.optim.SGD, max_physical=most)
    train(private, model)
    by_hand(other)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-13)  # float64, ten steps
    assert private.optimizer.steps == 10


@pytest.mark.parametrize(
    ("epochs", "size", "expected"), [(1, 6, 10), (1, 7, 9), (0.05, 6, 1), (2.5, 60, 3), (3, 0.5, 360)]
)
def test_steps_are_rounded_up(epochs, size, expected):
    private = private_of(linear(), batch_size=size, steps=None, epochs=epochs)
    assert private.loader.steps == expected and private.loader.sampler.rate == size / 60


def test_sigma_is_the_one_for_the_budget():
    model = linear()
    private = private_of(model, noise_multiplier=None, epsilon=2.0, delta=1e-3)
    assert private.optimizer.noise_multiplier == calibrate_sigma(2.0, 1e-3, 0.1, 10)
    assert private.spent().epsilon == 0
    train(private, model)
    spent = private.spent()
    assert 1.9 < spent.epsilon <= 2.0 and spent.delta == 1e-3  # the search for sigma is good to a thousandth
    assert spent.epsilon == pytest.approx(epsilon_of(0.1, private.optimizer.noise_multiplier, 10, 1e-3), rel=1e-9)


def test_a_budget_beside_given_noise_stops_the_run():
    model = linear()
    private = private_of(model, noise_multiplier=1.0, epsilon=1.5, delta=1e-3, steps=100, method="rdp")
    with pytest.raises(BudgetExceeded):
        train(private, model)
    assert private.spent().epsilon <= 1.5 and 0 < private.optimizer.steps < 100


def test_delta_is_below_one_over_n_or_a_warning():
    assert private_of(linear()).delta == 1 / 120
    with pytest.warns(UserWarning, match="delta=0.02 is not below 1/N"):
        private_of(linear(), delta=0.02)


def test_cut_batches_are_paid_for():
    private = private_of(linear(), noise_multiplier=None, epsilon=2.0, delta=1e-3, max_batch=20)
    plain = calibrate_sigma(2.0, 1e-3, 0.1, 10)
    assert private.optimizer.noise_multiplier > plain
    cost = private.loader.sampler.truncation_delta(2.0)
    assert 1e-5 < cost < 1e-3
    assert private.optimizer.noise_multiplier == calibrate_sigma(2.0, 1e-3 - cost, 0.1, 10)
    private.accountant.step(0.1, private.optimizer.noise_multiplier, 10)
    found = private.spent().epsilon
    assert private.accountant.epsilon(1e-3) < found <= 2.0
    assert "cut at 20" in private.summary()
    with pytest.raises(ValueError, match="max_batch=7 is cut so often"):
        private_of(linear(), noise_multiplier=None, epsilon=2.0, delta=1e-3, max_batch=7)


def test_the_summary_says_everything():
    private = private_of(linear(), epsilon=2.0, delta=1e-3)
    text = private.summary()
    for part in ("epsilon = 0 of 2 at delta = 0.001", "pld", "add or remove one record", "N = 60", "Poisson", "q = 0.1",
                 "expected size 6", "0 of 10", "flat", "C = 0.3", "sigma = 1.0000", "sensitivity 0.3",
                 "fixed seed 0: no secret"):  # fmt: skip
        assert part in text, part
    assert "the operating system" in private_of(linear(), seed=None).summary()
    assert "fixed seed 0" in str(private.spent())


def test_secret_noise_differs_between_runs():
    ends = []
    for _ in range(2):
        model = linear()
        train(private_of(model, seed=None, steps=2), model)
        ends.append(flat(model))
    assert not torch.isclose(ends[0], ends[1]).any()
    with pytest.raises(ValueError, match="would make it known"):
        private_of(linear(), seed=1, secure=True)
    with pytest.raises(ValueError, match="secure=False needs a seed"):
        private_of(linear(), seed=None, secure=False)


def test_one_loss_for_each_record():
    model = linear()
    private = private_of(model, batch_size=50, max_physical=None)
    with pytest.raises(RuntimeError, match="there is no new batch"):
        private.step(torch.zeros(3))
    x, y = next(iter(private.loader))
    with pytest.raises(ValueError, match=rf"losses has shape \(\); give one loss for each of the {len(x)} rows"):
        private.step((model(x) - y).square().mean())
    with pytest.raises(ValueError, match=rf"losses has shape \({len(x)}, 2\)"):
        private.step((model(x) - y).square())
    with pytest.raises(ValueError, match=f"losses is None, but this batch has {len(x)} rows"):
        private.step(None)
    assert private.step(losses_of(model, (x, y)))
    with pytest.raises(RuntimeError, match="there is no new batch"):
        private.step(losses_of(model, (x, y)))


def test_no_piece_is_left_out():
    model = linear()
    private = private_of(model, batch_size=30)
    with pytest.raises(RuntimeError, match="one in between was never used"):
        for number, batch in enumerate(private.loader):
            if number != 1:
                private.step(losses_of(model, batch))


def test_a_batch_that_was_broken_off_leaves_nothing():
    model, other = linear(), linear()
    private = private_of(model, batch_size=30, inner=torch.optim.SGD)
    for batch in private.loader:
        private.step(losses_of(model, batch))
        if private.optimizer.steps == 2 and not private.loader.place.last:
            break
    train(private, model)
    by_hand(other, batch_size=30)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-13)


def test_the_first_piece_is_not_left_out_either():
    model = linear()
    private = private_of(model, batch_size=30)
    pieces = iter(private.loader)
    next(pieces)
    with pytest.raises(RuntimeError, match="one in between was never used"):
        private.step(losses_of(model, next(pieces)))
    train(private, model)  # a new loop gives the batch again
    assert private.optimizer.steps == 10


def test_the_accountant_is_told_the_rate_of_the_coins():
    model = linear()
    private = private_of(model, steps=6)
    train(private, model, stop=3)
    private.loader.sampler.rate = 0.5
    with pytest.raises(RuntimeError, match=r"drawn with the rate 0.5, and the accountant would be told 0.1"):
        train(private, model)
    private.optimizer.sampling_rate, private.optimizer.expected_batch_size = 0.5, 30.0
    train(private, model)
    assert [(s.q, s.steps) for s in private.accountant.segments] == [(0.1, 3), (0.5, 3)]


@pytest.mark.parametrize("at", [0, 1])
def test_a_piece_that_failed_is_not_added_twice(at, monkeypatch):
    """As when memory runs out while the gradients are added up: what was added must not be added again."""
    model, other = linear(), linear()
    private = private_of(model, batch_size=30, inner=torch.optim.SGD, steps=3)
    deposit, left = private.engine._deposit, [2 * at + 1]

    def short_of_memory(*arguments):
        deposit(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("a test")

    monkeypatch.setattr(private.engine, "_deposit", short_of_memory)
    pieces = iter(private.loader)
    for _ in range(at):
        private.step(losses_of(model, next(pieces)))
    batch = next(pieces)
    with pytest.raises(MemoryError):
        private.step(losses_of(model, batch))
    assert model.weight.grad is None
    if at:
        with pytest.raises(RuntimeError, match="or not to its end"):
            private.step(losses_of(model, batch))
    for batch in pieces:  # whoever goes on regardless is stopped, and the batch is not lost
        with pytest.raises(RuntimeError, match="or not to its end"):
            private.step(losses_of(model, batch))
    train(private, model)
    by_hand(other, steps=3, batch_size=30)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-12)


def test_something_may_happen_between_clipping_and_noise():
    model, other = linear(), linear()
    start = flat(model)
    private = private_of(model, batch_size=30, steps=2, inner=torch.optim.SGD)
    seen = []

    def keep_the_bias():
        seen.append(float(model.bias.grad.norm()))
        model.weight.grad.zero_()

    for batch in private.loader:
        if private.step(losses_of(model, batch), between=keep_the_bias):
            break
    total = clipped_sum(other, flip_coins(60, 0.5, seeded(derive_seed(0, "coins"))).tolist(), 0.3)
    noise = expected_noise(other, 1.0, 30.0, generator=seeded(derive_seed(0, "noise", 0, 0)))
    total[:6] = 0  # the weight comes first, and has 6 numbers
    assert len(seen) == 1 and seen[0] == pytest.approx(float(total.norm()), rel=1e-9)
    torch.testing.assert_close(flat(model), start - 0.05 * (total / 30 + noise), rtol=0, atol=1e-13)


def test_empty_batches_step_with_losses_or_without():
    ends = []
    for give in (True, False):
        model = linear()
        private = private_of(model, batch_size=0.5, steps=12, inner=torch.optim.SGD)
        sizes = []
        for batch in private.loader:
            sizes.append(len(private.loader.place))
            assert private.step(losses_of(model, batch) if sizes[-1] or give else None)
        assert 0 in sizes and len(sizes) == 12 == private.optimizer.steps
        ends.append(flat(model))
    assert torch.equal(*ends)
    other = linear()
    by_hand(other, steps=12, batch_size=0.5)
    torch.testing.assert_close(ends[0], flat(other), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0; give an expected batch size in \(0, 60\]"),
        ({"batch_size": 61}, "batch_size=61"),
        ({"epochs": 1}, "give epochs or steps, one of them"),
        ({"steps": None}, "give epochs or steps, one of them"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None, "epochs": -1}, "epochs=-1"),
        ({"steps": None, "epochs": math.inf}, "epochs=inf"),
        ({"noise_multiplier": None}, "give epsilon, the budget, or noise_multiplier"),
        ({"epsilon": 0.0}, "epsilon=0.0: a budget is a finite number > 0"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"noise_multiplier": 0.0}, "pass i_know_this_is_not_private=True"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"noise_multiplier": None, "epsilon": 1.0, "accountant": Accountant()}, "begins at zero"),
        ({"accountant": Accountant(num_examples=59)}, "the accountant counts for 59 records, the data set has 60"),
        ({"method": "gdp"}, "method='gdp' gives no guarantee"),
        ({"noise_multiplier": None, "epsilon": 1e-6, "delta": 1e-9}, "target_epsilon=1e-06 is out of reach"),
        ({"max_batch": 6, "epsilon": 2.0}, "max_batch=6 is cut so often"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"max_physical": 0}, "max_physical=0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_make_private_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        private_of(linear(), **options)


def test_streams_and_empty_data_are_refused():
    model = linear()
    options = {"batch_size": 1, "steps": 1, "noise_multiplier": 1.0}
    with pytest.raises(TypeError, match=r"has no length or no dataset\[index\]. The guarantee depends on N"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), iter(DATA), **options)
    with pytest.raises(ValueError, match="the data set is empty"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), [], **options)


def test_without_noise_epsilon_is_infinite():
    model = linear()
    private = private_of(model, noise_multiplier=0.0, i_know_this_is_not_private=True)
    train(private, model)
    assert private.spent().epsilon == math.inf and "epsilon = inf" in private.summary()


def test_names_are_public():
    assert isinstance(private_of(linear()), Private) and Chunk([1, 2], step=3).step == 3
    assert repr(Chunk([1, 2], step=3)) == "Chunk([1, 2], step=3, piece=0, last=True)"


# ---- other rules of clipping, other models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sensitivity"),
    [
        ({"clipping": "automatic"}, 0.3),
        ({"clipping": "per_layer", "groups": lambda name: name, "group_norms": {"weight": 0.4, "bias": 0.3}}, 0.5),
        ({"mode": "two_pass"}, 0.3),
    ],
    ids=["automatic", "per_layer", "two_pass"],
)
def test_noise_is_measured_in_the_sensitivity_of_the_rule(options, sensitivity):
    model = linear()
    start = flat(model)
    private = private_of(model, inner=torch.optim.SGD, steps=1, batch_size=1e-9, **options)
    noise = copy.deepcopy(private.optimizer.noise.on(torch.device("cpu")).get_state())
    for _ in private.loader:
        private.step(None)
    generator = seeded()
    generator.set_state(noise)
    expected = start - 0.05 * expected_noise(model, 1.0, 1e-9, sensitivity, generator)
    torch.testing.assert_close(flat(model), expected, rtol=1e-12, atol=0)


def test_adaptive_clipping_pays_for_its_counts():
    model = linear()
    options = {"clipping": "adaptive", "clip_norm": 20.0, "count_noise_multiplier": 5.0, "target_quantile": 0.3}
    private = private_of(model, noise_multiplier=None, epsilon=2.0, delta=1e-3, **options)
    total = calibrate_sigma(2.0, 1e-3, 0.1, 10)
    sigma = private.optimizer.noise_multiplier
    assert sigma > total
    assert private.optimizer.charged_sigma == pytest.approx(joint_sigma(sigma, 5.0), rel=1e-12)
    assert total <= private.optimizer.charged_sigma <= total * (1 + 1e-9)
    norms = [20.0]
    for batch in private.loader:
        if private.step(losses_of(model, batch)):
            norms.append(private.engine.clip_norm)
    assert len(set(norms)) == 11  # it moves in every step
    spent = private.spent()
    assert [(s.q, s.sigma, s.steps) for s in spent.segments] == [(0.1, private.optimizer.charged_sigma, 10)]
    assert 1.9 < spent.epsilon <= 2.0
    assert "is charged as sigma" in private.summary()
    saved = through_file(private.state_dict())
    other = private_of(linear(), noise_multiplier=None, epsilon=2.0, delta=1e-3, **options)
    other.load_state_dict(saved)
    assert other.engine.clip_norm == norms[-1]


def test_adaptive_clipping_finds_the_quantile():
    """Without noise, and with a step that changes nothing, the norm goes where half of the gradients lie below."""
    model = linear()
    private = private_of(model, inner=lambda p, lr: torch.optim.SGD(p, lr=0.0), batch_size=60, steps=200,
                         noise_multiplier=0.0, i_know_this_is_not_private=True, max_physical=None,
                         clipping="adaptive", clip_norm=0.1)  # fmt: skip
    train(private, model)
    norms = torch.tensor([float(clipped_sum(model, [i], 1e9).norm()) for i in range(60)]).sort().values
    # the count jumps at a norm: C swings around the median by a step of at most exp(0.2 / 60) at the 30th of them
    assert float(norms[29]) * 0.99 < private.engine.clip_norm < float(norms[30]) * 1.01


def test_counts_that_cost_more_than_the_budget_are_refused():
    with pytest.raises(ValueError, match="raise count_noise_multiplier or batch_size"):
        private_of(linear(), noise_multiplier=None, epsilon=0.5, delta=1e-3, clipping="adaptive",
                   count_noise_multiplier=0.4)  # fmt: skip
    with pytest.raises(ValueError, match="count_noise_multiplier=-1"):
        private_of(linear(), clipping="adaptive", count_noise_multiplier=-1)


def test_abandoned_counts_are_forgotten():
    model = linear()
    private = private_of(model, batch_size=60, max_physical=20, clipping="adaptive", clip_norm=1e6)
    private.step(losses_of(model, next(iter(private.loader))))  # all 20 below the norm
    private.optimizer.zero_grad()
    assert float(private.engine.take_count()) == 0


def test_the_reference_is_the_definition():
    model = linear()
    total = clipped_sum(model, range(7), 0.3)
    losses = losses_of(model, batch_of(range(7)))
    found = private_gradient_reference(losses, list(model.parameters()), clip_norm=0.3, noise_multiplier=1.5,
                                       expected_batch_size=8.0, generator=seeded(5))  # fmt: skip
    found = torch.cat([part.flatten() for part in found])
    torch.testing.assert_close(found, total / 8 + expected_noise(model), rtol=0, atol=1e-7)  # 1e-6 more in a norm


class Sentences:
    """Token ids of uneven length, and a collator for them."""

    def __init__(self, size=40):
        generator = seeded(3)
        lengths = torch.randint(3, 10, (size,), generator=generator).tolist()
        self.rows = [torch.randint(1, 40, (length,), generator=generator) for length in lengths]
        self.lengths = lengths

    @staticmethod
    def collate(rows):
        from transformers import BatchEncoding

        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def language_losses(model, batch):
    """Mean loss over the tokens of a sentence."""
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    target, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    return (losses * mask).sum(1) / mask.sum(1).clamp_min(1)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=41, n_positions=12, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)  # fmt: skip
    return GPT2LMHeadModel(config).train()  # embedding and output layer are tied


@pytest.mark.parametrize("size", [8, 0.5])
def test_a_tied_language_model_trains_in_pieces_of_similar_length(size):
    """Pieces, padding and empty batches change nothing: one big step is the sum of what a loop over records gives."""
    data, model, other = Sentences(), gpt2(), gpt2()
    private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), data.rows, batch_size=size, steps=6,
                           noise_multiplier=0.5, max_physical=3, collate_fn=Sentences.collate, lengths=data.lengths,
                           seed=0)  # fmt: skip
    coins, noise = seeded(derive_seed(0, "coins")), seeded(derive_seed(0, "noise", 0, 0))
    sizes = []
    for batch in private.loader:
        sizes.append(len(private.loader.place))
        private.step(language_losses(model, batch))
    assert max(sizes) <= 3 and (size == 8 or 0 in sizes)
    parameters = list(other.parameters())
    for _ in range(6):
        records = flip_coins(40, size / 40, coins).tolist()
        losses = [language_losses(other, Sentences.collate([data.rows[i]])) for i in records]
        losses = torch.cat(losses) if losses else torch.zeros(0)
        gradient = private_gradient_reference(losses, parameters, clip_norm=0.1, noise_multiplier=0.5,
                                              expected_batch_size=size, generator=noise)  # fmt: skip
        with torch.no_grad():
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter -= part
    for (name, ours), reference in zip(model.named_parameters(), parameters, strict=True):
        # float32, six steps; the engine adds 1e-6 to a norm of order 1
        torch.testing.assert_close(ours, reference, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_autocast_keeps_sums_and_noise_in_float32():
    data, model = Sentences(), gpt2()
    private = make_private(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data.rows, batch_size=8, steps=2,
                           noise_multiplier=0.5, collate_fn=Sentences.collate, seed=0)  # fmt: skip
    kinds = set()
    private.optimizer.register_step_pre_hook(lambda *_: kinds.update(p.grad.dtype for p in model.parameters()))
    for batch in private.loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = language_losses(model, batch)
        private.step(losses)
    assert private.optimizer.steps == 2 and kinds == {torch.float32}


@pytest.mark.gpu
def test_on_a_gpu():
    """Noise from a generator of the GPU, in batches that the loader moves there, without waiting in a step."""
    device = torch.device("cuda")
    state = secure_generator(device).get_state()
    assert int((state != secure_generator(device).get_state()).sum()) >= 6  # of the 8 bytes of the key
    model = nn.Linear(300, 700, bias=False).to(device)
    nn.init.zeros_(model.weight)
    zeros = [(torch.zeros(300), torch.zeros(700)) for _ in range(64)]
    for seed in (None, 0):
        private = make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), zeros, batch_size=16, steps=1,
                               noise_multiplier=0.8, clip_norm=0.5, seed=seed, record=True)  # fmt: skip
        for x, y in private.loader:
            assert x.device.type == "cuda"
            private.optimizer.backward((model(x) - y).square().mean(dim=1))
            before = model.weight.detach().clone()
            torch.cuda.set_sync_debug_mode("error")
            try:
                private.optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found = (model.weight.detach() - before).double() * 16 / (0.8 * 0.5)
            assert abs(float(found.var()) - 1) < 5 * math.sqrt(2 / found.numel())
        found = private.optimizer.records()["noise_norm"][0]
        torch.testing.assert_close(found, 0.025 * math.sqrt(210_000), rtol=0.02, atol=0)
        private.engine.detach()
        nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="parameters on cuda:0, noise generators on cpu"):
        optimizer_of(model, generator=seeded()).step()


@pytest.mark.gpu
def test_split_weights_on_a_gpu():
    """FSDP2 over the GPUs that are there, one process: the same step as whole weights, noise included."""
    import os

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("nccl")
    try:
        ends = []
        for is_split in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 2)).cuda()
            if is_split:
                mesh = init_device_mesh("cuda", (1,))
                fully_shard(model[0], mesh=mesh), fully_shard(model, mesh=mesh)
            data = [tuple(part.float() for part in pair) for pair in DATA]
            private = make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), data, batch_size=12, steps=4,
                                   noise_multiplier=1.0, max_physical=5, clip_norm=0.3, seed=0)  # fmt: skip
            train(private, model)
            whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
            ends.append(torch.cat([part.detach().flatten() for part in whole]))
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)  # float32, four steps
    finally:
        dist.destroy_process_group()
