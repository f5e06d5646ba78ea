"""Work dirs and result files that belong together, and those that do not."""

import json
import os
import time

import numpy as np
import pytest

from psbn_mmdet.ap import runs
from psbn_mmdet.ap.coco_files import InputError, read_annotations, read_results
from psbn_mmdet.ap.evaluate import evaluate
from tests.helpers.ap import change_json, dataset, work_dirs


def split(named):
    return [name.split("=", 1) for name in named]


def read(folder, named):
    annotations = read_annotations(folder / "ann.json")
    return annotations, [read_results(path, annotations) for _, path in split(named)]


def test_a_work_dir_says_what_was_run(tmp_path):
    named = work_dirs(tmp_path)
    change_json(tmp_path / "ann.json", lambda d: None)
    (tmp_path / "bn_s1/metrics.json").write_text('{"coco/bbox_mAP": 0.251}')
    run = runs.find_run(*split(named)[1])
    d = tmp_path / "bn_s1"
    assert run == runs.RunFiles(
        arm="bn",
        results=str(d / "results.bbox.json"),
        annotations=str(tmp_path / "ann.json"),
        config=str(d / "retinanet.py"),
        checkpoint=str(d / "epoch_12.pth"),
        seed=1,
        reported={"AP": 0.251},
    )


def test_a_work_dir_without_results_names_the_command(tmp_path):
    work_dirs(tmp_path)
    d = tmp_path / "psbn_s1"
    (d / "results.bbox.json").unlink()
    wanted = f"tools/test.py {d}/retinanet.py {d}/epoch_12.pth --work-dir {d}"
    with pytest.raises(InputError, match=wanted):
        runs.find_run("psbn", d)
    with pytest.raises(InputError, match="absent: does not exist"):
        runs.find_run("psbn", tmp_path / "absent")


def test_results_older_than_the_checkpoint_are_said(tmp_path):
    work_dirs(tmp_path, seeds=1)
    later = time.time() + 60
    os.utime(tmp_path / "bn_s0/epoch_12.pth", (later, later))
    (said,) = runs.find_run("bn", tmp_path / "bn_s0").warnings
    assert "is older than" in said


def test_configs_that_name_two_annotation_files_are_refused(tmp_path):
    work_dirs(tmp_path, seeds=1)
    config = tmp_path / "bn_s0/retinanet.py"
    (tmp_path / "bn_s0/other.py").write_text(config.read_text().replace("ann.json", "b.json"))
    with pytest.raises(InputError, match="its configs name different annotation files"):
        runs.find_run("bn", tmp_path / "bn_s0")
    config.write_text("this is no config")
    with pytest.raises(InputError, match=r"retinanet.py: cannot be read as a config"):
        runs.find_run("bn", tmp_path / "bn_s0")


def changed_config(folder, old, new):
    """The runs of two work dirs, of which the second has another config."""
    named = work_dirs(folder, seeds=1)
    config = folder / "psbn_s0/retinanet.py"
    config.write_text(config.read_text().replace(old, new))
    return [runs.find_run(*pair) for pair in split(named)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"].append(dict(id=777)), "different images.*only there: 777"),
        (lambda d: d["annotations"][3].update(bbox=[1, 1, 2, 2]), "with other objects or classes"),
        (lambda d: d["annotations"][3].update(iscrowd=1), "with other objects or classes"),
        (lambda d: d["annotations"][3].update(area=1), "with other objects or classes"),
        (lambda d: d["categories"][0].update(name="cat"), "with other objects or classes"),
    ],
)
def test_work_dirs_with_other_annotations_are_refused(tmp_path, change, message):
    files = changed_config(tmp_path, "ann.json", "other.json")
    other = tmp_path / "other.json"
    other.write_bytes((tmp_path / "ann.json").read_bytes())
    runs.read_shared_annotations(files, None)  # equal files of two names are one
    change_json(other, change)
    with pytest.raises(InputError, match=message):
        runs.read_shared_annotations(files, None)
    runs.read_shared_annotations(files, str(tmp_path / "ann.json"))


