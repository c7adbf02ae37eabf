"""What the conversion experiments do with one seed: who is converted to whom, and what is measured on the outcome.

All voices here are ones that no training heard: eight readers of LibriSpeech's test-other, two people of FSDD, eight
variants of espeak-ng. Without real speech (a machine without data) the variants stand in for the readers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from oral4.diffvc import corpus, training
from oral4.diffvc.align import PHONES
from oral4.diffvc.audio import log_mel
from oral4.diffvc.compact import ContentEncoder
from oral4.diffvc.convert import Converter
from oral4.diffvc.corpus import Utterance
from oral4.diffvc.metrics import DigitRecogniser, f0_track, frechet_mel, mel_distortion, voice_distance
from oral4.diffvc.speaker import SpeakerEncoder
from oral4.errors import require

__all__ = [
    "Pair",
    "conversion_study",
    "digit_study",
    "draw_pairs",
    "held_out_speech",
    "parallel_study",
    "probe_study",
    "solver_study",
    "spectral_transfer",
]

RATE = 16_000


@dataclass(frozen=True, eq=False)
class Pair:
    """One conversion to be made."""

    source: Utterance
    "What is said."
    reference: Utterance
    "By whom it shall be said."


def held_out_speech(real: bool = True, texts: int = 4) -> dict[str, list[Utterance]]:
    """Return speaker to utterances of at least two seconds, of people (or variants) that no training heard."""
    groups: dict[str, list[Utterance]] = {}
    source = corpus.readers("test") if real else corpus.espeak_speech(corpus.HELD_OUT_ESPEAK[:3], corpus.SENTENCES[:texts])
    for utterance in source:
        if utterance.seconds >= 2:
            groups.setdefault(utterance.speaker, []).append(utterance)
    return groups


def _cut(utterance: Utterance, seconds: float) -> Utterance:
    """Return the first seconds of an utterance."""
    return Utterance(utterance.wave[: round(seconds * RATE)], RATE, utterance.speaker, utterance.source)


def draw_pairs(groups: Mapping[str, Sequence[Utterance]], seed: int, *, seconds: float = 4.0) -> list[Pair]:
    """Return one pair for every ordered pair of different speakers: a stretch of the source, and up to ten seconds of the target."""
    rng = random.Random(seed)
    pairs = []
    for target in sorted(groups):
        for source in sorted(groups):
            if source != target:
                reference = rng.choice(list(groups[target]))
                pairs.append(Pair(_cut(rng.choice(list(groups[source])), seconds), _cut(reference, 10.0)))
    rng.shuffle(pairs)
    return pairs


def spectral_transfer(mel: Tensor, reference: Tensor) -> Tensor:
    """Return the source's log-mel (F, T) with the mean and the spread of every band of the reference: the simplest conversion."""
    mean, std = mel.mean(1, keepdim=True), mel.std(1, keepdim=True).clamp(min=1e-3)
    return (mel - mean) / std * reference.std(1, keepdim=True) + reference.mean(1, keepdim=True)


def _is_part(cut: Utterance, whole: Utterance) -> bool:
    """Tell whether ``cut`` is the beginning of ``whole``."""
    return np.array_equal(whole.wave[: len(cut.wave)], cut.wave)


def _median_semitone(wave: np.ndarray) -> float:
    """Return the median pitch in semitones above 1 Hz; NaN where no frame is voiced."""
    hz = f0_track((wave, RATE))
    voiced = hz[hz > 0]
    return float(12 * np.log2(np.median(voiced))) if len(voiced) else float("nan")


class _Judge:
    """GE2E, which took no part in the conversion: the converter has a voice print of its own."""

    def __init__(self, groups: Mapping[str, Sequence[Utterance]]):
        self.encoder = SpeakerEncoder.from_resemblyzer()
        self.points = {
            speaker: [(utterance, self.point(utterance.wave)) for utterance in utterances]
            for speaker, utterances in groups.items()
        }

    def point(self, wave: np.ndarray) -> Tensor:
        return torch.as_tensor(self.encoder.embed(corpus.level(wave, RATE), RATE)).float()

    def voice(self, speaker: str, without: Utterance) -> Tensor:
        """Return the direction of a speaker's utterances other than the one that was given to the converter."""
        others = [point for utterance, point in self.points[speaker] if not _is_part(without, utterance)]
        return functional.normalize(torch.stack(others).mean(0), dim=0)


