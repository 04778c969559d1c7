"""How far ViBE's headlines depend on the setting, and what a better plan could win at most."""

from dataclasses import replace
from typing import Any

import numpy as np

from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.reproduce import Table
from moeplace.sweep import sweep
from moeplace.vibe_runs import Runs, change, drift_run, layer_run, rate_run, replanned, tails_run
from moeplace.vibe_setting import LABELS, MODELS, ONE_SLOW, VIBE, slowness

#: What is varied, its value, speeds, and options of `setting`; all else as in the other tables.
CASES: tuple[tuple[str, str, str | float, dict[str, Any]], ...] = (
    *(("spread of speeds", f"{100 * s:g} %", s, {}) for s in (0.0, 0.02, 0.05, 0.07, 0.13, 0.22)),
    *(("skew (power of shares)", f"{a:g}", "fleet", {"skew": a}) for a in (0.0, 0.5, 1.0, 1.5)),
    *(("tokens of a pass", f"{n:,}", "fleet", {"max_tokens": n})
      for n in (1024, 4096, 16_384, 65_536)),
    *(("spread of requests", f"{s:g}", "fleet", {"spread": s}) for s in (0.0, 0.25, 0.5, 1.0, 2.0)),
)  # fmt: skip
MODEL = "DeepSeek-V3"
PAIRS = (("vibe", "eplb"), ("auto", "eplb"))


def limits(runs: Runs) -> Table:
    """What a better plan could win on the mean load: from each policy down to the bound."""
    rows = []
    spreads: list[tuple[str, str | float]] = [("equal", "equal"), ("fleet, {:.1f} %", "fleet")]
    spreads += [("evenly spread, {:.1f} %", s) for s in (0.07, 0.13, 0.22, ONE_SLOW)]
    spreads.append(("one slow, {:.1f} %", "one slow"))
    for name in MODELS:
        for label, given in spreads:
            one, plans = runs.of(name, given)
            problem = one.problem
            speeds = 1 / slowness(runs.instances, given, 8)
            cost = {policy: evaluate(problem, plan).objective for policy, plan in plans.items()}
            bound = lower_bound(problem).total
            rows.append({
                "model": name,
                "GPUs": label.format(100 * (speeds.max() / speeds.min() - 1)),
                "mean / min speed - 1": _signed(speeds.mean() / speeds.min()),
                "share of a layer's time that slowness stretches": f"{_stretched(one):.0%}"
                .replace("%", " %"),
                "bound / contiguous": _signed(bound / cost["contiguous"]),
                "bound / EPLB": _signed(bound / cost["eplb"]),
                "ViBE / EPLB": _signed(cost["vibe"] / cost["eplb"]),
                "ours / EPLB": _signed(cost["auto"] / cost["eplb"]),
                "EPLB on an old load: ViBE / EPLB": _signed(_stale(runs, name, given)),
            })  # fmt: skip
    return Table(
        title="What a better plan could win at most",
        about=(
            "No simulation and no luck: layer latency of the mean load, passes full. The bound "
            "holds for every placement without replicas, with or without sight of the speeds. "
            f"One slow: seven GPUs alike and one that takes {ONE_SLOW:.0%} longer. "
            "EPLB on an old load: EPLB planned on the load before the shift of the drift table, "
            "ViBE on the one after, both priced on the latter."
        ).replace("% ", " % "),
        rows=rows,
    )


def layers(runs: Runs) -> Table:
    """Gap, layer latency and idle time by case."""
    rows = []
    for what, value, speeds, more in CASES:
        row = {"varied": what, "value": value}
        found = runs.over_seeds(layer_run, *runs.of(MODEL, speeds, **more))
        row["layer: ViBE / contiguous"] = _of(found, "layer", "vibe", "contiguous")
        for key, mine in ((key, mine) for key in ("layer", "gap", "idle") for mine, _ in PAIRS):
            row[f"{key}: {LABELS[mine]} / EPLB"] = _of(found, key, mine, "eplb")
        if speeds == "fleet":
            control = runs.over_seeds(layer_run, *runs.of(MODEL, "equal", **more))
            for mine, theirs in PAIRS:
                key = f"layer: {LABELS[mine]} / EPLB, equal"
                row[key] = _of(control, "layer", mine, theirs)
        rows.append(row)
    return Table(
        title="Sensitivity: layer latency, gap, idle time",
        about=(
            "DeepSeek-V3, 8 GPUs; all else as above. Plans are made anew for each case. Equal: the "
            "control, GPUs of one speed."
        ),
        rows=rows,
    )


