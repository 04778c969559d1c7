"""Problems on disk (our JSON), and problems made up from a seed.

The schema is documented field by field in ``instances/README.md`` of the repository.
"""

import math
from pathlib import Path
from typing import Annotated, Any, assert_never

import msgspec
import numpy as np

from moeplace._check import FloatArray, numbers
from moeplace._files import PathLike, check_full, nested, plain, read_json, write_json
from moeplace.constraints import (
    Constraint,
    Forbid,
    MaxMoves,
    MaxOffNode,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.errors import PlanError, ProblemError
from moeplace.hardware import Cluster, SpeedUnit
from moeplace.latency import Planes, Table
from moeplace.loads import LoadHistogram, Phase
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Objective, Problem, Routing, check_problem

FORMAT, VERSION = "moeplace-instance", 1

#: Published model and deployment sizes: layers, experts, slots, ranks.
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "A": (58, 256, 288, 32),
    "B": (94, 128, 128, 8),
    "C": (58, 256, 320, 64),
    "D": (60, 384, 416, 32),
}
WINDOWS = 16
ASSIGNMENTS = 2_000_000

_Int = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class _Loads(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[list[list[float]]]
    passes: list[float] | None = None
    phase: Phase = "mixed"


class _Planes(msgspec.Struct, forbid_unknown_fields=True):
    startup: list[float]
    activation: list[float]
    compute: list[float]


class _Table(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[list[float]]
    seconds: list[list[float]]


class _Cluster(msgspec.Struct, forbid_unknown_fields=True):
    slots: list[_Int]
    speeds: list[float] | None = None
    nodes: list[_Int] | None = None
    speed_unit: SpeedUnit = "tokens/s"
    planes: _Planes | None = None
    table: _Table | None = None


class _Rule(msgspec.Struct, forbid_unknown_fields=True, tag_field="type"):
    pass


class _Pin(_Rule, tag="pin"):
    expert: _Int
    rank: _Int
    layer: _Int | None = None


class _Forbid(_Pin, tag="forbid"):
    pass


class _MaxMoves(_Rule, tag="max-moves"):
    current: list[list[Annotated[int, msgspec.Meta(ge=EMPTY, le=1 << 20)]]]
    per_layer: int | None = None
    total: int | None = None
    allow_duplicates: bool = False


class _NodeGroups(_Rule, tag="node-groups"):
    groups: _Int | list[_Int]


class _TokenCapacity(_Rule, tag="token-capacity"):
    tokens: float | list[float]


class _MaxReplicas(_Rule, tag="max-replicas"):
    limit: _Int | list[_Int]


class _ReplicaBudget(_Rule, tag="replica-budget"):
    total: int


class _MaxOffNode(_Rule, tag="max-off-node"):
    fraction: float


class InstanceFile(msgspec.Struct, forbid_unknown_fields=True):
    """Our JSON, field by field; `instances/README.md` describes it."""

    format: str
    version: int
    loads: _Loads
    cluster: _Cluster
    name: str = ""
    origin: str = ""
    notes: str = ""
    routing: Routing = "even"
    objective: Objective = "mean"
    constraints: list[
        _Pin
        | _Forbid
        | _MaxMoves
        | _NodeGroups
        | _TokenCapacity
        | _MaxReplicas
        | _ReplicaBudget
        | _MaxOffNode
    ] = []
    base_load: msgspec.Raw = msgspec.Raw(b"null")
    layer_weight: list[float] | None = None
    window_weight: list[float] | None = None
    cvar_alpha: float = 0.9


def shipped(path: PathLike) -> Path:
    """The path; one below ``instances/`` that is not there is looked for among the shipped ones.

    These lie in the installed package, or in the checkout that the package runs from.
    """
    here = Path(path)
    if here.parts[:1] != ("instances",) or ".." in here.parts or here.exists():
        return here
    package = Path(__file__).parent
    for root in (package / "shipped", package.parent):
        if (root / here).exists():
            return root / here
    return here


def read_instance(path: PathLike) -> Problem:
    """Read a problem from our JSON.

    Parameters
    ----------
    path : path
        A file, or the name of a shipped instance (see `shipped`), as in
        ``instances/small/flashlb-even.json``.

    Raises
    ------
    FormatError
        If the file cannot be read, is not JSON or not of the schema: unknown, missing or
        mistyped fields, an unknown version, ragged arrays.
    ProblemError
        If the file is sound but its content breaks a rule, e.g. a negative load. The message
        begins with the path.
    PlanError
        The same for the current plan of a move budget.
    """
    found = path if str(path) == "" else shipped(path)
    return from_file(path, read_json(found, InstanceFile, header=(FORMAT, VERSION)))


def from_file(path: PathLike, file: "InstanceFile", root: str = "$") -> Problem:
    """Build the problem of a file, or of a part of one that starts at `root`; errors as above."""
    check_full(path, file.loads.tokens, f"{root}.loads.tokens", 3)
    base = None
    if bytes(file.base_load) != b"null":
        base = nested(path, file.base_load, f"{root}.base_load", (1, 2, 3))
    for i, rule in enumerate(file.constraints):
        if isinstance(rule, _MaxMoves):
            check_full(path, rule.current, f"{root}.constraints[{i}].current", 2)
    loads, cluster = msgspec.structs.asdict(file.loads), msgspec.structs.asdict(file.cluster)
    planes, table = cluster.pop("planes"), cluster.pop("table")
    try:
        if planes is not None:
            cluster["planes"] = Planes(**msgspec.structs.asdict(planes))
        if table is not None:
            cluster["table"] = Table(**msgspec.structs.asdict(table))
            if cluster["speeds"] is None:
                cluster["speeds"] = cluster["table"].speeds
        elif cluster["speeds"] is None:
            raise ProblemError("Cluster has no speeds: give one for each rank, or a table.")
        problem = Problem(
            LoadHistogram(**loads),
            Cluster(**cluster),
            routing=file.routing,
            objective=file.objective,
            constraints=[_constraint(rule, file) for rule in file.constraints],
            base_load=base,
            layer_weight=file.layer_weight,
            window_weight=file.window_weight,
            cvar_alpha=file.cvar_alpha,
            name=file.name,
            origin=file.origin,
        )
    except (ProblemError, PlanError) as error:
        raise type(error)(f"{path}: {error}") from error
    return problem


def write_instance(problem: Problem, path: PathLike, *, notes: str = "") -> None:
    """Write a problem as JSON; read back, it has the same digest, name and origin.

    Parameters
    ----------
    problem : Problem
    path : path
        Its folder must exist; a file that is there is replaced.
    notes : str
        For people who open the file; `read_instance` passes over it.

    Raises
    ------
    FormatError
        If the file cannot be written. A file that was there stays as it was.
    """
    check_problem(problem)
    write_json(path, as_file(problem, notes))


def as_file(problem: Problem, notes: str = "") -> dict[str, Any]:
    """What `write_instance` writes."""
    loads, cluster = problem.loads, problem.cluster
    file: dict[str, Any] = {"format": FORMAT, "version": VERSION, "name": str(problem.name)}
    file["origin"] = str(problem.origin)
    if notes:
        file["notes"] = str(notes)
    file |= {"routing": problem.routing, "objective": problem.objective}
    file["cluster"] = {
        "speeds": plain(cluster.speeds),
        "speed_unit": cluster.speed_unit,
        "slots": cluster.slots.tolist(),
        "nodes": np.asarray(cluster.nodes).tolist(),
    }
    if cluster.planes is not None:
        file["cluster"]["planes"] = {
            name: plain(getattr(cluster.planes, name))
            for name in ("startup", "activation", "compute")
        }
    if cluster.table is not None:
        file["cluster"]["table"] = {
            "tokens": plain(cluster.table.tokens),
            "seconds": plain(cluster.table.seconds),
        }
    if problem.objective == "cvar":
        file["cvar_alpha"] = float(problem.cvar_alpha)
    if problem.constraints:
        file["constraints"] = [_rule(constraint) for constraint in problem.constraints]
    if problem.base_load.any():
        file["base_load"] = plain(problem.base_load)
    if (problem.layer_weight != 1.0).any():
        file["layer_weight"] = plain(problem.layer_weight)
    if not np.array_equal(problem.window_weight, _default_window_weight(loads)):
        file["window_weight"] = plain(problem.window_weight)
    file["loads"] = {"phase": loads.phase}
    if loads.passes is not None:
        file["loads"]["passes"] = plain(loads.passes)
    file["loads"]["tokens"] = plain(loads.tokens)
    return file


def _default_window_weight(loads: LoadHistogram) -> FloatArray:
    passes = np.ones(loads.windows) if loads.passes is None else loads.passes
    return np.asarray(passes / passes.sum())


def _constraint(rule: _Rule, file: InstanceFile) -> Constraint:
    if isinstance(rule, _MaxMoves):
        current = Plan(
            slots=rule.current,  # type: ignore[arg-type]
            rank_slots=file.cluster.slots,  # type: ignore[arg-type]
            experts=len(file.loads.tokens[0][0]),
            allow_duplicates=rule.allow_duplicates,
        )
        return MaxMoves(current, per_layer=rule.per_layer, total=rule.total)
    kinds: dict[type[_Rule], type[Constraint]]
    kinds = {_Pin: Pin, _Forbid: Forbid, _NodeGroups: NodeGroups, _MaxReplicas: MaxReplicas}
    kinds |= {_TokenCapacity: TokenCapacity, _ReplicaBudget: ReplicaBudget, _MaxOffNode: MaxOffNode}
    return kinds[type(rule)](**msgspec.structs.asdict(rule))


def _rule(constraint: Constraint) -> dict[str, Any]:
    if isinstance(constraint, Pin | Forbid):
        return {
            "type": "pin" if isinstance(constraint, Pin) else "forbid",
            "expert": constraint.expert,
            "rank": constraint.rank,
            "layer": constraint.layer,
        }
    if isinstance(constraint, NodeGroups):
        return {"type": "node-groups", "groups": np.asarray(constraint.groups).tolist()}
    if isinstance(constraint, MaxMoves):
        rule: dict[str, Any] = {"type": "max-moves", "current": constraint.current.slots.tolist()}
        rule |= {"per_layer": constraint.per_layer, "total": constraint.total}
        if constraint.current.allow_duplicates:
            rule["allow_duplicates"] = True
        return rule
    if isinstance(constraint, TokenCapacity):
        return {"type": "token-capacity", "tokens": np.asarray(constraint.tokens).tolist()}
    if isinstance(constraint, MaxReplicas):
        return {"type": "max-replicas", "limit": np.asarray(constraint.limit).tolist()}
    if isinstance(constraint, ReplicaBudget):
        return {"type": "replica-budget", "total": int(constraint.total)}
    if isinstance(constraint, MaxOffNode):
        return {"type": "max-off-node", "fraction": float(constraint.fraction)}
    assert_never(constraint)


def generate(
    shape: str | tuple[int, int, int, int],
    seed: int,
    epoch: int = 0,
    speeds: Any = "het",
    routing: Routing = "even",
) -> Problem:
    """Make up a problem: synthetic loads in 16 windows, ranks of relative speed.

    Popularity alternates from layer to layer between a lognormal one (sigma uniform in 0.7 to
    1.3) and a shuffled power law, (i + 3)^-a for i = 0 .. E - 1 (a uniform in 0.5 to 1.0),
    times lognormal(0.25). Each window jitters it by lognormal(0.15), shares an expected
    125,000 assignments a layer (two million over all windows) by it, and draws Poisson counts.

    Parameters
    ----------
    shape : {"A", "B", "C", "D"} or (layers, experts, slots, ranks)
        Slots are those of all ranks together, dealt as evenly as they divide.
    seed : int
        Loads and speeds come from separate streams of it: neither changes with the other's
        options, nor speeds with `epoch`.
    epoch : int
        Later epochs drift from epoch 0 of the same seed: popularity is multiplied by
        lognormal(0.25) once for each epoch, and window noise is drawn anew.
    speeds : {"equal", "het"}, float or array-like [ranks]
        "equal": all 1. "het": N(1, 0.05) clipped to 0.85 .. 1.15, and one random rank at 0.85.
        A float s >= 0: evenly spaced from v to (1 + s) v with mean 1, so that max / min - 1
        is s, and shuffled; 0 is equal. An array: measured relative speeds, in rank order.
    routing : str
        As in `Problem`.

    Returns
    -------
    Problem
        Mean objective, whole loads, times in token units. The same arguments give the same
        problem under one version of NumPy.

    Raises
    ------
    ProblemError
        If an argument is none of these, or experts do not fit in the slots.
    """
    layers, experts, slots, ranks = _sizes(shape)
    for name, value in (("Seed", seed), ("Epoch", epoch)):
        if not _whole(value) or value < 0:
            raise ProblemError(f"{name} must be a whole number from 0 on, got {value!r}.")
    tokens = _tokens(layers, experts, seed, epoch)
    vector, kind = _speeds(speeds, ranks, seed)
    each, left = divmod(slots, ranks)
    cluster = Cluster.from_speeds(vector, each + (np.arange(ranks) < left), speed_unit="relative")
    sizes = shape if isinstance(shape, str) else f"{layers}x{experts}_{slots}_{ranks}"
    return Problem(
        LoadHistogram(tokens=tokens),
        cluster,
        routing=routing,
        name=f"generated-{sizes}_seed{seed}_epoch{epoch}_{kind.replace(' ', '')}",
        origin=(
            f"Synthetic: moeplace.instances.generate, shape {sizes}, seed {seed}, epoch {epoch}, "
            f"speeds {kind}. No measurement."
        ),
    )


def _sizes(shape: Any) -> tuple[int, int, int, int]:
    if isinstance(shape, str):
        if shape not in SHAPES:
            raise ProblemError(
                f"Shape {shape!r} is unknown: choose one of {', '.join(SHAPES)}, or give "
                "(layers, experts, slots, ranks)."
            )
        return SHAPES[shape]
    try:
        layers, experts, slots, ranks = shape
    except (TypeError, ValueError) as cause:
        raise ProblemError(
            f"Shape must be a letter or (layers, experts, slots, ranks), got {shape!r}."
        ) from cause
    for value in (layers, experts, slots, ranks):
        if not _whole(value) or not 1 <= value <= 1 << 20:
            raise ProblemError(
                "Shape (layers, experts, slots, ranks) must hold whole numbers from 1 to 2**20, "
                f"got {value!r} in {shape!r}."
            )
    return int(layers), int(experts), int(slots), int(ranks)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=key))


