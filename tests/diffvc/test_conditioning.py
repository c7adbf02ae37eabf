"""The experiment on the speaker's condition: four trainings that differ in the condition alone, and listen to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from oral4.diffusion.sde import VP
from oral4.diffvc import corpus
from oral4.diffvc.conditioning import (
    CONDITIONING_BETTER,
    CONDITIONING_TOLERANCE,
    CONDITIONING_UNITS,
    CONDITIONS,
    ConditioningConfig,
    ScaledDecoder,
    Stretch,
    _Judge,
    _shared_out,
    condition_batch,
    held_out_loss,
    run_conditioning,
    seen_reference,
    stretches_of,
    train_condition,
)
from oral4.diffvc.convert import shipped_converter
from oral4.diffvc.decoder import Decoder, DecoderConfig
from oral4.diffvc.model import DiffVC
from oral4.diffvc.study import Pair, held_out_speech
from oral4.errors import DataError
from oral4.measure.experiment import Experiment

SMALL = replace(ConditioningConfig.smoke(), precision="fp32")
SIZES = DecoderConfig(num_mels=8, dim=8, g_dim=8, voice_dim=16, heads=1, head_dim=4, groups=2)


class Identity(torch.nn.Module):
    def forward(self, mel, mask):
        return mel


@pytest.fixture(scope="module")
def stretches():
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(5):
        xbar = torch.randn(8, 40, generator=generator)
        voice = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
        found.append(Stretch(xbar + 0.5 * torch.randn(8, 40, generator=generator), xbar, voice))
    return found


@pytest.fixture(scope="module")
def batch(stretches):
    return condition_batch(stretches, batch=6, frames=12, generator=torch.Generator().manual_seed(1))


def decoder_of(name, sizes=SIZES, spread=0.7):
    torch.manual_seed(3)
    inner = Decoder(replace(sizes, condition=CONDITIONS[name][0]))
    mean, std = (torch.linspace(*ends, sizes.num_mels)[:, None] for ends in ((-6, -4), (1, 2)))
    return ScaledDecoder(inner, VP(), spread, mean, std)


# ---- the whole ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    with pytest.warns(UserWarning, match="multiplies the state"):  # two steps are few
        return run_conditioning(SMALL, 0)


def test_every_value_has_a_unit_and_is_finite(found):
    assert set(found) == set(CONDITIONING_UNITS)
    assert all(math.isfinite(value) for value in found.values())
    experiment = Experiment(
        name="diffvc/conditioning",
        summary="Conditions",
        config=ConditioningConfig,
        run=run_conditioning,
        units=CONDITIONING_UNITS,
        better=CONDITIONING_BETTER,
        tolerance=CONDITIONING_TOLERANCE,
    )  # which checks that the parts speak of the same values
    assert experiment.scales() == ("smoke", "mini")


def test_values_hang_together(found):
    for name in CONDITIONS:
        assert -1 <= found[f"{name}_source"] <= 1 and -1 <= found[f"{name}_target"] <= 1
        assert 0 < found[f"{name}_loss"] < found[f"{name}_error"]  # the paper's weight is below 1
    assert found["whole_minus_wodyn"] == found["whole_target"] - found["wodyn_target"]
    assert found["ceiling_target"] > max(found["copied_target"], found["nobody_target"])


def test_without_recordings_the_run_says_so_and_does_not_use_others(monkeypatch):
    def nothing(part):
        raise DataError("no recordings")
        yield

    monkeypatch.setattr(corpus, "readers", nothing)
    with pytest.raises(DataError, match="no recordings"):
        run_conditioning(replace(SMALL, real=True), 0)


# ---- data ---------------------------------------------------------------------------------------------------------


def test_stretches_hold_what_the_converter_says():
    converter = shipped_converter("cpu")
    (utterance,) = corpus.espeak_speech(["m2"], corpus.SENTENCES[:1])
    (each,) = stretches_of([utterance], converter, seconds=1.5, shortest=100)
    assert each.mel.shape == each.xbar.shape == (80, 120) and each.voice.shape == (256,)
    # float32, one network on the same input
    expected = converter.model.average_voice(each.mel[None], torch.ones(1, 1, 120))[0]
    torch.testing.assert_close(each.xbar, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="none of 1 utterances has 121 frames"):
        stretches_of([utterance], converter, seconds=1.5, shortest=121)


def test_crop_and_reference_never_share_a_frame():
    ramp = torch.arange(30.0).expand(2, 30)
    each = Stretch(ramp, ramp + 100, torch.zeros(4))
    firsts = set()
    for seed in range(60):
        batch = condition_batch([each], batch=4, frames=13, generator=torch.Generator().manual_seed(seed))
        for own, other in zip(batch["mel"][:, 0], batch["reference"][:, 0], strict=True):
            assert not set(own.tolist()) & set(other.tolist())
            assert own.tolist() == list(range(int(own[0]), int(own[0]) + 13))
            firsts.add(int(own[0]))
        torch.testing.assert_close(batch["xbar"], batch["mel"] + 100, rtol=0, atol=0)
        torch.testing.assert_close(batch["reference_xbar"], batch["reference"] + 100, rtol=0, atol=0)
    assert {0, 17} <= firsts <= set(range(18))  # both ends are reached


def test_times_are_spread_evenly(batch):
    places = (batch["t"] * 6).floor().tolist()
    assert places == [0, 1, 2, 3, 4, 5]


def test_a_stretch_too_short_for_two_crops_is_refused(stretches):
    with pytest.raises(ValueError, match="has 40 frames; two crops of 21 need 42"):
        condition_batch(stretches, batch=1, frames=21, generator=torch.Generator())


# ---- what is seen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wodyn", "whole"])
def test_training_shows_the_reference_that_conversion_will_show(name, batch):
    model = DiffVC(Identity(), decoder_of(name), preset="speech-16k")
    mask = torch.ones(6, 1, 12)
    shown = model._seen(batch["reference"], mask, batch["reference_xbar"], batch["t"], None)
    torch.testing.assert_close(seen_reference(name, batch, VP()), shown, rtol=0, atol=1e-6)  # float32, the same formula


def test_the_noisy_reference_has_the_law_of_the_diffused_one(batch):
    clean, noisy = seen_reference("wodyn", batch, VP()), seen_reference("noisy", batch, VP())
    scaled = (noisy - clean) / VP().v(batch["t"]).sqrt()[:, None, None]
    torch.testing.assert_close(scaled, batch["reference_noise"], rtol=0, atol=1e-3)  # float32 after a small divisor
    assert seen_reference("d_only", batch, VP()) is None


# ---- the decoder --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers(batch):
    """`errors` forms the paper's loss from the U-Net's answer; the model forms it from the score."""
    decoder = decoder_of("wodyn")
    ones = torch.ones(6, 1, 12)
    wanted = DiffVC(Identity(), decoder, preset="speech-16k").loss(
        batch | {"mask": ones, "reference_mask": ones}, t=batch["t"], noise=batch["noise"]
    )
    found = decoder.errors(batch, "wodyn")[1].mean()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)  # float32: the score is divided by a variance near 0


def test_an_answer_of_zero_is_the_score_of_a_gaussian():
    """Data N(xbar, spread^2) have an exact linear score, which the U-Net then has nothing to add to."""
    decoder = decoder_of("d_only")
    for parameter in decoder.decoder.unet.final_conv.parameters():
        torch.nn.init.zeros_(parameter)
    x, xbar, t = torch.randn(3, 8, 12), torch.randn(3, 8, 12), torch.tensor([0.02, 0.4, 1.0])
    sde = VP()
    a, v = sde.a(t)[:, None, None], sde.v(t)[:, None, None]
    found = decoder(x, None, xbar, torch.zeros(3, 8), t)
    torch.testing.assert_close(found, -(x - xbar) / (a * a * 0.49 + v), rtol=1e-4, atol=1e-5)  # float32


def test_inputs_and_target_have_unit_size():
    """Whatever the time, for Gaussian data: that is what the scales are for."""
    decoder, sde = decoder_of("d_only"), VP()
    generator = torch.Generator().manual_seed(0)
    for t in (0.01, 0.2, 0.6, 1.0):
        clean = 0.7 * torch.randn(40_000, generator=generator)
        keep, change, size = (each.flatten() for each in decoder.scales(torch.tensor([t]))[2:])
        noisy = sde.a(t) * clean + math.sqrt(sde.v(t)) * torch.randn(40_000, generator=generator)
        assert float((noisy / size).std()) == pytest.approx(1, abs=0.02)  # four standard errors of a spread
        assert float(((clean - keep * noisy) / change).std()) == pytest.approx(1, abs=0.02)


def test_a_spread_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"spread is 0\.0; give a positive number"):
        decoder_of("wodyn", spread=0.0)


# ---- training -----------------------------------------------------------------------------------------------------


def recorded(monkeypatch, name, stretches, seed=0):
    """Train a little; return the first weights of the U-Net, all batches, and the decoder."""
    seen, first = [], {}
    errors = ScaledDecoder.errors

    def record(self, batch, which):
        if not first:
            first.update({key: value.clone() for key, value in self.decoder.unet.state_dict().items()})
        seen.append({key: value.clone() for key, value in batch.items()})
        return errors(self, batch, which)

    with monkeypatch.context() as patch:
        patch.setattr(ScaledDecoder, "errors", record)
        decoder = train_condition(name, stretches, replace(SMALL, frames=12, dim=8), seed)
    return first, seen, decoder


@pytest.fixture(scope="module")
def speech():
    generator = torch.Generator().manual_seed(0)
    return [
        Stretch(*torch.randn(2, 8, 40, generator=generator), torch.randn(16, generator=generator)) for _ in range(3)
    ]


def test_the_trainings_differ_in_the_condition_alone(monkeypatch, speech):
    runs = {name: recorded(monkeypatch, name, speech)[:2] for name in CONDITIONS}
    first, seen = runs["d_only"]
    assert len(seen) == SMALL.steps
    for name in CONDITIONS:
        other_first, other_seen = runs[name]
        assert all(torch.equal(first[key], other_first[key]) for key in first)
        for one, other in zip(seen, other_seen, strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_seed_decides(monkeypatch, speech):
    before = torch.get_rng_state()
    one = recorded(monkeypatch, "wodyn", speech, 0)[2].state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # nothing of the caller's is used or moved
    same = recorded(monkeypatch, "wodyn", speech, 0)[2].state_dict()
    other = recorded(monkeypatch, "wodyn", speech, 1)[2].state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["decoder.unet.final_conv.weight"], other["decoder.unet.final_conv.weight"])


def test_an_unknown_condition_is_refused(speech):
    with pytest.raises(ValueError, match="name is 'd-only'; choose one of d_only, wodyn, noisy, whole"):
        train_condition("d-only", speech, SMALL, 0)


TWO_VOICES = ConditioningConfig(steps=60, batch=8, frames=8, dim=8, g_dim=8, lr=2e-2, test_batches=4, precision="fp32")


def two_voices(embedded):
    """Return two voices: opposite slopes over the bands, of which the average voice knows nothing."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for sign in (-1.0, 1.0):
        for _ in range(8):
            mel = sign * torch.linspace(1, -1, 8)[:, None] + 0.1 * torch.randn(8, 40, generator=generator)
            found.append(Stretch(mel, torch.zeros(8, 40), embedded * sign * torch.ones(4) / 2))
    return found


