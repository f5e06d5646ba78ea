"""Benchmarks of comparing AP: the speed against hotcoco, and how often the interval is right.

python tools/benchmark_ap.py speed      # 1,000 paired resamples at the size of COCO val2017
python tools/benchmark_ap.py coverage   # simulated comparisons whose true difference is known
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from psbn_mmdet.ap import compare, evaluate
from psbn_mmdet.ap.coco_files import Annotations, Results


def simulate_objects(rng: np.random.Generator, images: int, classes: int) -> Annotations:
    """Images with 7.2 objects on average; class k is 1/(k + 1) as frequent as class 0."""
    image = np.repeat(np.arange(images), rng.poisson(7.2, images))
    n = len(image)
    size = np.exp(rng.normal(4, 0.9, (n, 2)))
    return Annotations(
        path="simulated",
        image_ids=list(range(1, images + 1)),
        file_names=[f"{i + 1:012d}.jpg" for i in range(images)],
        class_ids=list(range(1, classes + 1)),
        class_names=[f"class {k}" for k in range(classes)],
        image=image,
        cls=rng.choice(classes, n, p=_frequencies(classes)),
        box=np.round(np.hstack([rng.uniform(0, 500, (n, 2)), size]), 2),
        area=np.round(0.6 * size.prod(1), 1),
        crowd=rng.random(n) < 0.01,
        nameless=np.zeros(n, bool),
    )


def _frequencies(classes: int) -> np.ndarray:
    return (1 / np.arange(1, classes + 1)) / (1 / np.arange(1, classes + 1)).sum()


def simulate_detector(
    rng: np.random.Generator, truth: Annotations, skill: float, false_boxes: float = 53.0
) -> Results:
    """Boxes around the objects, the closer and the surer the higher the skill, and false ones."""
    images, classes = len(truth.image_ids), len(truth.class_ids)
    hit = np.repeat(np.arange(len(truth.image)), 1 + rng.poisson(0.6, len(truth.image)))
    off = rng.gamma(1.5, 0.06 / skill, (len(hit), 1))
    box = truth.box[hit]
    shift, grow = rng.normal(0, off, (2, len(hit), 2))
    box = np.hstack([box[:, :2] + shift * box[:, 2:], box[:, 2:] * np.exp(grow)])
    wrong = np.repeat(np.arange(images), rng.poisson(false_boxes, images))
    n = len(wrong)
    wrong_box = np.hstack([rng.uniform(0, 500, (n, 2)), np.exp(rng.normal(4, 0.9, (n, 2)))])
    logit = np.append(
        rng.normal(0.3 * skill, 1.2, len(hit)) - 3 * off[:, 0], rng.normal(-2, 0.9, n)
    )
    return Results(
        path=f"simulated, skill {skill}",
        image=np.append(truth.image[hit], wrong),
        cls=np.append(truth.cls[hit], rng.choice(classes, n, p=_frequencies(classes))),
        box=np.round(np.vstack([box, wrong_box]), 2),
        score=np.round(1 / (1 + np.exp(-logit)), 4),
    )


def write_annotations(truth: Annotations, path: Path) -> None:
    """As a COCO annotation file."""
    objects = zip(truth.image, truth.cls, truth.box, truth.area, truth.crowd, strict=True)
    data = {
        "images": [
            {"id": i, "file_name": f}
            for i, f in zip(truth.image_ids, truth.file_names, strict=True)
        ],
        "categories": [
            {"id": c, "name": n} for c, n in zip(truth.class_ids, truth.class_names, strict=True)
        ],
        "annotations": [
            {
                "id": j + 1,
                "image_id": truth.image_ids[i],
                "category_id": truth.class_ids[k],
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            for j, (i, k, box, area, crowd) in enumerate(objects)
        ],
    }
    path.write_text(json.dumps(data))


def write_results(truth: Annotations, found: Results, path: Path) -> None:
    """As a COCO result file."""
    boxes = zip(found.image, found.cls, found.box, found.score, strict=True)
    path.write_text(
        json.dumps(
            [
                {
                    "image_id": truth.image_ids[i],
                    "category_id": truth.class_ids[k],
                    "bbox": box.tolist(),
                    "score": float(score),
                }
                for i, k, box, score in boxes
            ]
        )
    )


def bench_speed(images: int = 5000, classes: int = 80, resamples: int = 1000) -> None:
    """From two result files to the verdict, and a paired resample here against hotcoco.compare.

    The two take turns in one process; a round is as many of ours as take about as long as one of
    hotcoco's calls, and the ratio is the median over the rounds.
    """
    import hotcoco

    rng = np.random.default_rng(0)
    truth = simulate_objects(rng, images, classes)
    found = [simulate_detector(rng, truth, skill) for skill in (1.0, 1.05)]
    with tempfile.TemporaryDirectory() as folder:
        ann, *files = (Path(folder, f"{name}.json") for name in ("ann", "a", "b"))
        write_annotations(truth, ann)
        for results, file in zip(found, files, strict=True):
            write_results(truth, results, file)
        boxes = " and ".join(f"{len(r.score):,}" for r in found)
        print(f"{images:,} images, {len(truth.image):,} objects, {boxes} boxes\n")

        matches = [evaluate.match(truth, r) for r in found]
        dataset = hotcoco.COCO(str(ann))
        evals = []
        for file in files:
            evals.append(hotcoco.COCOeval(dataset, dataset.load_res(str(file)), "bbox"))
            evals[-1].evaluate()
            evals[-1].accumulate()
        evaluate.resample(matches, 10)  # compiled, caches warm
        ours, theirs = [], []
        for turn in range(7):
            begin = time.perf_counter()
            hotcoco.compare(evals[0], evals[1], n_bootstrap=10, seed=turn)
            theirs.append((time.perf_counter() - begin) / 10)
            begin = time.perf_counter()
            evaluate.resample(matches, 200, seed=turn)
            ours.append((time.perf_counter() - begin) / 200)
        begin = time.perf_counter()
        evaluate.resample(matches, resamples)
        whole = time.perf_counter() - begin
        command = [sys.executable, Path(__file__).parent / "compare_ap.py", "--ann", ann]
        command += [f"a={files[0]}", f"b={files[1]}", "--resamples", str(resamples)]
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        command_took = time.perf_counter() - begin
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
    print(f"| {'per paired resample, median of 7 turns':44} | time |\n| --- | ---: |")
    print(f"| {'evaluate.resample, 2 threads':44} | {1e3 * statistics.median(ours):.2f} ms |")
    print(f"| {'hotcoco.compare, its own threads':44} | {1e3 * statistics.median(theirs):.1f} ms |")
    print(f"| {'ratio, median of the turns':44} | {ratio:.0f} |")
    print(f"| {f'{resamples:,} paired resamples':44} | {whole:.1f} s |")
    print(f"| {'tools/compare_ap.py, files to verdict':44} | {command_took:.1f} s |")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A simulated comparison: runs per arm, and how much a seed changes a detector's skill."""

    runs: int
    seed_sd: float
    skills: tuple[float, float] = (1.0, 1.08)
    images: int = 500
    classes: int = 10
    false_boxes: float = 10.0

    def ap(self, rng: np.random.Generator, truth: Annotations, arm: int) -> Results:
        skill = self.skills[arm] + rng.normal(0, self.seed_sd)
        return simulate_detector(rng, truth, skill, self.false_boxes)


