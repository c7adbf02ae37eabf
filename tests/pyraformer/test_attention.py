"""Pyramidal attention: every form against masked softmax written out here and the official code; errors at the door."""

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from oral4.measure.intervals import ratio_interval
from oral4.measure.timing import compare
from oral4.pyraformer.attention import (
    PyramidalAttention,
    attention_gather,
    attention_reference,
    attention_shift,
    attention_weights,
    flex_block_mask,
    pyramidal_attention,
)
from oral4.pyraformer.graph import PyramidSpec, dense_mask, edges, neighbour_table

PAM = np.load(Path(__file__).parents[1] / "goldens/pyraformer/pam.npz")
DIFFERENTIABLE = ["shift", "dense", "sdpa", "gather"]
CASES = [
    PyramidSpec(169, (4, 4, 4)),
    PyramidSpec(168, (4, 4, 4)),
    PyramidSpec(337, (4, 4, 4), 5),
    PyramidSpec(673, (6, 6, 6)),
    PyramidSpec(721, (12, 7, 4)),
    PyramidSpec(163, (4, 4, 4)),  # seven children under one parent
    PyramidSpec(23, (2, 3), 7),
    PyramidSpec(50, (3, 2), 5),
    PyramidSpec(16, (4,), 1),
    PyramidSpec(64, (2, 2, 2, 2)),  # five scales
    PyramidSpec(20, ()),  # one scale
    PyramidSpec(20, (), 1),  # nobody looks at anybody else
    PyramidSpec(1, ()),  # one node
    PyramidSpec(7, (2, 3), 99),  # neighbourhoods wider than the series
    PyramidSpec(199, (100,)),  # 99 left over
]
IDS = [f"{c.length}-{'x'.join(map(str, c.windows))}-{c.neighbours}" for c in CASES]


@st.composite
def specs(draw, longest=120):
    """Any pyramid: uneven windows, remainders, one scale, one node, neighbourhoods wider than a scale."""
    size = length = draw(st.integers(1, longest))
    windows = []
    while size >= 2 and draw(st.booleans()):
        windows.append(draw(st.integers(2, min(size, 9))))
        size //= windows[-1]
    return PyramidSpec(length, windows, 2 * draw(st.one_of(st.integers(0, 4), st.integers(0, length))) + 1)


def inputs(spec, batch=2, heads=3, d_k=8, d_v=5, dtype=torch.float64, grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, spec.num_nodes)
    drawn = [torch.randn(*shape, d, generator=generator, dtype=torch.float64) for d in (d_k, d_k, d_v)]
    return [x.to(dtype).requires_grad_(grad) for x in drawn]


def oracle(q, k, v, spec, scale=None):
    """Masked softmax written out: exponentials of all pairs, zero where there is no edge, divided by their sum."""
    allowed = torch.zeros(spec.num_nodes, spec.num_nodes, dtype=q.dtype, device=q.device)
    allowed[tuple(edges(spec).T)] = 1
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    largest = scores.detach().where(allowed > 0, -math.inf).amax(-1, keepdim=True)
    weights = (scores - largest).clamp(max=0).exp() * allowed  # pairs without an edge may lie above the largest
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def with_gradients(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def assert_same(found, expected, atol):
    for name, a, b in zip(("value", "grad of q", "grad of k", "grad of v"), found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_equals_masked_softmax_with_gradients(spec, backend):
    tensors = inputs(spec)
    upstream = torch.randn(2, 3, spec.num_nodes, 5, dtype=torch.float64)
    found = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), tensors, upstream)
    # float64, at most a few hundred terms of size 1: rounding leaves 1e-14
    assert_same(found, with_gradients(lambda *x: oracle(*x, spec), tensors, upstream), 1e-12)


