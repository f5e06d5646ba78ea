"""The runs that are compared: result files and work dirs, and whether they belong together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

import numpy as np

from ..python38 import pairwise, zip_strict
from .coco_files import Annotations, InputError, Results, decode, read_annotations

RESULTS_NAME = "results.bbox.json"
"""What tools/test.py writes into its work dir."""

METRICS_NAME = "metrics.json"
"""Written by tools/test.py after the results; holds the AP that mmdet computed from them."""

_ROUNDING = 0.0005 + 1e-9  # mmdet gives AP with three decimals


@dataclass(frozen=True)
class RunFiles:
    """Where a run lies: its result file, and what else its work dir says about it."""

    arm: str
    results: str
    annotations: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    seed: int | None = None
    reported: float | None = None  # AP in [0, 1] by metrics.json
    indices: str | None = None  # the part of the test set that the config chooses
    warnings: tuple[str, ...] = ()


def find_run(arm: str, path: str | Path) -> RunFiles:
    """A run from a result file, or from a work dir of ``tools/train.py`` and ``tools/test.py``.

    A work dir holds ``results.bbox.json`` and ``metrics.json``, the resolved config (whose
    ``test_evaluator`` names the annotation file) and the checkpoint that ``last_checkpoint``
    names.

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
    results = path / RESULTS_NAME
    if not results.exists():
        config = configs[-1] if configs else "CONFIG"
        raise InputError(
            f"{path}: a work dir with no {RESULTS_NAME}; write it with: "
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
        reported=_reported(path / METRICS_NAME),
        indices=read[-1]["indices"] if read else None,
        warnings=(f"{results} is older than {checkpoint}; test that checkpoint",) if stale else (),
    )


def _checkpoint(work_dir: Path) -> Path | None:
    last = work_dir / "last_checkpoint"
    named = work_dir / Path(last.read_text().strip()).name if last.exists() else None
    newest = max(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, default=None)
    return named if named and named.exists() else newest


def _read_config(path: Path) -> dict[str, Any]:
    """What a resolved config says: the annotation file, the seed, the part of the test set."""
    from mmengine.config import Config  # takes seconds, and result files do without

    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as e:
        said = " ".join(str(e).split())
        raise InputError(f"{path}: cannot be read as a config ({said:.200})") from None
    evaluators = config.get("test_evaluator") or []
    evaluators = evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]
    files = [e["ann_file"] for e in evaluators if isinstance(e, Mapping) and e.get("ann_file")]
    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    indices = dataset.get("indices")
    return {
        "annotations": files[0] if files else None,
        "seed": (config.get("randomness") or {}).get("seed"),
        "indices": None if indices is None else repr(indices),
    }


def _reported(path: Path) -> float | None:
    if not path.exists():
        return None
    metrics = decode(path, Dict[str, Any], "the metrics that tools/test.py writes")
    value = metrics.get("coco/bbox_mAP")
    return float(value) if isinstance(value, (int, float)) and value >= 0 else None


def read_shared_annotations(runs: Sequence[RunFiles], path: str | None) -> Annotations:
    """The annotation file that all runs were evaluated with; ``path`` overrules the configs.

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
    if path:
        return read_annotations(path)
    for run in runs:
        if not run.annotations:
            raise InputError(f"{run.results}: no config names its annotation file; pass --ann FILE")
        if not Path(run.annotations).exists():
            raise InputError(
                f"{run.annotations}: the annotation file named by {run.config} does not exist "
                "here; pass --ann FILE"
            )
    files = list(dict.fromkeys(run.annotations for run in runs if run.annotations))
    first, one = files[0], read_annotations(files[0])
    for other in files[1:]:
        two = read_annotations(other)
        ids, other_ids = set(one.image_ids), set(two.image_ids)
        if ids != other_ids:
            raise InputError(
                f"evaluated on different images: {first} ({len(one.image_ids)} images, only there: "
                f"{_some(ids - other_ids)}) and {other} ({len(two.image_ids)} images, only there: "
                f"{_some(other_ids - ids)}); test all models on the same images"
            )
        same = one.class_names == two.class_names and one.class_ids == two.class_ids
        for column in ("image", "cls", "box", "area", "crowd"):
            same = same and np.array_equal(getattr(one, column), getattr(two, column))
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
    for a, in_a in zip_strict(results, seen):
        if not in_a.any():
            said.append(f"{a.path}: holds no box, so every AP is 0")
            continue
        for b, in_b in zip_strict(results, seen):
            missing = ids[in_b & ~in_a]
            if len(missing) > 0.05 * in_b.sum() and not missing_is_empty:
                raise InputError(
                    f"evaluated on different images: {a.path} has no box on {len(missing)} of the "
                    f"{in_b.sum()} images that {b.path} has boxes on (image ids {_some(missing)});"
                    " test both models on the same images, or add --missing-is-empty if this one "
                    "detects nothing there"
                )
    return said


def check_distinct(runs: Sequence[RunFiles], results: Sequence[Results]) -> list[str]:
    """Refuse a run that an arm has twice: it would count as a seed without any spread.

    Returns:
        A warning for each pair of runs of an arm with the same seed.

    Raises:
        InputError: Two runs of an arm have the same boxes.
    """
    said = []
    for (i, a), (j, b) in itertools.combinations(enumerate(runs), 2):
        if a.arm != b.arm:
            continue
        columns = ("image", "cls", "box", "score")
        pairs = [(getattr(results[i], c), getattr(results[j], c)) for c in columns]
        if len(results[i].score) and all(np.array_equal(x, y) for x, y in pairs):
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


def check_reported(runs: Sequence[RunFiles], ap: Iterable[float], annotations: Annotations) -> None:
    """Compare each AP (in [0, 1]) with the one that mmdet wrote into the work dir.

    They agree to the three decimals that mmdet writes, or the results, the annotations and the
    metrics are not of the same evaluation.

    Raises:
        InputError: They do not agree.
    """
    for run, value in zip_strict(runs, ap):
        if run.reported is not None and abs(run.reported - value) > _ROUNDING:
            metrics = Path(run.results).with_name(METRICS_NAME)
            raise InputError(
                f"{run.results}: AP is {value:.3f} with {annotations.path}, but {metrics} says "
                f"{run.reported:.3f}; were the two written by different tests, or with other "
                "annotations or classes? Run tools/test.py again"
            )


def _some(ids) -> str:
    ids = sorted(ids)
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if ids[10:] else "") or "-"
