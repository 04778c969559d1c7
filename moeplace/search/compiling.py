"""Loading and compiling of kernels: say so once, and do not count it against a time limit."""

import functools
import logging
import time

from numba import njit
from numba.core import event

logger = logging.getLogger("moeplace")


class _Clock(event.Listener):
    """Sums the wall time that numba spends compiling in this process (not loading a cache)."""

    def __init__(self) -> None:
        self.total = 0.0
        self.depth = 0
        self.began = 0.0
        self.told = False

    def on_start(self, event: object) -> None:
        if self.depth == 0:
            self.began = time.perf_counter()
            if not self.told:
                logger.warning(
                    "compiling kernels, once after installation; later runs load them from a cache"
                )
                self.told = True
        self.depth += 1

    def on_end(self, event: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.total += time.perf_counter() - self.began


_clock = _Clock()
event.register("numba:compile", _clock)  # type: ignore[no-untyped-call]


@njit(cache=True)
def _touch():  # type: ignore[no-untyped-def]
    return 0


@functools.cache
def load() -> None:
    """Call a first kernel: numba loads most of itself only then, a third of a second."""
    _touch()


def compile_seconds() -> float:
    """Seconds spent compiling so far in this process."""
    return _clock.total
