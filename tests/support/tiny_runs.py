"""The smallest run that trains, with 1 block of width 16 on words drawn from a short list; and scripts as processes."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mhc_jax import connections
from mhc_jax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from mhc_jax.data import load_data

ROOT = Path(__file__).parents[2]
PATIENCE_S = 1200
"""A process that takes longer has hung, however busy the machine is; its test then fails."""
TIMES = ("step_time_s", "tokens_per_s")
WORDS = ("stream", "gate", "norm", "layer", "width", "depth", "token", "loss", "rate", "decay")


def write_text(path: Path) -> Path:
    """Write 40 paragraphs of 60 words, the same at every call."""
    rng = random.Random(0)
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(40)))
    return path


def tiny(text: Path, kind: str = "mhc", **settings) -> ExperimentConfig:
    """A configuration of 8 steps with a checkpoint every 3; `settings` by section, as train={"steps": 4}."""
    model = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 16}
    data = {"source": str(text), "sequence_length": 16, "batch_size": 4}
    train = {"steps": 8, "log_every": 1, "validate_every": 4, "validation_batches": 1, "checkpoint_every": 3}
    train |= {"diagnostics_every": 0}
    return ExperimentConfig(
        model=ModelConfig(**model | {"connection": connections.parse(kind)} | settings.get("model", {})),
        data=DataConfig(**data | settings.get("data", {})),
        optimizer=OptimizerConfig(**{"warmup_steps": 2} | settings.get("optimizer", {})),
        train=TrainConfig(**train | settings.get("train", {})),
    )


def with_train(config: ExperimentConfig, **settings) -> ExperimentConfig:
    """`config` with other settings of its section train."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def data_of(config: ExperimentConfig):
    """The text of a configuration."""
    return load_data(config.data)


def lines(folder: Path, kind: str | None = None, times: bool = False) -> list[dict]:
    """Lines of metrics.jsonl, of one kind or all; without `times` they lack what differs from run to run."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = () if times else TIMES
    return [{k: v for k, v in line.items() if k not in left_out} for line in read if kind in (None, line["kind"])]


def measured(folder: Path) -> list[dict]:
    """All lines of metrics.jsonl but events."""
    return [line for line in lines(folder) if line["kind"] != "event"]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs have bitwise the same losses, diagnostics, final state and results in summary.json."""
    assert measured(one) == measured(other)
    states = [final_state(folder) for folder in (one, other)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    results = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    for result in results:
        for key in [k for k in result if k.endswith("_s") or k == "peak_memory_bytes"]:
            del result[key]
    assert results[0] == results[1]


def final_state(folder: Path):
    """The train state of the newest checkpoint, as NumPy arrays."""
    import orbax.checkpoint as ocp

    newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata((newest / "state").resolve()).item_metadata
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), saved)
        return jax.tree.map(np.asarray, checkpointer.restore((newest / "state").resolve(), target))


def flags_of(config: ExperimentConfig) -> list[str]:
    """The flags that make this configuration of the demo with the same kind of connection."""
    kind = config.model.connection.kind
    out = [f"--config={ROOT}/experiments/configs/demo.py:{kind}"]
    for section in ("model", "data", "optimizer", "train"):
        for field in dataclasses.fields(part := getattr(config, section)):
            if field.name != "connection":
                value = getattr(part, field.name)
                out.append(f"--config.{section}.{field.name}={','.join(value) if isinstance(value, tuple) else value}")
    return out


def at_step(signals: dict[str, tuple[int, int, str]]) -> dict[str, str]:
    """Environment variables that make runs signal themselves, or their parent, at a step (startup/sitecustomize.py)."""
    path = os.pathsep.join([str(Path(__file__).parent / "startup"), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path.rstrip(os.pathsep), "SIGNAL_AT_STEP": json.dumps(signals)}


def script(name: str, *args: str, **popen) -> subprocess.Popen:
    """experiments/<name>.py as a process with one CPU device; its output is text and comes through pipes.

    `env`, if given, is added to that of the tests.
    """
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | popen.pop("env", {})
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def run_script(name: str, *args: str, **popen) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a script that ends by itself."""
    process = script(name, *args, **popen)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err
