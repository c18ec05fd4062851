"""Grouped matrix products: the TPU kernels, interpreted, against `ragged_dot` and against loops."""

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from support.thinned import thin
from support.tolerances import assert_close

from mhc_jax.config import MeshConfig
from mhc_jax.layers import grouped
from mhc_jax.layers.grouped import grouped_matmul, largest, tiling, tiling_of_gradient
from mhc_jax.sharding import make_mesh, using


def arguments(sizes, M, C=256, F=128):
    random = np.random.default_rng(0)
    x, W, g = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((M, C), (len(sizes), C, F), (M, F)))
    return x, W, jnp.asarray(sizes, jnp.int32), g


def both(x, W, sizes, g):
    """(rows, dx, dW) of the groups."""
    inside = (jnp.arange(len(x)) < sizes.sum())[:, None]
    y, pull = jax.vjp(lambda x, W: grouped_matmul(x, W, sizes), x, W)
    dx, dW = pull(jnp.where(inside, g, 0))
    return jnp.where(inside, y, 0), jnp.where(inside, dx, 0), dW


GROUPS = {
    "ragged": ([100, 1, 155], 256),
    "empty ones": ([0, 0, 130, 0, 126, 0], 256),
    "all to one": ([0, 384, 0], 384),
    "rows beyond the groups": ([70, 0, 90], 256),
    "rows that fill no tile": ([40, 33, 2], 75),
    "none": ([0, 0], 128),
}


@pytest.mark.parametrize("groups", thin(GROUPS, lambda name: name in ("empty ones", "rows that fill no tile")))
def test_kernels_are_ragged_dot(groups):
    args = arguments(*GROUPS[groups])
    expected = jax.jit(both)(*args)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        actual = jax.jit(lambda *a: both(*a))(*args)
    for name, a, b in zip(("y", "dx", "dW"), expected, actual, strict=True):
        assert_close(b, a, 1e-5, name)


def test_devices_that_share_weights_add_up_their_gradients(monkeypatch):
    """Rows differ along `data`, the weights do not.  Within `shard_map` the kernels cannot be interpreted: stand-ins multiply."""

    def product(a, b, sizes, dtype, tiling, transpose_rhs=False, interpret=False):
        return jax.lax.ragged_dot(a, b.swapaxes(1, 2) if transpose_rhs else b, sizes).astype(dtype)

    def of_weights(a, b, sizes, dtype, tiling, interpret=False):
        group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(b)), side="right")
        return jnp.einsum("cm,me,mf->ecf", a, jax.nn.one_hot(group, len(sizes)), b).astype(dtype)

    monkeypatch.setattr(grouped, "gmm", product)
    monkeypatch.setattr(grouped, "tgmm", of_weights)
    x, W, sizes, g = arguments([100, 28], 128)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))

    def gradients(x, W, sizes, g):
        def local(x, W, sizes, g):
            return jax.lax.psum((grouped_matmul(x, W, sizes) * g).sum(), "data")

        product = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, whole, rows), out_specs=whole)
        return jax.grad(lambda x, W: product(x, W, sizes, g), (0, 1))(x, W)

    twice = jnp.concatenate([x, -x]), W, sizes, jnp.concatenate([g, 2 * g])
    expected = jax.jit(gradients)(*twice)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        actual = jax.jit(lambda *a: gradients(*a))(*twice)
    for name, a, b in zip(("dx", "dW"), expected, actual, strict=True):
        assert_close(b, a, 1e-5, name)
    assert_close(actual[1], -jax.jit(both)(x, W, sizes, g)[2], 1e-5, "1 - 2 of that of one device")


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"stage": 2}, {"data": 2}], ids=str)
def test_kernels_lower_where_a_mesh_does_not_divide_the_rows(sizes):
    """XLA's partitioner refuses them; one sequence of diagnostics, or a pipeline whose devices share no batch."""
    x, W, groups, _ = arguments([60, 40], 100)

    def gradient(x, W):
        return jax.grad(lambda x, W: grouped_matmul(x, W, groups).sum(), (0, 1))(x, W)

    mesh = make_mesh(MeshConfig(**sizes))
    with using(mesh), mhc_kernels.settings(platform="tpu"):
        stages = {
            "axis_names": {"stage"},
            "in_specs": PartitionSpec(),
            "out_specs": PartitionSpec(),
            "check_vma": False,
        }
        run = jax.shard_map(gradient, **stages) if "stage" in sizes else gradient
        text = jax.jit(run).trace(x, W).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2, "dx and dW"


def test_a_gradient_of_the_weights_sees_its_group_alone():
    """NaN in rows of other groups, and in rows of none, stays out of dW."""
    x, W, sizes, g = arguments([60, 68], 256)
    x = x.at[:60].set(jnp.nan).at[128:].set(jnp.nan)
    with mhc_kernels.settings(platform="tpu", interpret=True):
        (dW,) = jax.jit(lambda W, g: jax.vjp(lambda W: grouped_matmul(x, W, sizes), W)[1](g))(W, g)
    assert np.isnan(dW[0]).all()
    expected = np.asarray(x[60:128], np.float64).T @ np.asarray(g[60:128], np.float64)
    assert_close(dW[1], expected, 1e-5, "dW")


@pytest.mark.parametrize(("k", "n"), [(1280, 896), (896, 1280), (2560, 1536), (1536, 2560), (64, 48), (7168, 2048)])
def test_tiles_fill_vmem_and_no_more(k, n):
    rows, depth, columns = tiling(98304, k, n)
    assert rows == 512
    assert 4 * (rows * depth + depth * columns + rows * columns) + 4 * rows * columns <= 12 * 2**20
    assert k % depth == 0
    assert n % columns == 0
    assert depth == k or k > 2560
    _, down, across = tiling_of_gradient(98304, k, n)
    assert 4 * 512 * (down + across) + 4 * down * across + 4 * down * across <= 14 * 2**20


def test_the_largest_tile():
    assert largest(98304, 512) == 512
    assert largest(384, 512) == 384
    assert largest(1280, 1024) == 640
    assert largest(48, 512) == 48
    assert largest(1000, 512) == 512, "the last tile is cut"
