"""Small language models from scratch, in two worlds: restaurants that people described, and restaurants that are generated.

In both worlds there is public text about other things, private text about restaurants, and a tokenizer that has read only
the public text. The experiments: what public pretraining gives, a hole against a fresh head, whether secrets can be told
from the outside, and what happens if the "public" text holds the private one.

>>> sorted(WORLDS)
['micro', 'real']
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oral4 import settings
from oral4.dp.audit import (
    canary_rank,
    exposure,
    make_canaries,
    make_secrets,
    mechanism_audit,
    one_run_audit,
    optimizer_step,
    toss_coins,
)
from oral4.dp.corpus import (
    E2E_LINE_NAMES,
    MICRO_DOMAINS,
    RNNLG_DOMAINS,
    Pair,
    dart_dev,
    e2e,
    hold_out,
    micro_pairs,
    micro_phrases,
    references,
    rnnlg,
)
from oral4.dp.engine import ClipEngine
from oral4.dp.generate import generate_texts
from oral4.dp.private import DPOptimizer
from oral4.dp.recipe import Choice, Recipe, choose_rate, fine_tune
from oral4.dp.tasks import (
    Example,
    HeadClassifier,
    InfillingClassifier,
    MaskingCollator,
    PromptCollator,
    PromptExample,
    TableToTextCollator,
    accuracy,
    classification_losses,
    encode_pair,
    encode_template,
    keep_short,
    label_token_ids,
    mean_nll,
    source_line,
    target_losses,
    train_tokenizer,
)
from oral4.dp.text_metrics import E2E_LEXICON, bleu, phrase_lexicon, rouge_l, slot_scores
from oral4.errors import require
from oral4.train.randomness import derive_seed, own_randomness

__all__ = [
    "AUDIT_UNITS", "INFILLING_UNITS", "TABLE_UNITS", "TRAP_UNITS", "WORLDS", "AuditConfig", "InfillingConfig",
    "Split", "TableConfig", "TrapConfig", "WorldConfig", "attribute_examples", "build_lm", "build_mlm", "encode_records",
    "new_secrets", "pretrain", "private_pairs", "public_pairs", "run_audit", "run_infilling", "run_table", "run_trap",
    "split_records", "starting_model", "world_tokenizer",
]  # fmt: skip

WORLDS = {
    "real": "public RNNLG (laptops, television sets, hotels, restaurants), private E2E; DART for the trap",
    "micro": "generated: public hotels and museums, private restaurants",
}
"""Where the text comes from."""

TUNING_SEED = 1000
"""Seed of pretraining, and of the runs that choose a step size."""


# -------------------------------------------------------------------------------------------------------- two worlds


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Text and model that the experiments of this module share."""

    world: Literal["real", "micro"] = "real"
    "See `WORLDS`."
    private: int = 3000
    "Private records, drawn anew by each seed."
    layers: int = 2
    "Blocks of the model."
    width: int = 96
    "Its width; heads have 24."
    vocabulary: int = 2000
    "Most tokens of the tokenizer."
    max_len: int = 160
    "Longest example, in tokens; longer ones are left out."
    pretrain_steps: int = 3000
    "Updates on public text, once for all seeds."
    pretrain_batch: int = 48
    "Examples of such an update, of similar length."
    pretrain_rate: float = 2e-3
    "Step size of pretraining, at its start."
    epochs: float = 6.0
    "Passes over the private records."
    batch_size: int = 256
    "Expected batch with privacy."
    clip_norm: float = 0.1
    "C."
    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    "Step sizes to choose from with privacy."
    ordinary_batch: int = 64
    "Batch without privacy."
    ordinary_rates: tuple[float, ...] = (1e-3, 3e-3)
    "Step sizes to choose from without privacy."
    physical: int = 64
    "Most examples at a time in memory."

    def recipe(self, epsilon: float | None, rate: float, **changes: Any) -> Recipe:
        """Return the recipe of an arm; the step size stays constant, as the paper has it for generation."""
        usual: dict[str, Any] = {
            "epsilon": epsilon,
            "batch_size": self.ordinary_batch if epsilon is None else self.batch_size,
            "epochs": self.epochs,
            "learning_rate": rate,
            "clip_norm": self.clip_norm,
            "schedule": "constant",
            "physical": self.physical,
        }
        return Recipe(**(usual | changes))


_SMOKE: dict[str, Any] = {
    "world": "micro", "private": 120, "layers": 1, "width": 24, "vocabulary": 320, "max_len": 200, "pretrain_steps": 8,
    "pretrain_batch": 8, "epochs": 1.0, "batch_size": 40, "rates": (1e-2,), "ordinary_batch": 20, "ordinary_rates": (1e-2,),
    "physical": 20,
}  # fmt: skip
_GPU: dict[str, Any] = {"layers": 4, "width": 192, "pretrain_steps": 6000, "private": 8000, "epochs": 10.0, "physical": 256}


@functools.lru_cache(maxsize=4)
def public_pairs(world: str) -> tuple[Pair, ...]:
    """Return the public text of a world. Nothing here is from E2E."""
    if world == "micro":
        domains = [domain for domain in MICRO_DOMAINS if domain != "restaurant"]
        return tuple(pair for domain in domains for pair in micro_pairs(1000, domain=domain))
    return tuple(pair for domain in RNNLG_DOMAINS for split in ("train", "valid", "test") for pair in rnnlg(domain, split))


