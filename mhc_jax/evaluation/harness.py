"""Models for lm-evaluation-harness: a trained model (`DecoderLM`), and one that always gives the right answer (`GoldLM`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mhc_jax.errors import require
from mhc_jax.evaluation.scoring import FEW_ROWS, LN2, Scored, Scorer, memory_budget, split_texts
from mhc_jax.evaluation.store import Responses
from mhc_jax.generation import Generator, Sampling, bucket
from mhc_jax.kv_cache import empty_cache
from mhc_jax.runs.progress import Progress
from mhc_jax.runs.trained import Trained

MAX_GEN_TOKS = 256
"""Largest number of tokens of an answer to a task that sets no limit.  The models of lm-evaluation-harness use the same number."""
MOST_ROWS = {"cpu": 32}
"""Largest number of prompts that are answered in one batch, by platform."""
MORE_ROWS = 256
"""Largest number of prompts that are answered in one batch on platforms that `MOST_ROWS` does not name."""


class Likelihood(NamedTuple):
    """The likelihood of a continuation after its context."""

    nats: float
    """Natural logarithm of the probability of the scored tokens (`split_texts`)."""
    greedy: bool
    """Whether every scored token was the most likely token at its position."""
    cut: int
    """Number of tokens at the beginning of the context that were cut off because there was no room for them."""
    size: int
    """Number of UTF-8 bytes of the scored tokens.

    They are the bytes of the continuation and, if the first scored token begins within the context, the last bytes of the context
    (`split_texts`)."""


class _HarnessLM(LM):
    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError("No benchmark here asks for the likelihood of whole documents.")


class DecoderLM(_HarnessLM):
    """A trained model, with any kind of connection, in the interface of lm-evaluation-harness.

    The beginning of a prompt that is too long is cut off, and the number of tokens that were cut off is recorded.
    """

    def __init__(self, model: Trained, store: Responses, context: int = 0, batch_size: int = 0, max_gen_toks: int = 0):
        """Prepare the model for the benchmarks.  Programs are compiled later.

        Args:
          model: trained model from `load_trained`.
          store: store of responses, which holds the responses of earlier calls and gets the new ones.
          context: largest number of tokens of prompt and answer together.  0 means the sequence length of training.
          batch_size: number of sequences in a batch.  0 means as many as fit the memory.
          max_gen_toks: largest number of tokens of an answer, even if the task allows more.  0 means the limit of the task.
        """
        super().__init__()
        self.model, self.store, self.limit, self.batch_size = model, store, max_gen_toks, batch_size
        self.max_length = context or model.config.data.sequence_length
        self.label = f"{model.folder.name} step {model.step}"
        config = model.config.model
        self.scorer = Scorer(config, model.params, model.mesh, batch_size)
        self.generator = Generator(config, model.params, self.max_length, model.tokenizer.vocab_size, model.mesh)

    @property
    def compilations(self) -> int:
        """Number of programs that this model has compiled so far."""
        return self.scorer.compilations + len(self.generator.programs)

    def scored(self, requests: Sequence[Instance]) -> list[Likelihood]:
        """Return the likelihood of each request, a pair of texts (context, continuation), from the store if it has it.

        The continuations of one context in one item of a task are scored given the same tokens of the context (`split_texts`).  If
        the context leaves too little room for the longest continuation, its first tokens are cut off for all continuations.  The
        models of lm-evaluation-harness instead cut the context for each continuation separately.

        Raises:
          InputError: a continuation is empty, or has more tokens than the model may read (`max_length`).  It is raised before
            anything is computed.
        """
        items: dict[tuple[str | None, int | None, str], list[int]] = {}
        for index, request in enumerate(requests):
            items.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(index)
        answers: dict[int, tuple[str, int, int]] = {}
        work: dict[str, Scored] = {}
        cut: dict[str, int] = {}
        sizes = self.model.tokenizer.token_bytes
        for (task, doc_id, context), indices in items.items():
            texts = [requests[index].args[1] for index in indices]
            name = f"An answer of {task}, item {doc_id}," if task else "An answer"
            require(all(texts), f"{name} is empty and has nothing to score; leave its task out of --tasks.")
            given, scored = split_texts(self.model.tokenizer, context, texts)
            longest = max(map(len, scored))
            require(
                longest <= self.max_length,
                f"{name} has {longest} tokens to score and the context {self.max_length}; give a longer context with --context.",
            )
            kept = given[-(self.max_length + 1 - longest) :]
            for index, text, ids in zip(indices, texts, scored, strict=True):
                # The key has all that determines the tokens of a sequence: both texts and the numbers of kept and of scored tokens.
                key = self.store.key("loglikelihood", [context, text, len(kept), len(ids)])
                answers[index] = key, len(given) - len(kept), int(sizes[ids].sum())
                if key not in self.store.known:
                    work[key], cut[key] = Scored([*kept, *ids], len(ids)), len(given) - len(kept)
        keys = list(work)
        with Progress(self.label, "log-likelihoods", len(keys)) as progress:
            for index, score in self.scorer.scores(list(work.values())):
                key = keys[index]
                self.store.add(key, [-score.bits * LN2, score.greedy], cut[key])
                if progress.advance(1):
                    self.store.flush()
        self.store.flush()
        out = []
        for key, lost, size in (answers[index] for index in range(len(requests))):
            nats, greedy = self.store.known[key]["response"]
            out.append(Likelihood(nats, greedy, lost, size))
        return out

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (ln p, greedy) for each request, where p is the probability of the continuation after its context.

        `greedy` says whether every scored token was the most likely token at its position.
        """
        return [(answer.nats, answer.greedy) for answer in self.scored(requests)]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each request (prompt, settings), up to the first of the stop strings in its settings.

        Decoding is greedy unless the settings ask for random samples.

        Raises:
          InputError: the longest answer that a task allows leaves no room for a prompt.  It is raised before anything is computed.
        """
        keys = [self.store.key("generate", [*request.args, self.limit]) for request in requests]
        groups: dict[str, dict[str, list[int]]] = {}
        for key, request in zip(keys, requests, strict=True):
            prompt, settings = request.args
            if key not in self.store.known:
                max_new = self._max_new(settings)
                require(
                    max_new < self.max_length,
                    f"The context of {self.max_length} tokens is too short for {request.task_name}, whose prompts stand "
                    f"before an answer of up to {max_new}; give a longer context with --context, or shorter answers with "
                    "--max_gen_toks.",
                )
                ids = self.model.tokenizer.encode(prompt).tolist() or [self.model.tokenizer.end_of_document]
                groups.setdefault(json.dumps(settings, sort_keys=True), {})[key] = ids
        total = sum(map(len, groups.values()))
        with Progress(self.label, "answers", total) as progress:
            for settings, prompts in groups.items():
                self._answer(json.loads(settings), prompts, progress)
        return [self.store.known[key]["response"] for key in keys]

    def _answer(self, settings: Mapping[str, Any], prompts: dict[str, list[int]], progress: Progress) -> None:
        """Generate the answers to prompts with the same settings, longest prompts first, and add them to the store."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        max_new = self._max_new(settings)
        room = self.max_length - max_new
        drawn = settings.get("do_sample", False)
        sampling = Sampling(
            float(settings.get("temperature", 1.0)) if drawn else 0.0, float(settings.get("top_p", 1.0))
        )
        tokenizer, end = self.model.tokenizer, self.model.tokenizer.end_of_document

        def text_of(made: list[int]) -> tuple[str, bool]:
            """Return the text of the tokens `made` up to the first stop string or end of document, and whether one was found."""
            text = tokenizer.decode(made[: made.index(end)] if end in made else made)
            stops = [text.index(stop) for stop in until if stop in text]
            return (text[: min(stops)], True) if stops else (text, end in made)

        order = sorted(prompts, key=lambda key: -len(prompts[key]))
        while order:
            T = bucket(min(len(prompts[order[0]]), room))
            batch = [key for key in order[: self._rows(T)] if bucket(min(len(prompts[key]), room)) == T]
            order = order[len(batch) :]
            kept = [prompts[key][-room:] for key in batch]
            count = len(kept)
            # An incomplete batch is filled with copies of a prompt up to one of a few sizes, because each size needs a compilation.
            kept += [kept[-1]] * (min(self._rows(T), bucket(count, FEW_ROWS)) - count)

            def ended(row: int, made: list[int], count: int = count) -> bool:
                return row >= count or text_of(made)[1]

            made = self.generator.generate(kept, max_new, sampling, ended)
            for key, ids in zip(batch, made, strict=False):
                self.store.add(key, text_of(ids)[0], max(0, len(prompts[key]) - room))
            self.store.flush()
            progress.advance(count)

    def _max_new(self, settings: Mapping[str, Any]) -> int:
        """Return the largest number of tokens of an answer to a request with these settings of lm-evaluation-harness."""
        asked = int(settings.get("max_gen_toks", MAX_GEN_TOKS))
        return min(asked, self.limit or asked)

    def _rows(self, T: int) -> int:
        """Return the number of prompts of T tokens that are answered in one batch.

        Unless a batch size is set, it is a power of two with which keys, values and attention scores take at most half of
        `memory_budget`.
        """
        if self.batch_size:
            return self.batch_size
        config, S = self.model.config.model, bucket(self.max_length)
        cache = jax.eval_shape(lambda: empty_cache(config, 1, S).kept)
        each = 3 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) + 8 * config.num_heads * T * T
        most = MOST_ROWS.get(jax.devices()[0].platform, MORE_ROWS)
        fit = max(1, memory_budget() // 2 // each)
        return min(most, 1 << (fit.bit_length() - 1))


class GoldLM(_HarnessLM):
    """A model that always gives the right ("gold") answer.

    Its score is the highest score that the data, prompts and metrics of a benchmark allow.
    """

    def __init__(self, gold: Callable[[str, Mapping[str, Any]], Any]):
        """Make the model from a function `gold` of a task's name and an item, which returns the right answer.

        In multiple choice `gold` returns the index of the right choice.
        """
        super().__init__()
        self.gold = gold

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Return (ln p, greedy) for each choice: (0, True) for the right choice, (-1e3, False) for every wrong choice."""
        return [(0.0, True) if r.idx == self.gold(r.task_name, r.doc) else (-1e3, False) for r in requests]

    def generate_until(self, requests) -> list[str]:
        """Return the answer that the function `gold` gives for the item of each request.  Prompts are not read."""
        return [self.gold(r.task_name, r.doc) for r in requests]
