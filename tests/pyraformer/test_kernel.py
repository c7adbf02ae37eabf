"""The fused kernel: interpreted, against masked softmax written out here; compiled, for GPUs that are not here.

The interpreter must be chosen before Triton is imported, so it lives in a process of its own (`interpreter`).
"""

import functools
import inspect
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.errors import DataError
from oral4.measure.timing import compare
from oral4.pyraformer import attention, kernel
from oral4.pyraformer.attention import attention_shift, pyramidal_attention
from oral4.pyraformer.graph import PyramidSpec, auto_pyramid, edges
from oral4.pyraformer.kernel import (
    attention_plain,
    attention_triton,
    compile_kernels,
    fastest_backend,
    kernel_runs_on,
    measure_backends,
)

CASES = [
    PyramidSpec(169, (4, 4, 4)),
    PyramidSpec(163, (4, 4, 4)),  # seven children under one parent
    PyramidSpec(121, (12, 3, 2), 5),
    PyramidSpec(23, (2, 3), 7),
    PyramidSpec(50, (3, 2), 5),
    PyramidSpec(16, (4,), 1),
    PyramidSpec(64, (2, 2, 2, 2)),  # five scales
    PyramidSpec(20, ()),  # one scale
    PyramidSpec(20, (), 1),  # nobody looks at anybody else
    PyramidSpec(1, ()),  # one node
    PyramidSpec(7, (2, 3), 99),  # neighbourhoods wider than the series
    PyramidSpec(199, (100,)),  # children are shared out over rows; 99 left over
    PyramidSpec(150, (70, 2)),  # shared out on one scale, not on the other
]
IDS = [f"{c.length}-{'x'.join(map(str, c.windows))}-{c.neighbours}" for c in CASES]

_CHILD = """
import pickle, struct, sys, warnings
warnings.simplefilter("ignore")
import math, torch
from oral4.pyraformer.attention import *
from oral4.pyraformer.graph import *
from oral4.pyraformer.kernel import *
from oral4.pyraformer import kernel
while head := sys.stdin.buffer.read(8):
    source, name, arguments = pickle.loads(sys.stdin.buffer.read(struct.unpack("q", head)[0]))
    torch.manual_seed(0)
    try:
        scope = globals() | {}
        exec(source, scope)
        answer = (True, scope[name](*arguments))
    except Exception as error:
        answer = (False, (type(error).__name__, str(error)))
    data = pickle.dumps(answer)
    sys.stdout.buffer.write(struct.pack("q", len(data)) + data)
    sys.stdout.buffer.flush()
"""


class Interpreter:
    """A Python in which Triton's kernels are interpreted; calls functions of this file there."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, function, *arguments):
        data = pickle.dumps((inspect.getsource(function), function.__name__, arguments))
        self.process.stdin.write(struct.pack("q", len(data)) + data)
        self.process.stdin.flush()
        head = self.process.stdout.read(8)
        assert len(head) == 8, "the interpreter's process ended"
        fine, answer = pickle.loads(self.process.stdout.read(struct.unpack("q", head)[0]))
        assert fine, answer
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def interpreter():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; it exists for Linux")
    child = Interpreter()
    yield child
    child.close()


@pytest.fixture
def triton():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed; it exists for Linux")


def inputs(spec, batch=1, heads=2, d_k=8, d_v=5, dtype=torch.float64, seed=0):
    """q, k, v and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, spec.num_nodes)
    return [torch.randn(*shape, d, generator=generator, dtype=torch.float64).to(dtype) for d in (d_k, d_k, d_v, d_v)]


def oracle(q, k, v, spec, scale=None):
    """Masked softmax written out: exponentials of all pairs, zero where there is no edge, divided by their sum."""
    allowed = torch.zeros(spec.num_nodes, spec.num_nodes, dtype=q.dtype, device=q.device)
    allowed[tuple(edges(spec).T)] = 1
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    largest = scores.detach().where(allowed > 0, -math.inf).amax(-1, keepdim=True)
    weights = (scores - largest).clamp(max=0).exp() * allowed
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


def with_gradients(function, tensors, upstream):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return [x.detach() for x in (out, *torch.autograd.grad(out, tensors, upstream))]


def assert_same(found, expected, atol, rtol=0.0):
    for name, a, b in zip(("value", "grad of q", "grad of k", "grad of v"), found, expected, strict=False):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------- functions that run in the interpreter


def kernel_with_gradients(spec, q, k, v, upstream, options):
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = attention_triton(*tensors, spec, **options)
    return [x.detach() for x in (out, *torch.autograd.grad(out, tensors, upstream))]


def kernel_forward(spec, q, k, v, options):
    return attention_triton(q, k, v, spec, **options)


def kernel_dropped(spec, q, k, v, upstream, p, seed):
    torch.manual_seed(seed)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out = attention_triton(*tensors, spec, dropout_p=p)
    return [x.detach() for x in (out, *torch.autograd.grad(out, tensors, upstream))]


