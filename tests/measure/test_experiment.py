from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

import oral4.measure.experiment as module
from oral4.errors import DataError, OralError
from oral4.measure.experiment import (
    Comparison,
    Experiment,
    find_experiment,
    list_experiments,
    run_experiment,
    verify,
)
from oral4.measure.intervals import mean_interval
from oral4.measure.record import read_record


@dataclass(frozen=True, kw_only=True)
class Window:
    sizes: tuple[int, ...] = (4, 4)


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    lr: float = 1e-3
    steps: int = 10
    bias: bool = False
    name: str = "toy"
    lengths: tuple[int, ...] = (96, 192)
    shape: tuple[int, float] = (2, 0.5)
    dropout: float | None = None
    backend: Literal["fused", "reference"] = "fused"
    window: Window = dataclasses.field(default_factory=Window)

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} is below 0")

    @classmethod
    def smoke(cls):
        return cls(steps=1)

    @classmethod
    def mini(cls):
        return cls()


def run_toy(config: ToyConfig, seed: int):
    curve = np.arange(len(config.lengths), dtype=np.float32) + seed
    return {"loss": np.float32(config.steps * 0.5 + seed), "curve": curve, "count": np.int64(7)}


TOY = Experiment(
    name="toy/linear",
    summary="A toy",
    config=ToyConfig,
    run=run_toy,
    units={"loss": "nats", "curve": "", "count": ""},
    tolerance={"loss": 0.01, "count": 0.0},
    better={"loss": "lower"},
)


@pytest.fixture
def toy(monkeypatch):
    """Make ``toy/linear`` findable by name, as the chapters' experiments are."""
    monkeypatch.setattr(module, "find_experiment", {"toy/linear": TOY}.__getitem__)
    return TOY


def test_one_value_a_seed_in_pythons_own_types(toy):
    record = run_experiment("toy/linear", "mini", seeds=3)
    assert record.name == "toy/linear-mini"
    assert record.seeds == (0, 1, 2)
    assert record.values == {"loss": (5.0, 6.0, 7.0), "curve": ((0.0, 1.0), (1.0, 2.0), (2.0, 3.0)), "count": (7, 7, 7)}
    assert type(record.values["loss"][0]) is float and type(record.values["count"][0]) is int
    assert (record["loss"].mean, record["loss"].low, record["loss"].high) == mean_interval([5, 6, 7])
    assert record["loss"].unit == "nats"
    assert record.tolerance == {"loss": 0.01, "count": 0.0, "curve": None}
    assert record.config["lengths"] == [96, 192] and record.config["window"] == {"sizes": [4, 4]}


def test_what_it_ran_on_is_kept(toy):
    record = run_experiment("toy/linear", "mini", seeds=1)
    assert "core" in record.device
    assert record.wall_seconds >= 0
    assert record.peak_memory_bytes is None or 5e6 < record.peak_memory_bytes < 1e11
    assert {"python", "oral4", "numpy"} <= set(record.versions)
    assert record.date.endswith("+00:00")


def test_scale_comes_from_the_environment(toy, monkeypatch):
    monkeypatch.setenv("ORAL4_SCALE", "smoke")
    assert run_experiment("toy/linear", seeds=1).scale == "smoke"
    monkeypatch.delenv("ORAL4_SCALE")
    assert run_experiment("toy/linear", seeds=1).scale == "mini"


def test_progress_names_every_seed(toy):
    lines: list[str] = []
    run_experiment("toy/linear", "mini", seeds=2, first_seed=5, progress=lines.append)
    assert lines == ["toy/linear at scale mini, seed 5 (1 of 2)", "toy/linear at scale mini, seed 6 (2 of 2)"]


@pytest.mark.parametrize(("seeds", "first"), [(0, 0), (-1, 0), (1, -1)])
def test_refuses_no_seeds(toy, seeds, first):
    with pytest.raises(ValueError, match="at least one seed"):
        run_experiment("toy/linear", "mini", seeds=seeds, first_seed=first)


