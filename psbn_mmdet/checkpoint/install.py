"""What mmengine loads is read, unwrapped and checked by this package, whoever asks it to.

All ways into a model (``load_from``, resuming, ``init_cfg`` with Pretrained, ``init_detector``, the
scripts of mmdet) read through ``CheckpointLoader.load_checkpoint`` and write through
``load_state_dict`` of ``mmengine.runner.checkpoint``. These two, and what is called between them,
are replaced as soon as that module is imported; it costs a second, so this package does not import
it by itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import pickle
import sys
import weakref
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..python38 import removeprefix
from .fit import mismatch
from .read import fetch, load
from .schemes import SCHEMES
from .unwrap import CheckpointError, locate, state_dict_of

_MODULE = "mmengine.runner.checkpoint"
_held_to_all: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_read_last = "the checkpoint"


def hold_to_all(model: nn.Module) -> None:
    """The next state dict that mmengine loads into a model must fit it entirely, or is refused."""
    _held_to_all.add(model)


def install() -> None:
    """Replace mmengine's functions now, or when they are first imported."""
    if _MODULE in sys.modules:
        _replace(sys.modules[_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets Python import the module as ever, and replaces its functions right after."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_replace(module: ModuleType) -> None:
                execute(module)
                _replace(module)

            spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign]
        return spec


def _replace(mmengine: Any) -> None:
    """Replace functions of mmengine's module, also where they have been imported from it."""
    if getattr(mmengine, "_read_by_psbn_mmdet", False):
        return
    mmengine._read_by_psbn_mmdet = True
    loader = mmengine.CheckpointLoader
    loader.register_scheme(["", *(f"{scheme}://" for scheme in SCHEMES)], load_for_all, force=True)
    loader.load_checkpoint = classmethod(_reading(mmengine.print_log))
    for function in (
        _loading(mmengine.load_state_dict),
        _loading_checkpoint(mmengine._load_checkpoint_to_model),
        _load_checkpoint_with_prefix,
    ):
        old = getattr(mmengine, function.__name__)
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(function.__name__) is old:
                setattr(module, function.__name__, function)


def load_for_all(filename: str, map_location: Any = "cpu") -> Any:
    """:func:`load` where every process of a group calls it: rank 0 downloads first.

    Raises:
        CheckpointError: As :func:`load`; on all ranks if it is the download that failed.
    """
    if filename.partition("://")[1]:
        from mmengine.dist import broadcast_object_list, get_rank

        failure: list[str | None] = [None]
        if get_rank() == 0:
            try:
                fetch(filename)
            except CheckpointError as error:
                failure = [str(error)]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise CheckpointError(failure[0])
    return load(filename, map_location or "cpu")


def _reading(print_log: Callable[..., None]) -> Callable[..., dict]:
    def load_checkpoint(
        cls: Any, filename: str, map_location: Any = None, logger: Any = "current"
    ) -> dict:
        """Read a checkpoint without running code; its one state dict is under ``state_dict``."""
        global _read_last
        _read_last = filename = os.fspath(filename)
        print_log(f"Loads checkpoint from {filename}", logger=logger)
        read = cls._get_checkpoint_loader(filename)
        if read is load_for_all:
            checkpoint = read(filename, map_location)
        else:  # s3, petrel, pavi and what others have registered
            try:
                checkpoint = read(filename, map_location)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{filename}: refused, since it carries something other than tensors and plain "
                    f"values (nothing in it was run): {str(error).splitlines()[0]}"
                ) from None
        tensors = state_dict_of(checkpoint, filename)
        place = locate(checkpoint, filename)
        rest = {key: value for key, value in checkpoint.items() if place and key != place[0]}
        return {**rest, "state_dict": tensors}

    return load_checkpoint


def _loading(original: Callable[..., None]) -> Callable[..., None]:
    def load_state_dict(
        module: nn.Module, state_dict: dict[str, Tensor], strict: bool = False, logger: Any = None
    ) -> None:
        """Load what fits by :func:`mismatch`; raises CheckpointError for what does not."""
        everything = strict or module in _held_to_all
        _held_to_all.discard(module)
        if wrong := mismatch(module, state_dict, everything):
            raise CheckpointError(f"{_read_last}: {wrong}")
        original(module, state_dict, False, logger)

    return load_state_dict


def _loading_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
    def _load_checkpoint_to_model(
        model: nn.Module,
        checkpoint: Any,
        strict: bool = False,
        logger: Any = None,
        revise_keys: Any = (),
    ) -> Any:
        # By default mmengine takes a `module.` off, which has been done, and, with the pattern of
        # its Runner, also a `module_` or `modules` that belongs to a name.
        others = [pair for pair in revise_keys if pair[0] not in (r"^module\.", r"^module.")]
        return original(model, checkpoint, strict, logger, others)

    return _load_checkpoint_to_model


def _load_checkpoint_with_prefix(
    prefix: str, filename: str, map_location: Any = None
) -> dict[str, Tensor]:
    """The part of a checkpoint that belongs to one submodule (``prefix`` of ``init_cfg``)."""
    from mmengine.runner import CheckpointLoader

    tensors = CheckpointLoader.load_checkpoint(filename, map_location)["state_dict"]
    prefix = prefix.rstrip(".") + "."
    part = {removeprefix(k, prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not part:
        raise CheckpointError(f"{filename}: no tensor's name begins with {prefix}")
    return part
