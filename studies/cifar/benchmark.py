"""What the CIFAR-10 study's code costs beside a bare loop of torch calls.

Ratios of blocks of training steps that alternate in one process, on the same batches.

    python -m studies.cifar.benchmark --data-root data
    python -m studies.cifar.benchmark --amp      # a step in bfloat16 against one in float32
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from torch.nn import functional as F

from psbn_mmdet.launch.amp import cpu_has_bfloat16
from studies.cifar.data import Batches, Split
from studies.cifar.rounds import make_runner, study_data
from studies.cifar.settings import Settings

STEPS = 4


class Pause(Hook):
    """Hands over after every block of steps, so that another loop can run in between."""

    priority = "LOWEST"

    def __init__(self, handed_over: Callable[[int], None]) -> None:
        self.handed_over = handed_over

    def before_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        if runner.iter % STEPS == 0:
            self.handed_over(runner.iter // STEPS)


class BareLoop:
    """Forward, loss, backward, step; nothing else."""

    def __init__(
        self, settings: Settings, memory_format: torch.memory_format, amp: bool = False
    ) -> None:
        torch.manual_seed(settings.seed)
        self.amp = amp
        self.format = memory_format
        network = settings.network_module()
        self.network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            settings.lr,
            settings.momentum,
            weight_decay=settings.weight_decay,
        )

    def steps(self, batches: Iterator[dict[str, torch.Tensor]]) -> float:
        started = time.perf_counter()
        for batch in batches:
            x = batch["inputs"].contiguous(memory_format=self.format)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                logits = self.network(x)
            loss = F.cross_entropy(logits.float(), batch["labels"])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return time.perf_counter() - started


def bench_step(
    settings: Settings, train: Split, test: Split, blocks: int
) -> dict[str, list[float]]:
    """Seconds per step: this package on mmengine's Runner, and two bare loops; data loading."""
    loops = {
        "bare loop, channels last": BareLoop(settings, torch.channels_last),
        "bare loop": BareLoop(settings, torch.contiguous_format),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("this package", *loops, "batches")}
    batches = Batches(train, settings.batch_size, settings.iterations, settings.seed)
    began = [0.0]

    def hand_over(block: int) -> None:
        if block > 1:  # the first block warms up
            seconds["this package"].append((time.perf_counter() - began[0]) / STEPS)
        started = time.perf_counter()
        same = [batches[block * STEPS + i] for i in range(STEPS)]
        loading = (time.perf_counter() - started) / STEPS
        names = list(loops) if block % 2 else list(loops)[::-1]
        for name in names:
            taken = loops[name].steps(iter(same)) / STEPS
            if block > 0:
                seconds[name].append(taken)
        if block > 0:
            seconds["batches"].append(loading)
        began[0] = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        runner = make_runner(settings, train, test, folder, hooks=(Pause(hand_over),))
        runner.logger.setLevel("ERROR")
        runner.train()
    count = len(seconds["this package"])
    return {name: values[:count] for name, values in seconds.items()}


def bench_amp(settings: Settings, blocks: int) -> list[tuple[float, float]]:
    """Seconds per step in float32 and under autocast to bfloat16, a pair a block.

    The two alternate which goes first; the first block warms up and is dropped.
    """
    x = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    batch = {"inputs": x, "labels": torch.arange(settings.batch_size) % 10}
    loops = [BareLoop(settings, torch.channels_last, amp) for amp in (False, True)]
    pairs = []
    for block in range(blocks + 1):
        taken = [0.0, 0.0]
        for which in (0, 1) if block % 2 else (1, 0):
            taken[which] = loops[which].steps(iter([batch] * STEPS)) / STEPS
        pairs.append((taken[0], taken[1]))
    return pairs[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=15, help=f"of {STEPS} steps each")
    parser.add_argument("--amp", action="store_true", help="bfloat16 against float32 instead")
    args = parser.parse_args()
    if args.amp:
        pairs = bench_amp(Settings(batch_size=args.batch_size), args.blocks)
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        has = "has" if cpu_has_bfloat16() else "has NO"
        print(
            f"ResNet-20, batch {args.batch_size}, {torch.get_num_threads()} threads; the processor "
            f"{has} bfloat16.\nA step in bfloat16 takes {middle:.2f} ({low:.2f} to {high:.2f}) of "
            f"one in float32, {1000 * statistics.median(a for a, _ in pairs):.1f} ms."
        )
        return
    settings = Settings(
        images=args.batch_size * STEPS * 5,
        test_images=10,
        batch_size=args.batch_size,
        rounds=1,
        epochs=-(-(args.blocks + 2) // 5),
    )
    found = bench_step(settings, *study_data(settings, args.data_root), args.blocks)
    print(f"ResNet-20, batch {args.batch_size}, {torch.get_num_threads()} threads")
    print("| | ms a step | this package / it, median of pairs (quartiles) |\n|---|---|---|")
    ours = found["this package"]
    for name, values in found.items():
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(ours, values, strict=True)], n=4
        )
        print(
            f"| {name} | {1000 * statistics.median(values):.1f} | {middle:.3f} "
            f"({low:.3f} to {high:.3f}) |"
        )
    share = statistics.median(a / b for a, b in zip(found["batches"], ours, strict=True))
    print(f"Making the batches is {100 * share:.2f}% of a step.")


if __name__ == "__main__":
    main()
