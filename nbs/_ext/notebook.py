"""One notebook, four readers: nbdev exports it, the book shows it, the kernel runs it and Colab opens it.

The author writes nbdev directives (`#| export`), a few HTML comments (`<!-- card -->`) and the MyST that
`CONTRIBUTING.md` lists. This module turns that one source into what each reader needs:

* :func:`prepare`: what is executed. Directives become tags; the code is otherwise untouched.
* :func:`page`: what Sphinx reads. The prepared notebook plus the card, links to the API and the provenance line.
* :func:`colab`: what Colab and a download give. No directive, no role; an install cell that acts only on Colab.
"""

from __future__ import annotations

import ast
import configparser
import copy
import hashlib
import json
import os
import re
from functools import cache
from html import escape
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[2]
NBS = ROOT / "nbs"
CACHE = ROOT / "_build/.jupyter_cache"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
EXPORTS = {"export", "exports", "exporti"}
FULL_SCALE = {"slow", "gpu", "net"}  # left out below full scale, with a badge that says so
TAGS = {
    "hide": "remove-cell",
    "default_exp": "remove-cell",
    "hide_input": "remove-input",
    "hide_output": "remove-output",
    "exporti": "hide-input",
    "export": "exported",
    "exports": "exported",
    "exercise": "exercise",
}
VALUED_TAGS = {
    ("echo", "false"): "remove-input",
    ("output", "false"): "remove-output",
    ("include", "false"): "remove-cell",
    ("code-fold", "true"): "hide-input",
    ("eval", "false"): "skip-execution",
    ("error", "true"): "raises-exception",
}
KNOWN = {
    *TAGS,
    *FULL_SCALE,
    *(name for name, _ in VALUED_TAGS),
    "solution",
    "label",
    "fig-cap",
    "fig-alt",
    "code-summary",
}


@cache
def address() -> dict[str, str]:
    """Address of the repository and of the site, from settings.ini (the one place where it is written)."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "settings.ini", encoding="utf8")
    s = parser["DEFAULT"]
    return {
        "user": s["user"],
        "repo": s["repo"],
        "branch": s["branch"],
        "version": s["version"],
        "repo_url": s["git_url"],
        "site_url": s["doc_host"] + s["doc_baseurl"] + "/",
        "site_path": s["doc_baseurl"] + "/",
    }


def notebooks() -> list[Path]:
    """Every notebook of the book."""
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(x[0] in "._" for x in p.relative_to(ROOT).parts))


def for_colab() -> list[Path]:
    """Notebooks that offer themselves to Colab and to download: those with a card."""
    return [p for p in notebooks() if any(CARD.match(c["source"]) for c in load(p)["cells"])]


def load(path: Path) -> dict:
    """Read a notebook; sources are joined to strings."""
    nb = json.loads(path.read_text(encoding="utf8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def directives(source: str) -> tuple[dict[str, str], str]:
    """Split the leading `#|` lines from the code, as nbdev does.

    Raises
    ------
    ValueError
        For a directive that nothing here understands: a misspelt one would otherwise be lost in silence.
    """
    found, lines = {}, source.splitlines(keepends=True)
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        match = DIRECTIVE.match(lines.pop(0))
        if match:
            found[match[1]] = match[2]
    if unknown := found.keys() - KNOWN:
        raise ValueError(f"unknown directive {sorted(unknown)}; allowed are {sorted(KNOWN)}")
    return found, "".join(lines)


# ---------------------------------------------------------------------------------------- what a page depends on


def _module_files(name: str) -> list[Path]:
    stem = ROOT.joinpath(*name.split("."))
    return [f for f in (stem.with_suffix(".py"), stem / "__init__.py") if f.exists()]


def _imports(code: str, path: Path | None, seen: set[Path]) -> set[Path]:
    package = list(path.relative_to(ROOT).parent.parts) if path else []
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [
                    *(package[: len(package) - node.level + 1] if node.level else []),
                    *([node.module] if node.module else []),
                ]
            )
            names = [base, *(f"{base}.{a.name}" for a in node.names)]
        for name in names:
            if name.split(".")[0] != "oral4":
                continue
            for file in _module_files(name):
                if file not in seen:
                    seen.add(file)
                    _imports(file.read_text(encoding="utf8"), file, seen)
    return seen


def used(nb: dict) -> list[Path]:
    """Files that the outputs of a notebook depend on: the library files it imports, directly or not, and the
    records and claims where it reads any."""
    code = "\n".join(directives(c["source"])[1] for c in nb["cells"] if c["cell_type"] == "code")
    files = _imports(code, None, set())
    if any(f.is_relative_to(ROOT / "oral4/measure") for f in files) or "{record}" in "".join(
        c["source"] for c in nb["cells"]
    ):
        files |= {*(ROOT / "oral4/records").rglob("*.json"), *(ROOT / "oral4").glob("*/claims.toml")}
    return sorted(files)


def surroundings() -> str:
    """What else changes outputs: the scale, and whether real data is at hand."""
    return json.dumps({k: os.environ.get(k, "") for k in ("ORAL4_SCALE", "ORAL4_DATA", "ORAL4_RERUN")} | {"version": 1})


def key(nb: dict) -> str:
    """Hash of all that the outputs depend on beside the notebook's own code."""
    digest = hashlib.sha256(surroundings().encode())
    for file in used(nb):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- what is executed


