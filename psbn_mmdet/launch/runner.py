"""mmengine's Runner, held to what our tools promise about checkpoints.

They are read without running code, as every PyTorch project wraps them, and testing and resuming
take all of one or nothing. A config of mmdet's own scripts has the same by asking for it::

    tools/train.py CONFIG --resume --cfg-options runner_type=psbn_mmdet.Runner

Under torch >= 2.6 that is also how a run is resumed there at all: mmengine 0.10 cannot read the
logs in its own checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmengine
from mmengine.dist import broadcast_object_list, get_rank
from mmengine.runner import CheckpointLoader
from mmengine.runner import Runner as MMEngineRunner
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from ..checkpoint import CheckpointError, load, load_weights, locate, state_dict_of
from ..checkpoint.read import fetch
from ..registry import RUNNERS

_NAMES = ("torchvision", "modelzoo", "open-mmlab", "openmmlab", "mmcls")
_OURS = ("", "http://", "https://", *(f"{scheme}://" for scheme in _NAMES))


def read_as_data() -> None:
    """From here on this process reads without running code what mmengine loads from disk and web.

    That includes pretrained backbones (``init_cfg``), which torch < 2.6, and mmengine's downloads
    under every torch, would unpickle. The content is what mmengine's own loaders return. Loaders of
    other schemes (s3, petrel, pavi) and those that a program has registered itself stay.
    """
    ours = {prefix: CheckpointLoader._schemes[prefix] for prefix in _OURS}
    stock = [key for key, read in ours.items() if read.__module__ == "mmengine.runner.checkpoint"]
    CheckpointLoader.register_scheme(stock, load_from_disk_or_web, force=True)


def read(source: str, map_location: Any = "cpu") -> Any:
    """What mmengine reads for a path, URL or name of any scheme; see :func:`read_as_data`.

    Raises:
        CheckpointError: It is missing or cannot be read.
    """
    read_as_data()
    try:
        return CheckpointLoader.load_checkpoint(os.fspath(source), map_location)
    except FileNotFoundError:
        raise CheckpointError(f"{source}: no such file") from None


def load_from_disk_or_web(filename: str, map_location: Any = None) -> Any:
    """As mmengine's loaders, which every process of a group calls; rank 0 downloads first.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: As :func:`psbn_mmdet.checkpoint.load`; on all ranks if it is the download
            that failed.
    """
    source = resolve(filename)
    device = map_location if not callable(map_location) else None  # as storage, location: storage
    if "://" not in source:
        if not Path(source).expanduser().is_file():
            raise FileNotFoundError(f"{filename} can not be found.")
    else:
        failure: list[str | None] = [None]
        if get_rank() == 0:
            try:
                fetch(source)
            except CheckpointError as error:
                failure = [str(error)]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise CheckpointError(failure[0])
    checkpoint = load(source, device)
    if filename.startswith("mmcls://"):  # classifiers, of which mmengine takes the backbone
        tensors, start = state_dict_of(checkpoint, filename), "backbone."
        part = {k[len(start) :]: tensors[k] for k in tensors if k.startswith(start)}
        return {"state_dict": OrderedDict(part)}
    return checkpoint


def resolve(source: str) -> str:
    """The path or URL of a checkpoint that is given so, or by a name in one of mmengine's tables.

    ``torchvision://resnet50`` is found without torchvision.

    Raises:
        CheckpointError: The table has no such name.
    """
    scheme, _, name = source.rpartition("://")
    if scheme not in _NAMES:
        return source
    if scheme in ("torchvision", "modelzoo"):
        table = json.loads(Path(mmengine.__path__[0], "hub", "torchvision_0.12.json").read_text())
        if name not in table:
            with contextlib.suppress(ImportError, RuntimeError):  # none, or one for another torch
                table = get_torchvision_models()
    elif scheme == "mmcls":
        table = get_mmcls_models()
    else:
        table, name = get_external_models(), get_deprecated_model_names().get(name, name)
    if name not in table:
        raise CheckpointError(f"{source}: mmengine does not know this name; give the URL instead")
    return table[name]


@RUNNERS.register_module()
class Runner(MMEngineRunner):
    """A Runner that loads a checkpoint as it is, or says in a line why it cannot.

    - Read without running code (:func:`read_as_data`), however its project wrapped the weights.
    - Testing, validating and resuming take all of it: every parameter and statistic of the model
      in its shape, and nothing left over. ``load_from`` takes what fits, if anything does.
    - A run is resumed from the checkpoint of a run.
    """

    _whole = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        read_as_data()
        super().__init__(*args, **kwargs)

    def val(self) -> Any:
        """As mmengine's, with all of the checkpoint or none."""
        self._whole = True
        return super().val()

    def test(self) -> Any:
        """As mmengine's, with all of the checkpoint or none."""
        self._whole = True
        return super().test()

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable[..., Any] = "cpu",
        strict: bool = False,
        revise_keys: Any = (),
    ) -> dict[str, Any]:
        """As mmengine's; what wrapped the model (``module.``) is off the names already.

        Raises:
            CheckpointError: It cannot be read, or does not fit.
        """
        checkpoint = read(filename, map_location)
        tensors = state_dict_of(checkpoint, filename)
        place = locate(checkpoint, filename)
        rest = {key: value for key, value in checkpoint.items() if place and key != place[0]}
        checkpoint = {**rest, "state_dict": tensors}
        if isinstance(meta := checkpoint.get("meta"), dict):
            # MMDetection 2's config, a program: mmengine runs it in resuming, to count GPUs.
            checkpoint["meta"] = {key: value for key, value in meta.items() if key != "config"}
        if self._resume:
            _require_a_run(checkpoint, filename)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        tensors = checkpoint["state_dict"]
        for pattern, replacement in revise_keys:
            versions = getattr(tensors, "_metadata", None)
            tensors = OrderedDict((re.sub(pattern, replacement, k), v) for k, v in tensors.items())
            if versions is not None:
                tensors._metadata = versions  # type: ignore[attr-defined]
        strict = strict or self._whole or self._resume
        amiss = load_weights(self.model, {"state_dict": tensors}, filename, strict=strict)
        self._has_loaded = True
        if amiss:
            self.logger.warning(f"{filename}: does not fit the model completely\n{amiss}")
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint


def _require_a_run(checkpoint: dict[str, Any], name: str) -> None:
    """Refuse to resume from weights alone, or from an average of another model."""
    absent = [key for key in ("meta", "message_hub") if key not in checkpoint]
    if absent:
        raise CheckpointError(
            f"{name}: has no {absent[0]}, so it is not a training checkpoint and "
            "cannot be resumed; use load_from with resume=False"
        )
    if "ema_state_dict" in checkpoint:
        average = state_dict_of(checkpoint["ema_state_dict"], name)
        shapes = [{k: v.shape for k, v in tensors.items()} for tensors in
                  (checkpoint["state_dict"], average)]  # fmt: skip
        if other := {k for k, _ in shapes[0].items() ^ shapes[1].items()}:
            raise CheckpointError(
                f"{name}: ema_state_dict and state_dict belong to different models (see "
                f"{min(other)}); resume from another checkpoint"
            )
