"""Benchmarks: workloads, traffic, the gate that keeps wrong results from being timed, layouts of peers, the device report."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mhc_kernels import measure
from mhc_kernels.ops.arg_specs import ARGUMENTS, OPS, OUTPUTS, SPECS, arguments, floor_bytes, function
from support import oracles
from support.thinned import thin
from support.tiny_runs import ROOT
from support.tolerances import FLOAT64_CHAIN, FLOAT64_SUMS, ROUNDED, assert_close

from mhc_jax.timing import step_times


@pytest.fixture(scope="module")
def scripts():
    """kernels/bench.py and kernels/peers.py, which are scripts and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "kernels"))
        yield importlib.import_module("bench"), importlib.import_module("peers")


class Wrong:
    """The implementation `xla` with one wrong result, which is `by` times the right one."""

    def __init__(self, spoil, by=1.01, backward_only=False, name="wrong"):
        self.spoil, self.by, self.backward_only, self.name = spoil, by, backward_only, name

    def obstacle(self, op, spec):
        return None

    def results(self, op, spec, sets, backward):
        out = measure.Ours("xla").results(op, spec, sets, backward)
        if self.spoil < len(out) and (backward or not self.backward_only):
            out[self.spoil] = out[self.spoil] * self.by
        return out

    def batch(self, op, spec, sets, calls, backward):
        raise AssertionError("what failed its gate must not be timed")


EVERY = [*((op, "tiny") for op in OPS), ("write_read", "tiny-bf16"), ("write", "tiny-ragged")]


@pytest.mark.parametrize(("op", "spec"), thin(EVERY, lambda case: case[1] != "tiny" or case[0] in ("read", "sinkhorn")))
def test_the_reference_passes_its_gate(op, spec):
    gate = measure.gate(op, SPECS[spec], measure.Ours("xla"))
    assert gate.passed, gate
    assert set(gate.errors) == {*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])}


class Broken(Wrong):
    def results(self, op, spec, sets, backward):
        raise RuntimeError("out of\nshared memory")


SPOILT = [("coefficients", 4), ("read", 0), ("write", 3)]


@pytest.mark.parametrize(("op", "spoil"), thin(SPOILT, lambda case: case[0] == "read"))
def test_a_failing_contestant_is_not_timed_and_costs_no_other_row(op, spoil):
    first, last = [Broken(0, name="broken"), Wrong(0, np.nan, name="nan")], Wrong(spoil, backward_only=True)
    rows = list(measure.measure(op, SPECS["tiny"], [*first, measure.Ours("xla"), last], 1, 1e9))
    names = [*OUTPUTS[op], *(f"d{name}" for name in ARGUMENTS[op])]
    assert [(r["implementation"], r["status"], r.get("worst")) for r in rows[2:]] == [
        ("broken", "error: RuntimeError: out of shared memory", None),
        ("nan", "FAILED", names[0]),
        ("wrong", "FAILED", names[spoil]),
    ]
    assert [(r["implementation"], r["status"]) for r in rows[:2]] == [("xla", "ok")] * 2
    assert not any("ms" in row for row in rows[2:])
    assert rows[-1]["errors"][names[spoil]] == pytest.approx(0.01, rel=1e-3)
    assert "| wrong | FAILED |  |  | 1e-02" in measure.table(rows)


def test_a_backend_of_another_device_says_so():
    for op in OPS:
        for one in measure.implementations(op)[1:]:
            assert "it needs a " in str(one.obstacle(op, SPECS["tiny"]))


def test_no_two_arguments_or_cotangents_are_alike():
    spec = dataclasses.replace(SPECS["tiny"], tokens=16)  # pre and post of 4 x 16, res of 16 x 16
    drawn = [a for given, cotangents in measure.make_sets("coefficients", spec, 2) for a in (given[0], *cotangents)]
    starts = [np.asarray(a).ravel()[:64].tobytes() for a in drawn]
    assert len(set(starts)) == len(starts) == 2 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float64_results_agree_with_the_oracles(dtype):
    spec = dataclasses.replace(SPECS["tiny"], tokens=3, width=5, dtype=dtype)
    n, C = spec.num_streams, spec.width
    given = [np.asarray(a, np.float64) for a in arguments("write_read", spec, jax.random.key(3))]
    x, y, post, res, phi, alpha, bias = given
    ((_, cotangents),) = measure.make_sets("write_read", spec, 1)
    new, *c, h = measure.float64_results("write_read", spec, given, cotangents)[: len(OUTPUTS["write_read"])]
    assert (new == np.asarray(new.astype(dtype), np.float64)).all(), "rounded to the dtype of the streams"
    for t in range(spec.tokens):
        expected = oracles.write(x[t].reshape(n, C), y[t], post[:, t], res[..., t])
        assert_close(new[t], expected.ravel(), ROUNDED[dtype], "x'")
        coefficients = oracles.mhc_coefficients(new[t].reshape(n, C), phi, alpha, bias)
        for ours, theirs in zip(c, coefficients, strict=True):
            assert_close(ours[..., t], theirs, FLOAT64_CHAIN)
        assert_close(h[t], oracles.read(new[t].reshape(n, C), coefficients[0]), FLOAT64_CHAIN, "h")


