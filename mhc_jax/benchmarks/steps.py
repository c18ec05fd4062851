"""What one device does with the connections: train-step times of layers at real sizes, and repeated gradients.

For `experiments/device_report.py`.  Needs no data: token ids are drawn at random.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
from mhc_kernels import measure
from mhc_kernels.choice import IMPLEMENTATIONS
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec, function, program

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig
from mhc_jax.cost import counts
from mhc_jax.train_step import Batch, gradients, init_state, make_train_step

VOCABULARY = 1024
"""Small, so that what is timed are layers."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Dense layers of one model: its heads, of 128; SwiGLU of 8 x the expert width; bfloat16."""

    name: str
    width: int
    num_heads: int
    mlp_width: int
    sequence_length: int = 4096
    batch_size: int = 2
    """Sequences to try first; halved until all contestants fit."""
    num_layers: int = 2
    dtype: str = "bfloat16"
    head_width: int = 128


LAYERS = {
    "3b": LayerShape("3b", 1280, 16, 8 * 896, batch_size=4),
    "27b": LayerShape("27b", 2560, 32, 8 * 1536),
    "tiny": LayerShape("tiny", 128, 4, 256, sequence_length=32, head_width=32, num_layers=1),
}
"""Widths and heads of mHC Table 5."""


def contestants() -> dict[str, tuple[str, str | None]]:
    """Name -> (connection, implementation of its operations); `residual` is what the others are held against."""
    kinds = ("mhc", "hc")
    named = {f"{kind} {backend}": (kind, backend) for kind in kinds for backend in IMPLEMENTATIONS}
    return {"residual": ("residual", None), **named}


def obstacle(shape: LayerShape, kind: str, implementation: str | None) -> str | None:
    """Why a connection's operations cannot run as `implementation` here; None: they can."""
    if implementation is None:
        return None
    op = "write_read" if kind == "mhc" else "write"
    n = connections.default_config(kind).num_streams
    spec = ArgSpec(shape.name, shape.sequence_length, n, shape.width, shape.dtype)
    return measure.Ours(implementation).obstacle(op, spec)


def attention_of(shape: LayerShape) -> str:
    """`cudnn` where this device runs flash attention at this shape, else `xla`, which writes T x T scores to memory."""
    if jax.default_backend() != "gpu" or shape.dtype == "float32":
        return "xla"
    heads = jax.ShapeDtypeStruct((1, shape.sequence_length, shape.num_heads, shape.head_width), shape.dtype)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.jit(attend).lower(heads, heads, heads).compile()
    except Exception:  # no cuDNN, or one that does not know this device: JAX raises many types
        return "xla"
    return "cudnn"


def config_of(shape: LayerShape, kind: str, batch_size: int, attention: str = "xla") -> ExperimentConfig:
    """A run of these layers."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_heads,
        head_width=shape.head_width,
        attention=attention,
        mlp_width=shape.mlp_width,
        compute_dtype=shape.dtype,
        stream_dtype=shape.dtype,
        connection=connections.default_config(kind),
    )
    return ExperimentConfig(model=model, data=DataConfig(sequence_length=shape.sequence_length, batch_size=batch_size))


def random_batch(config: ExperimentConfig) -> Batch:
    """Token ids, the same at every call."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return {"inputs": jnp.asarray(tokens), "targets": jnp.asarray(np.roll(tokens, -1, 1))}


@dataclasses.dataclass
class _Step:
    compiled: Any
    state: Any
    batch: Batch
    memory: int

    def launch(self, _: int) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics["loss"]


def _compile(shape: LayerShape, kind: str, implementation: str | None, batch_size: int, attention: str) -> _Step:
    config = config_of(shape, kind, batch_size, attention)
    batch = random_batch(config)
    with mhc_kernels.settings(implementation=implementation):
        step = jax.jit(make_train_step(config), donate_argnums=0)
        shapes = jax.eval_shape(lambda: init_state(config))
        compiled = step.lower(shapes, batch).compile()
        state = jax.jit(lambda: init_state(config))()
    return _Step(compiled, state, batch, counts.compiled_memory(compiled) or 0)


