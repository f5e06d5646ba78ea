"""What a machine with a GPU can tell in 13 minutes, without a network: one folder, one table.

    python -m studies.gpu --out gpu --minutes 13 --data-root bccd --cifar-root data
    python -m studies.gpu --out gpu --tiny        # on a CPU: does every step run?

The steps, each in its own process and in its share of the time, so that one that fails or takes too
long costs itself alone:

- tests     ``pytest -m cuda``: psSyncBN's CUDA path, mixed precision, memory
- layers    the 53 normalization layers of a ResNet-50, psBN beside BN, by CUDA events
- step      a training step of RetinaNet-R50 at 800x1333, psBN, AnchoredBiasDecay and
            SparsityLoggerHook beside BN, eager and compiled. Its loss is the mean square of what
            the head returns: mmdet's own needs mmcv's operators compiled for the GPU.
- transfer  the study of revival at four times the width: full-width ResNet-18, seed by seed
- paper16   fig3 with the paper's schedule at 16x16, as many runs beside one another as --workers

The studies go on where they stopped. summary.json and summary.md are written after every step; what
did not run is in them as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from psbn_mmdet import psBN
from psbn_mmdet.decay import anchor_bias_decay
from psbn_mmdet.launch import load_config
from studies.runs import write_json

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"tests": 0.15, "layers": 0.1, "step": 0.25, "transfer": 0.25, "paper16": 0.25}
"""Of the time; what a step leaves over, those behind it have."""


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Of one call, by CUDA events where there are any."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def in_turns(
    variants: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, dict[str, float | None]]:
    """Ratios of each variant to the first: median and quartiles of pairs, and of peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(-2, rounds):  # two to warm up
        for name in sorted(variants, reverse=turn % 2 == 0):
            taken = seconds_of(variants[name], device)
            if turn >= 0:
                seconds[name].append(taken)
    memory = {name: peak_memory(run, device) for name, run in variants.items()}
    first = next(iter(variants))
    found: dict[str, dict[str, float | None]] = {}
    for name, of in seconds.items():
        ratios = [a / b for a, b in zip(of, seconds[first])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ms": 1000 * statistics.median(of),
            "ratio": middle,
            "low": low,
            "high": high,
            "memory_ratio": memory[name] / memory[first] if memory[first] else None,
        }
    return found


def peak_memory(run: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def retinanet() -> nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    cfg = load_config(str(ROOT / "configs" / "retinanet" / "retinanet_bn_800.py")).model
    cfg.backbone.update(init_cfg=None, frozen_stages=-1, norm_eval=False)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg)


def layers(device: str, tiny: bool) -> dict[str, Any]:
    """The norm layers of a ResNet-50 on what arrives at them, forward and backward."""
    backbone: Any = retinanet().backbone
    size = (64, 96) if tiny else (800, 1333)
    shapes: list[torch.Size] = []
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_hook(lambda m, i, o: shapes.append(o.shape)) for m in norms]
    with torch.no_grad():
        backbone(torch.zeros(2, 3, *size))
    for handle in handles:
        handle.remove()
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]

    def variant(build: Callable[[int], nn.Module]) -> Callable[[], None]:
        modules = [build(x.shape[1]).to(device) for x in inputs]

        def run() -> None:
            for module, x in zip(modules, inputs):
                module(x).sum().backward()

        return run

    return in_turns(
        {"BN": variant(nn.BatchNorm2d), "psBN": variant(psBN)}, device, 3 if tiny else 40
    )


def training_steps(device: str, tiny: bool) -> dict[str, Any]:
    """RetinaNet-R50, batch 2: forward, backward, SGD; with each of the package's parts."""
    from psbn_mmdet.collapse import gather, norm_modules
    from psbn_mmdet.norm import to_psbn

    size = (64, 96) if tiny else (800, 1344)  # padded to a multiple of 32, as mmdet does
    images = torch.randn(2, 3, *size, device=device)

    def variant(kind: str, compiled: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model: Any = retinanet()
        model = (to_psbn(model) if kind == "psBN" else model).to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, 0.9, weight_decay=1e-4)
        if kind == "AnchoredBiasDecay":
            anchor_bias_decay(model, optimizer)
        norms = norm_modules(model)

        def loss(x: Tensor) -> Tensor:
            outputs = model.bbox_head(model.neck(model.backbone(x)))
            return sum(level.square().mean() for of in outputs for level in of)

        call = torch.compile(loss) if compiled else loss

        def run() -> None:
            optimizer.zero_grad()
            call(images).backward()
            optimizer.step()
            if kind == "SparsityLoggerHook":
                gather(norms.values())

        return run

    kinds = ("BN", "psBN", "AnchoredBiasDecay", "SparsityLoggerHook")
    found = {}
    for compiled in (False,) if tiny else (False, True):
        variants = {kind: variant(kind, compiled) for kind in kinds[: 2 if compiled else 4]}
        found["compiled" if compiled else "eager"] = in_turns(variants, device, 2 if tiny else 12)
    return found


