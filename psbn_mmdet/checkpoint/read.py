"""Reading checkpoints from files, URLs and mmengine's tables, without running code."""

from __future__ import annotations

import hashlib
import os
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor

from .allowed import torch_load
from .schemes import resolve, split
from .unwrap import CheckpointError, state_dict_of

_LEGACY = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
"""What files of torch < 1.6, and those that are no zip archives, begin with."""
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, names of storages; then the data
_CUT_OFF = "is cut off or damaged; copy or download it again"


class RefusedError(CheckpointError):
    """A checkpoint holds what could run code."""


def load(source: str | os.PathLike, map_location: Any = "cpu") -> Any:
    """Read a checkpoint of any PyTorch project, running nothing that it carries.

    Args:
        source: A file written by ``torch.save``, a ``.safetensors`` file, the URL of either
            (see :func:`fetch`), or a name that mmengine knows, such as ``torchvision://resnet50``
            or ``open-mmlab://detectron2/resnet50_caffe``.
        map_location: As in ``torch.load``.

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
    try:
        with warnings.catch_warnings():
            # What torch says where it is about to refuse a file.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            warnings.filterwarnings("ignore", "'torch.load' received a zip file that looks like")
            checkpoint = torch_load(path, map_location)
    except Exception as error:  # a damaged file can raise anything
        name = text if str(path) == text else f"{text} (kept at {path})"
        reason = _reason(path, error)
        kind = RefusedError if reason.startswith("refused") else CheckpointError
        raise kind(f"{name}: {reason}") from None
    if split(text)[0] == "mmcls":  # classifiers, of which mmengine takes the backbone
        tensors = state_dict_of(checkpoint, text)
        start = "backbone."
        return {"state_dict": {k[len(start) :]: tensors[k] for k in tensors if k.startswith(start)}}
    return checkpoint


def meta_of(source: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint of mmengine says about the run that saved it; tensors are not read."""
    checkpoint = load(source, "meta")
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    return meta if isinstance(meta, dict) else {}


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, and what to do."""
    if "TorchScript" in str(error):
        return "is a TorchScript archive; save the model's state_dict() instead"
    with open(path, "rb") as file:
        start = file.read(len(_LEGACY))
    zipped, legacy = zipfile.is_zipfile(path), start == _LEGACY
    if legacy and not _pickles_end(path):
        return _CUT_OFF
    carried = re.search(r"GLOBAL (.+?)(?= was not| whose module|[.,]? *$)", str(error), re.M)
    if isinstance(error, pickle.UnpicklingError) and carried:
        return (
            f"refused, since it carries {carried[1]}, which is neither a tensor nor a "
            "plain value (nothing in it was run); save the model's state_dict() instead"
        )
    if zipped and isinstance(error, pickle.UnpicklingError):
        return (
            "refused, since it carries something other than tensors and plain values "
            "(nothing in it was run); save the model's state_dict() instead"
        )
    if zipped:
        return f"cannot be read: {str(error).splitlines()[0]}"
    if legacy or any(form.startswith(start[: len(form)]) for form in (_LEGACY, b"PK\3\4")):
        return _CUT_OFF
    return "is no checkpoint of torch"


def _pickles_end(path: Path) -> bool:
    """Whether the pickles at the start of a file in torch's legacy format are all there."""
    try:
        with open(path, "rb") as file:
            for _ in range(_LEGACY_PICKLES):
                for _ in pickletools.genops(file):
                    pass
    except (ValueError, EOFError, IndexError, struct.error):
        return False
    return True


def is_whole(path: str | os.PathLike) -> bool:
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
        return True
    except CheckpointError:
        return False
    return True


def fetch(source: str) -> Path:
    """The local file of a checkpoint; downloaded if it has a URL and is not there yet.

    Downloads are kept in torch's hub cache. A name with a checksum, as ``resnet50-0676ba61.pth``,
    stands for one content: it is checked and kept where ``torch.hub`` keeps it. All others are kept
    in a folder per URL, since files of different URLs can have one name.

    Raises:
        CheckpointError: It is missing or cannot be downloaded.
    """
    url = resolve(source)
    if not split(url)[0]:
        path = Path(url)
        if path.is_dir():
            raise CheckpointError(f"{source}: no such file, but a folder; name one file")
        if not path.is_file():
            raise CheckpointError(f"{source}: no such file")
        return path
    name = os.path.basename(urlparse(url).path)
    folder = Path(torch.hub.get_dir(), "checkpoints")
    checksum = re.search(r"-([a-f0-9]{8,})\.", name)
    by_hand = folder / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    path = folder / name if checksum else by_hand
    for there in (by_hand, path):
        if there.exists():
            return there
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), checksum and checksum[1])
    except (URLError, OSError, RuntimeError, ValueError) as error:
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
        raise CheckpointError(f"{path}: is no whole safetensors file ({error})") from None
    if isinstance(map_location, (str, torch.device)):
        return {key: tensor.to(map_location) for key, tensor in tensors.items()}
    return tensors
