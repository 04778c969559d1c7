"""How requests were served: times to tokens, rates, idle time, and means over seeds."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moeplace._check import FloatArray
from moeplace.errors import ProblemError
from moeplace.requests import Requests

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request must be served in: seconds to the first token, and for each later one."""

    ttft: float = float("inf")
    tpot: float = float("inf")

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ProblemError(
                    f"A limit of service ({field.name}) must be above 0 s, got {value!r}."
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """How requests were served.

    Attributes
    ----------
    requests : Requests
    begun, first, last : array [requests]
        Seconds at which its first step began, its first token was there, and its last.
    steps : dict of arrays [steps]
        start, seconds; of these, summed over layers: moe (the slowest rank's), mean_rank, fastest,
        link; tokens, assignments, plan (0, or the change after which).
    layers : float
        Weight of the layers of a step.
    """

    requests: Requests
    begun: FloatArray
    first: FloatArray
    last: FloatArray
    steps: dict[str, FloatArray]
    layers: float

    @property
    def ttft(self) -> FloatArray:
        """Seconds from arrival to the first token [requests]."""
        return np.asarray(self.first - self.requests.arrival)

    @property
    def tpot(self) -> FloatArray:
        """Mean seconds for each token after the first, of the requests that have any."""
        several = self.requests.output > 1
        return np.asarray((self.last - self.first)[several] / (self.requests.output[several] - 1))

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return float(self.last.max() - self.requests.arrival[0])

    @property
    def idle_share(self) -> float:
        """Share of the time in MoE layers that ranks wait for the slowest."""
        moe = self.steps["moe"].sum()
        return float(1 - self.steps["mean_rank"].sum() / moe) if moe > 0 else 0.0

    @property
    def layer_seconds(self) -> float:
        """Mean time of a MoE layer over all steps, its communication left out."""
        return float(self.steps["moe"].mean() / self.layers)

    @property
    def layer_gap(self) -> float:
        """Median over steps of the slowest less the fastest rank's time, mean over layers."""
        return float(np.median(self.steps["moe"] - self.steps["fastest"]) / self.layers)

    def attained(self, slo: Slo) -> float:
        """Share of requests within both limits."""
        good = self.ttft <= slo.ttft
        several = self.requests.output > 1
        good[several] &= self.tpot <= slo.tpot
        return float(good.mean())

    def figures(self) -> dict[str, float]:
        """The numbers of a table, seconds but for shares and rates."""
        found: dict[str, float] = {}
        for name, values in (("ttft", self.ttft), ("tpot", self.tpot)):
            if values.size:
                found[f"{name} mean"] = float(values.mean())
                for q in QUANTILES:
                    found[f"{name} p{q}"] = float(np.percentile(values, q))
        found["requests/s"] = self.requests.count / self.seconds if self.seconds > 0 else np.inf
        found["tokens/s"] = float(self.steps["tokens"].sum()) / self.seconds
        found["layer"] = self.layer_seconds
        found["idle share"] = self.idle_share
        return found


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Mean over seeds, and half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Any) -> "Interval":
        """The interval of values, one for each seed; infinite for fewer than two."""
        from scipy.stats import t

        values = np.asarray(values, dtype=np.float64)
        if values.size < 2:
            return cls(mean=float(values.mean()), half=float("inf"))
        error = values.std(ddof=1) / np.sqrt(values.size)
        return cls(mean=float(values.mean()), half=float(t.ppf(0.975, values.size - 1) * error))
