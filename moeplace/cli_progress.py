"""What a command shows on stderr while it works, if that is a terminal: after a second, in a line.

Everything disappears when the work is done. Colours follow NO_COLOR, as rich does.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from moeplace.compare import amount, percent
from moeplace.result import Progress

#: Seconds of work before anything is shown.
PATIENCE = 1.0


@contextmanager
def searching(quiet: bool = False, unit: str = "") -> Iterator[Callable[[Progress], None] | None]:
    """A callback for `solve` that shows layers done, best step time, bound and gap.

    Parameters
    ----------
    quiet : bool
        Show nothing.
    unit : str
        Of the times.
    """
    if quiet or not _terminal():
        yield None
        return
    bar = _bar(TextColumn("{task.description}"))
    task = bar.add_task("", total=1)

    def draw(now: Progress) -> None:
        if now.seconds > PATIENCE:
            done = now.layers_done
            bar.update(task, completed=done, total=now.layers, description=line(now, unit))
            bar.start()

    try:
        yield draw
    finally:
        bar.stop()


def line(now: Progress, unit: str = "") -> str:
    """A search's progress in at most 62 characters."""
    where = f"{now.layers_done}/{now.layers} layers"
    if now.layer is not None:
        where = f"layer {now.layer}, {where}"
    price = amount(now.objective, unit, like=now.objective)
    least = amount(now.lower_bound, unit, like=now.objective)
    return f"{where}: {price}, bound {least}, gap {percent(now.gap)}"


@contextmanager
def reading(quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A callback for readers that shows how much of a file is read."""
    if quiet or not _terminal():
        yield None
        return
    bar = _bar(TextColumn("reading {task.percentage:>3.0f} %"))
    task = bar.add_task("", total=1)
    began = time.perf_counter()

    def draw(done: int, total: int) -> None:
        if time.perf_counter() - began > PATIENCE:
            bar.update(task, completed=done, total=total)
            bar.start()

    try:
        yield draw
    finally:
        bar.stop()


def _terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _bar(*columns: TextColumn) -> Bar:
    return Bar(
        BarColumn(bar_width=8),
        *columns,
        TimeElapsedColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
