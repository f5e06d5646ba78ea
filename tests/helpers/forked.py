"""The tools in processes of their own that a launcher seems to have started.

They are forked from the test's, so that they need not import everything again.
"""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

# What a training imports late: once here, and not in every process.
import matplotlib.pyplot  # noqa: F401
import mmcv.transforms  # noqa: F401
import torch
import torch._dynamo

from tests.helpers.paths import ROOT

LAUNCHERS = ("SLURM_", "OMPI_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


_started: list[mp.process.BaseProcess] = []


def kill_all():
    """End what a failed test has left running."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            process.kill()
            process.join()


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    text: str


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(processes, port=None):
    """The variables that torchrun sets, by rank."""
    common = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = port or free_port()
    return [{**common, "RANK": r, "LOCAL_RANK": r} for r in range(processes)]


def slurm(processes, job=7, **extra):
    """The variables that srun sets, by rank."""
    common = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_NTASKS": processes}
    common.update({"SLURM_NODELIST": "node[01-02]", "MASTER_ADDR": "127.0.0.1", **extra})
    return [{**common, "SLURM_PROCID": r, "SLURM_LOCALID": r} for r in range(processes)]


def _main(tool, arguments, environment, log, directory):
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    for name in [n for n in os.environ if n.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    warnings.resetwarnings()  # errors in pytest, but not in a user's process
    os.chdir(directory)
    spec = importlib.util.spec_from_file_location(tool, ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    sys.argv = [f"{tool}.py", *map(str, arguments)]
    spec.loader.exec_module(module)
    module.main()


class Process:
    """A started ``tools/TOOL.py ARGUMENTS``."""

    def __init__(self, tool, arguments, environment, log, directory=ROOT):
        self.log = Path(log)
        self.process = mp.get_context("fork").Process(
            target=_main, args=(tool, arguments, environment, log, directory)
        )
        self.process.start()
        _started.append(self.process)

    def end(self, seconds=120):
        """Wait for its end; killed, and a failure, where that takes too long."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"did not end: {self.log.read_text()}")
        return Ended(self.process.exitcode, self.log.read_text())


def train(config, work_dir, *arguments, processes=1, environments=None):
    """Train in processes that torchrun seems to have started, unless variables say otherwise.

    Args:
        config: A file.
        work_dir: One for all; or a list of folders, one for each rank, in which they run with the
            relative work dir ``w``, as on nodes that share no disk.
        arguments: Further ones of tools/train.py.
        processes: How many; one has no launcher.
        environments: Variables by rank, in place of torchrun's.

    Returns:
        How each of them ended.
    """
    unshared = isinstance(work_dir, list)
    launcher = ()
    if environments is not None:
        launcher = ("--launcher", "slurm" if "SLURM_PROCID" in environments[0] else "pytorch")
    elif processes > 1:
        launcher, environments = ("--launcher", "pytorch"), torchrun(processes)
    started = []
    for rank, environment in enumerate(environments or [{}]):
        folder = Path(work_dir[rank] if unshared else work_dir)
        folder.mkdir(exist_ok=True, parents=True)
        line = [config, "--work-dir", "w" if unshared else folder, *launcher, *arguments]
        log, directory = folder / f"rank{rank}.log", folder if unshared else ROOT
        started.append(Process("train", line, environment, log, directory))
    return [process.end() for process in started]