def test_annotation_file_that_is_not_there_or_not_known(tmp_path):
    files = changed_config(tmp_path, "ann.json", "absent.json")
    with pytest.raises(InputError, match=r"absent.json: the annotation file named by .*--ann"):
        runs.read_shared_annotations(files, None)
    files = [runs.RunFiles("bn", "a.json"), runs.RunFiles("psbn", "b.json")]
    with pytest.raises(InputError, match=r"a.json: no config names its annotation file; pass"):
        runs.read_shared_annotations(files, None)


def test_configs_that_choose_other_parts_of_the_test_set_are_refused(tmp_path):
    more = "test_dataloader = dict(dataset=dict(indices=20))\nrandomness"
    files = changed_config(tmp_path, "randomness", more)
    bare = runs.RunFiles("other", "a.json")  # of which nothing is known
    for annotations in (None, str(tmp_path / "ann.json")):
        for between in ([], [bare]):
            with pytest.raises(InputError, match=r"takes indices=None of the test set, .* 20"):
                runs.read_shared_annotations([files[0], *between, files[1]], annotations)


def test_results_on_fewer_images_are_refused(tmp_path):
    """40 images: without boxes on 2 of them a model may be, on 3 it was not run."""
    _, named = dataset(tmp_path)
    path = tmp_path / "psbn_0.bbox.json"

    def drop(*images):
        def change(boxes):
            boxes[:] = [b for b in boxes if b["image_id"] not in images]

        change_json(path, change)
        return read(tmp_path, named)

    assert runs.check_same_images(*drop(3, 17)) == []
    late = drop(18)
    with pytest.raises(InputError, match=r"no box on 3 of the 40 .*\(image ids 3, 17, 18\)"):
        runs.check_same_images(*late)
    assert runs.check_same_images(*late, missing_is_empty=True) == []


def test_results_without_any_box(tmp_path):
    _, named = dataset(tmp_path)
    paths = [tmp_path / "bn_0.bbox.json", tmp_path / "psbn_0.bbox.json"]
    paths[1].write_text("[]")
    (said,) = runs.check_same_images(*read(tmp_path, named))
    assert said == f"{paths[1]}: holds no box, so every AP is 0"
    paths[0].write_text("[]")
    with pytest.raises(InputError, match="nothing to measure"):
        runs.check_same_images(*read(tmp_path, named))


