"""The experiments of the chapter: what they measure is what they say, and their records keep what we promise."""

import dataclasses
import math
import random

import pytest
import torch

from oral4.measure.experiment import find_experiment, list_experiments, run_experiment
from oral4.measure.record import load_record
from oral4.measure.timing import PeakMemory
from oral4.pyraformer import experiment
from oral4.pyraformer.attention import attention_reference
from oral4.pyraformer.experiment import (
    NINE_GRAPHS,
    CostConfig,
    PathsConfig,
    candidates,
    dense_official,
    felt_leaves,
    known_leaves,
    proposition_two,
    time_attention,
)
from oral4.pyraformer.graph import PyramidSpec, dense_mask, path_length

TINY = CostConfig(
    lengths=(64, 128, 256),
    gather_lengths=(64, 128),
    dense_lengths=(64, 128),
    reference_length=128,
    memory_lengths=(128, 256),
    million=256,
    repeats=2,
    min_seconds=0.0,
)
ALWAYS_ZERO = (
    "path_error", "path_error_random", "bound_violations", "pairs_error", "scored_error", "jacobian_mismatches",
)  # fmt: skip


def test_both_are_listed_with_their_scales():
    assert {"pyraformer/cost", "pyraformer/paths"} <= set(list_experiments())
    assert find_experiment("pyraformer/cost").scales() == ("smoke", "mini", "gpu", "paper")
    assert find_experiment("pyraformer/paths").scales() == ("smoke", "mini")


# ---------------------------------------------------------------------------------------- cost


def test_candidates_compute_the_same():
    spec = PyramidSpec(169, (4, 4, 4))
    q, k, v = torch.randn(3, 2, 3, spec.num_nodes, 8, dtype=torch.float64)
    expected = attention_reference(q, k, v, dense_mask(spec))
    found = candidates(spec, q, k, v)
    assert list(found) == ["shift", "gather", "dense", "sdpa"]
    for name, attend in found.items():
        torch.testing.assert_close(attend(), expected, rtol=0, atol=1e-12, msg=name)
    assert list(candidates(spec, q, k, v, dense=False, gather=False)) == ["shift"]


def test_the_rival_is_the_official_formula():
    """Scaled queries, -1e9 where a query may not look, softmax, values; the mask is given."""
    q, k, v = torch.randn(3, 1, 1, 4, 2, dtype=torch.float64)
    banned = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(dense_official(q, k, v, banned), v, rtol=0, atol=0)
    everything = dense_official(q, k, v, torch.ones(4, 4, dtype=torch.bool))  # -1e9 everywhere: all keys weigh the same
    torch.testing.assert_close(everything, v.mean(2, keepdim=True).expand_as(v), rtol=0, atol=1e-15)


def test_each_form_is_timed_where_the_configuration_says(monkeypatch):
    threads = torch.get_num_threads()
    forward, training = time_attention(TINY, 128, seed=0)
    assert set(forward) == set(training) == {"shift", "gather", "dense", "sdpa"}
    assert all(len(timing.seconds) == 2 and timing.clock == "cpu" for timing in [*forward.values(), *training.values()])
    assert set(time_attention(TINY, 256, seed=0)[0]) == {"shift"}
    assert torch.get_num_threads() == threads


def test_cost_reports_what_was_measured(monkeypatch):
    """With the memory of fresh interpreters replaced by known lines: 1000 bytes, and 8 or 20 a step."""
    asked = []

    def peak(target, *, length, repeats=0, training=False, **kwargs):
        asked.append((target, length, training))
        value = {"bytes": 1000 + 8 * length, "seconds": 0.25 if repeats else 0.0}
        return PeakMemory(value=value, resident=1000 + 20 * length, before=0, accelerator=None)

    monkeypatch.setattr(experiment, "peak_memory", peak)
    found = experiment.run_cost(TINY, seed=0)
    assert set(found) == set(find_experiment("pyraformer/cost").units)
    assert (found["bytes_forward"], found["bytes_training"]) == ([8 * 64, 8 * 192], [20 * 64, 20 * 192])
    assert (found["peak_bytes_million"], found["seconds_million"]) == (1000 + 20 * 256, 0.25)
    lengths = {name: len(found[f"seconds_{name}_forward"]) for name in ("dense", "sdpa", "gather", "shift")}
    assert lengths == {"dense": 2, "sdpa": 2, "gather": 2, "shift": 3}
    assert all(found[name] > 0 for name in found if name.startswith("speedup"))
    assert all(target == "oral4.pyraformer.experiment:attend_once" for target, _, _ in asked)
    assert [length for _, length, training in asked if training] == [64, 128, 256], "the smallest pyramid comes first"


def test_cost_needs_its_reference_length():
    with pytest.raises(ValueError, match=r"gather_lengths=.* lacks reference_length=2048"):
        CostConfig(gather_lengths=(512,))


