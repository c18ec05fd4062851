"""Schedules of pipelines: generated tables are valid, broken ones are refused, bubbles are as published; costs and the picture."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.in_process import run_here
from support.pipeline_tables import WAYS, arguments, corrupted, replay

from experiments.configs.paper import get_config
from mhc_jax.config import ExperimentConfig
from mhc_jax.config.mapping import from_mapping
from mhc_jax.errors import InputError
from mhc_jax.pipeline.executor import IN_PLACE, writes
from mhc_jax.pipeline.program import Operation, compile_table
from mhc_jax.pipeline_schedules.simulate import by_hand, simulate
from mhc_jax.pipeline_schedules.tables import SCHEDULES, Op, Place, Schedule, make, stage_count
from mhc_jax.pipeline_schedules.validate import messages, operations, peak_activations, validate
from mhc_jax.planning import pipeline_simulations, stage_costs
from mhc_jax.plots.pipeline import timeline
from mhc_jax.plots.style import save, svg


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=25)
@given(st.data())
def test_any_generated_table_is_valid_and_its_program_reads_what_it_wrote(name, data):
    P, M, chunks, latency = data.draw(arguments(name))
    schedule = make(name, P, M, chunks, latency)
    validate(schedule)
    assert (schedule.devices, schedule.microbatches) == (P, M)
    assert schedule.stages == stage_count(name, P, chunks)
    # Independent of the validator: forwards and gradients of all stages and microbatches, once and in order.
    kinds = [op.kind for _, _, op in operations(schedule)]
    assert kinds.count("F") == kinds.count("B") + kinds.count("I") == M * schedule.stages
    assert kinds.count("I") == kinds.count("W")
    program = compile_table(schedule)
    done = replay(schedule, program)
    assert len(set(done)) == len(done) == len(kinds)
    at = {("B" if kind == "I" else kind, *what): k for k, (kind, *what) in enumerate(done)}
    for m, s in itertools.product(range(M), range(schedule.stages)):
        assert at["F", m, s] < at["B", m, s] <= at.get(("W", m, s), at["B", m, s])
        assert s == 0 or (at["F", m, s - 1] < at["F", m, s] and at["B", m, s] < at["B", m, s - 1])
    assert program.activations == max(schedule.bound)
    # Two messages for each boundary and microbatch; those of dualpipev's turn stay on their device.
    found = messages(schedule)
    assert len(found) == 2 * M * (schedule.stages - 1)
    assert all(one.used > one.sent for one in found)
    assert sum(one.source == one.target for one in found) == (2 * M if name == "dualpipev" else 0)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=20)
@given(st.data())
def test_any_table_with_one_thing_wrong_is_refused(name, data):
    P, M, chunks, latency = data.draw(arguments(name))
    schedule, pick = make(name, P, M, chunks, latency), data.draw(st.integers(0, 10**6))
    for how in WAYS:
        with pytest.raises(InputError):
            validate(corrupted(schedule, how, pick))


def test_a_hand_written_table_is_told_which_dependency_breaks_at_which_tick():
    route = (Place(0, 0), Place(1, 0))
    rows = (
        ((Op("F", 0, 0, None, 1),), (Op("F", 0, 0, 0, None),)),
        ((), (Op("B", 0, 0, None, 0),)),
        ((Op("B", 0, 0, 1, None),), ()),
    )
    schedule = Schedule("mine", 2, 1, (route,), (0,), (1, 1), rows)
    told = "tick 0, device 1: F of microbatch 0, chunk 0, stage 1, needs F of stage 0, which device 0 does in tick 0; "
    with pytest.raises(InputError, match=told + "it is there from tick 1 on."):
        validate(schedule)
    late = dataclasses.replace(schedule, table=((rows[0][0], ()), ((), rows[0][1]), *rows[1:]))
    validate(late)
    with pytest.raises(InputError, match="from tick 2 on"):
        validate(dataclasses.replace(late, latency=2))


def published(name, PP, F, B, W, pair):
    """(bubble, activations of a device, copies of the parameters), from the README of github.com/deepseek-ai/DualPipe."""
    dual = ((PP / 2 - 1) * (pair * (F + B) + B - 3 * W), PP + 1, 2)
    plain = {"1f1b": ((PP - 1) * (F + B), PP, 1), "zb1p": ((PP - 1) * (F + B - 2 * W), PP, 1)}
    return plain.get(name, dual)


@pytest.mark.parametrize("PP", [4, 8, 16])
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_bubbles_and_activations_are_the_published_ones(name, PP):
    """PP counts stages; dualpipev runs on half as many devices.  Dual bubbles are smaller where F = I = W does not hold."""
    general = [(1.0, 2.2, 0.9, 1.0), (1.0, 2.0, 0.5, 1.0), (1.0, 2.4, 0.8, 0.9)]
    for M in (2 * PP, 4 * PP):
        schedule = make(name, PP // 2 if name == "dualpipev" else PP, M)
        assert schedule.stages == PP
        for F, B, W, pair in [(1.0, 2.0, 1.0, 1.0), (1.0, 2.0, 1.0, 0.8), (3.0, 6.0, 3.0, 0.9), *general]:
            run = simulate(schedule, by_hand(PP, F, B, W, pair))
            bubble, activations, copies = published(name, PP, F, B, W, pair)
            if name.startswith("dual") and (F, B, W, pair) in general:
                assert max(run.bubble) <= bubble
            else:
                assert max(run.bubble) == pytest.approx(bubble, abs=1e-9)
            assert max(run.activations) == activations
            assert max(most for most, _ in peak_activations(schedule)) == activations
            # Stages that a device holds over those it would hold if no stage were anywhere twice.
            assert schedule.chunks * schedule.devices == copies * PP / (1 if name != "dualpipev" else 2)


def test_gpipe_has_the_bubble_of_1f1b_and_all_activations():
    run = simulate(make("gpipe", 4, 12), by_hand(4, 1.0, 2.5, 1.0))
    np.testing.assert_allclose(run.bubble, 3 * 3.5)
    assert run.activations == (12,) * 4


def test_interleaved_divides_the_bubble_by_its_chunks():
    """Narayanan et al., section 2.2.2: (P - 1)(F + B) / v, where a chunk takes 1 / v of a stage."""
    for v in (2, 4):
        run = simulate(make("interleaved", 4, 16, v), by_hand(4 * v, 1 / v, 2 / v, 1 / v))
        assert max(run.bubble) == pytest.approx(3 * 3 / v)


def test_messages_show_where_nothing_runs_beside_them():
    """Under 1f1b every device of warm-up and drain waits for a message, and nothing runs beside it."""
    quick, slow = (simulate(make("1f1b", 4, 8), by_hand(4, send=send)) for send in (0.0, 0.25))
    assert quick.exposed == 0
    assert slow.exposed == pytest.approx(slow.makespan - quick.makespan)
    assert slow.exposed >= 2 * 3 * 0.25
    assert simulate(make("gpipe", 4, 8), by_hand(4, send=0.25)).exposed == pytest.approx(2 * 3 * 0.25)


@pytest.mark.parametrize(
    ("name", "P", "M", "sentence"),
    [
        ("1f1b", 4, 3, "3 microbatches are too few for '1f1b' on 4 devices; use at least 4."),
        ("zb1p", 4, 3, "use at least 4"),
        ("interleaved", 4, 6, "needs a multiple of 4 microbatches on 4 devices, not 6; use 8."),
        ("dualpipe", 3, 8, "'dualpipe' has 3 devices; it needs an even number"),
        ("dualpipe", 4, 9, "'dualpipe' has 9 microbatches; it needs an even number"),
        ("dualpipe", 4, 6, "6 microbatches are too few for 'dualpipe' on 4 devices; use at least 8."),
        ("dualpipev", 4, 6, "too few"),
        ("gpipe", 1, 4, "a pipeline needs at least 2"),
        ("1f2b", 4, 4, r"Did you mean '1f1b'\?"),
    ],
)
def test_what_does_not_fit_is_refused(name, P, M, sentence):
    with pytest.raises(InputError, match=sentence):
        make(name, P, M)


RATES = stage_costs.Rates(flops=1e14, bandwidth=2e12, link=1e11)


def paper(kind="mhc:t_max=2"):
    return from_mapping(get_config(f"27b:{kind}").to_dict())


def test_costs_of_a_model_add_up():
    """Over all stages: a third of the FLOPs of `cost.counts.model_cost` in F, the connection's bytes, nC a message."""
    model, T = paper().model, 4096
    C, blocks = model.width, model.num_layers
    for stages in (8, 16):
        found = stage_costs.from_model(model, T, stages, RATES)
        again = stage_costs.from_model(model, T, stages, RATES, recompute=True)
        plain = stage_costs.from_model(paper("residual").model, T, stages, RATES)
        more = 2 * blocks * (10 - 4) * C * 2 * T / 2e12
        assert sum(found.F) - sum(plain.F) == pytest.approx(more)
        assert sum(found.B) - sum(plain.B) == pytest.approx(2.5 * more)
        assert sum(again.B) - sum(found.B) == pytest.approx(2 * blocks * 10 * C * 2 * T / 2e12)
        assert found.W == plain.W == again.W
        assert found.send == 4 * plain.send == 4 * C * 2 * T / 1e11
        assert sum(again.activations) < sum(found.activations) / 2
    assert sum(plain.W) == pytest.approx(sum(plain.F) - 2 * blocks * 4 * C * 2 * T / 2e12)


