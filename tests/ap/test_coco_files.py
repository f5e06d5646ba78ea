"""COCO files into columns, and every way in which they can be wrong, each in one line."""

import json

import numpy as np
import pytest

from psbn_mmdet.ap.coco_files import InputError, read_annotations, read_results
from psbn_mmdet.python38 import removeprefix
from tests.helpers.ap import change_json, dataset

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def files(tmp_path):
    """An annotation file and a result file with 12 boxes on 4 images."""
    dataset(tmp_path, images=4)
    return tmp_path / "ann.json", tmp_path / "bn_0.bbox.json"


def refused(ann, results=None):
    """The line that reading ends in."""

    def read():
        annotations = read_annotations(ann)
        if results:
            read_results(results, annotations)

    with pytest.raises(InputError) as e:
        read()
    line = str(e.value)
    assert "\n" not in line
    path = f"{results or ann}: "
    assert line.startswith(path)
    return removeprefix(line, path)


def test_columns_are_what_the_files_say(files):
    ann, results = files
    change_json(ann, lambda d: d["images"].reverse())  # sorted by id as in pycocotools
    change_json(ann, lambda d: d["annotations"][5].update(iscrowd=1))
    change_json(ann, lambda d: d["annotations"][6].update(id=0, area=7))
    a = read_annotations(ann)
    data, boxes = json.loads(ann.read_text()), json.loads(results.read_text())
    assert a.image_ids == [1, 2, 3, 4] and a.file_names[1] == "000000000002.jpg"
    assert a.class_ids == [1, 2, 3] and a.class_names == ["class 1", "class 2", "class 3"]
    objects = data["annotations"]
    np.testing.assert_array_equal(a.image, [o["image_id"] - 1 for o in objects])
    np.testing.assert_array_equal(a.cls, [o["category_id"] - 1 for o in objects])
    np.testing.assert_array_equal(a.box, [o["bbox"] for o in objects])
    np.testing.assert_array_equal(a.area, [o["area"] for o in objects])
    np.testing.assert_array_equal(np.flatnonzero(a.crowd), [5])
    np.testing.assert_array_equal(np.flatnonzero(a.nameless), [6])
    assert a.left_out == 0 and a.warnings == []
    r = read_results(results, a)
    np.testing.assert_array_equal(r.image, [b["image_id"] - 1 for b in boxes])
    np.testing.assert_array_equal(r.cls, [b["category_id"] - 1 for b in boxes])
    np.testing.assert_array_equal(r.box, [b["bbox"] for b in boxes])
    np.testing.assert_array_equal(r.score, [b["score"] for b in boxes])


BAD_RECORDS = {
    "unknown image": (dict(image_id=99), "record 2: image 99 is not in"),
    "unknown class": (dict(category_id=99), "record 2: category 99 is not in"),
    "image in words": (dict(image_id="1"), "there it is a number, here a string"),
    "class in words": (dict(category_id="1"), "there it is a number, here a string"),
    "nan": (dict(bbox=[0, 0, NAN, 1]), "holds NaN, which is no number, in the record {"),
    "infinite": (dict(bbox=[0, 0, 3, -INF]), "holds Infinity, which is no number"),
    "infinite score": (dict(score=INF), '"score": Infinity ...'),
    "nan score": (dict(score=NAN), '"score": NaN ...'),
    "nan image": (dict(image_id=NAN), "holds NaN"),
    "negative size": (dict(bbox=[5, 5, -1, 3]), "record 2: bbox [5.0, 5.0, -1.0, 3.0] has a neg"),
    "three numbers": (dict(bbox=[5, 5, 3]), "record 2: bbox: expected array of length 4"),
    "no box": (dict(bbox=None), "record 2: bbox: expected array, got null"),
    "score in words": (dict(score="0.5"), "record 2: score: expected float, got str"),
    "no score": (dict(score=None), "record 2: score: expected float, got null"),
}