def kernel_seeds(spec, q, k, v, p, seeds):
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(attention_triton(q, k, v, spec, dropout_p=p))
    return found


def kernel_layouts(spec, wide):
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in wide.split([8, 8, 5], dim=-1))
    out = attention_triton(q, k, v, spec)
    upstream = torch.ones((), dtype=out.dtype).expand(out.shape)  # what .sum().backward() sends
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    every_other = torch.stack([x.detach() for x in (q, k)]).repeat_interleave(2, dim=-2)[..., ::2, :]
    flipped = v.detach().mT.contiguous().mT
    repeated = every_other[0][:1, :1].expand(2, 3, -1, -1)
    other = attention_triton(repeated, every_other[1], flipped, spec)
    swapped = [x[..., :5].transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    return [out.detach(), *gradients], other, attention_triton(*swapped, spec).transpose(1, 2).is_contiguous()


def kernel_shapes(spec, q, k, v):
    expected = attention_triton(q, k, v, spec)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = [attention_triton(*flat, spec).reshape(expected.shape), attention_triton(*(x[0] for x in flat), spec)]
    empty = []
    for shape in ((0, 3), (2, 0)):
        some = [x.new_zeros(*shape, *x.shape[2:]).requires_grad_() for x in (q, k, v)]
        out = attention_triton(*some, spec)
        empty.append([tuple(x.shape) for x in (out, *torch.autograd.grad(out.sum(), some))])
    none = [q.clone().requires_grad_(), k.clone(), v[..., :0]]
    out = attention_triton(*none, spec)
    gradient = torch.autograd.grad(out.sum(), none[0])[0]
    return expected, found, empty, tuple(out.shape), gradient.abs().max().item()


def kernel_autograd(spec, q, k, v):
    saved = []
    tensors = [x.requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        out = attention_triton(*tensors, spec)
    (first,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    try:
        first.sum().backward()
        second = "no error"
    except RuntimeError as error:
        second = str(error)
    some = [x.detach().requires_grad_(i == 1) for i, x in enumerate(tensors)]
    attention_triton(*some, spec).sum().backward()
    plain = attention_triton(*(x.detach() for x in tensors), spec)
    before = [x.detach().clone() for x in tensors]
    untouched = all(map(torch.equal, before, tensors))
    return saved, second, [x.grad is not None for x in some], plain.requires_grad, untouched


def kernel_in_pytorch(spec, q, k, v):
    graph = (None, spec.length, list(spec.windows), spec.neighbours, 0.3, 0.0)
    some = [x.clone().requires_grad_() for x in (q, k, v)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    verdict = torch.library.opcheck(torch.ops.oral4.pyramid_forward.default, (*some, *graph), test_utils=checks)

    def layer(q, k, v):
        return pyramidal_attention(2 * q, k, v, spec, scale=0.15, backend="triton") + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = [compiled(*some), *torch.autograd.grad(compiled(*some).square().sum(), some)]
    expected = [layer(*some), *torch.autograd.grad(layer(*some).square().sum(), some)]
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(found, expected, strict=True))
    return verdict, difference


def kernel_backend(spec, q, k, v):
    return pyramidal_attention(q, k, v, spec, backend="triton"), attention_triton(q, k, v, spec)


def kernel_refuses_to_compile(spec):
    try:
        compile_kernels(spec, 16)
    except ValueError as error:
        return str(error)


# ---------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_equals_masked_softmax_with_gradients(interpreter, spec):
    *tensors, upstream = inputs(spec, heads=1)
    found = interpreter(kernel_with_gradients, spec, *tensors, upstream, {})
    # float64, at most a few hundred terms of size 1: rounding leaves 1e-14
    assert_same(found, with_gradients(lambda *x: oracle(*x, spec), tensors, upstream), 1e-12)


@st.composite
def specs(draw):
    """Any pyramid: uneven windows, remainders, one scale, one node, neighbourhoods wider than a scale."""
    size = length = draw(st.integers(1, 70))
    windows = []
    while size >= 2 and draw(st.booleans()):
        windows.append(draw(st.integers(2, min(size, 40))))
        size //= windows[-1]
    return PyramidSpec(length, windows, 2 * draw(st.integers(0, 5)) + 1)


def test_equals_masked_softmax_on_any_pyramid(interpreter):
    @given(specs(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
    @settings(max_examples=6, deadline=None)
    def agrees(spec, batch, heads, d_k, d_v, seed):
        *tensors, upstream = inputs(spec, batch, heads, d_k, d_v, seed=seed)
        found = interpreter(kernel_with_gradients, spec, *tensors, upstream, {})
        assert_same(found, with_gradients(lambda *x: oracle(*x, spec), tensors, upstream), 1e-12)

    agrees()


@pytest.mark.parametrize(
    ("spec", "width"),
    [
        (PyramidSpec(17, (2, 3), 7), 128),
        (PyramidSpec(169, (4, 4, 4), 3), 64),
        (PyramidSpec(1000, (12, 7, 4), 5), 16),
        (PyramidSpec(4097, (4, 4, 4), 1), 8),
    ],
    ids=str,
)
def test_float32_is_close_to_float64(interpreter, spec, width):
    *exact, upstream = inputs(spec, 1, 1, width, width)
    tensors = [x.float() for x in exact]
    found = interpreter(kernel_with_gradients, spec, *tensors, upstream.float(), {})
    wide = [x.double() for x in (*tensors, upstream.float())]
    expected = with_gradients(lambda *x: attention_shift(*x, spec), wide[:3], wide[3])
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=2e-6)  # a few units of 1.2e-7
    for a, b in zip(found[1:], expected[1:], strict=True):  # sums of up to twenty terms of up to 10
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(interpreter, dtype):
    spec = PyramidSpec(97, (4, 4))
    *tensors, upstream = inputs(spec, dtype=dtype)
    found = interpreter(kernel_with_gradients, spec, *tensors, upstream, {})
    full = [x.double() for x in tensors]
    expected = with_gradients(lambda *x: oracle(*x, spec), full, upstream.double())
    # A result is converted once: half a unit of the last place if rounded. The interpreter cuts bfloat16 off: one unit.
    units = 0.5 if dtype == torch.float16 else 1.0
    for name, a, b in zip("yqkv", found, expected, strict=True):
        assert a.dtype == dtype
        # delta comes from the rounded result: gradients by q and k inherit an error of that size, times keys of size 2
        inherited = 2 * torch.finfo(dtype).eps if name in "qk" else 1e-6
        allowed = units * torch.finfo(dtype).eps * b.abs() + inherited
        assert bool(((a.double() - b).abs() <= allowed).all()), name


def test_scale_of_the_scores_and_scores_too_large_for_exp(interpreter):
    spec = PyramidSpec(50, (3, 2))
    *tensors, upstream = inputs(spec)
    found = interpreter(kernel_with_gradients, spec, *tensors, upstream, {"scale": 0.7})
    assert_same(found, with_gradients(lambda *x: oracle(*x, spec, 0.7), tensors, upstream), 1e-12)
    q, k, v, _ = inputs(spec, dtype=torch.float32)
    found = interpreter(kernel_forward, spec, 1000 * q, k, v, {})  # exp of some scores is infinite
    expected = oracle(1000 * q.double(), k.double(), v.double(), spec)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-2)  # scores of thousands, 7 digits


def test_inputs_of_any_layout(interpreter):
    spec = PyramidSpec(27, (4, 3))
    wide = torch.randn(2, spec.num_nodes, 3, 21, dtype=torch.float64)  # what one linear layer gives
    found, other, same_order = interpreter(kernel_layouts, spec, wide)
    q, k, v = (x.transpose(1, 2) for x in wide.split([8, 8, 5], dim=-1))
    upstream = torch.ones(2, 3, spec.num_nodes, 5, dtype=torch.float64)
    assert_same(found, with_gradients(lambda *x: oracle(*x, spec), (q, k, v), upstream), 1e-12)
    torch.testing.assert_close(other, oracle(q[:1, :1].expand_as(q), k, v, spec), rtol=0, atol=1e-12)
    assert same_order, "the result has the order of axes of the values, so that no copy is made afterwards"


def test_leading_axes_empty_batches_and_values_of_no_width(interpreter):
    spec = PyramidSpec(27, (4, 3))
    q, k, v, _ = inputs(spec, 2, 3)
    expected, (flat, first), empty, shape, gradient = interpreter(kernel_shapes, spec, q, k, v)
    torch.testing.assert_close(expected, oracle(q, k, v, spec), rtol=0, atol=1e-13)
    assert torch.equal(flat, expected) and torch.equal(first, expected[0, 0])
    for (batch, heads), shapes in zip(((0, 3), (2, 0)), empty, strict=True):
        n = spec.num_nodes
        assert shapes == [(batch, heads, n, 5), (batch, heads, n, 8), (batch, heads, n, 8), (batch, heads, n, 5)]
    assert shape == (2, 3, spec.num_nodes, 0) and gradient == 0


def test_what_is_kept_and_what_is_refused(interpreter):
    spec = PyramidSpec(27, (4, 3))
    q, k, v, _ = inputs(spec, 1, 2)
    saved, second, gradients, without, untouched = interpreter(kernel_autograd, spec, q, k, v)
    n = 2 * spec.num_nodes
    assert sorted(saved) == sorted([8 * n, 8 * n, 5 * n, 5 * n, n]), "q, k, v, the result and one number a node"
    assert "no autograd formula was registered" in second
    assert gradients == [False, True, False] and not without and untouched


def test_pytorch_sees_an_operation_of_its_own(interpreter):
    spec = PyramidSpec(13, (3,))
    q, k, v, _ = inputs(spec, 1, 1)
    verdict, difference = interpreter(kernel_in_pytorch, spec, q, k, v)
    assert set(verdict.values()) == {"SUCCESS"}
    assert difference < 1e-13


def test_the_backend_of_that_name(interpreter):
    spec = PyramidSpec(13, (3,))
    found, expected = interpreter(kernel_backend, spec, *inputs(spec)[:3])
    assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("spec", [PyramidSpec(23, (3, 2), 5), PyramidSpec(40, (20,))], ids=str)
def test_dropout_drops_the_same_edges_forward_and_backward(interpreter, spec):
    p = 0.25  # exact in float32, in which the kernel gets it
    q, k, v, upstream = inputs(spec)
    n = spec.num_nodes
    identity = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)  # the result is then the weights
    both = torch.cat([v, identity], -1), torch.cat([upstream, torch.zeros_like(identity)], -1)
    found = interpreter(kernel_dropped, spec, q, k, *both, p, 5)
    weights, dropped = oracle(q, k, identity, spec), found[0][..., 5:]
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / (1 - p), 0), rtol=0, atol=1e-12)
    share, count = 1 - float(kept[weights > 0].double().mean()), 2 * spec.num_edges()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)  # five standard deviations of a binomial share
    keep = kept.double() / (1 - p)
    expected = with_gradients(lambda q, k, v: (oracle(q, k, identity, spec) * keep) @ v, (q, k, v), upstream)
    found = [found[0][..., :5], *found[1:3], found[3][..., :5]]
    assert_same(found, expected, 1e-12)


