"""A measurement that is kept: what was run, on what, every seed's values, their interval, the cost.

A record is written by a run (:func:`oral4.measure.experiment.run_experiment`), never typed by hand. It is
one JSON file, ``oral4/records/<chapter>/<experiment>-<scale>.json``, and ships with the library.

>>> record = load_record("library/startup-mini")
>>> record.experiment, record.scale
('library/startup', 'mini')
"""

from __future__ import annotations

import dataclasses
import difflib
import html
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from oral4.errors import DataError
from oral4.measure.intervals import mean_interval

__all__ = ["SCHEMA", "Provenance", "Quantity", "Record", "duration", "list_records", "load_record", "read_record"]

SCHEMA = 1
"""Version of the file's form; a file of another version is refused, not guessed at."""

LEVEL = 0.95
"""Level of every interval in the book."""

_NAME = re.compile(r"[a-z0-9_]+/[a-z0-9_]+")
_METRIC = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Quantity:
    """One metric of a record: a value per seed, their mean and the 95 % Student t interval of it.

    Where a value is a list (a curve, say), ``mean``, ``low`` and ``high`` are tuples, element by element.
    """

    name: str
    values: tuple[Value, ...]
    unit: str = ""

    @property
    def is_list(self) -> bool:
        """Whether each seed gave a list of numbers."""
        return isinstance(self.values[0], tuple)

    @property
    def mean(self) -> Value:
        """Mean over seeds."""
        return self._over_seeds(0)

    @property
    def low(self) -> Value | None:
        """Lower end of the interval; None with one seed, which has no interval."""
        return None if len(self.values) == 1 else self._over_seeds(1)

    @property
    def high(self) -> Value | None:
        """Upper end of the interval; None with one seed, which has no interval."""
        return None if len(self.values) == 1 else self._over_seeds(2)

    def _over_seeds(self, part: int) -> Any:
        rows: Any = self.values
        if not self.is_list:
            return mean_interval(rows, LEVEL)[part]
        return tuple(mean_interval(column, LEVEL)[part] for column in zip(*rows, strict=True))

    def text(self, spec: str = ".3g") -> str:
        """Return mean, interval and unit for reading, each number formatted by ``spec``.

        Examples
        --------
        >>> Quantity("time", (1.0, 2.0, 3.0), "s").text(".1f")
        '2.0 [-0.5, 4.5] s'
        """
        if self.is_list:
            return f"{len(self.values[0])} numbers a seed"  # type: ignore[arg-type]
        words = f"{self.mean:{spec}}"
        if self.low is not None:
            words += f" [{self.low:{spec}}, {self.high:{spec}}]"
        return f"{words} {self.unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one experiment at one scale over several seeds.

    ``record["metric"]`` is a :class:`Quantity`; :meth:`format` prints one number of it.

    Raises
    ------
    ValueError
        If the parts do not fit together: a metric without unit, not one value a seed, a value that is not finite.
    """

    experiment: str
    "``<chapter>/<name>``, for example ``pyraformer/cost``."
    scale: str
    "smoke, mini, gpu or paper."
    config: Mapping[str, Any]
    "Every field of the experiment's configuration."
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[Value, ...]]
    "Metric to one value a seed; a value is a number or a tuple of numbers."
    units: Mapping[str, str]
    'Metric to unit; ``""`` for a pure number.'
    better: Mapping[str, str] = field(default_factory=dict)
    'Metric to ``"lower"`` or ``"higher"``, where one of them is better.'
    tolerance: Mapping[str, float | None] = field(default_factory=dict)
    "Metric to relative tolerance of a repetition; None or absent: not compared (a time belongs to its machine)."
    device: str
    wall_seconds: float
    "All seeds together."
    peak_memory_bytes: int | None = None
    "Largest resident set of the process that ran it, imports included."
    peak_accelerator_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = "unknown"
    dirty: bool = False
    "Whether the library differed from the commit."
    date: str
    "UTC, ISO 8601."
    overrides: Mapping[str, str] = field(default_factory=dict)
    "What ``--set`` changed, as typed."
    notes: str = ""
    origin: Mapping[str, str] = field(default_factory=dict)
    "Peer to where it comes from, for each program of others that was measured beside ours."

    def __post_init__(self) -> None:
        check_metrics(self.experiment, self.units, self.better, self.tolerance)
        if not self.seeds or self.seeds != tuple(range(self.seeds[0], self.seeds[0] + len(self.seeds))):
            raise ValueError(f"seeds={list(self.seeds)}; at least one, and each one more than the last")
        odd = ", ".join(sorted(set(self.values) ^ set(self.units)))
        if odd:
            raise ValueError(f'{self.experiment}: {odd} is only in values or only in units; "" says a pure number')
        for metric, values in self.values.items():
            check_values(f"{self.experiment}: {metric}", values, len(self.seeds))

    @property
    def name(self) -> str:
        """Name to load it by, ``<experiment>-<scale>``."""
        return f"{self.experiment}-{self.scale}"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured."""
        return tuple(self.values)

    def __getitem__(self, metric: str) -> Quantity:
        """Return one metric; an unknown one raises KeyError with the names there are."""
        if metric not in self.values:
            raise KeyError(f"{self.name} has no metric {metric!r}; it has {', '.join(self.values)}")
        return Quantity(metric, self.values[metric], self.units[metric])

    def __contains__(self, metric: object) -> bool:
        return metric in self.values

    def format(self, what: str, spec: str = ".3g") -> str:
        """Return one number as text: ``"metric"`` is the mean, ``"metric.low"`` and ``"metric.high"`` its interval.

        Raises
        ------
        ValueError
            If there is no such metric or part, it is a list, one seed leaves it without interval, or the
            format does not fit.

        Examples
        --------
        >>> record = load_record("library/startup-mini")
        >>> record.format("import_modules", ".0f") == f"{record['import_modules'].mean:.0f}"
        True
        """
        metric, _, part = what.partition(".")
        part = part or "mean"
        if metric not in self.values:
            raise ValueError(f"{self.name} has no metric {metric!r}; it has {', '.join(self.values)}")
        if part not in ("mean", "low", "high"):
            raise ValueError(f"{what!r}: {part!r} is unknown; choose mean, low or high")
        number = getattr(self[metric], part)
        if number is None:
            raise ValueError(f"{what!r}: {self.name} has one seed, which gives no interval")
        if isinstance(number, tuple):
            raise ValueError(f"{what!r} of {self.name} is a list of {len(number)} numbers, not one")
        return f"{number:{spec}}"

    def command(self) -> str:
        """Return the command that runs the experiment again."""
        settings = "".join(f"--set {shlex.quote(f'{key}={value}')} " for key, value in self.overrides.items())
        first = f" --seed {self.seeds[0]}" if self.seeds[0] else ""
        return f"oral4 run {self.experiment} --scale {self.scale} {settings}--seeds {len(self.seeds)}{first}"

    def provenance(self) -> Provenance:
        """Return the line that stands under a recorded figure; a notebook displays it."""
        return Provenance(
            date=self.date[:10],
            device=self.device,
            seeds=", ".join(map(str, self.seeds)),
            commit=self.commit[:7] + (" with changes" if self.dirty else ""),
            command=self.command(),
        )

    def cost(self) -> str:
        """Return what the whole run cost: seeds, time, memory, hardware."""
        parts = [f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}", duration(self.wall_seconds)]
        if self.peak_memory_bytes is not None:
            parts.append(f"{self.peak_memory_bytes / 1e9:.2f} GB")
        if self.peak_accelerator_bytes is not None:
            parts.append(f"{self.peak_accelerator_bytes / 1e9:.2f} GB on the GPU")
        return ", ".join([*parts, self.device])

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON and return the path; a reader sees the old file or the new one, never a part.

        The same record gives the same bytes: keys sorted, one metric a line.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = _dumps({"schema": SCHEMA, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}})
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
            os.chmod(temporary, 0o644)  # mkstemp makes it private; a record is published
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
        return target


