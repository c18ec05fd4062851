"""Convert connection weights between DeepSeek-V4 checkpoints and decoders with the connection `mhc:eps_convention=v4:exit=head`.

| prefix of the names of DeepSeek-V4's fn, base, scale | shapes | our parameters, under `params` | shapes |
| --- | --- | --- | --- |
| `layers.{i}.hc_attn_` | [k, nC], [k], [3] | `layers/attention_connection/` phi, bias, alpha | [N, nC, k], [N, k], [N, 3] |
| `layers.{i}.hc_ffn_` | the same | `layers/mlp_connection/` phi, bias, alpha | the same |
| `hc_head_` | [n, nC], [n], [1] | `ends/` head_phi, head_bias, head_alpha | [nC, n], [n], [1] |

There are N blocks.  The k = n^2 + 2n logits are n of H_pre, n of H_post, and n*n of H_res row by row, in this order.  DeepSeek-V4
stores the logits of H_res transposed, and calls them comb.

In a decoder with experts the leading dense blocks are under `dense_layers` instead of `layers`.  DeepSeek-V4's index i counts all
blocks, first the dense ones.  Values are only moved, so that a conversion there and back returns the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mhc_jax.errors import require

SUBLAYERS = {"hc_attn": "attention_connection", "hc_ffn": "mlp_connection"}
HEAD = {"hc_head_fn": "head_phi", "hc_head_base": "head_bias", "hc_head_scale": "head_alpha"}


def comb_order(num_streams: int) -> np.ndarray:
    """Return the permutation of a connection's n^2 + 2n logits that transposes those of H_res, which come last.

    The 2n logits of H_pre and H_post come first and stay where they are.  The permutation is its own inverse.

    Examples:
      >>> print(comb_order(2))
      [0 1 2 3 4 6 5 7]
    """
    n = num_streams
    return np.concatenate([np.arange(2 * n), 2 * n + np.arange(n * n).reshape(n, n).T.ravel()])


def from_deepseek_v4(
    weights: Mapping[str, Any], num_layers: int, num_streams: int, width: int, num_leading: int = 0
) -> dict[str, Any]:
    """Make the parameters of all connections of a decoder from the weights of a DeepSeek-V4 checkpoint.

    Args:
      weights: arrays under DeepSeek-V4's names.  Names that do not belong to connections are ignored.
      num_layers: number N of blocks, each of one attention and one feed-forward sub-layer.
      num_streams: number n of streams.
      width: number C of channels of a stream.
      num_leading: number of dense blocks before the blocks with experts (`ModelConfig.num_leading`).  The parameters of these
        dense blocks are returned under "dense_layers".  0: all blocks are returned under "layers".

    Returns:
      `{"layers": {"attention_connection": ..., "mlp_connection": ...}, "ends": ...}` with NumPy arrays in the dtypes of
      `weights`.

    Raises:
      InputError: a name is missing, or an array has a wrong shape.
    """
    n, nC = num_streams, num_streams * width
    k, order = n * n + 2 * n, comb_order(num_streams)
    layers = {}
    for theirs, ours in SUBLAYERS.items():
        stacked = {
            part: np.stack([_take(weights, f"layers.{i}.{theirs}_{part}", shape) for i in range(num_layers)])
            for part, shape in (("fn", (k, nC)), ("base", (k,)), ("scale", (3,)))
        }
        layers[ours] = {
            "phi": stacked["fn"][:, order].swapaxes(1, 2),
            "bias": stacked["base"][:, order],
            "alpha": stacked["scale"],
        }
    shapes = {"hc_head_fn": (n, nC), "hc_head_base": (n,), "hc_head_scale": (1,)}
    ends = {ours: _take(weights, theirs, shapes[theirs]).T for theirs, ours in HEAD.items()}
    if not num_leading:
        return {"layers": layers, "ends": ends}

    def blocks(first: int, last: int) -> dict[str, dict[str, np.ndarray]]:
        return {ours: {name: a[first:last] for name, a in arrays.items()} for ours, arrays in layers.items()}

    return {"dense_layers": blocks(0, num_leading), "layers": blocks(num_leading, num_layers), "ends": ends}


def to_deepseek_v4(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights of all connections of a decoder under DeepSeek-V4's names, from the decoder's parameters.

    Parameters that do not belong to connections are ignored.

    Raises:
      InputError: a connection or parameter is missing or has a wrong shape, as with any connection but `mhc` with the exit `head`.
    """
    require(
        "head_phi" in params.get("ends", {}),
        "The parameters have no ends/head_phi; DeepSeek-V4 leaves by a head: train with `mhc:eps_convention=v4:exit=head`.",
    )
    nC, n = params["ends"]["head_phi"].shape
    k, order = n * n + 2 * n, comb_order(n)
    weights, first = {}, 0
    for blocks in ("dense_layers", "layers") if "dense_layers" in params else ("layers",):
        for theirs, ours in SUBLAYERS.items():
            arrays, where = params.get(blocks, {}).get(ours, {}), f"{blocks}/{ours}/"
            extra = sorted({*arrays} - {"phi", "bias", "alpha"})
            require(
                not extra,
                f"{where} has {', '.join(extra)}, which DeepSeek-V4 has not: train with `mhc:eps_convention=v4:exit=head`.",
            )
            N = len(arrays.get("phi", ()))
            phi = _take(arrays, "phi", (N, nC, k), where)[:, :, order].swapaxes(1, 2)
            bias = _take(arrays, "bias", (N, k), where)[:, order]
            alpha = _take(arrays, "alpha", (N, 3), where)
            for i in range(N):
                weights |= {
                    f"layers.{first + i}.{theirs}_fn": phi[i],
                    f"layers.{first + i}.{theirs}_base": bias[i],
                    f"layers.{first + i}.{theirs}_scale": alpha[i],
                }
        first += N
    shapes = {"head_phi": (nC, n), "head_bias": (n,), "head_alpha": (1,)}
    return weights | {theirs: _take(params["ends"], ours, shapes[ours], "ends/").T for theirs, ours in HEAD.items()}


def _take(arrays: Mapping[str, Any], name: str, shape: tuple[int, ...], where: str = "") -> np.ndarray:
    """Return the array called `name` in its own dtype, after a check that it exists and has the given shape."""
    require(
        name in arrays, f"{where}{name} is missing from the connection weights; it should have the shape {list(shape)}."
    )
    array = np.asarray(arrays[name])
    require(
        array.shape == shape,
        f"{where}{name} has the shape {list(array.shape)}, and {list(shape)} was expected; check the numbers of streams and "
        "layers and the width.",
    )
    return array
