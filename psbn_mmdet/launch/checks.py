"""Whether a config can work on this machine: its processes, port, data, work dir, weights."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from .config import UsageError, dicts, scope, type_name


def check_processes(processes: int, cfg: Config) -> None:
    """Check that this machine can run so many, one per GPU where there are GPUs.

    Args:
        processes: How many.
        cfg: A config whose layers must be able to run in them.

    Raises:
        UsageError: It cannot.
    """
    gpus = torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        have = f"1 to {gpus}, one per GPU of this machine" if gpus else "at least 1"
        raise UsageError(f"{processes} processes requested, {have} can run")
    check_synchronised_norm(cfg, processes)


def check_port() -> None:
    """Check that the first machine's torchrun can listen on ``PORT`` of tools/launch.sh.

    Raises:
        UsageError: It is no port, or another program listens there.
    """
    port = os.environ.get("PORT")
    if not port or os.environ.get("NODE_RANK", "0") != "0":
        return
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"PORT={port}: wanted a number from 1 to 65535")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            raise UsageError(
                f"PORT={port}: {error.strerror}; use another, or none on a single machine"
            ) from error


def check_synchronised_norm(cfg: Config, processes: int) -> None:
    """Check that statistics over several processes can be computed as the config says.

    Args:
        cfg: The config.
        processes: How many run it.

    Raises:
        UsageError: PyTorch's SyncBN would run without a GPU, or ``sync_bn`` meets psBN.
    """
    if processes < 2:  # mmengine turns SyncBN into BN there, and passes over sync_bn
        return
    names = {type_name(node) for node in dicts(cfg.get("model"))}
    if cfg.get("sync_bn") and any(re.match("ps(Sync)?BN", name) for name in names):
        raise UsageError(
            f"sync_bn={cfg.sync_bn!r} cannot convert psBN; leave it out and use "
            "psSyncBN instead of psBN"
        )
    plain = sorted(names & {"SyncBN", "MMSyncBN", "SyncBatchNorm"})
    if cfg.get("sync_bn"):
        plain.append(f"sync_bn={cfg.sync_bn!r}")
    if plain and not torch.cuda.is_available():
        raise UsageError(
            f"{plain[0]} needs a GPU for every process; on CPU use one process, or "
            "psSyncBN, which also runs there"
        )


def check_data(cfg: Config, *phases: str) -> None:
    """Check that the files that the data sets of some phases name are there.

    What another backend than the local disk reads (``backend_args``) is not looked for.

    Args:
        cfg: The config.
        phases: Of ``'train'``, ``'val'``, ``'test'``.

    Raises:
        UsageError: An annotation file or a folder of images is missing.
    """
    hint = f"link COCO-2017 to {cfg.get('data_root')}, or set --data-root"
    for phase in phases:
        for dataset in _datasets(cfg.get(f"{phase}_dataloader") or {}):
            root = dataset.get("data_root") or ""
            _require_one_file(cfg, dataset)
            folder = (dataset.get("data_prefix") or {}).get("img")
            named = [("annotation file", name) for name in _listed(dataset.get("ann_file"))]
            # Images are read by the pipeline, annotations by the data set.
            images_elsewhere = any(_elsewhere(step) for step in dicts(dataset.get("pipeline")))
            if folder is not None and not images_elsewhere:
                named.append(("folder of images", folder))
            for what, name in [] if _elsewhere(dataset) else named:
                _require(os.path.join(root, name), what, hint)
        for metric in dicts(cfg.get(f"{phase}_evaluator")):
            if not _elsewhere(metric):
                for name in _listed(metric.get("ann_file")):
                    _require(name, "annotation file", hint)


def _require_one_file(cfg: Config, dataset: dict[str, Any]) -> None:
    """Refuse a list of annotation files where a data set would join it to a path."""
    if not isinstance(dataset["ann_file"], (list, tuple)):
        return
    with DATASETS.switch_scope_and_registry(scope(cfg)) as registry:
        kind = dataset.get("type")
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if getattr(kind, "_join_prefix", None) is BaseDataset._join_prefix:
        raise UsageError(
            f"ann_file={dataset['ann_file']}: {type_name(dataset)} reads one file; use "
            "a ConcatDataset with one data set for each"
        )


def _require(path: str, what: str, hint: str) -> None:
    if path and "://" not in path and not os.path.exists(path):
        raise UsageError(f"{path}: no such {what}; {hint}")


def _elsewhere(node: dict[str, Any]) -> bool:
    """Whether ``backend_args`` say that another backend than the local disk reads the files."""
    return (node.get("backend_args") or {}).get("backend", "local") not in ("local", "disk")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_work_dir(work_dir: str) -> None:
    """Check that files can be written where a run is to write; leaves nothing behind.

    Raises:
        UsageError: They cannot.
    """
    folder = Path(work_dir)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            folder.stat()  # a name that is too long cannot even be asked for
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{_short(work_dir)}: cannot be written: {error.strerror}: {_short(folder)}; name "
            "another --work-dir"
        ) from error


def _short(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"


def _datasets(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The data sets in a loader's config, within wrappers like RepeatDataset and ConcatDataset."""
    if "ann_file" in node:
        yield node
    inner = node.get("datasets") or [node.get("dataset") or {}]
    for child in inner:
        if child:
            yield from _datasets(child)
