"""Does the runs of an experiment that are left, and the pretraining of their backbones.

Every run has a folder ``OUT/EXPERIMENT/RUN``, every backbone ``OUT/backbones/RUN``. The folder is
all that there is to know of it: finished runs are skipped, killed ones go on from their last
checkpoint. The runs of a process follow one another in it, because importing mmdet and reading the
images would take a tenth of a run each time; a lock in each folder lets several processes work at
one experiment, each on what the others have not taken.
"""

from __future__ import annotations

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studies.cifar import data as cifar_data
from studies.cifar import rounds as cifar_rounds
from studies.runs import RunError, check_folders, check_settings, duration, folder_of, result_of

from . import data, training
from .experiments import Experiment, Run
from .settings import Settings

WAIT_SECONDS = 10.0
"""Before looking again, when all that is left is in the hands of other processes."""

Folder = str | os.PathLike[str]


def backbone_folder(name: str, out: Folder) -> Path:
    return Path(out, "backbones", name)


def annotations_of(experiment: Experiment, out: Folder) -> Path:
    """The COCO annotations that all results of an experiment are compared by."""
    return Path(out, experiment.name, "annotations.json")


def prepare(experiment: Experiment, out: Folder, data_root: Folder) -> str:
    """Check the data and that every folder is of this experiment's settings; make them.

    Returns:
        The fingerprint of the data.

    Raises:
        RunError: Nothing has been started then.
    """
    crc = data.fingerprint(data_root)
    try:
        for name, settings in experiment.backbones.items():
            check_settings(settings, backbone_folder(name, out))
        check_folders(experiment, out, crc, "the data")
        count = experiment.runs[0].settings.test_images
        data.write_test_annotations(data_root, annotations_of(experiment, out), count)
    except PermissionError as error:
        raise RunError(f"{error.filename}: no permission to write; name another --out") from None
    return crc


def plan(experiment: Experiment, out: Folder) -> str:
    """What is left to do, and how long it takes by the runs so far, in a line."""
    results = [result_of(experiment, run, out) for run in experiment.runs]
    left = results.count(None)
    backbones = [
        name
        for name in experiment.backbones
        if not (backbone_folder(name, out) / "result.json").exists()
    ]
    text = f"{experiment.name}: {len(results) - left} of {len(results)} runs finished"
    if backbones:
        text += f", {len(backbones)} backbones to pretrain"
    taken = [result["seconds"] for result in results if result]
    if left and taken:
        text += f"; about {duration(left * statistics.fmean(taken))} left"
        text += " and the backbones" if backbones else ""
    return text


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process is the one that may work in a folder."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def execute(
    experiment: Experiment,
    out: Folder,
    data_root: Folder,
    cifar_root: Folder,
    say: Callable[[str], None] = print,
) -> None:
    """Do the runs that are not finished, in order.

    Args:
        experiment: What to do.
        out: Where it is or will be.
        data_root: Where BCCD is.
        cifar_root: Where CIFAR-10 is; looked at when a backbone is to be pretrained.
        say: Gets a line at a time.

    Raises:
        RunError: The data or a folder cannot be used, or a run failed.
    """
    crc = prepare(experiment, out, data_root)
    say(plan(experiment, out))
    cache: dict[tuple[Any, ...], data.Images] = {}

    def images(parts: tuple[str, ...], size: tuple[int, int], count: int | None) -> data.Images:
        key = parts, size, count
        if key not in cache:
            cache[key] = data.load(data_root, parts, size, count)
        return cache[key]

    def do(run: Run) -> bool:
        """Whether it could be done now."""
        s, pretrained = run.settings, None
        if s.backbone:
            pretrained = _pretrain(experiment, s, out, cifar_root, say)
            if pretrained is None:
                return False
        folder = folder_of(experiment, run, out)
        with _lock(folder) as mine:
            if mine:
                training.train_run(
                    s,
                    folder,
                    images(data.TRAIN, s.size, s.train_images),
                    images(data.TEST, s.size, s.test_images),
                    annotations_of(experiment, out),
                    crc,
                    pretrained,
                )
        return mine

    while True:
        left = [run for run in experiment.runs if not result_of(experiment, run, out)]
        done = 0
        for run in left:
            if not result_of(experiment, run, out) and do(run):
                done += 1
                say(f"{time.strftime('%H:%M')}  {run.name}: done; {plan(experiment, out)}")
        if not left:
            return
        if not done:
            time.sleep(WAIT_SECONDS)


def _pretrain(
    experiment: Experiment,
    settings: Settings,
    out: Folder,
    cifar_root: Folder,
    say: Callable[[str], None],
) -> Path | None:
    """The checkpoint that a run starts from, pretrained if need be; None if another process is."""
    assert settings.backbone
    folder = backbone_folder(settings.backbone, out)
    checkpoint = folder / f"round_{settings.backbone_round}.pth"
    if not (folder / "result.json").exists():
        with _lock(folder) as mine:
            if not mine:
                return None
            say(f"{time.strftime('%H:%M')}  {settings.backbone}: pretraining on CIFAR-10")
            try:
                cifar_rounds.train_run(experiment.backbones[settings.backbone], folder, cifar_root)
            except cifar_data.DataError as error:
                message = str(error).replace("--data-root", "--cifar-root")
                raise RunError(message) from None
    return checkpoint
