"""Checkpoints that must run nothing, crash nothing and take no memory."""

import codecs
import os

import numpy as np
import torch


class Call:
    """Pickled, it is a call of ``called``; with a state that is set on what comes out."""

    def __init__(self, called, *args, state=None):
        self.reduced = (called, args) if state is None else (called, args, state)

    def __reduce__(self):
        return self.reduced


class Malicious:
    """Unpickled the careless way, it makes a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


_reconstruct = np.array(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]


def _array(shape, dtype, data):
    return Call(_reconstruct, np.ndarray, (0,), b"b", state=(1, shape, dtype, False, data))


def _dtype(code, order="<", *rest):
    return Call(
        np.dtype, code, False, True, state=(3, order, *(rest or (None, None, None)), 8, 8, 0)
    )


def _aliased(times):
    """Lists that hold the one before twice: 2 ** times values in a few bytes."""
    value = [0]
    for _ in range(times):
        value = [value, value]
    return value


def _nested(depth):
    value = ()
    for _ in range(depth):
        value = (value,)
    return value


def _holds_itself():
    value = []
    value.append(value)
    return value


def _reaches_beyond(**kwargs):
    storage = torch.zeros(4).storage()
    given = {"offset": 0, "size": (4,), "stride": (1,), **kwargs}
    return Call(torch._utils._rebuild_tensor_v2, storage, *given.values(), False, {})


BIG = "x" * 100_000

EVIL = {
    # memory as objects: the pointer is the file's
    "array over bytes": lambda: Call(np.ndarray, (1,), "O", bytearray(b"A" * 8)),
    "set of such": lambda: Call(set, (Call(np.ndarray, (1,), "O", bytearray(b"A" * 8)),)),
    "array of objects": lambda: _array((1,), _dtype("O8", "|"), b"A" * 8),
    "array of lists": lambda: _array((1,), _dtype("O8", "|"), [1]),
    "scalar of objects": lambda: Call(_scalar, _dtype("O8", "|"), b"A" * 8),
    "fields": lambda: _dtype("V8", "|", None, ("a",), {"a": (np.dtype("O"), 0)}),
    "fields of numbers": lambda: _dtype("f8", "<", None, ("a",), {"a": (np.dtype("O"), 0)}),
    "subarray": lambda: _dtype("f8", "<", (np.dtype("O"), (1,)), None, None),
    "state of a class": lambda: Call(set, state={"__class__": dict}),
    "state of a dtype twice": lambda: Call(_dtype, "f8"),
    # more than the bytes that are there
    "array too long": lambda: _array((1000,), _dtype("f8"), b"A" * 8),
    "array too short": lambda: _array((0,), _dtype("f8"), b"A" * 8),
    "negative": lambda: _array((-1,), _dtype("f8"), b"A" * 8),
    "wide text": lambda: _array((1,), _dtype("U100000000"), b"A" * 8),
    "tensor too long": lambda: _reaches_beyond(size=(5,)),
    "tensor from behind": lambda: _reaches_beyond(offset=1),
    "tensor strides out": lambda: _reaches_beyond(stride=(2,)),
    "negative stride": lambda: _reaches_beyond(offset=3, stride=(-1,)),
    "overflow": lambda: _reaches_beyond(size=(2**32, 2**32), stride=(2**32, 2**32)),
    "spread out": lambda: _reaches_beyond(size=(10**9,), stride=(0,)),
    "many dimensions": lambda: _reaches_beyond(size=(1,) * 10_000, stride=(1,) * 10_000),
    "bytearray of a size": lambda: Call(bytearray, 10**12),
    "bytes of a size": lambda: Call(bytes, 10**12),
    "zeros": lambda: Call(torch.empty, 10**12),
    "meta": lambda: Call(
        torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (9,), (1,), False
    ),
    # little that says much
    "copies": lambda: [Call(codecs.encode, BIG, "latin1") for _ in range(10_000)],
    "long names": lambda: Call(getattr, Call(getattr, set, BIG), BIG),
    "aliased": lambda: _aliased(40),
    "holds itself": _holds_itself,
    "nested": lambda: {_nested(300): 1},
    "key of a key": lambda: {((1,),): 1},
    # functions
    "getattr": lambda: Call(getattr, os.system, "__call__"),
    "import": lambda: Call(__import__, "os"),
    "eval": lambda: Call(eval, "1"),
    "codec": lambda: Call(codecs.encode, "a", "rot13"),
    "class": lambda: os.system,
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(2).to_sparse(),
}
"""What a checkpoint can hold that must be refused, each made when it is asked for."""
