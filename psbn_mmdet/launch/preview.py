"""What a config will train or test, built and looked at before it is started.

Much that is wrong in a config trains all the same: a class whose name the annotations do not have
gets no boxes, layers that are not reached stay BN, a rule takes the weight decay from them.
"""

from __future__ import annotations

import json
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    TASK_UTILS,
    TRANSFORMS,
    WEIGHT_INITIALIZERS,
    init_default_scope,
)
from mmengine.runner import Runner
from torch import nn

from ..checkpoint import load_weights
from ..errors import PsbnError
from .config import UsageError, dicts, scope, type_name
from .distributed import on_all_ranks
from .runner import read

T = TypeVar("T")

_REGISTRIES = (
    MODELS, TASK_UTILS, WEIGHT_INITIALIZERS, DATASETS, TRANSFORMS, OPTIMIZERS, OPTIM_WRAPPERS,
    OPTIM_WRAPPER_CONSTRUCTORS,
)  # fmt: skip

_SHOWN = 20
"""Classes that are listed with their boxes; of more, those with the most and the fewest."""


def preview(cfg: Config, *, training: bool) -> list[str]:
    """Build what a config names, as training or testing would, and say what it is.

    Args:
        cfg: The config; ``load_from`` is loaded, too.
        training: Whether to train; testing takes a checkpoint whole, and nothing else.

    Returns:
        Lines to print.

    Raises:
        UsageError: Something cannot be built, or data and model do not fit.
        CheckpointError: Weights are missing, not whole, not of this config or could not be
            downloaded.
    """
    init_default_scope(scope(cfg))
    MMLogger.get_instance("preview").setLevel("WARNING")  # a line for every parameter, else
    with redirect_stdout(StringIO()):  # pycocotools says how it is getting on
        return _preview(cfg, training)


def _preview(cfg: Config, training: bool) -> list[str]:
    model = built("model", lambda: MODELS.build(_with_preprocessor(cfg)), cfg.model)
    lines = [_of_model(model), _of_psbn(model)]
    if training:
        optim = built(
            "optimizer",
            lambda: build_optim_wrapper(model, deepcopy(cfg.optim_wrapper)),
            cfg.optim_wrapper,
        )
        lines += _of_optimizer(model, optim)
        config = cfg.train_dataloader.dataset
        dataset = built("training data set", lambda: DATASETS.build(config), config)
        if hasattr(dataset, "full_init"):
            dataset.full_init()
        check_classes(dataset, model)
        lines.append(_of_data(dataset))
    weights = _weights(cfg, model, training)
    return [*lines, *(weights or ["weights: random, no file is loaded"])]


def built(what: str, build: Callable[[], T], config: Any) -> T:
    """Build something by a config.

    Raises:
        UsageError: With what went wrong, and where.
    """
    try:
        return build()
    except PsbnError:
        raise
    except Exception as error:  # a config names what it likes
        unknown = _unknown(config) if isinstance(error, (KeyError, TypeError)) else []
        if unknown:
            raise UsageError(
                f"the {what} cannot be built: unknown {', '.join(unknown)}; misspelt, or "
                "is custom_imports missing?"
            ) from error
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = os.sep.join(frame.filename.split(os.sep)[-3:])
        text = str(error.args[0] if error.args else error).strip() or type(error).__name__
        text = text.splitlines()[0].split(" More details")[0].rstrip(".")
        raise UsageError(
            f"the {what} of this config cannot be built: {text} ({place}:{frame.lineno})"
        ) from error


def _unknown(config: Any) -> list[str]:
    """The types that a config names and no registry has."""
    parts = {k: v for k, v in (config or {}).items() if k not in ("train_cfg", "test_cfg")}
    kinds = {node["type"] for node in dicts(parts) if isinstance(node.get("type"), str)}
    for registry in _REGISTRIES:
        with registry.switch_scope_and_registry(None) as own, redirect_stdout(StringIO()):
            kinds = {kind for kind in kinds if own.get(kind) is None}
    return sorted(kinds)


def _with_preprocessor(cfg: Config) -> dict[str, Any]:
    """The model's config as the Runner completes it."""
    model = deepcopy(cfg.model)
    if cfg.get("data_preprocessor"):
        model.setdefault("data_preprocessor", deepcopy(cfg.data_preprocessor))
    return model


def _of_model(model: nn.Module) -> str:
    parameters = list(model.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    total = sum(p.numel() for p in parameters)
    return f"model: {type(model).__name__}, {total:,} parameters ({frozen:,} frozen)"


def _psbn_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if "beta" in module._parameters and "alpha" in module._buffers
    }


def _of_psbn(model: nn.Module) -> str:
    layers = _psbn_layers(model)
    if not layers:
        return "psBN: no layer; use psBN in norm_cfg, or model.type=psbn_mmdet.ToPsBN"
    kinds = Counter(type(module).__name__ for module in layers.values())
    alphas = sorted({round(float(module.get_buffer("alpha")), 6) for module in layers.values()})
    frozen = [name for name, module in layers.items() if not module.beta.requires_grad]
    text = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    text = f"psBN: {text}; alpha {', '.join(map(str, alphas))}"
    return text + (f"; {len(frozen)} frozen (e.g. {frozen[0]})" if frozen else "; none frozen")


