"""One call from two recordings to a third: what comes out, what is refused, and that windows do not matter."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oral4.data.limits import Limits
from oral4.diffusion.sde import VP
from oral4.diffusion.solvers import sample
from oral4.diffvc.align import PHONES, espeak_say
from oral4.diffvc.audio import AudioWarning, load_audio, prepare_wave, resample, write_wav
from oral4.diffvc.compact import CompactConfig, CompactDecoder, ContentEncoder, Voice
from oral4.diffvc.convert import (
    Converter,
    Heard,
    VoicePrint,
    Windowed,
    convert,
    cross_fade,
    frame_reach,
    shipped_converter,
    windows,
)
from oral4.diffvc.corpus import speech_rms
from oral4.diffvc.model import DiffVC
from oral4.diffvc.speaker import SpeakerEncoder
from oral4.errors import CheckpointError, DataError

WORDS = "The river was still high after a week of rain."


def far_sighted(**config):
    """Return a score network whose blocks, which start as the identity, have weights that carry."""
    torch.manual_seed(0)
    decoder = CompactDecoder(CompactConfig(score_channels=16, **config))
    for name, weight in decoder.named_parameters():
        if "contract" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return decoder.eval()


@pytest.fixture(scope="module")
def converter():
    return shipped_converter("cpu")


@pytest.fixture(scope="module")
def her():
    return espeak_say(WORDS, "en-us+f2", pitch=60)[:2]


@pytest.fixture(scope="module")
def his():
    return espeak_say("It is a pleasure to watch good people work, and better to help.", "en-us+m5", pitch=30)[:2]


@pytest.fixture(scope="module")
def target(converter, his):
    return converter.voice_print(his)


def test_the_outcome_has_the_words_length_and_the_voice(converter, her, his, target):
    found = converter.convert(her, target)
    assert found.rate == 16_000 and found.wave.dtype == np.float32
    assert abs(found.seconds - len(her[0]) / her[1]) < 0.0125  # one frame
    assert np.abs(found.wave).max() <= 1
    judge = SpeakerEncoder.from_resemblyzer()  # took no part in the conversion
    point, asked, said = (torch.as_tensor(judge.embed(wave, rate)) for wave, rate in ((found.wave, 16_000), his, her))
    assert float(point @ asked) > float(point @ said)


def test_the_same_seed_gives_the_same_sound_and_another_another(converter, her, target):
    one, two, three = (converter.convert(her, target, steps=2, seed=seed) for seed in (4, 4, 5))
    assert np.array_equal(one.wave, two.wave)
    assert not torch.allclose(one.mel, three.mel)


def test_global_randomness_is_neither_used_nor_changed(converter, her, target):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = converter.convert(her, target, steps=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(one.mel, converter.convert(her, target, steps=2).mel)


def test_windows_do_not_matter(converter, target):
    wave, rate = espeak_say(" ".join([WORDS] * 4), "en-us+f2")[:2]
    whole = converter.convert((wave, rate), target, steps=2, window_s=60.0)
    parts = converter.convert((wave, rate), target, steps=2, window_s=4.0)
    # the score sees 49 frames to each side, a quarter of the overlap are 50: only rounding is left, a few 1e-6 of
    # numbers around 10, times the factor 150 by which two steps carry it
    assert len(windows(whole.mel.shape[1], 320, 200)) > 3
    assert float((whole.mel - parts.mel).abs().max()) < 5e-3


def test_windows_do_not_matter_with_any_number_of_steps():
    """In double precision and with weights that carry far, for one score and for twenty steps of it."""
    decoder = far_sighted(score_blocks=8, phones=True).double().requires_grad_(False)
    xbar, x, g = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 80, 700), (1, 80, 700), (1, 96)))
    mask, t = torch.ones(1, 1, 700, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    content = torch.randn(1, len(PHONES), 700, dtype=torch.float64).softmax(1)
    reach = frame_reach(decoder)
    assert reach == 49
    parts = Windowed(decoder, 320, 4 * reach)
    assert torch.allclose(
        decoder(x, mask, xbar, g, t, content), parts(x, mask, xbar, g, t, content=content), atol=1e-12
    )
    too_close = Windowed(decoder, 320, 2 * reach)  # and the margin is not larger than it must be by much
    difference = decoder(x, mask, xbar, g, t, content) - too_close(x, mask, xbar, g, t, content=content)
    assert float(difference.abs().max()) > 1e-6

    def run(score):
        return sample(lambda y, s: score(y, mask, xbar, g, s, content=content), x, VP(), 20, solver="pf", xbar=xbar)

    assert torch.allclose(run(decoder), run(parts), atol=1e-9)


@pytest.mark.parametrize(("blocks", "wanted"), [(1, 4), (2, 10), (3, 22), (8, 49)])
def test_the_reach_is_how_far_a_change_is_felt(blocks, wanted):
    decoder = far_sighted(score_blocks=blocks).double()
    x = torch.randn(1, 80, 201, dtype=torch.float64, requires_grad=True)
    mask, g, t = torch.ones(1, 1, 201).double(), torch.zeros(1, 96).double(), torch.full((1,), 0.5).double()
    decoder(x, mask, torch.zeros_like(x), g, t)[0, :, 100].sum().backward()
    felt = torch.nonzero(x.grad[0].abs().sum(0)).flatten()
    assert frame_reach(decoder) == wanted == 100 - int(felt.min()) == int(felt.max()) - 100
    assert frame_reach(Voice(CompactConfig())) is None


def test_a_decoder_with_a_long_sight_gets_a_long_overlap(converter):
    model = DiffVC(converter.model.encoder, far_sighted(score_blocks=16), preset="speech-16k")
    far = Converter(model, converter.voice, name="far", device="cpu")
    assert converter._overlap() == 200 and far._overlap() == 4 * 97


def test_long_sound_leaves_the_model_as_it_was(converter, target):
    wave, rate = espeak_say(" ".join([WORDS] * 2), "en-us+f2")[:2]
    decoder = converter.model.decoder
    converter.convert((wave, rate), target, steps=1, window_s=4.0)
    assert converter.model.decoder is decoder and not any(part.training for part in converter.model.modules())


def test_more_noise_less_noise(converter, her, target):
    quiet = converter.convert(her, target, steps=4, temperature=0.0, seed=1)
    also = converter.convert(her, target, steps=4, temperature=0.0, seed=2)
    assert torch.allclose(quiet.mel, also.mel, atol=1e-4)


@pytest.mark.parametrize("solver", ["em", "pf", "ml", "ddim", "heun", "dpmpp_2m", "unipc_2"])
def test_every_solver_is_accepted(converter, her, target, solver):
    found = converter.convert(her, target, steps=4, solver=solver)
    assert bool(found.mel.isfinite().all())


def test_loudness_follows_the_source(converter, her, target):
    source = prepare_wave(her)
    loud, soft = ((gain * source / speech_rms(source, 16_000), 16_000) for gain in (0.05, 0.005))
    for said, rms in ((loud, 0.05), (soft, 0.005)):
        found = converter.convert(said, target, steps=2)
        assert speech_rms(found.wave, 16_000) == pytest.approx(rms, rel=1e-4)
    plain, also = (converter.convert(said, target, steps=2, keep_level=False).wave for said in (loud, soft))
    # both are brought to one level before anything else: what differs is the floor of the log-mel near silence
    assert speech_rms(plain, 16_000) == pytest.approx(speech_rms(also, 16_000), rel=0.01)


def test_loudness_ends_where_peaks_reach_full_scale(converter, her, target):
    """A source of a square wave's crest is louder than any speech can be: the outcome is scaled, not cut."""
    hot = np.sign(her[0]) * np.abs(her[0]) ** 0.2
    found = converter.convert((0.999 * hot / np.abs(hot).max(), her[1]), target, steps=2)
    soft = converter.convert((0.01 * hot / np.abs(hot).max(), her[1]), target, steps=2)
    assert np.abs(found.wave).max() == pytest.approx(0.99, abs=1e-3)
    assert np.corrcoef(found.wave, soft.wave)[0, 1] > 0.99


