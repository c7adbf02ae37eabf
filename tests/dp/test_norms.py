"""Per-example gradients in three forms: every pair against gradients written out, layers against recorded ones."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.dp import norms
from oral4.dp.norms import (
    Dense,
    Outer,
    Rows,
    choose_rule,
    conv_outer,
    cost,
    embedding_rows,
    group_norm_grads,
    inner,
    layer_norm_grads,
    norm2,
    outer_norm2,
    per_example,
    rms_norm_grads,
    slack,
    square_sum,
    weighted,
    without,
)

LAYERS = np.load(Path(__file__).parents[1] / "goldens/dp/layers.npz")
NAMES = sorted({name.split("/")[0] for name in LAYERS.files})


def golden(name, *path):
    return torch.from_numpy(LAYERS["/".join((name, *path))])


def forms_of(name, x, g):
    """The forms of each recorded layer, as the engine builds them."""
    if name.startswith("linear") or name.startswith("hf_conv1d"):
        flat = [t.reshape(t.shape[0], -1, t.shape[-1]) for t in (x, g)]
        return {"weight": Outer(*flat, transposed=name.startswith("hf")), "bias": Dense(flat[1].sum(1))}
    if name.startswith("layernorm"):
        weight, bias = layer_norm_grads(x, g, (7,), 1e-5)
        return {"weight": Dense(weight), "bias": Dense(bias)}
    if name == "t5_rmsnorm":
        return {"weight": Dense(rms_norm_grads(x, g, 1e-6))}
    if name.startswith("embedding"):
        rows = golden(name, "param", "weight").shape[0]
        return {"weight": embedding_rows(x, g, rows, 1 if name.endswith("idx1") else None)}
    options = {
        "conv2d": {"stride": (2, 2), "padding": (1, 1, 1, 1)},
        "conv2d_groups2": {"padding": (1, 1, 1, 1), "groups": 2},
        "conv2d_dilated": {"padding": (2, 2, 2, 2), "dilation": (2, 2)},
        "conv1d": {"padding": (1, 1)},
        "conv1d_depthwise": {"padding": (1, 1), "groups": 4},
    }[name]
    kernel = tuple(golden(name, "param", "weight").shape[2:])
    defaults = {"stride": (1,) * len(kernel), "dilation": (1,) * len(kernel)}
    return {"weight": conv_outer(x, g, kernel, **(defaults | options)), "bias": Dense(g.flatten(2).sum(2))}


@pytest.mark.parametrize("name", NAMES)
def test_layers_equal_recorded_gradients(name):
    # float64, 1e-10 as recorded; the recorded T5 norm computed its mean square in float32
    rtol = 2e-6 if name == "t5_rmsnorm" else 1e-10
    forms = forms_of(name, golden(name, "x"), golden(name, "grad_out"))
    recorded = {key.split("/")[-1] for key in LAYERS.files if key.startswith(f"{name}/norm/")}
    assert recorded <= set(forms)
    for parameter in recorded:
        form = forms[parameter]
        torch.testing.assert_close(per_example(form), golden(name, "per_example_grad", parameter), rtol=rtol, atol=rtol)
        torch.testing.assert_close(norm2([form]).sqrt(), golden(name, "norm", parameter), rtol=rtol, atol=0)
        if isinstance(form, Outer):
            for rule in ("gram", "instantiate"):
                found = outer_norm2(form, rule=rule).sqrt()
                torch.testing.assert_close(found, golden(name, "norm", parameter), rtol=rtol, atol=0)


# --- every pair of forms ------------------------------------------------------------------------------------


@st.composite
def several_uses(draw, most=4):
    """Uses of one parameter, (p, d), in any mixture of forms; and the batch size."""
    batch, p, d = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    uses = []
    for _ in range(draw(st.integers(1, most))):
        kind, length = draw(st.sampled_from(["outer", "transposed", "rows", "dense"])), draw(st.integers(1, 9))
        a, g = (torch.randn(batch, length, k, generator=generator, dtype=torch.float64) for k in (d, p))
        if kind == "outer":
            uses.append(Outer(a, g))
        elif kind == "transposed":
            uses.append(Outer(g, a, transposed=True))
        elif kind == "rows":
            uses.append(Rows(torch.randint(0, p, (batch, length), generator=generator), a, p))
        else:
            uses.append(Dense(torch.randn(batch, p, d, generator=generator, dtype=torch.float64)))
    return uses


@given(several_uses())
@settings(max_examples=150, deadline=None)
def test_sums_of_uses_equal_gradients_written_out(uses):
    written = [per_example(use) for use in uses]
    total = sum(written)
    # float64; the absolute part is for sums that cancel: it is measured by the parts, not by what is left of them
    size = float(sum(w.square().sum() for w in written))
    for use, w in zip(uses, written, strict=True):
        assert use.shape == tuple(w.shape[1:])
        for other, v in zip(uses, written, strict=True):
            expected = (w * v).flatten(1).sum(1)
            torch.testing.assert_close(inner(use, other), expected, rtol=1e-12, atol=1e-13 * size)
    torch.testing.assert_close(norm2(uses), total.flatten(1).square().sum(1), rtol=1e-12, atol=1e-12 * size)
    factors = torch.linspace(0, 2, len(total), dtype=torch.float64)
    expected = (factors.view(-1, 1, 1) * total).sum(0)
    found = weighted(uses[0], factors)
    for use in uses[1:]:
        assert weighted(use, factors, out=found) is found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * math.sqrt(size))


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999)
)
@settings(max_examples=50, deadline=None)
def test_groups(batch, groups, length, p, d, seed):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(batch, groups, length, k, generator=generator, dtype=torch.float64) for k in (d, p))
    use = Outer(a, g)
    written = torch.einsum("bgtp,bgtd->bgpd", g, a).reshape(batch, groups * p, d)
    torch.testing.assert_close(per_example(use), written, rtol=1e-12, atol=1e-12)
    expected = written.flatten(1).square().sum(1)
    bias = g.sum(2).flatten(1).square().sum(1)
    for rule in ("gram", "instantiate", "auto"):
        torch.testing.assert_close(outer_norm2(use, rule=rule), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outer_norm2(use, bias=True, rule=rule), expected + bias, rtol=1e-10, atol=1e-12)
    for other in (use, Dense(written)):
        torch.testing.assert_close(inner(use, other), expected, rtol=1e-10, atol=1e-12)
    factors = torch.rand(batch, generator=generator, dtype=torch.float64)
    summed = torch.einsum("b,bpd->pd", factors, written)
    torch.testing.assert_close(weighted(use, factors), summed, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weighted(use, factors, out=summed.clone()), 2 * summed, rtol=1e-10, atol=1e-12)


def test_tied_embedding_needs_its_cross_term():
    """What a peer leaves out: without the inner product of both uses the norm is off by much."""
    generator = torch.Generator().manual_seed(0)
    read = Rows(
        torch.randint(0, 11, (3, 6), generator=generator), torch.rand(3, 6, 4, generator=generator).double(), 11
    )
    head = Outer(torch.rand(3, 6, 4, generator=generator).double(), torch.rand(3, 6, 11, generator=generator).double())
    true = (per_example(read) + per_example(head)).flatten(1).square().sum(1)
    torch.testing.assert_close(norm2([read, head]), true, rtol=1e-13, atol=0)
    assert ((norm2([read]) + norm2([head])) < 0.9 * true).all()


def test_many_uses_are_added_up_first():
    """Twelve uses, as in ALBERT: 66 pairs of tables, or one gradient written out."""
    uses = [Outer(*torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(i)).double()) for i in range(12)]
    written = norms._written_out_if_cheaper(list(uses))
    assert len(written) == 1 and isinstance(written[0], Dense)
    torch.testing.assert_close(norm2(uses), sum(map(per_example, uses)).flatten(1).square().sum(1), rtol=1e-12, atol=0)
    wide = [Outer(torch.randn(2, 1, 50), torch.randn(2, 1, 60)) for _ in range(2)]
    assert len(norms._written_out_if_cheaper(list(wide))) == 2  # one position each: pairs are cheaper


def test_long_sequences_go_in_strips(monkeypatch):
    a, g = torch.randn(2, 3, 37, 5, dtype=torch.float64)
    u, v = Outer(a, g), Outer(*torch.randn(2, 3, 23, 5, dtype=torch.float64))
    rows = Rows(torch.randint(0, 5, (3, 19)), torch.randn(3, 19, 5, dtype=torch.float64), 5)
    before = [outer_norm2(u, rule="gram", bias=True), inner(u, v), inner(u, rows)]
    for limit, symmetric in ((888, (99, 99)), (2**28, (8, 99)), (2**28, (4, 8)), (888, (4, 8)), (1, (99, 99))):
        monkeypatch.setattr(norms, "GRAM_BYTES", limit)
        monkeypatch.setitem(norms.SYMMETRIC, "cpu", symmetric)
        after = [outer_norm2(u, rule="gram", bias=True), norms._cross_gram(u, v), inner(u, rows)]
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-11)


# --- precision ----------------------------------------------------------------------------------------------


def test_squares_of_many_entries_are_not_under_estimated():
    """The bound is C (1 + 1e-6) only if no norm reads too small by more: a plain norm of a large gradient does."""
    x = torch.randn(2, 4096, 512, generator=torch.Generator().manual_seed(0))
    true = x.double().square().flatten(1).sum(1).sqrt()
    found = square_sum(x).sqrt()
    torch.testing.assert_close(found, true, rtol=2e-7, atol=0)  # chunks of 1024 in float32, the rest in float64
    ones = torch.ones(1, 2**25)  # a running float32 sum of ones stops at 2^24
    assert square_sum(ones).item() == pytest.approx(2**25, rel=1e-6)


@pytest.mark.parametrize("rule", ["gram", "instantiate"])
@pytest.mark.parametrize(("length", "p", "d"), [(128, 256, 256), (16, 2048, 64), (300, 64, 32), (1, 512, 512)])
def test_float32_norms_are_not_under_estimated(rule, length, p, d):
    generator = torch.Generator().manual_seed(length)
    a = torch.randn(4, length, d, generator=generator) + 0.3
    g = torch.randn(4, length, p, generator=generator) * torch.logspace(-4, 0, length)[:, None]
    use = Outer(a, g)
    true = per_example(Outer(a.double(), g.double())).flatten(1).norm(dim=1)
    found = outer_norm2(use, rule=rule).sqrt()
    assert (found >= true * (1 - 1e-6)).all()
    torch.testing.assert_close(found, true, rtol=1e-6, atol=0)
    rows = Rows(torch.randint(0, 7, (4, length), generator=generator), g, 7)
    true = per_example(Rows(rows.ids, g.double(), 7)).flatten(1).norm(dim=1)
    torch.testing.assert_close(norm2([rows]).sqrt(), true, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_types_are_accumulated_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(3, 40, k, generator=generator).to(dtype) for k in (64, 48))
    rows = Rows(torch.randint(0, 48, (3, 40), generator=generator), a, 48)
    for use, exact in (
        (Outer(a, g), Outer(a.double(), g.double())),
        (rows, Rows(rows.ids, a.double(), 48)),
        (Dense(a), Dense(a.double())),
    ):
        true = per_example(exact).flatten(1).norm(dim=1)
        torch.testing.assert_close(norm2([use]).sqrt(), true, rtol=1e-6, atol=0)
        found = weighted(use, torch.tensor([0.5, 1.0, 0.25]))  # exact in these types: only the sum is rounded
        assert found.dtype == torch.float32
        expected = weighted(exact, torch.tensor([0.5, 1.0, 0.25]).double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        inner(Outer(a, g), rows),
        inner(Outer(a.double(), g.double()), Rows(rows.ids, a.double(), 48)),
        rtol=1e-5,
        atol=1e-3,
    )
    assert 0 < slack(dtype, torch.device("cpu")) < 0.01 and slack(torch.float64, torch.device("cpu")) == 0


def test_a_norm_that_cancels_is_not_negative():
    a, g = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    assert (norm2([Outer(a, g), Outer(a, -g)]) >= 0).all()
    assert norm2([Outer(a.double(), g.double()), Outer(a.double(), -g.double())]).max() < 1e-12


def test_weighted_into_wider_or_strided_sums():
    use, factors = Outer(torch.randn(3, 4, 5), torch.randn(3, 4, 6)), torch.rand(3)
    expected = weighted(use, factors)
    wide = torch.zeros(6, 5, dtype=torch.float64)
    torch.testing.assert_close(weighted(use, factors, out=wide), expected.double(), rtol=1e-6, atol=1e-6)
    strided = torch.zeros(5, 6).T
    torch.testing.assert_close(weighted(use, factors, out=strided), expected, rtol=1e-6, atol=1e-6)


# --- layers -------------------------------------------------------------------------------------------------


def per_example_by_autograd(function, x, *parameters):
    """Gradient of each example's sum of squares of outputs, and the gradient with respect to the output."""
    rows = []
    for i in range(len(x)):
        y = function(x[i : i + 1], *parameters)
        rows.append(torch.autograd.grad(y.square().sum(), parameters))
    return [torch.stack(g) for g in zip(*rows, strict=True)]


