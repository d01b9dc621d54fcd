"""Several guards as one."""

from dataclasses import dataclass

import pytest
from conftest import byte_bpe, conversation, unigram
from guard_templates import guard_model
from test_classifiers import bert_like, tiny_classifier
from test_streams import stream_model, stream_tokenizer

from safeshape.signals.ensembles import Ensemble, load_scorer
from safeshape.signals.guards import load_guard
from safeshape.signals.reading import Failure

ANSWER = "one two three four five six seven"
ROWS = [conversation("what", ANSWER), conversation("what", "one two")]


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A guard that answers with given numbers and remembers nothing."""

    name: str
    scores: tuple
    tokenizer: object = None

    def p_safe_at(self, items, *, batch_size=64):
        return [
            Failure(reason="no answer") if self.scores[0] is None else list(self.scores[: len(ends)])
            for _, ends in items
        ]

    def identity(self, chunk, unit):
        return {"guard": self.name}


def test_mean_and_min_by_hand():
    members = (Fixed(name="a", scores=(0.9, 0.2, 0.4), tokenizer=byte_bpe()), Fixed(name="b", scores=(0.5, 0.6, 0.0)))
    for how, expected in (("mean", [0.7, 0.4, 0.2]), ("min", [0.5, 0.2, 0.0])):
        ensemble = Ensemble(members=members, how=how)
        score = next(ensemble.score_many(ROWS, chunk=3))
        assert [span.p_safe for span in score.spans] == pytest.approx(expected)
        assert score.p_safe == pytest.approx(expected[-1])
        assert [(span.start, span.end) for span in score.spans] == [(0, 13), (13, 27), (27, 33)]
        assert score.scorer == {
            "guard": f"{how}(a, b)",
            "combine": how,
            "members": [{"guard": "a"}, {"guard": "b"}],
            "chunk": 3,
            "unit": "words",
        }
        assert ensemble.score(ROWS[0], chunk=3) == list(score.spans)


def test_a_member_that_fails_leaves_the_row_without_a_score():
    members = (Fixed(name="a", scores=(0.9, 0.2), tokenizer=byte_bpe()), Fixed(name="b", scores=(None,)))
    ensemble = Ensemble(members=members)
    scores = list(ensemble.score_many(ROWS))
    assert [(s.p_safe, s.spans, s.error) for s in scores] == [(None, (), "guard 'b': no answer")] * 2
    with pytest.raises(ValueError, match=r"guard 'mean\(a, b\)': guard 'b': no answer"):
        ensemble.score(ROWS[0])


def language_guard(tokenizer):
    tokenizer.add_tokens(["yes", "no"])
    row = {"name": "text", "safe": "yes", "unsafe": "no", "chat_template": "{{ messages[-1]['content'] + '?' }}"}
    return load_guard(row, model=guard_model("world"), tokenizer=tokenizer)


def members():
    classifier = load_guard("classifier", model=tiny_classifier("bert"), tokenizer=bert_like())
    stream = load_guard("qwen3guard-stream", model=stream_model(), tokenizer=stream_tokenizer())
    return language_guard(byte_bpe()), classifier, stream


@pytest.mark.parametrize("how", ["mean", "min"])
def test_guards_of_every_kind_combine(how):
    together = Ensemble(members=members(), how=how)
    apart = [[s.p_safe for s in guard.score(ROWS[0], chunk=2)] for guard in members()]
    expected = [sum(column) / 3 if how == "mean" else min(column) for column in zip(*apart, strict=True)]
    assert [s.p_safe for s in together.score(ROWS[0], chunk=2)] == pytest.approx(expected, abs=1e-5)
    names = [member["guard"] for member in next(together.score_many(ROWS)).scorer["members"]]
    assert names == ["text", "classifier", "qwen3guard-stream"]


def test_chunks_end_where_the_first_members_tokens_end():
    bytes_first = Ensemble(members=(language_guard(byte_bpe()), language_guard(unigram())))
    unigram_first = Ensemble(members=bytes_first.members[::-1])
    ends = [[span.end for span in e.score(ROWS[0], chunk=3, unit="tokens")] for e in (bytes_first, unigram_first)]
    assert ends[0] != ends[1]
    for ensemble, found in zip((bytes_first, unigram_first), ends, strict=True):
        assert found == [span.end for span in ensemble.members[0].score(ROWS[0], chunk=3, unit="tokens")]


def test_an_ensemble_from_a_file(tmp_path):
    folders = []
    for index, classes in enumerate((("safe", "unsafe"), ("bad", "good"))):
        folder = tmp_path / str(index)
        tiny_classifier("bert", classes).save_pretrained(folder)
        bert_like().save_pretrained(folder)
        folders.append(folder)
    path = tmp_path / "both.yaml"
    path.write_text(
        f"combine: min\nmembers:\n- {{base: classifier, model: {folders[0]}}}\n"
        f"- {{base: classifier, model: {folders[1]}, safe: good, unsafe: bad}}\n"
    )
    ensemble = load_scorer(str(path))
    found = [s.p_safe for s in ensemble.score(ROWS[0], chunk=3)]
    apart = [[s.p_safe for s in member.score(ROWS[0], chunk=3)] for member in ensemble.members]
    assert found == [min(pair) for pair in zip(*apart, strict=True)]
    assert (
        load_scorer({"base": "classifier", "model": str(folders[0])}).score(ROWS[0], chunk=3)[0].p_safe == apart[0][0]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"members": ["world"], "how": "min"}, "an ensemble has no field 'how'; it has: members, combine"),
        ({"members": "world"}, "members must be a list of guard rows, got 'world'"),
        ({"members": [3]}, r"members must be a list of guard rows, got \[3\]"),
        ({"members": ["gard"]}, "unknown guard 'gard'"),
        ("gard", "unknown guard 'gard'"),
        ("gone.yaml", "cannot read gone.yaml"),
    ],
)
def test_bad_ensembles_are_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        load_scorer(given)


def test_bad_combinations_are_refused():
    one = Fixed(name="a", scores=(0.5,))
    with pytest.raises(ValueError, match="how must be one of mean, min, got 'max'"):
        Ensemble(members=(one, one), how="max")
    with pytest.raises(ValueError, match="an ensemble needs at least two guards, got 1"):
        Ensemble(members=(one,))
    with pytest.raises(ValueError, match="model cannot be given for several guards"):
        load_scorer({"members": ["world", "world"]}, model="x")
