"""A comparison of AP as Markdown, as JSON, and as Table 2 of the psBN paper."""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .coco_files import InputError, RunFiles
from .compare import NOT_SHOWN, Comparison, Difference, Estimate

# arXiv 2001.11216, Table 2: AP on COCO-2017, one run each as far as the paper says
PAPER = {500: (32.7, 33.4), 800: (35.8, 36.4)}
TABLE2_ARMS = [("bn_500", "psbn_500"), ("bn_800", "psbn_800")]

_RELATIONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def table2_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (arm, baseline) of Table 2 among the arms ``bn_500, psbn_500, bn_800, psbn_800``.

    Raises:
        InputError: when an arm has another name, or a scale lacks one of its two.
    """
    known = [a for pair in TABLE2_ARMS for a in pair]
    if strange := [a for a in arms if a not in known]:
        raise InputError(f"--table2: arm {strange[0]!r}; name the arms {', '.join(known)}")
    pairs = [(psbn, bn) for bn, psbn in TABLE2_ARMS if bn in arms or psbn in arms]
    if missing := [a for pair in pairs for a in pair if a not in arms]:
        raise InputError(f"--table2: arm {missing[0]} is missing; both norms of a scale are needed")
    return pairs


def parse_expectation(text: str, arms: Sequence[str]) -> tuple[str, str, str, float]:
    """``'psbn-bn>=0.3'`` to ('psbn', 'bn', '>=', 0.3): a claim about the observed AP difference.

    Raises:
        InputError: when it is no such claim, or names an arm that is not there.
    """
    found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|>|<)\s*([-+]?\d*\.?\d+)\s*", text)
    pairs = [(a, b) for a in arms for b in arms if a != b and found and found[1] == f"{a}-{b}"]
    if not pairs:
        raise InputError(
            f"--expect {text!r}: wanted ARM-BASELINE>=AP, as 'psbn-bn>=0.3', with arms of "
            f"{', '.join(arms)}"
        )
    return *pairs[0], found[2], float(found[3])


def holds(difference: Difference, relation: str, bound: float) -> bool:
    """Whether the observed difference in AP points is as claimed."""
    return bool(_RELATIONS[relation](difference.value[0], bound))


def cell(estimate: Estimate, i: int, sign: str = "") -> str:
    """``+0.62 (+0.21 to +1.03)``, AP points; a dash where nothing could be measured."""
    if math.isnan(estimate.value[i]):
        return "–"
    v, low, high = (f"{x[i]:{sign}.2f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{v} ({low} to {high})"


def headline(d: Difference, confidence: float) -> str:
    """The verdict in one sentence."""
    return (
        f"{d.arm} against {d.baseline}: {d.verdict}, "
        f"{cell(d, 0, '+')} AP with a {confidence:.0%} interval"
    )


def class_order(c: Comparison, d: Difference) -> np.ndarray:
    """Indices of the classes that could be measured, by falling difference."""
    classes = np.arange(c.measured.overall, len(c.measured.names))
    classes = classes[~np.isnan(d.value[classes])]
    return classes[np.argsort(-d.value[classes], kind="stable")]


def classes_apart(c: Comparison, d: Difference) -> str:
    """How many classes differ, and how many would by chance alone."""
    classes = class_order(c, d)
    apart = int(((d.low[classes] > 0) | (d.high[classes] < 0)).sum())
    chance = (1 - c.confidence) * len(classes)
    return (
        f"{apart} of {len(classes)} classes have an interval without 0; "
        f"by chance alone {chance:.0f} would"
    )


def markdown(
    c: Comparison, runs: Sequence[RunFiles], images: int, table2: bool = False, extremes: int = 5
) -> str:
    """The whole comparison as text.

    Args:
        extremes: how many of the classes with the largest gain and the largest loss to list.
    """
    names, lines = c.measured.names, []
    if table2:
        lines += [*_table2(c), ""]
    for d in c.differences:
        a, b = c.arms[d.arm], c.arms[d.baseline]
        lines += [f"## {headline(d, c.confidence)}", "", d.reason, ""]
        lines += [f"| | {d.baseline} | {d.arm} | difference | P(difference > 0) |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        rows = list(range(c.measured.overall))
        order = class_order(c, d)
        rows += [i for n, i in enumerate(order) if n < extremes or n >= len(order) - extremes]
        for i in rows:
            name = names[i].replace("|", "\\|")
            p = "–" if math.isnan(d.value[i]) else f"{d.positive[i]:.3f}"
            lines += [f"| {name} | {cell(b, i)} | {cell(a, i)} | {cell(d, i, '+')} | {p} |"]
        lines += ["", f"{classes_apart(c, d)}.", ""]
    lines += ["## Runs", "", "| arm | AP | AP50 | AP75 | results | checkpoint | seed |"]
    lines += ["| --- | ---: | ---: | ---: | --- | --- | ---: |"]
    for run, ap in zip(runs, c.measured.observed, strict=True):
        seed = "" if run.seed is None else run.seed
        lines += [
            f"| {run.arm} | {ap[0]:.2f} | {ap[1]:.2f} | {ap[2]:.2f} "
            f"| {run.results} | {run.checkpoint or ''} | {seed} |"
        ]
    lines += [
        "",
        f"AP in points, with {c.confidence:.0%} intervals from {len(c.measured.resampled)} "
        f"paired resamples of {images} images"
        + (" and of the runs." if any(len(r) > 1 for r in c.runs.values()) else "."),
    ]
    return "\n".join(lines + [f"Warning: {w}." for w in c.warnings]) + "\n"


def _table2(c: Comparison) -> list[str]:
    """The paper's Table 2 with our numbers beside its own."""
    lines = [
        "## Table 2: AP of RetinaNet on MS-COCO2017, ours beside the paper's",
        "",
        "| image scale | BN | paper | psBN | paper | difference | paper | verdict |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (scale, (bn, psbn)), (bn_arm, psbn_arm) in zip(PAPER.items(), TABLE2_ARMS, strict=True):
        paper = f"{bn:.1f}", f"{psbn:.1f}", f"{psbn - bn:+.1f}"
        found = [d for d in c.differences if (d.arm, d.baseline) == (psbn_arm, bn_arm)]
        ours = ["not run"] * 4
        for d in found:
            ours = [cell(c.arms[bn_arm], 0), cell(c.arms[psbn_arm], 0), cell(d, 0, "+"), d.verdict]
        lines += [
            f"| {scale} | {ours[0]} | {paper[0]} | {ours[1]} | {paper[1]} | {ours[2]} | {paper[2]} "
            f"| {ours[3]} |"
        ]
    return lines


def as_json(
    c: Comparison, runs: Sequence[RunFiles], settings: dict[str, Any], expected: dict[str, bool]
) -> dict[str, Any]:
    """The whole comparison as JSON data; AP in points, null where nothing could be measured."""
    names, overall = c.measured.names, c.measured.overall

    def numbers(e: Estimate) -> dict[str, Any]:
        def one(i: int) -> dict[str, float | None]:
            shown = {"value": e.value[i], "low": e.low[i], "high": e.high[i]}
            if isinstance(e, Difference):
                shown["p_positive"] = e.positive[i]
            return {k: None if math.isnan(v) else float(v) for k, v in shown.items()}

        return {
            **{names[i]: one(i) for i in range(overall)},
            "classes": {names[i]: one(i) for i in range(overall, len(names))},
        }

    return {
        "settings": {"confidence": c.confidence, **settings},
        "warnings": c.warnings,
        "runs": [
            {**asdict(run), **dict(zip(names[:3], map(float, ap[:3]), strict=True))}
            for run, ap in zip(runs, c.measured.observed, strict=True)
        ],
        "arms": {a: numbers(e) for a, e in c.arms.items()},
        "differences": [
            {
                "arm": d.arm,
                "baseline": d.baseline,
                "verdict": d.verdict,
                "shown": d.verdict != NOT_SHOWN,
                "further_seeds": d.further_seeds,
                "reason": d.reason,
                **numbers(d),
            }
            for d in c.differences
        ],
        "expected": expected,
    }
