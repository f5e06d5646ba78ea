r"""Gamma and bias of every filter over a training run, in one append-only file.

    header   b"psbn-trace 1\n", one line of JSON: threshold, inactive_below,
             layers [[the fields of TracedLayer], ...]
    records  struct "<4sBqII": b"REC\n", kind, iteration, length and crc32 of the
             payload that follows

A payload is zlib over the bytes, least significant first, of float32 values:
gamma of all layers concatenated, then bias. They are stored as XOR with the
record before (kind DELTA) or as they are (kind FULL); frozen layers then
cost nothing, and values come back exactly. Kind NORMS holds the L1 norms of the
convolution filters, NaN where there is none. Counts are not stored: they follow
from the values.

A record that cannot be written whole, because the disk is full, is taken back. A
killed process leaves a whole file or one that ends in the middle of a record, and
everything before it is kept. SQLite promises as much, but not in the work dirs
where runs end up: it needs working locks, which network file systems often lack,
and a journal beside the file, so that the trace of a killed run could not be read
without write access, nor copied while it grows.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import PsbnError
from ..python38 import zip_strict
from .criteria import INACTIVE_BELOW, THRESHOLD
from .layers import Layer, judged_as_relu
from .report import Report

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "collapse.trace"
MAGIC = b"psbn-trace 1\n"
_RECORD = struct.Struct("<4sBqII")
_MARK = b"REC\n"
_FULL, _DELTA, _NORMS = range(3)


class TraceError(PsbnError, ValueError):
    """A trace file cannot be used; the message is one line that says why."""


class TracedLayer(NamedTuple):
    """A normalization layer of a trace; the fields are those of :class:`.layers.Layer`."""

    name: str
    filters: int
    conv: str | None = None
    followed_by: str = "unknown"
    alpha: float | None = None


@dataclass(frozen=True)
class Trace:
    """A run: what :class:`Writer` wrote, or a series of checkpoints.

    Args:
        layers: In the order of their filters.
        iterations: (T,), ascending. For checkpoints 0, 1, ...
        gamma: (T, F) float32, the filters of all layers concatenated.
        bias: Likewise.
        norms: L1 norms of the convolution filters, iteration -> (F,), NaN where
            no convolution was found.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        labels: Names of the T moments, if they are no iterations.
    """

    layers: tuple[TracedLayer, ...]
    iterations: NDArray[np.int64]
    gamma: NDArray[np.float32]
    bias: NDArray[np.float32]
    norms: dict[int, NDArray[np.float32]]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    labels: tuple[str, ...] | None = None

    @property
    def relu(self) -> NDArray[np.bool_]:
        """(F,), whether a ReLU follows each filter; assumed where it is not known."""
        return np.repeat(
            [judged_as_relu(layer.followed_by) for layer in self.layers],
            [layer.filters for layer in self.layers],
        )

    def moment(self, index: int) -> str:
        """What to call one of the T moments."""
        i = int(self.iterations[index])
        return f"iteration {i}" if self.labels is None else self.labels[i]

    def report(self, index: int = -1) -> Report:
        """The report on one of the T moments; L1 norms are the last known by then."""
        gamma, bias = torch.tensor(self.gamma[index]), torch.tensor(self.bias[index])
        known = [i for i in self.norms if i <= self.iterations[index]]
        norms = torch.tensor(self.norms[max(known)]) if known else None
        layers, start = [], 0
        for name, filters, conv, followed_by, alpha in self.layers:
            part = slice(start, start + filters)
            l1 = norms[part] if norms is not None and conv is not None else None
            layers.append(Layer(name, gamma[part], bias[part], conv, l1, followed_by, alpha))
            start += filters
        return Report(tuple(layers), self.threshold, self.inactive_below)


def from_reports(reports: Sequence[Report], labels: Sequence[str]) -> Trace:
    """A series of checkpoints of one network as a trace.

    Raises:
        TraceError: They are of different networks.
    """
    layers = _layers_of(reports[0])
    for report, label in zip_strict(reports, labels):
        if [x[:2] for x in _layers_of(report)] != [x[:2] for x in layers]:
            raise TraceError(f"{label} has other layers than {labels[0]}: show them one by one")
    return Trace(
        layers,
        np.arange(len(reports)),
        np.stack([np.concatenate([layer.gamma.numpy() for layer in r.layers]) for r in reports]),
        np.stack([np.concatenate([layer.bias.numpy() for layer in r.layers]) for r in reports]),
        {i: norms_of(r) for i, r in enumerate(reports)},
        reports[0].threshold,
        reports[0].inactive_below,
        tuple(labels),
    )


def norms_of(report: Report) -> NDArray[np.float32]:
    """L1 norms of the convolution filters of a report, (F,), NaN where there is none."""
    parts = [
        torch.full_like(layer.gamma, torch.nan) if layer.filter_l1 is None else layer.filter_l1
        for layer in report.layers
    ]
    return torch.cat(parts).numpy()


def _layers_of(report: Report) -> tuple[TracedLayer, ...]:
    return tuple(
        TracedLayer(layer.name, layer.gamma.numel(), layer.conv, layer.followed_by, layer.alpha)
        for layer in report.layers
    )


class Writer:
    """Appends to the trace file of a run; continues that of a resumed run.

    Records after ``iteration`` are dropped, as the run has been put back to it.
    A file that does not belong to this run, because the run starts from scratch or
    has other layers, is moved aside to NAME-1.trace, NAME-2.trace, ...

    Each record is on the disk when a call returns. A call that raises has left the
    file as it was, and the next one may succeed.

    Args:
        path: The file.
        report: On the model at ``iteration``: layers and thresholds.
        iteration: Iterations done.

    Raises:
        OSError: The file cannot be opened, as in a folder that is read-only.
    """

    def __init__(self, path: str | os.PathLike, report: Report, iteration: int) -> None:
        self.path = Path(path)
        self.moved_to: Path | None = None
        self.recorded: set[tuple[str, int]] = set()
        head = {
            "threshold": report.threshold,
            "inactive_below": report.inactive_below,
            "layers": _layers_of(report),
        }
        self._header = MAGIC + json.dumps(head).encode() + b"\n"
        self._previous: NDArray[np.uint32] | None = None
        self._end = 0  # of the last whole record
        self._torn = False  # whether something may stand behind it
        content = self.path.read_bytes() if self.path.exists() else b""
        if content:
            old = _parse_header(content)
            if iteration > 0 and old and _same_run(old[0], head):
                self._end = self._end_of_records(content, old[1], iteration)
            else:
                self.moved_to = _free_name(self.path)
                self.path.rename(self.moved_to)
        # Without a buffer: what has been written survives the process.
        mode = "r+b" if self.path.exists() else "x+b"
        self._file = open(self.path, mode, buffering=0)  # noqa: SIM115
        self._file.truncate(self._end)

    def _end_of_records(self, content: bytes, start: int, iteration: int) -> int:
        for kind, at, _, end in _records(content, start):
            if at > iteration:
                return start
            self.recorded.add(("norms" if kind == _NORMS else "state", at))
            start = end
        return start

    def write(self, iteration: int, gamma: torch.Tensor, bias: torch.Tensor) -> None:
        """Append gamma and bias, (F,) each, unless there is a record of this iteration.

        Raises:
            OSError: The record cannot be written, as on a full disk.
            TraceError: Another process writes to the file, or it was removed.
        """
        if ("state", iteration) in self.recorded:
            return
        values = np.concatenate([gamma.numpy(), bias.numpy()]).astype("<f4").view("<u4")
        if self._previous is None:
            self._append(_FULL, iteration, values)
        else:
            self._append(_DELTA, iteration, values ^ self._previous)
        self._previous = values
        self.recorded.add(("state", iteration))

    def write_norms(self, iteration: int, report: Report) -> None:
        """Append the L1 norms of the filters, unless there is a record of this iteration.

        Raises:
            OSError, TraceError: As in :meth:`write`.
        """
        if ("norms", iteration) not in self.recorded:
            self._append(_NORMS, iteration, norms_of(report).astype("<f4").view("<u4"))
            self.recorded.add(("norms", iteration))

    def _append(self, kind: int, iteration: int, values: NDArray[np.uint32]) -> None:
        # Bytes of equal significance side by side: those of the exponents compress.
        planes = values.view(np.uint8).reshape(-1, 4).T.tobytes()
        payload = zlib.compress(planes, 1)
        head = _RECORD.pack(_MARK, kind, iteration, len(payload), zlib.crc32(payload))
        record = head + payload
        if self._end == 0:
            record = self._header + record
        with _locked(self._file):
            if self._torn:
                self._file.truncate(self._end)
                self._torn = False
            status = os.fstat(self._file.fileno())
            if status.st_size != self._end or status.st_nlink == 0:
                raise TraceError(
                    f"{self.path}: was changed or removed by another process; are two runs "
                    "going on in one work dir?"
                )
            self._torn = True
            try:
                self._write_all(record)
            except OSError:
                with suppress(OSError):  # the next call tries it again
                    self._file.truncate(self._end)
                    self._torn = False
                raise
            self._torn = False
        self._end += len(record)

    def _write_all(self, record: bytes) -> None:
        self._file.seek(self._end)
        rest = memoryview(record)
        while rest:  # a disk that is nearly full takes a part, then raises
            written = self._file.write(rest)
            if not written:
                raise OSError(errno.EIO, "nothing was written", str(self.path))
            rest = rest[written:]
        # Some file systems, as NFS, say only here that the disk is full.
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Keep other processes from appending meanwhile, where the file system has locks.

    Raises:
        TraceError: Another process is appending.
    """
    locked = False
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise TraceError(
                f"{file.name}: another process is writing to it; are two runs going on in one "
                "work dir?"
            ) from error
        except OSError:  # no locks there; the size of the file still tells
            pass
    try:
        yield
    finally:
        if locked:
            fcntl.flock(file, fcntl.LOCK_UN)


