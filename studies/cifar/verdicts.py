"""Claims against the published results: shown, not shown, or the opposite.

The paper's claims come first, then what the studies ask beyond the paper. Each claim is turned into
a number per seed that is positive if the claim holds there (a paired difference of two arms, or of
two rounds), and judged by the 95% interval of its mean (Student's t):

- *shown*: the interval lies above 0;
- *the opposite*: it lies below 0;
- *not shown*: it has 0 in it, with :data:`NULL_SEEDS` seeds or more;
- *open*: it has 0 in it, and there are fewer seeds, too few to say that there is nothing. For both
  it is said how many seeds would show an effect of the paper's size with 80% power, with the
  deviation over the seeds that there are and, in brackets, at the ends of its 95% interval;
- *not run*: the experiment is not published.

Each row says whether its number was planned before it was seen: :data:`PLANNED`.

Only the JSON files of ``results`` are read, here and of the detection study.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.runs import (
    RunError,
    Values,
    by_seed,
    interval,
    minus,
    with_interval,
    write_json,
)

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"
MOST_SEEDS = 10_000

Summary = dict[str, Any]


PLANNED = ("yes", "afterwards", "no")
"""Whether a number was planned before it was seen.

- *yes*: arms, measure and claim were written down before the first result;
- *afterwards*: the arms were, and the paper makes the claim, but this number for it was chosen when
  first results were known;
