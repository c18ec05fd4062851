"""Evaluate checkpoints on benchmarks, and write results, samples and configuration to the run folder of each checkpoint."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import spec
from mhc_jax.errors import InputError, require
from mhc_jax.evaluation.scoring import LN2
from mhc_jax.evaluation.store import Responses
from mhc_jax.evaluation.tasks import BENCHMARKS, choose, gold_answer, harness_tasks
from mhc_jax.files.json_files import replacing, write_json
from mhc_jax.runs.environment import environment
from mhc_jax.runs.metrics import plain
from mhc_jax.runs.trained import beyond_training, load_trained


def import_harness(local: bool) -> Any:
    """Import lm_eval and return it, without its progress bars and warnings.

    Args:
      local: whether all items are in local files, so that the library is told not to use the network.

    Raises:
      InputError: lm_eval is not installed.
    """
    if local:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness is not installed ({error}); pip install 'lm-eval[math]==0.4.13'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def evaluate(
    checkpoint: str | Path,
    tasks: Sequence[str] = ("paper",),
    data_dir: str | Path | None = None,
    limit: int = 0,
    context: int = 0,
    batch_size: int = 0,
    max_gen_toks: int = 0,
    tokenizer: str = "",
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint on benchmarks.  Responses that earlier calls have stored are not computed again.

    Args:
      checkpoint: run folder.
      tasks: names of benchmarks and tasks, as `tasks.choose` takes them.
      data_dir: folder of local items.  None means that items come from the Hugging Face Hub.
      limit: largest number of items of each task.  0 means all items.
      context: largest number of tokens of prompt and answer together.  0 means the sequence length of training.
      batch_size: number of sequences in a batch.  0 means as many as fit the memory.
      max_gen_toks: largest number of tokens of an answer.  0 means the limit of the task.
      tokenizer: tokenizer in the form of data.tokenizer.  Empty means the tokenizer of the checkpoint.

    Returns:
      The content of the results file, and two more entries: `folder`, the folder of this file, and `samples`, from `collect`.

    Raises:
      InputError: a number is negative, a task, file, checkpoint or tokenizer cannot be used, or a prompt and its answer do not
        fit the context.  It is raised before programs are compiled, where that is possible.
    """
    sizes = {"limit": limit, "context": context, "batch_size": batch_size, "max_gen_toks": max_gen_toks}
    for name, value in sizes.items():
        require(value >= 0, f"--{name} is {value}; it must not be negative.")
    chosen = choose(tasks)
    specs = harness_tasks(chosen, _folder(data_dir))
    model = load_trained(checkpoint, tokenizer)
    lm_eval = import_harness(data_dir is not None)
    from mhc_jax.evaluation.harness import DecoderLM

    folder = model.folder / "evaluation" / f"step{model.step}"
    trained = model.config.data.sequence_length
    identity = {"step": model.step, "tokenizer": model.tokenizer.fingerprint, "context": context or trained}
    if warning := beyond_training(model.folder.name, trained, context):
        print(warning, file=sys.stderr)
    store = Responses(folder / "responses.jsonl", identity)
    began = time.perf_counter()
    try:
        lm = DecoderLM(model, store, context, batch_size, max_gen_toks)
        logged = lm_eval.simple_evaluate(
            model=lm, tasks=specs, limit=limit or None, bootstrap_iters=0, log_samples=True
        )
        samples = collect(chosen, logged["samples"])
        add_gold_bits(lm, samples, logged)
    finally:
        store.close()
    settings = {"tasks": list(tasks), "data_dir": None if data_dir is None else str(data_dir), **sizes}
    settings |= {"context": lm.max_length, "trained_context": trained}
    results = {
        "checkpoint": model.folder.name,
        "connection": spec(model.config.model.connection),
        "step": model.step,
        "settings": settings,
        "benchmarks": summarise(samples, logged["n-shot"]),
        "harness": logged["results"],
        "wall_clock_s": time.perf_counter() - began,
        "compilations": lm.compilations,
        "environment": environment(),
        "model": to_mapping(model.config),
    }
    stem = "-".join(tasks)[:80] + (f"-limit{limit}" if limit else "")
    write_json(folder / f"{stem}.json", plain(results))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    with replacing(folder / f"{stem}.samples.jsonl") as file:
        file.write_text(lines)
    return {**results, "samples": samples, "folder": str(folder)}


def gold_check(tasks: Sequence[str], data_dir: str | Path | None, limit: int = 0) -> dict[str, Any]:
    """Evaluate a model that always gives the right answer, to show the highest score that data, prompts and metrics allow.

    Args:
      tasks, data_dir, limit: as in `evaluate`.

    Returns:
      A mapping with two keys: `benchmarks`, the result of `summarise`, and `harness`, lm-evaluation-harness's values by task.
    """
    chosen = choose(tasks)
    specs = harness_tasks(chosen, _folder(data_dir))
    lm_eval = import_harness(data_dir is not None)
    from lm_eval.tasks import TaskManager

    from mhc_jax.evaluation.harness import GoldLM

    manager = TaskManager()
    loaded = manager.load(specs)["tasks"]
    owner = {task: name for name, tasks in chosen.items() for task in tasks}
    lm = GoldLM(lambda task, doc: gold_answer(owner[task], loaded[task], doc))
    logged = lm_eval.simple_evaluate(
        model=lm, tasks=specs, limit=limit or None, bootstrap_iters=0, log_samples=True, task_manager=manager
    )
    benchmarks = summarise(collect(chosen, logged["samples"]), logged["n-shot"])
    return {"benchmarks": benchmarks, "harness": dict(logged["results"])}


