"""Players hold the wave they were given, refuse what is no wave, and stand in a row."""

import base64
import io
import re
import wave as wave_file

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oral4.viz.audio import MAX_BYTES, Player, player, players

TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(1600) / 16000)


def samples(item):
    """The 16-bit samples inside a player, and the rate."""
    with wave_file.open(io.BytesIO(item.sound)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2"), file.getframerate()


@pytest.mark.parametrize(
    "wave",
    [TONE, TONE.astype(np.float32), torch.tensor(TONE), torch.tensor(TONE, requires_grad=True), TONE.tolist()],
    ids=["float64", "float32", "tensor", "gradient", "list"],
)
def test_the_wave_arrives(wave):
    back, rate = samples(player(wave, 16000, label="Tone"))
    assert rate == 16000
    np.testing.assert_allclose(back / 32767, TONE, rtol=0, atol=0.51 / 32767)  # half a step, and float32


def test_full_scale_and_bfloat16_arrive():
    assert samples(player([1.0, -1.0, 0.0], 8000, label="x"))[0].tolist() == [32767, -32767, 0]
    assert samples(player(torch.ones(2, dtype=torch.bfloat16), 8000, label="x"))[0].tolist() == [32767, 32767]


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_sixteen_bits_arrive_unchanged(values):
    given_samples = np.array(values, dtype=np.int16)
    assert np.array_equal(samples(player(given_samples, 22050, label="x"))[0], given_samples)


def test_flac_holds_the_same_samples_in_fewer_bytes():
    wave, flac = (player(TONE, 16000, label="x", format=kind) for kind in ("wav", "flac"))
    back, rate = soundfile.read(io.BytesIO(flac.sound), dtype="int16")
    assert rate == 16000 and np.array_equal(back, samples(wave)[0])
    assert len(flac.sound) < len(wave.sound) and flac.kind == "audio/flac"


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros((2, 100)), r"shape \(2, 100\), expected \(T,\)"),
        (np.zeros((1, 100)), r"take one channel, such as wave\[0\]"),
        (np.float64(0.5), r"shape \(\)"),
        (np.zeros(0), "empty"),
        ([0.0, np.nan, np.inf], "2 samples of the wave are NaN or infinite, first at 1"),
        ([0.0, -1.5], r"reaches 1\.5, outside \[-1, 1\]; divide"),
    ],
)
def test_what_is_no_wave_is_refused(wave, message):
    with pytest.raises(ValueError, match="player 'x'.*" + message):
        player(wave, 16000, label="x")


@pytest.mark.parametrize("kind", [np.int32, np.uint8, bool, complex])
def test_other_types_are_refused(kind):
    with pytest.raises(TypeError, match=r"floating point in .-1, 1. or int16"):
        player(np.zeros(4, kind), 16000, label="x")


@pytest.mark.parametrize(
    ("rate", "error"),
    [(0, ValueError), (-8000, ValueError), (7999, ValueError), (48001, ValueError), (16000.0, TypeError),
     (True, TypeError), ("16000", TypeError), (None, TypeError)],
)  # fmt: skip
def test_odd_rates_are_refused(rate, error):
    with pytest.raises(error, match="samples per second"):
        player(TONE, rate, label="x")


@pytest.mark.parametrize("text", ["", "  ", None, 3])
def test_texts_have_to_be_texts(text):
    with pytest.raises(ValueError, match="label"):
        player(TONE, 16000, label=text)
    if text is not None:
        for name in ("alt", "transcript"):
            with pytest.raises(ValueError, match=name):
                player(TONE, 16000, label="x", **{name: text})
    with pytest.raises(ValueError, match="mp3"):
        player(TONE, 16000, label="x", format="mp3")


