"""``revive``: a new life for collapsed filters that changes nothing that the network computes.

A filter whose gamma has decayed to 0 gets no useful gradient, and no normalization brings it back:
what arrives at its weights, too, is multiplied by gamma. But since it carries nothing, all of it
may be set anew as long as nobody listens yet. How depends on what is behind it:

- *Zeroed readers*. All that the filter arrives at carries nothing else. It gets fresh incoming
  weights, gamma and bias of a living filter and running statistics from images, and the weights
  that read it become 0. It fires from the first step; the first gradient reaches the zeros, the
  second the filter. A constant that came through goes into the readers' biases, or into the
  running means of the BNs behind them.
- *Gamma 0*. What reads it reads living filters as well, as behind a residual sum. It gets fresh
  incoming weights and running statistics, gamma becomes exactly 0 and the bias stays. The gradient
  reaches gamma through the sum, as in a network that starts with ``zero_init_residual``.

Where all writers of a residual channel have collapsed, one is revived with zeroed readers and the
others with gamma 0.

Fresh incoming and zero outgoing weights are the idea of ReDo (Sokar et al. 2023, arXiv 2302.12902)
and continual backpropagation (Dohare et al., Nature 2024), for networks without normalization and
sums.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import PsbnError
from ..norm import added_bias, alpha_of, is_post_shifted
from .calls import Calls, compare, outputs_of
from .criteria import THRESHOLD, MeasureError, check_thresholds, collapsed, not_finite, not_started
from .layers import norm_modules
from .wiring import Reader, Run, Wiring, connected, tensors_in, trace

TOLERANCE = 1e-3
"""Of what the collapsed filters still carried, relative to the largest value of an output channel:
that of the threshold of |gamma|. Where gamma is 0 or the ReLU never fires, nothing changes."""

PASSES = 4
"""Backward passes within which a gradient must have arrived at a revived filter.

One for gamma 0, two for zeroed readers (the zeros, then the filter), one more for each further
layer of which no filter was left."""


class ReviveError(PsbnError):
    """A model's filters cannot be revived; the message is one line that says why."""


def revive(
    model: nn.Module,
    images: Tensor | Run,
    *,
    threshold: float = THRESHOLD,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> dict[str, Any]:
    """Revive the collapsed filters of a network, in place; what it computes stays the same.

    Filters of which gamma is not trained, and layers that start with gamma and bias 0 and have not
    moved, are left. Whatever fails, the model is then what it was.

    Args:
        model: Any module; of BN, SyncBN, InstanceNorm and psBN.
        images: (N, C, H, W), as the network gets them (normalized), for ``model(images)`` or a
            detector of mmdet; or a function that calls the model it is given and returns outputs.
            Running statistics of the revived filters come from them: a training batch. With images
            the surgery and its proof are made in float64, then written down in the precision of
            the model.
        threshold: Of ``|gamma|``.
        tolerance: Of the largest change of an output channel relative to the largest value there,
            for what filters below the threshold still carried. Where that is more, those of larger
            gamma are left.
        seed: Of the fresh weights.

    Returns:
        A record that JSON can hold: ``filters`` (counts of ``collapsed``, ``revived``, ``left``),
        ``revived`` and ``left`` (by way or reason: layer -> channels) and ``proof``: by how much
        outputs changed, ``carried`` by what the filters still carried, ``difference`` by the
        surgery, ``written`` in all, in the precision of the model.

    Raises:
        CallError: The model cannot be called so.
        ReviveError: The outputs differ.
        MeasureError: A wrong threshold, no normalization layer or one that is not finite.
    """
    check_thresholds(threshold, 0)
    if hasattr(model, "module") and isinstance(model, nn.parallel.DistributedDataParallel):
        raise ReviveError("revive the model itself, model.module, not its wrapper")
    training = {module: module.training for module in model.modules()}
    own = {b for m in norm_modules(model).values() for b in m.buffers()}
    others = {b: b.detach().clone() for b in model.buffers() if b not in own}
    before = others | {t: t.detach().clone() for t in (*model.parameters(), *own)}
    try:
        model.eval()
        record = _revive(model, Calls(model, images), threshold, tolerance, seed)
        with torch.no_grad():
            for buffer, value in others.items():  # what a run counts on
                buffer.copy_(value)
        return record
    except BaseException:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)
        raise
    finally:
        for module, mode in training.items():
            module.training = mode


def summary(record: dict[str, Any]) -> str:
    """A few lines about what was revived, for people."""
    filters, proof = record["filters"], record["proof"]
    lines = [f"{filters['revived']} of {filters['collapsed']} collapsed filters revived"]
    for way, layers in record["revived"].items():
        lines.append(f"  {sum(map(len, layers.values()))} with {way}")
    for why, layers in record["left"].items():
        names = ", ".join(list(layers)[:3]) + (" ..." if len(layers) > 3 else "")
        lines.append(f"  {sum(map(len, layers.values()))} left: {why} ({names})")
    lines.append(
        f"outputs: changed by {proof['carried']:.1g} of the largest value of their channel by what "
        f"the filters still carried, by {proof['difference']:.1g} otherwise; as written, by "
        f"{proof['written']:.1g} in all"
    )
    return "\n".join(lines)


