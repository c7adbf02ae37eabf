"""Training of the converter that ships: its content encoder, its voice print, its score.

Three stages, each short enough for two cores and each a function of its own: :func:`train_content` on aligned speech,
then on real speech that it has labelled itself; :func:`train_voice` towards the embeddings of GE2E;
:func:`train_score` on the reconstruction of speech from its content and another stretch of the same voice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from oral4.diffvc import corpus
from oral4.diffvc.align import DIGITS, PHONES, Chain, frame_phones, viterbi
from oral4.diffvc.audio import log_mel
from oral4.diffvc.compact import CompactDecoder, ContentEncoder, Voice, adapted_table
from oral4.diffvc.corpus import Utterance
from oral4.diffvc.model import DiffVC
from oral4.train import FitResult, TrainConfig, fit

__all__ = [
    "ESPEAK_VOICES",
    "FLITE_VOICES",
    "Item",
    "aligned_speech",
    "crop_start",
    "digit_accuracy",
    "distort",
    "force_align",
    "frame_accuracy",
    "free_align",
    "items_of",
    "label",
    "phone_table",
    "real_speech",
    "score_batch",
    "score_error",
    "set_scale",
    "share_of",
    "spell",
    "spread_of",
    "train_content",
    "train_score",
    "train_voice",
    "with_embeddings",
    "with_posteriors",
]

FLOOR = math.log(1e-5)
"""The lowest value of a log-mel spectrogram."""

SILENCE = PHONES.index("sil")


@dataclass(frozen=True, eq=False)
class Item:
    """What training needs of one utterance."""

    mel: Tensor
    "Log-mel, float16, (F, T)."
    speaker: str
    "Who speaks."
    source: str
    "Where it comes from."
    phones: Tensor | None = None
    "Index into PHONES for each frame, int64, (T,); -1 where none is known."
    text: str | None = None
    "What is said, where known."
    voice: Tensor | None = None
    "Embedding of the speaker by GE2E, (E,)."
    posterior: Tensor | None = None
    "Probability of each phone in each frame by the content encoder, float16, (P, T)."


def items_of(utterances: Sequence[Utterance] | Iterator[Utterance], preset: str = "speech-16k") -> list[Item]:
    """Return the log-mels and, where the alignment is known, the phone of each frame."""
    found = []
    for utterance in utterances:
        mel = log_mel(utterance.wave, preset)
        phones = None
        if utterance.spans is not None:
            names = frame_phones(utterance.spans, preset, mel.shape[1])
            phones = torch.tensor([-1 if name is None else PHONES.index(name) for name in names])
        found.append(Item(mel.half(), utterance.speaker, utterance.source, phones, utterance.text))
    return found


ESPEAK_VOICES = (
    "m1", "m3", "m4", "m6", "m7", "f1", "f3", "f4", "Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Gene", "Gene2",
    "Henrique", "Hugo", "Jacky", "Lee", "Marco", "Mario", "Michael", "Mike", "Mr serious", "Nguyen", "Reed", "Storm", "adam",
    "anika", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "ed", "grandma", "grandpa", "gustave",
    "ian", "iven", "john", "linda", "marcelo", "max", "michel", "miguel", "norbert", "paul", "pedro", "quincy", "rob",
    "sandro", "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip
"""Variants of espeak-ng to train on: neither whispers nor robots, and none of ``corpus.HELD_OUT_ESPEAK``."""


FLITE_VOICES = ("slt", "rms", "awb", "kal16")
"""Voices of flite that were built from the speech of one person each."""


def aligned_speech(
    *, espeak_texts: int = 10, flite_texts: int = 100, voices: int = len(ESPEAK_VOICES), seed: int = 0
) -> list[Item]:
    """Return synthetic speech with exact alignments: variants of espeak-ng, and the voices of flite at three speeds."""
    items = []
    for index, voice in enumerate(ESPEAK_VOICES[:voices]):
        texts = [*corpus.SENTENCES[index % 4 :: 4][: espeak_texts // 2]]
        texts += corpus.word_salad(espeak_texts - len(texts), seed=1000 * seed + index)
        items += items_of(corpus.espeak_speech([voice], texts, seed=seed))
    if not flite_texts:
        return items
    texts = [*corpus.SENTENCES, *corpus.word_salad(max(0, flite_texts - len(corpus.SENTENCES)), seed=seed + 7)]
    for utterance in corpus.flite_speech(FLITE_VOICES, texts[:flite_texts]):
        for factor in (0.9, 1.0, 1.12):
            items += items_of([corpus.change_speed(utterance, factor)])
    return items


def real_speech(*, factors: Sequence[float] = (0.9, 1.0, 1.12), takes: int = 50) -> list[Item]:
    """Return real speech to train on: 251 readers, and strings of digits by four people; at three speeds."""
    items = []
    heard = [name for name in corpus.DIGIT_SPEAKERS if name not in corpus.HELD_OUT_DIGITS]
    for source in (corpus.readers("train"), corpus.digit_strings(heard, takes=range(takes))):
        for utterance in source:
            items += items_of(corpus.change_speed(utterance, factor) for factor in factors)
    return items


# ---- distortion -------------------------------------------------------------------------------------------------


def distort(mel: Tensor, generator: torch.Generator) -> Tensor:
    """Return log-mels (B, F, T) as other voices, microphones and rooms might have given them.

    In this order: another length of the vocal tract (bands are stretched by up to 12 %), a smooth filter, another
    gain, a noise floor, for every fourth a microphone that ends at 4 kHz or below, and short gaps.
    """
    batch, bands, frames = mel.shape

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    band = torch.arange(bands, dtype=torch.float32)
    stretch = 1 + 0.24 * (rand(batch, 1) - 0.5)
    position = (band * stretch).clamp(0, bands - 1)  # (B, F)
    low = position.floor().long().clamp(max=bands - 2)
    share = (position - low)[..., None]
    index = low[..., None].expand(-1, -1, frames)
    mel = (1 - share) * mel.gather(1, index) + share * mel.gather(1, index + 1)
    waves = torch.stack([torch.cos(math.pi * k * (band + 0.5) / bands) for k in range(1, 5)])
    filters = (0.5 * randn(batch, 4)) @ waves
    mel = mel + filters[..., None] + 0.4 * randn(batch, 1, 1)
    noise = FLOOR + 6.5 * rand(batch, 1, 1) ** 2 + 0.3 * randn(batch, bands, 1)
    mel = torch.logaddexp(mel, noise + 0.5 * randn(batch, bands, frames))
    cut = torch.where(rand(batch, 1, 1) < 0.25, 45 + 15 * rand(batch, 1, 1), torch.tensor(float(bands)))
    mel = torch.where(band[None, :, None] > cut, FLOOR + 2.5 * rand(batch, 1, 1) + 0.3 * randn(batch, bands, frames), mel)
    start = (rand(batch, 1, 1) * frames).floor()
    gap = (torch.arange(frames) >= start) & (torch.arange(frames) < start + 8 * rand(batch, 1, 1))
    return torch.where(gap, mel.mean((1, 2), keepdim=True), mel).clamp(min=FLOOR)


# ---- alignment by the encoder itself ----------------------------------------------------------------------------


def force_align(log_likelihood: np.ndarray, phones: Sequence[int], *, stay: float = 0.85) -> tuple[float, np.ndarray]:
    """Return the best path of a known row of phones through the frames, and its log-likelihood.

    Silence may stand before, between and after the words that the row consists of, wherever it holds ``SILENCE``;
    each such place may be skipped.

    Parameters
    ----------
    log_likelihood : array, shape (T, P)
        For each frame, up to a constant.
    phones : sequence of int
        Indices in the order of speaking.
    stay : float
        Probability of staying in a phone for another frame.

    Returns
    -------
    score : float
    path : array of int, shape (T,)
        Phone of each frame.
    """
    states, index = np.asarray(phones), np.arange(len(phones))
    optional = states == SILENCE
    jump = np.full(len(states), -1)
    inner = index[1:-1][optional[1:-1]]
    jump[inner + 1] = inner - 1
    more = len(states) > 1
    starts = (0, 1) if more and optional[0] else (0,)
    ends = (len(states) - 1, len(states) - 2) if more and optional[-1] else (len(states) - 1,)
    chain = Chain(states, index, jump, starts, ends)
    log_stay, log_leave = (np.full(len(states), math.log(p)) for p in (stay, 1 - stay))
    ((path, score),) = viterbi([log_likelihood[:, states]], [chain], [log_stay], [log_leave])
    return score, states[path]


def free_align(log_likelihood: np.ndarray, *, change: float = -6.0) -> np.ndarray:
    """Return the best phone of each frame (T,) where changing to another costs ``change`` nats."""
    frames, count = log_likelihood.shape
    score = log_likelihood[0].copy()
    back = np.zeros((frames, count), dtype=np.int64)
    for frame in range(1, frames):
        top = int(score.argmax())
        jump = score[top] + change
        back[frame] = np.where(score >= jump, np.arange(count), top)
        score = np.maximum(score, jump) + log_likelihood[frame]
    path = np.zeros(frames, dtype=np.int64)
    path[-1] = int(score.argmax())
    for frame in range(frames - 1, 0, -1):
        path[frame - 1] = back[frame, path[frame]]
    return path


def spell(text: str) -> list[int]:
    """Return the phones of a string of digits with optional silence around every word."""
    phones = [SILENCE]
    for word in text.split():
        phones += [PHONES.index(phone) for phone in DIGITS[word]] + [SILENCE]
    return phones


@torch.no_grad()
def _log_likelihood(content: ContentEncoder, mel: Tensor, prior: Tensor | None = None) -> np.ndarray:
    """Return (T, P): the logarithm of the posterior, minus that of the phones' frequencies where they are given."""
    logits = content.logits(mel.float()[None], torch.ones(1, 1, mel.shape[1]))[0].float().log_softmax(0).T
    return (logits if prior is None else logits - 0.5 * prior.log()).numpy()


