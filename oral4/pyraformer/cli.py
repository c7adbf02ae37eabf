"""The commands of this chapter: ``oral4 pyramid`` plans a pyramid, ``oral4 forecast`` forecasts a table."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from oral4.pyraformer.forecast import Forecaster

__all__ = ["forecast", "forecast_app", "pyramid"]


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


# ------------------------------------------------------------------------------------------------------- forecast

PRESETS = ("quick", "usual", "accurate")
MODELS = ("auto", "model", "ridge", "naive")
IMPUTE = ("ffill", "linear", "mask")
PLOTS = (".png", ".svg", ".pdf")


class ManyNumbers(TyperCommand):
    """A command whose ``--quantiles`` takes all the numbers that follow it: ``--quantiles .1 .5 .9``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each of its numbers, which is what the parser understands."""
        return super().parse_args(ctx, spread(args))


def spread(args: list[str], option: str = "--quantiles") -> list[str]:
    """Return arguments with an option repeated before each number that follows it.

    >>> spread(["a.csv", "--quantiles", ".1", ".9", "--seed", "3"])
    ['a.csv', '--quantiles', '.1', '--quantiles', '.9', '--seed', '3']
    """
    found: list[str] = []
    inside = False
    for place, argument in enumerate(args):
        if argument == "--":
            return [*found, *args[place:]]
        if inside and found[-1] != option and _is_number(argument):
            found.append(option)
        elif found[-1:] != [option]:
            inside = argument == option
        found.append(argument)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def forecast(
    data: Annotated[Path | None, typer.Argument(help="The table: .csv, .tsv or .parquet.", show_default=False)] = None,
    horizon: Annotated[int | None, typer.Option(help="Steps to forecast.", show_default="by the step")] = None,
    quantiles: Annotated[
        list[str] | None,
        typer.Option(
            help="Levels in (0, 1): --quantiles .1 .5 .9; none for points alone.",
            metavar="NUMBERS",
            show_default=".1 .5 .9",
        ),
    ] = None,
    freq: Annotated[str | None, typer.Option(help="The step, such as h, 15min, D, MS.", show_default="inferred")] = None,
    id: Annotated[str, typer.Option("--id", help="Column with the names of series.")] = "unique_id",
    time: Annotated[str, typer.Option(help="Column of dates.")] = "ds",
    target: Annotated[str, typer.Option(help="Column of values.")] = "y",
    past: Annotated[list[str] | None, typer.Option(help="Covariates known up to now: --past temperature,wind.")] = None,
    future: Annotated[list[str] | None, typer.Option(help="Covariates known ahead; needs --future-file.")] = None,
    static: Annotated[list[str] | None, typer.Option(help="Covariates constant for each series.")] = None,
    future_file: Annotated[Path | None, typer.Option(help="Table with covariates known ahead.")] = None,
    season: Annotated[str | None, typer.Option(help="Period in steps, or several: 24,168.", show_default="by the step")] = None,
    history: Annotated[int | None, typer.Option(help="Steps to look back on.", show_default="by validation")] = None,
    impute: Annotated[
        str | None, typer.Option(help=f"What to do about gaps: {', '.join(IMPUTE)}.", show_default="an error")
    ] = None,
    model: Annotated[
        str, typer.Option(help=f"{', '.join(MODELS)}. auto: the simplest within the noise of the best.")
    ] = "auto",
    preset: Annotated[str, typer.Option(help=f"Size and patience of the model: {', '.join(PRESETS)}.")] = "usual",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    backtest: Annotated[int, typer.Option(help="Windows at the end to forecast from what came before them; 0: none.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the forecast here, as .csv.")] = None,
    plot: Annotated[Path | None, typer.Option(help=f"Draw it here: {', '.join(PLOTS)}.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the fitted forecaster in this folder.")] = None,
    load: Annotated[Path | None, typer.Option(help="Use the forecaster of this folder; no fit.")] = None,
    sep: Annotated[str | None, typer.Option(help="Mark between columns of a text file.", show_default="by the suffix")] = None,
    decimal: Annotated[str, typer.Option(help="Decimal mark of a text file.")] = ".",
) -> None:
    """Forecast a table, say how good the forecast is beside a seasonal naive one, and which of them to use.

    The table has a column of dates, one of values and, if there are several series, one with their names; or a column of
    dates and a column for each series.
    """
    levels = _numbers_of(quantiles)
    for name, value, allowed in (("model", model, MODELS), ("preset", preset, PRESETS), ("impute", impute, (None, *IMPUTE))):
        if value not in allowed:
            raise ValueError(f"--{name} {value}: choose one of {', '.join(each for each in allowed if each)}")
    for name, path, suffixes in (("out", out, (".csv",)), ("plot", plot, PLOTS)):
        _check_target(name, path, suffixes)
    if backtest < 0:
        raise ValueError(f"--backtest {backtest}: give a number of windows, or 0 for none")
    if data is None and load is None:
        raise ValueError("which table? oral4 forecast data.csv --horizon 24")
    from oral4.pyraformer.data import read_table  # pandas and torch: not for `oral4 --help`
    from oral4.pyraformer.forecast import Forecaster, ForecasterConfig

    table = None if data is None else read_table(data, sep=sep, decimal=decimal)
    ahead = None if future_file is None else read_table(future_file, sep=sep, decimal=decimal)
    columns = {"past": _texts(past), "future": _texts(future), "static": _texts(static)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # all of them stand in the report and beside the forecast
        if load is not None:
            chosen = {"--freq": freq, "--season": season, "--history": history, "--save": save, **{f"--{k}": v for k, v in columns.items()}}
            chosen |= {"--id": id != "unique_id", "--time": time != "ds", "--target": target != "y", "--seed": seed, "--preset": preset != "usual"}
            if given := [name for name, value in chosen.items() if value]:
                raise ValueError(f"{', '.join(given)} cannot be changed after the fit; leave {'it' if len(given) == 1 else 'them'} out, or fit without --load")
            forecaster = Forecaster.load(load)
        else:
            settings: dict[str, Any] = {"horizon": horizon, "history": history, "season": _season(season), "seed": seed}
            if levels is not None:
                settings["quantiles"] = levels
            settings["candidates"] = {"naive": ("naive",), "ridge": ("naive", "ridge")}.get(model, ("naive", "ridge", "model"))
            start: Any = ForecasterConfig if preset == "usual" else getattr(ForecasterConfig, preset)
            forecaster = Forecaster(start(**settings))
            step = int(freq) if freq is not None and freq.isdigit() else freq
            forecaster.fit(table, freq=step, id=id, time=time, target=target, impute=impute, **columns)
            table = None
        if backtest:
            forecaster.backtest(table, windows=backtest)
        method = "recommended" if model == "auto" else model
        found = forecaster.predict(table, horizon, quantiles=levels, future=ahead, method=method, impute=impute if load else None)
        typer.echo(f"{forecaster.report()}\n")
        _show(forecaster, found, out, plot)
        if save is not None:
            typer.echo(f"forecaster kept in {forecaster.save(save).parent}")


forecast_app = typer.Typer(add_completion=False, rich_markup_mode=None)
forecast_app.command(cls=ManyNumbers)(forecast)


def _show(forecaster: Forecaster, found: Any, out: Path | None, plot: Path | None) -> None:
    """Print or write a forecast, and what has to be known about it."""
    known = set(forecaster.report().notes)
    for note in found.attrs["notes"]:
        if note not in known:
            typer.echo(f"Note: {note}.")
    typer.echo(f"forecast by: {found.attrs['method']}")
    if out is None:
        typer.echo(found.head(24).to_string(index=False))
        if len(found) > 24:
            typer.echo(f"... and {len(found) - 24:,} rows more; --out FILE.csv writes all of them")
    else:
        found.to_csv(out, index=False)
        typer.echo(f"{len(found):,} rows written to {out}")
    if plot is not None:
        from oral4.errors import require

        require("matplotlib", "plot").use("Agg")
        axes = forecaster.plot(found)
        figure = getattr(axes, "figure", None) or axes[0].figure
        figure.savefig(plot, facecolor="white", dpi=200)
        require("matplotlib.pyplot", "plot").close(figure)
        typer.echo(f"drawn into {plot}")


def _check_target(name: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Refuse before the work what could not be written after it."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise ValueError(f"--{name} {path}: give the name of a file that ends with {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--{name} {path}: there is no folder {path.absolute().parent}")


def _texts(given: list[str] | None) -> list[str]:
    return [part.strip() for text in given or [] for part in text.split(",") if part.strip()]


def _numbers_of(quantiles: list[str] | None) -> list[float] | None:
    if quantiles is None:
        return None
    texts = _texts(quantiles)
    if texts == ["none"]:
        return []
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"--quantiles {' '.join(quantiles)}: give numbers in (0, 1) such as .1 .5 .9, or none") from None


def _season(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--season {text}: give a whole number of steps, or several: 24,168") from None
