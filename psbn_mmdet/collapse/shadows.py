"""The run behind :mod:`.wiring`: a shadow beside every tensor, and what each operation does to it.

While a network runs, a ``TorchDispatchMode`` sees every operation of torch's dispatcher. A shadow
holds, for each element of a tensor, the id of the *node* it belongs to; it is kept per storage, as
a memory checker does it, so that views need no rule and writes into views are seen.

The tables below say which operations move data, are pooling, and so on. Elementwise ones carry
torch's own tag ``pointwise``. What stands in no table is opaque: safe, and told by name.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


@dataclasses.dataclass
class Reader:
    """A convolution or linear layer as it ran: what arrives in its input channels.

    Args:
        name: Of the parameter that is its weight.
        start: Node of its first filter; ``filters`` follow each other.
        filters, inputs, groups: C_out, C_in and the number of groups.
        transposed: Whether it is a transposed convolution.
        pads: Whether it ever sees zeros beside its input.
        weight: The parameter.
    """

    name: str
    start: int
    filters: int
    inputs: int
    groups: int
    transposed: bool
    weight: Tensor = dataclasses.field(repr=False)
    pads: bool = False
    calls: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @cached_property
    def slots(self) -> np.ndarray:
        """(K, 2): (input channel, node) of all that arrives, over all calls, each pair once."""
        return np.unique(np.concatenate(self.calls), axis=0)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.inputs and self.groups > 1

    def carries(self) -> np.ndarray:
        """(C_out, C_in / groups) bool, whether a weight is not exactly 0."""
        weight = self.weight.detach()
        nonzero = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        if self.transposed:
            parts = nonzero.unflatten(0, (self.groups, -1)).transpose(1, 2)
            nonzero = parts.flatten(0, 1)
        return nonzero.cpu().numpy()


@dataclasses.dataclass
class Norm:
    """A BatchNorm or InstanceNorm as it ran.

    Args:
        name: Of its module.
        start: Node of its first channel; ``channels`` follow each other.
        slots: (K, 2), (channel, node) of all that arrives.
        tracked: Whether it ever normalized by its running statistics.
        statistics: Whether it ever normalized by statistics of its input.
    """

    name: str
    start: int
    channels: int
    tracked: bool = False
    statistics: bool = False
    calls: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)

    @property
    def module(self) -> str:
        return self.name

    @property
    def inputs(self) -> int:
        return self.channels

    @cached_property
    def slots(self) -> np.ndarray:
        return np.unique(np.concatenate(self.calls), axis=0)


@dataclasses.dataclass
class Block:
    """Nodes that came into being together.

    Args:
        kind: ``const``, ``param`` (elements of a vector among the parameters and buffers),
            ``whole`` (all of another parameter), ``data`` (made of no input), ``input``,
            ``opaque``, ``conv``, ``norm``, ``pointwise`` or ``pool``.
        name: Of the operation, or of the parameter.
        inputs: (size, arity) nodes, -1 for none; of convolutions and normalization layers none.
        module: In which it was made.
        survives: Of a pooled constant: ``always``, ``zero`` (only 0) or ``never``.
        firing: (size,), share of positions with a gradient; None if it is no rectifier.
    """

    kind: str
    name: str
    start: int
    size: int
    inputs: np.ndarray
    module: str = ""
    survives: str = "always"
    firing: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """Nodes that must stay.

    Args:
        nodes: All of them, as the operation got them (compacted), for a comparison of two runs.
        why: As "GroupNorm neck.gn reads it".
        read: Whether what they carry goes on from there; else only their number is fixed.
    """

    nodes: np.ndarray
    why: str
    read: bool = True


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dicts, dataclasses and mmengine's data elements."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif hasattr(value, "all_values"):  # of mmengine
        value = list(value.all_values())
    if isinstance(value, (tuple, list)):
        return [tensor for child in value for tensor in tensors_in(child)]
    return []


# Operations of torch.ops.aten, by name. Those in place are looked up without their underscore.
COMPARISONS = {"gt", "ge", "lt", "le"}
LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "lerp", "addcmul", "addcdiv"}
LEAKY = {"leaky_relu", "_prelu_kernel", "elu", "celu", "selu", "rrelu_with_noise"}
_ALSO_POINTWISE = {"hardswish", "_prelu_kernel", "rrelu_with_noise"}  # without the tag
_COPIES = {"clone", "_to_copy", "copy", "_reshape_copy", "contiguous"}
_SAME = {"_unsafe_view", "detach", "alias", "_reshape_alias"}  # views without the flag
_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
_NORMS |= {"_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}
_CONVOLUTIONS = {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"}
_PRODUCTS = {"addmm": ("mat1", "mat2", "self"), "mm": ("self", "mat2", "")}
_PRODUCTS["linear"] = ("input", "weight", "bias")
_MOVES = {"cat", "stack", "index", "index_select", "gather", "take", "masked_select", "flip"}
_MOVES |= {"roll", "rot90", "repeat", "repeat_interleave", "constant_pad_nd", "tril", "triu"}
_MOVES |= {f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)}
_MOVES |= {"pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"}
_MOVES |= {f"{e}upsample_nearest{x}{n}d" for n in (1, 2, 3) for e, x in (("", ""), ("_", "_exact"))}
_MOVES |= {"slice_scatter", "select_scatter", "diagonal_scatter", "index_put", "index_copy"}
_MOVES |= {"scatter", "masked_scatter", "im2col", "unsafe_split", "unsafe_split_with_sizes"}
_MOVES |= {"view_copy", "slice_copy", "permute_copy", "expand_copy", "unbind_copy", "split_copy"}
_INDICES = {"index", "indices", "mask", "repeats"}  # arguments that say where, not what
_POOLS = {f"{kind}_pool{n}d": n for kind in ("avg", "max") for n in (1, 2, 3)}
_POOLS.update({f"max_pool{n}d_with_indices": n for n in (2, 3)})
_POOLS.update({f"{p}adaptive_avg_pool{n}d": n for p in ("", "_") for n in (1, 2, 3)})
_POOLS.update({f"adaptive_max_pool{n}d": n for n in (2, 3)})
_POOLS.update({"upsample_linear1d": 1, "upsample_trilinear3d": 3})
_POOLS.update(
    {
        f"{p}{k}2d{a}": 2
        for p, a in (("", ""), ("_", "_aa"))
        for k in ("upsample_bilinear", "upsample_bicubic")
    }
)
_REDUCTIONS = {  # along dimensions -> which constants come out as they are
    **dict.fromkeys(["mean", "amax", "amin", "max", "min", "median"], "always"),
    **dict.fromkeys(["sum", "cumsum", "norm", "linalg_vector_norm", "var", "std"], "zero"),
    **dict.fromkeys(["var_mean", "std_mean", "_softmax", "_log_softmax", "logsumexp"], "never"),
    **dict.fromkeys(["argmax", "argmin", "prod", "any", "all"], "never"),
}
_ZEROS = {"zeros", "zeros_like", "new_zeros", "zero"}
_ONES = {"ones", "ones_like", "new_ones"}
_FULL = {"full", "full_like", "new_full", "fill", "scalar_tensor"}
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_DRAWN = {"normal", "uniform", "bernoulli", "random", "exponential", "rand_like", "randn_like"}
_MADE = _ZEROS | _ONES | _FULL | _EMPTY | {"empty_permuted", "randint_like"}

_UNSET = float("nan")
"""What memory is expected to hold that nobody has written."""


def plain(name: str) -> str:
    """The name of an operation without the underscore that says in place."""
    return name.rstrip("_")


@dataclasses.dataclass
class _Memory:
    """The shadow of a storage; ``expect``: what it holds if only its maker has written it."""

    ref: StorageWeakRef
    ids: Tensor
    itemsize: int
    expect: float | None = None


class _Op:
    """A call of an operation that is yet to run."""

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        schema = func._schema
        space, _, self.name = schema.name.partition("::")
        self.ours = space == "aten"
        self.plain = plain(self.name)
        self.given = dict(zip([a.name for a in schema.arguments], args))
        self.given.update(kwargs)
        self.tensors = tensors_in([args, kwargs])

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)

    @property
    def written(self) -> list[Tensor]:
        """The tensors that it changes in place."""
        arguments = self.func._schema.arguments
        names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        return tensors_in([self.given.get(name) for name in names])


class Tracer(TorchDispatchMode):
    """Takes down the nodes while it is entered and a network runs.

    Args:
        model: The network.
        constants, watch: As :func:`.wiring.trace` takes them.
    """

    def __init__(
        self, model: nn.Module, constants: Mapping[str, Tensor], watch: frozenset[int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.constants, self.watch = model, constants, watch
        self.blocks: list[Block] = []
        self.norms: dict[str, Norm] = {}
        self.readers: dict[str, Reader] = {}
        self.held: list[Held] = []
        self.edges: list[np.ndarray] = []
        self.computed: set[str] = set()
        self.size = 0
        self.value = np.zeros(1024)  # these grow together
        self.free = np.zeros(1024, dtype=bool)
        self.unsteady = np.zeros(1024, dtype=bool)
        self._single = np.zeros(1024, dtype=bool)  # a number that belongs to no channel
        self._compared = np.zeros(1024, dtype=bool)  # the result of a comparison
        self._memory: dict[int, _Memory] = {}
        self._consts: dict[float, int] = {}
        self._stack: list[tuple[str, nn.Module, list[Tensor]]] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._params: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not nn.parameter.is_lazy(tensor) and tensor.layout == torch.strided:
                self._params[_key(tensor)].append((name, tensor))
        self._calls = 0
        self.last = ""
        """The module that was entered last."""
        self.const(0.0)  # node 0: what padding writes

    # Nodes

    def block(
        self,
        kind: str,
        name: str,
        size: int = 1,
        inputs: Any = None,
        *,
        free: Any = False,
        value: Any = np.nan,
        **others: Any,
    ) -> int:
        """Make some nodes; the first of them."""
        start, end = self.size, self.size + size
        while end > len(self.value):
            for each in ("value", "free", "unsteady", "_single", "_compared"):
                array = getattr(self, each)
                setattr(self, each, np.concatenate([array, np.zeros_like(array)]))
        if inputs is None:
            inputs = np.empty((size, 0), dtype=np.int64)
        module = self._stack[-1][0] if self._stack else ""
        self.blocks.append(Block(kind, name, start, size, inputs, module=module, **others))
        self.value[start:end], self.free[start:end] = value, free
        self._single[start:end] = kind in ("const", "data") or (kind == "param" and size == 1)
        self._compared[start:end] = kind == "pointwise" and plain(name) in COMPARISONS
        self.size = end
        return start

    def const(self, value: float) -> int:
        if value not in self._consts:
            self._consts[value] = self.block("const", repr(value), free=True, value=value)
        return self._consts[value]

    def _join(self, a: np.ndarray, b: np.ndarray) -> None:
        """Two columns of nodes go or stay together, but for those that are no channels."""
        pairs = np.stack([a, b], 1).astype(np.int64)
        self.edges.append(pairs[(pairs >= 0).all(1) & ~self._single[pairs].any(1)])

    def _all_free(self, *shadows: Tensor) -> bool:
        return all(bool(self.free[_nodes(ids)].all()) for ids in shadows)

    def hold(self, shadows: list[Tensor], why: str) -> None:
        """What is in these shadows must stay."""
        if shadows:
            self.held.append(Held(np.concatenate([_nodes(ids) for ids in shadows]), why))

    def _hold_some(self, nodes: np.ndarray, why: str, read: bool = True) -> bool:
        """The same of those nodes that depend on the input; whether there are any."""
        nodes = np.unique(nodes)
        nodes = nodes[~self.free[nodes]]
        if len(nodes):
            self.held.append(Held(nodes, why, read))
        return len(nodes) > 0

    def _here(self) -> str:
        if not self._stack:
            return "code outside of the model"
        name, module, _ = self._stack[-1]
        return f"{type(module).__name__} {name}".rstrip()

    # Shadows

    def ids(self, tensor: Tensor) -> Tensor:
        """The shadow of a tensor, a view of its storage's."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return torch.full(tensor.shape, self.block("opaque", "layout"), dtype=torch.int32)
        memory = self._memory.get(_key(tensor))
        if memory is None or memory.itemsize != tensor.element_size():
            memory = self._adopt(tensor, memory)
        if memory.expect is not None:
            self._expect(tensor, memory)
        return memory.ids.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _new_memory(self, tensor: Tensor, fill: int, expect: float | None = None) -> _Memory:
        storage = tensor.untyped_storage()
        count = storage.nbytes() // max(tensor.element_size(), 1)
        ids = torch.full((count,), fill, dtype=torch.int32)
        memory = _Memory(StorageWeakRef(storage), ids, tensor.element_size(), expect)
        self._memory[storage._cdata] = memory
        return memory

    def _adopt(self, tensor: Tensor, other: _Memory | None) -> _Memory:
        """The shadow of memory that no seen operation has made, or of another view of its bytes."""
        if other is not None:
            held = self._hold_some(_nodes(other.ids), f"{self._here()} reads its bytes")
            return self._new_memory(tensor, self.block("opaque", "bytes", free=not held))
        if _key(tensor) in self._params:
            memory = self._new_memory(tensor, 0)
            for name, param in self._params[_key(tensor)]:
                at = memory.ids.as_strided(param.size(), param.stride(), param.storage_offset())
                size = param.numel()
                if size == max((*param.shape, 1)):  # a vector, or a number
                    value = param.detach().double().reshape(-1).cpu().numpy()
                    start = self.block("param", name, size, free=True, value=value)
                    at.copy_(torch.arange(start, start + size).view(param.shape))
                else:
                    at.fill_(self.block("whole", name, free=True))
                    self.computed.add(name)
            return memory
        if not tensor.is_floating_point():
            return self._new_memory(tensor, self.block("data", "given", free=True))
        return self._adopt_input(tensor)

    def _adopt_input(self, tensor: Tensor) -> _Memory:
        memory = self._new_memory(tensor, self.block("input", "input"))
        self._write_fresh(tensor, "input", "input")
        return memory

    def write(self, tensor: Tensor, ids: Tensor | int) -> None:
        """Note what an operation wrote."""
        memory = self._memory.get(_key(tensor))
        if memory is None or memory.itemsize != tensor.element_size():
            memory = self._new_memory(tensor, 0)
        memory.expect = None
        at = memory.ids.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        if isinstance(ids, int):
            at.fill_(ids)
        else:
            at.copy_(ids.expand(tensor.shape))
        self._watched(tensor)

    def _write_fresh(self, tensor: Tensor, kind: str, name: str) -> None:
        """Fresh nodes, one for each index of dimension 1; ``data`` is one."""
        size = tensor.shape[1] if tensor.dim() > 1 and kind != "data" else 1
        size = size if 0 < size <= 65536 else 1
        start = self.block(kind, name, size, free=kind == "data")
        ids = torch.arange(start, start + size, dtype=torch.int32)
        self.write(tensor, _along(ids, 1, tensor.dim()) if size > 1 else start)

    def _watched(self, tensor: Tensor) -> None:
        if self.watch and tensor.dim() > 1 and self.watch & {tensor.shape[1], tensor.shape[-1]}:
            self._hold_some(_nodes(self.ids(tensor)), "a layer that did not run may read it")

    def _expect(self, tensor: Tensor, memory: _Memory) -> None:
        """Memory is read although nothing was seen to write it: did somebody unseen?"""
        expected, memory.expect = memory.expect, None
        if expected == expected and torch.equal(tensor, torch.full_like(tensor, expected or 0.0)):
            memory.expect = expected
            return
        if self._stack and self._stack[-1][2]:
            read = [self.ids(t) for t in self._stack[-1][2]]
        else:
            read = [m.ids for m in self._memory.values() if not m.ref.expired()]
        nodes = np.unique(np.concatenate([_nodes(ids) for ids in read]))
        held = self._hold_some(nodes, f"an operator of {self._here()} reads it")
        memory.ids.fill_(self.block("opaque", "unseen", free=not held))
        self._write_fresh(tensor, "opaque" if held else "data", "unseen")

    # Modules

    def hook(self, stack: ExitStack) -> None:
        """Know in which module the network is, for names and for operators out of sight."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [t for t in tensors_in([args, kwargs]) if t.layout == torch.strided]
            if module is self.model:
                for tensor in given:
                    if _key(tensor) not in self._memory and _key(tensor) not in self._params:
                        self._adopt_input(tensor)
            self._stack.append((self._names[module], module, given))
            self.last = self._names[module]

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._stack and self._stack[-1][1] is module:
                for tensor in tensors_in(output):
                    self.ids(tensor)  # written by what was seen?
                self._stack.pop()

        for module in self._names:
            if not isinstance(module, torch.jit.ScriptModule):
                kwargs: Any = dict(with_kwargs=True)
                stack.callback(module.register_forward_pre_hook(before, **kwargs).remove)
                kwargs["always_call"] = True
                stack.callback(module.register_forward_hook(after, **kwargs).remove)

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        if self._calls % 256 == 0:
            for key in [k for k, m in self._memory.items() if m.ref.expired()]:
                del self._memory[key]
        if torch.is_inference_mode_enabled():  # composite operations arrive as one
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func.is_view:
            out = func(*args, **kwargs)
            for tensor in tensors_in(out) if self.watch else ():
                self._watched(tensor)
            return out
        op = _Op(func, args, kwargs)
        return self._rule(op)(op)

    def _rule(self, op: _Op) -> Any:
        name, short = op.name, op.plain
        if not op.ours or "out" in op.given:
            return self._opaque
        if name in ("lift_fresh", "lift"):
            return self._lifted
        if short in _COPIES or name in _SAME:
            return self._copied
        if short in _MADE or not op.tensors or (short in _DRAWN and name != short):
            return self._made
        if name in _NORMS:
            return self._norm
        if name in _CONVOLUTIONS:
            return self._convolution
        if name in _PRODUCTS:
            return self._product
        if short in _MOVES:
            return self._moved
        if name in _POOLS or name in _REDUCTIONS:
            return self._pooled
        if torch.Tag.pointwise in op.func.tags or short in _ALSO_POINTWISE:
            return self._pointwise
        return self._opaque

    def _lifted(self, op: _Op) -> Any:
        """Of a number or list in the code."""
        source = op.given["self"]
        if _key(source) not in self._memory:
            one = source.numel() == 1 and not source.is_complex()
            fill = self.const(float(source)) if one else self.block("data", "literal", free=True)
            self._new_memory(source, fill)
        return op.run()

    def _copied(self, op: _Op) -> Any:
        source = op.given["src"] if op.plain == "copy" else op.given["self"]
        ids = self.ids(source)
        if op.plain == "copy":
            ids = ids.clone()
        out = op.run()
        if op.plain == "copy" or _key(out) != _key(source):
            self.write(out, ids.reshape(out.shape) if op.plain == "_reshape_copy" else ids)
        return out

    def _made(self, op: _Op) -> Any:
        value: Any = None
        if op.plain in _ZEROS | _ONES:
            value = float(op.plain in _ONES)
        elif op.plain in _FULL:
            value = op.given.get("fill_value", op.given.get("value", op.given.get("s")))
        ids: Any = None
        if isinstance(value, Tensor):
            ids = self.ids(value).clone()
        elif isinstance(value, (bool, int, float)):
            ids = self.const(float(value))
        out = op.run()
        for tensor in tensors_in(out):
            whole = op.name == op.plain
            if whole and (op.plain in _EMPTY or isinstance(ids, int)):
                expect = _UNSET if op.plain in _EMPTY else float(value)
                self._new_memory(tensor, ids or 0, expect)
            elif ids is not None:
                self.write(tensor, ids)
            else:
                self.write(tensor, self.block("data", op.name, free=True))
        return out

    def _opaque(self, op: _Op) -> Any:
        shadows = [_compact(self.ids(t)) for t in op.tensors]
        known = {_key(t) for t in op.tensors if t.layout == torch.strided}
        return self._finish_opaque(op, shadows, op.run(), known)

    def _finish_opaque(
        self, op: _Op, shadows: list[Tensor], out: Any, known: set[int] | None = None
    ) -> Any:
        """What arrived is held, and what came out is new."""
        free = self._all_free(*shadows)
        if not free:
            self.hold(shadows, f"{self._here()} reads it ({op.name})")
        changed = {id(t): t for t in op.written}
        for tensor in tensors_in(out):
            if tensor.layout == torch.strided and _key(tensor) not in (known or ()):
                changed[id(tensor)] = tensor
        for tensor in changed.values():
            self._write_fresh(tensor, "data" if free else "opaque", op.name)
        return out

    def _pointwise(self, op: _Op) -> Any:
        operands = [v for v in op.given.values() if isinstance(v, Tensor)]
        if len(op.tensors) != len(operands):
            return self._opaque(op)
        shadows = [self.ids(t) for t in operands]
        passes = self._passes(op, operands, shadows)
        compact = [_compact(s) for s in shadows]
        out = op.run()
        if not isinstance(out, Tensor):
            return self._finish_opaque(op, compact, out)
        dims = out.dim()
        rows, first, inverse, shape = _combinations(compact, dims)
        value = np.full(len(rows), np.nan)
        if out.numel() and not out.is_complex():
            value = _samples(out, shape, first)
        firing: Any = None
        if passes is not None and out.numel():
            share: Any = passes.expand(out.shape).double()
            along = [d for d in range(dims) if shape[d] == 1 and out.shape[d] > 1]
            share = (share.mean(along) if along else share).reshape(-1).cpu().numpy()
            count = np.bincount(inverse, minlength=len(rows))
            firing = np.bincount(inverse, share, minlength=len(rows)) / count
        start = self.block(
            "pointwise",
            op.name,
            len(rows),
            rows,
            free=self.free[rows].all(1),
            value=value,
            firing=firing,
        )
        new = np.arange(start, start + len(rows))
        for tensor, column in zip(operands, rows.T, strict=True):
            if _broadcast(tensor, shape):
                self._hold_some(column, f"{self._here()} spreads it over several channels")
                continue
            self._join(column, new)
            padding = self._single[column]
            if padding.any() and not padding.all():
                others = np.setdiff1d(rows[padding], rows[~padding])
                why = f"{self._here()} adds it to padding, of which the code fixes the width"
                self._hold_some(others, why, read=False)
        self.write(out, torch.from_numpy(inverse.astype(np.int32) + start).view(shape))
        return out

    def _passes(self, op: _Op, operands: list[Tensor], shadows: list[Tensor]) -> Tensor | None:
        """Where a rectifier lets a gradient through; None if it is none."""
        x, given = operands[0], op.given
        if op.plain in ("maximum", "minimum", "where", "mul"):
            free = [self._all_free(ids) for ids in shadows]
            if op.plain == "where":
                if len(free) == 3 and free[1] != free[2] and self._compares(shadows[0]):
                    return x if free[2] else ~x
            elif len(free) == 2 and op.plain == "mul":
                for mask in (1, 0):
                    if not any(free) and self._compares(shadows[mask]):
                        return operands[mask] != 0
            elif len(free) == 2 and free[0] != free[1]:
                kept, other = operands if free[1] else operands[::-1]
                return kept > other if op.plain == "maximum" else kept < other
            return None
        low, high = None, None
        if op.plain == "relu":
            low = 0
        elif op.plain == "hardtanh":
            low, high = given.get("min_val", -1), given.get("max_val", 1)
        elif op.plain in ("clamp", "clamp_min", "clamp_max") and len(operands) == 1:
            low, high = given.get("min"), given.get("max")
        elif op.plain == "threshold":
            low = given["threshold"]
        elif op.plain == "hardswish":
            low = -3
        elif op.plain == "hardsigmoid":
            low, high = -3, 3
        else:
            return None
        passes = torch.ones_like(x, dtype=torch.bool) if low is None else x > low
        return passes if high is None else passes & (x < high)

    def _compares(self, ids: Tensor) -> bool:
        return ids.numel() > 0 and bool(self._compared[int(ids.reshape(-1)[0])])

    def _moved(self, op: _Op) -> Any:
        indices = tensors_in([v for k, v in op.given.items() if k in _INDICES])
        if (
            op.given.get("accumulate")
            or op.given.get("reduce")
            or not self._all_free(*(self.ids(t) for t in indices))
        ):
            return self._opaque(op)

        def shadow(key: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.cpu() if key in _INDICES else self.ids(value).double()
            if isinstance(value, (list, tuple)) and tensors_in(value):
                return [v if v is None else shadow(key, v) for v in value]
            if key == "value" and isinstance(value, (bool, int, float)):
                return self.const(float(value))
            return value

        names = [a.name for a in op.func._schema.arguments]
        moved = op.func(
            *(shadow(k, v) for k, v in zip(names, op.args)),
            **{k: shadow(k, v) for k, v in op.kwargs.items()},
        )
        out = op.run()
        for tensor, ids in zip(tensors_in(out), tensors_in(moved), strict=True):
            self.write(tensor, ids.to(torch.int32))
        return out

    def _pooled(self, op: _Op) -> Any:
        """Several positions of a channel into one value; several channels are another matter."""
        x, given = op.given.get("self", op.given.get("input")), op.given
        if len(op.tensors) != 1 or not isinstance(x, Tensor):
            return self._opaque(op)
        survives = _REDUCTIONS.get(op.name, "always")
        if op.name in _POOLS:
            dims = list(range(x.dim() - _POOLS[op.name], x.dim()))
            padded = given.get("count_include_pad", True) and any(np.ravel(given.get("padding", 0)))
            if op.name.startswith("avg_pool") and (padded or given.get("divisor_override")):
                survives = "zero"
        else:
            along = given.get("dim")
            along = [along] if isinstance(along, int) else along or range(x.dim())
            dims = [d % x.dim() for d in along] if x.dim() else []
        compact = _compact(self.ids(x))
        merged = [compact]
        if any(compact.shape[d] > 1 for d in dims):
            # One channel with constants beside it, as padding brings them, is a channel too.
            const = torch.from_numpy(self.free[: self.size].copy())[compact.long()]
            live = torch.where(const, -1, compact).amax(dims, keepdim=True)
            least = torch.where(const, self.size, compact).amin(dims, keepdim=True)
            if bool(((live >= 0) & (least != live)).any()):
                return self._opaque(op)
            low = torch.where(const, compact, self.size).amin(dims, keepdim=True)
            high = torch.where(const, compact, -1).amax(dims, keepdim=True)
            merged = [live, torch.where(low == self.size, -1, low), high]
        rows, first, inverse, shape = _combinations(merged, x.dim())
        free = np.where(rows >= 0, self.free[rows], True).all(1)
        out = op.run()
        for number, tensor in enumerate(tensors_in(out)):
            if tensor.numel() == 0:
                continue
            sample = tensor
            for dim in sorted(dims) if tensor.dim() < x.dim() else ():
                sample = sample.unsqueeze(dim)
            start = self.block(
                "pool",
                op.name,
                len(rows),
                rows,
                free=free,
                value=_samples(sample, shape, first),
                survives=survives if number == 0 else "never",
            )
            for column in rows.T:
                self._join(column, np.arange(start, start + len(rows)))
            ids = torch.from_numpy(inverse.astype(np.int32) + start).view(shape)
            self.write(tensor, ids if tensor.dim() == x.dim() else ids.squeeze(dims))
        return out

    def _norm(self, op: _Op) -> Any:
        x = op.given["input"]
        channels = x.shape[1]
        columns = [
            np.full(channels, -1) if p is None else self.ids(p).reshape(-1).numpy().astype(int)
            for p in map(op.given.get, ("weight", "bias", "running_mean", "running_var"))
        ]
        own = columns[0] if columns[0][0] >= 0 else columns[2]
        block = self.blocks[self._block_number(int(own.min()))] if own[0] >= 0 else None
        if block is None or block.kind != "param" or own.max() >= block.start + block.size:
            return self._opaque(op)  # parameters that are computed, or none
        ids = _compact(self.ids(x).transpose(0, 1), keep=1)
        out = op.run()
        main, layer, position = tensors_in(out)[0], block.name.rpartition(".")[0], own - block.start
        if (given := self.constants.get(layer)) is not None:
            fixed = _along(given[torch.from_numpy(position)].to(main), 1, main.dim())
            main.copy_(torch.where(fixed.isnan(), main, fixed))
        found = self.norms.get(layer)
        new = found is None
        if found is None:
            table = np.full((block.size, 4), -1, dtype=np.int64)
            table[position] = np.stack(columns, 1)
            start = self.block("norm", layer, block.size, table)
            found = self.norms[layer] = Norm(layer, start, block.size)
        own_statistics = bool(op.given.get("training", False))
        found.statistics |= own_statistics
        found.tracked |= not own_statistics
        nodes = found.start + position
        self._sample(main, 1, nodes, new)
        pairs = _pairs(ids)
        pairs[:, 0] = position[pairs[:, 0]]
        found.calls.append(np.unique(pairs, axis=0))
        for column in columns:
            self._join(column, nodes)
        shadow = torch.from_numpy(nodes.astype(np.int32))
        self.write(main, _along(shadow, 1, main.dim()))
        for tensor in tensors_in(out)[1:]:
            if tensor.numel() == channels:
                self.write(tensor, shadow)
        return out

    def _block_number(self, node: int) -> int:
        starts = [block.start for block in self.blocks]
        return int(np.searchsorted(starts, node, side="right")) - 1

    def _sample(self, out: Tensor, dim: int, nodes: np.ndarray, new: bool) -> None:
        """Note a number of each channel; channels that differ from call to call are unsteady."""
        if not out.numel():
            return
        flat = out.transpose(0, dim).reshape(len(nodes), -1)[:, 0].double().cpu().numpy()
        if new:
            self.value[nodes] = flat
        else:
            old = self.value[nodes]
            differ = np.abs(old - flat) > 1e-6 * np.maximum(np.abs(old), np.abs(flat))
            self.unsteady[nodes] |= differ

    def _parameter(self, weight: Tensor, transposed: bool) -> tuple[str, Tensor] | None:
        """The parameter that a weight is, or whose transpose it is."""
        for name, param in self._params.get(_key(weight), ()):
            seen = param.t() if transposed and param.dim() == 2 else param
            where = seen.shape, seen.stride(), seen.storage_offset()
            if where == (weight.shape, weight.stride(), weight.storage_offset()):
                return name, param
        return None

    def _convolution(self, op: _Op) -> Any:
        given = op.given
        found = self._parameter(given["weight"], False)
        if found is None:
            return self._opaque(op)
        transposed = bool(given.get("transposed", False))
        pads = bool(any(np.ravel(given.get("padding", 0)))) and not transposed
        x: Any = given.get("input", given.get("self"))
        return self._read(op, found, x, 1, given.get("groups", 1), transposed, pads)

    def _product(self, op: _Op) -> Any:
        x: Any
        weight: Any
        x, weight, bias = [op.given.get(key) for key in _PRODUCTS[op.name]]
        found = self._parameter(weight, op.name != "linear")
        scaled = op.given.get("beta", 1) != 1 or op.given.get("alpha", 1) != 1
        if found is None or found[1].dim() != 2 or scaled:
            return self._opaque(op)
        op.given["bias"] = bias
        return self._read(op, found, x, x.dim() - 1, 1, False, False)

    def _read(
        self,
        op: _Op,
        parameter: tuple[str, Tensor],
        x: Tensor,
        dim: int,
        groups: int,
        transposed: bool,
        pads: bool,
    ) -> Any:
        """A convolution or matrix product, with channels along a dimension."""
        name, weight = parameter
        filters = weight.shape[1] * groups if transposed else weight.shape[0]
        ids = _compact(self.ids(x).transpose(0, dim), keep=1)
        bias = op.given.get("bias")
        biases = None if bias is None else self.ids(bias).reshape(-1).numpy()
        out = op.run()
        reader = self.readers.get(name)
        new = reader is None
        if reader is None:
            start = self.block("conv", name, filters)
            reader = Reader(name, start, filters, x.shape[dim], groups, transposed, weight)
            self.readers[name] = reader
        reader.pads |= pads
        reader.calls.append(np.unique(_pairs(ids), axis=0))
        nodes = np.arange(reader.start, reader.start + filters)
        out_dim = out.dim() - 1 if dim == x.dim() - 1 and weight.dim() == 2 else 1
        self._sample(out, out_dim, nodes, new)
        if biases is not None and len(biases) == filters:
            self._join(biases, nodes)
        self.write(out, _along(torch.from_numpy(nodes.astype(np.int32)), out_dim, out.dim()))
        return out


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _compact(ids: Tensor, keep: int = 0) -> Tensor:
    """Dimensions along which all is the same, but the first ``keep``, narrowed to one."""
    for dim in range(ids.dim() - 1, keep - 1, -1):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0 or torch.equal(first.expand_as(ids), ids):
                ids = first
    return ids


def _nodes(ids: Tensor) -> np.ndarray:
    """The nodes of a shadow in order, repetitions along whole dimensions left out."""
    return _compact(ids).reshape(-1).numpy().astype(np.int64)


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    """A vector as a tensor of so many dimensions that runs along one of them."""
    return values.view([-1 if d == dim else 1 for d in range(max(dims, 1))])


def _pairs(ids: Tensor) -> np.ndarray:
    """(K, 2): (index along dimension 0, node)."""
    index = _along(torch.arange(len(ids)), 0, ids.dim()).expand(ids.shape)
    return np.stack([index.reshape(-1).numpy(), ids.reshape(-1).numpy().astype(np.int64)], 1)


def _combinations(
    shadows: list[Tensor], dims: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Size]:
    """Distinct rows of broadcast shadows.

    Returns:
        (k, arity) rows; (k,) an index of each; (numel,) the row of each element; the shape.
    """
    shadows = [s.reshape((1,) * (dims - s.dim()) + tuple(s.shape)) for s in shadows]
    shape = torch.broadcast_shapes(*(s.shape for s in shadows))
    arrays = [s.expand(shape).reshape(-1).numpy().astype(np.int64) for s in shadows]
    _, first, inverse = np.unique(arrays[0], return_index=True, return_inverse=True)
    for array in arrays[1:]:
        _, other = np.unique(array, return_inverse=True)
        key = inverse * (int(other.max(initial=0)) + 1) + other
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return np.stack([a[first] for a in arrays], 1), first, inverse.reshape(-1), shape


def _samples(tensor: Tensor, shape: torch.Size, first: np.ndarray) -> np.ndarray:
    """The numbers at some indices of a tensor narrowed to a shape; NaN if it has another one."""
    for dim in range(tensor.dim()):
        if shape[dim] == 1 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    if tensor.shape != shape:
        return np.full(len(first), np.nan)
    taken = tensor.reshape(-1)[torch.from_numpy(first).to(tensor.device)]
    return taken.double().cpu().numpy()


def _broadcast(tensor: Tensor, shape: torch.Size) -> bool:
    """Whether an operand is spread along a dimension along which the result's nodes differ."""
    more = len(shape) - tensor.dim()
    sizes, strides = (1,) * more + tuple(tensor.shape), (0,) * more + tuple(tensor.stride())
    return any(
        of > 1 and (size == 1 or stride == 0)
        for of, size, stride in zip(shape, sizes, strides, strict=True)
    )
