"""Revive the collapsed filters of a detector: the same function, and they learn again.

    psbn revive CONFIG CHECKPOINT OUT.pth --data data/coco/train2017
    tools/train.py CONFIG --cfg-options load_from=OUT.pth

OUT.pth is CHECKPOINT with other weights for the collapsed filters and zeros in what reads them, for
CONFIG as it is and for mmdet's own tools. The new network is run beside the old one on your images,
or on random ones; if the outputs differ, nothing is written. Running statistics of the revived
filters come from the images, so random ones do for a training whose BN sees batches, but not for
one with norm_eval. OUT.json says what was revived, what was not, and why.

A training does the same at its start with custom_hooks=[dict(type="ReviveFilters")].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..checkpoint import load
from ..collapse import THRESHOLD
from ..collapse.reviving import TOLERANCE, ReviveError, revive, summary
from ..errors import (
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
    written_whole,
)
from .detector import (
    add_input_arguments,
    build,
    check_images,
    read_images,
)


def run(args: argparse.Namespace) -> None:
    require_packages("mmdet", "mmdet")
    from ..launch import load_config  # which needs mmengine

    record_file = args.out.with_suffix(".json")
    refuse_to_overwrite(args.out, record_file, overwrite=args.overwrite)
    check_images(args.images)
    cfg = load_config(args.config)
    checkpoint = load(args.checkpoint)
    model = build(cfg, checkpoint, args.checkpoint)
    if args.data:
        images = read_images(cfg, model, args.data, args.images)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        images = torch.randn(args.images, 3, *args.size, generator=generator)
    options = {"threshold": args.threshold, "tolerance": args.tolerance, "seed": args.seed}
    record = revive(model, images, **options)
    if not record["filters"]["revived"]:
        raise ReviveError(
            f"{args.checkpoint}: nothing is revived, so nothing is written: "
            + "; ".join(summary(record).splitlines()[:-1])
        )
    # mmengine loads optimizer and schedule with resume alone, where they no longer fit.
    meta = {k: v for k, v in (checkpoint.get("meta") or {}).items() if k != "cfg"}
    with written_whole(args.out) as part:
        torch.save({"meta": meta, "state_dict": model.state_dict()}, part)
    with written_whole(record_file) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{summary(record)}\nwritten: {args.out}, {record_file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser, "training images", 8)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new checkpoint")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="of |gamma| (default %(default)s)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="for what the filters still carried, relative to the largest value of each output "
        "channel (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    args = parser.parse_args()
    with errors_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