@dataclass(frozen=True)
class Provenance:
    """Where a recorded number comes from, for display in a notebook."""

    date: str
    device: str
    seeds: str
    commit: str
    command: str

    def _origin(self) -> str:
        plural = "s" if "," in self.seeds else ""
        return f"Recorded on {self.date}, {self.device}, seed{plural} {self.seeds}, commit {self.commit}."

    def __str__(self) -> str:
        return f"{self._origin()} Reproduce: {self.command}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        origin, command = html.escape(self._origin()), html.escape(self.command)
        return f'<p class="oral4-provenance">{origin} Reproduce: <code>{command}</code></p>'

    def _repr_markdown_(self) -> str:
        return f"{self._origin()} Reproduce: `{self.command}`"


def list_records() -> tuple[str, ...]:
    """Return the names of the records that ship with the library."""
    root = files("oral4") / "records"
    if not root.is_dir():
        return ()
    return tuple(
        sorted(
            f"{chapter.name}/{entry.name.removesuffix('.json')}"
            for chapter in root.iterdir()
            if chapter.is_dir()
            for entry in chapter.iterdir()
            if entry.name.endswith(".json") and not entry.name.startswith(".")
        )
    )


def load_record(name: str) -> Record:
    """Return a record that ships with the library, for example ``load_record("pyraformer/cost-mini")``.

    Raises
    ------
    DataError
        If there is none of that name, or the file is damaged.
    """
    known = list_records()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known
        raise DataError(f"there is no record {name!r}; there is {', '.join(near) or 'none yet'}")
    chapter, _, stem = name.partition("/")
    return _parse((files("oral4") / "records" / chapter / f"{stem}.json").read_text(encoding="utf-8"), name)


