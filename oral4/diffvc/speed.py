"""How long conversion takes on a CPU: our full-size network beside a plain one and the official one, and the compact one.

`plain_score` and `plain_convert` compute what our network computes from the same weights, the way the paper's figures
draw it: the speaker's condition as 128 more planes of the input, computed anew in every step; masks multiplied
everywhere; Mish from its formula. `run_speed` compares with these, `run_official_speed` with the official code, of which
you need a clone. Both are registered in `oral4.diffvc.experiment`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from oral4.diffusion.solvers import uniform_times
from oral4.diffvc import corpus
from oral4.diffvc.convert import shipped_converter
from oral4.diffvc.decoder import (
    Block,
    Decoder,
    DecoderConfig,
    GatedBlock,
    Level,
    RefBlock,
    ResnetBlock,
    Rezero,
    sinusoidal_embedding,
)
from oral4.diffvc.encoder import AverageVoiceEncoder, EncoderConfig
from oral4.diffvc.model import DiffVC, build, diffused_reference, load_official_state_dict
from oral4.errors import DataError
from oral4.measure.intervals import ratio_interval
from oral4.measure.timing import Timing, compare

__all__ = [
    "OFFICIAL_SPEED_BETTER",
    "OFFICIAL_SPEED_TOLERANCE",
    "OFFICIAL_SPEED_UNITS",
    "OFFICIAL_VARIABLE",
    "SPEED_BETTER",
    "SPEED_TOLERANCE",
    "SPEED_UNITS",
    "OfficialSpeedConfig",
    "SpeedConfig",
    "official_model",
    "official_package",
    "plain_convert",
    "plain_score",
    "relative_difference",
    "run_official_speed",
    "run_speed",
    "threads",
]

OFFICIAL_VARIABLE = "ORAL4_OFFICIAL_DIFFVC"
"""Environment variable that holds the path of a clone of the official repository."""

LARGEST_DIFFERENCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Size of the measurement."""

    size: Literal["paper", "mini"] = "paper"
    "Which network: of 126 million parameters, or a small one to test the code."
    frames: int = 128
    "Frames of source and reference: 1.5 s at 22 kHz."
    num_steps: int = 6
    "Reverse steps of a conversion."
    step_repeats: int = 5
    "Repeats of one step."
    repeats: int = 3
    "Repeats of a conversion."
    compact_repeats: int = 5
    "Repeats of a conversion by the compact converter."
    clock: Literal["wall", "cpu"] = "wall"
    "Which clock, see :func:`oral4.measure.timing.timeit`; the compact converter's is always the wall's."

    @classmethod
    def smoke(cls) -> SpeedConfig:
        """Run everything once with small networks."""
        return cls(size="mini", frames=16, num_steps=2, step_repeats=1, repeats=1, compact_repeats=1)

    @classmethod
    def mini(cls) -> SpeedConfig:
        """Measure the paper's network: about two minutes on one core."""
        return cls()


