"""tools/compare_ap.py as a user calls it."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from psbn_mmdet.ap import coco_files, evaluate
from psbn_mmdet.commands import compare_ap
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
    assert d["AP"]["p_positive"] == pytest.approx(1)
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

    def bar(items, what, total):
        items = list(items)
        seen.append((what, total, len(items)))
        return items

    monkeypatch.setattr(compare_ap, "progress", bar)
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


def test_seeds_are_paired_where_asked(tmp_path, tool):
    named = work_dirs(tmp_path, seeds=3)
    args = [*named[:3], *reversed(named[3:]), "--resamples", 200]
    done = tool(*args, "--paired", "--json", tmp_path / "o.json")
    assert "Runs are paired by their seeds, 0, 1, 2." in done.stdout
    data = json.loads((tmp_path / "o.json").read_text())
    ap = {a: [r["AP"] for r in data["runs"] if r["arm"] == a] for a in ("bn", "psbn")}
    assert [r["seed"] for r in data["runs"]] == [0, 1, 2, 2, 1, 0]
    gaps = np.subtract(ap["psbn"][::-1], ap["bn"])
    (d,) = data["differences"]
    assert d["AP"]["value"] == pytest.approx(gaps.mean())
    assert "and the paired seeds" in d["reason"]
    assert "--paired: psbn has the seeds 1, 2 and bn 0, 1, 2" in tool.refuses(*args[:5], "--paired")


def test_few_images_give_neither_interval_nor_gate(tmp_path, tool):
    """One image; what was called better by 20 points and more."""
    _, named = dataset(tmp_path, images=1, quality=(0.3, 0.0))
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    done = tool(*args, "--expect", "psbn-bn>=20", "--json", tmp_path / "o.json")
    assert done.returncode == FAILED
    assert "1 images with an object, too few for an interval, which takes 6" in done.stderr
    assert "no difference shown between these checkpoints" in done.stdout
    assert " (no interval) |" in done.stdout
    (d,) = json.loads((tmp_path / "o.json").read_text())["differences"]
    assert d["AP"]["value"] > 20 and d["AP"]["low"] is None and d["AP"]["images"] == 1
    assert "--plan: 1 images" in tool.refuses(*args, "--plan")


def test_more_resamples_where_an_end_is_near_what_is_asked(tmp_path, tool):
    _, named = dataset(tmp_path)
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100, "--json", tmp_path / "o")

    def drawn(*more):
        done = tool(*args, "--overwrite", *more)
        data = json.loads((tmp_path / "o").read_text())
        return data["settings"]["resamples"], data["differences"][0]["AP"], done

    resamples, d, _ = drawn()
    assert resamples == 100  # psbn is far behind
    most, d, done = drawn("--expect", f"psbn-bn>={d['low']:.4f}")
    assert 200 <= most <= 1600 and most % 100 == 0
    assert most == 1600 or "within its own error" not in done.stdout


def test_a_plan_says_what_it_would_take(tmp_path, tool):
    named = work_dirs(tmp_path, seeds=3, quality=(0.1, 0.1))
    done = tool(*named, "--resamples", 100, "--plan-for", "30", "--json", tmp_path / "o.json")
    assert "the probability of showing a true difference of 30.00 AP" in done.stdout
    assert "| further seeds per arm | these images | 2 times as many |" in done.stdout
    (plan,) = json.loads((tmp_path / "o.json").read_text())["plans"]
    assert np.shape(plan["power"]) == (7, 4) and (np.diff(plan["power"], axis=1) >= 0).all()


def test_names_may_hold_an_equals_sign(tmp_path, tool):
    _, named = dataset(tmp_path)
    ann = ("--ann", tmp_path / "ann.json", "--resamples", 100)
    arm = named[1].partition("=")[2]
    done = tool(*ann, named[0], f"lr=0.1={arm}", "--expect", "lr=0.1-bn<=0")
    assert done.returncode == 0 and done.stdout.startswith("## lr=0.1 against bn: worse")
    odd = tmp_path / "a=b.json"
    odd.write_bytes((tmp_path / "bn_0.bbox.json").read_bytes())
    assert "## psbn against bn" in tool(*ann, f"bn={odd}", named[1]).stdout
    assert "lr: " not in tool.refuses(*ann, named[0], "lr=0.1=absent.json")


def test_nothing_counts_where_all_areas_are_negative(tmp_path, tool):
    _, named = dataset(tmp_path)
    change_json(tmp_path / "ann.json", lambda d: [o.update(area=-1) for o in d["annotations"]])
    said = tool.refuses("--ann", tmp_path / "ann.json", *named)
    assert "nothing to measure: of 40 images and 3 classes it has no object that counts" in said


def test_the_same_boxes_in_both_arms_are_said(tmp_path, tool):
    _, named = dataset(tmp_path)
    (tmp_path / "psbn_0.bbox.json").write_bytes((tmp_path / "bn_0.bbox.json").read_bytes())
    done = tool("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert "+0.00 (+0.00 to +0.00)" in done.stdout and "hold the same boxes." in done.stdout


def test_masks_are_compared(tmp_path, tool):
    """Work dirs of a mask model: segm.json beside bbox.json, checked against segm_mAP."""
    from pycocotools import mask

    named = work_dirs(tmp_path, seeds=1)

    def masked(path):
        def change(data):
            for record in data["annotations"] if isinstance(data, dict) else data:
                x, y, w, h = record["bbox"]
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                one = mask.merge(mask.frPyObjects([corners], 300, 300))
                record["segmentation"] = {"size": [300, 300], "counts": one["counts"].decode()}

        change_json(path, change)

    change_json(
        tmp_path / "ann.json", lambda d: [i.update(width=300, height=300) for i in d["images"]]
    )
    masked(tmp_path / "ann.json")
    for arm in ("bn", "psbn"):
        found = tmp_path / f"{arm}_s0/results.bbox.json"
        masked(found)
        found.rename(found.with_name("results.segm.json"))
    args = (*named, "--type", "segm", "--resamples", 100)
    done = tool(*args, "--json", tmp_path / "o.json")
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["settings"]["type"] == "segm" and "worse checkpoint" in done.stdout
    metrics = tmp_path / "bn_s0/metrics.json"
    metrics.write_text(json.dumps({"coco/segm_mAP": round(data["runs"][0]["AP"] / 100, 3)}))
    assert tool(*args).returncode == 0
    metrics.write_text('{"coco/segm_mAP": 0.001}')
    assert "metrics.json says 0.001" in tool.refuses(*args)
    files = (
        "--ann", tmp_path / "ann.json", f"a={tmp_path}/bn_s0/results.segm.json",
        f"b={tmp_path}/psbn_s0/results.segm.json", "--resamples", 100,
    )  # fmt: skip
    assert "pass --type segm" in tool.refuses(*files)
    assert tool(*files, "--type", "bbox").returncode == 0  # detectron2's files hold both


def test_it_runs_without_torch_and_mmengine(tmp_path):
    """Files alone need neither; and nothing is imported twice over for --help."""
    _, named = dataset(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mmengine'] = None\n"
        "from psbn_mmdet.commands.compare_ap import main\n"
        "assert 'numba' not in sys.modules and 'numpy' not in sys.modules\n"
        f"sys.argv = {['compare-ap', '--ann', 'ann.json', *named, '--resamples', '100']}\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## psbn against bn: worse checkpoint")


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
