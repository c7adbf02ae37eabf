"""``import oral4`` is light, and what it offers is imported when it is asked for."""

import statistics
import subprocess
import sys

import pytest

import oral4

BUDGET_SECONDS = 0.05


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def seconds(arguments: list[str]) -> float:
    """Processor time of a fresh interpreter: other programs on the machine do not count."""
    resource = pytest.importorskip("resource")

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return spent() - before


def test_import_takes_less_than_fifty_milliseconds():
    bare, ours = [], []
    for _ in range(9):  # in turns, so that a slow moment slows both
        bare.append(seconds(["-c", "pass"]))
        ours.append(seconds(["-c", "import oral4"]))
    assert statistics.median(ours) - statistics.median(bare) < BUDGET_SECONDS


def test_the_measurement_sees_a_heavy_import():
    light = statistics.median(seconds(["-c", "pass"]) for _ in range(3))
    heavy = statistics.median(seconds(["-c", "import numpy"]) for _ in range(3))
    assert heavy - light > BUDGET_SECONDS


def test_import_loads_nothing_else():
    loaded = python("import sys; before = set(sys.modules); import oral4; print(sorted(set(sys.modules) - before))")
    assert loaded.strip() == "['oral4']"


def test_a_submodule_is_imported_when_it_is_asked_for():
    code = "import sys, oral4; print('oral4.settings' in sys.modules, oral4.settings.scale('smoke'))"
    assert python(code).split() == ["False", "smoke"]


def test_dir_names_the_submodules():
    assert {"settings", "errors", "measure", "cli", "__version__"} <= set(dir(oral4))


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'oral4' has no attribute 'nothing'"):
        oral4.nothing  # noqa: B018
    assert not hasattr(oral4, "__wrapped__")


def test_a_submodule_that_lacks_a_package_says_which(tmp_path, monkeypatch):
    """An import error inside a submodule must not look as if the submodule were absent."""
    (tmp_path / "needy.py").write_text("import no_such_package")
    monkeypatch.setattr(oral4, "__path__", [*oral4.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        oral4.needy  # noqa: B018


def test_version_is_a_plain_literal():
    """The release command rewrites this line of the file."""
    with open(oral4.__file__, encoding="utf-8") as source:
        assert f'__version__ = "{oral4.__version__}"\n' in source.readlines()
