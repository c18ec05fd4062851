"""Call kernels of other projects (peers) through the interface of `mhc_kernels.measure`, for benchmarks.

A project takes part if it is installed.  The calls follow liger-kernel 0.8.5, transformer-engine 2.20.2 and tile-kernels 1.0.0,
which are all PyTorch.  Tensors are put into the layout of a project once, before the clock starts.  Our Sinkhorn normalises rows
last, and Sinkhorn of these three projects normalises columns last.  On transposed logits it gives the transpose of our result, so
matrices are transposed on the way in and out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from mhc_kernels.measure import Batch, Sets
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec

T_MAX = 20
EPS_NORM = 1e-20
PRECISION = 2e-2
"""Largest relative error allowed to a peer, which may project in tf32 or bfloat16, but must compute the same function."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a project lays out its tensors; by default streams are [N, n, C], matrices [N, n, n], and phi is float32 [nC, k]."""

    streams_last: bool = False
    """Whether streams are [N, C, n] instead of [N, n, C]."""
    mixing_transposed: bool = False
    """Whether the project's write takes the transpose of H_res as its argument."""
    sinkhorn_transposed: bool = False
    """Whether the project's Sinkhorn normalises columns last, so that it makes H_res transposed from the transposed logits."""
    phi_transposed: bool = False
    """Whether phi is [k, nC] instead of [nC, k]."""
    phi_in_stream_dtype: bool = False
    """Whether phi has the dtype of the streams instead of float32."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation by another project in a benchmark, with the interface `mhc_kernels.measure.Implementation`."""

    name: str
    package: str
    layout: Layout
    functions: Callable[[int], dict[str, Callable[..., tuple[Any, ...]]]]
    """Takes n, and returns the project's functions by operation; their arguments are in `layout`, with the token axis first."""
    limits: Callable[[str, ArgSpec], str | None] = lambda op, spec: None
    """Takes an operation and a workload, and returns why the project does not support them, or None if it does."""

    def obstacle(self, op: str, spec: ArgSpec) -> str | None:
        """Return why the peer cannot run this operation and workload on this machine, or None if it can; see `Implementation`."""
        import jax

        if importlib.util.find_spec("torch") is None or importlib.util.find_spec(self.package) is None:
            return "not installed"
        import torch

        if (jax.default_backend() == "gpu") != torch.cuda.is_available():
            return "torch and jax do not see the same device"
        if self.package != "torch" and jax.default_backend() != "gpu":
            return "it needs a GPU"
        return self.limits(op, spec)

    def results(self, op: str, spec: ArgSpec, sets: Sets, backward: bool) -> list[np.ndarray]:
        """Compute outputs and gradients for sets[0], and return them in our layout; see `Implementation`."""
        given, cotangents = self._tensors(op, spec, sets[0], backward)
        function = self.functions(spec.num_streams)[op]
        out, gradients = _run(function, given, cotangents) if backward else (function(*given), ())
        results = []
        for names, tensors, like, made in (
            (OUTPUTS[op], out, sets[0][1], True),
            (ARGUMENTS[op], gradients, sets[0][0], False),
        ):
            for name, tensor, array in zip(names, tensors, like, strict=bool(tensors)):
                numbers = tensor.detach().float().cpu().numpy()
                results.append(take_back(self.layout, spec, name, numbers, made, array.shape))
        return results

    def batch(self, op: str, spec: ArgSpec, sets: Sets, calls: int, backward: bool) -> Batch:
        """Make a batch in which PyTorch launches the calls of a dispatch one after another; see `Implementation`."""
        import torch

        function = self.functions(spec.num_streams)[op]
        tensors = [self._tensors(op, spec, arrays, backward) for arrays in sets]

        def launch(k: int) -> Any:
            done = None
            for j in range(calls):
                given, cotangents = tensors[(k * calls + j) % len(tensors)]
                done = _run(function, given, cotangents) if backward else function(*given)
            return done

        return Batch(launch, lambda _: torch.cuda.synchronize() if torch.cuda.is_available() else None, calls)

    def _tensors(self, op: str, spec: ArgSpec, arrays: Any, gradients: bool) -> tuple[list[Any], list[Any]]:
        given = [_to(self.layout, spec, name, a, False) for name, a in zip(ARGUMENTS[op], arrays[0], strict=True)]
        cotangents = [_to(self.layout, spec, name, a, True) for name, a in zip(OUTPUTS[op], arrays[1], strict=True)]
        return [t.requires_grad_(gradients) for t in given], cotangents


