#!/usr/bin/env bash
# Table 2 of the psBN paper in one command: RetinaNet-R50 with BN and with psBN, at the image
# scales 500 and 800, several seeds each, then the comparison page.
#
#     tools/reproduce_table2.sh --dry-run          # every command, and the GPU hours
#     tools/reproduce_table2.sh                    # in turn, on the GPUs of this machine
#     tools/reproduce_table2.sh --slurm PARTITION  # a job array, the report as its dependent job
#
# The same command again skips finished runs and resumes killed ones.
#
#     --seeds N           runs per arm (3)
#     --gpus N            per run (all of this machine, 8 with --slurm); processes where no GPU is
#     --arms "A B"        of: bn_500 psbn_500 bn_800 psbn_800
#     --work-dir DIR      (work_dirs/table2)
#     --data-root DIR     where COCO-2017 is (the configs': data/coco/)
#     --ms-per-image MS   of training on one of your GPUs at scale 800, for the estimate
#     --cfg-options KEY=VALUE ...   for every run; last
#
# PYTHON names another interpreter; sbatch reads its own SBATCH_* variables.
set -euo pipefail
tools=$(dirname "$0")
export PYTHON=${PYTHON:-python}
die() { echo "reproduce_table2.sh: $*" >&2; exit 2; }

seeds=3 gpus="" arms="bn_500 psbn_500 bn_800 psbn_800" work=work_dirs/table2 data=() slurm=""
# mmdet publishes 52.63 ms for the inference of an image at scale 800 (V100, fp32, metafile.yml of
# its RetinaNet); with the backward pass a training step is taken as three of those.
inference_ms=52.63 train_ms="" dry="" only="" options=()
given=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1; shift; continue ;;
        --report) only=report; shift; continue ;;
        -h | --help) sed -n '2,/^set/s/^# \?//p' "$0" | head -n -1; exit 0 ;;
        --cfg-options) shift; options=("$@"); break ;;
    esac
    [ $# -ge 2 ] || die "$1: needs a value, or is no option; --help lists them"
    case $1 in
        --seeds) seeds=$2 ;;
        --gpus) gpus=$2 ;;
        --arms) arms=$2 ;;
        --work-dir) work=$2 ;;
        --data-root) data=(--data-root "$2") ;;
        --ms-per-image) train_ms=$2 ;;
        --slurm) slurm=$2 ;;
        --run) only=$2 ;; # one run, by its number: what a job of the array does
        *) die "$1: no such option; --help lists them" ;;
    esac
    shift 2
done

[[ $seeds =~ ^[1-9][0-9]*$ ]] || die "--seeds $seeds: wanted 1 or more"
[[ $train_ms =~ ^[0-9.]*$ ]] || die "--ms-per-image $train_ms: wanted a number of milliseconds"
for arm in $arms; do
    [[ $arm =~ ^(ps)?bn_(500|800)$ ]] || die "--arms: no arm $arm; wanted bn_500, psbn_500, bn_800, psbn_800"
done
if [ -z "$gpus" ]; then
    if [ -n "$slurm" ]; then gpus=8; else gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l); fi
    [ "$gpus" -gt 0 ] || { [ -n "$dry" ] && gpus=8; } ||
        die "no GPU on this machine; --gpus N runs N processes on its CPU all the same, for months"
fi
[[ $gpus =~ ^(1|2|4|8|16)$ ]] || die "--gpus $gpus: wanted 1, 2, 4, 8 or 16, which divide the 16 images of a step"

# shellcheck disable=SC2086  # a run is two words
runs=() # "arm seed", the seeds of an arm apart, so that an early stop leaves every arm some
for ((seed = 0; seed < seeds; seed++)); do
    for arm in $arms; do runs+=("$arm $seed"); done
done
config() { echo "$tools/../configs/retinanet/retinanet_$1.py"; }
folder() { echo "$work/$1_s$2"; }
# metrics.json is written after the results, so results of a killed test do not count
finished() { [ -s "$(folder "$@")/metrics.json" ] && [ ! "$(folder "$@")/metrics.json" -ot "$(folder "$@")/results.bbox.json" ]; }
overrides() { # of a run: its seed, 16 images per step, two checkpoints kept
    echo "randomness.seed=$1" "train_dataloader.batch_size=$((16 / gpus))" "default_hooks.checkpoint.max_keep_ckpts=2"
}
show() { printf '%q ' "$@" && echo; }
call() { if [ -n "$dry" ]; then show "$@"; else "$@"; fi; }

hours() { # GPU hours of a run: 12 epochs of train2017 and, after each, val2017; pixels scale the time
    awk -v arm="$1" -v infer="$inference_ms" -v train="${train_ms:-0}" 'BEGIN {
        pixels = arm ~ /500$/ ? 833 * 500 / (1333 * 800) : 1
        if (train == 0) train = 3 * infer
        printf "%.1f", 12 * (118287 * train + 5000 * train / 3) * pixels / 3.6e6 }'
}

