"""Random numbers that depend on where a run stands, and not on how it got there.

mmengine seeds the workers of the data loader once, when they start. A resumed run starts
them again, so its images are flipped and cropped differently from those of an uninterrupted
run. Here every image and every step begins with random numbers of its own, a function of

    (seed, epoch, batch of the epoch, place in the batch, rank)     for an image,
    (seed, iteration, rank)                                         for a step,

whatever was drawn before, by whatever number of workers. That holds for the generators of Python,
NumPy and torch that all share, and for those that transforms and modules keep for themselves, as
albumentations 2 does. A loop of iterations has the pass over the data set for the epoch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler

_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_NO_OBJECTS = (type, ModuleType, FunctionType, MethodType, torch.Tensor, np.ndarray)
_LONG = 1000
"""Longer lists are data, as the annotations of a data set that does not serialize them."""


def seed_all(*key: int, generator: Callable[[int], Any] = torch.manual_seed) -> None:
    """Seed Python's, NumPy's and torch's generators with a function of ``key``.

    Args:
        key: Integers, at least 0. Different keys give independent random numbers
            (NumPy's ``SeedSequence``).
        generator: Seeds torch; ``torch.default_generator.manual_seed`` leaves GPUs alone.
    """
    words = np.random.SeedSequence(key).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])  # noqa: NPY002  the generator that transforms draw from
    generator(int(words[4]) << 31 | int(words[5]) >> 1)


def seed_own(generators: list[Any], *key: int) -> None:
    """Seed generators that objects keep for themselves, each differently.

    Args:
        generators: Those that :func:`own_generators` finds.
        key: As of :func:`seed_all`.
    """
    for number, generator in enumerate(generators):
        # the last word keeps it apart from what seed_all gives to all
        sequence = np.random.SeedSequence((*key, number, 0x0717))
        word = int(sequence.generate_state(1)[0])
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(sequence).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(word)
        else:
            generator.seed(word)


def own_generators(root: Any) -> list[Any]:
    """The random generators in the attributes of an object, at any depth, in a fixed order."""
    found, seen, todo = [], set(), [root]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        inner: Any = ()
        if isinstance(value, _GENERATORS):
            found.append(value)
        elif isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, (list, tuple)):
            inner = value if len(value) <= _LONG else ()
        elif hasattr(value, "__dict__") and not isinstance(value, _NO_OBJECTS):
            inner = vars(value).values()
        todo.extend(v for v in inner if not isinstance(v, (str, bytes, int, float, type(None))))
    return found


class Draw(NamedTuple):
    """What a sampler asks a :class:`SeededDataset` for."""

    index: Any
    key: tuple[int, ...]


class SeededDataset(Dataset[Any]):
    """A data set whose items are drawn with random numbers that their :class:`Draw` names.

    Everything else is passed on to the data set that it wraps, whose class it says it has:
    samplers and hooks ask for that, and read and set attributes.

    Args:
        dataset: The data set, or its config.
    """

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        object.__setattr__(self, "_dataset", dataset)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return SeededDataset, (self._dataset,)

    def __getitem__(self, draw: Any) -> Any:
        if not isinstance(draw, Draw):
            return self._dataset[draw]
        seed_all(*draw.key, generator=torch.default_generator.manual_seed)
        # looked for anew: transforms may be exchanged, and their generators with them
        seed_own(own_generators(self._dataset), *draw.key)
        return self._dataset[draw.index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        # not before unpickling has set _dataset, and no way around __getitem__
        if name == "_dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


class SeededBatchSampler(Sampler[Any]):
    """A batch sampler that gives every index the key of its random numbers.

    Args:
        sampler: Of indices.
        batch_size: Images in a batch; a list for some samplers of several data sets.
        seed: Of the run.
        batch_sampler: Config of the batch sampler; by default consecutive indices.
        drop_last: Whether that default one leaves an incomplete batch out.
        passed: In a loop of iterations, which numbers its passes over the data set itself: how
            many batches were trained with before. None in a loop of epochs.
    """

    def __init__(
        self,
        sampler: Sampler[Any],
        batch_size: Any,
        seed: int,
        batch_sampler: dict[str, Any] | None = None,
        drop_last: bool = False,
        passed: int | None = None,
    ) -> None:
        self._batches = (
            DATA_SAMPLERS.build(
                batch_sampler, default_args={"sampler": sampler, "batch_size": batch_size}
            )
            if batch_sampler
            else BatchSampler(sampler, batch_size, drop_last)
        )
        self._indices = sampler
        self._seed = seed
        self.batch_size, self.drop_last = batch_size, drop_last
        self.iterations = passed is not None
        self.epoch = 0
        self.skip = passed or 0  # batches to leave out, since they were trained with
        self.given: deque[list[Draw]] = deque()  # of this pass, and not yet taken

    @property
    def sampler(self) -> SeededBatchSampler:
        """The object on which mmengine sets the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle and draw as in this epoch; in a loop of iterations nothing asks for one."""
        if not self.iterations:
            self._set_epoch(epoch)

    def _set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if hasattr(self._indices, "set_epoch"):
            self._indices.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        self.given.clear()
        while True:
            epoch, number, gave = self.epoch, -1, False
            for number, batch in enumerate(self._batches):
                if self.skip:
                    self.skip -= 1  # indices, whose images nobody reads
                    continue
                key = (self._seed, epoch, number)
                draws = [Draw(i, (*key, place, get_rank())) for place, i in enumerate(batch)]
                self.given.append(draws)
                gave = True
                yield draws
            if not self.iterations:
                return
            self._set_epoch(epoch + 1)
            if gave or number < 0:
                return

    def __len__(self) -> int:
        return len(self._batches)
