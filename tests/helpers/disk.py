"""Disks that are full."""

import contextlib
import resource


@contextlib.contextmanager
def files_no_larger_than(size):
    """A real limit, which cuts the write that reaches it short, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
