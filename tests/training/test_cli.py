"""The scripts: every mistake is one line on standard error, exit status 2, and nothing is written."""

import json
import subprocess
import sys

import pytest
from support.tiny_runs import ROOT

DEMO = f"--config={ROOT}/experiments/configs/demo.py"

# Runs command lines of scripts in forks of one process: the imports are paid once.
DRIVER = """
import json, os, runpy, sys
import mhc_jax.paired, absl.app, ml_collections
scripts, cases, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
for k, (name, *case) in enumerate(cases):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}/{k}", os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [f"{scripts}/{name}.py", *case]
        status = 1
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
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
    "no folder": ([DEMO], "error: --workdir is missing; give --workdir=..."),
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


CASES = {
    (script, name): case for script, table in (("train", TRAIN), ("compare", COMPARE)) for name, case in table.items()
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Exit status and standard error of each command line, and whether one of them has written a run folder."""
    folder = tmp_path_factory.mktemp("cli")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    commands = []
    for (script, name), (arguments, _) in CASES.items():
        workdir = [f"--workdir={folder / 'run'}"] * (name != "no folder")
        commands.append([script, *workdir, *(argument.replace("FOLDER", str(folder)) for argument in arguments)])
    driver = [sys.executable, "-c", DRIVER, str(ROOT / "experiments"), json.dumps(commands), str(folder)]
    done = subprocess.run(driver, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [(int(status), (folder / str(k)).read_text()) for k, status in enumerate(done.stdout.split())]
    return dict(zip(CASES, found, strict=True)) | {"written": (folder / "run").exists()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_mistake_is_one_line_and_writes_nothing(case, told):
    status, text = told[case]
    assert status == 2, text
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text
    assert CASES[case][1] in text
    assert not told["written"], "by any of them"
