"""Compiled loop of the serving simulation: steps of one pool of ranks, batch by batch.

`moeplace.simulate` says what is modelled; here is how. Every step draws, in each layer, how many
of the batch's tokens choose each expert. `moeplace.draws` has how.
"""

import math

import numpy as np
from numba import njit

import moeplace.search.compiling  # noqa: F401 - tells when kernels are compiled
from moeplace.draws import MIX1, MIX2, STEP, draw, mixed

#: Columns of the log of steps.
STEPS = ("start", "seconds", "moe", "mean_rank", "fastest", "link", "tokens", "assignments", "plan")


@njit(cache=True, nogil=True, error_model="numpy")
def table_seconds(model, rank, tokens):  # type: ignore[no-untyped-def]
    """Latency of one rank by its table, as `Cluster.seconds` has it."""
    _, _, _, at, height, rate = model
    if tokens <= 0.0:
        return 0.0
    last = at.shape[1] - 1
    if tokens >= at[rank, last]:
        return height[rank, last] + (tokens - at[rank, last]) / rate[rank]
    k = np.searchsorted(at[rank], tokens)
    if k == 0:
        return height[rank, 0]
    part = (tokens - at[rank, k - 1]) / (at[rank, k] - at[rank, k - 1])
    return height[rank, k - 1] + part * (height[rank, k] - height[rank, k - 1])


@njit(cache=True, nogil=True, error_model="numpy")
def layer_ranks(counts, held, where, base, model, tokens_of, seconds):  # type: ignore[no-untyped-def]
    """Tokens and seconds of each rank [ranks] for an expert's counts [experts], one layer.

    `held` says what slots hold, each [slots]: expert, share, log(1 - share) (1 for a share of 1),
    and the numbers of those with a share between, their count last [slots + 1]; `where`, slots by
    rank: (first [ranks + 1], rank [slots]). A replica among several runs unless all of the
    expert's tokens went to others.
    """
    expert, share, rest, partial = held
    first, rank = where
    startup, activation, compute, at, _, rate = model
    replicas = seconds
    for g in range(seconds.size):
        tokens = base[g]
        runs = 0.0
        for j in range(first[g], first[g + 1]):
            c = counts[expert[j]]
            tokens += c * share[j]
            runs += (c > 0.0) & (rest[j] > 0.0)
        tokens_of[g] = tokens
        replicas[g] = runs
    for i in range(partial[partial.size - 1]):
        j = partial[i]
        replicas[rank[j]] += 1.0 - math.exp(counts[expert[j]] * rest[j])
    if at.shape[1] > 0:
        for g in range(seconds.size):
            seconds[g] = table_seconds(model, g, tokens_of[g])
        return
    for g in range(seconds.size):
        most = 0.0
        work = tokens_of[g] * (1.0 / rate[g])
        for k in range(startup.size):
            most = max(most, startup[k] + activation[k] * replicas[g] + compute[k] * work)
        seconds[g] = most if tokens_of[g] > 0.0 else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def step(mean, tokens, key, plan, where, base, weight, link, model, work, found):  # type: ignore[no-untyped-def]
    """Seconds of one forward pass of all layers; adds to `found` (see `STEPS`).

    mean : [layers, experts], expected assignments. plan : as `layer_ranks` has it, each
    [layers, ...]. base : [layers, ranks], a rank's own tokens for each assignment.
    link : (s, s a token).
    """
    expert, share, rest, partial = plan
    counts, scratch, tokens_of, seconds = work
    total = 0.0
    for layer in range(mean.shape[0]):
        routed = draw(
            mean[layer], tokens, mixed(key + np.uint64(layer + 1) * STEP), counts, scratch
        )
        own = base[layer] * routed
        held = (expert[layer], share[layer], rest[layer], partial[layer])
        layer_ranks(counts, held, where, own, model, tokens_of, seconds)
        slowest = 0.0
        fastest = np.inf
        middle = 0.0
        most = 0.0
        for g in range(seconds.size):
            slowest = max(slowest, seconds[g])
            fastest = min(fastest, seconds[g])
            middle += seconds[g]
            most = max(most, tokens_of[g] - own[g])
        sent = link[0] + link[1] * most if routed > 0 else 0.0
        total += weight[layer] * (slowest + sent)
        found[2] += weight[layer] * slowest
        found[3] += weight[layer] * middle / seconds.size
        found[4] += weight[layer] * fastest
        found[5] += weight[layer] * sent
        found[7] += routed
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def add(to, times, what):  # type: ignore[no-untyped-def]
    """Add an array so many times to another, both [layers, experts]."""
    for layer in range(to.shape[0]):
        for e in range(to.shape[1]):
            to[layer, e] += times * what[layer, e]


