"""DeepSeekMoE on simulated devices: it equals one device and float64 loops, and sends only tokens to the owners of experts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.meshes import assert_same_step, batch, collectives, name_of, random_params, tiny, trained
from support.oracles_moe import moe_oracle
from support.thinned import thin
from support.tolerances import ANOTHER_PROGRAM, FORMS_FP32, assert_close

from mhc_jax.layers.expert_exchange import plan
from mhc_jax.layers.moe import Experts, mix_experts, route, routed_on_mesh, score_entropy
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import batch_sharding, make_mesh, state_shardings, using

E, K, C, F, B, T = 8, 3, 16, 12, 8, 4
SCALE = 1.5
AXES = ("data", "fsdp", "tensor", "expert", "sequence")
TOKENS, WEIGHTS = PartitionSpec(("data", "fsdp", "expert"), "sequence", None), PartitionSpec("expert", "fsdp", "tensor")
FAST = [{"expert": 8}, {"data": 2, "expert": 2, "sequence": 2}, {"fsdp": 2, "tensor": 2, "expert": 2}]
OTHERS = [{"expert": 2}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 2, "sequence": 2}, {"data": 4, "tensor": 2}]
BIASES = np.array([[0] * E, [9, 8, 7, 0, 0, 0, 0, 0]], np.float32)
"""Router biases: none, and biases that send all tokens to three experts."""


def mesh_of(**sizes):
    shape = [sizes.get(axis, 1) for axis in AXES]
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def arguments():
    """x with rows of mean square 1, W_router, W_gate, W_up, W_down."""
    shapes, r = [(B, T, C), (C, E), (E, C, F), (E, C, F), (E, F, C)], np.random.default_rng(0)
    x, *weights = (r.normal(size=shape) for shape in shapes)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True))
    return [jnp.asarray(a, jnp.float32) for a in (x, *(w / np.sqrt(w.shape[-2]) for w in weights))]


def one_device(bias, keep, x, W_router, *W):
    """The layer without a mesh; `keep` [N, k] zeroes the gates of copies that are dropped."""
    flat = x.reshape(-1, C)
    experts, gates, scores = route(flat, W_router, bias, K, SCALE)
    y, load = mix_experts(flat, experts, gates * keep, Experts(*W))
    return y.reshape(x.shape), {"expert_load": load, "router_entropy": score_entropy(scores)}


def on_mesh(mesh, bias, x, W_router, *W, buffer=0.0):
    placed = {"mesh": mesh, "tokens": TOKENS, "axes": WEIGHTS, "buffer": buffer}
    return routed_on_mesh(x, W_router, bias, Experts(*W), k=K, scale=SCALE, **placed)


def with_gradients(f):
    """(fixed, *args) -> ((loss, (y, told)), gradients of args), compiled once for all biases."""

    def loss(fixed, args):
        y, told = f(*fixed, *args)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum(), (y, told)

    return jax.jit(jax.value_and_grad(loss, 1, has_aux=True))


EXPECTED = with_gradients(one_device)


def check(f, bias, args, keep):
    """Values, loads, entropy and gradients of `f` are those of one device; returns the output and the values of the router."""
    (_, (y, told)), grads = f((bias,), args)
    (_, (expected, alone)), expected_grads = EXPECTED((bias, keep), args)
    assert_close(y, expected, FORMS_FP32)
    np.testing.assert_array_equal(told["expert_load"], alone["expert_load"])
    np.testing.assert_allclose(told["router_entropy"], alone["router_entropy"], rtol=1e-6)
    for name, a, b in zip(("x", "W_router", "W_gate", "W_up", "W_down"), grads, expected_grads, strict=True):
        # Sums of the same products in another order.
        assert_close(a, b, FORMS_FP32, name)
    return y, told


@pytest.mark.parametrize("mesh", thin(FAST + OTHERS, FAST.__contains__), ids=name_of)
def test_a_mesh_changes_nothing(mesh):
    """Outputs equal the float64 loops and one device; gradients and sums over devices equal one device."""
    args = arguments()
    f = with_gradients(functools.partial(on_mesh, mesh_of(**mesh)))
    for bias in BIASES:
        y, told = check(f, bias, args, np.ones((B * T, K), np.float32))
        names = ("W_router", "W_gate", "W_up", "W_down")
        p = dict(zip(names, args[1:], strict=True)) | {"router_bias": bias, "norm": {"weight": np.ones(C)}}
        expected, load = moe_oracle(p, np.asarray(args[0]), K, SCALE)
        assert_close(y, expected, FORMS_FP32)
        np.testing.assert_array_equal(told["expert_load"], load)
        assert told["router_dropped"] == 0
    assert list(load[:3]) == [B * T] * 3


def kept(experts, buffer, sources, ep):
    """1 for the copies [N, k] that an owner of experts has room for, and 0 for those that are dropped.

    `sources` [N] is the device, along the axis of experts, of each token.  An owner drops the end of every slice (source, expert).
    """
    keep = np.zeros(experts.shape, np.float32)
    room = int(np.ceil(buffer * experts.size / ep))
    for owner in range(ep):
        total = (experts // (E // ep) == owner).sum()
        for source in range(ep):
            for e in range(owner * E // ep, (owner + 1) * E // ep):
                copies = [(n, j) for n, j in np.argwhere(experts == e) if sources[n] == source]
                count = len(copies) if total <= room else int(len(copies) * room / total * (1 - 1e-6))
                for place in copies[:count]:
                    keep[place] = 1
    return keep


@pytest.mark.parametrize(("ep", "buffer"), thin([(2, 1.0), (4, 1.1), (8, 2.0)], lambda case: case != (4, 1.1)))
def test_a_small_buffer_drops_an_equal_share_of_every_slice_and_says_so(ep, buffer):
    args = arguments()
    f = with_gradients(functools.partial(on_mesh, mesh_of(expert=ep), buffer=buffer))
    dropped = []
    for bias in BIASES:
        experts, _, _ = route(args[0].reshape(-1, C), args[1], jnp.asarray(bias), K, SCALE)
        keep = kept(np.asarray(experts), buffer, np.arange(B * T) * ep // (B * T), ep)
        _, told = check(f, bias, args, keep)
        np.testing.assert_allclose(told["router_dropped"], 1 - keep.mean(), atol=1e-6)
        dropped.append(float(told["router_dropped"]))
    assert dropped[0] < 0.2 < dropped[1]


@pytest.mark.parametrize(("room", "sent"), [(None, 3), (12, 3), (11, 2)])
def test_an_owner_that_is_exactly_full_drops_nothing(room, sent):
    """Two devices send 3 rows to each of 4 experts, 12 to either owner.  With room for 11, each slice is cut to 2 rows."""
    mesh, spec = mesh_of(expert=2), PartitionSpec("expert")
    found = jax.shard_map(lambda load: plan(load, "expert", room), mesh=mesh, in_specs=spec, out_specs=spec)
    made = jax.jit(found)(np.full(8, 3, np.int32))
    np.testing.assert_array_equal(made.dispatch.size, np.full(8, sent))
    np.testing.assert_array_equal(made.groups, np.full(4, 2 * sent))


def test_nan_stays_in_its_token():
    args = arguments()
    x = args[0].at[3, 2, 1].set(jnp.nan)
    y, _ = jax.jit(functools.partial(on_mesh, mesh_of(expert=4)))(BIASES[0], x, *args[1:])
    np.testing.assert_array_equal(np.argwhere(np.isnan(np.asarray(y)).any(-1)), [[3, 2]])


def test_tokens_go_to_owners_and_back_and_nowhere_else():
    """The forward has one all-to-all each way, the gradient two more.  Only loads and weights sharded over fsdp are gathered."""
    mesh = mesh_of(fsdp=2, expert=4)
    down = PartitionSpec("expert", "tensor", "fsdp")
    shardings = tuple(NamedSharding(mesh, spec) for spec in (TOKENS, PartitionSpec(), WEIGHTS, WEIGHTS, down))
    args = [jax.device_put(a, sharding) for a, sharding in zip(arguments(), shardings, strict=True)]
    on_devices = functools.partial(on_mesh, mesh, jnp.zeros(E))

    def loss(*args):
        return (on_devices(*args)[0] ** 2).sum()

    forward = jax.jit(on_devices).lower(*args)
    backward = jax.jit(jax.grad(loss, range(5)), out_shardings=shardings).lower(*args)
    for lowered, ways in ((forward, 2), (backward, 4)):
        found = collectives(lowered.compile())
        kinds = [kind for kind, _ in found]
        assert kinds.count("all-to-all") == ways, found
        assert "collective-permute" not in kinds, found
        gathered = sorted(re.sub(r"\{.*", "", shape) for kind, shape in found if kind == "all-gather")
        assert gathered == ["f32[2,12,16]", "f32[2,16,12]", "f32[2,16,12]", "s32[4,8]"], found
        assert kinds.count("reduce-scatter") == (3 if ways == 4 else 0), found


EXPERTS = {"experts": "8:active=3:shared=1:width=16:dense_layers=0"}
LATENT = {"attention_kind": "mla:kv_rank=16:rope_width=4"}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["residual", "mhc:t_max=2"])
@pytest.mark.parametrize(
    "mesh", [{axis: 2, "expert": 4} for axis in ("data", "fsdp")] + [{"tensor": 2, "expert": 2, "data": 2}], ids=name_of
)
def test_a_decoder_of_latent_attention_and_experts_is_that_of_one_device(kind, mesh):
    assert_same_step(tiny(kind, mesh, **EXPERTS, **LATENT, remat="none" if kind == "residual" else "full"))


@pytest.mark.full
def test_biases_move_by_the_loads_of_all_devices_and_what_is_dropped_is_recorded():
    (alone,), bias = trained(tiny("residual", **EXPERTS), 1)
    (metrics,), moved = trained(tiny("residual", {"data": 2, "expert": 4}, experts=f"{EXPERTS['experts']}:buffer=1"), 1)
    assert "router_dropped" not in alone
    # Layer 0 routes the same tokens; layer 1 those that layer 0 dropped copies of.
    np.testing.assert_array_equal(moved[0], bias[0])
    assert np.any(bias[0])
    for name in ("router_load_cv", "router_max_load", "router_entropy"):
        np.testing.assert_allclose(metrics[name][0], alone[name][0], rtol=1e-5, err_msg=name)
    assert metrics["router_dropped"].shape == (2,)
    assert all(0 < share < 0.5 for share in metrics["router_dropped"])


def test_without_an_axis_of_experts_each_device_sorts_its_own_tokens():
    """GSPMD alone would gather all tokens to sort them."""
    config = tiny("residual", {"data": 4}, **EXPERTS)
    mesh = make_mesh(config.mesh)
    with using(mesh):
        variables = {"params": jax.device_put(random_params(config), NamedSharding(mesh, PartitionSpec()))}
        tokens = jax.device_put(batch(config)["inputs"], batch_sharding(mesh))
        found = collectives(jax.jit(Decoder(config.model).apply).lower(variables, tokens).compile())
    assert {kind for kind, _ in found} == {"all-reduce"}, found
    assert not any(re.search(r",\d+,", shape) for _, shape in found), "only loads and entropies are added up"


def test_one_sequence_that_the_mesh_does_not_divide():
    """Diagnostics have such a batch; GSPMD places it."""
    config = tiny("residual", {"data": 2, "expert": 4}, **EXPERTS)
    params, tokens = random_params(config), batch(config)["inputs"][:1]
    mesh = make_mesh(config.mesh)
    with using(mesh):
        own = jax.device_put(params, state_shardings(mesh, params))
        logits, told = jax.jit(Decoder(config.model).apply)({"params": own}, tokens)
    expected, alone = jax.jit(Decoder(config.model).apply)({"params": params}, tokens)
    assert_close(logits, expected, ANOTHER_PROGRAM)
    np.testing.assert_array_equal(told["expert_load"], alone["expert_load"])
