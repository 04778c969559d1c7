"""Files: read JSON safely, write so that a failure leaves what was there.

Whatever is wrong with a file becomes a `FormatError` that names the file, the place in it
(``$.loads.tokens[0][3]``), the rule, the value and the remedy.
"""

import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import FormatError, MoeplaceError

PathLike = str | os.PathLike[str]
#: The longest file that is read as a whole, and the most values that a text may list: a thousand
#: windows of 58 layers x 256 experts. Python's lists of them take half a GiB.
MAX_BYTES, MAX_VALUES = 256 << 20, 1 << 24
#: Longer files are not read again to show the value that is wrong.
SHOWN = 16 << 20
T = TypeVar("T")

_NESTED: dict[int, Any] = {1: list[float], 2: list[list[float]], 3: list[list[list[float]]]}
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Header(msgspec.Struct):
    format: str
    version: int


def read_json(path: PathLike, kind: type[T], *, header: tuple[str, int] | None = None) -> T:
    """Read a JSON file as the msgspec type `kind`.

    Parameters
    ----------
    path : path
    kind : type
        Whatever msgspec decodes to; its rules (types, required and unknown fields) hold.
    header : (format, version), optional
        What the fields ``format`` and ``version`` must hold: checked before all others.

    Raises
    ------
    FormatError
        If the file cannot be read, is not JSON or breaks a rule of `kind`.
    """
    data = read_bytes(path)
    if header is not None:
        name, version = header
        found = _decode(path, data, _Header)
        if found.format != name:
            raise FormatError(
                f'{path}: $.format is "{found.format}", expected "{name}". Give a file of that '
                "format."
            )
        if found.version != version:
            raise FormatError(
                f"{path}: $.version is {found.version}, but versions known of {name} are: "
                f"{version}. Use the moeplace that wrote the file, or write it again with this one."
            )
    return _decode(path, data, kind)


def read_bytes(path: PathLike, expected: str = "JSON", limit: int = MAX_BYTES) -> bytes:
    """Read a text file's bytes, without a byte order mark.

    Raises
    ------
    FormatError
        As :func:`read_raw` does, or if it is blank, not UTF-8 or lists more than MAX_VALUES.
    """
    data = read_raw(path, expected, limit).removeprefix(b"\xef\xbb\xbf")
    if len(data) > MAX_VALUES and data.count(b",") > MAX_VALUES:
        raise FormatError(
            f"{path}: lists more than the {MAX_VALUES:,} values that are read from text. Write "
            "fewer windows, or binary arrays (.npy)."
        )
    if not data.strip():
        raise FormatError(
            f"{path}: is empty, expected {expected}. Write it again or check the path."
        )
    try:
        data.decode()
    except UnicodeDecodeError as cause:
        raise FormatError(
            f"{path}: is not UTF-8 text (byte 0x{data[cause.start]:02x} at offset {cause.start}), "
            f"expected {expected}. A binary file needs its own format; save text as UTF-8."
        ) from cause
    return data


