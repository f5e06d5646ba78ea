"""Run a function of a test module in several gloo processes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, function: Callable, size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    try:
        torch.save(function(rank, *args), os.path.join(folder, f"{rank}.pt"))
    except Exception:
        traceback.print_exc()
        raise
    # Not by destroying the group: in torch 2.1 that holds the interpreter's lock while it waits for
    # gloo's threads, of which one may wait for the lock to free a tensor.
    sys.stdout.flush()
    os._exit(0)


def run(
    function: Callable, size: int, folder: Path, *args: Any, start_method: str = "fork"
) -> list[Any]:
    """What ``function(rank, *args)`` returned in each of ``size`` processes.

    Args:
        function: At the top level of a module, so that a new process finds it.
        size: How many processes.
        folder: An empty folder.
        args: Passed on.
        start_method: "spawn" for CUDA, which a forked process cannot use; slower.
    """
    mp.start_processes(
        _worker, (function, size, str(folder), args), nprocs=size, start_method=start_method
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]
