"""``oral4 convert``: the files it writes, what it says, and how it fails."""

import pytest

from oral4.cli import main
from oral4.diffvc.align import espeak_say
from oral4.diffvc.audio import load_audio, write_wav


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    write_wav(folder / "source.wav", *espeak_say("Put the yellow book on the shelf.", "en-us+f2")[:2])
    write_wav(folder / "reference.wav", *espeak_say("Both engines failed, yet the plane landed.", "en-us+m5")[:2])
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


def test_the_line_of_the_readme(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = run(
        "convert", files / "source.wav", files / "reference.wav", "--out", "converted.wav", "--steps", 6, "--solver", "ml",
        "--seed", 0,
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
    ("arguments", "words"),
    [
        (["absent.wav", "reference.wav"], "no such file"),
        (["source.wav", "reference.wav", "--steps", "0"], "at least 1"),
        (["source.wav", "reference.wav", "--solver", "magic"], "magic"),
        (["source.wav", "reference.wav", "--out", "sound.mp3"], "ends in .wav"),
        (["source.wav", "reference.wav", "--mix", "0.5"], "needs two references"),
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
