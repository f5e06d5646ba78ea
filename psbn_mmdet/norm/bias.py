"""The `bias` of a post-shifted layer as code outside of the layer sees it: writes reach beta.

`bias` is a sum, so a write into it would be one into a temporary and change nothing, without a
word. Writing into the bias of a BatchNorm is common, though: `m.bias.data.mul_(mask)` in channel
pruning, `m.bias.data.copy_(...)` in moving weights. So the tensor that a reader gets knows where it
came from, and after a write `beta` becomes what was written, minus alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .layers import PostShift

# torch < 2.3 has none and breaks the graph at the check instead.
_is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)

# torch puts `type()` into "cannot assign '...' as parameter 'bias'", the error in which
# convert_sync_batchnorm of torch and mmengine ends.
_TYPE_IN_ERRORS = "bias of a psBN layer (psSyncBN is its synchronised form; to_bn makes it plain)"


class Bias(Tensor):
    """`beta + alpha` of a layer; an in-place change of it or of a view of it changes beta.

    All other operations give plain tensors. Right are methods in place, `out=`, assignment to an
    index or to `.data`, `requires_grad_()`, `register_hook()` and `.grad` (alpha is constant, so
    these are beta's). A write always means `bias`, whoever does it: `nn.init.zeros_(m.bias)` sets
    beta to -alpha.

    Raises:
        RuntimeError: A write while gradients are recorded, as for any parameter, or into one that
            was read before beta changed.
        TypeError: It is to become a parameter of its own: take a `clone()` for that.
        BufferError: It is to be shared by DLPack.

    Not seen, and lost, is what writes into its memory past torch's functions: a collective of
    torch.distributed, a kernel of an extension. Give these `layer.beta`.
    """

    _plain: Tensor  # the same memory as a plain tensor
    _origin: _Origin

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on plain tensors, and pass on to beta what it has written."""
        kwargs = kwargs or {}
        biases = [b for b in _leaves((args, kwargs)) if isinstance(b, Bias)]
        origin = biases[0]._origin
        first = args[0] if args else None
        if isinstance(first, Bias) and first._plain is first._origin.total:
            if func in (Tensor.requires_grad_, _setter("requires_grad")):
                origin.layer.beta.requires_grad_(*args[1:], **kwargs)
                return first
            if func == _getter("grad"):
                return origin.layer.beta.grad
            if func == _setter("grad"):
                origin.layer.beta.grad = args[1]
                return None
            if func == _setter("data"):
                return origin.replace(args[1])
            if func == Tensor.register_hook:
                return origin.layer.beta.register_hook(*args[1:], **kwargs)
            if func == Tensor.type and len(args) == 1 and not kwargs:
                return _TYPE_IN_ERRORS
        if func == Tensor.__dlpack__:
            raise BufferError(
                "the bias of a psBN layer is the sum beta + alpha; share beta, or a "
                "clone() of the bias"
            )
        before = [(bias._plain._version, bias._plain.grad_fn) for bias in biases]
        result = func(*_map(args, _to_plain), **_map(kwargs, _to_plain))
        for bias, (version, graph) in zip(biases, before, strict=True):
            if bias._plain.grad_fn is not graph:
                raise RuntimeError(
                    f"the bias of a {type(origin.layer).__name__} requires grad and was "
                    "changed in place; do it under torch.no_grad() or on layer.bias.data"
                )
            if bias._plain._version != version or func in (Tensor.apply_, Tensor.map_):
                bias._origin.write()
        return _map(result, lambda value: _guarded(value, origin))

    @staticmethod
    def of(layer: PostShift) -> Tensor:
        """`beta + alpha` of a layer; plain where a graph is recorded or beta is not its parameter.

        The latter within `torch.func`, on the meta device, of shards, in inference mode.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if _is_compiling() or tracing or type(layer.beta) is not nn.Parameter:
            return layer.beta + layer.initial_alpha
        if layer.beta.is_inference():
            return layer.beta + layer.initial_alpha
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            total = layer.beta + layer.initial_alpha
        if type(total) is not Tensor or total.is_meta:
            return total
        return _guarded(total, _Origin(layer, total))

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        kind = type(self._origin.layer).__name__
        raise TypeError(
            f"the bias of a {kind} is the sum beta + alpha; make a parameter from a "
            "copy: nn.Parameter(layer.bias.detach().clone())"
        )


class _Origin:
    """One reading of a layer's bias."""

    def __init__(self, layer: PostShift, total: Tensor) -> None:
        self.layer = layer
        self.total = total
        self.beta = layer.beta
        self.version = layer.beta._version

    def write(self) -> None:
        """Take over what `total` has become; where it is what it was, beta keeps its bits."""
        kind = type(self.layer).__name__
        if self.layer.beta is not self.beta or self.beta._version != self.version:
            raise RuntimeError(
                f"the bias of a {kind} was read, then beta changed, then the bias was "
                "written; read layer.bias again before writing"
            )
        with torch.no_grad():
            old, new = self.beta + self.layer.initial_alpha, self.total.detach()
            self.beta.copy_(torch.where(new == old, self.beta, new - self.layer.initial_alpha))
        self.layer.preserved = True
        self.version = self.beta._version

    def replace(self, value: Tensor) -> None:
        """`layer.bias.data = value`, which may have another shape, as after pruning channels."""
        value = _to_plain(value).detach()
        with torch.no_grad():
            beta = value - self.layer.initial_alpha
            if value.shape == self.beta.shape:
                beta = torch.where(value == self.beta + self.layer.initial_alpha, self.beta, beta)
        self.layer.beta.data = beta
        self.layer.preserved = True


def _getter(attribute: str) -> Any:
    return getattr(Tensor, attribute).__get__


def _setter(attribute: str) -> Any:
    return getattr(Tensor, attribute).__set__


def _to_plain(value: Any) -> Any:
    return value._plain if isinstance(value, Bias) else value


def _guarded(value: Any, origin: _Origin) -> Any:
    """A result that shares memory with the bias stays bound to it."""
    if isinstance(value, np.ndarray):
        if value.size and np.shares_memory(value, origin.total.detach().numpy()):
            value.setflags(write=False)
        return value
    if type(value) is not Tensor or value.device != origin.total.device:
        return value
    if value.layout != torch.strided:
        return value
    if value.untyped_storage().data_ptr() != origin.total.untyped_storage().data_ptr():
        return value
    bias = value.as_subclass(Bias)
    bias._plain, bias._origin = value, origin
    return bias


def _leaves(value: Any) -> list[Any]:
    leaves: list[Any] = []
    _map(value, leaves.append)
    return leaves


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested tuples, lists and dicts."""
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(item, function) for item in value)
    return function(value)
