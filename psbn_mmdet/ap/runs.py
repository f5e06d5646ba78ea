"""The runs that are compared: result files and work dirs, and whether they belong together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .coco_files import KINDS, Annotations, InputError, Results, decode, read_annotations
from .evaluate import evaluate
from .matching import MAX_DETS

RESULTS_NAME = "results.{kind}.json"
"""What tools/test.py writes into its work dir."""

METRICS_NAME = "metrics.json"
"""Written by tools/test.py after the results; holds the AP that mmdet computed from them."""

_ROUNDING = 0.0005 + 1e-9  # mmdet gives AP with three decimals

# mmdet takes mAP at 100 detections per image and class, and these at the last of proposal_nums
_REPORTED = {"AP": "mAP", "AP50": "mAP_50", "AP75": "mAP_75"}
_REPORTED |= {f"AP{size}": f"mAP_{size}" for size in "sml"}
_PROPOSALS = 1000


@dataclass(frozen=True)
class RunFiles:
    """Where a run lies: its result file, and what else its work dir says about it."""

    arm: str
    results: str
    annotations: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    seed: int | None = None
    reported: Mapping[str, float] = field(default_factory=dict)  # AP in [0, 1] by metrics.json
    proposals: int = _PROPOSALS  # detections per image and class that all of these but AP are of
    indices: str | None = None  # the part of the test set that the config chooses
    classes: tuple[str, ...] | None = None  # those of the test set that it chooses
    warnings: tuple[str, ...] = ()


def find_run(arm: str, path: str | Path, kind: str = "bbox") -> RunFiles:
    """A run from a result file, or from a work dir of ``tools/train.py`` and ``tools/test.py``.

    A work dir holds ``results.bbox.json`` (or another of KINDS) and ``metrics.json``, the resolved
    config (whose ``test_evaluator`` names the annotation file) and the checkpoint that
    ``last_checkpoint`` names.

    Raises:
        InputError: The path does not exist, the work dir has no results (with the command that
            writes them), or its configs disagree about the annotation file.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise InputError(f"{path}: does not exist; wanted a result file or a work dir")
        return RunFiles(arm, str(path))
    configs = sorted(path.glob("*.py"), key=lambda p: p.stat().st_mtime)
    checkpoint = _checkpoint(path)
    results = path / RESULTS_NAME.format(kind=kind)
    if not results.exists():
        config = configs[-1] if configs else "CONFIG"
        raise InputError(
            f"{path}: a work dir with no {results.name}; write it with: "
            f"python tools/test.py {config} {checkpoint or 'CHECKPOINT'} --work-dir {path}"
        )
    read = [_read_config(c) for c in configs]
    files = {c["annotations"] for c in read if c["annotations"]}
    if len(files) > 1:
        raise InputError(
            f"{path}: its configs name different annotation files ({', '.join(sorted(files))}); "
            "pass the right one with --ann"
        )
    stale = checkpoint and checkpoint.stat().st_mtime > results.stat().st_mtime
    return RunFiles(
        arm=arm,
        results=str(results),
        annotations=files.pop() if files else None,
        config=str(configs[-1]) if configs else None,
        checkpoint=str(checkpoint) if checkpoint else None,
        seed=next((c["seed"] for c in reversed(read) if c["seed"] is not None), None),
        reported=_reported(path / METRICS_NAME, kind),
        proposals=read[-1]["proposals"] if read else _PROPOSALS,
        indices=read[-1]["indices"] if read else None,
        classes=read[-1]["classes"] if read else None,
        warnings=(f"{results} is older than {checkpoint}; test that checkpoint",) if stale else (),
    )


def _checkpoint(work_dir: Path) -> Path | None:
    last = work_dir / "last_checkpoint"
    named = work_dir / Path(last.read_text().strip()).name if last.exists() else None
    newest = max(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, default=None)
    return named if named and named.exists() else newest


def _read_config(path: Path) -> dict[str, Any]:
    """What a resolved config says: annotation file, seed, the part of the test set, its classes."""
    from mmengine.config import Config  # takes seconds, and result files do without

    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as e:
        said = " ".join(str(e).split())
        raise InputError(f"{path}: cannot be read as a config ({said:.200})") from None
    evaluators = config.get("test_evaluator") or []
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    evaluators = [e for e in evaluators if isinstance(e, Mapping) and e.get("ann_file")]
    proposals = evaluators[0].get("proposal_nums") if evaluators else None
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    indices = dataset.get("indices")
    classes = (dataset.get("metainfo") or {}).get("classes")
    return {
        "annotations": evaluators[0]["ann_file"] if evaluators else None,
        "seed": (config.get("randomness") or {}).get("seed"),
        "indices": None if indices is None else repr(indices),
        "classes": tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else None,
        "proposals": max(proposals or [_PROPOSALS]),
    }


