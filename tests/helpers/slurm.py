"""A real Slurm cluster of two nodes for as long as a test module runs."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.paths import ROOT

SCRIPT = ROOT.parent / "shared" / "slurm" / "cluster.sh"
PREFIX = "psbntest"  # of the network namespaces, before the process id of the tests
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


@functools.cache
def why_not():
    """Why there can be no cluster here; None where there can."""
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "nsenter", "unshare", "ip")
    missing = [name for name in programs if not shutil.which(name, path=PATH)]
    if missing:
        return f"no Slurm cluster: {missing[0]} is not installed (slurm-wlm, munge, iproute2)"
    if os.geteuid() != 0:
        return "no Slurm cluster: it needs root"
    if not SCRIPT.is_file():
        return f"no Slurm cluster: {SCRIPT} is not there"
    for change in ("add", "del"):
        command = ["ip", "netns", change, f"{PREFIX}{os.getpid()}-probe"]
        if subprocess.run(command, env={"PATH": PATH}, capture_output=True).returncode:
            return "no Slurm cluster: network namespaces may not be made here"
    return None


class Cluster:
    """The cluster; a context manager that leaves no process of it behind.

    Args:
        folder: For its state.
    """

    def __init__(self, folder):
        self.folder = folder
        self.name = f"{PREFIX}{os.getpid()}"
        self.script = folder / "cluster.sh"
        text = SCRIPT.read_text()
        for old, new in [
            ("NS=psbnslurm", f"NS={self.name}"),  # no other cluster is touched
            # a requeued job waits until the credentials of its first start have expired
            ("AuthInfo=socket=", "AuthInfo=cred_expire=5,socket="),
            ("sched_interval=5,bf_interval=5", "sched_interval=1,bf_interval=1"),
        ]:
            assert text.count(old) == 1, f"{SCRIPT} has changed: {old}"
            text = text.replace(old, new)
        self.script.write_text(text)
        self.environment = {
            **os.environ,
            "BASE": str(folder / "state"),
            "PATH": PATH,
            "PYTHON": sys.executable,
            "OMP_NUM_THREADS": "1",
            "GPUS": "2",
            "GPUS_PER_NODE": "0",
            "CPUS_PER_TASK": "1",
        }

    def __enter__(self):
        for namespace in Path("/run/netns").glob(f"{PREFIX}*"):  # of tests that were killed
            owner = namespace.name.removeprefix(PREFIX).partition("-")[0]
            if not Path("/proc", owner).exists():
                _end(namespace.name)
        try:
            done = self._call("start", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert "idle" in done.communicate(timeout=60)[0]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for namespace in Path("/run/netns").glob(f"{self.name}-*"):
            _end(namespace.name)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.folder / "state/run/munged.pid").read_text()), signal.SIGTERM)

    def _call(self, *command, **kwargs):
        return subprocess.Popen(["bash", self.script, *map(str, command)], cwd=ROOT, **kwargs)

    def start(self, *command, **environment):
        """Begin a command on the login node."""
        return self._call(
            "login",
            *command,
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *command, **environment):
        """What a command on the login node printed."""
        process = self.start(*command, **environment)
        text = process.communicate(timeout=100)[0]
        assert process.returncode == 0, text
        return text.strip()

    def job(self, number):
        """What ``scontrol show job`` says."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number, *states, seconds=100):
        """Wait for a state of a job; return what scontrol says then."""
        return until(lambda: (j := self.job(number))["JobState"] in states and j, seconds, 0.3)


def _end(namespace):
    """Kill what runs in a network namespace, and delete it."""
    listed = ["ip", "netns", "pids", namespace]
    for _ in range(20):  # a killed daemon's child may start another
        pids = subprocess.run(listed, env={"PATH": PATH}, capture_output=True, text=True).stdout
        if not pids.split():
            break
        for pid in pids.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1)
    subprocess.run(["ip", "netns", "del", namespace], env={"PATH": PATH}, check=True)


def until(condition, seconds=100, step=0.1):
    """Wait until a condition holds, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(step)
    return value
