"""What a clipped gradient costs beside an ordinary one: several models and methods, one interleaved run.

>>> list(CASES)[:4], sorted(METHODS)[:2]
(['s8', 's50', 'distil', 'tiny'], ['non-private', 'official-two-pass'])

A method is a function that leaves a gradient in ``p.grad``: no optimiser, no noise, the same model and batch for all.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oral4.dp.engine import ClipEngine, clip_factors
from oral4.dp.norms import Outer, embedding_rows, layer_norm_grads, norm2, outer_norm2, square_sum
from oral4.errors import require
from oral4.measure.timing import Timing, compare, peak_memory

__all__ = ["CASES", "METHODS", "Case", "Step", "build", "draw_ids", "losses_of", "memory_growth", "times"]


@dataclass(frozen=True)
class Case:
    """A language model with random weights, and a batch."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    kind: Literal["gpt2", "roberta"] = "gpt2"
    "RoBERTa has a classifier of two classes on top."
    tied: bool = False
    "Whether the last layer of a GPT-2 is its embedding, as published."
    half: bool = False
    "Whether the forward pass runs under autocast in bfloat16."


CASES = {
    "s8": Case("s8", 4, 256, 4, 8192, 16, 128),
    "s50": Case("s50", 4, 256, 4, 50257, 8, 128),
    "distil": Case("distil", 6, 768, 12, 50257, 4, 128),
    "tiny": Case("tiny", 1, 16, 2, 64, 2, 8),
}
"Sizes of the comparison, and a tiny one for tests."


class _Half(nn.Module):
    """A model that runs under autocast in bfloat16, as its user would run it."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        """Run the model."""
        with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16):
            return self.model(**inputs)


def build(case: Case, *, device: str = "cpu", seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return the model of a case, in training mode without dropout, and ids (B, T)."""
    transformers = require("transformers", "language")
    positions = max(case.length, 8)
    if case.kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=case.vocabulary,
            n_positions=positions,
            n_embd=case.width,
            n_layer=case.layers,
            n_head=case.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=case.tied,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        make = transformers.GPT2LMHeadModel
    else:
        config = transformers.RobertaConfig(
            vocab_size=case.vocabulary,
            max_position_embeddings=positions + 2,
            hidden_size=case.width,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            intermediate_size=4 * case.width,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=2,
        )
        make = transformers.RobertaForSequenceClassification
    devices = [device] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.device(device):  # the larger ones take long to draw on a CPU
        torch.manual_seed(seed)
        model = make(config).train()
    return (_Half(model) if case.half else model), draw_ids(case, case.batch, device=device, seed=seed)


def draw_ids(case: Case, batch: int, *, device: str = "cpu", seed: int = 0) -> Tensor:
    """Return random ids, (batch, T)."""
    generator = torch.Generator().manual_seed(seed)
    first = 0 if case.kind == "gpt2" else 4  # the first few mean padding and the like
    return torch.randint(first, case.vocabulary, (batch, case.length), generator=generator).to(device)


def losses_of(model: Any, ids: Tensor, *, positions: bool = False) -> Tensor:
    """Return one loss for each example, (B,): the mean over its tokens, or that of its class, the parity of its first id."""
    more = {"position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)} if positions else {}
    logits = model(input_ids=ids, **more).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits.float(), ids[:, 0] % 2, reduction="none")
    logits = logits[:, :-1]
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    flat = nn.functional.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(len(ids), -1).mean(1)


Step = Callable[..., None]
"Leaves a gradient in ``p.grad``; of other ids (B, T), if they are given."


def _needs_positions(model: Any) -> bool:
    """Return whether the model looks up one row of positions for the whole batch if it is not given one each."""
    return model.config.model_type == "gpt2"


def non_private(model: nn.Module, ids: Tensor) -> Step:
    """Return the ordinary gradient of the mean loss."""

    def step(ids: Tensor = ids) -> None:
        model.zero_grad(set_to_none=True)
        losses_of(model, ids).mean().backward()

    return step


