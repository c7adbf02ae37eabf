"""Training: one loop (:func:`fit`), checkpoints without pickle, a log of JSON lines."""

from oral4.train.config import FitResult, TrainConfig
from oral4.train.log import read_log
from oral4.train.loop import fit
from oral4.train.randomness import derive_seed

__all__ = ["FitResult", "TrainConfig", "derive_seed", "fit", "read_log"]
