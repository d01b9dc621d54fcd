"""Where the chunks of an answer end."""

import re
from typing import Literal

from transformers import PreTrainedTokenizerBase

Unit = Literal["words", "tokens", "sentences"]

# A line ends a sentence; so does ending punctuation with its closing quotes and brackets before a blank or the end, and
# the full-width kind, which scripts written without blanks use, anywhere.
_SENTENCE = re.compile(
    r"[^\S\n]*\n|[.!?\u2026\u061f\u0964\u0965]+[\"'\u201d\u2019\u00bb)\]]*(?=\s|$)"
    r"|[\u3002\uff01\uff1f\uff61]+[\"'\u201d\u2019\u300d\u300f\uff09]*"
)


def chunk_ends(answer: str, chunk: int, unit: Unit, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where chunks end, as character offsets: every `chunk` words, guard tokens or sentences, and at the answer's end.

    Sentences are found by their punctuation and by line ends; "e.g. this" counts as two, "3.14" does not.
    Errors: ValueError for a chunk below 1 or an unknown unit.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if unit == "words":
        ends = [match.end() for match in re.finditer(r"\S+", answer)]
    elif unit == "tokens":
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for start, end in encoded["offset_mapping"] if end > start]
    elif unit == "sentences":
        ends = sentence_ends(answer)
    else:
        raise ValueError(f"unit must be words, tokens or sentences, got {unit!r}")
    chosen = sorted(set(ends[chunk - 1 :: chunk]))
    return [end for end in chosen if end < len(answer.rstrip())] + [len(answer)]


def sentence_ends(answer: str) -> list[int]:
    """Where sentences end; a stretch without any text is none."""
    ends, begin = [], 0
    for match in _SENTENCE.finditer(answer):
        end = match.start() if match.group().isspace() else match.end()
        if answer[begin:end].strip():
            ends.append(end)
        begin = match.end()
    return ends
