"""`instances/best_known.csv`: the best known value of instances, and the check of each row.

A row holds the instance, the routing, its objective, a lower bound, what proves that bound, and
the work limit with which `auto` finds a plan of that value again, bit for bit. `check` does so,
prices the plan by `evaluate`, and has the certificate verified in rational numbers.
"""

import csv
import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moeplace._files import write_text
from moeplace.certificate import check as check_certificate
from moeplace.certificate import write_certificate
from moeplace.errors import CertificateError, FormatError, MoeplaceError
from moeplace.instances import read_instance
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve

COLUMNS = (
    "instance", "routing", "objective", "lower_bound", "proof", "work_limit", "plan_digest",
)  # fmt: skip
#: Relative difference at which a value counts as another one.
SAME = 1e-9
#: Search steps a layer: of rows that name no work limit, and of new rows.
STEPS, NEW_STEPS = 200_000, 1_000_000
BRUTE = "brute force"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One row, and why it is refused; empty if it was reproduced."""

    instance: str
    routing: str
    refused: str
    bound: str  # who vouches for the bound: "certified", or what is only claimed


def check(folder: Path, only: str = "") -> Iterator[Checked]:
    """Reproduce every row of the folder's table whose instance begins with `only`.

    Raises
    ------
    FormatError
        If the table is not there or not one.
    """
    for row in _rows(folder / "best_known.csv"):
        if row["instance"].startswith(only):
            try:
                bound = _reproduced(folder, row)
            except MoeplaceError as cause:
                yield Checked(instance=row["instance"], routing=row["routing"],
                              refused=str(cause), bound="")  # fmt: skip
            else:
                yield Checked(instance=row["instance"], routing=row["routing"],
                              refused="", bound=bound)  # fmt: skip


def _reproduced(folder: Path, row: dict[str, str]) -> str:
    """Raise CertificateError unless the row holds; say what its bound rests on."""
    try:
        value, least = float(row["objective"]), float(row["lower_bound"])
        work = int(row["work_limit"] or 0)
    except ValueError as cause:
        raise FormatError(f"A number is missing or wrong: {cause}.") from cause
    problem = _problem(folder, row["instance"], row["routing"])
    result = solve(problem, work_limit=work or STEPS * problem.layers, gap=0.0)
    if result.evaluation is None:
        raise CertificateError(f"No plan was found ({result.status}): {result.reason}")
    slack = SAME * max(abs(value), 1e-300)
    if result.objective < value - slack:
        raise CertificateError(
            f"The value {value!r} is not the best: a plan costs {result.objective!r}. Update it."
        )
    if result.objective > value + slack:
        raise CertificateError(
            f"The value {value!r} could not be reproduced: the plan costs {result.objective!r}."
        )
    if least > value + slack:
        raise CertificateError(f"The bound {least!r} is above the value {value!r}.")
    if row["plan_digest"] and row["plan_digest"] != plan_digest(result):
        raise CertificateError("The plan has this value but is another one than was recorded.")
    with tempfile.TemporaryDirectory() as place:
        write_certificate(result, Path(place) / "certificate.json")
        check_certificate(Path(place) / "certificate.json")
    if result.lower_bound >= least * (1 - SAME):
        return "certified"
    if row["proof"] == BRUTE:
        return f"claimed by {BRUTE}; certified up to {result.lower_bound!r}"
    raise CertificateError(
        f"The bound {least!r} could not be reproduced: {result.lower_bound!r} was proven."
    )


def update(folder: Path, steps: int = NEW_STEPS) -> Iterator[str]:
    """Solve every real instance under both routings and rewrite its rows; the others stay."""
    table = folder / "best_known.csv"
    rows = [row for row in _rows(table) if not row["instance"].startswith("real/")]
    for path in sorted((folder / "real").glob("*.json")):
        for routing in ("even", "weighted"):
            name = f"real/{path.stem}"
            problem = _problem(folder, name, routing)
            work = steps * problem.layers
            result = solve(problem, work_limit=work, gap=0.0)
            rows.append({
                "instance": name, "routing": routing, "objective": repr(result.objective),
                "lower_bound": repr(result.lower_bound),
                "proof": " ".join(result.bound.sources), "work_limit": str(work),
                "plan_digest": plan_digest(result),
            })  # fmt: skip
            yield f"{name} {routing}: gap {result.gap:.1e}"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())


def plan_digest(result: Result) -> str:
    """SHA-256 of the problem's digest and the plan's slots."""
    state = hashlib.sha256(result.problem.digest().encode())
    state.update(np.ascontiguousarray(result.plan.slots, dtype="<i8").tobytes())
    return state.hexdigest()


def _problem(folder: Path, name: str, routing: str) -> Problem:
    return replace(read_instance(folder / f"{name}.json"), routing=routing)  # type: ignore[arg-type]


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        text = table.read_text(encoding="utf-8")
    except OSError as cause:
        raise FormatError(
            f"{table}: cannot be read ({cause.strerror}). Run from a checkout, or name its folder "
            "with --instances."
        ) from cause
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise FormatError(f"{table}: has other columns than {', '.join(COLUMNS)}.")
    return list(reader)
