"""Every test of figures starts from matplotlib's own settings, in a place that is neither Colab nor live."""

import json
from html.parser import HTMLParser

import matplotlib
import matplotlib.pyplot as plt
import pytest

VOID = {"img", "input", "br"}


class Tree(HTMLParser):
    """Reads a fragment strictly: every element is closed in order; keeps tags, attributes and texts."""

    def __init__(self, markup):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(markup)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute of <{tag}> stands twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else None, data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag):
        return "".join(data for name, data in self.texts if name == tag)

    def data(self):
        """The JSON of the component."""
        blocks = [a for a in self.all("script") if a.get("type") == "application/json"]
        assert len(blocks) == 1
        return json.loads(next(data for name, data in self.texts if name == "script" and data.startswith("{")))


@pytest.fixture(scope="session")
def parse():
    return Tree


@pytest.fixture(autouse=True)
def _clean_matplotlib(monkeypatch):
    monkeypatch.delenv("ORAL4_LIVE", raising=False)
    with matplotlib.rc_context():
        yield
    plt.close("all")
