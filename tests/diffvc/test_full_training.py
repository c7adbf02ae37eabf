"""Training of the paper's networks from folders: layout, crops, a whole run at a tiny size, going on after a stop."""

import numpy as np
import pytest
import torch

from oral4.diffvc import corpus, full_training
from oral4.diffvc.align import espeak_say
from oral4.diffvc.audio import log_mel, write_wav
from oral4.diffvc.decoder import Decoder, DecoderConfig
from oral4.diffvc.encoder import AverageVoiceEncoder, EncoderConfig
from oral4.diffvc.experiment import TrainScoreConfig, run_train
from oral4.diffvc.full_training import CropDataset, FullTrainConfig, prepare, prepared, train_decoder, train_encoder
from oral4.diffvc.model import DiffVC
from oral4.errors import DataError

TINY = FullTrainConfig(
    encoder_epochs=2,
    decoder_epochs=1,
    encoder_batch=2,
    decoder_batch=2,
    precision="fp32",
    workers=0,
    checkpoint_every=1,
)


def write_textgrid(path, spans):
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {spans[-1].end_s}"]
    lines += ["tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"']
    lines += ['        name = "phones"', "        xmin = 0", f"        xmax = {spans[-1].end_s}"]
    lines += [f"        intervals: size = {len(spans)}"]
    for index, span in enumerate(spans, 1):
        lines += [
            f"        intervals [{index}]:",
            f"            xmin = {span.start_s}",
            f"            xmax = {span.end_s}",
        ]
        lines += [f'            text = "{span.phone}"']
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for voice in ("m3", "f2"):
        for number, text in enumerate(corpus.SENTENCES[:2]):
            wave, rate, spans = espeak_say(text, f"en-us+{voice}")
            (root / "wavs" / voice).mkdir(parents=True, exist_ok=True)
            (root / "textgrids" / voice).mkdir(parents=True, exist_ok=True)
            write_wav(root / "wavs" / voice / f"{voice}_{number}.wav", wave, rate)
            write_textgrid(root / "textgrids" / voice / f"{voice}_{number}.TextGrid", spans)
    prepare(root, lambda wave, rate: np.full(256, 1 / 16))
    return root


def tiny_encoder():
    torch.manual_seed(0)
    return AverageVoiceEncoder(EncoderConfig(channels=8, filters=8, num_heads=2, num_layers=1, postnet_dim=0))


def tiny_model():
    torch.manual_seed(0)
    return DiffVC(tiny_encoder(), Decoder(DecoderConfig(dim=8, g_dim=8)), preset="hifigan-22k")


def test_what_is_prepared(folder):
    places = prepared(folder)
    assert [place.mel.name for place in places] == ["f2_0_mel.npy", "f2_1_mel.npy", "m3_0_mel.npy", "m3_1_mel.npy"]
    wave = next(corpus.read_folder(folder)).wave
    assert np.array_equal(np.load(places[0].mel), log_mel(wave, "hifigan-22k").numpy())
    assert np.load(places[0].average).shape == np.load(places[0].mel).shape
    assert {place.speaker for place in prepared(folder, leave_out=["f2"])} == {"m3"}


def test_average_targets_share_their_columns_between_speakers(folder):
    """The same phone has the same column in two speakers: nothing of the speaker is left."""
    first, second = (np.load(place.average) for place in prepared(folder) if place.mel.name.endswith("_0_mel.npy"))
    columns = {tuple(np.round(column, 4)) for column in first.T} & {tuple(np.round(column, 4)) for column in second.T}
    assert len(columns) > 15  # most of the thirty phones of the sentence


def test_a_second_call_keeps_what_is_there(folder):
    place = prepared(folder)[0]
    before = place.embedding.stat().st_mtime_ns

    def never(wave, rate):
        raise AssertionError("embedded again")

    prepare(folder, never)
    assert place.embedding.stat().st_mtime_ns == before


def test_reference_and_crop_never_overlap(folder):
    data = CropDataset(prepared(folder), targets=False, frames=64)
    for epoch in range(5):
        data.epoch = epoch
        for item in (data[i] for i in range(len(data))):
            crop = item["mel"][:, item["mask"][0] > 0].T
            reference = item["reference"][:, item["reference_mask"][0] > 0].T
            assert torch.cdist(crop, reference).min() > 0


def test_the_official_crops_give_a_short_target_away(folder):
    data = CropDataset(prepared(folder), targets=False, frames=10_000, overlap=True)
    assert torch.equal(data[0]["mel"], data[0]["reference"])


def test_crops_depend_on_seed_epoch_and_index_alone(folder):
    places = prepared(folder)
    one, two = (CropDataset(places, targets=True, frames=32, seed=3) for _ in range(2))
    assert torch.equal(one[1]["mel"], two[1]["mel"])
    two.epoch = 1
    assert not torch.equal(one[1]["mel"], two[1]["mel"])
    assert one[1]["target"].shape == (80, 32)


def test_encoder_and_decoder_train(folder):
    encoder = tiny_encoder()
    start = [parameter.clone() for parameter in encoder.parameters()]
    result = train_encoder(encoder, prepared(folder), TINY)
    assert result.step == 4 and any(not torch.equal(a, b) for a, b in zip(start, encoder.parameters(), strict=True))
    model = tiny_model()
    frozen = [parameter.clone() for parameter in model.encoder.parameters()]
    assert train_decoder(model, prepared(folder), TINY).step == 2
    assert all(torch.equal(a, b) for a, b in zip(frozen, model.encoder.parameters(), strict=True))


def test_a_stopped_run_goes_on_to_the_same_weights(folder, tmp_path):
    whole, parted = tiny_encoder(), tiny_encoder()
    train_encoder(whole, prepared(folder), TINY, directory=tmp_path / "whole")
    train_encoder(
        parted, prepared(folder), TINY, directory=tmp_path / "parted", callbacks=[lambda row: row["step"] >= 2]
    )
    again = tiny_encoder()
    train_encoder(again, prepared(folder), TINY, directory=tmp_path / "parted", resume=True)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_command_needs_a_corpus():
    with pytest.raises(ValueError, match="--data DIR"):
        run_train(TrainScoreConfig.paper(), 0)


def test_the_experiment_runs_on_a_folder(folder, tmp_path, monkeypatch):
    from oral4.diffvc.speaker import SpeakerEncoder

    monkeypatch.setattr(SpeakerEncoder, "from_resemblyzer", classmethod(lambda cls: cls()))
    config = TrainScoreConfig(
        network="paper", trained_parts=False, data=str(folder), directory=str(tmp_path), full=TINY
    )
    found = run_train(config, 0, weights=tmp_path / "model.safetensors")
    assert np.isfinite(found["error"]) and (tmp_path / "model.safetensors").is_file()


def test_faults_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no recordings at wavs/<speaker>"):
        prepare(tmp_path, None)
    with pytest.raises(DataError, match="nothing prepared below mels/"):
        prepared(tmp_path)
    wave, rate, _ = espeak_say("one", "en-us")
    (tmp_path / "wavs" / "a").mkdir(parents=True)
    write_wav(tmp_path / "wavs" / "a" / "a_0.wav", wave, rate)
    with pytest.raises(DataError, match="no alignments at textgrids"):
        prepare(tmp_path, lambda wave, rate: np.zeros(256))
    with pytest.raises(DataError, match="no prepared utterance has an average-voice target"):
        CropDataset(prepared(tmp_path), targets=True)
    assert len(full_training.CropDataset(prepared(tmp_path), targets=False)) == 1