def _run(function: Callable[..., tuple[Any, ...]], given: list[Any], cotangents: list[Any]) -> tuple[Any, Any]:
    import torch

    out = function(*given)
    return out, torch.autograd.grad(out, given, [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)])


def _swapped_columns(n: int) -> np.ndarray:
    """Return the order of the n^2 + 2 n columns of phi that transposes the logits of H_res."""
    return np.concatenate([np.arange(2 * n), 2 * n + np.arange(n * n).reshape(n, n).T.ravel()])


def lay_out(layout: Layout, spec: ArgSpec, name: str, a: np.ndarray, made: bool) -> np.ndarray:
    """Return our array `a`, which has the name `name` in the call of an operation, in the layout of a project.

    `made` says whether the array is an output of the operation.  It matters for `res`: as an output, `res` comes from Sinkhorn; as
    an argument, it goes to the write; and a project may transpose only one of the two.
    """
    n = spec.num_streams
    if name in ("x", "x'"):
        a = a.reshape(a.shape[0], n, -1)
        return a.swapaxes(1, 2) if layout.streams_last else a
    if name in ("pre", "post"):
        return a.T
    if name in ("res", "logits"):
        turned = layout.sinkhorn_transposed if made or name == "logits" else layout.mixing_transposed
        return np.moveaxis(a, -1, 0).swapaxes(1, 2) if turned else np.moveaxis(a, -1, 0)
    if name in ("phi", "bias"):
        a = a[..., _swapped_columns(n)] if layout.sinkhorn_transposed else a
        if name == "phi":
            a = a.reshape(n, -1, a.shape[-1]).swapaxes(0, 1).reshape(a.shape) if layout.streams_last else a
            a = a.T if layout.phi_transposed else a
    return a


def take_back(
    layout: Layout, spec: ArgSpec, name: str, a: np.ndarray, made: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """Undo `lay_out`: return `a`, an array in the layout of a project, in our layout, in which it has the shape `shape`."""
    places = lay_out(layout, spec, name, np.arange(math.prod(shape)).reshape(shape), made)
    out = np.empty(math.prod(shape), a.dtype)
    out[places.ravel()] = a.ravel()
    return out.reshape(shape)


def _to(layout: Layout, spec: ArgSpec, name: str, array: Any, made: bool) -> Any:
    """Make a PyTorch tensor of our array, in the layout of a project (see `lay_out`).

    x, y, h and x' get the dtype of the workload, and so does phi if the layout says so.  Any other array is float32.
    """
    import torch

    a = lay_out(layout, spec, name, np.asarray(array, np.float32), made)
    streams = name in ("x", "x'", "y", "h") or (name == "phi" and layout.phi_in_stream_dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, spec.dtype) if streams else torch.float32
    return torch.tensor(np.ascontiguousarray(a), device=device, dtype=dtype)


def _composed(sinkhorn: Any, coefficients: Any, read: Any, write: Any) -> dict[str, Any]:
    def write_read(x, y, post, res, phi, alpha, bias):
        new = write(x, y, post, res)
        pre, *rest = coefficients(new, phi, alpha, bias)
        return new, pre, *rest, read(new, pre)

    return {
        "sinkhorn": lambda logits: (sinkhorn(logits),),
        "coefficients": coefficients,
        "read": lambda x, pre: (read(x, pre),),
        "write": lambda x, y, post, res: (write(x, y, post, res),),
        "write_read": write_read,
    }


def plain_torch(n: int) -> dict[str, Any]:
    """Return the operations for n streams by name, written in plain PyTorch."""
    import torch

    def sinkhorn(logits):
        M = torch.exp(logits - logits.amax((-1, -2), keepdim=True))
        for _ in range(T_MAX):
            M = M / M.sum(-2, keepdim=True)
            M = M / M.sum(-1, keepdim=True)
        return M

    def coefficients(x, phi, alpha, bias):
        v = x.flatten(1).float()
        z = v @ phi * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS_NORM)
        pre, post, res = z.split([n, n, n * n], 1)
        b_pre, b_post, b_res = bias.split([n, n, n * n])
        logits = (alpha[2] * res + b_res).view(-1, n, n)
        return torch.sigmoid(alpha[0] * pre + b_pre), 2 * torch.sigmoid(alpha[1] * post + b_post), sinkhorn(logits)

    def read(x, pre):
        return (pre[:, :, None] * x.float()).sum(1).to(x.dtype)

    def write(x, y, post, res):
        mixed = (res[:, :, :, None] * x.float()[:, None]).sum(2)
        return (mixed + post[:, :, None] * y.float()[:, None]).to(x.dtype)

    return _composed(sinkhorn, coefficients, read, write)


