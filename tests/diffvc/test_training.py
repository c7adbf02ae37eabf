"""Training of the converter: alignment against all paths, tables against their definition, batches, and who learns."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.diffvc import training
from oral4.diffvc.align import DIGITS, PHONES, PhoneSpan
from oral4.diffvc.audio import log_mel
from oral4.diffvc.compact import CompactConfig, CompactDecoder, ContentEncoder, Voice, adapted_table
from oral4.diffvc.corpus import Utterance
from oral4.diffvc.model import DiffVC
from oral4.diffvc.training import FLOOR, SILENCE, Item

HALF = {"a": 0.5, "b": 0.5}
SMALL = CompactConfig(
    encoder_channels=8, encoder_blocks=1, voice_channels=8, voice_dim=16, score_channels=8, score_blocks=1, g_dim=8
)
COUNT = len(PHONES)


def make_items(lengths=(150, 90, 200), sources=("a", "b", "a")):
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, source in zip(lengths, sources, strict=True):
        mel = (2 * torch.randn(80, length, generator=generator) - 5).half()
        phones = torch.randint(-1, COUNT, (length // 5 + 1,), generator=generator).repeat_interleave(5)[:length]
        posterior = torch.rand(COUNT, length, generator=generator).softmax(0).half()
        voice = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
        found.append(Item(mel, f"{source}/{length}", source, phones, None, voice, posterior))
    return found


# ---- items ------------------------------------------------------------------------------------------------------


def test_items_know_the_phone_of_each_frame():
    wave = (0.3 * np.sin(np.arange(16_000) * 0.2)).astype(np.float32)
    spans = (PhoneSpan(0.0, 0.5, "AA"), PhoneSpan(0.5, 0.8, "S"))
    (item,) = training.items_of([Utterance(wave, 16_000, "me", "tone", spans, "ah")])
    assert item.mel.dtype == torch.float16 and torch.equal(item.mel, log_mel(wave).half())
    names = [None if phone < 0 else PHONES[phone] for phone in item.phones.tolist()]
    assert names[:40] == ["AA"] * 40 and names[41:64] == ["S"] * 23 and names[66:] == [None] * 14
    (bare,) = training.items_of([Utterance(wave, 16_000, "me", "tone")])
    assert bare.phones is None and (bare.speaker, bare.source, bare.text) == ("me", "tone", None)


def test_aligned_speech_is_labelled_and_repeatable():
    one, two = (training.aligned_speech(espeak_texts=2, flite_texts=0, voices=2, seed=3) for _ in range(2))
    first, second = training.ESPEAK_VOICES[:2]
    assert [item.speaker for item in one] == [f"espeak/{voice}" for voice in (first, first, second, second)]
    assert all(item.phones.shape == (item.mel.shape[1],) and (item.phones >= 0).float().mean() > 0.9 for item in one)
    assert all(torch.equal(a.mel, b.mel) and torch.equal(a.phones, b.phones) for a, b in zip(one, two, strict=True))


# ---- distortion -------------------------------------------------------------------------------------------------


def test_distortion_keeps_shapes_and_the_floor_and_follows_its_generator():
    mel = 2 * torch.randn(6, 80, 90, generator=torch.Generator().manual_seed(1)) - 5
    before = mel.clone()
    one, two, three = (training.distort(mel, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == mel.shape and bool(one.isfinite().all()) and float(one.min()) >= np.float32(FLOOR)
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(mel, before)  # the item itself is not touched
    assert not torch.equal(one[0], one[1])
    state = torch.get_rng_state()
    training.distort(mel, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state())


def test_distortion_is_of_the_voice_and_leaves_the_words():
    """What loud frames are louder than quiet ones survives: the timing is not moved."""
    envelope = torch.where(torch.arange(120) % 40 < 20, 0.0, -6.0)
    mel = envelope.expand(16, 80, 120) - 1
    out = training.distort(mel, torch.Generator().manual_seed(0)).mean(1)
    for row in out:
        assert float(torch.corrcoef(torch.stack([row, envelope]))[0, 1]) > 0.6


# ---- alignment --------------------------------------------------------------------------------------------------


def brute_force(log_likelihood, phones, stay):
    """The best of all paths: forward by one, by two where silence is skipped, or not at all."""
    frames, count = len(log_likelihood), len(phones)
    silent = [phone == SILENCE for phone in phones]
    starts = {0} | ({1} if silent[0] and count > 1 else set())
    ends = {count - 1} | ({count - 2} if silent[-1] and count > 1 else set())
    best, where = -math.inf, None
    for path in product(range(count), repeat=frames):
        if path[0] not in starts or path[-1] not in ends:
            continue
        total = log_likelihood[0, phones[path[0]]]
        for frame in range(1, frames):
            step = path[frame] - path[frame - 1]
            if step == 0:
                total += math.log(stay)
            elif step == 1 or (step == 2 and silent[path[frame] - 1]):
                total += math.log(1 - stay)
            else:
                total = -math.inf
                break
            total += log_likelihood[frame, phones[path[frame]]]
        if total > best:
            best, where = total, [phones[state] for state in path]
    return best, where


@pytest.mark.parametrize(
    "phones",
    [
        [3],
        [SILENCE],
        [3, 4],
        [SILENCE, 3, SILENCE],
        [3, SILENCE, 4],
        [SILENCE, 3, SILENCE, 4, SILENCE],
        [3, 3, 5],
        [SILENCE, 7],
    ],
)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_forced_alignment_is_the_best_of_all_paths(phones, frames):
    likelihood = np.random.default_rng(len(phones) + 10 * frames).normal(0, 2, (frames, COUNT))
    wanted, path = brute_force(likelihood, phones, 0.7)
    score, found = training.force_align(likelihood, phones, stay=0.7)
    assert score == pytest.approx(wanted, abs=1e-9)
    if path is not None:
        assert found.tolist() == path


def test_too_few_frames_have_no_path():
    assert training.force_align(np.zeros((2, COUNT)), [3, 4, 5])[0] == -math.inf


@pytest.mark.parametrize("change", [-0.5, -2.0, -30.0, 0.0])
def test_free_alignment_is_the_best_of_all_paths(change):
    likelihood = np.random.default_rng(0).normal(0, 2, (6, 3))

    def total(path):
        steps = sum(a != b for a, b in zip(path[1:], path, strict=False))
        return sum(likelihood[i, phone] for i, phone in enumerate(path)) + change * steps

    best = max(product(range(3), repeat=6), key=total)
    found = training.free_align(likelihood, change=change)
    assert total(found.tolist()) == pytest.approx(total(best), abs=1e-9)
    if change == -30:
        assert len(set(found.tolist())) == 1
    if change == 0:
        assert found.tolist() == likelihood.argmax(1).tolist()


def test_spelling_has_silence_around_every_word():
    phones = [PHONES[index] for index in training.spell("two nine")]
    assert phones == ["sil", "T", "UW", "sil", "N", "AY", "N", "sil"]
    for word in DIGITS:
        assert len(training.spell(word)) == 2 + len(DIGITS[word])


# ---- accuracies -------------------------------------------------------------------------------------------------


class Reads:
    """An encoder whose answer stands in the mel itself."""

    def logits(self, mel, mask):
        return mel[:, :COUNT]


def saying(phones, text=None, known=None):
    """Return an item in whose frames the encoder reads the given phones."""
    mel = torch.zeros(80, len(phones))
    mel[phones, torch.arange(len(phones))] = 8.0
    return Item(mel.half(), "x", "x", torch.tensor(phones if known is None else known), text)


def test_frame_accuracy_counts_known_frames():
    items = [
        saying([3, 3, 4, 5], known=[3, 3, 4, 6]),
        saying([7, 8], known=[-1, 8]),
        Item(torch.zeros(80, 9), "x", "x"),
    ]
    assert training.frame_accuracy(Reads(), items) == 4 / 5
    assert training.frame_accuracy(Reads(), []) == 0


def test_digit_accuracy_counts_words():
    def frames(word):
        return [index for index in training.spell(word) for _ in range(3)]

    items = [saying(frames(word), word) for word in DIGITS]
    assert training.digit_accuracy(Reads(), items) == 1
    assert training.digit_accuracy(Reads(), [*items[:3], saying(frames("two"), "six")]) == 3 / 4
    skipped = saying([index for index in training.spell("three") if index != SILENCE for _ in range(2)], "three")
    assert training.digit_accuracy(Reads(), [skipped]) == 1  # without any silence


def test_labels_come_from_the_text_where_there_is_one():
    told = [index for index in training.spell("one") for _ in range(4)]
    content = Reads()
    spoken = Item(saying(told).mel, "fsdd/a", "fsdd", None, "one")
    blurred = Item((0.2 * spoken.mel.float()).half(), "fsdd/a", "fsdd", None, "one")
    reader = Item(saying([3] * 10 + [4] * 10).mel, "librispeech/1", "librispeech")
    known = saying([5, 5])
    found = training.label(content, [spoken, blurred, reader, known])
    assert found[0].phones.tolist() == told
    assert set(found[1].phones.tolist()) <= set(training.spell("one"))
    assert found[2].phones.tolist() == [3] * 10 + [4] * 10
    assert found[3] is known
    # what was never taught is never an answer, and a phone that is everywhere in training counts less
    assert training.label(content, [reader], known=[saying([4] * 1000)])[0].phones.tolist() == [4] * 20
    doubtful = Item(saying([3] * 10 + [4] * 10).mel * 0.1, "librispeech/1", "librispeech")
    often = [saying([4] * 990 + [3] * 10)]
    assert 3 in training.label(content, [doubtful], known=often)[0].phones.tolist()
    assert (
        PHONES.index("spn")
        not in training.label(content, [Item(saying([PHONES.index("spn")] * 9).mel, "x", "x")])[0].phones
    )


def test_the_share_of_a_phone():
    items = [saying([3, 3, 4, 5]), saying([4, 4])]
    assert training.share_of(Reads(), items, PHONES[4]) == 1 / 2
    assert training.share_of(Reads(), items, "spn") == 0


# ---- the table --------------------------------------------------------------------------------------------------


def test_the_table_is_the_mean_over_the_frames_of_each_phone():
    items = [*make_items(lengths=(400, 300, 500)), Item(torch.full((80, 9), 99.0).half(), "x", "x")]
    found = training.phone_table(items, require_all=False)
    for phone in range(COUNT):
        frames = [
            item.mel[:, frame].double()
            for item in items
            if item.phones is not None
            for frame in range(item.mel.shape[1])
            if item.phones[frame] == phone
        ]
        wanted = torch.stack(frames).mean(0) if frames else found[SILENCE].double()
        assert torch.allclose(found[phone].double(), wanted, atol=1e-4)
    assert found.shape == (COUNT, 80)


def test_a_phone_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match="no frame of"):
        training.phone_table([saying([SILENCE, 3, 3])])
    with pytest.raises(ValueError) as caught:
        training.phone_table([saying([phone for phone in range(COUNT) if PHONES[phone] not in ("spn", "ZH")])])
    assert "ZH" in str(caught.value) and "spn" not in str(caught.value)


# ---- batches ----------------------------------------------------------------------------------------------------


def test_every_source_has_its_share():
    items = make_items()
    weights = training._source_weights(items, {"a": 0.3, "b": 0.7})
    assert float(weights.sum()) == pytest.approx(1)
    assert float(weights[1]) == pytest.approx(0.7)
    assert float(weights[0] / weights[2]) == pytest.approx(150 / 200)


@given(length=st.integers(2, 400), frames=st.integers(1, 200), reference=st.integers(1, 400), seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_what_is_rebuilt_and_what_is_heard_never_overlap(length, frames, reference, seed):
    item = Item(torch.zeros(1, length), "x", "x")
    own, other = training._pair(item, frames, reference, torch.Generator().manual_seed(seed))
    assert 0 <= own.start < own.stop <= length and 0 <= other.start < other.stop <= length
    assert own.stop <= other.start or other.stop <= own.start
    assert own.stop - own.start == min(frames, length // 2)
    assert other.stop - other.start <= reference
    rest = length - (own.stop - own.start)
    assert other.stop - other.start >= min(reference, rest // 2)  # the longer side is heard


@given(length=st.integers(1, 40), frames=st.integers(1, 60), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_crops_lie_inside(length, frames, seed):
    start = training.crop_start(length, frames, torch.Generator().manual_seed(seed))
    assert start == 0 if frames >= length else 0 <= start <= length - frames


def test_crops_reach_both_ends():
    generator = torch.Generator().manual_seed(0)
    assert {training.crop_start(10, 8, generator) for _ in range(100)} == {0, 1, 2}


def test_a_batch_for_the_score():
    items, content = make_items(), ContentEncoder(SMALL, table=torch.randn(COUNT, 80))
    weights = training._source_weights(items, HALF)
    batch = training.score_batch(
        items, weights, content, batch=5, frames=96, generator=torch.Generator().manual_seed(0)
    )
    heard = batch["reference"].shape[2]
    assert 120 <= heard <= 360
    assert batch["mel"].shape == batch["xbar"].shape == (5, 80, 96) and batch["mask"].shape == (5, 1, 96)
    assert batch["reference"].shape == batch["reference_xbar"].shape == (5, 80, heard)
    for name, mask in (
        ("mel", "mask"),
        ("xbar", "mask"),
        ("reference", "reference_mask"),
        ("reference_xbar", "reference_mask"),
    ):
        assert not batch[name].masked_select(batch[mask].expand_as(batch[name]) == 0).any()
        frames = batch[mask][:, 0]
        assert set(frames.unique().tolist()) <= {0.0, 1.0}
        assert bool((frames.diff(dim=1) <= 0).all())  # padded at the end
    assert bool((batch["mask"].sum((1, 2)) >= 45).all())  # half of the shortest utterance, at least
    again = training.score_batch(
        items, weights, content, batch=5, frames=96, generator=torch.Generator().manual_seed(0)
    )
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_the_prior_of_a_batch_is_in_the_voice_of_the_reference():
    (item,) = make_items((300,), ("a",))
    content = ContentEncoder(SMALL, table=torch.randn(COUNT, 80))
    batch = training.score_batch(
        [item], torch.ones(1), content, batch=1, frames=96, generator=torch.Generator().manual_seed(4)
    )
    mel = item.mel.float()

    def place(part, frames):
        (start,) = [s for s in range(301 - frames) if torch.equal(part, mel[:, s : s + frames])]
        return slice(start, start + frames)

    frames, heard = (int(batch[name].sum()) for name in ("mask", "reference_mask"))
    own, other = place(batch["mel"][0, :, :frames], frames), place(batch["reference"][0, :, :heard], heard)
    assert frames == 96 and (own.stop <= other.start or other.stop <= own.start)
    posterior = item.posterior.float()
    table = adapted_table(content.table, mel[None, :, other], torch.ones(1, 1, heard), posterior[None, :, other])
    wanted = torch.einsum("pt,pf->ft", posterior[:, own], table[0])
    assert torch.allclose(batch["xbar"][0, :, :96], wanted, atol=1e-4)


def test_the_spread_is_that_of_speech_around_its_prior():
    content = ContentEncoder(SMALL, table=torch.zeros(COUNT, 80))
    mel = torch.randn(80, 4000, generator=torch.Generator().manual_seed(0)).half() * 3
    item = Item(mel, "x", "a", posterior=torch.full((COUNT, 4000), 1 / COUNT).half())
    # the prior is the reference's mean, up to shrinkage: what is left is the spread of the frames
    assert training.spread_of([item], content, {"a": 1.0}) == pytest.approx(3, rel=0.02)


def test_posteriors_and_embeddings_are_added():
    items = make_items()
    content = ContentEncoder(SMALL).train()
    found = training.with_posteriors(content, items)
    for item, new in zip(items, found, strict=True):
        assert new.posterior.shape == (COUNT, item.mel.shape[1])
        assert torch.allclose(new.posterior.float().sum(0), torch.ones(item.mel.shape[1]), atol=5e-3)  # float16
        assert new.mel is item.mel

    class Teacher:
        def embed(self, wave, rate):
            return np.full(4, len(wave) / rate, dtype=np.float32)

    taught = training.with_embeddings(items, [np.zeros(16_000 * k) for k in (1, 2, 3)], Teacher())
    assert [float(item.voice[0]) for item in taught] == [1, 2, 3]
    with pytest.raises(ValueError):
        training.with_embeddings(items, [np.zeros(1)], Teacher())


def test_scales_are_those_of_the_frames():
    content = ContentEncoder(SMALL)
    items = make_items((5000,), ("a",))
    training.set_scale(content, items)
    assert content.mean.shape == content.std.shape == (80, 1)
    assert torch.allclose(content.mean, torch.full((80, 1), -5.0), atol=0.3)  # 1000 frames of spread 2: 5 deviations
    assert torch.allclose(content.std, torch.full((80, 1), 2.0), atol=0.25)


# ---- who learns -------------------------------------------------------------------------------------------------


def copy_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def names(module):
    return {name for name, _ in module.named_parameters()}


def test_the_content_encoder_learns_and_its_table_does_not():
    content = ContentEncoder(SMALL, table=torch.randn(COUNT, 80))
    before = copy_of(content)
    result = training.train_content(content, make_items(), steps=2, shares=HALF, batch=4, frames=60, precision="fp32")
    moved = changed(content, before)
    assert moved and moved <= names(content)
    assert "leave.weight" in moved
    assert result is not None


def test_the_voice_learns_towards_its_teacher():
    torch.manual_seed(0)
    voice, items = Voice(SMALL), make_items()
    before = copy_of(voice)
    training.train_voice(voice, items, steps=2, shares=HALF, batch=4, precision="fp32")
    moved = changed(voice, before)
    assert moved and moved <= names(voice)


def test_only_the_score_learns():
    torch.manual_seed(0)
    content, voice, decoder = ContentEncoder(SMALL, table=torch.randn(COUNT, 80)), Voice(SMALL), CompactDecoder(SMALL)
    model, items = DiffVC(content, decoder, preset="speech-16k"), make_items()
    before = [copy_of(part) for part in (content, voice, decoder)]
    training.train_score(model, voice, items, steps=2, shares=HALF, batch=4, frames=40, precision="fp32")
    assert not changed(content, before[0]) and not changed(voice, before[1])
    moved = changed(decoder, before[2])
    assert moved and moved <= names(decoder)


def test_training_is_repeatable():
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)
        voice = Voice(SMALL)
        training.train_voice(voice, make_items(), steps=2, shares=HALF, batch=4, seed=3, precision="fp32")
        outcomes.append(copy_of(voice))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])


def test_training_lowers_the_error():
    torch.manual_seed(0)
    content, voice, decoder = ContentEncoder(SMALL), Voice(SMALL), CompactDecoder(SMALL)
    model, items = DiffVC(content, decoder, preset="speech-16k"), make_items()
    before = training.score_error(model, voice, items, batches=1)
    assert before == training.score_error(model, voice, items, batches=1)  # fixed crops, times and noise
    training.train_score(
        model, voice, items, steps=60, shares=HALF, batch=8, frames=40, lr=1e-2, precision="fp32", ema=0.9
    )
    assert training.score_error(model, voice, items, batches=1) < before
