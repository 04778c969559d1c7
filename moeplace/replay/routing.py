"""Which experts each token goes to: taken from a trace, or drawn from a load histogram."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from moeplace._check import FloatArray, IntArray, first
from moeplace._files import PathLike
from moeplace.errors import FormatError, ProblemError
from moeplace.plan import EMPTY, Plan
from moeplace.replay.settings import at_least

Draw = Literal["exact", "sampled"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRouting:
    """Top-k experts of each token of one forward pass.

    Parameters
    ----------
    experts_of : array [layers, tokens, k]
        Expert ids, different ones for each token.
    experts : int
        Number of logical experts.
    layers : tuple of int
        Which layers of the model these are.
    source : str
        Where it comes from, for the report.

    Raises
    ------
    ProblemError
        If an id is out of range or a token goes to one expert twice.
    """

    experts_of: IntArray
    experts: int
    layers: tuple[int, ...]
    source: str

    def __post_init__(self) -> None:
        ids = np.asarray(self.experts_of)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
            raise ProblemError(
                f"Routing must be whole numbers [layers, tokens, k], none of these 0: got "
                f"{ids.dtype} of shape {ids.shape}."
            )
        if len(self.layers) != ids.shape[0]:
            raise ProblemError(f"Routing has {ids.shape[0]} layers but names {len(self.layers)}.")
        wrong = (ids < 0) | (ids >= self.experts)
        if wrong.any():
            layer, token, column = first(wrong)
            raise ProblemError(
                f"Routing sends token {token} to expert {ids[layer, token, column]} in layer "
                f"{layer}, but experts are 0 to {self.experts - 1}: it belongs to another model."
            )
        ordered = np.sort(ids, axis=2)
        twice = ordered[:, :, 1:] == ordered[:, :, :-1]
        if twice.any():
            layer, token, column = first(twice)
            raise ProblemError(
                f"Routing sends token {token} twice to expert {ordered[layer, token, column]} in "
                f"layer {layer}: the top-k of a token are different experts."
            )
        ids = np.array(ids, dtype=np.int64)
        ids.setflags(write=False)
        object.__setattr__(self, "experts_of", ids)

    @property
    def tokens(self) -> int:
        """Tokens of the pass, over all ranks."""
        return int(self.experts_of.shape[1])

    @property
    def top_k(self) -> int:
        """Experts that each token goes to."""
        return int(self.experts_of.shape[2])

    @property
    def assignments(self) -> int:
        """Token assignments in each layer."""
        return self.tokens * self.top_k

    @property
    def counts(self) -> IntArray:
        """Assignments of each expert [layers, experts]."""
        rows = [np.bincount(ids.ravel(), minlength=self.experts) for ids in self.experts_of]
        return np.stack(rows).astype(np.int64)

    def shard(self, rank: int, ranks: int) -> slice:
        """The consecutive tokens that start on a rank; sizes differ by one at most."""
        bounds = np.arange(ranks + 1) * self.tokens // ranks
        return slice(int(bounds[rank]), int(bounds[rank + 1]))


def read_trace(path: PathLike, experts: int, layers: tuple[int, ...]) -> TokenRouting:
    """Read top-k ids from a NumPy archive (.npz) with one array ``topk_ids`` [tokens, layers, k].

    Parameters
    ----------
    path : path
    experts : int
        Experts of the model.
    layers : tuple of int
        Layers of the trace to keep.

    Raises
    ------
    FormatError
        If the file is not such an archive, or lacks one of the layers.
    ProblemError
        If the ids break a rule of `TokenRouting`.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "topk_ids" not in getattr(archive, "files", ()):
                raise FormatError(
                    f"{path}: lacks the array topk_ids [tokens, layers, k]. Save it with "
                    "np.savez(path, topk_ids=ids)."
                )
            ids = archive["topk_ids"]
    except (OSError, ValueError, EOFError, AttributeError) as cause:
        if isinstance(cause, FormatError):
            raise
        raise FormatError(
            f"{path}: is not a NumPy archive that can be read ({cause}). Save the trace with "
            "np.savez(path, topk_ids=ids)."
        ) from cause
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise FormatError(
            f"{path}: topk_ids must be whole numbers [tokens, layers, k], got {ids.dtype} of shape "
            f"{ids.shape}."
        )
    if max(layers) >= ids.shape[1]:
        raise FormatError(
            f"{path}: topk_ids has {ids.shape[1]} layers, so there is no layer {max(layers)}. Give "
            "the trace of this model, or fewer layers."
        )
    chosen = ids[:, list(layers)].transpose(1, 0, 2)
    return TokenRouting(experts_of=chosen, experts=experts, layers=layers, source=f"trace {path}")


