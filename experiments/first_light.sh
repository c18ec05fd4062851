#!/usr/bin/env bash
# Measure this GPU, on a machine that has Python 3.12, jax, flax, optax, orbax and torch, and no network:
#
#     make first-light-wheels                      # before, where there is a network
#     experiments/first_light.sh [FOLDER [BUDGET]] # on the machine; the same command goes on where it stopped
#
# It installs the wheels in .wheels/ for this run alone, and leaves report.json and README.md in FOLDER (default: first-light).
# BUDGET is in seconds (default: 480).  Further arguments go to device_report.py.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-first-light} budget=${2:-480}
shift $(($# < 2 ? $# : 2))
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$root/.wheels/*.whl" > /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$root"/.wheels/*.whl ||
        echo "The wheels could not be installed: parts that need them will be reported as failed." >&2
else
    echo "There are no wheels in .wheels/ (make first-light-wheels): parts that need them will be reported as failed." >&2
fi
export PYTHONPATH="$root:$root/kernels:$site${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$root/experiments/device_report.py" --workdir="$folder" --budget="$budget" "$@"
