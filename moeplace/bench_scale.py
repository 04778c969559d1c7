"""The suite `scale` of `bench`: sizes far beyond today's models, and how time and memory grow."""

import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.bounds import lower_bound
from moeplace.evaluate import evaluate
from moeplace.instances import generate
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve

Shape = tuple[int, int, int, int]
Row = dict[str, Any]

#: Layers, experts, slots, ranks.
LARGE: tuple[Shape, ...] = ((64, 1024, 2048, 512), (64, 2048, 4096, 1024))
#: What grows; two slots for each expert but where slots alone grow, so that lines can be straight.
GROWTH: dict[str, tuple[Shape, ...]] = {
    "layers": tuple((n, 256, 512, 64) for n in (32, 64, 128, 256)),
    "experts and slots": tuple((32, n, 2 * n, 64) for n in (256, 512, 1024, 2048, 4096)),
    "slots": tuple((32, 256, n, 64) for n in (512, 1024, 2048, 4096)),
    "ranks": tuple((32, 1024, 2048, n) for n in (32, 64, 128, 256, 512)),
    "all of a layer": tuple((32, n, 2 * n, n // 2) for n in (256, 512, 1024, 2048)),
}
#: What is measured, and its name in the table.
MEASURED = {
    "construct": "first plan, CPU",
    "solve": "to gap 0.001, CPU",
    "bound": "bound, CPU",
    "added": "memory added",
}
#: Gap whose time is measured.
GAP = 1e-3
#: A solve's limit, in seconds.
LIMIT = 30.0
_SEED = 100


def scale(instances: Path) -> Iterator[Row]:
    """Solve and bound at 512 and 1,024 ranks; growth in L, E, S, G with fitted exponents."""
    for shape in LARGE:
        for routing in ("even", "weighted"):
            found = measured(shape, routing)
            yield {"what": f"{routing}, het", "layers x experts / slots / ranks": _name(shape),
                   **_shown(found)}  # fmt: skip
    for what, shapes in GROWTH.items():
        rows = [measured(shape, "even") for shape in shapes]
        for shape, found in zip(shapes, rows, strict=True):
            yield {"what": f"growth in {what}", "layers x experts / slots / ranks": _name(shape),
                   **_shown(found)}  # fmt: skip
        fits = {}
        for key, label in MEASURED.items():
            # a search that its limit ended says nothing of growth, nor less than a megabyte
            kept = [
                n
                for n, row in enumerate(rows)
                if (key != "solve" or row["gap"] <= GAP * 1.01) and (key != "added" or row[key] > 1)
            ]
            if len(kept) > 2:
                power, off = fitted([size(what, shapes[n]) for n in kept],
                                    [rows[n][key] for n in kept])  # fmt: skip
                fits[label] = f"size^{power:.2f}, within {off:.2f}x"
        yield {"what": f"fit: {what}", **fits}


def fitted(sizes: list[float], values: list[float]) -> tuple[float, float]:
    """Exponent of the power law by least squares in logarithms; the largest factor off it."""
    x, y = np.log(sizes), np.log(values)
    line = np.polyfit(x, y, 1)
    return float(line[0]), float(np.exp(np.abs(y - np.polyval(line, x)).max()))


def measured(shape: Shape, routing: str) -> dict[str, float]:
    """CPU seconds and peak memory of one shape, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return pool.submit(_measured, shape, routing).result()


def _measured(shape: Shape, routing: Any) -> dict[str, float]:
    small = generate((2, 16, 24, 4), 0, routing=routing).aggregate()
    solve(small, work_limit=1000)  # kernels loaded
    problem = generate(shape, _SEED, routing=routing).aggregate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found: dict[str, float] = {"before": before}
    cpu = time.process_time()
    bound = lower_bound(problem)
    found["bound"] = time.process_time() - cpu
    first, found["construct"], _ = _timed(problem, time_limit=0.0)
    found["first gap"] = first.gap
    result, found["solve"], found["wall"] = _timed(problem, time_limit=LIMIT, gap=GAP)
    found["gap"], found["worst"] = result.gap, float(result.layers.gap.max())
    found["ratio"] = evaluate(problem, result.plan).imbalance
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["added"] = found["peak"] - before
    assert bound.total <= result.objective * (1 + 1e-9)
    return found


def _timed(problem: Problem, **how: Any) -> tuple[Result, float, float]:
    """A result, CPU and wall seconds: the median of five where they are short."""
    times: list[tuple[float, float]] = []
    while len(times) < (5 if not times or times[0][0] < 1.0 else 1):
        cpu, began = time.process_time(), time.perf_counter()
        result = solve(problem, **how)
        times.append((time.process_time() - cpu, time.perf_counter() - began))
    cpu, wall = np.median(times, axis=0)
    return result, float(cpu), float(wall)


def _shown(found: dict[str, float]) -> dict[str, str]:
    return {
        MEASURED["bound"]: f"{found['bound']:.4f} s",
        MEASURED["construct"]: f"{found['construct']:.3f} s",
        "its gap": f"{found['first gap']:.1e}",
        MEASURED["solve"]: f"{found['solve']:.3f} s",
        "wall": f"{found['wall']:.2f} s",
        "gap": f"{found['gap']:.1e}",
        "worst layer's gap": f"{found['worst']:.1e}",
        "peak memory": f"{found['peak']:.0f} MB",
        MEASURED["added"]: f"{found['added']:.1f} MB",
    }


def _name(shape: Shape) -> str:
    return "{} x {:,} / {:,} / {:,}".format(*shape)


def size(what: str, shape: Shape) -> float:
    """What grows of a shape."""
    layers, experts, slots, ranks = shape
    return float({"layers": layers, "slots": slots, "ranks": ranks}.get(what, experts))
