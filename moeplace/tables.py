"""Tables in text of at most 80 columns, with bars where there is room for them."""

import sys
import textwrap
from collections.abc import Sequence

WIDTH = 80
#: What a bar needs at least to be worth its room, and what it takes at most.
SHORTEST, LONGEST = 4, 20
_EIGHTHS = " ▏▎▍▌▋▊▉"


def table(
    rows: Sequence[Sequence[str]],
    *,
    bars: Sequence[float | None] | None = None,
    notes: Sequence[str] | None = None,
) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right.

    A table that is too wide is folded: further columns follow below, under the first one again.

    Parameters
    ----------
    rows : sequence of rows of text
        The first holds the headings.
    bars : sequence of numbers, optional
        Length of each row's bar, headings aside, from 0 to 1; left out where there is no room.
    notes : sequence of text, optional
        What is said of each row, headings aside: beside the row if it fits there, else below.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for block in _blocks(widths):
        lines += [""] * bool(lines)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in block)]
            lines.append("  ".join(cells))
    whole = len(lines) == len(rows)
    if bars is not None and whole:
        room = min(WIDTH - 2 - len(lines[0]), LONGEST)
        if room >= SHORTEST:
            drawn = ["", *("" if share is None else bar(share, room) for share in bars)]
            lines = [f"{line}  {more}" for line, more in zip(lines, drawn, strict=True)]
    if notes is not None and whole:
        lines = lines[:1] + [
            line
            for row, note in zip(lines[1:], notes, strict=True)
            for line in _noted(row, note)
        ]  # fmt: skip
    return [line.rstrip() for line in lines]


def bar(share: float, width: int) -> str:
    """A bar of `share` of the width, in eighths of a character; in # where those do not print."""
    share = min(max(share, 0.0), 1.0)
    if not (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf"):
        return "#" * round(share * width)
    whole, part = divmod(round(share * width * 8), 8)
    return "█" * whole + (_EIGHTHS[part] if part else "")


def _blocks(widths: Sequence[int]) -> list[list[int]]:
    """Columns after the first, in groups that fit beside it."""
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for n, width in enumerate(widths[1:], 1):
        if blocks[-1] and used + 2 + width > WIDTH:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(n)
        used += 2 + width
    return blocks


def _noted(row: str, note: str) -> list[str]:
    if len(row) + 2 + len(note) <= WIDTH:
        return [f"{row}  {note}"]
    return [row, *textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")]
