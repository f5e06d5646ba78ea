"""State dicts, and the configs beside them, from BN to psBN and back."""

from __future__ import annotations

import ast
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..norm.layers import agree, check_alpha, rebase, saved_alpha
from ..norm.recognize import Kind, norm_kinds
from .unwrap import CheckpointError, as_tensor, is_array

_DIMENSIONS = dict(weight=1, bias=1, beta=1, alpha=0, running_mean=1, running_var=1)


def prefixes(state_dict: Mapping[str, Tensor], kind: Kind) -> set[str]:
    """What stands in front of the tensors of each layer of a kind, such as ``'layer1.0.bn1.'``."""
    kinds = norm_kinds(state_dict)
    return {f"{name}." if name else "" for name, its_kind in kinds.items() if its_kind == kind}


def _split(key: str) -> tuple[str, str]:
    """``layer.bn1.bias`` -> ``layer.bn1.``, ``bias``."""
    prefix, dot, name = key.rpartition(".")
    return prefix + dot, name


def psbn_state_dict(state_dict: Mapping[str, Tensor], alpha: float = 0.1) -> dict[str, Tensor]:
    """The state dict of ``to_psbn(model, alpha)`` from that of ``model``.

    A layer is BN where ``weight, bias, running_mean, running_var`` stand
    together (a normalization without running statistics, as InstanceNorm
    usually is, cannot be told from others and stays), psBN where ``beta`` and
    ``alpha`` do; the latter are rebased to ``alpha``. Where some layers count
    their batches, those that do not are a FrozenBatchNorm, which stays.

    Raises:
        CheckpointError: There is no such layer, or only a part of one.
        TypeError, ValueError: A wrong ``alpha``.
    """
    alpha = check_alpha(alpha)
    _refuse_parts(state_dict)
    bn, psbn = prefixes(state_dict, "bn"), prefixes(state_dict, "psbn")
    counting = {prefix for prefix in bn if prefix + "num_batches_tracked" in state_dict}
    bn = counting or bn  # a FrozenBatchNorm counts no batches; nor did any BN of torch < 0.4
    if not bn | psbn:
        raise CheckpointError("the state dict holds no BatchNorm layer")
    converted = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix in bn and name == "bias":
            converted.update(_layer(prefix, rebase(value, 0, alpha), alpha))
        elif prefix in psbn and name == "beta":
            old = saved_alpha(state_dict[prefix + "alpha"], alpha)
            added = _added(state_dict, prefix, alpha)
            kept = rebase(value, old, alpha)
            beta = torch.where(agree(added, value, old), kept, added - alpha)
            converted.update(_layer(prefix, beta, alpha))
        elif not (prefix in psbn and name in ("alpha", "bias")):
            converted[key] = value
    return converted


def _layer(prefix: str, beta: Tensor, alpha: float) -> dict[str, Tensor]:
    """What a psBN layer has in a state dict beside what BN has."""
    return {
        prefix + "bias": beta + alpha,
        prefix + "beta": beta,
        prefix + "alpha": torch.tensor(alpha, dtype=beta.dtype, device=beta.device),
    }


def _added(state_dict: Mapping[str, Tensor], prefix: str, alpha: float) -> Tensor:
    """The bias of a psBN layer; before 0.2 it was not in the file."""
    saved = state_dict[prefix + "alpha"]
    total = state_dict[prefix + "beta"] + saved_alpha(saved, alpha)
    return state_dict.get(prefix + "bias", total)


