#!/bin/sh
# Runs checks and benchmarks on one GPU from a checkout, in at most six minutes:
#
#     tools/gpu_check.sh [WHEELS] [ARGUMENTS of tools/gpu_check.py]
#
# python3 (or $PYTHON) must have PyTorch. Other missing packages can be given as wheels in the folder
# WHEELS, which are unpacked without a network into a folder that is removed afterwards. Needed are ftfy,
# wcwidth, regex, numpy, opencv-python-headless, matplotlib, pillow, scikit-learn, scipy, safetensors, rich,
# pytest and hypothesis; pytest-xdist makes it faster. To fill the folder where there is a network:
#
#     pip download --only-binary :all: --no-deps -d WHEELS ftfy wcwidth ...
#
# Results: gpu_check.json, and tables on standard output.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
path=$here
if [ $# -gt 0 ] && [ -d "$1" ]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$python" -m pip install -q --no-index --no-deps --target "$scratch" "$1"/*.whl
    path=$path:$scratch
    shift
fi
PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/tools/gpu_check.py" "$@"
