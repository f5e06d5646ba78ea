"""Give collapsed filters of a detector a new start: the same outputs, and they learn again.

    psbn revive CONFIG CHECKPOINT OUT.pth --data data/coco/train2017
    tools/train.py CONFIG --cfg-options load_from=OUT.pth

OUT.pth fits CONFIG as it is, and mmdet's own tools. The collapsed filters get fresh weights, and
the weights of the layers that read them are set to zero. Old and new network are compared on your
images, or on random ones; if the outputs differ, nothing is written. OUT.json lists what was
revived, what was not, and why.

The running statistics of the revived filters come from the images. Random ones will do if BN sees
batches in your training, but not with norm_eval=True.

--lift-gamma sets the gamma of collapsed filters to 0.1 instead, and changes nothing else. The
outputs change, and the command says by how much. In the detection study more AP came back.

To do the same at the start of a training: custom_hooks=[dict(type="ReviveFilters")] or
[dict(type="LiftGamma")]. Any other model, in Python: psbn_mmdet.collapse.revive(model, images) and
lift_gamma(model).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from ..collapse import THRESHOLD, lifting, reviving
from ..collapse.reviving import TOLERANCE, ReviveError
from ..errors import (
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
    written_whole,
)
from .detector import add_input_arguments, open_detector, read_images, save_weights
from .terminal import working


def run(args: argparse.Namespace) -> None:
    require_packages("mmdet", "mmdet")
    record_file = args.out.with_suffix(".json")
    refuse_to_overwrite(args.out, record_file, overwrite=args.overwrite)
    cfg, checkpoint, model = open_detector(args)
    if args.data:
        images = read_images(cfg, model, args.data, args.images)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        images = torch.randn(args.images, 3, *args.size, generator=generator)
    if args.lift_gamma:
        with working("lifting gamma, then comparing the outputs"):
            record = lifting.lift_gamma(model, images, threshold=args.threshold)
        summary, done = lifting.summary(record), record["filters"]["lifted"]
    else:
        options = {"threshold": args.threshold, "tolerance": args.tolerance, "seed": args.seed}
        with working("reviving, then comparing the outputs"):
            record = reviving.revive(model, images, **options)
        summary, done = reviving.summary(record), record["filters"]["revived"]
    if not done:
        raise ReviveError(
            f"{args.checkpoint}: nothing is revived, so nothing is written: "
            + "; ".join(summary.splitlines()[:-1])
        )
    save_weights(model, checkpoint, args.out)
    with written_whole(record_file) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{summary}\nwritten: {args.out}, {record_file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser, "training images", 8)
    parser.add_argument("out", metavar="OUT", type=Path, help="a new checkpoint")
    parser.add_argument(
        "--lift-gamma", action="store_true", help="set the gamma of collapsed filters to 0.1"
    )
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
