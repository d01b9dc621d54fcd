"""Scoring in two passes around the store: what is scored, what is reused, what fails, and how much is held at once."""

import hashlib
import weakref

import pytest
from conftest import conversation
from datasets import Dataset

from safeshape.signals.column import WINDOW, fill, key_of, score_dataset, scored_rows
from safeshape.signals.engines import BLOCK, local
from safeshape.signals.scorers import one_by_one
from safeshape.store import Store
from safeshape.types import Score, Span

MAKER = {"guard": "fake", "chunk": 5}


class Fake:
    """A scorer whose score is the length of the answer over 100, and which remembers what it was asked."""

    def __init__(self, refuses=(), raises=()):
        self.asked, self.blocks, self.refuses, self.raises = [], [], refuses, raises

    def __call__(self, conversations):
        self.blocks.append(0)
        for messages in conversations:
            answer = messages[-1]["content"]
            self.asked.append(answer)
            self.blocks[-1] += 1
            if answer in self.raises:
                raise ValueError(f"row {self.blocks[-1] - 1}: cannot read {answer!r}")
            if answer in self.refuses:
                yield Score(signal="star", p_safe=None, scorer={}, error=f"refused {answer!r}")
                continue
            p_safe = len(answer) / 100
            span = Span(start=0, end=len(answer), p_safe=p_safe)
            yield Score(signal="star", p_safe=p_safe, spans=(span,), scorer={})


def rows_of(*answers):
    return [{"id": number, "messages": conversation("q", answer)} for number, answer in enumerate(answers)]


def run(rows, scorer, store, *, keep=False, maker=MAKER, block=BLOCK):
    outcome = fill(lambda: rows, local(scorer, block=block), store, maker=maker, keep_failures=keep)
    return outcome, list(scored_rows(lambda: rows, store, maker=maker, scorer={"guard": "fake"}, outcome=outcome))


@pytest.fixture
def store():
    with Store(":memory:") as opened:
        yield opened


@pytest.mark.parametrize("block", [BLOCK, 2, None])
def test_rows_keep_their_order_columns_and_scores(store, block):
    rows = rows_of("a", "bb", "ccc", "bb", "dddd")
    rows[1]["safety"] = {"old": 1}
    fake = Fake()
    outcome, found = run(rows, fake, store, block=block)
    assert [row["id"] for row in found] == [0, 1, 2, 3, 4]
    assert [row["safety"]["p_safe"] for row in found] == [0.01, 0.02, 0.03, 0.02, 0.04]
    assert found[2]["safety"] == {
        "signal": "star",
        "p_safe": 0.03,
        "spans": [{"start": 0, "end": 3, "p_safe": 0.03}],
        "scorer": {"guard": "fake"},
        "error": None,
    }
    assert sorted(fake.asked) == ["a", "bb", "ccc", "dddd"], "equal conversations are scored once"
    assert (outcome.rows, outcome.scored, outcome.failed, outcome.unsafe) == (5, 4, 0, 5)


def test_a_second_run_asks_for_nothing_and_gives_the_same(store):
    rows = rows_of(*(str(number) for number in range(3 * WINDOW)))
    _, first = run(rows, Fake(), store)
    again = Fake()
    outcome, second = run(rows, again, store)
    assert again.asked == []
    assert (outcome.scored, outcome.reused) == (0, 3 * WINDOW)
    assert second == first


def test_a_run_that_stopped_half_way_goes_on_where_it_was(store):
    rows = rows_of(*(str(number) for number in range(200)))
    broken = Fake(raises={"150"})
    with pytest.raises(ValueError, match="cannot read '150'"):
        run(rows, broken, store)
    assert store.count("scores") == 150, "what arrived before the failure is there"
    rest = Fake()
    _, found = run(rows, rest, store)
    assert rest.asked == [str(number) for number in range(150, 200)]
    assert [row["id"] for row in found] == list(range(200))


def test_failures_stop_the_run_or_stand_in_their_rows(store):
    rows = [*rows_of("a", "bad", "c", "bad"), {"id": 4, "messages": [{"role": "user", "content": "x"}]}]
    with pytest.raises(ValueError, match="row 1: refused 'bad'"):
        run(rows[:4], Fake(refuses={"bad"}), store)
    with pytest.raises(ValueError, match="row 0: the last message must be the assistant's"):
        run(rows[4:], Fake(), store)
    outcome, found = run(rows, Fake(refuses={"bad"}), store, keep=True)
    assert [row["safety"]["error"] for row in found] == [
        None,
        "refused 'bad'",
        None,
        "refused 'bad'",
        "the last message must be the assistant's",
    ]
    assert [row["safety"]["p_safe"] for row in found] == [0.01, None, 0.01, None, None]
    assert found[1]["safety"]["spans"] == []
    assert (outcome.rows, outcome.failed, outcome.unsafe) == (5, 3, 2)
    assert outcome.first_failure == "row 1: refused 'bad'"
    again = Fake()
    outcome, found = run(rows, again, store, keep=True)
    assert again.asked == ["bad"], "a failure is tried again, a score is not"
    assert [row["safety"]["p_safe"] for row in found] == [0.01, 0.03, 0.01, 0.03, None]


