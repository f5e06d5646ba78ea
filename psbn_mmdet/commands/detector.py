"""The detector that a command works on: its config, weights and images."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PsbnError, written_whole


def build(cfg: Any, checkpoint: Any, name: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint, in eval mode.

    Raises:
        PsbnError: The weights do not fit.
    """
    from mmengine.registry import MODELS, init_default_scope

    from .. import registry  # noqa: F401  a config names psBN
    from ..checkpoint import load_weights

    init_default_scope(cfg.get("default_scope") or "mmengine")
    model = MODELS.build(cfg.model)
    load_weights(model, checkpoint, name)
    model.eval()  # that of mmdet's backbones returns nothing
    return model


def add_input_arguments(parser: argparse.ArgumentParser, data: str, images: int) -> None:
    """The options of a command line that builds a detector and runs it on images.

    Args:
        parser: It gets ``config``, ``checkpoint``, ``--data``, ``--images`` and ``--size``.
        data: What the images of ``--data`` are for.
        images: How many there are by default.
    """
    parser.add_argument("config", help="a file, or package::path of an installed package")
    parser.add_argument("checkpoint", help="a file or URL")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    parser.add_argument(
        "--images", type=int, default=images, metavar="N", help="how many (default %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(320, 320),
        metavar=("H", "W"),
        help="of random images where there is no --data (default 320 320)",
    )


def open_detector(args: argparse.Namespace) -> tuple[Any, Any, nn.Module]:
    """Config, checkpoint and model that the options of :func:`add_input_arguments` name.

    Raises:
        PsbnError: One cannot be read, they do not fit, or the images are too few to tell what is
            constant.
    """
    from ..checkpoint import load
    from ..launch import load_config  # which needs mmengine

    if args.images < 2:
        raise PsbnError(f"--images {args.images}: at least two are needed")
    cfg = load_config(args.config)
    checkpoint = load(args.checkpoint)
    return cfg, checkpoint, build(cfg, checkpoint, args.checkpoint)


def save_weights(model: nn.Module, old: Any, path: Path) -> None:
    """A checkpoint of new weights with the ``meta`` of the old one, but for its config.

    Without optimizer and schedule, which no longer fit: mmengine wants them for resuming alone.
    """
    meta = {k: v for k, v in (old.get("meta") or {}).items() if k != "cfg"}
    with written_whole(path) as part:
        torch.save({"meta": meta, "state_dict": model.state_dict()}, part)


def read_images(cfg: Any, model: nn.Module, folder: Path, count: int) -> Tensor:
    """The first images of a folder as the test pipeline of a config prepares them, (N, C, H, W).

    Raises:
        PsbnError: There are fewer than two.
    """
    from mmcv.transforms import Compose
    from mmdet.utils import get_test_pipeline_cfg

    kinds = {".jpg", ".jpeg", ".png", ".bmp"}
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds)[:count]
    if len(paths) < 2:
        raise PsbnError(f"{folder}: has {len(paths)} images; at least two are needed")
    steps = [s for s in get_test_pipeline_cfg(cfg) if "Annotations" not in s["type"]]
    pipeline = Compose(steps)
    data = [pipeline(dict(img_path=str(path), img_id=i)) for i, path in enumerate(paths)]
    batch = {key: [each[key] for each in data] for key in ("inputs", "data_samples")}
    preprocessor: Any = model.data_preprocessor
    return preprocessor(batch, False)["inputs"]


_SCOPES = {"mmengine", "mmcv", "mmdet", "psbn_mmdet"}


def carried_config(checkpoint: Any, name: str) -> Any:
    """The config that a checkpoint of mmengine's Runner carries, read without running anything.

    It is the text of a Python file, of which only literals and ``dict(...)`` are understood. As a
    ``type`` that is no registered name is imported and called when a model is built, whatever it
    is, such names are refused.

    Raises:
        PsbnError: There is none, or it is not such a text.
    """
    from mmengine.config import Config

    text = (checkpoint.get("meta") or {}).get("cfg") if isinstance(checkpoint, dict) else None
    if not isinstance(text, str):
        raise PsbnError(f"{name}: contains no config; add --config")
    try:
        steps = ast.parse(text).body
        values = {s.targets[0].id: _literal(s.value) for s in steps}  # type: ignore[attr-defined]
    except (SyntaxError, ValueError, AttributeError, IndexError) as error:
        raise PsbnError(
            f"{name}: its config has more than plain values ({error}); add --config"
        ) from error
    keys = ("model", "test_dataloader", "default_scope")
    kept = {key: values[key] for key in keys if key in values}
    if unknown := sorted(_types(kept) - _registered()):
        raise PsbnError(
            f"{name}: its config builds {unknown[0]!r}, which is not registered here; "
            "add --config with a config that you trust"
        )
    return Config(kept)


def _literal(node: ast.expr) -> Any:
    """The value of a literal, in which ``dict(key=value)`` may stand for a dict."""
    if isinstance(node, ast.Call):
        if not (isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args):
            raise ValueError(f"a call in line {node.lineno}")
        return {k.arg: _literal(k.value) for k in node.keywords if k.arg is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(each) for each in node.elts]
        return tuple(values) if isinstance(node, ast.Tuple) else values
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key else None for key in node.keys]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)


def _types(value: Any) -> set[str]:
    """All that a config names as ``type`` or as another scope."""
    if isinstance(value, dict):
        named = {str(value["type"])} if "type" in value else set()
        if "_scope_" in value and value["_scope_"] not in _SCOPES:
            named.add(str(value["_scope_"]))
        return named.union(*map(_types, value.values()))
    return set().union(*map(_types, value)) if isinstance(value, (list, tuple)) else set()


def _registered() -> set[str]:
    """The names that mmdet's registries know, with and without their scope."""
    import mmdet.registry
    import mmengine.registry
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    names: set[str] = set()
    for module in (mmengine.registry, mmdet.registry):
        for registry in vars(module).values():
            if isinstance(registry, mmengine.registry.Registry):
                names |= {*registry.module_dict}
    names |= {f"{scope}.{name}" for scope in _SCOPES for name in names}
    return names | {"nms", "soft_nms"}  # which mmcv looks up by eval()
