"""Where the chunks of an answer end."""

import re
from typing import Literal

from transformers import PreTrainedTokenizerBase

Unit = Literal["words", "tokens"]


def chunk_ends(answer: str, chunk: int, unit: Unit, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where chunks end, as character offsets: every `chunk` words or guard tokens, and at the answer's end.

    Errors: ValueError for a chunk below 1 or an unknown unit.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if unit == "words":
        ends = [match.end() for match in re.finditer(r"\S+", answer)]
    elif unit == "tokens":
        encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for start, end in encoded["offset_mapping"] if end > start]
    else:
        raise ValueError(f"unit must be words or tokens, got {unit!r}")
    chosen = sorted(set(ends[chunk - 1 :: chunk]))
    return [end for end in chosen if end < len(answer.rstrip())] + [len(answer)]
