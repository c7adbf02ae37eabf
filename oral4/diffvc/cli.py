"""The command of this chapter: ``oral4 convert`` says one recording's words in another recording's voice."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]

NOTICE = (
    "Convert only voices of people who have agreed to it, and say of the outcome that it is synthetic. "
    "Nothing marks the sound itself."
)

FITNESS = (
    "The converter that ships was trained on about an hour of real English speech and some synthetic voices, at 16 kHz. "
    "It is good for learning and for trying the method, not for a product: expect a rough sound and lost intonation."
)


def convert(
    source: Annotated[Path, typer.Argument(help="Recording whose words are kept: wav, flac, ogg or mp3.")],
    references: Annotated[
        list[Path],
        typer.Argument(help="One or several recordings of the person whose voice it shall be, or a saved .voice file."),
    ],
    out: Annotated[Path, typer.Option(help="The WAV file to write.")] = Path("converted.wav"),
    steps: Annotated[int, typer.Option(help="Reverse steps, at least 1.")] = 6,
    solver: Annotated[str, typer.Option(help="ml, em, pf, reverse, ddim, heun, dpmpp_2m or unipc_2.")] = "ml",
    seed: Annotated[int, typer.Option(help="Of all noise; the same seed gives the same sound.")] = 0,
    temperature: Annotated[float, typer.Option(help="Factor of the noise: 0 none, 1 the model's law.")] = 0.5,
    guidance: Annotated[float, typer.Option(help="How strongly the voice is asked for; 1 is plain.")] = 1.0,
    save_voice: Annotated[
        Path | None, typer.Option(help="Keep the voice print in this file, for later use as a reference.")
    ] = None,
    mix: Annotated[
        float | None, typer.Option(help="Share of the second reference, 0 to 1: a voice between two people.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw source, prior and outcome into this picture.")] = None,
) -> None:
    """Say the words of SOURCE in the voice of REFERENCES."""
    from oral4.diffvc.audio import AudioWarning
    from oral4.diffvc.convert import VoicePrint, shipped_converter  # torch: not for `oral4 --help`

    if out.suffix.lower() != ".wav":
        raise typer.BadParameter(f"--out {out}: a name that ends in .wav is needed")
    if mix is not None and len(references) != 2:
        raise typer.BadParameter(f"--mix needs two references, not {len(references)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converter = shipped_converter()

        def voice(path: Path) -> VoicePrint:
            return VoicePrint.load(path) if path.suffix == ".voice" else converter.voice_print(path)

        if mix is not None:
            target = voice(references[0]).mixed(voice(references[1]), mix)
        elif len(references) == 1:
            target = voice(references[0])
        elif any(path.suffix == ".voice" for path in references):
            raise typer.BadParameter("a .voice file stands alone, or beside one other reference with --mix")
        else:
            target = converter.voice_print(*references)
        found = converter.convert(
            source, target, steps=steps, solver=solver, seed=seed, temperature=temperature, guidance=guidance
        )
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {message}")
    found.save(out)
    print(f"{out}: {found.seconds:.1f} s at {found.rate} Hz, {steps} steps of {solver}, seed {seed}")
    with warnings.catch_warnings():  # what is wrong with the recordings has been said, and the outcome is no recording
        warnings.simplefilter("ignore", AudioWarning)
        own, said = converter.voice_print((found.wave, found.rate)), converter.voice_print(source)
    print(
        f"voice print of the outcome: similarity {float(own.embedding @ target.embedding):.2f} to the reference, "
        f"{float(own.embedding @ said.embedding):.2f} to the source"
    )
    if save_voice is not None:
        print(f"voice print kept in {target.save(save_voice)}; it holds a spectrogram of what the person said")
    if plot is not None:
        _draw(found, plot)
        print(f"drawn in {plot}")
    print(FITNESS)
    print(NOTICE)


def _draw(found: object, path: Path) -> None:
    """Draw the three spectrograms below each other."""
    from oral4.errors import require

    plt = require("matplotlib.pyplot", "plot")
    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for axis, (name, title) in zip(
        axes, {"source": "Source", "prior": "Prior mean", "mel": "Outcome"}.items(), strict=True
    ):
        axis.imshow(getattr(found, name).numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-11.5, vmax=1.5)
        axis.set_ylabel(f"{title}\nmel band")
    axes[-1].set_xlabel("frame")
    figure.savefig(path, dpi=150)
    plt.close(figure)
