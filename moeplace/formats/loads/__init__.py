"""Loads that engines record: the table of formats, detection and `read_loads`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._files import PathLike, reading
from moeplace.errors import FormatError, ProblemError
from moeplace.formats._npy import MAGIC, npz
from moeplace.formats.loads import binary, observe, sglang, tensorrt_llm, text, trace
from moeplace.formats.loads._raw import Ask, Raw, ReadProgress, window_of
from moeplace.integrations.observe import is_observed
from moeplace.loads import LoadHistogram, Phase

logger = logging.getLogger(__name__)


#: Readers of the formats.
FORMATS: dict[str, Callable[[PathLike, Ask], Raw]] = {
    "adrs": text.read_adrs,
    "csv": text.read_csv,
    "instance": text.read_of_instance,
    "json": text.read_plain_json,
    "lmdeploy": text.read_lmdeploy,
    "npy": binary.read_npy,
    "npz": binary.read_npz,
    "observe": observe.read,
    "omni": text.read_omni,
    "sglang": sglang.read,
    "tensorrt-llm": tensorrt_llm.read,
    "trace": trace.read,
}
#: Formats without windows of their own: passes or tokens are summed as they are read.
_SUMMED = ("sglang", "tensorrt-llm", "trace")


@dataclass(frozen=True)
class Read:
    """Loads with what is to be said of them."""

    loads: LoadHistogram
    format: str
    detected: bool
    notes: tuple[str, ...]


def read_loads(
    path: PathLike,
    format: str | None = None,  # noqa: A002 - reads as it is said
    *,
    phase: Phase | None = None,
    passes: float | Sequence[float] | None = None,
    layers: slice | Sequence[int] | None = None,
    windows: int | None = None,
    experts: int | None = None,
    progress: ReadProgress | None = None,
) -> LoadHistogram:
    """Read the loads that an engine recorded.

    Parameters
    ----------
    path : path
        A file, or for TensorRT-LLM and ``observe`` (see `moeplace.integrations.observe`) a folder.
    format : {"adrs", "csv", "instance", "json", "lmdeploy", "npy", "npz", "observe", "omni", \
"sglang", "tensorrt-llm", "trace"}, optional
        By default it is told from the content, and logged; where that leaves a choice, it is
        an error that lists the candidates.
    phase : {"prefill", "decode", "mixed"}, optional
        Where the file does not say it; mixed by default.
    passes : number or [windows], optional
        Forward passes of each window, where the file does not say it.
    layers : slice or sequence of int, optional
        The rows to keep, e.g. ``slice(3, 61)`` where dense layers have rows too; all must be there.
    windows : int, optional
        Sum consecutive windows (passes, tokens of a trace) into this many. By default the
        file's own; a trace, per-pass records and TensorRT-LLM's iterations become one.
    experts : int, optional
        Number of experts of a trace; by default the largest id + 1.
    progress : callable (done, total), optional
        Called while a long file is read.

    Returns
    -------
    LoadHistogram
        Slots folded into experts; one row for each layer of the file, or those in `layers`.

    Raises
    ------
    FormatError
        If the format is unknown or cannot be told, or the file is not of that format.
    ProblemError
        If an option has a wrong value, or contradicts the file.
    MissingExtraError
        If the file needs a package that is not installed (torch for ``.pt``).
    """
    found = inspect(
        path,
        format,
        phase=phase,
        passes=passes,
        layers=layers,
        windows=windows,
        experts=experts,
        progress=progress,
    )
    how = "detected as" if found.detected else "read as"
    logger.info("%s: %s %s; %s", path, how, found.format, "; ".join(found.notes))
    return found.loads


def inspect(
    path: PathLike,
    format: str | None = None,  # noqa: A002
    *,
    phase: Phase | None = None,
    passes: Any = None,
    layers: slice | Sequence[int] | None = None,
    windows: int | None = None,
    experts: int | None = None,
    progress: ReadProgress | None = None,
) -> Read:
    """`read_loads`, with the format, how it was told, and notes on the file."""
    for name, value in (("windows", windows), ("experts", experts)):
        if value is not None and not (isinstance(value, int) and 1 <= value <= 1 << 20):
            raise ProblemError(f"Option {name} must be a whole number from 1 on, got {value!r}.")
    detected = format is None
    name = detect(path) if format is None else format
    check_format(name)
    if experts is not None and name != "trace":
        raise ProblemError(
            f"Option experts is for traces; the format {name} says how many there are. Drop it."
        )
    try:
        raw = FORMATS[name](path, Ask(windows, experts, progress))
    except MemoryError as cause:
        raise FormatError(f"{path}: does not fit in memory. Ask for fewer windows.") from cause
    said: Any = _one(path, "phase", raw.phase, phase) or "mixed"
    try:
        held = LoadHistogram(tokens=raw.tokens, passes=raw.passes)
    except ProblemError as error:
        raise FormatError(f"{path}: {error}") from error
    if passes is not None and np.ndim(passes) == 0:
        passes = np.full(held.windows, passes)
    passes = _one(path, "passes", held.passes, passes)
    loads = LoadHistogram(tokens=_layers(held.tokens, layers), passes=passes, phase=said)
    if windows is not None and loads.windows != windows:
        loads = loads.regimes(window_of(loads.windows, windows, path, "windows").tolist())
    return Read(loads, name, detected, raw.notes)


def check_format(name: str) -> None:
    """Raise FormatError unless `name` is a load format."""
    if name not in FORMATS:
        raise FormatError(
            f"Load format {name!r} is unknown: choose one of {', '.join(sorted(FORMATS))}."
        )


def _one(path: PathLike, name: str, held: Any, given: Any) -> Any:
    if held is None or given is None:
        return given if held is None else held
    if np.array_equal(held, given):
        return held
    raise ProblemError(
        f"{path}: says its {name} itself ({np.array2string(np.asarray(held), threshold=8)}), but "
        f"the option gives {given!r}. Drop the option {name}."
    )


def _layers(tokens: Any, layers: slice | Sequence[int] | None) -> Any:
    if layers is None:
        return tokens
    if isinstance(layers, slice):
        rows = tokens.shape[1]
        for end in (layers.start, layers.stop):
            if end is not None and not -rows <= end <= rows:
                asked = ":".join(
                    "" if each is None else str(each) for each in (layers.start, layers.stop)
                )
                raise ProblemError(
                    f"Option layers asks for rows {asked}, but there are {rows} (0 to {rows - 1}). "
                    "Choose from those; if dense layers have no rows here, drop the option."
                )
        index: Any = range(rows)[layers]
    else:
        index = list(layers)
    for layer in index:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < tokens.shape[1]:
            raise ProblemError(
                f"Option layers asks for layer {layer!r}, but there are {tokens.shape[1]} "
                f"(0 to {tokens.shape[1] - 1}). Choose from those."
            )
    if not len(index):
        raise ProblemError(
            f"Option layers keeps none of the {tokens.shape[1]} layers. Choose at least one."
        )
    return tokens[:, list(index)]


def detect(path: PathLike) -> str:
    """Tell a format from the content.

    Raises
    ------
    FormatError
        If no format, or more than one, fits.
    """
    with reading(path):
        folder = Path(path).is_dir()
    if folder:
        if (Path(path) / "meta_info.json").exists():
            return "tensorrt-llm"
        if is_observed(path):
            return "observe"
        raise FormatError(
            f"{path}: is a folder without meta_info.json (TensorRT-LLM's statistics) or "
            "moeplace-observe.json (what a policy recorded). Name a file in it."
        )
    with reading(path), Path(path).open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PK"):
        return _zipped(path)
    if head.startswith(MAGIC):
        with trace.opened(path) as array:
            return _trace_or(path, trace.looks(array), "npy")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if first.startswith((b"{", b"[")):
        return text.json_kind(path)
    if first.startswith(b",ep_0"):
        return "omni"
    if first[:1].isdigit() or first.startswith((b"+", b".")):
        return "csv"
    raise FormatError(
        f"{path}: begins like none of {', '.join(sorted(FORMATS))}. Name its format (format=), or "
        "convert it."
    )


def _zipped(path: PathLike) -> str:
    import zipfile

    from moeplace.formats._npy import guarded

    with guarded(path), zipfile.ZipFile(Path(path)) as file:
        pickled = any(name.endswith("data.pkl") for name in file.namelist())
    if pickled:
        return "sglang"
    with npz(path) as archive:
        if len(archive.names) > 1 or archive.names[0] in binary.KNOWN:
            return "npz"
        with archive.open(archive.names[0]) as array:
            return _trace_or(path, trace.looks(array), "npz")


def _trace_or(path: PathLike, looks: bool | None, other: str) -> str:
    if looks is None:
        raise FormatError(
            f"{path}: whole numbers on three axes, which could be trace [tokens, layers, k] or "
            f"{other} [windows, layers, experts]: the format cannot be told. Name it (format=)."
        )
    return "trace" if looks else other
