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
def draw(mean, tokens, key, counts, variances):  # type: ignore[no-untyped-def]
    """Draw how many of a batch's tokens choose each expert of one layer.

    A token chooses an expert once at most, so a count is binomial (`tokens`, mean / tokens).
    Counts are then corrected to the sum that they must have, each by its part of the variance:
    to first order the covariance of choosing k of E without replacement (Hajek 1964). The
    correction makes them fractional; those that were 0 stay 0.

    Parameters
    ----------
    mean : [experts]
    tokens : float
    key : uint64
    counts, variances : [experts]
        Written.

    Returns
    -------
    float
        Sum of the counts.
    """
    total = 0.0
    drawn = 0.0
    spread = 0.0
    each = 1.0 / tokens
    for e in range(mean.size):
        m = mean[e]
        key += _STEP
        counts[e] = 0.0
        variances[e] = 0.0
        if m <= 1e-9:  # what is left when the last request with this expert has gone
            continue
        total += m
        u = (np.float64(mixed(key) >> _S11) + 0.5) * (1.0 / 9007199254740992.0)
        p = min(m * each, 1.0)
        variance = m * (1.0 - p)
        if m >= NORMAL:
            c = max(math.floor(m + math.sqrt(variance) * quantile(u) + 0.5), 0.0)
        elif p >= 1.0:
            c = m
        else:
            c = 0.0
            if p < 0.02:  # log(1 - p) to 1e-10
                none = -m * (1.0 + p * (0.5 + p * (1 / 3 + p * (0.25 + p * 0.2))))
            else:
                none = tokens * math.log1p(-p)
            chance = math.exp(none)
            odds = p / (1.0 - p)
            while u > chance and c < tokens and c < 4095:  # u is what is left of it
                u -= chance
                c += 1.0
                chance *= odds * (tokens - c + 1.0) * INVERSE[int(c)]
                if chance < 1e-18:
                    break
        if c > 0:
            counts[e] = c
            variances[e] = variance
            drawn += c
            spread += variance
    if drawn <= 0:
        counts[:] = mean
        return total
    if spread <= 0:
        return drawn
    share = (drawn - total) / spread
    drawn = 0.0
    for e in range(mean.size):
        c = counts[e] - share * variances[e]
        if c <= 0 and counts[e] > 0:
            c = 1e-9
        counts[e] = c
        drawn += c
    if abs(drawn - total) > 1e-9 * total:  # some were cut off at 0
        share = total / drawn
        for e in range(mean.size):
            counts[e] *= share
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def rank_seconds(model, rank, tokens, replicas):  # type: ignore[no-untyped-def]
    """Latency of one rank: planes or a table, as `Cluster.seconds` has it."""
    startup, activation, compute, at, height, rate = model
    if tokens <= 0.0:
        return 0.0
    if at.shape[1] == 0:
        most = 0.0
        for k in range(startup.size):
            most = max(
                most, startup[k] + activation[k] * replicas + compute[k] * tokens / rate[rank]
            )
        return most
    last = at.shape[1] - 1
    if tokens >= at[rank, last]:
        return height[rank, last] + (tokens - at[rank, last]) / rate[rank]
    k = np.searchsorted(at[rank], tokens)
    if k == 0:
        return height[rank, 0]
    part = (tokens - at[rank, k - 1]) / (at[rank, k] - at[rank, k - 1])
    return height[rank, k - 1] + part * (height[rank, k] - height[rank, k - 1])


@njit(cache=True, nogil=True, error_model="numpy")
def layer_ranks(counts, held, base, model, tokens_of, seconds):  # type: ignore[no-untyped-def]
    """Tokens and seconds of each rank [ranks] for an expert's counts [experts], one layer.

    `held` lists replicas by expert: (first [experts + 1], rank, share). A replica among several
    runs unless all of the expert's tokens went to others.
    """
    first, rank, share = held
    replicas = seconds
    for g in range(seconds.size):
        tokens_of[g] = base[g]
        replicas[g] = 0.0
    for e in range(counts.size):
        c = counts[e]
        if c <= 0:
            continue
        for j in range(first[e], first[e + 1]):
            part = share[j]
            tokens_of[rank[j]] += c * part
            if part >= 1.0:
                replicas[rank[j]] += 1.0
            elif part > 0.0:
                replicas[rank[j]] += 1.0 - math.exp(c * math.log1p(-part))
    for g in range(seconds.size):
        seconds[g] = rank_seconds(model, g, tokens_of[g], replicas[g])


@njit(cache=True, nogil=True, error_model="numpy")
def step(mean, tokens, top_k, key, plan, base, weight, link, model, work, found):  # type: ignore[no-untyped-def]
    """Seconds of one forward pass of all layers; adds to `found` (see `STEPS`).

    mean : [layers, experts], expected assignments. plan : (first, rank, share), each [layers, ...].
    base : [layers, ranks], a rank's own tokens for each assignment. link : (s, s a token).
    """
    first, rank, share = plan
    counts, variances, tokens_of, seconds = work
    total = 0.0
    for layer in range(mean.shape[0]):
        routed = draw(
            mean[layer], tokens, mixed(key + np.uint64(layer + 1) * _STEP), counts, variances
        )
        own = base[layer] * routed
        held = (first[layer], rank[layer], share[layer])
        layer_ranks(counts, held, own, model, tokens_of, seconds)
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
def serve(requests, profiles, top_k, plans, changes, base, weight, model, engine, seed):  # type: ignore[no-untyped-def]
    """Serve requests first come, first served, until the last is done.

    Parameters
    ----------
    requests : (arrival, prompt, output, profile), each [requests]
    profiles : float32 [profiles, layers, experts]
        Share of a layer's assignments.
    top_k : float
    plans : (first [plans, layers, experts + 1], rank, share [plans, layers, slots])
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
    work = (np.empty(experts), np.empty(experts), np.empty(ranks), np.empty(ranks))
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
            steady += top_k * profiles[profile[head]]
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
                mean += (chunk * top_k) * profiles[profile[head]]
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
        this = (plans[0][plan], plans[1][plan], plans[2][plan])
        # `steady` may fall below 0 by rounding, which `draw` takes for none
        drawn = mean if fresh > 0 else steady
        took = step(drawn, float(tokens), top_k, key, this, base, weight, link, model, work,
                    log[steps])  # fmt: skip
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
                steady -= top_k * profiles[profile[request]]
                lives -= 1
                running[i], left[i] = running[lives], left[lives]
            else:
                i += 1
        for request in range(begin, head):
            first[request] = clock
            if output[request] > 1:
                running[lives], left[lives] = request, output[request] - 1
                lives += 1
                steady += top_k * profiles[profile[request]]
            else:
                last[request] = clock
        if lives == 0:
            steady[:] = 0.0
    return begun, first, last, log[:steps]
