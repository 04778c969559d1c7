"""Search with a budget of moves: steps counted against the current plan, none beyond the budget."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplace.evaluate import evaluate
from moeplace.feasible import explain_infeasible
from moeplace.instances import generate
from moeplace.plan import EMPTY, Plan
from moeplace.problem import Problem
from moeplace.search.construct import adopt
from moeplace.search.moves import Moves, _apply, _best_step, _legal, _transfer, _weight
from moeplace.search.state import BARRED, HELD, OLD, PINNED, State
from moeplace.solve import solve
from tests.search.checks import assert_consistent, started
from tests.strategies import legal_plans, plan, problem, tiny_problems

MORE = settings(max_examples=3 * settings().max_examples)


@st.composite
def stale(draw: st.DrawFn, **options: Any) -> tuple[Problem, Plan, State]:
    """A problem, a legal current plan, bad ones included, and a state that holds it."""
    one = draw(tiny_problems(routing="even", constraints=True, **options))
    assume(explain_infeasible(one) is None)
    drawn = draw(legal_plans(one))
    state = started(one, drawn if evaluate(one, drawn).legal else None, seed=draw(SEEDS))
    return one, state.plan(one), state


SEEDS = st.integers(0, 9)


def work(
    moves: Moves, steps: int, *, layers: Any = None, target: float = 0.0, workers: int = 1
) -> None:
    """Search layers (all of them, if none are named) with so many steps each."""
    every = np.arange(moves.allowance.size) if layers is None else np.array(layers)
    with ThreadPoolExecutor(workers) as pool:
        budget, targets = np.full(every.size, steps), np.full(every.size, target)
        moves.improve(every, budget, targets, pool, workers)


def received(one: Problem, state: State, current: Plan) -> np.ndarray:
    """Copies that each layer receives."""
    return np.asarray(state.plan(one).moves_from(current).sum(axis=1))


def assert_within(one: Problem, state: State, current: Plan, allowance: np.ndarray) -> None:
    """The state is sound, its plan legal, within the allowance and not slower than before."""
    assert_consistent(state, one, values=False)
    assert_tokens(one, state)
    found = state.plan(one)
    priced, before = evaluate(one, found), evaluate(one, current)
    assert priced.legal
    assert (received(one, state, current) <= allowance).all()
    mean = (priced.makespan * one.window_weight[:, None]).sum(axis=0)
    if one.windows == 1:
        assert (mean <= before.makespan[0] * (1 + 1e-12)).all()


def assert_tokens(one: Problem, state: State) -> None:
    """Tokens of each rank are those of its slots."""
    _, base = one.mean_load
    for layer, rank in np.ndindex(one.layers, one.ranks):
        held = state.slot[layer, rank, : state.cap[rank]]
        copies = np.append(state.copies[layer, :-1], 1)
        total = base[layer, rank] / state.unit[layer] + (state.load[layer] / copies)[held].sum()
        assert state.tokens[layer, rank] == pytest.approx(total, rel=1e-12, abs=1e-300)


# Within the budget


@given(stale(max_layers=3, max_windows=2), st.data())
@MORE
def test_whatever_it_does_the_budget_is_kept_and_no_layer_gets_worse(
    case: tuple[Problem, Plan, State], data: st.DataObject
) -> None:
    one, current, state = case
    before = state.makespan
    some = st.lists(st.integers(0, 5), min_size=one.layers, max_size=one.layers)
    allowance = np.array(data.draw(some))
    moves = Moves(state, allowance)
    for steps in data.draw(st.lists(st.integers(1, 3000), min_size=1, max_size=3)):
        work(moves, steps)
        assert_within(one, state, current, allowance)
        assert (state.makespan <= before * (1 + 1e-12)).all()
        before = state.makespan


@given(stale(max_layers=2), st.integers(1, 2000))
def test_an_allowance_of_zero_keeps_what_the_ranks_hold(
    case: tuple[Problem, Plan, State], steps: int
) -> None:
    one, current, state = case
    work(Moves(state, np.zeros(one.layers, dtype=np.int64)), steps)
    assert received(one, state, current).tolist() == [0] * one.layers
    assert_within(one, state, current, np.zeros(one.layers))


def test_without_an_allowance_a_copy_may_still_be_given_up() -> None:
    # the slow rank loses its copy of expert 0, and nobody receives anything
    one = problem([4, 1, 1], [0.2, 1.0], [2, 2])
    current = plan([0, 1, 0, 2], [2, 2])
    state = started(one, current)
    work(Moves(state, np.zeros(1, dtype=np.int64)), 500)
    assert state.plan(one).slots.tolist() == [[1, EMPTY, 0, 2]]


@given(stale(max_layers=3))
def test_only_the_layers_asked_for_change(case: tuple[Problem, Plan, State]) -> None:
    one, _, state = case
    moves = Moves(state, np.full(one.layers, 4))
    slots, bits = state.slot.copy(), state.on.copy()
    work(moves, 500, layers=[0])
    assert (state.slot[1:] == slots[1:]).all()
    assert (state.on[1:] == bits[1:]).all()
    assert not state.work[1:].any()


@given(stale(max_layers=2))
def test_a_layer_at_its_target_keeps_the_current_plan(case: tuple[Problem, Plan, State]) -> None:
    one, current, state = case
    target = float(state.makespan.max()) * (1 + 1e-12)  # sums in another order round otherwise
    work(Moves(state, np.full(one.layers, 9)), 500, target=target)
    assert not received(one, state, current).any()


def test_it_stops_where_few_moves_reach_the_target() -> None:
    # one exchange of 9 and 1 balances the ranks; no more than its two copies is received
    one = problem([9, 9, 1, 1], [1, 1], 2)
    current = plan([0, 1, 2, 3], [2, 2])
    state = started(one, current)
    work(Moves(state, np.array([4])), 5000, target=1.0 + 1e-9)
    assert state.makespan[0] == pytest.approx(1.0)
    assert received(one, state, current).tolist() == [2]


def test_kicks_find_what_the_greedy_steps_miss() -> None:
    random = np.random.default_rng(3)
    loads = np.round(np.exp(random.normal(5, 1, (6, 24))))
    one = problem(loads, random.uniform(0.85, 1.15, 6), 5)
    current = plan(np.tile(np.append(np.arange(24), [EMPTY] * 6), (6, 1)), [5] * 6)
    greedy, kicked = started(one, current), started(one, current)
    work(Moves(greedy, np.full(6, 6)), 1)
    work(Moves(kicked, np.full(6, 6)), 200_000)
    assert (kicked.makespan <= greedy.makespan).all()
    assert (kicked.makespan < greedy.makespan * 0.999).sum() >= 3


@given(stale(max_layers=2), st.integers(0, 4))
def test_the_curve_is_reached_by_so_many_copies(
    case: tuple[Problem, Plan, State], most: int
) -> None:
    one, current, state = case
    start = state.makespan
    moves = Moves(state, np.full(one.layers, most))
    work(moves, 1000)
    assert (moves.curve[:, 0] <= start).all()
    best = np.minimum.accumulate(moves.curve, axis=1)
    for layer, copies in enumerate(received(one, state, current)):
        assert best[layer, copies] <= state.makespan[layer] * (1 + 1e-12)
    assert (best[:, -1] >= state.makespan * (1 - 1e-12)).all()


# Single steps, against what they mean


@dataclass
class Step:
    """Exchange a on g with b on h (kind 0), or rank h gives up a for b (kind 1)."""

    kind: int
    g: int
    h: int
    a: int
    b: int

    def after(self, held: np.ndarray) -> np.ndarray:
        """Which rank holds which expert [ranks, experts + 1] afterwards (EMPTY is no expert)."""
        held = held.copy()
        if self.kind == 0:
            held[self.g, [self.a, self.b]] = [False, True]
            held[self.h, [self.a, self.b]] = [True, False]
        else:
            held[self.h, [self.a, self.b]] = [False, True]
        held[:, -1] = False
        return held


def times(state: State, held: np.ndarray) -> np.ndarray:
    """Seconds of each rank under even routing, layer 0."""
    share = np.where(held, state.load[0] / np.maximum(held.sum(axis=0), 1), 0.0)
    return np.asarray((state.base[0] + share.sum(axis=1)) / state.speed[0])


def steps_out_of(state: State, g: int) -> Iterator[Step]:
    """All exchanges out of rank g, all copies of its experts elsewhere, and all it can give up."""
    on, empty = state.on[0], state.load.shape[1] - 1
    open_, fixed = on & (HELD | BARRED) == 0, on & PINNED != 0
    copies = (on[:, :empty] & HELD).sum(axis=0)
    free = int((state.cap - (on[:, :empty] & HELD).sum(axis=1)).sum())
    held = [set(state.slot[0, r, : state.cap[r]].tolist()) for r in range(state.cap.size)]

    def gives(r: int, e: int) -> bool:
        return free > state.least[0, e] if e == empty else copies[e] > 1 and not fixed[r, e]

    def more(e: int) -> bool:
        return e == empty or bool(copies[e] < state.most[e])

    for a in held[g] - {empty}:
        for h in set(range(state.cap.size)) - {g}:
            for b in held[h]:
                loose = not fixed[g, a] and not fixed[h, b]
                if loose and open_[h, a] and (b == empty or open_[g, b]):
                    yield Step(0, g, h, a, b)
                if open_[h, a] and more(a) and gives(h, b):
                    yield Step(1, h, h, b, a)
        if gives(g, a):
            for b in range(empty + 1):
                if b == empty or (open_[g, b] and more(b)):
                    yield Step(1, g, g, a, b)


def best_score(state: State, g: int, room: int) -> float:
    """Most decrease of sum (T / T_max)^32 for each copy received, by trial.

    An exchange must relieve rank g and end below it; what the slowest rank takes for a copy
    given up must weigh no more than that.
    """
    on, load = state.on[0], state.load[0]
    held = on & HELD != 0
    had = on & OLD != 0
    copies = np.maximum(held.sum(axis=0), 1)
    before = times(state, held)
    best = 0.0
    for step in steps_out_of(state, g):
        held_after = step.after(held)
        after = times(state, held_after)
        cost = int((held_after & ~had).sum()) - int((held & ~had).sum())
        if cost > room:
            continue
        if step.kind == 0:
            if load[step.a] / copies[step.a] <= load[step.b] / copies[step.b]:
                continue
            if after[step.h] >= before[g]:
                continue
        elif step.h == g:
            more = 0 if step.b == load.size - 1 else load[step.b] / (held.sum(axis=0)[step.b] + 1)
            if more > load[step.a] / copies[step.a]:
                continue
        gain = ((before / before[g]) ** 32).sum() - ((after / before[g]) ** 32).sum()
        best = max(best, gain / cost if cost > 0 else 1e3 * gain)
    return best


def holders(state: State) -> np.ndarray:
    """Ranks of each expert [experts, ranks], in ascending order, as the kernels want them."""
    experts, ranks = state.load.shape[1] - 1, state.cap.size
    found = np.zeros((experts, ranks), dtype=np.int64)
    for e in range(experts):
        on = np.flatnonzero(state.on[0, :, e] & HELD)
        found[e, : on.size] = on
    return found


@given(stale(), st.data(), st.integers(0, 3))
@MORE
def test_the_step_with_most_relief_for_each_copy_is_found(
    case: tuple[Problem, Plan, State], data: st.DataObject, room: int
) -> None:
    one, _, state = case
    Moves(state, np.array([room]))  # marks what is OLD
    elsewhere = data.draw(legal_plans(one))
    if evaluate(one, elsewhere).legal:
        adopt(state, elsewhere, np.arange(1))
    g = int((state.tokens[0] / state.speed[0]).argmax())
    assume(state.tokens[0, g] > 0)
    score, kind, h, a, b, _ = _best_step(
        g, room, state.slot[0], state.on[0], holders(state), state.copies[0], state.tokens[0],
        state.cap, state.least[0], state.most, state.speed[0], state.load[0], 0.0, state.random, 0,
    )  # fmt: skip
    best = best_score(state, g, room)
    if kind < 0:
        assert best <= 1.1e-9, "a step helps but none was found"
        return
    step = Step(kind, g if kind == 0 else h, h, a, b)
    assert step in list(steps_out_of(state, g)), "the step is not legal"
    assert score == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(stale(), st.data())
@MORE
def test_each_applied_step_is_legal_and_its_copies_are_counted(
    case: tuple[Problem, Plan, State], data: st.DataObject
) -> None:
    one, current, state = case
    Moves(state, np.array([0]))
    slot, on, count, tokens = state.slot[0], state.on[0], state.copies[0], state.tokens[0]
    of, used, empty = holders(state), 0, one.experts
    ranks = st.integers(0, one.ranks - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        kind, g, h = data.draw(st.integers(0, 1)), data.draw(ranks), data.draw(ranks)
        if state.cap[g] == 0 or state.cap[h] == 0:
            continue
        a = int(
            data.draw(st.sampled_from(slot[g if kind == 0 else h, : state.cap[h if kind else g]]))
        )
        b = int(data.draw(st.sampled_from(slot[h, : state.cap[h]])))
        if kind == 1:
            b = data.draw(st.integers(0, empty))
        if not _legal(kind, g, h, a, b, on, count, state.least[0], state.most, 99):
            continue
        before = times(state, on & HELD != 0)
        wanted = Step(kind, g, h, a, b).after(on & HELD != 0)
        if kind == 1 and before.max() > 0:
            gain = _transfer(
                h, a, b, before.max(), on, of, count, tokens, state.speed[0], state.load[0]
            )
            powers = ((t / before.max()) ** 32 for t in (before, times(state, wanted)))
            was, becomes = (p.sum() for p in powers)
            assert gain == pytest.approx(was - becomes, rel=1e-9, abs=1e-9 * max(1.0, becomes))
        used += _apply(
            kind, g, h, a, b, slot, on, of, count, tokens, state.cap, state.least[0], state.most,
            state.base[0], state.load[0],
        )  # fmt: skip
        assert ((on & HELD != 0) == wanted).all()
        assert_consistent(state, one, values=False)
        assert_tokens(one, state)
        assert used == received(one, state, current)[0]
        for e in range(one.experts):
            assert sorted(of[e, : count[e]]) == np.flatnonzero(on[:, e] & HELD).tolist()


def test_undoing_costs_nothing() -> None:
    one = problem([5, 4, 3, 2], [1, 1], [3, 3])
    current = plan([0, 1, EMPTY, 2, 3, EMPTY], [3, 3])
    state = started(one, current)
    Moves(state, np.array([0]))
    of = holders(state)

    def cost(kind: int, g: int, h: int, a: int, b: int) -> int:
        return int(
            _apply(
                kind, g, h, a, b, state.slot[0], state.on[0], of, state.copies[0], state.tokens[0],
                state.cap, state.least[0], state.most, state.base[0], state.load[0],
            )
        )  # fmt: skip

    assert cost(0, 0, 1, 0, 2) == 2  # each rank receives one
    assert cost(0, 0, 1, 2, 0) == -2  # and has it back
    assert cost(1, 0, 0, 4, 3) == 1  # a free slot (expert 4) takes a copy of 3
    assert cost(1, 0, 0, 3, 2) == 0  # another copy in its place: still one is received
    assert cost(1, 0, 0, 2, 4) == -1
    assert state.plan(one).moves_from(current).sum() == 0


def test_a_step_that_no_longer_fits_is_refused_and_changes_nothing() -> None:
    one = problem([5, 4, 3], [1, 1], [2, 2])
    state = started(one, plan([0, 1, 2, 0], [2, 2]))
    of, slots = holders(state), state.slot.copy()
    for kind, g, h, a, b in (
        (0, 0, 1, 2, 0),  # rank 0 does not hold 2
        (0, 0, 1, 0, 2),  # rank 1 has 0 already
        (1, 1, 1, 2, 1),  # the last copy of 2
        (1, 0, 0, 0, 1),  # rank 0 has 1 already
    ):
        cost = _apply(
            kind, g, h, a, b, state.slot[0], state.on[0], of, state.copies[0], state.tokens[0],
            state.cap, state.least[0], state.most, state.base[0], state.load[0],
        )  # fmt: skip
        assert cost == -1000
    assert (state.slot == slots).all()


@given(st.floats(0, 2))
def test_the_weight_is_the_thirty_second_power(x: float) -> None:
    assert _weight(x) == pytest.approx(x**32, rel=1e-12, abs=1e-300)


# A total over layers


@given(stale(max_layers=3), st.data())
@MORE
def test_a_total_is_shared_out_within_what_each_layer_may(
    case: tuple[Problem, Plan, State], data: st.DataObject
) -> None:
    one, current, state = case
    before = state.makespan
    some = st.lists(st.integers(0, 4), min_size=one.layers, max_size=one.layers)
    allowance, total = np.array(data.draw(some)), data.draw(st.integers(0, 6))
    moves = Moves(state, allowance.copy())
    work(moves, 500)
    with ThreadPoolExecutor(1) as pool:
        moves.share_out(total, np.ones(one.layers), np.zeros(one.layers), pool)
    assert (moves.allowance <= allowance).all()
    assert moves.allowance.sum() <= total
    for steps in (1, 500):
        work(moves, steps)
        assert_within(one, state, current, moves.allowance)
        assert received(one, state, current).sum() <= total
        assert (state.makespan <= before * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    ("weights", "total", "wanted"),
    [
        ([1, 1], 1, [1, 0]),  # layer 0 saves more by its first move
        ([1, 10], 1, [0, 1]),  # unless a second of layer 1 counts tenfold
        ([1, 1], 2, [1, 1]),
        ([1, 1], 9, [1, 1]),  # no move is given that saves nothing
        ([1, 1], 0, [0, 0]),
    ],
)
def test_a_total_goes_where_it_saves_most(weights: Any, total: int, wanted: list[int]) -> None:
    # a free slot on the idle rank takes one copy: expert 0 moves there and both ranks carry half
    one = problem([[8, 8], [5, 11]], [1, 1], [2, 1], layer_weight=weights)
    current = Plan(slots=[[0, 1, EMPTY]] * 2, rank_slots=[2, 1], experts=2)
    state = started(one, current)
    moves = Moves(state, np.full(2, 3))
    with ThreadPoolExecutor(1) as pool:
        moves.improve(np.arange(2), np.full(2, 2000), np.zeros(2), pool, 1)
        moves.share_out(total, state.unit * one.layer_weight, np.zeros(2), pool)
    assert moves.allowance.tolist() == wanted
    assert received(one, state, current).tolist() == wanted


def test_a_total_smaller_than_a_step_of_several_copies_is_given_away_in_part() -> None:
    one = problem([9, 9, 1, 1], [1, 1], 2)
    state = started(one, plan([0, 1, 2, 3], [2, 2]))
    moves = Moves(state, np.array([4]))
    with ThreadPoolExecutor(1) as pool:
        moves.improve(np.arange(1), np.array([2000]), np.zeros(1), pool, 1)
        moves.share_out(1, np.ones(1), np.zeros(1), pool)
    assert moves.allowance.tolist() == [1]
    assert received(one, state, plan([0, 1, 2, 3], [2, 2])).tolist() == [0]


# The same bits


def drifted(layers: int, workers: int) -> tuple[Moves, State]:
    random = np.random.default_rng(0)
    loads = np.exp(random.normal(0, 1, (layers, 32)))
    one = problem(loads, random.uniform(0.85, 1.15, 8), 5)
    current = plan(np.tile(np.append(np.arange(32), [0] + [EMPTY] * 7), (layers, 1)), [5] * 8)
    state = started(one, current)
    moves = Moves(state, np.arange(layers) + 2)
    for _ in range(3):
        work(moves, 20_000, workers=workers)
    with ThreadPoolExecutor(workers) as pool:
        moves.share_out(12, state.unit, np.zeros(layers), pool)
    return moves, state


def test_one_and_two_threads_give_the_same_bits() -> None:
    outcomes = set()
    for workers in (1, 2, 3):
        moves, state = drifted(5, workers)
        arrays = (state.slot, state.tokens, state.on, state.random, state.work, moves.curve)
        outcomes.add(b"".join(array.tobytes() for array in arrays))
    assert len(outcomes) == 1


def test_a_long_search_leaves_the_place_where_greedy_steps_end() -> None:
    now = solve(generate((1, 256, 288, 32), 104).aggregate(), work_limit=4_000_000, gap=1e-5).plan
    later = generate((1, 256, 288, 32), 104, epoch=1).aggregate()
    state = State.of(later, seed=0)
    adopt(state, now, np.arange(1))
    moves = Moves(state, np.array([4]))
    with ThreadPoolExecutor(1) as pool:
        moves.improve(np.arange(1), np.array([100_000]), np.zeros(1), pool, 1)
        assert state.makespan[0] > 1.1
        for steps in (1_000_000, 30_000_000):
            moves.improve(np.arange(1), np.array([steps]), np.zeros(1), pool, 1)
    assert state.makespan[0] < 1.09
    assert_consistent(state, later, values=False)