@given(specs(), st.integers(0, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_shift_and_gather_equal_masked_softmax_on_any_pyramid(spec, batch, heads, d_k, d_v, seed):
    tensors = inputs(spec, batch, heads, d_k, d_v, seed=seed)
    upstream = torch.randn(batch, heads, spec.num_nodes, d_v, dtype=torch.float64)
    expected = with_gradients(lambda *x: oracle(*x, spec), tensors, upstream)
    for backend in ("shift", "gather"):
        found = with_gradients(lambda *x, b=backend: pyramidal_attention(*x, spec, backend=b), tensors, upstream)
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("case", ["p0", "p1", "p2"])
@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_equals_the_official_core(case, backend):
    stored = {name: torch.from_numpy(PAM[f"{case}/{name}"]) for name in ("q", "k", "v", "o", "go", "gq", "gk", "gv")}
    spec = PyramidSpec(*(PAM[f"{case}/{name}"] for name in ("L", "windows", "A")))
    tensors = [stored[name].clone().requires_grad_() for name in "qkv"]
    found = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), tensors, stored["go"])
    assert_same(found, [stored[name] for name in ("o", "gq", "gk", "gv")], 1e-10)  # the goldens' own tolerance


def test_gradcheck():
    spec = PyramidSpec(13, (2, 3), 3)  # 13 + 6 + 2 = 21 nodes, left-overs on the lowest scale
    assert spec.num_nodes == 21
    assert torch.autograd.gradcheck(lambda *x: attention_shift(*x, spec), inputs(spec, 1, 1, 3, 2))


def test_tiles_do_not_show(monkeypatch):
    """A processor's cache decides how many nodes are treated at a time; the outcome must not depend on it."""
    spec, module = PyramidSpec(1000, (7, 5)), "oral4.pyraformer.attention._TILE"
    tensors, upstream = inputs(spec, 1, 2), torch.randn(1, 2, spec.num_nodes, 5, dtype=torch.float64)
    expected = with_gradients(lambda *x: oracle(*x, spec), tensors, upstream)
    for tile in (1, 100 * 16, 2**30):  # 64 nodes at the least, 100, all
        monkeypatch.setattr(module, tile)
        assert_same(with_gradients(lambda *x: attention_shift(*x, spec), tensors, upstream), expected, 1e-12)


def test_scale_of_the_scores():
    spec = CASES[0]
    tensors, upstream = inputs(spec), torch.randn(2, 3, spec.num_nodes, 5, dtype=torch.float64)
    expected = with_gradients(lambda *x: oracle(*x, spec, 0.7), tensors, upstream)
    for backend in DIFFERENTIABLE:

        def attend(*x, backend=backend):
            return pyramidal_attention(*x, spec, scale=0.7, backend=backend)

        assert_same(with_gradients(attend, tensors, upstream), expected, 1e-12)


@pytest.mark.parametrize("backend", ["shift", "gather", "dense"])
def test_scores_too_large_for_exp(backend):
    spec = PyramidSpec(50, (3, 2))
    q, k, v = inputs(spec, dtype=torch.float32, grad=False)
    found = pyramidal_attention(1000 * q, k, v, spec, backend=backend)  # exp of some scores is infinite
    expected = oracle(1000 * q.double(), k.double(), v.double(), spec)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)  # scores of thousands, 7 digits


def test_heads_and_batch_do_not_mix():
    spec = CASES[0]
    q, k, v = inputs(spec, grad=False)
    out = attention_shift(q, k, v, spec)
    order = [2, 0, 1]
    assert torch.equal(attention_shift(q[:, order], k[:, order], v[:, order], spec), out[:, order])
    for b in range(2):
        for h in range(3):
            one = [x[b : b + 1, h : h + 1] for x in (q, k, v)]
            torch.testing.assert_close(attention_shift(*one, spec), out[b : b + 1, h : h + 1], rtol=0, atol=1e-14)


