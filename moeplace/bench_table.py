"""A table of instances x methods x seeds, one row a run, that goes on where it stopped.

Settings are fixed in ``settings.json`` before the first run; ``runs.csv`` grows by a row a run and
``summary.md`` is made of it. Seeds 0 to 4 were used for tuning and are refused: tables use others.
The clock starts after kernels are loaded. With several jobs at once, runs slow each other down;
the table says how many there were.
"""

import csv
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from moeplace._files import write_json, write_text
from moeplace.bench_stats import by_instance, paired_ratio, shifted_geometric_mean
from moeplace.bounds import lower_bound
from moeplace.errors import FormatError, MoeplaceError, PolicyNotApplicable, ProblemError
from moeplace.evaluate import Evaluation
from moeplace.instances import generate, read_instance
from moeplace.plan import Plan
from moeplace.policies import POLICIES
from moeplace.problem import Problem
from moeplace.result import gap as over
from moeplace.search.split import at_best_shares
from moeplace.solve import METHODS, solve

#: Seeds that parameters were tuned on, and those of generated instances in tables.
TUNING_SEEDS = range(5)
TABLE_SEEDS = range(100, 130)
SHAPES: dict[str, Any] = {
    "A": "A", "B": "B", "C": "C", "D": "D", "tiny": (3, 32, 40, 8),
}  # fmt: skip
SETS = ("real", "real-windows", *SHAPES)
COLUMNS = (
    "set", "instance", "method", "seed", "status", "objective", "lower_bound", "gap", "ratio",
    "worst_layer", "moves", "legal", "wall_seconds", "cpu_seconds", "digest", "reason",
)  # fmt: skip
#: Runs within this of their bound have reached the goal.
GOAL = 1e-3
#: Times below this many seconds count as small in means.
SHIFT = 0.01

Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a table is of, fixed before its first run."""

    sets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    time_limit: float
    jobs: int

    def __post_init__(self) -> None:
        for what, given, known in (
            ("Set", self.sets, SETS),
            ("Method", self.methods, METHODS),
        ):
            for name in given:
                if name not in known:
                    raise ProblemError(f"{what} must be of {', '.join(known)}, got {name!r}.")
        used = sorted(set(self.seeds) & set(TUNING_SEEDS))
        if used or not self.seeds or min(self.seeds) < 0:
            raise ProblemError(
                f"Seeds must be whole numbers from 5 on (0 to 4 were used for tuning), got "
                f"{list(self.seeds)}."
            )
        if not 0 < self.time_limit < float("inf"):
            raise ProblemError(f"The time limit must be positive, got {self.time_limit!r}.")
        if self.jobs < 1:
            raise ProblemError(f"Jobs must be at least 1, got {self.jobs}.")


@dataclass(frozen=True)
class _Run:
    """One row to be."""

    set: str
    instance: str
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.set, self.instance, self.method, str(self.seed))


def fill(
    folder: Path, settings: Settings, instances: Path, told: Callable[[Row], None] | None = None
) -> list[Row]:
    """Run what the folder's table lacks, and write its summary.

    Parameters
    ----------
    folder : path
        Made if it is not there. A table of other settings is refused.
    settings : Settings
    instances : path
        Folder of the shipped instances.
    told : callable, optional
        Gets each new row.

    Raises
    ------
    FormatError
        If the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise FormatError(f"{folder}: cannot be made ({cause.strerror}).") from cause
    _settle(folder, settings)
    table = folder / "runs.csv"
    rows = _kept(table)
    done = {(row["set"], row["instance"], row["method"], row["seed"]) for row in rows}
    missing = [run for run in _runs(settings, instances) if run.key not in done]
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for row in _results(missing, settings, instances):
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
            rows.append(row)
            if told is not None:
                told(row)
    write_text(folder / "summary.md", summary(rows, settings))
    return rows


def _settle(folder: Path, settings: Settings) -> None:
    """Write the settings and the environment, or compare with those that are there."""
    path = folder / "settings.json"
    asked: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        if any(folder.iterdir()):
            raise FormatError(f"{folder}: is not empty and holds no table. Choose another folder.")
        write_json(path, {"settings": asked, "environment": environment()})
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        stored, where = found["settings"], found["environment"]
    except (ValueError, KeyError, TypeError) as cause:
        raise FormatError(f"{path}: is not what bench wrote. Choose another folder.") from cause
    if stored != asked:
        raise FormatError(
            f"{path}: the table there has the settings {stored}, not {asked}. Settings are fixed "
            "before the first run: choose another folder."
        )
    now = environment()
    changed = [
        key for key in ("moeplace", "source", "processor", "numpy") if where.get(key) != now[key]
    ]
    if changed:
        raise FormatError(
            f"{path}: the table there was begun with another {', '.join(changed)}: runs would not "
            "compare. Choose another folder."
        )


