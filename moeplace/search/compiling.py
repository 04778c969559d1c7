"""Compilation of kernels is slow and happens once after installation: say so."""

import logging

from numba.core import event

logger = logging.getLogger("moeplace")


class _Notice(event.Listener):
    """One line when numba first compiles (not: loads a cache) in this process."""

    told = False

    def on_start(self, event: object) -> None:
        if not self.told:
            logger.warning(
                "compiling kernels, once after installation; later runs load them from a cache"
            )
            self.told = True

    def on_end(self, event: object) -> None:
        """Nothing: only the start is told."""


event.register("numba:compile", _Notice())  # type: ignore[no-untyped-call]
