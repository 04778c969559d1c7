"""How many tokens each expert gets: load histograms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moeplace._check import MAX_TOKENS, FloatArray, first, ndim, numbers, where
from moeplace.errors import ProblemError

Phase = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadHistogram:
    """Token assignments per expert, in one or several windows of time.

    Parameters
    ----------
    tokens : array-like [windows, layers, experts] or [layers, experts]
        Token assignments (a token that is routed to top-k experts counts k times).
        Means are allowed, so they need not be whole. Two axes mean one window.
    passes : array-like [windows] or number, optional
        Forward passes that each window sums. With it, all seconds are per forward pass.
    phase : {"prefill", "decode", "mixed"}
        What the passes were.

    Raises
    ------
    ProblemError
        If a load is negative, not finite or above 2**53, the array is ragged or empty,
        or `passes` does not have one positive number for each window.
    """

    tokens: FloatArray
    passes: FloatArray | None = None
    phase: Phase = "mixed"

    def __post_init__(self) -> None:
        tokens: Any = self.tokens
        axes = ("window", "layer", "expert")
        if ndim(tokens) == 2:
            tokens = np.asarray(tokens)[None]
        checked = numbers(tokens, "Loads", axes, ProblemError)
        totals = checked.sum(axis=2)
        if (totals > MAX_TOKENS).any():
            place = first(totals > MAX_TOKENS)
            raise ProblemError(
                f"Loads of one layer must sum to at most 2**53 tokens: got {totals[place]:g} at "
                f"{where(place, axes[:2])}. Scale the loads down."
            )
        object.__setattr__(self, "tokens", checked)
        if self.passes is not None:
            passes: Any = self.passes
            passes = [passes] if ndim(passes) == 0 else passes
            counted = numbers(passes, "Passes", ("window",), ProblemError, strict=True)
            if counted.shape != (self.windows,):
                raise ProblemError(
                    f"Passes need one number for each of the {self.windows} windows, "
                    f"got {counted.size}."
                )
            object.__setattr__(self, "passes", counted)
        if self.phase not in get_args(Phase):
            raise ProblemError(
                f"Phase must be one of {', '.join(get_args(Phase))}, got {self.phase!r}."
            )

    @property
    def windows(self) -> int:
        """Number of windows."""
        return int(self.tokens.shape[0])

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return int(self.tokens.shape[1])

    @property
    def experts(self) -> int:
        """Number of logical experts in a layer."""
        return int(self.tokens.shape[2])

    @property
    def integral(self) -> bool:
        """Whether all loads are whole numbers (counts, not means)."""
        return bool((self.tokens == np.floor(self.tokens)).all())

    def aggregate(self) -> "LoadHistogram":
        """Sum all windows into one.

        The makespan of summed loads is at most the sum of the windows' makespans: a plan
        looks better on the sum than it is in service.
        """
        passes = None if self.passes is None else self.passes.sum(keepdims=True)
        tokens = self.tokens.sum(axis=0, keepdims=True)
        return LoadHistogram(tokens=tokens, passes=passes, phase=self.phase)

    def regimes(self, labels: Sequence[int]) -> "LoadHistogram":
        """Sum the windows of each regime (a task, an hour): one window for each label, in order.

        A placement for several windows of pure sampling noise overfits them; regimes are what
        it is for.

        Raises
        ------
        ProblemError
            If there is not one label for each window.
        """
        if len(labels) != self.windows:
            raise ProblemError(
                f"Regimes need one label for each of the {self.windows} windows, got {len(labels)}."
            )
        of = np.asarray(labels)
        members = [of == label for label in np.unique(of)]
        tokens = np.stack([self.tokens[member].sum(axis=0) for member in members])
        passes = None
        if self.passes is not None:
            passes = np.array([self.passes[member].sum() for member in members])
        return LoadHistogram(tokens=tokens, passes=passes, phase=self.phase)

    def select(self, windows: slice | list[int]) -> "LoadHistogram":
        """Keep some of the windows, e.g. to hold the others out."""
        passes = None if self.passes is None else self.passes[windows]
        return LoadHistogram(tokens=self.tokens[windows], passes=passes, phase=self.phase)

    def scale(self, factor: float) -> "LoadHistogram":
        """Multiply every load by `factor`."""
        return LoadHistogram(tokens=self.tokens * factor, passes=self.passes, phase=self.phase)

    def sample(self, assignments: int, seed: int = 0) -> "LoadHistogram":
        """Draw `assignments` token assignments per window and layer, by each expert's share.

        Layers without tokens stay empty. Source of the noise model: independent tokens,
        i.e. a multinomial draw.
        """
        generator = np.random.default_rng(seed)
        totals = self.tokens.sum(axis=2, keepdims=True)
        shares = self.tokens / np.where(totals > 0, totals, 1.0)
        drawn = np.zeros_like(self.tokens)
        for window, layer in np.argwhere(totals[..., 0] > 0):
            drawn[window, layer] = generator.multinomial(assignments, shares[window, layer])
        return LoadHistogram(tokens=drawn, passes=self.passes, phase=self.phase)

    def skew(self) -> FloatArray:
        """Largest load over mean load, [windows, layers]; 1 for a layer without tokens."""
        mean = self.tokens.mean(axis=2)
        return np.where(mean > 0, self.tokens.max(axis=2) / np.where(mean > 0, mean, 1.0), 1.0)

    def gini(self) -> FloatArray:
        """Gini coefficient of the experts' loads, [windows, layers]: 0 even, near 1 one expert."""
        rank = np.arange(1, self.experts + 1)
        total = self.tokens.sum(axis=2)
        weighted = (np.sort(self.tokens, axis=2) * (2 * rank - self.experts - 1)).sum(axis=2)
        return np.asarray(weighted / (self.experts * np.where(total > 0, total, 1.0)))

    def zeros(self) -> FloatArray:
        """Share of experts without any token, [windows, layers]."""
        return np.asarray((self.tokens == 0).mean(axis=2))

    def distance(self, other: "LoadHistogram") -> FloatArray:
        """One minus the cosine between summed load vectors, [layers], as ViBE measures drift.

        Source: arXiv 2606.00735. Blind to magnitude; 0 where either layer has no tokens.
        """
        mine, theirs = self.tokens.sum(axis=0), other.tokens.sum(axis=0)
        if mine.shape != theirs.shape:
            raise ProblemError(
                "Distance needs two histograms of the same [layers, experts]: "
                f"got {mine.shape} and {theirs.shape}."
            )
        norms = np.sqrt((mine**2).sum(axis=1) * (theirs**2).sum(axis=1))
        cosine = (mine * theirs).sum(axis=1) / np.where(norms > 0, norms, 1.0)
        return np.where(norms > 0, np.maximum(1.0 - cosine, 0.0), 0.0)
