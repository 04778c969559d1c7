"""Policies to compare with: engine defaults and published balancers.

Each module holds plain functions on arrays: they take token loads ``[layers, experts]`` and
return slots ``[layers, slots]``, rank-major, with -1 in an empty slot. All are deterministic,
treat layers independently and raise `PolicyNotApplicable` where the policy as published says
nothing, rather than bend it.

==============  ==========================================================================
`contiguous`    what engines start with: contiguous and round robin
`eplb`          DeepSeek's EPLB, hierarchical and global
`greedy`        the global EPLB compiled: the time that planners are measured against
`eplb_lpt`      EPLB's replica counts with a speed-aware placement
`vibe`          ViBE's initial placement and incremental swaps
`top_k`         the hottest experts on every rank
==============  ==========================================================================

`POLICIES` applies them to a `Problem`. They plan on the mean load over windows, and know
neither base load, shares, pins nor forbids: what their plans cost is for `evaluate` to say, and
what they break, for its violations.
"""

from collections.abc import Callable

import numpy as np

from moeplace._check import FloatArray, IntArray
from moeplace.errors import PolicyNotApplicable
from moeplace.plan import Plan
from moeplace.policies import contiguous as _contiguous
from moeplace.policies import eplb as _eplb
from moeplace.policies import eplb_lpt as _eplb_lpt
from moeplace.policies import top_k as _top_k
from moeplace.policies import vibe as _vibe
from moeplace.problem import Problem


def planning_loads(problem: Problem) -> FloatArray:
    """Tokens [layers, experts] that policies plan on: the weighted mean over windows."""
    return problem.mean_load[0]


def _plan(problem: Problem, slots: IntArray) -> Plan:
    """Whatever the policy placed, as it stands: EPLB may put two copies on one rank."""
    return Plan(
        slots=slots,
        rank_slots=problem.cluster.slots,
        experts=problem.experts,
        allow_duplicates=True,
    )


def _apply_contiguous(problem: Problem) -> Plan:
    rank_slots = problem.cluster.slots
    return _plan(problem, _contiguous.contiguous(problem.layers, problem.experts, rank_slots))


def _apply_round_robin(problem: Problem) -> Plan:
    rank_slots = problem.cluster.slots
    return _plan(problem, _contiguous.round_robin(problem.layers, problem.experts, rank_slots))


def _apply_eplb(problem: Problem) -> Plan:
    """Hierarchical EPLB where `NodeGroups` gives equal consecutive groups, else global."""
    each = problem.cluster.slots
    if each.min() != each.max():
        raise PolicyNotApplicable(
            f"EPLB needs equal slots on every rank: got {each.min()} to {each.max()}. Use eplb_lpt."
        )
    groups, nodes = 1, 1
    if problem.node_groups is not None:
        group = problem.node_groups.of(problem.experts)
        groups = int(group.max()) + 1
        node = problem.cluster.nodes
        assert node is not None
        nodes = int(node.max()) + 1
        for name, of, count in (("expert groups", group, groups), ("nodes", node, nodes)):
            if of.size % count or (of != np.arange(of.size) // (of.size // count)).any():
                raise PolicyNotApplicable(
                    f"Hierarchical EPLB needs equal {name} of consecutive members. Use auto."
                )
    loads = planning_loads(problem)
    if groups == nodes == 1:
        from moeplace.policies.greedy import greedy  # compiled: the same bits, faster

        return _plan(problem, greedy(loads, problem.ranks, int(each[0])))
    return _plan(problem, _eplb.eplb(loads, problem.ranks, int(each[0]), groups, nodes))


def _apply_eplb_lpt(problem: Problem) -> Plan:
    cluster = problem.cluster
    loads = planning_loads(problem)
    return _plan(problem, _eplb_lpt.eplb_lpt(loads, cluster.speeds, cluster.slots))


def _apply_vibe(problem: Problem) -> Plan:
    """ViBE's initial placement with a limit of experts to each rank: its slots."""
    cluster = problem.cluster
    loads = planning_loads(problem)
    return _plan(problem, _vibe.vibe_initial(loads, cluster.speeds, cluster.slots))


def _apply_top_k(problem: Problem) -> Plan:
    """The largest k that leaves every other expert a slot: k G + E - k <= S."""
    each, experts = problem.cluster.slots, problem.experts
    k = min(experts, int(each.min()))
    if problem.ranks > 1:
        k = min(k, (int(each.sum()) - experts) // (problem.ranks - 1))
    return _plan(problem, _top_k.top_k(planning_loads(problem), each, k))


#: The policies by name: each makes a plan for a problem, or raises `PolicyNotApplicable`.
POLICIES: dict[str, Callable[[Problem], Plan]] = {
    "contiguous": _apply_contiguous,
    "round_robin": _apply_round_robin,
    "eplb": _apply_eplb,
    "eplb_lpt": _apply_eplb_lpt,
    "vibe": _apply_vibe,
    "top_k": _apply_top_k,
}
