from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import oral4
import oral4.measure.environment as environment


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Reader", "-c", "user.email=reader@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Let ``oral4`` seem to lie in a repository of its own."""
    package = tmp_path / "repository" / "oral4"
    (package / "records").mkdir(parents=True)
    (package / "__init__.py").write_text("x = 1\n")
    (package / "records" / "a.json").write_text("{}\n")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(oral4, "__file__", str(package / "__init__.py"))
    return package


def test_a_clean_checkout(package):
    assert environment.checkout() == package.parent.resolve()
    assert environment.commit() == (git(package.parent, "rev-parse", "HEAD"), False)


def test_a_changed_library_is_dirty(package):
    (package / "__init__.py").write_text("x = 2\n")
    assert environment.commit()[1] is True


def test_a_new_module_is_dirty(package):
    (package / "new.py").write_text("x = 1\n")
    assert environment.commit()[1] is True


def test_records_and_other_folders_do_not_make_it_dirty(package):
    (package / "records" / "a.json").write_text("{ }\n")
    (package / "records" / "b.json").write_text("{}\n")
    (package.parent / "notes.txt").write_text("later\n")
    assert environment.commit()[1] is False


def test_a_copy_inside_another_repository_is_no_checkout(package, monkeypatch):
    copy = package.parent / ".venv" / "lib" / "oral4"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text("x = 1\n")
    monkeypatch.setattr(oral4, "__file__", str(copy / "__init__.py"))
    assert environment.checkout() is None
    assert environment.commit() == ("unknown", False)


def test_a_folder_that_the_repository_does_not_track_is_no_checkout(package):
    git(package.parent, "rm", "-q", "--cached", "oral4/__init__.py")
    assert environment.checkout() is None


def test_outside_a_repository(tmp_path, monkeypatch):
    (tmp_path / "oral4").mkdir()
    monkeypatch.setattr(oral4, "__file__", str(tmp_path / "oral4" / "__init__.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.commit() == ("unknown", False)


def test_without_git(package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.commit() == ("unknown", False)


def test_versions():
    found = environment.versions(["numpy", "no-such-package"])
    assert found == {"python": platform.python_version(), "oral4": oral4.__version__, "numpy": found["numpy"]}


def test_device_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert environment.device_words().endswith(
        f", {cores} of {os.cpu_count()} core{'s' if os.cpu_count() != 1 else ''}"
    )


def torch_with(cuda_used: bool, mps_bytes: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        get_num_threads=lambda: 1,
        cuda=SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: cuda_used,
            get_device_name=lambda: "NVIDIA H200",
            device_count=lambda: 2,
            max_memory_allocated=lambda index: 1000 * (index + 1),
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)),
        mps=SimpleNamespace(driver_allocated_memory=lambda: mps_bytes),
    )


def test_a_gpu_is_named_only_if_it_was_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch_with(cuda_used=True))
    assert environment.device_words().startswith("NVIDIA H200; ")
    assert environment.peak_accelerator_bytes() == 3000
    monkeypatch.setitem(sys.modules, "torch", torch_with(cuda_used=False))
    assert "NVIDIA" not in environment.device_words() and ", 1 of " in environment.device_words()
    assert environment.peak_accelerator_bytes() is None
    monkeypatch.setitem(sys.modules, "torch", torch_with(cuda_used=False, mps_bytes=7))
    assert environment.device_words().startswith("Apple GPU; ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: AMD  EPYC 9B14\n", "AMD EPYC 9B14"),
        ("Model\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
    ],
)
def test_processor_by_its_name(tmp_path, monkeypatch, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "cpuinfo")
    assert environment._processor() == expected


def test_processor_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "absent")
    monkeypatch.setattr(environment.platform, "processor", lambda: "")
    assert environment._processor() == platform.machine()


@pytest.mark.parametrize(("system", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_without_proc(tmp_path, monkeypatch, system, factor):
    """Elsewhere getrusage says it: in bytes on macOS, in kilobytes on the others."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "absent")
    monkeypatch.setattr(environment, "sys", SimpleNamespace(platform=system))
    assert environment.peak_resident_bytes() == 5000 * factor


def test_peak_where_nothing_says_it(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert environment.peak_resident_bytes() is None


def test_peak_never_falls():
    before = environment.peak_resident_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert environment.peak_resident_bytes() >= before
