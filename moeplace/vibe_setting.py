"""The setting of ViBE's experiments (Go et al. 2026, arXiv 2606.00735), as far as it can be had.

No curves of its GPUs (MI325X) are public. What stands in for them, and every other constant, is in
`VIBE` and `MODELS`, fixed before any comparison and not tuned to match.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.bench_latency import curve
from moeplace.fit import fit
from moeplace.hardware import Cluster
from moeplace.instances import generate
from moeplace.loads import LoadHistogram
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.requests import Profiles, Requests
from moeplace.simulate import Engine
from moeplace.solve import solve

POLICY_NAMES = ("contiguous", "eplb", "eplb_lpt", "vibe", "auto")
#: How much longer the slow one takes among equal GPUs ("one slow").
ONE_SLOW = 0.28
LABELS = {"eplb_lpt": "EPLB + speed-aware LPT", "eplb": "EPLB", "vibe": "ViBE", "auto": "ours"}


@dataclass(frozen=True, kw_only=True)
class Constants:
    """All that is fixed, for every table.

    Attributes
    ----------
    system : str
        GPU whose measured kernel times are used (instances/sources/moe_kernel_latency.csv).
    fleet : str
        Measured spread of nominally equal GPUs (instances/sources/gpu_relative_time.json); the
        ranks are its quantiles, and only compute is slower (times in memory are the same).
    max_tokens : int
        Of a pass of 8 ranks; of more ranks in proportion.
    spread : float
        Of the requests' profiles.
    step_seconds : float
        Of a pass besides its tokens: a guess.
    link : (float, float)
        All-to-all: seconds each way, bytes a second of a rank (NCCL on 8 H100, measured).
    bandwidth : float
        Bytes a second at which a rank receives weights when it re-plans: a guess.
    notice : float
        Seconds from a shift of load to the re-plan: a guess.
    decoding : int
        Requests that decode at a time in the decode table.
    seeds : tuple of int
        Of requests, profiles and draws.
    load_seed : int
        Of synthetic loads.
    solve_seconds : float
        Time limit of our planner for each plan.
    """

    system: str = "h200"
    fleet: str = "sgemm-longhorn"
    max_tokens: int = 16_384
    spread: float = 0.5
    step_seconds: float = 2e-3
    link: tuple[float, float] = (8e-6, 317e9)
    bandwidth: float = 50e9
    notice: float = 2.0
    decoding: int = 256
    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    load_seed: int = 100
    solve_seconds: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and its requests.

    Attributes
    ----------
    curve : str
        Model whose measured kernel curve (8 ranks) is used.
    layers, experts, top_k : int
    weight : float
        Layers of the model for each layer that loads are known of.
    token_seconds : float
        Besides MoE layers, for each token of a pass: 2 x active parameters outside of experts /
        (8 GPUs x 500 TFLOP/s), an estimate.
    sent_bytes : float
        Of an assignment: there and back.
    expert_bytes : float
    prompt, output, variation, requests : requests as in the paper; lengths gamma.
    ttft, tpot : float
        The paper's limits, in seconds.
    """

    curve: str
    layers: int
    experts: int
    top_k: int
    weight: float
    token_seconds: float
    sent_bytes: float
    expert_bytes: float
    prompt: float
    output: float
    variation: float
    requests: int
    ttft: float
    tpot: float