- *no*: nobody asked before it was seen.
"""


@dataclass(frozen=True)
class Claim:
    """A sentence as a number that is positive where it holds.

    Args:
        results: The JSON file, without its ending, seen from the folder of results.
        section: Of the paper, or the figure or table; empty if the paper does not claim it.
        text: What is claimed, as measured.
        paper: What the paper prints, as text.
        unit: Of the number.
        of: Gives the number of each seed.
        effects: The paper's sizes of it, if it prints any; for claims of accuracy without,
            those of Table 1 (:data:`TABLE1_GAINS`).
        looked_at: Number of seeds at which the result was seen before more were added, if any.
        planned: One of :data:`PLANNED`.
        note: What else a reader must know of how the number was planned.
    """

    results: str
    section: str
    text: str
    paper: str
    unit: str
    of: Callable[[Summary], Values]
    effects: tuple[float, ...] = ()
    looked_at: int | None = None
    planned: str = "yes"
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """``metric`` of one arm less that of another, seed by seed; empty until both were run."""

    first: str
    second: str
    metric: str
    round_: int = -1

    def __call__(self, summary: Summary) -> Values:
        if not {self.first, self.second} <= set(summary["arms"]):
            return {}
        sides = (at(summary, arm, self.metric, self.round_) for arm in (self.first, self.second))
        return minus(*sides)


TABLE1_GAINS = (0.68, 0.19)
"""Points, psBN over BN, fifth snapshot at lr 0.1 and 0.2: 94.43 - 93.75 and 94.29 - 94.10."""

NULL_SEEDS = 6
"""A deviation of three seeds is known to a factor of six, one of six to a factor of 2.5."""


# ---------------------------------------------------------------- statistics


def power(effect: float, deviation: float, seeds: int) -> float:
    """Probability that a two-sided paired t-test at 5% shows an effect, on its own side."""
    from scipy.special import nctdtr, stdtrit

    critical = stdtrit(seeds - 1, 0.975)
    return 1 - float(nctdtr(seeds - 1, effect / deviation * math.sqrt(seeds), critical))


def seeds_needed(effect: float, deviation: float, wanted: float = 0.8) -> int | None:
    """The least number of seeds with that power; None above :data:`MOST_SEEDS`."""
    if deviation == 0:
        return 2
    low, high = 1, 2
    while power(effect, deviation, high) < wanted:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:  # power grows with seeds
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, deviation, middle) >= wanted else (middle, high)
    return high


def deviation_interval(deviation: float, seeds: int) -> tuple[float, float]:
    """95% interval of a standard deviation estimated from some seeds (chi squared)."""
    from scipy.special import gammaincinv

    degrees = seeds - 1
    ends = (2 * gammaincinv(degrees / 2, q) for q in (0.975, 0.025))
    low, high = (deviation * math.sqrt(degrees / end) for end in ends)
    return low, high


def false_alarms(looked_at: int, seeds: int, draws: int = 100_000) -> float:
    """How often a test at 5% finds what is not there if more seeds follow a look without success.

    Args:
        looked_at: Seeds at the first look, after which one stops if the interval excludes 0.
        seeds: At the second.
        draws: Of the simulation, which has a seed of its own.
    """
    from scipy.special import stdtrit

    values = np.random.default_rng(0).standard_normal((draws, seeds))
    found = np.zeros(draws, bool)
    for count in (looked_at, seeds):
        of = values[:, :count]
        t = of.mean(1) / of.std(1, ddof=1) * math.sqrt(count)
        found |= np.abs(t) > stdtrit(count - 1, 0.975)
    return float(found.mean())


# ---------------------------------------------------------------- values of a summary


def at(summary: Summary, arm: str, metric: str, round_: int = -1) -> Values:
    """The values of an arm by seed; ``round_`` as an index from 0, or -1 for the last."""
    if arm not in summary["arms"]:
        raise RunError(
            f"{summary['experiment']}.json: has no arm {arm!r}; there are "
            f"{', '.join(summary['arms'])}"
        )
    entry = summary["arms"][arm]
    value = entry["ensemble"] if metric == "ensemble" else entry["rounds"][round_][metric]
    return by_seed(entry["seeds"], value)


def _rounds(arm: str, metric: str, later: int = -1, earlier: int = 0) -> Callable[..., Values]:
    return lambda s: minus(at(s, arm, metric, later), at(s, arm, metric, earlier))


def _negative(of: Callable[[Summary], Values]) -> Callable[[Summary], Values]:
    return lambda s: {seed: -value for seed, value in of(s).items()}


def _more_than_half(part: str, whole: str) -> Callable[[Summary], Values]:
    def of(s: Summary) -> Values:
        half = {seed: value / 2 for seed, value in at(s, whole, "sparsity").items()}
        return minus(at(s, part, "sparsity"), half)

    return of


def _extremes(*, large: bool) -> Callable[[Summary], Values]:
    """Sparsity at the end of the sweep that is to collapse most, less that at the other one."""

    def of(s: Summary) -> Values:
        arms = sorted(s["arms"], key=lambda arm: s["arms"][arm]["x"], reverse=large)
        return minus(at(s, arms[0], "sparsity"), at(s, arms[-1], "sparsity"))

    return of


def _near_zero(s: Summary) -> Values:
    seeds = s["arms"]["VGG11 with BN"]["seeds"]
    with_bn, without = (s["near_zero_percent"][f"VGG11 {name} BN"] for name in ("with", "without"))
    return {seed: a - b for seed, a, b in zip(seeds, with_bn, without, strict=True)}


def _came_back(s: Summary) -> Values:
    shares = []
    for arm in ("on as BN", "on as psBN, preserve"):
        entry = s["recovery"][arm]
        seeds = [
            seed
            for seed, count in zip(s["arms"][arm]["seeds"], entry["collapsed_before"], strict=True)
            if count
        ]
        shares.append(dict(zip(seeds, entry["still_collapsed_percent"], strict=True)))
    return minus(*shares)


def _uniform_minus_others(s: Summary) -> Values:
    """Accuracy of uniform ablation at the FLOPs of each other pruned network, less its own; mean.

    Only where uniform ablation has a network with fewer FLOPs and one with more. The whole
    network of round 1 is the first point of uniform ablation.
    """
    arms = s["arms"]
    retrain = next(arm for arm, entry in arms.items() if entry["line"] == "retrain")

    def points(arm: str, index: int, rows: slice) -> list[tuple[float, float]]:
        left = s["flops_percent"][arm]
        return [
            (
                left * (1 - row["sparsity"]["values"][index] / 100),
                row["pruned_accuracy"]["values"][index],
            )
            for row in arms[arm]["rounds"][rows]
        ]

    found = {}
    for index, seed in enumerate(arms[retrain]["seeds"]):
        uniform = points(retrain, index, slice(0, 1))
        others = points(retrain, index, slice(1, None))
        for arm, entry in arms.items():
            if entry["line"] == "uniform filter ablation":
                uniform += points(arm, index, slice(None))
            elif arm != retrain:
                others += points(arm, index, slice(None))
        x, y = np.transpose(sorted(uniform))
        inside = [(flops, accuracy) for flops, accuracy in others if x[0] <= flops <= x[-1]]
        if inside:
            found[seed] = statistics.fmean(np.interp(f, x, y) - a for f, a in inside)
    return found


def _alpha(alpha: float) -> Callable[[Summary], Values]:
    """Accuracy against BN, mean over the decays, plus the margin of one point."""

    def of(s: Summary) -> Values:
        lines = dict.fromkeys(entry["line"] for entry in s["arms"].values())
        gains = [Difference(f"psBN {alpha:g}, {x}", f"BN, {x}", "accuracy")(s) for x in lines]
        return {seed: 1 + statistics.fmean(g[seed] for g in gains) for seed in gains[0]}

    return of


# ---------------------------------------------------------------- the claims

_TRIED_WITH_ONE = "sizes set by a trial with one seed"


def _fig3(results: str, where: str = "", planned: str = "yes") -> list[Claim]:
    bn, psbn = (f"resnet20, {norm} + ReLU" for norm in ("BN", "psBN"))
    flops, points = "% of FLOPs", "points"
    return [
        Claim(results, "3.2, Fig. 3", f"BN: sparsity grows with the rounds{where}", "drawn", flops,
              _rounds(bn, "sparsity"), planned=planned),
        Claim(results, "3.2, Fig. 3", f"BN: accuracy falls from the first round to the last{where}",
              "drawn", points, _negative(_rounds(bn, "accuracy")), TABLE1_GAINS, planned=planned),
        Claim(results, "5.1, Fig. 3", f"psBN has less sparsity than BN{where}", "drawn", flops,
              Difference(bn, psbn, "sparsity"), planned=planned),
        Claim(results, "5.1, Fig. 3", f"psBN is more accurate than BN after the last round{where}",
              "drawn", points, Difference(psbn, bn, "accuracy"), TABLE1_GAINS, planned=planned),
    ]  # fmt: skip


def _table1() -> list[Claim]:
    claims = []
    for lr, ensemble, sparsity in (("0.2", 0.23, 26.3), ("0.1", 0.63, 3.0)):
        psbn, bn = f"lr {lr}, psBN", f"lr {lr}, BN"
        claims += [
            Claim("table1", "5.2, Table 1", f"the ensemble of psBN is more accurate, lr {lr}",
                  f"+{ensemble}", "points", Difference(psbn, bn, "ensemble"), (ensemble,)),
            Claim("table1", "5.2, Table 1", f"psBN has less sparsity in snapshot 5, lr {lr}",
                  f"{sparsity}", "% of FLOPs", Difference(bn, psbn, "sparsity"), (sparsity,)),
        ]  # fmt: skip
    return claims


_TRANSFER, _REVIVE, _DEGREES, _ALPHA, _DETECTION_ROUNDS = (
    f"../../detection/results/{name}"
    for name in ("transfer", "revive", "degrees", "alpha", "rounds")
)


def _table2() -> list[Claim]:
    pretraining = Claim(_TRANSFER, "5.3", "a detector is better if its backbone was pretrained "
                        "with psBN", "no experiment", "AP",
                        Difference("BN, 6 rounds of psBN", "BN, 6 rounds", "AP"),
                        looked_at=5)  # fmt: skip
    claims = [pretraining]
    for degree, start in (("1 round", "a healthy"), ("6 rounds", "a collapsed")):
        for method in ("preserve", "shift"):
            text = f"a detector is better finetuned as psBN by `{method}`, from {start} backbone"
            of = Difference(f"psBN {method}, {degree}", f"BN, {degree}", "AP")
            claims.append(
                Claim(_TRANSFER, "5.3, Table 2", text, "+0.6 to +0.7", "AP", of, (0.65,), 5)
            )
    return claims


PAPERS: tuple[Claim, ...] = (
    *_fig3("fig3", planned="afterwards"),
    Claim("fig3", "3.5, Fig. 3",
          "LeakyReLU leaves more than half of BN's sparsity (less half of BN's)",
          "“marginal effect”", "% of FLOPs",
          _more_than_half("resnet20, BN + LeakyReLU", "resnet20, BN + ReLU"),
          planned="afterwards"),
    *_fig3("fig3-medium", " (all images)"),
    *_fig3("fig3-paper16", " (the paper's schedule, 16x16)"),
    Claim("fig1a", "3.4, Fig. 1a", "more filters near norm 0 with BN than without", "drawn",
          "% of a layer", _near_zero, planned="afterwards"),
    Claim("fig1b", "1, Fig. 1b", "filters collapse in the second round", "drawn",
          "% of filters", _rounds("BN + ReLU", "collapsed"), planned="afterwards"),
    Claim("capacity", "3.3, Fig. 2b", "random labels: BN's sparsity grows with the rounds", "drawn",
          "% of FLOPs", _rounds("BN + ReLU", "sparsity"), note=_TRIED_WITH_ONE),
    Claim("capacity", "3.3, Fig. 2a", "random labels: BN's fifth round fits worse than its first",
          "drawn", "loss", _rounds("BN + ReLU", "train_loss", 4), note=_TRIED_WITH_ONE),
    Claim("capacity", "abstract", "random labels: psBN fits better than BN in the fifth round",
          "no experiment", "loss", Difference("BN + ReLU", "psBN 0.1 + ReLU", "train_loss", 4),
          note=_TRIED_WITH_ONE),
    Claim("instance_norm", "3.4", "instance normalization: sparsity above the linear network's 1% "
          "(less 1)", "no number", "% of FLOPs",
          lambda s: minus(at(s, "IN + ReLU", "sparsity"), 1.0)),
    Claim("linear", "3.5", "without activations sparsity stays below 1% (1 less it)", "< 1%",
          "% of FLOPs",
          lambda s: {k: 1 - v for k, v in at(s, "BN, no activation", "sparsity").items()}),
    Claim("shuffled", "3.6", "shuffled parameters: sparsity grows all the same", "no number",
          "% of FLOPs", _rounds("shuffled before round 2", "sparsity")),
    Claim("shuffled", "3.6", "shuffled parameters: accuracy falls against round 1", "no number",
          "points", _negative(_rounds("shuffled before round 2", "accuracy"))),
    Claim("fig4", "3.7, Fig. 4", "uniform ablation, trained for one round, is more accurate than "
          "what collapsed by itself in up to four", "“no method performs better”", "points",
          _uniform_minus_others),
    Claim("strip", "3.7", "uniform ablation is more accurate than the collapsed network, stripped",
          "“no method performs better”", "points",
          Difference("uniform, from scratch", "stripped", "accuracy"), planned="afterwards"),
    Claim("fig5a", "4.2, Fig. 5a", "the largest learning rate has more sparsity than the smallest",
          "drawn", "% of FLOPs", _extremes(large=True), planned="afterwards"),
    Claim("fig5b", "3.6, Fig. 5b", "the smallest initial gamma has more sparsity than the largest",
          "drawn", "% of FLOPs", _extremes(large=False), planned="afterwards"),
    *_table1(),
    Claim("recovery", "abstract", "collapsed filters come back under psBN, not under BN",
          "no number", "% of them", _came_back, looked_at=3, planned="afterwards"),
    Claim("recovery", "abstract", "going on as psBN is more accurate than going on as BN",
          "no number", "points", Difference("on as psBN, preserve", "on as BN", "accuracy"),
          TABLE1_GAINS, 3, planned="afterwards"),
    Claim("finetune", "3.6", "a collapsed network is a worse start than random weights",
          "no number", "points", Difference("fresh BN", "BN", "accuracy")),
    Claim("finetune", "5.3", "finetuned as psBN it is more accurate than as BN", "no number",
          "points", Difference("psBN, preserve", "BN", "accuracy"), TABLE1_GAINS),
    Claim("finetune", "5.3", "finetuned as psBN by `shift` it is more accurate than as BN",
          "no number", "points", Difference("psBN, shift", "BN", "accuracy"), TABLE1_GAINS,
          planned="afterwards", note="the other of two routes"),
    *_table2(),
    Claim("alpha", "5",
          "psBN with alpha 0.1 loses less than one point against BN (1 less the loss)",
          "“works stably”", "points", _alpha(0.1)),
)  # fmt: skip
"""What the paper says."""


def _revival() -> list[Claim]:
    """Of the detection study's ``revive``: methods against BN, and against each other."""
    healthy, collapsed, plain = "1 round", "6 rounds", "BN without norm decay"
    bn, again = f"BN, {collapsed}", f"{collapsed}, revived"
    pilot = "after a pilot by hand with seeds 0 to 2; neck and head fresh since a first try"
    peers = ("ReDo", "shrink and perturb", "L2 Init")
    rows: list[tuple[str, str, str, str, str]] = [
        ("a collapsed backbone (60%) costs a detector AP: healthy less collapsed",
         f"BN, {healthy}", bn, "yes", ""),
        ("collapsed: revived, then BN", f"BN, {again}", bn, "yes", pilot),
        ("collapsed: revived, then BN without norm decay", f"{plain}, {again}", bn, "yes", pilot),
        ("collapsed: revived, then psBN by `shift`", f"psBN shift, {again}", bn, "yes", pilot),
        ("collapsed: revived, then AnchoredBiasDecay", f"AnchoredBiasDecay, {again}", bn, "yes",
         pilot),
        ("collapsed: BN without norm decay alone", f"{plain}, {collapsed}", bn, "yes", pilot),
        ("revived: BN without norm decay less BN", f"{plain}, {again}", f"BN, {again}", "yes", ""),
        ("revived: psBN by `shift` less BN", f"psBN shift, {again}", f"BN, {again}", "yes", ""),
        ("collapsed and revived less healthy", f"BN, {again}", f"BN, {healthy}", "yes", ""),
        ("healthy: revived less as it is", f"BN, {healthy}, revived", f"BN, {healthy}", "yes", ""),
    ]  # fmt: skip
    rows += [(f"collapsed: {p} less BN", f"{bn}, {p}", bn, "yes", "") for p in peers]
    rows += [
        (f"collapsed: {p} less revived", f"{bn}, {p}", f"BN, {again}", "yes", "") for p in peers
    ]
    control = "a control, added after two seeds of shrink and perturb"
    for degree, start in ((healthy, "healthy"), (collapsed, "collapsed")):
        for p in ("shrink and perturb", "gamma alone shrunk and perturbed"):
            if (degree, p) != (collapsed, "shrink and perturb"):
                first, second = f"BN, {degree}, {p}", f"BN, {degree}"
                rows.append((f"{start}: {p} less BN", first, second, "no", control))
    lifted = f"{bn}, gamma of the collapsed set to 0.1"
    again_control = "a control, added after two seeds of gamma alone"
    rows += [
        ("collapsed: gamma of the collapsed set to 0.1 less BN", lifted, bn, "no", again_control),
        ("collapsed: gamma of the collapsed set to 0.1 less revived", lifted, f"BN, {again}", "no",
         again_control),
    ]  # fmt: skip
    first, second = (f"BN, {d}, shrink and perturb" for d in (healthy, collapsed))
    rows.append(("after shrink and perturb: healthy less collapsed", first, second, "no", control))
    return [
        Claim(_REVIVE, "", text, "", "AP", Difference(first, second, "AP"), planned=planned,
              note=note)
        for text, first, second, planned, note in rows
    ]  # fmt: skip


