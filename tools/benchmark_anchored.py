"""What AnchoredBiasDecay costs in a training step of RetinaNet-R50.

python tools/benchmark_anchored.py --pairs 20
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config

from psbn_mmdet.anchored import anchor_bias_decay

CONFIG = Path(__file__).parent.parent / "configs/retinanet/retinanet_bn_500.py"


def bench_anchored(pairs: int = 20, size: tuple[int, int] = (192, 320)) -> dict[str, float]:
    """Time training steps with and without the hook, in pairs of alternating order.

    One model and one optimizer, the hook put on and taken off, so that memory is the same. One
    thread and its processor time, which other programs disturb least. The hook's share is far below
    the noise of a step, so what it adds to a step is also timed alone, 300 times.

    Returns:
        step_ms: median step without the hook; ratio: median of with / without over the pairs;
        ratio_stderr: its standard error (of a median: 1.25 standard deviations / sqrt(pairs));
        alone_ms: median time of the hook itself; alone_ratio: 1 + alone_ms / step_ms.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    register_all_modules(init_default_scope=True)
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model).train()
    options = dict(cfg.optim_wrapper.optimizer)
    optimizer = getattr(torch.optim, options.pop("type"))(model.parameters(), **options)
    data = model.data_preprocessor(demo_mm_inputs(2, [[3, *size]] * 2), True)

    def step() -> float:
        start = time.process_time()
        loss, _ = model.parse_losses(model(**data, mode="loss"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    times: dict[bool, list[float]] = {True: [], False: []}
    step()
    for i in range(pairs):
        for anchored in (i % 2 == 0, i % 2 == 1):
            handle = anchor_bias_decay(model, optimizer, init="keep", log=None)
            if not anchored:
                handle.remove()
            times[anchored].append(step())
            handle.remove()

    handle = anchor_bias_decay(model, optimizer, init="keep", log=None)
    alone = []
    for _ in range(300):
        start = time.process_time()
        handle._before_step(optimizer, (optimizer,), {})
        handle._after_step(optimizer, (optimizer,), {})
        alone.append(time.process_time() - start)

    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    step_ms, alone_ms = statistics.median(times[False]) * 1e3, statistics.median(alone) * 1e3
    return {
        "step_ms": step_ms,
        "ratio": statistics.median(ratios),
        "ratio_stderr": 1.25 * statistics.stdev(ratios) / math.sqrt(pairs),
        "alone_ms": alone_ms,
        "alone_ratio": 1 + alone_ms / step_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="2 or more; 5 s a pair")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs is {args.pairs}: wanted 2 or more, for a standard error")
    result = bench_anchored(args.pairs)
    print(
        "step {step_ms:.0f} ms; with / without the hook {ratio:.4f} +- {ratio_stderr:.4f}; the hook"
        " alone {alone_ms:.3f} ms, so {alone_ratio:.5f} (goal: at most 1.005)".format(**result)
    )


if __name__ == "__main__":
    main()
