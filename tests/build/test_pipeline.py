"""The notebook pipeline: directives, cards, records, Colab copies; and the check of the built site can fail."""

import json
import re
import sys
import types
from pathlib import Path

import check_site
import notebook
import pytest


def code(source, cell_id="c0"):
    return {
        "cell_type": "code",
        "id": cell_id,
        "metadata": {},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


def text(source, cell_id="m0"):
    return {"cell_type": "markdown", "id": cell_id, "metadata": {}, "source": source}


def book(*cells):
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


PATH = notebook.NBS / "pyraformer/99_test.ipynb"


class TestDirectives:
    def test_leading_lines_are_taken_off(self):
        found, rest = notebook.directives("#| export\n#| code-summary: Show: it\n\nx = 1\n#| hide\n")
        assert found == {"export": "", "code-summary": "Show: it"}
        assert rest == "x = 1\n#| hide\n"

    def test_a_misspelt_directive_is_refused(self):
        with pytest.raises(ValueError, match=r"unknown directive.*exprot.*allowed"):
            notebook.directives("#| exprot\nx = 1")

    @pytest.mark.parametrize(
        ("source", "tags"),
        [
            ("#| hide\nx = 1", ["remove-cell"]),
            ("#| default_exp a.b", ["remove-cell"]),
            ("#| export\ndef f(): pass", ["exported"]),
            ("#| echo: false\nx", ["remove-input"]),
            ("#| eval: false\nx", ["skip-execution"]),
            ("#| error: true\n1 / 0", ["raises-exception"]),
            ("#| solution\nx = 1", ["solution", "hide-input"]),
            ("#| exercise\nx = None", ["exercise"]),
            ("#| gpu\nx", ["skip-execution", "at-full-scale"]),
        ],
    )
    def test_they_become_tags(self, source, tags, monkeypatch):
        monkeypatch.setenv("ORAL4_SCALE", "mini")
        cell = notebook.prepare(book(code(source)))["cells"][0]
        assert cell["metadata"]["tags"] == tags
        assert "#|" not in cell["source"]

    def test_full_scale_runs_what_needs_a_gpu(self, monkeypatch):
        monkeypatch.setenv("ORAL4_SCALE", "gpu")
        assert notebook.prepare(book(code("#| gpu\nx = 1")))["cells"][0]["metadata"] == {}

    def test_a_figure_has_caption_name_and_alt(self):
        cell = notebook.prepare(book(code("#| label: fig-a\n#| fig-cap: A line.\n#| fig-alt: One line.\nplot()")))[
            "cells"
        ][0]
        assert cell["metadata"]["mystnb"] == {
            "figure": {"caption": "A line.", "name": "fig-a"},
            "image": {"alt": "One line."},
        }

    def test_the_author_s_notebook_is_left_alone(self):
        nb = book(code("#| export\nx = 1"))
        before = json.dumps(nb)
        notebook.prepare(nb)
        notebook.page(nb, PATH, None)
        assert json.dumps(nb) == before


class TestStaleness:
    def test_the_key_follows_imported_files(self, monkeypatch, tmp_path):
        monkeypatch.setattr(notebook, "ROOT", tmp_path)
        package = tmp_path / "oral4/a"
        package.mkdir(parents=True)
        (tmp_path / "oral4/__init__.py").write_text("")
        (package / "__init__.py").write_text("")
        (package / "one.py").write_text("from .two import y")
        (package / "two.py").write_text("y = 1")
        (package / "other.py").write_text("z = 1")
        nb = book(code("from oral4.a.one import y"))
        first = notebook.key(nb)
        (package / "other.py").write_text("z = 2")
        assert notebook.key(nb) == first, "a file that is not imported changes nothing"
        (package / "two.py").write_text("y = 2")
        assert notebook.key(nb) != first, "a file that is imported indirectly does"

    def test_the_key_follows_the_scale(self, monkeypatch):
        monkeypatch.setenv("ORAL4_SCALE", "mini")
        first = notebook.key(book())
        monkeypatch.setenv("ORAL4_SCALE", "gpu")
        assert notebook.key(book()) != first


class TestPage:
    def test_the_card_gets_time_and_buttons(self):
        nb = book(
            text("# T\n\n> S."),
            text("<!-- card extras=forecast -->\n**You will be able to**\n\n- do it", "m1"),
            code("#| default_exp pyraformer.graph"),
        )
        card = notebook.page(
            nb, PATH, {"seconds": 12.3, "device": "2 CPU cores", "versions": "v", "scale": "mini", "date": "d"}
        )["cells"][1]["source"]
        assert "oral4-card" in card and "12 s on 2 CPU cores" in card and "oral4[forecast]" in card
        assert f"{notebook.address()['user']}/{notebook.address()['repo']}/blob/colab/pyraformer/99_test.ipynb" in card
        assert 'href="../../colab/pyraformer/99_test.ipynb" download' in card

    def test_exported_names_lead_to_the_api(self):
        nb = book(
            code("#| default_exp pyraformer.graph"),
            code("#| export\ndef f():\n    pass\nclass _Hidden:\n    pass", "c1"),
        )
        cells = notebook.page(nb, PATH, None)["cells"]
        assert 'href="../api/pyraformer.html#oral4.pyraformer.graph.f"' in cells[-1]["source"]
        assert "_Hidden" not in cells[-1]["source"]

    def test_code_cells_are_those_that_ran(self):
        nb = book(
            text("<!-- guess -->\nWhich?"), code("#| export\ndef f():\n    pass"), text("<!-- solution -->\n42", "m2")
        )
        ran = [c for c in notebook.prepare(nb)["cells"] if c["cell_type"] == "code"]
        shown = [c for c in notebook.page(nb, PATH, None)["cells"] if c["cell_type"] == "code"]
        assert ran == shown

    def test_records_are_filled_in(self, monkeypatch):
        fake = types.ModuleType("oral4.measure.record")
        fake.load_record = lambda name: types.SimpleNamespace(format=lambda metric, spec: f"{name}/{metric}/{spec}")
        monkeypatch.setitem(sys.modules, "oral4.measure.record", fake)
        assert (
            notebook.records("It is {record}`a/b-mini:speed.low|.1f` times.") == "It is a/b-mini/speed.low/.1f times."
        )


class TestColab:
    def test_nothing_of_the_book_is_left(self, monkeypatch):
        monkeypatch.setattr(notebook, "bibliography", lambda: {"liu": ("Liu et al., 2022", "https://example.org/p")})
        nb = book(
            text("# T\n\n> S."),
            text(
                "See {cite:t}`liu`, {eq}`eq-a`, {numref}`fig-some-thing`, [next](01_graph.ipynb#part) and "
                "{doc}`the API <../api/pyraformer>`.\n\n$$x$$ (eq-a)",
                "m1",
            ),
            text(":::{note}\n:class: dropdown\nMind this.\n:::", "m2"),
            code("#| code-fold: true\n#| code-summary: Show it\n#| fig-cap: A figure.\n#| fig-alt: Alt.\nplot()", "c1"),
            code("#| default_exp a.b", "c2"),
            code("#| solution\nanswer = 1", "c3"),
        )
        copy = notebook.colab(nb, PATH, "v1")
        whole = "\n".join(c["source"] for c in copy["cells"])
        assert not re.search(r"#\||\{[\w:]+\}`|:::|<!--", whole)
        assert "[Liu et al., 2022](https://example.org/p)" in whole and "(eq-a)," in whole and "*A figure.*" in whole
        assert f"{notebook.address()['site_url']}nbs/pyraformer/01_graph.html#part" in whole
        assert "> **Note**" in whole and "> Mind this." in whole
        forms = [c for c in copy["cells"] if c["metadata"].get("cellView") == "form"]
        assert [c["source"].splitlines()[0] for c in forms] == ["#@title Show it", "#@title Show the solution"]

    def test_run_all_passes_errors_on_purpose_and_missing_gpus(self, capsys, monkeypatch):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        nb = book(text("# T\n\n> S."), code("#| error: true\n1 / 0", "c1"), code("#| gpu\nx = 1\n\ny = 2", "c2"))
        for cell in notebook.colab(nb, PATH, "v1")["cells"]:
            if cell["cell_type"] == "code" and cell["id"] != "install":
                exec(cell["source"], {})
        assert capsys.readouterr().out == "ZeroDivisionError: division by zero\nThis cell needs a GPU.\n"

    def test_an_unknown_reference_is_refused(self, monkeypatch):
        monkeypatch.setattr(notebook, "bibliography", dict)
        with pytest.raises(KeyError, match=r"references\.bib"):
            notebook.plain("{cite:t}`nobody`")

    def test_the_install_cell_acts_on_colab_only(self, monkeypatch):
        import subprocess

        calls = []
        monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a[0]))
        source = notebook.install_cell(book(text("<!-- card extras=forecast -->\nx")), "v9")
        exec(source, {})
        assert calls == []
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        exec(source, {})
        assert calls[0][-1] == f"oral4[forecast] @ git+{notebook.address()['repo_url']}@v9"

    @pytest.mark.parametrize("path", notebook.for_colab(), ids=lambda p: p.relative_to(notebook.NBS).as_posix())
    def test_every_notebook_has_a_clean_and_valid_copy(self, path):
        import nbformat

        copy = notebook.colab(notebook.load(path), path, "main")
        nbformat.validate(copy)
        for cell in copy["cells"]:
            assert not re.search(r"^#\|", cell["source"], re.M), cell["source"][:200]
            if cell["cell_type"] == "markdown":
                prose = re.sub(r"(?<!\})`[^`]*`", "", cell["source"])
                assert not re.search(r"\{[a-z:]+\}`|^:{3,}|\{\{ ", prose, re.M), cell["source"][:200]


