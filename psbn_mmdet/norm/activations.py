"""What follows each norm layer: a rectifier, another activation or none, as far as torch.fx tells.

A filter can only collapse where a rectifier silences it, so decay and measurement ask this first.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Literal

import torch
from torch import fx, nn

from .recognize import is_norm_layer, norm_layers

Follower = Literal["relu", "leaky", "hard", "other", "none", "sum", "unknown"]

# By the name of the function, method or operator; nn's classes are written alike.
_RELU = {"relu", "relu6"}
_LEAKY = {"leaky_relu", "prelu", "rrelu"}
_HARD = {
    *("hardswish", "hardsigmoid", "hardshrink", "softshrink", "hardtanh", "clamp", "clamp_min"),
    *("clamp_max", "clip", "threshold", "_threshold", "maximum", "minimum"),
}
_OTHER = {
    *("silu", "gelu", "elu", "selu", "celu", "mish", "glu", "sigmoid", "logsigmoid", "tanh"),
    *("softplus", "softsign", "tanhshrink", "softmax", "log_softmax"),
}
_COMPARE = {"gt", "ge", "lt", "le", "eq", "ne"}  # no gradient passes
_ZEROS = {"zeros", "zeros_like", "new_zeros"}
_AS = {"float", "half", "to", "type_as"}
# A channel that is never positive in front of these is never positive behind them.
_PASS = {
    *("add", "iadd", "cat", "concat", "concatenate", "stack", "getitem", "chunk", "split"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "identity", "alias"),
    *("flatten", "reshape", "view", "unflatten", "permute", "transpose", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "detach", "to", "_to_copy", "float", "half", "type_as", "pad"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "mean", "sum"),
    *("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
# Behind these the sign of what arrives depends on other channels or positions, too.
_MIX = {
    *("add", "iadd", "sub", "isub", "rsub", "mean", "sum", "interpolate", "upsample"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}
_SCALE = {"mul", "imul", "multiply", "div", "truediv", "itruediv"}
_FLIP = {"sub", "isub", "rsub", "neg"}
_METADATA = {"size", "dim", "ndimension", "numel", "is_floating_point", "sym_size"}
_PASSING_MODULES = (
    *("torch.nn.modules.pooling", "torch.nn.modules.padding", "torch.nn.modules.dropout"),
    *("torch.nn.modules.flatten", "torch.nn.modules.upsampling", "torch.nn.modules.pixelshuffle"),
    "torch.nn.modules.channelshuffle",
)
_NORMALIZE = {"batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit"}


def followed_by(
    model: nn.Module, *, whole: bool = True, through_sums: bool = True
) -> dict[str, Follower]:
    """What the output of each norm layer goes into, told from the model's own code.

    ===========  ======================================================================
    ``relu``     ReLU, ReLU6 or a clamp at 0: exactly 0 with no gradient where negative
    ``leaky``    LeakyReLU, PReLU or RReLU: a gradient everywhere
    ``hard``     another one with an exact region without gradient: Hardswish, a clamp elsewhere
    ``other``    another activation, such as SiLU, GELU or Sigmoid
    ``none``     no activation: a convolution, another norm layer, the end of the model
    ``sum``      an addition or average, if these are not looked through
    ``unknown``  cannot be told
    ===========  ======================================================================

    Additions, concatenations, pooling, `nn.Identity`, dropout and changes of shape are looked
    through: what follows them follows the layer, so the last norm layer of a ResNet's block is
    followed by the ReLU behind the sum. Where a layer's output has several uses, the answer is the
    one that lets most through (none, leaky, other, hard, unknown, relu in this order): a layer is
    'relu' only if nothing of it escapes a ReLU.

    The model is traced by torch.fx, with the defaults of its `forward` (for a detector of mmdet,
    `mode='tensor'`); where that fails, and for layers that it does not reach, its parts are, again
    with their defaults. What follows a layer at the end of a part is unknown. Modules without norm
    layers are looked into if they can be traced. The model itself is left as it is.

    Args:
        model: Any module. Scripted ones cannot be traced.
        whole: Whether the model is all there is. If not, what follows its outputs is unknown.
        through_sums: Whether additions are looked through. If not, ``relu`` is said only of layers
            whose gamma and bias alone decide whether it fires.

    Returns:
        By the layer's name, for all of `norm_layers(model)`.
    """
    by_name, _ = _all_uses(model, whole, through_sums)
    return {name: _most_open(by_name.get(name)) for name in norm_layers(model)}


def rectified(model: nn.Module) -> dict[str, bool | None]:
    """Whether a rectifier follows the norm layer of each trained bias: True, False, None: unknown.

    True if any use of the layer's output is 'relu', 'leaky' or 'hard' as :func:`followed_by` has
    it. The functional `batch_norm` of a traced or exported graph counts as a layer. psBN layers
    have no parameter `bias` and are not listed.

    Returns:
        By the name of the bias, as in `model.named_parameters()`.

    Raises:
        ValueError: a lazy layer has no shape yet.
    """
    biases: dict[int, bool | None] = {}
    for name, module in norm_layers(model).items():
        bias = _trained_bias(module)
        if isinstance(bias, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name}.bias has no shape yet; run the model once first")
        if bias is not None:
            biases[id(bias)] = None
    _, by_bias = _all_uses(model, whole=True)
    biases.update({key: _rectifies(kinds) for key, kinds in by_bias.items()})
    return {name: biases[id(p)] for name, p in model.named_parameters() if id(p) in biases}


def without_rectifier(model: nn.Module) -> set[str]:
    """The names of the norm layers of which it is known that no use is rectified.

    As :func:`rectified`, for psBN layers too; what follows the outputs of the model is unknown.
    """
    by_name, _ = _all_uses(model, whole=False)
    return {name for name, kinds in by_name.items() if _rectifies(kinds) is False}


def _rectifies(kinds: set[Follower]) -> bool | None:
    if kinds & {"relu", "leaky", "hard"}:
        return True
    return None if "unknown" in kinds else False


def _most_open(kinds: set[Follower] | None) -> Follower:
    if kinds is None:
        return "unknown"
    order: list[Follower] = ["none", "sum", "leaky", "other", "hard", "unknown", "relu"]
    return next((kind for kind in order if kind in kinds), "none")  # no use at all


def _trained_bias(module: nn.Module) -> nn.Parameter | None:
    # psBN has no parameter of this name.
    return dict(module.named_parameters(recurse=False)).get("bias")


def _all_uses(
    model: nn.Module, whole: bool, through_sums: bool = True
) -> tuple[dict[str, set[Follower]], dict[int, set[Follower]]]:
    """The kinds of use of each layer that can be seen: by its name, and by id() of its bias."""
    by_name: dict[str, set[Follower]] = {}
    by_bias: dict[int, set[Follower]] = {}
    try:
        # Tracing runs forward(), which may leave its proxies in attributes, count in buffers and
        # draw random numbers; so that of a copy, with the same parameters.
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    except Exception:  # whatever a module raises that cannot be copied
        return by_name, by_bias
    names = {id(module): name for name, module in twin.named_modules()}
    with torch.random.fork_rng(devices=[]):
        for layer, bias, kinds in _look(twin, whole, set(), through_sums):
            by_name.setdefault(names[id(layer)], set()).update(kinds)
            if bias is not None:
                by_bias.setdefault(id(bias), set()).update(kinds)
    return by_name, by_bias


_Seen = tuple[nn.Module, nn.Parameter | None, set[Follower]]


def _look(module: nn.Module, whole: bool, known: set[int], through_sums: bool) -> Iterator[_Seen]:
    """Each call of a norm layer: from the module's graph; layers not in it from those of its parts.

    Args:
        module: Where to look.
        whole: As in :func:`followed_by`.
        known: id() of layers seen already, which need no second look; filled here.
        through_sums: As in :func:`followed_by`.
    """
    inside = norm_layers(module).values()
    graph = _graph_of(module)
    if graph is not None:
        scope = _Scope(module, lambda: {"none"} if whole else {"unknown"}, through_sums)
        new = [
            (*called, _own_activation(called[0]) or scope.uses(node))
            for node in graph.nodes
            if (called := _layer_of(node, module)) and id(called[0]) not in known
        ]
        yield from new
        known.update(id(layer) for layer, _, _ in new)
    if any(id(layer) not in known for layer in inside):
        for child in module.children():
            if any(id(m) not in known for m in norm_layers(child).values()):
                yield from _look(child, False, known, through_sums)


def _own_activation(layer: nn.Module) -> set[Follower]:
    """The activation that a norm layer applies itself, as timm's BatchNormAct2d does."""
    act = getattr(layer, "act", None)
    kind = _module_kind(act) if isinstance(act, nn.Module) else "pass"
    return set() if kind == "pass" else {kind or "unknown"}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if is_norm_layer(module) or isinstance(module, torch.jit.ScriptModule):
            return True
        inside = any(is_norm_layer(m) for m in module.modules())
        return not inside and not isinstance(module, nn.Sequential)


