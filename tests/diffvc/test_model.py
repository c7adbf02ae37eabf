"""The whole model: the official code's conversions, its loss, conditions and sampling; what is refused, and how."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oral4.diffusion.sde import VE, VP
from oral4.diffvc import encoder as encoder_module
from oral4.diffvc import model as model_module
from oral4.diffvc.decoder import Decoder, DecoderConfig
from oral4.diffvc.encoder import AverageVoiceEncoder, EncoderConfig
from oral4.diffvc.model import DiffVC, build, diffused_reference, load_official_state_dict
from oral4.errors import CheckpointError
from oral4.train.averaging import evaluating

FOLDER = Path(__file__).parents[1] / "goldens/diffvc"
CONVERT = {name: torch.from_numpy(value) for name, value in np.load(FOLDER / "convert.npz").items()}


def read(name, prefix="w.", target=""):
    stored = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items() if key != "config"}
    return stored, {target + k.removeprefix(prefix): v.float() for k, v in stored.items() if k.startswith(prefix)}


def lengths_mask(lengths):
    return (torch.arange(int(max(lengths))) < torch.as_tensor(lengths)[:, None]).float()[:, None]


def tiny(condition="wodyn", seed=0, **settings):
    """A model of 16 bands whose attention and condition are at work."""
    torch.manual_seed(seed)
    encoder = AverageVoiceEncoder(
        EncoderConfig(num_mels=16, channels=16, filters=16, num_layers=1, postnet_dim=8, prenet_dropout=0.5)
    )
    decoder = Decoder(
        DecoderConfig(num_mels=16, dim=8, g_dim=8, voice_dim=12, heads=2, head_dim=4, condition=condition)
    )
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        if name.endswith(("gate", "proj.weight")):
            nn.init.normal_(parameter, std=0.3)
    return DiffVC(encoder, decoder, **settings)


def some_batch(lengths=(12, 7), reference_lengths=(5, 9)):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return {
        "mel": draw(len(lengths), 16, max(lengths)),
        "mask": lengths_mask(lengths),
        "voice": draw(len(lengths), 12),
        "reference": draw(len(lengths), 16, max(reference_lengths)),
        "reference_mask": lengths_mask(reference_lengths),
    }


class Passing(nn.Module):
    """An encoder that says what it was given."""

    def forward(self, mel, mask):
        return mel


class Recording(nn.Module):
    """A decoder for which g is the mean of what it sees of the reference, and the score is g - x."""

    def __init__(self, needs="point"):
        super().__init__()
        self.needs_reference, self.seen = needs, []
        self.weight = nn.Parameter(torch.ones(()))

    def condition(self, voice, t, reference, reference_mask):
        self.seen.append((t.clone(), reference, reference_mask))
        return voice

    def forward(self, x, mask, xbar, g, t):
        return (g.mean(dim=1)[:, None, None] - x) * mask * self.weight


# Against the official code


@pytest.fixture
def official(monkeypatch):
    """The official model of the goldens, with norms that count the padding in encoder and decoder."""

    def norm(x, mask, *rest):
        return F.group_norm(x, *rest) * (1 if mask is None else mask)

    monkeypatch.setattr(encoder_module, "masked_group_norm", norm)
    encoder = AverageVoiceEncoder(EncoderConfig(num_mels=16, channels=32, filters=64, num_layers=2, postnet_dim=16))
    model = DiffVC(encoder, Decoder(DecoderConfig(num_mels=16, dim=16, g_dim=16, compat_padding=True)))
    state = read("encoder", target="encoder.")[1]
    state |= {"decoder." + k.removeprefix("dec."): v for k, v in CONVERT.items() if k.startswith("dec.")}
    load_official_state_dict(model, state)
    return model


@pytest.mark.parametrize("steps", [1, 4, 6])
@pytest.mark.parametrize("solver", ["pf", "em", "ml"])
@pytest.mark.filterwarnings("ignore:the step from")
def test_conversion_is_the_official_one(official, solver, steps):
    noise = CONVERT[f"noise_{steps}"][..., :22].clone()
    noise[1:] *= -1  # the official step subtracts its noise
    noise[0] /= official.sde.prior_std()  # and its start has noise of variance 1
    found = official.sample(
        CONVERT["src"], lengths_mask(CONVERT["src_lengths"]), CONVERT["c"], CONVERT["ref"],
        lengths_mask(CONVERT["ref_lengths"]), num_steps=steps, solver=solver,
        noise=noise,
    )  # fmt: skip
    expected = CONVERT[f"y_{solver}_{steps}"]
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4  # the goldens' own tolerance


def test_average_voice_and_start_are_the_official_ones(official):
    mask = lengths_mask(CONVERT["src_lengths"])
    states = []
    official.sample(
        CONVERT["src"], mask, CONVERT["c"], CONVERT["ref"], lengths_mask(CONVERT["ref_lengths"]), temperature=0.0,
        num_steps=4, callback=lambda step: states.append(step.x),
    )  # fmt: skip
    torch.testing.assert_close(states[0], CONVERT["mean_x"], rtol=2e-4, atol=2e-5)  # the goldens' own tolerance


@pytest.mark.parametrize(("name", "condition", "dim"), [("score_wodyn", "wodyn", 16), ("score_donly", "d-only", 8)])
def test_loss_and_gradient_are_the_official_ones(name, condition, dim):
    stored, state = read(name)
    decoder = Decoder(DecoderConfig(num_mels=16, dim=dim, g_dim=16, condition=condition, compat_padding=True))
    load_official_state_dict(decoder, state)
    model = DiffVC(Passing(), decoder)
    batch = {"mel": "x0", "mask": "mask", "reference": "xref", "reference_mask": "mask", "voice": "c", "xbar": "mean",
             "reference_xbar": "mean_ref"}  # fmt: skip
    loss = model.loss({key: stored[theirs] for key, theirs in batch.items()}, t=stored["t"], noise=stored["z"])
    torch.testing.assert_close(loss.detach(), stored["loss"], rtol=2e-4, atol=2e-5)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in decoder.parameters()))
    assert norm == pytest.approx(float(stored["grad_norm"]), rel=1e-3)  # the goldens' own tolerance
    seen = diffused_reference(stored["x0"], stored["mean"], stored["t"], VP(), False) * stored["mask"]
    torch.testing.assert_close(seen, stored["diffused_mean"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("condition", "count"), [("wodyn", 126_259_128), ("d-only", 125_577_752)])
def test_number_of_parameters(condition, count):
    with torch.device("meta"):
        model = build("paper", condition=condition)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.encoder.parameters()) == 8_464_529
    assert model.preset == "hifigan-22k"


# Official checkpoints


def official_state(model):
    """What an official checkpoint of this model's weights would hold."""
    names = model_module._official(model)
    return {names[ours]: value.clone() for ours, value in model.state_dict().items()}


