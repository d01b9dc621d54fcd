"""Measuring probes: nothing left out is looked at, controls are what they say, the template trap is shown."""

from pathlib import Path

import numpy as np
import pytest
from conftest import byte_bpe, tiny_model
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from safeshape import world
from safeshape.config import PromptSet
from safeshape.signals.probes import extract, load_model, open_reader
from safeshape.signals.probes.choosing import Bank, Choice
from safeshape.signals.probes.evaluation import evaluate, measured, shuffled_control, summary
from safeshape.signals.probes.fitting import fit_linear
from safeshape.signals.probes.folds import Fold, group_folds
from safeshape.signals.probes.methods import BagOfWords, ProbeMethod, Settings, Verdict
from safeshape.signals.probes.protocol import Labelled, units
from safeshape.signals.probes.sweep import attribution, by_parts, fold_interval, sweep
from safeshape.signals.probes.template import template_check, with_system
from safeshape.signals.reliability import auroc
from safeshape.verbs.probe_data import groups_of, labelled


def made(sizes=(("h1", True, 40), ("h2", True, 30), ("s1", False, 40), ("s2", False, 30)), test=()):
    """Prompts of distinct words; categories in h1; `test`: sets of one family that are only tested on."""
    rows = [(name, label, i, True) for name, label, n in sizes for i in range(n)]
    rows += [(name, label, i, False) for name, label in test for i in range(10)]
    texts = [f"{name}x{i} {'bad' if label else 'good'} word{i % 7} {name}y{i}" for name, label, i, _ in rows]
    return Labelled(
        prompts=texts,
        texts=texts,
        labels=np.array([label for _, label, _, _ in rows]),
        datasets=[name for name, *_ in rows],
        families=[name if trains else "twins" for name, _, _, trains in rows],
        categories=["even" if i % 2 else "odd" for name, _, i, _ in rows],
        trains=np.array([trains for *_, trains in rows]),
    )


class Spy:
    """Random log odds; remembers what it was given."""

    def __init__(self):
        self.calls = []

    def run(self, fit, asked, settings=None):
        self.calls.append((fit, asked, settings))
        rng = np.random.default_rng(len(asked))
        logits = rng.normal(size=len(asked))
        return Verdict(logits=logits, raw=2 * logits, settings=settings or Settings(C=float(len(self.calls))))


def test_what_is_left_out_is_never_seen(monkeypatch):
    monkeypatch.setattr("safeshape.signals.probes.evaluation.bootstrap", lambda *_, **__: (0.0, 1.0))  # slow, not asked
    data, spy, bag = made(test=(("t1", True), ("t2", False))), Spy(), Spy()
    rows = evaluate(data, spy, bag)
    datasets, names = np.array(data.datasets), [row["name"] for row in rows]
    assert names[:6] == ["in distribution", "h1", "h2", "s1", "s2", "twins"]
    assert [row["kind"] for row in rows[:6]] == ["in distribution", *["data set left out"] * 4, "test set"]
    assert {"h1: odd", "h1: even"} <= set(names)
    for (fit, asked, settings), (bag_fit, bag_asked, _), row in zip(spy.calls, bag.calls, rows, strict=True):
        assert not set(fit) & set(asked)
        assert np.array_equal(fit, bag_fit)  # the control sees the same rows
        assert np.array_equal(asked, bag_asked)
        assert data.trains[fit].all()
        assert set(data.labels[asked]) == {True, False}
        if row["kind"] == "data set left out":
            assert row["name"] not in datasets[fit]
            assert (datasets[asked] == row["name"]).sum() == (datasets == row["name"]).sum()
            assert settings is None  # everything is chosen anew
        if row["kind"] == "category left out":
            # What was chosen for the whole set left out is used: that choice never saw the category.
            assert 1 + names.index(row["name"].split(":")[0]) == settings.C
            name, category = row["name"].split(": ")
            assert {data.categories[i] for i in asked if datasets[i] == name} == {category}
            assert not [i for i in fit if datasets[i] == name and data.categories[i] == category]
    counterpart = spy.calls[1][1]
    assert (datasets[counterpart] == "s1").sum() == 12  # 30 % of 40, held out of the fit
    assert (datasets[counterpart] == "s2").sum() == 9


def test_near_duplicates_of_what_is_scored_are_not_fitted_on():
    data = made()
    texts = list(data.texts)
    copy = data.datasets.index("h2")
    texts[copy] = texts[0]  # h2 borrows a prompt of h1
    again = Labelled(**{**vars(data), "texts": texts, "prompts": texts})
    for before, after in zip(units(data), units(again), strict=True):
        if after.name == "h1":
            assert copy in before.fit
            assert copy not in after.fit
            assert (before.dropped, after.dropped) == (0, 1)


