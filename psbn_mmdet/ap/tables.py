"""What a comparison of AP says, as plain data: Markdown, JSON and the page are rendered from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .coco_files import InputError
from .compare import (
    METHODS,
    NOT_SHOWN,
    Comparison,
    Curves,
    Difference,
    Estimate,
    Plan,
    fewest_images,
)
from .runs import RunFiles

# arXiv 2001.11216, Table 2: AP on COCO-2017, one run each as far as the paper says
PAPER = {500: (32.7, 33.4), 800: (35.8, 36.4)}
TABLE2_ARMS = [("bn_500", "psbn_500"), ("bn_800", "psbn_800")]


@dataclass(frozen=True)
class Cell:
    """A number in AP points and its interval.

    All are NaN where nothing could be measured, the interval where images are too few for one.
    """

    value: float
    low: float
    high: float
    p_positive: float = math.nan  # of a difference: 1 - p of the one-sided t-test

    @property
    def measured(self) -> bool:
        """Whether there was an object to measure on."""
        return not math.isnan(self.value)

    def text(self, sign: str = "") -> str:
        """``0.62 (0.21 to 1.03)``; with ``sign="+"``, ``+0.62 (+0.21 to +1.03)``."""
        if not self.measured:
            return "–"
        v, low, high = (f"{x:{sign}.2f}" for x in (self.value, self.low, self.high))
        return f"{v} ({low} to {high})" if self.has_interval else f"{v} (no interval)"

    @property
    def has_interval(self) -> bool:
        """Whether there were images enough."""
        return not math.isnan(self.low)

    @property
    def p_text(self) -> str:
        """P(difference > 0), three decimals."""
        return "–" if math.isnan(self.p_positive) else f"{self.p_positive:.3f}"

    @property
    def apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Row:
    """A metric or a class: AP of the baseline, of the arm, and their difference."""

    name: str
    images: int  # that have an object that counts for it
    baseline: Cell
    arm: Cell
    difference: Cell


@dataclass(frozen=True)
class Pair:
    """An arm against its baseline."""

    arm: str
    baseline: str
    verdict: str
    outcome: str
    scope: str
    further_seeds: int | None
    reason: str
    headline: str
    overall: list[Row]  # AP, AP50, AP75 and, if measured, the size classes
    classes: list[Row]  # in the order of the annotations
    classes_apart: str
    curves: dict[str, Curves]  # of the baseline and of the arm

    @property
    def sorted_classes(self) -> list[Row]:
        """The classes that could be measured, by falling difference."""
        measured = [r for r in self.classes if r.difference.measured]
        return sorted(measured, key=lambda r: -r.difference.value)


@dataclass(frozen=True)
class RunRow:
    """A run as observed, without an interval."""

    files: RunFiles
    ap: dict[str, float | None]  # AP, AP50, AP75


@dataclass(frozen=True)
class Table2Row:
    """One image scale of the paper's Table 2 with our numbers; None where not run."""

    scale: int
    paper_bn: float
    paper_psbn: float
    pair: Pair | None


@dataclass(frozen=True)
class Report:
    """Everything that is said about a comparison."""

    settings: dict[str, Any]
    confidence: float
    pairs: list[Pair]
    arms: dict[str, list[tuple[str, Cell]]]  # by name: the metrics, then the classes
    metrics: int  # how many of these come before the classes
    runs: list[RunRow]
    table2: list[Table2Row]  # empty unless asked for
    carries: str  # what the intervals carry
    warnings: list[str]
    expected: dict[str, bool] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)


def report(
    c: Comparison,
    runs: Sequence[RunFiles],
    settings: dict[str, Any],
    table2: bool = False,
    expected: dict[str, bool] | None = None,
    pairing: str = "",
    plans: Sequence[Plan] = (),
) -> Report:
    """Put a comparison into tables.

    Args:
        c: The comparison.
        runs: Where its runs lie, in the order of ``c.measured``.
        settings: What a reader needs to repeat it; ``images`` is the number of images.
        table2: Lay Table 2 of the paper beside it.
        expected: Expectation -> whether it holds.
        pairing: Which runs were paired, in a sentence.
        plans: What further seeds and images would show.
    """
    pairs = [_pair(c, d) for d in c.differences]
    by_arms = {(p.baseline, p.arm): p for p in pairs}
    names = c.measured.names
    return Report(
        settings=settings,
        confidence=c.confidence,
        pairs=pairs,
        arms={a: list(zip(names, cells(e), strict=True)) for a, e in c.arms.items()},
        metrics=c.measured.overall,
        runs=[
            RunRow(run, {n: _known(v) for n, v in zip(names[:3], ap[:3], strict=True)})
            for run, ap in zip(runs, c.measured.observed, strict=True)
        ],
        table2=[
            Table2Row(scale, *PAPER[scale], by_arms.get(arms))
            for scale, arms in zip(PAPER, TABLE2_ARMS, strict=True)
            if table2
        ],
        carries=f"{_carries(c, settings['images'])} {pairing}".strip(),
        warnings=list(c.warnings),
        expected=expected or {},
        plans=list(plans),
    )


