"""Chunks tile the answer, whatever they count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeshape.signals.chunks import chunk_ends, sentence_ends


@pytest.mark.parametrize(
    ("answer", "chunk", "unit", "ends"),
    [
        ("a b c d", 2, "words", [3, 7]),
        ("a b c d e", 2, "words", [3, 7, 9]),
        ("a b c ", 2, "words", [3, 6]),
        ("a b c d ", 2, "words", [3, 8]),
        ("x", 5, "words", [1]),
        (" x", 1, "words", [2]),
        ("one two", 1, "tokens", [3, 7]),
        ("One. Two! Three?", 1, "sentences", [4, 9, 16]),
        ("One. Two! Three?", 2, "sentences", [9, 16]),
        ("One. Two! Three? ", 3, "sentences", [17]),
        ("no end", 1, "sentences", [6]),
    ],
)
def test_chunks_tile_the_answer(answer, chunk, unit, ends, tokenizer):
    assert chunk_ends(answer, chunk, unit, tokenizer) == ends


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        ("Pi is 3.14. Yes.", ["Pi is 3.14.", " Yes."]),
        ('He said "no." Then (yes!) it was.', ['He said "no."', " Then (yes!)", " it was."]),
        ("What?! No... Well\u2026 ok", ["What?!", " No...", " Well\u2026"]),
        ("- one\n- two\n\n\n- three\n", ["- one", "\n- two", "\n\n\n- three"]),
        ("Done. \nNext", ["Done."]),
        ("\u4e94\u3002\u516d\uff01\u4e03", ["\u4e94\u3002", "\u516d\uff01"]),
        ("\u0939\u093e\u0901\u0964 \u0928", ["\u0939\u093e\u0901\u0964"]),
        ("see e.g. this", ["see e.g."]),
        (" \n\n ", []),
    ],
)
def test_sentences_end_at_their_punctuation_and_at_lines(answer, pieces):
    ends = sentence_ends(answer)
    assert [answer[a:b] for a, b in zip([0, *ends], ends, strict=False)] == pieces


@given(st.text("ab .\n!\u3002", min_size=1), st.integers(1, 3), st.sampled_from(["words", "tokens", "sentences"]))
def test_ends_rise_to_the_answers_end_and_every_chunk_has_text(tokenizer, answer, chunk, unit):
    ends = chunk_ends(answer, chunk, unit, tokenizer)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(answer)
    if answer.strip() and unit != "tokens":
        assert all(answer[a:b].strip() for a, b in zip([0, *ends], ends, strict=False))


def test_bad_chunks_are_refused(tokenizer):
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        chunk_ends("a", 0, "words", tokenizer)
    with pytest.raises(ValueError, match="unit must be words, tokens or sentences, got 'lines'"):
        chunk_ends("a", 1, "lines", tokenizer)
