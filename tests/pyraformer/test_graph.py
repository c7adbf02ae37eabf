"""The pyramidal graph against the official code's tables, its definition and its closed forms."""

import dataclasses
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from oral4.errors import MissingExtra
from oral4.pyraformer.graph import (
    PyramidSpec,
    auto_pyramid,
    dense_mask,
    edges,
    edges_reference,
    hops,
    neighbour_table,
    path_length,
    plot_pyramid,
)

GOLDENS = Path(__file__).parents[1] / "goldens/pyraformer"
GRAPH = np.load(GOLDENS / "graph.npz")
TVM = np.load(GOLDENS / "tvm_tables.npz")
NUM_CASES = len({name.split("/")[0] for name in GRAPH})
NUM_TABLES = len({name.split("/")[0] for name in TVM})


@st.composite
def specs(draw, max_length=120):
    """Any pyramid: uneven windows, remainders, one scale, one node, neighbourhoods wider than a scale."""
    size = length = draw(st.integers(1, max_length))
    windows = []
    while size >= 2 and draw(st.booleans()):
        windows.append(draw(st.integers(2, min(size, 9))))
        size //= windows[-1]
    return PyramidSpec(length, windows, 2 * draw(st.one_of(st.integers(0, 4), st.integers(0, length))) + 1)


def pairs(spec):
    return set(map(tuple, edges(spec).tolist()))


# ---------------------------------------------------------------------------------------- the official code


def official(case):
    return PyramidSpec(*(GRAPH[f"c{case}/{name}"] for name in ("L", "windows", "A")))


def test_no_golden_is_forgotten():
    assert (NUM_CASES, NUM_TABLES) == (14, 5)


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_graph_is_the_official_one(case):
    spec = official(case)
    assert spec.sizes == tuple(GRAPH[f"c{case}/sizes"])
    np.testing.assert_array_equal(edges(spec), GRAPH[f"c{case}/edges"])
    np.testing.assert_array_equal(edges_reference(spec), GRAPH[f"c{case}/edges"])
    np.testing.assert_array_equal(spec.leaf_to_nodes(), GRAPH[f"c{case}/refer"])
    assert spec.num_edges() == GRAPH[f"c{case}/n_edges"]


def reverse_slots(table):
    """Where the row of a neighbour holds the node itself, -1 for empty places: what the official `get_k_q` computes."""
    out = torch.full_like(table, -1)
    for node, row in enumerate(table.tolist()):
        for slot, key in enumerate(row):
            if key >= 0:
                out[node, slot] = (table[key] == node).nonzero().item()
    return out


@pytest.mark.parametrize("case", [0, 2, 3, 4])
def test_neighbour_table_is_the_official_one(case):
    spec = PyramidSpec(TVM[f"t{case}/L"], [TVM[f"t{case}/C"]] * 3, TVM[f"t{case}/A"])
    table = neighbour_table(spec)
    # the official tables mark nodes left of the series by their negative position, all others by -1
    np.testing.assert_array_equal(table, np.maximum(TVM[f"t{case}/q_k"], -1))
    np.testing.assert_array_equal(reverse_slots(table), np.maximum(TVM[f"t{case}/k_q"], -1))


def test_no_child_is_lost_where_the_official_table_loses_one():
    """L = 163, C = 4: the last node of scale 2 has seven children; the official table holds six and drops one."""
    table, theirs = neighbour_table(PyramidSpec(163, [4, 4, 4])), TVM["t1/q_k"]
    assert (TVM["t1/k_q"] == -9).all(), "the official get_k_q raises here"
    assert table.shape == (215, 3 + 7 + 1) and theirs.shape == (215, 3 + 6 + 1)
    wrong = [i for i in range(215) if set(table[i].tolist()) - {-1} != set(theirs[i].tolist()) - {-1}]
    assert wrong == [202]
    assert set(table[202].tolist()) - set(theirs[202].tolist()) - {-1} == {162}
    assert 202 in theirs[162], "child 162 still looks at its parent: their relation is not symmetric"
    assert table[202, 3:10].tolist() == list(range(156, 163))
    reverse_slots(table)  # every neighbour knows its way back, else .item() raises


# ---------------------------------------------------------------------------------------- properties


