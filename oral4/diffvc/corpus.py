"""Speech to train and to test on: voices that a program speaks, with exact alignments, and real people.

Every source gives :class:`Utterance` objects at one rate and one level. Synthetic voices need no network: espeak-ng
comes with the extra ``voice``, flite is used where the program is installed. Real speech is fetched by
:func:`oral4.data.fetch`: FSDD (six people say the ten digits) and an excerpt of LibriSpeech (259 readers).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from oral4.data.fetch import fetch
from oral4.diffvc.align import DIGITS, PhoneSpan, espeak_say, espeak_voices, flite_say, read_textgrid
from oral4.diffvc.audio import PRESETS, load_audio, resample
from oral4.errors import DataError

__all__ = [
    "DIGIT_SPEAKERS",
    "DIGIT_WORDS",
    "HELD_OUT_DIGITS",
    "HELD_OUT_ESPEAK",
    "SENTENCES",
    "Utterance",
    "change_speed",
    "digit_strings",
    "digits",
    "espeak_speech",
    "flite_speech",
    "level",
    "read_folder",
    "readers",
    "speech_rms",
    "word_salad",
]

DIGIT_WORDS = tuple(DIGITS)

DIGIT_SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
"""The people of FSDD."""

HELD_OUT_DIGITS = ("theo", "yweweler")
"""Speakers of FSDD that no training of ours hears."""

HELD_OUT_ESPEAK = ("m2", "m5", "m8", "f2", "f5", "steph2", "edward", "klatt3")
"""Variants of espeak-ng that no training of ours hears."""

SENTENCES = (
    "The river was still high after a week of rain, and the bridge was closed.",
    "She measured the garden twice before she bought the fence.",
    "Four young foxes crossed the road behind the old mill.",
    "Please leave the keys with the woman at the corner shop.",
    "A cheap clock can be right more often than a proud man.",
    "He thought about the question for a long while, then shook his head.",
    "We usually have breakfast on the porch when the weather is mild.",
    "The choir sang without a conductor and finished together.",
    "Both engines failed, yet the pilot brought the plane down safely.",
    "Nothing in the cupboard but salt, vinegar and a jar of beans.",
    "My cousin joined the navy and never learned to swim.",
    "Put the yellow book on the shelf above the piano.",
    "The judge asked for silence and got laughter.",
    "It is a pleasure to watch good people work.",
    "Their house stood alone at the edge of a wide field.",
    "How much would you charge for painting this wall?",
    "The boy drew a fish, a wheel, and something that might have been a horse.",
    "You could hear the ocean from every room in winter.",
    "Seven children shared one bicycle and argued about it daily.",
    "The doctor said to rest, drink water, and stop reading the news.",
    "A thin fog lay over the valley until noon.",
    "They chose the longer path because of the view.",
    "George has a huge collection of foreign stamps.",
    "I would rather be early and bored than late and sorry.",
    "The teacher gave each of us a stone and asked what it had seen.",
    "Our new machine washes, dries and folds, but it cannot iron.",
    "Do you know where the measuring spoons are?",
    "The old treasure map turned out to be a menu.",
    "Every bird in the yard went quiet when the hawk passed.",
    "She poured the oil slowly and counted to nine.",
    "Their voices carried far across the frozen lake.",
    "Five boats left the harbour; three came back before dark.",
    "The author rubbed his eyes and began the chapter again.",
    "A joyful noise came from the kitchen below.",
    "Birds, bees and butterflies visit the thistle by the gate.",
    "Zero is a number, and a rather useful one.",
    "The path through the woods is shorter but steeper.",
    "Which of the two would you choose, and why?",
    "He wished for snow and got a shower of hail.",
    "The usual crowd had gathered around the chess players.",
)
"""Sentences of our own, with every phone of English in several places."""

_WORDS = (
    "about above across afraid again air alone also angry animal answer apple arm around ask autumn away baby back bad bag "
    "bath beach bear beautiful because bed before begin bell better between big bird birthday black blood blue boat body book "
    "both bottle box boy bread break breathe bridge bright bring brother brown build burn bush busy butter buy cake call camera "
    "captain car careful carry catch chair change cheap cheese child choose church circle city clean clear climb clock cloth "
    "cloud coat coffee cold colour come cook copper corner count country course cousin cow cross crowd cry cup dance danger dark "
    "daughter day deep desert dinner doctor dog door doubt down dream drink drive drop dry dust eager ear early earth east easy "
    "edge egg eight empty engine enjoy enough evening every eye face fall family far farm fast father favour feather fence few "
    "field fifth finger fire first fish five flag floor flower fly food foot forest four fresh friend front fruit full garage "
    "garden gentle giant girl give glass go gold good grass great green ground group grow guess hair half hammer hand happy hard "
    "hat head hear heart heavy help here high hill history hold home honey hope horse hour house huge hundred hungry ice idea "
    "iron island jacket jaw job join joke journey judge juice jump kind king kitchen knee knife know ladder lake lamp language "
    "large laugh law lazy leaf learn leather leave left leg leisure letter library light lion list little long loud love low "
    "lunch machine magic make map market master measure meat medicine meet metal middle milk mind minute mirror money month moon "
    "morning mother mountain mouth move music name narrow nature near neck needle nephew never new night nine noise north nose "
    "nothing number ocean off office oil old one open orange other outside over own page paint paper party pass path peace pencil "
    "people pepper person photo picture piece pig place plan plane plant play please pocket point poor potato power pretty price "
    "prize proud pull purple push question quick quiet rabbit race radio rain raise rather reach ready red remember rest rhythm "
    "rice rich ride right river road rock roof room rope rough round royal run sad sail salt same sand say school science sea "
    "season second seed seven shadow shape share sharp sheep shine ship shirt shoe shop short shoulder shout show silver simple "
    "sing sister six skin sky sleep slow small smell smile smoke smooth snow soap soft soil soldier some son song sound soup "
    "south space speak spoon spring square stair star station stay steam stone story storm straight strange street strong sugar "
    "summer sun sweet swim table tail tall taste tea teach teeth ten that thick thief thin thing third thirsty this three throat "
    "throw thumb thunder ticket tiger time tired today toe together tomorrow tongue tooth touch tower town toy treasure tree "
    "trouble true trust truth try turn two ugly uncle under usual valley vegetable very village vision visit voice wait walk wall "
    "war warm wash watch water wave way weather week west wet wheat wheel where whistle white wide wife wild window winter wise "
    "woman wood word work world worry write wrong yard year yellow yes yesterday young zebra zero zoo"
).split()


@dataclass(frozen=True, eq=False)
class Utterance:
    """One recording with what is known about it."""

    wave: np.ndarray
    "Samples, float32, shape (L,), at ``rate``; speech at -26 dB of full scale."
    rate: int
    "Samples per second."
    speaker: str
    "Unique over all sources, for example ``espeak/m3`` or ``librispeech/1688``."
    source: str
    '"espeak", "flite", "fsdd", "librispeech" or the name of a folder.'
    spans: tuple[PhoneSpan, ...] | None = None
    "When each phone was said, where known."
    text: str | None = None
    "What was said, where known."
    name: str | None = None
    "Name of the recording, where it comes from a folder."

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.wave) / self.rate


def speech_rms(wave: np.ndarray, rate: int) -> float:
    """Return how loud the speech in a wave is: 0 if there is none, 1 for a square wave of full scale.

    The root mean square over the windows of 20 ms that are within 30 dB of the loudest one, so that pauses do not
    count.

    Examples
    --------
    >>> tone = 0.5 * np.sin(np.arange(16_000) * 0.2)
    >>> loud = speech_rms(tone, 16_000)
    >>> padded = speech_rms(np.pad(tone, (0, 32_000)), 16_000)
    >>> round(loud, 3), round(padded / loud, 3)
    (0.354, 1.0)
    """
    window = max(1, rate // 50)
    padded = np.pad(wave, (0, -len(wave) % window)).astype(np.float64)
    power = (padded.reshape(-1, window) ** 2).mean(1)
    loudest = power.max(initial=0.0)
    if not loudest > 1e-10:
        return 0.0
    return float(np.sqrt(power[power > 1e-3 * loudest].mean()))


def level(wave: np.ndarray, rate: int, decibels: float = -26.0) -> np.ndarray:
    """Return the wave scaled so that its speech has a given level, and never beyond full scale.

    The level is that of :func:`speech_rms`. A wave whose peaks would pass 0.99 is scaled so that they reach it.

    Parameters
    ----------
    wave : array, shape (L,)
        Samples.
    rate : int
        Samples per second.
    decibels : float
        Level relative to full scale, dB.

    Raises
    ------
    DataError
        If the wave holds no sound.

    Examples
    --------
    >>> tone = np.sin(np.arange(16_000) * 0.2)
    >>> round(float(np.sqrt((level(tone, 16_000, -20.0) ** 2).mean())), 3)
    0.1
    """
    loud = speech_rms(wave, rate)
    if not loud:
        raise DataError("no speech: the sound is silent")
    gain = 10 ** (decibels / 20) / loud
    return (wave * min(gain, 0.99 / np.abs(wave).max())).astype(np.float32)


def change_speed(utterance: Utterance, factor: float) -> Utterance:
    """Return the utterance played ``factor`` times as fast: pitch, formants and tempo move together.

    To a network it is another speaker, so the name is another one too.

    Examples
    --------
    >>> tone = Utterance(np.sin(np.arange(16_000) * 0.2).astype(np.float32), 16_000, "a", "tone")
    >>> change_speed(tone, 1.25).seconds, change_speed(tone, 1.25).speaker
    (0.8, 'a x1.25')
    """
    if not 0.5 <= factor <= 2:
        raise ValueError(f"factor={factor}: a speed from 0.5 to 2 is needed")
    if factor == 1:
        return utterance
    wave = resample(utterance.wave, utterance.rate, round(utterance.rate / factor))
    spans = utterance.spans and tuple(
        PhoneSpan(span.start_s / factor, span.end_s / factor, span.phone) for span in utterance.spans
    )
    wave = level(wave, utterance.rate)
    return replace(utterance, wave=wave, spans=spans, speaker=f"{utterance.speaker} x{factor:g}")


def word_salad(count: int, words: int = 9, seed: int = 0) -> list[str]:
    """Return ``count`` strings of random words; about every fourth word is a digit.

    Random order costs nothing here, since phones are learnt, and covers more pairs of phones than prose.
    """
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(DIGIT_WORDS if rng.random() < 0.25 else _WORDS) for _ in range(words)) for _ in range(count)
    ]


def espeak_speech(
    voices: Sequence[str], texts: Sequence[str], *, rate: int = 16_000, seed: int = 0, vary: bool = True
) -> Iterator[Utterance]:
    """Let every variant of espeak-ng say every text, at a pitch, range and tempo of its own.

    Parameters
    ----------
    voices : sequence of str
        Variants, such as ``"m3"`` or ``"steph"``.
    texts : sequence of str
        What they say.
    rate : int
        Samples per second of the outcome.
    seed : int
        Of accent, pitch, range and tempo, which are drawn once a voice.
    vary : bool
        False: every variant with its default settings in American English.
    """
    known = set(espeak_voices())
    for voice in voices:
        rng = random.Random(f"{seed} {voice}")
        accent = rng.choice(["en-us", "en-us", "en-gb"]) if vary else "en-us"
        pitch, pitch_range = (rng.randint(25, 75), rng.randint(35, 75)) if vary else (50, 50)
        words = rng.randint(135, 190) if vary else 160
        name = f"{accent}+{voice}"
        if name not in known:
            raise ValueError(f"espeak-ng has no variant {voice!r}; see oral4.diffvc.align.espeak_voices()")
        for text in texts:
            wave, native, spans = espeak_say(text, name, pitch=pitch, pitch_range=pitch_range, rate_wpm=words)
            wave = level(resample(wave, native, rate), rate)
            yield Utterance(wave, rate, f"espeak/{voice}", "espeak", tuple(spans), text)


def flite_speech(voices: Sequence[str], texts: Sequence[str], *, rate: int = 16_000) -> Iterator[Utterance]:
    """Let every voice of flite say every text; see :func:`oral4.diffvc.align.flite_say`."""
    for voice in voices:
        for text in texts:
            wave, native, spans = flite_say(text, voice)
            yield Utterance(level(resample(wave, native, rate), rate), rate, f"flite/{voice}", "flite", tuple(spans), text)


def digits(
    speakers: Sequence[str] | None = None, *, takes: Sequence[int] = range(50), rate: int = 16_000
) -> Iterator[Utterance]:
    """Read single digits of the Free Spoken Digit Dataset, in the order of speaker, take, digit.

    Parameters
    ----------
    speakers : sequence of str, optional
        Some of george, jackson, lucas, nicolas, theo, yweweler; all if left out.
    takes : sequence of int
        Takes 0 to 49.
    rate : int
        Samples per second of the outcome; the recordings have 8000, so nothing is above 4 kHz.

    Raises
    ------
    DataError
        If the recordings are not at hand and cannot be downloaded.
    """
    folder = fetch("fsdd") / "recordings"
    known = sorted({path.name.split("_")[1] for path in folder.glob("*.wav")})
    for speaker in known if speakers is None else speakers:
        if speaker not in known:
            raise ValueError(f"FSDD has no speaker {speaker!r}; choose from {', '.join(known)}")
        for take in takes:
            for digit, word in enumerate(DIGIT_WORDS):
                wave, native = load_audio(folder / f"{digit}_{speaker}_{take}.wav")
                wave = level(resample(wave, native, rate), rate)
                yield Utterance(wave, rate, f"fsdd/{speaker}", "fsdd", None, word)


def digit_strings(
    speakers: Sequence[str] | None = None,
    *,
    takes: Sequence[int] = range(50),
    length: int = 4,
    pause_s: float = 0.08,
    rate: int = 16_000,
    seed: int = 0,
) -> Iterator[Utterance]:
    """Join digits of one speaker to strings, in a random order: one digit is too short to tell a voice by.

    Every digit of every take is used once. Between two digits stands a pause at the level of a quiet room.
    """
    rng = random.Random(seed)
    groups: dict[str, list[Utterance]] = {}
    for utterance in digits(speakers, takes=takes, rate=rate):
        groups.setdefault(utterance.speaker, []).append(utterance)
    noise = np.random.default_rng(seed)
    for speaker, single in groups.items():
        rng.shuffle(single)
        for start in range(0, len(single) - length + 1, length):
            parts, words = [], []
            for utterance in single[start : start + length]:
                quiet = 1e-4 * noise.standard_normal(round(pause_s * rate)).astype(np.float32)
                parts += [utterance.wave, quiet]
                words.append(str(utterance.text))
            yield Utterance(np.concatenate(parts), rate, speaker, "fsdd", None, " ".join(words))


def readers(part: str = "train", *, rate: int = 16_000) -> Iterator[Utterance]:
    """Read the excerpt of LibriSpeech: real people who read aloud, without transcripts.

    Parameters
    ----------
    part : {"train", "test"}
        ``"train"``: 251 readers of train-clean-100, one utterance each. ``"test"``: 8 readers of test-other, ten each.
    rate : int
        Samples per second of the outcome.

    Raises
    ------
    DataError
        If the recordings are not at hand and cannot be downloaded.
    """
    folders = {"train": "librispeech_train-clean-100", "test": "librispeech_test-other"}
    if part not in folders:
        raise ValueError(f"part={part!r}: choose 'train' or 'test'")
    for path in sorted((fetch("librispeech-excerpt") / folders[part]).rglob("*.flac")):
        wave, native = load_audio(path)
        speaker = path.name.split("-")[0]
        yield Utterance(level(resample(wave, native, rate), rate), rate, f"librispeech/{speaker}", "librispeech")


def read_folder(folder: str | Path, preset: str = "hifigan-22k") -> Iterator[Utterance]:
    """Read a corpus in the layout of LibriTTS and VCTK as the official code wants it.

    ``folder/wavs/<speaker>/<utterance>.wav`` (or ``.flac``) and, where there are alignments,
    ``folder/textgrids/<speaker>/<utterance>.TextGrid``. Utterances whose alignment holds ``spn`` (speech that the
    aligner did not know) are left out, as the paper does.

    Raises
    ------
    DataError
        If there is no ``wavs`` folder in it, or no recording.
    """
    folder = Path(folder)
    rate = PRESETS[preset].rate
    paths = sorted(path for kind in ("*.wav", "*.flac") for path in (folder / "wavs").glob(f"*/{kind}"))
    if not paths:
        raise DataError(f"{folder}: no recordings at wavs/<speaker>/<utterance>.wav or .flac")
    for path in paths:
        grid = folder / "textgrids" / path.parent.name / f"{path.stem}.TextGrid"
        spans = tuple(read_textgrid(grid)) if grid.is_file() else None
        if spans is not None and any(span.phone == "spn" for span in spans):
            continue
        wave, native = load_audio(path)
        yield Utterance(resample(wave, native, rate), rate, path.parent.name, folder.name, spans, name=path.stem)
