"""Finished runs in numbers, ready for JSON, and those numbers as Markdown.

AP, its intervals and its verdicts are those of :mod:`psbn_mmdet.ap`: they carry the test images
and the seeds. The states of filters are mean and standard deviation over seeds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from psbn_mmdet.ap.coco_files import Results, read_annotations, read_results
from psbn_mmdet.ap.compare import Comparison, compare, measure
from studies.runs import RunError, by_arm, by_seed, folder_of, paired, processor, spread

from .engine import annotations_of, backbone_folder
from .experiments import Experiment, Run
from .settings import NO_NORM_DECAY

FILTERS = {
    "collapsed": "collapsed filters (%)",
    "stuck": "stuck filters (%)",
    "idle": "idle filters (%)",
    "active_probability": "mean P(active)",
    "gamma_median": "median size of gamma",
}
DIGITS = {"active_probability": 2, "gamma_median": 3}
RESAMPLES = 1000
CONFIDENCE = 0.95
Outcome = tuple[Run, dict[str, Any]]


def compare_rounds(
    experiment: Experiment,
    out: str | os.PathLike[str],
    outcomes: list[Outcome],
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Finished runs compared after each round.

    Args:
        experiment: What was run.
        out: Where.
        outcomes: Its finished runs, read once: others may finish meanwhile.
        resamples: Of the bootstrap over images.

    Raises:
        RunError: No run is finished.
    """
    if not outcomes:
        raise RunError(f"{Path(out, experiment.name)}: no run is finished, so nothing to draw")
    return [
        compare_round(experiment, out, by_arm(outcomes), number, resamples)
        for number in range(1, len(outcomes[0][1]["rounds"]) + 1)
    ]


def write_resampled(outcomes: list[Outcome], compared: list[Comparison], path: Path) -> None:
    """AP of every run on every draw of the images, so that intervals can be computed again.

    ``runs`` (M,) are names, ``round_K`` (B, M) thousandths of a point.
    """
    runs = [run.name for of_arm in by_arm(outcomes).values() for run, _ in of_arm]
    rounds: dict[str, Any] = {
        f"round_{number}": np.rint(1000 * comparison.measured.draws[:, :, 0]).astype(np.int32)
        for number, comparison in enumerate(compared, 1)
    }
    np.savez_compressed(path, runs=np.array(runs), **rounds)


def summarise(
    experiment: Experiment,
    out: str | os.PathLike[str],
    outcomes: list[Outcome],
    compared: list[Comparison],
    command: str = "",
) -> dict[str, Any]:
    """All that the figure and the tables show, ready for JSON.

    Args:
        experiment: What was run.
        out: Where.
        outcomes: Its finished runs.
        compared: By :func:`compare_rounds`.
        command: That made it, for the record.
    """
    members = by_arm(outcomes)
    arms = {}
    for arm, of_arm in members.items():
        first, _ = of_arm[0]
        settings = asdict(first.settings)
        del settings["seed"]
        settings["backbone"] = settings["backbone"] and settings["backbone"].partition("-seed")[0]
        arms[arm] = {
            "line": first.line,
            "x": first.x,
            "seeds": [run.settings.seed for run, _ in of_arm],
            "settings": settings,
            "start": {key: spread(r["start"][key] for _, r in of_arm) for key in FILTERS},
            "rounds": [
                {
                    **{
                        key: spread(r["rounds"][i][key] for _, r in of_arm)
                        for key in ("train_loss", "AP50", "AP75", *FILTERS)
                    },
                    "AP": {
                        **spread(r["rounds"][i]["AP"] for _, r in of_arm),
                        **_interval(comparison, arm),
                    },
                }
                for i, comparison in enumerate(compared)
            ],
        }
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "command": command,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads_of_a_run": sorted({result["threads"] for _, result in outcomes}),
            "torch": sorted({result["torch"] for _, result in outcomes}),
            "seconds_of_a_run": spread(result["seconds"] for _, result in outcomes)["mean"],
        },
        "data_crc32": outcomes[0][1]["data_crc32"],
        "confidence": CONFIDENCE,
        "resamples": len(compared[0].measured.draws),
        "runs_finished": len(outcomes),
        "runs_planned": len(experiment.runs),
        "choices": list(experiment.choices),
        "pretraining": next(
            (
                {k: v for k, v in asdict(settings).items() if k != "seed"}
                for settings in experiment.backbones.values()
            ),
            None,
        ),
        "backbones": _backbones(experiment, out),
        "arms": arms,
        "differences": [_differences(c) for c in compared],
    }


