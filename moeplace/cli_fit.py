"""The command `moeplace fit`."""

import textwrap
from typing import Annotated, Any, cast, get_args

import numpy as np
import typer

from moeplace._files import read_bytes
from moeplace.cli_answers import write, write_json
from moeplace.cli_options import AsJson, example
from moeplace.compare import printable
from moeplace.errors import ProblemError
from moeplace.fit import Fit, Model, fit
from moeplace.loads import Phase
from moeplace.passive import Passive, fit_totals
from moeplace.profile import read_profile
from moeplace.samples import Samples, read_samples, read_totals, same_setting
from moeplace.tables import WIDTH, table

#: Outliers and falls that the text shows.
SHOWN = 8


def fit_command(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLES",
            help="Profile of moeplace calibrate (JSON), or a trace (CSV: rank, tokens, activated, "
            "seconds).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(get_args(Model))}, or all to compare them.",
        ),
    ] = "planes",
    phase: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a profile: prefill, decode or mixed. Default: that of the latest entry.",
            show_default=False,
        ),
    ] = None,
    passive: Annotated[
        bool,
        typer.Option(
            "--passive",
            help="SAMPLES has layer totals (CSV: pass, rank, tokens, activated, seconds): only "
            "the slowest rank of a pass is seen.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Of starts, folds and bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a latency model to measured times; say how far off it is and which GPUs differ."""
    if phase is not None and phase not in get_args(Phase):
        raise ProblemError(f"Phase must be one of {', '.join(get_args(Phase))}, got {phase!r}.")
    if passive:
        tokens, seconds, activated = read_totals(samples)
        totals = fit_totals(tokens, seconds, activated)
        if as_json:
            write_json({"samples": samples, "passive": True} | _passive_json(totals))
        else:
            write(_passive_text(totals))
        return
    if model != "all" and model not in get_args(Model):
        raise ProblemError(
            f"Model must be one of {', '.join(get_args(Model))} or all, got {model!r}."
        )
    given = _samples(samples, cast(Phase | None, phase))
    names = get_args(Model) if model == "all" else (model,)
    fits = [fit(given, cast(Model, name), seed=seed) for name in names]
    if as_json:
        write_json({"samples": samples, "passive": False, "fits": [_json(one) for one in fits]})
    else:
        write(_text(fits))


def _samples(path: str, phase: Phase | None) -> Samples:
    if read_bytes(path, "JSON or CSV").lstrip().startswith(b"{"):
        return Samples.of(same_setting(read_profile(path), phase))
    return read_samples(path)


def _json(one: Fit) -> dict[str, Any]:
    planes = None
    if one.planes is not None:
        names = ("startup", "activation", "compute")
        planes = {name: column.tolist() for name, column in zip(names, one.planes.T, strict=True)}
    table = None
    if one.table is not None:
        table = {"tokens": one.table.tokens.tolist(), "seconds": one.table.seconds.tolist()}
    known = np.isfinite(one.cv_mean)
    return {
        "model": one.model,
        "planes": planes,
        "table": table,
        "gpus": [
            {
                "name": name,
                "slowness": float(one.slowness[g]),
                "interval": one.intervals[g].tolist(),
                "tied": int(one.tied[g]),
            }
            for g, name in enumerate(one.samples.names)
        ],
        "mean_error": one.mean_error,
        "max_error": one.max_error,
        "cv_mean_error": one.cv_mean if known else None,
        "cv_max_error": one.cv_max if known else None,
        "outliers": one.outliers.tolist(),
        "falls": [list(pair) for pair in one.samples.falls],
    }


def _text(fits: list[Fit]) -> str:
    rows = [["model", "mean error", "worst", "left out, mean", "worst"]]
    for one in fits:
        cells = (one.mean_error, one.max_error, one.cv_mean, one.cv_max)
        shown = [f"{100 * x:.1f} %" if np.isfinite(x) else "-" for x in cells]
        rows.append([one.model, *shown])
    last = fits[-1]
    parts = [f"{last.samples.gpu.size} samples of {last.samples.gpus} GPUs\n\n", _columns(rows)]
    if last.planes is not None:
        planes = [["plane", "startup", "per replica", "per token"]]
        for k, (t, w, c) in enumerate((1e6 * last.planes).tolist()):
            planes.append([str(k), f"{t:.3f} us", f"{w:.4f} us", f"{c:.5f} us"])
        parts += ["\n", _columns(planes)]
    gpus = [["GPU", "slowness", "own, 95 %", "group"]]
    for g, name in enumerate(last.samples.names):
        low, high = last.intervals[g]
        slow = f"{last.slowness[g]:.4f}"
        gpus.append([printable(name), slow, f"{low:.4f} to {high:.4f}", str(last.tied[g])])
    parts += ["\n", _columns(gpus)]
    samples = last.samples
    left_out = [f"Outlier, left out: {_sample(samples, i)}." for i in last.outliers.tolist()]
    fall = [
        f"Falls: {_sample(samples, i)}, but {_sample(samples, j)}." for _, i, j in samples.falls
    ]
    lines = [*_first(left_out, "outliers left out"), *_first(fall, "falls")]
    return "".join([*parts, *("\n" + textwrap.fill(line, WIDTH) for line in lines)]) + "\n"


def _first(lines: list[str], what: str) -> list[str]:
    """The first few, and how many more there are."""
    more = len(lines) - SHOWN
    return lines if more <= 0 else [*lines[:SHOWN], f"And {more:,} more {what}: see --json."]


def _sample(samples: Samples, i: int) -> str:
    return (
        f"{printable(samples.names[samples.gpu[i]])} at {samples.activated[i]:g} activated, "
        f"{samples.tokens[i]:g} tokens: {1e6 * samples.seconds[i]:.2f} us"
    )


def _passive_json(found: Passive) -> dict[str, Any]:
    return {
        "startup": found.startup,
        "activation": found.activation,
        "compute": found.compute,
        "noise": found.noise,
        "ranks": [
            {
                "rank": g,
                "slowness": float(found.slowness[g]),
                "interval": found.intervals[g].tolist(),
                "tied": int(found.tied[g]),
                "slowest": float(found.slowest[g]),
            }
            for g in range(found.slowness.size)
        ],
    }


def _passive_text(found: Passive) -> str:
    rows = [["rank", "slowness", "own, 95 %", "group", "was slowest"]]
    for g in range(found.slowness.size):
        low, high = found.intervals[g]
        rows.append(
            [str(g), f"{found.slowness[g]:.4f}", f"{low:.4f} to {high:.4f}", str(found.tied[g]),
             f"{100 * found.slowest[g]:.1f} %"]
        )  # fmt: skip
    model = (
        f"{1e6 * found.startup:.2f} us + {1e6 * found.activation:.3f} us per activated replica + "
        f"{1e6 * found.compute:.5f} us per token x slowness; noise {100 * found.noise:.1f} %"
    )
    return (
        f"{textwrap.fill(model, WIDTH)}\n\n{_columns(rows)}"
        "\nFrom layer totals: a rank is known by the passes in which it was the slowest.\n"
    )


def _columns(rows: list[list[str]]) -> str:
    return "\n".join(table(rows)) + "\n"


def add_commands(app: typer.Typer) -> None:
    """Add the command, once."""
    if fit_command not in {command.callback for command in app.registered_commands}:
        app.command("fit", epilog=example("fit profile.json --model all"))(fit_command)
