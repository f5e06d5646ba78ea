"""The process group of one job, and how its ranks decide and fail together.

mmengine's own start puts every Slurm job on port 29500, needs a GPU, and waits without end
when a link goes down. So the group is made here, before a Runner is built:

- the port is computed from the job's number, so jobs on one node use different ports;
- a process that reaches the store of another job all the same is told so, and cannot take
  part in its exchange, since every key carries the name of the job;
- every wait ends (:func:`timeout`).
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, broadcast_object_list

from ..errors import BAD_INPUT, PsbnError
from .config import UsageError

T = TypeVar("T")

FIRST_PORT, PORTS = 15000, 17000
"""Below 32768, where Linux begins to give ports to connections by itself."""

TIMEOUT = 1800
"""Seconds. The longest legitimate wait is for rank 0, which alone evaluates COCO (minutes) or
writes to a slow disk; what takes longer than half an hour is dead."""

MAX_TIMEOUT = 365 * 24 * 3600
"""Seconds. More is a slip of the pen, and the clocks that torch waits by overflow."""


class Place(NamedTuple):
    """Where a process stands in its job."""

    rank: int
    local_rank: int
    processes: int
    job: str  # a name that no other job has; empty where torchrun made the store


def timeout(cfg: Config) -> timedelta:
    """How long a process waits for another: at the start, and in every exchange.

    Args:
        cfg: ``env_cfg.dist_cfg.timeout`` in seconds, mmengine's own key, if there.
            The environment variable ``PSBN_DIST_TIMEOUT`` takes precedence.

    Raises:
        UsageError: It is no positive number, or more than :data:`MAX_TIMEOUT`.
    """
    given = os.environ.get("PSBN_DIST_TIMEOUT") or _dist_cfg(cfg).get("timeout", TIMEOUT)
    try:
        seconds = float(given)
    except (TypeError, ValueError):
        seconds = 0.0
    if not 0 < seconds < MAX_TIMEOUT:
        raise UsageError(f"timeout {given!r}: wanted a positive number of seconds, at most a year")
    return timedelta(seconds=seconds)


def _dist_cfg(cfg: Config) -> dict[str, Any]:
    return (cfg.get("env_cfg") or {}).get("dist_cfg") or {}


@contextmanager
def process_group(cfg: Config, launcher: str) -> Iterator[None]:
    """Take part in the process group of a launcher; leave it at the end.

    One process alone needs no group and runs as without a launcher.

    Args:
        cfg: The config, changed in place so that a Runner takes part.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Raises:
        UsageError: This is no process of such a launcher, the others were not found, or they
            are of another job.
    """
    cfg.launcher = launcher
    if launcher == "none":
        yield
        return
    place = _place(launcher)
    if place.processes == 1:  # needs no group; mmengine then turns SyncBN into BN
        cfg.launcher = "none"
        yield
        return
    os.environ.update(
        RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.processes)
    )
    try:
        if get_device() in ("cpu", "cuda") and _dist_cfg(cfg).get("init_backend") in (
            None,
            "torch",
        ):
            _join(cfg, place)
        # else: mmengine starts the group, with the address and port set above
        if not torch.cuda.is_available():
            cfg.setdefault(
                "model_wrapper_cfg",
                dict(
                    type="MMDistributedDataParallel",
                    device_ids=None,
                    broadcast_buffers=False,
                    find_unused_parameters=cfg.get("find_unused_parameters", False),
                ),
            )
        yield
    finally:
        _leave()


def _place(launcher: str) -> Place:
    """Read a launcher's variables; set ``MASTER_ADDR`` and ``MASTER_PORT`` where it does not."""
    env = os.environ
    if launcher == "pytorch":
        needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        _demand(launcher, needed, "start it with tools/dist_*.sh or torchrun")
        _check_port()
        return Place(_number("RANK"), _number("LOCAL_RANK"), _number("WORLD_SIZE"), "")
    if launcher == "mpi":
        names = [f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "LOCAL_RANK", "SIZE")]
        _demand(launcher, (*names, "MASTER_ADDR"), "set MASTER_ADDR=HOST and start it with mpirun")
        env.setdefault("MASTER_PORT", "29500")
        _check_port()
        number, local, processes = map(_number, names)
        return Place(number, local, processes, env.get("PMIX_NAMESPACE", "mpi"))
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    _demand(launcher, needed, "start it with tools/slurm_*.sh or srun")
    job, step, number, local, processes = map(_number, needed)
    env.setdefault("MASTER_PORT", str(slurm_port(job, step)))
    _check_port()
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"])
    name = f"{env.get('SLURM_CLUSTER_NAME', 'slurm')} job {job}.{step}"
    name += f" start {env.get('SLURM_RESTART_COUNT', 0)}"
    return Place(number, local, processes, name)


def _number(variable: str) -> int:
    given = os.environ[variable]
    if not given.isdecimal():
        raise UsageError(f"{variable}={given}: wanted a number; the launcher sets it")
    return int(given)


def _check_port() -> None:
    port = os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"MASTER_PORT={port}: wanted a number from 1 to 65535")