def _pretrained(s: Summary) -> Values:
    """Accuracy of a backbone pretrained with psBN less that of its twin with BN, last round."""
    psbn, bn = (s["backbones"][norm][-1] for norm in ("psBN", "BN"))
    return minus(*(by_seed(row["seeds"], row["accuracy"]) for row in (psbn, bn)))


_LIMITED = "AnchoredBiasDecay, max_ratio 1"
_CHOSEN = "max_ratio was chosen with seed 0 on these test images"

BEYOND: tuple[Claim, ...] = (
    *_revival(),
    *(
        Claim(_DEGREES, "", f"{share} collapsed: {cure} less BN", "", "AP",
              Difference(f"BN, {degree}, {cure}", f"BN, {degree}", "AP"))
        for share, degree in (("25%", "2 rounds"), ("46%", "3 rounds"))
        for cure in ("revived", "gamma of the collapsed set to 0.1",
                     "gamma alone shrunk and perturbed")
    ),
    *(
        Claim(_TRANSFER, "", f"{share} of a backbone collapsed cost AP: healthy less collapsed", "",
              "AP", Difference("BN, 1 round", f"BN, {degree}", "AP"), looked_at=look)
        for share, degree, look in (("25%", "2 rounds", None), ("46%", "3 rounds", 5))
    ),
    Claim(_TRANSFER, "", "a backbone pretrained with psBN is more accurate at its own task", "",
          "points", _pretrained, planned="no"),
    *(
        Claim(_ALPHA, "", f"alpha {alpha:g} costs a healthy backbone AP: BN less psBN", "", "AP",
              Difference("BN, 1 round", f"psBN, alpha {alpha:g}, 1 round", "AP"), looked_at=3)
        for alpha in (0.03, 0.1, 0.3)
    ),
    Claim(_DETECTION_ROUNDS, "", "rounds with much decay: alpha 0.1 costs AP: BN less psBN", "",
          "AP", Difference("BN", "psBN, alpha 0.1", "AP")),
    Claim(_DETECTION_ROUNDS, "", "rounds with much decay: `max_ratio=1` less AnchoredBiasDecay "
          "without", "", "AP", Difference(_LIMITED, "AnchoredBiasDecay", "AP"), note=_CHOSEN),
    *(
        Claim(results, "", f"{where}: {arm} less BN", "", "points",
              Difference(start + arm, start + "BN", "accuracy"))
        for results, where, start in (
            ("recovery", "CIFAR-10, going on", "on as "),
            ("finetune", "CIFAR-10, finetuned on more data", ""),
        )
        for arm in ("BN, revived", "BN, no norm decay", "BN, revived, no norm decay")
    ),
    *(
        Claim("finetune", "", f"CIFAR-10, finetuned on more data: {arm} less {other}", "", "points",
              Difference(arm, other, "accuracy"))
        for arm, other in (
            ("BN, revived", "fresh BN"),
            ("BN, revived", "BN, every gamma lifted"),
            ("BN, gamma of the collapsed lifted", "BN"),
            ("BN, every gamma lifted", "BN"),
            ("BN, every gamma lifted", "fresh BN"),
        )
    ),
)  # fmt: skip
"""What the studies ask beyond the paper."""