@functools.lru_cache(maxsize=4)
def private_pairs(world: str) -> tuple[Pair, ...]:
    """Return all text of a world of which the private records are drawn."""
    if world == "micro":
        return tuple(micro_pairs(800))
    return tuple(e2e("dev") + e2e("test"))


@dataclass(frozen=True)
class Split:
    """The private text of a seed and what it is judged by; no meaning is in two of them."""

    private: list[Pair]
    tuning: list[Pair]
    test: list[Pair]


def split_records(config: WorldConfig, seed: int, pairs: Sequence[Pair], meanings: int) -> Split:
    """Hold the same meanings out for all seeds, twice as many as ``meanings``; draw the private records anew for each.

    Raises
    ------
    ValueError
        If fewer records are left than ``config.private``.
    """
    rest, test = hold_out(pairs, meanings, seed=0)
    rest, tuning = hold_out(rest, meanings, seed=1)
    if not 1 <= config.private <= len(rest):
        raise ValueError(f"private={config.private}: give 1 to {len(rest)}, the records that are left after holding out")
    drawn = random.Random(derive_seed(seed, "records")).sample(rest, config.private)
    return Split(drawn, tuning, test)


@functools.lru_cache(maxsize=4)
def world_tokenizer(world: str, vocabulary: int, kind: str) -> Any:
    """Return the tokenizer of a world's public text: ``kind`` is "bpe" or "word"; it writes lower case."""
    texts = [text for pair in public_pairs(world) for text in (source_line(pair.slots), pair.text)]
    return train_tokenizer(texts, kind=kind, vocab_size=vocabulary, lowercase=True)


def encode_records(config: WorldConfig, tokenizer: Any, pairs: Sequence[Pair]) -> list[Example]:
    """Return source lines with their sentences, in tokens, but for those of more than ``config.max_len`` tokens."""
    examples = [encode_pair(tokenizer, source_line(pair.slots, E2E_LINE_NAMES), pair.text) for pair in pairs]
    return keep_short(examples, config.max_len)[0]


