"""Finished runs in numbers: mean and deviation over seeds, and a Markdown table of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from studies.runs import (
    RunError,
    by_arm,
    finished,
    interval,
    paired,
    processor,
    spread,
    with_interval,
    write_json,
)

from .experiments import Experiment, Run
from .figure_data import CHANCE, DETAILS
from .verdicts import at

METRICS = {
    "sparsity": "sparsity (% of FLOPs)",
    "collapsed": "collapsed filters (%)",
    "stuck": "stuck filters (%)",
    "idle": "idle filters (%)",
    "p_active": "mean P(active) over the filters (%)",
    "accuracy": "accuracy (%)",
    "pruned_accuracy": "accuracy without the collapsed filters (%)",
    "train_loss": "training loss, mean of the last epoch",
}
Outcome = tuple[Run, dict[str, Any]]


def summarise(
    experiment: Experiment, out: str | os.PathLike[str], command: str = ""
) -> dict[str, Any]:
    """All that a figure and a table show, ready for JSON.

    Raises:
        RunError: No run is finished, or one is of other settings.
    """
    outcomes = finished(experiment, out)
    if not outcomes:
        raise RunError(f"{Path(out, experiment.name)}: no run is finished, so nothing to draw")
    arms = {}
    for arm, members in by_arm(outcomes).items():
        rounds = []
        for rows in zip(*(result["rounds"] for _, result in members), strict=True):
            shown = [m for m in METRICS if m in rows[0]]
            rounds.append({m: spread(row[m] for row in rows) for m in shown})
            rounds[-1]["epoch_losses"] = np.mean([r["epoch_losses"] for r in rows], 0).tolist()
        settings = {k: v for k, v in asdict(members[0][0].settings).items() if k != "seed"}
        settings["parent"] = settings["parent"] and settings["parent"].partition("-seed")[0]
        entry: dict[str, Any] = {
            "line": members[0][0].line,
            "x": members[0][0].x,
            "seeds": [run.settings.seed for run, _ in members],
            "settings": settings,
            "rounds": rounds,
        }
        if settings["ensemble"]:
            entry["ensemble"] = spread(result["ensemble_accuracy"] for _, result in members)
        arms[arm] = entry
    first = outcomes[0][1]
    details: dict[str, Any] = {}
    if experiment.figure in DETAILS:
        runs = {arm: [run for run, _ in of] for arm, of in by_arm(outcomes).items()}
        details = DETAILS[experiment.figure](experiment, runs, Path(out))
    return {
        "experiment": experiment.name,
        "preset": experiment.preset,
        "title": experiment.title,
        "command": command,
        "machine": {
            "device": sorted({result["device"] for _, result in outcomes}),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads_of_a_run": sorted({result["threads"] for _, result in outcomes}),
            "torch": first["torch"],
        },
        "data_crc32": first["data_crc32"],
        "runs_finished": len(outcomes),
        "runs_planned": len(experiment.runs),
        "choices": list(experiment.choices),
        "arms": arms,
        "paper": experiment.paper,
        **details,
    }


def _cell(value: dict[str, Any]) -> str:
    digits = 3 if 0 < abs(value["mean"]) < 0.1 else 2
    if not math.isfinite(value["mean"]):
        return "not finite"
    text = f"{value['mean']:.{digits}f}"
    return text if value["std"] is None else f"{text} ± {value['std']:.{digits}f}"


def markdown(summary: dict[str, Any]) -> str:
    """Tables of arms by rounds, one for each measure, with what the paper prints."""
    arms, paper = summary["arms"], summary["paper"] or {}
    machine = summary["machine"]
    lines = [f"# {summary['title']}", ""]
    seeds = sorted({len(entry["seeds"]) for entry in arms.values()})
    over = f"Mean ± standard deviation over {'/'.join(map(str, seeds))} seeds"
    of = f"{summary['runs_finished']} of {summary['runs_planned']} runs finished"
    lines.append(f"{'One seed' if seeds == [1] else over}; {of}.")
    for metric, title in METRICS.items():
        rows = {a: e for a, e in arms.items() if any(metric in r for r in e["rounds"])}
        if not rows:
            continue
        count = max(len(e["rounds"]) for e in rows.values())
        heads = [f"round {i + 1}" for i in range(count)]
        ensemble = metric == "accuracy" and any("ensemble" in e for e in rows.values())
        heads += ["ensemble"] if ensemble else []
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        for arm, entry in rows.items():
            cells = [_cell(r[metric]) if metric in r else "-" for r in entry["rounds"]]
            cells += ["-"] * (count - len(cells))
            cells += [_cell(entry["ensemble"])] if ensemble else []
            lines.append(f"| {arm} | {' | '.join(cells)} |")
            printed = paper.get(arm)
            if isinstance(printed, dict) and metric in printed:
                cells = [f"{v:g}" for v in printed[metric][:count]]
                cells += ["-"] * (count - len(cells))
                cells += [f"{printed['ensemble']:g}"] if ensemble else []
                lines.append(f"| {arm}, the paper (ResNet-110) | {' | '.join(cells)} |")
    lines += _twins_tables(summary)
    for arm, printed in paper.items():
        if isinstance(printed, str):
            lines += ["", f"The paper on {arm}: {printed}."]
    if "near_zero_percent" in summary:
        lines += ["", f"## Filters of {summary['layer']} with an L1 norm near 0 (%)", ""]
        lines += ["| | |", "|---|---|"]
        near_zero = summary["near_zero_percent"].items()
        lines += [f"| {arm} | {_cell(spread(values))} |" for arm, values in near_zero]
    if "collapsed_in_round_2" in summary:
        counts = "/".join(map(str, summary["collapsed_in_round_2"]))
        lines += ["", f"Collapsed in round 2 in the layer that lost most, by seed: {counts}."]
    if "cuts" in summary:
        lines += ["", *_cuts_table(summary)]
    if "robustness" in summary:
        lines += ["", *_robustness_table(summary["robustness"])]
    if "recovery" in summary:
        lines += ["", *_recovery_table(summary["recovery"])]
    lines += ["", "## Settings"]
    if differing := _differing(arms):
        lines += ["", f"| | {' | '.join(differing)} |", f"|---|{'---|' * len(differing)}"]
        for arm, entry in arms.items():
            shown = " | ".join(str(entry["settings"][k]) for k in differing)
            lines.append(f"| {arm} | {shown} |")
    first = next(iter(arms.values()))["settings"]
    same = ", ".join(f"{k} {v}" for k, v in first.items() if k not in differing)
    lines += ["", f"All: {same}.", ""]
    lines += [f"- {choice}" for choice in summary["choices"]]
    lines += [
        "",
        f"`{summary['command']}` on {', '.join(machine['device'])} ({machine['processor']}, "
        f"{machine['cores']} cores, threads per run: "
        f"{'/'.join(map(str, machine['threads_of_a_run']))}), torch {machine['torch']}; "
        f"CRC-32 of the data {summary['data_crc32']}.",
    ]
    return "\n".join(lines) + "\n"


def _differing(arms: dict[str, Any]) -> list[str]:
    all_settings = [entry["settings"] for entry in arms.values()]
    return [k for k in all_settings[0] if any(s[k] != all_settings[0][k] for s in all_settings)]


def _twin(arm: str, arms: dict[str, Any], fields: tuple[str, ...], wanted: dict[str, Any]) -> str:
    """The arm with the ``wanted`` settings that differs in ``fields`` alone; '' if none."""

    def rest(entry: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in entry["settings"].items() if k not in fields}

    for name, entry in arms.items():
        settings = entry["settings"]
        if wanted == {k: settings[k] for k in wanted} and rest(entry) == rest(arms[arm]):
            return name
    return ""


def _twins_tables(summary: dict[str, Any]) -> list[str]:
    """Arms minus their twins after the last round, paired by seed.

    The twin of a post-shifted arm has the plain norm, that of one in bfloat16 has float32, that of
    one without norm decay has it, that of a revived one is not revived, that of one whose gamma was
    lifted has it as it was, and all else is alike.
    """
    arms = summary["arms"]
    plain, single, decayed, collapsed, low = [], [], [], [], []
    for arm, entry in arms.items():
        settings = entry["settings"]
        if settings["norm"].startswith("ps"):
            wanted = dict(norm=settings["norm"][2:])
            plain.append((arm, _twin(arm, arms, ("norm", "alpha", "load_bn"), wanted)))
        if settings.get("amp"):  # older results know no such setting
            single.append((arm, _twin(arm, arms, ("amp",), dict(amp=False))))
        if not settings.get("norm_decay", True):
            decayed.append((arm, _twin(arm, arms, ("norm_decay",), dict(norm_decay=True))))
        if settings.get("revive"):
            collapsed.append((arm, _twin(arm, arms, ("revive",), dict(revive=False))))
        if settings.get("lift"):
            low.append((arm, _twin(arm, arms, ("lift",), dict(lift=None))))
    return [
        *_differences(summary, "minus the plain norm", plain),
        *_differences(summary, "minus float32", single),
        *_differences(summary, "minus the same with decay of gamma and beta", decayed),
        *_differences(summary, "minus the same not revived", collapsed),
        *_differences(summary, "minus the same with gamma as it was", low),
    ]


def _differences(summary: dict[str, Any], title: str, pairs: list[tuple[str, str]]) -> list[str]:
    pairs = [(arm, twin) for arm, twin in pairs if twin]
    if not pairs:
        return []
    last = summary["arms"][pairs[0][0]]["rounds"][-1]
    shown = [metric for metric in ("collapsed", "accuracy", "train_loss") if metric in last]
    lines = ["", f"## After the last round, {title}", ""]
    lines += ["Mean (Student's 95% interval of it) of the seeds' differences.", ""]
    lines.append(f"| | minus | {' | '.join(METRICS[metric] for metric in shown)} |")
    lines.append("|---|---|" + "---|" * len(shown))
    for arm, twin in pairs:
        cells = [paired(at(summary, arm, metric), at(summary, twin, metric)) for metric in shown]
        lines.append(f"| {arm} | {twin} | {' | '.join(cells)} |")
    return lines


def _cuts_table(summary: dict[str, Any]) -> list[str]:
    lines = [
        "## The networks and what they cost",
        "",
        "| | FLOPs (%) | parameters (%) | time of a forward pass (%) | accuracy at once (%) "
        "| after training (%) |",
        "|---|---|---|---|---|---|",
    ]
    for arm, entry in summary["cuts"].items():
        time = "-"
        if entry["time_percent"]:
            time = "{1:.0f} ({0:.0f} to {2:.0f})".format(*entry["time_percent"])
        after = summary["arms"][arm]["rounds"][-1]["accuracy"]
        shown = (_cell(entry[key]) for key in ("flops_percent", "parameters_percent"))
        lines.append(
            f"| {arm} | {' | '.join(shown)} | {time} | {_cell(entry['accuracy'])} "
            f"| {_cell(after)} |"
        )
    return [*lines, "", summary["timed"]]


def _robustness_table(robustness: dict[str, Any]) -> list[str]:
    lines = [
        "## Accuracy against BN",
        "",
        "p: of all ways to flip the signs of the seeds' differences, the share whose mean is at "
        f"least as far from 0. At chance: below {CHANCE}% accuracy.",
        "",
        "| | seeds at chance | minus BN's (Student's 95% interval) | p |",
        "|---|---|---|---|",
    ]
    for arm, entry in robustness.items():
        cells = [arm, str(entry["at_chance"]), "", ""]
        if entry["differences"]:
            mean = statistics.fmean(entry["differences"])
            cells[2:] = [
                with_interval(mean, interval(entry["differences"])),
                f"{entry['p']:.3f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _recovery_table(recovery: dict[str, Any]) -> list[str]:
    lines = [
        "## Filters that had collapsed before",
        "",
        "| | there were | still collapsed at the end (%) | iterations until half were back |",
        "|---|---|---|---|",
    ]
    for arm, entry in recovery.items():
        half, still = entry["half_back"], entry["still_collapsed_percent"]
        shown = "/".join("-" if v is None else str(v) for v in half)
        lines.append(
            f"| {arm} | {'/'.join(map(str, entry['collapsed_before']))} "
            f"| {_cell(spread(still)) if still else '-'} | {shown} |"
        )
    return lines


def write_results(
    experiment: Experiment,
    out: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    command: str = "",
) -> list[Path]:
    """``NAME.json``, and from it ``NAME.md`` and ``NAME.png``, of the finished runs.

    ``NAME`` is the experiment's, with ``-PRESET`` behind it unless that is ``reduced``.

    Args:
        experiment: What was run.
        out: Where.
        folder: Where to write; by default the experiment's own under ``out``.
        command: That made them, for the record.

    Raises:
        RunError: No run is finished, or one is of other settings.
    """
    summary = summarise(experiment, out, command)
    folder = Path(folder) if folder else Path(out, experiment.name)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if experiment.preset == "reduced" else f"-{experiment.preset}"
    path = folder / f"{experiment.name}{suffix}.json"
    write_json(path, summary)
    return [path, *redraw(path)]


def redraw(path: str | os.PathLike[str]) -> list[Path]:
    """``NAME.md`` and ``NAME.png`` beside ``NAME.json``, from it alone.

    Raises:
        RunError: It is no such JSON, or it lacks what the figure shows.
    """
    from .figures import draw  # matplotlib, a second

    path = Path(path)
    try:
        summary = json.loads(path.read_text())
        table = markdown(summary)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path}: is no JSON of an experiment of this study") from None
    draw(summary, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(table)
    return [path.with_suffix(".md"), path.with_suffix(".png")]
