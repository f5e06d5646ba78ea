"""The command lines of tools/, called in this process."""

import importlib.util
import os
import subprocess
import sys

from tests.helpers.paths import ROOT

TOOLS = ROOT / "tools"


def start_study(name, *arguments, stderr=subprocess.PIPE):
    """`python -m studies.NAME ARGUMENTS`, started."""
    return subprocess.Popen(
        [sys.executable, "-m", f"studies.{name}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )


class Main:
    """A tool's main() in this process: as the command line, without the start of Python."""

    def __init__(self, name, capsys):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.name, self.capsys = name, capsys

    def __call__(self, *args):
        old, sys.argv = sys.argv, [f"{self.name}.py", *map(str, args)]
        status = 0
        try:
            self.module.main()
        except SystemExit as end:
            status = end.code
        finally:
            sys.argv = old
        return subprocess.CompletedProcess(args, status, *self.capsys.readouterr())

    def refuses(self, *args):
        done = self(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{self.name}.py: ")
        return done.stderr
