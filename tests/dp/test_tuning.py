"""Noise curves, signal to noise against simulation, Adam's indifference to the clip, the choice of parameters."""

import itertools
import math
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from oral4.dp.accountant import epsilon
from oral4.dp.engine import ClipEngine
from oral4.dp.tuning import (
    NoisePoint,
    PrefixEncoder,
    PrefixModel,
    Selection,
    adam_damping,
    adam_share,
    alignment,
    effective_noise,
    find_blocks,
    noise_curve,
    select_parameters,
    signal_to_noise,
    suggest,
    useful_share,
    useful_updates,
)
from oral4.errors import MissingExtra

# ------------------------------------------------------------------------------- noise


def test_noise_curve_keeps_the_promise_at_every_batch_size():
    points = noise_curve(20_000, [50, 500, 20_000], target_epsilon=3.0, epochs=2, tolerance=0.01)
    assert [point.steps for point in points] == [800, 80, 2] and [point.q for point in points] == [0.0025, 0.025, 1.0]
    for point in points:
        assert epsilon(point.q, point.sigma, point.steps, 1 / 40_000) <= 3.0
        assert epsilon(point.q, point.sigma - 0.01, point.steps, 1 / 40_000) > 3.0
        assert point.sigma_eff == effective_noise(point.sigma, point.q) == point.sigma / point.q


@pytest.mark.parametrize("target", [1.0, 8.0])
@pytest.mark.parametrize("budget", [{"epochs": 3}, {"steps": 300}], ids=["epochs", "steps"])
def test_a_larger_batch_carries_less_noise_an_example(target, budget):
    sizes = [32, 128, 512, 2048, 8192, 32_768]
    points = noise_curve(32_768, sizes, target_epsilon=target, method="rdp", **budget)
    noise = [point.sigma_eff for point in points]
    assert all(large < small for small, large in itertools.pairwise(noise))
    sigmas = [point.sigma for point in points]
    assert sigmas == sorted(sigmas)  # the multiplier itself grows, but slower than the batch
    if "steps" in budget:  # without sampling S steps are one Gaussian mechanism: the floor sqrt(S) / mu
        assert noise[-1] == pytest.approx(sigmas[-1]) and noise[-2] < 1.1 * noise[-1]
        assert [point.steps for point in points] == [300] * 6
    elif target == 1:  # E / q steps of much noise add up like unsampled ones: 1 / sqrt(q), a factor of 2 a size
        assert noise[-2] / noise[-1] == pytest.approx(2, rel=0.15)


# ------------------------------------------------------------------------------- signal


def test_alignment_is_the_mean_of_the_clipped_gradients():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 3, 5, generator=generator) + 0.5
    clipped = [g * min(1.0, 0.7 / float(g.norm())) for g in gradients]
    expected = float(torch.stack(clipped).mean(0).norm()) / 0.7
    assert alignment(gradients, 0.7) == pytest.approx(expected, rel=1e-6)  # float32
    assert alignment(torch.ones(5, 4), 0.1) == pytest.approx(1.0, rel=1e-6)
    assert alignment(torch.zeros(5, 4), 0.1) == 0.0
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert alignment(opposite, 0.5) == 0.0


@given(st.integers(0, 1000), st.floats(0.01, 3.0))
@settings(max_examples=30, deadline=None)
def test_a_smaller_clip_never_loses_signal_where_gradients_agree(seed, clip_norm):
    gradients = torch.rand(20, 6, generator=torch.Generator().manual_seed(seed))  # no two of them at an obtuse angle
    assert alignment(gradients, clip_norm) >= alignment(gradients, 2 * clip_norm) * (1 - 1e-6)  # float32
    assert alignment(gradients, clip_norm) <= 1 + 1e-6


def test_signal_to_noise_is_the_ratio_of_the_norms():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(100, 4000, generator=generator) + 0.2
    clip_norm, sigma, batch_size = 0.3, 0.9, 100
    mean = torch.stack([g * min(1.0, clip_norm / float(g.norm())) for g in gradients]).mean(0)
    noise = torch.randn(4000, generator=generator) * clip_norm * sigma / batch_size
    found = signal_to_noise(alignment(gradients, clip_norm), batch_size, sigma, 4000)
    # the norm of 4000 normal numbers scatters by 1 / sqrt(8000) = 1.1 %; four of that
    assert found == pytest.approx(float(mean.norm() / noise.norm()), rel=0.045)


