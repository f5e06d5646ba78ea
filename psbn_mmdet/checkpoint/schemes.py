"""Which file or URL a checkpoint's name stands for, by the tables that mmengine ships."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mmengine

from .unwrap import CheckpointError

_TABLES = Path(mmengine.__path__[0], "hub")
SCHEMES = ("http", "https", "torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls")
"""What :func:`resolve` knows."""


def split(source: str) -> tuple[str, str]:
    """``torchvision://resnet50`` -> ``torchvision``, ``resnet50``; no scheme for a path."""
    scheme, separator, rest = source.partition("://")
    return (scheme, rest) if separator else ("", source)


def resolve(source: str) -> str:
    """The URL or path of a checkpoint given by URL, path or name in one of mmengine's tables.

    Raises:
        CheckpointError: The table has no such name, or there is no such scheme.
    """
    scheme, name = split(source)
    if scheme in ("", "http", "https"):
        return source if scheme else os.path.expanduser(source)
    if scheme in ("torchvision", "modelzoo"):
        table = _table("torchvision_0.12.json")
        return _look_up(source, table if name in table else {**table, **_torchvision()})
    if scheme in ("open-mmlab", "openmmlab"):
        home = _mmengine_home()
        table = _table("openmmlab.json")
        if (home / "open_mmlab.json").is_file():
            table.update(json.loads((home / "open_mmlab.json").read_text()))
        name = _table("deprecated.json").get(name, name)
        target = _look_up(f"{scheme}://{name}", table)
        return target if split(target)[0] else str(home / target)
    if scheme == "mmcls":
        return _look_up(source, _table("mmcls.json"))
    raise CheckpointError(
        f"{source}: the scheme {scheme}:// is unknown; download the file and give its path"
    )


def _look_up(source: str, table: dict[str, str]) -> str:
    name = split(source)[1]
    if name not in table:
        raise CheckpointError(f"{source}: mmengine's table has no such name; give its URL instead")
    return table[name]


def _table(name: str) -> dict[str, str]:
    return json.loads((_TABLES / name).read_text())


def _torchvision() -> dict[str, str]:
    """The names of torchvision's own table, such as ``resnet50.imagenet1k_v2``, if it is there."""
    try:
        from mmengine.runner.checkpoint import get_torchvision_models

        return get_torchvision_models()
    except (ImportError, RuntimeError):  # a torchvision for another torch raises the latter
        return {}


def _mmengine_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("MMENGINE_HOME", os.path.join(cache, "mmengine"))).expanduser()
