"""Loads, maps and processes that the tests of the engines' policies share."""

import logging
from typing import Any

import numpy as np

from moeplace.instances import generate
from moeplace.integrations.agree import Alone
from moeplace.integrations.policy import Policy, Request
from moeplace.integrations.settings import Effort, Settings
from moeplace.policies.eplb import eplb

#: Layers x experts / slots / ranks of the large shape, smaller by layers.
SHAPE = (6, 256, 288, 32)


def loads(shape: Any = SHAPE, seed: int = 100, epoch: int = 0) -> Any:
    return generate(shape, seed, epoch=epoch, speeds="equal").aggregate().mean_load[0].copy()


def speeds(shape: Any = SHAPE, seed: int = 100) -> Any:
    return generate(shape, seed).cluster.speeds


def contiguous(layers: int, slots: int, experts: int) -> Any:
    return np.tile(np.arange(slots) % experts, (layers, 1))


class Lines(logging.Handler):
    """What a policy says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())


def make(**settings: Any) -> tuple[Policy, list[str]]:
    logger = logging.Logger("engine")
    lines = Lines()
    logger.addHandler(lines)
    effort = settings.pop("effort", Effort())
    return Policy("test", Settings(effort=effort, **settings), logger), lines.said


def own(request: Request) -> Any:
    """The engine's own policy."""
    weight = np.nan_to_num(np.asarray(request.weight, dtype=float), posinf=0, neginf=0)
    return lambda: eplb(weight, request.ranks, request.slots // request.ranks)


def decide(policy: Policy, request: Request) -> Any:
    return policy.decide(request, Alone, own(request))
