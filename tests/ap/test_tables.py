"""What is said of a comparison, as Markdown and JSON."""

import json

import numpy as np
import pytest

from psbn_mmdet.ap import compare, tables
from psbn_mmdet.ap.coco_files import InputError
from psbn_mmdet.ap.compare import Measured
from psbn_mmdet.ap.runs import RunFiles

SETTINGS = {"annotations": "ann.json", "images": 50, "resamples": 400, "seed": 0}
CLASSES = {"cat": 2.0, "dog": -3.0, "a|b": 0.02, "unicorn": np.nan}


def report(arms, table2=False, pairs=None, classes=CLASSES, seed=0, **kwargs):
    """Runs whose AP rises by 2 from arm to arm; classes differ as given between two arms."""
    rng = np.random.default_rng(seed)
    observed, runs = [], []
    for i, (arm, n) in enumerate(arms.items()):
        for s in range(n):
            runs.append(RunFiles(arm, f"{arm}_{s}.json", seed=s))
            ap = 36 + 2 * i + 0.1 * s
            observed.append([ap, ap + 20, ap + 1, *(40 + i * d for d in classes.values())])
    observed = np.array(observed)
    draws = observed + rng.normal(0, 0.1, (400, *observed.shape))
    m = len(runs)
    measured = Measured(
        names=["AP", "AP50", "AP75", *classes],
        overall=3,
        observed=observed,
        draws=draws,
        images=np.full(3 + len(classes), 50),
        curve=np.zeros((m, 3, 101)),
        curve_resampled=np.zeros((400, m, 3, 101)),
    )
    first = np.cumsum([0, *arms.values()])
    members = {a: list(range(f, f + n)) for (a, n), f in zip(arms.items(), first)}
    c = compare.compare(measured, members, pairs)
    return tables.report(c, runs, SETTINGS, table2, **kwargs)


def table(markdown, start):
    """The cells of the lines that start so."""
    return [
        [c.strip() for c in line.split(" | ")]
        for line in markdown.splitlines()
        if line.startswith(start)
    ]


def test_a_cell_says_value_and_interval():
    cell = tables.Cell(0.616, 0.211, 1.034, 0.98765)
    assert cell.text() == "0.62 (0.21 to 1.03)"
    assert cell.text("+") == "+0.62 (+0.21 to +1.03)"
    assert cell.p_text == "0.988" and cell.apart
    assert not tables.Cell(0.1, -0.1, 0.3).apart and tables.Cell(-1.0, -2.0, -0.1).apart
    none = tables.Cell(np.nan, np.nan, np.nan)
    assert (none.text(), none.p_text, none.apart) == ("–", "–", False)


def test_markdown_says_verdict_reason_rows_and_runs():
    r = report({"bn": 1, "psbn": 1})
    text = tables.markdown(r)
    assert text.startswith("## psbn against bn: better checkpoint, method not compared, +2.00 (+1.")
    assert "This interval" not in text and "not about psbn and bn as methods" in text
    assert [row[0] for row in table(text, "| AP")] == ["| AP", "| AP50", "| AP75"]
    (row,) = table(text, "| AP |")
    assert (
        row[1].startswith("36.00 (")
        and row[2].startswith("38.00 (")
        and row[4:] == ["1.000", "50 |"]
    )
    assert "2 of 3 classes have an interval without 0; about 0 would by chance alone." in text
    assert text.index("| cat |") < text.index("| a\\|b |") < text.index("| dog |")
    assert "unicorn" not in text
    assert "| psbn | 38.00 | 58.00 | 39.00 | psbn_0.json |" in text
    assert "They carry no seeds: every arm has one run." in text


def test_only_the_extremes_of_many_classes_are_listed():
    r = report({"bn": 1, "psbn": 1}, classes={f"c{i}": float(i) for i in range(20)})
    shown = [row[0][2:] for row in table(tables.markdown(r, extremes=2), "| c")]
    assert shown == ["c19", "c18", "c1", "c0"]
    shown = [row[0][2:] for row in table(tables.markdown(r, extremes=15), "| c")]
    assert shown == [f"c{i}" for i in range(19, -1, -1)]  # each once


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (
            {"bn": 2, "psbn": 3},
            "of 50 images, 50 of them with an object, and from the spread of the runs.",
        ),
        ({"bn": 1, "psbn": 1}, "no seeds: every arm has one run."),
        (
            {"bn": 3, "psbn": 1},
            "for bn from the spread of the runs. Those of psbn, with one run each",
        ),
    ],
)
def test_what_the_intervals_carry_is_said(arms, said):
    assert said in report(arms).carries


def test_json_is_the_same_numbers_and_null_where_there_are_none():
    r = report({"bn": 2, "psbn": 2}, expected={"--expect psbn-bn>=1": True})
    data = json.loads(json.dumps(tables.as_json(r), allow_nan=False))
    assert data["settings"] == {"confidence": 0.95, **SETTINGS}
    assert data["expected"] == {"--expect psbn-bn>=1": True}
    (d,) = data["differences"]
    assert (d["verdict"], d["shown"], d["seeds_in_interval"]) == ("better", True, True)
    assert set(d["classes"]) == set(CLASSES)
    assert set(d["classes"]["unicorn"].values()) == {None, 50}
    cell = r.pairs[0].overall[0].difference
    assert d["AP"] == {
        "value": cell.value, "low": cell.low, "high": cell.high, "p_positive": cell.p_positive,
        "images": 50,
    }  # fmt: skip
    assert data["arms"]["psbn"]["AP"]["value"] == pytest.approx(38.05)
    assert data["arms"]["psbn"]["classes"]["dog"]["value"] == pytest.approx(37)
    assert [(x["arm"], x["seed"], x["AP50"]) for x in data["runs"]][3] == ("psbn", 1, 58.1)


def test_table2_lays_the_paper_beside_ours():
    arms = {"bn_800": 2, "psbn_800": 2}
    r = report(arms, table2=True, pairs=tables.table2_pairs(list(arms)))
    text = tables.markdown(r)
    (first,), (second,) = table(text, "| 500"), table(text, "| 800")
    wanted = ["| 500", "not run", "32.7", "not run", "33.4", "not run", "+0.7", "not run |"]
    assert first == wanted
    assert [second[i] for i in (0, 2, 4, 6, 7)] == ["| 800", "35.8", "36.4", "+0.6", "better |"]
    assert second[1].startswith("36.05 (") and second[3].startswith("38.05 (")
    assert second[5].startswith("+2.00 (")


def test_table2_wants_its_arms():
    assert tables.table2_pairs(["psbn_500", "bn_500"]) == [("psbn_500", "bn_500")]
    with pytest.raises(InputError, match="arm 'bn'; name the arms bn_500"):
        tables.table2_pairs(["bn", "psbn_500"])
    with pytest.raises(InputError, match="arm bn_500 is missing"):
        tables.table2_pairs(["psbn_500", "bn_800", "psbn_800"])