def test_dropout_draws_anew_for_batches_heads_and_seeds(interpreter):
    spec = PyramidSpec(12, (3,))
    q, k, _, _ = inputs(spec, 2, 2)
    identity = torch.eye(spec.num_nodes, dtype=torch.float64).expand(2, 2, -1, -1).contiguous()
    one, again, other = (x != 0 for x in interpreter(kernel_seeds, spec, q, k, identity, 0.5, (5, 5, 6)))
    assert torch.equal(one, again)
    masks = [one[0, 0], one[0, 1], one[1, 0], one[1, 1], other[0, 0]]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == len(masks)


# ---------------------------------------------------------------------------------------- who does what


def written_by(spec, tile, lanes):
    """The nodes that each program writes, from the schedule as the kernel reads it."""
    table, blocks, slots = kernel._schedule(spec, tile, lanes, torch.device("cpu"))
    assert table.shape == (slots, 12)
    found = []
    for job in range(blocks * slots):
        block, line = job // slots, table[job % slots].tolist()
        start, size, shared, each, rest, slot = line[0], line[1], *line[8:]
        mine = block * each + block * rest // blocks + slot
        stop = (block + 1) * each + (block + 1) * rest // blocks
        rows = tile // shared
        found.append(range(start + mine * rows, start + min(size, (mine + 1) * rows)) if mine < stop else range(0))
    return found


