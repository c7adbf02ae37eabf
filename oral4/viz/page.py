"""Pieces of a page: HTML that carries its own style, data and script.

A component must work in the built site, from a file on disk and in the output frame of Colab, where the
site's style sheet is absent. So each brings the little style and script it cannot do without. A script looks
for components of its kind that are not running yet, instead of for an identifier: nothing has an ``id``, hence two
copies of one figure never clash, and the same call always gives the same bytes.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CONTROLS_SCRIPT", "STYLE", "Fragment", "caption_html", "controls_html", "data_block", "in_words", "style"]


class Fragment:
    """HTML that a notebook shows.

    Parameters
    ----------
    html : str
        The markup, complete in itself.
    text : str
        One line for places that show no HTML, such as a terminal.
    """

    def __init__(self, html: str, text: str):
        self.html = html
        self.text = text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<{self.text}; {len(self.html.encode()) / 1000:.0f} kB of HTML>"


# The grey of the controls has a contrast of 3 or more on white, on black and on everything darker than #303030.
# A black plate under pictures in the dark theme: see oral4.viz.style. The three selectors are those of the site,
# of Colab and of JupyterLab.
STYLE = """
.oral4{margin:1.2em 0;padding:0;max-width:100%}
.oral4 figcaption{font-size:.9em;margin:.4em 0 0;text-align:left}
.oral4-plate{display:block;max-width:100%;height:auto;border-radius:6px}
:root[data-theme=dark] .oral4-plate,
:root[theme=dark] .oral4-plate,
[data-jp-theme-light=false] .oral4-plate {
  background:#000;
}
.oral4-controls {
  display:flex; flex-wrap:wrap; align-items:center; gap:0 1.5em; max-width:624px; margin-top:.5em; font-size:.9em;
}
.oral4-controls[hidden]{display:none}
.oral4-controls label {
  flex:1 1 11em; display:flex; flex-wrap:wrap; justify-content:space-between; margin:0;
  font-weight:400;
}
.oral4-controls input {
  -webkit-appearance:none; appearance:none; flex:1 0 100%; width:100%; height:44px; margin:0;
  padding:0; background:none; border:0; cursor:pointer;
}
.oral4-controls input::-webkit-slider-runnable-track{height:4px;border-radius:2px;background:#808080}
.oral4-controls input::-moz-range-track{height:4px;border-radius:2px;background:#808080}
.oral4-controls input::-webkit-slider-thumb {
  -webkit-appearance:none; width:24px; height:24px; margin-top:-10px; border-radius:50%; border:0;
  background:var(--oral4-accent,#808080);
}
.oral4-controls input::-moz-range-thumb {
  width:24px; height:24px; border-radius:50%; border:0; background:var(--oral4-accent,#808080);
}
.oral4-controls input:focus-visible,
.oral4-controls button:focus-visible {
  outline:2px solid currentColor; outline-offset:2px; border-radius:6px;
}
.oral4-controls output{font-variant-numeric:tabular-nums}
.oral4-controls button {
  min-width:44px; min-height:44px; padding:0 1em; font:inherit; color:inherit; background:none;
  border:1px solid #808080; border-radius:6px; cursor:pointer;
}
.oral4-unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.oral4-print{display:none}
@media print{.oral4-controls{display:none!important}.oral4-print{display:inline}.oral4-plate{background:none!important}}
"""

# Wires the sliders and the play button of `root`. `show(values, moving)` is called with the position of each slider.
# Readers who ask their system for less motion get a button that goes one step at a time.
CONTROLS_SCRIPT = """
const wire = (root, data, show) => {
  const box = root.querySelector(".oral4-controls"), inputs = [...box.querySelectorAll("input")];
  const words = [...box.querySelectorAll("output")], button = box.querySelector("[data-play]");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = null;
  const update = () => {
    inputs.forEach((input, i) => {
      words[i].textContent = data.words[i][input.value];
      input.setAttribute("aria-valuetext", data.words[i][input.value]);
    });
    show(inputs.map(input => +input.value), timer !== null);
  };
  const name = () => { if (button) button.textContent = still.matches ? "Next" : timer === null ? "Play" : "Pause"; };
  const pause = () => { clearInterval(timer); timer = null; name(); update(); };
  if (button) {
    const input = inputs[button.dataset.play];
    const step = () => { input.value = +input.value < +input.max ? +input.value + 1 : 0; update(); };
    button.addEventListener("click", () => {
      if (timer !== null) return pause();
      if (still.matches) return step();
      const tick = () => { if (!root.isConnected || +input.value >= +input.max) pause(); else step(); };
      timer = setInterval(tick, data.interval);
      name();
      if (+input.value >= +input.max) step();
    });
    still.addEventListener("change", pause);
  }
  inputs.forEach(input => input.addEventListener("input", () => { if (timer !== null) pause(); else update(); }));
  box.hidden = false;
  name();
  update();
};
"""


def style() -> str:
    """Return the style which every component needs, as an element."""
    return f"<style>{STYLE}</style>"


def data_block(data: Any) -> str:
    r"""Return ``data`` as JSON in an element that no text inside it can end.

    Parameters
    ----------
    data : object
        Anything that JSON can hold. NaN and infinity are refused.

    Examples
    --------
    >>> data_block("</script>")
    '<script type="application/json">"\\u003c/script>"</script>'
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def caption_html(caption: str | None) -> str:
    """Return the caption element, or nothing without a caption."""
    return f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""


def controls_html(
    settings: Mapping[str, Sequence[str]], start: Sequence[int], *, play: int | None = None, more: str = ""
) -> str:
    """Return one slider for each setting; hidden until the script shows them.

    Parameters
    ----------
    settings : mapping of str to sequence of str
        The positions of each slider in words, by the name of the setting.
    start : sequence of int
        The first position of each slider.
    play : int, optional
        Index of the setting that a play button runs through; no button without it.
    more : str
        Markup of further controls.
    """
    button = "" if play is None else f'<button type="button" data-play="{play}">Play</button>'
    # Each slider says its position itself (aria-valuetext), so the visible words are kept from being read twice.
    sliders = "".join(
        f'<label><span>{html.escape(name)}</span><output aria-hidden="true">{html.escape(words[position])}</output>'
        f'<input type="range" min="0" max="{len(words) - 1}" value="{position}" autocomplete="off" '
        f'aria-label="{html.escape(name)}" aria-valuetext="{html.escape(words[position])}"></label>'
        for (name, words), position in zip(settings.items(), start, strict=True)
    )
    return f'<div class="oral4-controls" hidden>{button}{sliders}{more}</div>'


def in_words(value: Any) -> str:
    """Return a value as a reader would write it.

    Examples
    --------
    >>> [in_words(value) for value in (0.30000000000000004, 20, True, None, "mean")]
    ['0.3', '20', 'yes', 'none', 'mean']
    """
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return str(value)
