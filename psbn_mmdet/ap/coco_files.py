"""The files that a comparison of detectors reads: COCO annotations, COCO results, work dirs.

Every reader either gives columns that AP can be computed from or raises an ``InputError`` whose
one line names the file, the record and the way out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS_NAME = "results.bbox.json"  # what tools/test.py writes into its work dir


class InputError(ValueError):
    """A file that cannot be compared; the message names the file, the record and the way out."""


@dataclass(frozen=True)
class Annotations:
    """The columns of a COCO annotation file; images and classes sorted by id as in pycocotools."""

    path: str
    image_ids: list
    file_names: list[str]
    class_ids: list
    class_names: list[str]
    image: np.ndarray  # (G,) index into image_ids, of each object
    cls: np.ndarray  # (G,) index into class_ids
    box: np.ndarray  # (G, 4) x, y, w, h in pixels
    area: np.ndarray  # (G,) as annotated: of the mask in COCO, not w * h
    crowd: np.ndarray  # (G,) bool
    nameless: np.ndarray  # (G,) bool, id 0: see _match_cells


@dataclass(frozen=True)
class Results:
    """The columns of a COCO result file, in the order of the file."""

    path: str
    image: np.ndarray  # (D,) index into Annotations.image_ids
    cls: np.ndarray  # (D,) index into Annotations.class_ids
    box: np.ndarray  # (D, 4) x, y, w, h in pixels
    score: np.ndarray  # (D,)


def load_json(path: str | Path) -> Any:
    """Reads a JSON file; a missing, unreadable or cut-off one is an ``InputError``."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except json.JSONDecodeError as e:
        raise InputError(
            f"{path}: not complete JSON, stops making sense at character {e.pos} of "
            f"{len(e.doc)} ({e.msg}); was the file cut off? Write it again"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not JSON text; pass the .bbox.json file") from None


def read_annotations(path: str | Path) -> Annotations:
    """Reads a COCO instance annotation file (``instances_val2017.json`` and the like).

    Objects of images or classes that the file does not list are left out, as in pycocotools.

    Raises:
        InputError: for JSON that is cut off or lacks a needed key, or a box that is no box.
    """
    data = load_json(path)
    if not isinstance(data, dict) or not {"images", "annotations", "categories"} <= data.keys():
        raise InputError(
            f"{path}: no COCO annotation file: wanted an object with images, annotations and "
            "categories; pass the file that the model was evaluated with"
        )
    try:
        names = {i["id"]: str(i.get("file_name", "")) for i in data["images"]}
        classes = {c["id"]: str(c.get("name", c["id"])) for c in data["categories"]}
        image_of = {id_: i for i, id_ in enumerate(sorted(names))}
        class_of = {id_: i for i, id_ in enumerate(sorted(classes))}
        objects = [
            o
            for o in data["annotations"]
            if o["image_id"] in image_of and o["category_id"] in class_of
        ]
        box, area = [o["bbox"] for o in objects], [o["area"] for o in objects]
        ids = [o["id"] for o in objects]
    except KeyError as e:
        raise InputError(f"{path}: a record has no {e}, which COCO's evaluation needs") from None
    except TypeError as e:
        raise InputError(f"{path}: no COCO annotation file ({e})") from None
    if len(set(ids)) < len(ids):
        seen: set = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise InputError(f"{path}: annotation id {twice} stands twice; ids must be unique")
    box = _numbers(box, (len(objects), 4))
    area = _numbers(area, (len(objects),))
    if box is None or area is None or not (np.isfinite(box).all() and np.isfinite(area).all()):
        bad = next(o for o in objects if not _is_box(o["bbox"]) or not _is_number(o["area"]))
        raise InputError(
            f"{path}: annotation {bad['id']} has bbox {bad['bbox']} and area {bad['area']}; "
            "wanted [x, y, w, h] and a number, all finite"
        )
    return Annotations(
        path=str(path),
        image_ids=list(image_of),
        file_names=[names[i] for i in image_of],
        class_ids=list(class_of),
        class_names=[classes[c] for c in class_of],
        image=np.array([image_of[o["image_id"]] for o in objects], np.int64),
        cls=np.array([class_of[o["category_id"]] for o in objects], np.int64),
        box=box,
        area=area,
        crowd=np.array([bool(o.get("iscrowd", 0)) for o in objects], bool),
        nameless=np.array([i == 0 for i in ids], bool),
    )


def read_results(path: str | Path, annotations: Annotations) -> Results:
    """Reads a COCO bbox result file: ``[{image_id, category_id, bbox, score}, ...]``.

    An empty list is a model that found nothing.

    Raises:
        InputError: for JSON that is cut off, an unknown image or class, a box with NaN or a
            negative size, a score that is no finite number; it names the file and the record.
    """
    records = load_json(path)
    if not isinstance(records, list):
        raise InputError(
            f"{path}: no COCO result file: wanted a list of boxes, got {type(records).__name__}"
        )
    image_of = {id_: i for i, id_ in enumerate(annotations.image_ids)}
    class_of = {id_: i for i, id_ in enumerate(annotations.class_ids)}
    n = len(records)
    try:
        image = np.fromiter((image_of.get(r["image_id"], -1) for r in records), np.int64, n)
        cls = np.fromiter((class_of.get(r["category_id"], -1) for r in records), np.int64, n)
        box = _numbers([r["bbox"] for r in records], (n, 4))
        score = _numbers([r["score"] for r in records], (n,))
        good = box is not None and score is not None
        good = good and np.isfinite(box).all() and np.isfinite(score).all()
        good = good and (box[:, 2:] >= 0).all() and (image >= 0).all() and (cls >= 0).all()
    except (KeyError, TypeError):
        good = False
    if not good:
        for i, r in enumerate(records):
            if problem := _problem(r, image_of, class_of, annotations.path):
                raise InputError(f"{path}: record {i}: {problem}")
        raise InputError(f"{path}: the boxes or scores are not numbers throughout")
    return Results(str(path), image, cls, box, score)


def _numbers(values: list, shape: tuple[int, ...]) -> np.ndarray | None:
    """The values as float64, or None where they are not all numbers in that shape."""
    try:
        array = np.array(values) if values else np.zeros(shape)
    except ValueError:  # rows of different lengths
        return None
    return array.astype(np.float64) if array.shape == shape and array.dtype.kind in "iuf" else None


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and bool(np.isfinite(x))


def _is_box(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 4 and all(map(_is_number, x))


def _problem(r: Any, image_of: dict, class_of: dict, annotations: str) -> str | None:
    """What is wrong with a record of a result file, in words; None if nothing is."""
    if not isinstance(r, dict):
        return f"is {r!r:.80}, wanted an object with image_id, category_id, bbox and score"
    if missing := [k for k in ("image_id", "category_id", "bbox", "score") if k not in r]:
        return f"has no {' and no '.join(missing)}; only bbox results can be compared"
    for key, known, what in (("image_id", image_of, "image"), ("category_id", class_of, "class")):
        if isinstance(r[key], list | dict) or r[key] not in known:
            return (
                f"{what} {r[key]!r:.80} is not in {annotations}; compare with the annotation "
                "file that the model was evaluated with"
            )
    if not _is_box(r["bbox"]):
        return f"bbox is {r['bbox']!r:.120}, wanted four finite numbers [x, y, w, h]"
    if min(r["bbox"][2:]) < 0:
        return f"bbox {r['bbox']} has a negative size; wanted [x, y, w, h], not two corners"
    if not _is_number(r["score"]):
        return f"score is {r['score']!r:.80}, wanted a finite number"
    return None


@dataclass(frozen=True)
class RunFiles:
    """Where a run lies: its result file, and what else its work dir says about it."""

    arm: str
    results: str
    annotations: str | None = None
    config: str | None = None
    checkpoint: str | None = None
    seed: int | None = None
    warnings: tuple[str, ...] = ()


def find_run(arm: str, path: str | Path) -> RunFiles:
    """A run from a result file, or from a work dir of ``tools/train.py`` and ``tools/test.py``.

    A work dir holds ``results.bbox.json``, the resolved config (whose ``test_evaluator`` names
    the annotation file) and the checkpoint that ``last_checkpoint`` names.

    Raises:
        InputError: when the path does not exist, the work dir has no results (with the command
            that writes them), or its configs disagree about the annotation file.
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
    found = [(c, *_read_config(c)) for c in configs]
    files = {annotations for _, annotations, _ in found if annotations}
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
        config=str(found[-1][0]) if found else None,
        checkpoint=str(checkpoint) if checkpoint else None,
        seed=next((s for *_, s in reversed(found) if s is not None), None),
        warnings=(f"{results} is older than {checkpoint}; test that checkpoint",) if stale else (),
    )


def _checkpoint(work_dir: Path) -> Path | None:
    last = work_dir / "last_checkpoint"
    named = work_dir / Path(last.read_text().strip()).name if last.exists() else None
    newest = max(work_dir.glob("*.pth"), key=lambda p: p.stat().st_mtime, default=None)
    return named if named and named.exists() else newest


def _read_config(path: Path) -> tuple[str | None, int | None]:
    """The annotation file and the seed that a resolved config names."""
    from mmengine.config import Config  # takes seconds, and result files do without

    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except Exception as e:
        raise InputError(f"{path}: cannot be read as a config ({e!s:.200})") from None
    evaluators = config.get("test_evaluator") or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if evaluator.get("ann_file"):
            return evaluator["ann_file"], (config.get("randomness") or {}).get("seed")
    return None, (config.get("randomness") or {}).get("seed")


def read_shared_annotations(runs: Sequence[RunFiles], path: str | None) -> Annotations:
    """The annotation file that all runs were evaluated with; ``path`` overrules the configs.

    Raises:
        InputError: when no file is known, or two runs name files with different images.
    """
    if path:
        return read_annotations(path)
    for run in runs:
        if not run.annotations:
            raise InputError(f"{run.results}: no config tells its annotation file; pass --ann FILE")
        if not Path(run.annotations).exists():
            raise InputError(
                f"{run.annotations}: the annotation file named by {run.config} does not exist "
                "here; pass --ann FILE"
            )
    read = {f: read_annotations(f) for f in dict.fromkeys(run.annotations for run in runs)}
    (first, a), *others = read.items()
    for other, b in others:
        only_a, only_b = set(a.image_ids) - set(b.image_ids), set(b.image_ids) - set(a.image_ids)
        if only_a or only_b:
            raise InputError(
                f"evaluated on different images: {first} ({len(a.image_ids)} images, only there: "
                f"{_some(only_a)}) and {other} ({len(b.image_ids)} images, only there: "
                f"{_some(only_b)}); test all models on the same images"
            )
        if any(not np.array_equal(getattr(a, c), getattr(b, c)) for c in ("image", "cls", "box")):
            raise InputError(f"{first} and {other}: same images, other objects; pass --ann FILE")
    return a


def check_same_images(
    annotations: Annotations, results: Sequence[Results], missing_is_empty: bool = False
) -> list[str]:
    """Tells by their boxes whether models were evaluated on the same images.

    A result file does not say on which images its model was run: one without a box may have been
    left out, or nothing was found there. A detector that was run leaves few images empty, so it
    is taken as left out when more than one image in twenty that another model has boxes on is
    without. A file without any box is a model that finds nothing.

    Args:
        missing_is_empty: do not refuse.

    Returns:
        What was seen but not refused, in words.
    """
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
                    " test both models on the same images, or say --missing-is-empty if this one "
                    "found nothing there"
                )
    return said


def _some(ids) -> str:
    ids = sorted(ids)
    return ", ".join(map(str, ids[:10])) + (f" and {len(ids) - 10} more" if ids[10:] else "") or "-"
