"""Options and fixtures of every test, and the rule that no test is skipped without a line in SKIPS.md."""

import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("ORAL4_SCALE", "mini")
os.environ.setdefault("MPLBACKEND", "agg")
HERE = Path(__file__).parent
OPTIONAL = {"slow", "gpu", "net"}


def listed_skips() -> dict[str, str]:
    """Test -> reason, from the table of SKIPS.md."""
    rows = re.findall(r"^\| `([^`|]+)` \| ([^|]+) \|", (HERE / "SKIPS.md").read_text(encoding="utf8"), re.M)
    return dict(rows)


def pytest_addoption(parser):
    parser.addoption(
        "--run", action="append", default=[], choices=sorted(OPTIONAL), help="also run the tests so marked"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark in OPTIONAL & {m.name for m in item.iter_markers()} - set(config.getoption("--run")):
            item.add_marker(pytest.mark.skip(reason=f"needs --run {mark}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    name = re.sub(r"\[.*$", "", item.nodeid.removeprefix("tests/"))
    if report.skipped and not hasattr(report, "wasxfail") and name not in listed_skips():
        report.outcome = "failed"
        report.longrepr = f"{name} was skipped, but tests/SKIPS.md has no line for it: a skip needs its reason there"


@pytest.fixture(autouse=True)
def _restore_random_state():
    """Start every test from the same random state, and leave none of its own behind."""
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries still draw from it
    try:
        import torch
    except ImportError:
        yield
        return
    dtype, threads, deterministic = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
