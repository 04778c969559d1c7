"""An expert-parallel MoE layer under a plan.

A rank holds tokens and the weights of its slots. `prepare` does what an engine does on the host
for a batch: slots of all assignments, the exchange of counts, split sizes. `Layer` then is pure
device code: it reads no value back, so it runs under CUDA graphs' and FakeTensor's rules alike.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeplace._check import FloatArray, IntArray
from moeplace.replay.kernels import Experts, Groups

GOLDEN = 0.6180339887498949


def choose_slots(experts_of: Tensor, slots: Tensor, ends: Tensor, start: float) -> Tensor:
    """Slot of each assignment, so that every replica gets its share almost exactly.

    The i-th assignment of an expert on this rank takes the replica in whose part of [0, 1)
    the number (start + (i + 0.5) x golden ratio) mod 1 lies: these numbers fill it evenly.

    Parameters
    ----------
    experts_of : int64 [assignments]
    slots, ends : int64 and float64 [experts, replicas]
        As `routing.replica_tables` gives them.
    start : float
        Offset in [0, 1), another one on each source rank, lest all begin with one replica.
    """
    count = experts_of.numel()
    ordered, order = experts_of.sort(stable=True)
    ones = torch.ones_like(experts_of)
    per_expert = torch.zeros(slots.shape[0], dtype=torch.int64, device=slots.device)
    per_expert = per_expert.scatter_add(0, experts_of, ones)
    begins = per_expert.cumsum(0) - per_expert
    index = torch.arange(count, device=slots.device) - begins.gather(0, ordered)
    position = torch.zeros_like(index).scatter(0, order, index)
    drawn = torch.frac(start + (position + 0.5) * GOLDEN)
    replica = (drawn.unsqueeze(1) >= ends.index_select(0, experts_of)).sum(1, keepdim=True)
    return slots.index_select(0, experts_of).gather(1, replica).squeeze(1)


@dataclass(frozen=True)
class Route:
    """Where one batch's rows go on this rank, in one layer under one plan."""

    token: Tensor  #: int64 [sent]: token of each row sent, in the order of slots
    weight: Tensor  #: float32 [sent]: router weight of each row sent
    send_sizes: list[int]  #: [ranks]: rows to each rank
    receive_sizes: list[int]  #: [ranks]: rows from each rank
    by_slot: Tensor  #: int64 [received]: the received rows in the order of slots
    arrived: Tensor  #: int64 [received]: the inverse, the order of slots back to that of arrival
    groups: Groups  #: rows of each slot of this rank

    @property
    def rows(self) -> int:
        """Assignments that this rank's experts run."""
        return sum(self.receive_sizes)


def prepare(
    experts_of: Tensor,
    weights: Tensor,
    slots: IntArray,
    ends: FloatArray,
    rank_slots: list[int],
    rank: int,
    group: dist.ProcessGroup | None = None,
) -> Route:
    """Choose slots, exchange counts and lay out both sides of the exchange.

    Parameters
    ----------
    experts_of : int64 [tokens, k]
        Experts of the tokens that start on this rank; it may have none.
    weights : float32 [tokens, k]
        Router weights.
    slots, ends : array [experts, replicas]
        As `routing.replica_tables` gives them.
    rank_slots : list of int [ranks]
    rank : int
    """
    device, ranks, mine = experts_of.device, len(rank_slots), rank_slots[rank]
    slot = choose_slots(
        experts_of.flatten(),
        torch.tensor(slots, device=device),
        torch.tensor(ends, device=device),
        (rank + 0.5) / ranks,
    )
    order = slot.argsort(stable=True)
    sent = torch.zeros(sum(rank_slots), dtype=torch.int64, device=device)
    sent = sent.scatter_add(0, slot, torch.ones_like(slot))
    received = exchange_counts(sent, rank_slots, mine, group)
    return lay_out(
        order,
        weights,
        [int(part.sum()) for part in torch.split(sent.cpu(), rank_slots)],
        received.cpu(),
    )


