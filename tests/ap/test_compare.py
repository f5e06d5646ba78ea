"""The verdict against counted and simulated truths, the command line, and the way to it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from psbn_mmdet.ap import coco_files, compare, evaluate, page, tables
from psbn_mmdet.ap.compare import BETTER, NOT_SHOWN, WORSE, Measured
from tests.helpers.paths import ROOT


def measured(observed, resampled):
    """Made-up runs: AP alone, no class; observed (M,), resampled (B, M)."""
    observed, resampled = np.array(observed, float), np.array(resampled, float)
    b, m = resampled.shape
    return Measured(
        names=["AP"],
        overall=1,
        observed=observed[:, None],
        resampled=resampled[..., None],
        curve=np.zeros((m, 3, 101)),
        curve_resampled=np.zeros((b, m, 3, 101)),
    )


def crossed(rng, mean, seed_sd, own_sd, shared_sd, runs, resamples=2000):
    """Runs of an arm as the model behind ``compare`` has them.

    Of a resample, a run's deviation is one part shared by the runs of its arm and one of its own;
    the run on the observed images deviates by one draw of each, and by its seed.
    """
    own = rng.normal(0, own_sd, runs)
    observed = mean + rng.normal(0, shared_sd) + own + rng.normal(0, seed_sd, runs)
    noise = rng.normal(0, shared_sd, (resamples, 1)) + rng.normal(0, own_sd, (resamples, runs))
    return observed, observed + noise


def two_arms(rng, runs, difference, seed_sd, own_sd, shared_sd, resamples=2000):
    a = crossed(rng, 36.0, seed_sd, own_sd, shared_sd, runs, resamples)
    b = crossed(rng, 36.0 + difference, seed_sd, own_sd, shared_sd, runs, resamples)
    m = measured(np.append(a[0], b[0]), np.hstack([a[1], b[1]]))
    arms = {"bn": list(range(runs)), "psbn": list(range(runs, 2 * runs))}
    return compare.compare(m, arms).differences[0]


def test_one_run_per_arm_is_the_paired_percentile_interval():
    draws = np.random.default_rng(0).normal(0, 1, (4000, 2))
    draws -= draws.mean(0)
    m = measured([36.0, 36.5], np.add([36.0, 36.5], draws))
    d = compare.compare(m, {"bn": [0], "psbn": [1]}).differences[0]
    low, high = np.quantile(draws[:, 1] - draws[:, 0], [0.025, 0.975])
    assert d.value[0] == pytest.approx(0.5)
    assert d.low[0] == pytest.approx(0.5 + low, abs=1e-4)
    assert d.high[0] == pytest.approx(0.5 + high, abs=1e-4)
    # P(difference > 0) of a normal of sd sqrt(2) about 0.5 is Phi(0.354) = 0.638
    assert d.positive[0] == pytest.approx(0.638, abs=0.02)
    assert d.further_seeds is None
    assert "not the seeds" in d.reason


def test_pairing_takes_the_common_part_out():
    shift = np.random.default_rng(0).normal(0, 3, (500, 1))
    m = measured([36.0, 36.5], np.add([36.0, 36.5], shift))
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    assert c.arms["bn"].high[0] - c.arms["bn"].low[0] > 10
    assert c.differences[0].low[0] == pytest.approx(0.5)
    assert c.differences[0].verdict == BETTER


@pytest.mark.parametrize(
    ("difference", "verdict"), [(3.0, BETTER), (-3.0, WORSE), (0.05, NOT_SHOWN)]
)
def test_verdict(difference, verdict):
    d = two_arms(np.random.default_rng(1), 3, difference, 0.2, 0.1, 0.1)
    assert d.verdict == verdict
    assert (d.low[0] > 0) == (verdict == BETTER) and (d.high[0] < 0) == (verdict == WORSE)


def test_same_results_in_both_arms_show_no_difference():
    draws = np.random.default_rng(0).normal(36, 1, (200, 1))
    m = measured([36.0, 36.0], np.hstack([draws, draws]))
    d = compare.compare(m, {"bn": [0], "psbn": [1]}).differences[0]
    assert (d.value[0], d.low[0], d.high[0], d.positive[0]) == (0, 0, 0, 0.5)
    assert d.verdict == NOT_SHOWN


def test_seeds_alone_give_welchs_interval():
    """With no image noise at all, three runs each: Welch's t interval, which scipy knows."""
    from scipy.stats import ttest_ind

    a, b = np.array([36.0, 36.4, 35.7]), np.array([36.9, 36.5, 37.0])
    m = measured(np.append(a, b), np.tile(np.append(a, b), (20000, 1)))
    d = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3, 4, 5]}).differences[0]
    low, high = ttest_ind(b, a, equal_var=False).confidence_interval()
    assert d.value[0] == pytest.approx(b.mean() - a.mean())
    assert d.low[0] == pytest.approx(low, abs=0.02 * (high - low))
    assert d.high[0] == pytest.approx(high, abs=0.02 * (high - low))


