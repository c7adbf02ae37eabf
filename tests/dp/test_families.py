"""Whole models, tiny and random, tied where they tie: clipped sums against one backward pass an example, in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from oral4.dp.engine import ClipEngine

transformers = pytest.importorskip("transformers")

V, D, T, B = 29, 12, 7, 4
CLIP = 0.7


def ids(batch=B, length=T, seed=0):
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def causal_loss(model, batch):
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(out[:, :-1].mT, labels, ignore_index=-100, reduction="none")
    return loss.sum(1) / (labels != -100).sum(1)


def masked_loss(model, batch):
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(out.mT, batch["labels"], ignore_index=-100, reduction="none")
    return loss.sum(1) / (batch["labels"] != -100).sum(1)


def class_loss(model, batch):
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(out, batch["label"], reduction="none")


def image_loss(model, batch):
    return nn.functional.cross_entropy(model(pixel_values=batch["pixels"]).logits, batch["label"], reduction="none")


def seq2seq_loss(model, batch):
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        decoder_input_ids=batch["target"][:, :-1],
        use_cache=False,
    ).logits
    loss = nn.functional.cross_entropy(out.mT, batch["target"][:, 1:], reduction="none")
    return loss.mean(1)


def batch_of(pad=0, left=False):
    batch = {"input_ids": ids(), "attention_mask": torch.ones(B, T, dtype=torch.long)}
    for row, length in enumerate([T, T - 2, T - 3, T - 1]):
        batch["attention_mask"][row, length:] = 0
        batch["input_ids"][row, length:] = pad
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][batch["attention_mask"] == 0] = -100
    batch["labels"][:, :2] = -100
    batch["label"] = torch.tensor([0, 2, 1, 1])
    batch["target"] = ids(length=5, seed=1)
    batch["pixels"] = torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return batch


def gpt2(tie=True):
    c = transformers.GPT2Config(vocab_size=V, n_positions=16, n_embd=D, n_layer=2, n_head=2, resid_pdrop=0,
                                embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=tie)  # fmt: skip
    return transformers.GPT2LMHeadModel(c)


def opt():
    c = transformers.OPTConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2, ffn_dim=20, num_attention_heads=2,
                               max_position_embeddings=16, dropout=0.0, word_embed_proj_dim=8,
                               pad_token_id=1)  # fmt: skip
    return transformers.OPTForCausalLM(c)


def llama_like(config, model, **more):
    c = getattr(transformers, config)(vocab_size=V, hidden_size=D, intermediate_size=20, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
                                      pad_token_id=0, **more)  # fmt: skip
    return getattr(transformers, model)(c)


def bert_like(config, model, **more):
    c = getattr(transformers, config)(vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=20, max_position_embeddings=24, hidden_dropout_prob=0.0,
                                      attention_probs_dropout_prob=0.0, num_labels=3, **more)  # fmt: skip
    return getattr(transformers, model)(c)


def distilbert():
    c = transformers.DistilBertConfig(vocab_size=V, dim=D, n_layers=2, n_heads=2, hidden_dim=20,
                                      max_position_embeddings=24, dropout=0.0, attention_dropout=0.0)  # fmt: skip
    return transformers.DistilBertForMaskedLM(c)


def deberta_v2():
    return bert_like("DebertaV2Config", "DebertaV2ForMaskedLM", relative_attention=True, position_buckets=4,
                     pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm", share_att_key=True,
                     position_biased_input=False, conv_kernel_size=3)  # fmt: skip


def deberta_v2_apart():
    return bert_like("DebertaV2Config", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"],
                     max_relative_positions=5)  # fmt: skip


def deberta():
    return bert_like("DebertaConfig", "DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p", "p2c"])


def t5(**more):
    c = transformers.T5Config(vocab_size=V, d_model=D, d_kv=6, d_ff=20, num_layers=2, num_heads=2, dropout_rate=0.0,
                              relative_attention_num_buckets=6, relative_attention_max_distance=8, **more)  # fmt: skip
    return transformers.T5ForConditionalGeneration(c)


def bart():
    c = transformers.BartConfig(vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
                                decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, dropout=0.0,
                                max_position_embeddings=16, scale_embedding=True, pad_token_id=1)  # fmt: skip
    return transformers.BartForConditionalGeneration(c)


def vit():
    c = transformers.ViTConfig(hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
                               image_size=8, patch_size=4, num_labels=3, hidden_dropout_prob=0.0)  # fmt: skip
    return transformers.ViTForImageClassification(c)


FAMILIES = {
    "gpt2": (gpt2, causal_loss),
    "gpt2-untied": (lambda: gpt2(False), causal_loss),
    "opt": (opt, causal_loss),
    "llama": (lambda: llama_like("LlamaConfig", "LlamaForCausalLM"), causal_loss),
    "llama-tied": (lambda: llama_like("LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True), causal_loss),
    "mistral": (lambda: llama_like("MistralConfig", "MistralForCausalLM"), causal_loss),
    "qwen2": (lambda: llama_like("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True), causal_loss),
    "bert": (lambda: bert_like("BertConfig", "BertForMaskedLM"), masked_loss),
    "bert-classifier": (lambda: bert_like("BertConfig", "BertForSequenceClassification"), class_loss),
    "roberta": (lambda: bert_like("RobertaConfig", "RobertaForMaskedLM"), masked_loss),
    "roberta-classifier": (lambda: bert_like("RobertaConfig", "RobertaForSequenceClassification"), class_loss),
    "distilroberta": (lambda: bert_like("RobertaConfig", "RobertaForMaskedLM", type_vocab_size=1), masked_loss),
    "distilbert": (distilbert, masked_loss),
    "albert": (lambda: bert_like("AlbertConfig", "AlbertForMaskedLM", embedding_size=8), masked_loss),
    "deberta": (deberta, masked_loss),
    "deberta-v2": (deberta_v2, masked_loss),
    "deberta-v2-apart": (deberta_v2_apart, masked_loss),
    "t5": (t5, seq2seq_loss),
    "t5-gated": (lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False), seq2seq_loss),
    "bart": (bart, seq2seq_loss),
    "vit": (vit, image_loss),
}


def build(name):
    torch.manual_seed(0)
    model = FAMILIES[name][0]().double().train()
    for p in model.parameters():  # biases and norms start at 0 and 1, where mistakes may hide
        p.data.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    return model


def brute_force(model, loss, batch, clip_norm):
    """Norm of each example, and the clipped sum of each parameter: one forward and backward pass an example."""
    model = copy.deepcopy(model)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    norms, total = [], [torch.zeros_like(p) for p in parameters]
    for i in range(B):
        losses = loss(model, {key: x[i : i + 1] for key, x in batch.items()})
        grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, clip_norm / (norms[-1].item() + 1e-6))
    return torch.stack(norms), dict(zip(names, total, strict=True))


def compare(model, loss, batch, rtol, **options):
    norms, total = brute_force(model, loss, batch, CLIP)
    engine = ClipEngine(model, CLIP, **options)
    stats = engine.backward(loss(model, batch))
    torch.testing.assert_close(stats.norms, norms, rtol=rtol, atol=0)
    scale = max(g.abs().max() for g in total.values())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, total[name], rtol=rtol, atol=rtol * float(scale), msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert p.grad is None
    engine.detach()
    return stats


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    model = build(name)
    compare(model, FAMILIES[name][1], batch_of(), 1e-9)


@pytest.mark.parametrize("name", ["t5", "deberta", "deberta-v2"])
def test_methods_are_given_back(name):
    """These classes have methods wrapped while an engine is attached; copies and detached models must not."""
    model = build(name)
    classes = [type(m) for m in model.modules()]
    engine = ClipEngine(model, CLIP)
    assert [type(m) for m in model.modules()] != classes
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert [type(m) for m in other.modules()] == classes
    FAMILIES[name][1](other, batch_of()).sum().backward()
    engine.detach()
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("options", [{"rule": "gram"}, {"rule": "instantiate"}, {"mode": "two_pass"}],
                         ids=["gram", "instantiate", "two_pass"])  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "albert", "t5", "bart", "deberta-v2"])
def test_rules_and_modes(name, options):
    compare(build(name), FAMILIES[name][1], batch_of(), 1e-9, **options)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "bart", "vit"])
def test_gradient_checkpointing(name):
    model = build(name)
    norms, total = brute_force(model, FAMILIES[name][1], batch_of(), CLIP)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = ClipEngine(model, CLIP)
    stats = engine.backward(FAMILIES[name][1](model, batch_of()))
    torch.testing.assert_close(stats.norms, norms, rtol=1e-9, atol=0)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt2", "t5", "deberta-v2", "vit"])
def test_bias_only(name):
    model = build(name)
    for key, p in model.named_parameters():
        p.requires_grad_("bias" in key or "head" in key or "classifier" in key)
    compare(model, FAMILIES[name][1], batch_of(), 1e-9)


def test_dropout_differs_between_examples_and_changes_nothing_else():
    """The masks belong to the graph: the same losses, differentiated example by example, give the same sum."""
    model = bert_like("BertConfig", "BertForMaskedLM")
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.3
    model = model.double().train()
    engine = ClipEngine(model, CLIP)
    losses = masked_loss(model, batch_of())
    engine.verify(losses, examples=range(B), rtol=1e-9)
    found = engine.backward(losses, retain_graph=True)
    engine.mode = "per_example"
    torch.testing.assert_close(engine.backward(losses).norms, found.norms, rtol=1e-9, atol=0)