def exchange_counts(
    sent: Tensor, rank_slots: list[int], mine: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Rows [ranks, my slots] that each rank will send to my slots, from rows sent [slots]."""
    ranks = len(rank_slots)
    received = torch.empty(ranks * mine, dtype=torch.int64, device=sent.device)
    dist.all_to_all_single(received, sent, [mine] * ranks, rank_slots, group=group)
    return received.view(ranks, mine)


def lay_out(order: Tensor, weights: Tensor, send_sizes: list[int], received: Tensor) -> Route:
    """Build a route from the rows in the order sent and counts received [ranks, slots], on host."""
    device, (ranks, mine) = order.device, received.shape
    slot = torch.arange(mine).repeat(ranks).repeat_interleave(received.flatten())
    by_slot = slot.argsort(stable=True)
    arrived = torch.empty_like(by_slot)
    arrived[by_slot] = torch.arange(by_slot.numel())
    return Route(
        token=order // weights.shape[1],
        weight=weights.flatten()[order],
        send_sizes=send_sizes,
        receive_sizes=[int(count) for count in received.sum(1)],
        by_slot=by_slot.to(device),
        arrived=arrived.to(device),
        groups=Groups.of([int(count) for count in received.sum(0)], device),
    )


@dataclass(frozen=True)
class Layer:
    """Weights of this rank's slots, and the four steps of the layer."""

    up: Tensor  #: [slots, 2 * intermediate, hidden]
    down: Tensor  #: [slots, hidden, intermediate]
    experts: Experts
    group: dist.ProcessGroup | None = None

    def dispatch(self, tokens: Tensor, route: Route) -> Tensor:
        """Rows [received, hidden] of this rank's experts, sorted by slot."""
        arriving = tokens.new_empty((route.rows, tokens.shape[1]))
        leaving = tokens.index_select(0, route.token)
        dist.all_to_all_single(
            arriving, leaving, route.receive_sizes, route.send_sizes, group=self.group
        )
        return arriving.index_select(0, route.by_slot)

    def compute(self, rows: Tensor, route: Route, again: list[Groups]) -> Tensor:
        """Outputs [received, hidden] of the experts; `again` is what is repeated."""
        if not self.up.shape[0] or not rows.shape[0]:
            return rows
        return self.experts.run(rows, self.up, self.down, route.groups, again)

    def combine(self, outputs: Tensor, route: Route, tokens: int) -> Tensor:
        """Weighted sums [tokens, hidden] in float32 of what the experts made of each token."""
        back = outputs.new_empty((len(route.token), outputs.shape[1]))
        leaving = outputs.index_select(0, route.arrived)
        dist.all_to_all_single(
            back, leaving, route.send_sizes, route.receive_sizes, group=self.group
        )
        total = torch.zeros((tokens, back.shape[1]), dtype=torch.float32, device=back.device)
        return total.index_add_(0, route.token, back.float() * route.weight.unsqueeze(1))

    def __call__(self, tokens: Tensor, route: Route) -> Tensor:
        """The whole layer: [tokens, hidden] -> float32 [tokens, hidden]."""
        rows = self.dispatch(tokens, route)
        return self.combine(self.compute(rows, route, []), route, tokens.shape[0])


def expert_weights(
    experts: list[int],
    layer: int,
    hidden: int,
    intermediate: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Up [slots, 2 * intermediate, hidden] and down [slots, hidden, intermediate] projections.

    Replicas of an expert have the same weights on every rank; an EMPTY slot (-1) has zeros.
    """
    up = torch.zeros((len(experts), 2 * intermediate, hidden), dtype=dtype, device=device)
    down = torch.zeros((len(experts), hidden, intermediate), dtype=dtype, device=device)
    for slot, expert in enumerate(experts):
        if expert >= 0:
            generator = torch.Generator(device).manual_seed(
                (seed * 1_000_003 + layer) * 1_000_003 + expert
            )
            up[slot].normal_(0, hidden**-0.5, generator=generator)
            down[slot].normal_(0, intermediate**-0.5, generator=generator)
    return up, down
