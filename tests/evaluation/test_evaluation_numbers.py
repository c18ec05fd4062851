"""Each number of the evaluation equals an independent one: float64 by hand, SciPy, lm-eval, or a count of bytes."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_evaluation import RESIDUAL, harness, sample, shapes, train_bpe
from tokenizers import pre_tokenizers

from mhc_jax.config import DataConfig, ExperimentConfig
from mhc_jax.data import ByteTokenizer
from mhc_jax.data.tokenizers import BPETokenizer
from mhc_jax.errors import InputError
from mhc_jax.evaluation import table
from mhc_jax.evaluation.run import summarise
from mhc_jax.evaluation.scoring import Scored, Scorer, split_texts
from mhc_jax.evaluation.store import Responses
from mhc_jax.runs.trained import Trained, beyond_training

QUESTION = "Which one is it?\nA. gate\nB. norm\nC. stream\nD. width\nAnswer:"
LETTERS = [" A", " B", " C", " D"]


def bpe(split_words: bool) -> BPETokenizer:
    """Byte-level BPE on letters after `Answer:`; without word splitting ": " and what follows merge into one token."""
    texts = [f"Answer:{letter}\n\n" for letter in LETTERS[:3]]
    return BPETokenizer(train_bpe(texts, split_words).to_str().encode(), "test")


def texts_of(tokenizer, ids) -> list[bytes]:
    """Return the bytes of each token of a byte-level BPE, whose entries write a byte as one character."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = [b for b in range(256) if chr(b) not in alphabet]
    byte = {chr(b): b for b in range(256) if b not in others} | {chr(256 + i): b for i, b in enumerate(others)}
    return [bytes(byte[c] for c in tokenizer._backend.id_to_token(i)) for i in ids]


def bigram(tokenizer):
    """Parameters whose logits depend on the last token alone, and their log-probabilities [before, after] in float64."""
    config = dataclasses.replace(RESIDUAL, vocab_size=tokenizer.vocab_size)
    random = np.random.default_rng(3)
    zero = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes(config))  # every branch writes zero
    embedding = random.normal(size=(config.vocab_size, config.width)).astype(np.float32)
    weight = random.normal(size=config.width).astype(np.float32)
    unembedding = random.normal(size=(config.width, config.vocab_size)).astype(np.float32)
    params = {**zero, "embedding": embedding, "final_norm": {"weight": weight}, "unembedding": unembedding}
    x = embedding.astype(np.float64)
    h = x / np.sqrt((x * x).mean(-1, keepdims=True)) * weight
    logits = h @ unembedding.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return config, jax.tree.map(jnp.asarray, params), logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def harness_model(tmp_path, tokenizer, context):
    """Return a bigram model as the harness sees it, and its log-probabilities."""
    from mhc_jax.evaluation.harness import DecoderLM

    config, params, logp = bigram(tokenizer)
    whole = ExperimentConfig(model=config, data=DataConfig(sequence_length=16))
    store = Responses(tmp_path / "responses.jsonl", {})
    return DecoderLM(Trained(tmp_path, 0, whole, params, tokenizer, None), store, context), logp


def item(context, continuations, doc_id=0):
    from lm_eval.api.instance import Instance

    about = ("invented", doc_id, 1)
    return [Instance("loglikelihood", {}, (context, text), i, about) for i, text in enumerate(continuations)]


def test_bits_are_those_of_a_float64_bigram():
    config, params, logp = bigram(ByteTokenizer())
    random = np.random.default_rng(4)
    sequences = [Scored(random.integers(0, 264, n).tolist(), k) for n, k in ((30, 1), (30, 29), (9, 4))]
    likely = list(itertools.accumulate(range(8), lambda before, _: int(logp[before].argmax()), initial=3))
    wrong = [*likely[:-2], (likely[-2] + 1) % 264, likely[-1]]
    sequences += [Scored(likely, 8), Scored([7, *likely], 8), Scored(wrong, 2)]
    found = dict(Scorer(config, params).scores(sequences))
    for index, (ids, k) in enumerate(sequences):
        pairs = list(itertools.pairwise(ids))[-k:]
        assert found[index].bits == pytest.approx(-sum(logp[a, b] for a, b in pairs) / math.log(2), rel=2e-6)
        assert found[index].greedy == (3 <= index <= 4) == all(logp[a].argmax() == b for a, b in pairs)


