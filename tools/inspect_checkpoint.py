"""Find the collapsed filters in checkpoints of any PyTorch project.

    tools/inspect_checkpoint.py resnet50.pth
    tools/inspect_checkpoint.py round_1.pth round_2.pth round_3.pth --html course.html
    tools/inspect_checkpoint.py model.safetensors --fail-above 5

A layer is where weight, bias, running_mean, running_var stand together, or weight,
beta, alpha; an InstanceNorm without running statistics cannot be recognised. Nothing
that a file carries is run. Exit status: 0; 1 if --fail-above says so; 2 if a
checkpoint cannot be read or a file exists already.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

from psbn_mmdet.checkpoint import load, state_dict_of
from psbn_mmdet.collapse import INACTIVE_BELOW, THRESHOLD, Report, check_thresholds, measure


def course(names: list[str], reports: list[Report], limit: int | None) -> str:
    """Per layer the percentage collapsed in each checkpoint, and each one's totals."""
    percent: dict[str, list[float]] = {}
    for column, report in enumerate(reports):
        for row in report.rows:
            values = percent.setdefault(row["name"], [math.nan] * len(reports))
            values[column] = row["collapsed_percent"]
    ranked = sorted(percent.items(), key=lambda item: -max(item[1][-1], 0))[:limit]
    width = max([5, *(len(name) for name, _ in ranked)])
    lines = [f"({i}) {name}" for i, name in enumerate(names, 1)]
    numbers = "".join(f"{f'({i})':>8}" for i in range(1, len(names) + 1))
    lines += ["", f"{'collapsed %':<{width}}{numbers}"]
    for layer, values in ranked:
        cells = "".join(f"{'-' if math.isnan(v) else format(v, '.1f'):>8}" for v in values)
        lines.append(f"{layer:<{width}}{cells}")
    if len(ranked) < len(percent):
        lines.append(f"... and {len(percent) - len(ranked)} more layers")
    for name, report in zip(names, reports, strict=True):
        lines += ["", f"{name}:", report.summary()]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    check_thresholds(args.threshold, args.inactive_below)
    if args.fail_above is not None and not 0 <= args.fail_above <= 100:
        raise ValueError(f"--fail-above is a percentage from 0 to 100, got {args.fail_above}")
    for path in (args.json, args.html):
        if path and path.exists():
            raise ValueError(f"{path}: exists already; remove it or name another file")
        if path and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
    reports = []
    for name in args.checkpoints:
        try:
            state_dict = state_dict_of(load(name), name)
            reports.append(measure(state_dict, args.threshold, args.inactive_below))
        except (ValueError, OSError) as error:
            text = str(error) if isinstance(error, ValueError) else f"cannot be read ({error})"
            raise ValueError(text if text.startswith(name) else f"{name}: {text}") from error
    limit = args.layers or None
    if len(reports) == 1:
        print(reports[0].table(limit))
    else:
        print(course(args.checkpoints, reports, limit))
    if args.json:
        found = [
            {"checkpoint": name, **json.loads(report.to_json())}
            for name, report in zip(args.checkpoints, reports, strict=True)
        ]
        args.json.write_text(json.dumps({"checkpoints": found}, indent=1) + "\n")
    if args.html:
        from psbn_mmdet.collapse.page import write_page
        from psbn_mmdet.collapse.trace import from_reports

        labels = [Path(name).name for name in args.checkpoints]
        title = labels[0] if len(labels) == 1 else "checkpoints"
        write_page({title: from_reports(reports, labels)}, args.html)
    failed = False
    for name, report in zip(args.checkpoints, reports, strict=True):
        percent = report.totals["collapsed_percent"]
        if args.fail_above is not None and percent > args.fail_above:
            failed = True
            print(
                f"inspect_checkpoint.py: {name}: {percent:.2f}% of the filters collapsed, "
                f"more than {args.fail_above:g}%",
                file=sys.stderr,
            )
    return int(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help=".pth, .pt, .safetensors, or a URL"
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
        "--layers", type=int, default=20, metavar="N", help="layers to show, 0 for all (default 20)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="PERCENT",
        help="exit with status 1 if more of the filters of a checkpoint are collapsed",
    )
    warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's, beside its error
    try:
        sys.exit(run(parser.parse_args()))
    except (ValueError, OSError) as error:
        print(f"inspect_checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
