"""A molecule arrives in the page as it was given; what is no molecule is refused."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from rdkit import Chem
from rdkit.Chem import AllChem

from oral4.viz.molecule import ELEMENTS, _facing, _kind, from_rdkit, molecule
from oral4.viz.style import contrast

ATOMS, POSITIONS, BONDS = (
    ["O", "H", "H"],
    np.array([[0, 0, 0.12], [0, 0.76, -0.47], [0, -0.76, -0.47]]),
    [(0, 1), (0, 2)],
)


def distances(positions):
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)


def test_the_page_holds_the_molecule(parse):
    tree = parse(molecule(ATOMS, POSITIONS, BONDS, alt="Water", caption="A caption").html)
    data, canvas = tree.data(), tree.all("canvas")[0]
    assert [data["kinds"][k]["symbol"] for k in data["kind"]] == ATOMS
    assert data["bonds"] == [[0, 1, 1.0], [0, 2, 1.0]]
    shown = np.array(data["frames"]).reshape(1, 3, 3) / 100
    np.testing.assert_allclose(distances(shown[0]), distances(POSITIONS), rtol=0, atol=0.02)  # two roundings of 0.005
    assert canvas["role"] == "img" and canvas["tabindex"] == "0" and canvas["aria-label"] == "Water."
    assert tree.text("dt") == "oxygenhydrogensingle bonds" and tree.text("dd") == "122"
    assert tree.text("figcaption") == "A caption" and tree.all("input") == []
    assert not [a for _, a in tree.elements if "id" in a]
    assert [b["data-key"] for b in tree.all("button")] == ["+", "-", "0"]


def test_frames_get_a_slider_in_words(parse):
    path = np.stack([POSITIONS * k for k in (3, 2, 1)])
    tree = parse(
        molecule(
            ATOMS, torch.tensor(path), BONDS, alt="Water", frames=[1.0, 0.5, 0], name="noise level", play=True
        ).html
    )
    data, slider = tree.data(), tree.all("input")[0]
    assert data["words"] == [["1", "0.5", "0"]] and data["start"] == 2 and len(data["frames"]) == 3
    assert slider["aria-label"] == "noise level" and slider["aria-valuetext"] == "0" and slider["max"] == "2"
    assert [b.get("data-play") for b in tree.all("button")] == ["0", None, None, None]
    assert parse(molecule(ATOMS, path, BONDS, alt="Water", start=0).html).data()["start"] == 0


def test_one_frame_of_three_axes_has_no_slider(parse):
    assert parse(molecule(ATOMS, POSITIONS[None], BONDS, alt="Water", play=True).html).all("input") == []


def test_one_atom_and_no_bond(parse):
    data = parse(molecule(["He"], [[5.0, 5.0, 5.0]], [], alt="Helium!").html).data()
    assert data["frames"] == [[0, 0, 0]] and data["kinds"][0]["color"] == "#CC79A7" and data["alt"] == "Helium!"


@given(arrays(float, (5, 3), elements=st.floats(-10, 10)))
def test_turning_to_the_reader_is_a_rotation_without_mirror(positions):
    rotation = _facing(positions - positions.mean(0))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), rtol=0, atol=1e-12)  # double precision
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-12)


def test_a_flat_molecule_faces_the_reader(parse):
    flat = np.random.default_rng(0).normal(size=(6, 3)) * [0, 1, 4]  # lies in the plane of y and z
    shown = np.array(parse(molecule(["C"] * 6, flat, [], alt="x").html).data()["frames"]).reshape(6, 3)
    assert np.abs(shown[:, 2]).max() <= 1 < np.ptp(shown[:, 1]) < np.ptp(shown[:, 0])


def test_letters_are_legible_and_colours_differ():
    for symbol in [*ELEMENTS, "Xx"]:
        kind = _kind(symbol)
        assert contrast(kind["text"], kind["color"]) >= 4.5, symbol
    for first, second in itertools.combinations(ELEMENTS, 2):
        rgb = [[int(_kind(symbol)["color"][i : i + 2], 16) for i in (1, 3, 5)] for symbol in (first, second)]
        assert np.abs(np.subtract(*rgb)).max() >= 24, (first, second)


def test_every_text_is_escaped(parse):
    nasty = '</script><script>alert(1)</script>"'
    html = molecule(
        ATOMS, np.stack([POSITIONS] * 2), BONDS, alt=nasty, caption=nasty, frames=[nasty, "b"], name=nasty
    ).html
    tree = parse(html)
    assert tree.all("canvas")[0]["aria-label"] == nasty + "." and tree.text("figcaption") == nasty
    assert tree.data()["words"] == [[nasty, "b"]] and len(tree.all("script")) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"atoms": [], "positions": np.zeros((0, 3)), "bonds": []}, "no atom"),
        ({"atoms": ["O", "H"]}, r"shape \(3, 3\); for 2 atoms give \(2, 3\) or \(frames, 2, 3\)"),
        ({"positions": POSITIONS[:, :2]}, r"shape \(3, 2\)"),
        ({"positions": np.zeros((0, 3, 3))}, r"shape \(0, 3, 3\)"),
        ({"positions": np.where(np.eye(3), np.nan, 0)}, "atom 0 in frame 0 is NaN"),
        ({"positions": np.where(np.arange(18).reshape(2, 3, 3) == 13, np.inf, 0)}, "atom 1 in frame 1"),
        ({"bonds": [(0, 3)]}, r"bond \(0, 3\) names atom 3; atoms are 0 to 2"),
        ({"bonds": [(-1, 0)]}, "names atom -1"),
        ({"bonds": [(0.5, 1)]}, r"names atom 0\.5"),
        ({"bonds": [(1, 1)]}, "joins atom 1 to itself"),
        ({"bonds": [(0, 1, 4)]}, "has order 4; choose one of 1, 1.5, 2, 3"),
        ({"bonds": [(0,)]}, "has 1 entries"),
        ({"alt": " "}, "alt is empty"),
        ({"alt": None}, "alt is empty"),
        ({"start": 1}, "start=1 is no frame; there are 1"),
        ({"frames": ["a", "b"]}, "2 names in frames for 1 frames"),
        ({"interval": 20}, "interval=20"),
    ],
)
def test_what_is_no_molecule_is_refused(changed, message):
    options = {"atoms": ATOMS, "positions": POSITIONS, "bonds": BONDS, "alt": "Water", **changed}
    with pytest.raises(ValueError, match=message):
        molecule(options.pop("atoms"), options.pop("positions"), options.pop("bonds"), **options)


@pytest.mark.parametrize("symbol", [8, "", "C<", None])
def test_symbols_have_to_be_words(symbol):
    with pytest.raises(TypeError, match="element symbol"):
        molecule([symbol], [[0, 0, 0]], [], alt="x")


def aspirin(conformers):
    mol = Chem.AddHs(Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O"))
    AllChem.EmbedMultipleConfs(mol, conformers, randomSeed=1)
    return mol


def test_from_rdkit(parse):
    mol = aspirin(3)
    atoms, positions, bonds = from_rdkit(mol)
    assert len(atoms) == 21 and positions.shape == (3, 21, 3)
    assert sorted(order for *_, order in bonds).count(1.5) == 6 and sorted(order for *_, order in bonds).count(2.0) == 2
    np.testing.assert_array_equal(from_rdkit(mol, 1)[1], mol.GetConformer(1).GetPositions())
    assert from_rdkit(aspirin(1))[1].shape == (21, 3)
    html = molecule(atoms, positions, bonds, alt="Aspirin", name="conformer").html
    assert parse(html).text("dt") == "carbonoxygenhydrogensingle bondsaromatic bondsdouble bonds"
    assert len(html.encode()) < 16_000  # style and script included
    with pytest.raises(ValueError, match=r"conformer=7 does not exist; choose one of \[0, 1, 2\]"):
        from_rdkit(mol, 7)
    with pytest.raises(ValueError, match="no conformer; embed"):
        from_rdkit(Chem.MolFromSmiles("C"))


def test_other_bonds_of_rdkit_count_as_single():
    mol = Chem.AddHs(Chem.MolFromSmiles("[NH3]->[Fe]"))
    AllChem.Compute2DCoords(mol)
    assert {order for *_, order in from_rdkit(mol)[2]} == {1.0}


def test_a_frame_of_noise_does_not_make_the_molecule_small(parse):
    path = np.stack([POSITIONS * 20, POSITIONS])
    alone, after = (parse(molecule(ATOMS, p, BONDS, alt="x").html).data()["radius"] for p in (POSITIONS, path))
    assert alone <= after <= 1.5 * alone
