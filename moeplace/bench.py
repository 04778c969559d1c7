"""Suites of benchmarks, each a generator of rows from the folder of instances, and their tables."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moeplace import bench_live
from moeplace.bench_case import Row, real, targets
from moeplace.bench_dispatch import dispatch, traffic
from moeplace.bench_formulations import formulations
from moeplace.bench_hard import hard
from moeplace.bench_latency import decode_prefill, latency
from moeplace.bench_lns import lns
from moeplace.bench_methods import held_out, methods, node_groups, spread
from moeplace.bench_scale import scale
from moeplace.bench_search import ablation, few_spares, growth
from moeplace.bench_solvers import solvers
from moeplace.bench_symmetry import symmetry
from moeplace.errors import ProblemError

SUITES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "targets": targets,
    "methods": methods,
    "real": real,
    "growth": growth,
    "ablation": ablation,
    "spread": spread,
    "held-out": held_out,
    "few-spares": few_spares,
    "node-groups": node_groups,
    "latency": latency,
    "decode-prefill": decode_prefill,
    "drift": bench_live.drift,
    "drift-real": bench_live.drift_real,
    "moves": bench_live.moves,
    "robust": bench_live.robust,
    "hard": hard,
    "solvers": solvers,
    "formulations": formulations,
    "symmetry": symmetry,
    "lns": lns,
    "dispatch": dispatch,
    "traffic": traffic,
    "scale": scale,
}


def markdown(name: str, rows: Sequence[Row]) -> str:
    """A table of rows, headed by the command that makes it."""
    if name not in SUITES:
        raise ProblemError(f"Suite must be one of {', '.join(SUITES)}, got {name!r}.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    about = (SUITES[name].__doc__ or "").strip().splitlines()[0]
    lines = [f"# {name}", "", about, "", f"Made by `moeplace bench {name}`.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    return "\n".join(lines) + "\n"
