"""Benchmarks of comparing AP: the speed against hotcoco, and how often the interval is right.

python tools/benchmark_ap.py speed      # 1,000 paired resamples at the size of COCO val2017
python tools/benchmark_ap.py coverage   # simulated comparisons whose true difference is known
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from scipy.special import expit

from psbn_mmdet.ap import compare, evaluate, matching
from psbn_mmdet.ap.coco_files import Annotations, Results
from psbn_mmdet.errors import PsbnError, errors_in_one_line
from psbn_mmdet.python38 import zip_strict


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
    rng: np.random.Generator,
    truth: Annotations,
    skill: float,
    false_boxes: float = 53.0,
    hardness: np.ndarray | float = 0.0,
) -> Results:
    """Boxes around the objects, the closer and the surer the higher the skill, and false ones.

    Args:
        rng: Of this detector.
        truth: The data set.
        skill: Divides the errors of the boxes and raises their scores.
        false_boxes: Mean number in an image.
        hardness: Of every image (N,): errors and false boxes are exp(h / 2) times as many, scores
            lower. Detectors that are given the same one err on the same images.
    """
    images, classes = len(truth.image_ids), len(truth.class_ids)
    hardness = np.broadcast_to(np.asarray(hardness, float), images)
    hit = np.repeat(np.arange(len(truth.image)), 1 + rng.poisson(0.6, len(truth.image)))
    hard = hardness[truth.image[hit]]
    off = rng.gamma(1.5, 0.06 / skill, (len(hit), 1)) * np.exp(hard / 2)[:, None]
    box = truth.box[hit]
    shift, grow = rng.normal(0, off, (2, len(hit), 2))
    box = np.hstack([box[:, :2] + shift * box[:, 2:], box[:, 2:] * np.exp(grow)])
    wrong = np.repeat(np.arange(images), rng.poisson(false_boxes * np.exp(hardness / 2), images))
    n = len(wrong)
    wrong_box = np.hstack([rng.uniform(0, 500, (n, 2)), np.exp(rng.normal(4, 0.9, (n, 2)))])
    logit = np.append(
        rng.normal(0.3 * skill, 1.2, len(hit)) - 3 * off[:, 0] - hard / 2, rng.normal(-2, 0.9, n)
    )
    return Results(
        path=f"simulated, skill {skill}",
        image=np.append(truth.image[hit], wrong),
        cls=np.append(truth.cls[hit], rng.choice(classes, n, p=_frequencies(classes))),
        box=np.round(np.vstack([box, wrong_box]), 2),
        score=np.round(expit(logit), 4),
    )


def write_annotations(truth: Annotations, path: Path) -> None:
    """As a COCO annotation file."""
    objects = zip_strict(truth.image, truth.cls, truth.box, truth.area, truth.crowd)
    data = {
        "images": [
            {"id": i, "file_name": f} for i, f in zip_strict(truth.image_ids, truth.file_names)
        ],
        "categories": [
            {"id": c, "name": n} for c, n in zip_strict(truth.class_ids, truth.class_names)
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
    boxes = zip_strict(found.image, found.cls, found.box, found.score)
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
        for results, file in zip_strict(found, files):
            write_results(truth, results, file)
        boxes = " and ".join(f"{len(r.score):,}" for r in found)
        print(f"{images:,} images, {len(truth.image):,} objects, {boxes} boxes\n")

        matches = [matching.match(truth, r) for r in found]
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
        command = [sys.executable, f"{Path(__file__).parent}/compare_ap.py", "--ann", str(ann)]
        command += [f"a={files[0]}", f"b={files[1]}", "--resamples", str(resamples)]
        begin = time.perf_counter()
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, check=True, capture_output=True)
        command_took = time.perf_counter() - begin
        command_cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu
    ratio = statistics.median(t / o for t, o in zip_strict(theirs, ours))
    print(f"| {'per paired resample, median of 7 turns':44} | time |\n| --- | ---: |")
    print(f"| {'evaluate.resample, 2 threads':44} | {1e3 * statistics.median(ours):.2f} ms |")
    print(f"| {'hotcoco.compare, its own threads':44} | {1e3 * statistics.median(theirs):.1f} ms |")
    print(f"| {'ratio, median of the turns':44} | {ratio:.0f} |")
    print(f"| {f'{resamples:,} paired resamples':44} | {whole:.1f} s |")
    print(f"| {'tools/compare_ap.py, files to verdict':44} | {command_took:.1f} s |")
    print(f"| {'the same, user CPU time':44} | {command_cpu:.1f} s |")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A simulated comparison of two arms.

    Attributes:
        what: In words.
        runs: Of each arm.
        spread: Of each arm, the standard deviation of the skill between its seeds.
        seeds: Their distribution: normal; skewed (most are good, few are much worse); heavy
            (Student's t with 3 degrees of freedom).
        same_seeds: Run j deviates by the same quantile in both arms.
        hard_images: All runs err on the same images, and few images hold most of the errors:
            hardness is exponential.
    """

    what: str
    runs: tuple[int, int]
    spread: tuple[float, float]
    seeds: str = "normal"
    same_seeds: bool = False
    hard_images: bool = False
    skills: tuple[float, float] = (1.0, 1.08)
    images: int = 250
    classes: int = 10
    false_boxes: float = 10.0

    def skill(self, arm: int, quantile: float) -> float:
        """The skill of a run of an arm, at a quantile of its seeds."""
        from scipy import stats

        deviation = {
            "normal": stats.norm.ppf(quantile),
            "skewed": 1 - stats.expon.ppf(1 - quantile),
            "heavy": stats.t.ppf(quantile, 3) / np.sqrt(3),
        }[self.seeds]
        # clipped where it would not be a skill any more, which is once in some thousand
        return float(np.clip(self.skills[arm] + self.spread[arm] * deviation, 0.3, 3))

    def images_of(self, rng: np.random.Generator, images: int) -> tuple[Annotations, np.ndarray]:
        """A data set and the hardness of its images."""
        truth = simulate_objects(rng, images, self.classes)
        return truth, rng.exponential(1, images) - 1 if self.hard_images else np.zeros(images)


