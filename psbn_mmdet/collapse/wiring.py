"""How a network is wired, channel by channel, found by running it: the one account of it.

It is run under :mod:`.shadows`, which sees every operation of torch's dispatcher and keeps, for
each element of each tensor, the id of the *node* that it belongs to. A node is one value per
channel: a filter of a convolution, a channel of a normalization layer, what an operation makes of
these.

- Data movement (concatenation, padding, channel shuffle, slices, focus) is **executed on the
  shadow**, so that which channel arrives where is found and never modelled.
- Elementwise operations, and pooling within a channel, make one new node of each distinct
  combination of the nodes that come in.
- Convolutions, linear layers, BatchNorm and InstanceNorm are recognised by their weights, which
  must be parameters of the model, not by the type of the module. What a subclass does in a
  forward of its own (padding, say) is seen as what it is.
- Whatever else reads a tensor (GroupNorm, attention, softmax over channels, an unknown or a custom
  operation) is *opaque*: what arrives there must stay as it is, and is held with a reason. One
  operation that is not understood never refuses the network.
- Operators that write memory out of the dispatcher's sight, as mmcv's do, are found as a memory
  checker finds them: by reading memory that nothing is known to have written.

A node is **frozen** if it is the same number for every input of the network, as follows from what
it depends on, not from the numbers that happen to come out. A product with a frozen 0 is one.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .shadows import COMPARISONS, LEAKY, LINEAR, Block, Norm, Reader, Tracer, plain, tensors_in

__all__ = [
    "Block",
    "Channel",
    "Norm",
    "Reader",
    "Rectifier",
    "Run",
    "Wiring",
    "connected",
    "tensors_in",
    "trace",
]

Run = Callable[[nn.Module], Any]
"""Calls the model it is given, with inputs of its own, and returns what it returns."""


@dataclasses.dataclass(frozen=True)
class Rectifier:
    """An operation with a region of gradient exactly 0, where a channel meets it.

    Args:
        op: ``relu``, ``hardtanh``, ``clamp``, ``threshold``, ``hardswish``, ``hardsigmoid``,
            ``where``, ``maximum``, ``minimum`` or ``mul`` (x * (x > 0)).
        module: In which it is called.
        after_sum: Whether another channel that varies was added or multiplied before it.
        firing: Share of the positions of the run at which it let a gradient through.
    """

    op: str
    module: str
    after_sum: bool
    firing: float


@dataclasses.dataclass(frozen=True)
class Channel:
    """What is in front of and behind one channel of a normalization layer.

    Args:
        norm, index: The layer, by the name of its module, and the channel.
        producers: (convolution or linear layer, filter) right in front: one, more where the
            layer is called on several, none where something else stands between.
        readers: (layer, input channel) of all convolutions and linear layers that what this channel
            feeds arrives at, through activations, sums, pooling and data movement. An
            InstanceNorm or BatchNorm on the way ends it and counts as a reader, (layer, channel).
        rectifiers: The first on each way.
        activation: The first operation right behind that is not linear: the name of the
            rectifier, ``leaky`` (LeakyReLU, PReLU, ELU), ``smooth`` (SiLU, GELU, sigmoid ...),
            ``sum`` where another channel that varies comes in first, ``none``; ``mixed`` where
            several ways differ.
        held: Why what it feeds must stay whatever it carries: outputs and operations that are not
            understood.
    """

    norm: str
    index: int
    producers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]
    rectifiers: tuple[Rectifier, ...]
    activation: str
    held: tuple[str, ...]


class Wiring:
    """The account of one or several runs of a network; made by :func:`trace`.

    Attributes:
        norms: Norm by the name of its module, in order of first use.
        readers: Reader by the name of its weight, as ``layer1.0.conv1.weight``.
        blocks: All nodes in order of creation.
        held: What must stay and why.
        value: (nodes,) float64, a sample of the numbers at each node; of a frozen node the number.
        free: (nodes,) bool, whether it depends on no input of the network.
        computed: Weights, of two dimensions and more, that something else than its layer reads.
        training: Whether it is of the network in training mode.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.blocks, self.norms, self.held = tracer.blocks, tracer.norms, tracer.held
        self.readers = tracer.readers
        self.value = tracer.value[: tracer.size].copy()
        self.free = tracer.free[: tracer.size].copy()
        self._unsteady = tracer.unsteady[: tracer.size].copy()
        self.computed = frozenset(tracer.computed)
        self.training = False
        self._edges = np.concatenate([np.empty((0, 2), np.int64), *tracer.edges])
        self._constants = {k: v.numpy() for k, v in tracer.constants.items()}
        self._starts = [block.start for block in self.blocks]

    @property
    def layers(self) -> list[Reader | Norm]:
        """All that reads channels and makes others of them."""
        return [*self.readers.values(), *self.norms.values()]

    @property
    def size(self) -> int:
        return len(self.value)

    def block_of(self, node: int) -> Block:
        return self.blocks[bisect_right(self._starts, node) - 1]

    @cached_property
    def kind(self) -> np.ndarray:
        """(nodes,) of the kinds of their blocks."""
        return np.repeat([b.kind for b in self.blocks], [b.size for b in self.blocks])

    @cached_property
    def seen(self) -> np.ndarray:
        """(nodes,) bool, what is returned, or read by an operation that is not understood."""
        seen = np.zeros(self.size, dtype=bool)
        for held in self.held:
            if held.read:
                seen[held.nodes] = True
        return seen

    @cached_property
    def made(self) -> np.ndarray:
        """(E, 2), (node, node that a pointwise operation or pooling makes of it)."""
        pairs = [
            np.stack([block.inputs[:, i], np.arange(block.start, block.start + block.size)], 1)
            for block in self.blocks
            if block.kind in ("pointwise", "pool")
            for i in range(block.inputs.shape[1])
        ]
        joined = np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])
        return joined[joined[:, 0] >= 0]

    @cached_property
    def normed(self) -> np.ndarray:
        """(E, 2), (node, node that a normalization layer makes of it)."""
        pairs = [each.slots[:, ::-1] + np.array([0, each.start]) for each in self.norms.values()]
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs])

    @cached_property
    def frozen(self) -> np.ndarray:
        """(nodes,) bool, whether a node is one number whatever the inputs are.

        The least set that follows: in a network that calls a layer on its own output nothing is
        taken to be frozen because of itself.
        """
        frozen = np.zeros(self.size, dtype=bool)
        for block in self.blocks:
            if block.kind in ("const", "param"):
                frozen[block.start : block.start + block.size] = True
        frozen &= ~self._unsteady
        carries = {name: reader.carries() for name, reader in self.readers.items()}
        while True:
            before = int(frozen.sum())
            for block in self.blocks:
                at = slice(block.start, block.start + block.size)
                if block.kind == "conv":
                    reader = self.readers[block.name]
                    found = ~self._reached(reader, carries[block.name], frozen)
                elif block.kind == "norm":
                    found = self._frozen_channels(self.norms[block.name], frozen)
                elif block.kind == "pointwise":
                    found = self._frozen_pointwise(block, frozen)
                elif block.kind == "pool":
                    found = self._frozen_pool(block, frozen)
                else:
                    continue
                frozen[at] |= found & ~self._unsteady[at]
            if int(frozen.sum()) == before:
                return frozen

    def arriving(self, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
        """What a layer gets: (C_in,) bool, frozen; and (C_in,) the number, NaN if several."""
        return self._slot_state(reader.slots, reader.inputs, self.frozen)

    def used_otherwise(self, reader: Reader) -> bool:
        """Whether anything but a normalization layer reads what a layer puts out."""
        nodes = range(reader.start, reader.start + reader.filters)
        made, read = self._consumers[0], self._read_by
        layers = sum(r.inputs for r in self.readers.values())
        return (
            made[nodes.stop] > made[nodes.start]
            or bool((read[1][read[0][nodes.start] : read[0][nodes.stop]] < layers).any())
            or any(node in self._why_held for node in nodes)
        )

    def _slot_state(
        self, slots: np.ndarray, count: int, frozen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Per input channel: whether all that arrives is frozen, and one number (NaN: several)."""
        index, node = slots.T
        varies = np.zeros(count, dtype=bool)
        np.logical_or.at(varies, index, ~frozen[node])
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        value = np.nan_to_num(self.value[node], nan=np.inf)  # unknown ones do not agree
        np.minimum.at(low, index, value)
        np.maximum.at(high, index, value)
        with np.errstate(invalid="ignore"):
            same = np.abs(high - low) <= 1e-6 * np.maximum(np.abs(low), np.abs(high))
        return ~varies & np.isfinite(low), np.where(same, high, np.nan)

    def _reached(self, reader: Reader, carries: np.ndarray, frozen: np.ndarray) -> np.ndarray:
        """(C_out,) bool, whether a filter has a weight for something that is not frozen."""
        steady, value = self._slot_state(reader.slots, reader.inputs, frozen)
        matters = ~steady | np.isnan(value)
        if reader.pads or reader.transposed:  # what a constant gives differs at the border
            matters |= value != 0
        per_group = matters.reshape(reader.groups, 1, -1)
        parts = carries.reshape(reader.groups, -1, carries.shape[1])
        return (parts & per_group).any(2).reshape(-1)

    def _frozen_channels(self, norm: Norm, frozen: np.ndarray) -> np.ndarray:
        steady, value = self._slot_state(norm.slots, norm.channels, frozen)
        found = steady & ~np.isnan(value)
        given = self._constants.get(norm.name)
        if given is not None:
            found |= ~np.isnan(given)
        weight = self.block_of(norm.start).inputs[:, 0]
        return found | ((weight >= 0) & frozen[weight] & (self.value[weight] == 0))

    def _frozen_pointwise(self, block: Block, frozen: np.ndarray) -> np.ndarray:
        given = block.inputs
        steady = frozen[given]
        found = steady.all(1)
        if block.name in ("mul", "mul_"):
            found |= (steady & (self.value[given] == 0)).any(1)
        elif block.name in ("div", "div_"):
            found |= steady[:, 0] & (self.value[given[:, 0]] == 0)
        return found

    def _frozen_pool(self, block: Block, frozen: np.ndarray) -> np.ndarray:
        if block.survives == "never":
            return np.zeros(block.size, dtype=bool)
        given = block.inputs
        none = given < 0
        low = np.where(none, np.inf, self.value[given]).min(1)
        high = np.where(none, -np.inf, self.value[given]).max(1)
        found = (frozen[given] | none).all(1) & (low == high)
        return found & (low == 0) if block.survives == "zero" else found

    def frozen_inputs(self, reader: str) -> np.ndarray:
        """(C_in,) bool, the input channels of a layer that carry nothing but frozen numbers.

        Args:
            reader: Name of its weight.
        """
        found = self.readers[reader]
        steady = np.ones(found.inputs, dtype=bool)
        index, node = found.slots.T
        np.logical_and.at(steady, index, self.frozen[node])
        return steady

    def free_inputs(self, reader: str) -> np.ndarray:
        """(C_in,) bool, those that get nothing of the network's input: a DETR's first queries."""
        found = self.readers[reader]
        free = np.ones(found.inputs, dtype=bool)
        index, node = found.slots.T
        np.logical_and.at(free, index, self.free[node])
        return free

    # Forwards from a channel -------------------------------------------------------------

    @cached_property
    def _consumers(self) -> tuple[np.ndarray, np.ndarray]:
        """Node -> nodes made of it by pointwise operations and pooling, as CSR."""
        return self._csr([self.made])

    @cached_property
    def _read_by(self) -> tuple[np.ndarray, np.ndarray]:
        """Node -> (layer, input channel), numbered as in ``_slot_names``, as CSR."""
        pairs, at = [], 0
        for each in self.layers:
            pairs.append(each.slots[:, ::-1] + np.array([0, at]))
            at += each.inputs
        return self._csr(pairs)

    @cached_property
    def _slot_names(self) -> list[tuple[str, int]]:
        return [(each.module, i) for each in self.layers for i in range(each.inputs)]

    def _csr(self, pairs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        joined = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)
        joined = joined[joined[:, 0] >= 0]
        joined = joined[np.argsort(joined[:, 0], kind="stable")]
        ends = np.searchsorted(joined[:, 0], np.arange(self.size + 1))
        return ends, joined[:, 1]

    @cached_property
    def _joins(self) -> np.ndarray:
        """(nodes,) bool, whether several nodes that vary come in, as in a sum."""
        joins = np.zeros(self.size, dtype=bool)
        for block in self.blocks:
            varies = (block.inputs >= 0) & ~self.free[block.inputs]
            joins[block.start : block.start + block.size] = varies.sum(1) > 1
        return joins

    @cached_property
    def _why_held(self) -> dict[int, list[str]]:
        whys: dict[int, list[str]] = defaultdict(list)
        for held in self.held:
            for node in np.unique(held.nodes):
                if held.why not in whys[int(node)]:
                    whys[int(node)].append(held.why)
        return whys

    def channel(self, norm: str, index: int) -> Channel:
        """What is in front of and behind a channel of a normalization layer.

        Args:
            norm: Name of its module.
            index: The channel.

        Raises:
            KeyError: The layer did not run.
        """
        layer = self.norms[norm]
        producers = []
        for node in layer.slots[layer.slots[:, 0] == index, 1]:
            block = self.block_of(int(node))
            if block.kind == "conv":
                producers.append((self.readers[block.name].module, int(node) - block.start))
        readers: dict[tuple[str, int], None] = {}
        rectifiers: dict[Rectifier, None] = {}
        activations: dict[str, None] = {}
        whys: dict[str, None] = {}
        ends, made = self._consumers
        read_ends, read = self._read_by
        # (node, whether something was added, whether the first activation is behind)
        todo = [(layer.start + index, False, "linear")]
        seen = set(todo)
        while todo:
            node, summed, state = todo.pop()
            whys.update(dict.fromkeys(self._why_held.get(node, ())))
            slots = read[read_ends[node] : read_ends[node + 1]]
            readers.update((self._slot_names[slot], None) for slot in slots)
            if state == "linear" and (len(slots) or node in self._why_held):
                activations["none"] = None
            for child in made[ends[node] : ends[node + 1]].tolist():
                block, next_state, next_summed = self.block_of(child), state, summed
                at = child - block.start
                if self._joins[child] and block.firing is None:
                    next_summed = True
                    if state == "linear":
                        activations["sum"] = None
                        next_state = "summed"
                if plain(block.name) in COMPARISONS:
                    next_state = "rectified"  # no gradient takes this way
                elif block.firing is not None:
                    if state in ("linear", "summed"):
                        found = Rectifier(
                            plain(block.name), block.module, summed, float(block.firing[at])
                        )
                        rectifiers[found] = None
                        if state == "linear":
                            activations[found.op] = None
                    next_state = "rectified"
                elif state == "linear" and block.kind == "pointwise":
                    nature = _nature(block.name)
                    if nature != "linear":
                        activations[nature] = None
                        next_state = "summed"  # rectifiers behind still count
                step = (child, next_summed, next_state)
                if step not in seen:
                    seen.add(step)
                    todo.append(step)
        kinds = list(activations)
        activation = kinds[0] if len(kinds) == 1 else "mixed" if kinds else "none"
        return Channel(
            norm,
            index,
            tuple(producers),
            tuple(readers),
            tuple(rectifiers),
            activation,
            tuple(whys),
        )

    def channels(self, norm: str) -> list[Channel]:
        """All channels of a normalization layer."""
        return [self.channel(norm, i) for i in range(self.norms[norm].channels)]

    def output(self, norm: str) -> slice:
        """The nodes of a layer's channels."""
        layer = self.norms[norm]
        return slice(layer.start, layer.start + layer.channels)

    # What goes or stays together ---------------------------------------------------------

    @cached_property
    def group(self) -> np.ndarray:
        """(nodes,) label of the channel that a node belongs to.

        Channels that meet in a sum or product are one; so are what arrives in one input channel of
        a shared layer from several places, and input and filter of a depthwise convolution.
        """
        pairs = [self._edges]
        for each in self.layers:
            order = each.slots[np.lexsort((each.slots[:, 1], each.slots[:, 0]))]
            order = order[~self.free[order[:, 1]]]
            same = order[1:, 0] == order[:-1, 0]
            pairs.append(np.stack([order[1:, 1][same], order[:-1, 1][same]], 1))
            if isinstance(each, Norm):
                index, node = order.T
                pairs.append(np.stack([each.start + index, node], 1))
            elif each.depthwise:
                index, node = order.T
                times = each.filters // each.groups
                for i in range(times):
                    pairs.append(np.stack([each.start + index * times + i, node], 1))
        return connected(self.size, np.concatenate(pairs))

    def writers(self, norm: str, index: int) -> list[tuple[str, int]]:
        """All channels of normalization layers, (layer, channel), that go or stay with this one."""
        label = self.group[self.norms[norm].start + index]
        nodes = np.flatnonzero(self.group == label)
        return [
            (layer.name, int(node) - layer.start)
            for layer in self.norms.values()
            for node in nodes[(nodes >= layer.start) & (nodes < layer.start + layer.channels)]
        ]


def _nature(name: str) -> str:
    name = plain(name)
    return "linear" if name in LINEAR else "leaky" if name in LEAKY else "smooth"


def connected(size: int, pairs: np.ndarray) -> np.ndarray:
    """(size,) label of the connected component of each node: the smallest node in it.

    Args:
        size: How many nodes there are.
        pairs: (E, 2), edges.
    """
    label = np.arange(size)
    a, b = pairs.T.astype(np.int64) if len(pairs) else np.empty((2, 0), dtype=np.int64)
    while True:
        low = np.minimum(label[a], label[b])
        before = label.copy()
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while True:
            jumped = label[label]
            if np.array_equal(jumped, label):
                break
            label = jumped
        if np.array_equal(before, label):
            return label


@torch.no_grad()
def trace(
    model: nn.Module,
    run: Run,
    constants: Mapping[str, Tensor] | None = None,
    watch: frozenset[int] = frozenset(),
) -> Wiring:
    """Run a network and take down how its channels are wired.

    The model is run as it is, in training or eval mode, without gradients; nothing of it is changed
    (in training mode its running statistics are, as in any run).

    Args:
        model: Any module.
        run: Calls it.
        constants: By normalization layer, (C,): channels that put out this number instead of what
            they compute, NaN for the others. The network runs on as if it were so.
        watch: Numbers of channels: all that any tensor of so many channels holds must stay, as a
            layer that did not run may read it.

    Raises:
        Whatever ``run`` raises, with the module that was entered last as ``in_module``.
    """
    given = {k: v.detach().double().cpu() for k, v in (constants or {}).items()}
    tracer = Tracer(model, given, watch)
    with ExitStack() as stack:
        tracer.hook(stack)
        stack.enter_context(torch.no_grad())
        try:
            with tracer:
                outputs = run(model)
        except Exception as error:
            setattr(error, "in_module", tracer.last)  # noqa: B010 (not an attribute of its class)
            raise
        for tensor in tensors_in(outputs):
            tracer.hold([tracer.ids(tensor)], "the model returns it")
    return Wiring(tracer)