# ---- voice prints -----------------------------------------------------------------------------------------------


def test_a_print_survives_the_disk(converter, her, target, tmp_path):
    again = VoicePrint.load(target.save(tmp_path / "his.voice"))
    assert torch.equal(again.embedding, target.embedding)
    assert torch.equal(converter.convert(her, again, steps=2).mel, converter.convert(her, target, steps=2).mel)


def test_two_recordings_make_one_print(converter, his):
    more = espeak_say("Do you know where the measuring spoons are?", "en-us+m5", pitch=30)[:2]
    both = converter.voice_print(his, more)
    frames = both.parts[0][1].mel.shape[1]
    singles = [converter.voice_print(each).parts[0][1].mel for each in (his, more)]
    assert frames == sum(mel.shape[1] for mel in singles)
    assert torch.equal(both.parts[0][1].mel, torch.cat(singles, 1))
    assert converter.voice_print(his, longest_s=1.0).parts[0][1].mel.shape[1] == 80


def test_a_mixture_lies_between(converter, her, his, target):
    other = converter.voice_print(her)
    assert target.mixed(other, 0.0).parts == target.parts
    assert target.mixed(other, 1.0).parts == other.parts
    half = target.mixed(other, 0.5)
    ends, middle = float(target.embedding @ other.embedding), float(half.embedding @ target.embedding)
    assert middle > ends and middle == pytest.approx(float(half.embedding @ other.embedding), abs=1e-5)
    prior = converter.convert(her, half, steps=2).prior
    between = 0.5 * (converter.convert(her, target, steps=2).prior + converter.convert(her, other, steps=2).prior)
    assert torch.allclose(prior, between, atol=1e-4)


