"""Two worlds: nothing private is public, an audit that catches what it must, and a trap that is one."""

import copy
import dataclasses

import pytest
import torch

from oral4.dp import worlds
from oral4.dp.corpus import Pair, references
from oral4.dp.tasks import TableToTextCollator, accuracy, mean_nll, target_losses

TABLE = worlds.TableConfig.smoke()


@pytest.fixture(scope="module")
def tokenizer():
    return worlds.world_tokenizer("micro", TABLE.vocabulary, "bpe")


# ---- what is public, and what is held out -----------------------------------------------------------------------


def test_nothing_private_is_public():
    public = {pair.text for pair in worlds.public_pairs("micro")}
    assert not any("restaurant" in pair.origin for pair in worlds.public_pairs("micro"))
    assert not public & {pair.text for pair in worlds.private_pairs("micro")}


def test_meanings_are_in_one_part_and_records_are_drawn_by_the_seed():
    pairs = worlds.private_pairs("micro")
    splits = [worlds.split_records(TABLE, seed, pairs, 5) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[2].private != splits[0].private
    assert splits[2].test == splits[0].test
    assert splits[2].tuning == splits[0].tuning
    parts = [set(references(part)) for part in (splits[0].private, splits[0].tuning, splits[0].test)]
    assert len(parts[1]) == len(parts[2]) == 5
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert len(splits[0].private) == TABLE.private
    with pytest.raises(ValueError, match="private=100000: give 1 to"):
        worlds.split_records(dataclasses.replace(TABLE, private=100_000), 0, pairs, 5)


def test_the_real_world_leaves_e2e_out_of_the_public_text(monkeypatch):
    asked = []
    one = [Pair((), "public", "rnnlg")]
    monkeypatch.setattr(worlds, "rnnlg", lambda domain, split: asked.append((domain, split)) or one)
    monkeypatch.setattr(worlds, "e2e", lambda split: pytest.fail("private text was read"))
    found = worlds.public_pairs.__wrapped__("real")
    assert len(found) == len(asked) == 12
    assert ("restaurant", "test") in asked


# ---- pretraining ------------------------------------------------------------------------------------------------


def test_pretraining_happens_once_and_is_copied(monkeypatch, tokenizer):
    config = dataclasses.replace(TABLE, pretrain_steps=3)
    worlds._pretrained_lm.cache_clear()
    calls = []
    real = worlds.pretrain
    monkeypatch.setattr(worlds, "pretrain", lambda *args, **options: calls.append(1) or real(*args, **options))
    first, second = (worlds.starting_model(config, "pretrained", seed) for seed in (0, 1))
    assert len(calls) == 1
    with torch.no_grad():
        first.transformer.wte.weight.zero_()
    assert second.transformer.wte.weight.abs().sum() > 0
    assert worlds.starting_model(config, "pretrained", 2).transformer.wte.weight.abs().sum() > 0
    fresh = [worlds.starting_model(config, "fresh", seed).transformer.wte.weight for seed in (0, 0, 1)]
    assert torch.equal(fresh[0], fresh[1])
    assert not torch.equal(fresh[0], fresh[2])


def test_pretraining_lowers_the_loss_on_other_public_text(tokenizer):
    pairs = worlds.public_pairs("micro")
    examples = worlds.encode_records(TABLE, tokenizer, pairs[:600])
    held = worlds.encode_records(TABLE, tokenizer, pairs[-60:])
    collate = TableToTextCollator(tokenizer.pad_token_id)
    model = worlds.build_lm(TABLE, tokenizer, 0)
    before = mean_nll(model, held, collate)
    last = worlds.pretrain(model, examples, target_losses, collate, steps=60, batch_size=16, rate=1e-2, seed=0)
    after = mean_nll(model, held, collate)
    assert before > 5.5  # a fresh model knows nothing: the logarithm of 320 is 5.77
    assert after < 4
    assert last < before


# ---- a hole or a head -------------------------------------------------------------------------------------------


def test_questions_show_the_sentence_and_hide_the_answer():
    config = worlds.InfillingConfig.smoke()
    tokenizer = worlds.world_tokenizer("micro", config.vocabulary, "word")
    pairs = [
        Pair((("name", "X"), ("family friendly", "no")), "It is cheap."),
        Pair((("name", "Y"), ("family friendly", "yes")), "It is cheap."),
        Pair((("name", "Z"),), "It is cheap."),
    ]
    found = worlds.attribute_examples("micro", tokenizer, pairs, config.max_len)
    assert [example.label for example in found] == [0, 1]
    assert found[0].input_ids == found[1].input_ids
    assert found[0].input_ids[found[0].mask_position] == tokenizer.mask_token_id


def test_both_classifiers_start_from_the_same_body():
    config = worlds.InfillingConfig.smoke()
    hole, head = (worlds._classifier(config, kind, 0) for kind in ("infill", "head"))
    for name, parameter in head.body.named_parameters():
        assert torch.equal(parameter, hole.mlm.base_model.get_parameter(name)), name
    texts = worlds._questions(config, 0, 40)
    for model in (hole, head):
        assert 0 <= accuracy(model, texts.test, texts.collate) <= 1


def test_infilling_compares_equal_numbers_of_updates():
    config = worlds.InfillingConfig.mini()
    for size in config.sizes:
        recipe = worlds._infilling_recipe(config, 3.0, size, 1e-3)
        assert recipe.epochs * size / recipe.batch_size == pytest.approx(config.updates)
        assert recipe.epochs == pytest.approx(config.epochs, rel=0.05)


def test_the_infilling_experiment_has_a_number_for_each_size():
    config = worlds.InfillingConfig.smoke()
    found = worlds.run_infilling(config, 0)
    assert set(found) == set(worlds.INFILLING_UNITS)
    for kind in ("infill", "head", "gain"):
        assert len(found[kind]) == len(config.sizes)
        assert len(found[f"{kind}_early"]) == len(config.early)
    assert found["gain"] == [a - b for a, b in zip(found["infill"], found["head"], strict=True)]
    assert 0.5 <= found["majority"] <= 1


# ---- the audit --------------------------------------------------------------------------------------------------


def test_a_training_that_memorises_is_caught_and_its_private_twin_is_not():
    config = dataclasses.replace(
        worlds.AuditConfig.smoke(), private=30, canaries=50, canary_tokens=6, guesses=(15,), audit_epochs=30.0,
        ordinary_rate=1e-2, white_box_runs=50,
    )  # fmt: skip
    found = worlds.run_audit(config, 0)
    assert set(found) == set(worlds.AUDIT_UNITS)
    assert found["ordinary_auc"] > 0.9
    assert found["ordinary_bound"] > 1  # 30 right guesses of 30 would give 2.2
    assert found["eps3_bound"] <= found["eps3_spent"] <= 3
    assert found["accused"] == 0
    assert found["ordinary_exposure"][-1] > 4  # a code that stood in the text four times, of 6.6 bits
    assert found["white_box_passed"] == 1
    assert found["broken_caught"] == 1
    assert found["broken_shift"] > 1.3 > found["white_box_shift"]


def test_secrets_are_different_and_each_has_its_copies():
    config = dataclasses.replace(worlds.AuditConfig.smoke(), secrets=3, copies=(1, 5))
    secrets, candidates = worlds.new_secrets(config, 0)
    assert [number for _, number in secrets] == [1, 1, 1, 5, 5, 5]
    assert len({place for place, _ in secrets}) == 6
    assert len(candidates) == 100
    assert worlds.new_secrets(config, 1)[0] != secrets


# ---- the trap ---------------------------------------------------------------------------------------------------


def test_public_text_that_holds_the_private_records_refutes_the_claim_of_the_whole(monkeypatch):
    public, repeated, others = worlds._trap_text(worlds.TrapConfig.smoke())
    monkeypatch.setattr(worlds, "_trap_text", lambda config: (public[:40], repeated[:60:2], others))
    config = dataclasses.replace(
        worlds.TrapConfig.smoke(), epsilon=0.5, private=60, guesses=(10,), trap_epochs=50.0, pretrain_rate=1e-2,
        rate=1e-3,
    )  # fmt: skip
    worlds._trap_reference.cache_clear()
    found = worlds.run_trap(config, 0)
    worlds._trap_reference.cache_clear()  # its text is that of this test
    assert set(found) == set(worlds.TRAP_UNITS)
    assert found["with_spent"] <= config.epsilon
    assert found["without_spent"] <= config.epsilon
    assert 0 < found["shared"] < 1
    # what the private training adds is as private as it says; what came before it is not
    assert found["with_public_auc"] > 0.9
    assert found["with_auc"] > 0.9
    assert found["with_bound"] > config.epsilon
    assert found["refuted"] == 1.0
    assert found["without_bound"] <= config.epsilon


def test_the_repeated_records_keep_their_sentence_and_change_their_form():
    pair = Pair((("name", "Alimentum"), ("area", "city centre"), ("familyFriendly", "no")), "Not for children.", "e2e")
    triples = worlds._as_triples(pair)
    assert triples.text == pair.text
    assert triples.slots == (("Alimentum", "area", "city centre"), ("Alimentum", "familyfriendly", "no"))


def test_the_trap_takes_the_records_that_dart_repeats(monkeypatch):
    public = [Pair((("a", "b", "c"),), f"public {i}", "dart/webnlg") for i in range(3)]
    leak = [Pair((("a", "b", "c"),), f"private {i}", "dart/e2e") for i in range(4)]
    own = [Pair((("name", str(i)),), f"private {i}", "e2e") for i in (0, 1, 2, 3, 4, 5, 0)]
    monkeypatch.setattr(worlds, "dart_dev", lambda exclude: public + leak)
    monkeypatch.setattr(worlds, "e2e", lambda split: own if split == "dev" else [Pair((), "test", "e2e")])
    config = worlds.TrapConfig(records=4)
    found, repeated, others = worlds._trap_text(config)
    assert found == public
    assert sorted(pair.text for pair in repeated) == [f"private {i}" for i in range(4)]
    assert [pair.text for pair in others] == ["test"]
    with pytest.raises(ValueError, match="records=5: give 1 to 4"):
        worlds._trap_text(dataclasses.replace(config, records=5))


# ---- tables -----------------------------------------------------------------------------------------------------


def test_gains_are_counted_so_that_more_is_better(monkeypatch):
    values = {"pretrained": {"nll": 2.0, "bleu": 30.0, "rouge": 50.0, "recall": 0.8},
              "fresh": {"nll": 3.0, "bleu": 10.0, "rouge": 45.0, "recall": 0.9}}  # fmt: skip

    class Model(str):
        pass

    monkeypatch.setattr(worlds, "starting_model", lambda config, start, seed: Model(start))
    monkeypatch.setattr(worlds, "_tune_lm", lambda *args: None)
    monkeypatch.setattr(worlds, "_table_scores", lambda config, model, tokenizer, test: copy.copy(values[str(model)]))
    monkeypatch.setattr(worlds, "_table_choice", lambda config, start, epsilon: worlds.Choice(1.0, (0.0, 1.0), True))
    found = worlds.run_table(TABLE, 0)
    assert set(found) == set(worlds.TABLE_UNITS)
    assert found["gain_eps3_nll"] == 1.0
    assert found["gain_eps3_bleu"] == 20.0
    assert found["gain_eps3_recall"] == pytest.approx(-0.1)
    assert found["at_edge"] == 1.0