one() { # train and test one run
    local arm=$1 seed=$2 dir settings all
    dir=$(folder "$arm" "$seed")
    if finished "$arm" "$seed"; then
        echo "# $dir: finished"
        return
    fi
    read -ra all <<<"$(overrides "$seed")"
    all+=("${options[@]}")
    settings="arm $arm, seed $seed, $gpus processes, ${data[*]} ${options[*]}"
    if [ -z "$dry" ]; then
        mkdir -p "$dir"
        [ ! -e "$dir/settings.txt" ] || [ "$(cat "$dir/settings.txt")" = "$settings" ] ||
            die "$dir: was begun with other settings ($(cat "$dir/settings.txt")); use those or another --work-dir"
        echo "$settings" >"$dir/settings.txt"
    fi
    echo "# $dir: about $(hours "$arm") GPU hours"
    if [ ! -e "$dir/trained.txt" ]; then
        call bash "$tools/dist_train.sh" "$(config "$arm")" "$gpus" --work-dir "$dir" --resume \
            "${data[@]}" --cfg-options "${all[@]}"
        [ -n "$dry" ] || cp "$dir/last_checkpoint" "$dir/trained.txt"
    fi
    local checkpoint="$dir/LAST_CHECKPOINT"
    [ ! -e "$dir/trained.txt" ] || checkpoint="$dir/$(basename "$(cat "$dir/trained.txt")")"
    call bash "$tools/dist_test.sh" "$(config "$arm")" "$checkpoint" "$gpus" --work-dir "$dir" \
        "${data[@]}" --cfg-options "${all[@]}"
}

report() {
    local named=() run
    for run in "${runs[@]}"; do named+=("${run% *}=$(folder $run)"); done
    # tools/test.py has looked at every image for every class.
    call "$PYTHON" "$tools/compare_ap.py" --table2 --missing-is-empty --overwrite \
        --html "$work/table2.html" --json "$work/table2.json" "${named[@]}"
}

check() { # what would only fail after hours
    local left=0 run free
    for run in "${runs[@]}"; do finished $run || left=$((left + 1)); done
    "$PYTHON" -c "import importlib.util as u; exit(not (u.find_spec('mmdet') and u.find_spec('plotly')))" ||
        die "$PYTHON: has no mmdet or no plotly; activate their environment, or name it: PYTHON=.venv/bin/python"
    [ "$left" -gt 0 ] || return 0
    mkdir -p "$work"
    # per run: three checkpoints of 38 million parameters and their momentum while the third is
    # written, results and logs
    free=$(df -Pk "$work" | awk 'NR == 2 {print int($4 / 1e6)}')
    [ "$free" -ge "$left" ] ||
        die "$work: $free GB free, $left unfinished runs need 1 GB each; free some or use another --work-dir"
    read -ra all <<<"$(overrides 0)"
    "$PYTHON" "$tools/train.py" "$(config "${runs[0]% *}")" --work-dir "$work" "${data[@]}" \
        --cfg-options "${all[@]}" "${options[@]}" --check "$gpus" >/dev/null
}

export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
case $only in
    report) report; exit ;;
    "") ;;
    *)
        [[ $only =~ ^[0-9]+$ ]] && [ "$only" -lt "${#runs[@]}" ] || die "--run $only: wanted 0 to $((${#runs[@]} - 1))"
        one ${runs[$only]}
        exit
        ;;
esac

[ -n "$dry" ] || check
todo=() sum=0
for i in "${!runs[@]}"; do
    finished ${runs[$i]} && continue
    todo+=("$i")
    sum=$(awk -v a="$sum" -v b="$(hours "${runs[$i]% *}")" 'BEGIN {print a + b}')
done
how="three times mmdet's published $inference_ms ms per inference on a V100 in fp32; --ms-per-image has yours"
[ -z "$train_ms" ] || how="$train_ms ms per training image at scale 800"
echo "# ${#todo[@]} of ${#runs[@]} runs to do, about $sum GPU hours on full COCO (an estimate: $how)"
if [ -z "$slurm" ]; then
    for run in "${runs[@]}"; do one $run; done
    report
    exit
fi

[ -n "$dry" ] || command -v sbatch >/dev/null ||
    die "sbatch is not here: run this on a login node of a Slurm cluster, or leave out --slurm"
for run in "${runs[@]}"; do [ -z "$dry" ] || one $run; done
again=$(printf '%q ' bash "$0" --gpus "$gpus" "${given[@]}")
again=${again/--dry-run /}
before=()
if [ ${#todo[@]} -gt 0 ]; then
    jobs=(sbatch --parsable --partition "$slurm" --job-name table2 --array "$(IFS=,; echo "${todo[*]}")"
        --gres "gpu:$gpus" --ntasks 1 --cpus-per-task $((5 * gpus)) --output "$work/slurm-%A_%a.log")
    run_one=${again/"bash $0 "/"bash $0 --run \$SLURM_ARRAY_TASK_ID "}
    if [ -n "$dry" ]; then
        show "${jobs[@]}" --wrap "$run_one"
        id=JOB
    else
        id=$("${jobs[@]}" --wrap "$run_one")
        id=${id%%;*}
        echo "# job array $id"
    fi
    before=(--dependency "afterok:$id" --kill-on-invalid-dep=yes)
fi
call sbatch --parsable --partition "$slurm" --job-name table2-report "${before[@]}" \
    --output "$work/slurm-report-%j.log" --wrap "${again/"bash $0 "/"bash $0 --report "}"