@dataclass(frozen=True, kw_only=True)
class OfficialSpeedConfig(SpeedConfig):
    """Size of the measurement beside the official code."""

    official: str = ""
    "Folder of a clone of huawei-noah/Speech-Backbones; by default the one that ``ORAL4_OFFICIAL_DIFFVC`` names."

    @classmethod
    def smoke(cls) -> OfficialSpeedConfig:
        """Run everything once with small networks."""
        return cls(size="mini", frames=16, num_steps=2, step_repeats=1, repeats=1)

    @classmethod
    def mini(cls) -> OfficialSpeedConfig:
        """Measure the paper's network: about two minutes on one core."""
        return cls()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads in a ``with`` block.

    Examples
    --------
    >>> with threads(2):
    ...     torch.get_num_threads()
    2
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, in units of the largest value of ``wanted``.

    Examples
    --------
    >>> relative_difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0]))
    0.20000000298023224
    """
    return float((found - wanted).abs().max() / wanted.abs().max())


# ---- the plain network --------------------------------------------------------------------------------------------


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(functional.softplus(x))


def _plain_block(block: Block, x: Tensor, mask: Tensor) -> Tensor:
    norm = block.norm
    hidden = block.conv(x * mask)
    return _mish(functional.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)) * mask


def _plain_resnet(block: ResnetBlock, x: Tensor, time: Tensor, mask: Tensor) -> Tensor:
    hidden = _plain_block(block.first, x, mask) + block.time(_mish(time))[:, :, None, None]
    hidden = _plain_block(block.second, hidden, mask)
    return hidden + (x * mask if block.shortcut is None else block.shortcut(x * mask))


def _plain_attention(rezero: Rezero, x: Tensor) -> Tensor:
    layer: Any = rezero.layer
    batch, _, bands, frames = x.shape
    q, k, v = layer.to_qkv(x).reshape(batch, 3, layer.heads, -1, bands * frames).unbind(1)
    summary = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    seen = torch.einsum("bhde,bhdn->bhen", summary, q)
    return x + rezero.gate * layer.to_out(seen.reshape(batch, -1, bands, frames))


def _plain_reference(block: RefBlock, y: Tensor, mask: Tensor, time: Tensor) -> Tensor:
    hidden = y[:, None]
    for index, part in enumerate(block.blocks):
        assert isinstance(part, GatedBlock)
        hidden = part.conv(hidden * mask)
        hidden = functional.glu(functional.instance_norm(hidden, weight=part.norm.weight, bias=part.norm.bias), 1)
        if index == 1:
            hidden = hidden + block.time_first(_mish(time))[:, :, None, None]
        elif index == 3:
            hidden = hidden + block.time_second(_mish(time))[:, :, None, None]
    hidden = block.out(hidden * mask) * mask
    return hidden.sum((2, 3)) / (mask.sum((2, 3)) * y.shape[1])


def plain_score(
    decoder: Decoder, x: Tensor, mask: Tensor, xbar: Tensor, y: Tensor, y_mask: Tensor, voice: Tensor, t: Tensor
) -> Tensor:
    """Return the score by the plain network, with the weights of ours.

    Parameters
    ----------
    decoder : Decoder
        With the condition ``"wodyn"``, as the published checkpoints have it.
    x, xbar : Tensor, shape (B, F, T)
        State and average voice; T divides by the network's ``time_multiple``.
    mask : Tensor, shape (B, 1, T)
    y : Tensor, shape (B, F, R)
        The reference at time t.
    y_mask : Tensor, shape (B, 1, R)
    voice : Tensor, shape (B, E)
    t : Tensor, shape (B,)

    Returns
    -------
    Tensor, shape (B, F, T)

    Examples
    --------
    >>> from oral4.diffvc.decoder import DecoderConfig
    >>> decoder, x, mask, t = Decoder(DecoderConfig.mini()), torch.randn(1, 80, 8), torch.ones(1, 1, 8), torch.ones(1)
    >>> score = plain_score(decoder, x, mask, x, x, mask, torch.zeros(1, 256), t)
    >>> ours = decoder(x, mask, x, decoder.condition(torch.zeros(1, 256), t, x, mask), t)
    >>> relative_difference(ours, score) < 1e-4
    True
    """
    if decoder.needs_reference != "point":
        raise ValueError(f"the decoder's condition is {decoder.config.condition!r}; the plain network is of 'wodyn'")
    unet, speaker = decoder.unet, decoder.speaker
    embedded = sinusoidal_embedding(t, decoder.config.dim)
    time = unet.time_mlp(embedded)
    plane, plane_mask = torch.stack([xbar, x], 1), mask[:, None]
    seen = _plain_reference(speaker.reference, y, y_mask[:, None], time)
    g = speaker.mlp(torch.cat([embedded, seen, voice], 1))
    hidden = torch.cat([plane, g[:, :, None, None].repeat(1, 1, *plane.shape[2:])], 1)  # (B, 2 + G, F, T)

    skips, masks = [], [plane_mask]
    for level in unet.downs:
        assert isinstance(level, Level)
        hidden = _plain_resnet(level.first, hidden, time, masks[-1])
        hidden = _plain_resnet(level.second, hidden, time, masks[-1])
        hidden = _plain_attention(level.attention, hidden)
        skips.append(hidden)
        if level.resample is not None:
            hidden = level.resample(hidden * masks[-1])
            masks.append(masks[-1][..., ::2])
    hidden = _plain_resnet(unet.mid_first, hidden, time, masks[-1])
    hidden = _plain_attention(unet.mid_attention, hidden)
    hidden = _plain_resnet(unet.mid_second, hidden, time, masks[-1])
    for level in unet.ups:
        assert isinstance(level, Level) and level.resample is not None
        here = masks.pop()
        hidden = torch.cat([hidden, skips.pop()], 1)
        hidden = _plain_resnet(level.first, hidden, time, here)
        hidden = _plain_resnet(level.second, hidden, time, here)
        hidden = level.resample(_plain_attention(level.attention, hidden) * here)
    hidden = _plain_block(unet.final_block, hidden, plane_mask)
    return (unet.final_conv(hidden * plane_mask) * plane_mask)[:, 0]


@torch.no_grad()
def plain_convert(
    model: DiffVC, mel: Tensor, mask: Tensor, voice: Tensor, reference: Tensor, reference_mask: Tensor, noise: Tensor
) -> Tensor:
    """Return a conversion by the plain network and the maximum-likelihood step in the paper's letters.

    Parameters
    ----------
    model : DiffVC
        Gives the encoder, as it is, and the decoder's weights.
    mel, reference : Tensor, shape (B, F, T) and (B, F, R)
    mask, reference_mask : Tensor, shape (B, 1, T) and (B, 1, R)
    voice : Tensor, shape (B, E)
    noise : Tensor, shape (N + 1, B, F, T)
        The start's, then that of each of N steps.

    Returns
    -------
    Tensor, shape (B, F, T)
    """
    decoder, sde, steps = model.decoder, model.sde, len(noise) - 1
    assert isinstance(decoder, Decoder)
    xbar, reference_xbar = model.average_voice(mel, mask), model.average_voice(reference, reference_mask)
    kept = float(sde.a(1.0))
    x = (kept * mel + (1 - kept) * xbar + math.sqrt(float(sde.v(1.0))) * noise[0]) * mask

    def gamma(s: float, t: float, power: float = 1.0) -> float:
        return math.exp(-0.5 * power * (t - s) * (0.05 + 0.5 * 19.95 * (s + t)))

    h = 1 / steps
    for step in range(steps):
        t = 1 - step * h
        s, beta = max(0.0, t - h), 0.05 + 19.95 * t
        far, near, between = (1 - gamma(start, end, 2) for start, end in ((0, t), (0, s), (s, t)))
        mu, nu = gamma(s, t) * near / far, gamma(0, s) * between / far
        kappa = nu * far / (gamma(0, t) * beta * h) - 1
        omega = (mu - 1) / (beta * h) + (1 + kappa) / far - 0.5
        times = torch.full((len(mel),), t)
        y = diffused_reference(reference, reference_xbar, times, sde, False) * reference_mask
        score = plain_score(decoder, x, mask, xbar, y, reference_mask, voice, times)
        change = (0.5 + omega) * (x - xbar) + (1 + kappa) * score
        x = (x + beta * h * change + math.sqrt(near * between / far) * noise[step + 1]) * mask
    return x


# ---- what is measured ---------------------------------------------------------------------------------------------


def _open_gates(model: nn.Module, gate: float = 0.05) -> None:
    """Open the attention's gates, which are 0 in a network that has learnt nothing: its result would be thrown away."""
    for name, parameter in model.named_parameters():
        if name.endswith((".gate", ".fn.g")):
            nn.init.constant_(parameter, gate)