def prepare(nb: dict) -> dict:
    """Turn the directives of every code cell into tags and figure settings; return a new notebook."""
    nb = copy.deepcopy(nb)
    full = os.environ.get("ORAL4_SCALE") in ("gpu", "paper")
    signature = key(nb)
    for cell in nb["cells"]:
        if cell["cell_type"] != "code":
            continue
        found, code = directives(cell["source"])
        tags = [TAGS[d] for d in found if d in TAGS]
        tags += [VALUED_TAGS[d, v.lower()] for d, v in found.items() if (d, v.lower()) in VALUED_TAGS]
        if not code.strip():
            tags.append("remove-cell")
        if "solution" in found:
            tags += ["solution", "hide-input"]
        if FULL_SCALE & found.keys() and not full:
            tags += ["skip-execution", "at-full-scale"]
        mystnb: dict = {}
        if "fig-cap" in found:
            mystnb["figure"] = {"caption": found["fig-cap"]} | ({"name": found["label"]} if "label" in found else {})
        if "fig-alt" in found:
            mystnb["image"] = {"alt": found["fig-alt"]}
        summary = found.get("code-summary") or ("Show the solution" if "solution" in found else None)
        if summary:
            mystnb |= {"code_prompt_show": summary, "code_prompt_hide": re.sub("^Show", "Hide", summary)}
        cell["metadata"] = ({"tags": list(dict.fromkeys(tags))} if tags else {}) | (
            {"mystnb": mystnb} if mystnb else {}
        )
        cell["source"], cell["outputs"], cell["execution_count"] = code, [], None
    # jupyter-cache compares code and kernelspec: the hash makes it notice a changed library, record or scale
    nb["metadata"]["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
        "oral4": signature,
    }
    return nb


# ---------------------------------------------------------------------------------------- what the reader sees

CARD = re.compile(r"\A<!--\s*card\s*(?P<options>[^>]*?)-->\s*(?P<body>.*)\Z", re.S)
GUESS = re.compile(r"\A<!--\s*guess\s*-->\s*(?P<body>.*)\Z", re.S)
SOLUTION = re.compile(r"\A<!--\s*solution\s*-->\s*(?P<body>.*)\Z", re.S)
RECORD = re.compile(r"\{record\}`(?P<name>[\w./-]+):(?P<metric>[\w.]+)(?:\|(?P<spec>[^`]*))?`")


def records(text: str) -> str:
    """Replace every {record}`name:metric|spec` by the value that the record holds."""

    def value(match: re.Match) -> str:
        from oral4.measure.record import load_record

        return load_record(match["name"]).format(match["metric"], match["spec"] or ".3g")

    return RECORD.sub(value, text)


def substitute(text: str) -> str:
    """Fill in `{{ repo_url }}` and its like, and the values of records."""
    for name, value in address().items():
        text = text.replace("{{ " + name + " }}", value)
    return records(text)


def card_options(nb: dict) -> dict[str, str]:
    """Options of the card (`extras=forecast`), empty where a page has none."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown" and (match := CARD.match(cell["source"])):
            return dict(pair.split("=", 1) for pair in match["options"].split())
    return {}


def module_of(nb: dict) -> str | None:
    """Module that a notebook exports to, such as `pyraformer.graph`."""
    for cell in nb["cells"]:
        if cell["cell_type"] == "code" and (name := directives(cell["source"])[0].get("default_exp")):
            return name
    return None


def _markdown(source: str) -> dict:
    return {
        "cell_type": "markdown",
        "metadata": {},
        "source": source,
        "id": hashlib.sha1(source.encode()).hexdigest()[:8],
    }


def links(path: Path, nb: dict) -> dict[str, str]:
    """Where the page's buttons lead."""
    a, name = address(), path.relative_to(NBS).as_posix()
    up = "../" * (len(path.relative_to(ROOT).parts) - 1)
    out = {
        "Open in Colab": f"https://colab.research.google.com/github/{a['user']}/{a['repo']}/blob/colab/{quote(name)}",
        "Download notebook": f"{up}colab/{quote(name)}",
    }
    if module := module_of(nb):
        out["Source of the module"] = f"{a['repo_url']}/blob/{a['branch']}/oral4/{module.replace('.', '/')}.py"
    return out