def read_raw(path: PathLike, expected: str, limit: int = MAX_BYTES) -> bytes:
    """Read a file's bytes, at most `limit` of them.

    Raises
    ------
    FormatError
        If it is missing, a folder, unreadable, empty or longer than `limit`.
    """
    with reading(path), Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1 if size == 0 else size)
    if size > limit or len(data) > limit:
        raise FormatError(
            f"{path}: is longer than the {limit >> 20} MiB that a file read as a whole may have. "
            "Check that it is the right file; write fewer windows, or binary arrays."
        )
    if not data:
        raise FormatError(
            f"{path}: is empty, expected {expected}. Write it again or check the path."
        )
    return data


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turn what the operating system says on opening or reading `path` into a FormatError."""
    try:
        yield
    except MoeplaceError:
        raise
    except FileNotFoundError as cause:
        place = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
        raise FormatError(f"{_show(path)}: no such file{place}. Check the path.") from cause
    except IsADirectoryError as cause:
        raise FormatError(f"{_show(path)}: is a folder, not a file. Name a file in it.") from cause
    except PermissionError as cause:
        raise FormatError(
            f"{path}: may not be read (permission denied). Give yourself read access to it."
        ) from cause
    except (OSError, ValueError) as cause:
        raise FormatError(f"{path}: cannot be read ({_reason(cause)}). Check the path.") from cause


def nested(path: PathLike, raw: bytes, place: str, axes: tuple[int, ...]) -> Any:
    """Decode nested lists of numbers whose depth is one of `axes`, e.g. (2, 3).

    Raises
    ------
    FormatError
        If the depth is another one, an entry is not a number or a row has another length.
    """
    opening = re.match(rb"[\[\s]*", raw)
    depth = opening.group().count(b"[") if opening else 0
    if depth not in axes:
        allowed = " or ".join(map(str, axes))
        raise FormatError(
            f"{path}: {place} must be lists of numbers nested {allowed} deep, got depth {depth} "
            f"({_short(bytes(raw).decode())}). Give it one of the documented shapes."
        )
    value = _decode(path, bytes(raw), _NESTED[depth], place)
    check_full(path, value, place, depth)
    return value


def check_full(path: PathLike, rows: list[Any], place: str, axes: int) -> None:
    """Raise FormatError unless the nested lists form a full array with `axes` axes."""
    level = [(place, rows)]
    for axis in range(axes):
        first, size = level[0][0], len(level[0][1])
        for here, row in level:
            if not row:
                raise FormatError(f"{path}: {here} is empty: it needs at least one entry. Fill it.")
            if len(row) != size:
                raise FormatError(
                    f"{path}: {here} has {len(row)} entries but {first} has {size}: all rows need "
                    "the same length. Fill the shorter one."
                )
        if axis < axes - 1:
            level = [(f"{here}[{i}]", inner) for here, row in level for i, inner in enumerate(row)]


def plain(array: FloatArray | IntArray) -> Any:
    """Nested lists of an array, whole numbers as ints."""
    if (array == np.floor(array)).all():
        return array.astype(np.int64).tolist()
    return _whole(array.tolist())


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if value.is_integer() else value


def write_json(path: PathLike, value: dict[str, Any]) -> None:
    """Write builtin types as JSON, one innermost row a line, floats so that they read back exactly.

    Raises
    ------
    FormatError
        As :func:`write_bytes` does, and if a text cannot be encoded as UTF-8.
    """
    try:
        data = (_layout(value, "") + "\n").encode()
    except UnicodeEncodeError as cause:
        raise FormatError(
            f"{path}: the text {cause.object!r} cannot be written as UTF-8. Correct that name."
        ) from cause
    write_bytes(path, data)


def _layout(value: Any, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict):
        rows = [f"{_text(key)}: {_layout(entry, inner)}" for key, entry in value.items()]
        ends = "{}"
    elif isinstance(value, list) and value and isinstance(value[0], list):
        rows = [_layout(entry, inner) for entry in value]
        ends = "[]"
    else:
        return _text(value)
    return ends[0] + "\n" + ",\n".join(inner + row for row in rows) + "\n" + indent + ends[1]


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def write_text(path: PathLike, text: str) -> None:
    """Write text as UTF-8, as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary beside it, which then takes its name.

    An existing file keeps its mode, and stays as it was if anything fails. What is neither
    file nor folder (``/dev/stdout``) is written directly.

    Raises
    ------
    FormatError
        If the path is a folder, its folder is absent or not writable, or writing fails.
    """
    target = _target(path)
    try:
        if _special(target):
            target.write_bytes(data)
            return
        temporary = target.with_name(f".moeplace-{secrets.token_hex(8)}.tmp")
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        try:
            with temporary.open("xb") as file:
                if mode is not None:
                    temporary.chmod(mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as cause:
        raise FormatError(
            f"{path}: could not be written ({_reason(cause)}); what was there before is unchanged. "
            "Mend that or choose another path."
        ) from cause


def check_output(path: PathLike, inputs: Iterable[PathLike] = ()) -> None:
    """Refuse an output path that cannot work, before any work is done.

    Raises
    ------
    FormatError
        If it is a folder, lies in an absent or read-only folder, may not be written, or is one
        of the `inputs`, also by way of a link.
    """
    target = _target(path)
    if _special(target):
        return
    for given in inputs:
        if _same(target, Path(given)):
            raise FormatError(
                f"{path}: is the input {given} itself: the output must not overwrite an input. "
                "Choose another path."
            )


def check_outputs(paths: Iterable[PathLike | None], inputs: Iterable[PathLike | None] = ()) -> None:
    """`check_output` for each path that is not None; no two may be one file.

    Raises
    ------
    FormatError
        If one of them cannot work, is an input or is another output, also by way of a link.
    """
    known = [given for given in inputs if given is not None]
    checked: list[PathLike] = []
    for path in paths:
        if path is None:
            continue
        check_output(path, known)
        target = _target(path)
        for other in checked:
            if not _special(target) and _same(target, Path(other)):
                raise FormatError(
                    f"{path}: is given for two outputs ({other} is the same file), and one would "
                    "overwrite the other. Choose another path."
                )
        checked.append(path)


def _target(path: PathLike) -> Path:
    """What writing to `path` would replace, links followed; FormatError if that cannot work."""
    try:
        target = Path(os.path.realpath(path))
        folder = target.parent
        if target.is_dir():
            raise FormatError(f"{_show(path)}: is a folder, not a file. Add a file name to it.")
        if _special(target):
            return target
        if folder.exists() and not folder.is_dir():
            raise FormatError(
                f"{path}: cannot be written, as {folder} is a file, not a folder. "
                "Choose another path."
            )
        if not folder.is_dir():
            raise FormatError(
                f"{path}: cannot be written, as there is no folder {folder}. "
                f"Create it (mkdir -p {folder}) or choose another path."
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FormatError(
                f"{path}: cannot be written, as the folder {folder} is read-only. "
                "Give yourself write access to it or choose another path."
            )
        if target.exists() and not os.access(target, os.W_OK):
            raise FormatError(
                f"{path}: is a read-only file. Make it writable (chmod u+w) or choose another path."
            )
    except FormatError:
        raise
    except (OSError, ValueError) as cause:
        raise FormatError(
            f"{path}: cannot be written ({_reason(cause)}). Choose another path."
        ) from cause
    return target


def _special(target: Path) -> bool:
    return target.exists() and not target.is_file()


def _same(target: Path, given: Path) -> bool:
    try:
        if target.exists() and given.exists():
            return target.samefile(given)
        return target == Path(os.path.realpath(given))
    except (OSError, ValueError):  # no path at all: its reader says so
        return False


def _decode(path: PathLike, data: bytes, kind: type[T], root: str = "$") -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except _BROKEN as cause:
        raise FormatError(f"{path}: {_explain(cause, data, kind, root)}") from cause


def _explain(error: Exception, data: bytes, kind: Any, root: str) -> str:
    """What msgspec found, in our words: what, rule, value, place and remedy."""
    if isinstance(error, RecursionError):
        return "is nested too deeply to be one of our files. Check that it is the right file."
    message, _, place = str(error).partition(" - at `")
    place = root + place.rstrip("`").removeprefix("$")
    if not isinstance(error, msgspec.ValidationError):
        return _broken(message, data)
    inside = _kind_at(kind, place.removeprefix(root))
    name = re.search(r"`(.*)`", message)
    if "unknown field" in message and name:
        known = ", ".join(_fields(inside))
        return (
            f'{place} has the unknown field "{name[1]}". Correct its spelling or remove it; known '
            f"there: {known}."
        )
    if "missing required field" in message and name:
        return f'{place} lacks the required field "{name[1]}". Add it.'
    value = _value_at(data, place.removeprefix(root))
    if get_origin(inside) is Literal:
        allowed = ", ".join(map(repr, get_args(inside)))
        return f"{place} must be one of {allowed}, got {value}. Correct it."
    return f"{place}: {message[:1].lower()}{message[1:]}: {value}. Correct that entry."


def _broken(message: str, data: bytes) -> str:
    spot = re.search(r" \(byte (\d+)\)", message)
    if spot is None:
        return f"is not whole JSON ({message[:1].lower()}{message[1:]}). Write or copy it again."
    offset = int(spot[1])
    line = data.count(b"\n", 0, offset) + 1
    column = offset - data.rfind(b"\n", 0, offset)
    near = data[offset : offset + 20].decode(errors="replace").split("\n")[0]
    remedy = "Correct it there."
    if near.startswith(("N", "I")):
        remedy = "NaN and Infinity are not numbers in JSON: give a finite number there."
    return f"{message.replace(spot[0], '')} at line {line}, column {column}: {near!r}. {remedy}"


def _kind_at(kind: Any, place: str) -> Any:
    """The type that `kind` declares at a place such as ``.cluster.speeds[3]``."""
    for field in re.findall(r"\.(\w+)|\[", place):
        if field:
            kind = _fields(kind).get(field)
        else:
            lists = [choice for choice in _choices(kind) if get_origin(choice) is list]
            kind = get_args(lists[0])[0] if lists else None
        if NoneType in _choices(kind) and len(_choices(kind)) == 2:
            kind = next(choice for choice in _choices(kind) if choice is not NoneType)
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    """Fields and their types of a struct, or of all structs of a union, tags included."""
    fields: dict[str, Any] = {}
    tags: dict[str, list[str]] = {}
    for struct in _choices(kind):
        if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
            fields |= get_type_hints(struct)
            config = struct.__struct_config__
            if config.tag_field is not None:
                tags.setdefault(config.tag_field, []).append(str(config.tag))
    return {field: Literal[tuple(names)] for field, names in tags.items()} | fields


def _choices(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _value_at(data: bytes, place: str) -> str:
    """What the JSON text holds at a place such as ``.cluster.speeds[3]``, numbers as written."""

    def as_written(number: str) -> msgspec.Raw:
        return msgspec.Raw(number.encode())

    if len(data) > SHOWN:
        return "..."
    try:
        value = json.loads(data, parse_float=as_written, parse_int=as_written)
        for field, index in re.findall(r"\.(\w+)|\[(\d+)\]", place):
            value = value[field] if field else value[int(index)]
        return _short(_text(value))
    except (ValueError, RecursionError, LookupError, TypeError):
        return "..."


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:56] + " ..."


def _show(path: PathLike) -> str:
    return os.fspath(path) or "'' (an empty path)"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