def draw_routing(
    loads: FloatArray,
    tokens: int,
    top_k: int,
    *,
    layers: tuple[int, ...],
    seed: int = 0,
    draw: Draw = "exact",
) -> TokenRouting:
    """Draw the top-k experts of tokens so that experts get their share of the load.

    Parameters
    ----------
    loads : array [layers, experts]
        Load of every layer of the model; shares count, not their sum.
    tokens, top_k : int
        Tokens of the pass and experts of each.
    layers : tuple of int
        Layers to draw.
    seed : int
    draw : {"exact", "sampled"}
        How many tokens each expert gets. "exact": its share of the assignments, rounded by
        largest remainders. "sampled": a draw, hypergeometric (assignments drawn from those in
        the histogram, without return) where the loads are whole and enough, else multinomial.

    Notes
    -----
    No expert may be drawn twice for a token, so none gets more than `tokens`: what a draw puts
    above goes to the others by their shares. The assignments, sorted by expert in a random
    order of experts, are dealt to the tokens in turn: an expert's run of n <= tokens reaches n
    different tokens. Then tokens are shuffled. Counts hold exactly; which experts meet in one
    token says nothing.

    Raises
    ------
    ProblemError
        If an expert's share is above 1 / top_k, fewer than top_k experts have load, or an
        option is out of range.
    """
    at_least("Tokens", tokens, 1)
    at_least("Top-k", top_k, 1)
    if draw not in get_args(Draw):
        raise ProblemError(f"Draw must be one of {', '.join(get_args(Draw))}, got {draw!r}.")
    rows = []
    for layer in layers:
        generator = np.random.default_rng((seed, layer))
        counts = _counts(loads[layer], tokens, top_k, layer, draw, generator)
        order = generator.permutation(counts.size)
        dealt = np.repeat(order, counts[order]).reshape(top_k, tokens).T
        rows.append(generator.permutation(dealt, axis=0))
    return TokenRouting(
        experts_of=np.stack(rows), experts=loads.shape[1], layers=layers, source=f"drawn, {draw}"
    )


def _counts(
    load: FloatArray,
    tokens: int,
    top_k: int,
    layer: int,
    draw: Draw,
    generator: np.random.Generator,
) -> IntArray:
    """Assignments of each expert [experts]: their sum is tokens x top_k, none above tokens."""
    if np.count_nonzero(load) < top_k:
        raise ProblemError(
            f"Layer {layer} has load on {np.count_nonzero(load)} experts but tokens go to "
            f"{top_k}: replay layers with load, or lower --top-k."
        )
    share = load / load.sum()
    most = int(share.argmax())
    if share[most] * top_k > 1 + 1e-9:
        raise ProblemError(
            f"Expert {most} has {share[most]:.3g} of the load of layer {layer}: with {top_k} "
            f"different experts for each token none can have more than 1 / {top_k}. Lower --top-k "
            f"to {int(1 / share[most])}."
        )
    wanted = tokens * top_k
    if draw == "exact":
        exact = share * wanted
        counts = np.floor(exact).astype(np.int64)
        late = np.argsort(counts - exact, kind="stable")[: wanted - int(counts.sum())]
        counts[late] += 1
    elif (load == np.floor(load)).all() and load.sum() >= wanted and load.sum() < 1e9:
        counts = generator.multivariate_hypergeometric(load.astype(np.int64), wanted)
    else:
        counts = generator.multinomial(wanted, share)
    while (over := int(np.maximum(counts - tokens, 0).sum())) > 0:
        counts = np.minimum(counts, tokens)
        room = np.where(counts < tokens, share, 0.0)
        if not room.any():
            room = np.where(counts < tokens, 1.0, 0.0)
        counts = counts + generator.multinomial(over, room / room.sum())
    return np.asarray(counts, dtype=np.int64)


def replica_tables(plan: Plan, layer: int, window: int = 0) -> tuple[IntArray, FloatArray]:
    """Replicas of each expert and the upper ends of their shares, both [experts, most replicas].

    Returns
    -------
    slots : array
        Slots of each expert's replicas; the first one again where there are fewer.
    ends : array
        Cumulative shares. From the last replica with a share on, and in the padding, 2: above
        any number that is drawn, so that rounding never runs past the end.
    """
    held = plan.slots[layer]
    replicas = plan.replicas[layer]
    if plan.split is None:
        share = np.where(held != EMPTY, 1.0 / replicas[np.maximum(held, 0)], 0.0)
    else:
        share = plan.split[layer] if plan.split.ndim == 2 else plan.split[window, layer]
    slots = np.zeros((plan.experts, int(replicas.max())), dtype=np.int64)
    ends = np.full(slots.shape, 2.0)
    for expert in range(plan.experts):
        mine = np.flatnonzero(held == expert)
        slots[expert] = mine[0]
        slots[expert, : mine.size] = mine
        total = share[mine].cumsum()
        ends[expert, : mine.size] = np.where(total > 1 - 1e-9, 2.0, total)
    return slots, ends


def expected_slot_tokens(plan: Plan, counts: IntArray, layer: int, window: int = 0) -> FloatArray:
    """Tokens [slots] that a layer's slots get by the plan's shares of `counts` [experts]."""
    slots, ends = replica_tables(plan, layer, window)
    share = np.diff(np.minimum(ends, 1.0), axis=1, prepend=0.0)
    tokens = np.zeros(plan.slots.shape[1])
    np.add.at(tokens, slots, share * counts[:, None])
    return tokens