def quadratic_decrease(kappa, point, dimension, step, updates, generator):
    """Return how far private steps bring down a loss that bends alike in ``dimension`` directions, per update."""
    start = kappa * math.sqrt(1 - 1e-9) * torch.eye(1, dimension, dtype=torch.float64)[0]
    lost = 0.0
    for _ in range(updates):  # always from the same place: the gain of one step, with C = 1 and L = 1
        noise = torch.randn(dimension, generator=generator, dtype=torch.float64) * point.sigma / point.batch_size
        after = start - step * (start + noise)
        lost += float(start.square().sum() - after.square().sum()) / 2
    return lost / updates


def test_useful_share_is_the_best_step_and_what_it_gains():
    generator = torch.Generator().manual_seed(2)
    point, dimension, kappa = NoisePoint(200, 1.0, 1, 2.0), 400, 0.2  # q = 1: noise alone, no sampling
    share = useful_share(kappa, point, dimension)
    assert share == pytest.approx(0.5)
    gains = {s: quadratic_decrease(kappa, point, dimension, s, 400, generator) for s in (share / 2, share, 2 * share)}
    # 400 draws of a gain that scatters by kappa / 100: three standard errors are 7 % of it
    assert gains[share] == pytest.approx(kappa**2 / 2 * share, rel=0.08)
    assert gains[share] > max(gains[share / 2], gains[2 * share])


def test_useful_share_counts_the_sampling_too():
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(500, 30, generator=generator, dtype=torch.float64)
    gradients = nn.functional.normalize(gradients + 0.3, dim=1)  # all of norm C = 1
    kappa, q = alignment(gradients, 1.0), 0.02
    updates = []
    for _ in range(3000):
        taken = torch.rand(500, generator=generator) < q
        updates.append(gradients[taken].sum(0) / 10)
    updates = torch.stack(updates)
    variance = float(updates.var(dim=0).sum())
    assert variance == pytest.approx((1 - q) / 10, rel=0.06)  # 3000 draws in about 30 directions
    share = useful_share(kappa, NoisePoint(10, q, 1, 0.0), dimension=30)
    assert share == pytest.approx(kappa**2 / (kappa**2 + variance), rel=0.04)


def test_useful_updates_favour_large_batches_at_fixed_steps_and_a_middle_at_fixed_epochs():
    sizes = [2**k for k in range(4, 16)]
    steps = noise_curve(50_000, sizes, target_epsilon=3, steps=500, method="rdp")
    epochs = noise_curve(50_000, sizes, target_epsilon=3, epochs=10, method="rdp")
    gain = useful_updates(0.3, steps, 1e5)
    assert gain == sorted(gain) and gain[-1] < 500
    gain = useful_updates(0.3, epochs, 1e5)
    best = gain.index(max(gain))
    assert 0 < best < len(sizes) - 1
    assert gain == [p.steps * useful_share(0.3, p, 1e5) for p in epochs]
    harder = useful_updates(0.3, epochs, 1e7)  # more directions that matter ask for a larger batch
    assert harder.index(max(harder)) > best


def test_suggestion_is_the_recipe():
    found = suggest(67_349, target_epsilon=3, epochs=3, method="rdp")
    assert found.point.batch_size == 1024 and found.point.steps == 198 and found.clip_norm == 0.1
    assert found.learning_rates == pytest.approx((5e-4, 1e-3, 2e-3)) and found.delta == 1 / (2 * 67_349)
    assert epsilon(found.point.q, found.point.sigma, 198, found.delta, method="rdp") <= 3
    assert suggest(20, target_epsilon=8, epochs=3, rate=1.0, method="rdp").point.batch_size == 16
    assert suggest(20, target_epsilon=8, epochs=3, rate=0.001, method="rdp").point.batch_size == 1
    assert suggest(33, target_epsilon=8, epochs=3, rate=1.0, method="rdp").point.batch_size <= 33


