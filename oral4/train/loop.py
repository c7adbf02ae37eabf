"""One training loop for all chapters: you write one step, ``fit`` does the rest.

``fit`` runs on Hugging Face accelerate: the same call trains on a CPU, on one GPU, and under ``accelerate launch``
on many.

Three streams of random numbers come from one seed: the order of the data, the noise of training such as dropout,
and the noise of evaluation, which is the same at every evaluation so that values can be compared. They do not
disturb each other: how often you evaluate does not change the weights. The initial weights are yours.

**Guarantee.** On a CPU with the same versions and number of threads, a run that is interrupted at any moment and
resumed from its last checkpoint ends with the same weights, bit for bit, as a run that was never interrupted.

>>> model = nn.Linear(1, 1)
>>> x = torch.linspace(-1, 1, 8)[:, None]
>>> def step(model, x):
...     return (model(x) - 3 * x - 1).square().mean()
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
>>> result = fit(step, model, optimizer, [x], TrainConfig(steps=100, progress=False))
>>> round(model.weight.item(), 4), round(model.bias.item(), 4)
(3.0, 1.0)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from oral4.errors import CheckpointError
from oral4.train import checkpoint
from oral4.train.averaging import copy_weights, evaluating, start_ema, update_ema
from oral4.train.batches import epoch_batches, num_updates
from oral4.train.config import RESUMABLE, FitResult, TrainConfig
from oral4.train.gradient import accumulate_gradient
from oral4.train.launch import PRECISIONS, make_accelerator, prepared, require_precision
from oral4.train.log import Log, Progress, columns
from oral4.train.randomness import derive_seed, determinism, own_randomness, random_state, set_random_state

__all__ = ["fit"]


def fit(
    step: Callable[[nn.Module, Any], Tensor | Mapping[str, Any]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader | Iterable[Any] | Callable[[int, torch.Generator], Iterable[Any]],
    config: TrainConfig,
    *,
    scheduler: Any = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], Any]] = (),
    directory: str | Path | None = None,
    resume: bool = False,
    model_config: Any = None,
    tracker: Any = None,
    accelerator: Any = None,
) -> FitResult:
    """Train ``model`` in place and report how it went.

    Parameters
    ----------
    step : function (model, batch) -> Tensor or dict
        Returns the scalar mean loss of a batch, or a dict with ``"loss"``, metrics to log (numbers, means over the
        batch), and optionally ``"weight"`` (how much the batch counts, such as its number of target tokens; default 1)
        and ``"examples"`` (for the examples per second; default the length of the batch's first tensor). Call
        ``model(...)`` itself: precision and several processes work through its ``forward``.
    model : nn.Module
        Holds all that is trained. At the end it has the best weights if ``config.monitor`` is set, else the averaged
        ones if ``config.ema_decay`` is, else the last. It stays on the device, and is in the mode it came in.
    optimizer : torch.optim.Optimizer
        Built from the model's parameters.
    batches : DataLoader, list, or function (epoch, generator) -> iterable
        The function is called at the start of each epoch, counted from 0; draw all randomness from its ``generator``.
        A DataLoader's own generators are replaced. Each batch is moved to the device. With N processes every process
        goes through all batches and trains on each N-th, so one update sees N times as many; what does not go round at
        the end of an epoch is left out.
    config : TrainConfig
        Every setting that is a number or a name.
    scheduler : torch learning-rate scheduler, optional
        Stepped once per update; ``ReduceLROnPlateau`` after each evaluation, with the monitored metric.
    evaluate : function model -> dict of numbers, optional
        Called without gradients, in evaluation mode, with the averaged weights where there are any. With several
        processes each one calls it and the values are averaged.
    callbacks : functions dict -> bool or None
        Called with each row of the log as it is made. A true value ends the run.
    directory : str or Path, optional
        Folder of this run, for checkpoints and ``log.jsonl``; seen by all processes.
    resume : bool
        Go on from the newest checkpoint in ``directory``; start anew if there is none. A damaged checkpoint is an
        error: delete it to go on from the one before.
    model_config : mapping or dataclass, optional
        What builds the model, as plain JSON values. Stored in each checkpoint; it must be the same on resume.
    tracker : str or accelerate.tracking.GeneralTracker, optional
        For example ``"tensorboard"``: rows go there too.
    accelerator : accelerate.Accelerator, optional
        Your own, for settings beyond these. One that splits the weights (FSDP) trains, without ``directory``,
        ``monitor`` and ``ema_decay``, which need whole weights on each process.

    Returns
    -------
    FitResult
        Steps made, reason of the end, best step, history.

    Raises
    ------
    FloatingPointError
        If the loss, its gradient or the monitored metric is not finite. The update has then not been made.
    CheckpointError
        If the checkpoint is damaged or does not fit what is passed.
    MissingExtra
        If accelerate is not installed.
    TypeError, ValueError
        If an argument, or what ``step`` or ``evaluate`` returns, is not as described.
    """
    _check_objects(step, model, optimizer, batches, config, scheduler, evaluate, callbacks)
    _check_directory(config, directory, resume, batches)
    folder = None if directory is None else Path(directory)
    own = accelerator is None
    if own:
        accelerator = make_accelerator(config.precision, tracker=tracker, directory=folder)
    _check_accelerator(config, accelerator, folder, None if own else tracker)
    noise = derive_seed(config.seed, "noise", accelerator.process_index)
    with (
        determinism(config.deterministic),
        own_randomness(noise, accelerator.device),
        prepared(accelerator, model, optimizer) as (wrapped, stepper),
        contextlib.ExitStack() as stack,
    ):
        if own and tracker is not None:
            accelerator.init_trackers("oral4", {k: v for k, v in dataclasses.asdict(config).items() if v is not None})
            for opened in accelerator.trackers:
                stack.callback(opened.finish)
        loop = _Loop(config, accelerator, model, wrapped, optimizer, stepper, scheduler, evaluate, callbacks)
        loop.start(folder, resume, batches, model_config)
        stack.callback(loop.progress.close)
        loop.train(step, batches)
        return loop.finish()


# ---- arguments ------------------------------------------------------------------------------------------------


def _check_objects(
    step: Any, model: Any, optimizer: Any, batches: Any, config: Any, scheduler: Any, evaluate: Any, callbacks: Any
) -> None:
    expected = {"model": (model, nn.Module), "optimizer": (optimizer, torch.optim.Optimizer)}
    for name, (value, kind) in {**expected, "config": (config, TrainConfig)}.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, not {type(value).__name__}")
    for name, value in {"step": step, "evaluate": evaluate}.items():
        if not callable(value) and (name, value) != ("evaluate", None):
            raise TypeError(f"{name} must be a function, not {type(value).__name__}")
    if any(not callable(callback) for callback in callbacks):
        raise TypeError("callbacks must be functions that take a row of the log, a dict")
    if not callable(batches) and (not isinstance(batches, Iterable) or isinstance(batches, Iterator)):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which cannot be gone through again; give a DataLoader, a list, "
            "or a function (epoch, generator) -> iterable of batches"
        )
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler belongs to another optimizer; build it from the one passed here")
    if evaluate is None and (config.monitor is not None or config.evaluate_every is not None):
        raise ValueError("monitor and evaluate_every need evaluate, a function model -> dict of numbers")
    if isinstance(scheduler, ReduceLROnPlateau) and config.monitor is None:
        raise ValueError("ReduceLROnPlateau follows the monitored metric: set monitor")


def _check_directory(config: TrainConfig, directory: str | Path | None, resume: bool, batches: Any) -> None:
    if directory is None and (resume or config.checkpoint_every is not None):
        raise ValueError("resume and checkpoint_every need directory, the folder of the run")
    if directory is not None and not resume and (found := checkpoint.latest(directory)) is not None:
        raise ValueError(f"{found} exists: pass resume=True to go on from it, or choose another directory")
    if directory is not None and getattr(batches, "persistent_workers", False):
        raise ValueError("workers that live on across epochs cannot be resumed; set persistent_workers=False")


def _check_accelerator(config: TrainConfig, accelerator: Any, directory: Path | None, tracker: Any) -> None:
    if accelerator.mixed_precision != PRECISIONS[config.precision]:
        found = accelerator.mixed_precision
        raise ValueError(f"accelerator has mixed_precision={found!r}, config has precision={config.precision!r}")
    require_precision(config.precision, accelerator.device)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("accelerator accumulates gradients itself; use TrainConfig(accumulate=...) instead")
    if tracker is not None:
        raise ValueError("give the tracker to your accelerator (log_with=...) and start it there")
    split = accelerator.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    if split and (directory is not None or config.monitor is not None or config.ema_decay is not None):
        raise ValueError(f"{accelerator.distributed_type} splits the weights: leave out directory, monitor, ema_decay")


# ---- the loop -------------------------------------------------------------------------------------------------


@dataclass
class _Position:
    """Where a run stands. All of it goes into the checkpoint, as JSON."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch that each process has used
    seconds: float = 0.0
    stopped: str | None = None
    evaluated: int = -1  # step of the last evaluation
    best_step: int | None = None
    best_value: float | None = None
    strikes: int = 0  # evaluations since the best one
    overflows: int = 0  # fp16 updates skipped in a row
    finite_loss: float | None = None  # the last one
    updates: int = 0  # since the last row of the log
    sums: dict[str, float] = field(default_factory=dict)  # over these updates


class _Loop:
    """The state of one call of :func:`fit`."""

    def __init__(self, config, accelerator, model, wrapped, optimizer, stepper, scheduler, evaluate, callbacks):
        self.config, self.accelerator, self.callbacks = config, accelerator, callbacks
        self.model = getattr(model, "_orig_mod", model)  # torch.compile puts a prefix before every name
        self.wrapped, self.optimizer, self.stepper, self.scheduler = wrapped, optimizer, stepper, scheduler
        self.evaluate, self.evaluated = evaluate, wrapped if accelerator.distributed_type == "FSDP" else model
        self.ema = {} if config.ema_decay is None else start_ema(self.model)
        self.best: dict[str, Tensor] | None = None
        self.at = _Position()
        self.resumed: dict[str, Any] | None = None  # random states to go on from

    def start(self, directory: Path | None, resume: bool, batches: Any, model_config: Any) -> None:
        train = dataclasses.asdict(self.config)
        run = {name: train.pop(name) for name in RESUMABLE}
        self.num_processes = self.accelerator.num_processes
        self.directory = directory
        described = checkpoint.plain(model_config)
        self.about = {"train": train, "run": run, "model": described, "num_processes": self.num_processes}
        if directory is not None:
            checkpoint.require_storable(self.model, self.optimizer, self.scheduler)
        path = checkpoint.latest(directory) if directory is not None and resume else None
        if path is not None:
            self._load(path)
        main = self.accelerator.is_main_process
        self.log = Log(directory / "log.jsonl" if directory is not None and main else None, last_step=self.at.step)
        total = num_updates(batches, self.config, self.num_processes)
        self.progress = Progress(total, step=self.at.step, enabled=self.config.progress and main)
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.row_clock = time.monotonic()
        self.clock = self.row_clock - self.at.seconds

    def _load(self, path: Path) -> None:
        same = {name: self.about[name] for name in ("train", "model", "num_processes")}
        saved = checkpoint.load(path, model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, config=same)
        state = saved["state"]
        self.at = _Position(**state["position"])
        if self.at.stopped != "patience":  # the other ends may lie further now
            self.at.stopped = None
        self.resumed, self.best = state["random"][self.accelerator.process_index], saved["best"]
        for name, average in self.ema.items():
            average.copy_(saved["ema"][name])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _save(self) -> None:
        from accelerate.utils import gather_object

        now = random_state(self.accelerator.device)
        random = gather_object([{"epoch": self.epoch_random, "now": now}])
        self.at.seconds = time.monotonic() - self.clock
        if self.accelerator.is_main_process and self.directory is not None:
            scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            checkpoint.save(
                checkpoint.step_path(self.directory, self.at.step),
                model=self.model,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                ema=self.ema,
                best=self.best,
                state={"position": dataclasses.asdict(self.at), "random": random, "scaler": scaler},
                config=self.about,
            )
            checkpoint.prune(self.directory, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _ended(self) -> bool:
        at, config = self.at, self.config
        if at.stopped is None and config.steps is not None and at.step >= config.steps:
            at.stopped = "steps"
        if at.stopped is None and config.epochs is not None and at.epoch >= config.epochs:
            at.stopped = "epochs"
        return at.stopped is not None

    def train(self, step: Any, batches: Any) -> None:
        at, config, device = self.at, self.config, self.accelerator.device
        while not self._ended():
            resumed, self.resumed = self.resumed, None
            if resumed is not None:  # so that an order drawn from the global generators is drawn again
                set_random_state(resumed["epoch" if at.batch else "now"], device)
            self.epoch_random = random_state(device)
            feed = epoch_batches(batches, at.epoch, config.seed, self.accelerator)
            if sum(1 for _ in islice(feed, at.batch)) < at.batch:
                raise CheckpointError(f"epoch {at.epoch} has fewer than {at.batch} batches now: the data have changed")
            if resumed is not None:
                set_random_state(resumed["now"], device)
            while not self._ended() and (group := list(islice(feed, config.accumulate))):
                self._update(step, group)
            if at.stopped is None:
                if at.batch == 0:
                    raise ValueError(
                        f"epoch {at.epoch} has no batch for each of {self.num_processes} process(es); give more data, "
                        "or a function that makes a new iterable for every epoch"
                    )
                at.epoch, at.batch = at.epoch + 1, 0

    def _update(self, step: Any, group: list[Any]) -> None:
        at, config = self.at, self.config
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        values = accumulate_gradient(step, self.wrapped, self.stepper, group, self.accelerator, config.clip_norm)
        self._require_finite(values)
        self.stepper.step()
        if self.stepper.step_was_skipped:
            at.overflows += 1
        else:
            at.overflows = 0
            if config.ema_decay is not None:
                update_ema(self.ema, self.model, config.ema_decay)
            if self.scheduler is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step()
        at.step, at.batch, at.updates = at.step + 1, at.batch + len(group), at.updates + 1
        at.sums = {name: at.sums.get(name, 0.0) + value for name, value in values.items()}
        at.finite_loss = values["loss"]
        self.progress.advance()

        def due(every: int | None) -> bool:
            return every is not None and at.step % every == 0

        metrics = self._evaluate() if due(config.evaluate_every) else {}
        if metrics or due(config.log_every):
            self._row(metrics)
        if due(config.checkpoint_every) and not self._ended():  # finish writes the last one
            self._save()

    def _require_finite(self, values: dict[str, float]) -> None:
        at, scaled = self.at, self.accelerator.scaler is not None
        last = "there was none before" if at.finite_loss is None else f"the last finite loss was {at.finite_loss:.6g}"
        advice = "Lower the learning rate, set clip_norm, or look at the batches of this step"
        for name in ("loss", "grad_norm"):
            # A scaled fp16 gradient may overflow: that update is skipped and the scale lowered.
            if not math.isfinite(values[name]) and not (scaled and name == "grad_norm"):
                raise FloatingPointError(f"{name} is {values[name]} at step {at.step + 1}; {last}. {advice}")
        if at.overflows >= 40:  # the scale starts at 2**16 and halves each time: more will not help
            raise FloatingPointError(f"40 fp16 updates up to step {at.step} overflowed in a row; {last}. {advice}")

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics under ``val_`` names; keep the weights if they are the best so far."""
        at, config, device = self.at, self.config, self.accelerator.device
        seed = derive_seed(config.seed, "evaluate", self.accelerator.process_index)
        with evaluating(self.model, self.ema), own_randomness(seed, device):
            found = self.evaluate(self.evaluated)
            if not isinstance(found, Mapping) or not found:
                raise TypeError(f"evaluate must return a dict of numbers, not {found!r}")
            exact = torch.float32 if device.type == "mps" else torch.float64
            values = torch.tensor([float(value) for value in found.values()], dtype=exact, device=device)
            metrics = dict(zip(found, self.accelerator.reduce(values, "mean").tolist(), strict=True))
            at.evaluated = at.step
            if config.monitor is not None:
                self._compare(metrics)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(metrics[config.monitor])
        return {f"val_{name}": value for name, value in metrics.items()}

    def _compare(self, metrics: dict[str, float]) -> None:
        at, config = self.at, self.config
        if config.monitor not in metrics:
            raise ValueError(f"monitor={config.monitor!r} is not what evaluate returns: {', '.join(metrics)}")
        value = metrics[config.monitor]
        if math.isnan(value):
            raise FloatingPointError(f"the monitored metric {config.monitor} is nan at step {at.step}")
        sign = 1 if config.mode == "min" else -1
        if at.best_value is None or sign * value < sign * at.best_value:
            at.best_value, at.best_step, at.strikes = value, at.step, 0
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        else:
            at.strikes += 1
            if at.stopped is None and config.patience is not None and at.strikes >= config.patience:
                at.stopped = "patience"

    def _row(self, metrics: dict[str, float], *, last: bool = False) -> None:
        at, now = self.at, time.monotonic()
        row: dict[str, Any] = {"step": at.step, "epoch": at.epoch}
        if at.updates:
            row |= {name: total / at.updates for name, total in at.sums.items() if name != "examples"}
            row |= {"lr": self.lr, "examples_per_second": at.sums["examples"] / max(now - self.row_clock, 1e-9)}
            if self.accelerator.scaler is not None:
                row["loss_scale"] = self.accelerator.scaler.get_scale()
        row |= {**metrics, "seconds": now - self.clock}
        self.row_clock, at.updates, at.sums = now, 0, {}
        self.log.append(row)
        self.progress.show(row, last=last)
        self.accelerator.log(row, step=at.step)
        stop = any([callback(dict(row)) for callback in self.callbacks])  # each one sees every row
        wish = self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device), "sum")
        if wish > 0 and at.stopped is None:
            at.stopped = "callback"

    def finish(self) -> FitResult:
        at = self.at
        metrics = self._evaluate() if self.evaluate is not None and at.evaluated != at.step else {}
        if metrics or at.updates:
            self._row(metrics, last=True)
        if self.directory is not None and self.resumed is None:  # else nothing was left to do
            self._save()
        if self.best is not None:
            self.model.load_state_dict(self.best)
        else:
            copy_weights(self.ema, self.model)
        self.optimizer.zero_grad()  # frees the memory of the last gradient
        return FitResult(
            step=at.step,
            epoch=at.epoch,
            stopped=at.stopped or "",
            weights="best" if self.best is not None else "ema" if self.ema else "last",
            best_step=at.best_step,
            best_value=at.best_value,
            history=columns(self.log.rows),
            seconds=time.monotonic() - self.clock,
        )