def run_words(seconds: float, device: str) -> str:
    """How long a page took, in words."""
    return f"{seconds:.0f} s on {device}" if seconds < 90 else f"{seconds / 60:.1f} min on {device}"


def page(nb: dict, path: Path, run: dict | None) -> dict:
    """The notebook as Sphinx reads it.

    Parameters
    ----------
    nb : dict
        The author's notebook.
    path : Path
        Where it lies.
    run : dict or None
        ``seconds``, ``device``, ``versions``, ``date`` of its execution, where it has been executed.
    """
    ready = prepare(nb)
    module, options = module_of(nb), card_options(nb)
    cells: list[dict] = []
    for source, cell in zip(nb["cells"], ready["cells"], strict=True):
        text = cell["source"]
        if cell["cell_type"] == "code":
            cells.append(cell)
            names = _public_names(text) if "exported" in cell["metadata"].get("tags", []) else []
            if names:
                target = directives(source["source"])[0].get("export") or module
                cells.append(_markdown(_in_library(path, str(target), names)))
        elif match := CARD.match(text):
            rows = "".join(
                f'<a href="{escape(url)}"{" download" if label.startswith("Down") else ""}>{label}</a>'
                for label, url in links(path, nb).items()
            )
            facts = [run_words(run["seconds"], run["device"])] if run else []
            facts += [f"needs <code>oral4[{escape(x)}]</code>" for x in options.get("extras", "").split(",") if x]
            facts += ["a GPU helps" if options.get("gpu") == "helps" else "no GPU needed"]
            cells.append(
                _markdown(
                    f':::{{container}} oral4-card\n{substitute(match["body"])}\n\n<p class="oral4-badges">{rows}</p>\n'
                    f'<p class="oral4-time">{" · ".join(facts)}</p>\n:::'
                )
            )
        elif match := GUESS.match(text):
            cells.append(
                _markdown(
                    f":::{{admonition}} Before you run the next cell, guess\n:class: oral4-guess\n{substitute(match['body'])}\n:::"
                )
            )
        elif match := SOLUTION.match(text):
            cells.append(
                _markdown(
                    f"::::{{admonition}} Show the solution\n:class: dropdown oral4-solution\n{substitute(match['body'])}\n::::"
                )
            )
        else:
            cells.append(cell | {"source": substitute(text)})
    if run:
        cells.append(
            _markdown(
                f'<p class="oral4-footer">This page ran in {escape(run_words(run["seconds"], run["device"]))}, '
                f"{escape(run['versions'])}, scale {escape(run['scale'])}, on {escape(run['date'])}.</p>"
            )
        )
    return ready | {"cells": cells}


def _public_names(code: str) -> list[str]:
    found = []
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node.name)
    return found


def _in_library(path: Path, module: str, names: list[str]) -> str:
    chapter = module.split(".")[0]
    up = "../" * (len(path.relative_to(NBS).parts) - 1)
    anchors = "".join(f'<span id="def-{n}"></span>' for n in names)
    where = ", ".join(
        f'<a href="{up}api/{chapter}.html#oral4.{module}.{n}"><code>{module.split(".")[-1]}.{n}</code></a>'
        for n in names
    )
    return f'<p class="oral4-inlibrary">{anchors}In the library: {where}</p>'


# ---------------------------------------------------------------------------------------- what Colab opens

ROLE = re.compile(r"\{(?P<role>cite:[tp]|eq|numref|ref|doc|term)\}`(?P<body>[^`]+)`")
FENCE = re.compile(r"^(?P<colons>:{3,})\{(?P<name>[\w-]+)\}\s*(?P<title>.*)$")


@cache
def bibliography() -> dict[str, tuple[str, str]]:
    """Key -> (authors and year, link) of every reference."""
    from pybtex.database import parse_file

    out = {}
    for name, entry in parse_file(str(ROOT / "oral4/references.bib")).entries.items():
        last = [" ".join([*p.prelast_names, *p.last_names]) for p in entry.persons.get("author", [])]
        who = last[0] if len(last) == 1 else " and ".join(last) if len(last) == 2 else f"{last[0]} et al."
        f = entry.fields
        url = f.get("url") or (f"https://doi.org/{f['doi']}" if "doi" in f else "")
        out[name] = (f"{who.replace('{', '').replace('}', '')}, {f['year']}", url)
    return out


