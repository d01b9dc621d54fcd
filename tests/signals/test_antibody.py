"""The judge-free signal: an answer against a refusal of the same request."""

import math

import pytest
import torch
from conftest import conversation, tiny_model
from training import make, rows

from safeshape.defences.stepping import example_means
from safeshape.signals.antibody import AntibodySignal, answer_nll, margins


def test_margins_are_positive_where_the_answer_is_likelier():
    assert margins(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])).tolist() == [2.0, -1.0]


def test_an_answer_that_is_the_refusal_is_as_safe_as_not(tokenizer):
    signal = AntibodySignal(tiny_model(), tokenizer, refusal="no no")
    score = next(signal.score_many([conversation("one", "no no")]))
    assert score.p_safe == pytest.approx(0.5, abs=1e-6)
    assert score.scorer == {"name": "antibody", "model": "", "refusal": "no no", "tau": 1.0}


def test_the_score_is_the_sigmoid_of_the_margin_and_depends_on_no_other_row(tokenizer):
    model = tiny_model()
    talks = [conversation("one two", "fox dog cat"), conversation("three", "safe")]
    refusals = [conversation("one two", "no"), conversation("three", "no")]
    with torch.no_grad():
        gap = answer_nll(model, tokenizer, refusals) - answer_nll(model, tokenizer, talks)
    for tau in (1.0, 4.0):
        found = [s.p_safe for s in AntibodySignal(model, tokenizer, refusal="no", tau=tau).score_many(talks)]
        assert found == pytest.approx([1 / (1 + math.exp(-float(g) / tau)) for g in gap], rel=1e-4)
    alone = [next(AntibodySignal(model, tokenizer, refusal="no").score_many([talk])).p_safe for talk in talks]
    together = AntibodySignal(model, tokenizer, refusal="no", batch_size=1).score_many(talks)
    assert [score.p_safe for score in together] == pytest.approx(alone, rel=1e-5)


def test_its_likelihood_is_the_trainers(tmp_path, tokenizer):
    """The mean over the same tokens that training counts, end of turn included."""
    data = [{"messages": row["messages"]} for row in rows(4)]
    trainer = make(tmp_path, tokenizer, data=data, policy="sft")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        own = answer_nll(trainer.model.eval(), tokenizer, [row["messages"] for row in data])
        assert torch.allclose(own, example_means(trainer.model, batch), rtol=1e-4)


def test_bad_settings_and_rows_are_refused(tokenizer):
    with pytest.raises(ValueError, match="tau must be above 0"):
        AntibodySignal(tiny_model(), tokenizer, tau=0.0)
    with pytest.raises(ValueError, match="refusal must be a text"):
        AntibodySignal(tiny_model(), tokenizer, refusal=" ")
    with pytest.raises(ValueError, match="row 1: the last message must be the assistant's"):
        list(AntibodySignal(tiny_model(), tokenizer).score_many([conversation("a", "b"), conversation("a", "b")[:1]]))
