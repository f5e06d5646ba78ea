"""Draw Theorem 1, the decay dynamics and the forecast as PNG: half a minute on a CPU.

With --runs, also FOLDER/collapse.html: the page of these training runs with the pictures.
"""

import argparse
from pathlib import Path

from psbn_mmdet.collapse.trace import read
from psbn_mmdet.errors import errors_in_one_line, refuse_to_overwrite, require_packages

NAMES = ("theory_K", "theory_drift", "theory_decay", "theory_forecast")


def run(args: argparse.Namespace) -> None:
    require_packages("theory", "scipy", "matplotlib")
    from psbn_mmdet.theory.figures import FIGURES

    runs = {str(place): read(place) for place in args.runs or ()}
    files = {name: args.folder / f"{name}.png" for name in args.only or FIGURES}
    page = args.folder / "collapse.html"
    if runs:
        require_packages("report", "plotly", "jinja2")
    args.folder.mkdir(parents=True, exist_ok=True)
    outputs = [*files.values(), *([page] if runs else [])]
    refuse_to_overwrite(*outputs, overwrite=args.overwrite)
    for name, file in files.items():
        FIGURES[name]().savefig(file, dpi=args.dpi)
        print(file)
    if runs:
        from psbn_mmdet.collapse.page import write_page

        captions = {str(FIGURES[name].__doc__).splitlines()[0]: f for name, f in files.items()}
        print(write_page(runs, page, pictures=captions))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--only", choices=NAMES, action="append", help="may be given again")
    parser.add_argument("--dpi", type=int, default=120)
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="RUN", help="work dirs or trace files for the page"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    with errors_in_one_line():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
