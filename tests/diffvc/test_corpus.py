"""Speech to train and to test on: levels, speeds, texts, and the folders it is read from."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from oral4.diffvc import corpus
from oral4.diffvc.align import PHONES, PhoneSpan, espeak_voices
from oral4.diffvc.audio import write_wav
from oral4.diffvc.corpus import DIGIT_WORDS, Utterance
from oral4.diffvc.training import ESPEAK_VOICES
from oral4.errors import DataError

RATE = 16_000


def tone(hz=200.0, seconds=1.0, rate=RATE, size=0.3):
    return (size * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# ---- level ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decibels", [-40.0, -26.0, -10.0])
def test_a_tone_gets_the_level(decibels):
    found = corpus.level(tone(), RATE, decibels)
    assert found.dtype == np.float32
    assert 20 * np.log10(np.sqrt((found.astype(np.float64) ** 2).mean())) == pytest.approx(decibels, abs=1e-3)


def test_pauses_and_quiet_noise_do_not_count():
    noise = 1e-4 * np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32)  # 67 dB below the tone
    speech = np.concatenate([tone(), noise])
    assert corpus.speech_rms(speech, RATE) == pytest.approx(corpus.speech_rms(tone(), RATE), rel=1e-6)
    everything = np.sqrt((speech**2).mean())
    assert everything < 0.5 * corpus.speech_rms(speech, RATE)  # what the plain mean would have said


def test_level_forgets_the_gain_of_the_recording():
    assert np.allclose(corpus.level(0.01 * tone(), RATE), corpus.level(tone(), RATE), atol=1e-7)
    assert corpus.speech_rms(0.01 * tone(), RATE) == pytest.approx(0.01 * corpus.speech_rms(tone(), RATE), rel=1e-5)


def test_a_click_stays_below_full_scale():
    wave = 0.01 * tone()
    wave[500] = 1.0
    wave[500 + RATE // 2] = -1.0
    found = corpus.level(wave, RATE, -3.0)
    assert np.abs(found).max() == pytest.approx(0.99, abs=1e-6)
    assert np.allclose(found, wave * 0.99, atol=1e-7)  # scaled, not cut


def test_silence_has_no_level():
    assert corpus.speech_rms(np.zeros(RATE), RATE) == 0
    assert corpus.speech_rms(np.zeros(0), RATE) == 0
    with pytest.raises(DataError, match="no speech"):
        corpus.level(np.zeros(RATE), RATE)


# ---- speed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.12, 2.0])
def test_a_faster_voice_is_shorter_higher_and_another(factor):
    spans = (PhoneSpan(0.0, 0.4, "AA"), PhoneSpan(0.4, 1.0, "S"))
    slow = Utterance(tone(400.0), RATE, "somebody", "tone", spans, "ah")
    fast = corpus.change_speed(slow, factor)
    assert fast.seconds == pytest.approx(1 / factor, abs=1 / RATE)
    spectrum = np.abs(np.fft.rfft(fast.wave * np.hanning(len(fast.wave))))
    peak = np.fft.rfftfreq(len(fast.wave), 1 / RATE)[spectrum.argmax()]
    assert peak == pytest.approx(400 * factor, abs=1.5 * factor)  # one bin of the transform
    edges = [edge for span in fast.spans for edge in (span.start_s, span.end_s)]
    assert edges == pytest.approx([0.0, 0.4 / factor, 0.4 / factor, 1 / factor])
    assert [span.phone for span in fast.spans] == ["AA", "S"]
    assert (fast.text, fast.source, fast.speaker) == ("ah", "tone", f"somebody x{factor:g}")


def test_no_change_of_speed_is_no_change():
    same = Utterance(tone(), RATE, "a", "tone")
    assert corpus.change_speed(same, 1) is same
    assert corpus.change_speed(same, 1.25).spans is None


@pytest.mark.parametrize("factor", [0.49, 2.1, -1.0, float("nan")])
def test_speeds_that_are_refused(factor):
    with pytest.raises(ValueError, match=r"from 0\.5 to 2"):
        corpus.change_speed(Utterance(tone(), RATE, "a", "tone"), factor)


# ---- texts ------------------------------------------------------------------------------------------------------


def test_word_salad_is_drawn_from_its_seed():
    assert corpus.word_salad(20, seed=3) == corpus.word_salad(20, seed=3)
    assert corpus.word_salad(20, seed=3) != corpus.word_salad(20, seed=4)
    assert corpus.word_salad(5, seed=3) == corpus.word_salad(20, seed=3)[:5]
    assert corpus.word_salad(0) == []


def test_word_salad_has_the_words_and_the_digits():
    words = " ".join(corpus.word_salad(500, words=8, seed=1)).split()
    assert len(words) == 4000
    ordinary = corpus._WORDS
    assert set(words) <= set(ordinary) | set(DIGIT_WORDS)
    share = 0.25 + 0.75 * sum(word in DIGIT_WORDS for word in ordinary) / len(ordinary)
    found = sum(word in DIGIT_WORDS for word in words) / len(words)
    assert abs(found - share) < 5 * np.sqrt(share * (1 - share) / len(words))  # five standard deviations


def test_nobody_is_both_trained_on_and_held_out():
    assert not set(ESPEAK_VOICES) & set(corpus.HELD_OUT_ESPEAK)
    assert set(corpus.HELD_OUT_DIGITS) < set(corpus.DIGIT_SPEAKERS)
    known = set(espeak_voices())
    for voice in (*ESPEAK_VOICES, *corpus.HELD_OUT_ESPEAK):
        assert {f"en-us+{voice}", f"en-gb+{voice}"} <= known, voice


def test_the_sentences_hold_every_phone():
    counts = Counter(
        span.phone
        for utterance in corpus.espeak_speech(["m1"], corpus.SENTENCES, vary=False)
        for span in utterance.spans
    )
    assert {phone for phone in PHONES if counts[phone] < 2} == {"spn"}  # in several places, as the docstring says


# ---- synthetic speech -------------------------------------------------------------------------------------------


def test_espeak_speaks_alike_for_one_seed():
    one, two = (list(corpus.espeak_speech(["m2", "f2"], ["one", "two"], seed=5)) for _ in range(2))
    assert [f"{u.speaker} {u.text}" for u in one] == [
        "espeak/m2 one",
        "espeak/m2 two",
        "espeak/f2 one",
        "espeak/f2 two",
    ]
    for first, second in zip(one, two, strict=True):
        assert first.spans == second.spans
        # the breath and the hiss of espeak-ng are not the same in every call, the voice and the timing are
        assert np.corrcoef(first.wave, second.wave)[0, 1] > 0.95
        assert first.rate == RATE and 20 * np.log10(corpus.speech_rms(first.wave, RATE)) == pytest.approx(-26, abs=0.01)
        assert first.spans[-1].end_s <= first.seconds + 1e-3
    alone = next(corpus.espeak_speech(["f2"], ["one"], seed=5))
    assert (
        alone.spans == one[2].spans and np.corrcoef(alone.wave, one[2].wave)[0, 1] > 0.95
    )  # a voice does not depend on which others speak


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="no variant 'nobody'"):
        next(corpus.espeak_speech(["nobody"], ["one"]))


# ---- folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fsdd(tmp_path, monkeypatch):
    """Recordings in which the digit sets the pitch: 100 Hz and 50 Hz more for each."""
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for speaker in ("ann", "bob"):
        for digit in range(10):
            for take in range(3):
                wave = tone(100 + 50 * digit, 0.2 + 0.05 * take, 8000)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", wave, 8000)
    monkeypatch.setattr(corpus, "fetch", lambda name: tmp_path / name)


def test_digits_come_in_order(fsdd):
    found = list(corpus.digits(["bob", "ann"], takes=[2, 0]))
    assert [u.speaker for u in found] == ["fsdd/bob"] * 20 + ["fsdd/ann"] * 20
    assert [u.text for u in found] == list(DIGIT_WORDS) * 4
    assert [round(u.seconds, 3) for u in found[:20]] == [0.3] * 10 + [0.2] * 10
    assert {u.rate for u in found} == {RATE}
    assert {u.speaker for u in corpus.digits(takes=[0])} == {"fsdd/ann", "fsdd/bob"}


def test_an_unknown_digit_speaker_is_refused(fsdd):
    with pytest.raises(ValueError, match="no speaker 'carl'; choose from ann, bob"):
        list(corpus.digits(["carl"]))


@pytest.mark.parametrize("length", [3, 4, 30, 31])
def test_digit_strings_use_every_digit_once(fsdd, length):
    found = list(corpus.digit_strings(takes=range(3), length=length, pause_s=0.1, seed=1))
    for speaker in ("fsdd/ann", "fsdd/bob"):
        own = [u for u in found if u.speaker == speaker]
        assert len(own) == 30 // length  # a rest that is shorter than a string is left out
        words = Counter(word for u in own for word in u.text.split())
        assert all(count <= 3 for count in words.values())
        if 30 % length == 0:
            assert words == Counter({word: 3 for word in DIGIT_WORDS})
    if length == 3:
        spoken = sum(u.seconds for u in found) - 0.1 * 3 * len(found)
        takes = sum(u.seconds for u in corpus.digits(takes=range(3)))
        assert spoken == pytest.approx(takes, abs=1e-6)  # each take once
        again = list(corpus.digit_strings(takes=range(3), length=3, pause_s=0.1, seed=1))
        assert all(np.array_equal(a.wave, b.wave) for a, b in zip(found, again, strict=True))
        other = list(corpus.digit_strings(takes=range(3), length=3, pause_s=0.1, seed=2))
        assert [u.text for u in found] != [u.text for u in other]


def test_between_two_digits_is_a_quiet_pause(fsdd):
    first = next(corpus.digit_strings(["ann"], takes=[0], length=2, pause_s=0.1))
    digit = round(0.2 * RATE)
    pause = first.wave[digit : digit + round(0.1 * RATE)]
    assert len(first.wave) == 2 * (digit + len(pause))
    assert 0.5e-4 < pause.std() < 2e-4
    assert corpus.speech_rms(first.wave[:digit], RATE) == pytest.approx(10 ** (-26 / 20), rel=1e-3)


def test_readers_are_named_by_their_files(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    for part, names in {"train-clean-100": ["19-198-0", "8-1-3"], "test-other": ["1688-142-1"]}.items():
        for name in names:
            path = tmp_path / "librispeech-excerpt" / f"librispeech_{part}" / "deeper" / f"{name}.flac"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, tone(), RATE)
    monkeypatch.setattr(corpus, "fetch", lambda name: tmp_path / name)
    assert [u.speaker for u in corpus.readers()] == ["librispeech/19", "librispeech/8"]
    (single,) = corpus.readers("test")
    assert single.speaker == "librispeech/1688" and single.seconds == 1 and single.text is None
    with pytest.raises(ValueError, match="choose 'train' or 'test'"):
        next(corpus.readers("dev"))


@pytest.mark.parametrize("source", [corpus.digits, corpus.digit_strings, corpus.readers])
def test_recordings_that_are_not_at_hand(source, tmp_path, monkeypatch):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ORAL4_OFFLINE", "1")
    monkeypatch.delenv("ORAL4_DATA", raising=False)
    with pytest.raises(DataError):
        next(source())


GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.4
            text = "{first}"
        intervals [2]:
            xmin = 0.4
            xmax = 1
            text = "S"
"""


