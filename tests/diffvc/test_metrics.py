"""Metrics of a converted voice: against formulas where there are some, and against real speech."""

import math
import statistics
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.data.fetch import fetch
from oral4.diffvc import metrics
from oral4.diffvc.audio import load_audio
from oral4.diffvc.metrics import (
    DigitRecogniser,
    dtw,
    dtw_reference,
    equal_error_rate,
    f0_stats,
    f0_track,
    frechet,
    frechet_bias,
    frechet_gaussian,
    frechet_mel,
    mcd_dtw,
    mel_cepstra,
    mel_distortion,
    rtf,
    secs,
    voice_distance,
)
from oral4.diffvc.speaker import SpeakerEncoder
from oral4.errors import CheckpointError, DataError

RATE = 16_000
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")


def voiced(contour_hz, rate=RATE, harmonics=range(1, 8)):
    """A sound of harmonics whose fundamental follows a contour, one value for each sample."""
    phase = 2 * np.pi * np.cumsum(contour_hz) / rate
    return (0.2 * sum(np.sin(k * phase + k) / k for k in harmonics)).astype(np.float32)


def syllables(seed, seconds=1.5, rate=RATE):
    """Noise and harmonics whose colour changes ten times a second: frames that differ from one another."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(round(10 * seconds)):
        white = rng.normal(size=rate // 10)
        parts.append(np.convolve(white, rng.normal(size=8), "same") * rng.uniform(0.2, 1))
    wave = np.concatenate(parts)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("soundfile")
    try:
        folder = fetch("fsdd") / "recordings"
    except DataError:
        pytest.skip("FSDD is not at hand")
    return lambda digit, speaker, take: folder / f"{digit}_{SPEAKERS[speaker]}_{take}.wav"


@pytest.fixture(scope="module")
def readers():
    """Two clips of four seconds from each of eight readers."""
    soundfile = pytest.importorskip("soundfile")
    try:
        folder = fetch("librispeech-excerpt") / "librispeech_test-other"
    except DataError:
        pytest.skip("the excerpt of LibriSpeech is not at hand")
    people = sorted(path for path in folder.iterdir() if path.is_dir())
    return [
        [(soundfile.read(file, stop=4 * RATE)[0], RATE) for file in sorted(person.glob("*.flac"))[:2]]
        for person in people
    ]


# ---- similarity


def test_secs_is_a_cosine_and_ignores_the_volume():
    encoder = SpeakerEncoder().eval()
    first, second = (syllables(1), RATE), (syllables(2), RATE)
    points = [encoder.embed(wave, rate, volume="set") for wave, rate in (first, second)]
    expected = float(points[0] @ points[1])
    assert secs(first, second, encoder) == pytest.approx(expected, abs=1e-5)  # two roundings of the volume
    assert secs(second, first, encoder) == pytest.approx(expected, abs=1e-5)
    assert secs((0.01 * first[0], RATE), (1.9 * second[0], RATE), encoder) == pytest.approx(expected, abs=1e-5)


def test_secs_with_an_encoder_of_your_own():
    class Encoder:
        def embed(self, wave, rate):
            return np.array([3.0, 4.0]) if rate == RATE else np.array([4.0, -3.0])

    assert secs((syllables(1), RATE), (syllables(1), RATE), Encoder()) == pytest.approx(1, abs=1e-12)
    assert secs((syllables(1), RATE), (syllables(1), 8000), Encoder()) == pytest.approx(0, abs=1e-12)


def test_silence_has_no_voice():
    silent = (np.zeros(RATE), RATE)
    for measure in (lambda a, b: secs(a, b, SpeakerEncoder()), voice_distance, mcd_dtw, f0_stats):
        with pytest.raises(DataError, match=r"no speech|no voiced frame"):
            measure((syllables(0), RATE), silent)


def test_real_voices_are_told_apart(readers):
    """Eight readers: both measures put the second clip of a reader beside the first one."""
    try:
        SpeakerEncoder.from_resemblyzer()
    except DataError:
        pytest.skip("the weights of GE2E are not at hand")
    for measure, sign in ((secs, 1), (voice_distance, -1)):
        table = sign * np.array([[measure(first, second) for _, second in readers] for first, _ in readers])
        rate, _ = equal_error_rate(np.diag(table), table[~np.eye(8, dtype=bool)])
        assert rate <= 1 / 8  # at most one reader wrong
        assert np.mean(table.argmax(1) == np.arange(8)) >= 7 / 8


def test_voice_distance_is_a_distance_of_laws():
    first, second = (syllables(1), RATE), (syllables(2), RATE)
    distance = voice_distance(first, second)
    assert distance > 0.1
    assert voice_distance(second, first) == pytest.approx(distance, rel=1e-9)
    assert voice_distance(first, first) == pytest.approx(0, abs=1e-12)
    assert (
        voice_distance((0.1 * first[0], RATE), first) < 0.01 * distance
    )  # the volume; the floor of the log-mel moves it a little
    backwards = (first[0][::-1].copy(), RATE)
    assert voice_distance(first, backwards) < 0.1 * distance  # what is said, and when, does not count
    with pytest.raises(DataError, match=r"frames of speech; 16 coefficients need at least 48"):
        voice_distance((syllables(1, 0.3), RATE), first)


def test_bhattacharyya_by_integration():
    """One dimension: minus the logarithm of the integral of the root of the product of the densities."""
    x = np.linspace(-60, 60, 200_001)

    def density(mean, var):
        return np.exp(-((x - mean) ** 2) / (2 * var)) / math.sqrt(2 * math.pi * var)

    for mean, var, other_mean, other_var in ((0, 1, 2, 3), (1, 0.5, 1, 4), (-1, 2, 3, 2)):
        overlap = np.sum(np.sqrt(density(mean, var) * density(other_mean, other_var))) * (x[1] - x[0])
        law = [
            torch.tensor(value, dtype=torch.float64).reshape(shape)
            for value, shape in ((mean, (1,)), (var, (1, 1)), (other_mean, (1,)), (other_var, (1, 1)))
        ]
        assert metrics._bhattacharyya(*law) == pytest.approx(-math.log(overlap), abs=1e-6)


# ---- equal error rate


def test_equal_error_rate_of_simple_sets():
    assert equal_error_rate([0.9, 0.8], [0.1, 0.3]) == (0.0, pytest.approx(0.55))
    assert equal_error_rate([0.1, 0.3], [0.9, 0.8])[0] == 1.0
    assert equal_error_rate([0.5], [0.5])[0] == 0.5
    assert equal_error_rate([1, 2, 3, 4], [1, 2, 3, 4])[0] == 0.5
    rate, threshold = equal_error_rate([0.4, 0.7, 0.8, 0.9], [0.1, 0.2, 0.3, 0.5])
    assert rate == 0.25 and 0.4 < threshold <= 0.5


def test_equal_error_rate_of_two_gaussians():
    """Means d apart, deviation 1: the rate is the normal distribution function at -d/2, the threshold the middle."""
    rng = np.random.default_rng(0)
    for distance in (0.5, 2.0, 3.0):
        same, different = rng.normal(distance, 1, 40_000), rng.normal(0, 1, 40_000)
        rate, threshold = equal_error_rate(same, different)
        expected = statistics.NormalDist().cdf(-distance / 2)
        error = math.sqrt(expected * (1 - expected) / 40_000)
        assert abs(rate - expected) < 4 * error  # four deviations of one of the two rates
        assert abs(threshold - distance / 2) < 0.05


scores = st.lists(st.integers(-20, 20), min_size=1, max_size=30)


@given(scores, scores)
def test_equal_error_rate_properties(same, different):
    rate, threshold = equal_error_rate(same, different)
    assert 0 <= rate <= 1
    # growing changes of the scores keep it; exchanging the sets with the sign turned keeps it too
    assert equal_error_rate([3 * s + 7 for s in same], [3 * d + 7 for d in different])[0] == pytest.approx(
        rate, abs=1e-12
    )
    assert equal_error_rate([-d for d in different], [-s for s in same])[0] == pytest.approx(rate, abs=1e-12)
    # the two error rates cross there: just below the threshold too few of the same voice are refused, above too many
    below, above = (
        np.mean(np.array(same) < threshold + step) - np.mean(np.array(different) >= threshold + step)
        for step in (-1e-6, 1e-6)
    )
    assert below <= 1e-9 or above >= -1e-9
    sides = [
        (np.mean(np.array(same) < t), np.mean(np.array(different) >= t))
        for t in sorted({*same, *different, max(*same, *different) + 1})
    ]
    assert min(max(pair) for pair in sides) >= rate - 1e-9 and max(min(pair) for pair in sides) <= rate + 1e-9


@pytest.mark.parametrize(
    ("same", "different", "name"), [([], [1], "same"), ([1], [], "different"), ([1, math.nan], [1], "same")]
)
def test_equal_error_rate_refuses(same, different, name):
    with pytest.raises(ValueError, match=f"{name} holds"):
        equal_error_rate(same, different)


# ---- time warping


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_dtw_equals_the_reference(rows, columns, seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 5, (rows, columns)).astype(float) if seed % 2 else rng.random((rows, columns))
    total, path = dtw(cost)
    assert total == pytest.approx(dtw_reference(cost), abs=1e-12)
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [rows - 1, columns - 1]
    steps = np.diff(path, axis=0)
    assert set(map(tuple, steps)) <= {(0, 1), (1, 0), (1, 1)}
    assert cost[tuple(path.T)].sum() == pytest.approx(total, abs=1e-12)


def test_dtw_of_many_paths_by_brute_force():
    def all_paths(t, u, rows, columns):
        if (t, u) == (rows - 1, columns - 1):
            yield [(t, u)]
        for nt, nu in ((t + 1, u), (t, u + 1), (t + 1, u + 1)):
            if nt < rows and nu < columns:
                for rest in all_paths(nt, nu, rows, columns):
                    yield [(t, u), *rest]

    cost = np.random.default_rng(0).random((4, 5))
    best = min(sum(cost[place] for place in path) for path in all_paths(0, 0, 4, 5))
    assert dtw_reference(cost) == pytest.approx(best, abs=1e-12)
    assert dtw(cost)[0] == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("cost", [np.zeros((0, 3)), np.zeros(3), np.array([[1.0, np.nan]]), np.array([[np.inf]])])
def test_dtw_refuses(cost):
    with pytest.raises(ValueError, match="dtw: "):
        dtw(cost)


# ---- cepstra and distortion


def test_cepstra_are_coefficients_of_cosines():
    centre = (torch.arange(40, dtype=torch.float64) + 0.5) * math.pi / 40
    mel = 5 + 0.7 * torch.cos(3 * centre) - 0.2 * torch.cos(11 * centre)
    found = mel_cepstra(mel[:, None], 13)[:, 0]
    expected = torch.zeros(13, dtype=torch.float64)
    expected[2], expected[10] = 0.7, -0.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for wrong in (0, 40):
        with pytest.raises(ValueError, match=f"num_cepstra={wrong}; 40 bands have 1 to 39"):
            mel_cepstra(mel[:, None], wrong)


def test_distortion_with_all_coefficients_is_the_spread_of_the_decibels():
    """Parseval: the constant 10 / ln 10 * sqrt 2 makes it the deviation over the bands of the difference in dB."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 40, 1, dtype=torch.float64, generator=generator)
    decibels = 20 / math.log(10) * (first - second)
    expected = float(decibels.std(correction=0))
    assert mel_distortion(first, second, num_cepstra=39, range_db=500)[0] == pytest.approx(expected, rel=1e-12)
    assert mel_distortion(first, second, num_cepstra=13, range_db=500)[0] < expected