@given(specs(60))
@settings(max_examples=60, deadline=None)
def test_edges_are_the_definition(spec):
    assert torch.equal(edges(spec), edges_reference(spec))


@given(specs())
@settings(max_examples=100, deadline=None)
def test_three_forms_of_one_graph(spec):
    found, mask, table = edges(spec), dense_mask(spec), neighbour_table(spec)
    assert torch.equal(mask.nonzero(), found)
    row, slot = (table >= 0).nonzero(as_tuple=True)
    assert sorted(zip(row.tolist(), table[row, slot].tolist(), strict=True)) == list(map(tuple, found.tolist()))
    assert table.shape[1] == spec.neighbours + 1 + max([0, *(torch.bincount(spec.parent[spec.parent >= 0])).tolist()])
    assert (found.dtype, mask.dtype, table.dtype) == (torch.int64, torch.bool, torch.int64)


@given(specs())
@settings(max_examples=100, deadline=None)
def test_symmetric_with_self_and_counted(spec):
    found = pairs(spec)
    assert found == {(j, i) for i, j in found}
    assert {(i, i) for i in range(spec.num_nodes)} <= found
    assert len(found) == len(edges(spec)) == spec.num_edges()
    h, a = spec.half_width, spec.neighbours
    by_hand = sum(a * m - h * (h + 1) if m > h else m * m for m in spec.sizes) + 2 * (spec.num_nodes - spec.sizes[-1])
    assert spec.num_edges() == by_hand <= (a + 2) * 2 * spec.length  # Proposition 1