def test_a_scale_it_lacks():
    with pytest.raises(ValueError, match="toy/linear has no scale 'paper'; it has smoke, mini"):
        TOY.configure("paper")
    with pytest.raises(ValueError, match="scale='large' is unknown; choose one of smoke, mini, gpu, paper"):
        TOY.configure("large")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "1e-4", 1e-4),
        ("steps", "20", 20),
        ("bias", "true", True),
        ("bias", "No", False),
        ("name", "1", "1"),
        ("lengths", "4,4,8", (4, 4, 8)),
        ("lengths", "(4, 4)", (4, 4)),
        ("lengths", "7,", (7,)),
        ("lengths", "", ()),
        ("shape", "3,0.25", (3, 0.25)),
        ("dropout", "0.1", 0.1),
        ("dropout", "none", None),
        ("backend", "reference", "reference"),
    ],
)
def test_a_setting_is_read_by_its_type(key, text, value):
    found = getattr(TOY.configure("mini", {key: text}), key)
    assert found == value and type(found) is type(value)


def test_a_setting_that_is_no_text_is_taken_as_it_is():
    assert TOY.configure("mini", {"lengths": (1, 2)}).lengths == (1, 2)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("steps", "1.5", "steps='1.5' is not a whole number"),
        ("lr", "fast", "lr='fast' is not a number"),
        ("bias", "maybe", "bias='maybe' is not true or false"),
        ("lengths", "4,x", "lengths='4,x' is not comma-separated values"),
        ("shape", "4", "shape='4' is not 2 comma-separated values"),
        ("dropout", "much", "dropout='much' is not a number or none"),
        ("backend", "slow", "backend='slow' is not fused or reference"),
        ("window", "4", "window='4' is not Window"),
        ("steps", "-1", "steps=-1 is below 0"),
    ],
)
def test_a_setting_that_cannot_be_read(key, text, words):
    with pytest.raises(ValueError, match=words):
        TOY.configure("mini", {key: text})


def test_an_unknown_setting_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no setting 'step', did you mean steps\? It has lr \(a number\), steps"):
        TOY.configure("mini", {"step": "3"})


def test_overrides_are_kept_and_in_the_command(toy):
    record = run_experiment("toy/linear", "mini", seeds=1, overrides={"steps": "20", "lengths": "4,8"})
    assert record.values["loss"] == (10.0,)
    assert record.config["lengths"] == [4, 8]
    assert record.command() == "oral4 run toy/linear --scale mini --set steps=20 --set lengths=4,8 --seeds 1"


def test_metrics_must_be_the_declared_ones():
    odd = dataclasses.replace(TOY, run=lambda config, seed: {"loss": 1.0, "speed": 2.0})
    with pytest.raises(ValueError, match="toy/linear: count, curve, speed is only in"):
        run_experiment(odd, "mini", seeds=1)


def test_a_value_that_is_not_finite_is_refused_at_its_seed():
    odd = dataclasses.replace(TOY, run=lambda config, seed: {"loss": float("nan"), "curve": [1.0], "count": 1})
    with pytest.raises(ValueError, match="toy/linear: loss: nan is not finite"):
        run_experiment(odd, "mini", seeds=3)


def test_parts_of_an_experiment_must_fit_before_it_runs():
    with pytest.raises(ValueError, match="speed, which has no unit"):
        dataclasses.replace(TOY, tolerance={"speed": 0.1})
    with pytest.raises(ValueError, match="not of the form chapter/name"):
        dataclasses.replace(TOY, name="toy")


def test_a_repetition_agrees(toy, tmp_path):
    record = read_record(run_experiment("toy/linear", "mini", seeds=2).save(tmp_path / "r.json"))
    compared = {comparison.metric: comparison for comparison in verify(record)}
    assert compared["loss"].agrees is True and compared["loss"].deviation == 0
    assert compared["count"].agrees is True
    assert compared["curve"].agrees is None
    assert [comparison.stored for comparison in verify(record, seed=1) if comparison.metric == "loss"] == [6.0]


def test_a_repetition_uses_the_stored_settings_in_their_types(monkeypatch, tmp_path):
    seen = []

    def run(config, seed):
        seen.append(config)
        return run_toy(config, seed)

    watched = dataclasses.replace(TOY, run=run)
    monkeypatch.setattr(module, "find_experiment", {"toy/linear": watched}.__getitem__)
    record = run_experiment(watched, "smoke", 1, {"lengths": "4,8", "dropout": "0.5"})
    verify(read_record(record.save(tmp_path / "r.json")))
    assert seen[0] == seen[1]
    assert seen[1].window == Window() and seen[1].shape == (2, 0.5)