def command_of(step: str, args: argparse.Namespace) -> list[str]:
    """What a step runs."""
    python, out = sys.executable, Path(args.out).resolve()
    if step == "tests":
        return [python, "-m", "pytest", "-m", "cuda", "-q", "tests"]
    if step in ("layers", "step"):
        tiny = ["--tiny"] if args.tiny else []
        return [python, "-m", "studies.gpu", "--out", str(out), "--only", step, *tiny]
    roots = ["--data-root", str(args.data_root), "--cifar-root", str(args.cifar_root)]
    if step == "transfer":
        width = ["base_channels=64", "pretraining.width=1.0"]
        if args.tiny:
            width = ["base_channels=8", "pretraining.width=0.125", "epochs=1"]
            width += ["pretraining.images=200", "pretraining.epochs=1", "train_images=16"]
        command = [python, "-m", "studies.detection", "revive", "--out", str(out / step), *roots]
        return [*command, "--seeds", "1", "--set", *width]
    command = [python, "-m", "studies.cifar", "fig3", "--preset", "paper16"]
    command += ["--data-root", str(args.cifar_root), "--workers", str(args.workers)]
    return [*command, "--out", str(out / step), "--set", "amp=False"]


def table(summary: dict[str, Any]) -> str:
    lines = [f"# {summary['device']}, torch {summary['torch']}", "", "| step | seconds | outcome |"]
    lines.append("|---|---|---|")
    for step, entry in summary["steps"].items():
        lines.append(f"| {step} | {entry['seconds']:.0f} | {entry['outcome']} |")
    for step in ("layers", "step"):
        measured = summary["steps"].get(step, {}).get("measured") or {}
        groups = {"": measured} if step == "layers" else measured
        for group, variants in groups.items():
            lines += ["", f"{step} {group}".strip(), ""]
            lines += [
                "| | ms | time, ratio (quartiles) | peak memory, ratio |",
                "|---|---|---|---|",
            ]
            for name, row in variants.items():
                memory = "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.3f}"
                ratio = f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
                lines.append(f"| {name} | {row['ms']:.2f} | {ratio} | {memory} |")
    return "\n".join(lines) + "\n"


def run_all(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "no GPU",
        "torch": torch.__version__,
        "steps": {step: {"seconds": 0, "outcome": "not run"} for step in SHARES},
    }
    deadline = time.monotonic() + 60 * args.minutes
    for number, step in enumerate(SHARES):
        rest = sum(list(SHARES.values())[number:])
        limit = (deadline - time.monotonic()) * SHARES[step] / rest
        started = time.monotonic()
        with open(out / f"{step}.txt", "w") as log:
            try:
                done = subprocess.run(
                    command_of(step, args), cwd=ROOT, stdout=log, stderr=log, timeout=limit
                )
                outcome = "done" if done.returncode == 0 else f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                outcome = "stopped at its time; the same command goes on"
        last = (out / f"{step}.txt").read_text().strip().splitlines()[-1:]
        entry = {"seconds": time.monotonic() - started, "outcome": outcome, "said": last}
        if (out / f"{step}.json").exists():
            entry["measured"] = json.loads((out / f"{step}.json").read_text())
        summary["steps"][step] = entry
        write_json(out / "summary.json", summary)
        (out / "summary.md").write_text(table(summary))
    print((out / "summary.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder for everything")
    parser.add_argument("--minutes", type=float, default=13, help="of all (default: %(default)s)")
    parser.add_argument("--data-root", type=Path, default=Path("data/bccd"), help="BCCD")
    parser.add_argument("--cifar-root", type=Path, default=Path("data"), help="CIFAR-10")
    parser.add_argument("--workers", type=int, default=8, help="runs of paper16 at a time")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try it on a CPU")
    parser.add_argument("--only", choices=("layers", "step"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.only:
        run_all(args)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure = {"layers": layers, "step": training_steps}[args.only]
    write_json(Path(args.out, f"{args.only}.json"), measure(device, args.tiny))


if __name__ == "__main__":
    main()