class TestCheckSite:
    @pytest.fixture
    def site(self, tmp_path):
        def write(body, name="index.html"):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"<html><body>{body}</body></html>")
            return check_site.problems(tmp_path, "/oral4/")[0]

        return write

    def test_a_good_page_passes(self, site):
        assert (
            site('<p id="a"><a href="#a">x</a> <a href="https://example.org">out</a> <img src="data:," alt="dot"></p>')
            == []
        )

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            ('<a href="gone.html">x</a>', "does not exist"),
            ('<a href="#gone">x</a>', "no such anchor"),
            ('<script src="https://cdn.example.org/a.js"></script>', "from the network"),
            ('<link rel="stylesheet" href="//cdn.example.org/a.css">', "from the network"),
            ('<img src="data:,">', "without alt"),
            ('<a href="/absolute.html">x</a>', "absolute"),
            ('<p id="a"></p><p id="a"></p>', "stands 2 times"),
            ("<p>#| export</p>", "unresolved markup"),
            ("<p>{cite:t}`x`</p>", "unresolved markup"),
            ("<p>| a | b |\n| — | — |</p>", "unresolved markup"),
            ("<p>| a | b | | --- | --- |</p>", "unresolved markup"),
            ("x" * 1_600_000, "more than"),
        ],
    )
    def test_a_bad_page_does_not(self, site, body, problem):
        assert any(problem in found for found in site(body))

    def test_the_page_for_a_missing_address_may_link_absolutely(self, site):
        site("<p>start</p>")
        assert site('<a href="/oral4/index.html">x</a>', "404.html") == []


def test_address_is_read_from_settings():
    settings = (Path(notebook.ROOT) / "settings.ini").read_text()
    assert f"user = {notebook.address()['user']}" in settings
    assert notebook.address()["repo_url"].endswith(f"/{notebook.address()['user']}/{notebook.address()['repo']}")
