"""Train-step times of layers at real sizes on the present device, and repeated calls that show whether results differ.

No data is needed: token ids are drawn at random.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import mhc_kernels
import numpy as np
from mhc_kernels import measure
from mhc_kernels.backend_choice import IMPLEMENTATIONS
from mhc_kernels.ops.arg_specs import ARGUMENTS, OUTPUTS, ArgSpec, function, program

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig
from mhc_jax.cost import counts
from mhc_jax.train_step import Batch, gradients, init_state, make_train_step

VOCABULARY = 1024
"""Number of vocabulary entries.  It is small, so that the layers take nearly all of the time."""
BASELINE = "residual"
"""The contestant that the others are compared with."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Dense layers of one model, in bfloat16: heads of width 128, and SwiGLU of 8 times the width of its experts."""

    name: str
    width: int
    num_heads: int
    mlp_width: int
    sequence_length: int = 4096
    batch_size: int = 2
    """Number of sequences of the first try.  It is halved until the steps of all contestants fit."""
    num_layers: int = 2
    dtype: str = "bfloat16"
    head_width: int = 128


LAYERS = {
    "3b": LayerShape("3b", 1280, 16, 8 * 896, batch_size=4),
    "27b": LayerShape("27b", 2560, 32, 8 * 1536),
    "tiny": LayerShape("tiny", 128, 4, 256, sequence_length=32, head_width=32, num_layers=1),
}
"""Layers by workload, with the widths and heads of mHC Table 5."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A connection and the implementation of its operations.  None as the implementation is the platform's default."""

    kind: str
    implementation: str | None

    def obstacle(self, shape: LayerShape) -> str | None:
        """Return the reason why the operations cannot run on this device at this shape, or None if they can."""
        if self.implementation is None:
            return None
        op = "write_read" if self.kind == "mhc" else "write"
        n = connections.default_config(self.kind).num_streams
        spec = ArgSpec(shape.name, shape.sequence_length, n, shape.width, shape.dtype)
        return measure.Ours(self.implementation).obstacle(op, spec)


CONTESTANTS = {BASELINE: Contestant(BASELINE, None)} | {
    f"{kind} {backend}": Contestant(kind, backend) for kind in ("mhc", "hc") for backend in IMPLEMENTATIONS
}


def attention_of(shape: LayerShape) -> str:
    """Return `cudnn` if this device runs its flash attention at this shape, else `xla`, which writes T x T scores to memory."""
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
    """Return the configuration of a run with layers of this shape."""
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
    """Draw a batch of random token ids, with the same seed at every call."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return {"inputs": jnp.asarray(tokens), "targets": jnp.asarray(np.roll(tokens, -1, 1))}


# -- step times


@dataclasses.dataclass
class CompiledStep:
    """A compiled train step, the state that its next call starts from, and its batch."""

    compiled: Any
    state: Any
    batch: Any
    compile_s: float

    def launch(self, _: int) -> Any:
        """Start a step and return its loss, without waiting for the result."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics["loss"]

    @property
    def memory(self) -> int:
        """Bytes that the compiled step needs, or 0 if the backend does not report them."""
        return counts.compiled_memory(self.compiled) or 0


def compile_step(config: ExperimentConfig, batch: Any, implementation: str | None = None) -> CompiledStep:
    """Compile the train step of a configuration on this device.

    Args:
      config: the configuration.  Its model.remat is not `auto`.
      batch: the batch of every step.
      implementation: name of the implementation of the connections' operations.  None takes the platform's default.
    """
    with mhc_kernels.settings(implementation=implementation):
        began = time.perf_counter()
        step = jax.jit(make_train_step(config), donate_argnums=0)
        compiled = step.lower(jax.eval_shape(lambda: init_state(config)), batch).compile()
        compile_s = time.perf_counter() - began
        return CompiledStep(compiled, jax.jit(lambda: init_state(config))(), batch, compile_s)


