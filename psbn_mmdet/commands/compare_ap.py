"""Is the difference in AP more than noise? Compare detectors by their COCO results.

    psbn compare-ap --ann instances_val2017.json old=a.bbox.json new=b.bbox.json
    psbn compare-ap bn=work_dirs/bn_s0 bn=work_dirs/bn_s1 psbn=work_dirs/psbn_s0 ...

A repeated name is another seed of that arm. Every arm is compared with the first. A RUN is a COCO
result file, or a work dir of mmdet, which names its results, checkpoint and annotation file.

Exit status: 0; 1 if an --expect does not hold; 2 if the input cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import (
    FAILED,
    PsbnError,
    errors_in_one_line,
    refuse_to_overwrite,
    require_packages,
    written_whole,
)
from .terminal import progress, show_markdown

if TYPE_CHECKING:  # what needs the extra is imported after the check that it is there
    from ..ap.compare import Comparison
    from ..ap.expect import Expectation
    from ..ap.runs import RunFiles

MOST_RESAMPLES = 16
"""Times as many as asked for are drawn at most, where an end of an interval lies near 0."""


def main() -> None:
    """Run the command."""
    args = _parser().parse_args()
    with errors_in_one_line():
        require_packages("ap", "numba", "scipy", "msgspec")
        if args.html:
            require_packages("ap", "plotly", "jinja2")
        if args.type == "segm":
            require_packages("ap", "pycocotools")
        holds = _run(args)
    sys.exit(0 if holds else FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="ARM=RUN", help="a result file or a work dir")
    parser.add_argument("--ann", metavar="FILE", help="COCO annotations; work dirs know theirs")
    parser.add_argument(
        "--type",
        choices=["bbox", "segm", "keypoints"],
        help="compare boxes (the default), masks or COCO's keypoints",
    )
    parser.add_argument(
        "--classes", metavar="A,B", help="evaluate these alone; work dirs know theirs"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="detections that count per image and class (default: 100, of keypoints 20)",
    )
    parser.add_argument(
        "--paired",
        action="store_true",
        help="run j of an arm and of another share their seed: compare them run by run",
    )
    parser.add_argument("--resamples", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="(default: %(default)s)")
    parser.add_argument("--sizes", action="store_true", help="intervals of APs, APm, APl too")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all)")
    parser.add_argument("--table2", action="store_true", help="lay out as the psBN paper does")
    parser.add_argument("--json", metavar="FILE", help="write the numbers")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--images", metavar="DIR", help="of the data set: shown in the page")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="the power that further seeds and images would give, for the observed difference",
    )
    parser.add_argument("--plan-for", type=float, metavar="AP", help="the same for this difference")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="'ARM-BASELINE>=AP'",
        help="fail unless the whole interval of the difference in AP points is so: its lower end "
        "for >= and >, its upper end for <= and <; as 'psbn-bn>=0.3', or 'psbn-bn>=0.3 of "
        "methods' to fail where an arm has one run",
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
        help="images and classes without a box were looked for and nothing was detected",
    )
    return parser


def _run(args: argparse.Namespace) -> bool:
    """Compare, say and write; whether all expectations hold."""
    from ..ap import coco_files, compare, expect, matching, runs, tables

    bar = partial(progress, what="resamples", total=args.resamples)
    kind = args.type or "bbox"
    named = [_named(given) for given in args.runs]
    arms: dict[str, list[int]] = {}
    for i, (arm, _) in enumerate(named):
        arms.setdefault(arm, []).append(i)
    files = [runs.find_run(arm, path, kind) for arm, path in named]
    _check(args, files, arms)
    names = list(arms)
    claims = [expect.parse(e, names) for e in args.expect]
    claims += [expect.parse(e, names, observed=True) for e in args.expect_observed]
    first, *others = names
    pairs = tables.table2_pairs(names) if args.table2 else [(arm, first) for arm in others]
    pairs = list(dict.fromkeys([*pairs, *((e.arm, e.baseline) for e in claims)]))
    pairing = ""
    if args.paired:
        arms, pairing = runs.pair_by_seed(files, arms)

    classes = [name.strip() for name in args.classes.split(",")] if args.classes else None
    annotations = runs.read_shared_annotations(files, args.ann, kind, classes)
    results = [
        coco_files.read_results(f.results, annotations, args.type == "bbox")
        for f in progress(files, "reading", len(files))
    ]
    # a work dir's config says on which images its model was run, a bare result file does not
    said = args.missing_is_empty or (not args.ann and all(f.annotations for f in files))
    warnings = [
        *annotations.warnings,
        *(w for f in files for w in f.warnings),
        *runs.check_same_images(annotations, results, said),
        *runs.check_classes(annotations, results, args.missing_is_empty),
        *runs.check_distinct(files, results),
        *runs.check_reported(files, results, annotations, args.max_dets),
    ]
    measured = compare.measure(
        annotations,
        results,
        args.resamples,
        args.seed,
        args.sizes,
        args.threads,
        bar,
        args.max_dets,
    )
    while True:
        c = compare.compare(measured, arms, pairs, args.confidence, warnings, args.paired)
        unsettled = _unsettled(c, claims)
        if not unsettled or len(measured.draws) >= MOST_RESAMPLES * args.resamples:
            break
        more = len(measured.draws)
        measured = compare.more_resamples(
            measured, more, args.seed, args.threads, partial(progress, what="resamples", total=more)
        )
    c.warnings.extend(
        f"{arm} - {baseline}: after {len(measured.draws)} resamples an end of the interval is "
        "within its own error of what the verdict or an expectation asks for; with another --seed "
        "it may lie on the other side"
        for arm, baseline in unsettled
    )
    checked = [e.check(c) for e in claims]
    settings = {
        "version": f"psbn_mmdet {__version__}",
        "annotations": annotations.path,
        "images": len(annotations.image_ids),
        "type": kind,
        "max_dets": args.max_dets or matching.MAX_DETS[kind],
        "resamples": len(measured.draws),
        "seed": args.seed,
        "command": f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
    }
    report = tables.report(
        c,
        files,
        settings,
        args.table2,
        {e.option: holds for e, (holds, _) in zip(claims, checked, strict=True)},
        pairing,
        [compare.plan(d, args.confidence, args.plan_for) for d in c.differences]
        if args.plan or args.plan_for
        else [],
    )

    texts = {}
    if args.json:
        data = tables.as_json(report)
        texts[args.json] = json.dumps(data, indent=1, allow_nan=False) + "\n"
    if args.html:
        from ..ap import images, page

        weights = images.weigh_images(c, annotations, results, args.threads, args.images)
        texts[args.html] = page.page(report, weights)
    show_markdown(tables.markdown(report))
    for file, text in texts.items():
        with written_whole(file) as part:
            part.write_text(text, encoding="utf-8")
        print(f"wrote {file}", file=sys.stderr)
    for _, sentence in checked:
        print(sentence, file=sys.stderr)
    return all(holds for holds, _ in checked)


def _unsettled(c: Comparison, claims: Sequence[Expectation]) -> list[tuple[str, str]]:
    """The pairs whose interval of AP has an end within twice its own error of 0 or of a claim."""
    found = []
    for d in c.differences:
        bounds = [e.bound for e in claims if (e.arm, e.baseline) == (d.arm, d.baseline)]
        gaps = [abs(end - bound) for end in (d.low[0], d.high[0]) for bound in (0, *bounds)]
        if d.end_error[0] > 0 and min(gaps) < 2 * d.end_error[0]:
            found.append((d.arm, d.baseline))
    return found


def _named(given: str) -> tuple[str, str]:
    """``ARM=RUN``; where that can be read in several ways, the one whose RUN exists."""
    cuts = [i for i, letter in enumerate(given) if letter == "=" and 0 < i < len(given) - 1]
    if not cuts:
        raise PsbnError(f"{given!r}: wanted ARM=RUN, as bn=work_dirs/bn_s0")
    there = [i for i in cuts if os.path.exists(given[i + 1 :])]
    if len(there) > 1:
        raise PsbnError(f"{given!r}: can be read in {len(there)} ways; rename the arm or the file")
    at = there[0] if there else cuts[0]
    return given[:at], given[at + 1 :]


def _check(args: argparse.Namespace, files: Sequence[RunFiles], arms: dict[str, list[int]]) -> None:
    """Refuse, before anything is computed, what would only fail after it."""
    if len(arms) < 2:
        raise PsbnError(f"only one arm, {files[0].arm}; wanted two or more to compare")
    for arm, members in arms.items():
        paths = [os.path.realpath(files[i].results) for i in members]
        if twice := next((p for p in paths if paths.count(p) > 1), None):
            raise PsbnError(f"arm {arm} names {twice} twice")
    arm_of: dict[str, str] = {}
    for run in files:
        path = os.path.realpath(run.results)
        if arm_of.setdefault(path, run.arm) != run.arm:
            raise PsbnError(
                f"{run.results}: in {arm_of[path]} and in {run.arm}; a run cannot differ from "
                "itself, name another file"
            )
    if args.resamples < 100:
        raise PsbnError(f"--resamples {args.resamples}: an interval needs 100 or more")
    if not 0.5 <= args.confidence < 1:
        raise PsbnError(f"--confidence {args.confidence}: wanted 0.5 to 1, as 0.95")
    for option, number in (("--max-dets", args.max_dets), ("--plan-for", args.plan_for)):
        if number is not None and not 0 < number < math.inf:
            raise PsbnError(f"{option} {number}: wanted more than 0")
    if args.images and not os.path.isdir(args.images):
        raise PsbnError(f"--images {args.images}: no such folder")
    if args.images and not args.html:
        raise PsbnError("--images: they are shown in the page; add --html FILE")
    if args.threads < 1:
        raise PsbnError(f"--threads {args.threads}: wanted 1 or more")
    if args.seed < 0:
        raise PsbnError(f"--seed {args.seed}: wanted 0 or more")
    refuse_to_overwrite(args.json, args.html, overwrite=args.overwrite)
