"""The file under checkpoints: any tree comes back equal, damage is noticed, an interrupted write loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from oral4.errors import CheckpointError
from oral4.train import storage
from oral4.train.storage import SCHEMA, decode, describe, encode, read, write

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def tensors_of(dtype, shape):
    values = (
        torch.arange(torch.Size(shape).numel()) % 2 if dtype == torch.bool else torch.arange(torch.Size(shape).numel())
    )
    return values.to(dtype).reshape(shape)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TENSORS = st.builds(tensors_of, st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3))
KEYS = st.integers() | st.text() | st.sampled_from(["$tensor", "$tuple", "/", ""])
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda tree: (
        st.lists(tree, max_size=3) | st.lists(tree, max_size=3).map(tuple) | st.dictionaries(KEYS, tree, max_size=3)
    ),
    max_leaves=12,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


@given(TREES)
def test_trees_come_back_equal(tree):
    tensors = {}
    text = json.dumps(encode(tree, tensors), allow_nan=False)
    assert equal(decode(json.loads(text), tensors), tree)


def test_tensors_come_back_through_the_file(tmp_path):
    tree = {str(dtype): tensors_of(dtype, (2, 3)) for dtype in DTYPES} | {
        "scalar": torch.tensor(3.0),
        "none": torch.ones(0, 2),
    }
    tensors = {}
    names = encode(tree, tensors)
    write(tmp_path / "a.safetensors", "test", tensors, {"names": names})
    header, stored = read(tmp_path / "a.safetensors", "test")
    assert equal(decode(header["names"], stored), tree)
    assert (header["schema"], header["kind"]) == (SCHEMA, "test")
    other = load_file(tmp_path / "a.safetensors")  # an ordinary safetensors file
    assert other.keys() == stored.keys() and all(equal(other[name], stored[name]) for name in stored)


def test_shared_memory_is_stored_once_and_only_when_it_is_the_same():
    matrix = torch.arange(12.0).reshape(3, 4)
    tree = {"a": matrix, "b": matrix, "transposed": matrix.T, "row": matrix[0], "expanded": torch.ones(1).expand(3)}
    tensors = {}
    names = encode(tree, tensors)
    assert names["b"] == names["a"] == {"$tensor": "a"} and set(tensors) == {"a", "transposed", "row", "expanded"}
    assert equal(decode(names, tensors), tree)
    assert decode(names, tensors)["a"].data_ptr() != decode(names, tensors)["b"].data_ptr()


def test_names_what_cannot_be_stored():
    with pytest.raises(TypeError, match=r"state/rule/1: a function cannot be stored in a checkpoint"):
        encode({"state": {"rule": [1, lambda: 2]}}, {})
    with pytest.raises(TypeError, match=r"x: a ndarray cannot"):
        encode({"x": torch.ones(2).numpy()}, {})


def small(path, value=1.0):
    write(path, "test", {"x": torch.full((50,), value)}, {"value": value})
    return path


@pytest.mark.parametrize("cut", [0, 4, 8, 20, 200, -1])
def test_cut_file_is_an_error(tmp_path, cut):
    path = small(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read(path, "test")


def test_each_flipped_byte_is_an_error(tmp_path):
    path = small(tmp_path / "a.safetensors")
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError):
            read(path, "test")


def test_other_files_are_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        describe(path)
    with pytest.raises(CheckpointError, match=r"cannot be read: (Is a directory|Permission denied)"):
        describe(tmp_path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="has no header of oral4"):
        describe(path)
    save_file({"x": torch.ones(2)}, path, metadata={"oral4": json.dumps({"schema": SCHEMA + 1, "kind": "test"})})
    with pytest.raises(CheckpointError, match=rf"has schema {SCHEMA + 1}, this oral4 reads {SCHEMA}"):
        describe(path)
    torch.save({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        describe(path)
    with pytest.raises(CheckpointError, match="holds 'test', not 'weights'"):
        read(small(path), "weights")


def half_written(tensors, path, metadata):
    Path(path).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{ half")
    raise OSError("no space left on device")


def fails(*args):
    raise KeyboardInterrupt


STAGES = {
    "digest": ("_digest", fails),
    "write": ("save_file", half_written),
    "flush": ("_flush", fails),
    "rename": ("os.replace", fails),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("exists", [True, False])
def test_failure_at_any_stage_keeps_the_old_file(tmp_path, monkeypatch, stage, exists):
    path = tmp_path / "a.safetensors"
    if exists:
        small(path, 1.0)
    name, failure = STAGES[stage]
    with monkeypatch.context() as patch:
        patch.setattr(f"oral4.train.storage.{name}", failure)
        with pytest.raises((OSError, KeyboardInterrupt)):
            small(path, 2.0)
    assert [file.name for file in tmp_path.iterdir()] == (["a.safetensors"] if exists else [])
    if exists:
        assert read(path, "test")[0]["value"] == 1.0
    assert read(small(path, 3.0), "test")[0]["value"] == 3.0


def test_failure_after_the_rename_leaves_the_new_file(tmp_path, monkeypatch):
    path = small(tmp_path / "a.safetensors", 1.0)
    flush = storage._flush
    monkeypatch.setattr(storage, "_flush", lambda path: fails() if path.is_dir() else flush(path))
    with pytest.raises(KeyboardInterrupt):
        small(path, 2.0)
    assert read(path, "test")[0]["value"] == 2.0


def test_killed_process_leaves_the_old_file(tmp_path):
    path = small(tmp_path / "a.safetensors", 1.0)
    program = f"""
import os, torch
from pathlib import Path
from oral4.train import storage
storage._flush = lambda path: os._exit(9)  # gone at once: nothing is tidied up
storage.write(Path({str(path)!r}), "test", {{"x": torch.zeros(50)}}, {{"value": 2.0}})
"""
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ)).returncode == 9
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.safetensors.partial", "a.safetensors"]
    assert read(path, "test")[0]["value"] == 1.0
    assert read(small(path, 3.0), "test")[0]["value"] == 3.0
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_file_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    order = []
    flush, replace = storage._flush, os.replace
    monkeypatch.setattr(storage, "_flush", lambda path: (order.append(path.name), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    small(tmp_path / "a.safetensors")
    assert order == [".a.safetensors.partial", "rename", tmp_path.name]
