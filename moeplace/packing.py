"""Search for a way to pack the hottest experts, where spare slots are few.

`arguments.hot_packing` says what is searched and why it is a bound. The same code runs on
floating-point numbers and on whole ones.
"""

import numpy as np
from numba import njit

#: Experts that are packed, spare slots up to which they are, and trials of a search.
PACKED, PACKING_SPARE, TRIALS = 12, 16, 20_000
#: Sums are compared with this relative slack, so that rounding refutes nothing.
LESS = 1 - 1e-12


@njit(cache=True, nogil=True, error_model="numpy")
def search(room, fewest, loads, spare, trials, ranks, part):  # type: ignore[no-untyped-def]
    """Whether the hottest experts cannot be packed: 1 (none fits), 0 (as written), -1 (too long).

    Parameters
    ----------
    room : array [ranks], descending
        Tokens that each rank can run.
    fewest : array [ranks + 1]
        Slots that so many ranks have at least.
    loads : array [experts], descending
    spare : int
        Spare slots.
    trials : int
        Steps after which the search gives up.
    ranks, part : array [packed], written
        Ranks of each part, and the part of each expert.
    """
    hot = ranks.size
    total = np.concatenate((room[:1] * 0, np.cumsum(room)))
    small = np.concatenate((room[:1] * 0, np.cumsum(loads[::-1])))  # n smallest
    load = np.zeros_like(loads[:hot])  # of each part
    members = np.zeros(hot, dtype=np.int64)
    freed = np.zeros(hot, dtype=np.int64)  # neighbours that a part must be rid of
    single = np.zeros(hot, dtype=np.int64)
    joined = np.zeros(hot, dtype=np.int64)
    choice = np.full(hot, -1, dtype=np.int64)  # of each expert: ranks of a part of its own, less 1,
    parts = extra = shed = 0  # or spare + 1 + the part that it joins
    e = done = 0
    while e >= 0:
        if e == hot:
            return 0
        now = choice[e]
        if now >= 0:  # take the last choice back
            p = part[e]
            if now <= spare:
                parts -= 1
                extra -= now
            else:
                load[p] -= loads[e]
                members[p] -= 1
            shed -= freed[p]
            freed[p] = 0
            if now > spare:
                freed[p] = joined[e]
                shed += joined[e]
        now += 1
        fits = False
        others = loads.size - e - 1  # not decided yet: neighbours are among them
        while now <= spare + parts and not fits:
            done += 1
            if done > trials:
                return -1
            own = now <= spare
            if own and extra + now > spare:
                now = spare + 1
                continue
            p = parts if own else now - spare - 1
            if own:
                parts += 1
                extra += now
                load[p], members[p], ranks[p], freed[p] = loads[e], 1, now + 1, 0
            else:
                load[p] += loads[e]
                members[p] += 1
            before = freed[p]
            # what it must shed by itself
            slots = fewest[min(ranks[p], room.size)] - members[p] - (ranks[p] - 1)
            fits = ranks[p] <= room.size
            while fits:
                n = max(slots - freed[p], 0)
                if n <= others and not (load[p] + small[n]) * LESS > total[ranks[p]]:
                    break
                freed[p] += 1
                fits = n > 0
            shed += freed[p] - before
            fits &= extra + shed <= spare
            if fits:  # and every collection of parts that holds it
                alone = many = 0
                at = -1
                for q in range(parts):
                    if ranks[q] == 1 and members[q] == 1:
                        if q == p:
                            at = alone
                        single[alone] = q
                        alone += 1
                    elif q != p:
                        many += 1
                for chosen in range(1 << many):
                    tokens = load[p] * 0
                    inside = wide = count = rid = n = 0
                    for q in range(parts):
                        if ranks[q] == 1 and members[q] == 1:
                            continue
                        if q == p or chosen >> n & 1:
                            tokens += load[q]
                            inside += members[q]
                            wide += ranks[q]
                            rid += freed[q]
                            count += 1
                        n += q != p
                    for k in range(alone + 1):
                        if k > 0:
                            q = single[k - 1]
                            tokens += load[q]
                            inside += 1
                            wide += 1
                            rid += freed[q]
                            count += 1
                        if wide == 0 or (at >= 0 and k <= at):
                            continue
                        if wide > room.size:
                            fits = False
                            break
                        loose = spare - extra - shed + rid
                        n = max(fewest[wide] - inside - (wide - count) - loose, 0)
                        if n > others or (tokens + small[n]) * LESS > total[wide]:
                            fits = False
                            break
                        if chosen == 0 and at >= 0:  # one of k is on a rank with no more than this
                            loose = spare - extra - shed + freed[single[0]]
                            n = max(fewest[1] - 1 - loose, 0)
                            if n > others or (load[q] + small[n]) * LESS > room[k - 1]:
                                fits = False
                                break
                    if not fits:
                        break
            if not fits:
                shed -= freed[p] - before
                freed[p] = before
                if own:
                    parts -= 1
                    extra -= now
                else:
                    load[p] -= loads[e]
                    members[p] -= 1
                now += 1
            else:
                part[e], joined[e] = p, before
        choice[e] = now if fits else -1
        e += 1 if fits else -1
        if fits and e < hot:
            choice[e] = -1
    return 1