def build_lm(config: WorldConfig, tokenizer: Any, seed: int) -> Any:
    """Return a GPT-2 with fresh weights, its last layer tied to its embedding, without dropout, on the settings' device."""
    transformers = require("transformers", "language")
    shape = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=config.max_len + 80, n_embd=config.width, n_layer=config.layers,
        n_head=max(1, config.width // 24), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with own_randomness(derive_seed(seed, "weights"), settings.device()):
        return transformers.GPT2LMHeadModel(shape).to(settings.device())


def build_mlm(config: WorldConfig, tokenizer: Any, seed: int) -> Any:
    """Return a RoBERTa with fresh weights, without dropout, on the settings' device."""
    transformers = require("transformers", "language")
    shape = transformers.RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=config.max_len + 4, hidden_size=config.width,
        num_hidden_layers=config.layers, num_attention_heads=max(1, config.width // 24), intermediate_size=4 * config.width,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=1, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with own_randomness(derive_seed(seed, "weights"), settings.device()):
        return transformers.RobertaForMaskedLM(shape).to(settings.device())


def pretrain(
    model: nn.Module,
    examples: Sequence[Any],
    losses: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    collate: Callable[[Any], dict[str, Tensor]],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    length: Callable[[Any], int] = lambda example: len(example.input_ids),
) -> float:
    """Train a model on public text, in place, by Adam with a step size that falls to 0; return the mean of the last losses.

    A batch holds examples of similar length. That is no Poisson sample, and for public text it need not be one.

    Parameters
    ----------
    model : nn.Module
    examples : sequence
    losses, collate : callable
        As in `oral4.dp.recipe.fine_tune`.
    steps, batch_size : int
    rate : float
        Step size at the start.
    seed : int
        Of the batches.
    length : callable
        Length of an example.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = max(1, steps // 50)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm, 1 - step / steps))
    draw = random.Random(derive_seed(seed, "pretrain"))
    order = sorted(range(len(examples)), key=lambda index: length(examples[index]))
    model.train()
    recent = []
    for step in range(steps):
        start = draw.randrange(max(1, len(order) - 4 * batch_size + 1))
        near = order[start : start + 4 * batch_size]
        picked = [examples[index] for index in draw.sample(near, min(batch_size, len(near)))]
        batch = {name: part.to(device) for name, part in collate(picked).items()}
        optimizer.zero_grad()
        loss = losses(model, batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step >= steps - 50:
            recent.append(loss.detach())
    model.eval()
    return torch.stack(recent).mean().item()


@functools.lru_cache(maxsize=4)
def _pretrained_lm(config: WorldConfig) -> nn.Module:
    """Return the language model of the public text; made once for all seeds, to be copied."""
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    model = build_lm(config, tokenizer, TUNING_SEED)
    examples = encode_records(config, tokenizer, public_pairs(config.world))
    _pretrain_lm(config, model, examples, tokenizer)
    return model


def _pretrain_lm(config: WorldConfig, model: nn.Module, examples: Sequence[Example], tokenizer: Any) -> None:
    collate = TableToTextCollator(tokenizer.pad_token_id)
    pretrain(
        model, examples, target_losses, collate, steps=config.pretrain_steps, batch_size=config.pretrain_batch,
        rate=config.pretrain_rate, seed=TUNING_SEED,
    )  # fmt: skip


def starting_model(config: WorldConfig, start: str, seed: int) -> nn.Module:
    """Return a copy of the pretrained language model, or a fresh one."""
    if start == "pretrained":
        return copy.deepcopy(_pretrained_lm(config))
    return build_lm(config, world_tokenizer(config.world, config.vocabulary, "bpe"), seed)


def _label(epsilon: float | None) -> str:
    return "ordinary" if epsilon is None else f"eps{epsilon:g}"


# ------------------------------------------------------------------------------------------------ tables to sentences


@dataclass(frozen=True, kw_only=True)
class TableConfig(WorldConfig):
    """Sentences from tables: pretrained on public text against fresh weights."""

    meanings: int = 60
    "Meanings held out for the outcome, and as many for the choice of step sizes."
    beams: int = 4
    "Beams of the search."
    new_tokens: int = 70
    "Longest sentence."
    fresh_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    "Step sizes to choose from for fresh weights with privacy."

    @classmethod
    def smoke(cls) -> TableConfig:
        """Take the generated world and a model that has learnt nothing: seconds."""
        return cls(**_SMOKE, meanings=4, beams=2, new_tokens=8, fresh_rates=(1e-2,))

    @classmethod
    def mini(cls) -> TableConfig:
        """Take two thousand four hundred private descriptions."""
        return cls(private=2400, epochs=5.0, pretrain_steps=2500)

    @classmethod
    def gpu(cls) -> TableConfig:
        """Take seven thousand private descriptions and a model of two million numbers: minutes on a GPU."""
        return cls(**(_GPU | {"private": 7000}))


EPSILONS = (3.0, 8.0, None)
_TABLE_ARMS = tuple(f"{start}_{_label(epsilon)}" for start in ("pretrained", "fresh") for epsilon in EPSILONS)
_TABLE_SCORES = ("nll", "bleu", "rouge", "recall")
TABLE_UNITS: dict[str, str] = (
    {f"{arm}_{score}": "nats" if score == "nll" else "" for arm in (*_TABLE_ARMS, "public") for score in _TABLE_SCORES}
    | {f"{arm}_rate": "" for arm in _TABLE_ARMS}
    | {f"gain_{_label(epsilon)}_{score}": "nats" if score == "nll" else ""
       for epsilon in EPSILONS for score in _TABLE_SCORES}
    | {"at_edge": ""}
)  # fmt: skip


def _lexicon(world: str) -> Any:
    return E2E_LEXICON if world == "real" else phrase_lexicon(micro_phrases())


def _table_scores(config: TableConfig, model: nn.Module, tokenizer: Any, test: Sequence[Pair]) -> dict[str, float]:
    grouped = references(test)
    sources = [source_line(slots, E2E_LINE_NAMES) for slots in grouped]
    texts = generate_texts(model, tokenizer, sources, num_beams=config.beams, max_new_tokens=config.new_tokens)
    said = list(grouped.values())
    return {
        "nll": mean_nll(model, encode_records(config, tokenizer, test), TableToTextCollator(tokenizer.pad_token_id)),
        "bleu": bleu(texts, said),
        "rouge": rouge_l(texts, said),
        "recall": slot_scores(list(grouped), texts, _lexicon(config.world))["recall"],
    }


def _tune_lm(config: WorldConfig, model: nn.Module, pairs: Sequence[Pair], recipe: Recipe, seed: int) -> None:
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    collate = TableToTextCollator(tokenizer.pad_token_id)
    fine_tune(model, encode_records(config, tokenizer, pairs), target_losses, collate, recipe, seed)


@functools.lru_cache(maxsize=64)
def _table_choice(config: TableConfig, start: str, epsilon: float | None) -> Choice:
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    split = split_records(config, TUNING_SEED, private_pairs(config.world), config.meanings)
    tuning = encode_records(config, tokenizer, split.tuning)

    def score(rate: float) -> float:
        model = starting_model(config, start, TUNING_SEED)
        _tune_lm(config, model, split.private, config.recipe(epsilon, rate), TUNING_SEED)
        return -mean_nll(model, tuning, TableToTextCollator(tokenizer.pad_token_id))

    if epsilon is None:
        return choose_rate(score, config.ordinary_rates)
    return choose_rate(score, config.rates if start == "pretrained" else config.fresh_rates)


def run_table(config: TableConfig, seed: int) -> dict[str, float]:
    """Fine-tune the pretrained and a fresh model on private descriptions; return what they write for unseen meanings.

    ``public_*`` is the pretrained model as it is. A ``gain`` is what pretraining improves; for ``nll`` it is counted so
    that more is better too. Step sizes with privacy are chosen at the smallest budget, for each start, and kept for the
    others.
    """
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    split = split_records(config, seed, private_pairs(config.world), config.meanings)
    public = _table_scores(config, starting_model(config, "pretrained", seed), tokenizer, split.test)
    found = {f"public_{name}": value for name, value in public.items()}
    edges = []
    for epsilon in EPSILONS:
        scores = {}
        for start in ("pretrained", "fresh"):
            choice = _table_choice(config, start, None if epsilon is None else EPSILONS[0])
            model = starting_model(config, start, seed)
            _tune_lm(config, model, split.private, config.recipe(epsilon, choice.rate), seed)
            scores[start] = _table_scores(config, model, tokenizer, split.test)
            arm = f"{start}_{_label(epsilon)}"
            found |= {f"{arm}_{name}": value for name, value in scores[start].items()} | {f"{arm}_rate": choice.rate}
            edges.append(choice.at_edge and len(choice.scores) > 1)
        for name in _TABLE_SCORES:
            gain = scores["pretrained"][name] - scores["fresh"][name]
            found[f"gain_{_label(epsilon)}_{name}"] = -gain if name == "nll" else gain
    found["at_edge"] = sum(edges) / len(edges)
    return found


# --------------------------------------------------------------------------------------------- a hole or a fresh head


@dataclass(frozen=True, kw_only=True)
class InfillingConfig(WorldConfig):
    """A hole against a fresh head, for several numbers of private records."""

    epsilon: float = 3.0
    "Budget."
    sizes: tuple[int, ...] = (200, 800, 3200)
    "Numbers of private records, in rising order; ``private`` is not used."
    updates: int = 120
    "Updates of each run; the batch is as large as the epochs then allow."
    early: tuple[int, ...] = (10, 20, 40)
    "Updates after which the largest run is looked at."
    test: int = 800
    "Sentences to judge by, and as many to choose step sizes on."

    @classmethod
    def smoke(cls) -> InfillingConfig:
        """Take the generated world and a model that has learnt nothing: seconds."""
        return cls(**(_SMOKE | {"pretrain_steps": 20}), sizes=(40, 80), updates=6, early=(2, 4), test=40)

    @classmethod
    def mini(cls) -> InfillingConfig:
        """Take two hundred to three thousand private sentences; five seeds are cheap here."""
        return cls(pretrain_steps=2500, pretrain_batch=64, pretrain_rate=3e-3, epochs=12.0, rates=(1e-3, 3e-3, 1e-2))

    @classmethod
    def gpu(cls) -> InfillingConfig:
        """Pretrain longer, a model that is twice as wide."""
        return cls(layers=4, width=192, pretrain_steps=10_000, pretrain_batch=128, epochs=12.0, rates=(3e-4, 1e-3, 3e-3, 1e-2),
                   physical=256)  # fmt: skip


INFILLING_UNITS = dict.fromkeys(
    ("sizes", "infill", "head", "gain", "infill_rates", "head_rates", "early", "infill_early", "head_early", "gain_early",
     "infill_ordinary", "head_ordinary", "gain_smallest", "gain_mean", "gain_early_mean", "zero_shot", "majority", "at_edge"),
    "")  # fmt: skip

_QUESTION = {"real": ("familyFriendly", "kidsallowed"), "micro": ("family friendly", "family friendly")}
_ANSWERS = ("no", "yes")


def attribute_examples(world: str, tokenizer: Any, pairs: Sequence[Pair], max_len: int) -> list[PromptExample]:
    """Return prompts that ask whether a restaurant welcomes children, for the pairs whose meaning says so.

    The sentence is in the prompt; the meaning only gives the label, 0 for no and 1 for yes.
    """
    slot, asked = _QUESTION[world]
    template = f"<cls>{asked} :<mask><sep>{{0}}<sep>"
    return [
        encode_template(template, [pair.text], tokenizer, max_len=max_len, label=_ANSWERS.index(answer))
        for pair in pairs
        if (answer := dict(_two_parts(pair)).get(slot)) in _ANSWERS
    ]


def _two_parts(pair: Pair) -> list[tuple[str, str]]:
    return [(part[0], part[1]) for part in pair.slots if len(part) == 2]


@functools.lru_cache(maxsize=2)
def _pretrained_mlm(config: InfillingConfig) -> nn.Module:
    """Return a masked language model that has read public sentences after one of their slots, which it learnt to guess."""
    tokenizer = world_tokenizer(config.world, config.vocabulary, "word")
    draw = random.Random(derive_seed(TUNING_SEED, "slots"))
    special = {role: [getattr(tokenizer, f"{role}_token_id")] for role in ("cls", "sep")}
    rows = []
    for pair in public_pairs(config.world):
        slots = [part for part in _two_parts(pair) if part[0] != "act"]
        yes_no = [part for part in slots if part[1] in _ANSWERS]
        about = draw.choice(yes_no if yes_no and draw.random() < 0.85 else slots) if slots else None
        question = tokenizer(f"{about[0]} : {about[1]}")["input_ids"] if about else []
        row = [*special["cls"], *question, *special["sep"], *tokenizer(pair.text)["input_ids"], *special["sep"]]
        rows.append(row[: config.max_len])
    model = build_mlm(config, tokenizer, TUNING_SEED)
    generator = torch.Generator().manual_seed(derive_seed(TUNING_SEED, "masks"))
    words = tuple(label_token_ids(tokenizer, _ANSWERS))
    collate = MaskingCollator(tokenizer, probability=0.12, focus=words, focus_probability=0.7, generator=generator)
    pretrain(
        model, rows, target_losses, collate, steps=config.pretrain_steps, batch_size=config.pretrain_batch,
        rate=config.pretrain_rate, seed=TUNING_SEED, length=len,
    )  # fmt: skip
    return model


def _classifier(config: InfillingConfig, kind: str, seed: int) -> nn.Module:
    mlm = copy.deepcopy(_pretrained_mlm(config))
    tokenizer = world_tokenizer(config.world, config.vocabulary, "word")
    if kind == "infill":
        model: nn.Module = InfillingClassifier(mlm, label_token_ids(tokenizer, _ANSWERS))
    else:
        generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
        body: Any = mlm.base_model
        model = HeadClassifier(body, 2, dropout=0.0, generator=generator)
    return model.to(settings.device())


@dataclass(frozen=True)
class _Questions:
    train: list[PromptExample]
    tuning: list[PromptExample]
    test: list[PromptExample]
    collate: PromptCollator


def _questions(config: InfillingConfig, seed: int, size: int) -> _Questions:
    tokenizer = world_tokenizer(config.world, config.vocabulary, "word")
    slot = _QUESTION[config.world][0]
    pairs = [pair for pair in private_pairs(config.world) if dict(_two_parts(pair)).get(slot) in _ANSWERS]
    number = max(2, len(references(pairs)) // 8)
    split = split_records(replace(config, private=size), seed, pairs, number)

    def encoded(some: Sequence[Pair]) -> list[PromptExample]:
        return attribute_examples(config.world, tokenizer, some, config.max_len)

    collate = PromptCollator(tokenizer.pad_token_id)
    test, tuning = encoded(split.test)[: config.test], encoded(split.tuning)[: config.test]
    return _Questions(encoded(split.private), tuning, test, collate)


def _infilling_recipe(config: InfillingConfig, epsilon: float | None, size: int, rate: float) -> Recipe:
    batch = max(2, round(size * config.epochs / config.updates))
    return config.recipe(epsilon, rate, batch_size=batch, epochs=config.updates * batch / size, schedule="linear")


@functools.lru_cache(maxsize=64)
def _infilling_choice(config: InfillingConfig, kind: str, epsilon: float | None, size: int) -> Choice:
    texts = _questions(config, TUNING_SEED, size)

    def score(rate: float) -> float:
        model = _classifier(config, kind, TUNING_SEED)
        recipe = _infilling_recipe(config, epsilon, size, rate)
        fine_tune(model, texts.train, classification_losses, texts.collate, recipe, TUNING_SEED)
        return accuracy(model, texts.tuning, texts.collate)

    return choose_rate(score, config.rates if epsilon is not None else config.ordinary_rates)


def run_infilling(config: InfillingConfig, seed: int) -> dict[str, Any]:
    """Fine-tune one pretrained model through a hole and through a fresh head; return both accuracies for each size."""
    found: dict[str, Any] = {"sizes": [float(size) for size in config.sizes], "early": [float(n) for n in config.early]}
    edges = []
    for kind in ("infill", "head"):
        found[kind], found[f"{kind}_rates"], found[f"{kind}_early"] = [], [], []
        for size in config.sizes:
            texts = _questions(config, seed, size)
            choice = _infilling_choice(config, kind, config.epsilon, size)
            edges.append(choice.at_edge and len(choice.scores) > 1)
            model = _classifier(config, kind, seed)
            watch = _early_watch(config, kind, model, texts, found) if size == config.sizes[-1] else None
            recipe = _infilling_recipe(config, config.epsilon, size, choice.rate)
            fine_tune(model, texts.train, classification_losses, texts.collate, recipe, seed, after_step=watch)
            found[kind].append(accuracy(model, texts.test, texts.collate))
            found[f"{kind}_rates"].append(choice.rate)
        largest = config.sizes[-1]
        choice = _infilling_choice(config, kind, None, largest)
        model = _classifier(config, kind, seed)
        recipe = _infilling_recipe(config, None, largest, choice.rate)
        fine_tune(model, texts.train, classification_losses, texts.collate, recipe, seed)
        found[f"{kind}_ordinary"] = accuracy(model, texts.test, texts.collate)
    found["gain"] = [a - b for a, b in zip(found["infill"], found["head"], strict=True)]
    found["gain_early"] = [a - b for a, b in zip(found["infill_early"], found["head_early"], strict=True)]
    found["gain_smallest"] = found["gain"][0]
    found["gain_mean"] = sum(found["gain"]) / len(found["gain"])
    found["gain_early_mean"] = sum(found["gain_early"]) / len(found["gain_early"])
    found["zero_shot"] = accuracy(_classifier(config, "infill", seed), texts.test, texts.collate)
    positive = sum(example.label for example in texts.test) / len(texts.test)
    found["majority"] = max(positive, 1 - positive)
    found["at_edge"] = sum(edges) / len(edges)
    return found


def _early_watch(
    config: InfillingConfig, kind: str, model: nn.Module, texts: _Questions, found: dict[str, Any]
) -> Callable[[int], None]:
    """Return what notes the accuracy after a few updates; it trains nothing."""

    def watch(step: int) -> None:
        if step in config.early:
            found[f"{kind}_early"].append(accuracy(model, texts.test, texts.collate))

    return watch


# ---------------------------------------------------------------------------------------------------------- the audit


@dataclass(frozen=True, kw_only=True)
class AuditConfig(WorldConfig):
    """Canaries and secrets among the private records, with privacy and without."""

    canaries: int = 400
    "Canaries, each put into the private text by a fair coin."
    canary_tokens: int = 10
    "Random tokens of a canary."
    guesses: tuple[int, ...] = (10, 25, 50, 100)
    "How many canaries are guessed to be in, and as many to be out; the best of these is corrected for the choice."
    copies: tuple[int, ...] = (1, 4, 16)
    "How often each secret stands in the private text."
    secrets: int = 4
    "Secrets for each number of copies."
    digits: int = 4
    "Digits of a secret."
    delta: float = 1e-5
    "Of the lower bound on epsilon."
    audit_epochs: float = 20.0
    "Passes over the private text, with privacy and without."
    private_rate: float = 4e-3
    "Step size with privacy."
    ordinary_rate: float = 2e-3
    "Step size without privacy."
    white_box_runs: int = 200
    "Repetitions of the white-box test."

    @classmethod
    def smoke(cls) -> AuditConfig:
        """Take the generated world: seconds."""
        return cls(**_SMOKE, canaries=40, guesses=(10,), copies=(1, 4), secrets=1, digits=2, audit_epochs=2.0, white_box_runs=20)

    @classmethod
    def mini(cls) -> AuditConfig:
        """Take five hundred private descriptions and four hundred canaries."""
        return cls(private=500, pretrain_steps=1500)

    @classmethod
    def gpu(cls) -> AuditConfig:
        """Take two thousand canaries among four thousand descriptions."""
        return cls(**(_GPU | {"private": 4000}), canaries=2000, guesses=(50, 100, 200, 400))


_AUDIT_ARMS = tuple(_label(epsilon) for epsilon in EPSILONS)
AUDIT_UNITS = (
    {f"{arm}_{name}": "" for arm in _AUDIT_ARMS for name in ("auc", "bound", "correct", "guesses", "nll")}
    | {f"{arm}_exposure": "bits" for arm in _AUDIT_ARMS}
    | {f"{arm}_spent": "" for arm in _AUDIT_ARMS[:-1]}
    | {"copies": "", "most_exposure": "bits", "caught": "", "accused": ""}
    | {"white_box_shift": "", "white_box_bound": "", "white_box_promised": "", "white_box_passed": "", "broken_caught": ""}
    | {"broken_shift": ""}
)


def new_secrets(config: AuditConfig, seed: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the secrets as (place among the candidates, copies), and the candidates."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "secrets"))
    chosen, candidates = make_secrets(config.secrets * len(config.copies), digits=config.digits, generator=generator)
    copies = [number for number in config.copies for _ in range(config.secrets)]
    return [(candidates.index(secret), number) for secret, number in zip(chosen, copies, strict=True)], candidates


@torch.no_grad()
def _all_losses(model: nn.Module, examples: Sequence[Example], collate: TableToTextCollator, size: int = 128) -> Tensor:
    """Return the loss of each example, (n,), on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(examples), size):
        batch = {name: part.to(device) for name, part in collate(examples[start : start + size]).items()}
        parts.append(target_losses(model, batch).double().cpu())
    return torch.cat(parts)


def run_audit(config: AuditConfig, seed: int) -> dict[str, Any]:
    """Train on canaries with privacy and without; return what an auditor can tell of them.

    ``caught`` is 1 if the training without privacy is refuted at epsilon = 3, ``accused`` the share of the private
    trainings whose lower bound exceeds their own epsilon.
    """
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    collate = TableToTextCollator(tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(derive_seed(seed, "canaries"))
    split = split_records(config, seed, private_pairs(config.world), 20)
    plain = encode_records(config, tokenizer, split.private)
    start, end = [tokenizer.bos_token_id], tokenizer.eos_token_id
    drawn = make_canaries(config.canaries, config.canary_tokens, len(tokenizer), exclude=tokenizer.all_special_ids,
                          generator=generator)  # fmt: skip
    canaries = [Example.of(start, [*row, end]) for row in drawn.tolist()]
    coins = toss_coins(len(canaries), generator=generator)
    secrets, candidates = new_secrets(config, seed)
    spelled = [Example.of(start, [*tokenizer(text)["input_ids"], end]) for text in candidates]
    records = [*plain, *(canary for canary, coin in zip(canaries, coins.tolist(), strict=True) if coin)]
    records += [spelled[place] for place, number in secrets for _ in range(number)]
    test = encode_records(config, tokenizer, split.test)
    before = _all_losses(starting_model(config, "pretrained", seed), canaries, collate)
    found: dict[str, Any] = {"copies": [float(number) for number in config.copies]}
    for epsilon in EPSILONS:
        arm = _label(epsilon)
        model = starting_model(config, "pretrained", seed)
        rate = config.ordinary_rate if epsilon is None else config.private_rate
        recipe = config.recipe(epsilon, rate, epochs=config.audit_epochs)
        private = fine_tune(model, records, target_losses, collate, recipe, seed)
        scores = before - _all_losses(model, canaries, collate)
        outcome = one_run_audit(scores, coins, guesses=[(n, n) for n in config.guesses], delta=config.delta)
        losses = _all_losses(model, spelled, collate)
        exposures = [exposure(canary_rank(losses, place), len(spelled)) for place, _ in secrets]
        found |= {
            f"{arm}_auc": outcome.auc,
            f"{arm}_bound": outcome.epsilon,
            f"{arm}_correct": float(outcome.correct),
            f"{arm}_guesses": float(outcome.guesses),
            f"{arm}_nll": mean_nll(model, test, collate),
            f"{arm}_exposure": [
                sum(exposures[i * config.secrets : (i + 1) * config.secrets]) / config.secrets for i in range(len(config.copies))
            ],
        }
        if private is not None:
            found[f"{arm}_spent"] = private.spent().epsilon
    found["most_exposure"] = math.log2(len(spelled))
    found["caught"] = float(found["ordinary_bound"] > 3.0)
    accusations = [found[f"{_label(epsilon)}_bound"] > epsilon for epsilon in EPSILONS if epsilon is not None]
    found["accused"] = sum(accusations) / len(accusations)
    return found | _white_box(config, tokenizer, plain, canaries[0], seed)


def _white_box(
    config: AuditConfig, tokenizer: Any, plain: Sequence[Example], canary: Example, seed: int
) -> dict[str, float]:
    """Test one step of the optimizer from the inside: as it is, and with a clipped sum that is too long.

    The second one clips 1.65 times too wide: about what forgetting that two layers share a matrix does.
    """
    collate = TableToTextCollator(tokenizer.pad_token_id)
    sigma, batch, too_long = 0.7, 16.0, 1.65
    found: dict[str, float] = {}
    for name, norm in (("white_box", config.clip_norm), ("broken", too_long * config.clip_norm)):
        model = starting_model(config, "pretrained", seed).train()  # an engine records nothing of a model in evaluation mode
        device = next(model.parameters()).device
        engine = ClipEngine(model, norm)
        generator = torch.Generator(device).manual_seed(derive_seed(seed, "white box"))
        # the noise is that of the promise, whatever the engine does
        multiplier = sigma * config.clip_norm / norm
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), engine, multiplier, batch, generator=generator, sampling_rate=1.0
        )

        def losses(examples: list[Example], model: nn.Module = model, device: torch.device = device) -> Tensor:
            return target_losses(model, {key: part.to(device) for key, part in collate(examples).items()})

        def clipped(examples: list[Example], model: nn.Module = model, engine: ClipEngine = engine) -> dict[str, Tensor]:
            model.zero_grad()
            engine.backward(losses(examples))
            return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

        direction = clipped([canary])
        model.zero_grad()
        audit = mechanism_audit(
            optimizer_step(optimizer, losses), plain[:4], [*plain[:4], canary], clip_norm=config.clip_norm,
            noise_multiplier=sigma, expected_batch_size=batch, direction=direction, runs=config.white_box_runs,
        )  # fmt: skip
        engine.detach()
        found[f"{name}_shift"] = audit.shift.value
        if name == "white_box":
            found |= {"white_box_bound": audit.epsilon, "white_box_promised": audit.promised_epsilon,
                      "white_box_passed": float(audit.passed)}  # fmt: skip
        else:
            found["broken_caught"] = float(not audit.passed)
    return found