@pytest.mark.parametrize("scale", ["smoke", "mini", "gpu", "paper"])
def test_every_scale_fits_its_pyramids(scale):
    config = getattr(CostConfig, scale)()
    for length in {*config.lengths, *config.memory_lengths, config.million}:
        PyramidSpec(length, config.windows, config.neighbours)
    assert config.lengths[: len(config.dense_lengths)] == config.dense_lengths
    assert config.reference_length in config.dense_lengths
    assert dataclasses.replace(config) == config


# ---------------------------------------------------------------------------------------- paths


def test_proposition_two_on_paper():
    assert [proposition_two(PyramidSpec(g[0], g[2:], g[1])) for g in NINE_GRAPHS] == [7, 8, 8, 8, 8, 7, 21, 69, 6]
    assert proposition_two(PyramidSpec(4, (4,), 1)) == 2
    assert proposition_two(PyramidSpec(8, (4,), 1)) == math.inf


def test_derivatives_are_zero_exactly_where_no_path_leads():
    for spec in (PyramidSpec(50, (3, 2)), PyramidSpec(64, (2, 2), 1), PyramidSpec(23, (2, 3), 7)):
        for layers in (1, 2, 3, 5):
            known = known_leaves(spec, layers)
            assert torch.equal(felt_leaves(spec, layers, seed=layers), known)
            assert known.shape == (spec.sizes[-1], spec.length)
    assert not known_leaves(PyramidSpec(50, (3, 2)), 1).any(), "the top is two hops from any leaf"


def test_summaries_bring_what_lemma_one_promises():
    enough, too_few = PyramidSpec(96, (4, 4)), PyramidSpec(160, (4, 4))
    for spec, layers in ((enough, 5), (too_few, 5)):
        everywhere = bool(felt_leaves(spec, layers, seed=0, summaries=True).all())
        assert everywhere == spec.receptive_field_ok(layers) == (spec is enough)
        assert not felt_leaves(spec, layers, seed=0).all(), "hops alone need the climb as well"


def test_random_pyramids_vary():
    draw = random.Random(0)
    drawn = [experiment._draw_spec(draw, 50) for _ in range(200)]
    assert {spec.num_scales for spec in drawn} >= {1, 2, 3, 4} and {spec.neighbours for spec in drawn} == {1, 3, 5, 7}
    assert any(math.isinf(path_length(spec)) for spec in drawn)


def test_paths_run_at_smoke_scale():
    record = run_experiment("pyraformer/paths", "smoke", seeds=2)
    for metric in ALWAYS_ZERO:
        assert record[metric].values == (0, 0), metric
    assert record["path"].mean == (7, 8)
    assert record["reach"].mean == pytest.approx((1.0, 192 / 337))
    assert record["reach_summaries"].mean == (1.0,) and record["reach_summaries_least"].mean == 1.0


def test_a_wrong_formula_would_show(monkeypatch):
    monkeypatch.setattr(experiment, "proposition_two", lambda spec: 6)
    monkeypatch.setattr(PyramidSpec, "num_edges", lambda spec: 1000)
    found = experiment.run_paths(PathsConfig.smoke(), 0)
    assert found["path_error"] == 2 and found["pairs_error"] > 0 and found["scored_error"] > 0
    assert found["bound_violations"] > 0
    assert experiment._difference(math.inf, 3) == 1e6 and experiment._difference(math.inf, math.inf) == 0


# ---------------------------------------------------------------------------------------- records


def test_recorded_paths():
    record = load_record("pyraformer/paths-mini")
    assert len(record.seeds) == 3
    for metric in ALWAYS_ZERO:
        assert set(record[metric].values) == {0}, metric
    assert record.config["graphs"] == [list(graph) for graph in PathsConfig.mini().graphs]


@pytest.mark.parametrize(
    ("metric", "low", "high"),
    [
        # what this library promises of its portable form at L = 2,048, on one thread
        ("speedup_dense_forward", 70, math.inf),
        ("speedup_dense_training", 40, math.inf),
        ("speedup_sdpa_forward", 25, math.inf),
        ("speedup_gather_forward", 1, math.inf),
        ("memory_slope", 0.8, 1.1),
        ("memory_slope_training", 0.8, 1.1),
        ("time_slope", 0.7, 1.3),
        ("time_slope_dense", 1.7, 2.6),
        ("peak_bytes_million", 1.5e9, 3.5e9),
    ],
)
def test_recorded_cost_keeps_its_promises(metric, low, high):
    record = load_record("pyraformer/cost-mini")
    assert len(record.seeds) == 3 and record.config["reference_length"] == 2048 and record.config["threads"] == 1
    assert low <= record[metric].mean <= high