def step_times(shape: LayerShape, rounds: int) -> dict[str, Any]:
    """Time the train step of each contestant, alternating in one run.

    Returns:
      `shape`, `batch_size`, `attention`, and `steps`, a row per contestant.  A row has `name` and `status`.  If the status
      is `ok`, it has the median `ms`, `ms_rounds`, `overhead` (0.05: 5 % longer than the baseline), `us_per_sublayer_token` (time
      added to the baseline), `memory_bytes` and `loss`.
    """
    attention = attention_of(shape)
    obstacles = {name: contestant.obstacle(shape) for name, contestant in CONTESTANTS.items()}
    able = {name: contestant for name, contestant in CONTESTANTS.items() if obstacles[name] is None}
    batch_size, steps, errors = _fitting_steps(shape, able, attention)
    losses = {name: float(step.launch(0)) for name, step in steps.items()}
    times = measure.alternating({name: measure.Batch(step.launch) for name, step in steps.items()}, rounds, seconds=0.0)
    base = statistics.median(times[BASELINE])
    sublayer_tokens = 2 * shape.num_layers * batch_size * shape.sequence_length
    rows: list[dict[str, Any]] = []
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
    refused = {name: why for name, why in obstacles.items() if why is not None}
    rows += [{"name": name, "status": status} for name, status in {**refused, **errors}.items()]
    return {"shape": dataclasses.asdict(shape), "batch_size": batch_size, "attention": attention, "steps": rows}


def _fitting_steps(
    shape: LayerShape, contestants: Mapping[str, Contestant], attention: str
) -> tuple[int, dict[str, CompiledStep], dict[str, str]]:
    """Return the largest batch size at which all steps fit, the compiled steps, and the errors of contestants without a step."""
    batch_size = shape.batch_size
    while True:
        try:
            return batch_size, *_all_steps(shape, contestants, batch_size, attention)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size == 1:
                raise
        # This stands outside the handler, because the handler's traceback keeps the arrays of the failed attempt alive.
        batch_size //= 2


def _all_steps(
    shape: LayerShape, contestants: Mapping[str, Contestant], batch_size: int, attention: str
) -> tuple[dict[str, CompiledStep], dict[str, str]]:
    """Return the compiled steps that have run once, and the errors of contestants whose step could not run.

    Raises:
      JaxRuntimeError: the device is out of memory.
    """
    steps, errors = {}, {}
    for name, contestant in contestants.items():
        try:
            config = config_of(shape, contestant.kind, batch_size, attention)
            steps[name] = compile_step(config, random_batch(config), contestant.implementation)
            jax.block_until_ready(steps[name].launch(0))
        except Exception as error:  # a kernel that fails to compile must not cost the rows of the others
            if "RESOURCE_EXHAUSTED" in str(error) or name == BASELINE:
                raise
            steps.pop(name, None)
            errors[name] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return steps, errors


# -- repeated calls


def repeated_operation(op: str, spec: ArgSpec, implementation: str, repeats: int) -> list[str]:
    """Name the results and gradients of one operation that differ between calls on the same arguments; the aim is none."""
    (given,) = measure.make_sets(op, spec, 1)
    run = jax.jit(program(function(op, spec, implementation), True))
    return differing(lambda: run(*given), [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])], repeats)


def repeated_gradient(shape: LayerShape, contestant: Contestant, repeats: int) -> list[str]:
    """Name the parameters whose gradient differs between calls on the same batch of one sequence; the aim is none.

    Attention is `xla` here, because cuDNN's backward adds in no fixed order.
    """
    config = config_of(shape, contestant.kind, 1)
    batch = random_batch(config)
    params = jax.jit(lambda: init_state(config).params)()
    with mhc_kernels.settings(implementation=contestant.implementation):
        compiled = jax.jit(gradients(config)).lower(params, batch).compile()
    paths = ["/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return differing(lambda: compiled(params, batch)[1], paths, repeats)


def differing(run: Callable[[], Any], names: list[str], repeats: int) -> list[str]:
    """Name the results that are not bitwise the same in every one of `repeats` calls."""
    same = jax.jit(lambda a, b: [jnp.array_equal(*_bits(x, y)) for x, y in zip(a, b, strict=True)])
    first, different = jax.tree.leaves(run()), set()
    for _ in range(repeats - 1):
        equal = same(first, jax.tree.leaves(run()))
        different |= {name for name, is_same in zip(names, equal, strict=True) if not is_same}
    return sorted(different)


def _bits(*arrays: Any) -> list[Any]:
    """Return the bits of float arrays as integers, so that NaN equals itself and -0 differs from 0."""
    return [jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")) for a in arrays]
