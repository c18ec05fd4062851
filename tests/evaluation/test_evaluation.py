"""Scores equal a plain forward pass, responses survive a stop, and benchmarks run end to end where lm-eval is installed."""

import importlib.util
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny_runs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhc_jax import connections
from mhc_jax.config import MeshConfig, ModelConfig
from mhc_jax.data.tokenizers import END
from mhc_jax.errors import InputError
from mhc_jax.evaluation import scoring, table, tasks
from mhc_jax.evaluation.run import evaluate, gold_check, import_harness
from mhc_jax.evaluation.scoring import Scored, Scorer
from mhc_jax.evaluation.store import Responses
from mhc_jax.loop import train
from mhc_jax.model import Decoder
from mhc_jax.parallel.sharding import make_mesh, state_shardings
from mhc_jax.runs.lock import Busy
from mhc_jax.runs.metrics import plain

SIZES = {"vocab_size": 264, "width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 16}
RESIDUAL, MHC = (ModelConfig(**SIZES, connection=connections.parse(kind)) for kind in ("residual", "mhc:t_max=2"))
WITHOUT = "lm-evaluation-harness is not installed: pip install 'lm-eval[math]==0.4.13'"
harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason=WITHOUT)


def quiet_harness(test):
    """For tests through lm-eval, whose dependencies warn."""
    return harness(pytest.mark.filterwarnings("ignore")(test))


def shapes(config):
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def random_params(config):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(0.3 * random.normal(size=a.shape), a.dtype), shapes(config))


