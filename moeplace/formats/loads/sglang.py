"""SGLang's expert distribution recorder (``.pt``, read from SGLang 0.5.23).

Mode ``stat`` has ``logical_count`` [T, layers, experts]. Modes ``per_pass`` and ``per_token`` have
``records``, each with ``global_physical_count`` [layers, slots] of one forward pass on one rank,
and ``last_physical_to_logical_map`` [layers, slots], with which slots are folded into experts.
"""

from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from moeplace._files import PathLike
from moeplace.errors import FormatError
from moeplace.formats import _torch
from moeplace.formats.loads._raw import Ask, Raw, empty, window_of


def read(path: PathLike, ask: Ask) -> Raw:
    """Read a dump of any of the three modes."""
    found = _torch.load(path)
    if isinstance(found, dict) and "logical_count" in found:
        counts = _torch.array(
            path, found["logical_count"], "logical_count", ("windows", "layers", "experts")
        )
        return Raw(counts, notes=("recorder mode stat",))
    if isinstance(found, dict) and "records" in found:
        return _records(path, found, ask)
    held = f"the keys {', '.join(map(str, list(found)[:10]))}" if isinstance(found, dict) else ""
    raise FormatError(
        f"{path}: holds {held or type(found).__name__}, expected what SGLang's expert distribution "
        "recorder dumps: logical_count, or records with last_physical_to_logical_map. Record with "
        "one of its modes."
    )


def _records(path: PathLike, found: dict[str, Any], ask: Ask) -> Raw:
    records = found["records"]
    if not isinstance(records, list | tuple) or not records:
        raise FormatError(
            f"{path}: records is {type(records).__name__} without entries, expected a list of at "
            "least one forward pass. Record while requests are served."
        )
    if "last_physical_to_logical_map" not in found:
        raise FormatError(
            f"{path}: lacks last_physical_to_logical_map: slots cannot be folded into experts "
            "without it. Dump again with a current SGLang."
        )
    place = "last_physical_to_logical_map"
    held = _torch.array(path, found[place], place, ("layers", "slots"))
    _check_map(path, held, place)
    experts = int(held.max()) + 1
    passes = _pass_ids(path, records)
    distinct, of_record = np.unique(passes, return_inverse=True)
    windows = ask.windows or 1
    window = window_of(len(distinct), windows, path, "forward passes")
    tokens = empty(path, windows, held.shape[0], experts)
    flat = (np.arange(held.shape[0])[:, None] * experts + held).ravel()
    for i, record in enumerate(records):
        counts = _counts(path, record, f"records[{i}]", held.shape)
        summed = np.bincount(flat, weights=counts.ravel(), minlength=held.shape[0] * experts)
        tokens[window[of_record[i]]] += summed.reshape(held.shape[0], experts)
        if ask.progress is not None:
            ask.progress(i + 1, len(records))
    ranks: list[int] = sorted({each["rank"] for each in records if _whole(each.get("rank"))})
    notes = [
        f"recorder mode per pass: {len(records):,} records of {len(distinct):,} forward passes"
        + (f" on rank {', '.join(map(str, ranks))}" if ranks else ""),
        f"{held.shape[1]} slots folded into {experts} experts with the map at the time of the dump",
    ]
    return Raw(tokens, passes=np.bincount(window, minlength=windows), notes=tuple(notes))


def _check_map(path: PathLike, held: npt.NDArray[Any], place: str) -> None:
    slots = held.shape[1]
    if held.size == 0 or held.dtype.kind not in "iu" or held.min() < 0 or held.max() >= slots:
        raise FormatError(
            f"{path}: {place} must hold an expert for every slot, from 0 to below the number of "
            f"slots, got {held.dtype} of shape {held.shape}. Dump again."
        )
    experts = int(held.max()) + 1
    there = np.zeros((len(held), experts), dtype=np.bool_)
    np.put_along_axis(there, held.astype(np.int64), True, axis=1)
    if not there.all():
        layer, expert = np.argwhere(~there)[0]
        raise FormatError(
            f"{path}: {place} misses expert {expert} in layer {layer}: each of the {experts} "
            "experts needs a slot. Dump again."
        )


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _pass_ids(path: PathLike, records: Any) -> npt.NDArray[np.int64]:
    ids = []
    for i, record in enumerate(records):
        number = record.get("forward_pass_id") if isinstance(record, dict) else None
        if not _whole(number) or not 0 <= number < 1 << 62:
            raise FormatError(
                f"{path}: records[{i}].forward_pass_id must be a whole number from 0 on, got "
                f"{type(number).__name__}. Dump again."
            )
        ids.append(number)
    return np.asarray(ids, dtype=np.int64)


def _counts(
    path: PathLike, record: dict[str, Any], place: str, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    place += ".global_physical_count"
    counts = _torch.array(path, record.get("global_physical_count"), place, ("layers", "slots"))
    if counts.shape != shape:
        raise FormatError(
            f"{path}: {place} has the shape {counts.shape}, but the map has {shape}: every layer "
            "and slot needs both. Dump again; the number of slots may not change in between."
        )
    if (counts < 0).any() or not np.isfinite(counts).all():
        layer, slot = np.argwhere((counts < 0) | ~np.isfinite(counts))[0]
        raise FormatError(
            f"{path}: {place} is {counts[layer, slot]} at layer {layer}, slot {slot}: counts must "
            "be at least 0. Dump again."
        )
    return counts
