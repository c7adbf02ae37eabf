"""The engine: clipped sums against one backward pass an example, whatever the model does; and what it refuses."""

import copy
import gc
import math
import pickle
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from oral4.dp import speed
from oral4.dp.engine import ClipEngine, validate

GOLDENS = Path(__file__).parents[1] / "goldens/dp"


def brute_force(model, loss, batch, clip_norm=1.0, stability=1e-6, one_by_one=True):
    """Norms (B,) and clipped sums by name: a forward and backward pass for each example, of a copy of the model."""
    model = copy.deepcopy(model)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    size = len(next(iter(batch)))
    norms, total = [], [torch.zeros_like(p) for p in parameters]
    for i in range(size):
        losses = loss(model, *(x[i : i + 1] for x in batch)) if one_by_one else loss(model, *batch)[i : i + 1]
        grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        norms.append(torch.cat([g.flatten().double() for g in grads]).norm())
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, clip_norm / (norms[-1].item() + stability))
    return torch.stack(norms), dict(zip(names, total, strict=True))


def compare(model, loss, *batch, rtol=1e-9, one_by_one=True, clip_norm=1.0, forward=None, **options):
    """Clip with the engine and by brute force; both must agree. Return the statistics."""
    norms, total = brute_force(model, loss, batch, clip_norm, one_by_one=one_by_one)
    engine = ClipEngine(model, clip_norm, **options)
    stats = engine.backward((forward or loss)(model, *batch))
    torch.testing.assert_close(stats.norms, norms, rtol=rtol, atol=rtol * 1e-3)
    scale = max([float(g.abs().max()) for g in total.values()])
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, total[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert p.grad is None, f"{name} is frozen and got a gradient"
    engine.detach()
    return stats


def square(model, x, *more):
    """A loss that reaches every output with a gradient of its own."""
    y = model(x, *more)
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.linspace(0.5, 1.5, y[0].numel(), dtype=torch.float64).to(y.dtype).view(y.shape[1:])
    return (weights * y.square() + y).flatten(1).sum(1)


def x64(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.5
    return model.double().train()


# --- recorded models ----------------------------------------------------------------------------------------


def recorded(name):
    data = np.load(GOLDENS / f"{name}.npz")
    return {key: torch.from_numpy(data[key]) for key in data.files}


def check_recorded(model, losses_of, golden, **options):
    state = {key.removeprefix("state/"): x for key, x in golden.items() if key.startswith("state/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    tied = dict(model.named_parameters())
    assert not [name for name in missing if name in tied and "lm_head.decoder" not in name], missing
    engine = ClipEngine(model.train(), float(golden["C"]), stability=0.0, **options)
    norms = engine.parameter_norms(losses_of(model))
    stats = engine.backward(losses_of(model))
    torch.testing.assert_close(stats.norms, golden["per_example_norms"], rtol=1e-9, atol=0)
    torch.testing.assert_close(stats.factors, golden["clip_factors"], rtol=1e-9, atol=0)
    checked = 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, golden[f"sum_clipped/{name}"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norms[name], golden[f"param_norms/{name}"], rtol=1e-8, atol=1e-12)
        checked += 1
    assert checked == sum(key.startswith("sum_clipped/") for key in golden)


@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "per_example"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_recorded_gpt2(tied, mode):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=41, n_positions=16, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    golden = recorded("gpt2_tied" if tied else "gpt2_untied")

    def losses(model):
        out = model(input_ids=golden["in/ids"], position_ids=golden["in/pos"], use_cache=False).logits[:, :-1]
        labels = golden["in/labels"][:, 1:]
        loss = nn.functional.cross_entropy(out.mT, labels, ignore_index=-100, reduction="none")
        return loss.sum(1) / (labels != -100).sum(1)

    check_recorded(transformers.GPT2LMHeadModel(config).double(), losses, golden, mode=mode)


def roberta(kind, **more):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=37, num_labels=3,
        max_position_embeddings=24, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip
    return getattr(transformers, kind)(config).double()


def inputs(golden):
    return {name: golden[f"in/{name}"] for name in ("attention_mask", "position_ids", "token_type_ids")} | {
        "input_ids": golden["in/ids"]
    }


def test_recorded_roberta_classifier():
    golden = recorded("roberta_cls")

    def losses(model):
        return nn.functional.cross_entropy(model(**inputs(golden)).logits, golden["in/labels"], reduction="none")

    check_recorded(
        roberta(
            "RobertaForSequenceClassification",
            type_vocab_size=golden["state/roberta.embeddings.token_type_embeddings.weight"].shape[0],
        ),
        losses,
        golden,
    )


def test_recorded_roberta_infilling_with_tied_decoder():
    """The decoder reads one position an example, (B, d), while the embedding reads all of them."""
    golden = recorded("roberta_mlm_tied")

    def losses(model):
        arguments = inputs(golden)
        hidden = model.roberta(**arguments).last_hidden_state
        at = hidden[torch.arange(len(hidden)), golden["in/mask_pos"]]
        logits = model.lm_head(at)[:, golden["in/label_words"]]
        return nn.functional.cross_entropy(logits, golden["in/labels"], reduction="none")

    model = roberta(
        "RobertaForMaskedLM", type_vocab_size=golden["state/roberta.embeddings.token_type_embeddings.weight"].shape[0]
    )
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    check_recorded(model, losses, golden)


# --- layers -------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer used twice, and a branch around it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x)) + x)))


class InPlace(nn.Module):
    """Adds to the outputs of layers, and to views of them, in place."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x)
        h += 1.5
        h[..., :4] += x
        h = self.norm(h)
        h *= 0.5
        y = self.second(h)
        y += x
        return y


class Table(nn.Module):
    """Ids and positions that are the same for all examples, added in place; tied with the last layer."""

    def __init__(self, rows=9, width=4):
        super().__init__()
        self.words, self.places = nn.Embedding(rows, width, padding_idx=0), nn.Embedding(12, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, rows)
        self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids)
        h += self.places(torch.arange(ids.shape[1])[None])
        return self.head(self.norm(h))


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings) * 3.0


class Owner(nn.Module):
    """Owns parameters directly, beside a child that owns some too."""

    def __init__(self):
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(4))
        self.child = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        h = torch.cat([self.token.expand(len(x), -1, -1), self.child(x)], dim=1) * self.scale
        return h if mask is None else h * mask


class Gemma(nn.Module):
    """An RMS norm that scales by one plus its weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.last = kind(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.cells(x)[0])


class Scalar(nn.Module):
    """One number multiplies everything, and the module says so under the name that norms use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


IDS = torch.randint(0, 9, (3, 6), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "linear-2d": (lambda: nn.Linear(4, 5), x64(3, 4)),
    "linear-3d": (lambda: nn.Linear(4, 5), x64(3, 6, 4)),
    "linear-4d": (lambda: nn.Linear(4, 5, bias=False), x64(3, 2, 3, 4)),
    "layer-norm": (lambda: nn.LayerNorm(4), x64(3, 6, 4)),
    "layer-norm-2": (lambda: nn.LayerNorm((6, 4)), x64(3, 6, 4)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(4, bias=False), x64(3, 6, 4)),
    "layer-norm-2d": (lambda: nn.LayerNorm(4), x64(3, 4)),
    "rms-norm": (lambda: nn.RMSNorm(4), x64(3, 6, 4)),
    "gemma": (lambda: Gemma(4), x64(3, 6, 4)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), x64(3, 4, 5, 2)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), x64(3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2), x64(3, 4, 7, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular"), x64(3, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), x64(3, 2, 3, 4, 3)),
    "conv-transpose": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), x64(3, 4, 5)),
    "bilinear-free": (lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU(4), nn.Flatten()), x64(3, 4)),
    "prelu": (lambda: nn.PReLU(4), x64(3, 4, 6)),
    "prelu-square": (lambda: nn.PReLU(4), x64(3, 4, 4)),
    "prelu-one": (lambda: nn.PReLU(), x64(3, 4, 6)),
    "scalar": (lambda: Scalar(), x64(3, 6, 4)),
    "twice": (Twice, x64(3, 6, 4)),
    "in-place": (InPlace, x64(3, 6, 4)),
    "table": (Table, IDS),
    "scaled-embedding": (lambda: nn.Sequential(ScaledEmbedding(9, 4), nn.Linear(4, 3)), IDS),
    "owner": (lambda: nn.Sequential(nn.Linear(4, 4), Owner(), nn.Linear(4, 2)), x64(3, 6, 4)),
    "attention": (Attention, x64(3, 6, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM), x64(3, 6, 4)),
    "gru": (lambda: Recurrent(nn.GRU), x64(3, 6, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), x64(3, 6, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    build, x = LAYERS[name]
    compare(randomize(build()), square, x)


@pytest.mark.parametrize(
    "options",
    [{"rule": "gram"}, {"rule": "instantiate"}, {"mode": "two_pass"}, {"mode": "per_example"}],
    ids=["gram", "instantiate", "two_pass", "per_example"],
)
@pytest.mark.parametrize("name", ["linear-3d", "conv2d", "twice", "in-place", "table", "owner", "attention"])
def test_rules_and_modes_agree(name, options):
    build, x = LAYERS[name]
    compare(randomize(build()), square, x, **options)


def test_batch_of_one():
    for build, x in (LAYERS["table"], LAYERS["conv2d"], LAYERS["owner"]):
        compare(randomize(build()), square, x[:1])


@st.composite
def networks(draw):
    """A random net over (B, T, d): layers of any kind, some frozen, some used twice, ends tied or not."""
    width = draw(st.sampled_from([2, 4, 6]))
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["linear", "wide", "norm", "rms", "conv", "again", "owner"]))
        if kind == "linear":
            layers.append(nn.Linear(width, width, bias=draw(st.booleans())))
        elif kind == "wide":
            layers.append(nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)))
        elif kind == "norm":
            layers.append(nn.LayerNorm(width, bias=draw(st.booleans())))
        elif kind == "rms":
            layers.append(nn.RMSNorm(width))
        elif kind == "conv":
            layers.append(Transposed(nn.Conv1d(width, width, 3, padding=1, groups=draw(st.sampled_from([1, 2])))))
        elif kind == "again" and layers:
            layers.append(layers[draw(st.integers(0, len(layers) - 1))])
        elif kind == "owner":
            layers.append(Shift(width))
    model = Net(draw(st.integers(3, 9)), width, layers, draw(st.booleans()), draw(st.sampled_from([None, 0])))
    randomize(model, draw(st.integers(0, 99)))
    parameters = list(model.parameters())
    for p in draw(st.lists(st.sampled_from(parameters), max_size=len(parameters) - 1, unique_by=id)):
        p.requires_grad_(False)
    return model


class Transposed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.mT).mT


class Shift(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return torch.sin(x + self.shift)


class Net(nn.Module):
    def __init__(self, rows, width, layers, tied, padding):
        super().__init__()
        self.rows, self.words = rows, nn.Embedding(rows, width, padding_idx=padding)
        self.places, self.layers = nn.Embedding(8, width), nn.ModuleList(layers)
        self.head = nn.Linear(width, rows, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids):
        h = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        for layer in self.layers:
            h = h + layer(h)
        return self.head(h)


def target_loss(model, ids, labels):
    """Mean over the positions that have a target, as in table-to-text; rows without any have the loss 0."""
    loss = nn.functional.cross_entropy(model(ids).mT, labels, ignore_index=-100, reduction="none")
    return loss.sum(1) / (labels != -100).sum(1).clamp(min=1)


@given(
    networks(),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 999),
    st.sampled_from([{}, {"rule": "gram"}, {"rule": "instantiate"}, {"mode": "two_pass"}, {"memory_budget": 2000}]),
    st.sampled_from([1e-3, 0.3, 1e3]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_network(model, batch, length, seed, options, clip_norm, single):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.rows, (batch, length), generator=generator)
    labels = torch.randint(0, model.rows, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.4] = -100
    if single:
        model = model.float()
    # float64: rounding alone; float32: sums of up to a thousand products, where clipping may divide by a small norm
    compare(model, target_loss, ids, labels, rtol=2e-4 if single else 1e-8, clip_norm=clip_norm, **options)


@given(
    st.integers(0, 9999),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(["gram", "instantiate", "auto"]),
)
@settings(max_examples=40, deadline=None)
def test_no_contribution_exceeds_the_bound(seed, dtype, rule):
    """What one example adds to p.grad, measured on p.grad itself in float64, for gradients from tiny to huge."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 48)).to(dtype)
    clip_norm = 10.0 ** torch.randint(-3, 2, ()).item()
    engine = ClipEngine(model, clip_norm, rule=rule, stability=0.0)
    x = torch.randn(1, int(torch.randint(1, 40, ())), 64, dtype=dtype) * 10.0 ** torch.randint(-2, 3, ()).item()
    stats = engine.backward(square(model, x) * 10.0 ** torch.randint(-4, 5, ()).item())
    added = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    assert added <= clip_norm * (1 + 1e-6)
    assert stats.factors[0] == 1 or added >= clip_norm * (1 - 1e-6)  # and what is clipped keeps all that it may


# --- the graph holds the state ------------------------------------------------------------------------------


def test_a_forward_pass_leaves_nothing_behind():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    losses = square(model, x64(3, 6, 4))
    nodes = weakref.ref(losses)
    del losses
    gc.collect()
    assert nodes() is None
    with pytest.raises(ZeroDivisionError):
        square(model, x64(3, 6, 4)) / (1 / 0)
    square(model, x64(5, 2, 4))  # never used
    first, second = square(model, x64(3, 6, 4)), square(model, x64(2, 6, 4, seed=1))
    engine.backward(second)  # in another order than the forward passes
    engine.backward(first)
    expected = [brute_force(model, square, (x,))[1] for x in (x64(3, 6, 4), x64(2, 6, 4, seed=1))]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[0][name] + expected[1][name], rtol=1e-9, atol=1e-12)


def test_an_exception_in_the_forward_or_backward_pass_is_harmless():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.last, self.fail = ScaledEmbedding(9, 4), nn.Linear(4, 3), True

        def forward(self, ids):
            h = self.words(ids)
            if self.fail:
                self.last(h, "one argument too many")
            return self.last(h)

    model = randomize(Breaks())
    engine = ClipEngine(model, 1.0)
    with pytest.raises(TypeError):
        model(IDS)
    with pytest.raises((TypeError, RuntimeError)):
        model.words("no ids")
    assert engine._forward_batch is None
    model.fail = False
    losses = square(model, IDS)
    losses.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(losses)
    engine.detach()
    model.zero_grad()
    compare(model, square, IDS)


def test_two_engines_in_one_process():
    models = [randomize(Twice(), seed) for seed in (0, 1)]
    expected = [brute_force(model, square, (x64(3, 6, 4),)) for model in models]
    engines = [ClipEngine(model, 1.0) for model in models]
    losses = [square(model, x64(3, 6, 4)) for model in models]
    for engine, loss, (norms, _) in zip(engines, losses, expected, strict=True):
        torch.testing.assert_close(engine.backward(loss).norms, norms, rtol=1e-9, atol=0)
    for model, (_, total) in zip(models, expected, strict=True):
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, total[name], rtol=1e-9, atol=1e-12)


def test_detach_leaves_the_model_as_it_was():
    model = randomize(Table())
    before = set(model.__dict__), [set(m.__dict__) for m in model.modules()]
    engine = ClipEngine(model, 1.0)
    engine.detach()
    assert before == (set(model.__dict__), [set(m.__dict__) for m in model.modules()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    square(model, IDS).sum().backward()
    engine = ClipEngine(model, 1.0)
    assert not [m for m in model.modules() for h in m._forward_hooks.values() if "Tap" in repr(h)]
    engine.detach()


@pytest.mark.parametrize(
    "travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_the_model_has_no_engine(travel):
    model = randomize(Table())
    engine = ClipEngine(model, 1.0)
    other = travel(model)
    square(other, IDS).sum().backward()
    other.zero_grad()
    compare(other, square, IDS)
    engine.backward(square(model, IDS))


def test_ordinary_backward_is_refused_outside_of_public():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    with pytest.raises(RuntimeError, match=r"call engine\.backward\(losses\)"):
        square(model, x64(3, 6, 4)).mean().backward()
    assert all(p.grad is None for p in model.parameters())
    with engine.public():
        square(model, x64(3, 6, 4)).sum().backward()
    with_engine = [p.grad.clone() for p in model.parameters()]
    engine.detach()
    model.zero_grad()
    square(model, x64(3, 6, 4)).sum().backward()
    for p, g in zip(model.parameters(), with_engine, strict=True):
        assert torch.equal(p.grad, g)


def test_evaluation_mode_is_not_recorded():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    model.eval()
    losses = square(model, x64(3, 6, 4))
    with pytest.raises(ValueError, match=r"in evaluation mode, where nothing is recorded: call model\.train\(\) first"):
        engine.backward(losses)
    losses.sum().backward()  # saliency maps and the like
    with torch.no_grad():
        model.train()(x64(3, 6, 4))


@pytest.mark.parametrize("early_stop", [True, False])
def test_gradient_checkpointing(early_stop):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.blocks, self.last = (
                Table(9, 4),
                nn.ModuleList([InPlace(), Twice(), Owner()]),
                nn.Linear(4, 2),
            )
            self.blocks[1].last = nn.Linear(4, 4)
            self.recompute = True

        def forward(self, ids):
            h = self.table.norm(self.table.words(ids) + self.table.places(torch.arange(ids.shape[1])[None]))
            for block in self.blocks:
                with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
                    h = checkpoint(block, h, use_reentrant=False) if self.recompute else block(h)
            return self.last(h) @ self.table.head.weight.new_ones(2, 3)

    def plain(model, ids):
        model.recompute = False
        return square(model, ids)

    def recomputed(model, ids):
        model.recompute = True
        return square(model, ids)

    for mode in ("one_pass", "two_pass"):
        model = randomize(Checkpointed())
        compare(model, plain, IDS, forward=recomputed, mode=mode)


def test_reentrant_checkpointing_is_refused():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    h = checkpoint(model.inner, x64(3, 6, 4).requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="set use_reentrant=False"):
        engine.backward(model.last(h).flatten(1).sum(1))


def test_saved_tensors_may_be_offloaded():
    model = randomize(InPlace())
    norms, _ = brute_force(model, square, (x64(3, 6, 4),))
    engine, packed = ClipEngine(model, 1.0), []

    def pack(x):
        packed.append(x.shape)
        return x.numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        losses = square(model, x64(3, 6, 4))
    torch.testing.assert_close(engine.backward(losses).norms, norms, rtol=1e-9, atol=0)
    assert len(packed) > 5


@pytest.mark.parametrize("order", ["compiled first", "engine first", "in place", "engine on the compiled"])
def test_a_compiled_body(order):
    """torch.compile around the model, before the engine or after it: the same sums, also for the next shape."""
    model = randomize(Net(7, 4, [nn.LayerNorm(4), nn.Linear(4, 4)], tied=True, padding=None))
    torch.compiler.reset()
    plain, body, backend = copy.deepcopy(model), model, "aot_eager"
    if order in ("compiled first", "engine on the compiled"):
        body = torch.compile(model, backend=backend)
    engine = ClipEngine(body if order == "engine on the compiled" else model, 0.1)
    if order == "engine first":
        body = torch.compile(model, backend=backend)
    elif order == "in place":
        model.compile(backend=backend)
    for shape in ((3, 6), (2, 5)):
        ids, labels = torch.randint(7, (2, *shape), generator=torch.Generator().manual_seed(0))
        norms, total = brute_force(plain, target_loss, (ids, labels), 0.1)
        model.zero_grad()
        stats = engine.backward(target_loss(body, ids, labels))
        torch.testing.assert_close(stats.norms, norms, rtol=1e-9, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, total[name], rtol=1e-9, atol=1e-12)
    torch.compiler.reset()


def test_several_forward_passes_in_one_loss():
    """Pairs: both towers share their weights, each is a use of its own."""

    def pairs(model, x, y):
        return (model(x) * model(y)).flatten(1).sum(1)

    compare(randomize(Twice()), pairs, x64(3, 6, 4), x64(3, 6, 4, seed=1))


# --- parameters ---------------------------------------------------------------------------------------------


def test_frozen_bias_only_and_unused():
    model = randomize(InPlace())
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name)
    engine = ClipEngine(model, 1.0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        model.first(x64(3, 6, 4))
    assert saved == []  # a bias needs no input
    engine.detach()
    compare(model, square, x64(3, 6, 4))

    model = randomize(Twice())
    model.never = nn.Linear(3, 3)
    engine = ClipEngine(model, 1.0)
    engine.backward(square(model, x64(3, 6, 4)))
    assert torch.equal(model.never.weight.grad, torch.zeros(3, 3))  # it gets noise like all others

    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        ClipEngine(Twice().requires_grad_(False), 1.0)


def test_frozen_later_and_thawed_later():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    for trainable in (False, True):
        model.zero_grad()
        model.last.requires_grad_(trainable)
        norms, total = brute_force(model, square, (x64(3, 6, 4),))
        stats = engine.backward(square(model, x64(3, 6, 4)))
        torch.testing.assert_close(stats.norms, norms, rtol=1e-9, atol=0)
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(total)


def test_tied_after_the_engine_was_attached():
    model = randomize(Table())
    model.head.weight = nn.Parameter(x64(9, 4, seed=3))
    engine = ClipEngine(model, 1.0)
    for tie in (False, True):
        if tie:
            model.head.weight = model.words.weight
        model.zero_grad()
        norms, total = brute_force(model, square, (IDS,))
        stats = engine.backward(square(model, IDS))
        torch.testing.assert_close(stats.norms, norms, rtol=1e-9, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, total[name], rtol=1e-9, atol=1e-12)


def test_accumulates_over_physical_batches():
    model = randomize(Table())
    _, total = brute_force(model, square, (IDS,))
    engine = ClipEngine(model, 1.0)
    for part in (IDS[:2], IDS[2:]):
        engine.backward(square(model, part))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[name], rtol=1e-9, atol=1e-12)


def test_lora_weights_move():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0,
                                     embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora).double().train()
    for name, p in model.named_parameters():
        if "lora_B" in name:  # it starts at zero, and with it every gradient of lora_A
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 19, (3, 6))

    def loss(model, ids):
        logits = model(input_ids=ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    compare(model, loss, ids, clip_norm=0.1)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name} and moved


# --- precision ----------------------------------------------------------------------------------------------


def test_autocast_to_bfloat16():
    """Norms are those of the rounded inputs and gradients; the sum of one example stays within the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(3, 20, 64)

    def loss(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return square(model, x).float()

    true = brute_force(model, loss, (x,), one_by_one=False)[0]
    engine = ClipEngine(model, 0.5)
    norms = engine.backward(loss(model, x)).norms
    # the reference rounds each weight's gradient to 8 bits after the product, the engine does not
    torch.testing.assert_close(norms, true, rtol=4e-3, atol=0)
    assert model[0].weight.grad.dtype == torch.float32
    for i in range(3):
        model.zero_grad()
        engine.backward(loss(model, x[i : i + 1]))
        added = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
        assert 0.5 * (1 - 2**-6) < added <= 0.5


def test_bfloat16_model_and_storage():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.RMSNorm(48), nn.Linear(48, 16)).bfloat16()
    x = torch.randn(4, 10, 32).bfloat16()
    true = brute_force(copy.deepcopy(model), square, (x,), one_by_one=False)[0]
    engine = ClipEngine(model, 0.5)
    torch.testing.assert_close(engine.backward(square(model, x)).norms, true, rtol=4e-3, atol=0)
    assert model[0].weight.grad.dtype == torch.bfloat16

    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    x = torch.randn(4, 10, 32)
    exact, stored = (
        ClipEngine(copy.deepcopy(model), 0.5),
        ClipEngine(model, 0.5, store_dtype=torch.bfloat16, rule="gram"),
    )
    a, b = exact.backward(square(exact.model, x)), stored.backward(square(model, x))
    torch.testing.assert_close(a.norms, b.norms, rtol=1e-6, atol=0)  # norms are taken before anything is rounded
    for p, q in zip(exact.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0.05, atol=0.01)
        assert not torch.equal(q.grad, p.grad)


# --- clipping -----------------------------------------------------------------------------------------------


def per_parameter(model, x):
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(square(copy_ := model, x[i : i + 1]).sum(), list(copy_.parameters()))
        rows.append(grads)
    return rows


@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "per_example"])
def test_clipping_functions(mode):
    model, x = randomize(Twice()), x64(4, 6, 4)
    rows = per_parameter(copy.deepcopy(model), x)
    names = [name for name, _ in model.named_parameters()]
    norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])

    engine = ClipEngine(copy.deepcopy(model), 0.3, clipping="automatic", gamma=0.05, mode=mode)
    stats = engine.backward(square(engine.model, x))
    torch.testing.assert_close(stats.factors, 0.3 / (norms + 0.05), rtol=1e-9, atol=0)
    assert engine.sensitivity == 0.3

    groups = {name: name.split(".")[0] for name in names}
    bounds = {"inner": 0.2, "last": 40.0}
    engine = ClipEngine(copy.deepcopy(model), 1.0, clipping="per_layer", groups=groups, group_norms=bounds, mode=mode)
    stats = engine.backward(square(engine.model, x))
    assert engine.sensitivity == pytest.approx(math.hypot(0.2, 40.0))
    expected = {name: 0.0 for name in names}
    for i, row in enumerate(rows):
        for k, group in enumerate(("inner", "last")):
            mine = [(n, g) for n, g in zip(names, row, strict=True) if groups[n] == group]
            norm = torch.cat([g.flatten() for _, g in mine]).norm()
            torch.testing.assert_close(stats.group_norms[i, k], norm, rtol=1e-9, atol=0)
            for n, g in mine:
                expected[n] = expected[n] + g * min(1.0, bounds[group] / (float(norm) + 1e-6))
    for name, p in engine.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(stats.norms, norms, rtol=1e-9, atol=0)


def test_per_layer_defaults_share_the_bound():
    model = randomize(Twice())
    engine = ClipEngine(model, 2.0, clipping="per_layer")
    stats = engine.backward(square(model, x64(3, 6, 4)))
    assert engine.sensitivity == pytest.approx(2.0) and stats.factors.shape == (3, 2)
    by_kind = ClipEngine(randomize(Twice()), 2.0, clipping="per_layer", groups=lambda name: name.rpartition(".")[2])
    assert by_kind.backward(square(by_kind.model, x64(3, 6, 4))).group_norms.shape == (3, 2)


def test_adaptive_clipping_finds_the_quantile():
    model = randomize(nn.Linear(4, 3))
    engine = ClipEngine(model, 100.0, clipping="adaptive", target_quantile=0.25)
    x = x64(40, 4)
    for _ in range(60):
        stats = engine.backward(square(model, x))
        count = engine.take_count()
        assert float(count) == pytest.approx(float((stats.norms <= engine.clip_norm).sum()) - 20)
        assert engine.adapt(float(count), 40) == engine.sensitivity
        model.zero_grad()
    share = float((stats.norms <= engine.clip_norm).double().mean())
    assert abs(share - 0.25) <= 0.05 and engine.count_sensitivity == 0.5
    other = ClipEngine(randomize(nn.Linear(4, 3)), 1.0, clipping="adaptive")
    other.load_state_dict(engine.state_dict())
    assert other.clip_norm == engine.clip_norm
    with pytest.raises(ValueError, match="adapt is for clipping='adaptive'"):
        ClipEngine(randomize(Twice()), 1.0).adapt(0.0, 1)
    with pytest.raises(ValueError, match="the state is of clipping='adaptive'"):
        ClipEngine(randomize(Twice()), 1.0).load_state_dict(engine.state_dict())


# --- examples that are not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200], ids=["nan", "inf", "overflow"])
def test_a_bad_example_is_left_out(mode, value):
    for name in ("linear-3d", "conv2d") if value == 1e200 else ("linear-3d", "conv2d", "in-place", "twice"):
        build, x = LAYERS[name]
        x = x.clone()
        model = randomize(build())
        _, total = brute_force(model, square, (x[torch.tensor([0, 2])],))
        x[1].view(-1)[3] = value
        engine = ClipEngine(model, 1.0, mode=mode)
        with pytest.warns(UserWarning, match="1 of 3 examples had a loss or a gradient that is not finite"):
            stats = engine.backward(square(model, x))
        assert stats.nonfinite == 1 and stats.factors[1] == 0 and (stats.factors[[0, 2]] > 0).all()
        for key, p in model.named_parameters():
            torch.testing.assert_close(p.grad, total[key], rtol=1e-9, atol=1e-11)


def test_an_example_without_targets():
    """A mean over no positions is 0 / 0: left out with a warning; a sum is 0, and nothing is wrong."""
    model = randomize(Table())
    labels = IDS.clone()
    labels[1] = -100
    _, total = brute_force(model, target_loss, (IDS, labels))
    engine = ClipEngine(model, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine.backward(target_loss(model, IDS, labels)).norms[1] == 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[name], rtol=1e-9, atol=1e-12)
    loss = nn.functional.cross_entropy(model(IDS).mT, labels, ignore_index=-100, reduction="none").sum(1)
    with pytest.warns(UserWarning, match="not finite"):
        assert engine.backward(loss / (labels != -100).sum(1)).nonfinite == 1
    with pytest.raises(ValueError, match="use mode='one_pass'"):
        engine.mode = "per_example"
        engine.backward(nn.functional.cross_entropy(model(IDS).mT, labels, ignore_index=-100, reduction="none").sum(1)
                        / (labels != -100).sum(1))  # fmt: skip


# --- what is refused ----------------------------------------------------------------------------------------


class Outside(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x)) @ self.first.weight


def test_a_parameter_used_outside_of_its_module_is_found():
    model = randomize(Outside())
    engine = ClipEngine(model, 1.0)
    with pytest.raises(ValueError, match=r"parameter first\.weight is used outside of the forward pass of the module"):
        engine.backward(square(model, x64(3, 6, 4)))
    assert all(p.grad is None for p in model.parameters())
    model.first.weight.requires_grad_(False)
    engine.backward(square(model, x64(3, 6, 4)))

    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    with pytest.raises(ValueError, match=r"parameter (inner|last)\.(weight|bias) is used outside"):
        engine.backward(square(model, x64(3, 6, 4)) + sum(p.square().sum() for p in model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast rounds a weight once for both uses
        losses = square(model.float(), x64(3, 6, 4).float()) + (x64(3, 4).float() @ model.last.weight.T).sum(1)
    with pytest.raises(ValueError, match=r"parameter last\.weight is used outside"):
        engine.backward(losses)


def test_rows_that_are_tokens_are_refused():
    class Flattens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).view_as(x)

    model = randomize(Flattens())
    engine = ClipEngine(model, 1.0)
    with pytest.raises(ValueError, match=r"layer \(Linear\): its output has 18 rows for a batch of 3 examples"):
        engine.backward(square(model, x64(3, 6, 4)))
    engine = ClipEngine(sequence_first := randomize(nn.Linear(4, 4)), 1.0)
    with pytest.raises(ValueError, match="its output has 6 rows for a batch of 3 examples"):
        engine.backward(sequence_first(x64(6, 3, 4)).square().sum((0, 2)))


def test_verify_finds_mixed_examples():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            h = self.layer(x)
            return h - h.mean(0, keepdim=True)

    model = randomize(Mixes())
    engine = ClipEngine(model, 1.0)
    engine.verify(square(model.layer, x64(3, 6, 4)))
    losses = square(model, x64(3, 6, 4))
    with pytest.raises(ValueError, match=r"example 1: the gradient of layer\.\w+ has the norm"):
        engine.verify(losses, examples=[1])
    assert all(p.grad is None for p in model.parameters())


def test_modules_that_cannot_be_run_for_one_example():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale - x.mean(0, keepdim=True)

    model = randomize(Mixer())
    with pytest.raises(ValueError, match="gives another result for each example alone than for the batch"):
        ClipEngine(model, 1.0).backward(square(model, x64(3, 4)))

    class Drops(Owner):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.1)

    with pytest.raises(ValueError, match=r"1: it owns parameters directly and drops out.*set its dropout to 0"):
        ClipEngine(nn.Sequential(nn.Linear(4, 4), Drops()), 1.0)

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale if float(x.sum()) < 1e9 else x

    model = randomize(Data())
    with pytest.raises(
        ValueError, match=r"Data\): cannot be run for each example .*freeze its own parameters \['scale'\]"
    ):
        ClipEngine(model, 1.0).backward(square(model, x64(3, 4)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "1: BatchNorm2d mixes the examples.*use nn.GroupNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)), "1: SyncBatchNorm mixes"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True)), "running statistics"),
        (nn.Embedding(5, 4, sparse=True), "the model: sparse gradients and max_norm are not supported"),
        (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
        (nn.EmbeddingBag(5, 4), "use nn.Embedding and sum"),
        (nn.LSTM(4, 4), "its first axis is not the batch; build it with batch_first=True"),
        (nn.MultiheadAttention(4, 2), "batch_first=True"),
        (nn.LazyLinear(4), "its parameters have no shape yet"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "a parametrised weight is computed outside of its layer",
        ),
    ],
    ids=[
        "batchnorm",
        "syncbatchnorm",
        "instancenorm",
        "sparse",
        "max-norm",
        "bag",
        "lstm",
        "attention",
        "lazy",
        "weight-norm",
    ],
)
def test_models_that_are_refused(model, message):
    assert validate(model)
    with pytest.raises(ValueError, match=f"this model has no per-example gradients:\n(.|\n)*{message}"):
        ClipEngine(model, 1.0)


def test_frozen_batch_norm_in_evaluation_mode_is_allowed_until_it_trains():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False).eval(), nn.Linear(4, 2)).double()
    engine = ClipEngine(model, 1.0)
    engine.backward(square(model, x64(3, 4)))
    model.train()
    with pytest.raises(ValueError, match="BatchNorm1d was switched to training"):
        model(x64(3, 4))


def test_losses_that_are_no_losses_of_examples():
    model = randomize(Twice())
    engine = ClipEngine(model, 1.0)
    losses = square(model, x64(3, 6, 4))
    for wrong in (losses.mean(), losses[:, None], losses[:0], 1.0):
        with pytest.raises(
            ValueError, match=r"give one loss for each example, \(B,\): compute it with reduction='none'"
        ):
            engine.backward(wrong)
    with pytest.raises(ValueError, match="losses has no graph"):
        engine.backward(losses.detach())
    with pytest.raises(ValueError, match="the losses depend on no trainable layer"):
        engine.backward(torch.ones(3, requires_grad=True) * 2)
    with pytest.raises(ValueError, match="rows for a batch of 2 examples"):
        engine.backward(losses[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, r"clip_norm=0\.0; give a finite number above 0"),
        ({"clip_norm": math.nan}, "clip_norm=nan"),
        ({"mode": "ghost"}, "mode='ghost'; give one of 'one_pass', 'two_pass', 'per_example'"),
        ({"clipping": "percentile"}, "clipping='percentile'; give one of 'flat'"),
        ({"rule": "mixed"}, "rule='mixed'; give one of 'auto'"),
        ({"gamma": 0.0}, r"gamma=0\.0"),
        ({"stability": -1.0}, r"stability=-1\.0"),
        ({"target_quantile": 1.0}, r"target_quantile=1\.0; give a share between 0 and 1"),
        ({"memory_budget": -1}, "memory_budget=-1; give bytes, 0 or more"),
        ({"loss_reduction": "mean"}, "the engine needs one loss for each example"),
        ({"groups": {}}, "groups and group_norms are of clipping='per_layer', not of 'flat'"),
        ({"clipping": "per_layer", "groups": {"inner.weight": "a"}}, "groups has no entry for 'inner.bias'"),
        ({"clipping": "per_layer", "group_norms": {"inner": 1.0}}, "give a norm above 0 for each of"),
        ({"clipping": "per_layer", "group_norms": {"inner": 1.0, "last": 0.0}}, "give a norm above 0"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ClipEngine(Twice(), **({"clip_norm": 1.0} | options))


# --- rules, sharding ----------------------------------------------------------------------------------------


def test_report_and_budget():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 4000))
    x, net = torch.randn(2, 100, 256), 4 * 2 * (256 * 256 - 100 * 256)  # what one of the small matrices takes more
    rules = {}
    for budget in (None, 0, net - 1, net, 2 * net):
        engine = ClipEngine(model, 1.0, memory_budget=budget)
        engine.backward(model(x).square().mean((1, 2)))
        rules[budget] = [row["rule"] for row in engine.report()]
        assert {row["parameter"] for row in engine.report()} == {f"{i}.weight" for i in range(3)}
        assert all(row["positions"] == 100 and row["uses"] == 1 for row in engine.report())
        engine.detach()
    assert rules[0] == rules[net - 1] == ["gram"] * 3
    assert sorted(rules[net]) == ["gram", "gram", "instantiate"]
    assert sorted(rules[2 * net]) == sorted(rules[None]) == ["gram", "instantiate", "instantiate"]


@pytest.mark.parametrize("mode", ["one_pass", "two_pass", "per_example"])
def test_sink_receives_each_sum_once(mode):
    model = randomize(Table())
    _, total = brute_force(model, square, (IDS,))
    engine, received = ClipEngine(model, 1.0, mode=mode), {}
    names = {id(p): name for name, p in model.named_parameters()}

    def sink(p, gradient):
        name = names[id(p)]
        assert mode == "two_pass" or name not in received
        received[name] = received.get(name, 0) + gradient

    engine.sink = sink
    engine.backward(square(model, IDS))
    assert all(p.grad is None for p in model.parameters())
    for name, gradient in total.items():
        torch.testing.assert_close(received[name], gradient, rtol=1e-9, atol=1e-12)


def test_no_weight_gradient_is_computed_twice():
    """The anchor prunes what autograd would throw away: no product of matrices has the shape of a weight's gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                found.append(tuple(out.shape))
            return out

    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    engine, found = ClipEngine(model, 1.0, rule="gram"), []
    losses = square(model, torch.randn(2, 4, 5))
    with Shapes():
        engine.parameter_norms(losses)
    assert (7, 5) not in found and (3, 7) not in found and (8, 7) in found
    found.clear()
    with engine.public(), Shapes():
        square(model, torch.randn(2, 4, 5)).sum().backward()
    assert {(7, 5), (3, 7)} <= {*found, *(s[::-1] for s in found)}


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
def test_the_share_that_is_clipped_counts_norms_above_the_bound(clipping):
    """Factors are no measure: in bfloat16 all are below one by a margin, and automatic ones may be above it."""
    model = randomize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).bfloat16()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None]
    stats = ClipEngine(model, 8.0, clipping=clipping).backward(square(model, x.bfloat16()))
    norms, bound = (stats.group_norms, 8 / 2**0.5) if clipping == "per_layer" else (stats.norms, 8.0)
    assert 0 < int((norms > bound).sum()) < norms.numel()
    assert stats.clipped == float((norms > bound).double().mean())
    if clipping == "flat":
        assert bool((stats.factors < 1).all())


def test_a_bad_example_is_not_counted_as_clipped():
    model = randomize(nn.Linear(4, 3))
    x = x64(4, 4)
    x[1] = math.inf
    with pytest.warns(UserWarning, match="1 of 4 examples"):
        stats = ClipEngine(model, 1e-6).backward(square(model, x))
    assert stats.clipped == 0.75


def test_the_two_passes_of_the_paper_give_the_same_sum():
    pytest.importorskip("transformers")
    found = {}
    for method in ("ours", "official-two-pass"):
        model, ids = speed.build(speed.CASES["tiny"])
        step = speed.METHODS[method](model.double(), ids)
        step()
        step()  # what the first left behind must not be counted again
        found[method] = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in found["ours"].items():
        torch.testing.assert_close(found["official-two-pass"][name], gradient, rtol=1e-9, atol=1e-13, msg=name)
