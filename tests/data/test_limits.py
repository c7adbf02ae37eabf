"""Every cap is met exactly at its value, and the message names the value, the limit and the setting."""

import dataclasses
import math
import os
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oral4.data.limits import (
    DEFAULT,
    Limits,
    check_archive,
    check_audio,
    check_image_size,
    check_smiles,
    check_table_size,
    check_text,
)
from oral4.errors import DataError

OK = np.full(16_000, 0.1)
"""One second at 16 kHz."""


# --- the limits themselves --------------------------------------------------------------------------------------


def test_limits_are_frozen_and_by_name():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.audio_seconds = 1
    with pytest.raises(TypeError):
        Limits(1)
    changed = Limits(audio_seconds=7200)
    assert dataclasses.replace(changed, audio_seconds=DEFAULT.audio_seconds) == DEFAULT


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
@pytest.mark.parametrize("value", [0, -1, math.nan, "10", None, True])
def test_a_limit_is_a_positive_number(field, value):
    with pytest.raises(ValueError, match=f"Limits.{field}={value!r}: a positive number is needed"):
        Limits(**{field: value})


def test_the_rates_are_in_order():
    with pytest.raises(ValueError, match="audio_lowest_rate_hz=48000 is above audio_highest_rate_hz=16000"):
        Limits(audio_lowest_rate_hz=48_000, audio_highest_rate_hz=16_000)


CAPS = {
    "audio_seconds": lambda n, limits: check_audio(np.zeros(n * 8000, np.int8), 8000, limits=limits),
    "audio_samples": lambda n, limits: check_audio(np.zeros(n, np.int8), 8000, limits=limits),
    "audio_channels": lambda n, limits: check_audio(np.zeros((n, 100)), 8000, limits=limits),
    "table_columns": lambda n, limits: check_table_size(np.zeros((2, n)), limits=limits),
    "table_rows": lambda n, limits: check_table_size(np.zeros((n, 2)), limits=limits),
    "table_cells": lambda n, limits: check_table_size(np.zeros((1, n)), limits=limits),
    "text_characters": lambda n, limits: check_text("ä" * n, limits=limits),
    "text_tokens": lambda n, limits: check_text("text", num_tokens=n, limits=limits),
    "smiles_characters": lambda n, limits: check_smiles("C" * n, limits=limits),
    "smiles_heavy_atoms": lambda n, limits: check_smiles("C" * n, limits=limits),
    "smiles_fragments": lambda n, limits: check_smiles(".".join("C" * n), limits=limits),
    "image_pixels": lambda n, limits: check_image_size(1, n, limits=limits),
    "archive_members": lambda n, limits: check_archive(n, 0, 1, limits=limits),
    "archive_bytes": lambda n, limits: check_archive(1, n, 1, limits=limits),
}


@pytest.mark.parametrize("setting", CAPS)
@pytest.mark.parametrize("limit", [3, 10])
def test_a_cap_allows_its_value_and_no_more(setting, limit):
    limits = Limits(**{setting: limit})
    CAPS[setting](limit, limits)
    with pytest.raises(DataError) as caught:
        CAPS[setting](limit + 1, limits)
    message = str(caught.value)
    assert (
        f"{limit + 1} " in message
        and f"the limit is {limit};" in message
        and f"limits=Limits({setting}=...)" in message
    )
    CAPS[setting](limit + 1, Limits(**{setting: limit + 1}))  # the advice works


def test_every_limit_has_a_test():
    elsewhere = {"audio_lowest_rate_hz", "audio_highest_rate_hz", "audio_silence_peak", "table_bytes", "archive_ratio"}
    assert set(CAPS) | elsewhere == {field.name for field in dataclasses.fields(Limits)}


def test_samples_of_all_channels_count():
    check_audio(np.zeros((2, 50)), 8_000, limits=Limits(audio_samples=100))
    with pytest.raises(DataError, match="100 samples over all channels, the limit is 99"):
        check_audio(np.zeros((2, 50)), 8_000, limits=Limits(audio_samples=99))


