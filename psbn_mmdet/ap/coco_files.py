"""COCO annotation and result files, read into the columns that AP is computed from.

The format stands once, in the structs below; msgspec decodes and checks it in one pass, and skips
what AP does not need (segmentations, captions) without building it. Every reader gives columns or
raises an :class:`InputError` whose one line names the file, the record and what to do.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from ..errors import PsbnError

KINDS = ("bbox", "segm", "keypoints")
"""What is compared, in pycocotools' words: boxes, masks or COCO's 17 keypoints of a person."""

Id = int | float | str  # a float because some writers put 3.0 for 3, which are equal
_ABSENT = msgspec.Raw(b"")


class InputError(PsbnError, ValueError):
    """Something that cannot be compared; the message names it and says what to do."""


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str | None = ""
    width: float | None = None
    height: float | None = None
    neg_category_ids: msgspec.Raw = _ABSENT  # LVIS has it


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: Id | None = None


class _Rle(msgspec.Struct, gc=False):
    size: tuple[int, int]  # height, width
    counts: str | list[int]


class _Object(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    area: float
    iscrowd: bool | int | float | None = 0


class _ObjectWithMask(_Object, gc=False, kw_only=True):
    segmentation: _Rle | list[list[float]]


class _ObjectWithKeypoints(_Object, gc=False, kw_only=True):
    keypoints: list[float]
    num_keypoints: int


_O = TypeVar("_O")


class _Dataset(msgspec.Struct, Generic[_O]):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_O]


class _Box(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    score: float
    segmentation: msgspec.Raw = _ABSENT
    keypoints: msgspec.Raw = _ABSENT


class _Mask(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    segmentation: _Rle
    score: float


class _Pose(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    keypoints: list[float]
    score: float


_OBJECTS = {
    "bbox": (_Dataset[_Object], "an object of images, annotations (with area) and categories"),
    "segm": (_Dataset[_ObjectWithMask], "annotations with area and segmentation"),
    "keypoints": (_Dataset[_ObjectWithKeypoints], "annotations with keypoints and num_keypoints"),
}
_FOUND = {
    "bbox": (list[_Box], "bbox [x, y, w, h]"),
    "segm": (list[_Mask], "segmentation {size, counts}"),
    "keypoints": (list[_Pose], "keypoints [x, y, score, ...]"),
}


@dataclass(frozen=True)
class Annotations:
    """The columns of a COCO annotation file; images and classes sorted by id as in pycocotools."""

    path: str
    image_ids: list[Any]
    file_names: list[str]
    class_ids: list[Any]
    class_names: list[str]
    image: np.ndarray  # (G,) index into image_ids, of each object
    cls: np.ndarray  # (G,) index into class_ids
    box: np.ndarray  # (G, 4) x, y, w, h in pixels
    area: np.ndarray  # (G,) as annotated: of the mask in COCO, not w * h
    crowd: np.ndarray  # (G,) bool
    nameless: np.ndarray  # (G,) bool, id 0: see _match_cells
    left_out: int = 0  # objects of images or classes that the file does not list
    kind: str = "bbox"  # one of KINDS
    # of segm: G run-length encodings, as pycocotools.mask has them
    masks: Sequence[dict[str, Any]] = ()
    keypoints: np.ndarray = field(default_factory=lambda: np.empty(0))  # (G, 17, 3) x, y, visible
    size: np.ndarray = field(default_factory=lambda: np.empty(0))  # (N, 2) w, h; NaN: not said
    other_classes: frozenset[Any] = frozenset()  # ids of classes that were not asked for

    @property
    def unlabelled(self) -> np.ndarray:
        """(G,) bool: objects without a labelled keypoint, which do not count as such."""
        if self.kind != "keypoints":
            return np.zeros(len(self.image), bool)
        return np.all(self.keypoints[..., 2] <= 0, -1)

    @property
    def warnings(self) -> list[str]:
        """What a reader must know of the file."""
        said = []
        if self.left_out:
            said.append(
                f"{self.path}: {self.left_out} objects are of images or classes that the file "
                "does not list and were left out, as pycocotools does"
            )
        if negative := int(np.sum(self.area < 0)):
            said.append(
                f"{self.path}: {negative} objects have a negative area and do not count, as in "
                "pycocotools"
            )
        return said


@dataclass(frozen=True)
class Results:
    """The columns of a COCO result file, in the order of the file."""

    path: str
    image: np.ndarray  # (D,) index into Annotations.image_ids
    cls: np.ndarray  # (D,) index into Annotations.class_ids
    box: np.ndarray  # (D, 4) x, y, w, h in pixels; around the mask or the keypoints
    score: np.ndarray  # (D,)
    masks: Sequence[dict[str, Any]] = ()  # of segm: D run-length encodings
    keypoints: np.ndarray = field(default_factory=lambda: np.empty(0))  # (D, 17, 2) x, y


def read_annotations(
    path: str | Path, kind: str = "bbox", classes: Sequence[str] | None = None
) -> Annotations:
    """Read a COCO instance annotation file (``instances_val2017.json`` and the like).

    Objects of images or classes that the file does not list are left out, as in pycocotools, and
    counted.

    Args:
        path: The file; gzip, UTF-16 and a byte order mark are read, too.
        kind: What is compared, one of KINDS.
        classes: Names of the classes to keep, as pycocotools' ``catIds`` does it; None: all.

    Raises:
        InputError: The JSON is cut off, lacks a key or has a value of another type; two objects
            share an id; an object is of an image or class that is listed under an id of another
            type (``"3"`` for ``3``), which would drop it; the file is LVIS's, whose AP has other
            rules; a class that is not there was asked for.
    """
    data = decode(path, *_OBJECTS[kind])
    if any(len(bytes(i.neg_category_ids)) for i in data.images):
        raise InputError(
            f"{path}: LVIS annotations, which name the classes that were looked for in each image; "
            "COCO's AP counts what they left open as false. Evaluate them with the package lvis"
        )
    images = {i.id: i for i in data.images}
    names = {c.id: str(c.id if c.name is None else c.name) for c in data.categories}
    times = Counter(names.values())  # classes of equal names would be one row of a table
    names = {i: name if times[name] == 1 else f"{name} (id {i})" for i, name in names.items()}
    listed = _places(path, "categories", names)
    if missing := [c for c in classes or () if c not in names.values()]:
        raise InputError(
            f"{path}: has no class {missing[0]!r}; its classes are {', '.join(names.values())}"
        )
    image_of = _places(path, "images", images)
    kept_classes = [c for c in listed if classes is None or names[c] in classes]
    class_of = {c: i for i, c in enumerate(kept_classes)}
    known = [o for o in data.annotations if o.image_id in image_of and o.category_id in listed]
    if len(known) < len(data.annotations):
        as_text = {str(i) for i in images}, {str(c) for c in names}
        for o in data.annotations:
            for what, id_, ids, text in (
                ("image", o.image_id, image_of, as_text[0]),
                ("category", o.category_id, listed, as_text[1]),
            ):
                if id_ not in ids and str(id_) in text:
                    raise InputError(
                        f"{path}: annotation {o.id!r} is of {what} {id_!r} ({_type(id_)}), which "
                        f"the file lists as {_type(next(iter(ids)))}; write ids of one type"
                    )
    named = Counter(o.id for o in known)
    if len(named) < len(known):
        twice = next(i for i, times in named.items() if times > 1)
        raise InputError(f"{path}: two annotations have the id {twice!r}; ids must be unique")
    kept = [o for o in known if o.category_id in class_of]
    n = len(kept)
    size = [[images[i].width or np.nan, images[i].height or np.nan] for i in image_of]
    shapes: dict[str, Any] = {}
    if kind == "segm":
        shapes["masks"] = [_rle(path, o.id, o.segmentation, images[o.image_id]) for o in kept]
    elif kind == "keypoints":
        shapes["keypoints"] = _keypoints(path, "annotation", [(o.id, o.keypoints) for o in kept])
        for o, points in zip(kept, shapes["keypoints"], strict=True):
            if o.num_keypoints != (points[:, 2] > 0).sum():
                raise InputError(
                    f"{path}: annotation {o.id!r}: num_keypoints is {o.num_keypoints}, but "
                    f"{(points[:, 2] > 0).sum()} keypoints have a visibility above 0"
                )
    return Annotations(
        path=str(path),
        image_ids=list(image_of),
        file_names=[images[i].file_name or "" for i in image_of],
        class_ids=kept_classes,
        class_names=[names[c] for c in kept_classes],
        image=np.array([image_of[o.image_id] for o in kept], np.int64),
        cls=np.array([class_of[o.category_id] for o in kept], np.int64),
        box=np.array([o.bbox for o in kept], np.float64).reshape(n, 4),
        area=np.array([o.area for o in kept], np.float64),
        crowd=np.array([bool(o.iscrowd) for o in kept], bool),
        nameless=np.array([o.id == 0 for o in kept], bool),
        left_out=len(data.annotations) - len(known),
        kind=kind,
        size=np.array(size, float).reshape(len(size), 2),
        other_classes=frozenset(names) - frozenset(kept_classes),
        **shapes,
    )


def read_results(path: str | Path, annotations: Annotations, boxes_alone: bool = False) -> Results:
    """Read a COCO result file: ``[{image_id, category_id, score, bbox}, ...]``.

    With annotations of another kind it is ``segmentation`` or ``keypoints`` instead of ``bbox``.
    An empty list is a model that detects nothing.

    Args:
        path: The file; gzip, UTF-16 and a byte order mark are read, too.
        annotations: What it refers to.
        boxes_alone: Whether boxes are wanted although the records hold masks or keypoints, too.

    Raises:
        InputError: The JSON is cut off, lacks a key or has a value of another type (NaN is one);
            a box is of an image or class that the annotations do not list, or has a negative
            size; boxes look like corners or like fractions of the image; records for boxes hold
            masks or keypoints.
    """
    kind = annotations.kind
    record_type, wanted = _FOUND[kind]
    records = decode(
        path, record_type, f"a list of objects with image_id, category_id, {wanted} and score"
    )
    if annotations.other_classes:
        records = [r for r in records if r.category_id not in annotations.other_classes]
    n = len(records)
    image_of = {id_: i for i, id_ in enumerate(annotations.image_ids)}
    class_of = {id_: i for i, id_ in enumerate(annotations.class_ids)}
    image = np.fromiter((image_of.get(r.image_id, -1) for r in records), np.int64, n)
    cls = np.fromiter((class_of.get(r.category_id, -1) for r in records), np.int64, n)
    for what, index, known in (("image", image, image_of), ("category", cls, class_of)):
        if (index < 0).any():
            i = int(np.argmax(index < 0))
            id_ = getattr(records[i], f"{what}_id")
            other = str(id_) in {str(k) for k in known}
            raise InputError(
                f"{path}: record {i}: {what} {id_!r} is not in {annotations.path}; "
                + (
                    f"there it is {_type(next(iter(known)))}, here {_type(id_)}: write ids of "
                    "one type"
                    if other
                    else "compare with the annotation file that the model was evaluated with"
                )
            )
    shapes: dict[str, Any] = {}
    if kind == "segm":
        from pycocotools.mask import toBbox

        size = annotations.size[image]
        shapes["masks"] = [
            _rle(path, i, r.segmentation, _Image(0, "", *wh))
            for i, (r, wh) in enumerate(zip(records, size, strict=True))
        ]
        box = np.array(toBbox(shapes["masks"]) if n else [], np.float64).reshape(n, 4)
    elif kind == "keypoints":
        points = _keypoints(path, "record", [(i, r.keypoints) for i, r in enumerate(records)])
        shapes["keypoints"] = points = points[..., :2]
        box = np.concatenate([points.min(1), np.ptp(points, axis=1)], 1) if n else np.empty((0, 4))
    else:
        box = np.array([r.bbox for r in records], np.float64).reshape(n, 4)
        if not boxes_alone:
            _check_kind(path, records)
        _check_boxes(path, records, box, image, annotations)
    score = np.fromiter((r.score for r in records), np.float64, n)
    return Results(str(path), image, cls, box, score, **shapes)


def _check_kind(path: str | Path, records: Sequence[_Box]) -> None:
    """Refuse records that are likely meant for more than their boxes."""
    for key, kind in (("segmentation", "segm"), ("keypoints", "keypoints")):
        if any(len(bytes(getattr(r, key))) > 4 for r in records):  # more than null
            raise InputError(
                f"{path}: its records hold {key}; pass --type {kind} to compare those, or --type "
                "bbox for their boxes"
            )


def _check_boxes(
    path: str | Path,
    records: Sequence[_Box],
    box: np.ndarray,
    image: np.ndarray,
    annotations: Annotations,
) -> None:
    """Refuse boxes that are something else."""
    if not len(box):
        return
    if (box[:, 2:] < 0).any():
        i = int(np.argmax((box[:, 2:] < 0).any(1)))
        raise InputError(
            f"{path}: record {i}: bbox {list(records[i].bbox)} has a negative size; "
            "wanted [x, y, w, h], not two corners"
        )
    if not len(annotations.box):
        return
    if np.abs(box).max() <= 1.5 and np.median(annotations.box[:, 2:]) > 2:
        raise InputError(
            f"{path}: all boxes lie in 0..1, those of {annotations.path} do not: they look like "
            "fractions of the image; wanted [x, y, w, h] in pixels"
        )
    # as x, y, w, h most would leave the image, and as two corners all are boxes
    reach = (annotations.box[:, :2] + annotations.box[:, 2:]).max(0)
    size = annotations.size[image]
    inside = 1.02 * np.where(np.isnan(size), reach, size) + 1
    outside = (box[:, :2] + box[:, 2:] > inside).any(1).mean()
    if (box[:, 2:] >= box[:, :2]).all() and (box[:, 2:] <= inside).all() and outside > 0.2:
        raise InputError(
            f"{path}: {outside:.0%} of the boxes leave their image and all look like two corners; "
            "wanted [x, y, w, h]"
        )


def _rle(path: str | Path, name: Id, given: Any, image: _Image) -> dict[str, Any]:
    """A mask as pycocotools.mask has them."""
    from pycocotools import mask

    if isinstance(given, _Rle):
        size = [*given.size]
        if (image.height or size[0], image.width or size[1]) != tuple(size) and not (
            np.isnan(image.height or 0) or np.isnan(image.width or 0)
        ):
            raise InputError(
                f"{path}: {name!r}: a mask of height and width {size} on an image of "
                f"{[image.height, image.width]}"
            )
        if isinstance(given.counts, str):
            return {"size": size, "counts": given.counts.encode()}
        return mask.frPyObjects({"size": size, "counts": given.counts}, *size)
    if not image.height or not image.width:
        raise InputError(f"{path}: {name!r}: polygons need the height and width of their image")
    try:
        return mask.merge(mask.frPyObjects(given, int(image.height), int(image.width)))
    except Exception as error:
        raise InputError(f"{path}: {name!r}: polygons cannot be read ({error})") from None


def _keypoints(path: str | Path, what: str, named: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """(n, 17, 3)."""
    for name, points in named:
        if len(points) != 51:
            raise InputError(
                f"{path}: {what} {name!r}: {len(points)} numbers of keypoints; wanted x, y and "
                "a third number of COCO's 17"
            )
    return np.array([p for _, p in named], np.float64).reshape(-1, 17, 3)


def decode(path: str | Path, kind: Any, wanted: str) -> Any:
    """Decode a JSON file into a msgspec type.

    Args:
        path: The file; gzip, UTF-16 and a byte order mark are read, too.
        kind: What msgspec is to make of it.
        wanted: The same in words, for the error.

    Raises:
        InputError: The file cannot be read, is not JSON or is not of that type.
    """
    try:
        data = _utf8(Path(path).read_bytes())
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from None
    except (EOFError, zlib.error, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be unpacked ({e}); was it cut off?") from None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        what, _, where = str(e).replace("`", "").partition(" - at $")
        where = re.sub(r"^\[(\d+)\]\.?", r"record \1: ", where).lstrip(".")
        where = f"{where}: " if where and not where.endswith(": ") else where
        raise InputError(f"{path}: {where}{what[0].lower()}{what[1:]}; wanted {wanted}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: {_not_json(data, str(e))}") from None


def _utf8(data: bytes) -> bytes:
    """The text of a file that may be packed by gzip, in UTF-16 or begin with a byte order mark."""
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16").encode()
    return data.removeprefix(codecs.BOM_UTF8)


def _not_json(data: bytes, error: str) -> str:
    """Say why these bytes are not JSON."""
    if "truncated" in error:
        return f"not complete JSON: ends after {len(data):,} bytes; was it cut off? Write it again"
    place = re.search(r"byte (\d+)", error)
    at = int(place[1]) if place else 0
    if number := re.match(rb"-?(NaN|Infinity)", data[at:] if at else data):
        start = max(data.rfind(b"{", 0, at), at - 200, 0)
        record = " ".join(data[start : at + len(number[0])].decode(errors="replace").split())
        return f"holds {number[0].decode()}, which is no number, in the record {record} ..."
    return f"is not JSON text ({error}); pass the .bbox.json file"


def _places(path: str | Path, what: str, ids: Iterable[Any]) -> dict[Any, int]:
    """The place of each id among the sorted ids."""
    try:
        return {id_: i for i, id_ in enumerate(sorted(ids))}
    except TypeError:
        raise InputError(
            f"{path}: ids of {what} are numbers in part and strings in part; write ids of one type"
        ) from None


def _type(id_: Any) -> str:
    return "a string" if isinstance(id_, str) else "a number"
