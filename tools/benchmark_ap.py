"""Benchmarks of comparing AP: the speed against hotcoco, and how often the interval is right.

python tools/benchmark_ap.py speed      # from files to verdict at the size of COCO val2017
python tools/benchmark_ap.py coverage   # simulated comparisons whose true difference is known
python tools/benchmark_ap.py images     # two equal detectors on few images, by several methods
python tools/benchmark_ap.py paired     # runs that share their seeds, by how correlated they are
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
from psbn_mmdet.ap.coco_files import Annotations, Results, read_annotations
from psbn_mmdet.errors import PsbnError, errors_in_one_line


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


def bench_speed(images: int = 5000, classes: int = 80, resamples: int = 500) -> None:
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
    ratio = statistics.median(t / o for t, o in zip(theirs, ours, strict=True))
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


def _draw(setting: Setting, number: int) -> tuple[float, float]:
    """The interval of one simulated comparison."""
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
    paired = setting.same_seeds
    d = compare.compare(measured, arms, paired=paired).differences[0]
    return d.low[0], d.high[0]


def bench_coverage(draws: int = 200, processes: int = 2, only: str = "", seeds: int = 10) -> None:
    """How often the 95% interval holds the true difference, which is known by simulation.

    The truth is the mean over ``seeds`` equally spaced quantiles of the seeds, each on 10,000
    images.
    """
    settings = [s for s in SETTINGS if only in s.what]
    if not settings:
        names = "; ".join(s.what for s in SETTINGS)
        raise PsbnError(f"--only {only}: no arms have that in their name; there are: {names}")
    print(
        "| arms | sd of AP between seeds | true difference | covered | below | above | width |\n"
        "| --- " + "| ---: " * 6 + "|",
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
            low, high = ends.T
            covered = ((low <= true) & (true <= high)).mean()
            error = np.sqrt(covered * (1 - covered) / draws)
            spread = [max(float(np.std(ap)), 0) if any(s.spread) else 0 for ap in aps]
            print(
                f"| {s.what} | {spread[0]:.2f}, {spread[1]:.2f} | {true:.2f} AP | "
                f"{covered:.1%} ± {error:.1%} | {(high < true).mean():.1%} | "
                f"{(low > true).mean():.1%} | {np.mean(high - low):.2f} |",
                flush=True,
            )


IMAGES = (1, 2, 3, 5, 6, 8, 10, 20, 50)
METHODS = ("ours", "percentile", "BCa", "permutation")


def _equal_pair(
    classes: int, images: int, number: int, ann: str = ""
) -> tuple[list[bool], list[tuple[int, bool]]]:
    """Which METHODS tell two equal detectors apart; and ours per class, with its images."""
    rng = np.random.default_rng([3, classes, images, number])
    truth = read_annotations(ann) if ann else simulate_objects(rng, images, classes)
    # of the same skill, so neither is better on average
    a, b = (simulate_detector(rng, truth, 1.0, 10.0) for _ in range(2))
    if truth.crowd.all():
        return [False] * len(METHODS), []
    measured = compare.measure(truth, [a, b], 200, seed=number, threads=1)
    d = compare.compare(measured, {"a": [0], "b": [1]}).differences[0]
    ours = (d.low > 0) | (d.high < 0)
    per_class = [(int(n), bool(x)) for n, x in zip(measured.images[3:], ours[3:], strict=True) if n]
    runs, value = measured.matches["all"], float(d.value[0])
    weights = evaluate.draw_images(images, 200, rng)
    draws = _difference(runs[0], runs[1], weights, weights)
    left_out = [evaluate.leave_one_out(m, 1) for m in runs]
    intervals = [_percentile(value, draws), _bca(value, draws, left_out[0] - left_out[1])]
    p = _swapped(truth, a, b, value, rng)
    told = [bool(ours[0]), *(bool(low > 0 or high < 0) for low, high in intervals), p <= 0.05]
    return told, per_class


def _difference(
    a: matching.Matches, b: matching.Matches, weights_a: np.ndarray, weights_b: np.ndarray
) -> np.ndarray:
    """Of AP, b minus a, with images so weighted; without the draws in which there is no object."""
    aps = [
        evaluate.mean_over_classes(evaluate.weighted_ap(m, w)[0][..., 0])
        for m, w in ((a, weights_a), (b, weights_b))
    ]
    difference = 100 * (aps[1] - aps[0])
    return difference[~np.isnan(difference)]


def _percentile(value: float, draws: np.ndarray) -> np.ndarray:
    return np.quantile(draws - draws.mean() + value, [0.025, 0.975], method="weibull")


def _bca(value: float, draws: np.ndarray, without: np.ndarray) -> np.ndarray:
    """The bias-corrected and accelerated interval; ``without`` image i, minus the difference."""
    from scipy.special import ndtr, ndtri

    off = without[~np.isnan(without)]
    off = off - off.mean() if len(off) else off
    skew = (off**3).sum() / (6 * max((off**2).sum(), 1e-300) ** 1.5)
    bias = ndtri(np.clip((draws < value).mean() + (draws == value).mean() / 2, 0.001, 0.999))
    moved = bias + ndtri([0.025, 0.975])
    ends = ndtr(bias + moved / (1 - skew * moved))
    return np.quantile(draws, np.where(np.isnan(ends), [0.025, 0.975], ends))


def _swapped(
    truth: Annotations, a: Results, b: Results, value: float, rng: np.random.Generator
) -> float:
    """P by permutation: two models change sides image by image, as often as not."""

    def twice(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, x])

    images = len(truth.image_ids)
    both = dataclasses.replace(
        truth,
        image_ids=list(range(2 * images)),
        image=np.append(truth.image, truth.image + images),
        cls=twice(truth.cls),
        box=twice(truth.box),
        area=twice(truth.area),
        crowd=twice(truth.crowd),
        nameless=twice(truth.nameless),
    )
    joined = Results(
        path="both",
        image=np.append(a.image, b.image + images),
        cls=np.append(a.cls, b.cls),
        box=np.vstack([a.box, b.box]),
        score=np.append(a.score, b.score),
    )
    m, side = matching.match(both, joined), rng.integers(0, 2, (200, images))
    swapped = _difference(m, m, np.hstack([1 - side, side]), np.hstack([side, 1 - side]))
    return float((1 + (np.abs(swapped) >= abs(value) - 1e-9).sum()) / (1 + len(swapped)))


def bench_images(draws: int = 200, processes: int = 2, ann: str = "") -> None:
    """How often two equal detectors are told apart, by the number of images; 5% is right.

    Beside our intervals those of the resamples' percentiles and of BCa, and the permutation test
    of the paired images, which is exact but gives no interval. Then the intervals of single
    classes, by the images that have the class. With ``ann`` on the objects of that file.
    """
    print("| classes | images | " + " | ".join(METHODS) + " |\n" + "| ---: " * 6 + "|", flush=True)
    by_images: dict[int, list[bool]] = {}
    sizes = [(classes, images) for classes in (1, 80) for images in IMAGES]
    if ann:
        truth = read_annotations(ann)
        sizes = [(len(np.unique(truth.cls)), len(truth.image_ids))]
    with ProcessPoolExecutor(processes) as pool:
        for classes, images in sizes:
            args = [classes] * draws, [images] * draws, range(draws), [ann] * draws
            told = []
            for apart, per_class in pool.map(_equal_pair, *args, chunksize=5):
                told.append(apart)
                for n, a in per_class if classes > 1 else ():
                    by_images.setdefault(n, []).append(a)
            shares = " | ".join(f"{x:.1%}" for x in np.mean(told, 0))
            print(f"| {classes} | {images} | {shares} |", flush=True)
    print("\n| images with the class | classes | told apart |\n| ---: | ---: | ---: |")
    for low, high in ((1, 5), (6, 7), (8, 9), (10, 14), (15, 19), (20, 50)):
        of = [a for n, told in by_images.items() if low <= n <= high for a in told]
        print(f"| {low} to {high} | {len(of):,} | {np.mean(of):.1%} |", flush=True)


def bench_paired(draws: int = 200) -> None:
    """Two arms whose runs share their seeds: intervals of paired and of unpaired runs.

    AP of a run is its method's, plus the seed's part (deviation 1, correlated between the arms),
    plus what the images make of it (deviation 0.3 each), which the resamples see. The true
    difference is 1.
    """
    print(
        "| seeds | correlation | covered, paired | shown | covered, unpaired | shown |\n"
        + "| ---: " * 6
        + "|"
    )
    for seeds in (2, 3, 5, 10):
        for correlation in (0.0, 0.5, 0.83, 0.95):
            rng = np.random.default_rng([4, seeds, round(100 * correlation)])
            held = np.empty((draws, 2, 2))
            for i in range(draws):
                shared, own = rng.normal(size=(1, seeds)), rng.normal(size=(2, seeds))
                ap = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
                ap = (ap + rng.normal(0, 0.3, (2, seeds)) + [[36], [37]]).ravel()
                measured = compare.Measured(
                    names=["AP"],
                    overall=1,
                    images=np.array([1000]),
                    observed=ap[:, None],
                    draws=(ap + rng.normal(0, 0.3, (200, 2 * seeds)))[..., None],
                    curve=np.zeros((2 * seeds, 3, 101)),
                    curve_resampled=np.zeros((1, 2 * seeds, 3, 101)),
                )
                arms = {"a": list(range(seeds)), "b": list(range(seeds, 2 * seeds))}
                for j, paired in enumerate((True, False)):
                    d = compare.compare(measured, arms, paired=paired).differences[0]
                    held[i, j] = d.low[0] <= 1 <= d.high[0], d.low[0] > 0
            cells = " | ".join(f"{x:.1%}" for x in held.mean(0).ravel())
            print(f"| {seeds} | {correlation} | {cells} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "coverage", "images", "paired"])
    parser.add_argument("--draws", type=int, default=200, help="of each row, but for speed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ann", default="", help="of images: take the objects of this file")
    parser.add_argument("--only", default="", help="coverage of the arms whose name has this in it")
    args = parser.parse_args()
    with errors_in_one_line():
        if args.what == "speed":
            bench_speed()
        elif args.what == "images":
            bench_images(args.draws, args.processes, args.ann)
        elif args.what == "paired":
            bench_paired(args.draws)
        else:
            bench_coverage(args.draws, args.processes, args.only)
