#!/bin/sh
# Checks and measures the package on one GPU, in six minutes at most, from a checkout:
#
#     tools/gpu_check.sh [WHEELS] [ARGUMENTS of tools/gpu_check.py]
#
# PyTorch is that of python3 (or of $PYTHON). What that lacks is installed from the folder WHEELS, into
# a virtual environment that is removed afterwards, without a network. To fill it where there is one:
#
#     pip download --only-binary :all: -d WHEELS with the names in PACKAGES below
#
# Results: gpu_check.json, and tables on standard output.
set -eu
PACKAGES="ftfy regex numpy opencv-python matplotlib pillow scikit-learn scipy safetensors rich pytest hypothesis"
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
if [ $# -gt 0 ] && [ -d "$1" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m venv --system-site-packages "$scratch/venv"
    python=$scratch/venv/bin/python
    # shellcheck disable=SC2086 # words
    "$python" -m pip install -q --no-index --find-links "$1" $PACKAGES
    shift
fi
PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/tools/gpu_check.py" "$@"
