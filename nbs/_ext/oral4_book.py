"""Sphinx extension of the book: reads notebooks through :mod:`notebook` and makes the site work with no network."""

from __future__ import annotations

import hashlib
import html
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import notebook
from notebook import CACHE, NBS, ROOT, address
from run_notebooks import cached

CHAPTERS = ("diffusion", "diffvc", "geodiff", "pyraformer", "flan", "dp", "milan")


@cache
def _cache():
    from jupyter_cache import get_cache

    return get_cache(str(CACHE))


def execution(path: Path) -> dict | None:
    """Facts of a notebook's execution: seconds, device, scale, versions, date."""
    run = cached(_cache(), notebook.prepare(notebook.load(path)))
    # Sphinx runs what the cache lacks, without noting where: `make book` fills the cache first
    return run if run and "device" in run else None


@cache
def commit() -> str:
    """Short hash of the commit that the site is built from; empty outside a checkout."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip()


# ---------------------------------------------------------------------------------------- reading


def _source_read(app, docname, source):
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        nb = json.loads(source[0])
        for cell in nb["cells"]:
            cell["source"] = "".join(cell["source"])
        for file in notebook.used(nb):  # a change of the library or of a record makes the page stale
            app.env.note_dependency(str(file))
        source[0] = json.dumps(notebook.page(nb, path, execution(path)))
    else:
        for match in notebook.RECORD.finditer(source[0]):
            app.env.note_dependency(str(ROOT / f"oral4/records/{match['name']}.json"))
        if "{glue}" in source[0]:  # pictures that the first page has drawn
            for file in (NBS / "index.ipynb", *notebook.used(notebook.load(NBS / "index.ipynb"))):
                app.env.note_dependency(str(file))
        source[0] = notebook.substitute(source[0])


class Times(SphinxDirective):
    """`{oral4-times}`: how long each page took, on what and when."""

    def run(self):
        """Build the table from what the executions recorded."""
        self.env.note_reread()
        rows = []
        for path in notebook.notebooks():
            if run := execution(path):
                title = _title(path)
                docname = path.relative_to(ROOT).with_suffix("").as_posix()
                url = self.env.app.builder.get_relative_uri(self.env.docname, docname)
                rows.append(
                    (
                        run["seconds"],
                        f'<tr><th scope="row"><a href="{url}">{html.escape(title)}</a></th><td class="oral4-number">{run["seconds"]:.0f}</td>'
                        f"<td>{html.escape(run['device'])}</td><td>{html.escape(run['scale'])}</td><td>{html.escape(run['versions'])}</td><td>{html.escape(run['date'])}</td></tr>",
                    )
                )
        total = sum(seconds for seconds, _ in rows)
        body = "".join(row for _, row in rows)
        table = (
            '<div class="oral4-scroll" tabindex="0"><table class="oral4-times"><caption>How long each page took when this site was built</caption>'
            '<thead><tr><th scope="col">Page</th><th scope="col">Seconds</th><th scope="col">On</th><th scope="col">Scale</th><th scope="col">Versions</th><th scope="col">Date</th></tr></thead>'
            f'<tbody>{body}</tbody><tfoot><tr><th scope="row">All pages</th><td class="oral4-number">{total:.0f}</td><td colspan="4"></td></tr></tfoot></table></div>'
        )
        return [nodes.raw("", table, format="html")]


@cache
def _title(path: Path) -> str:
    """Title of a notebook."""
    return next(c["source"] for c in notebook.load(path)["cells"] if c["source"].startswith("# ")).splitlines()[0][2:]


def _property_has_no_type(app, what, name, obj, options, lines):
    """Keep napoleon from taking what stands before a colon in a property's first line for its type."""
    if what in ("property", "attribute"):
        lines.insert(0, "")


def _defined_in(app, what, name, obj, options, lines):
    """Lead from the API back to the cell where a name is derived."""
    if what not in ("function", "class"):
        return
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(obj)) or "")
    except TypeError:
        return
    head = re.search(r"File to edit: (\S+\.ipynb)", file.read_text(encoding="utf8")) if file.is_file() else None
    if head:
        source = (file.parent / head[1]).resolve()
        place = source.relative_to(NBS).with_suffix(".html").as_posix()
        lines += [
            "",
            ".. container:: oral4-defined",
            "",
            f"   `Derived in “{_title(source)}” <../{place}#def-{name.rsplit('.', 1)[-1]}>`__",
            "",
        ]


# ---------------------------------------------------------------------------------------- settings that derive from one place


def _config(app, config):
    """Fill in what settings.ini holds, and serve MathJax from the site itself."""
    a = address()
    config.project = a["repo"]
    config.html_baseurl = a["site_url"]
    config.html_theme_options |= {"repository_url": a["repo_url"], "repository_branch": a["branch"], "path_to_docs": ""}
    config.ogp_site_url = a["site_url"]
    config.notfound_urls_prefix = a["site_path"]
    config.notfound_context = {
        "title": "Page not found",
        "body": f'<h1>Page not found</h1><p>There is no page at this address. <a href="{a["site_path"]}nbs/index.html">The first page</a> lists all that there is.</p>',
    }
    config.version = config.release = a["version"]
    built = f"Release {a['version']}" + (
        f', commit <a href="{a["repo_url"]}/commit/{commit()}">{commit()}</a>' if commit() else ""
    )
    config.html_theme_options["extra_footer"] = f'<p class="oral4-built">{built}. Code under Apache-2.0.</p>'
    vendor = ROOT / "_build/vendor"
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise RuntimeError("sphinx-mathjax-offline is missing: the site would load MathJax from a CDN; run `make book`")
    source, fonts = Path(spec.origin).parent / "static/mathjax", "output/chtml/fonts/woff-v2"
    shutil.copytree(source / fonts, vendor / "mathjax" / fonts, dirs_exist_ok=True)
    shutil.copy(source / "tex-chtml-full.js", vendor / "mathjax")
    config.mathjax_path = "mathjax/tex-chtml-full.js"
    config.html_static_path = [*config.html_static_path, str(vendor)]


