#!/usr/bin/env bash
# Train on the GPUs of this machine, or on its CPU where it has none:
#
#     tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
#
# On several machines, the same on each: NNODES=2 NODE_RANK=0 MASTER_ADDR=HOST
# PORT=29500 before it. PYTHON names another interpreter.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \?//p' "$0" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" "$2" train.py "$1" "${@:3}"
