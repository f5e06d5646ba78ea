"""How a network is wired, channel by channel, found by running it: the one account of it.

While the network runs, a :class:`TorchDispatchMode` sees every operation that torch's dispatcher
sees. Each tensor has a *shadow*: an integer beside each of its elements, the id of the *node* that
the element belongs to. A node is one value per channel: a filter of a convolution, a channel of a
normalization layer, what an operation makes of these.

- Data movement (concatenation, padding, channel shuffle, slices, focus) is **executed on the
  shadow**, so that which channel arrives where is found and never modelled. Shadows are kept per
  storage, so that views need no rule at all and writes into views are seen.
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
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

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


@dataclasses.dataclass
class Reader:
    """A convolution or linear layer as it ran: what arrives in its input channels.

    Args:
        name: Of the parameter that is its weight.
        start: Node of its first filter; ``filters`` follow each other.
        filters, inputs, groups: C_out, C_in and the number of groups.
        transposed: Whether it is a transposed convolution.
        pads: Whether it ever sees zeros beside its input.
        weight: The parameter.
        linear: Whether it is a matrix product.
    """

    name: str
    start: int
    filters: int
    inputs: int
    groups: int
    transposed: bool
    linear: bool
    weight: Tensor = dataclasses.field(repr=False)
    pads: bool = False
    _slots: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @cached_property
    def slots(self) -> np.ndarray:
        """(K, 2): (input channel, node) of all that arrives, over all calls, each pair once."""
        return np.unique(np.concatenate(self._slots), axis=0)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.inputs and self.groups > 1

    def carries(self) -> np.ndarray:
        """(C_out, C_in / groups) bool, whether a weight is not exactly 0."""
        weight = self.weight.detach()
        nonzero = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        if self.transposed:
            parts = nonzero.unflatten(0, (self.groups, -1)).transpose(1, 2)
            nonzero = parts.flatten(0, 1)
        return nonzero.cpu().numpy()


@dataclasses.dataclass
class Norm:
    """A BatchNorm or InstanceNorm as it ran.

    Args:
        name: Of its module.
        start: Node of its first channel; ``channels`` follow each other.
        slots: (K, 2), (channel, node) of all that arrives.
        tracked: Whether it ever normalized by its running statistics.
        statistics: Whether it ever normalized by statistics of its input.
    """

    name: str
    start: int
    channels: int
    tracked: bool = False
    statistics: bool = False
    _slots: list[np.ndarray] = dataclasses.field(default_factory=list, repr=False)

    @cached_property
    def slots(self) -> np.ndarray:
        return np.unique(np.concatenate(self._slots), axis=0)


@dataclasses.dataclass
class Block:
    """Nodes that came into being together.

    Args:
        kind: ``const``, ``param`` (elements of a vector among the parameters and buffers),
            ``whole`` (all of another parameter), ``data`` (made of no input), ``input``,
            ``opaque``, ``conv``, ``norm``, ``pointwise`` or ``pool``.
        name: Of the operation, or of the parameter.
        inputs: (size, arity) nodes, -1 for none; of convolutions and normalization layers none.
        aligned: (arity,), whether that operand runs along with the result, channel by channel, so
            that they go or stay together; else it is broadcast.
        module: In which it was made.
        survives: Of a pooled constant: ``always``, ``zero`` (only 0) or ``never``.
        firing: (size,), share of positions with a gradient; None if it is no rectifier.
        added: Whether several nodes that vary come in.
    """

    kind: str
    name: str
    start: int
    size: int
    inputs: np.ndarray
    aligned: tuple[bool, ...] = ()
    module: str = ""
    survives: str = "always"
    firing: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Held:
    """Nodes that must stay.

    Args:
        nodes: All of them, as the operation got them (compacted), for a comparison of two runs.
        why: As "GroupNorm neck.gn reads it".
    """

    nodes: np.ndarray
    why: str


class Wiring:
    """The account of one or several runs of a network; made by :func:`trace`.

    Attributes:
        norms: Norm by the name of its module, in order of first use.
        readers: Reader by the name of its weight, as ``layer1.0.conv1.weight``.
        blocks: All nodes in order of creation.
        held: What must stay and why.
        value: (nodes,) float64, a sample of the numbers at each node; of a frozen node the number.
        free: (nodes,) bool, whether it depends on no input of the network.
    """

    def __init__(
        self,
        blocks: list[Block],
        norms: dict[str, Norm],
        readers: dict[str, Reader],
        held: list[Held],
        value: np.ndarray,
        free: np.ndarray,
        unsteady: np.ndarray,
        edges: np.ndarray,
        constants: Mapping[str, np.ndarray],
        computed: frozenset[str],
    ) -> None:
        self.computed = computed
        """Weights, of two dimensions and more, that something else than its layer reads."""
        self.training = False
        """Whether it is of the network in training mode."""
        self.blocks, self.norms, self.readers, self.held = blocks, norms, readers, held
        self.value, self.free, self._unsteady = value, free, unsteady
        self.edges = edges
        """(E, 2): nodes that go or stay together: operands and results, parameters and channels."""
        self.constants = constants
        self._starts = np.array([block.start for block in blocks])

    @property
    def size(self) -> int:
        return len(self.value)

    def block_of(self, node: int) -> Block:
        return self.blocks[int(np.searchsorted(self._starts, node, side="right")) - 1]

    @cached_property
    def kind(self) -> np.ndarray:
        """(nodes,) of the kinds of their blocks."""
        return np.repeat([b.kind for b in self.blocks], [b.size for b in self.blocks])

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
        given = self.constants.get(norm.name)
        if given is not None:
            found |= ~np.isnan(given)
        block = self.blocks[int(np.searchsorted(self._starts, norm.start))]
        weight = block.inputs[:, 0]
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
        """(C_in,) bool, the input channels of a layer that carry nothing but frozen numbers."""
        found = self.readers[reader]
        steady = np.ones(found.inputs, dtype=bool)
        index, node = found.slots.T
        np.logical_and.at(steady, index, self.frozen[node])
        return steady

    # Forwards from a channel -------------------------------------------------------------

    @cached_property
    def _consumers(self) -> tuple[np.ndarray, np.ndarray]:
        """Node -> nodes made of it by pointwise operations and pooling, as CSR."""
        pairs = [
            np.stack([block.inputs[:, i], np.arange(block.start, block.start + block.size)], 1)
            for block in self.blocks
            if block.kind in ("pointwise", "pool")
            for i in range(block.inputs.shape[1])
        ]
        return self._csr(pairs)

    @cached_property
    def _read_by(self) -> tuple[np.ndarray, np.ndarray]:
        """Node -> (reader, input channel), numbered as in ``_slot_names``, as CSR."""
        pairs, at = [], 0
        for each in (*self.readers.values(), *self.norms.values()):
            size = each.inputs if isinstance(each, Reader) else each.channels
            pairs.append(each.slots[:, ::-1] + np.array([0, at]))
            at += size
        return self._csr(pairs)

    @cached_property
    def _slot_names(self) -> list[tuple[str, int]]:
        return [
            (each.module if isinstance(each, Reader) else each.name, i)
            for each in (*self.readers.values(), *self.norms.values())
            for i in range(each.inputs if isinstance(each, Reader) else each.channels)
        ]

    def _csr(self, pairs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        joined = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=np.int64)
        joined = joined[joined[:, 0] >= 0]
        joined = joined[np.argsort(joined[:, 0], kind="stable")]
        ends = np.searchsorted(joined[:, 0], np.arange(self.size + 1))
        return ends, joined[:, 1]

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
            for child in made[ends[node] : ends[node + 1]]:
                block, next_state, next_summed = self.block_of(int(child)), state, summed
                at = int(child) - block.start
                given = block.inputs[at]
                if (~self.free[given[given >= 0]]).sum() > 1 and block.firing is None:
                    next_summed = True
                    if state == "linear":
                        activations["sum"] = None
                        next_state = "summed"
                if _plain(block.name) in _COMPARISONS:
                    next_state = "rectified"  # no gradient takes this way
                elif block.firing is not None:
                    if state in ("linear", "summed"):
                        found = Rectifier(
                            _plain(block.name), block.module, summed, float(block.firing[at])
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
                step = (int(child), next_summed, next_state)
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
        pairs = [self.edges]
        for each in (*self.readers.values(), *self.norms.values()):
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
        Whatever ``run`` raises.
    """
    given = {k: v.detach().double().cpu() for k, v in (constants or {}).items()}
    tracer = _Tracer(model, given, watch)
    with ExitStack() as stack:
        tracer.hook(stack)
        stack.enter_context(torch.no_grad())
        with tracer:
            outputs = run(model)
        for tensor in tensors_in(outputs):
            tracer.hold([tracer.ids(tensor)], "the model returns it")
    return tracer.result()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists, dicts, dataclasses and mmengine's data elements."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif hasattr(value, "all_values"):  # of mmengine
        value = list(value.all_values())
    if isinstance(value, (tuple, list)):
        return [tensor for child in value for tensor in tensors_in(child)]
    return []


