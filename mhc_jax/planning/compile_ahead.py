"""A train step compiled for a slice of TPUs that is not here, and what the compiler's answer says about a step's cost.

Memory is the compiler's.  Time is an estimate, and an upper one: cycles of the compiler at the chip's clock, Pallas kernels by the
bytes or FLOPs of their cost estimate at the peak, and after them, as if nothing ran beside them, collectives by their bytes over
the links of the torus that their group spans (`Slice.bandwidth`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
from mhc_kernels.choice import IMPLEMENTATIONS

from mhc_jax import connections
from mhc_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from mhc_jax.config.mapping import to_mapping
from mhc_jax.config.run import fits_splash
from mhc_jax.cost import counts, hlo
from mhc_jax.cost.hlo import Collective, Instruction, Program
from mhc_jax.cost.memory_io import best_recompute
from mhc_jax.errors import InputError, one_of, require
from mhc_jax.model import Decoder
from mhc_jax.parallel import sharding
from mhc_jax.pipeline.executor import schedule_of
from mhc_jax.planning import pipeline_compiled
from mhc_jax.planning.slices import Chip, Slice
from mhc_jax.remat_plan import resolve
from mhc_jax.train_step import init_state, make_train_step


def parse_mesh(text: str, devices: int) -> MeshConfig:
    """`data=2,fsdp=32` as a `MeshConfig` of all devices; empty: fsdp over all of them.

    Raises:
      InputError: no such axis, or the sizes do not make up the devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        one_of("An axis of --mesh", name, sharding.AXES)
        require(size.isdecimal(), f"--mesh is {text!r}; write axis=size,axis=size, such as data=2,fsdp={devices // 2}.")
        sizes[name] = int(size)
    mesh = MeshConfig(**(sizes or {"fsdp": devices}))
    require(
        mesh.size == devices,
        f"--mesh is {text!r}, {mesh.size} devices, and the topology has {devices}; their product must be that.",
    )
    return mesh


def check_implementation(name: str) -> str | None:
    """Of the connections' operations; empty is None, the platform's own."""
    if name:
        one_of("--implementation", name, IMPLEMENTATIONS)
    return name or None


def best_attention(config: ExperimentConfig, platform: str) -> ExperimentConfig:
    """With `splash` where the configuration says `xla` and a TPU can run it; `xla` writes T x T scores."""
    model = config.model
    if platform != "tpu" or model.attention != "xla" or not fits_splash(config) or config.mesh.sequence > 1:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, attention="splash"))


