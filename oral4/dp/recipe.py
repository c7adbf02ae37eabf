"""How the experiments fine-tune: one loop with privacy or without, and a step size that each arm chooses for itself.

>>> Recipe(epsilon=None, batch_size=32, epochs=1, learning_rate=1e-3).is_private
False
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oral4.dp.accountant import default_delta
from oral4.dp.private import Private, make_private
from oral4.train.randomness import derive_seed, own_randomness

__all__ = ["Choice", "Recipe", "choose_rate", "example_lengths", "fine_tune", "num_trained"]

Losses = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long, in which steps and under which budget a model is fine-tuned."""

    epsilon: float | None
    "Budget at delta = 1 / (2 N); None: ordinary training, without clipping and noise."
    batch_size: int
    "Expected size of a Poisson batch; of a shuffled batch where there is no budget."
    epochs: float
    "Passes over the data."
    learning_rate: float
    "Of Adam, at the start."
    head_rate: float | None = None
    """The same for a fresh head, which has farther to go than pretrained weights: parameters of a module named ``head``;
    None: as for all."""
    clip_norm: float = 0.1
    "C."
    schedule: Literal["linear", "constant"] = "linear"
    "Whether the step size falls to 0."
    physical: int = 64
    "Most examples at a time in memory."

    @property
    def is_private(self) -> bool:
        """Whether there is a budget."""
        return self.epsilon is not None


@dataclass(frozen=True)
class Choice:
    """A step size, and how it came to be chosen."""

    rate: float
    "The chosen one."
    scores: tuple[float, ...]
    "Of every step size of the grid, in its order; the larger the better."
    at_edge: bool
    "Whether it is the first or the last of the grid: a better one may lie outside."


def choose_rate(score: Callable[[float], float], rates: Sequence[float]) -> Choice:
    """Return the step size with the best score; not-a-number counts as worse than all.

    Parameters
    ----------
    score : callable
        Trains at a step size and returns what is to be large, measured on text that the outcome is not measured on.
    rates : sequence of float
        In rising order. With a single one nothing is trained.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> choose_rate(lambda rate: -abs(rate - 2.0), [1.0, 2.0, 4.0])
    Choice(rate=2.0, scores=(-1.0, -0.0, -2.0), at_edge=False)
    """
    if not rates or list(rates) != sorted(set(rates)):
        raise ValueError(f"rates={tuple(rates)}: give one step size or more, in rising order")
    if len(rates) == 1:
        return Choice(rates[0], (math.nan,), False)
    scores = tuple(score(rate) for rate in rates)
    best = max(range(len(rates)), key=lambda index: -math.inf if math.isnan(scores[index]) else scores[index])
    return Choice(rates[best], scores, best in (0, len(rates) - 1))


def num_trained(model: nn.Module) -> int:
    """Return how many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def example_lengths(examples: Sequence[Any]) -> list[int]:
    """Return the number of tokens of every example."""
    return [len(example.input_ids) for example in examples]


def fine_tune(
    model: nn.Module,
    examples: Sequence[Any],
    losses: Losses,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    recipe: Recipe,
    seed: int,
    *,
    after_step: Callable[[int], None] | None = None,
    between: Callable[[Sequence[nn.Parameter]], None] | None = None,
    record: bool = False,
) -> Private | None:
    """Fine-tune the trainable parameters of a model in place.

    Adam without weight decay. Pieces of a batch hold examples of similar length, so there is little padding.

    Parameters
    ----------
    model : nn.Module
        On any device.
    examples : sequence
        With ``input_ids``. One of them is what is protected.
    losses : callable
        ``losses(model, batch)`` returns one loss for each example.
    collate : callable
        Makes a batch of examples.
    recipe : Recipe
    seed : int
        Of the batches, the noise and dropout.
    after_step : callable, optional
        Called with the number of updates done so far.
    between : callable, optional
        Called with the trained parameters after the clipped gradients are summed and before the noise is added; only
        with a budget. What it does is its own affair: the accountant does not see it.
    record : bool
        Whether the private optimizer records signal, noise and the share of clipped examples.

    Returns
    -------
    Private or None
        The private training, whose engine is detached; None where there was no budget.
    """
    if between is not None and not recipe.is_private:
        raise ValueError("between= changes the clipped sum, and without a budget nothing is clipped; leave it out")
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate, weight_decay=0.0)
    model.train()
    with own_randomness(derive_seed(seed, "dropout"), device):
        if not recipe.is_private:
            _ordinary(model, examples, losses, collate, recipe, seed, optimizer, after_step)
            model.eval()
            return None
        private = make_private(
            model,
            optimizer,
            examples,
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            epsilon=recipe.epsilon,
            delta=default_delta(len(examples)),
            clip_norm=recipe.clip_norm,
            max_physical=recipe.physical,
            collate_fn=collate,
            lengths=example_lengths(examples),
            seed=seed,
            record=record,
        )
        scheduler = _scheduler(optimizer, recipe, private.loader.steps)
        try:
            for batch in private.loader:
                found = losses(model, batch)
                if private.step(found, between=None if between is None else lambda: between(trained)):
                    scheduler.step()
                    if after_step is not None:
                        after_step(private.optimizer.steps)
        finally:
            private.engine.detach()
    model.eval()
    return private


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the trained parameters by their step size; a shared parameter occurs once."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = recipe.head_rate is not None and "head" in name.split(".")
            groups.setdefault(recipe.head_rate if is_head else recipe.learning_rate, []).append(parameter)  # type: ignore[arg-type]
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> Any:
    falls = recipe.schedule == "linear"
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) if falls else 1.0)


def _ordinary(
    model: nn.Module,
    examples: Sequence[Any],
    losses: Losses,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    recipe: Recipe,
    seed: int,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[int], None] | None,
) -> None:
    """Train in shuffled epochs on the mean loss of a batch, gradients accumulated over pieces that fit into memory."""
    device = next(model.parameters()).device
    per_epoch = math.ceil(len(examples) / recipe.batch_size)
    steps = max(1, round(recipe.epochs * per_epoch))
    scheduler = _scheduler(optimizer, recipe, steps)
    for step, indices in enumerate(_shuffled(example_lengths(examples), recipe.batch_size, steps, seed)):
        optimizer.zero_grad()
        for start in range(0, len(indices), recipe.physical):
            batch = collate([examples[index] for index in indices[start : start + recipe.physical]])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            (losses(model, batch).sum() / len(indices)).backward()
        optimizer.step()
        scheduler.step()
        if after_step is not None:
            after_step(step + 1)
    optimizer.zero_grad()


def _shuffled(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices, each batch sorted by length."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    done = 0
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order), batch_size):
            if done == steps:
                return
            yield sorted(order[start : start + batch_size], key=lengths.__getitem__)
            done += 1
