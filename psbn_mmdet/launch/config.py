"""A config with a command line's overrides, and whether it can work on this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.dataset import BaseDataset
from mmengine.hub import get_config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.utils import is_installed

from ..checkpoint import load_weights
from ..errors import PsbnError
from .runner import read


class UsageError(PsbnError):
    """A command cannot do what it was asked; the message is one line that says what to do."""


class ConfigOptions(DictAction):
    """mmengine's ``KEY=VALUE ...``; what it cannot read ends in argparse's line, not a traceback.

    It has no syntax for a dict, and would take ``[dict(type='A')]`` as a list of one text.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Read one option's values."""
        given = " ".join(values)
        if re.search(r"[=\[(,'\"](dict\(|\{[^{])", given):
            raise argparse.ArgumentError(
                self, f"{given}: holds a dict; write KEY.INNER=VALUE, or a config file for a list"
            )
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError, RecursionError):
            raise argparse.ArgumentError(
                self, f"{given}: wanted KEY=VALUE ..., a VALUE as 0.1, text, [a,b] or (a,b)"
            ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing share, under mmdet's names."""
    parser.add_argument("--work-dir", help="where to write (default work_dirs/CONFIG)")
    parser.add_argument(
        "--data-root", help="where the data set is (default: the config's data_root)"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="override the config, as model.backbone.norm_cfg.alpha=0.2 or key=[a,b]",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="job launcher",
    )
    parser.add_argument(
        "--check",
        type=int,
        metavar="PROCESSES",
        help="only check that so many processes here could do it",
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def load_config(
    source: str,
    cfg_options: dict[str, Any] | None = None,
    data_root: str | None = None,
    work_dir: str | None = None,
) -> Config:
    """Load a config with a command line's overrides.

    Args:
        source: A file, or ``package::path`` for one that an installed package
            ships, as ``psbn_mmdet::retinanet/retinanet_psbn_500.py``.
        cfg_options: Dotted keys and values, merged into it.
        data_root: Where the data set is, in place of the config's ``data_root``
            in every path below it. ``cfg_options`` may say it too.
        work_dir: Where to write; by default the config's own or
            ``work_dirs/CONFIG``.

    Raises:
        UsageError: There is no such config, it does not load, or it has no
            ``data_root`` that could be replaced.
    """
    package = source.partition("::")[0]
    if "::" in source and not is_installed(package):
        raise UsageError(f"{source}: the package {package} is not installed")
    if "::" not in source and not Path(source).is_file():
        raise UsageError(f"{source}: no such config; those of this project are in configs/")
    try:
        cfg = get_config(source) if "::" in source else Config.fromfile(source)
        old_root = cfg.get("data_root")
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:  # a config is a program: it may raise anything
        raise UsageError(f"{source}: does not load: {type(error).__name__}: {error}") from error
    new_root = data_root or cfg.get("data_root")
    if new_root and not old_root:
        raise UsageError(
            f"{source}: has no data_root that could be replaced; name the paths of the data "
            "sets through --cfg-options instead"
        )
    if new_root != old_root:
        moved = _move_paths(cfg.to_dict(), str(old_root), str(new_root))
        moved["data_root"] = os.path.join(str(new_root), "")
        object.__setattr__(cfg, "_cfg_dict", ConfigDict(moved))  # as Config itself does
    cfg.work_dir = work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(source).stem))
    return cfg


