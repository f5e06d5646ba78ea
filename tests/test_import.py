"""Importing the package registers names and changes nothing else; it needs torch alone."""

import subprocess
import sys
import textwrap

import pytest

from psbn_mmdet import _ROOMS
from tests.helpers.paths import ROOT


def run(code):
    """The output of some lines in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_are_all_that_is_added_to_mmengine_and_torch():
    """Every attribute of every loaded module of both, and every registry, before and after."""
    assert run("""
        import sys, warnings
        warnings.simplefilter("ignore")
        import torch, torch.serialization, torch.distributed
        import mmengine, mmengine.hooks, mmengine.runner, mmengine.model, mmengine.visualization
        import mmengine.runner.checkpoint as checkpoint
        from mmengine.registry import Registry

        def state():
            seen = {}
            for name, module in list(sys.modules.items()):
                if name.split(".")[0] in ("mmengine", "torch") and hasattr(module, "__dict__"):
                    for key, value in vars(module).items():
                        seen[name, key] = id(value)
                        if isinstance(value, type) and value.__module__ == name:
                            for own, it in vars(value).items():
                                seen[name, key, own] = id(it)
                        if isinstance(value, Registry):
                            for own in value.module_dict:
                                seen["registry", value.name, own] = id(value.module_dict[own])
            seen["schemes"] = dict(checkpoint.CheckpointLoader._schemes)
            seen["safe"] = set(torch.serialization.get_safe_globals())
            seen["hooks"] = [*sys.meta_path], [*sys.path_hooks]
            return seen

        before = state()
        import psbn_mmdet
        after = state()
        changed = {k for k in before if after.get(k) != before[k] and k[1:] != ("__getattr__",)}
        assert not changed, changed
        added = {k for k in after if k not in before and k[0] == "registry"}
        print(sorted({k[2] for k in added}))
        """).strip() == str(
        sorted(
            [
                *("psBN", "psBN1d", "psBN2d", "psBN3d", "psIN", "psIN1d", "psIN2d", "psIN3d"),
                *("psSyncBN", "ToPsBN", "Stripped"),
                *("AnchoredBiasDecay", "LiftGamma", "PsBNHook", "ReviveFilters"),
                "SparsityLoggerHook",
            ]
        )
    )


@pytest.mark.parametrize("room", sorted({*_ROOMS} - {"registry", "launch"}))  # mmengine's own
def test_without_mmengine_everything_imports_but_what_trains(room):
    run(f"""
        import sys
        for name in ("mmengine", "mmcv", "mmdet"):
            sys.modules[name] = None
        import psbn_mmdet.{room}, torch
        psbn_mmdet.to_psbn(torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU()))
    """)


def test_ap_needs_no_torch():
    run("""
        import sys
        sys.modules["torch"] = sys.modules["mmengine"] = None
        import psbn_mmdet.ap
    """)


@pytest.mark.parametrize("first", ["mmengine", "psbn_mmdet"])
def test_hooks_are_classes_and_twice_is_harmless(first):
    second = {"mmengine": "psbn_mmdet", "psbn_mmdet": "mmengine"}[first]
    run(f"""
        import importlib, {first}, {second}, psbn_mmdet.registry
        from mmengine.registry import HOOKS, MODELS
        assert MODELS.get("psBN") is psbn_mmdet.psBN is MODELS.get("psbn_mmdet.psBN")
        for name in (
            *("SparsityLoggerHook", "AnchoredBiasDecay", "PsBNHook", "ReviveFilters", "LiftGamma"),
        ):
            class Own(HOOKS.get(name)):
                pass
        importlib.reload(psbn_mmdet)
    """)
