"""Special tokens that stand in data are text there: a row must not end a guard's turn or answer in its place."""

import re
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_WIDE = ord("\uff01") - ord("!")  # printable ASCII has full-width forms that much further on


def as_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with the first letter of every special token in it full-width: as long as before, and read as text.

    Special are the tokenizer's special tokens, and added ones in angle or square brackets, as `<think>`.
    """
    return _plain(_special(tokenizer, len(tokenizer)), text)


@lru_cache(maxsize=16)
def _special(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    """A pattern of the special tokens. `size`: of the vocabulary, so that one added later is seen."""
    added = [(str(token), token.special) for token in tokenizer.added_tokens_decoder.values()]
    names = {name for name, special in added if special or name[:1] + name[-1:] in ("<>", "[]")}
    several = sorted((name for name in {*names, *tokenizer.all_special_tokens} if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, several))) if several else None


@lru_cache(maxsize=1024)
def _plain(special: re.Pattern[str] | None, text: str) -> str:
    while special is not None and special.search(text):  # again: tokens may overlap
        text = special.sub(lambda found: _wide(found[0][0]) + found[0][1:], text)
    return text


def _wide(letter: str) -> str:
    return chr(ord(letter) + _WIDE) if "!" <= letter <= "~" else "\ufffd"