def _reported(path: Path, kind: str) -> dict[str, float]:
    """What mmdet wrote: AP, AP50 and so on, and those of classes; -1 and NaN are left out."""
    if not path.exists():
        return {}
    metrics = decode(path, dict[str, Any], "the metrics that tools/test.py writes")
    found = {name: metrics.get(f"coco/{kind}_{key}") for name, key in _REPORTED.items()}
    if not any(f"coco/{other}_mAP" in metrics for other in KINDS if other != kind):
        # mmdet writes those of the kind it evaluated last
        suffix = "_precision"
        found |= {
            key[len("coco/") : -len(suffix)]: value
            for key, value in metrics.items()
            if key.startswith("coco/") and key.endswith(suffix)
        }
    return {n: float(v) for n, v in found.items() if isinstance(v, (int, float)) and v >= 0}


def read_shared_annotations(
    runs: Sequence[RunFiles],
    path: str | None,
    kind: str = "bbox",
    classes: Sequence[str] | None = None,
) -> Annotations:
    """The annotation file that all runs were evaluated with.

    Args:
        runs: All of them.
        path: Overrules the files that the configs name.
        kind: What is compared, one of ``coco_files.KINDS``.
        classes: Overrules those that the configs choose; None without a config: all.

    Raises:
        InputError: No file is known, or two runs name files with different images, classes or
            objects, or chose different parts of the test set.
    """
    for a, b in pairwise([run for run in runs if run.config]):
        if a.indices != b.indices:
            raise InputError(
                f"evaluated on different images: {a.config} takes indices={a.indices} of the test "
                f"set, {b.config} {b.indices}; test all models on the same images"
            )
    if classes is None:
        chosen = {run.classes: run for run in runs if run.classes}
        if len(chosen) > 1:
            a, b, *_ = chosen.values()
            raise InputError(
                f"evaluated on different classes: {', '.join(a.classes or ())} by {a.config}, "
                f"{', '.join(b.classes or ())} by {b.config}; pass --classes"
            )
        classes = next(iter(chosen), None)
    if path:
        return read_annotations(path, kind, classes)
    for run in runs:
        if not run.annotations:
            raise InputError(f"{run.results}: no config names its annotation file; pass --ann FILE")
        if not Path(run.annotations).exists():
            raise InputError(
                f"{run.annotations}: the annotation file named by {run.config} does not exist "
                "here; pass --ann FILE"
            )
    files = list(dict.fromkeys(run.annotations for run in runs if run.annotations))
    first, one = files[0], read_annotations(files[0], kind, classes)
    for other in files[1:]:
        two = read_annotations(other, kind, classes)
        ids, other_ids = set(one.image_ids), set(two.image_ids)
        if ids != other_ids:
            raise InputError(
                f"evaluated on different images: {first} ({len(one.image_ids)} images, only there: "
                f"{_some(ids - other_ids)}) and {other} ({len(two.image_ids)} images, only there: "
                f"{_some(other_ids - ids)}); test all models on the same images"
            )
        same = one.class_names == two.class_names and one.class_ids == two.class_ids
        for column in ("image", "cls", "box", "area", "crowd", "keypoints"):
            same = same and np.array_equal(getattr(one, column), getattr(two, column))
        same = same and one.masks == two.masks
        if not same:
            raise InputError(
                f"{first} and {other}: the same images with other objects or classes; test all "
                "models with one of them"
            )
    return one


