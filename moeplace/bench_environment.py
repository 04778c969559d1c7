"""What a table of runs depends on besides its settings: versions, source, instances, machine."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moeplace.bench_case import real_instances
from moeplace.bench_run import SHAPES


def environment(sets: Sequence[str], instances: Path) -> dict[str, Any]:
    """What results depend on besides the settings; sets say whether shipped instances count."""
    package = Path(__file__).parent
    files = real_instances(instances) if set(sets) - set(SHAPES) else []
    versions = {
        name: importlib.metadata.version(name)
        for name in ("moeplace", "numpy", "scipy", "numba", "ortools", "joblib")
    }
    return {
        **versions,
        "source": _hash(sorted(package.rglob("*.py"))),
        "commit": _commit(package),
        "instances": _hash(files) if files else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads_of_a_run": 1,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _hash(paths: Sequence[Path]) -> str:
    state = hashlib.sha256()
    for path in paths:
        state.update(path.read_bytes())
    return state.hexdigest()[:16]


def _commit(package: Path) -> str | None:
    """The commit of a checkout, "+" where files differ from it; None without one."""
    if not (package.parent / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(package), "describe", "--always", "--abbrev=12", "--dirty=+",
             "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
