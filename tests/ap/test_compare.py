"""Intervals and verdicts against counted, known and simulated truths."""

import numpy as np
import pytest

from psbn_mmdet.ap import coco_files, compare, evaluate
from psbn_mmdet.ap.compare import BETTER, CHECKPOINTS, METHODS, NOT_SHOWN, WORSE
from tests.helpers.ap import change_json, dataset, measured, two_arms


def test_one_run_per_arm_is_the_paired_t_interval():
    """Twenty images: t with 19 degrees of freedom, on the variance of the draws."""
    from scipy.stats import t

    draws = np.random.default_rng(0).normal(0, 1, (4000, 2))
    m = measured([36.0, 36.5], np.add([36.0, 36.5], draws), images=20)
    d = compare.compare(m, {"bn": [0], "psbn": [1]}).differences[0]
    error = np.sqrt((draws[:, 1] - draws[:, 0]).var())
    half = t.ppf(0.975, 19) * error
    assert d.value[0] == pytest.approx(0.5)
    assert (d.low[0], d.high[0]) == pytest.approx((0.5 - half, 0.5 + half))
    assert d.positive[0] == pytest.approx(t.cdf(0.5 / error, 19))
    # the half-width varies with the resamples by 1 / sqrt(2 B) of itself
    assert d.end_error[0] == pytest.approx(half / np.sqrt(8000))
    assert d.further_seeds is None
    assert "not the seeds" in d.reason
    assert d.scope == CHECKPOINTS


def test_below_the_fewest_images_there_is_a_value_and_nothing_else():
    """At 95% six: of n fair coins all fall alike with 2^(1 - n), 1/16 for five and 1/32 for six."""
    draws = np.add([36.0, 66.0], np.random.default_rng(0).normal(0, 0.1, (200, 2)))
    assert [compare.fewest_images(c) for c in (0.5, 0.9, 0.95, 0.99)] == [2, 5, 6, 8]
    for images, shown in ((5, False), (6, True)):
        m = measured([36.0, 66.0], draws, images)
        c = compare.compare(m, {"bn": [0], "psbn": [1]})
        (d,) = c.differences
        assert d.value[0] == 30
        assert (d.outcome == BETTER) == shown
        for e in (d, *c.arms.values()):
            assert np.isnan([e.low[0], e.high[0], e.positive[0]]).all() != shown
        assert ("5 images with an object are too few for an interval" in d.reason) != shown


def test_draws_vary_as_test_sets_do_not_as_resamples():
    """A class on 2, 1 and no image: off by sqrt(2), by the distance to the mean, not at all."""
    observed = np.array([[0.5, 0.2, np.nan], [0.6, 0.8, np.nan]])
    resampled = np.array([[[0.4, 0.2, np.nan], [0.7, np.nan, np.nan]]])
    got = compare._draws(observed, resampled, [2, 1, 0], np.array([[9.0, 2.0, 9.0]]))
    r = np.sqrt(2)
    want = [[[0.5 - 0.1 * r, 0.2 + 2 * (0.2 - 0.35), np.nan]]]
    want[0].append([0.6 + 0.1 * r, 0.8 + 2 * (0.8 - 0.7), np.nan])
    np.testing.assert_allclose(got, want)
    # a resample without the class says nothing of it
    np.testing.assert_array_equal(
        compare._draws(observed, np.full((1, 2, 3), np.nan), [2, 0, 0], np.ones((1, 3))),
        observed[None],
    )


