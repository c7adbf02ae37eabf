"""Vocoders: official waves, projections that project, weights that fit or are refused, short and broken mels."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc.audio import PRESETS, log_mel, mel_basis
from oral4.diffvc.vocoder import (
    Frames,
    GriffinLim,
    HifiGan,
    HifiGanConfig,
    Vocoder,
    fold_weight_norm,
    griffin_lim,
    griffin_lim_official,
    load_official_generator,
    mel_to_magnitude,
)
from oral4.errors import CheckpointError

GOLDENS = Path(__file__).parents[1] / "goldens/diffvc"
PREVIEW = np.load(GOLDENS / "griffinlim.npz")
GENERATOR = np.load(GOLDENS / "hifigan.npz")
NAMES = list(PRESETS)
# The official code takes 80 bands whatever its file says; the file of this small generator says 8.
CONFIG = json.loads(str(GENERATOR["config"])) | {"num_mels": 80}


def weights():
    return {key[2:]: torch.from_numpy(GENERATOR[key]).float() for key in GENERATOR.files if key.startswith("w.")}


def generator():
    return load_official_generator(HifiGan(HifiGanConfig.from_json(CONFIG)), weights()).eval()


def vowel(rate=16000, seconds=1.0, pitch=120.0):
    """A glottal pulse train through three resonances: harmonics, formants, a glide."""
    time_s = np.arange(int(rate * seconds)) / rate
    phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.2 * np.sin(2 * np.pi * time_s))) / rate
    wave = np.zeros_like(time_s)
    for k in range(1, int(rate / 2 / pitch / 1.3)):
        gain = sum(1 / (1 + ((k * pitch - formant) / 120) ** 2) for formant in (700, 1200, 2600))
        wave += gain * np.sin(k * phase)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def convergence(spectrum, magnitude):
    return float((spectrum.abs() - magnitude).norm() / magnitude.norm())


# Bands to bins


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inverse", ["kl", "nnls", "pinv"])
def test_magnitudes_have_the_bands(name, inverse):
    mel = log_mel(vowel(PRESETS[name].rate), name)
    found = mel_to_magnitude(mel, name, inverse=inverse)
    assert found.shape == (PRESETS[name].n_fft // 2 + 1, mel.shape[1]) and (found >= 0).all()
    bands = (torch.from_numpy(mel_basis(name)) @ found).clamp(min=1e-5).log()
    # only the divergence looks at quiet bands; a squared error, and a pseudo-inverse that is clipped, miss them more
    assert float((bands - mel).abs().mean()) < (0.05 if inverse == "kl" else 0.2)


@pytest.mark.parametrize(("inverse", "loss"), [("kl", "kl"), ("nnls", "square")])
def test_updates_descend(inverse, loss):
    """Lee and Seung's theorem: no update makes its divergence larger."""
    mel = log_mel(vowel(), "speech-16k")
    basis, bands = torch.from_numpy(mel_basis("speech-16k")).double(), mel.double().exp()
    values = []
    for updates in range(12):
        heard = basis @ mel_to_magnitude(mel, updates=updates, inverse=inverse).double()
        values.append(
            float(((bands - heard) ** 2).sum())
            if loss == "square"
            else float((bands * (bands / heard).log() - bands + heard).sum())
        )
    values = np.array(values)
    assert (np.diff(values) <= 1e-6 * values[0]).all()  # float32 inside
    assert values[-1] < 0.5 * values[0]


def test_bins_that_no_band_sees_stay_empty():
    found = mel_to_magnitude(torch.zeros(80, 4), "hifigan-22k")
    unseen = torch.from_numpy(mel_basis("hifigan-22k").sum(0) == 0)
    assert int(unseen.sum()) > 100 and not found[unseen].any()


# Frames


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(NAMES), st.integers(1, 12), st.integers(0, 9))
def test_synthesis_inverts_analysis(name, num_frames, seed):
    frames = Frames(name, num_frames, dtype=torch.float64)
    wave = torch.randn(frames.num_samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(frames.synthesise(frames.analyse(wave)), wave, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 6])
