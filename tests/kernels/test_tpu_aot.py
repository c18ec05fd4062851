"""Pallas TPU kernels compile ahead of time for v5e, v5p and v6e, four devices each, with libtpu and without a TPU.

libtpu comes with `pip install jax[tpu]`; without it everything here is skipped.
"""

import re

import jax
import jax.numpy as jnp
import mhc_kernels
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from mhc_kernels import Coefficients, backend_choice, coefficients, read, write, write_read
from mhc_kernels.ops.arg_specs import ArgSpec, shapes

from mhc_jax.layers.moe import Experts, routed_on_mesh

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")

P = PartitionSpec
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS = 8192
KERNELS = {"write_read", "coefficients", "write", "read", "sinkhorn"}
KERNELS |= {f"{op}_backward" for op in ("write_read", "coefficients", "write", "read", "sinkhorn")}


@pytest.fixture(scope="module", params=TOPOLOGIES)
def mesh(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no metadata server says which TPU this is
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu locks a file of the whole machine
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[request.param])
    cached_from = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, cached_from)
    jax.config.update(cached_from, 1e9)  # such programs are written there but cannot be read
    with mhc_kernels.settings(platform="tpu"):
        yield jax.sharding.Mesh(topology.devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    jax.config.update(cached_from, before)


def placed(mesh, arguments):
    """Place arguments, given as (shape, dtype, spec), on a mesh."""
    return [jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, spec)) for s, d, spec in arguments]


def compiled(f, mesh, arguments, out_specs):
    """Compile f under `shard_map` over tokens."""
    sharded = jax.shard_map(f, mesh=mesh, in_specs=tuple(spec for _, _, spec in arguments), out_specs=out_specs)
    return jax.jit(sharded).lower(*placed(mesh, arguments)).compile()


def boundary(n, C):
    """List x, y, post, res, phi, alpha and bias of all four devices."""
    arrays, _ = shapes("write_read", ArgSpec("test", 4 * TOKENS, n, C))
    specs = P("data"), P("data"), P(None, "data"), P(None, None, "data"), P(), P(), P()
    return [(a.shape, a.dtype, spec) for a, spec in zip(arrays, specs, strict=True)]


def kernels(program):
    """List the names of our kernels among the Mosaic calls of a program."""
    calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return [re.search(r"mhc_(\w+)\)*/pallas_call", line)[1] for line in calls]


def loss(x, y, post, res, phi, alpha, bias):
    n = post.shape[0]
    new, c, h = write_read(x, Coefficients(None, post, res), y, phi, alpha, bias, num_streams=n)
    c = coefficients(new, phi, alpha, bias, num_streams=n)
    new = write(new, h, c.post, c.res, n)
    return jax.lax.psum(jnp.sum(read(new, c.pre, n).astype(jnp.float32) ** 2), "data")


OTHERS = [(4, 1280), (4, 4096), (4, 7168), (2, 2560), (8, 2560)]


@pytest.mark.parametrize(("n", "C"), [(4, 2560), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_every_kernel_compiles_forward_and_gradient(mesh, n, C):
    arguments = boundary(n, C)
    gradient = jax.grad(loss, argnums=tuple(range(7)))
    program = compiled(gradient, mesh, arguments, tuple(spec for _, _, spec in arguments))
    assert set(kernels(program)) == KERNELS
    assert "all-reduce" in program.as_text(), "the gradient of phi is the sum over shards"


def test_write_read_moves_the_streams_once(mesh):
    n, C = 4, 2560

    def f(x, y, post, res, *parameters):
        return write_read(x, Coefficients(None, post, res), y, *parameters, num_streams=n)

    out = (P("data"), Coefficients(P(None, "data"), P(None, "data"), P(None, None, "data")), P("data"))
    program = compiled(f, mesh, boundary(n, C), out)
    assert sorted(kernels(program)) == ["sinkhorn", "write_read"]
    floor = (2 * n + 2) * C * TOKENS * 2
    assert program.cost_analysis()["bytes accessed"] < 1.05 * floor


def test_the_gradient_of_write_read_moves_the_streams_once(mesh):
    """XLA's work around the two kernels adds less than 20 %.  Reading x' twice more would add (2 n + 1) / (5 n + 5), 36 %."""
    n, C = 4, 2560

    def f(x, y, post, res, *parameters):
        def cross(*args):
            new, c, h = write_read(args[0], Coefficients(None, *args[2:4]), *args[1:2], *args[4:], num_streams=n)
            return new, c.post, h

        out, pull = jax.vjp(cross, x, y, post, res, *parameters)
        return pull(out)[:2]

    program = compiled(f, mesh, boundary(n, C), (P("data"), P("data")))
    assert sorted(kernels(program)) == ["write_read", "write_read_backward"]
    floor = (5 * n + 5) * C * TOKENS * 2
    assert program.cost_analysis()["bytes accessed"] < 1.2 * floor


def test_vmap_compiles(mesh):
    """The batch is one more dimension of the grid."""
    f = jax.vmap(lambda x, pre: read(x, pre, 4), in_axes=(0, 1))
    arguments = [((4, 256, 4 * 128), jnp.bfloat16, P("data")), ((4, 4, 256), jnp.float32, P(None, "data"))]
    assert kernels(compiled(f, mesh, arguments, P("data"))) == ["read"]


def test_what_does_not_fit_runs_as_xla(mesh, monkeypatch):
    monkeypatch.setattr(backend_choice, "_warned", set())
    arguments = [((64, 4 * 96), jnp.bfloat16, P("data")), ((4, 64), jnp.float32, P(None, "data"))]
    with pytest.warns(UserWarning, match="read runs as plain XLA, not pallas_tpu: .* multiple of 128, it is 96"):
        program = compiled(lambda x, pre: read(x, pre, 4), mesh, arguments, P("data"))
    assert kernels(program) == []


def test_tokens_go_to_the_owners_of_their_experts_by_ragged_all_to_all(mesh):
    """Two exchanges of the value and two of the gradient; no token is gathered."""
    E, C, F, k = 8, 256, 128, 2
    owners = jax.sharding.Mesh(mesh.devices, ("expert",), axis_types=mesh.axis_types)
    tokens, weights = P("expert", None), P("expert", None, None)

    def loss(x, W_router, *W):
        mesh_axes = {"mesh": owners, "tokens": tokens, "axes": weights}
        y, _ = routed_on_mesh(x, W_router, jnp.zeros(E), Experts(*W), k=k, scale=1.0, **mesh_axes)
        return (y.astype(jnp.float32) ** 2).sum()

    arguments = [((8, 128, C), jnp.float32, tokens), ((C, E), jnp.float32, P())]
    arguments += [(shape, jnp.bfloat16, weights) for shape in ((E, C, F), (E, C, F), (E, F, C))]
    program = jax.jit(jax.grad(loss, range(5))).lower(*placed(owners, arguments)).compile().as_text()
    kinds = re.findall(r" (ragged-all-to-all|all-to-all|all-gather)(?:-start)?\(", program)
    assert kinds == ["ragged-all-to-all"] * 4