def test_the_last_stage_has_the_output_embedding_once_forward_and_twice_backward():
    """A product of V C weights and T tokens in F, its two gradients in B, the one of the weights in W."""
    model = dataclasses.replace(paper("residual").model, width=256, num_layers=8)
    one, more = (stage_costs.from_model(dataclasses.replace(model, vocab_size=V), 64, 4, RATES) for V in (1000, 1100))
    product = 2 * 100 * 256 * 64 / 1e14
    for kind, times in (("F", 1), ("B", 2), ("W", 1)):
        added = np.subtract(getattr(more, kind), getattr(one, kind))
        np.testing.assert_allclose(added, [0, 0, 0, times * product], rtol=1e-6, atol=1e-6 * product)


def test_blocks_go_where_there_is_least_work():
    assert stage_costs.blocks_of_stages(8, 4) == [2, 2, 2, 2]
    assert stage_costs.blocks_of_stages(8, 4, head=2.5) == [3, 3, 2, 0]
    assert sum(stage_costs.blocks_of_stages(30, 16, head=2.6)) == 30
    with pytest.raises(InputError, match="3 blocks do not divide into 4 stages"):
        stage_costs.blocks_of_stages(3, 4)


def test_costs_of_a_report():
    shape = {"width": 64, "num_layers": 2, "sequence_length": 32, "dtype": "bfloat16"}
    steps = [{"name": name, "status": "ok", "ms": ms} for name, ms in (("residual", 120.0), ("mhc xla", 134.0))]
    steps += [{"name": "mhc triton", "status": "needs a GPU"}]
    report = {"parts": {"step/27b": {"shape": shape, "batch_size": 2, "steps": steps}}}
    found = stage_costs.from_report(report, "27b", "mhc xla", stages=4, blocks=8)
    # 2 of 2 blocks, 1 of 2 sequences: half of 134 ms, whose 7 more are 2 and 5.
    np.testing.assert_allclose(found.F, 0.022)
    np.testing.assert_allclose(found.B, 0.045)
    np.testing.assert_allclose(found.W, 0.020)
    assert found.send == 0
    with pytest.raises(InputError, match="'mhc triton'; it must be one of 'residual', 'mhc xla'"):
        stage_costs.from_report(report, "27b", "mhc triton", 4, 8)
    with pytest.raises(InputError, match="no train steps of '3b'; it has 27b"):
        stage_costs.from_report(report, "3b", "residual", 4, 8)
    rows = pipeline_simulations.of_report(
        pipeline_simulations.schedules(["1f1b", "zb1p"], 4, 8), report, "27b", ["residual", "mhc xla"], 8
    )
    # Equal stages: a schedule of B whole is longer by what a microbatch is.
    assert rows[1].over == pytest.approx(134 / 120 - 1)