@given(
    st.integers(1, 30_000),
    st.lists(st.integers(2, 80), max_size=3),
    st.sampled_from([1, 8, 32]),
    st.sampled_from([1, 2, 8]),
)
@settings(max_examples=60, deadline=None)
def test_every_node_has_one_program(length, windows, tile, lanes):
    while math.prod(windows) > length:
        windows = windows[:-1]
    spec = PyramidSpec(length, windows)
    nodes = [node for program in written_by(spec, tile, min(lanes, tile)) for node in program]
    assert len(nodes) == spec.num_nodes and set(nodes) == set(range(spec.num_nodes))


def test_children_come_shortly_before_their_parents():
    spec = PyramidSpec(100_000, (4, 4, 4))
    turn = torch.empty(spec.num_nodes, dtype=torch.int64)
    programs = written_by(spec, 32, 1)
    for number, nodes in enumerate(programs):
        turn[nodes.start : nodes.stop] = number
    child = (spec.parent >= 0).nonzero().flatten()
    wait = (turn[spec.parent[child]] - turn[child]).abs()
    assert int(wait.max()) < 2 * 64 * 1.5 < len(programs) / 10  # within two blocks: 64 tiles of leaves, a third above
    idle = sum(not len(nodes) for nodes in programs)
    assert idle < 0.1 * len(programs)


def test_a_million_nodes_stay_within_32_bits():
    for length, windows in ((2**20, (4, 4, 4)), (2**30, (4, 4)), (2**30, (1000, 1000))):
        table, blocks, slots = kernel._schedule(PyramidSpec(length, windows), 8, 8, torch.device("cpu"))
        rest = table[:, 10]
        assert blocks <= 2**15 and int(rest.max()) < blocks  # so that blocks times rest stays below 2^31
        assert slots * blocks < 2**31 and table.dtype == torch.int32


# ---------------------------------------------------------------------------------------- compiled for a GPU


