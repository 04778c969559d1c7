"""The folder in which the policies inside engines record: a window for each decision."""

import numpy as np

from moeplace._check import FloatArray
from moeplace._files import PathLike
from moeplace.errors import FormatError
from moeplace.formats.loads._raw import Ask, Raw
from moeplace.integrations.observe import read_decisions


def read(path: PathLike, ask: Ask) -> Raw:
    """Stack the weights of all decisions, oldest first."""
    del ask
    weights: list[FloatArray] = []
    phases = set()
    for decision in read_decisions(path):
        if weights and weights[0].shape != decision.weight.shape:
            raise FormatError(
                f"{path}: holds weights of shapes {weights[0].shape} and {decision.weight.shape}. "
                "Remove the files of one."
            )
        weights.append(decision.weight)
        phases.add(decision.about.get("phase"))
    phase = phases.pop() if len(phases) == 1 else None
    notes = (f"{len(weights)} decisions of an engine, one window each",)
    return Raw(np.stack(weights), phase=phase, notes=notes)
