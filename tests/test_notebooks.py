"""Every notebook is a test of the library.

nbdev runs a cell marked `#| export` as it stands in the notebook, so the file under `oral4/` is not what it tests.
Here the exported cells are taken from the library instead: what the notebooks show is then what users import.
"""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import notebook
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = notebook.notebooks()
IDS = [p.relative_to(notebook.NBS).as_posix() for p in NOTEBOOKS]
PLAIN = {"settings", "errors", "exercises", "cli", "_modidx", "__init__"}  # written as .py, beside the packages below
PLAIN_PACKAGES = {"data", "measure", "viz", "train"}
# what only serves a chapter: its corpora, its training runs, what its experiments do with one seed
SERVING = {
    ("diffvc", name) for name in ("corpus", "training", "full_training", "study", "theorem", "conditioning", "speed")
} | {("dp", name) for name in ("corpus", "recipe", "classify", "worlds", "speed", "gpu_cost")}


def runnable(path: Path, left_out: set[str]) -> list[str]:
    """Code of the cells: the exported ones import the module, the flagged ones are left out."""
    nb, sources = notebook.load(path), []
    module = notebook.module_of(nb)
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        found, code = notebook.directives(cell["source"])
        if notebook.EXPORTS & found.keys():
            name = next((found[e] for e in notebook.EXPORTS & found.keys() if found[e]), module)
            code = (
                f"import oral4.{name} as _module\n"
                "globals().update({k: v for k, v in vars(_module).items() if not k.startswith('__')})"
            )
        elif left_out & found.keys() or found.get("eval") == "false":
            continue
        elif found.get("error") == "true":
            code = (
                f"try:\n{_indent(code)}\nexcept Exception as _error:\n    print(type(_error).__name__, _error)\n"
                "else:\n    raise AssertionError('this cell should show an error')"
            )
        if code.strip():
            sources.append(code)
    return sources


def _indent(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_notebook_runs_with_the_library(path, request, monkeypatch):
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(path.parent)
    settings = plt.rcParams.copy()
    shell = InteractiveShell()
    try:
        for number, code in enumerate(runnable(path, notebook.FULL_SCALE - set(request.config.getoption("--run")))):
            result = shell.run_cell(code)
            error = result.error_before_exec or result.error_in_exec
            if error is not None:
                raise AssertionError(f"{path.name}, code cell {number}:\n{code}") from error
            plt.close("all")
    finally:
        plt.close("all")
        plt.rcParams.update(settings)


def test_library_is_what_the_notebooks_export():
    """`make export` changes nothing: notebooks and library are in step."""
    library = ROOT / "oral4"
    before = {p: p.read_bytes() for p in library.rglob("*.py")}
    try:
        subprocess.run(
            [sys.executable, "-c", "from nbdev.doclinks import nbdev_export as f; f.__wrapped__()"],
            cwd=ROOT,
            check=True,
        )
        after = {p: p.read_bytes() for p in library.rglob("*.py")}
    finally:
        for p, content in before.items():
            if p.read_bytes() != content:
                p.write_bytes(content)
    changed = sorted(str(p.relative_to(ROOT)) for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    assert not changed, f"run `make export` and commit: {changed}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_notebook_is_clean(path):
    """No output and no stray metadata is committed."""
    from execnb.nbio import read_nb
    from nbdev.clean import clean_nb

    nb, again = read_nb(path), read_nb(path)
    clean_nb(again, clear_all=True, allowed_metadata_keys=["mystnb"])
    assert nb == again, "run `make export`, which also cleans"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_notebook_keeps_the_contract(path):
    """Title and subtitle, known directives, captions and alt texts, unique labels."""
    nb = notebook.load(path)
    first = next(c["source"] for c in nb["cells"] if c["cell_type"] == "markdown" and not c["source"].startswith("("))
    lines = [line for line in first.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and lines[1].startswith("> "), "the first cell is `# Title` and `> subtitle`"
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            found, code = notebook.directives(cell["source"])
            assert ("fig-cap" in found) == ("fig-alt" in found), (
                f"a figure needs caption and alt text: {cell['source'][:80]}"
            )
            assert "nbdev" not in code and "fastcore" not in code, "Colab has neither"
            assert not any(line.startswith(("%", "!")) for line in code.splitlines()), (
                f"magics do not run everywhere: {code[:80]}"
            )
    ids = [c["id"] for c in nb["cells"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_recorded_figures_say_where_they_come_from(path):
    """A page that draws or prints from a record shows the record's provenance line, once for each record."""
    code = "\n".join(c["source"] for c in notebook.load(path)["cells"] if c["cell_type"] == "code")
    assert code.count("load_record(") <= code.count(".provenance()"), "end with load_record(...).provenance()"


def modules() -> list[Path]:
    return sorted(p for p in (ROOT / "oral4").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_imports(path):
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_has_an_owner(path):
    """A module comes from the notebook that it names, or is written by hand where the house says so; never neither."""
    text = path.read_text(encoding="utf8")
    parts = path.relative_to(ROOT / "oral4").with_suffix("").parts
    if "AUTOGENERATED" in text and "File to edit:" in text:
        head = next(line for line in text.splitlines() if "File to edit:" in line)
        source = (path.parent / head.split("File to edit:")[1].strip().rstrip(".")).resolve()
        assert source.exists() and f"default_exp {'.'.join(parts)}" in source.read_text(encoding="utf8"), (
            f"{path} has no notebook any more"
        )
    else:
        assert parts[0] in PLAIN | PLAIN_PACKAGES or parts[-1] in ("__init__", "cli") or parts in SERVING, (
            f"{path} is not exported by a notebook"
        )
        if len(parts) > 1 and parts[-1] == "__init__" and parts[0] not in PLAIN_PACKAGES:
            assert not ast.parse(text).body or ast.get_docstring(ast.parse(text)) is not None, (
                "packages of chapters stay light"
            )


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_public_module_is_in_the_reference(path):
    """A module with public names is documented on a page of `nbs/api`."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if getattr(importlib.import_module(name), "__all__", None) and path.stem != "__init__":
        pages = "".join(p.read_text(encoding="utf8") for p in (ROOT / "nbs/api").glob("*.md"))
        assert f"automodule:: {name}\n" in pages, f"add {name} to a page of nbs/api"


def test_every_notebook_is_in_the_book():
    toc = (ROOT / "_toc.yml").read_text(encoding="utf8")
    missing = [p.relative_to(ROOT).with_suffix("").as_posix() for p in NOTEBOOKS]
    assert not [name for name in missing if f"{name}\n" not in toc + "\n"]


def test_notebooks_are_valid():
    import nbformat

    for path in NOTEBOOKS:
        nbformat.validate(json.loads(path.read_text(encoding="utf8")))