def test_tokens_that_straddle_are_scored_after_the_same_text_for_every_choice():
    tokenizer = bpe(split_words=False)
    given, scored = split_texts(tokenizer, QUESTION, LETTERS)
    before = b"".join(texts_of(tokenizer, given))
    assert QUESTION.encode().startswith(before)
    assert len(before) < len(QUESTION), "a token of this text straddles the boundary"
    for letter, ids in zip(LETTERS, scored, strict=True):
        assert [*given, *ids] == tokenizer.encode(QUESTION + letter).tolist()
        assert before + b"".join(texts_of(tokenizer, ids)) == (QUESTION + letter).encode()
    alone = [len(split_texts(tokenizer, QUESTION, [letter])[0]) for letter in LETTERS]
    assert len(given) == min(alone), "no longer than the shortest of them, and no shorter"


@pytest.mark.parametrize(
    ("context", "continuations", "given", "scored"),
    [
        ("ab", ["cd"], "ab", ["cd"]),
        ("ab", [" c", " cd"], "ab", [" c", " cd"]),  # one is the beginning of the other
        ("ab ", ["c", " d"], "ab", [" c", "  d"]),  # white space of the context is scored
        ("ab\n", ["ab"], "ab", ["\nab"]),
        ("ab", ["  c"], "ab", ["  c"]),
        ("ab", [" "], "ab", [" "]),
        ("ä", ["ö"], "ä", ["ö"]),
    ],
)
def test_where_bytes_are_split(context, continuations, given, scored):
    found = split_texts(ByteTokenizer(), context, continuations)
    assert found == (list(given.encode()), [list(text.encode()) for text in scored])


def test_without_a_context_the_end_of_a_document_conditions():
    tokenizer = bpe(split_words=False)
    for context, texts in (("", ["ab"]), (" ", ["a", "b"]), ("Answer:", LETTERS)):
        given, scored = split_texts(tokenizer, context, texts)
        assert given == [tokenizer.end_of_document]
        assert [tokenizer.decode(ids) for ids in scored] == [context + text for text in texts]


@harness
def test_the_split_is_lm_evals_where_the_context_begins_every_encoding():
    from lm_eval.api.model import TemplateLM

    random, compared = np.random.default_rng(5), 0
    pieces = ["Answer:", " A", "A", " stream", "ing", "\n", " ", "ä", ": B", "!"]
    for tokenizer in (ByteTokenizer(), bpe(True), bpe(False)):

        class Harness(TemplateLM):
            eot_token_id = tokenizer.end_of_document
            loglikelihood_rolling = generate_until = _loglikelihood_tokens = lambda self, requests: []

            def tok_encode(self, string, add_special_tokens=None, tokenizer=tokenizer, **_):
                return tokenizer.encode(string).tolist()

        for _ in range(200):
            context = "".join(random.choice(pieces, 5))
            texts = ["".join(random.choice(pieces, random.integers(1, 4))) for _ in range(3)]
            pairs = [Harness()._encode_pair(context, text) for text in texts]
            whole = [tokenizer.encode(context + text).tolist() for text in texts]
            if [[*a, *b] for a, b in pairs] != whole or not pairs[0][0]:
                continue  # lm-eval scores other tokens than those of the whole text, or after nothing
            compared += 1
            assert split_texts(tokenizer, context, texts) == (pairs[0][0], [own for _, own in pairs])
    assert compared > 300


@harness
@pytest.mark.parametrize("split_words", [True, False])
def test_choices_are_scored_as_by_hand_in_float64(tmp_path, split_words):
    tokenizer = bpe(split_words)
    lm, logp = harness_model(tmp_path, tokenizer, 80)
    requests = item(QUESTION, [*LETTERS, " AB"])
    found = lm.scored(requests)
    assert lm.loglikelihood(requests) == [(own.nats, own.greedy) for own in found]
    whole = [tokenizer.encode("".join(r.args)).tolist() for r in requests]
    first = np.cumsum([len(text) for text in texts_of(tokenizer, whole[0])])
    alike = [i for i in range(len(first)) if len({tuple(ids[: i + 1]) for ids in whole}) == 1]
    kept = max(i + 1 for i in alike if first[i] <= len(QUESTION))
    assert (first[kept - 1] < len(QUESTION)) == (not split_words), "a token straddles"
    for own, ids, request in zip(found, whole, requests, strict=True):
        expected = sum(logp[a, b] for a, b in zip(ids[kept - 1 :], ids[kept:], strict=False))
        assert own.nats == pytest.approx(expected, rel=1e-5)
        assert own.size == len("".join(request.args)) - first[kept - 1]
        assert own.cut == 0
    [spaced] = lm.scored(item("Q: 1 + 1\nA: ", ["2"], doc_id=1))
    straddling = "" if split_words else ":"
    assert spaced.size == len(straddling + " 2"), "the space that the context loses is scored, and counted"
    lm.store.close()


