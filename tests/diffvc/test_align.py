"""Phones and their times: what the synthesisers say, what files claim, what the aligner finds."""

import itertools
import shutil
import subprocess
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc import align
from oral4.diffvc.align import (
    DIGITS,
    PHONES,
    Chain,
    MissingProgram,
    PhoneSpan,
    ViterbiAligner,
    align_features,
    espeak_say,
    espeak_voices,
    flite_say,
    frame_phones,
    make_chain,
    read_textgrid,
    viterbi,
    viterbi_reference,
)
from oral4.diffvc.audio import MelPreset
from oral4.errors import DataError, OralError

needs_flite = pytest.mark.skipif(shutil.which("flite") is None, reason="the program flite is not installed")
TINY = MelPreset(name="tiny", rate=1000, n_fft=100, win=100, hop=100, num_mels=2, fmax=400.0)
TEXT = "The judge asked for silence, and got laughter."
VOICES = ("en-us", "en-us+m3", "en-us+f4", "en-gb", "en-gb+f2", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-us-nyc")


def tiles(spans, end_s):
    """Spans begin at 0, end with the sound, are in order, without gaps, and last."""
    edges = [0.0] + [span.end_s for span in spans]
    return (
        [span.start_s for span in spans] == pytest.approx(edges[:-1], abs=1e-9)
        and edges[-1] == pytest.approx(end_s, abs=1e-9)
        and all(span.end_s > span.start_s for span in spans)
    )


# ---- spans and frames


@pytest.mark.parametrize("times", [(-0.1, 1.0), (1.0, 0.5), (0.0, float("nan")), (0.0, float("inf"))])
def test_a_span_that_cannot_be_is_refused(times):
    with pytest.raises(ValueError, match="0 <= start <= end"):
        PhoneSpan(*times, "AA")


def test_the_classes_are_the_39_of_arpabet_and_two_more():
    assert len(PHONES) == len(set(PHONES)) == 41
    assert {"sil", "spn"} <= set(PHONES)
    assert len({phone for phones in DIGITS.values() for phone in phones}) == 19
    assert {phone for phones in DIGITS.values() for phone in phones} <= set(PHONES)


def test_neighbours_share_a_frame_and_the_later_one_gets_it():
    spans = [PhoneSpan(0.0, 0.25, "A"), PhoneSpan(0.25, 0.4, "B"), PhoneSpan(0.5, 0.6, "C")]
    # frames: A 0..2, B 2..4, C 5..6; the mel ends after frame 5
    assert frame_phones(spans, TINY, 6) == ["A", "A", "B", "B", "B", "C"]
    assert frame_phones(spans[:1] + spans[2:], TINY, 7) == ["A", "A", "A", None, None, "C", "C"]
    assert frame_phones(spans, TINY) == frame_phones(spans, TINY, 6)


@given(
    st.lists(st.floats(0.01, 0.7), min_size=1, max_size=12),
    st.sampled_from(["hifigan-22k", "speech-16k", "digits-8k", TINY]),
)
@settings(max_examples=60, deadline=None)
def test_frames_are_the_official_ones(durations, preset):
    edges = np.concatenate([[0], np.cumsum(durations)]).tolist()
    spans = [PhoneSpan(a, b, str(i)) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    grid = align.find_preset(preset)
    num_frames = int(edges[-1] * grid.rate) // grid.hop
    official = np.array([None] * num_frames, dtype=object)
    for a, b, phone in zip(edges, edges[1:], map(str, range(len(durations))), strict=False):
        official[int(a * grid.rate) // grid.hop : int(b * grid.rate) // grid.hop + 1] = phone
    assert frame_phones(spans, preset, num_frames) == official.tolist()


def test_an_alignment_of_another_recording_is_refused():
    spans = [PhoneSpan(0.0, 0.61, "A")]
    assert frame_phones(spans, TINY, 6) == ["A"] * 6
    with pytest.raises(DataError, match=r"ends at 0\.610 s, frame 6, and the mel has 5 frames.*preset 'tiny'"):
        frame_phones(spans, TINY, 5)
    with pytest.raises(DataError, match="alignment is empty"):
        frame_phones([], TINY, 5)
    with pytest.raises(ValueError, match="'speech-17k' is unknown"):
        frame_phones(spans, "speech-17k", 5)


def test_spans_out_of_order_are_judged_by_the_latest():
    with pytest.raises(DataError, match="the mel has 5 frames"):
        frame_phones([PhoneSpan(0.5, 0.9, "B"), PhoneSpan(0.0, 0.3, "A")], TINY, 5)


# ---- espeak-ng


@pytest.mark.parametrize("voice", VOICES)
def test_espeak_says_when(voice):
    wave, rate, spans = espeak_say(TEXT, voice)
    assert wave.dtype == np.float32 and wave.ndim == 1 and rate == 22050
    assert 0.05 < np.abs(wave).max() <= 1
    assert tiles(spans, len(wave) / rate)
    assert {span.phone for span in spans} <= set(PHONES)
    said = " ".join(span.phone for span in spans if span.phone != "sil")
    assert said.startswith(("DH AH JH AH JH ", "DH IH JH AH JH ", "D AH JH AH JH "))  # the last one in the Caribbean
    assert any(span.phone == "sil" and 0.5 < span.start_s < 2.0 for span in spans), "the comma is a pause"


def sound_of(wave, rate, spans, phones, margin_s=0.01):
    """The samples of all spans of some phones, without their edges."""
    chosen = [s for s in spans if s.phone in phones]
    parts = [wave[int((s.start_s + margin_s) * rate) : int((s.end_s - margin_s) * rate)] for s in chosen]
    return np.concatenate(parts)


def is_in_step(wave, rate, spans):
    """Silences are quiet, vowels are loud, and hisses are high: the times belong to this sound."""
    groups = {"sil": {"sil"}, "vowel": {"AH", "AE", "AA", "AO", "AY"}}
    power = {what: (sound_of(wave, rate, spans, phones) ** 2).mean() for what, phones in groups.items()}
    hiss = sound_of(wave, rate, spans, {"S"})
    spectrum = np.abs(np.fft.rfft(hiss)) ** 2
    high = spectrum[np.fft.rfftfreq(len(hiss), 1 / rate) > 3000].sum() / spectrum.sum()
    return power["sil"] < 1e-2 * power["vowel"] and high > 0.8


@pytest.mark.parametrize("voice", ["en-us", "en-us+m3", "en-gb+f2"])
def test_espeak_times_are_those_of_the_sound(voice):
    wave, rate, spans = espeak_say(TEXT + " Six sisters sat, silent.", voice)
    assert is_in_step(wave, rate, spans)
    late = [PhoneSpan(s.start_s + 0.15, s.end_s + 0.15, s.phone) for s in spans]
    assert not is_in_step(wave, rate, late)  # the check would notice a shift


@pytest.mark.parametrize(
    ("text", "american", "british"),
    [
        ("car", "K AA R", "K AA"),
        ("the car is", "DH AH K AA R IH Z", "DH AH K AA R IH Z"),  # the r links to the vowel; it is there once
        ("butter", "B AH T ER", "B AH T AH"),
        ("fire", "F AY ER", "F AY AH"),
        ("four birds", "F AO R B ER D Z", "F AO B ER D Z"),
        ("button", "B AH T N", "B AH T AH N"),
        ("bottle", "B AA T AH L", "B AA T AH L"),
        ("all oil", "AO L OY L", "AO L OY L"),
        ("vision, judge, church", "V IH ZH AH N sil JH AH JH sil CH ER CH", "V IH ZH AH N sil JH AH JH sil CH ER CH"),
    ],
)
def test_mnemonics_become_arpabet(text, american, british):
    for voice, expected in (("en-us", american), ("en-gb", british)):
        said = " ".join(span.phone for span in espeak_say(text, voice)[2]).removeprefix("sil ").removesuffix(" sil")
        assert said == expected, voice


def test_a_final_l_gets_time_though_espeak_reports_it_at_its_end():
    spans = espeak_say("feel, fee", "en-us")[2]
    ell = next(span for span in spans if span.phone == "L")
    vowels = [span for span in spans if span.phone == "IY"]
    assert ell.end_s - ell.start_s == pytest.approx(0.08, abs=1e-3)
    assert ell.start_s == vowels[0].end_s


def test_espeak_repeats_itself_and_remembers_nothing():
    first = espeak_say("one two", "en-us+m3", pitch=70)
    espeak_say("something else", "en-gb+f4", pitch=10, pitch_range=90, rate_wpm=300)
    again = espeak_say("one two", "en-us+m3", pitch=70)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[2] == again[2]


def test_each_setting_is_heard():
    def pitch_of(wave, rate):
        middle = wave[int(0.1 * rate) : int(0.1 * rate) + 4096]
        correlation = np.correlate(middle, middle, "full")[len(middle) :]
        return rate / (int(rate / 400) + correlation[int(rate / 400) : int(rate / 60)].argmax() + 1)

    low, high = (pitch_of(*espeak_say("aah", "en-us", pitch=p, pitch_range=0)[:2]) for p in (20, 80))
    assert 1.3 * low < high < 4 * low
    slow, fast = (len(espeak_say(TEXT, "en-us", rate_wpm=rate)[0]) for rate in (100, 300))
    assert 1.8 * fast < slow < 4 * fast
    flat, lively = (espeak_say(TEXT, "en-us", pitch_range=r)[0] for r in (0, 99))
    assert not np.array_equal(flat, lively)
    assert not np.array_equal(espeak_say(TEXT, "en-us")[0], espeak_say(TEXT, "en-us+m3")[0])


def test_an_unknown_voice_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no voice 'en-uss'; near it: en-us.*espeak_voices\(\)"):
        espeak_say("hi", "en-uss")
    # the library itself would speak in the plain voice
    with pytest.raises(ValueError, match=r"no variant 'm33'; near it: .*m3"):
        espeak_say("hi", "en-us+m33")
    with pytest.raises(ValueError, match=r"no variant '\.\./f1'"):
        espeak_say("hi", "en-us+../f1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pitch": 100}, r"pitch=100: 0 to 99"),
        ({"pitch": -1}, r"pitch=-1"),
        ({"pitch_range": 120}, r"pitch_range=120"),
        ({"rate_wpm": 20}, r"rate_wpm=20: 80 to 450"),
        ({"text": "  "}, "nothing to say"),
        ({"text": ""}, "nothing to say"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        espeak_say(**{"text": "hi", **settings})


def test_a_phone_without_a_class_is_named_and_can_be_given_one():
    with pytest.raises(ValueError, match=r"phone 'y:' of voice 'de' has no class; .*phone_map={'y:': 'AH'}"):
        espeak_say("über", "de")
    spans = espeak_say("über", "de", phone_map={"y:": "UW", "3": "AH"})[2]
    assert [span.phone for span in spans if span.phone != "sil"] == ["UW", "B", "AH"]
    with pytest.raises(ValueError, match=r"'QQ'.*no phone"):
        espeak_say("über", "de", phone_map={"y:": "QQ"})


def test_the_listed_voices_are_voices():
    voices = espeak_voices()
    assert len(voices) == len(set(voices)) > 500
    assert {"en-us", "en-gb", "en-us+m3", "en-gb+f2"} <= set(voices)
    assert "en-shaw" not in voices
    for voice in voices[:: len(voices) // 25]:
        assert tiles((said := espeak_say("Two words.", voice))[2], len(said[0]) / said[1]), voice
    assert "de" in espeak_voices("de")


def test_threads_take_turns():
    texts = [f"{word} and {word}" for word in DIGITS]
    alone = {text: espeak_say(text, "en-us+m3") for text in texts}
    heard, failures = {}, []

    def speak(text):
        try:
            heard[text] = espeak_say(text, "en-us+m3")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=speak, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures and set(heard) == set(texts)
    for text in texts:
        np.testing.assert_array_equal(heard[text][0], alone[text][0])
        assert heard[text][2] == alone[text][2]


def test_a_code_of_the_library_is_an_error(monkeypatch):
    class Failing(align._Espeak):
        def __enter__(self):
            espeak = super().__enter__()
            espeak.library.espeak_SetVoiceByName = lambda name: 2
            return espeak

    monkeypatch.setattr(align, "_Espeak", Failing)
    for _time in range(2):  # the lock is given back
        with pytest.raises(OralError, match=r"SetVoiceByName\('en-us'\) returned code 2"):
            espeak_say("hi", "en-us")


def test_a_library_that_does_not_start_gives_the_lock_back(monkeypatch, tmp_path):
    loader = align.require("espeakng_loader", "voice")
    with monkeypatch.context() as patch:
        patch.setattr(loader, "get_data_path", lambda: str(tmp_path))
        for _time in range(2):
            with pytest.raises(OralError, match=r"does not start with the data in .* \(code -?\d+\); reinstall"):
                align._Espeak().__enter__()
    assert len(espeak_say("hi")[0])


# ---- flite


@needs_flite
def test_flite_says_when():
    for voice in ("slt", "rms", "awb", "kal16"):
        wave, rate, spans = flite_say(TEXT + " Six sisters sat, silent.", voice)
        assert wave.dtype == np.float32 and rate == 16000
        assert tiles(spans, len(wave) / rate)
        assert {span.phone for span in spans} <= set(PHONES)
        assert is_in_step(wave, rate, spans), voice


@needs_flite
def test_flite_refuses_what_it_cannot_say():
    with pytest.raises(ValueError, match=r"no voice of flite 'slt2'; near it: slt"):
        flite_say("hi", "slt2")
    with pytest.raises(ValueError, match="nothing to say"):
        flite_say(" ")


def test_without_flite_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingProgram, match="apt-get install flite"):
        flite_say("hi")
    assert issubclass(MissingProgram, OralError) and issubclass(MissingProgram, FileNotFoundError)


def test_what_flite_prints_is_read(monkeypatch, tmp_path):
    """The program stands in for itself, so that this runs without it."""

    def answer(command, **_settings):
        if "-lv" in command:
            return subprocess.CompletedProcess(command, 0, "Voices available: slt \n", "")
        align.require("soundfile", "voice").write(command[-1], np.zeros(8000), 16000)
        printed = "pau:0.100 hh:0.200 ax:0.300 ssil:0.400 pau:0.500 \n"
        return subprocess.CompletedProcess(command, returncode, printed, "no sound")

    monkeypatch.setattr(shutil, "which", lambda name: "/nowhere/flite")
    monkeypatch.setattr(subprocess, "run", answer)
    align._flite_voices.cache_clear()
    returncode = 0
    wave, rate, spans = flite_say("uh")
    assert (len(wave), rate) == (8000, 16000)
    expected = [(0, 0.1, "sil"), (0.1, 0.2, "HH"), (0.2, 0.3, "AH"), (0.3, 0.5, "sil")]
    assert [(s.start_s, s.end_s, s.phone) for s in spans] == expected
    returncode = 3
    with pytest.raises(OralError, match="code 3: no sound"):
        flite_say("uh")
    align._flite_voices.cache_clear()


# ---- TextGrid

ROWS = [(0.0, 0.25, "sil"), (0.25, 0.4, "HH"), (0.4, 0.75, "AY1"), (0.75, 1.0, "")]


def long_form(tiers, end=1.0):
    text = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0 \nxmax = {end} \n'
    text += f"tiers? <exists> \nsize = {len(tiers)} \nitem []: \n"
    for number, (name, rows) in enumerate(tiers, start=1):
        text += f'    item [{number}]:\n        class = "IntervalTier" \n        name = "{name}" \n'
        text += f"        xmin = 0 \n        xmax = {end} \n"
        text += f"        intervals: size = {len(rows)} \n"
        for index, (start, stop, label) in enumerate(rows, start=1):
            text += f"        intervals [{index}]:\n            xmin = {start} \n            xmax = {stop} \n"
            text += f'            text = "{label}" \n'
    return text


def short_form(tiers, end=1.0):
    text = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n{end}\n<exists>\n{len(tiers)}\n'
    for name, rows in tiers:
        text += f'"IntervalTier"\n"{name}"\n0\n{end}\n{len(rows)}\n' + "".join(
            f'{a}\n{b}\n"{label}"\n' for a, b, label in rows
        )
    return text


TIERS = [("words", [(0.0, 0.25, ""), (0.25, 0.75, 'say ""hi"" 3 [1]'), (0.75, 1.0, "")]), ("phones", ROWS)]


@pytest.mark.parametrize("form", [long_form, short_form])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "crlf"])
def test_both_forms_in_all_encodings(tmp_path, form, encoding):
    text = form(TIERS)
    raw = text.replace("\n", "\r\n").encode() if encoding == "crlf" else text.encode(encoding)
    (tmp_path / "hi.TextGrid").write_bytes(raw)
    expected = [PhoneSpan(a, b, phone) for (a, b, _), phone in zip(ROWS, ("sil", "HH", "AY", "sil"), strict=True)]
    assert read_textgrid(tmp_path / "hi.TextGrid") == expected
    assert read_textgrid(str(tmp_path / "hi.TextGrid"), stress=True)[2].phone == "AY1"


def write(tmp_path, text):
    path = tmp_path / "a.TextGrid"
    path.write_text(text)
    return path


def test_points_are_passed_over(tmp_path):
    point = '"TextTier"\n"clicks"\n0\n1.0\n1\n0.5\n"click"\n'
    text = short_form(TIERS).replace("<exists>\n2", "<exists>\n3")
    text = text.replace('"IntervalTier"\n"words"', point + '"IntervalTier"\n"words"')
    assert [span.phone for span in read_textgrid(write(tmp_path, text))] == ["sil", "HH", "AY", "sil"]


def test_what_aligners_call_silence_and_noise(tmp_path):
    labels = ["", "sil", "SIL", "sp", "<eps>", "spn", "<unk>", "AA0", "OY2", "NG"]
    rows = [(i / 10, (i + 1) / 10, label) for i, label in enumerate(labels)]
    path = write(tmp_path, short_form([("phones", rows)]))
    assert [span.phone for span in read_textgrid(path)] == ["sil"] * 5 + ["spn"] * 2 + ["AA", "OY", "NG"]
    kept = [span.phone for span in read_textgrid(path, stress=True)]
    assert kept == ["sil", "sil", "sil", "sp", "sil", "spn", "spn", "AA0", "OY2", "NG"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(0.0, 0.5, "AA"), (0.4, 1.0, "S")],
            r"0\.4 to 1\.0 s of 'S'.*overlaps the one before it, which ends at 0\.5 s",
        ),
        ([(0.0, 0.5, "AA"), (0.6, 1.0, "S")], r"interval 0\.6 to 1\.0 s of 'S'.*leaves a gap after the one before it"),
        ([(0.1, 1.0, "AA")], "leaves a gap"),
        ([(0.0, 0.9, "AA")], r"ends at 1\.0 s and its last interval at 0\.9 s"),
        ([(0.0, 0.5, "AA"), (0.5, 0.5, "S"), (0.5, 1.0, "T")], r"0 <= start < end is needed"),
        ([(0.0, 0.5, "AA"), (0.5, 0.2, "S")], r"0 <= start < end is needed"),
        ([], "tier 'phones' is empty"),
        ([(0.0, 0.5, "AA"), (0.5, 1.0, "ɹ")], r"label 'ɹ' at 0\.5 s is no ARPAbet phone"),
        ([(0.0, 1.0, "S1")], "'S1'.*no ARPAbet phone"),
        ([(0.0, 1.0, "AA3")], "'AA3'.*no ARPAbet phone"),
    ],
)
def test_alignments_that_cannot_be_true_are_refused(tmp_path, rows, message):
    for form in (long_form, short_form):
        with pytest.raises(DataError, match=message):
            read_textgrid(write(tmp_path, form([("phones", rows)])))


