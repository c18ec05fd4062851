"""The command `python -m mhc_jax settings`."""

import signal
import sys

from mhc_jax.cli.settings import main

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `| head` ends it without an error
    sys.exit(main(sys.argv[1:]))