@pytest.mark.parametrize(
    ("runs", "seed_sd", "own_sd", "shared_sd"),
    [(3, 0.3, 0.05, 0.05), (3, 0.05, 0.15, 0.1), (5, 0.2, 0.1, 0.15), (2, 0.2, 0.1, 0.1)],
)
def test_interval_covers_the_true_difference_of_seeds_and_images(runs, seed_sd, own_sd, shared_sd):
    """Nominal 95%. Binomial sd of 400 draws is 1.1%; estimated variances err to the wide side."""
    rng = np.random.default_rng(0)
    draws = [two_arms(rng, runs, 0.5, seed_sd, own_sd, shared_sd, 300) for _ in range(400)]
    assert np.mean([d.low[0] <= 0.5 <= d.high[0] for d in draws]) >= 0.93
    # and the width is no excuse: at most what t with 2 (runs - 1) degrees of freedom asks for
    from scipy.stats import t

    sd = np.sqrt(2 * (shared_sd**2 + (seed_sd**2 + own_sd**2) / runs))
    assert np.mean([d.high[0] - d.low[0] for d in draws]) < 2 * sd * t.ppf(0.975, runs - 1) * 1.15


def test_image_noise_of_single_runs_is_not_counted_twice():
    """Eight runs per arm that differ by nothing but the images: the images' interval, no more."""
    rng = np.random.default_rng(0)
    draws = [two_arms(rng, 8, 0.5, 0.0, 0.3, 0.0, 300) for _ in range(200)]
    ideal = 2 * 1.96 * np.sqrt(2 * 0.3**2 / 8)
    # counted twice it would be sqrt(2) times as wide
    assert 0.95 < np.mean([d.high[0] - d.low[0] for d in draws]) / ideal < 1.25
    assert np.mean([d.low[0] <= 0.5 <= d.high[0] for d in draws]) >= 0.93


def test_further_seeds_are_as_many_as_a_t_test_needs():
    """No image noise, runs with a spread of 1 in both arms, difference d: a two-sample t-test.

    For d = 1 sd the textbook's answer at 80% power is 17 per arm, so 14 beyond 3.
    """
    spread = np.array([-1.0, 0, 1])  # variance 1
    observed = np.append(36 + spread, 37 + spread)
    m = measured(observed, np.tile(observed, (200, 1)))
    d = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3, 4, 5]}).differences[0]
    assert d.verdict == NOT_SHOWN
    assert d.further_seeds == 14
    assert "14 further seeds per arm" in d.reason


def test_image_noise_of_single_runs_is_averaged_out_by_seeds():
    """Standardised difference 0.5 / sqrt(0.32) = 0.88: the t-test needs 21 or 22 per arm."""
    observed = np.array([36.0, 36.8, 36.5, 37.3])  # variance 0.32 in both arms
    noise = np.random.default_rng(0).normal(0, 0.3, (4000, 4))
    d = compare.compare(
        measured(observed, observed + noise), {"bn": [0, 1], "psbn": [2, 3]}
    ).differences[0]
    # taken for what all runs of an arm share, this noise alone would rule the difference out
    assert 18 <= d.further_seeds <= 22


def test_no_number_of_seeds_helps_where_the_images_are_the_limit():
    rng = np.random.default_rng(0)
    observed = np.array([36.0, 36.01, 36.1, 36.11])
    shared = rng.normal(0, 1, (1000, 2))[:, [0, 0, 1, 1]]
    d = compare.compare(
        measured(observed, observed + shared), {"bn": [0, 1], "psbn": [2, 3]}
    ).differences[0]
    assert d.further_seeds is None
    assert "more images" in d.reason


def test_an_arm_with_one_run_takes_the_spread_of_the_other():
    observed = np.array([36.0, 36.6, 36.3, 36.3])
    m = measured(observed, np.tile(observed, (20000, 1)))
    c = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3]})
    one, three = (c.arms[a].high[0] - c.arms[a].low[0] for a in ("psbn", "bn"))
    assert one == pytest.approx(3**0.5 * three, rel=0.03)  # s against s / sqrt(3)


# ---- files