@pytest.mark.parametrize(
    ("capability", "dtype", "spec", "d_k", "d_v", "dropout_p"),
    [
        (90, torch.bfloat16, PyramidSpec(2**20, (4, 4, 4)), 64, 64, 0.0),
        (90, torch.float32, auto_pyramid(2**20), 64, 64, 0.1),
        (80, torch.bfloat16, PyramidSpec(4000, (1000,)), 128, 128, 0.0),  # as many rows for a node as a tile has
        (80, torch.float64, PyramidSpec(1000, (12, 7, 4), 7), 16, 32, 0.0),
        (75, torch.float16, PyramidSpec(30, (), 99), 24, 40, 0.0),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_it_compiles_without_spilling(triton, capability, dtype, spec, d_k, d_v, dropout_p):
    found = compile_kernels(spec, d_k, d_v, dtype=dtype, dropout_p=dropout_p, capability=capability)
    assert set(found) == {"forward", "delta", "backward"}
    for name, compiled in found.items():
        assert f".target sm_{capability}" in compiled.ptx
        assert compiled.spilled == 0 and compiled.registers <= 255, name
        # 128 threads a program: at least two programs at a time on a multiprocessor, in registers and shared memory
        assert 2 * 128 * compiled.registers <= 65536 and 2 * compiled.shared <= 64 * 1024, name
        assert not re.search(r"\b(atom|red)\.(global|add|relaxed|gpu)", compiled.ptx), "no atomic additions"
    if d_k % 16 == 0:  # rows are loaded sixteen bytes at a time
        loads = found["forward"].ptx.count("ld.global.v")
        assert loads >= found["forward"].ptx.count("ld.global.b32") or loads >= 16
    if dtype == torch.bfloat16:
        assert "cvt.rn.bf16x2.f32" in found["forward"].ptx, "rounded, not cut off"


def test_what_is_interpreted_is_not_compiled(interpreter):
    assert "TRITON_INTERPRET is set" in interpreter(kernel_refuses_to_compile, PyramidSpec(8, (2,)))


# ---------------------------------------------------------------------------------------- at the door


def python(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_needed_only_where_it_is_used_and_missed_by_name():
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed: every import of it fails
import torch
from oral4.errors import MissingExtra
from oral4.pyraformer.attention import pyramidal_attention
from oral4.pyraformer.graph import PyramidSpec
from oral4.pyraformer.kernel import attention_triton, attention_plain
x = torch.randn(3, 1, 1, 14, 4)
spec = PyramidSpec(8, (2, 2))
attention_plain(*x, spec)
pyramidal_attention(*x, spec)
for call in (lambda: attention_triton(*x, spec), lambda: pyramidal_attention(*x, spec, backend="triton")):
    try:
        call()
    except MissingExtra as error:
        print(error)
"""
    assert python(program) == 2 * 'This needs triton: pip install "oral4[gpu]"\n'


def test_a_cpu_is_refused_with_what_to_do(triton):
    spec = PyramidSpec(8, (2, 2))
    with pytest.raises(ValueError, match=r"lie on cpu; use backend='shift' there.*TRITON_INTERPRET=1"):
        attention_triton(*inputs(spec)[:3], spec)


def test_a_late_switch_to_the_interpreter_is_noticed(triton):
    program = """
import os, torch, triton
os.environ["TRITON_INTERPRET"] = "1"
from oral4.pyraformer.kernel import attention_triton
from oral4.pyraformer.graph import PyramidSpec
try:
    attention_triton(*torch.randn(3, 1, 1, 14, 4), PyramidSpec(8, (2, 2)))
except ValueError as error:
    print(error)
"""
    found = python(program, TRITON_INTERPRET="0")
    assert found == "TRITON_INTERPRET changed after Triton was imported; set it before Python starts\n"


@pytest.mark.parametrize("attend", [attention_triton, attention_plain])
def test_arguments_are_checked(attend):
    spec = PyramidSpec(8, (2, 2))
    good = torch.zeros(1, 1, 14, 4)
    with pytest.raises(ValueError, match="has 13 nodes"):
        attend(good[:, :, :13], good[:, :, :13], good[:, :, :13], spec)
    with pytest.raises(ValueError, match=r"dropout_p must be in \[0, 1\), got 1.0"):
        attend(good, good, good, spec, dropout_p=1.0)
    with pytest.raises(TypeError, match="spec must be a PyramidSpec"):
        attend(good, good, good, (8, 2, 2))


# ---------------------------------------------------------------------------------------- plain operations, compiled


@pytest.mark.parametrize("spec", CASES, ids=IDS)
def test_plain_equals_masked_softmax_with_gradients(spec):
    *tensors, upstream = inputs(spec, 2, 2)
    found = with_gradients(lambda *x: attention_plain(*x, spec), tensors, upstream)
    assert_same(found, with_gradients(lambda *x: oracle(*x, spec), tensors, upstream), 1e-12)


def test_plain_has_second_derivatives():
    spec = PyramidSpec(9, (2, 2))  # one child left over
    tensors = [x.requires_grad_() for x in inputs(spec, 1, 1, 2, 2)[:3]]
    assert torch.autograd.gradgradcheck(lambda *x: attention_plain(*x, spec), tensors)


def test_plain_in_half_types_and_other_shapes():
    spec = PyramidSpec(27, (4, 3))
    q, k, v, _ = inputs(spec, 2, 3, dtype=torch.bfloat16)
    found = attention_plain(q, k, v, spec)
    full = attention_plain(q.float(), k.float(), v.float(), spec)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, full.bfloat16(), rtol=0, atol=0)
    assert torch.equal(attention_plain(q[0, 0], k[0, 0], v[0, 0], spec), found[0, 0])
    assert attention_plain(q[:0], k[:0], v[:0], spec).shape == (0, 3, spec.num_nodes, 5)


def test_plain_drops_weights_and_scales_the_others():
    spec, p, n = PyramidSpec(37, (3, 2), 5), 0.3, PyramidSpec(37, (3, 2), 5).num_nodes
    q, k, _, _ = inputs(spec)
    identity = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)
    weights = oracle(q, k, identity, spec)
    found = torch.stack([attention_plain(q, k, identity, spec, dropout_p=p) for _ in range(50)])
    kept = found != 0
    torch.testing.assert_close(found, torch.where(kept, weights / (1 - p), 0), rtol=0, atol=1e-12)
    share, count = 1 - float(kept[:, weights > 0].double().mean()), 50 * 2 * spec.num_edges()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_the_compiled_form_is_one_graph_for_each_of_many_pyramids(monkeypatch):
    """PyTorch gives up on a function after eight variants; every pyramid is a function of its own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    kernel._compiled_plain.cache_clear()
    try:
        for length in range(3, 12):
            spec = PyramidSpec(length, (2,) if length == 3 else (), 1)
            tensors = inputs(spec)[:3]
            found = pyramidal_attention(*tensors, spec, backend="compiled")
            torch.testing.assert_close(found, oracle(*tensors, spec), rtol=0, atol=1e-13)
        for batch in (2, 3, 4):  # other batches are variants of one function
            tensors = inputs(spec, batch)[:3]
            found = pyramidal_attention(*tensors, spec, backend="compiled")
            torch.testing.assert_close(found, oracle(*tensors, spec), rtol=0, atol=1e-13)
    finally:
        kernel._compiled_plain.cache_clear()


@pytest.mark.slow
def test_compiled_is_right_and_faster_than_shift():
    """Compiles C++, which takes most of a minute. The ratio measured on a quiet core is above two."""
    spec = PyramidSpec(2048, (4, 4, 4))
    *tensors, upstream = inputs(spec, 1, 4, 64, 64, torch.float32)
    torch.set_num_threads(1)

    def attend(backend, tensors=tensors):
        return with_gradients(lambda *x: pyramidal_attention(*x, spec, backend=backend), tensors, upstream)

    assert_same(attend("compiled"), attend("shift"), 2e-5)  # float32, gradients up to 20
    times = compare({name: functools.partial(attend, name) for name in ("compiled", "shift")}, repeats=7)
    assert times["compiled"].median < times["shift"].median


# ---------------------------------------------------------------------------------------- which backend


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path))
    kernel._measured.cache_clear()
    yield tmp_path / "pyraformer-backends.json"
    kernel._measured.cache_clear()


def ask(spec, device="cpu", **changes):
    call = {"batch": 1, "heads": 2, "width": 8, "dtype": torch.float32, "device": device} | changes
    return fastest_backend(spec, **call)


def test_the_rule(cache, monkeypatch):
    small, large = PyramidSpec(64, (4, 4)), PyramidSpec(4096, (4, 4))
    assert (ask(small), ask(large), ask(small, batch=100)) == ("sdpa", "shift", "shift")
    assert (ask(small, "meta"), ask(large, "meta")) == ("sdpa", "shift")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    for present, expected in ((True, "triton"), (False, "shift")):
        monkeypatch.setattr(kernel, "kernel_runs_on", lambda device, dtype, present=present: present)
        assert (ask(small, "cuda"), ask(large, "cuda")) == ("sdpa", expected)


def test_auto_asks_for_the_rule_off_the_cpu(monkeypatch):
    spec = PyramidSpec(2048, (4, 4))
    asked = []
    monkeypatch.setattr(kernel, "fastest_backend", lambda spec, **call: (asked.append(call), "shift")[1])
    q = torch.empty(2, 4, spec.num_nodes, 8, device="meta", dtype=torch.bfloat16)
    assert attention._fastest(q, spec, 0.0) == "shift"
    with torch.no_grad():
        attention._fastest(q, spec, 0.1)
    call = {"batch": 2, "heads": 4, "width": 8, "dtype": torch.bfloat16, "device": torch.device("meta")}
    assert asked == [call | {"training": True, "dropout": False}, call | {"training": False, "dropout": True}]
    pyramidal_attention(*torch.randn(3, 1, 1, 14, 4), PyramidSpec(8, (2, 2)))
    assert len(asked) == 2, "on a CPU the measured rule stands"


def test_a_compiled_model_may_ask(cache):
    spec = PyramidSpec(4096, (4, 4))

    def choose(x):
        return x + (fastest_backend(spec, batch=1, heads=1, width=8, dtype=x.dtype, device="meta") == "shift")

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 1


def test_a_measurement_replaces_the_rule_for_calls_of_its_size(cache):
    spec = PyramidSpec(300, (4, 4))
    found = measure_backends(spec, heads=2, width=8, device="cpu", candidates=("dense", "gather"), repeats=1)
    assert found.backend in found.seconds and set(found.seconds) == {"dense", "gather"} and not found.failed
    assert found.seconds[found.backend] == min(found.seconds.values())
    assert ask(spec) == found.backend
    assert ask(PyramidSpec(310, (4, 4))) == found.backend, "sizes are rounded up to powers of two"
    for changes in ({"width": 16}, {"heads": 4}, {"dtype": torch.float64}, {"training": False}):
        assert ask(spec, **changes) in ("sdpa", "shift")
    kernel._measured.cache_clear()  # as in the next session
    assert ask(spec) == found.backend
    (entry,) = json.loads(cache.read_text()).values()
    assert entry == {"seconds": found.seconds, "failed": {}}
    assert list(cache.parent.iterdir()) == [cache]


def test_what_has_no_dropout_is_not_taken_for_dropout(cache):
    spec = PyramidSpec(300, (4, 4))
    key = kernel._key(torch.device("cpu"), torch.float32, spec.num_nodes, 2, 8, True)
    cache.write_text(json.dumps({key: {"seconds": {"flex": 1.0, "gather": 2.0, "dense": 3.0}, "failed": {}}}))
    assert ask(spec) == "flex" and ask(spec, dropout=True) == "gather"


def test_what_is_wrong_or_fails_is_reported_and_never_chosen(cache, monkeypatch):
    def wrong(q, k, v, spec, scale, dropout_p):
        return v * 1.001

    def broken(q, k, v, spec, scale, dropout_p):
        raise RuntimeError("out of something\nand more")

    monkeypatch.setitem(attention._BACKENDS, "wrong", wrong)
    monkeypatch.setitem(attention._BACKENDS, "broken", broken)
    spec = PyramidSpec(64, (4,))
    options = {"device": "cpu", "repeats": 1, "training": False, "save": False}
    found = measure_backends(spec, candidates=("wrong", "broken", "shift", "sdpa"), **options)
    assert set(found.seconds) == {"shift", "sdpa"} and set(found.failed) == {"wrong", "broken"}
    assert found.failed["wrong"].startswith("wrong: relative error")
    assert found.failed["broken"] == "RuntimeError: out of something"
    assert not cache.exists()
    with pytest.raises(ValueError, match="no candidate gives the right result"):
        measure_backends(spec, candidates=("wrong",), **options)


def test_a_mask_of_gigabytes_is_left_out(cache, monkeypatch):
    tried = []

    def attempt(name, inputs, g, spec, training):
        tried.append(name)
        return [inputs[0]]

    monkeypatch.setattr(kernel, "_attempt", attempt)
    spec = PyramidSpec(20_000, (4,))
    found = measure_backends(spec, heads=1, width=1, device="cpu", training=False, repeats=1, save=False)
    assert "sdpa" not in tried and "left out" in found.failed["sdpa"]


def test_half_types_may_be_as_wrong_as_their_rounding(cache):
    spec = PyramidSpec(300, (4, 4))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = measure_backends(spec, width=16, dtype=dtype, device="cpu", candidates=("sdpa", "shift"), repeats=1)
        assert set(found.seconds) == {"sdpa", "shift"}, found.failed


def test_a_damaged_table_is_named(cache):
    cache.write_text("{")
    with pytest.raises(DataError, match=r"pyraformer-backends.json is damaged .* delete it"):
        ask(PyramidSpec(64, (4,)))


def test_the_kernel_runs_on_no_cpu():
    assert not kernel_runs_on("cpu") and not kernel_runs_on("meta")


@pytest.mark.parametrize(
    ("capability", "dtype", "runs"),
    [
        ((7, 5), torch.float16, True),
        ((7, 5), torch.bfloat16, False),
        ((9, 0), torch.bfloat16, True),
        ((7, 0), torch.float32, False),
    ],
)
def test_the_kernel_runs_on_recent_gpus(triton, monkeypatch, capability, dtype, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel_runs_on("cuda", dtype) == runs
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: None)
    assert not kernel_runs_on("cuda", dtype)


# ---------------------------------------------------------------------------------------- on a GPU


def on_gpu(tensors, dtype=None):
    return [x.to("cuda", dtype) for x in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*CASES, PyramidSpec(5000, (12, 7, 4), 5)], ids=[*IDS, "5000"])