def _folder(data_dir: str | Path | None) -> Path | None:
    if data_dir is None:
        return None
    require(
        Path(data_dir).is_dir(),
        f"--data-dir is {str(data_dir)!r}, and there is no such folder; give one, or leave it out.",
    )
    return Path(data_dir).resolve()


def collect(
    chosen: Mapping[str, Sequence[str]], logged: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Return the samples of an evaluation: one mapping for each item of each task.

    The keys are benchmark, task, doc_id, score (by the metric and filter of the benchmark), response, target, prompt_hash, and the
    keys truncated, gold_bits and gold_bytes, whose values `add_gold_bits` sets later.

    Args:
      chosen: tasks by benchmark, from `tasks.choose`.
      logged: samples of lm-evaluation-harness by task.
    """
    return [
        {
            "benchmark": name,
            "task": task,
            "doc_id": sample["doc_id"],
            "score": float(sample[BENCHMARKS[name].metric]),
            "response": sample["filtered_resps"],
            "target": sample["target"],
            "prompt_hash": sample["prompt_hash"],
            "truncated": False,
            "gold_bits": None,
            "gold_bytes": None,
        }
        for name, tasks in chosen.items()
        for task in tasks
        for sample in logged.get(task, ())
        if sample["filter"] == BENCHMARKS[name].filter
    ]


def add_gold_bits(lm: Any, samples: Sequence[dict[str, Any]], logged: Mapping[str, Any]) -> None:
    """Set gold_bits, gold_bytes and truncated in each sample.

    gold_bits is -log2 of the probability of the right ("gold") answer after the prompt.  gold_bytes is the number of bytes of the
    scored text (`scoring.split_texts`).  truncated says whether the beginning of the prompt was cut off.

    In multiple choice the right choice has been scored already.  In all other tasks the first target is scored here, together with
    the delimiter that the task puts between question and answer.  If this target is empty, bits and bytes stay None.

    Args:
      lm: the `DecoderLM` that made the responses.
      samples: samples from `collect`.
      logged: result of lm_eval.simple_evaluate.
    """
    from lm_eval.api.instance import Instance

    by_item = {(task, entry["doc_id"]): entry for task, entries in logged["samples"].items() for entry in entries}
    requests: list[Instance] = []
    gold_of: list[tuple[dict[str, Any], int, bool]] = []
    for sample in samples:
        entry = by_item[sample["task"], sample["doc_id"]]
        arguments = entry["arguments"]
        prompt, second = arguments[0][:2]
        multiple_choice = isinstance(second, str)
        if multiple_choice:
            pairs, gold = [tuple(pair) for pair in arguments], int(entry["target"])
        else:
            target = entry["target"][0] if isinstance(entry["target"], list) else str(entry["target"])
            delimiter = logged["configs"][sample["task"]]["target_delimiter"]
            pairs, gold = [(prompt, delimiter + target)] if target else [], 0
            key = lm.store.key("generate", [*arguments[0], lm.limit])
            sample["truncated"] = lm.store.known[key]["truncated"] > 0
        if pairs:
            gold_of.append((sample, len(requests) + gold, multiple_choice))
        metadata = (sample["task"], sample["doc_id"], 1)
        requests += [Instance("loglikelihood", {}, pair, i, metadata) for i, pair in enumerate(pairs)]
    answers = lm.scored(requests)
    for sample, index, multiple_choice in gold_of:
        answer = answers[index]
        sample["gold_bits"], sample["gold_bytes"] = -answer.nats / LN2, answer.size
        if multiple_choice:
            sample["truncated"] = answer.cut > 0


def summarise(samples: Sequence[Mapping[str, Any]], shots: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the results of each benchmark, in which all items of all its tasks have the same weight.

    Args:
      samples: samples from `collect`, completed by `add_gold_bits`.
      shots: number of examples in the prompts of each task, as the harness counts them.

    Returns:
      By benchmark: score (mean of the metric over items), stderr (standard error of this mean; None for a single item), truncated
      (number of items for which the beginning of the prompt was cut off), gold_bits_per_byte (sum of gold_bits, divided by the sum
      of gold_bytes), metric (its name), items and tasks (their numbers), and shots and paper_shots (numbers of examples in a prompt
      here and in the paper).
    """
    out = {}
    for name in dict.fromkeys(sample["benchmark"] for sample in samples):
        items, benchmark = [s for s in samples if s["benchmark"] == name], BENCHMARKS[name]
        scores = [s["score"] for s in items]
        scored = [s for s in items if s["gold_bits"] is not None]
        size = sum(s["gold_bytes"] for s in scored)
        out[name] = {
            "metric": benchmark.metric,
            "score": float(np.mean(scores)),
            "stderr": float(stats.sem(scores)) if len(scores) > 1 else None,
            "items": len(items),
            "tasks": len({s["task"] for s in items}),
            "shots": shots[items[0]["task"]],
            "paper_shots": benchmark.shots,
            "truncated": sum(s["truncated"] for s in items),
            "gold_bits_per_byte": sum(s["gold_bits"] for s in scored) / size if size else None,
        }
    return out
