"""Data: official loaders (goldens), windows that are copies, splits, synthetic series, and tables of users."""

from pathlib import Path

import numpy as np
import pytest
import torch

from oral4.pyraformer.data import (
    ett_splits,
    sine_marks,
    sine_mixture,
)

GOLDENS = Path(__file__).parents[1] / "goldens/pyraformer"
ETT = np.load(GOLDENS / "ett_loader.npz")
OTHER = np.load(GOLDENS / "loaders_other.npz")
float64 = torch.float64


def close(found, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=atol)


# ETT


@pytest.mark.parametrize("name", ["ETTh1", "ETTh2"])
@pytest.mark.parametrize(("history", "horizon"), [(168, 168), (336, 720)])
def test_ett_windows_are_the_official_ones(name, history, horizon):
    splits = ett_splits(name, history, horizon)
    close(splits.scaler.mean, ETT[f"{name}/mean"])
    close(splits.scaler.std, ETT[f"{name}/std"])
    size = f"{name}/{history}_{horizon}"
    for part in ("train", "val", "test"):
        data = getattr(splits, part)
        assert len(data) == int(ETT[f"{size}/{part}/len"])
        stored = sorted(
            {int(key.split("/")[3]) for key in ETT.files if key.startswith(f"{size}/{part}/") and key.count("/") == 4}
        )
        assert stored == ([0, 1, len(data) - 1] if history == 168 else [])
        for window in stored:
            for found, field in zip(data.batch([window], float64), ("x", "y", "mx", "my"), strict=True):
                expected = ETT[f"{size}/{part}/{window}/{field}"]
                close(found[0][: len(expected)], expected)


def test_sines_are_the_official_ones():
    x = OTHER["sin/x"]
    close(sine_mixture(x, OTHER["sin/T"], OTHER["sin/A"]), OTHER["sin/y"])
    close(sine_marks(x, 3), OTHER["sin/cov"])
