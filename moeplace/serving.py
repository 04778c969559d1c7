"""Compiled loop of the serving simulation: steps of one pool of ranks, batch by batch.

`moeplace.simulate` says what is modelled; here is how. Every step draws, in each layer, how many
of the batch's tokens choose each expert. Draws come from a hash of (seed, step, layer, expert)
and are monotone in the mean, so that plans that are compared see the same luck.
"""

import math

import numpy as np
from numba import njit

import moeplace.search.compiling  # noqa: F401 - tells when kernels are compiled

#: Expected tokens of an expert from which counts are normal, rounded to whole ones.
NORMAL = 12.0
#: Expected tokens that count as none: what is left when the last request with an expert has gone.
NONE = 1e-9
#: Columns of the log of steps.
STEPS = ("start", "seconds", "moe", "mean_rank", "fastest", "link", "tokens", "assignments", "plan")
#: 1 / c for the counts that are drawn one by one.
INVERSE = 1.0 / np.maximum(np.arange(4096.0), 1.0)
_STEP, _MIX1, _MIX2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
# Acklam's rational approximation of the normal quantile, relative error below 1.2e-9
_A = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02,
      1.383577518672690e02, -3.066479806614716e01, 2.506628277459239e00)  # fmt: skip
_B = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02,
      6.680131188771972e01, -1.328068155288572e01)  # fmt: skip
_C = (-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00,
      -2.549732539343734e00, 4.374664141464968e00, 2.938163982698783e00)  # fmt: skip
_D = (7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00, 3.754408661907416e00)


@njit(cache=True, nogil=True, error_model="numpy")
def mixed(key):  # type: ignore[no-untyped-def]
    """Hash of 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    key = (key ^ (key >> _S30)) * _MIX1
    key = (key ^ (key >> _S27)) * _MIX2
    return key ^ (key >> _S31)


@njit(cache=True, nogil=True, error_model="numpy")
def quantile(u):  # type: ignore[no-untyped-def]
    """Quantile of the standard normal distribution."""
    if 0.02425 <= u <= 0.97575:
        q = u - 0.5
        r = q * q
        top = ((((_A[0] * r + _A[1]) * r + _A[2]) * r + _A[3]) * r + _A[4]) * r + _A[5]
        low = ((((_B[0] * r + _B[1]) * r + _B[2]) * r + _B[3]) * r + _B[4]) * r + 1.0
        return q * top / low
    q = math.sqrt(-2.0 * math.log(min(u, 1.0 - u)))
    top = ((((_C[0] * q + _C[1]) * q + _C[2]) * q + _C[3]) * q + _C[4]) * q + _C[5]
    low = (((_D[0] * q + _D[1]) * q + _D[2]) * q + _D[3]) * q + 1.0
    return top / low if u < 0.5 else -top / low


@njit(cache=True, nogil=True, error_model="numpy")
def draw(mean, tokens, key, counts, scratch):  # type: ignore[no-untyped-def]
    """Draw how many of a batch's tokens choose each expert of one layer.

    A token chooses an expert once at most, so a count is binomial (`tokens`, mean / tokens).
    Counts are then corrected to the sum that they must have, each by its part of the variance:
    to first order the covariance of choosing k of E without replacement (Hajek 1964). The
    correction makes them fractional; those that were 0 stay 0.

    Short loops over all experts without branches: the compiler makes vector code of them.

    Parameters
    ----------
    mean : [experts]
    tokens : int
    key : uint64
    counts : [experts]
        Written.
    scratch : [4, experts]
        Written.

    Returns
    -------
    float
        Sum of the counts.
    """
    luck, variances = scratch[0], scratch[2]
    experts = mean.size
    total = 0.0
    few = 0
    for e in range(experts):
        m = mean[e]
        total += m if m > NONE else 0.0
        few += (m > NONE) & (m < NORMAL)
    for e in range(experts):
        bits = mixed(key + np.uint64(e + 1) * _STEP) >> _S11
        luck[e] = (np.float64(bits) + 0.5) * (1.0 / 9007199254740992.0)
        counts[e] = 0.0
    each = 1.0 / tokens
    if few > 0:
        _count(mean, tokens, few, counts, scratch)
    if few < experts:
        large = scratch[1]  # their numbers first: no branch that is hard to foresee
        found = 0
        for e in range(experts):
            large[found] = e
            found += mean[e] >= NORMAL
        for i in range(found):
            e = int(large[i])
            m = mean[e]
            scatter = math.sqrt(m * max(1.0 - m * each, 0.0))
            counts[e] = max(math.floor(m + scatter * quantile(luck[e]) + 0.5), 0.0)
    drawn = 0.0
    spread = 0.0
    for e in range(experts):
        m = mean[e]
        variances[e] = m * max(1.0 - m * each, 0.0) if counts[e] > 0 else 0.0
    for e in range(experts):
        drawn += counts[e]
        spread += variances[e]
    if drawn <= 0:
        counts[:] = mean
        return total
    if spread <= 0:
        return drawn
    share = (drawn - total) / spread
    cut = 0
    for e in range(experts):
        c = counts[e] - share * variances[e]
        below = (c <= 0) & (counts[e] > 0)
        cut += below
        counts[e] = 1e-9 if below else c
    if cut > 0:
        share = total / counts.sum()
        for e in range(experts):
            counts[e] *= share
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _count(mean, tokens, few, counts, scratch):  # type: ignore[no-untyped-def]
    """Binomial counts of the `few` experts with small means, by inversion of `luck`.

    The chance of none is a power by repeated squaring. Then all experts are counted at once,
    until few are left to count, which go on alone.
    """
    luck, chance, until, odds = scratch[0], scratch[1], scratch[2], scratch[3]
    experts = mean.size
    each = 1.0 / tokens
    for e in range(experts):
        m = mean[e]
        p = m * each if (m > NONE) & (m < NORMAL) & (m * each < 1.0) else 0.0
        until[e] = 1.0 - p
        odds[e] = p / (1.0 - p)
        chance[e] = 1.0
    power = tokens
    while power > 0:
        if power & 1:
            for e in range(experts):
                chance[e] *= until[e]
        for e in range(experts):
            until[e] *= until[e]
        power >>= 1
    for e in range(experts):
        until[e] = chance[e]
    most = min(tokens, 4095)
    left = few
    c = 0
    while left > few >> 4 and c < most:
        c += 1
        factor = (tokens - c + 1) * INVERSE[c]
        left = 0
        for e in range(experts):
            more = luck[e] > until[e]
            counts[e] += more
            left += more
            chance[e] *= odds[e] * factor
            until[e] += chance[e]
    if left > 0:
        for e in range(experts):
            if luck[e] > until[e]:
                n = c
                part, end = chance[e], until[e]
                while luck[e] > end and n < most and part >= 1e-18:
                    n += 1
                    part *= odds[e] * (tokens - n + 1) * INVERSE[n]
                    end += part
                    counts[e] += 1.0
    for e in range(experts):
        if mean[e] * each >= 1.0 and mean[e] < NORMAL:  # every token chooses it
            counts[e] = mean[e]


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
            mean[layer], tokens, mixed(key + np.uint64(layer + 1) * _STEP), counts, scratch
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
        key = mixed(np.uint64(seed) * _MIX1 + np.uint64(steps + 1) * _MIX2)
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
