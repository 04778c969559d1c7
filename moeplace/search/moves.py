"""Compiled search with a budget of moves: change little of the current plan (even routing).

A solution is a list of steps from the current plan: exchanges of two slots (at most two copies
received) and replica transfers (a slot gives up one copy and receives another). Greedy: the
step out of the slowest rank that lowers sum_g (T_g / T_max)^32 most for each copy received,
counted against the current plan, so that undoing costs nothing. Then kicks: some steps are
taken back, the others replayed, the rest chosen again; the outcome is kept if not worse. After
many without success the choice is blurred, and now and then a worse outcome is gone on from.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from moeplace._check import FloatArray, IntArray
from moeplace.search.construct import refresh
from moeplace.search.improve import arrives, random_below
from moeplace.search.mend import mend
from moeplace.search.state import HELD, OLD, PINNED, State

#: Longest list of steps for each copy that may be received, undone ones included.
STEPS_PER_MOVE = 3
#: After so many kicks without success, scores of steps are lowered at random by up to `BLUR` in
#: one kick of two, and one outcome in `STRAY` is gone on from although it is worse; after `HOME`
#: times as many the search returns to its best.
STUCK, BLUR, STRAY, HOME = 30, 0.9, 30, 10


@njit(cache=True, nogil=True, error_model="numpy")
def _weight(x):  # type: ignore[no-untyped-def]
    """x^32: close to the maximum, but it rewards relief of the second slowest too."""
    x *= x
    x *= x
    x *= x
    x *= x
    return x * x


@njit(cache=True, nogil=True, error_model="numpy")
def _find(slot, size, e):  # type: ignore[no-untyped-def]
    for k in range(size):
        if slot[k] == e:
            return k
    return -1


@njit(cache=True, nogil=True, error_model="numpy")
def _place(g, k, e, slot, on, holders, count):  # type: ignore[no-untyped-def]
    """Put expert e in slot k of rank g in place of what is there; returns the copies received."""
    empty = on.shape[1] - 1
    a = slot[g, k]
    cost = arrives(on, g, e) - arrives(on, g, a)
    if a != empty:
        on[g, a] &= ~np.uint8(HELD)
        n = 0
        while holders[a, n] != g:
            n += 1
        holders[a, n] = holders[a, count[a] - 1]
    count[a] -= 1
    if e != empty:
        on[g, e] |= HELD
        holders[e, count[e]] = g
    count[e] += 1
    slot[g, k] = e
    return cost


@njit(cache=True, nogil=True, error_model="numpy")
def _carry(g, slot, cap, base, load, count):  # type: ignore[no-untyped-def]
    """Tokens of rank g, summed afresh."""
    total = base[g]
    for k in range(cap[g]):
        e = slot[g, k]
        if e != load.size - 1:
            total += load[e] / count[e]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _apply(  # type: ignore[no-untyped-def]
    kind, g, h, a, b, slot, on, holders, count, tokens, cap, least, most, base, load
):
    """Exchange a on g with b on h (kind 0), or give up a on h for b (kind 1), if possible.

    Returns the copies received, or -1000 if the step no longer fits.
    """
    if kind == 0:
        i = _find(slot[g], cap[g], a)
        j = _find(slot[h], cap[h], b)
        if i < 0 or j < 0 or on[h, a] & HELD or on[g, b] & HELD:
            return -1000
        cost = _place(g, i, b, slot, on, holders, count)
        cost += _place(h, j, a, slot, on, holders, count)
        tokens[g] = _carry(g, slot, cap, base, load, count)
        tokens[h] = _carry(h, slot, cap, base, load, count)
        return cost
    empty = load.size - 1
    k = _find(slot[h], cap[h], a)
    if k < 0 or on[h, b] & HELD or count[a] <= least[a] or count[b] >= most[b]:
        return -1000
    cost = _place(h, k, b, slot, on, holders, count)
    tokens[h] = _carry(h, slot, cap, base, load, count)
    for e in (a, b):
        if e != empty:
            for n in range(count[e]):
                r = holders[e, n]
                tokens[r] = _carry(r, slot, cap, base, load, count)
    return cost


@njit(cache=True, nogil=True, error_model="numpy")
def _legal(kind, g, h, a, b, on, count, least, most, room):  # type: ignore[no-untyped-def]
    """Whether a step obeys the rules: exchange a on g with b on h, or h gives up a for b."""
    empty = on.shape[1] - 1
    if kind == 0:
        if g == h or (a == empty and b == empty):
            return False
        if on[h, a] & ~np.uint8(OLD) or on[g, b] & ~np.uint8(OLD):
            return False
        if (on[g, a] | on[h, b]) & PINNED:
            return False
        cost = arrives(on, h, a) - arrives(on, g, a) + arrives(on, g, b) - arrives(on, h, b)
        return cost <= room
    if count[a] <= least[a] or on[h, a] & PINNED:
        return False
    if count[b] >= most[b] or on[h, b] & ~np.uint8(OLD):
        return False
    return a != b and arrives(on, h, b) - arrives(on, h, a) <= room


@njit(cache=True, nogil=True, error_model="numpy")
def _transfer(h, a, b, top, on, holders, count, tokens, speed, load):  # type: ignore[no-untyped-def]
    """Decrease of the weighted sum if rank h gives up a (or EMPTY) for b (or EMPTY)."""
    empty = load.size - 1
    less_a = 0.0
    more_a = 0.0
    if a != empty:
        less_a = load[a] / count[a]
        more_a = load[a] / (count[a] - 1) - less_a
    gain = 0.0
    more_b = 0.0
    fall_b = 0.0
    if b != empty:
        more_b = load[b] / (count[b] + 1)
        fall_b = load[b] / count[b] - more_b
        for n in range(count[b]):
            r = holders[b, n]
            after = tokens[r] - fall_b
            if a != empty and on[r, a] & HELD:
                after += more_a
            scale = top * speed[r]
            gain += _weight(tokens[r] / scale) - _weight(after / scale)
    if a != empty:
        for n in range(count[a]):
            r = holders[a, n]
            if r != h and not (b != empty and on[r, b] & HELD):
                scale = top * speed[r]
                gain += _weight(tokens[r] / scale) - _weight((tokens[r] + more_a) / scale)
    scale = top * speed[h]
    gain += _weight(tokens[h] / scale) - _weight((tokens[h] - less_a + more_b) / scale)
    return gain


@njit(cache=True, nogil=True, error_model="numpy")
def _blurred(blur, stream, layer):  # type: ignore[no-untyped-def]
    """A random factor between 1 - blur and 1."""
    return 1.0 - blur * random_below(stream, layer, 1 << 20) / float(1 << 20)


@njit(cache=True, nogil=True, error_model="numpy")
def _best_step(  # type: ignore[no-untyped-def]
    g, room, slot, on, holders, count, tokens, cap, least, most, speed, load, blur, stream, layer
):
    """Step out of the slowest rank g with most gain per copy received, of at most `room` copies.

    `blur`: the part of a score that is random.

    Returns (score, kind, other rank, a, b, search steps).
    """
    ranks = cap.size
    empty = load.size - 1
    top = tokens[g] / speed[g]
    best = 1e-9
    kind = -1
    to = -1
    give = -1
    take = -1
    steps = 0
    for h in range(ranks):
        if h == g:
            continue
        for i in range(cap[g]):
            a = slot[g, i]
            if a == empty:
                continue
            value = load[a] / count[a]
            may_go = not on[g, a] & PINNED
            may = on[h, a] & ~np.uint8(OLD) == 0
            more = may and count[a] < most[a]
            comes = arrives(on, h, a) - arrives(on, g, a)
            for j in range(cap[h]):
                b = slot[h, j]
                steps += 1
                # an exchange
                other = 0.0 if b == empty else load[b] / count[b]
                if (
                    may
                    and may_go
                    and value > other
                    and on[g, b] & ~np.uint8(OLD) == 0
                    and (b == empty or not on[h, b] & PINNED)
                ):
                    cost = comes + arrives(on, g, b) - arrives(on, h, b)
                    if cost <= room:
                        ends = (tokens[h] + value - other) / speed[h] / top
                        if ends < 1.0:
                            gain = (
                                1.0
                                + _weight(tokens[h] / speed[h] / top)
                                - _weight((tokens[g] - value + other) / speed[g] / top)
                                - _weight(ends)
                            )
                            score = gain / cost if cost > 0 else 1e3 * gain
                            if score > best and blur > 0:
                                score *= _blurred(blur, stream, layer)
                            if score > best:
                                best, kind, to, give, take = score, 0, h, a, b
                # rank h gives up b for a copy of a
                if more and count[b] > least[b] and not on[h, b] & PINNED:
                    cost = arrives(on, h, a) - arrives(on, h, b)
                    if cost <= room:
                        gain = _transfer(h, b, a, top, on, holders, count, tokens, speed, load)
                        score = gain / cost if cost > 0 else 1e3 * gain
                        steps += count[a] + (0 if b == empty else count[b])
                        if score > best and blur > 0:
                            score *= _blurred(blur, stream, layer)
                        if score > best:
                            best, kind, to, give, take = score, 1, h, b, a
    for i in range(cap[g]):  # the slowest rank gives up a copy
        a = slot[g, i]
        if a == empty or count[a] <= least[a] or on[g, a] & PINNED:
            continue
        for b in range(empty + 1):
            if b != empty and (
                on[g, b] & ~np.uint8(OLD) != 0
                or count[b] >= most[b]
                or load[b] / (count[b] + 1) > load[a] / count[a]
            ):
                continue
            cost = arrives(on, g, b) - arrives(on, g, a)
            if cost > room:
                continue
            gain = _transfer(g, a, b, top, on, holders, count, tokens, speed, load)
            score = gain / cost if cost > 0 else 1e3 * gain
            steps += count[a]
            if score > best and blur > 0:
                score *= _blurred(blur, stream, layer)
            if score > best:
                best, kind, to, give, take = score, 1, g, a, b
    return best, kind, to, give, take, steps


@njit(cache=True, nogil=True, error_model="numpy")
def _slowest(tokens, speed):  # type: ignore[no-untyped-def]
    g = 0
    for h in range(1, speed.size):
        if tokens[h] / speed[h] > tokens[g] / speed[g]:
            g = h
    return g


@njit(cache=True, nogil=True, error_model="numpy")
def _reset(slot, old, on, holders, count, tokens, cap, base, load):  # type: ignore[no-untyped-def]
    """Back to the current plan, without comparing what is equal."""
    for g in range(cap.size):
        for k in range(cap[g]):
            if slot[g, k] != old[g, k] and slot[g, k] != load.size - 1:
                e = slot[g, k]
                on[g, e] &= ~np.uint8(HELD)
    count[:] = 0
    for g in range(cap.size):
        for k in range(cap[g]):
            e = old[g, k]
            slot[g, k] = e
            if e != load.size - 1:
                on[g, e] |= HELD
                holders[e, count[e]] = g
            count[e] += 1
    for g in range(cap.size):
        tokens[g] = _carry(g, slot, cap, base, load, count)


@njit(cache=True, nogil=True, error_model="numpy")
def _search(  # type: ignore[no-untyped-def]
    layers, budgets, targets, allowances, load, base, speeds, cap, leasts, most, olds, slots, token,
    copies, ons, stream, works, lists, lengths, curves,
):  # fmt: skip
    ranks = cap.size
    experts = load.shape[1] - 1
    holders = np.empty((experts, ranks), dtype=np.int64)
    step = np.empty(5, dtype=np.int64)
    trial = np.empty_like(lists[0])
    here = np.empty_like(lists[0])
    for turn in range(layers.size):
        layer = layers[turn]
        speed = speeds[layer]
        least = leasts[layer]
        slot = slots[layer]
        old = olds[layer]
        tokens = token[layer]
        on = ons[layer]
        count = copies[layer]
        allowance = allowances[turn]
        left = budgets[turn]
        target = targets[turn]
        kept = lists[layer]
        reached = np.inf
        first = True
        here[:] = kept
        length = lengths[layer]
        now = np.inf
        fails = 0
        while True:
            # replay what is kept of the list
            _reset(slot, old, on, holders, count, tokens, cap, base[layer], load[layer])
            left -= 4 * cap.sum()
            used = 0
            n = 0
            drop = 0 if first else 1 + random_below(stream, layer, 3)
            blur = BLUR if fails > STUCK and random_below(stream, layer, 2) == 0 else 0.0
            for s in range(length):
                # each step is dropped with probability drop / length
                if not first and random_below(stream, layer, length) < drop:
                    continue
                step[:] = here[s]
                cost = _apply(
                    step[0], step[1], step[2], step[3], step[4], slot, on, holders, count, tokens,
                    cap, least, most, base[layer], load[layer],
                )  # fmt: skip
                left -= 4 * cap[0]
                if cost != -1000:
                    used += cost
                    trial[n] = step
                    n += 1
            # now and then a step at random
            if not first and random_below(stream, layer, 2) == 0 and n < trial.shape[0]:
                kind = random_below(stream, layer, 2)
                g = random_below(stream, layer, ranks)
                h = random_below(stream, layer, ranks)
                if cap[g] > 0 and cap[h] > 0:
                    at = g if kind == 0 else h
                    a = slot[at, random_below(stream, layer, cap[at])]
                    b = slot[h, random_below(stream, layer, cap[h])]
                    if kind == 1:
                        b = random_below(stream, layer, experts + 1)
                    if _legal(kind, g, h, a, b, on, count, least, most, allowance - used):
                        cost = _apply(
                            kind, g, h, a, b, slot, on, holders, count, tokens, cap, least, most,
                            base[layer], load[layer],
                        )  # fmt: skip
                        if cost != -1000:
                            used += cost
                            trial[n, :] = (kind, g, h, a, b)
                            n += 1
            # greedy from there
            g = _slowest(tokens, speed)
            while tokens[g] / speed[g] > target and (first or left > 0) and n < trial.shape[0]:
                _, kind, h, a, b, steps = _best_step(
                    g, allowance - used, slot, on, holders, count, tokens, cap, least, most, speed,
                    load[layer], blur, stream, layer,
                )  # fmt: skip
                left -= steps
                if kind < 0:
                    break
                used += _apply(
                    kind, g, h, a, b, slot, on, holders, count, tokens, cap, least, most,
                    base[layer], load[layer],
                )  # fmt: skip
                trial[n, :] = (kind, g, h, a, b)
                n += 1
                g = _slowest(tokens, speed)
                if tokens[g] / speed[g] < curves[layer, used]:
                    curves[layer, used] = tokens[g] / speed[g]
            ended = tokens[g] / speed[g]
            fails += 1
            stray = fails > STUCK and n > 0 and random_below(stream, layer, STRAY) == 0
            if used <= allowance and (ended <= now or stray):
                now = ended
                length = n
                here[:n] = trial[:n]
            if used <= allowance and ended <= reached:
                fails = 0 if ended < reached * (1 - 1e-9) else fails
                reached = ended
                lengths[layer] = n
                kept[:n] = trial[:n]
            if fails > HOME * STUCK:
                now = reached
                length = lengths[layer]
                here[:length] = kept[:length]
                fails = 0
            first = False
            if reached <= target or left <= 0 or lengths[layer] == 0:
                break
        _reset(slot, old, on, holders, count, tokens, cap, base[layer], load[layer])
        for s in range(lengths[layer]):
            step[:] = kept[s]
            _apply(
                step[0], step[1], step[2], step[3], step[4], slot, on, holders, count, tokens, cap,
                least, most, base[layer], load[layer],
            )  # fmt: skip
        works[layer] += budgets[turn] - left


class Moves:
    """Steps from a current plan for each layer, to be continued call by call.

    Parameters
    ----------
    state : State
        Holds the current plan in all layers (see `construct.adopt`).
    allowance : int array [layers]
        Copies that each layer may receive.
    """

    def __init__(self, state: State, allowance: IntArray) -> None:
        experts = state.load.shape[1] - 1
        self.state, self.allowance = state, allowance
        self.old = state.slot.copy()
        length = STEPS_PER_MOVE * int(allowance.max(initial=0)) + 8
        self.steps = np.zeros((allowance.size, length, 5), dtype=np.int64)
        self.lengths = np.zeros(allowance.size, dtype=np.int64)
        #: Best makespan seen with so many copies received [layers, copies].
        self.curve = np.full((allowance.size, int(allowance.max(initial=0)) + 1), np.inf)
        self.curve[:, 0] = state.makespan
        held = state.on[:, :, :experts]
        held |= np.where(held & HELD, np.uint8(OLD), np.uint8(0))

    def mend(self, layers: IntArray) -> None:
        """Start `layers` from a mended placement where the current plan breaks a rule.

        What mending receives is taken off the layer's allowance; where that is too little, the
        layer stays as it is, and the plan is not legal.
        """
        state, experts = self.state, self.state.load.shape[1] - 1
        for layer in layers:
            slot = self.old[layer].copy()
            busy, free = state.tokens[layer] / state.speed[layer], int(state.least[layer, -1])
            rules = (state.load[layer], state.most, free)
            if not mend(slot, state.on[layer], busy, state.cap, *rules):
                continue
            new = [
                (g, slot[g, k])
                for g in range(state.cap.size)
                for k in range(state.cap[g])
                if slot[g, k] != experts and not state.on[layer, g, slot[g, k]] & OLD
            ]
            if len(new) <= self.allowance[layer]:
                self.allowance[layer] -= len(new)
                self.old[layer] = state.slot[layer] = slot
        refresh(state, layers)
        self.curve[:, 0] = state.makespan

    def improve(
        self,
        layers: IntArray,
        budgets: IntArray,
        targets: FloatArray,
        pool: ThreadPoolExecutor,
        workers: int,
    ) -> None:
        """Search `layers` with `budgets` steps each, until `targets` (in `state.unit`)."""
        state = self.state

        def run(part: slice) -> None:
            _search(
                layers[part], budgets[part], targets[part], self.allowance[layers[part]],
                state.load, state.base, state.speed, state.cap, state.least, state.most, self.old,
                state.slot, state.tokens, state.copies, state.on, state.random, state.work,
                self.steps, self.lengths, self.curve,
            )  # fmt: skip

        list(pool.map(run, [slice(part, None, workers) for part in range(workers)]))

    def share_out(
        self, total: int, weight: FloatArray, targets: FloatArray, pool: ThreadPoolExecutor
    ) -> None:
        """Limit the layers' allowances to `total` copies in all, where they save most.

        Each layer's makespan against copies received is replaced by its lower convex hull;
        the total goes to the steepest pieces (`weight` [layers]: seconds per unit of makespan).
        All layers then start again from the current plan, greedily.
        """
        pieces = []  # (seconds saved per copy, layer, copies)
        for layer, curve in enumerate(np.minimum.accumulate(self.curve, axis=1)):
            at, end = 0, int(self.allowance[layer])
            while at < end:
                slopes = (curve[at] - curve[at + 1 : end + 1]) / np.arange(1, end - at + 1)
                step = int(slopes.argmax()) + 1
                if slopes[step - 1] <= 0:
                    break
                pieces.append((-slopes[step - 1] * weight[layer], layer, step))
                at += step
        self.allowance = np.zeros_like(self.allowance)
        for _, layer, copies in sorted(pieces):
            given = min(copies, total)
            self.allowance[layer] += given
            total -= given
        self.lengths[:] = 0
        layers = np.arange(self.allowance.size)
        self.improve(layers, np.ones_like(layers), targets, pool, 1)
