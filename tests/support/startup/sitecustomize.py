"""Python runs this file when it starts with this folder on its path: a process that trains then sends a signal at a step.

$SIGNAL_AT_STEP is JSON: label of the run -> [step, signal, "self" or "parent"].  The signal is sent while the metrics of the step
are read.  A process that has signalled its parent waits until it is asked to stop, so that speed does not matter.
"""

import json
import os
import signal
import time

if os.environ.get("SIGNAL_AT_STEP"):
    from mhc_jax import loop

    asked, read = json.loads(os.environ["SIGNAL_AT_STEP"]), loop.read

    def reading(run, history, at, metrics):
        step, number, whom = asked.get(run.progress.label, (0, 0, ""))
        if at == step:
            handler = signal.getsignal(signal.SIGTERM)
            os.kill(os.getpid() if whom == "self" else os.getppid(), number)
            while whom == "parent" and signal.getsignal(signal.SIGTERM) is handler:
                time.sleep(0.01)  # StopRequest takes its handler back once it was called
        read(run, history, at, metrics)

    setattr(loop, "read", reading)