@torch.no_grad()
def frame_accuracy(content: ContentEncoder, items: Sequence[Item]) -> float:
    """Return the share of frames whose phone the encoder names, over frames where it is known."""
    right = total = 0
    for item in items:
        if item.phones is not None:
            known = item.phones >= 0
            found = content.logits(item.mel.float()[None], torch.ones(1, 1, item.mel.shape[1]))[0].argmax(0)
            right, total = right + int((found == item.phones)[known].sum()), total + int(known.sum())
    return right / max(1, total)


@torch.no_grad()
def share_of(content: ContentEncoder, items: Sequence[Item], phone: str) -> float:
    """Return the share of frames that the encoder takes for one phone; ``spn`` on clear speech means it hears nothing."""
    index, found, total = PHONES.index(phone), 0, 0
    for item in items:
        answer = content.logits(item.mel.float()[None], torch.ones(1, 1, item.mel.shape[1]))[0].argmax(0)
        found, total = found + int((answer == index).sum()), total + len(answer)
    return found / total


def digit_accuracy(content: ContentEncoder, items: Sequence[Item]) -> float:
    """Return the share of single digits whose word has the likeliest path through the encoder's phones."""
    words = {word: spell(word) for word in DIGITS}
    right = 0
    for item in items:
        likelihood = _log_likelihood(content, item.mel)
        right += max(words, key=lambda word: force_align(likelihood, words[word])[0]) == item.text
    return right / len(items)


