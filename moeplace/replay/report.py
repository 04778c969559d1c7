"""What was measured beside what was predicted."""

from typing import Any, Literal

import msgspec
import numpy as np

from moeplace._check import FloatArray
from moeplace.tables import table

Label = Literal["gpu-measured", "cpu-emulated"]
Mode = Literal["attributed", "fused"]
Waits = Literal["measured", "computed"]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan should take at the routing that was run.

    Attributes
    ----------
    makespan : float
        Sum over layers of the slowest rank's time, in `unit`.
    unit : str
        "s", or "token units" where only relative speeds are known.
    rank : list of float [ranks]
        Each rank's time, summed over layers.
    slowest_rank : int
    over_measured : float or None
        Predicted over measured makespan; None in token units.
    rank_correlation : float or None
        Spearman's, between predicted and measured times of all ranks in all layers; None where
        one of them is constant.
    """

    makespan: float
    unit: str
    rank: list[float]
    slowest_rank: int
    over_measured: float | None
    rank_correlation: float | None


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """One plan: medians over rounds, in seconds, summed over layers.

    Attributes
    ----------
    name : str
    makespan_seconds : float
        The figure that plans are judged by: slowest rank's expert time, by event on GPUs and by
        CPU time on CPU. In fused mode on GPUs the time of the layer.
    makespan_cpu_seconds : float or None
        By CPU time; None on GPUs.
    makespan_wall_seconds : float or None
        By events or the wall clock; None where the mode does not measure it.
    layer_wall_seconds : float
        Whole layer, on the rank where it took longest.
    count_exchange_seconds : float
        Exchange of counts, which is outside the layer's time.
    rank_cpu_seconds, rank_wall_seconds, rank_wait_seconds : list of float [ranks] or None
        Of each rank: experts, by CPU time and by wall clock, and waiting for the slowest.
    rank_tokens, rank_activated : list of int [ranks]
        Token assignments that each rank ran and slots that had any, summed over layers.
    slowest_rank : int
    prediction : Prediction or None
    """

    name: str
    makespan_seconds: float
    makespan_cpu_seconds: float | None
    makespan_wall_seconds: float | None
    layer_wall_seconds: float
    count_exchange_seconds: float
    rank_cpu_seconds: list[float] | None
    rank_wall_seconds: list[float] | None
    rank_wait_seconds: list[float] | None
    rank_tokens: list[int]
    rank_activated: list[int]
    slowest_rank: int
    prediction: Prediction | None = None


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """A plan against the first one, round by round.

    Attributes
    ----------
    plan, against : str
    control : bool
        Whether both are the same plan (A/A): how far its ratio is from 1 is noise.
    ratio : float
        Median of the ratios of makespans within a round; below 1 the plan is faster.
    quartiles : list of float
        Lower and upper quartile of these ratios.
    predicted : float or None
        Ratio of the predicted makespans.
    """

    plan: str
    against: str
    control: bool
    ratio: float
    quartiles: list[float]
    predicted: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A replay: `plans` in the order given, `pairs` against the first, the control last."""

    label: Label
    mode: Mode
    judged_by: str
    waits: Waits | None
    plans: list[PlanReport]
    control: PlanReport
    pairs: list[Pair]
    predicted_by: str
    outputs_differ: float
    ranks: int
    emulate: list[float]
    devices: list[str]
    torch: str
    kernel: str
    dtype: str
    hidden: int
    intermediate: int
    routing: str
    tokens: int
    top_k: int
    layers: list[int]
    window: int | None
    rounds: int
    seed: int
    notes: list[str] = []

    def to_json(self) -> dict[str, Any]:
        """The report as plain types."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built


def correlation(predicted: FloatArray, measured: FloatArray) -> float | None:
    """Spearman's rank correlation of two arrays; None where one of them is constant."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(predicted.ravel()), rankdata(measured.ravel())])
    if (ranks.std(axis=1) == 0).any():
        return None
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    return float((centred[0] * centred[1]).mean() / (ranks[0].std() * ranks[1].std()))


def text(report: Report) -> str:
    """The report in a table of at most 80 columns."""
    from moeplace.compare import aligned, percent, printable

    slow = " ".join(f"{factor:g}" for factor in report.emulate)
    sizes = f"hidden {report.hidden}, intermediate {report.intermediate}, {report.dtype}"
    which = ", ".join(map(str, report.layers))
    drawn = f"{report.tokens:,} tokens x top-{report.top_k} in layers {which}"
    facts = [
        ("label", report.label),
        ("ranks", f"{report.ranks} on {printable(', '.join(sorted(set(report.devices))))}"),
        *([("slowness", f"{slow}, emulated by repeating GEMMs")] if slow else []),
        ("experts", f"{sizes}, kernel {report.kernel}, torch {report.torch}"),
        ("routing", f"{drawn}; {printable(report.routing)}"),
        ("rounds", f"{report.rounds}, {report.mode}, plans interleaved in rotating order"),
        ("judged by", report.judged_by),
        *(
            [("predicted", f"by the {printable(report.predicted_by)}")]
            if report.predicted_by
            else []
        ),
    ]
    lines = [*aligned(facts), ""]
    names = [chr(ord("A") + i) if i < 26 else f"#{i}" for i in range(len(report.plans))]
    rows = [("plan", "makespan", "predicted", "slowest", "wait", "ratio to A", "quartiles")]
    pairs = {pair.plan: pair for pair in report.pairs if not pair.control}
    control = next(pair for pair in report.pairs if pair.control)
    for i, plan in enumerate([*report.plans, report.control]):
        pair = control if i == len(report.plans) else pairs.get(plan.name) if i else None
        rows.append(
            (
                "A again" if pair is control else names[i],
                _ms(plan.makespan_seconds),
                _predicted(plan.prediction),
                f"rank {plan.slowest_rank}",
                "-" if plan.rank_wait_seconds is None else _ms(max(plan.rank_wait_seconds)),
                "1" if pair is None else f"{pair.ratio:.3f}",
                "" if pair is None else f"{pair.quartiles[0]:.3f} to {pair.quartiles[1]:.3f}",
            )
        )
    lines += table(rows)
    lines.append("")
    said = [f"{name}: {plan.name}" for name, plan in zip(names, report.plans, strict=True)]
    for pair in report.pairs:
        if pair.predicted is not None and not pair.control:
            change = 1 - pair.ratio
            word = "faster" if change >= 0 else "slower"
            said.append(
                f"{pair.plan} is {percent(abs(change))} {word} than {pair.against}; the model "
                f"predicted a ratio of {pair.predicted:.3f}."
            )
    if report.waits == "computed":
        said.append("Ranks took turns on too few cores; waits are computed, not measured.")
    return "\n".join([*lines, *map(printable, [*said, *report.notes])])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f} ms" if seconds < 0.1 else f"{1000 * seconds:.1f} ms"


def _predicted(found: Prediction | None) -> str:
    if found is None:
        return "-"
    return _ms(found.makespan) if found.unit == "s" else f"{found.makespan:,.0f} units"
