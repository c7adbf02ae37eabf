"""Who may import whom: a module imports only from lower levels or its own package; a chapter never another chapter."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = {"diffvc", "geodiff", "pyraformer", "flan", "dp", "milan"}
LEVELS = {
    "__init__": 0, "_modidx": 0, "settings": 0, "errors": 0,
    "data": 1, "nn": 1, "diffusion": 1, "measure": 1, "viz": 1, "exercises": 1,
    "train": 2,
    **dict.fromkeys(CHAPTERS, 3),
    "cli": 4,
}  # fmt: skip


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Top-level parts of oral4 that a file imports, also inside functions."""
    package = list(path.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [
                *(package[: len(package) - node.level + 1] if node.level else []),
                *((node.module or "").split(".") if node.module else []),
            ]
            names = [".".join([*base, a.name]) for a in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("oral4.")}
    return found


def violations(path: Path, root: Path = ROOT) -> list[str]:
    own = path.relative_to(root / "oral4").with_suffix("").parts[0]
    assert own in LEVELS, f"{path}: say in tests/test_levels.py at which level {own!r} stands"
    out = []
    for other in imports(path, root) - {own, "__version__"}:
        if other not in LEVELS:
            out.append(f"{own} imports oral4.{other}, which has no level")
        elif LEVELS[other] >= LEVELS[own] and own != "__init__":
            out.append(f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})")
    return out


@pytest.mark.parametrize("path", sorted((ROOT / "oral4").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    assert not violations(path)


@pytest.mark.parametrize(
    "line",
    [
        "from oral4.geodiff import x",
        "import oral4.cli",
        "from ..dp.engine import ClipEngine",
        "def f():\n    from oral4 import flan",
    ],
)
def test_the_rule_can_fail(line, tmp_path):
    file = tmp_path / "oral4/pyraformer/graph.py"
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert violations(file, tmp_path)
