"""OR-Tools and PuLP loaded so that both work where highspy is installed, too.

``import pulp`` opens highspy's library, if there is one, with its symbols visible to whatever is
loaded later. If that is OR-Tools, its HiGHS calls functions of highspy's, another version, and
crashes (ortools 9.15, highspy 1.16, pulp 3.3: every run). Loaded before PuLP it calls its own.
"""

import ctypes
import os
import sys
from functools import cache
from typing import Any

from moeplace.errors import SolverError

#: A function of HiGHS, as compilers call it.
HIGHS = "_ZN5Highs3runEv"


@cache
def load_ortools() -> bool:
    """Load OR-Tools' libraries, with their own HiGHS whatever is visible.

    Returns
    -------
    bool
        Whether that HiGHS can be used: not if others loaded PuLP with highspy, then OR-Tools.
    """
    own = getattr(os, "RTLD_DEEPBIND", 0)  # Linux; macOS looks symbols up library by library
    before = sys.getdlopenflags() if own else 0
    visible = bool(own) and hasattr(ctypes.CDLL(None), HIGHS)
    first = next((name for name in sys.modules if name == "pulp" or _is_ortools(name)), "")
    late = any(_is_ortools(name) for name in sys.modules)
    if visible:
        sys.setdlopenflags(before | own)
    try:
        import ortools.util.python.sorted_interval_list  # noqa: F401 - the smallest that loads all
    finally:
        if visible:
            sys.setdlopenflags(before)
    return not (visible and late and first == "pulp")


def load_highs() -> None:
    """Load OR-Tools for its HiGHS.

    Raises
    ------
    SolverError
        If it would crash.
    """
    if not load_ortools():
        raise SolverError(
            "PuLP was imported before OR-Tools, and highspy is installed: OR-Tools' HiGHS would "
            "crash. Import ortools.sat.python.cp_model before pulp, or uninstall highspy."
        )


def load_pulp() -> Any:
    """PuLP, after OR-Tools."""
    load_ortools()
    import pulp

    return pulp


def _is_ortools(name: str) -> bool:
    """Whether a loaded module is compiled code of OR-Tools."""
    file = getattr(sys.modules[name], "__file__", None) or ""
    return name.startswith("ortools.") and file.endswith(".so")
