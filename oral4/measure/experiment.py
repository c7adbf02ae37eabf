"""An experiment: a frozen configuration per scale, one function that does one seed, and what keeps its outcome.

A chapter lists its own in ``EXPERIMENTS`` of ``oral4/<chapter>/experiment.py``::

    @dataclass(frozen=True, kw_only=True)
    class CostConfig:
        lengths: tuple[int, ...] = (96, 192)

        @classmethod
        def smoke(cls): return cls(lengths=(32,))

        @classmethod
        def mini(cls): return cls()

    def run_cost(config: CostConfig, seed: int) -> dict[str, float]:
        ...
        return {"slope": slope}

    EXPERIMENTS = (
        Experiment(name="pyraformer/cost", summary="How cost grows with length", config=CostConfig, run=run_cost,
                   units={"slope": ""}, tolerance={"slope": 0.1}),
    )

``name`` and ``summary`` are plain strings in the call, for they are listed from the source text: listing the
experiments must not import torch.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import json
import operator
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from oral4 import settings
from oral4.errors import DataError, OralError
from oral4.measure import environment
from oral4.measure.record import Record, Value, check_metrics, check_values

__all__ = [
    "Comparison",
    "Experiment",
    "find_experiment",
    "list_experiments",
    "run_experiment",
    "verify",
]

LIBRARY = {"library/startup": "oral4.measure.startup"}
"""Experiments on the library itself, which belong to no chapter."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is run, and what its values mean."""

    name: str
    "``<chapter>/<name>``; a plain string in the source."
    summary: str
    "One line for the list; a plain string in the source."
    config: type
    "Frozen dataclass with a classmethod for each scale it has: ``smoke``, ``mini``, ``gpu``, ``paper``."
    run: Callable[..., Mapping[str, Any]]
    "``run(config, seed)`` does one seed and returns metric to number, or to a list of numbers."
    units: Mapping[str, str]
    'Every metric that ``run`` returns, with its unit; ``""`` for a pure number.'
    tolerance: Mapping[str, float | None] = field(default_factory=dict)
    "Relative tolerance of a repetition on another machine; None or absent: not compared."
    better: Mapping[str, str] = field(default_factory=dict)
    'Metric to ``"lower"`` or ``"higher"``.'
    origin: Mapping[str, str] = field(default_factory=dict)
    "Peer to where it comes from, for each program of others measured beside ours."
    notes: str = ""
    weights: str = ""
    """Name of the weights that it trains, below ``oral4/weights``. ``run`` then has a keyword ``weights``: the file to
    write them to, or None."""

    def __post_init__(self) -> None:
        check_metrics(self.name, self.units, self.better, self.tolerance)

    def scales(self) -> tuple[str, ...]:
        """Return the scales that the configuration has."""
        return tuple(scale for scale in settings.SCALES if hasattr(self.config, scale))

    def configure(self, scale: str | None = None, overrides: Mapping[str, Any] | None = None) -> Any:
        """Return the configuration at a scale with some fields changed.

        Parameters
        ----------
        scale : str, optional
            If left out, :func:`oral4.settings.scale` decides.
        overrides : mapping, optional
            Field to value. A text is read by the field's type, so ``{"lr": "1e-4"}`` is ``{"lr": 1e-4}``.

        Raises
        ------
        ValueError
            If the experiment lacks the scale, or a field is unknown or cannot be read.
        """
        scale = settings.scale(scale)
        if scale not in self.scales():
            raise ValueError(f"{self.name} has no scale {scale!r}; it has {', '.join(self.scales())}")
        config = getattr(self.config, scale)()
        hints = _hints(self.config)
        changed = {}
        for key, value in (overrides or {}).items():
            if key not in hints:
                near = difflib.get_close_matches(key, hints, n=1)
                fields = ", ".join(f"{name} ({_type_words(hint)})" for name, hint in hints.items())
                guess = f", did you mean {near[0]}?" if near else "."
                raise ValueError(f"{self.name} has no setting {key!r}{guess} It has {fields}")
            changed[key] = _from_text(value, hints[key], key) if isinstance(value, str) else value
        return dataclasses.replace(config, **changed)


@dataclass(frozen=True)
class Comparison:
    """One metric of a record beside its repetition."""

    metric: str
    stored: Value
    fresh: Value
    tolerance: float | None
    "Relative, two-sided, element by element; None: not compared."

    @property
    def deviation(self) -> float:
        """Largest relative difference from the stored value; infinite where 0 was stored or a length changed."""
        stored, fresh = _as_tuple(self.stored), _as_tuple(self.fresh)
        if len(stored) != len(fresh) or isinstance(self.stored, tuple) != isinstance(self.fresh, tuple):
            return float("inf")
        return max(_relative(a, b) for a, b in zip(stored, fresh, strict=True))

    @property
    def agrees(self) -> bool | None:
        """Whether the deviation is within the tolerance; None where there is no tolerance."""
        return None if self.tolerance is None else self.deviation <= self.tolerance


