"""docs/own-data.md is a notebook: all its cells run, in order."""

import os
import sys

import pytest

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "own-data.md"


def read_page():
    return pytest.importorskip("jupytext").read(PAGE)


def test_the_page_is_a_notebook_of_python_and_bash():
    sources = [cell.source for cell in read_page().cells if cell.cell_type == "code"]
    assert sum(source.startswith("%%bash") for source in sources) >= 8
    for source in sources:
        if not source.startswith("%%bash"):
            compile(source, PAGE.name, "exec")


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read_page()
    for cell in notebook.cells:  # a reader sees a command fail; here the cell has to
        cell.source = cell.source.replace("%%bash\n", "%%bash\nset -euo pipefail\n", 1)
    for folder in ("tools", "studies"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    command = tmp_path / "bin" / "psbn"  # that of this checkout, also where none is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m psbn_mmdet "$@"\n')
    command.chmod(0o755)
    python = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", os.pathsep.join([str(command.parent), python, os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    assert (tmp_path / "work_dirs" / "psbn" / "metrics.json").is_file()
    assert (tmp_path / "detector.onnx").is_file()