def test_rounding_of_the_times_is_no_gap(tmp_path):
    rows = [(0.0, 0.33333, "AA"), (0.33334, 1.0, "S")]
    assert len(read_textgrid(write(tmp_path, short_form([("phones", rows)])))) == 2


def test_files_that_are_no_textgrid_are_refused(tmp_path):
    with pytest.raises(DataError, match="no interval tier 'phone'; it has 'words', 'phones'; say which with tier="):
        read_textgrid(write(tmp_path, short_form(TIERS)), "phone")
    with pytest.raises(DataError, match="must begin with"):
        read_textgrid(write(tmp_path, '"ooTextFile"\n"Pitch"\n'))
    with pytest.raises(DataError, match="the file ends where"):
        read_textgrid(write(tmp_path, ""))
    with pytest.raises(DataError, match=r"nothing\.TextGrid: no TextGrid that can be read"):
        read_textgrid(tmp_path / "nothing.TextGrid")
    (tmp_path / "a.TextGrid").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="can be read"):
        read_textgrid(tmp_path / "a.TextGrid")
    with pytest.raises(DataError, match="no tiers"):
        read_textgrid(write(tmp_path, '"ooTextFile"\n"TextGrid"\n0\n1\n<absent>\n'))
    with pytest.raises(DataError, match=r"'phones'.* stands where the number of tiers \(number\)"):
        read_textgrid(write(tmp_path, short_form(TIERS).replace("<exists>\n2", '<exists>\n"phones"')))
    with pytest.raises(DataError, match="a count is needed"):
        read_textgrid(write(tmp_path, short_form(TIERS).replace("<exists>\n2", "<exists>\n-2")))