@njit(cache=True, nogil=True, error_model="numpy")
def serve(requests, profiles, top_k, plans, where, changes, base, weight, model, engine, seed):  # type: ignore[no-untyped-def]
    """Serve requests first come, first served, until the last is done.

    Parameters
    ----------
    requests : (arrival, prompt, output, profile), each [requests]
    profiles : float32 [profiles, layers, experts]
        Share of a layer's assignments.
    top_k : float
    plans, where : as in `step`; plans each [plans, layers, ...]
    changes : (at [plans - 1], stall [plans - 1]), in seconds
    base, weight, model : as in `step`
    engine : (max_tokens, max_running, step s, s a token, link s, link s a token)

    Returns
    -------
    begun, first, last : [requests]
        When its first step began, when its first token was there, and its last.
    steps : [steps, 9]
        As `STEPS`.
    """
    arrival, prompt, output, profile = requests
    max_tokens, max_running, fixed, each, link_fixed, link_each = engine
    link = (link_fixed, link_each)
    count = arrival.size
    layers, experts = profiles.shape[1:]
    ranks = base.shape[1]
    begun, first, last = np.full(count, np.nan), np.full(count, np.nan), np.full(count, np.nan)
    running = np.empty(count if max_running > count else int(max_running), dtype=np.int64)
    left = np.empty(running.size, dtype=np.int64)
    lives = 0
    steady = np.zeros((layers, experts))  # expected assignments of all that decode
    mean = np.empty((layers, experts))
    work = (np.empty(experts), np.empty((4, experts)), np.empty(ranks), np.empty(ranks))
    log = np.zeros((1024, 9))
    steps = 0
    head = 0  # the first request whose prompt is not done
    unread = prompt[0] if count else 0
    clock = 0.0
    plan = 0
    while head < count or lives > 0:
        if lives == 0 and arrival[head] > clock:
            clock = arrival[head]
        while plan < changes[0].size and changes[0][plan] <= clock:
            ended = log[steps - 1, 0] + log[steps - 1, 1] if steps else 0.0
            clock = max(clock, max(changes[0][plan], ended) + changes[1][plan])
            plan += 1
        # requests that come with their prompt done decode at once
        while head < count and arrival[head] <= clock and prompt[head] == 0:
            if lives == running.size:
                break
            begun[head] = clock
            running[lives], left[lives] = head, output[head]
            lives += 1
            add(steady, top_k, profiles[profile[head]])
            head += 1
            if head < count:
                unread = prompt[head]
        decoding = lives
        room = max_tokens - decoding
        fresh = 0
        begin = head
        joined = 0
        if room > 0 and head < count and arrival[head] <= clock and prompt[head] > 0:
            mean[:] = steady
            while head < count and arrival[head] <= clock and room > 0 and prompt[head] > 0:
                if output[head] > 1 and lives + joined >= running.size:
                    break
                chunk = min(unread, room)
                if unread == prompt[head]:
                    begun[head] = clock
                add(mean, chunk * top_k, profiles[profile[head]])
                fresh += chunk
                room -= chunk
                unread -= chunk
                if unread > 0:
                    break
                if output[head] > 1:
                    joined += 1
                head += 1
                if head < count:
                    unread = prompt[head]
        tokens = decoding + fresh
        if steps == log.shape[0]:
            larger = np.zeros((2 * steps, 9))
            larger[:steps] = log
            log = larger
        key = mixed(np.uint64(seed) * MIX1 + np.uint64(steps + 1) * MIX2)
        this = (plans[0][plan], plans[1][plan], plans[2][plan], plans[3][plan])
        # `steady` may fall below 0 by rounding, which `draw` takes for none
        drawn = mean if fresh > 0 else steady
        took = step(drawn, tokens, key, this, where, base, weight, link, model, work, log[steps])
        took += fixed + each * tokens
        log[steps, 0], log[steps, 1] = clock, took
        log[steps, 6], log[steps, 8] = tokens, plan
        steps += 1
        clock += took
        i = 0
        while i < lives:
            left[i] -= 1
            request = running[i]
            if np.isnan(first[request]):
                first[request] = clock
            if left[i] == 0:
                last[request] = clock
                add(steady, -top_k, profiles[profile[request]])
                lives -= 1
                running[i], left[i] = running[lives], left[lives]
            else:
                i += 1
        for request in range(begin, head):
            first[request] = clock
            if output[request] > 1:
                running[lives], left[lives] = request, output[request] - 1
                lives += 1
                add(steady, top_k, profiles[profile[request]])
            else:
                last[request] = clock
        if lives == 0:
            steady[:] = 0.0
    return begun, first, last, log[:steps]
