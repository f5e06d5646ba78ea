"""Lay training runs side by side in one HTML page, and draw figures of each.

    psbn plot work_dirs/retinanet_bn_500 work_dirs/retinanet_psbn_500 --html page.html
    psbn plot BN=work_dirs/a psBN=work_dirs/b/collapse.trace --png figures

A run is the collapse.trace that SparsityLoggerHook writes, or the work dir it is in;
NAME= says what to call it. Runs that are still going on, or were killed, are drawn as
far as they got.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..collapse.trace import Trace, read
from ..errors import (
    PsbnError,
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
)


def load(arguments: list[str]) -> dict[str, Trace]:
    """Name -> run; a name that comes twice gets a number."""
    runs: dict[str, Trace] = {}
    for argument in arguments:
        name, equals, place = argument.partition("=")
        path = Path(place if equals else argument)
        if not equals:
            name = path.resolve().name if path.is_dir() else path.resolve().parent.name
        unique, number = name, 2
        while unique in runs:
            unique, number = f"{name} ({number})", number + 1
        runs[unique] = read(path)
    return runs


def run(args: argparse.Namespace) -> None:
    if not (args.html or args.png):
        raise PsbnError("say where to: --html FILE, --png FOLDER or both")
    refuse_to_overwrite(args.html, args.png, overwrite=args.overwrite)
    require_packages("report", "matplotlib", "plotly", "jinja2")
    from ..collapse.figures import write_figures
    from ..collapse.page import write_page

    runs = load(args.runs)
    for name, trace in runs.items():
        print(f"{name}, {trace.moment(-1)}:\n{trace.report().summary()}\n")
    if args.html:
        print(f"written to {write_page(runs, args.html)}")
    if args.png:
        for number, trace in enumerate(runs.values(), 1):
            folder = args.png / str(number) if len(runs) > 1 else args.png
            write_figures(trace, folder)
            print(f"written to {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="[NAME=]RUN", help="trace file or work dir")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write figures of each run")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()
    with errors_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
