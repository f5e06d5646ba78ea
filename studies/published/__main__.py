"""Count the collapsed filters of published networks, and draw them by their optimizer.

    python -m studies.published --files FOLDER --results studies/published/results
    python -m studies.published --files FOLDER --fetch

Takes the checkpoints of checkpoints.json that lie in FOLDER; --fetch first downloads those that do
not, about 1 GB in all. A file of another checksum is refused, and nothing in a file is run. A row
whose file is not there stays empty and says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from psbn_mmdet.checkpoint import load, state_dict_of
from psbn_mmdet.collapse import THRESHOLD, measure
from psbn_mmdet.collapse.figures import FIGURE_STYLE
from psbn_mmdet.errors import PsbnError, errors_in_one_line
from studies.runs import write_json

LISTED = Path(__file__).parent / "checkpoints.json"
COLORS = {"SGD": "#1b9e77", "Adam": "#d95f02", "RMSprop": "#7570b3", "not stated": "#888888"}


def url_of(entry: dict[str, Any]) -> str:
    """Where a checkpoint is published: its ``url``, else a file of a GitHub repository."""
    if "url" in entry:
        return entry["url"]
    path = urllib.parse.quote(entry["path"])
    return f"https://raw.githubusercontent.com/{entry['repository']}/{entry['commit']}/{path}"


def fetch(entry: dict[str, Any], folder: Path) -> None:
    """Download a checkpoint that is not there; it is kept only with the checksum of the list.

    Raises:
        PsbnError: It cannot be had.
    """
    if (folder / entry["file"]).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    target = str(folder / entry["file"])
    try:
        torch.hub.download_url_to_file(url_of(entry), target, hash_prefix=entry["sha256"])
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise PsbnError(f"{url_of(entry)}: cannot be fetched ({error})") from error


def inspect(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An entry of the list with ``filters`` and ``collapsed``, None where the file is not there.

    Raises:
        PsbnError: The file is not the one of the list, or cannot be read.
    """
    path = folder / entry["file"]
    if not path.exists():
        return {**entry, "filters": None, "collapsed": None}
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if not found.startswith(entry["sha256"]):
        raise PsbnError(
            f"{path}: is not the file of the list (SHA-256 {found[:8]}..., there "
            f"{entry['sha256'][:8]}...); move it away, or fetch {url_of(entry)}"
        )
    totals = measure(state_dict_of(load(path), path)).totals
    counts = {"filters": int(totals["filters"]), "collapsed": int(totals["collapsed"])}
    return {**entry, "sha256": found, **counts}


def percent(row: dict[str, Any]) -> float:
    return 100 * row["collapsed"] / row["filters"]


def family(row: dict[str, Any]) -> str:
    """Name of the optimizer without its settings."""
    return (row["optimizer"] or "not stated").partition(",")[0]


def markdown(content: dict[str, Any]) -> str:
    """The table, most collapsed first, and what the networks of each optimizer have lost."""
    inspected = [row for row in content["checkpoints"] if row["filters"] is not None]
    absent = [row for row in content["checkpoints"] if row["filters"] is None]
    lines = [
        "# Collapsed filters of published networks",
        "",
        f"A filter is collapsed if |gamma| < {content['threshold']:g}. "
        f"{len(inspected)} of {len(content['checkpoints'])} checkpoints of the list were at hand.",
        "",
        "| network | activation | optimizer | decay of gamma | collapsed | of filters | file |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*sorted(inspected, key=percent, reverse=True), *absent]:
        counted = ["not inspected", "-"]
        if row["filters"] is not None:
            counted = [f"{row['collapsed']} ({percent(row):.1f}%)", f"{row['filters']:,}"]
        decay = "not stated" if row["weight_decay"] is None else f"{row['weight_decay']:g}"
        cells = [row["network"], row["activation"], row["optimizer"] or "not stated", decay]
        cells += [*counted, f"[{row['file']}]({url_of(row)}) ({row['licence']})"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| optimizer | networks | collapsed, median | least | most |",
        "|---|---|---|---|---|",
    ]
    for name in COLORS:
        shares = [percent(row) for row in inspected if family(row) == name]
        if shares:
            numbers = (statistics.median(shares), min(shares), max(shares))
            cells = [name, str(len(shares)), *(f"{number:.1f}%" for number in numbers)]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{content['command']}`"]) + "\n"


def draw(content: dict[str, Any], path: Path) -> None:
    """A bar for each checkpoint that was at hand."""
    rows = [row for row in content["checkpoints"] if row["filters"] is not None]
    rows.sort(key=percent)
    style: dict[Any, Any] = dict(FIGURE_STYLE)
    with mpl.rc_context(style):
        figure = Figure(figsize=(9, 0.9 + 0.38 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for name, color in COLORS.items():
            places = [i for i, row in enumerate(rows) if family(row) == name]
            if places:
                label = f"optimizer {name}" if name == "not stated" else name
                axes.barh(places, [percent(rows[i]) for i in places], color=color, label=label)
        for i, row in enumerate(rows):
            axes.text(percent(row) + 0.8, i, f"{percent(row):.1f}%", va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["network"] for row in rows])
        axes.set_xlim(0, max(map(percent, rows)) * 1.1)
        axes.set_xlabel(f"collapsed filters, |gamma| < {content['threshold']:g} (%)")
        axes.legend(loc="lower right")
        figure.suptitle("Collapsed filters of networks that others published")
        figure.savefig(path)


def run(args: argparse.Namespace) -> None:
    listed = json.loads(LISTED.read_text())
    if args.fetch:
        for entry in listed:
            fetch(entry, args.files)
    rows = [inspect(entry, args.files) for entry in listed]
    if all(row["filters"] is None for row in rows):
        raise PsbnError(f"{args.files}: holds no checkpoint of the list; --fetch downloads them")
    args.results.mkdir(parents=True, exist_ok=True)
    command = "python -m studies.published --files FOLDER"
    content = {"command": command, "threshold": THRESHOLD, "checkpoints": rows}
    write_json(args.results / "published.json", content)
    (args.results / "published.md").write_text(markdown(content))
    draw(content, args.results / "published.png")
    for end in ("json", "md", "png"):
        print(args.results / f"published.{end}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--files", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--fetch", action="store_true", help="download what is not there")
    parser.add_argument(
        "--results", type=Path, default=Path("work_dirs/published"), help="(default: %(default)s)"
    )
    with errors_in_one_line("studies.published"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
