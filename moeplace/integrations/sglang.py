"""SGLang: `rebalance_experts` of ``sglang.srt.eplb.eplb_algorithms``, replaced in each process.

By the entry point ``sglang.srt.plugins`` (SGLang 0.5.23 loads it in every process), or, for a
version without plugins, by the launcher ``python -m moeplace.integrations.sglang ARGUMENTS``:
spawned processes import the main module again, and with it the replacement.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from moeplace._check import BoolArray, IntArray
from moeplace.errors import MoeplaceError
from moeplace.integrations.agree import Alone, Channel, Group
from moeplace.integrations.policy import Policy, Request
from moeplace.integrations.settings import read_settings, wanted

logger = logging.getLogger("moeplace")
PARAMETERS = (
    "tokens_per_expert",
    "num_physical_experts",
    "num_local_physical_experts",
    "num_groups",
    "num_nodes",
    "algorithm",
)


def register() -> None:
    """Replace the function, or say in one line why not; never raises."""
    try:
        if wanted():
            _install()
    except Exception as cause:
        logger.warning("moeplace: SGLang's own policy stays: %s: %s", type(cause).__name__, cause)


def _install() -> None:
    settings = read_settings()
    import sglang
    from sglang.srt.eplb import eplb_algorithms

    version = getattr(sglang, "__version__", "unknown")
    own = eplb_algorithms.rebalance_experts
    if hasattr(own, "moeplace"):
        return
    found = tuple(inspect.signature(own).parameters)
    if found != PARAMETERS:
        logger.warning(
            "moeplace: SGLang %s calls its policy with %s, which this moeplace does not know: "
            "SGLang's own policy stays",
            version,
            ", ".join(found),
        )
        return
    policy = Policy(f"sglang {version}", settings, logger)
    eplb_algorithms.rebalance_experts = replacement(own, policy, state)
    logger.info("moeplace: policy %s in SGLang %s", settings.mode, version)


def state() -> tuple[Any, BoolArray | None, bool]:
    """SGLang's map in use, which ranks serve (None: all), and whether only this rank is asked."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    old = None if metadata is None else metadata.physical_to_logical_map_cpu.numpy()
    from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager

    elastic = ElasticEPStateManager.instance()
    if elastic is None:
        return old, None, False
    # after a scale-up rank 0 alone plans, and SGLang broadcasts
    alive = elastic.active_ranks.detach().cpu().numpy() > 0
    return old, (None if alive.all() else alive), bool(getattr(elastic, "has_scaled", False))


def channel(device: Any, alive: BoolArray | None, alone: bool) -> Channel:
    """The default group on the tensors' device: the one on which SGLang sums its counts.

    With dead ranks that is a backend that leaves them out; a CPU group would wait for them.
    """
    import torch.distributed as dist

    if alone or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    return Group(None, device, 0 if alive is None else int(alive.argmax()))


def replacement(own: Any, policy: Policy, look: Callable[[], Any]) -> Any:
    """A function in place of `own` that asks `policy`; `look` as `state`."""

    def rebalance_experts(
        tokens_per_expert: Any,
        num_physical_experts: int,
        num_local_physical_experts: int,
        num_groups: int | None,
        num_nodes: int,
        algorithm: Any,
    ) -> Any:
        arguments = (
            tokens_per_expert,
            num_physical_experts,
            num_local_physical_experts,
            num_groups,
            num_nodes,
            algorithm,
        )
        try:
            import torch

            old, alive, alone = look()
            if old is None:  # at the start: other processes may not be asked at all
                return own(*arguments)
            kept: list[Any] = []

            def mine() -> IntArray:
                kept.append(own(*arguments))
                return np.asarray(kept[0][0].cpu().numpy())

            tokens = tokens_per_expert.detach().cpu().numpy()
            ranks = num_physical_experts // num_local_physical_experts
            if alive is not None:
                if alive[ranks:].any():
                    raise MoeplaceError(f"more ranks serve than the {ranks} that are planned for")
                alive = alive[:ranks]
                alive = None if alive.all() else alive
            request = Request(
                weight=tokens.sum(axis=0),
                ranks=ranks,
                slots=int(num_physical_experts),
                old=old,
                groups=int(num_groups or 1),
                nodes=int(num_nodes),
                alive=alive,
            )
            device = tokens_per_expert.device
            slots = policy.decide(request, lambda: channel(device, alive, alone), mine)
            if kept:
                return kept[0]
            experts = tokens.shape[-1]
            maps = physical_maps(slots, experts, ranks, alive)
            return tuple(torch.from_numpy(each) for each in (slots, *maps))
        except Exception as cause:
            logger.warning("moeplace: SGLang's own policy for once: %s", cause)
            return own(*arguments)

    rebalance_experts.moeplace = policy  # type: ignore[attr-defined]
    return rebalance_experts


def physical_maps(
    slots: IntArray, experts: int, ranks: int, alive: BoolArray | None = None
) -> tuple[IntArray, IntArray]:
    """The slots of each expert [layers, experts, most], padded with -1, and how many they are.

    Slots of ranks that are not alive are placeholders, not replicas.
    """
    layers, width = slots.shape
    real = np.ones(width, dtype=np.bool_)
    if alive is not None:
        real = np.repeat(alive, width // ranks)
    count = np.zeros((layers, experts), dtype=np.int64)
    layer = np.arange(layers)
    rows = []
    for slot in np.flatnonzero(real):
        expert = slots[:, slot]
        rows.append((slot, expert, count[layer, expert].copy()))
        count[layer, expert] += 1
    table = np.full((layers, experts, int(count.max())), -1, dtype=np.int64)
    for slot, expert, place in rows:
        table[layer, expert, place] = slot
    return table, count


def main() -> None:
    """Run SGLang's server with the arguments of the command line."""
    import runpy

    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)


if __name__ in ("__main__", "__mp_main__"):
    register()
if __name__ == "__main__":
    main()
