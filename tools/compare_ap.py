"""Is the difference in AP more than noise? Compare detectors by their COCO results.

    tools/compare_ap.py --ann instances_val2017.json bn=a.bbox.json psbn=b.bbox.json
    tools/compare_ap.py bn=work_dirs/bn_s0 bn=work_dirs/bn_s1 psbn=work_dirs/psbn_s0 ...

A repeated name is another seed of that arm; every arm is compared with the first. A work dir of
tools/train.py and tools/test.py is asked for its results, checkpoint and annotation file.

Exit status: 0; 1 when an expectation does not hold; 2 for input that cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from psbn_mmdet.errors import (
    FAILED,
    PsbnError,
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
    written_whole,
)
from psbn_mmdet.python38 import zip_strict

if TYPE_CHECKING:
    from psbn_mmdet.ap.runs import RunFiles


def main() -> None:
    args = _parser().parse_args()
    with errors_in_one_line():
        require_packages("ap", "numba", "scipy", "msgspec", "tqdm")
        if args.html:
            require_packages("ap", "plotly", "jinja2")
        holds = _run(args)
    sys.exit(0 if holds else FAILED)


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
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="'ARM-BASELINE>=AP'",
        help="fail unless the whole interval of the difference in AP points is so: its lower end "
        "for >= and >, its upper end for <= and <; as 'psbn-bn>=0.3'",
    )
    parser.add_argument(
        "--expect-observed",
        action="append",
        default=[],
        metavar="'ARM-BASELINE>=AP'",
        help="fail unless the observed difference is so, however wide its interval",
    )
    parser.add_argument(
        "--missing-is-empty",
        action="store_true",
        help="images without a box were looked at and nothing was detected there",
    )
    return parser


def _run(args: argparse.Namespace) -> bool:
    """Compare, say and write; whether all expectations hold."""
    from tqdm import tqdm

    from psbn_mmdet.ap import coco_files, compare, expect, runs, tables

    def bar(items, what="resamples", total=args.resamples):
        return tqdm(items, desc=what, total=total, disable=None)  # None: only on a terminal

    named = [_named(given) for given in args.runs]
    files = [runs.find_run(arm, path) for arm, path in named]
    arms: dict[str, list[int]] = {}
    for i, (arm, _) in enumerate(named):
        arms.setdefault(arm, []).append(i)
    _check(args, files, arms)
    names = list(arms)
    expectations = [expect.parse(e, names) for e in args.expect]
    expectations += [expect.parse(e, names, observed=True) for e in args.expect_observed]
    first, *others = names
    pairs = tables.table2_pairs(names) if args.table2 else [(arm, first) for arm in others]
    pairs = list(dict.fromkeys([*pairs, *((e.arm, e.baseline) for e in expectations)]))

    annotations = runs.read_shared_annotations(files, args.ann)
    results = [
        coco_files.read_results(f.results, annotations) for f in bar(files, "reading", len(files))
    ]
    # a work dir's config says on which images its model was run, a bare result file does not
    said = args.missing_is_empty or (not args.ann and all(f.annotations for f in files))
    warnings = [
        *annotations.warnings,
        *(w for f in files for w in f.warnings),
        *runs.check_same_images(annotations, results, said),
        *runs.check_distinct(files, results),
    ]
    measured = compare.measure(
        annotations, results, args.resamples, args.seed, args.sizes, args.threads, bar
    )
    runs.check_reported(files, measured.observed[:, 0] / 100, annotations)
    c = compare.compare(measured, arms, pairs, args.confidence, args.seed, warnings)
    checked = [e.check(c) for e in expectations]
    settings = {
        "annotations": annotations.path,
        "images": len(annotations.image_ids),
        "resamples": args.resamples,
        "seed": args.seed,
    }
    report = tables.report(
        c,
        files,
        settings,
        args.table2,
        {e.option: holds for e, (holds, _) in zip_strict(expectations, checked)},
    )

    texts = {}
    if args.json:
        data = tables.as_json(report)
        texts[args.json] = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if args.html:
        from psbn_mmdet.ap import images, page

        weights = images.weigh_images(c, annotations, results, args.threads)
        texts[args.html] = page.page(report, weights)
    print(tables.markdown(report))
    for file, text in texts.items():
        with written_whole(file) as part:
            part.write_text(text, encoding="utf-8")
        print(f"wrote {file}", file=sys.stderr)
    for _, sentence in checked:
        print(sentence, file=sys.stderr)
    return all(holds for holds, _ in checked)


def _named(given: str) -> tuple[str, str]:
    arm, equals, path = given.partition("=")
    if not (arm and equals and path):
        raise PsbnError(f"{given!r}: wanted ARM=RUN, as bn=work_dirs/bn_s0")
    return arm, path


def _check(args: argparse.Namespace, files: Sequence[RunFiles], arms: dict[str, list[int]]) -> None:
    """Refuse, before anything is computed, what would only fail after it."""
    if len(arms) < 2:
        raise PsbnError(f"only one arm, {files[0].arm}; wanted two or more to compare")
    for arm, members in arms.items():
        paths = [os.path.realpath(files[i].results) for i in members]
        if twice := next((p for p in paths if paths.count(p) > 1), None):
            raise PsbnError(f"arm {arm} names {twice} twice")
    if args.resamples < 100:
        raise PsbnError(f"--resamples {args.resamples}: an interval needs 100 or more")
    if not 0.5 <= args.confidence < 1:
        raise PsbnError(f"--confidence {args.confidence}: wanted 0.5 to 1, as 0.95")
    # that many draws must lie outside, or the interval ends at the outermost draw
    if (wanted := 2 / (1 - args.confidence)) > args.resamples + 1:
        raise PsbnError(
            f"--confidence {args.confidence}: needs --resamples {math.ceil(wanted)} or more"
        )
    if args.threads < 1:
        raise PsbnError(f"--threads {args.threads}: wanted 1 or more")
    if args.seed < 0:
        raise PsbnError(f"--seed {args.seed}: wanted 0 or more")
    refuse_to_overwrite(args.json, args.html, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
