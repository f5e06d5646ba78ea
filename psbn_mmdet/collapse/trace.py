r"""What the filters were and did over a training run, in one append-only file.

    header   b"psbn-trace 2 CRC\n", one line of JSON: threshold, inactive_below, version, layers
             [[the fields of TracedLayer], ...]; CRC is that line's crc32 in hexadecimal
    records  of one size each, :func:`record_type`: crc32 of all that follows, iteration, gamma and
             bias of all filters as float32, the L1 norms of the filters in front as float16, and
             what each filter did (:func:`.criteria.does`) as a byte

Records lie at known places, so that one that is damaged costs itself alone, and a file of any size
is read by mapping it into memory. A killed process leaves whole records and perhaps a piece of one,
which is not read and is overwritten by the run that goes on.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PsbnError
from .criteria import INACTIVE_BELOW, THRESHOLD
from .flops import Flops
from .layers import Layer
from .report import Report

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "collapse.trace"
MAGIC = b"psbn-trace 2 "


class TraceError(PsbnError, ValueError):
    """A trace file cannot be used; the message is one line that says why."""


class TracedLayer(NamedTuple):
    """A normalization layer of a trace; the fields are those of :class:`.layers.Layer`."""

    name: str
    filters: int
    conv: str | None = None
    followed_by: str = "unknown"
    alpha: float | None = None


def record_type(filters: int) -> np.dtype:
    """One moment of so many filters: 11 bytes a filter."""
    return np.dtype(
        [
            ("crc", "<u4"),
            ("iteration", "<i8"),
            ("gamma", "<f4", (filters,)),
            ("bias", "<f4", (filters,)),
            ("norm", "<f2", (filters,)),
            ("does", "u1", (filters,)),
        ]
    )


@dataclass(frozen=True)
class Trace:
    """A run: what :class:`Writer` wrote, or a series of checkpoints.

    Args:
        layers: In the order of their filters.
        iterations: (T,), ascending. For checkpoints 0, 1, ...
        gamma, bias: (T, F) float32, the filters of all layers concatenated.
        norm: (T, F) float16, L1 norms of the convolution's filters in front, NaN where there is
            none.
        does: (T, F) uint8, as :func:`.criteria.does` has it.
        threshold: Of ``|gamma|``.
        inactive_below: Of the activation probability.
        labels: Names of the T moments, if they are no iterations.
        flops: At the last moment, if they were counted.
        version: Of psbn_mmdet that wrote it.
    """

    layers: tuple[TracedLayer, ...]
    iterations: NDArray[np.int64]
    gamma: NDArray[np.float32]
    bias: NDArray[np.float32]
    norm: NDArray[np.float16]
    does: NDArray[np.uint8]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    labels: tuple[str, ...] | None = None
    flops: Flops | None = None
    version: str = ""

    def moment(self, index: int) -> str:
        """What to call one of the T moments."""
        i = int(self.iterations[index])
        return f"iteration {i}" if self.labels is None else self.labels[i]

    def report(self, index: int = -1) -> Report:
        """The report on one of the T moments."""
        sizes = [layer.filters for layer in self.layers]
        fields = (self.gamma, self.bias, self.norm, self.does)
        parts = [torch.from_numpy(np.array(field[index])).split(sizes) for field in fields]
        layers = [
            Layer(
                layer.name,
                gamma,
                bias,
                layer.conv,
                None if layer.conv is None else norm.float(),
                layer.followed_by,
                layer.alpha,
                does,
            )
            for layer, gamma, bias, norm, does in zip(self.layers, *parts, strict=True)
        ]
        last = index in (-1, len(self.iterations) - 1)
        return Report(
            tuple(layers), self.threshold, self.inactive_below, self.flops if last else None
        )


def layers_of(report: Report) -> tuple[TracedLayer, ...]:
    """The layers of a report without their values."""
    return tuple(
        TracedLayer(layer.name, layer.gamma.numel(), layer.conv, layer.followed_by, layer.alpha)
        for layer in report.layers
    )


def from_reports(reports: Sequence[Report], labels: Sequence[str]) -> Trace:
    """A series of checkpoints of one network as a trace.

    Raises:
        TraceError: They are of different networks.
    """
    from .. import __version__

    layers = layers_of(reports[0])
    for report, label in zip(reports, labels, strict=True):
        if not same_layers(layers_of(report), layers):
            raise TraceError(f"{label} has other layers than {labels[0]}: show them one by one")

    def stacked(values: Any, dtype: str) -> NDArray[Any]:
        rows = [torch.cat([values(layer) for layer in r.layers]).numpy() for r in reports]
        return np.stack(rows).astype(dtype)

    def norm(layer: Layer) -> Tensor:
        l1 = layer.filter_l1
        return torch.full_like(layer.gamma, torch.nan) if l1 is None else l1

    return Trace(
        layers,
        np.arange(len(reports)),
        stacked(lambda layer: layer.gamma, "<f4"),
        stacked(lambda layer: layer.bias, "<f4"),
        stacked(norm, "<f2"),
        stacked(lambda layer: layer.does, "u1"),
        reports[0].threshold,
        reports[0].inactive_below,
        tuple(labels),
        reports[-1].flops,
        __version__,
    )


def same_layers(a: Sequence[TracedLayer], b: Sequence[TracedLayer]) -> bool:
    """Whether names and sizes agree."""
    return [layer[:2] for layer in a] == [layer[:2] for layer in b]


class Writer:
    """Appends to a trace file of a work dir; that of a run that is resumed goes on.

    A run that starts gets a file of its own: ``collapse.trace``, or ``collapse-1.trace``, ... where
    there are others. A resumed run goes on in the newest, whose records after ``iteration`` are
    dropped, as the run has been put back to it, unless that file is of another network or another
    process still writes to it.

    Each record is on the disk when a call returns. A call that raises has left the file as it was,
    and the next one may succeed.

    Args:
        folder: The work dir.
        report: On the model: layers and thresholds.
        iteration: Iterations done.

    Raises:
        OSError: The file cannot be opened, as in a folder that is read-only.
    """

    def __init__(self, folder: str | os.PathLike[str], report: Report, iteration: int) -> None:
        from .. import __version__

        layers = layers_of(report)
        self._type = record_type(sum(layer.filters for layer in layers))
        self.recorded: set[int] = set()
        self._torn = False  # whether a piece of a record may stand behind the end
        head = {
            "threshold": report.threshold,
            "inactive_below": report.inactive_below,
            "version": __version__,
            "layers": layers,
        }
        line = json.dumps(head).encode()
        self._header = MAGIC + b"%08x\n" % zlib.crc32(line) + line + b"\n"
        files = files_of(folder)
        if iteration > 0 and files and self._goes_on(files[-1], head, iteration):
            return
        number = 1 + max((_number_of(path) for path in files), default=-1)
        name = f"-{number}.".join(FILE_NAME.split(".")) if number else FILE_NAME
        self.path = Path(folder, name)
        self._file: IO[bytes] = open(self.path, "x+b", buffering=0)  # noqa: SIM115
        _lock(self._file)
        self._end = 0

    def _goes_on(self, path: Path, head: dict[str, Any], iteration: int) -> bool:
        """Whether the run goes on in this file, which is then opened and put back to it."""
        try:
            old, start = _open(path)[:2]
        except TraceError:
            return False
        if any(old[k] != head[k] for k in ("threshold", "inactive_below")) or (
            not same_layers(old["layers"], head["layers"])
        ):
            return False
        file = open(path, "r+b", buffering=0)  # noqa: SIM115
        if not _lock(file):
            file.close()
            return False
        # Read through the file that holds the lock: closing any other descriptor of it, a mapped
        # one too, would give the lock up.
        file.seek(start)
        content = file.read()
        size = self._type.itemsize
        records = np.frombuffer(content[: len(content) // size * size], self._type)
        kept = [i for i, at in _whole(records) if at <= iteration]
        self.path, self._file = path, file
        self.recorded = {int(records["iteration"][i]) for i in kept}
        self._end = start + (1 + max(kept, default=-1)) * self._type.itemsize
        self._file.truncate(self._end)
        return True

    def write(
        self, iteration: int, gamma: Tensor, bias: Tensor, norm: Tensor, does: Tensor
    ) -> None:
        """Append a moment, (F,) each, unless there is a record of this iteration.

        Raises:
            OSError: The record cannot be written, as on a full disk.
            TraceError: Another process writes to the file, or it was removed.
        """
        if iteration in self.recorded:
            return
        record = np.zeros((), self._type)
        record["iteration"] = iteration
        for name, values in [("gamma", gamma), ("bias", bias), ("norm", norm), ("does", does)]:
            record[name] = values.numpy()
        record["crc"] = _crc(record)
        content = record.tobytes()
        if self._end == 0:
            content = self._header + content
        state = os.fstat(self._file.fileno())
        if (state.st_size != self._end and not self._torn) or not state.st_nlink:
            raise TraceError(
                f"{self.path}: was changed by something else; are two runs going on in one work "
                "dir?"
            )
        self._torn = True
        try:
            self._write_all(content)
        except OSError:
            with suppress(OSError):  # the next call tries it again
                self._file.truncate(self._end)
                self._torn = False
            raise
        self._torn = False
        self._end += len(content)
        self.recorded.add(iteration)

    def _write_all(self, content: bytes) -> None:
        self._file.seek(self._end)
        rest = memoryview(content)
        while rest:  # a disk that is nearly full takes a part, then raises
            written = self._file.write(rest)
            if not written:
                raise OSError(errno.EIO, "nothing was written", str(self.path))
            rest = rest[written:]
        # Some file systems, as NFS, say only here that the disk is full.
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lock(file: IO[bytes]) -> bool:
    """Keep other processes from going on in a file, where the file system has locks.

    The lock is the process's own: workers of a DataLoader that outlive it do not hold it.
    """
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no locks there; the size of the file still tells
            pass
    return True


def files_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The trace files of a work dir, in the order of their numbers: the newest is the last."""
    stem, suffix = FILE_NAME.split(".")
    found = [p for p in Path(folder).glob(f"{stem}*.{suffix}") if _number_of(p) >= 0]
    return sorted(found, key=_number_of)