# --- audio ------------------------------------------------------------------------------------------------------


def test_what_audio_is_told():
    audio = check_audio(np.stack([OK, -2 * OK]), 8_000)
    assert (audio.num_channels, audio.num_samples, audio.seconds, audio.is_silent) == (2, 16_000, 2.0, False)
    assert audio.peak == pytest.approx(0.2, rel=1e-12)  # float64 arithmetic


@pytest.mark.parametrize("rate", [3_999, 192_001, 0, -16_000, math.nan, math.inf])
def test_rates_outside_the_range(rate):
    with pytest.raises(DataError, match=rf"{re.escape(str(rate))} Hz is outside 4000 to 192000.*audio_highest_rate_hz"):
        check_audio(OK, rate)


@pytest.mark.parametrize("rate", [4_000, 44_100, 192_000, np.float32(16_000), np.int64(16_000), 22_050.5])
def test_rates_inside_the_range(rate):
    assert check_audio(OK, rate).seconds == pytest.approx(16_000 / float(rate), rel=1e-12)  # float64 arithmetic


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape, index", [((16_000,), (123,)), ((2, 8_000), (1, 7))])
def test_nan_and_infinity_are_located(bad, dtype, shape, index):
    wave = np.zeros(shape, dtype)
    wave[index] = bad
    wave.flat[-1] = bad
    with pytest.raises(DataError, match=rf"2 samples are NaN or infinite, the first at index {re.escape(str(index))}"):
        check_audio(wave, 16_000)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 100), (), (1, 1, 100)])
def test_shapes_that_are_no_audio(shape):
    with pytest.raises(DataError, match=re.escape(f"shape {shape}")):
        check_audio(np.zeros(shape), 16_000)


def test_a_transposed_sound_is_recognised():
    with pytest.raises(DataError, match=r"looks transposed; pass \(channels, samples\)"):
        check_audio(np.zeros((16_000, 2)), 16_000)


@pytest.mark.parametrize("wave", [np.zeros(10, complex), np.zeros(10, bool), ["a", "b"], [None], "noise", None])
def test_what_is_not_real_numbers(wave):
    with pytest.raises(TypeError, match="real floats or integers are needed"):
        check_audio(wave, 16_000)


@pytest.mark.parametrize("rate", ["16000", None, True, [16_000]])
def test_a_rate_that_is_no_number(rate):
    with pytest.raises(TypeError, match="a number of samples per second is needed"):
        check_audio(OK, rate)


def test_silence():
    peak = DEFAULT.audio_silence_peak
    for share, silent in ((0, True), (0.5 * peak, True), (peak, False), (-peak, False), (0.01, False)):
        wave = np.zeros(100)
        wave[50] = share
        assert check_audio(wave, 8_000).is_silent is silent
    assert check_audio(0.01 * OK, 16_000, limits=Limits(audio_silence_peak=0.1)).is_silent is True


@pytest.mark.parametrize("dtype, rest, top", [(np.int16, 0, 32767), (np.int32, 0, 2**31 - 1), (np.uint8, 128, 255)])
def test_integers_have_their_own_full_scale(dtype, rest, top):
    wave = np.full(100, rest, dtype)
    assert check_audio(wave, 8_000).peak == 0 and check_audio(wave, 8_000).is_silent
    wave[3] = top
    assert check_audio(wave, 8_000).peak == 1
    wave[:] = rest
    wave[3] = np.iinfo(dtype).min
    assert check_audio(wave, 8_000).peak == pytest.approx(1, abs=0.01)  # the lowest value is one step further out


def test_a_tensor_is_accepted():
    import torch

    assert check_audio(torch.zeros(2, 8_000), 8_000).num_channels == 2