# ----------------------------------------------------------------------------------------------------------- the trap


@dataclass(frozen=True, kw_only=True)
class TrapConfig(WorldConfig):
    """Pretraining on "public" text that holds a part of the private one."""

    epsilon: float = 3.0
    "Budget of the private training: what is claimed."
    records: int = 1000
    "Private descriptions that the public collection repeats, each put into both by a fair coin."
    guesses: tuple[int, ...] = (50, 100, 200)
    "How many of them are guessed to be in, and as many to be out."
    delta: float = 1e-5
    "Of the lower bound on epsilon."
    rate: float = 4e-3
    "Step size with privacy."
    trap_epochs: float = 12.0
    "Passes over the public collection."

    @classmethod
    def smoke(cls) -> TrapConfig:
        """Take the generated world: seconds."""
        return cls(**_SMOKE, records=40, guesses=(10,), trap_epochs=0.2, rate=1e-2)

    @classmethod
    def mini(cls) -> TrapConfig:
        """Take DART, and E2E of which DART holds the development set."""
        return cls(epochs=4.0, max_len=128, trap_epochs=10.0)

    @classmethod
    def gpu(cls) -> TrapConfig:
        """Take four thousand of the descriptions that DART repeats."""
        return cls(layers=4, width=192, records=4000, guesses=(100, 300, 1000), trap_epochs=30.0, max_len=200, physical=256)