CLAIMS = PAPERS + BEYOND


# ---------------------------------------------------------------- judging


def judge(claim: Claim, summary: Summary | None) -> dict[str, Any]:
    """A row of the table, ready for JSON.

    Args:
        claim: What is claimed.
        summary: The published results, or None if there are none.
    """
    row: dict[str, Any] = {
        "results": claim.results,
        "section": claim.section,
        "claim": claim.text,
        "paper": claim.paper,
        "paper_effects": list(claim.effects),
        "unit": claim.unit,
        "planned": claim.planned,
        "note": claim.note,
    }
    values = claim.of(summary) if summary else {}
    if not values:
        return {**row, "verdict": "not run"}
    mean, found = statistics.fmean(values.values()), interval(values.values())
    row.update(
        {
            "values": {str(seed): value for seed, value in values.items()},
            "seeds": len(values),
            "mean": mean,
            "interval": found,
            "looked_at": claim.looked_at,
            "verdict": "not shown" if len(values) >= NULL_SEEDS else "open",
        }
    )
    if found and found[0] > 0:
        row["verdict"] = "shown"
    elif found and found[1] < 0:
        row["verdict"] = "the opposite"
    elif found and claim.effects:
        deviation = statistics.stdev(values.values())
        low, high = deviation_interval(deviation, len(values))
        row["seeds_needed"] = [
            [seeds_needed(effect, d) for d in (deviation, low, high)] for effect in claim.effects
        ]
    return row


