"""What tools/train.py and tools/test.py do: mmdet's own Runner, with checks in front.

:mod:`.run` trains and evaluates, and calls all others; these do not call it, nor each other but
where one is named in another's text.

- :mod:`.config`: a config with a command line's overrides
- :mod:`.checks`: whether it can work on this machine
- :mod:`.preview`: what it will train or test, built and told
- :mod:`.distributed`: the process group of one job; deciding and failing together
- :mod:`.agreement`: what its ranks must have in common
- :mod:`.resume`: which checkpoint a run goes on from, and what makes it this run's
- :mod:`.position`: where a run stands, in its checkpoints
- :mod:`.hook_state`: what hooks and modules keep in plain attributes, in checkpoints
- :mod:`.seeding`: random numbers that a resumed run draws as an uninterrupted one does
- :mod:`.data_loaders`: data loaders with all that
- :mod:`.preempt`: what a run does about SIGTERM
- :mod:`.amp`: mixed precision on CPU
"""

from .config import UsageError, add_arguments, load_config
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
