"""What this package costs, as ratios of pairs that alternate in one process.

layers      the 53 normalization layers of a ResNet-50: psBN beside BN
step        a training step of RetinaNet-R50: psBN beside BN
amp         a training step of it under autocast to bfloat16 beside float32
hook        a training step with SparsityLoggerHook at every iteration beside without
anchored    a training step with AnchoredBiasDecay beside without
measure     one measurement of a model's filters beside the usual loop of .item() per layer
checkpoint  finding the collapsed filters of a ResNet-152 checkpoint beside reading it
strip       inference of a ResNet-50 with 50% or 60% of the filters within its blocks collapsed,
            beside the same network without them

Comparing AP has its own: tools/benchmark_ap.py.
"""

from __future__ import annotations

import argparse
import gc
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from psbn_mmdet import psBN
from psbn_mmdet.collapse import (
    activation_probability,
    count,
    gather,
    measure,
    norm_modules,
    strip,
)
from psbn_mmdet.launch import load_config
from psbn_mmdet.launch.amp import cpu_has_bfloat16

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH, BATCH = 192, 320, 2


class UsualPSBN(nn.BatchNorm2d):
    """The obvious implementation: one more pass over the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1


def alternate(
    variants: dict[str, Callable[[], Any]],
    rounds: int,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each variant, in another order every round, after two rounds to warm up.

    Args:
        variants: What to time, by name.
        rounds: How many times.
        prepare: Called with the name before each run, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    gc.disable()
    for i in range(-2, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            prepare(name)
            started = time.perf_counter()
            variants[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
        gc.collect()
    gc.enable()
    return seconds


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once beyond those before the run."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def table(seconds: dict[str, list[float]], memory: dict[str, int] | None = None) -> str:
    """Median times, and the ratios round by round to the first variant."""
    base = next(iter(seconds))
    lines = ["| | median ms | time: median ratio (quartiles) | peak memory: ratio |"]
    lines.append("|---|---|---|---|")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = "1" if name == base else f"{middle:.3f} ({low:.3f} to {high:.3f})"
        part = f"{memory[name] / memory[base]:.3f}" if memory else "-"
        lines.append(f"| {name} | {1000 * statistics.median(values):.2f} | {spread} | {part} |")
    return "\n".join(lines)


def timed(variants: dict[str, Callable[[], Any]], rounds: int) -> str:
    seconds = alternate(variants, rounds)
    return table(seconds, {name: peak_memory(run) for name, run in variants.items()})


def retinanet(norm: str) -> nn.Module:
    """RetinaNet-R50 of a config, all of it training, with batch statistics."""
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    torch.manual_seed(0)
    cfg = load_config(str(ROOT / f"configs/retinanet/retinanet_{norm}_500.py"))
    cfg.model.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    model = MODELS.build(cfg.model)
    model.train()
    return model


def training_step(
    model: Any, amp: bool = False
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A step of SGD on random images with random boxes; ``amp``: its forward pass in bfloat16."""
    from mmdet.testing import demo_mm_inputs

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    data = demo_mm_inputs(BATCH, [[3, HEIGHT, WIDTH]] * BATCH, num_classes=80)
    data = model.data_preprocessor(data, training=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, _ = model.parse_losses(model(**data, mode="loss"))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)  # or random weights run away to NaN
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def bench_layers(rounds: int = 60) -> str:
    from mmdet.models import ResNet

    model, inputs = ResNet(50), []
    model.eval()  # mmdet's returns nothing
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, y: inputs.append(torch.randn_like(y)))
    with torch.no_grad():
        model(torch.zeros(BATCH, 3, HEIGHT, WIDTH))
    inputs = [x.requires_grad_() for x in inputs]
    gradients = [torch.randn_like(x) for x in inputs]

    def variant(kind: type[nn.Module]) -> Callable[[], None]:
        layers = [kind(x.shape[1]) for x in inputs]

        def run() -> None:
            # All forward, then all backward, so that memory holds what a network's would.
            outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
            torch.autograd.backward(outputs, gradients)
            for tensor in [*inputs, *(p for layer in layers for p in layer.parameters())]:
                tensor.grad = None

        return run

    kinds = {"nn.BatchNorm2d": nn.BatchNorm2d, "psBN": psBN, "BN(x) + alpha": UsualPSBN}
    return timed({name: variant(kind) for name, kind in kinds.items()}, rounds)


