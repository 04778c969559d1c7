"""Runs behind the tables of ViBE's experiments: one simulation each, or a bisection of them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.policies.vibe import vibe_update
from moeplace.requests import Profiles, Requests
from moeplace.service import Interval, Service, Slo
from moeplace.simulate import Change, goodput, simulate
from moeplace.solve import solve
from moeplace.sweep import sweep
from moeplace.vibe_setting import VIBE, Setting, profiles_of, requests_of, setting


class Runs:
    """The tables' runs, settings and plans made once."""

    def __init__(self, instances: Path, seeds: tuple[int, ...], share: float, workers: int) -> None:
        self.instances, self.seeds, self.share, self.workers = instances, seeds, share, workers
        self.settings: dict[Any, Setting] = {}
        self.made: dict[Any, dict[str, Plan]] = {}

    def of(self, name: str, speeds: str | float, **more: Any) -> tuple[Setting, dict[str, Plan]]:
        """A setting and its plans."""
        key = (name, speeds, tuple(sorted(more.items())))
        if key not in self.settings:
            self.settings[key] = setting(self.instances, name, speeds, **more)
        one = self.settings[key]
        digest = one.problem.digest()
        if digest not in self.made:
            self.made[digest] = one.plans()
        return one, self.made[digest]

    def over_seeds(
        self, call: Callable[..., Any], one: Setting, plans: dict[str, Plan], *more: Any
    ) -> dict[str, list[Any]]:
        """Results of each plan for each seed."""
        pairs = list(itertools.product(plans, self.seeds))
        calls = [(one, plans[name], seed, self.share, *more) for name, seed in pairs]
        found = sweep(call, calls, self.workers)
        return {
            name: [each for (who, _), each in zip(pairs, found, strict=True) if who == name]
            for name in plans
        }


def saturated(one: Setting, plan: Plan, seed: int, share: float = 1.0) -> Service:
    """All requests' prompts at once: passes are full."""
    requests, profiles = requests_of(one, seed, share)
    together = replace(requests.only("prefill"), arrival=np.zeros(requests.count))
    return simulate(one.problem, plan, together, profiles, one.engine, seed=seed)


def layer_run(one: Setting, plan: Plan, seed: int, share: float) -> dict[str, float]:
    """Layer latency, gap of fastest to slowest, idle and synchronised MoE time, passes full."""
    served = saturated(one, plan, seed, share)
    moe, mean = served.steps["moe"].sum(), served.steps["mean_rank"].sum()
    return {
        "layer": served.layer_seconds,
        "gap": served.layer_gap,
        "idle": float(moe - mean) / served.steps["moe"].size / one.model.layers,
        "moe": float(moe + served.steps["link"].sum()),
    }


def rate_run(one: Setting, plan: Plan, seed: int, share: float) -> float:
    """Prompts a second of which 90 % get their first token within the model's limit."""
    requests, profiles = requests_of(one, seed, share)
    slo = Slo(ttft=one.model.ttft)
    return goodput(
        one.problem, plan, requests.only("prefill"), profiles, one.engine, slo, seed=seed
    ).rate  # fmt: skip


def tails_run(
    one: Setting, plan: Plan, seed: int, share: float, rate: float
) -> tuple[float, float]:
    """P90 and P99 of the time to the first token at this rate."""
    requests, profiles = requests_of(one, seed, share)
    come = requests.only("prefill").faster(rate)
    ttft = simulate(one.problem, plan, come, profiles, one.engine, seed=seed).ttft
    return float(np.percentile(ttft, 90)), float(np.percentile(ttft, 99))


def decode_run(one: Setting, plan: Plan, seed: int, share: float) -> tuple[float, float]:
    """Seconds for each token and idle share, `decoding` requests at a time."""
    profiles = profiles_of(one, seed)
    count = VIBE.decoding
    output = np.full(count, max(int(64 * share), 8))
    requests = Requests(
        arrival=np.zeros(count), prompt=np.zeros(count, dtype=np.int64), output=output,
        profile=profiles.draw(count, seed),
    )  # fmt: skip
    served = simulate(one.problem, plan, requests, profiles, one.engine, seed=seed)
    return float(served.tpot.mean()), served.idle_share


def drift_run(
    before: Setting,
    after: Setting,
    plan: Plan,
    later: Plan | None,
    stall: float,
    seed: int,
    share: float,
) -> float:
    """Goodput where the second half of the requests is of another load."""
    one, own = requests_of(before, seed, share)
    other = profiles_of(after, seed + 1000)
    half = one.count // 2
    profile = one.profile.copy()
    profile[half:] += own.kind.size
    both = Profiles(
        shares=np.concatenate([own.shares, other.shares]),
        kind=np.concatenate([own.kind, other.kind + 1]),
        weight=np.array([0.5, 0.5]),
    )
    requests = replace(one.only("prefill"), profile=profile)

    def changes(come: Requests) -> list[Change]:
        if later is None:
            return []
        return [Change(at=float(come.arrival[half]) + VIBE.notice, stall=stall, plan=later)]

    return goodput(
        before.problem, plan, requests, both, before.engine, Slo(ttft=before.model.ttft),
        changes=changes, seed=seed,
    ).rate  # fmt: skip


def replanned(policy: str, plan: Plan, after: Setting) -> tuple[Plan, int]:
    """The plan for the new load, and most copies that a rank receives."""
    problem = after.problem
    if policy == "vibe":
        cluster = problem.cluster
        slots, _ = vibe_update(plan.slots, problem.mean_load[0], cluster.speeds, cluster.slots)
        later = Plan(slots=slots, rank_slots=plan.rank_slots, experts=plan.experts)
    elif policy == "auto":
        later = solve(problem, time_limit=VIBE.solve_seconds, start=plan, gap=0.01).plan
    else:
        later = POLICIES[policy](problem)
    return later, int(later.moves_from(plan).sum(axis=0).max())


def change(values: list[float], base: list[float]) -> str:
    """Change against a base in the same runs, with its interval over seeds."""
    ratio = [a / b if b > 0 else float("nan") for a, b in zip(values, base, strict=True)]
    found = Interval.of(ratio)
    half = "" if np.isinf(found.half) else f" +-{100 * found.half:.1f}"
    return f"{100 * (found.mean - 1):+.1f}{half} %"