def _graph_of(module: nn.Module) -> fx.Graph | None:
    """The graph of a module called with the defaults of its forward, or else with any arguments."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    if is_norm_layer(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    with contextlib.suppress(Exception):
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        for concrete in [defaults, None] if defaults else [None]:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "cannot add an assertion" for some defaults
                return _Tracer().trace(module, concrete)
    return None


def _layer_of(node: fx.Node, root: nn.Module) -> tuple[nn.Module, nn.Parameter | None] | None:
    """The norm layer that a node calls, and its trained bias."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return (module, _trained_bias(module)) if is_norm_layer(module) else None
    if node.op != "call_function" or _name(node) not in _NORMALIZE:
        return None
    # torch.nn.functional hands it on as a keyword; aten.batch_norm(x, weight, bias, mean, var, ...)
    source: Any = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
    shifted = isinstance(source, fx.Node) and _name(source) == "add"  # beta + alpha
    if shifted:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    path, _, name = str(source.target).rpartition(".")
    owner = root.get_submodule(path)
    bias = getattr(owner, name)
    return owner, bias if isinstance(bias, nn.Parameter) and not shifted else None


def _name(node: fx.Node) -> str:
    """'relu' for F.relu, x.relu(), x.relu_() and aten.relu_.default."""
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return (target.split(".")[0]).removesuffix("_")