def bench_step(rounds: int = 20) -> str:
    usual = retinanet("bn")
    for module in usual.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = UsualPSBN
    models = {"BN": retinanet("bn"), "psBN": retinanet("psbn"), "BN(x) + alpha": usual}
    return timed({name: training_step(model)[0] for name, model in models.items()}, rounds)


def bench_amp(rounds: int = 20) -> str:
    if not cpu_has_bfloat16():
        return "not timed: this processor does not compute in bfloat16"
    variants = {
        f"{norm}, {name}": training_step(retinanet(norm.lower()), amp)[0]
        for norm in ("psBN", "BN")
        for name, amp in (("float32", False), ("bfloat16", True))
    }
    return timed(variants, rounds)


def bench_hook(rounds: int = 30) -> str:
    from psbn_mmdet.collapse.hook import SparsityLoggerHook

    model = retinanet("bn")
    step, optimizer = training_step(model)
    with tempfile.TemporaryDirectory() as folder:
        runner = SimpleNamespace(
            model=model,
            work_dir=folder,
            iter=0,
            optim_wrapper=SimpleNamespace(optimizer=optimizer),
            cfg={},
            logger=SimpleNamespace(info=lambda _: None, warning=lambda _: None),
            visualizer=SimpleNamespace(add_scalars=lambda *_, **__: None),
            hooks=[],
        )
        hook = SparsityLoggerHook(interval=1, figures=False)
        hook.before_train(runner)

        def after_step() -> None:
            hook.after_train_iter(runner)
            runner.iter += 1

        def watched_step() -> None:
            hook.before_train_iter(runner, runner.iter)
            step()

        def step_and_hook() -> None:
            watched_step()
            after_step()

        seconds = alternate({"without": step, "with": step_and_hook}, rounds)
        # A step before each, so that there is something new to write.
        alone = alternate({"alone": after_step}, 20, prepare=lambda _: watched_step())["alone"]
        size = Path(folder, "collapse.trace").stat().st_size / runner.iter
    return f"{table(seconds)}\n{share(alone, seconds['without'])}, {size / 1e3:.0f} kB written"


def share(alone: list[float], step: list[float]) -> str:
    """A hook timed by itself, since its share may be far below the noise of a step."""
    hook = statistics.median(alone)
    ratio = 1 + hook / statistics.median(step)
    return f"\nthe hook by itself: {1000 * hook:.2f} ms, so a step takes {ratio:.4f} times as long"


def bench_anchored(rounds: int = 30) -> str:
    from psbn_mmdet.decay import anchor_bias_decay

    # One model and one optimizer, so that memory lies the same.
    model = retinanet("bn")
    step, optimizer = training_step(model)
    handles: list[Any] = []

    def put_on_or_off(name: str) -> None:
        while handles:
            handles.pop().remove()
        if name == "with":
            handles.append(anchor_bias_decay(model, optimizer, init="keep", log=None))

    seconds = alternate({"without": step, "with": step}, rounds, put_on_or_off)
    put_on_or_off("without")
    hooks: dict[str, Callable[[], Any]] = {}
    for name, ratio in (("by itself", None), ("by itself, max_ratio=1", 1)):
        handle = anchor_bias_decay(model, optimizer, init="keep", max_ratio=ratio, log=None)
        handle.remove()  # called by hand below

        def hook(handle: Any = handle) -> None:
            handle._before_step(optimizer, (optimizer,), {})
            handle._after_step(optimizer, (optimizer,), {})

        hooks[name] = hook
    alone = alternate(hooks, 300)
    return f"{table(seconds)}\n{table(alone)}\n{share(alone['by itself'], seconds['without'])}"


