"""Plan files: one module for each format, here only the table of their names.

A format is a module with ``read(path) -> Plan`` and ``write(plan, path)``.
"""

from typing import Protocol

from moeplace._files import PathLike
from moeplace.errors import FormatError, PlanError
from moeplace.formats import own
from moeplace.plan import Plan


class _Format(Protocol):
    def read(self, path: PathLike) -> Plan: ...

    def write(self, plan: Plan, path: PathLike) -> None: ...


_FORMATS: dict[str, _Format] = {"moeplace": own}


def read_plan(path: PathLike, format: str = "moeplace") -> Plan:  # noqa: A002 - reads as it is said
    """Read a plan from a file.

    Parameters
    ----------
    path : path
    format : {"moeplace"}

    Raises
    ------
    FormatError
        If the format is unknown, or the file cannot be read or is not of that format.
    PlanError
        If the file is sound but its plan breaks a rule, e.g. misses an expert.
    """
    return _format(format).read(path)


def write_plan(plan: Plan, path: PathLike, format: str = "moeplace") -> None:  # noqa: A002
    """Write a plan to a file, whole or not at all.

    Parameters
    ----------
    plan : Plan
    path : path
        Its folder must exist; a file that is there is replaced.
    format : {"moeplace"}

    Raises
    ------
    FormatError
        If the format is unknown or the file cannot be written.
    PlanError
        If `plan` is not a Plan, or the format cannot hold it.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"Only a Plan can be written, got {type(plan).__name__}: pass its plan.")
    _format(format).write(plan, path)


def _format(name: str) -> _Format:
    if name not in _FORMATS:
        raise FormatError(
            f"Plan format {name!r} is unknown: choose one of {', '.join(sorted(_FORMATS))}."
        )
    return _FORMATS[name]