def check_same_images(
    annotations: Annotations, results: Sequence[Results], missing_is_empty: bool = False
) -> list[str]:
    """Tell by their boxes whether models were evaluated on the same images.

    A result file does not say on which images its model was run: one without a box may have been
    left out, or nothing was detected there. A detector that was run leaves few images empty, so
    an image is taken as left out when more than one in twenty of those that another model has
    boxes on are without. A file without any box is a model that detects nothing.

    Args:
        annotations: What the results refer to.
        results: Of all models.
        missing_is_empty: Do not refuse.

    Returns:
        What was seen but not refused, in words.

    Raises:
        InputError: A model was evaluated on fewer images than another, or none has a box.
    """
    if not any(len(r.score) for r in results):
        raise InputError(f"nothing to measure: {results[0].path} and all other runs hold no box")
    ids = np.array(annotations.image_ids, dtype=object)
    seen = [np.bincount(r.image, minlength=len(ids)) > 0 for r in results]
    said = []
    for a, in_a in zip(results, seen, strict=True):
        if not in_a.any():
            said.append(f"{a.path}: holds no box, so every AP is 0")
            continue
        for b, in_b in zip(results, seen, strict=True):
            missing = ids[in_b & ~in_a]
            if len(missing) > 0.05 * in_b.sum() and not missing_is_empty:
                raise InputError(
                    f"evaluated on different images: {a.path} has no box on {len(missing)} of the "
                    f"{in_b.sum()} images that {b.path} has boxes on (image ids {_some(missing)});"
                    " test both models on the same images, or add --missing-is-empty if this one "
                    "detects nothing there"
                )
    return said


def check_classes(
    annotations: Annotations, results: Sequence[Results], missing_is_empty: bool = False
) -> list[str]:
    """Tell by their boxes whether models were trained for all classes of the annotations.

    Args:
        annotations: What the results refer to.
        results: Of all models.
        missing_is_empty: Do not refuse.

    Returns:
        What was seen but not refused, in words.

    Raises:
        InputError: No model has a box of more than half of the classes with objects.
    """
    k = len(annotations.class_ids)
    there = np.bincount(annotations.cls[~annotations.crowd], minlength=k) > 0
    found = [np.bincount(r.cls, minlength=k) > 0 for r in results]
    names = np.array(annotations.class_names, dtype=object)
    never = there & ~np.any(found, 0)
    if 2 * never.sum() > there.sum() and not missing_is_empty:
        raise InputError(
            f"no run has a detection of {never.sum()} of the {there.sum()} classes with objects "
            f"({_some(names[never])}), which count as AP 0; pass --classes "
            f"'{','.join(names[there & ~never])}' if the models know these alone, or "
            "--missing-is-empty if they detect nothing of the others"
        )
    said = []
    if never.any() and not missing_is_empty:
        said.append(
            f"no run has a detection of {_some(names[never])}, which counts as AP 0; were the "
            "models trained for it? --classes leaves classes out"
        )
    if differing := [
        r.path for r, f in zip(results, found, strict=True) if (there & ~f & ~never).any()
    ]:
        some = _some(names[there & ~never & ~np.all(found, 0)])
        said.append(f"{_some(differing)}: no detection of some classes that others have ({some})")
    return said


def check_distinct(runs: Sequence[RunFiles], results: Sequence[Results]) -> list[str]:
    """Refuse a run that an arm has twice: it would count as a seed without any spread.

    A copy is one whose boxes are the same up to their order and to rounding: to half a pixel, and
    half a hundredth of score.

    Returns:
        A warning for each pair of runs of an arm with the same seed, and of arms with the same
        boxes.

    Raises:
        InputError: Two runs of an arm have the same boxes.
    """
    said = []
    classes = 1 + max(int(r.cls.max(initial=0)) for r in results)
    cells = [np.sort(r.image * classes + r.cls) for r in results]
    for (i, a), (j, b) in itertools.combinations(enumerate(runs), 2):
        same = (
            len(cells[i]) > 0
            and np.array_equal(cells[i], cells[j])
            and _same_boxes(results[i], results[j])
        )
        if same and a.arm != b.arm:
            said.append(
                f"{a.results} (of {a.arm}) and {b.results} (of {b.arm}) hold the same boxes"
            )
        if a.arm != b.arm:
            continue
        if same:
            raise InputError(
                f"arm {a.arm}: {a.results} and {b.results} hold the same boxes, so they are one "
                "run; name each run once"
            )
        if a.seed is not None and a.seed == b.seed:
            said.append(
                f"{a.results} and {b.results} are of the same seed, {a.seed}; "
                "the interval takes them for two"
            )
    return said


def _same_boxes(a: Results, b: Results) -> bool:
    """Whether two hold the same, in whatever order: per image and class, column by column, sorted.

    No column so sorted moves by more than the boxes do, however rounding changes their order.
    """

    def content(results: Results) -> np.ndarray:
        columns = [*results.box.T, 100 * results.score]
        return np.stack([x[np.lexsort((x, results.cls, results.image))] for x in columns])

    return bool(np.abs(content(a) - content(b)).max() <= 0.5 + 1e-6)


