"""What the ranks run, and on what: validated once, before any process starts."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from moeplace.errors import MissingExtraError, MoeplaceError, ProblemError, ReplayError

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]

_BYTES = {"float32": 4, "bfloat16": 2}
#: Strides of a grouped product must be multiples of 16 bytes: 8 numbers of bfloat16.
_ALIGNED = 8


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Ranks, their devices and the experts that they run.

    Parameters
    ----------
    ranks : int
        Processes that take part, one for each EP rank.
    emulate : tuple of float
        Relative slowness of each rank, from 1: how often it repeats its expert GEMMs (a
        fraction repeats a prefix of the rows). CPU only; empty for none.
    hidden, intermediate : int
        Sizes of an expert's SwiGLU; multiples of 8. `intermediate` is twice `hidden` unless given.
    device : {"auto", "cpu", "cuda"}
        "auto" takes GPUs where torch sees one for each rank of this machine.
    dtype : {"auto", "float32", "bfloat16"}
        "auto": float32 on CPU, bfloat16 on GPUs.
    kernel : str
        "auto", "grouped", "loop", or ``module:function`` (see `kernels`).
    seed : int
        Of weights, activations, drawn routing and random order.
    timeout : float
        Seconds after which the whole run is ended with an error.
    port : int
        TCP port on which local ranks meet; 0 meets in a file, so that no port is needed.

    Raises
    ------
    ProblemError
        If a value is out of range.
    """

    ranks: int
    emulate: tuple[float, ...] = ()
    hidden: int = 256
    intermediate: int = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    kernel: str = "auto"
    seed: int = 0
    timeout: float = 600.0
    port: int = 0

    def __post_init__(self) -> None:
        at_least("Ranks", self.ranks, 1)
        if self.intermediate == 0:
            object.__setattr__(self, "intermediate", 2 * self.hidden)
        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            at_least(name.capitalize(), size, _ALIGNED)
            if size % _ALIGNED:
                raise ProblemError(
                    f"{name.capitalize()} must be a multiple of {_ALIGNED}, as grouped products "
                    f"need rows of whole 16 bytes: got {size}. Take {size - size % _ALIGNED}."
                )
        if self.emulate and len(self.emulate) != self.ranks:
            raise ProblemError(
                f"Emulation needs one factor for each of the {self.ranks} ranks, got "
                f"{len(self.emulate)}. Give as many as --ranks."
            )
        for rank, factor in enumerate(self.emulate):
            if not 1 <= factor <= 64:
                raise ProblemError(
                    f"Emulated slowness must be from 1 to 64 (1 is a rank as it is): got "
                    f"{factor:g} for rank {rank}. Scale all factors so that the fastest has 1."
                )
        for name, choices in (("device", Device), ("dtype", Dtype)):
            if getattr(self, name) not in get_args(choices):
                raise ProblemError(
                    f"{name.capitalize()} must be one of {', '.join(get_args(choices))}, got "
                    f"{getattr(self, name)!r}."
                )
        if self.kernel not in ("auto", "grouped", "loop") and ":" not in self.kernel:
            raise ProblemError(
                f"Kernel must be auto, grouped, loop or module:function, got {self.kernel!r}."
            )
        at_least("Seed", self.seed, 0)
        if not 0 < self.timeout < float("inf"):
            raise ProblemError(f"Timeout must be a positive number of seconds, got {self.timeout}.")
        if not 0 <= self.port < 1 << 16:
            raise ProblemError(f"Port must be from 0 (none needed) to 65535, got {self.port}.")

    def factor(self, rank: int) -> float:
        """Emulated slowness of a rank."""
        return self.emulate[rank] if self.emulate else 1.0

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one expert's weights: two projections up, one down."""
        return 3 * self.hidden * self.intermediate * _BYTES[dtype]

    def row_bytes(self, dtype: str) -> int:
        """Bytes that one token assignment needs on its way: sent, received and inside an expert."""
        return (6 * self.hidden + 4 * self.intermediate) * _BYTES[dtype]


def at_least(name: str, value: int, least: int) -> None:
    """Raise ProblemError unless `value` is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProblemError(f"{name} must be a whole number from {least}, got {value!r}.")


class EchoError(ReplayError):
    """An error that rank 0 raises too: this rank need not say it again."""


class EchoProblemError(EchoError, ProblemError):
    """The same where the input is at fault."""


def said_by_all(message: str, *, bad_input: bool = False) -> MoeplaceError:
    """An error that every rank of a job raises: one that only rank 0 needs to say."""
    if os.environ.get("RANK", "0") == "0":
        return ProblemError(message) if bad_input else ReplayError(message)
    return EchoProblemError(message) if bad_input else EchoError(message)


def require_torch() -> None:
    """Raise MissingExtraError, with the remedy, unless torch is installed (not importing it)."""
    if find_spec("torch") is None:
        raise MissingExtraError(
            "Replay and calibration run on torch, which is not installed: install it with "
            "pip install 'moeplace[replay]', or install the build for your GPUs first."
        )


def under_launcher() -> bool:
    """Whether this process is one rank of a job that torchrun (or the like) started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes of memory free on this machine, within the limit of its control group; or None."""
    free = []
    try:
        text = Path("/proc/meminfo").read_text()
        free = [int(line.split()[1]) * 1024 for line in text.splitlines() if "MemAvail" in line]
    except (OSError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        pass
    return min(free) if free else None


def check_memory(needed: int, free: int | None, where: str, remedy: str) -> None:
    """Raise ReplayError if the estimate is above nine tenths of what is free."""
    if free is not None and needed > 0.9 * free:
        raise ReplayError(
            f"{where} would need about {_size(needed)} but has {_size(free)} free: nothing was "
            f"allocated. {remedy}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