# ---- batches ----------------------------------------------------------------------------------------------------


def phone_table(items: Sequence[Item], *, require_all: bool = True) -> Tensor:
    """Return the average mel of every phone (P, F): the mean over its frames.

    # differs from the official code: it takes the mode over occurrences (see oral4.diffvc.average_voice), which lies
    # farther from speech; here the averages are where a diffusion starts from.

    With ``require_all=False`` a phone that is nowhere in the items is given the average of silence.

    Raises
    ------
    ValueError
        If a phone other than ``spn`` is nowhere in the items.
    """
    total = torch.zeros(len(PHONES), items[0].mel.shape[0])
    count = torch.zeros(len(PHONES))
    for item in items:
        if item.phones is not None:
            known = item.phones >= 0
            total.index_add_(0, item.phones[known], item.mel.float().T[known])
            count += torch.bincount(item.phones[known], minlength=len(PHONES))
    missing = [phone for phone, frames in zip(PHONES, count.tolist(), strict=True) if not frames and phone != "spn"]
    if missing and require_all:
        raise ValueError(f"no frame of {', '.join(missing)} in the corpus; add texts that hold them")
    table = total / count.clamp(min=1)[:, None]
    return torch.where(count[:, None] > 0, table, table[SILENCE])


def _draw(items: Sequence[Item], weights: Tensor, size: int, generator: torch.Generator) -> list[Item]:
    return [items[i] for i in torch.multinomial(weights, size, replacement=True, generator=generator).tolist()]


