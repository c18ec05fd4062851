"""Pallas kernels for NVIDIA GPUs compile for sm_90 without a GPU: no spills, 16-byte accesses to streams, names, sharding."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from mhc_kernels import settings
from mhc_kernels.gpu_inspect import lower, missing, resources
from mhc_kernels.ops.arg_specs import OPS, ArgSpec, function, program, shapes
from support.tiny_runs import PATIENCE_S, ROOT

TOKENS = 8192 - 3  # the last block is ragged

# The module's own filter does not reach into a test; users do not see the warning.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
needs_triton = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def with_gradient(op, n, C, dtype):
    """Lower outputs and gradients of all arguments, which takes all kernels of an operation."""
    spec = ArgSpec("test", TOKENS, n, C, dtype)
    return lower(program(function(op, spec, None), True), *shapes(op, spec))


KERNELS = {op: [f"mhc_{op}_forward", f"mhc_{op}_backward"] for op in OPS}
KERNELS["coefficients"] += KERNELS["sinkhorn"]
KERNELS["write_read"] += ["mhc_read_products", "mhc_coefficients_dphi", *KERNELS["sinkhorn"]]
BF16, F32 = "bfloat16", "float32"


@pytest.mark.parametrize("op", KERNELS)
def test_the_chosen_name_is_what_is_compiled(op):
    found = re.findall(r'name = "(mhc_\w+)"', with_gradient(op, 4, 1280, BF16).as_text())
    assert sorted(found) == sorted(KERNELS[op])
    with settings(implementation="xla"):
        assert "gpu.triton" not in with_gradient(op, 4, 1280, BF16).as_text()


CASES = [(op, 4, C, BF16) for op in KERNELS for C in (2560, 4096) if op != "sinkhorn" or C == 2560]
CASES += [
    ("write_read", 2, 2560, BF16),
    ("write", 2, 2560, BF16),
    ("write_read", 4, 2560, F32),
    ("coefficients", 4, 2560, F32),
]
SLOW = [
    (*case, BF16)
    for case in [
        *((op, 8, 2560) for op in KERNELS),
        *(("write_read", n, C) for n, C in ((1, 2560), (3, 1280), (4, 7168))),
    ]
]
SLOW += [("write_read", 8, 2560, F32), ("coefficients", 8, 2560, F32)]


@needs_triton
@pytest.mark.parametrize(
    ("op", "n", "C", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_no_spills_and_wide_accesses(op, n, C, dtype, monkeypatch):
    # As jax-triton leaves it.  Another test of this process may have imported that.
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    for kernel in resources(with_gradient(op, n, C, dtype)):
        assert kernel.spills == 0, f"{kernel.name} spills with {kernel.registers} registers"
        if n == 8 or "sinkhorn" in kernel.name:
            continue  # n = 8 takes 8 bytes at a time where 16 would spill; a matrix entry of a token is 4 bytes
        every_stream = 1 if "coefficients" in kernel.name else n
        assert kernel.loads.get(128, 0) >= every_stream, f"{kernel.name} loads {kernel.loads}"
        if kernel.name not in ("mhc_read_products", "mhc_coefficients_forward"):
            assert kernel.stores.get(128, 0) >= 1, f"{kernel.name} stores {kernel.stores}"


@pytest.mark.parametrize("op", ["coefficients", "write_read"])
def test_sharded_over_tokens_the_gradient_of_phi_is_a_sum_over_devices(op):
    streams, whole, last, last2 = P("data"), P(), P(None, "data"), P(None, None, "data")
    arrays = (streams,) if op == "coefficients" else (streams, streams, last, last2)
    out = (last, last, last2) if op == "coefficients" else (streams, last, last, last2, streams)
    spec = ArgSpec("test", 8192, 4, 1280, BF16)
    f = jax.shard_map(function(op, spec, None), in_specs=(*arrays, whole, whole, whole), out_specs=out)

    def gradient(*args):
        def loss(phi):
            return sum(a.astype(jnp.float32).sum() for a in jax.tree.leaves(f(*args[:-3], phi, *args[-2:])))

        return jax.grad(loss)(args[-3])

    text = lower(gradient, *shapes(op, spec)[0], devices=8).as_text()
    assert {"coefficients": "mhc_coefficients_backward", "write_read": "mhc_coefficients_dphi"}[op] in text
    assert "all_reduce" in text


@needs_triton
@pytest.mark.parametrize("how", ["interpret", "lower"])
def test_triton_sinkhorn_is_that_of_the_loops_and_lowers(how):
    """A process of its own, because the annotation checks of these tests would come between Triton and its kernels."""
    if how == "lower":
        pytest.importorskip("jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1" if how == "interpret" else "0"}
    command = [sys.executable, "-m", "support.triton_sinkhorn", how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
