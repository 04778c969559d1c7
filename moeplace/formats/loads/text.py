"""Loads as text: JSON of LMDeploy, of ADRS / ShinkaEvolve and of our own, CSV of omni-infer.

- ``lmdeploy``: what ``LMDEPLOY_EPLB_EXPERTS_STATISTIC_FILE`` names, a list [layers][experts];
- ``adrs``: ``{"load_history": [{"logical_expert_load": [layers][experts]}, ...]}``;
- ``json``: a list [layers][experts] or [windows][layers][experts], or an object with that list as
  ``tokens`` and, if known, ``passes`` and ``phase``;
- ``instance``: the loads of our instance file;
- ``omni``: a header ``,ep_0,ep_1,...``, then rows ``layer_i,counts``;
- ``csv``: a line of numbers for each layer; a blank line begins the next window.
"""

import re
from typing import Any

import msgspec
import numpy as np

from moeplace._files import MAX_BYTES, PathLike, check_full, nested, read_bytes, read_json, read_raw
from moeplace.errors import FormatError, MoeplaceError
from moeplace.formats._npy import MAX_ENTRIES
from moeplace.formats.loads._raw import Ask, Raw
from moeplace.loads import Phase

#: The most numbers in a line of a CSV file.
MAX_COLUMNS = 1 << 16
_NUMBER = re.compile(rb"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,4})?\s*")


class _Window(msgspec.Struct):
    logical_expert_load: list[list[float]]


class _History(msgspec.Struct):
    load_history: list[_Window]


class _Plain(msgspec.Struct, forbid_unknown_fields=True):
    tokens: msgspec.Raw
    passes: float | list[float] | None = None
    phase: Phase | None = None


def read_lmdeploy(path: PathLike, ask: Ask) -> Raw:
    """Read LMDeploy's statistics."""
    del ask
    return Raw(nested(path, read_bytes(path).strip(), "$", (2,)))


def read_adrs(path: PathLike, ask: Ask) -> Raw:
    """Read a load history; each entry is a window."""
    del ask
    history = read_json(path, _History).load_history
    rows = [entry.logical_expert_load for entry in history]
    check_full(path, rows, "$.load_history[*].logical_expert_load", 3)
    return Raw(rows)


def read_plain_json(path: PathLike, ask: Ask) -> Raw:
    """Read our plain JSON."""
    del ask
    data = read_bytes(path).strip()
    if data.startswith(b"["):
        return Raw(nested(path, data, "$", (2, 3)))
    file = read_json(path, _Plain)
    return Raw(nested(path, bytes(file.tokens), "$.tokens", (2, 3)), file.passes, file.phase)


def read_of_instance(path: PathLike, ask: Ask) -> Raw:
    """Read the loads of one of our instances."""
    del ask
    from moeplace.instances import read_instance

    try:
        loads = read_instance(path).loads
    except FormatError:
        raise
    except MoeplaceError as error:
        raise FormatError(str(error)) from error
    return Raw(loads.tokens, loads.passes, loads.phase)


def read_omni(path: PathLike, ask: Ask) -> Raw:
    """Read omni-infer's table: one window."""
    del ask
    lines = read_bytes(path, "CSV").splitlines()
    head = lines[0].strip().split(b",", MAX_COLUMNS + 1)
    if len(head) > MAX_COLUMNS or head != omni_header(len(head) - 1):
        raise FormatError(
            f"{path}: line 1 must be ,ep_0,ep_1,... (at most {MAX_COLUMNS:,} columns), got "
            f"{_near(lines[0])}. Name another format, or correct the header."
        )
    rows: list[Any] = []
    for n, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        label, comma, rest = line.partition(b",")
        if label.strip() != f"layer_{len(rows)}".encode() or not comma:
            raise FormatError(
                f"{path}: line {n} must begin with layer_{len(rows)}, got {_near(line)}: layers "
                "stand in order, none missing. Correct that line."
            )
        rows.append(_cells(path, rest, n))
        _same_length(path, rows[-1], len(head) - 1, n, "the header")
    if not rows:
        raise FormatError(f"{path}: has a header but no layer. Record loads again.")
    return Raw(np.asarray(rows))


def omni_header(columns: int) -> list[bytes]:
    """The cells of omni-infer's first line."""
    return [b"", *(f"ep_{i}".encode() for i in range(columns))]


def read_csv(path: PathLike, ask: Ask) -> Raw:
    """Read plain CSV."""
    del ask
    windows: list[list[Any]] = [[]]
    entries = 0
    for n, line in enumerate(read_bytes(path, "CSV").splitlines(), start=1):
        if not line.strip():
            if windows[-1]:
                windows.append([])
            continue
        row = _cells(path, line, n)
        first = next(iter(windows[0]), row)
        _same_length(path, row, len(first), n, "the first line")
        windows[-1].append(row)
        entries += len(row)
        if entries > MAX_ENTRIES:
            raise FormatError(f"{path}: has more than {MAX_ENTRIES:,} numbers. Use .npy.")
    if not windows[-1]:
        windows.pop()
    for w, window in enumerate(windows):
        if len(window) != len(windows[0]):
            raise FormatError(
                f"{path}: window {w} has {len(window)} lines but window 0 has {len(windows[0])}: "
                "each needs one for every layer, and a blank line ends it. Correct that window."
            )
    return Raw(np.asarray(windows))


def _cells(path: PathLike, line: bytes, n: int) -> Any:
    columns = line.count(b",") + 1
    if columns > MAX_COLUMNS:
        raise FormatError(
            f"{path}: line {n} has {columns:,} columns: the limit is {MAX_COLUMNS:,}. Give each "
            "layer its own line."
        )
    row = np.empty(columns)
    for column, cell in enumerate(line.split(b",")):
        if len(cell) > 64 or _NUMBER.fullmatch(cell) is None:
            raise FormatError(
                f"{path}: line {n}, column {column + 1} must be a number, got {_near(cell)}. "
                "Correct it; a plain CSV file has no header."
            )
        row[column] = float(cell)
    return row


def _same_length(path: PathLike, row: Any, columns: int, n: int, like: str) -> None:
    if len(row) != columns:
        raise FormatError(
            f"{path}: line {n} has {len(row)} numbers but {like} has {columns}: every layer needs "
            "one for each expert. Correct that line."
        )


def _near(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))


def json_kind(path: PathLike) -> str:
    """The format of a JSON file by its first level: an object's keys, or lists."""
    data = read_raw(path, "JSON", MAX_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if data.startswith(b"["):
        return "json"
    keys = read_json(path, dict[str, msgspec.Raw])
    found = [
        name
        for name, key in (("adrs", "load_history"), ("instance", "loads"), ("json", "tokens"))
        if key in keys
    ]
    own = bytes(keys.get("format", b"")).strip(b'"').decode(errors="replace")[:40]
    if not found and own.startswith("moeplace-"):
        raise FormatError(
            f"{path}: is a file of the format {own}, which holds no loads. Give what an engine "
            "recorded, or an instance."
        )
    if len(found) != 1:
        held = ", ".join(f'"{key[:30]}"' for key in list(keys)[:10]) or "no key"
        options = " or ".join(found) if found else "adrs, instance, json, lmdeploy"
        raise FormatError(
            f"{path}: is JSON with {held}, which could be {options}: the format cannot be told. "
            "Name it (format=)."
        )
    return found[0]
