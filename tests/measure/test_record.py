from __future__ import annotations

import json
import os

import pytest

import oral4.measure.record as module
from oral4.errors import DataError, OralError
from oral4.measure.experiment import find_experiment
from oral4.measure.intervals import mean_interval
from oral4.measure.record import Record, duration, list_records, load_record, read_record


def make(**changes) -> Record:
    parts = {
        "experiment": "pyraformer/cost",
        "scale": "mini",
        "config": {"lengths": [96, 192], "dropout": None},
        "seeds": (0, 1, 2),
        "values": {"slope": (1.0, 1.1, 1.2), "seconds": ((1.0, 2.0), (1.5, 2.5), (2.0, 3.0))},
        "units": {"slope": "", "seconds": "s"},
        "better": {"slope": "lower"},
        "tolerance": {"slope": 0.1, "seconds": None},
        "device": "AMD <EPYC>, 2 of 2 cores",
        "wall_seconds": 150.0,
        "peak_memory_bytes": 260_000_000,
        "versions": {"python": "3.11.7"},
        "commit": "0123456789abcdef",
        "date": "2026-01-31T12:00:00+00:00",
    }
    return Record(**{**parts, **changes})


def test_a_metric_has_mean_and_student_interval():
    slope = make()["slope"]
    assert (slope.mean, slope.low, slope.high) == mean_interval([1.0, 1.1, 1.2])
    assert slope.unit == "" and slope.values == (1.0, 1.1, 1.2)


def test_a_list_is_summed_up_element_by_element():
    seconds = make()["seconds"]
    assert seconds.is_list
    assert seconds.mean == (1.5, 2.5)
    assert seconds.low == (mean_interval([1, 1.5, 2]).low, mean_interval([2, 2.5, 3]).low)
    assert seconds.high == (mean_interval([1, 1.5, 2]).high, mean_interval([2, 2.5, 3]).high)


def test_one_seed_has_no_interval():
    record = make(seeds=(4,), values={"slope": (1.0,), "seconds": ((1.0,),)})
    assert record["slope"].low is None and record["slope"].high is None
    assert record["seconds"].mean == (1.0,) and record["seconds"].low is None
    assert record["slope"].text() == "1"
    with pytest.raises(ValueError, match="one seed, which gives no interval"):
        record.format("slope.low")


def test_format():
    record = make()
    low, high = record["slope"].low, record["slope"].high
    assert record.format("slope", ".1f") == record.format("slope.mean", ".1f") == "1.1"
    assert record.format("slope.low", ".3f") == f"{low:.3f}"
    assert record["slope"].text(".2f") == f"1.10 [{low:.2f}, {high:.2f}]"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("slop", "no metric 'slop'; it has slope, seconds"),
        ("slope.top", "choose mean, low or high"),
        ("seconds", "list of 2"),
    ],
)
def test_format_refuses(what, words):
    with pytest.raises(ValueError, match=words):
        make().format(what)


def test_unknown_metric_is_a_key_error_with_the_names():
    with pytest.raises(KeyError, match="it has slope, seconds"):
        make()["speed"]
    assert "slope" in make() and "speed" not in make()


def test_file_and_back(tmp_path):
    record = make(overrides={"lr": "1e-4"}, origin={"naive": "written here"}, dirty=True)
    path = record.save(tmp_path / "deep" / "cost-mini.json")
    assert read_record(path) == record
    assert os.listdir(path.parent) == ["cost-mini.json"]  # no temporary file is left


def test_the_same_record_gives_the_same_bytes(tmp_path):
    first = make().save(tmp_path / "a.json").read_bytes()
    turned = make(units={"seconds": "s", "slope": ""}, tolerance={"seconds": None, "slope": 0.1})
    assert turned.save(tmp_path / "b.json").read_bytes() == first
    assert read_record(tmp_path / "a.json").save(tmp_path / "c.json").read_bytes() == first
    assert json.loads(first)["schema"] == 1
    assert b'\n    "slope": [1.0, 1.1, 1.2]\n' in first  # a metric is a line: a diff shows what moved


