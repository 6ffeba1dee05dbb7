#!/bin/sh
# Evaluates one config. By default this is SFP on the built-in mini world, which needs no download, followed
# by plain CLIP, SCLIP and SFP with and without purification in one pass, with confidence intervals.
#
#   sh test.sh
#   CONFIG=configs/cfg_voc21.py WORK_DIR=work/voc21 sh test.sh
#   CONFIG=configs/cfg_voc21.py sh test.sh --method sclip --weights ViT-L/14
#
# Environment: CONFIG (configs/cfg_mini.py), WORK_DIR (work/<config name>), PYTHON (python),
# DATA_ROOT (data). Arguments are passed to tools/test.py; its --help lists them. Relative paths refer
# to the current folder; the configs of the repository are found from any folder.
set -eu
here=$(dirname "$0")
python=${PYTHON:-python}
if [ -n "${CONFIG:-}" ] || [ $# -gt 0 ]; then
    if [ -n "${WORK_DIR:-}" ]; then
        set -- --work-dir "$WORK_DIR" "$@"
    fi
    exec "$python" "$here/tools/test.py" "${CONFIG:-configs/cfg_mini.py}" "$@"
fi
folder=${WORK_DIR:-work/cfg_mini}
"$python" "$here/tools/test.py" configs/cfg_mini.py --work-dir "$folder"
off=sfp:purify=False
exec "$python" -m sfp compare configs/cfg_mini.py --work-dir "$folder" --pictures 6 \
    --methods clip sclip $off sfp --paired $off