def test_a_run_named_twice_is_no_second_seed(tmp_path):
    _, named = dataset(tmp_path, seeds=2)
    _, results = read(tmp_path, named)
    files = [runs.RunFiles(*pair, seed=i // 2) for i, pair in enumerate(split(named))]
    said = runs.check_distinct(files, results)
    assert len(said) == 2 and "are of the same seed, 0" in said[0]
    copies = [results[0], results[0], *results[2:]]
    with pytest.raises(InputError, match=r"arm bn: .* hold the same boxes, so they are one run"):
        runs.check_distinct(files, copies)
    # the same boxes in two arms are two arms that do not differ
    said = runs.check_distinct(files, [results[0], results[1], results[0], results[3]])
    assert len(said) == 3 and "(of bn) and" in said[1] and "hold the same boxes" in said[1]


@pytest.mark.parametrize("decimals", [6, 2, 1, 0])
def test_a_copy_is_known_in_another_order_and_rounded(tmp_path, decimals):
    _, named = dataset(tmp_path, seeds=2)

    def rounded(boxes):
        np.random.default_rng(0).shuffle(boxes)
        for b in boxes:
            b["bbox"] = [round(x, decimals) for x in b["bbox"]]
            b["score"] = round(b["score"], max(decimals, 2))

    _, results = read(tmp_path, named)
    change_json(tmp_path / "bn_1.bbox.json", rounded)
    files = [runs.RunFiles(*pair) for pair in split(named)]
    assert runs.check_distinct(files, results) == []  # as they were
    change_json(tmp_path / "bn_0.bbox.json", lambda d: None)
    (tmp_path / "bn_1.bbox.json").write_bytes((tmp_path / "bn_0.bbox.json").read_bytes())
    change_json(tmp_path / "bn_1.bbox.json", rounded)
    with pytest.raises(InputError, match="hold the same boxes, so they are one run"):
        runs.check_distinct(files, read(tmp_path, named)[1])
    # one box of another class, or 2 pixels off, is another run
    change_json(tmp_path / "bn_1.bbox.json", lambda d: d[7].update(bbox=[1, 2, 30, 40]))
    assert runs.check_distinct(files, read(tmp_path, named)[1]) == []


def with_seeds(**seeds):
    files, arms = [], {}
    for arm, of_arm in seeds.items():
        arms[arm] = list(range(len(files), len(files) + len(of_arm)))
        files += [runs.RunFiles(arm, f"{arm}{n}.json", seed=s) for n, s in enumerate(of_arm)]
    return files, arms


def test_runs_are_paired_by_their_seeds():
    arms, said = runs.pair_by_seed(*with_seeds(a=[0, 1, 2], b=[2, 0, 1]))
    assert arms == {"a": [0, 1, 2], "b": [4, 5, 3]}
    assert said == "Runs are paired by their seeds, 0, 1, 2."
    arms, said = runs.pair_by_seed(*with_seeds(a=[None, None], b=[None, None]))
    assert arms == {"a": [0, 1], "b": [2, 3]}
    assert "paired as given, a0.json with b0.json; a1.json with b1.json" in said


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (dict(a=[0, 1], b=[0, 2]), "b has the seeds 0, 2 and a 0, 1"),
        (dict(a=[0, 1], b=[0, 1, 1]), "b has the seeds 0, 1, 1 and"),
        (dict(a=[0, 0], b=[0, 1]), "a has the seeds 0, 0"),
        (dict(a=[0, 1], b=[0]), "b has the seeds 0 and a 0, 1"),
        (dict(a=[0, 1], b=[0, None]), "b1.json: its seed is not known"),
        (dict(a=[None], b=[None, None]), "a has 1 runs and b 2"),
    ],
)
def test_seeds_that_cannot_be_paired_are_refused(seeds, message):
    with pytest.raises(InputError, match=f"--paired: .*{message}"):
        runs.pair_by_seed(*with_seeds(**seeds))


def test_classes_without_a_detection(tmp_path):
    """Of three classes with objects: one may be missing and is said, two are refused."""
    _, named = dataset(tmp_path)
    paths = [tmp_path / "bn_0.bbox.json", tmp_path / "psbn_0.bbox.json"]

    def only(path, *classes):
        def change(boxes):
            boxes[:] = [b for b in boxes if b["category_id"] in classes]

        change_json(path, change)
        return read(tmp_path, named)

    only(paths[0], 1, 2)
    assert runs.check_classes(*read(tmp_path, named)) == [
        f"{paths[0]}: no detection of some classes that others have (class 3)"
    ]
    (said,) = runs.check_classes(*only(paths[1], 1, 2))
    assert said.startswith("no run has a detection of class 3, which counts as AP 0")
    only(paths[0], 1)
    late = only(paths[1], 1)
    with pytest.raises(InputError, match=r"of 2 of the 3 classes .*pass --classes 'class 1'"):
        runs.check_classes(*late)
    assert runs.check_classes(*late, missing_is_empty=True) == []
    # with the classes asked for, AP is that of these alone
    one = read_annotations(tmp_path / "ann.json", classes=["class 1"])
    found = read_results(paths[0], one)
    assert runs.check_classes(one, [found]) == []
    assert evaluate(one, found)[0]["AP"] == pytest.approx(
        3 * evaluate(late[0], late[1][0])[0]["AP"]
    )


