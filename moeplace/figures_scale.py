"""The figure of `docs/scale.md`: how time grows with size, from the table of `bench scale`."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moeplace.bench_scale import GAP, GROWTH, MEASURED, fitted, size
from moeplace.errors import FormatError
from moeplace.figures import INK, STYLES, axis, dressed, plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

#: A power law is drawn where no point is off it by more than this factor.
STRAIGHT = 1.5
#: By what grows: sizes, values, and whether each was reached (not ended by its time limit).
Growth = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[bool]]]


def read_growth(table: str) -> dict[str, Growth]:
    """Growth of each measured quantity, from the Markdown table of `bench scale`.

    Raises
    ------
    FormatError
        If a growth's rows are not in the table.
    """
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in table.splitlines() if line.startswith("|")]  # fmt: skip
    found: dict[str, Growth] = {}
    for key in ("construct", "solve"):
        lines = {}
        for what, shapes in GROWTH.items():
            mine = [row for row in rows[2:] if row[0] == f"growth in {what}"]
            if not rows or MEASURED[key] not in rows[0] or len(mine) != len(shapes):
                raise FormatError(
                    f"No growth in {what} in this table: make it anew with moeplace bench scale."
                )
            at, gap = rows[0].index(MEASURED[key]), rows[0].index("gap")
            lines[what] = (
                [size(what, shape) for shape in shapes],
                [float(re.findall(r"[\d.]+", row[at])[0]) for row in mine],
                [key != "solve" or float(row[gap]) <= 1.01 * GAP for row in mine],
            )
        found[MEASURED[key]] = lines
    return found


def growth(panels: Mapping[str, Growth]) -> "Figure":
    """Times over size, both in a log scale; power laws dotted where they hold, unreached open.

    Parameters
    ----------
    panels : mapping of what is measured to `Growth`
        Sizes are drawn as multiples of the smallest.
    """
    go = plotly()
    figure = go.Figure()
    wide = 1.0 / max(len(panels), 1)
    for number, (label, lines) in enumerate(panels.items()):
        place = "" if number == 0 else str(number + 1)
        ends = []
        for (what, (sizes, values, reached)), style in zip(lines.items(), STYLES, strict=False):
            colour, dash, marker = style
            times = np.asarray(sizes) / sizes[0]
            symbols = [marker if fine else f"{marker}-open" for fine in reached]
            figure.add_scatter(
                x=times, y=values, mode="lines+markers", name=what, xaxis=f"x{place}",
                yaxis=f"y{place}", line={"color": colour, "dash": dash, "width": 2},
                marker={"color": colour, "symbol": symbols, "size": 9},
                hovertemplate=f"{what} x %{{x:g}}: %{{y:.3g}} s<extra>{label}</extra>",
            )  # fmt: skip
            kept = [n for n, fine in enumerate(reached) if fine]
            name = what
            if len(kept) > 2:
                sound, seconds = times[kept], np.asarray(values)[kept]
                power, off = fitted(list(sound), list(seconds))
                name += f", ^{power:.1f}" if off < STRAIGHT else ", not straight"
                start = np.exp(np.mean(np.log(seconds) - power * np.log(sound)))
                if off < STRAIGHT:
                    figure.add_scatter(
                        x=sound, y=start * sound**power, mode="lines", hoverinfo="skip",
                        name=f"fit: {what}", xaxis=f"x{place}", yaxis=f"y{place}",
                        line={"color": INK, "dash": "dot", "width": 1},
                    )  # fmt: skip
            ends.append((name, float(np.log10(values[-1])), colour))
        every = [value for _, values, _ in lines.values() for value in values]
        low, high = np.log10(min(every)) - 0.2, np.log10(max(every)) + 0.2
        lowest = -np.inf
        right = max(np.log10(sizes[-1] / sizes[0]) for sizes, _, _ in lines.values())
        for name, y, colour in sorted(ends, key=lambda end: end[1]):
            lowest = max(y, lowest + 0.06 * (high - low))  # names do not cover each other
            figure.add_annotation(
                text=name, x=right, y=lowest, xref=f"x{place}", yref=f"y{place}", xanchor="left",
                xshift=10, showarrow=False, font={"color": INK}, bordercolor=colour,
                borderwidth=1, borderpad=2, bgcolor="rgba(255,255,255,0.85)",
            )  # fmt: skip
        left = number * wide
        figure.layout[f"xaxis{place}"] = axis(
            "times the smallest size", type="log", domain=[left, left + wide - 0.08],
            anchor=f"y{place}", tickvals=[1, 2, 4, 8, 16], range=[-0.05, 1.9],
        )  # fmt: skip
        figure.layout[f"yaxis{place}"] = axis(
            f"{label} (s)", type="log", anchor=f"x{place}",
            range=[low, high], dtick=1,
        )  # fmt: skip
    return dressed(figure, height=460)