def test_shares_and_strangers_are_refused(converter, her, target):
    with pytest.raises(ValueError, match=r"share=1\.5"):
        target.mixed(target, 1.5)
    stranger = VoicePrint(target.parts, "hifigan-22k", "vc_vctk_wodyn")
    with pytest.raises(ValueError, match="make both with one converter"):
        target.mixed(stranger, 0.5)
    with pytest.raises(ValueError, match="make the print again with this converter"):
        converter.convert(her, stranger)
    with pytest.raises(TypeError, match="make a VoicePrint"):
        converter.convert(her, her)
    with pytest.raises(ValueError, match="no reference"):
        converter.voice_print()


def test_prints_that_make_no_sense_are_refused(target):
    heard = target.parts[0][1]
    for weights in ([], [0.5], [1.5, -0.5], [float("nan")]):
        with pytest.raises(ValueError, match="positive ones that sum to one"):
            VoicePrint(tuple((weight, heard) for weight in weights), "speech-16k", "voices")
    with pytest.raises(ValueError, match=r"give \(F, R\) and \(E,\)"):
        VoicePrint(((1.0, Heard(heard.mel[None], heard.embedding)),), "speech-16k", "voices")
    with pytest.raises(ValueError, match="NaN or infinite"):
        VoicePrint(((1.0, Heard(heard.mel, heard.embedding * np.nan)),), "speech-16k", "voices")


@pytest.mark.parametrize(
    "header",
    [
        "no json",
        "[]",
        '{"weights": [1.0]}',
        '{"weights": [0.4], "preset": "speech-16k", "converter": "voices"}',
        '{"weights": [0.5, 0.5], "preset": "speech-16k", "converter": "voices"}',
        '{"weights": 1, "preset": "speech-16k", "converter": "voices"}',
    ],
)
def test_damaged_headers_are_data_errors(tmp_path, header):
    tensors = {"0.mel": torch.zeros(80, 3), "0.embedding": torch.zeros(256)}
    save_file(tensors, tmp_path / "x.voice", {"oral4": "voice print", "header": header})
    with pytest.raises(DataError, match="cannot be read as a voice print"):
        VoicePrint.load(tmp_path / "x.voice")


def test_files_that_are_no_prints(tmp_path):
    with pytest.raises(DataError, match="cannot be read as a voice print"):
        VoicePrint.load(tmp_path / "absent.voice")
    (tmp_path / "text.voice").write_text("not a print")
    with pytest.raises(DataError, match="cannot be read as a voice print"):
        VoicePrint.load(tmp_path / "text.voice")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.voice")
    with pytest.raises(DataError, match="no voice print"):
        VoicePrint.load(tmp_path / "other.voice")


# ---- one call ---------------------------------------------------------------------------------------------------


def test_one_call_takes_paths_arrays_lists_and_prints(her, his, target, tmp_path):
    path = write_wav(tmp_path / "his.wav", *his)
    by_array, by_print = convert(her, his, steps=2), convert(her, target, steps=2)
    assert torch.equal(by_array.mel, by_print.mel)
    assert torch.allclose(convert(her, path, steps=2).mel, by_array.mel, atol=0.3)  # 16-bit rounding of the file
    assert convert(her, [path, his], steps=2).mel.shape == by_array.mel.shape
    saved = by_array.save(tmp_path / "out.wav")
    wave, rate = load_audio(saved)
    assert rate == 16_000
    # writing rounds 32767 x, reading divides by 32768: half a step, and |x| of a step for the two scales
    assert (np.abs(wave - by_array.wave) <= (0.5 + np.abs(by_array.wave)) * 2.0**-15 + 1e-7).all()


# ---- bad input --------------------------------------------------------------------------------------------------


def test_silence_is_no_speech(converter, target):
    with pytest.raises(DataError, match="no speech"):
        converter.convert((np.zeros(16_000), 16_000), target)
    with pytest.raises(DataError, match="no speech"):
        converter.voice_print((np.zeros(16_000), 16_000))


def test_nan_and_no_audio_are_refused(converter, target, tmp_path):
    broken = np.zeros(16_000)
    broken[7] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinite"):
        converter.convert((broken, 16_000), target)
    (tmp_path / "letter.wav").write_text("Dear reader")
    with pytest.raises(DataError):
        converter.convert(tmp_path / "letter.wav", target)
    with pytest.raises(DataError, match="no such file"):
        converter.voice_print(tmp_path / "absent.wav")


def test_very_long_sound_is_refused_unless_allowed(converter, target):
    long = (np.random.default_rng(0).standard_normal(16_000 * 30) * 0.1, 16_000)
    with pytest.raises(DataError, match="the limit is 20"):
        converter.convert(long, target, limits=Limits(audio_seconds=20))


