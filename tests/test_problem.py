from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from moeplace.constraints import (
    Forbid,
    MaxMoves,
    MaxReplicas,
    NodeGroups,
    Pin,
    ReplicaBudget,
    TokenCapacity,
)
from moeplace.errors import ProblemError
from moeplace.hardware import Cluster, Planes
from moeplace.loads import LoadHistogram
from moeplace.problem import Problem
from tests.strategies import plan, problem

LOADS = LoadHistogram(tokens=[[[4, 2, 1], [1, 5, 3]], [[2, 2, 2], [0, 1, 0]]])
CLUSTER = Cluster(speeds=[1, 2], slots=[2, 3], nodes=[0, 1])
CURRENT = plan([[0, 1, 2, 0, -1], [0, 1, 2, 0, -1]], [2, 3])
FULL = Problem(
    LOADS,
    CLUSTER,
    constraints=[Pin(0, 1)],
    base_load=np.ones((2, 2, 2)),
    layer_weight=[1, 2],
    window_weight=[1, 3],
    name="toy",
    origin="made up",
)


class TestValidation:
    def test_loads_and_cluster_must_be_of_their_classes(self) -> None:
        with pytest.raises(ProblemError, match="Loads must be a LoadHistogram, got list"):
            Problem([[1]], CLUSTER)  # type: ignore[arg-type]
        with pytest.raises(ProblemError, match="Cluster must be a Cluster, got int"):
            Problem(LOADS, 8)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"routing": "random"}, "Routing must be one of even, weighted, .*, got 'random'"),
            ({"objective": "best"}, "Objective must be one of mean, worst, cvar, got 'best'"),
            ({"constraints": ["pin"]}, "Constraints may be Pin.* got str"),
            ({"constraints": [Pin(9, 0)]}, "expert 9"),
            ({"base_load": 1.0}, r"axes \[ranks\]"),
            ({"base_load": [1, 2, 3]}, r"shape \(2,\), \(2, 2\) or \(2, 2, 2\).* got \(3,\)"),
            ({"base_load": [[1, 2]]}, r"got \(1, 2\)"),
            ({"base_load": [1, -2]}, r"Base load must be finite.* got -2\.0 at rank 1"),
            ({"base_load": [[1, 2], [3]]}, "Base load is ragged"),
            ({"base_load": [1, float("nan")]}, "got nan at rank 1"),
            ({"base_load": np.ones((1, 1, 1, 1))}, "axes"),
            ({"layer_weight": [1]}, "Layer weight needs one number for each of the 2 layers"),
            ({"layer_weight": [0, 0]}, "Layer weight is 0 everywhere"),
            ({"layer_weight": [1, -1]}, r"Layer weight must be finite.* at layer 1"),
            ({"window_weight": [1, 2, 3]}, "Window weight needs one number for each of the 2"),
            ({"window_weight": [0, 0]}, "Window weight is 0 everywhere"),
            ({"window_weight": [1, float("inf")]}, "got inf at window 1"),
        ],
    )
    def test_bad_options_are_refused(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ProblemError, match=message):
            Problem(LOADS, CLUSTER, **change)  # type: ignore[arg-type]

    def test_every_expert_needs_a_slot(self) -> None:
        with pytest.raises(ProblemError, match="3 experts do not fit.* offer 2 usable slots"):
            problem([1, 2, 3], [1, 1], 1)

    def test_more_slots_than_experts_times_ranks_are_legal(self) -> None:
        assert problem([1, 2], [1, 1], 5).cluster.total_slots == 10

    def test_a_layer_without_tokens_is_legal_and_takes_no_time(self) -> None:
        assert problem([[0, 0], [1, 1]], [1], 2).fluid.tolist() == [[0.0, 2.0]]


