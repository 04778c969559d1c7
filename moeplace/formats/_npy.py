"""NumPy files from strangers: headers are checked before anything of their size is allocated.

``.npz`` is a zip of ``.npy`` members. A member is read in pieces, so that a trace may be larger
than memory; pickled objects, which could run code, are refused.
"""

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplace._files import PathLike, reading, write_bytes
from moeplace.errors import FormatError

#: The most numbers that an array read as a whole may have (256 MiB as float64), e.g. 2,000
#: windows of 58 layers x 256 experts; and the most layers that a model may have.
MAX_ENTRIES, MAX_LAYERS = 1 << 25, 1 << 12
#: Bytes read at a time.
CHUNK = 1 << 22
MAGIC = b"\x93NUMPY"
_HEADER = 10_000
_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error)


class Array:
    """An open array: its header, and its entries still to be read."""

    def __init__(
        self, path: PathLike, name: str, stream: IO[bytes], size: int, packing: float = 1.0
    ) -> None:
        self.path, self.name = path, name
        self.place = f"{path}: " + (f"{name} " if name else "")
        self._stream = stream
        #: Bytes of the array for each byte of the file.
        self.packing = packing
        self.shape, self.fortran, self.dtype = self._header()
        self.entries = math.prod(self.shape)
        held = size - self._start
        if self.entries * self.dtype.itemsize != held:
            raise FormatError(
                f"{self.place}has {max(held, 0):,} bytes of entries, but its header, {self.dtype} "
                f"of shape {self.shape}, needs {self.entries * self.dtype.itemsize:,}: it is cut "
                "off or not whole. Write or copy it again."
            )

    def _header(self) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        head = self._stream.read(len(MAGIC) + 2)
        if head[:-2] != MAGIC:
            raise FormatError(
                f"{self.place}does not begin as a NumPy array does. Save it with numpy.save."
            )
        version = (head[-2], head[-1])
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        width = self._stream.read(2 if version == (1, 0) else 4)
        length = int.from_bytes(width, "little")
        if version not in readers or length > _HEADER:
            raise FormatError(
                f"{self.place}has a header of version {version} and {length:,} bytes: known are "
                f"versions 1 and 2 with at most {_HEADER:,} bytes. Save it with numpy.save."
            )
        self._start = len(head) + len(width) + length
        text = io.BytesIO(width + self._stream.read(length))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shape, fortran, dtype = readers[version](text)
        except Exception as cause:  # NumPy evaluates the header as Python: whatever that raises
            raise FormatError(
                f"{self.place}has a broken header ({type(cause).__name__}). Save it with "
                "numpy.save."
            ) from cause
        if dtype.kind not in "iufU":
            raise FormatError(
                f"{self.place}has entries of type {dtype}, expected numbers (pickled objects are "
                "never loaded: they could run code). Convert it to integers or floats."
            )
        if any(length < 0 for length in shape):
            raise FormatError(f"{self.place}has the shape {shape}: no axis may be negative.")
        return tuple(shape), bool(fortran), dtype

    def whole(self) -> npt.NDArray[Any]:
        """All entries."""
        if self.entries * max(1, self.dtype.itemsize // 8) > MAX_ENTRIES:
            raise FormatError(
                f"{self.place}has {self.entries:,} entries (shape {self.shape}): an array read as "
                f"a whole may have {MAX_ENTRIES:,}. Sum its windows, or read a trace as such."
            )
        data = self._exactly(self.entries * self.dtype.itemsize)
        order: Any = "F" if self.fortran else "C"
        return np.frombuffer(data, self.dtype).reshape(self.shape, order=order)

    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """The array in pieces along its first axis, in order."""
        if self.fortran and len(self.shape) > 1:
            raise FormatError(
                f"{self.place}is in Fortran order, which cannot be read in pieces. Save "
                "numpy.ascontiguousarray of it."
            )
        width = math.prod(self.shape[1:])
        step = max(1, CHUNK // max(1, width * self.dtype.itemsize))
        if width * self.dtype.itemsize > 64 * CHUNK:
            raise FormatError(
                f"{self.place}has rows of {width:,} entries (shape {self.shape}), too many to read "
                "in pieces. Check the order of its axes."
            )
        for start in range(0, self.shape[0], step):
            count = min(step, self.shape[0] - start)
            data = self._exactly(count * width * self.dtype.itemsize)
            yield np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size > 0:
            part = self._stream.read(min(size, CHUNK))
            if not part:
                raise FormatError(f"{self.place}is cut off. Write or copy it again.")
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def guarded(path: PathLike) -> Iterator[None]:
    """Turn whatever a broken zip raises into a FormatError."""
    try:
        with reading(path):
            yield
    except _ZIP as cause:
        raise FormatError(
            f"{path}: is broken ({str(cause).strip() or type(cause).__name__}). Write or copy it "
            "again."
        ) from cause


@contextmanager
def npy(path: PathLike) -> Iterator[Array]:
    """Open a ``.npy`` file."""
    with guarded(path), Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        yield Array(path, "", file, size)


class Archive:
    """An open ``.npz`` file."""

    def __init__(self, path: PathLike, file: zipfile.ZipFile) -> None:
        self.path, self._file = path, file
        self._members = {
            info.filename.removesuffix(".npy"): info
            for info in file.infolist()
            if info.filename.endswith(".npy")
        }
        self.names = list(self._members)
        if not self.names:
            raise FormatError(f"{path}: holds no array (.npy). Save it with numpy.savez.")

    @contextmanager
    def open(self, name: str) -> Iterator[Array]:
        """Open the array of that name."""
        info = self._members.get(name)
        if info is None:
            raise FormatError(
                f"{self.path}: lacks the array {name!r}; it has {', '.join(self.names[:20])}. "
                "Save it under that name."
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(
                f"{self.path}: {name} is compressed in a way that NumPy does not use. Save it "
                "with numpy.savez_compressed."
            )
        with self._file.open(info) as stream:
            packing = info.file_size / max(1, info.compress_size)
            yield Array(self.path, name, stream, info.file_size, packing)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The whole array of that name."""
        with self.open(name) as found:
            return found.whole()


@contextmanager
def npz(path: PathLike) -> Iterator[Archive]:
    """Open a ``.npz`` file."""
    with guarded(path), zipfile.ZipFile(Path(path)) as file:
        yield Archive(path, file)


def write_npy(path: PathLike, array: npt.NDArray[Any]) -> None:
    """Write a ``.npy`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def write_npz(path: PathLike, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Write a compressed ``.npz`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())
