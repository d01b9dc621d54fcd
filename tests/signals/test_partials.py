"""Spliced tokens of partial answers against tokenising every rendered text as a whole."""

import pytest
from conftest import CHATML, CORPUS, SPECIALS, THINKING, TOKENIZERS, TRIMMING, byte_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from safeshape.signals.partials import Branch, Partials, common_length, splice_rule

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3's kind: words by its pattern, whole words looked up before merges, and a first token of its own."""
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|pad|> $A <|im_end|>", special_tokens=[("<|pad|>", 0), ("<|im_end|>", 2)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")


def gemma() -> PreTrainedTokenizerFast:
    """Gemma's kind: blanks become a sign of their own, and no text is split into words before merging."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")


def unsplit_unigram() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.Unigram())
    core.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=[*SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")


KINDS = {**TOKENIZERS, "llama3": llama3, "gemma": gemma, "unsplit_unigram": unsplit_unigram}
RULES = {
    "byte_bpe": "word",
    "sentencepiece_bpe": "token",
    "unigram": "word",
    "added_tokens": "word",
    "llama3": "word",
    "gemma": "token",
    "unsplit_unigram": "never",
}
LOADED = {name: make() for name, make in KINDS.items()}
GUARD = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"
    "{{ 'Is it safe? The fox jumps, yes or no.<|im_start|>assistant\n' }}"
)
# The answer stands at the very end, so cut words meet nothing that hides them.
OPEN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
# The answer comes first, then something that depends on its end.
ENDING = "{{ messages[-1]['content'] + (' odd' if messages[-1]['content'][-1] in 'aeo ' else '\n') }}"
TEMPLATES = [GUARD, GUARD.replace("m['content']", "(m['content'] | trim)"), CHATML, TRIMMING, THINKING, OPEN, ENDING]
WORDS = ["the quick brown fox", " jumps", "fox jumps", " one two three", "a", "aaaa", "123456", "'s", "don't", "..."]
BLANKS = [" ", "  ", "\n", "\n\n", " \n ", "\t", "\u00a0", "\u200b", "\0", "\u2581"]
MARKS = ["<|im_end|>", "<tool>", " <tool> ", "<tool", "|>"]
OTHER = ["\u00e9a", "e\u0301", "\ufb01", "\u4e94\u516d\u4e03", "\U0001f600", "\U0001f468\u200d\U0001f469"]
PIECES = st.one_of(st.sampled_from([*WORDS, *BLANKS, *MARKS, *OTHER]), st.text(max_size=6))


def texts_of(name, template):
    tokenizer = LOADED[name]

    def render(partial):
        messages = [{"role": "user", "content": "what fox"}, {"role": "assistant", "content": partial}]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, chat_template=template
        )

    return tokenizer, render


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(PIECES, min_size=1, max_size=60), template=st.sampled_from(TEMPLATES), special=st.booleans())
def test_spliced_tokens_are_the_tokens_of_the_whole_text(name, pieces, template, special):
    answer = "".join(pieces).encode(errors="ignore").decode()
    if not answer:
        return
    tokenizer, render = texts_of(name, template)
    partials = Partials(tokenizer, render, answer, endings=[(7,), (8, 9)], special=special)
    ends = sorted({1, len(answer) // 3, len(answer) // 2, len(answer) - 1, len(answer)} - {0})
    found = iter(partials.branches(ends))
    for end in ends:
        ids = tokenizer(render(answer[:end]), add_special_tokens=special)["input_ids"]
        for ending in ([7], [8, 9]):
            branch = next(found)
            assert [*partials.ids[: branch.kept], *branch.ids] == ids + ending, (answer, end)
    assert list(partials.ids) == tokenizer(render(answer), add_special_tokens=special)["input_ids"] + [7]


@pytest.mark.parametrize("name", KINDS)
def test_only_a_window_is_tokenised_where_that_is_known_to_be_exact(name):
    tokenizer, render = texts_of(name, GUARD)
    assert splice_rule(tokenizer) == RULES[name]
    answer = " ".join(CORPUS[:12])
    ends = list(range(5, len(answer), 7))
    partials = Partials(tokenizer, render, answer)
    own = [len(branch.ids) for branch in partials.branches(ends)][len(ends) // 2 :]
    assert (max(own) < 130) == (RULES[name] != "never"), own
    assert min(own) > 10


def test_a_text_that_shares_nothing_is_tokenised_whole():
    tokenizer = byte_bpe()
    partials = Partials(tokenizer, lambda partial: f"{len(partial)} letters: {partial}", "the quick brown fox")
    branch = partials.branches([9])[0]
    assert branch == Branch(kept=0, ids=tuple(tokenizer("9 letters: the quick")["input_ids"]))


def test_a_token_that_swallows_blanks_far_to_its_left():
    tokenizer = byte_bpe()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True)])
    partials = Partials(tokenizer, lambda partial: partial + "<tool>", "fox" + " " * 200 + "dog")
    for end in (3, 100, 203, 206):
        branch = partials.branches([end])[0]
        want = tokenizer(partials.answer[:end] + "<tool>")["input_ids"]
        assert [*partials.ids[: branch.kept], *branch.ids] == want


def same_tokens(tokenizer, render, answer, ends):
    partials = Partials(tokenizer, render, answer)
    for end, branch in zip(ends, partials.branches(ends), strict=True):
        want = tokenizer(render(answer[:end]))["input_ids"]
        assert [*partials.ids[: branch.kept], *branch.ids] == want, end


def test_an_added_token_longer_than_the_window_that_only_the_cut_completes():
    tokenizer, foxes = byte_bpe(), "fox " * 40
    tokenizer.add_tokens([AddedToken(foxes + "end")])
    same_tokens(
        tokenizer, lambda partial: partial + " end", "the dog " + "fox " * 60, [8 + 4 * n - 1 for n in (20, 40, 50)]
    )


def test_a_word_longer_than_the_window_that_is_one_token_only_when_cut():
    long = "ab" * 40
    core = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "ab": 3, long: 4}, [("a", "b")], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert splice_rule(tokenizer) == "word"
    assert tokenizer(long + " ")["input_ids"] == [4, 2]
    same_tokens(tokenizer, lambda partial: partial + " a", "ab ab ab " + "ab" * 60, [9 + 78, 9 + 80, 9 + 82])


def test_a_lone_surrogate_is_named():
    with pytest.raises(ValueError, match=r"the text holds a lone surrogate \(U\+D800\)"):
        Partials(byte_bpe(), lambda partial: partial, "a\ud800b")


@given(st.text("ab"), st.text("ab"))
def test_common_length(first, second):
    length = common_length(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)
