"""What psBN does in a training of mmengine, said at its start; and the lift by alpha."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import nn

from .activations import without_rectifier
from .layers import PostShift, lift


class PsBNHook(Hook):
    """Says at the start of a training what psBN does in it: ``dict(type='PsBNHook')``.

    How many layers, which alpha, which of them take over a BN's bias, which are frozen; and a
    warning for each way in which psBN would do nothing: no weight decay reaches ``beta``, or no
    optimizer holds it.

    Args:
        shift: Lift the network by alpha (:func:`.layers.lift`) once, before the first iteration; a
            resumed training is not lifted again. It is a property of this training: checkpoints
            load as they do without it.
    """

    def __init__(self, shift: bool = False) -> None:
        self.shift = shift

    def before_train(self, runner: Any) -> None:
        layers = post_shifted(runner.model)
        if not layers:
            runner.logger.warning("PsBNHook: the model has no psBN layer, so psBN does nothing")
            return
        taken_over = sum(layer.preserved for layer in layers.values())
        lifted = self.shift and runner.iter == 0 and lift(runner.model) > 0
        alphas = sorted({layer.initial_alpha for layer in layers.values()})
        said = f"psBN: {len(layers)} layers, alpha {', '.join(f'{alpha:g}' for alpha in alphas)}"
        if runner.iter > 0:
            said += "; resumed"
        else:
            how = "lifted by alpha" if lifted else "function preserved (beta = bias - alpha)"
            said += f"; {taken_over} took over the bias of a BN, {how}" if taken_over else ""
        frozen = [name for name, layer in layers.items() if not layer.beta.requires_grad]
        if frozen:
            said += f"; {len(frozen)} frozen (e.g. {frozen[0]}): psBN does nothing there"
        runner.logger.info(said)
        cfg = (getattr(runner, "cfg", None) or {}).get("optim_wrapper") or {}
        for warning in decay_warnings(runner.model, optimizers(runner), cfg):
            runner.logger.warning(warning)


def post_shifted(model: nn.Module) -> dict[str, PostShift]:
    """The post-shifted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PostShift)}


def optimizers(runner: Any) -> list[torch.optim.Optimizer]:
    """All optimizers of a Runner."""
    wrapper = runner.optim_wrapper
    return [w.optimizer for w in (wrapper.values() if hasattr(wrapper, "values") else [wrapper])]


def decay_warnings(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], cfg: Mapping[str, Any]
) -> Iterator[str]:
    """Why weight decay, without which psBN does nothing, does not reach trained betas.

    Args:
        model: The model.
        optimizers: All that update it.
        cfg: ``optim_wrapper`` of the config, to name the key that is responsible.
    """
    decay = {
        id(p): group.get("weight_decay", 0)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    betas = {
        f"{name}.beta".lstrip("."): layer.beta
        for name, layer in post_shifted(model).items()
        if layer.beta.requires_grad
    }
    if left := [name for name, beta in betas.items() if id(beta) not in decay]:
        yield (
            f"beta of {len(left)} psBN layers (e.g. {left[0]}) is in no optimizer and "
            "will not be trained. Does optim_wrapper.constructor select parameters "
            "named bias? Use mmengine's own, or keep BN and use AnchoredBiasDecay"
        )
    culprits: dict[str, list[str]] = {}
    undecayed = [name for name, beta in betas.items() if decay.get(id(beta)) == 0]
    layers = without_rectifier(model) if undecayed else set()
    smooth = {f"{name}.beta".lstrip(".") for name in layers}
    if undecayed and smooth >= {*undecayed}:
        yield (
            f"no ReLU follows any of the {len(undecayed)} psBN layers without weight "
            f"decay (e.g. {undecayed[0]}): their filters cannot collapse, so psBN has "
            "nothing to repair. Leave norm_decay_mult as it is"
        )
    for name in undecayed:
        if name not in smooth:
            culprits.setdefault(responsible_key(name, cfg), []).append(name)
    for key, names in culprits.items():
        yield (
            f"beta of {len(names)} psBN layers (e.g. {names[0]}) has no weight decay, "
            f"and psBN does nothing without it: {key}"
        )


def responsible_key(name: str, optim_wrapper: Mapping[str, Any]) -> str:
    """What in a config takes weight decay from the ``beta`` of a normalization layer.

    The order of the rules is that of mmengine's DefaultOptimWrapperConstructor.

    Args:
        name: Of the parameter.
        optim_wrapper: The config of that name.
    """
    constructor = optim_wrapper.get("constructor", "DefaultOptimWrapperConstructor")
    if constructor != "DefaultOptimWrapperConstructor":
        return f"see the param groups that optim_wrapper.constructor={constructor!r} makes"
    if not (optim_wrapper.get("optimizer") or {}).get("weight_decay"):
        return "set optim_wrapper.optimizer.weight_decay (the paper: 5e-4, on COCO 1e-4)"
    rules = optim_wrapper.get("paramwise_cfg") or {}
    keys = rules.get("custom_keys") or {}
    for key in sorted(sorted(keys), key=len, reverse=True):
        if key in name:
            return f"change decay_mult in optim_wrapper.paramwise_cfg.custom_keys[{key!r}]"
    for rule in ("norm_decay_mult", "flat_decay_mult"):
        if rules.get(rule) is not None:
            return f"remove optim_wrapper.paramwise_cfg.{rule}={rules[rule]}"
    return "see the param groups of the optimizer"
