"""Benchmarks of trained models, the paper's row (mHC Table 4) among them.

    python experiments/evaluate.py --checkpoint=runs/demo/residual,runs/demo/mhc-init-home --tasks=paper --data-dir=items --limit=20
    python experiments/evaluate.py --gold_check --tasks=bbh,gsm8k,drop --data-dir=items

With --data-dir from local files, without it from the hub.  Results, samples and configuration go to RUN/evaluation/step<N>/.
Responses are kept as they come: the same command after an interruption goes on.  Several checkpoints give a table with paired
differences to the first.
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
TASKS = flags.DEFINE_list("tasks", ["paper"], "paper, bbh, bbh_direct, drop, gsm8k, ..., or single tasks of them.")
DATA_DIR = flags.DEFINE_string("data-dir", None, "Folder of local items (README); without it they come from the hub.")
LIMIT = flags.DEFINE_integer("limit", 0, "Items of each task (0: all); BBH has 27 tasks, MMLU 57, MATH 7.")
CONTEXT = flags.DEFINE_integer("context", 0, "Tokens of prompt and answer (0: the sequence length of training).")
BATCH = flags.DEFINE_integer("batch_size", 0, "Rows of a batch (0: as many as fit).")
MAX_GEN = flags.DEFINE_integer("max_gen_toks", 0, "Tokens of an answer at most (0: what the task says).")
TOKENIZER = flags.DEFINE_string("tokenizer", "", "As data.tokenizer (default: the one in the checkpoint).")
OUTPUT = flags.DEFINE_string("output", "", "File for the table (Markdown), which is printed in any case.")
GOLD = flags.DEFINE_bool(
    "gold_check", False, "Instead of a checkpoint: answer with the gold text, which shows the ceiling."
)


def main() -> int:
    """Evaluate, and print the table."""
    if GOLD.value:
        found = gold_check(TASKS.value, DATA_DIR.value, LIMIT.value)
        for name, own in found["benchmarks"].items():
            print(f"{name}: {own['metric']} {own['score']:.3f} of {own['items']} items, {own['tasks']} tasks")
            for task in set(found["harness"]) & set(BENCHMARKS[name].tasks) if own["tasks"] == 1 else ():
                values = {k: v for k, v in found["harness"][task].items() if isinstance(v, float) and "stderr" not in k}
                print(f"  {task}: {', '.join(f'{key} {value:.3f}' for key, value in values.items())}")
        return 0
    require(bool(CHECKPOINT.value), "--checkpoint is missing; give a run folder, or several with commas between them.")
    results = [
        evaluate(
            folder,
            TASKS.value,
            DATA_DIR.value,
            LIMIT.value,
            CONTEXT.value,
            BATCH.value,
            MAX_GEN.value,
            TOKENIZER.value,
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
    cli.main(main)