@pytest.mark.parametrize("name", list(CONDITIONS))
def test_every_condition_learns_a_voice_from_where_it_is_told(name):
    """From a clean reference alone; a short noisy one says nothing at strong noise, so there the embedding speaks."""
    voices = two_voices(embedded=float(name in ("d_only", "noisy")))
    found = held_out_loss(train_condition(name, voices, TWO_VOICES, 0), name, voices, TWO_VOICES, 0)
    assert found["error"] < 0.6  # 1 without having learnt anything
    assert found["listens"] > 1


def test_without_embedding_and_reference_nothing_can_be_heard():
    voices = two_voices(embedded=0.0)
    config = replace(TWO_VOICES, steps=20)
    assert held_out_loss(train_condition("d_only", voices, config, 0), "d_only", voices, config, 0)["listens"] == 0


def test_the_judge_knows_no_recording_that_is_converted():
    groups = held_out_speech(real=False)
    own, known = _shared_out(groups)
    for speaker, utterances in groups.items():
        assert len(known[speaker]) == 2 and len(own[speaker]) == len(utterances) - 2 > 0
        assert not {id(each) for each in own[speaker]} & {id(each) for each in known[speaker]}


def test_the_judge_hears_who_speaks():
    own, known = _shared_out(held_out_speech(real=False))
    judge = _Judge(known)
    first, second = sorted(own)[:2]
    pair = Pair(own[first][0], own[second][0])
    to_target, to_source = judge.similarities(own[second][1].wave, pair)
    assert to_target > to_source + 0.05
