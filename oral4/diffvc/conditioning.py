"""What should the decoder see of the target's voice? Four short trainings that differ in nothing else.

The paper's U-Net learns to paint speech over its average voice, with the speaker's embedding alone (``d_only``), also
with the reference at the same diffusion time, without noise (``wodyn``, the official code) or with it (``noisy``, the
paper's text), or with the reference at fifteen diffusion times (``whole``). Batches, times, noise and first weights of
the U-Net are the same for all. `run_conditioning` is registered in `oral4.diffvc.experiment`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from oral4.diffusion.sde import VP
from oral4.diffvc import corpus, training
from oral4.diffvc.audio import log_mel
from oral4.diffvc.convert import Converter, shipped_converter
from oral4.diffvc.corpus import Utterance, level
from oral4.diffvc.decoder import NUM_TRAJECTORY, Decoder, DecoderConfig
from oral4.diffvc.model import DiffVC, diffused_reference
from oral4.diffvc.speaker import SpeakerEncoder
from oral4.diffvc.study import Pair, draw_pairs, held_out_speech
from oral4.train import TrainConfig, derive_seed, fit

__all__ = [
    "CONDITIONING_BETTER",
    "CONDITIONING_TOLERANCE",
    "CONDITIONING_UNITS",
    "CONDITIONS",
    "ConditioningConfig",
    "ScaledDecoder",
    "Stretch",
    "condition_batch",
    "held_out_loss",
    "run_conditioning",
    "seen_reference",
    "stretches_of",
    "train_condition",
]

CONDITIONS = {"d_only": ("d-only", False), "wodyn": ("wodyn", False), "noisy": ("wodyn", True), "whole": ("whole", False)}
"""Name to the decoder's ``condition``, and whether the reference that it sees is noisy."""

BASELINES = ("copied", "nobody", "ceiling")

RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """Size of the experiment on the speaker's condition."""

    steps: int = 300
    "Updates of each of the four trainings."
    batch: int = 8
    "Crops in a batch."
    frames: int = 48
    "Frames of a crop, and of the reference beside it: 0.6 s each."
    dim: int = 16
    "Channels of the U-Net's first level; the paper has 256."
    g_dim: int = 32
    "Width of the speaker's condition; the paper has 128."
    lr: float = 2e-3
    "Highest learning rate."
    readers: int = 251
    "Readers to train on, one utterance each."
    seconds: float = 6.0
    "Seconds of each that are used."
    test_batches: int = 16
    "Batches of unseen readers that the loss is measured on."
    pairs: int = 12
    "Conversions between unseen readers, for each condition."
    num_steps: int = 6
    "Reverse steps of a conversion."
    precision: str = "bf16"
    "As in :class:`oral4.train.TrainConfig`."
    real: bool = True
    "Whether people speak; otherwise variants of espeak-ng do."
    espeak_voices: int = 12
    "How many variants, where they do."

    @classmethod
    def smoke(cls) -> ConditioningConfig:
        """Make a few updates on synthetic voices, and convert twice."""
        return cls(steps=3, batch=4, frames=16, dim=8, g_dim=8, seconds=2.0, test_batches=1, pairs=2, num_steps=2,
                   real=False, espeak_voices=2)  # fmt: skip

    @classmethod
    def mini(cls) -> ConditioningConfig:
        """Train four times for a little more than a minute: about six minutes a seed on one core."""
        return cls()


# ---- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stretch:
    """What training needs of one utterance."""

    mel: Tensor
    "Log-mel, float32, (F, T)."
    xbar: Tensor
    "Its average voice, (F, T)."
    voice: Tensor
    "Embedding of its speaker, (E,)."