def _true_ap(setting: Setting, arm: int, seed: int, images: int = 20000) -> float:
    """AP of one detector of the arm on so many images that what they leave open is small."""
    rng = np.random.default_rng([1, arm, seed])
    truth = simulate_objects(rng, images, setting.classes)
    m = evaluate.match(truth, setting.ap(rng, truth, arm))
    per_class = evaluate.weighted_ap(m, np.ones((1, images), int))[0][0, :, 0]
    return 100 * float(evaluate.mean_over_classes(per_class))


def _draw(setting: Setting, number: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """The intervals from one simulated comparison: ours, and that of images without repeats."""
    rng = np.random.default_rng([2, number])
    truth = simulate_objects(rng, setting.images, setting.classes)
    results = [setting.ap(rng, truth, arm) for arm in (0, 1) for _ in range(setting.runs)]
    arms = {"a": list(range(setting.runs)), "b": list(range(setting.runs, 2 * setting.runs))}
    measured = compare.measure(truth, results, 400, seed=number, threads=1)
    d = compare.compare(measured, arms, seed=number).differences[0]
    if setting.runs > 1:
        return (d.low[0], d.high[0]), (np.nan, np.nan)
    once = np.minimum(evaluate.draw_images(setting.images, 400, rng), 1)
    a, b = (
        evaluate.mean_over_classes(evaluate.weighted_ap(evaluate.match(truth, r), once)[0][..., 0])
        for r in results
    )
    low, high = 100 * np.quantile(b - a, [0.025, 0.975])
    return (d.low[0], d.high[0]), (low, high)


def bench_coverage(draws: int = 600, processes: int = 2) -> None:
    """How often the 95% interval holds the true difference, which is known by simulation.

    Beside it, how often the interval does that drops the repeated images of a resample.
    """
    print("| runs per arm | sd of AP between seeds | true difference | covered | without repeats |")
    print("| ---: | ---: | ---: | ---: | ---: |", flush=True)
    with ProcessPoolExecutor(processes) as pool:
        for s in (Setting(1, 0.0), Setting(3, 0.02), Setting(3, 0.06)):
            aps = [list(pool.map(_true_ap, [s] * 40, [arm] * 40, range(40))) for arm in (0, 1)]
            true = np.mean(aps[1]) - np.mean(aps[0])
            ends = np.array(list(pool.map(_draw, [s] * draws, range(draws), chunksize=5)))
            ours, dropped = ((ends[..., 0] <= true) & (true <= ends[..., 1])).mean(0)
            error = np.sqrt(ours * (1 - ours) / draws)
            print(
                f"| {s.runs} | {np.mean(np.std(aps, 1)):.2f} | {true:.2f} AP | "
                f"{ours:.1%} ± {error:.1%} | {f'{dropped:.1%}' if s.runs == 1 else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "coverage"])
    parser.add_argument("--draws", type=int, default=600, help="of coverage")
    args = parser.parse_args()
    bench_speed() if args.what == "speed" else bench_coverage(args.draws)