@given(
    st.sampled_from([1, 2, 3]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
)
@settings(max_examples=40, deadline=None)
def test_convolutions(axes, groups, kernel, stride, padding, dilation, mode):
    padding = min(padding, 3)
    x = torch.randn(2, 2 * groups, *(6, 5, 5)[:axes], dtype=torch.float64)
    weight = torch.randn(3 * groups, 2, *(kernel,) * axes, dtype=torch.float64, requires_grad=True)
    pads = [padding, padding] * axes
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]

    def run(x, weight):
        padded = F.pad(x, pads, mode="constant" if mode == "zeros" else mode) if padding else x
        return conv(padded, weight, stride=stride, dilation=dilation, groups=groups)

    (expected,) = per_example_by_autograd(run, x, weight)
    g = 2 * run(x, weight).detach()
    each = (stride,) * axes, (dilation,) * axes
    use = conv_outer(
        x, g, (kernel,) * axes, stride=each[0], padding=pads, dilation=each[1], groups=groups, padding_mode=mode
    )
    torch.testing.assert_close(per_example(use), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norm2([use]), expected.flatten(1).square().sum(1), rtol=1e-10, atol=1e-10)


def test_norm_layers():
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    expected = per_example_by_autograd(lambda x, w, b: F.layer_norm(x, (4, 5), w, b, 1e-3), x, weight, bias)
    g = 2 * F.layer_norm(x, (4, 5), weight, bias, 1e-3).detach()
    for found, true in zip(layer_norm_grads(x, g, (4, 5), 1e-3), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-11)
    assert layer_norm_grads(x, g, (4, 5), 1e-3, weight=False)[0] is None
    scale = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (expected,) = per_example_by_autograd(lambda x, w: F.rms_norm(x, (5,), w, 1e-3), x, scale)
    torch.testing.assert_close(
        rms_norm_grads(x, 2 * F.rms_norm(x, (5,), scale, 1e-3).detach(), 1e-3), expected, rtol=1e-11, atol=1e-11
    )
    w, b = (
        torch.randn(6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64, requires_grad=True),
    )
    for inputs in (x, x[:, :, 0, 0]):
        expected = per_example_by_autograd(lambda x, w, b: F.group_norm(x, 3, w, b, 1e-3), inputs, w, b)
        g = 2 * F.group_norm(inputs, 3, w, b, 1e-3).detach()
        for found, true in zip(group_norm_grads(inputs, g, 3, 1e-3), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10)


