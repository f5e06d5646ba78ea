"""Draw Theorem 1, the decay dynamics and the forecast as PNG: half a minute on a CPU."""

import argparse
import sys
from pathlib import Path

from psbn_mmdet.theory_figures import FIGURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--only", choices=FIGURES, action="append", help="may be given again")
    parser.add_argument("--dpi", type=int, default=120)
    args = parser.parse_args()
    files = {name: args.folder / f"{name}.png" for name in args.only or FIGURES}
    for file in files.values():
        if file.exists():
            sys.exit(
                f"{Path(sys.argv[0]).name}: {file} exists: move it away or name another folder"
            )
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            FIGURES[name]().savefig(file, dpi=args.dpi)
            print(file)
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: cannot write to {args.folder}: {error.strerror}")


if __name__ == "__main__":
    main()