def environment() -> dict[str, Any]:
    """What results depend on besides the settings."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    versions = {
        name: importlib.metadata.version(name) for name in ("moeplace", "numpy", "numba", "ortools")
    }
    return {
        **versions,
        "source": source.hexdigest()[:16],
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _kept(table: Path) -> list[Row]:
    """Rows that are whole; a last one that was cut off is run again."""
    if not table.exists():
        write_text(table, ",".join(COLUMNS) + "\n")
        return []
    text = table.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FormatError(f"{table}: has other columns than {', '.join(COLUMNS)}. Remove it.")
    rows = list(reader)
    if whole != text:
        write_text(table, whole)
    return rows


def _runs(settings: Settings, instances: Path) -> Iterator[_Run]:
    for name in settings.sets:
        for instance in names(name, instances):
            for method in settings.methods:
                seeds = settings.seeds if method not in POLICIES else settings.seeds[:1]
                for seed in seeds:
                    yield _Run(name, instance, method, seed)


def names(chosen: str, instances: Path) -> list[str]:
    """Names of the instances of a set."""
    if chosen in SHAPES:
        return [f"{chosen}-{seed}" for seed in TABLE_SEEDS]
    found = sorted(path.stem for path in (instances / "real").glob("*.json"))
    if not found:
        raise FormatError(
            f"No real instances in {instances}: run from a checkout, or name its folder with "
            "--instances."
        )
    return found


def problem(chosen: str, name: str, instances: Path) -> Problem:
    """The problem of a set by name; windows are summed but for "real-windows"."""
    if chosen in SHAPES:
        seed = int(name.rpartition("-")[2])
        return generate(SHAPES[chosen], seed).aggregate()
    found = read_instance(instances / "real" / f"{name}.json")
    return found if chosen == "real-windows" else found.aggregate()


def _results(missing: list[_Run], settings: Settings, instances: Path) -> Iterator[Row]:
    if settings.jobs == 1:
        for run in missing:
            yield measure(run.set, run.instance, run.method, run.seed, settings, instances)
        return
    with ProcessPoolExecutor(settings.jobs, get_context("spawn")) as pool:
        waiting = [
            pool.submit(measure, run.set, run.instance, run.method, run.seed, settings, instances)
            for run in missing
        ]
        for each in as_completed(waiting):
            yield each.result()


def measure(
    chosen: str, name: str, method: str, seed: int, settings: Settings, instances: Path
) -> Row:
    """One run as a row of text."""
    given = problem(chosen, name, instances)
    row = dict.fromkeys(COLUMNS, "")
    row |= {"set": chosen, "instance": name, "method": method, "seed": str(seed)}
    row["digest"] = given.digest()[:16]
    try:
        found, more = (_policy if method in POLICIES else _solved)(given, method, seed, settings)
    except PolicyNotApplicable as cause:
        return row | {"status": "not_applicable", "reason": str(cause)}
    except MoeplaceError as cause:
        return row | {"status": "failed", "reason": f"{type(cause).__name__}: {cause}"}
    row |= more
    if found is None:
        return row
    held = _held(given)
    return row | {
        "objective": repr(found.objective),
        "gap": f"{float(over(found.objective, float(row['lower_bound']))):.6e}",
        "ratio": f"{found.imbalance:.9f}", "worst_layer": f"{found.ratio.max():.9f}",
        "moves": "" if held is None else str(int(found.plan.moves_from(held).sum())),
        "legal": str(found.legal).lower(),
    }  # fmt: skip


def _solved(
    given: Problem, method: str, seed: int, settings: Settings
) -> tuple[Evaluation | None, Row]:
    """A solve within the time limit."""
    solve(given, method, work_limit=1, time_limit=settings.time_limit)  # kernels loaded
    began, cpu = time.perf_counter(), time.process_time()
    result = solve(given, method, time_limit=settings.time_limit, gap=1e-7, seed=seed)
    more = _times(began, cpu) | {
        "status": str(result.status),
        "reason": result.reason,
        "lower_bound": repr(float(result.lower_bound)),
    }
    return result.evaluation, more


def _policy(
    given: Problem, method: str, seed: int, settings: Settings
) -> tuple[Evaluation | None, Row]:
    """A policy's plan, priced as it stands, also where it breaks a rule (two copies on a rank)."""
    POLICIES[method](given)  # kernels loaded
    began, cpu = time.perf_counter(), time.process_time()
    plan = POLICIES[method](given)
    more = _times(began, cpu)
    found = at_best_shares(given, plan)
    status = "feasible" if found.legal else "illegal"
    reason = "" if found.legal else found.violations[0]
    least = min(lower_bound(given).total, found.objective)
    return found, more | {"status": status, "reason": reason, "lower_bound": repr(least)}


