#!/bin/sh
# Evaluates benchmarks one after the other, each with several processes (torchrun; nccl on GPUS GPUs,
# gloo on a CPU), then prints the summary table. The numbers equal those of one process.
# An interrupted run resumes; --no-resume starts over.
#
#   GPUS=8 sh distribute_test.sh
#   GPUS=2 CONFIGS=configs/cfg_mini.py WORK_DIR=work/mini2 sh distribute_test.sh
#
# Environment: GPUS (2), CONFIGS (all eight), WORK_DIR (work/distributed), PORT (29500), PYTHON
# (python), DATA_ROOT (data). Arguments are passed to every tools/test.py. Exit codes as in multi_test.sh.
set -eu
TOOLS=$(dirname "$0")/tools
# shellcheck source=tools/benchmarks.sh
. "$TOOLS/benchmarks.sh"
WORK_DIR=${WORK_DIR:-work/distributed}

for config in $CONFIGS; do
    start "$config"
    echo "$name: ${GPUS:-2} processes"
    code=0
    # one process reports missing data or weights at once; torchrun would hide its exit code
    "$PYTHON" "$TOOLS/test.py" "$config" --work-dir "$folder" "$@" --check || code=$?
    if [ "$code" -eq 0 ]; then
        "$PYTHON" -m torch.distributed.run --nproc_per_node="${GPUS:-2}" \
            --master_port="${PORT:-29500}" \
            "$TOOLS/test.py" "$config" --launcher pytorch --work-dir "$folder" "$@" || code=1
    fi
    echo "$code" >"$folder/exit_code"
done
finish
