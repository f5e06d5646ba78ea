"""tools/compare_ap.py as a user calls it."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from psbn_mmdet.ap import coco_files, evaluate
from psbn_mmdet.errors import BAD_INPUT, FAILED
from tests.helpers.ap import change_json, dataset, work_dirs
from tests.helpers.paths import ROOT
from tests.helpers.tools import Main


@pytest.fixture
def tool(capsys):
    return Main("compare_ap", capsys)


def test_from_files_to_verdict_and_page(tmp_path):
    _, named = dataset(tmp_path, quality=(0.12, 0.03))
    done = subprocess.run(
        [
            sys.executable, ROOT / "tools/compare_ap.py", "--ann", "ann.json", *named, "--json",
            "out.json", "--html", "out.html", "--resamples", "200", "--sizes", "--expect",
            "psbn-bn>=2", "--expect-observed", "psbn-bn>=5",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## psbn against bn: better checkpoint, method not compared, +")
    assert "expected psbn-bn>=2: holds; the lower end of the 95% interval is +" in done.stderr
    assert "expected psbn-bn>=5: holds; the observed difference is +" in done.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["expected"] == {"--expect psbn-bn>=2": True, "--expect-observed psbn-bn>=5": True}
    (d,) = data["differences"]
    assert (d["arm"], d["baseline"], d["shown"], d["scope"]) == ("psbn", "bn", True, "checkpoints")
    assert d["seeds_in_interval"] is False
    assert 2 < d["AP"]["low"] < d["AP"]["value"] < d["AP"]["high"]
    assert d["AP"]["p_positive"] == 1.0
    assert set(d["classes"]) == {"class 1", "class 2", "class 3"}
    assert d["APs"]["value"] is None  # areas are 2000: there is no small object
    ann = coco_files.read_annotations(tmp_path / "ann.json")
    a, b = (
        evaluate.evaluate(ann, coco_files.read_results(n.partition("=")[2], ann))[0] for n in named
    )
    for key in ("AP", "AP50", "AP75", "APm"):
        assert d[key]["value"] == pytest.approx(100 * (b[key] - a[key]))
    runs = {r["arm"]: r["AP"] for r in data["runs"]}
    assert d["AP"]["value"] == pytest.approx(runs["psbn"] - runs["bn"])
    page = (tmp_path / "out.html").read_text()
    assert "better checkpoint, method not compared" in page
    assert "src=" not in page.split("<h1>")[1]  # nothing is fetched


def test_progress_bar_counts_the_resamples(tmp_path, tool, monkeypatch):
    _, named = dataset(tmp_path)
    seen = []

    def bar(items, desc, total, disable):
        items = list(items)
        seen.append((desc, total, len(items)))
        return items

    monkeypatch.setattr("tqdm.tqdm", bar)
    tool("--ann", tmp_path / "ann.json", *named, "--resamples", 120)
    assert seen == [("reading", 2, 2), ("resamples", 120, 120)]


def test_an_expectation_is_of_the_whole_interval(tmp_path, tool):
    """psbn is worse by a lot; the observed difference lies inside of its interval."""
    _, named = dataset(tmp_path)
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    done = tool(*args, "--expect", "psbn-bn>=0.3")
    assert done.returncode == FAILED and "psbn-bn>=0.3: DOES NOT HOLD" in done.stderr
    done = tool(
        *args, "--expect", "bn-psbn>=0.3", "--expect", "psbn-bn<0", "--json", tmp_path / "o"
    )
    assert done.returncode == 0
    d = json.loads((tmp_path / "o").read_text())["differences"][0]["AP"]
    between = f"psbn-bn<={(d['value'] + d['high']) / 2:.3f}"
    assert tool(*args, "--expect-observed", between).returncode == 0
    assert tool(*args, "--expect", between).returncode == FAILED


def test_work_dirs_of_several_seeds(tmp_path, tool):
    named = work_dirs(tmp_path, seeds=3)
    done = tool(*named, "--resamples", 200, "--json", tmp_path / "o.json")
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["settings"]["annotations"] == str(tmp_path / "ann.json")
    assert [r["seed"] for r in data["runs"]] == [0, 1, 2] * 2
    assert data["runs"][0]["checkpoint"] == str(tmp_path / "bn_s0/epoch_12.pth")
    mean = {a: np.mean([r["AP"] for r in data["runs"] if r["arm"] == a]) for a in ("bn", "psbn")}
    (d,) = data["differences"]
    assert d["AP"]["value"] == pytest.approx(mean["psbn"] - mean["bn"])
    assert (d["verdict"], d["scope"], d["further_seeds"]) == ("worse", "methods", 0)
    assert "and from the spread of the runs." in done.stdout


def test_warnings_come_with_the_verdict(tmp_path, tool):
    """Of the annotations, of a run that is empty: both on stdout, where the numbers are."""
    _, named = dataset(tmp_path)
    change_json(tmp_path / "ann.json", lambda d: d["annotations"][0].update(category_id=77))
    path = tmp_path / "psbn_0.bbox.json"
    path.write_text("[]")
    done = tool("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert "## psbn against bn: worse checkpoint, method not compared" in done.stdout
    assert "| psbn | 0.00 | 0.00 | 0.00 |" in done.stdout
    assert f"Warning: {path}: holds no box, so every AP is 0." in done.stdout
    assert "ann.json: 1 objects are of images or classes that the file does not" in done.stdout


def test_images_without_a_box_can_be_said_to_be_empty(tmp_path, tool):
    _, named = dataset(tmp_path)

    def drop(boxes):
        boxes[:] = [b for b in boxes if b["image_id"] not in (3, 17, 18, 19)]

    change_json(tmp_path / "psbn_0.bbox.json", drop)
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert "(image ids 3, 17, 18, 19)" in tool.refuses(*args)
    assert tool(*args, "--missing-is-empty").returncode == 0


def test_the_ap_that_mmdet_wrote_must_agree(tmp_path, tool):
    named = work_dirs(tmp_path, seeds=1)
    (tmp_path / "bn_s0/metrics.json").write_text('{"coco/bbox_mAP": 0.001}')
    assert "metrics.json says 0.001; were the two written by" in tool.refuses(*named)


def test_wrong_use_ends_in_one_line_and_overwrites_nothing(tmp_path, tool):
    _, named = dataset(tmp_path)
    ann = ("--ann", tmp_path / "ann.json")
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    nothing = tmp_path / "crowds.json"
    nothing.write_text((tmp_path / "ann.json").read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    for args, message in [
        ((*ann, named[0]), "only one arm, bn"),
        ((*ann, named[0], "psbn"), "wanted ARM=RUN"),
        ((*ann, named[0], f"psbn={tmp_path}/absent.json"), "absent.json: does not exist"),
        ((*ann, named[0], *named), "arm bn names"),
        ((named), "no config names its annotation file; pass --ann FILE"),
        ((*ann, *named, "--json", kept), "kept.json: exists already"),
        ((*ann, *named, "--html", tmp_path / "no/a.html"), "there is no folder"),
        ((*ann, *named, "--html", tmp_path / "a", "--json", tmp_path / "a"), "name two files"),
        ((*ann, *named, "--expect", "psbn>1"), "wanted ARM-BASELINE>=AP"),
        ((*ann, *named, "--resamples", "10"), "--resamples 10"),
        ((*ann, *named, "--max-dets", "0"), "--max-dets 0: wanted more than 0"),
        ((*ann, *named, "--plan-for", "-1"), "--plan-for -1.0: wanted more than 0"),
        ((*ann, *named, "--images", tmp_path), "add --html FILE"),
        ((*ann, *named, "--html", tmp_path / "a", "--images", tmp_path / "no"), "no such folder"),
        ((*ann, named[0], f"psbn={tmp_path}/./bn_0.bbox.json"), "in bn and in psbn; a run cannot"),
        ((*ann, *named, "--confidence", "95"), "wanted 0.5 to 1"),
        ((*ann, *named, "--threads", "0"), "--threads 0"),
        ((*ann, *named, "--seed", "-1"), "--seed -1"),
        ((*ann, *named, "--table2"), "arm 'bn'; name the arms bn_500"),
        (("--ann", nothing, *named), "nothing to measure: of 40 images and 3 classes it has no"),
    ]:
        assert message in tool.refuses(*args), message
    assert kept.read_text() == "mine"
    assert tool(*ann, *named, "--resamples", 100, "--json", kept, "--overwrite").returncode == 0
    assert json.loads(kept.read_text())["warnings"] == []


def test_missing_packages_are_named_with_what_brings_them(tmp_path, tool, monkeypatch):
    real = importlib.util.find_spec
    gone = {"msgspec", "jinja2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else real(n))
    said = tool.refuses("bn=a", "psbn=b")
    assert (
        said == "compare_ap.py: needs msgspec, not installed here; pip install 'psbn_mmdet[ap]'\n"
    )
    gone.remove("msgspec")
    assert "needs jinja2" in tool.refuses("bn=a", "psbn=b", "--html", tmp_path / "a.html")
    assert "a: does not exist" in tool.refuses("bn=a", "psbn=b")
    assert BAD_INPUT == 2
