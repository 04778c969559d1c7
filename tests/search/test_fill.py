from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.constraints import MaxReplicas
from moeplace.plan import EMPTY
from moeplace.search.fill import _costs, fill
from moeplace.solve import solve
from tests.exact.cases import with_planes
from tests.strategies import legal_plans, plan, problem, tiny_problems


@given(data=st.data())
def test_it_fills_what_the_rules_let_it_and_breaks_none(data: st.DataObject) -> None:
    one = data.draw(tiny_problems(max_layers=2, max_windows=2, constraints=True, limits=True))
    placed = data.draw(legal_plans(one))
    full = fill(one, placed)
    held = placed.slots != EMPTY
    assert (full.slots[held] == placed.slots[held]).all()
    assert not full.duplicates.any()
    if mp.evaluate(one, placed).legal:
        assert mp.evaluate(one, full).legal
    free = [one.allowed.all(), not one.constraints, (one.cluster.slots <= one.experts).all()]
    if all(free):
        assert (full.slots != EMPTY).all()


@given(data=st.data(), planes=st.booleans())
def test_it_knows_what_a_replica_costs(data: st.DataObject, planes: bool) -> None:
    one = data.draw(with_planes("even") if planes else tiny_problems(routing="even"))
    placed = data.draw(legal_plans(one))
    empty = np.flatnonzero(placed.slots[0] == EMPTY)
    if not empty.size:
        return
    slot, rank = int(empty[0]), int(placed.rank_of_slot[empty[0]])
    here = placed.slots[0][placed.rank_of_slot == rank]
    experts = np.array([e for e in range(one.experts) if e not in here], dtype=np.int64)
    if not experts.size:
        return
    count = placed.replicas[0]
    costs = _costs(one, 0, placed.slots[0], placed.rank_of_slot, count, rank, experts)
    for expert, cost in zip(experts, costs, strict=True):
        slots = placed.slots.copy()
        slots[0, slot] = expert
        more = mp.Plan(slots=slots, rank_slots=placed.rank_slots, experts=one.experts)
        price = one.mean(mp.evaluate(one, more).makespan)[0]
        assert cost == pytest.approx(price, rel=1e-9, abs=1e-12)


def test_a_filled_plan_can_be_exported(tmp_path: Any) -> None:
    one = problem([9, 5, 3, 2, 1, 0], [1, 1, 1], [4, 4, 4])
    found = solve(one, fill=True)
    assert (found.plan.slots != EMPTY).all()
    mp.write_plan(found.plan, tmp_path / "map.json", format="vllm-ascend")
    assert found.gap < 0.05
    limited = problem([9, 5, 3, 2], [1, 1], [4, 4], constraints=[MaxReplicas(1)])
    assert (fill(limited, plan([0, 1, -1, -1, 2, 3, -1, -1], [4, 4])).slots == EMPTY).sum() == 4
