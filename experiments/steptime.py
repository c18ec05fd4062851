"""Time the train step with several connections that take turns in one process, and count its FLOPs, fusions and memory.

    python experiments/steptime.py --config=experiments/configs/demo.py --connections=residual,hc,mhc --rounds=20
    python experiments/steptime.py --config=experiments/configs/demo.py --connections=mhc --optimizers=adamw,muon

The next command compares with the steps of another commit, and with those of the package `hyper-connections` in PyTorch.  Each of
these steps runs in a process of its own, and waits while another one is timed.  A step of another commit reads the config file of
that commit, and settings that are written as `--config.a.b=value`.  It runs with the variables of `mhc_jax/runs/cpu_variables.py`.

    python experiments/steptime.py --against=HEAD~10 --torch=/path/to/python-with-torch
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from mhc_jax import cli
from mhc_jax.config import ExperimentConfig
from mhc_jax.connections import parse, spec
from mhc_jax.cost import counts, hlo
from mhc_jax.errors import require
from mhc_jax.files.json_files import write_json
from mhc_jax.remat_plan import resolve
from mhc_jax.runs.environment import environment
from mhc_jax.sweeps.runner import cores
from mhc_jax.timing.step_times import CompiledStep, compile_step
from mhc_jax.timing.turns import median_times
from mhc_jax.timing.worker_steps import WorkerStep, check_out, jax_step, torch_step
from mhc_jax.train_step import make_train_step

CONFIG = cli.define_config()
CONNECTIONS = flags.DEFINE_list("connections", ["residual", "hc", "mhc"], "The first is the baseline.")
OPTIMIZERS = flags.DEFINE_list("optimizers", [], "Names of optimizers; none: the configuration's.")
ROUNDS = flags.DEFINE_integer("rounds", 20, "Timed steps of each; the order turns every round.", lower_bound=1)
AGAINST = flags.DEFINE_string(
    "against", "", "A commit whose steps take turns with these.  --config must take a connection as its only argument."
)
TORCH = flags.DEFINE_string(
    "torch", "", "A Python with torch and hyper-connections, whose steps take turns with these."
)
TORCH_COMPILE = flags.DEFINE_bool("torch_compile", False, "Compile the steps of --torch by torch.compile.")
JSON = flags.DEFINE_string("json", "", "File for device, commit, median seconds and ratios.")
VOCABULARY = 264
"""Vocabulary size of the byte tokenizer.  Token ids are random, so that no text is read."""


def others(config: ExperimentConfig, kinds: list[str], stack: contextlib.ExitStack) -> dict[str, WorkerStep]:
    """Start the steps of --against and --torch, by name.  `stack` ends their processes."""
    steps = {}
    require(
        len(OPTIMIZERS.value) < 2 or not (AGAINST.value or TORCH.value),
        "--against and --torch compare steps with one optimizer; give one name to --optimizers, or none.",
    )
    # Mistakes are found before the first long compile: a commit that git does not know, then what PyTorch lacks.
    checkout = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if AGAINST.value:
        check_out(AGAINST.value, checkout)
    if TORCH.value:
        for kind in kinds:
            name = kind.split(":")[0]
            model = config.with_settings(model={"connection": parse(kind)})
            step = torch_step(TORCH.value, model, name, cores(), TORCH_COMPILE.value)
            steps[f"{kind} in torch"] = step
            stack.callback(step.close)
    if AGAINST.value:
        file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
        settings = [a for a in sys.argv[1:] if a.lstrip("-").startswith("config.")]
        for kind in kinds:
            given = [f"--config={file}:{kind}", *settings, f"--config.model.vocab_size={VOCABULARY}"]
            step = steps[f"{kind} at {AGAINST.value}"] = jax_step(sys.executable, checkout, given)
            stack.callback(step.close)
    return steps


def main() -> None:
    """Print a Markdown table: median step time, its ratio to the first connection's, compile time, fusions, FLOPs, memory."""
    base = CONFIG().with_settings(model={"vocab_size": VOCABULARY})
    shape = (base.data.batch_size, base.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, shape, np.int32)
    batch = {"inputs": tokens, "targets": np.roll(tokens, -1, 1)}
    optimizers = OPTIMIZERS.value or [base.optimizer.name]
    settings = [
        {"model": {"connection": parse(kind)}, "optimizer": {"name": optimizer}}
        for optimizer in optimizers
        for kind in CONNECTIONS.value
    ]
    configs = [resolve(base.with_settings(**sections))[0] for sections in settings]
    steps, flops = {}, {}
    with contextlib.ExitStack() as stack:
        beside = others(base, CONNECTIONS.value, stack)
        for config in configs:
            name = spec(config.model.connection) + (f" {config.optimizer.name}" if len(optimizers) > 1 else "")
            steps[name] = compile_step(config, batch)
            flops[name] = counts.flops(make_train_step(config), steps[name].state, batch) / tokens.size
        medians = median_times({**steps, **beside}, ROUNDS.value)
    baseline = next(iter(medians.values()))
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind} ({device.platform}), batch {shape[0]} x {shape[1]}\n")
    print("| connection | step (ms) | ratio | compile (s) | fusions | FLOPs/token | memory (MiB) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, step in {**steps, **beside}.items():
        counted = "| | |"
        if isinstance(step, CompiledStep):
            fusions = hlo.fusions(str(step.compiled.as_text()))
            counted = f"{fusions} | {flops[name] / 1e6:.2f}M | {step.memory / 2**20:.0f} |"
        print(
            f"| {name} | {1e3 * medians[name]:.1f} | {medians[name] / baseline:.2f} | {step.compile_s:.1f} | {counted}"
        )
    if JSON.value:
        env = environment()
        kept = {key: env[key] for key in ("date", "command", "commit", "dirty", "device", "packages")}
        rows = {name: {"seconds": s, "ratio": s / baseline} for name, s in medians.items()}
        write_json(Path(JSON.value), {"env": kept, "rounds": ROUNDS.value, "steps": rows})
    for name, other in zip(list(beside), [*steps] * 2, strict=False):
        print(f"{name}: {other} takes {medians[other] / medians[name]:.2f} of its time.")


if __name__ == "__main__":
    cli.main(main, computes=True)
