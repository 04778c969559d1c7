"""Figures of tables of runs: how fast, how near and how good methods are, over instances.

Each takes data and returns a plotly figure, as those of `moeplace.figures`. Runs that were cut off
are not drawn where they did not arrive: they only lower shares and raise medians.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moeplace._check import FloatArray
from moeplace.figures import (
    GAPS,
    LEAST_GAP,
    axis,
    dressed,
    gap_axis,
    label,
    name_ends,
    plotly,
    styles,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def profile(shares: Mapping[str, FloatArray], factors: FloatArray) -> "Figure":
    """Performance profile: share of instances solved within a factor of the fastest method.

    Parameters
    ----------
    shares : mapping of method to array [points]
    factors : array [points]
        From 1, as of `moeplace.bench_stats.performance_profile`. Lines go on to the right of the
        last one, where nothing changes.
    """
    at = np.append(factors, max(10.0, 1.3 * factors[-1]))
    longer = {name: np.append(share, share[-1]) for name, share in shares.items()}
    return _steps(longer, at, "factor of the fastest time (log)", "%{x:.3g} times", "~g")


def gap_curve(gaps: Mapping[str, FloatArray]) -> "Figure":
    """Share of instances within a gap, in a log scale; runs without a plan have an infinite one.

    Parameters
    ----------
    gaps : mapping of method to array [instances]
    """
    known = [gap[np.isfinite(gap)] for gap in gaps.values()]
    at = np.unique(np.maximum(np.concatenate([*known, [LEAST_GAP]]), LEAST_GAP))
    shares = {
        name: np.searchsorted(np.sort(np.maximum(gap, LEAST_GAP)), at, side="right") / gap.size
        for name, gap in gaps.items()
    }
    figure = _steps(shares, at, "gap to the proven bound (log)", "gap %{x:.2e}", GAPS, named=False)
    # Names lie on their lines, each at another height: all may end at the same place.
    heights = np.linspace(0.25, 0.85, max(len(shares), 1))
    order = sorted(shares, key=lambda name: float(at[np.searchsorted(shares[name], 0.5)])
                   if shares[name][-1] >= 0.5 else np.inf)  # fmt: skip
    signs = dict(zip(shares, styles(len(shares)), strict=True))
    for name, height in zip(order, heights, strict=True):
        height = min(height, float(shares[name][-1]))
        x = at[min(np.searchsorted(shares[name], height), at.size - 1)]
        figure.add_annotation(
            x=np.log10(x), y=height, xanchor="right", xshift=-6, **label(name, signs[name][0])
        )
    return figure


def gap_over_time(seconds: FloatArray, gaps: Mapping[str, FloatArray]) -> "Figure":
    """Median gap over the seconds of a run, both in log scales; the band holds the middle half.

    Parameters
    ----------
    seconds : array [points]
        Positive, ascending.
    gaps : mapping of method to array [instances, points]
        Of the best plan at that time; infinite while there is none. A median or quartile that is
        infinite is not drawn.
    """
    figure = plotly().Figure()
    ends = []
    for (name, rows), (colour, dash, _) in zip(gaps.items(), styles(len(gaps)), strict=True):
        low, middle, high = np.quantile(
            np.maximum(rows, LEAST_GAP), (0.25, 0.5, 0.75), axis=0, method="inverted_cdf"
        )
        whole = np.isfinite(high)
        band = {"x": seconds[whole], "mode": "lines", "hoverinfo": "skip", "showlegend": False}
        band |= {"line": {"width": 0, "shape": "hv"}}
        figure.add_scatter(y=low[whole], **band)
        figure.add_scatter(y=high[whole], fill="tonexty", fillcolor=_pale(colour), **band)
        there = np.isfinite(middle)
        figure.add_scatter(
            x=seconds[there], y=middle[there], mode="lines", name=name,
            line={"color": colour, "dash": dash, "shape": "hv"},
            hovertemplate="%{x:.3g} s: median gap %{y:.2e}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        if there.any():
            ends.append((name, float(np.log10(middle[there][-1])), colour))
    name_ends(figure, ends, floor=0.35)
    figure.update_layout(
        xaxis=axis("seconds (log)", type="log", dtick=1, tickformat="~g"),
        yaxis=gap_axis("gap to the proven bound (log)", list(gaps.values())),
    )
    return dressed(figure, height=380, right=130)


def ratio_by_method(ratios: Mapping[str, FloatArray], instances: Sequence[str]) -> "Figure":
    """Imbalance ratio less 1 of each instance, in a log scale, with quartiles; one row a method.

    Parameters
    ----------
    ratios : mapping of method to array [instances]
        From 1; nan where a method has no plan.
    instances : sequence of str
        Names of the instances.
    """
    figure = plotly().Figure()
    for (name, found), (colour, _, marker) in zip(ratios.items(), styles(len(ratios)), strict=True):
        there = np.isfinite(found)
        figure.add_box(
            x=np.maximum(found[there] - 1, LEAST_GAP), name=name, orientation="h",
            boxpoints="all", jitter=0.6, pointpos=0, fillcolor="rgba(0,0,0,0)",
            line={"color": colour}, marker={"color": colour, "symbol": marker, "size": 4},
            text=[instances[i] for i in np.flatnonzero(there).tolist()], hoveron="points",
            hovertemplate="%{text}: ratio 1 + %{x:.3g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=axis("imbalance ratio less 1 (log)", type="log", dtick=1, exponentformat="power"),
        yaxis={**axis(""), "autorange": "reversed", "automargin": True},
    )
    return dressed(figure, height=110 + 56 * len(ratios))


def _steps(
    shares: Mapping[str, FloatArray],
    at: FloatArray,
    title: str,
    what: str,
    ticks: str,
    named: bool = True,
) -> "Figure":
    """Shares of instances as steps over a log scale, each named where it ends."""
    figure = plotly().Figure()
    signs = styles(len(shares))
    for (name, share), (colour, dash, _) in zip(shares.items(), signs, strict=True):
        figure.add_scatter(
            x=at, y=share, mode="lines", name=name,
            line={"color": colour, "dash": dash, "shape": "hv"},
            hovertemplate=f"{what}: %{{y:.0%}} of instances<extra>%{{fullData.name}}</extra>",
        )  # fmt: skip
    ends = [(name, float(share[-1]), style[0])
            for (name, share), style in zip(shares.items(), signs, strict=True)]  # fmt: skip
    if named:
        name_ends(figure, ends, floor=0.08, ceiling=1.0)
    figure.update_layout(
        xaxis=axis(title, type="log", dtick=1, tickformat=ticks),
        yaxis=axis("share of instances", tickformat=".0%", range=[0, 1.05]),
    )
    return dressed(figure, height=380, right=130 if named else 20)


def _pale(colour: str) -> str:
    """The colour of a band: a line's, mostly transparent."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
