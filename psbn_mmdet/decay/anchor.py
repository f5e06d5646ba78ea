r"""The training of psBN for a model whose BN layers stay: decay their biases toward alpha.

psBN adds `b = beta + alpha` and trains `beta` (arXiv 2001.11216, Eq. 6). **It is BN whose bias
decays toward alpha instead of 0**, whatever the optimizer: alpha is a constant, so `dL/dbeta =
dL/db`; an optimizer that takes `beta` to `U(beta, dL/dbeta)`, with its state, its decay and all,
takes psBN's `b` to ::

    b' = U(b - alpha, dL/db) + alpha.

For SGD with L2 decay `U(p, g) = p - eta (g + lambda p)`, and that is `b' = b - eta (g + lambda (b -
alpha))`; momentum, Nesterov and Adam see `g + lambda (b - alpha)` in the place of `g + lambda b`;
AdamW's own decay becomes `b - eta lambda (b - alpha)`.

So that is what happens here, literally: before a step the biases lose alpha, the optimizer steps on
`beta` without knowing, and after it they get alpha back. Three things follow that the other way, a
gradient of `-lambda alpha` on the bias, would not give. It is right for every decay: L2 or
decoupled, of any group, with any schedule. Gradients are left alone, so clipping by norm,
accumulation and logging see those of psBN. And where the optimizer does not run (AMP, on overflow),
nothing happens.

`beta` is kept from step to step, since `b = beta + alpha` is rounded: a step, however small, is not
lost to the larger number, and the run is psBN's to the bit. Where the bias is no longer the one
that the last step left (a checkpoint was loaded), `beta` is taken from it again. A bias that the
optimizer leaves alone (frozen, no gradient, a skipped step) keeps its bits.

**Where gamma is small, alpha may be too large.** What decay adds to `b / |gamma|` in a step, and so
to the probability that a filter fires, is `eta lambda alpha / |gamma|`: a gamma that decay has made
a hundredth of alpha turns ReLU into the identity. With `max_ratio` a layer's alpha is ::

    alpha_t = min(alpha, max_ratio * rms(gamma_t)),    rms over the channels of the layer,

of the gamma before each step. Where gamma is large it is psBN's constant, and the run psBN's to the
bit; this has no counterpart in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..norm import rectified

INIT = ("auto", "keep", "alpha")
# Their step() reads and writes the parameters in place, and no state of theirs is a parameter.
_KNOWN: list[type[Optimizer]] = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
]
if hasattr(torch.optim, "Adafactor"):  # from torch 2.5 on
    _KNOWN.append(torch.optim.Adafactor)


class NothingToAnchor(ValueError):
    """No bias of an optimizer can be anchored: it has none of them, or no decay on any."""


def anchor_bias_decay(
    model: nn.Module,
    optimizer: Optimizer,
    alpha: float = 0.1,
    *,
    layers: str | Sequence[str] = "relu",
    init: str = "auto",
    max_ratio: float | None = None,
    any_optimizer: bool = False,
    log: Callable[[str], Any] | None = print,
) -> AnchoredBiases:
    """Let weight decay pull the biases of norm layers toward alpha, as psBN does.

    No module, parameter or key of a state dict changes. Call it once, when model and optimizer are
    made and a checkpoint, if any, is loaded; the training loop stays as it is::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        anchored = anchor_bias_decay(model, optimizer)

    Copies are not anchored: after `copy.deepcopy((model, optimizer))` anchor the copies.

    Args:
        model: any module with BatchNorm or InstanceNorm layers, subclasses included; also compiled,
            scripted, exported, or wrapped for distributed data parallel training.
        optimizer: the optimizer of these biases. Several optimizers: one call for each.
        alpha: where the biases decay to; 0.1 worked across the paper's tasks.
        layers: 'relu' takes the biases after whose layer a rectifier follows and those where that
            cannot be told (`rectified`), 'all' those of all norm layers. Or the names of the
            biases, as in `model.named_parameters()`.
        init: 'keep' the biases as they are; set them to 'alpha', where psBN starts; or 'auto':
            alpha for layers as constructed (all biases 0, no batch seen), the others as loaded.
        max_ratio: alpha of a layer is at most this many times the root mean square of its gamma;
            with 1, a unit at rest fires with probability Phi(1) = 0.84. None: alpha everywhere, as
            psBN has it.
        any_optimizer: take also an optimizer that is not known here. It is right if its `step`
            reads and writes the parameters in place and has neither a copy nor an average of them.
        log: gets a text that says what was taken; None for silence.

    Returns:
        A handle: `names` of the biases taken, `remove()`, and a state dict, which a resumed run
        needs to be the uninterrupted one to the bit (without it, to rounding).

    Raises:
        TypeError: not an optimizer, or one that cannot be anchored or is not known to.
        ValueError: a wrong argument; no norm layer with a trained bias; biases that are anchored
            already.
        NothingToAnchor: none of these biases is in the optimizer, or it has no weight decay on any;
            a ValueError, too.
    """
    alpha, max_ratio = check_limits(alpha, max_ratio)
    if init not in INIT:
        raise ValueError(f"init is {init!r}: wanted one of {INIT}")
    _check_optimizer(optimizer, any_optimizer)
    inner = list(_unwrapped(model))[-1]
    biases, left = _choose(inner, layers)

    decay = {id(p): g.get("weight_decay", 0.0) for g in optimizer.param_groups for p in g["params"]}
    taken = {name: p for name, p in biases.items() if id(p) in decay}
    if not taken:
        raise NothingToAnchor(
            f"none of the {len(biases)} norm-layer biases is in this optimizer; create "
            "it from this model's parameters, after the model is wrapped or moved"
        )
    without = [name for name, p in taken.items() if not decay[id(p)]]
    if len(without) == len(taken):
        raise NothingToAnchor(
            f"weight decay is 0 for all {len(taken)} biases in this "
            f"{type(optimizer).__name__}: nothing to anchor (in mmengine, see "
            "norm_decay_mult and bias_decay_mult)"
        )
    for hook in optimizer._optimizer_step_pre_hooks.values():
        other = getattr(hook, "__self__", None)
        if isinstance(other, AnchoredBiases) and set(other.ids) & {id(p) for p in taken.values()}:
            raise ValueError("biases are anchored already; remove() the first handle first")

    gammas = None if max_ratio is None else _gammas(inner, taken)
    handle = AnchoredBiases(model, optimizer, taken, alpha, gammas, max_ratio)
    started = _to_start(inner, taken, init)
    handle._set_to_alpha(started)
    if log is not None:
        frozen = sum(not p.requires_grad for p in taken.values())
        limit = f", or {max_ratio:g} times gamma's RMS if that is less" if max_ratio else ""
        facts = [
            f"biases of {len(taken)} norm layers decay toward {alpha:g}{limit}",
            f"{len(started)} of them start there",
            f"{frozen} frozen" if frozen else "",
            f"no weight decay, so no effect: {', '.join(without)}" if without else "",
            f"in another optimizer: {len(biases) - len(taken)}" if len(biases) > len(taken) else "",
            f"not anchored, as no ReLU follows: {', '.join(left)}" if left else "",
        ]
        text = "; ".join(fact for fact in facts if fact)
        log(f"AnchoredBiasDecay: {text}. Taken: {', '.join(taken)}")
    return handle


def check_limits(alpha: Any, max_ratio: Any) -> tuple[float, float | None]:
    """Both as numbers.

    Raises:
        TypeError, ValueError: one is none, or not finite and above 0.
    """
    alpha = _positive("alpha", alpha, "the paper uses 0.1")
    if max_ratio is not None:
        max_ratio = _positive("max_ratio", max_ratio, "1 is a good start")
    return alpha, max_ratio


def _positive(name: str, given: Any, hint: str) -> float:
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name} is {given!r}: wanted a number")
    value = float(given)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {given}: wanted a finite number above 0 ({hint})")
    return value


def _check_optimizer(optimizer: Any, any_optimizer: bool) -> None:
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is not a torch.optim.Optimizer; give the optimizer that it wraps")
    if isinstance(optimizer, torch.optim.ASGD):
        raise TypeError(
            "ASGD averages the parameters, which would average beta and not the bias; "
            "use psBN layers (to_psbn) with it, or another optimizer"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise TypeError(f"{name} has differentiable=True, but shifting a bias has no gradient")
    if "weight_decay" not in optimizer.defaults:
        raise TypeError(f"{name} has no weight decay: nothing to anchor")
    if not any_optimizer and _step_of(type(optimizer)) not in map(_step_of, _KNOWN):
        raise TypeError(
            f"{name} is unknown, and so is its weight decay. If step() updates the "
            "parameters in place and keeps no copy or average of them, pass "
            "any_optimizer=True. Known: " + ", ".join(known.__name__ for known in _KNOWN)
        )


def _step_of(kind: type[Optimizer]) -> Callable[..., Any]:
    """The step that a class defines or inherits, without what torch wraps around it.

    Constructing an optimizer wraps the step of its class unless that is wrapped already, so a
    subclass gets a wrapper of its own or shares its base's, depending on which was made first.
    """
    wrapper = Optimizer.profile_hook_step(lambda *args: None)
    step: Any = kind.step
    while getattr(step, "__code__", None) is wrapper.__code__:
        step = step.__wrapped__
    return step


def _let_hooks_run(kind: type[Optimizer]) -> None:
    """Make the step of an optimizer's class call the hooks that are registered.

    The compiler of torch 2.1 takes them away from the classes of all optimizers, without a word and
    also from those that are made later, when `torch.compile` is first called. It does so once, so
    it is made to do it here, before the class gets them back.
    """
    if torch.__version__ < "2.6":  # as versions, not as text
        from torch._dynamo.eval_frame import TorchPatcher

        TorchPatcher.patch()
    hooking = Optimizer.profile_hook_step(lambda *args: None).__code__
    step: Any = kind.step
    while step is not None and getattr(step, "__code__", None) is not hooking:
        step = getattr(step, "__wrapped__", None)
    if step is None:
        step = Optimizer.profile_hook_step(kind.step)
        step.hooked = True
        kind.step = step  # type: ignore[method-assign]


def _unwrapped(model: Any) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside in: compiled, (distributed) data parallel."""
    yield model
    kinds = {cls.__name__ for cls in type(model).__mro__}
    if "OptimizedModule" in kinds:
        yield from _unwrapped(model._orig_mod)
    elif kinds & {"DistributedDataParallel", "DataParallel", "MMDistributedDataParallel"}:
        yield from _unwrapped(model.module)