def test_synthesis_is_the_least_squares_solution(name, num_frames):
    """Against the pseudo-inverse of the whole analysis as a matrix, the reflection included."""
    frames = Frames(name, num_frames, dtype=torch.float64)
    impulses = torch.eye(frames.num_samples, dtype=torch.float64)
    win = frames.preset.win
    analysis = torch.fft.irfft(frames.analyse(impulses), n=frames.preset.n_fft)[..., :win].flatten(1)  # rows: samples
    target = torch.randn(num_frames, win, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = frames.synthesise(torch.fft.rfft(target, n=frames.preset.n_fft))
    expected = torch.linalg.lstsq(analysis.T, target.flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_of_the_log_mel(name):
    num_frames = 70
    wave = torch.from_numpy(vowel(PRESETS[name].rate))[: num_frames * PRESETS[name].hop]
    spectrum = Frames(name, num_frames).analyse(wave)
    mel = (torch.from_numpy(mel_basis(name)) @ (spectrum.abs().square() + 1e-9).sqrt().T).clamp(min=1e-5).log()
    torch.testing.assert_close(mel, log_mel(wave, name), rtol=0, atol=1e-3)  # float32 near the floor


# Griffin-Lim


def test_previews_are_the_official():
    found = griffin_lim_official(torch.from_numpy(PREVIEW["log_mel"]), iterations=4)
    assert found.shape == PREVIEW["wav_4iter"].shape
    # where a magnitude is small, float32 errors of the pseudo-inverse turn its phase; the wave reaches 0.8
    np.testing.assert_allclose(found, PREVIEW["wav_4iter"], rtol=0, atol=1e-3)


def test_without_momentum_the_projections_descend():
    """Griffin and Lim's theorem: the distance between the spectrum and its magnitudes never grows."""
    mel = log_mel(vowel())
    magnitude = mel_to_magnitude(mel).T
    frames = Frames("speech-16k", mel.shape[1])
    distance = [
        float((frames.analyse(torch.from_numpy(griffin_lim(mel, iterations=n, momentum=0.0))).abs() - magnitude).norm())
        for n in range(1, 25)
    ]
    assert (np.diff(distance) <= 1e-5 * distance[0]).all()  # float32
    assert distance[-1] < 0.7 * distance[0]


def test_momentum_is_faster():
    mel = log_mel(vowel())
    magnitude = mel_to_magnitude(mel).T
    frames = Frames("speech-16k", mel.shape[1])
    plain, fast = (
        convergence(frames.analyse(torch.from_numpy(griffin_lim(mel, momentum=momentum))), magnitude)
        for momentum in (0.0, 0.99)
    )
    assert fast < 0.9 * plain


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    """The log-mel of the wave is the log-mel that it was made from, within what bands and phases allow."""
    mel = log_mel(vowel(PRESETS[name].rate), name)
    wave = griffin_lim(mel, name)
    assert wave.shape == (mel.shape[1] * PRESETS[name].hop,) and wave.dtype == np.float32
    assert float((log_mel(wave, name) - mel).abs().mean()) < 0.35
    assert abs(20 * np.log10(wave.std() / vowel(PRESETS[name].rate).std())) < 2  # dB
    shuffled = mel[:, torch.randperm(mel.shape[1], generator=torch.Generator().manual_seed(0))]
    assert float((log_mel(wave, name) - shuffled).abs().mean()) > 0.35  # and the test can fail


def test_one_iteration_keeps_the_level():
    """Momentum in the last step would nearly double it."""
    mel = log_mel(vowel())
    assert griffin_lim(mel, iterations=1).std() < vowel().std() * 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 3])
def test_few_frames(name, num_frames, seed):
    mel = torch.linspace(-6, 0, PRESETS[name].num_mels)[:, None].expand(-1, num_frames)
    wave = griffin_lim(mel, name, seed=seed)
    assert wave.shape == (num_frames * PRESETS[name].hop,) and np.isfinite(wave).all() and wave.std() > 1e-3


