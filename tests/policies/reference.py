"""EPLB for one layer in plain Python, written from its description."""


def pack(weights: list[float], packs: int) -> list[list[int]]:
    """The items of each pack, in order of arrival."""
    size = len(weights) // packs
    if size == 1:
        return [[i] for i in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((p for p in range(packs) if len(filled[p]) < size), key=lambda p: total[p])
        filled[lightest].append(item)
        total[lightest] += weights[item]
    return filled


def replicate(loads: list[float], total: int) -> tuple[list[int], list[int]]:
    """The expert of each copy, and the copies of each expert."""
    counts = [1] * len(loads)
    copy_of = list(range(len(loads)))
    while len(copy_of) < total:
        expert = max(range(len(loads)), key=lambda e: loads[e] / counts[e])
        copy_of.append(expert)
        counts[expert] += 1
    return copy_of, counts


def eplb(
    loads: list[float], ranks: int, slots_per_rank: int, groups: int = 1, nodes: int = 1
) -> list[int]:
    """The expert in each slot."""
    size = len(loads) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    slots = []
    for node in pack([sum(loads[e] for e in group) for group in members], nodes):
        experts = [e for group in node for e in members[group]]
        node_loads = [loads[e] for e in experts]
        copy_of, counts = replicate(node_loads, ranks // nodes * slots_per_rank)
        shares = [node_loads[e] / counts[e] for e in copy_of]
        for held in pack(shares, ranks // nodes):
            slots += [experts[copy_of[copy]] for copy in held]
    return slots
