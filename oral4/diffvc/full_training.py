"""Training of the paper's own networks, on a corpus of any size in folders.

:func:`prepare` writes what training reads: spectrograms, speaker embeddings and average-voice targets, in the layout of
the official code. :func:`train_encoder` and :func:`train_decoder` then follow the paper, on one device or, started by
``accelerate launch``, on many; both stop and resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from oral4.diffvc import corpus
from oral4.diffvc.align import PhoneSpan
from oral4.diffvc.audio import log_mel
from oral4.diffvc.average_voice import average_mels, average_target
from oral4.diffvc.encoder import AverageVoiceEncoder, masked_mse
from oral4.diffvc.model import DiffVC
from oral4.diffvc.training import crop_start
from oral4.errors import DataError
from oral4.train import FitResult, TrainConfig, fit

__all__ = [
    "CROP_FRAMES",
    "CropDataset",
    "FullTrainConfig",
    "Prepared",
    "prepare",
    "prepared",
    "train_decoder",
    "train_encoder",
]

CROP_FRAMES = 128
"""Frames of a crop in the official code: 1.486 s."""


@dataclass(frozen=True)
class Prepared:
    """The files of one utterance."""

    speaker: str
    "Who speaks."
    mel: Path
    "Log-mel, (F, T)."
    embedding: Path
    "Speaker embedding, (E,)."
    average: Path
    "The utterance in the average voice, (F, T); may be missing where there is no alignment."


def _places(folder: Path, speaker: str, name: str) -> Prepared:
    return Prepared(
        speaker,
        folder / "mels" / speaker / f"{name}_mel.npy",
        folder / "embeds" / speaker / f"{name}_embed.npy",
        folder / "mels_mode" / speaker / f"{name}_avgmel.npy",
    )


def prepare(folder: str | Path, embed: Any, *, preset: str = "hifigan-22k", stat: str = "mode") -> list[Prepared]:
    """Write spectrograms, embeddings and average-voice targets of every recording below ``folder/wavs``.

    What is there already is kept, so that an interrupted call can be repeated. The averages are over the whole corpus.

    Parameters
    ----------
    folder : path
        A corpus as :func:`oral4.diffvc.corpus.read_folder` reads it.
    embed : callable
        ``embed(wave, rate) -> (E,)``, for example :meth:`oral4.diffvc.speaker.SpeakerEncoder.embed`.
    preset : str
        Mel preset.
    stat : str
        As in :func:`oral4.diffvc.average_voice.average_mels`.

    Returns
    -------
    list of Prepared

    Raises
    ------
    DataError
        If the corpus is empty, damaged, or has no alignment at all.
    """
    folder = Path(folder)
    found: list[Prepared] = []
    aligned: list[tuple[Prepared, tuple[PhoneSpan, ...]]] = []
    for utterance in corpus.read_folder(folder, preset):
        place = _places(folder, utterance.speaker, str(utterance.name))
        if not place.mel.is_file():
            _write(place.mel, log_mel(utterance.wave, preset).numpy())
        if not place.embedding.is_file():
            _write(place.embedding, np.asarray(embed(utterance.wave, utterance.rate), dtype=np.float32))
        if utterance.spans is not None:
            aligned.append((place, utterance.spans))
        found.append(place)
    if not aligned:
        raise DataError(f"{folder}: no alignments at textgrids/<speaker>/<utterance>.TextGrid; the encoder needs them")
    table = average_mels(((_read(place.mel), spans) for place, spans in aligned), preset, stat=stat)
    for place, spans in aligned:
        _write(place.average, average_target(_read(place.mel), spans, table, preset).numpy())
    return found


def prepared(folder: str | Path, *, leave_out: Sequence[str] = ()) -> list[Prepared]:
    """Return what :func:`prepare` wrote, without some speakers.

    Raises
    ------
    DataError
        If there is nothing.
    """
    folder = Path(folder)
    found = []
    for path in sorted((folder / "mels").glob("*/*_mel.npy")):
        place = _places(folder, path.parent.name, path.name.removesuffix("_mel.npy"))
        if place.speaker not in leave_out and place.embedding.is_file():
            found.append(place)
    if not found:
        raise DataError(f"{folder}: nothing prepared below mels/ and embeds/; call prepare(folder, embed) first")
    return found


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npy")
    np.save(part, values)
    part.replace(path)  # so that an interrupted write is never taken for a finished one


def _read(path: Path) -> Tensor:
    return torch.from_numpy(np.load(path)).float()


class CropDataset(Dataset[dict[str, Tensor]]):
    """Random crops of prepared utterances, padded and masked to one length.

    Parameters
    ----------
    places : sequence of Prepared
        Utterances.
    targets : bool
        True: each item has the crop and its average voice. False: the crop, a reference and the speaker's embedding.
    frames : int
        Length of a crop.
    overlap : bool
        Whether the reference may overlap with the crop, as in the official code; where an utterance is no longer than
        a crop both are then the same, and the target itself is given away. By default they are disjoint.
    seed : int
        With the epoch and the index it decides each crop, in any number of workers.
    """

    def __init__(
        self, places: Sequence[Prepared], *, targets: bool, frames: int = CROP_FRAMES, overlap: bool = False, seed: int = 0
    ):
        self.places = [place for place in places if not targets or place.average.is_file()]
        if not self.places:
            raise DataError("no prepared utterance has an average-voice target; align the corpus and prepare it again")
        self.targets, self.frames, self.overlap, self.seed, self.epoch = targets, frames, overlap, seed, 0

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = self.places[index]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
        mel = _read(place.mel)
        length = mel.shape[1]
        if self.targets:
            start = crop_start(length, self.frames, generator)
            average = _read(place.average)
            crop, mask = self._pad(mel[:, start : start + self.frames])
            return {"mel": crop, "mask": mask, "target": self._pad(average[:, start : start + self.frames])[0]}
        frames = self.frames if self.overlap else min(self.frames, length // 2)
        start = crop_start(length, frames, generator)
        if self.overlap:
            other = mel[:, crop_start(length, frames, generator) :][:, :frames]
        else:
            before, after = mel[:, :start], mel[:, start + frames :]
            side = before if before.shape[1] >= after.shape[1] else after
            other = side[:, crop_start(side.shape[1], frames, generator) :][:, : self.frames]
        crop, mask = self._pad(mel[:, start : start + frames])
        reference, reference_mask = self._pad(other)
        voice = _read(place.embedding)
        return {"mel": crop, "mask": mask, "reference": reference, "reference_mask": reference_mask, "voice": voice}

    def _pad(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        padded, mask = torch.zeros(mel.shape[0], self.frames), torch.zeros(1, self.frames)
        padded[:, : mel.shape[1]] = mel
        mask[:, : mel.shape[1]] = 1
        return padded, mask


@dataclass(frozen=True, kw_only=True)
class FullTrainConfig:
    """Settings of the two trainings; the defaults are the paper's for LibriTTS."""

    encoder_epochs: int = 300
    "Passes over the data for the encoder."
    decoder_epochs: int = 110
    "Passes over the data for the decoder."
    encoder_batch: int = 128
    "Crops in a batch of the encoder."
    decoder_batch: int = 32
    "Crops in a batch of the decoder."
    encoder_lr: float = 5e-4
    "Learning rate of Adam for the encoder."
    decoder_lr: float = 1e-4
    "Learning rate of Adam for the decoder."
    clip_norm: float = 1.0
    "Largest norm of the gradient."
    ema_decay: float | None = 0.9999
    "Averaging of weights; the official code has none."
    precision: str = "bf16"
    "fp32, bf16 or fp16."
    workers: int = 4
    "Processes that read data, for each device."
    checkpoint_every: int = 2000
    "Updates between checkpoints."
    seed: int = 0
    "Of everything."


