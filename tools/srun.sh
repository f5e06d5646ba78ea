#!/usr/bin/env bash
# tools/srun.sh PARTITION JOB_NAME PROGRAM ARGUMENTS: run a program of this
# folder in GPUS tasks of a Slurm job. GPUS_PER_NODE=0 asks for none.
set -euo pipefail
tools=$(dirname "$(readlink -f "$0")")
GPUS=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
[ "$GPUS" -ge "$per_node" ] || per_node=$GPUS
command -v srun >/dev/null || {
    echo "srun is not here: run this on a login node of a Slurm cluster, or use tools/dist_*.sh" >&2
    exit 1
}
resources=(--ntasks "$GPUS" --cpus-per-task "${CPUS_PER_TASK:-5}")
[ "$per_node" -eq 0 ] || resources+=(--gres "gpu:$per_node" --ntasks-per-node "$per_node")
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck disable=SC2086  # SRUN_ARGS holds several words
exec srun --partition "$1" --job-name "$2" "${resources[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS-} \
    "${PYTHON:-python}" -u "$tools/$3" "${@:4}" --launcher slurm
