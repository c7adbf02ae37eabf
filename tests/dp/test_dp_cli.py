"""The commands `oral4 privacy` and `oral4 finetune-private`."""

import csv
import json
import random
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from oral4.dp import accountant, audit, cli, corpus, tasks
from oral4.dp.cli import finetune_private, privacy_app
from oral4.errors import CheckpointError, DataError

app = typer.Typer()
app.add_typer(privacy_app, name="privacy")
app.command("finetune-private")(finetune_private)


def run(*arguments, error=None):
    """Run the command; an error on purpose is what `oral4` prints as one line."""
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
    if error is not None:
        assert isinstance(result.exception, error), result.output
        return str(result.exception)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


SST2 = ("--examples", 67_349, "--batch", 1000, "--epochs", 3)


def test_epsilon_is_that_of_the_accountant():
    text = run("privacy", "epsilon", "--sigma", 0.8227, *SST2).stdout
    q, steps, delta = 1000 / 67_349, 203, 1 / (2 * 67_349)
    for method in ("pld", "rdp", "gdp"):
        found = accountant.epsilon(q, 0.8227, steps, delta, method=method)
        printed = [float(number) for number in re.findall(r"(\d+\.\d{3})  (?:by|in)", text)]
        assert any(found <= number < found + 1e-3 + 1e-9 for number in printed), (method, text)  # rounded upwards
    assert "203" in text and "delta     7.42e-06" in text and "NO guarantee" in text
    other = run("privacy", "epsilon", "--sigma", 0.8227, "--rate", q, "--steps", 203, "--delta", delta).stdout
    assert other == text


def test_sigma_is_that_of_the_accountant():
    text = run("privacy", "sigma", "--epsilon", 3, *SST2, "--method", "rdp").stdout
    sigma = float(re.search(r"sigma +([\d.]+)", text)[1])
    best = accountant.calibrate_sigma(3.0, 1 / (2 * 67_349), 1000 / 67_349, 203, method="rdp")
    assert best <= sigma <= best + 1e-4  # rounded upwards
    assert re.search(r"epsilon +2\.99\d of 3, by rdp", text)


def test_no_noise_is_no_privacy():
    text = run("privacy", "epsilon", "--sigma", 0, *SST2).stdout
    assert text.count("infinity") == 3 and "without noise nothing is private" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("epsilon", "--sigma", 1, "--epochs", 1), "give --examples and --batch, or --rate"),
        (("epsilon", "--sigma", 1, "--examples", 10, "--epochs", 1), "give --examples and --batch, or --rate"),
        (("epsilon", "--sigma", 1, *SST2, "--rate", 0.1), "give --examples and --batch, or --rate"),
        (("epsilon", "--sigma", 1, "--rate", 0.1, "--steps", 5), "it needs --steps and --delta"),
        (("epsilon", "--sigma", 1, *SST2, "--steps", 5), "give --epochs or --steps"),
        (("epsilon", "--sigma", 1, "--examples", 10, "--batch", 20, "--steps", 2), "batch_size=20"),
        (("epsilon", "--sigma", -1, *SST2), "sigma=-1"),
        (("sigma", "--epsilon", 0, *SST2), "epsilon=0"),
        (("sigma", "--epsilon", 3, *SST2, "--method", "gdp"), "breaks the promise"),
        (("audit", "--correct", 5), "give --correct and --guesses"),
        (("audit", "--correct", 5, "--guesses", 4), "correct=5"),
        (("audit", "--confidence", 1), "--confidence 1.0"),
        (("audit", "--mode", "three_pass"), "mode='three_pass'"),
        (("bench", "--case", "s9"), "--case: s9 is unknown; choose among s8"),
        (("bench", "--methods", "ours,theirs"), "--methods: theirs is unknown"),
        (("bench", "--methods", ","), "--methods: nothing is unknown"),
        (("bench", "--repeats", 0), "--repeats 0"),
    ],
    ids=lambda value: "-".join(map(str, value[:3])) if isinstance(value, tuple) else None,
)
def test_privacy_refuses(arguments, message):
    assert message in run("privacy", *arguments, error=ValueError)


def test_audit_prints_the_bound():
    text = run("privacy", "audit", "--correct", 100, "--guesses", 100).stdout
    assert f"epsilon > {audit.one_run_lower_bound(100, 100):.3f}" in text and "confidence 95 %" in text
    assert "no evidence" in run("privacy", "audit", "--correct", 50, "--guesses", 100).stdout


def test_audit_of_the_installed_step_finds_nothing():
    result = run("privacy", "audit", "--runs", 40, "--confidence", 0.999)
    assert result.exit_code == 0, result.stdout
    assert "sensitivity kept" in result.stdout and "nothing found" in result.stdout


