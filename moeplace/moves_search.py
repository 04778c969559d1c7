"""Kernels of the bound on few moves: every way to part shared experts, rank after rank.

`FewMoves` in moves_bound.py says what is searched and why it is a bound. At most so many states are
kept; where there are more, those whose ranks carry about the same are joined: each load then lies
between the least and the most of theirs. All in whole numbers.
"""

import numpy as np
from numba import njit

#: More than any price; the sum over all ranks still fits.
NEVER = 1 << 48
#: Departures are listed up to so many copies, on ranks with more experts than `LONG` one less.
LISTED, LONG = 3, 16
#: A state's load may span so many cells of a table of prices; over more its price is nothing.
SPAN = 8


@njit(cache=True, nogil=True, error_model="numpy")
def departures(single, singles):  # type: ignore[no-untyped-def]
    """Tokens that a rank sheds if its experts of one replica receive k copies.

    Sorted, and where those of k begin [ranks, LISTED + 2]. An expert w that receives m copies may
    leave (w less) or stay (w / (m + 1) left); leaving with more copies is no better for its rank.
    """
    ranks = singles.size
    begin = np.zeros((ranks, LISTED + 2), dtype=np.int64)
    at = 0
    for g in range(ranks):
        n = singles[g]
        begin[g, 1] = at + 1
        begin[g, 2] = begin[g, 1] + 2 * n
        begin[g, 3] = begin[g, 2] + 2 * n * (n - 1) + n
        triples = 4 * n * (n - 1) * (n - 2) // 3 + 2 * n * (n - 1) + n
        begin[g, 0] = at
        begin[g, 4] = begin[g, 3] + (triples if n <= LONG else 0)
        at = begin[g, 4]
    out = np.zeros(at, dtype=np.int64)
    for g in range(ranks):
        n = singles[g]
        w = single[g]
        one, two, three = begin[g, 1], begin[g, 2], begin[g, 3]
        for i in range(n):
            for x in (w[i], w[i] - w[i] // 2):
                out[one] = x
                one += 1
                for j in range(i + 1, n):
                    for y in (x + w[j], x + w[j] - w[j] // 2):
                        out[two] = y
                        two += 1
                        if n <= LONG:
                            for k in range(j + 1, n):
                                out[three] = y + w[k]
                                out[three + 1] = y + w[k] - w[k] // 2
                                three += 2
                if n <= LONG:
                    for j in range(n):
                        if j != i:
                            out[three] = x + w[j] - w[j] // 3
                            three += 1
            out[two] = w[i] - w[i] // 3
            two += 1
            if n <= LONG:
                out[three] = w[i] - w[i] // 4
                three += 1
        for k in range(1, LISTED + 1):
            out[begin[g, k] : begin[g, k + 1]].sort()
    return out, begin


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _first(values, low, high, least):  # type: ignore[no-untyped-def]
    """First of the sorted values[low:high] that is not below `least`, or `high`."""
    while low < high:
        middle = (low + high) >> 1
        if values[middle] < least:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True, error_model="numpy")
def _choices(low, high, cap, gone, begin, most, singles, moves, waste, spent):  # type: ignore[no-untyped-def]
    """What a rank with a load from `low` to `high` may do: `waste` and `spent` copies [choices].

    Choice k < LISTED + 1: sheds by k copies and receives nothing; then: by more than are listed;
    last: receives, and wastes nothing. `spent` is above `moves` where it cannot be.
    """
    need = low - cap
    least = 0
    while least <= singles and most[least] < need:
        least += 1
    if least > singles:
        least = moves + 1
    for k in range(LISTED + 1):
        waste[k], spent[k] = 0, k
        if begin[k + 1] == begin[k]:  # not listed
            spent[k] = max(least, k) if singles > 0 else moves + 1
            continue
        i = _first(gone, begin[k], begin[k + 1], need)
        if i == begin[k + 1]:
            spent[k] = moves + 1
        else:
            waste[k] = max(0, cap - high + gone[i])
    waste[LISTED + 1], spent[LISTED + 1] = 0, max(least, LISTED + 1)
    if singles == 0:
        spent[LISTED + 1] = moves + 1
    waste[LISTED + 2], spent[LISTED + 2] = 0, least


@njit(cache=True, nogil=True, error_model="numpy")
def prices(  # type: ignore[no-untyped-def]
    load, holders, hold, fewest, rows, bits, cells, start, cap, gone, begin, most, singles, moves,
    more, lam,
):  # fmt: skip
    """Least price [multipliers, rows, cells] that a rank still pays, whatever the others do.

    The price: tokens of room wasted, `lam` for each copy received (an expert's are shared by its
    holders) and if the rank receives. Row rows[g] + j: j of its shared experts are decided.
    Cell i: it carries between start + (i << bits) and a cell more so far.
    """
    ranks, sets = cap.size, lam.size
    out = np.empty((sets, rows[ranks], cells), dtype=np.int64)
    waste = np.empty(LISTED + 3, dtype=np.int64)
    spent = np.empty(LISTED + 3, dtype=np.int64)
    at = rows[1:] - 1
    for g in range(ranks):
        for i in range(cells):
            low = start[g] + (i << bits[g])
            _choices(
                low, low + (1 << bits[g]), cap[g], gone, begin[g], most[g], singles[g], moves,
                waste, spent,
            )  # fmt: skip
            for p in range(sets):
                best = NEVER
                for k in range(LISTED + 3):
                    if spent[k] <= moves:
                        units = spent[k] + (1 if k > LISTED + 1 else 0)
                        best = min(best, waste[k] + lam[p] * units)
                out[p, at[g], i] = best
    for e in range(load.size - 1, -1, -1):
        count = holders[e]
        for h in range(count):
            g = hold[e, h]
            at[g] -= 1
            for p in range(sets):
                here, done = out[p, at[g]], out[p, at[g] + 1]
                elsewhere = lam[p] * max(0, fewest[e] - (count - 1)) // count
                for i in range(cells):
                    here[i] = min(NEVER, done[i] + elsewhere)
                for n in range(min(fewest[e], count + more), count + more + 1):
                    high = load[e] // n
                    low = load[e] // (count + moves) if n == count + more else high
                    first, last = low >> bits[g], (high + 1 >> bits[g]) + 1
                    pay = lam[p] * max(0, n - count) // count
                    if last - first > SPAN:
                        for i in range(cells - first):
                            here[i] = min(here[i], pay)
                        continue
                    for i in range(cells - first):
                        best = NEVER
                        for j in range(i + first, min(i + last, cells - 1) + 1):
                            best = min(best, done[j])
                        here[i] = min(here[i], best + pay)
    return out


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _price(row, bits, low, high):  # type: ignore[no-untyped-def]
    """Least price of a load between `low` and `high` above the rank's start."""
    first, last = low >> bits, high >> bits
    if first >= row.size:
        return NEVER
    if last - first > SPAN:
        return 0
    best = row[first]
    for i in range(first + 1, min(last, row.size - 1) + 1):
        best = min(best, row[i])
    return best


@njit(cache=True, nogil=True, error_model="numpy")
def _put(low, high, width, table, lows, highs, count, shift):  # type: ignore[no-untyped-def]
    """Put a state, or join it to one that is alike; the number of states then.

    `low`: waste, copies received, ranks that receive, then what each open rank carries at least;
    `high`: the same with what it carries at most. Alike: all but the waste, loads but for `shift`
    bits.
    """
    key = np.uint64(low[1] * 1009 + low[2])
    for i in range(3, width):
        key = (key ^ np.uint64(low[i] >> shift)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    at = np.int64(key & np.uint64(table.size - 1))
    while table[at] >= 0:
        n = table[at]
        alike = lows[n, 1] == low[1] and lows[n, 2] == low[2]
        i = 3
        while alike and i < width:
            alike = lows[n, i] >> shift == low[i] >> shift
            i += 1
        if alike:
            lows[n, 0] = min(lows[n, 0], low[0])
            for i in range(3, width):
                lows[n, i] = min(lows[n, i], low[i])
                highs[n, i] = max(highs[n, i], high[i])
            return count
        at = (at + 1) & (table.size - 1)
    table[at] = count
    for i in range(width):
        lows[count, i], highs[count, i] = low[i], high[i]
    return count + 1


@njit(cache=True, nogil=True, error_model="numpy")
def _join(width, table, lows, highs, count, shift, most):  # type: ignore[no-untyped-def]
    """Join states over ever more bits until at most `most` are left; their number, the bits."""
    while count > most:
        shift += 1
        table[:] = -1
        n = 0
        for i in range(count):  # in place: n <= i
            n = _put(lows[i], highs[i], width, table, lows, highs, n, shift)
        count = n
    return count, shift


@njit(cache=True, nogil=True, error_model="numpy")
def widest(order, holders, hold, ranks):  # type: ignore[no-untyped-def]
    """Most ranks that are open at once."""
    opened = np.zeros(ranks, dtype=np.bool_)
    most = now = 0
    for step in order:
        if step >= 0:
            for h in range(holders[step]):
                if not opened[hold[step, h]]:
                    opened[hold[step, h]] = True
                    now += 1
            most = max(most, now)
        elif opened[-1 - step]:
            now -= 1
    return most


@njit(cache=True, nogil=True, error_model="numpy")
def excludes(  # type: ignore[no-untyped-def]
    load, holders, hold, fewest, order, rows, bits, start, spread, cap, gone, begin, most, singles,
    moves, more, slack, price, lam, limit,
):  # fmt: skip
    """Whether no choice keeps every rank within `cap` and wastes at most `slack`; and the effort.

    `order`: an expert to decide, or -1 - a rank all of whose experts are decided. `price`
    [multipliers, rows, cells] with `lam`: a state that together with them is above `slack` is
    dropped. At most `limit` states.
    """
    ranks, sets = cap.size, lam.size
    known = np.empty(sets, dtype=np.int64)  # prices of ranks not yet open, less the budget's
    for p in range(sets):
        known[p] = -2 * lam[p] * moves
        for g in range(ranks):
            known[p] += _price(price[p, rows[g]], bits[g], 0, spread[g])
        if known[p] > slack:
            return True, 0
    full = widest(order, holders, hold, ranks) + 3
    lows, highs = np.empty((limit + 1, full), np.int64), np.empty((limit + 1, full), np.int64)
    new_lows, new_highs = np.empty_like(lows), np.empty_like(highs)
    size = 4
    while size < 2 * (limit + 1):
        size *= 2
    table = np.full(size, -1)
    column = np.full(ranks, -1)
    rank = np.empty(full, dtype=np.int64)
    row = rows[:-1].copy()
    part = np.empty(sets, dtype=np.int64)
    low, high = np.empty(full, dtype=np.int64), np.empty(full, dtype=np.int64)
    waste = np.empty(LISTED + 3, dtype=np.int64)
    spent = np.empty(LISTED + 3, dtype=np.int64)
    lows[0, :3] = 0
    highs[0, :3] = 0
    count, width, shift, effort = 1, 3, 0, 0
    gap, coarse = -1, 0
    while cap.max() >> coarse > 8192:
        coarse += 1
    for step in order:
        table[:] = -1
        n = 0
        before = width
        if step >= 0:
            for h in range(holders[step]):
                g = hold[step, h]
                if column[g] < 0:
                    column[g] = width
                    rank[width] = g
                    width += 1
                    for p in range(sets):
                        known[p] -= _price(price[p, rows[g]], bits[g], 0, spread[g])
                row[g] += 1
        else:
            g = -1 - step
            gap = column[g]
            if gap < 0:
                for p in range(sets):
                    known[p] -= _price(price[p, rows[g]], bits[g], 0, spread[g])
            else:
                width -= 1
                rank[gap] = rank[width]
                column[rank[width]] = gap
                column[g] = -1
        for s in range(count):
            for i in range(width):
                if i < before:
                    low[i], high[i] = lows[s, i], highs[s, i]
                else:
                    low[i], high[i] = 0, spread[rank[i]]
            if step < 0 and 3 <= gap < width:
                low[gap], high[gap] = lows[s, width], highs[s, width]
            for p in range(sets):
                part[p] = known[p] + low[0] + lam[p] * (low[1] + low[2])
                for i in range(3, width):
                    g = rank[i]
                    decided = False
                    if step >= 0:
                        for h in range(holders[step]):
                            decided |= hold[step, h] == g
                    if not decided:
                        part[p] += _price(price[p, row[g]], bits[g], low[i], high[i])
            if step >= 0:
                for kept in range(1 << holders[step]):
                    copies = 0
                    for h in range(holders[step]):
                        copies += kept >> h & 1
                    least = max(0, fewest[step] - copies)
                    last = max(least, more)  # stands for any more
                    for m in range(least, min(last, moves - lows[s, 1]) + 1):
                        y = load[step] // (copies + m) + 1
                        x = load[step] // (copies + moves) if m == last else y - 1
                        effort += 1
                        for h in range(holders[step]):
                            if kept >> h & 1:
                                low[column[hold[step, h]]] += x
                                high[column[hold[step, h]]] += y
                        fits = True
                        for p in range(sets):
                            total = part[p] + lam[p] * m
                            for h in range(holders[step]):
                                g = hold[step, h]
                                i = column[g]
                                total += _price(price[p, row[g]], bits[g], low[i], high[i])
                            if total > slack:
                                fits = False
                                break
                        if fits:
                            low[1] += m
                            n = _put(low, high, width, table, new_lows, new_highs, n, shift)
                            low[1] -= m
                            if n > limit:
                                shift = max(shift, coarse)
                                n, shift = _join(
                                    width, table, new_lows, new_highs, n, shift, 3 * limit // 4
                                )
                        for h in range(holders[step]):
                            if kept >> h & 1:
                                low[column[hold[step, h]]] -= x
                                high[column[hold[step, h]]] -= y
            else:
                g = -1 - step
                x, y = start[g], start[g] + spread[g]
                if gap >= 0:
                    x, y = start[g] + lows[s, gap], start[g] + highs[s, gap]
                _choices(x, y, cap[g], gone, begin[g], most[g], singles[g], moves, waste, spent)
                dearest = NEVER
                for k in range(LISTED + 3):
                    m, receives = spent[k], 1 if k > LISTED + 1 else 0
                    effort += 1
                    fits = low[1] + m <= moves and low[2] + receives <= moves
                    if receives == 0:  # more copies that waste no less are no use
                        fits &= waste[k] < dearest
                        dearest = min(dearest, waste[k] if m <= moves else NEVER)
                    for p in range(sets):
                        fits &= part[p] + waste[k] + lam[p] * (m + receives) <= slack
                    if fits:
                        low[0] += waste[k]
                        low[1] += m
                        low[2] += receives
                        n = _put(low, high, width, table, new_lows, new_highs, n, shift)
                        low[0] -= waste[k]
                        low[1] -= m
                        low[2] -= receives
                        if n > limit:
                            shift = max(shift, coarse)
                            n, shift = _join(
                                width, table, new_lows, new_highs, n, shift, 3 * limit // 4
                            )
        if n == 0:
            return True, effort
        count = n
        lows, new_lows = new_lows, lows
        highs, new_highs = new_highs, highs
    return False, effort
