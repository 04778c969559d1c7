"""The command `moeplace bench`: suites of cases, tables of runs, and the best known values."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moeplace._files import check_output, write_text
from moeplace.cli_answers import write, write_json
from moeplace.cli_options import REFUSED, AsJson, Dask, Quiet, Ray, example
from moeplace.errors import ProblemError
from moeplace.instances import shipped
from moeplace.sweep import on_cluster


def bench(
    suite: Annotated[
        str | None,
        typer.Argument(
            help="A suite's name; an unknown one lists them. Without it a table of runs goes to "
            "--out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Of a suite: write the table there, as Markdown, too. Else the folder of the "
            "table of runs; one that was begun goes on.",
            show_default=False,
        ),
    ] = None,
    sets: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Sets of instances: real, real-windows, tiny, or 30 of the shapes A to D.",
        ),
    ] = "real,A",
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="Methods, as in moeplace solve.")
    ] = "contiguous,eplb,eplb_lpt,vibe,auto",
    seeds: Annotated[
        str, typer.Option(metavar="N,...", help="Seeds of searches; not 0 to 4.")
    ] = "100",
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Of each run; by default 1.", show_default=False),
    ] = None,
    work_limit: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            help="Search steps a layer instead: all but times is then the same on any machine.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Runs, or checks, at once, which slows each of them.")
    ] = 1,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the table of runs as runs.parquet, too.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Reproduce every row of best_known.csv; refused rows end 5."),
    ] = False,
    only: Annotated[
        str, typer.Option(metavar="PREFIX", help="With --check: rows of these instances alone.")
    ] = "",
    update_best: Annotated[
        bool, typer.Option("--update-best", help="Solve the real instances and rewrite their rows.")
    ] = False,
    instances: Annotated[
        Path, typer.Option(help="The folder of shipped instances.", show_default=True)
    ] = Path("instances"),
    dask: Dask = None,
    ray: Ray = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure methods: a suite's table, a resumable table of runs, or the best known values."""
    if sum((suite is not None, check, update_best)) > 1:
        raise ProblemError("Give a suite, --check or --update-best, not two of them.")
    if only and not check:
        raise ProblemError("--only is for --check: give that too, or drop it.")
    if (dask or ray) and (check or update_best):
        raise ProblemError(
            "--dask and --ray are for suites and tables of runs: give one, or drop them."
        )
    if not update_best:  # which writes there
        instances = shipped(instances)
    if suite is not None:
        with on_cluster(dask, ray):
            _suite(suite, out, instances, as_json, quiet)
    elif check:
        _check(instances, only, jobs, as_json, quiet)
    elif update_best:
        from moeplace.best_known import update

        for line in update(instances):
            _tell(line, quiet)
    elif out is None:
        raise ProblemError("Give a suite, --check, or a folder with --out.")
    else:
        from moeplace.bench_run import Row
        from moeplace.bench_table import Settings, fill

        def told(row: Row) -> None:
            words = (row[key] for key in ("set", "instance", "method", "seed", "status", "ratio"))
            _tell("  ".join(words), quiet)

        try:
            numbers = tuple(int(seed) for seed in seeds.split(","))
        except ValueError:
            raise ProblemError(f"--seeds must be whole numbers, got {seeds!r}.") from None
        settings = Settings(
            sets=tuple(sets.split(",")),
            methods=tuple(methods.split(",")),
            seeds=numbers,
            time_limit=1.0 if time_limit is None and work_limit is None else time_limit,
            work_limit=work_limit,
            jobs=jobs,
        )
        with on_cluster(dask, ray):
            rows = fill(out, settings, instances, told, parquet)
        if as_json:
            write_json({"out": str(out), "rows": rows})
        elif not quiet:
            write((out / "summary.md").read_text(encoding="utf-8"))


def _tell(line: str, quiet: bool) -> None:
    """Say on stderr how far it is."""
    if not quiet:
        write(line + "\n", sys.stderr)


def _suite(suite: str, out: Path | None, instances: Path, as_json: bool, quiet: bool) -> None:
    from moeplace.bench import SUITES, markdown

    if suite not in SUITES:
        raise ProblemError(f"Suite must be one of {', '.join(SUITES)}, got {suite!r}.")
    if out is not None:
        check_output(out)
    rows = []
    for row in SUITES[suite](instances):
        rows.append(row)
        _tell("  ".join(f"{key} {value}" for key, value in row.items()), quiet)
    text = markdown(suite, rows)
    if out is not None:
        write_text(out, text)
    if as_json:
        write_json({"suite": suite, "rows": rows})
    elif not quiet:
        write(text)


def _check(instances: Path, only: str, jobs: int, as_json: bool, quiet: bool) -> None:
    from moeplace.best_known import check

    rows = []
    for row in check(instances, only, jobs):
        rows.append(row)
        word = f"REFUSED: {row.refused}" if row.refused else f"reproduced, bound {row.bound}"
        _tell(f"{row.instance} {row.routing}: {word}", quiet)
    refused = [row for row in rows if row.refused]
    if as_json:
        write_json({
            "rows": len(rows),
            "refused": [f"{row.instance} {row.routing}: {row.refused}" for row in refused],
        })  # fmt: skip
    elif not quiet:
        write(f"{len(rows) - len(refused)} of {len(rows)} rows reproduced\n")
    if refused:
        raise typer.Exit(REFUSED)


def add_commands(app: typer.Typer) -> None:
    """Add the command, once."""
    if all(command.callback is not bench for command in app.registered_commands):
        app.command(epilog=example("bench --out runs --sets real,A --time-limit 1"))(bench)
