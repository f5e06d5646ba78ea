"""Checks, before anything else is imported, that what is installed can work together.

OpenMMLab's libraries and their maintained fork (onedl) are different distributions with the same
module names, and pip would lay the files of one over those of the other. So this package depends
on neither by itself: an extra brings one of them, and the check here tells when none is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

from .errors import PsbnError

DISTRIBUTIONS = {
    "mmengine": ("mmengine", "mmengine-lite", "onedl-mmengine"),
    "mmcv": ("mmcv", "mmcv-lite", "mmcv-full", "onedl-mmcv"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
}
"""Of each module the distributions that contain it; only one of them may be installed."""


class UnfitEnvironmentError(PsbnError, ImportError):
    """What is installed here cannot work together."""


def check_environment() -> None:
    """Check torch, numpy and mmengine.

    Raises:
        UnfitEnvironmentError: As :func:`why_unfit` says.
    """
    installed = {module: _installed(module) for module in DISTRIBUTIONS}
    found = find_spec("mmengine")
    # Folders that an uninstall has left make a namespace package, which has no file.
    version = None
    if found is not None and found.origin is not None:
        version = import_module("mmengine.version").__version__
    import numpy
    import torch

    if reason := why_unfit(torch.__version__, numpy.__version__, version, installed):
        raise UnfitEnvironmentError(reason)


def why_unfit(
    torch: str, numpy: str, mmengine: str | None, installed: Mapping[str, Sequence[str]]
) -> str | None:
    """Say in one line what is wrong with an environment and what to do.

    Args:
        torch: Version of torch.
        numpy: Version of numpy.
        mmengine: Version of mmengine; None if it cannot be imported.
        installed: Which of :data:`DISTRIBUTIONS` are installed, by module.

    Returns:
        None if nothing is wrong.
    """
    for module, names in installed.items():
        if len(names) > 1:
            return (
                f"{' and '.join(names)} are both installed into one folder, {module}; pip "
                f"uninstall -y {' '.join(names)}, then install the one that you want"
            )
    if mmengine is None:
        if installed.get("mmengine"):
            (name,) = installed["mmengine"]
            return f"{name} has lost its files; pip install --force-reinstall --no-deps {name}"
        return (
            "psbn_mmdet needs mmengine; pip install 'psbn_mmdet[mmengine]', "
            "or 'psbn_mmdet[onedl-mmengine]' where the maintained fork is in use"
        )
    if _numbers(mmengine) < (0, 10, 7):
        return f"psbn_mmdet needs mmengine 0.10.7 or newer; this is {mmengine}"
    if _numbers(torch) < (2, 1):
        return (
            "psbn_mmdet needs torch 2.1 or newer, which reads checkpoints without running code; "
            f"this is {torch}"
        )
    if _numbers(torch) < (2, 3) and _numbers(numpy) >= (2,):
        return f"torch {torch} cannot use numpy {numpy}; pip install 'numpy<2' 'opencv-python<4.12'"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _installed(module: str) -> list[str]:
    """Distributions that say that they have put the module where it is."""
    names = []
    for name in DISTRIBUTIONS[module]:
        try:
            files = metadata.distribution(name).read_text("RECORD")
        except metadata.PackageNotFoundError:
            continue
        # An editable install and one by a system's packages list no files of the module.
        if files is None or f"{module}/__init__.py," in files or "__editable__" in files:
            names.append(name)
    return names
