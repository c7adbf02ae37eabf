"""What a clipped gradient costs beside an ordinary one: three language models, several methods, one interleaved run.

>>> list(CASES), sorted(METHODS)[:2]
(['s8', 's50', 'distil', 'tiny'], ['non-private', 'official-two-pass'])

A method is a function that leaves a gradient in ``p.grad``: no optimiser, no noise, the same model and batch for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oral4.dp.engine import ClipEngine, clip_factors
from oral4.dp.norms import Outer, embedding_rows, layer_norm_grads, norm2, outer_norm2, square_sum
from oral4.errors import require
from oral4.measure.timing import Timing, compare, peak_memory

__all__ = ["CASES", "METHODS", "Case", "build", "memory_growth", "times"]


@dataclass(frozen=True)
class Case:
    """A GPT-2 whose last layer is not tied to its embedding, and a batch."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int


CASES = {
    "s8": Case("s8", 4, 256, 4, 8192, 16, 128),
    "s50": Case("s50", 4, 256, 4, 50257, 8, 128),
    "distil": Case("distil", 6, 768, 12, 50257, 4, 128),
    "tiny": Case("tiny", 1, 16, 2, 64, 2, 8),
}
"Sizes of the comparison, and a tiny one for tests."


def build(case: Case, *, device: str = "cpu", seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return the model of a case, in training mode without dropout, and ids (B, T)."""
    transformers = require("transformers", "language")
    config = transformers.GPT2Config(
        vocab_size=case.vocabulary,
        n_positions=max(case.length, 8),
        n_embd=case.width,
        n_layer=case.layers,
        n_head=case.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.GPT2LMHeadModel(config).train()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, case.vocabulary, (case.batch, case.length), generator=generator)
    return model.to(device), ids.to(device)


def losses_of(model: nn.Module, ids: Tensor, *, positions: bool = False) -> Tensor:
    """Return the mean loss over each example's tokens, (B,)."""
    more = {"position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)} if positions else {}
    logits = model(input_ids=ids, **more).logits[:, :-1]
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1).mean(1)


def non_private(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return the ordinary gradient of the mean loss."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses_of(model, ids).mean().backward()

    return step


def _ours(**options: Any) -> Callable[[nn.Module, Tensor], Callable[[], None]]:
    def prepare(model: nn.Module, ids: Tensor) -> Callable[[], None]:
        engine = ClipEngine(model, 0.1, **options)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            engine.backward(losses_of(model, ids))

        return step

    return prepare


def official_two_pass(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return two ordinary backward passes, as the paper's own algorithm: gather norms, then weigh the losses.

    The first pass also computes the weights' gradients, which are thrown away. Norms are by this book's formulas.
    """
    arrived: list[tuple[nn.Module, Tensor, Tensor]] = []
    listening = True

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda g: arrived.append((module, args[0].detach(), g)) if listening else None)

    for module in model.modules():
        if module._parameters:
            module.register_forward_hook(watch)

    def squares(module: Any, x: Tensor, g: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return norm2([embedding_rows(x, g, module.num_embeddings)])
        if isinstance(module, nn.LayerNorm):
            grads = layer_norm_grads(x, g, tuple(module.normalized_shape), module.eps)
            return square_sum(torch.cat([grad for grad in grads if grad is not None], 1))
        return outer_norm2(Outer(x, g), bias=module.bias is not None, rule="gram")  # stored (d, p) or (p, d): the same norm

    def step() -> None:
        nonlocal listening
        model.zero_grad(set_to_none=True)
        losses, listening = losses_of(model, ids, positions=True), True
        losses.sum().backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        norms = torch.stack([squares(*use) for use in arrived]).sum(0).sqrt()
        arrived.clear()
        listening = False
        (clip_factors(norms, 0.1, stability=1e-6).to(losses) * losses).sum().backward()

    return step


def opacus_ghost(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return Opacus's two backward passes of ghost clipping."""
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping(
        model, max_grad_norm=0.1, use_ghost_clipping=True, loss_reduction="sum", strict=False
    )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses = losses_of(wrapped, ids, positions=True)
        losses.sum().backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()

    return step


def opacus_vanilla(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Return Opacus's per-example gradients, written out and clipped."""
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModule(model, loss_reduction="sum", strict=False)
    parameters: list[Any] = list(model.parameters())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        losses_of(wrapped, ids, positions=True).sum().backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
        factors = (0.1 / (norms + 1e-6)).clamp(max=1.0)
        for p in parameters:
            p.grad = torch.einsum("i,i...->...", factors, p.grad_sample)
            p.grad_sample = None

    return step


METHODS: dict[str, Callable[[nn.Module, Tensor], Callable[[], None]]] = {
    "non-private": non_private,
    "ours": _ours(),
    "ours-gram": _ours(rule="gram"),
    "ours-two-pass": _ours(mode="two_pass"),
    "official-two-pass": official_two_pass,
    "opacus-ghost": opacus_ghost,
    "opacus-vanilla": opacus_vanilla,
}
"What makes a step, by name. Those of Opacus need that package."


def times(
    case: str,
    methods: Sequence[str] = ("non-private", "ours", "ours-two-pass"),
    *,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Return the time of one gradient by each method, all measured in turns on a model of their own.

    Parameters
    ----------
    case : str
        One of `CASES`.
    methods : sequence of str
        Of `METHODS`.
    repeats : int
        Rounds; compare medians, or ratios of the same round.
    device : str
        On a CPU the clock is that of the process, so that other programs do not count.
    """
    asked: list[tuple[str, Mapping[str, Any]]] = [(case, CASES), *((method, METHODS) for method in methods)]
    for name, known in asked:
        if name not in known:
            raise ValueError(f"{name!r} is unknown; give one of {', '.join(known)}")
    steps = {}
    for method in methods:
        model, ids = build(CASES[case], device=device)
        steps[method] = METHODS[method](model, ids)
    clock = "cpu" if device == "cpu" else "wall"
    return compare(steps, repeats, clock=clock, sync=device)


def _one_step(case: str, method: str, steps: int) -> None:
    model, ids = build(CASES[case])
    if method != "none":
        step = METHODS[method](model, ids)
        for _ in range(steps):
            step()


def memory_growth(case: str, method: str, *, steps: int = 2) -> int:
    """Return by how many bytes the largest resident set of a fresh process grows over that of the model alone.

    Parameters
    ----------
    case, method : str
    steps : int
        Gradients in a row: the second finds the memory as the first left it.
    """
    alone = peak_memory("oral4.dp.speed:_one_step", case=case, method="none", steps=0).resident
    return peak_memory("oral4.dp.speed:_one_step", case=case, method=method, steps=steps).resident - alone