@pytest.mark.parametrize("inverse", ["kl", "nnls", "pinv"])
def test_silence_stays_silent(inverse):
    silence = log_mel(np.zeros(16000, np.float32))
    assert np.abs(griffin_lim(silence, inverse=inverse)).max() < 1e-3
    less = torch.full((80, 50), -12.0)  # no wave has less than log 1e-5, about -11.5
    lifted = griffin_lim(less, inverse=inverse)
    assert np.abs(lifted).max() < 1e-3 and (griffin_lim(less - 100, inverse=inverse) == lifted).all()


def test_a_batch_equals_its_items():
    mels = torch.stack([log_mel(vowel(pitch=pitch)) for pitch in (100.0, 180.0)])
    for seed in (None, 0):
        together = griffin_lim(mels, iterations=4, seed=seed)
        assert together.shape == (2, 16000)
        for row in range(2):
            # the iteration amplifies differences of float32 sums, as the matrix product of a batch is another one
            alone = griffin_lim(mels[row], iterations=4, seed=seed)
            np.testing.assert_allclose(together[row], alone, rtol=0, atol=2e-4)


def test_seeds():
    mel = log_mel(vowel())
    state = torch.get_rng_state()
    first, again, other, zero = (griffin_lim(mel, iterations=4, seed=seed) for seed in (1, 1, 2, None))
    assert (first == again).all() and np.abs(first - other).max() > 0.01 and np.abs(first - zero).max() > 0.01
    assert (griffin_lim(mel, iterations=4) == zero).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert (griffin_lim(mel.numpy(), iterations=4) == zero).all()


def test_griffin_lim_is_fast_enough():
    mel = log_mel(vowel(seconds=4))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        griffin_lim(mel[:, :20])
        seconds = []
        for _ in range(3):
            start = time.process_time()  # of this process: neighbours on the machine do not count
            griffin_lim(mel)
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) / 4 < 0.2


@pytest.mark.parametrize(
    ("mel", "error", "message"),
    [
        (torch.zeros(40, 5), ValueError, r"shape \(40, 5\).*F = 80 bands of speech-16k"),
        (torch.zeros(80, 0), ValueError, "at least one frame"),
        (torch.zeros(80), ValueError, r"shape \(80,\)"),
        (torch.full((80, 5), torch.nan), ValueError, "400 values of mel are NaN or infinite; the model .* diverged"),
        (torch.full((80, 5), torch.inf), ValueError, "NaN or infinite"),
        (torch.full((80, 5), 31.0), ValueError, "mel reaches 31"),
        (torch.zeros(80, 5, dtype=torch.int64), TypeError, "int64"),
    ],
)
def test_griffin_lim_refuses_mels(mel, error, message):
    with pytest.raises(error, match=message):
        griffin_lim(mel)
    with pytest.raises(error, match=message):
        GriffinLim().vocode(mel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"iterations": 2.5}, r"iterations=2\.5"),
        ({"iterations": True}, "iterations=True"),
        ({"momentum": -0.1}, r"momentum=-0\.1"),
        ({"momentum": 1.2}, r"momentum=1\.2"),
        ({"momentum": float("nan")}, "momentum=nan"),
        ({"inverse": "lu"}, "inverse='lu' is unknown; choose one of kl, nnls, pinv"),
        ({"preset": "44k"}, "preset='44k'"),
    ],
)
def test_griffin_lim_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        griffin_lim(torch.zeros(80, 5), **arguments)
    with pytest.raises(ValueError, match="updates=-1"):
        mel_to_magnitude(torch.zeros(80, 5), updates=-1)
    with pytest.raises(ValueError, match="T >= 2"):
        griffin_lim_official(torch.zeros(80, 1))


def test_the_vocoder_stays_below_one():
    loud = log_mel(vowel()) + 2  # e^2 times as loud
    assert np.abs(griffin_lim(loud)).max() > 1
    wave = GriffinLim().vocode(loud)
    assert np.abs(wave).max() <= 1 and wave.dtype == np.float32
    quiet = log_mel(vowel()) - 1
    assert (GriffinLim(seed=1).vocode(quiet) == griffin_lim(quiet, seed=1)).all()


def test_both_are_vocoders():
    assert isinstance(GriffinLim(), Vocoder) and isinstance(HifiGan(HifiGanConfig.mini()), Vocoder)
    assert not isinstance(object(), Vocoder)


# HiFi-GAN


