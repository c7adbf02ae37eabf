"""The examples in docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import oral4

MODULES = sorted(m.name for m in pkgutil.walk_packages(oral4.__path__, "oral4.") if not m.name.endswith("_modidx"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