def verdicts(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """A row for each claim, from the JSON files of a folder."""
    summaries = {}
    for claim in CLAIMS:
        path = folder / f"{claim.results}.json"
        if path.exists() and claim.results not in summaries:
            summaries[claim.results] = json.loads(path.read_text())
    return [judge(claim, summaries.get(claim.results)) for claim in CLAIMS]


def markdown(rows: list[dict[str, Any]], link: str = "") -> str:
    """The rows as two tables: the paper's claims, and what is asked beyond it.

    Args:
        rows: Of :func:`verdicts`.
        link: What stands before ``NAME.md`` in the links.
    """
    papers = [row for row in rows if row["section"]]
    beyond = [row for row in rows if not row["section"]]
    ours = "ours, mean (95% interval), seeds"
    lines = [
        f"| the paper claims | it prints | {ours} | planned | verdict |",
        "|---|---|---|---|---|",
    ]
    for row in papers:
        name, *cells = _cells(row, link)
        lines.append(
            f"| {row['claim']} ({row['section']}; {name}) | {row['paper']} | "
            + " | ".join(cells)
            + " |"
        )
    if beyond:
        lines += ["", "Beyond the paper:", ""]
        lines += [f"| what is asked | {ours} | planned | verdict |", "|---|---|---|---|"]
        for row in beyond:
            name, *cells = _cells(row, link)
            lines.append(f"| {row['claim']} ({name}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], link: str) -> tuple[str, str, str, str]:
    """Name of the experiment, the number, how it was planned, the verdict."""
    name = f"`{Path(row['results']).name}`"
    ours, verdict, planned = "-", f"**{row['verdict']}**", row["planned"]
    if row["verdict"] != "not run":
        name = f"[{name}]({link}{row['results']}.md)"
        ours = f"{with_interval(row['mean'], row['interval'])} {row['unit']}, {row['seeds']}"
        if row["looked_at"]:
            more = row["seeds"] - row["looked_at"]
            planned += f"; {more} of the seeds after a look at {row['looked_at']}"
    if row["note"]:
        planned += f"; {row['note']}"
    for effect, needed in zip(row["paper_effects"], row.get("seeds_needed", ())):
        count, low, high = map(_count, needed)
        verdict += f"; {count} ({low} to {high}) seeds would show {effect:g}"
    return name, ours, planned, verdict


def _count(seeds: int | None) -> str:
    return f"over {MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"


def in_readme(text: str, table: str) -> str:
    """A manual with the table between its markers.

    Raises:
        RunError: It has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunError(f"README.md: has no {BEGIN} and {END}, between which the table goes")
    return f"{before}{begin}\n{table}{end}{after}"


def write(folder: Path = RESULTS, readme: Path | None = README) -> list[Path]:
    """Write ``verdicts.json``, ``verdicts.md`` and the manual's table from the other JSON files.

    Returns:
        What was written.

    Raises:
        RunError: The folder is not there, or the manual has no markers.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder")
    rows = verdicts(folder)
    manual = in_readme(readme.read_text(), markdown(rows, "results/")) if readme else ""
    write_json(folder / "verdicts.json", rows)
    heading = "# Claims, judged\n\n`python -m studies.cifar verdicts`\n\n"
    (folder / "verdicts.md").write_text(heading + markdown(rows))
    if readme:
        readme.write_text(manual)
    return [folder / "verdicts.json", folder / "verdicts.md", *([readme] if readme else [])]
