"""The parser of compiled programs, on lines recorded from libtpu and on programs of eight CPU devices."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.cost import counts, hlo
from mhc_jax.cost.device_groups import axes_of, groups
from mhc_jax.cost.hlo import Program

RECORDED = """\
HloModule jit_f, is_scheduled=true, num_partitions=8
%fused_computation.1 (param_0: bf16[6,64,128], param_1: s32[]) -> bf16[1,64,128] {
  %param_0 = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1), \
dynamic_slice_sizes={1,64,128}
}
%all-reduce-scatter.3 (p.7: f32[128,128]) -> f32[32,128] {
  %p.7 = f32[128,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[128,128]{1,0:T(8,128)} all-reduce(%p.7), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %dynamic-slice.5 = f32[32,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={32,128}
}
%inner_body (t.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %t.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t.1), index=1
  %kernel.1 = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%x.1), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"50","transcendentals":"0","bytes_accessed":"700"}}}
  %fusion.2 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%kernel.1), kind=kLoop, calls=%fused_computation.9, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i, %fusion.2)
}
%inner_condition (t.2: (s32[], bf16[64,128])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(3)
  ROOT %compare.2 = pred[]{:T(512)} compare(%i.2, %constant.2), direction=LT
}
%body (t.3: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %all-gather.2 = bf16[1,256,128]{2,1,0:T(8,128)(2,1)} all-gather(%fusion.1), channel_id=1, \
replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=1,'axis_3'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={1}
  %fusion.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} fusion(%stack, %i.3), kind=kLoop, calls=%fused_computation.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %stack = bf16[6,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t.3), index=1
  %i.3 = s32[]{:T(128)} get-tuple-element(%t.3), index=0
  %scattered = f32[32,128]{1,0:T(8,128)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.3
  %while.1 = (s32[]{:T(128)}, /*index=1*/bf16[64,128]{1,0:T(8,128)(2,1)}) while(%t.3), condition=%inner_condition, \
body=%inner_body
}
%condition (t.4: (s32[], bf16[64,128])) -> pred[] {
  %constant.4 = s32[]{:T(128)} constant(6)
  ROOT %compare.4 = pred[]{:T(512)} compare(%i.4, %constant.4), direction=LT
}
%fused_computation.9 (param_0.9: bf16[64,128]) -> bf16[64,128] {
  ROOT %param_0.9 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
}
ENTRY %main.1 (p: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %while.2 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%tuple.9), condition=%condition, body=%body
  %vmem = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy(%p)
  %all-reduce.1 = f32[]{:T(128)} all-reduce(%x.9), channel_id=3, replica_groups={}, to_apply=%add
  %permute = (bf16[64,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), \
channel_id=5, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  ROOT %fusion.9 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%fused_computation.9, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
}
"""
MESH = {"data": 2, "fsdp": 4}


def test_cycles_count_loops_by_their_turns():
    program = Program(RECORDED)
    # once 1000, 6 turns of 100, 6 x 3 turns of 10 and of a kernel that moves 700 bytes.
    by_bytes = hlo.cycles(program, lambda one: hlo.kernel_estimate(one)[1] / 100)
    assert by_bytes == 1000 + 6 * 100 + 18 * (10 + 7)
    assert hlo.flops(program, lambda one: hlo.kernel_estimate(one)[0]) == 18 * 50
    assert hlo.fusions(RECORDED) == 4


def test_turns_that_are_not_known_are_told():
    program = Program(RECORDED.replace("compare(%i.4, %constant.4)", "compare(%i.4, s32[] constant(5))"))
    with pytest.raises(ValueError, match=r"turns of while.2 are not known: .* has the constants \['5', '6'\]"):
        hlo.cycles(program, lambda one: 0.0)


def test_collectives_of_a_recorded_program():
    found = hlo.collectives(Program(RECORDED), MESH)
    assert [(c.kind, c.axes, c.group, c.count, c.bytes) for c in found] == [
        ("all-gather", "fsdp", (0, 1, 2, 3), 6, 256 * 128 * 2),
        ("reduce-scatter", "fsdp", (0, 1, 2, 3), 6, 128 * 128 * 4),
        ("collective-permute", "data", (0, 4), 1, 64 * 128 * 2),
        ("all-reduce", "data+fsdp", tuple(range(8)), 1, 4),
    ]
    assert {c.kind: c.wire_bytes for c in found} == {
        "all-gather": 256 * 128 * 2 * 3 / 4,
        "reduce-scatter": 128 * 128 * 4 * 3 / 4,
        "collective-permute": 64 * 128 * 2,
        "all-reduce": 2 * 4 * 7 / 8,
    }


ASYNCHRONOUS = """\
%step.1 (p.1: bf16[32,128]) -> bf16[128,128] {
  %gather.1 = bf16[128,128]{1,0} all-gather(%p.1), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}
