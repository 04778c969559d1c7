"""How fast each rank's device is: from a profile keyed by device, or equal."""

import logging
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import MoeplaceError
from moeplace.integrations.settings import Settings


def device_key(settings: Settings) -> str:
    """Key of this process's device, as `moeplace calibrate` writes it."""
    if settings.device:
        return settings.device
    host = socket.gethostname()
    try:
        import torch

        if torch.cuda.is_available():
            index = torch.cuda.current_device()
            properties: Any = torch.cuda.get_device_properties(index)
            uuid = getattr(properties, "uuid", None)
            return f"{host}-cuda{index}" if uuid is None else f"GPU-{uuid}"
    except Exception:  # a driver's error must not end an engine
        pass
    return f"{host}-unknown"


def rank_speeds(
    settings: Settings, keys: Sequence[str], ranks: int, logger: logging.Logger
) -> FloatArray:
    """Relative speed of each rank [ranks]; all 1, with one warning, where they are not known."""
    equal = np.ones(ranks)
    if settings.profile is None:
        return equal
    from moeplace.profile import match, read_profile, relative_speeds

    try:
        if len(keys) != ranks:
            raise MoeplaceError(f"{len(keys)} devices are known of {ranks} ranks")
        profile = read_profile(settings.profile)
        phase = settings.phase
        phases = sorted({entry.phase for entry in profile.entries})
        if phase is None and len(phases) > 1:
            raise MoeplaceError(
                f"the profile has times for {', '.join(phases)}: choose one by MOEPLACE_PHASE"
            )
        found = match(profile, keys, phase=phase)  # says itself what is missing or stale
        return equal if found.entries is None else relative_speeds(found.entries)
    except Exception as cause:  # whatever a profile holds, the engine goes on
        logger.warning("moeplace: all ranks count as equally fast: %s", cause)
        return equal
