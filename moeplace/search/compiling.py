"""Compilation of kernels is slow and happens once after installation: say so, or refuse it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core import event

from moeplace.errors import MoeplaceError

logger = logging.getLogger("moeplace")


class KernelsMissing(MoeplaceError):  # noqa: N818 - a state, not a fault
    """A kernel would have to be compiled where that is forbidden."""


class _Notice(event.Listener):
    """One line when numba first compiles (not: loads a cache) in this process."""

    told = False
    forbidden = 0
    lock = threading.Lock()

    def on_start(self, event: Any) -> None:
        dispatcher = (event.data or {}).get("dispatcher")
        module = getattr(getattr(dispatcher, "py_func", None), "__module__", "") or ""
        ours = module.partition(".")[0] == "moeplace"
        if self.forbidden and ours:
            raise KernelsMissing(f"a kernel of {module} is not in the cache")
        if not self.told and (ours or not self.forbidden):
            logger.warning(
                "compiling kernels, once after installation; later runs load them from a cache"
            )
            self.told = True

    def on_end(self, event: object) -> None:
        """Nothing: only the start is told."""


_notice = _Notice()
event.register("numba:compile", _notice)  # type: ignore[no-untyped-call]


@contextmanager
def from_cache_only() -> Iterator[None]:
    """Raise `KernelsMissing` inside where one of our kernels is not in numba's cache.

    Other packages' kernels compile as ever. Compiling takes a processor for up to a minute: an
    engine that serves has none to spare.
    """
    with _notice.lock:
        _notice.forbidden += 1
    try:
        yield
    finally:
        with _notice.lock:
            _notice.forbidden -= 1