def run_experiment(
    experiment: Experiment | str,
    scale: str | None = None,
    seeds: int = 3,
    overrides: Mapping[str, Any] | None = None,
    *,
    first_seed: int = 0,
    progress: Callable[[str], None] | None = None,
    weights: str | PathLike[str] | None = None,
) -> Record:
    """Run an experiment once per seed and return the record of it.

    Parameters
    ----------
    experiment : Experiment or str
        The experiment or its name.
    scale : str, optional
        If left out, :func:`oral4.settings.scale` decides.
    seeds : int, at least 1
        The seeds are ``first_seed``, ``first_seed + 1`` and so on. One seed has no interval.
    overrides : mapping, optional
        Fields of the configuration to change, see :meth:`Experiment.configure`.
    first_seed : int, at least 0
    progress : callable, optional
        Called with a line of text before each seed.
    weights : path, optional
        File for the weights that the first seed trains.

    Raises
    ------
    ValueError
        If an argument is out of range, weights are asked of an experiment that trains none, or the run returns
        other metrics than the experiment declares.
    """
    if isinstance(experiment, str):
        experiment = find_experiment(experiment)
    if seeds < 1 or first_seed < 0:
        raise ValueError(f"seeds={seeds}, first seed {first_seed}; at least one seed, and none below 0")
    if weights is not None and not experiment.weights:
        raise ValueError(f"{experiment.name} trains no weights to keep; leave out --weights and --save-weights")
    scale = settings.scale(scale)
    config = experiment.configure(scale, overrides)
    stored = _as_json(config)  # now: what JSON cannot hold must not come to light at the end
    # Written down before the run: the experiment may take hours, in which somebody commits.
    (commit, dirty), date = environment.commit(), datetime.now(UTC).isoformat(timespec="seconds")
    outcomes: list[dict[str, Value]] = []
    start = time.perf_counter()
    for seed in range(first_seed, first_seed + seeds):
        if progress is not None:
            progress(f"{experiment.name} at scale {scale}, seed {seed} ({len(outcomes) + 1} of {seeds})")
        outcomes.append(_run_seed(experiment, config, seed, weights if seed == first_seed else None))
    return Record(
        experiment=experiment.name,
        scale=scale,
        config=stored,
        seeds=tuple(range(first_seed, first_seed + seeds)),
        values={metric: tuple(outcome[metric] for outcome in outcomes) for metric in experiment.units},
        units=dict(experiment.units),
        better=dict(experiment.better),
        tolerance={metric: experiment.tolerance.get(metric) for metric in experiment.units},
        device=environment.device_words(),
        wall_seconds=round(time.perf_counter() - start, 3),
        peak_memory_bytes=environment.peak_resident_bytes(),
        peak_accelerator_bytes=environment.peak_accelerator_bytes(),
        versions=environment.versions(),
        commit=commit,
        dirty=dirty,
        date=date,
        overrides={key: str(value) for key, value in (overrides or {}).items()},
        notes=experiment.notes,
        origin=dict(experiment.origin),
    )


def verify(record: Record, seed: int | None = None) -> list[Comparison]:
    """Run one seed of a record again with the record's own configuration and compare each metric.

    Parameters
    ----------
    record : Record
    seed : int, optional
        One of the record's seeds; its first if left out.

    Returns
    -------
    list of Comparison
        One a metric, judged by the tolerance that the record states.

    Raises
    ------
    ValueError
        If the record has no such seed.
    DataError
        If the experiment's configuration has other fields by now.
    """
    seed = record.seeds[0] if seed is None else seed
    if seed not in record.seeds:
        raise ValueError(f"seed {seed} is not one of {record.name}; it has {', '.join(map(str, record.seeds))}")
    experiment = find_experiment(record.experiment)
    fresh = _run_seed(experiment, _from_json(record.config, experiment.config, record.name), seed)
    position = record.seeds.index(seed)
    absent = sorted(set(record.metrics) ^ set(fresh))
    if absent:
        raise DataError(f"{record.name}: {', '.join(absent)} is only in the record or only in the experiment by now")
    return [
        Comparison(metric, record.values[metric][position], fresh[metric], record.tolerance.get(metric))
        for metric in record.metrics
    ]


def list_experiments() -> dict[str, str]:
    """Return name to summary of every experiment, read from the source text: nothing is imported."""
    package = files("oral4")
    sources = [chapter / "experiment.py" for chapter in package.iterdir() if chapter.name not in ("measure", "records")]
    sources += [package / "measure" / f"{module.rpartition('.')[2]}.py" for module in LIBRARY.values()]
    found = {}
    for source in sources:
        if not source.is_file():
            continue
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Experiment":
                words = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                if "name" in words:
                    found[str(words["name"])] = str(words.get("summary", ""))
    return dict(sorted(found.items()))


