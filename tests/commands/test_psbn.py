"""The command psbn as a user starts it: verbs, errors, pipes, a terminal."""

import os
import pty
import subprocess
import sys

import pytest
import torch

from psbn_mmdet.commands import VERBS
from psbn_mmdet.errors import BAD_INPUT, CLOSED_PIPE
from tests.helpers.collapsed_net import Net, collapse_by_hand
from tests.helpers.paths import ROOT

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
PSBN = [sys.executable, "-m", "psbn_mmdet"]


def psbn(*arguments, **options):
    command = [*PSBN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, **options)


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(collapse_by_hand(Net()).state_dict(), tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_alone_it_names_the_verbs():
    done = psbn()
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_under_its_name(verb):
    done = psbn(verb, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: psbn {verb} ")


def test_another_verb_is_refused_in_a_line_that_names_those_there_are():
    done = psbn("inpsect", "a.pth")
    assert done.returncode == BAD_INPUT
    assert done.stderr == f"psbn: no verb 'inpsect'; there are {', '.join(VERBS)}\n"


def test_errors_name_the_verb(tmp_path):
    done = psbn("inspect", tmp_path / "none.pth")
    assert done.returncode == BAD_INPUT
    assert done.stderr == f"psbn inspect: {tmp_path / 'none.pth'}: no such file\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare-ap", "--help"]])
def test_torch_is_not_imported_for(arguments):
    program = (
        f"import sys; sys.argv = {['psbn', *arguments]}; from psbn_mmdet.commands import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'mmengine' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_a_pipe_that_nobody_reads_ends_it_without_a_word(checkpoint):
    read, write = os.pipe()
    os.close(read)
    command = [*PSBN, "inspect", str(checkpoint)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(write)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


def test_a_terminal_gets_a_table_and_a_pipe_plain_columns(checkpoint):
    piped = psbn("inspect", checkpoint).stdout
    outside, inside = pty.openpty()
    child = subprocess.Popen(
        [*PSBN, "inspect", str(checkpoint)], stdout=inside, env=dict(ENVIRONMENT, COLUMNS="100")
    )
    os.close(inside)
    shown = b""
    while True:
        try:
            part = os.read(outside, 4096)
        except OSError:  # how a terminal says that the other side is closed
            break
        if not part:
            break
        shown += part
    assert child.wait() == 0
    assert "─" in shown.decode()
    assert "─" not in piped
    rows = [line.split() for line in piped.splitlines()]
    assert ["bn1", "8", "3", "37.5"] in [row[:4] for row in rows]
    assert all(word in shown.decode() for word in ("bn1", "37.5", "8 of 28 filters collapsed"))
