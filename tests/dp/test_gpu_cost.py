"""The experiment on a GPU, as far as a CPU can tell: its cases, the search for the largest batch, its sums."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oral4.dp import gpu_cost
from oral4.dp.speed import build, draw_ids, losses_of
from oral4.measure.timing import Timing


@given(
    base=st.integers(0, 200), slope=st.integers(1, 50), limit=st.integers(1, 20_000), lost=st.floats(0, 3),
)  # fmt: skip
def test_the_search_finds_the_largest_batch_in_few_trials(base, slope, limit, lost):
    """Peaks grow linearly; ``lost`` texts' worth of memory cannot be used, since it is in pieces."""
    tried = []

    def peak(batch):
        tried.append(batch)
        used = base + slope * batch
        return used if used + lost * slope <= limit else None

    found = gpu_cost._largest_that_fits(peak, limit)
    fitting = (batch for batch in range(1, limit // slope + 2) if base + slope * batch + lost * slope <= limit)
    true = max(fitting, default=0)
    assert true * 0.98 - 1 <= found <= true
    assert len(tried) <= 25 and len(set(tried)) == len(tried)


def test_a_batch_has_the_asked_number_of_tokens():
    for model in gpu_cost.GPU_MODELS:
        for length in gpu_cost.GPU_LENGTHS:
            case = gpu_cost.gpu_case(model, length, tokens=8192)
            assert 8192 - length < case.batch * case.length <= 8192
    with pytest.raises(ValueError, match="'gpt3' is unknown; give one of tiny, gpt2"):
        gpu_cost.gpu_case("gpt3", 100, tokens=8192)
    with pytest.raises(ValueError, match="length=1: give 2 to tokens=64"):
        gpu_cost.gpu_case("gpt2", 1, tokens=64)


def test_published_sizes():
    """Parameters as published: 124, 355 and 774 million; 355 with the classifier's layer."""
    for model, millions in (("gpt2", 124), ("gpt2_medium", 355), ("gpt2_large", 774), ("roberta_large", 356)):
        case = gpu_cost.gpu_case(model, 1024 if model.startswith("gpt2") else 512, tokens=1024, half=False)
        network, _ = build(case, device="meta")
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == pytest.approx(millions, abs=1), model


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_half_precision_is_that_of_autocast(kind):
    case = gpu_cost.Case("x", 1, 16, 2, 40, 3, 9, kind=kind, half=True)
    model, ids = build(case)
    losses = losses_of(model, ids)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.model(input_ids=ids).logits.float()
    if kind == "roberta":
        wanted = torch.nn.functional.cross_entropy(logits, ids[:, 0] % 2, reduction="none")
    else:
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)
    assert int(draw_ids(case, 500).min()) == (0 if kind == "gpt2" else 4)


def test_what_is_summed_up(monkeypatch):
    seconds = {"tiny": 2.0, "gpt2": 4.0}
    factors = {8: 1.1, 16: 1.3}

    def times(case, methods, **options):
        assert methods[0] == "non-private"
        own = seconds[case.name] * (1.9 if methods[1] == "official-two-pass" else factors[case.length])
        return {methods[0]: Timing((seconds[case.name],) * 2, "wall"), methods[1]: Timing((own,) * 2, "wall")}

    fits = {"ours": 19, "non-private": 20}
    asked = []

    def largest(case, method, *, limit, device):
        asked.append((case.name, case.length, method))
        assert limit == 2 * 2**30
        return fits[method]

    monkeypatch.setattr(gpu_cost, "times", times)
    monkeypatch.setattr(gpu_cost, "largest_batch", largest)
    gpu_cost._fits.cache_clear()
    config = gpu_cost.GpuCostConfig(
        models=("tiny", "gpt2"), lengths=(8, 16), tokens=(64, 64), peer_length=8, memory=2.0, device="cpu"
    )
    found = [gpu_cost.run_gpu_cost(config, seed) for seed in (0, 1)][1]
    gpu_cost._fits.cache_clear()
    assert set(found) == set(gpu_cost.GPU_COST_UNITS)
    assert found["model"] == [0.0, 0.0, 1.0, 1.0] and found["length"] == [8.0, 16.0, 8.0, 16.0]
    assert found["time"] == pytest.approx([1.1, 1.3, 1.1, 1.3]) and found["worst_time"] == pytest.approx(1.3)
    assert found["mean_time"] == pytest.approx(math.sqrt(1.1 * 1.3))
    assert found["peer_time"] == pytest.approx([1.9, 1.9]) and found["least_room"] == 0.95
    assert len(asked) == len(set(asked)) == 8  # once for both seeds


def test_what_cannot_be_run_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU here"):
        gpu_cost.run_gpu_cost(gpu_cost.GpuCostConfig.gpu(), 0)
    with pytest.raises(ValueError, match="give as many tokens of a batch as models"):
        gpu_cost.run_gpu_cost(gpu_cost.GpuCostConfig(models=("tiny",), device="cpu"), 0)
