"""The images that weigh most, and the page."""

import dataclasses
import json
from pathlib import Path

import pytest

from psbn_mmdet.ap import coco_files, compare, images, page, tables
from psbn_mmdet.ap.runs import RunFiles
from tests.helpers.ap import change_json, dataset


@pytest.fixture(scope="module")
def one_image_apart(tmp_path_factory):
    """Two arms that are perfect but for image 11, on which the second detects nothing."""
    folder = tmp_path_factory.mktemp("page")
    _, named = dataset(folder, quality=(0, 0))
    change_json(
        folder / "ann.json",
        lambda d: d["categories"][0].update(name="</script><b>x"),
    )
    a, b = (name.partition("=")[2] for name in named)
    boxes = json.loads(Path(a).read_text())
    Path(b).write_text(json.dumps([r for r in boxes if r["image_id"] != 11]))
    ann = coco_files.read_annotations(folder / "ann.json")
    results = [coco_files.read_results(p, ann) for p in (a, b)]
    c = compare.compare(compare.measure(ann, results, 100), {"bn": [0], "psbn": [1]})
    report = tables.report(c, [RunFiles("bn", a), RunFiles("psbn", b)], {"images": 40}, expected={})
    return c, report, images.weigh_images(c, ann, results), boxes


def test_the_image_that_weighs_most_is_first(one_image_apart):
    c, _, (data,), boxes = one_image_apart
    assert data["id"][0] == 11 and data["file"][0] == "000000000011.jpg"
    assert data["objects"][0] == 3 and [m[0] for m in data["matched"]] == [3, 0]
    # without that image both arms are perfect, so it carries the whole difference
    assert data["weight"][0] == pytest.approx(c.differences[0].value[0], abs=1e-5)
    assert set(data["weight"][1:]) != {data["weight"][0]}
    assert sorted(data["id"]) == list(range(1, 41))
    assert data["arms"] == ["bn", "psbn"] and len(data["boxes"]) == images.DRAWN
    first, second = data["boxes"][0]["models"]
    sure = [b for b in boxes if b["image_id"] == 11 and b["score"] >= images.SHOWN_SCORE]
    assert len(first) == len(sure) and second == []
    assert all(box[5] == 1 for box in first)  # all true
    assert len(data["boxes"][0]["objects"]) == 3


def test_the_page_shows_what_the_report_says(one_image_apart):
    _, report, weights, _ = one_image_apart
    html = page.page(report, weights)
    (p,) = report.pairs
    body = html[html.index("<body>") :]
    for said in (p.verdict, p.classes_apart, report.carries, report.runs[0].files.results):
        assert said in body
    for row in p.overall:
        assert row.difference.text("+") in body
    data = json.loads(html.split("showImages(0, ")[1].split(");</script>")[0])
    assert data == weights[0]
    assert body.count("Plotly.newPlot") == 3
    assert "</script><b>x" not in body  # the name of a class is text, wherever it stands
    assert "src=" not in body and "http://" not in body.replace("http://www.w3.org", "")


def test_what_one_run_per_arm_shows_is_not_in_the_colour_of_a_verdict(one_image_apart):
    _, report, weights, _ = one_image_apart
    assert '<span class="open">' in page.page(report, weights)


def test_several_pairs_are_listed_at_the_top(one_image_apart):
    _, report, weights, _ = one_image_apart
    assert 'href="#pair' not in page.page(report, weights)
    (p,) = report.pairs
    html = page.page(dataclasses.replace(report, pairs=[p, p]), [*weights, *weights])
    for n in (0, 1):
        assert f'<li><a href="#pair{n}">{p.headline}</a></li>' in html
        assert f'<section id="pair{n}">' in html