def test_draws_of_one_class_have_the_variance_of_its_resamples_times_n_over_n_minus_1(tmp_path):
    _, named = dataset(tmp_path, images=8)
    change_json(
        tmp_path / "ann.json", lambda d: [o.update(category_id=1) for o in d["annotations"]]
    )
    for name in named:
        path = tmp_path / name.rpartition("/")[2]
        change_json(path, lambda d: [r.update(category_id=1) for r in d])
    annotations = coco_files.read_annotations(tmp_path / "ann.json")
    results = [coco_files.read_results(n.partition("=")[2], annotations) for n in named]
    m = compare.measure(annotations, results, 60, seed=3)
    plain, _ = evaluate.resample(m.matches["all"], 60, seed=3)
    for column in (0, 3):  # AP and the class
        np.testing.assert_allclose(
            m.draws[..., column].var(0), 1e4 * plain[..., 0, 0].var(0) * 8 / 7, rtol=1e-9
        )
    assert list(m.images) == [8, 8, 8, 8, 0, 0]
    # in two portions they are the same
    two = compare.more_resamples(compare.measure(annotations, results, 25, seed=3), 35, seed=3)
    np.testing.assert_array_equal(two.draws, m.draws)
    np.testing.assert_array_equal(two.curve_resampled, m.curve_resampled)


def test_intervals_end_where_ap_does():
    draws = np.random.default_rng(0).normal(0, 3, (200, 2))
    c = compare.compare(measured([1.0, 99.0], np.add([1.0, 99.0], draws)), {"a": [0], "b": [1]})
    assert (c.arms["a"].low[0], c.arms["b"].high[0]) == (0, 100)
    assert c.differences[0].high[0] == 100


def test_pairing_takes_the_common_part_out():
    shift = np.random.default_rng(0).normal(0, 3, (500, 1))
    m = measured([36.0, 36.5], np.add([36.0, 36.5], shift))
    c = compare.compare(m, {"bn": [0], "psbn": [1]})
    assert c.arms["bn"].high[0] - c.arms["bn"].low[0] > 10
    assert c.differences[0].low[0] == pytest.approx(0.5)
    assert c.differences[0].outcome == BETTER


@pytest.mark.parametrize(
    ("difference", "verdict"), [(3.0, BETTER), (-3.0, WORSE), (0.05, NOT_SHOWN)]
)
def test_verdict(difference, verdict):
    d = two_arms(np.random.default_rng(1), 3, difference, 0.2, 0.1, 0.1)
    assert d.verdict == d.outcome == verdict
    assert (d.low[0] > 0) == (verdict == BETTER) and (d.high[0] < 0) == (verdict == WORSE)


def test_same_results_in_both_arms_show_no_difference():
    draws = np.random.default_rng(0).normal(36, 1, (200, 1))
    m = measured([36.0, 36.0], np.hstack([draws, draws]))
    d = compare.compare(m, {"bn": [0], "psbn": [1]}).differences[0]
    assert (d.value[0], d.low[0], d.high[0], d.positive[0]) == (0, 0, 0, 0.5)
    assert d.outcome == NOT_SHOWN


def test_seeds_alone_give_welchs_interval():
    """With no image noise at all, three runs each: Welch's t interval, which scipy knows."""
    from scipy.stats import ttest_ind

    a, b = np.array([36.0, 36.4, 35.7]), np.array([36.9, 36.5, 37.0])
    m = measured(np.append(a, b), np.tile(np.append(a, b), (20000, 1)))
    d = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3, 4, 5]}).differences[0]
    test = ttest_ind(b, a, equal_var=False)
    if not hasattr(test, "confidence_interval"):
        pytest.skip("needs scipy >= 1.11, whose t-test gives an interval")
    low, high = test.confidence_interval()
    assert d.value[0] == pytest.approx(b.mean() - a.mean())
    assert d.low[0] == pytest.approx(low, abs=0.02 * (high - low))
    assert d.high[0] == pytest.approx(high, abs=0.02 * (high - low))