@torch.no_grad()
def stretches_of(utterances: Sequence[Utterance], converter: Converter, *, seconds: float, shortest: int) -> list[Stretch]:
    """Return log-mel, average voice and embedding of the first seconds of every utterance.

    Parameters
    ----------
    utterances : sequence of Utterance
        At 16 kHz.
    converter : Converter
        Gives the average voice and the embedding.
    seconds : float
        Longest stretch.
    shortest : int
        Utterances of fewer frames are left out.

    Raises
    ------
    ValueError
        If none is left.
    """
    found = []
    for utterance in utterances:
        mel = log_mel(utterance.wave[: round(seconds * RATE)])
        if mel.shape[1] >= shortest:
            mask = torch.ones(1, 1, mel.shape[1])
            voice = converter.voice(mel[None], mask)[0]
            found.append(Stretch(mel, converter.model.average_voice(mel[None], mask)[0], voice))
    if not found:
        raise ValueError(f"none of {len(utterances)} utterances has {shortest} frames; give longer ones, or shorter crops")
    return found


def condition_batch(stretches: Sequence[Stretch], *, batch: int, frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a batch, its diffusion times and all noise: the same for every condition.

    Parameters
    ----------
    stretches : sequence of Stretch
        Of at least ``2 * frames`` frames each.
    batch, frames : int
    generator : torch.Generator

    Returns
    -------
    dict
        ``mel``, ``xbar``, ``noise``, ``reference``, ``reference_xbar``, ``reference_noise`` (B, F, T), ``voice`` (B, E),
        ``t`` (B,). The reference is another part of the same utterance and shares no frame with ``mel``.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ("mel", "xbar", "reference", "reference_xbar", "voice")}
    for index in torch.randint(len(stretches), (batch,), generator=generator).tolist():
        each = stretches[index]
        spare = each.mel.shape[1] - 2 * frames
        if spare < 0:
            raise ValueError(f"a stretch has {each.mel.shape[1]} frames; two crops of {frames} need {2 * frames}")
        before, between = torch.randint(spare + 1, (2,), generator=generator).sort().values.tolist()
        first, second = slice(before, before + frames), slice(between + frames, between + 2 * frames)
        own, other = (first, second) if torch.rand((), generator=generator) < 0.5 else (second, first)
        rows["mel"].append(each.mel[:, own])
        rows["xbar"].append(each.xbar[:, own])
        rows["reference"].append(each.mel[:, other])
        rows["reference_xbar"].append(each.xbar[:, other])
        rows["voice"].append(each.voice)
    found = {name: torch.stack(parts) for name, parts in rows.items()}
    found["t"] = 1e-5 + (1 - 2e-5) * (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    for name in ("noise", "reference_noise"):
        found[name] = torch.randn(found["mel"].shape, generator=generator)
    return found


def seen_reference(name: str, batch: dict[str, Tensor], sde: VP) -> Tensor | None:
    """Return what a condition sees of the reference at the times of the batch.

    Parameters
    ----------
    name : str
        One of ``CONDITIONS``.
    batch : dict
        Of `condition_batch`.
    sde : VP

    Returns
    -------
    Tensor, shape (B, F, R) or (B, 15, F, R), or None
    """
    condition, noisy = CONDITIONS[name]
    if condition == "d-only":
        return None
    reference, xbar, t = batch["reference"], batch["reference_xbar"], batch["t"]
    if condition == "whole":
        points = [(j + 0.5) / NUM_TRAJECTORY for j in range(NUM_TRAJECTORY)]
        return torch.stack([diffused_reference(reference, xbar, torch.full_like(t, s), sde, False) for s in points], 1)
    mean = diffused_reference(reference, xbar, t, sde, False)
    return mean + sde.v(t).sqrt()[:, None, None] * batch["reference_noise"] if noisy else mean


# ---- the decoder and its training ---------------------------------------------------------------------------------


class ScaledDecoder(nn.Module):
    """The paper's decoder between numbers of unit size, for a training of a minute.

    # differs from the paper: its U-Net sees log-mels as they are and answers with the score, whose size grows without
    # bound towards t = 0. Here the U-Net answers with what a linear estimate of the speech leaves over, in units of that
    # remainder (Karras et al., 2022); the score follows by Tweedie's formula.

    Parameters
    ----------
    decoder : Decoder
    sde : VP
    spread : float, > 0
        Standard deviation of speech around its average voice.
    mean, std : Tensor, shape (F, 1)
        Of every band of a log-mel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, decoder: Decoder, sde: VP, spread: float, mean: Tensor, std: Tensor):
        super().__init__()
        if not (math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread is {spread}; give a positive number")
        self.decoder = decoder
        self.needs_reference = decoder.needs_reference
        self.sde = sde
        self.spread = spread
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def condition(self, voice: Tensor, t: Tensor, reference: Tensor | None, reference_mask: Tensor | None) -> Tensor:
        """Return the speaker's condition (B, G), see `oral4.diffvc.decoder.SpeakerCondition`."""
        seen = None if reference is None else (reference - self.mean) / self.std
        return self.decoder.condition(voice * math.sqrt(voice.shape[1]), t, seen, reference_mask)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return ``a``, ``v``, ``keep``, ``change`` and the size of the input at times (B,), each (B, 1, 1)."""
        a, v = self.sde.a(t)[:, None, None], self.sde.v(t)[:, None, None]
        power = a * a * self.spread**2 + v
        return a, v, a * self.spread**2 / power, self.spread * (v / power).sqrt(), power.sqrt()

    def answer(self, x: Tensor, mask: Tensor | None, xbar: Tensor, g: Tensor, t: Tensor) -> Tensor:
        """Return the U-Net's own answer (B, F, T), of about unit size."""
        seen = (x - xbar) / self.scales(t)[4]
        return self.decoder(seen, mask, (xbar - self.mean) / self.std, g, t).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None, xbar: Tensor, g: Tensor, t: Tensor) -> Tensor:
        """Return the score (B, F, T) of x."""
        a, v, keep, change, _ = self.scales(t)
        shifted = x - xbar
        score = (a * (keep * shifted + change * self.answer(x, mask, xbar, g, t)) - shifted) / v
        return score if mask is None else score * mask

    def errors(self, batch: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Return the squared error of the U-Net's answer and of the paper's loss, per item of the batch (B,).

        The paper's loss is the first, times ``(a spread)^2 / (a^2 spread^2 + v)``: at strong noise, where the voice is
        decided, it asks for next to nothing. Trainings of minutes are better off with the first.
        """
        t, xbar = batch["t"], batch["xbar"]
        a, v, keep, change, size = self.scales(t)
        clean = batch["mel"] - xbar
        noisy = a * clean + v.sqrt() * batch["noise"]
        wanted = (clean - keep * noisy) / change
        g = self.condition(batch["voice"], t, seen_reference(name, batch, self.sde), None)
        found = (self.answer(xbar + noisy, None, xbar, g, t) - wanted).square().mean((1, 2))
        return found, found * (a * self.spread / size).square()[:, 0, 0]


class _Error(nn.Module):
    """The decoder as a module whose forward gives the error of a batch, which is what training autocasts."""

    def __init__(self, decoder: ScaledDecoder, name: str):
        super().__init__()
        self.decoder = decoder
        self.name = name

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.decoder.errors(batch, self.name)[0].mean()


def train_condition(
    name: str, stretches: Sequence[Stretch], config: ConditioningConfig, seed: int, **more: Any
) -> ScaledDecoder:
    """Return a decoder, trained with one of ``CONDITIONS``.

    Parameters
    ----------
    name : str
    stretches : sequence of Stretch
    config : ConditioningConfig
    seed : int
        Of first weights, batches, times and noise, which depend on nothing else.
    **more
        Passed to :func:`oral4.train.fit`, for example ``callbacks``.
    """
    if name not in CONDITIONS:
        raise ValueError(f"name is {name!r}; choose one of {', '.join(CONDITIONS)}")
    mel, xbar = (torch.cat([getattr(each, part) for each in stretches], 1) for part in ("mel", "xbar"))
    sizes = DecoderConfig(
        num_mels=len(mel), dim=config.dim, g_dim=config.g_dim, voice_dim=len(stretches[0].voice), heads=2, head_dim=8,
        condition=CONDITIONS[name][0],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        inner = Decoder(sizes)  # the U-Net first: its weights are the same for every condition
    spread = float((mel - xbar).square().mean().sqrt())
    decoder = ScaledDecoder(inner, VP(), spread, mel.mean(1, keepdim=True), mel.std(1, keepdim=True))

    def batches(epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for _ in range(100):
            yield condition_batch(stretches, batch=config.batch, frames=config.frames, generator=generator)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))

    module = _Error(decoder, name)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.lr, betas=(0.9, 0.98))
    settings = TrainConfig(steps=config.steps, clip_norm=1.0, precision=config.precision, seed=seed, log_every=50, progress=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    fit(lambda model, batch: model(batch), module, optimizer, batches, settings, scheduler=scheduler, **more)
    return decoder.eval()


@torch.no_grad()
def held_out_loss(
    decoder: ScaledDecoder, name: str, stretches: Sequence[Stretch], config: ConditioningConfig, seed: int
) -> dict[str, float]:
    """Return the paper's loss, the error of the U-Net's own answer, and how much that grows with another's voice.

    On batches that depend on the seed alone. For the growth, ``listens``, every item is given embedding and reference
    of its neighbour in the batch; in units of the error.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "test"))
    losses, errors, swapped = [], [], []
    for _ in range(config.test_batches):
        batch = condition_batch(stretches, batch=config.batch, frames=config.frames, generator=generator)
        error, loss = decoder.errors(batch, name)
        errors.append(float(error.mean()))
        losses.append(float(loss.mean()))
        batch |= {part: batch[part].roll(1, 0) for part in ("voice", "reference", "reference_xbar")}
        swapped.append(float(decoder.errors(batch, name)[0].mean()))
    error_mean = float(np.mean(errors))
    return {"loss": float(np.mean(losses)), "error": error_mean, "listens": float(np.mean(swapped)) / error_mean - 1}