@given(specs())
@settings(max_examples=100, deadline=None)
def test_sizes_and_parents(spec):
    assert spec.num_scales == len(spec.sizes) == len(spec.starts) == len(spec.windows) + 1
    assert spec.num_nodes == sum(spec.sizes) == len(spec.parent) == len(spec.scale_of)
    assert spec.sizes == tuple(spec.length // math.prod(spec.windows[:s]) for s in range(spec.num_scales))
    assert [spec.scale_of.tolist().index(s) for s in range(spec.num_scales)] == list(spec.starts)
    top = spec.starts[-1]
    assert (spec.parent[top:] == -1).all()
    assert torch.equal(spec.scale_of[spec.parent[:top]], spec.scale_of[:top] + 1), "one parent, one scale up"
    for s, window in enumerate(spec.windows):
        family = torch.bincount(spec.parent[spec.starts[s] : spec.starts[s + 1]] - spec.starts[s + 1])
        assert (family[:-1] == window).all() and window <= family[-1] <= 2 * window - 1, (
            "only the last takes left-overs"
        )
    lineage = spec.leaf_to_nodes()
    assert lineage.shape == (spec.length, spec.num_scales)
    assert torch.equal(lineage[:, 0], torch.arange(spec.length))
    assert torch.equal(spec.parent[lineage[:, :-1]], lineage[:, 1:])


@given(specs(40))
@settings(max_examples=80, deadline=None)
def test_longest_path_by_search_from_every_node(spec):
    distances = torch.stack([hops(spec, i) for i in range(spec.num_nodes)])
    assert torch.equal(distances, distances.T)
    longest = math.inf if (distances < 0).any() else distances.max().item()
    assert spec.max_path() == path_length(spec) == longest
    assert spec.max_path() <= (
        2 * (spec.num_scales - 1) + -(-2 * (spec.sizes[-1] - 1) // (spec.neighbours - 1))
        if spec.neighbours > 1
        else math.inf
    ), "Proposition 2 is an upper bound"


@given(specs(30))
@settings(max_examples=30, deadline=None)
def test_hops_are_powers_of_the_mask(spec):
    mask = dense_mask(spec).double()
    distance, reach = hops(spec, 0), torch.eye(spec.num_nodes, dtype=torch.float64)[0]
    for step in range(6):
        assert torch.equal(reach > 0, (distance >= 0) & (distance <= step))
        reach = ((reach @ mask) > 0).double()


# (L, windows, A): pairs, longest path; the table of the paper's settings and three longer series
SETTINGS = [
    (169, (4, 4, 4), 3, 1103, 7), (192, (4, 4, 4), 3, 1261, 8), (337, (4, 4, 4), 5, 3095, 8),
    (385, (5, 5, 5), 3, 2386, 8), (673, (5, 5, 5), 5, 5832, 8), (673, (6, 6, 6), 3, 4016, 8),
    (337, (5, 5, 5), 3, 2083, 7), (721, (12, 7, 4), 3, 3943, 7), (1024, (4, 4, 4), 3, None, 21),
    (4096, (4, 4, 4), 3, None, 69), (4096, (16, 16, 16), 3, None, 6),
]  # fmt: skip


@pytest.mark.parametrize(("length", "windows", "neighbours", "count", "path"), SETTINGS)
def test_known_settings(length, windows, neighbours, count, path):
    spec = PyramidSpec(length, windows, neighbours)
    assert count in (None, spec.num_edges())
    assert spec.max_path() == path_length(spec) == path_length(spec, 0, length - 1) == path
    assert path == 2 * (spec.num_scales - 1) + -(-2 * (spec.sizes[-1] - 1) // (neighbours - 1))
    assert isinstance(spec.max_path(), int)


def test_closed_forms_at_their_edges():
    assert PyramidSpec(7, (), 99).num_edges() == 49, "a neighbourhood wider than the series is full attention"
    assert PyramidSpec(7, (), 13).num_edges() == 49 and PyramidSpec(7, (), 11).num_edges() == 47
    assert PyramidSpec(1, ()).num_edges() == 1 and PyramidSpec(1, ()).max_path() == 0
    assert PyramidSpec(8, (2, 2, 2), 99).max_path() == 3, "leaves see each other at once; the climb to the top remains"
    assert PyramidSpec(16, (4,), 1).max_path() == path_length(PyramidSpec(16, (4,), 1)) == math.inf
    assert PyramidSpec(16, (4, 4), 1).max_path() == 4
    assert path_length(PyramidSpec(4, (2,), 1), 0, 2) == math.inf and path_length(PyramidSpec(4, (2,), 1), 0, 1) == 2


def test_lemma_1():
    assert PyramidSpec(169, (4, 4, 4)).receptive_field_ok(1) and PyramidSpec(192, (4, 4, 4)).receptive_field_ok(2)
    assert not PyramidSpec(192, (4, 4, 4)).receptive_field_ok(1)
    assert not PyramidSpec(1024, (4, 4, 4)).receptive_field_ok(14) and PyramidSpec(1024, (4, 4, 4)).receptive_field_ok(
        15
    )
    assert PyramidSpec(16, (4, 4), 1).receptive_field_ok(1) and not PyramidSpec(16, (4,), 1).receptive_field_ok(100)


@given(specs(60), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_lemma_1_is_what_a_search_on_the_top_scale_finds(spec, num_layers):
    """In N hops along the top every coarsest node reaches every other, and so, with summaries, the whole series."""
    first, last = spec.starts[-1], spec.num_nodes - 1
    top = PyramidSpec(spec.sizes[-1], (), spec.neighbours)
    assert spec.receptive_field_ok(num_layers) == (path_length(top, 0, last - first) <= num_layers)


# ---------------------------------------------------------------------------------------- windows chosen for you


def bracket(length, num_layers, num_scales, neighbours):
    """Return the whole windows that Proposition 2 allows, in exact integer arithmetic."""
    top, power = num_layers * (neighbours // 2) + 1, num_scales - 1
    return [
        window for window in range(2, int(length ** (1 / power)) + 2) if window**power <= length <= top * window**power
    ]


@pytest.mark.parametrize(
    ("num_layers", "num_scales", "neighbours"), [(4, 4, 3), (1, 4, 3), (2, 3, 5), (1, 6, 3), (3, 2, 1), (1, 5, 1)]
)
def test_auto_pyramid_for_every_short_length(num_layers, num_scales, neighbours):
    for length in range(2 ** (num_scales - 1), 1500):
        spec = auto_pyramid(length, num_layers=num_layers, num_scales=num_scales, neighbours=neighbours)
        assert (spec.length, spec.num_scales, spec.neighbours) == (length, num_scales, neighbours)
        assert spec.receptive_field_ok(num_layers)
        allowed = bracket(length, num_layers, num_scales, neighbours)
        if allowed:
            assert set(spec.windows) == {min(allowed)}
        else:
            assert max(spec.windows) - min(spec.windows) <= 1 and list(spec.windows) == sorted(
                spec.windows, reverse=True
            )


@given(st.integers(8, 10**7), st.integers(1, 12), st.sampled_from([2, 3, 4]), st.sampled_from([1, 3, 5, 9]))
@settings(max_examples=300, deadline=None)
def test_auto_pyramid_for_long_series(length, num_layers, num_scales, neighbours):
    spec = auto_pyramid(length, num_layers=num_layers, num_scales=num_scales, neighbours=neighbours)
    assert spec.receptive_field_ok(num_layers) and spec.num_scales == num_scales
    smaller = tuple(max(2, c - 1) for c in spec.windows)
    if smaller != spec.windows:
        assert length / math.prod(smaller) > num_layers * (neighbours // 2) + 1, (
            "smaller windows break Proposition 2's bound"
        )


def test_auto_pyramid_makes_the_longest_path_independent_of_length():
    for length in (10**3, 10**4, 10**5, 10**6, 10**7):
        assert auto_pyramid(length).max_path() <= 2 * 3 + 4  # climb and descend three scales, N = 4 hops along the top
    assert auto_pyramid(2**20).windows == (60, 60, 60)


# ---------------------------------------------------------------------------------------- cost, ownership, identity


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("windows", [(4, 4, 4), (27, 27, 27)])
@pytest.mark.parametrize(
    "make", [edges, lambda s: s.parent, lambda s: s.leaf_to_nodes(), lambda s: s.scale_of, lambda s: hops(s, 0)]
)
def test_linear_memory(make, windows):
    spec = PyramidSpec(20_000, windows)
    with LargestTensor() as watch:
        make(spec)
    # candidates: A own + two families of children at most + parent, for at most twice L nodes, and (query, key) pairs
    assert 0 < watch.numel <= 2 * 2 * (spec.neighbours + 3) * spec.length


def test_linear_memory_of_the_table():
    spec = PyramidSpec(20_000, (4, 4, 4))
    with LargestTensor() as watch:
        neighbour_table(spec)
    assert watch.numel == spec.num_nodes * (3 + 7 + 1) or watch.numel == neighbour_table(spec).numel()


def test_tensors_belong_to_the_caller():
    spec = PyramidSpec(23, (2, 3), 7)
    for make in (
        edges,
        dense_mask,
        neighbour_table,
        PyramidSpec.leaf_to_nodes,
        lambda s: s.parent,
        lambda s: s.scale_of,
    ):
        before = make(spec).clone()
        make(spec).zero_()
        assert torch.equal(make(spec), before)


def test_equal_specs_are_one_key():
    spec = PyramidSpec(169, [4, 4, 4])
    assert (
        spec
        == PyramidSpec(np.int64(169), np.array([4, 4, 4]), np.int32(3))
        == PyramidSpec(torch.tensor(169), torch.tensor([4, 4, 4]))
    )
    assert (
        len({spec, PyramidSpec(169, (4, 4, 4)), PyramidSpec(169, iter([4, 4, 4])), PyramidSpec(169, (4, 4, 4), 5)}) == 2
    )
    assert type(spec.windows) is tuple and {type(c) for c in PyramidSpec(169, np.array([4, 4])).windows} == {int}
    assert repr(spec) == "PyramidSpec(length=169, windows=(4, 4, 4), neighbours=3)"
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert dataclasses.replace(spec, length=168).sizes == (168, 42, 10, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.length = 5


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (50, [4, 4, 4]),
            ValueError,
            r"scale 4 would have no node: length 50 .*windows\[2\] may be at most 3 .*product",
        ),
        ((3, [3, 2]), ValueError, r"scale 3 would have no node: .*drop windows\[1:\].*auto_pyramid"),
        ((10, [11]), ValueError, r"windows\[0\] may be at most 10"),
        ((10, [2, 1]), ValueError, r"windows\[1\] must be at least 2, got 1 .*repeat the scale"),
        ((10, [0]), ValueError, r"windows\[0\] must be at least 2, got 0"),
        ((10, [-4]), ValueError, r"windows\[0\] must be at least 2, got -4"),
        ((10, [2.0]), TypeError, r"windows\[0\] must be an integer >= 2, got 2.0 of type float"),
        ((10, [True]), TypeError, r"windows\[0\] .*bool True"),
        ((10, ["2"]), TypeError, r"windows\[0\] .*'2' of type str"),
        ((10, "22"), TypeError, "windows must be a sequence"),
        ((10, 4), TypeError, r"windows must be a sequence of integers such as \(4, 4, 4\), got 4"),
        ((10, None), TypeError, "windows must be a sequence"),
        ((0, ()), ValueError, "length must be at least 1, got 0"),
        ((-5, ()), ValueError, "length must be at least 1, got -5"),
        ((10.0, ()), TypeError, "length must be an integer >= 1, got 10.0"),
        ((True, ()), TypeError, "length .*bool True"),
        (("10", ()), TypeError, "length must be an integer"),
        (
            (10, [2], 4),
            ValueError,
            r"neighbours must be odd.* got 4. Use 3 or 5.*official code.*2 nodes on each side, that is 5",
        ),
        ((10, [2], 0), ValueError, "neighbours must be at least 1, got 0"),
        ((10, [2], -3), ValueError, "neighbours must be at least 1, got -3"),
        ((10, [2], 3.0), TypeError, "neighbours must be an integer"),
        ((10, [2], np.bool_(True)), TypeError, "neighbours must be an integer"),
    ],
)
def test_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        PyramidSpec(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"length": 7},
            ValueError,
            "length 7 is too short for 4 scales: .* at least 8 points. Use num_scales=3 or fewer",
        ),
        ({"length": 1}, ValueError, r"Use PyramidSpec\(1, \(\)\)"),
        ({"length": 0}, ValueError, "length must be at least 1"),
        (
            {"length": 100, "num_scales": 1},
            ValueError,
            r"num_scales must be at least 2, got 1 .*PyramidSpec\(length, \(\)\)",
        ),
        ({"length": 100, "num_layers": 0}, ValueError, "num_layers must be at least 1"),
        ({"length": 100, "num_layers": 2.5}, TypeError, "num_layers must be an integer"),
        ({"length": 100, "neighbours": 2}, ValueError, "neighbours must be odd"),
        ({"length": 100.0}, TypeError, "length must be an integer"),
    ],
)
def test_auto_pyramid_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        auto_pyramid(**arguments)
    if arguments == {"length": 7}:
        assert auto_pyramid(7, num_scales=3).num_scales == 3, "the advice works"


