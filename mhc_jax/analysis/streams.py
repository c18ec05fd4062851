r"""Look inside a trained model: run it sub-layer by sub-layer, ablate and rescue its streams, and read them by the logit lens.

Boundaries b = 0 ... L, streams i = 0 ... n - 1, `run` and `unembed` are those of `analysis/inside.py`.  The loss of token t is
$-\ln p(\mathrm{token}_{t+1} \mid \mathrm{token}_{\le t})$ in nats.  The last token of a sequence has no target, so that a sequence
has T - 1 losses (t in the shapes below).

- `run` computes the logits and shows the streams at each boundary to a visitor, which may replace them.
- `ablate` replaces one stream by zero or by its mean, and returns by how much the losses grow.
- `rescue` ablates streams at one boundary, restores one clean stream at a later one, and returns the share that comes back.
- `logit_lens` predicts tokens from each stream alone.
- `dominant_share` says which stream is the largest, and by how much.

Sources: activation patching and the normalisation of its effect are those of Zhang and Nanda (arXiv 2309.16042, section 2), and
restoring a state of a clean run in a run with corrupted inputs is the causal tracing of Meng et al. (ROME, arXiv 2202.05262,
section 2.1).  Peng et al. (arXiv 2603.14833) ablate and rescue streams of mHC.  Mean ablation is from Wang et al. (arXiv
2211.00593), and the logit lens from nostalgebraist (LessWrong, 2020).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mhc_jax.analysis.inside import Inside, Model, State, Tokens, opened, run, unembed
from mhc_jax.diagnostics import root_mean_square
from mhc_jax.errors import one_of, require

__all__ = [
    "Dominance",
    "Lens",
    "Rescue",
    "ablate",
    "dominance",
    "dominant_share",
    "logit_lens",
    "rescue",
    "run",
    "unembed",
]

ABLATIONS = ("zero", "mean")
"""What can replace an ablated stream: zero, or its mean [C] over all tokens of the clean run at the same boundary."""
LEAST_DIFFERENCE = 1e-5
"""Differences of mean losses below this, in nats/token, count as none in `rescue`.  They are the rounding of float32 logits."""


class Rescue(NamedTuple):
    """The result of `rescue`."""

    share: Float[np.ndarray, "boundaries n"]
    """Share of the loss difference that restoring stream i at boundary b recovers, [L + 1, n].  1: all of it, 0: nothing, below 0:
    the loss became worse.  NaN before the boundary of the ablation, and everywhere if the ablation changes no loss."""
    clean: float
    """Mean loss of the unchanged model, in nats/token."""
    corrupted: float
    """Mean loss with the ablation alone, in nats/token."""


class Lens(NamedTuple):
    """The result of `logit_lens`: losses in nats, and the most likely tokens."""

    loss: Float[np.ndarray, "boundaries n B t"]
    """Losses of the predictions from stream i alone at boundary b."""
    top: Int[np.ndarray, "boundaries n B T"]
    """Ids of the most likely next tokens from stream i alone at boundary b."""
    collapsed_loss: Float[np.ndarray, "boundaries B t"]
    """Losses of the predictions from all streams, collapsed by the exit.  Those at boundary L are the losses of the model."""
    collapsed_top: Int[np.ndarray, "boundaries B T"]
    """Ids of the most likely next tokens from all streams, collapsed by the exit."""


class Dominance(NamedTuple):
    """The result of `dominant_share`, defined there.  Values have no unit."""

    share: Float[np.ndarray, "boundaries n"]
    """Share of the tokens whose largest stream at boundary b is stream i.  Each row sums to 1."""
    largest: Float[np.ndarray, " boundaries"]
    """Mean over tokens of the share that the largest stream has in the squared norm of all streams, from 1/n to 1."""


def ablate(
    model: Model, tokens: Tokens, by: str = "zero", boundaries: Sequence[int] | None = None
) -> Float[np.ndarray, "n B t"]:
    r"""Return by how much the loss of each token grows if one stream is ablated, in nats, for each stream, float64.

    $\Delta_{i,t} = \mathrm{loss}_t(x_{b,i} \leftarrow a_{b,i}\ \text{for all}\ b \in \mathrm{boundaries}) - \mathrm{loss}_t$

    $a_{b,i}$ is 0, or the mean [C] of $x_{b,i,t}$ over all B T tokens of the unchanged run.  Between two boundaries a sub-layer
    writes to the ablated stream and mixes others into it.  The stream is therefore replaced anew at each boundary.

    Args:
      model: a trained model, or (configuration, parameters).
      tokens: ids in [0, vocab_size), at least two of each sequence.
      by: what replaces the stream, `zero` or `mean`.
      boundaries: boundaries at which the stream is replaced, such as `range(4, L + 1)` for sub-layers 5 to L and the exit.  None:
        all, 0 to L.

    Raises:
      InputError: as in `run`, or `by` is unknown, or there is no such boundary.
    """
    with opened(model, tokens) as (inside, ids):
        chosen = range(inside.sublayers + 1) if boundaries is None else boundaries
        _check(inside, by, boundaries=chosen)
        start, fills = inside.enter(ids), []
        for _, state in inside.boundaries(start):
            fills.append(_fill(inside.streams(state), by))
        clean = _losses(inside, ids, state)
        differences = []
        for i in range(inside.num_streams):

            def edit(b: int, x: Array, i: int = i) -> Array | None:
                return _replaced(x, [i], fills[b]) if b in chosen else None

            differences.append(_losses(inside, ids, inside.end(start, visit=edit)) - clean)
    return np.stack(differences)


def rescue(
    model: Model, tokens: Tokens, by: str = "zero", streams: Sequence[int] | None = None, boundary: int = 0
) -> Rescue:
    r"""Ablate streams at one boundary, restore one clean stream at that or a later one, and return the share that comes back.

    Three kinds of runs of the same tokens have the mean losses $\mathcal{L}$:

    - clean: the unchanged model.
    - corrupted: at boundary a the given streams are ablated as in `ablate`, and nothing else is changed.
    - rescued (b, i), for each b >= a and each stream i: like corrupted, and at boundary b stream i is replaced by stream i of the
      clean run.  The other streams stay as they are in the corrupted run.

    $\mathrm{share}_{b,i} =
    (\mathcal{L}_{corrupted} - \mathcal{L}_{rescued(b,i)}) / (\mathcal{L}_{corrupted} - \mathcal{L}_{clean})$

    This is the normalised effect of activation patching (arXiv 2309.16042, section 2) with the loss as its metric.  Shares of
    several streams need not sum to 1.  With one stream every share is 1, except under `single_pass`, whose carried coefficients
    stay corrupted.  If the two losses differ by less than `LEAST_DIFFERENCE` or one is not finite, every share is NaN.

    The streams of two runs are kept, 2 (L + 1) n B T C numbers, and (L + 1 - a) n runs from b to the exit follow.

    Args:
      model: a trained model, or (configuration, parameters).
      tokens: ids in [0, vocab_size), at least two of each sequence.
      by: what replaces the ablated streams, `zero` or `mean`.  If all streams are zero, so are all logits, and the loss is ln V.
      streams: indices of the streams to ablate.  None: all.
      boundary: the boundary a of the ablation.  0: the streams that the entry makes.

    Raises:
      InputError: as in `run`, or `by` is unknown, or there is no such stream or boundary.
    """
    with opened(model, tokens) as (inside, ids):
        L, n = inside.sublayers, inside.num_streams
        chosen = range(n) if streams is None else streams
        _check(inside, by, streams=chosen, boundaries=[boundary])
        start = inside.enter(ids)
        clean, corrupted = [], []
        for _, state in inside.boundaries(start):
            clean.append(inside.streams(state))
        unchanged = _losses(inside, ids, state).mean()

        def corrupt(b: int, x: Array) -> Array | None:
            return _replaced(x, chosen, _fill(clean[b], by)) if b == boundary else None

        for _, state in inside.boundaries(start, visit=corrupt):
            corrupted.append(state)
        damaged = _losses(inside, ids, state).mean()
        share = np.full((L + 1, n), np.nan)
        if abs(damaged - unchanged) >= LEAST_DIFFERENCE:
            for b, i in itertools.product(range(boundary, L + 1), range(n)):
                restored = _replaced(inside.streams(corrupted[b]), [i], clean[b])
                end = inside.end(inside.with_streams(corrupted[b], restored), first=b)
                share[b, i] = (damaged - _losses(inside, ids, end).mean()) / (damaged - unchanged)
    return Rescue(share, float(unchanged), float(damaged))


def logit_lens(model: Model, tokens: Tokens) -> Lens:
    r"""Predict the next token from each stream alone, and from the collapsed streams, at each boundary.

    $\mathrm{logits}_{b,i} = \mathrm{RMSNorm}(x_{b,i})\, W_U, \qquad
    \mathrm{logits}_b = \mathrm{RMSNorm}(\mathrm{collapse}(x_b))\, W_U$

    with the final norm, the unembedding $W_U$ and the exit of the model.  The norm removes the scale of a stream.  A stream of
    zeros has logits 0 and the loss ln V.  The collapsed form at boundary L is the model itself.  Logits are not kept; `unembed`
    makes them in a visitor of `run`.

    Args:
      model: a trained model, or (configuration, parameters).
      tokens: ids in [0, vocab_size), at least two of each sequence.

    Raises:
      InputError: tokens are not ids [B, T] of the vocabulary.
    """
    rows = []
    with opened(model, tokens) as (inside, ids):
        for _, state in inside.boundaries(inside.enter(ids)):
            each = [_scored(inside.unembed(x), ids) for x in (*inside.streams(state), inside.collapsed(state))]
            *alone, together = jax.device_get(each)
            rows.append((*map(np.stack, zip(*alone, strict=True)), *together))
    return Lens(*map(np.stack, zip(*rows, strict=True)))


def dominant_share(model: Model, tokens: Tokens) -> Dominance:
    """Return which stream of a token is the largest at each boundary, and by how much, over all B T tokens (`dominance`).

    Raises:
      InputError: tokens are not ids [B, T] of the vocabulary.
    """
    with opened(model, tokens, least=1) as (inside, ids):
        states = inside.boundaries(inside.enter(ids))
        return dominance(np.stack([jax.device_get(_sizes(inside.streams(state))) for _, state in states]))


def dominance(sizes: Float[np.ndarray, "boundaries n B T"]) -> Dominance:
    r"""Return the dominant-stream shares of streams whose norms, or root mean squares, are `sizes`.

    With $M_{b,t} = \{i : |x_{b,i,t}| = \max_j |x_{b,j,t}|\}$, the largest streams of a token, and means over tokens

    $\mathrm{share}_{b,i} = \mathrm{mean}_t\; [i \in M_{b,t}] / |M_{b,t}|, \qquad
    \mathrm{largest}_b = \mathrm{mean}_t\; \max_j |x_{b,j,t}|^2 / \sum_j |x_{b,j,t}|^2$

    Streams that are exactly equal in size count in equal parts, and n streams of zeros count as equal.  Streams that are equal up
    to rounding do not, so `share` says nothing where `largest` is near 1/n.  Sizes that are NaN or infinite give NaN.

    Examples:
      Two streams of norms 3 and 1 at one token: 9 of 10 parts of the squared norm.

      >>> print(dominance(np.array([3.0, 1.0]).reshape(1, 2, 1, 1)))
      Dominance(share=array([[1., 0.]]), largest=array([0.9]))
    """
    sizes = np.asarray(sizes, np.float64)
    top = sizes.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        relative = np.where(top == 0, 1, sizes / np.where(top == 0, 1, top))
        first = np.where(np.isnan(relative), np.nan, relative == 1)
        share = (first / first.sum(1, keepdims=True)).mean((2, 3))
        return Dominance(share, (1 / (relative**2).sum(1)).mean((1, 2)))


@jax.jit
def _scored(logits: Float[Array, "B T V"], ids: Int[Array, "B T"]) -> tuple[Float[Array, "B t"], Int[Array, "B T"]]:
    """Return the loss of each token that has a target, and the most likely next token of every token."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return loss, logits.argmax(-1)


