"""tools/theory_figures.py as its user calls it."""

import pytest

from psbn_mmdet.theory.figures import FIGURES
from tests.helpers.tools import Main


@pytest.fixture
def tool(capsys):
    return Main("theory_figures", capsys)


def test_every_figure_can_be_asked_for(tool):
    assert tuple(FIGURES) == tool.module.NAMES


def test_writes_what_was_asked_for_and_replaces_it_only_if_told_to(tool, tmp_path):
    folder = tmp_path / "pictures"
    assert tool(folder, "--only", "theory_decay", "--dpi", "20").returncode == 0
    (file,) = folder.iterdir()
    assert file.read_bytes().startswith(b"\x89PNG")
    file.write_bytes(b"mine")
    assert "theory_decay.png: exists" in tool.refuses(folder, "--only", "theory_decay")
    assert file.read_bytes() == b"mine"
    assert tool(folder, "--only", "theory_decay", "--dpi", "20", "--overwrite").returncode == 0
    assert file.read_bytes() != b"mine"


def test_what_is_no_run_is_named(tool, tmp_path):
    assert "nothing" in tool.refuses(tmp_path, "--only", "theory_decay", "--runs", "nothing")
