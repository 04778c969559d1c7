"""Grouped expert SwiGLU, and how a slow rank is emulated.

Tensors are cut by `narrow`, `select` and `index_select`, not by brackets, which ask the device:
so the same code runs on fake GPU tensors where there is no GPU.

A kernel is ``f(tokens, up, down, ends) -> outputs``: `tokens` [rows, hidden] sorted by slot,
`up` [slots, 2 * intermediate, hidden] (gate above up projection), `down`
[slots, hidden, intermediate], `ends` int32 [slots], the row at which each slot's group ends;
`outputs` [rows, hidden] of the same type. ``module:function`` names one of your own, e.g. a
wrapper of the engine's fused kernel, whose time is not that of a loop on the host.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeplace.errors import ProblemError, ReplayError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Groups:
    """Rows of each slot's tokens: on the device, and on the host where a kernel loops."""

    ends: Tensor  #: int32 [slots]
    sizes: list[int]  #: [slots]

    @classmethod
    def of(cls, sizes: list[int], device: torch.device) -> "Groups":
        """Groups with these numbers of rows [slots]."""
        ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32)
        return cls(ends.to(device), sizes)

    def prefix(self, rows: int) -> "Groups":
        """The groups of the first `rows` rows."""
        left, sizes = rows, []
        for size in self.sizes:
            sizes.append(min(size, left))
            left -= sizes[-1]
        return Groups.of(sizes, self.ends.device)


class Experts:
    """Runs a rank's experts `factor` times, to be as slow as a rank `factor` times slower."""

    def __init__(self, kernel: str, factor: float, device: torch.device, dtype: torch.dtype):
        self.name = resolve(kernel, device, dtype)
        self.factor = factor
        self._own = None if self.name in ("grouped", "loop") else load(self.name)

    def once(self, tokens: Tensor, up: Tensor, down: Tensor, groups: Groups) -> Tensor:
        """Outputs [rows, hidden] of tokens [rows, hidden] sorted by slot."""
        if self._own is not None:
            return self._checked(self._own(tokens, up, down, groups.ends), tokens)
        if self.name == "loop":
            return loop(tokens, up, down, groups.sizes)
        return grouped(tokens, up, down, groups.ends)

    def _checked(self, outputs: object, tokens: Tensor) -> Tensor:
        """What a user's kernel gave, if it is what its contract says."""
        if not isinstance(outputs, Tensor):
            raise ProblemError(
                f"Kernel {self.name} must give outputs [rows, hidden], a tensor, got a "
                f"{type(outputs).__name__}. Return one row for each row of tokens."
            )
        if (outputs.shape, outputs.dtype) != (tokens.shape, tokens.dtype):
            raise ProblemError(
                f"Kernel {self.name} must give outputs [rows, hidden] as tokens are, "
                f"{tuple(tokens.shape)} of {tokens.dtype}, got {tuple(outputs.shape)} of "
                f"{outputs.dtype}. Return one row for each row of tokens, in their order."
            )
        return outputs

    def repeats(self, groups: Groups) -> list[Groups]:
        """What is run again: the whole groups, and a prefix of their rows for a fraction."""
        whole = math.floor(self.factor)
        part = round((self.factor - whole) * sum(groups.sizes))
        return [groups] * (whole - 1) + ([groups.prefix(part)] if part else [])

    def run(
        self, tokens: Tensor, up: Tensor, down: Tensor, groups: Groups, again: list[Groups]
    ) -> Tensor:
        """Outputs [rows, hidden], computed once and then again for the slowness emulated."""
        outputs = self.once(tokens, up, down, groups)
        for more in again:
            self.once(tokens.narrow(0, 0, sum(more.sizes)), up, down, more)
        return outputs


def grouped(tokens: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """SwiGLU of all slots at once by grouped products; no value is read on the host."""
    both = functional.grouped_mm(tokens, up.transpose(-2, -1), offs=ends)
    gate, raised = both.chunk(2, dim=-1)
    inner = functional.silu(gate) * raised
    return functional.grouped_mm(inner, down.transpose(-2, -1), offs=ends)


def loop(tokens: Tensor, up: Tensor, down: Tensor, sizes: list[int]) -> Tensor:
    """The same, a slot at a time."""
    outputs = torch.empty_like(tokens)
    begin = 0
    for slot, size in enumerate(sizes):
        if size:
            rows = tokens.narrow(0, begin, size)
            gate, raised = functional.linear(rows, up.select(0, slot)).chunk(2, dim=-1)
            inner = functional.silu(gate).mul_(raised)
            torch.mm(inner, down.select(0, slot).t(), out=outputs.narrow(0, begin, size))
        begin += size
    return outputs


def resolve(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel that "auto" stands for here; ReplayError if the one asked for cannot run.

    Grouped products need torch 2.10 or so; on GPUs bfloat16 and compute capability 9.0. On CPU
    a loop is what they do inside.
    """
    known = hasattr(functional, "grouped_mm")
    fits = known
    if device.type == "cuda" and known:
        fits = dtype == torch.bfloat16 and (
            torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (9, 0)
        )
    if kernel == "auto":
        return "grouped" if fits and device.type == "cuda" else "loop"
    if kernel == "grouped" and not fits:
        raise ReplayError(
            f"Kernel grouped cannot run here (torch {torch.__version__}, {device.type}, {dtype}): "
            "it needs torch.nn.functional.grouped_mm, and on GPUs bfloat16 and compute capability "
            "9.0. Use --kernel loop, or your own as module:function."
        )
    return kernel


def load(name: str) -> Kernel:
    """Import ``module:function``; ProblemError if there is no such function."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as cause:  # whatever a user's module does
        raise ProblemError(
            f"Kernel {name!r} cannot be imported ({type(cause).__name__}: {cause}). Give "
            "module:function of a module on the import path (PYTHONPATH)."
        ) from cause
    if not callable(found):
        raise ProblemError(f"Kernel {name!r} is not a function.")
    kernel: Kernel = found
    return kernel
