#!/bin/sh
# Evaluates benchmarks with several processes each (torchrun; nccl on GPUS GPUs, gloo on a CPU), one
# benchmark after the other, then prints the summary table. The numbers equal those of one process.
# A killed run continues where it stopped; --no-resume starts over.
#
#   GPUS=8 sh distribute_test.sh
#   GPUS=2 CONFIGS=configs/cfg_mini.py WORK_DIR=work/mini2 sh distribute_test.sh
#
# Environment: GPUS (2), CONFIGS (all eight), WORK_DIR (work/distributed), PORT (29500), PYTHON
# (python), DATA_ROOT (data). Arguments go to every tools/test.py. Exit codes as in multi_test.sh.
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
WORK_DIR=${WORK_DIR:-work/distributed}
CONFIGS=${CONFIGS:-"configs/cfg_voc21.py configs/cfg_context60.py configs/cfg_coco_object.py \
configs/cfg_voc20.py configs/cfg_context59.py configs/cfg_coco_stuff164k.py configs/cfg_ade20k.py \
configs/cfg_city_scapes.py"}

folders=
status=0
for config in $CONFIGS; do
    name=$(basename "$config" .py)
    folder=$WORK_DIR/$name
    folders="$folders $folder"
    mkdir -p "$folder"
    rm -f "$folder/metrics.json"
    echo "$name: ${GPUS:-2} processes"
    code=0
    # Data or weights that are missing show up at once with one process, and torchrun would bury the
    # exit code; --check only looks.
    "$PYTHON" tools/test.py "$config" --work-dir "$folder" "$@" --check || code=$?
    if [ "$code" -eq 0 ]; then
        "$PYTHON" -m torch.distributed.run --nproc_per_node="${GPUS:-2}" \
            --master_port="${PORT:-29500}" \
            tools/test.py "$config" --launcher pytorch --work-dir "$folder" "$@" || code=1
    fi
    case $code in
        0) ;;
        3) [ "$status" -eq 0 ] && status=3 ;;
        *) status=1 ;;
    esac
done
# shellcheck disable=SC2086  # a list of folders
"$PYTHON" tools/summary.py $folders --out "$WORK_DIR/summary"
exit "$status"