def test_the_table_of_a_model_has_recompute_beside_each_kind_with_streams():
    rates = stage_costs.chip_rates("v5p", 0.5, 0.7)
    schedules = pipeline_simulations.schedules(["1f1b", "dualpipe"], 4, 8)
    rows = pipeline_simulations.of_model(schedules, paper(), ["residual", "mhc:t_max=2"], rates, 1.0)
    labels = ["residual", "mhc:init=paper:t_max=2", "mhc:init=paper:t_max=2, recompute"]
    assert [row.label for row in rows] == 2 * labels
    for plain, mhc, again in (rows[:3], rows[3:]):
        assert plain.over is None
        assert 0 < mhc.over < again.over < 0.2
        assert max(again.run.activations) < max(mhc.run.activations)
    lines = pipeline_simulations.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert f"{100 * rows[1].over:+.2f} %" in lines[3]
    with pytest.raises(InputError, match="vocab_size"):
        pipeline_simulations.of_model(schedules, ExperimentConfig(), ["residual"], rates, 1.0)


@pytest.mark.parametrize(("P", "M"), [(4, 8), pytest.param(8, 20, marks=pytest.mark.full)])
def test_the_picture_shows_every_operation(P, M, tmp_path):
    runs = [simulate(make(name, P, M), by_hand(P)) for name in ("1f1b", "dualpipe")]
    figure = timeline(runs, ["one", "two"])
    for axis, run in zip(figure.axes, runs, strict=True):
        assert len(axis.texts) == len(list(operations(run.schedule)))
        assert axis.get_ylim()[0] > P - 1
    # Of the narrowest cell, an F of one unit: three times the width of its number, 6 points high.
    figure.draw_without_rendering()
    unit = figure.axes[0].transData.transform([[0, 0], [1, 0]])
    assert (unit[1, 0] - unit[0, 0]) / figure.dpi * 72 > 10
    save(figure, tmp_path / "timeline.png", vector=True)
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")
    assert svg(figure).startswith("<svg")