def test_on_a_gpu_it_equals_masked_softmax(spec):
    *tensors, upstream = inputs(spec, 2, 3, 16, 24)
    expected = with_gradients(lambda *x: oracle(*x, spec), tensors, upstream)
    # float64: rounding; float32: 2^x is computed to 2e-7, sums of up to a few hundred terms
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        *there, g = on_gpu([*tensors, upstream], dtype)
        found = with_gradients(lambda *x: attention_triton(*x, spec), there, g)
        scale = max(1.0, float(max(x.abs().max() for x in expected)))
        assert_same([x.cpu().double() for x in found], expected, atol * scale)
    for dtype in (torch.float16, torch.bfloat16):
        halves = [x.to(dtype) for x in tensors]
        found = attention_triton(*on_gpu(halves), spec).cpu()
        exact = oracle(*(x.double() for x in halves), spec)
        unit = torch.finfo(dtype).eps * exact.abs() + 1e-6
        assert bool(((found.double() - exact).abs() <= 0.51 * unit + 1e-6).all())  # rounded once


@pytest.mark.gpu
def test_on_a_gpu_all_forms_agree():
    spec = PyramidSpec(5000, (12, 7, 4), 5)
    *tensors, upstream = on_gpu(inputs(spec, 2, 3, 32, 32, torch.float32))
    expected = with_gradients(lambda *x: attention_shift(*x, spec), tensors, upstream)
    for backend in ("triton", "compiled", "auto"):
        found = with_gradients(lambda *x, b=backend: pyramidal_attention(*x, spec, backend=b), tensors, upstream)
        assert_same(found, expected, 2e-5)
    found = with_gradients(lambda *x: pyramidal_attention(*x, spec, backend="flex"), tensors, upstream)
    assert_same(found, expected, 3e-2)  # TF32 inside