def test_work_dirs_know_their_classes(tmp_path):
    named = work_dirs(tmp_path, seeds=1)
    for _, d in split(named):
        with open(f"{d}/retinanet.py", "a") as config:
            chosen = "metainfo=dict(classes=('class 2', 'class 1'))"
            config.write(f"test_dataloader = dict(dataset=dict({chosen}))\n")
    files = [runs.find_run(*pair) for pair in split(named)]
    assert files[0].classes == ("class 2", "class 1")
    assert runs.read_shared_annotations(files, None).class_names == ["class 1", "class 2"]
    chosen = runs.read_shared_annotations(files, None, classes=["class 3"])
    assert chosen.class_names == ["class 3"]
    with pytest.raises(InputError, match="has no class 'cat'; its classes are class 1, class 2"):
        runs.read_shared_annotations(files, None, classes=["cat"])
    (tmp_path / "psbn_s0/retinanet.py").write_text(
        (tmp_path / "bn_s0/retinanet.py").read_text().replace("class 2", "class 3")
    )
    files[1] = runs.find_run(*split(named)[1])
    with pytest.raises(InputError, match="evaluated on different classes: class 2, class 1 by"):
        runs.read_shared_annotations(files, None)


def crowded(folder):
    """One class, images of 180 objects, each found exactly: recall at 100 boxes is 100/180."""
    side = [[20 * (k % 18), 20 * (k // 18), 10, 10] for k in range(180)]
    objects = [
        dict(image_id=i, category_id=1, bbox=b, area=100, id=180 * i + k + 1, iscrowd=0)
        for i in range(8)
        for k, b in enumerate(side)
    ]
    (folder / "ann.json").write_text(
        json.dumps(
            dict(
                images=[dict(id=i) for i in range(8)],
                categories=[dict(id=1, name="crowd")],
                annotations=objects,
            )
        )
    )
    rng = np.random.default_rng(0)
    keys = ("image_id", "category_id", "bbox")
    boxes = [dict({k: o[k] for k in keys}, score=rng.random()) for o in objects]
    (folder / "a.bbox.json").write_text(json.dumps(boxes))
    a = read_annotations(folder / "ann.json")
    return a, read_results(folder / "a.bbox.json", a)


MMDETS = {"AP": 56 / 101, "AP50": 1.0, "AP75": 1.0, "APs": 1.0}  # mAP at 100 of 180


@pytest.mark.parametrize("name", [*MMDETS, "crowd"])
def test_every_number_that_mmdet_wrote_must_agree_in_its_own_convention(tmp_path, name):
    a, found = crowded(tmp_path)
    asked = {**MMDETS, "crowd": 1.0, "APm": 0.3, "a class that is not there": 0.3}
    del asked["APm"]  # nothing to measure: mmdet writes -1, which is left out

    def check(off, max_dets=None):
        reported = {**asked, name: asked[name] - off}
        files = [
            runs.RunFiles("x", f"{tmp_path}/results.bbox.json", reported=reported),
            runs.RunFiles("y", "b.json"),  # reports nothing
        ]
        return runs.check_reported(files, [found, found], a, max_dets)

    (said,) = check(0.0004)
    assert "AP50 1.000 for 0.55" in said and "AP 0.554" not in said and "--max-dets" in said
    (said,) = check(0, 1000)
    assert "says AP 0.554 for 1.000:" in said
    with pytest.raises(InputError, match=rf": {name} is .*metrics.json says"):
        check(0.0011)


def test_conventions_do_not_differ_where_no_image_has_more_than_100_boxes(tmp_path):
    _, named = dataset(tmp_path, seeds=1)
    annotations, results = read(tmp_path, named)
    stats = evaluate(annotations, results[0])[0]
    files = [
        runs.RunFiles("bn", "r.json", reported={k: round(stats[k], 3) for k in ("AP", "AP50")})
    ]
    assert runs.check_reported(files, results[:1], annotations) == []


def test_metrics_without_an_ap_are_passed_over(tmp_path):
    work_dirs(tmp_path, seeds=1)
    for text in ('{"coco/bbox_mAP": -1}', '{"other": 0.3}'):
        (tmp_path / "bn_s0/metrics.json").write_text(text)
        assert runs.find_run("bn", tmp_path / "bn_s0").reported == {}
    (tmp_path / "bn_s0/metrics.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"metrics.json: expected object"):
        runs.find_run("bn", tmp_path / "bn_s0")
