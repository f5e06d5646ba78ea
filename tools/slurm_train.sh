#!/usr/bin/env bash
# Train as a Slurm job, one task per GPU:
#
#     GPUS=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#
# GPUS_PER_NODE (8), CPUS_PER_TASK (5) and SRUN_ARGS as in mmdet's own script. PYTHON names the
# interpreter. BEFORE=FILE is sourced by each task before it starts (conda, modules, NCCL's
# variables, data to a node's disk); CONTAINER="apptainer exec --nv IMAGE" goes before the
# interpreter.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,9s/^# \?//p' "$0" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/srun.sh" "$1" "$2" train.py "$3" --work-dir "$4" "${@:5}"