@pytest.mark.parametrize(
    ("runs", "seed_sd", "own_sd", "shared_sd"),
    [(3, 0.3, 0.05, 0.05), (3, 0.05, 0.15, 0.1), (5, 0.2, 0.1, 0.15), (2, 0.2, 0.1, 0.1)],
)
def test_interval_covers_the_true_difference_of_seeds_and_images(runs, seed_sd, own_sd, shared_sd):
    """Nominal 95%. Binomial sd of 400 draws is 1.1%; estimated variances err to the wide side."""
    rng = np.random.default_rng(0)
    draws = [two_arms(rng, runs, 0.5, seed_sd, own_sd, shared_sd, 300) for _ in range(400)]
    assert np.mean([d.low[0] <= 0.5 <= d.high[0] for d in draws]) >= 0.93
    # and the width is no excuse: at most what t with 2 (runs - 1) degrees of freedom asks for
    from scipy.stats import t

    sd = np.sqrt(2 * (shared_sd**2 + (seed_sd**2 + own_sd**2) / runs))
    assert np.mean([d.high[0] - d.low[0] for d in draws]) < 2 * sd * t.ppf(0.975, runs - 1) * 1.15


def test_image_noise_of_single_runs_is_not_counted_twice():
    """Eight runs per arm that differ by nothing but the images: the images' interval, no more."""
    rng = np.random.default_rng(0)
    draws = [two_arms(rng, 8, 0.5, 0.0, 0.3, 0.0, 300) for _ in range(200)]
    ideal = 2 * 1.96 * np.sqrt(2 * 0.3**2 / 8)
    # counted twice it would be sqrt(2) times as wide
    assert 0.95 < np.mean([d.high[0] - d.low[0] for d in draws]) / ideal < 1.25
    assert np.mean([d.low[0] <= 0.5 <= d.high[0] for d in draws]) >= 0.93


def test_further_seeds_are_as_many_as_a_t_test_needs():
    """No image noise, runs with a spread of 1 in both arms, difference d: a two-sample t-test.

    For d = 1 sd the textbook's answer at 80% power is 17 per arm, so 14 beyond 3.
    """
    spread = np.array([-1.0, 0, 1])  # variance 1
    observed = np.append(36 + spread, 37 + spread)
    m = measured(observed, np.tile(observed, (200, 1)))
    d = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3, 4, 5]}).differences[0]
    assert d.verdict == NOT_SHOWN
    assert d.further_seeds == 14
    assert "14 further seeds per arm" in d.reason


def test_image_noise_of_single_runs_is_averaged_out_by_seeds():
    """Standardised difference 0.5 / sqrt(0.32) = 0.88: the t-test needs 21 or 22 per arm."""
    observed = np.array([36.0, 36.8, 36.5, 37.3])  # variance 0.32 in both arms
    noise = np.random.default_rng(0).normal(0, 0.3, (4000, 4))
    d = compare.compare(
        measured(observed, observed + noise), {"bn": [0, 1], "psbn": [2, 3]}
    ).differences[0]
    # taken for what all runs of an arm share, this noise alone would rule the difference out
    assert 18 <= d.further_seeds <= 22


def test_no_number_of_seeds_helps_where_the_images_are_the_limit():
    rng = np.random.default_rng(0)
    observed = np.array([36.0, 36.01, 36.1, 36.11])
    shared = rng.normal(0, 1, (1000, 2))[:, [0, 0, 1, 1]]
    d = compare.compare(
        measured(observed, observed + shared), {"bn": [0, 1], "psbn": [2, 3]}
    ).differences[0]
    assert d.further_seeds is None
    assert "more images" in d.reason


@pytest.mark.parametrize("difference", [3.0, -3.0, 0.0])
def test_one_run_per_arm_says_nothing_of_the_methods(difference):
    observed = np.array([36.0, 36.0 + difference])
    draws = observed + np.random.default_rng(0).normal(0, 0.1, (400, 2))
    d = compare.compare(measured(observed, draws), {"bn": [0], "psbn": [1]}).differences[0]
    assert d.outcome == {3.0: BETTER, -3.0: WORSE, 0.0: NOT_SHOWN}[difference]
    assert d.scope == CHECKPOINTS and "checkpoint" in d.verdict
    assert d.verdict not in (BETTER, WORSE, NOT_SHOWN)
    assert "not about psbn and bn as methods" in d.reason