def _tokens(layers: int, experts: int, seed: int, epoch: int) -> FloatArray:
    """Token counts [windows, layers, experts]; streams 0 popularity, 1 drift, 2 windows."""
    base = _stream(seed, 0)
    sigma = base.uniform(0.7, 1.3, (layers, 1))
    wide = np.exp(sigma * base.standard_normal((layers, experts)))
    power = base.uniform(0.5, 1.0, (layers, 1))
    place = base.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    steep = (place + 3.0) ** -power * base.lognormal(0.0, 0.25, (layers, experts))
    popularity = np.where(np.arange(layers)[:, None] % 2 == 0, wide, steep)
    for past in range(1, epoch + 1):
        popularity = popularity * _stream(seed, 1, past).lognormal(0.0, 0.25, popularity.shape)
    noise = _stream(seed, 2, int(epoch))
    jittered = popularity * noise.lognormal(0.0, 0.15, (WINDOWS, layers, experts))
    shares = jittered / jittered.sum(axis=2, keepdims=True)
    counts = noise.poisson(shares * (ASSIGNMENTS / WINDOWS))
    return np.asarray(counts, dtype=np.float64)


def _speeds(speeds: Any, ranks: int, seed: int) -> tuple[FloatArray, str]:
    """Relative speeds [ranks] and what to call them; stream 3."""
    stream = _stream(seed, 3)
    if isinstance(speeds, str):
        if speeds == "equal":
            return np.ones(ranks), speeds
        if speeds == "het":
            vector = np.clip(stream.normal(1.0, 0.05, ranks), 0.85, 1.15)
            vector[stream.integers(ranks)] = 0.85
            return vector, speeds
        raise ProblemError(
            f'Speeds {speeds!r} are unknown: choose "equal", "het", a spread such as 0.04, or '
            "give one speed for each rank."
        )
    if isinstance(speeds, float | np.floating) or _whole(speeds):
        if not (math.isfinite(speeds) and speeds >= 0):
            raise ProblemError(
                f"Speed spread (max / min - 1) must be finite and at least 0, got {speeds!r}."
            )
        slowest = 2.0 / (2.0 + speeds) if ranks > 1 else 1.0
        spaced = np.linspace(slowest, slowest * (1.0 + speeds), ranks)
        return stream.permutation(spaced), f"spread {float(speeds):g}"
    vector = numbers(speeds, "Measured speeds", ("rank",), ProblemError, low=1e-9, strict=True)
    if vector.shape != (ranks,):
        raise ProblemError(
            f"Measured speeds need one number for each of the {ranks} ranks, got {vector.size}."
        )
    return vector, "measured"
