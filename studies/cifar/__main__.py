"""The CIFAR-10 study: do an experiment or go on with it, draw it, judge the paper's claims.

    python -m studies.cifar fig3 --preset reduced --workers 2 --data-root data
    python -m studies.cifar fig3 --preset paper --shard $SLURM_ARRAY_TASK_ID/45
    python -m studies.cifar recovery --preset reduced --set rounds=4 lr=0.1 --plan
    python -m studies.cifar draw studies/cifar/results/fig3.json
    python -m studies.cifar verdicts

Finished runs are skipped, killed ones go on from their last checkpoint: the same
command again is the way to resume. JSON, table and figure are written when all
runs are finished, whoever did them.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from psbn_mmdet.errors import FAILED, errors_in_one_line
from psbn_mmdet.launch.config import ConfigOptions
from studies.runs import finished

from . import data, engine, experiments, summary, verdicts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="studies.cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in experiments.names():
        title = experiments.build(name, "reduced").title
        _experiment_arguments(commands.add_parser(name, help=title, description=title))
    draw = commands.add_parser("draw", help="table and figure again, from the JSON alone")
    draw.add_argument("json", nargs="+", metavar="NAME.json")
    judge = commands.add_parser("verdicts", help="the paper's claims against the published JSON")
    judge.add_argument("--results", default=verdicts.RESULTS, help="default: the published ones")
    return parser.parse_args()


def _experiment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=experiments.PRESETS, required=True)
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--shard", metavar="I/N", help="do the i-th of n shares only, from 1")
    parser.add_argument("--data-root", default="data", help="holds cifar-10-batches-bin")
    parser.add_argument("--download", action="store_true", help="fetch the data if need be")
    parser.add_argument("--out", help="where runs are kept (default: work_dirs/cifar/PRESET)")
    parser.add_argument("--results", help="where JSON, table and figure go (default: by the runs)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument(
        "--set", nargs="+", action=ConfigOptions, default={}, metavar="KEY=VALUE", help="settings"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only say what is left and how long")
    what.add_argument("--draw", action="store_true", help="only sum up what is finished so far")


def run(args: argparse.Namespace) -> int:
    """Do an experiment; the exit status."""
    experiment = experiments.build(args.command, args.preset, args.set, args.seeds)
    out = Path(args.out or f"work_dirs/cifar/{args.preset}")
    command = "python -m studies.cifar " + shlex.join(sys.argv[1:])
    if not args.draw:
        engine.share(experiment.runs, args.shard)
        if args.download:
            data.download(args.data_root)
        engine.prepare(experiment, out, args.data_root)
        if args.plan:
            print(engine.plan(experiment, out, args.workers, args.shard))
            return 0
        failed = engine.execute(experiment, out, args.data_root, args.workers, args.shard)
        if failed:
            print(f"studies.cifar: {len(failed)} runs failed, as {failed[0]}", file=sys.stderr)
            return FAILED
    done = len(finished(experiment, out))
    if done == len(experiment.runs) or args.draw:
        _say(summary.write_results(experiment, out, args.results, command))
    else:
        print(f"{done} of {len(experiment.runs)} runs are finished; the figure waits for the rest")
    return 0


def _say(paths: list[Path]) -> None:
    for path in paths:
        print(path)


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers end too
    with errors_in_one_line("studies.cifar"):
        try:
            if args.command == "draw":
                for path in args.json:
                    _say(summary.redraw(path))
            elif args.command == "verdicts":
                readme = verdicts.README if Path(args.results) == verdicts.RESULTS else None
                _say(verdicts.write(Path(args.results), readme))
            else:
                return run(args)
        except KeyboardInterrupt:
            print("studies.cifar: stopped; the same command goes on from here", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