# -- compiling


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step before it is compiled."""

    lowered: Any
    mesh: Any
    """`jax.sharding.Mesh`, or None for one device."""
    state: Any
    """Shapes, dtypes and shardings."""


def lower(config: ExperimentConfig, where: Slice, implementation: str | None) -> Step:
    """Trace the train step of `config` for the devices of `where`, as `config.mesh` splits it."""
    config.model.require_vocabulary()
    config, _ = resolve(config)
    try:
        mesh = sharding.make_mesh(config.mesh, where.devices)
    except NotImplementedError as error:  # jax lays an axis along whole sides of the torus
        sides = " x ".join(map(str, where.sides))
        raise InputError(
            f"The mesh ({config.mesh}) cannot be laid on {where.name}; every axis must be a product of whole sides of {sides}."
        ) from error
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.sequence_length), jnp.int32)
    with mhc_kernels.settings(platform=where.platform, implementation=implementation), sharding.using(mesh):
        state = jax.eval_shape(lambda: init_state(config))
        if mesh is None:
            places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(where.devices[0]), state)
            own: Any = jax.sharding.SingleDeviceSharding(where.devices[0])
            step = jax.jit(make_train_step(config), donate_argnums=0)
        else:
            places, own = sharding.state_shardings(mesh, state), sharding.batch_sharding(mesh)
            step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(places, None))
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, places)
        batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=own)
        return Step(step.lower(state, {"inputs": batch, "targets": batch}), mesh, state)


class DoesNotFitError(Exception):
    """The compiler says that a program does not fit; `needs` and `has` in bytes, where it says them."""

    def __init__(self, text: str):
        super().__init__(text)
        found = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", text)
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}
        self.needs, self.has = (
            (int(float(found[1]) * unit[found[2]]), int(float(found[3]) * unit[found[4]])) if found else (None, None)
        )


def compile_lowered(lowered: Any, options: dict[str, Any] | None = None) -> Any:
    """The compiled program.  It compiles in a thread, so that Ctrl-C is answered at once and not after minutes.

    Raises:
      DoesNotFitError: it does not fit.
    """
    done: dict[str, Any] = {}

    def work() -> None:
        try:
            done["program"] = lowered.compile(compiler_options=options)
        except BaseException as error:
            done["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if "error" in done:
        text = str(done["error"])
        if "RESOURCE_EXHAUSTED" in text or "Ran out of memory" in text:
            raise DoesNotFitError(text) from done["error"]
        raise done["error"]
    return done["program"]


def layers_gradient(
    config: ModelConfig, batch_size: int, sequence_length: int, where: Slice, implementation: str
) -> Any:
    """The lowered gradient of the decoder on one device, for `experiments/tpu_estimate.py`: weights of branches in bfloat16."""
    model, device = Decoder(config), jax.sharding.SingleDeviceSharding(where.devices[0])
    tokens = jax.ShapeDtypeStruct((batch_size, sequence_length), jnp.int32, sharding=device)

    def shape(path: Any, a: Any) -> jax.ShapeDtypeStruct:
        own = re.search("connection|ends", jax.tree_util.keystr(path))  # of the connection: float32
        return jax.ShapeDtypeStruct(a.shape, a.dtype if own else jnp.bfloat16, sharding=device)

    def loss(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, tokens)[0].mean()

    with mhc_kernels.settings(platform=where.platform, implementation=implementation):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
        return jax.jit(jax.grad(loss)).lower(jax.tree_util.tree_map_with_path(shape, shapes), tokens)


# -- what it says


def kernel_cost(config: ExperimentConfig, one: Instruction) -> tuple[float, float] | None:
    """(FLOPs, bytes) of a Pallas kernel in the train step of one device; None: it says nothing, and is none of those known here.

    JAX's splash attention says nothing: two products forward and five backward, over half of T x T.
    """
    if known := hlo.kernel_estimate(one):
        return known
    model, T, mesh = config.model, config.data.sequence_length, config.mesh
    if splash := re.search(r"splash_m[qh]a_(fwd|dkv|dq)", one.name):
        sequences = config.data.batch_size / config.optimizer.accumulation_steps / mesh.batch
        D, E = model.key_width, model.head_dim
        widths = {"fwd": D + E, "dkv": 3 * D + 2 * E, "dq": 2 * D + E}[splash[1]]
        return sequences * T * T * model.num_heads / mesh.tensor * widths, 0.0
    return None


def kernel_cycles(chip: Chip, estimate: tuple[float, float] | None) -> float:
    """The longer of its FLOPs and its bytes at their peaks."""
    return max(chip.flops_cycles(estimate[0]), chip.bytes_cycles(estimate[1])) if estimate else 0.0


def collective_seconds(one: Collective, where: Slice, mesh: Any) -> float:
    """Of one run.

    Rings in every dimension its group spans; an all-to-all is bounded by the links across the middle of the longest side s of
    its group: s bytes / 8 through a ring, both ways, twice that through a line.
    """
    places = np.array([where.coordinates(mesh.devices.flat[k]) for k in one.group])
    spans = tuple(len(set(column)) for column in places.T.tolist())
    longest = max(range(len(spans)), key=lambda k: spans[k])
    if spans[longest] == 1:  # the two cores of a chip
        return one.wire_bytes / where.chip.bandwidth
    if one.kind.endswith("all-to-all"):
        ring = where.sides[longest] % where.chip.whole == 0
        return one.bytes * spans[longest] / ((8 if ring else 4) * where.chip.link)
    return one.wire_bytes / where.bandwidth(spans)


def shares(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def by_shape(config: ExperimentConfig, step: Step) -> dict[str, int]:
    """Bytes on one device that shapes and shardings tell: what the step must hold, whatever the compiler does.

    `streams` are those kept for the backward pass: of every sub-layer, of every block (`full`), or of every L_r-th sub-layer
    (`connection`); of a pipeline, of as many microbatches and stages as its schedule keeps.
    """
    model, mesh, data = config.model, config.mesh, config.data
    micro = data.batch_size // config.optimizer.accumulation_steps
    tokens = micro * data.sequence_length // (mesh.batch * mesh.sequence)
    carried = counts.stream_elements(model) * jnp.dtype(model.stream_dtype).itemsize
    L, kept = model.num_sublayers, {"none": model.num_sublayers, "full": model.num_layers}
    if model.remat_policy not in kept:
        kept[model.remat_policy] = math.ceil(
            L / (model.remat_block or best_recompute(L, counts.stream_elements(model) // model.width))
        )
    schedule = schedule_of(config)
    share = 1.0 if schedule is None else max(schedule.bound) / schedule.stages
    vocabulary = model.vocab_size // (mesh.tensor if model.vocab_size % mesh.tensor == 0 else 1)
    return {
        "parameters": shares(step.state.params),
        "optimizer state": shares(step.state.opt_state),
        "gradients": shares(step.state.params),
        "streams": int(tokens * carried * kept[model.remat_policy] * share),
        "logits": tokens * vocabulary * 4,
    }


def estimate(config: ExperimentConfig, where: Slice, implementation: str | None) -> dict[str, Any]:
    """Compile the train step and say what it costs; JSON values, bytes and FLOPs of one device unless they say otherwise."""
    T, devices = config.data.sequence_length, config.mesh.size
    began = time.monotonic()
    step = lower(config, where, implementation)
    row: dict[str, Any] = {
        "connection": connections.spec(config.model.connection),
        "tokens": config.data.batch_size * T,
        "by_shape": by_shape(config, step),
        "lower_s": round(time.monotonic() - began, 1),
    }
    try:
        program = compile_lowered(step.lowered)
    except DoesNotFitError as error:
        row |= {"fits": False, "needs": error.needs, "hbm": error.has or where.chip.hbm, "message": str(error)[:4000]}
        return row | {"compile_s": round(time.monotonic() - began, 1)}
    memory, text = hlo.memory(program), Program(program.as_text())
    own = program.cost_analysis()
    row |= {"compile_s": round(time.monotonic() - began, 1), "memory": memory, "needs": memory["total"]}
    row |= {"hbm": where.chip.hbm, "fits": memory["total"] <= where.chip.hbm, "fusions": hlo.fusions(text)}
    row |= {"compiler": {"flops, loops once": own["flops"], "bytes, loops once": own["bytes accessed"]}}

    def priced(k: int) -> Callable[[Instruction], float]:
        return lambda one: (kernel_cost(config, one) or (0.0, 0.0))[k]

    def links(part: Program) -> list[tuple[Collective, float]]:
        """Collectives and their seconds; messages of a pipeline hide behind operations, or devices wait for them."""
        found = hlo.collectives(part, dict(step.mesh.shape)) if step.mesh is not None else []
        own = [one for one in found if (one.kind, one.axes) != ("collective-permute", "stage")]
        return [(one, one.count * collective_seconds(one, where, step.mesh)) for one in own]

    def seconds(part: Program) -> float:
        """Of its computations."""
        if where.platform == "tpu":
            cycles = hlo.cycles(part, lambda one: kernel_cycles(where.chip, kernel_cost(config, one)))
        else:
            flops, moved = hlo.flops(part, priced(0)), hlo.bytes_accessed(part)
            cycles = max(where.chip.flops_cycles(flops), where.chip.bytes_cycles(moved))
        return cycles / where.chip.clock

    wait = 0.0
    if (schedule := schedule_of(config)) is not None:
        stages = pipeline_compiled.Step(text, schedule, config.model.num_leading > 0)

        def whole(part: Program) -> float:
            return seconds(part) + sum(time for _, time in links(part))

        blocks = config.model.num_layers // schedule.stages
        row["pipeline"] = pipeline_compiled.described(stages, whole, where.chip.link, blocks)
        text, wait = stages.weighted(), row["pipeline"]["bubble"]
    row |= {"flops": hlo.flops(text, priced(0)), "bytes": hlo.bytes_accessed(text)}
    kernels: dict[str, float] = {}
    for one, _, times in text.walk():
        if hlo.KERNEL in one.line:
            name = re.sub(r"\.\d+$", "", one.name) + ("" if kernel_cost(config, one) else " (no estimate)")
            kernels[name] = kernels.get(name, 0) + times
    row["kernels"] = kernels
    compute = seconds(text)
    row["cycles"] = compute * where.chip.clock
    row["collectives"] = [
        {
            "kind": one.kind,
            "axes": one.axes,
            "group": len(one.group),
            "count": one.count,
            "bytes": one.bytes,
            "seconds": time,
        }
        for one, time in links(text)
    ]
    shown = sum(one["seconds"] for one in row["collectives"])
    model = counts.model_cost(config.model, T).training_flops * row["tokens"]
    row["seconds"] = {"compute": compute, "collectives": shown, "waiting": wait, "step": compute + shown + wait}
    peak = where.chip.flops * devices
    row["mfu"] = model / peak / (compute + shown + wait)
    row["mfu, collectives hidden"] = model / peak / (max(compute, shown) + wait)
    row["flops over model_cost"] = row["flops"] * devices / model
    return row


# -- results that are kept


def cached(key: Mapping[str, Any], folder: Path, work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """(result, whether it was there): kept as JSON under a hash of `key`, of the versions and of our source files."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    packages["libtpu"] = importlib.metadata.version("libtpu") if importlib.util.find_spec("libtpu") else "none"
    whole = json.dumps({**key, "packages": packages, "sources": sources()}, sort_keys=True)
    path = folder / f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.json"
    if path.exists():
        return json.loads(path.read_text()), True
    result = work()
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(f".{os.getpid()}").write_text(json.dumps(result))
    os.replace(path.with_suffix(f".{os.getpid()}"), path)
    return result, False


def sources() -> str:
    """Hash of the source files of both packages: a commit, and what has changed since."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(mhc_kernels.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def key_of(config: ExperimentConfig, where: Slice, implementation: str | None) -> dict[str, Any]:
    """What decides a result of `estimate`."""
    return {"config": to_mapping(config), "topology": where.name, "implementation": implementation}