def pair_by_seed(
    runs: Sequence[RunFiles], arms: Mapping[str, list[int]]
) -> tuple[dict[str, list[int]], str]:
    """The arms with their runs in the order of their seeds, so that runs of one seed are paired.

    Returns:
        The arms, and a sentence that says what was paired.

    Raises:
        InputError: Arms have other seeds, or a seed twice, or the seeds of some runs are not
            known; of none, the runs are paired in the order given.
    """
    seeds = {arm: [runs[i].seed for i in members] for arm, members in arms.items()}
    first, *others = arms
    known = [s is not None for of_arm in seeds.values() for s in of_arm]
    if not any(known):
        if uneven := [arm for arm in others if len(arms[arm]) != len(arms[first])]:
            raise InputError(
                f"--paired: {first} has {len(arms[first])} runs and {uneven[0]} "
                f"{len(arms[uneven[0]])}; name one of each seed"
            )
        together = "; ".join(
            " with ".join(runs[i].results for i in members)
            for members in zip(*arms.values(), strict=True)
        )
        return dict(arms), f"No work dir names the seeds: runs are paired as given, {together}."
    if not all(known):
        run = runs[[i for of_arm in arms.values() for i in of_arm][known.index(False)]]
        raise InputError(f"--paired: {run.results}: its seed is not known; pass its work dir")
    for arm in arms:
        if len(set(seeds[arm])) < len(seeds[arm]) or set(seeds[arm]) != set(seeds[first]):
            raise InputError(
                f"--paired: {arm} has the seeds {_some(seeds[arm])} and {first} "
                f"{_some(seeds[first])}; name one run of each seed in every arm"
            )
    ordered = {a: sorted(members, key=lambda i: runs[i].seed or 0) for a, members in arms.items()}
    return ordered, f"Runs are paired by their seeds, {_some(seeds[first])}."


def check_reported(
    runs: Sequence[RunFiles],
    results: Sequence[Results],
    annotations: Annotations,
    max_dets: int | None = None,
) -> list[str]:
    """Compare every AP that mmdet wrote into the work dir with the one of these files.

    They agree to the three decimals that mmdet writes, or the results, the annotations and the
    metrics are not of the same evaluation. mmdet takes AP at 100 detections per image and class,
    the others at 1000 (``proposal_nums``).

    Args:
        runs: All of them.
        results: Theirs.
        annotations: The data set.
        max_dets: At which the comparison takes all of them.

    Returns:
        A warning for each run of which some number is another with ``max_dets``.

    Raises:
        InputError: They do not agree.
    """
    said = []
    most = max_dets or MAX_DETS[annotations.kind]
    for run, found in zip(runs, results, strict=True):
        if not run.reported:
            continue
        # beyond the most that an image has of a class nothing changes
        cells = found.image * len(annotations.class_ids) + found.cls
        deepest = int(np.bincount(cells).max(initial=1))
        depths = {n: min(n, deepest) for n in (100, run.proposals, most)}
        aps = {n: _named(annotations, found, n) for n in set(depths.values())}
        at = {n: aps[depth] for n, depth in depths.items()}
        metrics = Path(run.results).with_name(METRICS_NAME)
        other = []
        for name, reported in run.reported.items():
            if name not in at[most]:
                continue
            value = at[100 if name == "AP" else run.proposals][name]
            if abs(reported - value) > _ROUNDING:
                raise InputError(
                    f"{run.results}: {name} is {value:.3f} with {annotations.path}, but {metrics} "
                    f"says {reported:.3f}; were the two written by different tests, or with other "
                    "annotations or classes? Run tools/test.py again"
                )
            if abs(at[most][name] - value) > _ROUNDING:
                other.append(f"{name} {reported:.3f} for {at[most][name]:.3f}")
        if other:
            said.append(
                f"{metrics} says {', '.join(other)}: mmdet takes AP at 100 detections per image "
                f"and class and the others at {run.proposals}, this comparison all at {most} "
                "(--max-dets)"
            )
    return said


def _named(annotations: Annotations, results: Results, max_dets: int) -> dict[str, float]:
    stats, per_class = evaluate(annotations, results, max_dets)
    return {**dict(zip(annotations.class_names, per_class, strict=True)), **stats}


def _some(ids: Iterable[Any]) -> str:
    ids = sorted(ids)
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if ids[10:] else "") or "-"
