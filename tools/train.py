"""Train a detector: mmdet's tools/train.py, also distributed on CPU."""

import argparse

from psbn_mmdet import launch
from psbn_mmdet.errors import errors_in_one_line, require_packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a file, or package::path of an installed package")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, or from the newest whole one of the work dir",
    )
    parser.add_argument(
        "--amp", action="store_true", help="mixed precision: float16 on GPU, bfloat16 on CPU"
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale lr to the batch size")
    launch.add_arguments(parser)
    args = parser.parse_args()
    with errors_in_one_line():
        require_packages("mmdet", "mmdet", "mmcv")
        cfg = launch.load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
        options = dict(resume=args.resume, amp=args.amp, auto_scale_lr=args.auto_scale_lr)
        if args.check is None:
            launch.train(cfg, args.launcher, **options)
        else:
            launch.configure_training(cfg, **options)
            print(*launch.check(cfg, args.check, training=True), sep="\n")


if __name__ == "__main__":
    main()
