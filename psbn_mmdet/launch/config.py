"""A config with a command line's overrides."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.hub import get_config
from mmengine.utils import is_installed

from ..errors import PsbnError


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
        help="override the config, e.g. model.backbone.norm_cfg.alpha=0.2 or key=[a,b]",
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
        help="only check whether so many processes can run here",
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
        raise UsageError(f"{source}: no such config file")
    try:
        cfg = get_config(source) if "::" in source else Config.fromfile(source)
        old_root = cfg.get("data_root")
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:  # a config is a program: it may raise anything
        raise UsageError(f"{source}: cannot be loaded: {type(error).__name__}: {error}") from error
    new_root = data_root or cfg.get("data_root")
    if new_root and not old_root:
        raise UsageError(
            f"{source}: has no data_root to replace; set the paths of the data sets "
            "with --cfg-options instead"
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


def scope(cfg: Config) -> str:
    """Where the types of a config are looked up first; configs with classes for types need none."""
    return cfg.get("default_scope") or "mmengine"


def type_name(node: dict[str, Any]) -> str:
    """The name of a type without its scope or module; '' where a config has none."""
    kind = node.get("type") or ""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def dicts(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every dictionary at or below ``node``."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from dicts(child)


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
    for metric in dicts(cfg.test_evaluator):
        kind: str | Callable[..., Any] | None = metric.get("type")
        kind = METRICS.get(kind) if isinstance(kind, str) else kind
        if isinstance(kind, type) and issubclass(kind, CocoMetric):
            metric["outfile_prefix"] = metric.get("outfile_prefix") or next(prefixes)
