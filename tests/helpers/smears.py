"""A data set in the layout of BCCD, drawn: bright disks of two sizes on dark ground."""

import json
from pathlib import Path

import cv2
import numpy as np

CATEGORIES = [{"id": 1, "name": "small"}, {"id": 2, "name": "large"}]


def write_smears(root: Path, train: int = 6, val: int = 3, test: int = 2) -> Path:
    """Write it under ``root``; every part counts its images and boxes from 1, as BCCD does."""
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val), ("test", test)):
        images, boxes = [], []
        for number in range(1, count + 1):
            picture = rng.integers(0, 60, (96, 128, 3), dtype=np.uint8)
            for category, radius in ((1, 12), (2, 24)):
                x, y = rng.integers(radius, 128 - radius), rng.integers(radius, 96 - radius)
                cv2.circle(picture, (int(x), int(y)), radius, (40, 90, 230), -1)
                boxes.append(
                    {
                        "id": len(boxes) + 1,
                        "image_id": number,
                        "category_id": category,
                        "bbox": [int(x) - radius, int(y) - radius, 2 * radius, 2 * radius],
                        "area": 4 * radius**2,
                        "iscrowd": 0,
                    }
                )
            name = f"{part}_{number}.png"
            cv2.imwrite(str(root / "images" / name), picture)
            images.append({"id": number, "file_name": name, "width": 128, "height": 96})
        content = {"images": images, "annotations": boxes, "categories": CATEGORIES}
        (root / "annotations" / f"{part}.json").write_text(json.dumps(content))
    return root
