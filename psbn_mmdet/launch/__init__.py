"""What tools/train.py and tools/test.py do: mmdet's own Runner, with checks in front.

- :mod:`.config`: a config with a command line's overrides, and whether it can work here
- :mod:`.distributed`: the process group of one job, and what its ranks must agree on
- :mod:`.exact`: random numbers that a resumed run draws as an uninterrupted one does
- :mod:`.preempt`: what a run does about SIGTERM
- :mod:`.amp`: mixed precision on CPU
- :mod:`.run`: training and evaluation
"""

from .config import (
    UsageError,
    add_arguments,
    load_config,
)
from .distributed import process_group
from .run import check, configure_test, configure_training, evaluate, train

__all__ = [
    "UsageError",
    "add_arguments",
    "check",
    "configure_test",
    "configure_training",
    "evaluate",
    "load_config",
    "process_group",
    "train",
]
