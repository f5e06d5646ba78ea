"""Is a difference in AP more than noise? Intervals and a verdict for two or more arms.

An arm is a way to train, a run is one seed of it. What varies is the images of the test set and
the seed of the training; ``compare`` carries both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from warnings import catch_warnings, simplefilter

import numpy as np

from .coco_files import Annotations, Results
from .evaluate import match, mean_over_classes, resample, weighted_ap

BETTER, WORSE, NOT_SHOWN = "better", "worse", "no difference shown"
POWER = 0.8


@dataclass(frozen=True)
class Measured:
    """Runs on the same images, as they are and on every resample. AP in points, 0 to 100."""

    names: list[str]  # (Q,) AP, AP50, AP75, the size classes if wanted, then the classes
    overall: int  # how many of the names come before the classes
    observed: np.ndarray  # (M, Q), NaN where there was no object
    resampled: np.ndarray  # (B, M, Q)
    curve: np.ndarray  # (M, 3, 101) precision in 0..1 at IoU 0.50:0.95, 0.50 and 0.75
    curve_resampled: np.ndarray  # (B, M, 3, 101)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, for every name of ``Measured``: arrays (Q,)."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    positive: np.ndarray  # share of the draws above 0


@dataclass(frozen=True)
class Difference(Estimate):
    """Arm minus baseline, on the same images."""

    arm: str
    baseline: str
    verdict: str  # on AP: better, worse or no difference shown
    further_seeds: int | None  # per arm, for 80% power; 0 when shown, None when unknown or none do
    reason: str  # what the interval carries and what would narrow it, in one or two sentences


@dataclass(frozen=True)
class Comparison:
    """All arms, and the difference of each to the first one."""

    measured: Measured
    arms: dict[str, Estimate]
    runs: dict[str, list[int]]  # of each arm, into Measured
    differences: list[Difference]
    confidence: float
    warnings: list[str]


def measure(
    annotations: Annotations,
    results: Sequence[Results],
    resamples: int = 1000,
    seed: int = 0,
    sizes: bool = False,
    threads: int = 2,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Measured:
    """Evaluates every run on the images as they are and on every resample of them.

    Args:
        sizes: APs, APm and APl too; each costs another matching and another round of resamples.
        progress: wraps the iterator over the resamples of one area range, e.g. ``tqdm``.
    """
    names, observed, resampled = [], [], []
    for area in ("all", "s", "m", "l") if sizes else ("all",):
        runs = [match(annotations, r, area) for r in results]
        once = [weighted_ap(m, np.ones((1, m.images), int)) for m in runs]
        # one seed for all areas: the same images are drawn
        ap, curves = resample(runs, resamples, seed, threads, progress)
        plain = np.stack([a[0] for a, _ in once])  # (M, K, 3)
        if area == "all":
            curve, curve_resampled = np.stack([c[0] for _, c in once]), curves
            class_observed, class_resampled = plain[..., 0], ap[..., 0]
        for i, name in enumerate(("AP", "AP50", "AP75") if area == "all" else (f"AP{area}",)):
            names.append(name)
            observed.append(mean_over_classes(plain[..., i]))
            resampled.append(mean_over_classes(ap[..., i]))
    return Measured(
        names=[*names, *annotations.class_names],
        overall=len(names),
        observed=100 * np.concatenate([np.stack(observed, -1), class_observed], -1),
        resampled=100 * np.concatenate([np.stack(resampled, -1), class_resampled], -1),
        curve=curve,
        curve_resampled=curve_resampled,
    )


@dataclass(frozen=True)
class _Arm:
    """The parts of an arm's variance: arrays (Q,), and the draws (B, Q) they were taken from."""

    mean: np.ndarray
    images: np.ndarray  # mean of the arm's runs on every resample
    seeds: np.ndarray  # what other seeds would add to it
    between: np.ndarray  # variance of AP between runs, as measured on these images
    within: np.ndarray  # the part of it that is these images: run by run, over resamples
    runs: int
    donor: str  # the arm whose runs tell the variance between seeds


def _arm(
    measured: Measured, runs: list[int], donor: str, lent: list[int], rng: np.random.Generator
) -> _Arm:
    images = measured.resampled[:, runs].mean(1)
    n, m = len(runs), len(lent)
    observed, resampled = measured.observed[lent], measured.resampled[:, lent]
    zero = np.zeros(images.shape[1])
    if m < 2:
        return _Arm(
            measured.observed[runs].mean(0), images, np.zeros_like(images), zero, zero, n, donor
        )
    between = observed.var(0, ddof=1)
    noise = resampled - resampled.mean(1, keepdims=True) - (observed - observed.mean(0))
    within = np.nanmean((noise**2).sum(1) / (m - 1), 0)
    # variance over the weights: the variance between runs on the resample, over n
    weights = rng.normal(0, 1, (len(resampled), m, 1)) / math.sqrt((m - 1) * n)
    seeds = (weights * (resampled - resampled.mean(1, keepdims=True))).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.maximum(between - within, 0) / (between + within)
    seeds = seeds * np.sqrt(np.nan_to_num(scale))
    return _Arm(measured.observed[runs].mean(0), images, seeds, between, within, n, donor)