def _source_weights(items: Sequence[Item], shares: dict[str, float]) -> Tensor:
    """Return weights in which each source has its share and every frame of a source the same chance."""
    totals: dict[str, int] = {}
    for item in items:
        totals[item.source] = totals.get(item.source, 0) + item.mel.shape[1]
    return torch.tensor([shares[item.source] * item.mel.shape[1] / totals[item.source] for item in items])


def crop_start(length: int, frames: int, generator: torch.Generator) -> int:
    """Return where a crop of ``frames`` starts; the last possible place included."""
    return int(torch.randint(max(1, length - frames + 1), (1,), generator=generator))


def _padded(parts: Sequence[Tensor], frames: int) -> tuple[Tensor, Tensor]:
    """Return (B, C, frames) and its mask from parts (C, T) of at most that length."""
    batch = torch.zeros(len(parts), parts[0].shape[0], frames)
    mask = torch.zeros(len(parts), 1, frames)
    for row, part in enumerate(parts):
        batch[row, :, : part.shape[1]] = part
        mask[row, :, : part.shape[1]] = 1
    return batch, mask


def _cosine(optimizer: torch.optim.Optimizer, steps: int, warm: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _fit(
    step: Callable[[nn.Module, Any], Any], model: nn.Module, batches: Any, *, steps: int, lr: float, seed: int, precision: str,
    ema: float | None = 0.999, **more: Any,
) -> FitResult:  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    config = TrainConfig(
        steps=steps, clip_norm=1.0, ema_decay=ema, precision=precision, seed=seed, log_every=50, progress=False,
        checkpoint_every=500 if more.get("directory") is not None else None,
    )  # fmt: skip
    return fit(step, model, optimizer, batches, config, scheduler=_cosine(optimizer, steps), **more)


# ---- content ----------------------------------------------------------------------------------------------------


class _Logits(nn.Module):
    """The content encoder as a module whose forward gives logits, which is what training autocasts."""

    def __init__(self, content: ContentEncoder):
        super().__init__()
        self.content = content

    def forward(self, mel: Tensor, mask: Tensor) -> Tensor:
        return self.content.logits(mel, mask)


def set_scale(module: Any, items: Sequence[Item]) -> None:
    """Set the mean and spread by which a network sees mels, from the items."""
    frames = torch.cat([item.mel[:, ::5].float() for item in items], 1)
    module.mean.copy_(frames.mean(1, keepdim=True))
    module.std.copy_(frames.std(1, keepdim=True))


def train_content(
    content: ContentEncoder,
    items: Sequence[Item],
    *,
    steps: int,
    shares: dict[str, float],
    frames: int = 160,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    precision: str = "bf16",
    **more: Any,
) -> FitResult:
    """Train on frames with known phones: cross-entropy, and the squared error of the average voice.

    Parameters
    ----------
    content : ContentEncoder
        Trained in place; its ``table`` must be set.
    items : sequence of Item
        Those without phones are left out.
    steps : int
        Updates.
    shares : dict
        Source to its share of the batches.
    frames, batch : int
        Length and number of crops.
    lr : float
        Highest learning rate.
    seed : int
        Of crops and distortions.
    precision : str
        As in :class:`oral4.train.TrainConfig`.
    **more
        Passed to :func:`oral4.train.fit`, for example ``directory``, ``resume`` and ``callbacks``.
    """
    items = [item for item in items if item.phones is not None]
    weights = _source_weights(items, shares)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(200):
            parts, labels = [], torch.full((batch, frames), -1)
            for row, item in enumerate(_draw(items, weights, batch, generator)):
                start = crop_start(item.mel.shape[1], frames, generator)
                parts.append(item.mel[:, start : start + frames].float())
                found = item.phones[start : start + frames]  # type: ignore[index]
                labels[row, : len(found)] = found
            mel, mask = _padded(parts, frames)
            yield distort(mel, generator), mask, labels

    def step(model: nn.Module, examples: Any) -> dict[str, Any]:
        mel, mask, labels = examples
        logits = model(mel, mask).float()
        entropy = functional.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=0.05)
        known = (labels >= 0)[:, None].float()
        wanted = content.table[labels.clamp(min=0)].transpose(1, 2)
        error = ((content.average(logits.softmax(1)) - wanted) ** 2 * known).sum() / (known.sum() * mel.shape[1])
        right = ((logits.argmax(1) == labels) & (labels >= 0)).sum() / known.sum()
        return {"loss": entropy + error, "error": error.detach(), "accuracy": right.detach()}

    model = _Logits(content)
    return _fit(step, model, batches, steps=steps, lr=lr, seed=seed, precision=precision, **more)


