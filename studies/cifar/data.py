"""CIFAR-10 from its official binary version, held on the device.

A file is 10,000 records of 3,073 bytes: the label, then 1,024 red, green and
blue values each, row by row. Nothing is unpickled. 50,000 images are 150 MB, so
all of them stay on the device and a batch is a gather.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from psbn_mmdet.errors import PsbnError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILES = ("test_batch.bin",)
RECORDS, RECORD_BYTES, CLASSES = 10_000, 1 + 3 * 32 * 32, 10
FILE_BYTES = RECORDS * RECORD_BYTES
PAD = 1 / 8
"""Padding before the crop, as a share of the image's side: 4 of 32 pixels, as in the CIFAR
experiments of the ResNet paper, 2 of 16."""

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the training pixels, per channel, in [0, 255]: the usual constants. The paper is silent;
with BN behind every convolution the choice hardly matters."""


class DataError(PsbnError, ValueError):
    """The data cannot be used; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Split:
    """``images`` (N, 3, S, S) uint8, S = 32 unless they were scaled, and ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        return Split(self.images[indices], self.labels[indices])


def folder_of(root: str | os.PathLike[str]) -> Path:
    """The folder of the binary files: ``root`` itself or ``root/cifar-10-batches-bin``."""
    root = Path(root)
    return root if (root / TEST_FILES[0]).exists() else root / FOLDER


def check_files(root: str | os.PathLike[str]) -> Path:
    """The folder of the binary files, all of them there and whole.

    Raises:
        DataError: One is missing or has another size.
    """
    folder = folder_of(root)
    for name in TRAIN_FILES + TEST_FILES:
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"{path}: no such file (of {FILE_BYTES:,} bytes); name the folder that holds "
                f"{FOLDER} with --data-root, or fetch the data with --download"
            )
        size = path.stat().st_size
        if size != FILE_BYTES:
            raise DataError(
                f"{path}: has {size:,} bytes, but CIFAR-10's binary files have {FILE_BYTES:,}; "
                "remove it and fetch the data again with --download"
            )
    return folder


def load(root: str | os.PathLike[str], train: bool) -> Split:
    """The training or the test images, on the CPU.

    Raises:
        DataError: A file is missing, cut off, or no file of CIFAR-10.
    """
    folder = check_files(root)
    parts = []
    for name in TRAIN_FILES if train else TEST_FILES:
        part = np.fromfile(folder / name, np.uint8).reshape(RECORDS, RECORD_BYTES)
        if part[:, 0].max() >= CLASSES:
            raise DataError(
                f"{folder / name}: has a label of {part[:, 0].max()}, so it is not CIFAR-10 in "
                "its binary version; fetch that with --download"
            )
        parts.append(part)
    records = torch.from_numpy(np.concatenate(parts))
    images = records[:, 1:].reshape(-1, 3, 32, 32).contiguous()
    return Split(images, records[:, 0].long())


def fingerprint(root: str | os.PathLike[str]) -> str:
    """CRC-32 over all files: results on different copies of the data must not be mixed."""
    folder, crc = check_files(root), 0
    for name in TRAIN_FILES + TEST_FILES:
        crc = zlib.crc32((folder / name).read_bytes(), crc)
    return f"{crc:08x}"


def download(root: str | os.PathLike[str], url: str = URL, md5: str = MD5) -> Path:
    """Put the official binary version under ``root``, unless it is there.

    The archive is checked before anything is unpacked, and unpacked beside its
    place and renamed, so that an interrupted download leaves nothing behind.

    Returns:
        The folder of the files.

    Raises:
        DataError: No permission to write, no connection, a wrong checksum.
    """
    root = Path(root)
    if all((folder_of(root) / name).exists() for name in TRAIN_FILES + TEST_FILES):
        return check_files(root)
    if (root / FOLDER).exists():
        check_files(root)  # some files are there: say which one is wrong, overwrite none
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            archive = Path(scratch, "cifar-10-binary.tar.gz")
            _fetch(url, archive)
            found = hashlib.md5(archive.read_bytes()).hexdigest()
            if found != md5:
                raise DataError(
                    f"{url}: the download has the checksum {found} instead of {md5} and was "
                    f"removed; try again, or unpack a good copy into {root / FOLDER} by hand"
                )
            _unpack(archive, Path(scratch, FOLDER))
            Path(scratch, FOLDER).rename(root / FOLDER)
    except PermissionError:
        raise DataError(
            f"{root}: no permission to write there; name another folder with --data-root"
        ) from None
    return check_files(root)


def _fetch(url: str, path: Path) -> None:
    try:
        urllib.request.urlretrieve(url, path)
    except PermissionError:
        raise
    except OSError as error:  # URLError and ContentTooShortError are among them
        raise DataError(
            f"{url}: could not be downloaded ({error}); unpack the archive by hand and name its "
            "folder with --data-root"
        ) from None


