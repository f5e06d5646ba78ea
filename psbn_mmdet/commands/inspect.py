"""Find collapsed filters in checkpoints of any PyTorch project.

    psbn inspect resnet50.pth
    psbn inspect epoch_12.pth --data data/coco/val2017
    psbn inspect round_1.pth round_2.pth round_3.pth --html page.html
    psbn inspect model.safetensors --fail-above 5

Without images, the weights show which filters have collapsed (|gamma| < 1e-3). A layer is
recognised by a gamma beside running_mean, or by weight, beta and alpha together; an
InstanceNorm without running statistics cannot be recognised.

With images (--data), a detector of mmdet is built from --config, or from the config in the
checkpoint, and each filter is measured: is it stuck (no gradient), idle (contributes nothing)
or carrying, and how often is its ReLU active? Nothing that the file contains is run.

Exit status: 0; 1 if --fail-above says so, also where gamma or bias is not finite or a gamma
cannot be read; 2 if a checkpoint cannot be read or an output file exists.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from pathlib import Path

from ..checkpoint import load, state_dict_of
from ..collapse import INACTIVE_BELOW, THRESHOLD, Report, check_thresholds, measure
from ..errors import (
    FAILED,
    PsbnError,
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
    written_whole,
)
from .detector import build, carried_config, read_images
from .terminal import show, working

FEW = 5.0
"""Percent of collapsed filters below which a network loses too little for a remedy to pay."""


def over_checkpoints(reports: list[Report], limit: int | None) -> list[list[str]]:
    """A grid: per layer the percentage collapsed in each checkpoint, the most collapsed first."""
    percent: dict[str, list[float | None]] = {}
    for column, report in enumerate(reports):
        for row in report.rows:
            values = percent.setdefault(row["name"], [None] * len(reports))
            values[column] = row["collapsed_percent"]

    def rank(item: tuple[str, list[float | None]]) -> float:
        last = -1.0 if item[1][-1] is None else item[1][-1]
        return -math.inf if math.isnan(last) else -last

    rows = [
        [layer, *("-" if value is None else format(value, ".1f") for value in values)]
        for layer, values in sorted(percent.items(), key=rank)[:limit]
    ]
    return [["collapsed %", *(f"({i + 1})" for i in range(len(reports)))], *rows]


def tell(names: list[str], reports: list[Report], limit: int | None) -> None:
    """Print the totals and the layers that lost most."""
    if len(reports) == 1:
        print(reports[0].summary(), end="\n\n")
        grid = reports[0].grid(limit)
        layers = len(reports[0].layers)
    else:
        for i, (name, report) in enumerate(zip(names, reports, strict=True), 1):
            print(f"({i}) {name}:\n{report.summary()}", end="\n\n")
        grid = over_checkpoints(reports, limit)
        layers = len({row["name"] for report in reports for row in report.rows})
    show(grid)
    if (more := layers - len(grid) + 1) > 0:
        print(f"... and {more} more layers (--layers 0 shows all)")


def next_steps(report: Report, checkpoint: str, config: str | None, data: Path | None) -> str:
    """What to do about the filters of a checkpoint, as commands with what is known filled in."""
    lost = max(report.totals["collapsed_percent"], report.totals["stuck_percent"])
    if not lost > 0:
        return "Nothing to do."
    if lost < FEW:
        return f"Nothing to do: below {FEW:g}% a network loses little."
    file, images = shlex.quote(checkpoint), shlex.quote(str(data or "IMAGES"))
    config = shlex.quote(config or "CONFIG")
    if data is None:
        rows = [
            ("Which are stuck:", f"psbn inspect {file} --config {config} --data {images}"),
            ("Any other model:", "psbn_mmdet.collapse.measure(model, images), in Python"),
        ]
    else:
        rows = [
            ("Bring them back:", f"psbn revive {config} {file} revived.pth --data {images}"),
            ("Remove them:", f"psbn strip {config} {file} stripped --data {images}"),
        ]
    return "\n".join(f"{what:<16} {command}" for what, command in rows)


def failures(report: Report, fail_above: float) -> list[str]:
    """Why a checkpoint fails, empty if it does not."""
    totals, reasons = report.totals, []
    if totals["not_finite"]:
        reasons.append(
            f"{totals['not_finite']} of {totals['filters']} filters have a NaN or infinite "
            "gamma or bias"
        )
    if report.missing:
        name, why = next(iter(report.missing.items()))
        reasons.append(f"{len(report.missing)} layers cannot be read (e.g. {name}: {why})")
    if totals["collapsed_percent"] > fail_above:
        reasons.append(
            f"{totals['collapsed_percent']:.2f}% of the filters collapsed, more than "
            f"{fail_above:g}%"
        )
    return reasons


def inspect(name: str, args: argparse.Namespace) -> Report:
    try:
        checkpoint = load(name)
        thresholds = args.threshold, args.inactive_below
        if args.data is None:
            return measure(state_dict_of(checkpoint, name), None, *thresholds)
        from ..launch import load_config

        cfg = load_config(args.config) if args.config else carried_config(checkpoint, name)
        model = build(cfg, checkpoint, name)
        return measure(model, read_images(cfg, model, args.data, args.images), *thresholds)
    except (PsbnError, ValueError) as error:
        text = str(error)
        raise PsbnError(text if text.startswith(name) else f"{name}: {text}") from error
    except OSError as error:
        raise PsbnError(f"{name}: cannot be read ({error})") from error


def run(args: argparse.Namespace) -> int:
    check_thresholds(args.threshold, args.inactive_below)
    if args.fail_above is not None and not 0 <= args.fail_above <= 100:
        raise PsbnError(f"--fail-above is a percentage from 0 to 100, got {args.fail_above}")
    if args.layers < 0:
        raise PsbnError(f"--layers {args.layers}: wanted 0 or more")
    if args.config and not args.data:
        raise PsbnError("--config is for measuring with images; add --data FOLDER")
    if args.data:
        require_packages("mmdet", "mmdet")
    refuse_to_overwrite(args.json, args.html, overwrite=args.overwrite)
    reports = []
    for name in args.checkpoints:
        with working(f"{'measuring' if args.data else 'reading'} {name}"):
            reports.append(inspect(name, args))
    if args.html:
        require_packages("report", "plotly", "jinja2")
        from ..collapse.page import write_page
        from ..collapse.trace import TraceError, from_reports

        labels = [Path(name).name for name in args.checkpoints]
        title = labels[0] if len(labels) == 1 else "checkpoints"
        try:
            trace = from_reports(reports, labels)
        except TraceError as error:
            raise PsbnError(str(error)) from error
        write_page({title: trace}, args.html)
    if args.json:
        content = [
            {"checkpoint": name, **json.loads(report.to_json())}
            for name, report in zip(args.checkpoints, reports, strict=True)
        ]
        with written_whole(args.json) as part:
            part.write_text(json.dumps({"checkpoints": content}, indent=1) + "\n")
    limit = args.layers or None
    tell(args.checkpoints, reports, limit)
    print("\n" + next_steps(reports[-1], args.checkpoints[-1], args.config, args.data))
    status = 0
    if args.fail_above is not None:
        for name, report in zip(args.checkpoints, reports, strict=True):
            for reason in failures(report, args.fail_above):
                status = FAILED
                print(f"{Path(sys.argv[0]).name}: {name}: {reason}", file=sys.stderr)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help=".pth, .pt, .safetensors, or a URL"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="images to measure on")
    parser.add_argument("--config", help="of the detector; by default what the checkpoint carries")
    parser.add_argument(
        "--images", type=int, default=4, metavar="N", help="how many of them (default %(default)s)"
    )
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="of |gamma| (default %(default)s)"
    )
    parser.add_argument(
        "--inactive-below",
        type=float,
        default=INACTIVE_BELOW,
        metavar="P",
        help="probability of activation below which a filter is inactive (default %(default)s)",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=5,
        metavar="N",
        help="layers to show, 0 for all (default %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="PERCENT",
        help="exit with status 1 if more of the filters of a checkpoint are collapsed, or any "
        "has a gamma or bias that is not finite",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILEs that are there")
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, beside its error
    args = parser.parse_args()
    with errors_in_one_line():
        sys.exit(run(args))


if __name__ == "__main__":
    main()
