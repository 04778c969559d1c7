"""The commands on files of engines and solvers: `moeplace loads` and `export`."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from moeplace._files import check_output, check_outputs
from moeplace.cli_answers import error, read_given, write, write_json
from moeplace.cli_options import BAD_INPUT, AsJson, FirstMoeLayer, Quiet, SumWindows, add
from moeplace.cli_progress import reading
from moeplace.compare import (
    aligned,
    exact,
    printable,
)
from moeplace.errors import (
    FormatError,
    ProblemError,
)
from moeplace.evaluate import Evaluation
from moeplace.evaluate import evaluate as price
from moeplace.formats import PLAN_FORMATS, read_plan, write_plan
from moeplace.formats.loads import FORMATS as LOAD_FORMATS
from moeplace.formats.loads import inspect
from moeplace.formats.loads.binary import check_npz
from moeplace.formats.loads.binary import write as write_loads
from moeplace.hardware import Cluster
from moeplace.instances import shipped, write_instance
from moeplace.problem import Problem
from moeplace.solve import solve as find
from moeplace.summary import lines, summarise


def loads(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="What an engine recorded: a file, or TensorRT-LLM's folder.",
            show_default=False,
        ),
    ],
    load_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"One of {', '.join(LOAD_FORMATS)}. By default told from the content.",
            show_default=False,
        ),
    ] = None,
    phase: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What was recorded: prefill, decode or mixed (the default).",
            show_default=False,
        ),
    ] = None,
    passes: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Forward passes of each window, where the file does not say it.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="FROM:TO",
            help="Rows to keep, TO excluded, e.g. 3:61 where dense layers have rows too.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Sum consecutive windows into this many.", show_default=False
        ),
    ] = None,
    experts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts of a trace; by default the largest id + 1.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="NPZ", help="Write the loads here (.npz).", show_default=False),
    ] = None,
    instance: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="Write an instance here: these loads on --ranks equal ranks of --slots slots.",
            show_default=False,
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(metavar="N", help="EP ranks.", show_default=False)
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", help="Slots of each rank.", show_default=False)
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 2 if there is a warning.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Describe recorded loads, and warn of statistics that lie."""
    check_outputs([out, instance], [file])
    if out is not None:
        check_npz(out)
    if len({instance is None, ranks is None, slots is None}) > 1:
        raise ProblemError("--instance, --ranks and --slots belong together: give all or none.")
    with reading(quiet or as_json) as progress:
        read = inspect(
            shipped(file),
            load_format,
            phase=cast(Any, phase),  # checked with the loads
            passes=passes,
            layers=None if layers is None else parse_range(layers),
            windows=windows,
            experts=experts,
            progress=progress,
        )
    found = summarise(file, read)
    if out is not None:
        write_loads(read.loads, out)
    if instance is not None and ranks is not None and slots is not None:
        cluster = Cluster.from_speeds([1.0] * ranks, slots, speed_unit="relative")
        write_instance(Problem(read.loads, cluster, name=Path(file).stem), instance)
    if as_json:
        write_json(found)
    elif not quiet:
        write("\n".join(lines(found)) + "\n")
    if strict and found["warnings"]:
        names = ", ".join(each["name"] for each in found["warnings"])
        error(f"{file}: {names}: the loads may not be what the model's router did. See above.")
        raise typer.Exit(BAD_INPUT)


def parse_range(text: str) -> slice:
    """FROM:TO as a slice."""
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            raise ValueError(text)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError as cause:
        raise ProblemError(f"--layers must be FROM:TO, e.g. 3:61, got {text!r}.") from cause


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Plan file (JSON); with --model or --solution an INSTANCE.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="Write here, whole or not at all.")],
    plan_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"One of {', '.join(PLAN_FORMATS)}.",
            show_default=False,
        ),
    ] = None,
    first_moe_layer: FirstMoeLayer = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The model's layers (sglang, tensorrt-llm), to check that none is missing.",
            show_default=False,
        ),
    ] = None,
    mtp_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layers of multi-token prediction after the plan's (tensorrt-llm): slot p gets "
            "expert p mod experts.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="vllm: map, row or expert-to-rank.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Write the exact model of an instance: lp or mps, with a MIP start (.mst) and "
            "its names (.json) beside it.",
            show_default=False,
        ),
    ] = None,
    solution: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A solver's solution of that model: write it as a checked plan.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help="The names that were written beside the model.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="MIP start of a model; by default a quick solve's plan.",
            show_default=False,
        ),
    ] = None,
    sum_windows: SumWindows = False,
    drop_split: Annotated[
        bool,
        typer.Option(
            "--drop-split", help="Drop the plan's shares: the engine shares by its own rule."
        ),
    ] = False,
) -> None:
    """Write a plan as an engine reads it, or an instance's exact model for another solver."""
    asked = [plan_format is not None, model is not None, solution is not None]
    if sum(asked) != 1:
        raise FormatError(
            f"Export needs one of --format ({', '.join(PLAN_FORMATS)}), --model (lp, mps) and "
            "--solution."
        )
    if names is not None and solution is None:
        raise FormatError("--names is for --solution: give that too, or drop it.")
    if start is not None and model is None:
        raise FormatError("--start is for --model: give that too, or drop it.")
    check_output(out, [source])
    if model is not None or solution is not None:
        _export_model(source, out, model, solution, names, start, sum_windows)
        return
    assert plan_format is not None
    plan = read_plan(source)
    write_plan(
        plan,
        out,
        plan_format,
        first_moe_layer=first_moe_layer,
        num_layers=num_layers,
        mtp_layers=mtp_layers,
        form=form,
        drop_split=drop_split,
    )


def _export_model(
    source: str,
    out: str,
    model: str | None,
    solution: str | None,
    names: str | None,
    start: str | None,
    sum_windows: bool,
) -> None:
    from moeplace.exact.export import read_solution, write_model

    given = read_given(source, sum_windows)
    problem = given.problem
    if solution is not None:
        if names is None:
            raise FormatError("--solution needs --names, the .json beside the exported model.")
        plan = read_solution(problem, solution, names)
        write_plan(plan, out)
        words = [
            *given.words,
            ("step time", exact(price(problem, plan).objective, given.unit)),
        ]
        write("\n".join(aligned(words)) + "\n")
        return
    if model not in ("lp", "mps"):
        raise FormatError(f"--model must be lp or mps, got {model!r}.")
    beside = [Path(out).with_suffix(suffix) for suffix in (".json", ".mst")]
    check_outputs([out, *beside], [path for path in (source, start) if path is not None])
    if start is not None:
        begin: Evaluation | None = price(problem, read_plan(start))
    else:
        begin = find(problem, time_limit=1.0).evaluation
    unit = write_model(problem, out, cast(Any, model), begin)
    words = [
        *given.words,
        ("model", printable(out)),
        ("unit", f"1 in the objective is {exact(unit, given.unit)}"),
    ]
    if begin is not None:
        words.append(("start", f"costs {begin.objective / unit:.9g} there"))
    write("\n".join(aligned(words)) + "\n")


_COMMANDS = (
    (loads, "loads recorder.pt --passes 1000 --strict"),
    (export, "export plan.json --format sglang --first-moe-layer 3 --out map.json"),
)


def add_commands(app: typer.Typer) -> None:
    """Add the commands, once."""
    add(app, _COMMANDS)