@pytest.mark.parametrize(("factor", "agrees"), [(1.009, True), (1.011, False), (0.991, True), (0.989, False)])
def test_a_repetition_is_judged_on_both_sides(toy, factor, agrees):
    record = run_experiment("toy/linear", "mini", seeds=1)
    moved = dataclasses.replace(record, values={**record.values, "loss": (5.0 / factor,)})
    assert {c.metric: c.agrees for c in verify(moved)}["loss"] is agrees


def test_comparison_element_by_element():
    assert Comparison("m", (1.0, 2.0), (1.0, 2.1), 0.1).deviation == pytest.approx(0.05)
    assert Comparison("m", (1.0, 2.0), (1.0,), 0.1).agrees is False
    assert Comparison("m", (1.0,), 1.0, 0.1).agrees is False
    assert Comparison("m", 0.0, 1e-9, 0.1).agrees is False  # nothing is relative to zero
    assert Comparison("m", 0.0, 0.0, 0.0).agrees is True


def test_verify_refuses(toy):
    record = run_experiment("toy/linear", "mini", seeds=2)
    with pytest.raises(ValueError, match="seed 7 is not one of toy/linear-mini; it has 0, 1"):
        verify(record, seed=7)
    with pytest.raises(DataError, match="setting colour is only in the record or only in ToyConfig"):
        verify(dataclasses.replace(record, config={**record.config, "colour": "red"}))
    with pytest.raises(DataError, match="no longer fit ToyConfig: steps=-4"):
        verify(dataclasses.replace(record, config={**record.config, "steps": -4}))
    fewer = {key: value for key, value in record.values.items() if key != "curve"}
    units = {key: record.units[key] for key in fewer}
    with pytest.raises(DataError, match="curve is only in the record or only in the experiment"):
        verify(dataclasses.replace(record, values=fewer, units=units, tolerance={}))


def test_list_and_modules_say_the_same():
    listed = list_experiments()
    assert "library/startup" in listed
    for name, summary in listed.items():
        experiment = find_experiment(name)
        assert (experiment.name, experiment.summary) == (name, summary)
        assert "smoke" in experiment.scales() and "mini" in experiment.scales()
    chapters = {name.partition("/")[0] for name in listed} - {"library"}
    for chapter in chapters:
        exported = __import__(f"oral4.{chapter}.experiment", fromlist=["EXPERIMENTS"]).EXPERIMENTS
        assert {e.name for e in exported} == {name for name in listed if name.startswith(f"{chapter}/")}


def test_listing_imports_no_experiment():
    code = "import sys; from oral4.measure.experiment import list_experiments as f; f(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'oral4.measure.experiment'" in loaded
    assert "'torch'" not in loaded and "'numpy'" not in loaded and "'oral4.measure.startup'" not in loaded


def test_an_unknown_experiment_lists_close_names():
    with pytest.raises(OralError, match=r"no experiment 'library/startupp'; there is library/startup$"):
        find_experiment("library/startupp")
    with pytest.raises(OralError, match=r"there is .*library/startup"):
        find_experiment("nothing like it")


@pytest.mark.parametrize("name", sorted(list_experiments()))
def test_every_experiment_runs_at_smoke(name):
    if name == "diffvc/official_speed" and not os.environ.get("ORAL4_OFFICIAL_DIFFVC"):
        with pytest.raises(DataError, match="ORAL4_OFFICIAL_DIFFVC"):  # it needs a clone of somebody's repository
            run_experiment(name, "smoke", seeds=1)
        return
    record = run_experiment(name, "smoke", seeds=1)
    assert record.scale == "smoke" and set(record.metrics) == set(find_experiment(name).units)


def test_weights_are_written_by_the_first_seed_only(tmp_path):
    asked = []

    def train(config, seed, *, weights):
        asked.append((seed, weights))
        return {"loss": 1.0}

    toy = Experiment(name="toy/train", summary="", config=ToyConfig, run=train, units={"loss": ""}, weights="toy")
    run_experiment(toy, "mini", 2, first_seed=4, weights=tmp_path / "toy.safetensors")
    assert asked == [(4, tmp_path / "toy.safetensors"), (5, None)]


def test_weights_are_asked_only_of_what_trains_some(toy, tmp_path):
    with pytest.raises(ValueError, match=r"trains no weights to keep; leave out --weights"):
        run_experiment(toy, "mini", 1, weights=tmp_path / "toy.safetensors")
