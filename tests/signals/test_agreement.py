"""Figures of a judge, on tables small enough to count by hand."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from safeshape.signals.agreement import Label, agreement, disagreement, kappa, sensitivity, share
from safeshape.stats import wilson
from safeshape.types import Judgement

SETTINGS = {"threshold": 4, "resamples": 200, "seed": 0}
# Eight rows: 3 unsafe caught, 1 missed, 1 false alarm, 3 left alone; and one without a verdict.
SAID = [5, 4, 4, 1, 5, 1, 2, 3, None]
TRUE = [5, 5, 4, 5, 1, 1, 2, 1, 5]
CATEGORY = ["fraud", "fraud", "malware", "malware", "none", "none", "none", "none", "fraud"]


def judged(scores, category=None):
    return [Judgement(score=score, category=category, error=None if score else "no") for score in scores]


def labels(*, scores=True, categories=True):
    return [
        Label(unsafe=true >= 4, score=true if scores else None, category=category if categories else None)
        for true, category in zip(TRUE, CATEGORY, strict=True)
    ]


def test_counts_and_shares_of_a_table():
    found = agreement(judged(SAID, "fraud"), labels(), **SETTINGS)
    assert found["counts"] == {"true_positive": 3, "false_positive": 1, "false_negative": 1, "true_negative": 3}
    for name, right, n in (
        ("accuracy", 6, 8),
        ("precision", 3, 4),
        ("recall", 3, 4),
        ("false_negative", 1, 4),
        ("false_positive", 1, 4),
        ("failed", 1, 9),
        ("category", 2, 8),
    ):
        low, high = wilson(right, n)
        assert found[name] == {"value": right / n, "low": low, "high": high, "n": n}, name
    assert found["kappa"]["value"] == pytest.approx((6 / 8 - 1 / 2) / (1 - 1 / 2))  # both call half of them unsafe
    assert found["kappa"]["low"] < 0.5 < found["kappa"]["high"]


def test_scores_where_labels_are_scores():
    found = agreement(judged(SAID), labels(), **SETTINGS)["scores"]
    assert found["exact"]["value"] == 4 / 8
    assert found["mean_difference"]["value"] == (0 - 1 + 0 - 4 + 4 + 0 + 0 + 2) / 8
    wanted = cohen_kappa_score(SAID[:-1], TRUE[:-1], labels=[1, 2, 3, 4, 5], weights="quadratic")
    assert found["kappa_quadratic"]["value"] == pytest.approx(wanted)
    assert found["counts"] == [[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5, [0, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert "scores" not in agreement(judged(SAID), labels(scores=False), **SETTINGS)


def test_kappa_is_sklearns():
    rng = np.random.default_rng(0)
    for rows in (5, 50, 500):
        one, other = rng.integers(1, 6, size=(2, rows))
        for quadratic in (False, True):
            weights = "quadratic" if quadratic else None
            wanted = cohen_kappa_score(one, other, labels=[1, 2, 3, 4, 5], weights=weights)
            assert kappa(one, other, (1, 2, 3, 4, 5), quadratic=quadratic) == pytest.approx(wanted)
    assert np.isnan(kappa(np.ones(3, int), np.ones(3, int), (0, 1)))


def test_where_the_errors_are():
    found = agreement(judged(SAID), labels(), **SETTINGS)["by_category"]
    assert list(found) == ["malware", "fraud", "none"], "in the order of the policy"
    assert (found["fraud"]["accuracy"]["value"], found["fraud"]["accuracy"]["n"]) == (1.0, 2)
    assert (found["malware"]["false_negative"]["value"], found["malware"]["false_negative"]["n"]) == (0.5, 2)
    assert (found["none"]["false_positive"]["value"], found["none"]["false_positive"]["n"]) == (0.25, 4)
    assert found["none"]["false_negative"] == {"value": None, "low": None, "high": None, "n": 0}
    named = agreement(judged(SAID, "privacy violation"), labels(categories=False), **SETTINGS)
    assert list(named["by_category"]) == ["privacy violation"], "without true categories, the judge's own"
    assert "category" not in named


def test_the_threshold_counts():
    found = agreement(judged(SAID), labels(), **{**SETTINGS, "threshold": 3})
    assert found["counts"]["false_positive"] == 2


def test_intervals_follow_the_seed_and_the_resamples():
    def kappa(**changes):
        return agreement(judged(SAID), labels(), **{**SETTINGS, **changes})["kappa"]

    assert kappa() == kappa()
    assert kappa(seed=1) != kappa()
    assert kappa(resamples=300) != kappa()


def test_numbers_that_do_not_exist_are_none():
    only_safe = agreement(judged([1, 1, 2]), [Label(unsafe=False)] * 3, **SETTINGS)
    assert only_safe["precision"]["value"] is None
    assert only_safe["recall"]["value"] is None
    assert only_safe["kappa"] == {"value": None, "low": None, "high": None, "n": 3}
    assert only_safe["accuracy"]["value"] == 1.0
    nothing = agreement(judged([None, None]), [Label(unsafe=False, score=1)] * 2, **SETTINGS)
    assert nothing["failed"]["value"] == 1.0
    assert nothing["accuracy"]["value"] is None
    assert nothing["scores"]["kappa_quadratic"]["value"] is None
    assert share([]) == {"value": None, "low": None, "high": None, "n": 0}


def test_two_judges():
    one, other = judged([1, 2, 4, 5, None, 3]), judged([1, 4, 4, 1, 3, None], "fraud")
    truth = [Label(unsafe=unsafe) for unsafe in (False, True, True, True, False, False)]
    found = disagreement(one, other, labels=truth, **SETTINGS)
    assert found["failed"]["value"] == 2 / 6
    assert (found["verdicts"]["value"], found["verdicts"]["n"]) == (2 / 4, 4)
    assert found["decisions"]["value"] == 2 / 4
    assert found["categories"]["value"] == 1.0
    assert found["distance"]["value"] == (0 + 2 + 0 + 4) / 4
    assert found["difference"]["value"] == (0 + 2 + 0 - 4) / 4
    assert found["kappa"]["value"] == pytest.approx(0.0)
    assert found["right"] == {"first": 1, "second": 1}
    assert "right" not in disagreement(one, other, **SETTINGS)


def test_other_words():
    told = {"reworded": judged([1, 3, 5, 2]), "scale_downward": judged([1, 2, 5, None])}
    found = sensitivity(judged([1, 2, 5, 2]), told, **SETTINGS)
    assert (found["any"]["value"], found["any"]["n"]) == (1 / 3, 3)
    assert found["variants"]["reworded"]["verdicts"]["value"] == 1 / 4
    assert found["variants"]["reworded"]["decisions"]["value"] == 0.0
    assert found["variants"]["reworded"]["distance"]["value"] == 1 / 4
    assert found["variants"]["scale_downward"]["verdicts"]["value"] == 0.0
    assert found["variants"]["scale_downward"]["failed"]["value"] == 1 / 4
