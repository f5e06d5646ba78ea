"""Work dirs and result files that belong together, and those that do not."""

import json
import os
import time

import numpy as np
import pytest

from psbn_mmdet.ap import runs
from psbn_mmdet.ap.coco_files import InputError, read_annotations, read_results
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
        reported=0.251,
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
    assert len(runs.check_distinct(files, [results[0], results[1], results[0], results[3]])) == 2


@pytest.mark.parametrize(("off", "agrees"), [(0.0004, True), (-0.0004, True), (0.0011, False)])
def test_the_ap_that_mmdet_wrote_must_agree(tmp_path, off, agrees):
    _, named = dataset(tmp_path, seeds=1)
    annotations, _ = read(tmp_path, named)
    files = [runs.RunFiles("bn", f"{tmp_path}/results.bbox.json", reported=0.251)]
    files.append(runs.RunFiles("psbn", "b.json"))  # reports nothing
    ap = np.array([0.251 + off, 0.9])
    if agrees:
        runs.check_reported(files, ap, annotations)
        return
    with pytest.raises(InputError, match=r"AP is 0.252 with .*metrics.json says 0.251"):
        runs.check_reported(files, ap, annotations)


def test_metrics_without_an_ap_are_passed_over(tmp_path):
    work_dirs(tmp_path, seeds=1)
    for text in ('{"coco/bbox_mAP": -1}', '{"other": 0.3}'):
        (tmp_path / "bn_s0/metrics.json").write_text(text)
        assert runs.find_run("bn", tmp_path / "bn_s0").reported is None
    (tmp_path / "bn_s0/metrics.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"metrics.json: expected object"):
        runs.find_run("bn", tmp_path / "bn_s0")