@pytest.mark.parametrize("frames", [1, 3, 200])
def test_very_short_sound_warns_and_is_padded(converter, target, her, frames):
    start = her[1] // 4
    with pytest.warns(AudioWarning, match="shorter than"):
        found = converter.convert((her[0][start : start + frames * 20], her[1]), target, steps=2)
    assert found.seconds == pytest.approx(0.5, abs=0.0125)


def test_stereo_rates_and_types(converter, target, her):
    wave, rate = her
    plain = converter.convert(her, target, steps=2).mel
    stereo = converter.convert((np.stack([wave, wave]), rate), target, steps=2).mel
    double = converter.convert((wave.astype(np.float64), rate), target, steps=2).mel
    assert torch.allclose(plain, stereo, atol=1e-3) and torch.allclose(plain, double, atol=1e-3)
    integers = converter.convert((np.round(wave * 32767).astype(np.int16), rate), target, steps=2).mel
    assert float((plain - integers).abs().mean()) < 0.1  # 16 bits move what is near the floor
    with pytest.warns(AudioWarning, match="nothing above 4000 Hz"):
        low = converter.convert((resample(wave, rate, 8000), 8000), target, steps=2)
    assert low.mel.shape[1] == pytest.approx(plain.shape[1], abs=1)


def test_clipping_is_said(converter, target, her):
    loud = np.clip(20 * her[0], -1, 1)
    with pytest.warns(AudioWarning, match="clipped"):
        converter.convert((loud, her[1]), target, steps=2)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "6"])
def test_steps_are_whole_and_positive(converter, target, her, steps):
    with pytest.raises(ValueError, match="whole number of at least 1"):
        converter.convert(her, target, steps=steps)


@pytest.mark.parametrize("wrong", [{"window_s": 1.0}, {"solver": "magic"}, {"temperature": -1.0}, {"tau": 2.0}])
def test_settings_out_of_range(converter, target, her, wrong):
    with pytest.raises((ValueError, KeyError)) as caught:
        converter.convert(her, target, **wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value)


def test_weights_that_do_not_ship():
    with pytest.raises(CheckpointError, match="voices-xl-content"):
        Converter.from_pretrained("voices-xl")


def test_a_file_that_is_no_official_checkpoint(tmp_path):
    (tmp_path / "vc.pt").write_text("no weights")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        Converter.from_official(tmp_path / "vc.pt")


def test_a_converter_of_ones_own_parts(her, his):
    config = CompactConfig(encoder_channels=8, encoder_blocks=1, voice_channels=8, score_channels=8, score_blocks=1)
    model = DiffVC(ContentEncoder(config), CompactDecoder(config), preset="speech-16k")
    own = Converter(model, Voice(config), name="own", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = own.convert(her, own.voice_print(his), steps=6)
    assert bool(found.mel.isfinite().all())
    official = Converter(model, SpeakerEncoder.from_resemblyzer(), name="own", device="cpu")
    assert official.voice_print(his).embedding.shape == (256,)


# ---- windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 59, 60, 61, 100, 137, 1000])
@pytest.mark.parametrize("overlap", [0, 1, 20, 59])
def test_windows_cover_everything_and_overlap_enough(frames, overlap):
    places = windows(frames, 60, overlap)
    assert places[0].start == 0 and places[-1].stop == frames
    for first, second in pairwise(places):
        assert second.start > first.start
        assert first.stop - second.start >= overlap
        assert first.stop - first.start == 60


def test_windows_refuse_no_progress():
    with pytest.raises(ValueError, match="overlap=60"):
        windows(100, 60, 60)
    with pytest.raises(ValueError, match="overlap=60"):
        Windowed(CompactDecoder(CompactConfig(score_channels=8, score_blocks=1)), 60, 60)


@pytest.mark.parametrize("overlap", [0, 1, 2, 3, 20, 59])
def test_no_frame_is_left_without_weight(overlap):
    places = windows(300, 60, overlap)
    ones = cross_fade([torch.ones(2, 60) for _ in places], places)
    assert torch.allclose(ones, torch.ones(2, 300), atol=1e-6)


def test_the_edges_of_a_window_are_left_to_the_neighbour():
    places = windows(100, 60, 20)
    parts = [torch.zeros(60), torch.zeros(60)]
    parts[0][-5:], parts[1][:5] = 1e6, 1e6  # a quarter of the overlap of 20
    assert torch.equal(cross_fade(parts, places), torch.zeros(100))


def test_fading_what_agrees_changes_nothing():
    whole = torch.randn(3, 137)
    places = windows(137, 60, 20)
    assert torch.allclose(cross_fade([whole[:, place] for place in places], places), whole, atol=1e-6)