def test_the_command(tmp_path):
    command = ("pipeline", "--stages=4", "--microbatches=8")
    status, out, _ = run_here(*command, f"--picture={tmp_path}/a.png", "--schedules=1f1b,zb1p")
    assert status == 0
    assert out.splitlines()[2].startswith("| 1f1b |  | 4 x 4 | 33 | 9 | 27.3 |")
    assert (tmp_path / "a.png").exists()
    assert (tmp_path / "a.svg").exists()
    status, out, err = run_here(*command, "--schedules=dualpipe", "--stages=3")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "even number" in err


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_phase_has_what_writes_an_array_behind_what_does_not(name, leading):
    """XLA copies an array where a later branch only passes it on."""
    schedule = make(name, 4, 16)
    program = compile_table(schedule, leading)
    does, done = [op for each in program.phases for op in each], []
    assert all(each[0] == Operation() for each in program.phases)
    assert len(set(does)) == len(does) - len(program.phases) + 1, "an operation is in one phase"
    for k, each in enumerate(program.phases):
        for array in IN_PLACE:
            writing = [array in writes(op) for op in each]
            # The parts of the outer sum are written by the ends of the pipeline, in conditionals of their own.
            assert array == "outer" or writing == sorted(writing), f"{array}: {each}"
        done += [each[number] for number in program.columns[f"operation_{k}"].flat]
    assert sum(bool(op.forward) + bool(op.backward) for op in done) == len(list(operations(schedule)))
