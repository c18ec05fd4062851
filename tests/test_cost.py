"""FLOPs counted by hand for small programs, and parameter counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from mhc_jax.cost import compiled_memory, flops, parameter_counts


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product():
    assert flops(jnp.dot, array(3, 5), array(5, 7)) == 2 * 3 * 5 * 7
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert flops(batched, array(2, 3, 5), array(2, 5, 7)) == 2 * 2 * 3 * 5 * 7


def test_arithmetic_costs_one_an_element_and_movement_nothing():
    assert flops(lambda a: jnp.tanh(a + 1.0) * a, array(4, 6)) == 3 * 24
    assert flops(lambda a: a.sum(), array(4, 6)) == 24
    assert flops(lambda a: jnp.transpose(a).reshape(-1)[:5], array(4, 6)) == 0


def test_a_scan_counts_its_length():
    def chain(x, w):
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=7)[0]

    assert flops(chain, array(3, 5), array(5, 5)) == 7 * 2 * 3 * 5 * 5
    nested = lambda x, w: jax.lax.scan(lambda c, _: (chain(c, w), None), x, None, length=2)[0]  # noqa: E731
    assert flops(nested, array(3, 5), array(5, 5)) == 2 * 7 * 2 * 3 * 5 * 5


def test_a_cond_counts_the_dearer_branch():
    def either(p, x, w):
        return jax.lax.cond(p, lambda: x @ w, lambda: x + x)

    assert flops(either, jax.ShapeDtypeStruct((), bool), array(3, 5), array(5, 5)) == 2 * 3 * 5 * 5


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_the_gradient_of_a_dense_layer_is_two_more_products(wrap):
    B, m, n = 4, 5, 6

    def loss(w, x):
        return jnp.sum(wrap(jnp.dot)(x, w))

    product, total = 2 * B * m * n, B * n
    assert flops(loss, array(m, n), array(B, m)) == product + total
    assert flops(jax.grad(loss, argnums=(0, 1)), array(m, n), array(B, m)) == 3 * product + total


def test_a_pallas_kernel_counts_every_program():
    def kernel(x, o):
        o[...] = x[...] * 2.0 + 1.0

    block = pl.BlockSpec((8, 4), lambda i: (i, 0))
    call = pl.pallas_call(
        kernel, jax.ShapeDtypeStruct((32, 4), jnp.float32), grid=(4,), in_specs=[block], out_specs=block, interpret=True
    )
    assert flops(call, array(32, 4)) == 2 * 32 * 4


def test_parameters_of_connections_are_counted_apart():
    params = {
        "embedding": array(10, 4),
        "layers": {"mlp": {"W": array(2, 4, 4)}, "mlp_connection": {"phi": array(2, 8, 3), "alpha": array(2, 3)}},
        "ends": {"head_bias": array(4)},
    }
    assert parameter_counts(params) == (40 + 32 + 48 + 6 + 4, 48 + 6 + 4)


def test_compiled_memory_counts_a_donated_argument_once():
    x = jnp.ones((256, 256))
    sizes = [compiled_memory(jax.jit(lambda a: a + 1, donate_argnums=d).lower(x).compile()) for d in ((), (0,))]
    assert sizes[0] == 2 * x.nbytes
    assert sizes[1] == x.nbytes