def test_no_copy_of_the_sound_is_made():
    wave = np.full(2_000_000, 0.1, np.float32)
    tracemalloc.start()
    check_audio(wave, 16_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < peak < wave.nbytes / 10


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, size",
    [
        ("a,b,c\n1,2,3\n4,5,6\n", (2, 3)),
        ("a,b,c\n1,2,3\n4,5,6", (2, 3)),
        ("a;b\r\n1,5;2\r\n", (1, 2)),
        ("a\tb\tc\td\n", (0, 4)),
        ("a", (0, 1)),
        ("date,é\n", (0, 2)),
        ('a,"b\nc"\n1,2\n', (2, 2)),  # an upper bound: the line end in quotes counts
    ],
)
def test_table_files(tmp_path, text, size):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode())
    assert check_table_size(path) == check_table_size(str(path)) == size


@given(rows=st.integers(0, 50), columns=st.integers(1, 8), end=st.booleans())
def test_the_count_is_exact_without_quotes(tmp_path_factory, rows, columns, end):
    line = ",".join("x" * columns)
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_text("\n".join([line] * (rows + 1)) + "\n" * end)
    assert check_table_size(path) == (rows, columns)


def test_caps_of_files(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "1,2\n" * 9)
    for setting, limit in (("table_bytes", 40), ("table_rows", 9), ("table_columns", 2), ("table_cells", 18)):
        check_table_size(path, limits=Limits(**{setting: limit}))
        with pytest.raises(DataError, match=rf"table\.csv: .* the limit is {limit - 1}; .*Limits\({setting}="):
            check_table_size(path, limits=Limits(**{setting: limit - 1}))


