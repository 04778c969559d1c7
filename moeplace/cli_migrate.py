"""The command `moeplace migrate`: what a change of plan moves, and when it pays."""

from typing import Annotated, Any, cast

import typer

from moeplace._files import check_outputs, write_json
from moeplace.cli_answers import read_given, read_of_instance, write
from moeplace.cli_answers import write_json as write_answer
from moeplace.cli_options import (
    AsJson,
    FirstMoeLayer,
    Instance,
    PlanFormat,
    ProfileFile,
    Quiet,
    SumWindows,
    example,
)
from moeplace.compare import aligned, exact, percent
from moeplace.errors import ProblemError
from moeplace.expert_bytes import expert_bytes as bytes_of_model
from moeplace.formats import write_plan
from moeplace.migrate import Engine, migrate, relabel
from moeplace.problem import Problem
from moeplace.replan import Economy, propose
from moeplace.result import Limits
from moeplace.search.split import at_best_shares
from moeplace.tables import table
from moeplace.tradeoff import Point, tradeoff
from moeplace.transfer import Links, Migration, Payback, payback

GIGA = 1e9

ExpertBytes = Annotated[
    str,
    typer.Option(
        metavar="N|MODEL",
        help="Bytes of one expert's weights, or the model's config.json or folder.",
        show_default=False,
    ),
]
Intra = Annotated[
    float, typer.Option(metavar="GB/S", help="Bandwidth of a rank within its node, one way.")
]
Inter = Annotated[float, typer.Option(metavar="GB/S", help="The same to other nodes.")]
Slowdown = Annotated[
    float,
    typer.Option(metavar="SHARE", help="How much slower steps are meanwhile (slowed). A guess."),
]
StepSeconds = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="Measured seconds of a step's MoE layers under the current plan. Needed unless the "
        "instance has passes and speeds in tokens/s.",
        show_default=False,
    ),
]
EngineName = Annotated[
    str, typer.Option(metavar="NAME", help="Whose order and buffers: vllm or sglang.")
]
Chunk = Annotated[
    int | None,
    typer.Option(metavar="N", help="sglang: layers of a chunk. Default: all.", show_default=False),
]
Steps = Annotated[
    float,
    typer.Option(metavar="N", help="Steps that a new plan will serve: it must pay within them."),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Wall time of each solve. Default: search steps limit it, so that the same inputs "
        "give the same plans.",
        show_default=False,
    ),
]