def test_one_unit_by_hand():
    labels = np.array([True, True, True, False, False, False])
    logits = np.array([2.0, 1.0, -1.0, 0.5, -2.0, -3.0])
    verdict = Verdict(logits=logits, raw=2 * logits, settings=Settings(C=1.0))
    own = np.array([True, True, True, True, False, True])
    found = measured(verdict, labels, own, 0.5, 0)
    assert found["auroc"]["value"] == pytest.approx(8 / 9)
    assert found["harmful_flagged"]["value"] == pytest.approx(2 / 3)
    assert (found["harmless_flagged"]["value"], found["harmless_flagged"]["n"]) == (0.5, 2)
    assert found["harmless_flagged_at_recall"] == 0.5  # all three harmful are flagged at 80 %: log odds of -1 and more
    assert found["brier"] == pytest.approx(brier_score_loss(labels, expit(logits)))
    assert found["brier_uncalibrated"] == pytest.approx(brier_score_loss(labels, expit(2 * logits)))
    lower = measured(verdict, labels, own, 0.2, 0)  # p_safe below 0.2: log odds above 1.39
    assert lower["harmful_flagged"]["value"] == pytest.approx(1 / 3)


def test_the_bag_of_words_is_scikit_learns():
    data = made()
    rows = np.arange(len(data.texts))
    fit, asked = rows[::2], rows[1::2]
    bag = BagOfWords(texts=data.texts, labels=data.labels, groups=data.datasets, grid=(1.0,))
    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    own = LogisticRegression(C=1.0, max_iter=1000).fit(
        words.fit_transform([data.texts[i] for i in fit]), data.labels[fit]
    )
    expected = own.decision_function(words.transform([data.texts[i] for i in asked]))
    verdict = bag.run(fit, asked)
    assert verdict.raw == pytest.approx(expected)
    assert bag.score(fit, asked) == pytest.approx(expected)
    assert roc_auc_score(data.labels[asked], verdict.logits) == pytest.approx(1.0)


def random_bank(n, label_strength=0.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, 1, 2, 6)).astype(np.float32)
    x[:, 0, 1, 0] += label_strength * labels
    return Bank(states_BPDH=x, poolings=("last",), places=(0, 1)), labels


def test_shuffled_labels_teach_nothing():
    data = made(sizes=(("h", True, 200), ("s", False, 200)))
    bank, _ = random_bank(400)
    bank.states_BPDH[:, 0, 1, 0] += 3 * data.labels
    probe = ProbeMethod(bank=bank, labels=data.labels, groups=data.datasets, grid=(0.1,))
    control = shuffled_control(data, probe)
    assert 0.4 < control["mean"] < 0.6
    assert control["lowest"] < control["mean"] < control["highest"]
    first = next(units(data))
    assert auroc(-probe.run(first.fit, first.asked).logits, data.labels[first.asked]) > 0.95


def test_given_settings_are_used_and_chosen_ones_are_reported():
    bank, labels = random_bank(80, 3.0)
    probe = ProbeMethod(bank=bank, labels=labels, groups=["ab"[int(v)] for v in labels], grid=(0.01, 1.0))
    rows = np.arange(80)
    given = Settings(C=0.01, choice=Choice(pooling="last", layers=(0,)))
    verdict = probe.run(rows[:60], rows[60:], given)
    assert verdict.settings == given
    raw = fit_linear(bank.take(given.choice, rows[:60]), labels[:60], C=0.01, layer_pooling="concat", layers=1)
    assert verdict.raw == pytest.approx(raw.logits(bank.take(given.choice, rows[60:])), abs=1e-5)
    assert 1 in probe.run(rows[:60], rows[60:]).settings.choice.layers  # the layer with the label in it


def test_the_sweep_finds_the_layer():
    bank, labels = random_bank(120, 3.0)
    groups = [f"{int(label)}{i % 6}" for i, label in enumerate(labels)]
    split = Fold(fit=np.arange(80), held_out=np.arange(80, 120))
    found = sweep(bank, labels, split, group_folds(labels, groups))
    layers = found["layers"]
    assert layers[1]["in_distribution"]["value"] > 0.9 > 0.7 > layers[0]["in_distribution"]["value"]
    assert layers[1]["left_out"]["low"] < layers[1]["left_out"]["value"] <= layers[1]["left_out"]["high"]
    assert [entry["layer_pooling"] for entry in found["poolings"]] == ["concat", "mean", "learned"]
    low, high = fold_interval([np.array([3.0, 2.0, 1.0, 0.0])], [np.array([True, True, False, False])])
    assert (low, high) == (1.0, 1.0)