def _move_paths(node: Any, old: str, new: str, key: str = "") -> Any:
    """Return ``node`` with every path at or below ``old`` moved to ``new``.

    Paths are compared part by part, so ``data/coco_pretrained`` is not below
    ``data/coco``, and ``data/coco`` is the same folder as ``./data/coco/``.
    """
    if isinstance(node, dict):
        return type(node)({k: _move_paths(v, old, new, k) for k, v in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(_move_paths(value, old, new, key) for value in node)
    if not isinstance(node, str) or not node:
        return node
    root, path = os.path.normpath(old), os.path.normpath(node)
    if key != "data_root" and os.sep not in node:  # a word, which may only sound like the folder
        return node
    if path != root and not path.startswith(os.path.join(root, "")):
        return node
    below = os.path.relpath(path, root)
    moved = new if below == "." else os.path.join(new, below)
    # normalised, s3://bucket would lose a slash
    moved = moved.rstrip("/") if "://" in new else os.path.normpath(moved)
    return os.path.join(moved, "") if node.endswith("/") else moved


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
        raise UsageError(f"{processes} processes asked for, {have} can run")
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
                f"PORT={port}: {error.strerror}; name another one, or none on a single machine"
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
    names = {type_name(node) for node in _dicts(cfg.get("model"))}
    if cfg.get("sync_bn") and any(re.match("ps(Sync)?BN", name) for name in names):
        raise UsageError(
            f"sync_bn={cfg.sync_bn!r} cannot convert psBN; leave it out and write psSyncBN for psBN"
        )
    plain = sorted(names & {"SyncBN", "MMSyncBN", "SyncBatchNorm"})
    if cfg.get("sync_bn"):
        plain.append(f"sync_bn={cfg.sync_bn!r}")
    if plain and not torch.cuda.is_available():
        raise UsageError(
            f"{plain[0]} needs a GPU for every process; on CPU take one process, or psSyncBN, "
            "which also runs there"
        )


def type_name(node: dict) -> str:
    """The name of a type without its scope or module; '' where a config has none."""
    kind = node.get("type") or ""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def check_data(cfg: Config, *phases: str) -> None:
    """Check that the files that the data sets of some phases name are there.

    What another backend than the local disk reads (``backend_args``) is not looked for.

    Args:
        cfg: The config.
        phases: Of ``'train'``, ``'val'``, ``'test'``.

    Raises:
        UsageError: An annotation file or a folder of images is missing.
    """
    hint = f"link COCO-2017 to {cfg.get('data_root')} or say where it is with --data-root"
    for phase in phases:
        for dataset in _datasets(cfg.get(f"{phase}_dataloader") or {}):
            root = dataset.get("data_root") or ""
            _require_one_file(cfg, dataset)
            folder = (dataset.get("data_prefix") or {}).get("img")
            named = [("annotation file", name) for name in _listed(dataset.get("ann_file"))]
            # Images are read by the pipeline, annotations by the data set.
            images_elsewhere = any(_elsewhere(step) for step in _dicts(dataset.get("pipeline")))
            if folder is not None and not images_elsewhere:
                named.append(("folder of images", folder))
            for what, name in [] if _elsewhere(dataset) else named:
                _require(os.path.join(root, name), what, hint)
        for metric in _dicts(cfg.get(f"{phase}_evaluator")):
            if not _elsewhere(metric):
                for name in _listed(metric.get("ann_file")):
                    _require(name, "annotation file", hint)


def _require_one_file(cfg: Config, dataset: dict) -> None:
    """Refuse a list of annotation files where a data set would join it to a path."""
    if not isinstance(dataset["ann_file"], (list, tuple)):
        return
    with DATASETS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        kind = dataset.get("type")
        kind = registry.get(kind) if isinstance(kind, str) else kind
    if getattr(kind, "_join_prefix", None) is BaseDataset._join_prefix:
        raise UsageError(
            f"ann_file={dataset['ann_file']}: {type_name(dataset)} reads one file; list one data "
            "set for each in a ConcatDataset"
        )


def _require(path: str, what: str, hint: str) -> None:
    if path and "://" not in path and not os.path.exists(path):
        raise UsageError(f"{path}: no such {what}; {hint}")


def _elsewhere(node: dict) -> bool:
    """Whether ``backend_args`` say that another backend than the local disk reads the files."""
    return (node.get("backend_args") or {}).get("backend", "local") not in ("local", "disk")


def _listed(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_work_dir(work_dir: str) -> None:
    """Check that files can be written where a run is to write; leaves nothing behind.

    Raises:
        UsageError: They cannot.
    """
    folder = Path(work_dir)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{work_dir}: cannot be written: {error.strerror}: {folder}; name another --work-dir"
        ) from error


def check_weights(cfg: Config, strict: bool = False) -> None:
    """Check that the checkpoints that a config starts from can be had and fit; downloads them.

    Args:
        cfg: The config.
        strict: As in :func:`psbn_mmdet.checkpoint.load_weights`: True for testing.

    Raises:
        CheckpointError: One is missing, not whole, not of this config or could
            not be downloaded.
    """
    for node in _dicts(cfg.get("model")):
        if node.get("type") == "Pretrained":
            read(node["checkpoint"])
    if cfg.get("load_from"):
        checkpoint = read(cfg.load_from)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        strict = strict or bool(cfg.get("resume"))
        load_weights(MODELS.build(cfg.model), checkpoint, cfg.load_from, strict=strict)


def _dicts(node: Any) -> Iterator[dict]:
    """Yield every dictionary at or below ``node``."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _dicts(child)


def _datasets(node: dict) -> Iterator[dict]:
    """The data sets in a loader's config, within wrappers like RepeatDataset and ConcatDataset."""
    if "ann_file" in node:
        yield node
    inner = node.get("datasets") or [node.get("dataset") or {}]
    for child in inner:
        if child:
            yield from _datasets(child)


def write_coco_results(cfg: Config, prefix: str) -> None:
    """Let every COCO metric of the test phase write its results to ``PREFIX.bbox.json``.

    A second one writes to ``PREFIX_2``, and so on. One that names a place itself keeps it.

    Args:
        cfg: The config, changed in place.
        prefix: Path without its ending.

    Raises:
        UsageError: The config has no ``test_evaluator``.
    """
    from mmdet.evaluation import CocoMetric
    from mmdet.registry import METRICS

    if not cfg.get("test_evaluator"):
        raise UsageError(f"{cfg.filename}: has no test_evaluator, so nothing would be measured")
    prefixes = itertools.chain([prefix], (f"{prefix}_{n}" for n in itertools.count(2)))
    for metric in _dicts(cfg.test_evaluator):
        kind: str | Callable | None = metric.get("type")
        kind = METRICS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, CocoMetric):
            metric["outfile_prefix"] = metric.get("outfile_prefix") or next(prefixes)
