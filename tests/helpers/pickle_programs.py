"""Random pickles of the names that checkpoints may hold, to see that none does harm.

    nice python -m tests.helpers.pickle_programs 1000000

Each is a program for pickle's machine: values, calls of allowed names with arguments that fit and
that do not, states set on what fits and what does not, values from the memo, and now and then a
byte that was changed. They are read in this process, whose memory is limited; what was read is
looked at to its last element.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import struct
import sys
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import torch

from psbn_mmdet.checkpoint.pickles import _BUILDERS, _DTYPES, _STORAGES, RefusedPickle, unpickle
from psbn_mmdet.checkpoint.unwrap import CheckpointError, state_dict_of

MEMORY = 512 << 20
"""How much the process may take beyond what it has when it starts, in bytes."""

_OTHERS = ["numpy.ndarray", "builtins.eval", "os.system", "torch.Tensor", "builtins.object"]
_NAMES = [*_BUILDERS, *_STORAGES, *_DTYPES, *_OTHERS,
          "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler"]  # fmt: skip
_NUMBERS = [0, 1, 2, 3, 8, 64, 65, 255, 256, 1000, -1, -8, 2**31 - 1, 2**31, 2**32, 2**62, 2**63,
            -(2**63), 2**64, 10**12]  # fmt: skip
_TEXTS = ["", "a", "b", "latin1", "latin-1", "utf-8", "rot13", "<", ">", "|", "f8", "i4", "U2",
          "O", "O8", "V8", "b1", "?", "M8", "U100000000", "storage", "0", "1", "cpu", "cuda",
          "meta", "_metadata", "_log_history", "_count_history", "max_length", "statistics_methods",
          "__class__", "__dict__", "_annealing_cos", "min", "x" * 300, "\0" * 8]  # fmt: skip
_CONSTANTS = [b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"]


class TooMuchMemory(Exception):
    """A pickle took more than a small multiple of its size."""


class _Writer:
    """Writes one program; it keeps count of the memo."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.memo = rng, 0

    def number(self, n: int | None = None) -> bytes:
        n = self.rng.choice(_NUMBERS) if n is None else n
        if 0 <= n < 256:
            return b"K" + bytes([n])
        data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def text(self, text: str | None = None) -> bytes:
        data = (self.rng.choice(_TEXTS) if text is None else text).encode("utf-8")
        return b"X" + struct.pack("<I", len(data)) + data

    def data(self, n: int) -> bytes:
        return b"B" + struct.pack("<I", n) + self.rng.randbytes(n)

    def name(self, name: str | None = None) -> bytes:
        module, _, last = (name or self.rng.choice(_NAMES)).rpartition(".")
        if self.rng.random() < 0.1:
            return self.text(module) + self.text(last) + b"\x93"
        return f"c{module}\n{last}\n".encode()

    def tuple(self, *items: bytes) -> bytes:
        return b"(" + b"".join(items) + b"t"

    def call(self, name: str, *args: bytes, state: bytes = b"") -> bytes:
        new = self.rng.choice([b"R", b"R", b"R", b"\x81"])
        return self.name(name) + self.tuple(*args) + new + self.put() + (state and state + b"b")

    def put(self) -> bytes:
        if self.rng.random() < 0.5:
            self.memo += 1
            return b"q" + bytes([(self.memo - 1) % 256])
        return b""

    def get(self) -> bytes:
        if not self.memo:
            return b"N"
        return b"h" + bytes([self.rng.randrange(self.memo) % 256])

    def or_any(self, fitting: bytes, depth: int) -> bytes:
        """An argument that fits, or, now and then, whatever."""
        return fitting if self.rng.random() < 0.93 else self.value(depth + 1)

    def dtype(self, depth: int) -> bytes:
        code = self.rng.choice(["f8", "f4", "i8", "i4", "b1", "U2", "S3", "c8", "O8", "V8"])
        nothing = [self.or_any(b"N", depth) for _ in range(3)]
        state = self.tuple(self.number(3), self.text(self.rng.choice("<>|")), *nothing,
                           self.number(), self.number(), self.number(0))  # fmt: skip
        args = (self.or_any(self.text(code), depth), b"\x89", b"\x88")
        return self.call("numpy.dtype", *args, state=self.or_any(state, depth))

    def array(self, depth: int) -> bytes:
        shape = [self.rng.randrange(4) for _ in range(self.rng.randrange(3))]
        size = int(np.prod(shape)) * self.rng.choice([8, 8, 4, 1])
        state = self.tuple(
            self.number(1), self.or_any(self.tuple(*map(self.number, shape)), depth),
            self.or_any(self.dtype(depth), depth), self.rng.choice([b"\x88", b"\x89"]),
            self.or_any(self.data(size), depth),
        )  # fmt: skip
        args = (self.name("numpy.ndarray"), self.tuple(self.number(0)), self.data(1))
        built = self.or_any(state, depth)
        return self.call("numpy.core.multiarray._reconstruct", *args, state=built)

    def tensor(self, depth: int) -> bytes:
        storage = self.tuple(
            self.text("storage"), self.name(self.rng.choice([*_STORAGES])),
            self.text(self.rng.choice("012")), self.text("cpu"),
            self.number(self.rng.choice([0, 1, 4, 16, self.rng.choice(_NUMBERS)])),
            *self.rng.choice([[], [], [self.tuple(self.text("0"), self.number(), self.number())]]),
        ) + b"Q"  # fmt: skip
        shape = [self.rng.choice([0, 1, 2, 4, self.rng.choice(_NUMBERS)]) for _ in range(2)]
        steps = [self.rng.choice([0, 1, 2, self.rng.choice(_NUMBERS)]) for _ in range(2)]
        args = [self.or_any(storage, depth), self.number(self.rng.choice([0, 0, 1, *_NUMBERS])),
                self.or_any(self.tuple(*map(self.number, shape)), depth),
                self.or_any(self.tuple(*map(self.number, steps)), depth)]  # fmt: skip
        rest = [self.rng.choice([b"\x88", b"\x89"]), self.or_any(b"}", depth)]
        kind = self.rng.choice(["_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"])
        if kind == "_rebuild_tensor_v3":
            rest.append(self.name(self.rng.choice([*_DTYPES])))
        return self.call(f"torch._utils.{kind}", *args, *(rest if kind[-1] != "r" else []))

    def history(self, depth: int) -> bytes:
        state = b"}(" + self.text("max_length") + self.number(1000)
        for key in ("_log_history", "_count_history"):
            state += self.text(key) + self.or_any(self.array(depth), depth)
        return self.call("mmengine.logging.history_buffer.HistoryBuffer", state=state + b"u")

    def anything(self, depth: int) -> bytes:
        """A call of an allowed name with whatever arguments, and a state."""
        args = [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        state = self.value(depth + 1) if self.rng.random() < 0.3 else b""
        return self.call(self.rng.choice(_NAMES), *args, state=state)

    def container(self, depth: int) -> bytes:
        items = [self.value(depth + 1) for _ in range(self.rng.randrange(4))]
        kind = self.rng.randrange(5)
        if kind == 0:
            return b"](" + b"".join(items) + b"e"
        if kind == 1:
            pairs = b"".join(self.or_any(self.text(), depth) + item for item in items)
            ordered = self.name("collections.OrderedDict") + b")R"
            built = b"}" + self.text("_metadata") + self.value(depth + 1) + b"sb"
            start, end = self.rng.choice([(b"}", b""), (ordered, b""), (ordered, built)])
            return start + self.put() + b"(" + pairs + b"u" + end
        if kind == 2:
            return b"\x8f(" + b"".join(self.or_any(self.text(), depth) for _ in items) + b"\x90"
        if kind == 3:  # of which each holds the one before, twice
            inner = b"]q\xff" + b"".join(
                b"](h\xffh\xffeq\xff0" for _ in range(self.rng.randrange(60))
            )
            return inner.replace(b"]q\xff", b"]q\xff0", 1) + b"h\xff"
        return self.tuple(*items)

    def value(self, depth: int = 0) -> bytes:
        if depth > 5 or self.rng.random() < 0.25:
            simple = [self.number, self.text, self.get, self.name, lambda: self.data(8)]
            if self.rng.random() < 0.3:
                return self.rng.choice(_CONSTANTS)
            return self.rng.choice(simple)()
        made = [self.tensor, self.tensor, self.array, self.history, self.dtype, self.anything,
                self.anything, self.container, self.container]  # fmt: skip
        return self.rng.choice(made)(depth) + self.put()


def program(seed: int) -> bytes:
    """A random pickle; the same one for the same seed."""
    rng = random.Random(seed)
    code = bytearray(b"\x80\x02" + _Writer(rng).value() + b".")
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            code[rng.randrange(len(code))] = rng.randrange(256)
    return bytes(code)


def read(code: bytes) -> object:
    """As a checkpoint of these bytes is read, whose storages are its last bytes."""
    size = max(len(code), 64)

    def storage(key: str, n: int) -> torch.Tensor:
        if n > size:
            raise ValueError
        return torch.full((n,), 1, dtype=torch.uint8)

    return unpickle(io.BytesIO(code), size, storage)


def touch(value: object) -> None:
    """Read every element of what was read."""
    if isinstance(value, torch.Tensor):
        value.detach().clone()
        repr(value.shape)
    elif isinstance(value, (np.ndarray, np.generic)):
        value.tobytes(), np.array(value).copy()
    elif isinstance(value, dict):
        for item in dict.values(value):
            touch(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            touch(item)
    elif hasattr(value, "_log_history"):
        touch([value._log_history, value._count_history])  # type: ignore[attr-defined]
    else:
        repr(value)


def try_all(seeds: range, measure_every: int = 50) -> Counter:
    """How the programs of some seeds ended, by kind of exception.

    Raises:
        TooMuchMemory: For its size.
        MemoryError, RecursionError: As Python raises them.
    """
    ends: Counter = Counter()
    for seed in seeds:
        code = program(seed)
        measured = seed % measure_every == 0
        if measured:
            tracemalloc.start()
        try:
            value = read(code)
            if measured:
                _, peak = tracemalloc.get_traced_memory()
                if peak > 200 * len(code) + 100_000:
                    raise TooMuchMemory(seed, peak, len(code))
            touch(value)
            with contextlib.suppress(CheckpointError):
                state_dict_of({"state_dict": value})
            ends["read"] += 1
        except RefusedPickle:
            ends["refused"] += 1
        except (MemoryError, RecursionError, TooMuchMemory):
            print(f"seed {seed}", flush=True)
            raise
        except Exception as error:  # damaged, of any kind
            ends[type(error).__name__] += 1
        finally:
            if measured:
                tracemalloc.stop()
    return ends


def limit_memory() -> None:
    """From here on the process cannot take more than :data:`MEMORY` beyond what it has."""
    with open("/proc/self/statm") as file:
        have = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, have + MEMORY))


def main() -> None:
    first, count = (int(sys.argv[2]) if len(sys.argv) > 2 else 0), int(sys.argv[1])
    warnings.simplefilter("ignore")
    try_all(range(200))  # imports what is imported on use
    limit_memory()
    ends = try_all(range(first, first + count))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{count} pickles in {os.getpid()}, at most {peak} MiB: {dict(ends.most_common())}")


if __name__ == "__main__":
    main()
