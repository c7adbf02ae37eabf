"""Masked norms, softmax and mean: each against items cut to their length, with gradients; errors at the door."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc.masks import (
    check_mask,
    masked_group_norm,
    masked_group_norm_reference,
    masked_instance_norm,
    masked_instance_norm_reference,
    masked_mean,
    masked_mean_reference,
    masked_softmax,
    masked_softmax_reference,
)

SHAPES = [(3, 8, 5, 13), (3, 8, 13), (1, 8, 1, 2), (2, 8, 1)]


def draw(shape, dtype=torch.float64, offset=0.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + offset


def prefix_mask(lengths, total, dtype=torch.float64):
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(dtype)[:, None]


def some_mask(shape, dtype=torch.float64):
    """Items of different lengths, the first one full."""
    batch, total = shape[0], shape[-1]
    return prefix_mask([max(1, total - 4 * item) for item in range(batch)], total, dtype)


@st.composite
def cases(draw_from):
    """Any batch: three or four axes, frames anywhere in the mask, at least one in every item."""
    batch, channels, length = (
        draw_from(st.integers(1, 4)),
        2 * draw_from(st.integers(1, 4)),
        draw_from(st.integers(1, 12)),
    )
    bands = draw_from(st.one_of(st.none(), st.integers(1, 5)))
    shape = (batch, channels, length) if bands is None else (batch, channels, bands, length)
    rows = [draw_from(st.lists(st.booleans(), min_size=length, max_size=length).filter(any)) for _ in range(batch)]
    groups = draw_from(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    return draw(shape, seed=draw_from(st.integers(0, 999))), torch.tensor(rows).double()[:, None], groups


@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans(), st.booleans())
def test_group_norm_is_torchs_on_the_frames_alone(case, with_weight, with_bias):
    x, mask, groups = case
    weight = draw(x.shape[1:2], seed=1) if with_weight else None
    bias = draw(x.shape[1:2], seed=2) if with_bias else None
    found = masked_group_norm(x, mask, groups, weight, bias)
    reference = masked_group_norm_reference(x, mask, groups, weight, bias)
    for item, frames in enumerate(mask[:, 0].bool()):
        cut = x[item : item + 1, ..., frames]
        alone = torch.group_norm(cut, groups, weight, bias)[0]  # a single number a group is fine: it gives the bias
        torch.testing.assert_close(found[item, ..., frames], alone, rtol=0, atol=1e-9)  # 1/sqrt(eps) = 316 times 1e-13
        torch.testing.assert_close(reference[item, ..., frames], alone, rtol=0, atol=1e-9)
        assert not found[item, ..., ~frames].any() and not reference[item, ..., ~frames].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_group_norm_equals_its_reference_with_gradients(shape, groups):
    mask, upstream = some_mask(shape), draw(shape, seed=5)
    mask = torch.cat([mask, torch.zeros_like(mask[..., :1])], dim=-1)  # padding in every item: never the ordinary way
    x = torch.cat([draw(shape), draw((*shape[:-1], 1), seed=6)], dim=-1).requires_grad_()
    upstream = torch.cat([upstream, upstream[..., :1]], dim=-1)
    inputs = [x, draw((8,), offset=1, seed=1).requires_grad_(), draw((8,), seed=2).requires_grad_()]
    found = masked_group_norm(x, mask, groups, *inputs[1:])
    reference = masked_group_norm_reference(x, mask, groups, *inputs[1:])
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-9)
    pairs = zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, reference)), strict=True)
    for fast, slow in pairs:
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-7)  # slopes up to 316 / eps-sized variances
    assert not torch.autograd.grad(masked_group_norm(*inputs[:1], mask, groups), x, upstream)[0][..., -1].any()


@pytest.mark.parametrize("shape", [(2, 8, 2, 4), (2, 8, 4), (1, 8, 1, 2), (2, 8, 1)])
def test_norms_pass_a_numerical_gradient_check(shape):
    mask = some_mask(shape)
    mask[0, :, -1] = 0 if shape[-1] > 1 else 1
    arguments = (draw(shape).requires_grad_(), draw((8,), seed=1).requires_grad_(), draw((8,), seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w, b: masked_group_norm(x, mask, 2, w, b, 1e-2), arguments)
    assert torch.autograd.gradcheck(lambda x, w, b: masked_instance_norm(x, mask, w, b, 1e-2), arguments)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_padded_is_torchs_own_result_bit_for_bit(shape):
    x, weight, bias = draw(shape, torch.float32), draw((8,), torch.float32, seed=1), draw((8,), torch.float32, seed=2)
    ones = torch.ones(shape[0], 1, shape[-1])
    expected = torch.group_norm(x, 4, weight, bias)
    for mask in (None, ones, ones.bool(), ones[:, :, None]):
        assert torch.equal(masked_group_norm(x, mask, 4, weight, bias), expected)
    padded, mask = F.pad(x, (0, 3), value=7.0), F.pad(ones, (0, 3))  # now our own four passes
    torch.testing.assert_close(masked_group_norm(padded, mask, 4, weight, bias)[..., :-3], expected, rtol=0, atol=1e-5)


def test_instance_norm_is_torchs():
    x, weight, bias = draw((2, 8, 5, 13)), draw((8,), seed=1), draw((8,), seed=2)
    mask = prefix_mask([13, 6], 13)
    found = masked_instance_norm(x, mask, weight, bias)
    torch.testing.assert_close(found, masked_instance_norm_reference(x, mask, weight, bias), rtol=0, atol=1e-12)
    short = F.instance_norm(x[1:, ..., :6], weight=weight, bias=bias)
    torch.testing.assert_close(found[1:, ..., :6], short, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        masked_instance_norm(x, None, weight, bias), F.instance_norm(x, weight=weight, bias=bias)
    )


def test_a_large_mean_costs_no_digits():
    """Sums of squares would: 1000 squared, times the relative rounding 6e-8, is 6 % of a variance of one."""
    x, mask = draw((2, 8, 5, 40), torch.float32, offset=1000), prefix_mask([40, 25], 40, torch.float32)
    exact = masked_group_norm_reference(x.double(), mask.double(), 2)
    naive_mean = (x * mask[:, None]).sum() / (mask.sum() * 40)
    naive = (x.square() * mask[:, None]).sum() / (mask.sum() * 40) - naive_mean**2
    assert abs(float(naive) - 1) > 0.05  # what the test would catch
    torch.testing.assert_close(masked_group_norm(x, mask, 2).double(), exact, rtol=0, atol=1e-3)  # x itself: 3e-5 apart


@pytest.mark.parametrize("norm", [lambda x, m: masked_group_norm(x, m, 2), masked_instance_norm, masked_mean])
def test_what_stands_in_the_padding_does_not_matter(norm):
    x, mask = draw((2, 8, 5, 13)), prefix_mask([13, 6], 13)
    loud = torch.where(mask[:, None] > 0, x, 1e6)
    torch.testing.assert_close(norm(loud, mask), norm(x, mask), rtol=0, atol=1e-9)


@pytest.mark.parametrize("function", [lambda x, m: masked_group_norm(x, m, 2), masked_instance_norm, masked_mean])
@pytest.mark.parametrize("shape", [(2, 8, 13), (2, 8, 5, 13)])
def test_an_item_without_frames_gives_zeros_and_finite_gradients(function, shape):
    x, mask = draw(shape).requires_grad_(), prefix_mask([13, 0], 13)
    out = function(x, mask)
    assert not out[1].any() and out[0].any()
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all() and not gradient[1].any()


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="8 channels cannot be cut into 3 groups"):
        masked_group_norm(draw((1, 8, 4)), torch.ones(1, 1, 4), 3)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 999), st.sampled_from([-1, 1]))
def test_softmax_equals_its_reference(batch, length, seed, dim):
    scores = draw((batch, length, length), offset=0, seed=seed) * 3
    mask = (draw((batch, length, length), seed=seed + 1) > 0).double()
    found, reference = masked_softmax(scores, mask, dim), masked_softmax_reference(scores, mask, dim)
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-14)
    assert not found[mask == 0].any()
    torch.testing.assert_close(found.sum(dim), (mask.sum(dim) > 0).double(), rtol=0, atol=1e-14)  # empty rows: zeros


def test_softmax_of_extreme_scores():
    scores = torch.tensor([[3e4, -3e4, 3e4], [-3e4, -3e4, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    assert masked_softmax(scores, mask).tolist() == [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]
    filled = scores.masked_fill(mask == 0, -1e4).softmax(-1)  # a fill value of -1e4 is larger than these scores
    assert filled[1].tolist() == [0, 0, 1]


def test_softmax_has_finite_gradients_also_at_an_empty_row():
    scores = draw((2, 3, 4)).requires_grad_()
    mask = torch.ones(2, 1, 4, dtype=torch.float64)
    mask[1], mask[0, :, 2] = 0, 0
    assert torch.autograd.gradcheck(lambda s: masked_softmax(s, mask), scores)
    (gradient,) = torch.autograd.grad(masked_softmax(scores, mask).square().sum(), scores)
    assert gradient.isfinite().all() and not gradient[1].any() and not gradient[0, :, 2].any()
    assert torch.equal(masked_softmax(scores, None), scores.softmax(-1))


@settings(deadline=None, max_examples=40)
@given(cases())
def test_mean_is_the_mean_of_the_frames(case):
    x, mask, _ = case
    found = masked_mean(x, mask)
    expected = torch.stack(
        [item[..., frames].flatten(1).mean(1) for item, frames in zip(x, mask[:, 0].bool(), strict=True)]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(masked_mean_reference(x, mask), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(masked_mean(x, None), x.flatten(2).mean(2), rtol=0, atol=0)
    official = (x * mask.reshape(len(x), *[1] * (x.dim() - 2), -1)).flatten(2).sum(2)
    bands = x[0, 0].numel() // x.shape[-1]
    torch.testing.assert_close(found, official / (mask.sum(-1) * bands), rtol=0, atol=1e-13)


def test_check_mask():
    x = torch.zeros(2, 80, 3, dtype=torch.float64)
    assert check_mask(x, None) is None and check_mask(x, torch.ones(2, 1, 3, dtype=torch.bool)) is None
    mask = torch.tensor([[[1, 1, 1]], [[1, 0, 0]]])
    found = check_mask(x, mask)
    assert found.dtype == torch.float64 and found.tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 80, 3), torch.ones(2, 3), "mask has shape (2, 3); give (B, 1, T) = (2, 1, 3)"),
        (torch.zeros(2, 80, 3), torch.ones(2, 1, 4), "mask has shape (2, 1, 4)"),
        (torch.zeros(2, 80, 3), torch.ones(1, 1, 3), "mask has shape (1, 1, 3)"),
        (torch.zeros(1, 80, 3), torch.tensor([[[1, 0.5, 0]]]), "mask holds 0.5; give 1 for a frame"),
        (torch.zeros(1, 80, 3), torch.tensor([[[1, float("nan"), 0]]]), "mask holds nan"),
        (torch.zeros(2, 80, 3), torch.tensor([[[1, 1, 1]], [[0, 0, 0]]]), "item 1 of the batch is padding only"),
        (torch.zeros(2, 80, 0), None, "at least one item of at least one frame"),
        (torch.zeros(0, 80, 3), None, "at least one item of at least one frame"),
    ],
)
def test_check_mask_refuses(x, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_mask(x, mask)


def test_a_single_number_in_a_group_gives_the_bias():
    """`torch.nn.functional.group_norm` refuses it, but an utterance of one frame is no mistake of its user."""
    x, weight, bias = draw((1, 4, 1)), draw((4,), seed=1), draw((4,), seed=2)
    plain = masked_instance_norm(x, None, weight, bias)[0, :, 0]
    torch.testing.assert_close(plain, bias, rtol=0, atol=1e-12)  # rounding of x, times 1/sqrt(eps) = 316
    padded, mask = F.pad(x, (0, 2)), torch.tensor([[[1.0, 0, 0]]])
    torch.testing.assert_close(masked_instance_norm(padded, mask, weight, bias)[0, :, 0], bias, rtol=0, atol=1e-12)