@harness
def test_a_context_that_is_cut_is_cut_alike_for_every_choice(tmp_path):
    lm, logp = harness_model(tmp_path, ByteTokenizer(), 10)
    short, long = lm.scored(item("x" * 20, ["yy", "z" * 6]))
    assert (short.cut, long.cut) == (15, 15), "five bytes and six are eleven, of which the last is no input"
    assert short.nats == pytest.approx(logp[ord("x"), ord("y")] + logp[ord("y"), ord("y")], rel=1e-5)
    lm.store.close()


@harness
def test_answers_that_cannot_be_scored_are_refused_by_task(tmp_path):
    from lm_eval.api.instance import Instance

    lm, _ = harness_model(tmp_path, ByteTokenizer(), 10)
    for number, answer, wrong in ((0, "d" * 11, "has 11 tokens to score and the context 10"), (7, "", "is empty")):
        with pytest.raises(InputError, match=f"An answer of invented, item {number}, {wrong}"):
            lm.scored(item("ab", ["c", answer], doc_id=number))
    request = Instance("generate_until", {}, ("ab", {"until": ["."]}), 0, ("reasoned", 0, 1))
    with pytest.raises(InputError, match="The context of 10 tokens is too short for reasoned"):
        lm.generate_until([request])
    assert lm.compilations == 0
    lm.store.close()


def samples(count, seed):
    """Return `count` items with random scores, bits and bytes."""
    random = np.random.default_rng(seed)
    rows = zip(random.integers(0, 2, count), random.uniform(5, 30, count), random.integers(2, 9, count), strict=True)
    return [sample(i, float(a), float(b), int(c)) for i, (a, b, c) in enumerate(rows)]


def test_differences_and_intervals_are_those_of_resampled_items():
    one, base = samples(40, 1), samples(40, 2)
    found = table.paired_differences(one, base, "piqa")
    a, s, b, t = (np.asarray([x[k] for x in own]) for own in (one, base) for k in ("gold_bits", "gold_bytes"))
    assert found["bits"] == pytest.approx(a.sum() / s.sum() - b.sum() / t.sum(), rel=1e-12), "each over its own bytes"
    assert (found["items"], found["bits_items"]) == (40, 40)
    drawn = np.random.default_rng(9).integers(0, 40, (20000, 40))
    a, s, b, t = (values[drawn].sum(1) for values in (a, s, b, t))
    scores = np.asarray([x["score"] - y["score"] for x, y in zip(one, base, strict=True)])
    for key, resampled in (("bits_interval", a / s - b / t), ("score_interval", scores[drawn].mean(1))):
        expected = np.quantile(resampled, [0.025, 0.975])
        np.testing.assert_allclose(found[key], expected, atol=0.06 * np.ptp(found[key]))


def test_one_item_has_no_interval():
    found = table.paired_differences([sample(0, 1.0, 3.0, 2)], [sample(0, 0.0, 4.0, 2)], "piqa")
    assert (found["score"], found["score_interval"]) == (1.0, None)
    assert (found["bits"], found["bits_interval"]) == (-0.5, None)
    two = table.paired_differences(samples(2, 1), samples(2, 2), "piqa")
    assert two["bits_interval"][0] < two["bits_interval"][1]


def test_coverage_of_the_fewest_bold_items():
    random = np.random.default_rng(6)
    for items, stated in ((table.FEWEST_BOLD, 0.936), (5, 0.846)):
        within = stats.norm.ppf(0.975) * math.sqrt((items - 1) / items)
        assert 1 - 2 * stats.t.sf(within, items - 1) == pytest.approx(stated, abs=1e-3)
    covered = [low <= 0 <= high for low, high in (table.bootstrap(np.mean, random.normal(size=30)) for _ in range(400))]
    assert np.mean(covered) == pytest.approx(0.936, abs=3 * math.sqrt(0.936 * 0.064 / 400))


