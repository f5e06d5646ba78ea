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
[ -z "${BEFORE-}" ] || [ -f "$BEFORE" ] || { echo "BEFORE=$BEFORE: no such file" >&2; exit 2; }
[ -z "${BEFORE-}" ] || BEFORE=$(readlink -f "$BEFORE")
resources=(--ntasks "$GPUS" --cpus-per-task "${CPUS_PER_TASK:-5}")
[ "$per_node" -eq 0 ] || resources+=(--gres "gpu:$per_node" --ntasks-per-node "$per_node")
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
# Each task has what BEFORE does: conda and modules are no programs but change the shell.
before=(bash -c '[ -z "$0" ] || source "$0"; exec "$@"' "${BEFORE-}")
# shellcheck disable=SC2086  # SRUN_ARGS and CONTAINER hold several words
exec srun --partition "$1" --job-name "$2" "${resources[@]}" --kill-on-bad-exit=1 ${SRUN_ARGS-} \
    "${before[@]}" ${CONTAINER-} "${PYTHON:-python}" -u "$tools/$3" "${@:4}" --launcher slurm
