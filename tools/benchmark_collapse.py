"""What SparsityLoggerHook and tools/inspect_checkpoint.py cost, as ratios of alternating pairs.

tools/benchmark_collapse.py hook         # a RetinaNet-R50 training step with and without
tools/benchmark_collapse.py loop         # a measurement against .item() per layer
tools/benchmark_collapse.py checkpoint   # a ResNet-152 state dict measured against read
"""

import argparse
import gc
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn


def paired(first: Callable, second: Callable, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each call; who goes first changes from pair to pair."""
    times: tuple[list[float], list[float]] = ([], [])
    first(), second()  # warm-up
    gc.disable()
    for i in range(pairs):
        for which in ((0, 1), (1, 0))[i % 2]:
            start = time.perf_counter()
            (first, second)[which]()
            times[which].append(time.perf_counter() - start)
    gc.enable()
    return times


def describe(name: str, first: list[float], second: list[float]) -> str:
    """Median ratio of the pairs and its quartiles."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"{name}: {middle:.4f} (quartiles {low:.4f} to {high:.4f}; {len(ratios)} pairs, medians "
        f"{1e3 * statistics.median(first):.2f} ms and {1e3 * statistics.median(second):.2f} ms)"
    )


def _retinanet() -> nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.hub import get_config

    register_all_modules(init_default_scope=True)
    cfg: Config = get_config("mmdet::retinanet/retinanet_r50_fpn_1x_coco.py")
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model).train()


def _hook(model: nn.Module, folder: str) -> tuple:
    """A hook that has started, and what it needs of a runner."""
    from mmengine.logging import MessageHub

    from psbn_mmdet.hooks import SparsityLoggerHook

    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=1e-4)
    runner = SimpleNamespace(
        model=model,
        work_dir=folder,
        iter=0,
        optim_wrapper=SimpleNamespace(optimizer=optimizer),
        cfg={},
        logger=SimpleNamespace(info=lambda _: None, warning=lambda _: None),
        message_hub=MessageHub.get_instance("benchmark"),
    )
    hook = SparsityLoggerHook(interval=1, figures=False)
    hook.before_train(runner)
    return hook, runner, optimizer


def bench_hook(pairs: int = 30) -> str:
    """A training step with the hook at every iteration against without; goal 1.01.

    RetinaNet-R50 as mmdet ships it, 2 images of 320 x 192, SGD. The steps are
    the same calls on one model, so that only the hook differs.
    """
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model = _retinanet()
    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo={"img_shape": (192, 320), "pad_shape": (192, 320)})
        boxes = torch.tensor([[20.0, 20.0, 120.0, 100.0], [150.0, 60.0, 300.0, 180.0]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
        sample.ignored_instances = InstanceData(bboxes=torch.empty(0, 4))
        samples.append(sample)
    images = torch.randn(2, 3, 192, 320)

    with tempfile.TemporaryDirectory() as folder:
        hook, runner, optimizer = _hook(model, folder)

        def step() -> None:
            losses = model(images, samples, mode="loss")
            total = sum(v if torch.is_tensor(v) else sum(v) for v in losses.values())
            optimizer.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()

        def with_hook() -> None:
            step()
            hook.after_train_iter(runner)
            runner.iter += 1

        with_times, without = paired(with_hook, step, pairs)
        alone = []
        for _ in range(20):
            step()
            start = time.perf_counter()
            hook.after_train_iter(runner)
            alone.append(time.perf_counter() - start)
            runner.iter += 1
        size = Path(folder, "collapse.trace").stat().st_size
    return (
        describe("step with the hook / without", with_times, without)
        + f"\n  the hook alone: median {1e3 * statistics.median(alone):.2f} ms, "
        f"{statistics.median(alone) / statistics.median(without):.4f} of a step; "
        f"{size / runner.iter / 1e3:.0f} kB of trace per measurement"
    )


def bench_loop(pairs: int = 200) -> str:
    """Counts of all filters of a RetinaNet-R50 against a loop with .item() per layer.

    Against a loop that finds the same counts, and against the usual one, which
    only counts |gamma| < 1e-3. Nothing is written on either side. On a CPU
    ``.item()`` waits for nothing; on a GPU each is a synchronisation, of which
    there is one in all here.
    """
    from psbn_mmdet.collapse import activation_probability, count, gather, norm_modules

    model = _retinanet()
    layers = list(norm_modules(model).values())

    def ours() -> None:
        count(*gather(layers))

    def same_counts() -> None:
        found = dict.fromkeys(("filters", "collapsed", "constant", "inactive", "probability"), 0)
        for layer in layers:
            gamma, bias = layer.weight.detach(), layer.bias.detach()
            collapsed = gamma.abs() < 1e-3
            probability = activation_probability(gamma, bias)
            found["filters"] += gamma.numel()
            found["collapsed"] += collapsed.sum().item()
            found["constant"] += (collapsed & (bias >= 1e-3)).sum().item()
            found["inactive"] += (probability < 1e-3).sum().item()
            found["probability"] += probability.sum().item()

    def gamma_only() -> None:
        found = 0
        for layer in layers:
            found += (layer.weight.detach().abs() < 1e-3).sum().item()

    return "\n".join(
        [
            describe(
                "a measurement / a loop of the same counts", *paired(ours, same_counts, pairs)
            ),
            describe("a measurement / a loop of |gamma| alone", *paired(ours, gamma_only, pairs)),
        ]
    )


def bench_checkpoint(pairs: int = 10) -> str:
    """A ResNet-152 state dict measured and tabulated against reading it; goal about a second."""
    from mmdet.models.backbones import ResNet

    from psbn_mmdet.collapse import measure

    buffer = io.BytesIO()
    torch.save(ResNet(depth=152).state_dict(), buffer)

    def read() -> dict:
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    state_dict = read()
    return describe(
        "measuring / reading", *paired(lambda: measure(state_dict).table(), read, pairs)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    benches = {"hook": bench_hook, "loop": bench_loop, "checkpoint": bench_checkpoint}
    parser.add_argument("name", choices=benches, nargs="?", help="all by default")
    parser.add_argument("--pairs", type=int)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, bench in benches.items():
        if args.name in (None, name):
            print(bench(args.pairs) if args.pairs else bench())


if __name__ == "__main__":
    main()