def train_bpe(texts, split_words):
    """Train byte-level BPE on `texts`, nine times each; without word splitting its tokens reach over spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text for text in texts for _ in range(9)], trainer=trainer)
    return backend


def test_scores_are_those_of_a_plain_forward_pass_whatever_the_batch_and_padding():
    params, random = random_params(MHC), np.random.default_rng(1)
    sizes = ((23, 1), (23, 7), (40, 39), (40, 2), (23, 22))
    sequences = [Scored(random.integers(0, 264, n).tolist(), k) for n, k in sizes]
    sequences.append(sequences[1])
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(Decoder(MHC).apply({"params": params}, tokens)[0]))
    expected = []
    for ids, k in sequences:
        logp = np.asarray(forward(jnp.asarray([ids[:-1]])))[0]  # unpadded, alone
        own = logp[np.arange(len(ids) - 1), ids[1:]][-k:]
        expected.append((float(own.astype(np.float64).sum()), bool((logp.argmax(-1)[-k:] == ids[-k:]).all())))
    for batch_size in (0, 2):
        scorer = Scorer(MHC, params, batch_size=batch_size)
        found = dict(scorer.scores(sequences))
        assert scorer.compilations == 2, "one program a bucket: 32 and 64 tokens"
        for index, (nats, greedy) in enumerate(expected):
            assert abs(-found[index].bits * math.log(2) - nats) <= 1e-5 * max(1.0, abs(nats))
            assert found[index].greedy == greedy


def test_a_program_that_does_not_fit_is_made_for_fewer_rows(monkeypatch):
    random, params = np.random.default_rng(0), random_params(RESIDUAL)
    sequences = [Scored(random.integers(0, 264, 20).tolist(), 3) for _ in range(40)]
    plenty = dict(Scorer(RESIDUAL, params).scores(sequences))
    estimates = iter([100, 49])  # of 64 rows, which do not fit, then of 32
    monkeypatch.setattr(scoring.counts, "compiled_memory", lambda _: next(estimates))
    monkeypatch.setattr(scoring, "memory_budget", lambda: 50)
    scorer = Scorer(RESIDUAL, params)
    tight = dict(scorer.scores(sequences))
    assert list(scorer.programs) == [(32, 32)], "the 8 that are left take the same program"
    assert scorer.compilations == 2
    assert [tight[i].greedy for i in range(40)] == [plenty[i].greedy for i in range(40)]
    np.testing.assert_allclose([tight[i].bits for i in range(40)], [plenty[i].bits for i in range(40)], rtol=1e-6)


def test_responses_survive_a_kill_and_belong_to_one_identity(tmp_path):
    path = tmp_path / "folder" / "responses.jsonl"
    store = Responses(path, {"step": 3})
    key = store.key("loglikelihood", ["a", " b"])
    store.add(key, [-1.5, True], 4)
    store.add(store.key("generate", ["x", {}]), "y")
    store.close()
    path.write_bytes(path.read_bytes()[:-9])  # killed in the middle of a line
    again = Responses(path, {"step": 3})
    assert again.known == {key: {"key": key, "response": [-1.5, True], "truncated": 4}}
    again.add(again.key("generate", ["x", {}]), "z")
    again.close()
    last = Responses(path, {"step": 3})
    assert len(last.known) == 2
    with pytest.raises(Busy, match="folder is in use: process"):
        Responses(path, {"step": 4})
    last.close()
    other = Responses(path, {"step": 4})
    assert other.key("loglikelihood", ["a", " b"]) != key
    other.close()


def test_damaged_responses_are_told_and_computed_again(tmp_path, capsys):
    path = tmp_path / "responses.jsonl"
    whole = {"key": "a", "response": [-1.5, True], "truncated": 0}
    damaged = [b"null", b"{}", b"\xff", b"[" * 200_000, b"\0" * 100]
    path.write_bytes(b"\n".join([*damaged, json.dumps(whole).encode(), b""]))
    store = Responses(path, {})
    assert store.known == {"a": whole}
    assert f"5 lines of {path} are damaged" in capsys.readouterr().err
    store.close()
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="for responses"):
        Responses(path, {})


@pytest.mark.slow
def test_scores_on_a_mesh():
    params, random = random_params(MHC), np.random.default_rng(1)
    sequences = [Scored(random.integers(0, 264, n).tolist(), 3) for n in (5, 20, 30)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh is not None
    placed = jax.device_put(params, state_shardings(mesh, params))
    expected, found = (dict(s.scores(sequences)) for s in (Scorer(MHC, params), Scorer(MHC, placed, mesh)))
    np.testing.assert_allclose([found[i].bits for i in range(3)], [expected[i].bits for i in range(3)], rtol=1e-5)


def sample(doc_id, score, bits, size=2, task="piqa", truncated=False):
    out = {"benchmark": "piqa", "task": task, "doc_id": doc_id, "score": score, "truncated": truncated}
    return {**out, "gold_bits": bits, "gold_bytes": size}


def test_paired_differences_are_over_common_items():
    one = [sample(i, float(i % 2 == 0), 3.0 + i, 2) for i in range(6)]
    base = [sample(i, 0.0, 4.0 + i, 2) for i in range(4)] + [sample(9, 1.0, 0.0)]
    base += [sample(i, 1.0, 9.0, 2, "other") for i in range(6)]
    found = table.paired_differences(one, base, "piqa")
    assert (found["items"], found["score"]) == (4, 0.5)
    assert found["bits"] == -0.5  # four times -1 bit over eight bytes
    assert found["bits_interval"] == (-0.5, -0.5), "the same difference in every item"
    low, high = found["score_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert table.paired_differences(one, [], "piqa") == {"items": 0}


def test_names_of_tasks(tmp_path):
    assert list(tasks.choose(["paper"])) == ["bbh", "drop", "gsm8k", "hellaswag", "math", "mmlu", "piqa", "triviaqa"]
    chosen = tasks.choose(["mmlu_anatomy", "bbh_direct", "piqa"])
    assert (chosen["mmlu"], len(chosen["bbh_direct"]), chosen["piqa"]) == (["mmlu_anatomy"], 27, ["piqa"])
    assert sum(map(len, tasks.choose(["paper"]).values())) == 27 + 57 + 7 + 5
    for wrong, right in (("helaswag", "hellaswag"), ("mmlu_anatomi", "mmlu_anatomy")):
        with pytest.raises(InputError, match=f"Did you mean '{right}'"):
            tasks.choose([wrong])
    with pytest.raises(InputError, match=r"piqa\.jsonl is missing, which piqa reads"):
        tasks.harness_tasks(tasks.choose(["piqa"]), tmp_path)
    [group] = tasks.harness_tasks(tasks.choose(["paper"]), None)
    shots = {member["task"]: member.get("num_fewshot") for member in group["task"]}
    for name in ("hellaswag.jsonl.gz", "triviaqa.jsonl", "drop.jsonl", "drop_fewshot.jsonl"):
        (tmp_path / name).touch()
    [group] = tasks.harness_tasks(tasks.choose(["hellaswag", "triviaqa", "drop"]), tmp_path)
    assert [member["num_fewshot"] for member in group["task"]] == [0, 0, 3], "examples are of a split that is there"
    assert (shots["hellaswag"], shots["triviaqa"], shots["mmlu_virology"], shots["drop"]) == (10, 5, 5, 3)


_ANSWER = {"number": "7", "date": {"day": "", "month": "", "year": ""}, "spans": [], "worker_id": "", "hit_id": ""}
DROP = {"section_id": "", "query_id": "", "passage": "There are 7.", "answer": _ANSWER}
DROP["validated_answers"] = {name: [] for name in _ANSWER}
PIQA = {"sol1": "add a gate", "sol2": "drop the norm of it"}
MMLU = {"subject": "anatomy", "choices": list("abcd")}
ITEMS = {
    "piqa.jsonl": [{**PIQA, "goal": f"Make stream {i} wide", "label": i % 2} for i in range(5)],
    "mmlu_dev/anatomy.jsonl": [{**MMLU, "question": f"Which was {i}?", "answer": i % 4} for i in range(5)],
    "bbh/navigate.jsonl": [{"input": f"Turn {i} times. Do you return?", "target": "No"} for i in range(3)],
    "mmlu/anatomy.jsonl": [{**MMLU, "question": f"Which is {i}?", "answer": 0} for i in range(4)],
    "drop_fewshot.jsonl": [{**DROP, "question": f"How many gates are {name}?"} for name in ("red", "wet", "new")],
    "drop.jsonl": [{**DROP, "question": f"How many norms are {name}?"} for name in ("red", "wet", "new")],
    "gsm8k.jsonl": [{"question": f"What is {i} + 1?", "answer": f"It is one more.\n#### {i + 1}"} for i in range(3)],
}
"""Invented: the real items are not ours to ship."""


@pytest.fixture
def items(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name, entries in ITEMS.items():
        path = tmp_path / "items" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the harness's own dependencies
        import_harness(True)
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
        yield tmp_path / "items"


@quiet_harness
def test_gold_answers_score_one(items):
    found = gold_check(["bbh_cot_fewshot_navigate", "gsm8k", "piqa"], items)["benchmarks"]
    assert {name: own["score"] for name, own in found.items()} == {"bbh": 1.0, "gsm8k": 1.0, "piqa": 1.0}
    assert [own["items"] for own in found.values()] == [3, 3, 5]


@quiet_harness
def test_a_run_is_evaluated_and_a_stopped_evaluation_goes_on(items, tmp_path):
    run, chosen = tmp_path / "run", ["piqa", "gsm8k"]
    train(tiny_runs.tiny(tiny_runs.write_text(tmp_path / "text.txt"), "residual", train={"steps": 3}), run)
    first = evaluate(run, chosen, items, context=64, max_gen_toks=8)
    assert first["compilations"] > 0
    own = first["benchmarks"]
    assert (own["piqa"]["items"], own["piqa"]["truncated"]) == (5, 0)
    assert (own["gsm8k"]["items"], own["gsm8k"]["truncated"]) == (3, 3), "eight examples do not fit 64 bytes"
    assert 5 < own["piqa"]["gold_bits_per_byte"] < 9
    folder = run / "evaluation" / "step3"
    assert json.loads((folder / "piqa-gsm8k.json").read_text())["benchmarks"] == plain(own)
    assert len((folder / "piqa-gsm8k.samples.jsonl").read_text().splitlines()) == 8
    responses = (folder / "responses.jsonl").read_text().splitlines(keepends=True)
    assert len(responses) == 10 + 3 + 3, "two choices, answers, and their gold texts"

    again = evaluate(run, chosen, items, context=64, max_gen_toks=8)
    assert (again["compilations"], again["benchmarks"]) == (0, own), "nothing is computed twice"

    (folder / "responses.jsonl").write_text("".join(responses[:12]) + responses[12][:20])
    resumed = evaluate(run, chosen, items, context=64, max_gen_toks=8)
    assert resumed["compilations"] > 0
    for name, expected in own.items():
        for key, value in expected.items():
            assert resumed["benchmarks"][name][key] == pytest.approx(value), (name, key)
    assert len(table.comparison([first, resumed]).splitlines()) == 2 + 4
    for more, sentence in (
        ({}, "The context of 16 tokens is too short for gsm8k_cot"),
        ({"limit": -1}, "--limit is -1"),
    ):
        with pytest.raises(InputError, match=sentence):
            evaluate(run, ["gsm8k"], items, **more)


@quiet_harness
def test_gold_answers_are_scored_whatever_the_tokenizer_and_the_prompt_end(items, tmp_path):
    """`gold_bytes` are the bytes of the scored text: delimiter, white space of the prompt's end, what straddles."""
    train_bpe([f"Answer: {c}" for c in "ABCD"], split_words=False).save(str(tmp_path / "unsplit.json"))
    text = tiny_runs.write_text(tmp_path / "text.txt")
    expected = {
        "byte": {"mmlu_anatomy": " A", "bbh_cot_fewshot_navigate": "\nNo", "drop": "7"},
        f"bpe:{tmp_path / 'unsplit.json'}": {"mmlu_anatomy": "Answer: A"},
    }
    for number, (tokenizer, gold) in enumerate(expected.items()):
        run = tmp_path / f"run{number}"
        train(tiny_runs.tiny(text, "residual", train={"steps": 2}, data={"tokenizer": tokenizer}), run)
        found = evaluate(run, list(gold), items, 2, 32, 0, 1)
        assert found["settings"]["trained_context"] == 16
        for name, own in found["benchmarks"].items():
            assert own["shots"] == own["paper_shots"], name
        for one in found["samples"]:
            assert one["gold_bytes"] == len(gold[one["task"]]), (tokenizer, one)
            assert one["gold_bits"] > 0.1
        assert all(nats < -0.1 for s in found["samples"] if s["benchmark"] == "mmlu" for nats, _ in s["response"])
