"""Check and time the connections on this device: correctness, kernels, train steps beside PyTorch, repeatability, a short training.

    python experiments/device_report.py [--workdir=experiments/records/<date>-device-<name>] [--budget=480] [--tiny]
    python experiments/device_report.py --predict   # what an H100 should measure; needs the package triton and no GPU

The command works through its parts, the most valuable for their time first, and writes report.json and README.md after each.  When
the budget (seconds) is spent it stops, and the same command with the same --workdir goes on where it stopped.  Parts run in
processes of their own: one that crashes, hangs or runs out of memory is reported with its message, and the others go on.  Nothing
is fetched from a network.  `--tiny` is for a CPU: small shapes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import lzma
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from mhc_jax.timing import device_report

ROOT = Path(__file__).resolve().parents[1]
PREDICTIONS = ROOT / "experiments" / "records" / "first-light-predictions"
TRAIN_SECONDS = 120
"""Seconds after which the training of the part `train` is interrupted, its compilation included."""
ENDING = 45
"""Seconds that an interrupted training has to end."""
STARTS = 90
"""Seconds after which a process that measures counts as hanging if it has not begun."""
ERROR_CHARACTERS = 1500
PREDICTED = ("27b", "3b", "27b-n2")
"""Workloads whose operations are predicted."""


class PartError(Exception):
    """A part failed; the message says how."""


# -- parts, in a process of their own


def measured(key: str, rounds: int, report: dict[str, Any], seconds: float) -> Any:
    """Measure one part in this process, in about `seconds` at most, and return its JSON value."""
    task, name, *_ = key.split("/")
    if task == "peer":
        return peer(name, rounds)
    if task == "train":
        return train(name, seconds)
    from peers import PEERS, PRECISION

    peers = list(PEERS.values())
    if task == "bench" and importlib.util.find_spec("torch"):
        try:
            import peer_steps

            peer_steps.forget()  # torch compiles a function only a few times before it gives up
        except Exception as error:  # a torch that does not load must not cost the times of our kernels
            print(f"no peers: {error}", file=sys.stderr)
            peers = []
    return device_report.run(key, rounds, report, peers, PRECISION)


def peer(name: str, rounds: int) -> Any:
    """Compare PyTorch's train steps with ours at the size `tiny`, and time them at the size `name`.

    Returns:
      `torch` (its version), `errors` (see `torch_steps.step_errors`), `equal`, `shape` and `steps` (rows).
    """
    import peer_steps
    import torch

    from mhc_jax.timing import torch_steps
    from mhc_jax.timing.step_times import LAYERS

    errors, shape = torch_steps.step_errors(peer_steps), LAYERS[name]
    result = {"torch": str(torch.__version__), "errors": errors, "equal": torch_steps.equal(errors)}
    while True:
        peer_steps.forget()
        try:
            steps, failed = torch_steps.torch_steps(peer_steps, shape)
            rows = peer_steps.rows(peer_steps.times(steps, rounds))
            rows += [{"name": name, "status": why} for name, why in failed.items()]
            return result | {"shape": vars(shape), "steps": rows}
        except Exception as error:
            if not peer_steps.out_of_memory(error) or shape.batch_size == 1:
                why = f"error: {type(error).__name__}: {error}"[:ERROR_CHARACTERS]
                return result | {"shape": vars(shape), "steps": [{"name": "residual", "status": why}]}
        # This stands outside the handler, because the handler's traceback keeps the tensors of the failed attempt alive.
        shape = dataclasses.replace(shape, batch_size=shape.batch_size // 2)


def train(name: str, seconds: float) -> Any:
    """Train mHC on the embedded text, byte by byte, and return the summary of the run.

    The run is interrupted after `TRAIN_SECONDS`, or so early that it can end within `seconds`.

    Raises:
      PartError: the run failed.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        text, run = Path(folder) / "plays.txt", Path(folder) / "run"
        packed = ROOT / "mhc_jax" / "data" / "corpus" / "shakespeare.jsonl.xz"
        plays = [json.loads(line)["text"] for line in lzma.decompress(packed.read_bytes()).splitlines()]
        text.write_text("\n\n".join(plays))
        small = ["model.num_layers=2", "train.steps=20", "train.validate_every=0", "data.sequence_length=32"]
        settings = (
            small if name == "tiny" else ["model.vocab_size=0", "data.tokenizer=byte", "train.diagnostics_every=50"]
        )
        config = ROOT / "experiments" / "configs" / f"{'demo' if name == 'tiny' else name}.py:mhc"
        command = [sys.executable, ROOT / "experiments" / "train.py", f"--config={config}", f"--workdir={run}"]
        command += [f"--config.{text}" for text in [f"data.source={text}", "train.checkpoint_every=0", *settings]]
        environment = os.environ | {"MHC_JAX_CACHE": folder}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            try:
                output, _ = process.communicate(timeout=max(10, min(TRAIN_SECONDS, seconds - ENDING)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=ENDING - 5)
        except subprocess.TimeoutExpired as expired:
            said = expired.output or b""
            text_of = said.decode(errors="replace") if isinstance(said, bytes) else said
            raise PartError(f"the run did not end: {text_of[-ERROR_CHARACTERS:]}") from None
        finally:
            process.kill()
            process.wait()
        if not (run / "summary.json").exists():
            raise PartError(output[-ERROR_CHARACTERS:])
        return json.loads((run / "summary.json").read_text())


def serve(args: argparse.Namespace) -> int:
    """Measure the parts that standard input names, one a line, and answer each with one line of JSON on standard output."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    sys.path.append(str(ROOT / "kernels"))
    from mhc_jax.runs.environment import environment

    print(json.dumps(environment()), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        report = {"parts": asked["parts"]} | ({"copy_bytes_per_s": asked["copy"]} if asked["copy"] else {})
        try:
            answer = {"value": measured(asked["key"], args.rounds, report, asked["seconds"])}
        except Exception as error:
            trace = "".join(traceback.format_tb(error.__traceback__)[-3:])
            answer = {"failed": f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS] + f"\n{trace}"}
        print(json.dumps(answer | {"copy": report.get("copy_bytes_per_s")}), file=answers)
    return 0


# -- the process that asks


class Worker:
    """A process that measures parts, one after the other."""

    def __init__(self, args: argparse.Namespace, seconds: float = STARTS):
        """Start the process, and wait for the description of its device, `environment`."""
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by `end`
        self.fresh, self.alone = True, False
        command = [sys.executable, __file__, "--serve", f"--rounds={args.rounds}"]
        self.process = subprocess.Popen(
            command,
            # Without preallocation, PyTorch and JAX share the memory of a GPU.
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )
        self.environment = self._answer(min(STARTS, seconds))

    def can_measure(self, key: str) -> bool:
        """Return whether this process may measure a part: it runs, and no part that wants a process of its own is in the way."""
        alone = key.split("/")[0] in device_report.OWN_PROCESS
        return self.process.poll() is None and (self.fresh or not (alone or self.alone))

    def ask(self, key: str, report: dict[str, Any], seconds: float) -> Any:
        """Return the value of a part, and add the speed of a copy to the report.

        Raises:
          PartError: the part failed, took longer than `seconds`, or ended the process.
        """
        task, name, *_ = key.split("/")
        self.fresh, self.alone = False, task in device_report.OWN_PROCESS
        known = {k: v for k, v in report["parts"].items() if task == "bench" and k.startswith(f"correct/{name}/")}
        asked = {"key": key, "parts": known, "copy": report.get("copy_bytes_per_s"), "seconds": seconds}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of a process that has ended, which `_answer` reports
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        answer = self._answer(seconds)
        if answer["copy"]:
            report["copy_bytes_per_s"] = answer["copy"]
        if "failed" in answer:
            raise PartError(answer["failed"])
        return answer["value"]

    def end(self) -> None:
        """End the process and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _answer(self, seconds: float) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0, seconds))
        line = self.process.stdout.readline() if ready else ""
        with contextlib.suppress(json.JSONDecodeError):  # of a line that the end of the process has cut
            return json.loads(line)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5 if ready else 0.01)
        status = self.process.poll()
        why = f"no answer in {seconds:.0f} s" if status is None else f"the process ended with status {status}"
        self.log.seek(0)
        tail = self.log.read()[-ERROR_CHARACTERS:]
        self.end()
        raise PartError(f"{why}: {tail}")