def test_any_number_of_leading_axes():
    spec = PyramidSpec(23, (2, 3))
    q, k, v = inputs(spec, 6, 1, grad=False)
    expected, mask, table = oracle(q, k, v, spec), dense_mask(spec), neighbour_table(spec)
    for shape in ((6,), (1, 2, 3), (3, 2, 1, 1)):
        x = [t.reshape(*shape, *t.shape[2:]) for t in (q, k, v)]
        for found in (attention_shift(*x, spec), attention_gather(*x, table), attention_reference(*x, mask)):
            torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=0, atol=1e-13)
    first = [t[0, 0] for t in (q, k, v)]
    torch.testing.assert_close(attention_shift(*first, spec), expected[0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", [*DIFFERENTIABLE, "auto"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batch(backend, shape):
    spec = PyramidSpec(50, (3, 2))
    tensors = inputs(spec, *shape)
    out = pyramidal_attention(*tensors, spec, backend=backend)
    assert out.shape == (*shape, spec.num_nodes, 5)
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


def test_inputs_of_any_layout():
    spec = CASES[5]
    generator = torch.Generator().manual_seed(1)
    n = spec.num_nodes
    wide = torch.randn(2, n, 3, 24, generator=generator, dtype=torch.float64)
    transposed = [x.transpose(1, 2) for x in wide.split(8, dim=-1)]  # what a linear layer gives
    every_other = torch.randn(2, 3, 2 * n, 8, generator=generator, dtype=torch.float64)[:, :, ::2]
    repeated = torch.randn(1, 1, n, 8, generator=generator, dtype=torch.float64).expand(2, 3, n, 8)
    flipped = torch.randn(2, 3, 8, n, generator=generator, dtype=torch.float64).mT
    for q, k, v in (transposed, (every_other, repeated, flipped), (repeated, flipped, every_other)):
        assert not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        upstream = torch.ones((), dtype=torch.float64).expand(2, 3, n, 8)  # what .sum().backward() sends
        found = with_gradients(lambda *x: attention_shift(*x, spec), tensors, upstream)
        assert_same(found, with_gradients(lambda *x: oracle(*x, spec), tensors, upstream), 1e-12)


def test_only_the_gradients_that_are_asked_for():
    spec = PyramidSpec(50, (3, 2))
    tensors = inputs(spec)
    expected = torch.autograd.grad(oracle(*tensors, spec).sum(), tensors)
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]
        attention_shift(*some, spec).sum().backward()
        for i, x in enumerate(some):
            if i in wanted:
                torch.testing.assert_close(x.grad, expected[i], rtol=0, atol=1e-12)
            else:
                assert x.grad is None
    assert not attention_shift(*(x.detach() for x in tensors), spec).requires_grad


def test_inputs_are_left_alone():
    spec = PyramidSpec(50, (3, 2))
    tensors = inputs(spec)
    before = [x.detach().clone() for x in tensors]
    attention_shift(*tensors, spec).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_second_derivative_is_refused():
    spec = PyramidSpec(50, (3, 2))
    tensors = inputs(spec)
    (first,) = torch.autograd.grad(attention_shift(*tensors, spec).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


# ---------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize("backend", ["shift", "gather", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32_and_rounded_once(backend, dtype):
    spec = PyramidSpec(169, (4, 4, 4))
    tensors = inputs(spec, dtype=dtype)
    full = [x.detach().float().requires_grad_() for x in tensors]
    upstream = torch.randn(2, 3, spec.num_nodes, 5).to(dtype)
    found = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), tensors, upstream)
    expected = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), full, upstream.float())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
@pytest.mark.parametrize("length", [17, 169, 1000])
def test_float32_is_close_to_float64(backend, length):
    spec = PyramidSpec(length, (4, 2))
    exact = inputs(spec, grad=False)
    found = pyramidal_attention(*(x.float() for x in exact), spec, backend=backend)
    torch.testing.assert_close(found.double(), oracle(*exact, spec), rtol=0, atol=2e-6)  # a few units of 1.2e-7


def test_bfloat16_is_close_to_float64():
    spec = PyramidSpec(300, (4, 4))
    exact = inputs(spec, grad=False)
    for backend in DIFFERENTIABLE:
        found = pyramidal_attention(*(x.bfloat16() for x in exact), spec, backend=backend)
        # 8 bits: 4e-3 of values up to about 3, in q, k, v and once more in the result
        torch.testing.assert_close(found.double(), oracle(*exact, spec), rtol=0, atol=4e-2)


@pytest.mark.parametrize("backend", ["shift", "dense", "gather"])
def test_autocast_changes_nothing_inside(backend):
    spec = PyramidSpec(50, (3, 2))
    tensors = inputs(spec, dtype=torch.float32)
    upstream = torch.randn(2, 3, spec.num_nodes, 5)
    expected = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), tensors, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pyramidal_attention(*tensors, spec, backend=backend)
    assert out.dtype == torch.float32
    assert_same([out, *torch.autograd.grad(out, tensors, upstream)], expected, 0)


