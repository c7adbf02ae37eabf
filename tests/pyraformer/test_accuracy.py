"""The experiments on accuracy: what they count is exact, what they train runs, and what they return fits together."""

import dataclasses

import numpy as np
import pytest
import torch

from oral4.errors import DataError
from oral4.measure.experiment import find_experiment
from oral4.pyraformer import accuracy
from oral4.pyraformer.accuracy import (
    ARMS,
    REPORTED,
    AblationConfig,
    AccuracyConfig,
    OneStepExperiment,
    SinesConfig,
    SizesConfig,
    floors,
    run_ablation,
    run_accuracy,
    run_one_step,
    run_sines,
    run_sizes,
    sine_splits,
)
from oral4.pyraformer.data import ett_splits, load_ett, load_pjm

# the official settings: parameters of the official modules, and edges x layers x heads, counted on the official code
SIZES = {
    "ETTh1-168": (11_155_712, 26_472), "ETTh1-336": (13_564_160, 26_472), "ETTh1-720": (19_069_184, 74_280),
    "ETTm1-96": (3_420_288, 57_264), "ETTm1-288": (4_796_544, 139_968), "ETTm1-672": (7_561_344, 96_384),
    "Electricity-168": (4_722_944, 26_472), "Electricity-336": (4_894_976, 26_472),
    "Electricity-720": (5_337_344, 49_992), "synthetic-720": (2_988_416, 63_088),
    "Electricity-1": (6_644_992, 17_648), "Wind-1": (6_644_992, 20_176),
    "AppFlow-1": (6_644_992, 20_176),
}  # fmt: skip


@pytest.fixture(scope="module")
def ett():
    try:
        return load_ett("ETTh1"), load_ett("ETTh2")
    except DataError:
        pytest.skip("ETTh1 and ETTh2 are not at hand")


@pytest.fixture(scope="module")
def pjm():
    try:
        return load_pjm(("PJME",))
    except DataError:
        pytest.skip("the PJM files are not at hand")


def test_sizes_are_the_official_ones():
    found = run_sizes(SizesConfig(), seed=0)
    counted = zip(found["parameters"], found["pairs"], strict=True)
    assert dict(zip(SizesConfig().settings, counted, strict=True)) == SIZES
    assert (found["bottleneck_parameters"], found["conv_parameters"]) == (328_704, 3_147_264)
    assert found["saving"] == 1 - 328_704 / 3_147_264
    assert run_sizes(SizesConfig(), seed=1) == found  # nothing is random


@pytest.mark.parametrize("name", ["accuracy", "sizes", "ablation", "one_step", "sines"])
def test_scales_are_there_and_grow(name):
    experiment = find_experiment(f"pyraformer/{name}")
    assert {"smoke", "mini"} <= set(experiment.scales())
    for scale in experiment.scales():
        experiment.configure(scale)


def test_sines_run_and_the_ratios_are_ratios():
    config = dataclasses.replace(SinesConfig.smoke(), updates=2)
    found = run_sines(config, seed=0)
    assert set(found) == set(find_experiment("pyraformer/sines").units)
    for arm, ratio in (("equal", "equal_to_matched"), ("window", "window_to_matched"), ("full", "full_to_matched")):
        assert found[ratio] == found[f"mse_{arm}"] / found["mse_matched"]
    again = run_sines(config, seed=0)
    assert again == found
    assert run_sines(dataclasses.replace(config, updates=1), seed=1) != found


def test_a_linear_map_leaves_little_more_than_the_noise_of_sines():
    config = dataclasses.replace(SinesConfig(), updates=1)
    splits = sine_splits(config, seed=0)
    ridge = accuracy.RidgeNLinear(config.history, config.horizon, 1.0).fit(splits.train.series)
    score = accuracy.score_windows(ridge.predict, splits.test.series, config.history, config.horizon, stride=96)
    assert 0.9 < 100 * score.mse < 1.5  # the noise has variance 1, in units of 10 on the data


