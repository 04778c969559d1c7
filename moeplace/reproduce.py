"""Published experiments in form: their tables, with our model's numbers beside theirs.

`moeplace reproduce vibe`: ViBE (Go et al. 2026, arXiv 2606.00735) by `moeplace.simulate`. No curves
of its GPUs (MI325X) are public. What stands in for them, and every other constant, is in `VIBE` and
`MODELS`, fixed before any comparison and not tuned to match. The paper's numbers are in `PAPER`.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
from moeplace.policies.vibe import vibe_update
from moeplace.problem import Problem
from moeplace.requests import Profiles, Requests
from moeplace.simulate import (
    Change,
    Engine,
    Interval,
    Service,
    Slo,
    goodput,
    simulate,
)
from moeplace.solve import solve
from moeplace.sweep import sweep

POLICY_NAMES = ("contiguous", "eplb", "eplb_lpt", "vibe", "auto")
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
#: What the paper reports, by (table, row).
PAPER = {
    "busiest": "over 24 %",
    "gap eplb / contiguous": "-63.9 %",
    "gap vibe / eplb": "a further -19.6 %",
    "layer vibe / contiguous": "-49.3 %",
    "layer vibe / eplb": "-27.9 %",
    "idle vibe / eplb": "-41 %",
    "moe vibe / eplb": "-35 %",
    ("qps", "DeepSeek-V3"): "+12 %",
    ("qps", "Qwen3-235B"): "+15 %",
    ("p90", "DeepSeek-V3"): "up to -45 %",
    ("p90", "Qwen3-235B"): "up to -10 %",
    ("p99", "DeepSeek-V3"): "up to -30 %",
    ("p99", "Qwen3-235B"): "up to -30 %",
    ("drift", "vibe", "DeepSeek-V3"): "1.68 -> 1.80 (+7.1 %)",
    ("drift", "vibe", "Qwen3-235B"): "6.7 -> 7.4 (+10.4 %)",
    ("drift", "eplb", "DeepSeek-V3"): "1.51 -> 1.63 (+7.9 %)",
    ("drift", "eplb", "Qwen3-235B"): "6.5 -> 7.0 (+7.7 %)",
    "scale": "best at 16 to 32 GPUs, all policies converge beyond 64",
}
LACKS = """Where ours is smaller than the paper's, the model lacks: clocks and power that fall under
load and react to it (DVFS), so that a busy GPU becomes slower still; bursts inside a batch (tokens
are independent given their request's profile, and profiles hold for the whole request); the
engine's own balancer as it ran (here EPLB plans on the true mean load, at its best); routing that
drifts within minutes; host time and stragglers outside of MoE layers. In a static linear model a
speed-aware plan saves at most mean(speed) / min(speed) - 1 over perfect balance of tokens: {most}
on these GPUs. ViBE is given the true speeds, EPLB the true mean load, and neither pays for
measuring them. The times are of other GPUs than the paper's: compare ratios, not seconds."""


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
        return {name: _planned(self.problem, name) for name in names}


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
    """A model on `ranks` GPUs; speeds "equal", "fleet" or a spread max / min - 1.

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
    cluster = Cluster.from_planes(*planes.T, slowness(instances, speeds, ranks), slots)
    loads = LoadHistogram(tokens=shares * batch * model.top_k, passes=1.0, phase="prefill")
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
    else:
        found = 1 / np.linspace(1.0, 1.0 + float(speeds), ranks)
    found = np.random.default_rng(0).permutation(found)
    return np.asarray(found * (1 / found).mean())


def _planned(problem: Problem, name: str, start: Plan | None = None) -> Plan:
    if name == "auto":
        return solve(problem, time_limit=VIBE.solve_seconds, start=start).plan
    return POLICIES[name](problem)


_known: dict[Any, Profiles] = {}


def _profiles(one: Setting, seed: int) -> Profiles:
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
    profiles = _profiles(one, seed)
    model = one.model
    count = max(int(model.requests * share), 20)
    requests = Requests.poisson(
        profiles, count, rate=1.0, prompt=model.prompt, output=model.output,
        variation=model.variation, seed=seed,
    )  # fmt: skip
    return requests, profiles


def saturated(one: Setting, plan: Plan, seed: int, share: float = 1.0) -> Service:
    """All requests' prompts at once: passes are full."""
    requests, profiles = requests_of(one, seed, share)
    together = replace(requests.only("prefill"), arrival=np.zeros(requests.count))
    return simulate(one.problem, plan, together, profiles, one.engine, seed=seed)


def _layers(one: Setting, plan: Plan, seed: int, share: float) -> dict[str, float]:
    served = saturated(one, plan, seed, share)
    moe, mean = served.steps["moe"].sum(), served.steps["mean_rank"].sum()
    return {
        "layer": served.layer_seconds,
        "gap": served.layer_gap,
        "idle": float(moe - mean) / served.steps["moe"].size / one.model.layers,
        "moe": float(moe + served.steps["link"].sum()),
    }


def _rate(one: Setting, plan: Plan, seed: int, share: float) -> float:
    requests, profiles = requests_of(one, seed, share)
    slo = Slo(ttft=one.model.ttft)
    return goodput(
        one.problem, plan, requests.only("prefill"), profiles, one.engine, slo, seed=seed
    ).rate  # fmt: skip


def _tails(one: Setting, plan: Plan, seed: int, share: float, rate: float) -> tuple[float, float]:
    requests, profiles = requests_of(one, seed, share)
    come = requests.only("prefill").faster(rate)
    ttft = simulate(one.problem, plan, come, profiles, one.engine, seed=seed).ttft
    return float(np.percentile(ttft, 90)), float(np.percentile(ttft, 99))


def _decoded(one: Setting, plan: Plan, seed: int, share: float) -> tuple[float, float]:
    """Seconds for each token and idle share, `decoding` requests at a time."""
    profiles = _profiles(one, seed)
    count = VIBE.decoding
    output = np.full(count, max(int(64 * share), 8))
    requests = Requests(
        arrival=np.zeros(count), prompt=np.zeros(count, dtype=np.int64), output=output,
        profile=profiles.draw(count, seed),
    )  # fmt: skip
    served = simulate(one.problem, plan, requests, profiles, one.engine, seed=seed)
    return float(served.tpot.mean()), served.idle_share


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one experiment; all have the keys of the first."""

    title: str
    about: str
    rows: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All tables of a paper."""

    title: str
    about: str
    tables: list[Table] = field(default_factory=list)
    lacks: str = ""

    def markdown(self) -> str:
        """As Markdown."""
        parts = [f"# {self.title}", "", self.about, ""]
        for table in self.tables:
            columns = list(dict.fromkeys(key for row in table.rows for key in row))
            parts += [f"## {table.title}", "", table.about, ""]
            parts += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
            parts += [
                "| " + " | ".join(row.get(column, "") for column in columns) + " |"
                for row in table.rows
            ]
            parts.append("")
        return "\n".join([*parts, "## What the model lacks", "", self.lacks, ""])

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "title": self.title,
            "tables": [{"title": table.title, "rows": table.rows} for table in self.tables],
        }