# ---------------------------------------------------------------------------------------- dropout


def dropped(backend, spec, tensors, p, seed):
    torch.manual_seed(seed)
    return pyramidal_attention(*tensors, spec, dropout_p=p, backend=backend)


@pytest.mark.parametrize("backend", DIFFERENTIABLE)
def test_dropout_drops_weights_and_scales_the_others(backend):
    spec, p, draws = PyramidSpec(50, (3, 2), 5), 0.3, 200
    q, k, _ = inputs(spec, 1, 2, grad=False)
    identity = torch.eye(spec.num_nodes, dtype=torch.float64).expand(1, 2, -1, -1)  # the result is then the weights
    weights = oracle(q, k, identity, spec)
    found = torch.stack([dropped(backend, spec, (q, k, identity), p, seed) for seed in range(draws)])
    kept = found != 0
    expected = torch.where(kept, weights / (1 - p), 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    share = 1 - kept[:, weights > 0].double().mean()
    count = draws * int((weights > 0).sum())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard deviations of a binomial share
    different = kept[:, weights > 0].double().std(dim=0)
    assert different.min() > 0, "every weight is dropped in some draws and kept in others"


def test_gradients_under_dropout_are_those_of_the_drawn_weights():
    spec, p = PyramidSpec(50, (3, 2), 5), 0.4
    tensors = inputs(spec, 1, 2, d_v=6)
    identity = torch.eye(spec.num_nodes, dtype=torch.float64).expand(1, 2, -1, -1)
    keep = (dropped("shift", spec, (*tensors[:2], identity), p, 7).detach() != 0).double() / (1 - p)
    upstream = torch.randn(1, 2, spec.num_nodes, 6, dtype=torch.float64)

    def expected(q, k, v):
        return (oracle(q, k, identity, spec) * keep) @ v

    assert_same(
        with_gradients(lambda *x: dropped("shift", spec, x, p, 7), tensors, upstream),
        with_gradients(expected, tensors, upstream),
        1e-12,
    )


# ---------------------------------------------------------------------------------------- which backend, how fast


def used_shift(out):
    return out.grad_fn.name().startswith("_Shift")


def test_auto_takes_shift_once_the_scores_are_many():
    few, many = PyramidSpec(64, (4, 4)), PyramidSpec(512, (4, 4))
    assert not used_shift(pyramidal_attention(*inputs(few, 1, 4), few))
    assert used_shift(pyramidal_attention(*inputs(many, 1, 4), many))
    assert used_shift(pyramidal_attention(*inputs(few, 16, 8), few)), "batch and heads count"


def test_no_backend_of_that_name():
    spec = PyramidSpec(8, (2,))
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of auto, dense, sdpa, gather, shift, flex"):
        pyramidal_attention(*inputs(spec), spec, backend="fast")


def test_a_mask_kept_from_inference_serves_training():
    spec = PyramidSpec(47, (3, 2), 5)  # of this test alone, so that nothing is kept yet
    tensors = inputs(spec)
    for backend in ("dense", "sdpa"):
        with torch.inference_mode():
            pyramidal_attention(*(x.detach() for x in tensors), spec, backend=backend)
        pyramidal_attention(*tensors, spec, backend=backend).sum().backward()


def test_shift_is_several_times_faster_than_all_pairs():
    """The recorded ratios at twice this length are far above these bounds, which a busy machine must meet too."""
    spec = PyramidSpec(1024, (4, 4, 4))
    tensors = inputs(spec, 1, 4, 64, 64, torch.float32, grad=False)
    mask = dense_mask(spec)
    torch.set_num_threads(1)
    times = compare(
        {
            "shift": lambda: attention_shift(*tensors, spec),
            "reference": lambda: attention_reference(*tensors, mask),
            "sdpa": lambda: scaled_dot_product_attention(*tensors, attn_mask=mask),
        },
        repeats=5,
    )
    assert ratio_interval(times["reference"].seconds, times["shift"].seconds).estimate > 7
    assert ratio_interval(times["sdpa"].seconds, times["shift"].seconds).estimate > 3


# ---------------------------------------------------------------------------------------- FlexAttention


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("spec", [PyramidSpec(169, (4, 4, 4)), PyramidSpec(721, (12, 7, 4), 5), PyramidSpec(1, ())])
def test_block_mask_is_the_graph(spec, block_size):
    found = flex_block_mask(spec, block_size=block_size)
    query, key = torch.meshgrid(torch.arange(spec.num_nodes), torch.arange(spec.num_nodes), indexing="ij")
    mask = dense_mask(spec)
    assert torch.equal(found.mask_mod(torch.tensor(0), torch.tensor(0), query, key), mask)
    blocks = -(-spec.num_nodes // block_size)
    padded = torch.zeros(blocks * block_size, blocks * block_size, dtype=torch.bool)
    padded[: spec.num_nodes, : spec.num_nodes] = mask
    touched = padded.unflatten(1, (blocks, block_size)).unflatten(0, (blocks, block_size)).any(3).any(1)
    assert torch.equal(found.to_dense()[0, 0].bool(), touched)
    assert found.shape == (1, 1, spec.num_nodes, spec.num_nodes)
    again = BlockMask.from_kv_blocks(found.kv_num_blocks, found.kv_indices, BLOCK_SIZE=block_size)  # transposes
    assert torch.equal(found.q_num_blocks, again.q_num_blocks)
    for row, count in enumerate(again.q_num_blocks[0, 0].tolist()):
        assert torch.equal(found.q_indices[0, 0, row, :count], again.q_indices[0, 0, row, :count])


def test_block_mask_grows_its_blocks_and_refuses_odd_ones():
    assert flex_block_mask(PyramidSpec(90_000, (4, 4)), block_size=16).BLOCK_SIZE == (32, 32)
    for block_size in (8, 100):
        with pytest.raises(ValueError, match="power of two from 16 on"):
            flex_block_mask(PyramidSpec(64, (4,)), block_size=block_size)


def test_flex_refuses_what_it_cannot_do():
    spec = PyramidSpec(64, (4,))
    tensors = inputs(spec, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"no backward pass on a CPU.*use backend='shift'"):
        pyramidal_attention(*tensors, spec, backend="flex")
    with pytest.raises(ValueError, match="has no dropout"):
        pyramidal_attention(*tensors, spec, dropout_p=0.1, backend="flex")


@pytest.mark.slow
def test_flex_equals_shift():
    """Compiles C++, which takes most of a minute."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("FlexAttention compiles C++ on a CPU, and there is no compiler")
    for spec, d_v in ((PyramidSpec(169, (4, 4, 4)), 16), (PyramidSpec(721, (12, 7, 4), 5), 16)):
        tensors = inputs(spec, 2, 3, 16, d_v, torch.float32, grad=False)
        found = pyramidal_attention(*tensors, spec, backend="flex")
        torch.testing.assert_close(found, attention_shift(*tensors, spec), rtol=0, atol=3e-6)  # float32, values up to 4


@pytest.mark.gpu
def test_on_a_gpu():
    spec = PyramidSpec(721, (12, 7, 4), 5)
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(spec, 2, 3, 16, 16)]
    upstream = torch.randn(2, 3, spec.num_nodes, 16, dtype=torch.float64)
    cpu = [x.detach().cpu().requires_grad_() for x in tensors]
    expected = with_gradients(lambda *x: oracle(*x, spec), cpu, upstream)
    for backend in [*DIFFERENTIABLE, "auto"]:
        found = with_gradients(lambda *x, b=backend: pyramidal_attention(*x, spec, backend=b), tensors, upstream.cuda())
        assert_same([x.cpu() for x in found], expected, 1e-12)
    single = [x.detach().float().requires_grad_() for x in tensors]
    found = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend="flex"), single, upstream.float().cuda())
    assert_same([x.cpu().double() for x in found], expected, 2e-2)  # TF32 inside


# ---------------------------------------------------------------------------------------- weights to look at


@pytest.mark.parametrize("spec", CASES[:9], ids=IDS[:9])
def test_weights_stand_where_the_table_says(spec):
    q, k, v = inputs(spec, grad=False)
    weights, table = attention_weights(q, k, spec), neighbour_table(spec)
    assert weights.shape == (2, 3, *table.shape)
    assert (weights[..., table < 0] == 0).all() and (weights[..., table >= 0] > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-14)
    values = v[:, :, table.clamp(min=0)]
    found = (weights[..., None] * values).sum(-2)
    torch.testing.assert_close(found, oracle(q, k, v, spec), rtol=0, atol=1e-13)
    assert attention_weights(q.half(), k.half(), spec).dtype == torch.float16


# ---------------------------------------------------------------------------------------- the layer

OFFICIAL_NAMES = {"query": "w_qs", "key": "w_ks", "value": "w_vs", "out": "fc", "norm": "layer_norm"}


def official_layer(case, backend="auto", dropout=0.0):
    layer = PyramidalAttention(24, 3, 8, 8, dropout=dropout, backend=backend).double()
    state = {
        name: torch.from_numpy(PAM[f"{case}/mha/{OFFICIAL_NAMES[name.split('.')[0]]}.{name.split('.')[1]}"])
        for name in layer.state_dict()
    }
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("backend", [*DIFFERENTIABLE, "auto"])
@pytest.mark.parametrize("case", ["p0", "p1"])
def test_layer_equals_the_official_one(case, backend):
    spec = PyramidSpec(*(PAM[f"{case}/{name}"] for name in ("L", "windows", "A")))
    layer, x = official_layer(case, backend), torch.from_numpy(PAM[f"{case}/x"])
    expected = torch.from_numpy(PAM[f"{case}/mha_y"])
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x, spec), expected, rtol=0, atol=1e-10)  # the goldens' tolerance


def test_layer_has_the_documented_parameters():
    layer = PyramidalAttention(512, 6, 128, 128)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "query.weight": (768, 512), "key.weight": (768, 512), "value.weight": (768, 512),
        "out.weight": (512, 768), "out.bias": (512,), "norm.weight": (512,), "norm.bias": (512,),
    }  # fmt: skip
    assert layer.norm.eps == 1e-6
    bound = math.sqrt(6 / (768 + 512))  # xavier uniform
    for linear in (layer.query, layer.key, layer.value, layer.out):
        assert 0.99 * bound < linear.weight.abs().max() <= bound
    assert PyramidalAttention(64, 4).query.weight.shape == (64, 64)
    assert PyramidalAttention(64, 4, 8, 24).out.weight.shape == (64, 96)


def test_layer_serves_other_lengths_and_widths():
    layer = PyramidalAttention(10, 2, 4, 6, dropout=0.0).double()
    for spec in (PyramidSpec(50, (3, 2)), PyramidSpec(1000, (7, 5), 5)):
        x = torch.randn(2, spec.num_nodes, 10, dtype=torch.float64)
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (layer.query, layer.key, layer.value))
        update = layer.out(oracle(q, k, v, spec).transpose(1, 2).flatten(2))
        torch.testing.assert_close(layer(x, spec), layer.norm(x + update), rtol=0, atol=1e-12)


def test_layer_drops_weights_and_outputs_in_training_only():
    spec = PyramidSpec(50, (3, 2))
    layer, x = PyramidalAttention(16, 2, dropout=0.5), torch.randn(2, spec.num_nodes, 16)
    layer.eval()
    assert torch.equal(layer(x, spec), layer(x, spec))
    layer.train()
    assert not torch.equal(layer(x, spec), layer(x, spec))
    layer.value.weight.data.zero_()
    layer.out.bias.data.fill_(1.0)  # the update is now 1 everywhere, and 0 or 2 once outputs are dropped
    layer.norm = torch.nn.Identity()
    update = layer(x, spec) - x
    assert torch.allclose(torch.minimum(update.abs(), (update - 2).abs()), torch.zeros(()), atol=1e-6)
    assert 0.4 < (update > 1).float().mean() < 0.6  # 2,560 draws with probability 1/2


def test_layer_learns_under_autocast():
    spec = PyramidSpec(200, (4, 4))
    layer, x = PyramidalAttention(16, 2, dropout=0.0, backend="shift"), torch.randn(2, spec.num_nodes, 16)
    expected = layer(x, spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x, spec)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)  # bfloat16 products of numbers of size 1
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_layer_survives_a_nan_free_step_of_training():
    spec = PyramidSpec(300, (4, 4))
    layer = PyramidalAttention(8, 2, dropout=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = torch.randn(2, spec.num_nodes, 8), torch.randn(2, spec.num_nodes, 8)
    losses = []
    for _ in range(20):
        loss = (layer(x, spec) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


# ---------------------------------------------------------------------------------------- at the door

SPEC = PyramidSpec(8, (2, 2))  # 14 nodes


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


GOOD = zeros(1, 1, 14, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((GOOD, GOOD, GOOD, (8, 2, 2)), {}, TypeError, "spec must be a PyramidSpec, got tuple"),
        ((GOOD.numpy(), GOOD, GOOD, SPEC), {}, TypeError, "q must be a tensor, got ndarray"),
        ((GOOD, GOOD.long(), GOOD, SPEC), {}, TypeError, "k has the type torch.int64; allowed are float16"),
        ((GOOD, GOOD, GOOD.double(), SPEC), {}, TypeError, "torch.float32, torch.float64; convert them to one"),
        ((GOOD[0],) * 3 + (SPEC,), {}, ValueError, "q has shape (1, 14, 4); give it as (batch, heads, nodes"),
        ((GOOD, GOOD, GOOD.to("meta"), SPEC), {}, ValueError, "cpu, cpu, meta; move them to one device"),
        ((GOOD, GOOD[..., :3], GOOD, SPEC), {}, ValueError, "q and k must agree"),
        ((GOOD, GOOD, zeros(1, 2, 14, 4), SPEC), {}, ValueError, "v may differ from them in its last axis only"),
        ((GOOD[0, 0, 0],) * 3 + (SPEC,), {}, ValueError, "q has shape (4,); its last two axes must be nodes and width"),
        ((GOOD[:, :, :13],) * 3 + (SPEC,), {}, ValueError, "has 13 nodes on its last axis but one, but the pyramid"),
        ((GOOD[:, :, :8],) * 3 + (SPEC,), {}, ValueError, "yours are those of the finest scale alone"),
        ((GOOD[..., :0], GOOD[..., :0], GOOD, SPEC), {}, ValueError, "d_k must be at least 1"),
        ((GOOD, GOOD, GOOD, SPEC), {"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
        ((GOOD, GOOD, GOOD, SPEC), {"scale": math.inf}, ValueError, "scale must be positive and finite, got inf"),
        ((GOOD, GOOD, GOOD, SPEC), {"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
        ((GOOD, GOOD, GOOD, SPEC), {"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        pyramidal_attention(*arguments, **options)


def test_every_entrance_checks_its_arguments():
    for words, attend in (
        ("has 14", lambda: attention_weights(GOOD[:, :, :13], GOOD[:, :, :13], SPEC)),
        ("has 14", lambda: attention_shift(GOOD[:, :, :13], GOOD[:, :, :13], GOOD[:, :, :13], SPEC)),
        ("has 13 nodes", lambda: attention_shift(*(GOOD[0, 0, :13],) * 3, SPEC)),
        (r"one row for each of the 14 nodes", lambda: attention_gather(GOOD, GOOD, GOOD, neighbour_table(SPEC)[:13])),
        (r"mask is torch.bool \(8, 8\)", lambda: attention_reference(GOOD, GOOD, GOOD, dense_mask(PyramidSpec(8, ())))),
        (r"mask is torch.float32", lambda: attention_reference(GOOD, GOOD, GOOD, dense_mask(SPEC).float())),
        ("num_heads=5 for d_model=4", lambda: PyramidalAttention(4, 5)),
        ("dropout=1", lambda: PyramidalAttention(4, 1, dropout=1)),
    ):
        with pytest.raises(ValueError, match=words):
            attend()


def test_an_empty_row_is_refused():
    mask = torch.eye(14, dtype=torch.bool)
    mask[5, 5] = False
    with pytest.raises(ValueError, match="row 5 of the mask has no True"):
        attention_reference(GOOD, GOOD, GOOD, mask)
    table = neighbour_table(SPEC)
    table[3] = -1
    with pytest.raises(ValueError, match="row 3 of the table is empty"):
        attention_gather(GOOD, GOOD, GOOD, table)


def test_a_value_of_width_zero_is_fine():
    assert pyramidal_attention(GOOD, GOOD, GOOD[..., :0], SPEC, backend="shift").shape == (1, 1, 14, 0)
