"""Figures of loads, plans, bounds and searches: each takes data and returns a plotly figure.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart, and cividis for heat
maps. Lines are named where they end, so that no legend is needed; backgrounds are transparent and
inks a middle grey, readable on light and dark pages. Needs `pip install 'moeplace[report]'`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import MissingExtraError
from moeplace.result import Progress
from moeplace.result import gap as over
from moeplace.tradeoff import Point
from moeplace.whatif import Answer

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
)  # fmt: skip
#: Colour, dash and marker of each plan, in their order: three signs, so that one is enough.
STYLES = (
    (VERMILION, "solid", "circle"),
    (SKY, "dash", "square"),
    (PURPLE, "dot", "diamond"),
    (ORANGE, "dashdot", "cross"),
    (GREEN, "longdash", "triangle-up"),
    (BLUE, "solid", "triangle-down"),
)
#: Gaps on axes, as per cent: 0.002%.
GAPS = "~%"
INK, GRID = "#767676", "rgba(128,128,128,0.25)"
#: Gaps below this are drawn there: a log scale has no zero.
LEAST_GAP = 1e-7


def plotly() -> Any:
    """`plotly.graph_objects`.

    Raises
    ------
    MissingExtraError
        If plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError as cause:
        raise MissingExtraError("Figures need plotly: pip install 'moeplace[report]'.") from cause
    return plotly.graph_objects


