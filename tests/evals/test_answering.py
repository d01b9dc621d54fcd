"""Answers: batches equal one by one, each is kept as it arrives, and none is asked for twice."""

import json
from collections import Counter

import pytest
import torch
from conftest import TRIMMING, byte_bpe, tiny_model
from faulty_server import chat_answer, faulty_server
from peft import LoraConfig, get_peft_model

from safeshape.client import Client
from safeshape.evals import answering
from safeshape.evals.answering import Ask, LocalModel, ServerModel, answers, load_model, weights_hash
from safeshape.models import Sampling
from safeshape.store import Store


def user(text):
    return [{"role": "user", "content": text}]


def asks(*texts, **more):
    return [Ask(index=n, messages=user(text), max_new_tokens=6, **more) for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def loaded():
    return tiny_model()


TEXTS = ("one", "two three four five", "the quick brown fox jumps over the lazy dog", "a", "nine ten", "cat")


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.9)])
def test_batches_answer_as_one_by_one(loaded, tokenizer, sampling):
    wanted = asks(*TEXTS, sampling=sampling)
    single, whole = (LocalModel(loaded, tokenizer, name="m", batch_size=size) for size in (1, 4))
    one = [answers(single, [ask], Store(":memory:"))[0][0].text for ask in wanted]
    together, reused = answers(whole, wanted, Store(":memory:"))
    assert [a.text for a in together] == one
    assert [a.index for a in together] == list(range(6))
    assert len(set(one)) > 1
    assert reused == 0


def test_samples_differ_by_number_and_seed(loaded, tokenizer):
    model, store = LocalModel(loaded, tokenizer, name="m"), Store(":memory:")
    drawn = Sampling(temperature=2.0)
    wanted = [
        Ask(index=0, messages=user("one"), max_new_tokens=8, sampling=drawn, seed=seed, sample=sample)
        for seed in (0, 1)
        for sample in range(3)
    ]
    found, _ = answers(model, wanted, store)
    assert len({a.text for a in found}) == 6
    again, reused = answers(model, wanted, store)
    assert again == found
    assert reused == 6
    cold, _ = answers(model, [*asks("one", sampling=Sampling(temperature=0.01))], store)
    greedy, _ = answers(model, asks("one"), store)
    assert cold[0].text == greedy[0].text


def test_every_answer_is_in_the_store_and_found_by_all_that_makes_it(loaded, tokenizer):
    model, store = LocalModel(loaded, tokenizer, name="m"), Store(":memory:")
    answers(model, asks(*TEXTS), store)
    assert store.count("generations") == 6
    assert answers(model, asks(*TEXTS), store)[1] == 6
    # The same prompt twice is one answer; other lengths, models, templates are others.
    assert answers(model, asks("one", "new", "new"), store)[1] == 1
    assert store.count("generations") == 7
    longer = [Ask(index=0, messages=user("one"), max_new_tokens=7)]
    assert answers(model, longer, store)[1] == 0
    other = LocalModel(tiny_model(seed=1), tokenizer, name="m")
    assert answers(other, asks("one"), store)[1] == 0
    trimming = byte_bpe()
    trimming.chat_template = TRIMMING
    assert answers(LocalModel(loaded, trimming, name="m"), asks("one"), store)[1] == 0
    renamed = LocalModel(tiny_model(), tokenizer, name="another name of the same weights")
    assert answers(renamed, asks("one"), store)[1] == 1


def test_adapters_are_part_of_the_weights():
    def adapted(*, alpha=8, shift=0.0):
        model = get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter += shift
        return weights_hash(model)  # trainable, as while training

    torch.manual_seed(0)
    hashes = [adapted(), adapted(), adapted(shift=0.1), adapted(alpha=16)]
    torch.manual_seed(0)
    assert adapted() == hashes[0]
    assert len({hashes[0], *hashes[2:]}) == 3


