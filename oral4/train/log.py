"""What a training run says while it runs: rows in memory, JSON lines in a file, a progress line on stdout.

One line of the file is one row, a flat object such as ``{"step": 40, "loss": 0.31, "val_rmse": 0.5}``. Lines are only
ever added, so a killed process can leave no more than a broken last line, which readers drop.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from oral4.errors import DataError

__all__ = ["Log", "Progress", "columns", "read_log"]


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
        except ValueError as error:
            if number == len(lines):  # no newline at its end: the process was killed while it wrote
                break
            raise DataError(f"{path}, line {number} is not JSON: {line[:60]!r}") from error
        if row is not None:
            _add(rows, row)
    return rows


def _add(rows: list[dict[str, Any]], row: Mapping[str, Any]) -> None:
    """Append a row; a second one of the same step (the evaluation at the end of a run) joins the first."""
    if rows and rows[-1]["step"] == row["step"]:
        rows[-1] |= row
    else:
        rows.append(dict(row))


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns of one length; where a row lacks a name, its column holds None.

    >>> columns([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "val_rmse": 1.0}])
    {'step': [1, 2], 'loss': [0.5, 0.4], 'val_rmse': [None, 1.0]}
    """
    rows = list(rows)
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def read_log(path: str | Path) -> dict[str, list[Any]]:
    """Return the log of a run as columns of one length.

    Parameters
    ----------
    path : str or Path
        The ``log.jsonl`` of a run's folder.

    Returns
    -------
    dict of str to list
        ``"step"``, ``"loss"`` and so on. None stands for "not measured at this step" and for "not finite".

    Raises
    ------
    DataError
        If the file is missing, or a line before the last is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; a run writes its log there if fit() is given that directory")
    return columns(_rows(path))


class Log:
    """Rows of one run, in memory and, where a path is given, in a file.

    Parameters
    ----------
    path : str or Path, optional
        File of JSON lines; None keeps the rows in memory only.
    last_step : int
        Rows of the file after this step are dropped: a resumed run makes them again. 0 drops all.
    """

    def __init__(self, path: str | Path | None = None, *, last_step: int = 0):
        self.path = None if path is None else Path(path)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None:
            if self.path.is_file() and last_step:
                self.rows = [row for row in _rows(self.path) if row["step"] <= last_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self.path.parent / f".{self.path.name}.partial"
            kept.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            os.replace(kept, self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and write its line at once; a number that is not finite becomes null."""
        _add(self.rows, row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
              for key, value in row.items()}  # fmt: skip
    return json.dumps(finite, allow_nan=False) + "\n"


class Progress:
    """A bar on a terminal; elsewhere (a notebook, a file) a line for each tenth of the run and each evaluation.

    Everything goes to stdout: a notebook shows stderr as an error.

    Parameters
    ----------
    total : int or None
        Updates in all, where known. Otherwise a line appears every ten seconds.
    step : int
        Updates made before, by the run that is resumed.
    enabled : bool
        False prints nothing.
    """

    def __init__(self, total: int | None, *, step: int = 0, enabled: bool = True):
        self.total, self.enabled, self.bar = total, enabled, None
        self.shown_step, self.shown_time = step, time.monotonic()
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=step, file=sys.stdout, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Count one update."""
        if self.bar is not None:
            self.bar.update(1)

    def show(self, row: Mapping[str, Any], *, last: bool = False) -> None:
        """Show a row, or leave it out where the last line is recent."""
        if not self.enabled:
            return
        values = {key: value for key, value in row.items() if key in ("loss", "lr") or key.startswith("val_")}
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        enough = (
            row["step"] - self.shown_step >= self.total / 10 if self.total else time.monotonic() - self.shown_time > 10
        )
        if enough or last or any(key.startswith("val_") for key in values):
            self.shown_step, self.shown_time = row["step"], time.monotonic()
            print(f"step {row['step']}{f'/{self.total}' if self.total else ''}  {text}", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
