"""Plans run side by side on every rank: interleaved round by round, with an A/A control."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import PlanError, ProblemError, ReplayError
from moeplace.evaluate import check_fits
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.profile import Entry, Profile, match, predicted_seconds
from moeplace.replay.calibrate import device_key
from moeplace.replay.launch import run_job
from moeplace.replay.report import Mode, Pair, PlanReport, Prediction, Report, correlation
from moeplace.replay.routing import (
    Draw,
    TokenRouting,
    draw_routing,
    expected_slot_tokens,
    replica_tables,
)
from moeplace.replay.settings import (
    Runtime,
    at_least,
    check_memory,
    cores,
    free_memory,
    said_by_all,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moeplace.replay.layer import Layer, Route
    from moeplace.replay.world import World

WARMUP = 2  #: rounds before the first that counts
_CPU, _WALL, _WAIT, _LAYER, _COUNTS = range(5)
#: Two plans compute the same sums in another order; above these their outputs differ in kind.
_SAME = {"float32": 1e-5, "bfloat16": 2e-2}

_log = logging.getLogger(__name__)


def replay_plans(
    problem: Problem,
    plans: Sequence[tuple[str, Plan]],
    runtime: Runtime,
    routing: TokenRouting | None = None,
    *,
    tokens: int = 2048,
    top_k: int = 2,
    layers: int = 4,
    window: int | None = None,
    draw: Draw = "exact",
    rounds: int = 15,
    mode: Mode = "attributed",
    profile: Profile | None = None,
) -> Report | None:
    """Run plans on real ranks and compare what they take with what was predicted.

    Parameters
    ----------
    problem : Problem
        What the plans are for: its loads give the routing, its cluster the prediction.
    plans : sequence of (name, Plan)
        The first is what the others are compared with; it also runs twice, as a control.
    runtime : Runtime
    routing : TokenRouting, optional
        Which experts each token goes to; by default drawn from the loads by `tokens`, `top_k`,
        `layers`, `window`, `draw` and the runtime's seed.
    tokens, top_k : int
        Tokens of the pass over all ranks, and experts of each.
    layers : int
        Layers to run, spread evenly over the model's.
    window : int, optional
        Window of the loads (and of shares by window); by default the mean of all windows.
    draw : {"exact", "sampled"}
    rounds : int
    mode : {"attributed", "fused"}
        "attributed" aligns the ranks before and after the experts, so that their time and the
        wait are known; "fused" has no inner barrier and knows the layer's time.
    profile : Profile, optional
        Predicts seconds, instead of the cluster's speeds, if it has a fresh entry for the device
        of each rank under this kernel, dtype and size of expert.

    Returns
    -------
    Report, or None on ranks other than 0 under torchrun.

    Raises
    ------
    PlanError
        If a plan does not fit the problem.
    ProblemError
        If an option is out of range, or the ranks are not those of the problem.
    ReplayError
        If the ranks cannot run it, or fail.
    """
    at_least("Rounds", rounds, 3)
    at_least("Layers", layers, 1)
    if mode not in get_args(Mode):
        raise ProblemError(f"Mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
    if not plans:
        raise ProblemError("There is no plan to replay: give at least one.")
    if runtime.ranks != problem.ranks:
        raise said_by_all(
            f"Plans for {problem.ranks} ranks cannot run on {runtime.ranks}: the world size must "
            f"be the number of EP ranks. Start {problem.ranks} ranks, or plan for {runtime.ranks}.",
            bad_input=True,
        )
    for name, plan in plans:
        try:
            check_fits(problem, plan)
        except PlanError as cause:
            raise PlanError(f"{name}: {cause}") from cause
        _check_window(problem, plan, name, window)
    if routing is None:
        load = problem.mean_load[0] if window is None else problem.tokens[window]
        routing = draw_routing(
            load, tokens, top_k, layers=spread(problem.layers, layers), seed=runtime.seed, draw=draw
        )
    job = ReplayJob(
        runtime=runtime,
        plans=tuple(plan for _, plan in plans),
        routing=routing,
        window=window or 0,
        rounds=rounds,
        mode=mode,
    )
    found = run_job(job)
    if found is None:
        return None
    return _report(job, [name for name, _ in plans], found, window, problem, profile)


def spread(layers: int, wanted: int) -> tuple[int, ...]:
    """At most `wanted` of the layers, evenly over the model."""
    return tuple(sorted({int(i) for i in np.linspace(0, layers - 1, min(wanted, layers))}))


def _check_window(problem: Problem, plan: Plan, name: str, window: int | None) -> None:
    if window is not None and not 0 <= window < problem.windows:
        raise ProblemError(
            f"Window must be from 0 to {problem.windows - 1} (windows of the loads), got {window}."
        )
    by_window = plan.split is not None and plan.split.ndim == 3
    if by_window and window is None and problem.windows > 1:
        raise ProblemError(
            f"{name}: the plan has other shares in each of {problem.windows} windows: say which "
            "one to replay (--window)."
        )


@dataclass(frozen=True, kw_only=True)
class ReplayJob:
    """What each rank runs."""

    runtime: Runtime
    plans: tuple[Plan, ...]
    routing: TokenRouting
    window: int
    rounds: int
    mode: Mode

    def run(self, world: "World") -> dict[str, Any]:
        """Measure; every rank returns the times of all ranks."""
        return _Bench(self, world).run()

    def digest(self) -> str:
        """Equal on two ranks only if they run the same."""
        import hashlib

        parts = [repr((self.runtime, self.window, self.rounds, self.mode)).encode()]
        parts.append(self.routing.experts_of.tobytes())
        for plan in self.plans:
            parts += [plan.slots.tobytes(), plan.rank_slots.tobytes()]
            parts.append(b"" if plan.split is None else plan.split.tobytes())
        return hashlib.sha256(b"|".join(parts)).hexdigest()

    def bytes_needed(self, dtype: str) -> int:
        """Estimate for the rank with the most slots and tokens."""
        layers = len(self.routing.layers)
        slots = int(self.plans[0].rank_slots.max())
        weights = len(self.plans) * layers * slots * self.runtime.expert_bytes(dtype)
        most = 0.0
        for plan in self.plans:
            for at, layer in enumerate(self.routing.layers):
                expected = expected_slot_tokens(plan, self.routing.counts[at], layer, self.window)
                by_rank = np.bincount(plan.rank_of_slot, weights=expected, minlength=plan.ranks)
                most = max(most, float(by_rank.max()))
        return weights + int(most + self.routing.assignments) * self.runtime.row_bytes(dtype)


@dataclass
class _Step:
    """One layer under one plan, ready to run."""

    layer: "Layer"
    route: "Route"
    again: list[Any]
    sent: "Tensor"


class _Bench:
    """The measurement on one rank."""

    def __init__(self, job: ReplayJob, world: "World"):
        self.job, self.world = job, world
        self.fused = job.mode == "fused"

    def run(self) -> dict[str, Any]:
        import torch

        from moeplace.replay.kernels import Experts

        job, world = self.job, self.world
        world.agree("job (plans, routing or options)", job.digest())
        world.together(self._check)
        dtype = str(world.dtype).removeprefix("torch.")
        self.experts = world.together(
            lambda: Experts(
                job.runtime.kernel, job.runtime.factor(world.rank), world.device, world.dtype
            )
        )
        shard = job.routing.shard(world.rank, world.ranks)
        self.size = shard.stop - shard.start
        generator = torch.Generator().manual_seed(job.runtime.seed)
        everything = torch.randn(
            (job.routing.tokens, job.runtime.hidden), generator=generator, dtype=torch.float32
        )
        self.tokens = everything[shard].to(world.device, world.dtype)
        self.weights = torch.full(
            (self.size, job.routing.top_k), 1 / job.routing.top_k, device=world.device
        )
        self.steps = [
            [self._step(plan, at) for at in range(len(job.routing.layers))] for plan in job.plans
        ]
        differ = self._outputs_differ()
        # Variants: the plans, then the first one again.
        variants = [*range(len(job.plans)), 0]
        times = np.zeros((job.rounds, len(variants), len(job.routing.layers), 5))
        for round_ in range(-WARMUP, job.rounds):
            for position in range(len(variants)):
                variant = (position + round_) % len(variants)
                for at, step in enumerate(self.steps[variants[variant]]):
                    measured = self._once(step)
                    if round_ >= 0:
                        times[round_, variant, at] = measured
        uuid, name = device_key(world, job.runtime.factor(world.rank))
        rows = [
            [(step.route.rows, sum(size > 0 for size in step.route.groups.sizes)) for step in plan]
            for plan in self.steps
        ]
        return {
            "times": np.stack(world.gather(times)),  # [ranks, rounds, variants, layers, 5]
            "rows": np.array(world.gather(rows)),  # [ranks, plans, layers, 2]
            "devices": world.gather(f"{world.host} {name}"),
            "keys": world.gather((uuid, world.host)),
            "differ": max(world.gather(differ)),
            "label": world.label,
            "serialised": any(world.gather(world.serialised)),
            "cuda": world.cuda,
            "torch": str(torch.__version__),
            "kernel": self.experts.name,
            "dtype": dtype,
        }

    def _check(self) -> None:
        """Whatever can be refused before memory is taken."""
        import torch

        job, world = self.job, self.world
        needed = job.bytes_needed(str(world.dtype).removeprefix("torch."))
        if world.cuda:
            free: int | None = torch.cuda.mem_get_info(world.device)[0]
        else:
            free, needed = free_memory(), needed * world.on_host
        check_memory(
            needed,
            free,
            f"A replay of {len(job.plans)} plans x {len(job.routing.layers)} layers on this "
            f"{'GPU' if world.cuda else 'machine'}",
            "Lower --layers, --tokens, --hidden or the number of plans.",
        )
        if world.serialised and self.fused:
            raise ReplayError(
                f"Fused mode needs a processor core for each rank: {world.on_host} ranks here have "
                f"{cores()}. Use --mode attributed, in which ranks take turns."
            )

    def _step(self, plan: Plan, at: int) -> _Step:
        import torch

        from moeplace.replay.layer import Layer, expert_weights, prepare

        job, world = self.job, self.world
        index = job.routing.layers[at]
        shard = job.routing.shard(world.rank, world.ranks)
        ids = torch.tensor(job.routing.experts_of[at, shard], device=world.device)
        slots, ends = replica_tables(plan, index, job.window)
        rank_slots = plan.rank_slots.tolist()
        route = prepare(ids, self.weights, slots, ends, rank_slots, world.rank, world.data)
        held = plan.slots[index, plan.rank_of_slot == world.rank].tolist()
        runtime = job.runtime
        up, down = expert_weights(
            held,
            index,
            runtime.hidden,
            runtime.intermediate,
            runtime.seed,
            world.device,
            world.dtype,
        )
        sent = torch.zeros(sum(rank_slots), dtype=torch.int64, device=world.device)
        return _Step(
            layer=Layer(up, down, self.experts, world.data),
            route=route,
            again=self.experts.repeats(route.groups),
            sent=sent,
        )

    def _outputs_differ(self) -> float:
        """Largest relative difference of a plan's output from the first plan's, on this rank."""
        worst = 0.0
        for at, step in enumerate(self.steps[0]):
            first = step.layer(self.tokens, step.route)
            for plan in self.steps[1:]:
                other = plan[at].layer(self.tokens, plan[at].route)
                if first.numel():
                    worst = max(worst, float((other - first).norm() / first.norm().clamp(1e-30)))
        return worst

    def _align(self) -> None:
        """Let all ranks begin at one time: GPUs sleep while the tiny exchange is queued."""
        import torch
        import torch.distributed as dist

        if self.world.cuda:
            sleep: Callable[[int], None] = torch.cuda._sleep
            sleep(100_000)
            dist.all_reduce(torch.zeros(1, device=self.world.device), group=self.world.data)
        else:
            self.world.barrier()

    def _once(self, step: _Step) -> tuple[float, ...]:
        """Seconds of one layer: experts by CPU and wall, wait, layer, exchange of counts."""
        import torch

        from moeplace.replay.layer import exchange_counts
        from moeplace.replay.world import Span

        world, layer, route = self.world, step.layer, step.route
        mine = step.layer.up.shape[0]
        whole, experts, wait, counts = (Span(world.device) for _ in range(4))
        with counts:
            exchange_counts(step.sent, self._rank_slots, mine, world.data)
        self._align()
        with whole:
            rows = layer.dispatch(self.tokens, route)
            if self.fused:
                with experts:
                    outputs = layer.compute(rows, route, step.again)
            else:
                self._align()
                for my_turn in world.take_turns():
                    if my_turn:
                        with experts:
                            outputs = layer.compute(rows, route, step.again)
                with wait:
                    self._meet()
            layer.combine(outputs, route, self.size)
        if world.cuda:
            torch.cuda.synchronize(world.device)
        measured_wait = math.nan if self.fused or world.serialised else wait.wall
        cpu = math.nan if world.cuda else experts.cpu
        return (cpu, experts.wall, measured_wait, whole.wall, counts.wall)

    @property
    def _rank_slots(self) -> list[int]:
        slots: list[int] = self.job.plans[0].rank_slots.tolist()
        return slots

    def _meet(self) -> None:
        import torch
        import torch.distributed as dist

        if self.world.cuda:
            dist.all_reduce(torch.zeros(1, device=self.world.device), group=self.world.data)
        else:
            self.world.barrier()


# ------------------------------------------------------------------------------- rank 0


def _report(
    job: ReplayJob,
    names: list[str],
    found: dict[str, Any],
    window: int | None,
    problem: Problem,
    profile: Profile | None,
) -> Report:
    times: FloatArray = found["times"]  # [ranks, rounds, variants, layers, 5]
    fused, cuda = job.mode == "fused", found["cuda"]
    judged = _LAYER if fused and cuda else _WALL if cuda else _CPU
    by = {
        _LAYER: "event time of the layer",
        _WALL: "event time of the slowest rank's experts",
        _CPU: "CPU time of the slowest rank's experts",
    }[judged]
    # Per round: sum over layers of the slowest rank's time [rounds, variants].
    spans = times[..., judged].max(axis=0).sum(axis=2)
    notes = []
    entries = None
    if profile is not None:
        entries, reason = _entries(job, found, profile)
        if reason:
            notes.append(f"The profile was not used: {reason}")
    predictions = [
        _predict(job, plan, problem, entries, np.median(times[:, :, i, :, judged], axis=1).T)
        for i, plan in enumerate(job.plans)
    ]
    variants = [*range(len(job.plans)), 0]
    plans = [
        _plan_report(
            names[plan], times[:, :, i], spans[:, i], found, plan, predictions[plan], fused
        )
        for i, plan in enumerate(variants)
    ]
    pairs = []
    for i, plan in enumerate(variants[1:], start=1):
        ratios = spans[:, i] / spans[:, 0]
        quartiles = np.quantile(ratios, [0.25, 0.75])
        first = predictions[0].makespan
        pairs.append(
            Pair(
                plan=names[plan],
                against=names[0],
                control=i == len(variants) - 1,
                ratio=float(np.median(ratios)),
                quartiles=[float(q) for q in quartiles],
                predicted=predictions[plan].makespan / first if first > 0 else None,
            )
        )
    if found["differ"] > _SAME[found["dtype"]]:
        notes.append(
            f"Outputs of two plans differ by {found['differ']:.2g} (relative), above "
            f"{_SAME[found['dtype']]:g}: the kernel does not compute what it should."
        )
        _log.warning(notes[-1])
    speeds = f"instance's speeds ({problem.cluster.speed_unit})"
    return Report(
        label=found["label"],
        mode=job.mode,
        judged_by=by,
        waits=None if fused else "computed" if found["serialised"] else "measured",
        plans=plans[:-1],
        control=plans[-1],
        pairs=pairs,
        predicted_by=speeds if entries is None else f"profile of {entries[0].date}",
        outputs_differ=found["differ"],
        ranks=job.runtime.ranks,
        emulate=list(job.runtime.emulate),
        devices=found["devices"],
        torch=found["torch"],
        kernel=found["kernel"],
        dtype=found["dtype"],
        hidden=job.runtime.hidden,
        intermediate=job.runtime.intermediate,
        routing=job.routing.source,
        tokens=job.routing.tokens,
        top_k=job.routing.top_k,
        layers=list(job.routing.layers),
        window=window,
        rounds=job.rounds,
        seed=job.runtime.seed,
        notes=notes,
    )


def _entries(
    job: ReplayJob, found: dict[str, Any], profile: Profile
) -> tuple[tuple[Entry, ...] | None, str]:
    """Entries of the devices that ran, or None and the reason."""
    matched = match(
        profile,
        [uuid for uuid, _ in found["keys"]],
        hosts=[host for _, host in found["keys"]],
        kernel=found["kernel"],
        dtype=found["dtype"],
    )
    if matched.entries is None:
        return None, matched.reason
    sizes = (matched.entries[0].hidden, matched.entries[0].intermediate)
    mine = (job.runtime.hidden, job.runtime.intermediate)
    if sizes != mine:
        reason = f"it was measured for hidden and intermediate {sizes}, not {mine}."
        _log.warning("The profile is not used: %s", reason)
        return None, reason
    return matched.entries, ""


def _predict(
    job: ReplayJob,
    plan: Plan,
    problem: Problem,
    entries: Sequence[Entry] | None,
    measured: FloatArray,
) -> Prediction:
    """Predict a plan's times and hold them against medians measured [layers, ranks]."""
    slots = np.stack(
        [
            expected_slot_tokens(plan, job.routing.counts[at], layer, job.window)
            for at, layer in enumerate(job.routing.layers)
        ]
    )
    tokens = np.maximum(plan.by_rank(slots), 0.0).sum(axis=2)
    if entries is not None:
        activated = plan.by_rank(-np.expm1(-slots))
        times = predicted_seconds(entries, np.maximum(activated, 0.0).sum(axis=2), tokens)
        unit = "s"
    else:
        times, unit = problem.cluster.seconds(tokens), problem.cluster.time_unit
    makespan = float(times.max(axis=1).sum())
    took = float(measured.max(axis=1).sum())
    return Prediction(
        makespan=makespan,
        unit=unit,
        rank=times.sum(axis=0).tolist(),
        slowest_rank=int(times.sum(axis=0).argmax()),
        over_measured=makespan / took if unit == "s" and took > 0 else None,
        rank_correlation=correlation(times, measured),
    )


