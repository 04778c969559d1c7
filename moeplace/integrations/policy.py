"""What the engines' policies share: decide, agree, record, and never raise into the engine."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace._check import BoolArray, FloatArray, IntArray
from moeplace.errors import MoeplaceError
from moeplace.integrations import tables
from moeplace.integrations.agree import KEEP, OWN, TAKE, Answer, Channel
from moeplace.integrations.observe import Decision, Recorder
from moeplace.integrations.planner import Ask, Proposal, cached, propose
from moeplace.integrations.settings import Settings
from moeplace.integrations.speeds import device_key, rank_speeds
from moeplace.plan import EMPTY


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What an engine hands to its policy, as NumPy arrays.

    Attributes
    ----------
    weight : array [layers, experts]
    ranks, slots : int
        Of all ranks together.
    old : array [layers, slots of before], optional
        The map in use; -1 for a slot without an expert.
    groups, nodes : int
    alive : bool array [ranks], optional
        Ranks that serve; the slots of the others hold placeholders, which are no replicas.
    """

    weight: Any
    ranks: int
    slots: int
    old: Any = None
    groups: int = 1
    nodes: int = 1
    alive: BoolArray | None = None

    @property
    def kept(self) -> IntArray | None:
        """The map in use if the engine can go on with it."""
        if self.old is None or self.alive is not None:
            return None
        layers, experts = self.weight.shape
        return self.old if tables.serves(self.old, layers, self.slots, experts) else None