def _unpack(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            content = tar.extractfile(member)  # None for a folder
            if content is not None and name in TRAIN_FILES + TEST_FILES:
                (folder / name).write_bytes(content.read())


def balanced_subset(split: Split, size: int | None, seed: int) -> Split:
    """``size`` images, equally many of each class, chosen by ``seed``; all of them for None.

    Raises:
        DataError: The size is no multiple of 10, or there are not enough images.
    """
    if size is None or size == len(split):
        return split
    if size < CLASSES or size % CLASSES:
        raise DataError(
            f"a subset of {size} images cannot be class-balanced: take a multiple of {CLASSES}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(CLASSES):
        members = (split.labels == label).nonzero().flatten()
        if len(members) < size // CLASSES:
            raise DataError(
                f"a subset of {size} images needs {size // CLASSES} of each class, but there are "
                f"only {len(members)} of class {label}"
            )
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[: size // CLASSES]])
    return split.take(torch.cat(chosen).sort().values)


def scaled(split: Split, size: int) -> Split:
    """The images at ``size`` x ``size`` pixels, each the rounded mean of a square of the original.

    Args:
        split: Images of S x S pixels.
        size: A divisor of S.
    """
    side = split.images.shape[-1] // size
    if side == 1:
        return split
    # In parts: as float32, 50,000 images of 32 x 32 would take 600 MB.
    parts = [F.avg_pool2d(part.float(), side).round().byte() for part in split.images.split(5_000)]
    return Split(torch.cat(parts), split.labels)


def random_labels(split: Split, seed: int) -> Split:
    """The same images with the labels shuffled once, for good (the paper, section 3.3).

    As many images have each label as before.
    """
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return Split(split.images, split.labels[order])


def normalise(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 of mean about 0 and variance about 1 per channel."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    scale = 1 / torch.tensor(STD, device=images.device).view(3, 1, 1)
    return images.float().sub_(mean).mul_(scale)


class Batches(Dataset[Any]):
    """The augmented batches of a training run; item i is the whole batch of iteration i.

    Every epoch goes through the images in a new order and drops what does not
    fill a batch, so all steps have the same gradient noise. Each image is padded
    by an eighth of its side, cropped at random and flipped with probability 1/2 (He et al.).
    A batch is a function of ``seed`` and i alone, so a run can be resumed at any
    iteration; the random numbers are drawn on the CPU and so the same on every
    device.

    Args:
        split: The training images.
        batch_size: Images of a step.
        iterations: Length of the run.
        seed: Of order and augmentation.
        device: Where images are held and augmented.
        augment: Whether to crop and flip.

    Raises:
        DataError: There are fewer images than a batch has.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        iterations: int,
        seed: int,
        device: torch.device | str = "cpu",
        augment: bool = True,
    ) -> None:
        if not 1 <= batch_size <= len(split):
            raise DataError(f"a batch of {batch_size} images cannot be had from {len(split)}")
        self.batch_size, self.iterations, self.seed = batch_size, iterations, seed
        self.augment = augment
        self.per_epoch = len(split) // batch_size
        self.labels = split.labels.to(device)
        grey = torch.tensor(MEAN).round().byte().view(3, 1, 1)  # what becomes about 0
        side = split.images.shape[-1]
        self.pad = pad = round(side * PAD)
        padded = grey.repeat(len(split), 1, side + 2 * pad, side + 2 * pad)
        padded[..., pad:-pad, pad:-pad] = split.images
        # (N, 3, 2 pad + 1, 2 pad + 1, side, side): every crop of every image, without a copy.
        self._crops = padded.to(device).unfold(2, side, 1).unfold(3, side, 1)
        self._epoch = -1

    def __len__(self) -> int:
        return self.iterations

    def __getitem__(self, iteration: int) -> dict[str, Tensor]:
        """``inputs`` (B, 3, S, S) float32 and ``labels`` (B,)."""
        epoch, step = divmod(iteration, self.per_epoch)
        self._draw(epoch)
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        index = self._order[part]
        if self.augment:
            images = self._crops[index, :, self._top[part], self._left[part]]
            flip = self._flip[part].view(-1, 1, 1, 1)
            images = torch.where(flip, images.flip(3), images)
        else:
            images = self._crops[index, :, self.pad, self.pad]
        return {"inputs": normalise(images), "labels": self.labels[index]}

    def _draw(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        n, device = len(self.labels), self.labels.device
        # One generator per epoch, so that any epoch can be entered first.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self._order = torch.randperm(n, generator=generator).to(device)
        offsets = torch.randint(2 * self.pad + 1, (2, n), generator=generator)
        self._top, self._left = offsets.to(device)
        self._flip = torch.rand(n, generator=generator).lt(0.5).to(device)
        self._epoch = epoch
