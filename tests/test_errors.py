"""The errors say what to do, travel between processes, and ``require`` tells absent from broken."""

import copy
import pickle
import sys

import pytest

from oral4 import errors
from oral4.errors import CheckpointError, DataError, MissingExtra, OralError, require


def test_one_root():
    for kind in (DataError, CheckpointError, MissingExtra):
        assert issubclass(kind, OralError)
        assert not issubclass(kind, ValueError), "a wrong argument is not one of these"
    assert not issubclass(DataError, CheckpointError) and not issubclass(CheckpointError, DataError)


def test_all_are_exported():
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == "oral4.errors"}
    assert defined == set(errors.__all__)


def test_a_missing_extra_names_the_pip_line():
    error = MissingExtra("rdkit", "molecules")
    assert str(error) == 'This needs rdkit: pip install "oral4[molecules]"'
    assert (error.package, error.extra) == ("rdkit", "molecules")


@pytest.mark.parametrize(
    "error", [MissingExtra("rdkit", "molecules"), DataError("text"), CheckpointError("text")], ids=repr
)
def test_errors_travel_between_processes(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_require_imports_modules_and_submodules():
    import xml.dom

    assert require("json", "all") is sys.modules["json"]
    assert require("xml.dom", "all") is xml.dom


@pytest.mark.parametrize(
    "name, missing",
    [
        ("no_such_package", "no_such_package"),
        ("no_such_package.part", "no_such_package"),
        ("json.no_such_part", "json.no_such_part"),
    ],
)
def test_require_names_what_is_missing(name, missing):
    with pytest.raises(MissingExtra, match=rf'^This needs {missing}: pip install "oral4\[voice\]"$') as caught:
        require(name, "voice")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_ordinary_except_clause_works():
    try:
        require("no_such_package", "voice")
    except ImportError as error:
        assert isinstance(error, MissingExtra)


def test_a_package_that_is_blocked_counts_as_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "colorsys", None)
    with pytest.raises(MissingExtra, match="colorsys"):
        require("colorsys", "voice")


@pytest.mark.parametrize(
    "code, kind, text",
    [
        ("import absent_dependency", ModuleNotFoundError, "absent_dependency"),
        ("import broken_packages_of_others", ModuleNotFoundError, "broken_packages_of_others"),
        ("from json import no_such_name", ImportError, "no_such_name"),
        ("raise RuntimeError('no GPU')", RuntimeError, "no GPU"),
    ],
)
def test_a_broken_package_keeps_its_own_error(tmp_path, monkeypatch, code, kind, text):
    """To install the extra again would not help, so it is not proposed."""
    (tmp_path / "broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind, match=text) as caught:
        require("broken_package", "voice")
    assert not isinstance(caught.value, MissingExtra)