def cells(e: Estimate) -> Iterator[Cell]:
    """An estimate, name by name."""
    positive = e.positive if isinstance(e, Difference) else [math.nan] * len(e.value)
    for numbers in zip(e.value, e.low, e.high, positive, strict=True):
        yield Cell(*map(float, numbers))


def _known(x: float) -> float | None:
    return None if math.isnan(x) else float(x)


def _pair(c: Comparison, d: Difference) -> Pair:
    columns = map(cells, (c.arms[d.baseline], c.arms[d.arm], d))
    names = c.measured.names, map(int, c.measured.images)
    rows = [Row(*row) for row in zip(*names, *columns, strict=True)]
    overall, classes = rows[: c.measured.overall], rows[c.measured.overall :]
    judged = [r for r in classes if r.difference.has_interval]
    few = sum(r.difference.measured for r in classes) - len(judged)
    apart = sum(r.difference.apart for r in judged)
    return Pair(
        arm=d.arm,
        baseline=d.baseline,
        verdict=d.verdict,
        outcome=d.outcome,
        scope=d.scope,
        further_seeds=d.further_seeds,
        reason=d.reason,
        headline=(
            f"{d.arm} against {d.baseline}: {d.verdict}, {overall[0].difference.text('+')} AP"
            + f" with a {c.confidence:.0%} interval" * overall[0].difference.has_interval
        ),
        overall=overall,
        classes=classes,
        classes_apart=(
            f"{apart} of {len(judged)} classes have an interval without 0; "
            f"about {(1 - c.confidence) * len(judged):.0f} would by chance alone"
            + f". {few} others have objects on fewer than {fewest_images(c.confidence)} images, "
            "too few for an interval" * bool(few)
        ),
        curves={a: c.curves[a] for a in (d.baseline, d.arm)},
    )


def _carries(c: Comparison, images: int) -> str:
    """What the intervals carry, in one or two sentences."""
    several = [a for a, runs in c.runs.items() if len(runs) > 1]
    single = [a for a in c.runs if a not in several]
    said = (
        f"AP in points, with {c.confidence:.0%} intervals from {len(c.measured.draws)} paired "
        f"resamples of {images} images, {c.measured.images[0]} of them with an object"
    )
    if not several:
        return f"{said}. They carry no seeds: every arm has one run."
    if not single:
        paired = ", paired in the differences" if c.paired else ""
        return f"{said}, and from the spread of the runs{paired}."
    return (
        f"{said}, and for {', '.join(several)} from the spread of the runs. Those of "
        f"{', '.join(single)}, with one run each, and of differences that involve them carry no "
        "seeds."
    )