def _similarities(judge: _Judge, wave: np.ndarray, pair: Pair) -> tuple[float, float]:
    """Return the similarity of a sound to the target and to the source."""
    point = judge.point(wave)
    target, source = judge.voice(pair.reference.speaker, pair.reference), judge.voice(pair.source.speaker, pair.source)
    return float(point @ target), float(point @ source)


def conversion_study(converter: Converter, *, seed: int, real: bool = True, most: int = 56) -> dict[str, float]:
    """Convert between unseen speakers; return similarities by GE2E for our conversion, three simpler ones and the ceiling.

    ``*_target`` and ``*_source`` are mean similarities to the target's and the source's other utterances, ``*_closer``
    the share of pairs in which the target's is larger. ``warm`` is our conversion at temperature 1. The ceiling is another utterance of the target, vocoded.
    """
    groups = held_out_speech(real)
    judge = _Judge(groups)
    rng = random.Random(seed)
    rows: dict[str, list[tuple[float, float]]] = {}
    melody: dict[str, list[float]] = {"converted": [], "copied": []}
    distance: dict[str, list[float]] = {"converted": [], "copied": []}
    seconds = sound = 0.0
    for pair in draw_pairs(groups, seed)[:most]:
        mel, reference = log_mel(pair.source.wave), log_mel(pair.reference.wave)
        target = converter.voice_print((pair.reference.wave, RATE))
        start = time.perf_counter()
        found = converter.convert((pair.source.wave, RATE), target, seed=seed)
        seconds, sound = seconds + time.perf_counter() - start, sound + pair.source.seconds
        vocode = converter.vocoder.vocode
        other = rng.choice([u for u in groups[pair.reference.speaker] if not _is_part(pair.reference, u)])
        nobody = converter.model.average_voice(mel[None], torch.ones(1, 1, mel.shape[1]))[0]
        waves = {
            "converted": found.wave,
            "warm": converter.convert((pair.source.wave, RATE), target, seed=seed, temperature=1.0).wave,
            "copied": vocode(mel),
            "nobody": vocode(nobody),
            "prior": vocode(found.prior),
            "transferred": vocode(spectral_transfer(mel, reference)),
            "ceiling": vocode(log_mel(_cut(other, 4.0).wave)),
        }
        for name, wave in waves.items():
            rows.setdefault(name, []).append(_similarities(judge, wave, pair))
        for name in melody:
            melody[name].append(abs(_median_semitone(waves[name]) - _median_semitone(pair.reference.wave)))
            distance[name].append(voice_distance((waves[name], RATE), (pair.reference.wave, RATE)))
    outcome = {}
    for name, pairs in rows.items():
        to_target, to_source = np.array(pairs).T
        outcome[f"{name}_target"] = float(to_target.mean())
        outcome[f"{name}_source"] = float(to_source.mean())
        outcome[f"{name}_closer"] = float((to_target > to_source).mean())
    for name in melody:
        outcome[f"{name}_semitones"] = float(np.median([value for value in melody[name] if np.isfinite(value)]))
        outcome[f"{name}_distance"] = float(np.mean(distance[name]))
    outcome["beats_transfer"] = float(
        np.mean([a[0] > b[0] for a, b in zip(rows["converted"], rows["transferred"], strict=True)])
    )
    outcome["rtf"] = seconds / sound
    return outcome