class _Account:
    """The wiring of a network, as runs with a few images of several sizes show it.

    Networks pad as the size wants it, so one size tells too little.

    Args:
        model: In eval mode.
        calls: How it is called.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        few = calls.few()
        self._runs = [few.first]
        for run in few.other_sizes():
            with suppress(Exception):  # a network for one size of images
                outputs_of(model, run)
                self._runs.append(run)
        self._watch: frozenset[int] = frozenset()
        self._trains = False

    def outputs(self, model: nn.Module) -> list[Tensor]:
        return [tensor for run in self._runs for tensor in outputs_of(model, run)]

    def wiring(self, model: nn.Module) -> Wiring:
        """One account of all runs, in training mode too where layers run in that alone.

        What still has not run may read anything of as many channels as it takes.
        """
        if not (self._trains or self._watch):
            wiring = self._trace(model)
            if not self._idle(model, wiring):
                return wiring
            self._trains = True
            try:
                wiring = self._trace(model)
            except Exception:  # what wants targets, say
                self._trains = False
                model.eval()
            self._watch = frozenset(self._idle(model, wiring).values())
        return self._trace(model)

    def firing_in(self, model: nn.Module, run: Run) -> Wiring:
        """The account of one run, as of which rectifiers fire in it."""
        return self._trace(model, [run])

    def _trace(self, model: nn.Module, runs: Sequence[Run] = ()) -> Wiring:
        def everything(m: nn.Module) -> Any:
            found = [run(m) for run in runs or self._runs]
            if self._trains:
                buffers = {b: b.clone() for b in m.buffers()}
                m.train()
                found.append(self._runs[0](m))
                m.eval()
                for buffer, value in buffers.items():
                    buffer.data = value
            return found

        return trace(model, _seeded(everything), watch=self._watch)

    @staticmethod
    def _idle(model: nn.Module, wiring: Wiring) -> dict[str, int]:
        """Input channels of the convolutions and linear layers that did not run, by weight."""
        ran = wiring.readers.keys() | wiring.computed
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            names[id(m.weight)]: m.in_features if isinstance(m, nn.Linear) else m.in_channels
            for m in model.modules()
            if isinstance(m, (nn.Linear, _ConvNd))
            and names.get(id(m._parameters.get("weight")), "") not in ran | {""}
        }


def _seeded(run: Run) -> Run:
    def seeded(model: nn.Module) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return run(model)

    return seeded


@torch.no_grad()
def _rounding(model: nn.Module, account: _Account, outputs: list[Tensor]) -> float:
    """What rounding may change an output channel by, 1e-5 or so in float32, 1e-12 in float64.

    Ten times what it is if each weight is another one by a unit in the last place: what a network
    makes of that depends on how much cancels within it.
    """
    saved = [(p, p.detach().clone()) for p in model.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    for p, _ in saved:
        drawn = torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1
        p.mul_(1 + drawn * torch.finfo(p.dtype).eps)
    found = compare(outputs, account.outputs(model)).relative
    for p, value in saved:
        p.copy_(value)
    least = 100 * max(torch.finfo(t.dtype).eps for t in outputs)
    return min(max(10 * found, least, 1e-12), 0.05)


# What has collapsed ----------------------------------------------------------------------


def _bias(norm: Any) -> Tensor:
    """The parameter behind what a layer adds."""
    return norm.beta if is_post_shifted(norm) else norm.bias


def _shift(norm: Any) -> float:
    return alpha_of(norm) or 0.0


def _trained(norm: Any) -> bool:
    if norm is None:
        return False
    bias = _bias(norm)
    return all(isinstance(p, nn.Parameter) and p.requires_grad for p in (norm.weight, bias))


class _Left:
    """Reasons, each with the filters left for it."""

    def __init__(self) -> None:
        self.reasons: dict[str, dict[str, list[int]]] = {}

    def add(self, why: str, norm: str, channels: Any) -> None:
        found = [int(i) for i in channels]
        if found:
            layers = self.reasons.setdefault(why, {})
            layers[norm] = sorted({*layers.get(norm, ()), *found})


def _candidates(norms: dict[str, Any], threshold: float, left: _Left) -> dict[str, np.ndarray]:
    """Which filters may be revived by what their own layer says, (C,) bool."""
    chosen = {}
    for name, norm in norms.items():
        gamma, added = norm.weight.detach(), added_bias(norm)
        bias = torch.zeros_like(gamma) if added is None else added
        if not_finite(gamma, bias).any():
            raise MeasureError(
                f"{name} has a gamma or bias that is not finite: the weights are damaged or the "
                "training has diverged"
            )
        found = collapsed(gamma, threshold).cpu().numpy()
        if not found.any() or not_started(gamma, bias, alpha_of(norm)):
            continue
        if not _trained(norm):
            left.add("its gamma and bias are not trained", name, found.nonzero()[0])
            continue
        chosen[name] = found
    return chosen


@torch.no_grad()
def _settle(
    model: nn.Module,
    account: _Account,
    norms: dict[str, Any],
    chosen: dict[str, np.ndarray],
    threshold: float,
    tolerance: float,
    left: _Left,
) -> tuple[list[Tensor], float]:
    """Make the collapsed filters what they are taken for: constants, of gamma exactly 0.

    Where a ReLU is right behind, a bias below the threshold becomes 0. Where all that changes the
    outputs by more than ``tolerance``, the filters of larger gamma are left as they were.

    Returns:
        The outputs now, and by how much they differ from before.
    """
    expected = account.outputs(model)
    wiring = account.wiring(model)

    def settle(name: str, silence: bool = True) -> None:
        norm, mask = norms[name], torch.from_numpy(chosen[name])
        norm.weight[mask] = 0
        silent = _behind_a_relu(wiring, name)
        bias = added_bias(norm)
        if silence and silent is not None and bias is not None:
            small = mask & silent & ((bias > 0) & (bias < threshold)).cpu()
            _bias(norm)[small.to(bias.device)] = -_shift(norm)

    saved = {name: (norms[name].weight.clone(), _bias(norms[name]).clone()) for name in chosen}
    for name in chosen:
        if name in wiring.norms:
            settle(name)
        else:
            left.add("its layer did not run", name, chosen[name].nonzero()[0])
    for name in [name for name in chosen if name not in wiring.norms]:
        del chosen[name]
    outputs = account.outputs(model)
    carried = compare(expected, outputs).relative
    if carried <= tolerance:
        return outputs, carried
    for name in chosen:
        _restore(norms[name], saved[name])
    outputs, carried = expected, 0.0
    for name, mask in list(chosen.items()):
        gamma = saved[name][0].abs().cpu().numpy()
        chosen[name] = np.zeros_like(mask)
        # Less and less: without the small constants, with them, of smaller gamma alone.
        for share, silence in product((1, 0.1, 0.01, 1e-4), (True, False)):
            chosen[name] = mask & (gamma < share * threshold)
            settle(name, silence)
            now = account.outputs(model)
            found = compare(expected, now).relative
            if found <= tolerance:
                outputs, carried = now, found
                break
            _restore(norms[name], saved[name])
            chosen[name] = np.zeros_like(mask)
        left.add("it still carries something", name, np.flatnonzero(mask & ~chosen[name]))
        if not chosen[name].any():
            del chosen[name]
    return outputs, carried


def _restore(norm: Any, saved: tuple[Tensor, Tensor]) -> None:
    norm.weight.copy_(saved[0])
    _bias(norm).copy_(saved[1])


def _behind_a_relu(wiring: Wiring, name: str) -> Tensor | None:
    """(C,) bool, whether all that a channel goes to at once is a ReLU."""
    layer = wiring.norms.get(name)
    if layer is None:
        return None
    silent = np.zeros(layer.channels, dtype=bool)
    other = np.zeros(layer.channels, dtype=bool)
    for block in wiring.blocks:
        if block.kind not in ("pointwise", "pool"):
            continue
        at = block.inputs - layer.start
        rows = at[(at >= 0) & (at < layer.channels)]
        rectifies = block.firing is not None and block.name.rstrip("_") in ("relu", "hardtanh")
        (silent if rectifies else other)[rows] = True
    ends, _ = wiring._read_by
    nodes = np.arange(layer.start, layer.start + layer.channels)
    other |= ends[nodes + 1] > ends[nodes]
    return torch.from_numpy(silent & ~other & ~wiring.seen[nodes])


# What is done to each --------------------------------------------------------------------


def _spread(marked: np.ndarray, edges: np.ndarray) -> None:
    """Mark, in place, all that edges (from, to) lead to from what is marked."""
    while True:
        count = int(marked.sum())
        marked[edges[marked[edges[:, 0]], 1]] = True
        if int(marked.sum()) == count:
            return


class _Plan:
    """Which filters are revived how, by the account of the wiring of a settled network.

    Attributes:
        zeroed: Layer -> (C,) bool, filters whose readers become 0.
        gamma_zero: Layer -> (C,) bool, filters whose gamma stays 0.
        silenced: Layer -> (C,) bool, those of the latter of which all readers become 0, for
            another writer of the same channel.
        refreshed: Layer -> (C,) bool, channels that will read something new.
        fed: Reader -> (C_out,) bool, filters that nothing but revived channels normalize: they get
            fresh weights.
        cleared: Reader -> (C_in,) bool, input channels that revived filters will arrive at.
        value: Reader -> (C_in,) the constant that arrives there today.
    """

    def __init__(
        self,
        model: nn.Module,
        wiring: Wiring,
        norms: dict[str, Any],
        chosen: dict[str, np.ndarray],
    ) -> None:
        self._wiring, self._norms = wiring, norms
        self._normed, self._held = wiring.normed, wiring.seen
        self._read = np.zeros(wiring.size, dtype=bool)
        for each in wiring.readers.values():
            self._read[each.slots[:, 1]] = True
        # What nobody uses, as the indices of a max-pooling, is nothing to look after.
        matters = self._held | self._read
        matters[self._normed[:, 0]] = True
        _spread(matters, wiring.made[:, ::-1])
        self._made = wiring.made[matters[wiring.made[:, 1]]]

        source = np.zeros(wiring.size, dtype=bool)
        able = np.zeros(wiring.size, dtype=bool)
        for name, layer in wiring.norms.items():
            nodes = slice(layer.start, layer.start + layer.channels)
            able[nodes] = name in norms and _trained(norms[name])
            if name in chosen:
                source[nodes] = chosen[name] & wiring.frozen[nodes]
        self._reached = self._reach(source)
        self._absorbing = able & self._reached
        self._within = self._made[self._reached[self._made].all(1)]

        # What but a normalization layer uses a node, and how many channels normalize it.
        self._used = self._held | self._read
        self._used[self._made[:, 0]] = True
        self._normalized = np.bincount(self._normed[:, 0], minlength=wiring.size)

        self.fed = self._feed()
        self.bias = {name: _bias_of(model, each) for name, each in wiring.readers.items()}
        self.behind = {
            name: {} if self.bias[name] is not None else self._behind(each)
            for name, each in wiring.readers.items()
        }
        self.value: dict[str, np.ndarray] = {}
        opened = self._open()
        self._label = connected(wiring.size, self._within)
        leads = self._leaders(np.flatnonzero(self._absorbing & ~opened))
        self.lifted, self.sums = self._lift(opened)
        self._assign(leads, opened, chosen)

    def _reach(self, source: np.ndarray) -> np.ndarray:
        """(nodes,) bool, what is made of some frozen nodes and is frozen too."""
        frozen, reached = self._wiring.frozen, source.copy()
        edges = np.concatenate([self._made, self._normed])
        edges = edges[frozen[edges[:, 1]]]
        while True:
            count = int(reached.sum())
            _spread(reached, edges)
            for each in self._wiring.readers.values():
                nodes = slice(each.start, each.start + each.filters)
                if frozen[nodes].any():
                    arrives = _arrives(each, reached).reshape(each.groups, -1).any(1)
                    arrives = arrives.repeat(each.filters // each.groups)
                    reached[nodes] |= arrives & frozen[nodes]
            if int(reached.sum()) == count:
                return reached

    def _feed(self) -> dict[str, np.ndarray]:
        """Filters all of whose ways end in channels that are revived."""
        wiring = self._wiring
        other = self._held | self._read
        other[self._normed[~self._absorbing[self._normed[:, 1]], 0]] = True
        other |= ~self._used & (self._normalized == 0)
        _spread(other, self._made[:, ::-1])
        return {
            name: ~other[each.start : each.start + each.filters]
            & (each.weight.requires_grad and name not in wiring.computed)
            for name, each in wiring.readers.items()
        }

    def _behind(self, each: Reader) -> dict[int, list[tuple[str, int]]]:
        """By filter: the BN channels that read it, where nothing else does and they nothing else.

        Their running means take a constant.
        """
        found: dict[int, list[tuple[str, int]]] = {}
        for name, layer in self._wiring.norms.items():
            index, node = layer.slots.T
            mine = (node >= each.start) & (node < each.start + each.filters)
            if not mine.any() or not layer.tracked or layer.statistics:
                continue
            mine &= np.bincount(index, minlength=layer.channels)[index] == 1
            for i, n in zip(index[mine].tolist(), node[mine].tolist(), strict=True):
                found.setdefault(n - each.start, []).append((name, i))
        return {
            filter: channels
            for filter, channels in found.items()
            if not self._used[each.start + filter]
            and len(channels) == self._normalized[each.start + filter]
        }

    def _open(self) -> np.ndarray:
        """(nodes,) bool, nodes of which not all that reads them can be zeroed."""
        reached, frozen = self._reached, self._wiring.frozen
        opened = self._held.copy()
        opened[self._made[~frozen[self._made[:, 1]], 0]] = True
        opened[self._normed[~self._absorbing[self._normed[:, 1]], 0]] = True
        self._fixed = np.zeros_like(opened)
        for name, each in self._wiring.readers.items():
            fixed = ~self._clearable(name, each)
            self._fixed[each.slots[fixed[each.slots[:, 0]], 1]] = True
        opened |= self._fixed
        opened &= reached
        _spread(opened, self._within[:, ::-1])
        return opened

    def _clearable(self, name: str, each: Reader) -> np.ndarray:
        """(C_in,) bool, whether the weights of an input channel may become 0."""
        steady, value = self._wiring._slot_state(each.slots, each.inputs, self._wiring.frozen)
        self.value[name] = np.nan_to_num(value, posinf=0.0, neginf=0.0)
        if name in self._wiring.computed or not each.weight.requires_grad:
            return np.zeros(each.inputs, dtype=bool)
        reads = each.carries() & ~self.fed[name][:, None]
        reads = reads.reshape(each.groups, -1, reads.shape[1])  # groups, filters, inputs
        moves = reads.any(1).reshape(-1) & (value != 0)  # NaN != 0
        takes = np.ones(each.filters, dtype=bool)
        if self.bias[name] is None:
            takes = np.isin(np.arange(each.filters), list(self.behind[name]))
        rigid = (reads & ~takes.reshape(each.groups, -1, 1)).any(1).reshape(-1) | np.isnan(value)
        if each.pads or each.transposed:
            rigid |= value != 0
        return steady & ~(moves & rigid)

    def _leaders(self, nodes: np.ndarray) -> np.ndarray:
        """(nodes,) bool, of each channel the writer that reaches most; the last of several."""
        leads = np.zeros(self._wiring.size, dtype=bool)
        groups: dict[int, list[int]] = {}
        for node in nodes.tolist():
            groups.setdefault(int(self._label[node]), []).append(node)
        children: dict[int, list[int]] = {}
        for source, made in self._within.tolist():
            children.setdefault(source, []).append(made)

        def reach(node: int) -> int:
            seen, todo = {node}, [node]
            while todo:
                new = [n for n in children.get(todo.pop(), ()) if n not in seen]
                seen.update(new)
                todo += new
            return len(seen)

        for group in groups.values():
            leads[max(group, key=lambda n: (reach(n), n)) if len(group) > 1 else group[0]] = True
        return leads

    def _lift(self, opened: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str, int]]]:
        """Channels with a shut rectifier in front of a sum with a living one that evens it out.

        Returns:
            (nodes,) bool, their writers, and (node, layer, channel) of each sum: what arrives
            there from the lifted channel and the normalization layer that meets it.
        """
        wiring, frozen, label = self._wiring, self._wiring.frozen, self._label
        shut = np.zeros(wiring.size, dtype=bool)
        mixed = np.zeros(wiring.size, dtype=bool)  # made of something that varies, too
        for block in wiring.blocks:
            if block.firing is not None:
                nodes = slice(block.start, block.start + block.size)
                shut[nodes] = block.firing == 0
        mixed[self._made[~frozen[self._made[:, 0]], 1]] = True
        writes = self._absorbing & opened
        wanted = np.zeros(wiring.size, dtype=bool)
        wanted[label[writes]] = True
        has_shut = np.zeros(wiring.size, dtype=bool)
        has_shut[label[shut & self._reached]] = True
        wanted &= has_shut
        # What rules a channel out.
        bad = self._reached & (self._held | self._fixed | mixed)
        bad[self._normed[~self._absorbing[self._normed[:, 1]], 0]] = True
        meets = self._made[self._reached[self._made[:, 0]] & ~frozen[self._made[:, 1]]]
        met: dict[int, list[int]] = {}  # a living channel: what it meets
        for node, made in meets.tolist():
            if not wanted[label[node]] or bad[node]:
                continue
            block = wiring.block_of(made)
            given = [n for n in block.inputs[made - block.start].tolist() if n != node]
            living = wiring.kind[given[0]] == "norm" if len(given) == 1 else False
            if living and block.name.rstrip("_") == "add":
                met.setdefault(given[0], []).append(node)
            else:
                bad[node] = True
        uses = np.bincount(self._made[:, 0], minlength=wiring.size)
        for living, others in met.items():
            alone = not (self._held[living] or self._read[living] or self._normalized[living])
            trained = _trained(self._norms.get(wiring.block_of(living).name))
            one = len(set(label[others].tolist())) == 1
            if not (alone and trained and one and uses[living] == len(others)):
                bad[others] = True
        ruled_out = np.zeros(wiring.size, dtype=bool)
        ruled_out[label[bad & self._reached]] = True
        wanted &= ~ruled_out
        sums = []
        for living, others in met.items():
            if wanted[label[others[0]]]:
                block = wiring.block_of(living)
                sums.append((others[0], block.name, living - block.start))
        return writes & wanted[label], sums

    def _assign(
        self, leaders: np.ndarray, opened: np.ndarray, chosen: dict[str, np.ndarray]
    ) -> None:
        wiring = self._wiring
        lifts = self._leaders(np.flatnonzero(self.lifted))
        varied = (self._absorbing & ~opened) | self.lifted
        _spread(varied, self._within)
        self.cleared = {name: _arrives(each, varied) for name, each in wiring.readers.items()}
        for name, each in wiring.readers.items():
            varied[each.start : each.start + each.filters] |= self.fed[name]
        _spread(varied, self._made)
        self.zeroed, self.gamma_zero, self.silenced, self.refreshed = {}, {}, {}, {}
        self.raised = {}
        for name, layer in wiring.norms.items():
            nodes = slice(layer.start, layer.start + layer.channels)
            if self._absorbing[nodes].any():
                new = np.zeros(layer.channels, dtype=bool)
                new[layer.slots[varied[layer.slots[:, 1]], 0]] = True
                self.refreshed[name] = new & self._absorbing[nodes]
                self.zeroed[name] = leaders[nodes]
                # Layers behind that carry nothing either, and read nothing new, stay.
                wanted = chosen.get(name, False) | self.refreshed[name]
                self.gamma_zero[name] = self._absorbing[nodes] & ~leaders[nodes] & wanted
                self.silenced[name] = self.gamma_zero[name] & (~opened | self.lifted)[nodes]
                self.raised[name] = lifts[nodes]


def _arrives(each: Reader, nodes: np.ndarray) -> np.ndarray:
    """(C_in,) bool, the input channels at which one of some nodes arrives."""
    found = np.zeros(each.inputs, dtype=bool)
    found[each.slots[nodes[each.slots[:, 1]], 0]] = True
    return found


def _bias_of(model: nn.Module, each: Reader) -> nn.Parameter | None:
    bias = getattr(model.get_submodule(each.module), "bias", None)
    return bias if isinstance(bias, nn.Parameter) and bias.shape == (each.filters,) else None


# The surgery -----------------------------------------------------------------------------


def _by_filter(weight: Tensor, each: Reader) -> Tensor:
    """(C_out, C_in / groups, kernel), a view where the layout allows it."""
    weight = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    if each.transposed:
        weight = weight.unflatten(0, (each.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def _as_weight(weight: Tensor, each: Reader) -> Tensor:
    """The inverse of :func:`_by_filter`, in the shape of the layer's weight."""
    if each.transposed:
        weight = weight.unflatten(0, (each.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.reshape(each.weight.shape)


@torch.no_grad()
def _carry_out(
    plan: _Plan, wiring: Wiring, norms: dict[str, Any], threshold: float, seed: int
) -> dict[str, Tensor]:
    """Set weights, gammas and biases anew.

    Returns:
        By reader: which of its weights are zeros now that revived filters arrive at.
    """
    generator = torch.Generator().manual_seed(seed)
    zeros = {}
    for name, each in wiring.readers.items():
        fed, cleared = torch.from_numpy(plan.fed[name]), torch.from_numpy(plan.cleared[name])
        weight = _by_filter(each.weight.detach().clone(), each)
        size = weight.flatten(1).norm(dim=1)
        device = weight.device
        zero = cleared.view(each.groups, 1, -1).expand(-1, each.filters // each.groups, -1)
        zero = zero.flatten(0, 1) & ~fed[:, None]
        if zero.any():
            value = torch.from_numpy(plan.value[name]).view(each.groups, 1, -1)
            value = value.expand(-1, each.filters // each.groups, -1).flatten(0, 1)
            gone = torch.where(zero, value, 0.0).to(device, torch.float64)
            _add_constant(plan, norms, name, (weight.double().sum(2) * gone).sum(1))
            zero = zero.to(device)
            weight[zero] = 0
            zeros[name] = _as_weight(zero.unsqueeze(2).expand_as(weight), each)
        if fed.any():
            living = size[~fed.to(device)]
            living = living[living > 0]
            target = float(living.median()) if len(living) else 2**0.5  # He et al. 2015
            drawn = torch.randn(weight[fed].shape, generator=generator, dtype=torch.float64)
            drawn *= target / drawn.flatten(1).norm(dim=1).view(-1, 1, 1)
            weight[fed.to(device)] = drawn.to(device, weight.dtype)
            if (bias := plan.bias[name]) is not None:
                bias[fed.to(device)] = 0
        if zero.any() or fed.any():
            each.weight.copy_(_as_weight(weight, each))

    usual = _living(wiring, norms, threshold)
    for name, leads in plan.zeroed.items():
        norm = norms[name]
        gamma, added = _living(wiring, {name: norm}, threshold) or usual or (1.0, 0.0)
        leading = torch.from_numpy(leads).to(norm.weight.device)
        norm.weight[leading] = gamma
        _bias(norm)[leading] = added - _shift(norm)
        keeps = torch.from_numpy(plan.gamma_zero[name]).to(norm.weight.device)
        shows = keeps & (norm.weight != 0)  # another number than its bias: what it reads is one
        value = torch.from_numpy(wiring.value[wiring.output(name)]).to(norm.weight)
        _bias(norm)[shows] = value[shows] - _shift(norm)
        norm.weight[keeps] = 0
        silenced = torch.from_numpy(plan.silenced[name]).to(norm.weight.device)
        _bias(norm)[silenced] = -_shift(norm)
        raised = torch.from_numpy(plan.raised[name]).to(norm.weight.device)
        _bias(norm)[raised] = gamma - _shift(norm)
    return zeros


@torch.no_grad()
def _even_out(plan: _Plan, before: Wiring, after: Wiring, norms: dict[str, Any]) -> None:
    """Take what lifted channels now add to a sum out of the layer that they meet there."""
    for node, name, channel in plan.sums:
        _bias(norms[name])[channel] -= after.value[node] - before.value[node]


def _add_constant(plan: _Plan, norms: dict[str, Any], name: str, constant: Tensor) -> None:
    """Add (C_out,) numbers to what the filters of a layer put out."""
    if (bias := plan.bias[name]) is not None:
        bias.add_(constant.to(bias.dtype))
        return
    for filter, channels in plan.behind[name].items():
        if constant[filter] != 0:
            for norm, channel in channels:
                norms[norm].running_mean[channel] -= constant[filter].to(norms[norm].running_mean)


def _living(wiring: Wiring, norms: dict[str, Any], threshold: float) -> tuple[float, float] | None:
    """Medians of |gamma| and of the added constant of the filters that carry something."""
    gammas, biases = [], []
    for name, norm in norms.items():
        if name not in wiring.norms:
            continue
        alive = ~wiring.frozen[wiring.output(name)]
        gamma, bias = norm.weight.detach().abs(), added_bias(norm)
        mask = torch.from_numpy(alive).to(gamma.device) & (gamma >= threshold)
        gammas.append(gamma[mask])
        biases.append((torch.zeros_like(gamma) if bias is None else bias)[mask])
    gamma, bias = torch.cat(gammas).double(), torch.cat(biases).double()
    return (float(gamma.median()), float(bias.median())) if len(gamma) else None


@contextmanager
def _hooked(handles: list[Any]) -> Any:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _refresh_statistics(
    model: nn.Module, run: Run, norms: dict[str, Any], refreshed: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Running statistics of some channels from a run, so that they are standardised in it.

    Each layer's are set before it normalizes, so that the next one sees what it will see. Of a
    layer that is called several times they are those of all its input together.

    Returns:
        Layer -> (C,) bool, those whose input is the same number everywhere.
    """
    seen: dict[str, tuple[int, Tensor, Tensor]] = {}
    still = {}

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def set_statistics(norm: Any, args: Any) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1).double()  # (C, positions)
            count, mean, m2 = seen.get(
                name, (0, torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]))
            )
            n, own = x.shape[1], x.mean(1)
            total = count + n
            m2 = m2 + ((x - own[:, None]) ** 2).sum(1) + (own - mean) ** 2 * count * n / total
            mean = mean + (own - mean) * n / total
            seen[name] = total, mean, m2
            channels = torch.from_numpy(refreshed[name]).to(x.device)
            variance = m2 / max(total - 1, 1)
            # As constant as arithmetic lets it be.
            flat = variance <= (mean.abs() * 1e-6) ** 2
            still[name] = (flat & channels).cpu().numpy()
            if norm.running_mean is not None:
                set_now = channels & ~flat
                norm.running_mean[set_now] = mean[set_now].to(norm.running_mean.dtype)
                norm.running_var[set_now] = variance[set_now].to(norm.running_var.dtype)

        return set_statistics

    with _hooked(
        [
            norms[name].register_forward_pre_hook(before(name))
            for name, channels in refreshed.items()
            if channels.any()
        ]
    ):
        run(model)
    return still


# The proof -------------------------------------------------------------------------------


def _first_gradients(
    model: nn.Module,
    run: Run,
    norms: dict[str, Any],
    plan: _Plan,
    zeros: dict[str, Tensor],
) -> dict[str, np.ndarray]:
    """After how many backward passes a gradient has arrived at gamma or bias of each filter.

    Between passes the zeros behind the filters and the zero gammas, and they alone, take a step
    against the sign of their gradients. The loss is a random sum of all outputs. All is put back.

    Returns:
        Layer -> (C,), 0 where none had arrived after :data:`PASSES`.
    """
    layers = {name: norms[name] for name in plan.zeroed}
    weights = dict(model.named_parameters())
    movable: list[tuple[Tensor, Tensor]] = [
        (weights[name], mask.to(weights[name].device)) for name, mask in zeros.items()
    ]
    for name, norm in layers.items():
        movable.append(
            (norm.weight, torch.from_numpy(plan.gamma_zero[name]).to(norm.weight.device))
        )
    gammas = [norm.weight for norm in layers.values()]
    biases = [_bias(norm) for norm in layers.values()]
    watched = [*(tensor for tensor, _ in movable), *gammas, *biases]
    saved = [tensor.detach().clone() for tensor, _ in movable]
    arrived = {name: np.zeros(len(norm.weight), dtype=int) for name, norm in layers.items()}
    if not watched:
        return arrived
    try:
        for number in range(1, PASSES + 1):
            with torch.enable_grad():
                outputs = [t for t in tensors_in(run(model)) if t.requires_grad]
                if not outputs:
                    break
                generator = torch.Generator().manual_seed(number)
                drawn = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
                loss = torch.stack(
                    [(t * d).sum().float() for t, d in zip(outputs, drawn, strict=True)]
                ).sum()
                grads = torch.autograd.grad(loss, watched, allow_unused=True)
            first = len(movable)
            for i, name in enumerate(layers):
                found = np.zeros(len(arrived[name]), dtype=bool)
                zero = plan.gamma_zero[name]
                for grad, counts in (
                    (grads[first + i], np.ones_like(zero)),
                    (grads[first + len(layers) + i], ~zero),
                ):
                    if grad is not None:
                        found |= (grad != 0).cpu().numpy() & counts
                arrived[name][found & (arrived[name] == 0)] = number
            if all((arrived[n][z | plan.gamma_zero[n]] > 0).all() for n, z in plan.zeroed.items()):
                break
            with torch.no_grad():
                for (tensor, mask), grad in zip(movable, grads):
                    if grad is not None:
                        tensor.sub_(1e-4 * torch.where(mask, grad.sign(), 0))
    finally:
        with torch.no_grad():
            for (tensor, _), value in zip(movable, saved, strict=True):
                tensor.copy_(value)
    return arrived


class _Silent:
    """Why no gradient arrives at a filter, by the wiring of the network as it is now."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        edges = np.concatenate([wiring.made, wiring.normed])
        shut = np.zeros(wiring.size, dtype=bool)
        for block in wiring.blocks:
            if block.firing is not None:
                shut[block.start : block.start + block.size] = block.firing == 0
        self._reaches = self._back(edges)
        self._open = self._back(edges[~shut[edges[:, 1]]])

    def _back(self, edges: np.ndarray) -> np.ndarray:
        """(nodes,) bool, from where edges and layers lead to what is held."""
        found = self._wiring.seen.copy()
        while True:
            count = int(found.sum())
            _spread(found, edges[:, ::-1])
            for each in self._wiring.readers.values():
                index, node = each.slots.T
                out = found[each.start : each.start + each.filters].reshape(each.groups, -1)
                leads: np.ndarray = np.any(out, axis=1)
                found[node] |= leads[index * each.groups // each.inputs]
            if int(found.sum()) == count:
                return found

    def reason(self, norm: str, channel: int) -> str:
        start = self._wiring.norms[norm].start + channel
        if not self._reaches[start]:
            return "nothing that the model returns depends on it"
        if self._open[start]:
            return f"no gradient arrived in {PASSES} backward passes"
        behind = self._wiring.channel(norm, channel)
        shut = [each for each in behind.rectifiers if each.firing == 0]
        if not shut:
            return "what reads it carries nothing either"
        if behind.held:
            why = behind.held[0]
        elif any(each.after_sum for each in shut):
            return "the rectifier behind the sum that it is added to never fires"
        else:
            why = "what meets it in a sum cannot take out what would come through"
        return f"the rectifier behind it never fires and must stay shut: {why}"


@torch.no_grad()
def _write_down(model: nn.Module, wide: nn.Module) -> None:
    """Give a model the numbers of its twin of higher precision."""
    theirs = dict(wide.named_parameters()) | dict(wide.named_buffers())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(theirs[name])


def _revive(
    model: nn.Module, calls: Calls, threshold: float, tolerance: float, seed: int
) -> dict[str, Any]:
    norms: dict[str, Any] = norm_modules(model)
    left = _Left()
    chosen = _candidates(norms, threshold, left)
    found = sum(int(mask.sum()) for mask in chosen.values())
    found += sum(len(c) for layers in left.reasons.values() for c in layers.values())
    record: dict[str, Any] = {
        "threshold": threshold,
        "seed": seed,
        "filters": {"collapsed": found, "revived": 0, "left": 0},
        "revived": {},
        "left": left.reasons,
        "proof": {
            "carried": 0.0,
            "difference": 0.0,
            "written": 0.0,
            "tolerance": tolerance,
            "passes": {},
        },
    }
    if not chosen:
        record["filters"]["left"] = found
        return record
    wide_calls = copy.copy(calls)
    wide = wide_calls.widen(model)
    account = _Account(wide, wide_calls)
    wide_norms: dict[str, Any] = norm_modules(wide)
    expected, carried = _settle(wide, account, wide_norms, chosen, threshold, tolerance, left)
    rounding = _rounding(wide, account, expected)
    wiring = account.wiring(wide)
    plan = _Plan(wide, wiring, wide_norms, chosen)
    zeros = _carry_out(plan, wiring, wide_norms, threshold, seed)
    if plan.sums:
        _even_out(plan, wiring, account.wiring(wide), wide_norms)
    still = _refresh_statistics(wide, _seeded(wide_calls.first), wide_norms, plan.refreshed)
    differs = compare(expected, account.outputs(wide)).relative
    if not differs <= rounding:
        raise ReviveError(
            f"the outputs of the revived network differ by {differs:.2g} of the largest value of "
            "their channel, so nothing is changed"
        )
    written = carried
    if wide is not model:
        numbers = _Account(model, calls)
        unchanged = numbers.outputs(model)
        allowed = carried + _rounding(model, numbers, unchanged)
        _write_down(model, wide)
        written = compare(unchanged, numbers.outputs(model)).relative
        if not written <= allowed:
            raise ReviveError(
                f"in the precision of the model the outputs differ by {written:.2g} of the largest "
                "value of their channel, so nothing is changed"
            )
    arrived = _first_gradients(model, _seeded(calls.first), norms, plan, zeros)
    tried = {name: plan.zeroed[name] | plan.gamma_zero[name] for name in plan.zeroed}
    why_silent = None
    if any((tried[name] & (arrived[name] == 0)).any() for name in tried):
        # On the images that the gradients come from: others may open a rectifier.
        why_silent = _Silent(account.firing_in(wide, wide_calls.first))

    passes: Counter[int] = Counter()
    revived: dict[str, dict[str, list[int]]] = {}
    also = 0
    for name in plan.zeroed:
        wanted = chosen.get(name, np.zeros_like(plan.zeroed[name]))
        same = still.get(name, np.zeros_like(wanted))
        ways = (("zeroed readers", plan.zeroed[name]), ("gamma 0", plan.gamma_zero[name]))
        for way, channels in ways:
            live = channels & ~same & (arrived[name] > 0)
            passes.update(arrived[name][live].tolist())
            if live.any():
                revived.setdefault(way, {})[name] = np.flatnonzero(live).tolist()
            also += int((live & ~wanted).sum())
            left.add(
                "all that it reads is constant", name, np.flatnonzero(channels & same & wanted)
            )
            for i in np.flatnonzero(channels & ~same & (arrived[name] == 0) & wanted).tolist():
                assert why_silent is not None
                left.add(why_silent.reason(name, i), name, [i])
    for name, mask in chosen.items():
        done = plan.zeroed.get(name, np.zeros_like(mask)) | plan.gamma_zero.get(
            name, np.zeros_like(mask)
        )
        left.add("its output is not followed", name, np.flatnonzero(mask & ~done))
    record["revived"] = revived
    total = sum(len(c) for layers in revived.values() for c in layers.values())
    record["filters"].update(
        revived=total - also,
        left=sum(len(c) for layers in left.reasons.values() for c in layers.values()),
        behind_them=also,
    )
    record["proof"].update(
        carried=carried,
        difference=differs,
        written=written,
        passes={str(number): count for number, count in sorted(passes.items())},
    )
    return record