@pytest.mark.gpu
def test_on_a_gpu_dropout_is_the_same_in_both_passes_and_the_same_for_one_seed():
    spec, p = PyramidSpec(300, (4, 4)), 0.25
    q, k, v, upstream = on_gpu(inputs(spec, 1, 2))
    n = spec.num_nodes
    identity = torch.eye(n, dtype=torch.float64, device="cuda").expand(1, 2, n, n)

    def attend(seed, *x):
        torch.manual_seed(seed)
        return attention_triton(*x, spec, dropout_p=p)

    keep = (attend(3, q, k, identity) != 0).double() / (1 - p)
    assert torch.equal(attend(3, q, k, identity), attend(3, q, k, identity))
    found = with_gradients(lambda *x: attend(3, *x), (q, k, v), upstream)
    expected = with_gradients(lambda q, k, v: (oracle(q, k, identity, spec) * keep) @ v, (q, k, v), upstream)
    assert_same(found, expected, 1e-12)


@pytest.mark.gpu
def test_on_a_gpu_the_same_bits_every_time_and_many_heads():
    spec = PyramidSpec(64, (4, 4))
    *tensors, upstream = on_gpu(inputs(spec, 300, 250, 8, 8, torch.float32))  # 75,000 pairs of batch and head
    found = with_gradients(lambda *x: attention_triton(*x, spec), tensors, upstream)
    again = with_gradients(lambda *x: attention_triton(*x, spec), tensors, upstream)
    assert all(map(torch.equal, found, again))
    last = with_gradients(lambda *x: attention_shift(*x, spec), [x[-1:, -1:] for x in tensors], upstream[-1:, -1:])
    assert_same([x[-1:, -1:] for x in found], last, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [PyramidSpec(2**20, (4, 4, 4)), auto_pyramid(2**20)], ids=str)
