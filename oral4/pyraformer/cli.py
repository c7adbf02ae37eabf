"""What the pyramid of a series looks like: the command ``oral4 pyramid``."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["pyramid"]


def pyramid(
    length: Annotated[int, typer.Argument(help="Length of the series, in steps.")],
    windows: Annotated[
        list[str] | None,
        typer.Option(
            help="Children per parent, finest scale first: --windows 4,4,4 or --windows 4 --windows 4 --windows 4. "
            "Without it the smallest windows are chosen with which the layers see the whole series."
        ),
    ] = None,
    neighbours: Annotated[int, typer.Option(help="Nodes that a node sees on its own scale, itself included; odd.")] = 3,
    layers: Annotated[int, typer.Option(help="Attention layers that have to see the whole series.")] = 4,
    scales: Annotated[
        int | None, typer.Option(help="Number of scales of chosen windows.", show_default="4 unless --windows is given")
    ] = None,
) -> None:
    """Print the pyramid of a series: its nodes and pairs, its longest path, and whether the layers see all of it."""
    from oral4.pyraformer.graph import PyramidSpec, auto_pyramid  # torch: not for `oral4 --help`

    if windows and scales is not None:
        raise typer.BadParameter("with --windows the number of scales is given; leave --scales out")
    try:
        if windows:
            spec = PyramidSpec(length, _whole_numbers(windows), neighbours)
        else:
            spec = auto_pyramid(
                length, num_layers=layers, num_scales=4 if scales is None else scales, neighbours=neighbours
            )
        seen = spec.receptive_field_ok(layers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    chosen = "" if windows else f"   (chosen for {layers} layers and {spec.num_scales} scales)"
    full = length**2
    span, reach = spec.sizes[-1] - 1, layers * spec.half_width
    rows = {
        "windows": " ".join(map(str, spec.windows)) + chosen,
        "neighbours": f"{spec.neighbours}",
        "nodes on each scale": " ".join(f"{size:,}" for size in spec.sizes),
        "nodes": f"{spec.num_nodes:,}",
        "pairs, self included": f"{spec.num_edges():,}   ({spec.num_edges() / length:.2f} a step)",
        "pairs, full attention": f"{full:,}   ({full / spec.num_edges():,.1f} times as many)",
        "longest path": f"{spec.max_path()} hops",
        "Lemma 1": f"{'holds' if seen else 'fails'}: {span} hops along the top, {layers} layers reach {reach}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:22} {value}")
    if not seen and spec.half_width:
        typer.echo(f"{'':22} use {-(-span // spec.half_width)} layers, larger windows, or no --windows at all")


def _whole_numbers(texts: list[str]) -> list[int]:
    """Return the numbers of ``["4,4", "4"]``."""
    try:
        return [int(part) for text in texts for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--windows {' '.join(texts)}: whole numbers are needed, such as 4,4,4") from None
