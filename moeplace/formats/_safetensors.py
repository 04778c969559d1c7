"""Safetensors files: names, types and shapes from the header, and small arrays of numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._files import PathLike, reading
from moeplace.errors import FormatError

#: Bytes of one number of each type; types smaller than a byte are unknown here.
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


class Tensors:
    """An open safetensors file."""

    def __init__(self, path: PathLike, handle: Any) -> None:
        self._path, self._handle = path, handle

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._handle.keys())

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape of a tensor, from the header alone."""
        tensor = self._handle.get_slice(name)
        return str(tensor.get_dtype()), tuple(tensor.get_shape())

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor of plain numbers."""
        kind, _ = self.kind(name)
        if kind not in BYTES or kind.startswith(("F8", "BF")):
            raise FormatError(
                f"{self._path}: {name} has entries of type {kind}, expected counts. Record again."
            )
        return np.asarray(self._handle.get_tensor(name))


@contextmanager
def opened(path: PathLike) -> Iterator[Tensors]:
    """Open a file; what the safetensors package says of it becomes a FormatError."""
    from safetensors import SafetensorError, safe_open

    with reading(path):
        Path(path).open("rb").close()  # says what is wrong with the path in our words
        try:
            with safe_open(path, framework="numpy") as handle:
                yield Tensors(path, handle)
        except SafetensorError as cause:
            raise FormatError(
                f"{path}: is no whole safetensors file ({cause}). Write or copy it again."
            ) from cause
