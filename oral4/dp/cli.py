"""The commands of this chapter: ``oral4 privacy`` counts, audits and times, ``oral4 finetune-private`` trains."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["audit", "bench", "epsilon", "finetune_private", "privacy_app", "sigma"]

privacy_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Count, choose, audit and time differential privacy.",
)

Examples = Annotated[int | None, typer.Option("--examples", "-n", help="Records in the data set, N.")]
Batch = Annotated[float | None, typer.Option(help="Expected batch size, B.")]
Epochs = Annotated[float | None, typer.Option(help="Expected passes over the data.")]
Steps = Annotated[int | None, typer.Option(help="Updates, in place of --epochs.")]
Rate = Annotated[float | None, typer.Option(help="Sampling rate q, in place of --examples and --batch.")]
Delta = Annotated[float | None, typer.Option(help="Delta of the guarantee.", show_default="1 / (2 N)")]


# -------------------------------------------------------------------------------------------------------- privacy


def _plan(
    examples: int | None,
    batch: float | None,
    epochs: float | None,
    rate: float | None,
    steps: int | None,
    delta: float | None,
) -> tuple[float, int, float]:
    """Return sampling rate, steps and delta from either way to give them."""
    from oral4.dp.accountant import check_delta, default_delta, num_steps

    if (rate is None) == (examples is None or batch is None):
        raise ValueError("give --examples and --batch, or --rate in place of both")
    if (epochs is None) == (steps is None):
        raise ValueError("give --epochs or --steps, one of them")
    if rate is not None:
        if steps is None or delta is None:
            raise ValueError("--rate does not say how many records there are; it needs --steps and --delta")
        return rate, steps, check_delta(delta)
    assert examples is not None and batch is not None
    if steps is None:
        assert epochs is not None
        steps = num_steps(examples, batch, epochs)
    num_steps(examples, batch, 1)  # the check of both
    return batch / examples, steps, default_delta(examples) if delta is None else check_delta(delta, examples)


def _print_plan(q: float, steps: int, delta: float) -> None:
    print(f"{'rate':10}q = {q:.6g}, every record by its own coin (Poisson sampling)")
    print(f"{'steps':10}{steps:,}")
    print(f"{'delta':10}{delta:.3g}, neighbours: add or remove one record")


def epsilon(
    sigma: Annotated[float, typer.Option(help="Noise multiplier: deviation of the noise over the clipping norm.")],
    examples: Examples = None,
    batch: Batch = None,
    epochs: Epochs = None,
    steps: Steps = None,
    rate: Rate = None,
    delta: Delta = None,
) -> None:
    """Print what a run spends, by three accountants, and which of them to believe."""
    from oral4.dp import accountant

    q, steps, delta = _plan(examples, batch, epochs, rate, steps, delta)
    found = {method: accountant.epsilon(q, sigma, steps, delta, method=method) for method in ("pld", "rdp", "gdp")}
    _print_plan(q, steps, delta)
    print(f"{'sigma':10}{sigma:g}" + (": without noise nothing is private" if sigma == 0 else ""))
    print(f"{'epsilon':10}{_up(found['pld'])}  by privacy loss distributions: the guarantee")
    print(f"{'':10}{_up(found['rdp'])}  by Renyi divergences: a guarantee too, looser")
    print(f"{'':10}{_up(found['gdp'])}  in the Gaussian limit: NO guarantee, to compare with publications")


def _up(value: float) -> str:
    """Return a bound with three digits, rounded upwards."""
    return f"{math.ceil(value * 1000) / 1000:.3f}" if value < math.inf else "infinity"


def sigma(
    target: Annotated[float, typer.Option("--epsilon", help="Budget.")],
    examples: Examples = None,
    batch: Batch = None,
    epochs: Epochs = None,
    steps: Steps = None,
    rate: Rate = None,
    delta: Delta = None,
    method: Annotated[str, typer.Option(help="pld, or the looser rdp.")] = "pld",
) -> None:
    """Print the smallest noise multiplier for a budget."""
    from oral4.dp import accountant

    q, steps, delta = _plan(examples, batch, epochs, rate, steps, delta)
    found = accountant.calibrate_sigma(target, delta, q, steps, method=method)
    spent = accountant.epsilon(q, found, steps, delta, method=method)
    _print_plan(q, steps, delta)
    print(f"{'sigma':10}{math.ceil(found * 10_000) / 10_000:.4f}")
    print(f"{'epsilon':10}{_up(spent)} of {target:g}, by {method}")


def audit(
    correct: Annotated[int | None, typer.Option(help="Coins that were guessed right in an audit of yours.")] = None,
    guesses: Annotated[int | None, typer.Option(help="Coins that were guessed.")] = None,
    canaries: Annotated[int | None, typer.Option(help="Coins that were tossed; needed with --delta.")] = None,
    delta: Annotated[float, typer.Option(help="Delta of the claim.")] = 0.0,
    confidence: Annotated[float, typer.Option(help="Of the bound, in (0, 1).")] = 0.95,
    mode: Annotated[str, typer.Option(help="one_pass, two_pass or per_example.")] = "one_pass",
    clipping: Annotated[str, typer.Option(help="flat, automatic or per_layer.")] = "flat",
    runs: Annotated[int, typer.Option(help="Repetitions of a step.")] = 200,
) -> None:
    """Print the epsilon that an audit refutes; without --correct, test the private step that is installed here.

    The test takes a tiny language model with tied embeddings. It repeats one step with and without a canary, and looks at
    the noise, at what the canary moves, and at what can be told of it. The exit code is 1 if something is wrong.
    """
    if (correct is None) != (guesses is None):
        raise ValueError("give --correct and --guesses, both of them")
    if not 0 < confidence < 1:
        raise ValueError(f"--confidence {confidence}: give a number in (0, 1)")
    if correct is not None and guesses is not None:
        from oral4.dp.audit import one_run_lower_bound

        found = one_run_lower_bound(correct, guesses, delta, 1 - confidence, canaries=canaries)
        print(f"{correct} of {guesses} guesses right: at confidence {100 * confidence:g} % epsilon > {found:.3f}")
        if found == 0:
            print("that is nothing: such a score is no evidence against any claim")
        return
    sensitivity, mechanism = _test_the_step(mode, clipping, runs, 1 - confidence)
    print(sensitivity)
    print(mechanism)
    raise typer.Exit(0 if sensitivity.passed and mechanism.passed else 1)


def _test_the_step(mode: str, clipping: str, runs: int, beta: float) -> tuple[Any, Any]:
    """Return the audits of the clipped sum and of the noised step, on a tied language model."""
    import torch

    from oral4.dp.audit import engine_sum, mechanism_audit, optimizer_step, sensitivity_audit
    from oral4.dp.engine import ClipEngine
    from oral4.dp.private import DPOptimizer
    from oral4.errors import require

    transformers = require("transformers", "language")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=19, n_positions=8, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().train()
    generator = torch.Generator().manual_seed(0)
    texts = list(torch.randint(0, 19, (12, 6), generator=generator))
    texts[0] = torch.full((6,), 3)  # one token again and again: both uses of the embedding meet in one row

    def losses(examples: list[Any]) -> Any:
        ids = torch.stack(examples)
        logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").mean(1)

    engine = ClipEngine(model, 0.1, mode=mode, clipping=clipping)
    sensitivity = sensitivity_audit(
        engine_sum(engine, losses), texts, clip_norm=engine.sensitivity, background=texts[1:4]
    )
    optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), engine, 1.0, 16.0)
    direction = engine_sum(engine, losses)([texts[0]])
    mechanism = mechanism_audit(
        optimizer_step(optimizer, losses), texts[1:4], texts[:4], clip_norm=engine.sensitivity, noise_multiplier=1.0,
        expected_batch_size=16.0, direction=direction, runs=runs, beta=beta,
    )  # fmt: skip
    return sensitivity, mechanism


def bench(
    case: Annotated[str, typer.Option(help="s8, s50, distil (shapes of GPT-2), or tiny.")] = "s8",
    methods: Annotated[
        str, typer.Option(help="Methods, comma separated; opacus-ghost and opacus-vanilla need Opacus.")
    ] = "non-private,ours,ours-two-pass",
    repeats: Annotated[int, typer.Option(help="Rounds, >= 1.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each in a fresh process.")] = False,
) -> None:
    """Time one clipped gradient beside an ordinary one, on this machine, in one interleaved run."""
    from oral4 import settings
    from oral4.dp import speed

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for kind, given, known in (("case", [case], speed.CASES), ("methods", names, speed.METHODS)):
        if unknown := [name for name in given if name not in known] or (["nothing"] if not given else []):
            raise ValueError(f"--{kind}: {', '.join(unknown)} is unknown; choose among {', '.join(known)}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: give 1 or more")
    device = settings.device().type
    found = speed.times(case, names, repeats=repeats, device=device)
    first = found[names[0]]
    shape = speed.CASES[case]
    print(f"{case}: {shape.layers} layers of width {shape.width}, {shape.vocabulary:,} words, batch {shape.batch} x "
          f"{shape.length}; {device}, median of {repeats}")  # fmt: skip
    for name in names:
        line = f"{name:15}{1000 * found[name].median:10.1f} ms   {found[name].median / first.median:6.2f} x {names[0]}"
        if memory:
            line += f"   {speed.memory_growth(case, name) / 2**20:8.0f} MiB"
        print(line)


for _function in (epsilon, sigma, audit, bench):
    privacy_app.command()(_function)


# ----------------------------------------------------------------------------------------------- finetune-private


@dataclass(frozen=True)
class _Defaults:
    """What a task is trained with if nothing is said: the paper's values where it has the task."""

    batch: float
    epochs: float
    rate: float
    max_len: int