%step.2 (p.2: bf16[32,128]) -> bf16[128,128] {
  %gather.2 = bf16[128,128]{1,0} all-gather(%p.2), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}
}
ENTRY %main (p: bf16[32,128]) -> bf16[32,128] {
  %start = bf16[128,128]{1,0} fusion(%p), kind=kCustom, calls=%step.1
  %end = bf16[128,128]{1,0} fusion(%start), kind=kCustom, calls=%step.2
  %scatter = bf16[16,128]{1,0} reduce-scatter(%end), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %alone = bf16[16,128]{1,0} all-reduce(%scatter), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add
}
"""


def test_an_asynchronous_collective_counts_once_and_one_of_a_single_device_not():
    found = hlo.collectives(Program(ASYNCHRONOUS), MESH)
    assert [(c.kind, c.axes, c.count, c.bytes) for c in found] == [
        ("all-gather", "fsdp", 1, 128 * 128 * 2),
        ("reduce-scatter", "data+fsdp", 1, 8 * 16 * 128 * 2),
    ]


def test_bytes_are_of_slices_and_of_hbm():
    one = 64 * 128 * 2
    a_turn = 2 * one + 4  # the slice read and written, and the index
    a_turn += one + 256 * 128 * 2  # gathered
    a_turn += 32 * 128 * 4  # scattered, its operand has no shape here
    entry = one + 4 + 2 * one + (3 * one + 2 * 4 - 2 * 4)  # copy to VMEM reads; all-reduce; fusion; permute
    assert hlo.bytes_accessed(Program(RECORDED)) == entry + 6 * a_turn + 18 * (2 * one + 2 * one)  # kernel, fusion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x={}", [(0, 2), (1, 3)]),
        ("replica_groups={}, x={{4}}", [tuple(range(8))]),
        ("replica_groups=[2,4]<=[8]", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,0,1), y", [(0, 2), (4, 6), (1, 3), (5, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, y", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, y", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, y", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, y", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("source_target_pairs={{0,1},{1,0}}, y", [(0, 1), (1, 0)]),
    ],
)
def test_groups_in_every_notation(line, expected):
    assert groups(line, 8) == expected


def test_axes_are_found_from_groups():
    mesh = {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert axes_of([(0, 4), (1, 5), (2, 6), (3, 7)], mesh) == "data"
    assert axes_of([(0, 2, 4, 6), (1, 3, 5, 7)], mesh) == "data+fsdp"
    assert axes_of([(0, 5), (1, 4), (2, 6), (3, 7)], mesh) == "other"
    assert axes_of([(0, 1), (1, 0), (2, 3)], mesh, pairs=True) == "tensor"


@pytest.mark.parametrize(
    "shape", [(512, 128, 384), (3, 512, 128, 384), (2, 3, 64, 128, 32)], ids=["plain", "batched", "twice"]
)
def test_flops_of_products(shape):
    *batch, m, k, n = shape
    f = jax.jit(lambda a, b: jnp.tanh(a @ b))
    program = f.lower(jnp.ones((*batch, m, k)), jnp.ones((*batch, k, n))).compile()
    assert hlo.flops(Program(program.as_text()), lambda one: 0.0) == 2 * math.prod(shape)


@pytest.mark.parametrize(
    ("line", "left", "right", "expected"),
    [
        # 4 products of [64, 32] x [32, 16] as libtpu writes them: the batch is a dimension of the window.
        (
            "%c = f32[4,64,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            (4, 64, 32),
            (4, 32, 16),
            2 * 4 * 64 * 32 * 16,
        ),
        ("%c = f32[64,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", (64, 32), (32, 16), 2 * 64 * 32 * 16),
        ("%c = f32[64,16]{1,0} convolution(%a, %b), dim_labels=fb_oi->bf", (32, 64), (16, 32), 2 * 64 * 32 * 16),
        # contraction over [8, 32] as a window of 8.
        (
            "%c = f32[64,16,1]{1,0,2} convolution(%a, %b), window={size=8}, dim_labels=b0f_0io->bf0",
            (64, 8, 32),
            (8, 32, 16),
            2 * 64 * 8 * 32 * 16,
        ),
    ],
)
def test_flops_of_what_the_tpu_compiler_makes_of_products(line, left, right, expected):
    a, b = (f"  %{name} = f32[{','.join(map(str, shape))}] parameter(0)" for name, shape in (("a", left), ("b", right)))
    program = Program("\n".join(["ENTRY %m (a: f32[]) -> f32[] {", a, b, f"  {line}", "}"]))
    assert hlo.flops(program, lambda one: 0.0) == expected


@pytest.fixture(scope="module")
def sharded():
    """A scan over 5 layers, weights sharded over fsdp and gathered a layer, batch over data and fsdp, and its gradient."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(W, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P(None, None)))
            return jnp.tanh(x @ w), None

        return (jax.lax.scan(layer, x, W)[0] ** 2).mean()

    W = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"), None)))
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, W.sharding))
    return step.lower(W, x).compile()