def dataset(folder, images=40, seed=0, quality=(0.03, 0.12), seeds=1):
    """An annotation file and, per arm and seed, a result file; less noise is a better arm."""
    rng = np.random.default_rng(seed)
    objects = [
        dict(
            id=n + 1,
            image_id=n // 3 + 1,
            category_id=int(rng.integers(1, 4)),
            bbox=[*rng.uniform(0, 100, 2).round(1).tolist(), *rng.uniform(20, 90, 2).tolist()],
            area=2000.0,
            iscrowd=0,
        )
        for n in range(3 * images)
    ]
    annotations = dict(
        images=[dict(id=i + 1, file_name=f"{i + 1:012d}.jpg") for i in range(images)],
        categories=[dict(id=c, name=f"class {c}") for c in (1, 2, 3)],
        annotations=objects,
    )
    (folder / "ann.json").write_text(json.dumps(annotations))
    files = []
    for arm, noise in zip(("bn", "psbn"), quality, strict=True):
        for s in range(seeds):
            found = [
                dict(
                    image_id=o["image_id"],
                    category_id=o["category_id"],
                    bbox=(np.array(o["bbox"]) + rng.normal(0, noise, 4) * 50).clip(0).tolist(),
                    score=float(rng.random()),
                )
                for o in objects
            ]
            files.append((arm, folder / f"{arm}_{s}.bbox.json"))
            files[-1][1].write_text(json.dumps(found))
    return annotations, [f"{arm}={path}" for arm, path in files]


def run(folder, *arguments, expect=0):
    """tools/compare_ap.py as a user calls it."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/compare_ap.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == expect, done.stderr
    return done


def main(*arguments):
    """The same in this process, where a test needs many."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import compare_ap
    finally:
        sys.path.pop(0)
    return compare_ap.main([str(a) for a in arguments])


def test_command_line_from_files_to_verdict(tmp_path):
    _, named = dataset(tmp_path, quality=(0.12, 0.03))
    done = run(
        tmp_path, "--ann", "ann.json", *named, "--json", "out.json", "--html", "out.html",
        "--resamples", 200, "--sizes", "--expect", "psbn-bn>=5",
    )  # fmt: skip
    assert done.stdout.startswith("## psbn against bn: better, +")
    assert "expected psbn-bn>=5: holds" in done.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    (d,) = data["differences"]
    assert (d["arm"], d["baseline"], d["verdict"], d["shown"]) == ("psbn", "bn", "better", True)
    assert 5 < d["AP"]["low"] < d["AP"]["value"] < d["AP"]["high"]
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
    assert '<span class="gain">better</span>' in page
    assert "src=" not in page.split("<h1>")[1]  # nothing is fetched
    assert "Plotly.newPlot" in page


def test_progress_bar_counts_the_resamples(tmp_path, monkeypatch):
    _, named = dataset(tmp_path)
    seen = []

    def bar(items, desc, total, disable):
        seen.append((desc, total, len(list(items := list(items)))))
        return items

    sys.path.insert(0, str(ROOT / "tools"))
    monkeypatch.setattr("tqdm.tqdm", bar)
    sys.modules.pop("compare_ap", None)
    assert main("--ann", tmp_path / "ann.json", *named, "--resamples", 120) == 0
    sys.modules.pop("compare_ap", None)
    assert ("resamples", 120, 120) in seen


def test_unmet_expectation_ends_with_status_1(tmp_path, capsys):
    _, named = dataset(tmp_path)
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert main(*args, "--expect", "psbn-bn>=0.3") == 1
    assert "expected psbn-bn>=0.3: DOES NOT HOLD" in capsys.readouterr().err
    assert main(*args, "--expect", "bn-psbn>=0.3", "--expect", "psbn-bn<0") == 0


def bad_nan(folder, records):
    records[7]["bbox"][2] = float("nan")
    return "psbn_0.bbox.json: record 7: bbox is ["


def bad_size(folder, records):
    records[7]["bbox"][2] = -3.0
    return "psbn_0.bbox.json: record 7: bbox ["


def bad_image(folder, records):
    records[7]["image_id"] = 999
    return "psbn_0.bbox.json: record 7: image 999 is not in"


def bad_class(folder, records):
    records[7]["category_id"] = 99
    return "psbn_0.bbox.json: record 7: class 99 is not in"


def bad_score(folder, records):
    records[7]["score"] = float("inf")
    return "psbn_0.bbox.json: record 7: score is inf"


def other_images(folder, records):
    records[:] = [r for r in records if r["image_id"] not in (3, 17, 18, 19)]
    return "(image ids 3, 17, 18, 19)"