def _demand(launcher: str, names: tuple[str, ...], how: str) -> None:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UsageError(f"--launcher {launcher}: {missing[0]} is not set; {how}")


def slurm_port(job: int, step: int) -> int:
    """The port of a Slurm step.

    Jobs of neighbouring numbers run at the same time, so numbers are not hashed: up to
    2,125 jobs in a row with up to 8 steps each have ports of their own.
    """
    return FIRST_PORT + (8 * job + step % 8) % PORTS


def _first_host(nodes: str) -> str:
    if not shutil.which("scontrol"):
        raise UsageError(
            f"scontrol is not in the PATH of {socket.gethostname()}, so the first of "
            f"the hosts {nodes} is unknown; set MASTER_ADDR"
        )
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], text=True, capture_output=True, check=False
    )
    if not hosts.stdout.split():
        raise UsageError(f"scontrol knows no hosts {nodes}: {hosts.stderr.strip()}")
    return hosts.stdout.split()[0]


def _join(cfg: Config, place: Place) -> None:
    backend = _dist_cfg(cfg).get("backend") or "nccl"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    elif "nccl" in backend:
        backend = "gloo"
    wait = timeout(cfg)
    # torchrun made the store itself, under a name of its own
    own: dict[str, Any] = {}
    if place.job:
        own = dict(rank=place.rank, world_size=place.processes, store=_store(place, wait))
    try:
        dist.init_process_group(backend, timeout=wait, **own)
    except RuntimeError as error:
        raise UsageError(
            f"rank {place.rank} of {place.processes} did not find the others within "
            f"{wait.total_seconds():g} s: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """What torch says before it lists its stack."""
    return str(error).splitlines()[0].split(" Exception raised")[0].rstrip(".")


def _store(place: Place, wait: timedelta) -> dist.Store:  # type: ignore[name-defined]
    """The store of a job, in which no other job can write or read.

    A process that reaches another job's store is not counted by it
    (``wait_for_workers=False``) and learns there whose it is.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, None, is_master=place.rank == 0, timeout=wait, wait_for_workers=False
        )
        if place.rank == 0:
            store.set("job", place.job)
        owner = store.get("job").decode()
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise UsageError(
            f"rank {place.rank} of {place.job}: no store at {host}:{port}: "
            f"{_first_line(error)}; is the port taken? Set MASTER_PORT to another"
        ) from error
    if owner != place.job:
        raise UsageError(
            f"rank {place.rank} of {place.job}: {host}:{port} is in use by {owner}; "
            "set MASTER_PORT to another port"
        )
    return dist.PrefixStore(place.job, store)  # type: ignore[attr-defined]


def _leave() -> None:
    """Leave the process group; call it when the last name of the Runner is gone.

    While a group lives (DDP keeps it, and cycles keep DDP), gloo's threads may
    hold tensors of the last collective. If they free them when the interpreter
    is already ending, the process aborts, and torchrun calls a finished job
    failed: of 25 programs of two processes and a few collectives, 6 to 8 did.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_rank_0(decide: Callable[[], T]) -> T:
    """Let rank 0 decide, and give its decision to all.

    Args:
        decide: Called on rank 0 alone. What it raises as :class:`PsbnError`, all raise.
    """
    if not dist.is_initialized():
        return decide()
    box = [on_all_ranks(lambda: decide() if rank() == 0 else None)]
    broadcast_object_list(box, src=0)
    return cast(T, box[0])


def on_all_ranks(check: Callable[[], T]) -> T:
    """Call ``check`` on every rank; where it fails on one, all end, with its line.

    Otherwise one rank would end and the others wait for it.

    Args:
        check: What it raises as :class:`PsbnError` is shared.

    Returns:
        What it returned on this rank.

    Raises:
        PsbnError: On rank 0. The other ranks exit with :data:`BAD_INPUT`, in silence.
    """
    if not dist.is_initialized():
        return check()
    result, error = None, None
    try:
        result = check()
    except PsbnError as caught:
        error = caught
    errors = all_gather_object(str(error) if error else None)
    bad = [number for number, text in enumerate(errors) if text]
    if not bad:
        return cast(T, result)
    if rank() == 0:
        raise error or UsageError(f"rank {bad[0]}: {errors[bad[0]]}")
    time.sleep(2)  # a launcher kills all when one exits: let rank 0 say its line before
    sys.exit(BAD_INPUT)


def agree(what: str, value: Any) -> None:
    """Check that a value is the same on every rank.

    Args:
        what: Its name, for the message.
        value: It; compared by ``repr``.

    Raises:
        UsageError: On rank 0, where ranks differ; the others exit.
    """
    if not dist.is_initialized():
        return
    values = all_gather_object((socket.gethostname(), repr(value)))

    def compare() -> None:
        for number, (host, text) in enumerate(values):
            if text != values[0][1]:
                raise UsageError(
                    f"the ranks differ in their {what}: {values[0][1]} on rank 0 "
                    f"({values[0][0]}), {text} on rank {number} ({host})"
                )

    on_all_ranks(compare)