def measure_parts(args: argparse.Namespace, folder: Path, report: dict[str, Any], worker: Worker, began: float) -> None:
    """Measure the parts that are left, as long as the budget lasts, and write the report after each."""

    def left() -> float:
        return args.budget - (time.monotonic() - began)

    waiting = device_report.left(report)
    try:
        while fitting := [key for key in waiting if left() > (0 if args.tiny else device_report.seconds(key))]:
            key, start = fitting[0], time.monotonic()
            waiting.remove(key)
            try:
                if not worker.can_measure(key):
                    worker.end()
                    worker = Worker(args, left())
                report["parts"][key] = worker.ask(key, report, min(max(60, 3 * device_report.seconds(key)), left()))
            except PartError as error:
                if left() <= 0:
                    print(f"{time.monotonic() - began:5.0f} s  {key} was cut by the budget", flush=True)
                    return
                report["parts"][key] = {"failed": str(error)}
            if device_report.failure(report["parts"][key]) is not None or device_report.has_errors(
                report["parts"][key]
            ):
                worker.end()  # a fault of the device stays with its process
            report["left"] = device_report.left(report)
            device_report.write(folder, report, PREDICTIONS)
            print(f"{time.monotonic() - began:5.0f} s  {key} ({time.monotonic() - start:.0f} s)", flush=True)
    finally:
        worker.end()


