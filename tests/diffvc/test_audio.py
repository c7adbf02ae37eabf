"""Waves and log-mel: the official numbers, librosa's basis, batches that equal their items, every bad sound."""

import math
import re
import struct
import sys
import warnings
import wave as wave_file
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.data.limits import Limits
from oral4.diffvc.audio import (
    PRESETS,
    AudioWarning,
    MelPreset,
    check_same_preset,
    count_clipped,
    find_preset,
    hz_to_mel,
    load_audio,
    log_mel,
    log_mel_batch,
    mel_basis,
    mel_to_hz,
    pad_mels,
    prepare_wave,
    resample,
    soft_limit,
    spectral_subtraction,
    write_wav,
)
from oral4.errors import CheckpointError, DataError, MissingExtra

GOLDEN = np.load(Path(__file__).parents[1] / "goldens/diffvc/audio.npz")
NAMES = list(PRESETS)


def tone(hz, rate, seconds=1.0, amplitude=0.3):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(samples, seed=0, amplitude=0.1):
    return (amplitude * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Presets and the basis


def test_presets():
    official = PRESETS["hifigan-22k"]
    assert (official.rate, official.n_fft, official.win, official.hop, official.num_mels) == (
        22050,
        1024,
        1024,
        256,
        80,
    )
    assert (official.fmin, official.fmax, official.padding) == (0, 8000, 384)
    assert find_preset("hifigan-22k") is official and find_preset(official) is official
    assert [p.frames_per_second for p in PRESETS.values()] == [22050 / 256, 80, 80]
    assert list(PRESETS) == [p.name for p in PRESETS.values()]
    with pytest.raises(ValueError, match=r"preset='hifigan' is unknown; choose one of hifigan-22k, speech-16k"):
        find_preset("hifigan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop": 0}, "0 < hop <= win <= n_fft"),
        ({"win": 2048}, "0 < hop <= win <= n_fft"),
        ({"hop": 201}, "must be even"),
        ({"win": 801, "hop": 201}, "must be even"),
        ({"fmax": 8001.0}, "fmin < fmax <= rate / 2"),
        ({"fmin": 8000.0}, "fmin < fmax <= rate / 2"),
        ({"num_mels": 0}, "num_mels=0"),
    ],
)
def test_preset_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PRESETS["speech-16k"], **change)


def test_same_preset():
    here = PRESETS["speech-16k"]
    check_same_preset(here, replace(here, name="another name"), what="model")
    with pytest.raises(CheckpointError, match=r"model: made for speech-16k, not for digits-8k: rate 16000, not 8000; "):
        check_same_preset(here, PRESETS["digits-8k"], what="model")


@pytest.mark.parametrize("name", NAMES)
def test_basis_is_librosas(name):
    librosa = pytest.importorskip("librosa")
    p = PRESETS[name]
    theirs = librosa.filters.mel(sr=p.rate, n_fft=p.n_fft, n_mels=p.num_mels, fmin=p.fmin, fmax=p.fmax)
    # both round float64 to float32; entries are up to 0.03
    np.testing.assert_allclose(mel_basis(name), theirs, rtol=0, atol=4e-9)
    assert (mel_basis(name).sum(1) > 0).all()  # no empty band


def test_basis_has_the_official_sums():
    np.testing.assert_allclose(mel_basis("hifigan-22k").sum(1), GOLDEN["mel_basis_rowsum"], rtol=1e-5)


@given(st.floats(0, 24000))
def test_mel_scale_inverts(hz):
    assert math.isclose(mel_to_hz(hz_to_mel(hz)), hz, rel_tol=1e-12, abs_tol=1e-9)


# Log-mel


def test_log_mel_is_the_official():
    found = log_mel(GOLDEN["wav"], "hifigan-22k")
    assert found.shape == (80, 34) and found.dtype == torch.float32
    np.testing.assert_allclose(found, GOLDEN["mel"], rtol=0, atol=1e-4)  # two Fourier transforms in float32


