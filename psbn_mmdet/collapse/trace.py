r"""Gamma and bias of every filter over a training run, in one append-only file.

    header   b"psbn-trace 1\n", one line of JSON: threshold, inactive_below,
             layers [[name, filters, convolution or null], ...]
    records  struct "<4sBqII": b"REC\n", kind, iteration, length and crc32 of the
             payload that follows

A payload is zlib over the bytes, least significant first, of float32 values:
gamma then bias, of all layers one behind the other. They are stored as XOR with
the record before (kind DELTA) or as they are (kind FULL); frozen layers then
cost nothing, and values come back exactly. Kind NORMS holds the L1 norms of the
convolution filters, NaN where there is none. Counts are not stored: they follow
from the values.

A record is written at once, so a killed process leaves a whole file or one that
ends in the middle of a record, and everything before it is kept.
"""

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .criteria import INACTIVE_BELOW, THRESHOLD
from .layers import Layer
from .report import Report

FILE_NAME = "collapse.trace"
MAGIC = b"psbn-trace 1\n"
_RECORD = struct.Struct("<4sBqII")
_MARK = b"REC\n"
_FULL, _DELTA, _NORMS = range(3)


class TraceError(ValueError):
    """A trace file cannot be used; the message is one line that says why."""


@dataclass(frozen=True)
class Trace:
    """A run: what :class:`Writer` wrote, or a series of checkpoints.

    Args:
        layers: (name, filters, convolution in front or None) each.
        iterations: (T,), ascending. For checkpoints 0, 1, ...
        gamma: (T, F) float32, the filters of all layers one behind the other.
        bias: Likewise.
        norms: L1 norms of the convolution filters, iteration -> (F,), NaN where
            no convolution was found.
        threshold: Of |gamma|.
        inactive_below: Of the activation probability.
        labels: Names of the T moments, if they are no iterations.
    """

    layers: tuple[tuple[str, int, str | None], ...]
    iterations: NDArray[np.int64]
    gamma: NDArray[np.float32]
    bias: NDArray[np.float32]
    norms: dict[int, NDArray[np.float32]]
    threshold: float = THRESHOLD
    inactive_below: float = INACTIVE_BELOW
    labels: tuple[str, ...] | None = None

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
        for name, filters, conv in self.layers:
            part = slice(start, start + filters)
            l1 = norms[part] if norms is not None and conv is not None else None
            layers.append(Layer(name, gamma[part], bias[part], conv, l1))
            start += filters
        return Report(tuple(layers), self.threshold, self.inactive_below)


def from_reports(reports: Sequence[Report], labels: Sequence[str]) -> Trace:
    """A series of checkpoints of one network as a trace.

    Raises:
        TraceError: They are of different networks.
    """
    layers = _layers_of(reports[0])
    for report, label in zip(reports, labels, strict=True):
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


def _layers_of(report: Report) -> tuple[tuple[str, int, str | None], ...]:
    return tuple((layer.name, layer.gamma.numel(), layer.conv) for layer in report.layers)


class Writer:
    """Appends to the trace file of a run; goes on with the one of a resumed run.

    Records after ``iteration`` are dropped, as the run has been put back to it.
    A file that does not belong to this run, because the run starts anew or has
    other layers, is moved aside to NAME-1.trace, NAME-2.trace, ...

    Args:
        path: The file.
        report: On the model at ``iteration``: layers and thresholds.
        iteration: Iterations done.
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
        header = MAGIC + json.dumps(head).encode() + b"\n"
        self._previous: NDArray[np.uint32] | None = None
        if self.path.exists() and self.path.stat().st_size:
            content = self.path.read_bytes()
            if iteration > 0 and content.startswith(header):
                self._open(self._end(content, len(header), iteration))
                return
            self.moved_to = _free_name(self.path)
            self.path.rename(self.moved_to)
        self.path.write_bytes(b"")
        self._open(0)
        self._file.write(header)

    def _open(self, end: int) -> None:
        # Without a buffer: what has been written survives the process.
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._file.truncate(end)
        self._file.seek(end)

    def _end(self, content: bytes, start: int, iteration: int) -> int:
        for kind, at, _, end in _records(content, start):
            if at > iteration:
                return start
            self.recorded.add(("norms" if kind == _NORMS else "state", at))
            start = end
        return start

    def write(self, iteration: int, gamma: torch.Tensor, bias: torch.Tensor) -> None:
        """Append gamma and bias, (F,) each, unless there is a record of this iteration."""
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
        """Append the L1 norms of the filters, unless there is a record of this iteration."""
        if ("norms", iteration) not in self.recorded:
            self._append(_NORMS, iteration, norms_of(report).astype("<f4").view("<u4"))
            self.recorded.add(("norms", iteration))

    def _append(self, kind: int, iteration: int, values: NDArray[np.uint32]) -> None:
        # Bytes of equal significance side by side: those of the exponents compress.
        planes = values.view(np.uint8).reshape(-1, 4).T.tobytes()
        payload = zlib.compress(planes, 1)
        head = _RECORD.pack(_MARK, kind, iteration, len(payload), zlib.crc32(payload))
        self._file.write(head + payload)

    def close(self) -> None:
        self._file.close()


def _records(content: bytes, start: int):
    """(kind, iteration, payload, end) of each whole record."""
    while len(content) - start >= _RECORD.size:
        mark, kind, iteration, length, crc = _RECORD.unpack_from(content, start)
        start += _RECORD.size
        payload = content[start : start + length]
        if mark != _MARK or zlib.crc32(payload) != crc:
            return
        start += length
        yield kind, iteration, payload, start


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
    end = content.find(b"\n", len(MAGIC))
    if not content.startswith(MAGIC) or end < 0:
        raise TraceError(f"{path}: is no trace file of psbn_mmdet")
    head = json.loads(content[len(MAGIC) : end])
    iterations, states, norms, previous = [], [], {}, None
    for kind, iteration, payload, _ in _records(content, end + 1):
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
        tuple((name, filters, conv) for name, filters, conv in head["layers"]),
        np.array(iterations),
        gamma,
        bias,
        norms,
        head["threshold"],
        head["inactive_below"],
    )