class _Scope:
    """A graph being read: the module it is of, and what its outputs go into."""

    def __init__(
        self, root: nn.Module, at_output: Callable[[], set[Follower]], through_sums: bool
    ) -> None:
        self.root = root
        self.at_output = at_output
        self.through_sums = through_sums
        self._known: dict[fx.Node, set[Follower]] = {}

    def uses(self, node: fx.Node) -> set[Follower]:
        """What the value of a node goes into; each kind once."""
        if node not in self._known:
            kinds: set[Follower] = set()
            for user in node.users:  # in order of execution
                kinds |= self._use(user, node)
                if self._in_place(user):  # what comes later gets the activation's result
                    break
            self._known[node] = kinds
        return self._known[node]

    def _in_place(self, user: fx.Node) -> bool:
        if user.op == "call_module":
            module = self.root.get_submodule(str(user.target))
            return getattr(module, "inplace", False) is True and _module_kind(module) != "pass"
        if user.op not in ("call_function", "call_method"):
            return False
        name = user.target if isinstance(user.target, str) else user.target.__name__
        in_place = name.split(".")[0].endswith("_") or user.kwargs.get("inplace") is True
        return in_place and _name(user) in _RELU | _LEAKY | _HARD | _OTHER

    def _use(self, user: fx.Node, source: fx.Node) -> set[Follower]:
        if user.op == "output":
            return self.at_output()
        if user.op == "call_module":
            module = self.root.get_submodule(str(user.target))
            kind = _module_kind(module)
            if kind == "pass":
                mixes = (
                    type(module).__module__.endswith("pooling") and "Avg" in type(module).__name__
                )
                return self.uses(user) if self.through_sums or not mixes else {"sum"}
            return {kind} if kind else self._inside(module, user, source)
        name = _name(user)
        if name in _MIX and not self.through_sums:
            return {"sum"}
        if name in _RELU or (name in _HARD and _cuts_at_0(user)) or _keeps_positive(user, source):
            return {"relu"}
        if name in _HARD or (name == "where" and _compares(user.args[0], source)):
            return {"hard"}
        if name in _COMPARE | _ZEROS or (name in _AS and user.args[0] is not source):
            return set()
        if name in _LEAKY:
            return {"leaky"}
        if name in _OTHER:
            return {"other"}
        if name in _METADATA or (name == "getattr" and user.args[1] not in ("T", "mT", "data")):
            return set()
        if name in _PASS or name == "getattr":
            return self.uses(user)
        if name in _SCALE | _FLIP:
            return self._scaled(user, source)
        known = user.op == "call_method" or getattr(user.target, "__module__", "").startswith(
            ("torch", "_operator", "builtins", "math")
        )
        return {"none"} if known else {"unknown"}

    def _scaled(self, user: fx.Node, source: fx.Node) -> set[Follower]:
        """A product or difference keeps the sign only if the other number is known."""
        others = [arg for arg in user.args if arg is not source]
        if any(isinstance(arg, fx.Node) and source in arg.all_input_nodes for arg in others):
            return {"other"}  # x * sigmoid(x)
        kinds = self.uses(user)
        name = _name(user)
        if name in _SCALE and all(isinstance(arg, Real) and arg > 0 for arg in others):
            return kinds
        if name in ("sub", "isub") and user.args[0] is source:
            return kinds
        return {"unknown" if kind == "relu" else kind for kind in kinds}

    def _inside(self, module: nn.Module, user: fx.Node, source: fx.Node) -> set[Follower]:
        """What a module that is not torch's own does with its argument."""
        # As in evaluation, where the stochastic depth of DropPath, say, does nothing.
        graph = _graph_of(module.eval())
        if graph is None:
            return {"unknown"}
        arguments = [node for node in graph.nodes if node.op == "placeholder"]
        starred = any(str(node.target).startswith("*") for node in arguments)
        if not user.kwargs and not starred:
            arguments = [a for a, value in zip(arguments, user.args) if _holds(value, source)]
        if not arguments:
            return {"unknown"}
        scope = _Scope(module, lambda: self.uses(user), self.through_sums)
        return set().union(*(scope.uses(argument) for argument in arguments))


