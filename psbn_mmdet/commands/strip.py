"""Remove collapsed filters from a detector of mmdet: smaller and faster, the same outputs.

    psbn strip CONFIG CHECKPOINT OUT --data data/coco/val2017
    tools/test.py OUT/config.py OUT/model.pth
    tools/train.py OUT/config.py

OUT is a new folder with model.pth, config.py and record.json. config.py inherits CONFIG, works with
mmdet's own tools, and continues training from model.pth. record.json lists what was removed, what
was kept and why, and the proof.

The stripped network is proved to be wired as before, and its outputs are compared with the old
ones channel by channel, on your images or on random ones. If they differ by more than --tolerance,
nothing is written. If nothing can be removed, only record.json is written. psBN becomes BN, which
computes the same.

Any other model: psbn_mmdet.collapse.strip(model, images), in Python.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import load
from ..collapse import INACTIVE_BELOW, THRESHOLD, StripError
from ..collapse.calls import Calls, difference, time_in_pairs
from ..collapse.stripping import TOLERANCE, strip, summary
from ..errors import (
    OutputExistsError,
    PsbnError,
    errors_in_one_line,
    require_packages,
)
from .detector import add_input_arguments, build, open_detector, read_images, save_weights
from .terminal import working

CONFIG = '''"""{name} without its collapsed filters, as written by psbn strip."""

_base_ = {base!r}
model = dict(
    type="psbn_mmdet.Stripped",
    original={original!r},
    checkpoint="{{{{ fileDirname }}}}/model.pth",
)
load_from = "{{{{ fileDirname }}}}/model.pth"
'''


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` if all goes well, and else is gone."""
    with ExitStack() as on_failure:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
            on_failure.callback(shutil.rmtree, folder)
            yield folder
            folder.chmod(0o755)
            folder.rename(out)
        except OSError as error:
            raise PsbnError(f"{out}: cannot be written ({error.strerror})") from error
        on_failure.pop_all()


def write(folder: Path, cfg: Any, args: argparse.Namespace, stripped: Any, old: Any) -> None:
    """Weights, record and config."""
    save_weights(stripped.model, old, folder / "model.pth")
    (folder / "record.json").write_text(json.dumps(stripped.record, indent=1) + "\n")
    base = args.config if "::" in args.config else str(Path(args.config).resolve())
    name = Path(args.config.rpartition("::")[2]).name
    original = cfg.model.type
    if original in ("Stripped", "psbn_mmdet.Stripped"):  # again
        original = cfg.model.original
    text = CONFIG.format(name=name, base=base, original=original)
    (folder / "config.py").write_text(text)


def run(args: argparse.Namespace) -> None:
    require_packages("mmdet", "mmdet")
    from ..launch import load_config  # which needs mmengine

    if args.out.exists():
        raise OutputExistsError(f"{args.out}: exists already; remove it or name another folder")
    if args.rounds < 0:
        raise PsbnError(f"--rounds {args.rounds}: wanted 0 or more")
    cfg, checkpoint, model = open_detector(args)
    inputs: Any = (3, *args.size)
    if args.data:
        inputs = read_images(cfg, model, args.data, args.images)
    with working("stripping, then comparing the outputs"):
        stripped = strip(
            model,
            inputs,
            threshold=args.threshold,
            inactive_below=args.inactive_below,
            borders=args.borders,
            tolerance=args.tolerance,
        )
    record = stripped.record
    if not record["filters"]["removed"]:
        with new_folder(args.out) as folder:
            (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{summary(record)}\nwritten to {args.out}: only record.json (nothing to remove)")
        return
    call = Calls(model, inputs).first
    if args.rounds:
        with working("timing"):
            pairs = time_in_pairs(model, stripped.model, call, args.rounds)
        images = len(inputs) if isinstance(inputs, Tensor) else 2
        record["seconds"] = {
            "rounds": args.rounds,
            "before": statistics.median(a for a, _ in pairs) / images,
            "after": statistics.median(b for _, b in pairs) / images,
            "speedup": statistics.median(a / b for a, b in pairs),
        }
    with new_folder(args.out) as folder:
        write(folder, cfg, args, stripped, checkpoint)
        # What a user will build from these files is what was proved.
        new = build(
            load_config(str(folder / "config.py")), load(folder / "model.pth"), "the new checkpoint"
        )
        if difference(stripped.model, new, call).relative != 0:
            raise StripError("the model built from the files written computes something else")
    print(f"{summary(record)}\nwritten to {args.out}: model.pth, config.py, record.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser, "images to compare the two on", 4)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="of |gamma| (default %(default)s)"
    )
    parser.add_argument(
        "--inactive-below",
        type=float,
        nargs="?",
        const=INACTIVE_BELOW,
        metavar="P",
        help="also remove filters whose ReLU fires with a smaller probability "
        f"({INACTIVE_BELOW} if none is given)",
    )
    parser.add_argument(
        "--borders",
        choices=["exact", "fold"],
        default="exact",
        help="fold: also remove the constants that cannot be removed exactly at padded borders",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of the outputs' difference, relative to the largest (default %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="pairs of runs to time (default %(default)s, 0: none)"
    )
    args = parser.parse_args()
    with errors_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