@pytest.mark.parametrize(
    "change", [bad_nan, bad_size, bad_image, bad_class, bad_score, other_images]
)
def test_bad_results_end_in_one_line(tmp_path, capsys, change):
    _, named = dataset(tmp_path)
    path = tmp_path / "psbn_0.bbox.json"
    records = json.loads(path.read_text())
    message = change(tmp_path, records)
    path.write_text(json.dumps(records))
    assert main("--ann", tmp_path / "ann.json", *named) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and message in err and err.startswith("compare_ap.py: ")


def test_class_without_objects_is_left_out_without_a_word(tmp_path, capsys, recwarn):
    annotations, named = dataset(tmp_path, images=20)
    annotations["categories"].append(dict(id=9, name="unicorn"))
    (tmp_path / "ann.json").write_text(json.dumps(annotations))
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert main(*args, "--json", tmp_path / "o.json") == 0
    assert "unicorn" not in capsys.readouterr().out
    assert [w for w in recwarn if issubclass(w.category, RuntimeWarning)] == []
    (d,) = json.loads((tmp_path / "o.json").read_text())["differences"]
    assert set(d["classes"]["unicorn"].values()) == {None}
    assert d["AP"]["value"] == pytest.approx(
        np.mean([v["value"] for k, v in d["classes"].items() if k != "unicorn"])
    )


def test_images_without_a_box_can_be_said_to_be_empty(tmp_path, capsys):
    _, named = dataset(tmp_path)
    path = tmp_path / "psbn_0.bbox.json"
    records = json.loads(path.read_text())
    other_images(tmp_path, records)
    path.write_text(json.dumps(records))
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    assert main(*args) == 2
    assert main(*args, "--missing-is-empty") == 0


def test_json_cut_off_and_empty_results(tmp_path, capsys):
    _, named = dataset(tmp_path)
    path = tmp_path / "psbn_0.bbox.json"
    args = ("--ann", tmp_path / "ann.json", *named, "--resamples", 100)
    path.write_text(path.read_text()[:-100])
    assert main(*args) == 2
    assert "cut off" in capsys.readouterr().err
    path.write_text("[]")
    assert main(*args) == 0
    out = capsys.readouterr().out
    assert "## psbn against bn: worse" in out
    assert "| psbn | 0.00 | 0.00 | 0.00 |" in out
    assert f"Warning: {path}: holds no box, so every AP is 0." in out


def test_wrong_use_ends_in_one_line_and_overwrites_nothing(tmp_path, capsys):
    _, named = dataset(tmp_path)
    ann = ("--ann", tmp_path / "ann.json")
    (tmp_path / "kept.json").write_text("mine")
    for args, message in [
        ((*ann, named[0]), "only one arm, bn"),
        ((*ann, named[0], "psbn"), "wanted ARM=RUN"),
        ((*ann, named[0], f"psbn={tmp_path}/absent.json"), "absent.json: does not exist"),
        ((*ann, named[0], *named), "arm bn names"),
        (named, "no config tells its annotation file; pass --ann FILE"),
        ((*ann, *named, "--json", tmp_path / "kept.json"), "kept.json: exists"),
        ((*ann, *named, "--html", tmp_path / "no/a.html"), "its folder does not exist"),
        ((*ann, *named, "--expect", "psbn>1"), "wanted ARM-BASELINE>=AP"),
        ((*ann, *named, "--resamples", "10"), "--resamples 10"),
        ((*ann, *named, "--table2"), "arm 'bn'; name the arms bn_500"),
    ]:
        assert main(*args) == 2, message
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert (tmp_path / "kept.json").read_text() == "mine"


def work_dirs(folder, seeds=2, **kwargs):
    """Work dirs as tools/train.py and tools/test.py leave them."""
    _, named = dataset(folder, seeds=seeds, **kwargs)
    made = []
    for n, (arm, _, path) in enumerate(name.partition("=") for name in named):
        d = folder / f"{arm}_s{n % seeds}"
        d.mkdir()
        (d / "retinanet.py").write_text(
            f"test_evaluator = dict(type='CocoMetric', ann_file={str(folder / 'ann.json')!r})\n"
            f"randomness = dict(seed={n % seeds})\n"
        )
        (d / "epoch_12.pth").write_bytes(b"")
        (d / "last_checkpoint").write_text(str(d / "epoch_12.pth"))
        shutil.move(path, d / "results.bbox.json")
        os.utime(d / "results.bbox.json")
        made.append(f"{arm}={d}")
    return made