def vibe(
    instances: Path,
    *,
    quick: bool = False,
    workers: int = 1,
    tell: Callable[[str], object] = lambda _: None,
) -> Report:
    """ViBE's tables under our model, each with equal speeds as the control.

    Parameters
    ----------
    instances : path
        Folder of shipped instances, for the measured curves, spreads and loads.
    quick : bool
        Two seeds and a tenth of the requests: to see that it runs.
    workers : int
        Threads; or what joblib is configured for.
    tell : callable
        Called with a line before each table.
    """
    runs = _Runs(
        instances, VIBE.seeds[:2] if quick else VIBE.seeds, 0.1 if quick else 1.0, workers
    )
    tables = []
    for name, make in (
        ("prefill", runs.prefill),
        ("rates", runs.rates),
        ("decode", runs.decode),
        ("drift", runs.drift),
        ("scale", runs.scale),
        ("sensitivity", runs.sensitivity),
    ):
        tell(f"table {name}")
        tables.append(make())
    speeds = 1 / slowness(instances, "fleet", 8)
    most = f"{speeds.mean() / speeds.min() - 1:.1%}".replace("%", " %")
    constants = ", ".join(f"{key} {value}" for key, value in vars(VIBE).items() if key != "seeds")
    return Report(
        title="ViBE's experiments in form",
        about=(
            "Simulated; made by `moeplace reproduce vibe" + (" --quick" if quick else "") + "`. "
            f"Kernel times measured on {VIBE.system.upper()}, spread of GPUs measured "
            f"({VIBE.fleet}, max / min {speeds.max() / speeds.min():.3f} at 8 quantiles): not "
            "the paper's MI325X. Loads: synthetic for DeepSeek-V3, measured on Qwen3-30B for "
            "Qwen3-235B. +-: 95 % over seeds of requests, paired. All constants: "
            f"`moeplace/reproduce.py` ({constants}; seeds {len(runs.seeds)})."
        ),
        tables=tables,
        lacks=LACKS.format(most=most),
    )


