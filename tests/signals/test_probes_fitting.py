"""Fitting: folds without leaks, the fold of standardisation and layer weights, calibration, the choice of layers."""

import json

import numpy as np
import pytest
from conftest import tiny_model
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.preprocessing import StandardScaler

from safeshape.signals.probes import Probe
from safeshape.signals.probes.choosing import Bank, Choice, best_of, candidates, choose, neighbours
from safeshape.signals.probes.fitting import (
    Validated,
    balanced_log_loss,
    calibration_scale,
    cross_validate,
    fit_learned,
    fit_linear,
)
from safeshape.signals.probes.folds import group_folds, near_duplicates, split_share


def blobs(n=120, layers=3, size=4, seed=0, layer=1, strength=2.0):
    """Noise in every layer, and the label in the first feature of one layer."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, layers, size)).astype(np.float32)
    x[:, layer, 0] += strength * labels
    return 5 * x + 7, labels


@pytest.mark.parametrize("layer_pooling", ["concat", "mean"])
def test_the_folded_weights_are_scikit_learns(layer_pooling):
    x, labels = blobs()
    flat = x.reshape(len(x), -1)
    seen = x.mean(1) if layer_pooling == "mean" else flat
    scaler = StandardScaler().fit(seen)
    own = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(seen), labels)
    linear = fit_linear(flat, labels, C=0.1, layer_pooling=layer_pooling, layers=3)
    assert linear.weight_F.shape == (12,)
    assert linear.logits(flat) == pytest.approx(own.decision_function(scaler.transform(seen)), abs=1e-4)


def test_learned_layer_weights_find_the_layer_and_fold_into_one_vector():
    x, labels = blobs(layer=2, strength=4.0)
    linear = fit_learned(x, labels, C=1.0)
    assert sum(linear.layer_weights) == pytest.approx(1)
    assert linear.layer_weights[2] > 0.8
    weight_DH = linear.weight_F.reshape(3, 4)
    # Every layer has the same direction on standardised features, times its weight.
    directions = weight_DH * x.std(0) / np.array(linear.layer_weights)[:, None]
    assert directions[0] == pytest.approx(directions[2], rel=1e-3)
    assert ((linear.logits(x.reshape(len(x), -1)) > 0) == labels).mean() > 0.9
    # With one layer it is scikit-learn's regression.
    one = x[:, 2]
    scaler = StandardScaler().fit(one)
    own = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(scaler.transform(one), labels)
    assert fit_learned(one[:, None], labels, C=1.0).logits(one) == pytest.approx(
        own.decision_function(scaler.transform(one)), abs=1e-3
    )


def test_folds_hold_out_whole_groups_of_both_labels():
    labels = np.array([True] * 6 + [False] * 6)
    groups = ["a", "a", "b", "b", "c", "c", "d", "d", "d", "e", "e", "e"]
    folds = group_folds(labels, groups)
    assert len(folds) == 2  # the harmless have two groups
    for fold in folds:
        held, kept = {groups[r] for r in fold.held_out}, {groups[r] for r in fold.fit}
        assert not held & kept
        assert set(labels[fold.held_out]) == set(labels[fold.fit]) == {True, False}
    assert sorted(np.concatenate([fold.held_out for fold in folds])) == list(range(12))
    # One group of a label: its rows are dealt out.
    assert len(group_folds(labels, ["h"] * 6 + groups[6:])) == 2
    assert len(group_folds(labels, None)) == 5
    with pytest.raises(ValueError, match="group 'd' holds harmful and harmless"):
        group_folds(labels, ["a", "a", "b", "b", "c", "d", *groups[6:]])
    with pytest.raises(ValueError, match="at least two harmless"):
        group_folds(labels[:7], None)


def test_splits_and_near_duplicates():
    mask = split_share(["a"] * 10 + ["b"] * 2 + ["c"], share=0.3, seed=0)
    assert (mask[:10].sum(), mask[10:12].sum(), mask[12]) == (3, 1, False)
    of = ["how do I open the red box today"]
    texts = ["How do I open the red box  today", "how do I open the red box", "how do I paint a wall", ""]
    assert near_duplicates(texts, of).tolist() == [True, True, False, False]  # 8/8, 7/8, 3/11 words
    assert near_duplicates(texts, of, overlap=0.9).tolist() == [True, False, False, False]


def test_cross_validation_takes_the_C_with_the_lowest_held_out_loss():
    x, labels = blobs(n=60, size=30, strength=1.0)
    flat = x.reshape(len(x), -1)
    folds = group_folds(labels, None)
    one = {C: cross_validate(flat, labels, folds, grid=(C,), layer_pooling="concat", layers=3) for C in (1e-3, 1e2)}
    assert one[1e2].loss > one[1e-3].loss  # 90 features and 60 rows: hardly bound, it is sure and wrong
    both = cross_validate(flat, labels, folds, grid=(1e2, 1e-3), layer_pooling="concat", layers=3)
    assert both.C == 1e-3
    assert both.loss == one[1e-3].loss


def test_calibration_scales_and_improves_the_brier_score():
    logits = np.array([4.0, 4.0, 4.0, -4.0, -4.0, -4.0, -4.0, 4.0])
    labels = np.array([True, True, True, True, False, False, False, False])
    scale = calibration_scale(logits, labels)
    assert 4 * scale == pytest.approx(np.log(3), abs=1e-3)  # three in four are right
    assert calibration_scale(np.array([1.0, -1.0]), np.array([True, False])) == 1.0  # separated: nothing to learn
    assert calibration_scale(-logits, labels) == pytest.approx(0.01, rel=0.01)  # wrong way round: p becomes 0.5
    # Rows of known kinds are all right: seven of eight together.
    both = calibration_scale(logits, labels, known=np.where(labels, 4.0, -4.0))
    assert 4 * both == pytest.approx(np.log(7), abs=1e-3)
    x, labels = blobs(n=400, size=60, strength=1.5)
    bank = Bank(states_BPDH=x[:, None], poolings=("last",), places=(0, 1, 2))
    rows, test = np.arange(200), np.arange(200, 400)
    option = Choice(pooling="last", layers=(0, 1, 2))
    scores = {}
    for calibrate in (True, False):
        made = choose(bank, labels[rows], None, rows=rows, options=[option], grid=(10.0,), calibrate=calibrate)
        p = 1 / (1 + np.exp(-made.linear.logits(bank.take(option, test))))
        scores[calibrate] = brier_score_loss(labels[test], p)
    assert scores[True] < scores[False] - 0.02


def test_the_layer_is_chosen_by_what_groups_that_were_left_out_say():
    """Layer 0 tells the known kinds apart perfectly and is wrong on others; layer 1 is weaker and holds everywhere."""
    rng = np.random.default_rng(0)
    labels = np.array([True] * 80 + [False] * 80)
    groups = [f"{'h' if label else 's'}{row % 4}" for row, label in enumerate(labels)]
    codes = {name: rng.normal(size=8) for name in sorted(set(groups))}
    x = rng.normal(size=(160, 1, 2, 8)).astype(np.float32)
    x[:, 0, 0] = 0.1 * x[:, 0, 0] + np.array([codes[g] for g in groups])
    x[:, 0, 1, 0] += 2.5 * labels
    bank = Bank(states_BPDH=x, poolings=("last",), places=(0, 1))
    singles = candidates(bank)[:2]
    assert choose(bank, labels, groups, options=singles).choice.layers == (1,)
    assert choose(bank, labels, None, options=singles).choice.layers == (0,)  # in distribution the other one wins
    report = choose(bank, labels, groups, options=singles).report
    assert [entry["layers"] for entry in report["tried"]] == [(0,), (1,)]
    assert neighbours(bank, Choice(pooling="last", layers=(1,)))[0].layers == (0, 1)
    assert neighbours(bank, candidates(bank)[2]) == []


def test_auroc_decides_and_the_loss_breaks_ties():
    def tried(layer, auroc, loss):
        return Choice(pooling="last", layers=(layer,)), Validated(C=1.0, loss=loss, auroc=auroc, logits=np.zeros(1))

    assert best_of([tried(0, 0.90, 0.1), tried(1, 0.95, 0.5), tried(2, 0.951, 0.6)]).layers == (1,)


def test_nothing_but_the_given_rows_decides():
    x, labels = blobs()
    states = x[:, None]
    rows = np.arange(0, 80)
    made = choose(Bank(states_BPDH=states, poolings=("last",), places=(0, 1, 2)), labels[rows], None, rows=rows)
    ruined = states.copy()
    ruined[80:] = 1e6
    again = choose(Bank(states_BPDH=ruined, poolings=("last",), places=(0, 1, 2)), labels[rows], None, rows=rows)
    assert np.array_equal(made.linear.weight_F, again.linear.weight_F)
    assert (made.choice, made.C, made.scale) == (again.choice, again.C, again.scale)


def test_balanced_log_loss_by_hand():
    logits, labels = np.zeros(4), np.array([True, False, False, False])
    assert balanced_log_loss(logits, labels) == pytest.approx(np.log(2))
    assert balanced_log_loss(np.array([50.0, 0, 0, 0]), labels) == pytest.approx(np.log(2) / 2)


WORDS = [f"{first} {second}" for first in ("fox", "unsafe") for second in "one two three four five six".split()]
LABELS = [False] * 6 + [True] * 6


@pytest.mark.parametrize(
    "options",
    [
        {"layers": "all", "layer_pooling": "mean"},
        {"layers": (0, -1), "layer_pooling": "learned"},
        {"layers": "auto", "pooling": "auto", "groups": [f"{w[0]}{i % 3}" for i, w in enumerate(WORDS)]},
    ],
    ids=["mean", "learned", "auto"],
)
def test_every_kind_of_probe_survives_saving(tmp_path, tokenizer, options):
    model = tiny_model()
    probe = Probe.fit(WORDS, LABELS, model=model, tokenizer=tokenizer, **options)
    probe.save_pretrained(tmp_path)
    again = Probe.from_pretrained(tmp_path, model=model, tokenizer=tokenizer)
    assert again.p_safe(WORDS) == probe.p_safe(WORDS)
    assert again.identity() == probe.identity()
    assert json.loads(json.dumps(dict(probe.card))) == again.card
    assert (again.card["harmful"], again.card["harmless"]) == (6, 6)
    assert len(probe.weight_F) == 32 * len(probe.layers)
    assert Probe.from_pretrained(tmp_path, weights_only=True).fingerprint() == probe.fingerprint()
    settings = json.loads((tmp_path / "probe.json").read_text())
    (tmp_path / "probe.json").write_text(json.dumps({**settings, "layers": [1] * len(probe.layers)}))
    with pytest.raises(ValueError, match="do not belong together"):
        Probe.from_pretrained(tmp_path, weights_only=True)


def test_the_mean_over_layers_scores_like_a_probe_on_the_mean(tokenizer):
    from safeshape.signals.probes import features

    model = tiny_model()
    settings = {"model": model, "tokenizer": tokenizer}
    probe = Probe.fit(WORDS, LABELS, **settings, layers=(0, 1, 2), layer_pooling="mean", C=0.1, calibrate=False)
    x = features(WORDS, **settings, layers=(0, 1, 2), layer_pooling="mean")
    scaler = StandardScaler().fit(x)
    own = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(x), LABELS).predict_proba(scaler.transform(x))
    assert probe.p_safe(WORDS) == pytest.approx(own[:, 0].tolist(), abs=1e-4)


def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer):
    given = {"model": tiny_model(), "tokenizer": tokenizer}
    for options, message in [
        ({"layers": "auto"}, "layers auto needs groups"),
        ({"layers": "some"}, "layers must be numbers, all or auto"),
        ({"pooling": "first"}, "pooling must be last, mean or auto"),
        ({"layer_pooling": "sum"}, "layer_pooling must be one of concat, mean, learned"),
        ({"C": 0.0}, "C must be above 0"),
        ({"groups": ["a"]}, "12 prompts but 1 groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            Probe.fit(WORDS, LABELS, **given, **options)
    with pytest.raises(ValueError, match=r"holds no probe: there is no probe\.json"):
        Probe.from_pretrained(tmp_path / "nothing")


def test_calibration_hears_known_and_unknown_kinds_alike():
    x, labels = blobs(n=200, size=10, strength=1.0)
    groups = [f"{'h' if label else 's'}{row % 5}" for row, label in enumerate(labels)]
    bank = Bank(states_BPDH=x[:, None], poolings=("last",), places=(0, 1, 2))
    option = Choice(pooling="last", layers=(1,))
    made = choose(bank, labels, groups, options=[option], grid=(0.1,))
    known = cross_validate(
        bank.take(option), labels, group_folds(labels, None), grid=(0.1,), layer_pooling="concat", layers=1
    )
    assert made.scale == calibration_scale(made.oof_logits, labels, known=known.logits)
    assert made.scale != pytest.approx(calibration_scale(made.oof_logits, labels), rel=1e-3)
