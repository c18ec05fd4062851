"""The commands of the campaign: what each of them needs, how it is called, and what it must leave behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from campaign import digests, processes
from campaign.faults import Fault
from campaign.processes import Child, Command

WORDS = ("stream", "gate", "norm", "layer", "width", "depth", "token", "loss", "rate", "decay")
KIND = "mhc:num_streams=2:t_max=2"
TINY = {
    "model": {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 16},
    "data": {"sequence_length": 16, "batch_size": 4},
    "optimizer": {"warmup_steps": 2},
    "train": {
        "log_every": 1,
        "validation_batches": 1,
        "validate_every": 8,
        "diagnostics_every": 0,
        "checkpoint_every": 4,
    },
}
"""Settings of the runs of the campaign."""


@dataclass
class Place:
    """Where the cases live: `scratch` holds their inputs, finished examples and lives; `patience_s` bounds every command."""

    scratch: Path
    patience_s: float
    references: dict[str, Reference] = field(default_factory=dict)
    references_s: float = 0.0
    """Seconds that the references took, which count to no trial."""

    def text(self, paragraphs: int = 40) -> Path:
        """Return the path of a text with this number of paragraphs of 60 words, the same at every call."""
        path = self.scratch / f"text{paragraphs}.txt"
        if not path.exists():
            rng = random.Random(0)
            path.write_text("\n\n".join(" ".join(rng.choice(WORDS) for _ in range(60)) for _ in range(paragraphs)))
        return path

    def flags(self, kind: str = KIND, paragraphs: int = 40, **train: Any) -> list[str]:
        """Return the flags of a tiny configuration."""
        sections = TINY | {
            "data": TINY["data"] | {"source": str(self.text(paragraphs))},
            "train": TINY["train"] | train,
        }
        settings = [f"--config.{name}.{k}={v}" for name, section in sections.items() for k, v in section.items()]
        return [f"--config={processes.ROOT}/experiments/configs/demo.py:{kind}", *settings]

    def environment(self, life: Path) -> dict[str, str]:
        """Return the variables of the commands of a life: its caches of texts and of compiled programs."""
        return {"MHC_JAX_CACHE": str(life / "cache"), "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "xla")}

    def example(self, name: str) -> Path:
        """Return the folder that a case leaves if nothing disturbs it; the case runs if it has not run yet."""
        return self.reference(CASES[name]).folder

    def reference(self, case: Case) -> Reference:
        """Run a case undisturbed, if that has not been done, and return what it leaves and takes.

        The first of two runs fills the cache of compiled programs.  Both must agree.
        """
        if case.name not in self.references:
            began, inner = time.monotonic(), self.references_s
            ends = [self._undisturbed(case, number) for number in range(2)]
            self.references_s = inner + time.monotonic() - began
            lines = digests.differing(ends[0].digest, ends[1].digest)
            if lines:
                raise RuntimeError(f"Two runs of {case.name} that nothing disturbed differ: {lines}")
            self.references[case.name] = ends[1]
        return self.references[case.name]

    def _undisturbed(self, case: Case, number: int) -> Reference:
        life = self.scratch / "alone" / f"{case.name.replace(' ', '-')}-{number}"
        shutil.rmtree(life, ignore_errors=True)
        life.mkdir(parents=True)
        trace = life.with_suffix(".trace")
        trace.unlink(missing_ok=True)
        case.prepare(self, life)
        began = time.monotonic()
        children = case.start(self, life, Fault(str(life), trace=str(trace)))
        for child in children:
            if child.wait(10 * self.patience_s) != 0:
                raise RuntimeError(f"{case.name} fails undisturbed with {child.status}: {child.said[-1500:]}")
        took = time.monotonic() - began
        digest = self.digest(case, life)
        if "error" in digest:
            raise RuntimeError(f"{case.name} leaves what cannot be read: {digest['error']}")
        return Reference(life, digest, took, trace.read_text().splitlines())

    def digest(self, case: Case, life: Path) -> dict[str, str]:
        """Return the digest of a life that has ended."""
        return processes.call(lambda: digests.attempt(case.digest, life) | digests.files(life / "out"))


@dataclass
class Reference:
    """What a case leaves if nothing disturbs it: the folder, its digest, the seconds, and its write operations in their order."""

    folder: Path
    digest: dict[str, str]
    seconds: float
    operations: list[str]


@dataclass(frozen=True)
class Case:
    """A command, or several that belong together.  A life is a folder; what the command writes is in its folder `out`."""

    name: str
    commands: Callable[[Place, Path], list[Command]]
    digest: Callable[[Path], dict[str, str]]
    prepare: Callable[[Place, Path], None] = lambda place, life: None
    """Puts into the folder of a life what the command reads and changes."""
    kills: int = 6
    """Most kills of one life."""
    workers: int = 0
    """Number of processes that the command starts and that may be killed, too."""
    missing: Callable[[], str] = lambda: ""
    """Returns why the case cannot run here, or nothing."""
    done: str = ""
    """What the command says, with status 2, if it has been killed after its work was done."""
    weight: float = 1.0
    """Share of the time of its part that the case gets, as a multiple of that of other cases."""

    def start(
        self, place: Place, life: Path, fault: Fault | None = None, first: int = 0, plain: bool = False
    ) -> list[Child]:
        """Start the commands of a life.  The fault befalls command number `first`."""
        (life / "out").mkdir(parents=True, exist_ok=True)
        env = place.environment(life)
        commands = self.commands(place, life)
        return [
            processes.start(
                dataclasses.replace(command, env={**env, **command.env}, plain=plain),
                life / "logs",
                fault if k == first else None,
            )
            for k, command in enumerate(commands)
        ]


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _train(count: int, kind: str = KIND, **train: Any) -> Callable[[Place, Path], list[Command]]:
    def commands(place: Place, life: Path) -> list[Command]:
        flags = [*place.flags(kind, **({"steps": 24} | train)), f"--workdir={life / 'out' / 'run'}"]
        if count == 1:
            return [Command("train", tuple(flags))]
        flags += [f"--config.mesh.data={count}", "--heartbeat_timeout=10", "--start_timeout=60"]
        flags += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={count}"]
        return [Command("train", (*flags, f"--process_id={k}")) for k in range(count)]

    return commands


def _sweep(place: Place, life: Path) -> list[Command]:
    settings = TINY | {"data": TINY["data"] | {"source": str(place.text())}, "train": TINY["train"] | {"steps": 12}}
    (life / "config.py").write_text(
        "from experiments.configs import demo\n\n\ndef get_config():\n    config = demo.get_config('residual')\n"
        f"    for name, section in {settings!r}.items():\n        config[name].update(section)\n    return config\n"
    )
    (life / "tiny.py").write_text(
        '"""A tiny sweep."""\n\nfrom mhc_jax.sweeps.grid import Sweep, over, product, seeds\n\n\ndef get_sweep():\n'
        '    points = product(seeds(1), over("connection", ["residual", "hc:num_streams=2"]))\n'
        '    return Sweep(base="config.py", points=points)\n'
    )
    return [Command("sweep", (str(life / "tiny.py"), f"--workdir={life / 'out' / 'sweep'}", "--workers=2"))]


def _compare(place: Place, life: Path) -> list[Command]:
    kinds = "--connections=residual,hc:num_streams=2"
    return [Command("compare", (*place.flags("residual", steps=12), kinds, f"--workdir={life / 'out' / 'sweep'}"))]


def _copy(name: str, inner: str) -> Callable[[Place, Path], None]:
    """Copy what another case leaves to the inputs of this one."""

    def prepare(place: Place, life: Path) -> None:
        shutil.copytree(place.example(name) / "out" / inner, life / "in" / inner)

    return prepare


def _record(place: Place, life: Path) -> list[Command]:
    return [Command("record", (str(life / "in" / "sweep"), "tiny", "--metrics", f"--records={life / 'out'}"))]


def _report(place: Place, life: Path) -> list[Command]:
    return [Command("report", (str(life / "in" / "sweep"), f"--output={life / 'out'}"))]


def _tokenizer(place: Place, life: Path) -> list[Command]:
    flags = (f"--source={place.text(400)}", "--vocab_size=300", f"--output={life / 'out' / 'bpe.json'}")
    return [Command("tokenizer", flags)]


def _tokenizing(place: Place, life: Path) -> list[Command]:
    """One step of training on a text of 5 MB, which has to be tokenized first."""
    env = {"MHC_JAX_CACHE": str(life / "out" / "cache")}
    flags = (*place.flags("residual", 12_000, steps=2, checkpoint_every=0), f"--workdir={life / 'run'}")
    return [Command("train", flags, env)]


def _convert(place: Place, life: Path) -> list[Command]:
    return [Command("convert", (str(life / "in" / "run"), str(life / "out" / "model"), "--to=model"))]


def _evaluate(place: Place, life: Path) -> list[Command]:
    items = life / "items"
    items.mkdir(exist_ok=True)
    rng = random.Random(1)
    sums = [(rng.randrange(50), rng.randrange(50)) for _ in range(16)]
    rows = [{"question": f"What is {a} + {b}?", "answer": f"It is {a + b}. #### {a + b}"} for a, b in sums]
    (items / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--checkpoint={life / 'out' / 'run'}", "--tasks=gsm8k", f"--data-dir={items}", "--context=512")
    return [Command("evaluate", (*flags, "--max_gen_toks=8", f"--output={life / 'out' / 'table.md'}"))]


def _evaluation(life: Path) -> dict[str, str]:
    """Return the digest of an evaluation: its results and table without times and the life's path, and its samples."""
    [folder] = (life / "out" / "run" / "evaluation").iterdir()
    lines = (life / "out" / "table.md").read_text().splitlines()
    out = {"table": digests.sha("\n".join(line for line in lines if not re.match(r"run: \d+ s, ", line)))}
    for file in sorted(folder.glob("*.json")):
        results = json.loads(file.read_text().replace(str(life), "LIFE"))
        out[file.name] = digests.sha(
            json.dumps({k: results[k] for k in ("benchmarks", "settings", "step", "connection")})
        )
    out["responses"] = digests.sha("\n".join(sorted((folder / "responses.jsonl").read_text().splitlines())))
    return out | {file.name: digests.sha(file.read_bytes()) for file in sorted(folder.glob("*.samples.jsonl"))}


