"""Is the difference in AP more than noise? Compare detectors by their COCO results.

    tools/compare_ap.py --ann instances_val2017.json bn=a.bbox.json psbn=b.bbox.json
    tools/compare_ap.py bn=work_dirs/bn_s0 bn=work_dirs/bn_s1 psbn=work_dirs/psbn_s0 ...

A repeated name is another seed of that arm; every arm is compared with the first. A work dir of
tools/train.py and tools/test.py is asked for its results, checkpoint and annotation file.

Exit status: 0; 1 when an --expect does not hold; 2 for input that cannot be compared.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from psbn_mmdet.ap import coco_files, compare, tables


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except coco_files.InputError as e:
        print(f"compare_ap.py: {e}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="ARM=RUN", help="a result file or a work dir")
    parser.add_argument("--ann", metavar="FILE", help="COCO annotations; work dirs know theirs")
    parser.add_argument("--resamples", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="(default: %(default)s)")
    parser.add_argument("--sizes", action="store_true", help="intervals of APs, APm, APl too")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    parser.add_argument("--table2", action="store_true", help="lay out as the psBN paper does")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="'ARM-BASELINE>=AP'",
        help="fail unless the observed difference in AP points is so, as 'psbn-bn>=0.3'",
    )
    parser.add_argument(
        "--missing-is-empty",
        action="store_true",
        help="images without a box were looked at and nothing was found",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    runs, arms = [], {}
    for given in args.runs:
        arm, equals, path = given.partition("=")
        if not (arm and equals and path):
            raise coco_files.InputError(f"{given!r}: wanted ARM=RUN, as bn=work_dirs/bn_s0")
        arms.setdefault(arm, []).append(len(runs))
        runs.append(coco_files.find_run(arm, path))
    _check(args, runs, arms)
    expected = [tables.parse_expectation(e, list(arms)) for e in args.expect]
    pairs = (
        tables.table2_pairs(list(arms))
        if args.table2
        else [(arm, next(iter(arms))) for arm in list(arms)[1:]]
    )
    pairs += [e[:2] for e in expected if e[:2] not in pairs]

    def bar(items, what="resamples", total=args.resamples):
        return tqdm(items, desc=what, total=total, disable=None)  # None: only on a terminal

    annotations = coco_files.read_shared_annotations(runs, args.ann)
    results = [
        coco_files.read_results(run.results, annotations) for run in bar(runs, "reading", len(runs))
    ]
    warnings = [w for run in runs for w in run.warnings]
    # a work dir's config says on which images its model was run, a bare result file does not
    said = args.missing_is_empty or (not args.ann and all(run.annotations for run in runs))
    warnings += coco_files.check_same_images(annotations, results, said)
    measured = compare.measure(
        annotations, results, args.resamples, args.seed, args.sizes, args.threads, bar
    )
    c = compare.compare(measured, arms, pairs, args.confidence, args.seed, warnings)

    print(tables.markdown(c, runs, len(annotations.image_ids), args.table2))
    held = {
        text: tables.holds(next(d for d in c.differences if (d.arm, d.baseline) == e[:2]), *e[2:])
        for text, e in zip(args.expect, expected, strict=True)
    }
    if args.json:
        settings = {"annotations": annotations.path, "images": len(annotations.image_ids)}
        settings |= {"resamples": args.resamples, "seed": args.seed}
        data = tables.as_json(c, runs, settings, held)
        _write(args.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
    if args.html:
        from psbn_mmdet.ap import page

        _write(args.html, page.page(c, runs, annotations, results, args.table2, args.threads))
    for text, held_so in held.items():
        print(f"expected {text}: {'holds' if held_so else 'DOES NOT HOLD'}", file=sys.stderr)
    return 0 if all(held.values()) else 1


def _check(args: argparse.Namespace, runs: list, arms: dict[str, list[int]]) -> None:
    """Refuses, before anything is computed, what would only fail after it."""
    if len(arms) < 2:
        raise coco_files.InputError(f"only one arm, {runs[0].arm}; wanted two or more to compare")
    for arm, members in arms.items():
        files = [os.path.realpath(runs[i].results) for i in members]
        if len(set(files)) < len(files):
            raise coco_files.InputError(f"arm {arm} names {runs[members[0]].results} twice")
    if args.resamples < 100:
        raise coco_files.InputError(f"--resamples {args.resamples}: an interval needs 100 or more")
    if not 0.5 <= args.confidence < 1:
        raise coco_files.InputError(f"--confidence {args.confidence}: wanted 0.5 to 1, as 0.95")
    if args.threads < 1:
        raise coco_files.InputError(f"--threads {args.threads}: wanted 1 or more")
    for file in filter(None, (args.json, args.html)):
        if Path(file).exists() and not args.force:
            raise coco_files.InputError(f"{file}: exists; name another file or say --force")
        if not Path(file).resolve().parent.is_dir():
            raise coco_files.InputError(f"{file}: its folder does not exist")


def _write(file: str, text: str) -> None:
    """Writes the file whole or not at all."""
    part = Path(f"{file}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)
    print(f"wrote {file}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
