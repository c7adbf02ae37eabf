"""A molecule, or its path through time, that the reader turns, without a library and without a kernel."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from oral4.viz import page
from oral4.viz.style import INK, contrast

__all__ = ["ELEMENTS", "from_rdkit", "molecule"]

ELEMENTS = {
    "H": ("hydrogen", "#F4F4F4", 0.31),
    "B": ("boron", "#F2B8C6", 0.84),
    "C": ("carbon", "#5F5F5F", 0.76),
    "N": ("nitrogen", "#0072B2", 0.71),
    "O": ("oxygen", "#D55E00", 0.66),
    "F": ("fluorine", "#7FD6BB", 0.57),
    "Si": ("silicon", "#C9B48F", 1.11),
    "P": ("phosphorus", "#E69F00", 1.07),
    "S": ("sulfur", "#F0E442", 1.05),
    "Cl": ("chlorine", "#009E73", 1.02),
    "Br": ("bromine", "#8C3B12", 1.20),
    "I": ("iodine", "#6A3D9A", 1.39),
}
"""Name, colour and covalent radius in ångström (Cordero and others, 2008). The colours follow the custom of chemistry
as far as those of Okabe and Ito allow; the letters on the atoms say the same."""

_OTHER = ("#CC79A7", 1.2)
_ORDERS = {1.0: "single", 1.5: "aromatic", 2.0: "double", 3.0: "triple"}
_HEIGHT = 340

_STYLE = f"""
.oral4-molecule canvas{{width:100%;max-width:624px;height:{_HEIGHT}px;touch-action:pan-y;cursor:grab}}
.oral4-molecule canvas:active{{cursor:grabbing}}
.oral4-molecule canvas:focus-visible{{outline:2px solid currentColor;outline-offset:2px}}
.oral4-molecule .oral4-hint{{font-size:.85em;margin:.3em 0}}
.oral4-molecule .oral4-controls button{{margin:.2em 0}}
@media print{{.oral4-hint{{display:none}}}}
"""

_SCRIPT = (
    '(() => {"use strict";'
    + page.CONTROLS_SCRIPT
    + """
