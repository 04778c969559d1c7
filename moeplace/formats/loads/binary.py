"""Loads as NumPy arrays [layers, experts] or [windows, layers, experts].

``.npz`` holds one array, or ``tokens`` and, if known, ``passes`` and ``phase``, as
`write` writes them.
"""

from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from moeplace._files import PathLike
from moeplace.errors import FormatError
from moeplace.formats._npy import Archive, npy, npz, write_npz
from moeplace.formats.loads._raw import Ask, Raw
from moeplace.loads import LoadHistogram, Phase

KNOWN = ("tokens", "passes", "phase")


def read_npy(path: PathLike, ask: Ask) -> Raw:
    """Read one array."""
    del ask
    with npy(path) as array:
        return Raw(array.whole())


def read_npz(path: PathLike, ask: Ask) -> Raw:
    """Read one array, or tokens with passes and phase."""
    del ask
    with npz(path) as archive:
        if archive.names == archive.names[:1] and archive.names[0] not in KNOWN[1:]:
            return Raw(archive.array(archive.names[0]))
        odd = [name for name in archive.names if name not in KNOWN]
        if odd:
            raise FormatError(
                f"{path}: holds the arrays {', '.join(archive.names[:20])}: loads have one, or "
                f"{', '.join(KNOWN)}. Save only those."
            )
        passes = archive.array("passes") if "passes" in archive.names else None
        return Raw(archive.array("tokens"), passes, _phase(archive))


def _phase(archive: Archive) -> Phase | None:
    if "phase" not in archive.names:
        return None
    found: Any = archive.array("phase")
    if found.dtype.kind != "U" or found.size != 1 or str(found.ravel()[0]) not in get_args(Phase):
        raise FormatError(
            f"{archive.path}: phase must be one of {', '.join(get_args(Phase))}. Correct it."
        )
    return cast(Phase, str(found.ravel()[0]))


def write(loads: LoadHistogram, path: PathLike) -> None:
    """Write tokens, passes (if known) and phase as ``.npz``.

    Raises
    ------
    FormatError
        If the name does not end in ``.npz``, by which readers know it, or it cannot be written.
    """
    check_npz(path)
    arrays: dict[str, Any] = {"tokens": loads.tokens, "phase": np.asarray(loads.phase)}
    if loads.passes is not None:
        arrays["passes"] = loads.passes
    write_npz(path, arrays)


def check_npz(path: PathLike) -> None:
    """Raise FormatError unless a file of loads has a name for what it is."""
    name = Path(path)
    if name.suffix.lower() != ".npz" and not name.is_char_device():
        raise FormatError(
            f"{path}: loads are written as an .npz archive: name it {name.with_suffix('.npz')}."
        )