def test_a_first_line_of_many_columns_costs_little(tmp_path):
    path = tmp_path / "wide.csv"
    path.write_bytes(b"," * 5_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="5000001 columns, the limit is 10000"):
        check_table_size(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < peak < 20_000_000, "the line itself, not a list of its cells"


@pytest.mark.parametrize("body", [b"", b"\n", b"  \n1,2\n", b"\r\n"])
def test_a_table_without_names(tmp_path, body):
    (tmp_path / "t.csv").write_bytes(body)
    with pytest.raises(DataError, match="first line is empty"):
        check_table_size(tmp_path / "t.csv")


def test_compressed_tables(tmp_path):
    import bz2
    import gzip
    import lzma
    import zipfile

    text = b"a,b\n1,2\n"
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("t.csv", text)
    for name, pack in (("t.gz", gzip.compress), ("t.bz2", bz2.compress), ("t.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(text))
    for path in tmp_path.iterdir():
        with pytest.raises(DataError, match="compressed; unpack it first"):
            check_table_size(path)


def test_what_is_not_a_plain_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        check_table_size(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="not a plain file"):
        check_table_size(tmp_path)
    if os.path.exists("/dev/zero"):
        with pytest.raises(DataError, match="not a plain file"):
            check_table_size("/dev/zero")


@pytest.mark.parametrize("shape, size", [((3, 4), (3, 4)), ((5,), (5, 1)), ((0, 2), (0, 2))])
def test_tables_in_memory(shape, size):
    assert check_table_size(np.zeros(shape)) == size


def test_a_data_frame():
    import pandas

    frame = pandas.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})
    assert check_table_size(frame) == (3, 2) and check_table_size(frame["a"]) == (3, 1)


@pytest.mark.parametrize("table", [None, 3, [[1, 2]], {"a": [1]}, np.zeros((1, 2, 3)), np.float64(1)], ids=repr)
def test_what_is_no_table(table):
    with pytest.raises(TypeError, match="an array or frame of 1 or 2 axes"):
        check_table_size(table)


# --- text -------------------------------------------------------------------------------------------------------


@given(st.text(max_size=50))
def test_text_that_utf8_can_write_is_accepted_and_no_other(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        with pytest.raises(DataError, match="is not a character"):
            check_text(text)
    else:
        assert check_text(text) == len(text)


def test_a_lone_surrogate_is_located():
    with pytest.raises(DataError, match=r"'\\ud83d' at position 3 is not a character"):
        check_text("abc\ud83d")


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_what_is_no_text(text):
    with pytest.raises(TypeError, match="str is needed"):
        check_text(text)


# --- molecules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "smiles, heavy_atoms",
    [
        ("C", 1),
        ("CCO", 3),
        ("c1ccccc1", 6),
        ("ClCCBr", 4),
        ("BrB", 2),
        ("CN1C=NC2=C1C(=O)N(C(=O)N2C)C", 14),
        ("[H]C([H])([H])[H]", 1),
        ("[2H]O[2H]", 1),
        ("[H+]", 0),
        ("[HH]", 0),
        ("[H][H]", 0),
        ("[H:1][CH3:2]", 1),
        ("[Hg]", 1),
        ("[He]", 1),
        ("[13CH4]", 1),
        ("C[C@@H](N)C(=O)O", 6),
        ("F/C=C/F", 4),
        ("[Cu+2]", 1),
        ("*C", 2),
        ("[nH]1cccc1", 5),
        ("C%12CCCCC%12", 6),
    ],
)
def test_heavy_atoms(smiles, heavy_atoms):
    assert check_smiles(smiles) == heavy_atoms


def test_heavy_atoms_agree_with_rdkit():
    from rdkit import Chem

    for smiles in (
        "CC(=O)Oc1ccccc1C(=O)O",
        "OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O",
        "[O-][n+]1ccccc1",
        "C[Si](C)(C)Cl",
    ):
        assert check_smiles(smiles) == Chem.MolFromSmiles(smiles).GetNumHeavyAtoms()


@pytest.mark.parametrize("smiles", ["", "()", "123", "===", "zzz"])
def test_smiles_without_atoms(smiles):
    with pytest.raises(DataError, match="it holds no atom"):
        check_smiles(smiles)


@pytest.mark.parametrize("smiles, at", [("CCO ethanol", 3), ("C\nC", 1), ("CÇ", 1), ("\x00C", 0), ("C\t", 1), ("С", 0)])
def test_smiles_with_foreign_characters(smiles, at):
    with pytest.raises(DataError, match=f"at position {at} is not allowed"):
        check_smiles(smiles)


def test_salts():
    with pytest.raises(DataError, match="2 fragments, the limit is 1"):
        check_smiles("CC(=O)[O-].[Na+]")
    assert check_smiles("CC(=O)[O-].[Na+]", limits=Limits(smiles_fragments=2)) == 5


def test_a_long_smiles_is_shortened_in_the_message():
    with pytest.raises(DataError) as caught:
        check_smiles("C" * 999)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("smiles", [None, b"C", 3, ["C"]])
def test_what_is_no_smiles(smiles):
    with pytest.raises(TypeError, match="str is needed"):
        check_smiles(smiles)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=200))
def test_any_ascii_ends_well_and_fast(smiles):
    try:
        assert 0 <= check_smiles(smiles) <= len(smiles)
    except DataError:
        pass


# --- images and archives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(0, 10), (10, -1)])
def test_images_without_pixels(width, height):
    with pytest.raises(DataError, match=f"{width} x {height} pixels: both sides must be at least 1"):
        check_image_size(width, height)


@pytest.mark.parametrize("side", [1.0, "1", None, True])
def test_sides_that_are_no_whole_numbers(side):
    with pytest.raises(TypeError, match="whole numbers are needed"):
        check_image_size(side, 1)
    with pytest.raises(TypeError, match="whole numbers are needed"):
        check_image_size(1, side)


def test_sides_of_numpy_do_not_overflow():
    with pytest.raises(DataError, match="10000000000 pixels"):
        check_image_size(np.int32(100_000), np.int32(100_000))


def test_the_ratio_counts_once_a_megabyte_is_out():
    check_archive(1, 1_000_000, 1)
    check_archive(1, 200 * 10_000, 10_000)
    with pytest.raises(DataError, match=r"200\.0001 times its packed size, the limit is 200; .*archive_ratio"):
        check_archive(1, 200 * 10_000 + 1, 10_000)
    with pytest.raises(DataError, match="inf times"):
        check_archive(1, 2_000_000, 0)