def _batches(data: CropDataset, batch: int, config: FullTrainConfig) -> Any:
    def epoch_batches(epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        data.epoch = epoch  # the official loader shuffles once, for all epochs
        order = torch.randperm(len(data), generator=generator).tolist()
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            data, batch_size=batch, sampler=order, num_workers=config.workers, drop_last=len(data) >= batch
        )
        return iter(loader)

    return epoch_batches


def _run(
    step: Any, model: nn.Module, data: CropDataset, directory: str | Path | None, config: FullTrainConfig, *, epochs: int,
    batch: int, lr: float, **more: Any,
) -> FitResult:  # fmt: skip
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = TrainConfig(
        epochs=epochs, clip_norm=config.clip_norm, ema_decay=config.ema_decay, precision=config.precision, seed=config.seed,
        checkpoint_every=None if directory is None else config.checkpoint_every, progress=False, log_every=50,
    )  # fmt: skip
    optimizer = torch.optim.Adam(parameters, lr=lr)
    return fit(step, model, optimizer, _batches(data, batch, config), settings, directory=directory, **more)


def train_encoder(
    encoder: AverageVoiceEncoder,
    places: Sequence[Prepared],
    config: FullTrainConfig,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    """Train the encoder to say an utterance in the average voice: masked squared error.

    Parameters
    ----------
    encoder : AverageVoiceEncoder
        Trained in place.
    places : sequence of Prepared
        From :func:`prepared`.
    config : FullTrainConfig
        Settings.
    directory, resume, callbacks
        As in :func:`oral4.train.fit`.
    """

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return masked_mse(model(batch["mel"], batch["mask"]).float(), batch["target"], batch["mask"])

    data = CropDataset(places, targets=True, seed=config.seed)
    return _run(
        step, encoder, data, directory, config, epochs=config.encoder_epochs, batch=config.encoder_batch,
        lr=config.encoder_lr, resume=resume, callbacks=callbacks,
    )  # fmt: skip


class _DecoderLoss(nn.Module):
    """The model with the loss as its forward, which is what training autocasts and distributes."""

    def __init__(self, model: DiffVC):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.loss(batch)


def train_decoder(
    model: DiffVC,
    places: Sequence[Prepared],
    config: FullTrainConfig,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
) -> FitResult:
    """Train the decoder on reconstruction; the encoder stays as it is, in evaluation mode.

    Parameters
    ----------
    model : DiffVC
        With a trained encoder. Its decoder is trained in place.
    places : sequence of Prepared
        From :func:`prepared`.
    config : FullTrainConfig
        Settings.
    directory, resume, callbacks
        As in :func:`oral4.train.fit`.
    """
    model.encoder.requires_grad_(False)
    data = CropDataset(places, targets=False, seed=config.seed)
    return _run(
        lambda module, batch: module(batch), _DecoderLoss(model), data, directory, config, epochs=config.decoder_epochs,
        batch=config.decoder_batch, lr=config.decoder_lr, resume=resume, callbacks=callbacks,
    )  # fmt: skip