def test_attribution_adds_up_to_the_log_odds():
    model, tokenizer = tiny_model(), byte_bpe()
    reader = open_reader(model, tokenizer)
    prompts, layers = ["one two", "the quick brown fox jumps"] * 4, (0, 1, 2)
    labels = np.array([True, False] * 4)
    states = extract(prompts, reader, layers=layers, poolings=("mean",))
    x = states.reshape(8, -1)
    linear = fit_linear(x, labels, C=0.1, layer_pooling="concat", layers=3)
    mean_DH = x.mean(0, dtype=np.float64).reshape(3, -1)
    each = attribution(prompts[:2], reader, linear, mean_DH, layers=layers)
    expected = linear.logits(x[:2]) - linear.logits(x.mean(0, keepdims=True))
    assert [values.sum() for values in each] == pytest.approx(expected.tolist(), abs=1e-3)
    assert each[0].shape[0] == 3
    assert by_parts(each).sum() == pytest.approx(expected.mean(), abs=1e-3)
    assert by_parts([np.array([[1.0, 2.0]])], parts=4).tolist() == [[0.5, 0.5, 1.0, 1.0]]


FAMILIES = ["llama", "qwen3", "phi3"]


def world_data():
    sets = [("harmful", "harmful"), ("borderline", "harmless"), ("skill", "harmless")]
    entries = [PromptSet(name=kind, path=f"world:{kind}", label=label) for kind, label in sets]
    entries += [
        PromptSet(name=f"{kind}, unseen", path=f"world:{kind}/held_out", label=label, role="test", family="unseen")
        for kind, label in sets
    ]
    return labelled(entries, Path(), most=200, seed=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_worlds_decoders_know_unseen_phrasings_and_categories(family):
    """Above .95 with look-alikes, and calm on the user's task, of which the probe was never told; world only."""
    data = world_data()
    reader = open_reader(*load_model(world.path(family)))
    states = extract(data.prompts, reader, layers=range(reader.depth), poolings=("last",))
    bank, groups = Bank(states_BPDH=states, poolings=("last",), places=tuple(range(reader.depth))), groups_of(data)
    probe = ProbeMethod(bank=bank, labels=data.labels, groups=groups, grid=(0.1,))
    categories = 0
    given = None
    for unit in units(data):
        if unit.kind in ("test set", "category left out"):
            verdict = probe.run(unit.fit, unit.asked, given)
            given = verdict.settings if given is None else given  # layers from the first: only weights are fitted anew
            assert auroc(-verdict.logits, data.labels[unit.asked]) >= 0.95, unit.name
            categories += unit.kind == "category left out"
    assert categories >= 11
    rows = np.flatnonzero(data.trains)
    fitted = probe.fit(rows)
    task = labelled([PromptSet(name="t", path="world:task", label="harmless")], Path(), most=100, seed=0)
    x = extract(task.prompts, reader, layers=fitted.choice.layers, poolings=("last",)).reshape(100, -1)
    assert expit(-fitted.linear.logits(x)).mean() > 0.95


def test_a_probe_that_learned_the_template_is_shown_to_have():
    """Harmless requests with arbitrary labels: the template is all that there is to learn, and it is learned."""
    data = labelled([PromptSet(name="s", path="world:skill", label="harmless")], Path(), most=160, seed=0)
    labels = np.arange(160) % 2 == 0
    reader = open_reader(*load_model(world.path("llama")))
    states = extract(data.prompts, reader, layers=(3,), poolings=("last",))
    bank = Bank(states_BPDH=states, poolings=("last",), places=(3,))
    probe = ProbeMethod(bank=bank, labels=labels, groups=["ab"[int(v)] for v in labels], grid=(0.1,))
    rows = np.arange(160)
    sides = {"fit_rows": rows[:100].tolist(), "test_rows": rows[100:].tolist()}
    fitted = probe.fit(rows[:100])
    check = template_check(data.prompts, labels, fitted, reader, **sides)
    trapped = check["trapped"]["across"]
    assert trapped["the harmful"] > 0.99  # on its own terms it is perfect
    assert trapped["the harmless"] < 0.01  # it knows the system prompt
    assert 0.2 < trapped["nobody"] < 0.8  # and not the request
    assert check["trapped"]["shift"]["harmless"] < -0.5
    assert abs(check["probe"]["shift"]["harmless"]) < 0.5
    assert 0.2 < check["probe"]["across"]["nobody"] < 0.8
    other = template_check(data.prompts, labels, fitted, reader, **sides, system="one two three")
    assert other["probe"]["shift"] != check["probe"]["shift"]
    assert with_system([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "c") == [
        {"role": "system", "content": "c"},
        {"role": "user", "content": "b"},
    ]


def test_the_summary_counts_sure_differences():
    def row(value, low, high):
        one = {"auroc": {"value": value}}
        difference = {"low": low, "high": high}
        return {"kind": "test set", "probe": one, "bag_of_words": {"auroc": {"value": 0.5}}, "difference": difference}

    found = summary([row(0.9, 0.1, 0.5), row(0.7, -0.1, 0.3), row(0.2, -0.5, -0.1)])["test set"]
    assert found == {"units": 3, "probe": pytest.approx(0.6), "bag_of_words": 0.5, "probe_better": 1, "probe_worse": 1}