def reference(wave, preset):
    """The definition, frame by frame, in float64."""
    p = find_preset(preset)
    wave = np.asarray(wave, np.float64)[: len(wave) // p.hop * p.hop]
    padded = np.pad(wave, (p.n_fft - p.hop) // 2, mode="reflect")
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(p.win) / p.win), (p.n_fft - p.win) // 2)
    frames = [padded[j * p.hop : j * p.hop + p.n_fft] * window for j in range(len(wave) // p.hop)]
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames)) ** 2 + 1e-9).T
    return np.log(np.clip(mel_basis(p).astype(np.float64) @ magnitude, 1e-5, None))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.integers(0, 3000), st.integers(0, 5))
def test_log_mel_equals_the_definition(name, more, seed):
    hop = PRESETS[name].hop
    wave = noise(hop + more, seed)  # from one hop on: shorter than the padding, which reflects several times
    found = log_mel(torch.from_numpy(wave).double(), name)
    np.testing.assert_allclose(found, reference(wave, name), rtol=0, atol=1e-6)  # float32 triangles, float64 otherwise
    assert found.shape == (PRESETS[name].num_mels, (hop + more) // hop)
    # float32: relative error of a magnitude near the floor of 3e-5, beside others of up to 10
    np.testing.assert_allclose(log_mel(wave, name), found, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_frame_j_stands_over_its_hop(name):
    """A click in hop j makes frame j the loudest."""
    p = PRESETS[name]
    for j in (3, 7):
        wave = np.zeros(12 * p.hop, np.float32)
        wave[j * p.hop + p.hop // 2] = 1
        assert int(log_mel(wave, p).exp().sum(0).argmax()) == j


def test_a_tone_is_in_its_band():
    p = PRESETS["speech-16k"]
    centres = mel_to_hz(np.linspace(hz_to_mel(p.fmin), hz_to_mel(p.fmax), p.num_mels + 2))[1:-1]
    for band in (10, 40, 70):
        loudness = log_mel(tone(centres[band], p.rate), p)[:, 20:60].mean(1)
        assert int(loudness.argmax()) == band


def test_silence_is_the_floor():
    found = log_mel(np.zeros(16000, np.float32))
    row = mel_basis("speech-16k").sum(1)
    expected = np.log(np.maximum(row * np.sqrt(1e-9), 1e-5))
    np.testing.assert_allclose(found[:, 5], expected, rtol=0, atol=1e-5)


def test_batch_axis_numpy_and_torch_agree():
    waves = noise(4100).reshape(2, 2050)
    together = log_mel(waves)
    assert together.shape == (2, 80, 10)
    for row in range(2):
        torch.testing.assert_close(together[row], log_mel(torch.from_numpy(waves[row])), rtol=0, atol=1e-5)
    assert torch.equal(log_mel(waves.astype(np.float64)), together)  # numpy's float64 is computed in float32
    assert log_mel(torch.from_numpy(waves).double()).dtype == torch.float64


def test_log_mel_is_differentiable():
    wave = torch.from_numpy(noise(700)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: log_mel(w, "digits-8k").mean(0), wave)


def test_kept_tensors_serve_training_after_inference():
    preset = replace(PRESETS["digits-8k"], name="fresh", num_mels=39)
    with torch.inference_mode():
        log_mel(noise(1000), preset)
    wave = torch.from_numpy(noise(1000)).requires_grad_()
    log_mel(wave, preset).sum().backward()
    assert float(wave.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("wave", "error", "message"),
    [
        (np.zeros(199, np.float32), ValueError, "199 samples; one frame of speech-16k needs 200"),
        (np.zeros((2, 2, 800), np.float32), ValueError, r"shape \(2, 2, 800\)"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (np.array([np.nan] + [0.0] * 799), ValueError, "1 samples of the wave are NaN or infinite"),
        (np.zeros(800, np.int16), TypeError, "int16; pass floats"),
    ],
)
def test_log_mel_refuses(wave, error, message):
    with pytest.raises(error, match=message):
        log_mel(wave)


# Batches


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.integers(0, 2000), min_size=1, max_size=4))
def test_a_batch_equals_its_items(name, more):
    waves = [noise(PRESETS[name].hop + extra, seed) for seed, extra in enumerate(more)]
    mel, mask = log_mel_batch(waves, name)
    assert mask.shape == (len(waves), 1, mel.shape[-1]) and mel.shape[-1] == int(mask.sum(-1).max())
    for row, wave in enumerate(waves):
        alone = log_mel(wave, name)
        frames = alone.shape[1]
        # float32: near the floor the order of additions in the matrix product shows
        torch.testing.assert_close(mel[row, :, :frames], alone, rtol=0, atol=2e-5)
        assert mask[row, 0, :frames].eq(1).all() and mask[row, 0, frames:].eq(0).all()
        assert mel[row, :, frames:].eq(0).all()
    again, same_mask = pad_mels([log_mel(wave, name) for wave in waves])
    torch.testing.assert_close(again, mel, rtol=0, atol=2e-5)
    assert torch.equal(mask, same_mask)


def test_pad_mels_keeps_type_and_value():
    mel, mask = pad_mels([torch.ones(4, 2).double(), torch.ones(4, 3).double()], value=-11.5)
    assert mel.dtype == mask.dtype == torch.float64
    assert mel[0, :, 2].eq(-11.5).all() and mask.tolist() == [[[1, 1, 0]], [[1, 1, 1]]]


@pytest.mark.parametrize("mels", [[], [torch.ones(4, 2), torch.ones(5, 2)], [torch.ones(4, 0)], [torch.ones(1, 4, 2)]])
def test_pad_mels_refuses(mels):
    with pytest.raises(ValueError, match=r"pad_mels: (the list is empty|shapes)"):
        pad_mels(mels)


def test_log_mel_batch_refuses():
    with pytest.raises(ValueError, match="the list is empty"):
        log_mel_batch([])
    with pytest.raises(ValueError, match=r"shape \(2, 800\); give a list"):
        log_mel_batch([np.zeros((2, 800))])
    with pytest.raises(ValueError, match="NaN"):
        log_mel_batch([np.zeros(800), np.full(800, np.nan)])


# Sounds of every kind


@pytest.mark.parametrize(
    ("dtype", "full_scale"),
    [(np.float64, None), (np.float32, None), (np.int32, 2**31), (np.int16, 2**15), (np.uint8, 2**7)],
)
def test_dtypes(dtype, full_scale):
    """Half a step of the type, at most; and the rounding of float32."""
    wave = tone(440, 16000)
    given_, atol = wave.astype(dtype), 3e-8
    if full_scale is not None:
        steps = np.round(wave.astype(np.float64) * full_scale)
        given_, atol = (steps + (128 if dtype == np.uint8 else 0)).astype(dtype), 0.5 / full_scale + 3e-8
    found, rate = load_audio((given_, 16000))
    assert found.dtype == np.float32 and rate == 16000
    np.testing.assert_allclose(found, wave, rtol=0, atol=atol)


def test_full_scale_of_integers():
    assert load_audio((np.array([-32768, 0, 16384], np.int16), 8000))[0].tolist() == [-1, 0, 0.5]
    assert load_audio((np.array([0, 128, 192], np.uint8), 8000))[0].tolist() == [-1, 0, 0.5]


def test_tensors_and_stereo():
    left, right = tone(300, 16000), tone(500, 16000)
    found, _ = load_audio((torch.from_numpy(np.stack([left, right])), 16000))
    np.testing.assert_allclose(found, (left + right) / 2, rtol=0, atol=1e-7)
    half, _ = load_audio((torch.from_numpy(left).bfloat16(), 16000.0))
    np.testing.assert_allclose(half, left, rtol=2**-8, atol=0)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("name", NAMES)
def test_rates(rate, name):
    """A tone keeps its pitch, level and length, whatever the rate."""
    p = PRESETS[name]
    wave = tone(1000, rate, amplitude=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rate >= 2 * p.fmax else "ignore")
        found = prepare_wave((wave, rate), p)
    assert len(found) == p.rate and found.dtype == np.float32
    inside = slice(p.rate // 8, -p.rate // 8)
    # passband of a filter whose ripple is that of a Kaiser window with beta 9
    np.testing.assert_allclose(found[inside], tone(1000, p.rate, amplitude=0.5)[inside], rtol=0, atol=2e-4)


@pytest.mark.parametrize(("rate", "name"), [(8000, "speech-16k"), (11025, "speech-16k"), (8000, "hifigan-22k")])
def test_a_low_rate_is_said(rate, name):
    message = f"at {rate} Hz there is nothing above {rate // 2} Hz, but {name} reaches 8000"
    with pytest.warns(AudioWarning, match=message):
        prepare_wave((tone(300, rate), rate), name)


def test_resampling_does_not_fold():
    """Above the new half-rate nothing survives; 90 dB is an amplitude of 3e-5."""
    found = resample(tone(9000, 44100, amplitude=1.0), 44100, 16000)
    assert np.abs(found[2000:-2000]).max() < 6e-5
    kept = resample(tone(6900, 44100, amplitude=1.0), 44100, 16000)
    assert abs(np.abs(kept[2000:-2000]).max() - 1) < 1e-2


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]),
    st.sampled_from([8000, 16000, 22050]),
)
def test_resampled_length(samples, rate, new_rate):
    assert len(resample(noise(samples), rate, new_rate)) == math.ceil(samples * new_rate / rate)


