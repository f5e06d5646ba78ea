"""Draw Theorem 1, the decay dynamics and the forecast as PNG: half a minute on a CPU.

With --runs, also FOLDER/collapse.html: the page of these training runs with the pictures.
"""

import argparse
import sys
from pathlib import Path

from psbn_mmdet.collapse.page import write_page
from psbn_mmdet.collapse.trace import TraceError
from psbn_mmdet.theory.figures import FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--only", choices=FIGURES, action="append", help="may be given again")
    parser.add_argument("--dpi", type=int, default=120)
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="RUN", help="work dirs or trace files for the page"
    )
    args = parser.parse_args()
    files = {name: args.folder / f"{name}.png" for name in args.only or FIGURES}
    page = args.folder / "collapse.html"
    for file in [*files.values(), *([page] if args.runs else [])]:
        if file.exists():
            sys.exit(
                f"{Path(sys.argv[0]).name}: {file} exists: move it away or name another folder"
            )
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            FIGURES[name]().savefig(file, dpi=args.dpi)
            print(file)
        if args.runs:
            captions = {str(FIGURES[name].__doc__).splitlines()[0]: f for name, f in files.items()}
            runs = {str(run): run for run in args.runs}
            print(write_page(runs, page, pictures=captions))
    except TraceError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: cannot write to {args.folder}: {error.strerror}")


if __name__ == "__main__":
    main()
