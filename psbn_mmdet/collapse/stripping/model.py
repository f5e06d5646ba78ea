"""A model type for configs: any model without the channels that a record names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from ...norm import to_bn
from .coupling import StripError
from .surgery import Cut, take_out


def stripped_model(
    original: str | type[nn.Module], record: str | Sequence[str], **model: Any
) -> nn.Module:
    """Build a model of a config as narrow as :func:`strip` left it; registered as ``Stripped``.

    The config that tools/strip_checkpoint.py writes inherits the original one and says ::

        model = dict(type="psbn_mmdet.Stripped", original="RetinaNet", record="DIR/record.json")

    The weights come from the stripped checkpoint. Pretrained weights that the original config
    names, of another shape now, are not loaded.

    Args:
        original: The type that the model has in the original config.
        record: The file that was written beside the stripped weights; of a model that was stripped
            again, the files of all times in their order.
        **model: The other keys of the model's config.

    Raises:
        StripError: There is no such record, or it is of another model.
    """
    built = to_bn(MODELS.build(dict(type=original, **model)))
    for module in built.modules():
        if hasattr(module, "init_cfg"):
            module.init_cfg = _without_pretrained(module.init_cfg)
    for each in [record] if isinstance(record, str) else record:
        built = take_out(built, read_cut(each))
    return built


def read_cut(record: str) -> Cut:
    """What a record says is to be taken out of which layer.

    Raises:
        StripError: There is no such file, or it is no record.
    """
    try:
        return json.loads(Path(record).read_text())["cut"]
    except OSError as error:
        raise StripError(f"{record}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise StripError(f"{record}: is no record of tools/strip_checkpoint.py") from None


def _without_pretrained(init_cfg: Any) -> Any:
    if isinstance(init_cfg, list):
        return [each for each in init_cfg if each.get("type") != "Pretrained"]
    if isinstance(init_cfg, dict) and init_cfg.get("type") == "Pretrained":
        return None
    return init_cfg
