"""Whether a checkpoint fits a model: what mmengine would only warn of is refused."""

from __future__ import annotations

import sys
import warnings
from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..norm.recognize import norm_kinds
from .unwrap import CheckpointError, state_dict_of

_Incompatible = namedtuple("_Incompatible", ["missing_keys", "unexpected_keys"])


def mismatch(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool) -> str | None:
    """Why loading would leave the model computing something else, or None.

    The model's own modules load the state dict, into tensors without data in the place of theirs,
    and run their hooks for loading, so the answer is theirs: with ``strict``,
    ``model.load_state_dict(state_dict)`` succeeds if and only if this is None, but for tensors
    beside those of the model that mean nothing to it (``num_batches_tracked``, the ``ema_*``
    buffers of MMDetection 2, constants such as ``data_preprocessor.mean`` where they equal the
    model's).

    Args:
        model: The model that is to be loaded into; it is not changed. Wrappers for distributed
            training and test-time augmentation are seen through, as mmengine does.
        state_dict: What is to be loaded.
        strict: Whether every parameter and statistic of the model must come from
            the state dict, in its shape, as for testing and resuming. If not, refused is what
            fits nowhere, what modules refuse by themselves, and a psBN layer whose plain twin would
            lose beta and alpha.
    """
    try:
        missing, unexpected, errors = _try_to_load(model, state_dict)
    except RuntimeError as error:  # a layer refuses
        return str(error).splitlines()[0]
    modules = dict(_modules(model))
    lost = {key for key in unexpected if key.endswith(("beta", "alpha"))}
    for layer in norm_kinds(state_dict):
        if layer in modules and f"{layer}.beta".lstrip(".") in lost:
            return (
                f"it is a psBN checkpoint, and the model's {layer} is a "
                f"{type(modules[layer]).__name__}, which would lose its bias: set norm_cfg's type "
                "to psBN, or convert it with tools/convert_checkpoint.py --to bn"
            )
    if state_dict and len(unexpected) + len(errors) >= len(state_dict):
        example = next(iter(state_dict))
        return (
            f"none of its {len(state_dict)} tensors fits the model, as {example}, and "
            f"{len(missing)} tensors are missing; is it of this config?"
        )
    if not strict:
        return None
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if errors:
        own = dict(_tensors(model))
        for key, value in state_dict.items():
            if key in own and own[key].shape != value.shape:
                return (
                    f"{len(errors)} tensors have another shape, as {key}: {tuple(value.shape)} "
                    f"instead of {tuple(own[key].shape)}; is it of this config?"
                )
        return f"{len(errors)} tensors cannot be loaded: {errors[0].splitlines()[0]}"
    if missing:
        return f"{len(missing)} tensors are missing, as {missing[0]}; is it of this config?"
    return _of_no_use(model, {key: state_dict[key] for key in unexpected})


def require_fit(model: nn.Module, checkpoint: Any, name: str, strict: bool) -> None:
    """Refuse a checkpoint that does not give a model the function it was saved with.

    Args:
        model: What it is to be loaded into.
        checkpoint: What was read.
        name: Where it came from, for the message.
        strict: As in :func:`mismatch`.

    Raises:
        CheckpointError: It does not fit.
    """
    wrong = mismatch(model, state_dict_of(checkpoint, name), strict)
    if wrong:
        raise CheckpointError(f"{name}: {wrong}")


def _of_no_use(model: nn.Module, unexpected: dict[str, Tensor]) -> str | None:
    """What is wrong with tensors that the model does not load, if anything."""
    constants = dict(_tensors(model))
    extra = []
    for key, value in unexpected.items():
        if key.endswith("num_batches_tracked") or key.startswith("ema_"):
            continue
        own = constants.get(key)
        if own is None:
            extra.append(key)
        elif not own.is_meta and not value.is_meta and not _same(own, value):
            return f"its {key} is {_line(value)}, and the config's is {_line(own)}"
    if extra:
        return (
            f"{len(extra)} tensors have no place in the model, as {extra[0]}; is it of this config?"
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


def _modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that their tensors have in a checkpoint, a shared one at each place."""
    module = _inner(module)
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{name}.{key}".lstrip("."))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, those that no state dict holds included."""
    for prefix, module in _modules(model):
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _try_to_load(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unexpected keys and errors of loading, as the modules report them."""
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    versions = getattr(state_dict, "_metadata", None) or {}

    def load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
        module = _inner(module)
        own = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        with _without_data(module):
            module._load_from_state_dict(
                own, prefix, versions.get(prefix[:-1], {}), True, missing, unexpected, errors
            )
        for name, child in module._modules.items():
            if child is not None:
                load(child, own, f"{prefix}{name}.")
        for hook in module._load_state_dict_post_hooks.values():
            hook(module, _Incompatible(missing, unexpected))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        load(model, dict(state_dict), "")
    return missing, unexpected, errors


@contextmanager
def _without_data(module: nn.Module) -> Iterator[None]:
    """Tensors on the meta device in the place of a module's own."""

    def meta(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if nn.parameter.is_lazy(tensor):  # loading gives it a shape
            kind: Any = type(tensor)
            return kind(requires_grad=tensor.requires_grad, device="meta")
        twin = torch.empty_like(tensor, device="meta")
        return (
            nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        )

    parameters: dict[str, Any] = module._parameters
    buffers = module._buffers
    module._parameters = {name: meta(tensor) for name, tensor in parameters.items()}
    module._buffers = {name: meta(tensor) for name, tensor in buffers.items()}
    try:
        yield
    finally:
        module._parameters, module._buffers = parameters, buffers