def digit_study(
    converter: Converter, *, seed: int, real: bool = True, strings: int = 20, takes: int = 15, voices: int = 40,
    epochs: int = 12,
) -> dict[str, float]:
    """Convert strings of four digits by unseen people to unseen readers; return how many digits are still recognised.

    The recogniser has learnt from the four other people of FSDD and from synthetic voices, as recorded and through the
    vocoder: a converted voice has the bandwidth of a reader, which FSDD's telephone-like recordings alone do not teach.
    """
    rng = random.Random(seed)
    vocode = converter.vocoder.vocode
    readers = held_out_speech(real)
    if real:
        heard = [name for name in corpus.DIGIT_SPEAKERS if name not in corpus.HELD_OUT_DIGITS]
        train = list(corpus.digits(heard, takes=range(takes)))
        train += corpus.espeak_speech(training.ESPEAK_VOICES[:voices], corpus.DIGIT_WORDS)
        test = list(corpus.digits(corpus.HELD_OUT_DIGITS, takes=range(takes)))
    else:
        train = list(corpus.espeak_speech(["m1", "f1"], corpus.DIGIT_WORDS))
        test = list(corpus.espeak_speech(corpus.HELD_OUT_ESPEAK[:1], corpus.DIGIT_WORDS))

    def digit(utterance: Utterance) -> int:
        return corpus.DIGIT_WORDS.index(str(utterance.text))

    plain = [(utterance.wave, RATE) for utterance in train]
    spoken = [(vocode(log_mel(utterance.wave)), RATE) for utterance in train]
    recogniser = DigitRecogniser.fit(plain + spoken, [digit(utterance) for utterance in train] * 2, epochs=epochs, seed=seed)
    counts = {"recorded": 0, "vocoded": 0, "converted": 0, "warm": 0}
    total = 0
    for _ in range(strings):
        speaker = rng.choice(sorted({utterance.speaker for utterance in test}))
        words = rng.sample([utterance for utterance in test if utterance.speaker == speaker], 4)
        quiet = np.zeros(round(0.08 * RATE), dtype=np.float32)
        wave = np.concatenate([part for word in words for part in (word.wave, quiet)])
        reference = rng.choice(readers[rng.choice(sorted(readers))])
        target = converter.voice_print((_cut(reference, 10.0).wave, RATE))
        found = converter.convert((wave, RATE), target, seed=seed)
        warm = converter.convert((wave, RATE), target, seed=seed, temperature=1.0)
        sounds = {"recorded": wave, "vocoded": vocode(log_mel(wave)), "converted": found.wave, "warm": warm.wave}
        edges = np.cumsum([0] + [len(word.wave) + len(quiet) for word in words])
        for name, sound in sounds.items():
            cuts = [(sound[a:b], RATE) for a, b in pairwise(edges)]
            right = np.array(recogniser.recognise(cuts)) == [digit(word) for word in words]
            counts[name] += int(right.sum())
        total += len(words)
    return {name: count / total for name, count in counts.items()}


def parallel_study(converter: Converter, *, seed: int, texts: int = 3) -> dict[str, float]:
    """Convert between unseen variants of espeak-ng that say the same sentences; return distortions against the target's own.

    In dB, see :func:`oral4.diffvc.metrics.mel_distortion`: of the source as it is, of the converted one, of the simplest
    conversion.
    """
    rng = random.Random(seed)
    sentences = rng.sample(corpus.SENTENCES, texts + 1)
    spoken = {
        voice: list(corpus.espeak_speech([voice], sentences, seed=seed)) for voice in corpus.HELD_OUT_ESPEAK
    }
    values: dict[str, list[float]] = {"copied": [], "converted": [], "transferred": []}
    order = rng.sample(corpus.HELD_OUT_ESPEAK, len(spoken))
    for source, target in zip(order, order[1:] + order[:1], strict=True):  # nobody is converted to themselves
        reference = spoken[target][texts]
        voice = converter.voice_print((reference.wave, RATE))
        for index in range(texts):
            own = log_mel(spoken[target][index].wave)
            mel = log_mel(spoken[source][index].wave)
            found = converter.convert((spoken[source][index].wave, RATE), voice, seed=seed)
            values["copied"].append(mel_distortion(mel, own)[0])
            values["converted"].append(mel_distortion(found.mel, own)[0])
            values["transferred"].append(mel_distortion(spectral_transfer(mel, log_mel(reference.wave)), own)[0])
    return {name: float(np.mean(found)) for name, found in values.items()}


SOLVERS: dict[str, dict[str, Any]] = {
    "em_6": {"solver": "em", "steps": 6},
    "pf_6": {"solver": "pf", "steps": 6},
    "ml_6": {"solver": "ml", "steps": 6},
    "ml_6_tau": {"solver": "ml", "steps": 6, "tau": 0.5},
    "ml_6_full": {"solver": "ml", "steps": 6, "data_var": "estimate"},
    "ddim_6": {"solver": "ddim", "steps": 6},
    "dpmpp_6": {"solver": "dpmpp_2m", "steps": 6},
    "em_30": {"solver": "em", "steps": 30},
    "pf_30": {"solver": "pf", "steps": 30},
    "ml_30": {"solver": "ml", "steps": 30},
}
"""The solvers that are compared on speech."""