def test_collectives_of_a_real_program(sharded):
    found, weight = hlo.collectives(Program(sharded.as_text()), MESH), 64 * 64 * 4
    gathers, sums = ([c for c in found if c.kind == kind] for kind in ("all-gather", "all-reduce"))
    assert {c.axes for c in gathers} == {"fsdp"}
    # Forward, perhaps backward again.
    assert sum(c.count * c.bytes for c in gathers) in (5 * weight, 10 * weight)
    assert [c.group for c in sums if c.axes == "data+fsdp"][-1] == tuple(range(8))
    assert max(c.bytes for c in sums) == weight
    assert sum(c.count for c in sums if c.bytes == weight) == 5


def test_flops_of_a_real_program_count_every_layer(sharded):
    """Forward, the gradient of x and that of W, on an eighth of the batch each."""
    assert hlo.flops(Program(sharded.as_text()), lambda one: 0.0) == 5 * 3 * 2 * 2 * 64 * 64


def test_memory_counts_a_donated_argument_once():
    x = jnp.ones((256, 256))
    plain, donated = (jax.jit(lambda a: a + 1, donate_argnums=d).lower(x).compile() for d in ((), (0,)))
    assert (counts.compiled_memory(plain), counts.compiled_memory(donated)) == (2 * x.nbytes, x.nbytes)
    sizes = counts.memory_parts(donated)
    assert sizes["aliased"] == sizes["arguments"] == sizes["outputs"] == x.nbytes
    assert sizes["total"] == x.nbytes + sizes["temporaries"]


def test_memory_adds_up(sharded):
    sizes = counts.memory_parts(sharded)
    assert sizes["arguments"] == 5 * 16 * 64 * 4 + 2 * 64 * 4
    assert sizes["total"] == sizes["arguments"] + sizes["outputs"] + sizes["temporaries"] - sizes["aliased"]
    assert sizes["temporaries"] > 0
