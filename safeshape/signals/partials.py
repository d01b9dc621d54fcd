"""The tokens of every partial answer, without tokenising the whole text anew for each.

The truth is: render the conversation with the partial answer as one string, tokenise that string. Every string is
rendered, which costs little; but only a window of it, from a little before the point where it leaves the rendered full
answer, is tokenised, and what lies before comes from the full answer's tokens.

Why that gives the same tokens. A window is trusted only where it agrees with the full answer over a run of tokens that
ends before the two texts part. Byte-pair merges never cross a boundary that stands in the final tokens, and what
happens on one side of it does not depend on the other; so where a boundary stands in both, the tokens before it are
the full answer's and the tokens after it are the window's. A tokenizer that first splits text into words must agree
over two whole words, which is more than its pattern looks ahead. A window without such a run is made longer, up to the
whole text. Tokenizers for which neither holds (a unigram model over unsplit text, one without offsets) take the whole
text each time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

Splice = Literal["token", "word", "never"]
_SAMPLE = "One two, three.\nFour  five 678 \u4e94\u516d x_y"
_OVERLAP = 48  # characters of the first window before the texts part
_BATCH = 256  # windows tokenised together


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A token sequence that begins with the first `kept` tokens of a trunk and goes on with `ids`."""

    kept: int
    ids: tuple[int, ...]