def _of_optimizer(model: nn.Module, optim: Any) -> Iterator[str]:
    parts = optim.values() if hasattr(optim, "optim_wrappers") else [optim]
    groups = [group for part in parts for group in part.optimizer.param_groups]
    names = sorted({type(part.optimizer).__name__ for part in parts})
    rates = sorted({group["lr"] for group in groups})
    told = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    yield f"optimizer: {', '.join(names)}, lr {told}, {len(groups)} parameter groups"
    decay = {id(p): group.get("weight_decay", 0) for group in groups for p in group["params"]}
    betas = [m.beta for m in _psbn_layers(model).values() if m.beta.requires_grad]
    if betas:
        reached = [decay.get(id(beta), 0) for beta in betas]
        values = ", ".join(f"{value:g}" for value in sorted({d for d in reached if d}))
        text = (
            f"weight decay: reaches beta of {sum(map(bool, reached))} of {len(betas)} psBN layers"
        )
        hint = "; psBN needs it: see norm_decay_mult and paramwise_cfg" if 0 in reached else ""
        yield f"{text}{f' ({values})' if values else ''}{hint}"


def check_classes(dataset: Any, model: nn.Module) -> None:
    """Check that the classes of a data set are in its annotations, and that heads have as many.

    Raises:
        UsageError: They are not. MMDetection trains such a config all the same: a class of
            another name has no boxes, and may shift the labels of the others.
    """
    for part in _parts(dataset):
        classes = (getattr(part, "metainfo", None) or {}).get("classes")
        known = getattr(part, "cat_ids", None)
        if isinstance(classes, str):
            raise UsageError(
                f"{type(part).__name__}: classes={classes!r} is a string; write ({classes!r},)"
            )
        if classes and isinstance(known, list) and len(known) < len(classes):
            raise UsageError(
                f"{type(part).__name__}: {part.ann_file} has {len(known)} of the {len(classes)} "
                f"classes of the config{_told_apart(part.ann_file, classes)}"
            )
    metainfo = getattr(dataset, "metainfo", None) or {}
    classes = metainfo.get("classes")
    if not classes or hasattr(model, "language_model"):  # which has words for classes
        return
    counts = {len(classes), len(metainfo.get("thing_classes") or classes)}
    for name, module in model.named_modules():
        number = getattr(module, "num_classes", None)
        if _HEAD_OF_BOXES.search(name) and isinstance(number, int) and number not in counts:
            raise UsageError(
                f"{name} ({type(module).__name__}) has num_classes={number}, but the data "
                f"set has {len(classes)} classes; set num_classes of every head to "
                f"{len(classes)}"
            )


def _told_apart(ann_file: str, classes: Any) -> str:
    """Which classes a COCO file does not have, if that can be read."""
    try:
        content = json.loads(Path(ann_file).read_bytes())
        there = [category["name"] for category in content["categories"]]
    except (OSError, ValueError, TypeError, KeyError):
        return ""
    missing = [str(name) for name in classes if name not in there]
    return f", and no {', '.join(missing[:9])}; what it has: {', '.join(map(str, there[:99]))}"


_HEAD_OF_BOXES = re.compile(r"(^|\.)(bbox|mask)_head(\.\d+)?$")


def _parts(dataset: Any) -> Iterator[Any]:
    """The data sets within wrappers."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    if inner == [None]:
        yield dataset
    for part in inner:
        if part is not None:
            yield from _parts(part)


def _boxes(dataset: Any) -> dict[str, int]:
    """How many boxes of each class a data set has."""
    classes = list((getattr(dataset, "metainfo", None) or {}).get("classes") or [])
    counts = [0] * len(classes)
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        frames = info.get("images", [info])
        for instance in (i for frame in frames for i in frame.get("instances") or []):
            label = instance.get("bbox_label")
            if (
                isinstance(label, int)
                and 0 <= label < len(counts)
                and not instance.get("ignore_flag")
            ):
                counts[label] += 1
    return dict(zip(classes, counts))


def _of_data(dataset: Any) -> str:
    text = f"data: {len(dataset):,} items"
    counts: Counter[str] = Counter()
    for part in _parts(dataset):
        if hasattr(part, "get_data_info"):
            counts.update(_boxes(part))  # adds zeros, too
    if not counts:
        return text
    named = [f"{name} {number:,}" for name, number in counts.most_common()]
    if len(named) > _SHOWN:
        named = [*named[: _SHOWN // 2], "...", *named[-_SHOWN // 2 :]]
    empty = sum(number == 0 for number in counts.values())
    text += f"; {sum(counts.values()):,} boxes of {len(counts)} classes: {', '.join(named)}"
    return text + (f"; {empty} classes without a box" if empty else "")


def _weights(cfg: Config, model: nn.Module, training: bool) -> list[str]:
    """Load the files that the weights come from, as they will be."""
    lines = []
    if training:
        for node in dicts(cfg.get("model")):
            if type_name(node) in ("Pretrained", "PretrainedInit"):
                read(node["checkpoint"])
                lines.append(f"weights: {node['checkpoint']}, as init_cfg says")
    if cfg.get("load_from"):
        checkpoint = read(cfg.load_from)
        everything = not training or bool(cfg.get("resume"))
        load_weights(model, checkpoint, cfg.load_from, strict=everything)
        how = "whole" if everything else "what fits of it"
        if training:
            how += "; the run is resumed" if cfg.get("resume") else "; a new run begins with it"
        lines.append(f"weights: {cfg.load_from}, {how}")
    return lines


class CheckClasses(Hook):
    """:func:`check_classes` of the data set and model that a run has built."""

    def before_train(self, runner: Runner) -> None:
        """Check, on all ranks."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if isinstance(model, torch.nn.Module):
            on_all_ranks(lambda: check_classes(runner.train_dataloader.dataset, model))