def test_other_refusals():
    spec = PyramidSpec(16, (4,))
    with pytest.raises(
        ValueError, match=r"125,000 nodes takes 15,625,000,000 bytes .*neighbour_table.*pyramidal_attention"
    ):
        dense_mask(PyramidSpec(100_000, (4,)))
    with pytest.raises(ValueError, match=r"source must be a node of the pyramid, 0 .. 19, got 20"):
        hops(spec, 20)
    with pytest.raises(ValueError, match="source must be at least 0, got -1"):
        path_length(spec, -1)
    with pytest.raises(ValueError, match="target must be a node"):
        path_length(spec, 0, 99)
    with pytest.raises(TypeError, match="num_layers must be an integer"):
        spec.receptive_field_ok(1.5)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        spec.receptive_field_ok(0)


# ---------------------------------------------------------------------------------------- drawing


def test_plot(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    spec = PyramidSpec(16, (4, 4))
    ax = plot_pyramid(spec, highlight=17)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "scale 1: 16 nodes",
        "scale 2: 4 nodes",
        "scale 3: 1 node",
    ]
    dots, keys = (c.get_offsets() for c in ax.collections)
    np.testing.assert_allclose(dots[[0, 15, 16, 20]], [[0, 0], [15, 0], [1.5, 1], [7.5, 2]])
    np.testing.assert_allclose(keys, dots[sorted(j for i, j in pairs(spec) if i == 17)])
    # lines: 15 + 3 to the next node of the same scale, 20 to parents; 8 more for the highlighted node (itself included)
    assert len(ax.lines) == 18 + 20 + 8
    assert plot_pyramid(spec, ax=ax) is ax
    plt.close("all")
    with pytest.raises(ValueError, match="500 nodes"):
        plot_pyramid(PyramidSpec(500, (4,)))
    with pytest.raises(ValueError, match="highlight must be a node"):
        plot_pyramid(spec, highlight=21)
    plt.close("all")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtra, match=r"oral4\[plot\]"):
        plot_pyramid(spec)
