"""Which convolution stands in front of which normalization layer, by names and shapes.

With images it is known by running the model (:mod:`.wiring`). A state dict, and a model that is not
run, have names and shapes alone; the order of the keys means nothing, as safetensors sorts them. A
layer is rather left without a convolution than given a wrong one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NORM = re.compile(r"batch_?norm|bn|norm")

# timm's EfficientNets number the layers of a block, but not its convolutions.
_KNOWN_ORDERS = (
    ("conv_pw", "conv_dw", "conv_pwl"),
    ("conv_dw", "conv_pw"),
    ("conv_exp", "conv_pwl"),
    ("conv_stem", "conv_head"),
)


def natural_order(name: str) -> list[tuple[bool, list[str | int]]]:
    """A sort key: layer 2 before layer 10, what a module holds itself before its blocks.

    ``bn1`` then comes before ``block.bn1``, as in most networks.
    """
    parts = name.split(".")
    return [
        (i < len(parts), [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", part)])
        for i, part in enumerate(parts, 1)
    ]


def pair_by_name(
    norms: Mapping[str, int], convs: Mapping[str, tuple[int, ...]], others: Iterable[str] = ()
) -> dict[str, str]:
    """Pairs that names and shapes prove, whatever the order.

    - ``conv1.norm`` lies in its convolution.
    - ``features.1`` follows ``features.0`` if nothing stands between the two numbers.
    - ``bn1`` goes with ``conv1``, ``convs.0`` with ``bns.0``, the only layer of a parent with its
      only convolution. But which of the two comes first? A convolution in front has as many filters
      as the layer, one behind as many inputs, in all pairs of the same parent. Where both fit, the
      parents with the same names decide, then the layers with the same name but for the number, if
      these agree. In a network that normalizes first (DenseNet) ``conv1`` is in front of ``norm2``.

    Args:
        norms: Normalization layer -> channels.
        convs: Convolution or linear layer -> shape of the weight, not transposed.
        others: Names of further modules with tensors.

    Returns:
        Normalization -> convolution, where it is proved. Each convolution is given away once.
    """
    children: dict[str, set[str]] = defaultdict(set)
    for name in (*norms, *convs, *others):
        while name:
            child, (name, _) = name, _split(name)
            children[name].add(child)
    pairs: dict[str, str] = {}
    blocks: dict[str, _Block] = defaultdict(_Block)
    for norm, channels in norms.items():
        parent, leaf = _split(norm)
        if parent in convs:
            conv: str | None = parent
        elif leaf.isdigit() and (before := _before(norm, children[parent])) in convs:
            conv = before
        else:
            first, last = _twin(norm, norms, convs, children)
            if first is not None and last is not None:
                blocks[parent].add(norm, channels, convs[first], convs[last], last)
            continue
        if conv and convs[conv][0] == channels:
            pairs[norm] = conv
    for kind_of in (_Block.names, _Block.unnumbered):
        votes: dict[object, set[bool]] = defaultdict(set)
        for block in blocks.values():
            if block.norm_first is not None:
                votes[kind_of(block)].add(block.norm_first)
        for block in blocks.values():
            if block.undecided and len(verdict := votes[kind_of(block)]) == 1:
                block.decided_by_others = next(iter(verdict))
    for block in blocks.values():
        pairs.update(block.pairs())
    claimed = Counter(pairs.values())
    return {norm: conv for norm, conv in pairs.items() if claimed[conv] == 1}


@dataclass
class _Block:
    """The layers of one parent that each have a convolution of the same name."""

    members: list[tuple[str, int, str, int]] = field(default_factory=list)
    all_fit_behind: bool = True
    all_fit_before: bool = True
    decided_by_others: bool | None = None

    def add(
        self,
        norm: str,
        channels: int,
        first: tuple[int, ...],
        last: tuple[int, ...],
        conv: str,
    ) -> None:
        self.members.append((norm, channels, conv, last[0]))
        self.all_fit_behind &= last[0] == channels
        self.all_fit_before &= _could_read(first, channels)

    @property
    def undecided(self) -> bool:
        return self.all_fit_behind and self.all_fit_before and self.decided_by_others is None

    @property
    def norm_first(self) -> bool | None:
        """Whether each layer comes before the convolution of its name; None: not known."""
        if self.all_fit_behind == self.all_fit_before:
            return self.decided_by_others
        return self.all_fit_before

    def names(self) -> frozenset[str]:
        return frozenset(_split(norm)[1] for norm, *_ in self.members)

    def unnumbered(self) -> frozenset[str]:
        return frozenset(re.sub(r"\d+", "", name) for name in self.names())

    def pairs(self) -> dict[str, str]:
        if self.norm_first is None:
            return {}
        if not self.norm_first:
            return {norm: conv for norm, _, conv, _ in self.members}
        by_number = {_number(norm): (conv, filters) for norm, _, conv, filters in self.members}
        paired = {}
        for norm, channels, *_ in self.members:
            conv, filters = by_number.get(_number(norm) - 1, (None, None))
            if conv and filters == channels:
                paired[norm] = conv
        return paired


def _twin(
    norm: str,
    norms: Mapping[str, int],
    convs: Mapping[str, tuple[int, ...]],
    children: Mapping[str, set[str]],
) -> tuple[str | None, str | None]:
    """The convolution with the name of a layer, or the first and the last in such a block."""
    parent, leaf = _split(norm)
    grandparent, middle = _split(parent)
    if leaf.isdigit():  # bns.0 - convs.0
        names = [f"{_join(grandparent, twin)}.{leaf}" for twin in _twin_names(middle)]
    else:
        names = [_join(parent, twin) for twin in _twin_names(leaf)]
    for name in names:
        if name in convs:
            return name, name
        inside = sorted(children.get(name, ()), key=natural_order)
        if inside and all(_split(child)[1].isdigit() for child in inside):
            if inside[0] in convs and inside[-1] in convs:
                return inside[0], inside[-1]
            return None, None
    siblings = [child for child in children[parent] if child in convs]
    layers = [child for child in children[parent] if child in norms]
    order = next((o for o in _KNOWN_ORDERS if {_join(parent, c) for c in o} <= {*siblings}), ())
    if order and (number := re.fullmatch(r"bn(\d+)", leaf)) and 0 < int(number[1]) <= len(order):
        conv = _join(parent, order[int(number[1]) - 1])
        return conv, conv
    if len(siblings) == len(layers) == 1 and not leaf.isdigit():
        return siblings[0], siblings[0]
    return None, None


def _twin_names(name: str) -> list[str]:
    """What a convolution (or linear layer) is called whose layer has this name."""
    if not _NORM.search(name):
        return []
    named = [_NORM.sub(kind, name, count=1) for kind in ("conv", "fc", "linear")]
    return [*named, re.sub(rf"_?(?:{_NORM.pattern})_?", "", name, count=1)]  # conv1_bn


def _could_read(weight: tuple[int, ...], channels: int) -> bool:
    """Whether a convolution with some number of groups has so many input channels."""
    filters, per_group = weight[:2]
    return channels % per_group == 0 and filters % (channels // per_group) == 0


def _before(name: str, siblings: Iterable[str]) -> str | None:
    """The sibling with the next lower number."""
    number = int(_split(name)[1])
    lower = [s for s in siblings if (leaf := _split(s)[1]).isdigit() and int(leaf) < number]
    return max(lower, key=natural_order, default=None)


def _number(name: str) -> int:
    digits = re.findall(r"\d+", _split(name)[1])
    return int(digits[-1]) if digits else -1


def _split(name: str) -> tuple[str, str]:
    parent, _, leaf = name.rpartition(".")
    return parent, leaf


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf
