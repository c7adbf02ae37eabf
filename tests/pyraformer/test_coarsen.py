"""Coarser scales: every kind against its definition written out here and the official code; errors at the door."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oral4.pyraformer.coarsen import (
    KINDS,
    CoarserScaleConstruction,
    StridedConvolution,
    coarsen_reference,
    strided_convolution_reference,
)
from oral4.pyraformer.graph import PyramidSpec

CSCM = {n: torch.from_numpy(v) for n, v in np.load(Path(__file__).parents[1] / "goldens/pyraformer/cscm.npz").items()}
OFFICIAL = {
    "bottleneck": "Bottleneck_Construct",
    "conv": "Conv_Construct",
    "max": "MaxPooling_Construct",
    "average": "AvgPooling_Construct",
}
LEARNED = ("bottleneck", "conv")


@st.composite
def pyramids(draw, longest=80):
    """A length and windows that fit it: remainders, one scale, one node at the top."""
    size = length = draw(st.integers(1, longest))
    windows = []
    while size >= 2 and draw(st.booleans()):
        windows.append(draw(st.integers(2, min(size, 7))))
        size //= windows[-1]
    return length, tuple(windows)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(module, x, *, training):
    """The module by its definition: loops, batch statistics and ELU by hand."""
    y, coarse = (x @ module.down.weight.mT + module.down.bias if module.kind == "bottleneck" else x), []
    for scale, window in enumerate(module.windows):
        families = [y[:, p * window : (p + 1) * window] for p in range(y.shape[1] // window)]
        if module.kind == "max":
            y = torch.stack([family.amax(1) for family in families], 1)
        elif module.kind == "average":
            y = torch.stack([family.sum(1) / window for family in families], 1)
        else:
            conv, norm = module.steps[scale].conv, module.steps[scale].norm
            y = torch.stack([torch.einsum("bci,oic->bo", family, conv.weight) + conv.bias for family in families], 1)
            mean, variance = norm.running_mean, norm.running_var
            if training:
                mean, variance = y.mean((0, 1)), y.var((0, 1), correction=0)
            y = (y - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
            y = torch.where(y > 0, y, torch.expm1(y.clamp(max=0)))
        coarse.append(y)
    coarse = torch.cat(coarse, 1) if coarse else x[:, :0]
    if module.kind == "bottleneck" and module.windows:
        coarse = coarse @ module.up.weight.mT + module.up.bias
    nodes = torch.cat([x, coarse], 1)
    centred = nodes - nodes.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight + module.norm.bias


def shaken(module):
    """The module in float64 with no parameter or average at its initial value."""
    module = module.double()
    generator = torch.Generator().manual_seed(7)
    for tensor in [*module.parameters(), *(b for n, b in module.named_buffers() if n.endswith("running_mean"))]:
        tensor.data += 0.3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1.7)
    return module


# ---------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_official_module(kind):
    """In training, the running averages that this leaves, and in evaluation with them."""

    def state(prefix):
        found = {n.removeprefix(prefix): v for n, v in CSCM.items() if n.startswith(prefix)}
        return {n.replace("conv_layers.", "steps.").replace("downConv", "conv"): v for n, v in found.items()}

    narrow = 5 if kind == "bottleneck" else None
    module = CoarserScaleConstruction(12, [3, 2, 2], kind, d_bottleneck=narrow).double()
    module.load_state_dict(state(f"{OFFICIAL[kind]}/sd0/"))
    x = CSCM["x"]
    torch.testing.assert_close(module.train()(x), CSCM[f"{OFFICIAL[kind]}/train_y"], rtol=0, atol=1e-10)
    after = state(f"{OFFICIAL[kind]}/sd1/")
    assert after.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-10)
    assert (kind in LEARNED) == any(name.endswith("running_mean") for name in after)
    torch.testing.assert_close(module.eval()(x), CSCM[f"{OFFICIAL[kind]}/eval_y"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(pyramids(), st.integers(2, 3), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_equals_its_definition_on_any_pyramid(kind, training, pyramid, batch, seed):
    length, windows = pyramid
    torch.manual_seed(seed)
    module = shaken(CoarserScaleConstruction(6, windows, kind)).train(training)
    x = draw(batch, length, 6, seed=seed)
    found = module(x)
    assert found.shape == (batch, PyramidSpec(length, windows).num_nodes, 6)
    # float64, sums of at most 42 terms; a batch variance of two values can be small and enlarges the rounding
    torch.testing.assert_close(found, written_out(module, x, training=training), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_definition(kind):
    module = shaken(CoarserScaleConstruction(6, (4, 3), kind)).train()
    x, upstream = draw(3, 29, 6).requires_grad_(), draw(3, 29 + 7 + 2, 6, seed=1)
    wanted = [x, *module.parameters()]
    expected = torch.autograd.grad(written_out(module, x, training=True), wanted, upstream)
    for a, b in zip(torch.autograd.grad(module(x), wanted, upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)  # float64


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_strided_convolution_is_its_definition(batch, width_in, width_out, window, more):
    x, bias = draw(batch, window + more, width_in), draw(width_out, seed=2)
    weight = draw(width_out, width_in, window, seed=1)
    found = strided_convolution_reference(x, weight, bias)
    expected = nn.functional.conv1d(x.mT, weight, bias, stride=window).mT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(pyramids())
@settings(max_examples=40, deadline=None)
def test_means_of_families(pyramid):
    length, windows = pyramid
    x = draw(2, length, 3)
    below = x
    for scale, window in zip(coarsen_reference(x, windows), windows, strict=True):
        assert scale.shape[1] == below.shape[1] // window
        for parent in range(scale.shape[1]):
            family = below[:, parent * window : (parent + 1) * window]
            torch.testing.assert_close(scale[:, parent], family.sum(1) / window, rtol=0, atol=1e-14)
        below = scale
    assert coarsen_reference(x, (length + 1,))[0].shape == (2, 0, 3)


def test_finest_nodes_do_not_pass_the_bottleneck():
    module = CoarserScaleConstruction(8, (4, 2), d_bottleneck=1).double().eval()
    x = draw(2, 21, 8)
    torch.testing.assert_close(module(x)[:, :21], nn.functional.layer_norm(x, (8,)), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------- what the page says


def test_parameter_counts_of_the_paper():
    """Spec: D = 512, narrow 128, windows of 4; all, and without normalisations."""
    expected = {
        "bottleneck": (330_496, 328_704),
        "conv": (3_151_360, 3_147_264),
        "max": (1_024, 0),
        "average": (1_024, 0),
    }
    for kind, (everything, without) in expected.items():
        module = CoarserScaleConstruction(512, (4, 4, 4), kind)
        assert sum(p.numel() for p in module.parameters()) == everything
        norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm1d)]
        assert everything - sum(p.numel() for m in norms for p in m.parameters()) == without


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "windows"), [(23, (5, 2)), (169, (4, 4, 4)), (50, (3, 2, 2, 2))])
def test_a_coarse_node_sees_its_strides_and_nothing_else(kind, length, windows):
    torch.manual_seed(1)
    module = CoarserScaleConstruction(16, windows, kind).double().eval()
    x = draw(1, length, 16).requires_grad_()
    nodes, spec = module(x)[0] @ draw(16, seed=2), PyramidSpec(length, windows)
    for scale in range(1, spec.num_scales):
        leaves = math.prod(windows[:scale])
        for node in range(spec.sizes[scale]):
            (gradient,) = torch.autograd.grad(nodes[spec.starts[scale] + node], x, retain_graph=True)
            moved = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
            inside = range(node * leaves, (node + 1) * leaves)
            assert set(moved) <= set(inside)  # exactly zero elsewhere
            # each channel's maximum comes from one leaf, so not all need to move the node
            assert moved == list(inside) if kind != "max" else 1 <= len(moved) <= 16


@pytest.mark.parametrize("length", [169, 337, 673])
def test_the_prediction_token_is_in_no_convolution(length):
    module = CoarserScaleConstruction(8, (4, 4, 4)).eval()
    x = draw(1, length, 8, dtype=torch.float32)
    changed = x.clone()
    changed[:, -1] = 1e3
    assert torch.equal(module(x)[:, length:], module(changed)[:, length:])
    assert not torch.equal(module(x)[:, length - 1], module(changed)[:, length - 1])


@pytest.mark.parametrize("kind", LEARNED)
def test_biases_before_a_batch_normalisation_have_no_gradient(kind):
    module = CoarserScaleConstruction(12, (3, 2, 2), kind).double()
    x, upstream = draw(3, 37, 12), draw(3, 37 + 12 + 6 + 3, 12, seed=1)
    module(x).backward(upstream)
    null = {f"steps.{i}.conv.bias" for i in range(3)} | ({"down.bias"} if kind == "bottleneck" else set())
    for name, parameter in module.named_parameters():
        largest = float(parameter.grad.abs().max())
        assert largest < 1e-12 if name in null else largest > 1e-3, (name, largest)
    before = module(x)
    for name, parameter in module.named_parameters():
        if name in null:
            parameter.data += 5.0
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-11)  # a shift that the normalisation takes back
    assert not torch.allclose(module.eval()(x), before, atol=1e-2)


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_knows_no_direction_and_convolution_does(kind):
    x = draw(2, 24, 8)
    sizes = PyramidSpec(24, (3, 4)).sizes
    for name, symmetric in ((kind, True), ("conv", False)):
        torch.manual_seed(0)
        module = CoarserScaleConstruction(8, (3, 4), name).double().eval()
        ahead, back = module(x).split(sizes, 1), module(x.flip(1)).split(sizes, 1)
        assert torch.allclose(ahead[1].flip(1), back[1]) == torch.allclose(ahead[2].flip(1), back[2]) == symmetric


def test_training_ties_the_batch_together_and_evaluation_does_not():
    module = CoarserScaleConstruction(8, (4, 2)).double()
    x = draw(3, 17, 8)
    assert not torch.allclose(module(x)[0], module(x[:2])[0])
    module.eval()
    torch.testing.assert_close(module(x)[0], module(x[:1])[0], rtol=0, atol=1e-13)


def test_coarse_nodes_span_as_many_directions_as_the_bottleneck():
    module = CoarserScaleConstruction(16, (4, 2), d_bottleneck=3).double()
    module.norm = nn.Identity()
    coarse = module(draw(8, 64, 16))[:, 64:].flatten(0, 1)
    assert int(torch.linalg.matrix_rank(coarse - coarse.mean(0), rtol=1e-10)) == 3


# ---------------------------------------------------------------------------------------- as a module


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    torch.manual_seed(0)
    module = CoarserScaleConstruction(8, (4, 2), kind)
    for _ in range(3):
        module(draw(2, 17, 8, dtype=torch.float32))
    twin = CoarserScaleConstruction(8, (4, 2), kind)
    twin.load_state_dict(copy.deepcopy(module.state_dict()))
    x = draw(2, 17, 8, seed=5, dtype=torch.float32)
    assert torch.equal(twin.eval()(x), module.eval()(x))
    assert set(module.state_dict()) >= {"norm.weight", "norm.bias"}


def test_the_seed_decides_the_weights():
    modules = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        modules.append(CoarserScaleConstruction(8, (4, 2)).state_dict())
    assert all(torch.equal(modules[0][name], modules[1][name]) for name in modules[0])
    assert not torch.equal(modules[0]["down.weight"], modules[2]["down.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_layout_are_left_alone(kind):
    module = CoarserScaleConstruction(6, (4, 2), kind).double().eval()
    wide = draw(2, 6, 42).mT[:, ::2]
    before = wide.clone()
    assert not wide.is_contiguous()
    torch.testing.assert_close(module(wide), module(wide.contiguous()), rtol=0, atol=1e-13)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("kind", KINDS)
def test_number_types(kind):
    module = CoarserScaleConstruction(8, (4, 2), kind)
    x = draw(4, 17, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = copy.deepcopy(module)(x)
    half.float().sum().backward()
    full = module(x)
    assert full.dtype == torch.float32 and module.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(half.float(), full, rtol=0, atol=0.1)  # bfloat16 has 8 bits, values of size 1 to 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(kind, training):
    module = CoarserScaleConstruction(8, (4, 2), kind).train(training)
    assert module(torch.empty(0, 17, 8)).shape == (0, 17 + 4 + 2, 8)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_one_scale_is_layer_normalisation():
    x = draw(2, 5, 8)
    for kind in KINDS:
        module = CoarserScaleConstruction(8, (), kind).double()
        torch.testing.assert_close(module(x), nn.functional.layer_norm(x, (8,)), rtol=0, atol=1e-14)


def test_any_number_of_scales():
    for windows in ((2,), (2, 3), (2, 2, 2, 2)):
        for kind in KINDS:
            module = CoarserScaleConstruction(4, windows, kind)
            assert module(draw(2, 50, 4, dtype=torch.float32)).shape[1] == PyramidSpec(50, windows).num_nodes


def test_default_width_of_the_bottleneck():
    assert CoarserScaleConstruction(16, (2,)).down.out_features == 4
    assert CoarserScaleConstruction(3, (2,)).down.out_features == 1


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("kind", LEARNED)
def test_one_series_and_one_node_cannot_be_trained(kind):
    module = CoarserScaleConstruction(8, (4, 4), kind)
    with pytest.raises(ValueError, match=r"one series and the coarse scale one node\. Use a batch of two"):
        module(torch.randn(1, 16, 8))
    assert module(torch.randn(2, 16, 8)).shape == (2, 21, 8)
    assert module(torch.randn(1, 32, 8)).shape == (1, 42, 8)
    assert module.eval()(torch.randn(1, 16, 8)).shape == (1, 21, 8)
    for pooling in ("max", "average"):
        assert CoarserScaleConstruction(8, (4, 4), pooling)(torch.randn(1, 16, 8)).shape == (1, 21, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_scale_says_what_fits(kind):
    module = CoarserScaleConstruction(8, (6, 6, 6), kind)
    with pytest.raises(ValueError, match=r"scale 4 would have no node: length 168 .* windows\[2\] may be at most 4"):
        module(torch.randn(2, 168, 8))
    assert module(torch.randn(2, 216, 8)).shape == (2, 216 + 36 + 6 + 1, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((8, (4,), "mean"), {}, ValueError, "kind='mean' is unknown; choose one of bottleneck, conv, max, average"),
        ((8, (4,), "conv"), {"d_bottleneck": 2}, ValueError, "d_bottleneck=2 has no meaning for kind='conv'"),
        ((8, (4, 1)), {}, ValueError, r"windows\[1\] must be at least 2, got 1 \(a window of 1 would only repeat"),
        ((8, (4, 2.0)), {}, TypeError, r"windows\[1\] must be an integer >= 2, got 2.0"),
        ((0, (4,)), {}, ValueError, "d_model must be at least 1, got 0"),
        ((8, (4,)), {"d_bottleneck": 0}, ValueError, "d_bottleneck must be at least 1, got 0"),
        ((8.0, (4,)), {}, TypeError, "d_model must be an integer"),
    ],
)
def test_bad_settings(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CoarserScaleConstruction(*arguments, **options)


def test_references_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="3 nodes do not fill a window of 4; give at least 4"):
        strided_convolution_reference(torch.randn(1, 3, 2), torch.randn(2, 2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="one value a channel"):
        StridedConvolution(4, 3)(torch.randn(1, 4, 5))