def _losses(inside: Inside, ids: Int[Array, "B T"], end: State) -> Float[np.ndarray, "B t"]:
    """Return the losses of the tokens for the state at boundary L, float64."""
    return np.asarray(_scored(inside.unembed(inside.collapsed(end)), ids)[0], np.float64)


@functools.partial(jax.jit, static_argnums=1)
def _fill(x: Float[Array, "n B T C"], by: str) -> Float[Array, "n 1 1 C"]:
    """Return what replaces ablated streams, in the dtype of the streams."""
    mean = x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(x.dtype)
    return jnp.zeros_like(mean) if by == "zero" else mean


def _replaced(x: Float[Array, "n B T C"], streams: Sequence[int], by: Float[Array, "n b t C"]) -> Array:
    """Return x with the streams of the given indices taken from `by`, which may have one entry for all sequences or tokens."""
    mask = np.isin(np.arange(len(x)), list(streams)).reshape(-1, 1, 1, 1)
    return jnp.where(mask, by, x)


@jax.jit
def _sizes(x: Float[Array, "n B T C"]) -> Float[Array, "n B T"]:
    return root_mean_square(x, (3,))


def _check(inside: Inside, by: str = "zero", streams: Sequence[int] = (0,), boundaries: Sequence[int] = (0,)) -> None:
    """Raise `InputError` unless there is such an ablation and there are such streams and boundaries."""
    one_of("by", by, ABLATIONS)
    for name, given, end in (
        ("streams", streams, inside.num_streams - 1),
        ("boundaries", boundaries, inside.sublayers),
    ):
        require(
            len(given) > 0 and all(0 <= one <= end for one in given),
            f"{name} is {list(given)}; give at least one number, each from 0 to {end}.",
        )