def _gammas(model: nn.Module, taken: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The weight beside each bias, under the name of the bias."""
    params = dict(model.named_parameters(remove_duplicate=False))
    gammas = {name: params.get(name[: -len("bias")] + "weight") for name in taken}
    wrong = [n for n, p in taken.items() if getattr(gammas[n], "shape", None) != p.shape]
    if wrong:
        raise ValueError(
            f"max_ratio needs a gamma beside each bias; there is none at {', '.join(wrong)}"
        )
    return gammas  # type: ignore[return-value]


def _to_start(model: nn.Module, taken: dict[str, nn.Parameter], init: str) -> list[str]:
    """The names of the biases that are to be set to alpha."""
    used = set()  # layers that have seen a batch
    for module in model.modules():
        count = getattr(module, "num_batches_tracked", None)
        if count is not None and count > 0 and getattr(module, "bias", None) is not None:
            used.add(id(module.bias))
    return [
        name
        for name, bias in taken.items()
        if bias.requires_grad
        and (init == "alpha" or (init == "auto" and id(bias) not in used and not bias.any()))
    ]


class AnchoredBiases:
    """Biases that decay toward alpha; made by `anchor_bias_decay`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        biases: dict[str, nn.Parameter],
        alpha: float,
        gammas: dict[str, nn.Parameter] | None = None,
        max_ratio: float | None = None,
    ) -> None:
        self.alpha, self.max_ratio = alpha, max_ratio
        self.names = list(biases)
        self.ids = [id(p) for p in biases.values()]
        kinds: dict[tuple[Any, ...], dict[str, nn.Parameter]] = {}
        for name, p in biases.items():
            kinds.setdefault((p.device, p.dtype), {})[name] = p
        self._packs = [_Pack(group, alpha, gammas, max_ratio) for group in kinds.values()]
        self._stepping = False
        _let_hooks_run(type(optimizer))
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if isinstance(model, torch.jit.ScriptModule):
            return  # takes no hooks
        # A step that raises never gets to the post hook. Then the first look at the model gives the
        # biases their alpha back.
        self._hooks.append(model.register_forward_pre_hook(_Settle(self)))
        for module in _unwrapped(model):
            self._hooks.append(module.register_state_dict_pre_hook(_Settle(self)))
            register = getattr(
                module,
                "register_load_state_dict_pre_hook",
                module._register_load_state_dict_pre_hook,  # below torch 2.5
            )
            self._hooks.append(register(_Settle(self)))

    @torch.no_grad()
    def _set_to_alpha(self, names: list[str]) -> None:
        for pack in self._packs:
            for (name, p), value in zip(
                pack.params.items(), pack.split(pack.alphas()), strict=True
            ):
                if name in names:
                    p.copy_(value.view_as(p))

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        self.settle()
        self._lift()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            return None

        def on_the_biases() -> Any:
            self.settle()
            loss = closure()
            self._lift()
            return loss

        return args[:1], {**kwargs, "closure": on_the_biases}

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.settle()

    @torch.no_grad()
    def _lift(self) -> None:
        self._stepping = True
        for pack in self._packs:
            pack.to_beta()

    @torch.no_grad()
    def settle(self) -> None:
        """Give the biases alpha back if a step that raised has left them without; else nothing.

        The model's next forward, and reading or loading its state dict, do that by themselves, but
        for a model that is itself a ScriptModule.
        """
        if self._stepping:
            for pack in self._packs:
                pack.to_bias()
            self._stepping = False

    def state_dict(self) -> dict[str, Tensor]:
        """The betas, under the names of the biases; empty before the first step."""
        self.settle()
        return {name: beta for pack in self._packs for name, beta in pack.betas()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved betas. Load the model's own state dict, too, in either order.

        A saved beta counts only where `beta + alpha` is the bias, to the bit; elsewhere (weights or
        alpha are others) and where none is saved it is taken from the bias.

        Raises:
            ValueError: a beta has another shape than its bias.
        """
        self.settle()
        for pack in self._packs:
            pack.load(state)

    def remove(self) -> None:
        """Leave the biases as they are and let them decay toward 0 again."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _Pack:
    """Biases of one device and dtype as one flat tensor, so that a step costs a few kernels."""

    def __init__(
        self,
        params: dict[str, nn.Parameter],
        alpha: float,
        gammas: dict[str, nn.Parameter] | None,
        max_ratio: float | None,
    ) -> None:
        self.params = params
        self.alpha = torch.tensor(alpha, dtype=next(iter(params.values())).dtype)  # as psBN has it
        self.gammas: list[Tensor] = [gammas[name] for name in params] if gammas else []
        self.max_ratio = max_ratio
        self.sizes = [p.numel() for p in params.values()]
        self.roots = torch.tensor(self.sizes).sqrt()
        self.layer = torch.arange(len(params)).repeat_interleave(torch.tensor(self.sizes))
        self.beta: Tensor | None = None
        self.during: tuple[Tensor, Tensor] | None = None  # a step: the biases before it, alphas

    def alphas(self) -> Tensor:
        """One for all, or with `max_ratio` one of each channel, by the gammas as they are."""
        if self.max_ratio is None:
            return self.alpha
        norms = torch.stack(torch._foreach_norm(self.gammas))
        self.roots, self.layer = self.roots.to(norms.device), self.layer.to(norms.device)
        most = (self.max_ratio * norms / self.roots).to(self.alpha.dtype)
        return most.clamp(max=self.alpha.item())[self.layer]

    def to_beta(self) -> None:
        bias, alphas = self._read(), self.alphas()
        beta = bias - alphas
        if self.beta is not None:
            kept = self.beta.to(bias)  # the model may have moved
            beta = torch.where(kept + alphas == bias, kept, beta)
        self.during, self.beta = (bias, alphas), beta
        self._write(beta)

    def to_bias(self) -> None:
        assert self.during is not None and self.beta is not None  # after to_beta()
        bias, before = self.during
        stepped, alphas = self._read(), self.alphas()
        beta = stepped if self.max_ratio is None else stepped + (before - alphas)
        self._write(torch.where(stepped == self.beta, bias, beta + alphas))
        self.during, self.beta = None, beta

    def split(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.expand(sum(self.sizes)).split(self.sizes)

    def _read(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params.values()])

    def _write(self, flat: Tensor) -> None:
        params: list[Tensor] = list(self.params.values())
        pieces = self.split(flat)
        torch._foreach_copy_(params, [v.view_as(p) for v, p in zip(pieces, params, strict=True)])

    def betas(self) -> Iterator[tuple[str, Tensor]]:
        if self.beta is not None:
            for (name, p), value in zip(self.params.items(), self.split(self.beta), strict=True):
                yield name, value.view_as(p).clone()

    def load(self, betas: dict[str, Tensor]) -> None:
        pieces = []
        for (name, p), here in zip(
            self.params.items(), self.split(self._read() - self.alphas()), strict=True
        ):
            value = betas.get(name, here.view_as(p))
            if value.shape != p.shape:
                raise ValueError(
                    f"the saved beta of {name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(p.shape)}: it belongs to another model"
                )
            pieces.append(value.to(p).reshape(-1))
        self.beta = torch.cat(pieces)


class _Settle:
    """A module hook; in a copy or a pickle of the module, which is in no step, it does nothing."""

    def __init__(self, anchored: AnchoredBiases | None = None) -> None:
        self.anchored = anchored

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.anchored is not None and self.anchored._stepping:
            self.anchored.settle()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Settle, ()


def _choose(
    model: nn.Module, layers: str | Sequence[str]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The biases to take and the names of those to leave."""
    params = dict(model.named_parameters())
    if not isinstance(layers, str):
        unknown = [name for name in layers if name not in params]
        if unknown or not layers:
            raise ValueError(
                f"no parameters {unknown} in the model: wanted names of biases as in"
                " named_parameters(), 'relu' or 'all'"
            )
        return {name: params[name] for name in layers}, []
    if layers not in ("relu", "all"):
        raise ValueError(f"layers is {layers!r}: wanted 'relu', 'all' or a list of names")
    verdicts = rectified(model)
    if not verdicts:
        raise ValueError(
            "the model has no BatchNorm or InstanceNorm with a trained bias: nothing "
            "to anchor (psBN layers need no anchor; name other biases in `layers`)"
        )
    left = [name for name, verdict in verdicts.items() if verdict is False and layers == "relu"]
    if len(left) == len(verdicts):
        raise ValueError(
            f"no ReLU follows any of the {len(left)} norm layers; use layers='all' to "
            "anchor them anyway"
        )
    return {name: params[name] for name in verdicts if name not in left}, left