def test_the_generator_is_the_official():
    with torch.no_grad():
        found = generator()(torch.from_numpy(GENERATOR["x"]))
    np.testing.assert_allclose(found, GENERATOR["y"][:, 0], rtol=2e-4, atol=2e-5)
    assert float(np.abs(GENERATOR["y"]).max()) > 0.1


def test_paper_size():
    with torch.device("meta"):
        model = HifiGan(HifiGanConfig.paper())
    assert sum(p.numel() for p in model.parameters()) == 13_926_017
    assert model.preset is PRESETS["hifigan-22k"]


@pytest.mark.parametrize(
    "config",
    [
        HifiGanConfig.mini(),
        HifiGanConfig(channels=16, block=2, block_kernels=(3, 5), block_dilations=((1, 2), (2, 6))),
        HifiGanConfig(preset=PRESETS["speech-16k"], channels=16, rates=(10, 5, 4), kernels=(16, 11, 8)),
        HifiGanConfig(
            preset=PRESETS["digits-8k"],
            channels=8,
            rates=(5, 5, 4),
            kernels=(5, 11, 4),
            block_kernels=(3,),
            block_dilations=((1,),),
        ),
    ],
    ids=["V1", "two dilations", "16k", "8k"],
)
def test_the_reach_is_exact(config):
    """A frame one step further cannot touch any sample of the middle hop; the outermost one does."""
    torch.manual_seed(0)
    model = HifiGan(config).double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 0.01, 0.02)  # positive: nothing cancels and no unit is off
    middle, hop = config.reach + 2, config.preset.hop
    mel = torch.rand(1, config.preset.num_mels, 2 * middle + 1, dtype=torch.float64, requires_grad=True)
    (touched,) = torch.autograd.grad(model(mel)[0, middle * hop : (middle + 1) * hop].sum(), mel)
    frames = touched[0].abs().sum(0).nonzero().flatten() - middle
    assert int(frames.abs().max()) == config.reach


@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
def test_pieces_are_the_whole(chunk):
    model = generator()
    mel = torch.randn(80, 41, generator=torch.Generator().manual_seed(0)) - 4
    whole = model(mel[None])[0].detach().numpy()
    found = model.vocode(mel, chunk=chunk)
    assert found.shape == (41 * 256,) and found.dtype == np.float32
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)  # convolutions of other lengths add in another order
    with pytest.raises(ValueError, match="chunk=0"):
        model.vocode(mel, chunk=0)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_generator_of_few_frames(frames):
    wave = generator().vocode(torch.zeros(80, frames))
    assert wave.shape == (256 * frames,) and np.abs(wave).max() <= 1


def test_generator_refuses_mels():
    with pytest.raises(ValueError, match="F = 80 bands of hifigan-22k"):
        generator().vocode(torch.zeros(40, 5))
    with pytest.raises(ValueError, match="vocode batches one by one"):
        generator().vocode(torch.zeros(1, 80, 5))
    with pytest.raises(ValueError, match="diverged"):
        generator().vocode(torch.full((80, 5), torch.nan))


def normalised(state, naming):
    """The state as weight normalisation would hold it: a length and a direction of another length."""
    out = {}
    for key, value in state.items():
        if not key.endswith(".weight"):
            out[key] = value
            continue
        length = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.dim() - 1))
        stem = key.removesuffix("weight")
        if naming == "old":
            out[stem + "weight_g"], out[stem + "weight_v"] = length, 3.7 * value
        else:
            out[stem + "parametrizations.weight.original0"] = length
            out[stem + "parametrizations.weight.original1"] = 3.7 * value
    return out


