"""Do the recorded loads look like what a model's router does? Findings for those that do not.

Statistics lie in known ways: padding is counted, counts are multiplied by the data-parallel size,
warm-up requests are among them, or one rank's experts are all there is. A plan for such loads is a
plan for something else. Every rule here is far from what measured loads show, so that a finding
is worth a look; the absence of one proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moeplace._check import BoolArray, FloatArray
from moeplace.errors import ProblemError
from moeplace.loads import LoadHistogram

Name = Literal[
    "empty",
    "totals-differ",
    "one-rank-only",
    "multiples",
    "padding-spikes",
    "too-uniform",
    "warm-up",
]
NAMES: tuple[str, ...] = get_args(Name)

#: Totals of a window's layers may differ by this share, or by so many standard deviations of a
#: Poisson count, whichever is more: sampled and synthetic loads do.
TOTALS_APART, DEVIATIONS = 0.01, 6.0
#: Numbers that must agree before a coincidence (of parts of a half, of multiples) is a finding.
WITNESSES = 20
#: A spike: this many times the load of the next expert, from experts this much alike, whose number
#: is the same in this share of the layers.
SPIKE, ALIKE, LAYERS = 2.0, 1.2, 0.5
#: Experts of a window whose loads vary by less than this share of what chance alone does.
TOO_EVEN = 0.25
#: A first window with less than this share of the later ones' tokens; or further from them than
#: so many times the furthest of them, and than this cosine distance.
FEW, FAR, DISTANCE = 0.1, 3.0, 0.05


@dataclass(frozen=True)
class Finding:
    """Something that recorded loads of a router do not show.

    `name` is one of NAMES; `message` says what, where, what it may mean and what to do; `windows`
    and `layers` are where it was found.
    """

    name: Name
    message: str
    windows: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()


def diagnose(loads: LoadHistogram) -> tuple[Finding, ...]:
    """Look for statistics that lie.

    Parameters
    ----------
    loads : LoadHistogram

    Returns
    -------
    tuple of Finding
        One of each name at most, in the order of NAMES.
    """
    if not isinstance(loads, LoadHistogram):
        raise ProblemError(
            f"Loads must be a moeplace.LoadHistogram, got {type(loads).__name__}: build one from "
            "tokens, or read them (read_loads)."
        )
    rules: tuple[Callable[[LoadHistogram], Finding | None], ...] = (
        _empty,
        _totals,
        _one_rank,
        _multiples,
        _spikes,
        _uniform,
        _warm_up,
    )
    return tuple(found for rule in rules if (found := rule(loads)) is not None)


def drift(loads: LoadHistogram) -> FloatArray:
    """Cosine distance from each window to the next, mean over layers, [windows - 1].

    Sampling noise alone makes it positive.
    """
    return _cosine(loads.tokens[:-1], loads.tokens[1:])


def _cosine(left: FloatArray, right: FloatArray) -> FloatArray:
    """One minus the cosine of [..., layers, experts], mean over layers that both have tokens."""
    norms = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    used = norms > 0
    apart = 1.0 - (left * right).sum(axis=-1) / np.where(used, norms, 1.0)
    count = used.sum(axis=-1)
    total = np.where(used, np.maximum(apart, 0.0), 0.0).sum(axis=-1)
    return np.asarray(total / np.maximum(count, 1))


def _where(mask: BoolArray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _said(name: str, index: tuple[int, ...]) -> str:
    """Name places: "layers 0 to 2", "windows 1, 4 (and 7 more)"."""
    if len(index) == 1:
        return f"{name} {index[0]}"
    if index[-1] - index[0] == len(index) - 1:
        return f"{name}s {index[0]} to {index[-1]}"
    more = f" (and {len(index) - 5} more)" if len(index) > 5 else ""
    return f"{name}s {', '.join(map(str, index[:5]))}{more}"


def _empty(loads: LoadHistogram) -> Finding | None:
    totals = loads.tokens.sum(axis=2)
    windows, layers = _where(~totals.any(axis=1)), _where(~totals.any(axis=0))
    if not windows and not layers:
        return None
    if len(layers) == loads.layers:
        return Finding("empty", "no layer has any token: nothing was recorded", windows, layers)
    parts = []
    if layers:
        parts.append(
            f"{_said('layer', layers)} of {loads.layers}: no token in any window; dense layers are "
            "no part of the problem, so keep the MoE layers only (--layers)"
        )
    if windows:
        parts.append(
            f"{_said('window', windows)} of {loads.windows}: no token; leave idle times out"
        )
    return Finding("empty", "; ".join(parts), windows, layers)


def _totals(loads: LoadHistogram) -> Finding | None:
    totals = loads.tokens.sum(axis=2)
    used = totals.any(axis=0)
    if used.sum() < 2:
        return None
    usual = np.median(totals[:, used], axis=1, keepdims=True)
    allowed = np.maximum(TOTALS_APART * usual, DEVIATIONS * np.sqrt(usual) + 0.5)
    odd = (np.abs(totals - usual) > allowed) & used
    if not odd.any():
        return None
    windows, layers = _where(odd.any(axis=1)), _where(odd.any(axis=0))
    window, layer = (int(i) for i in np.argwhere(odd)[0])
    return Finding(
        "totals-differ",
        f"layer totals differ within a window, e.g. {totals[window, layer]:,.10g} assignments in "
        f"layer {layer} but {usual[window, 0]:,.10g} in most others (window {window}); odd: "
        f"{_said('layer', layers)} in {_said('window', windows)}. Every layer routes the same "
        "tokens, unless tokens were dropped, layers recorded at different times, or a draft "
        "layer runs more often",
        windows,
        layers,
    )


def _one_rank(loads: LoadHistogram) -> Finding | None:
    experts = loads.experts
    if experts < 4:
        return None
    used = loads.tokens > 0
    found: dict[int, tuple[int, int]] = {}
    for window in range(loads.windows):
        if used[window].sum() < WITNESSES:
            continue
        there = np.flatnonzero(used[window].any(axis=0))
        for ranks in (r for r in range(experts // 2, 1, -1) if experts % r == 0):
            block = experts // ranks
            if there[0] // block == there[-1] // block:
                found[window] = (ranks, int(there[0] // block))
                break
    if not found:
        return None
    window, (ranks, rank) = next(iter(found.items()))
    block = experts // ranks
    return Finding(
        "one-rank-only",
        f"only experts {rank * block} to {rank * block + block - 1} of {experts} have tokens in "
        f"{_said('window', tuple(found))}: those of rank {rank} of {ranks}. The other ranks' "
        "counts are missing: sum the files of all ranks",
        tuple(found),
    )


def _multiples(loads: LoadHistogram) -> Finding | None:
    if not loads.integral:
        return None
    counts = np.unique(loads.tokens[loads.tokens > 0]).astype(np.int64)
    many = int((loads.tokens > 0).sum())
    if counts.size < 8 or many < WITNESSES:
        return None
    divisor = int(np.gcd.reduce(counts))
    if divisor < 2:
        return None
    return Finding(
        "multiples",
        f"all {many:,} counts are multiples of {divisor}: were they multiplied by the "
        f"data-parallel size, i.e. each token counted {divisor} times? Only ratios are right then, "
        "tokens per pass are not (divide, or scale)",
    )


def _spikes(loads: LoadHistogram) -> Finding | None:
    most = min(16, loads.experts // 4)
    if most < 2:
        return None
    top = -np.sort(-loads.tokens, axis=2)[:, :, : most + 1]
    size = np.arange(2, most + 1)
    # [windows, layers, sizes]: the first so many stand out, alike
    spike = (top[..., 1:-1] >= SPIKE * top[..., 2:]) & (top[..., :1] <= ALIKE * top[..., 1:-1])
    spike &= top[..., 1:-1] > 0
    layers = np.maximum((top[..., 0] > 0).sum(axis=1), 1)[:, None]
    common = (spike.sum(axis=1) > LAYERS * layers) & (spike.sum(axis=1) >= 2)
    if not common.any():
        return None
    windows = _where(common.any(axis=1))
    window = windows[0]
    k = int(np.flatnonzero(common[window])[0])
    where = _where(spike[window, :, k])
    return Finding(
        "padding-spikes",
        f"{size[k]} experts a layer have alike loads, at least {SPIKE:g} times the next one's, in "
        f"{len(where)} of {loads.layers} layers of window {window}: padded tokens, which are all "
        f"routed alike, were probably counted (top-{size[k]}). Record without padding; found in "
        f"{_said('window', windows)}",
        windows,
        where,
    )


def _uniform(loads: LoadHistogram) -> Finding | None:
    mean = loads.tokens.mean(axis=2)
    if loads.experts < 16:
        return None
    spread = ((loads.tokens - mean[..., None]) ** 2).sum(axis=2)
    even = (mean >= 8) & (spread < TOO_EVEN * mean * (loads.experts - 1))
    windows = _where(even.mean(axis=1) > LAYERS)
    if not windows:
        return None
    return Finding(
        "too-uniform",
        f"loads of {_said('window', windows)} are more even than chance would make them, in "
        f"{int(even[windows[0]].sum())} of {loads.layers} layers: dummy batches with forced "
        "routing, not requests. Record while requests are served",
        windows,
    )


def _warm_up(loads: LoadHistogram) -> Finding | None:
    """The first windows, up to a quarter, that the later ones do not resemble."""
    if loads.windows < 4:
        return None
    per_pass = loads.tokens if loads.passes is None else loads.tokens / loads.passes[:, None, None]
    later = loads.windows // 4
    rest = per_pass[later:]
    usual = float(np.median(rest.sum(axis=(1, 2))))
    few = per_pass[:later].sum(axis=(1, 2)) < FEW * usual
    apart = _cosine(per_pass, rest.mean(axis=0)[None])
    far = apart[:later] > max(FAR * float(apart[later:].max()), DISTANCE)
    leading = int(np.argmin(np.append(few | far, False)))
    if not leading:
        return None
    windows = tuple(range(leading))
    how = (
        f"{per_pass[0].sum():,.6g} tokens, {usual:,.6g} later"
        if few[0]
        else f"cosine distance {apart[0]:.3f} to the later ones, which are at most "
        f"{apart[later:].max():.3f} from their mean"
    )
    return Finding(
        "warm-up",
        f"{_said('window', windows)} of {loads.windows} is unlike the later ones ({how}): warm-up "
        "requests. Leave it out",
        windows,
    )