def test_audit_of_a_broken_step_fails(monkeypatch):
    """A step that adds half of the noise, and one that forgets what both uses of an embedding have in common."""
    from oral4.dp import private

    honest = private.add_noise
    monkeypatch.setattr(private, "add_noise", lambda total, std, *rest, **more: honest(total, std / 2, *rest, **more))
    result = run("privacy", "audit", "--runs", 40)
    assert result.exit_code == 1 and "0.5" in result.stdout and "noise of" in result.stdout
    monkeypatch.undo()
    from oral4.dp import engine

    whole = engine.norm2
    monkeypatch.setattr(engine, "norm2", lambda uses: sum(whole([use]) for use in uses))
    result = run("privacy", "audit", "--runs", 40)
    assert result.exit_code == 1 and "sensitivity BROKEN" in result.stdout


def test_bench_times_what_it_is_asked_for():
    result = run("privacy", "bench", "--case", "tiny", "--methods", "non-private,ours", "--repeats", 2)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny: 1 layers") and "median of 2" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["non-private", "ours"]
    assert float(re.search(r"([\d.]+) x non-private", lines[1])[1]) == 1.0


# ---- finetune-private ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tables of a generated world, and a tiny causal and a tiny masked language model in folders."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

    folder = tmp_path_factory.mktemp("world")
    pairs = corpus.micro_pairs(20, texts_per_meaning=2)
    reviews = corpus.micro_reviews(60)
    write(folder / "pairs.csv", ("source", "target"), [(tasks.source_line(p.slots), p.text) for p in pairs])
    write(folder / "reviews.csv", ("text", "label"), [(r.text, corpus.POLARITY_LABELS[r.label]) for r in reviews])
    texts = [p.text for p in pairs] + [tasks.source_line(p.slots) for p in pairs] + [r.text for r in reviews]
    tokenizer = tasks.train_tokenizer([*texts, "It was terrible.", "It was great."], kind="word", vocab_size=400)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    causal = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=96, bos_token_id=tokenizer.bos_token_id,
                   eos_token_id=tokenizer.eos_token_id, **sizes)
    )  # fmt: skip
    masked = RobertaForMaskedLM(
        RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                      max_position_embeddings=96, **sizes)
    )  # fmt: skip
    for name, model in (("causal", causal), ("masked", masked)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def write(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def tune(world, out, *arguments, table="pairs", model="causal", error=None):
    usual = ("--model", world / model, "--data", world / f"{table}.csv", "--out", out, "--epochs", 1, "--batch", 8)
    return run("finetune-private", "--task", "csv", *usual, *arguments, error=error)


def test_pairs_of_a_table(world, tmp_path):
    budget = ("--epsilon", 4, "--delta", 1e-3)
    text = tune(world, tmp_path / "out", "--eval", world / "pairs.csv", *budget, "--samples", 2).stdout
    assert "epsilon = 0 of 4 at delta = 0.001" in text and "the operating system" in text
    assert "40 of 40 examples" in text and "2 records share one source" in text
    before, after = (float(re.search(rf"{word}: ([\d.]+) nats", text)[1]) for word in ("before", "after"))
    assert before != after and text.count("writes: ") == 2
    facts = json.loads((tmp_path / "out/privacy.json").read_text())
    assert facts["epsilon"] <= 4 and facts["num_examples"] == 40 and facts["steps"] == 5
    assert facts["segments"] == [{"q": 0.2, "sigma": facts["noise_multiplier"], "steps": 5}]
    assert facts["epsilon"] == pytest.approx(accountant.epsilon(0.2, facts["noise_multiplier"], 5, 1e-3), rel=1e-9)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForCausalLM.from_pretrained(world / "causal")
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == model.config.vocab_size


@pytest.mark.parametrize("arguments", [(), ("--head",), ("--head", "--train", "head"), ("--train", "bias"),
                                       ("--words", "great,terrible")],
                         ids=["infilling", "head", "probe", "bias", "words"])  # fmt: skip
def test_labels_of_a_table(world, tmp_path, arguments):
    result = tune(world, tmp_path / "out", "--eval", world / "reviews.csv", "--seed", 0, *arguments, table="reviews",
                  model="masked")  # fmt: skip
    text = result.stdout
    assert "fixed seed 0: no secret" in text and "of 60 public examples right" in text
    trained, whole = (int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) numbers", text).groups())
    assert (trained < whole / 5) == ("--train" in arguments)
    kept = "classifier.pt" if "--head" in arguments else "model.safetensors"
    assert (tmp_path / "out" / kept).exists() and (tmp_path / "out/privacy.json").exists()


@pytest.mark.parametrize(("task", "model", "batch"), [("e2e", "causal", 2.0), ("sst2", "masked", 2.5)])
def test_published_tasks(world, tmp_path, monkeypatch, task, model, batch):
    """The tasks of the paper, on a generated world in their place: split, recipe and words are those of the task."""
    splits = []

    def pairs(split):
        splits.append(split)
        return [corpus.Pair(p.slots, p.text) for p in corpus.micro_pairs(20, texts_per_meaning=2)]

    def reviews(split):
        splits.append(split)
        return corpus.micro_reviews(60)

    monkeypatch.setattr(corpus, "e2e", pairs)
    monkeypatch.setattr(corpus, "sst2", reviews)
    result = run("finetune-private", "--task", task, "--model", world / model, "--out", tmp_path / "out", "--limit", 50,
                 "--samples", 0)  # fmt: skip
    assert splits == (["dev", "test"] if task == "e2e" else ["train", "dev"])
    facts = json.loads((tmp_path / "out/privacy.json").read_text())
    assert facts["expected_batch_size"] == batch  # a twentieth of 40 pairs, of 50 reviews
    assert facts["steps"] == 20 * cli.TASKS[task].epochs
    assert facts["epsilon"] <= 3 and "before: " in result.stdout and "after: " in result.stdout


@pytest.mark.parametrize(("table", "model"), [("pairs", "causal"), ("reviews", "masked")])
def test_lora_is_merged(world, tmp_path, table, model):
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    result = tune(world, tmp_path / "out", "--train", "lora", "--samples", 0, table=table, model=model)
    assert "trained: lora" in result.stdout
    kind = AutoModelForCausalLM if model == "causal" else AutoModelForMaskedLM
    before, after = (dict(kind.from_pretrained(path).named_parameters()) for path in (world / model, tmp_path / "out"))
    assert list(before) == list(after)
    moved = [name for name in before if not torch.allclose(before[name], after[name], atol=1e-7)]
    assert moved and all("attn" in name or "query" in name or "value" in name for name in moved)


def test_checkpoints(world, tmp_path, monkeypatch):
    saved = cli._save_checkpoint

    def interrupted(path, *rest):
        saved(path, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_save_checkpoint", interrupted)
    tune(world, tmp_path / "parts", "--seed", 0, "--save-every", 2, "--samples", 0)  # click makes it exit 130
    monkeypatch.undo()
    assert (tmp_path / "parts/checkpoint.pt").exists() and not (tmp_path / "parts/privacy.json").exists()
    message = tune(world, tmp_path / "parts", "--seed", 0, error=ValueError)
    assert "pass --resume" in message
    again = tune(world, tmp_path / "parts", "--seed", 0, "--resume", "--samples", 0).stdout
    assert "steps       2 of 5" in again
    assert not (tmp_path / "parts/checkpoint.pt").exists()
    assert json.loads((tmp_path / "parts/privacy.json").read_text())["steps"] == 5
    assert "no checkpoint to go on from" in tune(world, tmp_path / "none", "--resume", error=CheckpointError)


def test_what_is_printed_before_the_end_does_not_depend_on_private_records(world, tmp_path):
    """Two tables of one size whose records differ: the same lines, but for the seconds."""
    rows = list(csv.reader((world / "pairs.csv").open(encoding="utf-8")))
    others = random.Random(1).sample(rows[1:], 40)
    changed = [(source, target) for (source, _), (_, target) in zip(rows[1:], others, strict=True)]
    write(world / "changed.csv", ("source", "target"), changed)
    texts = [
        tune(world, tmp_path / table, "--seed", 0, "--samples", 0, table=table).stdout for table in ("pairs", "changed")
    ]
    plain = [re.sub(r"\d+ s$|kept in .*|note: .*", "", text, flags=re.M) for text in texts]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--task", "mnli"), ValueError, "--task mnli: choose one of e2e, sst2, csv"),
        (("--train", "top2"), ValueError, "--train top2: choose one of full, bias, head, top-k, lora"),
        (("--task", "sst2"), ValueError, "--data FILE is for --task csv"),
        (("--data", "nowhere.csv"), DataError, "nowhere.csv: there is no such file"),
        (("--model", "/no/where"), DataError, "--model /no/where: no model"),
        (("--limit", 0), ValueError, "limit=0"),
        (("--train", "top-k", "--blocks", 9), ValueError, "blocks=9"),
        (("--train", "head"), ValueError, "its head is tied to the embedding"),
        (("--epsilon", 0), ValueError, "epsilon=0.0: a budget"),
        (("--batch", 41), ValueError, "batch_size=41"),
        (("--max-len", 3), ValueError, "max_len=3"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_finetune_refuses(world, tmp_path, arguments, kind, message):
    assert message in tune(world, tmp_path / "out", *arguments, error=kind)
    assert not (tmp_path / "out").exists()


def test_tables_of_another_form_are_refused(world, tmp_path):
    write(world / "other.csv", ("question", "answer"), [("a", "b")])
    assert "give source and target, or text and label" in tune(world, tmp_path / "out", table="other", error=DataError)
    for header in (("source", "target"), ("text", "label")):
        write(world / "none.csv", header, [])
        message = tune(world, tmp_path / "out", table="none", error=DataError)
        assert "none.csv: there is no record below the header" in message
    (world / "empty.csv").write_text("")
    assert "empty.csv has the columns none" in tune(world, tmp_path / "out", table="empty", error=DataError)
    write(world / "three.csv", ("text", "label"), [("good", "a"), ("bad", "b"), ("so", "c")])
    reviews = {"table": "reviews", "model": "masked", "error": ValueError}
    message = tune(world, tmp_path / "out", "--eval", world / "three.csv", **reviews)
    assert "--eval has the labels a, b, c" in message
    message = tune(world, tmp_path / "out", "--words", "great", **reviews)
    assert "1 label words (great) for 2 classes" in message