# ---- conversion -------------------------------------------------------------------------------------------------


def _shared_out(groups: dict[str, list[Utterance]]) -> tuple[dict[str, list[Utterance]], dict[str, list[Utterance]]]:
    """Return every speaker's recordings in two parts: to convert, and two for the judge to know the voice from."""
    return {who: each[:-2] for who, each in groups.items()}, {who: each[-2:] for who, each in groups.items()}


class _Judge:
    """GE2E, and what it has heard of every speaker: recordings that no conversion is given."""

    def __init__(self, heard: dict[str, list[Utterance]]):
        self.encoder = SpeakerEncoder.from_resemblyzer()
        self.voices = {
            speaker: functional.normalize(torch.stack([self.point(each.wave) for each in utterances]).mean(0), dim=0)
            for speaker, utterances in heard.items()
        }

    def point(self, wave: np.ndarray) -> Tensor:
        return torch.as_tensor(self.encoder.embed(level(wave, RATE), RATE)).float()

    def similarities(self, wave: np.ndarray, pair: Pair) -> tuple[float, float]:
        """Return the similarity of a sound to the target and to the source."""
        point = self.point(wave)
        return float(point @ self.voices[pair.reference.speaker]), float(point @ self.voices[pair.source.speaker])


@torch.no_grad()
def _converted(
    decoder: ScaledDecoder, name: str, pair: Pair, converter: Converter, config: ConditioningConfig, seed: int
) -> np.ndarray:
    """Return the sound of one conversion."""
    model = DiffVC(converter.model.encoder, decoder, sde=decoder.sde, preset=converter.preset, reference_noise=CONDITIONS[name][1])
    mel, reference = log_mel(pair.source.wave)[None], log_mel(pair.reference.wave)[None]
    mask, reference_mask = (torch.ones(1, 1, each.shape[2]) for each in (mel, reference))
    voice = converter.voice(reference, reference_mask)
    found = model.sample(mel, mask, voice, reference, reference_mask, num_steps=config.num_steps, seed=seed)
    return converter.vocoder.vocode(found[0])


