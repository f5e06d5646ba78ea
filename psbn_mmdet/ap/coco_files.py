"""COCO annotation and result files, read into the columns that AP is computed from.

The format stands once, in the structs below; msgspec decodes and checks it in one pass, and skips
what AP does not need (segmentations, captions) without building it. Every reader gives columns or
raises an :class:`InputError` whose one line names the file, the record and what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

import msgspec
import numpy as np

from ..errors import PsbnError

Id = Union[int, float, str]  # a float because some writers put 3.0 for 3, which are equal


class InputError(PsbnError, ValueError):
    """Something that cannot be compared; the message names it and says what to do."""


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: Optional[str] = ""


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: Optional[Id] = None


class _Object(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    bbox: Tuple[float, float, float, float]
    area: float
    iscrowd: Union[bool, int, float, None] = 0


class _Dataset(msgspec.Struct):
    images: List[_Image]
    categories: List[_Category]
    annotations: List[_Object]


class _Box(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Tuple[float, float, float, float]
    score: float


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
    left_out: int = 0  # objects of images or classes that the file does not list

    @property
    def warnings(self) -> list[str]:
        """What a reader must know of the file."""
        if not self.left_out:
            return []
        return [
            f"{self.path}: {self.left_out} objects are of images or classes that the file does "
            "not list and were left out, as pycocotools does"
        ]


@dataclass(frozen=True)
class Results:
    """The columns of a COCO result file, in the order of the file."""

    path: str
    image: np.ndarray  # (D,) index into Annotations.image_ids
    cls: np.ndarray  # (D,) index into Annotations.class_ids
    box: np.ndarray  # (D, 4) x, y, w, h in pixels
    score: np.ndarray  # (D,)


def read_annotations(path: str | Path) -> Annotations:
    """Read a COCO instance annotation file (``instances_val2017.json`` and the like).

    Objects of images or classes that the file does not list are left out, as in pycocotools, and
    counted.

    Raises:
        InputError: The JSON is cut off, lacks a key or has a value of another type; two objects
            share an id; an object is of an image or class that is listed under an id of another
            type (``"3"`` for ``3``), which would drop it.
    """
    data = decode(path, _Dataset, "an object of images, annotations (with area) and categories")
    images = {i.id: i.file_name or "" for i in data.images}
    classes = {c.id: str(c.id if c.name is None else c.name) for c in data.categories}
    times = Counter(classes.values())  # classes of equal names would be one row of a table
    classes = {i: name if times[name] == 1 else f"{name} (id {i})" for i, name in classes.items()}
    image_of = _places(path, "images", images)
    class_of = _places(path, "categories", classes)
    kept = [o for o in data.annotations if o.image_id in image_of and o.category_id in class_of]
    if len(kept) < len(data.annotations):
        as_text = {str(i) for i in images}, {str(c) for c in classes}
        for o in data.annotations:
            for what, id_, known, text in (
                ("image", o.image_id, image_of, as_text[0]),
                ("category", o.category_id, class_of, as_text[1]),
            ):
                if id_ not in known and str(id_) in text:
                    raise InputError(
                        f"{path}: annotation {o.id!r} is of {what} {id_!r} ({_type(id_)}), which "
                        f"the file lists as {_type(next(iter(known)))}; write ids of one type"
                    )
    ids = [o.id for o in kept]
    if len(set(ids)) < len(ids):
        twice = next(i for i, times in Counter(ids).items() if times > 1)
        raise InputError(f"{path}: two annotations have the id {twice!r}; ids must be unique")
    n = len(kept)
    return Annotations(
        path=str(path),
        image_ids=list(image_of),
        file_names=[images[i] for i in image_of],
        class_ids=list(class_of),
        class_names=[classes[c] for c in class_of],
        image=np.array([image_of[o.image_id] for o in kept], np.int64),
        cls=np.array([class_of[o.category_id] for o in kept], np.int64),
        box=np.array([o.bbox for o in kept], np.float64).reshape(n, 4),
        area=np.array([o.area for o in kept], np.float64),
        crowd=np.array([bool(o.iscrowd) for o in kept], bool),
        nameless=np.array([i == 0 for i in ids], bool),
        left_out=len(data.annotations) - n,
    )


def read_results(path: str | Path, annotations: Annotations) -> Results:
    """Read a COCO bbox result file: ``[{image_id, category_id, bbox, score}, ...]``.

    An empty list is a model that detects nothing.

    Raises:
        InputError: The JSON is cut off, lacks a key or has a value of another type (NaN is one);
            a box is of an image or class that the annotations do not list, or has a negative
            size.
    """
    wanted = "a list of objects with image_id, category_id, bbox [x, y, w, h] and score"
    records = decode(path, List[_Box], wanted)
    n = len(records)
    image_of = {id_: i for i, id_ in enumerate(annotations.image_ids)}
    class_of = {id_: i for i, id_ in enumerate(annotations.class_ids)}
    image = np.fromiter((image_of.get(r.image_id, -1) for r in records), np.int64, n)
    cls = np.fromiter((class_of.get(r.category_id, -1) for r in records), np.int64, n)
    box = np.array([r.bbox for r in records], np.float64).reshape(n, 4)
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
    if (box[:, 2:] < 0).any():
        i = int(np.argmax((box[:, 2:] < 0).any(1)))
        raise InputError(
            f"{path}: record {i}: bbox {list(records[i].bbox)} has a negative size; "
            "wanted [x, y, w, h], not two corners"
        )
    score = np.fromiter((r.score for r in records), np.float64, n)
    return Results(str(path), image, cls, box, score)


def decode(path: str | Path, kind: Any, wanted: str) -> Any:
    """Decode a JSON file into a msgspec type.

    Args:
        path: The file.
        kind: What msgspec is to make of it.
        wanted: The same in words, for the error.

    Raises:
        InputError: The file cannot be read, is not JSON or is not of that type.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as e:
        what, _, where = str(e).replace("`", "").partition(" - at $")
        where = re.sub(r"^\[(\d+)\]\.?", r"record \1: ", where).lstrip(".")
        where = f"{where}: " if where and not where.endswith(": ") else where
        raise InputError(f"{path}: {where}{what[0].lower()}{what[1:]}; wanted {wanted}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: {_not_json(data, str(e))}") from None


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


def _places(path: str | Path, what: str, ids: Iterable) -> dict[Any, int]:
    """The place of each id among the sorted ids."""
    try:
        return {id_: i for i, id_ in enumerate(sorted(ids))}
    except TypeError:
        raise InputError(
            f"{path}: ids of {what} are numbers in part and strings in part; write ids of one type"
        ) from None


def _type(id_: Any) -> str:
    return "a string" if isinstance(id_, str) else "a number"