def label(content: ContentEncoder, items: Sequence[Item], *, known: Sequence[Item] = ()) -> list[Item]:
    """Return the items with phones where they had none: by their text if they are digits, else as the encoder hears them.

    The frequencies of the phones in ``known``, on which the encoder was trained, are taken out of its answers in part.
    A phone that is not in ``known`` is never an answer: the encoder knows nothing of it.
    """
    counts = torch.zeros(len(PHONES))
    for item in known:
        if item.phones is not None:
            counts += torch.bincount(item.phones[item.phones >= 0], minlength=len(PHONES))
    taught = counts > 0 if counts.sum() > 0 else torch.tensor([phone != "spn" for phone in PHONES])
    prior = None if counts.sum() == 0 else counts.clamp(min=1) / counts.sum()

    def heard(item: Item) -> np.ndarray:
        likelihood = _log_likelihood(content, item.mel, prior)
        likelihood[:, ~taught.numpy()] = -np.inf
        return likelihood

    found = []
    for item in items:
        if item.phones is None:
            if item.source == "fsdd" and item.text is not None:
                path = force_align(heard(item), spell(item.text))[1]
            else:
                path = free_align(heard(item))
            item = replace(item, phones=torch.as_tensor(path))
        found.append(item)
    return found


# ---- voice ------------------------------------------------------------------------------------------------------


def with_embeddings(items: Sequence[Item], waves: Sequence[np.ndarray], teacher: Any, rate: int = 16_000) -> list[Item]:
    """Return the items with the embedding of each whole utterance by ``teacher``."""
    return [
        replace(item, voice=torch.as_tensor(teacher.embed(wave, rate))) for item, wave in zip(items, waves, strict=True)
    ]