def test_on_a_gpu_a_million_points_within_three_times_the_bytes(spec):
    name, speeds = torch.cuda.get_device_name(), {"H100": 3.35e12, "H200": 4.8e12, "A100": 1.55e12}
    bandwidth = next((speed for key, speed in speeds.items() if key in name), None)
    if bandwidth is None:
        pytest.skip(f"the bandwidth of {name} is not written down here")
    shape = (1, 4, spec.num_nodes, 64)
    q, k, v, upstream = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    tensors = [x.requires_grad_() for x in (q, k, v)]
    nbytes = q.numel() * 2
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention_triton(*tensors, spec)
    torch.autograd.grad(out, tensors, upstream, retain_graph=True)
    torch.cuda.synchronize()
    # the result, three gradients, and two float32 numbers a node and head, each 1/32 of a tensor
    assert torch.cuda.max_memory_allocated() - before < 4.2 * nbytes
    times = compare(
        {
            "forward": lambda: attention_triton(q.detach(), k.detach(), v.detach(), spec),
            "backward": lambda: torch.autograd.grad(out, tensors, upstream, retain_graph=True),
        },
        repeats=9,
        warmup=3,
        clock="wall",
        sync="cuda",
    )
    assert times["forward"].median < 3 * 4 * nbytes / bandwidth
    assert times["backward"].median < 3 * 8 * nbytes / bandwidth


@pytest.mark.gpu
def test_on_a_gpu_backends_are_measured(cache):
    spec = PyramidSpec(5000, (4, 4, 4))
    found = measure_backends(spec, dtype=torch.bfloat16, device="cuda")
    assert "triton" in found.seconds, found.failed
    call = {"batch": 1, "heads": 4, "width": 64, "dtype": torch.bfloat16, "device": "cuda"}
    assert fastest_backend(spec, **call) == found.backend
