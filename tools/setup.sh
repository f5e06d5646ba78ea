#!/usr/bin/env bash
# Set up everything that the project needs, in .venv. Run again, it returns at
# once.
#
#     tools/setup.sh            PYTHON=python3.11 tools/setup.sh
#
# Where $PYTHON (python3 unless set) already imports torch and mmcv's operators,
# these are used. Otherwise torch is installed and mmcv compiled from its sdist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
MMCV=mmcv==2.1.0
venv=.venv
py=$venv/bin/python
done_file=$venv/.setup-done

say() { printf '[setup %3d s] %s\n' $SECONDS "$*"; }
die() { printf '[setup] %s\n' "$*" >&2; exit 1; }
has_mmcv_ops() { "$1" -c 'import torch, mmcv.ops' >/dev/null 2>&1; }

# Run a command with its output in a log that is shown only when it fails.
quietly() {
    local log=$work/$1.log
    shift
    "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; die "failed: $*"; }
}

# Nine of ten seconds of compiling mmcv go into parsing torch's headers, the
# same ones in each of its files. A precompiled header does it once. gcc ignores
# it where a flag differs, so the flags of the build are spelled out here.
precompile_header() {
    local includes
    mapfile -t includes < <("$py" -c '
import sysconfig
from torch.utils.cpp_extension import include_paths
for path in [*include_paths(), sysconfig.get_path("include")]:
    print("-I" + path)')
    echo '#include <torch/types.h>' >"$work/torch.h"
    g++ -x c++-header "${flags[@]}" -fPIC -std=c++17 -DTORCH_API_INCLUDE_EXTENSION_H \
        -DTORCH_EXTENSION_NAME=_ext "${includes[@]}" "$work/torch.h" -o "$work/torch.h.gch" \
        >"$work/header.log" 2>&1
}

install_mmcv() {
    local flags=(-O2 -DNDEBUG -fwrapv -g0 -w) pip compiled tag
    tag=$("$py" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    if "$py" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        flags=()  # nvcc takes part: the plain build
    elif [ $# -eq 0 ] && "$py" -m pip cache list mmcv 2>/dev/null | grep -q "^ - mmcv-.*-$tag-"; then
        :  # a wheel that pip has kept: nothing to compile
    else
        say "precompiling torch's headers for mmcv"
        if precompile_header; then
            flags+=(-include "$work/torch.h")
        else
            say 'could not precompile them: mmcv takes about 10 minutes instead of 3'
        fi
    fi
    say "$MMCV: compiling its operators, unless pip has kept them"
    mkdir -p "$work/tmp"
    # Empty CFLAGS would take Python's own away, optimisation with them.
    env ${flags[@]+CFLAGS="${flags[*]}"} MAX_JOBS="$(nproc)" TMPDIR="$work/tmp" \
        PYTHONPATH="$PWD/tools/mmcv_on_python313${PYTHONPATH:+:$PYTHONPATH}" "$py" -m pip install \
        --no-build-isolation --no-binary mmcv "$@" $MMCV >"$work/mmcv.log" 2>&1 &
    pip=$!
    while sleep 5; kill -0 $pip 2>/dev/null; do
        compiled=$(find "$work/tmp" -name '*.o' 2>/dev/null | wc -l)
        ((SECONDS % 20 >= 5 || compiled == 0)) || say "mmcv: $compiled files of 77 compiled"
    done
    wait $pip || { tail -n 40 "$work/mmcv.log" >&2; die "$MMCV did not compile; its log ends above"; }
}

wanted=$(cat requirements.txt setup.py tools/setup.sh | cksum)
[ "$(cat $done_file 2>/dev/null)" != "$wanted" ] || exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ ! -x $py ]; then
    "$PYTHON" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' ||
        die "needs Python 3.10 to 3.13, and $PYTHON is $("$PYTHON" --version 2>&1 || true): set PYTHON"
    say "creating $venv"
    "$PYTHON" -m venv $venv
    if has_mmcv_ops "$PYTHON"; then
        say "$PYTHON has torch and mmcv: using them"
        # Not --system-site-packages, which passes over a virtual environment.
        "$PYTHON" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
            >"$($py -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/around.pth"
    fi
fi
requirements=requirements.txt
if has_mmcv_ops $py; then
    # What is there is used, whatever its version; only what is missing is installed.
    requirements=$work/requirements.txt
    sed 's/==.*//' requirements.txt >"$requirements"
fi
say 'installing the packages of requirements.txt'
quietly packages $py -m pip install -r "$requirements"
if ! has_mmcv_ops $py; then
    install_mmcv
    # pip keeps the compiled wheel under mmcv's name and version alone, and it
    # fits only the torch that it was compiled with.
    has_mmcv_ops $py || install_mmcv --no-cache-dir --force-reinstall --no-deps
    has_mmcv_ops $py || die "mmcv does not import: $($py -c 'import mmcv.ops' 2>&1 | tail -n 1)"
fi
quietly project $py -m pip install --no-build-isolation --no-deps -e .
echo "$wanted" >$done_file
say 'done'
