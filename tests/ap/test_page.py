"""The images that weigh most, and the page."""

import dataclasses
import json
from pathlib import Path

import pytest

from psbn_mmdet.ap import coco_files, compare, images, page, tables
from psbn_mmdet.ap.runs import RunFiles
from tests.helpers.ap import change_json, dataset
from tests.helpers.browser import WHY_NOT, Tab, chromium


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
    assert f'aria-label="{p.headline}' in body
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


def test_images_are_in_the_page_itself(one_image_apart, tmp_path):
    """Each as the bytes of its file; one that is not there is named."""
    c, report, _, _ = one_image_apart
    ann = coco_files.read_annotations(Path(report.runs[0].files.results).with_name("ann.json"))
    results = [coco_files.read_results(r.files.results, ann) for r in report.runs]
    for i in range(1, 41):
        (tmp_path / f"{i:012d}.jpg").write_bytes(f"image {i}".encode())
    (data,) = images.weigh_images(c, ann, results, folder=tmp_path)
    assert data["boxes"][0]["url"] == "data:image/jpeg;base64,aW1hZ2UgMTE="  # "image 11"
    assert data["boxes"][0]["size"] == [None, None]
    (tmp_path / "000000000011.jpg").unlink()
    with pytest.raises(
        coco_files.InputError, match=r"--images: .*11.jpg: cannot be read \(No such"
    ):
        images.weigh_images(c, ann, results, folder=tmp_path)


def test_the_page_says_the_version_and_the_command_and_the_plan(one_image_apart):
    c, report, weights, _ = one_image_apart
    settings = {"version": "psbn_mmdet 9", "images": 40, "command": "compare-ap a=<b>"}
    plan = compare.plan(c.differences[0], 0.95)
    html = page.page(dataclasses.replace(report, settings=settings, plans=[plan]), weights)
    body = html[html.index("<body>") :]
    assert "version: psbn_mmdet 9, images: 40." in body
    assert "<code>compare-ap a=&lt;b&gt;</code>" in body
    assert f"<h2>{tables.plan_title(plan)}</h2>" in body
    assert "prefers-color-scheme: dark" in html and "@media print" in html


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(one_image_apart, tmp_path, dark):
    """Rows by the keyboard alone, the drawing with its text, the colours of the reader."""
    _, report, weights, _ = one_image_apart
    # a picture of one pixel, so that nothing has to be fetched
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
    boxes = [dict(b, url=pixel, size=[200, 200]) for b in weights[0]["boxes"]]
    path = tmp_path / "page.html"
    path.write_text(page.page(report, [dict(weights[0], boxes=boxes)]), encoding="utf-8")
    with chromium() as browser:
        tab = Tab(browser, path, dark=dark)
        said = (
            "[...document.querySelectorAll('#drawn0 svg')].map(s => s.getAttribute('aria-label'))"
        )
        first = weights[0]["boxes"][0]["models"][0]
        assert tab.js(said) == [
            f"image 11, bn: 3 objects, {len(first)} true and 0 false boxes",
            "image 11, psbn: 3 objects, 0 true and 0 false boxes",
        ]
        assert tab.js("document.querySelectorAll('#drawn0 image').length") == 2
        tab.js("document.querySelector('#rows0 tr').focus()")
        tab.press("ArrowDown", "ArrowDown", "ArrowUp", "Enter")
        assert (
            tab.js(
                "[...document.querySelector('#rows0').rows].findIndex(r => r.className "
                "=== 'can now')"
            )
            == 1
        )
        assert tab.js(said)[0].startswith(f"image {weights[0]['id'][1]}, bn:")
        paper = tab.js("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(25, 26, 28)" if dark else "rgb(251, 250, 248)")
        words = tab.js("document.querySelector('.xtitle').style.fill")
        assert words == tab.js("getComputedStyle(document.body).color")
        assert tab.errors == [] and [u for u in tab.requests if u.startswith("http")] == []
        tab.close()