def _holds(value: Any, source: fx.Node) -> bool:
    """Whether an argument is a node, or a list, tuple or dict with it in it."""
    nodes: list[fx.Node] = []
    fx.node.map_arg(value, nodes.append)
    return source in nodes


def _cuts_at_0(node: fx.Node) -> bool:
    """Whether hardtanh or a clamp is at 0 from below, as ReLU6 is exported, or a threshold is 0."""
    if _name(node) in ("threshold", "_threshold"):
        given = [*node.args[1:], *node.kwargs.values()]
        return len(given) >= 2 and all(isinstance(g, Real) and g == 0 for g in given[:2])
    if _name(node) not in ("hardtanh", "clamp", "clamp_min", "clip"):
        return False
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    return isinstance(low, Real) and low == 0


def _compares(value: Any, source: fx.Node) -> bool:
    """Whether a value is a comparison of a node, as a mask or as numbers."""
    while isinstance(value, fx.Node) and _name(value) in _AS:
        value = value.args[0]
    return isinstance(value, fx.Node) and _name(value) in _COMPARE and source in value.args


def _is_0(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return _name(value) in _ZEROS
    return isinstance(value, Real) and value == 0


def _keeps_positive(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is ReLU written out: max(x, 0), where(x > 0, x, 0), x * (x > 0)."""
    mask: Any
    name, args = _name(node), node.args
    if name in ("maximum", "max"):
        return len(args) == 2 and any(_is_0(arg) for arg in args)
    if name == "where" and len(args) == 3:
        mask, kept, other = args
    elif name in _SCALE and len(args) == 2:
        mask, kept, other = args[args[0] is source], source, 0
    else:
        return False
    if kept is not source or not _is_0(other) or not _compares(mask, source):
        return False
    while _name(mask) not in _COMPARE:
        mask = mask.args[0]
    return _name(mask) in ("gt", "ge") and mask.args[0] is source and _is_0(mask.args[1])


def _module_kind(module: nn.Module) -> Follower | Literal["pass"] | None:
    """What is known of a module by its class; None for one that is not torch's own."""
    if isinstance(module, (nn.ReLU, nn.ReLU6)):
        return "relu"
    if isinstance(module, (nn.LeakyReLU, nn.PReLU, nn.RReLU)):
        return "leaky"
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:
        return "relu"
    if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
        return "relu"
    if type(module).__name__.lower() in _HARD and type(module).__module__.startswith("torch.nn"):
        return "hard"
    homes = [cls.__module__ for cls in type(module).__mro__ if cls is not nn.Module]
    home = next((home for home in homes if home.startswith("torch.nn")), None)
    if isinstance(module, nn.Identity) or home in _PASSING_MODULES:
        return "pass"
    if home == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention):
        return "other"
    return "none" if home or is_norm_layer(module) else None