# The operations --------------------------------------------------------------------------


def _plain(name: str) -> str:
    return name.rstrip("_")


_LEAKY = {"leaky_relu", "_prelu_kernel", "elu", "celu", "selu", "rrelu_with_noise"}
_LINEAR = {"add", "sub", "rsub", "mul", "div", "neg", "positive", "lerp", "addcmul", "addcdiv"}
_RECTIFIERS = frozenset(
    [
        "relu",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "threshold",
        "hardswish",
        "hardsigmoid",
        "maximum",
        "minimum",
        "where",
        "mul",
    ]
)
_COMPARISONS = {"gt", "ge", "lt", "le"}
_ALSO_POINTWISE = {"hardswish", "hardswish_", "_prelu_kernel", "rrelu_with_noise"}
_NORMS = frozenset(
    [
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
    ]
)
_MOVES = frozenset(
    [
        "cat",
        "stack",
        "index",
        "index_select",
        "gather",
        "take",
        "flip",
        "roll",
        "rot90",
        "repeat",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "native_channel_shuffle",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "tril",
        "triu",
        "im2col",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_nearest3d",
        "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d",
        "_upsample_nearest_exact3d",
        "masked_select",
        "index_put",
        "index_put_",
        "scatter",
        "scatter_",
        "masked_scatter",
        "masked_scatter_",
        "index_copy",
        "index_copy_",
        "repeat_interleave",
        "split_copy",
        "split_with_sizes_copy",
        "unbind_copy",
        "unsafe_split",
        "unsafe_split_with_sizes",
        "unsafe_chunk",
        "view_copy",
        "slice_copy",
        "permute_copy",
        "expand_copy",
    ]
)
_INDICES = {"index", "indices", "mask", "repeats"}
_POOLS = {
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool3d": 3,
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
}
# Along dimensions; what becomes of a constant.
_REDUCTIONS = {
    "mean": "always",
    "amax": "always",
    "amin": "always",
    "max": "always",
    "min": "always",
    "median": "always",
    "sum": "zero",
    "cumsum": "zero",
    "norm": "zero",
    "linalg_vector_norm": "zero",
    "var": "zero",
    "std": "zero",
    "var_mean": "never",
    "std_mean": "never",
    "_softmax": "never",
    "_log_softmax": "never",
    "logsumexp": "never",
    "argmax": "never",
    "argmin": "never",
    "prod": "never",
    "any": "never",
    "all": "never",
}
_ZEROS = {"zeros", "zeros_like", "new_zeros", "zero_"}
_ONES = {"ones", "ones_like", "new_ones"}
_FULL = {"full", "full_like", "new_full", "fill_", "scalar_tensor"}
_EMPTY = frozenset(
    ["empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"]
)
_DRAWN = frozenset(
    [
        "normal_",
        "uniform_",
        "bernoulli_",
        "random_",
        "exponential_",
        "log_normal_",
        "cauchy_",
        "geometric_",
        "rand_like",
        "randn_like",
        "randint_like",
    ]
)