for (const root of document.querySelectorAll(".oral4-molecule:not([data-ready])")) {
  root.dataset.ready = "";
  const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  const canvas = root.querySelector("canvas"), pen = canvas.getContext("2d");
  // The atoms around each bond: an aromatic bond has its dashes on their side, inside the ring.
  const around = data.bonds.map(([i, j]) => data.bonds.flatMap(([k, l]) =>
    [[k, l], [l, k]].filter(([from, to]) => (from === i || from === j) && to !== i && to !== j).map(pair => pair[1])));
  let frame = data.start, turn, tilt, zoom, from = null;
  const reset = () => { turn = 0.35; tilt = 0.25; zoom = 1; };
  const draw = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1;
    if (!width || !height) return;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const scale = zoom * Math.min(width, height) / 2 / data.radius, xyz = data.frames[frame];
    const [ct, st, cl, sl] = [Math.cos(turn), Math.sin(turn), Math.cos(tilt), Math.sin(tilt)];
    const atoms = data.kind.map((kind, i) => {
      const [x, y, z] = [xyz[3 * i] / 100, xyz[3 * i + 1] / 100, xyz[3 * i + 2] / 100];
      const back = ct * z - st * x;
      const at = [ct * x + st * z, cl * y - sl * back, sl * y + cl * back];
      return {at, size: 0.2 + 0.26 * data.kinds[kind].radius, kind: data.kinds[kind]};
    });
    const near = z => Math.max(0.6, Math.min(1.6, 1 + 0.12 * z / data.radius));
    const project = ([x, y, z]) => [width / 2 + scale * near(z) * x, height / 2 - scale * near(z) * y];
    const things = atoms.map(atom => ({depth: atom.at[2], draw: () => {
      const [x, y] = project(atom.at), size = scale * near(atom.at[2]) * atom.size;
      pen.setLineDash([]);
      pen.beginPath();
      pen.arc(x, y, size, 0, 2 * Math.PI);
      pen.fillStyle = atom.kind.color;
      pen.fill();
      pen.lineWidth = 1;
      pen.strokeStyle = data.ink;
      pen.stroke();
      if (data.letters && size > 5) {
        pen.font = `600 ${1.1 * size}px system-ui, sans-serif`;
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.fillStyle = atom.kind.text;
        pen.fillText(atom.kind.symbol, x, y + 0.06 * size);
      }
    }}));
    data.bonds.forEach(([i, j, order], bond) => {
      const a = atoms[i], b = atoms[j], along = b.at.map((value, c) => value - a.at[c]);
      const space = Math.hypot(...along) || 1, broken = space > 3, depth = (a.at[2] + b.at[2]) / 2;
      // From surface to surface, so that no bond hides a letter.
      const start = project(a.at.map((value, c) => value + 0.85 * a.size * along[c] / space));
      const end = project(b.at.map((value, c) => value - 0.85 * b.size * along[c] / space));
      const dx = end[0] - start[0], dy = end[1] - start[1], length = Math.hypot(dx, dy) || 1;
      const lean = around[bond].reduce((sum, k) => {
        const [x, y] = project(atoms[k].at);
        return sum + dx * (y - start[1]) - dy * (x - start[0]);
      }, 0);
      things.push({depth: depth - 0.01, draw: () => {
        const lines = broken ? 1 : Math.ceil(order), gap = 0.2 * scale * near(depth);
        pen.strokeStyle = data.ink;
        pen.lineWidth = broken ? 0.75 : scale * near(depth) * (lines === 1 ? 0.15 : 0.09);
        for (let k = 0; k < lines; k++) {
          const shift = (k - (lines - 1) / 2) * gap * (lean < 0 ? -1 : 1) / length, sx = -dy * shift, sy = dx * shift;
          pen.setLineDash(order === 1.5 && k === 1 ? [gap, 0.7 * gap] : []);
          pen.beginPath();
          pen.moveTo(start[0] + sx, start[1] + sy);
          pen.lineTo(end[0] + sx, end[1] + sy);
          pen.stroke();
        }
      }});
    });
    things.sort((a, b) => a.depth - b.depth).forEach(thing => thing.draw());
  };
  const act = {
    ArrowLeft: () => { turn -= 0.12; }, ArrowRight: () => { turn += 0.12; },
    ArrowUp: () => { tilt -= 0.12; }, ArrowDown: () => { tilt += 0.12; },
    "+": () => { zoom = Math.min(8, zoom * 1.2); }, "-": () => { zoom = Math.max(0.2, zoom / 1.2); }, "0": reset,
  };
  act["="] = act["+"];
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in act)) return;
    event.preventDefault();
    act[event.key]();
    draw();
  });
  canvas.addEventListener("pointerdown", event => {
    from = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    if (!from) return;
    turn += (event.clientX - from[0]) / 120;
    tilt += (event.clientY - from[1]) / 120;
    from = [event.clientX, event.clientY];
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { from = null; });
  for (const button of root.querySelectorAll("[data-key]"))
    button.addEventListener("click", () => { act[button.dataset.key](); draw(); });
  reset();
  wire(root, data, values => {
    frame = values.length ? values[0] : data.start;
    if (values.length) canvas.setAttribute("aria-label", `${data.alt} ${data.name}: ${data.words[0][frame]}.`);
    draw();
  });
  new ResizeObserver(draw).observe(canvas);
}
})();"""
)


def molecule(
    atoms: Sequence[str],
    positions: Any,
    bonds: Sequence[Sequence[float]],
    *,
    alt: str,
    caption: str | None = None,
    frames: Sequence[Any] | None = None,
    name: str = "step",
    start: int = -1,
    play: bool = False,
    interval: int = 100,
    letters: bool = True,
) -> page.Fragment:
    """Show a molecule that the reader turns with the mouse, a finger or the arrow keys.

    Parameters
    ----------
    atoms : sequence of str, length n
        Element symbols.
    positions : array or Tensor, shape (n, 3) or (frames, n, 3)
        Coordinates in ångström. With three axes a slider runs through the frames. Each frame is centred, and all
        are turned alike, so that the frame shown first lies flat before the reader. Superposing frames is up to you.
    bonds : sequence of (int, int) or (int, int, float)
        First atom, second atom, order: 1 (the default), 1.5 for aromatic, 2 or 3. A bond longer than 3 ångström,
        as in a noisy frame, is drawn as a thin line.
    alt : str
        What the view shows, for readers who cannot see it.
    caption : str, optional
        Plain text below the view.
    frames : sequence, optional
        What to call each frame, for example its noise level; 1, 2, ... when not given.
    name : str
        What the slider steps through.
    start : int
        The frame shown at first; the last one when not given.
    play : bool
        Add a button that runs through the frames. Nothing moves by itself.
    interval : int
        Milliseconds between two frames while playing, at least 50.
    letters : bool
        Write the element on each atom.

    Returns
    -------
    oral4.viz.page.Fragment

    Raises
    ------
    ValueError
        If there is no atom or no frame, the shape of ``positions`` does not fit the atoms, a coordinate is NaN
        or infinite, a bond names an atom that is not there, joins an atom to itself or has another order, or
        ``frames``, ``start``, ``interval`` or ``alt`` does not fit.
    TypeError
        If a symbol is not a text.

    Examples
    --------
    >>> water = [[0.0, 0.0, 0.12], [0.0, 0.76, -0.47], [0.0, -0.76, -0.47]]
    >>> molecule(["O", "H", "H"], water, [(0, 1), (0, 2)], alt="Water, bent by 104 degrees.").text
    'molecule: 3 atoms, Water, bent by 104 degrees.'
    """
    atoms = list(atoms)
    for symbol in atoms:
        if not isinstance(symbol, str) or not symbol.isalpha():
            raise TypeError(f"molecule: the atom {symbol!r} is no element symbol; give for example 'C'")
    path = _path(positions, len(atoms))
    joined = [_bond(bond, len(atoms)) for bond in bonds]
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError("molecule: alt is empty; say what the view shows to a reader who cannot see it")
    count = len(path)
    if not -count <= start < count:
        raise ValueError(f"molecule: start={start} is no frame; there are {count}")
    start %= count
    if interval < 50:
        raise ValueError(f"molecule: interval={interval} ms is too fast to follow; give at least 50")
    words = [page.in_words(label) for label in (range(1, count + 1) if frames is None else frames)]
    if len(words) != count:
        raise ValueError(f"molecule: {len(words)} names in frames for {count} frames; give one for each")

    path = path @ _facing(path[start])
    # The view fits the frame shown at first; a much wider one, such as pure noise, may leave it.
    extents = np.linalg.norm(path, axis=-1).max(axis=1)
    radius = float(min(extents.max(), 1.4 * max(extents[start], 1.0))) + 0.5
    kinds = sorted(set(atoms))
    moving = count > 1
    data = {
        "alt": _stop(alt),
        "name": name[:1].upper() + name[1:],
        "words": [words] if moving else [],
        "start": start,
        "interval": interval,
        "radius": round(radius, 2),
        "letters": bool(letters),
        "ink": INK,
        "kinds": [_kind(symbol) for symbol in kinds],
        "kind": [kinds.index(symbol) for symbol in atoms],
        "bonds": joined,
        # Hundredths of an ångström: a third of the bytes, finer than a pixel.
        "frames": np.round(100 * path).astype(int).reshape(count, -1).tolist(),
    }
    view = "".join(
        f'<button type="button" data-key="{key}" aria-label="{label}">{shown}</button>'
        for key, label, shown in (("+", "Larger", "+"), ("-", "Smaller", "\u2212"), ("0", "Reset view", "Reset view"))
    )
    settings, position = ({name: words}, [start]) if moving else ({}, [])
    controls = page.controls_html(settings, position, play=0 if play and moving else None, more=f"<span>{view}</span>")
    markup = (
        f'<figure class="oral4 oral4-molecule">{page.style()}<style>{_STYLE}</style>'
        f'<canvas class="oral4-plate" tabindex="0" role="img" aria-label="{html.escape(_stop(alt))}" '
        f'style="height:{_HEIGHT}px"></canvas>'
        '<p class="oral4-hint">Drag it, or use the arrow keys, to turn it; + and \u2212 change its size.</p>'
        f"{controls}<noscript><p>The view of this molecule needs JavaScript. {html.escape(_stop(alt))}</p></noscript>"
        f'<div class="oral4-unseen">{_description(atoms, joined)}</div>'
        f"{page.data_block(data)}{page.caption_html(caption)}</figure><script>{_SCRIPT}</script>"
    )
    shown = f"{len(atoms)} atoms" + (f", {count} frames" if moving else "")
    return page.Fragment(markup, f"molecule: {shown}, {alt.strip()}")


def from_rdkit(mol: Any, conformer: int | None = None) -> tuple[list[str], np.ndarray, list[tuple[int, int, float]]]:
    """Return the atoms, positions and bonds of an RDKit molecule: ``molecule(*from_rdkit(mol), alt=...)``.

    Parameters
    ----------
    mol : rdkit.Chem.Mol
        With at least one conformer.
    conformer : int, optional
        The identifier of one conformer. When not given the frames are all of them.

    Returns
    -------
    atoms : list of str, length n
    positions : array, shape (n, 3), or (conformers, n, 3) where there are several and none is chosen
        In ångström.
    bonds : list of (int, int, float)
        Bonds whose order is not 1, 1.5, 2 or 3 (such as those to metals) count as single.

    Raises
    ------
    ValueError
        If there is no conformer, or not the one asked for.
    """
    stored = {each.GetId(): each.GetPositions() for each in mol.GetConformers()}
    if not stored:
        raise ValueError("from_rdkit: the molecule has no conformer; embed it first (rdkit.Chem.AllChem.EmbedMolecule)")
    if conformer is not None and conformer not in stored:
        raise ValueError(f"from_rdkit: conformer={conformer} does not exist; choose one of {sorted(stored)}")
    chosen = list(stored.values()) if conformer is None else [stored[conformer]]
    orders = ((b.GetBeginAtomIdx(), b.GetEndAtomIdx(), float(b.GetBondTypeAsDouble())) for b in mol.GetBonds())
    bonds = [(i, j, order if order in _ORDERS else 1.0) for i, j, order in orders]
    positions = np.stack(chosen) if len(chosen) > 1 else np.asarray(chosen[0])
    return [atom.GetSymbol() for atom in mol.GetAtoms()], positions, bonds


def _path(positions: Any, count: int) -> np.ndarray:
    """Return finite centred coordinates, shape (frames, n, 3)."""
    if count == 0:
        raise ValueError("molecule: there is no atom; give at least one")
    path = np.asarray(positions.detach().cpu() if hasattr(positions, "detach") else positions, dtype=float)
    if path.ndim not in (2, 3) or path.shape[-2:] != (count, 3) or path.shape[0] == 0:
        raise ValueError(
            f"molecule: positions have shape {path.shape}; for {count} atoms give ({count}, 3) or (frames, {count}, 3)"
        )
    path = path.reshape(-1, count, 3)
    bad = np.argwhere(~np.isfinite(path))
    if bad.size:
        frame, atom, _ = bad[0].tolist()
        raise ValueError(f"molecule: a coordinate of atom {atom} in frame {frame} is NaN or infinite")
    return path - path.mean(axis=1, keepdims=True)


def _facing(positions: np.ndarray) -> np.ndarray:
    """Return the rotation, shape (3, 3), after which the molecule lies as flat as it can before the reader.

    The longest axis becomes x, the shortest z, which points to the reader. Chirality is kept.
    """
    axes = np.linalg.svd(positions, full_matrices=True)[2]
    # The sign of each axis is arbitrary in the decomposition; this choice does not depend on the machine.
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    axes[2] *= np.sign(np.linalg.det(axes))
    return axes.T


def _bond(bond: Sequence[float], count: int) -> list[float]:
    """Return a checked bond as [first, second, order]."""
    if len(bond) not in (2, 3):
        raise ValueError(f"molecule: the bond {tuple(bond)} has {len(bond)} entries; give (first, second, order)")
    first, second, order = (*bond, 1.0) if len(bond) == 2 else bond
    for end in (first, second):
        if end != int(end) or not 0 <= end < count:
            raise ValueError(f"molecule: the bond {tuple(bond)} names atom {end}; atoms are 0 to {count - 1}")
    if first == second:
        raise ValueError(f"molecule: the bond {tuple(bond)} joins atom {int(first)} to itself")
    if float(order) not in _ORDERS:
        orders = ", ".join(f"{known:g}" for known in _ORDERS)
        raise ValueError(f"molecule: the bond {tuple(bond)} has order {order}; choose one of {orders}")
    return [int(first), int(second), float(order)]


def _kind(symbol: str) -> dict[str, Any]:
    """Return how an element is drawn."""
    color, radius = ELEMENTS[symbol][1:] if symbol in ELEMENTS else _OTHER
    text = max("#000000", "#ffffff", key=lambda shade: contrast(shade, color))
    return {"symbol": symbol, "color": color, "text": text, "radius": radius}


def _description(atoms: Sequence[str], bonds: Sequence[Sequence[float]]) -> str:
    """Return the atoms and bonds as a list for readers who use a screen reader."""
    elements = [(ELEMENTS[symbol][0] if symbol in ELEMENTS else symbol, n) for symbol, n in Counter(atoms).items()]
    kinds = [(f"{_ORDERS[order]} bonds", n) for order, n in sorted(Counter(bond[2] for bond in bonds).items())]
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{n}</dd>" for k, n in elements + kinds) + "</dl>"


def _stop(text: str) -> str:
    """Return the text with a full stop."""
    text = text.strip()
    return text if text[-1] in ".!?" else text + "."
