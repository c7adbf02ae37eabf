"""The small networks: what padding must not change, limits of the adapted prior, the score where nothing is said."""

import math
from dataclasses import replace

import pytest
import torch

from oral4.diffusion.sde import VP
from oral4.diffvc.align import PHONES
from oral4.diffvc.compact import (
    CompactConfig,
    CompactDecoder,
    ContentEncoder,
    ConvBlock,
    Voice,
    adapted_table,
    time_features,
)
from oral4.diffvc.model import DiffVC

SMALL = CompactConfig(
    num_mels=12,
    encoder_channels=16,
    encoder_blocks=3,
    voice_channels=16,
    voice_dim=8,
    score_channels=16,
    score_blocks=3,
    g_dim=8,
)


def excite(module):
    """Give every parameter a random value: blocks start as the identity, which would hide what they do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    lengths = (23, 9, 1)
    mel = torch.full((3, 12, 23), 50.0)  # what stands in the padding would be heard if it could
    mask = torch.zeros(3, 1, 23)
    for row, length in enumerate(lengths):
        mel[row, :, :length] = torch.randn(12, length, generator=generator) - 5
        mask[row, :, :length] = 1
    return mel, mask, lengths


def test_content_of_a_batch_is_that_of_its_items(batch):
    mel, mask, lengths = batch
    content = excite(ContentEncoder(SMALL, torch.randn(len(PHONES), 12)))
    with torch.no_grad():
        together = content(mel, mask)
        for row, length in enumerate(lengths):
            alone = content(mel[row : row + 1, :, :length], torch.ones(1, 1, length))
            # float32 rounding: convolutions of two lengths add in another order
            assert torch.allclose(together[row, :, :length], alone[0], atol=1e-5)
            assert not together[row, :, length:].any()


def test_voice_of_a_batch_is_that_of_its_items(batch):
    mel, mask, lengths = batch
    voice = excite(Voice(SMALL))
    with torch.no_grad():
        together = voice(mel, mask)
        assert torch.allclose(together.norm(dim=1), torch.ones(3), atol=1e-6)
        for row, length in enumerate(lengths):
            alone = voice(mel[row : row + 1, :, :length], torch.ones(1, 1, length))
            assert torch.allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("phones", [False, True])
def test_score_of_a_batch_is_that_of_its_items(batch, phones):
    mel, mask, lengths = batch
    decoder = excite(CompactDecoder(replace(SMALL, phones=phones)))
    t, voice = torch.tensor([0.9, 0.4, 0.05]), torch.randn(3, 8)
    content = torch.randn(3, len(PHONES), mel.shape[2]).softmax(1) if phones else None  # also outside the mask
    with torch.no_grad():
        g = decoder.condition(voice, t, mel, mask)
        together = decoder(mel, mask, mel - 1, g, t, content)
        for row, length in enumerate(lengths):
            own, ones = mel[row : row + 1, :, :length], torch.ones(1, 1, length)
            alone_g = decoder.condition(voice[row : row + 1], t[row : row + 1], own, ones)
            assert torch.allclose(g[row], alone_g[0], atol=1e-5)
            part = None if content is None else content[row : row + 1, :, :length]
            alone = decoder(own, ones, own - 1, alone_g, t[row : row + 1], part)
            scale = alone.abs().max()
            assert torch.allclose(together[row, :, :length] / scale, alone[0] / scale, atol=1e-5)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("t", [1e-5, 0.1, 0.5, 1.0])
def test_a_silent_network_gives_the_score_of_a_normal_law(spread, t):
    config = CompactConfig(num_mels=12, score_channels=16, score_blocks=1, g_dim=8, voice_dim=8, spread=spread)
    decoder = CompactDecoder(config).double()
    torch.nn.init.zeros_(decoder.leave.weight)
    torch.nn.init.zeros_(decoder.leave.bias)
    x, xbar = torch.randn(2, 1, 12, 5, dtype=torch.float64)
    moment = torch.tensor([t], dtype=torch.float64)
    found = decoder(x, torch.ones(1, 1, 5).double(), xbar, torch.zeros(1, 8).double(), moment)
    exact = -(x - xbar) / (VP().a(t) ** 2 * spread**2 + VP().v(t))
    # v is 5e-7 at the smallest time: the score divides rounding of 1e-16 by it
    assert torch.allclose(found, exact, rtol=1e-8, atol=1e-8)


def test_a_score_that_sees_phones_needs_them_and_listens():
    decoder = excite(CompactDecoder(replace(SMALL, phones=True)))
    mel, mask, g, t = torch.randn(1, 12, 5), torch.ones(1, 1, 5), torch.zeros(1, 8), torch.tensor([0.5])
    with pytest.raises(ValueError, match="needs content, the phones' probabilities"):
        decoder(mel, mask, mel, g, t)
    content = torch.eye(len(PHONES))[:5].T[None]
    with torch.no_grad():
        difference = decoder(mel, mask, mel, g, t, content) - decoder(mel, mask, mel, g, t, content.flip(2))
    assert float(difference.abs().max()) > 1e-3


def test_the_answer_that_the_loss_wants_gives_the_true_score_on_average():
    """Where the loss is zero, the score is that of the conditional law, -z / sqrt(v)."""
    decoder = CompactDecoder(SMALL)
    t = torch.tensor([0.2, 0.7])
    clean, noise = torch.randn(2, 2, 12, 5)
    a, v, keep, change, _ = decoder.scales(t)
    noisy = a * clean + v.sqrt() * noise
    answer = (clean - keep * noisy) / change
    estimate = keep * noisy + change * answer
    assert torch.allclose((a * estimate - noisy) / v, -noise / v.sqrt(), atol=1e-4)


def test_the_loss_is_that_of_the_paper_times_the_stated_weight():
    decoder = excite(CompactDecoder(SMALL))
    mel, xbar, noise = torch.randn(3, 2, 12, 9)
    mask, g, voice = torch.ones(2, 1, 9), torch.randn(2, 8), torch.randn(2, 8)
    for moment in (0.15, 0.6):
        t = torch.full((2,), moment)
        with torch.no_grad():
            ours = decoder.residual_loss(mel, mask, xbar, g, t, noise)
            a, v = VP().a(moment), VP().v(moment)
            x = xbar + a * (mel - xbar) + math.sqrt(v) * noise
            theirs = (math.sqrt(v) * decoder(x, mask, xbar, g, t) + noise).square().mean()
        weight = (a**2 * SMALL.spread**2 + v) / (a**2 * SMALL.spread**2)
        assert float(ours) == pytest.approx(float(theirs) * weight, rel=1e-3)  # float32, near-equal numbers subtracted
    assert voice.shape == (2, 8)


def test_adapted_table_against_its_formula_in_loops():
    generator = torch.Generator().manual_seed(2)
    table, mel = torch.randn(4, 3, generator=generator), torch.randn(1, 3, 10, generator=generator)
    phones = torch.rand(1, 4, 10, generator=generator).softmax(1)
    mask = torch.ones(1, 1, 10)
    mask[..., 7:] = 0
    found = adapted_table(table, mel, mask, phones, phone_frames=3.0, bias_frames=5.0)[0]
    for band in range(3):
        bias = 0.0
        for frame in range(7):
            average = sum(float(phones[0, p, frame] * table[p, band]) for p in range(4))
            bias += float(mel[0, band, frame]) - average
        bias /= 7 + 5.0
        for phone in range(4):
            weight = sum(float(phones[0, phone, frame]) for frame in range(7))
            seen = sum(float(phones[0, phone, frame] * mel[0, band, frame]) for frame in range(7))
            expected = (seen + 3.0 * (float(table[phone, band]) + bias)) / (weight + 3.0)
            assert float(found[phone, band]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weights", [{"phone_frames": 0.0}, {"bias_frames": -1.0}])
def test_priors_need_weight(weights):
    with pytest.raises(ValueError, match="positive numbers of frames"):
        adapted_table(torch.zeros(2, 1), torch.zeros(1, 1, 3), torch.ones(1, 1, 3), torch.ones(1, 2, 3) / 2, **weights)


def test_a_block_starts_as_the_identity_and_reaches_half_its_kernel():
    block = ConvBlock(4, kernel=7, dilation=2)
    x, mask = torch.randn(1, 4, 30), torch.ones(1, 1, 30)
    assert torch.equal(block(x, mask), x)
    excite(block)
    changed = x.clone()
    changed[..., 15] += 1
    with torch.no_grad():
        where = (block(x, mask) != block(changed, mask)).any(1).nonzero()[:, 1]
    assert (int(where.min()), int(where.max())) == (15 - 6, 15 + 6)


def test_both_conditions_go_through_the_whole_model():
    for condition, needs in (("d-only", "none"), ("wodyn", "point")):
        config = CompactConfig(
            num_mels=12, score_channels=16, score_blocks=1, g_dim=8, voice_dim=8, condition=condition
        )
        decoder = CompactDecoder(config)
        assert decoder.needs_reference == needs
        content = ContentEncoder(CompactConfig(num_mels=12, encoder_channels=8, encoder_blocks=1))
        model = DiffVC(content, decoder, preset="speech-16k")
        mel, mask = torch.randn(1, 12, 10), torch.ones(1, 1, 10)
        out = model.sample(mel, mask, torch.randn(1, 8), mel, mask, num_steps=4)
        assert out.shape == mel.shape and bool(out.isfinite().all())


def test_a_reference_is_asked_for_where_it_is_needed():
    with pytest.raises(ValueError, match="needs the diffused reference"):
        CompactDecoder(SMALL).condition(torch.zeros(1, 8), torch.ones(1), None, None)


@pytest.mark.parametrize("wrong", [{"condition": "whole"}, {"spread": 0.0}, {"spread": math.nan}])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match=r"choose 'd-only' or 'wodyn'|a positive number"):
        CompactConfig(**wrong)


def test_time_features_tell_close_times_apart():
    features = time_features(torch.linspace(0, 1, 1001))
    assert features.shape == (1001, 64)
    assert float(torch.cdist(features, features).add(10 * torch.eye(1001)).min()) > 0.05


def test_what_ships_is_small():
    parts = ContentEncoder(CompactConfig()), Voice(CompactConfig()), CompactDecoder(CompactConfig())
    numbers = sum(value.numel() for part in parts for value in part.state_dict().values())
    assert 2 * numbers < 5_000_000  # bytes in half precision
