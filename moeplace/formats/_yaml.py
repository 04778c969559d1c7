"""YAML of plain maps, lists and scalars, read event by event.

Aliases (with which a small file stands for a huge one), tags and deep nesting are refused, and so
is a key that stands twice, of which others silently take the last.
"""

import re
from typing import Any

from moeplace._files import PathLike, read_bytes
from moeplace.errors import FormatError

#: A placement of 94 layers x 2,048 slots has a little more than one MiB.
MAX_DEPTH, MAX_BYTES = 8, 8 << 20
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})")


def load(path: PathLike) -> Any:
    """Maps, lists, ints, and strings (whatever else a scalar may mean).

    Raises
    ------
    FormatError
        If it is not YAML, or not of that kind.
    """
    import yaml

    data = read_bytes(path, "YAML", MAX_BYTES)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _build(path, yaml.parse(data, Loader=loader), yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as cause:
        if isinstance(cause, FormatError):
            raise
        mark = getattr(cause, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(cause, "problem", None) or type(cause).__name__
        raise FormatError(f"{path}: is not YAML{place} ({problem}). Correct it there.") from cause


def _build(path: PathLike, events: Any, yaml: Any) -> Any:
    documents: list[Any] = []
    stack: list[Any] = []  # open maps and lists
    keys: list[Any] = []  # for each open map, the key that waits for its value
    waits = object()

    def add(value: Any, line: int, scalar: bool) -> None:
        if not stack:
            documents.append(value)
        elif isinstance(stack[-1], list):
            stack[-1].append(value)
        elif keys[-1] is not waits:
            stack[-1][keys[-1]] = value
            keys[-1] = waits
        elif not scalar:
            raise FormatError(f"{path}: line {line}: a key must be a number or text. Correct it.")
        elif value in stack[-1]:
            raise FormatError(
                f"{path}: line {line}: the key {str(value)[:40]!r} stands twice. Remove one."
            )
        else:
            keys[-1] = value

    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise FormatError(
                f"{path}: line {line}: anchors and aliases are not read. Write the values out."
            )
        if getattr(event, "tag", None):
            raise FormatError(f"{path}: line {line}: tags are not read. Remove the tag.")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0] and _WHOLE.fullmatch(event.value)
            add(int(event.value) if plain else event.value, line, True)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            if len(stack) >= MAX_DEPTH:
                raise FormatError(
                    f"{path}: line {line}: is nested more than {MAX_DEPTH} deep. Check that it is "
                    "the right file."
                )
            value: Any = {} if isinstance(event, yaml.MappingStartEvent) else []
            add(value, line, False)
            stack.append(value)
            if isinstance(value, dict):
                keys.append(waits)
        elif isinstance(event, yaml.SequenceEndEvent):
            stack.pop()
        elif isinstance(event, yaml.MappingEndEvent):
            stack.pop()
            keys.pop()
    if len(documents) != 1:
        raise FormatError(f"{path}: has {len(documents)} documents, expected one. Keep one.")
    return documents[0]
