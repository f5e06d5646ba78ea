"""The paper's claims against the published results."""

import json

import numpy as np
import pytest
from scipy import stats

from studies.cifar import verdicts
from studies.cifar.verdicts import BEGIN, END, Claim, judge
from studies.runs import RunError, interval, minus

DIFFERENCES = {0: 1.0, 1: 4.4, 2: 2.6}


def claim(values, effects=()):
    return Claim("x", "1", "it holds", "+1", "points", lambda summary: values, effects)


def test_published_table_is_what_the_published_numbers_give():
    rows = verdicts.verdicts()
    stored = json.loads((verdicts.RESULTS / "verdicts.json").read_text())
    assert stored == json.loads(json.dumps(rows))
    assert (verdicts.RESULTS / "verdicts.md").read_text().endswith(verdicts.markdown(rows))
    text = verdicts.README.read_text()
    assert verdicts.in_readme(text, verdicts.markdown(rows, "results/")) == text


def test_every_claim_is_of_an_experiment_that_there_is():
    from studies.cifar.experiments import build
    from studies.detection import experiments as detection

    for row in verdicts.CLAIMS:
        name, _, preset = row.results.rpartition("/")[2].partition("-")
        if row.results.startswith("../../detection/results/"):
            arms = {run.arm for run in detection.build(name).runs}
            summary = json.loads((verdicts.RESULTS / f"{row.results}.json").read_text())
            assert set(summary["arms"]) <= arms
        else:
            assert build(name, preset or "reduced").name == name


def test_differences_are_of_arms_that_are_planned():
    from studies.cifar.experiments import build
    from studies.detection import experiments as detection

    planned = {}
    for row in verdicts.CLAIMS:
        assert row.planned in verdicts.PLANNED
        if not isinstance(row.of, verdicts.Difference):
            continue
        if row.results not in planned:
            name, _, preset = row.results.rpartition("/")[2].partition("-")
            of_detection = "detection" in row.results
            built = detection.build(name) if of_detection else build(name, preset or "reduced")
            planned[row.results] = {run.arm for run in built.runs}
        assert {row.of.first, row.of.second} <= planned[row.results]


def test_difference_of_an_arm_that_was_not_run_is_no_number():
    arms = {"a": {"seeds": [0, 1], "rounds": [{"AP": {"values": [3.0, 5.0]}}]}}
    missing = Claim("x", "", "a over b", "", "AP", verdicts.Difference("a", "b", "AP"))
    assert judge(missing, {"arms": arms})["verdict"] == "not run"
    arms["b"] = {"seeds": [1, 2], "rounds": [{"AP": {"values": [4.0, 9.0]}}]}
    assert judge(missing, {"arms": arms})["values"] == {"1": 1.0}


def test_table_says_how_each_number_was_planned():
    looked = Claim("x", "1", "it holds", "+1", "points", lambda s: DIFFERENCES, (), 2, "no", "why")
    ours = Claim("x", "", "ours holds", "", "points", lambda s: DIFFERENCES)
    text = verdicts.markdown([judge(c, {"any": 1}) for c in (looked, ours)])
    papers, beyond = text.split("Beyond the paper:")
    assert "| no; 1 of the seeds after a look at 2; why |" in papers
    assert "| ours holds ([`x`](x.md)) | +2.67" in beyond and "| yes |" in beyond


def test_interval_is_students():
    expected = stats.t.interval(0.95, 2, np.mean([1, 4.4, 2.6]), stats.sem([1, 4.4, 2.6]))
    assert interval(DIFFERENCES.values()) == pytest.approx(expected)
    assert interval([1.0]) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.2, 0.9], "shown"),
        ([-1.0, -1.2, -0.9], "the opposite"),
        ([-1.0, 1.2, 0.9], "open"),  # three seeds are too few for a null
        ([-1.0, 1.2, 0.9, -0.5, 0.1], "open"),
        ([-1.0, 1.2, 0.9, -0.5, 0.1, -0.4], "not shown"),
        ([5.0], "open"),  # one seed has no interval
        ([0.0] * 6, "not shown"),
        ([], "not run"),
    ],
)
def test_verdict_is_where_the_interval_lies(values, verdict):
    assert judge(claim(dict(enumerate(values))), {"any": 1})["verdict"] == verdict


