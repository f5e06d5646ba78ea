"""Do an experiment of the CIFAR-10 study, or go on with it, and draw its figure.

    python -m studies.cifar fig3 --preset reduced --workers 2 --data-root data
    python -m studies.cifar fig3 --preset paper --shard $SLURM_ARRAY_TASK_ID/45
    python -m studies.cifar recovery --preset reduced --set rounds=4 lr=0.1 --plan

Finished runs are skipped, killed ones go on from their last checkpoint: the same
command again is the way to resume. The figure, table and JSON are drawn when all
runs are finished, whoever did them.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from mmengine.config import DictAction

from . import data, engine, experiments, figures, summary
from .settings import RunError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=experiments.names())
    parser.add_argument("--preset", choices=experiments.PRESETS, required=True)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--shard", metavar="I/N", help="do the i-th of n shares only, from 1")
    parser.add_argument("--data-root", default="data", help="holds cifar-10-batches-bin")
    parser.add_argument("--download", action="store_true", help="fetch the data if need be")
    parser.add_argument("--out", help="where runs are kept (default: work_dirs/cifar/PRESET)")
    parser.add_argument("--results", help="where figures go (default: beside the runs)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument(
        "--set", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help="settings"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only say what is left and how long")
    what.add_argument("--draw", action="store_true", help="only draw what is finished so far")
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    experiment = experiments.build(args.experiment, args.preset, args.set, args.seeds)
    out = Path(args.out or f"work_dirs/cifar/{args.preset}")
    command = "python -m studies.cifar " + shlex.join(sys.argv[1:])
    if not args.draw:
        engine.share(experiment.runs, args.shard)
        if args.download:
            data.download(args.data_root)
        engine.prepare(experiment, out, args.data_root)
        if args.plan:
            print(engine.plan(experiment, out, args.workers, args.shard))
            return
        failed = engine.execute(experiment, out, args.data_root, args.workers, args.shard)
        if failed:
            raise RunError(f"{len(failed)} runs failed, as {failed[0]}")
    done = len(summary.finished(experiment, out))
    if done == len(experiment.runs) or args.draw:
        for path in figures.write_results(experiment, out, args.results, command):
            print(path)
    else:
        print(f"{done} of {len(experiment.runs)} runs are finished; the figure waits for the rest")


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers end too
    try:
        run(args)
    except (RunError, data.DataError) as error:
        sys.exit(f"studies.cifar: {error}")
    except KeyboardInterrupt:
        sys.exit("studies.cifar: stopped; the same command goes on from here")


if __name__ == "__main__":
    main()
