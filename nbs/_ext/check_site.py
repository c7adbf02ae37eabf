"""Check the built site without a network: links, anchors, alt texts, page weight, and that nothing loads from outside."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LIMIT = 1_500_000  # bytes of one page: what a phone should have to fetch before it can show it
LOADS = {"script", "img", "source", "audio", "video", "iframe", "embed", "object", "track", "input"}
PRELOADS = {"stylesheet", "preload", "modulepreload", "icon", "dns-prefetch", "preconnect", "prefetch"}
THEME_IDS = {"search-input"}  # the theme writes it twice on its search page
LEFTOVER = re.compile(
    r"#\|\s*(?:export|hide|label|fig-|code-|default_exp)|\{(?:record|cite|numref|eq|doc)(?::\w+)?\}`|\{\{ \w+_url \}\}"
    r"|\| ?(?:-{3}|—) ?\|"  # the second line of a table that was not read as one
)


class Page(HTMLParser):
    """Identifiers, links and images of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[tuple[str, bool]] = []
        self.no_alt: list[str] = []
        self.prose: list[str] = []
        self._skip = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Note what the tag declares, loads and leads to."""
        a = dict(attrs)
        self._skip += tag in ("script", "style")
        if a.get("id"):
            self.ids.append(a["id"])
        if tag == "img" and not (a.get("alt") or "").strip() and a.get("role") != "presentation" and "alt" not in a:
            self.no_alt.append((a.get("src") or "")[:80])
        for name in ("href", "src", "data", "poster"):
            if a.get(name) and not (name == "data" and tag != "object"):
                loads = tag in LOADS or (tag == "link" and bool(PRELOADS & set((a.get("rel") or "").split())))
                self.links.append((a[name], loads))

    def handle_endtag(self, tag):
        """Leave a script or a style."""
        self._skip -= tag in ("script", "style")

    def handle_data(self, data):
        """Keep what a reader reads."""
        if not self._skip:
            self.prose.append(data)


def problems(root: Path, prefix: str) -> tuple[list[str], int, int]:
    """Problems of a built site, with the number of its pages and links.

    Parameters
    ----------
    root : Path
        Folder of the site.
    prefix : str
        Path under which the site is served; the page for a missing address links by it.
    """
    pages = {p: Page(p.read_text(encoding="utf8")) for p in root.rglob("*.html") if "_static" not in p.parts}
    bad = []
    for path, page in pages.items():
        name = path.relative_to(root).as_posix()
        if (size := path.stat().st_size) > LIMIT:
            bad.append(f"{name}: {size / 1e6:.2f} MB, more than {LIMIT / 1e6} MB")
        bad += [f"{name}: image without alt text: {src}" for src in page.no_alt]
        bad += [
            f"{name}: the id {i!r} stands {page.ids.count(i)} times"
            for i in {i for i in page.ids if page.ids.count(i) > 1} - THEME_IDS
        ]
        if "_modules/" not in name and (left := LEFTOVER.search("\n".join(page.prose))):
            bad.append(f"{name}: unresolved markup {left[0]!r}")
        for link, loads in page.links:
            url = urlsplit(link)
            if url.scheme in ("http", "https") or link.startswith("//"):
                if loads:
                    bad.append(f"{name}: loads {link} from the network")
                continue
            if url.scheme:
                continue
            base, where = path.parent, unquote(url.path)
            if where.startswith("/"):
                if name != "404.html" or not where.startswith(prefix):
                    bad.append(f"{name}: {link} is absolute; it breaks offline")
                    continue
                base, where = root, where.removeprefix(prefix)
            target = (base / where).resolve() if where else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                bad.append(f"{name}: {link} does not exist")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                bad.append(f"{name}: {link} has no such anchor")
    for sheet in root.rglob("*.css"):
        for match in re.finditer(
            r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)",
            sheet.read_text(encoding="utf8", errors="replace"),
        ):
            bad.append(f"{sheet.relative_to(root)}: loads {match[1]} from the network")
    return sorted(set(bad)), len(pages), sum(len(p.links) for p in pages.values())


def main() -> int:
    """Check the folder that is named on the command line."""
    sys.path.insert(0, str(Path(__file__).parent))
    from notebook import address

    bad, pages, links = problems(Path(sys.argv[1]).resolve(), address()["site_path"])
    print(f"{pages} pages, {links} links, {len(bad)} problems", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
