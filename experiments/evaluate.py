"""Evaluate trained models on benchmarks, among them those of mHC Table 4.

    python experiments/evaluate.py --checkpoint=runs/demo/residual,runs/demo/mhc-init-home --tasks=paper --data-dir=items --limit=20
    python experiments/evaluate.py --gold_check --tasks=bbh,gsm8k,drop --data-dir=items

Items of benchmarks come from local files in --data-dir, or else from the Hugging Face hub.  Results, samples and configuration go
to RUN/evaluation/step<N>/.  The model's responses are written as they come, so that the same command goes on after an interruption.
With several checkpoints the table has paired differences to the first checkpoint.
"""

import os
import sys
from pathlib import Path

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import require
from mhc_jax.evaluation.run import evaluate, gold_check
from mhc_jax.evaluation.table import LEGEND, comparison, remarks
from mhc_jax.evaluation.tasks import BENCHMARKS

CHECKPOINT = flags.DEFINE_list("checkpoint", [], "Run folders; differences are to the first.")
TASKS = flags.DEFINE_list("tasks", ["paper"], "paper, bbh, bbh_direct, drop, gsm8k, ..., or single tasks of these.")
DATA_DIR = flags.DEFINE_string(
    "data-dir", None, "Folder of local items (docs/evaluation.md); without it they come from the hub."
)
LIMIT = flags.DEFINE_integer("limit", 0, "Items of each task (0: all); BBH has 27 tasks, MMLU 57, MATH 7.")
CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of prompt and answer (0: the sequence length of training).")
BATCH = flags.DEFINE_integer("batch_size", 0, "Rows of a batch (0: as many as fit the memory).")
MAX_GEN = flags.DEFINE_integer("max_gen_toks", 0, "Tokens of an answer at most (0: what the task allows).")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "As data.tokenizer (empty: the one in the checkpoint).")
OUTPUT = flags.DEFINE_string("output", "", "File for the table (Markdown), which is printed as well.")
GOLD = flags.DEFINE_bool(
    "gold_check", False, "Answer with the gold text instead of a checkpoint, which shows the highest possible score."
)


def main() -> int:
    """Evaluate the checkpoints and print the table.  With --gold_check print the scores of the gold answers instead."""
    if GOLD.value:
        result = gold_check(TASKS.value, DATA_DIR.value, LIMIT.value)
        for name, numbers in result["benchmarks"].items():
            items, tasks = numbers["items"], numbers["tasks"]
            print(f"{name}: {numbers['metric']} {numbers['score']:.3f} of {items} items, {tasks} tasks")
            for task in set(result["harness"]) & set(BENCHMARKS[name].tasks) if tasks == 1 else ():
                logged = result["harness"][task]
                values = {k: v for k, v in logged.items() if isinstance(v, float) and "stderr" not in k}
                print(f"  {task}: {', '.join(f'{key} {value:.3f}' for key, value in values.items())}")
        return 0
    require(bool(CHECKPOINT.value), "--checkpoint is missing; give a run folder, or several with commas between them.")
    results = [
        evaluate(
            folder,
            TASKS.value,
            data_dir=DATA_DIR.value,
            limit=LIMIT.value,
            context=CONTEXT.value,
            batch_size=BATCH.value,
            max_gen_toks=MAX_GEN.value,
            tokenizer=TOKENIZER.value,
        )
        for folder in CHECKPOINT.value
    ]
    text = "\n".join([comparison(results), "", LEGEND, "", *(line for result in results for line in remarks(result))])
    print(text)
    if OUTPUT.value:
        Path(OUTPUT.value).write_text(text + os.linesep)
        print(f"Table: {OUTPUT.value}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.main(main, computes=True)
