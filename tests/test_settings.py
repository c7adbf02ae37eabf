"""An argument wins over the variable, the variable over the default, and a wrong value is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oral4 import settings

VARIABLES = ("ORAL4_SCALE", "ORAL4_DEVICE", "ORAL4_CACHE", "ORAL4_DATA", "ORAL4_OFFLINE", "ORAL4_RERUN")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_module_documents_every_variable():
    for name in VARIABLES:
        assert name in settings.__doc__


def test_torch_is_not_imported():
    code = "import sys, oral4.settings, oral4.errors; sys.exit('torch' in sys.modules or 'pooch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- scale ------------------------------------------------------------------------------------------------------


def test_scale_order(monkeypatch):
    assert settings.scale() == "mini"
    monkeypatch.setenv("ORAL4_SCALE", " gpu ")
    assert settings.scale() == "gpu"
    assert settings.scale("paper") == "paper"
    monkeypatch.setenv("ORAL4_SCALE", "")
    assert settings.scale() == "mini"


@pytest.mark.parametrize("value", settings.SCALES)
def test_every_scale(value, monkeypatch):
    assert settings.scale(value) == value
    monkeypatch.setenv("ORAL4_SCALE", value)
    assert settings.scale() == value


@given(st.text().filter(lambda text: text not in settings.SCALES))
def test_any_other_scale_is_refused(value):
    with pytest.raises(ValueError, match="choose one of smoke, mini, gpu, paper"):
        settings.scale(value)


def test_a_wrong_scale_says_where_it_stands(monkeypatch):
    monkeypatch.setenv("ORAL4_SCALE", "huge")
    with pytest.raises(ValueError, match="ORAL4_SCALE='huge' is unknown; choose one of smoke, mini, gpu, paper"):
        settings.scale()
    with pytest.raises(ValueError, match=r"^scale='Mini' is unknown"):
        settings.scale("Mini")


# --- device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cuda, mps, kind", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_device_default(cuda, mps, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert settings.device() == torch.device(kind)


def test_device_order(monkeypatch):
    monkeypatch.setenv("ORAL4_DEVICE", "meta")
    assert settings.device() == torch.device("meta")
    assert settings.device("cpu") == torch.device("cpu")
    assert settings.device(torch.device("cpu", 0)) == torch.device("cpu", 0)


@pytest.mark.parametrize("value", ["gpu", "cuda:x", "cpu:-2", "", "cuda:99"])
def test_a_wrong_device_is_refused_at_once(value, monkeypatch):
    with pytest.raises(ValueError, match=f"^device='{value}' cannot be used here: ."):
        settings.device(value)
    if value:
        monkeypatch.setenv("ORAL4_DEVICE", value)
        with pytest.raises(ValueError, match=f"^ORAL4_DEVICE='{value}' cannot be used here"):
            settings.device()


# --- folders ----------------------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "not yet there"))
    assert settings.cache_dir() == tmp_path / "not yet there"
    assert not settings.cache_dir().exists()
    monkeypatch.delenv("ORAL4_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default = settings.cache_dir()
    assert "oral4" in default.parts and default.is_absolute()
    if sys.platform == "linux":
        assert default == tmp_path / "oral4"


def test_data_dir(monkeypatch, tmp_path):
    assert settings.data_dir() is None
    monkeypatch.setenv("ORAL4_DATA", " ")
    assert settings.data_dir() is None
    monkeypatch.setenv("ORAL4_DATA", str(tmp_path))
    assert settings.data_dir() == tmp_path


@pytest.mark.parametrize("name, function", [("ORAL4_DATA", settings.data_dir), ("ORAL4_CACHE", settings.cache_dir)])
def test_folders_are_absolute(name, function, monkeypatch, tmp_path):
    """A message that names them can be followed from anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, os.path.join("a", "b"))
    assert function() == tmp_path / "a" / "b"
    monkeypatch.setenv(name, os.path.join("~", "b"))
    assert function() == Path.home() / "b"


# --- switches ---------------------------------------------------------------------------------------------------

SWITCHES = [("ORAL4_OFFLINE", settings.offline), ("ORAL4_RERUN", settings.rerun)]


@pytest.mark.parametrize("name, function", SWITCHES)
def test_switches(name, function, monkeypatch):
    assert function() is False
    for text in ("1", "true", "Yes", "ON", " 1 "):
        monkeypatch.setenv(name, text)
        assert function() is True
    for text in ("0", "false", "No", "OFF", "", " "):
        monkeypatch.setenv(name, text)
        assert function() is False


@pytest.mark.parametrize("name, function", SWITCHES)
@pytest.mark.parametrize("text", ["2", "y e s", "offline", "-1"])
def test_a_wrong_switch_is_refused(name, function, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}='{text}' is not understood; choose 1 or 0"):
        function()


def test_offline_argument_wins(monkeypatch):
    monkeypatch.setenv("ORAL4_OFFLINE", "1")
    assert settings.offline(False) is False
    assert settings.offline(None) is True
    monkeypatch.setenv("ORAL4_OFFLINE", "0")
    assert settings.offline(True) is True