def _ours(**options: Any) -> Callable[[nn.Module, Tensor], Step]:
    def prepare(model: nn.Module, ids: Tensor) -> Step:
        engine = ClipEngine(model, 0.1, **options)

        def step(ids: Tensor = ids) -> None:
            model.zero_grad(set_to_none=True)
            engine.backward(losses_of(model, ids))

        return step

    return prepare


def official_two_pass(model: nn.Module, ids: Tensor) -> Step:
    """Return two ordinary backward passes, as the paper's own algorithm: gather norms, then weigh the losses.

    The first pass also computes the weights' gradients, which are thrown away. Norms are by this book's formulas.
    """
    arrived: list[tuple[nn.Module, Tensor, Tensor]] = []
    listening = True
    positions = _needs_positions(model)

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
        if x.dim() == 2:  # the classifier sees one vector an example
            x, g = x[:, None], g[:, None]
        return outer_norm2(
            Outer(x, g), bias=module.bias is not None, rule="gram"
        )  # stored (d, p) or (p, d): the same norm

    def step(ids: Tensor = ids) -> None:
        nonlocal listening
        model.zero_grad(set_to_none=True)
        arrived.clear()
        losses, listening = losses_of(model, ids, positions=positions), True
        losses.sum().backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        norms = torch.stack([squares(*use) for use in arrived]).sum(0).sqrt()
        arrived.clear()
        listening = False
        (clip_factors(norms, 0.1, stability=1e-6).to(losses) * losses).sum().backward()

    return step


def opacus_ghost(model: nn.Module, ids: Tensor) -> Step:
    """Return Opacus's two backward passes of ghost clipping."""
    positions = _needs_positions(model)
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModuleFastGradientClipping(
        model, max_grad_norm=0.1, use_ghost_clipping=True, loss_reduction="sum", strict=False
    )

    def step(ids: Tensor = ids) -> None:
        model.zero_grad(set_to_none=True)
        losses = losses_of(wrapped, ids, positions=positions)
        losses.sum().backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        factors = wrapped.get_clipping_coef()
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
        wrapped.enable_hooks()

    return step


def opacus_vanilla(model: nn.Module, ids: Tensor) -> Step:
    """Return Opacus's per-example gradients, written out and clipped."""
    positions = _needs_positions(model)
    wrapped = importlib.import_module("opacus.grad_sample").GradSampleModule(model, loss_reduction="sum", strict=False)
    parameters: list[Any] = list(model.parameters())

    def step(ids: Tensor = ids) -> None:
        model.zero_grad(set_to_none=True)
        losses_of(wrapped, ids, positions=positions).sum().backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in parameters]).norm(dim=0)
        factors = (0.1 / (norms + 1e-6)).clamp(max=1.0)
        for p in parameters:
            p.grad = torch.einsum("i,i...->...", factors, p.grad_sample)
            p.grad_sample = None

    return step


METHODS: dict[str, Callable[[nn.Module, Tensor], Step]] = {
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
    case: str | Case,
    methods: Sequence[str] = ("non-private", "ours", "ours-two-pass"),
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Return the time of one gradient by each method, all measured in turns on a model of their own.

    Parameters
    ----------
    case : str or Case
        One of `CASES`, or one of your own.
    methods : sequence of str
        Of `METHODS`.
    repeats : int
        Rounds; compare medians, or ratios of the same round.
    warmup : int
        Gradients of each method before the first round.
    device : str
        On a CPU the clock is that of the process, so that other programs do not count.
    """
    asked: list[tuple[str, Mapping[str, Any]]] = [(method, METHODS) for method in methods]
    if isinstance(case, str):
        asked.insert(0, (case, CASES))
    for name, known in asked:
        if name not in known:
            raise ValueError(f"{name!r} is unknown; give one of {', '.join(known)}")
    shape = CASES[case] if isinstance(case, str) else case
    steps = {}
    for method in methods:
        model, ids = build(shape, device=device)
        steps[method] = METHODS[method](model, ids)
    clock = "cpu" if device == "cpu" else "wall"
    return compare(steps, repeats, warmup=warmup, clock=clock, sync=device)


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