def test_a_folder_of_ones_own(tmp_path):
    for speaker, name in (("p2", "b"), ("p1", "a"), ("p1", "c")):
        (tmp_path / "wavs" / speaker).mkdir(parents=True, exist_ok=True)
        (tmp_path / "textgrids" / speaker).mkdir(parents=True, exist_ok=True)
        write_wav(tmp_path / "wavs" / speaker / f"{name}.wav", tone(), RATE)
    (tmp_path / "textgrids" / "p1" / "a.TextGrid").write_text(GRID.format(first="AA1"))
    (tmp_path / "textgrids" / "p1" / "c.TextGrid").write_text(GRID.format(first="spn"))
    found = list(corpus.read_folder(tmp_path))
    assert [(u.speaker, u.name, u.source) for u in found] == [("p1", "a", tmp_path.name), ("p2", "b", tmp_path.name)]
    assert found[0].spans == (PhoneSpan(0.0, 0.4, "AA"), PhoneSpan(0.4, 1.0, "S")) and found[1].spans is None
    assert found[0].rate == 22_050 and found[0].seconds == pytest.approx(1, abs=1e-4)
    assert next(corpus.read_folder(tmp_path, "speech-16k")).rate == RATE


def test_a_folder_without_recordings_is_said(tmp_path):
    with pytest.raises(DataError, match="no recordings at wavs"):
        list(corpus.read_folder(tmp_path))


def test_spans_of_speech_stand_one_after_the_other():
    (utterance,) = corpus.espeak_speech(["m5"], ["The judge asked for silence."])
    for first, second in pairwise(utterance.spans):
        assert first.start_s < first.end_s <= second.start_s + 1e-9