def train_voice(
    voice: Voice,
    items: Sequence[Item],
    *,
    steps: int,
    shares: dict[str, float],
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    precision: str = "bf16",
    **more: Any,
) -> FitResult:
    """Train the voice print towards the embedding of the whole utterance, from crops of 1.2 to 4 s, gently distorted."""
    items = [item for item in items if item.voice is not None]
    weights = _source_weights(items, shares)

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
        for _ in range(200):
            frames = int(torch.randint(96, 321, (1,), generator=generator))
            drawn = _draw(items, weights, batch, generator)
            parts = []
            for item in drawn:
                start = crop_start(item.mel.shape[1], frames, generator)
                parts.append(item.mel[:, start : start + frames].float())
            mel, mask = _padded(parts, frames)
            gain = 0.4 * torch.randn(batch, 1, 1, generator=generator)
            tilt = 0.3 * torch.randn(batch, 1, 1, generator=generator) * torch.linspace(-1, 1, mel.shape[1])[:, None]
            noise = FLOOR + 4 * torch.rand(batch, 1, 1, generator=generator)
            yield torch.logaddexp(mel + gain + tilt, noise.expand_as(mel)), mask, torch.stack([item.voice for item in drawn])  # type: ignore[misc]

    def step(model: nn.Module, examples: Any) -> dict[str, Any]:
        mel, mask, wanted = examples
        similarity = (model(mel, mask).float() * wanted).sum(1).mean()
        return {"loss": 1 - similarity, "similarity": similarity.detach()}

    return _fit(step, voice, batches, steps=steps, lr=lr, seed=seed, precision=precision, **more)


# ---- score ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_posteriors(content: ContentEncoder, items: Sequence[Item]) -> list[Item]:
    """Return the items with the phones' probabilities by the content encoder."""
    content.eval()
    return [
        replace(item, posterior=content.phones(item.mel.float()[None], torch.ones(1, 1, item.mel.shape[1]))[0].half())
        for item in items
    ]


