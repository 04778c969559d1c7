"""The folder in which decisions are recorded, and reading it.

::

    FOLDER/moeplace-observe.json               {"format": "moeplace-observe", "version": 1}
    FOLDER/58x256-288-32/00000001.npz          one decision, numbered from 1 on

A subfolder for each model: layers x experts - slots - ranks. A decision is a NumPy archive of
``weight`` [layers, experts] float64 (what the engine counted), ``old`` and ``proposed``
[layers, slots] int32 (-1 for none; ``old`` is empty [0, 0] if there was none), ``before``,
``after`` and ``bound`` [layers] float64 (makespans: tokens over relative speed), ``copies``
[layers] int64, ``speeds`` [ranks] float64 and ``about``, a JSON text with the fields ``time``,
``engine``, ``mode``, ``verdict``, ``saving`` (share of the step time), ``phase``, ``reason`` and
``moeplace`` (version). Files are written whole or not at all; the oldest go when all are larger
than the limit. Later versions of the layout add arrays and fields, or change the number.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace._files import PathLike, read_json, reading, write_json
from moeplace.errors import FormatError
from moeplace.formats._npy import npz, write_npz

FORMAT, VERSION, HEADER = "moeplace-observe", 1, "moeplace-observe.json"
#: Axes of each array.
_ARRAYS = {
    "weight": 2, "old": 2, "proposed": 2, "before": 1, "after": 1, "bound": 1, "copies": 1,
    "speeds": 1, "about": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """One rebalance: see the module for shapes; `old` is None if there was none."""

    weight: FloatArray
    old: IntArray | None
    proposed: IntArray
    before: FloatArray
    after: FloatArray
    bound: FloatArray
    copies: IntArray
    speeds: FloatArray
    about: dict[str, Any]

    @property
    def kind(self) -> str:
        """Name of the subfolder."""
        layers, experts = self.weight.shape
        return f"{layers}x{experts}-{self.proposed.shape[1]}-{self.speeds.size}"


class Recorder:
    """Writes decisions to a folder of bounded size."""

    def __init__(self, folder: PathLike, most_bytes: int) -> None:
        self.folder, self.most_bytes = Path(folder), most_bytes

    def write(self, decision: Decision) -> Path:
        """Write one decision; the oldest are removed while all are larger than the limit.

        Raises
        ------
        FormatError
            If the folder cannot be written, or is not one of these.
        """
        place = self.folder / decision.kind
        header = self.folder / HEADER
        if header.exists():
            check_header(self.folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise FormatError(
                f"{place}: cannot be made ({cause.strerror}). Choose another."
            ) from cause
        if not header.exists():
            write_json(header, {"format": FORMAT, "version": VERSION})
        taken = [int(path.stem) for path in place.glob("*.npz") if path.stem.isdigit()]
        path = place / f"{max(taken, default=0) + 1:08d}.npz"
        about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **decision.about}
        old = np.empty((0, 0)) if decision.old is None else decision.old
        write_npz(
            path,
            {
                "weight": decision.weight,
                "old": old.astype(np.int32),
                "proposed": decision.proposed.astype(np.int32),
                "before": decision.before,
                "after": decision.after,
                "bound": np.asarray(decision.bound),
                "copies": decision.copies,
                "speeds": decision.speeds,
                "about": np.array(json.dumps(about)),
            },
        )
        self._trim(keep=path)
        return path

    def _trim(self, keep: Path) -> None:
        sizes = []
        for path in self.folder.glob("*/*.npz"):
            try:
                found = path.stat()
            except FileNotFoundError:  # another engine trims too
                continue
            sizes.append((found.st_mtime_ns, path, found.st_size))
        total = sum(size for _, _, size in sizes)
        for _, path, size in sorted(sizes):
            if total <= self.most_bytes or path == keep:
                break
            path.unlink(missing_ok=True)
            total -= size


def check_header(folder: PathLike) -> None:
    """Raise FormatError unless the folder is of this layout and version."""
    found: Any = read_json(Path(folder) / HEADER, dict[str, Any])
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise FormatError(
            f"{Path(folder) / HEADER}: is {found.get('format')!r}, version "
            f"{found.get('version')!r}, but {FORMAT!r}, version {VERSION} is read. Use the "
            "moeplace that wrote it, or another folder."
        )


def is_observed(path: PathLike) -> bool:
    """Whether a folder holds recorded decisions, or is one model's part of such."""
    folder = Path(path)
    with reading(path):
        return (folder / HEADER).exists() or (folder.parent / HEADER).exists()


def model_folder(path: PathLike) -> Path:
    """The subfolder of the one model whose decisions a folder holds, or the folder itself.

    Raises
    ------
    FormatError
        If it holds none, several models', or is of another layout.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FormatError(f"{path}: is no folder: name the one that MOEPLACE_FOLDER named.")
    if (folder / HEADER).exists():
        check_header(folder)
        kinds = sorted({file.parent for file in folder.glob("*/*.npz")})
        if len(kinds) > 1:
            names = ", ".join(kind.name for kind in kinds)
            raise FormatError(
                f"{path}: holds decisions on several models (layers x experts - slots - ranks: "
                f"{names}). Name one of these folders in it."
            )
        if kinds:
            return kinds[0]
    elif (folder.parent / HEADER).exists():
        check_header(folder.parent)
        if any(folder.glob("*.npz")):
            return folder
    raise FormatError(
        f"{path}: holds no recorded decisions. Run the engine with MOEPLACE_POLICY=observe until "
        "it has rebalanced once."
    )


def read_decisions(path: PathLike) -> Iterator[Decision]:
    """Decisions of one model's folder, oldest first.

    Raises
    ------
    FormatError
        If the folder or a file in it is not of this layout.
    """
    for file in sorted(model_folder(path).glob("*.npz")):
        with npz(file) as archive:
            found = {name: archive.array(name) for name in _ARRAYS}
        for name, axes in _ARRAYS.items():
            kinds = "iuf" if axes else "U"
            if found[name].ndim != axes or found[name].dtype.kind not in kinds:
                raise FormatError(
                    f"{file}: {name} is {found[name].dtype} of shape {found[name].shape}, expected "
                    f"{axes} axes of numbers (0 axes: text). Remove that file."
                )
        try:
            about = json.loads(str(found.pop("about")))
        except ValueError as cause:
            raise FormatError(f"{file}: about is not JSON. Remove that file.") from cause
        if not isinstance(about, dict):
            raise FormatError(f"{file}: about is not a JSON object. Remove that file.")
        old = found.pop("old").astype(np.int64)
        yield Decision(
            old=None if old.size == 0 else old,
            proposed=found.pop("proposed").astype(np.int64),
            about=about,
            **found,
        )
