"""vLLM: an entry point ``vllm.general_plugins`` that takes the place of the default policy.

vLLM calls it in every process, also under spawn and Ray. It acts only where `MOEPLACE_POLICY` or
`MOEPLACE_PROFILE` is set, and only on a policy table and signature that it knows (vLLM 0.33;
``vllm/distributed/eplb/policy``). Set them on every node: ranks without it would wait for others.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from moeplace._check import IntArray
from moeplace.integrations.agree import Alone, Channel, Group
from moeplace.integrations.policy import Policy, Request
from moeplace.integrations.settings import read_settings, wanted

#: Below vLLM's own logger, so that its handlers show what is said.
logger = logging.getLogger("vllm.moeplace")
#: What the policy is called with.
PARAMETERS = (
    "weight",
    "num_replicas",
    "num_groups",
    "num_nodes",
    "num_ranks",
    "old_global_expert_indices",
)


def register() -> None:
    """Replace the policy ``default``, or say in one line why not; never raises."""
    try:
        if wanted():
            _install()
    except Exception as cause:
        logger.warning("moeplace: vLLM's own policy stays: %s: %s", type(cause).__name__, cause)


def _install() -> None:
    settings = read_settings()
    from moeplace.integrations import vllm_ascend

    if vllm_ascend.register():  # it has a policy table of its own
        return
    import vllm
    from vllm.config.parallel import EPLBPolicyOption
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    version = getattr(vllm, "__version__", "unknown")
    default = EPLB_POLICIES.get("default")
    if getattr(default, "moeplace", None) is not None:
        return
    signature: tuple[str, ...] = ()
    if default is not None:
        signature = tuple(inspect.signature(default.rebalance_experts).parameters)
    known = set(EPLB_POLICIES) == {"default"} == set(get_args(EPLBPolicyOption))
    if not known or signature != PARAMETERS:
        logger.warning(
            "moeplace: vLLM %s has the policies %s and calls them with %s, which this moeplace "
            "does not know: vLLM's own policy stays",
            version,
            ", ".join(map(str, EPLB_POLICIES)),
            ", ".join(signature),
        )
        return
    EPLB_POLICIES["default"] = policy_class(default, Policy(f"vllm {version}", settings, logger))
    logger.info("moeplace: policy %s in vLLM %s", settings.mode, version)


def channel(ranks: int) -> Channel:
    """The ranks' CPU group: that of the expert balancer, on which its own worker agrees."""
    import torch.distributed as dist

    if ranks == 1 and not dist.is_initialized():
        return Alone()
    from vllm.distributed.parallel_state import get_eplb_group

    return Group(get_eplb_group().cpu_group)


def policy_class(default: Any, policy: Policy, reach: Callable[[int], Channel] = channel) -> Any:
    """A subclass of vLLM's own policy class that asks `policy`; `reach` as `channel`."""

    class MoeplaceEplbPolicy(default):  # type: ignore[misc]
        """vLLM's interface; see `moeplace.integrations.policy`."""

        moeplace = policy

        @classmethod
        def rebalance_experts(
            cls,
            weight: Any,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: Any = None,
        ) -> Any:
            """[layers, num_replicas] on the CPU."""
            import torch

            arguments = (weight, num_replicas, num_groups, num_nodes, num_ranks)

            def own() -> Any:
                old = old_global_expert_indices
                same = old is not None and tuple(old.shape) == (weight.shape[0], num_replicas)
                return default.rebalance_experts(*arguments, old if same else None).cpu().numpy()

            try:
                request = Request(
                    weight=_array(weight),
                    ranks=int(num_ranks),
                    slots=int(num_replicas),
                    old=_array(old_global_expert_indices),
                    groups=int(num_groups),
                    nodes=int(num_nodes),
                )
                slots = policy.decide(request, lambda: reach(int(num_ranks)), own)
                return torch.from_numpy(np.ascontiguousarray(slots))
            except Exception as cause:
                logger.warning("moeplace: vLLM's own policy for once: %s", cause)
                return default.rebalance_experts(*arguments, old_global_expert_indices)

    return MoeplaceEplbPolicy


def _array(tensor: Any) -> IntArray | None:
    return None if tensor is None else np.asarray(tensor.detach().cpu().numpy())
