from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import oral4.measure.timing as module
from oral4.errors import OralError
from oral4.measure.timing import Timing, compare, peak_memory, peak_rss, timeit

MEGABYTE = 2**20


class Clock:
    """A clock that moves only when told, so that what is measured is known exactly."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setitem(module.CLOCKS, "cpu", lambda: self.now)

    def work(self, seconds):
        def fn():
            self.now += seconds

        return fn


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_every_repeat_is_kept(clock):
    durations = iter([9.0, 1.0, 3.0, 2.0])  # the first is the warm-up

    def fn():
        clock.now += next(durations)

    timing = timeit(fn, repeats=3, warmup=1)
    assert timing == Timing((1.0, 3.0, 2.0), "cpu")
    assert (timing.median, timing.best) == (2.0, 1.0)
    assert timing.spread == pytest.approx(0.5)  # quartiles 1.5 and 2.5 around 2


def test_as_dict_and_one_repeat(clock):
    assert timeit(clock.work(2.0), repeats=1).as_dict() == {
        "seconds": [2.0],
        "clock": "cpu",
        "median": 2.0,
        "best": 2.0,
        "spread": 0.0,
    }


def test_short_calls_are_repeated_until_they_last(clock):
    count = 0

    def fn():
        nonlocal count
        count += 1
        clock.now += 0.001

    timing = timeit(fn, repeats=2, warmup=0, min_seconds=0.5)
    assert timing.seconds == pytest.approx((0.001, 0.001))  # a single call, whatever the number of calls
    assert count >= 1000


def test_min_seconds_ends_where_the_clock_hardly_ticks(clock):
    calls = 0

    def fn():
        nonlocal calls
        calls += 1
        clock.now += 0.016 if calls % 1000 == 0 else 0.0

    assert timeit(fn, repeats=1, min_seconds=0.05).median == pytest.approx(0.016 / 1000, rel=0.5)  # ticks of 16 ms


def test_candidates_take_turns():
    order = []
    compare({name: lambda name=name: order.append(name) for name in "abc"}, repeats=4, warmup=0)
    assert "".join(order) == "abcbcacababc"


def test_warm_up_comes_before_all_and_is_not_counted(clock):
    order = []

    def fn(name, seconds):
        def call():
            order.append(name)
            clock.now += seconds

        return call

    times = compare({"a": fn("a", 1.0), "b": fn("b", 2.0)}, 2, warmup=2)
    assert "".join(order) == "aabbabba"
    assert times == {"a": Timing((1.0, 1.0), "cpu"), "b": Timing((2.0, 2.0), "cpu")}


def test_drift_hits_both_candidates_alike(clock):
    """A machine that slows down steadily: measured one after the other the equal candidates would differ by 2."""
    speed = iter(range(1, 100))

    def fn():
        clock.now += next(speed)

    times = compare({"first": fn, "second": fn}, repeats=20, warmup=0)
    ratio = times["first"].median / times["second"].median
    assert ratio == pytest.approx(1.0, abs=0.1)  # within one step of the drift


def test_cpu_clock_does_not_count_sleep():
    def sleep():
        time.sleep(0.05)

    assert timeit(sleep, repeats=1, warmup=0).median < 0.04
    assert timeit(sleep, repeats=1, warmup=0, clock="wall").median >= 0.05


def test_wall_clock_against_another_clock():
    start = time.monotonic()
    timing = timeit(lambda: time.sleep(0.02), repeats=3, warmup=0, clock="wall")
    passed = time.monotonic() - start
    assert 0.06 <= sum(timing.seconds) <= passed


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_as_before(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        seen = []
        timeit(lambda: seen.append(gc.isenabled()), repeats=1)
        with pytest.raises(ZeroDivisionError):
            timeit(lambda: 1 // 0)
        assert seen == [False, False]
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeats": 0}, "repeats=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"min_seconds": -1}, "min_seconds=-1"),
        ({"min_seconds": float("inf")}, "min_seconds=inf"),
        ({"clock": "sun"}, "clock='sun' is unknown; choose cpu or wall"),
        ({"sync": "cuda"}, "the cpu clock does not see the work of cuda"),
        ({"sync": "tpu", "clock": "wall"}, "sync='tpu' is unknown"),
    ],
)
def test_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        timeit(lambda: None, **options)


def test_refuses_no_candidates():
    with pytest.raises(ValueError, match="no candidates"):
        compare({})


def fake_torch(log):
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: True, synchronize=lambda device=None: log.append(device)
        ),
        mps=SimpleNamespace(synchronize=lambda: log.append("mps")),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
    )


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    log: list = []
    monkeypatch.setitem(sys.modules, "torch", fake_torch(log))
    timeit(lambda: log.append("work"), repeats=1, warmup=0, clock="wall", sync="cuda:1")
    assert log == ["cuda:1", "work", "cuda:1"]
    log.clear()
    timeit(lambda: log.append("work"), repeats=1, warmup=0, clock="wall")
    assert log == [None, "work", None]
    log.clear()
    timeit(lambda: log.append("work"), repeats=1, warmup=0, clock="wall", sync="mps")
    assert log == ["mps", "work", "mps"]
    log.clear()
    timeit(lambda: log.append("work"), repeats=1, warmup=0, sync="cpu")
    assert log == ["work"]


def test_a_device_without_torch_is_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(ValueError, match="torch is not imported"):
        timeit(lambda: None, clock="wall", sync="cuda")


def test_timing_imports_neither_torch_nor_numpy():
    code = "import sys; from oral4.measure.timing import timeit; timeit(int); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'oral4.measure.timing'" in loaded
    assert "'torch'" not in loaded and "'numpy'" not in loaded


def fill(megabytes: int, fail: bool = False) -> int:
    """Touch so much memory; called in a fresh interpreter by the tests below."""
    if fail:
        raise KeyError("asked to fail")
    print("what is printed must not disturb the answer")
    block = bytearray(megabytes * MEGABYTE)
    block[::4096] = b"x" * len(block[::4096])
    return len(block) // MEGABYTE


class TestPeakMemory:
    def test_what_the_call_added(self):
        small, large = (peak_memory(f"{__name__}:fill", megabytes=megabytes) for megabytes in (10, 110))
        assert (small.value, large.value) == (10, 110)
        # pages of the block, and a little of the interpreter's own
        assert large.resident - small.resident == pytest.approx(100 * MEGABYTE, abs=5 * MEGABYTE)
        assert large.resident - large.before == pytest.approx(110 * MEGABYTE, abs=8 * MEGABYTE)
        assert small.accelerator is None

    def test_the_memory_of_this_program_is_not_counted(self):
        block = bytearray(400 * MEGABYTE)
        block[::4096] = b"x" * len(block[::4096])
        value, resident = peak_rss("statistics:fmean", data=[1, 2, 6])
        assert value == 3.0
        assert resident < 100 * MEGABYTE  # an interpreter has about 20; getrusage would say 400 or more
        assert len(block) == 400 * MEGABYTE  # alive until here

    def test_a_failing_call(self):
        with pytest.raises(OralError, match=r"fill failed: KeyError: 'asked to fail'"):
            peak_memory(f"{__name__}:fill", megabytes=1, fail=True)

    def test_an_absent_module_or_function(self):
        with pytest.raises(OralError, match="No module named 'no_such_module'"):
            peak_memory("no_such_module:f")
        with pytest.raises(OralError, match="no attribute 'no_such_function'"):
            peak_memory("math:no_such_function")

    def test_a_value_that_is_no_json(self):
        with pytest.raises(OralError, match="not JSON serializable"):
            peak_memory("builtins:object")


@pytest.mark.parametrize("target", ["math", "math:", ":sqrt", "math:sqrt(2)", "math;import os:x", "a b:c"])
def test_target_must_be_a_name(target):
    with pytest.raises(ValueError, match="not of the form package"):
        peak_memory(target)


def test_arguments_must_be_json():
    with pytest.raises(ValueError, match="an argument of math:sqrt cannot be written as JSON"):
        peak_memory("math:sqrt", x=object())


def test_median_is_the_statistic_of_the_standard_library(clock):
    values = iter([5.0, 1.0, 4.0, 2.0])

    def fn():
        clock.now += next(values)

    assert timeit(fn, repeats=4, warmup=0).median == statistics.median([5.0, 1.0, 4.0, 2.0])