@pytest.mark.parametrize("naming", ["old", "new"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_with_weight_norm(naming, wrapped, tmp_path):
    state = normalised(weights(), naming)
    torch.save({"generator": state} if wrapped else state, tmp_path / "g_02500000")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = HifiGan.from_checkpoint(tmp_path / "g_02500000", preset="hifigan-22k")
    assert not model.training
    for key, value in weights().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-9)
    explicit = HifiGan.from_checkpoint(str(tmp_path / "g_02500000"), tmp_path / "config.json")
    assert explicit.config == model.config == HifiGanConfig.from_json(CONFIG)


def test_weight_norm_folds_as_torch_does():
    torch.manual_seed(0)
    for layer in (torch.nn.Conv1d(3, 5, 7), torch.nn.ConvTranspose1d(4, 6, 8)):
        weight = layer.weight.detach().clone()
        wrapped = torch.nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            wrapped.parametrizations.weight.original0.mul_(1.5)
        folded = fold_weight_norm(wrapped.state_dict())
        torch.testing.assert_close(folded["weight"], 1.5 * weight, rtol=1e-5, atol=1e-7)
        assert set(folded) == {"weight", "bias"}


@pytest.mark.parametrize("lost", ["weight_g", "weight_v"])
def test_half_a_weight_is_refused(lost):
    state = normalised(weights(), "old")
    del state[f"ups.1.{lost}"]
    with pytest.raises(CheckpointError, match=rf"ups\.1\.{lost} is not: the checkpoint is incomplete"):
        load_official_generator(HifiGan(HifiGanConfig.from_json(CONFIG)), state)


def broken(change):
    state = weights()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (broken(lambda s: s.pop("conv_post.bias")), r"1 parameters are missing, the first is conv_post\.bias; 0 are"),
        (broken(lambda s: s.update(extra=torch.zeros(1))), "0 parameters are missing; 1 are unknown, the first is ext"),
        (broken(lambda s: s.update({"conv_pre.bias": torch.zeros(9)})), r"conv_pre\.bias is \(9,\) in the checkpoint"),
        (broken(lambda s: s["conv_pre.weight"].fill_(torch.nan)), r"conv_pre\.weight holds NaN"),
        ({}, "holds no generator"),
        ({"generator": {}}, "holds no generator"),
        ({"steps": 3}, "holds no generator"),
        (torch.zeros(3), "holds no generator"),
    ],
)
def test_weights_that_do_not_fit(state, message):
    model = HifiGan(HifiGanConfig.from_json(CONFIG))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_official_generator(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_checkpoint_files_that_are_none(tmp_path):
    torch.save(weights(), tmp_path / "good.pt")
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").touch()
    config = HifiGanConfig.from_json(CONFIG)
    for name, message in {
        "missing.pt": "there is no such file",
        "": "there is no such file",
        "cut.pt": "not a checkpoint that can be read",
        "text.pt": "not a checkpoint that can be read",
        "empty.pt": "not a checkpoint that can be read",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            HifiGan.from_checkpoint(tmp_path / name, config)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        HifiGan.from_checkpoint(tmp_path / "good.pt")
    with pytest.raises(CheckpointError, match="made for hifigan-22k, not for speech-16k: rate 22050, not 16000"):
        HifiGan.from_checkpoint(tmp_path / "good.pt", config, preset="speech-16k")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_rate": None}, "config: int"),
        ({"upsample_rates": [8, 8, 2]}, r"rates \(8, 8, 2\) multiply to 128, the hop is 256"),
        ({"resblock": "3"}, "block=3; 1 or 2 is needed"),
        ({"upsample_kernel_sizes": [16, 16, 4, 5]}, "kernel - rate must be even"),
        ({"upsample_kernel_sizes": [16, 16, 4]}, "one kernel for every rate"),
        ({"resblock_kernel_sizes": [3, 7, 10]}, "odd ones are needed"),
        ({"upsample_initial_channel": 24}, "cannot be halved 4 times"),
        ({"fmax": 12000}, "fmin < fmax <= rate / 2"),
    ],
)
def test_configs_that_do_not_fit(change, message):
    with pytest.raises(CheckpointError, match=message):
        HifiGanConfig.from_json(CONFIG | change)


def test_config_files(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON file"):
        HifiGanConfig.from_json(tmp_path / "bad.json")
    short = {key: value for key, value in CONFIG.items() if key != "hop_size"}
    with pytest.raises(CheckpointError, match="no entry 'hop_size'"):
        HifiGanConfig.from_json(short)
    other = HifiGanConfig.from_json(CONFIG | {"sampling_rate": 24000})
    assert other.preset == replace(PRESETS["hifigan-22k"], name="hifigan-24000", rate=24000)
