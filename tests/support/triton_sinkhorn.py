"""Run the Triton kernels of Sinkhorn on NumPy (`interpret`) or lower them (`lower`), without a GPU, in a process of their own.

TRITON_INTERPRET=1 PYTHONPATH=tests python -m support.triton_sinkhorn interpret
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from mhc_kernels import sinkhorn, triton_sinkhorn
from mhc_kernels.gpu_inspect import lower
from support.kernel_checks import sinkhorn_oracle
from support.tolerances import assert_close


class OnHost:
    """NumPy array with as much of a torch tensor as Triton's interpreter asks for."""

    dtype = "fp32"

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def itself(self, *_, **__):
        return self

    def nothing(self, *_, **__):
        return 0

    cpu = untyped_storage = new_empty = itself
    set_ = copy_ = storage_offset = size = stride = nothing


def interpret():
    r = np.random.default_rng(0)
    cases = (4, 4, 16, 21, 20, 0), (4, 3, 16, 5, 7, 0), (8, 8, 8, 9, 20, 0), (4, 3, 16, 3, 3, 1e-6)
    for n, real, block, N, t_max, eps in cases:
        logits, G = np.full((n, n, N), -np.inf, np.float32), np.zeros((n, n, N), np.float32)
        logits[np.arange(n), np.arange(n)] = 0
        logits[:real, :real] = 2 * r.normal(size=(real, real, N))
        G[:real, :real] = r.normal(size=(real, real, N))
        out, grad = np.zeros_like(logits), np.zeros_like(logits)
        options = {"N": N, "n": n, "real": real, "TOKENS": block, "pairs": t_max - (eps > 0), "eps": float(eps)}
        grid = (-(-N // block),)
        triton_sinkhorn.mhc_sinkhorn_forward[grid](OnHost(logits), OnHost(out), **options)
        triton_sinkhorn.mhc_sinkhorn_backward[grid](OnHost(logits), OnHost(G), OnHost(grad), **options)
        out, grad, logits, G = (a[:real, :real].astype(np.float64) for a in (out, grad, logits, G))

        pairs = [sinkhorn_oracle(logits[..., t], G[..., t], t_max, eps) for t in range(N)]
        expected, expected_grad = (np.stack(a, -1) for a in zip(*pairs, strict=True))
        assert_close(out, expected, what=f"H_res, n = {real}, eps = {eps}")
        assert_close(grad, expected_grad, what=f"gradient, n = {real}, eps = {eps}", terms=G * expected)


def lower_all():
    def gradient(L, G):
        return jax.vjp(lambda L: sinkhorn(L, implementation="triton"), L)[1](G)[0]

    spec = jax.sharding.PartitionSpec(None, None, "data")
    sharded = jax.shard_map(gradient, in_specs=(spec, spec), out_specs=spec)
    for f, shape in ((gradient, (3, 3, 100)), (jax.vmap(gradient), (5, 4, 4, 100)), (sharded, (4, 4, 80))):
        logits = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert "triton_kernel_call" in lower(f, logits, logits, devices=8).as_text()


if __name__ == "__main__":
    {"interpret": interpret, "lower": lower_all}[sys.argv[1]]()