def _backbones(
    experiment: Experiment, out: str | os.PathLike[str]
) -> dict[str, list[dict[str, Any]]]:
    """Of the finished pretrainings, by norm and round: accuracy on CIFAR-10, collapsed filters."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for name, settings in experiment.backbones.items():
        path = backbone_folder(name, out) / "result.json"
        if path.exists():
            of_norm = found.setdefault(settings.norm if settings.norm_decay else NO_NORM_DECAY, {})
            of_norm[settings.seed] = json.loads(path.read_text())["rounds"]
    return {
        norm: [
            {
                "seeds": list(members),
                **{key: spread(row[key] for row in rows) for key in ("accuracy", "collapsed")},
            }
            for rows in zip(*members.values(), strict=True)
        ]
        for norm, members in found.items()
    }


def results_of(
    experiment: Experiment, out: str | os.PathLike[str], members: list[Outcome], number: int
) -> list[Path]:
    """The COCO result files of an arm after a round, a file a seed."""
    return [folder_of(experiment, run, out) / f"round_{number}.bbox.json" for run, _ in members]


def compare_round(
    experiment: Experiment,
    out: str | os.PathLike[str],
    arms: dict[str, list[Outcome]],
    number: int,
    resamples: int,
) -> Comparison:
    """All arms after a round, on the same resampled images, and the experiment's pairs.

    A pair is judged on the seeds that both arms have, run by run: those of a seed share their
    backbone, the weights of neck and head and the order of the images.
    """
    annotations = read_annotations(annotations_of(experiment, out))
    indices: dict[str, list[int]] = {}
    results: list[Results] = []
    for arm, of_arm in arms.items():
        files = results_of(experiment, out, of_arm, number)
        indices[arm] = list(range(len(results), len(results) + len(files)))
        results += [read_results(file, annotations) for file in files]
    measured = measure(annotations, results, resamples, threads=1)
    of_seed = {
        arm: {run.settings.seed: i for (run, _), i in zip(of_arm, indices[arm], strict=True)}
        for arm, of_arm in arms.items()
    }
    differences = []
    for pair in experiment.pairs:
        seeds = set.intersection(*(set(of_seed.get(arm, {})) for arm in pair))
        if seeds:
            both = {arm: [of_seed[arm][seed] for seed in sorted(seeds)] for arm in pair}
            paired = len(seeds) > 1  # one seed says nothing of seeds
            differences += compare(measured, both, [pair], CONFIDENCE, paired=paired).differences
    return replace(compare(measured, indices, [], CONFIDENCE), differences=differences)


def _interval(comparison: Comparison, arm: str) -> dict[str, float]:
    estimate = comparison.arms[arm]
    return {"low": float(estimate.low[0]), "high": float(estimate.high[0])}


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            "arm": d.arm,
            "baseline": d.baseline,
            "AP": float(d.value[0]),
            "low": float(d.low[0]),
            "high": float(d.high[0]),
            "verdict": d.verdict,
            "further_seeds": d.further_seeds,
            "reason": d.reason,
        }
        for d in comparison.differences
    ]


def measured_filters(summary: dict[str, Any]) -> list[str]:
    """Those of :data:`FILTERS` that a JSON has; what is stuck was not measured at first."""
    rows = [row for entry in summary["arms"].values() for row in entry["rounds"]]
    return [key for key in FILTERS if all(key in row for row in rows)]


# ---------------------------------------------------------------- Markdown


def _number(value: dict[str, Any], digits: int = 1) -> str:
    if not math.isfinite(value["mean"]):
        return "not finite"
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"


def _table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def markdown(summary: dict[str, Any]) -> str:
    """Tables of arms and of differences after each round, the settings, the command."""
    arms = summary["arms"]
    seeds = sorted({len(entry["seeds"]) for entry in arms.values()})
    lines = [
        f"# {summary['title']}",
        "",
        f"{summary['runs_finished']} of {summary['runs_planned']} runs finished, "
        f"{'/'.join(map(str, seeds))} seeds an arm. AP is in points; in brackets its "
        f"{100 * summary['confidence']:g}% interval, over test images and seeds. Filters: mean ± "
        "standard deviation over seeds.",
    ]
    rounds = len(next(iter(arms.values()))["rounds"])
    filters = measured_filters(summary)
    for i in range(rounds):
        lines += ["", f"## After round {i + 1}" if rounds > 1 else "## AP and filters", ""]
        rows = []
        for arm, entry in arms.items():
            row = entry["rounds"][i]
            ap = row["AP"]
            cells = [arm, f"{ap['mean']:.1f} [{ap['low']:.1f}, {ap['high']:.1f}]"]
            cells += [_number(row["AP50"]), _number(row["train_loss"], 3)]
            cells.append(_number(entry["start"]["collapsed"]))
            cells += [_number(row[key], DIGITS.get(key, 1)) for key in filters]
            rows.append(cells)
        heads = ["", "AP", "AP50", "training loss", "collapsed at the start (%)"]
        lines += _table([*heads, *(FILTERS[key] for key in filters)], rows)
        if summary["differences"][i]:
            lines += ["", "Differences in AP:", ""]
            lines += _table(
                ["", "against", "seeds", "difference", "verdict", ""],
                [
                    [
                        d["arm"],
                        d["baseline"],
                        str(len({*arms[d["arm"]]["seeds"]} & {*arms[d["baseline"]]["seeds"]})),
                        f"{d['AP']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]",
                        f"**{d['verdict']}**",
                        "" if d["further_seeds"] == 0 else d["reason"],
                    ]
                    for d in summary["differences"][i]
                ],
            )
    if summary["backbones"]:
        lines += ["", "## The backbones on CIFAR-10", ""]
        lines += _table(
            [
                "pretrained with",
                "round",
                "accuracy (%)",
                "minus BN's, by seed (95% interval, Student's t)",
                "collapsed filters (%)",
            ],
            _backbone_rows(summary["backbones"]),
        )
    first = next(iter(arms.values()))["settings"]
    differing = [k for k in first if any(e["settings"][k] != first[k] for e in arms.values())]
    lines += ["", "## Settings", ""]
    lines += _table(
        ["", *differing],
        ([arm, *(str(e["settings"][k]) for k in differing)] for arm, e in arms.items()),
    )
    lines += ["", "All: " + _listed(first, differing) + ".", ""]
    if summary["pretraining"]:
        lines += ["Pretraining: " + _listed(summary["pretraining"], []) + ".", ""]
    lines += [f"- {choice}" for choice in summary["choices"]]
    machine = summary["machine"]
    lines += [
        "",
        f"`{summary['command']}` on {machine['processor']} ({machine['cores']} cores, threads per "
        f"run: {'/'.join(map(str, machine['threads_of_a_run']))}, "
        f"{machine['seconds_of_a_run']:.0f} s a run), torch {'/'.join(machine['torch'])}; CRC-32 "
        f"of the data {summary['data_crc32']}.",
    ]
    return "\n".join(lines) + "\n"


def _backbone_rows(backbones: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    for norm, rows in backbones.items():
        for number, (row, of_bn) in enumerate(zip(rows, backbones["BN"], strict=True), 1):
            accuracy, bns = (by_seed(r["seeds"], r["accuracy"]) for r in (row, of_bn))
            more = "" if norm == "BN" else paired(accuracy, bns)
            yield [norm, str(number), _number(row["accuracy"]), more, _number(row["collapsed"])]


def _listed(settings: dict[str, Any], but: list[str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items() if k not in but)