@pytest.mark.parametrize("block", [BLOCK, None])
def test_equal_rows_far_apart_are_asked_about_once(store, block):
    rows = rows_of("twin", "bad", *(str(number) for number in range(2 * WINDOW)), "bad", "twin")
    fake = Fake(refuses={"bad"})
    greedy = fake if block else lambda conversations: fake(list(conversations))  # reads all before it answers
    outcome, found = run(rows, greedy, store, keep=True, block=block)
    assert sorted(fake.asked) == sorted({row["messages"][1]["content"] for row in rows})
    assert [row["safety"]["p_safe"] for row in (found[0], found[-1])] == [0.04, 0.04]
    assert [row["safety"]["error"] for row in (found[1], found[-2])] == ["refused 'bad'"] * 2
    assert outcome.failed == 2


@pytest.mark.parametrize("raises", [{"c"}, {"a", "e"}, {"a", "b", "c", "d", "e"}])
def test_a_guard_that_raises_loses_only_the_rows_it_raises_for(store, raises):
    fake = Fake(raises=raises)
    outcome, found = run(rows_of(*"abcde"), one_by_one(fake, {"guard": "fake"}), store, keep=True)
    assert {row["messages"][1]["content"] for row in found if row["safety"]["p_safe"] is None} == raises
    assert {row["safety"]["error"] for row in found} - {None} == {f"cannot read {answer!r}" for answer in raises}
    assert outcome.failed == len(raises)


def test_a_row_that_changed_in_between_is_not_given_another_rows_score(store):
    passes = iter([rows_of("a"), rows_of("b")])
    outcome = fill(lambda: next(passes), local(Fake()), store, maker=MAKER, keep_failures=False)
    with pytest.raises(ValueError, match="row 0 changed while the dataset was scored"):
        list(scored_rows(lambda: next(passes), store, maker=MAKER, scorer={}, outcome=outcome))


def test_no_rows_is_an_error(store):
    with pytest.raises(ValueError, match="the dataset is empty"):
        run([], Fake(), store)


def test_the_key_is_of_the_conversation_and_the_maker():
    messages = conversation("q", "a")
    key = key_of(messages, MAKER)
    assert key != key_of(messages, {**MAKER, "chunk": 6})
    assert key != key_of(conversation("q", "a "), MAKER)
    assert key != key_of(conversation("p", "a"), MAKER)
    assert key != key_of([{"role": "system", "content": "s"}, *messages], MAKER)
    # Parquet fills what a message lacks with nulls; it is the same conversation.
    assert key == key_of([{**message, "name": None} for message in messages], MAKER)


class Traced(dict):
    """A row that can be counted while it lives."""

    __hash__, __eq__ = object.__hash__, object.__eq__


@pytest.mark.parametrize("block", [BLOCK, None])
def test_memory_does_not_grow_with_the_data(tmp_path, block):
    alive, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for number in range(20 * WINDOW):
            row = Traced(id=number, messages=conversation("q", hashlib.sha256(b"%d" % number).hexdigest()))
            alive.add(row)
            most = max(most, len(alive))
            yield row

    with Store(tmp_path / "s") as store:
        for _ in range(2):  # the second time every row comes from the store
            outcome = fill(rows, local(Fake(), block=block), store, maker=MAKER, keep_failures=True)
            assert not outcome.reasons
            count = sum(1 for _ in scored_rows(rows, store, maker=MAKER, scorer={}, outcome=outcome))
            assert count == 20 * WINDOW
    assert most <= 2 * WINDOW


def test_progress_counts_rows(store):
    seen = []
    rows = rows_of(*(str(number) for number in range(WINDOW + 1)))
    fill(lambda: rows, local(Fake()), store, maker=MAKER, keep_failures=False, progress=seen.append)
    assert seen == [WINDOW, WINDOW + 1]


def test_a_dataset_in_memory_gets_its_column():
    data = Dataset.from_list([{**row, "safety": {"signal": "old"}} for row in rows_of("a", "bb")])
    seen = []
    scored = score_dataset(data, Fake(), progress=lambda done, total: seen.append((done, total)))
    assert [row["safety"]["p_safe"] for row in scored] == [0.01, 0.02]
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="row 1: refused 'bb'"):
        score_dataset(data, Fake(refuses={"bb"}))
    fake = Fake()
    with pytest.raises(ValueError, match="row 1: the assistant's answer is empty"):
        score_dataset(Dataset.from_list(rows_of("a", " ")), fake)
    assert fake.asked == []