def bn_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``to_bn(model)`` from that of ``model``: ``bias = beta + alpha``.

    Raises:
        CheckpointError: There is no psBN layer, or only a part of one.
    """
    _refuse_parts(state_dict)
    psbn = prefixes(state_dict, "psbn")
    if not psbn:
        raise CheckpointError("the state dict holds no psBN layer (beta and alpha)")
    converted = {}
    for key, value in state_dict.items():
        prefix, name = _split(key)
        if prefix in psbn and name == "beta":
            alpha = float(state_dict[prefix + "alpha"])
            converted[prefix + "bias"] = _added(state_dict, prefix, alpha)
        elif not (prefix in psbn and name in ("alpha", "bias")):
            converted[key] = value
    return converted


_PSBN = re.compile(r"(?:psbn_mmdet\.|mmengine\.)?ps((?:Sync)?BN|IN)([123]d)?")
_HOOKS = "PsBNHook|AnchoredBiasDecay|SparsityLoggerHook|ReviveFilters|LiftGamma"
_OURS = re.compile(rf"(?:psbn_mmdet\.|mmengine\.)?({_HOOKS})")


class _ToBN(ast.NodeTransformer):
    """psBN taken out of the program that a config is; nothing of it is run."""

    def visit_Call(self, node: ast.Call) -> Any:
        """``dict(type='psBN', alpha=0.1, ...)`` -> ``dict(type='BN', ...)``."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "dict":
            kept = self._changed({keyword.arg: keyword.value for keyword in node.keywords})
            node.keywords = [ast.keyword(key, value) for key, value in kept.items()]
        return node

    def visit_Dict(self, node: ast.Dict) -> Any:
        """The same of ``{'type': 'psBN', 'alpha': 0.1, ...}``."""
        self.generic_visit(node)
        if all(isinstance(key, ast.Constant) for key in node.keys):
            names = [key.value for key in node.keys]  # type: ignore[union-attr]
            kept = self._changed(dict(zip(names, node.values, strict=True)))
            node.keys = [ast.Constant(key) for key in kept]
            node.values = [*kept.values()]
        return node

    def _changed(self, values: dict[Any, Any]) -> dict[Any, Any]:
        kind = _text(values.get("type"))
        if layer := _PSBN.fullmatch(kind):
            values = {k: v for k, v in values.items() if k not in ("alpha", "load_bn")}
            return {**values, "type": ast.Constant("".join(part or "" for part in layer.groups()))}
        if kind.rpartition(".")[2] == "ToPsBN" and "of" in values:
            kept = {k: v for k, v in values.items() if k not in ("alpha", "load_bn", "of")}
            return {**kept, "type": values["of"]}
        return values

    def visit_List(self, node: ast.List) -> Any:
        """Lists of hooks and imports without those of this package."""
        self.generic_visit(node)
        node.elts = [item for item in node.elts if not _is_ours(item)]
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        """``runner_type = 'psbn_mmdet.Runner'``."""
        self.generic_visit(node)
        return None if _text(node.value) == "psbn_mmdet.Runner" else node


def _text(node: Any) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_ours(item: ast.expr) -> bool:
    """Whether an entry of a list is a hook or a module of this package."""
    if isinstance(item, ast.Call):
        kinds = [_text(keyword.value) for keyword in item.keywords if keyword.arg == "type"]
        return any(_OURS.fullmatch(kind) for kind in kinds)
    return _text(item).partition(".")[0] == "psbn_mmdet"


def bn_config(text: str) -> str:
    """The text of a config with BN in the place of psBN, and without what this package registers.

    Args:
        text: A config of mmengine, as a checkpoint carries it: a Python program. It is rewritten,
            not run.

    Raises:
        CheckpointError: It is no Python program.
    """
    try:
        before, tree = ast.parse(text), _ToBN().visit(ast.parse(text))
        same = ast.dump(before) == ast.dump(tree)
        return text if same else ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CheckpointError("the config inside is not a Python program") from None


def convert_all(
    content: Any, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], kinds: set[Kind]
) -> tuple[Any, list[str]]:
    """Convert each state dict in a checkpoint, however deep: weights, averages, several models.

    Args:
        content: What :func:`load` returned; it is not changed.
        change: Converts one state dict.
        kinds: State dicts with layers of these kinds are converted.

    Returns:
        A copy with the converted ones in their places, and where these are: ``'state_dict_ema'``,
        ``''`` for the checkpoint itself.

    Raises:
        CheckpointError: One of them holds a part of a layer.
    """
    places: list[str] = []

    def walk(value: Any, place: str) -> Any:
        if type(value) in (list, tuple):
            items = [walk(item, f"{place}[{i}]") for i, item in enumerate(value)]
            same = all(a is b for a, b in zip(items, value, strict=True))
            return value if same else type(value)(items)
        if not isinstance(value, Mapping):
            return value
        new = value
        tensors = {k: as_tensor(v) for k, v in value.items() if isinstance(k, str) and is_array(v)}
        _refuse_parts(tensors)
        if kinds & {*norm_kinds(tensors).values()}:
            places.append(place)
            rest = {key: value[key] for key in value if key not in tensors}
            new = {**change(tensors), **rest}
        walked = {k: walk(v, f"{place}.{k}".lstrip(".")) for k, v in new.items()}
        if new is value and all(walked[key] is value[key] for key in value):
            return value
        if not isinstance(value, OrderedDict):
            return walked
        ordered = OrderedDict(walked)
        ordered.__dict__.update(value.__dict__)  # torch's versions of modules
        return ordered

    return walk(content, ""), places


def _refuse_parts(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a state dict with a part of a layer, which would stay as it is.

    That happens where a state dict has been cut into shards.
    """
    kinds = norm_kinds(state_dict)
    parts: dict[str, set[str]] = {}
    for key, tensor in state_dict.items():
        prefix, name = _split(key)
        if tensor.dim() == _DIMENSIONS.get(name):
            parts.setdefault(prefix[:-1], set()).add(name)
    for layer, names in parts.items():
        shifted = "beta" in names and names & {"alpha", "weight"}
        tracked = names & {"running_mean", "running_var"} and names & {"weight", "bias"}
        if (shifted or tracked) and kinds.get(layer) not in ("bn", "psbn"):
            raise CheckpointError(
                f"layer {layer or 'itself'} is incomplete: it has only "
                f"{', '.join(sorted(names))}. Is this one of several shards? Join them "
                "first"
            )