SETTINGS = (
    Setting("images alone", (1, 1), (0, 0)),
    Setting("3 runs each, seeds dominate", (3, 3), (0.06, 0.06)),
    Setting("2 runs each", (2, 2), (0.04, 0.04)),
    Setting("2 and 5 runs, the 2 vary thrice as much", (2, 5), (0.06, 0.02)),
    Setting(
        "correlated: hard images, seeds skewed", (3, 3), (0.04, 0.04), "skewed", hard_images=True
    ),
    Setting("hard images, seeds with heavy tails", (3, 3), (0.04, 0.04), "heavy", hard_images=True),
    Setting("hard images, the same seeds in both arms", (3, 3), (0.04, 0.04), "normal", True, True),
    Setting("3 runs each, images dominate", (3, 3), (0.02, 0.02)),
    Setting("hard images, images alone", (1, 1), (0, 0), hard_images=True),
)


def _true_ap(setting: Setting, arm: int, quantile: float, images: int = 10000) -> float:
    """AP of one run of the arm on so many images that what they leave open is small."""
    rng = np.random.default_rng([1, arm, round(1e6 * quantile)])
    truth, hardness = setting.images_of(rng, images)
    skill = setting.skill(arm, quantile)
    m = matching.match(truth, simulate_detector(rng, truth, skill, setting.false_boxes, hardness))
    per_class = evaluate.weighted_ap(m, np.ones((1, images), int))[0][0, :, 0]
    return 100 * float(evaluate.mean_over_classes(per_class))


def _draw(setting: Setting, number: int) -> tuple[float, float, float, float]:
    """One simulated comparison: our interval, and the one that drops repeated images."""
    rng = np.random.default_rng([2, number])
    truth, hardness = setting.images_of(rng, setting.images)
    quantiles = rng.random((2, max(setting.runs)))
    if setting.same_seeds:
        quantiles[1] = quantiles[0]
    results = [
        simulate_detector(
            rng, truth, setting.skill(arm, quantiles[arm, j]), setting.false_boxes, hardness
        )
        for arm in (0, 1)
        for j in range(setting.runs[arm])
    ]
    n = setting.runs[0]
    arms = {"a": list(range(n)), "b": list(range(n, len(results)))}
    measured = compare.measure(truth, results, 200, seed=number, threads=1)
    d = compare.compare(measured, arms, seed=number).differences[0]
    if max(setting.runs) > 1:
        return d.low[0], d.high[0], np.nan, np.nan
    once = np.minimum(evaluate.draw_images(setting.images, 200, rng), 1)
    a, b = (
        evaluate.mean_over_classes(evaluate.weighted_ap(matching.match(truth, r), once)[0][..., 0])
        for r in results
    )
    return d.low[0], d.high[0], *(100 * np.quantile(b - a, [0.025, 0.975], method="weibull"))


def bench_coverage(draws: int = 400, processes: int = 2, only: str = "", seeds: int = 10) -> None:
    """How often the 95% interval holds the true difference, which is known by simulation.

    The truth is the mean over ``seeds`` equally spaced quantiles of the seeds, each on 10,000
    images. Beside it, where an arm has one run, how often the interval holds it that drops the
    repeated images of a resample.
    """
    settings = [s for s in SETTINGS if only in s.what]
    if not settings:
        names = "; ".join(s.what for s in SETTINGS)
        raise PsbnError(f"--only {only}: no arms have that in their name; there are: {names}")
    print(
        "| arms | sd of AP between seeds | true difference | covered | below | above | width "
        "| without repeats |\n" + "| --- " + "| ---: " * 7 + "|",
        flush=True,
    )
    quantiles = (np.arange(seeds) + 0.5) / seeds
    with ProcessPoolExecutor(processes) as pool:
        for s in settings:
            aps = [
                list(pool.map(_true_ap, [s] * seeds, [arm] * seeds, quantiles)) for arm in (0, 1)
            ]
            true = np.mean(aps[1]) - np.mean(aps[0])
            ends = np.array(list(pool.map(_draw, [s] * draws, range(draws), chunksize=5)))
            low, high, once_low, once_high = ends.T
            covered = ((low <= true) & (true <= high)).mean()
            error = np.sqrt(covered * (1 - covered) / draws)
            once = ((once_low <= true) & (true <= once_high)).mean()
            spread = [max(float(np.std(ap)), 0) if any(s.spread) else 0 for ap in aps]
            print(
                f"| {s.what} | {spread[0]:.2f}, {spread[1]:.2f} | {true:.2f} AP | "
                f"{covered:.1%} ± {error:.1%} | {(high < true).mean():.1%} | "
                f"{(low > true).mean():.1%} | {np.mean(high - low):.2f} | "
                f"{f'{once:.1%}' if max(s.runs) == 1 else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "coverage"])
    parser.add_argument("--draws", type=int, default=400, help="of coverage")
    parser.add_argument("--processes", type=int, default=2, help="of coverage")
    parser.add_argument("--only", default="", help="coverage of the arms whose name has this in it")
    args = parser.parse_args()
    with errors_in_one_line():
        if args.what == "speed":
            bench_speed()
        else:
            bench_coverage(args.draws, args.processes, args.only)