@pytest.mark.parametrize("name", ["27b", "27b-n2", "27b-n8", "v4"])
def test_floor_is_the_documented_traffic(name):
    spec = SPECS[name]
    n, stream = spec.num_streams, spec.tokens * spec.width * 2
    forward_both = {"coefficients": (n, 3 * n), "read": (n + 1, 3 * n + 2)}
    forward_both |= {"write": (2 * n + 1, 5 * n + 3), "write_read": (2 * n + 2, 5 * n + 5)}
    for op, factors in forward_both.items():
        for backward, factor in enumerate(factors):
            # Coefficients and phi add n^2 float32 here and there: 13 % at n = 8 and C = 2560.
            assert 1 <= floor_bytes(op, spec, bool(backward)) / (factor * stream) < 1.15
    assert floor_bytes("sinkhorn", spec, False) == 2 * 4 * n * n * spec.tokens
    assert floor_bytes("sinkhorn", spec, True) == 5 * 4 * n * n * spec.tokens


def test_workloads_cover_what_models_use():
    real = [spec for name, spec in SPECS.items() if not name.startswith("tiny")]
    assert {1280, 1920, 2560, 4096, 7168} <= {spec.width for spec in real}
    assert {spec.num_streams for spec in real} == {2, 4, 8}
    tokens = sorted(spec.tokens for spec in real)
    assert (tokens[0], tokens[-1]) == (4096, 65536)
    assert any(count % 2 for count in tokens), "a token count that no block divides"
    assert {spec.dtype for spec in real} == {"bfloat16", "float32"}


def test_calls_of_one_dispatch_are_the_calls():
    spec = SPECS["tiny"]
    sets = measure.make_sets("read", spec, 4)
    batch = measure.Ours("xla").batch("read", spec, sets, 2, True)
    earlier, last = batch.launch(1)  # sets 2 and 3
    assert (earlier[0], batch.calls) == ((), 2)
    one = jax.jit(lambda given, _: function("read", spec, "xla")(*given))
    np.testing.assert_array_equal(earlier[1][0], one(*sets[2])[0])
    np.testing.assert_array_equal(last[0], one(*sets[3])[0])
    assert not np.array_equal(earlier[1][0], last[0])


def test_every_round_times_everyone_in_turning_order():
    called = []
    batches = {name: measure.Batch(lambda k, name=name: called.append(name), lambda _: None) for name in "ab"}
    times = measure.alternating(batches, 3, seconds=0.0)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert "".join(called[4:]) == "bbaaaabbbbaa"  # an untimed call before each timed one


def test_rotation_exceeds_every_cache():
    for size in (2**20, 40 * 2**20, 2**30):
        calls, sets = measure.rotation(size)
        assert sets % calls == 0
        assert sets * size >= measure.ROTATION_BYTES


def test_layouts_of_peers_come_back(scripts):
    _, peers = scripts
    spec, rng = SPECS["tiny"], np.random.default_rng(0)
    for op in ("sinkhorn", "write_read"):
        given, cotangents = measure.make_sets(op, spec, 1)[0]
        named = [(name, a.shape, False) for name, a in zip(ARGUMENTS[op], given, strict=True)]
        named += [(name, a.shape, True) for name, a in zip(OUTPUTS[op], cotangents, strict=True)]
        for peer in peers.PEERS.values():
            for name, shape, made in named:
                a = rng.normal(size=shape)
                there = peers.lay_out(peer.layout, spec, name, a, made)
                np.testing.assert_array_equal(peers.take_back(peer.layout, spec, name, there, made, shape), a)


def test_layouts_of_peers_mean_the_same(scripts):
    _, peers = scripts
    spec = dataclasses.replace(SPECS["tiny"], tokens=2, width=3)
    n, tokens = spec.num_streams, spec.tokens
    x, _, _, res, phi, _, _ = (np.asarray(a, np.float64) for a in arguments("write_read", spec, jax.random.key(1)))
    layout = peers.PEERS["transformer_engine"].layout
    there = {name: peers.lay_out(layout, spec, name, a, False) for name, a in (("x", x), ("res", res), ("phi", phi))}
    assert there["x"].shape == (tokens, spec.width, n)
    z = there["x"].reshape(tokens, -1) @ there["phi"].T  # as its projection does
    expected = x @ phi
    assert_close(z[:, : 2 * n], expected[:, : 2 * n], FLOAT64_SUMS)
    matrices = expected[:, 2 * n :].reshape(tokens, n, n)
    theirs = z[:, 2 * n :].reshape(tokens, n, n)
    assert_close(theirs, matrices.swapaxes(1, 2), FLOAT64_SUMS, "its Sinkhorn gets the transpose")
    mixed = there["x"] @ there["res"]  # as its expand_combine does
    ours = np.einsum("ijt,tjc->tic", res, x.reshape(tokens, n, -1))
    assert_close(peers.take_back(layout, spec, "x", mixed, False, x.shape), ours.reshape(tokens, -1), FLOAT64_SUMS)