class _Runs:
    """The tables' runs, settings and plans made once."""

    def __init__(self, instances: Path, seeds: tuple[int, ...], share: float, workers: int) -> None:
        self.instances, self.seeds, self.share, self.workers = instances, seeds, share, workers
        self.settings: dict[Any, Setting] = {}
        self.made: dict[Any, dict[str, Plan]] = {}

    def of(self, name: str, speeds: str | float, **more: Any) -> tuple[Setting, dict[str, Plan]]:
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

    def prefill(self) -> Table:
        rows = []
        for name in MODELS:
            found = {
                speeds: self.over_seeds(_layers, *self.of(name, speeds))
                for speeds in ("fleet", "equal")
            }
            one, plans = self.of(name, "fleet")
            tokens = one.problem.tokens[0]
            rank = plans["contiguous"].by_rank(
                np.take_along_axis(tokens, plans["contiguous"].slots, axis=1)
            ).sum(axis=2)
            busiest = float((rank / rank.sum(axis=1, keepdims=True)).max())
            rows.append({"model": name, "what": "busiest GPU's tokens, contiguous, worst layer",
                         "paper": PAPER["busiest"], "unequal GPUs": f"{100 * busiest:.1f} %",
                         "equal speeds": f"{100 * busiest:.1f} %"})  # fmt: skip
            for what, key, mine, theirs, known in (
                ("gap fastest to slowest GPU, median: EPLB against contiguous", "gap", "eplb",
                 "contiguous", PAPER["gap eplb / contiguous"]),
                ("the same: ViBE against EPLB", "gap", "vibe", "eplb", PAPER["gap vibe / eplb"]),
                ("the same: ours against EPLB", "gap", "auto", "eplb", ""),
                ("mean layer latency: ViBE against contiguous", "layer", "vibe", "contiguous",
                 PAPER["layer vibe / contiguous"]),
                ("the same: ViBE against EPLB", "layer", "vibe", "eplb",
                 PAPER["layer vibe / eplb"]),
                ("the same: EPLB + speed-aware LPT against EPLB", "layer", "eplb_lpt", "eplb", ""),
                ("the same: ours against EPLB", "layer", "auto", "eplb", ""),
                ("the same: ours against ViBE", "layer", "auto", "vibe", ""),
                ("barrier idle time: ViBE against EPLB", "idle", "vibe", "eplb",
                 PAPER["idle vibe / eplb"]),
                ("the same: ours against EPLB", "idle", "auto", "eplb", ""),
                ("synchronised MoE time: ViBE against EPLB", "moe", "vibe", "eplb",
                 PAPER["moe vibe / eplb"]),
                ("the same: ours against EPLB", "moe", "auto", "eplb", ""),
            ):  # fmt: skip
                row = {"model": name, "what": what, "paper": str(known)}
                for speeds, label in (("fleet", "unequal GPUs"), ("equal", "equal speeds")):
                    each = found[speeds]
                    row[label] = _change([r[key] for r in each[mine]],
                                         [r[key] for r in each[theirs]])  # fmt: skip
                rows.append(row)
        return Table(
            title="Prefill: layers",
            about=f"All prompts at once, passes of {VIBE.max_tokens:,} tokens on 8 GPUs.",
            rows=rows,
        )

    def rates(self) -> Table:
        rows = []
        for name in MODELS:
            for speeds in ("fleet", "equal"):
                one, plans = self.of(name, speeds)
                rates = self.over_seeds(_rate, one, plans)
                at = float(np.mean(rates["eplb"]))
                tails = self.over_seeds(_tails, one, plans, at)
                for policy in plans:
                    row = {"model": name, "GPUs": "unequal" if speeds == "fleet" else "equal",
                           "policy": LABELS.get(policy, policy)}  # fmt: skip
                    row["requests/s in limit"] = f"{np.mean(rates[policy]):.2f}"
                    row["against EPLB"] = _change(rates[policy], rates["eplb"])
                    for n, tail in enumerate(("p90", "p99")):
                        mine = [each[n] for each in tails[policy]]
                        base = [each[n] for each in tails["eplb"]]
                        row[f"{tail.upper()} TTFT"] = f"{1e3 * np.mean(mine):.0f} ms"
                        row[f"{tail.upper()} against EPLB"] = _change(mine, base)
                    if policy == "vibe" and speeds == "fleet":
                        row["paper (ViBE / EPLB: rate, P90, P99)"] = "; ".join(
                            PAPER[key, name] for key in ("qps", "p90", "p99")  # type: ignore[index]
                        )
                    rows.append(row)
        return Table(
            title="Prefill: requests",
            about=(
                "Requests per second at which 90 % get their first token within the limit (350 and "
                "250 ms), and tails at EPLB's mean rate. DeepSeek-V3: 1,000 prompts of 1,024 "
                "tokens; Qwen3: 5,000 of 219 on average."
            ),
            rows=rows,
        )

    def decode(self) -> Table:
        rows = []
        for name in MODELS:
            for speeds in ("fleet", "equal"):
                one, plans = self.of(name, speeds)
                found = self.over_seeds(_decoded, one, plans)
                for policy in plans:
                    times = [each[0] for each in found[policy]]
                    base = [each[0] for each in found["eplb"]]
                    rows.append({
                        "model": name, "GPUs": "unequal" if speeds == "fleet" else "equal",
                        "policy": LABELS.get(policy, policy),
                        "TPOT": f"{1e3 * np.mean(times):.2f} ms",
                        "against EPLB": _change(times, base),
                        "idle at the barrier": f"{100 * np.mean([r[1] for r in found[policy]]):.1f} %",
                    })  # fmt: skip
        return Table(
            title="Decode",
            about=(
                f"{VIBE.decoding} requests at a time, under the plans made for prefill. The paper: "
                "speeds hardly matter in light decode, and ViBE can lose to EPLB there."
            ),
            rows=rows,
        )

    def drift(self) -> Table:
        rows = []
        for name, speeds in itertools.product(MODELS, ("fleet", "equal")):
            old = {"epoch": 0} if name == "DeepSeek-V3" else {"window": 0}
            new = {"epoch": 1} if name == "DeepSeek-V3" else {"window": 2}
            before, plans = self.of(name, speeds, **old)
            after, _ = self.of(name, speeds, **new)
            for policy in ("eplb", "vibe", "auto"):
                later, moved = _replanned(policy, plans[policy], after)
                stall = moved * before.model.expert_bytes * before.model.weight / VIBE.bandwidth
                rates = {}
                for way in ("static", "adaptive"):
                    calls = [
                        (before, after, plans[policy], later if way == "adaptive" else None,
                         stall, seed, self.share)
                        for seed in self.seeds
                    ]  # fmt: skip
                    rates[way] = sweep(_drifted, calls, self.workers)
                known = PAPER.get(("drift", policy, name), "")  # type: ignore[call-overload]
                rows.append({
                    "model": name, "GPUs": "unequal" if speeds == "fleet" else "equal",
                    "policy": LABELS.get(policy, policy),
                    "static, requests/s/GPU": f"{np.mean(rates['static']) / 8:.2f}",
                    "adaptive": f"{np.mean(rates['adaptive']) / 8:.2f}",
                    "change": _change(rates["adaptive"], rates["static"]),
                    "stall": f"{stall:.2f} s",
                    "paper": str(known) if speeds == "fleet" else "",
                })  # fmt: skip
        return Table(
            title="Drift: re-plan once or never",
            about=(
                "Half of the requests under one load, half under another (DeepSeek-V3: synthetic, "
                "popularity times lognormal(0.25); Qwen3: two measured steps). Adaptive re-plans "
                f"{VIBE.notice:g} s after the shift on the new mean load: EPLB anew, ViBE by its "
                "swaps, ours from the old plan; all ranks stall until the busiest has its weights."
            ),
            rows=rows,
        )

    def scale(self) -> Table:
        rows = []
        for ranks in (8, 16, 32, 64, 80):
            row = {"GPUs": str(ranks)}
            row["experts a GPU"] = f"{256 / ranks:g}"
            for speeds, label in (("fleet", ""), ("equal", ", equal speeds")):
                found = self.over_seeds(_layers, *self.of("DeepSeek-V3", speeds, ranks=ranks))
                layer = {name: [r["layer"] for r in each] for name, each in found.items()}
                if not label:
                    for policy in ("eplb", "vibe", "auto"):
                        what = f"{LABELS[policy]} against contiguous"
                        row[what] = _change(layer[policy], layer["contiguous"])
                for policy in ("eplb_lpt", "vibe", "auto"):
                    what = f"{LABELS[policy]} against EPLB{label}"
                    row[what] = _change(layer[policy], layer["eplb"])
            rows.append(row)
        return Table(
            title="Scale",
            about=(
                f"Mean layer latency, DeepSeek-V3, {VIBE.max_tokens // 8:,} tokens a GPU and pass; "
                "at 80 GPUs a rank has 4 slots, and EPLB and ours fill the 64 spare ones with "
                f"replicas. The paper: {PAPER['scale']}."
            ),
            rows=rows,
        )

    def sensitivity(self) -> Table:
        cases: list[tuple[str, str, str | float, dict[str, Any]]] = [
            *(("spread of speeds", f"{s:.0%}", s, {}) for s in (0.0, 0.02, 0.05, 0.07, 0.13, 0.22)),
            *(("skew (power of shares)", f"{a:g}", "fleet", {"skew": a})
              for a in (0.0, 0.5, 1.0, 1.5)),
            *(("tokens of a pass", f"{n:,}", "fleet", {"max_tokens": n})
              for n in (1024, 4096, 16_384, 65_536)),
            *(("spread of requests", f"{s:g}", "fleet", {"spread": s})
              for s in (0.0, 0.25, 0.5, 1.0, 2.0)),
        ]  # fmt: skip
        rows = []
        for what, value, speeds, more in cases:
            row = {"varied": what, "value": value.replace("%", " %")}
            control: list[tuple[str, str | float]] = [("", speeds)]
            if speeds == "fleet":
                control.append((", equal", "equal"))
            for label, given in control:
                found = self.over_seeds(_layers, *self.of("DeepSeek-V3", given, **more))
                for mine, theirs in (("vibe", "contiguous"), ("vibe", "eplb"),
                                     ("auto", "eplb"), ("auto", "vibe")):  # fmt: skip
                    key = f"{LABELS.get(mine, mine)} / {LABELS.get(theirs, theirs)}{label}"
                    row[key] = _change([r["layer"] for r in found[mine]],
                                       [r["layer"] for r in found[theirs]])  # fmt: skip
            rows.append(row)
        return Table(
            title="Sensitivity of the layer latency",
            about="DeepSeek-V3, 8 GPUs; all else as above. Plans are made anew for each case.",
            rows=rows,
        )


def _drifted(
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
    other = _profiles(after, seed + 1000)
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


def _replanned(policy: str, plan: Plan, after: Setting) -> tuple[Plan, int]:
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


def _change(values: list[float], base: list[float]) -> str:
    """Change against a base in the same runs, with its interval over seeds."""
    ratio = [a / b if b > 0 else float("nan") for a, b in zip(values, base, strict=True)]
    found = Interval.of(ratio)
    half = "" if np.isinf(found.half) else f" +-{100 * found.half:.1f}"
    return f"{100 * (found.mean - 1):+.1f}{half} %"


#: Papers by the name that the command takes.
PAPERS: dict[str, Callable[..., Report]] = {"vibe": vibe}
