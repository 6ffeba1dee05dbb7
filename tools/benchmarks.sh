# shellcheck shell=sh
# Functions shared by multi_test.sh and distribute_test.sh, which read this file with `.`.
#
# Environment: CONFIGS (all eight), PYTHON (python). The caller sets TOOLS (this folder) and WORK_DIR;
# each run writes its exit code to the file exit_code in its folder.
PYTHON=${PYTHON:-python}
CONFIGS=${CONFIGS:-"configs/cfg_voc21.py configs/cfg_context60.py configs/cfg_coco_object.py \
configs/cfg_voc20.py configs/cfg_context59.py configs/cfg_coco_stuff164k.py configs/cfg_ade20k.py \
configs/cfg_city_scapes.py"}

# start CONFIG: sets `name` and `folder`, and removes the results of an earlier run there.
start() {
    name=$(basename "$1" .py)
    folder=$WORK_DIR/$name
    mkdir -p "$folder"
    rm -f "$folder/metrics.json" "$folder/exit_code"
}

# finish: prints and writes the table of all configs, and exits with 1 if one failed, else 3 if one was
# skipped, else 0.
finish() {
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
    "$PYTHON" "$TOOLS/summary.py" $folders --out "$WORK_DIR/summary"
    exit "$status"
}
