"""`instances/best_known.csv`: the best known value of instances, and the check of each row.

A row holds the instance, the routing, its objective, a lower bound and what proves it, and the
method and work limit that find a plan of that value again, bit for bit, with the digests of plan
and certificate. `check` finds it, prices the plan by `evaluate`, has the certificate verified in
rational numbers, and refuses a row of which anything comes out otherwise.
"""

import csv
import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moeplace import certificate
from moeplace._files import write_text
from moeplace.bench_case import real_instances
from moeplace.errors import CertificateError, FormatError, MoeplaceError
from moeplace.instances import read_instance
from moeplace.problem import Problem
from moeplace.result import Result
from moeplace.solve import solve
from moeplace.sweep import as_done

COLUMNS = (
    "instance", "routing", "objective", "lower_bound", "proof", "method", "work_limit",
    "plan_digest", "certificate_digest",
)  # fmt: skip
#: Relative difference at which a value counts as another one.
SAME = 1e-9
#: Search steps a layer of rows of small and of real instances.
STEPS, NEW_STEPS = 200_000, 1_000_000
BRUTE = "brute force"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One row, and why it is refused; empty if it was reproduced."""

    instance: str
    routing: str
    refused: str
    bound: str  # who vouches for the bound: "certified", or what is only claimed


def check(folder: Path, only: str = "", jobs: int = 1) -> Iterator[Checked]:
    """Reproduce every row of the folder's table whose instance begins with `only`.

    With several jobs, rows come as they are done.

    Raises
    ------
    FormatError
        If the table is not there or not one.
    """
    rows = [row for row in _rows(folder / "best_known.csv") if row["instance"].startswith(only)]
    yield from as_done(_checked, [(folder, row) for row in rows], jobs)


def _checked(folder: Path, row: dict[str, str]) -> Checked:
    bound = refused = ""
    try:
        bound = _reproduced(folder, row)
    except MoeplaceError as cause:
        refused = str(cause)
    return Checked(instance=row["instance"], routing=row["routing"], refused=refused, bound=bound)


def _reproduced(folder: Path, row: dict[str, str]) -> str:
    """Raise CertificateError unless the row holds; say what its bound rests on."""
    try:
        value, least = float(row["objective"]), float(row["lower_bound"])
        work = int(row["work_limit"])
    except ValueError as cause:
        raise FormatError(f"A number is missing or wrong: {cause}.") from cause
    problem = _problem(folder, row["instance"], row["routing"])
    result = solve(problem, row["method"], work_limit=work, gap=0.0)
    if result.evaluation is None:
        raise CertificateError(f"No plan was found ({result.status}): {result.reason}")
    found, proven = result.objective, result.lower_bound
    slack = SAME * max(abs(value), 1e-300)
    if found < value - slack:
        raise CertificateError(
            f"The value {value!r} is not the best: a plan costs {found!r}. Update it."
        )
    if not found <= value + slack:
        raise CertificateError(
            f"The value {value!r} could not be reproduced: the plan costs {found!r}."
        )
    if not least <= value + slack:
        raise CertificateError(f"The bound {least!r} is above the value {value!r}.")
    if least < proven * (1 - SAME):
        raise CertificateError(f"The bound {least!r} is not the best: {proven!r} was proven.")
    if row["plan_digest"] != plan_digest(result):
        raise CertificateError("The plan has this value but is another one than was recorded.")
    if row["certificate_digest"] != certificate_digest(result):
        raise CertificateError("The certificate holds but is another one than was recorded.")
    if proven >= least * (1 - SAME):
        return "certified"
    if row["proof"] == BRUTE:
        return f"claimed by {BRUTE}; certified up to {proven!r}"
    raise CertificateError(f"The bound {least!r} could not be reproduced: {proven!r} was proven.")


def update(folder: Path, steps: int = NEW_STEPS) -> Iterator[str]:
    """Solve every instance of the table, and every real one under both routings; rewrite it.

    Values and bounds by brute force stay as they are: nothing here could prove them.
    """
    table = folder / "best_known.csv"
    rows = []
    for row in _rows(table):
        if row["proof"] == BRUTE:
            problem = _problem(folder, row["instance"], row["routing"])
            work = STEPS * problem.layers
            result = solve(problem, work_limit=work, gap=0.0)
            rows.append(row | _found(result, work))
    for path in real_instances(folder):
        for routing in ("even", "weighted"):
            name = f"real/{path.stem}"
            problem = _problem(folder, name, routing)
            work = steps * problem.layers
            result = solve(problem, work_limit=work, gap=0.0)
            rows.append({
                "instance": name, "routing": routing, "objective": repr(result.objective),
                "lower_bound": repr(result.lower_bound), "proof": " ".join(result.bound.sources),
                **_found(result, work),
            })  # fmt: skip
            yield f"{name} {routing}: gap {result.gap:.1e}"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(table, text.getvalue())


def _found(result: Result, work: int) -> dict[str, str]:
    """What finds a result again, and what it is told by."""
    return {
        "method": result.method, "work_limit": str(work), "plan_digest": plan_digest(result),
        "certificate_digest": certificate_digest(result),
    }  # fmt: skip


def plan_digest(result: Result) -> str:
    """SHA-256 of the problem's digest and the plan's slots."""
    state = hashlib.sha256(result.problem.digest().encode())
    state.update(np.ascontiguousarray(result.plan.slots, dtype="<i8").tobytes())
    return state.hexdigest()


def certificate_digest(result: Result) -> str:
    """Digest of the result's certificate, which is verified.

    Raises
    ------
    CertificateError
        If it does not hold.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "certificate.json"
        certificate.write_certificate(result, path)
        certificate.check(path)
        return certificate.digest(path)


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