def table2_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs (arm, baseline) of Table 2 among the arms ``bn_500, psbn_500, bn_800, psbn_800``.

    Raises:
        InputError: An arm has another name, or a scale lacks one of its two.
    """
    known = [a for pair in TABLE2_ARMS for a in pair]
    if strange := [a for a in arms if a not in known]:
        raise InputError(f"--table2: arm {strange[0]!r}; name the arms {', '.join(known)}")
    pairs = [(psbn, bn) for bn, psbn in TABLE2_ARMS if bn in arms or psbn in arms]
    if missing := [a for pair in pairs for a in pair if a not in arms]:
        raise InputError(f"--table2: arm {missing[0]} is missing; both norms of a scale are needed")
    return pairs


def as_json(r: Report) -> dict[str, Any]:
    """The report as JSON data; AP in points, null where nothing could be measured."""

    def numbers(cell: Cell) -> dict[str, float | None]:
        return {"value": _known(cell.value), "low": _known(cell.low), "high": _known(cell.high)}

    def difference(row: Row) -> dict[str, float | int | None]:
        known = _known(row.difference.p_positive)
        return {**numbers(row.difference), "p_positive": known, "images": row.images}

    return {
        "settings": {"confidence": r.confidence, **r.settings},
        "warnings": r.warnings,
        "runs": [{**vars(run.files), **run.ap} for run in r.runs],
        "plans": [vars(plan) for plan in r.plans],
        "arms": {
            arm: {
                **{name: numbers(x) for name, x in named[: r.metrics]},
                "classes": {name: numbers(x) for name, x in named[r.metrics :]},
            }
            for arm, named in r.arms.items()
        },
        "differences": [
            {
                "arm": p.arm,
                "baseline": p.baseline,
                "verdict": p.verdict,
                "shown": p.outcome != NOT_SHOWN,
                "scope": p.scope,
                "seeds_in_interval": p.scope == METHODS,
                "further_seeds": p.further_seeds,
                "reason": p.reason,
                **{row.name: difference(row) for row in p.overall},
                "classes": {row.name: difference(row) for row in p.classes},
            }
            for p in r.pairs
        ],
        "expected": r.expected,
    }


def markdown(r: Report, extremes: int = 5) -> str:
    """The report as Markdown.

    Args:
        r: The report.
        extremes: How many of the classes with the largest gain and the largest loss to list, of
            those that have an interval.
    """
    lines = []
    if r.table2:
        lines += ["## Table 2: AP of RetinaNet on MS-COCO2017, ours beside the paper's", ""]
        lines += _markdown_table(
            ["image scale", "BN", "paper", "psBN", "paper", "difference", "paper", "verdict"],
            [table2_cells(row) for row in r.table2],
        )
    for p in r.pairs:
        lines += [f"## {p.headline}", "", p.reason, ""]
        classes = [row for row in p.sorted_classes if row.difference.has_interval]
        ends = [
            row for n, row in enumerate(classes) if n < extremes or n >= len(classes) - extremes
        ]
        lines += _markdown_table(row_header(p), [row_cells(row) for row in [*p.overall, *ends]])
        lines += [f"{p.classes_apart}.", ""]
    for plan in r.plans:
        lines += [f"## {plan_title(plan)}", ""]
        lines += _markdown_table(*plan_cells(plan))
    lines += ["## Runs", ""]
    lines += _markdown_table(RUN_HEADER, [run_cells(run) for run in r.runs], left=(0, 4, 5))
    lines += [r.carries, *(f"Warning: {w}." for w in r.warnings)]
    return "\n".join(lines) + "\n"


def row_header(pair: Pair) -> list[str]:
    """Over the rows of a pair."""
    return ["", pair.baseline, pair.arm, "difference", "P(difference > 0)", "images"]


def row_cells(row: Row) -> list[str]:
    """A metric or class under :func:`row_header`."""
    d = row.difference
    return [
        row.name, row.baseline.text(), row.arm.text(), d.text("+"), d.p_text, str(row.images)
    ]  # fmt: skip


def plan_title(plan: Plan) -> str:
    """What the numbers of a plan are."""
    return (
        f"{plan.arm} against {plan.baseline}: the probability of showing a true difference of "
        f"{plan.difference:.2f} AP"
    )


def plan_cells(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a plan."""
    times = ["these images", *(f"{n} times as many" for n in plan.images[1:])]
    rows = [
        [f"+{k}" if k else "none", *(f"{p:.0%}" for p in powers)]
        for k, powers in zip(plan.further_seeds, plan.power, strict=True)
    ]
    return ["further seeds per arm", *times], rows


RUN_HEADER = ["arm", "AP", "AP50", "AP75", "results", "checkpoint", "seed"]


def run_cells(run: RunRow) -> list[str]:
    """A run under RUN_HEADER."""
    files = run.files
    return [
        files.arm,
        *("–" if x is None else f"{x:.2f}" for x in run.ap.values()),
        files.results,
        files.checkpoint or "",
        "" if files.seed is None else str(files.seed),
    ]


def table2_cells(row: Table2Row) -> list[str]:
    """A row of Table 2: scale; ours and the paper's for BN, psBN and the difference; verdict."""
    ours = ["not run"] * 4
    if row.pair:
        ap = row.pair.overall[0]
        ours = [ap.baseline.text(), ap.arm.text(), ap.difference.text("+"), row.pair.verdict]
    paper = f"{row.paper_bn:.1f}", f"{row.paper_psbn:.1f}", f"{row.paper_psbn - row.paper_bn:+.1f}"
    return [str(row.scale), ours[0], paper[0], ours[1], paper[1], ours[2], paper[2], ours[3]]


def _markdown_table(
    header: list[str], rows: list[list[str]], left: Sequence[int] = (0,)
) -> list[str]:
    """The lines of a table and an empty one; columns other than ``left`` are set to the right."""

    def line(texts: list[str]) -> str:
        return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |"

    align = ["---" if i in left else "---:" for i in range(len(header))]
    return [line(header), line(align), *map(line, rows), ""]
