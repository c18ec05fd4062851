"""Times of train steps at sizes of real models, and repeated calls that show whether results differ, on this process's device.

A contestant is a connection with one implementation of its operations.  Token ids are drawn at random, so no data is needed.
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
from mhc_jax.train_step import Batch, compiler_options, gradients, init_state, make_train_step

VOCABULARY = 1024
"""Number of vocabulary entries.  It is small, so that the layers take nearly all of the time of a train step."""
BASELINE = "residual"
"""Name of the contestant whose step time the others are compared with."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder with dense layers, and of its batches, for a train step.

    For the models of mHC Table 5, which have experts, `mlp_width` is 8 times the width of an expert.
    """

    name: str
    width: int
    num_heads: int
    mlp_width: int
    sequence_length: int = 4096
    batch_size: int = 2
    """Number of sequences in a batch at the first try.  It is halved until the train steps of all contestants fit in memory."""
    num_layers: int = 2
    dtype: str = "bfloat16"
    head_width: int = 128
    vocabulary: int = VOCABULARY
    tied: bool = False
    """Whether one matrix embeds tokens and makes logits."""
    contestants: tuple[str, ...] = ()
    """Names of the contestants that take part; empty means all of `CONTESTANTS`."""


LAYERS = {
    "3b": LayerShape("3b", 1280, 16, 8 * 896, batch_size=4),
    "27b": LayerShape("27b", 2560, 32, 8 * 1536),
    "304m": LayerShape(
        "304m",
        1024,
        16,
        2752,
        sequence_length=1024,
        batch_size=16,
        num_layers=24,
        head_width=64,
        vocabulary=50304,
        tied=True,
        contestants=(
            "residual",
            "mhc:init=paper pallas_gpu",
            "identity:init=residual",
            "hc pallas_gpu",
            "mhc:init=paper xla",
        ),
    ),
    "tiny": LayerShape("tiny", 128, 4, 256, sequence_length=32, head_width=32, num_layers=1),
}
"""Shapes by the name of the workload: layers of two models of mHC Table 5, a whole decoder of 304M parameters without its embedding
(that of github.com/wdlctc/hyper-connection-factory, configs/scaling_gpu/l.yaml), and `tiny` for a CPU."""


TRAINED_TOKENS = {"one_gpu": 64 * 1024}
"""Number of tokens of a step of the configurations that the report trains, by name."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A kind of connection and the implementation of its operations, where None is the default of the platform."""

    kind: str
    implementation: str | None

    def obstacle(self, shape: LayerShape) -> str | None:
        """Return the reason why the connection's operations cannot run on this device at this shape, or None if they can."""
        if self.implementation is None:
            return None
        op = "write_read" if self.kind == "mhc" else "write"
        n = connections.default_config(self.kind).num_streams
        spec = ArgSpec(shape.name, shape.sequence_length, n, shape.width, shape.dtype)
        return measure.Ours(self.implementation).obstacle(op, spec)


def _name(kind: str, backend: str | None = None) -> str:
    """Return the name of a contestant: the text of its connection, such as `mhc:init=paper`, and its backend."""
    return " ".join(filter(None, (connections.spec(connections.default_config(kind)), backend)))


CONTESTANTS = {_name(kind): Contestant(kind, None) for kind in (BASELINE, "identity")} | {
    _name(kind, backend): Contestant(kind, backend) for kind in ("mhc", "hc") for backend in IMPLEMENTATIONS
}
"""Contestants by name.  Those without a backend in their name run the default of the platform."""


def attention_of(shape: LayerShape) -> str:
    """Return `cudnn` if cuDNN's flash attention compiles on this device at this shape, else `xla`.

    `xla` runs everywhere, but writes the T x T scores of each head to memory.
    """
    if jax.default_backend() != "gpu" or shape.dtype == "float32":
        return "xla"
    heads = jax.ShapeDtypeStruct((1, shape.sequence_length, shape.num_heads, shape.head_width), shape.dtype)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.jit(attend).lower(heads, heads, heads).compile()
    except Exception:  # JAX raises errors of many types if cuDNN is missing or does not support this device.
        return "xla"
    return "cudnn"


