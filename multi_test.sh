#!/bin/sh
# Evaluates all eight benchmarks, one per GPU at a time (one after the other without a GPU), then
# prints one table and writes it to WORK_DIR/summary.md and summary.json.
# An interrupted run resumes; --no-resume starts over.
#
#   DATA_ROOT=/data sh multi_test.sh
#   CONFIGS="configs/cfg_voc21.py configs/cfg_ade20k.py" WORK_DIR=work/two sh multi_test.sh --method sclip
#
# Environment: CONFIGS (all eight), WORK_DIR (work/all), CUDA_VISIBLE_DEVICES (all GPUs), GPUS (number
# of these to use; default: all), PYTHON (python), DATA_ROOT (data). Arguments are passed to every
# tools/test.py.
#
# Exit code: 0 if every benchmark was evaluated; 3 if some were skipped because their data or weights
# are missing; 1 if one failed; 2 if there are fewer GPUs than GPUS. The output of each run is in
# WORK_DIR/<config name>/output.txt.
set -eu
TOOLS=$(dirname "$0")/tools
# shellcheck source=tools/benchmarks.sh
. "$TOOLS/benchmarks.sh"
WORK_DIR=${WORK_DIR:-work/all}
GPUS=${GPUS:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
given=${CUDA_VISIBLE_DEVICES:-}
if [ -n "$given" ] && [ "$GPUS" -gt "$(echo "$given" | tr , '\n' | wc -l)" ]; then
    echo "error: GPUS=$GPUS, but CUDA_VISIBLE_DEVICES=$given has fewer" >&2
    exit 2
fi

# One worker per GPU runs every GPUS-th config; without a GPU a single worker runs all of them.
worker() {
    number=$1
    shift
    position=0
    for config in $CONFIGS; do
        if [ $((position % workers)) -eq "$number" ]; then
            start "$config"
            if [ "$GPUS" -gt 0 ]; then
                gpu=$number
                if [ -n "$given" ]; then
                    gpu=$(echo "$given" | cut -d , -f "$((number + 1))")
                fi
                export CUDA_VISIBLE_DEVICES="$gpu"
            fi
            echo "$name: started"
            code=0
            "$PYTHON" "$TOOLS/test.py" "$config" --work-dir "$folder" "$@" \
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
finish