VIBE = Constants()
MODELS = {
    # loads: synthetic (moeplace.instances.generate); none of DeepSeek-V3 are public
    "DeepSeek-V3": Model(
        curve="DeepSeek-V3", layers=58, experts=256, top_k=8, weight=1.0, token_seconds=7.5e-6,
        sent_bytes=7168 * 3, expert_bytes=44_050_944, prompt=1024, output=128, variation=0.0,
        requests=1000, ttft=0.350, tpot=0.125,
    ),
    # loads: measured, Qwen3-30B-A3B on ShareGPT (48 layers of as many experts and the same top-k)
    "Qwen3-235B": Model(
        curve="Qwen3-235B-A22B", layers=48, experts=128, top_k=8, weight=94 / 48,
        token_seconds=3.9e-6, sent_bytes=4096 * 4, expert_bytes=3 * 4096 * 1536 * 2, prompt=219,
        output=201, variation=1.0, requests=5000, ttft=0.250, tpot=0.100,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Setting:
    """One model on one set of ranks, its requests and plans."""

    model: Model
    problem: Problem
    engine: Engine
    spread: float
    loads: tuple[Any, ...]  # what they were made of

    def plans(self, names: Iterable[str] = POLICY_NAMES) -> dict[str, Plan]:
        """Plans by policy, one replica of each expert unless ranks have more slots."""
        return {name: planned(self.problem, name) for name in names}


def setting(
    instances: Path,
    name: str,
    speeds: str | float,
    *,
    ranks: int = 8,
    max_tokens: int | None = None,
    spread: float | None = None,
    skew: float = 1.0,
    epoch: int = 0,
    window: int | None = None,
    constants: Constants = VIBE,
) -> Setting:
    """A model on `ranks` GPUs; speeds "equal", "fleet", "one slow", or a spread max / min - 1.

    `skew` is the power that the experts' shares are raised to; epoch and window choose the loads.
    """
    model = MODELS[name]
    planes = _planes(instances, model.curve, constants.system)
    if name == "DeepSeek-V3":
        shape = (model.layers, model.experts, model.experts, 8)
        tokens = generate(shape, constants.load_seed, epoch=epoch).loads.aggregate().tokens
    else:
        file = json.loads((instances / "sources" / "qwen3_30b_a3b_sharegpt.json").read_text())
        tokens = np.array(file["loads"], dtype=np.float64)
        tokens = tokens[[window]] if window is not None else tokens.sum(axis=0, keepdims=True)
    shares = tokens / tokens.sum(axis=2, keepdims=True)
    shares = shares**skew
    shares /= shares.sum(axis=2, keepdims=True)
    batch = (constants.max_tokens if max_tokens is None else max_tokens) * ranks // 8
    slots = -(-model.experts // ranks)
    startup, activation, compute = planes.T
    slow = slowness(instances, speeds, ranks)
    cluster = Cluster.from_planes(startup, activation, compute, slow, slots)
    loads = LoadHistogram(tokens=shares * batch * model.top_k, passes=np.ones(1), phase="prefill")
    engine = Engine(
        top_k=model.top_k,
        max_tokens=batch,
        max_running=constants.decoding,
        step_seconds=constants.step_seconds,
        token_seconds=model.token_seconds * 8 / ranks,
        link_seconds=2 * constants.link[0],
        link_token_seconds=model.sent_bytes / constants.link[1],
    )
    weight = np.full(model.layers, model.weight)
    return Setting(
        model=model,
        problem=Problem(loads, cluster, layer_weight=weight, name=name),
        engine=engine,
        spread=constants.spread if spread is None else spread,
        loads=(name, skew, epoch, window),
    )


@lru_cache
def _planes(instances: Path, name: str, system: str) -> FloatArray:
    planes = fit(curve(instances, name, system, 8), "planes").planes
    assert planes is not None
    return planes


def slowness(instances: Path, speeds: str | float, ranks: int) -> FloatArray:
    """Relative times of compute [ranks], mean speed 1, in an order shuffled once."""
    if speeds == "equal":
        return np.ones(ranks)
    if speeds == "fleet":
        file = json.loads((instances / "sources" / "gpu_relative_time.json").read_text())
        times = file["relative_time"][VIBE.fleet]
        found = np.quantile(times, (np.arange(ranks) + 0.5) / ranks)
    elif speeds == "one slow":
        found = np.append(np.ones(ranks - 1), 1.0 + ONE_SLOW)
    else:
        found = 1 / np.linspace(1.0, 1.0 + float(speeds), ranks)
    found = np.random.default_rng(0).permutation(found)
    return np.asarray(found * (1 / found).mean())


def planned(problem: Problem, name: str, start: Plan | None = None) -> Plan:
    """The plan of a policy, or of our planner from a start."""
    if name == "auto":
        return solve(problem, time_limit=VIBE.solve_seconds, start=start).plan
    return POLICIES[name](problem)


_known: dict[Any, Profiles] = {}


def profiles_of(one: Setting, seed: int) -> Profiles:
    """Profiles of these loads; the last few are kept, since every plan meets the same."""
    key = (*one.loads, one.spread, seed)
    found = _known.get(key)
    if found is None:
        found = Profiles.of(one.problem.loads, spread=one.spread, seed=seed)
        while len(_known) >= 12:
            _known.pop(next(iter(_known)), None)
        _known[key] = found
    return found


def requests_of(one: Setting, seed: int, share: float = 1.0) -> tuple[Requests, Profiles]:
    """The model's requests, and their profiles; at a rate of 1, to be made faster."""
    profiles = profiles_of(one, seed)
    model = one.model
    count = max(int(model.requests * share), 20)
    requests = Requests.poisson(
        profiles, count, rate=1.0, prompt=model.prompt, output=model.output,
        variation=model.variation, seed=seed,
    )  # fmt: skip
    return requests, profiles