def test_an_arm_with_one_run_borrows_no_spread_from_another():
    """Whatever the seeds of the other arm do, the interval is that of the images alone."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2000, 4))
    for spread in (0.0, 5.0):
        observed = np.array([36 - spread, 36.0, 36 + spread, 36.3])
        m = measured(observed, observed + noise)
        c = compare.compare(m, {"bn": [0, 1, 2], "psbn": [3]})
        (d,) = c.differences
        assert d.scope == CHECKPOINTS and d.further_seeds is None
        assert "psbn has one run" in d.reason and "mean of the 3 of bn" in d.reason
        half = 1.959964 * (noise[:, 3] - noise[:, :3].mean(1)).std()
        assert d.low[0] == pytest.approx(0.3 - half, rel=1e-4)
        assert d.high[0] == pytest.approx(0.3 + half, rel=1e-4)
        one = c.arms["psbn"]
        assert one.high[0] - 36.3 == pytest.approx(1.959964 * noise[:, 3].std(), rel=1e-4)


def test_two_runs_in_both_arms_speak_of_the_methods():
    d = two_arms(np.random.default_rng(1), 2, 9.0, 0.05, 0.1, 0.1)
    assert (d.scope, d.verdict) == (METHODS, BETTER)


def test_unequal_runs_give_welchs_interval():
    """Two and five runs, no image noise; the degrees of freedom are held to the smaller of two."""
    from scipy.stats import t

    a, b = np.array([36.0, 37.0]), np.array([36.9, 36.5, 37.0, 37.4, 36.6])
    m = measured(np.append(a, b), np.tile(np.append(a, b), (20000, 1)))
    d = compare.compare(m, {"bn": [0, 1], "psbn": [2, 3, 4, 5, 6]}).differences[0]
    va, vb = a.var(ddof=1) / 2, b.var(ddof=1) / 5
    welch = (va + vb) ** 2 / (va**2 / 1 + vb**2 / 4)
    s2 = (a.var(ddof=1) * 1 + b.var(ddof=1) * 4) / 5
    pooled = (s2 / 2 + s2 / 5) ** 2 / ((s2 / 2) ** 2 / 1 + (s2 / 5) ** 2 / 4)
    half = np.sqrt(va + vb) * t.ppf(0.975, min(welch, pooled))
    assert d.high[0] - d.low[0] == pytest.approx(2 * half, rel=0.03)


def test_paired_seeds_alone_give_the_paired_t_interval():
    """Seeds that both arms share, and no image noise: scipy's t-test of the differences."""
    from scipy.stats import ttest_rel

    a = np.array([30.0, 34.0, 38.0, 33.0])
    b = np.add(a, [0.9, 1.1, 1.3, 0.8])
    m = measured(np.append(a, b), np.tile(np.append(a, b), (100, 1)))
    arms = {"bn": [0, 1, 2, 3], "psbn": [4, 5, 6, 7]}
    d = compare.compare(m, arms, paired=True).differences[0]
    test = ttest_rel(b, a)
    assert (d.low[0], d.high[0]) == pytest.approx(tuple(test.confidence_interval()))
    assert 2 * (1 - d.positive[0]) == pytest.approx(test.pvalue)
    assert d.outcome == BETTER and "paired seeds" in d.reason
    assert compare.compare(m, arms).differences[0].outcome == NOT_SHOWN
    # the order of the runs is what pairs them
    arms["psbn"].reverse()
    assert compare.compare(m, arms, paired=True).differences[0].outcome == NOT_SHOWN


@pytest.mark.parametrize(("n", "m"), [(3, 4), (1, 1)])
def test_pairs_that_are_too_few_or_not_there_are_refused(n, m):
    observed = np.arange(n + m, dtype=float)
    runs = measured(observed, np.tile(observed, (100, 1)))
    arms = {"a": list(range(n)), "b": list(range(n, n + m))}
    with pytest.raises(coco_files.InputError, match=f"b has {m} and a {n}; wanted as many"):
        compare.compare(runs, arms, paired=True)