def read_record(path: str | Path) -> Record:
    """Return the record in a file.

    Raises
    ------
    DataError
        If the file is missing or is not a record of this version.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the record {path}: {error}") from error
    return _parse(text, str(path))


def duration(seconds: float) -> str:
    """Return a time for reading: ``"0.4 s"``, ``"2.5 min"``, ``"3.1 h"``.

    Examples
    --------
    >>> duration(150)
    '2.5 min'
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def check_metrics(
    experiment: str, units: Mapping[str, str], better: Mapping[str, str], tolerance: Mapping[str, float | None]
) -> None:
    """Raise ValueError unless the name is well formed and the parts speak of the same metrics."""
    if not _NAME.fullmatch(experiment):
        raise ValueError(f"experiment {experiment!r} is not of the form chapter/name (a-z, 0-9, _)")
    if not units:
        raise ValueError(f"{experiment}: no metric; what measures nothing is no experiment")
    for metric in units:
        if not _METRIC.fullmatch(metric):
            raise ValueError(f"{experiment}: metric {metric!r}; use a letter, then letters, digits and _")
    unknown = sorted((set(better) | set(tolerance)) - set(units))
    if unknown:
        raise ValueError(f"{experiment}: better or tolerance for {', '.join(unknown)}, which has no unit")
    for metric, way in better.items():
        if way not in ("lower", "higher"):
            raise ValueError(f"{experiment}: better[{metric!r}]={way!r}; choose lower or higher")
    for metric, allowed in tolerance.items():
        if allowed is not None and not 0 <= allowed < math.inf:
            raise ValueError(f"{experiment}: tolerance[{metric!r}]={allowed}; a number from 0 on, or None")


def check_values(where: str, values: Sequence[Value], count: int) -> None:
    """Raise ValueError unless there is one finite number a seed, or one list of a common length a seed."""
    if len(values) != count:
        raise ValueError(f"{where}: {len(values)} values for {count} seeds; one a seed is needed")
    shapes = {len(value) if isinstance(value, tuple) else None for value in values}
    if len(shapes) > 1 or 0 in shapes:
        raise ValueError(f"{where}: every seed must give a number, or every seed a list of the same length above 0")
    for value in values:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"{where}: {number!r} is not a number")
            if not math.isfinite(number):
                raise ValueError(f"{where}: {number} is not finite; count such failures in a metric of their own")


def _parse(text: str, where: str) -> Record:
    """Return the record in a JSON text; ``where`` names it in errors."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"record {where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"record {where} is not a JSON object")
    schema = found.pop("schema", None)
    if schema != SCHEMA:
        raise DataError(f"record {where} has schema {schema!r}; this version of oral4 reads {SCHEMA}")
    fields = dataclasses.fields(Record)
    unknown = sorted(set(found) - {f.name for f in fields})
    absent = dataclasses.MISSING
    required = {f.name for f in fields if f.default is absent and f.default_factory is absent}
    missing = sorted(required - set(found))
    if unknown or missing:
        raise DataError(
            f"record {where} lacks {', '.join(missing) or 'nothing'} and has unknown {', '.join(unknown) or 'nothing'}"
        )
    try:
        found["seeds"] = tuple(found["seeds"])
        found["values"] = {
            metric: tuple(tuple(value) if isinstance(value, list) else value for value in values)
            for metric, values in found["values"].items()
        }
        return Record(**found)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"record {where} is damaged: {error}") from error


def _dumps(content: Mapping[str, Any]) -> str:
    """Return JSON with sorted keys and two levels of lines: what changes between runs shows line by line in a diff."""

    def compact(value: Any) -> str:
        return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=False)

    lines = []
    for key, value in sorted(content.items()):
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"    {compact(name)}: {compact(value[name])}" for name in sorted(value))
            lines.append(f"  {compact(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {compact(key)}: {compact(dict(value) if isinstance(value, Mapping) else value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