def _plan_report(
    name: str,
    times: FloatArray,
    spans: FloatArray,
    found: dict[str, Any],
    plan: int,
    prediction: Prediction,
    fused: bool,
) -> PlanReport:
    """Medians of one variant; `times` [ranks, rounds, layers, 5], `spans` [rounds]."""
    cuda = found["cuda"]
    own = times[..., _WALL if cuda else _CPU]
    wait: FloatArray | None = None
    if not fused:
        # What the slowest rank spends in the barrier too is the barrier's own time.
        wait = times[..., _WAIT] - times[..., _WAIT].min(axis=0)
        if found["serialised"]:
            wait = own.max(axis=0) - own
    walled = not (fused and cuda) and not found["serialised"]

    def by_rank(values: FloatArray) -> list[float]:
        """Medians over rounds, summed over layers [ranks]."""
        medians: list[float] = np.median(values.sum(axis=2), axis=1).tolist()
        return medians

    def slowest(values: FloatArray) -> float:
        return float(np.median(values.max(axis=0).sum(axis=1)))

    each = by_rank(own)
    return PlanReport(
        name=name,
        makespan_seconds=float(np.median(spans)),
        makespan_cpu_seconds=None if cuda else slowest(own),
        makespan_wall_seconds=slowest(times[..., _WALL]) if walled else None,
        layer_wall_seconds=slowest(times[..., _LAYER]),
        count_exchange_seconds=slowest(times[..., _COUNTS]),
        rank_cpu_seconds=None if cuda else each,
        rank_wall_seconds=by_rank(times[..., _WALL]) if walled else None,
        rank_wait_seconds=None if wait is None else by_rank(wait),
        rank_tokens=found["rows"][:, plan, :, 0].sum(axis=1).tolist(),
        rank_activated=found["rows"][:, plan, :, 1].sum(axis=1).tolist(),
        slowest_rank=int(np.argmax(each)),
        prediction=prediction,
    )