def run_conditioning(config: ConditioningConfig, seed: int, **more: Any) -> dict[str, float]:
    """Train once with every condition, and measure on unseen speakers.

    Parameters
    ----------
    config : ConditioningConfig
    seed : int
    **more
        Passed to :func:`oral4.train.fit`, for example ``callbacks``.

    Returns
    -------
    dict
        The keys of `CONDITIONING_UNITS`. For every condition ``<name>_loss``: the paper's loss; ``<name>_error``: the
        squared error of the U-Net's own answer, which weighs all noise alike; ``<name>_target`` and ``<name>_source``:
        mean similarity, by GE2E, of converted speech to the target and the source. ``copied``, ``nobody`` and
        ``ceiling`` are the source, its average voice and another recording of the target, vocoded. ``<a>_minus_<b>``:
        difference of similarities to the target. ``<name>_listens``: how much the error grows, in units of itself,
        where every item is given the voice and the reference of another one; 0 if the decoder does not listen.

    Raises
    ------
    DataError
        If real speech is asked for, and neither at hand nor to be downloaded.
    """
    converter = shipped_converter("cpu")
    if config.real:
        speech = list(islice(corpus.readers("train"), config.readers))
    else:
        speech = list(corpus.espeak_speech(training.ESPEAK_VOICES[: config.espeak_voices], corpus.SENTENCES[:4], seed=seed))
    groups = held_out_speech(config.real)
    test = [each for utterances in groups.values() for each in utterances]
    heard, unheard = (
        stretches_of(utterances, converter, seconds=config.seconds, shortest=2 * config.frames) for utterances in (speech, test)
    )
    own, known = _shared_out(groups)
    judge = _Judge(known)
    pairs = draw_pairs(own, seed, seconds=3.0)[: config.pairs]

    found: dict[str, float] = {}
    for name in CONDITIONS:
        decoder = train_condition(name, heard, config, seed, **more)
        found |= {f"{name}_{kind}": value for kind, value in held_out_loss(decoder, name, unheard, config, seed).items()}
        points = [
            judge.similarities(_converted(decoder, name, pair, converter, config, seed + index), pair)
            for index, pair in enumerate(pairs)
        ]
        found[f"{name}_target"], found[f"{name}_source"] = np.mean(points, axis=0).tolist()
    rng = random.Random(seed)
    sounds: dict[str, list[float]] = {name: [] for name in BASELINES}
    for pair in pairs:
        mel, other = log_mel(pair.source.wave), rng.choice(own[pair.reference.speaker])
        average = converter.model.average_voice(mel[None], torch.ones(1, 1, mel.shape[1]))[0]
        for name, seen in (("copied", mel), ("nobody", average), ("ceiling", log_mel(other.wave[: 3 * RATE]))):
            sounds[name].append(judge.similarities(converter.vocoder.vocode(seen), pair)[0])
    found |= {f"{name}_target": float(np.mean(values)) for name, values in sounds.items()}
    for name, other_name in DIFFERENCES:
        found[f"{name}_minus_{other_name}"] = found[f"{name}_target"] - found[f"{other_name}_target"]
    return found


DIFFERENCES = (("wodyn", "d_only"), ("noisy", "wodyn"), ("whole", "wodyn"))

CONDITIONING_UNITS: dict[str, str] = dict.fromkeys(
    [f"{name}_{kind}" for name in CONDITIONS for kind in ("loss", "error", "listens", "target", "source")]
    + [f"{name}_target" for name in BASELINES]
    + [f"{name}_minus_{other}" for name, other in DIFFERENCES],
    "",
)
"""Every value that `run_conditioning` returns, with its unit."""

CONDITIONING_BETTER: dict[str, str] = {
    **{f"{name}_{kind}": "lower" for name in CONDITIONS for kind in ("loss", "error", "source")},
    **{f"{name}_target": "higher" for name in CONDITIONS},
}
"""Which way is better, where one is."""

CONDITIONING_TOLERANCE: dict[str, float] = {
    **{f"{name}_{kind}": 0.05 for name in CONDITIONS for kind in ("loss", "error")},
    **{f"{name}_target": 0.1 for name in CONDITIONS},
    "ceiling_target": 0.03,
}
"""How far a repetition of a seed may be off, relatively: sums in bf16 depend on the processor."""
