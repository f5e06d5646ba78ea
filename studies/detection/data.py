"""BCCD in memory: small images, their boxes, and batches that follow from a seed and a number.

BCCD is 364 blood smears (640x480) with boxes of three classes, in COCO's format. All of it fits
into 20 MB once it is resized, so nothing is read while a detector trains.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.utils.data import Dataset

from studies.runs import RunError, write_json

TRAIN, TEST = ("train",), ("val", "test")
"""Parts of BCCD. Validation and test images are one test set: no run chooses anything by its AP."""


@dataclass(frozen=True)
class Images:
    """Resized images with their boxes.

    Attributes:
        ids: Of COCO's format, one per image.
        pixels: (N, 3, H, W) uint8, BGR.
        boxes: Of each image (n, 4), x1 y1 x2 y2 in pixels of the resized image.
        labels: Of each image (n,), indices into ``categories``.
        originals: (height, width) of each image before.
        categories: Category ids of COCO's format, in order.
    """

    ids: tuple[int, ...]
    pixels: Tensor
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    originals: tuple[tuple[int, int], ...]
    categories: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.pixels.shape[3], self.pixels.shape[2]


def read_annotations(
    root: str | os.PathLike[str], parts: tuple[str, ...], count: int | None = None
) -> dict[str, Any]:
    """The annotations of some parts as one COCO file, image and box ids counted from 1.

    Args:
        root: Folder with ``annotations/PART.json`` and ``images/``.
        parts: :data:`TRAIN` or :data:`TEST`.
        count: Only so many images, from the first, and their boxes; None for all.

    Raises:
        RunError: A file is missing or is not in COCO's format.
    """
    merged: dict[str, Any] = {"images": [], "annotations": [], "categories": None}
    for part in parts:
        path = Path(root, "annotations", f"{part}.json")
        try:
            content = json.loads(path.read_text())
            numbers = {}
            for image in content["images"]:
                numbers[image["id"]] = len(merged["images"]) + 1
                merged["images"].append({**image, "id": numbers[image["id"]]})
            for box in content["annotations"]:
                more = {"id": len(merged["annotations"]) + 1, "image_id": numbers[box["image_id"]]}
                merged["annotations"].append({**box, **more})
        except FileNotFoundError:
            raise RunError(
                f"{path}: no such file; name the folder that holds BCCD in COCO's format "
                "(annotations/ and images/) with --data-root"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: is not in COCO's format ({error!r})") from None
        if merged["categories"] not in (None, content["categories"]):
            raise RunError(f"{path}: has other categories than {parts[0]}.json")
        merged["categories"] = content["categories"]
    merged["images"] = merged["images"][:count]
    kept = {image["id"] for image in merged["images"]}
    merged["annotations"] = [box for box in merged["annotations"] if box["image_id"] in kept]
    return merged


def write_test_annotations(
    root: str | os.PathLike[str], path: Path, count: int | None = None
) -> None:
    """The annotations that results of this study are compared by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, read_annotations(root, TEST, count))


def fingerprint(root: str | os.PathLike[str]) -> str:
    """CRC-32 over annotations and images: results on different copies must not be mixed."""
    crc = 0
    for part in TRAIN + TEST:
        path = Path(root, "annotations", f"{part}.json")
        content = read_annotations(root, (part,))
        crc = zlib.crc32(path.read_bytes(), crc)
        for image in content["images"]:
            crc = zlib.crc32(_image_file(root, image).read_bytes(), crc)
    return f"{crc:08x}"


def _image_file(root: str | os.PathLike[str], image: dict[str, Any]) -> Path:
    path = Path(root, "images", image["file_name"])
    if not path.is_file():
        raise RunError(f"{path}: no such image, and the annotations name it")
    return path


