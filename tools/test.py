"""Evaluate a detector: mmdet's tools/test.py, also distributed on CPU.

The metrics go to WORK_DIR/metrics.json, COCO results to WORK_DIR/results.bbox.json.
"""

import argparse

from psbn_mmdet import launch
from psbn_mmdet.errors import errors_in_one_line, require_packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a file, or package::path of an installed package")
    parser.add_argument("checkpoint", help="a file or URL")
    launch.add_arguments(parser)
    args = parser.parse_args()
    with errors_in_one_line():
        require_packages("mmdet", "mmdet", "mmcv")
        cfg = launch.load_config(args.config, args.cfg_options, args.data_root, args.work_dir)
        if args.check is None:
            launch.evaluate(cfg, args.checkpoint, args.launcher)
        else:
            launch.configure_test(cfg, args.checkpoint)
            print(*launch.check(cfg, args.check, training=False), sep="\n")


if __name__ == "__main__":
    main()