def test_an_adapters_folder_is_put_onto_its_base(tmp_path, model_folder):
    base, tokenizer = load_model(str(model_folder))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(model_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    model, _ = load_model(str(tmp_path / "adapter"))
    ids = torch.tensor([tokenizer("the quick fox")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, adapted.eval()(ids).logits)
        assert not torch.equal(model(ids).logits, load_model(str(model_folder))[0](ids).logits)


def test_a_prompt_that_cannot_be_asked_fails_alone(loaded, tokenizer):
    store = Store(":memory:")
    found, _ = answers(LocalModel(loaded, tokenizer, name="m"), asks("one", "dog " * 600, "two"), store)
    assert found[1].text is None
    assert "tokens; the model reads 512" in found[1].error
    assert found[0].text is not None
    assert found[2].text is not None
    assert store.count("generations") == 2
    strict = byte_bpe()
    strict.chat_template = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}" + TRIMMING
    odd = Ask(index=0, messages=[{"role": "system", "content": "x"}, *user("one")], max_new_tokens=4)
    found, _ = answers(LocalModel(loaded, strict, name="m"), [odd, *asks("one")], store)
    assert "rejects the conversation: no system turn" in found[0].error
    assert found[1].text is not None
    bare = byte_bpe()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalModel(loaded, bare, name="m")


def test_a_run_that_ends_midway_keeps_what_it_had(loaded, tokenizer):
    class Dying(LocalModel):
        def answer(self, asks):
            for number, batch in enumerate(super().answer(asks)):
                if number == 2:
                    raise RuntimeError("killed")
                yield batch

    store = Store(":memory:")
    with pytest.raises(RuntimeError):
        answers(Dying(loaded, tokenizer, name="m", batch_size=2), asks(*TEXTS), store)
    assert store.count("generations") == 4
    told = []
    found, reused = answers(
        LocalModel(loaded, tokenizer, name="m", batch_size=2),
        asks(*TEXTS),
        store,
        progress=lambda done, total: told.append((done, total)),
    )
    assert reused == 4
    assert told == [(4, 6), (6, 6)]
    fresh, _ = answers(LocalModel(loaded, tokenizer, name="m"), asks(*TEXTS), Store(":memory:"))
    assert found == fresh


def test_blocks_bound_what_is_sorted_at_once(loaded, tokenizer, monkeypatch):
    monkeypatch.setattr(answering, "_BLOCK", 2)
    model = LocalModel(loaded, tokenizer, name="m")
    found, _ = answers(model, asks(*TEXTS), Store(":memory:"))
    monkeypatch.undo()
    assert found == answers(model, asks(*TEXTS), Store(":memory:"))[0]


@pytest.fixture
def server():
    with faulty_server() as running:
        running.answer = lambda body: chat_answer(body, " re: " + body["messages"][-1]["content"])
        yield running


def client(server, **more):
    return Client(server.url, model="tiny", **{"retries": 0, "pause_s": 0.01, **more})


def test_a_server_is_asked_through_the_shared_client(server):
    store = Store(":memory:")
    sampled = Sampling(temperature=0.7, top_p=0.8)
    with client(server) as shared:
        model = ServerModel(shared, request={"reasoning_effort": "low"})
        found, _ = answers(model, [*asks("one", "two"), *asks("one", sampling=sampled, seed=5)], store)
    assert [a.text for a in found] == ["re: one", "re: two", "re: one"]
    assert store.count("generations") == 3
    greedy = next(body for body in server.bodies if body["temperature"] == 0.0)
    assert greedy["max_tokens"] == 6
    assert greedy["reasoning_effort"] == "low"
    drawn = next(body for body in server.bodies if body["temperature"] == 0.7)
    assert drawn["top_p"] == 0.8
    assert drawn["seed"] == asks("one", sampling=sampled, seed=5)[0].noise() % 2**31


def test_a_failed_request_is_no_answer_and_is_asked_again_next_time(server):
    store = Store(":memory:")
    server.answer = lambda body: chat_answer(body, None if body["messages"][-1]["content"] == "two" else "fine")
    with client(server) as shared:
        found, _ = answers(ServerModel(shared), asks("one", "two", "three"), store)
    assert [a.text for a in found] == ["fine", None, "fine"]
    assert found[1].error == "the server's answer holds no text"
    server.answer = lambda body: chat_answer(body, "now")
    with client(server) as shared:
        found, reused = answers(ServerModel(shared), asks("one", "two", "three"), store)
    assert [a.text for a in found] == ["fine", "now", "fine"]
    assert reused == 2
    assert Counter(json.dumps(body["messages"]) for body in server.bodies).most_common(1)[0][1] == 2


def test_a_broken_server_gives_reasons(server):
    server.default_fault = "500"
    with client(server) as shared:
        found, _ = answers(ServerModel(shared), asks("one"), Store(":memory:"))
    assert found[0].text is None
    assert "HTTP 500" in found[0].error


def test_answers_of_a_server_are_kept_in_the_order_they_arrive(server):
    # The first is slow: what came before it is in the store already.
    store, kept = Store(":memory:"), []
    server.delay_s = lambda body: 0.5 if body["messages"][-1]["content"] == "slow" else 0.0
    with client(server, concurrency=2) as shared:
        found, _ = answers(
            ServerModel(shared),
            asks("slow", "b", "c", "d"),
            store,
            progress=lambda done, total: kept.append((done, store.count("generations"))),
        )
    assert kept == [(n, n) for n in range(5)]
    assert [a.text for a in found] == ["re: slow", "re: b", "re: c", "re: d"]
    with client(server, concurrency=2) as shared:
        order = [a.index for batch in ServerModel(shared).answer(asks("slow", "b", "c", "d")) for a in batch]
    assert order[-1] == 0


def test_a_begun_answer_is_continued_by_the_server(server):
    server.answer = lambda body: chat_answer(body, " we go ")
    begun = Ask(index=0, messages=[*user("ask"), {"role": "assistant", "content": "Sure,"}], max_new_tokens=4)
    with client(server) as shared:
        found, _ = answers(ServerModel(shared), [begun], Store(":memory:"))
    assert found[0].text == "Sure, we go"
    assert server.bodies[0]["continue_final_message"] is True
    assert server.bodies[0]["add_generation_prompt"] is False


def test_a_servers_identity_is_its_address_name_and_request(server):
    with client(server) as shared:
        plain, effort = ServerModel(shared), ServerModel(shared, request={"reasoning_effort": "low"})
        assert plain.identity()["url"] == server.url
        assert plain.identity() != effort.identity()
        with pytest.raises(ValueError, match="request must not hold 'temperature'"):
            ServerModel(shared, request={"temperature": 0.3})
    server.models = ["other"]
    with client(server) as shared, pytest.raises(ValueError, match="serves other, not 'tiny'"):
        ServerModel(shared)
