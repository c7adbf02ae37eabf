"""The decoder: pieces against the official code's numbers or a plain form, exact under padding, errors at the door."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oral4.diffvc.decoder import (
    Block,
    Decoder,
    DecoderConfig,
    LinearAttention,
    RefBlock,
    ResnetBlock,
    Rezero,
    ScoreUNet,
    SpeakerCondition,
    conv_with_constant,
    conv_with_constant_reference,
    linear_attention_reference,
    official_names,
    sinusoidal_embedding,
)

FOLDER = Path(__file__).parents[1] / "goldens/diffvc"
BLOCKS = {name: torch.from_numpy(value) for name, value in np.load(FOLDER / "blocks.npz").items()}
CONDITION = ("voice", "t", "reference", "reference_mask")
SMALL = {"num_mels": 16, "dim": 8, "g_dim": 8, "voice_dim": 12, "heads": 2, "head_dim": 4}


def golden(name):
    stored = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items() if key != "config"}
    return stored, {key[2:]: value.float() for key, value in stored.items() if key.startswith("w.")}


def weights(prefix, renamed):
    """The golden weights of a block, under our names."""
    state = {}
    for key, value in BLOCKS.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            theirs = next(each for each in renamed if name.startswith(each))
            state[renamed[theirs] + name.removeprefix(theirs)] = value.float()
    return state


def assert_golden(found, expected):
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)  # the goldens' own tolerance, float32


def small(condition="wodyn", seed=0, **settings):
    """A decoder whose attention is at work: an untrained Rezero would hide it."""
    torch.manual_seed(seed)
    decoder = Decoder(DecoderConfig(**{**SMALL, "condition": condition, **settings})).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.3)
    return decoder


def lengths_mask(lengths, frames=None):
    return (torch.arange(frames or max(lengths)) < torch.tensor(lengths)[:, None]).float()[:, None]


def inputs(condition, lengths, reference_lengths, bands=16, voice_dim=12):
    generator = torch.Generator().manual_seed(7)
    batch = len(lengths)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    extra = (15,) if condition == "whole" else ()
    return {
        "x": draw(batch, bands, max(lengths)),
        "mask": lengths_mask(lengths),
        "xbar": draw(batch, bands, max(lengths)),
        "voice": draw(batch, voice_dim),
        "t": torch.linspace(0.1, 0.9, batch),
        "reference": draw(batch, *extra, bands, max(reference_lengths)),
        "reference_mask": lengths_mask(reference_lengths),
    }


@torch.no_grad()
def score(decoder, data):
    g = decoder.condition(data["voice"], data["t"], data["reference"], data["reference_mask"])
    return decoder(data["x"], data["mask"], data["xbar"], g, data["t"])


# Against the official code


def test_embedding_of_time_is_the_official_one():
    assert_golden(sinusoidal_embedding(BLOCKS["t"], 16), BLOCKS["posemb"])


def test_resnet_block_is_the_official_one():
    block = ResnetBlock(16, 32, 16)
    table = {
        "mlp.1.": "time.",
        "block1.block.0.": "first.conv.",
        "block1.block.1.": "first.norm.",
        "block2.block.0.": "second.conv.",
        "block2.block.1.": "second.norm.",
        "res_conv.": "shortcut.",
    }
    block.load_state_dict(weights("rb.w.", table))
    found = block(BLOCKS["la_x"], BLOCKS["ref_temb"], mask=BLOCKS["ref_mask"])
    assert_golden(found, BLOCKS["rb_y"])


def test_linear_attention_is_the_official_one():
    attention = LinearAttention(16)
    attention.load_state_dict(weights("la.w.", {"": ""}))
    assert_golden(attention(BLOCKS["la_x"]), BLOCKS["la_y"])


def test_reference_block_is_the_official_one():
    block = RefBlock(1, 16, 16)
    table = {f"block{a}{b}.{i}.": f"blocks.{2 * a + b - 3}.{part}." for a in (1, 2, 3) for b in (1, 2)
             for i, part in enumerate(("conv", "norm"))}  # fmt: skip
    block.load_state_dict(
        weights("ref.w.", table | {"mlp1.1.": "time_first.", "mlp2.1.": "time_second.", "final_conv.": "out."})
    )
    assert_golden(block(BLOCKS["ref_x"], BLOCKS["ref_temb"], BLOCKS["ref_mask"]), BLOCKS["ref_y"])


@pytest.mark.parametrize(("name", "condition", "dim"), [("score_wodyn", "wodyn", 16), ("score_donly", "d-only", 8)])
def test_score_is_the_official_one(name, condition, dim):
    stored, state = golden(name)
    for compat in (True, False):
        config = DecoderConfig(num_mels=16, dim=dim, g_dim=16, condition=condition, compat_padding=compat)
        decoder = Decoder(config)
        names = official_names(config)
        assert set(names.values()) == set(state)
        decoder.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
        with torch.no_grad():
            g = decoder.condition(stored["c"], stored["t"], stored["xt_ref"], stored["mask"])
            found = decoder(stored["xt"], stored["mask"], stored["mean"], g, stored["t"])
        assert_golden(found[0], stored["score"][0])  # 24 of 24 frames: nothing is padded
        padded = (found[1] - stored["score"][1]).norm() / stored["score"][1].norm()  # 17 of 24 frames
        if compat:
            assert_golden(found, stored["score"])
        else:
            assert padded > 0.01  # the official norms see the seven zeros


@pytest.mark.parametrize(
    ("condition", "count"),
    [("wodyn", 117_794_599), ("d-only", 125_577_752 - 8_464_529), ("whole", 117_794_599 + 64 * 9 * 14)],
)
def test_number_of_parameters(condition, count):
    with torch.device("meta"):
        decoder = Decoder(DecoderConfig.paper(condition))
    assert sum(p.numel() for p in decoder.parameters()) == count
    if condition != "d-only":
        assert sum(p.numel() for p in decoder.speaker.reference.parameters()) == 615_840 + (count - 117_794_599)


# Against plain forms


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3), bands=st.integers(1, 5), frames=st.integers(1, 7), kernel=st.sampled_from([1, 3]),
    channels=st.integers(1, 3), constants=st.integers(1, 4), padded=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_folded_channels_are_the_channels(batch, bands, frames, kernel, channels, constants, padded, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels + constants, 4, kernel, padding=kernel // 2).double()
    mask = torch.randint(0, 2, (batch, 1, 1, frames)).double() if padded else None
    x = torch.randn(batch, channels, bands, frames).double()
    x = (x if mask is None else x * mask).requires_grad_()
    constant = torch.randn(batch, constants).double().requires_grad_()
    found, expected = (form(conv, x, constant, mask) for form in (conv_with_constant, conv_with_constant_reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # float64, sums of at most 63 terms
    upstream = torch.randn_like(found)
    leaves = [x, constant, *conv.parameters()]
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)  # float64, sums over batch, bands and frames


@pytest.mark.parametrize("batch", [1, 2])
def test_network_never_makes_the_plane_of_the_condition(batch):
    decoder, seen = small("d-only"), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else [out]
            seen.update(tuple(each.shape) for each in made if isinstance(each, torch.Tensor))
            return out

    data = inputs("d-only", [8] * batch, [4] * batch)
    with Watch():
        score(decoder, data)
    assert (batch, 2, 16, 8) in seen  # what is stacked: the average voice and x
    assert not [shape for shape in seen if shape[:2] == (batch, 2 + SMALL["g_dim"]) and len(shape) == 4]


@pytest.mark.parametrize("masked", [False, True])
def test_linear_attention_is_attention_with_all_pairs(masked):
    torch.manual_seed(0)
    layer = LinearAttention(6, heads=2, head_dim=3).double()
    x = torch.randn(2, 6, 4, 5).double()
    mask = lengths_mask([5, 2]).double()[:, :, None] if masked else None
    q, k, v = layer.to_qkv(x).flatten(2).unflatten(1, (3, 2, 3)).unbind(1)
    places = None if mask is None else mask.expand(2, 1, 4, 5).flatten(2)[:, :, None]
    plain = linear_attention_reference(q, k, v, places).flatten(1, 2).unflatten(2, (4, 5))
    torch.testing.assert_close(layer(x, mask), layer.to_out(plain), rtol=0, atol=1e-12)  # float64


def test_attention_has_no_effect_at_first_but_learns():
    layer = Rezero(LinearAttention(8))
    x = torch.randn(1, 8, 4, 6)
    assert torch.equal(layer(x), x)
    layer(x).square().sum().backward()
    assert layer.gate.grad.abs().item() > 0


def test_in_place_steps_leave_the_gradient_whole():
    """Mish works in place where nothing records; the gradient in x of a block must be that of finite differences."""
    torch.manual_seed(0)
    block = Block(2, 8).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    with torch.no_grad():
        quiet = block(x)
    torch.testing.assert_close(quiet, block(x).detach(), rtol=0, atol=0)


# Padding


@pytest.mark.parametrize("condition", ["d-only", "wodyn", "whole"])
def test_batch_is_its_items_one_by_one(condition):
    lengths, reference_lengths = [23, 9, 1, 16], [5, 31, 12, 1]
    data = inputs(condition, lengths, reference_lengths)
    decoder = small(condition)
    together = score(decoder, data)
    for item, (length, reference_length) in enumerate(zip(lengths, reference_lengths, strict=True)):
        alone = {key: value[item : item + 1] for key, value in data.items()}
        for key in ("x", "mask", "xbar"):
            alone[key] = alone[key][..., :length]
        for key in ("reference", "reference_mask"):
            alone[key] = alone[key][..., :reference_length]
        expected = score(decoder, alone)[0]
        torch.testing.assert_close(together[item, :, :length], expected, rtol=0, atol=1e-4)  # float32, deep
        assert expected.abs().max() > 0.1
        assert not together[item, :, length:].any()


def test_compat_padding_depends_on_the_padding():
    data = inputs("wodyn", [12, 12], [8, 8])
    longer = {**data, **{key: nn.functional.pad(data[key], (0, 16)) for key in ("x", "mask", "xbar")}}
    for compat in (False, True):
        decoder = small(compat_padding=compat)
        short, padded = score(decoder, data), score(decoder, longer)[..., :12]
        change = (short - padded).norm() / short.norm()
        assert (change > 0.05) if compat else (change < 1e-5)


def test_what_stands_in_the_padding_does_not_matter():
    data = inputs("wodyn", [11, 6], [4, 9])
    decoder = small()
    expected = score(decoder, data)
    for key, mask in (("x", "mask"), ("xbar", "mask"), ("reference", "reference_mask")):
        data[key] = torch.where(data[mask] == 1, data[key], torch.tensor(50.0))
    torch.testing.assert_close(score(decoder, data), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
def test_any_number_of_frames(frames):
    decoder = small()
    data = inputs("wodyn", [frames], [3])
    found = score(decoder, data)
    assert found.shape == (1, 16, frames)
    padded = {**data, **{key: nn.functional.pad(data[key], (0, 8 - frames)) for key in ("x", "mask", "xbar")}}
    torch.testing.assert_close(score(decoder, padded)[..., :frames], found, rtol=0, atol=1e-4)
    torch.testing.assert_close(score(decoder, {**data, "mask": None}), found, rtol=0, atol=0)  # no mask: all is speech


def test_mask_may_be_bool_or_whole_numbers():
    decoder, data = small(), inputs("wodyn", [8, 5], [4, 4])
    expected = score(decoder, data)
    for dtype in (torch.bool, torch.int64):
        torch.testing.assert_close(score(decoder, {**data, "mask": data["mask"].to(dtype)}), expected, rtol=0, atol=0)


# The speaker


def test_condition_sees_what_it_should():
    for condition, sees in (("d-only", False), ("wodyn", True), ("whole", True)):
        decoder, data = small(condition), inputs(condition, [4], [6])

        def give(decoder=decoder, data=data, **change):
            return decoder.condition(*[{**data, **change}[name] for name in CONDITION])

        with torch.no_grad():
            g = give()
            assert not torch.allclose(give(voice=-data["voice"]), g)
            assert not torch.allclose(give(t=data["t"] + 0.3), g)
            assert torch.allclose(give(reference=-data["reference"]), g) is not sees
    assert decoder.needs_reference == "trajectory"
    assert small("wodyn").needs_reference == "point" and small("d-only").needs_reference == "none"
    with torch.no_grad():  # the points of the trajectory are told apart
        assert not torch.allclose(give(reference=data["reference"].flip(1)), g)


def test_time_network_is_shared_counted_once_and_copied_together():
    decoder = small()
    assert not [name for name in decoder.state_dict() if name.startswith("speaker.time_mlp")]
    twin = copy.deepcopy(decoder)
    data = inputs("wodyn", [4], [6])
    expected = score(decoder, data)
    nn.init.zeros_(twin.unet.time_mlp[2].weight)
    nn.init.zeros_(twin.unet.time_mlp[2].bias)
    torch.testing.assert_close(score(decoder, data), expected, rtol=0, atol=0)
    blank = Decoder(decoder.config)
    blank.load_state_dict(twin.state_dict())
    with torch.no_grad():
        found = [each.condition(*[data[name] for name in CONDITION]) for each in (twin, blank)]
    # The copy's condition uses the copy's network on time.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_speaker_condition_stands_alone():
    decoder, data = small(), inputs("wodyn", [4], [6])
    alone = SpeakerCondition(decoder.config)
    time = {f"time_mlp.{name}": value for name, value in decoder.unet.time_mlp.state_dict().items()}
    alone.load_state_dict({**decoder.speaker.state_dict(), **time})
    arguments = [data[name] for name in CONDITION]
    torch.testing.assert_close(alone(*arguments), decoder.condition(*arguments), rtol=0, atol=0)


def test_every_parameter_learns():
    decoder = small("wodyn").train()
    data = inputs("wodyn", [7, 12], [5, 9])
    g = decoder.condition(data["voice"], data["t"], data["reference"], data["reference_mask"])
    decoder(data["x"], data["mask"], data["xbar"], g, data["t"]).square().sum().backward()
    idle = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    # A convolution's bias in front of an instance norm is subtracted again; rounding may leave it exactly zero.
    assert [name for name in idle if not re.fullmatch(r"speaker\.reference\.blocks\.\d\.conv\.bias", name)] == []


def test_half_precision_follows_float32():
    decoder, data = small(), inputs("wodyn", [8, 5], [4, 6])
    expected = score(decoder, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = score(decoder, data)
    assert (found.float() - expected).norm() / expected.norm() < 0.05  # bfloat16 has 8 bits: 0.4 % a rounding
    wide = score(decoder.double(), {name: value.double() for name, value in data.items()})
    torch.testing.assert_close(wide.float(), expected, rtol=0, atol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "speaker"}, "condition is 'speaker'; allowed are d-only, wodyn, whole"),
        ({"num_mels": 42}, "num_mels is 42, which 3 levels cannot halve evenly; give a multiple of 4"),
        ({"dim": 20}, "dim is 20; give an even multiple of groups = 8"),
        ({"g_dim": 6}, "g_dim is 6; give a multiple of 4"),
        ({"heads": 0}, "heads is 0; give at least 1"),
        ({"dim_mults": ()}, "dim_mults is (); give at least one whole number"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DecoderConfig(**change)


def test_settings_from_json_are_the_settings():
    assert DecoderConfig(dim_mults=[1, 2, 4]) == DecoderConfig.paper()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 15, 8)}, "x has shape (2, 15, 8); give (B, 16, T)"),
        ({"x": torch.zeros(16, 8)}, "x has shape (16, 8); give (B, 16, T)"),
        ({"xbar": torch.zeros(2, 16, 7)}, "xbar has shape (2, 16, 7); give that of x, (2, 16, 8)"),
        ({"g": torch.zeros(2, 9)}, "give (2, 8), (2,)"),
        ({"t": torch.zeros(2, 1)}, "give (2, 8), (2,)"),
        ({"mask": torch.ones(2, 8)}, "mask has shape (2, 8); give (B, 1, T) = (2, 1, 8)"),
        ({"mask": torch.zeros(2, 1, 8)}, "item 0 of the batch is padding only"),
        ({"mask": torch.full((2, 1, 8), 0.5)}, "mask holds 0.5; give 1 for a frame and 0 for padding"),
    ],
)
def test_network_refuses(change, message):
    network = ScoreUNet(DecoderConfig(**SMALL))
    good = {
        "x": torch.zeros(2, 16, 8),
        "mask": torch.ones(2, 1, 8),
        "xbar": torch.zeros(2, 16, 8),
        "g": torch.zeros(2, 8),
        "t": torch.zeros(2),
    }
    network(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        network(**{**good, **change})


@pytest.mark.parametrize(
    ("condition", "change", "message"),
    [
        ("wodyn", {"voice": torch.zeros(2, 256)}, "voice has shape (2, 256); give (B, 12)"),
        ("wodyn", {"t": torch.zeros(1)}, "t has shape (1,); give (2,)"),
        ("wodyn", {"reference": None}, "the condition 'wodyn' needs a reference (B, 16, R)"),
        ("wodyn", {"reference": torch.zeros(2, 15, 16, 6)}, "reference has shape (2, 15, 16, 6); give (B, 16, R)"),
        ("whole", {"reference": torch.zeros(2, 16, 6)}, "reference has shape (2, 16, 6); give (B, 15, 16, R)"),
        ("wodyn", {"reference_mask": torch.zeros(2, 1, 6)}, "item 0 of the batch is padding only"),
    ],
)
def test_condition_refuses(condition, change, message):
    shape = (2, 15, 16, 6) if condition == "whole" else (2, 16, 6)
    good = {
        "voice": torch.zeros(2, 12),
        "t": torch.zeros(2),
        "reference": torch.zeros(shape),
        "reference_mask": torch.ones(2, 1, 6),
    }
    decoder = small(condition)
    decoder.condition(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        decoder.condition(**{**good, **change})


def test_folding_refuses_a_condition_of_another_width():
    with pytest.raises(ValueError, match=re.escape("constant has shape (1, 4); give (1, 3): the convolution has 5")):
        conv_with_constant(nn.Conv2d(5, 7, 3, padding=1), torch.zeros(1, 2, 4, 4), torch.zeros(1, 4))


def test_embedding_refuses_an_odd_width():
    with pytest.raises(ValueError, match="dim is 5; give an even number of at least 4"):
        sinusoidal_embedding(torch.zeros(1), 5)