@pytest.mark.parametrize("correlation", [0.0, 0.83])
def test_paired_intervals_hold(correlation):
    """Of 400 draws the binomial deviation is 1.1%."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        shared, own = rng.normal(size=(1, 4)), rng.normal(size=(2, 4))
        ap = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        ap = (ap + rng.normal(0, 0.3, (2, 4)) + [[36], [37]]).ravel()
        m = measured(ap, ap + rng.normal(0, 0.3, (300, 8)))
        arms = {"a": [0, 1, 2, 3], "b": [4, 5, 6, 7]}
        d = compare.compare(m, arms, paired=True).differences[0]
        held.append(d.low[0] <= 1 <= d.high[0])
    assert np.mean(held) >= 0.925


def test_a_plan_is_the_power_of_the_t_test():
    """A textbook's: sd 1, difference 1, t-test of 17 per arm has 80% power; 64 for 0.5 sd."""
    spread = np.array([-1.0, 0, 1])
    observed = np.append(36 + spread, 37 + spread)
    m = measured(observed, np.tile(observed, (200, 1)))
    (d,) = compare.compare(m, {"a": [0, 1, 2], "b": [3, 4, 5]}).differences
    p = compare.power(d.spread.of(0), 1.0, 0.95, np.array([13, 14]))
    assert p[0] < 0.8 <= p[1]
    p = compare.power(d.spread.of(0), 0.5, 0.95, np.array([60, 61]))
    assert p[0] < 0.8 <= p[1]
    plan = compare.plan(d, 0.95)
    assert (plan.difference, plan.further_seeds[0], plan.images) == (1, 0, [1, 2, 4, 8])
    table = np.array(plan.power)
    assert (np.diff(table, axis=0) > 0).all()  # in further seeds
    np.testing.assert_allclose(table, table[:, :1] * np.ones(4))  # images are no part of it


def test_a_plan_for_checkpoints_is_of_images_alone():
    """Normal noise of deviation 1 on the images: 4 times as many halve it."""
    from scipy.stats import norm

    draws = np.random.default_rng(0).normal([36, 37.4], np.sqrt(0.5), (40000, 2))
    (d,) = compare.compare(measured([36.0, 37.4], draws), {"a": [0], "b": [1]}).differences
    plan = compare.plan(d, 0.95)
    assert plan.further_seeds == [0]
    want = [1 - norm.cdf(1.96 - 1.4 * np.sqrt(f)) for f in plan.images]
    np.testing.assert_allclose(plan.power[0], want, atol=0.01)
    few = measured([36.0, 37.4], draws, images=3)
    (d,) = compare.compare(few, {"a": [0], "b": [1]}).differences
    with pytest.raises(coco_files.InputError, match="--plan: 3 images with an object are too few"):
        compare.plan(d, 0.95)


def test_bands_of_the_curves_are_the_quantiles_about_the_observed():
    rng = np.random.default_rng(0)
    m = measured([36.0, 37.0], rng.normal(36, 1, (400, 2)))
    m.curve[:] = 0.5
    m.curve_resampled[:] = 0.6 + rng.uniform(-0.1, 0.1, (400, 2, 3, 101))
    c = compare.compare(m, {"bn": [0], "psbn": [1]}).curves["psbn"]
    assert (c.value == 0.5).all()
    # of a uniform within 0.1: 95% lie within 0.095 of the middle
    np.testing.assert_allclose(c.low, 0.405, atol=0.02)
    np.testing.assert_allclose(c.high, 0.595, atol=0.02)


def test_nothing_to_measure_is_an_error(tmp_path):
    _, named = dataset(tmp_path, images=4)
    change_json(tmp_path / "ann.json", lambda d: [o.update(iscrowd=1) for o in d["annotations"]])
    annotations = coco_files.read_annotations(tmp_path / "ann.json")
    results = [coco_files.read_results(n.partition("=")[2], annotations) for n in named]
    with pytest.raises(coco_files.InputError, match="nothing to measure"):
        compare.measure(annotations, results)
