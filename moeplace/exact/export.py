"""The formulation as LP or MPS for other solvers, and their solutions read back as plans.

``model.lp`` (or ``.mps``) is written by PuLP. Beside it stand ``model.mst``, a start for the
solver (a line "name value" for each column, as Gurobi and HiGHS read), and ``model.json``: the
instance's digest, the unit of the objective, what the start costs, and which column stands for
which replica.
"""

import tempfile
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from moeplace._files import PathLike, read_bytes, read_json, write_json, write_text
from moeplace.bounds import lower_bound
from moeplace.errors import FormatError, PlanError, ProblemError
from moeplace.evaluate import Evaluation
from moeplace.exact.cbc import to_pulp
from moeplace.exact.model import build, cutoffs
from moeplace.plan import Plan
from moeplace.problem import Problem
from moeplace.search.split import at_best_shares

FORMAT, VERSION = "moeplace-model", 1
Kind = Literal["lp", "mps"]


class _Names(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    digest: str
    unit: float
    time_unit: str
    constant: float
    start_objective: float | None
    layers: list[int]
    held: dict[str, list[list[int]]]


def write_model(problem: Problem, path: PathLike, kind: Kind, start: Evaluation | None) -> float:
    """Write the model, its start and its names; returns the unit of its objective.

    Parameters
    ----------
    problem : Problem
    path : path
        Of the model, ending in .lp or .mps; .mst and .json stand beside it.
    kind : {"lp", "mps"}
    start : Evaluation, optional
        A plan as MIP start; it also bounds makespans that are of interest.

    Raises
    ------
    FormatError
        If a file cannot be written, or the path has another ending.
    """
    target = Path(path)
    if target.suffix != f".{kind}":
        raise FormatError(f"{path}: an {kind} model's name must end in .{kind}.")
    bound = lower_bound(problem)
    cut = np.full(bound.per_layer.shape, np.inf)
    if start is not None:
        cut = cutoffs(problem, bound.per_layer, start, alone=False)
    model = build(problem, range(problem.layers), bound.per_layer, cut)
    hint = None if start is None else model.values(problem, start.plan)
    made, _ = to_pulp(model)
    if model.constant:  # what no plan changes; the formats know no constants
        made.objective += model.constant * made.add_variable("constant", 1.0, 1.0)
    with tempfile.TemporaryDirectory(prefix="moeplace-") as folder:
        file = Path(folder) / f"model.{kind}"
        if kind == "lp":
            made.writeLP(str(file))
        else:
            made.writeMPS(str(file))
        text = file.read_text()
    held: dict[str, list[list[int]]] = {}
    for column, layer, expert, rank in model.held.tolist():
        held.setdefault(model.columns[column], []).append([layer, expert, rank])
    expected = None if start is None else start.objective / model.unit
    write_text(target, text)
    if hint is not None:
        known = np.flatnonzero(~np.isnan(hint)).tolist()
        lines = [f"{model.columns[n]} {hint[n]:.17g}" for n in known]
        write_text(target.with_suffix(".mst"), "\n".join(["# MIP start", *lines]) + "\n")
    write_json(
        target.with_suffix(".json"),
        {
            "format": FORMAT,
            "version": VERSION,
            "digest": problem.digest(),
            "unit": model.unit,
            "time_unit": problem.cluster.time_unit,
            "constant": 0.0,  # to be added to the solver's objective: it is a column
            "start_objective": expected,
            "layers": list(model.layers),
            "held": held,
        },
    )
    return model.unit


def read_solution(problem: Problem, path: PathLike, names: PathLike) -> Plan:
    """Read a solver's solution file as a checked plan, at its best shares.

    Parameters
    ----------
    problem : Problem
        The one that was exported.
    path : path
        Lines of "name value" (Gurobi, SCIP, HiGHS, Xpress), CBC's "number name value cost", or
        CPLEX's XML with name="..." value="...". Lines that name no column are passed over, and
        columns that are not named are 0.
    names : path
        The .json that was written beside the model.

    Raises
    ------
    FormatError
        If a file cannot be read, the names are of another problem, or no replica is named.
    PlanError
        If the solution is no plan, or one that breaks a rule.
    """
    known = read_json(names, _Names, header=(FORMAT, VERSION))
    if known.digest != problem.digest():
        raise FormatError(
            f"{names}: was written for another problem ({known.digest[:16]}...): export it again."
        )
    values = _values(read_bytes(path).decode(), set(known.held))
    if not values:
        raise FormatError(
            f"{path}: names no replica of {names} with a value. Give the solver's solution file."
        )
    held: list[list[list[int]]] = [
        [[] for _ in range(problem.ranks)] for _ in range(problem.layers)
    ]
    for name, value in values.items():
        if value <= 0.5:
            continue
        for layer, expert, rank in known.held[name]:
            if not (layer < problem.layers and rank < problem.ranks and expert < problem.experts):
                raise FormatError(f"{names}: {name} names a replica that does not exist.")
            held[layer][rank].append(expert)
    slots = []
    for layer, ranks in enumerate(held):
        row: list[int] = []
        for rank, (experts, size) in enumerate(
            zip(ranks, problem.cluster.slots.tolist(), strict=True)
        ):
            if len(experts) > size:
                raise PlanError(
                    f"{path}: layer {layer}: the solution puts {len(experts)} replicas on rank "
                    f"{rank}, which has {size} slots."
                )
            row += [*sorted(experts), *[-1] * (size - len(experts))]
        slots.append(row)
    try:
        plan = Plan(slots=slots, rank_slots=problem.cluster.slots, experts=problem.experts)  # type: ignore[arg-type]
        priced = at_best_shares(problem, plan)
    except (PlanError, ProblemError) as error:
        raise PlanError(f"{path}: {error}") from error
    if not priced.legal:
        raise PlanError(f"{path}: the solution breaks a rule: {priced.violations[0]}.")
    return priced.plan


def _values(text: str, names: set[str]) -> dict[str, float]:
    """Values of known names, wherever a line has a name followed by a number."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        words: Any = line.replace('"', " ").replace("=", " = ").split()
        for place, word in enumerate(words):
            if word in names:
                for after in words[place + 1 : place + 6]:
                    try:
                        found[word] = float(after)
                        break
                    except ValueError:
                        continue
                break
    return found
