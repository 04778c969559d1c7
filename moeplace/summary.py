"""What `moeplace loads` says about a file of loads: one record, as JSON or as text."""

from typing import Any

from moeplace._files import PathLike
from moeplace.compare import aligned, printable
from moeplace.diagnose import diagnose, drift
from moeplace.formats.loads import Read
from moeplace.tables import table


def summarise(path: PathLike, read: Read) -> dict[str, Any]:
    """Shape, skew per layer (of the summed windows), drift and findings, as builtin types."""
    loads = read.loads
    summed = loads.aggregate()
    totals = loads.tokens.sum(axis=2)
    skew, gini, zeros = summed.skew()[0], summed.gini()[0], summed.zeros()[0]
    return {
        "file": str(path),
        "format": read.format,
        "detected": read.detected,
        "notes": list(read.notes),
        "shapes": {"windows": loads.windows, "layers": loads.layers, "experts": loads.experts},
        "phase": loads.phase,
        "passes": None if loads.passes is None else loads.passes.tolist(),
        "integral": loads.integral,
        "tokens": float(totals.sum()),
        "window_tokens": totals.sum(axis=1).tolist(),
        "per_layer": [
            {
                "layer": layer,
                "tokens": float(totals[:, layer].sum()),
                "skew": float(skew[layer]),
                "gini": float(gini[layer]),
                "zeros": float(zeros[layer]),
            }
            for layer in range(loads.layers)
        ],
        "drift": drift(loads).tolist(),
        "warnings": [
            {
                "name": finding.name,
                "message": finding.message,
                "windows": list(finding.windows),
                "layers": list(finding.layers),
            }
            for finding in diagnose(loads)
        ],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The record as text, warnings last."""
    shapes, rows, moved = found["shapes"], found["per_layer"], found["drift"]
    how = "told from its content" if found["detected"] else "as asked for"
    windows = shapes["windows"]
    passes = found["passes"]
    kind = "whole counts" if found["integral"] else "means, not counts"
    shape = f"{windows:,} window{'s' * (windows != 1)} x {shapes['layers']} layers x "
    shape += f"{shapes['experts']} experts"
    words = [
        ("file", printable(found["file"])),
        ("format", f"{found['format']} ({how})"),
        *[("note", printable(note)) for note in found["notes"]],
        ("shape", shape),
        ("phase", found["phase"]),
        ("passes", "unknown (--passes)" if passes is None else f"{sum(passes):,.10g} in all"),
        ("assignments", f"{found['tokens']:,.10g} over all layers and windows, {kind}"),
        ("skew", f"max / mean {_spread(rows, 'skew', '.2f')}"),
        ("gini", _spread(rows, "gini", ".3f")),
        ("zeros", f"experts without a token: {_spread(rows, 'zeros', '.1%')}"),
    ]
    if moved:
        last = int(max(range(len(moved)), key=moved.__getitem__))
        said = f"cosine distance to the next window {sum(moved) / len(moved):.4f} on average, "
        said += f"{moved[last]:.4f} at most (window {last} to {last + 1}); noise included"
        words.append(("drift", said))
    cells = [("layer", "assignments", "max/mean", "gini", "zeros")]
    cells += [
        (f"{row['layer']:>5}", f"{row['tokens']:,.10g}", f"{row['skew']:.3f}",
         f"{row['gini']:.3f}", f"{row['zeros']:.1%}")
        for row in rows
    ]  # fmt: skip
    most = max(row["skew"] for row in rows)
    by_layer = table(cells, bars=[row["skew"] / most if most > 0 else 0.0 for row in rows])
    warnings = [(f"warning: {each['name']}", each["message"]) for each in found["warnings"]]
    last_lines = aligned(warnings) if warnings else ["no warnings"]
    return [*aligned(words), "", *by_layer, "", *last_lines]


def _spread(rows: list[dict[str, Any]], key: str, form: str) -> str:
    values = [row[key] for row in rows]
    worst = max(range(len(values)), key=values.__getitem__)
    return (
        f"{sum(values) / len(values):{form}} on average, {values[worst]:{form}} at most "
        f"(layer {rows[worst]['layer']})"
    )
