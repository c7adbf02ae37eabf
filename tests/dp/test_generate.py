"""Generation: batches against beam search written out, one prompt at a time and an exhaustive search."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oral4.dp.corpus import micro_pairs
from oral4.dp.generate import beam_search_reference, generate_ids, generate_texts, line_breaks
from oral4.dp.tasks import encode_prompt, source_line, train_tokenizer

VOCAB, EOS, PAD = 23, 0, 1
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
CONFIGS = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "gpt2-untied": transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=VOCAB,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    ),
    "llama": transformers.LlamaConfig(**SHAPE, intermediate_size=24, bos_token_id=2, eos_token_id=0),
    "opt": transformers.OPTConfig(**SHAPE, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
}
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [3, 4, 5], [12, 2, 12, 2, 12, 2, 12, 2, 12], [9, 9]]


def build(family, seed=0, sharp=4.0, attention="sdpa"):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():  # fresh weights are so small that every token is as likely as any other
            if p.dim() > 1:
                p.mul_(sharp)
    return model


SETTINGS = {
    "beams": {"num_beams": 4, "max_new_tokens": 9},
    "greedy": {"num_beams": 1, "max_new_tokens": 12},
    "short": {"num_beams": 3, "max_new_tokens": 8, "length_penalty": -1.0},
    "long": {"num_beams": 3, "max_new_tokens": 8, "length_penalty": 2.0, "min_new_tokens": 4},
    "forbidden": {"num_beams": 5, "max_new_tokens": 7, "min_new_tokens": 2, "bad_words": [[7], [4, 5], [9, 10]]},
}


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_batches_equal_beam_search_written_out(family, name):
    model = build(family)
    expected = [beam_search_reference(model, prompt, eos_id=EOS, **SETTINGS[name]) for prompt in PROMPTS]
    assert generate_ids(model, PROMPTS, eos_id=EOS, pad_id=PAD, **SETTINGS[name]) == expected
    assert any(expected)
    assert len({tuple(tokens) for tokens in expected}) > 1  # the prompts matter


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_text_does_not_depend_on_its_batch(family):
    model = build(family, seed=1)
    given_settings = {"eos_id": EOS, "num_beams": 4, "max_new_tokens": 10}
    alone = [generate_ids(model, [prompt], **given_settings)[0] for prompt in PROMPTS]
    for size in (2, 3, 16):
        assert generate_ids(model, PROMPTS, batch_size=size, **given_settings) == alone
    turned = generate_ids(model, PROMPTS[::-1], batch_size=2, **given_settings)
    assert turned == alone[::-1]
    for pad in (EOS, PAD, 22):  # what the padding is filled with has no influence
        assert generate_ids(model, PROMPTS, pad_id=pad, **given_settings) == alone
    # the library's own call, one prompt at a time
    for prompt, tokens in zip(PROMPTS, alone, strict=True):
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=4,
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )[0, len(prompt) :].tolist()
        assert (found[: found.index(EOS)] if EOS in found else found) == tokens


@given(st.integers(0, 10_000), st.integers(1, 4), st.sampled_from([-0.5, 0.0, 1.0, 1.5]), st.integers(0, 3))
@settings(deadline=None, max_examples=12)
def test_any_model_any_penalty(seed, num_beams, penalty, fewest):
    model = build("gpt2", seed=seed)
    how = {"num_beams": num_beams, "max_new_tokens": 5, "length_penalty": penalty, "min_new_tokens": fewest}
    expected = [beam_search_reference(model, prompt, eos_id=EOS, **how) for prompt in PROMPTS[:3]]
    assert generate_ids(model, PROMPTS[:3], eos_id=EOS, **how) == expected


class Table(nn.Module):
    """A language model that is a table: log-probabilities of the next token after the last one."""

    def __init__(self, log_probs):
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.log_probs[input_ids]})


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_texts(penalty):
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(4, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    best = {}
    for length in range(1, 4):
        for body in itertools.product(range(1, 4), repeat=length):
            texts = [((*body[:-1], EOS), body[:-1])] if body[-1] == 1 else []  # ended, once for each beginning
            texts += [(body, body)] if length == 3 else []  # cut off
            for tokens, shown in texts:
                worth = sum(table[a, b].item() for a, b in itertools.pairwise((2, *tokens)))
                best[shown] = max(best.get(shown, -1e9), worth / len(tokens) ** penalty)
    expected = list(max(best, key=best.get))
    found = beam_search_reference(Table(table), [2], eos_id=EOS, num_beams=64, max_new_tokens=3, length_penalty=penalty)
    assert found == expected


def test_beams_beat_greed():
    model = build("gpt2", seed=5)

    def log_prob(prompt, tokens):
        ids = torch.tensor([[*prompt, *tokens, EOS]])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        count = len(tokens) + (len(tokens) < 6)
        return sum(log_probs[len(prompt) + t - 1, ids[0, len(prompt) + t]].item() for t in range(count))

    how = {"eos_id": EOS, "max_new_tokens": 6, "length_penalty": 0.0}
    greedy = generate_ids(model, PROMPTS, num_beams=1, **how)
    wide = generate_ids(model, PROMPTS, num_beams=8, **how)
    gains = [log_prob(p, w) - log_prob(p, g) for p, g, w in zip(PROMPTS, greedy, wide, strict=True)]
    assert sum(gains) > 0


def test_limits_hold():
    model = build("gpt2", seed=2)
    for how in ({}, {"num_beams": 1}, {"do_sample": True, "num_beams": 1}):
        for tokens in generate_ids(
            model, PROMPTS, eos_id=EOS, max_new_tokens=7, min_new_tokens=7, bad_words=[[3], [4, 5]], **how
        ):
            assert len(tokens) == 7 and EOS not in tokens and 3 not in tokens
            assert (4, 5) not in itertools.pairwise(tokens)


def test_sampling():
    model = build("gpt2", seed=3)

    def draw(seed, **how):
        generator = torch.Generator().manual_seed(seed)
        how = {"max_new_tokens": 12, **how}
        return generate_ids(model, PROMPTS, eos_id=EOS, num_beams=1, do_sample=True, generator=generator, **how)

    state = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    greedy = generate_ids(model, PROMPTS, eos_id=EOS, num_beams=1, max_new_tokens=12)
    assert draw(1, top_k=1) == greedy == draw(1, temperature=1e-4) == draw(1, top_p=1e-6)
    # shares of the first token are the model's probabilities
    many = generate_ids(
        model,
        [PROMPTS[0]] * 2000,
        eos_id=EOS,
        num_beams=1,
        do_sample=True,
        max_new_tokens=1,
        batch_size=2000,
        generator=torch.Generator().manual_seed(0),
    )
    shares = torch.bincount(torch.tensor([t[0] if t else EOS for t in many]), minlength=VOCAB) / 2000
    probabilities = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert (shares - probabilities).abs().max() < 0.06  # five standard errors of a share of one half


def test_the_model_is_left_as_it_was():
    model = build("gpt2").train()
    model.transformer.drop.eval()
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0  # not what is asked for
    how = {"eos_id": EOS, "num_beams": 3, "max_new_tokens": 6}
    first = generate_ids(model, PROMPTS, **how)
    assert (
        first == generate_ids(model, PROMPTS, **how) == [beam_search_reference(model.eval(), p, **how) for p in PROMPTS]
    )
    model.train()
    model.transformer.drop.eval()
    generate_ids(model, PROMPTS[:1], **how)
    assert model.training and not model.transformer.drop.training and model.transformer.h[0].training
    assert all(p.grad is None for p in model.parameters())


def test_nan_is_refused():
    model = build("gpt2")
    model.transformer.ln_f.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="logits after 9 tokens, padding included, are NaN; did training diverge"):
        generate_ids(model, PROMPTS, eos_id=EOS)
    # this attention casts float64 to float32, where the mask becomes -inf and a row of padding NaN
    with pytest.raises(ValueError, match='A float64 model needs attn_implementation="sdpa"'):
        generate_ids(build("llama", attention="eager"), PROMPTS, eos_id=EOS)


def test_no_prompts_no_texts():
    assert generate_ids(build("gpt2"), [], eos_id=EOS) == []


@pytest.mark.parametrize(
    ("prompts", "how", "message"),
    [
        ([[1], []], {}, "prompt 1 has no token; give at least one"),
        ([[1]], {"num_beams": 0}, "num_beams=0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1]], {"min_new_tokens": 11, "max_new_tokens": 10}, "min_new_tokens=11"),
        ([[1]], {"temperature": 0.5}, "have an effect with do_sample=True only"),
        ([[1]], {"top_k": 3}, "have an effect with do_sample=True only"),
        ([[1]], {"do_sample": True, "temperature": 0.0}, "temperature > 0"),
        ([[1]], {"do_sample": True, "top_p": 1.5}, "0 < top_p <= 1"),
        ([[1]], {"do_sample": True, "top_k": 0}, "top_k >= 1"),
    ],
    ids=["empty", "beams", "length", "batch", "minimum", "cold-greed", "top-k-greed", "cold", "top-p", "top-k"],
)
def test_what_is_refused(prompts, how, message):
    with pytest.raises(ValueError, match=message):
        generate_ids(build("gpt2"), prompts, eos_id=EOS, **how)


def test_from_sources_to_sentences():
    pairs = micro_pairs(30, domain="hotel")
    tokenizer = train_tokenizer([pair.text + "\n" for pair in pairs], vocab_size=400)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=160, bos_token_id=0, eos_token_id=2
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    breaks = line_breaks(tokenizer)
    assert [tokenizer.pad_token_id] in breaks and len(breaks) >= 2
    assert all("\n" in tokenizer.decode(word) for word in breaks if word != [tokenizer.pad_token_id])
    sources = [source_line(pair.slots) for pair in pairs[:12:4]]
    how = {"num_beams": 2, "max_new_tokens": 5}
    texts = generate_texts(model, tokenizer, sources, **how)
    prompts = [encode_prompt(tokenizer, source) for source in sources]
    ids = generate_ids(model, prompts, eos_id=tokenizer.eos_token_id, bad_words=breaks, **how)
    assert texts == [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in ids]
    assert not any("\n" in text for text in texts)


@pytest.mark.gpu
def test_on_a_gpu():
    model = build("gpt2").cuda()
    how = {"eos_id": EOS, "num_beams": 4, "max_new_tokens": 9}
    assert generate_ids(model, PROMPTS, **how) == [beam_search_reference(model, prompt, **how) for prompt in PROMPTS]
    state = torch.cuda.get_rng_state()
    draws = [
        generate_ids(
            model,
            PROMPTS,
            eos_id=EOS,
            num_beams=1,
            do_sample=True,
            max_new_tokens=9,
            generator=torch.Generator().manual_seed(s),
        )
        for s in (1, 1)
    ]
    assert draws[0] == draws[1] and torch.equal(torch.cuda.get_rng_state(), state)