def migrate_command(
    instance: Instance,
    current: Annotated[
        str, typer.Argument(metavar="CURRENT", help="The plan that the ranks hold (JSON).")
    ],
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="The plan to go to. Without it: the budget of moves that nets most over --steps.",
            show_default=False,
        ),
    ] = None,
    expert_bytes: ExpertBytes = "44050944",
    moves: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Without TARGET: take the plan of this budget, copies a layer.",
            show_default=False,
        ),
    ] = None,
    budget_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            metavar="N",
            help="Without TARGET: a budget in bytes over all layers instead.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Slower by this at most, if exchanging ranks moves less."
        ),
    ] = 0.0,
    engine: EngineName = "vllm",
    chunk: Chunk = None,
    buffer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Experts that a rank can receive before they take effect. Default: its slots.",
            show_default=False,
        ),
    ] = None,
    intra: Intra = 200.0,
    inter: Inter = 25.0,
    slowdown: Slowdown = 0.1,
    step_seconds: StepSeconds = None,
    steps: Steps = 3000.0,
    time_limit: TimeLimit = None,
    plan_format: PlanFormat = "moeplace",
    first_moe_layer: FirstMoeLayer = None,
    profile: ProfileFile = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="Write the plan to go to here, its slots arranged to move least.",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write every copy here (JSON).", show_default=False),
    ] = None,
    sum_windows: SumWindows = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what a change of plan moves, in which order, how long it takes and when it pays."""
    check_outputs([out, stages], [instance, current, target, profile])
    given = read_given(instance, sum_windows, profile)
    problem = given.problem
    held = read_of_instance(current, plan_format, first_moe_layer, problem)
    sizes = sizes_of(expert_bytes, problem)
    if target is not None and (moves is not None or budget_bytes is not None):
        raise ProblemError("--moves and --bytes choose a plan, and TARGET is one: give either.")
    if moves is not None and budget_bytes is not None:
        raise ProblemError("--moves and --bytes are two budgets: give one.")
    Limits(time=time_limit)  # whether a solve will need it or not
    links = Links(intra=intra * GIGA, inter=inter * GIGA)
    economy = Economy(
        expert_bytes=max(sizes),
        links=links,
        steps=steps,
        step_seconds=_guessed(problem, step_seconds),
        slowdown=slowdown,
        engine=cast(Engine, engine),
        chunk=chunk,
    )
    points: list[Point] = []
    if target is not None:
        wanted = read_of_instance(target, plan_format, first_moe_layer, problem)
    elif moves is not None or budget_bytes is not None:
        total = None if budget_bytes is None else budget_bytes // int(max(sizes))
        points = tradeoff(
            problem,
            held,
            expert_bytes=sizes,
            budgets=[cast(int, moves) if total is None else total],
            per="layer" if total is None else "total",
            time_limit=time_limit,
            every=True,
        )
        limited = [point for point in points if point.budget is not None]
        wanted = min(limited, key=lambda point: point.objective).plan
    else:
        found = propose(problem, held, economy, time_limit=time_limit)
        wanted, points = found.point.plan, list(found.points)
    before = at_best_shares(problem, held).objective
    moved = migrate(
        held,
        relabel(problem, held, wanted, tolerance),
        expert_bytes=sizes,
        nodes=problem.cluster.nodes,
        engine=cast(Engine, engine),
        chunk=chunk,
        buffer=buffer,
    )
    after = at_best_shares(problem, moved.target).objective
    earned = None
    if step_seconds is not None or _in_seconds(problem):
        now = before if step_seconds is None else step_seconds
        later = now * after / before if before > 0 else now
        earned = payback(moved, links, before=now, after=later, slowdown=slowdown)
    if out is not None:
        write_plan(moved.target, out)
    if stages is not None:
        write_json(stages, _stages(moved, links))
    if as_json:
        write_answer(
            {
                "instance": instance,
                "digest": problem.digest(),
                "before": before,
                "after": after,
                "unit": problem.cluster.time_unit,
                **_moved(moved, links),
                "payback": None if earned is None else _earned(earned, steps),
                "tradeoff": [_point(point) for point in points],
            }
        )
        return
    if quiet:
        return
    unit = problem.cluster.time_unit
    words = [
        *given.words,
        ("step time now", exact(before, unit)),
        ("after", exact(after, unit)),
        ("saves", percent(1 - after / before if before > 0 else 0.0)),
        *_words(moved, links),
        *_payback_words(earned, steps, slowdown),
    ]
    write("\n".join([*aligned(words), *_table(points, unit)]) + "\n")


def _guessed(problem: Problem, step_seconds: float | None) -> float | None:
    """What to weigh plans by; where nothing is known a long step, so that the gain decides."""
    return 1.0 if step_seconds is None and not _in_seconds(problem) else step_seconds


def _in_seconds(problem: Problem) -> bool:
    return problem.cluster.speed_unit == "tokens/s" and problem.loads.passes is not None


def sizes_of(text: str, problem: Problem) -> Any:
    """Bytes of an expert in each layer, from a number or a model."""
    try:
        size = int(text)
    except ValueError:
        sizes = bytes_of_model(text)
        if sizes.size != problem.layers:
            raise ProblemError(
                f"{text}: has {sizes.size} MoE layers, the instance {problem.layers}: give the "
                "model that was recorded, or the bytes as a number."
            ) from None
        return sizes.tolist()
    if size < 1:
        raise ProblemError(f"--expert-bytes must be at least 1, got {size}.")
    return [size] * problem.layers


def _moved(moved: Migration, links: Links) -> dict[str, Any]:
    slots = int((moved.target.slots >= 0).sum())
    return {
        "moves": moved.moves,
        "share_of_slots": moved.moves / slots,
        "cross_node": moved.cross_node,
        "bytes": moved.bytes,
        "stages": len(moved.stages),
        "passes": moved.turns,
        "buffer": moved.buffer,
        "seconds": moved.seconds(links),
    }


def _words(moved: Migration, links: Links) -> list[tuple[str, str]]:
    found = _moved(moved, links)
    return [
        ("copies", f"{found['moves']:,} ({found['share_of_slots']:.1%} of all slots)"),
        ("to other nodes", f"{found['cross_node']:,}"),
        ("bytes", f"{found['bytes'] / GIGA:,.2f} GB"),
        ("stages", f"{found['stages']:,} over {found['passes']:,} passes"),
        ("transfer", f"{found['seconds']:.3f} s, by the bandwidths given"),
    ]


def _earned(earned: Payback, steps: float) -> dict[str, Any]:
    return {
        "gain_seconds_per_step": earned.gain,
        "stall_seconds": earned.stall,
        "slowed_seconds": earned.slowed,
        "stall_steps": _finite(earned.steps("stall")),
        "slowed_steps": _finite(earned.steps("slowed")),
        "steps": steps,
        "stall_net_seconds": earned.net(steps, "stall"),
        "slowed_net_seconds": earned.net(steps, "slowed"),
    }


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None


def _payback_words(earned: Payback | None, steps: float, slowdown: float) -> list[tuple[str, str]]:
    if earned is None:
        return [("pays", "unknown: the instance's times are not seconds; give --step-seconds")]
    words = []
    for mode, what in (("stall", "serving stops"), ("slowed", f"steps {slowdown:.0%} slower")):
        needed = earned.steps(cast(Any, mode))
        when = "never" if needed == float("inf") else f"after {needed:,.0f} steps"
        net = earned.net(steps, cast(Any, mode))
        words.append((f"if {what}", f"pays {when}; over {steps:,.0f} steps {net:+,.2f} s"))
    return words


def _point(point: Point) -> dict[str, Any]:
    return {
        "budget": point.budget,
        "moves": point.moves,
        "bytes": point.bytes,
        "objective": point.objective,
        "lower_bound": point.lower_bound,
        "gap": _finite(point.gap),
        "kept": point.kept,
    }


def _table(points: list[Point], unit: str) -> list[str]:
    if not points:
        return []
    rows = [("budget", "copies", "GB", "step time", "bound", "share of the gain")]
    for point in points:
        rows.append(
            (
                "none" if point.budget is None else f"{point.budget:,}",
                f"{point.moves:,}",
                f"{point.bytes / GIGA:,.1f}",
                f"{point.objective:,.6g}",
                f"{point.lower_bound:,.6g}",
                f"{point.kept:.1%}",
            )
        )
    lines = table(rows, bars=[point.kept for point in points])
    return ["", *lines, f"step time in {unit}; no plan within a budget is below its bound"]


def _stages(moved: Migration, links: Links) -> dict[str, Any]:
    return {
        "format": "moeplace-migration",
        "version": 1,
        **_moved(moved, links),
        "list": [
            {
                "layer": stage.layer,
                "pass": stage.turn,
                "seconds": moved.stage_seconds(stage, links),
                "copies": [[c.expert, c.source, c.rank, c.slot] for c in stage.copies],
                "emptied": list(stage.dropped),
            }
            for stage in moved.stages
        ],
    }


def add_commands(app: typer.Typer) -> None:
    """Add the command, once."""
    usage = "migrate instance.json current.json new.json --expert-bytes 44050944 --out plan.json"
    if migrate_command not in {command.callback for command in app.registered_commands}:
        app.command("migrate", epilog=example(usage))(migrate_command)