def rank_times(
    times: Mapping[str, FloatArray],
    *,
    label: str = "time",
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """Heat maps of rank times, plans side by side under one colour scale.

    Parameters
    ----------
    times : mapping of plan to array [layers, ranks]
        In seconds, or over the layers' bounds.
    label : str
        What the numbers are.
    limits : (low, high), optional
        Ends of the colour scale; by default those of the data.
    """
    go = plotly()
    low, high = limits or span(times)
    figure = go.Figure()
    wide = 1.0 / max(len(times), 1)
    for number, (name, rows) in enumerate(times.items()):
        place = "" if number == 0 else str(number + 1)
        figure.add_heatmap(
            z=np.asarray(rows, dtype=np.float32),
            coloraxis="coloraxis",
            xaxis=f"x{place}",
            yaxis=f"y{place}",
            name=name,
            hovertemplate=f"layer %{{y}}, rank %{{x}}: %{{z:.5g}} {label}<extra>%{{fullData.name}}"
            "</extra>",
        )
        left = number * wide
        figure.layout[f"xaxis{place}"] = axis(
            "rank", domain=[left, left + wide - (0.06 if number < len(times) - 1 else 0)]
        )
        figure.layout[f"yaxis{place}"] = axis(
            "layer" if number == 0 else "", autorange="reversed", anchor=f"x{place}"
        )
        figure.add_annotation(
            text=shown(name), x=left, y=1.0, xref="paper", yref="paper", xanchor="left",
            yanchor="bottom", showarrow=False,
        )  # fmt: skip
    figure.update_layout(
        coloraxis={
            "colorscale": "Cividis",
            "cmin": low,
            "cmax": high,
            "colorbar": {"title": {"text": label, "side": "right"}, "thickness": 12},
        }
    )
    return dressed(figure, height=460)


def span(times: Mapping[str, FloatArray]) -> tuple[float, float]:
    """Least and largest of all numbers: the ends of one colour scale."""
    low = min(float(np.min(rows)) for rows in times.values())
    high = max(float(np.max(rows)) for rows in times.values())
    return (low, high) if high > low else (low, low + max(abs(low), 1.0) * 1e-9)


def layer_bounds(
    makespans: Mapping[str, FloatArray], bound: FloatArray, *, unit: str = "s"
) -> "Figure":
    """Each plan's slowest rank by layer and the proven bound; below, gaps in a log scale.

    Parameters
    ----------
    makespans : mapping of plan to array [layers]
    bound : array [layers]
    unit : str
    """
    figure = plotly().Figure()
    layers = np.arange(bound.size)
    figure.add_bar(
        x=layers, y=bound, marker_color="rgba(128,128,128,0.35)", name="bound",
        hovertemplate=f"layer %{{x}}: no plan is below %{{y:.6g}} {unit}<extra>bound</extra>",
    )  # fmt: skip
    for (name, cost), style in zip(makespans.items(), styles(len(makespans)), strict=True):
        colour, dash, marker = style
        line = {"color": colour, "dash": dash, "width": 2, "shape": "hvh"}
        figure.add_scatter(
            x=layers, y=cost, mode="lines", line=line, name=name,
            hovertemplate=f"layer %{{x}}: %{{y:.6g}} {unit}<extra>%{{fullData.name}}</extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=layers, y=np.maximum(over(cost, bound), LEAST_GAP), yaxis="y2", mode="markers",
            marker={"color": colour, "symbol": marker, "size": 6}, name=name,
            hovertemplate="layer %{x}: gap %{y:.2e}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    name_ends(
        figure,
        [(name, float(np.log10(max(over(cost, bound)[-1], LEAST_GAP))), style[0])
         for (name, cost), style in zip(makespans.items(), styles(len(makespans)), strict=True)],
        axis="y2", floor=0.28,
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("layer", anchor="y2"),
        yaxis=axis(f"time ({unit})", domain=[0.55, 1.0], rangemode="tozero"),
        yaxis2=gap_axis(
            "gap (log)", [over(cost, bound) for cost in makespans.values()], domain=[0.0, 0.45]
        ),
    )
    return dressed(figure, height=480, right=130)


def load_curve(tokens: FloatArray) -> "Figure":
    """Lorenz curves of expert loads: share of tokens that the busiest experts take.

    Parameters
    ----------
    tokens : array [layers, experts]
        Layers without a token are left out.
    """
    figure = plotly().Figure()
    rows = np.sort(tokens[tokens.sum(axis=1) > 0], axis=1)[:, ::-1]
    share = np.linspace(0.0, 1.0, tokens.shape[1] + 1)
    figure.add_scatter(
        x=share, y=share, mode="lines", line={"color": INK, "dash": "dot"}, name="all equal",
        hoverinfo="skip",
    )  # fmt: skip
    named = [("all equal", 0.5, INK)]
    if rows.size:
        curves = np.pad(rows.cumsum(axis=1), ((0, 0), (1, 0))) / rows.sum(axis=1, keepdims=True)
        area = curves.mean(axis=1)
        order = np.argsort(area)
        low, middle, high = curves[order[0]], np.median(curves, axis=0), curves[order[-1]]
        band = {"x": share, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(y=curves.min(axis=0), **band)
        figure.add_scatter(
            y=curves.max(axis=0), fill="tonexty", fillcolor="rgba(0,114,178,0.18)", **band
        )
        for name, curve, colour, dash in (
            ("most even layer", low, SKY, "dash"),
            ("median", middle, BLUE, "solid"),
            ("least even layer", high, VERMILION, "dashdot"),
        ):
            figure.add_scatter(
                x=share, y=curve, mode="lines", line={"color": colour, "dash": dash}, name=name,
                hovertemplate="the busiest %{x:.1%} of experts take %{y:.1%} of the tokens"
                "<extra>%{fullData.name}</extra>",
            )  # fmt: skip
            named.append((name, float(curve[curve.size // 2]), colour))
    name_ends(figure, named, floor=0.07, at=0.5, left=True)
    figure.update_layout(
        xaxis=axis("share of experts, busiest first", tickformat=".0%", range=[0, 1]),
        yaxis=axis("share of tokens", tickformat=".0%", range=[0, 1.02]),
    )
    return dressed(figure, height=380)


def rank_speeds(speeds: FloatArray, slots: IntArray) -> "Figure":
    """Speed of each rank over the mean of all; hover tells its slots."""
    figure = plotly().Figure()
    relative = speeds / speeds.mean()
    figure.add_bar(
        x=np.arange(speeds.size), y=relative - 1, customdata=slots, marker_color=BLUE,
        hovertemplate="rank %{x}: %{y:+.2%} of the mean speed, %{customdata} slots<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("rank"), yaxis=axis("speed against the mean", tickformat="+.0%")
    )
    return dressed(figure, height=260)


def replicas(plans: Mapping[str, IntArray], tokens: FloatArray) -> "Figure":
    """Replicas by popularity of the expert, mean over layers.

    Parameters
    ----------
    plans : mapping of plan to array [layers, experts]
        Replicas of each expert.
    tokens : array [layers, experts]
    """
    figure = plotly().Figure()
    order = np.argsort(-tokens, axis=1, kind="stable")
    place = np.arange(1, tokens.shape[1] + 1)
    ends = []
    for (name, count), (colour, dash, _) in zip(plans.items(), styles(len(plans)), strict=True):
        mean = np.take_along_axis(count, order, axis=1).mean(axis=0)
        figure.add_scatter(
            x=place, y=mean, mode="lines", name=name,
            line={"color": colour, "dash": dash, "shape": "hvh"},
            hovertemplate="expert %{x} by load: %{y:.2f} replicas<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        ends.append((name, float(np.log10(max(mean[0], 1e-3))), colour))
    name_ends(figure, ends, floor=0.07, at=0.0, left=True)
    figure.update_layout(
        xaxis=axis(
            "experts of a layer, busiest first (log)",
            type="log",
            tickvals=[1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000],
        ),
        yaxis=axis("replicas (log)", type="log", tickvals=[1, 2, 4, 8, 16, 32, 64, 128]),
    )
    return dressed(figure, height=360)


def moves(received: Mapping[str, IntArray]) -> "Figure":
    """Copies that ranks must receive, by layer [layers], for each plan."""
    figure = plotly().Figure()
    ends = []
    for (name, count), (colour, dash, _) in zip(
        received.items(), styles(len(received) + 1)[1:], strict=True
    ):
        figure.add_scatter(
            x=np.arange(count.size), y=count, mode="lines", name=name,
            line={"color": colour, "dash": dash, "shape": "hvh"},
            hovertemplate="layer %{x}: %{y} copies<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        ends.append((name, float(count[-1]), colour))
    most = max((float(count.max()) for count in received.values()), default=1.0)
    name_ends(figure, ends, floor=0.13 * max(most, 1.0))
    figure.update_layout(xaxis=axis("layer"), yaxis=axis("copies received", rangemode="tozero"))
    return dressed(figure, height=300, right=130)


def pareto(points: Sequence[Point], *, unit: str = "s", moved: str = "bytes") -> "Figure":
    """Step time against what is moved, and what no plan under the same budget beats.

    Parameters
    ----------
    points : sequence of Point
        Of `moeplace.tradeoff`.
    unit : str
        Of times.
    moved : {"bytes", "copies"}
    """
    figure = plotly().Figure()
    scale = 1e9 if moved == "bytes" else 1.0
    x = [(point.bytes if moved == "bytes" else point.moves) / scale for point in points]
    what = "GB" if moved == "bytes" else "copies"
    for name, y, colour, dash in (
        ("best plan found", [point.objective for point in points], BLUE, "solid"),
        ("proven bound", [point.lower_bound for point in points], INK, "dot"),
    ):
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", line={"color": colour, "dash": dash}, name=name,
            customdata=["no limit" if point.budget is None else f"at most {point.budget} a layer"
                        for point in points],
            hovertemplate=f"%{{x:,.4g}} {what} moved: %{{y:.6g}} {unit} (%{{customdata}})<extra>"
            "%{fullData.name}</extra>",
        )  # fmt: skip
    price = [point.objective for point in points]
    height = max(max(price) - min(point.lower_bound for point in points), 1e-12)
    name_ends(
        figure,
        [("best plan found", price[0], BLUE), ("proven bound", points[0].lower_bound, INK)],
        floor=0.11 * height, at=x[0], left=True,
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis(f"moved ({what})"), yaxis=axis(f"step time ({unit})", tickformat=".4~s")
    )
    return dressed(figure, height=360)


def convergence(progress: Sequence[Progress], *, unit: str = "s") -> "Figure":
    """Best price and bound over the seconds of a search; below, the gap in a log scale."""
    figure = plotly().Figure()
    x = [each.seconds for each in progress]
    prices = [each.objective for each in progress]
    bounds = [each.lower_bound for each in progress]
    for name, y, colour, dash in (("best plan", prices, BLUE, "solid"),
                                  ("bound", bounds, INK, "dot")):  # fmt: skip
        figure.add_scatter(
            x=x, y=y, mode="lines", name=name,
            line={"color": colour, "dash": dash, "shape": "hv"},
            hovertemplate=f"%{{x:.3g}} s: %{{y:.8g}} {unit}<extra>%{{fullData.name}}</extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=x, y=[max(each.gap, LEAST_GAP) for each in progress], yaxis="y2", mode="lines",
        name="gap", line={"color": BLUE, "shape": "hv"},
        hovertemplate="%{x:.3g} s: gap %{y:.2e}<extra></extra>",
    )  # fmt: skip
    height = max(max(prices) - min(bounds), 1e-12)
    name_ends(
        figure, [("best plan", prices[0], BLUE), ("bound", bounds[0], INK)],
        floor=0.25 * height, at=x[0], left=True,
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("seconds", anchor="y2"),
        yaxis=axis(f"time ({unit})", domain=[0.58, 1.0], tickformat=".5~s"),
        yaxis2=gap_axis("gap (log)", [[each.gap for each in progress]], domain=[0.0, 0.42]),
    )
    return dressed(figure, height=440)


def changes(answers: Sequence[Answer]) -> "Figure":
    """What changes would do to the step time: of the plan found, and at best."""
    figure = plotly().Figure()
    told = [each for each in answers if each.change is not None]
    asked = Counter(each.question for each in told)
    names = [
        "<br>".join(
            shown(line)
            for line in wrap(
                each.question
                if asked[each.question] == 1
                else f"{each.question}, {each.note.split(';')[0]}",
                30,
            )
        )
        for each in told
    ]
    figure.add_bar(
        y=names, x=[each.change for each in told], orientation="h", marker_color=BLUE,
        hovertemplate="%{y}: %{x:+.3%} by the plan found<extra></extra>", name="plan found",
    )  # fmt: skip
    figure.add_scatter(
        y=names, x=[each.at_best for each in told], mode="markers", name="at best (proven)",
        marker={"symbol": "line-ns-open", "size": 16, "color": VERMILION, "line": {"width": 3}},
        hovertemplate="%{y}: %{x:+.3%} at best, proven<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("change of the step time", tickformat="+~%"),
        yaxis={**axis(""), "autorange": "reversed", "automargin": True},
    )
    return dressed(figure, height=90 + 38 * max(len(told), 1))


def styles(count: int) -> list[tuple[str, str, str]]:
    """Styles of so many plans: the last one is always ours, in blue."""
    if count > len(STYLES):
        return [STYLES[i % (len(STYLES) - 1)] for i in range(count - 1)] + [STYLES[-1]]
    return [*STYLES[: count - 1], STYLES[-1]] if count else []


def name_ends(
    figure: Any,
    ends: Sequence[tuple[str, float, str]],
    *,
    floor: float,
    axis: str = "y",
    at: float | None = None,
    left: bool = False,
    ceiling: float = np.inf,
) -> None:
    """Names beside their lines: at the right end, or at x; `floor` apart, none above `ceiling`."""
    ends = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in ends:
        places.append(max(y, places[-1] + floor) if places else y)
    highest = ceiling + floor
    for number in reversed(range(len(places))):
        highest = places[number] = min(places[number], round(highest - floor, 9))
    for (name, _, colour), y in zip(ends, places, strict=True):
        right = {"x": 1.0, "xref": "paper"} if at is None else {"x": at, "xref": "x"}
        figure.add_annotation(
            y=y, yref=axis, xanchor="left", xshift=6 if not left else 8,
            yshift=0 if not left else 8, **label(name, colour), **right,
        )  # fmt: skip


def label(name: str, colour: str) -> dict[str, Any]:
    """A name in a frame of its line's colour, as an annotation."""
    return {
        "text": shown(name), "showarrow": False, "align": "left", "font": {"color": INK},
        "bgcolor": "rgba(255,255,255,0.85)", "bordercolor": colour, "borderwidth": 1,
        "borderpad": 2,
    }  # fmt: skip


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the ink of all figures."""
    return {
        "title": {"text": title},
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": INK,
        "tickcolor": INK,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
    } | more


def gap_axis(title: str, gaps: Sequence[Any], **more: Any) -> dict[str, Any]:
    """A log axis of these gaps in per cent, with few ticks however many decades they span."""
    known = np.concatenate([np.ravel(each) for each in gaps]) if gaps else np.ones(1)
    known = np.maximum(known[np.isfinite(known)], LEAST_GAP)
    decades = np.log10(known.max() / known.min()) if known.size else 1.0
    dtick = "D2" if decades < 1 else int(np.ceil((decades + 1) / 6))
    return axis(title, type="log", tickformat=GAPS, dtick=dtick, **more)


def shown(name: str) -> str:
    """A name as plotly's text: it reads a little HTML."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def dressed(figure: Any, *, height: int, right: int = 20) -> "Figure":
    """The figure in the layout of all figures."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": right, "t": 30, "b": 50},
        showlegend=False,
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": BLUE},
        bargap=0.15,
        dragmode="pan",
    )
    return figure
