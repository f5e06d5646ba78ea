"""Does the runs of an experiment: skips finished ones, resumes killed ones, tells how long.

Every run has a folder ``OUT/EXPERIMENT/RUN`` and is a process of its own there, a
job of mmengine's Runner. The folder is all that there is to know of it, so runs
can be killed, shared out over machines with one disk, and resumed.

Why not a library: joblib's workers are reused for many runs, so that one killed worker fails the
whole batch (TerminatedWorkerError), and it knows no order of parents and children; submitit starts
all local jobs at once and keeps its own pickles beside the folder that is the state here. Neither
estimates what is left. On Slurm, ``--shard`` in a job array needs neither.
"""

from __future__ import annotations

import heapq
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from torch.nn import functional as F

from studies.runs import RunError, check_folders, duration, folder_of, result_of

from . import data
from .experiments import Experiment, Run
from .networks import macs
from .rounds import check_amp
from .settings import Settings

POLL_SECONDS = 60.0
"""Between two lines of progress."""

ROOT = Path(__file__).resolve().parents[2]  # of the checkout: workers import this package


def families(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that start from another one's weights stand together, behind it."""
    found: dict[str, list[Run]] = {r.name: [r] for r in runs if r.settings.parent is None}
    for run in runs:
        if run.settings.parent is not None:
            found[run.settings.parent].append(run)
    return list(found.values())


def share(runs: Sequence[Run], shard: str | None) -> list[Run]:
    """The i-th of n shares, counted from 1; whole families, every n-th.

    Raises:
        RunError: It is not of the form i/n, or there are more shares than families.
    """
    groups = families(runs)
    if shard is None:
        return [run for group in groups for run in group]
    try:
        number, count = (int(part) for part in shard.split("/"))
    except ValueError:
        raise RunError(f"--shard must be i/n, as 2/9, got {shard!r}") from None
    if not 1 <= number <= count:
        raise RunError(f"--shard {shard}: i must be from 1 to n")
    if count > len(groups):
        raise RunError(
            f"--shard {shard}: there are only {len(groups)} independent runs to share; "
            f"take n <= {len(groups)}"
        )
    return [run for group in groups[number - 1 :: count] for run in group]


def prepare(
    experiment: Experiment, out: str | os.PathLike[str], data_root: str | os.PathLike[str]
) -> None:
    """Check the data and that every folder is of this experiment's settings; make them.

    Raises:
        DataError, RunError: Nothing has been started then.
    """
    crc = data.fingerprint(data_root)
    if any(run.settings.amp for run in experiment.runs):
        check_amp(get_device())
    try:
        check_folders(experiment, out, crc, "CIFAR-10")
    except PermissionError as error:
        raise RunError(f"{error.filename}: no permission to write; name another --out") from None


# ---------------------------------------------------------------- how long


def work(settings: Settings, iterations: int | None = None) -> float:
    """Multiply-accumulates of some training steps, forward and backward; of all by default.

    With the evaluation at the end of each round.
    """
    steps = settings.iterations if iterations is None else iterations
    tests = (settings.test_images or data.RECORDS) * (1 + settings.evaluate_pruned)
    images = 3 * settings.batch_size * steps + tests * steps / settings.iterations_per_round
    return images * macs(settings.network, settings.width, settings.image_size)


def time_steps(settings: Settings, steps: int = 2) -> float:
    """Seconds of a training step, timed here and now, with random images."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        network = settings.network_module().to(device)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        size = settings.batch_size, 3, settings.image_size, settings.image_size
        x = torch.randn(size, device=device)
    labels = torch.zeros(settings.batch_size, dtype=torch.long, device=device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-6, 0.9)
    started = 0.0
    for i in range(-1, steps):
        if i == 0:
            started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=settings.amp):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        network.fc.weight.sum().item()  # waits for the device
    return (time.perf_counter() - started) / steps


def _progress(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "progress.json").read_text())
    except FileNotFoundError:
        return {}


class Clock:
    """Estimates from what runs of the same network have taken, else from timed steps."""

    def __init__(self, experiment: Experiment, out: str | os.PathLike[str], threads: int) -> None:
        self.experiment, self.out = experiment, out
        self.timed: dict[tuple[Any, ...], float] = {}
        self.threads = threads

    def _key(self, s: Settings) -> tuple[Any, ...]:
        return s.network, s.width, s.image_size, s.batch_size, s.norm == "none", s.amp

    def seconds_per_work(self) -> dict[tuple[Any, ...], float]:
        """From the progress of all runs so far."""
        done: dict[tuple[Any, ...], list[float]] = {}
        for run in self.experiment.runs:
            progress = _progress(folder_of(self.experiment, run, self.out))
            steps = progress.get("iterations_of_process", 0)
            if steps:
                spent = done.setdefault(self._key(run.settings), [0.0, 0.0])
                spent[0] += progress["seconds_of_process"]
                spent[1] += work(run.settings, steps)
        return {key: seconds / amount for key, (seconds, amount) in done.items()}

    def left(self, runs: Sequence[Run], workers: int) -> float:
        """Seconds until all are done: whoever is free takes the next."""
        known = self.seconds_per_work()
        free = [0.0] * min(workers, max(len(runs), 1))
        for run in runs:
            folder = folder_of(self.experiment, run, self.out)
            if (folder / "result.json").exists():
                continue
            rate = known.get(self._key(run.settings)) or self._timed(run.settings)
            rest = run.settings.iterations - _progress(folder).get("iteration", 0)
            heapq.heapreplace(free, free[0] + rate * work(run.settings, rest))
        return max(free)

    def _timed(self, settings: Settings) -> float:
        key = self._key(settings)
        if key not in self.timed:
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            self.timed[key] = time_steps(settings) / work(settings, 1)
            torch.set_num_threads(before)
        return self.timed[key]


# ---------------------------------------------------------------- doing it


def threads_of_worker(workers: int) -> int:
    """OMP_NUM_THREADS if it is set, else an equal share of the cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, len(os.sched_getaffinity(0)) // workers)


def _environment(slot: int, threads: int) -> dict[str, str]:
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONWARNINGS="ignore")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if torch.cuda.is_available():
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            str(i) for i in range(torch.cuda.device_count())
        )
        env["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[slot % len(gpus.split(","))]
        env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS is not deterministic
    return env


def plan(
    experiment: Experiment, out: str | os.PathLike[str], workers: int = 1, shard: str | None = None
) -> str:
    """What is left to do and how long it will take, in a line.

    Raises:
        RunError: A wrong number of workers or shard.
    """
    if workers < 1:
        raise RunError(f"--workers must be at least 1, got {workers}")
    mine = share(experiment.runs, shard)
    todo = [run for run in mine if not result_of(experiment, run, out)]
    text = f"{experiment.name}: {len(mine)} runs, {len(mine) - len(todo)} of them finished"
    if not todo:
        return text
    clock = Clock(experiment, out, threads_of_worker(workers))
    measured = bool(clock.seconds_per_work())
    basis = "from the runs so far" if measured else "from timed steps of one run alone: roughly"
    return (
        f"{text}; the rest takes about {duration(clock.left(todo, workers))}, {workers} at a time "
        f"with {clock.threads} threads each ({basis})"
    )


def execute(
    experiment: Experiment,
    out: str | os.PathLike[str],
    data_root: str | os.PathLike[str],
    workers: int = 1,
    shard: str | None = None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Do the runs of an experiment, or of a share of it, that are not finished.

    Args:
        experiment: What to do; :func:`prepare` has been called.
        out: Where it is or will be.
        data_root: Where CIFAR-10 is.
        workers: Runs at a time, each a process; on GPUs they take turns, one each.
        shard: ``'i/n'``, see :func:`share`.
        say: Gets a line at a time.

    Returns:
        What failed, a line each.
    """
    say(plan(experiment, out, workers, shard))
    mine = share(experiment.runs, shard)
    todo = [run for run in mine if not result_of(experiment, run, out)]
    clock = Clock(experiment, out, threads_of_worker(workers))
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(workers):
        slots.put(slot)
    alive: dict[str, subprocess.Popen[bytes]] = {}
    stop = threading.Event()

    def do(run: Run) -> str | None:
        if stop.is_set():
            return None
        slot, folder = slots.get(), folder_of(experiment, run, out)
        try:
            code = "from studies.cifar.rounds import main; main()"
            command = [sys.executable, "-c", code, str(folder), str(data_root)]
            with open(folder / "output.txt", "a") as log:
                env = _environment(slot, clock.threads)
                # The pipe closes when this process ends, however it ends, and the worker with it.
                worker = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=env
                )
                assert worker.stdin is not None
                with worker.stdin:
                    alive[run.name] = worker
                    status = worker.wait()
            if status and not stop.is_set():
                lines = (folder / "output.txt").read_text().strip().splitlines()
                reason = lines[-1] if lines else f"exit status {status}"
                return f"{run.name}: failed ({reason}); see {folder / 'output.txt'}"
            return None
        finally:
            alive.pop(run.name, None)
            slots.put(slot)

    failed: list[str] = []
    pending = {run.name for run in todo}
    waiting = list(todo)
    with ThreadPoolExecutor(workers) as pool:
        futures: dict[Future[Any], Run] = {}
        try:
            while waiting or futures:
                ready = [run for run in waiting if run.settings.parent not in pending]
                for run in ready:
                    waiting.remove(run)
                    futures[pool.submit(do, run)] = run
                done, _ = wait(futures, POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    run = futures.pop(future)
                    pending.discard(run.name)
                    if error := future.result():
                        failed.append(error)
                        say(error)
                        for child in [r for r in waiting if r.settings.parent == run.name]:
                            waiting.remove(child)
                            failed.append(f"{child.name}: not done, as {run.name} failed")
                say(_status(experiment, out, mine, list(alive), clock, workers))
        except BaseException:  # Ctrl-C too: the runs resume from their checkpoints
            stop.set()
            for process in list(alive.values()):
                process.terminate()
            raise
    return failed


def _status(
    experiment: Experiment,
    out: str | os.PathLike[str],
    runs: Sequence[Run],
    alive: Sequence[str],
    clock: Clock,
    workers: int,
) -> str:
    finished = sum(result_of(experiment, run, out) is not None for run in runs)
    text = f"{time.strftime('%H:%M')}  {finished}/{len(runs)} runs finished"
    for run in runs:
        if run.name in alive:
            at = _progress(folder_of(experiment, run, out)).get("iteration", 0)
            text += f"; {run.name} {100 * at / run.settings.iterations:.0f}%"
    if finished < len(runs):
        text += f"; about {duration(clock.left(runs, workers))} left"
    return text