def test_work_dirs_of_several_seeds(tmp_path, capsys):
    named = work_dirs(tmp_path, seeds=3)
    assert main(*named, "--resamples", 200, "--json", tmp_path / "o.json") == 0
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["settings"]["annotations"] == str(tmp_path / "ann.json")
    assert [r["seed"] for r in data["runs"]] == [0, 1, 2] * 2
    assert data["runs"][0]["checkpoint"] == str(tmp_path / "bn_s0/epoch_12.pth")
    mean = {a: np.mean([r["AP"] for r in data["runs"] if r["arm"] == a]) for a in ("bn", "psbn")}
    (d,) = data["differences"]
    assert d["AP"]["value"] == pytest.approx(mean["psbn"] - mean["bn"])
    assert d["verdict"] == "worse" and d["further_seeds"] == 0
    assert "and of the runs." in capsys.readouterr().out


def test_bad_work_dirs_end_in_one_line(tmp_path, capsys):
    named = work_dirs(tmp_path)
    (tmp_path / "psbn_s1/results.bbox.json").unlink()
    assert main(*named) == 2
    d = tmp_path / "psbn_s1"
    wanted = f"tools/test.py {d}/retinanet.py {d}/epoch_12.pth --work-dir {d}"
    assert wanted in capsys.readouterr().err
    named.pop()

    other = json.loads((tmp_path / "ann.json").read_text())
    other["images"].append(dict(id=777))
    (tmp_path / "other.json").write_text(json.dumps(other))
    config = tmp_path / "psbn_s0/retinanet.py"
    config.write_text(config.read_text().replace("ann.json", "other.json"))
    assert main(*named) == 2
    err = capsys.readouterr().err
    assert "evaluated on different images" in err and "only there: 777" in err
    assert err.count("\n") == 1
    config.write_text(config.read_text().replace("other.json", "absent.json"))
    assert main(*named) == 2
    assert "absent.json: the annotation file named by" in capsys.readouterr().err


def test_results_older_than_the_checkpoint_are_told(tmp_path, capsys):
    named = work_dirs(tmp_path, seeds=1)
    later = time.time() + 60
    os.utime(tmp_path / "bn_s0/epoch_12.pth", (later, later))
    assert main(*named, "--resamples", 100) == 0
    assert "Warning: " in (out := capsys.readouterr().out) and "is older than" in out


def test_table2_lays_the_paper_beside_ours(tmp_path, capsys):
    _, named = dataset(tmp_path, seeds=2)
    named = [name.replace("bn=", "bn_800=") for name in named]
    assert main("--ann", tmp_path / "ann.json", *named, "--table2", "--resamples", 100) == 0
    out = capsys.readouterr().out.split("\n")
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in out if line[:4] in ("| 50", "| 80")
    ]
    assert rows[0] == ["500", "not run", "32.7", "not run", "33.4", "not run", "+0.7", "not run"]
    assert [rows[1][i] for i in (0, 2, 4, 6, 7)] == ["800", "35.8", "36.4", "+0.6", "worse"]


def test_page_names_the_image_that_weighs_most(tmp_path):
    """One image in which only one arm finds anything, the rest equal in both arms."""
    _, named = dataset(tmp_path, quality=(0, 0))
    a, b = (name.partition("=")[2] for name in named)
    found = json.loads(Path(a).read_text())
    Path(b).write_text(json.dumps([r for r in found if r["image_id"] != 11]))
    ann = coco_files.read_annotations(tmp_path / "ann.json")
    results = [coco_files.read_results(p, ann) for p in (a, b)]
    m = compare.measure(ann, results, 100)
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    runs = [coco_files.RunFiles("bn", a), coco_files.RunFiles("psbn", b)]
    html = page.page(c, runs, ann, results)
    data = json.loads(html.split("showImages(0, ")[1].split(");</script>")[0])
    assert data["id"][0] == 11 and data["file"][0] == "000000000011.jpg"
    assert data["objects"][0] == 3 and [f[0] for f in data["found"]] == [3, 0]
    # without that image both arms are perfect, so it carries the whole difference
    assert data["weight"][0] == pytest.approx(c.differences[0].value[0], abs=1e-5)
    assert set(data["weight"][1:]) != {data["weight"][0]}


def test_expectations_know_arms_with_a_dash():
    assert tables.parse_expectation("ps-bn-bn >= 0.3", ["bn", "ps-bn"]) == (
        "ps-bn", "bn", ">=", 0.3,
    )  # fmt: skip
    with pytest.raises(coco_files.InputError, match="wanted ARM-BASELINE"):
        tables.parse_expectation("ps-bn>=0.3", ["bn", "ps-bn"])
