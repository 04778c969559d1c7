"""ViBE's tables under our model, the paper's numbers (`PAPER`) beside ours.

Go et al. 2026, arXiv 2606.00735; the setting is `moeplace.vibe_setting`.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.policies.vibe import vibe_update
from moeplace.reproduce import Report, Table
from moeplace.requests import Profiles, Requests
from moeplace.simulate import (
    Change,
    Interval,
    Service,
    Slo,
    goodput,
    simulate,
)
from moeplace.solve import solve
from moeplace.sweep import sweep
from moeplace.vibe_setting import (
    LABELS,
    MODELS,
    VIBE,
    Setting,
    profiles_of,
    requests_of,
    setting,
    slowness,
)

#: What the paper reports, by (table, row).
PAPER: dict[Any, str] = {
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
    profiles = profiles_of(one, seed)
    count = VIBE.decoding
    output = np.full(count, max(int(64 * share), 8))
    requests = Requests(
        arrival=np.zeros(count), prompt=np.zeros(count, dtype=np.int64), output=output,
        profile=profiles.draw(count, seed),
    )  # fmt: skip
    served = simulate(one.problem, plan, requests, profiles, one.engine, seed=seed)
    return float(served.tpot.mean()), served.idle_share


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
    runs = _Runs(instances, VIBE.seeds[:2] if quick else VIBE.seeds, 0.1 if quick else 1.0, workers)
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
            f"`moeplace/vibe_setting.py` ({constants}; seeds {len(runs.seeds)})."
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
            rank = (
                plans["contiguous"]
                .by_rank(np.take_along_axis(tokens, plans["contiguous"].slots, axis=1))
                .sum(axis=2)
            )
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
            about=(
                f"All prompts at once, passes of {VIBE.max_tokens:,} tokens on 8 GPUs. "
                "Synchronised MoE time: the slowest rank's, and the all-to-alls."
            ),
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
                            PAPER[key, name] for key in ("qps", "p90", "p99")
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
                    idle = 100 * np.mean([each[1] for each in found[policy]])
                    rows.append({
                        "model": name, "GPUs": "unequal" if speeds == "fleet" else "equal",
                        "policy": LABELS.get(policy, policy),
                        "TPOT": f"{1e3 * np.mean(times):.2f} ms",
                        "against EPLB": _change(times, base),
                        "idle at the barrier": f"{idle:.1f} %",
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
                known = PAPER.get(("drift", policy, name), "")
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
                "swaps, ours from the old plan; all ranks stall until the busiest has its weights. "
                "Runs last half a minute and less, so that a stall weighs more than it would over "
                "hours."
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
