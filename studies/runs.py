"""What the studies share: runs in folders of their own, their settings and results.

A run is the folder ``OUT/EXPERIMENT/RUN`` with ``settings.json``, and ``result.json`` when it is
finished.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from psbn_mmdet.errors import PsbnError


class RunError(PsbnError, ValueError):
    """A run cannot be done; the message is one line that says why and what to do."""


class Run(Protocol):
    """``arm`` is what seeds are averaged over; ``settings`` are a dataclass of plain values."""

    @property
    def name(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def settings(self) -> Any: ...


AnyRun = TypeVar("AnyRun", bound=Run)
AnyRun_co = TypeVar("AnyRun_co", bound=Run, covariant=True)


class Experiment(Protocol[AnyRun_co]):
    """Runs under a name."""

    @property
    def name(self) -> str: ...
    @property
    def runs(self) -> Sequence[AnyRun_co]: ...


# ---------------------------------------------------------------- folders


def folder_of(experiment: Experiment[Any], run: Run, out: str | os.PathLike[str]) -> Path:
    return Path(out, experiment.name, run.name)


def result_of(
    experiment: Experiment[Any], run: Run, out: str | os.PathLike[str]
) -> dict[str, Any] | None:
    """The content of a finished run's ``result.json``."""
    path = folder_of(experiment, run, out) / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_json(path: Path, content: Any) -> None:
    """Written beside and renamed: never half a file."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
    os.replace(new, path)


def with_defaults(stored: dict[str, Any], kind: type) -> dict[str, Any]:
    """Settings as they were stored, with those that came later at their defaults.

    A setting that is added later has a default that does what was done before.

    Args:
        stored: The content of a ``settings.json``.
        kind: The dataclass of the settings.
    """
    defaults = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    return {**defaults, **stored}


def check_settings(settings: Any, folder: Path) -> None:
    """Write ``settings.json``, or refuse a folder that holds another run.

    Args:
        settings: A dataclass of plain values.
        folder: Of the run; made if need be.

    Raises:
        RunError: It was made with other settings.
    """
    path, wanted = folder / "settings.json", asdict(settings)
    if path.exists():
        found = with_defaults(json.loads(path.read_text()), type(settings))
        differing = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        if differing:
            k = differing[0]
            raise RunError(
                f"{folder}: holds a run with other settings ({len(differing)} differ, as {k}: "
                f"{found.get(k)} there, {wanted.get(k)} now); name another --out"
            )
        return
    if any((folder / name).exists() for name in ("result.json", "last.pth", "round_1.pth")):
        raise RunError(f"{folder}: holds a run but no settings.json; name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def check_folders(
    experiment: Experiment[Any], out: str | os.PathLike[str], crc: str, data: str
) -> None:
    """Check that every folder is of this experiment's settings and data; make them.

    Args:
        experiment: What is to be done.
        out: Where.
        crc: Fingerprint of the data, as results have it under ``data_crc32``.
        data: What the data is called, for the message.

    Raises:
        RunError: One is of others.
    """
    for run in experiment.runs:
        folder = folder_of(experiment, run, out)
        check_settings(run.settings, folder)
        result = result_of(experiment, run, out)
        if result and result["data_crc32"] != crc:
            raise RunError(
                f"{folder}: was trained on another copy of {data} (CRC-32 "
                f"{result['data_crc32']}, here {crc}); name another --out"
            )


# ---------------------------------------------------------------- results


def finished(
    experiment: Experiment[AnyRun], out: str | os.PathLike[str]
) -> list[tuple[AnyRun, dict[str, Any]]]:
    """Runs that are done, with their results.

    Raises:
        RunError: A result is of other settings.
    """
    outcomes = []
    for run in experiment.runs:
        result = result_of(experiment, run, out)
        if result is None:
            continue
        if with_defaults(result["settings"], type(run.settings)) != asdict(run.settings):
            raise RunError(
                f"{folder_of(experiment, run, out)}: holds a result of other settings; "
                "name another --out"
            )
        outcomes.append((run, result))
    return outcomes


def by_arm(
    outcomes: Iterable[tuple[AnyRun, dict[str, Any]]],
) -> dict[str, list[tuple[AnyRun, dict[str, Any]]]]:
    arms: dict[str, list[tuple[AnyRun, dict[str, Any]]]] = {}
    for run, result in outcomes:
        arms.setdefault(run.arm, []).append((run, result))
    return arms


def spread(values: Iterable[float]) -> dict[str, Any]:
    """``mean``, sample standard deviation ``std`` (None for one value), the values themselves."""
    values = [float(v) for v in values]
    std = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


Values = dict[int, float]
"""Seed -> value."""


def by_seed(seeds: Iterable[int], measure: dict[str, Any]) -> Values:
    """The values of a :func:`spread`, each under its seed."""
    return dict(zip(seeds, measure["values"], strict=True))


def minus(a: Values, b: Values | float) -> Values:
    """Seed by seed, where both have the seed."""
    if isinstance(b, dict):
        return {seed: a[seed] - b[seed] for seed in a if seed in b}
    return {seed: value - b for seed, value in a.items()}


def interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval of the mean; None for fewer than two values."""
    from scipy.special import stdtrit

    values = list(values)
    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + level) / 2) * statistics.stdev(values)
    half /= math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def with_interval(mean: float, found: Iterable[float] | None) -> str:
    """A mean and, in brackets, its :func:`interval`, for a table."""
    between = "one seed" if found is None else " to ".join(map(_signed, found))
    return f"{_signed(mean)} ({between})"


def _signed(value: float) -> str:
    digits = 1 if abs(value) >= 10 else 3 if 0 < abs(value) < 0.1 else 2
    return f"{value:+.{digits}f}"


def paired(a: Values, b: Values) -> str:
    """What ``a`` is more than ``b`` by, with its interval over the seeds that both have."""
    values = minus(a, b).values()
    return with_interval(statistics.fmean(values), interval(values)) if values else "-"


def duration(seconds: float) -> str:
    """'40 s', '12 min', '3 h 05 min', '2 days 4 h'."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} days {hours % 24} h"


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
