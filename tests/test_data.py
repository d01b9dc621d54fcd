"""From rows to text, turns and labels."""

import pytest
import torch
from conftest import THINKING, TRIMMING, byte_bpe, conversation

from safeshape.data import ShapedCollator, example_risk, render, response_position
from safeshape.signals.align import prepare, training_row


def row_of(row, tokenizer, **options):
    return training_row(row, tokenizer, needs_signal=False, max_length=None, overlong="refuse") | options


def learned_text(row, tokenizer):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_only_the_last_answer_and_its_end_marker_are_learned(tokenizer):
    messages = [*conversation("one two", "three four"), *conversation("five six", "seven eight")]
    assert learned_text(row_of({"messages": messages}, tokenizer), tokenizer) == "seven eight<|im_end|>\n"


def test_an_earlier_turn_is_learned_when_it_has_its_own_score(tokenizer):
    first, second = conversation("one two", "three four"), conversation("five six", "seven eight")
    first[1]["p_safe"] = 0.25
    got = row_of({"messages": [*first, *second], "safety": {"p_safe": 0.75}}, tokenizer)
    assert learned_text(got, tokenizer) == "three four<|im_end|>\nseven eight<|im_end|>\n"
    scores = [p for p, label in zip(got["p_safe"], got["labels"], strict=True) if label != -100]
    half = len(tokenizer("three four<|im_end|>\n")["input_ids"])
    assert scores[:half] == [0.25] * half
    assert set(scores[half:]) == {0.75}


def test_prompt_and_completion_as_strings_and_as_messages(tokenizer):
    strings = row_of({"prompt": "one two", "completion": " three"}, tokenizer)
    assert learned_text(strings, tokenizer) == " three<|im_end|>"
    user, assistant = conversation("one two", "three")
    chat = row_of({"prompt": [user], "completion": [assistant]}, tokenizer)
    assert chat == row_of({"messages": [user, assistant]}, tokenizer)


def test_a_template_that_strips_keeps_offsets_right():
    tokenizer = byte_bpe()
    tokenizer.chat_template = TRIMMING
    answer = "  one safe words here"
    cut = answer.index(" safe")
    safety = {
        "p_safe": 0.0,
        "spans": [{"start": 0, "end": cut, "p_safe": 0.0}, {"start": cut, "end": len(answer), "p_safe": 1.0}],
    }
    got = row_of({"messages": conversation("one", answer), "safety": safety}, tokenizer)
    safe = [i for i, p in zip(got["labels"], got["p_safe"], strict=True) if p == 1.0]
    assert tokenizer.decode(safe) == " safe words here<|im_end|>"


def test_an_empty_thinking_block_belongs_to_the_answer_and_takes_its_first_score():
    tokenizer = byte_bpe()
    tokenizer.chat_template = THINKING
    got = row_of({"messages": conversation("one", "two three"), "safety": {"p_safe": 0.5}}, tokenizer)
    assert learned_text(got, tokenizer) == "<think>\n\n</think>\n\ntwo three<|im_end|>\n"
    assert {p for p, label in zip(got["p_safe"], got["labels"], strict=True) if label != -100} == {0.5}


def test_a_template_that_rewrites_the_answer_is_refused():
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template rewrites the answer"):
        render({"messages": conversation("one", "two")}, tokenizer)


def test_a_template_that_rejects_roles_is_refused():
    tokenizer = byte_bpe()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template rejects the conversation: roles must alternate"):
        render({"messages": conversation("one", "two")}, tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "no chat"}],
            "train row 0: needs `messages`, or `prompt` and `completion` of the same form; it has: text",
        ),
        (
            [{"messages": conversation("a", "b")}, {"messages": conversation("a", " ")}],
            "train row 1: the assistant's answer",
        ),
        ([{"messages": [{"from": "human", "text": "a"}]}], "train row 0: message 0 needs a role and content"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "train row 0: the last message must be the assistant's"),
        (
            [{"messages": conversation("a", "b"), "safety": {"p_safe": 1.5}}],
            "train row 0: safety p_safe must be a number",
        ),
        (
            [{"messages": conversation("a", "b"), "safety": {"p_safe": float("nan")}}],
            "train row 0: safety p_safe must be",
        ),
        (
            [
                {
                    "messages": conversation("a", "b"),
                    "safety": {"p_safe": 1.0, "spans": [{"start": 0, "end": 9, "p_safe": 1.0}]},
                }
            ],
            r"train row 0: span \[0, 9\) lies outside the answer of 1 characters",
        ),
        (
            [
                {
                    "messages": conversation("a", "bcd"),
                    "safety": {"spans": [{"start": 0, "end": 2, "p_safe": 1.0}, {"start": 1, "end": 3, "p_safe": 1.0}]},
                }
            ],
            "train row 0: span .* overlaps",
        ),
        ([{"messages": conversation("a", "b " * 300)}], "train row 0: has .* tokens, but max_length is 64"),
    ],
)
def test_bad_rows_are_named(rows, message, tokenizer):
    from datasets import Dataset

    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list(rows), tokenizer, needs_signal=False, max_length=64)


def test_empty_data_missing_scores_and_slow_tokenizers_are_refused(tokenizer):
    from datasets import Dataset

    with pytest.raises(ValueError, match="the train dataset is empty"):
        prepare(Dataset.from_list([]), tokenizer, needs_signal=False, max_length=64)
    with pytest.raises(ValueError, match="train row 0: has no `safety` score"):
        prepare(Dataset.from_list([{"messages": conversation("a", "b")}]), tokenizer, needs_signal=True, max_length=64)
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

    slow = ByT5Tokenizer()
    with pytest.raises(ValueError, match="ByT5Tokenizer gives no character offsets"):
        row_of({"prompt": "a", "completion": "b"}, slow)


def test_truncation_keeps_the_start_and_refuses_to_lose_the_whole_answer(tokenizer):
    row = {"messages": conversation("one", "two three four five six seven")}
    whole = row_of(row, tokenizer)
    length = len(whole["input_ids"])
    cut = training_row(row, tokenizer, needs_signal=False, max_length=length - 3, overlong="truncate")
    assert cut["input_ids"] == whole["input_ids"][:-3]
    assert cut["p_safe"] == whole["p_safe"][:-3]
    with pytest.raises(ValueError, match="has no token of its answer left"):
        training_row(row, tokenizer, needs_signal=False, max_length=4, overlong="truncate")


def test_collator_pads_scores_beside_labels(tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [
        {
            "input_ids": [5, 6, 7],
            "labels": [-100, 6, 7],
            "p_safe": [0.0, 0.5, 0.25],
            "answer_p_safe": [0.0, 0.25, 0.25],
        },
        {"input_ids": [5, 6], "labels": [-100, 6], "p_safe": [0.0, 1.0], "answer_p_safe": [0.0, 1.0]},
    ]
    batch = ShapedCollator(DataCollatorForLanguageModeling(pad_token_id=0))(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 6, -100]]
    assert batch["p_safe"].tolist() == [[0.0, 0.5, 0.25], [0.0, 1.0, 0.0]]
    assert example_risk(batch).tolist() == [0.75, 0.0]


def test_position_counts_from_one_in_each_turn():
    labels = torch.tensor([[-100, 7, 7, -100, -100, 7, 7, 7]])
    assert response_position(labels).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
