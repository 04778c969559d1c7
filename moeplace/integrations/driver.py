"""An engine's balancer without the engine: processes, loads, rebalances, weights that move.

N processes hold a map and the "weights" (layer, expert) of their slots, and run windows of real
loads. Every so many windows they rebalance as the engine does: vLLM at once (``vllm``) or one
layer for each pass (``vllm-async``), SGLang in chunks of layers (``sglang``). Before every pass is
checked that all ranks have one map, that each slot's weights are those that the map says, and that
every expert is served. Step time is by relative speeds; a stall is what the busiest rank receives,
layer by layer, at a given bandwidth, and the time to plan unless that is in the background.

::

    python -m moeplace.integrations.driver INSTANCE [--engine vllm] [--every 2] [--passes 60]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import MoeplaceError
from moeplace.instances import read_instance
from moeplace.integrations import sglang, tables, vllm
from moeplace.integrations.agree import Group
from moeplace.integrations.policy import Policy
from moeplace.integrations.settings import Effort, Settings
from moeplace.policies.eplb import eplb

ENGINES = ("vllm", "vllm-async", "sglang")
#: Layers that SGLang moves between two passes.
CHUNK = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One run.

    Attributes
    ----------
    tokens : array [windows, layers, experts]
    speeds : array [ranks]
    slots_per_rank : int
    engine : one of ENGINES
    ours : bool
        Our policy, or the engine's own (DeepSeek's greedy).
    every, passes : int
        Windows between rebalances, and forward passes of a window.
    expert_bytes, bandwidth : float
        Of an expert, and bytes a second that a rank receives.
    settings : Settings
        Of our policy. Its speeds are the job's, as from a profile.
    """

    tokens: FloatArray
    speeds: FloatArray
    slots_per_rank: int
    engine: str = "vllm"
    ours: bool = True
    every: int = 2
    passes: int = 60
    expert_bytes: float = 44_050_944.0
    bandwidth: float = 50e9
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What all ranks saw alike.

    Attributes
    ----------
    step : float
        Mean time of a pass over its fluid bound.
    copies : int
        Copies received, over all rebalances.
    stall : float
        Seconds that serving stood still for moves and, unless in the background, for planning.
    plan : float
        Longest time to plan, in seconds.
    rebalances, failures, checks : int
    digest : str
        Of all maps that were in use, in order.
    """

    step: float
    copies: int
    stall: float
    plan: float
    rebalances: int
    failures: int
    checks: int
    digest: str


def run(job: Job, timeout: float = 240.0) -> Outcome:
    """Run all ranks; return what they agree on.

    Raises
    ------
    MoeplaceError
        If a check fails, ranks differ, or a rank does not end.
    """
    import torch.multiprocessing as mp

    if job.engine not in ENGINES:
        raise MoeplaceError(f"Engine must be one of {', '.join(ENGINES)}, got {job.engine!r}.")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.Queue()
        arguments = (job, str(Path(folder) / "meet"), results)
        ranks = [
            context.Process(target=_entry, args=(rank, *arguments), daemon=True)
            for rank in range(job.speeds.size)
        ]
        for each in ranks:
            each.start()
        try:
            found = [results.get(timeout=timeout) for _ in ranks]
        finally:
            for each in ranks:
                each.join(timeout=5)
                if each.is_alive():
                    each.terminate()
    broken = [outcome for outcome in found if isinstance(outcome, str)]
    if broken:
        raise MoeplaceError(broken[0])
    first: Outcome = found[0]
    if any(
        replace(each, plan=0.0, stall=0.0, failures=0)
        != replace(first, plan=0.0, stall=0.0, failures=0)
        for each in found
    ):
        raise MoeplaceError("The ranks saw different runs.")
    return replace(
        first,
        failures=sum(each.failures for each in found),
        plan=max(each.plan for each in found),
        stall=max(each.stall for each in found),
    )


def _entry(rank: int, job: Job, meeting: str, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=job.speeds.size,
            timeout=timedelta(seconds=60),
        )
        results.put(Rank(rank, job).run())
        dist.barrier()
    except Exception as cause:
        results.put(f"Rank {rank}: {type(cause).__name__}: {cause}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Greedy:
    """The engine's own policy, as vLLM calls it."""

    @classmethod
    def rebalance_experts(
        cls, weight: Any, slots: int, groups: int, nodes: int, ranks: int, old: Any = None
    ) -> Any:
        import torch

        del groups, nodes
        found = eplb(weight.double().numpy(), ranks, slots // ranks)
        return torch.from_numpy(found if old is None else _kept(found, old.numpy(), ranks))


def _kept(new: IntArray, old: IntArray, ranks: int) -> IntArray:
    """What stays on a rank keeps its slot, as vLLM does it; maps here may hold duplicates."""
    result = np.full_like(new, -1)
    size = new.shape[1] // ranks
    for layer in range(new.shape[0]):
        for first in range(0, new.shape[1], size):
            come = new[layer, first : first + size].tolist()
            for k in range(first, first + size):
                if old[layer, k] in come:
                    result[layer, k] = old[layer, k]
                    come.remove(int(old[layer, k]))
            for k in range(first, first + size):
                if result[layer, k] < 0:
                    result[layer, k] = come.pop(0)
    return result


class Rank:
    """One process of the engine."""

    def __init__(self, rank: int, job: Job) -> None:
        self.rank, self.job = rank, job
        self.windows, self.layers, self.experts = job.tokens.shape
        self.ranks, self.size = job.speeds.size, job.slots_per_rank
        self.width = self.ranks * self.size
        self.map = np.tile(np.arange(self.width) % self.experts, (self.layers, 1))
        self.mine = slice(rank * self.size, (rank + 1) * self.size)
        layer = np.broadcast_to(np.arange(self.layers)[:, None], (self.layers, self.size))
        #: The weights of this rank's slots [layers, slots per rank, (layer, expert)].
        self.weights = np.stack([layer, self.map[:, self.mine]], axis=2)
        self.policy = Policy("driver", job.settings, vllm.logger)
        self.policy._rank_speeds = lambda ranks: job.speeds  # type: ignore[method-assign]
        self.copies = self.rebalances = self.checks = 0
        self.stall = self.plan = 0.0
        self.seen: list[bytes] = []
        theirs, ours = _Greedy, vllm.policy_class(_Greedy, self.policy, lambda _: Group())
        self._vllm = ours if job.ours else theirs
        self._sglang = sglang.replacement(
            self._own_sglang, self.policy, lambda: (self.map, None, False)
        )

    def _own_sglang(self, tokens: Any, slots: int, local: int, *rest: Any) -> Any:
        import torch

        del rest
        found = eplb(tokens.sum(dim=0).double().numpy(), slots // local, local)
        maps = sglang.physical_maps(found, self.experts, self.ranks)
        return tuple(torch.from_numpy(each) for each in (found, *maps))

    def run(self) -> Outcome:
        """All windows."""
        spent = bound = 0.0
        pending: Iterator[None] | None = None
        counted = np.zeros((self.layers, self.experts))
        for _ in self.rebalance(counted):  # as vLLM does while it profiles memory: no load yet
            pass
        if self.job.ours and self.copies:
            raise MoeplaceError("Moves were made without any load.")
        self.copies = self.rebalances = 0
        self.stall = self.plan = 0.0
        for window, tokens in enumerate(self.job.tokens):
            fluid = float(tokens.sum() / self.job.speeds.sum())
            for _ in range(self.job.passes):
                if pending is not None and next(pending, self) is self:
                    pending = None
                self.check()
                spent += float(tables.seconds(self.map, tokens, self.job.speeds).sum())
                bound += fluid
                counted += self._counted(tokens)
            if (window + 1) % self.job.every == 0 and window + 1 < self.windows:
                if pending is not None:  # engines begin no new one before the last has ended
                    continue
                pending = self.rebalance(counted)
                counted = np.zeros_like(counted)
        import hashlib

        return Outcome(
            step=spent / bound,
            copies=self.copies,
            stall=self.stall,
            plan=self.plan,
            rebalances=self.rebalances,
            failures=self.policy.failures,
            checks=self.checks,
            digest=hashlib.sha256(b"".join(self.seen)).hexdigest(),
        )

    def _counted(self, tokens: FloatArray) -> FloatArray:
        """What this rank counts of its own slots, as experts; the ranks' sum is the load."""
        counts = np.zeros((self.layers, self.experts))
        replicas = np.zeros_like(counts)
        layer = np.arange(self.layers)[:, None]
        np.add.at(replicas, (layer, self.map), 1)
        local = self.map[:, self.mine]
        np.add.at(counts, (layer, local), tokens[layer, local] / replicas[layer, local])
        return counts

    def rebalance(self, counted: FloatArray) -> Iterator[None]:
        """Sum the counts, ask the policy on every rank, move layer by layer; yields between."""
        import torch
        import torch.distributed as dist

        weight = torch.from_numpy(np.round(counted)).to(torch.int64)
        dist.all_reduce(weight)
        background = self.job.engine == "vllm-async"
        began = time.perf_counter()
        if self.job.engine == "sglang":
            ask = self._sglang if self.job.ours else self._own_sglang
            answer = ask(weight[None], self.width, self.size, None, 1, None)
            self._check_sglang(*(each.numpy() for each in answer))
            new = answer[0].numpy()
        else:
            old = torch.from_numpy(self.map)
            new = self._vllm.rebalance_experts(weight, self.width, 1, 1, self.ranks, old).numpy()
        took = time.perf_counter() - began
        self.plan = max(self.plan, took)
        self.stall += 0.0 if background else took
        self.rebalances += 1
        if not self.job.ours and self.job.engine == "sglang":
            new = _kept(new, self.map, self.ranks)
        for layer in range(self.layers):
            if background or (self.job.engine == "sglang" and layer and layer % CHUNK == 0):
                yield
            self.move(layer, new[layer], background)
        return

    def _check_sglang(self, slots: IntArray, places: IntArray, count: IntArray) -> None:
        for layer, row in enumerate(slots):
            for expert in range(self.experts):
                found = places[layer, expert]
                held = np.flatnonzero(row == expert)
                if sorted(found[found >= 0]) != held.tolist() or count[layer, expert] != held.size:
                    raise MoeplaceError(f"Maps differ on expert {expert} of layer {layer}.")

    def move(self, layer: int, new: IntArray, background: bool) -> None:
        """Receive the experts of a layer that this rank lacks, from the first rank that has each.

        Which rank sends what to whom, each derives from its own two maps.
        """
        import torch
        import torch.distributed as dist

        old = self.map[layer]
        by_rank = (old.reshape(self.ranks, -1), new.reshape(self.ranks, -1))
        received = np.zeros(self.ranks, dtype=np.int64)
        operations, incoming = [], {}
        for rank in range(self.ranks):
            for expert in dict.fromkeys(by_rank[1][rank].tolist()):
                if expert in by_rank[0][rank]:
                    continue
                received[rank] += 1
                source = int(np.flatnonzero(old == expert)[0]) // self.size
                if source == self.rank:
                    place = int(np.flatnonzero(by_rank[0][source] == expert)[0])
                    sent = torch.from_numpy(self.weights[layer, place].copy())
                    operations.append(dist.P2POp(dist.isend, sent, rank))
                elif rank == self.rank:
                    incoming[expert] = torch.empty(2, dtype=torch.int64)
                    operations.append(dist.P2POp(dist.irecv, incoming[expert], source))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        before, local = self.weights[layer].copy(), by_rank[0][self.rank]
        for k, expert in enumerate(by_rank[1][self.rank].tolist()):
            if expert in incoming:
                self.weights[layer, k] = incoming[expert].numpy()
            else:
                self.weights[layer, k] = before[int(np.flatnonzero(local == expert)[0])]
        self.map[layer] = new
        self.copies += int(received.sum())
        seconds = int(received.max()) * self.job.expert_bytes / self.job.bandwidth
        self.stall += 0.0 if background else seconds

    def check(self) -> None:
        """All ranks have one map and its weights; every expert is served."""
        import hashlib

        import torch
        import torch.distributed as dist

        digest = hashlib.sha256(self.map.tobytes()).digest()
        mine = torch.from_numpy(np.frombuffer(digest, dtype=np.int64).copy())
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        served = torch.zeros((self.layers, self.experts), dtype=torch.int64)
        served[self.weights[:, :, 0].ravel(), self.weights[:, :, 1].ravel()] = 1
        dist.all_reduce(served)
        layer = np.arange(self.layers)[:, None]
        if not torch.equal(least, most):
            raise MoeplaceError("Ranks have different maps.")
        if (self.weights[:, :, 1] != self.map[:, self.mine]).any() or (
            self.weights[:, :, 0] != layer
        ).any():
            raise MoeplaceError("A slot's weights are not those that the map says.")
        if not bool((served > 0).all()):
            raise MoeplaceError("An expert is not served.")
        self.checks += 1
        self.seen.append(digest)


def main(arguments: list[str] | None = None) -> None:
    """Run the engine's policy and ours on the windows of an instance, and print both."""
    parser = argparse.ArgumentParser(prog="python -m moeplace.integrations.driver")
    parser.add_argument("instance")
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--gap", type=float, default=Effort().gap)
    given = parser.parse_args(arguments)
    problem = read_instance(given.instance)
    job = Job(
        tokens=np.asarray(problem.loads.tokens),
        speeds=problem.cluster.speeds,
        slots_per_rank=int(problem.cluster.slots[0]),
        engine=given.engine,
        every=given.every,
        passes=given.passes,
        settings=Settings(effort=Effort(gap=given.gap)),
    )
    lines = [f"{'policy':<10} {'step / bound':>12} {'copies':>8} {'stall':>9} {'planning':>10}"]
    for name, ours in (("engine's", False), ("moeplace", True)):
        found = run(replace(job, ours=ours))
        lines.append(
            f"{name:<10} {found.step:>12.4f} {found.copies:>8} {found.stall:>7.3f} s "
            f"{found.plan * 1e3:>7.1f} ms   {found.rebalances} rebalances, {found.checks} checks, "
            f"{found.failures} failures"
        )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
