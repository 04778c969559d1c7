"""The commands that run on real ranks: `moeplace replay` and `moeplace calibrate`.

Under torchrun every rank runs the same command (``-m moeplace.replay``,
``-m moeplace.replay.calibrate``); rank 0 answers.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from moeplace.cli_answers import read_given, write, write_json
from moeplace.cli_options import BAD_INPUT, INTERNAL, AsJson, Instance, Quiet, SumWindows, add
from moeplace.compare import aligned, printable
from moeplace.errors import ProblemError
from moeplace.formats import read_plan
from moeplace.profile import measured_devices, read_profile, relative_speeds

if TYPE_CHECKING:
    from moeplace.replay import Runtime

T = TypeVar("T")
N = TypeVar("N", int, float)

Ranks = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Processes, one for each EP rank. Default: as the instance, or as torchrun started.",
        show_default=False,
    ),
]
Emulate = Annotated[
    str,
    typer.Option(
        metavar="FACTORS",
        help="Slowness of each rank, e.g. 1,2: CPU ranks repeat their GEMMs so often.",
        show_default=False,
    ),
]
Hidden = Annotated[int, typer.Option(metavar="N", help="Hidden size.")]
Intermediate = Annotated[
    int, typer.Option(metavar="N", help="Intermediate size; 0 is twice the hidden one.")
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="auto, float32 or bfloat16.")]
Kernel = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto, grouped, loop, or module:function for the engine's own."
    ),
]
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="End the run with an error after so long.")
]
Port = Annotated[
    int, typer.Option(metavar="N", help="TCP port where local ranks meet; 0 needs none.")
]


def replay(
    instance: Instance,
    plans: Annotated[
        list[str],
        typer.Argument(
            metavar="PLAN...",
            help="Plan files (JSON); the others are compared with the first.",
            show_default=False,
        ),
    ],
    ranks: Ranks = None,
    emulate: Emulate = "",
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Predict seconds from this profile, not from the instance's speeds.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="NPZ",
            help="Routing as recorded: an array topk_ids [tokens, layers, k]. Default: drawn "
            "from the instance's loads.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of a pass, all ranks.")] = 2048,
    top_k: Annotated[int, typer.Option(metavar="N", help="Experts of each token.")] = 2,
    assignments: Annotated[
        int,
        typer.Option(metavar="N", help="Instead of --tokens: tokens x top-k.", show_default=False),
    ] = 0,
    draw: Annotated[
        str, typer.Option(metavar="NAME", help="exact: the loads' shares; sampled: with noise.")
    ] = "exact",
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Window of the loads. Default: their mean.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        int, typer.Option(metavar="N", help="Layers to run, spread over the model's.")
    ] = 4,
    rounds: Annotated[int, typer.Option(metavar="N", help="Rounds that count.")] = 15,
    mode: Annotated[
        str, typer.Option(metavar="NAME", help="attributed (time and wait of ranks) or fused.")
    ] = "attributed",
    hidden: Hidden = 256,
    intermediate: Intermediate = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of routing and weights.")] = 0,
    timeout: Timeout = 600.0,
    port: Port = 0,
    sum_windows: SumWindows = False,
    as_json: AsJson = False,
) -> None:
    """Run plans on real ranks: torch, one process a rank, by itself or under torchrun."""
    from moeplace.replay import read_trace, replay_plans
    from moeplace.replay.measure import spread
    from moeplace.replay.report import text

    problem = read_given(instance, sum_windows).problem
    named = [(path, read_plan(path)) for path in plans]
    known = None if profile is None else read_profile(profile)
    runtime = _runtime(
        _first(ranks, _started(), problem.ranks),
        emulate,
        hidden=hidden,
        intermediate=intermediate,
        device=device,
        dtype=dtype,
        kernel=kernel,
        seed=seed,
        timeout=timeout,
        port=port,
    )
    routing = None
    if trace is not None:
        routing = read_trace(trace, problem.experts, spread(problem.layers, layers))
    report = _as_rank(
        lambda: replay_plans(
            problem,
            named,
            runtime,
            routing,
            tokens=assignments // top_k if assignments and top_k > 0 else tokens,
            top_k=top_k,
            layers=layers,
            window=window,
            draw=draw,  # type: ignore[arg-type]
            rounds=rounds,
            mode=mode,  # type: ignore[arg-type]
            profile=known,
        )
    )
    if report is None:  # not rank 0
        return
    if as_json:
        write_json({"instance": instance, "digest": problem.digest()} | report.to_json())
    else:
        write(text(report) + "\n")


def calibrate(
    out: Annotated[
        str,
        typer.Option(
            metavar="PROFILE",
            help="Profile file (JSON), written after each point; a run that was interrupted "
            "goes on from there.",
            show_default=False,
        ),
    ],
    ranks: Ranks = None,
    emulate: Emulate = "",
    slots: Annotated[int, typer.Option(metavar="N", help="Expert slots of a rank.")] = 8,
    activated: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="Slots with tokens. Default: 1, 1/4, 1/2 and all of them."
        ),
    ] = "",
    tokens: Annotated[
        str,
        typer.Option(
            metavar="N,N,...", help="Token assignments of a rank. Default: powers of 2 by phase."
        ),
    ] = "",
    phase: Annotated[str, typer.Option(metavar="NAME", help="prefill, decode or mixed.")] = "mixed",
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="At each point. Default: 0.6."),
    ] = None,
    soak: Annotated[
        float | None,
        typer.Option(metavar="S", help="Before all points. Default: 60 (GPU), 0.5 (CPU)."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Measure again what the file holds.")
    ] = False,
    hidden: Hidden = 256,
    intermediate: Intermediate = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernel: Kernel = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the points' order.")] = 0,
    timeout: Timeout = 3600.0,
    port: Port = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast every rank is, all at the same time, and write a profile."""
    from moeplace.replay import calibrate_ranks

    runtime = _runtime(
        _first(ranks, _started(), 1),
        emulate,
        hidden=hidden,
        intermediate=intermediate,
        device=device,
        dtype=dtype,
        kernel=kernel,
        seed=seed,
        timeout=timeout,
        port=port,
    )
    found = _as_rank(
        lambda: calibrate_ranks(
            runtime,
            out,
            slots=slots,
            activated=_numbers(activated, "--activated", int),
            tokens=_numbers(tokens, "--tokens", int),
            phase=phase,  # type: ignore[arg-type]
            seconds=seconds,
            soak=soak,
            restart=restart,
        )
    )
    if found is None:  # not rank 0
        return
    by_uuid = {entry.uuid: entry for entry in found.entries}
    entries = [by_uuid[uuid] for uuid in measured_devices(found)]
    speeds = relative_speeds(entries).tolist()
    if as_json:
        rows = [
            {"uuid": entry.uuid, "host": entry.host, "speed": speed, "drift": entry.drift}
            for entry, speed in zip(entries, speeds, strict=True)
        ]
        write_json({"profile": out, "label": entries[0].label, "ranks": rows})
        return
    if quiet:
        return
    words = [
        ("profile", printable(out)),
        ("label", entries[0].label),
        ("kernel", f"{entries[0].kernel}, {entries[0].dtype}, phase {entries[0].phase}"),
        ("points", f"{len(entries[0].samples)} of (activated slots, tokens)"),
    ]
    for entry, speed in zip(entries, speeds, strict=True):
        name = f"{printable(entry.uuid)}, anchor moved {100 * entry.drift:+.1f} %"
        words.append((f"rank {entry.rank}", f"relative speed {speed:.4f}; {name}"))
    write("\n".join(aligned(words)) + "\n")


