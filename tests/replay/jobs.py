"""What ranks run in tests: pickled by name, so it lies in a module of its own; torch inside."""

import os
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplace.plan import EMPTY, Plan
from moeplace.replay.routing import TokenRouting, draw_routing, replica_tables
from moeplace.replay.settings import Runtime

if TYPE_CHECKING:
    from torch import Tensor

    from moeplace.replay.world import World

EXPERTS, TOP_K, TOKENS = 8, 3, 50
KERNELS = (
    ("loop", "float32"),
    ("grouped", "float32"),
    ("loop", "bfloat16"),
    ("grouped", "bfloat16"),
)


def routing(tokens: int = TOKENS) -> TokenRouting:
    """Skewed; expert 7 gets no token."""
    load = np.array([[9.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    return draw_routing(load, tokens, TOP_K, layers=(0,), seed=1, draw="sampled")


def plans(ranks: int) -> dict[str, Plan]:
    """A plan of each kind, for 1, 2 or 4 ranks."""
    experts, each = np.arange(EXPERTS), EXPERTS // ranks
    plain = Plan(slots=experts[None], rank_slots=np.full(ranks, each), experts=EXPERTS)
    # A copy of expert 0 on each rank but its own, and an EMPTY slot.
    rows = [[*experts[r * each : (r + 1) * each], 0 if r else EMPTY, EMPTY] for r in range(ranks)]
    slots = np.array(rows).ravel()
    rank_slots = np.full(ranks, each + 2)
    even = Plan(slots=slots[None], rank_slots=rank_slots, experts=EXPERTS)
    share = np.where(slots != EMPTY, 1.0, 0.0)
    copies = np.flatnonzero(slots == 0)
    share[copies] = np.arange(1, copies.size + 1) / np.arange(1, copies.size + 1).sum()
    weighted = even.with_split(share[None])
    found = {"no replicas": plain, "even, EMPTY slots": even, "weighted": weighted}
    if ranks > 1:
        # All experts on the first ranks: the last holds only the expert without tokens, and one
        # rank has fewer slots than the others.
        sizes = np.full(ranks, 2)
        sizes[0] = EXPERTS - 1
        held = np.full(int(sizes.sum()), EMPTY)
        held[: EXPERTS - 1] = experts[:-1]
        held[-1] = EXPERTS - 1
        found["a rank without tokens"] = Plan(slots=held[None], rank_slots=sizes, experts=EXPERTS)
        sizes = np.zeros(ranks, dtype=int)
        sizes[0] = EXPERTS
        found["a rank without slots"] = Plan(slots=experts[None], rank_slots=sizes, experts=EXPERTS)
    return found


@dataclass(frozen=True)
class LayerJob:
    """Every kind of plan, kernel and type on one set of ranks; errors against the reference."""

    runtime: Runtime

    def run(self, world: "World") -> dict[str, Any]:
        import torch

        from moeplace.replay.kernels import Experts

        found: dict[str, Any] = {}
        routed = routing()
        for name, plan in plans(world.ranks).items():
            for kernel, dtype in KERNELS:
                experts = Experts(kernel, 1.0, world.device, getattr(torch, dtype))
                found[name, kernel, dtype] = self._error(world, plan, routed, experts, dtype)
            found[name, "integers"] = self._integers(world, plan, routed)
            one = routing(tokens=1)  # no token starts on most ranks
            experts = Experts("loop", 1.0, world.device, torch.float32)
            found[name, "one token"] = self._error(world, plan, one, experts, "float32")
        return found

    def _error(
        self, world: "World", plan: Plan, routed: TokenRouting, experts: Any, dtype: str
    ) -> float:
        """Relative error of all tokens' outputs, against a dense float64 reference."""
        import torch

        from moeplace.replay.layer import Layer, expert_weights

        kind, hidden = getattr(torch, dtype), self.runtime.hidden
        inter = self.runtime.intermediate
        sizes = (hidden, inter, 0, world.device, kind)
        shard = routed.shard(world.rank, world.ranks)
        everything, weights = self._inputs(routed, hidden)
        held = plan.slots[0, plan.rank_of_slot == world.rank].tolist()
        route = self._route(world, plan, routed, weights[shard])
        layer = Layer(*expert_weights(held, 0, *sizes), experts)
        mine = layer(everything[shard].to(kind), route)
        assert mine.dtype == torch.float32
        outputs = torch.cat([torch.tensor(part) for part in world.gather(mine.numpy())])
        expected = torch.zeros((routed.tokens, hidden), dtype=torch.float64)
        up, down = expert_weights(list(range(EXPERTS)), 0, *sizes)
        exact = everything.to(kind).double()
        for column in range(TOP_K):
            for expert in range(EXPERTS):
                rows = torch.tensor(routed.experts_of[0, :, column] == expert)
                gate, raised = (exact[rows] @ up[expert].double().T).chunk(2, dim=1)
                inner = torch.nn.functional.silu(gate) * raised
                result = inner @ down[expert].double().T
                expected[rows] += weights[rows, column, None].double() * result
        return float((outputs.double() - expected).norm() / expected.norm())

    def _integers(self, world: "World", plan: Plan, routed: TokenRouting) -> dict[str, Any]:
        """Send each token's number; experts answer with their own: who received what, exactly."""
        import torch

        from moeplace.replay.layer import Layer

        shard = routed.shard(world.rank, world.ranks)
        _, weights = self._inputs(routed, 8)
        numbers = torch.arange(routed.tokens, dtype=torch.float32)[shard, None].expand(-1, 8)
        route = self._route(world, plan, routed, torch.ones_like(weights[shard]))
        held = plan.slots[0, plan.rank_of_slot == world.rank]
        layer = Layer(torch.empty(len(held), 16, 8), torch.empty(len(held), 8, 8), None)  # type: ignore[arg-type]
        rows = layer.dispatch(numbers.contiguous(), route)
        expert = torch.tensor(np.repeat(held, route.groups.sizes), dtype=torch.float32)
        answer = layer.combine(
            (expert + 1)[:, None].expand(-1, 8).contiguous(), route, len(numbers)
        )
        got = [[] for _ in held] if len(held) else []  # type: ignore[var-annotated]
        begin = 0
        for slot, size in enumerate(route.groups.sizes):
            got[slot] = sorted(rows[begin : begin + size, 0].int().tolist())
            begin += size
        return {
            "received": [slot for part in world.gather(got) for slot in part],  # [slots] tokens
            "answers": [x for part in world.gather(answer[:, 0].int().tolist()) for x in part],
        }

    def _route(self, world: "World", plan: Plan, routed: TokenRouting, weights: "Tensor") -> Any:
        import torch

        from moeplace.replay.layer import prepare

        ids = torch.tensor(routed.experts_of[0, routed.shard(world.rank, world.ranks)])
        slots, ends = replica_tables(plan, 0)
        return prepare(ids, weights, slots, ends, plan.rank_slots.tolist(), world.rank)

    @staticmethod
    def _inputs(routed: TokenRouting, hidden: int) -> "tuple[Tensor, Tensor]":
        import torch

        generator = torch.Generator().manual_seed(3)
        tokens = torch.randn((routed.tokens, hidden), generator=generator)
        weights = torch.rand((routed.tokens, TOP_K), generator=generator) + 0.1
        return tokens, weights / weights.sum(1, keepdim=True)


# --- kernels of ranks in trouble ---------------------------------------------------------------


def _last_rank() -> bool:
    return os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)


def killed(tokens: "Tensor", *_: object) -> "Tensor":
    if _last_rank():
        os.kill(os.getpid(), signal.SIGKILL)
    return tokens


def broken(tokens: "Tensor", *_: object) -> "Tensor":
    if _last_rank():
        raise ValueError("the moon is in the wrong phase")
    return tokens


def stuck(tokens: "Tensor", *_: object) -> "Tensor":
    if _last_rank():
        time.sleep(600)
    return tokens


def narrow(tokens: "Tensor", *_: object) -> "Tensor":
    return tokens.narrow(1, 0, 16)


def wide(tokens: "Tensor", *_: object) -> "Tensor":
    return tokens.double()


def silent(tokens: "Tensor", *_: object) -> None:
    return None


def identity(tokens: "Tensor", *_: object) -> "Tensor":
    return tokens
