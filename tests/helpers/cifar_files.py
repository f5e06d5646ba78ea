"""Files in the layout of CIFAR-10's binary version, drawn: each class has its own colour."""

import os
from pathlib import Path

import numpy as np

from studies.cifar.data import FOLDER, TEST_FILES, TRAIN_FILES


def write_cifar(root: Path) -> Path:
    """Write them under ``root``; the training files are one file, linked."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    few = rng.integers(0, 256, (100, 3073), dtype=np.uint8)
    few[:, 0] = np.arange(100) % 10
    for label in range(10):  # 60 brighter or darker in one channel
        part = few[label::10, 1:].reshape(10, 3, 1024)
        part[:, label % 3] = part[:, label % 3] // 4 + 18 * label
    records = np.tile(few, (100, 1))
    for name in (TEST_FILES[0], TRAIN_FILES[0]):
        records.tofile(folder / name)
    for name in TRAIN_FILES[1:]:
        os.link(folder / TRAIN_FILES[0], folder / name)
    return root
