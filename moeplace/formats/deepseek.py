"""The maps that DeepSeek's EPLB returns, as ``.npz``.

``phy2log`` [layers, slots], the expert in each slot; ``log2phy`` [layers, experts, most replicas],
the slots of each expert, padded with -1; ``logcnt`` [layers, experts], how many those are.
"""

from typing import Any

import numpy as np

from moeplace._check import IntArray, first
from moeplace._files import PathLike
from moeplace.errors import FormatError
from moeplace.formats._npy import MAX_ENTRIES, npz, write_npz
from moeplace.formats._rows import check_writable, plan_of_rows, whole_rows
from moeplace.plan import Plan

WRITES: frozenset[str] = frozenset()
READS = frozenset({"ranks"})
NEEDS: frozenset[str] = frozenset()
NAMES = ("phy2log", "log2phy", "logcnt")


def write(plan: Plan, path: PathLike) -> None:
    """Write all three maps."""
    check_writable(plan, "DeepSeek's EPLB", duplicates=True)
    write_npz(path, dict(zip(NAMES, _triple(plan), strict=True)))


def _triple(plan: Plan) -> tuple[IntArray, IntArray, IntArray]:
    layers, experts = plan.layers, plan.experts
    most = int(plan.replicas.max())
    log2phy = np.full((layers, experts, most), -1)
    order = np.argsort(plan.slots, axis=1, kind="stable")
    held = np.take_along_axis(plan.slots, order, axis=1)
    starts = np.cumsum(plan.replicas, axis=1) - plan.replicas
    nth = np.arange(plan.slots.shape[1]) - np.take_along_axis(starts, held, axis=1)
    log2phy[np.arange(layers)[:, None], held, nth] = order
    return plan.slots, log2phy, plan.replicas


def read(path: PathLike, *, ranks: int | None = None) -> Plan:
    """Read phy2log, and check that the other two maps agree with it."""
    with npz(path) as archive:
        odd = [name for name in archive.names if name not in NAMES]
        if odd:
            raise FormatError(
                f"{path}: holds the array {odd[0]!r}, expected {', '.join(NAMES)}. Remove it."
            )
        found = {name: _whole(path, name, archive.array(name)) for name in NAMES}
    rows = found["phy2log"]
    if rows.ndim != 2 or (rows < 0).any():
        raise FormatError(
            f"{path}: phy2log has the shape {rows.shape} and the smallest entry {rows.min()}: it "
            "must hold an expert for every [layer, slot]. Write it again."
        )
    plan = plan_of_rows(path, rows, ranks)
    if plan.replicas.size * int(plan.replicas.max()) > MAX_ENTRIES:
        raise FormatError(
            f"{path}: log2phy would have more than {MAX_ENTRIES:,} entries. Check the file."
        )
    _, slots_of, counts = _triple(plan)
    _check(path, "logcnt", found["logcnt"], counts, ("layer", "expert"))
    given = found["log2phy"]
    if given.ndim == 3 and given.shape[:2] == slots_of.shape[:2]:
        given = -np.sort(-given, axis=2)
        if given.shape[2] > slots_of.shape[2] and (given[..., slots_of.shape[2] :] == -1).all():
            given = given[..., : slots_of.shape[2]]  # more padding than is needed
    mine = -np.sort(-slots_of, axis=2)
    _check(path, "log2phy", given, mine, ("layer", "expert", "replica"))
    return plan


def _whole(path: PathLike, name: str, array: Any) -> IntArray:
    if array.dtype.kind not in "iu" or not array.size:
        return whole_rows(path, array, name)
    return np.asarray(array.astype(np.int64))


def _check(path: PathLike, name: str, given: Any, mine: Any, axes: tuple[str, ...]) -> None:
    if given.shape != mine.shape:
        raise FormatError(
            f"{path}: {name} has the shape {given.shape}, expected {mine.shape} from phy2log. "
            "Write all three together."
        )
    if (given != mine).any():
        place = first(given != mine)
        where = ", ".join(f"{axis} {i}" for axis, i in zip(axes[:2], place[:2], strict=True))
        raise FormatError(
            f"{path}: {name} disagrees with phy2log at {where}: {given[place]}, expected "
            f"{mine[place]}. Write all three together."
        )