TASKS = {
    "e2e": _Defaults(batch=1024, epochs=10, rate=2e-3, max_len=100),
    "sst2": _Defaults(batch=1000, epochs=3, rate=5e-4, max_len=256),
    "csv": _Defaults(batch=1000, epochs=10, rate=5e-4, max_len=256),
}
JUDGED = 1000  # records of E2E's test set that a run is judged by
TRAINED = ("full", "bias", "head", "top-k", "lora")


@dataclass
class _Job:
    """A task that has been read: what to train on, how a loss is computed, and how the outcome is judged."""

    model: Any
    tokenizer: Any
    examples: list[Any]
    collate: Callable[[list[Any]], Any]
    losses: Callable[[Any, Mapping[str, Any]], Any]
    judge: Callable[[], str | None]
    samples: Callable[[int], list[str]]
    notes: list[str]


def finetune_private(
    task: Annotated[str, typer.Option(help=f"{', '.join(TASKS)}.")],
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hugging Face hub.")],
    data: Annotated[
        Path | None, typer.Option(help="With --task csv: the private table, source and target or text and label.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="A public table of the same form, to judge by.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model and privacy.json.")] = Path("private-model"),
    target: Annotated[float, typer.Option("--epsilon", help="Budget of the whole run.")] = 3.0,
    delta: Delta = None,
    batch: Annotated[
        float | None,
        typer.Option(help="Expected batch size.", show_default="of the task; at most a twentieth of the data"),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Expected passes.", show_default="of the task")] = None,
    rate: Annotated[float | None, typer.Option("--lr", help="Learning rate.", show_default="of the task")] = None,
    clip: Annotated[float, typer.Option(help="Clipping norm.")] = 0.1,
    physical: Annotated[int, typer.Option(help="Most records in memory at a time.")] = 16,
    train: Annotated[str, typer.Option(help=f"What is trained: {', '.join(TRAINED)}.")] = "full",
    blocks: Annotated[int, typer.Option(help="With --train top-k: how many of the last blocks.")] = 2,
    rank: Annotated[int, typer.Option(help="With --train lora: rank of the updates.")] = 4,
    head: Annotated[bool, typer.Option("--head", help="Classify by a fresh head, not by filling a hole.")] = False,
    template: Annotated[str, typer.Option(help="Prompt of a classification.")] = "<cls>{0} It was<mask>.<sep>",
    words: Annotated[
        str | None, typer.Option(help="Label words, comma separated, in the order of the sorted labels.")
    ] = None,
    max_len: Annotated[int | None, typer.Option(help="Most tokens.", show_default="of the task")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only so many records, the first ones.")] = None,
    samples: Annotated[int, typer.Option(help="Texts to write at the end.")] = 3,
    seed: Annotated[
        int | None, typer.Option(help="Fix coins and noise: who knows it can undo the noise.", show_default="secret")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Updates between checkpoints; 0: none.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Fine-tune a language model under differential privacy, and say what was promised.

    What is printed before the end says of the private records how many there are, how many are too long and how many share
    a source, and nothing else: no loss, no norm, no text.
    """
    if task not in TASKS:
        raise ValueError(f"--task {task}: choose one of {', '.join(TASKS)}")
    if train not in TRAINED:
        raise ValueError(f"--train {train}: choose one of {', '.join(TRAINED)}")
    if (task == "csv") != (data is not None):
        raise ValueError("--data FILE is for --task csv, and --task csv needs it")
    if (limit is not None and limit < 1) or samples < 0 or save_every < 0:
        raise ValueError(
            f"{limit=}, {samples=}, {save_every=}: give positive numbers, or 0 for no samples or checkpoints"
        )
    import torch

    from oral4 import settings
    from oral4.dp.private import make_private

    defaults = TASKS[task]
    is_first = _join_processes()
    say = print if is_first else lambda *_: None
    job = _read(task, model, data, eval_data, head, template, words, max_len or defaults.max_len, limit)
    selection = _select(job.model, train, blocks, rank)
    device = settings.device()
    job.model = job.model.to(device).train()
    size = len(job.examples)
    expected = min(defaults.batch, max(1.0, size / 20)) if batch is None else batch
    for note in job.notes:
        say(f"note: {note}")
    trained = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    sizes = [sum(p.numel() for p in found) for found in (trained, job.model.parameters())]
    say(f"trained: {train}, {sizes[0]:,} of {sizes[1]:,} numbers")
    optimizer = torch.optim.AdamW(trained, lr=defaults.rate if rate is None else rate, weight_decay=0.0)
    private = make_private(
        job.model,
        optimizer,
        job.examples,
        batch_size=expected,
        epochs=defaults.epochs if epochs is None else epochs,
        epsilon=target,
        delta=delta,
        clip_norm=clip,
        max_physical=physical,
        collate_fn=job.collate,
        lengths=[len(example.input_ids) for example in job.examples],
        seed=seed,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        private.optimizer, lambda step: 1.0 if task == "e2e" else max(0.0, 1 - step / private.loader.steps)
    )
    checkpoint = out / "checkpoint.pt"
    if resume:
        _load_checkpoint(checkpoint, job.model, private, schedule)
    elif checkpoint.exists():
        raise ValueError(f"{checkpoint} exists: pass --resume to go on from it, or choose another --out")
    say(private.summary())
    if (before := job.judge()) is not None:
        say(f"before: {before}")
    out.mkdir(parents=True, exist_ok=True)
    start, every = time.monotonic(), max(1, private.loader.steps // 10)
    for rows in private.loader:
        if not private.step(job.losses(job.model, rows)):
            continue
        schedule.step()
        if (done := private.optimizer.steps) == 1 and (still := selection.unmoved()):
            raise RuntimeError(f"the first step has not moved {', '.join(still)}, which should be trained")
        if done % every == 0:
            spent = private.spent().epsilon
            say(f"step {done:,} of {private.loader.steps:,}: epsilon {_up(spent)}, {time.monotonic() - start:.0f} s")
        if save_every and done % save_every == 0 and is_first:
            _save_checkpoint(checkpoint, job.model, private, schedule)
    private.engine.detach()
    say(str(private.spent()))
    if (after := job.judge()) is not None:
        say(f"after: {after}")
    for text in job.samples(samples):
        say(f"writes: {text}")
    if train == "lora":
        selection.model.merge_and_unload()  # what is written is a plain model
    if is_first:
        _write(out, job, private, {"task": task, "model": model, "train": train, "clip_norm": clip})
        checkpoint.unlink(missing_ok=True)
    say(f"kept in {out}: the model, its tokenizer and privacy.json")


def _join_processes() -> bool:
    """Join the processes that torchrun started, and return whether this is the first of them."""
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank() == 0


def _load(kind: str, name: str) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder or a name on the hub."""
    from oral4.errors import DataError, require

    transformers = require("transformers", "language")
    try:
        return getattr(transformers, kind).from_pretrained(name), transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"--model {name}: no model and tokenizer for {kind} there: {str(error).splitlines()[0]}"
        ) from error


def _positions(network: Any) -> int:
    """Return how many positions a model knows; those of RoBERTa are counted from 2."""
    most = int(getattr(network.config, "max_position_embeddings", 2**20))
    return most - 2 if "roberta" in network.config.model_type else most


def _read(
    task: str,
    model: str,
    data: Path | None,
    eval_data: Path | None,
    head: bool,
    template: str,
    words: str | None,
    max_len: int,
    limit: int | None,
) -> _Job:
    from oral4.dp import corpus

    if task == "e2e":
        found, judged = corpus.e2e("dev")[:limit], corpus.e2e("test")[:JUDGED]
        return _pairs_job(model, found, judged, max_len, corpus.E2E_LINE_NAMES)
    if task == "sst2":
        rows, judged_rows = corpus.sst2("train")[:limit], corpus.sst2("dev")
        chosen = corpus.POLARITY_LABELS if words is None else _split(words)
        return _labels_job(model, rows, judged_rows, chosen, head, template, max_len)
    assert data is not None
    if _is_labelled(data):
        table, names = corpus.read_labelled(data)
        judged_table: list[Any] = []
        if eval_data is not None:
            judged_table, other = corpus.read_labelled(eval_data)
            if other != names:
                raise ValueError(f"--eval has the labels {', '.join(other)}, --data has {', '.join(names)}")
        return _labels_job(
            model, table[:limit], judged_table, names if words is None else _split(words), head, template, max_len
        )
    pairs = corpus.read_pairs(data)[:limit]
    return _pairs_job(model, pairs, [] if eval_data is None else corpus.read_pairs(eval_data), max_len, {})


def _split(words: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in words.split(",") if word.strip())


def _is_labelled(path: Path) -> bool:
    """Return whether a table has texts with labels, rather than sources with targets."""
    from oral4.errors import DataError

    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            header = next(csv.reader(file), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if {"text", "label"} <= set(header):
        return True
    if {"source", "target"} <= set(header) or {"mr", "ref"} <= set(header):
        return False
    raise DataError(f"{path} has the columns {', '.join(header) or 'none'}; give source and target, or text and label")


def _pairs_job(model: str, pairs: list[Any], judged: list[Any], max_len: int, names: Mapping[str, str]) -> _Job:
    from oral4.dp import corpus, tasks
    from oral4.dp.generate import generate_texts

    network, tokenizer = _load("AutoModelForCausalLM", model)
    max_len = min(max_len, _positions(network))

    def encode(found: Sequence[Any]) -> tuple[list[Any], Any]:
        encoded = [tasks.encode_pair(tokenizer, tasks.source_line(pair.slots, names), pair.text) for pair in found]
        return tasks.keep_short(encoded, max_len)

    examples, report = encode(pairs)
    collate = tasks.TableToTextCollator(
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    group = corpus.largest_group(pairs)
    notes = [str(report)]
    if group > 1:
        notes.append(
            f"one record is protected; {group} records share one source, and a source is not protected as such"
        )
    judged_examples = encode(judged)[0] if judged else []
    sources = list(dict.fromkeys(tasks.source_line(pair.slots, names) for pair in judged))

    def judge() -> str | None:
        if not judged_examples:
            return None
        return f"{tasks.mean_nll(network, judged_examples, collate):.4f} nats a token, {len(judged_examples):,} public examples"

    def write(count: int) -> list[str]:
        chosen = sources[:count]
        longest = max((len(tasks.encode_prompt(tokenizer, source)) for source in chosen), default=0)
        texts = generate_texts(network, tokenizer, chosen, max_new_tokens=max(1, max_len - longest)) if chosen else []
        return [f"{source} -> {text}" for source, text in zip(chosen, texts, strict=True)]

    return _Job(network, tokenizer, examples, collate, tasks.target_losses, judge, write, notes)


def _labels_job(
    model: str, rows: list[Any], judged: list[Any], words: Sequence[str], head: bool, template: str, max_len: int
) -> _Job:
    from oral4.dp import tasks

    labels = 1 + max(row.label for row in rows)
    if len(words) < labels:
        raise ValueError(
            f"{len(words)} label words ({', '.join(words)}) for {labels} classes; give --words, one for each"
        )
    if head:
        body, tokenizer = _load("AutoModel", model)
        network: Any = tasks.HeadClassifier(body, len(words))
    else:
        mlm, tokenizer = _load("AutoModelForMaskedLM", model)
        network = tasks.InfillingClassifier(mlm, tasks.label_token_ids(tokenizer, words))
    max_len = min(max_len, _positions(body if head else mlm))

    def encode(found: Sequence[Any]) -> list[Any]:
        return [
            tasks.encode_template(template, [row.text], tokenizer, max_len=max_len, label=row.label) for row in found
        ]

    examples, judged_examples = encode(rows), encode(judged)
    collate = tasks.PromptCollator(tokenizer.pad_token_id)
    common = max(sum(row.label == label for row in judged) for label in range(labels)) / max(1, len(judged))

    def judge() -> str | None:
        if not judged_examples:
            return None
        right = tasks.accuracy(network, judged_examples, collate)
        return f"{right:.1%} of {len(judged_examples):,} public examples right (the commonest class is {common:.1%})"

    return _Job(network, tokenizer, examples, collate, tasks.classification_losses, judge, lambda count: [], [])


def _select(model: Any, train: str, blocks: int, rank: int) -> Any:
    """Leave trainable what was asked for, inside of a classifier; its fresh head is trained with everything."""
    from oral4.dp.tuning import select_parameters

    if train == "head" and hasattr(model, "body"):
        return select_parameters(model, "head", head=("dense", "out"))
    inner = next((getattr(model, name) for name in ("mlm", "body") if hasattr(model, name)), model)
    return select_parameters(inner, train, blocks=blocks, rank=rank)


def _save_checkpoint(path: Path, model: Any, private: Any, schedule: Any) -> None:
    import torch

    state = {"model": model.state_dict(), "private": private.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def _load_checkpoint(path: Path, model: Any, private: Any, schedule: Any) -> None:
    import torch

    from oral4.errors import CheckpointError

    if not path.exists():
        raise CheckpointError(f"{path}: there is no checkpoint to go on from; leave --resume out to begin")
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    private.load_state_dict(state["private"])
    schedule.load_state_dict(state["schedule"])


def _write(out: Path, job: _Job, private: Any, about: Mapping[str, Any]) -> None:
    """Keep the model and everything that the promise depends on."""
    import torch

    network = getattr(job.model, "mlm", None) or job.model
    if hasattr(network, "save_pretrained"):
        network.save_pretrained(out)
    else:
        torch.save(network.state_dict(), out / "classifier.pt")
        job.model.body.config.save_pretrained(out)
    job.tokenizer.save_pretrained(out)
    spent = private.spent()
    facts = {
        **about,
        **asdict(spent),
        "num_examples": len(job.examples),
        "expected_batch_size": private.optimizer.expected_batch_size,
        "noise_multiplier": private.optimizer.noise_multiplier,
        "steps": private.optimizer.steps,
        "guarantee": str(spent),
    }
    (out / "privacy.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
