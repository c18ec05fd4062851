"""Train steps that run in other processes: those of another commit of this repository, and those of a package in PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from mhc_jax.config import ExperimentConfig
from mhc_jax.errors import InputError, require
from mhc_jax.runs.cpu_variables import cpu_alone, cpu_variables

ROOT = Path(__file__).parents[2]
"""Root folder of this checkout."""


@dataclass
class WorkerStep:
    """A compiled train step in a process of its own, which runs it once for each line that it gets."""

    process: subprocess.Popen
    compile_s: float
    state: Any = None
    """None: `launch` returns when the step is done, so that there is no array to wait for."""

    def launch(self, _: int) -> None:
        """Run a step and wait for its end.

        Raises:
          InputError: the process ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        require(bool(self.process.stdout.readline()), f"The process of a step ended: {self.process.args}.")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def start_worker(command: Sequence[str], folder: Path, environment: dict[str, str]) -> WorkerStep:
    """Start a process that prints `compile_s` as JSON and then runs a step for each line of its input.

    Raises:
      InputError: the program cannot be run, or ends before its first line.  What it wrote to standard error is shown above.
    """
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes)
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run: {error.strerror}.") from error
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        process.communicate()
    require(bool(line), f"The process of a step failed: {' '.join(command)}.")
    try:
        return WorkerStep(process, json.loads(line)["compile_s"])
    except ValueError as error:
        process.kill()
        process.communicate()
        raise InputError(
            f"The process of a step printed {line.strip()!r} in place of its times: {command[0]}."
        ) from error


def check_out(revision: str, folder: Path) -> None:
    """Write the files of a commit of this repository to a folder.

    Raises:
      InputError: git knows no such commit, or this is no git repository.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", "--end-of-options", revision]
    try:
        files = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode().strip() or error
        raise InputError(f"git has no commit {revision!r}; give a commit, a tag or a branch ({reason}).") from error
    with tarfile.open(fileobj=BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")


def jax_step(python: str, checkout: Path, settings: Sequence[str]) -> WorkerStep:
    """Start the train step of another checkout, with settings such as `--config=FILE:mhc` and `--config.model.width=128`."""
    paths = [str(checkout), str(checkout / "kernels")]
    environment = {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment |= cpu_variables() if cpu_alone() else {}
    script = ROOT / "experiments" / "steptime_worker.py"
    return start_worker([python, str(script), *settings], checkout, environment)


def torch_step(python: str, config: ExperimentConfig, kind: str, threads: int, compiled: bool) -> WorkerStep:
    """Start the train step of `kernels/lucidrains_worker.py` at the sizes of a configuration, in a Python that has torch.

    Args:
      python: path of the interpreter.
      config: sizes of the decoder and of the batch.
      kind: `residual`, `hc` or `mhc`.
      threads: number of threads of torch.
      compiled: whether torch.compile compiles the decoder.

    Raises:
      InputError: the kind is another one, the decoder is not a plain one in float32, or the process fails.
    """
    model = config.model
    plain = model.attention_kind == "gqa" and not model.num_experts and not model.tied_embeddings
    plain &= model.head_dim * model.num_heads == model.width and model.compute_dtype == "float32"
    require(
        plain and config.optimizer.accumulation_steps == 1,
        "The decoder in PyTorch has dense blocks, heads of width / num_heads channels, an unembedding of its own, float32 and no "
        "accumulation; set model.experts, model.attention_kind, model.head_width, model.tied_embeddings, model.compute_dtype and "
        "optimizer.accumulation_steps accordingly.",
    )
    require(kind in ("residual", "hc", "mhc"), f"The package in PyTorch has no {kind!r}; it has residual, hc and mhc.")
    sizes = {
        "kind": kind,
        "width": model.width,
        "blocks": model.num_layers,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "hidden": model.mlp_width,
        "tokens": config.data.sequence_length,
        "batch": config.data.batch_size,
        "vocabulary": model.vocab_size,
        "streams": getattr(model.connection, "num_streams", 1),
        "threads": threads,
        "compile": compiled,
    }
    return start_worker([python, str(ROOT / "kernels" / "lucidrains_worker.py"), json.dumps(sizes)], ROOT, {})