@pytest.mark.parametrize("form", [long_form, short_form])
def test_a_file_cut_anywhere_is_refused(tmp_path, form):
    text = form(TIERS).rstrip()
    for length in range(0, len(text) - 1, 7):
        with pytest.raises(DataError):
            read_textgrid(write(tmp_path, text[:length]))


# ---- Viterbi


def random_case(rng, num_phones, extra):
    phones = [str(phone) for phone in rng.choice(["A", "B", "C", "sil"], size=num_phones)] + ["A"]
    chain = make_chain(phones, {"sil": 0, "A": 2, "B": 4, "C": 6}, num_states=2)
    length = 2 * sum(phone != "sil" for phone in phones) + extra
    stay = np.log(rng.uniform(0.2, 0.9, len(chain)))
    return rng.normal(0, 3, (length, len(chain))), chain, stay, np.log1p(-np.exp(stay))


def path_score(path, scores, stay, leave):
    moves = sum(stay[a] if a == b else leave[a] for a, b in itertools.pairwise(path))
    return scores[np.arange(len(path)), path].sum() + moves


@given(st.integers(0, 10_000), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_many_at_once_equals_one_by_one(seed, shapes):
    rng = np.random.default_rng(seed)
    cases = [random_case(rng, *shape) for shape in shapes]
    together = viterbi(*zip(*cases, strict=True))
    for (path, score), (scores, chain, stay, leave) in zip(together, cases, strict=True):
        path_alone, score_alone = viterbi_reference(scores, chain, stay, leave)
        assert score == pytest.approx(score_alone, abs=1e-9)  # float64, up to 25 frames
        np.testing.assert_array_equal(path, path_alone)
        assert score == pytest.approx(path_score(path, scores, stay, leave), abs=1e-9)


def all_paths(chain, length):
    """Every path through a chain, by enumeration."""
    paths = [[start] for start in chain.starts]
    for _frame in range(length - 1):
        grown = []
        for path in paths:
            here = path[-1]
            nexts = {here, here + 1} | {int(n) for n in np.flatnonzero(chain.jump == here)}
            grown += [[*path, n] for n in nexts if n < len(chain)]
        paths = grown
    return [np.array(path) for path in paths if path[-1] in chain.ends]


def test_the_best_of_all_paths_is_found():
    rng = np.random.default_rng(3)
    for _trial in range(5):
        chain = make_chain(["A", "sil", "B"], {"sil": 0, "A": 1, "B": 2}, num_states=1)
        scores, stay = rng.normal(0, 1, (7, len(chain))), np.log(rng.uniform(0.2, 0.9, len(chain)))
        leave = np.log1p(-np.exp(stay))
        best = max(path_score(path, scores, stay, leave) for path in all_paths(chain, 7))
        assert viterbi_reference(scores, chain, stay, leave)[1] == pytest.approx(best, abs=1e-12)


def test_silences_may_be_left_out_and_are_not_doubled():
    first = {"sil": 0, "A": 1, "B": 2}
    chain = make_chain(["sil", "A", "sil", "sil", "B", "sil"], first, num_states=1)
    assert chain.states.tolist() == [0, 1, 0, 2, 0]
    assert chain.starts == (0, 1) and chain.ends == (4, 3)
    assert {tuple(path) for path in all_paths(chain, 2)} == {(1, 3)}  # both phones, no silence
    assert isinstance(chain, Chain) and len(chain) == 5


# ---- the aligner


@pytest.fixture(scope="module")
def speech():
    texts = [TEXT, "Nine old boys chose five thin pages.", "She could hear the zoo from every room.",
             "A cheap clock, now and then, is right.", "We join the yellow team in winter."]  # fmt: skip
    said = [espeak_say(text, voice) for voice in ("en-us+m3", "en-us+f2", "en-gb+m1", "en-gb+f4") for text in texts]
    return [align_features(wave, rate) for wave, rate, _ in said], [spans for *_, spans in said]


@pytest.fixture(scope="module")
def fitted(speech):
    features, truth = speech
    return ViterbiAligner().fit(features, [[span.phone for span in spans] for spans in truth])


def onsets(spans):
    return np.array([span.start_s for span in spans if span.phone != "sil"])


def test_boundaries_are_found_from_the_order_alone(speech, fitted):
    features, truth = speech
    transcripts = [[span.phone for span in spans] for spans in truth]
    found = fitted.align_all(features, transcripts)
    errors = np.abs(np.concatenate([onsets(f) - onsets(t) for f, t in zip(found, truth, strict=True)]))
    assert np.median(errors) < 0.020  # the bar that is usual for people; about 0.010 is reached
    assert np.mean(errors < 0.05) > 0.85  # the rest are mostly stops, which espeak reports at the burst
    for feature, spans, transcript in zip(features, found, transcripts, strict=True):
        assert tiles(spans, feature.shape[1] * 0.005)
        assert [s.phone for s in spans if s.phone != "sil"] == [p for p in transcript if p != "sil"]
    # what no learning gives: the first guess, all phones equally long
    equal = [np.linspace(t[0].start_s, t[-1].end_s, len(t) + 1)[:-1] for t in truth]
    spoken = [[s.phone != "sil" for s in t] for t in truth]
    guess = [row[kept] - onsets(t) for row, kept, t in zip(equal, spoken, truth, strict=True)]
    guessed = np.abs(np.concatenate(guess))
    assert np.median(errors) < 0.3 * np.median(guessed)


def test_silences_are_found(speech, fitted):
    features, truth = speech
    found = fitted.align_all(features, [[span.phone for span in spans] for spans in truth])
    both = only_found = only_true = 0
    for feature, f, t in zip(features, found, truth, strict=True):
        silent = np.zeros((2, feature.shape[1]), dtype=bool)
        for row, spans in zip(silent, (f, t), strict=True):
            for span in spans:
                row[round(span.start_s * 200) : round(span.end_s * 200)] |= span.phone == "sil"
        both += (silent[0] & silent[1]).sum()
        only_found += (silent[0] & ~silent[1]).sum()
        only_true += (silent[1] & ~silent[0]).sum()
    assert both / (both + only_true) > 0.7
    assert only_found / (both + only_found) < 0.15


def test_a_voice_that_was_not_in_the_fit(fitted):
    wave, rate, truth = espeak_say("The old boys hear the winter zoo.", "en-us+m7")
    found = fitted.align(align_features(wave, rate), [s.phone for s in truth])
    assert np.median(np.abs(onsets(found) - onsets(truth))) < 0.030


def test_pauses_are_found_where_they_are_possible_only(speech, fitted):
    wave, rate, truth = espeak_say(TEXT, "en-us+m3")
    feature = align_features(wave, rate)
    comma = next(s for s in truth if s.phone == "sil" and s.start_s > 0.3)
    with_sil = fitted.align(feature, [s.phone for s in truth])
    assert any(s.phone == "sil" and abs(s.start_s - comma.start_s) < 0.05 for s in with_sil)
    without = fitted.align(feature, [s.phone for s in truth if s.phone != "sil"])
    assert [s.phone for s in without if s.start_s > 0.1 and s.end_s < truth[-1].start_s].count("sil") == 0


def test_the_right_transcript_scores_higher(speech, fitted):
    features, truth = speech
    transcripts = [[s.phone for s in spans] for spans in truth[:5]]
    for index, feature in enumerate(features[:5]):
        scores = [fitted.score(feature, transcript) for transcript in transcripts]
        assert int(np.argmax(scores)) == index


def test_together_or_alone_is_the_same(speech, fitted):
    features, truth = speech
    transcripts = [[s.phone for s in spans] for spans in truth]
    together = fitted.align_all(features[:6], transcripts[:6])
    assert together == [fitted.align(f, t) for f, t in zip(features[:6], transcripts[:6], strict=True)]


def test_the_fit_is_a_function_of_the_data(speech, fitted):
    features, truth = speech
    transcripts = [[s.phone for s in spans] for spans in truth]
    again = ViterbiAligner().fit(features, transcripts)
    assert again.align_all(features, transcripts) == fitted.align_all(features, transcripts)


@pytest.mark.parametrize("options", [{"num_mixtures": 2, "num_rounds": 6}, {"num_states": 2, "num_rounds": 5}])
def test_other_sizes_work_as_well(speech, options):
    features, truth = speech
    transcripts = [[s.phone for s in spans] for spans in truth]
    found = ViterbiAligner(**options).fit(features, transcripts).align_all(features, transcripts)
    errors = np.concatenate([onsets(f) - onsets(t) for f, t in zip(found, truth, strict=True)])
    assert np.median(np.abs(errors)) < 0.020


def test_gaussians_are_those_of_the_formula(fitted):
    rng = np.random.default_rng(0)
    row = rng.normal(size=(4, 26)).astype(np.float32)
    found = fitted._log_likelihood(row)
    for state in (0, 5, 40):
        mean, variance = fitted._means[state, 0], fitted._variances[state, 0]
        expected = -0.5 * ((row - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(axis=1)
        np.testing.assert_allclose(found[:, state], expected, rtol=1e-4, atol=1e-2)  # float32, 26 terms
    assert found.shape == (4, len(fitted.first_state) * 3)


def test_features_say_how_long_they_are():
    wave = np.sin(np.arange(16000) / 5).astype(np.float32)
    assert align_features(wave, 16000).shape == (26, 200)
    assert align_features(wave[:8000], 8000).shape == (26, 200)
    assert abs(align_features(np.resize(wave, 22050), 22050).shape[1] - 200) <= 1
    feature = align_features(wave, 16000)
    np.testing.assert_allclose(feature[:13].mean(axis=1), 0, atol=1e-4)  # freed from its mean
    hiss = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)  # no band at the floor
    loudness_gone = align_features(0.3 * hiss, 16000) - align_features(hiss, 16000)
    np.testing.assert_allclose(loudness_gone, 0, atol=2e-3)  # the floor 1e-9 under the root, and float32


def test_bad_input_is_named(speech, fitted):
    features, truth = speech
    transcript = [s.phone for s in truth[0]]
    with pytest.raises(ValueError, match=r"knows no phones yet; call fit"):
        ViterbiAligner().align(features[0], transcript)
    with pytest.raises(ValueError, match="transcript 0 has the phone 'QQ'; this aligner has heard sil, AA"):
        fitted.align(features[0], ["QQ"])
    with pytest.raises(ValueError, match="transcript 0 is 'AA'"):
        fitted.align(features[0], "AA")
    with pytest.raises(ValueError, match=r"transcript 0 is \['sil'\]"):
        fitted.align(features[0], ["sil"])
    with pytest.raises(ValueError, match=r"transcript 0 is \[\]"):
        fitted.align(features[0], [])
    with pytest.raises(DataError, match=r"recording 0 has 20 frames and its \d+ phones take \d+ at least"):
        fitted.align(features[0][:, :20], transcript)
    with pytest.raises(ValueError, match=r"features 0 have shape \(25, \d+\); \(26, T\) is needed"):
        fitted.align(features[0][:25], transcript)
    spoilt = features[0].copy()
    spoilt[3, 7] = np.nan
    with pytest.raises(DataError, match="features 0 hold NaN"):
        fitted.align(spoilt, transcript)
    with pytest.raises(ValueError, match="2 recordings and 1 transcripts"):
        fitted.align_all(features[:2], [transcript])
    with pytest.raises(ValueError, match="0 recordings and 0 transcripts"):
        ViterbiAligner().fit([], [])
    refused = [
        ({"num_states": 0}, "num_states=0"),
        ({"num_mixtures": 3}, "power of two"),
        ({"frame_s": 0.0}, "frame_s"),
        ({"num_rounds": 2.5}, "whole number"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            ViterbiAligner(**options)


def test_a_fit_that_fails_changes_nothing(speech):
    features, truth = speech
    transcripts = [[s.phone for s in spans] for spans in truth]
    aligner = ViterbiAligner(num_rounds=3).fit(features[:5], transcripts[:5])
    before = aligner.align(features[0], transcripts[0])
    with pytest.raises(DataError, match="recording 0 has 1 frames"):
        aligner.fit([features[0][:, :1]], [transcripts[0]])
    assert aligner.align(features[0], transcripts[0]) == before
