"""What the conversion experiments do: who is paired with whom, and that what they report is what its name says."""

import numpy as np
import pytest
import torch

from oral4.diffvc import corpus, study
from oral4.diffvc.compact import CompactConfig, CompactDecoder, ContentEncoder, Voice
from oral4.diffvc.convert import Converter
from oral4.diffvc.model import DiffVC
from oral4.diffvc.vocoder import GriffinLim


@pytest.fixture(scope="module")
def converter():
    """Return a converter that has learnt nothing: the studies must run, and must not flatter it."""
    torch.manual_seed(0)
    config = CompactConfig(encoder_channels=8, encoder_blocks=1, voice_channels=8, score_channels=8, score_blocks=1)
    content = ContentEncoder(config, table=torch.randn(41, 80) - 6)
    model = DiffVC(content, CompactDecoder(config), preset="speech-16k")
    return Converter(model, Voice(config), GriffinLim(iterations=4, inverse="pinv"), name="untrained", device="cpu")


@pytest.fixture
def few(monkeypatch):
    """Four variants and four sentences instead of eight and forty."""
    monkeypatch.setattr(corpus, "HELD_OUT_ESPEAK", corpus.HELD_OUT_ESPEAK[:4])
    monkeypatch.setattr(study.corpus, "SENTENCES", corpus.SENTENCES[:4])


@pytest.fixture(scope="module")
def groups():
    return study.held_out_speech(real=False)


# ---- pairs ------------------------------------------------------------------------------------------------------


def test_the_stand_ins_were_never_trained_on(groups):
    assert set(groups) == {f"espeak/{voice}" for voice in corpus.HELD_OUT_ESPEAK[:3]}
    assert all(utterance.seconds >= 2 for utterances in groups.values() for utterance in utterances)
    assert all(len(utterances) > 1 for utterances in groups.values())


def test_every_ordered_pair_of_speakers_once(groups):
    pairs = study.draw_pairs(groups, 0)
    met = [(pair.source.speaker, pair.reference.speaker) for pair in pairs]
    assert sorted(met) == sorted((a, b) for a in groups for b in groups if a != b)
    assert all(pair.source.seconds <= 4 and pair.reference.seconds <= 10 for pair in pairs)
    again = study.draw_pairs(groups, 0)
    assert all(np.array_equal(a.source.wave, b.source.wave) for a, b in zip(pairs, again, strict=True))
    orders = {tuple(pair.source.speaker for pair in study.draw_pairs(groups, seed)) for seed in range(4)}
    assert len(orders) > 1


def test_a_cut_is_the_beginning(groups):
    whole = groups["espeak/m2"][0]
    cut = study._cut(whole, 1.5)
    assert cut.seconds == 1.5 and np.array_equal(cut.wave, whole.wave[:24_000])
    assert study._is_part(cut, whole) and not study._is_part(cut, groups["espeak/m2"][1])


def test_the_judge_leaves_out_what_the_converter_was_given(groups):
    judge = study._Judge({"espeak/m2": groups["espeak/m2"][:2]})
    first, second = groups["espeak/m2"][:2]
    assert torch.allclose(judge.voice("espeak/m2", study._cut(first, 1.0)), judge.point(second.wave), atol=1e-6)
    assert torch.allclose(judge.voice("espeak/m2", second), judge.point(first.wave), atol=1e-6)


# ---- the simplest conversion ------------------------------------------------------------------------------------


def test_spectral_transfer_has_the_statistics_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    mel = 2 * torch.randn(80, 100, generator=generator, dtype=torch.float64) - 5
    spread = torch.linspace(0.5, 3, 80, dtype=torch.float64)[:, None]
    reference = spread * torch.randn(80, 70, generator=generator, dtype=torch.float64)
    found = study.spectral_transfer(mel, reference)
    assert found.shape == mel.shape
    assert torch.allclose(found.mean(1), reference.mean(1), atol=1e-12)
    assert torch.allclose(found.std(1), reference.std(1), atol=1e-12)
    assert torch.allclose(study.spectral_transfer(mel, mel), mel, atol=1e-12)
    for band in (0, 40, 79):  # rank is kept: louder stays louder
        assert torch.equal(found[band].argsort(), mel[band].argsort())
    constant = study.spectral_transfer(torch.full((80, 5), -3.0), torch.zeros(80, 4))
    assert torch.equal(constant, torch.zeros(80, 5))


