"""Generate text with the newest checkpoint of a run, or with a converted model.

    python experiments/generate.py --checkpoint=runs/demo/mhc-init-home --prompt='KING HENRY:' --max_new=200 --top_p=0.95

Without --prompt, every line of standard input is a prompt, and empty lines are skipped.  The text appears as it is generated.
A prompt of standard input that is longer than the context is told, the next one follows, and the exit status is 2.
"""

import os
import sys
import time
from collections.abc import Iterator

from absl import flags

from mhc_jax import cli
from mhc_jax.errors import InputError, require
from mhc_jax.generation import Generator, Sampling
from mhc_jax.runs.trained import beyond_training, load_trained

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of the run or of the converted model (convert.py).", required=True
)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
MAX_NEW = flags.DEFINE_integer("max_new", 200, "Most tokens to generate.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Temperature of the sampling; 0: always the most likely token.")
TOP_P = flags.DEFINE_float("top_p", 0.95, "Sample from the fewest tokens that have this probability together.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
CONTEXT = flags.DEFINE_integer(
    "context", 0, "Most tokens of prompt and answer together (0: the sequence length of training)."
)
TOKENIZER = flags.DEFINE_string("tokenizer", "", "As data.tokenizer (default: the one in the checkpoint).")


def prompts() -> Iterator[str]:
    """Yield --prompt, or else every line of standard input that is not empty, without its line end.

    Raises:
      InputError: a prompt is not UTF-8.
    """
    given = sys.stdin.buffer if PROMPT.value is None else [os.fsencode(PROMPT.value)]
    for number, line in enumerate(given, 1):
        try:
            text = line.decode().rstrip("\r\n") if PROMPT.value is None else line.decode()
        except UnicodeDecodeError as error:
            place = f"line {number} of standard input" if PROMPT.value is None else "--prompt"
            raise InputError(f"Byte {error.start} of {place} is not UTF-8; give prompts in UTF-8.") from error
        if text or PROMPT.value is not None:
            yield text


def main() -> int:
    """Continue every prompt, print the text and the seconds that it took, and return the exit status."""
    require(MAX_NEW.value >= 1, f"--max_new is {MAX_NEW.value}; it must be at least 1.")
    require(CONTEXT.value >= 0, f"--context is {CONTEXT.value}; it must not be negative.")
    sampling = Sampling(TEMPERATURE.value, TOP_P.value, SEED.value)
    model = load_trained(CHECKPOINT.value, TOKENIZER.value)
    tokenizer, context = model.tokenizer, CONTEXT.value or model.config.data.sequence_length
    if warning := beyond_training(model.folder.name, model.config.data.sequence_length, context):
        print(warning, file=sys.stderr)
    generator = Generator(model.config.model, model.params, context, tokenizer.vocab_size, model.mesh)

    def answer(made: list[int]) -> tuple[list[int], bool]:
        """Return (the tokens of `made` before the end-of-document token, whether `made` has this token)."""
        over = tokenizer.end_of_document in made
        return (made[: made.index(tokenizer.end_of_document)] if over else made), over

    status, compiled = 0, False
    for prompt in prompts():
        ids = [*tokenizer.start, *tokenizer.encode(prompt).tolist()]
        shown = before = tokenizer.decode(ids)

        def show(_row: int, made: list[int], prompt_ids: list[int] = ids) -> bool:
            nonlocal shown
            kept, over = answer(made)
            # The answer is decoded behind its prompt, because some tokenizers drop a space at the start of a text.
            text = tokenizer.decode([*prompt_ids, *kept])
            # If the last character still lacks bytes, it decodes to replacement characters, which are not shown yet.
            whole = text if over else text.rstrip("\N{REPLACEMENT CHARACTER}")
            print(whole[len(shown) :], end="", flush=True)
            shown = whole
            return over

        if not compiled and len(ids) < context:
            print("compiling; the first answer takes longer ...", file=sys.stderr, flush=True)
            compiled = True
        began = time.perf_counter()
        print(before, end="", flush=True)
        try:
            [made] = generator.generate([ids], MAX_NEW.value, sampling, show)
        except InputError as error:
            if PROMPT.value is not None:
                raise
            print(f"\nerror: {error}", file=sys.stderr)
            status = 2
            continue
        seconds = time.perf_counter() - began
        kept, over = answer(made)
        full = not over and len(made) < MAX_NEW.value and len(ids) + len(made) == context
        why = f"; the context of {context} tokens is full" if full else ""
        print(f"\n[{len(kept)} tokens in {seconds:.1f} s, compilation included{why}]", file=sys.stderr)
    return status


if __name__ == "__main__":
    cli.main(main, computes=True)