def _runtime(ranks: int, emulate: str, **options: Any) -> "Runtime":
    from moeplace.replay import Runtime

    factors = tuple(_numbers(emulate, "--emulate", float) or ())
    return Runtime(ranks=ranks, emulate=factors, **options)


def _first(*values: int | None) -> int:
    """The first that is given."""
    return next(value for value in values if value is not None)


def _started() -> int | None:
    """Ranks that torchrun (or the like) started, this process being one of them."""
    from moeplace.replay.settings import under_launcher

    return int(os.environ["WORLD_SIZE"]) if under_launcher() else None


def _as_rank(run: "Callable[[], T]") -> "T":
    """Run; an error that rank 0 says too is left to it."""
    from moeplace.replay.settings import EchoError

    try:
        return run()
    except EchoError as cause:
        code = BAD_INPUT if isinstance(cause, ProblemError) else INTERNAL
        raise typer.Exit(code) from cause


def _numbers(text: str, option: str, kind: "type[N]") -> "list[N] | None":
    """Numbers separated by commas; None for an empty text."""
    try:
        return [kind(part) for part in text.split(",")] if text.strip() else None
    except ValueError as cause:
        raise ProblemError(
            f"{option} must be {kind.__name__} numbers separated by commas, got {text!r}."
        ) from cause


_COMMANDS = (
    (replay, "replay INSTANCE a.json b.json --ranks 2 --emulate 1,2 --profile profile.json"),
    (calibrate, "calibrate --ranks 2 --emulate 1,2 --slots 9 --out profile.json"),
)


def add_commands(app: typer.Typer) -> None:
    """Add both commands, once."""
    add(app, _COMMANDS)
