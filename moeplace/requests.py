"""What a serving simulation is asked: requests in time, and which experts their tokens choose."""

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moeplace._check import FloatArray, IntArray, first, integers, numbers
from moeplace._files import PathLike, read_bytes
from moeplace.errors import FormatError, ProblemError
from moeplace.loads import LoadHistogram

#: How much requests differ in what share of their tokens an expert gets: standard deviation over
#: mean. Measured: 0.10 between windows of 1,024 tokens of one task (DeepSeek-V2-Lite, ESFT law),
#: 0.73 between prefill steps of 2,000 tokens (Qwen3-30B, ShareGPT); single requests differ more.
SPREAD = 0.5
#: Profiles that requests draw from.
PROFILES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Profiles:
    """Kinds of requests by the experts that their tokens choose.

    Attributes
    ----------
    shares : float32 array [profiles, layers, experts]
        Share of a layer's assignments; 0 everywhere in a layer without load.
    kind : int array [profiles]
        Window of the loads that a profile was drawn around.
    weight : array [kinds]
        How likely a request is of that kind.
    """

    shares: npt.NDArray[np.float32]
    kind: IntArray
    weight: FloatArray

    @classmethod
    def of(
        cls,
        loads: LoadHistogram,
        *,
        count: int = PROFILES,
        spread: float = SPREAD,
        seed: int = 0,
    ) -> "Profiles":
        """Draw profiles around the windows of recorded loads.

        Each expert's share is its window's times a gamma variable of mean 1 and standard
        deviation `spread`, then scaled so that the profiles of a window have exactly its mean.

        Parameters
        ----------
        loads : LoadHistogram
            One window for each kind of request (a task); requests are of a kind as often as its
            window has tokens. One window: all requests are of one kind.
        count : int
            Profiles in all.
        spread : float
            0: all requests of a window are alike.
        seed : int

        Raises
        ------
        ProblemError
            If an option is out of range.
        """
        _whole("Profiles", count, 1, 1 << 16)
        if not (isinstance(spread, int | float) and 0 <= spread <= 10):
            raise ProblemError(f"The spread of profiles must be from 0 to 10, got {spread!r}.")
        each = max(count // loads.windows, 1)
        generator = _stream(seed, 0)
        shape = (each, loads.layers, loads.experts)
        found = np.empty((loads.windows, *shape), dtype=np.float32)
        for window, tokens in enumerate(loads.tokens):
            total = tokens.sum(axis=1, keepdims=True)
            mean = tokens / np.where(total > 0, total, 1.0)
            drawn = np.broadcast_to(mean, shape)
            if spread > 0 and each > 1:
                drawn = mean * generator.gamma(1 / spread**2, spread**2, shape)
                for _ in range(20):  # rows to sum 1, then columns to the mean, in turns
                    row = _positive(drawn.sum(axis=2, keepdims=True))
                    drawn /= row
                    drawn *= mean / _positive(drawn.mean(axis=0))
                    if np.abs(row - 1).max() < 1e-3:
                        break
            found[window] = drawn
        weight = loads.tokens.sum(axis=(1, 2))
        if not weight.any():
            raise ProblemError("The loads are 0 everywhere: nothing says what requests choose.")
        return cls(
            shares=found.reshape(-1, loads.layers, loads.experts),
            kind=np.repeat(np.arange(loads.windows), each),
            weight=weight / weight.sum(),
        )

    def draw(self, count: int, seed: int = 0, weight: FloatArray | None = None) -> IntArray:
        """Profiles of so many requests, by kinds of these weights (by default their own)."""
        generator = _stream(seed, 1)
        chance = (self.weight if weight is None else weight)[self.kind]
        chance = chance / np.bincount(self.kind)[self.kind]
        return generator.choice(self.kind.size, size=count, p=chance / chance.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """Requests in order of arrival.

    Parameters
    ----------
    arrival : array-like [requests]
        Seconds, ascending.
    prompt : array-like [requests]
        Tokens of the prompt; 0 where another pool has done it, and decode alone is left.
    output : array-like [requests]
        Tokens of the answer, 1 or more; 1 with a prompt: prefill alone.
    profile : array-like [requests]
        Index into `Profiles.shares`.

    Raises
    ------
    ProblemError
        If a number is out of range, arrivals do not ascend, or sizes differ.
    """

    arrival: FloatArray
    prompt: IntArray
    output: IntArray
    profile: IntArray

    def __post_init__(self) -> None:
        axes = ("request",)
        most = 1 << 24
        checked: dict[str, Any] = {
            "arrival": numbers(self.arrival, "Arrivals", axes, ProblemError),
            "prompt": integers(self.prompt, "Prompts", axes, ProblemError, low=0, high=most),
            "output": integers(self.output, "Outputs", axes, ProblemError, low=1, high=most),
            "profile": integers(self.profile, "Profiles", axes, ProblemError, low=0, high=most),
        }
        sizes = {array.size for array in checked.values()}
        if len(sizes) > 1:
            raise ProblemError(
                "Requests need one arrival, prompt, output and profile each, got "
                f"{', '.join(f'{array.size} {name}s' for name, array in checked.items())}."
            )
        if (falls := np.diff(checked["arrival"]) < 0).any():
            (at,) = first(falls)
            raise ProblemError(
                f"Arrivals must ascend: request {at + 1} comes at "
                f"{checked['arrival'][at + 1]:g} s, after {checked['arrival'][at]:g} s. Sort them."
            )
        for name, array in checked.items():
            object.__setattr__(self, name, array)

    @property
    def count(self) -> int:
        """Number of requests."""
        return self.arrival.size

    @classmethod
    def poisson(
        cls,
        profiles: Profiles,
        count: int,
        *,
        rate: float,
        prompt: float,
        output: float,
        variation: float = 0.0,
        seed: int = 0,
    ) -> "Requests":
        """Draw requests that come by chance, at a mean rate.

        Parameters
        ----------
        profiles : Profiles
        count : int
        rate : float
            Requests per second. Another rate under the same seed gives the same requests, closer
            together or farther apart.
        prompt, output : float
            Mean tokens.
        variation : float
            Standard deviation over mean of both (gamma, at least one token); 0: all alike.
        seed : int

        Raises
        ------
        ProblemError
            If an option is out of range.
        """
        _whole("Number of requests", count, 1, 1 << 26)
        for name, value, low in (
            ("rate", rate, 0.0),
            ("mean output", output, 0.99),
            ("mean prompt", prompt, -1.0),
            ("variation of lengths", variation, -1e-300),
        ):
            if not (isinstance(value, int | float | np.number) and low < value < 1e12):
                raise ProblemError(f"The {name} of requests is out of range: {value!r}.")
        generator = _stream(seed, 2)
        arrival = generator.standard_exponential(count).cumsum() / rate
        lengths = []
        for mean, least in ((prompt, 1), (output, 1)):
            drawn = np.full(count, mean)
            if variation > 0 and mean > 1:
                drawn = generator.gamma(1 / variation**2, mean * variation**2, count)
            lengths.append(np.maximum(np.rint(drawn), least if mean > 0 else 0).astype(np.int64))
        return cls(
            arrival=arrival,
            prompt=lengths[0],
            output=lengths[1],
            profile=profiles.draw(count, seed),
        )

    def only(self, phase: str) -> "Requests":
        """The same requests with their prefill, or their decode, alone."""
        if phase == "prefill":
            return self._with(self.arrival, self.prompt, np.ones_like(self.output))
        return self._with(self.arrival, np.zeros_like(self.prompt), self.output)

    def faster(self, factor: float) -> "Requests":
        """The same requests, `factor` times as many a second."""
        return self._with(self.arrival / factor, self.prompt, self.output)

    def _with(self, arrival: FloatArray, prompt: IntArray, output: IntArray) -> "Requests":
        return Requests(arrival=arrival, prompt=prompt, output=output, profile=self.profile)


def read_requests(path: PathLike, profiles: Profiles, seed: int = 0) -> Requests:
    """Requests of a CSV file: columns arrival (s), prompt, output (tokens), and kind if known.

    A kind is the number of a window of the loads. Rows may come in any order.

    Raises
    ------
    FormatError
        If the file cannot be read or breaks a rule, with its row.
    """
    text = read_bytes(path, "CSV").decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    reader = csv.DictReader(io.StringIO("\n".join(lines)), skipinitialspace=True)
    given = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in ("arrival", "prompt", "output") if name not in given]:
        raise FormatError(
            f"{path}: lacks the column {missing[0]!r}: the header must name arrival, prompt, "
            f"output (and kind, if known), got {', '.join(given)[:80]}."
        )
    names = [name for name in ("arrival", "prompt", "output", "kind") if name in given]
    rows = []
    for number, row in enumerate(reader, start=1):
        try:
            values = [float(row[name]) for name in names]
        except (TypeError, ValueError):
            values = [float("nan")]
        whole = all(value >= 0 and value == int(value) for value in values[1:] if value == value)
        if not (np.isfinite(values).all() and values[0] >= 0 and whole):
            raise FormatError(
                f"{path}: row {number}: arrival must be seconds from 0, {', '.join(names[1:])} "
                f"whole numbers from 0, got {', '.join(str(row[name]) for name in names)}."
            )
        rows.append(values)
    if not rows:
        raise FormatError(f"{path}: has a header but no rows.")
    columns = np.array(sorted(rows)).T
    profile = profiles.draw(len(rows), seed)
    if "kind" in names:
        if columns[3].max() >= profiles.weight.size:
            raise FormatError(
                f"{path}: kind {columns[3].max():g} is not a window of the loads, which have "
                f"{profiles.weight.size}."
            )
        generator = _stream(seed, 3)
        each = np.bincount(profiles.kind)
        begins = each.cumsum() - each
        kind = columns[3].astype(np.int64)
        profile = begins[kind] + (generator.random(kind.size) * each[kind]).astype(np.int64)
    try:
        return Requests(
            arrival=columns[0], prompt=columns[1].astype(np.int64),
            output=columns[2].astype(np.int64), profile=profile,
        )  # fmt: skip
    except ProblemError as error:
        raise FormatError(f"{path}: {error}") from error


def _stream(seed: int, key: int) -> np.random.Generator:
    """Profiles, who has which, arrivals and lengths: each from its own stream of the seed."""
    _whole("Seed", seed, 0, 1 << 62)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))


def _positive(values: FloatArray) -> FloatArray:
    return np.where(values > 0, values, 1.0)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ProblemError(f"{name} must be a whole number from {low} to {high}, got {value!r}.")