def test_median_pitch_in_semitones():
    time_s = np.arange(16_000) / 16_000

    def buzz(hz):
        return 0.2 * sum(np.sin(2 * np.pi * k * hz * time_s) / k for k in range(1, 8)).astype(np.float32)

    low, high = buzz(110.0), buzz(220.0)
    assert study._median_semitone(high) - study._median_semitone(low) == pytest.approx(12, abs=0.2)
    assert np.isnan(study._median_semitone(np.zeros(16_000, dtype=np.float32)))


# ---- the studies ------------------------------------------------------------------------------------------------


def test_conversion_study(converter, few):
    found = study.conversion_study(converter, seed=0, real=False, most=2)
    names = ["converted", "warm", "copied", "nobody", "prior", "transferred", "ceiling"]
    for name in names:
        assert -1 <= found[f"{name}_target"] <= 1 and -1 <= found[f"{name}_source"] <= 1
        assert found[f"{name}_closer"] in (0, 0.5, 1)
    # who is judged is right: the copy is its source, the ceiling its target, the untrained outcome neither
    assert found["copied_closer"] == 0 and found["ceiling_closer"] == 1
    assert found["ceiling_target"] > found["converted_target"] and found["copied_source"] > found["copied_target"]
    assert found["beats_transfer"] in (0, 0.5, 1)
    assert found["rtf"] > 0
    for name in ("converted", "copied"):
        assert found[f"{name}_distance"] > 0
    assert set(found) == {f"{name}_{what}" for name in names for what in ("target", "source", "closer")} | {
        "converted_semitones", "copied_semitones", "converted_distance", "copied_distance", "beats_transfer", "rtf",
    }  # fmt: skip


def test_digit_study(converter, few):
    found = study.digit_study(converter, seed=0, real=False, strings=1, takes=1, epochs=2)
    assert set(found) == {"recorded", "vocoded", "converted", "warm"}
    assert all(4 * value in range(5) for value in found.values())


def test_parallel_study_measures_the_distance_to_the_targets_own(converter, few):
    found = study.parallel_study(converter, seed=0, texts=1)
    assert set(found) == {"copied", "converted", "transferred"}
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert found["copied"] < found["converted"]  # an untrained network says nothing


def test_solver_study(converter, few, monkeypatch):
    monkeypatch.setattr(study, "SOLVERS", {"ml_2": {"solver": "ml", "steps": 2}, "again": {"solver": "ml", "steps": 2}})
    found = study.solver_study(converter, seed=0, real=False, most=1)
    assert set(found) == {"ml_2_target", "ml_2_frechet", "again_target", "again_frechet"}
    assert -1 <= found["ml_2_target"] <= 1 and found["ml_2_frechet"] > 0
    assert found["ml_2_target"] == found["again_target"]  # the same noise
    assert found["ml_2_frechet"] == found["again_frechet"]


def test_solvers_of_the_study_are_known(converter):
    wave = next(corpus.espeak_speech(["m2"], ["one"])).wave
    target = converter.voice_print((wave, 16_000))
    for how in study.SOLVERS.values():
        quick = how | {"steps": 4}
        assert bool(converter.convert((wave, 16_000), target, **quick).mel.isfinite().all())


def test_probe_study(converter, few):
    found = study.probe_study(converter.model.encoder, seed=0, real=False)
    shares = [found[f"{who}_{what}"] for who in ("speaker", "phone") for what in ("mel", "average")]
    assert all(0 <= share <= 1 for share in shares)
    assert found["speaker_chance"] == pytest.approx(1 / 3)
    assert found["phone_mel"] > 2 / 41  # the mel knows its phone better than chance
    assert found["mse_encoder"] > 0 and found["mse_source"] > 0 and found["mse_constant"] > 0


def test_probe_study_of_an_encoder_that_knows_all(few, monkeypatch):
    """The errors are those against the encoder's own table at the true phones: 0 for one that answers with it."""
    items = []
    keep = study.training.items_of
    monkeypatch.setattr(study.training, "items_of", lambda speech: items.extend(keep(speech)) or items)

    class Oracle:
        table = torch.randn(41, 80, generator=torch.Generator().manual_seed(0))

        def __call__(self, mel, mask):
            for item in items:
                if item.mel.shape == mel.shape[1:] and torch.equal(item.mel.float(), mel[0]):
                    return self.table[item.phones.clamp(min=0)].T[None]
            return mel

    found = study.probe_study(Oracle(), seed=0, real=False)
    assert found["mse_encoder"] == 0 and found["mse_constant"] > 0.5
    assert found["phone_average"] > 0.95  # the answer names the phone
