"""What psBN costs beside BN: time as ratios of pairs that alternate in one process, and memory.

python tools/benchmark_norm.py layers   # the 53 normalization layers of a ResNet-50
python tools/benchmark_norm.py step     # a training step of RetinaNet-R50
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from psbn_mmdet import psBN
from psbn_mmdet.launch import load_config

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, WIDTH, BATCH = 192, 320, 2


class UsualPSBN(nn.BatchNorm2d):
    """The obvious implementation: one more pass over the output, one more activation kept."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1


def alternate(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, in another order every round, after two rounds to warm up."""
    seconds = {name: [] for name in variants}
    names = list(variants)
    for i in range(-2, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = time.perf_counter()
            variants[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_memory(run: Callable[[], None]) -> int:
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
    base = next(iter(seconds))
    lines = [
        "| | median ms | time / BN: median (quartiles) | peak memory / BN |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        part = f"{memory[name] / memory[base]:.3f}" if memory else "-"
        lines.append(
            f"| {name} | {1000 * statistics.median(values):.1f} "
            f"| {middle:.3f} ({low:.3f} to {high:.3f}) | {part} |"
        )
    return "\n".join(lines)


def resnet50_norm_inputs() -> list[torch.Size]:
    """The shapes that reach the 53 normalization layers."""
    from mmdet.models import ResNet

    model, shapes = ResNet(50), []
    model.eval()  # mmdet's returns nothing
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, inputs, y: shapes.append(inputs[0].shape))
    with torch.no_grad():
        model(torch.zeros(BATCH, 3, HEIGHT, WIDTH))
    return shapes


def bench_layers(rounds: int) -> str:
    inputs = [torch.randn(shape, requires_grad=True) for shape in resnet50_norm_inputs()]
    gradients = [torch.randn_like(x) for x in inputs]

    def run(layers: list[nn.Module]) -> None:
        # All forward, then all backward, so that memory holds what a network's would.
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        torch.autograd.backward(outputs, gradients)
        for tensor in [*inputs, *(p for layer in layers for p in layer.parameters())]:
            tensor.grad = None

    def variant(kind: type[nn.Module]) -> Callable[[], None]:
        layers = [kind(x.shape[1]) for x in inputs]
        return lambda: run(layers)

    variants = {
        "`nn.BatchNorm2d`": variant(nn.BatchNorm2d),
        "psBN": variant(psBN),
        "`super().forward(x) + alpha`": variant(UsualPSBN),
    }
    seconds = alternate(variants, rounds)
    return table(seconds, {name: peak_memory(run) for name, run in variants.items()})


def bench_step(rounds: int) -> str:
    from mmdet.testing import demo_mm_inputs
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope("mmdet")
    size = [3, HEIGHT, WIDTH]
    data = demo_mm_inputs(BATCH, [size] * BATCH, num_classes=80)

    def variant(norm: str) -> Callable[[], None]:
        torch.manual_seed(0)
        cfg = load_config(str(ROOT / f"configs/retinanet/retinanet_{norm}_500.py"))
        cfg.model.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
        model = MODELS.build(cfg.model)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

        def step() -> None:
            batch = model.data_preprocessor(copy.deepcopy(data), training=True)
            loss, _ = model.parse_losses(model(**batch, mode="loss"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    variants = {"BN": variant("bn"), "psBN": variant("psbn")}
    seconds = alternate(variants, rounds)
    return table(seconds, {name: peak_memory(run) for name, run in variants.items()})


BENCHMARKS = {"layers": (bench_layers, 60), "step": (bench_step, 20)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, help="pairs to time")
    args = parser.parse_args()
    run, rounds = BENCHMARKS[args.benchmark]
    rounds = args.rounds or rounds
    print(run(rounds))
    print(
        f"\n{rounds} rounds, batch {BATCH} at {WIDTH}x{HEIGHT}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
