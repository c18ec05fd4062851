"""Count registers, spills and memory accesses of the kernels in a program for NVIDIA GPUs, without a GPU.

    for kernel in resources(lower(f, *shapes)):
        print(kernel.name, kernel.registers, kernel.spills)

This needs the `triton` package, whose compiler stands in for the Triton compiler inside XLA.  The two are different versions.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax._src import mesh as mesh_lib
from jax._src.interpreters import mlir as jax_mlir
from jax._src.lib import triton as jax_triton_dialect
from jax._src.lib.mlir import ir

from mhc_kernels.backend_choice import settings

TARGET = "__gpu$xla.gpu.triton"


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources that one kernel uses when it is compiled for sm_90."""

    name: str
    warps: int
    """Number of warps of a program (thread block)."""
    registers: int
    """Number of registers that each thread uses."""
    spills: int
    """Number of local-memory instructions (LDL, STL) plus bytes of stack and local memory; 0 means that nothing spills."""
    shared: int
    """Bytes of shared memory that each thread block uses."""
    moved: int
    """Bytes of all operands and results of the kernel, which are the least that it must read and write."""
    loads: dict[int, int]
    """Numbers of instructions that load from global memory, by the bits that one instruction loads for a thread.

    {128: 8, 32: 4} means 8 loads of 128 bits and 4 of 32 bits.  Asynchronous copies to shared memory count as loads.
    """
    stores: dict[int, int]
    """Numbers of instructions that store to global memory, by the bits that one instruction stores for a thread."""

    @property
    def programs(self) -> int:
        """Number of programs that fit on one multiprocessor of an H100 (CUDA's occupancy rules for compute capability 9.0)."""
        registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(registers, 233472 // (self.shared + 1024), 64 // self.warps, 32)


def lower(function: Callable[..., Any], *args: Any, devices: int = 1) -> jax.stages.Lowered:
    """Lower a function of arrays (or `jax.ShapeDtypeStruct`s) for H100s, on any host.

    A `jax.shard_map` in `function` that is given no mesh uses a mesh with one axis, "data", of `devices` devices.
    """
    device = mesh_lib.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((devices,), ("data",), axis_types=types, abstract_device=device)
    # On a host without a GPU, jax 0.10 assumes compute capability 9.0, and jax 0.11 takes the device from the mesh.
    with settings(platform="gpu"), jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


def missing() -> str | None:
    """Return why the function `resources` cannot run on this machine, or None if it can."""
    return None if importlib.util.find_spec("triton") else "the triton package is not installed"


def _collect(op: Any, kernels: list[dict[str, Any]]) -> None:
    """Append to `kernels` the name, code and sizes of each Triton custom call in a StableHLO operation and its regions."""
    for region in op.regions:
        for block in region:
            for inner in block:
                _collect(inner.operation, kernels)
    if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == TARGET:
        config = ir.DictAttr(op.attributes["mhlo.backend_config"])
        number = {k: ir.IntegerAttr(config[k]).value for k in ("num_warps", "num_stages")}
        code = ir.StringAttr(config["ir"]).value_bytes
        moved = sum(_bytes(value.type) for value in (*op.operands, *op.results))
        kernels.append({"name": ir.StringAttr(config["name"]).value, "ir": code, "moved": moved, **number})


def _bytes(type_: Any) -> int:
    ranked = ir.RankedTensorType(type_)
    return math.prod(ranked.shape) * int(re.sub(r"\D", "", str(ranked.element_type))) // 8


def _text(bytecode: bytes) -> str:
    context = jax_mlir.JaxIrContext()
    context.append_dialect_registry(jax_mlir.upstream_dialects)
    jax_triton_dialect.dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        return str(ir.Module.parse(bytecode))


def _widths(sass: str, opcodes: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for match in re.finditer(rf"\b(?:{opcodes})\b((?:\.\w+)*)", sass):
        bits = next((int(b) for b in match[1].split(".") if b in ("64", "128", "256")), 32)
        counts[bits] = counts.get(bits, 0) + 1
    return counts


def resources(lowered: jax.stages.Lowered) -> list[Resources]:
    """Compile each Triton kernel of a program for sm_90 (H100, H200), and return their resources in the order of the program."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernels: list[dict[str, Any]] = []
    module = lowered.compiler_ir()
    assert module is not None
    _collect(module.operation, kernels)
    out = []
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # The import of jax-triton leaves Triton without a cache, which the compiler needs.
        triton.knobs.cache.dir = folder
        for kernel in kernels:
            file = Path(folder) / f"{kernel['name']}.ttir"
            file.write_text(_text(kernel["ir"]))
            options = {k: kernel[k] for k in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
            compiled = triton.compile(str(file), target=GPUTarget("cuda", 90, 32), options=options)
            cubin = Path(folder) / f"{kernel['name']}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            out.append(_read(kernel, cubin, compiled.metadata.shared))
    return out


def _read(kernel: dict[str, Any], cubin: Path, shared: int) -> Resources:
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"

    def dump(option: str) -> str:
        return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout

    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage"))}
    sass = dump("-sass")
    return Resources(
        name=kernel["name"],
        warps=kernel["num_warps"],
        registers=usage["REG"],
        spills=usage["STACK"] + usage["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=shared,
        moved=kernel["moved"],
        loads=_widths(sass, "LDG|LDGSTS"),
        stores=_widths(sass, "STG"),
    )