def test_resample_refuses():
    for wave in (np.zeros((2, 5)), np.zeros(0), np.zeros(5, np.int16)):
        with pytest.raises(ValueError, match="floats of shape"):
            resample(wave, 8000, 16000)
    for rate in (0, -1, 8000.5, True):
        with pytest.raises(ValueError, match="a positive integer is needed"):
            resample(np.zeros(5), rate, 16000)
    with pytest.raises(ValueError, match="no simple ratio"):
        resample(np.zeros(5), 44101, 16000)


def test_offset_is_taken_away():
    wave = tone(200, 16000)
    np.testing.assert_allclose(prepare_wave((wave + 0.4, 16000)), wave - wave.mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "wave", [np.zeros(16000), np.full(16000, 0.7), 5e-5 * tone(300, 16000), np.zeros(16000, np.int16)]
)
def test_silence_is_refused(wave):
    with pytest.raises(DataError, match="audio: no speech, the largest sample is"):
        prepare_wave((wave, 16000))


def test_short_sound_is_padded_not_looped():
    wave = tone(300, 16000, 0.2)
    with pytest.warns(AudioWarning, match=r"0\.20 s are shorter than 0\.5 s and are padded with silence"):
        found = prepare_wave((wave, 16000))
    assert len(found) == 8000 and not found[3200:].any()
    np.testing.assert_allclose(found[:3200], wave - wave.mean(), rtol=0, atol=1e-6)
    assert len(prepare_wave((wave, 16000), min_seconds=0.1)) == 3200
    with pytest.raises(ValueError, match="min_seconds=-1"):
        prepare_wave((wave, 16000), min_seconds=-1)


