"""What a user sets, by environment variables: an engine passes those to all its processes.

===========================  =======================================================================
`MOEPLACE_POLICY`            ``on``, ``observe`` (record, move nothing) or ``off``; ``on`` if only a
                             profile is named
`MOEPLACE_PROFILE`           profile file of `moeplace calibrate`, keyed by GPU
`MOEPLACE_PHASE`             ``prefill``, ``decode`` or ``mixed``: which of its times count
`MOEPLACE_DEVICE`            key of this rank's device, where it cannot be asked for (NPUs)
`MOEPLACE_FOLDER`            where decisions are recorded; ``moeplace-observe`` when observing
`MOEPLACE_FOLDER_MB`         size at which its oldest records go (256)
`MOEPLACE_GAP`               how near to the bound a layer is planned (0.01)
`MOEPLACE_MIN_SAVING`        a layer moves only if its time falls by this share (0.01)
`MOEPLACE_MOVE_COST`         and by this share for each copy that it receives (0.0001)
`MOEPLACE_MAX_MOVES`         most copies that a layer may receive at a time (no limit)
===========================  =======================================================================

With both `MOEPLACE_MIN_SAVING` and `MOEPLACE_MOVE_COST` 0, moves cost nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from moeplace.errors import ProblemError
from moeplace.loads import Phase

Mode = Literal["on", "observe", "off"]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to plan and when moving pays.

    Attributes
    ----------
    gap : float
        A layer is left where its makespan is within (1 + gap) of its bound.
    min_saving : float
        Least fall of a layer's makespan, as a share of it, for which it moves.
    move_cost : float
        The same, for each copy received.
    max_moves : int, optional
        Most copies that a layer may receive.
    work : int
        Search steps for each layer.
    """

    gap: float = 0.01
    min_saving: float = 0.01
    move_cost: float = 1e-4
    max_moves: int | None = None
    work: int = 30_000

    @property
    def free(self) -> bool:
        """Whether moves cost nothing."""
        return self.min_saving == 0 and self.move_cost == 0 and self.max_moves is None


#: For the best plan, whatever it moves.
UNRESTRICTED = Effort(gap=1e-3, min_saving=0.0, move_cost=0.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of the above."""

    mode: Mode = "on"
    profile: str | None = None
    phase: Phase | None = None
    device: str | None = None
    folder: str | None = None
    folder_bytes: int = 256 << 20
    effort: Effort = Effort()


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user asks for moeplace in this engine at all."""
    named = environment.get("MOEPLACE_POLICY", ""), environment.get("MOEPLACE_PROFILE", "")
    return any(named) and named[0] != "off"


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the environment.

    Raises
    ------
    ProblemError
        If a variable has a value that it cannot have.
    """
    mode = _choice(environment, "MOEPLACE_POLICY", get_args(Mode)) or "on"
    folder = environment.get("MOEPLACE_FOLDER") or None
    if folder is None and mode == "observe":
        folder = "moeplace-observe"
    most = _number(environment, "MOEPLACE_MAX_MOVES", -1.0)
    plain = Effort()
    return Settings(
        mode=cast(Mode, mode),
        profile=environment.get("MOEPLACE_PROFILE") or None,
        phase=cast(Phase | None, _choice(environment, "MOEPLACE_PHASE", get_args(Phase))),
        device=environment.get("MOEPLACE_DEVICE") or None,
        folder=folder,
        folder_bytes=int(_number(environment, "MOEPLACE_FOLDER_MB", 256.0) * (1 << 20)),
        effort=Effort(
            gap=_number(environment, "MOEPLACE_GAP", plain.gap),
            min_saving=_number(environment, "MOEPLACE_MIN_SAVING", plain.min_saving),
            move_cost=_number(environment, "MOEPLACE_MOVE_COST", plain.move_cost),
            max_moves=None if most < 0 else int(most),
        ),
    )


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    value = environment.get(name) or None
    if value is not None and value not in choices:
        raise ProblemError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ProblemError(f"{name} must be a number from 0 on, got {text!r}.")
    return value