def _nature(name: str) -> str:
    name = _plain(name)
    return "linear" if name in _LINEAR else "leaky" if name in _LEAKY else "smooth"


@dataclasses.dataclass
class _Memory:
    """The shadow of a storage; ``expect``: what no seen operation has written since it was made."""

    ref: StorageWeakRef
    ids: Tensor
    itemsize: int
    expect: float | None = None


_UNSET = float("nan")


class _Tracer(TorchDispatchMode):
    def __init__(
        self, model: nn.Module, constants: Mapping[str, Tensor], watch: frozenset[int]
    ) -> None:
        super().__init__()
        self.model, self.constants, self.watch = model, constants, watch
        self.memory: dict[int, _Memory] = {}
        self.blocks: list[Block] = []
        self.size = 0
        self._value = np.zeros(1024)
        self._free = np.zeros(1024, dtype=bool)
        self._unsteady = np.zeros(1024, dtype=bool)
        self._single = np.zeros(1024, dtype=bool)  # a number that belongs to no channel
        self._compared = np.zeros(1024, dtype=bool)  # the result of a comparison
        self.norms: dict[str, Norm] = {}
        self.readers: dict[str, Reader] = {}
        self.held: list[Held] = []
        self.edges: list[np.ndarray] = []
        self._param_of: dict[int, tuple[str, int]] = {}  # start of its block -> name
        self._consts: dict[float, int] = {}
        self._modules: list[tuple[str, nn.Module, list[Tensor]]] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._params: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not nn.parameter.is_lazy(tensor) and tensor.layout == torch.strided:
                self._params[tensor.untyped_storage()._cdata].append((name, tensor))
        self.computed: set[str] = set()
        self._calls = 0
        self.const(0.0)  # node 0: what padding writes

    # Nodes ---------------------------------------------------------------------------

    def block(
        self,
        kind: str,
        name: str,
        size: int,
        inputs: np.ndarray | None = None,
        *,
        free: Any = False,
        value: Any = np.nan,
        **others: Any,
    ) -> int:
        start, end = self.size, self.size + size
        while end > len(self._value):
            for each in ("_value", "_free", "_unsteady", "_single", "_compared"):
                array = getattr(self, each)
                setattr(self, each, np.concatenate([array, np.zeros_like(array)]))
        if inputs is None:
            inputs = np.empty((size, 0), dtype=np.int64)
        module = self._modules[-1][0] if self._modules else ""
        self.blocks.append(Block(kind, name, start, size, inputs, module=module, **others))
        self._value[start:end], self._free[start:end] = value, free
        self._single[start:end] = kind in ("const", "data") or (kind == "param" and size == 1)
        self._compared[start:end] = kind == "pointwise" and _plain(name) in _COMPARISONS
        self.size = end
        return start

    def const(self, value: float) -> int:
        value = float(value)
        if value not in self._consts:
            self._consts[value] = self.block("const", repr(value), 1, free=True, value=value)
        return self._consts[value]

    def data(self, name: str) -> int:
        return self.block("data", name, 1, free=True)

    def hold(self, shadows: list[Tensor], why: str) -> None:
        nodes = [_compact(ids).reshape(-1).numpy().astype(np.int64) for ids in shadows]
        if nodes:
            joined = np.concatenate(nodes)
            self.held.append(Held(joined, why))

    def where(self) -> str:
        if not self._modules:
            return "code outside of the model"
        name, module, _ = self._modules[-1]
        return f"{type(module).__name__} {name}" if name else type(module).__name__

    # Shadows -------------------------------------------------------------------------

    def ids(self, tensor: Tensor) -> Tensor:
        """The shadow of a tensor, a view of its storage's."""
        if tensor.layout != torch.strided or tensor.is_meta:
            return torch.full(tensor.shape, self.block("opaque", "layout", 1), dtype=torch.int32)
        key = tensor.untyped_storage()._cdata
        memory = self.memory.get(key)
        if memory is None or memory.itemsize != tensor.element_size():
            memory = self._adopt(tensor, memory)
        if memory.expect is not None:
            self._expect(tensor, memory)
        return memory.ids.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _new_memory(self, tensor: Tensor, fill: int) -> _Memory:
        storage = tensor.untyped_storage()
        count = storage.nbytes() // max(tensor.element_size(), 1)
        ids = torch.full((count,), fill, dtype=torch.int32)
        memory = _Memory(StorageWeakRef(storage), ids, tensor.element_size())
        self.memory[storage._cdata] = memory
        return memory

    def _adopt(self, tensor: Tensor, other: _Memory | None) -> _Memory:
        """The shadow of memory that no seen operation has made, or of another view of its bytes."""
        if other is not None:
            nodes = np.unique(other.ids.numpy()).astype(np.int64)
            free = bool(self._free[nodes].all())
            if not free:
                self.hold([other.ids], f"{self.where()} reads its bytes as another type")
            return self._new_memory(tensor, self.block("opaque", "bytes", 1, free=free))
        owned = self._params.get(tensor.untyped_storage()._cdata)
        if owned:
            memory = self._new_memory(tensor, 0)
            for name, param in owned:
                at = memory.ids.as_strided(param.size(), param.stride(), param.storage_offset())
                if param.numel() == max((*param.shape, 1)):
                    value = param.detach().double().reshape(-1).cpu().numpy()
                    size = param.numel()
                    start = self.block("param", name, size, free=True, value=value)
                    self._param_of[start] = name, size
                    at.copy_(torch.arange(start, start + size).view(param.shape))
                else:
                    at.fill_(self.block("whole", name, 1, free=True))
                    self.computed.add(name)
            return memory
        if not tensor.is_floating_point():
            return self._new_memory(tensor, self.data("given"))
        return self.adopt_input(tensor)

    def adopt_input(self, tensor: Tensor) -> _Memory:
        start = self.block("input", "input", 1)
        memory = self._new_memory(tensor, start)
        self._write_fresh(tensor, "input", "input", False)
        return memory

    def write(self, tensor: Tensor, ids: Tensor | int) -> None:
        """Note what an operation wrote."""
        key = tensor.untyped_storage()._cdata
        memory = self.memory.get(key)
        if memory is None or memory.itemsize != tensor.element_size():
            memory = self._new_memory(tensor, 0)
        memory.expect = None
        at = memory.ids.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        if isinstance(ids, int):
            at.fill_(ids)
        else:
            at.copy_(ids.expand(tensor.shape))
        self._watched(tensor)

    def _watched(self, tensor: Tensor) -> None:
        if self.watch and tensor.dim() > 1 and self.watch & {tensor.shape[1], tensor.shape[-1]}:
            ids = np.unique(_compact(self.ids(tensor)).numpy())
            ids = ids[~self._free[ids]]
            if len(ids):
                self.hold([torch.from_numpy(ids)], "a layer that did not run may read it")

    def _write_fresh(self, tensor: Tensor, kind: str, name: str, free: bool) -> None:
        """Fresh nodes, one for each index of dimension 1."""
        size = tensor.shape[1] if tensor.dim() > 1 and not free else 1
        size = size if 0 < size <= 65536 else 1
        kind = "data" if free else kind
        start = self.block(kind, name, size, free=free)
        ids = torch.arange(start, start + size, dtype=torch.int32)
        self.write(
            tensor,
            ids.view([-1 if d == 1 else 1 for d in range(max(tensor.dim(), 1))])
            if size > 1
            else start,
        )

    def _expect(self, tensor: Tensor, memory: _Memory) -> None:
        """Memory that is read although nothing was seen to write it: somebody unseen did."""
        if memory.expect == memory.expect:
            same = torch.equal(tensor, torch.full_like(tensor, memory.expect))
            if same:
                return
        memory.expect = None
        if self._modules and self._modules[-1][2]:
            read = [self.ids(t) for t in self._modules[-1][2]]
        else:
            read = [m.ids for m in self.memory.values() if m is not memory and not m.ref.expired()]
        nodes = np.unique(np.concatenate([_compact(r).reshape(-1).numpy() for r in read] or [[0]]))
        nodes = nodes[~self._free[nodes.astype(np.int64)]]
        if len(nodes):
            self.hold([torch.from_numpy(nodes)], f"an operator of {self.where()} reads it")
        memory.ids.fill_(self.block("opaque", "unseen", 1, free=not len(nodes)))
        self._write_fresh(tensor, "opaque", "unseen", not len(nodes))

    # Modules -------------------------------------------------------------------------

    def hook(self, stack: ExitStack) -> None:
        """Know in which module the network is, for names and for operators out of sight."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = [t for t in tensors_in([args, kwargs]) if t.layout == torch.strided]
            if module is self.model:
                for tensor in given:
                    key = tensor.untyped_storage()._cdata
                    if key not in self.memory and key not in self._params:
                        self.adopt_input(tensor)
            self._modules.append((self._names[module], module, given))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._modules and self._modules[-1][1] is module:
                for tensor in tensors_in(output):
                    self.ids(tensor)  # written by what was seen?
                self._modules.pop()

        for module in self._names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)

    # Operations ----------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        if self._calls % 256 == 0:
            for key in [k for k, m in self.memory.items() if m.ref.expired()]:
                del self.memory[key]
        if torch.is_inference_mode_enabled():  # composite operations arrive as one
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func.is_view:
            out = func(*args, **kwargs)
            for tensor in tensors_in(out) if self.watch else ():
                self._watched(tensor)
            return out
        schema = func._schema
        given = {a.name: v for a, v in zip(schema.arguments, args)}
        given.update(kwargs)
        name = schema.name.partition("::")[2]
        ours = schema.name.startswith("aten::")
        plain = _plain(name)
        if not ours:
            return self._opaque(func, args, kwargs, name)
        if name in (
            "clone",
            "_to_copy",
            "contiguous",
            "copy_",
            "_unsafe_view",
            "lift_fresh",
            "detach",
            "alias",
            "_reshape_alias",
            "lift",
            "_reshape_copy",
        ):
            return self._copied(func, args, kwargs, name, given)
        if name in _ZEROS | _ONES | _FULL | _EMPTY | _DRAWN or not tensors_in([args, kwargs]):
            return self._made(func, args, kwargs, name, given)
        if name in _NORMS:
            return self._norm(func, args, kwargs, name, given)
        if name in ("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"):
            return self._convolution(func, args, kwargs, name, given)
        if name in ("addmm", "mm", "linear"):
            return self._product(func, args, kwargs, name, given)
        if name in _MOVES:
            return self._moved(func, args, kwargs, name, given)
        if name in _POOLS or name in _REDUCTIONS:
            return self._pooled(func, args, kwargs, name, given)
        if torch.Tag.pointwise in func.tags or name in _ALSO_POINTWISE:
            return self._pointwise(func, args, kwargs, name, plain, given)
        return self._opaque(func, args, kwargs, name)

    def _copied(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        source = given["src"] if name == "copy_" else given["self"]
        ids = None
        if name == "lift_fresh" or name == "lift":
            if source.untyped_storage()._cdata not in self.memory:
                one = source.numel() == 1 and not source.is_complex()
                self._new_memory(source, self.const(float(source)) if one else self.data("literal"))
            return func(*args, **kwargs)
        if name in ("clone", "_to_copy", "contiguous", "copy_", "_reshape_copy"):
            ids = self.ids(source)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.untyped_storage()._cdata != (
            source.untyped_storage()._cdata
        ):
            ids = self.ids(source) if ids is None else ids
            self.write(out, ids.reshape(out.shape) if name == "_reshape_copy" else ids)
        elif name == "copy_" and ids is not None:
            self.write(out, ids.clone())
        return out

    def _made(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        value: Any = None
        if name in _ZEROS:
            value = 0.0
        elif name in _ONES:
            value = 1.0
        elif name in _FULL:
            value = given.get("fill_value", given.get("value", given.get("s")))
        ids = None
        if isinstance(value, Tensor):
            ids, value = self.ids(value).clone(), None
        elif isinstance(value, (bool, int, float)):
            value = float(value)
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            if ids is not None:
                self.write(tensor, ids)
            elif name in _EMPTY:
                memory = self._new_memory(tensor, 0)
                memory.expect = _UNSET
            elif value is not None:
                whole = name != "fill_" and name != "zero_"
                self.write(tensor, self.const(value))
                if whole:
                    key = tensor.untyped_storage()._cdata
                    self.memory[key].expect = float(value)
            else:
                self.write(tensor, self.data(name))
        return out

    def _opaque(self, func: Any, args: Any, kwargs: Any, name: str, why: str = "") -> Any:
        read = tensors_in([args, kwargs])
        writes = [
            v
            for a, v in zip(func._schema.arguments, args)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        writes += [
            kwargs[a.name]
            for a in func._schema.arguments
            if a.name in kwargs and a.alias_info is not None and a.alias_info.is_write
        ]
        shadows = [_compact(self.ids(t)) for t in read]
        nodes = np.concatenate(
            [s.reshape(-1).numpy().astype(np.int64) for s in shadows] or [np.empty(0, np.int64)]
        )
        free = bool(self._free[nodes].all())
        if not free:
            self.hold(shadows, why or f"{self.where()} reads it ({name})")
        known = {t.untyped_storage()._cdata for t in read if t.layout == torch.strided}
        out = func(*args, **kwargs)
        changed = {id(t): t for t in tensors_in(writes)}
        for tensor in tensors_in(out):
            if tensor.layout == torch.strided and tensor.untyped_storage()._cdata not in known:
                changed[id(tensor)] = tensor
        for tensor in changed.values():
            self._write_fresh(tensor, "opaque", name, free)
        return out

    def _pointwise(
        self, func: Any, args: Any, kwargs: Any, name: str, plain: str, given: Any
    ) -> Any:
        operands = [v for v in given.values() if isinstance(v, Tensor)]
        if len(tensors_in([args, kwargs])) != len(operands) or "out" in given:
            return self._opaque(func, args, kwargs, name)
        shadows = [self.ids(t) for t in operands]
        passes = self._passes(plain, given, operands, shadows)
        compact = [_compact(s) for s in shadows]
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return self._fresh_outputs(out, name, compact)
        dims = out.dim()
        compact = [c.reshape((1,) * (dims - c.dim()) + tuple(c.shape)) for c in compact]
        shape = torch.broadcast_shapes(*(c.shape for c in compact)) if compact else ()
        rows, first, inverse = _combinations([c.expand(shape).reshape(-1) for c in compact])
        aligned = []
        for tensor, ids in zip(operands, rows.T, strict=True):
            sizes = (1,) * (dims - tensor.dim()) + tuple(tensor.shape)
            strides = (0,) * (dims - tensor.dim()) + tuple(tensor.stride())
            broadcast = any(
                of > 1 and (size == 1 or stride == 0)
                for of, size, stride in zip(shape, sizes, strides, strict=True)
            )
            aligned.append(not broadcast)
            if broadcast:
                held = np.unique(ids)
                held = held[~self._free[held]]
                if len(held):
                    why = f"{self.where()} spreads it over several channels"
                    self.hold([torch.from_numpy(held)], why)
            else:
                fixed = self._single[ids]
                if fixed.any() and not fixed.all():  # F.pad of a fixed number of channels
                    others = np.setdiff1d(rows[fixed], rows[~fixed])
                    others = others[~self._free[others]]
                    if len(others):
                        why = (
                            f"{self.where()} adds it to padding, of which the code fixes the width"
                        )
                        self.hold([torch.from_numpy(others)], why)
        sample = out
        for d in range(dims):
            if shape[d] == 1 and sample.shape[d] > 1:
                sample = sample.narrow(d, 0, 1)
        empty = out.numel() == 0
        value = np.full(len(rows), np.nan)
        if not empty and not out.is_complex():
            taken = sample.reshape(-1)[torch.from_numpy(first).to(out.device)]
            value = taken.double().cpu().numpy()
        firing = None
        if passes is not None and not empty:
            share = passes.expand(out.shape).double()
            along = [d for d in range(dims) if shape[d] == 1 and out.shape[d] > 1]
            share = (share.mean(along) if along else share).reshape(-1).cpu().numpy()
            count = np.bincount(inverse, minlength=len(rows))
            firing = np.bincount(inverse, share, minlength=len(rows)) / count
        start = self.block(
            "pointwise",
            name,
            len(rows),
            rows,
            free=self._free[rows].all(1),
            value=value,
            aligned=tuple(aligned),
            firing=firing,
        )
        new = np.arange(start, start + len(rows))
        for i, along_with in enumerate(aligned):
            if along_with:
                self._edge(rows[:, i], new)
        self.write(out, torch.from_numpy(inverse.astype(np.int32) + start).view(shape))
        return out

    def _passes(
        self, plain: str, given: Any, operands: list[Tensor], shadows: list[Tensor]
    ) -> Tensor | None:
        """Where a rectifier lets a gradient through; None if it is none."""
        if plain not in _RECTIFIERS:
            return None
        x = operands[0]
        if plain == "relu":
            return x > 0
        if plain == "hardtanh":
            return (x > given.get("min_val", -1)) & (x < given.get("max_val", 1))
        if plain in ("clamp", "clamp_min", "clamp_max"):
            if len(operands) > 1:
                return None
            low, high = given.get("min"), given.get("max")
            inside = torch.ones_like(x, dtype=torch.bool)
            inside = inside if low is None else inside & (x > low)
            return inside if high is None else inside & (x < high)
        if plain == "threshold":
            return x > given["threshold"]
        if plain == "hardswish":
            return x > -3
        if plain == "hardsigmoid":
            return (x > -3) & (x < 3)
        if len(operands) < 2:
            return None
        free = [bool(self._free[np.unique(_compact(s).numpy())].all()) for s in shadows]
        if plain in ("maximum", "minimum") and free[0] != free[1]:
            kept, other = operands if free[1] else reversed(operands)
            return kept > other if plain == "maximum" else kept < other
        if plain == "where" and free[1] != free[2] and self._compares(shadows[0]):
            return operands[0] if free[2] else ~operands[0]
        if plain == "mul" and not any(free):
            for mask, which in ((operands[1], shadows[1]), (operands[0], shadows[0])):
                if self._compares(which):
                    return mask != 0
        return None

    def _compares(self, ids: Tensor) -> bool:
        return ids.numel() > 0 and bool(self._compared[int(ids.reshape(-1)[0])])

    def _edge(self, a: np.ndarray, b: np.ndarray) -> None:
        """Two columns of nodes go or stay together, but for those that are no channels."""
        pairs = np.stack([a, b], 1).astype(np.int64)
        self.edges.append(pairs[~self._single[pairs].any(1)])

    def _fresh_outputs(self, out: Any, name: str, compact: list[Tensor]) -> Any:
        nodes = np.unique(np.concatenate([c.reshape(-1).numpy() for c in compact]))
        free = bool(self._free[nodes].all())
        if not free:
            self.hold(compact, f"{self.where()} reads it ({name})")
        for tensor in tensors_in(out):
            self._write_fresh(tensor, "opaque", name, free)
        return out

    def _moved(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        indices = tensors_in([v for k, v in given.items() if k in _INDICES])
        if (
            given.get("accumulate")
            or given.get("reduce")
            or any(not self._free[np.unique(_compact(self.ids(t)).numpy())].all() for t in indices)
        ):
            return self._opaque(func, args, kwargs, name)

        def shadow(key: str, value: Any) -> Any:
            if key in _INDICES and isinstance(value, Tensor):
                return value.cpu()
            if key in _INDICES and isinstance(value, (list, tuple)) and tensors_in(value):
                return [v if v is None else v.cpu() for v in value]
            if isinstance(value, Tensor):
                return self.ids(value).double()
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                return [self.ids(v).double() for v in value]
            if key == "value" and isinstance(value, (bool, int, float)):
                return self.const(value)
            return value

        names = [a.name for a in func._schema.arguments]
        moved = func(
            *(shadow(k, v) for k, v in zip(names, args)),
            **{k: shadow(k, v) for k, v in kwargs.items()},
        )
        out = func(*args, **kwargs)
        for tensor, ids in zip(tensors_in(out), tensors_in(moved), strict=True):
            self.write(tensor, ids.to(torch.int32))
        return out

    def _pooled(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        read = tensors_in([args, kwargs])
        x = given.get("self", given.get("input"))
        if len(read) != 1 or not isinstance(x, Tensor) or "out" in given:
            return self._opaque(func, args, kwargs, name)
        survives = _REDUCTIONS.get(name, "always")
        if name in _POOLS:
            dims = list(range(x.dim() - _POOLS[name], x.dim()))
            if name.startswith("avg_pool") and (
                (given.get("count_include_pad", True) and any(np.ravel(given.get("padding", 0))))
                or given.get("divisor_override")
            ):
                survives = "zero"
        else:
            given_dims = given.get("dim")
            if given_dims is None or given_dims == []:
                given_dims = range(x.dim())
            elif isinstance(given_dims, int):
                given_dims = [given_dims]
            dims = [d % x.dim() for d in given_dims] if x.dim() else []
        ids = self.ids(x).long()
        const = torch.from_numpy(self._free[: self.size].copy())
        merged = [ids]
        compact = _compact(ids)
        if any(compact.shape[d] > 1 for d in dims):
            is_const = const[compact]
            live = torch.where(is_const, -1, compact).amax(dims, keepdim=True)
            least = torch.where(is_const, self.size, compact).amin(dims, keepdim=True)
            if bool(((live >= 0) & (least != live)).any()):
                return self._opaque(func, args, kwargs, name)
            low = torch.where(is_const, compact, self.size).amin(dims, keepdim=True)
            high = torch.where(is_const, compact, -1).amax(dims, keepdim=True)
            low = torch.where(low == self.size, -1, low)
            merged = [live, low, high]
        else:
            merged = [compact]
        shape = torch.broadcast_shapes(*(m.shape for m in merged))
        rows, first, inverse = _combinations([m.expand(shape).reshape(-1) for m in merged])
        out = func(*args, **kwargs)
        free = np.where(rows >= 0, self._free[rows], True).all(1)
        for number, tensor in enumerate(tensors_in(out)):
            if tensor.numel() == 0:
                continue
            keeps = tensor.dim() == x.dim()
            value = np.full(len(rows), np.nan)
            sample = tensor if keeps else _unsqueezed(tensor, dims, x.dim())
            for d in range(x.dim()):
                if shape[d] == 1 and sample.shape[d] > 1:
                    sample = sample.narrow(d, 0, 1)
            if tuple(sample.shape) == tuple(shape):
                taken = sample.reshape(-1)[torch.from_numpy(first).to(x.device)]
                value = taken.double().cpu().numpy()
                lives = survives if number == 0 else "never"
            else:
                lives = "never"
            start = self.block(
                "pool",
                name,
                len(rows),
                rows,
                free=free,
                value=value,
                aligned=(True,) * rows.shape[1],
                survives=lives,
            )
            new = np.arange(start, start + len(rows))
            for column in rows.T:
                some = column >= 0
                self._edge(column[some], new[some])
            shadow = torch.from_numpy(inverse.astype(np.int32) + start).view(shape)
            if not keeps:
                shadow = shadow.squeeze(dims)
            self.write(tensor, shadow)
        return out

    def _norm(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        x = given["input"]
        channels = x.shape[1]
        params = [given.get(k) for k in ("weight", "bias", "running_mean", "running_var")]
        columns = [
            np.full(channels, -1) if p is None else self.ids(p).reshape(-1).numpy().astype(np.int64)
            for p in params
        ]
        own = next((c for c in (columns[0], columns[2]) if c[0] >= 0), None)
        start_of = None
        if own is not None:
            start = int(own.min())
            blocks = [b for b in self.blocks if b.start <= start < b.start + b.size]
            block = blocks[0]
            if block.kind == "param" and int(own.max()) < block.start + block.size:
                start_of = block
        ids = _compact(self.ids(x).transpose(0, 1), keep=1)
        out = func(*args, **kwargs)
        outs = tensors_in(out)
        main = outs[0]
        index = torch.arange(channels).view(-1, *[1] * (ids.dim() - 1)).expand(ids.shape)
        pairs = np.unique(
            np.stack([index.reshape(-1).numpy(), ids.reshape(-1).numpy().astype(np.int64)], 1),
            axis=0,
        )
        if start_of is None:  # no parameters, or computed ones: an operation like others
            counts = np.bincount(pairs[:, 0], minlength=channels)
            if counts.max() > 1:
                return self._opaque_done(x, out, name)
            cols = [pairs[:, 1]] + [c for c in columns if c[0] >= 0]
            rows, first, inverse = _combinations([torch.from_numpy(c.copy()) for c in cols])
            flat = main.transpose(0, 1).reshape(channels, -1)[:, 0].double().cpu().numpy()
            start = self.block(
                "pointwise",
                "normalize",
                len(rows),
                rows,
                free=False,
                value=flat[first],
                aligned=(True,) * rows.shape[1],
            )
            new = np.arange(start, start + len(rows))
            for column in rows.T:
                self._edge(column, new)
            nodes = start + inverse
        else:
            layer = start_of.name.rpartition(".")[0]
            given_value = self.constants.get(layer)
            position = own - start_of.start
            if given_value is not None:
                fixed = given_value[torch.from_numpy(position)].to(main.device, main.dtype)
                along = [-1 if d == 1 else 1 for d in range(main.dim())]
                main.copy_(torch.where(fixed.isnan().view(along), main, fixed.view(along)))
            flat = main.transpose(0, 1).reshape(channels, -1)
            flat = flat[:, 0].double().cpu().numpy() if main.numel() else np.full(channels, np.nan)
            found = self.norms.get(layer)
            if found is None:
                table = np.full((start_of.size, 4), -1, dtype=np.int64)
                table[position] = np.stack(columns, 1)
                start = self.block("norm", layer, start_of.size, table)
                found = self.norms[layer] = Norm(layer, start, start_of.size)
                self._value[start + position] = flat
            else:
                old = self._value[found.start + position]
                differ = np.abs(old - flat) > 1e-6 * np.maximum(np.abs(old), np.abs(flat))
                self._unsteady[found.start + position[differ]] = True
            if given.get("training", False):
                found.statistics = True
            else:
                found.tracked = True
            pairs[:, 0] = position[pairs[:, 0]]
            found._slots.append(pairs)
            nodes = found.start + position
            for column in columns:
                if column[0] >= 0:
                    self._edge(column, nodes)
        shadow = torch.from_numpy(nodes.astype(np.int32))
        self.write(main, shadow.view([-1 if d == 1 else 1 for d in range(main.dim())]))
        for tensor in outs[1:]:
            if tensor.numel() == channels:
                self.write(tensor, shadow)
        return out

    def _opaque_done(self, x: Tensor, out: Any, name: str) -> Any:
        self.hold([self.ids(x)], f"{self.where()} reads it ({name})")
        for tensor in tensors_in(out):
            self._write_fresh(tensor, "opaque", name, False)
        return out

    def _parameter(self, weight: Tensor, transposed: bool) -> tuple[str, Tensor] | None:
        """The parameter that a weight is, or whose transpose it is."""
        for name, param in self._params.get(weight.untyped_storage()._cdata, ()):
            seen = param.t() if transposed and param.dim() == 2 else param
            if (seen.shape, seen.stride(), seen.storage_offset()) == (
                weight.shape,
                weight.stride(),
                weight.storage_offset(),
            ):
                return name, param
        return None

    def _convolution(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        x = given.get("input", given.get("self"))
        found = self._parameter(given["weight"], False)
        if found is None:
            return self._opaque(func, args, kwargs, name)
        padding, transposed = given.get("padding", 0), given.get("transposed", False)
        pads = bool(any(np.ravel(padding))) and not transposed
        return self._read(
            func,
            args,
            kwargs,
            found,
            x,
            given.get("bias"),
            pads,
            given.get("groups", 1),
            transposed,
            False,
        )

    def _product(self, func: Any, args: Any, kwargs: Any, name: str, given: Any) -> Any:
        x, weight, bias = {
            "addmm": lambda: (given["mat1"], given["mat2"], given["self"]),
            "mm": lambda: (given["self"], given["mat2"], None),
            "linear": lambda: (given["input"], given["weight"], given.get("bias")),
        }[name]()
        found = self._parameter(weight, name != "linear")
        scaled = given.get("beta", 1) != 1 or given.get("alpha", 1) != 1
        if found is None or found[1].dim() != 2 or scaled or "out" in given:
            return self._opaque(func, args, kwargs, name)
        return self._read(func, args, kwargs, found, x, bias, False, 1, False, True)

    def _read(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        parameter: tuple[str, Tensor],
        x: Tensor,
        bias: Tensor | None,
        pads: bool,
        groups: int,
        transposed: bool,
        linear: bool,
    ) -> Any:
        name, weight = parameter
        dim = x.dim() - 1 if linear else 1
        inputs = x.shape[dim]
        filters = weight.shape[1] * groups if transposed else weight.shape[0]
        ids = _compact(self.ids(x).transpose(0, dim), keep=1)
        biases = None if bias is None else self.ids(bias).reshape(-1).numpy().astype(np.int64)
        out = func(*args, **kwargs)
        out_dim = out.dim() - 1 if linear else 1
        reader = self.readers.get(name)
        flat = np.full(filters, np.nan)
        if out.numel():
            sample = out.transpose(0, out_dim).reshape(filters, -1)[:, 0]
            flat = sample.double().cpu().numpy()
        if reader is None:
            start = self.block("conv", name, filters)
            reader = Reader(name, start, filters, inputs, groups, transposed, linear, weight)
            self.readers[name] = reader
            self._value[start : start + filters] = flat
        else:
            at = slice(reader.start, reader.start + filters)
            old = self._value[at]
            differ = np.abs(old - flat) > 1e-6 * np.maximum(np.abs(old), np.abs(flat))
            self._unsteady[at] |= differ
        reader.pads |= pads
        index = torch.arange(inputs).view(-1, *[1] * (ids.dim() - 1)).expand(ids.shape)
        pairs = np.stack([index.reshape(-1).numpy(), ids.reshape(-1).numpy().astype(np.int64)], 1)
        reader._slots.append(np.unique(pairs, axis=0))
        nodes = np.arange(reader.start, reader.start + filters)
        if biases is not None and len(biases) == filters:
            self._edge(biases, nodes)
        shadow = torch.from_numpy(nodes.astype(np.int32))
        self.write(out, shadow.view([-1 if d == out_dim else 1 for d in range(out.dim())]))
        return out

    def result(self) -> Wiring:
        edges = np.concatenate(self.edges) if self.edges else np.empty((0, 2), dtype=np.int64)
        return Wiring(
            self.blocks,
            self.norms,
            self.readers,
            self.held,
            self._value[: self.size].copy(),
            self._free[: self.size].copy(),
            self._unsteady[: self.size].copy(),
            edges,
            {k: v.numpy() for k, v in self.constants.items()},
            frozenset(self.computed),
        )


def _compact(ids: Tensor, keep: int = 0) -> Tensor:
    """Dimensions along which all is the same, but the first ``keep``, narrowed to one."""
    for dim in range(ids.dim() - 1, keep - 1, -1):
        if ids.shape[dim] > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0 or torch.equal(first.expand_as(ids), ids):
                ids = first
    return ids


def _combinations(columns: list[Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows of some columns: (k, arity), an index of each, and the row of each element."""
    arrays = [c.numpy().astype(np.int64) for c in columns]
    key = arrays[0]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    for array in arrays[1:]:
        _, other = np.unique(array, return_inverse=True)
        key = inverse.astype(np.int64) * (int(other.max(initial=0)) + 1) + other
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    return np.stack([a[first] for a in arrays], 1), first, inverse.reshape(-1)


def _unsqueezed(tensor: Tensor, dims: list[int], of: int) -> Tensor:
    for dim in sorted(dims):
        if tensor.dim() < of:
            tensor = tensor.unsqueeze(dim)
    return tensor
