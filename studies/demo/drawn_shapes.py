"""A small detection data set in COCO's format that the code draws itself.

Circles, squares and triangles on textured ground: enough for a small detector
to learn within minutes on a CPU, and nothing to download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

CLASSES = ("circle", "square", "triangle")


def _draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image (size, size, 3) of uint8 and its objects: class index and box (x, y, w, h)."""
    ground = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(ground, (size, size), interpolation=cv2.INTER_CUBIC)
    taken = np.zeros((size, size), dtype=bool)
    objects = []
    for _ in range(rng.integers(1, 5)):
        side = int(rng.integers(size // 6, size // 2))
        x, y = (int(v) for v in rng.integers(0, size - side, 2))
        if taken[y : y + side, x : x + side].any():
            continue  # no overlaps: every box can be found
        taken[y : y + side, x : x + side] = True
        kind = int(rng.integers(len(CLASSES)))
        color = tuple(int(v) for v in rng.integers(0, 256, 3))
        if CLASSES[kind] == "circle":
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, color, -1)
        elif CLASSES[kind] == "square":
            cv2.rectangle(image, (x, y), (x + side, y + side), color, -1)
        else:
            corners = np.array([(x + side // 2, y), (x, y + side), (x + side, y + side)])
            cv2.fillPoly(image, [corners], color)
        objects.append({"category_id": kind + 1, "bbox": [x, y, side, side]})
    noisy = image + rng.normal(0, 12, image.shape)
    return noisy.clip(0, 255).astype(np.uint8), objects


def write_shapes(root: str | Path, train: int, val: int, size: int = 128, seed: int = 0) -> Path:
    """Draw the data set below ``root``, in the folders and files of COCO-2017.

    What stands there already with as many images is kept: it is the same.

    Args:
        root: Where to; made if need be.
        train, val: Numbers of images.
        size: Height and width in pixels.
        seed: Of the drawing.

    Returns:
        ``root``.
    """
    root = Path(root)
    for split, count, stream in (("train2017", train, 0), ("val2017", val, 1)):
        folder, target = root / split, root / "annotations" / f"instances_{split}.json"
        if target.exists() and len(json.loads(target.read_text())["images"]) == count:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng([seed, stream])
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            image, objects = _draw(rng, size)
            name = f"{i:06}.png"
            cv2.imwrite(str(folder / name), image)
            images.append({"id": i, "file_name": name, "width": size, "height": size})
            for shape in objects:
                area = shape["bbox"][2] * shape["bbox"][3]
                more = {"id": len(annotations) + 1, "image_id": i, "area": area, "iscrowd": 0}
                annotations.append({**shape, **more})
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        # Last, so that an interrupted drawing starts again.
        target.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return root