def test_one_sample_cannot_be_speech():
    with pytest.raises(DataError, match="no speech"):
        prepare_wave((np.array([0.5]), 16000))


def test_clipping_is_said():
    loud = np.clip(tone(200, 16000, amplitude=1.5), -1, 1)
    with pytest.warns(AudioWarning, match=r"\d+ samples are clipped, \d+ percent"):
        prepare_wave((loud, 16000))
    with pytest.warns(AudioWarning, match="clipped"):  # one channel of two
        prepare_wave((np.stack([loud, 0.5 * tone(300, 16000)]), 16000))
    assert count_clipped(loud) == int((np.abs(loud) == 1).sum())
    assert count_clipped(0.5 * loud) == int((np.abs(loud) == 1).sum())  # turned down afterwards


@pytest.mark.parametrize("hz", [60, 200, 3000])
def test_loud_is_not_clipped(hz, no_warnings):
    wave = tone(hz, 16000, amplitude=0.999)
    for given_ in (wave, np.round(wave * 32767).astype(np.int16), np.round(wave * 127 + 128).astype(np.uint8)):
        assert len(prepare_wave((given_, 16000))) == 16000
    assert count_clipped(np.zeros(100)) == count_clipped(np.zeros(0)) == 0


def test_floats_beyond_full_scale():
    with pytest.warns(AudioWarning, match=r"floats up to 1\.5 are divided by that peak"):
        found, _ = load_audio((np.array([0.0, 1.5, -0.75]), 16000))
    assert found.tolist() == [0, 1, -0.5]
    with pytest.raises(DataError, match="floats up to 20000, full scale is 1; divide by 32768"):
        load_audio((20000 * tone(300, 16000, amplitude=1.0), 16000))