def test_checkpoint_goes_there_and_back():
    source, target = tiny(seed=1), tiny(seed=2)
    state = {key: value.half() for key, value in official_state(source).items()}
    load_official_state_dict(target, state)
    for (name, found), expected in zip(target.state_dict().items(), source.state_dict().values(), strict=True):
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, expected.half().float(), rtol=0, atol=0)


def drop(state):
    del state["decoder.estimator.final_conv.bias"]


def add(state):
    state["decoder.estimator.extra"] = torch.zeros(1)


def reshape(state):
    state["decoder.estimator.final_conv.bias"] = torch.zeros(3)


def spoil(state):
    state["encoder.encoder.init_proj.bias"][0] = math.nan


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (drop, "missing: decoder.estimator.final_conv.bias"),
        (add, "unexpected: decoder.estimator.extra"),
        (reshape, "shape: decoder.estimator.final_conv.bias has (3,), the model (1,)"),
        (spoil, "not finite: encoder.encoder.init_proj.bias"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_as_a_whole(fault, message):
    state, model = official_state(tiny(seed=1)), tiny(seed=2)
    fault(state)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_official_state_dict(model, state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_checkpoint_of_another_condition_is_named():
    with pytest.raises(CheckpointError, match='is of condition="wodyn", one without of "d-only"'):
        load_official_state_dict(tiny("d-only"), official_state(tiny("wodyn")))


def test_only_models_with_an_official_counterpart():
    with pytest.raises(TypeError, match="Recording has no official counterpart"):
        load_official_state_dict(DiffVC(Passing().eval(), Recording()).decoder, {})


def test_unknown_sizes_conditions_and_decoders():
    with pytest.raises(ValueError, match=r"size is 'huge'; choose one of paper, mini"):
        build("huge")
    with pytest.raises(ValueError, match="condition is 'all'"):
        build("mini", condition="all")
    with pytest.raises(
        ValueError, match=r'decoder.needs_reference is None; allowed are "none", "point" and "trajectory"'
    ):
        DiffVC(Passing(), nn.Identity())
    with pytest.raises(ValueError, match="preset='mp3' is unknown"):
        tiny(preset="mp3")


# The frozen encoder


def test_encoder_is_frozen_and_calm_while_the_decoder_trains():
    model, batch = tiny().train(), some_batch()
    found = [model.average_voice(batch["mel"], batch["mask"]) for _ in range(2)]
    assert torch.equal(*found)  # no dropout, although the model is in training mode
    noisy = [model.encoder(batch["mel"], batch["mask"]) for _ in range(2)]
    assert not torch.equal(*noisy)  # the encoder itself has some, and its mode is as it was
    model.loss(batch).backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_modes_come_back_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model[0].training
        raise RuntimeError
    assert [part.training for part in model.modules()] == [True, True, False]


# The loss


def test_loss_takes_cached_average_voices():
    model, batch = tiny(), some_batch()
    options = {"t": torch.tensor([0.2, 0.8]), "noise": torch.randn(2, 16, 12)}
    cached = {
        **batch,
        "xbar": model.average_voice(batch["mel"], batch["mask"]),
        "reference_xbar": model.average_voice(batch["reference"], batch["reference_mask"]),
    }
    expected = model.loss(batch, **options)
    model.encoder = Passing()  # would give another loss
    torch.testing.assert_close(model.loss(cached, **options), expected, rtol=0, atol=0)
    assert abs(float((model.loss(batch, **options) - expected).detach())) > 1e-3


@pytest.mark.parametrize("noise", [False, True])
def test_loss_is_a_function_of_the_generator(noise):
    model, batch = tiny(reference_noise=noise), some_batch()
    give = lambda seed: model.loss(batch, torch.Generator().manual_seed(seed), speaker_dropout=0.5).item()
    assert give(1) == give(1) != give(2)


def test_loss_does_not_see_the_padding():
    model, batch = tiny(), some_batch()
    options = {"t": torch.tensor([0.2, 0.8]), "noise": torch.randn(2, 16, 12)}
    expected = model.loss(batch, **options)
    for name in ("mel", "reference"):
        mask = batch["mask" if name == "mel" else "reference_mask"]
        batch[name] = torch.where(mask == 1, batch[name], torch.tensor(9.0))
    torch.testing.assert_close(model.loss(batch, **options), expected, rtol=0, atol=1e-5)


def test_loss_of_a_batch_is_the_mean_over_its_frames():
    model, batch = tiny(), some_batch((12, 7), (9, 9))
    t, noise = torch.tensor([0.2, 0.8]), torch.randn(2, 16, 12)
    total = 0.0
    for item, length in enumerate((12, 7)):
        alone = {key: value[item : item + 1] for key, value in batch.items()}
        alone["mel"], alone["mask"] = alone["mel"][..., :length], alone["mask"][..., :length]
        total += length * model.loss(alone, t=t[item : item + 1], noise=noise[item : item + 1, :, :length])
    torch.testing.assert_close(model.loss(batch, t=t, noise=noise), total / 19, rtol=0, atol=1e-5)


def test_the_true_score_has_the_least_loss():
    """For data at one point, the score of the kernel has the loss 0, and a tenth more of it a hundredth."""
    sde, batch = VP(), some_batch()

    class Kernel(Recording):
        factor = 1.0

        def forward(self, x, mask, xbar, g, t):
            a, v = sde.a(t)[:, None, None], sde.v(t)[:, None, None]
            return self.factor * (xbar + a * (batch["mel"] - xbar) - x) / v * mask

    model = DiffVC(Passing(), Kernel("none"))
    options = {"t": torch.tensor([0.3, 0.9]), "noise": torch.randn(2, 16, 12)}
    assert float(model.loss(batch, **options)) < 1e-10  # float32, squared
    model.decoder.factor = 1.1
    noise = (options["noise"] * batch["mask"]).square().sum() / (16 * 19)
    assert float(model.loss(batch, **options)) == pytest.approx(0.01 * float(noise), rel=1e-3)  # float32


def test_dropped_speakers_have_no_influence():
    model, batch = tiny(), some_batch()
    options = {"t": torch.tensor([0.2, 0.8]), "noise": torch.randn(2, 16, 12)}
    other = {**batch, "voice": -batch["voice"]}
    assert not torch.equal(model.loss(batch, **options), model.loss(other, **options))
    torch.testing.assert_close(
        model.loss(batch, speaker_dropout=1.0, **options),
        model.loss(other, speaker_dropout=1.0, **options),
        rtol=0,
        atol=0,
    )
    generator = torch.Generator().manual_seed(0)
    model = DiffVC(Passing(), Counting())
    for _ in range(300):
        model.loss(batch, generator, speaker_dropout=0.3, **options)
    assert 0.3 * 600 - 50 < model.decoder.dropped < 0.3 * 600 + 50  # 600 items, four and a half standard deviations


class Counting(Recording):
    dropped = 0

    def forward(self, x, mask, xbar, g, t):
        self.dropped += int((g == 0).all(dim=1).sum())
        return super().forward(x, mask, xbar, g, t)


@pytest.mark.parametrize("missing", ["mel", "mask", "voice", "reference", "reference_mask"])
def test_loss_names_what_the_batch_lacks(missing):
    batch = some_batch()
    del batch[missing]
    with pytest.raises(
        ValueError, match=f"the batch lacks {missing}; give mel, mask, reference, reference_mask, voice"
    ):
        tiny().loss(batch)


def test_no_reference_is_needed_for_d_only():
    batch = some_batch()
    del batch["reference"], batch["reference_mask"]
    model = tiny("d-only")
    assert math.isfinite(model.loss(batch).item())
    assert model.sample(batch["mel"], batch["mask"], batch["voice"], None, None, num_steps=4).shape == (2, 16, 12)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_loss_refuses_what_is_no_probability(value):
    with pytest.raises(ValueError, match=re.escape(f"speaker_dropout is {value}; give a probability in [0, 1]")):
        tiny().loss(some_batch(), speaker_dropout=value)


# What the decoder sees of the reference


def test_point_and_trajectory_are_the_diffused_means():
    batch, sde = some_batch(), VP()
    ybar = torch.randn(2, 16, 9)
    for needs in ("point", "trajectory"):
        model = DiffVC(Passing(), Recording(needs))
        model.conditions(batch["voice"], batch["reference"], batch["reference_mask"], [1.0, 0.25], reference_xbar=ybar)
        t, seen, _ = model.decoder.seen[0]
        assert t.tolist() == [1.0, 1.0, 0.25, 0.25]
        for item in range(4):
            y = batch["reference"][item % 2], ybar[item % 2]
            times = [float(t[item])] if needs == "point" else [(i + 0.5) / 15 for i in range(15)]
            means = (
                torch.stack([sde.a(s) * y[0] + (1 - sde.a(s)) * y[1] for s in times])
                * batch["reference_mask"][item % 2]
            )
            torch.testing.assert_close(seen[item], means[0] if needs == "point" else means, rtol=0, atol=1e-5)


def test_noisy_reference_has_the_law_of_the_process():
    y, ybar, t = torch.ones(2, 100, 400), torch.zeros(2, 100, 400), torch.tensor([0.1, 0.7])
    drawn = diffused_reference(y, ybar, t, VP(), True, torch.Generator().manual_seed(0))
    for item in range(2):
        a, v = VP().a(float(t[item])), VP().v(float(t[item]))
        assert float(drawn[item].mean()) == pytest.approx(a, abs=5 * math.sqrt(v / 40_000))  # five standard errors
        assert float(drawn[item].var()) == pytest.approx(v, rel=5 * math.sqrt(2 / 40_000))


def test_conditions_of_all_times_are_those_of_each(monkeypatch):
    model, batch = tiny(), some_batch()
    arguments = [batch[name] for name in ("voice", "reference", "reference_mask")]
    times = [1.0, 0.7, 0.31, 0.05]
    together = model.conditions(*arguments, times)
    assert together.shape == (4, 2, 8)
    for index, t in enumerate(times):
        torch.testing.assert_close(together[index], model.conditions(*arguments, [t])[0], rtol=0, atol=1e-5)
    monkeypatch.setattr(model_module, "_ELEMENTS_AT_ONCE", 1)
    torch.testing.assert_close(model.conditions(*arguments, times), together, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=re.escape("reference_xbar has shape (2, 16, 1); give that of reference, (2, 16, 9)")
    ):
        model.conditions(*arguments, times, reference_xbar=torch.zeros(2, 16, 1))
    with pytest.raises(ValueError, match="times is empty"):
        model.conditions(*arguments, [])
    with pytest.raises(ValueError, match=re.escape("the decoder needs a reference (point); give its mel and its mask")):
        model.conditions(batch["voice"], None, None, times)


# Sampling


def convert(model, batch, **options):
    return model.sample(*(batch[name] for name in ("mel", "mask", "voice", "reference", "reference_mask")), **options)


@pytest.mark.parametrize("solver", ["ml", "em", "pf", "heun", "dpmpp_2m", "unipc_2", "ddim"])
def test_batch_is_its_items_one_by_one(solver):
    model, lengths, reference_lengths = tiny(), (13, 6, 1), (5, 9, 7)
    batch = some_batch(lengths, reference_lengths)
    noise = torch.randn(6, 3, 16, 13)
    together = convert(model, batch, num_steps=5, solver=solver, noise=noise)
    scale = together.abs().max()
    for item, (length, reference_length) in enumerate(zip(lengths, reference_lengths, strict=True)):
        alone = {name: value[item : item + 1] for name, value in batch.items()}
        for name in ("mel", "mask"):
            alone[name] = alone[name][..., :length]
        for name in ("reference", "reference_mask"):
            alone[name] = alone[name][..., :reference_length]
        found = convert(model, alone, num_steps=5, solver=solver, noise=noise[:, item : item + 1, :, :length])
        assert found.shape == (1, 16, length)
        assert (together[item, :, :length] - found[0]).abs().max() / scale < 1e-4  # float32 through five networks
        assert not together[item, :, length:].any()


def test_seed_decides_all_noise():
    for noisy in (False, True):
        model, batch = tiny(reference_noise=noisy), some_batch()
        first = convert(model, batch, seed=4)
        assert torch.equal(first, convert(model, batch, seed=4))
        assert not torch.equal(first, convert(model, batch, seed=5))
        assert not first.requires_grad


def test_no_global_randomness():
    model, batch = tiny(reference_noise=True), some_batch()
    before = torch.get_rng_state()
    convert(model, batch)
    assert torch.equal(torch.get_rng_state(), before)


def test_temperature_zero_has_no_noise():
    model, batch = tiny(), some_batch()
    cold = convert(model, batch, temperature=0.0, seed=1)
    assert torch.equal(cold, convert(model, batch, temperature=0.0, seed=2))
    half = convert(model, batch, temperature=0.5, noise=torch.ones(7, 2, 16, 12))
    torch.testing.assert_close(half, convert(model, batch, noise=torch.full((7, 2, 16, 12), 0.5)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("sde", [VP(), VE()])
def test_start_is_the_diffused_source_or_the_average_voice(sde):
    model = DiffVC(Passing(), Recording(), sde=sde)
    batch, starts = some_batch(), []
    xbar = torch.randn(2, 16, 12)
    for leak in (True, False):
        convert(
            model,
            batch,
            leak_source=leak,
            temperature=0.0,
            xbar=xbar,
            solver="ddim",
            callback=lambda s: starts.append(s),
        )
    leaked, clean = (step.x for step in starts if step.index == 0)
    a = sde.a(1.0)
    torch.testing.assert_close(leaked, (xbar + a * (batch["mel"] - xbar)) * batch["mask"], rtol=0, atol=1e-6)
    torch.testing.assert_close(clean, xbar * batch["mask"], rtol=0, atol=0)
    assert [step.index for step in starts] == [0, 1, 2, 3, 4, 5] * 2
    starts.clear()
    noise = torch.ones(7, 2, 16, 12)
    convert(model, batch, xbar=xbar, leak_source=False, solver="ddim", noise=noise, callback=lambda s: starts.append(s))
    expected = (xbar + math.sqrt(sde.v(1.0))) * batch["mask"]  # the kernel's own spread, not 1
    torch.testing.assert_close(starts[0].x, expected, rtol=1e-6, atol=1e-6)


def test_start_in_the_middle_keeps_more_of_the_source():
    model, batch, starts = DiffVC(Passing(), Recording()), some_batch(), []
    xbar = torch.zeros(2, 16, 12)
    convert(model, batch, times=[0.3, 0.1, 0.0], temperature=0.0, xbar=xbar, callback=lambda s: starts.append(s))
    torch.testing.assert_close(starts[0].x, VP().a(0.3) * batch["mel"] * batch["mask"], rtol=0, atol=1e-6)
    assert len(starts) == 2


def test_guidance_adds_what_the_speaker_adds():
    """Recording's score is mean(g) - x, so guidance w gives w mean(g) - x."""
    batch, sde = some_batch(), VP()
    for guidance in (0.0, 1.0, 2.5):
        model, steps = DiffVC(Passing(), Recording()), []
        convert(model, batch, guidance=guidance, num_steps=4, callback=lambda s, keep=steps: keep.append(s))
        expected = (guidance * batch["voice"].mean(dim=1)[:, None, None] - steps[0].x) * batch["mask"]
        torch.testing.assert_close(steps[0].score, expected, rtol=0, atol=1e-5)
    assert sde.a(0.0) == 1.0


@pytest.mark.filterwarnings("ignore:the step from")
def test_kept_conditions_give_the_same_conversion():
    model, batch = tiny(), some_batch()
    times = [1.0, 0.6, 0.2, 0.0]
    kept = model.conditions(batch["voice"], batch["reference"], batch["reference_mask"], times[:-1])
    expected = convert(model, batch, times=times)
    found = model.sample(batch["mel"], batch["mask"], batch["voice"], None, None, times=times, conditions=kept)
    assert torch.equal(found, expected)
    assert not torch.allclose(convert(model, batch, times=times, conditions=kept.flip(0)), expected)
    with pytest.raises(ValueError, match=re.escape("conditions has shape (2, 2, 8); give (3, 2, G)")):
        convert(model, batch, times=times, conditions=kept[:2])


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_any_number_of_frames(frames):
    batch = some_batch((frames,), (1,))
    assert convert(tiny(), batch).shape == (1, 16, frames)


def test_modes_of_training_come_back():
    model = tiny().train()
    convert(model, some_batch(), num_steps=4)
    assert all(part.training for part in model.modules())


@pytest.mark.filterwarnings("ignore:the step from")
def test_exact_score_of_a_point_is_converted_in_one_step():
    """If the data given the condition is one point, the maximum-likelihood step is exact for any number of steps."""
    target = torch.randn(2, 16, 12)
    batch = some_batch((12, 12))

    class Point(Recording):
        def forward(self, x, mask, xbar, g, t):
            a, v = VP().a(t)[:, None, None], VP().v(t)[:, None, None]
            return (xbar + a * (target - xbar) - x) / v

    model = DiffVC(Passing(), Point("none"))
    for steps in (1, 2, 7):
        # float32, and the first step multiplies errors by up to 1 / a(1) = 150
        torch.testing.assert_close(convert(model, batch, num_steps=steps), target, rtol=0, atol=1e-3)


def test_network_that_breaks_is_stopped():
    class Breaking(Recording):
        def forward(self, x, mask, xbar, g, t):
            score = super().forward(x, mask, xbar, g, t)
            return score if t[0] > 0.5 else score * math.nan

    with pytest.raises(FloatingPointError, match=r"the score is NaN in step 2 of 4, at t=0\.5"):
        convert(DiffVC(Passing(), Breaking()), some_batch(), num_steps=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; give a whole number of at least 1"),
        ({"num_steps": 2.0}, "num_steps is 2.0; give a whole number of at least 1"),
        ({"num_steps": True}, "num_steps is True; give a whole number of at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0; give 0"),
        ({"guidance": math.inf}, "guidance is inf; give a number, 1 for none"),
        ({"times": [1.0]}, "times has 1 entries; give a decreasing grid of at least two"),
        ({"noise": torch.zeros(6, 2, 16, 12)}, "noise has shape (6, 2, 16, 12); give (7, 2, 16, 12)"),
        ({"solver": "rk4"}, "rk4"),
        ({"times": [1.0, 0.2, 0.6, 0.0]}, "0.2"),
    ],
)
def test_sampling_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(tiny(), some_batch(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mel": torch.zeros(16, 12)}, "mel is torch.float32 (16, 12); give a float tensor (B, F, T)"),
        ({"mel": torch.zeros(2, 16, 12, dtype=torch.int64)}, "mel is torch.int64"),
        ({"mask": torch.ones(2, 12)}, "mel: mask has shape (2, 12); give (B, 1, T)"),
        ({"mask": torch.zeros(2, 1, 12)}, "mel: item 0 of the batch is padding only"),
        ({"voice": torch.zeros(12)}, "voice has shape (12,); give (2, E)"),
        ({"voice": torch.zeros(1, 12)}, "voice has shape (1, 12); give (2, E)"),
        ({"reference_mask": torch.zeros(2, 1, 9)}, "reference: item 0 of the batch is padding only"),
        ({"reference": None}, "the decoder needs a reference (point)"),
        ({"mask": None}, "mel: mask is None; give (B, 1, T), ones if nothing is padded"),
        (
            {"reference": torch.zeros(1, 16, 9), "reference_mask": torch.ones(1, 1, 9)},
            "reference holds 1 items; give 2",
        ),
    ],
)
def test_sampling_refuses_inputs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(tiny(), {**some_batch(), **change})


def test_solver_that_leaves_the_grid_is_refused():
    def restless(score, x, *rest, **options):
        return score(x, torch.full((2,), 0.123))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "sample", restless)
        with pytest.raises(ValueError, match="which is not on the grid; give a solver that stays on it"):
            convert(tiny(), some_batch())