class TestUnits:
    def test_with_passes_tokens_and_base_load_are_per_forward_pass(self) -> None:
        one = problem([[[8, 4]], [[9, 3]]], [1, 1], 1, passes=[4, 3], base_load=[12, 0])
        assert one.tokens.tolist() == [[[2.0, 1.0]], [[3.0, 1.0]]]
        assert one.base.tolist() == [[[3.0, 0.0]], [[4.0, 0.0]]]
        assert one.fluid.tolist() == [[3.0], [4.0]]

    def test_windows_weigh_by_their_passes_if_known_else_alike(self) -> None:
        loads = np.ones((2, 1, 1))
        assert problem(loads, [1], 1, passes=[1, 3]).window_weight.tolist() == [0.25, 0.75]
        assert problem(loads, [1], 1).window_weight.tolist() == [0.5, 0.5]

    def test_given_window_weights_are_normalised(self) -> None:
        loads = np.ones((2, 1, 1))
        one = problem(loads, [1], 1, passes=[1, 3], window_weight=[6, 2])
        assert one.window_weight.tolist() == [0.75, 0.25]

    def test_base_load_may_be_given_for_ranks_layers_or_windows(self) -> None:
        for given in ([1, 2], [[1, 2], [1, 2]], [[[1, 2]] * 2] * 2):
            one = replace(FULL, base_load=given)
            assert one.base.tolist() == [[[1.0, 2.0]] * 2] * 2

    def test_mean_load_is_weighted_by_the_windows(self) -> None:
        tokens, base = FULL.mean_load
        assert tokens[0] == pytest.approx([0.25 * 4 + 0.75 * 2, 2, 0.25 + 1.5])
        assert base.tolist() == [[1.0, 1.0], [1.0, 1.0]]


class TestTotal:
    def test_the_worst_window_of_sums_is_not_the_sum_of_worst_windows(self) -> None:
        two = problem(np.ones((2, 2, 1)), [1], 1, objective="worst")
        assert two.total(np.array([[2.0, 1.0], [1.0, 2.0]])) == 3.0

    def test_layers_are_summed_with_their_weights_then_windows_averaged(self) -> None:
        assert FULL.step_seconds(np.array([[1.0, 2.0], [3.0, 4.0]])).tolist() == [5.0, 11.0]
        assert FULL.total(np.array([[1.0, 2.0], [3.0, 4.0]])) == 0.25 * 5 + 0.75 * 11

    def test_a_window_without_weight_still_counts_as_the_worst(self) -> None:
        one = replace(FULL, objective="worst", window_weight=[1, 0])
        assert one.total(np.array([[1.0, 1.0], [2.0, 2.0]])) == 6.0

    def test_sums_over_many_layers_lose_nothing(self) -> None:
        many = problem(np.ones((1, 11, 1)), [1], 1)
        assert many.total(np.full((1, 11), 0.1)) == 1.1


class TestAggregate:
    def test_it_is_one_window_of_summed_loads_and_base_loads(self) -> None:
        total = replace(FULL, objective="worst").aggregate()
        assert total.tokens.tolist() == [[[6.0, 4.0, 3.0], [1.0, 6.0, 3.0]]]
        assert total.base.tolist() == [[[2.0, 2.0], [2.0, 2.0]]]
        assert total.window_weight.tolist() == [1.0]
        assert total.layer_weight.tolist() == [1.0, 2.0]
        assert total.constraints == FULL.constraints
        assert (total.name, total.objective) == ("toy", "worst")

    def test_with_passes_it_is_the_mean_pass(self) -> None:
        one = problem([[[8, 4]], [[9, 3]]], [1, 1], 1, passes=[4, 6], base_load=[10, 0])
        total = one.aggregate()
        assert total.tokens.tolist() == [[[1.7, 0.7]]]
        assert total.base.tolist() == [[[2.0, 0.0]]]


