"""AP against pycocotools and hotcoco, also with the images physically repeated."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from psbn_mmdet.ap import evaluate, matching
from psbn_mmdet.ap.coco_files import read_annotations, read_results
from psbn_mmdet.ap.compiled import compiled

KEYPOINT_STATS = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]
STATS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def problem(rng, images=12, classes=4, crowd=0.1, decimals=1, boxes=3):
    """A random annotation dict and result list with every irregularity that COCO allows.

    Scores of few ``decimals`` tie often, within an image too; the last class has no detection,
    the last but one no object; the last two images have neither.
    """
    objects, found = [], []
    for i in range(images):
        for c in range(classes):
            for _ in range(rng.poisson(boxes) if rng.random() < 0.7 else 0):
                box = np.append(rng.uniform(0, 200, 2), np.exp(rng.normal(3.7, 1, 2))).round(1)
                objects.append(
                    dict(
                        id=len(objects) + 1,
                        image_id=10 * i + 3,
                        category_id=c + 1,
                        bbox=box.tolist(),
                        area=float(box[2] * box[3] * rng.uniform(0.5, 1)),
                        iscrowd=int(rng.random() < crowd),
                    )
                )
                for _ in range(rng.poisson(1.2)):
                    shifted = np.maximum(box + rng.normal(0, 0.08, 4) * box[[2, 3, 2, 3]], 0)
                    found.append((10 * i + 3, c + 1, shifted))
            for _ in range(rng.poisson(1.5)):
                wild = np.append(rng.uniform(0, 200, 2), rng.uniform(0, 120, 2))
                found.append((10 * i + 3, rng.integers(1, classes + 1), wild))
    for _ in range(5):
        found.append((3, classes, np.array([5.0, 5, 20, 20])))
    objects.append(dict(objects[0], id=len(objects) + 1, category_id=classes + 2))
    rng.shuffle(found)
    annotations = dict(
        images=[dict(id=10 * i + 3, file_name=f"{i}.jpg") for i in rng.permutation(images + 2)],
        categories=[dict(id=c + 1, name=f"c{c}") for c in range(classes + 2)],
        annotations=objects,
    )
    results = [
        dict(
            image_id=int(i),
            category_id=int(c),
            bbox=[float(x) for x in np.round(box, 2)],
            score=float(np.round(rng.random(), decimals)),
        )
        for i, c, box in found
    ]
    annotations["images"] = [dict(i, id=int(i["id"])) for i in annotations["images"]]
    return annotations, results


def repeated(annotations, results, weights):
    """The same data set with image i there weights[i] times, copies next to each other."""
    order = sorted(i["id"] for i in annotations["images"])
    ids = {id_: [] for id_ in order}
    for id_, w in zip(order, weights, strict=True):
        for _ in range(w):
            ids[id_].append(1 + sum(map(len, ids.values())))
    objects = [
        dict(o, image_id=copy) for o in annotations["annotations"] for copy in ids[o["image_id"]]
    ]
    return (
        dict(
            annotations,
            images=[dict(id=copy) for id_ in order for copy in ids[id_]],
            annotations=[dict(o, id=n + 1) for n, o in enumerate(objects)],
        ),
        [dict(r, image_id=copy) for r in results for copy in ids[r["image_id"]]],
    )


def by_pycocotools(annotations, results, kind="bbox"):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(annotations))
        gt.createIndex()
        e = COCOeval(gt, gt.loadRes(json.loads(json.dumps(results))), kind)
        e.evaluate()
        e.accumulate()
        e.summarize()
    names = KEYPOINT_STATS if kind == "keypoints" else STATS
    precision = e.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class
    means = [[p[p > -1].mean() if (p > -1).any() else -1 for p in np.moveaxis(x, 2, 0)]
             for x in (precision, precision[:1], precision[5:6])]  # fmt: skip
    return dict(zip(names, e.stats, strict=True)), np.array(means).T, precision


def read(tmp_path, annotations, results, kind="bbox"):
    (tmp_path / "ann.json").write_text(json.dumps(annotations))
    (tmp_path / "res.json").write_text(json.dumps(results))
    a = read_annotations(tmp_path / "ann.json", kind)
    return a, read_results(tmp_path / "res.json", a)


def assert_parity(tmp_path, annotations, results, kind="bbox"):
    want, want_class, precision = by_pycocotools(annotations, results, kind)
    a, r = read(tmp_path, annotations, results, kind)
    got, got_class = evaluate.evaluate(a, r)
    assert list(got) == list(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=0, atol=1e-12)
    np.testing.assert_allclose(got_class, want_class[:, 0], rtol=0, atol=1e-12)
    m = matching.match(a, r)
    per_class, curve = evaluate.weighted_ap(m, np.ones((1, m.images), int))
    np.testing.assert_allclose(np.nan_to_num(per_class[0], nan=-1), want_class, rtol=0, atol=1e-12)
    if (want_class >= 0).any():
        shown = precision[:, :, want_class[:, 0] >= 0]
        np.testing.assert_allclose(curve[0, 0], shown.mean((0, 2)), rtol=0, atol=1e-12)
        np.testing.assert_allclose(curve[0, 1], shown[0].mean(1), rtol=0, atol=1e-12)
        np.testing.assert_allclose(curve[0, 2], shown[5].mean(1), rtol=0, atol=1e-12)
    return got


def as_masks(annotations, results, rng):
    """The same boxes as masks: ellipses, as polygons, RLE of numbers and RLE of text."""
    height, width = 340, 360

    def polygon(box):
        x, y, w, h = box
        angle = np.linspace(0, 2 * np.pi, 13)[:-1] + rng.uniform(0, 0.3)
        corners = [x + w * (1 + np.cos(angle)) / 2, y + h * (1 + np.sin(angle)) / 2]
        return [np.stack(corners, 1).round(2).ravel().tolist()]

    def rle(polygons):
        one = mask.merge(mask.frPyObjects(polygons, height, width))
        return {"size": one["size"], "counts": one["counts"].decode()}

    def counts(polygons):
        """Lengths of the runs of 0 and 1, column by column."""
        flat = mask.decode(mask.merge(mask.frPyObjects(polygons, height, width))).ravel("F")
        ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
        return {"size": [height, width], "counts": np.diff(ends, prepend=0).tolist()}

    for image in annotations["images"]:
        image.update(height=height, width=width)
    for n, o in enumerate(annotations["annotations"]):
        o["segmentation"] = (lambda x: x, counts, rle)[n % 3](polygon(o["bbox"]))
    return annotations, [
        dict({k: r[k] for k in r if k != "bbox"}, segmentation=rle(polygon(r["bbox"])))
        for r in results
    ]


def as_keypoints(annotations, results, rng):
    """17 points in every box; some objects have none labelled, some of their points are not."""

    def points(box, third):
        x, y, w, h = box
        at = [x + w * rng.random(17), y + h * rng.random(17)]
        return np.stack([*at, third], 1)

    where = {}
    for o in annotations["annotations"]:
        seen = rng.integers(0, 3, 17) * (rng.random() < 0.8)
        p = points(o["bbox"], seen)
        o.update(keypoints=p.round(1).ravel().tolist(), num_keypoints=int((seen > 0).sum()))
        where.setdefault((o["image_id"], o["category_id"]), []).append((o, p))
    found = []
    for r in results:
        p = points(r["bbox"], np.ones(17))
        if near := where.get((r["image_id"], r["category_id"])):
            o, q = near[rng.integers(len(near))]
            p[:, :2] = q[:, :2] + rng.normal(0, 0.12, (17, 2)) * np.sqrt(o["area"]) * rng.random()
        shown = {k: r[k] for k in r if k != "bbox"}
        found.append(dict(shown, keypoints=p.round(2).ravel().tolist()))
    return annotations, found


SHAPES = {"segm": as_masks, "keypoints": as_keypoints}


def shaped(kind, seed, **kwargs):
    rng = np.random.default_rng(seed)
    annotations, results = problem(rng, images=8, classes=3, **kwargs)
    return SHAPES[kind](annotations, results, rng)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", SHAPES)
def test_masks_and_keypoints_are_equal_to_pycocotools(tmp_path, kind, seed):
    got = assert_parity(tmp_path, *shaped(kind, seed, decimals=1 + seed % 3), kind)
    assert 0.03 < got["AP50"] < 0.97


def test_more_than_20_poses_of_an_image_do_not_count(tmp_path):
    annotations, results = shaped("keypoints", 0, boxes=8)
    rng = np.random.default_rng(0)
    results = [dict(r, score=round(r["score"] * f, 2)) for r in results for f in rng.random(4)]
    cells = [(r["image_id"], r["category_id"]) for r in results]
    assert max(map(cells.count, set(cells))) > 20
    assert_parity(tmp_path, annotations, results, "keypoints")


@pytest.mark.parametrize("kind", SHAPES)
def test_weights_of_masks_and_keypoints_are_physical_repetition(tmp_path, kind):
    annotations, results = shaped(kind, 20)
    a, r = read(tmp_path, annotations, results, kind)
    m = matching.match(a, r)
    weights = evaluate.draw_images(m.images, 4, np.random.default_rng(0))
    got, _ = evaluate.weighted_ap(m, weights)
    for w, g in zip(weights, got, strict=True):
        again = repeated(annotations, results, w)
        for image in again[0]["images"]:
            image.update(height=340, width=360)
        _, want, _ = by_pycocotools(*again, kind)
        np.testing.assert_allclose(np.nan_to_num(g, nan=-1), want, rtol=0, atol=1e-12)


def test_another_number_of_detections_counts(tmp_path):
    """As pycocotools with maxDets 1000, as mmdet takes it."""
    annotations, results = problem(np.random.default_rng(0), images=3, classes=2, boxes=120)
    cells = [(r["image_id"], r["category_id"]) for r in results]
    assert max(map(cells.count, set(cells))) > 100
    a, r = read(tmp_path, annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(tmp_path / "ann.json"))
        e = COCOeval(gt, gt.loadRes(str(tmp_path / "res.json")), "bbox")
        e.params.maxDets = [1, 10, 1000]
        e.evaluate()
        e.accumulate()
    got, _ = evaluate.evaluate(a, r, 1000)
    for name, area in (("AP", 0), ("APs", 1), ("APm", 2), ("APl", 3)):
        p = e.eval["precision"][:, :, :, area, -1]
        assert got[name] == pytest.approx(p[p > -1].mean(), rel=0, abs=1e-12)
        p = e.eval["recall"][:, :, area, -1]
        shown = got["AR1000" if area == 0 else f"AR{name[2:]}"]
        assert shown == pytest.approx(p[p > -1].mean(), rel=0, abs=1e-12)
    assert got["AP"] != evaluate.evaluate(a, r)[0]["AP"]


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_pycocotools_on_random_problems(tmp_path, seed):
    rng = np.random.default_rng(seed)
    got = assert_parity(
        tmp_path, *problem(rng, crowd=rng.choice([0, 0.1, 0.5]), decimals=rng.integers(0, 4))
    )
    assert 0.05 < got["AP50"] < 0.95  # a problem in which boxes are matched and missed


def test_equal_to_pycocotools_with_more_than_100_boxes_in_an_image(tmp_path):
    rng = np.random.default_rng(0)
    annotations, results = problem(rng, images=3, classes=2, boxes=8)
    for r in list(results):
        results += [dict(r, score=round(r["score"] * f, 1)) for f in rng.random(30)]
    cells = [(r["image_id"], r["category_id"]) for r in results]
    assert max(map(cells.count, set(cells))) > 100
    assert_parity(tmp_path, annotations, results)


def test_equal_to_pycocotools_where_an_object_has_id_0(tmp_path):
    annotations, results = problem(np.random.default_rng(5))
    o = annotations["annotations"][0]
    results.append(dict(image_id=3, category_id=o["category_id"], bbox=o["bbox"], score=0.97))
    with_1 = assert_parity(tmp_path, annotations, results)
    for o in annotations["annotations"]:
        o["id"] -= 1
    assert assert_parity(tmp_path, annotations, results) != with_1


def test_of_two_objects_with_equal_iou_the_last_is_taken(tmp_path):
    """The surer box lies half-way between two objects; the other one fits the first object only."""
    boxes = ([100, 0, 10, 10], [102, 0, 10, 10])
    annotations = dict(
        images=[dict(id=1)],
        categories=[dict(id=1)],
        annotations=[
            dict(id=n + 1, image_id=1, category_id=1, bbox=b, area=100, iscrowd=0)
            for n, b in enumerate(boxes)
        ],
    )
    results = [
        dict(image_id=1, category_id=1, bbox=[101, 0, 10, 10], score=0.9),
        dict(image_id=1, category_id=1, bbox=[97, 0, 10, 10], score=0.8),
    ]
    assert assert_parity(tmp_path, annotations, results)["AP50"] == 1


def test_equal_to_pycocotools_where_nothing_can_be_measured(tmp_path):
    annotations, results = problem(np.random.default_rng(2))
    got = assert_parity(tmp_path, dict(annotations, annotations=[]), results)
    assert set(got.values()) == {-1}


def test_equal_to_hotcoco_on_real_annotations(tmp_path, shared_data):
    hotcoco = pytest.importorskip("hotcoco")
    path = shared_data / "coco128/annotations/instances_val2017.json"
    annotations = read_annotations(path)
    rng = np.random.default_rng(0)
    results = [
        dict(
            image_id=o["image_id"],
            category_id=o["category_id"],
            bbox=(np.array(o["bbox"]) + rng.normal(0, 0.06, 4) * o["bbox"][2]).clip(0).tolist(),
            score=round(rng.random(), 2),
        )
        for o in json.loads(path.read_text())["annotations"]
        for _ in range(rng.poisson(1.5))
    ]
    (tmp_path / "r.json").write_text(json.dumps(results))
    gt = hotcoco.COCO(str(path))
    e = hotcoco.COCOeval(gt, gt.load_res(str(tmp_path / "r.json")), "bbox")
    e.run()
    got, _ = evaluate.evaluate(annotations, read_results(tmp_path / "r.json", annotations))
    want = e.get_results()
    assert got == pytest.approx({k: want[k] for k in STATS}, rel=0, abs=1e-12)


def test_empty_result_file_is_ap_0(tmp_path):
    annotations, _ = problem(np.random.default_rng(0))
    a, r = read(tmp_path, annotations, [])
    stats, per_class = evaluate.evaluate(a, r)
    assert set(stats.values()) == {0.0}
    assert set(per_class) == {0.0, -1.0}


@pytest.mark.parametrize("seed", range(8))
def test_weights_are_exactly_physical_repetition(tmp_path, seed):
    """Scores of one digit tie inside an image, those of six do not."""
    rng = np.random.default_rng(100 + seed)
    annotations, results = problem(rng, images=8, classes=3, decimals=6 if seed % 2 else 1)
    a, r = read(tmp_path, annotations, results)
    m = matching.match(a, r)
    assert (m.tied.max() > 1) == (seed % 2 == 0)  # ties, or none, are what is tested
    weights = evaluate.draw_images(m.images, 6, rng)
    assert weights.max() > 2
    got, _ = evaluate.weighted_ap(m, weights)
    for w, g in zip(weights, got, strict=True):
        _, want, _ = by_pycocotools(*repeated(annotations, results, w))
        np.testing.assert_allclose(np.nan_to_num(g, nan=-1), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("area", ["s", "m", "l"])
def test_weights_are_exactly_physical_repetition_in_size_classes(tmp_path, area):
    rng = np.random.default_rng(7)
    annotations, results = problem(rng, images=8, classes=3)
    a, r = read(tmp_path, annotations, results)
    m = matching.match(a, r, area)
    weights = evaluate.draw_images(m.images, 4, rng)
    got = evaluate.mean_over_classes(evaluate.weighted_ap(m, weights)[0][..., 0])
    want = [by_pycocotools(*repeated(annotations, results, w))[0][f"AP{area}"] for w in weights]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_resampling_is_paired_and_does_not_depend_on_threads(tmp_path):
    rng = np.random.default_rng(3)
    annotations, results = problem(rng)
    a, r = read(tmp_path, annotations, results)
    runs = [matching.match(a, r), matching.match(a, r)]
    one, _ = evaluate.resample(runs, 40, seed=1, threads=1)
    two, _ = evaluate.resample(runs, 40, seed=1, threads=3)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[:, 0], one[:, 1])  # the same model on the same images
    assert np.nanstd(one[:, 0, 0, 0]) > 0


def test_leave_one_out_is_ap_without_that_image(tmp_path):
    annotations, results = problem(np.random.default_rng(4), images=7)
    a, r = read(tmp_path, annotations, results)
    got = evaluate.leave_one_out(matching.match(a, r))
    for i, id_ in enumerate(a.image_ids):
        rest = [
            [x for x in xs if x["image_id"] != id_] for xs in (annotations["annotations"], results)
        ]
        want = by_pycocotools(dict(annotations, annotations=rest[0]), rest[1])[0]["AP"]
        assert got[i] == pytest.approx(want, rel=0, abs=1e-12)


def test_weights_that_are_no_counts_are_refused(tmp_path):
    a, r = read(tmp_path, *problem(np.random.default_rng(4)))
    m = matching.match(a, r)
    for weights in (np.ones((1, m.images)), np.ones((1, 3), int), -np.ones((1, m.images), int)):
        with pytest.raises(ValueError, match="weights: got"):
            evaluate.weighted_ap(m, weights)


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same():
    """numba refuses to cache a function whose file is not there."""
    made = {}
    exec("def twice(x):\n    return 2 * x", made)
    assert compiled(made["twice"])(21) == 42


def test_draws_are_as_many_images_as_there_are():
    draws = evaluate.draw_images(50, 200, np.random.default_rng(0))
    assert draws.shape == (200, 50) and (draws.sum(1) == 50).all()
    # each image comes up Binomial(50, 1/50) times: mean 1, variance 0.98
    assert draws.var() == pytest.approx(0.98, abs=0.05)