def config_of(shape: LayerShape, kind: str, batch_size: int, attention: str = "xla") -> ExperimentConfig:
    """Return a configuration with layers of the given shape and the given kind of connection in its default settings."""
    model = ModelConfig(
        vocab_size=shape.vocabulary,
        tied_embeddings=shape.tied,
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
    """Draw a batch of random token ids, the same at every call with the same configuration."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return {"inputs": jnp.asarray(tokens), "targets": jnp.asarray(np.roll(tokens, -1, 1))}


# -- step times


@dataclasses.dataclass
class CompiledStep:
    """A compiled train step, the train state from which its next call starts, and the batch of all its calls."""

    compiled: Any
    state: Any
    batch: Any
    compile_s: float

    def launch(self, _: int) -> Any:
        """Start a train step and return its loss as an array, without waiting for the result."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics["loss"]

    @property
    def memory(self) -> int:
        """Bytes of device memory that the compiled step needs at its peak, or 0 if the backend does not report them."""
        return counts.compiled_memory(self.compiled) or 0


def compile_step(config: ExperimentConfig, batch: Any, implementation: str | None = None) -> CompiledStep:
    """Compile the train step of a configuration on this device.

    Args:
      config: the configuration.  Its setting model.remat must not be `auto`.
      batch: the batch of every step.
      implementation: name of the implementation of the connections' operations.  None means the default of the platform.
    """
    with mhc_kernels.settings(implementation=implementation):
        began = time.perf_counter()
        step = jax.jit(make_train_step(config), donate_argnums=0, compiler_options=compiler_options())
        compiled = step.lower(jax.eval_shape(lambda: init_state(config)), batch).compile()
        compile_s = time.perf_counter() - began
        return CompiledStep(compiled, jax.jit(lambda: init_state(config))(), batch, compile_s)


def step_times(shape: LayerShape, rounds: int) -> dict[str, Any]:
    """Time the train step of each contestant once in each of `rounds` rounds, between which the order of contestants alternates.

    Returns:
      `shape`, `batch_size`, `attention`, and `steps`, a row for each contestant.  A row has `name` and `status`.  If the status is
      `ok`, it also has the time of a step `ms` (median in milliseconds) and `ms_rounds` (all rounds), `overhead` (0.05: 5 % longer
      than the baseline), `us_per_sublayer_token` (microseconds more than the baseline, per sub-layer and token), `memory_bytes`,
      and `loss` (of the second step, nats/token).
    """
    attention = attention_of(shape)
    contestants = {name: CONTESTANTS[name] for name in shape.contestants or CONTESTANTS}
    obstacles = {name: contestant.obstacle(shape) for name, contestant in contestants.items()}
    able = {name: contestant for name, contestant in contestants.items() if obstacles[name] is None}
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
    """Return the batch size, halved from that of the shape until all steps fit in memory, and the results of `_all_steps`."""
    batch_size = shape.batch_size
    while True:
        try:
            return batch_size, *_all_steps(shape, contestants, batch_size, attention)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch_size == 1:
                raise
        # The next try begins outside the `except` block, in which the traceback would keep the arrays of the failed try alive.
        batch_size //= 2


def _all_steps(
    shape: LayerShape, contestants: Mapping[str, Contestant], batch_size: int, attention: str
) -> tuple[dict[str, CompiledStep], dict[str, str]]:
    """Compile and run a step of each contestant.  Return the steps and, of contestants whose step fails, the errors.

    Raises:
      JaxRuntimeError: the device is out of memory.  Any other error of the baseline is raised, too.
    """
    steps, errors = {}, {}
    for name, contestant in contestants.items():
        try:
            config = config_of(shape, contestant.kind, batch_size, attention)
            steps[name] = compile_step(config, random_batch(config), contestant.implementation)
            jax.block_until_ready(steps[name].launch(0))
        except Exception as error:  # If the kernels of one contestant do not compile, the others are still timed.
            if "RESOURCE_EXHAUSTED" in str(error) or name == BASELINE:
                raise
            steps.pop(name, None)
            errors[name] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return steps, errors


# -- repeated calls


def repeated_operation(op: str, spec: ArgSpec, implementation: str, repeats: int) -> list[str]:
    """Return the names of the results and gradients of one operation whose bits differ between calls with the same arguments."""
    (given,) = measure.make_sets(op, spec, 1)
    run = jax.jit(program(function(op, spec, implementation), True))
    return differing(lambda: run(*given), [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])], repeats)


def repeated_gradient(shape: LayerShape, contestant: Contestant, repeats: int) -> list[str]:
    """Return the names of the parameters whose gradient differs in bits between calls with the same batch of one sequence.

    Attention is `xla` here, because the backward pass of cuDNN's attention adds in no fixed order and so differs in rounding.
    """
    config = config_of(shape, contestant.kind, 1)
    batch = random_batch(config)
    params = jax.jit(lambda: init_state(config).params)()
    with mhc_kernels.settings(implementation=contestant.implementation):
        compiled = jax.jit(gradients(config)).lower(params, batch).compile()
    paths = ["/".join(str(k.key) for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return differing(lambda: compiled(params, batch)[1], paths, repeats)


def differing(run: Callable[[], Any], names: list[str], repeats: int) -> list[str]:
    """Return the names of the results of `run` that are not bitwise the same in all of `repeats` calls."""
    same = jax.jit(lambda a, b: [jnp.array_equal(*_bits(x, y)) for x, y in zip(a, b, strict=True)])
    first, different = jax.tree.leaves(run()), set()
    for _ in range(repeats - 1):
        equal = same(first, jax.tree.leaves(run()))
        different |= {name for name, is_same in zip(names, equal, strict=True) if not is_same}
    return sorted(different)


def _bits(*arrays: Any) -> list[Any]:
    """Return the bits of float arrays as integers, so that a comparison finds NaN equal to itself and -0 different from 0."""
    return [jax.lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}")) for a in arrays]