def _records(content: bytes, start: int) -> Iterator[tuple[int, int, bytes, int]]:
    """(kind, iteration, payload, end) of each whole record."""
    while len(content) - start >= _RECORD.size:
        mark, kind, iteration, length, crc = _RECORD.unpack_from(content, start)
        start += _RECORD.size
        payload = content[start : start + length]
        if mark != _MARK or zlib.crc32(payload) != crc:
            return
        start += length
        yield kind, iteration, payload, start


def _parse_header(content: bytes) -> tuple[dict[str, Any], int] | None:
    """The header and where it ends; None if there is no whole one."""
    end = content.find(b"\n", len(MAGIC))
    if not content.startswith(MAGIC) or end < 0:
        return None
    try:
        head = json.loads(content[len(MAGIC) : end])
        head["layers"] = tuple(TracedLayer(*entry) for entry in head["layers"])
    except (ValueError, TypeError, KeyError):
        return None
    return head, end + 1


def _same_run(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two headers agree in all that the records and their counts rest on."""
    return all(old.get(key) == new[key] for key in ("threshold", "inactive_below")) and (
        [layer[:2] for layer in old["layers"]] == [layer[:2] for layer in new["layers"]]
    )


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return name


def read(path: str | os.PathLike) -> Trace:
    """Read a run; a record that was cut off, and what follows it, is left out.

    Args:
        path: The trace file, or the work dir that it is in.

    Raises:
        TraceError: The file is missing, empty, no trace, or has no whole record.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    content = path.read_bytes()
    if not content:
        raise TraceError(f"{path}: is empty; the run has not recorded anything")
    header = _parse_header(content)
    if header is None:
        raise TraceError(f"{path}: is no trace file of psbn_mmdet")
    head, start = header
    iterations, states, norms, previous = [], [], {}, None
    for kind, iteration, payload, _ in _records(content, start):
        planes = np.frombuffer(zlib.decompress(payload), np.uint8).reshape(4, -1)
        values = np.ascontiguousarray(planes.T).view("<u4").ravel()
        if kind == _NORMS:
            norms[iteration] = values.view("<f4")
            continue
        previous = values if kind == _FULL else values ^ previous
        iterations.append(iteration)
        states.append(previous.view("<f4"))
    if not states:
        raise TraceError(f"{path}: holds no whole record; the run has not recorded anything")
    gamma, bias = np.split(np.stack(states), 2, axis=1)
    return Trace(
        head["layers"],
        np.array(iterations),
        gamma,
        bias,
        norms,
        head["threshold"],
        head["inactive_below"],
    )