def test_long_sounds_are_refused_with_what_would_fit():
    fits = (MAX_BYTES - 44) // 2  # a WAV header has 44 bytes
    assert player(np.zeros(fits), 16000, label="x").seconds == fits / 16000
    with pytest.raises(ValueError, match=r"take 2\d\d kB as wav, at most 250 kB.*Cut it to 7\.8 s, pass format='flac'"):
        player(np.zeros(fits + 1), 16000, label="x")
    noise = np.random.default_rng(0).uniform(-1, 1, 160_000)
    with pytest.raises(ValueError, match=r"kB as flac.*write it to a file") as caught:
        player(noise, 16000, label="x", format="flac")
    assert "pass format" not in str(caught.value)


def test_a_row_has_a_labelled_player_for_each_and_starts_none(parse):
    items = [player(TONE, 16000, label=f"Voice {i}", alt=f"A tone {i}", transcript="Ah.") for i in range(4)]
    tree = parse(players(items, caption="Four <b>voices</b>").html)
    sounds = tree.all("audio")
    assert [s["aria-label"] for s in sounds] == [f"A tone {i}" for i in range(4)]
    assert all("controls" in s and "autoplay" not in s and s["preload"] == "metadata" for s in sounds)
    assert [base64.b64decode(s["src"].removeprefix("data:audio/wav;base64,")) for s in sounds] == [
        i.sound for i in items
    ]
    assert tree.text("b") == "Voice 0Voice 1Voice 2Voice 3" and tree.text("details") == "Ah." * 4
    assert tree.text("figcaption") == "Four <b>voices</b>"
    assert not [a for _, a in tree.elements if "id" in a]
    assert tree.text("span").count("0.1 s of sound") == 4  # what stands in print


def test_every_text_is_escaped(parse):
    nasty = '"></audio><script>alert(1)</script>&'
    html = players([player(TONE, 16000, label=nasty, alt=nasty, transcript=nasty, mel=np.eye(3))], caption=nasty).html
    tree = parse(html)
    assert tree.text("b") == tree.text("details") == tree.text("figcaption") == nasty
    assert tree.all("audio")[0]["aria-label"] == nasty and nasty in tree.all("img")[0]["alt"]
    assert len(tree.all("script")) == 1 and "alert" not in tree.text("script")


def pictures(html):
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")).astype(int)
        for code in re.findall(r"data:image/webp;base64,([^\"]+)", html)
    ]


def test_spectrograms_share_one_scale_and_stand_upright():
    quiet, loud = np.zeros((32, 64)), np.zeros((32, 64))
    quiet[:8], loud[:8] = 1, 4  # the lowest bands
    items = [player(TONE, 16000, label="x", mel=mel) for mel in (torch.tensor(quiet), loud)]
    soft, strong = pictures(players(items).html)
    assert soft.shape == strong.shape == (32, 64, 3)
    assert strong[-4:].mean() > strong[:16].mean() + 100  # low frequencies at the bottom
    assert strong[-4:].mean() > soft[-4:].mean() + 50  # brightness can be compared
    alone = pictures(items[0]._repr_html_())[0]
    assert alone[-4:].mean() == pytest.approx(strong[-4:].mean(), abs=8)  # lossy pictures


def test_a_constant_spectrogram_is_drawn():
    assert pictures(player(TONE, 16000, label="x", mel=np.ones((4, 4)))._repr_html_())[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("mel", "message"),
    [
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)"),
        ([[np.nan]], "NaN"),
        ([[-np.inf]], "floor"),
    ],
)
def test_other_spectrograms_are_refused(mel, message):
    with pytest.raises(ValueError, match=message):
        player(TONE, 16000, label="x", mel=mel)


def test_rows_are_checked():
    one, with_mel = player(TONE, 16000, label="x"), player(TONE, 16000, label="x", mel=np.eye(2))
    with pytest.raises(ValueError, match="empty"):
        players([])
    with pytest.raises(ValueError, match=r"1 of 2 have a spectrogram"):
        players([one, with_mel])
    with pytest.raises(TypeError, match="got ndarray"):
        players([TONE])
    assert isinstance(one, Player) and repr(one) == "<player: x, 0.1 s, 3 kB>"
    assert players([one]).html == players([player(TONE, 16000, label="x")]).html