def _inputs(config: SpeedConfig, seed: int, bands: int = 80) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, bands, config.frames)
    mask = torch.ones(1, 1, config.frames)
    return {
        "mel": torch.randn(shape, generator=generator),
        "mask": mask,
        "voice": functional.normalize(torch.randn(1, 256, generator=generator), dim=1),
        "reference": torch.randn(shape, generator=generator),
        "reference_mask": mask,
        "noise": torch.randn((config.num_steps + 1, *shape), generator=generator),
    }


def _model(config: SpeedConfig, seed: int) -> DiffVC:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.size == "paper":
            model = build("paper")
        else:  # with a PostNet, without which there is no official network
            model = DiffVC(AverageVoiceEncoder(replace(EncoderConfig.mini(), postnet_dim=16)), Decoder(DecoderConfig.mini()))
    model.eval()
    _open_gates(model)
    return model


def _agree(what: str, found: Tensor, wanted: Tensor) -> float:
    """Return the relative difference of two outcomes, or refuse to compare the times of two things that differ."""
    difference = relative_difference(found, wanted)
    if not difference < LARGEST_DIFFERENCE:  # also NaN
        raise AssertionError(f"{what}: the two differ by {difference:.2g} of the largest value; {LARGEST_DIFFERENCE} is allowed")
    return difference


