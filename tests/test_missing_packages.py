"""A tool that lacks an optional package says which extra brings it."""

import sys

import pytest

from tests.helpers.tools import Main

TOOLS = {
    "compare_ap": ("numba", "ap", ["a.json", "b.json", "--ann", "c.json"]),
    "plot_collapse": ("matplotlib", "report", ["run", "--png", "pictures"]),
    "theory_figures": ("scipy", "theory", ["pictures"]),
    "train": ("mmdet", "mmdet", ["config.py"]),
    "test": ("mmdet", "mmdet", ["config.py", "checkpoint.pth"]),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_extra_is_named(tool, capsys, monkeypatch, tmp_path):
    package, extra, arguments = TOOLS[tool]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    message = Main(tool, capsys).refuses(*arguments)
    assert f"needs {package}" in message
    assert f"pip install 'psbn_mmdet[{extra}]'" in message
    assert not any(tmp_path.iterdir())