CHANGES: dict[str, Callable[[Problem], Problem]] = {
    "loads": lambda p: replace(p, loads=p.loads.scale(2)),
    "loads of one expert": lambda p: replace(
        p, loads=LoadHistogram(tokens=p.loads.tokens + np.eye(3)[0] * 1e-9)
    ),
    "passes": lambda p: replace(
        p, loads=replace(p.loads, passes=[2, 2]), window_weight=p.window_weight
    ),
    "order of windows": lambda p: replace(p, loads=p.loads.select([1, 0])),
    "speeds": lambda p: replace(p, cluster=replace(p.cluster, speeds=[1, 2.5])),
    "slots": lambda p: replace(p, cluster=replace(p.cluster, slots=[3, 2])),
    "nodes": lambda p: replace(p, cluster=replace(p.cluster, nodes=[0, 0])),
    "speed unit": lambda p: replace(p, cluster=replace(p.cluster, speed_unit="relative")),
    "routing": lambda p: replace(p, routing="weighted"),
    "objective": lambda p: replace(p, objective="worst"),
    "base load": lambda p: replace(p, base_load=2 * np.ones((2, 2, 2))),
    "layer weight": lambda p: replace(p, layer_weight=[2, 1]),
    "window weight": lambda p: replace(p, window_weight=[3, 1]),
    "no constraints": lambda p: replace(p, constraints=[]),
    "another rank pinned": lambda p: replace(p, constraints=[Pin(0, 0)]),
    "pinned in one layer": lambda p: replace(p, constraints=[Pin(0, 1, layer=0)]),
    "forbidden": lambda p: replace(p, constraints=[Forbid(0, 1)]),
    "groups": lambda p: replace(p, constraints=[Pin(0, 1), NodeGroups([0, 1, 1])]),
    "other groups": lambda p: replace(p, constraints=[Pin(0, 1), NodeGroups([0, 0, 1])]),
    "few moves": lambda p: replace(p, constraints=[MaxMoves(CURRENT, per_layer=1)]),
    "few moves in all": lambda p: replace(p, constraints=[MaxMoves(CURRENT, total=1)]),
    "moves from another plan": lambda p: replace(
        p, constraints=[MaxMoves(plan([[0, 1, 2, 1, -1]] * 2, [2, 3]), total=1)]
    ),
    "cvar": lambda p: replace(p, objective="cvar"),
    "cvar of another share": lambda p: replace(p, objective="cvar", cvar_alpha=0.5),
    "capacity": lambda p: replace(p, constraints=[TokenCapacity(5)]),
    "another capacity": lambda p: replace(p, constraints=[TokenCapacity([5, 6])]),
    "few replicas": lambda p: replace(p, constraints=[MaxReplicas(1)]),
    "few replicas of one": lambda p: replace(p, constraints=[MaxReplicas([1, 2, 2])]),
    "few replicas in all": lambda p: replace(p, constraints=[ReplicaBudget(7)]),
    "planes": lambda p: _with_planes(p, [1e-3], [0.0], [1.0]),
    "other planes": lambda p: _with_planes(p, [1e-3], [1e-4], [1.0]),
}


def _with_planes(one: Problem, *numbers: list[float]) -> Problem:
    names = ("startup", "activation", "compute")
    planes = Planes(**dict(zip(names, numbers, strict=True)))
    loads = replace(one.loads, passes=[1, 1])
    weight = one.window_weight
    cluster = replace(one.cluster, planes=planes)
    return replace(one, loads=loads, cluster=cluster, window_weight=weight)


class TestDigest:
    def test_equal_problems_have_equal_digests(self) -> None:
        other = Problem(
            LoadHistogram(tokens=LOADS.tokens.tolist()),
            Cluster(speeds=(1.0, 2.0), slots=np.array([2, 3]), nodes=[0, 1]),
            constraints=(Pin(expert=0, rank=1),),
            base_load=[1, 1],
            layer_weight=np.array([1.0, 2.0]),
            window_weight=[0.25, 0.75],
        )
        assert other.digest() == FULL.digest()

    def test_names_are_for_people(self) -> None:
        assert replace(FULL, name="other", origin="elsewhere").digest() == FULL.digest()

    def test_the_order_of_rules_changes_nothing(self) -> None:
        rules = [Pin(0, 1), Forbid(1, 0)]
        one, two = replace(FULL, constraints=rules), replace(FULL, constraints=rules[::-1])
        assert one.digest() == two.digest()

    def test_defaults_and_their_values_are_one(self) -> None:
        plain = problem(LOADS.tokens, [1, 2], [2, 3])
        spelt = problem(
            LOADS.tokens,
            [1, 2],
            [2, 3],
            base_load=[0.0, -0.0],
            layer_weight=[1, 1],
            window_weight=[7, 7],
        )
        assert plain.digest() == spelt.digest()

    def test_everything_that_changes_price_or_feasibility_changes_it(self) -> None:
        digests = {name: change(FULL).digest() for name, change in CHANGES.items()}
        assert len({FULL.digest(), *digests.values()}) == len(CHANGES) + 1

    def test_every_field_is_tried(self) -> None:
        tried = {field.name for field in fields(Problem)} - {"name", "origin", "cluster"}
        assert tried == {
            "loads",
            "routing",
            "objective",
            "constraints",
            "base_load",
            "layer_weight",
            "window_weight",
            "cvar_alpha",
        }, "a new field: add a change above"


def test_arrays_of_a_problem_are_read_only() -> None:
    for array in (FULL.layer_weight, FULL.window_weight, FULL.base_load, FULL.tokens):
        assert not array.flags.writeable
