"""Files of torch.save, without running what is in them; torch is imported when needed."""

import io
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._files import PathLike, write_bytes
from moeplace.errors import FormatError, MissingExtraError
from moeplace.formats._npy import MAX_ENTRIES, guarded

#: The most bytes that a file's tensors may have together, what binds them, and a key or name.
MAX_BYTES, MAX_PICKLE, MAX_TEXT = 4 << 30, 64 << 20, 1000
#: Pickle's ways to name a callable, and the names that dense tensors use.
_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_STORAGES = "Float Double Half BFloat16 Byte Char Short Int Long Bool ComplexFloat ComplexDouble"
_TENSORS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _STORAGES.split()),
    "torch.storage UntypedStorage",
}


def _torch() -> Any:
    try:
        import torch
    except ImportError as cause:
        raise MissingExtraError(
            "Files of torch.save (.pt) need torch, which is not installed: "
            "pip install 'moeplace[torch]'."
        ) from cause
    return torch


def load(path: PathLike) -> Any:
    """What a ``.pt`` file holds: plain containers, numbers and tensors.

    Raises
    ------
    FormatError
        If it is broken, or holds a pickle that would run code.
    MissingExtraError
        If torch is not installed.
    """
    with guarded(path):
        if not zipfile.is_zipfile(Path(path)):
            raise FormatError(
                f"{path}: is not a zip file, as torch.save writes since torch 1.6. Save it again "
                "with a current torch, or convert it to .npz."
            )
        with zipfile.ZipFile(Path(path)) as file:
            members = file.infolist()
            size = sum(info.file_size for info in members)
            packed = any(info.compress_type != zipfile.ZIP_STORED for info in members)
            if packed or size > MAX_BYTES:
                raise FormatError(
                    f"{path}: holds {size:,} bytes{' compressed' if packed else ''}: torch.save "
                    f"does not compress, and {MAX_BYTES:,} are the limit. Save it again, or in "
                    "parts."
                )
            for info in members:
                if info.filename.lower().endswith("data.pkl"):
                    with file.open(info) as stream:
                        _check_pickle(path, stream.read())
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(Path(path), map_location="cpu", weights_only=True)
    except MemoryError:
        raise FormatError(
            f"{path}: claims more memory than there is. Check that it is the right file."
        ) from None
    except Exception as cause:  # torch raises whatever its parts do
        raise FormatError(
            f"{path}: torch cannot load it ({type(cause).__name__}). Write or copy it again."
        ) from cause


def _check_pickle(path: PathLike, data: bytes) -> None:
    """Refuse what plain tensors do not need, before torch reads it.

    `weights_only` would refuse code as well; but what torch then says of a long name takes it
    minutes to put together.
    """
    if len(data) > MAX_PICKLE:
        raise FormatError(
            f"{path}: binds its tensors with {len(data):,} bytes: the limit is {MAX_PICKLE:,}. "
            "Dump more often."
        )
    try:
        for operation, value, _ in pickletools.genops(data):
            if operation.name in _CALLS and value not in _TENSORS:
                raise FormatError(
                    f"{path}: holds more than tensors and plain values ({str(value)[:60]!r}): "
                    "loading it could run code, so it is refused. Save plain tensors with "
                    "torch.save."
                )
            if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
                raise FormatError(
                    f"{path}: holds a text of {len(value):,} characters: keys and names are at "
                    f"most {MAX_TEXT}. Check that it is the right file."
                )
    except FormatError:
        raise
    except (ValueError, IndexError, struct.error) as cause:
        raise FormatError(f"{path}: holds a broken pickle. Write or copy it again.") from cause


def array(path: PathLike, value: Any, place: str, axes: tuple[str, ...]) -> npt.NDArray[Any]:
    """A tensor of whole or floating numbers as a NumPy array."""
    torch = _torch()
    form = f"a tensor [{', '.join(axes)}]"
    if not isinstance(value, torch.Tensor):
        raise FormatError(f"{path}: {place} is {type(value).__name__}, expected {form}. Mend it.")
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        raise FormatError(f"{path}: {place} is sparse, quantised or complex, expected {form}.")
    if value.device.type != "cpu":
        raise FormatError(f"{path}: {place} has no data (device {value.device}), expected {form}.")
    if value.dim() != len(axes) or value.numel() > MAX_ENTRIES:
        raise FormatError(
            f"{path}: {place} has the shape {tuple(value.shape)}, expected {form} of at most "
            f"{MAX_ENTRIES:,} entries. Check what was recorded."
        )
    try:
        if value.is_floating_point():
            value = value.to(torch.float64)
        return np.array(value.detach().numpy())
    except (RuntimeError, TypeError) as cause:
        raise FormatError(
            f"{path}: {place} cannot be used as {form} ({str(cause).splitlines()[0]})."
        ) from cause


def save(path: PathLike, values: dict[str, npt.NDArray[np.int64]]) -> None:
    """Write tensors with torch.save, whole or not at all."""
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(each) for name, each in values.items()}, buffer)
    write_bytes(path, buffer.getvalue())
