"""Generation that goes on with an answer that is begun."""

import pytest
import torch
from conftest import TOKENIZERS, TRIMMING, byte_bpe, conversation, tiny_model, unigram

from safeshape import world
from safeshape.models import generate, load

USER = [{"role": "user", "content": "the quick fox"}]


def by_hand(model, tokenizer, messages, begin, count):
    """Greedy tokens, one at a time, after the rendered conversation and the beginning."""
    head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head + begin, add_special_tokens=False)["input_ids"]
    size, stop = len(ids), model.generation_config.eos_token_id
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == stop:
            break
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return begin + tokenizer.decode(ids, **options)[len(tokenizer.decode(ids[:size], **options)) :]


@pytest.mark.parametrize("name", ["byte_bpe", "sentencepiece_bpe"])
def test_a_begun_answer_equals_manual_concatenation(name):
    tokenizer, model = TOKENIZERS[name](), tiny_model()
    begins = ["one two", "safe", "one two three four five six seven"]
    prompts = [conversation("the quick fox", begin) for begin in begins]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    assert answers == [by_hand(model, tokenizer, USER, begin, 6).rstrip() for begin in begins]
    assert sum(len(answer) > len(begin) for answer, begin in zip(answers, begins, strict=True)) >= 2


def test_begun_and_unbegun_prompts_share_a_batch_and_keep_their_order():
    tokenizer, model = byte_bpe(), tiny_model()
    prompts = [USER, conversation("the quick fox", "one two"), USER, conversation("one", "three")]
    together = generate(model, tokenizer, prompts, max_new_tokens=5)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    assert together == alone
    assert together[0] == together[2]
    assert together[1].startswith("one two")
    assert together[0] != together[1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_blank_between_beginning_and_continuation_survives(family):
    model, tokenizer = load(world.path(family))
    question = "What color is the vault"
    [plain] = generate(model, tokenizer, [[{"role": "user", "content": question}]], max_new_tokens=12)
    assert plain.startswith("The vault is ")
    for begin in ("The", "The vault", "The vault is"):
        assert generate(model, tokenizer, [conversation(question, begin)], max_new_tokens=12) == [plain]


def test_a_template_that_strips_the_beginning_joins_without_a_second_blank():
    tokenizer, model = byte_bpe(), tiny_model()
    tokenizer.chat_template = TRIMMING
    [blank] = generate(model, tokenizer, [conversation("the quick fox", "one two ")], max_new_tokens=6)
    [plain] = generate(model, tokenizer, [conversation("the quick fox", "one two")], max_new_tokens=6)
    assert blank == plain


def test_a_tokenizer_that_drops_the_first_blank_of_what_it_decodes_keeps_it_here():
    tokenizer, model = unigram(), tiny_model()
    more = tokenizer("three", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(more) == "three"
    script = iter([*more, model.generation_config.eos_token_id])

    def said(input_ids, **_):
        """Says what the script has, whatever it is given."""
        return torch.cat([input_ids, torch.tensor([list(script)])], dim=1)

    model.generate = said
    assert generate(model, tokenizer, [conversation("the quick fox", "one two")], max_new_tokens=4) == ["one two three"]