def bench_measure(rounds: int = 200) -> str:
    model = retinanet("bn")
    layers: list[Any] = list(norm_modules(model).values())

    def loop_of_the_same_counts() -> None:
        counts = dict.fromkeys(("filters", "collapsed", "constant", "inactive", "probability"), 0.0)
        for layer in layers:
            gamma, bias = layer.weight.detach(), layer.bias.detach()
            collapsed = gamma.abs() < 1e-3
            probability = activation_probability(gamma, bias)
            counts["filters"] += gamma.numel()
            counts["collapsed"] += collapsed.sum().item()
            counts["constant"] += (collapsed & (bias >= 1e-3)).sum().item()
            counts["inactive"] += (probability < 1e-3).sum().item()
            counts["probability"] += probability.sum().item()

    def loop_of_gamma_alone() -> None:
        collapsed = 0.0
        for layer in layers:
            collapsed += (layer.weight.detach().abs() < 1e-3).sum().item()

    variants = {
        "loop of the same counts": loop_of_the_same_counts,
        "loop of gamma alone": loop_of_gamma_alone,
        "one measurement": lambda: count(*gather(layers)),
    }
    # On a GPU each .item() is a synchronisation; a measurement has one in all.
    return table(alternate(variants, rounds))


def bench_checkpoint(rounds: int = 10) -> str:
    from mmdet.models import ResNet

    buffer = io.BytesIO()
    torch.save(ResNet(152).state_dict(), buffer)

    def read() -> dict[str, torch.Tensor]:
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    state_dict = read()
    return table(alternate({"read": read, "measure": lambda: measure(state_dict).table()}, rounds))


def bench_strip(rounds: int = 30) -> str:
    from mmdet.models import ResNet

    texts = []
    for share in (0.5, 0.6):
        torch.manual_seed(0)
        model = ResNet(50)
        model.eval()  # mmdet's returns nothing
        norms: dict[str, Any] = dict(norm_modules(model))
        for name, norm in norms.items():
            if name.endswith(("bn1", "bn2")):  # not what is added up between blocks
                gone = torch.randperm(norm.num_features)[: int(share * norm.num_features)]
                norm.weight.data[gone], norm.bias.data[gone] = 0, -1
        stripped = strip(model, (3, HEIGHT, WIDTH))
        x = torch.randn(BATCH, 3, HEIGHT, WIDTH)
        macs = stripped.record["macs"]

        @torch.no_grad()
        def run(network: nn.Module, x: torch.Tensor = x) -> None:
            network(x)

        variants: dict[str, Callable[[], Any]] = {
            "whole": partial(run, model),
            "stripped": partial(run, stripped.model),
        }
        seconds = alternate(variants, rounds)
        faster = [a / b for a, b in zip(*seconds.values(), strict=True)]
        texts.append(
            f"{100 * share:.0f}% of the filters within blocks collapsed: "
            f"{100 * (1 - macs['after'] / macs['before']):.0f}% of FLOPs saved, "
            f"{statistics.median(faster):.2f} times as fast\n\n{table(seconds)}"
        )
    return "\n\n".join(texts)


BENCHMARKS: dict[str, Callable[..., str]] = {
    "layers": bench_layers,
    "step": bench_step,
    "amp": bench_amp,
    "hook": bench_hook,
    "anchored": bench_anchored,
    "measure": bench_measure,
    "checkpoint": bench_checkpoint,
    "strip": bench_strip,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the above; default: all")
    parser.add_argument("--rounds", type=int, help="times that each is run")
    args = parser.parse_args()
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(
            f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}"
        )
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}: wanted 2 or more")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; "
        f"networks at batch {BATCH}, {WIDTH}x{HEIGHT}"
    )
    for name in args.names or BENCHMARKS:
        rounds = {} if args.rounds is None else {"rounds": args.rounds}
        print(f"\n{name}\n\n{BENCHMARKS[name](**rounds)}", flush=True)


if __name__ == "__main__":
    main()
