#!/bin/sh
# Measure this checkout on the CUDA card of this machine: speed, memory and agreement with the CPU. No download, no
# labels: weights are random, of true size. Results go to runs/device_check, or to the folder given with -o.
#
#     scripts/device_check.sh                 # at most 12 minutes, and about 20 GB of RAM disk or disk for a while
#     scripts/device_check.sh --minutes 30
#     scripts/device_check.sh --dry-run       # the same stages with tiny models on the CPU, to test the script
#
# See device_check.py, or --help, for all options. PYTHON names another interpreter than python3.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" scripts/device_check.py "$@"
