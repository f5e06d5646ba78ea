"""The pickles within checkpoints, read as data: nothing that a file names is looked up or called.

``torch.load(weights_only=True)`` calls what stands on an allow-list, with the file's arguments, and
sets the file's state on what came out. Whoever puts ``numpy.ndarray`` on that list hands a file the
means to read memory as objects of its choice. Here a name stays a name. A table
(:data:`_BUILDERS`) has a function of ours for each kind of value that checkpoints hold, which
looks at its arguments first and builds tensors, arrays of numbers and strings, and plain
containers.

What a file can make us allocate is bounded: its tensors and arrays by the bytes that it holds, all
else by about a hundred bytes for each byte of the pickle, which is what an empty ``dict`` takes.
It rests on :mod:`pickletools`, which takes opcodes apart, and on no private name of torch.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

MAX_DEPTH = 100
"""Containers nested deeper are refused: code that walks through them would not come back."""

_PLAIN = "(SHORT_)?(BIN)?(STRING|UNICODE|BYTES|INT|FLOAT)[128]?|LONG[14]?|BYTEARRAY8"
_VALUES = {opcode.name for opcode in pickletools.opcodes if re.fullmatch(_PLAIN, opcode.name)}
"""Opcodes whose argument is the value."""
_NEW: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_DTYPES = {
    str(dtype): dtype
    for name, dtype in vars(torch).items()
    if isinstance(dtype, torch.dtype) and re.fullmatch(r"bool|u?int\d+|(b?float|complex)\d.*", name)
}
_STORAGES = {
    **{f"torch.{kind}Storage": getattr(torch, name) for kind, name in
       dict(Float="float32", Double="float64", Half="float16", BFloat16="bfloat16", Long="int64",
            Int="int32", Short="int16", Char="int8", Byte="uint8", Bool="bool",
            ComplexFloat="complex64", ComplexDouble="complex128").items()},
    "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip
_RENAMED = {
    "__builtin__": "builtins",
    **{f"numpy.core.{module}": f"numpy._core.{module}" for module in ("multiarray", "numeric")},
}
_SCALARS = (str, int, float, bool, bytes, complex, type(None))


class Bytes(Protocol):
    """A file, or memory that is read as one."""

    def read(self, n: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class RefusedPickle(Exception):
    """A pickle holds something else than tensors and plain values; its text says what."""


class _Name:
    """What a pickle calls by its name: a class or a function. It stays one."""

    def __init__(self, name: str) -> None:
        self.name = name


def _named(name: str) -> Any:
    """What a name stands for: a dtype, a curve of mmengine's one-cycle schedule, or itself."""
    if re.fullmatch(r"mmengine.*\.OneCycleParamScheduler\._annealing_(cos|linear)", name):
        schedulers = import_module("mmengine.optim.scheduler.param_scheduler")
        return getattr(schedulers.OneCycleParamScheduler, name.rpartition(".")[2])
    return _DTYPES.get(name) or _Name(name)


class _Storage(NamedTuple):
    """What tensors are views of: its bytes, flat, and the type of its elements."""

    bytes: Tensor
    dtype: torch.dtype


class _Unbuilt:
    """A value of which the pickle has yet to give the state."""

    def __init__(self, kind: str, *args: Any) -> None:
        self.kind, self.args = kind, args
        self.value: Any = None


