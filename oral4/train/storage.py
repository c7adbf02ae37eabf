"""One file of tensors and JSON that is either whole or not there: the layout under checkpoints and weights.

The tensors are ordinary safetensors; everything else is JSON in the header that every safetensors file has.
One file makes atomicity simple: the bytes go to ``.<name>.partial`` in the same folder, are flushed to the disk,
and one rename puts them in place. Before that rename the old file is whole, after it the new one. Reading runs no
code from the file and checks a SHA-256 over all of it.

>>> encode({"betas": (0.9, 0.999), "state": {0: torch.ones(2)}}, tensors := {})
{'betas': {'$tuple': [0.9, 0.999]}, 'state': {'$pairs': [[0, {'$tensor': 'state/0'}]]}}
>>> tensors
{'state/0': tensor([1., 1.])}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oral4.errors import CheckpointError

__all__ = ["SCHEMA", "decode", "describe", "encode", "read", "write"]

SCHEMA = 1
"""Version of the layout. A file with another one is refused, not guessed at."""


def encode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return ``tree`` as JSON values; each tensor goes to ``tensors`` on the CPU and leaves its name behind.

    JSON has no tuples, integer keys or infinities: they become objects whose only key begins with ``$``.
    Tied weights, the same memory under two names, are stored once.

    Parameters
    ----------
    tree : dict, list, tuple, str, int, float, bool, None or Tensor, nested
        What to store.
    tensors : dict of str to Tensor
        Receives copies, under names such as ``"optimizer/state/0/exp_avg"``.

    Raises
    ------
    TypeError
        If something else is found; the message names where.
    """
    seen: dict[tuple, str] = {}

    def visit(tree: Any, name: str) -> Any:
        if isinstance(tree, Tensor):
            # An empty tensor has no memory to share, hence its name instead.
            memory = (tree.data_ptr() or name, tree.shape, tree.stride(), tree.dtype, tree.device)
            if memory not in seen:
                seen[memory] = name
                tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
            return {"$tensor": seen[memory]}
        if isinstance(tree, dict):
            pairs = [[key, visit(value, f"{name}/{key}".lstrip("/"))] for key, value in tree.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
            return dict(pairs) if plain else {"$pairs": pairs}
        if isinstance(tree, list | tuple):
            values = [visit(value, f"{name}/{index}") for index, value in enumerate(tree)]
            return {"$tuple": values} if isinstance(tree, tuple) else values
        if isinstance(tree, float) and tree - tree != 0:  # inf or nan
            return {"$float": str(float(tree))}
        if tree is None or isinstance(tree, bool | int | float | str):
            return tree
        allowed = "only dict, list, tuple, str, numbers, None and tensors can"
        raise TypeError(f"{name}: a {type(tree).__name__} cannot be stored in a checkpoint; {allowed}")

    return visit(tree, "")


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`encode`; every tensor is a copy that belongs to the caller."""
    if isinstance(tree, list):
        return [decode(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    match next(iter(tree), ""):
        case "$tensor":
            return tensors[tree["$tensor"]].clone()
        case "$tuple":
            return tuple(decode(tree["$tuple"], tensors))
        case "$pairs":
            return {key: decode(value, tensors) for key, value in tree["$pairs"]}
        case "$float":
            return float(tree["$float"])
    return {key: decode(value, tensors) for key, value in tree.items()}


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over everything in the file: safetensors itself notices a cut file, but no flipped bit."""
    digest = hashlib.sha256(json.dumps({key: header[key] for key in header if key != "sha256"}).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make the operating system write a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder, and flushes names by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, kind: str, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to ``path``, replacing an older file only once the new one is complete."""
    header = {"kind": kind, "schema": SCHEMA, **header}
    text = json.dumps({**header, "sha256": _digest(header, tensors)}, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    try:
        save_file(tensors, partial, metadata={"oral4": text})
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def describe(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint or a weights file says about itself; its tensors are not read.

    Returns
    -------
    dict
        Among others ``"kind"`` (``"checkpoint"`` or ``"weights"``), ``"config"``, and ``"state"`` or ``"record"``.

    Raises
    ------
    CheckpointError
        If the file is missing, is not one of ours, or has another schema version.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size - 8:
                raise CheckpointError(f"{path} is no safetensors file, or it was cut short")
            header = json.loads(json.loads(file.read(size))["__metadata__"]["oral4"])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} has no header of oral4: another program wrote it, or it is damaged") from error
    if header.get("schema") != SCHEMA:
        found = header.get("schema")
        raise CheckpointError(f"{path} has schema {found!r}, this oral4 reads {SCHEMA}; use the oral4 that wrote it")
    return header


def read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a file of this kind.

    Raises
    ------
    CheckpointError
        As :func:`describe`, and if the file is damaged or of another kind.
    """
    header = describe(path)
    if header.get("kind") != kind:
        raise CheckpointError(f"{path} holds {header.get('kind')!r}, not {kind!r}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or was cut short: {error}") from error
    if _digest(header, tensors) != header.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its SHA-256")
    return header, tensors
