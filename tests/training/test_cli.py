"""A mistake on the command line of a script is one line on standard error with exit status 2, and nothing is written."""

import errno

import pytest
from support.in_process import run_here
from support.tiny_runs import ROOT

DEMO = f"--config={ROOT}/experiments/configs/demo.py"

TRAIN = {
    "no folder": ([DEMO], "error: --workdir is missing; give --workdir=..."),
    "unknown flag": ([DEMO, "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
    "the last name of a setting": (
        [DEMO, "--steps=3"],
        "There is no flag --steps; settings are given by their whole name, --config.train.steps=VALUE.",
    ),
    "the last name of two settings": (
        [DEMO, "--seed=3"],
        "whole name, --config.data.seed=VALUE or --config.train.seed=VALUE.",
    ),
    "unknown key": ([DEMO, "--config.model.widht=3"], "no key 'model.widht'. Did you mean 'model.width'?"),
    "unknown section": ([DEMO, "--config.trian.steps=3"], "no key 'trian.steps'. Did you mean 'train.steps'?"),
    "unknown key, nothing near": ([DEMO, "--config.model.qqq=3"], "The configuration has no key 'model.qqq'. "),
    "not an int": ([DEMO, "--config.train.steps=many"], "--config.train.steps is 'many'; it must be of type int."),
    "not a float": ([DEMO, "--config.optimizer.b1=x"], "--config.optimizer.b1 is 'x'; it must be of type float."),
    "not a bool": ([DEMO, "--config.model.tied_embeddings=5"], "tied_embeddings is '5'; it must be of type bool."),
    "no value": ([DEMO, "--config.train.steps"], "Missing value for flag --config.train.steps"),
    "a section": ([DEMO, "--config.model=3"], "flag --config.model=3"),
    "below a value": ([DEMO, "--config.train.steps.x=3"], "train.steps.x"),
    "refused value": ([DEMO, "--config.train.steps=0"], "train.steps is 0; it must be at least 1."),
    "no config file": (["--config=none.py"], "The config file 'none.py' does not exist"),
    "no config file, two words": (["--config", "none.py"], "The config file 'none.py' does not exist"),
    "a config file's name": (
        ["--config=experiments/configs/demos.py:mhc"],
        "'experiments/configs/demos.py' does not exist; give --config=FILE.py or --config=FILE.py:arg. Did you mean "
        "'experiments/configs/demo.py'?",
    ),
    "a config file's folder": (["--config=ladders.py"], "Did you mean 'experiments/configs/ladder.py'?"),
    "a folder": ([f"--config={ROOT}"], "does not exist"),
    "unknown connection": ([f"{DEMO}:mch"], "connection.kind is 'mch'; it must be one of 'residual', 'hc', 'mhc'"),
    "unknown setting": ([f"{DEMO}:mhc:innit=home"], "'innit'"),
    "extra argument": ([DEMO, "steps=3"], "Unexpected argument 'steps=3'; settings are given as --name=value"),
    "no text": ([DEMO, "--config.data.source=/none.txt"], "There is no file '/none.txt'"),
}

COMPARE = {
    "twice": (["--connections=mhc,mhc"], "Points {connection: mhc} and {connection: mhc} are the same configuration"),
    "twice in other words": (
        ["--connections=hc,hc:num_streams=4"],
        "{connection: hc:num_streams=4} are the same configuration",
    ),
    "unknown": (["--connections=residual,hyper"], "connection.kind is 'hyper'"),
    "none": (["--connections="], "--connections is empty; name at least one"),
    "no seeds": (["--seeds=0"], "--seeds is 0; it must be at least 1."),
}

FILES = {
    "syntax": ("def get_config(:\n", "is not Python: invalid syntax (line 1)."),
    "import": (
        "import json\nimport no_such_module\n",
        "fails at line 2: ModuleNotFoundError: No module named 'no_such",
    ),
    "raises": ("def get_config():\n    raise ValueError('two\\nlines')\n", "fails at line 2: ValueError: two lines"),
    "no get_config": ("value = 1\n", "has no attribute 'get_config'"),
    "not a ConfigDict": ("get_config = dict\n", "get_config of the config file returned a dict"),
    "unknown key": (
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'modle': {}})\n",
        "A key of config is 'modle'",
    ),
}
TABLES = {"train": TRAIN, "compare": COMPARE}


def check(folder, script, arguments, sentence):
    workdir = [f"--workdir={folder / 'run'}"] * ("--workdir is missing" not in sentence)
    status, _, text = run_here(script, *workdir, *arguments)
    assert (status, text.count("\n")) == (2, 1), text
    assert text.startswith("error: ")
    assert sentence in text
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("script", "case"), [(script, case) for script, table in TABLES.items() for case in table])
def test_a_mistake_is_one_line_and_writes_nothing(script, case, tmp_path):
    check(tmp_path, script, *TABLES[script][case])


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_a_config_file(case, tmp_path):
    content, sentence = FILES[case]
    (tmp_path / f"{case}.py").write_text(content)
    check(tmp_path, "train", [f"--config={tmp_path}/{case}.py"], sentence)


def test_a_disk_error_behind_another_error_is_one_sentence(tmp_path, monkeypatch):
    """Matplotlib, whose file could not be written, fails once more as it closes it."""

    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "page.pdf")
        finally:
            raise AttributeError("pos")

    monkeypatch.setattr("mhc_jax.reports.page.write_folder_report", full)
    status, _, error = run_here("report", tmp_path)
    told = "error: Cannot use the disk 'page.pdf': No space left on device; mend that and run the same command again.\n"
    assert (status, error) == (2, told)

    def unknown(*_):
        try:
            full()
        except AttributeError:
            raise RuntimeError("not of the disk") from None

    monkeypatch.setattr("mhc_jax.reports.page.write_folder_report", unknown)
    with pytest.raises(RuntimeError, match="not of the disk"):
        run_here("report", tmp_path)