TRAP_UNITS = (
    {f"{arm}_{name}": "" for arm in ("with", "without") for name in ("auc", "bound", "public_auc", "spent")}
    | {f"{arm}_{name}": "nats" for arm in ("with", "without") for name in ("nll", "public_nll")}
    | {"claimed": "", "excess": "", "nll_gain": "nats", "shared": "", "refuted": ""}
)


def _trap_text(config: TrapConfig) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Return the public collection without the private part, the records that it repeats, and other private text.

    In DART the repeated records have another form, triples; the private ones have E2E's. The sentence is the same.
    """
    if config.world == "micro":
        public = [pair for pair in public_pairs("micro") if pair.origin == "micro/museum"]
        repeated = [replace(pair, origin="e2e") for pair in private_pairs("micro")]
        return public, repeated[: config.records], repeated[config.records :]
    everything = dart_dev(exclude=())
    public = [pair for pair in everything if pair.origin != "dart/e2e"]
    texts = {pair.text for pair in everything if pair.origin == "dart/e2e"}
    once = list({pair.text: pair for pair in e2e("dev")}.values())
    repeated = [pair for pair in once if pair.text in texts]
    random.Random(0).shuffle(repeated)
    if not 1 <= config.records <= len(repeated):
        raise ValueError(f"records={config.records}: give 1 to {len(repeated)}, the descriptions that DART repeats")
    return public, repeated[: config.records], e2e("test")


def _as_triples(pair: Pair) -> Pair:
    """Return a description as the public collection has it: triples about the name, in place of slots."""
    slots = dict(_two_parts(pair))
    name = slots.pop("name", "it")
    return Pair(tuple((name, slot.lower(), value) for slot, value in slots.items()), pair.text, "dart/e2e")


def _trap_encoded(config: TrapConfig, pairs: Sequence[Pair]) -> list[Example]:
    """Return examples cut at the longest length; none is left out, for every coin needs its record."""
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    examples = [encode_pair(tokenizer, source_line(pair.slots, E2E_LINE_NAMES), pair.text) for pair in pairs]
    return [Example(example.input_ids[: config.max_len], example.labels[: config.max_len]) for example in examples]


def _trap_private(config: TrapConfig, others: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return further private records, and what is held out of them."""
    rest, test = hold_out(others, max(2, len(references(others)) // 10), seed=0)
    return random.Random(derive_seed(seed, "records")).sample(rest, max(0, min(len(rest), count))), test


def _trap_pretrain(config: TrapConfig, pairs: Sequence[Pair], seed: int) -> nn.Module:
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    model = build_lm(config, tokenizer, seed)
    steps = max(1, round(config.trap_epochs * len(pairs) / config.pretrain_batch))
    pretrain(
        model, _trap_encoded(config, pairs), target_losses, TableToTextCollator(tokenizer.pad_token_id), steps=steps,
        batch_size=config.pretrain_batch, rate=config.pretrain_rate, seed=seed,
    )  # fmt: skip
    return model


@functools.lru_cache(maxsize=4)
def _trap_reference(config: TrapConfig) -> dict[str, Tensor]:
    """Return how hard the repeated records are for a model that has seen none of them: free of coins, known to an auditor."""
    public, repeated, others = _trap_text(config)
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    collate = TableToTextCollator(tokenizer.pad_token_id)
    model = _trap_pretrain(config, public, TUNING_SEED)
    known = _all_losses(model, _trap_encoded(config, [_as_triples(pair) for pair in repeated]), collate)
    more, _ = _trap_private(config, others, config.private, TUNING_SEED)
    recipe = config.recipe(config.epsilon, config.rate)
    fine_tune(model, _trap_encoded(config, more), target_losses, collate, recipe, TUNING_SEED)
    after = [_trap_encoded(config, repeated), _trap_encoded(config, [_as_triples(pair) for pair in repeated])]
    return {"_public": known, "": _all_losses(model, after[0], collate) + _all_losses(model, after[1], collate)}


def run_trap(config: TrapConfig, seed: int) -> dict[str, float]:
    """Pretrain on a collection with and without private text, fine-tune privately, and audit the whole.

    Every repeated record joins the private text, and the collection that holds it, by one fair coin. The private training
    keeps its promise in both arms; the claim of the whole does not: ``excess`` is the lower bound less the claim.
    """
    public, repeated, others = _trap_text(config)
    tokenizer = world_tokenizer(config.world, config.vocabulary, "bpe")
    collate = TableToTextCollator(tokenizer.pad_token_id)
    coins = toss_coins(len(repeated), generator=torch.Generator().manual_seed(derive_seed(seed, "coins")))
    inside = [pair for pair, coin in zip(repeated, coins.tolist(), strict=True) if coin]
    more, test = _trap_private(config, others, config.private - len(inside), seed)
    collection = {"without": public, "with": public + [_as_triples(pair) for pair in inside]}

    records, held = _trap_encoded(config, inside + more), _trap_encoded(config, test)
    seen, known = _trap_encoded(config, repeated), _trap_encoded(config, [_as_triples(pair) for pair in repeated])
    scores: dict[str, Tensor] = {}
    models: dict[str, nn.Module] = {}
    found: dict[str, float] = {"claimed": config.epsilon, "shared": len(inside) / len(records)}
    for arm, pairs in collection.items():
        model = _trap_pretrain(config, pairs, seed)
        found[f"{arm}_public_nll"] = mean_nll(model, held, collate)
        scores[f"{arm}_public"] = -_all_losses(model, known, collate)
        models[arm] = model
    for arm, model in models.items():
        private = fine_tune(model, records, target_losses, collate, config.recipe(config.epsilon, config.rate), seed)
        assert private is not None
        # an auditor asks for the sentence in both forms: after the private meaning, and as the collection has it
        scores[arm] = -_all_losses(model, seen, collate) - _all_losses(model, known, collate)
        found[f"{arm}_nll"], found[f"{arm}_spent"] = mean_nll(model, held, collate), private.spent().epsilon
    plain = _trap_reference(config)
    pairs_of_guesses = [(number, number) for number in config.guesses]
    for arm in ("with", "without"):
        outcome = one_run_audit(scores[arm] + plain[""], coins, guesses=pairs_of_guesses, delta=config.delta)
        found[f"{arm}_auc"], found[f"{arm}_bound"] = outcome.auc, outcome.epsilon
        before = one_run_audit(scores[f"{arm}_public"] + plain["_public"], coins, guesses=pairs_of_guesses, delta=config.delta)
        found[f"{arm}_public_auc"] = before.auc
    found["nll_gain"] = found["without_nll"] - found["with_nll"]
    found["excess"] = found["with_bound"] - config.epsilon
    found["refuted"] = float(found["excess"] > 0)
    return found
