"""The board: its rules, how an entry becomes the best, its page to the digit, and the command that enters a configuration."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats
from support.board_records import ENV, TASK, write_entry
from support.in_process import run_here
from support.tiny_runs import ROOT, tiny
from support.workers_here import workers_here

from mhc_jax.config.mapping import to_mapping
from mhc_jax.connections import parse
from mhc_jax.errors import InputError
from mhc_jax.files.json_files import read_json
from mhc_jax.reports import board, board_entry, board_models, board_rules
from mhc_jax.reports.board_entry import Candidate, Setup, enter
from mhc_jax.reports.record import read_record
from mhc_jax.runs.trained import load_trained
from mhc_jax.sweeps.grid import write_plan
from mhc_jax.timing import turns
from mhc_jax.timing.step_times import CompiledStep

BASE = [2.23, 2.25, 2.21, 2.26, 2.24]
PATTERN = np.array([1.0, -1.0, 0.5, -0.5, 0.0])


def below(t: float, mean: float = -0.02, base=BASE) -> list[float]:
    """Losses whose differences from `base` have this mean and this t statistic."""
    deviation = abs(mean) * math.sqrt(5) / abs(t)
    return [b + mean + deviation * p for b, p in zip(base, PATTERN / PATTERN.std(ddof=1), strict=True)]


NEEDED = float(stats.t.ppf(0.99, 4))
"""The t statistic of p = 0.01, one-sided, with five seeds."""


def cells(text: str, name: str) -> list[list[str]]:
    """Cells of the rows of an entry in all tables."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in found if row[0] == name or (len(row) > 1 and row[1].split(" (")[0] == name)]


@pytest.fixture
def records(tmp_path):
    """Records of residual, of an entry just good enough, and of one that is not."""
    folder = tmp_path / "records"
    write_entry(folder, "residual", BASE, date="2026-03-01")
    better = below(NEEDED + 0.05)
    write_entry(folder, "hc", better, spec="hc", step_s=1.25, clock=[x + 0.1 for x in BASE], author="A. Name")
    write_entry(folder, "home", below(NEEDED - 0.05), spec="mhc:init=home", step_s=1.2, date="2026-01-03")
    lion = {"optimizer": {"name": "lion", "learning_rate": 1e-3}}
    write_entry(folder, "lion", [*BASE[:4], None], sections=lion, date="2026-01-03")
    return folder


def test_the_page_has_the_numbers_of_the_records_and_is_the_same_every_time(records):
    text = board.write_page(records, TASK).read_text()
    assert board.write_page(records, TASK).read_text() == text
    losses = np.array(below(NEEDED + 0.05))
    mean, half = losses.mean(), stats.t.ppf(0.975, 4) * losses.std(ddof=1) / math.sqrt(5)
    d = losses - np.array(BASE)
    around = stats.t.ppf(0.975, 4) * d.std(ddof=1) / math.sqrt(5)
    p = 2 * stats.t.sf(abs(d.mean()) * math.sqrt(5) / d.std(ddof=1), 4)
    in_table, in_line, with_clock = cells(text, "hc")
    expected = ["hc", "hc", f"{mean:.4f}", f"{mean - half:.4f} to {mean + half:.4f}", "5", "358,320", "600", "1.250"]
    expected += [f"{d.mean():+.4f}", f"{d.mean() - around:+.4f} to {d.mean() + around:+.4f}", f"{p:.3g}"]
    assert in_table == expected
    assert in_line == [
        "2026-01-02",
        "hc (A. Name)",
        "hc",
        f"{mean:.4f}",
        "residual",
        f"{d.mean():+.4f}",
        f"{p / 2:.3g}",
    ]
    assert with_clock[6] == "480"
    assert with_clock[8] == "+0.1000"
    assert cells(text, "home")[0][1] == "mhc:init=home"
    assert cells(text, "lion")[0] == [
        *("lion", "residual optimizer.name=lion optimizer.learning_rate=0.001", "–", "–", "4 of 5", "358,320", "600"),
        *("1.000", "–", "–", "–"),
    ]
    table = text[text.index("## Equal tokens") : text.index("Line of records")]
    assert [row.split(" | ")[0].strip("| ") for row in table.splitlines() if row[:1] == "|"][2:] == [
        *("hc", "home", "residual", "lion")
    ]
    assert "The p-values are not corrected for the number of entries tried." in " ".join(text.split())
    assert "This track is open and has no entries." in text


def test_an_entry_is_compared_with_the_best_before_it(records):
    """The last is better than residual beyond doubt, and not than the best; residual comes first whatever its date."""
    hc = below(NEEDED + 0.05)
    worse = [loss + 0.1 for loss in BASE]
    late = below(NEEDED - 0.05, -1e-3, hc)
    write_entry(records, "late", late, spec="hc:tanh=False", date="2026-04-01", clock=worse, step_s=2.0)
    write_entry(records, "last", below(NEEDED + 0.05, -1e-3, hc), spec="hc:dynamic=False", date="2026-05-01")
    walk = board.challenges(board.read_entries(records, TASK), "tokens")
    assert [(one.entry.name, one.best.name if one.best else None, one.accepted) for one in walk] == [
        ("residual", None, True),
        ("hc", "residual", True),
        ("home", "hc", False),
        ("lion", "hc", False),
        ("late", "hc", False),
        ("last", "hc", True),
    ]
    said = {}
    for name, status in {"hc": 0, "late": 1, "last": 0}.items():
        found, out, err = run_here("board", "best", name, f"--records={records}")
        assert (found, err) == (status, "")
        said[name] = out
        assert f"Equal tokens: {name} {'is not' if status else 'became'} the best" in out
    assert "late is not the best, since a new best needs p < 0.01; its loss minus hc's is -0.0010 nats" in said["late"]
    assert "since 1 of its runs did not finish" in walk[3].sentence("tokens")
    text = board.page(board.read_entries(records, TASK), TASK)
    assert len(cells(text, "late")) == 2, "it stays in the tables"
    status, _, err = run_here("board", "best", "nobody", f"--records={records}")
    assert status == 2
    assert "There is no entry 'nobody'" in err


def test_fewer_common_seeds_and_a_constant_difference_make_no_best(tmp_path):
    write_entry(tmp_path, "residual", BASE)
    write_entry(tmp_path, "hc", [loss - 1 for loss in BASE], spec="hc")
    (_, same) = board.challenges(board.read_entries(tmp_path, TASK), "tokens")
    assert not same.accepted
    assert "by the same number" in same.sentence("tokens")
    few = board.Challenge(same.entry, same.best, board.paired(dict(enumerate(below(50)[:4])), dict(enumerate(BASE))), 0)
    assert few.result.p_lower < 0.01
    assert not few.accepted
    assert "it shares 4 seeds with residual" in few.sentence("tokens")


def test_without_residual_there_is_no_line(tmp_path):
    write_entry(tmp_path, "hc", BASE, spec="hc")
    text = board.page(board.read_entries(tmp_path, TASK), TASK)
    assert "residual, which has not been entered yet" in text
    status, _, err = run_here("board", "best", "hc", f"--records={tmp_path}")
    assert (status, "residual has not been entered" in err) == (2, True)


def test_the_page_of_the_repository_is_that_of_its_records():
    folder = ROOT / "experiments" / "records"
    assert (folder / board.PAGE).read_text() == board.page(board.read_entries(folder, TASK), TASK)


WRONG = {
    "has 899,400 parameters; an entry of the board has at most 600,000": {
        "model": {"connection": parse("go_mhc:num_streams=6")}
    },
    "sets data.source to 'other.txt', and the board's is 'shakespeare'": {"data": {"source": "other.txt"}},
    "sets data.batch_size to 4, and the board's is 8": {"data": {"batch_size": 4}},
    "sets train.validation_batches to 8": {"train": {"validation_batches": 8}},
    "sets train.init_from to 'runs/long'": {"train": {"init_from": "runs/long"}},
    "reads 601 steps x 384 = 230,784 tokens; .* 600 steps, 230,400 tokens": {"train": {"steps": 601}},
    "has 4 seeds; an entry of the board has at least 5": {},
    "residual is the name of the task's own .* differs in optimizer.b2": {"optimizer": {"b2": 0.9}},
}


@pytest.mark.parametrize(("sentence", "sections"), WRONG.items(), ids=lambda value: str(value)[:20])
def test_an_entry_that_breaks_a_rule_is_refused_before_anything_is_timed(sentence, sections, tmp_path):
    def measure(*_):
        raise AssertionError("timed")

    count = 4 if "4 seeds" in sentence else 5
    name = "residual" if sentence.startswith("residual") else "mine"
    setup = Setup(TASK, tmp_path / "runs", tmp_path / "records", count, 1, 1, measure)
    with pytest.raises(InputError, match=sentence):
        enter([Candidate(name, "mine.py", TASK.with_settings(**sections))], setup)
    assert not list(tmp_path.iterdir())


BROKEN = {
    "has 500 steps in the track of equal wall clock; with r = 1.25 it has at most 480": {
        "board": {"steps": {"clock": 500}},
        "step_s": 1.25,
    },
    "says r = 1.1, and its step times give 1.25": {"board": {"timing": {"r": 1.1}}, "step_s": 1.25},
    "were timed on 64 cores": {"board": {"timing": {"cores": 64}}},
    "has 600,001 parameters": {"parameters": 600_001},
    "sets data.sequence_length to 96": {"sections": {"data": {"sequence_length": 96}}},
    "reads 700 steps": {"steps": 700},
    "was trained on another text .sha256 cccccccc": {"sha256": "c" * 64},
    "has 4 seeds in the track tokens": {"losses": BASE[:4]},
    "is the record of 'other'; rename": {"board": {"name": "other"}},
}


@pytest.mark.parametrize(("sentence", "more"), BROKEN.items(), ids=lambda value: str(value)[:20])
def test_a_record_that_breaks_a_rule_is_refused(sentence, more, tmp_path):
    write_entry(tmp_path / "r", "residual", BASE)
    write_entry(tmp_path / "r", "mine", **{"losses": BASE, "spec": "hc", "date": "2026-02-01", **more})
    with pytest.raises(InputError, match=sentence):
        board.read_entries(tmp_path / "r", TASK)


def test_steps_of_equal_time_are_whole_numbers_rounded_down():
    ratios = {1.0: 600, 1.2: 500, 1.201: 499, 0.9: 666, 3.0: 200, 1.001: 599}
    assert {r: board_rules.clock_steps(r, TASK) for r in ratios} == ratios
    assert board_rules.step_ratio(0.0123456, 0.01) == 1.235
    with pytest.raises(InputError, match="no step"):
        board_rules.clock_steps(0.0, TASK)


def test_steps_take_turns_and_the_second_of_each_turn_counts(monkeypatch):
    """A first call takes 100 s longer; the entry takes 3 s and once 30, residual 2 s."""
    clock, order = SimpleNamespace(now=0.0), []

    def compile_step(config, batch):
        kind = config.model.connection.kind

        def compiled(state, batch):
            again, slow = len(order) % 2, (kind, len(order) // 4) == ("hc", 1)
            order.append(kind)
            clock.now += {"hc": 30 if slow else 3, "residual": 2}[kind] if again else 100
            return state, {"loss": 0.0}

        return CompiledStep(compiled, None, batch, 0.0)

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(turns, "random_batch", lambda config: None)
    monkeypatch.setattr(turns, "compile_step", compile_step)
    entry = TASK.with_settings(model={"connection": parse("hc")})
    assert turns.step_beside_baseline(entry, TASK, 3) == (3.0, 2.0)
    assert order[::2] == ["hc", "residual", "residual", "hc", "hc", "residual"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A board whose task is tiny, with two seeds: what `enter` needs, and the list of what was timed."""
    task, timed = tiny(Path("shakespeare"), "residual"), []

    def measure(config, baseline):
        timed.append((config.model.connection.kind, baseline.model.connection.kind, config.model.vocab_size))
        return 0.0301, 0.02

    monkeypatch.setattr(board_rules, "LEAST_SEEDS", 2)
    monkeypatch.setattr(board_entry, "cores", lambda: 2)
    monkeypatch.setattr(board_entry, "cpu_alone", lambda: True)
    (tmp_path / "records").mkdir()
    return Setup(task, tmp_path / "runs", tmp_path / "records", 2, 1, 7, measure, "A. Name"), timed


def test_a_stopped_call_goes_on_and_the_record_has_the_ratio_of_step_times(small, monkeypatch):
    setup, timed = small
    hc = Candidate("hc", "hc", setup.task.with_settings(model={"connection": parse("hc:num_streams=2")}))
    calls = []

    def run_local(workdir, grid, selected, workers):
        calls.append(([run.name for run in selected], workers))
        if len(calls) == 1:
            return 130
        write_plan(workdir, grid)
        for run in selected:
            (workdir / run.name).mkdir()
            steps, seed = run.config.train.steps, run.config.train.seed
            summary = {"status": "finished", "steps": steps, "validation_loss": 3 - steps / 100 + seed, "parameters": 9}
            env = {**ENV, "date": "2026-07-08T09:10:11", "commit": "0123abc", "dirty": False, "command": "c"}
            env |= {"device_count": 1, "packages": {"jax": "1"}, "python": "3"}
            for file, value in (("config", to_mapping(run.config)), ("env", env), ("summary", summary)):
                (workdir / run.name / f"{file}.json").write_text(json.dumps(value))
            (workdir / run.name / "metrics.jsonl").write_text("")
        return 0

    monkeypatch.setattr(board_entry, "run_local", run_local)
    assert enter([hc], setup) == 130
    assert not list(setup.records.iterdir())
    assert enter([hc], setup) == 0
    assert timed == [("hc", "residual", 264)], "timed once, with the vocabulary of the tokenizer"
    assert enter([hc], setup) == 0
    assert calls == 2 * [(["steps5-seed0", "steps5-seed1", "steps8-seed0", "steps8-seed1"], 1)]
    (folder,) = setup.records.iterdir()
    assert folder.name == "2026-07-08-board-hc"
    assert {path.name for path in folder.iterdir()} == {"README.md", "results.csv", "runs.json", "board.json"}
    written = read_json(folder / "board.json")
    assert written["steps"] == {"tokens": 8, "clock": 5}, "8 / 1.505 is 5.3"
    assert {k: written["timing"][k] for k in ("r", "step_s", "residual_step_s", "rounds", "cores")} == {
        "r": 1.505,
        "step_s": 0.0301,
        "residual_step_s": 0.02,
        "rounds": 7,
        "cores": 2,
    }
    assert (written["name"], written["author"]) == ("hc", "A. Name")
    runs = {run.name: run for run in read_record(folder)}
    assert {name: run.result("steps") for name, run in runs.items()} == {
        "steps5-seed0": 5,
        "steps5-seed1": 5,
        "steps8-seed0": 8,
        "steps8-seed1": 8,
    }
    (entry,) = board.read_entries(setup.records, setup.task)
    assert entry.losses("tokens") == {(0, 0): 2.92, (1, 1): 3.92}
    assert entry.losses("clock") == {(0, 0): 2.95, (1, 1): 3.95}
    other = Candidate("hc", "hc", setup.task.with_settings(model={"connection": parse("hc")}))
    with pytest.raises(InputError, match=r"is the record of another configuration \(model.connection.num_streams"):
        enter([other], setup)


def test_the_steps_of_all_entries_are_timed_before_the_first_run_is_trained(small, monkeypatch):
    setup, timed = small
    timed_before = []
    monkeypatch.setattr(board_entry, "run_local", lambda *given: timed_before.append(len(timed)) or 1)
    kinds = ("residual", "hc:num_streams=2")
    entries = [Candidate(kind[:2], kind, setup.task.with_settings(model={"connection": parse(kind)})) for kind in kinds]
    assert enter(entries, setup) == 1
    assert timed_before == [2, 2]


def test_residual_has_the_ratio_1_one_set_of_runs_and_a_model(small, monkeypatch):
    setup, timed = small
    with workers_here():
        assert enter([Candidate("residual", "residual", setup.task)], setup) == 0
    (folder,) = setup.records.iterdir()
    written = read_json(folder / "board.json")
    assert (written["timing"]["r"], written["steps"]) == (1.0, {"tokens": 8, "clock": 8})
    assert [run.name for run in read_record(folder)] == ["steps8-seed0", "steps8-seed1"]
    assert len(timed) == 1
    text = board.page(board.read_entries(setup.records, setup.task), setup.task)
    assert len(cells(text, "residual")) == 4
    (model,) = board_models.write_models(setup.workdir, setup.workdir / "models", 8, ["residual"])
    ours, theirs = load_trained(model), load_trained(setup.workdir / "residual" / "steps8-seed0")
    assert (ours.step, ours.config) == (8, theirs.config)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match=r"hc/steps8-seed0 is no finished run; train it"):
        board_models.write_models(setup.workdir, setup.workdir / "more", 8, ["residual", "hc"])
    assert not (setup.workdir / "more").exists()
    monkeypatch.setattr(board_models, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="bytes together; at most 1,000"):
        board_models.write_models(setup.workdir, setup.workdir / "more", 8, ["residual"])


def test_other_numbers_of_cores_are_refused(small, monkeypatch):
    setup, timed = small
    monkeypatch.setattr(board_entry, "cores", lambda: 16)
    with pytest.raises(InputError, match=r"timed on 2 CPU cores, and this process may use 16 .* taskset -c 0,1"):
        enter([Candidate("residual", "residual", setup.task)], setup)
    assert not timed


def test_the_command_names_entries_and_refuses_mistakes(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("def get_config(arg='hc'):\n    return {'arg': arg}\n")
    records = tmp_path / "records"
    for words, sentence in {
        ("enter", "residual", "go_mhc:init=home:num_streams=6"): "at most 600,000",
        ("enter", "hc", "mhc", "--name=x"): "--name names one entry",
        ("enter", f"{mine}:mhc"): "it must return a ConfigDict",
        ("enter", "nonsense"): "'nonsense'",
        ("leave", "hc"): "The commands are",
        ("enter",): "The commands are",
    }.items():
        status, _, err = run_here("board", *words, f"--records={records}", f"--workdir={tmp_path / 'runs'}")
        assert status == 2, err
        assert sentence in err
    records.mkdir()
    status, out, err = run_here("board", f"--records={records}")
    assert (status, out.strip()) == (0, str(records / "BOARD.md")), err
    assert "There are no entries yet." in (records / "BOARD.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.py", "records"]