def _step(model: DiffVC, given: dict[str, Tensor], t: float) -> Tensor:
    """Return the score at one time, the speaker's condition included."""
    mel, time = given["mel"], torch.full((1,), t)
    g = model.conditions(given["voice"], given["reference"], given["reference_mask"], [t], reference_xbar=given["reference"])
    return model.decoder(mel, given["mask"], mel, g[0], time)


def _convert(model: DiffVC, given: dict[str, Tensor], steps: int) -> Tensor:
    return model.sample(num_steps=steps, **given)  # type: ignore[arg-type]


def _ratio(slow: Timing, fast: Timing) -> float:
    """Return the median over the rounds of how many times as long the first takes."""
    return float(ratio_interval(slow.seconds, fast.seconds).estimate)


def _side_by_side(
    config: SpeedConfig, name: str, step: Sequence[Callable[[], Tensor]], whole: Sequence[Callable[[], Tensor]]
) -> dict[str, float]:
    """Compare our step and conversion (first of each) with another's; refuse if they compute something else."""
    found = {"step_difference": _agree("one step", step[0](), step[1]())}  # which is the warm-up as well
    steps = compare(dict(zip(("ours", name), step, strict=True)), config.step_repeats, warmup=0, clock=config.clock)
    found["convert_difference"] = _agree("the whole conversion", whole[0](), whole[1]())
    wholes = compare(dict(zip(("ours", name), whole, strict=True)), config.repeats, warmup=0, clock=config.clock)
    for kind, times in (("step", steps), ("convert", wholes)):
        found[f"{kind}_s"], found[f"{name}_{kind}_s"] = times["ours"].median, times[name].median
        found[f"{kind}_ratio"] = _ratio(times[name], times["ours"])
    return found


