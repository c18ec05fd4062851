"""The scripts: every mistake is one line on standard error, exit status 2, and nothing is written."""

import json
import subprocess
import sys

import pytest
from support.tiny_runs import ROOT, flags_of, tiny, write_text

DEMO = f"--config={ROOT}/experiments/configs/demo.py"

# Runs many command lines of a script in forks of one process: the imports (2 s) are paid once.
DRIVER = """
import contextlib, io, json, os, runpy, sys
script, cases, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
import mhc_jax.paired, absl.app, ml_collections
for k, case in enumerate(cases):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}/{k}", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [script, *case]
        status = 1
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

CONFIGS = {
    "syntax.py": "def get_config(:\n",
    "import.py": "import json\nimport no_such_module\n",
    "raises.py": "def get_config():\n    raise ValueError('two\\nlines')\n",
    "nothing.py": "value = 1\n",
    "wrong.py": "def get_config():\n    return {'model': 1}\n",
    "key.py": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'modle': {}})\n",
}

TRAIN = {
    "unknown flag": ([DEMO, "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
    "unknown key": ([DEMO, "--config.model.widht=3"], "The configuration has no key 'widht'. Did you mean 'width'?"),
    "unknown key, nothing near": ([DEMO, "--config.model.qqq=3"], "The configuration has no key 'qqq'. "),
    "not an int": ([DEMO, "--config.train.steps=many"], "--config.train.steps is 'many'; it must be of type int."),
    "not a float": ([DEMO, "--config.optimizer.b1=x"], "--config.optimizer.b1 is 'x'; it must be of type float."),
    "not a bool": (
        [DEMO, "--config.model.tied_embeddings=5"],
        "--config.model.tied_embeddings is '5'; it must be of type bool.",
    ),
    "no value": ([DEMO, "--config.train.steps"], "Missing value for flag --config.train.steps"),
    "a section": ([DEMO, "--config.model=3"], "flag --config.model=3"),
    "below a value": ([DEMO, "--config.train.steps.x=3"], "train.steps.x"),
    "refused value": ([DEMO, "--config.train.steps=0"], "train.steps is 0; it must be at least 1."),
    "no config file": (["--config=none.py"], "The config file 'none.py' does not exist"),
    "no config file, two words": (["--config", "none.py"], "The config file 'none.py' does not exist"),
    "a folder": ([f"--config={ROOT}"], "does not exist"),
    "unknown connection": ([f"{DEMO}:mch"], "connection.kind is 'mch'; it must be one of 'residual', 'hc', 'mhc'"),
    "unknown setting": ([f"{DEMO}:mhc:innit=home"], "'innit'"),
    "extra argument": ([DEMO, "steps=3"], "Unexpected argument 'steps=3'; settings are given as --name=value"),
    "no text": ([DEMO, "--config.data.source=/none.txt"], "There is no file '/none.txt'"),
    "syntax": (["--config=FOLDER/syntax.py"], "is not Python: invalid syntax (line 1)."),
    "import": (["--config=FOLDER/import.py"], "fails at line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    "raises": (["--config=FOLDER/raises.py"], "fails at line 2: ValueError: two lines"),
    "no get_config": (["--config=FOLDER/nothing.py"], "has no attribute 'get_config'"),
    "not a ConfigDict": (["--config=FOLDER/wrong.py"], "get_config of the config file returned a dict"),
    "file with unknown key": (["--config=FOLDER/key.py"], "A key of config is 'modle'"),
}

COMPARE = {
    "twice": (["--connections=mhc,mhc"], "Connections 'mhc' and 'mhc' are the same"),
    "twice in other words": (
        ["--connections=mhc,mhc:init=paper"],
        "Connections 'mhc' and 'mhc:init=paper' are the same",
    ),
    "unknown": (["--connections=residual,hyper"], "connection.kind is 'hyper'"),
    "none": (["--connections="], "No connection is given"),
    "no seeds": (["--seeds=0"], "--seeds is 0; it must be at least 1."),
}


def outcomes(script, cases, folder):
    """(exit status, standard error) of each command line."""
    folder.mkdir()
    command = [sys.executable, "-c", DRIVER, str(ROOT / "experiments" / script), json.dumps(cases), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return [(int(s), (folder / str(k)).read_text()) for k, s in enumerate(done.stdout.split())]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    run = f"--workdir={folder / 'run'}"
    out = {}
    for script, table in (("train.py", TRAIN), ("compare.py", COMPARE)):
        cases = [[run] + [a.replace("FOLDER", str(folder)) for a in arguments] for arguments, _ in table.values()]
        out |= dict(zip(table, outcomes(script, cases, folder / script), strict=True))
    out["written"] = (folder / "run").exists()
    return out


@pytest.mark.parametrize("case", [*TRAIN, *COMPARE])
def test_a_mistake_is_one_line(case, told):
    status, text = told[case]
    assert status == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    assert (TRAIN | COMPARE)[case][1] in text


def test_no_mistake_writes_anything(told):
    assert told["written"] is False


def test_the_run_folder_is_asked_for(tmp_path):
    ((status, text),) = outcomes("train.py", [[DEMO]], tmp_path / "out")
    assert (status, text.count("\n")) == (2, 1)
    assert text.startswith("error: --workdir is missing; give --workdir=...")


def test_settings_reach_the_run(tmp_path):
    """Flags that spell out a configuration give exactly that configuration, and a run that says where it is."""
    config = tiny(write_text(tmp_path / "text.txt"), "residual", train={"steps": 2}, optimizer={"warmup_steps": 0})
    cases = [[*flags_of(config), f"--workdir={tmp_path / 'run'}"]] * 2
    first, second = outcomes("train.py", cases, tmp_path / "out")
    assert (first[0], second[0]) == (0, 0), first[1]
    from mhc_jax.mapping import to_mapping

    assert json.loads((tmp_path / "run" / "config.json").read_text()) == to_mapping(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert all(line.startswith("run: ") for line in first[1].splitlines()), first[1]
    assert second[1] == "", "a run that has ended is not repeated"
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert {"date", "commit", "dirty", "python", "device", "packages", "data"} <= set(env)
    assert env["packages"]["jax"]
    assert env["data"]["source"] == config.data.source