def test_never_beyond_one():
    """A square wave overshoots when it is filtered."""
    square = np.sign(tone(310, 48000)) * np.float32(0.99)
    with pytest.warns(AudioWarning, match="clipped"):
        found = prepare_wave((square, 48000))
    assert np.abs(found).max() == 1


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ((np.array([0.1, np.nan]), 16000), DataError, r"1 samples are NaN or infinite, the first at index \(1,\)"),
        ((np.array([0.1, np.inf]), 16000), DataError, "NaN or infinite"),
        ((np.zeros(0), 16000), DataError, "not empty"),
        ((np.zeros((2, 3, 4)), 16000), DataError, "samples"),
        ((np.zeros(100), 0), DataError, "0 Hz is outside"),
        ((np.zeros(100), 16000.5), DataError, "a whole number is needed"),
        ((np.zeros(100), "16000"), TypeError, "rate='16000'"),
        ((np.array(["a"]), 16000), TypeError, "dtype"),
        ((np.zeros((16000, 2)), 16000), DataError, "transposed"),
        ((np.zeros(1000 * 8000, np.int8), 8000), DataError, "1000 seconds, the limit is 600"),
        (np.zeros(100), TypeError, "source is ndarray; give the path of a sound file"),
        (None, TypeError, "source is NoneType"),
    ],
)
def test_load_audio_refuses(source, error, message):
    with pytest.raises(error, match=message):
        load_audio(source)


def test_the_limits_can_be_raised():
    wave = np.tile(tone(300, 8000), 700)
    found, _ = load_audio((wave, 8000), limits=Limits(audio_seconds=701))
    assert len(found) == 700 * 8000


