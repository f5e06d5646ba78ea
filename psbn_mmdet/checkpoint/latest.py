"""The newest checkpoint of a work dir that was written to its end."""

import os
import re
import zipfile
from pathlib import Path


def is_whole(path: str | os.PathLike) -> bool:
    """Whether a file of ``torch.save`` was written to its end.

    It is a zip archive, whose directory comes last: a writer that was killed
    leaves a file without one.
    """
    return zipfile.is_zipfile(path)


def latest_whole(work_dir: str | os.PathLike) -> Path | None:
    """The newest ``epoch_N.pth`` or ``iter_N.pth`` of a work dir that is whole, if any.

    mmengine itself goes by the file ``last_checkpoint``, which a kill at the
    wrong moment leaves empty.
    """
    found = [p for p in Path(work_dir).glob("*.pth") if re.fullmatch(r"(epoch|iter)_\d+", p.stem)]
    newest_first = sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True)
    return next((p for p in newest_first if is_whole(p)), None)