def step_times(
    shape: LayerShape, rounds: int, names: Mapping[str, tuple[str, str | None]] | None = None
) -> dict[str, Any]:
    """Train-step time of each contestant, alternating in one run: medians, and the overhead against `residual`.

    Returns:
      `shape`, `batch_size`, `attention`, and `steps`: a row a contestant with `name` and `ms`, `ms_rounds`, `overhead` (0.05:
      5 % longer than residual), `us_per_sublayer_token` (what it adds), `memory_bytes`, `loss`; or `status`, why there is no time.
    """
    names = contestants() if names is None else names
    batch_size, steps = shape.batch_size, {}
    attention = attention_of(shape)
    refused = {name: why for name, one in names.items() if (why := obstacle(shape, *one)) is not None}
    able = {name: one for name, one in names.items() if name not in refused}
    while True:
        try:
            steps, broken = _all_steps(shape, able, batch_size, attention)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size == 1:
                raise
        # Outside the handler, whose traceback holds the arrays of the attempt.
        steps, batch_size = {}, batch_size // 2
    losses = {name: float(step.launch(0)) for name, step in steps.items()}
    times = measure.alternating({name: measure.Batch(step.launch) for name, step in steps.items()}, rounds, seconds=0.0)
    base = statistics.median(times["residual"])
    sublayer_tokens = 2 * shape.num_layers * batch_size * shape.sequence_length
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "name": name,
                "status": "ok",
                "ms": 1e3 * median,
                "ms_rounds": [1e3 * t for t in seconds],
                "overhead": median / base - 1,
                "us_per_sublayer_token": 1e6 * (median - base) / sublayer_tokens,
                "memory_bytes": steps[name].memory,
                "loss": losses[name],
            }
        )
    rows += [{"name": name, "status": status} for name, status in {**refused, **broken}.items()]
    settings = {"shape": dataclasses.asdict(shape), "batch_size": batch_size, "attention": attention}
    return {**settings, "steps": rows}


def _all_steps(
    shape: LayerShape, names: Mapping[str, Any], batch_size: int, attention: str
) -> tuple[dict[str, _Step], dict[str, str]]:
    """Compiled steps that have run once, and the errors of the others.

    Raises:
      JaxRuntimeError: out of memory.
    """
    steps, broken = {}, {}
    for name, (kind, implementation) in names.items():
        try:
            steps[name] = _compile(shape, kind, implementation, batch_size, attention)
            jax.block_until_ready(steps[name].launch(0))
        except Exception as error:  # a kernel that fails to compile must not cost the rows of the others
            if "RESOURCE_EXHAUSTED" in str(error) or name == "residual":
                raise
            steps.pop(name, None)
            broken[name] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return steps, broken


def _differing(run: Callable[[], Any], names: list[str], repeats: int) -> list[str]:
    """Which results are not bitwise the same in every one of `repeats` calls."""
    same = jax.jit(lambda a, b: [jnp.array_equal(*_bits(x, y)) for x, y in zip(a, b, strict=True)])
    first, differing = jax.tree.leaves(run()), set()
    for _ in range(repeats - 1):
        equal = same(first, jax.tree.leaves(run()))
        differing |= {name for name, one in zip(names, equal, strict=True) if not one}
    return sorted(differing)


def _bits(*arrays: Any) -> list[Any]:
    """Floats as integers, so that NaN equals itself and -0 differs from 0."""
    return [jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")) for a in arrays]


def repeated_operation(op: str, spec: ArgSpec, implementation: str, repeats: int) -> list[str]:
    """Results and gradients of one operation that differ between calls on the same arguments; [] is the aim."""
    (given,) = measure.make_sets(op, spec, 1)
    run = jax.jit(program(function(op, spec, implementation), True))
    return _differing(lambda: run(*given), [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])], repeats)


def repeated_gradient(shape: LayerShape, kind: str, implementation: str | None, repeats: int) -> list[str]:
    """Parameters whose gradient differs between calls on the same batch of one sequence, by path; [] is the aim.

    Attention is `xla` here: cuDNN's backward adds in no fixed order.
    """
    config = config_of(shape, kind, 1)
    batch = random_batch(config)
    params = jax.jit(lambda: init_state(config).params)()
    with mhc_kernels.settings(implementation=implementation):
        compiled = jax.jit(gradients(config)).lower(params, batch).compile()
    paths = ["/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return _differing(lambda: compiled(params, batch)[1], paths, repeats)