def torch_compile(n: int) -> dict[str, Any]:
    """Return the operations of `plain_torch`, each compiled by `torch.compile`."""
    import torch

    return {op: torch.compile(function, dynamic=False) for op, function in plain_torch(n).items()}


def liger(n: int) -> dict[str, Any]:
    """Return the operations of Liger-Kernel by name; only its function for the coefficients contains Sinkhorn."""
    from liger_kernel.transformers import functional as liger_functional

    def coefficients(x, phi, alpha, bias):
        return liger_functional.liger_mhc_coeffs(
            x, phi, bias, *alpha.unbind(), allow_fp32=True, tmax=T_MAX, rms_eps=EPS_NORM, pre_eps=0.0, sinkhorn_eps=0.0
        )

    read, write = liger_functional.liger_mhc_pre, liger_functional.liger_mhc_post_res
    return _composed(None, coefficients, read, write)


def transformer_engine(n: int) -> dict[str, Any]:
    """Return the operations for n streams by name, made of TransformerEngine's Triton kernels.

    The tensors of TransformerEngine begin with a sequence axis and a batch axis.  Here the sequence axis has length 1, and the
    batch axis holds the tokens.
    """
    from transformer_engine.pytorch.triton import mhc

    def sinkhorn(logits):
        return mhc.mhc_fused_sinkhorn(logits[None], n, iters=T_MAX)[0]

    def coefficients(x, phi, alpha, bias):
        H, mean_square = mhc.mhc_fused_projection(x.flatten(1), phi)
        pre, post, res = mhc.mhc_fused_scale(H, alpha, bias[None], mean_square, n)
        return pre, post, sinkhorn(res.reshape(-1, n, n))

    def read(x, pre):
        return mhc.mhc_fused_aggregate(x[None], pre[None].contiguous(), n)[0]

    def write(x, y, post, res):
        return mhc.mhc_fused_expand_combine(y[None], None, post[None], x[None], res[None], n)[0]

    return _composed(sinkhorn, coefficients, read, write)


def tile_kernels(n: int) -> dict[str, Any]:
    """Return the operations for n streams by name, made of the single kernels that DeepSeek's TileKernels uses in training."""
    from tile_kernels.modeling.mhc import ops

    def sinkhorn(logits):
        return ops.sinkhorn_normalize(logits, repeat=T_MAX, eps=0.0)

    def coefficients(x, phi, alpha, bias):
        # With `fuse_grad_acc=True`, the backward pass would look for a gradient that `mhc_post` has left on the storage of x.
        mixes = ops.mhc_pre_norm_fn(x[None], phi, None, EPS_NORM, fuse_grad_acc=False)
        pre, post, comb = ops.mhc_pre_split_mixes(mixes, alpha, bias, n, 2.0, 0.0)
        return pre[0, :, :, 0], post[0, :, :, 0], sinkhorn(comb)[0]

    def read(x, pre):
        return ops.mhc_pre_apply_mix(x[None], pre[None, :, :, None].contiguous())[0]

    def write(x, y, post, res):
        return ops.mhc_post(y[None], x[None], post[None, :, :, None].contiguous(), res[None].contiguous())[0]

    return _composed(sinkhorn, coefficients, read, write)


def _sinkhorn_inside(op: str, spec: ArgSpec) -> str | None:
    return "Sinkhorn is part of its coefficients" if op == "sinkhorn" else None


def _four_streams(op: str, spec: ArgSpec) -> str | None:
    return None if spec.num_streams == 4 else "only n = 4"


def _four_bfloat16_streams(op: str, spec: ArgSpec) -> str | None:
    return _four_streams(op, spec) or (None if spec.dtype == "bfloat16" else "only bfloat16 streams")


TRANSPOSED = {"sinkhorn_transposed": True, "phi_transposed": True, "mixing_transposed": True}
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch.compile", "torch", Layout(), torch_compile),
        Peer(
            "liger",
            "liger_kernel",
            Layout(sinkhorn_transposed=True, phi_in_stream_dtype=True),
            liger,
            _sinkhorn_inside,
        ),
        Peer(
            "transformer_engine",
            "transformer_engine",
            Layout(streams_last=True, **TRANSPOSED),
            transformer_engine,
            _four_streams,
        ),
        Peer("tile_kernels", "tile_kernels", Layout(**TRANSPOSED), tile_kernels, _four_bfloat16_streams),
    )
}
