"""The log survives a kill and a resume; progress goes to stdout and nowhere else."""

import math
import os
import subprocess
import sys

import pytest

from oral4.errors import DataError
from oral4.train.log import Log, Progress, columns, read_log


def test_rows_become_columns():
    assert columns([]) == {}
    assert columns([{"a": 1}, {"b": 2}]) == {"a": [1, None], "b": [None, 2]}


def test_written_rows_are_read_back(tmp_path):
    path = tmp_path / "run" / "log.jsonl"
    log = Log(path)
    log.append({"step": 1, "loss": 0.1})
    log.append({"step": 2, "loss": math.nan, "val_rmse": math.inf})
    log.append({"step": 2, "val_mae": 3})  # one more measurement of the same step
    assert read_log(path) == {"step": [1, 2], "loss": [0.1, None], "val_rmse": [None, None], "val_mae": [None, 3]}
    assert columns(log.rows)["step"] == [1, 2] and len(path.read_text().splitlines()) == 3


def test_resume_drops_later_rows_and_a_broken_last_line(tmp_path):
    path = tmp_path / "log.jsonl"
    first = Log(path)
    for step in (10, 20, 30):
        first.append({"step": step, "loss": 1 / step})
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while it wrote
    assert read_log(path)["step"] == [10, 20, 30]
    second = Log(path, last_step=20)
    second.append({"step": 30, "loss": 0.5})
    assert read_log(path) == {"step": [10, 20, 30], "loss": [0.1, 0.05, 0.5]} == columns(second.rows)
    Log(path)
    assert read_log(path) == {} and [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_log_in_memory_only():
    log = Log()
    log.append({"step": 1})
    assert log.rows == [{"step": 1}] and log.path is None


def test_unreadable_logs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"log\.jsonl does not exist"):
        read_log(tmp_path / "log.jsonl")
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is not JSON: 'not json'"):
        read_log(path)


def test_progress_prints_a_line_for_each_tenth_and_each_evaluation(capsys):
    progress = Progress(100)
    for step in range(1, 101):
        progress.advance()
        row = {"step": step, "loss": 1.0, "grad_norm": 5.0, "lr": 0.001} | ({"val_rmse": 0.5} if step == 55 else {})
        progress.show(row, last=step == 100)
    progress.close()
    output = capsys.readouterr()
    shown = [int(line.split()[1].split("/")[0]) for line in output.out.splitlines()]
    assert shown == [10, 20, 30, 40, 50, 55, 65, 75, 85, 95, 100] and output.err == ""
    assert output.out.splitlines()[5] == "step 55/100  loss 1  lr 0.001  val_rmse 0.5"


def test_progress_of_unknown_length_and_none_at_all(capsys):
    progress = Progress(None)
    progress.show({"step": 1, "loss": 1.0})
    progress.shown_time -= 11  # seconds
    progress.show({"step": 2, "loss": 1.0})
    Progress(10, enabled=False).show({"step": 10, "loss": 1.0}, last=True)
    assert capsys.readouterr().out == "step 2  loss 1\n"


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = Progress(4, step=2)
    progress.advance()
    progress.show({"step": 3, "loss": 0.25})
    progress.advance()
    progress.close()
    output = capsys.readouterr()
    assert "4/4" in output.out and "loss 0.25" in output.out and output.err == ""


PROGRAM = """
import torch
from torch import nn
from oral4.train import TrainConfig, fit
model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.1), nn.Linear(4, 1))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
step = lambda model, x: model(x).square().mean()
config = TrainConfig(steps=20, precision="bf16", ema_decay=0.9, evaluate_every=10, monitor="loss", checkpoint_every=7)
for resume in (False, True):
    fit(step, model, optimizer, [torch.ones(3, 2)], config, scheduler=scheduler, directory="run", resume=resume,
        evaluate=lambda model: {"loss": 1.0})
"""


def test_a_whole_run_writes_nothing_to_stderr(tmp_path):
    # a notebook shows stderr as an error, and the book refuses such pages
    done = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", PROGRAM], cwd=tmp_path, text=True,
                          capture_output=True, env=dict(os.environ, ORAL4_DEVICE="cpu"))  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("step 20/20  loss ")


def test_importing_the_library_loads_neither_torch_nor_accelerate():
    code = "import sys, oral4; print({'torch', 'accelerate'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], text=True, capture_output=True).stdout == "set()\n"