class Policy:
    """One engine's policy in one process.

    Parameters
    ----------
    engine : str
        For records and log lines.
    settings : Settings
    logger : logging.Logger
        One that the engine shows.
    """

    def __init__(self, engine: str, settings: Settings, logger: logging.Logger) -> None:
        self.engine, self.settings, self.logger = engine, settings, logger
        #: Decisions that fell back, for whatever cause; and those that were made.
        self.failures, self.decisions = 0, 0
        self._keys: dict[int, Sequence[str]] = {}
        self._speeds: dict[tuple[str, ...], FloatArray] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._recorder = (
            None if settings.folder is None else Recorder(settings.folder, settings.folder_bytes)
        )

    def decide(
        self, request: Request, reach: Callable[[], Channel], own: Callable[[], Any]
    ) -> IntArray:
        """The map [layers, slots] for the engine to use; never raises.

        `reach` makes the way to the other ranks; `own` is the engine's own policy: for when neither
        a plan nor the map in use will do.
        """
        answer = Answer(OWN)
        try:
            layers, _ = request.weight.shape
            channel = reach()
            if request.ranks not in self._keys:  # once: all ranks are here at the same time
                self._keys[request.ranks] = channel.gather(device_key(self.settings))
            answer = channel.settle(
                lambda: self._answer(request, channel.first), layers, request.slots
            )
        except Exception as cause:  # nothing may reach the engine
            self._failed(cause)
            answer = Answer(KEEP)
        try:
            if answer.verdict == TAKE and answer.slots is not None:
                return answer.slots
            if answer.verdict == KEEP and request.kept is not None:
                return np.asarray(request.kept, dtype=np.int64)
        except Exception as cause:
            self._failed(cause)
        return self._own(request, own)

    def _answer(self, request: Request, first: bool) -> Answer:
        """Decide for this rank; never raises."""
        try:
            self.decisions += 1
            return self._plan(request, first)
        except Exception as cause:
            self._failed(cause)
            return Answer(KEEP)

    def _plan(self, request: Request, first: bool) -> Answer:
        weight = np.asarray(request.weight, dtype=np.float64)
        if not np.isfinite(weight).all() or (weight < 0).any():
            raise MoeplaceError("the engine's weights hold NaN, infinite or negative numbers")
        if not weight.any():  # profile runs, and before the first request
            cached()  # kernels are loaded now, while nobody is served
            return Answer(KEEP)
        alive = np.ones(request.ranks, dtype=np.bool_) if request.alive is None else request.alive
        slots_per_rank, rest = divmod(request.slots, request.ranks)
        if rest or alive.size != request.ranks or not alive.any():
            raise MoeplaceError(
                f"{request.slots} slots on {request.ranks} ranks ({int(alive.sum())} of "
                f"{alive.size} alive) do not divide evenly"
            )
        ask = Ask(
            loads=weight,
            speeds=self._rank_speeds(request.ranks)[alive],
            slots_per_rank=slots_per_rank,
            old=self._fitted(request, slots_per_rank, alive),
            **self._grouping(request, bool(alive.all())),
        )
        proposal = propose(ask, self.settings.effort)
        for note in proposal.notes:
            self._say(note)
        layers, width = proposal.slots.shape
        if not tables.serves(proposal.slots, layers, width, ask.experts):
            raise MoeplaceError("the plan leaves an expert without a slot")
        keep = self.settings.mode == "observe" or (
            ask.old is not None and bool((proposal.slots == ask.old).all())
        )
        reason = self._reason(proposal, ask)
        if first:
            self.logger.info("moeplace: %s", reason)
            self._record(request, ask, proposal, reason, keep)
        if keep and request.kept is not None:
            return Answer(KEEP)
        if self.settings.mode == "observe":
            return Answer(OWN)
        return Answer(TAKE, _spread(proposal.slots, alive, request.slots))

    def _grouping(self, request: Request, whole: bool) -> dict[str, int]:
        """Groups that are bound to nodes, where they divide; a change of that is said."""
        groups, nodes = max(int(request.groups or 1), 1), max(int(request.nodes or 1), 1)
        if groups == 1 or nodes == 1:
            return {}
        experts = request.weight.shape[1]
        if whole and not (groups % nodes or request.ranks % nodes or experts % groups):
            return {"groups": groups, "nodes": nodes}
        self._say(
            f"{groups} expert groups do not divide over {nodes} nodes and the ranks that serve: "
            "experts may lie on any node"
        )
        return {}

    def _fitted(self, request: Request, slots_per_rank: int, alive: BoolArray) -> IntArray | None:
        """The map in use on the ranks that are asked about; None where it is of no use.

        Ranks are added and removed at the end; those that are not alive are left out.
        """
        if request.old is None:
            return None
        old = np.asarray(request.old)
        layers, experts = request.weight.shape
        sound = (
            old.ndim == 2
            and old.shape[0] == layers
            and old.dtype.kind in "iu"
            and old.shape[1] % slots_per_rank == 0
            and old.size > 0
            and old.min() >= EMPTY
            and old.max() < experts
        )
        if not sound:
            self._say("the map in use is none that can be read: planned anew")
            return None
        old = old[:, : request.slots].astype(np.int64)
        old = np.pad(old, ((0, 0), (0, request.slots - old.shape[1])), constant_values=EMPTY)
        return old.reshape(layers, alive.size, -1)[:, alive].reshape(layers, -1)

    def _rank_speeds(self, ranks: int) -> FloatArray:
        keys = tuple(self._keys.get(ranks, ()))
        with self._lock:
            if (*keys, str(ranks)) not in self._speeds:  # once: a start's speeds, and one warning
                found = rank_speeds(self.settings, keys, ranks, self.logger)
                self._speeds[(*keys, str(ranks))] = found
            return self._speeds[(*keys, str(ranks))]

    def _reason(self, proposal: Proposal, ask: Ask) -> str:
        bound = float(proposal.bound.sum())
        after = float(proposal.after.sum()) / bound if bound else 1.0
        if not np.isfinite(proposal.before).all():
            what = "a first plan" if ask.old is None else "a plan for other ranks"
            return f"{what} at {after:.4f} of the bound"
        before = float(proposal.before.sum()) / bound if bound else 1.0
        changed = int((proposal.slots != ask.old).any(axis=1).sum())
        if not changed:
            return f"no layer's saving pays for moving: {before:.4f} of the bound"
        return (
            f"{changed} of {proposal.slots.shape[0]} layers, {int(proposal.copies.sum())} copies: "
            f"{before:.4f} -> {after:.4f} of the bound, {100 * proposal.saving:.1f} % saved"
        )

    def _record(
        self, request: Request, ask: Ask, proposal: Proposal, reason: str, keep: bool
    ) -> None:
        if self._recorder is None:
            return
        import moeplace

        about = {
            "engine": self.engine,
            "mode": self.settings.mode,
            "verdict": "keep" if keep else "take",
            "saving": proposal.saving,
            "phase": self.settings.phase,
            "reason": reason,
            "moeplace": moeplace.__version__,
        }
        try:
            self._recorder.write(
                Decision(
                    weight=ask.loads,
                    old=ask.old,
                    proposed=proposal.slots,
                    before=proposal.before,
                    after=proposal.after,
                    bound=proposal.bound,
                    copies=proposal.copies,
                    speeds=ask.speeds,
                    about=about,
                )
            )
        except Exception as cause:  # a full disk is no reason to keep a slow map
            self._say(f"decisions are not recorded: {cause}")

    def _own(self, request: Request, own: Callable[[], Any]) -> IntArray:
        """The engine's own policy; if even that fails, experts in order."""
        try:
            return np.asarray(own(), dtype=np.int64)
        except Exception as cause:
            self._failed(cause)
        layers, experts = request.weight.shape
        if request.kept is not None:
            return np.asarray(request.kept, dtype=np.int64)
        return np.tile(np.arange(request.slots) % experts, (layers, 1))

    def _failed(self, cause: Exception) -> None:
        self.failures += 1
        self.logger.warning(
            "moeplace: kept the map in use, or the engine's own policy: %s: %s",
            type(cause).__name__,
            cause,
        )

    def _say(self, text: str) -> None:
        """One line, once."""
        with self._lock:
            if text in self._told:
                return
            self._told.add(text)
        self.logger.warning("moeplace: %s", text)


def _spread(slots: IntArray, alive: BoolArray, width: int) -> IntArray:
    """Lay the slots of the ranks that serve among those of all; expert 0 stands in the others."""
    if alive.all():
        return slots
    full = np.zeros((slots.shape[0], alive.size, width // alive.size), dtype=np.int64)
    full[:, alive] = slots.reshape(slots.shape[0], int(alive.sum()), -1)
    return full.reshape(slots.shape[0], width)