@torch.no_grad()
def run_speed(config: SpeedConfig, seed: int) -> dict[str, float]:
    """Time our network beside the plain one, and the compact converter, on this machine's CPU.

    Parameters
    ----------
    config : SpeedConfig
    seed : int
        Of weights and inputs, which do not change the times.

    Returns
    -------
    dict
        The keys of `SPEED_UNITS`: medians over the repeats, on one thread, batch of one. ``step_s`` and ``convert_s``:
        one score with the speaker's condition, and a whole conversion with the encoder, by our network;
        ``plain_*``: by `plain_score` and `plain_convert`; ``*_ratio``: how many times as long those take, round by
        round; ``*_difference``: how far the two results are apart, of the largest value. ``conditions_s``: the
        condition at all times in one batch, ``conditions_single_s``: one by one. ``full_rtf``: ``convert_s`` by the
        seconds of sound, without vocoder. ``compact_rtf_1`` and ``compact_rtf_2``: seconds for each second of sound by the
        converter that ships, vocoder included, on one and on two threads.

    Raises
    ------
    AssertionError
        If the two networks do not give the same result to 1e-3.
    """
    model, given = _model(config, seed), _inputs(config, seed)
    decoder: Any = model.decoder
    mel, reference, mask, voice = given["mel"], given["reference"], given["mask"], given["voice"]
    time = torch.full((1,), 0.5)
    seen = diffused_reference(reference, reference, time, model.sde, False)
    times = uniform_times(config.num_steps)[:-1]
    with threads(1):
        found = _side_by_side(
            config,
            "plain",
            (lambda: _step(model, given, 0.5), lambda: plain_score(decoder, mel, mask, mel, seen, mask, voice, time)),
            (lambda: _convert(model, given, config.num_steps), lambda: plain_convert(model, **given)),
        )
        batched = compare(
            {
                "conditions": lambda: model.conditions(voice, reference, mask, times, reference_xbar=reference),
                "conditions_single": lambda: [
                    model.conditions(voice, reference, mask, [t], reference_xbar=reference) for t in times
                ],
            },
            config.step_repeats,
            clock=config.clock,
        )
    found |= {f"{name}_s": timing.median for name, timing in batched.items()}
    found["full_rtf"] = found["convert_s"] * 22_050 / (256 * config.frames)
    return found | _compact(config)


def _compact(config: SpeedConfig) -> dict[str, float]:
    """Return the real-time factors of the converter that ships, on one thread and on two."""
    source, target = corpus.espeak_speech(corpus.HELD_OUT_ESPEAK[:2], corpus.SENTENCES[:1])
    converter = shipped_converter("cpu")
    voice = converter.voice_print((target.wave, target.rate))

    def convert(number: int) -> None:
        with threads(number):
            converter.convert((source.wave, source.rate), voice, steps=6)

    times = compare({"1": lambda: convert(1), "2": lambda: convert(2)}, config.compact_repeats, clock="wall")
    return {f"compact_rtf_{number}": timing.median / source.seconds for number, timing in times.items()}


# ---- the official network -----------------------------------------------------------------------------------------


def _official_folder(official: str) -> Path:
    """Return the folder DiffVC of the clone."""
    given = official or os.environ.get(OFFICIAL_VARIABLE, "")
    if not given:
        raise DataError(
            "the official code is not part of this library: git clone https://github.com/huawei-noah/Speech-Backbones, "
            f"then set {OFFICIAL_VARIABLE} to its folder"
        )
    for folder in (Path(given), Path(given) / "DiffVC"):
        if (folder / "model" / "diffusion.py").is_file():
            return folder
    raise DataError(f"{given}: no DiffVC/model/diffusion.py in it; give the folder of a clone of Speech-Backbones")


@contextmanager
def official_package(official: str = "") -> Iterator[ModuleType]:
    """Import the official package ``model`` for the length of a ``with`` block.

    It asks for torchaudio, of which only Griffin-Lim needs anything: an empty module stands in for it. Both names are
    free again afterwards.

    Parameters
    ----------
    official : str
        Folder of the clone; ``$ORAL4_OFFICIAL_DIFFVC`` if empty.

    Raises
    ------
    DataError
        If there is no clone, or einops, which the official code needs, is not installed.
    """
    folder = _official_folder(official)

    def taken() -> dict[str, ModuleType]:
        return {name: each for name, each in sys.modules.items() if name.split(".")[0] in ("model", "torchaudio")}

    before = taken()
    for name in before:
        del sys.modules[name]
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("model")
    except ModuleNotFoundError as error:
        raise DataError(f"the official code needs {error.name}: pip install {error.name}") from error
    finally:
        sys.path.remove(str(folder))
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)


