"""What the ranks of a run must have in common, compared before the first step.

Nodes without a shared disk may have other paths, and also other files: another config, other
weights to start from, other annotations. DistributedDataParallel averages gradients all the same,
and each rank would train a network of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .distributed import agree

_OF_A_RANK = {"work_dir", "launcher", "filename", "data_root", "log_level", "visualizer"}
"""Keys of a config that may differ between ranks."""

_ITEMS = 500
"""Of a data set are compared, evenly spaced."""


def agree_on_config(cfg: Config) -> None:
    """Compare the configs of all ranks, but for where things are.

    Raises:
        UsageError: They differ.
    """
    common = {key: value for key, value in cfg.items() if key not in _OF_A_RANK}
    common["run"] = os.environ.get("TORCHELASTIC_RUN_ID", "")
    agree("config", _fingerprint(_without_places(common, str(cfg.get("data_root") or ""))))


def _without_places(node: Any, root: str) -> Any:
    """A config with the last part of every path, and of those in the data root what is below it."""
    if isinstance(node, dict):
        return {
            key: _without_places(value, root) for key, value in node.items() if key != "data_root"
        }
    if isinstance(node, (list, tuple)):
        return [_without_places(value, root) for value in node]
    if not isinstance(node, str) or os.sep not in node:
        return node
    path = os.path.normpath(node)
    below = os.path.join(os.path.normpath(root), "")
    if root and path.startswith(below):
        return path[len(below) :]
    return "" if root and path == os.path.normpath(root) else os.path.basename(path)


def _fingerprint(node: Any) -> str:
    def name(x: Any) -> str:  # repr would hold the address of a function
        return getattr(x, "__name__", type(x).__name__)

    text = json.dumps(node, sort_keys=True, default=name)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Agreement(Hook):
    """Compares what the ranks start from: weights, the optimizer's state, the data set."""

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Compare, when all is loaded.

        Raises:
            UsageError: They differ.
        """
        if runner.world_size == 1:
            return
        agree("weights (of load_from, init_cfg or the checkpoint)", _hash(runner.model))
        agree("state of the optimizer", _hash(runner.optim_wrapper))
        agree("data set", _data(runner.train_dataloader.dataset))


def _hash(owner: Any) -> str:
    """A fingerprint of the tensors and numbers in a state dict."""
    digest = hashlib.sha256()
    for name, value in _leaves(owner.state_dict(), ""):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}")
    elif isinstance(node, (list, tuple)):
        for place, value in enumerate(node):
            yield from _leaves(value, f"{path}.{place}")
    elif isinstance(node, (torch.Tensor, int, float, str)):
        yield path, node


def _data(dataset: Any) -> str:
    """The length of a data set, and a fingerprint of what it knows of some of its items."""
    try:
        length = len(dataset)
    except TypeError:  # an iterable one
        return "of no length"
    if not hasattr(dataset, "get_data_info"):
        return f"{length} items"
    chosen = np.unique(np.linspace(0, length - 1, min(length, _ITEMS)).astype(int)).tolist()
    known = [_plain(dataset.get_data_info(index)) for index in chosen]
    return f"{length} items, {_fingerprint(_without_places(known, ''))}"


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if isinstance(node, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(node).tobytes()).hexdigest()
    return node.item() if isinstance(node, np.generic) else node