def load(
    root: str | os.PathLike[str],
    parts: tuple[str, ...],
    size: tuple[int, int],
    count: int | None = None,
) -> Images:
    """Images of some parts, resized to (width, height) by area averaging.

    Args:
        root, parts, count: As in :func:`read_annotations`.
        size: Of the result; the proportion of the images is not kept if it differs.

    Raises:
        RunError: A file is missing or cannot be read.
    """
    content = read_annotations(root, parts, count)
    categories = tuple(c["id"] for c in content["categories"])
    chosen = content["images"]
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in chosen}
    for box in content["annotations"]:
        by_image[box["image_id"]].append(box)
    pixels, boxes, labels = [], [], []
    for image in chosen:
        path = _image_file(root, image)
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if picture is None:
            raise RunError(f"{path}: is no image that can be read")
        if picture.shape[:2] != (image["height"], image["width"]):
            raise RunError(f"{path}: is {picture.shape[1::-1]}, not as its annotation says")
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        pixels.append(torch.from_numpy(small.transpose(2, 0, 1).copy()))
        scale = np.array([size[0] / image["width"], size[1] / image["height"]] * 2)
        mine = by_image[image["id"]]
        xywh = np.array([box["bbox"] for box in mine], dtype=float).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1) * scale
        boxes.append(torch.from_numpy(corners).float())
        labels.append(torch.tensor([categories.index(b["category_id"]) for b in mine]).long())
    return Images(
        tuple(image["id"] for image in chosen),
        torch.stack(pixels),
        tuple(boxes),
        tuple(labels),
        tuple((image["height"], image["width"]) for image in chosen),
        categories,
    )


def samples(images: Images, indices: list[int]) -> dict[str, list[Any]]:
    """Images as mmdet's data preprocessor takes them, as they are."""
    return {
        "inputs": [images.pixels[i] for i in indices],
        "data_samples": [_sample(images, i, images.boxes[i], images.labels[i]) for i in indices],
    }


def _sample(images: Images, i: int, boxes: Tensor, labels: Tensor) -> DetDataSample:
    (width, height), (rows, columns) = images.size, images.originals[i]
    meta = dict(img_id=images.ids[i], img_shape=(height, width), ori_shape=images.originals[i])
    sample = DetDataSample(metainfo={**meta, "scale_factor": (width / columns, height / rows)})
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    return sample


class Batches(Dataset[Any]):
    """The batches of a training run; item i is the whole batch of iteration i.

    Every epoch goes through the images in a new order and drops what does not fill a batch. Each
    image is flipped left to right with probability 1/2 and top to bottom likewise: a smear has no
    upper side. A batch is a function of ``seed`` and i alone, so a run can be resumed anywhere.

    Raises:
        RunError: There are fewer images than a batch has.
    """

    def __init__(self, images: Images, batch_size: int, iterations: int, seed: int) -> None:
        if not 1 <= batch_size <= len(images):
            raise RunError(f"a batch of {batch_size} images cannot be had from {len(images)}")
        self.images, self.batch_size = images, batch_size
        self.iterations, self.seed = iterations, seed
        self.per_epoch = len(images) // batch_size

    def __len__(self) -> int:
        return self.iterations

    def __getitem__(self, iteration: int) -> dict[str, list[Any]]:
        epoch, step = divmod(iteration, self.per_epoch)
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.images))
        flips = rng.random((len(self.images), 2)) < 0.5
        inputs, data_samples = [], []
        for i in order[step * self.batch_size : (step + 1) * self.batch_size].tolist():
            pixels, boxes = flipped(self.images.pixels[i], self.images.boxes[i], *flips[i])
            inputs.append(pixels)
            data_samples.append(_sample(self.images, i, boxes, self.images.labels[i]))
        return {"inputs": inputs, "data_samples": data_samples}


def flipped(
    pixels: Tensor, boxes: Tensor, left_right: bool, top_bottom: bool
) -> tuple[Tensor, Tensor]:
    """An image (3, H, W) and its boxes (n, 4), mirrored."""
    height, width = pixels.shape[1:]
    if left_right:
        pixels = pixels.flip(2)
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if top_bottom:
        pixels = pixels.flip(1)
        boxes = torch.stack(
            [boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], 1
        )
    return pixels, boxes