def _times(began: float, cpu: float) -> Row:
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"wall_seconds": f"{wall:.6f}", "cpu_seconds": f"{cpu:.6f}"}


def _held(given: Problem) -> Plan | None:
    try:
        return POLICIES["contiguous"](given)
    except PolicyNotApplicable:
        return None


# ------------------------------------------------------------------------------- summary


def summary(rows: Sequence[Row], settings: Settings) -> str:
    """The table in Markdown: means over instances, and ratios to the last method with intervals."""
    base = "auto" if "auto" in settings.methods else settings.methods[-1]
    command = (
        f"moeplace bench --out DIR --sets {','.join(settings.sets)} "
        f"--methods {','.join(settings.methods)} --seeds {','.join(map(str, settings.seeds))} "
        f"--time-limit {settings.time_limit:g} --jobs {settings.jobs}"
    )
    about = (
        f"Ratio: geometric mean of the imbalance ratio over instances. Against {base}: geometric "
        f"mean of step time over {base}'s on the same instance, with a 95 % paired bootstrap "
        "interval. Wall time: shifted geometric mean (10 ms). In goal: share of instances within "
        f"{GOAL:g} of the bound; time-outs count as not."
    )
    lines = [
        "# Benchmark", "", f"Made by `{command}`.", "", about,
    ]  # fmt: skip
    for chosen in settings.sets:
        part = [row for row in rows if row["set"] == chosen]
        lines += ["", f"## {chosen}", ""]
        lines.append(f"| method | instances | ratio | against {base} | in goal | moves | wall |")
        lines.append("|---|---|---|---|---|---|---|")
        lines += [_line(part, method, base) for method in settings.methods]
        lines += _left_out(part)
    return "\n".join(lines) + "\n"


def _line(rows: Sequence[Row], method: str, base: str) -> str:
    mine, theirs = _prices(rows, method), _prices(rows, base)
    if not mine:
        return f"| {method} | 0 | | | | | |"
    priced = [row for row in rows if row["method"] == method and row["objective"]]
    ratios = [float(row["ratio"]) for row in priced]
    in_goal = [float(row["gap"]) <= GOAL and row["legal"] == "true" for row in priced]
    total = len({row["instance"] for row in rows})
    both = [name for name in mine if name in theirs]
    against = ""
    if method != base and both and all(mine[n] > 0 and theirs[n] > 0 for n in both):
        against = str(paired_ratio([mine[n] for n in both], [theirs[n] for n in both]))
    reached = by_instance(np.array(in_goal, dtype=float), [r["instance"] for r in priced])[1]
    wall = shifted_geometric_mean([float(row["wall_seconds"]) for row in priced], SHIFT)
    moves = [float(row["moves"]) for row in priced if row["moves"]]
    moved = f"{np.mean(moves):,.0f}" if moves else ""
    illegal = sum(row["legal"] == "false" for row in priced)
    star = f" ({illegal} illegal)" if illegal else ""
    return (
        f"| {method}{star} | {len(mine)} | {shifted_geometric_mean(ratios, 0):.5f} | {against} | "
        f"{reached.sum() / total:.0%} | {moved} | {wall * 1e3:.1f} ms |"
    )


def _prices(rows: Sequence[Row], method: str) -> dict[str, float]:
    """Mean objective over seeds of each instance that has one."""
    found = [row for row in rows if row["method"] == method and row["objective"]]
    if not found:
        return {}
    labels = [row["instance"] for row in found]
    known, values = by_instance(np.array([float(row["objective"]) for row in found]), labels)
    return dict(zip(known, values.tolist(), strict=True))


def _left_out(rows: Sequence[Row]) -> list[str]:
    """What has no number, in words."""
    said = []
    for method in dict.fromkeys(row["method"] for row in rows):
        without = [row for row in rows if row["method"] == method and not row["objective"]]
        if without:
            why = without[0]["reason"] or without[0]["status"]
            said += ["", f"{method} has no plan in {len(without)} runs, the first: {why}"]
    return said
