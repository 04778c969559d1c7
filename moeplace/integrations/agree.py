"""One decision for all ranks: an engine's ranks each move weights by the map that they have.

Where the ranks share a process group, one of them plans and the others are told (`Group`). Where
they only share a store, each plans, and a decision counts if all came to the same (`Store`). A
planner that is the only one to be asked, since the engine hands its map on, is `Alone`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np

from moeplace._check import IntArray
from moeplace.errors import MoeplaceError

#: What ranks are to do: keep the map in use, take the new one, or ask the engine's own policy.
KEEP, TAKE, OWN = 0, 1, 2
#: Bytes of a device's key that are shared.
KEY_BYTES = 96


class Disagreement(MoeplaceError):  # noqa: N818 - a state of the ranks
    """The ranks could not be brought to one decision."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A decision, with the map [layers, slots] if it is to be taken."""

    verdict: int
    slots: IntArray | None = None

    def digest(self) -> bytes:
        """What must not differ between ranks."""
        state = hashlib.sha256(bytes([self.verdict]))
        if self.slots is not None:
            state.update(repr(self.slots.shape).encode())
            state.update(np.ascontiguousarray(self.slots, dtype=np.int64).tobytes())
        return state.digest()


class Channel(Protocol):
    """How ranks come to one decision; every rank calls the same methods in the same order."""

    #: Whether this rank's decisions are recorded.
    first: bool

    def gather(self, key: str) -> list[str]:
        """The keys of all ranks, in rank order."""

    def settle(self, make: Callable[[], Answer], layers: int, slots: int) -> Answer:
        """The decision of all. `make` never raises.

        Raises
        ------
        Exception
            If the ranks cannot reach each other.
        """


class Alone:
    """The only rank that is asked."""

    first = True

    def gather(self, key: str) -> list[str]:
        """Give back the key."""
        return [key]

    def settle(self, make: Callable[[], Answer], layers: int, slots: int) -> Answer:
        """Give back the decision."""
        del layers, slots
        return make()


class Group:
    """Ranks of a torch process group: the root plans.

    Only sums are used: every backend and every group that engines make of one has them.

    Parameters
    ----------
    group : torch process group, or None for the default one
    device : where tensors for it live
    root : int
        Rank in the group that plans.
    """

    def __init__(self, group: Any = None, device: Any = "cpu", root: int = 0) -> None:
        import torch.distributed as dist

        held: Any = dist.group.WORLD if group is None else group
        self.group, self.device, self.root = held, device, root
        self.rank, self.size = held.rank(), held.size()
        self.first = self.rank == root

    def _sum(self, values: IntArray) -> IntArray:
        import torch

        tensor = torch.from_numpy(values).to(self.device)
        torch.distributed.all_reduce(tensor, group=self.group)
        return np.asarray(tensor.cpu().numpy())

    def gather(self, key: str) -> list[str]:
        """The keys of all ranks, in rank order."""
        rows = np.zeros((self.size, KEY_BYTES), dtype=np.int64)
        data = np.frombuffer(key.encode()[:KEY_BYTES], dtype=np.uint8)
        rows[self.rank, : data.size] = data
        return [
            bytes(row[row > 0].astype(np.uint8)).decode(errors="replace") for row in self._sum(rows)
        ]

    def settle(self, make: Callable[[], Answer], layers: int, slots: int) -> Answer:
        """The root's decision."""
        packet = np.zeros(1 + layers * slots, dtype=np.int64)
        if self.first:
            answer = make()
            packet[0] = 1 + answer.verdict
            if answer.verdict == TAKE:
                assert answer.slots is not None
                packet[1:] = answer.slots.ravel()
        packet = self._sum(packet)
        verdict = int(packet[0]) - 1
        if verdict not in (KEEP, TAKE, OWN):
            raise Disagreement(f"the root's decision arrived as {verdict}: do all ranks run this?")
        return Answer(verdict, packet[1:].reshape(layers, slots) if verdict == TAKE else None)


class Store:
    """Ranks that only share a torch store: each plans, rank 0 compares, and says so to all.

    Whoever has not heard the verdict waits: to go on alone could be to differ.
    """

    #: Seconds that rank 0 waits for the others' digests, and that all wait for its verdict.
    PATIENCE, VERDICT = 60.0, 3600.0

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.first = rank == 0
        self.turn = 0

    def gather(self, key: str) -> list[str]:
        """The keys of all ranks, in rank order."""
        self.store.set(f"moeplace/key/{self.rank}", key)
        names = [f"moeplace/key/{rank}" for rank in range(self.size)]
        self.store.wait(names, timedelta(seconds=self.PATIENCE))
        return [self.store.get(name).decode() for name in names]

    def settle(self, make: Callable[[], Answer], layers: int, slots: int) -> Answer:
        """Give back the decision if all came to the same, else to keep the map in use."""
        del layers, slots
        answer = make()
        self.turn += 1
        name, mine = f"moeplace/{self.turn}", answer.digest()
        self.store.set(f"{name}/{self.rank}", mine)
        if self.first:
            names = [f"{name}/{rank}" for rank in range(self.size)]
            try:
                self.store.wait(names, timedelta(seconds=self.PATIENCE))
                same = all(self.store.get(each) == mine for each in names)
            except Exception:  # a store has its own errors for a rank that does not come
                same = False
            self.store.set(f"{name}/verdict", mine if same else b"keep")
        self.store.wait([f"{name}/verdict"], timedelta(seconds=self.VERDICT))
        if self.store.get(f"{name}/verdict") == mine:
            return answer
        raise Disagreement("the ranks came to different decisions")
