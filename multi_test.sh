#!/bin/sh
# Evaluates all eight benchmarks, one per GPU at a time (one after the other without a GPU), then
# prints one table and writes it to WORK_DIR/summary.md and summary.json.
# A killed run continues where it stopped; --no-resume starts over.
#
#   DATA_ROOT=/data sh multi_test.sh
#   CONFIGS="configs/cfg_voc21.py configs/cfg_ade20k.py" WORK_DIR=work/two sh multi_test.sh --method sclip
#
# Environment: CONFIGS (all eight), WORK_DIR (work/all), GPUS (how many to use; default all there
# are), PYTHON (python), DATA_ROOT (data). Arguments go to every tools/test.py.
#
# Exit code: 0 if every benchmark was evaluated; 3 if some were skipped because their data or weights
# are missing; 1 if one failed. What each run printed is in WORK_DIR/<config name>/output.txt.
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
WORK_DIR=${WORK_DIR:-work/all}
CONFIGS=${CONFIGS:-"configs/cfg_voc21.py configs/cfg_context60.py configs/cfg_coco_object.py \
configs/cfg_voc20.py configs/cfg_context59.py configs/cfg_coco_stuff164k.py configs/cfg_ade20k.py \
configs/cfg_city_scapes.py"}
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}

# One worker per GPU takes every GPUS-th config; without a GPU a single worker takes them all.
worker() {
    number=$1
    shift
    position=0
    for config in $CONFIGS; do
        if [ $((position % workers)) -eq "$number" ]; then
            name=$(basename "$config" .py)
            folder=$WORK_DIR/$name
            mkdir -p "$folder"
            rm -f "$folder/metrics.json"
            if [ "$GPUS" -gt 0 ]; then
                export CUDA_VISIBLE_DEVICES="$number"
            fi
            echo "$name: started"
            code=0
            "$PYTHON" tools/test.py "$config" --work-dir "$folder" "$@" \
                >"$folder/output.txt" 2>&1 || code=$?
            echo "$code" >"$folder/exit_code"
            case $code in
                0) echo "$name: done" ;;
                3) echo "$name: skipped. $(grep '^error:' "$folder/output.txt" | tail -n 1)" ;;
                *) echo "$name: failed, see $folder/output.txt" ;;
            esac
        fi
        position=$((position + 1))
    done
}

workers=$((GPUS > 0 ? GPUS : 1))
number=0
while [ "$number" -lt "$workers" ]; do
    worker "$number" "$@" &
    number=$((number + 1))
done
wait

folders=
status=0
for config in $CONFIGS; do
    folder=$WORK_DIR/$(basename "$config" .py)
    folders="$folders $folder"
    case $(cat "$folder/exit_code") in
        0) ;;
        3) [ "$status" -eq 0 ] && status=3 ;;
        *) status=1 ;;
    esac
done
# shellcheck disable=SC2086  # a list of folders
"$PYTHON" tools/summary.py $folders --out "$WORK_DIR/summary"
exit "$status"
