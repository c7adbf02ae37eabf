"""``oral4 convert``: the files it writes, what it says, and how it fails."""

import warnings

import numpy as np
import pytest

from oral4.cli import main
from oral4.diffvc.align import espeak_say
from oral4.diffvc.audio import AudioWarning, load_audio, write_wav
from oral4.diffvc.convert import VoicePrint, shipped_converter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    write_wav(folder / "source.wav", *espeak_say("Put the yellow book on the shelf.", "en-us+f2")[:2])
    write_wav(folder / "reference.wav", *espeak_say("Both engines failed, yet the plane landed.", "en-us+m5")[:2])
    write_wav(folder / "more.wav", *espeak_say("Do you know where the spoons are?", "en-us+m5")[:2])
    loud, rate = espeak_say("This was too loud.", "en-us+m5")[:2]
    write_wav(folder / "clipped.wav", np.clip(20 * loud, -1, 1), rate)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_the_line_of_the_readme(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = run(
        "convert", files / "source.wav", files / "reference.wav", "--out", "converted.wav", "--steps", 6,
        "--solver", "ml", "--seed", 0,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0
    wave, rate = load_audio(tmp_path / "converted.wav")
    source = load_audio(files / "source.wav")
    assert rate == 16_000 and abs(len(wave) / rate - len(source[0]) / source[1]) < 0.0125
    assert "6 steps of ml, seed 0" in said and "similarity" in said
    assert "agreed to it" in said and "not for a product" in said


def test_a_voice_is_kept_used_and_mixed(files, tmp_path, capsys):
    voice, picture = tmp_path / "his.voice", tmp_path / "mel.png"
    first = tmp_path / "a.wav"
    assert (
        run(
            "convert",
            files / "source.wav",
            files / "reference.wav",
            "--out",
            first,
            "--save-voice",
            voice,
            "--plot",
            picture,
        )
        == 0
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    second = tmp_path / "b.wav"
    assert run("convert", files / "source.wav", voice, "--out", second) == 0
    assert first.read_bytes() == second.read_bytes()
    mixed = tmp_path / "c.wav"
    assert run("convert", files / "source.wav", voice, files / "source.wav", "--mix", 0.5, "--out", mixed) == 0
    assert mixed.read_bytes() != first.read_bytes()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 3), ("solver", "em"), ("seed", 7), ("temperature", 1.0), ("guidance", 1.5)],
)
def test_every_option_is_what_it_is_in_python(files, tmp_path, option, value):
    out = tmp_path / "out.wav"
    how = {"steps": 2, option: value}
    arguments = [text for name, chosen in how.items() for text in (f"--{name}", chosen)]
    assert run("convert", files / "source.wav", files / "reference.wav", "--out", out, *arguments) == 0
    converter = shipped_converter()
    target = converter.voice_print(files / "reference.wav")
    wanted = converter.convert(files / "source.wav", target, **how)
    assert out.read_bytes() == wanted.save(tmp_path / "wanted.wav").read_bytes()
    plain = converter.convert(files / "source.wav", target, steps=2)
    assert not np.allclose(plain.wave, wanted.wave, atol=1e-3)  # the option does something


def test_several_references_make_one_voice(files, tmp_path, capsys):
    kept = tmp_path / "both.voice"
    arguments = ["--steps", 2, "--out", tmp_path / "out.wav", "--save-voice", kept]
    assert run("convert", files / "source.wav", files / "reference.wav", files / "more.wav", *arguments) == 0
    both = shipped_converter().voice_print(files / "reference.wav", files / "more.wav")
    assert VoicePrint.load(kept).parts[0][1].mel.shape == both.parts[0][1].mel.shape
    assert "holds a spectrogram" in capsys.readouterr().out


def test_the_default_name_is_written_here(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("convert", files / "source.wav", files / "reference.wav", "--steps", 2) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["converted.wav"]


def test_what_is_wrong_with_a_recording_is_said_once_and_nothing_else_warns(files, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AudioWarning)
        assert run("convert", files / "clipped.wav", files / "reference.wav", "--out", tmp_path / "out.wav") == 0
    streams = capsys.readouterr()
    assert streams.out.count("clipped, ") == 1 and "note: " in streams.out
    assert "Warning" not in streams.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.wav", "reference.wav"], "no such file"),
        (["source.wav", "reference.wav", "--steps", "0"], "at least 1"),
        (["source.wav", "reference.wav", "--solver", "magic"], "magic"),
        (["source.wav", "reference.wav", "--out", "sound.mp3"], "ends in .wav"),
        (["source.wav", "reference.wav", "--mix", "0.5"], "needs two references"),
        (["source.wav", "reference.wav", "source.wav", "--mix", "1.5"], "share=1.5"),
        (["source.wav", "reference.wav", "--temperature", "-1"], "temperature"),
        (["source.wav", "reference.wav", "kept.voice"], "stands alone"),
        (["source.wav", "absent.voice"], "cannot be read as a voice print"),
    ],
)
def test_faults_end_with_a_sentence_and_no_file(files, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    paths = [files / a if a.endswith(("source.wav", "reference.wav")) else a for a in arguments]
    assert run("convert", *paths) != 0
    streams = capsys.readouterr()
    assert words in streams.err + streams.out
    assert "Traceback" not in streams.err
    assert not list(tmp_path.glob("*.wav"))