def predict() -> int:
    """Write what an H100 should measure to `PREDICTIONS`, beside what another version of Triton has given there."""
    from mhc_kernels import gpu_inspect
    from mhc_kernels.ops.arg_specs import SPECS

    from mhc_jax.timing import predictions
    from mhc_jax.timing.step_times import LAYERS

    if gpu_inspect.missing() is not None:
        print(
            f"--predict: {gpu_inspect.missing()}; make test-aot brings it to .venv/aot, for PYTHONPATH.",
            file=sys.stderr,
        )
        return 2
    shapes = [LAYERS[name] for name in ("27b", "304m", "3b")]
    made = predictions.predict([SPECS[name] for name in PREDICTED], device_report.BOUNDARY_FIRST, shapes)
    file = PREDICTIONS / "predictions.json"
    if file.exists():
        made["operations"] |= json.loads(file.read_text())["operations"] | made["operations"]
    made["operations"] = dict(sorted(made["operations"].items()))
    PREDICTIONS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made, indent=1) + "\n")
    text = predictions.readme(json.loads(file.read_text()))
    (PREDICTIONS / "README.md").write_text(text)
    print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Write the report; the exit status is 1 when an implementation is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, help="folder of the report (default: a record of today and this device)"
    )
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which nothing more is measured")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each operation")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--predict", action="store_true", help="write what an H100 should measure")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args)
    if args.predict:
        return predict()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the worker
    try:
        worker = Worker(args)
    except PartError as error:
        print(f"No part can be measured: {error}", file=sys.stderr)
        return 2
    env = worker.environment | {"command": " ".join(["python", *sys.argv])}
    name = re.sub(r"\W+", "-", env["device"].lower()).strip("-")
    folder = args.workdir or ROOT / "experiments" / "records" / f"{datetime.date.today()}-device-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    report = {"env": env, "tiny": args.tiny, "parts": {}, "left": []}
    if (folder / "report.json").exists():
        report = json.loads((folder / "report.json").read_text())
        same = report["tiny"] == args.tiny and all(report["env"][k] == env[k] for k in ("device", "commit", "packages"))
        if not same:
            worker.end()
            parser.error(f"{folder} holds the report of another device, commit or size; choose another --workdir.")
    report["left"] = device_report.left(report)
    measure_parts(args, folder, report, worker, began)
    device_report.write(folder, report, PREDICTIONS)
    print(f"\n{(folder / 'README.md').read_text()}\n{folder}")
    return 1 if device_report.wrong(report) else 0


if __name__ == "__main__":
    raise SystemExit(main())
