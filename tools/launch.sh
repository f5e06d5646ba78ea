#!/usr/bin/env bash
# tools/launch.sh PROCESSES PROGRAM ARGUMENTS: run a program of this folder in so
# many processes. What cannot work ends in one line, before they are started.
set -euo pipefail
tools=$(dirname "$(readlink -f "$0")")
PYTHON=${PYTHON:-python}
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"

[ "${NNODES:-1}" -eq 1 ] || export PORT=${PORT:-29500}
[[ $1 =~ ^[0-9]+$ ]] || { echo "$1 is no number of processes" >&2; exit 2; }
"$PYTHON" "$tools/$2" "${@:3}" --check "$1"
if [ "${NNODES:-1}" -gt 1 ] || [ -n "${PORT-}" ]; then
    where=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$PORT")
else
    where=(--standalone) # a free port: runs side by side do not meet
fi
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node "$1" \
    "$tools/$2" "${@:3}" --launcher pytorch