# ------------------------------------------------------------------------------- Adam


def train(clip_norm, *, gradients=None, sigma=0.8, eps=1e-8, decay=0.0, optimizer=torch.optim.AdamW):
    """Return the weights after 60 private steps on least squares, the draws of noise the same for every clip."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(64, 5, generator=generator, dtype=torch.float64)
    targets = 100 * (inputs @ torch.arange(1.0, 6.0, dtype=torch.float64))
    weight = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    adam = optimizer([weight], lr=0.05, eps=eps, weight_decay=decay)
    for _ in range(60):
        per_example = (inputs @ weight.detach() - targets)[:, None] * inputs
        norms = per_example.norm(dim=1, keepdim=True)
        assert gradients != "clipped" or bool((norms > clip_norm).all())
        total = (per_example * (clip_norm / norms).clamp(max=1)).sum(0)
        noise = torch.randn(5, generator=generator, dtype=torch.float64)
        weight.grad = (total + sigma * clip_norm * noise) / 64
        adam.step()
    return weight.detach()


def test_adam_does_not_see_the_clip_while_everything_is_clipped():
    reference = train(1e-2, gradients="clipped", eps=0.0)
    # everything scales by C, and Adam divides by it: without eps only rounding is left
    torch.testing.assert_close(train(1e-6, gradients="clipped", eps=0.0), reference, rtol=1e-11, atol=0)
    torch.testing.assert_close(train(1e-6, eps=0.0, decay=0.1), train(1e-2, eps=0.0, decay=0.1), rtol=1e-11, atol=0)
    coupled = [train(c, eps=0.0, decay=0.1, optimizer=torch.optim.Adam) for c in (1e-2, 1e-6)]
    moved = (coupled[0] - coupled[1]).abs().max() / coupled[0].abs().max()
    assert float(moved) > 0.5  # decay inside the gradient does not scale with C
    sgd = [train(c, eps=0.0, optimizer=lambda p, lr, eps, weight_decay: torch.optim.SGD(p, lr)) for c in (1e-2, 1e-6)]
    torch.testing.assert_close(sgd[1], sgd[0] * 1e-4, rtol=1e-3, atol=0)  # SGD does see it: 10^4 times slower


@pytest.mark.parametrize("clip_norm", [1e-3, 1e-5])
def test_adam_damping_is_the_size_of_what_eps_changes(clip_norm):
    damping = adam_damping(clip_norm, sigma=0.8, batch_size=64)
    assert damping == pytest.approx(1e-8 * 64 / (0.8 * clip_norm))
    exact = train(clip_norm, eps=0.0)
    change = float((train(clip_norm) - exact).norm() / exact.norm())
    # the signal is several times the noise here, so eps changes less; a draw near zero in the first steps, more
    assert 0.01 * damping < change < 5 * damping
    tenth = float((train(clip_norm, eps=1e-9) - exact).norm() / exact.norm())
    assert change / tenth == pytest.approx(10, rel=0.1)  # first order, with a damping of up to 0.08
    assert adam_damping(0.1, 0.8, 1000, adam_epsilon=0.0) == 0.0


@pytest.mark.parametrize(("signal", "noise"), [(0.01, 0.1), (0.05, 0.05), (-0.1, 0.01)])
def test_adam_share_is_the_speed_of_adam_in_noise(signal, noise):
    generator = torch.Generator().manual_seed(5)
    weight = torch.zeros(400, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([weight], lr=1e-3, betas=(0.9, 0.999))
    steps = 3000
    for _ in range(steps):
        weight.grad = signal + noise * torch.randn(400, generator=generator, dtype=torch.float64)
        adam.step()
    speed = float(weight.detach().mean().abs()) / (1e-3 * steps)
    # 1.2 million draws; the estimate of the mean square, over 1000 steps, costs another percent
    assert speed == pytest.approx(adam_share(signal, noise), rel=0.02)


# ------------------------------------------------------------------------------- choice of parameters


def gpt2(**changes):
    settings = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 24, "resid_pdrop": 0.0}
    config = GPT2Config(
        **{**settings, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, **changes}
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).double()


def roberta(kind=RobertaForSequenceClassification):
    config = RobertaConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=37, num_labels=3,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind(config).double()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=31, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


IDS = torch.randint(3, 31, (4, 7), generator=torch.Generator().manual_seed(6))


def losses(model, ids=IDS):
    logits = model(input_ids=ids).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, ids[:, 0] % logits.shape[1], reduction="none")
    return (
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .view(len(ids), -1)
        .mean(1)
    )


CHOICES = {
    "gpt2-full": (gpt2, "full", {}),
    "gpt2-bias": (gpt2, "bias", {}),
    "gpt2-top": (gpt2, "top-k", {"blocks": 1}),
    "gpt2-lora": (gpt2, "lora", {}),
    "gpt2-prefix": (gpt2, "prefix", {"prefix_len": 3, "hidden": 5}),
    "llama-prefix": (llama, "prefix", {"prefix_len": 2, "hidden": 5}),
    "llama-lora": (llama, "lora", {"targets": ["q_proj", "v_proj", "down_proj"], "rank": 2}),
    "roberta-bias": (roberta, "bias", {}),
    "roberta-head": (roberta, "head", {}),
    "roberta-top": (roberta, "top-k", {}),
    "roberta-lora": (roberta, "lora", {}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_engine_and_optimiser_reach_what_was_chosen_and_nothing_else(case):
    build, method, options = CHOICES[case]
    chosen = select_parameters(build(), method, **options)
    model = chosen.model.train()
    parameters = dict(model.named_parameters())
    assert set(chosen.names) == {name for name, p in parameters.items() if p.requires_grad}
    assert chosen.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert chosen.num_total == sum(p.numel() for p in model.parameters())
    if method == "lora":  # the update begins at zero, which hides half of the gradients
        with torch.no_grad():
            for name in chosen.names:
                if "lora_B" in name:
                    parameters[name].normal_(generator=torch.Generator().manual_seed(7))
    expected = []
    for i in range(len(IDS)):
        grads = torch.autograd.grad(losses(model, IDS[i : i + 1])[0], [parameters[n] for n in chosen.names])
        expected.append(math.sqrt(sum(float(g.square().sum()) for g in grads)))
    engine = ClipEngine(model, clip_norm=1e-3)
    stats = engine.backward(losses(model))
    engine.detach()
    torch.testing.assert_close(stats.norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    frozen = {name: p.detach().clone() for name, p in parameters.items() if name not in chosen.names}
    assert all(parameters[name].grad is None for name in frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name in chosen.names:
        parameters[name].grad = torch.randn(parameters[name].shape, dtype=torch.float64)  # noise reaches all
    optimizer.step()
    assert chosen.unmoved() == []
    assert all(torch.equal(parameters[name], kept) for name, kept in frozen.items())


def test_names_of_the_chosen():
    names = {
        case: select_parameters(b(), m, **o).names for case, (b, m, o) in CHOICES.items() if m not in ("lora", "prefix")
    }
    assert len(names["gpt2-full"]) == len(list(gpt2().parameters()))
    assert all(name.endswith(".bias") for name in names["gpt2-bias"])
    assert len(names["gpt2-bias"]) == 3 * 6 + 1  # two norms, two attention maps, two feed-forward maps; the last norm
    assert all(name.startswith("transformer.h.2.") for name in names["gpt2-top"]) and len(names["gpt2-top"]) == 12
    assert set(names["roberta-head"]) == {
        f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")
    }
    assert set(names["roberta-head"]) < set(names["roberta-bias"])  # a new head is always trained
    assert {name.split(".")[3] for name in names["roberta-top"] if "layer" in name} == {"1", "2"}
    infill = select_parameters(roberta(RobertaForMaskedLM), "bias").names
    assert "lm_head.bias" in infill and "lm_head.dense.weight" not in infill  # pretrained, so not a new head
    assert "lm_head.weight" in select_parameters(gpt2(tie_word_embeddings=False), "head").names


def test_a_second_choice_replaces_the_first():
    model = gpt2()
    select_parameters(model, "bias")
    assert select_parameters(model, "full").num_trained == sum(p.numel() for p in model.parameters())
    assert str(select_parameters(model, "bias")) == "bias: 544 of 10,752 parameters are trained (5.06 %)"


@pytest.mark.parametrize("build", [gpt2, roberta])
def test_low_rank_updates_begin_at_the_model_itself_and_count_as_derived(build):
    model = build().eval()
    before = model(input_ids=IDS).logits
    chosen = select_parameters(model, "lora", rank=3)
    torch.testing.assert_close(chosen.model.eval()(input_ids=IDS).logits, before, rtol=0, atol=0)
    if build is gpt2:
        assert chosen.num_trained == 3 * 3 * (16 + 48)  # layers x rank x (inputs + outputs) of the fused attention map
    else:
        head = 16 * 16 + 16 + 16 * 3 + 3
        assert chosen.num_trained == head + 3 * 2 * 3 * (16 + 16)  # query and value
        assert any("classifier" in name for name in chosen.names)


def test_an_optimiser_built_too_early_is_noticed():
    model = gpt2()
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1)  # before the adapters: holds none of them
    chosen = select_parameters(model, "lora")
    losses(chosen.model).sum().backward()
    optimizer.step()
    assert chosen.unmoved() == list(chosen.names) and chosen.names
    with torch.no_grad():
        dict(chosen.model.named_parameters())[chosen.names[0]].add_(1.0)
    assert chosen.unmoved() == list(chosen.names[1:])


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_prefix_is_keys_and_values_in_every_layer(build):
    model = build().eval()
    wrapped = PrefixModel(model, prefix_len=3, hidden=5).eval()
    found = wrapped(input_ids=IDS).logits
    assert found.shape == (4, 7, 31) and wrapped.config is model.config
    # each row alone, and with padding on the left and the right of another length
    one = wrapped(input_ids=IDS[1:2]).logits
    torch.testing.assert_close(found[1:2], one, rtol=0, atol=1e-10)
    padded = torch.cat([IDS[1:2], torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 3])
    torch.testing.assert_close(wrapped(input_ids=padded, attention_mask=mask).logits[:, :7], one, rtol=0, atol=1e-10)
    # the same as the cache of real words: read a prompt, put its keys and values where the prefix goes
    prompt = IDS[:1, :3]
    cache = DynamicCache()
    model(input_ids=prompt, use_cache=True, **{wrapped.cache_name: cache})
    states = [(layer.keys, layer.values) for layer in cache.layers]
    wrapped.prefix.forward = lambda batch_size: [torch.stack(pair) for pair in states]
    behind = wrapped(input_ids=IDS[2:3]).logits
    whole = model(input_ids=torch.cat([prompt, IDS[2:3]], dim=1)).logits
    torch.testing.assert_close(behind, whole[:, 3:], rtol=0, atol=1e-9)


def test_prefix_counts():
    encoder = PrefixEncoder(10, 16, 7, num_layers=3, num_heads=2, head_dim=8)
    expected = 10 * 16 + (16 * 7 + 7) + (7 + 1) * 3 * 2 * 2 * 8
    assert sum(p.numel() for p in encoder.parameters()) == expected
    chosen = select_parameters(gpt2(), "prefix", hidden=7)
    assert chosen.num_trained == expected and not any(p.requires_grad for p in chosen.model.model.parameters())
    assert encoder(5).shape == (3, 2, 5, 2, 10, 8)
    half = PrefixEncoder(10, 16, 7, 3, 2, 8, dropout=0.5)
    assert float((half(50) == 0).double().mean()) == pytest.approx(0.5, abs=0.02)  # 48,000 coins


def test_blocks_are_found():
    assert find_blocks(gpt2()) == [f"transformer.h.{i}" for i in range(3)]
    assert find_blocks(roberta()) == [f"roberta.encoder.layer.{i}" for i in range(3)]
    small = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "vocab_size": 11}
    small |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 9}
    assert find_blocks(BartForConditionalGeneration(BartConfig(**small))) == [
        f"model.decoder.layers.{i}" for i in range(2)
    ]
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=11))
    assert find_blocks(t5) == ["decoder.block.0", "decoder.block.1"]
    shared = {"embedding_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    albert = AlbertForSequenceClassification(AlbertConfig(**shared, num_hidden_layers=4))
    assert len(find_blocks(albert)) == 1  # one block, used four times
    with pytest.raises(ValueError, match="blocks=2; AlbertForSequenceClassification has 1 blocks"):
        select_parameters(albert, "top-k")


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_noise(1.0, 0.0), "q=0.0"),
        (lambda: effective_noise(-1.0, 0.1), "sigma=-1.0"),
        (lambda: noise_curve(100, [10], target_epsilon=1), "epochs=None, steps=None; give exactly one"),
        (lambda: noise_curve(100, [10], target_epsilon=1, epochs=1, steps=1), "give exactly one"),
        (lambda: noise_curve(100, [200], target_epsilon=1, epochs=1), "batch_size=200"),
        (lambda: noise_curve(100, [200], target_epsilon=1, steps=1), "batch_size=200"),
        (lambda: noise_curve(100, [10], target_epsilon=1, steps=1, method="gdp"), "method='gdp' is no bound"),
        (lambda: alignment(torch.ones(3), 1.0), "gradients (3,)"),
        (lambda: alignment(torch.ones(3, 2), 0.0), "clip_norm=0.0"),
        (lambda: signal_to_noise(1.5, 10, 1.0, 10), "alignment=1.5"),
        (lambda: signal_to_noise(0.5, 10, 0.0, 10), "sigma=0.0"),
        (lambda: useful_share(0.0, NoisePoint(10, 0.1, 1, 1.0), 10), "alignment=0.0"),
        (lambda: useful_share(0.5, NoisePoint(10, 0.1, 1, 1.0), 0), "dimension=0"),
        (lambda: suggest(100, target_epsilon=1, epochs=1, rate=0), "rate=0"),
        (lambda: suggest(100, target_epsilon=1, epochs=1, learning_rate=0), "learning_rate=0"),
        (lambda: adam_share(0.0, 0.0), "signal=0.0, noise=0.0"),
        (lambda: adam_share(1.0, -1.0), "noise=-1.0"),
        (lambda: adam_damping(0.0, 1.0, 1), "clip_norm=0.0"),
        (lambda: PrefixEncoder(0, 8, 8, 1, 1, 8), "prefix_len=0"),
        (lambda: PrefixModel(roberta()), "RobertaForSequenceClassification is no causal decoder"),
        (lambda: PrefixModel(nn.Linear(2, 2)), "Linear is no causal decoder"),
        (lambda: select_parameters(gpt2(), "adapter"), "method='adapter'; give one of 'full', 'bias', 'head', 'top-k'"),
        (lambda: select_parameters(gpt2(), "head"), "its head is tied to the embedding"),
        (lambda: select_parameters(nn.Linear(2, 2), "head"), "Linear has no base_model_prefix"),
        (lambda: select_parameters(nn.Linear(2, 2, bias=False), "bias"), "Linear has no biases"),
        (lambda: select_parameters(gpt2(), "top-k", blocks=4), "blocks=4; GPT2LMHeadModel has 3 blocks"),
        (lambda: select_parameters(gpt2(), "top-k", blocks=0), "blocks=0"),
        (lambda: select_parameters(nn.Linear(2, 2), "top-k"), "holds no nn.ModuleList"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("method", "package"), [("lora", "peft"), ("prefix", "transformers")])
def test_missing_package_is_named(monkeypatch, method, package):
    model = gpt2()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=re.escape(f'needs {package}: pip install "oral4[language]"')):
        select_parameters(model, method).model(input_ids=IDS)


def test_head_by_name_for_a_model_of_ones_own():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    chosen = select_parameters(model, "head", head=("1",))
    assert isinstance(chosen, Selection) and chosen.names == ("1.weight", "1.bias") and chosen.model is model
    assert select_parameters(model, "bias", head=("1",)).names == ("0.bias", "1.weight", "1.bias")
    on_meta = select_parameters(nn.Linear(3, 4, device="meta"), "full")  # counts need no numbers
    assert on_meta.num_trained == 16