def _copy_run_to_out(place: Place, life: Path) -> None:
    shutil.copytree(place.example("train") / "out" / "run", life / "out" / "run")


def _without_harness() -> str:
    return "" if importlib.util.find_spec("lm_eval") else "lm-eval is not installed"


def _of_run(life: Path) -> dict[str, str]:
    return digests.run(life / "out" / "run")


def _of_out(life: Path) -> dict[str, str]:
    return digests.content(life / "out", r"(^|/)lock$")


def _of_page(life: Path) -> dict[str, str]:
    return digests.content(life / "out", r"\.pdf$|\.svg$") | {"names": " ".join(sorted(os.listdir(life / "out")))}


def _of_sweep(life: Path) -> dict[str, str]:
    return digests.sweep(life / "out" / "sweep")


CASES = {
    case.name: case
    for case in (
        Case("train", _train(1), _of_run, kills=8, weight=3),
        Case("train of 2 processes", _train(2, "residual"), _of_run, weight=2),
        Case("train of 4 processes", _train(4, "residual"), _of_run, weight=2),
        Case("sweep", _sweep, _of_sweep, workers=2, weight=2),
        Case("compare", _compare, _of_sweep, workers=1, weight=2),
        Case("evaluate", _evaluate, _evaluation, _copy_run_to_out, missing=_without_harness),
        Case("record", _record, _of_out, _copy("sweep", "sweep"), kills=3, done="is there already"),
        Case("report", _report, _of_page, _copy("sweep", "sweep"), kills=3),
        Case("tokenizer", _tokenizer, _of_out, kills=3),
        Case("tokenizing", _tokenizing, _of_out, kills=3),
        Case("convert", _convert, _of_out, _copy("train", "run"), kills=3, done="exists and is not empty"),
    )
}
"""The cases by name."""