def _estimate(
    value: np.ndarray, images: np.ndarray, seeds: np.ndarray, parts: list[_Arm], confidence: float,
    donors: dict[str, int],
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Interval ends and the share above 0 from draws, stretched for what few seeds leave open."""
    from scipy.special import ndtri, stdtrit

    draws = images + seeds
    centre = np.nanmean(draws, 0)
    tail = (1 - confidence) / 2
    total = np.nanvar(images, 0) + np.nanvar(seeds, 0)
    doubt = np.zeros_like(total)
    for donor, m in donors.items():
        doubt += sum(p.between / p.runs for p in parts if p.donor == donor) ** 2 / max(m - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = np.where(doubt > 0, total**2 / doubt, np.inf)
    stretch = stdtrit(np.clip(freedom, 1, 1e6), 1 - tail) / ndtri(1 - tail)
    draws = value + stretch * (draws - centre)
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    above = np.nanmean(np.where(np.isnan(draws), np.nan, (np.sign(draws) + 1) / 2), 0)
    return low, high, above


def compare(
    measured: Measured,
    arms: dict[str, list[int]],
    pairs: Sequence[tuple[str, str]] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    warnings: Sequence[str] = (),
) -> Comparison:
    """Intervals of every arm and of the differences between arms: a hierarchical bootstrap.

    What is resampled. Every resample draws the images of the test set with replacement, the same
    for all runs, and evaluates every run on them. On top of it, in each arm on its own, the
    deviations of the runs from their mean are drawn with independent normal weights. (Drawing
    runs with replacement has the same aim, but three runs have ten different draws and no tails.)
    The spread of the draws so carries the test set and the training seeds, and the difference of
    two arms keeps what the pairing by image takes out.

    Two corrections make the intervals as wide as they should be, and no wider:

    - The image noise of every single run, which the images already carry, shows up between the
      runs once more. With s2 the variance of AP between the m runs on these images and v the
      mean variance of a run's deviation from its arm over resamples, the seeds' own variance is
      estimated by max(0, s2 - v), and the weights are scaled to it.
    - A variance from m runs is itself uncertain. The draws are stretched by t/z, where t has
      the Welch-Satterthwaite degrees of freedom of the sum, as in Welch's t-test.

    The draws are centred on the observed value: AP of a resample, in which images repeat, is on
    average higher than AP of the data set, which is no evidence for either arm.

    An arm with a single run, next to an arm with several, takes the variance between seeds from
    the arm with the most. If no arm has two, the intervals carry the images alone: they are about
    these trained models, and say nothing about another seed of the same arms.

    Args:
        pairs: (arm, baseline); by default every arm against the first.
        confidence: of the intervals; the verdict is read off the interval of AP.
        warnings: what was noticed on the way here, kept with the result.
    """
    first, *others = arms
    pairs = [(arm, first) for arm in others] if pairs is None else list(pairs)
    richest = max(arms, key=lambda a: len(arms[a]))
    donor = {a: a if len(runs) > 1 else richest for a, runs in arms.items()}
    rng = np.random.default_rng(seed)

    def estimate(value, images, seeds, of):
        lent = {p.donor: len(arms[p.donor]) for p in of}
        return _estimate(value, images, seeds, of, confidence, lent)

    with catch_warnings():
        # a class without objects is NaN throughout, and is to come out as NaN
        simplefilter("ignore", RuntimeWarning)
        parts = {a: _arm(measured, runs, donor[a], arms[donor[a]], rng) for a, runs in arms.items()}
        estimates = {
            a: Estimate(p.mean, *estimate(p.mean, p.images, p.seeds, [p])) for a, p in parts.items()
        }
        differences = []
        for arm, baseline in pairs:
            a, b = parts[arm], parts[baseline]
            value = a.mean - b.mean
            low, high, above = estimate(value, a.images - b.images, a.seeds - b.seeds, [a, b])
            verdict = BETTER if low[0] > 0 else WORSE if high[0] < 0 else NOT_SHOWN
            further, reason = _what_would_show(a, b, verdict, confidence)
            differences.append(
                Difference(value, low, high, above, arm, baseline, verdict, further, reason)
            )
    return Comparison(measured, estimates, arms, differences, confidence, list(warnings))


def _what_would_show(a: _Arm, b: _Arm, verdict: str, confidence: float) -> tuple[int | None, str]:
    """The further seeds per arm that would show the observed difference in AP with 80% power.

    With n runs in both arms the variance of the difference is V0 + (s2_a + s2_b)/n, V0 the part
    of the images' variance that all runs of an arm share; power is that of Welch's t-test.
    """
    if a.donor == b.donor and not a.between[0] and a.runs == b.runs == 1:
        return None, (
            "One run per arm: the interval carries the images, not the seeds. It is about these "
            "two models; another seed of the same arms may differ by more. Train further seeds."
        )
    if verdict != NOT_SHOWN:
        return 0, "The interval carries the images and the seeds."
    from scipy.special import nctdtr, ndtri, stdtrit

    tail = (1 - confidence) / 2
    difference = abs(a.mean[0] - b.mean[0])
    own = a.within[0] / a.runs + b.within[0] / b.runs
    shared = max(0.0, float(np.nanvar(a.images[:, 0] - b.images[:, 0])) - own)
    if difference <= (ndtri(1 - tail) + ndtri(POWER)) * math.sqrt(shared):
        return None, (
            f"No number of seeds would show a difference of {difference:.2f} with 80% power on "
            "these images: what the images alone leave open is too wide. It takes more images."
        )
    n = np.arange(2, 1001)
    total = shared + (a.between[0] + b.between[0]) / n
    doubt = (a.between[0] ** 2 + b.between[0] ** 2) / n**2 / (n - 1)
    freedom = np.clip(total**2 / np.maximum(doubt, 1e-300), 1, 1e6)
    power = 1 - nctdtr(freedom, difference / np.sqrt(total), stdtrit(freedom, 1 - tail))
    enough = n[power >= POWER]
    if not len(enough):
        return None, f"More than 1000 seeds would be needed to show {difference:.2f} AP."
    further = max(1, int(enough[0]) - min(a.runs, b.runs))
    return further, (
        f"If the true difference is the observed {difference:.2f}, {further} further seeds per arm "
        "would show it with 80% power."
    )
