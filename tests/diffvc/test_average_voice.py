"""The average voice: tables by mode, mean and median, and targets painted with them."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc.align import PhoneSpan, espeak_say
from oral4.diffvc.audio import MelPreset, log_mel, resample
from oral4.diffvc.average_voice import average_mels, average_target, column_mode
from oral4.errors import DataError

TINY = MelPreset(name="tiny", rate=100, n_fft=2, win=2, hop=2, num_mels=2, fmax=50.0)  # a frame is 0.02 s


def span(first, last, phone):
    """A span that covers the frames from first to last, both included."""
    return PhoneSpan(first * 0.02 + 0.001, last * 0.02 + 0.001, phone)


@pytest.fixture(scope="module")
def official(goldens):
    arrays = np.load(goldens / "audio.npz")
    alignments = [[PhoneSpan(a, b, str(p)) for a, b, p in rows] for rows in json.loads(str(arrays["avg_segments"]))]
    mels = [torch.from_numpy(arrays["mel"]), torch.from_numpy(arrays["avg_mel_in1"])]
    return arrays, mels, alignments


@pytest.fixture(scope="module")
def goldens(request):
    return request.config.rootpath / "tests" / "goldens" / "diffvc"


def test_the_table_is_the_official_one(official):
    arrays, mels, alignments = official
    table = average_mels(zip(mels, alignments, strict=True), "hifigan-22k")
    assert list(table) == ["0", "1", "2"]
    found = torch.stack(list(table.values()))
    torch.testing.assert_close(found, torch.from_numpy(arrays["avg_mode"]), rtol=0, atol=1e-6)  # tenths in float32


def test_the_targets_are_the_official_ones(official):
    arrays, mels, alignments = official
    table = {str(phone): torch.from_numpy(row) for phone, row in enumerate(arrays["avg_mode"])}
    for index, (mel, spans) in enumerate(zip(mels, alignments, strict=True)):
        before = mel.clone()
        target = average_target(mel, spans, table, "hifigan-22k")
        torch.testing.assert_close(target, torch.from_numpy(arrays[f"avg_target{index}"]), rtol=0, atol=0)  # copies
        torch.testing.assert_close(mel, before, rtol=0, atol=0)


@given(
    st.integers(1, 40).flatmap(
        lambda rows: st.lists(st.lists(st.integers(-30, 12), min_size=3, max_size=3), min_size=rows, max_size=rows)
    )
)
@settings(max_examples=100, deadline=None)
def test_the_mode_is_that_of_the_definition(rows):
    values = np.array(rows)
    for column, mode in zip(values.T, column_mode(values), strict=True):
        counts = {int(value): int((column == value).sum()) for value in column}
        assert counts[int(mode)] == max(counts.values())
        assert all(count < counts[int(mode)] for value, count in counts.items() if value < mode)


def test_the_mode_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).integers(-60, 10, (300, 17))
    np.testing.assert_array_equal(column_mode(values), stats.mode(values, axis=0).mode)


def test_mode_mean_and_median_differ_as_they_should():
    mel = torch.tensor([[1.0, 1.04, 9.0, 5.0, 5.0, 1.01], [0.0, 0.0, 0.0, 2.0, 2.0, 7.0]])
    pairs = [(mel, [span(0, 2, "A"), span(3, 4, "A"), span(5, 5, "A")])]
    # medians of the occurrences: band 0: 1.04, 5, 1.01; band 1: 0, 2, 7
    expected = {"mode": [1.0, 0.0], "median": [1.04, 2.0], "mean": [22.05 / 6, 11 / 6]}
    for stat, values in expected.items():
        found = average_mels(pairs, TINY, stat)["A"]
        torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=1e-6)  # float32
    coarse = average_mels(pairs, TINY, "mode", round_to=0.5)["A"]
    torch.testing.assert_close(coarse, torch.tensor([1.0, 0.0]), rtol=0, atol=0)
    fine = average_mels(pairs, TINY, "mode", round_to=0.01)["A"]  # all differ, so the smallest
    torch.testing.assert_close(fine, torch.tensor([1.01, 0.0]), rtol=0, atol=1e-6)


def test_the_mean_has_the_smallest_squared_error():
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(2, 30, generator=generator)
    spans = [span(0, 9, "A"), span(11, 19, "B"), span(21, 29, "A")]
    error = {s: float((average_target(mel, spans, average_mels([(mel, spans)], TINY, s), TINY) - mel).square().mean())
             for s in ("mean", "median", "mode")}  # fmt: skip
    assert error["mean"] < min(error["median"], error["mode"])


def test_one_voice_of_many_does_not_move_the_mode():
    quiet, loud = torch.zeros(2, 4), torch.full((2, 4), 50.0)
    spans = [span(0, 3, "A")]
    pairs = [(quiet, spans)] * 9 + [(loud, spans)]
    torch.testing.assert_close(average_mels(pairs, TINY)["A"], torch.zeros(2), rtol=0, atol=0)
    torch.testing.assert_close(average_mels(pairs, TINY, "mean")["A"], torch.full((2,), 5.0), rtol=0, atol=1e-6)


def test_the_order_of_the_corpus_is_no_matter():
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(2, 8, generator=generator), [span(0, 3, "B"), span(4, 7, "A")]) for _ in range(7)]
    for stat in ("mode", "median", "mean"):
        one, other = average_mels(iter(pairs), TINY, stat), average_mels(reversed(pairs), TINY, stat)
        assert list(one) == list(other) == ["A", "B"]
        for phone in one:
            torch.testing.assert_close(one[phone], other[phone], rtol=0, atol=1e-6)  # sums of doubles in another order


def test_frames_without_a_phone_keep_the_voice():
    mel = torch.arange(16.0).reshape(2, 8)
    table = {"A": torch.tensor([100.0, 200.0])}
    target = average_target(mel, [span(2, 4, "A")], table, TINY)
    assert target[:, 2:5].unique(dim=1).tolist() == [[100.0], [200.0]]
    kept = [0, 1, 5, 6, 7]
    torch.testing.assert_close(target[:, kept], mel[:, kept], rtol=0, atol=0)
    assert target.dtype == mel.dtype
    assert average_target(mel.double(), [span(2, 4, "A")], table, TINY).dtype == torch.float64


def test_the_later_of_two_neighbours_gets_the_shared_frame():
    mel = torch.zeros(2, 4)
    table = {"A": torch.full((2,), 1.0), "B": torch.full((2,), 2.0)}
    spans = [PhoneSpan(0.0, 0.05, "A"), PhoneSpan(0.05, 0.08, "B")]
    assert average_target(mel, spans, table, TINY)[0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_who_speaks_is_gone():
    """Two voices say the same; in the average voice only their timing differs."""
    pairs = []
    for voice in ("en-us+m3", "en-us+f4", "en-us+m7"):
        wave, rate, spans = espeak_say("Seven shy foxes chose a vanilla ice.", voice)
        wave = resample(wave, rate, 16_000)
        pairs.append((log_mel(wave), [s for s in spans if s.start_s < len(wave) / 16_000]))
    table = average_mels(pairs)
    targets = [average_target(*pair, table) for pair in pairs]
    columns = [set(map(tuple, target.T.tolist())) for target in targets]
    assert columns[0] == columns[1] == columns[2] == {tuple(vector.tolist()) for vector in table.values()}


def test_bad_input_is_named():
    mel, spans = torch.zeros(2, 8), [span(0, 3, "A"), span(4, 7, "B")]
    table = average_mels([(mel, spans)], TINY)
    with pytest.raises(ValueError, match="phone 'B' is not in the table, which has A; compute the table from speech"):
        average_target(mel, spans, {"A": table["A"]}, TINY)
    with pytest.raises(DataError, match="the mel has 5 frames"):
        average_target(mel[:, :5], spans, table, TINY)
    with pytest.raises(DataError, match="the mel has 5 frames"):
        average_mels([(mel[:, :5], spans)], TINY)
    with pytest.raises(DataError, match="alignment is empty"):
        average_target(mel, [], table, TINY)
    with pytest.raises(DataError, match="alignment is empty"):
        average_mels([(mel, [])], TINY)
    with pytest.raises(ValueError, match=r"mel of shape \(3, 8\); a tensor \(F, T\) with F = 2 of preset 'tiny'"):
        average_mels([(torch.zeros(3, 8), spans)], TINY)
    with pytest.raises(ValueError, match=r"mel of shape \(1, 2, 8\)"):
        average_target(mel[None], spans, table, TINY)
    with pytest.raises(ValueError, match="NaN or infinity"):
        average_mels([(mel.log() * 0, spans)], TINY)
    with pytest.raises(ValueError, match=r"\(3,\) for 'A'; one value for each of 2 bands"):
        average_target(mel, [span(0, 7, "A")], {"A": torch.zeros(3)}, TINY)
    with pytest.raises(ValueError, match="there are no pairs"):
        average_mels([], TINY)
    with pytest.raises(ValueError, match="stat='mod': choose one of mode, mean, median"):
        average_mels([(mel, spans)], TINY, "mod")
    for round_to in (0, 1e-7, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="round_to="):
            average_mels([(mel, spans)], TINY, round_to=round_to)
    with pytest.raises(ValueError, match="preset='speech' is unknown"):
        average_mels([(mel, spans)], "speech")
