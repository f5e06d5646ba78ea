"""The checkpoint of a folder that a run goes on from: the newest of this run that is whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .read import is_whole, load
from .unwrap import CheckpointError


class Saved(NamedTuple):
    """A whole checkpoint, and what it says of itself."""

    path: Path
    meta: dict[str, Any]
    complete: bool  # has the state of the optimizer


def latest_whole(
    folder: str | os.PathLike[str],
    run: str | None = None,
    template: str | None = None,
    last: str | os.PathLike[str] | None = None,
) -> Saved | None:
    """The newest whole checkpoint of a run in a folder; None where there is none.

    The newest is that with the highest iteration, by what checkpoints say, whatever the files'
    times, which copies lose. One without the optimizer's state comes after all others.

    Args:
        folder: Where the checkpoints are; files of any name that end in ``.pth``.
        run: Only checkpoints that were saved by the run of this identity (``meta["run"]``). None
            where it is not known, as in the work dir of mmdet's own script: then ``last``
            decides, if it is whole.
        template: ``filename_tmpl`` of ``CheckpointHook``, for names that end otherwise.
        last: mmengine's file ``last_checkpoint``; a kill at the wrong moment leaves it empty.

    Raises:
        CheckpointError: ``run`` is None, and checkpoints of several runs are there, or some do
            not say at which iteration they were saved.
    """
    names = _names(Path(folder), template)
    if run is None and last is not None and (named := _named_by(last, names)):
        return _read(named)
    newest = [found for paths in _series(names) if (found := _first_whole(paths, run))]
    if len(newest) < 2:
        return newest[0] if newest else None
    if len({str(saved.meta.get("run")) for saved in newest}) > 1:
        raise CheckpointError(
            f"{folder}: holds checkpoints of several runs "
            f"({', '.join(s.path.name for s in newest)}); name the one to resume from"
        )
    return max(newest, key=lambda saved: (saved.complete, _iteration(saved), saved.path.name))


def _names(folder: Path, template: str | None) -> list[Path]:
    """The files in a folder that may be checkpoints to resume from, as no ``best_*`` is."""
    endings = {".pth", Path(template or "").suffix or ".pth"}
    folders = {folder, (folder / (template or "x")).parent}
    return [
        path
        for place in folders
        for path in place.glob("*")
        if path.suffix in endings and not path.name.startswith("best_")
    ]


def _series(paths: list[Path]) -> Iterator[list[Path]]:
    """The files whose names differ in their last number alone, the highest first."""
    series: dict[tuple[str, ...], list[tuple[int, Path]]] = {}
    for path in paths:
        named = re.fullmatch(r"(.*?)(\d+)(\D*)", path.name)
        key = (named[1], named[3]) if named else (path.name,)
        series.setdefault((str(path.parent), *key), []).append(
            (int(named[2]) if named else 0, path)
        )
    for numbered in series.values():
        yield [path for _, path in sorted(numbered, reverse=True)]


def _first_whole(paths: list[Path], run: str | None) -> Saved | None:
    for path in paths:
        if is_whole(path) and (saved := _read(path)) and (run is None or _of(saved, run)):
            return saved
    return None


def _of(saved: Saved, run: str) -> bool:
    return saved.meta.get("run") == run


def _named_by(last: str | os.PathLike[str], paths: list[Path]) -> Path | None:
    """The whole checkpoint that mmengine's file names, wherever the folder has been moved."""
    if not Path(last).is_file():
        return None
    name = Path(Path(last).read_text().strip()).name
    return next((path for path in paths if path.name == name and is_whole(path)), None)


def _read(path: Path) -> Saved:
    content = load(path, "meta")  # without the tensors
    content = content if isinstance(content, dict) else {}
    meta = content.get("meta")
    return Saved(path, meta if isinstance(meta, dict) else {}, "optimizer" in content)


def _iteration(saved: Saved) -> int:
    iteration = saved.meta.get("iter")
    if not isinstance(iteration, int):
        raise CheckpointError(
            f"{saved.path}: does not say at which iteration it was saved, so it may "
            "not be the newest; name the checkpoint to resume from"
        )
    return iteration