def find_experiment(name: str) -> Experiment:
    """Return the experiment ``<chapter>/<name>``; imports that chapter.

    Raises
    ------
    OralError
        If there is none of that name; close names are listed.
    """
    known = list_experiments()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or sorted(known)
        raise OralError(f"there is no experiment {name!r}; there is {', '.join(near) or 'none yet'}")
    module = importlib.import_module(LIBRARY.get(name, f"oral4.{name.partition('/')[0]}.experiment"))
    for experiment in module.EXPERIMENTS:
        if experiment.name == name:
            return experiment
    raise OralError(f"{name} is written in {module.__name__} but missing from its EXPERIMENTS")


def _run_seed(
    experiment: Experiment, config: Any, seed: int, weights: str | PathLike[str] | None = None
) -> dict[str, Value]:
    """Return the values of one seed as plain numbers, after checking that they are the declared metrics."""
    keep = {"weights": None if weights is None else Path(weights)} if experiment.weights else {}
    outcome = experiment.run(config, seed, **keep)
    if set(outcome) != set(experiment.units):
        odd = ", ".join(sorted(set(outcome) ^ set(experiment.units)))
        raise ValueError(f"{experiment.name}: {odd} is only in what run() returns or only in units")
    values = {metric: _plain(value) for metric, value in outcome.items()}
    for metric, value in values.items():
        check_values(f"{experiment.name}: {metric}", (value,), 1)
    return values


def _plain(value: Any) -> Value:
    """Return a number, or a tuple of numbers, of Python's own types: those of numpy and torch are not JSON."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)  # type: ignore[misc]
    try:
        return operator.index(value)
    except TypeError:
        return float(value)


def _as_json(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration as they are after JSON: tuples have become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def _from_json(stored: Mapping[str, Any], config: type, where: str) -> Any:
    """Return the configuration that was stored; the inverse of :func:`_as_json`."""
    hints = _hints(config)
    odd = ", ".join(sorted(set(stored) ^ set(hints)))
    if odd:
        raise DataError(f"{where}: setting {odd} is only in the record or only in {config.__name__} by now")
    try:
        return config(**{key: _restore(value, hints[key], where) for key, value in stored.items()})
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: its settings no longer fit {config.__name__}: {error}") from error


def _restore(value: Any, hint: Any, where: str) -> Any:
    """Return a value of JSON in the type of its field."""
    options = _options(hint)
    if isinstance(value, list):
        inner = next((typing.get_args(option) for option in options if typing.get_origin(option) is tuple), ())
        items = inner[:1] * len(value) if Ellipsis in inner else inner or (Any,) * len(value)
        return tuple(_restore(item, kind, where) for item, kind in zip(value, items, strict=True))
    if isinstance(value, dict):
        for option in options:
            if dataclasses.is_dataclass(option):
                return _from_json(value, typing.cast(type, option), where)
    return value


def _from_text(text: str, hint: Any, key: str) -> Any:
    """Return a setting read from text by the type of its field."""
    options = _options(hint)
    if types.NoneType in options and text.lower() == "none":
        return None
    for option in options:
        if option is not types.NoneType:
            try:
                return _read(text, option)
            except ValueError:
                continue
    raise ValueError(f"{key}={text!r} is not {_type_words(hint)}")


def _read(text: str, kind: Any) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in words:
            raise ValueError(text)
        return words[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    if typing.get_origin(kind) is typing.Literal:
        for choice in typing.get_args(kind):
            if text == str(choice):
                return choice
    if typing.get_origin(kind) is tuple:
        parts = [part for part in text.strip("()[] ").split(",") if part.strip()]
        inner = typing.get_args(kind)
        kinds = inner[:1] * len(parts) if Ellipsis in inner else inner
        return tuple(_read(part.strip(), each) for part, each in zip(parts, kinds, strict=True))
    raise ValueError(text)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _type_words(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "none"}
    parts = []
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)
            parts.append("comma-separated values" if Ellipsis in inner else f"{len(inner)} comma-separated values")
        elif typing.get_origin(option) is typing.Literal:
            parts.append(" or ".join(map(str, typing.get_args(option))))
        else:
            parts.append(words.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(parts)


def _hints(config: type) -> dict[str, Any]:
    """Return field to type; the annotations of a module with postponed evaluation are texts until resolved."""
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if f.init}


def _as_tuple(value: Value) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _relative(stored: float, fresh: float) -> float:
    if stored == fresh:
        return 0.0
    return abs(fresh - stored) / abs(stored) if stored else float("inf")
