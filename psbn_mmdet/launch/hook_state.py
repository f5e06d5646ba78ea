"""What hooks and modules keep in plain attributes, held in a checkpoint.

mmengine saves parameters and buffers. Some layers also count in plain attributes (the iterations
of ``DropBlock``, the histories of ``DynamicRoIHead`` and the thresholds that it sets), and so do
some hooks (the patience of ``EarlyStoppingHook``). A resumed run would begin them anew.

Held is what has changed since the training began, so a setting that is another in the resumed
run's config stays that. Of a module these are all plain values, its own and those of the objects
that it holds; of a hook its numbers: a flag of a hook says what it has done to this process, and
a resumed run has to do it again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook, IterTimerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # training among them, which the loops set
_SMALL = 1 << 16
"""Elements of a tensor that is no buffer; larger ones are caches."""
_FOREIGN = ("torch", "numpy", "builtins", "logging", "collections", "functools", "mmengine")
"""Packages whose objects are not looked into."""


class HeldState:
    """The plain state of a run's hooks and modules.

    Args:
        runner: Ready to train; what holds now is the beginning. In a resumed run,
            :meth:`restore` comes after.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._beginning = {path: _copied(value) for path, _, value in _places(runner)}
        self._changed: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What has changed since the beginning, by path, to be saved in a checkpoint."""
        now = {path: value for path, _, value in _places(self._runner)}
        for path, value in now.items():
            if path not in self._beginning or not _same(value, self._beginning[path]):
                self._changed.add(path)
        return {path: _saved(now[path]) for path in sorted(self._changed & now.keys())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set what a checkpoint has; what this run has no place for is left out."""
        for path, (owner, name), value in list(_places(self._runner)):
            if path in state:
                setattr(owner, name, _like(value, state[path]))
                self._changed.add(path)


def _places(runner: Runner) -> Iterator[tuple[str, tuple[Any, str], Any]]:
    """Path, owner and name, and value of every plain attribute."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for name, module in model.named_modules():
        yield from _of_object(module, f"model.{name}" if name else "model", set())
    count: dict[str, int] = {}
    for hook in runner.hooks:
        kind = type(hook).__name__
        count[kind] = count.get(kind, 0) + 1
        if _keeps_its_own(hook):
            continue
        for name, value in vars(hook).items():
            if _is_numbers(value):
                yield f"{kind}.{count[kind]}.{name}", (hook, name), value


def _keeps_its_own(hook: Hook) -> bool:
    """Whether a hook saves its state itself, or only tells the time."""
    kind = type(hook)
    return (
        kind.before_save_checkpoint is not Hook.before_save_checkpoint
        or kind.after_load_checkpoint is not Hook.after_load_checkpoint
        or isinstance(hook, IterTimerHook)
    )


def _of_object(owner: Any, path: str, seen: set[int]) -> Iterator[tuple[str, tuple[Any, str], Any]]:
    if id(owner) in seen or len(seen) > 1000:
        return
    seen.add(id(owner))
    for name, value in vars(owner).items():
        if isinstance(owner, nn.Module) and name in _OF_EVERY_MODULE:
            continue
        if _is_plain(value):
            yield f"{path}.{name}", (owner, name), value
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                if _is_own_object(item):
                    yield from _of_object(item, f"{path}.{name}.{place}", seen)
        elif _is_own_object(value):
            yield from _of_object(value, f"{path}.{name}", seen)


def _is_own_object(value: Any) -> bool:
    """Whether it is an object of a detector, as an assigner; modules are named by themselves."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, nn.Module, Tensor))
        and not callable(getattr(value, "__get__", None))  # functions and methods
        and type(value).__module__.partition(".")[0] not in _FOREIGN
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, deque)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    if isinstance(value, Tensor):
        return value.numel() <= _SMALL and not value.requires_grad and not value.is_meta
    return value is None or isinstance(value, (bool, int, float, str, np.number, np.bool_))


def _is_numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple, deque)):
        return len(value) > 0 and all(map(_is_numbers, value))
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_copied(inner) for inner in value]
    return value.detach().clone() if isinstance(value, Tensor) else value


def _saved(value: Any) -> Any:
    """A copy of what a checkpoint may hold: numbers of Python, tensors on the CPU."""
    if isinstance(value, dict):
        return {key: _saved(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return (tuple if isinstance(value, tuple) else list)(map(_saved, value))
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    return value.item() if isinstance(value, np.generic) else value


def _like(old: Any, new: Any) -> Any:
    """What was saved, in the kind of container and on the device of what is there."""
    if isinstance(new, Tensor):
        return new.to(old.device) if isinstance(old, Tensor) else new
    if isinstance(new, list) and isinstance(old, deque):
        return deque(new, old.maxlen)
    if isinstance(new, dict) and isinstance(old, dict) and type(old) is not dict:
        return type(old)(new)
    return new


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, (list, tuple, deque)):
        return (
            isinstance(b, (list, tuple, deque))
            and len(a) == len(b)
            and all(_same(x, y) for x, y in zip(a, b))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return type(a) is type(b) and bool(a == b)
