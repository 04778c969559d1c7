"""vllm-ascend: a policy of its table form, in place of all that its factory makes.

Read from vllm-ascend 0.23 (``vllm_ascend/eplb/core``). Its policy runs in a process beside each
worker, which has no process group: the workers make a store, and digests are compared there.
Called by the vLLM entry point.
"""

import importlib.util
import logging
import socket
from typing import Any

import numpy as np

from moeplace._check import IntArray
from moeplace.errors import MoeplaceError
from moeplace.integrations.agree import Alone, Channel, Group, Store
from moeplace.integrations.policy import Policy, Request
from moeplace.integrations.settings import Settings, read_settings

logger = logging.getLogger("vllm.moeplace")
#: Policies of vllm-ascend that we stand in for: its random one is a test of its own.
TYPES = (1, 2, 3)


def register() -> bool:
    """Replace the factory where vllm-ascend is installed; whether it is."""
    try:
        if importlib.util.find_spec("vllm_ascend") is None:
            return False
    except (ImportError, ValueError):
        return False
    from vllm_ascend.eplb.core.policy.policy_factory import PolicyFactory

    own = PolicyFactory.generate_policy
    if not hasattr(own, "moeplace"):
        PolicyFactory.generate_policy = staticmethod(factory(own, read_settings()))
        logger.info("moeplace: policies of vllm-ascend are replaced")
    return True


def factory(own: Any, settings: Settings) -> Any:
    """A function in place of `own`, which makes a policy from its number."""

    def generate_policy(policy_type: int) -> Any:
        theirs = own(policy_type)
        try:
            if policy_type not in TYPES:
                logger.warning(
                    "moeplace: vllm-ascend's policy %s stays; 1, 2 and 3 are replaced", policy_type
                )
                return theirs
            return AscendPolicy(theirs, settings, meeting())
        except Exception as cause:
            logger.warning("moeplace: vllm-ascend's own policy stays: %s", cause)
            return theirs

    generate_policy.moeplace = True  # type: ignore[attr-defined]
    return generate_policy


def meeting() -> tuple[str, int, int, int] | None:
    """Make the ranks' store: its host, its port, this rank and how many; None for one rank.

    Called by all workers at the same time, while they have a process group.

    Raises
    ------
    MoeplaceError
        If the workers have no group: ranks that cannot compare must not plan apart.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        raise MoeplaceError("the workers have no process group by which to agree")
    from vllm.distributed.parallel_state import get_ep_group

    group = Group(get_ep_group().cpu_group)
    if group.size == 1:
        return None
    host, port = "", 0
    if group.first:
        host = _address()
        store = _torch_store()(host, 0, is_master=True, wait_for_workers=False)
        _served.append(store)
        port = store.port
    address = group.gather(f"{host}:{port}" if group.first else "-")[0]
    host, _, text = address.rpartition(":")
    return host, int(text), group.rank, group.size


def _address() -> str:
    """Address of this host as others see it: that of the route to them. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.255.255.255", 1))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostbyname(socket.gethostname())


#: Stores live as long as the worker that made them.
_served: list[Any] = []


class AscendPolicy:
    """vllm-ascend's interface; travels to the planning process by pickle.

    Parameters
    ----------
    theirs : policy of vllm-ascend
        Asked where neither a plan nor the table in use will do.
    settings : Settings
    address : (host, port, rank, ranks), optional
        Of the store; None for one rank.
    """

    def __init__(
        self, theirs: Any, settings: Settings, address: tuple[str, int, int, int] | None
    ) -> None:
        self.theirs, self.settings, self.address = theirs, settings, address
        self._policy: Policy | None = None
        self._channel: Channel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_policy": None, "_channel": None}

    def rebalance_experts(self, current_expert_table: Any, expert_workload: Any) -> Any:
        """(changed 0 or 1, layers by what they save, table [layers, ranks, slots per rank])."""
        try:
            return self._rebalance(current_expert_table, expert_workload)
        except Exception as cause:  # what other ranks do now is not known: move nothing
            logger.warning("moeplace: the table in use stays: %s", cause)
            return 0, np.arange(len(current_expert_table)), current_expert_table

    def _rebalance(self, current: Any, workload: Any) -> Any:
        if self._policy is None:
            self._policy = Policy("vllm-ascend", self.settings, logger)
        table, loads = np.asarray(current), np.asarray(workload, dtype=np.float64)
        layers, ranks, size = table.shape
        if loads.ndim == 4:  # stages
            loads = loads.sum(axis=0)
        weight = slot_loads(table, loads)
        old = table.reshape(layers, -1)

        def own() -> IntArray:
            return np.asarray(self.theirs.rebalance_experts(current, workload)[2]).reshape(
                layers, -1
            )

        request = Request(weight=weight, ranks=ranks, slots=ranks * size, old=old)
        slots = self._policy.decide(request, lambda: self._reach(ranks), own)
        saved = (old != slots).any(axis=1)
        order = np.argsort(~saved, kind="stable")
        return int(saved.any()), order, slots.reshape(layers, ranks, size).tolist()

    def _reach(self, ranks: int) -> Channel:
        if self._channel is None:
            self._channel = _meet(self.address, ranks)
        return self._channel


def _meet(address: tuple[str, int, int, int] | None, ranks: int) -> Channel:
    if address is None:
        if ranks > 1:
            raise MoeplaceError(f"the {ranks} ranks have no store by which to agree")
        return Alone()
    host, port, rank, size = address
    return Store(_torch_store()(host, port, is_master=False, wait_for_workers=False), rank, size)


def _torch_store() -> Any:
    from torch import distributed

    return vars(distributed)["TCPStore"]


def slot_loads(table: IntArray, loads: Any) -> Any:
    """Fold loads of slots [layers, ranks, slots per rank] into experts [layers, experts]."""
    layers = table.shape[0]
    flat, counts = table.reshape(layers, -1), loads.reshape(layers, -1)
    experts = int(flat.max()) + 1
    weight = np.zeros((layers, experts))
    held = flat >= 0
    layer = np.broadcast_to(np.arange(layers)[:, None], flat.shape)
    np.add.at(weight, (layer[held], flat[held]), counts[held])
    return weight
