"""COCO files into columns, and every way in which they can be wrong, each in one line."""

import codecs
import gzip
import json

import numpy as np
import pytest

from psbn_mmdet.ap.coco_files import InputError, read_annotations, read_results
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
    return line.removeprefix(path)


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


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress,
        lambda b: codecs.BOM_UTF8 + b,
        lambda b: b.decode().encode("utf-16"),
        lambda b: gzip.compress(codecs.BOM_UTF16_BE + b.decode().encode("utf-16-be")),
    ],
)
def test_packed_and_other_encodings_are_read(files, packed):
    ann, results = files
    plain = read_results(results, read_annotations(ann))
    for path in files:
        path.write_bytes(packed(path.read_bytes()))
    got = read_results(results, read_annotations(ann))
    np.testing.assert_array_equal(got.box, plain.box)
    results.write_bytes(gzip.compress(b"[]" * 500)[:20])
    assert "cannot be unpacked" in refused(ann, results)
    results.write_bytes(b"\xff\xfe[")  # half a letter
    assert "cannot be unpacked" in refused(ann, results)


@pytest.mark.parametrize("key", ["segmentation", "keypoints"])
def test_masks_are_not_taken_for_boxes(files, key):
    ann, results = files
    change_json(results, lambda d: d[3].update({key: None}))
    read_results(results, read_annotations(ann))
    change_json(results, lambda d: d[3].update({key: [1, 2, 3]}))
    kind = {"segmentation": "segm"}.get(key, key)
    assert f"its records hold {key}; pass --type {kind}" in refused(ann, results)
    read_results(results, read_annotations(ann), boxes_alone=True)


def test_lvis_is_named(files):
    change_json(files[0], lambda d: d["images"][1].update(neg_category_ids=[]))
    assert refused(files[0]).startswith("LVIS annotations")


def boxes_as(results, change):
    def all_of_them(data):
        for record in data:
            record["bbox"] = change(*record["bbox"])

    change_json(results, all_of_them)


@pytest.mark.parametrize("sizes", [True, False])
def test_corners_and_fractions_are_said(tmp_path, sizes):
    dataset(tmp_path, images=40)
    ann, results = tmp_path / "ann.json", tmp_path / "bn_0.bbox.json"
    if sizes:
        change_json(ann, lambda d: [i.update(width=200, height=200) for i in d["images"]])
    kept = results.read_text()
    boxes_as(results, lambda x, y, w, h: [x, y, x + w, y + h])
    assert "look like two corners; wanted [x, y, w, h]" in refused(ann, results)
    results.write_text(kept)
    boxes_as(results, lambda x, y, w, h: [x / 200, y / 200, w / 200, h / 200])
    assert "they look like fractions of the image" in refused(ann, results)
    results.write_text(kept)
    read_results(results, read_annotations(ann))


def test_boxes_as_large_as_their_image_are_no_corners(tmp_path):
    dataset(tmp_path, images=40)
    boxes_as(tmp_path / "bn_0.bbox.json", lambda x, y, w, h: [0, 0, 190, 190])
    read_results(tmp_path / "bn_0.bbox.json", read_annotations(tmp_path / "ann.json"))


def test_negative_areas_are_counted(files):
    change_json(files[0], lambda d: d["annotations"][3].update(area=-1))
    (said,) = read_annotations(files[0]).warnings
    assert said.endswith("1 objects have a negative area and do not count, as in pycocotools")


def test_classes_that_were_not_asked_for_are_left_out(files):
    ann, results = files
    some = read_annotations(ann, classes=["class 3", "class 1"])
    assert some.class_names == ["class 1", "class 3"] and some.class_ids == [1, 3]
    data = [o for o in json.loads(ann.read_text())["annotations"] if o["category_id"] != 2]
    np.testing.assert_array_equal(some.box, [o["bbox"] for o in data])
    assert some.left_out == 0
    found = [b for b in json.loads(results.read_text()) if b["category_id"] != 2]
    np.testing.assert_array_equal(read_results(results, some).box, [b["bbox"] for b in found])
    with pytest.raises(InputError, match="has no class 'cat'; its classes are class 1"):
        read_annotations(ann, classes=["cat"])


BAD_SHAPES = {
    "short keypoints": ("keypoints", dict(keypoints=[1.0] * 50), "50 numbers of keypoints"),
    "a box": ("segm", dict(), "missing required field segmentation"),
    "another size": (
        "segm",
        dict(segmentation=dict(size=[9, 9], counts="0")),
        "a mask of height and width [9, 9] on an image of [",
    ),
}


@pytest.mark.parametrize("bad", BAD_SHAPES)
def test_bad_masks_and_keypoints_are_named(files, bad):
    kind, change, message = BAD_SHAPES[bad]
    ann, results = files
    change_json(ann, lambda d: [i.update(width=200, height=200) for i in d["images"]])
    change_json(
        ann,
        lambda d: [
            o.update(segmentation=[[0, 0, 9, 0, 9, 9]], keypoints=[1] * 51, num_keypoints=17)
            for o in d["annotations"]
        ],
    )
    good = dict(segmentation=dict(size=[200, 200], counts=[40000]), keypoints=[1.0] * 51)
    change_json(results, lambda d: [r.update(good) for r in d])
    annotations = read_annotations(ann, kind)
    read_results(results, annotations)

    def spoil(data):
        data[2].pop("segmentation")
        data[2].update(change)

    change_json(results, spoil)
    with pytest.raises(InputError, match=r"record 2|: 2: ") as error:
        read_results(results, annotations)
    assert message in str(error.value)


def test_polygons_need_the_size_of_their_image(files):
    change_json(
        files[0],
        lambda d: [o.update(segmentation=[[0, 0, 9, 0, 9, 9]]) for o in d["annotations"]],
    )
    with pytest.raises(InputError, match="polygons need the height and width of their image"):
        read_annotations(files[0], "segm")