def _plain_role(match: re.Match) -> str:
    role, body = match["role"], match["body"]
    if role.startswith("cite"):
        texts = []
        for name in body.split(","):
            if name.strip() not in bibliography():
                raise KeyError(f"{{{role}}}`{body}`: {name.strip()!r} is not in oral4/references.bib")
            who, url = bibliography()[name.strip()]
            texts.append(f"[{who}]({url})" if url else who)
        joined = "; ".join(texts)
        return joined if role == "cite:t" else f"({joined})"
    words = body.split("<")[0].strip()
    target = body[body.find("<") + 1 : -1] if "<" in body else body
    if role == "doc" and "<" in body:
        return f"[{words}]({address()['site_url']}nbs/{target.lstrip('/').removeprefix('nbs/')}.html)"
    if role == "eq":
        return f"({body})"
    if role == "numref":
        return "the figure “" + body.removeprefix("fig-").replace("-", " ") + "”"
    return words


def plain(text: str) -> str:
    """MyST as ordinary Markdown: directives become quotes, roles become text and links."""
    lines, fences = [], []
    for line in text.splitlines():
        if match := FENCE.match(line):
            fences.append(match["colons"])
            title = match["title"] or match["name"].capitalize()
            lines.append("" if match["name"] == "container" else f"> **{title}**\n>")
        elif fences and line.strip() == fences[-1]:
            fences.pop()
        elif fences and re.match(r"^:[\w-]+:", line):
            continue  # an option of the directive
        elif re.fullmatch(r"\([\w-]+\)=", line.strip()):
            continue  # a label
        else:
            lines.append(("> " if fences else "") + line)
    out = ROLE.sub(_plain_role, substitute("\n".join(lines)))
    return re.sub(r"(\$\$)\s*\(eq-([\w-]+)\)", r"\1", out)


def install_cell(nb: dict, ref: str) -> str:
    """Code that installs the library on Colab and does nothing elsewhere."""
    extra = card_options(nb).get("extras", "plot")
    return (
        "# On Colab this installs the library that goes with this page; elsewhere it does nothing.\n"
        "import importlib.util, subprocess, sys\n"
        'if "google.colab" in sys.modules and importlib.util.find_spec("oral4") is None:\n'
        f'    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "oral4[{extra}] @ git+{address()["repo_url"]}@{ref}"], check=True)'
    )


def _runs_to_the_end(code: str, found: dict[str, str]) -> str:
    """Let "run all" pass a cell that shows an error on purpose, or that needs a GPU where there is none."""
    inner = "".join(f"    {line}\n" if line.strip() else "\n" for line in code.splitlines())
    if found.get("error") == "true":
        return f'try:\n{inner}except Exception as error:\n    print(f"{{type(error).__name__}}: {{error}}")'
    if "gpu" in found:
        return f'import torch\n\nif not torch.cuda.is_available():\n    print("This cell needs a GPU.")\nelse:\n{inner}'
    return code


def colab(nb: dict, path: Path, ref: str) -> dict:
    """The notebook for Colab and for download: no directive, no role, its links lead to the site."""
    cells: list[dict] = []
    site = f"{address()['site_url']}nbs/{path.relative_to(NBS).with_suffix('.html').as_posix()}"
    for cell in nb["cells"]:
        text = cell["source"]
        new = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}}
        if cell["cell_type"] == "code":
            found, code = directives(text)
            if not code.strip():
                continue
            code = _runs_to_the_end(code, found)
            folded = found.get("code-summary") or ("Show the solution" if "solution" in found else None)
            if folded:  # Colab folds a cell with a title into a form; JupyterLab hides its source
                code = f"#@title {folded}\n" + code
                new["metadata"] = {"cellView": "form", "jupyter": {"source_hidden": True}}
            cells.append(new | {"source": code.rstrip("\n"), "outputs": [], "execution_count": None})
            if "fig-cap" in found:
                cells.append(_markdown(f"*{plain(found['fig-cap'])}*"))
            continue
        for pattern, title in (
            (CARD, ""),
            (GUESS, "**Before you run the next cell, guess.** "),
            (SOLUTION, "**Solution.** "),
        ):
            if match := pattern.match(text):
                text = title + match["body"]
        cells.append(new | {"source": _absolute(plain(text), path)})
        if len(cells) == 1:
            cells.append(
                _markdown(f"This notebook is a page of [{address()['repo']}]({site}); figures there need no kernel.")
            )
            cells.append(
                {
                    "cell_type": "code",
                    "id": "install",
                    "metadata": {},
                    "source": install_cell(nb, ref),
                    "outputs": [],
                    "execution_count": None,
                }
            )
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "colab": {"provenance": []},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _absolute(text: str, path: Path) -> str:
    """Relative links lead to the pages of the site: a copy on Colab has no neighbours."""

    def link(match: re.Match) -> str:
        url = match["url"]
        if re.match(r"^[a-z]+:|^#", url):
            return match[0]
        file, _, anchor = url.partition("#")
        target = (path.parent / file).resolve().relative_to(ROOT)
        return f"]({address()['site_url']}{target.with_suffix('.html').as_posix()}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\((?P<url>[^)\s]+)\)", link, text)
