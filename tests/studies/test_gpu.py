"""The script for a GPU: steps that work, fail or take too long, and its ratios."""

import json
import sys
import time
from argparse import Namespace

import pytest

from studies import gpu


def options(tmp_path, minutes):
    return Namespace(out=tmp_path, minutes=minutes, tiny=True, data_root="d", cifar_root="c",
                     workers=1)  # fmt: skip


def test_a_step_that_fails_or_takes_too_long_costs_itself_alone(tmp_path, monkeypatch, capsys):
    scripts = {
        "tests": "print('2 passed')",
        "layers": "raise SystemExit('no such layer')",
        "step": "import time; time.sleep(60)",
        "transfer": f"open(r'{tmp_path}/done', 'w')",
        "paper16": "pass",
    }
    monkeypatch.setattr(gpu, "command_of", lambda step, args: [sys.executable, "-c", scripts[step]])
    started = time.monotonic()
    gpu.run_all(options(tmp_path, minutes=0.1))
    assert time.monotonic() - started < 12
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    outcomes = {step: entry["outcome"] for step, entry in steps.items()}
    assert outcomes == {
        "tests": "done",
        "layers": "exit status 1",
        "step": "stopped at its time; the same command goes on",
        "transfer": "done",
        "paper16": "done",
    }
    assert steps["tests"]["said"] == ["2 passed"]
    assert steps["layers"]["said"] == ["no such layer"]
    assert (tmp_path / "done").exists()
    assert "| layers | " in capsys.readouterr().out


def test_ratios_are_of_pairs():
    found = gpu.in_turns(
        {"one": lambda: time.sleep(0.01), "three": lambda: time.sleep(0.03)}, "cpu", 5
    )
    assert found["one"]["ratio"] == pytest.approx(1)
    assert found["three"]["ratio"] == pytest.approx(3, rel=0.3)
    assert found["three"]["low"] <= found["three"]["ratio"] <= found["three"]["high"]
    assert found["one"]["memory_ratio"] is None  # a CPU counts none


def test_every_step_has_a_command_and_the_shares_are_the_whole():
    args = options("out", 13)
    assert sum(gpu.SHARES.values()) == pytest.approx(1)
    for step in gpu.SHARES:
        assert gpu.command_of(step, args)[0] == sys.executable
