"""The eight benchmarks of mHC Table 4 as tasks of lm-evaluation-harness 0.4.13.

Items come from the Hugging Face Hub or from local files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_jax.errors import one_of, require

_BBH = """
boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies geometric_shapes
hyperbaton logical_deduction_five_objects logical_deduction_seven_objects logical_deduction_three_objects
movie_recommendation multistep_arithmetic_two navigate object_counting penguins_in_a_table reasoning_about_colored_objects
ruin_names salient_translation_error_detection snarks sports_understanding temporal_sequences
tracking_shuffled_objects_five_objects tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects
web_of_lies word_sorting
"""
BBH = tuple(_BBH.split())
MATH = {
    "algebra": "algebra",
    "counting_and_prob": "counting_and_probability",
    "geometry": "geometry",
    "intermediate_algebra": "intermediate_algebra",
    "num_theory": "number_theory",
    "prealgebra": "prealgebra",
    "precalc": "precalculus",
}
"""Subjects of the benchmark MATH.  Keys are their names in lm-evaluation-harness, and values their names in local files."""
_MMLU = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory professional_accounting
professional_law professional_medicine professional_psychology public_relations security_studies sociology us_foreign_policy
virology world_religions
"""
MMLU = tuple(_MMLU.split())


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the paper's table.  It may consist of several tasks of lm-evaluation-harness."""

    tasks: Mapping[str, Mapping[str, str]]
    """Local files of each task of lm-evaluation-harness: the path in the data folder of each split (`test`, `train`, ...)."""
    metric: str
    """Name of the metric.  The mean of the metric over all items of all tasks is reported."""
    filter: str
    """Name of the filter of lm-evaluation-harness that extracts the answer from a response."""
    shots: int
    """Number of examples in the prompt, as in the mHC paper."""
    local_shots: int
    """Number of examples in the prompt with local files.  It is 0 if examples would come from a split without a local file."""
    fixed_shots: bool = False
    """Whether the task of lm-evaluation-harness sets the number of examples itself."""


def _benchmarks() -> dict[str, Benchmark]:
    bbh = [("bbh_cot_fewshot", "get-answer"), ("bbh_fewshot", "none")]
    cot, direct = (
        Benchmark({f"{p}_{n}": {"test": f"bbh/{n}.jsonl"} for n in BBH}, "exact_match", f, 3, 3, fixed_shots=True)
        for p, f in bbh
    )
    math = {f"minerva_math_{n}": {"test": f"math/{file}.jsonl"} for n, file in MATH.items()}
    mmlu = {f"mmlu_{n}": {"test": f"mmlu/{n}.jsonl", "dev": f"mmlu_dev/{n}.jsonl"} for n in MMLU}
    drop = {"train": "drop_fewshot.jsonl", "validation": "drop.jsonl"}
    return {
        "bbh": cot,
        "drop": Benchmark({"drop": drop}, "f1", "none", 3, 3),
        "gsm8k": Benchmark(
            {"gsm8k_cot": {"test": "gsm8k.jsonl"}}, "exact_match", "strict-match", 8, 8, fixed_shots=True
        ),
        "hellaswag": Benchmark({"hellaswag": {"validation": "hellaswag.jsonl.gz"}}, "acc_norm", "none", 10, 0),
        "math": Benchmark(math, "exact_match", "none", 4, 4, fixed_shots=True),
        "mmlu": Benchmark(mmlu, "acc", "none", 5, 5),
        "piqa": Benchmark({"piqa": {"validation": "piqa.jsonl"}}, "acc", "none", 0, 0),
        "triviaqa": Benchmark({"triviaqa": {"validation": "triviaqa.jsonl"}}, "exact_match", "remove_whitespace", 5, 0),
        "bbh_direct": direct,
    }


BENCHMARKS = _benchmarks()
PAPER = tuple(BENCHMARKS)[:8]
"""Names of the eight benchmarks of the mHC paper, which `--tasks=paper` selects."""


def choose(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the tasks that `names` select, as a list for each benchmark.

    A name is that of a benchmark or of a single task, or `paper` for all benchmarks of the paper.

    Raises:
      InputError: a name is unknown.  The message suggests the nearest name.
    """
    all_tasks = {task: name for name, benchmark in BENCHMARKS.items() for task in benchmark.tasks}
    out: dict[str, list[str]] = {}
    for name in names:
        if name not in ("paper", *BENCHMARKS, *all_tasks):
            near = [task for task in all_tasks if task.rpartition("_")[0] == name.rpartition("_")[0]]
            one_of("A name in --tasks", name, ["paper", *BENCHMARKS, *near])
        for benchmark in PAPER if name == "paper" else [all_tasks.get(name, name) if name not in BENCHMARKS else name]:
            wanted = [name] if name in all_tasks and name not in BENCHMARKS else list(BENCHMARKS[benchmark].tasks)
            out.setdefault(benchmark, []).extend(task for task in wanted if task not in out.get(benchmark, []))
    require(bool(out), "--tasks names nothing; use 'paper', or a benchmark such as 'piqa'.")
    return out


def harness_tasks(chosen: Mapping[str, Sequence[str]], data_dir: Path | None) -> list[dict[str, Any]]:
    """Return the chosen tasks in the form of the argument `tasks` of lm_eval.simple_evaluate.

    Each task is given as a member of a group.  lm-eval 0.4.13 then loads the task that the member names, and replaces the settings
    that the member gives.  The same mapping outside a group would define a new task.

    Args:
      chosen: tasks by benchmark, from `choose`.
      data_dir: folder of local items.  None means that items come from the Hugging Face Hub.

    Raises:
      InputError: a file is missing.
    """
    members = []
    for name, tasks in chosen.items():
        benchmark = BENCHMARKS[name]
        shots = benchmark.shots if data_dir is None else benchmark.local_shots
        for task in tasks:
            member: dict[str, Any] = {"task": task} | ({} if benchmark.fixed_shots else {"num_fewshot": shots})
            if data_dir is not None:
                files = {split: data_dir / file for split, file in benchmark.tasks[task].items()}
                missing = [str(file) for file in files.values() if not file.is_file()]
                require(
                    not missing,
                    f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, which {task} reads; put the "
                    "data there, leave the task out of --tasks, or leave --data-dir out to use the hub.",
                )
                member |= {"dataset_path": "json", "dataset_name": None}
                member["dataset_kwargs"] = {"data_files": {split: str(file) for split, file in files.items()}}
                if name not in ("bbh", "bbh_direct", "mmlu"):
                    member["training_split"] = "train" if "train" in files else None
                if name == "drop":  # all prompts hold the same examples, the first items of the file
                    member |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
            if name == "drop":
                # By default lm-eval 0.4.13 joins the keys of a mapping, so that every example in a prompt would end with
                # "number,date,spans,..." instead of its answer.
                member["doc_to_target"] = "{{ answers[0]|join(',') }}"
            members.append(member)
    return [{"group": "chosen", "task": members}]


def gold_answer(benchmark: str, task: Any, doc: Mapping[str, Any]) -> Any:
    """Return the right answer to the item `doc` in the form that the metric of the benchmark expects of a response.

    In multiple choice it is the index of the right choice.
    """
    target = task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        return int(target)
    if benchmark == "bbh":
        return f"So the answer is {target}."
    if benchmark == "gsm8k":
        return f"The answer is {target}."
    if benchmark == "math":
        return f"{doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."
    return target[0] if isinstance(target, list) else target