def official_model(package: ModuleType, model: DiffVC) -> nn.Module:
    """Return the official network of the size of ours, and give ours its random weights."""
    encoder, decoder = model.encoder, model.decoder
    assert isinstance(encoder, AverageVoiceEncoder) and isinstance(decoder, Decoder)
    sizes = encoder.config
    official = package.DiffVC(
        sizes.num_mels, sizes.channels, sizes.filters, sizes.num_heads, sizes.num_layers, sizes.kernel, sizes.dropout,
        sizes.window, sizes.postnet_dim, decoder.config.g_dim, True, decoder.config.dim, 0.05, 20.0,
    )  # fmt: skip
    _open_gates(official)
    load_official_state_dict(model, official.state_dict())
    return official.eval()


@torch.no_grad()
def run_official_speed(config: OfficialSpeedConfig, seed: int) -> dict[str, float]:
    """Time our network beside the official one, with the same weights and the same noise.

    Parameters
    ----------
    config : OfficialSpeedConfig
    seed : int

    Returns
    -------
    dict
        The keys of `OFFICIAL_SPEED_UNITS`, as in `run_speed`, with ``official_*`` instead of ``plain_*``.

    Raises
    ------
    DataError
        If there is no clone of the official code.
    AssertionError
        If the two networks do not give the same result to 1e-3.
    """
    with official_package(config.official) as package:
        model, given = _model(config, seed), _inputs(config, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            official: Any = official_model(package, model)
        mel, reference, mask, voice = given["mel"], given["reference"], given["mask"], given["voice"]
        seen = diffused_reference(reference, reference, torch.full((1,), 0.5), model.sde, False)
        length = torch.tensor([config.frames])

        def convert() -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return official(mel, length, reference, length, voice, config.num_steps, "ml")[1]

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what the official code draws; it subtracts the noise of its steps
            drawn = [torch.randn_like(mel) for _ in range(config.num_steps + 1)]
        given["noise"] = torch.stack([drawn[0], *(-each for each in drawn[1:])])
        with threads(1):
            return _side_by_side(
                config,
                "official",
                (
                    lambda: _step(model, given, 0.5),
                    lambda: official.decoder.estimator(mel, mask, mel, seen[:, None], mask, voice, torch.full((1,), 0.5)),
                ),
                (lambda: _convert(model, given, config.num_steps), convert),
            )


_BOTH = {"step_s": "s", "convert_s": "s", "step_ratio": "", "convert_ratio": "", "step_difference": "", "convert_difference": ""}

SPEED_UNITS: dict[str, str] = {
    **_BOTH,
    "plain_step_s": "s",
    "plain_convert_s": "s",
    "conditions_s": "s",
    "conditions_single_s": "s",
    "full_rtf": "",
    "compact_rtf_1": "",
    "compact_rtf_2": "",
}
"""Every value that `run_speed` returns, with its unit."""

SPEED_BETTER: dict[str, str] = {
    **dict.fromkeys(("step_s", "convert_s", "step_difference", "convert_difference", "conditions_s"), "lower"),
    **dict.fromkeys(("full_rtf", "compact_rtf_1", "compact_rtf_2"), "lower"),
    **dict.fromkeys(("step_ratio", "convert_ratio"), "higher"),
}
"""Which way is better, where one is."""

SPEED_TOLERANCE: dict[str, float] = {"step_ratio": 0.15, "convert_ratio": 0.15}
"""How far a repetition may be off, relatively: of times, which are another machine's, only the ratios are compared."""

OFFICIAL_SPEED_UNITS: dict[str, str] = {**_BOTH, "official_step_s": "s", "official_convert_s": "s"}
"""Every value that `run_official_speed` returns, with its unit."""

OFFICIAL_SPEED_BETTER: dict[str, str] = {
    **dict.fromkeys(("step_s", "convert_s", "step_difference", "convert_difference"), "lower"),
    **dict.fromkeys(("step_ratio", "convert_ratio"), "higher"),
}
"""Which way is better, where one is."""

OFFICIAL_SPEED_TOLERANCE: dict[str, float] = {"step_ratio": 0.15, "convert_ratio": 0.15}
"""As for `SPEED_TOLERANCE`."""
