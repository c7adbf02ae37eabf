"""Fragments are valid, escaped and complete in themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oral4.viz import page


@given(st.text() | st.sampled_from(["</script>", "<!--<script>", "]]>", "\u2028"]))
def test_data_block_holds_any_text(parse, text):
    markup = page.data_block({"a": [text]})
    assert parse(markup).data() == {"a": [text]}
    assert "<" not in markup.removeprefix('<script type="application/json">').removesuffix("</script>")


def test_data_block_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="JSON"):
        page.data_block([float("nan")])


@given(st.dictionaries(st.text(min_size=1), st.lists(st.text(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_controls_hold_any_text(parse, settings):
    tree = parse(page.controls_html(settings, [0] * len(settings), play=0))
    inputs = tree.all("input")
    # The parser maps line ends and NUL as HTML asks; compare what it can keep.
    for (name, words), attributes in zip(settings.items(), inputs, strict=True):
        assert attributes["type"] == "range" and attributes["max"] == str(len(words) - 1)
        if name.isprintable() and words[0].isprintable():
            assert attributes["aria-label"] == name and attributes["aria-valuetext"] == words[0]
    assert [name for name, _ in tree.elements if name == "script"] == []
    assert "Play" in tree.text("button")


def test_a_caption_is_text(parse):
    assert page.caption_html(None) == page.caption_html("") == ""
    assert parse(page.caption_html("<b>&")).text("figcaption") == "<b>&"


def test_in_words():
    values = [1, 2.5, 1e-5, 123456.0, True, np.bool_(False), np.float32(0.1), np.int64(3), None, "x", float("inf")]
    words = ["1", "2.5", "1e-05", "1.235e+05", "yes", "no", "0.1", "3", "none", "x", "inf"]
    assert [page.in_words(value) for value in values] == words


def test_a_tensor_is_put_in_words():
    assert page.in_words(torch.tensor(0.25)) == "0.25"


def test_a_fragment_shows_html_in_a_notebook_and_one_line_elsewhere():
    fragment = page.Fragment("<p>é</p>" * 100, "a thing")
    assert fragment._repr_html_() == fragment.html
    assert repr(fragment) == "<a thing; 1 kB of HTML>"