# Files


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_files(kind, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    wave = tone(440, 16000)
    path = tmp_path / f"tone.{kind}"
    soundfile.write(path, np.stack([wave, wave], 1), 16000)
    for source in (path, str(path)):
        found, rate = load_audio(source)
        assert rate == 16000 and abs(len(found) - 16000) <= 0 if kind != "mp3" else len(found) >= 16000
    # 16 bits, or a lossy code; an mp3 may begin late
    spectrum = np.abs(np.fft.rfft(found[2000:10000]))
    assert int(spectrum.argmax()) * 2 == 440
    assert abs(np.abs(found[2000:10000]).max() - 0.3) < (1e-4 if kind in ("wav", "flac") else 0.02)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_kinds_of_wav(subtype, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "tone.wav", tone(440, 8000), 8000, subtype=subtype)
    found, _ = load_audio(tmp_path / "tone.wav")
    np.testing.assert_allclose(found, tone(440, 8000), rtol=0, atol=1e-2)  # steps of 8 bits


def test_files_that_are_no_sound(tmp_path):
    pytest.importorskip("soundfile")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is no sound" * 100)
    (tmp_path / "samples.raw").write_bytes(bytes(1000))
    with wave_file.open(str(tmp_path / "none.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
    for name, message in {
        "missing.wav": "there is no such file",
        "": "it is a directory",
        "empty.wav": "the file is empty",
        "text.wav": "not a sound file that can be read",
        "samples.raw": "not a sound file that can be read",
        "none.wav": "the file holds no samples",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            load_audio(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
    if Path("/dev/zero").exists():
        with pytest.raises(DataError, match="not a plain file"):
            load_audio("/dev/zero")


@pytest.mark.parametrize("kind", ["wav", "flac"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_files_that_are_cut_off(kind, share, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / f"sound.{kind}"
    soundfile.write(path, noise(16000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"cut off|not a sound file"):
        load_audio(path)


def test_a_wav_from_a_pipe_is_read(tmp_path):
    """A program that cannot go back to its header leaves the largest length there."""
    pytest.importorskip("soundfile")
    path = write_wav(tmp_path / "sound.wav", tone(300, 16000), 16000)
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(content)
    assert len(load_audio(path)[0]) == 16000


def test_a_wav_with_other_chunks(tmp_path):
    pytest.importorskip("soundfile")
    path = write_wav(tmp_path / "sound.wav", tone(300, 16000), 16000)
    content = path.read_bytes()
    note = b"LIST" + struct.pack("<I", 5) + b"hello\0"  # odd lengths are padded
    longer = content[:4] + struct.pack("<I", len(content) - 8 + len(note)) + content[8:12] + note + content[12:]
    path.write_bytes(longer)
    assert len(load_audio(path)[0]) == 16000
    path.write_bytes(longer[:-100])
    with pytest.raises(DataError, match=r"cut off, its header promises 32000 bytes, 31900 are there"):
        load_audio(path)


def test_a_long_file_is_refused_unread(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "long.flac"
    soundfile.write(path, np.zeros(8000 * 700, np.int16), 8000)
    with pytest.raises(DataError, match=rf"{re.escape(str(path))}: 700 seconds, the limit is 600"):
        load_audio(path)
    assert len(load_audio(path, limits=Limits(audio_seconds=700))[0]) == 5_600_000


def test_without_soundfile(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "sound.wav", tone(300, 16000), 16000)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingExtra, match=r'This needs soundfile: pip install "oral4\[voice\]"'):
        load_audio(path)
    assert load_audio((tone(300, 16000), 16000))[1] == 16000


# Writing


def test_write_and_read(tmp_path):
    wave = tone(440, 22050, amplitude=1.0)
    path = write_wav(tmp_path / "sound.wav", torch.from_numpy(wave), 22050)
    with wave_file.open(str(path), "rb") as file:
        assert file.getparams()[:4] == (1, 2, 22050, 22050)
        samples = np.frombuffer(file.readframes(22050), "<i2")
    np.testing.assert_allclose(samples / 32767, wave, rtol=0, atol=0.5 / 32767 + 1e-7)  # half a step


def test_what_is_written_never_clips(tmp_path):
    wave = tone(100, 16000, amplitude=1.4)
    path = write_wav(tmp_path / "loud.wav", wave, 16000)
    with wave_file.open(str(path), "rb") as file:
        samples = np.frombuffer(file.readframes(16000), "<i2") / 32767
    assert np.abs(samples).max() <= 1
    quiet = np.abs(wave) < 0.9
    np.testing.assert_allclose(samples[quiet], wave[quiet], rtol=0, atol=0.5 / 32767 + 1e-7)
    assert (np.sign(samples[~quiet]) == np.sign(wave[~quiet])).all()  # nothing wraps round


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_soft_limit(values):
    wave = np.sort(np.array(values))
    bent = soft_limit(wave)
    assert np.abs(bent).max() <= 1
    assert (np.diff(bent) >= 0).all()  # order is kept
    inside = np.abs(wave) <= 0.9
    assert (bent[inside] == wave[inside]).all()


def test_soft_limit_has_no_corner():
    around = np.array([0.9 - 1e-6, 0.9, 0.9 + 1e-6])
    slopes = np.diff(soft_limit(around)) / 1e-6
    np.testing.assert_allclose(slopes, 1, rtol=1e-4)  # tanh starts with slope 1; the next term is cubic
    with pytest.raises(ValueError, match=r"knee=1\.0, ceiling=1\.0"):
        soft_limit(around, knee=1.0)


@pytest.mark.parametrize(
    ("wave", "rate", "error", "message"),
    [
        (np.zeros(5, np.int16), 16000, TypeError, "int16"),
        (np.zeros((2, 5)), 16000, ValueError, r"shape \(2, 5\)"),
        (np.zeros(0), 16000, ValueError, "not empty"),
        (np.array([np.nan, 0.0]), 16000, ValueError, "1 samples are NaN"),
        (np.zeros(5), 0, ValueError, "rate=0"),
        (np.zeros(5), 8000.5, ValueError, r"rate=8000\.5"),
    ],
)
def test_write_wav_refuses(wave, rate, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_wav(tmp_path / "x.wav", wave, rate)
    assert not list(tmp_path.iterdir())


def test_write_wav_to_nowhere(tmp_path):
    with pytest.raises(DataError, match="cannot be written: No such file or directory"):
        write_wav(tmp_path / "missing" / "x.wav", np.zeros(5), 16000)


# Spectral subtraction


@pytest.mark.parametrize("smoothing", [5, 1])
def test_spectral_subtraction_is_the_official(smoothing):
    synth, source = torch.from_numpy(GOLDEN["synth"]), torch.from_numpy(GOLDEN["mel"])
    found = spectral_subtraction(synth, source, smoothing=smoothing, compat=True)
    np.testing.assert_allclose(found, GOLDEN[f"denoised_w{smoothing}"], rtol=0, atol=1e-4)
    corrected = spectral_subtraction(synth, source, smoothing=smoothing)
    assert float((corrected - found).abs().max()) > 0.1  # the shift by a band is no detail


def by_loops(synth, source, smoothing, compat):
    """The official formulas, written out with loops; the two slips corrected unless compat."""
    energy = np.exp(2 * synth.double().numpy())
    stretches = range(source.shape[1] - (5 if compat else 4))
    quiet = [np.exp(2 * source.double().numpy())[:, i : i + 5].sum() for i in stretches]
    first = int(np.argmin(quiet))
    found = energy[:, first : first + 5].min(1)
    noise_energy = found.copy()
    for band in range(len(found)):
        around = [found[min(max(i, 0), len(found) - 1)] for i in range(band - smoothing, band + smoothing + 1)]
        here = found[min(band + 1, len(found) - 1)] if compat else found[band]
        noise_energy[band] = min(here, np.median(around))
    return 0.5 * np.log(np.maximum(energy - noise_energy[:, None], 0.02 * noise_energy[:, None]))


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("smoothing", [1, 3, 5])
def test_spectral_subtraction_against_loops(smoothing, compat):
    generator = torch.Generator().manual_seed(smoothing)
    for frames in (6, 9, 30):
        synth, source = torch.randn(2, 20, frames, generator=generator) - 3
        found = spectral_subtraction(synth, source, smoothing=smoothing, compat=compat)
        # float64 inside, rounded to float32 once
        np.testing.assert_allclose(found, by_loops(synth, source, smoothing, compat), rtol=0, atol=2e-6)


def test_noise_goes_and_speech_stays():
    source = torch.full((80, 40), -1.0)
    source[:, 35:] = -10  # the quiet stretch is the last one, which the official code does not try
    speech = 2 * torch.randn(80, 40, generator=torch.Generator().manual_seed(0))
    noise_level = -3.0
    synth = torch.logaddexp(2 * speech * (source > -5) - 100 * (source < -5), torch.tensor(2 * noise_level)) / 2
    clean = spectral_subtraction(synth, source)
    loud = speech[:, :35] > -1
    torch.testing.assert_close(clean[:, :35][loud], speech[:, :35][loud], rtol=0, atol=1e-4)
    # what stays of the noise is its floor: 2 percent of the energy
    left = torch.full((80, 5), noise_level + 0.5 * math.log(0.02))
    torch.testing.assert_close(clean[:, 35:], left, rtol=0, atol=1e-4)


def test_spectral_subtraction_of_few_frames_and_tiny_values():
    for frames in (1, 2, 5):
        found = spectral_subtraction(torch.full((80, frames), -60.0), torch.zeros(80, frames))
        torch.testing.assert_close(found, torch.full((80, frames), -60 + 0.5 * math.log(0.02)), rtol=0, atol=1e-5)
    untouched = spectral_subtraction(torch.zeros(80, 9), torch.zeros(80, 9), smoothing=None)
    assert untouched.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [{"source": torch.zeros(80, 8)}, {"floor": 0.0}, {"floor": 1.1}, {"silence_window": 0}, {"smoothing": -1}],
)
def test_spectral_subtraction_refuses(change):
    arguments = {"synth": torch.zeros(80, 9), "source": torch.zeros(80, 9)} | change
    with pytest.raises(ValueError, match="spectral_subtraction: "):
        spectral_subtraction(**arguments)


def test_own_preset():
    preset = MelPreset(name="odd", rate=24000, n_fft=600, win=500, hop=130, num_mels=20, fmin=50.0, fmax=11000.0)
    found = log_mel(noise(1300), preset)
    assert found.shape == (20, 10)
    np.testing.assert_allclose(found, reference(noise(1300), preset), rtol=0, atol=2e-3)
