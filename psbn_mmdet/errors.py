"""What the user can put right: one base class of errors, exit codes, one rule for overwriting.

Every error that this package raises on purpose because of what it was given (a file, a config, an
option) derives from :class:`PsbnError` and carries one line that names what was wrong and what to
do. Command lines print that line and end with :data:`BAD_INPUT`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FAILED = 1
"""Exit status of a command that did its work and found what it was asked to fail for."""

BAD_INPUT = 2
"""Exit status of a command that could not do what it was asked; argparse's own, too."""


CLOSED_PIPE = 128 + 13
"""Exit status of a command whose output nobody reads on: what a shell says of SIGPIPE."""


class PsbnError(Exception):
    """Something was given that cannot work; the message is one line that says what to do."""


class OutputExistsError(PsbnError, FileExistsError):
    """A file that was to be written is there already."""


def refuse_to_overwrite(*paths: str | os.PathLike[str] | None, overwrite: bool = False) -> None:
    """Hold a command line to the rule for the files its user names: nothing there is replaced.

    Args:
        paths: Files that are to be written; None is passed over.
        overwrite: Whether the user said ``--overwrite``.

    Raises:
        OutputExistsError: One of them exists.
        PsbnError: The folder of one does not, or two are the same file.
    """
    wanted = [Path(path) for path in paths if path is not None]
    for i, path in enumerate(wanted):
        if os.path.realpath(path) in map(os.path.realpath, wanted[:i]):
            raise PsbnError(f"{path}: named for two outputs; name two files")
    for path in wanted:
        if not path.parent.is_dir():
            raise PsbnError(f"{path}: there is no folder {path.parent}")
        if path.exists() and not overwrite:
            raise OutputExistsError(
                f"{path}: exists already; remove it, name another file or add --overwrite"
            )


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: what stands at its path stays until the new one is done.

    A link stays one, to the new content, and a file keeps its mode; a device or pipe is written as
    it is.

    Args:
        path: Where the file is to stand.

    Yields:
        The path to write it to, beside that one.

    Raises:
        PsbnError: It cannot be written.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    if target.exists() and not (target.is_file() or target.is_dir()):
        part = target
    try:
        yield part
        if part != target:
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's for a full disk
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise PsbnError(f"{path}: cannot be written ({said})") from error
    finally:
        if part != target:
            with suppress(OSError):
                part.unlink()


def require_packages(extra: str, *names: str) -> None:
    """Hold a command line to name what it lacks before it starts.

    Args:
        extra: The optional dependencies of psbn_mmdet that bring them.
        names: Packages, as they are imported.

    Raises:
        PsbnError: One of them is not installed.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise PsbnError(
            f"needs {', '.join(missing)}, not installed here; pip install 'psbn_mmdet[{extra}]'"
        )


@contextmanager
def errors_in_one_line(program: str | None = None) -> Iterator[None]:
    """End the program with one line and :data:`BAD_INPUT` for what its user can put right.

    And without a word where nobody reads on, as behind ``| head``.

    Args:
        program: What the line begins with; by default the name of the script.
    """
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # mmengine's, many times
    program = program or Path(sys.argv[0]).name
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where a closed pipe can still be told
    except BrokenPipeError:
        # Python flushes once more when it ends; nobody reads that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
    except PsbnError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except MemoryError as error:
        said = str(error).splitlines()[0] if str(error) else "what is read does not fit"
        print(f"{program}: out of memory: {said}", file=sys.stderr)
        sys.exit(BAD_INPUT)
