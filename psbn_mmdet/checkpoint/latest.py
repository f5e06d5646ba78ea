"""The newest checkpoint of a work dir that was written to its end."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .read import is_whole, meta_of
from .unwrap import CheckpointError


def latest_whole(work_dir: str | os.PathLike) -> Path | None:
    """The newest ``epoch_N.pth`` or ``iter_N.pth`` of a work dir that is whole, if any.

    The newest is that with the highest number, whatever the files' times, which copies lose. Where
    there are epochs and iterations, the iteration that each says it was saved at decides.

    mmengine itself goes by the file ``last_checkpoint``, which a kill at the wrong moment leaves
    empty.

    Raises:
        CheckpointError: There are epochs and iterations, and one does not say its iteration.
    """
    numbers: dict[str, dict[int, Path]] = {"epoch": {}, "iter": {}}
    for path in Path(work_dir).glob("*.pth"):
        if named := re.fullmatch(r"(epoch|iter)_(\d+)", path.stem):
            numbers[named[1]][int(named[2])] = path
    newest = [
        next((path for _, path in sorted(paths.items(), reverse=True) if is_whole(path)), None)
        for paths in numbers.values()
    ]
    candidates = [path for path in newest if path is not None]
    if len(candidates) > 1:
        return max(candidates, key=_iteration)
    return next(iter(candidates), None)


def _iteration(path: Path) -> int:
    """The iteration that a checkpoint of mmengine was saved at."""
    iteration = meta_of(path).get("iter")
    if not isinstance(iteration, int):
        raise CheckpointError(
            f"{path}: does not say at which iteration it was saved, so whether it is the newest "
            "is unknown; name the checkpoint to resume from"
        )
    return iteration
