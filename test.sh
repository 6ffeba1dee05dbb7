#!/bin/sh
# Evaluates one config; by default SFP on the embedded mini world, which needs no download.
#
#   sh test.sh
#   CONFIG=configs/cfg_voc21.py WORK_DIR=work/voc21 sh test.sh
#   CONFIG=configs/cfg_voc21.py sh test.sh --method sclip --weights ViT-L/14
#
# Environment: CONFIG (configs/cfg_mini.py), WORK_DIR (work/<config name>), PYTHON (python),
# DATA_ROOT (data). Arguments go to tools/test.py; its --help lists them. Relative paths start at the
# folder that this is called from; the configs of the repository are found from everywhere.
set -eu
if [ -n "${WORK_DIR:-}" ]; then
    set -- --work-dir "$WORK_DIR" "$@"
fi
exec "${PYTHON:-python}" "$(dirname "$0")/tools/test.py" "${CONFIG:-configs/cfg_mini.py}" "$@"