def test_a_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = make().save(tmp_path / "cost-mini.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        make(scale="gpu").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cost-mini.json"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experiment": "../etc/passwd"}, "not of the form chapter/name"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (0, 2, 3)}, "one more than the last"),
        ({"values": {"slope": (1.0, 1.1, 1.2)}}, "seconds is only in values or only in units"),
        ({"values": {}, "units": {}}, "no metric"),
        ({"values": {"slope": (1.0, 1.1), "seconds": (1.0, 1.0, 1.0)}}, "2 values for 3 seeds"),
        ({"values": {"slope": (1.0, 1.1, float("nan")), "seconds": (1.0, 1.0, 1.0)}}, "nan is not finite"),
        ({"values": {"slope": (1.0, 1.1, True), "seconds": (1.0, 1.0, 1.0)}}, "True is not a number"),
        ({"values": {"slope": (1.0, 1.1, "x"), "seconds": (1.0, 1.0, 1.0)}}, "'x' is not a number"),
        ({"values": {"slope": (1.0, 1.1, (1.0,)), "seconds": (1.0, 1.0, 1.0)}}, "every seed"),
        ({"values": {"slope": ((), (), ()), "seconds": (1.0, 1.0, 1.0)}}, "length above 0"),
        ({"better": {"slope": "smaller"}}, "choose lower or higher"),
        ({"better": {"speed": "higher"}}, "speed, which has no unit"),
        ({"tolerance": {"slope": -0.1}}, "from 0 on"),
        ({"tolerance": {"slope": float("nan")}}, "from 0 on"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_a_metric_name_has_no_dot():
    with pytest.raises(ValueError, match=r"metric 'a\.b'"):
        make(values={"a.b": (1.0, 1.0, 1.0)}, units={"a.b": ""}, better={}, tolerance={})


def broken(change):
    content = json.loads(make_text())
    change(content)
    return json.dumps(content)


def make_text() -> str:
    return module._dumps({"schema": 1, **{f.name: getattr(make(), f.name) for f in module.dataclasses.fields(Record)}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (make_text()[:200], "is not JSON"),
        ("[1, 2]", "not a JSON object"),
        (broken(lambda c: c.update(schema=2)), "schema 2; this version of oral4 reads 1"),
        (broken(lambda c: c.pop("schema")), "schema None"),
        (broken(lambda c: c.pop("device")), "lacks device and has unknown nothing"),
        (broken(lambda c: c.update(colour="red")), "lacks nothing and has unknown colour"),
        (broken(lambda c: c.update(seeds=[0, 1])), "is damaged: .*3 values for 2 seeds"),
        (broken(lambda c: c.update(values=7)), "is damaged"),
        (broken(lambda c: c.update(seeds=None)), "is damaged"),
        (broken(lambda c: c["values"].update(slope=[1, 2, "x"])), "'x' is not a number"),
    ],
)
def test_a_damaged_file_is_a_clear_error(tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        read_record(path)
    assert "bad.json" in str(caught.value)


def test_a_missing_file_is_a_clear_error(tmp_path):
    with pytest.raises(OralError, match=r"cannot read the record .*absent\.json"):
        read_record(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["pyraformer/cost-minni", "../../etc/passwd", "/etc/passwd", "", "library"])
def test_an_unknown_record_is_a_clear_error(name):
    with pytest.raises(DataError, match=r"there is no record .* there is "):
        load_record(name)


def test_every_record_that_ships_loads_under_its_own_name():
    names = list_records()
    assert "library/startup-mini" in names
    for name in names:
        record = load_record(name)
        assert record.name == name
        # what made the weights that ship is one training, and a GPU may be at hand for minutes; a claim on such a
        # record can hold in direction at most
        fewest = 1 if find_experiment(record.experiment).weights or record.scale == "gpu" else 3
        assert len(record.seeds) >= fewest, f"{name}: a claim needs three seeds at least"


def test_command_says_everything_that_was_chosen():
    assert make().command() == "oral4 run pyraformer/cost --scale mini --seeds 3"
    changed = make(seeds=(5, 6, 7), overrides={"note": "two words", "lr": "1e-4"})
    assert changed.command() == (
        "oral4 run pyraformer/cost --scale mini --set 'note=two words' --set lr=1e-4 --seeds 3 --seed 5"
    )


def test_provenance():
    line = make().provenance()
    assert str(line) == (
        "Recorded on 2026-01-31, AMD <EPYC>, 2 of 2 cores, seeds 0, 1, 2, commit 0123456. "
        "Reproduce: oral4 run pyraformer/cost --scale mini --seeds 3"
    )
    assert line._repr_html_() == (
        '<p class="oral4-provenance">Recorded on 2026-01-31, AMD &lt;EPYC&gt;, 2 of 2 cores, seeds 0, 1, 2, '
        "commit 0123456. Reproduce: <code>oral4 run pyraformer/cost --scale mini --seeds 3</code></p>"
    )
    assert line._repr_markdown_().endswith("Reproduce: `oral4 run pyraformer/cost --scale mini --seeds 3`")
    assert "commit 0123456 with changes" in str(make(dirty=True).provenance())
    assert "seed 0," in str(make(seeds=(0,), values={"slope": (1.0,), "seconds": (1.0,)}).provenance())


def test_cost_in_words():
    assert make().cost() == "3 seeds, 2.5 min, 0.26 GB, AMD <EPYC>, 2 of 2 cores"
    assert "80.00 GB on the GPU" in make(peak_accelerator_bytes=80_000_000_000).cost()
    assert make(peak_memory_bytes=None).cost() == "3 seeds, 2.5 min, AMD <EPYC>, 2 of 2 cores"


@pytest.mark.parametrize(("seconds", "words"), [(0.0042, "0.0042 s"), (12.3, "12 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_duration(seconds, words):
    assert duration(seconds) == words
