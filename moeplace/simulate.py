"""What a plan buys in service: requests queue for ranks that run under it, step by step.

One pool of ranks runs one forward pass after the other. A pass takes first one token of every
request that decodes, then waiting prompts, first come, first served, up to a limit of tokens
(longer prompts in chunks). Each layer waits for its slowest rank; which experts the tokens of a
batch choose is drawn from the profiles of its requests. Prefill alone (outputs of 1), decode alone
(prompts of 0) and both mixed are the same loop; `disaggregated` runs two pools one after the
other.

Not modelled: overlap of communication and computing, attention that grows with the context,
memory of the KV cache (but for `max_running`), clocks that fall under load, and waiting for one
another of ranks outside of MoE layers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.dispatch import shares
from moeplace.errors import ProblemError
from moeplace.evaluate import check_fits
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem, check_problem
from moeplace.requests import Profiles, Requests
from moeplace.service import Service, Slo
from moeplace.topology import check_top_k

#: Requests per second are found to within this share.
RATE_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What bounds a forward pass, and what it takes besides experts.

    Parameters
    ----------
    top_k : float
        Experts of each token.
    max_tokens : int
        Most tokens of a pass, of all ranks together.
    max_running : int
        Most requests that decode at a time.
    step_seconds, token_seconds : float
        Of a pass, and for each of its tokens: attention and all that is not a MoE layer.
    link_seconds, link_token_seconds : float
        Of a layer's all-to-alls (both ways), and for each token of the rank that gets most.

    Raises
    ------
    ProblemError
        If one is out of range.
    """

    top_k: float = 8
    max_tokens: int = 16_384
    max_running: int = 1024
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    link_seconds: float = 0.0
    link_token_seconds: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            seconds = field.name.endswith("seconds")
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not (0 if seconds else 1) <= value < 1e9:
                least = "0 s" if seconds else "1"
                raise ProblemError(
                    f"An engine's {field.name} must be a number from {least}, got {value!r}."
                )
            if field.name.startswith("max_") and value != int(value):
                raise ProblemError(f"An engine's {field.name} must be whole, got {value!r}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """A re-plan in service: from `at` seconds on all ranks stall, then run under `plan`."""

    at: float
    stall: float
    plan: Plan


def simulate(
    problem: Problem,
    plan: Plan,
    requests: Requests,
    profiles: Profiles,
    engine: Engine,
    *,
    changes: Sequence[Change] = (),
    seed: int = 0,
) -> Service:
    """Serve requests under a plan.

    Parameters
    ----------
    problem : Problem
        Its cluster and routing, and base loads in proportion to the loads; in seconds.
    plan : Plan
        At its stored shares (mean over windows).
    requests : Requests
    profiles : Profiles
    engine : Engine
    changes : sequence of Change
        Re-plans, in order of time.
    seed : int
        Of the experts that tokens choose; the same for plans that are compared.

    Raises
    ------
    ProblemError
        If times are not seconds, or the parts do not fit each other.
    PlanError
        If a plan does not fit the problem.
    """
    _check_kinds(problem, requests, profiles, engine)
    from moeplace.serving import STEPS, serve

    if problem.cluster.speed_unit != "tokens/s":
        raise ProblemError(
            "Serving needs times in seconds, and the cluster's speeds are relative: give speeds in "
            "tokens/s, planes or a table (Cluster.from_speeds, from_planes, from_profile)."
        )
    if profiles.shares.shape[1:] != (problem.layers, problem.experts):
        raise ProblemError(
            f"Profiles are of {profiles.shares.shape[1]} layers x {profiles.shares.shape[2]} "
            f"experts but the problem has {problem.layers} x {problem.experts}."
        )
    if (most := int(requests.profile.max())) >= profiles.kind.size:
        raise ProblemError(
            f"A request has profile {most}, and there are {profiles.kind.size}: draw profiles "
            "with Profiles.draw."
        )
    check_top_k(problem, engine.top_k)
    times = [change.at for change in changes]
    if any(not change.stall >= 0 for change in changes) or times != sorted(times):
        raise ProblemError("Changes need stalls of at least 0 s, in order of time.")
    tables = [held(problem, each) for each in (plan, *(change.plan for change in changes))]
    begun, first, last, log = serve(
        tuple(np.array(part) for part in (requests.arrival, requests.prompt, requests.output,
                                          requests.profile)),
        np.array(profiles.shares),
        float(engine.top_k),
        tuple(np.array(part) for part in zip(*tables, strict=True)),
        by_rank(problem),
        (np.array(times, dtype=np.float64), np.array([change.stall for change in changes], float)),
        _base_share(problem),
        np.array(problem.layer_weight),
        model_of(problem),
        (int(engine.max_tokens), int(engine.max_running), float(engine.step_seconds),
         float(engine.token_seconds), float(engine.link_seconds),
         float(engine.link_token_seconds)),
        int(seed),
    )  # fmt: skip
    return Service(
        requests=requests,
        begun=begun,
        first=first,
        last=last,
        steps={name: log[:, column] for column, name in enumerate(STEPS)},
        layers=float(problem.layer_weight.sum()),
    )


def disaggregated(
    pools: Mapping[str, tuple[Problem, Plan, Engine]],
    requests: Requests,
    profiles: Profiles,
    *,
    transfer: float = 0.0,
    seed: int = 0,
) -> Service:
    """Serve prompts in the pool "prefill", then the rest in the pool "decode".

    `transfer` seconds lie between the two. The steps are those of the decode pool.
    """
    ahead = simulate(*pools["prefill"][:2], requests.only("prefill"), profiles,
                     pools["prefill"][2], seed=seed)  # fmt: skip
    order = np.argsort(ahead.first, kind="stable")
    order = order[requests.output[order] > 1]
    begun, last = ahead.begun.copy(), ahead.first.copy()
    steps, layers = ahead.steps, ahead.layers
    if order.size:
        rest = Requests(
            arrival=ahead.first[order] + transfer,
            prompt=np.zeros(order.size, dtype=np.int64),
            output=requests.output[order] - 1,
            profile=requests.profile[order],
        )
        later = simulate(*pools["decode"][:2], rest, profiles, pools["decode"][2], seed=seed)
        last[order] = later.last
        steps, layers = later.steps, later.layers
    return Service(
        requests=requests, begun=begun, first=ahead.first, last=last, steps=steps, layers=layers
    )


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """The most requests per second at which enough of them are within the limits."""

    rate: float
    attained: float


def check_attainment(attainment: float) -> None:
    """Raise ProblemError unless it is a share of requests."""
    if not 0 < attainment <= 1:
        raise ProblemError(f"Attainment must be above 0 and at most 1, got {attainment!r}.")


def _check_kinds(problem: object, requests: object, profiles: object, engine: object) -> None:
    check_problem(problem)
    parts = ((requests, Requests), (profiles, Profiles), (engine, Engine))
    for value, kind in parts:
        if not isinstance(value, kind):
            raise ProblemError(
                f"A simulation needs moeplace.{kind.__name__}, got {type(value).__name__}."
            )


def goodput(
    problem: Problem,
    plan: Plan,
    requests: Requests,
    profiles: Profiles,
    engine: Engine,
    slo: Slo,
    *,
    attainment: float = 0.9,
    changes: Callable[[Requests], Sequence[Change]] = lambda _: (),
    seed: int = 0,
) -> Goodput:
    """Bisect the rate at which these requests come: the largest with enough within the limits.

    Of the requests as they are, from an empty pool; 0 if not even a slow rate attains it.
    `changes` says when to re-plan, given the requests as they come.

    Raises
    ------
    ProblemError
        If `attainment` is no share.
    """
    _check_kinds(problem, requests, profiles, engine)
    check_attainment(attainment)
    span = float(requests.arrival[-1] - requests.arrival[0])
    own = requests.count / span if span > 0 else 1.0

    def attained(rate: float) -> float:
        come = requests.faster(rate / own)
        then = changes(come)
        served = simulate(problem, plan, come, profiles, engine, changes=then, seed=seed)
        return served.attained(slo)

    together = replace(requests, arrival=np.zeros(requests.count))
    fastest = simulate(problem, plan, together, profiles, engine, seed=seed)
    high = 2 * requests.count / fastest.seconds
    low = high / 2
    while (met := attained(low)) < attainment:  # from above: slow rates mean many small passes
        low, high = low / 2, low
        if low * 1024 < requests.count / fastest.seconds:
            return Goodput(rate=0.0, attained=met)
    while high > low * (1 + RATE_TOLERANCE):
        middle = (low * high) ** 0.5
        found = attained(middle)
        if found >= attainment:
            low, met = middle, found
        else:
            high = middle
    return Goodput(rate=low, attained=met)


def rehearse(problem: Problem, plan: Plan, profiles: Profiles, engine: Engine) -> float:
    """Load or compile the loop; seconds that it took."""
    began = time.perf_counter()
    one = np.array([1])
    requests = Requests(arrival=np.zeros(1), prompt=one, output=2 * one, profile=0 * one)
    simulate(problem, plan, requests, profiles, engine)
    return time.perf_counter() - began


def model_of(problem: Problem) -> tuple[Any, ...]:
    """The cluster's latency as `serving.layer_ranks` takes it."""
    cluster = problem.cluster
    none = np.empty((problem.ranks, 0))
    zero, one = np.zeros(1), np.ones(1)
    if cluster.table is not None:
        table = cluster.table
        return (zero, zero, one, np.array(table.tokens), np.array(table.seconds),
                np.array(table.rate))  # fmt: skip
    if cluster.planes is not None:
        planes = cluster.planes
        return (np.array(planes.startup), np.array(planes.activation), np.array(planes.compute),
                none, none, np.array(cluster.speeds))  # fmt: skip
    return zero, zero, one, none, none, np.array(cluster.speeds)


def held(problem: Problem, plan: Plan) -> tuple[IntArray, FloatArray, FloatArray, IntArray]:
    """What slots hold, as `serving.layer_ranks` takes it, each [layers, ...]."""
    check_fits(problem, plan)
    share = shares(problem, plan)
    if share.ndim == 3:
        share = np.tensordot(problem.window_weight, share, axes=1)
    filled = plan.slots != EMPTY
    share = np.where(filled, share, 0.0)
    whole = share >= 1.0
    rest = np.where(whole, 1.0, np.log1p(-np.where(whole, 0.0, share)))
    some = rest < 0
    partial = np.zeros((plan.layers, share.shape[1] + 1), dtype=np.int64)
    partial[:, :-1] = np.argsort(~some, axis=1, kind="stable")
    partial[:, -1] = some.sum(axis=1)
    return np.where(filled, plan.slots, 0), share, rest, partial


def by_rank(problem: Problem) -> tuple[IntArray, IntArray]:
    """Slots by rank: first [ranks + 1], rank [slots]."""
    slots = problem.cluster.slots
    return np.append(0, slots.cumsum()), np.repeat(np.arange(slots.size), slots)


def _base_share(problem: Problem) -> FloatArray:
    """A rank's own tokens for each assignment of its layer [layers, ranks]."""
    tokens, base = problem.mean_load
    total = tokens.sum(axis=1, keepdims=True)
    return np.asarray(base / np.where(total > 0, total, 1.0))
