"""Do experiments of the detection study, or go on with them, and draw their figures.

    python -m studies.detection transfer rounds alpha --data-root bccd --cifar-root data
    python -m studies.detection transfer --seeds 8 --set epochs=12 pretraining.rounds=4 --plan

Finished runs are skipped, killed ones go on from their last round: the same command again is the
way to resume. The same command in a second process shares the work with the first. The JSON, the
table and the figure are made when all runs of an experiment are finished. What mmengine logs goes
to OUT/output.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from psbn_mmdet.errors import errors_in_one_line
from psbn_mmdet.launch.config import ConfigOptions
from studies.runs import finished, write_json

from . import experiments


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.detection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiments",
        nargs="+",
        choices=experiments.names(),
        metavar="NAME",
        help=", ".join(experiments.names()) + "; done in this order",
    )
    parser.add_argument("--data-root", default="data/bccd", help="BCCD in COCO's format")
    parser.add_argument("--cifar-root", default="data", help="holds cifar-10-batches-bin")
    parser.add_argument("--out", default="work_dirs/detection", help="where runs are kept")
    parser.add_argument("--results", help="where figures go (default: beside the runs)")
    parser.add_argument("--seeds", type=int, help="number of seeds")
    parser.add_argument(
        "--set", nargs="+", action=ConfigOptions, default={}, metavar="KEY=VALUE", help="settings"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only say what is left and how long")
    what.add_argument("--draw", action="store_true", help="only draw what is finished so far")
    return parser.parse_args(argv)


def _nested(changes: dict[str, Any]) -> dict[str, Any]:
    """``pretraining.rounds`` as a setting of the pretraining."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    return nested


def write_results(experiment: experiments.Experiment, args: argparse.Namespace) -> None:
    """JSON first; table and figure are made from what stands in it."""
    from . import figures, summary

    name = experiment.name
    command = "python -m studies.detection " + shlex.join(sys.argv[1:])
    outcomes = finished(experiment, args.out)
    compared = summary.compare_rounds(experiment, args.out, outcomes)
    content = summary.summarise(experiment, args.out, outcomes, compared, command)
    folder = Path(args.results or Path(args.out, name))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", content)
    summary.write_resampled(outcomes, compared, folder / f"{name}.resampled.npz")
    content = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.md").write_text(summary.markdown(content))
    figures.draw(content, folder / f"{name}.png")
    for end in ("json", "md", "png", "resampled.npz"):
        print(folder / f"{name}.{end}", flush=True)


def run(args: argparse.Namespace) -> None:
    wanted = [
        experiments.build(name, _nested(args.set), args.seeds)
        for name in dict.fromkeys(args.experiments)
    ]
    from . import engine  # which imports mmdet: seconds that a wrong argument need not wait

    if args.plan:
        for experiment in wanted:
            print(engine.plan(experiment, args.out))
        return
    if args.draw:
        for experiment in wanted:
            write_results(experiment, args)
        return
    for experiment in wanted:
        engine.prepare(experiment, args.out, args.data_root)
    say = partial(print, file=sys.stdout, flush=True)
    # mmengine's loggers write to what is sys.stdout when they are made, a page a run.
    with open(Path(args.out, "output.txt"), "a") as log:
        for experiment in wanted:
            with contextlib.redirect_stdout(log):
                engine.execute(experiment, args.out, args.data_root, args.cifar_root, say)
            write_results(experiment, args)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with errors_in_one_line("studies.detection"):
        try:
            run(args)
        except KeyboardInterrupt:
            sys.exit("studies.detection: stopped; the same command goes on from here")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main()
