"""The command `moeplace simulate`: what plans buy in service."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer

from moeplace.cli_answers import read_given, write, write_json
from moeplace.cli_options import AsJson, Dask, Instance, Ray, Seed, Workers, example
from moeplace.compare import aligned, printable
from moeplace.errors import ProblemError
from moeplace.formats import read_plan
from moeplace.hardware import Cluster
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.requests import PROFILES, SPREAD, Profiles, Requests, read_requests
from moeplace.result import Limits
from moeplace.service import Service, Slo
from moeplace.service_table import figures, intervals, ratios, to_json
from moeplace.simulate import (
    Change,
    Engine,
    check_attainment,
    disaggregated,
    goodput,
    rehearse,
    simulate,
)
from moeplace.solve import solve
from moeplace.sweep import on_cluster, sweep

PHASES = ("prefill", "decode", "mixed", "disaggregated")


def simulate_command(
    instance: Instance,
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PLAN...",
            help="Plan files (JSON), auto, or policies (contiguous, eplb, ...); the others are "
            "compared with the first. Default: contiguous eplb eplb_lpt vibe auto.",
            show_default=False,
        ),
    ] = None,
    phase: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(PHASES)}.")] = "prefill",
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="INSTANCE",
            help="disaggregated: the pool that decodes, its plans made by the same names.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[int, typer.Option(metavar="N", help="Requests of each seed.")] = 5000,
    rate: Annotated[float, typer.Option(metavar="R", help="Requests per second (Poisson).")] = 10.0,
    prompt: Annotated[float, typer.Option(metavar="N", help="Mean tokens of prompts.")] = 1024.0,
    output: Annotated[float, typer.Option(metavar="N", help="Mean tokens of answers.")] = 128.0,
    variation: Annotated[
        float, typer.Option(metavar="CV", help="Standard deviation over mean of both (gamma).")
    ] = 0.0,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            help="Requests as recorded instead: columns arrival, prompt, output and, if known, "
            "kind (window of the loads).",
            show_default=False,
        ),
    ] = None,
    spread: Annotated[
        float,
        typer.Option(metavar="CV", help="How much requests differ in an expert's share."),
    ] = SPREAD,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Assignments a second of a rank of speed 1, where speeds are relative.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[float, typer.Option(metavar="K", help="Experts of each token.")] = 8,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a pass, all ranks together.")
    ] = 16_384,
    max_running: Annotated[
        int, typer.Option(metavar="N", help="Requests that decode at a time.")
    ] = 1024,
    step_us: Annotated[
        float, typer.Option(metavar="US", help="Of a pass besides MoE layers, in microseconds.")
    ] = 0.0,
    token_us: Annotated[
        float, typer.Option(metavar="US", help="The same for each token of the pass.")
    ] = 0.0,
    link_us: Annotated[
        float, typer.Option(metavar="US", help="All-to-alls of a layer, both ways.")
    ] = 0.0,
    link_token_us: Annotated[
        float,
        typer.Option(metavar="US", help="The same for each token of the rank that gets most."),
    ] = 0.0,
    slo_ttft: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Limit to the first token.", show_default=False),
    ] = None,
    slo_tpot: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Limit for each later token.", show_default=False),
    ] = None,
    attainment: Annotated[
        float, typer.Option(metavar="SHARE", help="Requests that must be within the limits.")
    ] = 0.9,
    find_rate: Annotated[
        bool,
        typer.Option("--find-rate", help="Find the most requests a second within the limits."),
    ] = False,
    replan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AT:STALL:PLAN",
            help="From AT seconds all ranks stall for STALL seconds, then run under PLAN. "
            "May be given several times; for all plans.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Independent runs.")] = 5,
    seed: Seed = 0,
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", help="Of solving auto.")] = 1.0,
    workers: Workers = 1,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Profile file of moeplace calibrate: its ranks' fitted times.",
            show_default=False,
        ),
    ] = None,
    dask: Dask = None,
    ray: Ray = None,
    as_json: AsJson = False,
) -> None:
    """Serve requests under plans: time to first token, per token, goodput; with intervals."""
    if phase not in PHASES:
        raise ProblemError(f"Phase must be one of {', '.join(PHASES)}, got {phase!r}.")
    if (phase == "disaggregated") != (decode is not None):
        raise ProblemError(
            "Disaggregated serving needs the pool that decodes: give --decode INSTANCE (and only "
            "with --phase disaggregated)."
        )
    if find_rate and (phase == "disaggregated" or (slo_ttft is None and slo_tpot is None)):
        raise ProblemError(
            "--find-rate needs --slo-ttft or --slo-tpot, and prefill, decode or mixed."
        )
    if not 1 <= seeds <= 1000:
        raise ProblemError(f"--seeds must be from 1 to 1000, got {seeds}.")
    check_attainment(attainment)
    Limits(time=time_limit)
    if workers < 1:
        raise ProblemError(f"--workers must be a whole number from 1, got {workers}.")
    slo = Slo(
        ttft=np.inf if slo_ttft is None else 1e-3 * slo_ttft,
        tpot=np.inf if slo_tpot is None else 1e-3 * slo_tpot,
    )
    given = read_given(instance, False, profile, "planes" if profile else "speed")
    problem = in_seconds(given.problem, tokens_per_second)
    engine = Engine(
        top_k=top_k, max_tokens=max_tokens, max_running=max_running,
        step_seconds=1e-6 * step_us, token_seconds=1e-6 * token_us,
        link_seconds=1e-6 * link_us, link_token_seconds=1e-6 * link_token_us,
    )  # fmt: skip
    names = plans or ["contiguous", "eplb", "eplb_lpt", "vibe", "auto"]
    if len(set(names)) < len(names):
        raise ProblemError(f"Each plan may be given once: {', '.join(names)}.")
    made = {name: _plan(problem, name, time_limit, seed) for name in names}
    later = None
    if decode is not None:
        other = in_seconds(read_given(decode, False, profile, "planes" if profile else "speed")
                           .problem, tokens_per_second)  # fmt: skip
        later = (other, {name: _plan(other, name, time_limit, seed) for name in names})
    changes = [_change(text, problem, time_limit, seed) for text in replan or ()]

    def stream(one: int) -> tuple[Requests, Profiles]:
        profiles = Profiles.of(problem.loads, count=PROFILES, spread=spread, seed=one)
        if trace is not None:
            drawn = read_requests(trace, profiles, one)
        else:
            drawn = Requests.poisson(
                profiles, requests, rate=rate, prompt=prompt, output=output,
                variation=variation, seed=one,
            )  # fmt: skip
        return drawn.only(phase) if phase in ("prefill", "decode") else drawn, profiles

    streams = {one: stream(one) for one in range(seed, seed + seeds)}
    rehearse(problem, made[names[0]], streams[seed][1], engine)
    calls = []
    for one, (drawn, profiles) in streams.items():
        for name in names:
            pool = None if later is None else (later[0], later[1][name])
            limits = (slo, attainment) if find_rate else (slo, None)
            calls.append((problem, made[name], drawn, profiles, engine, changes, pool, limits, one))
    with on_cluster(dask, ray):
        served = sweep(_served, calls, workers)
    found = {
        name: [served[s * len(names) + n] for s in range(seeds)] for n, name in enumerate(names)
    }
    if as_json:
        write_json(
            {
                "instance": instance,
                "digest": problem.digest(),
                "phase": phase,
                "requests": next(iter(streams.values()))[0].count,
                "seeds": seeds,
                "plans": {name: to_json(intervals(rows)) for name, rows in found.items()},
                "ratios": {
                    name: to_json(ratios(rows, found[names[0]]))
                    for name, rows in found.items()
                    if name != names[0]
                },
            }
        )
        return
    count = next(iter(streams.values()))[0].count
    come = f"recorded, {printable(trace)}" if trace else f"Poisson, {rate:g} a second"
    words = [
        *given.words,
        ("serving", f"simulated, {phase}; {count:,} requests, {come}; seeds {seeds}"),
        ("profiles", f"{PROFILES}, spread {spread:g}; passes of up to {max_tokens:,} tokens"),
    ]
    write("\n".join([*aligned(words), "", *figures(found)]) + "\n")


def in_seconds(problem: Problem, tokens_per_second: float | None) -> Problem:
    """The problem with speeds in tokens/s."""
    cluster = problem.cluster
    if cluster.speed_unit == "tokens/s":
        if tokens_per_second is not None:
            raise ProblemError("--tokens-per-second is for relative speeds; these are absolute.")
        return problem
    if tokens_per_second is None:
        raise ProblemError(
            "The instance's speeds are relative, and serving needs seconds: say with "
            "--tokens-per-second how many assignments a second a rank of speed 1 runs, or give "
            "--profile."
        )
    if not 0 < tokens_per_second < 1e15:
        raise ProblemError(f"--tokens-per-second must be positive, got {tokens_per_second!r}.")
    speeds = cluster.speeds * tokens_per_second
    known = Cluster.from_speeds(speeds, cluster.slots, cluster.nodes)
    return replace(problem, cluster=known)


def _plan(problem: Problem, name: str, time_limit: float, seed: int) -> Plan:
    if name in POLICIES:
        return POLICIES[name](problem)
    if name == "auto":
        return solve(problem, time_limit=time_limit, seed=seed).plan
    return read_plan(name)


def _change(text: str, problem: Problem, time_limit: float, seed: int) -> Change:
    at, _, rest = text.partition(":")
    stall, _, plan = rest.partition(":")
    try:
        times = float(at), float(stall)
    except ValueError:
        times = (-1.0, -1.0)
    if not (plan and all(0 <= value < float("inf") for value in times)):
        raise ProblemError(f"--replan must be AT:STALL:PLAN, e.g. 60:0.5:new.json, got {text!r}.")
    return Change(at=times[0], stall=times[1], plan=_plan(problem, plan, time_limit, seed))


def _served(
    problem: Problem,
    plan: Plan,
    requests: Requests,
    profiles: Profiles,
    engine: Engine,
    changes: Sequence[Change],
    pool: tuple[Problem, Plan] | None,
    limits: tuple[Slo, float | None],
    seed: int,
) -> dict[str, float]:
    """One run's figures."""
    slo, attainment = limits
    if pool is not None:
        pools = {"prefill": (problem, plan, engine), "decode": (*pool, engine)}
        service: Service = disaggregated(pools, requests, profiles, seed=seed)
    else:
        service = simulate(problem, plan, requests, profiles, engine, changes=changes, seed=seed)
    found = service.figures()
    if slo != Slo():
        found["within limits"] = service.attained(slo)
    if attainment is not None:
        best = goodput(
            problem, plan, requests, profiles, engine, slo, attainment=attainment, seed=seed
        )
        found["goodput"] = best.rate
    return found


def add_commands(app: typer.Typer) -> None:
    """Add `simulate`, once."""
    usage = "simulate generate:A:0 eplb auto --tokens-per-second 5e6 --rate 300 --slo-ttft 350"
    if all(command.callback is not simulate_command for command in app.registered_commands):
        app.command("simulate", epilog=example(usage))(simulate_command)