# --- at the door --------------------------------------------------------------------------------------------


def test_without_clears_what_is_not_finite():
    a, g = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
    a[1, 0], g[1, 1, 1] = math.inf, math.nan
    bad = torch.tensor([False, True, False])
    rest = torch.tensor([0, 2])
    cases = [
        (Outer(a, g), Outer(a[rest], g[rest])),
        (Rows(torch.zeros(3, 4, dtype=torch.long), a, 2), Rows(torch.zeros(2, 4, dtype=torch.long), a[rest], 2)),
        (Dense(a), Dense(a[rest])),
    ]
    for use, others in cases:
        assert not torch.isfinite(norm2([use])[1])
        found = weighted(without(use, bad), torch.tensor([0.5, 0.0, 0.25]))
        torch.testing.assert_close(found, weighted(others, torch.tensor([0.5, 0.25])), rtol=1e-6, atol=1e-6)


def test_messages():
    with pytest.raises(ValueError, match=r"a has shape \(2, 3, 4\) and g \(2, 5, 4\); give \(B, T, d\)"):
        Outer(torch.ones(2, 3, 4), torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"ids have shape \(2, 3\) and g \(2, 4, 5\); give \(B, T\) and"):
        Rows(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4, 5), 7)
    with pytest.raises(ValueError, match="norm2 needs at least one use"):
        norm2([])
    for other in (Dense(torch.ones(2, 4, 5)), Outer(torch.ones(3, 1, 4), torch.ones(3, 1, 5))):
        with pytest.raises(ValueError, match="two gradients of one parameter are needed"):
            inner(Dense(torch.ones(2, 5, 4)), other)
    with pytest.raises(ValueError, match="cannot be tied with a grouped convolution"):
        inner(
            Outer(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 2)),
            Rows(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, 4), 4),
        )


@given(st.integers(1, 64), st.integers(1, 2048), st.integers(1, 4096), st.integers(1, 4096))
@settings(max_examples=100, deadline=None)
def test_choice_is_the_cheaper_rule_within_the_budget(batch, length, p, d):
    price = cost(batch, length, p, d)
    assert price.gram > 0 and price.size == 4 * batch * p * d
    assert (choose_rule(batch, length, p, d) == "instantiate") == (price.gram > price.instantiate)
    assert choose_rule(batch, length, p, d, budget=price.size - 1) == "gram"
    assert cost(batch, length + 1, p, d).instantiate == price.instantiate
    if norms.num_strips(length + 1) == norms.num_strips(length):  # more strips leave more of the table out
        assert cost(batch, length + 1, p, d).gram > price.gram
