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
from moeplace.solve import solve

Shape = tuple[int, int, int, int]
Row = dict[str, Any]

#: Layers, experts, slots, ranks.
LARGE: tuple[Shape, ...] = ((64, 1024, 2048, 512), (64, 2048, 4096, 1024))
#: What grows, from the shape of `BASE`; the others stay.
BASE: Shape = (32, 256, 512, 64)
GROWTH: dict[str, tuple[Shape, ...]] = {
    "layers": tuple((n, 256, 512, 64) for n in (32, 64, 128, 256)),
    "experts": tuple((32, n, 2048, 64) for n in (256, 512, 1024, 2048)),
    "slots": tuple((32, 256, n, 64) for n in (512, 1024, 2048, 4096)),
    "ranks": tuple((32, 256, 2048, n) for n in (32, 64, 128, 256, 512)),
    "all of a layer (E, 2 E, E / 2)": tuple((32, n, 2 * n, n // 2) for n in (256, 512, 1024, 2048)),
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
        sizes = [_size(what, shape) for shape in shapes]
        exponents = {
            label: f"size^{exponent(sizes, [row[key] for row in rows]):.2f}"
            for key, label in (("construct", "first plan, CPU"), ("bound", "bound, CPU"),
                               ("solve", f"to gap {GAP:g}, CPU"))
        }  # fmt: skip
        yield {"what": f"fit: {what}", **exponents}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of log(values) over log(sizes), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


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
    began, cpu = time.perf_counter(), time.process_time()
    bound = lower_bound(problem)
    found["bound"] = time.process_time() - cpu
    cpu = time.process_time()
    first = solve(problem, time_limit=0.0)
    found["construct"] = max(time.process_time() - cpu - found["bound"], 1e-4)
    found["first gap"] = first.gap
    cpu, began = time.process_time(), time.perf_counter()
    result = solve(problem, time_limit=LIMIT, gap=GAP)
    found["solve"], found["wall"] = time.process_time() - cpu, time.perf_counter() - began
    found["gap"], found["worst"] = result.gap, float(result.layers.gap.max())
    found["ratio"] = evaluate(problem, result.plan).imbalance
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert bound.total <= result.objective * (1 + 1e-9)
    return found


def _shown(found: dict[str, float]) -> dict[str, str]:
    return {
        "bound, CPU": f"{found['bound']:.2f} s",
        "first plan, CPU": f"{found['construct']:.2f} s",
        "its gap": f"{found['first gap']:.1e}",
        f"to gap {GAP:g}, CPU": f"{found['solve']:.2f} s",
        "wall": f"{found['wall']:.2f} s",
        "gap": f"{found['gap']:.1e}",
        "worst layer's gap": f"{found['worst']:.1e}",
        "peak memory": f"{found['peak']:.0f} MB",
        "of it before the solve": f"{found['before']:.0f} MB",
    }


def _name(shape: Shape) -> str:
    return "{} x {:,} / {:,} / {:,}".format(*shape)


def _size(what: str, shape: Shape) -> float:
    layers, experts, slots, ranks = shape
    return float({"layers": layers, "experts": experts, "slots": slots, "ranks": ranks}.get(
        what, experts))  # fmt: skip
