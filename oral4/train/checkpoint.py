"""Checkpoints of a training run, and small files of weights to ship: safetensors and JSON, never pickle.

Both are written atomically and carry their configuration (:mod:`oral4.train.storage` says how). Loading changes
none of your objects before everything has been found to fit; where something does not, the error names it.

>>> import tempfile
>>> model = nn.Linear(2, 1)
>>> with tempfile.TemporaryDirectory() as folder:
...     path = save(Path(folder) / "a.safetensors", model=model, state={"step": 3}, config={"width": 2})
...     load(path, model=model)["state"], describe(path)["config"]
({'step': 3}, {'width': 2})
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oral4.errors import CheckpointError
from oral4.train.storage import decode, describe, encode, read, write

__all__ = [
    "describe",
    "latest",
    "load",
    "load_weights",
    "plain",
    "prune",
    "require_storable",
    "save",
    "save_weights",
    "step_path",
]

# ---- does it fit? ---------------------------------------------------------------------------------------------


def _listed(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _require_fit(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any], *, dtypes: bool) -> None:
    """Raise a CheckpointError that names every tensor in which the file and the model differ."""
    both = [(name, saved[name], value) for name, value in expected.items()
            if isinstance(value, Tensor) and isinstance(saved.get(name), Tensor)]  # fmt: skip
    problems = {
        "missing in the file": [name for name in expected if name not in saved],
        "not in the model": [name for name in saved if name not in expected],
        "another shape": [
            f"{name} (file {tuple(old.shape)}, model {tuple(new.shape)})"
            for name, old, new in both
            if old.shape != new.shape
        ],
        "another dtype": [
            f"{name} (file {old.dtype}, model {new.dtype})"
            for name, old, new in both
            if dtypes and old.dtype != new.dtype
        ],
    }
    lines = [f"  {title}: {_listed(names)}" for title, names in problems.items() if names]
    if lines:
        advice = "Build the model from the file's own configuration: oral4.train.checkpoint.describe(path)['config']"
        raise CheckpointError("\n".join([f"{path} does not fit the model", *lines, advice]))


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration (mapping or dataclass) as JSON reads it back."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    try:
        return json.loads(json.dumps(dict(config or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"a configuration is a mapping or dataclass of plain JSON values: {error}") from error


def _leaves(tree: Any, name: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {leaf: value for key in tree for leaf, value in _leaves(tree[key], f"{name}.{key}".lstrip(".")).items()}


def _require_config(path: Path, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    old, new = _leaves({key: saved.get(key) for key in asked}, ""), _leaves(asked, "")
    lines = [
        f"  {name}: {old.get(name, 'absent')!r} in the file, {new.get(name, 'absent')!r} now"
        for name in sorted(old | new)
        if (name in old) != (name in new) or old[name] != new[name]
    ]
    if lines:
        raise CheckpointError("\n".join([f"{path} was written with another configuration", *lines]))


def _owners(model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Describe optimizer and scheduler so that a file for others is recognised: classes, parameters by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    parameters = [[names.get(id(parameter)) for parameter in group["params"]] for group in groups]
    if any(None in group for group in parameters):
        raise ValueError("the optimizer moves a parameter that is not in the model; put all of them in one nn.Module")
    return {
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
        "parameters": parameters,
    }


def require_storable(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None) -> None:
    """Raise at the start of a run what :func:`save` would raise in the middle of it.

    Raises
    ------
    TypeError, ValueError
        As :func:`save`.
    """
    _owners(model, optimizer, scheduler)
    groups = optimizer.state_dict()["param_groups"]
    encode({"optimizer": groups, "scheduler": None if scheduler is None else scheduler.state_dict()}, {})


# ---- checkpoints ----------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    ema: dict[str, Tensor] | None = None,
    best: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
    config: Any = None,
) -> Path:
    """Write everything a run needs to go on, atomically, and return the path.

    Parameters
    ----------
    path : str or Path
        The file, by custom ``*.safetensors``. An older file there stays whole until the new one is.
    model, optimizer, scheduler
        Objects with ``state_dict``. The optimizer's parameters must belong to the model.
    ema, best : dict of str to Tensor, optional
        Averaged weights, and the best weights so far.
    state : dict, optional
        Counters and random states: dict, list, tuple, str, numbers, None and tensors.
    config : mapping or dataclass, optional
        Plain JSON values, readable by :func:`describe`.

    Raises
    ------
    TypeError
        If something cannot be stored without pickle; the message names where it is.
    ValueError
        If the optimizer moves a parameter that is not in the model.
    """
    tree: dict[str, Any] = {"model": dict(model.state_dict()), "ema": ema, "best": best, "state": state or {}}
    tree |= {name: None if part is None else part.state_dict()
             for name, part in (("optimizer", optimizer), ("scheduler", scheduler))}  # fmt: skip
    tensors: dict[str, Tensor] = {}
    header = encode(tree, tensors)
    owners = _owners(model, optimizer, scheduler)
    write(Path(path), "checkpoint", tensors, {"config": plain(config), "owners": owners, **header})
    return Path(path)


def load(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    config: Any = None,
) -> dict[str, Any]:
    """Read a checkpoint into the given objects, once everything has been found to fit.

    Parameters
    ----------
    path : str or Path
        File written by :func:`save`.
    model, optimizer, scheduler
        Changed in place. What is None is left out.
    config : mapping or dataclass, optional
        Each of its top-level entries must equal the file's.

    Returns
    -------
    dict
        ``"model"``, ``"optimizer"``, ``"scheduler"``, ``"ema"``, ``"best"``, ``"state"`` and ``"config"``; None where
        the file has nothing.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, of another schema or configuration, or does not fit; your objects are
        then as they were.
    """
    path = Path(path)
    header, tensors = read(path, "checkpoint")
    _require_config(path, header["config"], plain(config))
    parts = ("model", "optimizer", "scheduler", "ema", "best", "state")
    saved = {part: decode(header[part], tensors) for part in parts} | {"config": header["config"]}
    _require_fit(path, saved["model"], model.state_dict(), dtypes=True)
    theirs, mine = header["owners"], _owners(model, optimizer, scheduler)
    for part in ("optimizer", "scheduler"):
        if mine[part] not in (None, theirs[part]):
            raise CheckpointError(f"{path}: {part} {mine[part]} cannot take the state of {theirs[part]}")
    if optimizer is not None and mine["parameters"] != theirs["parameters"]:
        sizes = [[len(group) for group in owner["parameters"]] for owner in (theirs, mine)]
        raise CheckpointError(
            f"{path}: the optimizer has other parameters, groups or order: sizes of groups {sizes[0]} in the file, "
            f"{sizes[1]} now. Build it the way it was built for this run"
        )
    model.load_state_dict(saved["model"])
    if optimizer is not None:
        optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    return saved


def step_path(directory: str | Path, step: int) -> Path:
    """Return the name of the checkpoint after ``step`` updates; names sort like steps."""
    return Path(directory) / f"step-{step:010d}.safetensors"


def latest(directory: str | Path) -> Path | None:
    """Return the newest checkpoint in a run's folder, or None where there is none."""
    return max(Path(directory).glob("step-*.safetensors"), default=None)


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints (at least 1), and what a killed process left half written."""
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint must stay")
    folder = Path(directory)
    for path in [*sorted(folder.glob("step-*.safetensors"))[:-keep], *folder.glob(".step-*.partial")]:
        path.unlink(missing_ok=True)


# ---- weights to ship ------------------------------------------------------------------------------------------


def save_weights(
    model: nn.Module, path: str | Path, config: Any, record: Any = None, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a model's weights for use, with the configuration that builds it and the record of how they were made.

    The tensors keep their names, so any program that reads safetensors can use them. A copy of the header goes
    to the same name with ``.json``, for people to read; it is never read back.

    Parameters
    ----------
    model : nn.Module
        Its ``state_dict`` is stored; tied weights once.
    path : str or Path
        The file, by custom ``*.safetensors``.
    config, record : mapping or dataclass
        Plain JSON values.
    dtype : torch.dtype, optional
        For example ``torch.float16``: floating-point tensors are stored in it, at half the size.

    Raises
    ------
    ValueError
        If a finite weight is not finite in ``dtype``.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    names = encode(dict(model.state_dict()), tensors)
    for name, tensor in tensors.items():
        if dtype is not None and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
            if not torch.equal(tensors[name].isfinite(), tensor.isfinite()):
                raise ValueError(f"{name} has values beyond the range of {dtype}; use torch.bfloat16 or no dtype")
    write(path, "weights", tensors, {"config": plain(config), "record": plain(record), "names": names})
    shown = {key: value for key, value in describe(path).items() if key != "names"}
    path.with_suffix(".json").write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
    return path


def load_weights(path: str | Path, model: nn.Module) -> dict[str, Any]:
    """Put stored weights into a model; return the header, with ``"config"`` and ``"record"``.

    Half-precision weights are converted to the model's own dtype.

    Raises
    ------
    CheckpointError
        If the file is missing or damaged, or does not fit; the model is then as it was.
    """
    path = Path(path)
    header, tensors = read(path, "weights")
    saved = decode(header["names"], tensors)
    _require_fit(path, saved, model.state_dict(), dtypes=False)
    model.load_state_dict(saved)
    return header