def test_parts_of_the_sines_do_not_share_targets():
    config = SinesConfig()
    splits = sine_splits(config, seed=0)
    ends = {}
    for part, low, high in (("train", 0, 2800), ("val", 2800 - 360, 3200 + 360), ("test", 3200 - 360, 4000)):
        windows = getattr(splits, part)
        assert windows.series[0].shape[0] == high - low
        firsts = low + windows.start_of + config.history
        ends[part] = (firsts.min(), firsts.max() + config.horizon)
    assert ends["train"][1] <= 2800 <= ends["val"][0]  # no target of training in validation
    assert ends["test"][0] == 3200 and ends["test"][1] <= 4000
    assert splits.train.batch([0])[2].shape[-1] == 4  # three marks and the id


def test_floors_are_those_of_the_table(ett):
    found = floors(ett_splits("ETTh1", 168, 168))
    # three decimals of the table of baselines, which tests/pyraformer/test_baselines.py derives independently
    assert {name: (round(s.mse, 3), round(s.mae, 3)) for name, s in found.items()} == {
        "ridge": (0.414, 0.412),
        "seasonal_naive": (0.571, 0.462),
        "daily_profile": (0.437, 0.418),
    }


def test_accuracy_runs_and_fits_together(ett):
    config = dataclasses.replace(AccuracyConfig.smoke(), updates=2, updates_modern=2)
    found = run_accuracy(config, seed=0)
    assert set(found) == set(find_experiment("pyraformer/accuracy").units)
    assert found["mse_faithful_first"] == found["mse_faithful"][0] and len(found["mse_modern"]) == 1
    assert found["faithful_to_paper"] == pytest.approx(found["mse_faithful"][0] / REPORTED[168][0], rel=1e-12)
    worst = max(found["mse_modern"][0] / found["mse_ridge"][0], found["mae_modern"][0] / found["mae_ridge"][0])
    assert found["modern_to_ridge_worst"] == pytest.approx(worst, rel=1e-12)
    assert found["faithful_to_naive"] > 1  # two updates do not beat yesterday
    again = run_accuracy(config, seed=0)
    for key in ("mse_faithful", "mse_modern", "mse_free", "step_modern"):
        assert again[key] == found[key]  # the same seed, the same numbers


def test_the_official_protocol_is_used_at_the_scale_of_the_paper():
    paper = AccuracyConfig.paper()
    assert paper.official_protocol and paper.full_size and paper.cells() == [
        ("ETTh1", 168, 168), ("ETTh1", 168, 336), ("ETTh1", 336, 720),
    ]  # fmt: skip
    config = accuracy._faithful_config(paper, 336, 720)
    assert (config.d_model, config.neighbours, config.windows) == (512, 5, (4, 4, 4))


def test_ablation_runs_and_changes_one_thing_at_a_time(ett):
    config = dataclasses.replace(AblationConfig.smoke(), updates=2)
    found = run_ablation(config, seed=0)
    assert set(found) == set(find_experiment("pyraformer/ablation").units)
    assert found["ratio"][0] == 1 and found["ratio_window"] == found["ratio"][1]
    assert found["ratio_none"] == 1.0  # an arm that was not run counts as no change
    base = accuracy.small_config(168, 168)
    for arm, changes in ARMS.items():
        if arm != "base":
            changed = dataclasses.replace(base, **changes)
            differing = [f.name for f in dataclasses.fields(base) if getattr(base, f.name) != getattr(changed, f.name)]
            assert differing == list(changes), arm


def test_one_step_runs_and_fits_together(pjm):
    config = dataclasses.replace(OneStepExperiment.smoke(), windows_per_epoch=8, epochs=1)
    found = run_one_step(config, seed=0)
    assert set(found) == set(find_experiment("pyraformer/one_step").units)
    assert found["nrmse_modern_to_ridge"] == found["nrmse_modern"] / found["nrmse_ridge"]
    assert found["nrmse_modern_to_ridge"] == pytest.approx(1, abs=0.2)  # it starts as the ridge
    assert found["nrmse_naive"] > found["nrmse_ridge"]
    assert all(np.isfinite(list(found.values())))


def test_global_randomness_is_left_alone(ett):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run_ablation(dataclasses.replace(AblationConfig.smoke(), arms=("base",), updates=1), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