def _pair(item: Item, frames: int, reference_frames: int, generator: torch.Generator) -> tuple[slice, slice]:
    """Return a crop to reconstruct and one to hear the voice from, which never overlap."""
    length = item.mel.shape[1]
    frames = min(frames, length // 2)
    start = crop_start(length, frames, generator)
    before, after = start, length - start - frames
    if before >= after:
        other = crop_start(before, min(reference_frames, before), generator)
        return slice(start, start + frames), slice(other, min(other + reference_frames, before))
    other = start + frames + crop_start(after, min(reference_frames, after), generator)
    return slice(start, start + frames), slice(other, min(other + reference_frames, length))


def score_batch(
    items: Sequence[Item], weights: Tensor, content: ContentEncoder, *, batch: int, frames: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return one batch: speech, its prior mean in the voice of another stretch of the utterance, and that stretch."""
    reference_frames = int(torch.randint(120, 361, (1,), generator=generator))
    drawn = _draw(items, weights, batch, generator)
    crops = [_pair(item, frames, reference_frames, generator) for item in drawn]
    mel, mask = _padded([item.mel[:, own].float() for item, (own, _) in zip(drawn, crops, strict=True)], frames)
    phones, _ = _padded([item.posterior[:, own].float() for item, (own, _) in zip(drawn, crops, strict=True)], frames)  # type: ignore[index]
    reference, reference_mask = _padded([item.mel[:, other].float() for item, (_, other) in zip(drawn, crops, strict=True)], reference_frames)
    heard, _ = _padded([item.posterior[:, other].float() for item, (_, other) in zip(drawn, crops, strict=True)], reference_frames)  # type: ignore[index]
    table = adapted_table(content.table, reference, reference_mask, heard)
    return {
        "mel": mel,
        "mask": mask,
        "xbar": torch.einsum("bpt,bpf->bft", phones, table),
        "reference": reference,
        "reference_mask": reference_mask,
        "reference_xbar": content.average(heard),
        "content": phones,
    }


def spread_of(items: Sequence[Item], content: ContentEncoder, shares: dict[str, float], seed: int = 0) -> float:
    """Return the standard deviation of speech around its prior mean, for ``CompactConfig.spread``."""
    generator = torch.Generator().manual_seed(seed)
    batch = score_batch(items, _source_weights(items, shares), content, batch=128, frames=96, generator=generator)
    square = ((batch["mel"] - batch["xbar"]) ** 2 * batch["mask"]).sum() / (batch["mask"].sum() * batch["mel"].shape[1])
    return float(square.sqrt())


class _ResidualLoss(nn.Module):
    """The decoder as a module whose forward gives the loss of a batch, which is what training autocasts."""

    def __init__(self, decoder: CompactDecoder, speaker_dropout: float):
        super().__init__()
        self.decoder = decoder
        self.speaker_dropout = speaker_dropout

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        t, sde = batch["t"], self.decoder.sde
        a = sde.a(t)[:, None, None]
        reference = a * batch["reference"] + (1 - a) * batch["reference_xbar"]
        g = self.decoder.condition(batch["voice"], t, reference, batch["reference_mask"])
        g = g * (batch["kept"] >= self.speaker_dropout)
        return self.decoder.residual_loss(batch["mel"], batch["mask"], batch["xbar"], g, t, batch["noise"], batch["content"])


def train_score(
    model: DiffVC,
    voice: Voice,
    items: Sequence[Item],
    *,
    steps: int,
    shares: dict[str, float],
    frames: int = 96,
    batch: int = 32,
    lr: float = 1e-3,
    speaker_dropout: float = 0.1,
    seed: int = 0,
    precision: str = "bf16",
    **more: Any,
) -> FitResult:
    """Train the score network to reconstruct speech from its content and from the voice of another stretch.

    The prior mean, the voice print and the reference come from a part of the utterance that does not overlap with what
    is reconstructed. The official code draws two crops that may.
    """
    content, decoder = model.encoder, model.decoder
    weights = _source_weights(items, shares)
    voice.eval()

    def batches(epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for _ in range(200):
            examples = score_batch(items, weights, content, batch=batch, frames=frames, generator=generator)  # type: ignore[arg-type]
            with torch.no_grad():
                examples["voice"] = voice(examples["reference"], examples["reference_mask"])
            examples["t"] = 1e-5 + (1 - 2e-5) * (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
            examples["noise"] = torch.randn(examples["mel"].shape, generator=generator)
            examples["kept"] = torch.rand(batch, 1, generator=generator)
            yield examples

    def step(module: nn.Module, examples: Any) -> Tensor:
        return module(examples)

    wrapped = _ResidualLoss(decoder, speaker_dropout)  # type: ignore[arg-type]
    return _fit(step, wrapped, batches, steps=steps, lr=lr, seed=seed, precision=precision, **more)


@torch.no_grad()
def score_error(model: DiffVC, voice: Voice, items: Sequence[Item], *, batches: int = 8, seed: int = 0) -> float:
    """Return the mean squared error of the network's own answer on fixed crops of the items, times and noise."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(item.mel.shape[1]) for item in items])
    module = _ResidualLoss(model.decoder, 0.0).eval()  # type: ignore[arg-type]
    total = 0.0
    for _ in range(batches):
        examples = score_batch(items, weights, model.encoder, batch=32, frames=96, generator=generator)  # type: ignore[arg-type]
        examples["voice"] = voice(examples["reference"], examples["reference_mask"])
        examples["t"] = (torch.arange(32) + 0.5) / 32
        examples["noise"] = torch.randn(examples["mel"].shape, generator=generator)
        examples["kept"] = torch.ones(32, 1)
        total += float(module(examples))
    return total / batches
