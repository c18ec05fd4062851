"""lm-evaluation-harness's view of a trained model (`DecoderLM`), and of one that knows the answers (`GoldLM`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows

from mhc_jax.errors import require
from mhc_jax.evaluation.scoring import FEW_ROWS, LN2, Scored, Scorer, memory_budget, split_texts
from mhc_jax.evaluation.store import Responses
from mhc_jax.generation import Generator, Sampling, bucket
from mhc_jax.kv_cache import empty_cache
from mhc_jax.runs.progress import Progress
from mhc_jax.runs.trained import Trained

MAX_GEN_TOKS = 256
"""Tokens of an answer where the task names no limit, as in lm-eval's own models."""
MOST_ROWS = {"cpu": 32}
MORE_ROWS = 256


class Likelihood(NamedTuple):
    """Of a continuation after its context."""

    nats: float
    """ln of the probability of the scored tokens."""
    greedy: bool
    """Whether each of them was the most likely one."""
    cut: int
    """Tokens that the context lost at its beginning."""
    size: int
    """Bytes of the text that was scored: those of the continuation, and of the context what `split_texts` adds to it."""


@register_model("mhc_jax")
class DecoderLM(LM):
    """A checkpoint of any connection.  Prompts that do not fit lose their beginning, which is counted."""

    def __init__(self, model: Trained, store: Responses, context: int = 0, batch_size: int = 0, max_gen_toks: int = 0):
        """Nothing is compiled yet.

        Args:
          model: of `load_trained`.
          store: where responses go, and come from.
          context: tokens of prompt and answer; 0: the sequence length of training.
          batch_size: rows of a batch; 0: as many as fit.
          max_gen_toks: tokens of an answer at most, whatever the task says; 0: what it says.
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
        """Programs compiled so far."""
        return self.scorer.compilations + len(self.generator.programs)

    def scored(self, requests: Sequence[Instance]) -> list[Likelihood]:
        """Likelihoods of (context, continuation), computed where the store does not have them.

        The continuations of one context in one item share their conditioning tokens (`split_texts`).  A context that does
        not fit loses its beginning until the longest continuation fits, for all of them alike; lm-evaluation-harness's own
        models cut each to its own length.

        Raises:
          InputError: a continuation that is empty or longer than the context; before anything is computed.
        """
        items: dict[tuple[str | None, int | None, str], list[int]] = {}
        for index, request in enumerate(requests):
            items.setdefault((request.task_name, request.doc_id, request.args[0]), []).append(index)
        found: dict[int, tuple[str, int, int]] = {}
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
                f"{name} has {longest} tokens to score and the context {self.max_length}; give a longer one with --context.",
            )
            kept = given[-(self.max_length + 1 - longest) :]
            for index, text, ids in zip(indices, texts, scored, strict=True):
                # With the text, these two lengths say which tokens were scored after which.
                key = self.store.key("loglikelihood", [context, text, len(kept), len(ids)])
                found[index] = key, len(given) - len(kept), int(sizes[ids].sum())
                if key not in self.store.known:
                    work[key], cut[key] = Scored([*kept, *ids], len(ids)), len(given) - len(kept)
        names = list(work)
        with Progress(self.label, "log-likelihoods", len(names)) as progress:
            for index, score in self.scorer.scores(list(work.values())):
                name = names[index]
                self.store.add(name, [-score.bits * LN2, score.greedy], cut[name])
                if progress.advance(1):
                    self.store.flush()
        self.store.flush()
        out = []
        for key, lost, size in (found[index] for index in range(len(requests))):
            nats, greedy = self.store.known[key]["response"]
            out.append(Likelihood(nats, greedy, lost, size))
        return out

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p, greedy) of each continuation after its context."""
        return [(own.nats, own.greedy) for own in self.scored(requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each text in nats, windows of the context's length side by side, each token predicted once."""
        out = []
        for request in requests:
            (text,) = request.args
            key = self.store.key("rolling", text)
            if key not in self.store.known:
                windows = get_rolling_token_windows(
                    self.model.tokenizer.encode(text).tolist(), self.model.tokenizer.end_of_document, self.max_length, 1
                )
                # A window is (inputs, predicted), and the inputs end with all predicted tokens but the last.
                sequences = [Scored([*given, predicted[-1]], len(predicted)) for given, predicted in windows]
                bits = sum(score.bits for _, score in self.scorer.scores(sequences))
                self.store.add(key, -bits * LN2)
                self.store.flush()
            out.append(self.store.known[key]["response"])
        return out

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string, greedy unless the task asks for samples.

        Raises:
          InputError: an answer that leaves no room for a prompt; before anything is computed.
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
                    f"before an answer of up to {max_new}; give a longer one with --context, or shorter answers with "
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
        """Generate for prompts that share their settings, the longest first."""
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
            """The answer up to the first stop, and whether there was one."""
            text = tokenizer.decode(made[: made.index(end)] if end in made else made)
            stops = [text.index(stop) for stop in until if stop in text]
            return (text[: min(stops)], True) if stops else (text, end in made)

        order = sorted(prompts, key=lambda key: -len(prompts[key]))
        while order:
            T = bucket(min(len(prompts[order[0]]), room))
            here = [key for key in order[: self._rows(T)] if bucket(min(len(prompts[key]), room)) == T]
            order = order[len(here) :]
            kept = [prompts[key][-room:] for key in here]
            count = len(kept)
            # A batch that is not full is filled, so that it needs few programs of its own.
            kept += [kept[-1]] * (min(self._rows(T), bucket(count, FEW_ROWS)) - count)

            def ended(row: int, made: list[int], count: int = count) -> bool:
                return row >= count or text_of(made)[1]

            made = self.generator.generate(kept, max_new, sampling, ended)
            for key, ids in zip(here, made, strict=False):
                self.store.add(key, text_of(ids)[0], max(0, len(prompts[key]) - room))
            self.store.flush()
            progress.advance(count)

    def _max_new(self, settings: Mapping[str, Any]) -> int:
        """Tokens of an answer at most."""
        asked = int(settings.get("max_gen_toks", MAX_GEN_TOKS))
        return min(asked, self.limit or asked)

    def _rows(self, T: int) -> int:
        """Prompts of T tokens at a time: a power of two whose caches and scores take half the memory there is at most."""
        if self.batch_size:
            return self.batch_size
        config, S = self.model.config.model, bucket(self.max_length)
        cache = jax.eval_shape(lambda: empty_cache(config, 1, S).kept)
        each = 3 * sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)) + 8 * config.num_heads * T * T
        most = MOST_ROWS.get(jax.devices()[0].platform, MORE_ROWS)
        fit = max(1, memory_budget() // 2 // each)
        return min(most, 1 << (fit.bit_length() - 1))


class GoldLM(LM):
    """Answers with the gold text: what the plumbing from data to metric lets a perfect model score."""

    def __init__(self, gold: Callable[[str, Mapping[str, Any]], Any]):
        """`gold`: (task, item) -> the answer, or for multiple choice the index of the choice."""
        super().__init__()
        self.gold = gold

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """0 for the right choice, -1e3 for the others."""
        return [(0.0, True) if r.idx == self.gold(r.task_name, r.doc) else (-1e3, False) for r in requests]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Certainty."""
        return [0.0] * len(requests)

    def generate_until(self, requests) -> list[str]:
        """The answer."""
        return [self.gold(r.task_name, r.doc) for r in requests]
