"""Loading a checkpoint into a model, all or nothing; mmengine only warns of what does not fit."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .unwrap import CheckpointError, state_dict_of

_Incompatible = namedtuple("_Incompatible", ["missing_keys", "unexpected_keys"])


def load_weights(
    model: nn.Module, checkpoint: Any, name: str = "the checkpoint", *, strict: bool = True
) -> str:
    """Load the one state dict of a checkpoint into a model.

    Args:
        model: Loaded by its own modules and their hooks. Wrappers for distributed training and
            test-time augmentation are seen through at every level, as mmengine does.
        checkpoint: What :func:`.load` returned.
        name: Where it came from, for the message.
        strict: Whether every parameter and statistic of the model must come from the state dict,
            in its shape, as for testing and resuming. Of what the model does not take, only that is
            passed over which means nothing to it: ``num_batches_tracked``, the ``ema_*`` buffers of
            MMDetection 2, constants such as ``data_preprocessor.mean`` where they equal the
            model's, and beta and alpha beside a ``bias`` that holds their sum. If not strict,
            refused is what fits nowhere, and psBN layers without ``bias`` in a model of BNs.

    Returns:
        What did not fit, for a log; ``''`` if all did.

    Raises:
        CheckpointError: It does not fit. The model may have been loaded in part.
    """
    state_dict = state_dict_of(checkpoint, name)
    total = len(state_dict)
    try:
        loaded, missing, unexpected, errors = _load(model, state_dict)
    except (RuntimeError, ValueError) as error:  # a layer refuses
        raise CheckpointError(f"{name}: {str(error).splitlines()[0]}") from error
    wrong = _lost_bias(loaded, unexpected)
    if total and len(unexpected) + len(errors) >= total:
        why = _unlike(model, state_dict)
        wrong = f"no tensor of the checkpoint matches the model ({why}); wrong config?"
    elif strict and not wrong:
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        if errors:
            line = errors[0].splitlines()[0].rstrip(".")
            wrong = f"{len(errors)} tensors cannot be loaded (e.g. {line}); wrong config?"
        elif missing:
            wrong = (
                f"{len(missing)} tensors are missing from the checkpoint (e.g. "
                f"{missing[0]}); wrong config?"
            )
        else:
            wrong = _of_no_use(model, loaded, unexpected)
    if wrong:
        raise CheckpointError(f"{name}: {wrong}")
    if missing:
        errors.append(f"{len(missing)} tensors are missing: {', '.join(missing)}")
    if unexpected:
        errors.append(f"{len(unexpected)} tensors are not in the model: {', '.join(unexpected)}")
    return "\n".join(errors)


def _unlike(model: nn.Module, state_dict: Mapping[str, Tensor]) -> str:
    """How the first tensor of a state dict differs from the model's, for a message."""
    own = dict(_tensors(model))
    for key, value in state_dict.items():
        if key in own:
            return f"{key} is {tuple(value.shape)} there, {tuple(own[key].shape)} here"
    return f"{next(iter(state_dict))} there, {next(iter(own), 'no tensor')} here"


def _lost_bias(loaded: dict[str, Tensor], unexpected: list[str]) -> str | None:
    """Files of before 0.2 hold beta and alpha of a psBN layer without their sum."""
    for key in unexpected:
        layer, _, name = key.rpartition(".")
        if (
            name == "beta"
            and _beside(key, "alpha") in loaded
            and _beside(key, "bias") not in loaded
        ):
            return (
                f"an older version wrote this psBN checkpoint, and the model's {layer} is "
                "not psBN, so it would lose its bias; convert the checkpoint with psbn "
                "convert --to bn"
            )
    return None


def _beside(key: str, name: str) -> str:
    """The key of another tensor of the same layer."""
    return f"{key.rpartition('.')[0]}.{name}".lstrip(".")


def _of_no_use(model: nn.Module, loaded: dict[str, Tensor], unexpected: list[str]) -> str | None:
    """What is wrong with tensors that the model does not load, if anything."""
    constants = dict(_tensors(model))
    extra = []
    for key in unexpected:
        if key.endswith("num_batches_tracked") or key.startswith("ema_"):
            continue
        if key.endswith(("beta", "alpha")) and _beside(key, "bias") in loaded:
            continue
        own, value = constants.get(key), loaded[key]
        if own is None:
            extra.append(key)
        elif not own.is_meta and not value.is_meta and not _same(own, value):
            return f"{key} is {_line(value)} in the checkpoint and {_line(own)} in the config"
    if extra:
        return (
            f"{len(extra)} tensors of the checkpoint are not in the model (e.g. "
            f"{extra[0]}); wrong config?"
        )
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    return torch.allclose(a.detach().double().cpu().flatten(), b.detach().double().cpu().flatten())


def _line(tensor: Tensor) -> str:
    values = ", ".join(f"{float(value):g}" for value in tensor.flatten()[:4])
    return f"({values}{', ...' if tensor.numel() > 4 else ''})"


def _inner(module: nn.Module) -> nn.Module:
    """What a wrapper wraps."""
    wrappers: tuple[type[nn.Module], ...] = (nn.parallel.DataParallel,)
    if torch.distributed.is_available():
        wrappers += (nn.parallel.DistributedDataParallel,)
    mmengine = sys.modules.get("mmengine.model")  # else none of its wrappers was made
    while isinstance(module, wrappers) or (
        mmengine
        and (mmengine.is_model_wrapper(module) or isinstance(module, mmengine.BaseTTAModel))
    ):
        module = cast(nn.Module, module.module)
    return module


def _tensors(model: nn.Module, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that no state dict holds included."""
    model = _inner(model)
    for key, tensor in {**model._parameters, **model._buffers}.items():
        if tensor is not None:
            yield f"{name}.{key}".lstrip("."), tensor
    for key, child in model._modules.items():
        if child is not None:
            yield from _tensors(child, f"{name}.{key}".lstrip("."))


def _load(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[str], list[str]]:
    """The state dict by the names that the model gave it, and what is missing, unexpected, wrong.

    As mmengine's ``load_state_dict``, which says it to its log alone, and on rank 0.
    """
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    versions = getattr(state_dict, "_metadata", None) or {}

    def load(module: nn.Module, own: dict[str, Tensor], prefix: str) -> None:
        module = _inner(module)
        module._load_from_state_dict(
            own, prefix, versions.get(prefix[:-1], {}), True, missing, unexpected, errors
        )
        for name, child in module._modules.items():
            if child is not None:
                start = f"{prefix}{name}."
                load(child, {k: v for k, v in own.items() if k.startswith(start)}, start)
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _Incompatible(missing, unexpected))

    renamed = dict(state_dict)
    load(model, renamed, "")
    return renamed, missing, unexpected, errors
