"""Reading checkpoints from files and URLs, without running code."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor

from .pickles import RefusedPickle, unpickle
from .unwrap import CheckpointError

_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
"""What files of torch < 1.6, and those that are no zip archives, begin with."""
_CUT_OFF = "is cut off or damaged; copy or download it again"


class RefusedError(CheckpointError):
    """A checkpoint holds what could run code."""


def load(source: str | os.PathLike[str], map_location: str | torch.device | None = "cpu") -> Any:
    """Read a checkpoint of any PyTorch project, running nothing that it carries.

    Args:
        source: A file written by ``torch.save``, a ``.safetensors`` file, or the URL of either
            (see :func:`fetch`).
        map_location: The device that its tensors go to; on ``'meta'`` they are not read.

    Raises:
        CheckpointError: The file is missing, cut off, no checkpoint, or carries
            something other than tensors and plain values.
    """
    text = os.fspath(source)
    path = fetch(text)
    if re.search(r"-\d+-of-\d+\.", path.name):
        raise CheckpointError(f"{text}: is one of several shards; join them into one file first")
    if path.suffix == ".safetensors":
        return _load_safetensors(path, map_location)
    name = text if str(path) == text else f"{text} (kept at {path})"
    device = torch.device(map_location or "cpu")
    try:
        return _read(path, device)
    except RefusedPickle as error:
        carried = re.sub("[^ -~]", "?", str(error))[:100]  # the file's own words
        raise RefusedError(
            f"{name}: refused: it contains {carried}, which is neither a tensor nor a "
            "plain value (nothing in it was run); save the model's state_dict() "
            "instead"
        ) from None
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except Exception:  # a damaged file can raise anything
        raise CheckpointError(f"{name}: {_CUT_OFF}") from None


def _read(path: Path, device: torch.device) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive, path.stat().st_size, device)
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY))
        if start == _LEGACY:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read_legacy(content, device)
    whole = start and not any(form.startswith(start[: len(form)]) for form in (_LEGACY, b"PK\3\4"))
    raise CheckpointError("is not a PyTorch checkpoint" if whole else _CUT_OFF)


def _read_zip(archive: zipfile.ZipFile, size: int, device: torch.device) -> Any:
    """What ``torch.save`` writes: ``NAME/data.pkl``, and each storage as ``NAME/data/KEY``."""
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "constants.pkl" in entries:
        raise CheckpointError("is a TorchScript archive; save the model's state_dict() instead")
    if "data.pkl" not in entries:
        raise CheckpointError("is not a PyTorch checkpoint")
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    if not stored or sum(entry.file_size for entry in archive.infolist()) > size:
        raise CheckpointError(
            "is a zip archive that torch.save did not write; save it with torch.save"
        )
    if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
        raise CheckpointError(f"was not written on a {sys.byteorder}-endian machine like this one")

    def storage(key: str, n: int) -> Tensor:
        entry = entries[f"data/{key}"]
        if entry.file_size != n:
            raise ValueError("a storage of another size than its tensors")
        tensor = torch.empty(n, dtype=torch.uint8, device="meta" if device.type == "meta" else None)
        if n and device.type != "meta":
            with archive.open(entry) as file:
                file.readinto(tensor.numpy())  # type: ignore[attr-defined]
                if file.read(1):  # which has the checksum compared
                    raise ValueError("a storage that is longer than it says")
        return tensor.to(device)

    return unpickle(io.BytesIO(archive.read(entries["data.pkl"])), size, storage)


def _read_legacy(content: mmap.mmap, device: torch.device) -> Any:
    """What torch < 1.6 writes: pickles (number, protocol, system, content, keys), then storages."""
    size = content.size()
    sizes: dict[str, int] = {}

    def on_meta(key: str, n: int) -> Tensor:
        sizes[key] = n
        return torch.empty(n, dtype=torch.uint8, device="meta")

    def next_pickle() -> Any:
        return unpickle(content, size, on_meta)

    next_pickle(), next_pickle()
    if next_pickle().get("little_endian", True) != (sys.byteorder == "little"):
        raise CheckpointError(f"was not written on a {sys.byteorder}-endian machine like this one")
    start = content.tell()
    checkpoint = next_pickle()
    keys = next_pickle()
    places = {}
    for key in keys:
        places[key] = content.tell() + 8  # behind the number of elements
        if places[key] + sizes[key] > size:
            raise EOFError
        content.seek(places[key] + sizes[key])
    if device.type == "meta":
        return checkpoint

    def storage(key: str, n: int) -> Tensor:
        if not n:
            return torch.empty(0, dtype=torch.uint8, device=device)
        data = bytearray(content[places[key] : places[key] + n])
        return torch.frombuffer(data, dtype=torch.uint8).to(device)

    content.seek(start)
    return unpickle(content, size, storage)


def meta_of(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint of mmengine says about the run that saved it; tensors are not read."""
    checkpoint = load(source, "meta")
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def _pickles_end(path: Path) -> bool:
    """Whether the pickles at the start of a file in torch's legacy format are all there."""
    try:
        with open(path, "rb") as file:
            for _ in range(5):
                for _ in pickletools.genops(file):
                    pass
    except (ValueError, EOFError, IndexError, struct.error):
        return False
    return True


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file of ``torch.save`` was written to its end.

    It is a zip archive, whose directory comes last: a writer that was killed leaves a file without
    one. A file in torch's legacy format has to be read to its end to know.
    """
    path = Path(path)
    if zipfile.is_zipfile(path):
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        if file.read(len(_LEGACY)) != _LEGACY:
            return False
    try:
        load(path)  # not on the meta device, where its tensors would not be read
    except RefusedError:  # for what it holds
        return _pickles_end(path)
    except CheckpointError:
        return False
    return True


def fetch(source: str) -> Path:
    """The local file of a checkpoint; downloaded if it has a URL and is not there yet.

    Downloads are kept in torch's hub cache. A name with a checksum, as ``resnet50-0676ba61.pth``,
    stands for one content: it is checked and kept where ``torch.hub`` keeps it. All others are kept
    in a folder per URL, since files of different URLs can have one name. What ``torch.hub`` has
    under such a name is taken where there is no way to download, and a line says so.

    Raises:
        CheckpointError: It is missing or cannot be downloaded.
    """
    scheme, separator, _ = source.partition("://")
    if not separator:
        path = Path(source).expanduser()
        if path.is_dir():
            raise CheckpointError(f"{source}: is a folder; name one file")
        if not path.is_file():
            raise CheckpointError(f"{source}: no such file")
        return path
    if scheme not in ("http", "https"):
        raise CheckpointError(f"{source}: neither a path nor a URL")
    name = os.path.basename(urlparse(source).path)
    folder = Path(torch.hub.get_dir(), "checkpoints")
    checksum = re.search(r"-(?!20\d{6}\.)([a-f0-9]{8,})\.", name)  # and no date
    by_hand = folder / hashlib.sha256(source.encode()).hexdigest()[:16] / name
    path = folder / name if checksum else by_hand
    for there in (by_hand, path):
        if there.exists():
            return there
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(source, str(path), checksum and checksum[1])
    except (URLError, OSError, RuntimeError, ValueError) as error:
        if Path(folder, name).exists():
            warnings.warn(
                f"{source}: could not be downloaded ({error}); using {folder / name}, an "
                "earlier download with this file name",
                stacklevel=2,
            )
            return folder / name
        raise CheckpointError(
            f"{source}: could not be downloaded ({error}); put the file at {by_hand} by hand"
        ) from None
    return path


def _load_safetensors(path: Path, map_location: Any) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path}: needs the package safetensors; install it") from None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is not a complete safetensors file ({error})") from None
    if isinstance(map_location, (str, torch.device)):
        return {key: tensor.to(map_location) for key, tensor in tensors.items()}
    return tensors