def test_distortion_of_a_known_change():
    first = torch.zeros(40, 6)
    centre = (torch.arange(40) + 0.5) * math.pi / 40
    second = first + 0.3 * torch.cos(2 * centre)[:, None]
    assert mel_distortion(first, second)[0] == pytest.approx(
        10 / math.log(10) * math.sqrt(2) * 0.3, rel=1e-5
    )  # float32 input


def test_distortion_ignores_volume_and_tempo_but_not_silence():
    mel = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert mel_distortion(mel, mel)[0] == 0
    assert mel_distortion(mel, mel + 2)[0] < 1e-5  # float32
    slow = mel.repeat_interleave(3, dim=1)
    value, path = mel_distortion(mel, slow)
    assert value < 1e-6 and (path[:, 1] // 3 == path[:, 0]).all()
    other = torch.randn(40, 25, generator=torch.Generator().manual_seed(1))
    assert mel_distortion(mel, other)[0] == pytest.approx(mel_distortion(other, mel)[0], rel=1e-9)
    deep = torch.where(mel < -1, mel - 100, mel)  # far below the loudest: equally silent
    assert mel_distortion(mel - 100 * (mel < -1), deep - 50 * (mel < -1), range_db=60)[0] == 0


def test_distortion_of_sounds():
    wave = syllables(0)
    assert mcd_dtw((wave, RATE), (wave, RATE)) == 0
    assert mcd_dtw((wave, RATE), (0.2 * wave, RATE)) < 0.5
    far = mcd_dtw((wave, RATE), (syllables(5), RATE))
    near = mcd_dtw((wave, RATE), (wave + 0.02 * syllables(6), RATE))
    assert 0 < near < far
    narrow = mcd_dtw(
        (wave, RATE), (syllables(5, rate=8000), 8000)
    )  # compared below 4 kHz, without a warning or an error
    assert np.isfinite(narrow) and narrow > 0
    with pytest.raises(ValueError, match=r"\(40, 3\) and \(80, 3\)"):
        mel_distortion(torch.zeros(40, 3), torch.zeros(80, 3))


def test_distortion_of_real_digits(digits):
    """The same voice and word, another voice, another word: 3.9, 7.4 and 8.1 dB by another implementation."""
    rng = np.random.default_rng(0)
    table = []
    for _ in range(30):
        (word, other_word), (who, other) = rng.choice(10, 2, replace=False), rng.choice(6, 2, replace=False)
        take, other_take = rng.choice(50, 2, replace=False)
        source = digits(word, who, take)
        pairs = (digits(word, who, other_take), digits(word, other, other_take), digits(other_word, who, other_take))
        table.append([mcd_dtw(source, pair) for pair in pairs])
    repeat, voice, word = np.mean(table, axis=0)
    assert 3.2 < repeat < 4.8 and 6 < voice < 8.5 and 6.8 < word < 9.2


# ---- melody


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
@pytest.mark.parametrize("hz", [75.0, 110.0, 233.0, 440.0])
def test_f0_of_a_steady_sound(hz, rate):
    track = f0_track((voiced(np.full(rate // 2, hz), rate), rate))
    assert len(track) == 50
    inner = track[5:-5]
    assert np.isfinite(inner).all()
    np.testing.assert_allclose(inner, hz, rtol=3e-3)  # a twentieth of a semitone


def test_f0_of_a_pure_tone_and_of_a_missing_fundamental():
    steady = np.full(8000, 150.0)
    np.testing.assert_allclose(f0_track((voiced(steady, harmonics=[1]), RATE))[5:-5], 150, rtol=3e-3)
    np.testing.assert_allclose(f0_track((voiced(steady, harmonics=range(2, 7)), RATE))[5:-5], 150, rtol=3e-3)


def test_f0_of_a_glide():
    contour = 100 * 2 ** (np.arange(RATE) / RATE)  # an octave in a second
    track = f0_track((voiced(contour), RATE))
    np.testing.assert_allclose(track[5:-5], 100 * 2 ** (np.arange(5, 95) / 100), rtol=0.01)


def test_f0_of_what_has_none():
    rng = np.random.default_rng(0)
    assert np.isnan(f0_track((np.zeros(RATE), RATE))).all()
    assert np.isnan(f0_track((0.1 * rng.normal(size=RATE), RATE))).mean() > 0.95
    mixed = np.concatenate([voiced(np.full(8000, 120.0)), np.zeros(8000, np.float32)])
    track = f0_track((mixed, RATE))
    assert np.isfinite(track[3:46]).all() and np.isnan(track[54:]).all()
    assert len(f0_track((voiced(np.full(10, 120.0)), RATE))) == 1  # ten samples: one frame


def test_f0_survives_noise():
    contour = 140 * 2 ** (0.2 * np.sin(2 * np.pi * 2 * np.arange(RATE) / RATE))
    wave = voiced(contour)
    noisy = wave + np.random.default_rng(0).normal(size=RATE) * wave.std() * 10 ** (-15 / 20)
    track, truth = f0_track((noisy, RATE)), contour[::160]
    heard = np.isfinite(track)
    assert heard[5:-5].mean() > 0.9
    cents = 1200 * np.abs(np.log2(track[heard] / truth[heard]))
    assert np.percentile(cents, 95) < 50


@pytest.mark.parametrize(
    "arguments",
    [
        {"low_hz": 10},
        {"low_hz": 200, "high_hz": 100},
        {"high_hz": 3000},
        {"threshold": 0},
        {"threshold": 1},
        {"hop_s": 0},
    ],
)
def test_f0_refuses(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}={next(iter(arguments.values()))}"):
        f0_track((syllables(0), RATE), **arguments)


def test_melodies_an_octave_apart():
    contour = 110 * 2 ** (0.3 * np.sin(2 * np.pi * 2 * np.arange(RATE) / RATE))
    low, high, upside_down = voiced(contour), voiced(2 * contour), voiced(110**2 / contour)
    stats = f0_stats((low, RATE), (high, RATE))
    assert stats.shift == pytest.approx(12, abs=0.1) and stats.correlation > 0.99
    assert stats.rmse < 0.2 and stats.voicing_error < 0.05
    assert stats.second_hz == pytest.approx(2 * stats.first_hz, rel=0.01)
    mirrored = f0_stats((low, RATE), (upside_down, RATE))
    assert mirrored.correlation < -0.98 and mirrored.rmse > 2
    flat = f0_stats((low, RATE), (voiced(np.full(RATE, 110.0)), RATE))
    assert abs(flat.correlation) < 0.5 or math.isnan(flat.correlation)


def test_melodies_of_another_tempo_need_an_alignment():
    """The same syllables and melody, the second at two thirds of the speed."""
    colours = np.random.default_rng(0).uniform(0.05, 1, (12, 9))

    def say(samples_each):
        pieces, phase = [], 0.0
        for index, colour in enumerate(colours):
            angle = phase + 2 * np.pi * (100 + 60 * math.sin(index)) / RATE * np.arange(samples_each)
            pieces.append(sum(c * np.sin(k * angle) for k, c in enumerate(colour, 1)) / 10)
            phase = angle[-1]
        return np.concatenate(pieces).astype(np.float32)

    fast, slow = (say(1600), RATE), (say(2400), RATE)
    assert f0_stats(fast, slow, align="dtw").correlation > 0.9
    assert f0_stats(fast, slow).correlation < 0.6
    with pytest.raises(ValueError, match=r"align='none'.*time.*dtw"):
        f0_stats(fast, slow, align="none")


def test_real_melody_agrees_with_the_autocorrelation(digits):
    """In the loudest 60 ms of a word, by definition."""
    for who in (0, 1, 4):
        wave, rate = load_audio(digits(3, who, 0))
        power = np.convolve(wave**2, np.ones(480), "valid")
        start = int(power.argmax())
        piece = wave[start : start + 480] - wave[start : start + 480].mean()
        product = np.correlate(piece, piece, "full")[479:] / np.arange(480, 0, -1)
        lag = 20 + int(product[20:120].argmax())
        track = f0_track((wave, rate), high_hz=400)
        middle = round((start + 240) / 80)
        assert abs(12 * math.log2(track[middle] * lag / rate)) < 1  # a lag of a whole sample: up to half a semitone


# ---- Fréchet distance


def random_law(seed, size=5, rank=None):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, rank or size))
    return rng.normal(size=size), root @ root.T


def test_frechet_of_known_gaussians():
    assert frechet_gaussian([1, 2], np.diag([4, 9]), [1, 2], np.diag([4, 9])) == pytest.approx(0, abs=1e-12)
    # covariances that commute: the squared distance of the deviations
    assert frechet_gaussian([0, 0], np.diag([4, 9]), [3, 4], np.diag([1, 25])) == pytest.approx(25 + 1 + 4, rel=1e-12)
    assert frechet_gaussian([0], [[0]], [0], [[9]]) == pytest.approx(9, rel=1e-12)  # singular


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_frechet_equals_the_matrix_root(seed, rank):
    linalg = pytest.importorskip("scipy.linalg")
    (mean, cov), (other_mean, other_cov) = random_law(seed), random_law(seed + 1, rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of the singular cases
        root = linalg.sqrtm(cov @ other_cov)
    expected = np.sum((mean - other_mean) ** 2) + np.trace(cov + other_cov - 2 * np.real(root))
    found = frechet_gaussian(mean, cov, other_mean, other_cov)
    assert found == pytest.approx(
        expected, abs=1e-5 * np.trace(cov + other_cov)
    )  # sqrtm of a singular matrix is the poorer one
    assert frechet_gaussian(other_mean, other_cov, mean, cov) == pytest.approx(
        found, abs=1e-6 * np.trace(cov + other_cov)
    )
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 5)))
    turned = frechet_gaussian(turn @ mean, turn @ cov @ turn.T, turn @ other_mean, turn @ other_cov @ turn.T)
    assert turned == pytest.approx(found, abs=1e-6 * np.trace(cov + other_cov))


def test_frechet_of_draws_is_the_distance_plus_the_bias():
    rng = np.random.default_rng(0)
    cov = np.diag([4.0, 1.0, 0.25, 0.25])
    draws = [[rng.multivariate_normal(np.zeros(4), cov, size=count) for count in (200, 300)] for _ in range(200)]
    found = np.array([frechet(*pair) for pair in draws])
    error = found.std() / math.sqrt(len(found))
    expected = frechet_bias(cov, 200, 300)
    assert (
        abs(found.mean() - expected) < 4 * error + 0.03 * expected
    )  # the formula leaves out the next order, about 1/200
    apart = np.mean([frechet(first, second + 1) for first, second in draws])
    assert apart == pytest.approx(4 + expected, rel=0.05)


def test_frechet_refuses():
    with pytest.raises(ValueError, match="eigenvalue -1"):
        frechet_gaussian([0, 0], np.diag([1, -1]), [0, 0], np.eye(2))
    with pytest.raises(ValueError, match="shapes"):
        frechet_gaussian([0, 0], np.eye(3), [0, 0], np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_gaussian([0, math.nan], np.eye(2), [0, 0], np.eye(2))
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        frechet(np.zeros((5, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        frechet(np.zeros((1, 2)), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="1 and 5 draws"):
        frechet_bias(np.eye(2), 1, 5)


def test_frechet_of_spectrograms_counts_sounds_and_not_their_order():
    generator = torch.Generator().manual_seed(0)
    mels = [torch.randn(8, 100, generator=generator), torch.randn(8, 50, generator=generator)]
    shuffled = torch.cat(mels, dim=1)[:, torch.randperm(150, generator=generator)]
    assert frechet_mel(mels, [shuffled]) == pytest.approx(0, abs=1e-12)
    assert frechet_mel(mels, [mel + 2 for mel in mels]) == pytest.approx(4, rel=1e-6)  # per band
    assert frechet_mel(mels, [3 * shuffled]) > 1
    with pytest.raises(ValueError, match="0 and 1 spectrograms"):
        frechet_mel([], [shuffled])


# ---- digits


def words(count, seed=0):
    """Ten artificial words: three tones one after the other, low, middle or high; noise around them."""
    rng = np.random.default_rng(seed)
    orders = ("lmh", "lhm", "mlh", "mhl", "hlm", "hml", "lhl", "hlh", "llh", "hhl")
    tones = {"l": 500, "m": 1100, "h": 2300}
    sounds = []
    for index in range(count):
        length = rng.integers(800, 1600)
        hz = np.repeat([tones[letter] for letter in orders[index % 10]], length)
        wave = np.sin(2 * np.pi * np.cumsum(hz) / 8000 * rng.uniform(0.93, 1.07))
        sounds.append((0.3 * wave + 0.003 * rng.normal(size=len(wave)), 8000))
    return sounds, [index % 10 for index in range(count)]


@pytest.fixture(scope="module")
def recogniser():
    return DigitRecogniser.fit(*words(60), epochs=12, batch_size=20)


def test_the_recogniser_learns_and_generalises(recogniser):
    sounds, labels = words(40, seed=1)
    assert recogniser.accuracy(sounds, labels) >= 0.9
    shifted = [(label + 1) % 10 for label in labels]
    assert recogniser.accuracy(sounds, shifted) <= 0.1


def test_probabilities(recogniser):
    sounds, _ = words(7, seed=2)
    together = recogniser.probabilities(sounds)
    torch.testing.assert_close(together.sum(1), torch.ones(7), rtol=0, atol=1e-6)
    alone = torch.cat([recogniser.probabilities([sound]) for sound in sounds])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)  # float32: a word alone is not padded
    assert recogniser.recognise(sounds) == together.argmax(1).tolist()
    assert recogniser.probabilities([]).shape == (0, 10)


def test_silence_around_a_word_volume_and_offset_do_not_count(recogniser):
    (wave, rate), pause = words(1, seed=3)[0][0], np.zeros(4000)
    expected = recogniser.probabilities([(wave, rate)])
    padded = recogniser.probabilities([(np.concatenate([pause, wave, pause]), rate)])
    assert float((padded - expected).abs().max()) < 0.1  # the hop falls elsewhere
    for same in ((0.3 * wave, rate), (wave + 0.05, rate)):
        torch.testing.assert_close(
            recogniser.probabilities([same]), expected, rtol=0, atol=0.02
        )  # the floor of the log-mel


def test_fitting_is_reproducible_and_leaves_the_random_state(tmp_path):
    sounds, labels = words(10)
    before = torch.random.get_rng_state()
    first = DigitRecogniser.fit(sounds, labels, epochs=1, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    second, other = (DigitRecogniser.fit(sounds, labels, epochs=1, seed=seed) for seed in (3, 4))
    torch.testing.assert_close(first.probabilities(sounds), second.probabilities(sounds), rtol=0, atol=0)
    assert not torch.equal(first.probabilities(sounds), other.probabilities(sounds))
    first.save(tmp_path / "digits.pt")
    loaded = DigitRecogniser.load(tmp_path / "digits.pt")
    torch.testing.assert_close(loaded.probabilities(sounds), first.probabilities(sounds), rtol=0, atol=0)


def test_the_recogniser_refuses(tmp_path, recogniser):
    sounds, labels = words(10)
    with pytest.raises(ValueError, match="10 recordings and 9 digits"):
        DigitRecogniser.fit(sounds, labels[:9])
    with pytest.raises(ValueError, match="digit 10; 0 to 9"):
        DigitRecogniser.fit(sounds, [*labels[:9], 10])
    with pytest.raises(ValueError, match="epochs=0"):
        DigitRecogniser.fit(sounds, labels, epochs=0)
    with pytest.raises(ValueError, match="0 recordings"):
        recogniser.accuracy([], [])
    with pytest.raises(DataError, match="no speech"):
        recogniser.recognise([(np.zeros(4000), 8000)])
    with pytest.raises(CheckpointError, match="cannot be read"):
        DigitRecogniser.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        DigitRecogniser.load(tmp_path / "text.pt")
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a digit recogniser"):
        DigitRecogniser.load(tmp_path / "other.pt")


@pytest.mark.slow
@pytest.mark.parametrize("unseen", range(6))
def test_an_unseen_speaker_is_understood(digits, unseen):
    """Trained on five speakers, heard by the sixth."""
    files = {who: [(digits(digit, who, take), digit) for digit in range(10) for take in range(50)] for who in range(6)}
    seen = [pair for who in range(6) if who != unseen for pair in files[who]]
    recogniser = DigitRecogniser.fit(*map(list, zip(*seen, strict=True)))
    accuracy = recogniser.accuracy(*map(list, zip(*files[unseen], strict=True)))
    assert accuracy > 0.85


def test_real_digits_are_learnt(digits):
    """Few takes of two speakers: other takes of them are understood far above chance."""

    def takes(numbers):
        return map(
            list,
            zip(
                *[(digits(digit, who, take), digit) for digit in range(10) for who in (1, 4) for take in numbers],
                strict=True,
            ),
        )

    recogniser = DigitRecogniser.fit(*takes(range(6)), epochs=12, batch_size=32)
    assert recogniser.accuracy(*takes(range(8, 12))) > 0.7


# ---- speed


def test_real_time_factor():
    calls = []
    found = rtf(lambda: calls.append(1) or time.sleep(0.02), 0.1, repeats=3)
    assert 0.2 <= found < 2  # sleep may last longer, never shorter
    assert len(calls) == 4  # one is not measured
    for seconds, repeats in ((0, 5), (math.nan, 5), (-1, 5), (1, 0)):
        with pytest.raises(ValueError, match=f"seconds={seconds}, repeats={repeats}"):
            rtf(lambda: None, seconds, repeats=repeats)