def test_bench_prints_tables_and_writes_json(scripts, tmp_path, capsys, monkeypatch):
    bench, peers = scripts
    monkeypatch.setattr(measure, "copy_bandwidth", lambda rounds: 1e9)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda rounds: 1e9)
    row = {"pass": "p", "ours_ms": 1.0, "textbook_ms": 2.0, "ratio": 2.0, "largest_relative_error": 0.0}
    monkeypatch.setattr(bench, "textbook_rows", lambda n, tokens, _: [row | {"n": n, "tokens": tokens}])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "bench.json"
    assert bench.main(["--specs=tiny", "--ops=read", "--rounds=1", "--tokens=64", f"--json={file}"]) == 0
    out = capsys.readouterr().out
    for n in (2, 4, 8):
        assert out.count(f"| {n} | 64 | 1.00 | 2.00 | 2.0 |") == 1, "textbook rows"
    assert "| read | forward + backward | tiny (40 x 4 x 128, float32) | xla | " in out
    for name in peers.PEERS:
        assert f"| {name} | not installed" in out
    record = json.loads(file.read_text())
    assert {"device", "versions", "commit", "copy_bytes_per_s"} <= set(record)
    timed = [row for row in record["rows"] if row["status"] == "ok"]
    assert [row["pass"] for row in timed] == ["forward", "forward + backward"]
    for row in timed:
        assert row["bytes"] == floor_bytes("read", SPECS["tiny"], "backward" in row["pass"])
        assert row["copy_share"] == pytest.approx(row["bytes"] / (row["ms"] / 1e3) / 1e9)


def test_bench_fails_where_a_gate_fails(scripts, capsys, monkeypatch):
    bench, _ = scripts
    monkeypatch.setattr(bench, "copy_bandwidth", lambda rounds: 1e9)
    monkeypatch.setattr(bench, "implementations", lambda op: [Wrong(0, name="xla")])
    assert bench.main(["--specs=tiny", "--ops=read", "--implementations=xla", "--rounds=1", "--tokens=0"]) == 1
    assert "| xla | FAILED |" in capsys.readouterr().out


def test_bench_names_what_it_knows_and_what_it_lacks(scripts, capsys, monkeypatch):
    bench, _ = scripts
    with pytest.raises(SystemExit):
        bench.main(["--ops=raed"])
    assert "'raed' is not one of sinkhorn, coefficients, read, write, write_read" in capsys.readouterr().err
    monkeypatch.setattr(bench.gpu_inspect, "missing", lambda: "the triton package is not installed")
    assert bench.main(["--compile"]) == 2
    assert "make test-aot" in capsys.readouterr().out


def test_copy_bandwidth_counts_both_ways(monkeypatch):
    monkeypatch.setattr(measure, "alternating", lambda batches, rounds: {"copy": [0.5, 0.25, 1.0]})
    assert measure.copy_bandwidth(3) == 2 * 4 * 2**26 / 0.5  # of four bytes each


def test_results_that_differ_between_calls_are_named():
    first, second = iter((0.0, 0.0, 1.0)), iter((0.0, -0.0))
    run = lambda: [jnp.asarray([1.0, np.nan]), jnp.asarray([next(first)])]  # noqa: E731
    assert step_times.differing(run, ["same", "changing"], 3) == ["changing"]
    assert step_times.differing(lambda: [jnp.asarray([next(second)])], ["sign"], 2) == ["sign"]


def test_compiled_table_has_registers_and_bytes(scripts):
    row = {
        "op": "read",
        "spec": dataclasses.asdict(SPECS["27b"]),
        "name": "mhc_read_forward",
        "registers": 32,
        "spills": 0,
    }
    row |= {"elements": 16384 * 2560, "moved": 5 * 16384 * 2560 * 2, "shared": 2048, "warps": 4}
    line = scripts[0].compiled_table([row | {"loads": {128: 4, 32: 4}, "stores": {128: 1}}]).splitlines()[-1]
    assert "| mhc_read_forward | 32 | 0 | 4 x 32 bit, 4 x 128 bit | 1 x 128 bit | 2 | 419.4 | 5.00 |" in line
