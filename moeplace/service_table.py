"""Figures of several plans, each over several seeds, side by side."""

import numpy as np

from moeplace.compare import printable
from moeplace.service import Interval
from moeplace.tables import table

#: Figures of each seed's run, by name (`Service.figures`).
Rows = list[dict[str, float]]


def intervals(rows: Rows) -> dict[str, Interval]:
    """Mean of each figure over seeds."""
    return {key: Interval.of([row[key] for row in rows]) for key in rows[0]}


def ratios(rows: Rows, first: Rows) -> dict[str, Interval]:
    """Each figure over the first plan's in the same run: luck that both had cancels."""
    pairs = list(zip(rows, first, strict=True))
    return {
        key: Interval.of([row[key] / base[key] for row, base in pairs])
        for key in rows[0]
        if all(base[key] > 0 for base in first)
    }


def figures(found: dict[str, Rows]) -> list[str]:
    """Lines of the table: figures of each plan, then ratios to the first."""
    names = list(found)
    keys = list(found[names[0]][0])
    rows = [["", *(printable(name) for name in names)]]
    values = {name: intervals(found[name]) for name in names}
    for key in keys:
        rows.append([key, *(_cell(key, values[name][key]) for name in names)])
    over = {name: ratios(found[name], found[names[0]]) for name in names[1:]}
    for key in ("ttft p90", "ttft p99", "tpot p90", "layer", "goodput"):
        if len(names) > 1 and all(key in over[name] for name in names[1:]):
            cells = ["1", *(_ratio(over[name][key]) for name in names[1:])]
            rows.append([f"{key}, ratio", *cells])
    few = "one seed: no intervals" if len(found[names[0]]) < 2 else "+-: 95 % over seeds"
    return [*table(rows), f"{few}; ratios to {printable(names[0])}, paired by seed"]


def _cell(key: str, value: Interval) -> str:
    if "share" in key or "limits" in key:
        shown, unit = 100.0, " %"
    elif "/s" in key or key == "goodput":
        shown, unit = 1.0, ""
    else:
        shown, unit = (1e6, " us") if key == "layer" else (1e3, " ms")
    text = f"{value.mean * shown:,.5g}" if value.mean * shown < 1e5 else f"{value.mean:,.0f}"
    half = "" if np.isinf(value.half) else f" +-{value.half * shown:.2g}"
    return f"{text}{half}{unit}"


def _ratio(value: Interval) -> str:
    return f"{value.mean:.4f}" + ("" if np.isinf(value.half) else f" +-{value.half:.4f}")


def to_json(values: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    """Means and half widths; none where there is one seed."""
    return {
        key: {"mean": each.mean, "half": None if np.isinf(each.half) else each.half}
        for key, each in values.items()
    }
