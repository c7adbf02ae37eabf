"""The average-voice encoder: against loops, against the official code's numbers, and a batch against its items."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc import encoder as encoder_module
from oral4.diffvc.encoder import (
    AverageVoiceEncoder,
    ConvReluNorm,
    EncoderConfig,
    MelEncoder,
    PostNet,
    channel_layer_norm,
    masked_mse,
    relative_attention,
    relative_attention_reference,
)

GOLDEN = np.load(Path(__file__).parents[1] / "goldens/diffvc/encoder.npz")
OFFICIAL = EncoderConfig(num_mels=16, channels=32, filters=64, num_heads=2, num_layers=2, postnet_dim=16)
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}  # float32 through two layers and two 7 x 7 convolutions
SMALL = EncoderConfig(num_mels=8, channels=16, filters=24, num_heads=2, num_layers=2, postnet_dim=8)


def golden(name):
    return torch.from_numpy(GOLDEN[name])


def official_encoder():
    model = AverageVoiceEncoder(OFFICIAL).eval()
    state = {k.removeprefix("w."): golden(k).float() for k in GOLDEN.files if k.startswith("w.")}
    model.load_state_dict(state, strict=True)  # the names are the official ones
    return model


def lively(config, seed=0, dtype=torch.float32):
    """A model in which no parameter is zero or one, so that every layer has a say."""
    generator = torch.Generator().manual_seed(seed)
    model = AverageVoiceEncoder(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def mask_of(lengths, total, dtype=torch.float32):
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).to(dtype)[:, None]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_in_loops(q, k, v, rel_k, rel_v, mask=None):
    """One query at a time, one key at a time, in numpy."""
    q, k, v, rel_k, rel_v = (x.detach().numpy() for x in (q, k, v, rel_k, rel_v))
    window, out = len(rel_k) // 2, np.zeros_like(v)
    for b, h, i in np.ndindex(q.shape[:3]):
        keys = [j for j in range(q.shape[2]) if mask is None or mask[b, 0, j]]
        near = {j: j - i + window for j in keys if abs(j - i) <= window}
        scores = np.array([q[b, h, i] @ (k[b, h, j] + (rel_k[near[j]] if j in near else 0)) for j in keys])
        scores = np.exp(scores / np.sqrt(q.shape[-1]) - scores.max() / np.sqrt(q.shape[-1]))
        for weight, j in zip(scores / scores.sum(), keys, strict=True):
            out[b, h, i] += weight * (v[b, h, j] + (rel_v[near[j]] if j in near else 0))
    return torch.from_numpy(out)


def attention_inputs(length, window, heads=2, width=3, dtype=torch.float64, seed=0):
    tensors = [draw(2, heads, length, width, seed=seed + i) for i in range(3)]
    tensors += [draw(2 * window + 1, width, seed=seed + 3), draw(2 * window + 1, width, seed=seed + 4)]
    return [x.to(dtype).requires_grad_() for x in tensors]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 11), st.integers(1, 3), st.integers(0, 999), st.booleans())
def test_attention_equals_loops(length, window, heads, seed, padded):
    inputs = attention_inputs(length, window, heads, seed=seed)
    mask = mask_of([length, (length + 1) // 2], length, torch.float64) if padded else None
    expected = attention_in_loops(*inputs, mask)
    for function in (relative_attention, relative_attention_reference):
        found, weights = function(*inputs, mask)
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-14)
        if padded:
            assert not weights[1, ..., (length + 1) // 2 :].any()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("length", "window"), [(1, 4), (2, 4), (3, 4), (5, 4), (40, 4), (40, 0), (9, 12)])
def test_fast_attention_equals_the_reference_with_gradients(length, window, dtype, atol):
    inputs = attention_inputs(length, window, width=8, dtype=dtype)
    mask = mask_of([length, (length + 1) // 2], length, dtype)
    upstream = draw(2, 2, length, 8, seed=9).to(dtype)
    results = [function(*inputs, mask) for function in (relative_attention, relative_attention_reference)]
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(out, inputs, upstream) for out, _ in results]
    for fast, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=10 * atol, atol=10 * atol)  # sums over 2 x 2 x 40 queries


@pytest.mark.parametrize(("length", "window"), [(1, 1), (4, 1), (5, 6)])
def test_fast_attention_passes_a_numerical_gradient_check(length, window):
    inputs = attention_inputs(length, window, heads=1, width=2)
    mask = mask_of([length, 1], length, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: relative_attention(*x, mask)[0], inputs)


def test_distant_keys_have_no_position():
    """With equal content, only the keys inside the window differ from each other."""
    q = k = v = torch.ones(1, 1, 11, 4, dtype=torch.float64)
    rel = draw(5, 4)
    weights = relative_attention(q, k, v, rel, torch.zeros_like(rel))[1][0, 0]
    far = weights[5, [0, 1, 2, 8, 9, 10]]
    torch.testing.assert_close(far, far[:1].expand(6), rtol=0, atol=1e-15)
    assert weights[5, 3:8].unique().numel() == 5
    expected = (weights[5, 3:8] / far[0]).log() * 2  # scores relative to a far key, times sqrt(4)
    torch.testing.assert_close(expected, rel.sum(1), rtol=0, atol=1e-12)


def test_dropout_of_the_weights_scales_what_is_kept():
    inputs = attention_inputs(50, 4)
    whole, (torch_state) = relative_attention(*inputs)[1], torch.get_rng_state()
    try:
        torch.manual_seed(0)
        dropped = relative_attention(*inputs, dropout_p=0.3)[1]
    finally:
        torch.set_rng_state(torch_state)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.7, rtol=1e-12, atol=0)
    assert abs(float(kept.double().mean()) - 0.7) < 0.02  # 10,000 weights: four standard errors


def test_attention_refuses_an_even_number_of_positions():
    x = torch.zeros(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"2 w \+ 1 rows"):
        relative_attention(x, x, x, torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"2 w \+ 1 rows"):
        relative_attention(x, x, x, torch.zeros(3, 2), torch.zeros(5, 2))


# -- the official code ------------------------------------------------------------------------------------------------


def test_parity_of_the_transformer():
    model, x, mask = official_encoder(), golden("x"), golden("mask")
    with torch.no_grad():
        found = model.encoder(x, mask)
    frames = mask.bool().expand_as(found)
    torch.testing.assert_close(found[frames], golden("melenc")[frames], **TOLERANCE)
    assert not found[~frames].any() and golden("melenc")[~frames].any()  # zeros here, a constant there


def test_parity_of_the_attention_weights():
    model, x, mask = official_encoder().encoder, golden("x"), golden("mask")
    with torch.no_grad():
        hidden = model.prenet(model.init_proj(x * mask) * mask, mask)
        found = model.encoder.attn_layers[0].attend(hidden, mask)[1]
    queries = mask[:, :, :, None].bool().expand_as(found)  # what a padded query looks at has no meaning
    torch.testing.assert_close(found[queries], golden("attn0")[queries], **TOLERANCE)


def test_parity_of_the_whole_encoder_without_padding():
    model = official_encoder()
    with torch.no_grad():
        torch.testing.assert_close(model(golden("x")[:1]), golden("y")[:1], **TOLERANCE)
        torch.testing.assert_close(model(golden("x"), golden("mask"))[:1], golden("y")[:1], **TOLERANCE)
        torch.testing.assert_close(model(golden("x_short")), golden("y_short"), **TOLERANCE)


def test_the_norm_is_all_that_differs_from_the_official_code(monkeypatch):
    """With its norm over the padding our encoder gives the official padded item; with ours it differs by far more."""
    model, x, mask = official_encoder(), golden("x"), golden("mask")
    frames = mask[1].bool().expand(16, -1)
    with torch.no_grad():
        ours = model(x, mask)[1]
        official_norm = lambda x, mask, groups, *rest: F.group_norm(x, groups, *rest) * mask
        monkeypatch.setattr(encoder_module, "masked_group_norm", official_norm)
        theirs = model(x, mask)[1]
    torch.testing.assert_close(theirs[frames], golden("y")[1][frames], **TOLERANCE)
    assert float((ours - theirs)[frames].abs().max()) > 0.1


def test_parity_of_the_loss():
    torch.testing.assert_close(masked_mse(golden("y"), golden("target"), golden("mask")), golden("loss"), **TOLERANCE)


def test_sizes_of_the_paper():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        model = AverageVoiceEncoder(EncoderConfig.paper())
    assert (count(model), count(model.encoder), count(model.postnet)) == (8_464_529, 6_841_232, 1_623_297)
    assert AverageVoiceEncoder(EncoderConfig.mini()).postnet is None


# -- a batch is its items ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, EncoderConfig(num_mels=8, channels=16, filters=24, postnet_dim=0)])
def test_a_batch_gives_what_its_items_give(config):
    model, lengths = lively(config), [40, 23, 3, 2, 1]
    mel = draw(5, 8, 40, dtype=torch.float32) * 2 - 5
    mask = mask_of(lengths, 40)
    with torch.no_grad():
        together = model(mel, mask)
        for item, length in enumerate(lengths):
            alone = model(mel[item : item + 1, :, :length])
            torch.testing.assert_close(together[item : item + 1, :, :length], alone, rtol=0, atol=1e-5)
            assert not together[item, :, length:].any()
    assert float(together.std()) > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("noise", [1e4, float("nan"), float("-inf")])
def test_what_stands_in_the_padding_does_not_matter(noise):
    model, mel, mask = lively(SMALL), draw(2, 8, 20, dtype=torch.float32), mask_of([20, 9], 20)
    with torch.no_grad():
        assert torch.equal(model(mel.masked_fill(mask == 0, noise), mask), model(mel, mask))


def test_gradients_of_a_batch_are_those_of_its_items():
    model = lively(SMALL, dtype=torch.float64)
    mel, target, mask = draw(2, 8, 12), draw(2, 8, 12, seed=1), mask_of([12, 5], 12, torch.float64)
    together = torch.autograd.grad(masked_mse(model(mel, mask), target, mask), list(model.parameters()))
    losses = [
        masked_mse(model(mel[i : i + 1, :, :n]), target[i : i + 1, :, :n], None) * n for i, n in enumerate((12, 5))
    ]
    apart = torch.autograd.grad((losses[0] + losses[1]) / 17, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("postnet_dim", [0, 8])
def test_very_short_mels_are_finite_with_gradients(length, postnet_dim):
    model = lively(EncoderConfig(num_mels=8, channels=16, filters=24, num_layers=1, postnet_dim=postnet_dim)).train()
    out = model(draw(1, 8, length, dtype=torch.float32))
    out.square().sum().backward()
    assert out.shape == (1, 8, length) and out.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# -- layers -----------------------------------------------------------------------------------------------------------


def test_channel_norm_is_its_formula():
    x, gamma, beta = draw(2, 6, 5) * 0.05, draw(6, seed=1), draw(6, seed=2)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-4).sqrt() * gamma[:, None] + beta[:, None]
    torch.testing.assert_close(channel_layer_norm(x, gamma, beta), expected, rtol=0, atol=1e-12)
    usual = channel_layer_norm(x, gamma, beta, 1e-5)
    assert float((usual - expected).abs().max()) > 1e-3  # the size of eps can be seen here


def test_a_new_prenet_changes_nothing():
    prenet, x = ConvReluNorm(8), draw(2, 8, 7, dtype=torch.float32)
    assert torch.equal(prenet.train()(x, None), x) and torch.equal(prenet.eval()(x, None), x)


def test_dropout_is_on_in_training_only():
    """A frozen encoder that stays in training mode gives a decoder a noisy average voice."""
    model, mel = lively(SMALL), draw(1, 8, 20, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model.eval()(mel), model.eval()(mel))
        assert float((model.train()(mel) - model.train()(mel)).std()) > 0.01
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model(mel)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())  # no running statistics


def test_each_rate_of_dropout_reaches_its_layers():
    quiet = {"dropout": 0.0, "prenet_dropout": 0.0}
    mel = draw(1, 8, 20, dtype=torch.float32)
    for name in quiet:
        rates = quiet | {name: 0.4}
        model = lively(EncoderConfig(num_mels=8, channels=16, filters=24, num_layers=1, postnet_dim=0, **rates)).train()
        assert not torch.equal(model(mel), model(mel))
    model = lively(EncoderConfig(num_mels=8, channels=16, filters=24, num_layers=1, postnet_dim=0, **quiet)).train()
    assert torch.equal(model(mel), model.eval()(mel))


def test_the_postnet_result_is_not_added_to_its_input():
    postnet = PostNet(8)
    with torch.no_grad():
        for parameter in postnet.final_conv.parameters():
            parameter.zero_()
    assert not postnet(torch.ones(1, 4, 5), None).any()


def test_every_parameter_learns():
    model = lively(SMALL).train()
    mel = draw(2, 8, 12, dtype=torch.float32)
    model(mel, mask_of([12, 6], 12)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("conv_k.bias"):  # adds the same to all scores of a query
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_it_learns_to_remove_an_offset():
    """Speakers are offsets here; the sound is a curve that all share. The error must fall far below the offset's."""
    torch.manual_seed(0)
    config = EncoderConfig(
        num_mels=6, channels=16, filters=32, num_layers=1, postnet_dim=0, dropout=0.0, prenet_dropout=0.0
    )
    model = AverageVoiceEncoder(config)
    target = draw(8, 6, 24, dtype=torch.float32, seed=1)
    mel = target + draw(8, 6, 1, dtype=torch.float32, seed=2)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    start = float(masked_mse(mel, target, None))
    for _ in range(100):
        optimiser.zero_grad()
        loss = masked_mse(model(mel), target, None)
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * start