def _page(app, pagename, templatename, context, doctree):
    """Drop thebe (live code from a CDN, which no page uses) and mark the page with its chapter's accent."""
    context["default_mode"] = "auto"  # the reader's system decides; left empty, the theme complains on the console
    if "script_files" in context:
        context["script_files"][:] = [
            s
            for s in context["script_files"]
            if "thebe" not in str(getattr(s, "filename", s) or "")
            and "THEBE" not in str(getattr(s, "attributes", {}).get("body", ""))
        ]
    chapter = next((c for c in CHAPTERS if f"nbs/{c}/" in pagename + "/" or pagename == f"nbs/api/{c}"), "none")
    if "body" in context:
        context["body"] = f'<div class="oral4-accent-{chapter}">{context["body"]}</div>'


# ---------------------------------------------------------------------------------------- beside the pages


def install_ref() -> str:
    """What a Colab copy installs: the release's tag where the commit has one, else the commit itself."""
    run = subprocess.run(["git", "tag", "--points-at", "HEAD", "v*"], cwd=ROOT, capture_output=True, text=True)
    full = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return next(iter(run.stdout.split()), full.stdout.strip() or address()["branch"])


def _mend(text: str) -> str:
    """Put right in a page what the theme and Sphinx write and no setting changes."""
    # the theme fetches its fonts ahead across origins, which browsers refuse from disk
    text = re.sub(r'<link rel="preload" as="font"[^>]*>\s*', "", text)

    # a long signature is set as a list of definitions without terms, which screen readers stumble over
    def signature(match: re.Match) -> str:
        opened = match[0].replace("<dl>", '<span class="sig-list">').replace("<dd>", '<span class="sig-item">')
        return opened.replace("</dl>", "</span>").replace("</dd>", "</span>")

    return re.sub(r'<dt class="sig .*?</dt>', signature, text, flags=re.S)


def _finished(app, error):
    """Write the Colab copies and llms.txt."""
    if error or app.builder.name != "html":
        return
    out, ref, listing = Path(app.outdir), install_ref(), []
    for file in out.rglob("*.html"):
        text = file.read_text(encoding="utf8")
        if (mended := _mend(text)) != text:
            file.write_text(mended, encoding="utf8")
    for path in notebook.for_colab():
        nb = notebook.load(path)
        target = out / "colab" / path.relative_to(NBS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            json.dumps(notebook.colab(nb, path, ref), indent=1, ensure_ascii=False) + "\n", encoding="utf8"
        )
    for docname in (
        app.env.toctree_includes_flat if hasattr(app.env, "toctree_includes_flat") else _reading_order(app.env)
    ):
        title = app.env.titles[docname].astext()
        text = _subtitle(Path(app.env.doc2path(docname)))
        listing.append(f"- [{title}]({address()['site_url']}{docname}.html)" + (f": {text}" if text else ""))
    about = notebook.configparser.ConfigParser()
    about.read(ROOT / "settings.ini", encoding="utf8")
    (out / "llms.txt").write_text(
        f"# {address()['repo']}\n\n> {about['DEFAULT']['description']}\n\nSource: {address()['repo_url']}\n\n## Pages\n\n"
        + "\n".join(listing)
        + "\n",
        encoding="utf8",
    )
    (out / ".nojekyll").touch()


def _reading_order(env) -> list[str]:
    order, seen = [], set()

    def walk(docname):
        if docname not in seen:
            seen.add(docname)
            order.append(docname)
            for child in env.toctree_includes.get(docname, []):
                walk(child)

    walk(env.config.root_doc)
    return order


def _subtitle(path: Path) -> str:
    """One sentence that says what a page is: the `> line` under its title."""
    text = (
        "\n".join(c["source"] for c in notebook.load(path)["cells"][:3])
        if path.suffix == ".ipynb"
        else path.read_text(encoding="utf8")
    )
    match = re.search(r"^> (.+)$", text, re.M)
    return match[1] if match else ""


def _descriptions(app, pagename, templatename, context, doctree):
    """Describe each page to search engines and link previews by its own subtitle."""
    if doctree is not None and (text := _subtitle(Path(app.env.doc2path(pagename)))):
        meta = dict(context.get("meta") or {})
        meta.setdefault("og:description", re.sub(r"[*`_$]", "", notebook.plain(text)))
        context["meta"] = meta


def _state() -> str:
    """Hash of what every page depends on: the surroundings, the order of pages, and which records and claims there are."""
    listing = sorted(
        str(p) for p in [*(ROOT / "oral4/records").rglob("*.json"), *(ROOT / "oral4").glob("*/claims.toml")]
    )
    parts = [notebook.surroundings(), (ROOT / "_toc.yml").read_text(encoding="utf8"), *listing]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def setup(app):
    """Connect to Sphinx."""
    app.add_config_value("oral4_state", _state(), "env")
    app.add_directive("oral4-times", Times)
    app.connect("config-inited", _config, priority=100)
    app.connect("source-read", _source_read, priority=100)
    app.connect("autodoc-process-docstring", _property_has_no_type, priority=100)
    app.connect("autodoc-process-docstring", _defined_in, priority=900)
    app.connect("html-page-context", _descriptions, priority=100)
    app.connect("html-page-context", _page, priority=900)
    app.connect("build-finished", _finished)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
