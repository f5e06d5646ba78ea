"""Mixed precision on CPU: bfloat16, where the processor computes in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is ARM's


def cpu_has_bfloat16(cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """Whether the processor has instructions for bfloat16.

    Without them torch emulates it, more slowly than it computes in float32.

    Args:
        cpuinfo: The file in which Linux lists them; where there is none the answer is no.
    """
    path = Path(cpuinfo)
    return path.exists() and not _FLAGS.isdisjoint(path.read_text().split())


@OPTIM_WRAPPERS.register_module(force=True)
class BFloat16OptimWrapper(OptimWrapper):
    """Autocast to bfloat16 on CPU; mmengine's ``AmpOptimWrapper`` demands a GPU.

    bfloat16 has the exponents of float32, so the loss needs no scaling.
    """

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Enter autocast for the forward pass of ``model``."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield
