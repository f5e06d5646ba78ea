"""Claims on a difference: of its interval, or of the observed value."""

import numpy as np
import pytest

from psbn_mmdet.ap import compare, expect
from psbn_mmdet.ap.coco_files import InputError
from tests.helpers.ap import measured, two_arms


@pytest.fixture(scope="module")
def comparison():
    """Difference 1.0, interval 0.5 to 1.5: 1.96 standard deviations of uniform draws."""
    half = 0.5 / 1.959964 * np.sqrt(3)
    draws = np.linspace(1 - half, 1 + half, 4001)
    m = measured([36.0, 37.0], np.stack([np.full(4001, 36.0), 36 + draws], 1))
    return compare.compare(m, {"bn": [0], "psbn": [1]})


@pytest.mark.parametrize(
    ("claim", "of_interval", "of_observed"),
    [
        ("psbn-bn>=0.3", True, True),
        ("psbn-bn>=0.45", True, True),
        ("psbn-bn>=0.55", False, True),
        ("psbn-bn>0", True, True),
        ("psbn-bn>=1.1", False, False),
        ("psbn-bn<=1.6", True, True),
        ("psbn-bn<=1.4", False, True),
        ("psbn-bn<0.9", False, False),
        ("psbn-bn<2", True, True),
    ],
)
def test_the_whole_interval_or_the_observed_difference(comparison, claim, of_interval, of_observed):
    for observed, wanted in ((False, of_interval), (True, of_observed)):
        holds, said = expect.parse(claim, ["bn", "psbn"], observed).check(comparison)
        assert holds == wanted
        assert said.startswith(f"expected {claim}: {'holds' if wanted else 'DOES NOT HOLD'}; the ")
        assert ("observed" in said) == observed and said.endswith("(of checkpoints)")


def test_the_sentence_names_the_end_that_decides(comparison):
    _, said = expect.parse("psbn-bn>=0", ["bn", "psbn"]).check(comparison)
    assert "the lower end of the 95% interval is +0.50" in said
    _, said = expect.parse("psbn-bn<=0", ["bn", "psbn"]).check(comparison)
    assert "the upper end of the 95% interval is +1.50" in said


def test_strict_and_weak_relations_differ_at_the_bound():
    m = measured([36.0, 37.0], np.tile([36.0, 37.0], (100, 1)))
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    held = [
        expect.parse(f"psbn-bn{r}1", ["bn", "psbn"]).check(c)[0] for r in (">=", ">", "<=", "<")
    ]
    assert held == [True, False, True, False]


def test_what_could_not_be_measured_holds_for_nothing():
    m = measured([np.nan, np.nan], np.full((100, 2), np.nan))
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    for claim in ("psbn-bn>=-99", "psbn-bn<=99"):
        for observed in (False, True):
            assert not expect.parse(claim, ["bn", "psbn"], observed).check(c)[0]


def test_of_methods_fails_for_checkpoints(comparison):
    holds, said = expect.parse("psbn-bn>=0.3 of methods", ["bn", "psbn"]).check(comparison)
    assert not holds and said.endswith("an arm has one run, so methods are not compared")
    two = two_arms(np.random.default_rng(1), 3, 3.0, 0.2, 0.1, 0.1, whole=True)
    assert expect.parse("psbn-bn>=0.3 of methods", ["bn", "psbn"]).check(two)[0]


@pytest.mark.parametrize("observed", [False, True])
def test_no_claim_holds_where_images_are_too_few(observed):
    m = measured([36.0, 66.0], np.tile([36.0, 66.0], (100, 1)), images=5)
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    for claim in ("psbn-bn>=20", "psbn-bn<=40"):
        holds, said = expect.parse(claim, ["bn", "psbn"], observed).check(c)
        assert not holds and said.endswith(
            "5 images with an object, too few for an interval, which takes 6"
        )


@pytest.mark.parametrize(
    ("text", "bound"), [("1e-1", 0.1), ("-2.5E+0", -2.5), (".5", 0.5), ("3.", 3.0), ("+1", 1.0)]
)
def test_numbers_as_people_write_them(text, bound):
    assert expect.parse(f"a-b>={text}", ["a", "b"]).bound == bound


def test_arms_with_a_dash_are_known():
    e = expect.parse("ps-bn-bn >= 0.3", ["bn", "ps-bn"])
    assert (e.arm, e.baseline, e.relation, e.bound) == ("ps-bn", "bn", ">=", 0.3)
    assert e.option == "--expect ps-bn-bn >= 0.3"
    with pytest.raises(InputError, match=r"--expect 'ps-bn>=0.3': wanted ARM"):
        expect.parse("ps-bn>=0.3", ["bn", "ps-bn"])
    with pytest.raises(InputError, match="--expect-observed"):
        expect.parse("bn-psbn=0.3", ["bn", "psbn"], observed=True)


def test_a_claim_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(InputError, match="wanted ARM-BASELINE"):
        expect.parse("a-b-c>=0", ["a", "b-c", "a-b", "c"])
