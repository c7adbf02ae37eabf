"""The measurement of speed: what is timed computes the same thing, and says so if it does not."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from oral4.diffvc import speed
from oral4.diffvc.decoder import Decoder, DecoderConfig
from oral4.diffvc.encoder import AverageVoiceEncoder, EncoderConfig
from oral4.diffvc.model import DiffVC
from oral4.diffvc.speed import (
    OFFICIAL_SPEED_BETTER,
    OFFICIAL_SPEED_TOLERANCE,
    OFFICIAL_SPEED_UNITS,
    OFFICIAL_VARIABLE,
    SPEED_BETTER,
    SPEED_TOLERANCE,
    SPEED_UNITS,
    OfficialSpeedConfig,
    SpeedConfig,
    _agree,
    _inputs,
    _model,
    official_model,
    official_package,
    plain_convert,
    plain_score,
    relative_difference,
    run_official_speed,
    run_speed,
    threads,
)
from oral4.errors import DataError
from oral4.measure.experiment import Experiment
from oral4.measure.timing import Timing

SMALL = SpeedConfig.smoke()


@pytest.fixture(scope="module")
def model():
    return _model(SMALL, 0)


@pytest.fixture(scope="module")
def found():
    with pytest.warns(UserWarning, match="multiplies the state"):  # two steps are few
        return run_speed(SMALL, 0)


# ---- the run ------------------------------------------------------------------------------------------------------


def test_every_value_has_a_unit_and_is_sane(found):
    assert set(found) == set(SPEED_UNITS)
    assert all(math.isfinite(value) and value > 0 for name, value in found.items() if "difference" not in name)
    assert 0 <= found["step_difference"] < 1e-4 and 0 <= found["convert_difference"] < 1e-4
    assert found["full_rtf"] == pytest.approx(found["convert_s"] / (16 * 256 / 22_050))
    experiment = Experiment(
        name="diffvc/speed",
        summary="Speed",
        config=SpeedConfig,
        run=run_speed,
        units=SPEED_UNITS,
        better=SPEED_BETTER,
        tolerance=SPEED_TOLERANCE,
    )  # which checks that the parts speak of the same values
    assert experiment.scales() == ("smoke", "mini")
    official = Experiment(
        name="diffvc/official_speed",
        summary="Speed",
        config=OfficialSpeedConfig,
        run=run_official_speed,
        units=OFFICIAL_SPEED_UNITS,
        better=OFFICIAL_SPEED_BETTER,
        tolerance=OFFICIAL_SPEED_TOLERANCE,
    )
    assert official.scales() == ("smoke", "mini")


def test_a_faster_thing_that_computes_something_else_is_not_timed(monkeypatch):
    honest = plain_score
    monkeypatch.setattr(speed, "plain_score", lambda *given: 1.002 * honest(*given))
    with pytest.raises(AssertionError, match=r"one step: the two differ by 0\.002"):
        run_speed(SMALL, 0)


def test_differences_are_relative_to_the_largest_value():
    wanted = torch.tensor([1.0, -10.0])
    assert _agree("a", wanted + torch.tensor([0.009, 0.0]), wanted) == pytest.approx(0.0009, rel=1e-4)
    for wrong in (wanted + 0.011, wanted * float("nan")):
        with pytest.raises(AssertionError, match="a: the two differ"):
            _agree("a", wrong, wanted)


def test_the_ratio_is_taken_round_by_round():
    """A machine that is slower for a while does not move it."""
    slow, fast = Timing((2.0, 20.0, 4.0), "wall"), Timing((1.0, 10.0, 2.0), "wall")
    assert speed._ratio(slow, fast) == 2.0


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_the_gates_are_open(model):
    """Closed ones would hide a difference of the attention, and let a compiler drop it."""
    gates = [value.item() for name, value in model.named_parameters() if name.endswith("gate")]
    assert len(gates) == 6 and all(gate == pytest.approx(0.05) for gate in gates)


# ---- the plain network --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("t", [0.01, 0.5, 1.0])
def test_the_plain_network_is_ours(model, t):
    given = _inputs(replace(SMALL, frames=20), 1)
    x, mask, time = given["mel"], given["mask"], torch.tensor([t])
    y, y_mask = torch.randn(1, 80, 13), torch.ones(1, 1, 13)
    g = model.decoder.condition(given["voice"], time, y, y_mask)
    ours = model.decoder(x, mask, 0.3 * x, g, time)
    plain = plain_score(model.decoder, x, mask, 0.3 * x, y, y_mask, given["voice"], time)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)  # float32, forty layers


@torch.no_grad()
def test_the_plain_network_sees_the_padding_as_the_official_code_does():
    """With padding the two agree only if ours is told to look at it as well."""
    torch.manual_seed(0)
    x, y, voice, t = torch.randn(2, 80, 16), torch.randn(2, 80, 12), torch.randn(2, 256), torch.tensor([0.2, 0.7])
    mask = torch.ones(2, 1, 16)
    mask[1, :, 12:] = 0
    y_mask = torch.ones(2, 1, 12)
    y_mask[0, :, 9:] = 0
    decoder = Decoder(DecoderConfig.mini(compat_padding=True)).eval()
    speed._open_gates(decoder)
    ours = decoder(x, mask, x, decoder.condition(voice, t, y, y_mask), t)
    plain = plain_score(decoder, x, mask, x, y, y_mask, voice, t)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert bool((plain[1, :, 12:] == 0).all())
    masked = Decoder(DecoderConfig.mini()).eval()
    masked.load_state_dict(decoder.state_dict())
    other = masked(x, mask, x, masked.condition(voice, t, y, y_mask), t)
    assert float((other - plain).abs().max()) > 0.01


@pytest.mark.parametrize("steps", [4, 6])
def test_the_plain_conversion_is_ours(model, steps):
    given = _inputs(replace(SMALL, num_steps=steps), 2)
    ours = model.sample(num_steps=steps, **given)
    # float32; the steps multiply rounding by 150 altogether, and what they multiply is of that size as well
    assert relative_difference(ours, plain_convert(model, **given)) < 1e-4
    other = {**given, "noise": given["noise"].flip(0)}
    assert relative_difference(ours, plain_convert(model, **other)) > 0.1


def test_a_decoder_of_another_condition_is_refused():
    decoder = Decoder(DecoderConfig.mini("d-only"))
    x = torch.zeros(1, 80, 4)
    with pytest.raises(ValueError, match="condition is 'd-only'; the plain network is of 'wodyn'"):
        plain_score(decoder, x, torch.ones(1, 1, 4), x, x, torch.ones(1, 1, 4), torch.zeros(1, 256), torch.ones(1))


# ---- the official network -----------------------------------------------------------------------------------------


def test_without_a_clone_the_run_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(OFFICIAL_VARIABLE, raising=False)
    with pytest.raises(DataError, match=f"git clone .*Speech-Backbones, then set {OFFICIAL_VARIABLE}"):
        run_official_speed(OfficialSpeedConfig.smoke(), 0)
    monkeypatch.setenv(OFFICIAL_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"no DiffVC/model/diffusion\.py in it"):
        run_official_speed(OfficialSpeedConfig.smoke(), 0)


def clone(folder, source):
    """Write a package in the place and with the imports of the official one."""
    package = folder / "DiffVC" / "model"
    package.mkdir(parents=True)
    (package / "diffusion.py").write_text("import torchaudio\nNAME = 'here'\n")
    (package / "__init__.py").write_text(source)
    return folder


@pytest.mark.parametrize("part", ["", "DiffVC"])
def test_the_package_is_imported_and_forgotten(tmp_path, monkeypatch, part):
    monkeypatch.setitem(sys.modules, "model", ModuleType("model"))  # someone else's
    mine, path = sys.modules["model"], list(sys.path)
    folder = clone(tmp_path, "from model.diffusion import NAME\n")
    with official_package(str(folder / part)) as package:
        assert package.NAME == "here" and package is not mine
    assert sys.modules["model"] is mine and sys.path == path
    assert "model.diffusion" not in sys.modules and "torchaudio" not in sys.modules


def test_the_environment_names_the_clone(tmp_path, monkeypatch):
    monkeypatch.setenv(OFFICIAL_VARIABLE, str(clone(tmp_path, "from model.diffusion import NAME\n")))
    with official_package() as package:
        assert package.NAME == "here"


def test_a_missing_package_of_the_official_code_is_named(tmp_path):
    path = list(sys.path)
    clone(tmp_path, "import a_package_that_nobody_has\n")
    with (
        pytest.raises(DataError, match="needs a_package_that_nobody_has: pip install a_package_that_nobody_has"),
        official_package(str(tmp_path)),
    ):
        pass
    assert sys.path == path and "model" not in sys.modules


def test_the_official_network_is_asked_for_at_our_size_and_ours_gets_its_weights():
    """A stand-in with the official signature and names; `tests/diffvc/test_model.py` holds the true one's outcomes."""
    asked = []
    encoder = AverageVoiceEncoder(replace(EncoderConfig.mini(), postnet_dim=16))
    model = DiffVC(encoder, Decoder(DecoderConfig.mini()))
    names = speed_names(model)

    class Official(torch.nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            asked.append(sizes)

        def state_dict(self):
            return {theirs: torch.full_like(model.state_dict()[ours], 0.25) for ours, theirs in names.items()}

    package = ModuleType("model")
    package.DiffVC = Official
    official_model(package, model)
    sizes = encoder.config
    encoder_sizes = (sizes.channels, sizes.filters, sizes.num_heads, sizes.num_layers, sizes.kernel, sizes.dropout)
    assert asked == [(80, *encoder_sizes, sizes.window, 16, 32, True, 32, 0.05, 20.0)]
    assert all(bool((value == 0.25).all()) for value in model.state_dict().values())


def speed_names(model):
    from oral4.diffvc.decoder import official_names

    names = {f"decoder.{ours}": f"decoder.{theirs}" for ours, theirs in official_names(model.decoder.config).items()}
    return names | {f"encoder.{name}": f"encoder.{name}" for name in model.encoder.state_dict()}
