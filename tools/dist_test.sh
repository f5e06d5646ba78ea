#!/usr/bin/env bash
# Evaluate on the GPUs of this machine, or on its CPU where it has none:
#
#     tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
#
# Several machines and PYTHON: as in tools/dist_train.sh.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,6s/^# \?//p' "$0" >&2; exit 2; }
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" "$3" test.py "$1" "$2" "${@:4}"