def test_it_follows_the_type_of_its_input():
    model = lively(SMALL, dtype=torch.float64)
    mel, mask = draw(2, 8, 10), mask_of([10, 4], 10, torch.bool)
    exact = model(mel, mask)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(model.float()(mel.float(), mask), exact.float(), rtol=0, atol=1e-4)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_masked_mse_counts_frames():
    predicted, target, mask = draw(2, 3, 7), draw(2, 3, 7, seed=1), mask_of([7, 2], 7, torch.float64)
    squares = (predicted - target).square()
    expected = torch.cat([squares[0], squares[1, :, :2]], dim=1).mean()
    torch.testing.assert_close(masked_mse(predicted, target, mask), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(masked_mse(predicted, target, None), squares.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        masked_mse(predicted, target, torch.ones(2, 1, 7).double()), squares.mean(), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("target", "mask", "message"),
    [
        (torch.zeros(1, 2, 4), None, "predicted is (1, 2, 3) and target (1, 2, 4)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), "the mask has no 1"),
        (torch.zeros(1, 2, 3), torch.ones(1, 3), "mask has shape (1, 3); give (B, 1, T) = (1, 1, 3)"),
    ],
)
def test_masked_mse_refuses(target, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        masked_mse(torch.zeros(1, 2, 3), target, mask)


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mel", "mask", "message"),
    [
        (torch.zeros(8, 5), None, "mel has shape (8, 5); give (B, 8, T)"),
        (torch.zeros(1, 9, 5), None, "mel has shape (1, 9, 5); give (B, 8, T)"),
        (torch.zeros(1, 8, 0), None, "at least one item of at least one frame"),
        (torch.zeros(2, 8, 5), torch.ones(2, 5), "mask has shape (2, 5); give (B, 1, T) = (2, 1, 5)"),
        (torch.zeros(2, 8, 5), mask_of([5, 0], 5), "item 1 of the batch is padding only"),
        (torch.zeros(1, 8, 2), torch.tensor([[[1, 0.5]]]), "mask holds 0.5"),
    ],
)
def test_the_encoder_refuses(mel, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AverageVoiceEncoder(SMALL)(mel, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_mels": 0}, "num_mels = 0; give at least 1"),
        ({"num_layers": 0}, "num_layers = 0"),
        ({"num_heads": 5}, "channels = 192 cannot be cut into num_heads = 5"),
        ({"kernel": 4}, "kernel = 4; give an odd number"),
        ({"dropout": 1.0}, "dropout = 1.0; give a probability in [0, 1)"),
        ({"prenet_dropout": -0.1}, "prenet_dropout = -0.1"),
        ({"window": -1}, "window = -1"),
        ({"postnet_dim": 12}, "postnet_dim = 12; give a multiple of its 8 groups"),
        ({"postnet_dim": -8}, "postnet_dim = -8"),
    ],
)
def test_the_config_refuses(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EncoderConfig(**change)


def test_a_wrong_checkpoint_is_refused():
    state = AverageVoiceEncoder(SMALL).state_dict()
    del state["encoder.prenet.proj.bias"]
    with pytest.raises(RuntimeError, match=r"encoder\.prenet\.proj\.bias"):
        AverageVoiceEncoder(SMALL).load_state_dict(state)


def test_the_transformer_alone_needs_no_postnet():
    model = MelEncoder(SMALL).eval()
    assert model(torch.zeros(1, 8, 4), None).shape == (1, 8, 4)