def unpickle(file: Bytes, size: int, storage: Callable[[str, int], Tensor]) -> Any:
    """The value of the pickle that begins where ``file`` stands; it is left at the pickle's end.

    Args:
        file: Read from where it stands.
        size: Bytes of the whole checkpoint. No tensor may have more elements, and no more bytes
            are copied than ten times as many; a log is, three times.
        storage: ``storage(key, n)`` gives the n bytes that stand in the checkpoint under a key, as
            a flat tensor of uint8; raises where there are not so many.

    Raises:
        RefusedPickle: It holds something else than tensors and plain values.
        Exception: It is damaged; of any kind.
    """
    machine = _Machine(size, storage)
    start = file.tell()
    value = machine.run(file)
    _require_plain(value, 10 * (file.tell() - start))
    return value


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, size: int, storage: Callable[[str, int], Tensor]) -> None:
        self._size, self._storage = size, storage
        self._room = 10 * size
        self._storages: dict[str, Tensor] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, file: Bytes) -> Any:
        for opcode, arg, _ in pickletools.genops(cast(IO[bytes], file)):
            if opcode.name in _VALUES:
                self._stack.append(arg)
            elif opcode.name in _NEW:
                self._stack.append(_NEW[opcode.name]())
            elif opcode.name in _TUPLES:
                items = [self._stack.pop() for _ in range(_TUPLES[opcode.name])]
                self._stack.append(tuple(reversed(items)))
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                step = getattr(self, f"_{opcode.name.lower()}", None)
                if step is None:
                    raise RefusedPickle(f"pickle's {opcode.name}")
                step(arg)
        return self._stack.pop()

    def copies(self, size: int) -> None:
        """Account for bytes that are copied out of the pickle, as often as it says."""
        self._room -= size
        if self._room < 0:
            raise RefusedPickle("more than its size allows")

    # -- the stack and the memo

    def _mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _pop_mark(self, _: None = None) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _pop(self, _: None) -> None:
        self._stack.pop()

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: None) -> None:
        self._put(len(self._memo))

    def _get(self, index: int) -> None:
        value = self._memo[index]
        built = isinstance(value, _Unbuilt) and value.value is not None
        self._stack.append(value.value if built else value)

    _binget = _long_binget = _get

    # -- containers

    def _tuple(self, _: None) -> None:
        items = tuple(self._pop_mark())
        self._stack.append(items)

    def _list(self, _: None) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def _append(self, _: None) -> None:
        item = self._stack.pop()
        _of(self._stack[-1], list).append(item)

    def _appends(self, _: None) -> None:
        items = self._pop_mark()
        _of(self._stack[-1], list).extend(items)

    def _additems(self, _: None) -> None:
        items = self._pop_mark()
        _of(self._stack[-1], set).update(map(_key, items))

    def _frozenset(self, _: None) -> None:
        items = frozenset(map(_key, self._pop_mark()))
        self._stack.append(items)

    def _dict(self, _: None) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set(items)

    def _setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = _of(self._stack[-1], dict, OrderedDict, Counter)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    # -- what is called by a name

    def _global(self, arg: str) -> None:
        self.copies(len(arg))
        module, _, name = arg.partition(" ")
        self._stack.append(_named(f"{_RENAMED.get(module, module)}.{name}"))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(f"{_of(module, str)} {_of(name, str)}")

    def _reduce(self, _: None) -> None:
        args, called = self._stack.pop(), self._stack.pop()
        self._stack.append(self.call(called, args))

    _newobj = _reduce

    def call(self, called: Any, args: Any) -> Any:
        if not isinstance(called, _Name):
            raise RefusedPickle(f"a call of {type(called).__name__}")
        if called.name not in _BUILDERS:
            raise RefusedPickle(called.name)
        return _BUILDERS[called.name](self, *_of(args, tuple))

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is OrderedDict:
            metadata = _of(state, dict).get("_metadata")  # torch's versions of modules
            if isinstance(metadata, dict):
                target._metadata = metadata  # type: ignore[attr-defined]
        elif isinstance(target, _Unbuilt) and target.value is None:
            target.value = self._stack[-1] = _STATES[target.kind](self, *target.args, state)
        else:
            raise RefusedPickle(f"a state of {type(target).__name__}")

    # -- storages of tensors

    def _binpersid(self, _: None) -> None:
        kind, dtype, key, _device, count, *view = _of(self._stack.pop(), tuple)
        if kind != "storage":
            raise RefusedPickle("a reference to something that is not a storage")
        if not isinstance(dtype, _Name) or dtype.name not in _STORAGES:
            raise RefusedPickle(getattr(dtype, "name", "an unknown storage"))
        if any(item is not None for item in view):
            raise RefusedPickle("a view of a storage, as torch < 0.4 wrote it")
        element = _STORAGES[dtype.name]
        size = _count(count) * element.itemsize
        if _of(key, str) not in self._storages:
            self._storages[key] = self._storage(key, size)
        if size != len(self._storages[key]):
            raise ValueError("a storage of two sizes")
        self._stack.append(_Storage(self._storages[key], element))

    def tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A view of a storage that lies within it."""
        content, dtype = _of(storage, _Storage).bytes, dtype or storage.dtype
        shape, steps = _shape(size), _shape(stride)
        room = len(content) // dtype.itemsize
        if 0 not in shape:
            reach = sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
            if _count(offset) + reach >= room or math.prod(shape) > self._size:
                raise ValueError("a tensor reaches beyond its storage")
        elif any(n > self._size for n in (*shape, *steps, _count(offset))):
            raise ValueError("an empty tensor of an absurd shape")
        return content[: room * dtype.itemsize].view(dtype).as_strided(shape, steps, offset)


def _of(value: Any, *kinds: type) -> Any:
    """A value of exactly one of some types."""
    if type(value) not in kinds:
        raise ValueError(f"found a {type(value).__name__} where a {kinds[0].__name__} was expected")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(
            f"found a {type(value).__name__} or a negative number where a size was expected"
        )
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if len(_of(value, tuple, list, torch.Size)) > 64:  # NumPy has as many dimensions
        raise ValueError("a shape of too many dimensions")
    return tuple(map(_count, value))


def _key(value: Any) -> Any:
    """What a dict or a set may hold as a key: Python hashes nested ones by recursion."""
    items = value if type(value) is tuple else (value,)
    if not all(type(item) in _SCALARS or isinstance(item, np.generic) for item in items):
        raise RefusedPickle(f"a key of type {type(value).__name__}")
    return value


def _require_plain(value: Any, room: int) -> None:
    """Refuse what is left of names, and containers that hold themselves or one another too often.

    Args:
        value: What was read.
        room: How many values there may be at most, one counted at each place where it stands.
    """
    todo = [(value, 0)]
    while todo:
        value, depth = todo.pop()
        if isinstance(value, (_Name, _Storage, _Unbuilt)):
            raise RefusedPickle(getattr(value, "name", type(value).__name__.strip("_").lower()))
        if isinstance(value, dict):
            inner = [*dict.values(value)]
            if type(value) is OrderedDict:
                inner.append(getattr(value, "_metadata", None))
        elif isinstance(value, (list, tuple)):
            inner = [*value]
        else:
            continue
        room -= len(inner)
        if depth >= MAX_DEPTH or room < 0:
            raise RefusedPickle("containers within containers without end")
        todo += [(item, depth + 1) for item in inner]


# -- what checkpoints hold, by name: a function of the machine and the pickle's arguments


def _plain_bytes(machine: _Machine, value: Any = b"", encoding: Any = "latin1") -> bytes:
    """Bytes, which protocol 2 writes as text."""
    if isinstance(value, str):
        if _of(encoding, str).replace("-", "") != "latin1":
            raise RefusedPickle(f"text in {encoding}")
        value = value.encode("latin-1")
    machine.copies(len(_of(value, bytes, bytearray)))
    return bytes(value)


def _tensor(
    machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any,
    requires_grad: Any = False, _hooks: Any = None, metadata: Any = None, dtype: Any = None,
) -> Tensor:  # fmt: skip
    if metadata:
        raise RefusedPickle("a tensor that is conjugate or negated in place")
    tensor = machine.tensor(storage, offset, size, stride, dtype)
    return tensor.requires_grad_() if requires_grad is True else tensor


def _tensor_v3(
    machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any,
    requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None,
) -> Tensor:  # fmt: skip
    dtype = _of(dtype, torch.dtype)
    return _tensor(machine, storage, offset, size, stride, requires_grad, hooks, metadata, dtype)


def _parameter(machine: _Machine, data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
    return nn.Parameter(_of(data, Tensor).detach(), requires_grad is True)


def _with_attributes(machine: _Machine, rebuild: Any, kind: Any, args: Any, _: Any) -> Tensor:
    """A tensor with attributes of Python, which are left out."""
    if _of(kind, _Name).name not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        raise RefusedPickle(kind.name)
    return machine.call(rebuild, args)


def _dtype(machine: _Machine, code: str, state: Any) -> np.dtype:
    """A type of numbers or strings, with the byte order of its state."""
    if not re.fullmatch(r"[?bhilqBHILQefdFD]|b1|[iufcSU][1-9]\d{0,8}", _of(code, str)):
        raise RefusedPickle(f"an array of {code}")
    _, order, *rest = _of(state, tuple)
    if order not in ("<", ">", "|", "=") or any(item is not None for item in rest[:3]):
        raise RefusedPickle(f"an array of {code}")
    return np.dtype(code).newbyteorder(order)


def _array(machine: _Machine, state: Any) -> np.ndarray:
    """An array of as many numbers or strings as the bytes that are given hold."""
    _, shape, dtype, by_columns, data = _of(state, tuple)
    if not isinstance(dtype, np.dtype):
        raise RefusedPickle("an array of objects")
    data = _plain_bytes(machine, data)
    shape = _shape(shape)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array of another size than its bytes")
    flat = np.frombuffer(bytearray(data), dtype) if data else np.empty(0, dtype)
    return flat.reshape(shape, order="F" if by_columns is True else "C")


def _scalar(machine: _Machine, dtype: Any, data: Any) -> Any:
    return _array(machine, (1, (1,), dtype, False, data))[0]


def _history(machine: _Machine, state: Any) -> Any:
    """A quantity's log by mmengine. Its methods are the class's own, whatever the file names."""
    log, counts = (_of(state[key], np.ndarray) for key in ("_log_history", "_count_history"))
    machine.copies(log.nbytes + counts.nbytes)
    buffer = import_module("mmengine.logging").HistoryBuffer
    return buffer(log, counts, _count(_of(state, dict)["max_length"]))


def _config_dict(machine: _Machine, content: Any) -> Any:
    config = import_module("mmengine.config").ConfigDict()
    machine.copies(len(_of(content, dict)))
    for key, value in content.items():  # its own way would copy what is within, again and again
        dict.__setitem__(config, key, value)
    return config


def _ordered_dict(machine: _Machine, items: Any = ()) -> OrderedDict[str, Any]:
    machine.copies(len(_of(items, tuple, list)))
    return OrderedDict((_key(key), value) for key, value in items)


def _counter(machine: _Machine, counts: Any = None) -> Counter[Any]:
    machine.copies(len(_of({} if counts is None else counts, dict)))
    return Counter(counts)


def _set_of(machine: _Machine, items: Any = ()) -> set[Any]:
    machine.copies(len(_of(items, list, tuple)))
    return {_key(item) for item in items}


def _attribute(machine: _Machine, owner: Any, name: Any) -> Any:
    """``getattr`` of a class, by which older protocols name its methods."""
    full = f"{_of(owner, _Name).name}.{_of(name, str)}"
    machine.copies(len(full))
    return _named(full)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": lambda machine, size: torch.Size(_shape(size)),
    "torch.device": lambda machine, kind, *index: torch.device(_of(kind, str), *map(_count, index)),
    "numpy.dtype": lambda machine, code, *_: _Unbuilt("dtype", code),
    "numpy._core.multiarray._reconstruct": lambda machine, *_: _Unbuilt("array"),
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.numeric._frombuffer": lambda machine, data, dtype, shape, order: _array(
        machine, (1, shape, dtype, order == "F", data)
    ),
    "mmengine.logging.history_buffer.HistoryBuffer": lambda machine, *_: _Unbuilt("history"),
    "mmengine.config.config.ConfigDict": _config_dict,
    "builtins.getattr": _attribute,
    "builtins.set": _set_of,
    "builtins.frozenset": lambda machine, *args: frozenset(_set_of(machine, *args)),
    "builtins.bytes": _plain_bytes,
    "builtins.bytearray": lambda machine, *args: bytearray(_plain_bytes(machine, *args)),
    "builtins.complex": lambda machine, a, b: complex(_of(a, float), _of(b, float)),
    "_codecs.encode": _plain_bytes,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
}
_STATES: dict[str, Callable[..., Any]] = {"dtype": _dtype, "array": _array, "history": _history}