def solver_study(converter: Converter, *, seed: int, real: bool = True, most: int = 16) -> dict[str, float]:
    """Convert the same pairs with each solver, at temperature 1; return similarity to the target and distance to real speech.

    ``*_target``: similarity by GE2E. ``*_frechet``: squared Fréchet distance per band between all converted frames and
    the targets' own frames.
    """
    groups = held_out_speech(real)
    judge = _Judge(groups)
    pairs = draw_pairs(groups, seed)[:most]
    voices = [converter.voice_print((pair.reference.wave, RATE)) for pair in pairs]
    own = [log_mel(utterance.wave) for pair in pairs for utterance in groups[pair.reference.speaker][:4]]
    outcome = {}
    for name, how in SOLVERS.items():
        found = [
            converter.convert((pair.source.wave, RATE), voice, seed=seed, temperature=1.0, **how)
            for pair, voice in zip(pairs, voices, strict=True)
        ]
        close = [_similarities(judge, each.wave, pair)[0] for each, pair in zip(found, pairs, strict=True)]
        outcome[f"{name}_target"] = float(np.mean(close))
        outcome[f"{name}_frechet"] = frechet_mel([each.mel for each in found], own)
    return outcome


def _statistics(mel: Tensor) -> np.ndarray:
    return torch.cat([mel.mean(1), mel.std(1)]).numpy()


def probe_study(content: ContentEncoder, *, seed: int, real: bool = True) -> dict[str, float]:
    """Ask what the average voice still tells of the speaker, and of the phones.

    ``speaker_*``: accuracy of a logistic regression on the mean and the spread of every band of an utterance, for unseen
    readers; ``phone_*``: on single frames of unseen variants of espeak-ng, from other frames of other voices. ``mse_*``:
    squared error to the true average voice of unseen variants, against two answers that take no network.
    """
    sklearn = require("sklearn.linear_model", "voice")
    pipeline, scaler = require("sklearn.pipeline", "voice"), require("sklearn.preprocessing", "voice")
    rng = random.Random(seed)

    def accuracy(train: Any, test: Any) -> float:
        probe = pipeline.make_pipeline(scaler.StandardScaler(), sklearn.LogisticRegression(max_iter=2000))
        probe.fit(np.stack([x for x, _ in train]), [y for _, y in train])
        return float(probe.score(np.stack([x for x, _ in test]), [y for _, y in test]))

    @torch.no_grad()
    def average(mel: Tensor) -> Tensor:
        return content(mel[None], torch.ones(1, 1, mel.shape[1]))[0]

    outcome = {}
    groups = held_out_speech(real)
    split: dict[str, tuple[list[Any], list[Any]]] = {"mel": ([], []), "average": ([], [])}
    for speaker, utterances in groups.items():
        order = rng.sample(utterances, len(utterances))
        held = max(1, len(order) // 3)
        for index, utterance in enumerate(order):
            mel = log_mel(utterance.wave)
            for name, seen in (("mel", mel), ("average", average(mel))):
                split[name][0 if index >= held else 1].append((_statistics(seen), speaker))
    for name, (train, test) in split.items():
        outcome[f"speaker_{name}"] = accuracy(train, test)
    outcome["speaker_chance"] = 1 / len(groups)

    voices = rng.sample(corpus.HELD_OUT_ESPEAK, len(corpus.HELD_OUT_ESPEAK))
    sentences = rng.sample(corpus.SENTENCES, 3)
    items = training.items_of(corpus.espeak_speech(voices, sentences, seed=seed))
    frames: dict[str, tuple[list[Any], list[Any]]] = {"mel": ([], []), "average": ([], [])}
    errors: dict[str, list[float]] = {"encoder": [], "source": [], "constant": []}
    for item in items:
        assert item.phones is not None
        mel = item.mel.float()
        found = average(mel)
        known = item.phones >= 0
        wanted = content.table[item.phones.clamp(min=0)].T
        constant = content.table[:-1].mean(0)[:, None]
        for name, answer in (("encoder", found), ("source", mel), ("constant", constant.expand_as(mel))):
            errors[name].append(float(((answer - wanted)[:, known] ** 2).mean()))
        is_test = item.speaker.split("/")[1] in voices[:3]
        for frame in torch.nonzero(known).flatten().tolist()[::3]:
            for name, seen in (("mel", mel), ("average", found)):
                frames[name][int(is_test)].append((seen[:, frame].numpy(), PHONES[int(item.phones[frame])]))
    for name, (train, test) in frames.items():
        outcome[f"phone_{name}"] = accuracy(train, test)
    return outcome | {f"mse_{name}": float(np.mean(values)) for name, values in errors.items()}
