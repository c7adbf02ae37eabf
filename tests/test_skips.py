"""SKIPS.md lists tests that exist, and only what can be skipped."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import listed_skips

HERE = Path(__file__).parent


def test_every_line_names_a_test():
    for name in listed_skips():
        file, _, function = name.partition("::")
        assert (HERE / file).exists(), name
        assert re.search(rf"def {re.escape(function.split('::')[-1])}\(", (HERE / file).read_text(encoding="utf8")), (
            name
        )


def test_an_unlisted_skip_fails(tmp_path):
    for name in ("conftest.py", "SKIPS.md"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_a():\n    pytest.skip('because')\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "has no line for it" in run.stdout and run.returncode == 1