@pytest.mark.parametrize("bad", BAD_RECORDS)
def test_bad_record_is_named(files, bad):
    ann, results = files
    change, message = BAD_RECORDS[bad]
    change_json(results, lambda data: data[2].update(change))
    assert message in refused(ann, results)


def test_number_beyond_what_a_float_holds_is_refused(files):
    ann, results = files
    change_json(results, lambda data: data[2].update(score=12345))
    results.write_text(results.read_text().replace("12345", "1e999"))
    assert "score: number out of range" in refused(ann, results)


def test_missing_key_is_named(files):
    ann, results = files
    change_json(results, lambda data: data[4].pop("bbox"))
    assert "record 4: object missing required field bbox" in refused(ann, results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cut off"),
        (b"{}", "expected array, got object; wanted a list"),
        (b"\x80\x04\x95", "is not JSON text"),
        (b"[] x", "is not JSON text"),
    ],
)
def test_what_is_no_result_file_is_refused(files, text, message):
    ann, results = files
    results.write_bytes(text)
    assert message in refused(ann, results)


def test_json_cut_off_in_the_middle(files):
    ann, results = files
    text = results.read_text()
    results.write_text(text[: len(text) // 2])
    assert "not complete JSON: ends after" in refused(ann, results)
    text = ann.read_text()
    ann.write_text(text[: len(text) // 2])
    assert "was it cut off" in refused(ann)


BAD_ANNOTATIONS = {
    "id twice": (dict(id=1), "two annotations have the id 1"),
    "nan": (dict(bbox=[NAN, 0, 1, 1]), "holds NaN"),
    "infinite area": (dict(area=INF), '"area": Infinity'),
    "no box": (dict(bbox=None), "annotations[3].bbox: expected array, got null"),
    "image in words": (dict(image_id="2"), "annotation 4 is of image '2' (a string), which the"),
    "class in words": (dict(category_id="2"), "annotation 4 is of category '2' (a string)"),
}


@pytest.mark.parametrize("bad", BAD_ANNOTATIONS)
def test_bad_annotation_is_named(files, bad):
    change, message = BAD_ANNOTATIONS[bad]
    change_json(files[0], lambda data: data["annotations"][3].update(change))
    assert message in refused(files[0])


def test_numbers_for_ids_that_are_strings_are_named(files):
    ann, _ = files

    def as_strings(data):
        for image in data["images"]:
            image["id"] = str(image["id"])

    change_json(ann, as_strings)
    assert "is of image 1 (a number), which the file lists as a string" in refused(ann)


def test_what_is_no_annotation_file_is_refused(files):
    ann, results = files
    assert "expected object, got array; wanted an object of images" in refused(results)
    assert "cannot be read (No such file" in refused(ann.with_name("absent.json"))
    change_json(ann, lambda d: d["images"].append(dict(id="x")))
    assert "ids of images are numbers in part and strings in part" in refused(ann)
    change_json(ann, lambda d: d.pop("categories"))
    assert "missing required field categories" in refused(ann)


def test_objects_of_unlisted_images_are_left_out_and_said(files):
    ann, _ = files
    change_json(ann, lambda d: d["annotations"][0].update(image_id=77))
    change_json(ann, lambda d: d["annotations"][1].update(category_id=77))
    a = read_annotations(ann)
    assert len(a.image) == 10
    (said,) = a.warnings
    assert said.startswith(f"{ann}: 2 objects are of images or classes that the file does not list")


def test_classes_of_one_name_stay_two(files):
    ann, _ = files
    change_json(ann, lambda d: d["categories"][2].update(name="class 1"))
    assert read_annotations(ann).class_names == ["class 1 (id 1)", "class 2", "class 1 (id 3)"]


def test_empty_result_file_is_read(files):
    ann, results = files
    results.write_text("[]")
    assert read_results(results, read_annotations(ann)).box.shape == (0, 4)
