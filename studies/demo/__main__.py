"""See psBN at work in a few minutes, on nothing but a CPU.

Draws a small detection data set, trains a small RetinaNet on it with BN,
finetunes from that checkpoint twice, once with BN and once with psBN, and ends
with a table and a page. A demonstration, not a measurement: one seed, one tiny
network, and decay and learning rate chosen so that filters collapse in minutes.
Finished steps are kept; remove the folder to start again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config

from psbn_mmdet.checkpoint import CheckpointError, is_whole, load
from psbn_mmdet.collapse import measure
from psbn_mmdet.collapse.page import write_page
from psbn_mmdet.commands.detector import build, read_images

from .drawn_shapes import write_shapes

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
CONFIGS = ROOT / "configs" / "demo"
EPOCHS = 16
IMAGES = 8  # on which filters are measured
STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[demo {time.monotonic() - STARTED:3.0f} s] {text}", flush=True)


def run(title: str, log: Path, *command: str) -> None:
    """Run another tool; its output goes to a log, its progress is shown."""
    say(f"{title}: {' '.join(os.path.relpath(c) if c.startswith('/') else c for c in command)}")
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHON": sys.executable},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in process.stdout or ():
            file.write(line)
            step = re.search(r"Epoch\(train\)\s+\[(\d+)\].* eta: (\S+) .* loss: (\S+)", line)
            if step and int(step[1]) % 4 == 0:
                say(f"  epoch {step[1]} of {EPOCHS}, loss {step[3]}, {step[2]} left")
    if process.wait():
        sys.exit(f"demo: {title} failed; see {log}")


def train(
    title: str, config: str, work_dir: Path, processes: int, data: Path, *options: str
) -> Path:
    """Train by a config of the demo; returns the last checkpoint."""
    checkpoint = work_dir / f"epoch_{EPOCHS}.pth"
    if not is_whole(checkpoint):
        work_dir.mkdir(parents=True, exist_ok=True)
        command = [f"{TOOLS}/dist_train.sh", f"{CONFIGS}/{config}.py", str(processes), "--resume"]
        command += ["--work-dir", str(work_dir), "--data-root", str(data)]
        if options:
            command += ["--cfg-options", *options]
        run(title, work_dir / "train.log", *command)
    return checkpoint


def ap_before(config: str, checkpoint: Path, work_dir: Path, processes: int, data: Path) -> float:
    """AP in percent of a checkpoint under a config of the demo."""
    metrics = work_dir / "metrics.json"
    if not metrics.exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        command = [f"{TOOLS}/dist_test.sh", f"{CONFIGS}/{config}.py", str(checkpoint)]
        command += [str(processes), "--work-dir", str(work_dir), "--data-root", str(data)]
        run("AP before", work_dir / "test.log", *command)
    return 100 * json.loads(metrics.read_text())["coco/bbox_mAP"]


def ap_after(work_dir: Path) -> float:
    """AP in percent that a training ended with."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"))
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    return 100 * next(r["coco/bbox_mAP"] for r in reversed(records) if "coco/bbox_mAP" in r)


def filters(config: str, checkpoint: Path, data: Path) -> dict[str, float]:
    """What the filters of a checkpoint do on images of the demo, counted."""
    cfg = Config.fromfile(CONFIGS / f"{config}.py")
    model = build(cfg, load(checkpoint), str(checkpoint))
    return measure(model, read_images(cfg, model, data, IMAGES)).totals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs/demo"), help="default %(default)s"
    )
    default = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=default, help="default here %(default)s")
    args = parser.parse_args()
    out, n = args.out.resolve(), args.processes

    data = write_shapes(out / "shapes", train=400, val=100)
    say(f"drew 500 images to {data}; {n} processes")
    first = train("train with BN", "demo_bn", out / "bn", n, data)
    rows = []
    for norm in ("bn", "psbn"):
        config, work_dir = f"demo_{norm}_finetune", out / f"finetune_{norm}"
        name = {"bn": "BN", "psbn": "psBN"}[norm]
        before = ap_before(config, first, work_dir / "before", n, data)
        last = train(f"finetune with {name}", config, work_dir, n, data, f"load_from={first}")
        after = ap_after(work_dir)
        rows.append((name, before, after, filters(config, last, data)))
    start = filters("demo_bn", first, data)
    page = write_page(
        {
            "BN": out / "bn",
            "finetuned with BN": out / "finetune_bn",
            "finetuned with psBN": out / "finetune_psbn",
        },
        out / "collapse.html",
    )
    print(
        "\nA checkpoint trained with BN, finetuned with BN and with psBN\n"
        "(a demonstration on drawn shapes: one seed, one tiny network)\n\n"
        "| finetuned with | AP before | AP after | collapsed before | after | stuck before | after "
        "| idle before | after |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, before, after, totals in rows:
        counts = " | ".join(
            f"{start[state]} | {totals[state]}" for state in ("collapsed", "stuck", "idle")
        )
        print(f"| {name} | {before:.1f} | {after:.1f} | {counts} |")
    print(
        f"\nOf {start['filters']} filters. Collapsed: |gamma| < 1e-3. Measured on {IMAGES} of the "
        "images: stuck, no\ngradient arrives; idle, a gradient arrives and nothing is carried. "
        f"Course and filters: {os.path.relpath(page)}"
    )


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        sys.exit(f"demo: {error}")