def result(count, context=64, trained=64, gain=0.0, cut=0, without_bits=0):
    """Return a result of `count` items, the last `without_bits` of them without bits; `gain` improves every item."""
    own = [{**s, "score": min(1.0, s["score"] + gain), "gold_bits": s["gold_bits"] - gain} for s in samples(count, 1)]
    for one in own[count - without_bits :]:
        one |= {"gold_bits": None, "gold_bytes": None}
    benchmark = {"metric": "acc", "score": 0.5, "stderr": 0.1, "items": count, "tasks": 1, "shots": 0, "paper_shots": 5}
    benchmark |= {"truncated": cut, "gold_bits_per_byte": 2.5}
    out = {
        "checkpoint": "a",
        "connection": "residual",
        "benchmarks": {"piqa": benchmark},
        "samples": own,
        "folder": "f",
    }
    settings = {"context": context, "trained_context": trained}
    return {**out, "settings": settings, "wall_clock_s": 1.0, "compilations": 2}


def cells(*results):
    """Return the last row of the table by its headings."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.comparison(results).splitlines()]
    return dict(zip(lines[0], lines[-1], strict=True))


def joined(*results):
    return "".join(cells(*results).values())


def test_what_is_bold():
    enough = cells(result(30), result(30, gain=1.0))
    assert (enough["difference"][:3], enough["difference (points)"][:3]) == ("**-", "**+")
    assert "*" not in joined(result(30), result(30, gain=1.0, cut=3))
    assert cells(result(30), result(30, cut=3))["cut"] == "3"
    assert "*" not in joined(result(30, cut=3), result(30, gain=1.0)), "the first one's prompts"
    few_bits = cells(result(30), result(30, gain=1.0, without_bits=1))
    assert (few_bits["difference"][0], few_bits["difference (points)"][:3]) == ("-", "**+"), "29 items have bits"
    assert not set("*[") & set(joined(result(1), result(1, gain=1.0)))
    assert cells(result(1), result(1, gain=1.0))["difference"].startswith("-")
    for count, base, own in ((29, 64, 64), (30, 64, 512), (30, 512, 64)):  # too few, and contexts beyond training
        both = result(count, base), result(count, own, gain=1.0)
        assert "*" not in joined(*both)
        assert "[" in cells(*both)["difference"]
    assert cells(result(9), result(9, 512))["context"] == "512 (trained: 64)"
    assert (enough["context"], enough["shots"], enough["cut"], enough["items"]) == ("64", "0 (paper: 5)", "0", "30")
    assert (enough["score (%)"], enough["gold bits/byte"]) == ("50.0 ± 10.0", "2.500")


def test_a_context_beyond_training_is_told():
    assert beyond_training("a", 64, 64) == ""
    assert "a was trained on sequences of 64 tokens and reads up to 65 here" in beyond_training("a", 64, 65)
    assert len(table.remarks(result(3, cut=3))) == 2
    assert beyond_training("a", 64, 512) in table.remarks(result(3, 512))


def test_a_benchmark_is_the_mean_of_its_items():
    """The mean of five items of one task and one of another, by hand."""
    scores, bits, sizes = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0), (8.0, 4.0, 6.0, 2.0, None, 5.0), (2, 4, 1, 3, None, 5)
    rows = enumerate(zip(scores, bits, sizes, strict=True))
    own = [sample(i, a, b, c, "other" if i == 5 else "piqa", truncated=a == 0) for i, (a, b, c) in rows]
    found = summarise(own, {"piqa": 0, "other": 0})["piqa"]
    means = [found[key] for key in ("score", "stderr", "gold_bits_per_byte")]
    assert means == pytest.approx([3 / 6, math.sqrt(6 * 0.5**2 / 5) / math.sqrt(6), 25 / 15])
    assert (found["items"], found["truncated"], found["tasks"]) == (6, 3, 2)
    assert summarise(own[:1], {"piqa": 0})["piqa"]["stderr"] is None


@harness
def test_scores_and_their_errors_are_lm_evals(tmp_path):
    from lm_eval.api.metrics import aggregate_subtask_metrics, mean_stderr

    own = samples(13, 1) + [{**s, "task": "other"} for s in samples(40, 3)]
    found = summarise(own, {"piqa": 0, "other": 0})["piqa"]
    each = [[s["score"] for s in own if s["task"] == task] for task in ("piqa", "other")]
    weighted = aggregate_subtask_metrics([np.mean(e) for e in each], [13, 40], weight_by_size=True)
    assert found["score"] == pytest.approx(weighted, rel=1e-12), "by items, as lm-eval's mmlu, bbh and minerva_math"
    assert found["stderr"] == pytest.approx(mean_stderr(each[0] + each[1]), rel=1e-12)
