from __future__ import annotations

import dataclasses
import importlib
import io
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_import import seconds

import oral4.cli as cli
import oral4.measure.claims as claims_module
import oral4.measure.environment as environment
import oral4.measure.experiment as experiment_module
from oral4 import __version__
from oral4.errors import DataError
from oral4.measure import doctor
from oral4.measure.experiment import Experiment
from oral4.measure.record import read_record

fetch_module = importlib.import_module("oral4.data.fetch")  # oral4.data offers a function of the same name


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    steps: int = 2

    @classmethod
    def smoke(cls):
        return cls(1)

    @classmethod
    def mini(cls):
        return cls()


TOY = Experiment(
    name="toy/line",
    summary="A toy",
    config=ToyConfig,
    run=lambda config, seed: {"loss": config.steps + seed, "curve": [1.0, 2.0]},
    units={"loss": "nats", "curve": ""},
    tolerance={"loss": 0.01},
)


@pytest.fixture
def toy(monkeypatch):
    """Make ``toy/line`` known by name."""
    find = experiment_module.find_experiment
    monkeypatch.setattr(experiment_module, "find_experiment", lambda name: TOY if name == TOY.name else find(name))


@pytest.fixture
def oral4(capsys):
    """Run the command line in this process; return exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            cli.main(list(arguments))
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def process(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-m", "oral4.cli", *arguments],
        capture_output=True, text=True, encoding="utf-8", env={**os.environ, **environ}, check=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ help


def test_help_takes_less_than_three_tenths_of_a_second():
    assert statistics.median(seconds(["-m", "oral4.cli", "--help"]) for _ in range(7)) < 0.3


def test_help_lists_every_command_and_imports_none_of_them():
    code = "import sys\nfrom oral4.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    text, _, loaded = out.rpartition("\n[")
    for name in ("doctor", "list", "run", "fetch", "cite", "claims", "pyramid"):
        assert re.search(rf"^  {name} ", text, re.M)
    for module in ("torch", "numpy", "pooch", "oral4.measure", "oral4.data", "oral4.pyraformer"):
        assert f"'{module}'" not in loaded


@pytest.mark.parametrize("command", ["doctor", "list", "run", "fetch", "cite", "claims"])
def test_each_command_explains_itself(oral4, command):
    code, out, _ = oral4(command, "--help")
    assert code == 0 and out.startswith(f"Usage: oral4 {command}")


@pytest.mark.parametrize("section", ["experiments", "records", "claims", "data", "commands"])
def test_listing_imports_nothing_heavy(section):
    code = (
        f"import sys\nfrom oral4.cli import main\ntry: main(['list', '{section}'])\n"
        "finally: print(sorted({'torch', 'pandas', 'requests', 'oral4.pyraformer'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_version(oral4):
    assert oral4("--version") == (0, f"oral4 {__version__}\n", "")


def test_no_command_shows_the_help(oral4):
    code, out, err = oral4()
    assert code in (0, 2) and "Usage: oral4" in out + err  # 0 before click 8.2, 2 since


def test_as_a_module():
    done = process("--version")
    assert (done.returncode, done.stdout) == (0, f"oral4 {__version__}\n")


def test_an_unknown_command(oral4):
    code, _, err = oral4("claim")
    assert code == 2 and "No such command 'claim'" in err


# ---------------------------------------------------------------------------------- commands of the chapters


@pytest.fixture
def chapter(monkeypatch):
    """Add a command from a module that is imported when it is called."""
    module = types.ModuleType("fake_chapter")

    def double(number: int, times: int = 2) -> None:
        """Multiply."""
        print(number * times)

    module.double = double  # type: ignore[attr-defined]
    imported = []
    real = cli.importlib.import_module

    def load(name: str):
        if name == "fake_chapter":
            imported.append(name)
            return module
        return real(name)

    monkeypatch.setattr(cli.importlib, "import_module", load)
    monkeypatch.setitem(cli.CHAPTER_COMMANDS, "double", ("fake_chapter", "double", "Multiply a number."))
    return imported


def test_a_deferred_command_is_listed_without_its_module(oral4, chapter):
    for arguments in (["--help"], ["list", "commands"]):
        code, out, _ = oral4(*arguments)
        assert code == 0 and re.search(r"double +Multiply a number\.", out)
    assert chapter == []


def test_a_deferred_command_reads_its_own_arguments(oral4, chapter):
    assert oral4("double", "4", "--times", "3") == (0, "12\n", "")
    assert chapter == ["fake_chapter"]


def test_a_deferred_command_has_its_own_help_and_errors(oral4, chapter):
    code, out, _ = oral4("double", "--help")
    assert code == 0 and out.startswith("Usage: oral4 double [OPTIONS]") and "--times" in out
    code, _, err = oral4("double", "four")
    assert code == 2 and "valid int" in err and "Usage: oral4 double" in err


def test_a_deferred_typer_app(oral4, chapter, monkeypatch):
    app = cli.typer.Typer()

    @app.command()
    def hello():
        print("hello")

    sub = types.SimpleNamespace(app=app)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: sub)
    monkeypatch.setitem(cli.CHAPTER_COMMANDS, "hello", ("anything", "app", "Say hello."))
    assert oral4("hello") == (0, "hello\n", "")


@pytest.mark.parametrize("name", sorted(cli.CHAPTER_COMMANDS))
def test_every_deferred_command_is_there(oral4, name):
    code, out, err = oral4(name, "--help")
    assert code == 0, err
    assert out.startswith(f"Usage: oral4 {name}")


# ---------------------------------------------------------------------------------------------------- errors


def test_a_user_error_is_one_line_and_code_two():
    done = process("run", "library/startupp", "--scale", "smoke")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "oral4: there is no experiment 'library/startupp'; there is library/startup\n"


@pytest.mark.parametrize("arguments", [["--debug", "cite", "nothing"], ["cite", "nothing", "--debug"]])
def test_debug_shows_the_traceback(arguments):
    done = process(*arguments)
    assert done.returncode == 1 and "Traceback" in done.stderr and "OralError: nothing to cite" in done.stderr


def test_debug_by_the_environment():
    assert "Traceback" in process("cite", "nothing", ORAL4_DEBUG="1").stderr
    assert "Traceback" not in process("cite", "nothing", ORAL4_DEBUG="0").stderr


def test_a_defect_of_ours_keeps_its_traceback(oral4, monkeypatch):
    def broken(chapter):
        raise KeyError("a defect")

    monkeypatch.setattr(claims_module, "claims_table", broken)
    with pytest.raises(KeyError, match="a defect"):
        oral4("claims", "flan")


def test_a_terminal_without_the_shapes_still_works():
    done = process("claims", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"\? \d+ holds, \? \d+ holds in direction", done.stdout)


# ------------------------------------------------------------------------------------------------------- run


def test_run_prints_mean_interval_and_cost(oral4, toy):
    code, out, err = oral4("run", "toy/line", "--seeds", "3")
    assert code == 0
    assert "loss   3 [0.5159, 5.484] nats" in out  # mean of 2, 3, 4; 4.3027 / sqrt(3) on either side
    assert "curve  2 numbers a seed" in out
    assert "toy/line-mini: 3 seeds" in out
    assert "seed 2 (3 of 3)" in err  # progress is no part of the output


def test_run_writes_what_it_is_told_to(oral4, toy, tmp_path):
    path = tmp_path / "line.json"
    code, out, _ = oral4(
        "run", "toy/line", "--scale", "smoke", "--seeds", "2", "--seed", "5", "--set", "steps=7", "--out", str(path)
    )
    assert code == 0 and f"written to {path}" in out
    record = read_record(path)
    assert (record.scale, record.seeds, record.values["loss"]) == ("smoke", (5, 6), (12, 13))
    assert record.config == {"steps": 7}
    assert record.command() == "oral4 run toy/line --scale smoke --set steps=7 --seeds 2 --seed 5"


def test_run_saves_the_record_of_the_book(oral4, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "checkout", lambda: tmp_path)
    code, out, _ = oral4("run", "toy/line", "--scale", "smoke", "--save-record")
    path = tmp_path / "oral4" / "records" / "toy" / "line-smoke.json"
    assert code == 0 and f"written to {path}" in out
    assert read_record(path).name == "toy/line-smoke"


def test_run_refuses_before_it_runs(oral4, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the experiment was started")

    monkeypatch.setattr(experiment_module, "run_experiment", never)
    monkeypatch.setattr(environment, "checkout", lambda: None)
    for arguments, words in [
        (["--save-record"], "this is none; use --out FILE"),
        (["--save-record", "--set", "steps=1"], "keeps a scale as it is written"),
        (["--out", str(tmp_path)], "is a folder"),
        (["--set", "steps"], "--set steps: write --set KEY=VALUE"),
        (["--set", "=1"], "write --set KEY=VALUE"),
    ]:
        code, _, err = oral4("run", "library/startup", *arguments)
        assert code == 2 and words in err, arguments
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "which experiment? See: oral4 list experiments"),
        (["toy/lime"], "there is no experiment 'toy/lime'; there is diffvc/"),
        (["toy/line", "--scale", "large"], "scale='large' is unknown; choose one of smoke, mini, gpu, paper"),
        (["toy/line", "--scale", "paper"], "toy/line has no scale 'paper'; it has smoke, mini"),
        (["toy/line", "--set", "stepz=3"], "no setting 'stepz', did you mean steps? It has steps (a whole number)"),
        (["toy/line", "--set", "steps=many"], "steps='many' is not a whole number"),
        (["toy/line", "--seeds", "0"], "at least one seed"),
        (["toy/line", "--seeds", "two"], "Invalid value for '--seeds'"),
        (["toy/line", "--verify", "x/y-mini"], "--verify takes everything from the record"),
    ],
)
def test_run_with_bad_input(oral4, toy, arguments, words):
    code, _, err = oral4("run", *arguments)
    assert code == 2 and words in err
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------- verify


def test_verify_agrees(oral4, toy, tmp_path):
    path = tmp_path / "line.json"
    oral4("run", "toy/line", "--seeds", "2", "--out", str(path))
    code, out, _ = oral4("run", "--verify", str(path), "--seed", "1")
    assert code == 0
    assert "loss   agrees: relative difference 0, tolerance 0.01" in out
    assert "curve  not compared" in out


def test_verify_differs(oral4, toy, tmp_path):
    path = tmp_path / "line.json"
    oral4("run", "toy/line", "--seeds", "2", "--out", str(path))
    record = read_record(path)
    dataclasses.replace(record, values={**record.values, "loss": (2.5, 3)}).save(path)
    code, out, _ = oral4("run", "--verify", str(path))
    assert code == 1
    assert "loss   DIFFERS: relative difference 0.2, tolerance 0.01" in out


def test_verify_of_nothing_is_no_success(oral4, toy, tmp_path):
    path = tmp_path / "line.json"
    oral4("run", "toy/line", "--seeds", "2", "--out", str(path))
    dataclasses.replace(read_record(path), tolerance={}).save(path)
    code, out, _ = oral4("run", "--verify", str(path))
    assert code == 1 and "Nothing was compared" in out


@pytest.mark.parametrize(
    ("record", "words"),
    [("x/absent-mini", "there is no record 'x/absent-mini'"), ("absent.json", "cannot read the record absent.json")],
)
def test_verify_without_a_record(oral4, record, words):
    code, _, err = oral4("run", "--verify", record)
    assert code == 2 and words in err


def test_the_record_of_the_start_up_still_agrees(oral4):
    code, out, err = oral4("run", "--verify", "library/startup-mini")
    assert code == 0, out + err


# ----------------------------------------------------------------------------------- list, cite, claims, fetch


def test_list_of_everything(oral4):
    code, out, _ = oral4("list")
    assert code == 0
    for line in ("experiments", "records", "claims", "data", "commands"):
        assert f"\n{line}\n" in f"\n{out}"
    assert "  library/startup-mini  " in out and "ett/ETTh1.csv" in out


def test_list_of_one_thing(oral4):
    code, out, _ = oral4("list", "experiments")
    assert code == 0 and re.search(r"^library/startup +Time of", out, re.M) and "ett/ETTh1.csv" not in out


def test_list_of_what_is_not_there(oral4):
    code, _, err = oral4("list", "experiment")
    assert code == 2 and "choose one of experiments, records" in err


def test_cite_by_key_chapter_and_all(oral4):
    _, one, _ = oral4("cite", "liu2022pyraformer")
    assert one.startswith("@inproceedings{liu2022pyraformer,") and one.rstrip().endswith("}") and one.count("@") == 1
    _, some, _ = oral4("cite", "pyraformer")
    _, everything, _ = oral4("cite")
    assert one.strip() in some and 5 < some.count("\n@") < everything.count("\n@") - 5  # the chapter's, not all
    text = (Path(cli.__file__).parent / "references.bib").read_text(encoding="utf-8")
    assert len(re.findall("^@", everything, re.M)) == len(re.findall("^@", text, re.M))  # none is lost on the way


def test_every_chapter_can_be_cited(oral4):
    for chapter in claims_module.CHAPTERS:
        code, out, _ = oral4("cite", chapter)
        assert code == 0 and "International Conference on Learning Representations" in out


def test_the_bibliography_is_bibtex():
    from pybtex.database import parse_string

    text = (Path(cli.__file__).parent / "references.bib").read_text(encoding="utf-8")
    entries = parse_string(text, "bibtex").entries
    for key, entry in entries.items():
        assert entry.persons["author"] and {"title", "year", "keywords"} <= set(entry.fields), key
        assert {"url", "doi"} & set(entry.fields), key
        assert key.endswith(re.sub(r"\D*\d{4}", "", key)) and entry.fields["year"] in key, key


def test_cite_of_what_is_not_there(oral4):
    code, _, err = oral4("cite", "liu2022pyraforme")
    assert code == 2 and "there is liu2022pyraformer" in err
    code, _, err = oral4("cite", "§")
    assert code == 2 and "diffvc" in err and "pyraformer" in err


def test_claims(oral4):
    code, out, _ = oral4("claims")
    assert code == 0 and "Voices: " in out and "contradicted" in out
    code, out, _ = oral4("claims", "pyraformer")
    assert code == 0 and out.startswith("Forecasting")
    code, _, err = oral4("claims", "pyraformr")
    assert code == 2 and "there is pyraformer" in err


def test_fetch_prints_paths(oral4, monkeypatch):
    monkeypatch.setattr(fetch_module, "fetch", lambda name: Path("cache") / name)
    code, out, _ = oral4("fetch", "ett/ETTh1.csv")
    assert (code, out.splitlines()) == (0, [str(Path("cache/ett/ETTh1.csv"))])
    code, out, _ = oral4("fetch", "ett")
    assert code == 0 and len(out.splitlines()) == sum(name.startswith("ett/") for name in fetch_module.names()) > 1


def test_fetch_list(oral4):
    code, out, _ = oral4("fetch", "--list")
    assert code == 0 and re.search(r"^ett/ETTh1\.csv +2,589,657 bytes  CC BY-ND 4\.0$", out, re.M)


def test_fetch_refuses(oral4, monkeypatch):
    assert oral4("fetch")[0] == 2
    code, _, err = oral4("fetch", "ett/ETTh9.csv")
    assert code == 2 and "is not registered; did you mean ett/ETTh" in err

    def offline(name):
        raise DataError(f"{name}: downloads are off")

    monkeypatch.setattr(fetch_module, "fetch", offline)
    code, out, err = oral4("fetch", "ett/ETTh1.csv")
    assert (code, out, err) == (2, "", "oral4: ett/ETTh1.csv: downloads are off\n")


# ---------------------------------------------------------------------------------------------------- doctor


def test_doctor_says_what_it_found(oral4, monkeypatch, tmp_path):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("ORAL4_DEVICE", "cpu")
    monkeypatch.delenv("ORAL4_DATA", raising=False)
    monkeypatch.setattr(doctor, "ENOUGH_BYTES", 1)
    code, out, _ = oral4("doctor")
    assert code == 0, out
    for what in ("python", "oral4", "torch", "numpy", "device", "cache", "own data", "[forecast]", "[dev]"):
        assert re.search(rf"^(ok|--)  {re.escape(what)} ", out, re.M), what
    assert f"{tmp_path / 'not' / 'yet'}, writable" in out
    assert not (tmp_path / "not").exists()  # looking leaves nothing behind


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ORAL4_SCALE", "large", "!!  scale .*ORAL4_SCALE='large' is unknown"),
        ("ORAL4_DEVICE", "toaster", "!!  device .*ORAL4_DEVICE='toaster' cannot be used"),
        ("ORAL4_OFFLINE", "maybe", "!!  downloads .*ORAL4_OFFLINE='maybe'"),
        ("ORAL4_DATA", "no/such/folder", "!!  own data .*is no folder .*-> correct or unset ORAL4_DATA"),
    ],
)
def test_doctor_sees_a_wrong_variable(oral4, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    code, out, _ = oral4("doctor")
    assert code == 1 and re.search(words, out)


def test_doctor_sees_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "cache"))

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = doctor._cache()
    assert finding.state == "wrong" and "Permission denied" in finding.found and "ORAL4_CACHE" in finding.remedy


def test_doctor_sees_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**8))
    assert doctor._cache().state == "wrong"


def test_doctor_names_the_pip_line_of_a_missing_extra(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pandas" else "99.0")
    finding = next(finding for finding in doctor.examine() if finding.what == "[forecast]")
    assert (finding.state, finding.found) == ("absent", "without pandas")
    assert finding.remedy == 'pip install "oral4[forecast]"'


def test_doctor_sees_a_core_package_that_is_missing_or_old(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"torch": "2.5.1", "numpy": None}.get)
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["torch"].state == "wrong" and "2.6 or later" in found["torch"].found
    assert found["numpy"].state == "wrong" and found["numpy"].found == "missing"


@pytest.mark.parametrize(
    ("found", "least", "below"),
    [
        ("2.13.0+cpu", "2.6", False),
        ("2.5.1", "2.6", True),
        ("2.6", "2.6", False),
        ("2.6.0a0", "2.6", False),
        ("0.9", "0.12", True),
        ("1", "", False),
    ],
)
def test_lower_bounds(found, least, below):
    assert doctor._below(found, least) is below


def test_output_is_reconfigured_only_where_it_can_be(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert sys.stdout.getvalue() == f"oral4 {__version__}\n"