def splice_rule(tokenizer: PreTrainedTokenizerBase) -> Splice:
    """Where tokens of two texts may be joined for this tokenizer: between tokens, between words, or never."""
    if not tokenizer.is_fast:
        return "never"
    backend: Tokenizer = tokenizer.backend_tokenizer
    is_bpe = isinstance(backend.model, BPE)
    if is_bpe and backend.model.dropout:
        return "never"
    if backend.pre_tokenizer is None:
        return "token" if is_bpe else "never"
    sample = backend.normalizer.normalize_str(_SAMPLE) if backend.normalizer is not None else _SAMPLE
    whole = len(backend.pre_tokenizer.pre_tokenize_str(sample)) == 1
    if whole:
        return "token" if is_bpe else "never"
    return "word"


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common from the start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Partials:
    """The partial answers of one conversation as branches of its full answer.

    `render`: the text the guard reads for a partial answer. `endings`: what may follow a text, as tokens of its own;
    every partial answer gives one branch for each. `special`: the tokenizer adds its own tokens around a text.
    Errors: ValueError when the text cannot be encoded (lone surrogates).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[str], str],
        answer: str,
        *,
        endings: Sequence[Sequence[int]] = ((),),
        special: bool = False,
        rule: Splice | None = None,
    ) -> None:
        self.tokenizer, self.render, self.answer, self.special = tokenizer, render, answer, special
        self.endings = [tuple(ending) for ending in endings]
        self.rule = splice_rule(tokenizer) if rule is None else rule
        self.text = encodable(render(answer))
        whole = tuple(tokenizer(self.text, add_special_tokens=special)["input_ids"])
        # A call of the tokenizer itself, so that no padding or truncation of an earlier call is left behind.
        encoding = tokenizer(self.text, add_special_tokens=False).encodings[0] if self.rule != "never" else None
        around = surroundings(encoding.ids, whole) if encoding is not None else None
        if encoding is None or around is None:
            self.rule = "never"
        else:
            self._ids, (self._lead, self._trail) = tuple(encoding.ids), around
            self._marks = marks(encoding, self.rule)
            self._at = {mark[0]: index for index, mark in reversed(list(enumerate(self._marks))) if mark[2]}
            longest = max((len(token.content) for token in tokenizer.added_tokens_decoder.values()), default=0)
            self._overlap = _OVERLAP + longest
        self.ids = whole + self.endings[0]

    def branches(self, ends: Sequence[int]) -> list[Branch]:
        """The partial answers that end at these characters, each exactly as if its whole text had been tokenised.

        The branches of one partial answer, one for each ending, are side by side.
        """
        found: list[Branch] = []
        for begin in range(0, len(ends), _BATCH):
            for branch in self._batch(ends[begin : begin + _BATCH]):
                found += [Branch(kept=branch.kept, ids=branch.ids + ending) for ending in self.endings]
        return found

    def _batch(self, ends: Sequence[int]) -> list[Branch]:
        if self.rule == "never":
            texts = [self.render(self.answer[:end]) for end in ends]
            rows = self.tokenizer(texts, add_special_tokens=self.special)["input_ids"]
            return [Branch(kept=0, ids=tuple(ids)) for ids in rows]
        parted, tails = [], []
        for end in ends:
            text = self.render(self.answer[:end])
            parted.append(common_length(self.text, text))
            tails.append(text[parted[-1] :])
        found: list[Branch | None] = [None] * len(ends)
        overlap, waiting = self._overlap, list(range(len(ends)))
        while waiting:
            starts = [max(parted[index] - overlap, 0) for index in waiting]
            windows = [
                self.text[start : parted[index]] + tails[index] for start, index in zip(starts, waiting, strict=True)
            ]
            encodings = self.tokenizer.backend_tokenizer.encode_batch(windows, add_special_tokens=False)
            for start, index, encoding in zip(starts, waiting, encodings, strict=True):
                found[index] = self._spliced(encoding, start, parted[index])
            waiting = [index for index in waiting if found[index] is None]
            overlap *= 4
        return [branch for branch in found if branch is not None]

    def _spliced(self, encoding: Encoding, start: int, parted: int) -> Branch | None:
        """The branch of a window that begins at a character of the text; None when it never agrees for long enough."""
        if start == 0:
            return Branch(kept=0, ids=(*self._lead, *encoding.ids, *self._trail))
        window = [(b + start, e + start, clean) for b, e, clean in marks(encoding, self.rule, parted - start)]
        for mine in range(1, len(window)):
            if not window[mine][2] or window[mine][0] >= parted:
                continue
            theirs = self._at.get(window[mine][0])
            if theirs is not None and self._agree(encoding.ids, window, mine, theirs, parted):
                return Branch(kept=len(self._lead) + theirs, ids=(*encoding.ids[mine:], *self._trail))
        return None

    def _agree(
        self, ids: Sequence[int], window: Sequence[tuple[int, int, bool]], mine: int, theirs: int, parted: int
    ) -> bool:
        """Whether from here on two whole words (or tokens) are the same in both, before the texts part."""
        units = 0
        while mine < len(window) and theirs < len(self._ids):
            if units == 2 and window[mine][2] and self._marks[theirs][2]:
                return True
            if ids[mine] != self._ids[theirs] or window[mine][:2] != self._marks[theirs][:2]:
                return False
            if window[mine][1] > parted or window[mine][2] != self._marks[theirs][2]:
                return False
            mine, theirs = mine + 1, theirs + 1
            units += mine < len(window) and window[mine][2]
        return False


def marks(encoding: Encoding, rule: Splice, stop: float = float("inf")) -> list[tuple[int, int, bool]]:
    """Of each token: its characters, and whether text may be split before it: no character or word is cut there.

    Tokens are read up to the first that begins after `stop`, inclusive.
    """
    found: list[tuple[int, int, bool]] = []
    reached = 0
    word: int | None = -1
    for (begin, end), at in zip(encoding.offsets, encoding.word_ids, strict=True):
        if found and found[-1][0] > stop:
            break
        clean = end > begin >= reached and (rule == "token" or at != word)
        found.append((begin, end, clean))
        reached, word = max(reached, end), at
    return found


def surroundings(plain: Sequence[int], whole: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The tokens that a tokenizer adds before and after a text; None when it changes those between."""
    for begin in range(len(whole) - len(plain) + 1):
        if tuple(whole[begin : begin + len(plain)]) == tuple(plain):
            return tuple(whole[:begin]), tuple(whole[begin + len(plain) :])
    return None


def encodable(text: str) -> str:
    """The text itself. Errors: ValueError when it holds half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate (U+{ord(text[error.start]):04X})") from error
    return text