def requests(runs: Runs) -> Table:
    """Requests a second in the limit, and tails, by case."""
    rows = []
    for what, value, speeds, more in CASES:
        row = {"varied": what, "value": value}
        for given in (speeds, "equal") if speeds == "fleet" else (speeds,):
            one, plans = runs.of(MODEL, given, **more)
            plans = {policy: plans[policy] for policy in ("eplb", "vibe", "auto")}
            rates = runs.over_seeds(rate_run, one, plans)
            tails: dict[str, list[Any]] = {}
            if given == speeds:  # the control has no tails
                at = float(np.mean(rates["eplb"]))
                row["EPLB, requests/s"] = f"{at:.2f}"
                tails = runs.over_seeds(tails_run, one, plans, at)
            for mine, theirs in PAIRS:
                key = f"{LABELS[mine]} / EPLB" + ("" if given == speeds else ", equal")
                row[f"rate: {key}"] = change(rates[mine], rates[theirs])
                for n, tail in enumerate(("P90", "P99")) if tails else ():
                    row[f"{tail}: {key}"] = change(
                        [each[n] for each in tails[mine]], [each[n] for each in tails[theirs]]
                    )
        rows.append(row)
    return Table(
        title="Sensitivity: requests a second in the limit, tails",
        about=(
            "As above; P90 and P99 of the time to the first token at EPLB's mean rate of the case. "
            "A rate of 0 has no ratio."
        ),
        rows=rows,
    )


def drift(runs: Runs) -> Table:
    """What a re-plan changes in requests a second, by case."""
    rows = []
    for what, value, speeds, more in CASES:
        row = {"varied": what, "value": value}
        before, plans = runs.of(MODEL, speeds, epoch=0, **more)
        after, _ = runs.of(MODEL, speeds, epoch=1, **more)
        for policy in ("eplb", "vibe", "auto"):
            later, moved = replanned(policy, plans[policy], after)
            stall = moved * before.model.expert_bytes * before.model.weight / VIBE.bandwidth
            static, adaptive = (
                sweep(
                    drift_run,
                    [(before, after, plans[policy], then, stall, seed, runs.share)
                     for seed in runs.seeds],
                    runs.workers,
                )
                for then in (None, later)
            )  # fmt: skip
            row[f"{LABELS[policy]}, adaptive / static"] = change(adaptive, static)
            row[f"{LABELS[policy]}, stall"] = f"{stall:.2f} s"
        rows.append(row)
    return Table(
        title="Sensitivity: drift",
        about=(
            "The shift of the drift table: requests a second in the limit with a re-plan, against "
            "without. The control of equal speeds is the first row."
        ),
        rows=rows,
    )


TABLES = (limits, layers, requests, drift)


def _of(found: dict[str, list[Any]], key: str, mine: str, theirs: str) -> str:
    return change([r[key] for r in found[mine]], [r[key] for r in found[theirs]])


def _signed(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _stretched(one: Any) -> float:
    """How much of 1 % that all GPUs are slower shows in the bound's layer time."""
    problem = one.problem
    cluster = problem.cluster
    slower = replace(cluster, speeds=cluster.speeds / 1.01)
    later = lower_bound(replace(problem, cluster=slower)).total
    return float((later / lower_bound(problem).total - 1) / 0.01)


def _stale(runs: Runs, name: str, speeds: str | float) -> float:
    """ViBE's layer latency on a new load over EPLB's that was planned on the old one."""
    old, new = ({"epoch": n} if name == "DeepSeek-V3" else {"window": 2 * n} for n in (0, 1))
    _, before = runs.of(name, speeds, **old)
    after, plans = runs.of(name, speeds, **new)
    cost = [evaluate(after.problem, plan).objective for plan in (plans["vibe"], before["eplb"])]
    return cost[0] / cost[1]
