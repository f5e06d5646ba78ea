"""Which norm layers a rectifier follows, as far as torch.fx can tell."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

# By class, and by the name of the function, method or operator.
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU)
_RECTIFY = {"relu", "relu6", "leaky_relu", "prelu", "rrelu", "hardtanh"}  # ReLU6, exported
_PASSING = (nn.Identity, _DropoutNd)
_PASS = {"add", "iadd", "cat", "concat", "dropout", "getitem"}
_NORMS = (_BatchNorm, _InstanceNorm)
_NORMALIZE = {"batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit"}


def rectified(model: nn.Module) -> dict[str, bool | None]:
    """Whether a rectifier follows the norm layer of each trained bias: True, False, None: unknown.

    A rectifier: ReLU, ReLU6, LeakyReLU, PReLU, RReLU, as module, function or method. It follows a
    layer if it reads its output, or that of additions, concatenations, `nn.Identity` and dropout
    which do.

    The model is traced by torch.fx, or, where its `forward` cannot be, each of its parts. Unknown
    are layers outside of everything traceable, and those whose output leaves the largest traceable
    part. Modules without norm layers are not looked into: what they do is unknown unless they are
    torch's own or derived from these. The functional `batch_norm` of a traced or exported graph
    counts as a layer.

    Returns:
        By the name of the bias, as in `model.named_parameters()`.

    Raises:
        ValueError: a lazy layer has no shape yet.
    """
    seen: dict[int, list[bool | None]] = {}
    for name, module in model.named_modules():
        bias = _trained_bias(module)
        if isinstance(bias, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name}.bias has no shape yet: run the model once before")
        if bias is not None:
            seen[id(bias)] = []
    try:
        # Tracing runs forward(), which may leave its proxies in attributes; so that of a copy,
        # with the same tensors.
        twin = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    except Exception:  # whatever a module raises that cannot be copied
        twin = None
    if twin is not None:
        for bias, verdict in _judge(twin, whole=True):
            seen.setdefault(id(bias), []).append(verdict)
    return {
        name: _any(seen[id(p)]) if seen[id(p)] else None
        for name, p in model.named_parameters()
        if id(p) in seen
    }


def _trained_bias(module: nn.Module) -> nn.Parameter | None:
    norm = isinstance(module, _NORMS)
    if isinstance(module, torch.jit.ScriptModule):
        norm = module.original_name.rstrip("123d") in ("BatchNorm", "InstanceNorm", "SyncBatchNorm")
    # psBN has no parameter of this name.
    return dict(module.named_parameters(recurse=False)).get("bias") if norm else None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, _NORMS):
            return True
        inside = any(isinstance(m, _NORMS) for m in module.modules())
        return not inside and not isinstance(module, nn.Sequential)


def _judge(module: nn.Module, whole: bool) -> Iterator[tuple[nn.Parameter, bool | None]]:
    """Bias and verdict for each call of a norm layer that can be seen."""
    if isinstance(module, fx.GraphModule):
        graph = module.graph
    elif not any(isinstance(m, (*_NORMS, fx.GraphModule)) for m in module.modules()):
        return
    else:
        try:
            graph = _Tracer().trace(module)
        except Exception:  # whatever a forward() raises that is given a proxy
            for child in module.children():
                yield from _judge(child, whole=False)
            return
    for node in graph.nodes:
        bias = _bias_of(node, module)
        if bias is not None:
            yield bias, _any([_rectifies(user, module, whole) for user in node.users])


def _any(verdicts: list[bool | None]) -> bool | None:
    if True in verdicts:
        return True
    return None if None in verdicts else False


def _name(node: fx.Node) -> str:
    """'relu' for F.relu, x.relu(), x.relu_() and aten.relu_.default."""
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return target.split(".")[0].removesuffix("_")


def _bias_of(node: fx.Node, root: nn.Module) -> nn.Parameter | None:
    if node.op == "call_module":
        return _trained_bias(root.get_submodule(node.target))
    if node.op != "call_function" or _name(node) not in _NORMALIZE:
        return None
    # torch.nn.functional hands it on as a keyword; aten.batch_norm(x, weight, bias, mean, var, ...)
    source = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    path, _, name = source.target.rpartition(".")
    bias = getattr(root.get_submodule(path), name)
    return bias if isinstance(bias, nn.Parameter) else None


def _rectifies(node: fx.Node, root: nn.Module, whole: bool) -> bool | None:
    if node.op == "output":
        return False if whole else None
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        if isinstance(module, _RECTIFIERS):
            return True
        passes = isinstance(module, _PASSING)
        known = any(
            cls.__module__.startswith("torch.nn") and cls is not nn.Module
            for cls in type(module).__mro__
        )
    else:
        if _name(node) in _RECTIFY:
            return True
        passes = _name(node) in _PASS
        known = node.op == "call_method" or getattr(node.target, "__module__", "").startswith(
            ("torch", "_operator", "builtins", "math")
        )
    if passes:
        return _any([_rectifies(user, root, whole) for user in node.users])
    return False if known else None
