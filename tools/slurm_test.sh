#!/usr/bin/env bash
# Evaluate as a Slurm job, one task per GPU:
#
#     GPUS=8 tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
#
# The variables: as in tools/slurm_train.sh.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,6s/^# \?//p' "$0" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/srun.sh" "$1" "$2" test.py "$3" "$4" "${@:5}"
