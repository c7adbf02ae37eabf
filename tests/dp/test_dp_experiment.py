"""The chapter's register: every experiment runs at smoke without data, and what it measures is what it declares."""

import dataclasses
import json
import math

import pytest

from oral4.dp import experiment, speed
from oral4.errors import OralError
from oral4.measure.experiment import list_experiments, run_experiment
from oral4.measure.record import Record, list_records, load_record
from oral4.measure.timing import Timing

BY_NAME = {entry.name: entry for entry in experiment.EXPERIMENTS}


def test_the_register_is_readable_without_importing_it():
    listed = {name: words for name, words in list_experiments().items() if name.startswith("dp/")}
    assert listed == {entry.name: entry.summary for entry in experiment.EXPERIMENTS}
    assert len(listed) == 12


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_scale_can_be_configured(name):
    entry = BY_NAME[name]
    assert {"smoke", "mini"} <= set(entry.scales())
    for scale in entry.scales():
        config = entry.configure(scale)
        hash(config)  # choices are kept by it
    smoke, mini = entry.configure("smoke"), entry.configure("mini")
    assert smoke != mini


@pytest.mark.parametrize("name", ["dp/geometry", "dp/cost", "dp/cost_gpu", "dp/trap"])
def test_the_quick_ones_make_a_record(name, monkeypatch):
    monkeypatch.setenv("ORAL4_OFFLINE", "1")
    record = run_experiment(name, "smoke", seeds=1)
    assert isinstance(record, Record)
    assert set(record.metrics) == set(BY_NAME[name].units)
    for metric in record.metrics:
        (value,) = record.values[metric]
        assert all(math.isfinite(number) for number in (value if isinstance(value, tuple) else (value,))), metric


FEW_SEEDS = {"dp/cost_gpu-gpu": 1}  # a GPU was at hand for minutes; its page and its claims say so
UNREAD = {"dp/batch": {"rates", "ordinary_rates"}}  # it has a grid of its own


@pytest.mark.parametrize("kept", [name for name in list_records() if name.startswith("dp/")])
def test_a_kept_record_is_of_the_scale_as_it_stands(kept):
    """Otherwise `oral4 run` would not repeat what the book prints."""
    name, _, scale = kept.rpartition("-")
    record, config = load_record(kept), BY_NAME[name].configure(scale)
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    then = json.loads(json.dumps(record.config))
    assert set(then) == set(now)
    assert {field for field in then if then[field] != now[field]} <= UNREAD.get(name, set())
    assert len(record.seeds) >= FEW_SEEDS.get(kept, 3)
    assert not record.dirty


def test_a_cost_is_the_median_of_ratios_within_a_round():
    own, plain = Timing((2.0, 30.0, 4.0), "cpu"), Timing((1.0, 10.0, 4.0), "cpu")
    assert experiment._median_ratio(own, plain) == 2.0


def test_costs_are_named_by_case_and_method(monkeypatch):
    monkeypatch.setattr(
        speed, "times", lambda case, methods, **options: {m: Timing((1.0 + i,), "cpu") for i, m in enumerate(methods)}
    )
    growth = {"non-private": 100, "ours": 150, "ours-two-pass": 120}
    monkeypatch.setattr(speed, "memory_growth", lambda case, method: growth[method])
    found = experiment.run_cost(experiment.CostConfig(), 0)
    assert set(found) == set(experiment.cost_units(experiment.OWN_METHODS))
    assert found["s8_non_private_seconds"] == 1.0
    assert found["worst_ours_time"] == 2.0
    assert found["worst_ours_two_pass_time"] == 3.0
    assert found["distil_ours_memory"] == 1.5


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OralError, match="pip install opacus"):
        experiment.run_cost_peers(experiment.CostConfig.smoke(), 0)


def test_the_peers_are_measured_where_they_are_installed():
    pytest.importorskip("opacus")
    found = experiment.run_cost_peers(experiment.CostConfig.smoke(), 0)
    assert set(found) == set(BY_NAME["dp/cost_peers"].units)
    assert all(found[f"{case}_opacus_ghost_time"] > 0 for case in experiment.CASES)