def test_seeds_needed_have_the_power_that_they_are_said_to_have():
    """By simulation: the share of t-tests that find an effect of 0.68 at a deviation of 1.7."""
    row = judge(claim(DIFFERENCES, effects=(0.68,)), {"any": 1})
    ((needed, least, most),) = row["seeds_needed"]
    assert least < needed < most
    deviation = np.std(list(DIFFERENCES.values()), ddof=1)
    rng = np.random.default_rng(0)
    for count, enough in ((needed, True), (needed - 4, False)):
        samples = rng.normal(0.68, deviation, (20_000, count))
        found = stats.ttest_1samp(samples, 0, axis=1)
        share = ((found.pvalue < 0.05) & (found.statistic > 0)).mean()
        assert bool(share > 0.795) == enough  # 3 standard errors of the simulation are 0.008
    assert verdicts.power(0.68, deviation, needed) >= 0.8
    assert verdicts.power(0.68, deviation, needed - 1) < 0.8


def test_deviation_of_few_seeds_is_known_as_badly_as_the_chi_squared_says():
    for seeds in (3, 6):
        low, high = verdicts.deviation_interval(2.0, seeds)
        assert (low, high) == pytest.approx(
            [2.0 * ((seeds - 1) / stats.chi2.ppf(q, seeds - 1)) ** 0.5 for q in (0.975, 0.025)]
        )


def test_seeds_that_follow_a_look_raise_the_false_alarms():
    assert verdicts.false_alarms(5, 5) == pytest.approx(0.05, abs=0.003)
    assert verdicts.false_alarms(3, 8) == pytest.approx(0.092, abs=0.004)
    assert verdicts.false_alarms(5, 6) == pytest.approx(0.071, abs=0.004)


def test_seeds_are_paired_by_their_number():
    entry = {"rounds": [{"accuracy": {"values": [50.0, 60.0]}}]}
    summary = {
        "experiment": "x",
        "arms": {"a": {**entry, "seeds": [0, 1]}, "b": {**entry, "seeds": [1, 2]}},
    }
    difference = minus(verdicts.at(summary, "a", "accuracy"), verdicts.at(summary, "b", "accuracy"))
    assert difference == {1: 10.0}
    with pytest.raises(RunError, match=r"x\.json: has no arm 'c'; there are a, b"):
        verdicts.at(summary, "c", "accuracy")


def test_uniform_ablation_is_compared_at_equal_flops():
    """At 70% of the FLOPs the line from (60, 80) to (100, 90) is at 82.5; at 30% there is none."""

    def arm(line, *points):
        rows = [
            {"sparsity": {"values": [s]}, "pruned_accuracy": {"values": [a]}} for s, a in points
        ]
        return {"line": line, "seeds": [0], "rounds": rows}

    summary = {
        "experiment": "fig4",
        "arms": {
            "retrain": arm("retrain", (0.0, 90.0), (30.0, 81.0)),
            "lr 1": arm("larger lr", (70.0, 10.0)),
            "width 0.8": arm("uniform filter ablation", (0.0, 80.0)),
        },
        "flops_percent": {"retrain": 100.0, "lr 1": 100.0, "width 0.8": 60.0},
    }
    of = next(c.of for c in verdicts.CLAIMS if c.results == "fig4")
    assert of(summary) == {0: pytest.approx(1.5)}


def test_manual_without_a_place_for_the_table_is_refused(tmp_path):
    assert verdicts.in_readme(f"a\n{BEGIN}old{END}\nb", "new\n") == f"a\n{BEGIN}\nnew\n{END}\nb"
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(RunError, match="between which the table goes"):
        verdicts.write(tmp_path, readme)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md"]
