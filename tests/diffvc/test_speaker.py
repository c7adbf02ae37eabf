"""The speaker encoder: equal to the reference outputs, batched or not, and firm about silence."""

import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from oral4.data.fetch import fetch
from oral4.diffvc import speaker
from oral4.diffvc.speaker import SpeakerEncoder, normalise_volume, partial_starts, power_mel, trim_pauses
from oral4.errors import CheckpointError, DataError, MissingExtra

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "diffvc" / "ge2e.npz")
RATE = 16_000


def vowels(seconds=2.0, rate=RATE, hz=120.0, seed=0):
    """A sound with harmonics that comes and goes, loud enough to be left at its level."""
    time = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    wave = sum(rng.uniform(0.2, 1) / k * np.sin(2 * np.pi * k * hz * time + k) for k in range(1, 20))
    return (0.1 * wave * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    try:
        return SpeakerEncoder.from_resemblyzer()
    except DataError:
        pytest.skip("the weights of GE2E are not at hand")


@pytest.fixture(scope="module")
def anyhow():
    """An encoder with random weights, for what does not depend on them."""
    torch.manual_seed(0)
    return SpeakerEncoder().eval()


@pytest.fixture(scope="module")
def libri():
    """Four seconds from each of ten utterances of eight readers: (waves, readers)."""
    soundfile = pytest.importorskip("soundfile")
    try:
        folder = fetch("librispeech-excerpt")
    except DataError:
        pytest.skip("the excerpt of LibriSpeech is not at hand")
    files = sorted(folder.glob("librispeech_test-other/*/*.flac"))
    assert len(files) == 80
    return [soundfile.read(file, stop=4 * RATE)[0] for file in files], np.array([file.parent.name for file in files])


# ---- the spectrogram


def test_power_mel_equals_librosa():
    librosa = pytest.importorskip("librosa")
    for wave in (GOLDEN["wav16k"], vowels(0.7), np.random.default_rng(0).normal(size=3001).astype(np.float32)):
        expected = librosa.feature.melspectrogram(y=wave, sr=RATE, n_fft=400, hop_length=160, n_mels=40).T
        found = power_mel(torch.from_numpy(wave))
        # float32 sums of 201 powers
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_power_mel_equals_the_reference():
    found = power_mel(torch.from_numpy(GOLDEN["wav16k"]))[:40].numpy()
    np.testing.assert_allclose(found, GOLDEN["mel40"], rtol=1e-4, atol=1e-5)  # values up to 10


def test_power_mel_takes_any_batch_and_dtype():
    waves = torch.randn(2, 3, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mel = power_mel(waves)
    assert mel.shape == (2, 3, 26, 40) and mel.dtype == torch.float64
    torch.testing.assert_close(mel[1, 2], power_mel(waves[1, 2]), rtol=0, atol=1e-12)


def test_power_mel_of_a_tone_lies_in_its_band():
    edges = speaker._mel_filters()
    for hz in (300, 1000, 3000, 6000):
        tone = torch.sin(2 * math.pi * hz * torch.arange(8000) / RATE)
        band = int(power_mel(tone)[20].argmax())
        assert edges[round(hz / 40), band] > 0  # 40 Hz a bin


# ---- volume and pauses


@given(st.floats(-60, 0), st.floats(-40, -10))
def test_volume_is_the_one_asked_for(before_db, after_db):
    wave = np.random.default_rng(0).normal(size=1000)
    wave *= 10 ** (before_db / 20) / np.sqrt(np.mean(wave**2))
    level = 20 * math.log10(np.sqrt(np.mean(normalise_volume(wave, after_db, increase_only=False) ** 2)))
    assert level == pytest.approx(after_db, abs=1e-9)
    raised = 20 * math.log10(np.sqrt(np.mean(normalise_volume(wave, after_db) ** 2)))
    assert raised == pytest.approx(max(before_db, after_db), abs=1e-9)


def test_volume_of_nothing():
    for wave in (np.zeros(100), np.zeros(0)):
        with pytest.raises(DataError, match=r"no speech.*all zero"):
            normalise_volume(wave)


def test_pauses_are_shortened_and_speech_is_not():
    speech = vowels(1.0)
    pause = np.zeros(3 * RATE, dtype=np.float32)
    trimmed = trim_pauses(np.concatenate([pause, speech, pause, speech, pause]))
    assert 2.0 <= len(trimmed) / RATE <= 2.0 + 4 * 0.25  # up to 0.25 s is kept at each of the four borders
    # every sample that is not silent is still there, in order; a window of 30 ms at a border may mix both
    np.testing.assert_array_equal(trimmed[np.abs(trimmed) > 0], np.tile(speech[np.abs(speech) > 0], 2))
    np.testing.assert_array_equal(trim_pauses(speech), speech[: len(speech) // 480 * 480])


def test_pauses_at_any_loudness_are_the_same():
    wave = np.concatenate([vowels(1.0), np.zeros(RATE, np.float32), vowels(0.5)])
    assert len(trim_pauses(wave)) == len(trim_pauses(1e-3 * wave)) < len(wave) - RATE // 2


def test_pauses_of_less_than_a_window():
    wave = vowels(0.02)
    np.testing.assert_array_equal(trim_pauses(wave), wave)


def test_pauses_refuse_an_unknown_detector(monkeypatch):
    with pytest.raises(ValueError, match=r"'loud'.*energy.*webrtc"):
        trim_pauses(vowels(1.0), detector="loud")
    monkeypatch.setitem(sys.modules, "webrtcvad", None)
    with pytest.raises(MissingExtra, match="webrtcvad"):
        trim_pauses(vowels(1.0), detector="webrtc")


def test_pauses_by_another_detector(monkeypatch):
    """The detector gets 16-bit windows of 30 ms, and its word is final."""

    class Vad:
        def __init__(self, mode):
            assert mode == 3

        def is_speech(self, window, rate):
            assert len(window) == 2 * 480 and rate == RATE
            return bool(np.abs(np.frombuffer(window, "<i2")).max() > 20_000)

    monkeypatch.setitem(sys.modules, "webrtcvad", type("module", (), {"Vad": Vad}))
    wave = np.full(RATE, 0.1, dtype=np.float32)
    assert len(trim_pauses(wave, detector="webrtc")) == 0
    wave[4000:12_000] = 0.9
    assert 8000 <= len(trim_pauses(wave, detector="webrtc")) <= 8000 + 2 * 4000


# ---- windows


def test_windows_are_those_of_the_reference():
    assert (np.array(partial_starts(len(GOLDEN["wav16k"]))) * 160 == GOLDEN["slices"][:, 0]).all()
    assert (GOLDEN["slices"][:, 1] - GOLDEN["slices"][:, 0] == 160 * speaker.PARTIAL_FRAMES).all()


@given(st.integers(1, 400_000), st.floats(0.625, 20), st.floats(0.01, 1))
@example(327_840, 3.75, 1.0)  # two windows at the end are not covered
def test_windows_cover_the_wave(num_samples, per_second, coverage):
    starts = partial_starts(num_samples, per_second=per_second, coverage=coverage)
    assert starts[0] == 0 and all(0 < b - a <= 160 for a, b in itertools.pairwise(starts))
    left_over = num_samples - (starts[-1] + 160) * 160
    assert left_over <= coverage * 160 * 160  # what no window hears is less than the share that a window needs
    if len(starts) > 1:
        assert num_samples - starts[-1] * 160 >= coverage * 160 * 160


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_second": 0.5}, r"per_second=0.5: 0.625 to 100"),
        ({"per_second": 101}, "per_second=101"),
        ({"coverage": 0}, "coverage=0"),
        ({"coverage": 1.1}, "coverage=1.1"),
        ({"num_samples": 0}, "num_samples=0"),
    ],
)
def test_windows_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        partial_starts(**{"num_samples": 32_000, **arguments})


# ---- the network


def test_points_are_those_of_the_reference(trained):
    starts = partial_starts(len(GOLDEN["wav16k"]))
    padded = np.pad(GOLDEN["wav16k"], (0, (starts[-1] + 160) * 160 - len(GOLDEN["wav16k"])))
    mel = power_mel(torch.from_numpy(padded))
    partials = trained(torch.stack([mel[start : start + 160] for start in starts])).numpy()
    np.testing.assert_allclose(partials, GOLDEN["partials"], rtol=0, atol=1e-5)  # float32 over 160 steps
    # the reference keeps the offset of 3e-4 of full scale that `embed` takes away
    found = trained.embed(GOLDEN["wav16k"], RATE, trim=None).numpy()
    np.testing.assert_allclose(found, GOLDEN["embed"], rtol=0, atol=2e-4)
    assert float(found @ GOLDEN["embed"]) > 0.99999


def test_many_equal_one_by_one(anyhow):
    waves = [
        vowels(seconds, rate, seed=seed)
        for seed, (seconds, rate) in enumerate([(0.6, 16_000), (5.3, 8000), (2.0, 44_100)])
    ]
    rates = [16_000, 8000, 44_100]
    together = anyhow.embed_many(waves, rates, batch_size=2)
    alone = torch.stack([anyhow.embed(wave, rate) for wave, rate in zip(waves, rates, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # float32, other batch shapes
    assert together.dtype == torch.float32 and together.shape == (3, 256)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert bool((together >= 0).all())
    assert anyhow.embed_many([], 16_000).shape == (0, 256)


def test_the_form_of_the_samples_does_not_matter(anyhow):
    wave = np.round(vowels(1.5) * 32768) / 32768
    expected = anyhow.embed(wave, RATE)
    for same in ((wave * 32768).astype(np.int16), wave.astype(np.float64), np.stack([wave, wave]), wave + 0.1):
        torch.testing.assert_close(
            anyhow.embed(same, RATE), expected, rtol=0, atol=1e-5
        )  # rounding of the mean in float32
    other = anyhow.embed(np.stack([wave, -0.5 * wave]), RATE)  # the mean of both is a quarter, not the first channel
    torch.testing.assert_close(other, anyhow.embed(0.25 * wave, RATE), rtol=0, atol=1e-5)


def test_volume_raised_and_set(anyhow):
    wave = vowels(2.0)  # about -18 dB
    assert 20 * math.log10(wave.std()) > -25
    loud, soft = anyhow.embed(wave, RATE), anyhow.embed(0.3 * wave, RATE)
    assert float((loud - soft).abs().max()) > 1e-4  # "raise" lets the level through, ten times what is equal below
    torch.testing.assert_close(anyhow.embed(0.03 * wave, RATE), anyhow.embed(0.01 * wave, RATE), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        anyhow.embed(wave, RATE, volume="set"), anyhow.embed(0.03 * wave, RATE), rtol=0, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"volume='up'.*raise.*set"):
        anyhow.embed(wave, RATE, volume="up")


def test_weights_follow_the_module_and_keep_their_type(anyhow):
    doubled = SpeakerEncoder()
    doubled.load_state_dict(anyhow.state_dict())
    wave = vowels(1.0)
    point = doubled.double().embed(wave, RATE)
    assert point.dtype == torch.float32
    torch.testing.assert_close(point, anyhow.embed(wave, RATE), rtol=0, atol=1e-5)


# ---- bad input


def test_silence_is_refused(anyhow):
    for wave in (np.zeros(RATE), np.full(RATE, 0.5), 1e-5 * vowels(1.0), np.zeros(RATE, dtype=np.int16)):
        with pytest.raises(DataError, match="no speech"):
            anyhow.embed(wave, RATE)
    with pytest.raises(DataError, match="wave 1: no speech"):
        anyhow.embed_many([vowels(1.0), np.zeros(RATE)], RATE)


def test_a_network_that_does_not_respond_is_no_point(anyhow):
    deaf = SpeakerEncoder().eval()
    with torch.no_grad():
        deaf.linear.weight.zero_()
        deaf.linear.bias.fill_(-1)
    with pytest.raises(DataError, match="no unit of the network responds to wave 0"):
        deaf.embed(vowels(1.0), RATE)


def test_damaged_sounds_are_refused(anyhow):
    broken = vowels(1.0)
    broken[100] = np.nan
    with pytest.raises(DataError, match=r"wave 1: .*NaN"):
        anyhow.embed_many([vowels(1.0), broken], RATE)
    with pytest.raises(DataError, match="not empty"):
        anyhow.embed(np.zeros(0), RATE)
    with pytest.raises(DataError, match="Hz is outside"):
        anyhow.embed(vowels(1.0), 100)
    with pytest.raises(TypeError, match="real floats or integers"):
        anyhow.embed(np.zeros(RATE, dtype=complex), RATE)
    with pytest.raises(ValueError, match="2 rates for 3 waves"):
        anyhow.embed_many([vowels(1.0)] * 3, [RATE, RATE])
    with pytest.raises(ValueError, match="detector='x'"):
        anyhow.embed(vowels(1.0), RATE, trim="x")


def test_short_sounds_warn(anyhow):
    with pytest.warns(UserWarning, match=r"0\.3\d s of speech; below 0\.5 s"):
        point = anyhow.embed(vowels(0.4), RATE)
    assert bool(torch.isfinite(point).all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anyhow.embed(vowels(0.6), RATE)


# ---- the file of weights


def test_the_package_is_not_imported():
    code = (
        "import sys; from oral4.diffvc.speaker import SpeakerEncoder\n"
        "try: SpeakerEncoder.from_resemblyzer()\n"
        "except Exception as error: assert type(error).__name__ == 'DataError', error\n"
        "assert not {'resemblyzer', 'webrtcvad', 'librosa'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_weights_are_checked(tmp_path):
    with pytest.raises(CheckpointError, match="is not a file"):
        SpeakerEncoder.from_resemblyzer(tmp_path / "none.pt")
    (tmp_path / "other.pt").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=rf"has sha256 d9298a1.*{speaker.WEIGHTS_SHA256}"):
        SpeakerEncoder.from_resemblyzer(tmp_path / "other.pt")


def test_without_the_package_the_file_is_fetched(monkeypatch):
    asked = []
    monkeypatch.setattr(speaker.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(speaker, "fetch", lambda name: asked.append(name) or Path("/nowhere/pretrained.pt"))
    with pytest.raises(CheckpointError, match=r"pretrained\.pt is not a file"):
        SpeakerEncoder.from_resemblyzer()
    assert asked == ["resemblyzer/pretrained.pt"]


def test_a_loaded_encoder_is_ready(trained):
    assert not trained.training and not any(weight.requires_grad for weight in trained.parameters())
    assert sum(weight.numel() for weight in trained.parameters()) == 1_423_616


# ---- real voices


def test_real_readers_are_told_apart(trained, libri):
    """Ten utterances of each of eight readers; the bands are those of another implementation, 0.824 and 0.488."""
    waves, readers = libri
    points = trained.embed_many(waves, RATE).numpy()
    similar, same = points @ points.T, readers[:, None] == readers
    pairs = np.triu_indices(len(waves), 1)
    assert 0.79 < similar[pairs][same[pairs]].mean() < 0.86
    assert 0.45 < similar[pairs][~same[pairs]].mean() < 0.55
    centres = np.stack([points[readers == reader].mean(0) for reader in np.unique(readers)])
    assert (np.unique(readers)[(points @ centres.T).argmax(1)] == readers).all()


def test_resampling_hardly_moves_a_point(trained, libri):
    """16 kHz by way of 44.1 kHz; and a tighter band at the price of the top, 8 kHz, moves it more."""
    from oral4.diffvc.audio import resample

    wave = libri[0][0].astype(np.float32)
    point = trained.embed(wave, RATE)
    assert float(point @ trained.embed(resample(wave, RATE, 44_100), 44_100)) > 0.995
    narrow = float(point @ trained.embed(resample(wave, RATE, 8000), 8000))
    assert 0.6 < narrow < 0.99