def _number_of(path: Path) -> int:
    """collapse.trace: 0, collapse-3.trace: 3; -1 of other names."""
    number = path.stem.removeprefix(FILE_NAME.split(".")[0])
    if not number:
        return 0
    return int(number[1:]) if number[0] == "-" and number[1:].isdigit() else -1


def _crc(record: NDArray[Any]) -> int:
    return zlib.crc32(record.tobytes()[4:])


def _whole(records: NDArray[Any]) -> list[tuple[int, int]]:
    """(index, iteration) of the records that are not damaged, with ascending iterations."""
    found, last = [], -1
    for i, record in enumerate(records):
        at = int(record["iteration"])
        if at > last and int(record["crc"]) == _crc(record):
            found.append((i, at))
            last = at
    return found


def _open(path: Path) -> tuple[dict[str, Any], int, NDArray[Any]]:
    """The header, where it ends, and the records, mapped into memory.

    Raises:
        TraceError: The file is missing, empty or no trace.
    """
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    with open(path, "rb") as file:
        first, line = file.readline(100), file.readline()
        start, size = file.tell(), os.fstat(file.fileno()).st_size
    if not first:
        raise TraceError(f"{path}: is empty; the run has not recorded anything")
    if first.startswith(b"psbn-trace 1"):
        raise TraceError(f"{path}: was written by an earlier version of psbn_mmdet")
    if first != MAGIC + b"%08x\n" % zlib.crc32(line[:-1]) or not line.endswith(b"\n"):
        raise TraceError(f"{path}: is no trace file of psbn_mmdet, or its header is damaged")
    head = json.loads(line)
    head["layers"] = tuple(TracedLayer(*entry) for entry in head["layers"])
    kind = record_type(sum(layer.filters for layer in head["layers"]))
    n = (size - start) // kind.itemsize
    if n == 0:
        return head, start, np.zeros(0, kind)
    return head, start, np.memmap(path, kind, "r", start, (n,))


def read(path: str | os.PathLike[str]) -> Trace:
    """Read a run; damaged records and one that was cut off are left out.

    The arrays lie in the file, which is mapped into memory, not read.

    Args:
        path: A trace file, or a work dir, whose newest is read.

    Raises:
        TraceError: The file is missing, empty, no trace, or has no whole record.
    """
    path = Path(path)
    if path.is_dir():
        path = next(iter(files_of(path)[::-1]), path / FILE_NAME)
    head, _, records = _open(path)
    kept = [i for i, _ in _whole(records)]
    if not kept:
        raise TraceError(f"{path}: holds no whole record; the run has not recorded anything")
    if len(kept) < len(records):  # a copy, which is rare
        records = records[kept]
    return Trace(
        head["layers"],
        records["iteration"].astype(np.int64),
        records["gamma"],
        records["bias"],
        records["norm"],
        records["does"],
        head["threshold"],
        head["inactive_below"],
        version=head["version"],
    )
