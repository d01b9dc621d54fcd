"""Temperature, conformal threshold and the figures of calibrated scores, against closed forms and simulation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from safeshape.signals.calibration import (
    Calibration,
    calibrated,
    conformal_rank,
    conformal_threshold,
    false_negative_upper,
    fit_temperature,
    identity,
    scale,
)
from safeshape.signals.reliability import (
    Labelled,
    auroc,
    by_position,
    calibrated_items,
    calibration_error,
    error_rates,
    fit,
    labelled,
    measure,
    quality,
    reliability_bins,
    split,
)
from safeshape.stats import wilson
from safeshape.types import Score, Span

SCORER = {"guard": "g", "model": "m", "revision": "main", "chunk": 5, "unit": "words"}


def draw(n, temperature, seed=0):
    """Scores whose logits are `temperature` times those that the labels were drawn from."""
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(0, 2, size=n)
    unsafe = rng.random(n) > expit(true_logits)
    return expit(temperature * true_logits), unsafe


def calibration(**changes):
    content = {
        "temperature": 2.0,
        "threshold": 0.6,
        "alpha": 0.1,
        "by": "last",
        "n": 40,
        "n_unsafe": 20,
        "false_negative_upper": 0.2,
        "scorer": SCORER,
        "data_sha256": "d",
        "figures": {"x": 1},
    }
    return Calibration(**{**content, **changes})


def score(*values, scorer=SCORER):
    spans = tuple(Span(start=i, end=i + 1, p_safe=p) for i, p in enumerate(values))
    return Score(signal="star", p_safe=values[-1], spans=spans, scorer=scorer)


def item(*values, unsafe=False, spans=None):
    return Labelled(answer="x" * len(values), score=score(*values), unsafe=unsafe, span_unsafe=spans)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_synthetic_logits_is_recovered(temperature):
    assert fit_temperature(*draw(40_000, temperature)) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_is_the_one_that_sklearn_finds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 1))
    y = rng.random(500) < expit(x[:, 0])
    over_confident = LogisticRegression().fit(x, y)
    over_confident.coef_ = 2.5 * over_confident.coef_  # no score so certain that ours would be clipped
    theirs = CalibratedClassifierCV(FrozenEstimator(over_confident), method="temperature").fit(x, y)
    p_safe = over_confident.predict_proba(x)[:, 1]
    ours = scale(p_safe, fit_temperature(p_safe, ~y))
    np.testing.assert_allclose(ours, theirs.predict_proba(x)[:, 1], atol=1e-5)


def test_two_scores_have_a_temperature_that_can_be_solved_by_hand():
    # Three of four at p = 0.9 are safe: the likelihood is highest where the calibrated score is 3/4.
    found = fit_temperature(np.full(4, 0.9), np.array([False, False, False, True]))
    assert found == pytest.approx(math.log(9) / math.log(3), rel=1e-5)
    assert scale(np.array(0.9), found) == pytest.approx(0.75)


def test_saturated_scores_are_softened_and_temperature_one_changes_nothing():
    assert scale(np.array([0.0, 1.0]), 2.0) == pytest.approx([2.0**-12, 1 - 2.0**-12], rel=1e-3)
    p_safe = np.linspace(0.001, 0.999, 99)
    np.testing.assert_allclose(scale(p_safe, 1.0), p_safe)
    assert np.all(np.diff(scale(p_safe, 7.0)) > 0)


def test_data_without_a_best_temperature_are_told_apart():
    assert fit_temperature(np.array([0.9, 0.8, 0.1]), np.array([False, False, True])) is None
    with pytest.raises(ValueError, match="do not follow the labels"):
        fit_temperature(np.array([0.9, 0.8, 0.1]), np.array([True, True, False]))
    with pytest.raises(ValueError, match="safe and unsafe"):
        fit_temperature(np.array([0.9, 0.8]), np.array([True, True]))


@pytest.mark.parametrize(
    ("n", "alpha", "rank"),
    [(19, 0.05, 19), (20, 0.05, 20), (38, 0.05, 38), (39, 0.05, 38), (9, 0.1, 9), (9, 0.3, 7), (10, 0.5, 6)],
)
def test_the_rank_is_the_ceiling_of_n_plus_one_times_one_minus_alpha(n, alpha, rank):
    assert conformal_rank(n, alpha) == rank
    assert conformal_threshold(np.arange(n)[::-1] / 100, alpha) == (rank - 1) / 100


@pytest.mark.parametrize(("n", "alpha", "least"), [(18, 0.05, 19), (0, 0.5, 1), (98, 0.01, 99), (2, 0.3, 3)])
def test_too_few_unsafe_rows_are_refused_with_the_number_needed(n, alpha, least):
    with pytest.raises(ValueError, match=f"at least {least} unsafe rows to calibrate on, there are {n}"):
        conformal_rank(n, alpha)
    assert conformal_rank(least, alpha) == least


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 2.0])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        conformal_rank(100, alpha)


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (30, 0.1), (101, 0.2)])
def test_the_threshold_misses_at_most_alpha_and_not_much_less(n, alpha):
    # For continuous scores the expected miss rate is exactly (n + 1 - rank) / (n + 1); 20,000 draws know it to 0.003.
    rng = np.random.default_rng(0)
    drawn = rng.beta(0.5, 2, size=(20_000, n + 1))
    thresholds = np.array([conformal_threshold(values[:n], alpha) for values in drawn])
    missed = float((drawn[:, n] > thresholds).mean())
    exact = (n + 1 - conformal_rank(n, alpha)) / (n + 1)
    assert missed == pytest.approx(exact, abs=0.01)
    assert exact <= alpha + 1e-12


def test_the_upper_rate_is_the_one_of_a_beta_and_holds_in_simulation():
    assert false_negative_upper(19, 0.05) == pytest.approx(1 - 0.05 ** (1 / 19))
    rng = np.random.default_rng(0)
    rates = 1 - np.array([conformal_threshold(rng.random(40), 0.1) for _ in range(5000)])
    assert (rates <= false_negative_upper(40, 0.1)).mean() == pytest.approx(0.95, abs=0.01)


def test_a_temperature_fitted_on_the_same_rows_flags_the_same_answers():
    p_safe, unsafe = draw(300, 3.0)
    raw = conformal_threshold(p_safe[unsafe], 0.1)
    temperature = fit_temperature(p_safe, unsafe)
    after = conformal_threshold(scale(p_safe[unsafe], temperature), 0.1)
    np.testing.assert_array_equal(p_safe <= raw, scale(p_safe, temperature) <= after)


def test_scores_are_mapped_and_say_by_what():
    first = calibration()
    (found,) = calibrated([score(0.9, 0.1)], first)
    assert found.p_safe == pytest.approx(expit(logit(0.1) / 2))
    assert [span.p_safe for span in found.spans] == pytest.approx([0.75, 0.25])
    assert [(span.start, span.end) for span in found.spans] == [(0, 1), (1, 2)]
    assert found.scorer == {**SCORER, "calibration": first.sha256}


def test_failures_stay_failures():
    failed = Score(signal="star", p_safe=None, scorer=SCORER, error="timeout")
    (found,) = calibrated([failed], calibration())
    assert found.p_safe is None
    assert found.error == "timeout"
    assert found.scorer["calibration"]


@pytest.mark.parametrize(("field", "value"), [("model", "other"), ("guard", "other"), ("chunk", 6), ("sharpen", True)])
def test_scores_of_another_guard_are_refused(field, value):
    scores = [score(0.5), score(0.5, scorer={**SCORER, field: value})]
    with pytest.raises(ValueError, match=f"row 1: the calibration is for scores with {field}"):
        list(calibrated(scores, calibration()))


def test_scores_are_not_calibrated_twice():
    once = list(calibrated([score(0.5)], calibration()))
    with pytest.raises(ValueError, match="row 0: the scores are calibrated already"):
        list(calibrated(once, calibration()))


def test_storage_does_not_change_an_identity():
    assert identity({"a": 1, "b": None, "c": (1, 2), "d": {"e": None}}) == {"a": 1, "c": [1, 2], "d": {}}
    assert calibration(scorer={**SCORER, "extra": None}).check(SCORER) is None


def test_a_file_gives_back_what_was_saved(tmp_path):
    first = calibration()
    first.save(tmp_path / "c.json")
    assert Calibration.from_file(tmp_path / "c.json") == first


def test_the_hash_is_about_what_was_fitted_not_about_the_figures():
    assert replace(calibration(), figures={}).sha256 == calibration().sha256
    for change in ({"temperature": 2.5}, {"threshold": 0.61}, {"scorer": {**SCORER, "chunk": 6}}, {"data_sha256": "e"}):
        assert calibration(**change).sha256 != calibration().sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"temperature": -1}, "temperature must lie"),
        ({"threshold": 1.5}, "threshold must be a number in"),
        ({"by": "mean"}, "by must be last or min"),
        ({"temperature": 2.1}, "was changed after it was written"),
        ({"colour": 1}, "is not a calibration: got an unexpected"),
    ],
)
def test_files_that_are_not_calibrations_are_refused(tmp_path, change, message):
    path = tmp_path / "c.json"
    calibration().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Calibration.from_file(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        Calibration.from_file(path)
    with pytest.raises(ValueError, match="cannot read"):
        Calibration.from_file(tmp_path / "none.json")


def test_calibration_error_of_two_bins_by_hand():
    # Lower half: mean 0.2, 1 of 2 safe; upper half: mean 0.9, 2 of 2 safe. (2 * 0.3 + 2 * 0.1) / 4.
    p_safe, unsafe = np.array([0.1, 0.3, 0.85, 0.95]), np.array([True, False, False, False])
    assert calibration_error(p_safe, unsafe, bins=2) == pytest.approx(0.2)
    assert [found["n"] for found in reliability_bins(p_safe, unsafe, bins=2)] == [2, 2]
    assert reliability_bins(p_safe, unsafe, bins=2)[0]["safe"] == 0.5
    low, high = wilson(1, 2)
    assert (reliability_bins(p_safe, unsafe, bins=2)[0]["low"], high) == (low, high)


def test_bins_are_the_quantile_bins_of_sklearn_and_error_is_their_weighted_gap():
    p_safe, unsafe = draw(997, 2.0)
    p_safe[100:150] = 0.5  # ties share a bin
    share, mean = calibration_curve(~unsafe, p_safe, n_bins=10, strategy="quantile")
    found = reliability_bins(p_safe, unsafe)
    np.testing.assert_allclose([each["safe"] for each in found], share)
    np.testing.assert_allclose([each["p_safe"] for each in found], mean)
    weights = np.array([each["n"] for each in found]) / 997
    assert calibration_error(p_safe, unsafe) == pytest.approx(float((weights * np.abs(share - mean)).sum()))


def test_auroc_is_that_of_sklearn_with_ties():
    p_safe, unsafe = draw(300, 1.0)
    p_safe = p_safe.round(1)
    assert auroc(p_safe, unsafe) == pytest.approx(roc_auc_score(~unsafe, p_safe))
    assert math.isnan(auroc(p_safe, np.zeros(300, dtype=bool)))


def test_quality_resamples_answers_with_all_their_spans():
    # Both spans of an answer are equal, so intervals over answers must equal those over one span each.
    p_safe, unsafe = draw(120, 2.0)
    one = [(np.array([p]), np.array([label])) for p, label in zip(p_safe, unsafe, strict=True)]
    two = [(np.repeat(p, 2), np.repeat(label, 2)) for p, label in one]
    first, second = quality(one, unsafe), quality(two, unsafe)
    assert second["n"] == 2 * first["n"]
    assert second["auroc"] == pytest.approx(first["auroc"])
    assert first["auroc"]["low"] < first["auroc"]["value"] < first["auroc"]["high"]


def test_error_rates_by_hand():
    found = error_rates([(0.2, True), (0.8, True), (0.7, False), (0.4, False), (0.9, False)], lambda p: p < 0.5)
    assert found["false_negative"]["value"] == 0.5
    assert found["false_negative"]["n"] == 2
    assert (found["false_positive"]["low"], found["false_positive"]["high"]) == wilson(1, 3)
    assert error_rates([(0.2, True)], lambda p: True)["false_positive"] == {
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
    }


def test_positions_are_deciles_or_chunks_and_an_answer_counts_once_at_each():
    items = [item(0.9, 0.1, unsafe=True), item(0.9, 0.9, 0.2, 0.9)]
    chunks = by_position(items, "chunks", lambda p: p < 0.5)
    assert [found["position"] for found in chunks] == ["1", "2", "3", "4"]
    assert [found["false_negative"]["value"] for found in chunks] == [1.0, 0.0, None, None]
    assert [found["false_positive"]["value"] for found in chunks] == [0.0, 0.0, 1.0, 0.0]
    deciles = by_position(items, "deciles", lambda p: p < 0.5)
    assert [found["position"] for found in deciles] == [f"{10 * i}%" for i in range(1, 11)]
    assert [found["false_negative"]["value"] for found in deciles] == [1.0] * 5 + [0.0] * 5
    assert [found["false_positive"]["value"] for found in deciles] == [0.0] * 5 + [1.0] * 2 + [0.0] * 3


def test_span_labels_are_counted_where_they_are_given():
    late = item(0.9, 0.1, unsafe=True, spans=(False, True))
    found = by_position([late], "chunks", lambda p: p < 0.5)
    assert [each["false_negative"]["n"] for each in found] == [0, 1]
    assert [each["false_positive"]["value"] for each in found] == [0.0, None]


def test_by_changes_the_score_of_an_answer():
    items = [item(0.1, 0.9, unsafe=kind) for kind in (True, True, False, False)]
    rates = [
        measure(items, by=by, flag=lambda p: p < 0.5)["rates"]["false_negative"]["value"] for by in ("last", "min")
    ]
    assert rates == [1.0, 0.0]


def test_a_fit_uses_span_labels_for_the_temperature_and_answers_for_the_threshold():
    p_safe, unsafe = draw(400, 3.0)
    items = [item(p, p, unsafe=bool(u)) for p, u in zip(p_safe, unsafe, strict=True)]
    found, has_temperature = fit(items, alpha=0.1, by="last", scorer=SCORER, data_sha256="d")
    assert has_temperature
    assert found.temperature == pytest.approx(fit_temperature(p_safe, unsafe))
    assert found.threshold == conformal_threshold(scale(p_safe[unsafe], found.temperature), 0.1)
    assert (found.n, found.n_unsafe) == (400, int(unsafe.sum()))
    assert found.flags(found.threshold)
    assert not found.flags(found.threshold + 1e-9)
    spanned = [replace(each, span_unsafe=(False, each.unsafe)) for each in items]
    other, _ = fit(spanned, alpha=0.1, by="last", scorer=SCORER, data_sha256="d")
    doubled = np.concatenate([p_safe, p_safe]), np.concatenate([np.zeros(400, dtype=bool), unsafe])
    assert other.temperature == pytest.approx(fit_temperature(*doubled))
    assert other.temperature != pytest.approx(found.temperature, rel=0.01)


def test_calibrated_items_are_mapped_everywhere():
    (found,) = calibrated_items([item(0.9, 0.1)], calibration())
    assert found.score.p_safe == pytest.approx(0.25)
    assert [span.p_safe for span in found.score.spans] == pytest.approx([0.75, 0.25])


def test_the_split_is_stratified_seeded_and_whole():
    items = [item(i / 100, unsafe=i < 20) for i in range(100)]
    fitted_on, held_out = split(items, share=0.5, seed=0)
    assert sum(each.unsafe for each in fitted_on) == sum(each.unsafe for each in held_out) == 10
    assert sorted(each.score.p_safe for each in fitted_on + held_out) == [i / 100 for i in range(100)]
    assert split(items, share=0.5, seed=1)[0] != fitted_on
    assert len(split(items, share=0.3, seed=0)[0]) == 30
    with pytest.raises(ValueError, match="unsafe rows to fit on and at least two held out; there are 2 in all"):
        split(items[18:], share=0.5, seed=0)


def labelled_row(label, spans=None, p_safe=0.5):
    safety = {"p_safe": p_safe, "spans": [{"start": 0, "end": 1, "p_safe": 0.9}, {"start": 1, "end": 3, "p_safe": 0.5}]}
    return {"prompt": "q", "completion": "abc", "unsafe": label, "spans": spans, "safety": safety}


def test_labels_are_read_and_rows_without_are_counted():
    failed = {**labelled_row(True), "safety": {"p_safe": None, "error": "timeout"}}
    rows = [labelled_row(True), labelled_row(0), labelled_row(None), failed]
    items, left_out = labelled(rows, label_column="unsafe", span_labels=None)
    assert [each.unsafe for each in items] == [True, False]
    assert left_out == {"failed": 1, "unlabelled": 1}


@pytest.mark.parametrize(
    "spans", [[False, True], [{"start": 0, "end": 1, "unsafe": False}, {"start": 1, "end": 9, "unsafe": True}]]
)
def test_span_labels_are_booleans_or_ranges(spans):
    items, _ = labelled([labelled_row(True, spans)], label_column="unsafe", span_labels="spans")
    assert items[0].span_unsafe == (False, True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (labelled_row("yes", [True, True]), "row 0: unsafe must be true"),
        (labelled_row(True, [True]), "row 0: spans has 1 labels for 2 spans"),
        (labelled_row(True, None), "row 0: spans must be a list"),
        (labelled_row(True, [{"start": 0, "end": 1, "unsafe": False}]), "0 ranges that hold the end of span 3"),
        ({"prompt": "q"}, "row 0: has no column 'unsafe'"),
    ],
)
def test_bad_labels_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        labelled([row], label_column="unsafe", span_labels="spans")
